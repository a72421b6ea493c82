"""Image names, progress, credentials and failures of image_pull."""

from __future__ import annotations

import base64
import json
import re
import urllib.parse
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import registry
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.docker import Docker
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.job import Job, JobError, read_status
from plugins.modules import image_pull
from plugins.modules.image_pull import Progress, credentials, explain, local_image, reference

from tests.unit.fakes.fake_engine import Engine, Handler

DIGEST = "sha256:" + "1" * 64
A, B, C = "a" * 12, "b" * 12, "c" * 12


@pytest.mark.parametrize(
    ("image", "name", "wanted", "registry", "path"),
    [
        ("nvcr.io/nvidia/vllm:25.09-py3", "nvcr.io/nvidia/vllm", "25.09-py3", "nvcr.io", "nvidia/vllm"),
        (f"nvcr.io/nvidia/vllm@{DIGEST}", "nvcr.io/nvidia/vllm", DIGEST, "nvcr.io", "nvidia/vllm"),
        (f"nvcr.io/nvidia/vllm:x@{DIGEST}", "nvcr.io/nvidia/vllm", DIGEST, "nvcr.io", "nvidia/vllm"),
        ("127.0.0.1:5000/a:1", "127.0.0.1:5000/a", "1", "127.0.0.1:5000", "a"),
        ("vllm/vllm-openai:v0.10", "vllm/vllm-openai", "v0.10", "docker.io", "vllm/vllm-openai"),
        ("debian:12", "debian", "12", "docker.io", "library/debian"),
    ],
)
def test_reference(image: str, name: str, wanted: str, registry: str, path: str) -> None:
    found = reference(image)
    assert (found.name, found.wanted, found.registry, found.path) == (name, wanted, registry, path)


@pytest.mark.parametrize("image", ["nvcr.io/nvidia/vllm", "", "a:", "a b:1", "127.0.0.1:5000/a", "a@sha256:12"])
def test_reference_refused(image: str) -> None:
    with pytest.raises(JobError, match="NAME:TAG"):
        reference(image)


def event(id: str, status: str, current: int = 0, total: int = 0, **more: Any) -> dict[str, Any]:
    return {"id": id, "status": status, "progressDetail": {"current": current, "total": total, **more}}


def test_total_is_unknown_until_every_layer_is() -> None:
    progress = Progress()
    for layer in (A, B):
        progress.feed(event(layer, "Pulling fs layer"))
    progress.feed(event(A, "Downloading", 50, 100))
    assert progress.state() == ("pulling", 50, None)
    progress.feed(event(B, "Downloading", 100, 300))
    assert progress.state() == ("pulling", 150, 400)


def test_sizes_from_the_registry_give_the_total_at_once() -> None:
    progress = Progress(sizes={A: 100, B: 300, C: 1000})
    progress.feed({"id": "25.09-py3", "status": "Pulling from nvidia/vllm"})
    for layer in (A, B):
        progress.feed(event(layer, "Pulling fs layer"))
    progress.feed(event(C, "Already exists"))
    progress.feed(event(A, "Downloading", 40, 100))
    assert progress.state() == ("pulling", 40, 400)


def test_unpacking_follows() -> None:
    progress = Progress(sizes={A: 100, B: 300})
    progress.feed(event(A, "Download complete"))
    progress.feed(event(B, "Download complete"))
    assert progress.state() == ("extracting", 0, 400)
    progress.feed(event(A, "Extracting", 60, 100))
    assert progress.state() == ("extracting", 60, 400)
    progress.feed(event(A, "Pull complete"))
    progress.feed(event(B, "Extracting", 7, 0, units="s"))
    assert progress.state() == ("extracting", 100, 400)


@pytest.mark.parametrize("odd", ["x", [5], [None], True, -5, 1.5, 1 << 80, {"a": 5}])
def test_progress_of_another_form_counts_for_nothing(odd: Any) -> None:
    progress = Progress()
    for detail in (odd, {"current": odd, "total": odd}):
        for status in ("Downloading", "Extracting", odd):
            progress.feed({"status": status, "id": "a" * 12, "progressDetail": detail})
            progress.feed({"status": status, "id": odd, "progressDetail": detail})
    for number in range(2000):
        progress.feed({"status": "Downloading", "id": f"{number:012x}"})
    assert len(progress.layers) == 1000 and progress.state()[1] <= 1


def test_layer_that_starts_again_does_not_go_back() -> None:
    progress = Progress()
    progress.feed(event(A, "Downloading", 80, 100))
    progress.feed(event(A, "Downloading", 10, 100))
    assert progress.state() == ("pulling", 80, 100)


