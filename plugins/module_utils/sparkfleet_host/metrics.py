# SPDX-License-Identifier: Apache-2.0
"""vLLM's metrics, read from Prometheus text in time that grows with its length alone.

https://prometheus.io/docs/instrumenting/exposition_formats/ is the format. What is not of it is left out, and so is a
value that is not finite: NaN is unequal to itself, and a counter of NaN would seem to move.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator

LIMIT = 8 << 20  # bytes of /metrics that are read; an engine's are about 100 KiB
LINE = 16 << 10  # characters of a line; longer ones are left out
LINES = 100_000

_NAME = re.compile(r"[A-Za-z_:][A-Za-z0-9_:]*")
# No two branches begin with the same character, so nothing is tried twice.
_LABELS = re.compile(r'\{(?:[^"}]|"(?:[^"\\]|\\.)*")*\}')
_VALUE = re.compile(r"[+-]?(?:\d{1,400}(?:\.\d{0,400})?|\.\d{1,400})(?:[eE][+-]?\d{1,4})?", re.ASCII)


def samples(text: str) -> Iterator[tuple[str, str, float]]:
    """Name, labels with their braces ("" for none) and value of each sample, in the order of the text."""
    for count, line in enumerate(text.split("\n")):
        if count >= LINES:
            return
        if len(line) > LINE or not (found := _NAME.match(line)):
            continue
        rest, labels = line[found.end() :].lstrip(" \t"), ""
        if rest.startswith("{"):
            inside = _LABELS.match(rest)
            if not inside:
                continue
            rest, labels = rest[inside.end() :], inside[0]
        words = rest.split(None, 2)  # value, perhaps a time
        if not words or (len(words) > 1 and words[1] != "#" and not words[1].lstrip("-").isdecimal()):
            continue
        if len(words[0]) <= 400 and _VALUE.fullmatch(words[0]) and math.isfinite(value := float(words[0])):
            yield found[0], labels, value


def short_name(name: str) -> str:
    """A name of vLLM without what differs between its versions: `vllm:` or (under Ray) `ray_vllm_` before it, and
    `_total` after it; "" for another's."""
    for prefix in ("vllm:", "vllm_", "ray_vllm:", "ray_vllm_"):
        if name.startswith(prefix):
            name = name[len(prefix) :]
            break
    else:
        return ""
    while name.endswith("_total"):
        name = name[: -len("_total")]
    return name


def sums(text: str, wanted: Collection[str]) -> dict[str, float]:
    """The metrics of `wanted` (by their short names), each summed over its label sets; without those that are absent
    or whose sum is not finite."""
    found: dict[str, float] = {}
    for name, _, value in samples(text):
        short = short_name(name)
        if short in wanted:
            found[short] = found.get(short, 0.0) + value
    return {name: value for name, value in found.items() if math.isfinite(value)}
