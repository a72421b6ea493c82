# SPDX-License-Identifier: Apache-2.0
"""Data from outside, read within limits: what a Hub, a registry, an engine, Docker, another host or a state file says
is bounded in size and depth, and what is out of bounds ends as one typed error.

A parser here never raises anything but `BoundsError` (a ValueError) for the data, and OSError for the file.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import math
import os
import re
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

Result = TypeVar("Result")

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
LATEST = 1e11  # Unix time, and seconds, beyond which a clock is wrong
DEPTH = 64  # of nested arrays and objects
NUMBER = 400  # characters of a number
STATE_FILE = 4 * MIB
SET_ASIDE = 3  # damaged copies of a file that are kept


class BoundsError(ValueError):
    """Data from outside is too large, too deep or not of the form it must have; the message names what and why."""


# -- JSON ------------------------------------------------------------------------------------------------------------


def parse_json(
    data: bytes | str,
    what: str,
    limit: int = 16 * MIB,
    depth: int = DEPTH,
    quote: bool = True,
    constants: bool = False,
) -> Any:
    """Decode JSON (RFC 8259: no NaN, no Infinity, no number beyond a float). `what` names the data in the error, which
    shows its beginning too unless `quote` is false: a file may be another one than its name says. With `constants`,
    NaN and Infinity are read as null: Python writes them (`time_step_limit` in config.json of Mamba models). Raises
    BoundsError."""
    if len(data) > limit:
        raise BoundsError(f"{what}: more than {limit} bytes")
    try:
        constant = _null if constants else _constant
        value = json.loads(data, parse_constant=constant, parse_float=_float, parse_int=_int)
        _check_depth(value, depth)
        return value
    except RecursionError:
        raise BoundsError(f"{what}: nested more than {depth} deep") from None
    except UnicodeDecodeError:
        raise BoundsError(f"{what}: not UTF-8") from None
    except ValueError as error:
        shown = data if isinstance(data, str) else data[:200].decode("utf-8", "replace")
        quoted = f": {printable(shown, 80)!r}" if quote else ""
        raise BoundsError(f"{what}: {_reason(error)}{quoted}") from None


def _reason(error: ValueError) -> str:
    return f"not JSON ({error.msg})" if isinstance(error, json.JSONDecodeError) else str(error)


def _null(_: str) -> None:
    return None


def _constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def _float(text: str) -> float:
    value = float(text) if len(text) <= NUMBER else math.inf
    if not math.isfinite(value):
        raise ValueError("a number is out of range")
    return value


def _int(text: str) -> int:
    if len(text) > NUMBER:
        raise ValueError("a number is out of range")
    return int(text)


def _check_depth(value: Any, depth: int) -> None:
    level, seen = [value], 0
    while level:
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, dict | list)
        ]
        seen += 1
        if seen > depth:
            raise ValueError(f"nested more than {depth} deep")


def as_dict(value: Any, what: str) -> dict[str, Any]:
    """`value`, which must be an object of JSON. Raises BoundsError."""
    if not isinstance(value, dict):
        raise BoundsError(f"{what}: not an object: {_shown(value)}")
    return value


def as_list(value: Any, what: str, most: int = 100_000) -> list[Any]:
    """`value`, which must be an array of at most `most` items. Raises BoundsError."""
    if not isinstance(value, list):
        raise BoundsError(f"{what}: not an array: {_shown(value)}")
    if len(value) > most:
        raise BoundsError(f"{what}: more than {most} items")
    return value


def as_str(value: Any, what: str, limit: int = 64 * KIB) -> str:
    """`value`, which must be a string of at most `limit` characters. Raises BoundsError."""
    if not isinstance(value, str):
        raise BoundsError(f"{what}: not a string: {_shown(value)}")
    if len(value) > limit:
        raise BoundsError(f"{what}: more than {limit} characters")
    return value


def as_int(value: Any, what: str, least: int = 0, most: int = 1 << 62) -> int:
    """`value`, which must be a whole number from `least` to `most`. Raises BoundsError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise BoundsError(f"{what}: not an integer: {_shown(value)}")
    if not least <= value <= most:
        raise BoundsError(f"{what}: {_shown(value)} is not between {least} and {most}")
    return value