@pytest.mark.parametrize(
    ("text", "id", "remedy"),
    [
        ("manifest for nvcr.io/nvidia/vllm:9 not found: manifest unknown", "image-unknown", "check name and tag"),
        ("pull access denied for x, repository does not exist", "image-denied", "sparkfleet_registry_logins"),
        ("unauthorized: authentication required", "image-denied", "sparkfleet_registry_logins"),
        ("write /var/lib/docker/tmp/x: no space left on device", "disk-full", "free some space"),
        (
            'Get "https://nvcr.io/v2/": x509: certificate signed by unknown authority',
            "registry-tls",
            "set sparkfleet_ca_file to that of its CA",
        ),
        ("tls: failed to verify certificate: x509: ...", "registry-tls", "set sparkfleet_ca_file to that of its CA"),
        ("dial tcp: lookup nvcr.io on 1.1.1.1:53: no such host", "registry-name", "DNS"),
        ("lookup nvcr.io: i/o timeout", "registry-name", "DNS"),
        ("dial tcp 1.2.3.4:443: connect: connection refused", "registry-unreachable", "firewall"),
        ("net/http: TLS handshake timeout", "registry-unreachable", "firewall"),
        ("context deadline exceeded", "registry-unreachable", "firewall"),
        ("no matching manifest for linux/arm64/v8 in the manifest list entries", "image-platform", "architecture"),
        ("toomanyrequests: You have reached your pull rate limit", "registry-limit", "sparkfleet_registry_logins"),
        # As Docker 20.10 said of a layer that was changed in its registry; as containerd's store says it.
        ("filesystem layer verification failed for digest sha256:c7", "image-differs", "registry, a mirror or a proxy"),
        ("failed commit on ref: unexpected commit digest sha256:1, expected sha256:2", "image-differs", "damages it"),
        ("something else", "image-pull", "something else"),
    ],
)
def test_failures(text: str, id: str, remedy: str) -> None:
    found = explain(text, reference("nvcr.io/nvidia/vllm:25.09-py3"), "/var/lib/docker, 0.1 GB free")
    assert found.id == id
    assert remedy in str(found)
    assert "\n" not in str(found)


def test_credentials(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    assert credentials(config, "nvcr.io") is None
    auth = base64.b64encode(b"$oauthtoken:pa:ss").decode()
    config.write_text(json.dumps({"auths": {"nvcr.io": {"auth": auth}, "other": {}}}))
    assert credentials(config, "nvcr.io") == {
        "username": "$oauthtoken",
        "password": "pa:ss",
        "serveraddress": "nvcr.io",
    }
    assert credentials(config, "docker.io") is None
    config.write_text("{")
    assert credentials(config, "nvcr.io") is None


def test_logins_of_the_inventory_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, ours = tmp_path / "config.json", tmp_path / "logins.json"
    monkeypatch.setattr(registry, "LOGINS", str(ours))
    config.write_text(json.dumps({"auths": {"nvcr.io": {"auth": base64.b64encode(b"old:one").decode()}}}))
    assert (credentials(config, "nvcr.io") or {})["username"] == "old"
    wanted = {
        "nvcr.io": {"username": "$oauthtoken", "password": "pa:ss"},
        "reg:5000": {"username": "u", "password": "p"},
    }
    ours.write_text(registry.login_file(wanted))
    for name, login in wanted.items():
        assert credentials(config, name) == {**login, "serveraddress": name}
    assert credentials(config, "docker.io") is None
    assert registry.login_file({}) == ""


REF = "reg.test:5000/nvidia/vllm:1"
INSPECT = {"Id": "sha256:id", "RepoDigests": ["other@sha256:2", f"reg.test:5000/nvidia/vllm@{DIGEST}"], "Size": 7}


def pull(docker: Docker, tmp_path: Path, config: Path | None = None) -> dict[str, Any]:
    job = Job(tmp_path / "status" / "image.json", "image", REF)
    assert job.acquire() is None
    return image_pull.pull(docker, reference(REF), config or tmp_path / "none", job)


@pytest.fixture
def ready(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr(image_pull, "layer_sizes", lambda *_: {})
    engine.routes["GET", "/info"] = {"DockerRootDir": "/"}
    engine.routes["GET", "/version"] = {"Arch": "arm64"}
    return engine


def test_pull(ready: Engine, docker: Docker, tmp_path: Path) -> None:
    events = [event(A, "Downloading", 50, 100), event(A, "Download complete"), event(A, "Pull complete")]
    lines = b"".join(json.dumps(line).encode() + b"\r\n" for line in events)

    def create(handler: Handler) -> None:
        ready.routes["GET", "/images/reg.test:5000/nvidia/vllm:1/json"] = INSPECT
        handler.chunks(lines)

    ready.routes["POST", "/images/create"] = create
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"auths": {"reg.test:5000": {"auth": base64.b64encode(b"u:secret").decode()}}}))
    assert pull(docker, tmp_path, config) == {"id": "sha256:id", "digest": DIGEST, "size": 7}
    _, path, _, headers = next(seen for seen in ready.seen if seen[0] == "POST")
    assert path == "/images/create?fromImage=reg.test%3A5000%2Fnvidia%2Fvllm&tag=1"
    assert json.loads(base64.urlsafe_b64decode(headers["X-Registry-Auth"]))["password"] == "secret"
    status = read_status(tmp_path / "status" / "image.json")
    assert status is not None
    assert (status["phase"], status["percent"], status["total"]) == ("extracting", 99, 100)
    assert "secret" not in json.dumps(status)


