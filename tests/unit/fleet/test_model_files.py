"""The controller asks the Hub which commit and files a model has; no Spark is believed about what others load."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible.errors import AnsibleActionFail
from hypothesis import given
from hypothesis import strategies as st
from plugins.action import model_files as action
from plugins.modules import bundle_collect, model_download
from sparkfleet_host import cache

from sparkfleet import SparkfleetError
from sparkfleet.fleet import lock_upstream, model_files
from sparkfleet.fleet.model_files import Answer, Way
from sparkfleet.packaging import hub_client, signature
from sparkfleet.packaging.bundle import Bundle, Entry
from sparkfleet.planning.lock import File, Lock
from tests.unit.fakes.authority import Authority
from tests.unit.fakes.fake_hub import Hub, serve
from tests.unit.host.test_fetch_model import fetch
from tests.unit.packaging import test_signature

FILES = {"config.json": b'{"a": 1}', "model.safetensors": b"w" * 5000, "weights.bin": b"pickle", "chat.jinja": b"hi"}
TOKEN = "hf_canary"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, client: Path) -> None:
    monkeypatch.setattr(hub_client, "build", lambda folder: client)
    for name in ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve(Hub(files=dict(FILES), large=("model.safetensors",))) as served:
        yield served


def ask(hub: Hub, revision: str = "main", **way: str) -> Answer:
    return model_files.resolve(hub.repo, revision, Way(hub.url, **way))


def has(hub: Hub) -> dict[str, dict[str, Any]]:
    """What the list of a Hub has, without other copies of the weights."""
    kinds = {name: "sha256" if name in hub.large else "sha1" for name in hub.files if name != "weights.bin"}
    return {name: {"size": len(hub.files[name]), kind: hub.hash(name)} for name, kind in kinds.items()}


# -- the controller --------------------------------------------------------------------------------------------------


def test_the_hub_says_commit_and_files(hub: Hub) -> None:
    assert ask(hub) == Answer(hub.commit, has(hub))
    assert ask(hub, hub.commit) == Answer(hub.commit, has(hub))
    assert not [path for _, path, _ in hub.asked if "/resolve/" in path]  # a list, and no file


def test_controller_and_host_choose_the_same_files(hub: Hub, tmp_path: Path) -> None:
    """Without code, unless the engine runs it; each host of a run as it wants."""
    code = {"modeling.py": b"code"}
    hub.files |= code
    listed = has(hub)
    plain = {name: entry for name, entry in listed.items() if name not in code}
    way = Way(hub.url)
    assert model_files.of_run(tmp_path, hub.repo, "main", way)[0].files == plain
    assert model_files.of_run(tmp_path, hub.repo, "main", way, remote_code=True)[0].files == listed
    command = model_download.command(params(tmp_path, remote_code=True))
    assert "--remote-code" in command and "--remote-code" not in model_download.command(params(tmp_path))


def test_a_model_of_an_earlier_version_is_collected_without_its_code(tmp_path: Path) -> None:
    files = {"config.json": {"size": 2, "sha1": "2" * 40}, "modeling.py": {"size": 4, "sha1": "3" * 40}}
    snapshot = tmp_path / "models--acme--tiny" / "snapshots" / ("1" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "modeling.py").write_text("code")
    place = tmp_path / ".sparkfleet" / "models--acme--tiny" / f"{'1' * 40}.json"
    place.parent.mkdir(parents=True)
    place.write_text(json.dumps({"commit": "1" * 40, "files": files}))
    given = {"cache_dir": str(tmp_path), "repo": "acme/tiny", "revision": "1" * 40}
    assert list(bundle_collect.collect_model(given)[0]["files"]) == ["config.json"]
    assert list(bundle_collect.collect_model({**given, "remote_code": True})[0]["files"]) == list(files)


def test_another_commit_than_the_one_asked_for_is_odd(hub: Hub) -> None:
    hub.branch = "1" * 40
    found = ask(hub, "1" * 40)
    assert (found.commit, found.failure) == ("", "hub-answer-odd")
    assert hub.commit in found.reason


def test_a_hub_that_is_not_reached_is_a_reason(hub: Hub) -> None:
    found = model_files.resolve("acme/tiny", "main", Way("http://127.0.0.1:9"))
    assert (found.expected, found.failure) == ({}, "hub-unreachable")
    assert "127.0.0.1:9" in found.reason
    assert ask(hub, "other").failure == "hub-revision-unknown"


def test_a_hub_that_is_slow_is_not_waited_for(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_files, "SECONDS", 0.01)
    found = ask(hub)
    assert (found.expected, found.failure) == ({}, "hub-unreachable")


@pytest.mark.parametrize(
    ("verb", "body"),
    [
        ("revision", b"[]"),
        ("revision", b'{"id": "a/b", "sha": "../x", "siblings": []}'),
        ("tree", b'{"a": 1}'),
        ("tree", b"<html>Sign in</html>"),
        ("tree", b'[{"type": "file", "path": "../x", "size": 1, "oid": "%s"}]' % (b"1" * 40)),
        ("tree", b'[{"type": "file", "path": "x", "size": -1, "oid": "%s"}]' % (b"1" * 40)),
        ("tree", b"[]"),
    ],
)
def test_odd_answers_are_typed(hub: Hub, verb: str, body: bytes) -> None:
    hub.answer[verb] = body
    found = ask(hub)
    assert found.expected == {}
    assert found.failure in ("hub-answer-odd", "hub-revision-unknown") and found.reason


@given(
    st.binary(max_size=60)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["listing", "error", "commit", "files", "a", "size", "sha1"]), inner, max_size=4
            )
        ),
    ).map(lambda value: json.dumps(value).encode())
)
def test_whatever_the_client_says_is_understood(printed: bytes) -> None:
    found = model_files.understand(printed, "main")
    assert bool(found.expected) != bool(found.reason)


@pytest.mark.parametrize(
    ("repo", "revision"), [("../x", "main"), ("a/b", "--list"), ("a/b", "../x"), ("a b/c", "main")]
)
def test_what_is_no_model_is_refused(repo: str, revision: str) -> None:
    with pytest.raises(SparkfleetError, match="ORG/NAME"):
        model_files.resolve(repo, revision, Way("http://127.0.0.1:9"))


def test_the_token_is_in_a_file_that_goes(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(model_files.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_user")
    seen: list[tuple[list[str], dict[str, str]]] = []
    real = model_files.subprocess.run

    def run(argv: list[str], **more: Any) -> Any:
        seen.append((argv, more["env"]))
        return real(argv, **more)

    monkeypatch.setattr(model_files.subprocess, "run", run)
    found = ask(hub, token=TOKEN)
    assert {token for path, token in hub.tokens_seen if path.startswith("/api/models/")} == {f"Bearer {TOKEN}"}
    assert TOKEN not in json.dumps(seen) + repr(found) + repr(Way(hub.url, token=TOKEN))
    assert list(tmp_path.iterdir()) == []


def test_the_token_is_not_sent_in_clear(tmp_path: Path) -> None:
    for endpoint, kept in {
        "http://hub.example": False,
        "https://hub.example": True,
        "http://127.0.0.1:9": True,
    }.items():
        folder = tmp_path / endpoint.replace("/", "_")
        folder.mkdir()
        found = model_files.environment(Way(endpoint, TOKEN), folder)
        assert Path(found["HF_TOKEN_PATH"]).is_file() is kept
        assert TOKEN not in json.dumps(found)
        if kept:
            assert Path(found["HF_TOKEN_PATH"]).stat().st_mode & 0o777 == 0o600


def test_proxy_and_authorities(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    way = Way("https://hub.example/", "", "http://proxy:3128", "hub.internal")
    found = model_files.environment(way, tmp_path)
    assert (found["HF_ENDPOINT"], found["HTTPS_PROXY"]) == ("https://hub.example", "http://proxy:3128")
    assert found["NO_PROXY"] == "hub.internal"
    monkeypatch.setenv("HTTPS_PROXY", "http://mine:1")
    monkeypatch.setenv("SSL_CERT_FILE", "/mine.pem")
    found = model_files.environment(way, tmp_path)
    assert (found["HTTPS_PROXY"], found["SSL_CERT_FILE"]) == ("http://mine:1", "/mine.pem")


def test_a_private_ca_is_trusted_besides_this_controllers_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the real client, asked by TLS; those that this controller trusts otherwise stay trusted."""
    authority, other = Authority(tmp_path / "ca"), Authority(tmp_path / "other", "Another CA")
    with serve(Hub(files=dict(FILES), large=("model.safetensors",)), pair=authority.server) as hub:
        failed = ask(hub)
        assert failed.failure == "hub-unreachable" and "for a private CA set sparkfleet_ca_file" in failed.reason
        assert ask(hub, ca=authority.pem) == Answer(hub.commit, has(hub))
        assert ask(hub, ca=other.pem).failure == "hub-unreachable"
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca))
        assert ask(hub, ca=other.pem) == Answer(hub.commit, has(hub))


