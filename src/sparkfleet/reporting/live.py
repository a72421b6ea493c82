"""What a run shows in progress: one table, redrawn in place on a terminal; elsewhere plain lines."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import threading
import time
from types import TracebackType
from typing import TextIO

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text
from sparkfleet_host.bounded import printable

from sparkfleet.reporting import progress, report
from sparkfleet.reporting.progress import Board, Row

TICK = 0.2  # seconds between two frames at least
QUIET = 10.0  # seconds without a line after which the totals are one, where there is no table
NARROW = 72  # columns below which the model is left out
MESSAGE_WIDTH = 16  # columns that what a host says has at least
STYLES = {
    **dict.fromkeys(progress.BAD, "bold red"),
    **dict.fromkeys(progress.WARN, "yellow"),
    **{progress.DONE: "green", progress.WAITING: "dim", progress.DRAINED: "dim", progress.RESTORE: "yellow"},
}


class Live:
    """Shows the board of a run, and above it what is not of one host alone. `stream` is where to; None for nowhere.

    A context: it begins with the first event, and ends whatever happens with the cursor where it belongs.
    """

    def __init__(self, stream: TextIO | None, board: Board, title: str = "", terminal: bool | None = None) -> None:
        self.stream, self.board, self.title = stream, board, title
        self.terminal = is_terminal(stream) if terminal is None else terminal
        self.stand = False  # whether the last frame stays when it ends
        self._above: list[str] = []
        self._reported: set[str] = set()  # lines of hosts already shown; a second inspection repeats most of them
        self._drawn: list[str] = []  # the lines of the last frame
        self._seen: object = None
        self._said_at = time.monotonic()
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Live:
        if self.stream is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stand |= kind is not None
        self.close()

    def show(self, host: str, line: str) -> None:
        """One line of a host ("" for none). On a terminal, steps of a host are in its row alone."""
        if self.stream is None:
            return
        host, line = printable(host), report.clean(line)
        with self._lock:
            if not self.terminal:
                self._print(line)
            elif line not in self._reported and not self.board.passing(host, line.removeprefix(host).strip()):
                self._above.append(line)
                self._reported.update([line] if host else [])

    def close(self) -> None:
        """End it: the table goes, or stands as it is."""
        if self._over.is_set() or self.stream is None:
            return
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()
        if self.terminal:
            self.draw()
            self._write(("" if self.stand else self._erase()) + "\033[?25h")

    def draw(self) -> None:
        """Draw the table as things are now; nothing is written where it would look the same."""
        width, height = size(self.stream)
        with self._lock:
            above, self._above = self._above, []
        lines = frame(self.board, self.title, width, height) if self.board.rows else []
        if above or (lines, width) != self._seen:
            # One write: a terminal that is slow shows no half of it.
            text = self._erase(width) + "".join(f"{line}\n" for line in (*above, *lines))
            self._drawn, self._seen = lines, (lines, width)
            self._write(f"\033[?25l{text}")

    def _tick(self) -> None:
        while not self._over.wait(TICK):
            if self.terminal:
                self.draw()
            else:
                with self._lock:
                    if time.monotonic() - self._said_at >= QUIET and self.board.rows:
                        self._print(f"{self.title}  {self.board.totals()}")

    def _print(self, line: str) -> None:
        self._said_at = time.monotonic()
        self._write(f"{line}\n")

    def _write(self, text: str) -> None:
        if self.stream is not None:
            with contextlib.suppress(OSError, ValueError):  # a terminal that is gone must not end a rollout
                self.stream.write(text)
                self.stream.flush()

    def _erase(self, width: int = 0) -> str:
        """Back to the first line of the last frame. A terminal that became narrower has broken its lines.

        Line by line: some terminals keep what is cleared as a whole in their history.
        """
        width = width or size(self.stream)[0]
        rows = sum(max(-(-cell_len(Text.from_ansi(line).plain) // width), 1) for line in self._drawn)
        return "\r\033[2K" + "\033[1A\033[2K" * rows


class Page:
    """Text that takes its own place again and again on a terminal; elsewhere one after the other. A context."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.terminal = stream, is_terminal(stream)

    def __enter__(self) -> Page:
        if self.terminal:
            self.stream.write("\033[?1049h\033[?25l")  # a screen of its own: what was there comes back
        return self

    def __exit__(self, *error: object) -> None:
        if self.terminal:
            self.stream.write("\033[?1049l\033[?25h")
            self.stream.flush()

    def show(self, text: str) -> None:
        """Show the result, as much as there is room for."""
        if self.terminal:
            width, height = size(self.stream)
            lines = [set_cell_size(plain(line), width).rstrip() for line in text.splitlines()[:height]]
            text = "\033[H" + "\033[K\n".join(lines) + "\033[J"
        self.stream.write(text if self.terminal else f"{text}\n")
        self.stream.flush()


