# SPDX-License-Identifier: Apache-2.0
"""The figures that vLLM logs as it starts: memory in GiB, the KV cache, times in seconds.

Formats are those of vLLM 0.10.1.1 (NGC 25.09), 0.1x, 0.2x and 0.32, GPU and CPU builds. What a version does not log,
or only at the level DEBUG (activations, memory besides torch), is missing from the result.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

LINE = 8192  # characters of a line that are read
#: Of each figure the last line that matches counts.
FIGURES = {
    "weights_gib": r"Model loading took ([\d.]+) GiB",
    "load_s": r"(?:Model loading took [\d.]+ GiB(?: memory)? and|Loading weights took) ([\d.]+) s",
    "activation_gib": r"([\d.]+) GiB for peak activation",
    "non_torch_gib": r"([-\d.]+) GiB for non-torch memory",
    "cuda_graphs_gib": (
        r"([-\d.]+) GiB for CUDAGraph memory|Graph capturing finished in [\d.]+ secs?, took ([-\d.]+) GiB"
    ),
    "kv_cache_gib": r"Available KV cache memory: ([-\d.]+) GiB|(?:Auto|Explicitly) set \(([\d.]+)/[\d.]+\) GiB for KV",
    "kv_cache_tokens": r"KV cache size: ([\d,]+) tokens",
    "max_concurrency": r"Maximum concurrency for [\d,]+ tokens per request: ([\d.]+)x",
    "torch_compile_s": r"torch\.compile (?:took|takes) ([\d.]+) s in total",
    "graph_capture_s": r"Graph capturing finished in ([\d.]+) sec",
    "init_engine_s": r"init engine .*? took ([\d.]+) s",
}
#: Those that are whole numbers.
WHOLE = frozenset(("kv_cache_tokens",))
VERSION = r"Initializing a V\d LLM engine \(v([\w.+-]{1,60})\)"
_PATTERNS = {key: re.compile(pattern) for key, pattern in FIGURES.items()}
_VERSION = re.compile(VERSION)
#: Words that every pattern needs one of: most lines have none.
_LIKELY = re.compile(r" took | takes |GiB|tokens|LLM engine")


def number(text: str) -> float | None:
    """A number of a log line; None for what only looks like one (`1.2.3`, hundreds of digits)."""
    plain = text.replace(",", "")
    return float(plain) if re.fullmatch(r"-?\d{1,15}(\.\d{0,15})?", plain, re.ASCII) else None


def figures(lines: Iterable[str]) -> dict[str, float | int]:
    """What the lines of one start show, by the names of FIGURES; of a start that failed what there is."""
    found: dict[str, float | int] = {}
    for line in lines:
        text = line[:LINE]
        if not _LIKELY.search(text):
            continue
        for key, pattern in _PATTERNS.items():
            hit = pattern.search(text)
            value = number(next(filter(None, hit.groups()), "")) if hit else None
            if value is not None:
                found[key] = int(value) if key in WHOLE else value
    return found


def version(lines: Iterable[str]) -> str:
    """The version that vLLM logs; "" for none."""
    return next((hit[1] for line in lines if (hit := _VERSION.search(line[:LINE]))), "")