def as_number(value: Any, what: str, least: float = 0.0, most: float = 1e300) -> float:
    """`value`, which must be a finite number from `least` to `most`. Raises BoundsError."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BoundsError(f"{what}: not a number: {_shown(value)}")
    if not least <= value <= most:  # false for NaN as well
        raise BoundsError(f"{what}: {_shown(value)} is not between {least:g} and {most:g}")
    return float(value)


def as_time(value: Any, what: str) -> float:
    """`value`, which must be a Unix time, or seconds, of a clock that can be right. Raises BoundsError."""
    return as_number(value, what, 0.0, LATEST)


def _shown(value: Any) -> str:
    try:
        return printable(repr(value), 80)
    except (ValueError, RecursionError):  # thousands of digits, or of arrays in each other
        return f"({type(value).__name__})"


# -- bytes -----------------------------------------------------------------------------------------------------------


def read_file(path: str | Path, limit: int = STATE_FILE, follow: bool = True) -> bytes:
    """The content of a regular file. `follow=False` refuses a symbolic link as the last part of the path. Raises
    BoundsError for a larger file or one that is not regular, OSError."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    handle = os.open(path, flags)
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise BoundsError(f"{path}: not a regular file")
        data = file.read(limit + 1)
    if len(data) > limit:
        raise BoundsError(f"{path}: more than {limit} bytes")
    return data


def checksum(path: str | Path) -> str:
    """SHA-256 of a regular file of at most STATE_FILE bytes; "" for one that is missing or cannot be read."""
    try:
        return hashlib.sha256(read_file(path)).hexdigest()
    except (OSError, BoundsError):
        return ""


def open_beneath(folder: str | Path, name: str, flags: int = os.O_RDONLY, mode: int = 0o644, make: bool = False) -> int:
    """A descriptor of `name` below `folder`; no part of `name` is followed where it is a symbolic link. `make` makes
    the folders in between (0755). Raises BoundsError for a name that leaves the folder, a link and what is not a
    regular file, and OSError."""
    names = name.split("/")
    if name.startswith("/") or any(part in ("", ".", "..") or "\0" in part for part in names):
        raise BoundsError(f"{_shown(name)} is not below {folder}")
    at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in names[:-1]:
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, 0o755, dir_fd=at)
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
            os.close(at)
            at = below
        handle = os.open(names[-1], flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode, dir_fd=at)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise BoundsError(
                f"{folder}/{printable(name, 200)}: a part of it is a symbolic link or not a folder"
            ) from None
        raise
    finally:
        os.close(at)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise BoundsError(f"{folder}/{printable(name, 200)}: not a regular file")
    return handle


def open_below(root: str | Path, *names: str) -> BinaryIO:
    """The same as a file opened for reading."""
    return os.fdopen(open_beneath(root, "/".join(names)), "rb")


def read_json(path: str | Path, limit: int = STATE_FILE, follow: bool = True) -> dict[str, Any]:
    """The JSON object in a file. Raises BoundsError, OSError."""
    return as_dict(parse_json(read_file(path, limit, follow), str(path), limit, quote=False), str(path))


def read_all(
    read: Callable[[int], bytes], what: str, limit: int, deadline: float | None = None, chunk: int = 64 * KIB
) -> bytes:
    """Everything that `read(size)` returns until b"". `deadline` is monotonic. Raises BoundsError for more than
    `limit` bytes, TimeoutError, and what `read` raises."""
    parts: list[bytes] = []
    size = 0
    while True:
        if deadline is not None and time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not read completely in time")
        part = read(min(chunk, limit + 1 - size))
        if not part:
            return b"".join(parts)
        parts.append(part)
        size += len(part)
        if size > limit:
            raise BoundsError(f"{what}: more than {limit} bytes")


def limited_lines(parts: Iterable[bytes], what: str, line_limit: int, limit: int) -> Iterable[bytes]:
    """Lines, with their ends, of a stream of bytes; a longer line than `line_limit` bytes is cut there. Raises
    BoundsError for more than `limit` bytes in all."""
    rest, size, cut = b"", 0, False
    for part in parts:
        size += len(part)
        if size > limit:
            raise BoundsError(f"{what}: more than {limit} bytes")
        *whole, rest = (rest + part).split(b"\n")
        for line in whole:
            if not cut:
                yield line[:line_limit] + b"\n"
            cut = False
        if len(rest) > line_limit:
            if not cut:
                yield rest[:line_limit] + b"\n"
            rest, cut = b"", True
    if rest and not cut:
        yield rest


