"""Paths as people write them: on the command line, in an inventory, in ssh's settings."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from sparkfleet_host.bounded import printable

from sparkfleet import SparkfleetError


def expanded(what: str, text: str | Path) -> Path:
    """The path with `~` and `~USER` replaced; the file need not be there. Raises SparkfleetError, which begins with
    `what`, for what cannot be one: too long, with a NUL, `~USER` of an unknown user."""
    shown = f"{what} {printable(str(text), 200)!r}"
    try:
        path = Path(text).expanduser()
        path.exists()
        os.fsencode(path)
    except RuntimeError:
        user = printable(str(text).partition("/")[0], 80)
        raise SparkfleetError(f"{shown}: there is no home directory for {user}; use the full path") from None
    except (OSError, ValueError) as error:
        raise SparkfleetError(f"{shown}: {error}") from None
    return path


def output(what: str, text: str | Path, make: bool = False, folder: bool = False) -> Path:
    """`expanded` of a file that is to be written later (`folder`: of a folder to write into), so that a long run is not
    begun whose result has no place. `make`: the folders above it are made then. Raises SparkfleetError."""
    path = expanded(what, text)
    place = Path(os.path.realpath(path))  # of a link, what it names
    if place.exists():
        reason = _unfit(place, folder)
    else:
        above = place.parent
        while (make or folder) and not above.exists():
            above = above.parent
        reason = _unfit(above, True)
    if reason:
        raise SparkfleetError(f"{what} {printable(str(text), 300)}: {os.strerror(reason)}: choose another path")
    return path


def _unfit(place: Path, folder: bool) -> int:
    """Why nothing can be written there, 0 where it can."""
    if not place.exists():
        return errno.ENOENT
    if place.is_dir() != folder:
        return errno.ENOTDIR if folder else errno.EISDIR
    return 0 if os.access(place, os.W_OK | os.X_OK if folder else os.W_OK) else errno.EACCES
