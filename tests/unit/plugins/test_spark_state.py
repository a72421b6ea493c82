"""The parts of the inspection that can be tested on any machine."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from plugins.modules import spark_state

from tests.unit.fakes.authority import Authority


class Hub(BaseHTTPRequestHandler):
    """Answers as the real Hub: 401, 403, 404, or a redirect to where the file lies."""

    def do_HEAD(self) -> None:
        answers = {"Bearer good": (307, ""), "Bearer stranger": (403, "GatedRepo")}
        status, code = answers.get(self.headers.get("Authorization", ""), (401, "GatedRepo"))
        if self.path != "/org/model/resolve/main/config.json":
            status, code = 404, "RevisionNotFound"
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Location", "http://127.0.0.1:1/never-asked")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize(("token", "status"), [("", 401), ("bad", 401), ("stranger", 403), ("good", 200)])
def test_hub_access(hub: str, token: str, status: int) -> None:
    assert spark_state.hub_access(hub, "org/model", "main", token)["status"] == status


def test_hub_access_tells_an_unknown_revision_and_an_unreachable_hub(hub: str) -> None:
    assert spark_state.hub_access(hub, "org/model", "v9", "good") == {"status": 404, "error": "RevisionNotFound"}
    assert spark_state.hub_access("http://127.0.0.1:1", "org/model", "main", "")["status"] == 0


def test_a_slow_service_is_asked_once_more_with_more_time() -> None:
    seen: list[float] = []

    def ask(seconds: float) -> dict[str, Any]:
        seen.append(seconds)
        return {
            "status": 0 if len(seen) == 1 else 200,
            "error": "The read operation timed out" if len(seen) == 1 else "",
        }

    assert spark_state.patiently(ask)["status"] == 200
    assert seen == [spark_state.REACH_SECONDS, spark_state.PROBE_SECONDS]
    assert spark_state.patiently(lambda seconds: {"status": 0, "error": "refused"})["error"] == "refused"


def test_listener_and_health_of_a_port_that_speaks_no_http() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def greet() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"SSH-2.0-OpenSSH_10\r\n")

        threading.Thread(target=greet, daemon=True).start()
        found = spark_state.listener(port)
        assert found and found["pid"] == os.getpid()
        assert spark_state.healthy(port) is False
    assert spark_state.listener(port) is None


def test_who_looks() -> None:
    assert spark_state.user_name(0) == "root" and spark_state.user_name(54321) == "54321"


def test_token_file(tmp_path: Path) -> None:
    path = tmp_path / "token"
    assert spark_state.token_file(str(path), "") == {"present": False, "private": False, "current": True}
    assert not spark_state.token_file(str(path), "hf_x")["current"]
    path.write_text("hf_x\n", encoding="utf-8")
    path.chmod(0o644)
    assert spark_state.token_file(str(path), "hf_x") == {"present": True, "private": False, "current": True}
    assert not spark_state.token_file(str(path), "hf_y")["current"]


def test_folder_and_disk(tmp_path: Path) -> None:
    tmp_path.chmod(0o2775)
    found = spark_state.folder(str(tmp_path))
    assert found and found["mode"] == "2775" and found["directory"]
    assert spark_state.folder(str(tmp_path / "absent")) is None
    assert spark_state.disk(str(tmp_path / "not" / "yet"))["device"] == tmp_path.stat().st_dev


def test_gpu_of_a_spark_and_of_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert spark_state.gpu() is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA GB10, 580.142, 12.1'\n", encoding="utf-8")
    tool.chmod(0o755)
    assert spark_state.gpu() == {"name": "NVIDIA GB10", "driver": "580.142", "compute_capability": "12.1"}


def test_a_container_of_ours_and_one_of_a_stranger() -> None:
    class Engine:
        def container(self, name: str) -> dict[str, Any]:
            return {
                "Config": {
                    "Image": "image@sha256:1",
                    "Cmd": ["vllm", "serve"],
                    "Env": ["A=1", "B=x=y", "HF_TOKEN=hf_secret", "VLLM_API_KEY=k"],
                },
                "HostConfig": {
                    "PortBindings": {
                        "8000/tcp": [{"HostIp": "", "HostPort": "8000"}, {"HostIp": "fd00::1", "HostPort": "8000"}]
                    },
                    "Binds": ["/opt/hf:/root/.cache/huggingface:rw"],
                    "RestartPolicy": {"Name": "unless-stopped"},
                },
                "RestartCount": 2,
            }

    labels = {"com.docker.compose.project": "sparkfleet", "com.docker.compose.service": "vllm-x"}
    item = {"Id": "1", "Names": ["/vllm-x"], "Image": "image", "State": "running", "Ports": [], "Labels": labels}
    found = spark_state.container(Engine(), item, "sparkfleet")  # type: ignore[arg-type]
    assert found["ours"] and found["service"] == "vllm-x" and found["ports"] == [8000]
    environment = found["started_with"]["environment"]
    assert environment == {
        "A": hashlib.sha256(b"1").hexdigest(),
        "B": hashlib.sha256(b"x=y").hexdigest(),
        "HF_TOKEN": "",
        "VLLM_API_KEY": "",
    }
    assert found["started_with"]["published"] == ["8000", "[fd00::1]:8000"]
    stranger = spark_state.container(Engine(), {**item, "Labels": {}}, "sparkfleet")  # type: ignore[arg-type]
    assert not stranger["ours"] and "started_with" not in stranger


@pytest.mark.parametrize(
    ("image", "host"),
    [
        ("nvcr.io/nvidia/vllm:25.09-py3", "nvcr.io"),
        ("vllm/vllm-openai:latest", "registry-1.docker.io"),
        ("docker.io/vllm/vllm-openai:v0.24.0", "registry-1.docker.io"),
        ("busybox", "registry-1.docker.io"),
        ("mirror.example:5000/nvidia/vllm:1", "mirror.example:5000"),
        ("localhost/vllm", "localhost"),
    ],
)
def test_registry_of_an_image(image: str, host: str) -> None:
    assert spark_state.registry_host(image) == host


def test_a_registry_that_refuses_and_one_without_a_name() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found = spark_state.registry_access(f"127.0.0.1:{port}/x:1")
    assert (found["status"], found["failure"]) == (0, "registry-unreachable")
    found = spark_state.registry_access("registry.invalid/x:1")
    assert (found["status"], found["failure"]) == (0, "registry-name")


def test_a_registry_that_does_not_speak_tls(hub: str) -> None:
    host = hub.removeprefix("http://")
    secure = {"IndexConfigs": {host: {"Secure": True}}}
    found = spark_state.registry_access(f"{host}/x:1", config=secure)
    assert (found["status"], found["failure"]) == (0, "registry-tls")
    insecure = {"IndexConfigs": {host: {"Secure": False}}}
    assert spark_state.registry_access(f"{host}/x:1", config=insecure)["status"] == 501  # any answer is one


def test_registry_and_hub_are_asked_with_the_ca_that_the_host_is_to_trust(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    with authority.serving(Hub) as host:
        # Docker does not verify one on loopback unless it is told to.
        config = {"IndexConfigs": {host: {"Secure": True}}}
        found = spark_state.registry_access(f"{host}/x:1", config=config)
        assert (found["status"], found["failure"]) == (0, "registry-tls")
        found = spark_state.registry_access(f"{host}/x:1", config=config, ca=authority.pem)
        assert found["status"] == 501  # any answer is one
        asked = (f"https://{host}", "org/model", "main", "good")
        assert "CERTIFICATE_VERIFY_FAILED" in spark_state.hub_access(*asked)["error"]
        assert spark_state.hub_access(*asked, ca=authority.pem)["status"] == 200


def test_whether_docker_was_started_before_the_ca_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What systemd says of a main process is seconds of a clock that starts with the machine."""
    tool = tmp_path / "systemctl"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for ago, expected in ((60, False), (10, True)):
        tool.write_text(f"#!/bin/sh\necho {int((time.monotonic() - ago) * 1e6)}\n")
        tool.chmod(0o755)
        assert spark_state.started_since("docker.service", time.time() - 30) is expected
    for said in ("0", "", "[not set]"):
        tool.write_text(f"#!/bin/sh\necho '{said}'\n")
        assert not spark_state.started_since("docker.service", 0)


