# SPDX-License-Identifier: Apache-2.0
"""Sensors of the GPU, the driver's errors and the gateway's certificate as Prometheus text, for the textfile collector
of node_exporter.

nvidia-smi reads the GPU; DCGM's memory fields are empty on a GB10 too, so nothing is lost by it. Xids are read from the
kernel's log. Whatever hangs is left behind, and never started twice: with a GPU that fell off the bus nvidia-smi may
not even die of SIGKILL. A certificate is the one that is served: whatever file it came from.
"""

from __future__ import annotations

import argparse
import calendar
import math
import os
import re
import ssl
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

FOLDER = "/run/sparkfleet-sensors"
FILE = "sparkfleet-gpu.prom"
CERTIFICATES = "sparkfleet-certificates.prom"
TLS_INTERVAL = 300.0  # seconds between two looks at a certificate
INTERVAL = 15.0  # seconds between two readings
LOG_INTERVAL = 60.0  # and between two looks at the kernel's log
TIMEOUT = 10.0  # for a program
LIMIT = 256 << 10  # bytes of a program's output
MOST_XIDS = 32  # numbers of Xids
FIELDS = ("temperature.gpu", "power.draw", "clocks.sm", "utilization.gpu", "clocks_event_reasons.active")
SMI = ("nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits")
#: Newest first, so that the limit cuts off the oldest.
LOG = (
    *("journalctl", "--dmesg", "--boot", "--grep=NVRM: Xid", "--case-sensitive=true", "--reverse", "--lines=500"),
    *("--output=short-unix", "--no-pager", "--quiet"),
)
#: Bits of clocks_event_reasons.active: why the GPU does not run at its highest clock. Others are no concern.
REASONS = {
    "sw-power-cap": 0x4,
    "hw-slowdown": 0x8,
    "sw-thermal-slowdown": 0x20,
    "hw-thermal-slowdown": 0x40,
    "hw-power-brake": 0x80,
}
_XID = re.compile(r"^(\d{1,12}(?:\.\d{1,9})?) .{0,200}?NVRM: Xid [^:]{0,40}(?::[^:\s]{1,40}){0,3}: (\d{1,4})\b")
_NUMBER = re.compile(r"\d{1,9}(?:\.\d{1,6})?")
#: Name below sparkfleet_gpu_, factor to its unit, help; in the order of FIELDS.
_GAUGES = (
    ("temperature_celsius", 1.0, "Temperature of the GPU."),
    ("power_watts", 1.0, "Power drawn by the GPU."),
    ("sm_clock_hertz", 1e6, "Clock of the streaming multiprocessors."),
    ("utilization_ratio", 0.01, "Share of the time in which a kernel ran."),
)


class Program:
    """A program that is run again and again, once at a time."""

    def __init__(self, command: Sequence[str]) -> None:
        self.command = list(command)
        self._running: subprocess.Popen[bytes] | None = None

    def output(self, timeout: float = TIMEOUT) -> str | None:
        """What it prints, LIMIT bytes at most; None where it failed, is not there, or hangs (now or since before)."""
        if self._running is not None and self._running.poll() is None:
            return None
        with tempfile.TemporaryFile() as out:
            try:
                process = self._running = subprocess.Popen(
                    self.command,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.DEVNULL,
                    env={**os.environ, "LC_ALL": "C"},
                )
            except OSError:
                return None
            try:
                status = process.wait(timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                return None
            out.seek(0)
            # 1: journalctl found nothing.
            return out.read(LIMIT).decode("utf-8", "replace") if status in (0, 1) else None


def gpus(text: str) -> list[list[str]]:
    """A row of FIELDS for each GPU, 16 at most."""
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()[:16]]
    return [row for row in rows if len(row) == len(FIELDS)]


