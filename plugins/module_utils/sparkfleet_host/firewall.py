# SPDX-License-Identifier: Apache-2.0
"""The firewall as it is on this host: its file, its unit, and the table that the kernel has."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .memory import unit_state
from .network import resolve

RULES = Path("/etc/sparkfleet/firewall.nft")
UNIT = Path("/etc/systemd/system/sparkfleet-firewall.service")
LARGEST = 1 << 20
_PORTS = re.compile(r"tcp dport \{ ([0-9]+(?:, [0-9]+)*) \}")
_MARK = re.compile(r'comment "([0-9a-f]{64})"')


def state(sources: Sequence[str]) -> dict[str, Any]:
    """Whether nft is there, the text of our rules and unit, whether the unit runs now and at boot, the mark of the
    table that is loaded ("" for none), and what each of `sources` stands for here."""
    unit = _text(UNIT)
    known = unit_state(UNIT.name) if unit else {}
    return {
        "installed": shutil.which("nft", path="/usr/sbin:/sbin:/usr/bin:/bin") is not None,
        "rules": _text(RULES),
        "unit": unit,
        "active": known.get("ActiveState") == "active",
        "enabled": known.get("UnitFileState") == "enabled",
        "loaded": _loaded() if unit else "",
        "sources": {name: resolve(name) for name in dict.fromkeys(sources)},
    }


def closed() -> list[int]:
    """Ports of engines and guard that are open to named sources alone; none unless the table that the kernel has is
    that of our file, as it was written."""
    rules = _text(RULES)
    text = rules.rpartition(' comment "')[0]
    found = _PORTS.search(text)
    if not found or _loaded() != hashlib.sha256(text.encode()).hexdigest():
        return []
    return [int(port) for port in found[1].split(", ")]


def _text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(LARGEST)
    except (OSError, ValueError):
        return ""


def _loaded() -> str:
    argv = ["/usr/sbin/nft", "list", "table", "inet", "sparkfleet"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, ValueError, subprocess.SubprocessError):
        return ""
    found = _MARK.search(done.stdout[:LARGEST])
    return found[1] if found else ""
