"""What is drawn on a terminal while a verb runs, and what is printed where there is none."""

from __future__ import annotations

import io
import os
import pty
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

from sparkfleet.reporting import live
from sparkfleet.reporting.live import Live, Page, frame
from sparkfleet.reporting.progress import Board

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
SWITCH = {"task_action": "sparkfleet.dgx.release_switch", "task": "Switch to the release"}


class Screen:
    """A terminal of a few lines: what is seen of a stream of text."""

    def __init__(self, width: int) -> None:
        self.width, self.lines, self.row = width, [""], 0
        self.cursor = True

    def feed(self, text: str) -> list[str]:
        for found in re.finditer(r"\x1b\[([0-9;?]*)([A-Za-z])|\r|\n|[^\x1b\r\n]+", text):
            what, count = found[2], found[1]
            if what == "A":
                assert self.row >= int(count), "drawn above the first line"
                self.row -= int(count)
            elif what == "K":
                self.lines[self.row] = ""
            elif what in ("l", "h"):
                self.cursor = what == "h"
            elif found[0] == "\n":
                self.row += 1
                self.lines += [""] * (self.row + 1 - len(self.lines))
            elif not what and found[0] != "\r":
                assert len(found[0]) <= self.width
                self.lines[self.row] += found[0]
        return [line.rstrip() for line in self.lines if line.strip()]


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Columns and lines, to be changed by a test."""
    size = [100, 24]
    monkeypatch.setattr(live, "size", lambda stream: (size[0], size[1]))
    monkeypatch.setattr(live, "TICK", 3600.0)  # tests draw by themselves
    yield size


def board(count: int = 2) -> Board:
    made = Board(clock=lambda: 160.0)
    made.began = 100.0
    for number in range(1, count + 1):
        made.row(f"spark-{number}").since = 155.0
    return made


def plain(lines: list[str]) -> list[str]:
    return [ANSI.sub("", line).rstrip() for line in lines]


def test_a_frame() -> None:
    made = board(3)
    made.waves, made.wave = [["spark-1"], ["spark-2", "spark-3"]], 2
    for name, wave in (("spark-1", "canary"), ("spark-2", "2/2"), ("spark-3", "2/2")):
        made.rows[name].wave, made.rows[name].model = wave, "llama31-8b-fp8"
    made.rows["spark-1"].phase, made.rows["spark-1"].message = "done", "release 2 verified, 3 s without service"
    made.task("spark-2", SWITCH)
    made.line("spark-2", "4 s  loading weights, shard 2/4")
    made.rows["spark-2"].since = 155.0
    assert plain(frame(made, "rollout", 80, 24)) == [
        "rollout  wave 2 of 2; 3 Sparks: 1 loading, 1 waiting, 1 done; 1:00",
        "host     wave    model           phase    progress                         time",
        "spark-1  canary  llama31-8b-fp8  done     release 2 verified, 3 s withou…",
        "spark-2  2/2     llama31-8b-fp8  wait     loading weights, shard 2/4       0:05",
        "spark-3  2/2     llama31-8b-fp8  waiting                                   0:05",
    ]


@pytest.mark.parametrize("width", [1, 8, 20, 40, 71, 72, 200])
@pytest.mark.parametrize("height", [1, 3, 6, 50])
def test_a_frame_fits_any_terminal(width: int, height: int) -> None:
    made = board(30)
    made.task("spark-1", SWITCH)
    made.line("spark-1", "3 s  " + "ü漢" * 100)
    lines = frame(made, "rollout", width, height)
    assert len(lines) <= max(height - 1, 1)
    assert all(live.cell_len(line) <= max(width - 1, 1) for line in plain(lines))


def test_rows_that_do_not_fit_are_folded_behind_those_that_count() -> None:
    made = board(30)
    made.rows["spark-2"].phase = "done"
    made.task("spark-30", SWITCH)
    made.line("spark-30", "3 s  loading weights")
    made.result("spark-17", "failed", "it is down")
    lines = plain(frame(made, "deploy", 80, 10))
    assert [line.split()[0] for line in lines[2:-1]] == ["spark-17", "spark-30", *(f"spark-{n}" for n in (1, 3, 4, 5))]
    assert lines[-1] == "... and 24 more: 23 waiting, 1 done"


def test_colours_are_for_those_who_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    made = board(1)
    made.result("spark-1", "failed", "it is down")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    red = re.compile(r"\x1b\[(?:1;)?31m")
    assert red.search("".join(frame(made, "deploy", 80, 24)))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not red.search("".join(frame(made, "deploy", 80, 24)))


def test_what_a_host_says_cannot_drive_the_terminal() -> None:
    made = board(1)
    made.line("spark-1", "\x1b[2Jloading\tweights\x07")
    line = frame(made, "deploy", 80, 24)[2]
    assert "\x1b[2J" not in line and "\x07" not in line and "[2Jloading weights" in line


def test_the_table_is_redrawn_in_its_place() -> None:
    stream, screen, made = io.StringIO(), Screen(100), board()
    with Live(stream, made, "deploy", terminal=True) as shown:
        shown.draw()
        made.task("spark-1", SWITCH)
        made.line("spark-1", "2 s  loading weights")
        shown.show("spark-1", "spark-1  2 s  loading weights")  # it is in its row
        shown.show("", "a table")
        shown.draw()
        assert screen.feed(stream.getvalue()) == [
            "a table",
            "deploy  2 Sparks: 1 loading, 1 waiting; 1:00",
            *plain(frame(made, "deploy", 100, 24)[1:]),
        ]
        assert not screen.cursor
        shown.draw()
        assert stream.getvalue().count("a table") == 1  # nothing is written where nothing has changed
        written = len(stream.getvalue())
        shown.draw()
        assert len(stream.getvalue()) == written
    screen = Screen(100)
    assert screen.feed(stream.getvalue()) == ["a table"] and screen.cursor


def test_what_a_second_look_says_again_is_shown_once() -> None:
    stream, made = io.StringIO(), board()
    with Live(stream, made, "deploy", terminal=True) as shown:
        for _ in range(2):
            shown.show("spark-1", "spark-1  m on NVIDIA GB10")
            shown.show("", "  question: What is the capital of France?")
        shown.draw()
    assert stream.getvalue().count("GB10") == 1 and stream.getvalue().count("capital") == 2


def test_a_terminal_that_became_narrower_has_broken_the_lines(terminal: list[int]) -> None:
    stream, made = io.StringIO(), board()
    shown = Live(stream, made, "deploy", terminal=True)
    shown.draw()
    assert len(shown._drawn) == 4
    terminal[0] = 60
    shown.draw()
    # Head and totals are short; the two rows and the head of the table take two lines each.
    assert stream.getvalue().rpartition("\x1b[?25l")[2].count("\x1b[1A") == 1 + 3 * 2


def test_the_table_stands_after_ctrl_c() -> None:
    stream, screen = io.StringIO(), Screen(100)
    with pytest.raises(KeyboardInterrupt), Live(stream, board(), "deploy", terminal=True):
        raise KeyboardInterrupt
    seen = screen.feed(stream.getvalue())
    assert seen[0].startswith("deploy  2 Sparks") and len(seen) == 4 and screen.cursor


def test_elsewhere_every_line_stands() -> None:
    file = io.StringIO()
    with Live(file, board(), "deploy") as shown:
        shown.show("spark-1", "spark-1  1 s  starting")
        shown.show("spark-1", "spark-1  2 s  ready")
    assert file.getvalue() == "spark-1  1 s  starting\nspark-1  2 s  ready\n"


def test_elsewhere_silence_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "TICK", 0.01)
    monkeypatch.setattr(live, "QUIET", 0.05)
    file = io.StringIO()
    with Live(file, board(), "deploy"):
        time.sleep(0.5)
    lines = file.getvalue().splitlines()
    assert 2 <= len(lines) <= 10 and set(lines) == {"deploy  2 Sparks: 2 waiting; 1:00"}


def test_nothing_is_shown_nowhere() -> None:
    with Live(None, board(), "deploy") as shown:
        shown.show("spark-1", "spark-1  1 s  starting")


def test_a_terminal_that_is_gone_ends_nothing() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with Live(Gone(), board(), "deploy", terminal=True) as shown:
        shown.show("", "a table")
        shown.draw()


@pytest.mark.parametrize(("term", "drawn"), [("xterm", True), ("dumb", False), ("", False)])
def test_what_can_be_drawn_over(monkeypatch: pytest.MonkeyPatch, term: str, drawn: bool) -> None:
    monkeypatch.setenv("TERM", term)
    primary, secondary = pty.openpty()
    try:
        with os.fdopen(secondary, "w") as stream:
            assert live.is_terminal(stream) is drawn
    finally:
        os.close(primary)
    assert not live.is_terminal(io.StringIO()) and not live.is_terminal(None)


def test_a_page_takes_its_own_place(monkeypatch: pytest.MonkeyPatch, terminal: list[int]) -> None:
    monkeypatch.setattr(live, "is_terminal", lambda stream: True)
    terminal[:] = [10, 2]
    stream = io.StringIO()
    with Page(stream) as page:
        page.show("0123456789abc\nsecond\nthird\n")
    assert stream.getvalue() == "\x1b[?1049h\x1b[?25l\x1b[H0123456789\x1b[K\nsecond\x1b[J\x1b[?1049l\x1b[?25h"


def test_a_page_elsewhere_is_text(capsys: pytest.CaptureFixture[Any]) -> None:
    stream = io.StringIO()
    with Page(stream) as page:
        page.show("one\n")
        page.show("two\n")
    assert stream.getvalue() == "one\n\ntwo\n\n"
