"""Faults of a simulated Spark: the table, the scripts, what the stand-ins make of them; no Docker."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from simulator import __main__ as verbs
from simulator import faults
from simulator.faults import FAULTS
from simulator.shell import SimulatorError
from simulator.world import MEMINFO, World

from tests.unit import ROOT

ROOTFS = ROOT / "simulator" / "rootfs"


class Host:
    """A container that notes what runs in it, and answers as told."""

    def __init__(self) -> None:
        self.scripts: list[str] = []
        self.answer = SimpleNamespace(exit_code=0, output=b"")

    def exec_run(self, command: list[str]) -> SimpleNamespace:
        assert command[:2] == ["sh", "-euc"]
        self.scripts.append(command[2])
        return self.answer


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """spark-1 of the world demo."""
    monkeypatch.setenv("SPARKFLEET_SIM_HOME", str(tmp_path / "home"))
    World("demo")._save({"world": "demo", "engine": "none", "sparks": {"spark-1": {"ssh": 1, "http": 2}}})
    made = Host()
    monkeypatch.setattr(World, "container", lambda self, name: made)
    return made


def sh(script: str, **replaced: Path) -> str:
    """Run a script with paths of a host replaced by paths here (``_`` for ``/``)."""
    for name, path in replaced.items():
        script = script.replace(name.replace("_", "/"), str(path))
    done = subprocess.run(["sh", "-euc", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- the table ----------------------------------------------------------------------------------------------------


def test_the_faults() -> None:
    assert list(FAULTS) == [
        *("gpu", "gpu-lost", "xid", "hot", "driver", "os", "machine", "memory", "disk", "port", "compose", "toolkit"),
        *("clock", "registry", "hub", "dns"),
    ]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_complete(name: str) -> None:
    fault = FAULTS[name]
    assert re.fullmatch(r"[a-z][a-z0-9-]*", name) and fault.what
    for script in (fault.break_, fault.fix):
        assert script.strip()
        assert subprocess.run(["sh", "-n", "-c", script], check=False).returncode == 0
    assert fault.break_ != fault.fix


@pytest.mark.parametrize("name", FAULTS)
def test_what_a_fault_leaves_does_not_survive_a_reboot(name: str) -> None:
    """Written are files in /run, and /etc/hosts, which Docker rewrites; the rest are mounts and units."""
    written = re.findall(r">{1,2}\s*(/[^\s;]+)", re.sub(r"'[^']*'", "", FAULTS[name].break_))
    assert all(path.startswith(("/run/", "/etc/hosts")) for path in written), written


def test_the_readme_has_every_fault() -> None:
    rows = re.findall(r"^\| `([a-z0-9-]+)` \|", (ROOT / "simulator/README.md").read_text(encoding="utf-8"), re.M)
    assert [row for row in rows if row in FAULTS] == list(FAULTS)


def test_the_scenario_breaks_and_finds_everything_of_the_preflight() -> None:
    play = yaml.safe_load((ROOT / "molecule/shared/break.yml").read_text(encoding="utf-8"))[0]
    words = play["tasks"][0]["ansible.builtin.command"]["argv"]
    assert set(words) & set(FAULTS) == set(FAULTS) - {
        "hub",
        "dns",
        "gpu-lost",
        "xid",
        "hot",
    }  # the Hub has to answer 403, a GPU to be another
    assert words[words.index("break") + 2] == "spark-1"
    found = yaml.safe_load((ROOT / "molecule/shared/findings.yml").read_text(encoding="utf-8"))[0]["vars"]["findings"]
    # One a fault, and what image and token add.
    assert len(set(found)) == 11 + 2 and all(re.fullmatch(r"\[[a-z-]+\]", item) for item in found)


# -- scripts ------------------------------------------------------------------------------------------------------


def test_names_lead_nowhere_and_back(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    original = "127.0.0.1\tlocalhost\n172.18.0.2\tspark-1\n"
    hosts.write_text(original)
    registry, hub = FAULTS["registry"], FAULTS["hub"]
    for fault in (registry, hub, registry):
        sh(fault.break_, _etc_hosts=hosts)
    lines = hosts.read_text().removeprefix(original).splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["127.0.0.1", "nvcr.io"],
        ["127.0.0.1", "registry-1.docker.io"],
        ["127.0.0.1", "huggingface.co"],
    ]
    sh(registry.fix, _etc_hosts=hosts)
    assert hosts.read_text() == original + lines[2] + "\n"
    for fault in (hub, hub, registry):
        sh(fault.fix, _etc_hosts=hosts)
    assert hosts.read_text() == original


def test_a_cover_is_laid_once_and_lifted_when_it_is_there(tmp_path: Path) -> None:
    for name in ("mount", "umount"):
        tool = tmp_path / name
        tool.write_text(f'#!/bin/sh\necho {name} "$@" >>{tmp_path}/calls\n')
        tool.chmod(0o755)
    run, below = tmp_path / "run", tmp_path / "os-release"
    run.mkdir()
    below.write_text("ID=debian\n")
    below.chmod(0o640)
    fault = FAULTS["os"]

    def both(script: str) -> list[str]:
        (tmp_path / "calls").write_text("")
        sh(f"PATH={tmp_path}:$PATH\n{script}", _usr_lib_os=tmp_path / "os", _run_simulator=run)
        return (tmp_path / "calls").read_text().splitlines()

    assert both(fault.fix) == []
    assert both(fault.break_) == [f"mount --bind {run}/os-release {below}"]
    assert "ID=fedora\n" in (run / "os-release").read_text() and "VERSION_ID=42\n" in (run / "os-release").read_text()
    assert (run / "os-release").stat().st_mode & 0o777 == 0o640
    below.write_text((run / "os-release").read_text())  # as a mount would show it
    assert both(fault.break_) == []
    assert both(fault.fix) == [f"umount --lazy {below}"] and not (run / "os-release").exists()


def test_memory_is_held(tmp_path: Path) -> None:
    before = tmp_path / "meminfo"
    before.write_text(MEMINFO)
    make = re.search(r"^sed .*/etc/simulator/meminfo", FAULTS["memory"].break_, re.M)
    assert make
    known = dict(re.findall(r"^(\w+): +(\d+) kB$", sh(make[0], _etc_simulator=tmp_path), re.M))
    assert known == {**known, "MemTotal": "125513728", "MemAvailable": str(30 * 2**20), "MemFree": str(30 * 2**20)}
    assert len(known) == MEMINFO.count("\n")


def test_ssh_is_restarted_with_its_sessions() -> None:
    fault = FAULTS["machine"]
    assert "KillMode=control-group" in fault.break_
    assert fault.break_.index("setarch linux32 true") < fault.break_.index("systemctl restart ssh.service")
    # Sessions end only while the setting that ends them is still there.
    assert fault.fix.index("systemctl stop") < fault.fix.index("rm /run") < fault.fix.index("systemctl start")
    assert "Personality=$personality" in fault.break_


def test_sudo_reads_the_clock(tmp_path: Path) -> None:
    assert f"env_file={faults.FOLDER}/clock.env" in (ROOT / "simulator/Dockerfile").read_text(encoding="utf-8")
    library = tmp_path / "x86_64-linux-gnu/faketime/libfaketimeMT.so.1"
    library.parent.mkdir(parents=True)
    library.touch()
    run = tmp_path / "run"
    run.mkdir()
    sh(FAULTS["clock"].break_, _usr_lib=tmp_path, _run_simulator=run)
    lines = (run / "clock.env").read_text().splitlines()
    assert lines[:2] == [f"LD_PRELOAD={library}", "FAKETIME=-3d"]
    assert "FAKETIME_DONT_FAKE_MONOTONIC=1" in lines and "NO_FAKE_STAT=1" in lines
    sh(FAULTS["clock"].fix, _run_simulator=run)
    assert list(run.iterdir()) == []


def test_what_listens_serves_nothing_and_is_not_root() -> None:
    words = FAULTS["port"].break_
    assert "http.server 8000 --directory /mnt" in words and "--uid=nobody" in words


def test_an_old_compose(tmp_path: Path) -> None:
    plugin = tmp_path / "docker-compose"
    plugin.write_text(faults.OLD_COMPOSE)

    def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["sh", plugin, *arguments], capture_output=True, text=True, check=False)

    assert ask("compose", "version", "--short").stdout == "2.10.2\n"
    assert yaml.safe_load(ask("docker-cli-plugin-metadata").stdout)["Version"] == "v2.10.2"
    assert ask("compose", "up", "-d").returncode == 1


# -- stand-ins ----------------------------------------------------------------------------------------------------


def stand_in(file: str, run: Path, *arguments: str) -> str:
    text = (ROOTFS / file).read_text(encoding="utf-8").replace(faults.FOLDER, str(run))
    command = [sys.executable, "-c", text, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_nvidia_smi_tells_of_another_gpu_and_driver(tmp_path: Path) -> None:
    (tmp_path / "gpu.d").mkdir()

    def query() -> str:
        fields = "--query-gpu=name,driver_version,compute_cap"
        return stand_in("spark/usr/bin/nvidia-smi", tmp_path, fields, "--format=csv,noheader")

    sh(FAULTS["gpu"].break_, _run_simulator=tmp_path)
    assert query() == "NVIDIA A100-PCIE-40GB, 580.142, 8.0"
    sh(FAULTS["driver"].break_, _run_simulator=tmp_path)
    assert query() == "NVIDIA A100-PCIE-40GB, 535.183.01, 8.0"
    sh(FAULTS["gpu"].fix, _run_simulator=tmp_path)
    assert query() == "NVIDIA GB10, 535.183.01, 12.1"
    sh(FAULTS["driver"].fix, _run_simulator=tmp_path)
    assert query() == "NVIDIA GB10, 580.142, 12.1"


def test_nvidia_ctk_tells_of_another_version(tmp_path: Path) -> None:
    sh(FAULTS["toolkit"].break_, _run_simulator=tmp_path)
    ctk = "toolkit/usr/bin/nvidia-ctk"
    assert stand_in(ctk, tmp_path, "--version") == "NVIDIA Container Toolkit CLI version 1.10.0"
    sh(FAULTS["toolkit"].fix, _run_simulator=tmp_path)
    assert stand_in(ctk, tmp_path, "--version") == "NVIDIA Container Toolkit CLI version 1.19.0"


# -- verbs --------------------------------------------------------------------------------------------------------


def test_break_and_mend(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    assert verbs.main(["break", "spark-1", "gpu", "clock"]) == 0
    assert [script.partition("\n")[2] for script in host.scripts] == [FAULTS["gpu"].break_, FAULTS["clock"].break_]
    assert all(script.startswith("mkdir -p /run/simulator/gpu.d\n") for script in host.scripts)
    assert "spark-1: nvidia-smi reports an A100" in capsys.readouterr().out

    host.scripts.clear()
    assert verbs.main(["fix", "spark-1", "clock"]) == 0
    assert [script.partition("\n")[2] for script in host.scripts] == [FAULTS["clock"].fix]

    host.scripts.clear()
    assert verbs.main(["fix", "spark-1"]) == 0
    assert [script.partition("\n")[2] for script in host.scripts] == [fault.fix for fault in FAULTS.values()]


@pytest.mark.parametrize("verb", ["break", "fix"])
def test_an_unknown_fault_changes_nothing(verb: str, host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    assert verbs.main([verb, "spark-1", "gpu", "flood", "fire"]) == 1
    message = capsys.readouterr().err
    assert message == f"simulator: unknown fault flood, fire: there are {', '.join(FAULTS)}\n"
    assert host.scripts == []


def test_break_wants_a_fault(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        verbs.main(["break", "spark-1"])
    assert raised.value.code == 2 and "fault" in capsys.readouterr().err


def test_a_fault_that_fails_says_why(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    host.answer = SimpleNamespace(exit_code=1, output=b"port 8000 is held already\n")
    assert verbs.main(["break", "spark-1", "port", "gpu"]) == 1
    assert capsys.readouterr().err == "simulator: spark-1: fault port: port 8000 is held already\n"
    assert len(host.scripts) == 1
    host.answer = SimpleNamespace(exit_code=4, output=b"")
    with pytest.raises(SimulatorError, match="spark-1: fault gpu: exit code 4"):
        faults.break_(World("demo"), "spark-1", ["gpu"])


def test_the_internet_has_no_faults(host: Host) -> None:
    quiet: Any = lambda text: None  # noqa: E731
    with pytest.raises(SimulatorError, match="internet is not a Spark and has no faults: there are spark-1"):
        faults.fix(World("demo", quiet), "internet", [])
    assert host.scripts == []