def test_the_distributions_certificates_are_found_where_python_names_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle.crt"
    bundle.write_text("of the distribution")
    monkeypatch.setattr(model_files.ssl, "get_default_verify_paths", lambda: SimpleNamespace(cafile=None))
    monkeypatch.setattr(model_files, "BUNDLES", (str(tmp_path / "missing"), str(bundle)))
    found = model_files.environment(Way(ca="private"), tmp_path)
    assert Path(found["SSL_CERT_FILE"]).read_text() == "of the distribution\nprivate"
    assert "SSL_CERT_FILE" not in model_files.environment(Way(), tmp_path)


def test_a_run_asks_once(hub: Hub, tmp_path: Path) -> None:
    way = Way(hub.url, TOKEN)
    first, new = model_files.of_run(tmp_path, hub.repo, "main", way)
    assert (first.commit, new) == (hub.commit, True)
    asked = len(hub.asked)
    hub.files["config.json"] = b"moved"
    assert model_files.of_run(tmp_path, hub.repo, "main", way) == (first, False)
    assert len(hub.asked) == asked
    assert TOKEN not in (tmp_path / "sparkfleet-models.json").read_text()


# -- what is offered -------------------------------------------------------------------------------------------------


def hostile(hub: Hub, **files: bytes | None) -> Hub:
    """Another Spark that names the commit that is asked for, and files of its own."""
    content = {**hub.files, **{name.replace("_", "."): value for name, value in files.items()}}
    made = Hub(files={name: value for name, value in content.items() if value is not None}, large=hub.large)
    return dataclasses.replace(made, branch=hub.commit)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"config_json": b'{"a": 2}'}, ["config.json is sha1:", "instead of sha1:", "(8 bytes)"]),
        ({"model_safetensors": b"evil"}, ["model.safetensors is sha256:", "(4 bytes) instead of sha256:"]),
        ({"code_py": b"import os"}, ["code.py is sha1:", "instead of no file"]),
        ({"chat_jinja": None}, ["chat.jinja is no file instead of sha1:"]),
    ],
)
def test_a_spark_that_offers_other_files_is_refused(
    client: Path, hub: Hub, tmp_path: Path, change: dict[str, Any], words: list[str]
) -> None:
    expected = tmp_path / "expected.json"
    expected.write_text(json.dumps(ask(hub).expected))
    other = hostile(hub, **change)
    # It says the commit that is wanted, and lists files of its own.
    other.answer["revision"] = json.dumps({"id": hub.repo, "sha": hub.commit, "siblings": []}).encode()
    with serve(other):
        tree = json.dumps(other.tree()).encode()
        other.answer["tree"] = tree
        error = fetch(client, other, tmp_path / "hf", "--expected", str(expected), "--remote-code")[-1]["error"]
    assert error["id"] == "model-differs"
    assert all(word in error["message"] for word in words), error
    assert not (tmp_path / "hf" / ".sparkfleet").exists()
    assert not [path for _, path, _ in other.asked if "/resolve/" in path]


