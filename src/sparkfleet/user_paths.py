"""Paths as people write them: on the command line, in an inventory, in ssh's settings."""

from __future__ import annotations

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