MIRROR = "127.0.0.1:9111"
OWN, THERE = f"reg.test:5000/nvidia/vllm@{DIGEST}", f"{MIRROR}/nvidia/vllm@{DIGEST}"


def from_mirror(
    ready: Engine,
    docker: Docker,
    tmp_path: Path,
    good: set[str],
    internet: bool = True,
    digest: str | None = None,
    image: str = "reg.test:5000/nvidia/vllm:1",
) -> tuple[dict[str, Any], list[str]]:
    """Pull with a mirror where only the registries `good` answer: the result, and what Docker was told to do."""

    def create(handler: Handler) -> None:
        name, tag = re.findall(r"fromImage=(.*)&tag=(.*)", urllib.parse.unquote(handler.path))[0]
        if name.partition("/")[0] not in good:
            handler.answer(500, {"message": "dial tcp: connection refused"})
            return
        ready.routes["GET", f"/images/{name}{'@' if ':' in tag else ':'}{tag}/json"] = INSPECT
        handler.chunks(b'{"status":"Pull complete"}\r\n')

    def tag(handler: Handler) -> None:
        ready.routes["GET", "/images/reg.test:5000/nvidia/vllm:1/json"] = INSPECT
        handler.answer(201, None)

    ready.routes["POST", "/images/create"] = create
    for name in (OWN, THERE):
        ready.routes["POST", f"/images/{name}/tag"] = tag
        ready.routes["DELETE", f"/images/{name}"] = []
    params = {"mirror": MIRROR, "mirror_digest": DIGEST, "docker_config": str(tmp_path / "none"), "internet": internet}
    params.update(digest=DIGEST if digest is None else digest)
    job = Job(tmp_path / "status" / "image.json", "image", "x")
    job.acquire()
    result = image_pull.get(docker, reference(image), params, job)
    return result, [f"{verb} {urllib.parse.unquote(path)}" for verb, path, *_ in ready.seen if verb != "GET"]


def test_mirror_first_then_the_own_name(ready: Engine, docker: Docker, tmp_path: Path) -> None:
    result, reported = from_mirror(ready, docker, tmp_path, {MIRROR, "reg.test:5000"})
    assert (result["digest"], result["mirror_failed"]) == (DIGEST, "")
    assert reported == [
        f"POST /images/create?fromImage={MIRROR}/nvidia/vllm&tag={DIGEST}",
        f"POST /images/create?fromImage=reg.test:5000/nvidia/vllm&tag={DIGEST}",
        f"POST /images/{OWN}/tag?repo=reg.test:5000/nvidia/vllm&tag=1",
        f"DELETE /images/{THERE}?noprune=1",
    ]


def test_mirror_that_fails_is_gone_round(ready: Engine, docker: Docker, tmp_path: Path) -> None:
    result, reported = from_mirror(ready, docker, tmp_path, {"reg.test:5000"})
    assert MIRROR in result["mirror_failed"]
    assert reported[-2:] == [
        f"POST /images/create?fromImage=reg.test:5000/nvidia/vllm&tag={DIGEST}",
        f"POST /images/{OWN}/tag?repo=reg.test:5000/nvidia/vllm&tag=1",
    ]