def frame(board: Board, title: str, width: int, height: int) -> list[str]:
    """The table in lines, with colours, at most `height` - 1 and each shorter than `width`."""
    rows = board.ordered()
    room = max(height - 3, 1)  # a head, the totals, and the line of the cursor
    folded: list[Row] = []
    if len(rows) > room:
        rows.sort(key=Row.rank)
        rows, folded = rows[: room - 1], rows[room - 1 :]
    # A table of rich shares the width out; what a host says takes what is left.
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", expand=True)
    columns = [column for column in COLUMNS if column != "wave" or board.waves]
    columns = [column for column in columns if column != "model" or width >= NARROW]
    for column in columns:
        last = column == "progress"
        table.add_column(
            column,
            no_wrap=True,
            overflow="ellipsis",
            ratio=1 if last else None,
            min_width=min(MESSAGE_WIDTH, width // 3) if last else None,
            justify="right" if column == "time" else "left",
        )
    for row in rows:
        cells = _cells(row, board.clock())
        table.add_row(*(cells[column] for column in columns))
    head = Text(f"{title}  {board.totals()}", style="bold", no_wrap=True, overflow="ellipsis")
    foot = Text(f"... and {len(folded)} more: {progress.counted(folded)}", style="dim", no_wrap=True)
    parts = [head, table, *([foot] if folded else [])]
    screen = Console(file=io.StringIO(), force_terminal=True, width=max(width - 1, 1), height=height, highlight=False)
    with screen.capture() as captured:
        for part in parts:
            screen.print(part, overflow="ellipsis", no_wrap=True)
    return captured.get().splitlines()[: max(height - 1, 1)]


COLUMNS = ("host", "wave", "model", "phase", "progress", "time")


def _cells(row: Row, now: float) -> dict[str, Text]:
    state, style = row.state(), STYLES.get(row.state(), "cyan")
    return {
        "host": Text(plain(row.host)),
        "wave": Text(row.wave),
        "model": Text(plain(row.model)),
        "phase": Text(state, style=style),
        "progress": Text(plain(row.message), style=style if row.result else ""),
        "time": Text("" if state in (progress.DONE, progress.DRAINED) else progress.minutes(now - row.since)),
    }


def plain(text: str) -> str:
    """Text that can do nothing to a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether lines of a stream can be drawn over."""
    return bool(stream and stream.isatty()) and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


def size(stream: TextIO | None) -> tuple[int, int]:
    """Columns and lines of the terminal behind a stream."""
    found = shutil.get_terminal_size()
    with contextlib.suppress(OSError, ValueError, AttributeError):
        found = os.get_terminal_size(stream.fileno())  # type: ignore[union-attr]
    return max(found.columns, 1), max(found.lines, 1)


def columns(stream: TextIO) -> int:
    """Columns that a table may take; 0 for any number, where it is not a terminal."""
    return size(stream)[0] if stream.isatty() else 0


def terminal() -> TextIO:
    """Where progress goes: not into the result, so that `| jq` works."""
    return sys.stderr