def fitting(items: Iterable[str], most: int, limit: int) -> list[str]:
    """The first of `items` that are to be written: at most `most` of them, and at most `limit` bytes in JSON."""
    kept: list[str] = []
    for item in items:
        limit -= len(json.dumps(item, ensure_ascii=False).encode("utf-8", "backslashreplace"))
        if limit < 0 or len(kept) == most:
            break
        kept.append(item)
    return kept


# -- time ------------------------------------------------------------------------------------------------------------


def in_time(work: Callable[[], Result], seconds: float) -> Result:
    """The result of `work`, whatever it waits for: a name server, one address after the other, an answer without end.
    Work that lasts longer is left alone, in a thread that does not keep the process. Raises TimeoutError, and what the
    work raises."""
    given: list[Result] = []
    failed: list[BaseException] = []

    def attempt() -> None:
        try:
            given.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not given:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return given[0]


# -- names -----------------------------------------------------------------------------------------------------------

#: What may be between a name from outside and a path, a URL or a command line. Used with fullmatch (`$` matches before
#: a newline).
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
SHA256 = re.compile(r"[0-9a-f]{64}")
COMMIT = re.compile(r"[0-9a-f]{40}")
REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
REVISION = re.compile(r"[A-Za-z0-9_][\w./+-]{0,199}", re.ASCII)
HOST = re.compile(
    r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]{0,62}[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]{0,62}[A-Za-z0-9_])?)*\.?"
)
_PART = re.compile(r"[A-Za-z0-9_][\w .+=@,~^:%!()\[\]-]{0,254}", re.ASCII)


def is_relative_path(name: Any, parts: int = 16) -> bool:
    """Whether `name` is a path that stays where it is put: relative, at most `parts` names, none of them `..`, `.`,
    hidden or with control characters, a backslash or a slash at either end."""
    if not isinstance(name, str) or len(name) > 1024:
        return False
    names = name.split("/")
    return len(names) <= parts and all(_PART.fullmatch(part) for part in names)


def is_repository_path(name: Any, parts: int = 16) -> bool:
    """Whether `name` can be a file of a Git repository that is put into a folder: relative, at most `parts` names, none
    of them `.`, `..` or `.git`, longer than 255 bytes, or with a backslash or a control character. Other than with
    `is_relative_path`, hidden names (`.gitattributes`) and letters of any language pass."""
    if not isinstance(name, str) or len(name) > 1024:
        return False
    names = name.split("/")
    return len(names) <= parts and all(_is_repository_name(part) for part in names)


def _is_repository_name(part: str) -> bool:
    return (
        0 < len(part.encode("utf-8", "replace")) <= 255
        and part == part.strip()
        and part.lower() not in (".", "..", ".git")
        and "\\" not in part
        and not _CONTROL.search(part)
        and not any("\ud800" <= letter <= "\udfff" for letter in part)
    )


def matched(pattern: re.Pattern[str], value: Any, what: str) -> str:
    """`value`, which must match as a whole. Raises BoundsError."""
    if not isinstance(value, str) or len(value) > 4096 or not pattern.fullmatch(value):
        raise BoundsError(f"{what}: {_shown(value)} is not valid")
    return value


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def printable(text: str, limit: int = 4000) -> str:
    """`text` for a terminal, a log or a message: control characters (escape sequences among them) and marks that
    change the direction of text are replaced, and what is longer than `limit` characters is cut."""
    shown = text if len(text) <= limit else f"{text[: limit - 1]}…"
    return _CONTROL.sub(lambda found: " " if found[0] in "\t\n\r" else "\ufffd", shown)


# -- state files -----------------------------------------------------------------------------------------------------


def set_aside(path: Path, now: float | None = None) -> Path | None:
    """Rename a damaged file (or folder) to NAME.damaged-UNIXTIME next to it, so that a new one can be started and
    nothing is lost; the newest SET_ASIDE of them are kept. The new path, or None where it could not be renamed."""
    stamp = int(time.time() if now is None else now)
    while (target := path.with_name(f"{path.name}.damaged-{stamp}")).exists():
        stamp += 1  # another one within this second
    try:
        path.replace(target)
    except OSError:
        return None
    for old in sorted(path.parent.glob(f"{glob.escape(path.name)}.damaged-*"))[:-SET_ASIDE]:
        with contextlib.suppress(OSError):
            if old.is_dir() and not old.is_symlink():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.unlink()
    return target
