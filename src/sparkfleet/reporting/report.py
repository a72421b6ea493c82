"""Plans and cards in words: the memory bar, the table of models."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sparkfleet_host.bounded import printable

from sparkfleet.planning.catalog import Card

WIDTH = 60
#: Parts of the bar: key of the plan, letter on a plain terminal, colour, name.
PARTS = (
    ("weights_gib", "W", "44", "weights"),
    ("activation_gib", "A", "45", "activations"),
    ("runtime_gib", "R", "43", "runtime"),
    ("cuda_graphs_gib", "G", "46", "CUDA graphs"),
    ("kv_cache_gib", "K", "42", "KV cache"),
)


#: Blocks that are longer are worth a word: prefixes are reused in steps of them, tokens.
LONG_BLOCK = 256
#: Whether a model fits a Spark; "?" where the planner does not know.
FITS = {True: "yes", False: "no", None: "?"}


def brief(plan: Mapping[str, Any]) -> str:
    """The memory plan in a line."""
    parts = ", ".join(f"{name} {plan[key]:.1f}" for key, _, _, name in PARTS if plan[key])
    return f"{parts} GiB; {room(plan)}; {left(plan)}"


def left(plan: Mapping[str, Any]) -> str:
    """What the host keeps, or how much more than its memory the engine needs."""
    spare = plan["left_gib"]
    return f"{spare:.1f} GiB left to the host" if spare >= 0 else f"{-spare:.1f} GiB more than the host has"


def room(plan: Mapping[str, Any]) -> str:
    """What the KV cache holds."""
    if not caches(plan):
        return f"no KV cache, {plan['full_length_sequences']} sequences of {plan['max_model_len']:,} at a time"
    return f"{held(plan):,} tokens, {plan['max_concurrency']:.1f} sequences of {plan['max_model_len']:,}"


def held(plan: Mapping[str, Any]) -> int:
    """Tokens that fit into the KV cache in sequences of full length; `kv_cache_tokens` is what the engine logs, which
    some versions count otherwise (`memory_plan.Plan`)."""
    return int(plan.get("kv_cache_held_tokens", plan["kv_cache_tokens"]))


def caches(plan: Mapping[str, Any]) -> bool:
    """Whether the model keeps a KV cache; an encoder does not. Plans of earlier versions are of models that do."""
    return plan.get("kv_block_bytes") != 0


def speed(plan: Mapping[str, Any]) -> str:
    """How fast one stream can be, and was."""
    limit, drafted = f"at most {plan['decode_tok_s_limit']:.1f}", plan.get("speculative_tokens", 0)
    found = f"; measured {plan['measured_tok_s']:g}" if plan["measured_tok_s"] else ""
    if not drafted:
        return f"{limit} tokens a second{found}"
    # A pass reads the weights once, and yields a token and those of its draft that are right.
    return f"{limit} passes a second, each of 1 to {drafted + 1} tokens (speculation)" + (
        f"{found} tokens a second" if found else ""
    )


def bar(plan: Mapping[str, Any], colour: bool) -> str:
    """One line of WIDTH cells that stand for the host's memory."""
    cells: list[str] = []
    used = 0.0
    total = max(plan["total_gib"], plan["requested_gib"])
    for key, letter, shade, _ in PARTS:
        used += plan[key]
        end = min(round(used / total * WIDTH), WIDTH)
        here = end - len(cells)
        cells += [f"\033[{shade}m \033[0m" if colour else letter] * here
    return "".join(cells + [" " if colour else "."] * (WIDTH - len(cells)))


