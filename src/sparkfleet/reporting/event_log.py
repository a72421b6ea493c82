"""What happened in a run, kept as JSON lines on the controller."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from sparkfleet_host import redaction

from sparkfleet import SparkfleetError, operator_name
from sparkfleet.documents import yaml_text

#: Verbs that change hosts.
MUTATING = frozenset(
    (
        *("deploy", "switch", "upgrade", "rollout", "rollback", "start", "stop", "restart", "remove", "bundle"),
        *("trial", "tune", "rotate"),
    )
)
FOLDER = "events"
_SECRET_NAME = re.compile(r"token|key|passw|secret", re.IGNORECASE)
#: Shortest value to search for: shorter ones would match everywhere.
SHORTEST = 4


class EventLog:
    """Writes an object a line, each with `at` (Unix time, s). `path` is None where nothing is kept."""

    def __init__(self, file: TextIO | None = None, path: Path | None = None, secrets: Sequence[str] = ()) -> None:
        self.file, self.path, self.secrets = file, path, tuple(secrets)
        self.problem = ""  # why the log ended before the run

    def __call__(self, item: dict[str, Any]) -> None:
        """Write one event, without anything that looks like a secret. A log that can no longer be written ends; the
        run does not."""
        if self.file is None or self.problem:
            return
        text = json.dumps({"at": round(time.time(), 2), **self.redacted(item)}, ensure_ascii=False, default=str)
        try:
            self.file.write(text + "\n")
            self.file.flush()
        except OSError as error:
            self.problem = (
                f"the event log {self.path} ends early: {error.strerror or error}; the run continued without it"
            )

    def end(self, code: int, seconds: float, hosts: Mapping[str, str], **more: Any) -> None:
        """Write the last line, which `sparkfleet history` reads: it is short however many hosts there are. `hosts`:
        their results by name."""
        results = [{"name": name, "result": result} for name, result in hosts.items()]
        self({"event": "end", "exit_code": code, "seconds": round(seconds, 1), "hosts": results, **more})

    def close(self) -> None:
        """Close the file. What could not be written is tried once more by that, and is given up."""
        if self.file is not None:
            with contextlib.suppress(OSError):
                self.file.close()

    def redacted(self, data: Any) -> Any:
        """The same data without secrets."""
        return redaction.redacted(data, *self.secrets)


@contextlib.contextmanager
def keep(root: Path, verb: str, check: bool, extra: Sequence[str], **about: Any) -> Iterator[EventLog]:
    """The log of a run: `root`/events/TIME-VERB.jsonl, 0600, for a verb that changes something.

    `extra` are the variables given as `-e`: their names are written down, never their values. `about` becomes part
    of the first line. Raises SparkfleetError where the file cannot be made.
    """
    if verb not in MUTATING or check:
        yield EventLog()
        return
    folder = root / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path, descriptor = _made(folder, time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()), verb)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise SparkfleetError(f"event log in {folder}: {error.strerror}; make it writable") from None
        log = EventLog()
        log.problem = f"no event log in {folder}: {error.strerror}; the run continued without it"
        yield log
        return
    log = EventLog(os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace"), path, _secrets(extra))
    try:
        names = sorted(str(name) for words in extra for name in _pairs(words))
        log({"event": "begin", "verb": verb, **about, "variables": names, "controller": operator_name.name()})
        yield log
    finally:
        log.close()


def _made(folder: Path, moment: str, verb: str) -> tuple[Path, int]:
    for number in range(1, 100):
        path = folder / f"{moment}-{verb}{f'-{number}' if number > 1 else ''}.jsonl"
        with contextlib.suppress(FileExistsError):
            return path, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    raise OSError(None, "100 runs began in this second")


def _secrets(extra: Sequence[str]) -> list[str]:
    """Values that are written nowhere: the token of the environment, and all that is in variables that are called like
    a secret, the longest first."""
    found = {os.environ.get("HF_TOKEN", "")}
    for words in extra:
        found.update(_below(_pairs(words), False))
    return sorted((value for value in found if len(value) >= SHORTEST), key=lambda value: (-len(value), value))


def _below(value: Any, secret: bool) -> Iterator[str]:
    """The texts in a value that are secret, at any depth: `secret` says whether a name above it says so."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _below(item, secret or bool(_SECRET_NAME.search(str(name))))
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _below(item, secret)
    elif secret and value is not None and not isinstance(value, bool):
        yield str(value)
        # A list is often given as `name=["a","b"]`, which Ansible evaluates.
        inner = _yaml(value) if isinstance(value, str) and value.lstrip()[:1] in ("[", "{") else None
        if isinstance(inner, dict | list):
            yield from _below(inner, secret)


def _pairs(words: str) -> dict[Any, Any]:
    """Variables of one `-e`: `a=1 b=2`, or YAML in braces; of a file (@FILE) only its name is known."""
    if words.startswith("@"):
        return {words: ""}
    if words.lstrip()[:1] in ("{", "["):
        data = _yaml(words)
        return data if isinstance(data, dict) else {}
    parts = words.split()
    with contextlib.suppress(ValueError):  # a quote that is not closed
        parts = [*shlex.split(words), *parts]
    return dict(word.partition("=")[::2] for word in reversed(parts) if "=" in word)


def _yaml(text: str) -> Any:
    try:
        return yaml_text.load(text)
    except SparkfleetError:
        return None
