"""The module that measures the way between Sparks, with stand-ins of the programs it runs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import fabric
from plugins.modules import spark_fabric

from tests.unit.fakes.clock import set_time
from tests.unit.host.test_fabric import wired

OWN, PEER = "192.168.100.11", "192.168.100.10"
IPERF = json.dumps({"end": {"sum_received": {"bits_per_second": 96_234_000_000.0}}})
#: As perftest prints where its partner does not listen yet.
REFUSED = "echo 'unable to connect to 192.168.100.10:18515' >&2; exit 1"


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs, the only ones there are; each writes down how it was called."""
    set_time(monkeypatch, spark_fabric, sleep=lambda seconds: time.sleep(seconds / 20))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(fabric, "collect", lambda: wired((0,), {"enp1s0f0np0": f"{OWN}/24"}))
    (tmp_path / "bin").mkdir()
    program(tmp_path, "ping", "exit 0")
    return tmp_path


def program(folder: Path, name: str, script: str) -> None:
    path = folder / "bin" / name
    path.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >>{folder}/{name}.calls\n{script}\n', encoding="utf-8")
    path.chmod(0o755)


def calls(folder: Path, name: str) -> list[str]:
    path = folder / f"{name}.calls"
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def run(capsys: pytest.CaptureFixture[str], **arguments: Any) -> dict[str, Any]:
    with patch_module_args({"address": OWN, **arguments}), pytest.raises(SystemExit):
        spark_fabric.main()
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_both_ways_are_measured(programs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program(programs, "iperf3", f"echo '{IPERF}'")
    program(programs, "ib_write_bw", "echo ' 97.53'")
    found = run(capsys, peers=[PEER], bandwidth=True, seconds=2)
    assert found["reached"] == {PEER: ""} and found["problems"] == []
    assert (found["gbit_s"], found["rdma_gbit_s"]) == ({PEER: 96.23}, {PEER: 97.53})
    # 8,972 bytes, IPv4 and ICMP make 9,000.
    assert calls(programs, "ping") == [f"-n -q -c 3 -i 0.2 -W 2 -M do -s 8972 -I {OWN} {PEER}"]
    assert calls(programs, "iperf3") == [f"--client {PEER} --bind {OWN} --port 5201 --time 2 --parallel 4 --json"]
    device = "--ib-dev rocep1s0f0 --gid-index 3 --port 18515"
    way = f"{device} --CPU-freq --duration 2 --report_gbits --output bandwidth"
    assert calls(programs, "ib_write_bw") == [f"{way} {PEER}"]


@pytest.mark.parametrize(
    ("script", "times"),
    [(REFUSED, 3), ("echo", 3), ("echo 97.53 of what", 3), ("echo nan", 3)],
    ids=["refused", "empty", "no-number", "nan"],
)
def test_what_cannot_be_measured_is_left_out(
    programs: Path, capsys: pytest.CaptureFixture[str], script: str, times: int
) -> None:
    program(programs, "ib_write_bw", script)
    found = run(capsys, peers=[PEER], bandwidth=True, seconds=1)
    assert (found["gbit_s"], found["rdma_gbit_s"]) == ({}, {}) and found["reached"] == {PEER: ""}
    assert len(calls(programs, "ib_write_bw")) == times


def test_a_side_that_listens_a_moment_later_is_waited_for(programs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program(
        programs, "ib_write_bw", f'[ "$(wc -l <{programs}/ib_write_bw.calls)" -gt 1 ] || {{ {REFUSED}; }}; echo 92.4'
    )
    (programs / "bin" / "wc").symlink_to("/usr/bin/wc")
    assert run(capsys, peers=[PEER], bandwidth=True)["rdma_gbit_s"] == {PEER: 92.4}


def test_nothing_is_measured_unasked_or_where_nobody_answers(
    programs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("iperf3", "ib_write_bw"):
        program(programs, name, "echo 1")
    run(capsys, peers=[PEER])
    program(programs, "ping", "echo '3 packets transmitted, 0 received, 100% packet loss'; exit 1")
    found = run(capsys, peers=[PEER], bandwidth=True)
    assert found["reached"] == {
        PEER: f"{PEER} does not answer packets of 9000 bytes: 3 packets transmitted, 0 received, 100% packet loss"
    }
    assert calls(programs, "iperf3") == calls(programs, "ib_write_bw") == []


@pytest.mark.parametrize("there", [[], ["iperf3"], ["ib_write_bw", "iperf3"]])
def test_a_host_listens_with_what_it_has(programs: Path, capsys: pytest.CaptureFixture[str], there: list[str]) -> None:
    """Again and again, until the time is over."""
    for name in there:
        program(programs, name, "exit 0")
    assert run(capsys, serve=1, seconds=4)["served"] == there
    device = "--ib-dev rocep1s0f0 --gid-index 3 --port 18515"
    wanted = {
        "iperf3": f"--server --bind {OWN} --port 5201",
        "ib_write_bw": f"{device} --CPU-freq --duration 4 --report_gbits --output bandwidth",
    }
    for name in there:
        assert len(calls(programs, name)) > 1 and {*calls(programs, name)} == {wanted[name]}


def test_a_host_without_an_address_there_serves_nothing_by_rdma(
    programs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fabric, "collect", lambda: wired((0,), {"enp1s0f0np0": "192.168.100.77/24"}))
    program(programs, "ib_write_bw", "exit 0")
    assert run(capsys, serve=1)["served"] == []
