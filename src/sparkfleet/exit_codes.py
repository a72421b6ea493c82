"""Exit codes of the command; 1 and 2 as everywhere. Of several hosts the most severe counts."""

from __future__ import annotations

from sparkfleet import SparkfleetError

OK, INTERNAL, BAD_INPUT, REFUSED, DRIFT, RESTORED, DOWN, UNREACHABLE, INTERRUPTED = 0, 1, 2, 3, 4, 5, 6, 7, 130
#: Result of a host -> exit code.
CODES = {
    "ok": OK,
    "changed": OK,
    "untouched": OK,  # by a rollout that stopped before it
    "refused": REFUSED,
    "drift": DRIFT,
    "faulty": DRIFT,  # it serves, and something is wrong with it
    "restored": RESTORED,
    "exposed": RESTORED,  # by an audit, with findings of the grade that is to fail
    "failed": DOWN,
    "down": DOWN,
    "unreachable": UNREACHABLE,
}


def of_error(error: BaseException) -> int:
    """That of a command which is ended by an exception."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return BAD_INPUT if isinstance(error, SparkfleetError) else INTERNAL
