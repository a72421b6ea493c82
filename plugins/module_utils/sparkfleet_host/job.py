# SPDX-License-Identifier: Apache-2.0
"""A long job on a Spark: one at a time (a lock), its progress in a JSON status file that others read.

Status file, replaced as a whole: name, what, pid, pid_start, state (running, done, failed), phase, done, total,
percent, rate (bytes a second), message, error {id, message} or None, result {}, started, updated (Unix times).
Bytes throughout; `total` and `percent` are None while they are not known. percent is that of the transfer, stays
below 100 until the job is done, and never goes back; `done` and `total` are those of the phase.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import bounded
from .bounded import BoundsError

FOLDER = "/run/sparkfleet/fetch"
WRITE_EVERY = 0.25  # seconds
RATE_OVER = 10.0  # seconds
STATES = ("running", "done", "failed")
STATUS_BYTES = 1 << 20
LARGEST = 1 << 62
RECLAIMING = "the removal of unneeded images and models"
RECLAIM_SECONDS = 300.0  # that a job waits for it
#: Types that a field of the status file may have, and its value where it has another.
FIELDS: dict[str, tuple[tuple[type, ...], Any]] = {
    **dict.fromkeys(("name", "what", "phase", "message"), ((str,), "")),
    **dict.fromkeys(("pid", "done", "rate"), ((int,), 0)),
    **dict.fromkeys(("total", "percent", "pid_start"), ((int,), None)),
    **dict.fromkeys(("started", "updated"), ((int, float), 0.0)),
    "error": ((dict,), None),
    "result": ((dict,), {}),
}
TRANSFER = ("pulling", "downloading")
AFTER = ("extracting", "checking")


class JobError(Exception):
    """A failure with an entry in the table of failures; the message carries cause and remedy."""

    def __init__(self, id: str, message: str) -> None:
        super().__init__(message)
        self.id = id


class Job:
    """Takes the lock with `acquire`, reports with `update`, ends with `done` or `failed`. Safe across threads."""

    def __init__(self, status_file: str | Path, name: str, what: str) -> None:
        self.path = Path(status_file)
        self.lock_path = self.path.with_name(self.path.name + ".lock")
        self._lock_fd: int | None = None
        self._mutex = threading.Lock()
        self._written = 0.0
        self._seen: deque[tuple[float, int]] = deque()
        self.status: dict[str, Any] = {
            "name": name,
            "what": what,
            "pid": os.getpid(),
            "pid_start": process_start(os.getpid()),
            "state": "running",
            "phase": "starting",
            "done": 0,
            "total": None,
            "percent": None,
            "rate": 0,
            "message": "",
            "error": None,
            "result": {},
            "started": time.time(),
            "updated": time.time(),
        }

    def acquire(self) -> dict[str, Any] | None:
        """None when the lock is ours now, until this process ends. Else its holder: {"pid", "what"}."""
        os.umask(0o022)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.parent.chmod(0o755)
        fd = os.open(self.lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        deadline = time.monotonic() + RECLAIM_SECONDS
        while (holder := _take(fd)) is not None:
            if holder["what"] != RECLAIMING or time.monotonic() > deadline:
                os.close(fd)
                return holder
            time.sleep(0.2)
        self._lock_fd = fd
        self._write()
        _sign(fd, self.status["what"])
        return None

    def update(self, phase: str, done: int, total: int | None, message: str = "") -> None:
        """Where the job is; written when the phase changes and at most four times a second otherwise."""
        with self._mutex:
            now = time.time()
            status = self.status
            if phase != status["phase"]:
                self._seen.clear()
            moved = phase != status["phase"] or message != status["message"]
            self._seen.append((now, done))
            while len(self._seen) > 2 and now - self._seen[0][0] > RATE_OVER:
                self._seen.popleft()
            (first, before), span = self._seen[0], now - self._seen[0][0]
            status.update(phase=phase, done=done, total=total, message=message, updated=now)
            status["rate"] = int(max(0, done - before) / span) if span >= 0.5 and first < now else 0
            if phase in AFTER:
                status["percent"] = 99
            elif total and phase in TRANSFER:
                status["percent"] = max(status["percent"] or 0, min(99, int(100 * done / total)))
            if moved or now - self._written >= WRITE_EVERY:
                self._write()

    def done(self, result: dict[str, Any]) -> None:
        """The end: `result` is what the module returns."""
        with self._mutex:
            total = self.status["total"]
            if total:
                self.status["done"] = total
            self.status.update(state="done", phase="done", percent=100, rate=0, result=result, message="")
            self._write()

    def failed(self, id: str, message: str) -> None:
        """The end, with a cause and a remedy."""
        with self._mutex:
            self.status.update(state="failed", rate=0, message=message, error={"id": id, "message": message})
            self._write()

    def _write(self) -> None:
        self.status["updated"] = self._written = time.time()
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(self.status) + "\n", "utf-8")
        temporary.chmod(0o644)
        temporary.replace(self.path)


@contextlib.contextmanager
def hold(status_file: Path) -> Iterator[dict[str, Any] | None]:
    """Prevent jobs with this status file from starting. Yields the holder, without locking, if one is running."""
    status_file.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(f"{status_file}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        holder = _take(fd)
        if holder is None:
            _sign(fd, RECLAIMING)
        yield holder
    finally:
        os.close(fd)


def _take(fd: int) -> dict[str, Any] | None:
    """Take the lock; its holder where another has it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _holder(fd)
    return None


def _sign(fd: int, what: str) -> None:
    os.ftruncate(fd, 0)
    os.pwrite(fd, json.dumps({"pid": os.getpid(), "what": what}).encode(), 0)


def process_start(pid: int) -> int | None:
    """When a process started, in clock ticks since boot (field 22 of /proc/PID/stat); None if there is none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text("ascii", "replace").rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def is_alive(status: dict[str, Any]) -> bool:
    """Whether the process that wrote a status still runs (another one with its number does not count)."""
    pid = status.get("pid")
    start = process_start(pid) if isinstance(pid, int) else None
    return start is not None and start == status.get("pid_start")


def read_status(path: str | Path) -> dict[str, Any] | None:
    """A status file; None where there is none or it is damaged. A field of the wrong type has its first value."""
    try:
        found = bounded.read_json(path, STATUS_BYTES)
    except (OSError, BoundsError):
        return None
    if found.get("state") not in STATES:
        return None
    return {**found, **{key: _field(key, found.get(key)) for key in FIELDS}}


def _field(key: str, value: Any) -> Any:
    kinds, first = FIELDS[key]
    good = isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds)
    if good and isinstance(value, int | float):
        good = abs(value) <= LARGEST
    if key == "error" and isinstance(value, dict):
        good = isinstance(value.get("id"), str) and isinstance(value.get("message"), str)
    return value if good or value is None is first else first


def _holder(fd: int) -> dict[str, Any]:
    for _ in range(20):  # the holder writes its name right after it took the lock
        try:
            value = bounded.as_dict(bounded.parse_json(os.pread(fd, 4096, 0), "lock"), "lock")
            pid, what = bounded.as_int(value.get("pid"), "pid", 1), bounded.as_str(value.get("what"), "what")
        except BoundsError:
            pid = 0
        if pid and process_start(pid) is not None:
            return {"pid": pid, "what": what}
        time.sleep(0.05)
    return {"pid": 0, "what": "unknown"}
