"""Plans and cards in words: the memory bar, the table of models."""

from __future__ import annotations

import re
import sys
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
    return f"{parts} GiB; {room(plan)}; {plan['left_gib']:.1f} GiB left to the host"


def room(plan: Mapping[str, Any]) -> str:
    """What the KV cache holds."""
    return f"{plan['kv_cache_tokens']:,} tokens, {plan['max_concurrency']:.1f} sequences of {plan['max_model_len']:,}"


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
        f"{plan['model']} ({plan['profile']}) with vLLM {plan['engine']}, KV cache in {plan['kv_cache_dtype']}"
        + (f", one of {plan['sparks']} Sparks" if plan.get("sparks", 1) > 1 else ""),
        "",
        f"  [{bar(plan, colour)}] {plan['total_gib']:.1f} GiB",
    ]
    for key, letter, shade, name in PARTS:
        mark = f"\033[{shade}m \033[0m" if colour else letter
        if plan[key]:
            lines.append(f"   {mark} {name:<14}{plan[key]:7.2f} GiB")
    mark = " " if colour else "."
    lines += [
        f"   {mark} {'left to host':<14}{plan['left_gib']:7.2f} GiB of the {plan['available_gib']:.1f} available "
        f"(floor {plan['reserve_gib']:g})",
        "",
        f"  asked for      {plan['requested_gib']:.2f} GiB, utilization {plan['gpu_memory_utilization']:.2f}",
        f"  KV cache       {plan['kv_cache_tokens']:,} tokens, {plan['kv_bytes_per_token']:,} bytes each"
        + (f", in blocks of {plan['kv_block_tokens']:,}" if plan.get("kv_block_tokens", 0) > LONG_BLOCK else ""),
        f"  at a time      {plan['full_length_sequences']} of full length ({plan['max_model_len']:,} tokens), "
        f"or {plan['typical_sequences']} usual ones (4,096)",
        f"  one stream     at most {plan['decode_tok_s_limit']:.1f} tokens a second"
        + (f"; measured {plan['measured_tok_s']:g}" if plan["measured_tok_s"] else ""),
        "",
    ]
    lines.append("  FITS" if plan["fits"] else "  DOES NOT FIT")
    lines += [f"  - {text}" for text in (*plan["reasons"], *plan["notes"])]
    if plan["suggestions"]:
        lines += ["", "  What would fit:" if not plan["fits"] else "  Faster, and fits:"]
        lines += [f"  - {suggestion['text']}" for suggestion in plan["suggestions"]]
    return "\n".join(lines) + "\n"


def models(cards: Sequence[Card], fits: Mapping[str, bool | None]) -> str:
    """The catalogue as a table."""
    rows = [("name", "on the Hub", "GiB", "context", "vLLM", "tok/s", "licence", "seen", "fits")]
    for card in cards:
        speed = max((entry.tok_s for entry in card.measured), default=None)
        rows.append(
            (
                card.name,
                card.repo,
                f"{card.weights.download_gib:.1f}",
                f"{card.shape.context:,}",
                card.engine().text if card.engine().version else "newest",
                f"{speed:.1f}" if speed else "-",
                "accept" if card.licence.gated else "open",
                "yes" if card.verified else "unverified",
                f"{card.sparks} Sparks" if card.sparks > 1 and fits[card.name] is not False else FITS[fits[card.name]],
            )
        )
    return table(rows)


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