def xids(text: str) -> dict[str, float]:
    """The last Unix time of each Xid in the kernel's log, as `journalctl --output=short-unix` prints it."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if (match := _XID.match(line[:1000])) and (match[2] in found or len(found) < MOST_XIDS):
            found[match[2]] = max(found.get(match[2], 0.0), float(match[1]))
    return found


def metrics(rows: Sequence[Sequence[str]] | None, seen: Mapping[str, float] | None) -> str:
    """The text of the file. `rows`: of `gpus`, None where nvidia-smi failed; `seen`: of `xids`, None likewise."""
    lines: list[str] = []

    def add(name: str, text: str, samples: Sequence[tuple[str, float]]) -> None:
        if samples:
            lines.append(f"# HELP sparkfleet_gpu_{name} {text}")
            lines.append(f"# TYPE sparkfleet_gpu_{name} gauge")
            lines.extend(f"sparkfleet_gpu_{name}{labels} {value:.15g}" for labels, value in samples)

    add("up", "Whether nvidia-smi reports a GPU.", [("", float(bool(rows)))])
    for column, (name, factor, text) in enumerate(_GAUGES):
        cells = [(f'{{gpu="{index}"}}', row[column]) for index, row in enumerate(rows or ())]
        add(name, text, [(at, value * factor) for at, cell in cells if (value := number(cell)) is not None])
    bits = [(index, _bits(row[len(_GAUGES)])) for index, row in enumerate(rows or ())]
    add(
        "throttled",
        "Whether the GPU is slowed down for this reason.",
        [
            (f'{{gpu="{index}",reason="{reason}"}}', float(bool(value & bit)))
            for index, value in bits
            if value is not None
            for reason, bit in REASONS.items()
        ],
    )
    add("log_read", "Whether the kernel's log was read.", [("", float(seen is not None))])
    times = [(f'{{xid="{number}"}}', value) for number, value in sorted((seen or {}).items())]
    add("xid_last_seconds", "Unix time of the last Xid of this number since the host started.", times)
    return "\n".join(lines) + "\n"


def number(text: str) -> float | None:
    """The figure of a cell; None for "[N/A]" and the like."""
    return float(text) if _NUMBER.fullmatch(text) else None


def slowed(text: str) -> list[str]:
    """Why the GPU is slowed down, of the last cell of a row."""
    bits = _bits(text) or 0
    return [reason for reason, bit in REASONS.items() if bits & bit]


def _bits(text: str) -> int | None:
    return int(text, 16) if re.fullmatch(r"0x[0-9a-fA-F]{1,16}", text) else None


# -- certificates ----------------------------------------------------------------------------------------------------


def ends(der: bytes) -> float:
    """The Unix time until which a certificate (X.509, DER) is valid. Raises ValueError for what is none."""
    try:
        _, at, _ = _element(der, 0)  # the certificate
        _, at, _ = _element(der, at)  # what is signed
        kind, _, after = _element(der, at)
        for _ in range(4 if kind == 0xA0 else 3):  # version where there is one, number, algorithm, issuer
            _, _, at = _element(der, at)
        _, at, _ = _element(der, at)  # validity
        _, _, at = _element(der, at)  # not before
        kind, at, after = _element(der, at)
        text = der[at:after].decode("ascii")
        if kind == 0x17:  # UTCTime has two digits of the year
            text = ("20" if int(text[:2]) < 50 else "19") + text
        return float(calendar.timegm(time.strptime(text, "%Y%m%d%H%M%SZ")))
    except (IndexError, UnicodeError) as error:
        raise ValueError(f"not a certificate: {error}") from None


def _element(der: bytes, at: int) -> tuple[int, int, int]:
    """Tag, begin and end of the content of the element that begins at `at`. Raises IndexError, ValueError."""
    kind, size, begin = der[at], der[at + 1], at + 2
    if size & 0x80:
        count = size & 0x7F
        if not 1 <= count <= 4:
            raise ValueError("not a certificate: a length that is none")
        size, begin = int.from_bytes(der[begin : begin + count], "big"), begin + count
    if begin + size > len(der):
        raise ValueError("not a certificate: it is cut")
    return kind, begin, begin + size


def certificates(ports: Sequence[int]) -> str:
    """The text of the second file: of each TLS port of this host, until when the certificate served there is valid;
    without those that serve none."""
    lines = [
        "# HELP sparkfleet_certificate_expires_seconds Unix time until which the certificate that is served is valid.",
        "# TYPE sparkfleet_certificate_expires_seconds gauge",
    ]
    for port in ports:
        try:
            pem = ssl.get_server_certificate(("127.0.0.1", port), timeout=TIMEOUT)
            end = ends(ssl.PEM_cert_to_DER_cert(pem))
        except (OSError, ValueError):
            continue
        lines.append(f'sparkfleet_certificate_expires_seconds{{port="{port}"}} {end:.0f}')
    return "\n".join(lines) + "\n"


def write(folder: Path, text: str, name: str = FILE) -> None:
    """Replace a file as a whole. Raises OSError."""
    new = folder / f"{name}.new"
    new.write_text(text, encoding="utf-8")
    new.replace(folder / name)


def main(argv: Sequence[str] | None = None) -> int:
    """`sensors [--folder FOLDER] [--tls PORT]... [--no-gpu] [--once]`: reads and writes until it is stopped."""
    parser = argparse.ArgumentParser(prog="sparkfleet_host sensors", description="Sensors of the GPU for Prometheus.")
    parser.add_argument("--folder", type=Path, default=Path(FOLDER))
    parser.add_argument("--tls", type=int, action="append", default=[], help="port whose certificate is watched")
    parser.add_argument("--no-gpu", dest="gpu", action="store_false", help="a host without one")
    parser.add_argument("--once", action="store_true")
    options = parser.parse_args(argv)
    smi, log = Program(SMI), Program(LOG)
    seen: Mapping[str, float] | None = None
    looked = asked = -math.inf
    while True:
        began = time.monotonic()
        if options.gpu and began - looked >= LOG_INTERVAL:
            looked = began
            text = log.output()
            seen = None if text is None else xids(text)
        if options.tls and began - asked >= TLS_INTERVAL:
            asked = began
            write(options.folder, certificates(options.tls), CERTIFICATES)
        if options.gpu:
            text = smi.output()
            write(options.folder, metrics(None if text is None else gpus(text), seen))
        if options.once:
            return 0
        time.sleep(max(INTERVAL - (time.monotonic() - began), 1.0))
