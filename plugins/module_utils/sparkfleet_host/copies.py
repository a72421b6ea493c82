# SPDX-License-Identifier: Apache-2.0
"""Copies of secrets on a host: in files, command lines and environments."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

#: Where copies of a secret may be, apart from models and layers of images.
PLACES = [
    *("/etc", "/opt/sparkfleet", "/root", "/run", "/tmp", "/usr/local"),  # noqa: S108 - they are read
    *("/var/lib/sparkfleet", "/var/lib/docker/containers", "/var/log", "/var/tmp", "/home"),  # noqa: S108
]
LARGEST = 64 << 20
CHUNK = 1 << 20
#: Of a value; a shorter one would be found everywhere.
SHORTEST = 6
#: Memory that processes share; the file systems of containers and snapshots.
SKIPPED = {"/run/docker", "/run/containerd", "/run/user", "/run/udev", "/run/systemd/units", "/var/log/lastlog"}


def files(paths: Sequence[str]) -> Iterator[Path]:
    """Regular files at and below some paths, on the same file systems; links are not followed."""
    for path in paths:
        top = Path(path)
        try:
            info = top.lstat()
        except OSError:
            continue
        if stat.S_ISREG(info.st_mode):
            yield top
        if not stat.S_ISDIR(info.st_mode):
            continue
        for folder, folders, names in os.walk(top):
            folders[:] = [name for name in folders if f"{folder}/{name}" not in SKIPPED and not mounted(folder, name)]
            for name in names:
                file = Path(folder, name)
                try:
                    if stat.S_ISREG(file.lstat().st_mode) and str(file) not in SKIPPED:
                        yield file
                except OSError:
                    continue


def mounted(folder: str, name: str) -> bool:
    """Whether a folder of /home and the like is another file system: a share of the network, a file system of files."""
    return folder not in ("/", "/run") and os.path.ismount(f"{folder}/{name}")


def processes() -> Iterator[Path]:
    """Command line and environment of each process but this one and those that it was started by."""
    own = ancestors()
    for folder in Path("/proc").glob("[0-9]*"):
        if folder.name not in own:
            yield folder / "cmdline"
            yield folder / "environ"


def ancestors() -> set[str]:
    """This process and those above it, which have the values themselves."""
    found, pid = set(), str(os.getpid())
    while pid not in ("0", "") and pid not in found:
        found.add(pid)
        try:
            pid = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1]
        except (OSError, IndexError):
            break
    return found


def has(path: Path, values: Sequence[bytes], end: float) -> bool:
    """Whether a file has one of the values. Raises OSError, TimeoutError."""
    longest = max(map(len, values))
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > LARGEST:
            file.seek(size - LARGEST)
        rest, left = b"", LARGEST
        while left > 0 and (chunk := file.read(CHUNK)):
            if time.monotonic() > end:
                raise TimeoutError
            data = rest + chunk
            if any(value in data for value in values):
                return True
            rest, left = data[-longest:], left - len(chunk)
    return False


def search(values: Sequence[str], paths: Sequence[str], allowed: Sequence[str], seconds: float) -> dict[str, Any]:
    """Places that have one of the values, but for those that are allowed to: {found, searched, unfinished}."""
    wanted, end = [value.encode() for value in values], time.monotonic() + seconds
    found, searched, unfinished = [], 0, False
    for path in (*processes(), *files(paths)):
        if str(path) in allowed:
            continue
        try:
            searched += 1
            if has(path, wanted, end):
                found.append(str(path))
        except TimeoutError:
            unfinished = True
            break
        except OSError:
            continue  # gone meanwhile, or of a kernel thread
    return {"found": found, "searched": searched, "unfinished": unfinished}
