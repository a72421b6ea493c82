"""Swap and earlyoom: what is read of a host, what the module swap does, the role's default arguments; and when the
simulated engine compiles."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import stat
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import swap
import yaml
from ansible.module_utils.testing import patch_module_args
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import memory

from tests.unit import ROOT

GIB = 1024**3
FSTAB = """# /etc/fstab
UUID=1 / ext4 defaults 0 1
/swap.img\tnone\tswap\tsw\t0\t0
  /with\\040blank none swap sw 0 0
#/old none swap sw 0 0
UUID=2 /swap ext4 defaults 0 2
UUID=3 /x swapfs defaults 0 2
"""
Run = Callable[..., dict[str, Any]]


def test_state_of_a_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/meminfo": "MemTotal:  2048 kB\nMemAvailable: 1024 kB\nSwapTotal: 512 kB\nSwapFree: 256 kB\n",
        "/proc/swaps": "Filename Type Size Used Priority\n/swap.img file 512 256 -2\n/a\\040b file 8 0 -3\n",
        "/etc/fstab": FSTAB,
        "/etc/default/earlyoom": "EARLYOOM_ARGS=-r\n",
    }
    monkeypatch.setattr(memory, "_text", lambda path: files.get(path, ""))
    found = memory.memory_state()
    assert (found["total"], found["available"]) == (2 << 20, 1 << 20)
    assert (found["swap_total"], found["swap_free"]) == (512 << 10, 256 << 10)
    assert found["swap"] == [{"path": "/swap.img", "size": 512 << 10}, {"path": "/a b", "size": 8 << 10}]
    assert found["swap_in_fstab"] == ["/swap.img", "/with blank"]
    assert found["earlyoom"]["arguments"] == "-r"


def test_a_host_without_any_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_text", lambda path: "")
    monkeypatch.setenv("PATH", str(tmp_path))  # no systemctl
    assert memory.unit_state("earlyoom.service") == {}
    found = memory.memory_state()
    assert found["total"] == 0 and found["swap"] == [] and found["swap_in_fstab"] == []
    assert not found["earlyoom"]["active"] and found["earlyoom"]["arguments"] == ""


def test_state_of_a_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    systemctl = tmp_path / "systemctl"
    systemctl.write_text("#!/bin/sh\necho ActiveState=active\necho UnitFileState=enabled\n", encoding="utf-8")
    systemctl.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert memory.unit_state("x") == {"ActiveState": "active", "UnitFileState": "enabled"}


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("", ""),
        ('# EARLYOOM_ARGS="-m 5"\n', ""),
        ('EARLYOOM_ARGS="-m 5"\n# a comment\'s end\nEARLYOOM_ARGS="-M 1 --prefer \'x$\'"\n', "-M 1 --prefer 'x$'"),
        ("EARLYOOM_ARGS='-r 1'\n", "-r 1"),
        ('EARLYOOM_ARGS="--prefer \\"a\\\\b\\""\n', '--prefer "a\\b"'),
        ('EARLYOOM_ARGS="open\n', ""),
    ],
)
def test_arguments_of_earlyoom(text: str, arguments: str) -> None:
    assert memory.earlyoom_arguments(text) == arguments


def test_template_writes_what_is_read_back() -> None:
    from ansible.template import Templar, trust_as_template  # noqa: PLC0415

    template = (ROOT / "roles/memory/templates/earlyoom.j2").read_text(encoding="utf-8")
    for arguments in (default_arguments(), "--prefer \"^x\" --avoid 'a b'", "--prefer a\\.b"):
        values = {"ansible_managed": "x", "sparkfleet_earlyoom_arguments": arguments}
        text = Templar(variables=values).template(trust_as_template(template), escape_backslashes=False)
        assert memory.earlyoom_arguments(text) == arguments


def default_arguments() -> str:
    defaults = yaml.safe_load((ROOT / "roles/sparkfleet/defaults/main.yml").read_text(encoding="utf-8"))
    arguments: str = defaults["sparkfleet_earlyoom_arguments"]
    return arguments


def test_engine_is_preferred_and_the_way_in_avoided() -> None:
    words = shlex.split(default_arguments())
    options = dict(zip(words[::2], words[1::2], strict=True))
    # earlyoom compares what /proc/PID/comm has: 15 characters.
    for name in ("VLLM::EngineCor", "VLLM::Worker_TP", "vllm"):
        assert re.search(options["--prefer"], name) and not re.search(options["--avoid"], name)
    for name in ("sshd", "sshd-session", "systemd", "systemd-journal", "dockerd", "containerd", "containerd-shim"):
        assert re.search(options["--avoid"], name) and not re.search(options["--prefer"], name)
    assert not re.search(options["--avoid"], "python3")
    # Of one figure, earlyoom would kill only while half of the swap is used.
    assert options["-s"] == "100,100"
    term, kill = map(int, options["-M"].split(","))
    assert kill < term < 4 * GIB // 1024


def test_lines_of_type_swap_are_commented_out_once() -> None:
    changed = swap.without_swap(FSTAB)
    assert changed == FSTAB.replace("/swap.img", f"{swap.MARK}/swap.img").replace("  /with", f"{swap.MARK}  /with")
    assert swap.without_swap(changed) == changed
    assert swap.without_swap("") == ""


def test_swap_that_fstab_does_not_explain() -> None:
    assert swap.unexplained(["/swap.img"], ["/swap.img"]) == []
    assert swap.unexplained(["/dev/nvme0n1p3", "/dev/zram0"], ["UUID=1"]) == ["/dev/zram0"]
    assert swap.unexplained(["/dev/nvme0n1p3"], []) == ["/dev/nvme0n1p3"]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the module on a host with one swap file; what swapoff was called with is in `swapoff`."""
    table = tmp_path / "fstab"
    table.write_text(FSTAB, encoding="utf-8")
    table.chmod(0o640)
    command = tmp_path / "bin" / "swapoff"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/swapoff\ntest ! -e {tmp_path}/broken\n', encoding="utf-8")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")

    def run(check: bool = False, used: float = 1, available: float = 100, devices: bool = True) -> dict[str, Any]:
        state = {
            "available": int(available * GIB),
            "swap_total": 16 * GIB,
            "swap_free": int((16 - used) * GIB),
            "swap": [{"path": "/swap.img", "size": 16 * GIB}] if devices else [],
        }
        monkeypatch.setattr(swap, "memory_state", lambda: state)
        arguments = {"state": "disabled", "fstab": str(table), "_ansible_check_mode": check}
        with patch_module_args(arguments), pytest.raises(SystemExit):
            swap.main()
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        return result

    return run


