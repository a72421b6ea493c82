"""What is checked before anything stops: each problem has an entry in the table and names value and place."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import engine as host_engine
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import http, network, precheck
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.cache import mark_suspect
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.docker import Docker, DockerUnavailable
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.integrity import verify_all
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.releases import Store

from sparkfleet.diagnosis.failures import BY_ID
from tests.unit.fakes import fake_release
from tests.unit.fakes.fake_engine import Engine, Handler

COMMIT = "a" * 40
IMAGE = f"nvcr.io/nvidia/vllm@sha256:{'b' * 64}"
NETWORK = "c" * 64
CACHE = "/root/.cache/huggingface"
Check = Callable[[], dict[str, str]]


class Spark:
    """A host on which the release could start; a test takes one thing away."""

    def __init__(self, tmp_path: Path, engine: Engine, docker: Docker, port: int) -> None:
        self.tmp_path, self.engine, self.docker, self.port = tmp_path, engine, docker, port
        self.store = Store(tmp_path / "project", tmp_path / "state", str(tmp_path / "lock"))
        made = fake_release.an_engine("vllm-m", port, repo="org/m", revision=COMMIT, image=IMAGE)
        self.number = self.store.stage("services: {}\n", fake_release.plan(made), fake_release.lock(made))
        trial = {**fake_release.plan(made), "format": 3, "kind": "trial", "weights": "dummy"}
        self.trial = self.store.stage("services: {}\n", trial, fake_release.lock(made))
        self.cache = tmp_path / "hf"
        snapshot = self.cache / "models--org--m" / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
        self.weights = snapshot / "model.safetensors"
        self.weights.write_bytes(b"12345")
        manifest = self.cache / ".sparkfleet" / "models--org--m" / f"{COMMIT}.json"
        manifest.parent.mkdir(parents=True)
        files = {"config.json": {"size": 2}, "model.safetensors": {"size": 5}}
        manifest.write_text(json.dumps({"files": files}))
        self.manifest = manifest
        self.service: dict[str, Any] = {
            **{"image": IMAGE, "container_name": "vllm-m", "networks": {"default": None}},
            "environment": {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": CACHE},
            "ports": [{"mode": "ingress", "target": 8000, "published": str(port), "protocol": "tcp"}],
            "volumes": [
                {"type": "bind", "source": str(self.cache), "target": CACHE, "bind": {"create_host_path": True}}
            ],
        }
        self.document: dict[str, Any] = {
            **{"name": "sparkfleet", "services": {"vllm-m": self.service}},
            "networks": {"default": {"name": "sparkfleet_default"}},
        }
        self.running: list[dict[str, Any]] = []
        (tmp_path / "net" / "br-cccccccccccc").mkdir(parents=True)
        engine.routes.update(
            {
                ("GET", "/info"): {},
                ("GET", f"/images/{IMAGE}/json"): {"Id": "sha256:1"},
                ("GET", "/containers/json"): self.running,
                ("GET", "/networks/sparkfleet_default"): {"Id": NETWORK, "Driver": "bridge", "Options": {}},
            }
        )
        self.says("print(pathlib.Path(sys.argv[0] + '.json').read_text())")

    def says(self, python: str) -> None:
        """What `docker compose config` does."""
        file = self.tmp_path / "bin" / "docker"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!{sys.executable}\nimport sys, pathlib\n{python}\n")
        file.chmod(0o755)

    def problems(self, dummy: bool = False) -> list[precheck.Problem]:
        (self.tmp_path / "bin" / "docker.json").write_text(json.dumps(self.document))
        return precheck.precheck(self.store, self.docker, self.trial if dummy else self.number)

    def failures(self) -> dict[str, str]:
        found = {problem.failure: problem.message for problem in self.problems()}
        assert set(found) <= set(BY_ID)
        return found


@pytest.fixture
def spark(tmp_path: Path, engine: Engine, docker: Docker, monkeypatch: pytest.MonkeyPatch) -> Spark:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(precheck, "INTERFACES", str(tmp_path / "net"))
    monkeypatch.setattr(http, "KEY_FILE", str(tmp_path / "engine_key"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return Spark(tmp_path, engine, docker, port)


def container(port: int, ours: bool, address: str = "::") -> dict[str, Any]:
    labels = {host_engine.PROJECT_LABEL: "sparkfleet", host_engine.SERVICE_LABEL: "vllm-m"} if ours else {}
    ports = [{"IP": address, "PrivatePort": 8000, "PublicPort": port, "Type": "tcp"}]
    return {"Id": "x", "Names": ["/vllm-m" if ours else "/web"], "State": "running", "Labels": labels, "Ports": ports}


def test_a_release_that_can_start_has_no_problem(spark: Spark) -> None:
    assert spark.problems() == []
    spark.running.append(container(spark.port, ours=True))  # what runs now holds port and name
    spark.engine.routes["GET", "/containers/vllm-m/json"] = {
        "Config": {"Labels": {host_engine.PROJECT_LABEL: "sparkfleet", host_engine.SERVICE_LABEL: "vllm-m"}}
    }
    with socket.create_server(("127.0.0.1", spark.port)):  # its proxy
        assert spark.problems() == []


def test_nothing_is_changed(spark: Spark) -> None:
    spark.problems()
    assert all(method == "GET" for method, *_ in spark.engine.seen)


def test_an_image_that_is_not_there(spark: Spark) -> None:
    del spark.engine.routes["GET", f"/images/{IMAGE}/json"]
    assert spark.failures() == {"image-missing": f"Docker does not have the image {IMAGE}"}


@pytest.mark.parametrize("name", ["compose.yml", "plan.json", "lock.json"])
def test_a_damaged_release(spark: Spark, name: str) -> None:
    path = spark.store.folder(spark.number) / name
    path.chmod(0o644)
    path.write_text(path.read_text() + " ")
    assert str(path) in spark.failures()["release-damaged"]


def test_a_file_that_compose_refuses(spark: Spark) -> None:
    spark.says("print('time=x level=warning\\nyaml: line 3: mapping values', file=sys.stderr); sys.exit(15)")
    (failure,) = spark.problems()
    assert failure.failure == "compose-invalid" and "compose.yml: yaml: line 3: mapping values" in failure.message
    spark.says("print('[1]')")
    assert set(spark.failures()) == {"compose-invalid"}
    spark.says("print('{}')")
    assert "has no service vllm-m" in spark.failures()["compose-invalid"]


def test_no_compose(spark: Spark) -> None:
    spark.says("print(\"docker: 'compose' is not a docker command.\", file=sys.stderr); sys.exit(1)")
    assert set(spark.failures()) == {"compose-too-old"}


def test_compose_is_asked_with_its_variables_filled_in(spark: Spark) -> None:
    spark.says("pathlib.Path(sys.argv[0] + '.argv').write_text(' '.join(sys.argv[1:])); print('{}')")
    spark.problems()
    argv = (spark.tmp_path / "bin" / "docker.argv").read_text().split()
    assert "config" in argv and "--no-interpolate" not in argv
    assert argv[argv.index("--project-directory") + 1] == str(spark.store.project_dir)


def test_docker_that_is_away_is_the_callers_to_wait_for(spark: Spark) -> None:
    spark.docker = Docker("/nowhere")
    with pytest.raises(DockerUnavailable):
        spark.problems()


def test_a_docker_that_refuses(spark: Spark) -> None:
    spark.engine.routes["GET", "/containers/json"] = lambda handler: handler.answer(500, {"message": "broken"})
    assert spark.failures() == {"docker": "broken"}


@pytest.mark.parametrize("labels", [{}, {host_engine.PROJECT_LABEL: "other"}])
def test_a_container_of_our_name(spark: Spark, labels: dict[str, str]) -> None:
    spark.engine.routes["GET", "/containers/vllm-m/json"] = {"Config": {"Labels": labels}}
    assert "container vllm-m exists" in spark.failures()["name-taken"]


def test_a_port_that_a_container_holds(spark: Spark) -> None:
    spark.running.append(container(spark.port, ours=False))
    assert spark.failures() == {"port-taken": f"port {spark.port} is published by the container web"}
    spark.running[0]["State"] = "exited"
    assert spark.failures() == {}


def test_a_port_that_a_process_holds(spark: Spark) -> None:
    with socket.create_server(("127.0.0.1", spark.port)):
        message = spark.failures()["port-taken"]
    assert f"(pid {os.getpid()}) listens on port {spark.port}" in message


def test_addresses_of_ports_count(spark: Spark) -> None:
    spark.service["ports"][0]["host_ip"] = "127.0.0.1"
    spark.running.append(container(spark.port, ours=False, address="127.0.0.2"))
    with socket.create_server(("127.0.0.2", spark.port)):
        assert spark.problems() == []
    spark.service["ports"][0]["host_ip"] = "192.0.2.77"
    assert "192.0.2.77" in spark.failures()["address-gone"]


def test_a_bridge_that_is_gone(spark: Spark) -> None:
    (spark.tmp_path / "net" / "br-cccccccccccc").rmdir()
    assert "br-cccccccccccc of Docker's network sparkfleet_default" in spark.failures()["network-missing"]
    named = {"com.docker.network.bridge.name": "br-cccccccccccc"}
    spark.engine.routes["GET", "/networks/sparkfleet_default"] = {"Id": "d", "Driver": "bridge", "Options": named}
    assert set(spark.failures()) == {"network-missing"}
    del spark.engine.routes["GET", "/networks/sparkfleet_default"]  # Compose makes it
    assert spark.problems() == []


def test_a_cache_that_is_not_mounted(spark: Spark) -> None:
    spark.cache.rename(spark.tmp_path / "elsewhere")
    assert "is its disk mounted?" in spark.failures()["cache-not-mounted"]
    spark.cache.mkdir()
    assert f"{spark.cache} is empty; is its disk mounted?" == spark.failures()["cache-not-mounted"]


def test_files_of_the_model(spark: Spark) -> None:
    spark.weights.write_bytes(b"123")
    assert "model.safetensors" in spark.failures()["download-incomplete"]
    spark.weights.unlink()
    assert "model.safetensors" in spark.failures()["download-incomplete"]
    assert spark.problems(dummy=True) == []  # a trial needs none
    spark.manifest.unlink()  # fetched by other means: what the snapshot names must be there
    assert "has no weights, as after a trial" in spark.failures()["download-incomplete"]
    assert spark.problems(dummy=True) == []
    spark.weights.write_bytes(b"123")
    assert spark.problems() == []
    spark.weights.unlink()
    spark.weights.symlink_to("../../blobs/gone")
    assert "model.safetensors does not lead to a file" in spark.failures()["download-incomplete"]
    spark.weights.parent.rename(spark.tmp_path / "snapshot")
    assert f"has no org/m at {COMMIT}" in spark.failures()["model-not-in-cache"]
    spark.service["environment"] = {"HF_TOKEN": "x"}  # this one downloads by itself
    assert spark.problems() == []


def test_files_of_the_model_that_drafts(spark: Spark) -> None:
    draft = {"repo": "org/draft", "revision": "d" * 40}
    made = fake_release.an_engine("vllm-m", spark.port, repo="org/m", revision=COMMIT, image=IMAGE, draft=draft)
    spark.number = spark.store.stage("services: {}\n", fake_release.plan(made), fake_release.lock(made))
    assert f"has no org/draft at {'d' * 40}" in spark.failures()["model-not-in-cache"]
    snapshot = spark.cache / "models--org--draft" / "snapshots" / ("d" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(b"1")
    manifest = spark.cache / ".sparkfleet" / "models--org--draft" / f"{'d' * 40}.json"
    manifest.parent.mkdir()
    manifest.write_text(json.dumps({"files": {"model.safetensors": {"size": 1}}}))
    assert spark.problems() == []
    mark_suspect(spark.cache, "org/draft", "d" * 40, "damaged", ["model.safetensors"])
    # Its commit is not that of the model.
    assert "fetch.yml -e sparkfleet_model=m` hashes" in spark.failures()["download-incomplete"]


def test_files_that_were_found_damaged_keep_a_release_from_running(spark: Spark) -> None:
    """A suspicion does not: a rollback out of nonsense must not wait until everything is hashed."""
    mark_suspect(spark.cache, "org/m", COMMIT, "a verification failed (answer-wrong)")
    assert spark.problems() == []
    mark_suspect(spark.cache, "org/m", COMMIT, "damaged", [f"model-{number}.safetensors" for number in range(4)])
    for reason in ("damaged", "a verification failed (answer-wrong)"):
        said = spark.failures()["download-incomplete"]
        assert "were found damaged: model-0.safetensors, model-1.safetensors, model-2.safetensors and 1 more" in said
        assert f"playbooks/fetch.yml -e sparkfleet_model=m -e sparkfleet_revision={COMMIT}`" in said
        mark_suspect(spark.cache, "org/m", COMMIT, reason)  # does not forget what is known
    verify_all(spark.cache, spark.tmp_path / "integrity.json", share=1.0, say=lambda line: None)
    assert spark.problems() == []  # found sound since


def test_what_is_mounted(spark: Spark) -> None:
    gone = spark.tmp_path / "gone"
    spark.service["volumes"].append({"type": "bind", "source": str(gone), "target": "/x", "bind": {}})
    assert spark.failures() == {"mount-missing": f"{gone} does not exist"}
    spark.service["volumes"].pop()
    spark.service["secrets"] = [{"source": "engine_key"}]
    spark.document["secrets"] = {"engine_key": {"file": http.KEY_FILE}}
    assert http.KEY_FILE in spark.failures()["mount-missing"]
    Path(f"{http.KEY_FILE}.next").write_text("key")  # the switch takes it
    assert spark.problems() == []


def test_all_problems_are_named_at_once(spark: Spark) -> None:
    del spark.engine.routes["GET", f"/images/{IMAGE}/json"]
    spark.weights.unlink()
    assert list(spark.failures()) == ["image-missing", "download-incomplete"]


def test_listeners_of_a_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
        (found,) = network.listeners(port)
        assert found["address"] == "127.0.0.1" and found["pid"] == os.getpid() and found["process"]
    assert network.listeners(port) == []
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as six:
        assert network.listeners(six.getsockname()[1])[0]["address"] == "::1"
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as both:
        assert network.is_wildcard(network.listeners(both.getsockname()[1])[0]["address"])


def test_look_stop_and_start_go_by_label(engine: Engine, docker: Docker) -> None:
    """A foreign container of our service's name is not inspected, and never touched."""
    foreign = {"Id": "f" * 64, "Names": ["/vllm-m"], "State": "running", "Labels": {}}
    engine.routes["GET", "/containers/json"] = [foreign]
    engine.routes["GET", "/containers/vllm-m/json"] = {"Id": "f" * 64, "State": {"Running": True}}
    engine.routes["POST", "/containers/vllm-m/stop"] = engine.routes["POST", "/containers/vllm-m/start"] = {}
    assert host_engine.inspect(docker, "vllm-m")["state"] == "missing"
    assert host_engine.read_log(docker, "vllm-m", "", False) == []
    assert host_engine.stop(docker, "vllm-m") is False
    host_engine.remove(docker, "vllm-m")
    with pytest.raises(host_engine.EngineError, match="Sparkfleet has no container of it"):
        host_engine.start(docker, "vllm-m")
    assert all(method == "GET" for method, *_ in engine.seen)
    labels = {host_engine.PROJECT_LABEL: "sparkfleet", host_engine.SERVICE_LABEL: "vllm-m"}
    older = {"Id": "a" * 64, "State": "exited", "Labels": labels, "Created": 1}
    younger = {"Id": "b" * 64, "State": "exited", "Labels": labels, "Created": 2}
    engine.routes["GET", "/containers/json"] = [foreign, older, younger]
    engine.routes["POST", f"/containers/{'b' * 64}/start"] = {}
    host_engine.start(docker, "vllm-m")
    assert host_engine.identity(docker, "vllm-m") == "b" * 64
    older["State"] = "running"
    assert host_engine.identity(docker, "vllm-m") == "a" * 64 == host_engine.identity(docker, "a" * 64)


