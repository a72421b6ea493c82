"""A secret of the inventory: text (of a vault too), or where to get it: `{file: PATH}`, `{env: NAME}`,
`{command: [pass, show, NAME]}`. It is got on the controller; messages name variable and source, never the value."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparkfleet_host.bounded import BoundsError, printable, read_file

from sparkfleet import SparkfleetError

SOURCES = ("file", "env", "command")
#: Of a file, and of what a command prints.
BYTES = 64 << 10
#: A password manager may ask its owner.
COMMAND_SECONDS = 60.0
_WORDS = "a mapping with one of file (a path), env (a name) or command (a list of words)"


def text(name: str, value: Any) -> Any:
    """The secret behind a value of the inventory: the value itself unless it names a source. Of a file or a command
    the first line counts, as with pass. Raises SparkfleetError."""
    if not isinstance(value, Mapping):
        return value
    kind, given = _source(name, value)
    if kind == "env":
        found = os.environ.get(given, "")
        if not found.strip():
            raise SparkfleetError(f"{name}: the environment variable {given} is not set or empty")
        return found.strip()
    found = _of_file(name, given) if kind == "file" else _remembered(name, given)
    line = next(iter(found.strip().splitlines()), "").strip()
    if not line:
        raise SparkfleetError(f"{name}: {_shown(kind, given)} is empty")
    return line


def each(name: str, values: Any, key: str = "key") -> Any:
    """A list of secrets, or of mappings that have one as their `key`, with each of them got."""
    if not isinstance(values, list | tuple):
        return values
    found = []
    for place, item in enumerate(values, 1):
        at = f"{name}: entry {place}"
        inner = isinstance(item, Mapping) and key in item
        found.append({**item, key: text(at, item[key])} if inner else text(at, item))
    return found


def _source(name: str, value: Mapping[Any, Any]) -> tuple[str, Any]:
    """Kind and place of a source. Raises SparkfleetError."""
    if len(value) != 1 or (kind := str(next(iter(value)))) not in SOURCES:
        raise SparkfleetError(f"{name}: must be text, or {_WORDS}; it has the keys {_keys(value)}")
    given = value[kind]
    if kind == "command":
        right = isinstance(given, list | tuple) and 0 < len(given) <= 100
        if not right or not all(isinstance(word, str) and word and "\0" not in word for word in given):
            raise SparkfleetError(f"{name}: command must be a list of words, such as [pass, show, sparkfleet/key]")
        return kind, [str(word) for word in given]
    if not isinstance(given, str) or not given or "\0" in given:
        raise SparkfleetError(f"{name}: {kind} must be text")
    if kind == "file" and not given.startswith(("/", "~")):
        raise SparkfleetError(f"{name}: file must be an absolute path or start with ~, not {printable(given, 80)}")
    if kind == "env" and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,199}", given):
        raise SparkfleetError(f"{name}: env must be the name of an environment variable")
    return kind, str(given)


def _keys(value: Mapping[Any, Any]) -> str:
    # What stands in the place of a key may be the secret.
    return ", ".join(str(key) if str(key) in SOURCES else "another" for key in list(value)[:5]) or "none"


def _shown(kind: str, given: Any) -> str:
    return f"what the command {printable(given[0], 60)} prints" if kind == "command" else printable(given, 200)


def _of_file(name: str, given: str) -> str:
    try:
        return read_file(Path(given).expanduser(), BYTES).decode("utf-8")
    except (OSError, RuntimeError, BoundsError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        if isinstance(error, BoundsError):
            reason = f"more than {BYTES >> 10} KiB, or not a regular file"
        raise SparkfleetError(f"{name}: cannot read {printable(given, 200)}: {reason}") from None


# -- commands --------------------------------------------------------------------------------------------------------


class _Memory:
    """What commands have printed, for this process and those forked from it later; nowhere but in memory. Without it
    a password manager would be asked once for each task and host."""

    def __init__(self) -> None:
        make = getattr(os, "memfd_create", None)  # Linux
        self._descriptor: int = make("sparkfleet-secrets") if make else -1

    @contextlib.contextmanager
    def known(self) -> Iterator[dict[str, list[str]]]:
        """The contents, kept for the time of the block from other processes, and written back."""
        if self._descriptor < 0:
            yield {}
            return
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX)
        try:
            data = os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)
            contents: dict[str, list[str]] = json.loads(data) if data else {}
            before = len(contents)
            yield contents
            if len(contents) != before:
                data = json.dumps(contents).encode()
                os.ftruncate(self._descriptor, 0)
                os.pwrite(self._descriptor, data, 0)
        finally:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN)


_MEMORY = _Memory()


def forget() -> None:
    """Ask commands again."""
    global _MEMORY  # noqa: PLW0603 - one a process
    _MEMORY = _Memory()


def _remembered(name: str, words: list[str]) -> str:
    key = hashlib.sha256(json.dumps(words).encode()).hexdigest()
    with _MEMORY.known() as contents:
        if key not in contents:
            contents[key] = list(_printed(words))
        found, problem = contents[key]
    if problem:
        raise SparkfleetError(f"{name}: the command {printable(words[0], 60)} {problem}")
    return found


def _printed(words: list[str]) -> tuple[str, str]:
    """What a command prints, or what is wrong with it. It gets no input: its own window or agent may ask."""
    end = time.monotonic() + COMMAND_SECONDS
    null = subprocess.DEVNULL
    try:
        process = subprocess.Popen(words, stdin=null, stdout=subprocess.PIPE, stderr=null, start_new_session=True)
    except OSError as error:
        return "", f"cannot be started: {error.strerror}"
    with process:
        assert process.stdout is not None
        data = b""
        try:
            while len(data) <= BYTES:
                if not select.select([process.stdout], [], [], max(end - time.monotonic(), 0))[0]:
                    raise TimeoutError
                part = os.read(process.stdout.fileno(), BYTES)
                if not part:
                    break
                data += part
            else:
                return "", f"prints more than {BYTES >> 10} KiB"
            code = process.wait(max(end - time.monotonic(), 0))
        except (TimeoutError, subprocess.TimeoutExpired):
            return "", f"did not end within {COMMAND_SECONDS:.0f} s"
        finally:
            with contextlib.suppress(OSError):  # its children too
                os.killpg(process.pid, signal.SIGKILL)
    if code:
        return "", f"ended with {code}; run it by hand to see why"
    try:
        return data.decode("utf-8"), ""
    except UnicodeError:
        return "", "prints what is not text"