def test_swap_off(tmp_path: Path, run: Run) -> None:
    preview = run(check=True)
    assert preview["changed"] and swap.MARK in preview["diff"]["after"]
    assert not (tmp_path / "swapoff").exists() and (tmp_path / "fstab").read_text(encoding="utf-8") == FSTAB
    done = run()
    assert done["changed"] and done["devices"] == ["/swap.img"]
    assert (tmp_path / "swapoff").read_text(encoding="utf-8") == "/swap.img\n"
    assert (tmp_path / "fstab").read_text(encoding="utf-8") == preview["diff"]["after"]
    assert stat.S_IMODE((tmp_path / "fstab").stat().st_mode) == 0o640
    assert not run(devices=False)["changed"]


def test_swap_that_does_not_fit_into_memory_is_left(tmp_path: Path, run: Run) -> None:
    for check in (True, False):
        refused = run(check=check, used=10, available=13.9)
        assert refused["failed"] and "10.0 GiB" in refused["msg"] and "13.9 GiB" in refused["msg"]
    assert not (tmp_path / "swapoff").exists() and (tmp_path / "fstab").read_text(encoding="utf-8") == FSTAB
    assert not run(used=10, available=14.1).get("failed")


def test_swapoff_that_fails_leaves_fstab(tmp_path: Path, run: Run) -> None:
    (tmp_path / "broken").touch()
    failed = run()
    assert failed["failed"] and "swapoff /swap.img" in failed["msg"]
    assert (tmp_path / "fstab").read_text(encoding="utf-8") == FSTAB


def test_swap_that_comes_back_is_named(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[str] = []
    monkeypatch.setattr(swap.AnsibleModule, "warn", lambda _, text: printed.append(text))
    assert run()["changed"] and not printed
    (tmp_path / "fstab").write_text("", encoding="utf-8")
    assert run()["changed"] and "/swap.img" in printed[0]


@pytest.mark.parametrize(
    ("words", "eager"),
    [
        (["serve", "m", "--max-model-len", "1"], True),
        (["serve", "m", "--compilation-config", '{"mode": 3}'], False),
        (["serve", "m", "-O3"], False),
        (["serve", "m", "--optimization-level=1"], False),
        (["--help"], False),
    ],
)
def test_simulated_engine_compiles_only_when_asked(
    words: list[str], eager: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = runpy.run_path(str(ROOT / "simulator/engine/vllm"))
    engine = types.ModuleType("vllm.entrypoints.cli.main")
    engine.main = lambda: 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.entrypoints.cli.main", engine)
    for parent in ("vllm", "vllm.entrypoints", "vllm.entrypoints.cli"):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setattr(sys, "argv", ["/opt/vllm/bin/vllm", *words])
    with pytest.raises(SystemExit):
        stand_in["main"]()
    assert sys.argv[1:] == words + ["--enforce-eager"] * eager
