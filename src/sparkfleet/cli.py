"""The command ``sparkfleet``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
from collections.abc import Sequence

import yaml

from sparkfleet import SparkfleetError, __version__, catalog, engine, memory, report
from sparkfleet.target import Settings, Target

#: Exit codes: bad input, as argparse has it; a plan that does not fit.
BAD_INPUT = 2
DOES_NOT_FIT = 3


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
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("model", metavar="MODEL|FILE", help=f"one of {', '.join(catalog.names())}, or a card's path")
    model.add_argument("--profile", default="throughput", help="profile of the card (default: %(default)s)")
    model.add_argument(
        "--set",
        metavar="ARGUMENT=VALUE",
        action="append",
        default=[],
        help="an argument of vllm serve in place of the card's, such as max_model_len=65536; may be repeated",
    )

    plan = verbs.add_parser("plan", parents=[model], help="say whether a model fits a Spark, and what it can do there")
    plan.add_argument("--total-gib", type=_gib, help=f"memory in all (default: {memory.USUAL_TOTAL_GIB})")
    plan.add_argument(
        "--available-gib", type=_gib, help=f"memory available (default: all but {memory.USUAL_HOST_GIB} GiB)"
    )
    plan.add_argument(
        "--reserve-gib", type=_gib_or_none, default=4.0, help="floor that the plan leaves to the host (default: 4)"
    )
    plan.add_argument("--engine", metavar="VERSION", help="version of vLLM (default: that of the card's image)")
    plan.add_argument("--json", action="store_true", help="for programs")
    plan.set_defaults(run=_plan)

    models = verbs.add_parser("models", help="list the catalogue")
    models.add_argument("--json", action="store_true", help="for programs")
    models.set_defaults(run=_models)

    show = verbs.add_parser("compose", parents=[model], help="print the compose file of a model")
    show.add_argument(
        "--source",
        choices=("local", "hub"),
        default="local",
        help="local: fetched before and served offline; hub: the server downloads (default: %(default)s)",
    )
    show.set_defaults(run=_compose)
    return parser


def _gib(text: str) -> float:
    value = _gib_or_none(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not an amount of GiB above 0")
    return value


def _gib_or_none(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"'{text}' is not an amount of GiB")
    return value


def _target(options: argparse.Namespace, source: str) -> Target:
    arguments = {}
    for pair in options.set:
        name, equals, value = pair.partition("=")
        if not equals:
            raise SparkfleetError(f"--set {pair}: write ARGUMENT=VALUE")
        arguments[name.replace("-", "_")] = yaml.safe_load(value)
    return Target.of(Settings(model=options.model, profile=options.profile, model_source=source, arguments=arguments))


def _plan(options: argparse.Namespace) -> int:
    target = _target(options, "local")
    total = options.total_gib or memory.USUAL_TOTAL_GIB
    available = options.available_gib or max(total - memory.USUAL_HOST_GIB, 0.0)
    if available > total:
        raise SparkfleetError(f"--available-gib {available:g} is more than the host has in all ({total:g})")
    made = memory.make(
        target.card,
        target.arguments,
        profile=options.profile,
        version=engine.Engine(engine.parse_version(options.engine)) if options.engine else target.engine,
        memory=memory.Memory(total, available, options.reserve_gib),
        others=_cards,
    ).as_dict()
    if options.json:
        print(json.dumps(made, indent=2))
    else:
        print(report.page(made, report.colour_wanted()), end="")
    return 0 if made["fits"] else DOES_NOT_FIT


def _cards() -> list[catalog.Card]:
    return [catalog.load(name) for name in catalog.names()]


def _fits(card: catalog.Card) -> bool | None:
    try:
        return memory.make(card, card.with_profile("throughput")).fits
    except SparkfleetError:
        return None


def _models(options: argparse.Namespace) -> int:
    cards = _cards()
    fits = {card.name: _fits(card) for card in cards}
    if options.json:
        data = [{**dataclasses.asdict(card), "source": str(card.source), "fits": fits[card.name]} for card in cards]
        print(json.dumps(data, indent=2))
    else:
        print(report.models(cards, fits), end="")
    return 0


def _compose(options: argparse.Namespace) -> int:
    target = _target(options, options.source)
    yaml.safe_dump(target.document(), sys.stdout, sort_keys=False, default_flow_style=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
