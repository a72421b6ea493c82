"""The GPU's sensors: what nvidia-smi and the kernel's log say, and programs that hang."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sparkfleet_host import metrics, sensors

LINE = "41, 4.52, 208, 97, 0x0000000000000021\n"


def values(text: str) -> dict[str, float]:
    return {name + labels: value for name, labels, value in metrics.samples(text)}


def test_a_gpu_in_prometheus_units() -> None:
    found = values(sensors.metrics(sensors.gpus(LINE), {}))
    assert found["sparkfleet_gpu_up"] == 1 and found['sparkfleet_gpu_temperature_celsius{gpu="0"}'] == 41
    assert found['sparkfleet_gpu_sm_clock_hertz{gpu="0"}'] == 208e6
    assert found['sparkfleet_gpu_utilization_ratio{gpu="0"}'] == pytest.approx(0.97)
    # 0x1 is idleness, which is no slowing down.
    slowed = {name for name, value in found.items() if "throttled" in name and value}
    assert slowed == {'sparkfleet_gpu_throttled{gpu="0",reason="sw-thermal-slowdown"}'}


def test_what_is_no_figure_is_left_out() -> None:
    found = values(sensors.metrics(sensors.gpus("[N/A], [Not Supported], 208, , \nrubbish\n1, 2\n"), None))
    assert {name.partition("{")[0] for name in found} == {
        *("sparkfleet_gpu_up", "sparkfleet_gpu_sm_clock_hertz", "sparkfleet_gpu_log_read")
    }
    assert found["sparkfleet_gpu_log_read"] == 0


@pytest.mark.parametrize("rows", [None, []])
def test_a_lost_gpu_is_said(rows: list[list[str]] | None) -> None:
    assert values(sensors.metrics(rows, {}))["sparkfleet_gpu_up"] == 0


def test_xids_of_the_kernel_log_with_their_last_time() -> None:
    log = (
        "1764394300.5 spark-1 kernel: NVRM: Xid (PCI:000f:01:00): 31, pid=4242, name=VLLM, Ch 00000002\n"
        "1764394000.123456 spark-1 kernel: NVRM: Xid (PCI:000f:01:00): 31, pid=1, name=x\n"
        "1764394200.0 spark-1 kernel: NVRM: Xid (0000:01:00): 79, GPU has fallen off the bus.\n"
        "1764394200.0 spark-1 kernel: NVRM: loading\n-- No entries --\n"
    )
    assert sensors.xids(log) == {"31": 1764394300.5, "79": 1764394200.0}
    many = "".join(f"1764394300.5 h kernel: NVRM: Xid (PCI:1): {number}, x\n" for number in range(1000))
    assert len(sensors.xids(many)) == sensors.MOST_XIDS


def test_a_program_that_hangs_is_left_behind_and_not_started_again(tmp_path: Path) -> None:
    sleeping = [sys.executable, "-c", "import time; time.sleep(60)"]
    program = sensors.Program(sleeping)
    began = time.monotonic()
    assert program.output(1.0) is None and time.monotonic() - began < 5
    assert program._running is not None and program._running.wait(10) == -signal.SIGKILL
    # As if SIGKILL could not end it, which it cannot in a driver that waits for a lost GPU.
    marks = tmp_path / "marks"
    program = sensors.Program(["touch", str(marks)])
    program._running = subprocess.Popen(sleeping)
    try:
        assert program.output(1.0) is None and not marks.exists()
    finally:
        program._running.kill()
        program._running.wait(10)
    assert program.output() == "" and marks.exists()


def test_output_is_bounded_and_a_missing_program_is_none() -> None:
    big = sensors.Program([sys.executable, "-c", f"print('x' * {2 * sensors.LIMIT})"])
    assert len(big.output() or "") == sensors.LIMIT
    assert sensors.Program(["/nowhere/nvidia-smi"]).output() is None
    assert sensors.Program([sys.executable, "-c", "raise SystemExit(6)"]).output() is None


def test_once_writes_a_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("nvidia-smi", LINE), ("journalctl", "")):
        (folder / name).write_text(f"#!/bin/sh\nprintf '{text.encode('unicode_escape').decode()}'\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    assert sensors.main(["--folder", str(tmp_path), "--once"]) == 0
    assert values((tmp_path / sensors.FILE).read_text())["sparkfleet_gpu_up"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", sensors.FILE]


# -- certificates ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Key and certificate of a server, valid for 20 days."""
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    argv = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "20", "-subj", "/CN=gateway"]
    made = subprocess.run([*argv, "-keyout", "-"], capture_output=True, check=True)
    path.write_bytes(made.stdout)
    return path


def test_the_end_of_the_certificate_that_is_served(pem: Path, tmp_path: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_server(("127.0.0.1", 0)) as silent:
        port = listener.getsockname()[1]

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    link, _ = listener.accept()
                    with contextlib.suppress(OSError), context.wrap_socket(link, server_side=True):
                        pass

        threading.Thread(target=serve, daemon=True).start()
        closed = silent.getsockname()[1]
        silent.close()
        argv = ["--folder", str(tmp_path), "--once", "--no-gpu", "--tls", str(port), "--tls", str(closed)]
        assert sensors.main(argv) == 0
    found = values((tmp_path / sensors.CERTIFICATES).read_text(encoding="utf-8"))
    ((name, end),) = found.items()
    assert name == f'sparkfleet_certificate_expires_seconds{{port="{port}"}}'
    assert end == pytest.approx(time.time() + 20 * 86400, abs=3600) and not (tmp_path / sensors.FILE).exists()


@pytest.mark.parametrize("days", [1, 10_000, 20_000])
def test_times_of_both_forms(days: int) -> None:
    """From 2050 on a certificate has four digits of the year."""
    argv = ["openssl", "req", "-x509", "-newkey", "ed25519", "-nodes", "-days", str(days), "-subj", "/CN=x"]
    der = subprocess.run([*argv, "-keyout", "/dev/null", "-outform", "DER"], capture_output=True, check=True).stdout
    assert sensors.ends(der) == pytest.approx(time.time() + days * 86400, abs=3600)


@given(st.binary(max_size=400))
def test_what_is_no_certificate(der: bytes) -> None:
    with contextlib.suppress(ValueError):
        sensors.ends(der)
    with contextlib.suppress(ValueError):
        sensors.ends(b"\x30\x82\x01\x00\x30\x81\xf0" + der)
