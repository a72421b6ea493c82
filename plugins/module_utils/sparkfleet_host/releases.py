# SPDX-License-Identifier: Apache-2.0
"""The releases of a host: what was deployed, what is current, and the journal of the switch between two.

    /opt/sparkfleet/releases/N/{compose.yml,plan.json,lock.json,outcome.json,engine.log,.sealed.json}
    /opt/sparkfleet/current -> releases/N
    /opt/sparkfleet/compose.yml -> current/compose.yml
    /var/lib/sparkfleet/{switch.json,last-release,halted}
    /run/sparkfleet/{switch.lock,switch-spare.json}

Every file is written completely or not at all, and links are replaced atomically, so a power cut leaves either the
old or the new. A release that was staged never changes; only its outcome is written again. Its files are read-only,
their hashes are in the lock, and `.sealed.json` has a copy of each: a file that was edited or damaged is set aside
alongside it and rewritten, and a release that cannot be repaired is set aside altogether. A number is never used
twice, whatever was removed.

What the files hold is in `release_format`.

A journal that cannot be written where it belongs (a full disk) is kept next to the lock, in memory, so that a switch
that has ended is not ended a second time.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from . import bounded
from .bounded import BoundsError, as_dict, as_int, as_str
from .release_format import (
    COMPOSE,
    DONE,
    FAILED,
    NUMBERS,
    PLAN,
    VERIFIED,
    Engine,
    NewerFormatError,
    as_json,
    check_journal,
    check_lock,
    check_outcome,
    check_plan,
    identity,
    merged,
    storable,
)

PROJECT_DIR = "/opt/sparkfleet"
STATE_DIR = "/var/lib/sparkfleet"
RUN_DIR = "/run/sparkfleet"
LOCK_FILE = f"{RUN_DIR}/switch.lock"
LOCK, OUTCOME, SEALED = "lock.json", "outcome.json", ".sealed.json"
SWITCH, LAST, SPARE = "switch.json", "last-release", "switch-spare.json"
HALTED = "halted"
LOG_LIMIT = 4 * bounded.MIB  # of the log that is kept of a failed release
HELD_BY_SWITCH = "switch"
HELD_BY_GUARD = "guard"
GUARD_PATIENCE = 120.0  # seconds that a switch waits for what the guard does
STAGE_PATIENCE = 60.0  # seconds that one staging waits for another


class ReleaseError(Exception):
    """A release is not there, or is damaged; the message names it."""


class NewerReleaseError(ReleaseError):
    """A newer version of Sparkfleet wrote the release: it is intact, but cannot be read."""


def write_bytes(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a file completely or not at all, on the disk when this returns; what `mode` keeps from others they cannot
    read even for a moment. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        Path(scratch).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(scratch).unlink()
        raise
    sync_folder(path.parent)


def write_text(path: Path, text: str, mode: int = 0o644) -> None:
    """Write text as `write_bytes` does. Half of a surrogate pair, which JSON from outside may hold, is written as its
    escape: a journal that cannot be written would end a switch halfway."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"), mode)