def test_a_spark_that_offers_another_commit_is_refused(client: Path, hub: Hub, tmp_path: Path) -> None:
    expected = tmp_path / "expected.json"
    expected.write_text(json.dumps(ask(hub).expected))
    with serve(hostile(hub, config_json=b"older")) as other:
        error = fetch(client, other, tmp_path / "hf", "--expected", str(expected))[-1]["error"]
    assert error["id"] == "model-differs"
    assert f"commit {other.commit} instead of {hub.commit}" in error["message"]


def test_what_is_expected_is_fetched_though_the_branch_moved(client: Path, hub: Hub, tmp_path: Path) -> None:
    expected = tmp_path / "expected.json"
    expected.write_text(json.dumps(ask(hub).expected))
    hub.branch = "elsewhere"
    result = fetch(client, hub, tmp_path / "hf", "--expected", str(expected))[-1]["result"]
    assert result["commit"] == hub.commit
    assert (tmp_path / "hf/models--acme--tiny/refs/main").read_text() == hub.commit


def lock_of(hub: Hub, path: Path) -> Lock:
    """The lock of a Hub as it is."""
    model = lock_upstream.ask_model(hub.repo, "main", False, Way(hub.url))
    made = Lock(models={f"{hub.repo}@main": model}, path=path)
    made.write()
    return made


