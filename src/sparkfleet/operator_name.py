"""Who calls."""

from __future__ import annotations

import getpass
import socket


def name() -> str:
    """The operator as shown to other operators: USER@HOST."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
