"""The verb ``bench``: its arguments, and `bench compare`."""

from __future__ import annotations

import argparse
import json
import re
from typing import Any

from sparkfleet import SparkfleetError, paths
from sparkfleet.exit_codes import DRIFT, OK
from sparkfleet.performance import comparison, loads, records
from sparkfleet.reporting import benchmark, report

COMPARE = "compare"
#: The record B of a comparison is slower than A by more than noise.
SLOWER = DRIFT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the verb, besides those of every verb."""
    parser.add_argument(
        "of",
        nargs="*",
        metavar="MODEL | compare A B",
        help="the engine of this card (default: all engines of a Spark); or two records: HOST for its newest, HOST/ID, "
        "or a file",
    )
    parser.add_argument(
        "--shape",
        dest="shapes",
        action="append",
        metavar="NAME|IN:OUT",
        help=f"{', '.join(loads.SHAPES)}, or tokens of prompt and answer; may be repeated (default: {loads.CHAT})",
    )
    parser.add_argument(
        "--streams",
        type=_counts,
        metavar="N,N",
        help="requests at a time (default: 1, 4, 16, 32, … as many as the engine takes)",
    )
    parser.add_argument("--repetitions", type=int, help=f"of each load (default: {loads.REPETITIONS})")
    parser.add_argument("--rounds", type=int, help=f"requests of each stream (default: {loads.ROUNDS})")
    parser.add_argument("--seconds", type=int, help=f"that one load may take (default: {loads.SECONDS})")
    parser.add_argument(
        "--even-if-serving",
        action="store_true",
        help="although others use the Spark; it is drained in the gateway meanwhile",
    )


def variables(options: argparse.Namespace) -> dict[str, Any]:
    """Of playbooks/benchmark.yml. Raises SparkfleetError."""
    if len(options.of) > 1:
        raise SparkfleetError("bench takes one MODEL, or `compare A B`")
    names = ("shapes", "streams", "repetitions", "rounds", "seconds")
    asked = {name: value for name in names if (value := getattr(options, name)) is not None}
    loads.Asked.of(asked)  # what is wrong is said before any host is asked
    return {
        "sparkfleet_bench_model": options.of[0] if options.of else None,
        "sparkfleet_bench_loads": asked or None,
        "sparkfleet_even_if_serving": options.even_if_serving or None,
    }


def compare(options: argparse.Namespace) -> int:
    """Print what B is against A; SLOWER where B is slower by more than noise in any load. Raises SparkfleetError."""
    if len(options.of) != 3:
        raise SparkfleetError("bench compare takes two records: HOST for its newest, HOST/ID, or a file")
    first, second = (records.find(paths.STATE, name) for name in options.of[1:])
    made = comparison.compare(first, second)
    if options.json:
        notes = {"first": benchmark.notes(first), "second": benchmark.notes(second)}
        print(json.dumps({**made.as_dict(), "notes": notes}, indent=2))
    else:
        print(report.clean(benchmark.compared(made)), end="")
    return SLOWER if made.slower else OK


def _counts(text: str) -> list[int]:
    if not re.fullmatch(r"[0-9]{1,4}(,[0-9]{1,4}){0,15}", text):
        raise argparse.ArgumentTypeError(f"'{text[:60]}': write numbers of streams as 1,4,16")
    return [int(part) for part in text.split(",")]
