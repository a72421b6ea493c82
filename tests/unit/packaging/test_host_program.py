"""The program of the services: the same bytes every time, and it runs with nothing but Python."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sparkfleet.packaging import host_program


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return host_program.build(tmp_path_factory.mktemp("program"))


def call(program: Path, *words: str) -> subprocess.CompletedProcess[str]:
    # -I: no environment, no user's packages; -S: none of this environment's.
    return subprocess.run([sys.executable, "-IS", program, *words], capture_output=True, text=True, check=False)


def test_same_bytes_every_time_and_made_once(program: Path, tmp_path: Path) -> None:
    assert host_program.build(tmp_path).read_bytes() == program.read_bytes()
    before = program.stat().st_mtime_ns
    host_program.build(program.parent)
    assert program.stat().st_mtime_ns == before


def test_a_damaged_one_is_recreated(program: Path, tmp_path: Path) -> None:
    (tmp_path / host_program.NAME).write_bytes(b"half")
    assert host_program.build(tmp_path).read_bytes() == program.read_bytes()


def test_it_needs_nothing_but_python(program: Path) -> None:
    assert "--recover" in call(program, "switch", "--help").stdout
    done = call(program, "dance")
    assert done.returncode == 2 and "usage: sparkfleet_host.pyz switch|guard" in done.stderr


def test_recover_with_nothing_to_do(program: Path, tmp_path: Path) -> None:
    folders = (f"--project-dir={tmp_path}/project", f"--state-dir={tmp_path}/state")
    done = call(program, "switch", "--recover", *folders)
    assert done.returncode == 0, done.stderr
