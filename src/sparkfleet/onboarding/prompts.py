"""The person at the terminal: asked with input(), or not there, and then each question has its default."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

from sparkfleet import SparkfleetError
from sparkfleet.reporting import report

T = TypeVar("T")


class Prompter:
    """Answers questions; takes the defaults where `there` is false."""

    def __init__(self, there: bool) -> None:
        self.there = there

    def ask(self, question: str, default: str, taken: Callable[[str], T]) -> T:
        """The answer as `taken` makes it of the words; asked again for as long as that raises SparkfleetError."""
        while self.there:
            words = input(f"{question} [{default}]: " if default else f"{question}: ").strip() or default
            try:
                return taken(words)
            except SparkfleetError as error:
                report_line(f"  {error}")
        return taken(default)

    def agrees(self, question: str, default: bool) -> bool:
        """Yes or no."""

        def taken(words: str) -> bool:
            if words.lower() not in ("y", "yes", "n", "no"):
                raise SparkfleetError("answer yes or no")
            return words.lower() in ("y", "yes")

        return self.ask(question, "yes" if default else "no", taken)


def report_line(text: str) -> None:
    """Print a line on standard error, so that `| jq` works on the result."""
    print(report.clean(text), file=sys.stderr, flush=True)
