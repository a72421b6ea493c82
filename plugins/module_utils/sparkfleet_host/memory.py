# SPDX-License-Identifier: Apache-2.0
"""Memory of a host, its swap, and earlyoom, read without waiting; what is not there reads as empty."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

SYSTEMCTL_SECONDS = 5


def memory_state() -> dict[str, Any]:
    """total, available, swap_total, swap_free: bytes; swap: [{path, size}]; swap_in_fstab: [source];
    earlyoom: {installed, active, enabled, arguments}."""
    found = {key: int(kib) * 1024 for key, kib in re.findall(r"^(\w+):\s+(\d+) kB$", _text("/proc/meminfo"), re.M)}
    installed = Path("/usr/bin/earlyoom").exists()
    unit = unit_state("earlyoom.service") if installed else {}
    return {
        "total": found.get("MemTotal", 0),
        "available": found.get("MemAvailable", 0),
        "swap_total": found.get("SwapTotal", 0),
        "swap_free": found.get("SwapFree", 0),
        "swap": swaps(_text("/proc/swaps")),
        "swap_in_fstab": swap_in_fstab(_text("/etc/fstab")),
        "earlyoom": {
            "installed": installed,
            "active": unit.get("ActiveState") == "active",
            "enabled": unit.get("UnitFileState") == "enabled",
            "arguments": earlyoom_arguments(_text("/etc/default/earlyoom")),
        },
    }


def swaps(text: str) -> list[dict[str, Any]]:
    """Devices and files of /proc/swaps, sizes in bytes."""
    rows = [line.split() for line in text.splitlines()[1:]]
    return [{"path": _unescaped(row[0]), "size": int(row[2]) * 1024} for row in rows if len(row) > 2]


def swap_in_fstab(text: str) -> list[str]:
    """Sources of the lines of type swap."""
    rows = [line.split() for line in text.splitlines()]
    return [_unescaped(row[0]) for row in rows if len(row) > 2 and row[2] == "swap" and not row[0].startswith("#")]


def earlyoom_arguments(text: str) -> str:
    """EARLYOOM_ARGS of a file of settings; the last one counts, as for systemd."""
    value = ""
    for line in text.splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            continue
        if len(words) == 1 and words[0].startswith("EARLYOOM_ARGS="):
            value = words[0].partition("=")[2]
    return value


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _unescaped(name: str) -> str:
    """A name of /proc/swaps or fstab: blanks are written as octal numbers there."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), name)


def unit_state(name: str) -> dict[str, str]:
    """State of a unit of systemd."""
    try:
        done = subprocess.run(
            ["systemctl", "show", "--property=ActiveState,UnitFileState", name],
            capture_output=True,
            text=True,
            check=False,
            timeout=SYSTEMCTL_SECONDS,
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(line.partition("=")[::2] for line in done.stdout.splitlines())


def drop_page_cache() -> int:
    """Drop clean pages, as root; the growth of MemFree in bytes. Raises OSError.

    Only before an engine starts: while one measures memory it would fail by it, and afterwards the host pays.
    """
    before = _free()
    os.sync()  # only clean pages can be dropped
    Path("/proc/sys/vm/drop_caches").write_text("3\n", encoding="ascii")
    return max(_free() - before, 0)


def _free() -> int:
    found = re.search(r"^MemFree:\s+(\d+) kB$", _text("/proc/meminfo"), re.M)
    return int(found[1]) * 1024 if found else 0
