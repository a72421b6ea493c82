"""`sparkfleet card`: a model card from the Hub, from a folder, or from a recipe or command that someone else wrote."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from sparkfleet_host.bounded import BoundsError, printable, read_file

from sparkfleet import SparkfleetError
from sparkfleet.onboarding import hub_card, recipe
from sparkfleet.onboarding.prompts import report_line
from sparkfleet.planning import card_draft, catalog
from sparkfleet.planning.card_draft import Draft
from sparkfleet.user_paths import expanded, output

EPILOG = """examples:
  sparkfleet card Qwen/Qwen3-8B-FP8 --output cards/qwen3-8b.yml
  sparkfleet card ./qwen3-8b --repo Qwen/Qwen3-8B-FP8      a folder with the model's files; no request is made
  sparkfleet card --from recipe.yaml                       a recipe of sparkrun, format 1 or 2
  echo 'vllm serve ORG/NAME -tp 1' | sparkfleet card --from -

Each field of the card is followed by its source; what is not known is listed at its head, and on standard error.
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "card",
        help="write a model card from the Hub, a folder, a sparkrun recipe or a `vllm serve` command",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source", metavar="ORG/NAME[@REVISION]|FOLDER", nargs="?", help="a model of the Hub, or a folder with its files"
    )
    parser.add_argument(
        "--from",
        dest="recipe",
        metavar="FILE",
        help="a sparkrun recipe or a `vllm serve` command, - for standard input; its settings in place of ours",
    )
    parser.add_argument("--repo", metavar="ORG/NAME[@REVISION]", default="", help="of a folder: which model it holds")
    parser.add_argument("--image", default="", help="the engine's image, in place of the one that is suggested")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("-o", "--output", metavar="FILE", help="where to (default: standard output)")
    where.add_argument(
        "--refresh", action="store_true", help="make again the card that `plan` and sparkfleet_model: ORG/NAME use"
    )
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Make the card; 0, or SparkfleetError."""
    if options.refresh:
        return _refresh(options)
    target = expanded("--output", options.output).absolute() if options.output else None
    if target and target.exists() and not (options.force and target.is_file()):
        remedy = "--force replaces it" if target.is_file() else "name a file"
        raise SparkfleetError(f"--output {printable(str(target), 300)} is there already: {remedy}")
    if target:
        output("--output", target, make=True)  # before anything is asked of the Hub
    made = _made(options)
    text = made.text()
    for words in made.unknown:
        report_line(f"not known: {words}")
    for words in made.left:
        report_line(f"not taken: {words}")
    if target is None:
        sys.stdout.write(text)
        return 0
    _write(target, text)
    report_line(f"{target}: the card of {made.data['repo']}; `sparkfleet plan {target}` shows how it fits a Spark")
    return 0


def _refresh(options: argparse.Namespace) -> int:
    if options.recipe or not options.source or catalog.hub_name(options.source) is None:
        raise SparkfleetError("--refresh is for a model of the Hub: sparkfleet card ORG/NAME --refresh")
    hub_card.ensure(options.source, hub_card.way(), report_line, refresh=True)
    return 0


def _made(options: argparse.Namespace) -> Draft:
    if not options.recipe:
        if not options.source:
            raise SparkfleetError("name a model of the Hub (ORG/NAME), a folder, or a recipe with --from FILE")
        return _draft(options, options.source, options.image)
    place = "standard input" if options.recipe == "-" else f"--from {printable(options.recipe, 200)}"
    settings = recipe.read(_text(options.recipe, place), place)
    source = options.source or (f"{settings.model}@{settings.revision}".rstrip("@") if settings.model else "")
    if not source:
        raise SparkfleetError(
            f"{place}: it names no model of the Hub as ORG/NAME, so that the model's shape is not known: give a folder "
            "or ORG/NAME before --from" + (f" ({'; '.join(settings.left[:3])})" if settings.left else "")
        )
    made = _draft(options, source, options.image or settings.image)
    if settings.model and settings.model != made.data["repo"]:
        settings.leave(f"model {settings.model}", f"you gave {made.data['repo']}")
    recipe.fit_context(settings, made.data["shape"]["context"])
    where = f"the {settings.kind} in {place.removeprefix('--from ')}"
    if settings.image and not options.image:
        made.origin["image"] = where
    card_draft.settings(
        made, settings.arguments, settings.environment, settings.tool_call_parser, settings.sparks, where
    )
    made.left = settings.left
    made.unknown += settings.doubts
    hub_card.check(made, made.data["repo"])
    return made


def _draft(options: argparse.Namespace, source: str, image: str) -> Draft:
    folder = expanded("FOLDER", source)
    if folder.is_dir():
        return hub_card.draft(hub_card.inspect_folder(folder, options.repo), image)
    named = catalog.hub_name(source)
    if named is None:
        raise SparkfleetError(
            f"{printable(source, 200)!r} is neither a folder that is there nor a model of the Hub: write ORG/NAME, "
            "ORG/NAME@REVISION, or a folder with the model's config.json"
        )
    if options.repo:
        raise SparkfleetError("--repo names the model that a folder holds; for the Hub, ORG/NAME alone is enough")
    return hub_card.draft(hub_card.ask(*named, hub_card.way()), image)


def _text(name: str, place: str) -> str:
    try:
        if name == "-":
            data = sys.stdin.read(recipe.CHARACTERS + 1).encode()
        else:
            data = read_file(expanded("--from", name), recipe.CHARACTERS)
        return data.decode("utf-8")
    except (OSError, BoundsError, ValueError) as error:
        raise SparkfleetError(f"{place} cannot be read: {printable(str(error), 300)}") from None


def _write(target: Path, text: str) -> None:
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(target)
    except OSError as error:
        raise SparkfleetError(f"--output {printable(str(target), 300)} cannot be written: {error}") from None
