"""What `tune` may change of an engine, and the values that it tries."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from sparkfleet_host.bounded import printable

from sparkfleet import SparkfleetError
from sparkfleet.performance.search import LATENCY, Dimension, around
from sparkfleet.planning import kv_layout, memory_plan

SEQUENCES, BATCHED, UTILIZATION = "max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization"
KV_DTYPE, SPECULATIVE, LOADER = "kv_cache_dtype", "speculative_tokens", "load_format"
#: In the order in which they are tried: first what usually matters most.
NAMES = (SEQUENCES, BATCHED, SPECULATIVE, KV_DTYPE, UTILIZATION, LOADER)
_FOR_LATENCY = (SPECULATIVE, BATCHED, KV_DTYPE, SEQUENCES, UTILIZATION, LOADER)
KV_DTYPES = ("auto", "fp8")
LOADERS = ("auto", "fastsafetensors", "runai_streamer")
#: Tokens that are drafted at most.
MOST_DRAFTED = 8
_FACTORS = (0.25, 0.5, 2.0, 4.0)


def dimensions(
    arguments: Mapping[str, Any], objective: str, only: Sequence[str] = (), loader: bool = True
) -> list[Dimension]:
    """The dimensions of the search from an engine's arguments; `only` those named; `loader`: whether how weights are
    loaded can be seen (dummy weights are not). Raises SparkfleetError for a name that is none."""
    for name in only:
        if name not in NAMES:
            raise SparkfleetError(f"--search {printable(name, 60)}: there are {', '.join(NAMES)}")
    made = []
    for name in _FOR_LATENCY if objective == LATENCY else NAMES:
        if (only and name not in only) or (name == LOADER and not loader):
            continue
        values, start = _values(name, arguments)
        if len(values) > 1:
            made.append(Dimension(name, values, start, name not in (KV_DTYPE, LOADER), of_start=name == LOADER))
        elif name in only:
            raise SparkfleetError(f"--search {name}: this model has one value only ({values[0] if values else 'none'})")
    if not made:
        raise SparkfleetError("there is nothing to search")
    return made


def _values(name: str, arguments: Mapping[str, Any]) -> tuple[tuple[Any, ...], int]:
    if name == SEQUENCES:
        return around(int(arguments.get(name) or memory_plan.DEFAULT_SEQUENCES), _FACTORS, 1, 1024)
    if name == BATCHED:
        least = 1 if arguments.get("enable_chunked_prefill", True) else int(arguments.get("max_model_len") or 1)
        default = int(arguments.get(name) or kv_layout.DEFAULT_BATCHED_TOKENS)
        return around(default, _FACTORS, max(256, least), 65536)
    if name == UTILIZATION:
        if "kv_cache_memory_bytes" in arguments:
            return (), 0
        share = round(float(arguments.get(name) or memory_plan.DEFAULT_UTILIZATION), 3)
        near = (round(min(max(share + step, 0.05), 0.95), 3) for step in (-0.1, -0.05, 0.05, 0.1))
        shares = sorted({share, *near})
        return tuple(shares), shares.index(share)
    if name == SPECULATIVE:
        given = arguments.get("speculative_config")
        count = given.get("num_speculative_tokens") if isinstance(given, Mapping) else None
        if not isinstance(count, int):
            return (), 0
        return tuple(range(min(MOST_DRAFTED, count + 2) + 1)), count
    known = KV_DTYPES if name == KV_DTYPE else LOADERS
    word = str(arguments.get(name) or "auto")
    found = known if word in known else (word, *known)
    return found, found.index(word)


def overrides(arguments: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `vllm serve` for settings of the search: those that differ from what the engine has."""
    made: dict[str, Any] = {}
    for name, value in settings.items():
        if name == SPECULATIVE:
            given = copy.deepcopy(arguments["speculative_config"])
            if value != given["num_speculative_tokens"]:
                made["speculative_config"] = {**given, "num_speculative_tokens": value} if value else False
        elif value != _default(name, arguments):
            made[name] = value
    sequences = made.get(SEQUENCES, _default(SEQUENCES, arguments))
    batched = made.get(BATCHED, _default(BATCHED, arguments))
    # vLLM refuses a batch of fewer tokens than sequences.
    return {**made, BATCHED: sequences} if sequences > batched else made


def _default(name: str, arguments: Mapping[str, Any]) -> Any:
    values, start = _values(name, arguments)
    return values[start] if values else None


def words(settings: Mapping[str, Any]) -> str:
    """Settings in a line."""
    return ", ".join(f"{name} {value}" for name, value in settings.items())
