"""What is asked once a run for all its hosts, kept in a file of a folder that lives as long as the run."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def ask(file: Path, key: str, question: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], bool]:
    """The answer to `question` under `key`, and whether it was asked just now; plain data of JSON. Other processes of
    the run wait meanwhile. Raises OSError, and what the question raises: that is not kept."""
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "r+b") as kept:
        fcntl.flock(kept, fcntl.LOCK_EX)
        text = kept.read()
        known: dict[str, dict[str, Any]] = json.loads(text) if text else {}
        if key in known:
            return known[key], False
        known[key] = question()
        kept.seek(0)
        kept.truncate()
        kept.write(json.dumps(known).encode())
        return known[key], True