def test_what_a_host_trusts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = spark_state.trust.Store(tmp_path / "local", tmp_path / "etc", tmp_path / "docker", "/bin/true")
    nothing = {"present": False, "current": True, "program": True, "daemon": False}
    assert spark_state.trusted(store, "", ["nvcr.io"]) == nothing
    pem = Authority(tmp_path / "authority").pem
    assert spark_state.trusted(store, pem, ["nvcr.io"]) == nothing | {"current": False}
    for path, text in store.wanted(pem, ["nvcr.io"]).items():
        path.parent.mkdir(parents=True)
        path.write_text(text)
    (tmp_path / "etc").mkdir()
    store.bundle.write_text(pem)
    monkeypatch.setattr(spark_state, "started_since", lambda unit, moment: moment > time.time() - 60)
    assert spark_state.trusted(store, pem, ["nvcr.io"]) == dict.fromkeys(nothing, True)
    assert spark_state.trusted(store, "", []) == dict.fromkeys(nothing, True) | {"current": False}


DRIVER = {"DriverStatus": [["driver-type", "io.containerd.snapshotter.v1"]]}


@pytest.mark.parametrize(
    ("info", "config", "store", "place"),
    [
        ({"DriverStatus": [["Backing Filesystem", "extfs"]]}, "", "docker", "/var/lib/docker"),
        ({"DockerRootDir": "/data/docker", "DriverStatus": None}, "", "docker", "/data/docker"),
        (DRIVER, "", "containerd", "/var/lib/containerd"),
        (DRIVER, "version = 3\nroot = '/data/containerd'\n[grpc]\n", "containerd", "/data/containerd"),
        (
            {
                **DRIVER,
                "DockerRootDir": "/data/docker",
                "Containerd": {"Address": "/var/run/docker/containerd/containerd.sock"},
            },
            "root = '/elsewhere'\n",
            "containerd",
            "/data/docker/containerd/daemon",
        ),
        (
            {**DRIVER, "Containerd": {"Address": "/run/containerd/containerd.sock"}},
            "",
            "containerd",
            "/var/lib/containerd",
        ),
    ],
)
def test_where_images_lie(tmp_path: Path, info: dict[str, Any], config: str, store: str, place: str) -> None:
    (tmp_path / "config.toml").write_text(config, encoding="utf-8")
    assert spark_state.image_store(info, tmp_path / "config.toml") == {"store": store, "images_at": place}