def test_a_log_line_without_an_end_is_cut(engine: Engine, docker: Docker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{Docker.__module__}.LINE", 100)

    def endless(handler: Handler) -> None:
        handler.chunks(b"\1\0\0\0\0\0\x03\xe8" + b"x" * 1000)

    engine.routes["GET", "/containers/c/logs"] = endless
    lines = list(docker.frames("/containers/c/logs?", tty=False))
    assert len(lines) > 1 and max(map(len, lines)) <= 200 and sum(map(len, lines)) == 1000


def test_every_engine_of_a_release_is_checked(spark: Spark) -> None:
    both = (
        fake_release.an_engine("vllm-m", spark.port, repo="org/m", revision=COMMIT, image=IMAGE),
        fake_release.an_engine("vllm-b", 1, image="other:1"),
    )
    spark.number = spark.store.stage("b\n", fake_release.plan(*both), fake_release.lock(*both))
    assert "has no service vllm-b" in spark.failures()["compose-invalid"]
    spark.document["services"]["vllm-b"] = {"image": "other:1", "networks": {"default": None}}
    assert spark.failures() == {"image-missing": "Docker does not have the image other:1"}
    spark.document["services"]["vllm-b"]["image"] = IMAGE
    assert spark.failures() == {}
    del spark.engine.routes["GET", f"/images/{IMAGE}/json"]
    problems = spark.problems()
    assert [problem.failure for problem in problems] == ["image-missing"]  # that both lack is said once
