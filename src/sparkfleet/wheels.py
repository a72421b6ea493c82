"""Wheels for `scripts/setup` on a controller without internet."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import tomllib

from sparkfleet import SparkfleetError

ROOT = Path(__file__).resolve().parents[2]
#: What a Spark's own system has, in case it is to be the controller: DGX OS 7 and Debian 13.
SPARK_PYTHONS = ("3.12", "3.13")


def requirements() -> list[str]:
    """What pyproject.toml names, for the program and for building it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return [*project["project"]["dependencies"], *project["build-system"]["requires"]]


def download(folder: Path, machines: Iterable[str], say: Callable[[str], object]) -> list[str]:
    """Wheels for this Python, and for the Pythons of Sparks of these machines (as `uname -m` says): names in
    `folder`. What is there is not downloaded again. Raises SparkfleetError."""
    here = (platform.machine(), f"{sys.version_info[0]}.{sys.version_info[1]}")
    wanted = dict.fromkeys([here, *((machine, version) for machine in machines for version in SPARK_PYTHONS)])
    for machine, version in wanted:
        say(f"Python packages for {machine}, Python {version}")
        foreign = [] if (machine, version) == here else _platform(machine, version)
        _pip(folder, foreign)
    return sorted(path.name for path in folder.iterdir())


def _platform(machine: str, version: str) -> list[str]:
    tags = [f"manylinux_2_{minor}_{machine}" for minor in (39, 35, 34, 31, 28, 27, 24, 17)] + [
        f"manylinux2014_{machine}"
    ]
    return [word for tag in tags for word in ("--platform", tag)] + ["--python-version", version]


def _pip(folder: Path, foreign: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    before = {path.name for path in folder.iterdir()}
    argv = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet", "--only-binary=:all:"]
    argv += [
        "--constraint",
        str(ROOT / "constraints.txt"),
        "--find-links",
        str(folder),
        "--dest",
        str(folder),
        *foreign,
    ]
    done = subprocess.run([*argv, *requirements()], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        for path in folder.iterdir():
            if path.name not in before:
                path.unlink() if path.is_file() else shutil.rmtree(path)
        raise SparkfleetError(f"pip download: {' '.join(done.stderr.split())[-300:]}")
