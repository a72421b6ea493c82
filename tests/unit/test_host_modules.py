"""The small modules that run on a Spark, each through its own main()."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import compose_file
import nvidia_container_runtime
import page_cache
import pytest
import secret_file
import stop_services
from ansible.module_utils.testing import patch_module_args

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


def test_compose_file_is_written_once_and_shown(tmp_path: Path, run: Run, command: Any) -> None:
    command("docker", "sys.exit(0)")
    path = tmp_path / "project" / "compose.yml"
    preview = run(compose_file, check=True, path=path, content="a: 1\n")
    assert preview["changed"] and preview["diff"]["after"] == "a: 1\n" and not path.parent.exists()
    assert run(compose_file, path=path, content="a: 1\n")["changed"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    again = run(compose_file, path=path, content="a: 1\n")
    assert not again["changed"] and again["diff"]["before"] == again["diff"]["after"]


def test_compose_file_that_docker_refuses_replaces_nothing(tmp_path: Path, run: Run, command: Any) -> None:
    path = tmp_path / "compose.yml"
    path.write_text("old\n", encoding="utf-8")
    command("docker", "print('services.x Additional property y is not allowed', file=sys.stderr); sys.exit(15)")
    result = run(compose_file, path=path, content="new\n")
    assert result["failed"] and "Additional property y" in result["msg"]
    assert path.read_text(encoding="utf-8") == "old\n"
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["compose.yml"]


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


def test_page_cache_in_check_mode_drops_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_cache.os, "sync", lambda: pytest.fail("synced in check mode"))
    assert run(page_cache, check=True) == {
        "changed": True,
        "freed": 0,
        "invocation": {"module_args": {}},
    }


def test_free_bytes() -> None:
    assert page_cache.free_bytes("MemTotal:  10 kB\nMemFree:   4 kB\n") == 4096
    assert page_cache.free_bytes("") == 0


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


def test_only_the_named_services_are_stopped(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_services, "Docker", FakeDocker)
    arguments = {"project": "sparkfleet", "services": ["vllm-a", "vllm-gone"], "timeout": 5}
    assert run(stop_services, check=True, **arguments)["stopped"] == ["vllm-a"]
    assert FakeDocker.stopped == []
    result = run(stop_services, **arguments)
    assert result["changed"] and FakeDocker.stopped == ["/containers/vllm-a/stop?t=5"]
