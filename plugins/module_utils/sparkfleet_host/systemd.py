# SPDX-License-Identifier: Apache-2.0
"""What systemd knows of a unit."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

SECONDS = 10.0


def service_environment(unit: str) -> dict[str, str]:
    """The environment that the main process of a unit was started with; none if it does not run. Read from the process,
    since a unit's files may be newer than it."""
    argv = ["systemctl", "show", "--property=MainPID", "--value", unit]
    pairs: list[str] = []
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        done = subprocess.run(argv, capture_output=True, text=True, timeout=SECONDS, check=True)
        if (pid := int(done.stdout.strip() or 0)) > 0:
            pairs = Path(f"/proc/{pid}/environ").read_bytes().decode("utf-8", "replace").split("\0")
    return dict(pair.partition("=")[::2] for pair in pairs if "=" in pair)
