# SPDX-License-Identifier: Apache-2.0
"""The engine's key changes with a switch, not before it: gateway, guard and engine agree whatever becomes of it.

    /etc/sparkfleet/engine_key            what engine, guard and verification read
    /etc/sparkfleet/engine_key.next       staged by a deployment, for the switch that it begins
    /etc/sparkfleet/engine_key.previous   there while a switch with a new key is under way; empty where there was no key

Each step may be cut and done again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from . import http
from .bounded import read_file
from .releases import sync_folder, write_text


def paths() -> tuple[Path, Path, Path]:
    """The key, the staged one, the previous one."""
    key = Path(http.KEY_FILE)
    return key, key.with_name(f"{key.name}.next"), key.with_name(f"{key.name}.previous")


def name(key: str) -> str:
    """A name of a key that says nothing of it."""
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def current() -> str:
    """`name` of the engine's key; "" for none."""
    try:
        return name(read_file(http.KEY_FILE, 4096).decode("ascii").strip())
    except (OSError, ValueError):
        return ""


def is_staged() -> bool:
    """Whether a key waits for its switch."""
    return paths()[1].exists()


def take() -> None:
    """Make the staged key the engine's, keeping the one before; nothing where none is staged. Raises OSError."""
    key, staged, previous = paths()
    if not staged.exists():
        return
    if not previous.exists():
        if key.exists():
            os.link(key, previous)
        else:
            write_text(previous, "", 0o600)
    staged.replace(key)
    sync_folder(key.parent)


def keep() -> None:
    """The switch is over and its key stays. Raises OSError."""
    _, _, previous = paths()
    if previous.exists():
        previous.unlink()
        sync_folder(previous.parent)


def give_back() -> None:
    """The switch failed: the key before it counts again, and the staged one is forgotten. Raises OSError."""
    key, staged, previous = paths()
    staged.unlink(missing_ok=True)
    if not previous.exists():
        return
    if previous.stat().st_size:
        previous.replace(key)
    else:
        key.unlink(missing_ok=True)
        previous.unlink()
    sync_folder(key.parent)


def forget_staged() -> None:
    """Remove a key that a run staged which never came to its switch."""
    with contextlib.suppress(OSError):
        paths()[1].unlink(missing_ok=True)
