"""What happened in a run, kept as JSON lines on the controller."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from sparkfleet_host import redaction

from sparkfleet import SparkfleetError, controller

#: Verbs that change hosts.
MUTATING = frozenset(
    ("deploy", "switch", "upgrade", "rollout", "rollback", "start", "stop", "restart", "remove", "bundle"),
)
FOLDER = Path(".sparkfleet") / "events"
_SECRET_NAME = re.compile(r"token|key|passw|secret", re.IGNORECASE)


class EventLog:
    """Writes an object a line, each with `at` (Unix time, s). `path` is None where nothing is kept."""

    def __init__(self, file: TextIO | None = None, path: Path | None = None, secrets: Sequence[str] = ()) -> None:
        self.file, self.path, self.secrets = file, path, tuple(secrets)

    def __call__(self, item: dict[str, Any]) -> None:
        """Write one event, without what looks like a secret."""
        if self.file is not None:
            text = json.dumps({"at": round(time.time(), 2), **self.redacted(item)}, ensure_ascii=False, default=str)
            self.file.write(text + "\n")
            self.file.flush()

    def redacted(self, data: Any) -> Any:
        """The same data without secrets."""
        return redaction.redacted(data, *self.secrets)


@contextlib.contextmanager
def keep(root: Path, verb: str, check: bool, extra: Sequence[str], **about: Any) -> Iterator[EventLog]:
    """The log of a run: `root`/.sparkfleet/events/TIME-VERB.jsonl, 0600, for a verb that changes something.

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
        raise SparkfleetError(f"event log in {folder}: {error.strerror}; make it writable for you") from None
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        log = EventLog(file, path, _secrets(extra))
        names = sorted(name for words in extra for name in _pairs(words))
        log({"event": "begin", "verb": verb, **about, "variables": names, "controller": controller.name()})
        yield log


def _made(folder: Path, moment: str, verb: str) -> tuple[Path, int]:
    for number in range(1, 100):
        path = folder / f"{moment}-{verb}{f'-{number}' if number > 1 else ''}.jsonl"
        with contextlib.suppress(FileExistsError):
            return path, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    raise OSError(None, "100 runs began in this second")


def _secrets(extra: Sequence[str]) -> list[str]:
    """Values that are written nowhere: the token of the environment, and variables that are called like a secret."""
    found = [os.environ.get("HF_TOKEN", "")]
    for words in extra:
        for name, value in _pairs(words).items():
            if _SECRET_NAME.search(name):
                found += _texts(value)
    return found


def _texts(value: Any) -> list[str]:
    """Every value in a variable that may be a list or an object, as text."""
    if isinstance(value, dict | list):
        items = value.values() if isinstance(value, dict) else value
        return [text for item in items for text in _texts(item)]
    return [str(value)]


def _pairs(words: str) -> dict[str, Any]:
    """Variables of one `-e`: `a=1 b=2` or JSON; of a file (@FILE) only its name is known."""
    if words.startswith("@"):
        return {words: ""}
    if words.lstrip().startswith("{"):
        with contextlib.suppress(ValueError):
            data = json.loads(words)
            return data if isinstance(data, dict) else {}
        return {}
    return dict(word.partition("=")[::2] for word in words.split() if "=" in word)
