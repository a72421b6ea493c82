"""The small modules that run on a Spark, each through its own main()."""

from __future__ import annotations

import json
import os
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import nvidia_container_runtime
import pytest
import release_stage
import secret_file
import stop_services
from ansible.module_utils.testing import patch_module_args
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.docker import Docker
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.releases import Store

from tests.unit.fakes import fake_release
from tests.unit.fakes.fake_engine import Engine

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a module as Ansible does and return its result."""

    def run(module: ModuleType, check: bool = False, **arguments: Any) -> dict[str, Any]:
        arguments = {key: str(value) if isinstance(value, Path) else value for key, value in arguments.items()}
        with patch_module_args({**arguments, "_ansible_check_mode": check}), pytest.raises(SystemExit):
            module.main()
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        return result

    return run


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Put a stand-in for a command of the host first on the PATH."""

    def command(name: str, python: str) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        file = folder / name
        file.write_text(f"#!{sys.executable}\nimport sys, json, pathlib\n{python}\n", encoding="utf-8")
        file.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        return file

    return command


def test_secret_file(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "deep" / "token"
    assert run(secret_file, check=True, path=path, content="hf_x")["changed"]
    assert not path.parent.exists()
    first = run(secret_file, path=path, content="hf_x")
    assert first["changed"] and "hf_x" not in json.dumps(first)
    assert path.read_text(encoding="utf-8") == "hf_x\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not run(secret_file, path=path, content="hf_x")["changed"]
    path.chmod(0o644)
    assert run(secret_file, path=path, content="hf_x")["changed"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["token"]


ENGINE = fake_release.an_engine("vllm-m", image="i@sha256:1", memory={"available_gib": 110.0})
STAGED: dict[str, Any] = {"plan": fake_release.plan(ENGINE), "lock": fake_release.lock(ENGINE)}


def test_a_release_is_staged_once_and_shown(tmp_path: Path, run: Run, command: Any) -> None:
    command("docker", "sys.exit(0)")
    folder = tmp_path / "project"
    wanted = {"compose": "a: 1\n", "project_dir": folder, "state_dir": tmp_path / "state", **STAGED}
    preview = run(release_stage, check=True, **wanted)
    assert preview["changed"] and preview["release"] == 1 and preview["diff"]["after"] == "a: 1\n"
    assert not folder.exists()
    first = run(release_stage, **wanted)
    assert first["changed"] and first["release"] == 1 and first["current"] is None
    kept = folder / "releases" / "1"
    assert (kept / "compose.yml").read_text(encoding="utf-8") == "a: 1\n"
    lock = json.loads((kept / "lock.json").read_text(encoding="utf-8"))
    assert lock["number"] == 1 and lock["engines"][0]["image"] == "i@sha256:1" and lock["created"] > 0
    assert stat.S_IMODE(kept.stat().st_mode) == 0o755
    assert stat.S_IMODE((kept / "compose.yml").stat().st_mode) == 0o444
    # The plan's figures follow the host's memory of the moment; that alone makes no release.
    again = run(release_stage, **{**wanted, "plan": fake_release.plan({**ENGINE, "memory": {"available_gib": 90.0}})})
    assert again["release"] == 1
    assert again["changed"]  # it is not the current one yet
    (folder / "current").symlink_to("releases/1")
    assert not run(release_stage, **wanted)["changed"]
    other = run(
        release_stage,
        **{**wanted, "plan": fake_release.plan({**ENGINE, "verify": {**ENGINE["verify"], "expect": "Rome"}})},
    )
    assert other["changed"] and other["release"] == 2
    assert sorted(path.name for path in (folder / "releases").iterdir()) == [".lock", "1", "2"]


def test_a_release_that_docker_refuses_is_not_kept(tmp_path: Path, run: Run, command: Any) -> None:
    command("docker", "print('services.x Additional property y is not allowed', file=sys.stderr); sys.exit(15)")
    result = run(release_stage, compose="new\n", project_dir=tmp_path / "project", state_dir=tmp_path / "s", **STAGED)
    assert result["failed"] and "Additional property y" in result["msg"] and "untouched" in result["msg"]
    assert not (tmp_path / "project").exists()


NVIDIA_CTK = """
config = pathlib.Path(next(word for word in sys.argv if word.startswith("--config=")).partition("=")[2])
data = json.loads(config.read_text()) if config.exists() else {}
data.setdefault("runtimes", {})["nvidia"] = {"args": [], "path": "nvidia-container-runtime"}
if "--dry-run" in sys.argv:
    print(json.dumps(data))
else:
    config.write_text(json.dumps(data))
"""


def test_nvidia_runtime(tmp_path: Path, run: Run, command: Any) -> None:
    command("nvidia-ctk", NVIDIA_CTK)
    config = tmp_path / "daemon.json"
    config.write_text('{"log-driver": "journald"}', encoding="utf-8")
    preview = run(nvidia_container_runtime, check=True, config=config)
    assert preview["changed"] and "nvidia-container-runtime" in preview["diff"]["after"]
    assert "nvidia" not in config.read_text(encoding="utf-8")
    assert run(nvidia_container_runtime, config=config)["changed"]
    data = json.loads(config.read_text(encoding="utf-8"))
    assert data["log-driver"] == "journald" and "nvidia" in data["runtimes"]
    assert not run(nvidia_container_runtime, config=config)["changed"]


def test_a_docker_that_runs_without_the_runtime_is_restarted(
    tmp_path: Path, run: Run, command: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by a run that finds the file right: the one that wrote it may have failed before it restarted Docker."""
    command("nvidia-ctk", NVIDIA_CTK)
    monkeypatch.setattr(nvidia_container_runtime, "Docker", lambda timeout: Docker(str(engine.server_address), timeout))
    config = tmp_path / "daemon.json"
    config.write_text('{"runtimes": {"nvidia": {}}}', encoding="utf-8")
    for runtimes, restart in (({"runc": {}}, True), ({"nvidia": {}}, False), (None, True)):
        engine.routes["GET", "/info"] = {"Runtimes": runtimes}
        result = run(nvidia_container_runtime, config=config)
        assert not result["changed"] and result["restart_docker"] is restart
    monkeypatch.setattr(nvidia_container_runtime, "Docker", lambda timeout: Docker(str(tmp_path / "none"), timeout))
    assert not run(nvidia_container_runtime, config=config)["restart_docker"]


def test_nvidia_runtime_before_the_toolkit_is_there(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    preview = run(nvidia_container_runtime, check=True, config=tmp_path / "daemon.json")
    assert preview["changed"] and "nvidia-container-runtime" in preview["diff"]["after"]


def test_nvidia_runtime_refuses_a_broken_file(tmp_path: Path, run: Run) -> None:
    config = tmp_path / "daemon.json"
    config.write_text("{ broken", encoding="utf-8")
    result = run(nvidia_container_runtime, config=config)
    assert result["failed"] and "daemon.json cannot be read" in result["msg"]
    assert config.read_text(encoding="utf-8") == "{ broken"


class FakeDocker:
    """Three running containers of the project, one of which is asked for."""

    stopped: list[str]

    def __init__(self, **_options: Any) -> None:
        type(self).stopped = []

    def get(self, path: str) -> tuple[int, Any]:
        assert "com.docker.compose.project%3Dsparkfleet" in path
        names = ("vllm-a", "vllm-b", "gateway")
        return 200, [
            {"Id": name, "Names": [f"/{name}"], "Labels": {"com.docker.compose.service": name}} for name in names
        ]

    def request(self, method: str, path: str, *_rest: Any) -> tuple[int, Any]:
        assert method == "POST"
        type(self).stopped.append(path)
        return 204, None


def test_only_the_named_services_are_stopped(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(stop_services, "Docker", FakeDocker)
    monkeypatch.setattr(stop_services, "LOCK", str(tmp_path / "run" / "switch.lock"))
    arguments = {"project": "sparkfleet", "services": ["vllm-a", "vllm-gone"], "timeout": 5}
    assert run(stop_services, check=True, **arguments)["stopped"] == ["vllm-a"]
    assert FakeDocker.stopped == []
    result = run(stop_services, **arguments)
    assert result["changed"] and FakeDocker.stopped == ["/containers/vllm-a/stop?t=5"]


@pytest.mark.parametrize(("holder", "stops"), [("guard", True), ("switch", False)])
def test_a_stop_waits_for_the_guard_and_refuses_beside_a_switch(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, holder: str, stops: bool
) -> None:
    lock = str(tmp_path / "run" / "switch.lock")
    monkeypatch.setattr(stop_services, "Docker", FakeDocker)
    monkeypatch.setattr(stop_services, "LOCK", lock)
    held, free = threading.Event(), threading.Event()

    def hold() -> None:
        with Store(lock_file=lock).exclusive(holder) as mine:
            assert mine
            held.set()
            free.wait(3)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(5)
    threading.Timer(2.0, free.set).start()
    result = run(stop_services, project="sparkfleet", services=["vllm-a"], timeout=5)
    assert free.is_set() is stops  # not before the guard is done
    assert FakeDocker.stopped == (["/containers/vllm-a/stop?t=5"] if stops else [])
    assert stops or result["failure"] == "switch-running-other"
    thread.join()
