# SPDX-License-Identifier: Apache-2.0
"""Memory of a host, with swap and earlyoom."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def memory_state() -> dict[str, Any]:
    """Sizes in bytes; a part that cannot be read is empty."""
    found = {key: int(kib) * 1024 for key, kib in re.findall(r"^(\w+):\s+(\d+) kB$", _text("/proc/meminfo"), re.M)}
    said = re.search(r'^EARLYOOM_ARGS="(.*)"$', _text("/etc/default/earlyoom"), re.M)
    units = {}
    for question in ("is-active", "is-enabled"):
        try:
            done = subprocess.run(["systemctl", "--quiet", question, "earlyoom.service"], check=False, timeout=10)
            units[question] = done.returncode == 0
        except (OSError, subprocess.SubprocessError):
            units[question] = False
    return {
        "total": found.get("MemTotal", 0),
        "available": found.get("MemAvailable", 0),
        "swap_total": found.get("SwapTotal", 0),
        "swap_free": found.get("SwapFree", 0),
        "swap": [
            {"path": line.split()[0], "size": int(line.split()[2]) * 1024}
            for line in _text("/proc/swaps").splitlines()[1:]
        ],
        "swap_in_fstab": [
            line.split()[0]
            for line in _text("/etc/fstab").splitlines()
            if len(line.split()) > 2 and line.split()[2] == "swap" and not line.startswith("#")
        ],
        "earlyoom": {
            "installed": Path("/usr/bin/earlyoom").exists(),
            "active": units["is-active"],
            "enabled": units["is-enabled"],
            "arguments": said[1] if said else "",
        },
    }