def page(plan: Mapping[str, Any], colour: bool = False) -> str:
    """The memory plan for people."""
    lines = [
        f"{plan['model']} ({plan['profile']}) with vLLM {plan['engine']}, "
        + (f"KV cache in {plan['kv_cache_dtype']}" if caches(plan) else "no KV cache")
        + (f", one of {plan['sparks']} Sparks" if plan.get("sparks", 1) > 1 else ""),
        "",
        f"  [{bar(plan, colour)}] {plan['total_gib']:.1f} GiB",
    ]
    for key, letter, shade, name in PARTS:
        mark = f"\033[{shade}m \033[0m" if colour else letter
        if plan[key]:
            lines.append(f"   {mark} {name:<14}{plan[key]:7.2f} GiB")
    mark = " " if colour else "."
    short = "" if plan["left_gib"] >= 0 else f"; {-plan['left_gib']:.1f} GiB too little"
    lines += [
        f"   {mark} {'left to host':<14}{max(plan['left_gib'], 0.0):7.2f} GiB of the {plan['available_gib']:.1f} "
        f"available (floor {plan['reserve_gib']:g}{short})",
        "",
        f"  asked for      {plan['requested_gib']:.2f} GiB, utilization {plan['gpu_memory_utilization']:.2f}",
    ]
    if caches(plan):
        blocks = f", in blocks of {plan['kv_block_tokens']:,}" if plan.get("kv_block_tokens", 0) > LONG_BLOCK else ""
        lines += [
            f"  KV cache       {held(plan):,} tokens, {plan['kv_bytes_per_token']:,} bytes each{blocks}",
            f"  at a time      {plan['full_length_sequences']} of full length ({plan['max_model_len']:,} tokens), "
            f"or {plan['typical_sequences']} usual ones (4,096)",
        ]
    else:
        lines.append(f"  at a time      {plan['full_length_sequences']} of up to {plan['max_model_len']:,} tokens")
    lines += [f"  one stream     {speed(plan)}"] if plan["decode_tok_s_limit"] else []
    lines.append("")
    lines.append("  FITS" if plan["fits"] else "  DOES NOT FIT")
    lines += [f"  - {text}" for text in (*plan["reasons"], *plan["notes"])]
    if plan["suggestions"]:
        lines += ["", "  What would fit:" if not plan["fits"] else "  Faster, and fits:"]
        lines += [f"  - {suggestion['text']}" for suggestion in plan["suggestions"]]
    return "\n".join(lines) + "\n"


#: Columns of the table of models where no terminal says how many there are.
MODELS_WIDTH = 100
#: Columns that give way on a narrow terminal, the first one first.
GIVE_WAY = ("on the Hub", "tested", "licence", "vLLM", "context")
MODELS_LEGEND = (
    "GiB: size of the download; context: longest sequence of the model, tokens; vLLM: version in the card's image, ? "
    "if its name does not show it (the newest is planned); tok/s: one stream, measured on a Spark; licence: to be "
    "accepted on the Hub, or open; tested: seen running on a Spark; fits: one Spark, or how many it takes. `sparkfleet "
    "plan NAME` shows why, `sparkfleet models --json` has everything."
)


def models(cards: Sequence[Card], fits: Mapping[str, bool | None], width: int = MODELS_WIDTH) -> str:
    """The catalogue as a table of at most `width` columns, if it can be, and what its columns mean."""
    rows = [("name", "on the Hub", "GiB", "context", "vLLM", "tok/s", "licence", "tested", "fits")]
    for card in cards:
        speed = max((entry.tok_s for entry in card.measured), default=None)
        rows.append(
            (
                card.name,
                card.repo,
                f"{card.weights.download_gib:.1f}",
                f"{card.shape.context:,}",
                card.engine().text if card.engine().version else "?",
                f"{speed:.1f}" if speed else "-",
                "accept" if card.licence.gated else "open",
                "yes" if card.verified else "no",
                f"{card.sparks} Sparks" if card.sparks > 1 and fits[card.name] is not False else FITS[fits[card.name]],
            )
        )
    shown = list(rows[0])
    for name in ("", *GIVE_WAY):
        shown = [column for column in shown if column != name]
        text = table([[row[rows[0].index(column)] for column in shown] for row in rows])
        if max(map(len, text.splitlines())) <= width:
            break
    parts = [part for part in MODELS_LEGEND.split("; ") if part.split(":")[0] not in {*rows[0]} - {*shown}]
    return f"{text}\n" + textwrap.fill("; ".join(parts), max(width, 40)) + "\n"


def clean(text: str) -> str:
    """Text of any lines that can do nothing to a terminal: hosts, engines and people have a say in what is shown."""
    return "\n".join(printable(line) for line in text.split("\n"))


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need; numbers to the right."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "".join("  ".join(_cells(row, widths)).rstrip() + "\n" for row in rows)


def _cells(row: Sequence[str], widths: Sequence[int]) -> Iterable[str]:
    for text, width in zip(row, widths, strict=True):
        yield text.rjust(width) if text[:1].isdigit() or text == "-" else text.ljust(width)


def natural(name: str) -> list[tuple[int, str]]:
    """A key to sort names by, with spark-10 after spark-9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def count(number: int, what: str) -> str:
    """As "1 Spark", "3 Sparks"."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def colour_wanted() -> bool:
    """Colours only on a terminal."""
    return sys.stdout.isatty()


def names(hosts: Sequence[str]) -> str:
    """Names of hosts, shortened where there are many."""
    return ", ".join(hosts) if len(hosts) <= 8 else f"{', '.join(hosts[:3])} … {hosts[-1]} ({len(hosts)} Sparks)"