@pytest.mark.parametrize("kind", ["config_json", "model_safetensors"])
def test_what_differs_from_a_lock_is_refused(client: Path, hub: Hub, tmp_path: Path, kind: str) -> None:
    """A Hub, a mirror or a Spark that has the commit of the lock and other files."""
    made, expected = lock_of(hub, tmp_path / "lock.yml").at(hub.repo, hub.commit), tmp_path / "expected.json"
    expected.write_text(json.dumps(made.expected(False)))
    other = hostile(hub, **{kind: b"evil"})
    other.answer["revision"] = json.dumps({"id": hub.repo, "sha": hub.commit, "siblings": []}).encode()
    with serve(other):
        error = fetch(client, other, tmp_path / "hf", "--expected", str(expected))[-1]["error"]
    assert error["id"] == "lock-mismatch" and "than the lock has" in error["message"], error
    assert fetch(client, hub, tmp_path / "hf", "--expected", str(expected))[-1]["result"]["commit"] == hub.commit


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_content_that_is_not_the_locks(client: Path, hub: Hub, tmp_path: Path, name: str) -> None:
    """Bytes that differ from the list; and, as with a collision of Git's sha1, from the lock alone."""
    made, expected = lock_of(hub, tmp_path / "lock.yml").at(hub.repo, hub.commit), tmp_path / "expected.json"
    listing = made.expected(False)
    if name in hub.large:
        hub.corrupt[name] = 9
    else:
        listing["files"][name]["sha256"] = "0" * 64
    expected.write_text(json.dumps(listing))
    error = fetch(client, hub, tmp_path / "hf", "--expected", str(expected))[-1]["error"]
    assert error["id"] == "lock-mismatch" and f"{name} of acme/tiny" in error["message"], error
    assert not list(tmp_path.glob("hf/.sparkfleet/*/*.suspect.json"))
    assert not (tmp_path / "hf/.sparkfleet/models--acme--tiny" / f"{hub.commit}.json").exists()


# -- the module ------------------------------------------------------------------------------------------------------


def test_a_model_that_is_complete_by_another_list_than_the_locks_is_checked_again(
    client: Path, hub: Hub, tmp_path: Path
) -> None:
    """As one that a hostile Spark served before there was a lock: only what is wrong is fetched again."""
    made, cache_dir = lock_of(hub, tmp_path / "lock.yml").at(hub.repo, hub.commit), tmp_path / "hf"
    assert "result" in fetch(client, hub, cache_dir)[-1]
    given = params(cache_dir, revision=hub.commit, expected=made.expected(False))
    assert model_download.current_state(given)["complete"]
    manifest = cache_dir / ".sparkfleet/models--acme--tiny" / f"{hub.commit}.json"
    listed = json.loads(manifest.read_text())
    evil = b"e" * 5000
    listed["files"]["model.safetensors"]["sha256"] = hashlib.sha256(evil).hexdigest()
    manifest.write_text(json.dumps(listed))
    (cache_dir / "models--acme--tiny/snapshots" / hub.commit / "model.safetensors").resolve().write_bytes(evil)
    assert model_download.current_state({**given, "expected": {}})["complete"]  # what it was before there were locks
    assert not model_download.current_state(given)["complete"]
    expected, before = tmp_path / "expected.json", len(hub.asked)
    expected.write_text(json.dumps(given["expected"]))
    assert "result" in fetch(client, hub, cache_dir, "--expected", str(expected))[-1]
    fetched = {
        path.rpartition("/")[2] for method, path, _ in hub.asked[before:] if method == "GET" and "/resolve/" in path
    }
    assert fetched == {"model.safetensors"}
    assert model_download.current_state(given)["complete"]


LISTING = {"commit": "1" * 40, "files": {"config.json": {"size": 1, "sha1": "2" * 40}}}


def params(tmp_path: Path, **more: Any) -> dict[str, Any]:
    given = {"repo": "acme/tiny", "revision": "main", "cache_dir": str(tmp_path), "client": "/c", "token_file": "/none"}
    given.update(environment={}, allow=[], ignore=None, memory=1, workers=1, network="bridge", internet=True)
    return {
        **given,
        "peer": "http://127.0.0.1:9112",
        "status_file": str(tmp_path / "model.json"),
        "expected": {},
        **more,
    }


