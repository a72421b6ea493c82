"""What a run shows while it goes on: a line a host, rewritten in place on a terminal, else plain lines."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from typing import TextIO

from sparkfleet import report
from sparkfleet.runner import Host


class Live:
    """Shows lines as they come. `stream` is where to; nothing where it is None."""

    def __init__(self, stream: TextIO | None, terminal: bool | None = None) -> None:
        self.stream = stream
        self.terminal = bool(stream and stream.isatty()) if terminal is None else terminal
        self._lines: dict[str, str] = {}  # host -> what it said last
        self._drawn = 0

    def show(self, host: str, line: str) -> None:
        """One line of a host ("" for none)."""
        if self.stream is None:
            return
        if not self.terminal:
            print(line, file=self.stream, flush=True)
            return
        # A table, or what has no second of its own, stays above; steps replace each other.
        step = host and " s  " in line[:30]
        self._erase()
        if step:
            self._lines[host] = line
        else:
            print(line, file=self.stream)
        self._draw()

    def close(self) -> None:
        """Let the last lines stand."""
        self._lines, self._drawn = {}, 0

    def _erase(self) -> None:
        if self._drawn and self.stream:
            self.stream.write(f"\033[{self._drawn}F\033[J")
        self._drawn = 0

    def _draw(self) -> None:
        if not self.stream:
            return
        width = shutil.get_terminal_size().columns
        for host in sorted(self._lines):
            self.stream.write(self._lines[host][: width - 1] + "\n")
        self._drawn = len(self._lines)
        self.stream.flush()


def closing(hosts: Sequence[Host]) -> str:
    """The table at the end, and the whole message of each host that failed."""
    rows = [("host", "result", "release", "seconds", "without service")]
    for host in hosts:
        release = f"{host.release['number']} ({host.release['model']})" if host.release else "-"
        gone = f"{host.out_of_service_s:.0f} s" if host.out_of_service_s is not None else "-"
        result = host.result + (f" [{host.failure}]" if host.failure and host.failure != host.result else "")
        rows.append((host.name, result, release, f"{host.seconds:.0f}", gone))
    text = report.table(rows) if len(rows) > 1 else ""
    for host in hosts:
        if host.message:
            text += f"\n{host.name}: {host.message.removeprefix(f'{host.name}: ')}\n"
    return text


def terminal() -> TextIO:
    """Where progress goes: beside the result, so that `| jq` works."""
    return sys.stderr
