# SPDX-License-Identifier: Apache-2.0
"""The releases of a host: what was deployed, what is current, and the journal of the switch between two.

    /opt/sparkfleet/releases/N/{compose.yml,plan.json,lock.json,outcome.json}
    /opt/sparkfleet/current -> releases/N
    /opt/sparkfleet/compose.yml -> current/compose.yml
    /var/lib/sparkfleet/switch.json

Every file is written as a whole or not at all, and links are replaced atomically, so a power cut leaves either the
old or the new. A release that was staged never changes; only its outcome is written again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROJECT_DIR = "/opt/sparkfleet"
STATE_DIR = "/var/lib/sparkfleet"
LOCK_FILE = "/run/lock/sparkfleet-switch"
COMPOSE, PLAN, LOCK, OUTCOME = "compose.yml", "plan.json", "lock.json", "outcome.json"
VERIFIED, FAILED = "verified", "failed"


class ReleaseError(Exception):
    """A release is not there, or is damaged; the message names it."""


def write_text(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a file as a whole or not at all, on the disk when this returns. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        Path(scratch).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(scratch).unlink()
        raise
    sync_folder(path.parent)


def write_json(path: Path, data: Any, mode: int = 0o644) -> None:
    """Write JSON as `write_text` does."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n", mode)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file, or None if there is none that can be read."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def link(path: Path, target: str) -> None:
    """Let the link `path` point to `target`, in one step. Raises OSError."""
    scratch = path.with_name(f".{path.name}.new")
    with contextlib.suppress(FileNotFoundError):
        scratch.unlink()
    scratch.symlink_to(target)
    scratch.replace(path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make renames within a folder last. Raises OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Store:
    """The releases under `project_dir`, and what is known of switches under `state_dir`."""

    def __init__(
        self, project_dir: str | Path = PROJECT_DIR, state_dir: str | Path = STATE_DIR, lock_file: str = LOCK_FILE
    ) -> None:
        self.project_dir, self.state_dir, self.lock_file = Path(project_dir), Path(state_dir), Path(lock_file)

    # -- read ------------------------------------------------------------------------------------------------

    def folder(self, number: int) -> Path:
        """Where a release lies."""
        return self.project_dir / "releases" / str(number)

    def numbers(self) -> list[int]:
        """The releases that are kept, oldest first."""
        folders = (self.project_dir / "releases").glob("[0-9]*")
        return sorted(int(path.name) for path in folders if path.name.isdigit() and (path / LOCK).is_file())

    def current(self) -> int | None:
        """The release that was verified last, or None."""
        try:
            name = (self.project_dir / "current").readlink().name
        except OSError:
            return None
        return int(name) if name.isdigit() and (self.folder(int(name)) / LOCK).is_file() else None

    def previous(self) -> int | None:
        """The release that was verified most recently before the current one became so, or None."""
        current = self.current()
        outcomes = {number: self.outcome(number) or {} for number in self.numbers() if number != current}
        verified = [number for number, outcome in outcomes.items() if outcome.get("verified_at")]
        return max(verified, key=lambda number: float(outcomes[number]["verified_at"]), default=None)

    def lock(self, number: int) -> dict[str, Any]:
        """What a release was pinned to. Raises ReleaseError."""
        return self._part(number, LOCK)

    def plan(self, number: int) -> dict[str, Any]:
        """The plan that a release was made by. Raises ReleaseError."""
        return self._part(number, PLAN)

    def outcome(self, number: int) -> dict[str, Any] | None:
        """How a release fared: {state: verified|failed, at, verified_at, failure, message}; None if it never ran."""
        return read_json(self.folder(number) / OUTCOME)

    def compose_file(self, number: int) -> Path:
        """The compose file of a release. Raises ReleaseError if it is not there."""
        path = self.folder(number) / COMPOSE
        if not path.is_file():
            raise ReleaseError(f"release {number} has no {path}; there are releases {self._there()}")
        return path

    def _part(self, number: int, name: str) -> dict[str, Any]:
        data = read_json(self.folder(number) / name)
        if data is None:
            raise ReleaseError(
                f"{self.folder(number) / name} is missing or damaged; there are releases {self._there()}"
            )
        return data

    def _there(self) -> str:
        return ", ".join(map(str, self.numbers())) or "(none)"

    def summary(self) -> dict[str, Any]:
        """All of it as plain data: {current, previous, numbers, locks, outcomes, newest_compose, switch,
        switch_active, switch_compose}; of the journal all but log and verification."""
        numbers, journal, active = self.numbers(), self.switch(), self.switch_active()
        return {
            "current": self.current(),
            "previous": self.previous(),
            "numbers": numbers,
            # JSON knows only strings as keys.
            "locks": {str(number): read_json(self.folder(number) / LOCK) or {} for number in numbers},
            "outcomes": {str(number): self.outcome(number) for number in numbers},
            "newest_compose": self._text(numbers[-1]) if numbers else None,
            "switch": _brief(journal),
            "switch_active": active,
            "switch_compose": self._text(int(journal["to"])) if active and journal else None,
        }

    def _text(self, number: int) -> str | None:
        try:
            return self.compose_file(number).read_text(encoding="utf-8")
        except (OSError, ReleaseError):
            return None

    # -- write -----------------------------------------------------------------------------------------------

    def find(self, compose: str, plan: dict[str, Any]) -> int | None:
        """A kept release that is the same, the newest, or None. Of the plan's figures, which move with the host's
        memory, nothing counts."""
        for number in reversed(self.numbers()):
            with contextlib.suppress(OSError, ReleaseError):
                kept = self.plan(number)
                same = all(kept.get(key) == plan.get(key) for key in ("model", "profile", "verify"))
                if same and self.compose_file(number).read_text(encoding="utf-8") == compose:
                    return number
        return None

    def stage(self, compose: str, plan: dict[str, Any], lock: dict[str, Any]) -> int:
        """Keep a new release; its number. It is complete or not there at all. Raises OSError."""
        releases = self.project_dir / "releases"
        releases.mkdir(parents=True, exist_ok=True)
        for leftover in releases.glob(".staged-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(dir=releases, prefix=".staged-"))
        try:
            scratch.chmod(0o755)
            number = max(self.numbers(), default=0) + 1
            while True:
                write_text(scratch / COMPOSE, compose)
                write_json(scratch / PLAN, plan)
                write_json(scratch / LOCK, {"number": number, **lock})
                try:
                    scratch.rename(self.folder(number))  # fails if another run was faster
                except OSError:
                    if not self.folder(number).exists():
                        raise
                    number += 1
                    continue
                break
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        sync_folder(releases)
        return number

    def commit(self, number: int, at: float) -> None:
        """The release is verified and now the current one. Raises OSError."""
        write_json(self.folder(number) / OUTCOME, {"state": VERIFIED, "at": at, "verified_at": at})
        link(self.project_dir / "current", f"releases/{number}")
        if (self.project_dir / COMPOSE).is_symlink() or not (self.project_dir / COMPOSE).is_dir():
            link(self.project_dir / COMPOSE, f"current/{COMPOSE}")

    def note_failure(self, number: int, at: float, failure: str, message: str, log: list[str]) -> None:
        """The release was tried and failed; `log` are the engine's last lines. Raises OSError."""
        before = self.outcome(number) or {}
        kept = {"verified_at": before["verified_at"]} if before.get("verified_at") else {}
        data = {"state": FAILED, "at": at, **kept, "failure": failure, "message": message}
        write_json(self.folder(number) / OUTCOME, data)
        if log:
            write_text(self.folder(number) / "engine.log", "\n".join(log) + "\n")

    def prune(self, keep: int) -> list[int]:
        """Remove all but the newest `keep` releases, the current and the previous one; those removed."""
        numbers = self.numbers()
        kept = {*numbers[-max(keep, 1) :], self.current(), self.previous()}
        removed = [number for number in numbers if number not in kept]
        for number in removed:
            shutil.rmtree(self.folder(number), ignore_errors=True)
        return removed

    # -- the journal of the switch ---------------------------------------------------------------------------

    def switch(self) -> dict[str, Any] | None:
        """The journal of the switch that runs or ran last, or None."""
        return read_json(self.state_dir / "switch.json")

    def write_switch(self, journal: dict[str, Any]) -> None:
        """Write the journal. Raises OSError."""
        write_json(self.state_dir / "switch.json", journal)

    def switch_active(self) -> bool:
        """Whether a switch runs at this moment."""
        try:
            with self.lock_file.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[bool]:
        """Hold the lock of switches; gives False, and holds nothing, where another holds it. Raises OSError."""
        self.lock_file.parent.mkdir(parents=True, exist_ok=True)
        with self.lock_file.open("wb") as file:
            # One that only looks holds the lock for a moment.
            for _ in range(20):
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.05)
            else:
                yield False
                return
            yield True


def _brief(journal: dict[str, Any] | None) -> dict[str, Any] | None:
    if journal is None:
        return None
    brief = {key: value for key, value in journal.items() if key != "verification"}
    for key in ("error", "restore_error"):
        if brief.get(key):
            brief[key] = {name: value for name, value in brief[key].items() if name not in ("log", "checks")}
    return brief
