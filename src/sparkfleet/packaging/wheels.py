"""Wheels for `scripts/setup` on a controller without internet.

`python -m sparkfleet.packaging.wheels FOLDER DIGEST PRIVATE` checks those of a bundle before pip is given them, with
nothing but the standard library: there is no environment yet. pip reads its files again; what it gets are the copies in
PRIVATE, made of the very bytes that were hashed.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import tomllib
from sparkfleet_host.bounded import BoundsError, printable

from sparkfleet import SparkfleetError
from sparkfleet.packaging.bundle import Bundle
from sparkfleet.paths import CHECKOUT, ROOT

#: What a Spark's own system has, in case it is to be the controller: DGX OS 7 and Debian 13.
SPARK_PYTHONS = ("3.12", "3.13")


def requirements() -> list[str]:
    """What pyproject.toml names, for the program and for building it. Raises SparkfleetError where there is no clone to
    install from."""
    if not CHECKOUT:
        raise SparkfleetError(f"{ROOT} is not a clone: wheels for scripts/setup can only be collected from one")
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


def take(folder: str | Path, digest: str, private: str | Path) -> int:
    """Copy the wheels of a bundle to `private`, an empty folder that only this user may enter; their number. They must
    be the files that bundle.json lists, and there be no others. `digest`: what bundle.json must have, "" for any.
    Raises SparkfleetError, which names the file."""
    bundle = Bundle.read(folder, digest)
    listed = sorted(name for name in bundle.files if name.startswith("python/"))
    if not listed:
        raise SparkfleetError(f"the bundle {folder} has no Python packages: `sparkfleet bundle FOLDER` adds them")
    again = "nothing was installed; run `sparkfleet bundle FOLDER` again where there is internet"
    for name in listed:
        wanted = bundle.files[name]
        try:
            with _new(Path(private, name.removeprefix("python/"))) as copy:
                found = bundle.entry_of(name, limit=wanted.size, into=copy)[0]
        except (OSError, BoundsError) as error:
            raise SparkfleetError(f"{bundle.folder / name}: {error}; {again}") from None
        if found != wanted:
            raise SparkfleetError(f"{bundle.folder / name} does not have the sha256 that bundle.json lists; {again}")
    unlisted = sorted({f"python/{path.name}" for path in (bundle.folder / "python").iterdir()} - set(listed))
    if unlisted:
        raise SparkfleetError(f"{bundle.folder}/{printable(unlisted[0], 200)} is not listed in bundle.json; {again}")
    return len(listed)


def _new(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb")


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


def main(argv: Sequence[str]) -> int:
    """`FOLDER DIGEST PRIVATE`; exit code 2 for wheels that are not to be installed."""
    folder, digest, private = argv
    try:
        take(folder, digest, private)
    except SparkfleetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