def test_the_container_has_the_list_and_no_older_one(tmp_path: Path) -> None:
    given = params(tmp_path, expected=LISTING)
    model_download.write_expected(given)
    spec = model_download.container_spec(given)
    mount = next(item for item in spec["HostConfig"]["Mounts"] if item["Target"] == "/run/expected.json")
    assert mount["ReadOnly"] and json.loads(Path(mount["Source"]).read_text()) == LISTING
    assert spec["Cmd"][-2:] == ["--expected", "/run/expected.json"]
    model_download.write_expected(params(tmp_path))
    assert not Path(mount["Source"]).exists()
    assert "--expected" not in model_download.container_spec(params(tmp_path))["Cmd"]


def test_a_spark_that_is_refused_is_gone_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def run_client(docker: Any, given: dict[str, Any], job: Any) -> dict[str, Any]:
        seen.append((given["environment"].get("HF_ENDPOINT"), given["expected"]))
        if given["network"] == "host":
            raise model_download.JobError("model-differs", "config.json is A instead of B")
        return {"commit": "1" * 40}

    monkeypatch.setattr(model_download, "run_client", run_client)
    job: Any = None
    docker: Any = None
    result = model_download.fetch(docker, params(tmp_path, expected=LISTING), job)
    assert "config.json is A instead of B; check the Spark" in result["peer_failed"]
    assert seen == [("http://127.0.0.1:9112", LISTING), (None, LISTING)]
    with pytest.raises(model_download.JobError, match="A instead of B") as refused:
        model_download.fetch(docker, params(tmp_path, expected=LISTING, internet=False), job)
    assert refused.value.id == "model-differs"
    # What was whole here once: another Spark must have the same, where the controller does not know.
    seen.clear()
    model_download.fetch(docker, params(tmp_path, known=LISTING), job)
    assert seen == [("http://127.0.0.1:9112", LISTING), (None, {})]


@pytest.mark.parametrize(
    ("expected", "revision", "failure"),
    [
        ({"commit": "x", "files": LISTING["files"]}, "main", "bad-input"),
        ({"commit": "1" * 40, "files": {}}, "main", "bad-input"),
        ({"commit": "1" * 40, "files": {"../x": {"size": 1, "sha1": "2" * 40}}}, "main", "bad-input"),
        ({"commit": "1" * 40, "files": {"x": {"size": 1}}}, "main", "bad-input"),
        ({"files": LISTING["files"]}, "main", "bad-input"),
        (LISTING, "3" * 40, "model-differs"),
    ],
)
def test_an_odd_list_is_refused(tmp_path: Path, expected: Any, revision: str, failure: str) -> None:
    with pytest.raises(model_download.JobError) as refused:
        model_download.check(params(tmp_path, expected=expected, revision=revision))
    assert refused.value.id == failure
    model_download.check(params(tmp_path, expected=LISTING, revision="1" * 40))


# -- bundles ---------------------------------------------------------------------------------------------------------


def test_a_bundle_says_what_it_has_and_a_collected_list_is_compared(tmp_path: Path) -> None:
    made = Bundle(tmp_path)
    name = "hub/.sparkfleet/models--acme--tiny/fetching.json"
    text = json.dumps({"repo": "acme/tiny", "revision": "main", **LISTING}).encode()
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_bytes(text)
    made.files[name] = Entry(len(text), hashlib.sha256(text).hexdigest())
    made.models["acme/tiny@main"] = {"commit": "1" * 40, "bytes": 1, "files": []}
    made.write()
    assert model_files.of_bundle(str(tmp_path), ("", ""), "acme/tiny", "main").expected == LISTING
    assert model_files.of_bundle(str(tmp_path), ("", ""), "acme/tiny", "other") == Answer()
    (tmp_path / name).write_bytes(text.replace(b"2" * 40, b"3" * 40))
    with pytest.raises(SparkfleetError, match="was changed since"):
        model_files.of_bundle(str(tmp_path), ("", ""), "acme/tiny", "main")

    model_files.refuse(LISTING, LISTING, "spark-1", "acme/tiny@main")
    other = {**LISTING, "files": {"config.json": {"size": 1, "sha1": "4" * 40}}}
    with pytest.raises(SparkfleetError, match=f"spark-1 has a different acme/tiny@main.*{'4' * 40}.*{'2' * 40}"):
        model_files.refuse(LISTING, other, "spark-1", "acme/tiny@main")
    for odd in ({}, {"commit": 5, "files": {}}, {"commit": "1" * 40, "files": {"../x": {}}}):
        with pytest.raises(SparkfleetError, match="spark-1"):
            model_files.refuse(LISTING, odd, "spark-1", "acme/tiny@main")


# -- the action ------------------------------------------------------------------------------------------------------