def write_json(path: Path, data: Any, mode: int = 0o644) -> None:
    """Write JSON as `write_text` does."""
    write_text(path, as_json(data), mode)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file, or None if there is none that can be read."""
    try:
        return bounded.read_json(path)
    except (OSError, BoundsError):
        return None


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
        """The folder of a release."""
        return self.project_dir / "releases" / str(number)

    def numbers(self) -> list[int]:
        """The releases that are kept, oldest first, damaged ones as well."""
        folders = (self.project_dir / "releases").glob("[0-9]*")
        return sorted(number for path in folders if (number := _release(path.name)) and path.is_dir())

    def current(self) -> int | None:
        """The release that was verified last, or None."""
        try:
            number = _release((self.project_dir / "current").readlink().name)
        except OSError:
            return None
        return number if number and self.folder(number).is_dir() else None

    def previous(self) -> int | None:
        """The release that was verified most recently before the current one became so, or None."""
        current = self.current()
        outcomes = {number: self.outcome(number) or {} for number in self.numbers() if number != current}
        verified = [number for number, outcome in outcomes.items() if outcome.get("verified_at")]
        return max(verified, key=lambda number: float(outcomes[number]["verified_at"]), default=None)

    def lock(self, number: int) -> dict[str, Any]:
        """What a release is pinned to, see `check_lock`. Raises ReleaseError."""
        return self._part(number, LOCK, check_lock)

    def plan(self, number: int) -> dict[str, Any]:
        """The plan that a release was made by, see `check_plan`. Raises ReleaseError."""
        return self._part(number, PLAN, check_plan)

    def engines(self, number: int) -> tuple[Engine, ...]:
        """The engines of a release, in the order that they are started in. Raises ReleaseError."""
        plan, lock = self.plan(number), self.lock(number)
        try:
            return merged(plan, lock)
        except BoundsError as error:
            raise ReleaseError(
                f"{self.folder(number)} is damaged ({error}); there are releases {self._there()}"
            ) from None

    def outcome(self, number: int) -> dict[str, Any] | None:
        """The outcome of a release: {state: verified|failed, at, verified_at, failure, message,
        container_ids: {service: id of the container that answered}}; None if it never ran, or its record cannot be
        understood."""
        try:
            data = bounded.read_json(self.folder(number) / OUTCOME)
            return check_outcome(data, self._first(number) if "container_id" in data else "")
        except (OSError, BoundsError):
            return None

    def _first(self, number: int) -> str:
        """The service of a release's first engine; "" where its files cannot be read."""
        try:
            return self.engines(number)[0].service
        except ReleaseError:
            return ""

    def compose_file(self, number: int) -> Path:
        """The compose file of a release. Raises ReleaseError if it is not there."""
        path = self.folder(number) / COMPOSE
        if not path.is_file():
            raise ReleaseError(f"release {number} has no {path}; there are releases {self._there()}")
        return path

    def _part(self, number: int, name: str, check: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        path = self.folder(number) / name
        try:
            return check(bounded.read_json(path))
        except FileNotFoundError:
            raise ReleaseError(f"{path} is missing or damaged; there are releases {self._there()}") from None
        except NewerFormatError as error:
            raise NewerReleaseError(f"{path}: {error}; there are releases {self._there()}") from None
        except (OSError, BoundsError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error).removeprefix(f"{path}: ")
            raise ReleaseError(f"{path} is missing or damaged ({reason}); there are releases {self._there()}") from None

    def _there(self) -> str:
        return ", ".join(map(str, self.numbers())) or "(none)"

    def summary(self) -> dict[str, Any]:
        """All of it as plain data: {current, previous, next, numbers, locks, outcomes, damaged, newest_compose, switch,
        switch_active, switch_compose, lock_holder, unreadable, set_aside, halted}; of the journal all but logs,
        verifications.
        `damaged`: what is wrong with a release, by its number. `unreadable`: state files that cannot be understood, and
        why. `set_aside`: the copies that were kept of such."""
        numbers, journal, holder = self.numbers(), self.switch(), self.holder()
        active = _is_switch(holder)
        damaged = {str(number): "; ".join(reasons) for number in numbers if (reasons := self.damage(number))}
        unreadable = [reason] if (reason := self.switch_damage()) else []
        return {
            "current": self.current(),
            "previous": self.previous(),
            "numbers": numbers,
            # JSON knows only strings as keys.
            "locks": {str(number): self._lock_or_none(number) or {} for number in numbers},
            "outcomes": {str(number): self.outcome(number) for number in numbers},
            "damaged": damaged,
            "next": self.next_number(),
            "newest_compose": self._text(numbers[-1]) if numbers else None,
            "switch": _brief(journal),
            "switch_active": active,
            "switch_compose": self._text(int(journal["to"])) if active and journal else None,
            "lock_holder": holder,
            "unreadable": unreadable,
            "set_aside": self.set_aside_files(),
            "halted": self.halted(),
        }

    def _text(self, number: int) -> str | None:
        try:
            return bounded.read_file(self.compose_file(number)).decode("utf-8")
        except (OSError, ReleaseError, ValueError):
            return None

    def _lock_or_none(self, number: int) -> dict[str, Any] | None:
        try:
            return self.lock(number)
        except ReleaseError:
            return None

    def halted(self) -> bool:
        """Whether the engines were stopped on purpose, so that no request is to start one."""
        return (self.state_dir / HALTED).exists()

    def halt(self, wanted: bool) -> bool:
        """Record that, or that it is over; whether that is new. Raises OSError."""
        before = self.halted()
        if wanted and not before:
            write_text(self.state_dir / HALTED, "")
        elif before and not wanted:
            (self.state_dir / HALTED).unlink(missing_ok=True)
        return before != wanted

    # -- damage ----------------------------------------------------------------------------------------------

    def damage(self, number: int) -> list[str]:
        """What is wrong with a release's files, each with its name; [] where it is intact. For a release of an earlier
        version, which has no hashes, only the form is checked."""
        return list(self._damage(number).values())

    def _damage(self, number: int) -> dict[str, str]:
        folder = self.folder(number)
        if not folder.is_dir():
            return {"": f"{folder} is missing"}
        found: dict[str, str] = {}
        for name, check in ((LOCK, check_lock), (PLAN, check_plan)):
            try:
                self._part(number, name, check)
            except ReleaseError as error:
                found[name] = str(error).partition("; there are")[0]
        if not found:
            try:
                self.engines(number)
            except ReleaseError as error:
                found[LOCK] = str(error).partition("; there are")[0]
        if self._text(number) is None:
            found[COMPOSE] = f"{folder / COMPOSE} is missing or damaged"
        sealed = self._sealed(number)
        wanted = {name: _sha256(text) for name, text in (sealed or {}).items()}
        if sealed is None and LOCK not in found:
            wanted = dict(self.lock(number).get("sha256") or {})
            if wanted:
                found[SEALED] = f"{folder / SEALED} is missing or damaged"
        for name, digest in wanted.items():
            if name not in found and bounded.checksum(folder / name) != digest:
                found[name] = f"{folder / name} was changed"
        try:
            check_outcome(bounded.read_json(folder / OUTCOME))
        except FileNotFoundError:
            pass
        except (OSError, BoundsError) as error:
            found[OUTCOME] = f"{folder / OUTCOME} is damaged ({str(error).removeprefix(f'{folder / OUTCOME}: ')})"
        return found

    def _sealed(self, number: int) -> dict[str, str] | None:
        """The copies of a release's files, or None where there are none or they are damaged."""
        try:
            data = bounded.read_json(self.folder(number) / SEALED, 3 * bounded.STATE_FILE)
            files = as_dict(data.get("files"), "files")
            texts = {name: as_str(files.get(name), name, bounded.STATE_FILE) for name in (COMPOSE, PLAN, LOCK)}
            if data.get("sha256") != _sha256(json.dumps(texts, sort_keys=True)):
                return None
            lock = check_lock(bounded.parse_json(texts[LOCK], LOCK))
            merged(check_plan(bounded.parse_json(texts[PLAN], PLAN)), lock)
        except (OSError, BoundsError):
            return None
        return texts if lock.get("number") == number else None

    def seal(self, number: int) -> None:
        """Write the copies of an intact release that has none: one of an earlier version that was verified. Raises
        OSError, ReleaseError."""
        if self._sealed(number) is not None or set(self._damage(number)) - {SEALED, OUTCOME}:
            return
        folder = self.folder(number)
        lock = self._part(number, LOCK, _unchanged)
        _write_release(folder, self._text(number) or "", (folder / PLAN).read_text("utf-8"), {**lock, "number": number})

    def repair(self, number: int, discard: bool = True) -> list[str]:
        """Bring a release's files back as they were staged: what was wrong, [] for nothing. What was edited or damaged
        is kept alongside it (NAME.damaged-UNIXTIME). Raises ReleaseError for a release that has no intact copy; with
        `discard` it is set aside altogether, with all it has, so that nothing uses it. One of a newer version stays as
        it is: NewerReleaseError."""
        found = self._damage(number)
        if not found:
            return []
        folder = self.folder(number)
        if "" in found:
            raise ReleaseError(f"{found['']}; there are releases {self._there()}")
        reasons = list(found.values())
        for part in (self.plan, self.lock):
            try:
                part(number)
            except NewerReleaseError:
                raise
            except ReleaseError:
                pass
        try:
            if OUTCOME in found:
                bounded.set_aside(folder / OUTCOME)
                del found[OUTCOME]
            sealed = self._sealed(number)
            if sealed is not None:
                for name in found:
                    if (folder / name).exists() or (folder / name).is_symlink():
                        bounded.set_aside(folder / name)
                    write_text(folder / name, sealed[name], 0o444)
            elif not set(found) - {SEALED}:
                self.seal(number)
        except OSError as error:
            raise ReleaseError(f"release {number} cannot be repaired: {error.strerror}") from None
        if self._damage(number):
            kept = self.discard(number) if discard else None
            where = f", set aside as {kept}" if kept else ""
            raise ReleaseError(
                f"release {number} is damaged{where}: {'; '.join(reasons)}; there are releases {self._there()}"
            )
        return reasons

    def discard(self, number: int) -> Path | None:
        """Set an entire release aside; its new place, or None where that is not possible."""
        with contextlib.suppress(OSError):
            self._note_number(number)
        kept = bounded.set_aside(self.folder(number))
        others = (self.project_dir / "releases").glob("*.damaged-*")
        for old in sorted(others, key=lambda path: path.name.rpartition("-")[2])[: -bounded.SET_ASIDE]:
            shutil.rmtree(old, ignore_errors=True)
        return kept

    def repair_all(self) -> list[str]:
        """Repair every release; what was wrong, with what was done about it. The current one is never set
        aside altogether: it is what serves."""
        words: list[str] = []
        current = self.current()
        for number in self.numbers():
            try:
                reasons = self.repair(number, discard=number != current)
                words += [f"{reason}; restored, the other is kept alongside it" for reason in reasons]
            except ReleaseError as error:
                words.append(str(error).partition("; there are")[0])
        return words

    def set_aside_files(self) -> list[str]:
        """The damaged files and releases that were kept, newest last."""
        folders = [self.state_dir, self.project_dir / "releases", *map(self.folder, self.numbers())]
        return sorted(str(path) for folder in folders for path in folder.glob("*.damaged-*"))

    # -- write -----------------------------------------------------------------------------------------------

    def find(self, compose: str, plan: dict[str, Any]) -> int | None:
        """The newest intact release that is the same, or None; see `release_format.identity`. Raises BoundsError for
        what is not a plan."""
        wanted = identity(check_plan(plan))
        for number in reversed(self.numbers()):
            with contextlib.suppress(ReleaseError):
                same = identity(self.plan(number)) == wanted
                if same and self._text(number) == compose and not set(self._damage(number)) - {OUTCOME}:
                    return number
        return None

    def next_number(self) -> int:
        """The number of the next release: one that was never used, whatever was removed since."""
        used = [0, *self.numbers()]
        used += [_release(path.name.partition(".")[0]) for path in (self.project_dir / "releases").glob("*.damaged-*")]
        with contextlib.suppress(OSError, ValueError):
            used.append(_release(bounded.read_file(self.state_dir / LAST, 100).decode("ascii").strip()))
        with contextlib.suppress(OSError):
            used.append(_release((self.project_dir / "current").readlink().name))
        journal = self.switch() or {}
        used += [journal.get("to") or 0, journal.get("from") or 0]
        return max(used) + 1

    def _note_number(self, number: int) -> None:
        with contextlib.suppress(OSError, ValueError):
            if _release(bounded.read_file(self.state_dir / LAST, 100).decode("ascii").strip()) >= number:
                return
        write_text(self.state_dir / LAST, f"{number}\n")

    @contextlib.contextmanager
    def staging(self) -> Iterator[None]:
        """Hold the lock of stagings: one at a time. Raises TimeoutError (an OSError), OSError."""
        releases = self.project_dir / "releases"
        releases.mkdir(parents=True, exist_ok=True)
        handle = os.open(releases / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "rb") as file:
            if not _locked(file.fileno(), lambda: STAGE_PATIENCE):
                raise TimeoutError(110, "another staging does not finish")
            yield

    def stage(self, compose: str, plan: dict[str, Any], lock: dict[str, Any], number: int = 0) -> int:
        """Keep a new release; its number: the next one, or `number`, which must not be lower. It is complete or not
        there at all. Raises OSError, BoundsError for what is not a plan or a lock, and for a number that was used."""
        plan, lock = check_plan(plan), check_lock(lock)
        merged(plan, lock)
        releases = self.project_dir / "releases"
        with self.staging():
            for leftover in releases.glob(".staged-*"):  # its staging was killed, or it would hold the lock
                shutil.rmtree(leftover, ignore_errors=True)
            scratch = Path(tempfile.mkdtemp(dir=releases, prefix=".staged-"))
            try:
                scratch.chmod(0o755)
                following = self.next_number()
                if number and number < following:
                    raise BoundsError(f"release {number} was used already, the next one is {following}")
                number = number or following
                self._note_number(number)
                _write_release(scratch, compose, as_json(plan), {**lock, "number": number})
                scratch.rename(self.folder(number))
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
            sync_folder(releases)
        return number

    def commit(self, number: int, at: float, container_ids: Mapping[str, str] | None = None) -> None:
        """The release is verified and now the current one; `container_ids`: of the containers that answered, by
        service. Raises OSError where it is not: it becomes so in the last step."""
        if not self.folder(number).is_dir():
            raise FileNotFoundError(2, "the release was removed", str(self.folder(number)))
        data = {"state": VERIFIED, "at": at, "verified_at": at, "container_ids": {**(container_ids or {})}}
        write_json(self.folder(number) / OUTCOME, data)
        if (self.project_dir / COMPOSE).is_symlink() or not (self.project_dir / COMPOSE).is_dir():
            self._keep_edited()
            link(self.project_dir / COMPOSE, f"current/{COMPOSE}")
        self.point(number)
        with contextlib.suppress(OSError, ReleaseError):
            self._note_number(number)
            self.seal(number)

    def point(self, number: int) -> None:
        """Make a release the current one, whatever is recorded of it. Raises OSError."""
        link(self.project_dir / "current", f"releases/{number}")

    def _keep_edited(self) -> None:
        """A file that someone put in the place of the link is kept alongside it."""
        path = self.project_dir / COMPOSE
        if path.exists() and not path.is_symlink():
            bounded.set_aside(path)

    def note_failure(self, number: int, at: float, failure: str, message: str, log: list[str]) -> None:
        """The release was tried and failed; `log` are the engine's last lines. Raises OSError."""
        if not self.folder(number).is_dir():
            return
        before = self.outcome(number) or {}
        kept = {key: before[key] for key in ("verified_at", "container_ids") if before.get(key)}
        data = {"state": FAILED, "at": at, **kept, "failure": failure, "message": message}
        write_json(self.folder(number) / OUTCOME, data)
        if log:
            write_text(self.folder(number) / "engine.log", "\n".join(log)[-LOG_LIMIT:] + "\n")

    def prune(self, keep: int) -> list[int]:
        """Remove all but the newest `keep` releases, the current and the previous one; those removed."""
        return self.remove(self.surplus(keep))

    def remove(self, numbers: list[int]) -> list[int]:
        """Remove releases; their numbers."""
        for number in numbers:
            shutil.rmtree(self.folder(number), ignore_errors=True)
        return numbers

    def surplus(self, keep: int, to: int | None = None) -> list[int]:
        """The releases that `prune` would remove, or would remove after a switch to release `to`, staged or not."""
        numbers = self.numbers()
        if to in (None, self.current()):
            kept = {self.current(), self.previous()}
        else:
            kept = {to, self.current() or self.previous()}
        newest = sorted({*numbers, *({to} if to else ())})[-max(keep, 1) :]
        return [number for number in numbers if number not in {*kept, *newest}]

    def never_verified(self, keep: int) -> list[int]:
        """All but the newest `keep` of the releases that were refused, or tried without success, and never served."""
        current = self.current()
        verified = {number for number in self.numbers() if (self.outcome(number) or {}).get("verified_at")}
        return [number for number in self.numbers() if number not in {current, *verified}][: -max(keep, 1)]

    # -- the journal of the switch ---------------------------------------------------------------------------

    def switch(self) -> dict[str, Any] | None:
        """The journal of the switch that runs or ran last, with all its fields; None for none, and for one that cannot
        be understood (`switch_damage` gives the reason)."""
        spare = self._spare()
        if spare is not None:
            return spare
        try:
            return self._written()
        except (OSError, BoundsError):
            return None

    def switch_damage(self) -> str:
        """Why the journal cannot be understood, with its name; "" where it can, and where there is none."""
        path = self.state_dir / SWITCH
        if self._spare() is not None:
            return ""
        try:
            self._written()
        except FileNotFoundError:
            return ""
        except BoundsError as error:
            return f"{path}: {str(error).removeprefix(f'{path}: ')}"
        except OSError as error:
            return f"{path}: {error.strerror}"
        return ""

    def set_journal_aside(self) -> Path | None:
        """Set a journal aside that cannot be understood, so that a new one is started; its new place, or None if
        there is nothing to do."""
        return bounded.set_aside(self.state_dir / SWITCH) if self.switch_damage() else None

    def write_switch(self, journal: dict[str, Any]) -> None:
        """Write the journal, see `storable`. Raises OSError."""
        write_json(self.state_dir / SWITCH, storable(journal))
        with contextlib.suppress(OSError):
            self._spare_file().unlink(missing_ok=True)

    def spare_switch(self, journal: dict[str, Any]) -> None:
        """Keep a journal that cannot be written next to the lock. It counts until the next one is written, or the host
        is restarted. Raises OSError."""
        instead_of = None
        with contextlib.suppress(OSError, BoundsError):
            instead_of = _identity(self._written())
        write_json(self._spare_file(), {"instead_of": instead_of, "journal": storable(journal)}, 0o600)

    def _spare_file(self) -> Path:
        return self.lock_file.with_name(SPARE)

    def _spare(self) -> dict[str, Any] | None:
        try:
            data = bounded.read_json(self._spare_file(), 2 * bounded.STATE_FILE, follow=False)
            spare = check_journal(data.get("journal"))
        except (OSError, BoundsError):
            return None
        try:
            written = self._written()
        except FileNotFoundError:
            return spare if data.get("instead_of") is None else None
        except (OSError, BoundsError):
            return spare
        if data.get("instead_of") != _identity(written):
            return None
        # The same switch could write again, and was interrupted before it removed the spare copy.
        outrun = _identity(spare) == _identity(written) and len(spare["steps"]) < len(written["steps"])
        return None if outrun else spare

    def _written(self) -> dict[str, Any]:
        """The journal that is on the disk. Raises OSError, BoundsError."""
        return check_journal(bounded.read_json(self.state_dir / SWITCH))

    # -- the lock of what acts on the engine -------------------------------------------------------------------

    def holder(self) -> dict[str, Any] | None:
        """Who holds the lock: {holder: switch, guard, … or other, pid, process}; None where no one does. `other` is a
        process that is not Sparkfleet's."""
        try:
            handle = os.open(self.lock_file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except PermissionError:
            return self._holder_by_journal()
        except OSError:
            return None
        with os.fdopen(handle, "rb") as file:
            for _ in range(5):
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    pass
                else:
                    return None
                pid, noted = _lock_pid(file.fileno()), _noted(file.fileno())
                if noted is not None and pid in (None, noted["pid"]) and (name := _process(noted["pid"])):
                    return {**noted, "process": name}
                time.sleep(0.01)  # it was just taken, and its holder has not written its name yet
        return {"holder": "other", "pid": pid, "process": _process(pid)}

    def _holder_by_journal(self) -> dict[str, Any] | None:
        """For users who may not open the lock: whether the process of the journal still lives."""
        journal = self.switch()
        if journal is None or journal["phase"] == DONE or not journal["pid"]:
            return None
        if not Path(f"/proc/{journal['pid']}").exists():
            return None
        return {"holder": HELD_BY_SWITCH, "pid": journal["pid"], "process": _process(journal["pid"])}

    def switch_active(self) -> bool:
        """Whether a switch is running. What the guard does is not a switch."""
        return _is_switch(self.holder())

    @contextlib.contextmanager
    def exclusive(self, holder: str = HELD_BY_SWITCH, patience: float = 1.0) -> Iterator[bool]:
        """Hold the lock of what stops and starts the engine; gives False, and holds nothing, where another holds it.

        `holder`: who holds it, for others to see. `patience`: seconds to wait for one that is there; a switch waits
        GUARD_PATIENCE for the guard, whose actions are short. Raises OSError.
        """
        _private_folder(self.lock_file.parent)
        handle = os.open(self.lock_file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

        def limit() -> float:
            if holder == HELD_BY_GUARD:
                return patience
            by = self.holder()  # None where it was just released: then it can be taken
            return max(patience, GUARD_PATIENCE) if by is None or by["holder"] == HELD_BY_GUARD else patience

        with os.fdopen(handle, "r+b") as file:
            if not _locked(handle, limit):
                yield False
                return
            with contextlib.suppress(OSError):  # the name is for others to see; the lock is held without it
                os.ftruncate(handle, 0)
                os.pwrite(handle, json.dumps({"holder": holder, "pid": os.getpid()}).encode(), 0)
            try:
                yield True
            finally:
                with contextlib.suppress(OSError):
                    os.ftruncate(file.fileno(), 0)


def _unchanged(data: Any) -> dict[str, Any]:
    """A lock as it is written, once it is checked."""
    check_lock(data)
    return dict(data)


def _identity(journal: Mapping[str, Any]) -> list[Any]:
    """Which switch a journal is of."""
    return [journal["id"], journal["began"]]


def _release(name: str) -> int:
    """The number that a folder's name stands for; 0 for none."""
    return int(name) if name.isascii() and name.isdigit() and len(name) <= 9 and not name.startswith("0") else 0


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _write_release(folder: Path, compose: str, plan: str, lock: dict[str, Any]) -> None:
    """Write a release's files, read-only, with their hashes and their copies. Raises OSError."""
    hashes = {COMPOSE: _sha256(compose), PLAN: _sha256(plan)}
    texts = {COMPOSE: compose, PLAN: plan, LOCK: as_json({**lock, "sha256": hashes})}
    for name, text in texts.items():
        write_text(folder / name, text, 0o444)
    sealed = {"files": texts, "sha256": _sha256(json.dumps(texts, sort_keys=True))}
    write_json(folder / SEALED, sealed, 0o444)


def _private_folder(path: Path) -> None:
    """Make a folder that is ours alone; one that is there already and ours is made so. Raises OSError."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path == Path(RUN_DIR):
        info = path.lstat()
        if info.st_uid == os.geteuid() and info.st_mode & 0o777 != 0o700:
            path.chmod(0o700)


def _locked(handle: int, limit: Callable[[], float]) -> bool:
    """Take an exclusive flock, waiting for at most `limit()` seconds, which is evaluated each time."""
    began, over = time.monotonic(), False
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if over:
                return False
            # `limit` may find that the lock was released in the meantime: try once more.
            over = time.monotonic() - began >= limit()
            if not over:
                time.sleep(0.05)
        else:
            return True


def _noted(handle: int) -> dict[str, Any] | None:
    """What the holder of the lock wrote of itself."""
    try:
        data = as_dict(bounded.parse_json(os.pread(handle, 1000, 0), "the lock"), "the lock")
        return {"holder": as_str(data.get("holder"), "holder", 100), "pid": as_int(data.get("pid"), "pid", 0, NUMBERS)}
    except (OSError, BoundsError):
        return None


def _lock_pid(handle: int) -> int | None:
    """The process that holds an exclusive flock of a file, as the kernel reports it; None where it does not."""
    info = os.fstat(handle)
    wanted = f"{os.major(info.st_dev):02x}:{os.minor(info.st_dev):02x}:{info.st_ino}"
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in bounded.read_file("/proc/locks", bounded.MIB).decode("ascii").splitlines():
            words = line.split()  # 1: FLOCK ADVISORY WRITE 4711 00:1a:4242 0 EOF
            if words[1] == "FLOCK" and words[3] == "WRITE" and words[5] == wanted:
                return int(words[4]) if int(words[4]) > 0 else None  # of another PID namespace: -1 or 0
    return None


def _process(pid: int | None) -> str:
    """The name of a process; "" where it is not known."""
    with contextlib.suppress(OSError, ValueError):
        return Path(f"/proc/{pid}/comm").read_text("utf-8").strip() if pid else ""
    return ""


def _is_switch(holder: dict[str, Any] | None) -> bool:
    return holder is not None and holder["holder"] == HELD_BY_SWITCH


def _brief(journal: dict[str, Any] | None) -> dict[str, Any] | None:
    if journal is None:
        return None
    brief = {key: value for key, value in journal.items() if key != "verifications"}
    for key in ("error", "restore_error"):
        if brief.get(key):
            brief[key] = {name: value for name, value in brief[key].items() if name not in ("log", "checks")}
    return brief