def test_files_that_are_no_text_are_none(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xff\xfe" * 10)
    assert spark_state.read_text(tmp_path / "x") is None and spark_state.read_text(tmp_path) is None
    assert spark_state.token_file(str(tmp_path / "x"), "t")["current"] is False


def test_the_hub_is_asked_through_the_proxy(hub: str) -> None:
    """The stand-in takes the part of the proxy: it is asked for an address that is not its own."""
    asked = ("http://hub.invalid", "org/model", "main", "good")
    assert spark_state.hub_access(*asked, proxy=hub)["status"] == 404  # an absolute address reached it
    assert spark_state.hub_access(*asked, proxy=hub, no_proxy="other.invalid")["status"] == 404
    assert spark_state.hub_access(*asked, proxy=hub, no_proxy="localhost, hub.invalid")["status"] == 0
    assert spark_state.hub_access(*asked, proxy=hub, no_proxy=".invalid")["status"] == 0


def test_toolkit_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert spark_state.toolkit()["version"] == "" and not spark_state.toolkit()["installed"]
    tool = tmp_path / "nvidia-ctk"
    tool.write_text("#!/bin/sh\necho 'NVIDIA Container Toolkit CLI version 1.18.1'\necho commit: abc\n", "utf-8")
    tool.chmod(0o755)
    assert spark_state.toolkit()["version"] == "1.18.1"


def test_a_guard_that_is_older_than_its_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unit = tmp_path / "guard.service"
    unit.write_text(
        "[Service]\nEnvironment=SPARKFLEET_PROGRAM=ab\nEnvironment=SPARKFLEET_GENERATION=cd\n", encoding="utf-8"
    )
    monkeypatch.setattr(spark_state, "GUARD_UNIT", unit)
    for runs, current in (("cd", True), ("ef", False), ("", False)):
        monkeypatch.setattr(
            spark_state, "service_environment", lambda _unit, runs=runs: {"SPARKFLEET_GENERATION": runs}
        )
        found = spark_state.guard()
        assert (found["program"], found["current"]) == ("ab", current)
