"""The command ``sparkfleet``."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

import yaml

from sparkfleet import SparkfleetError, __version__, catalog
from sparkfleet.plan import Settings, Target

#: Exit code for bad input, as argparse has it.
BAD_INPUT = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    if argv is None:  # as a command: a reader that has seen enough (`| head`) ends it quietly
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    options = _parser().parse_args(argv)
    try:
        return int(options.run(options))
    except SparkfleetError as error:
        print(f"sparkfleet: {error}", file=sys.stderr)
        return BAD_INPUT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sparkfleet", description="DGX Sparks with a verified vLLM endpoint.")
    parser.add_argument("--version", action="version", version=f"sparkfleet {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    show = verbs.add_parser("compose", help="print the compose file of a model")
    show.add_argument("model", metavar="MODEL|FILE", help=f"one of {', '.join(catalog.names())}, or a card's path")
    show.add_argument("--profile", default="throughput", help="profile of the card (default: %(default)s)")
    show.add_argument(
        "--source",
        choices=("local", "hub"),
        default="local",
        help="local: fetched before and served offline; hub: the server downloads (default: %(default)s)",
    )
    show.set_defaults(run=_compose)
    return parser


def _compose(options: argparse.Namespace) -> int:
    target = Target.of(Settings(model=options.model, profile=options.profile, model_source=options.source))
    yaml.safe_dump(target.document(), sys.stdout, sort_keys=False, default_flow_style=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