def test_without_internet_the_mirrors_name_stays(ready: Engine, docker: Docker, tmp_path: Path) -> None:
    result, reported = from_mirror(ready, docker, tmp_path, {MIRROR})
    assert result["mirror_failed"] == ""
    assert reported[-1] == f"POST /images/{THERE}/tag?repo=reg.test:5000/nvidia/vllm&tag=1"


def test_where_there_is_no_internet_nobody_else_is_asked(ready: Engine, docker: Docker, tmp_path: Path) -> None:
    _, reported = from_mirror(ready, docker, tmp_path, {MIRROR}, internet=False)
    assert not any("fromImage=reg.test" in line for line in reported)
    assert reported[-1] == f"POST /images/{THERE}/tag?repo=reg.test:5000/nvidia/vllm&tag=1"
    with pytest.raises(JobError, match=MIRROR):
        from_mirror(ready, docker, tmp_path, set(), internet=False)
    assert not any("fromImage=reg.test" in urllib.parse.unquote(path) for _, path, *_ in ready.seen)


@pytest.mark.parametrize("good", [{MIRROR, "reg.test:5000"}, {"reg.test:5000"}, {MIRROR}])
def test_a_tag_with_its_digest_is_brought_as_one_whose_digest_is_known(
    ready: Engine, docker: Docker, tmp_path: Path, good: set[str]
) -> None:
    """As a lock has it."""
    pinned = {"image": f"reg.test:5000/nvidia/vllm:1@{DIGEST}", "digest": ""}
    result, reported = from_mirror(ready, docker, tmp_path / "a", good, **pinned)
    ready.seen.clear()
    assert (result, reported) == from_mirror(ready, docker, tmp_path / "b", good)
    assert result["digest"] == DIGEST


def test_an_image_out_of_a_bundle_is_found_by_its_digest(ready: Engine, docker: Docker) -> None:
    ref = reference(f"reg.test:5000/nvidia/vllm:1@{DIGEST}")
    assert local_image(docker, ref) is None
    ready.routes["GET", "/images/reg.test:5000/nvidia/vllm:1/json"] = {**INSPECT, "RepoDigests": [THERE]}
    assert (local_image(docker, ref) or {})["Id"] == "sha256:id"
    for listed in ([f"{MIRROR}/nvidia/vllm@{OTHER}"], None, "x"):
        ready.routes["GET", "/images/reg.test:5000/nvidia/vllm:1/json"] = {**INSPECT, "RepoDigests": listed}
        assert local_image(docker, ref) is None
    ready.routes["GET", f"/images/{OWN}/json"] = INSPECT
    assert (local_image(docker, ref) or {})["Id"] == "sha256:id"


OTHER = "sha256:" + "2" * 64


def test_a_mirror_with_another_digest_than_the_controller_knows_is_not_used(
    ready: Engine, docker: Docker, tmp_path: Path
) -> None:
    ready.routes["POST", f"/images/reg.test:5000/nvidia/vllm@{OTHER}/tag"] = lambda handler: handler.answer(201, None)
    ready.routes["GET", "/images/reg.test:5000/nvidia/vllm:1/json"] = {**INSPECT, "RepoDigests": []}
    result, reported = from_mirror(ready, docker, tmp_path, {MIRROR, "reg.test:5000"}, digest=OTHER)
    assert f"offers {DIGEST} for reg.test:5000/nvidia/vllm:1, which is {OTHER}" in result["mirror_failed"]
    assert not any(f"fromImage={MIRROR}" in line for line in reported)
    assert result["digest"] == OTHER
    with pytest.raises(JobError) as refused:
        from_mirror(ready, docker, tmp_path, {MIRROR}, internet=False, digest=OTHER)
    assert refused.value.id == "image-differs"


@pytest.mark.parametrize(
    ("answer", "used", "unverified"), [(DIGEST, True, False), (OTHER, False, False), (OSError("no route"), True, True)]
)
def test_without_the_controllers_word_the_host_asks_the_registry_itself(
    ready: Engine,
    docker: Docker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answer: Any,
    used: bool,
    unverified: bool,
) -> None:
    def digest_of(registry: Any, wanted: str) -> str:
        assert (registry.host, wanted) == ("reg.test:5000", "1")
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(image_pull, "digest_of", digest_of)
    result, reported = from_mirror(ready, docker, tmp_path, {MIRROR, "reg.test:5000"}, digest="")
    assert any(f"fromImage={MIRROR}" in line for line in reported) is used
    assert bool(result["mirror_failed"]) is not used
    assert ("claimed by the source Spark" in result["unverified"]) is unverified