def act(
    monkeypatch: pytest.MonkeyPatch, folder: Path, variables: dict[str, Any] | None = None, **arguments: Any
) -> tuple[dict[str, Any], list[str]]:
    """Run the action; its result and its warnings."""
    printed: list[str] = []
    monkeypatch.setattr(action, "display", SimpleNamespace(warning=printed.append))
    monkeypatch.setattr(action.constants, "DEFAULT_LOCAL_TMP", str(folder))
    given = {"repo": "acme/tiny", "revision": "main", **arguments}
    task = SimpleNamespace(args=given, async_val=0, check_mode=False, diff=False, environment=None, delegate_to=None)
    stand_in = SimpleNamespace(_shell=SimpleNamespace(tmpdir="none"), template=lambda value: value)
    made = action.ActionModule(task, *[stand_in] * 5)
    return made.run(task_vars={"inventory_hostname": "spark-1", **(variables or {})}), printed


def test_what_was_not_verified_is_said_once_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    away = {"endpoint": "http://127.0.0.1:9", "token": TOKEN}
    result, printed = act(monkeypatch, tmp_path, **away)
    assert result["expected"] == {} and "127.0.0.1:9" in result["reason"]
    assert len(printed) == 1 and printed[0].startswith("acme/tiny@main: not verified by this controller")
    again, more = act(monkeypatch, tmp_path, **away)
    assert (again["expected"], more) == ({}, [])
    assert TOKEN not in f"{result} {printed}"
    with pytest.raises(AnsibleActionFail, match="sparkfleet_controller_verifies") as refused:
        act(monkeypatch, tmp_path, **away, controller_verifies=True)
    assert refused.value.result["failure"] == "hub-unreachable"


def test_the_action_gives_the_list_and_refuses_another(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    result, printed = act(monkeypatch, tmp_path, endpoint=hub.url, controller_verifies=True)
    assert (result["expected"], printed) == ({"commit": hub.commit, "files": has(hub)}, [])
    with pytest.raises(AnsibleActionFail, match="spark-1 has a different acme/tiny@main") as refused:
        act(monkeypatch, tmp_path, endpoint=hub.url, listing=LISTING)
    assert refused.value.result["failure"] == "model-differs"


def test_with_a_lock_nobody_is_asked(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = lock_of(hub, tmp_path / "lock.yml")
    asked = len(hub.asked)
    commit, files = hub.commit, has(hub)
    hub.files["config.json"] = b"moved"
    given = {"revision": commit, "lock": str(made.path), "endpoint": hub.url, "controller_verifies": True}
    result, printed = act(monkeypatch, tmp_path, **given)
    assert (len(hub.asked), printed) == (asked, [])
    assert result["expected"]["locked"] and result["expected"]["commit"] == commit
    assert cache.listing_digest(result["expected"]["files"]) == cache.listing_digest(files)
    act(monkeypatch, tmp_path, **given, listing={"commit": commit, "files": files})
    with pytest.raises(
        AnsibleActionFail, match=r"spark-1 has a different .* than the lock: .*lock --update"
    ) as refused:
        act(monkeypatch, tmp_path, **given, listing={**LISTING, "commit": commit})
    assert refused.value.result["failure"] == "lock-mismatch"
    with pytest.raises(AnsibleActionFail, match="acme/tiny@main is not in the lock"):
        act(monkeypatch, tmp_path, **{**given, "revision": "main"})


def test_a_lock_that_was_changed_after_the_plan_is_refused(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made, key = lock_of(hub, tmp_path / "lock.yml"), test_signature.make(tmp_path, "alice")
    variables = {"sparkfleet_lock_signers": test_signature.signers(tmp_path, key)}
    given = {"revision": hub.commit, "lock": str(made.path)}
    with pytest.raises(AnsibleActionFail, match="is not signed, and sparkfleet_lock_signers wants a signature"):
        act(monkeypatch, tmp_path, variables, **given)
    signature.sign(made.path, str(key), signature.LOCK)
    assert act(monkeypatch, tmp_path, variables, **given)[0]["expected"]["commit"] == hub.commit
    (name, model), forged = next(iter(made.models.items())), File(1, "e" * 64, "")
    changed = dataclasses.replace(made, models={name: dataclasses.replace(model, files={"config.json": forged})})
    changed.write()  # with a seal that is right
    with pytest.raises(AnsibleActionFail, match="is not signed by anyone in"):
        act(monkeypatch, tmp_path, variables, **given)
