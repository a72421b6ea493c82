"""Errors for the person at the keyboard, and running commands that take long, with a sign of life."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence


class SimulatorError(Exception):
    """Something the person at the keyboard has to know; printed as one line."""


def expect(fact: bool, what: str, detail: object = "") -> None:
    """Raise SimulatorError unless it is so."""
    if not fact:
        raise SimulatorError(f"{what}: {str(detail)[-3000:]}")


def run(command: Sequence[str], what: str, say: Callable[[str], None], every: float = 10.0) -> str:
    """Run a command, report progress every ``every`` seconds, return its output; raise with its last lines."""
    began = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        while True:
            try:
                code = process.wait(every)
                break
            except subprocess.TimeoutExpired:
                say(f"{what}: {time.monotonic() - began:.0f} s")
        log.seek(0)
        output = log.read()
    if code != 0:
        tail = "\n".join(output.splitlines()[-15:])
        raise SimulatorError(f"{what} failed (exit code {code}):\n{tail}")
    return output