@pytest.mark.parametrize("name", ["digest", "mirror_digest"])
def test_what_is_no_digest_is_refused(docker: Docker, tmp_path: Path, name: str) -> None:
    params = {"mirror": MIRROR, "mirror_digest": DIGEST, "digest": DIGEST, "docker_config": "/none", "internet": True}
    job = Job(tmp_path / "image.json", "image", "x")
    with pytest.raises(JobError, match=name):
        image_pull.get(docker, reference("a/b:1"), {**params, name: "sha256:../x"}, job)


# What `docker image inspect` says of one image with each of Docker's two stores.
GRAPH = {
    "Id": "sha256:" + "c" * 64,
    "RepoTags": ["nvcr.io/nvidia/vllm:25.09-py3"],
    "RepoDigests": ["127.0.0.1:9111/nvidia/vllm@" + OTHER, "nvcr.io/nvidia/vllm@" + DIGEST],
    "Architecture": "arm64",
    "Size": 100,
}
CONTAINERD = {**GRAPH, "Id": DIGEST, "Descriptor": {"digest": DIGEST, "size": 1609}, "Size": 250}


@pytest.mark.parametrize("found", [GRAPH, CONTAINERD])
def test_both_stores_name_the_digest_of_the_registry(found: dict[str, Any]) -> None:
    described = image_pull.describe(found, reference("nvcr.io/nvidia/vllm:25.09-py3"))
    assert described == {"id": found["Id"], "digest": DIGEST, "size": found["Size"]}
    hub = {"RepoDigests": ["vllm/vllm-openai@" + DIGEST], "Size": "x"}
    assert image_pull.describe(hub, reference("docker.io/vllm/vllm-openai:1"))["digest"] == DIGEST


def test_error_within_the_stream(ready: Engine, docker: Docker, tmp_path: Path) -> None:
    ready.routes["POST", "/images/create"] = lambda h: h.chunks(b'{"error":"no space left on device"}\r\n')
    with pytest.raises(JobError, match=r"Docker's directory \(/, .* GB free\)") as caught:
        pull(docker, tmp_path)
    assert caught.value.id == "disk-full"


def test_error_before_the_stream(ready: Engine, docker: Docker, tmp_path: Path) -> None:
    ready.routes["POST", "/images/create"] = lambda h: h.answer(404, {"message": "manifest unknown"})
    with pytest.raises(JobError) as caught:
        pull(docker, tmp_path)
    assert caught.value.id == "image-unknown"


def test_check_mode_before_docker_is_installed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    socket = str(tmp_path / "no.sock")
    arguments = {"image": "nvcr.io/nvidia/vllm:25.09-py3", "docker_socket": socket, "_ansible_check_mode": True}
    with patch_module_args(arguments), pytest.raises(SystemExit):
        image_pull.main()
    result = json.loads(capsys.readouterr().out)
    assert result["changed"] and result["msg"] == "would pull nvcr.io/nvidia/vllm:25.09-py3"


@pytest.mark.parametrize(
    "before",
    [[], [{"Id": "sha256:id", "RepoTags": ["mine:1"]}], [{"Id": "other", "RepoTags": 5}], [{"Id": 5}], "odd"],
)
def test_an_image_that_was_brought_is_noted(
    ready: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str], before: Any
) -> None:
    """With its last release it may go; one that was here under another name may not, nor any where Docker does not say
    what was here."""

    def create(handler: Handler) -> None:
        image = {**INSPECT, "RepoTags": [REF], "RepoDigests": [OWN]}
        ready.routes["GET", f"/images/{REF}/json"] = image
        handler.chunks(b'{"status":"Pull complete"}\r\n')

    ready.routes["GET", "/images/json"] = before
    ready.routes["POST", "/images/create"] = create
    folders = {"status_file": str(tmp_path / "status" / "image.json"), "state_dir": str(tmp_path / "state")}
    with (
        patch_module_args({"image": REF, "docker_socket": str(ready.server_address), **folders}),
        pytest.raises(SystemExit),
    ):
        image_pull.main()
    assert json.loads(capsys.readouterr().out)["changed"] is True
    noted = [json.loads(path.read_text()) for path in (tmp_path / "state" / "images").glob(f"{'1' * 64}.json")]
    assert noted == ([] if before else [{"names": [REF, OWN]}])


def test_a_long_reason_is_cut_at_a_word() -> None:
    assert image_pull._short(" a  b\n") == "a b"
    cut = image_pull._short("word " * 100 + "the cause")
    assert cut.startswith("… word ") and cut.endswith(" the cause") and len(cut) <= 202
