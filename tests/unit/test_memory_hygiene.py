"""Swap in the table of file systems, and what is read of memory, swap and earlyoom."""

from __future__ import annotations

from pathlib import Path

import pytest
from plugins.module_utils import sparkfleet_memory
from plugins.modules import swap

FSTAB = """# /etc/fstab
UUID=1 / ext4 defaults 0 1
/swap.img\tnone\tswap\tsw\t0\t0
#/old none swap sw 0 0
UUID=2 /swap ext4 defaults 0 2
"""


def test_lines_of_type_swap_are_commented_out_once() -> None:
    changed = swap.without_swap(FSTAB)
    assert changed == FSTAB.replace("/swap.img", "# swap off: /swap.img")
    assert swap.without_swap(changed) == changed
    assert swap.without_swap("") == ""


def test_state_of_a_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/meminfo": "MemTotal:  2048 kB\nMemAvailable: 1024 kB\nSwapTotal: 512 kB\nSwapFree: 256 kB\n",
        "/proc/swaps": "Filename Type Size Used Priority\n/swap.img file 512 256 -2\n",
        "/etc/fstab": FSTAB,
        "/etc/default/earlyoom": '# EARLYOOM_ARGS="-m 5"\nEARLYOOM_ARGS="-M 1 --prefer \'x$\'"\n',
    }
    monkeypatch.setattr(sparkfleet_memory, "_text", lambda path: files.get(path, ""))
    monkeypatch.setenv("PATH", str(tmp_path))
    found = sparkfleet_memory.memory_state()
    assert (found["total"], found["available"]) == (2 << 20, 1 << 20)
    assert (found["swap_total"], found["swap_free"]) == (512 << 10, 256 << 10)
    assert found["swap"] == [{"path": "/swap.img", "size": 512 << 10}]
    assert found["swap_in_fstab"] == ["/swap.img"]
    assert found["earlyoom"]["arguments"] == "-M 1 --prefer 'x$'"
    assert found["earlyoom"]["active"] is found["earlyoom"]["enabled"] is False


def test_a_host_without_any_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparkfleet_memory, "_text", lambda path: "")
    found = sparkfleet_memory.memory_state()
    assert found["total"] == 0 and found["swap"] == [] and found["earlyoom"]["arguments"] == ""
