"""The search of `tune`: what it asks, what it finds, and of how many of a grid's values it needs the figures."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkfleet import SparkfleetError
from sparkfleet.performance import search, space
from sparkfleet.performance.search import Climb, Dimension, Result, Settings

ARGUMENTS = {
    **{"max_num_seqs": 16, "max_num_batched_tokens": 8192, "gpu_memory_utilization": 0.85, "max_model_len": 8192},
}


def climbed(
    dimensions: Sequence[Dimension], measure: Callable[[Settings], Result], limit: float | None = None
) -> tuple[Settings, list[Settings]]:
    climb = Climb(dimensions, limit)
    steps, asked = climb.steps(), []
    try:
        wanted = next(steps)
        while True:
            asked.append(wanted)
            wanted = steps.send(measure(wanted))
    except StopIteration:
        return climb.best, asked


def hill(peaks: dict[str, float], noise: float = 0.0, seed: int = 0) -> Callable[[Settings], Result]:
    """Tokens a second with one peak in each number's logarithm; FP8 gives a tenth more."""
    dice = random.Random(seed)  # noqa: S311

    def measure(settings: Settings) -> Result:
        value = 100.0
        for name, peak in peaks.items():
            value *= math.exp(-(math.log2(settings[name] / peak) ** 2) / 12)
        value *= 1.1 if settings.get("kv_cache_dtype") == "fp8" else 1.0
        return Result(value * math.exp(dice.gauss(0, noise)), noise, 100.0, 50.0)

    return measure


PEAKS = {"max_num_seqs": 64, "max_num_batched_tokens": 4096, "gpu_memory_utilization": 0.85}


def test_it_finds_the_peak_of_a_grid_with_few_runs() -> None:
    dimensions = space.dimensions(ARGUMENTS, "throughput", loader=False)
    best, asked = climbed(dimensions, hill(PEAKS))
    assert best == {
        **{"max_num_seqs": 64, "max_num_batched_tokens": 4096, "kv_cache_dtype": "fp8"},
        "gpu_memory_utilization": 0.85,
    }
    grid = math.prod(len(dimension.values) for dimension in dimensions)
    assert len(asked) <= 12 < grid == 250
    assert asked[0] == {dimension.name: dimension.values[dimension.start] for dimension in dimensions}
    assert len({search.key(settings) for settings in asked}) == len(asked)  # nothing is measured twice


@pytest.mark.parametrize("seed", range(20))
def test_noise_costs_little(seed: int) -> None:
    """With 1% of noise the best that it finds is within a tenth of the grid's best."""
    dimensions = space.dimensions(ARGUMENTS, "throughput", loader=False)
    best, asked = climbed(dimensions, hill(PEAKS, 0.01, seed))
    exact = hill(PEAKS)
    values = itertools.product(*(dimension.values for dimension in dimensions))
    names = [dimension.name for dimension in dimensions]
    top = max(exact(dict(zip(names, point, strict=True))).value for point in values)
    assert exact(best).value > 0.9 * top and len(asked) <= 16


def test_a_flat_ground_leaves_the_default() -> None:
    dimensions = space.dimensions(ARGUMENTS, "throughput")
    best, asked = climbed(dimensions, lambda _: Result(50.0, 0.01, 100.0, 60.0))
    assert best == asked[0]


def test_what_does_not_fit_is_passed_over() -> None:
    dimensions = space.dimensions(ARGUMENTS, "throughput", ["max_num_seqs"])
    best, asked = climbed(
        dimensions,
        lambda s: Result(failed="does not fit") if s["max_num_seqs"] > 32 else Result(float(s["max_num_seqs"])),
    )
    assert best == {"max_num_seqs": 32} and [one["max_num_seqs"] for one in asked] == [16, 32, 64]


def test_the_first_token_comes_first() -> None:
    """More sequences make more tokens and a later first token: the most that keep the limit win, whatever the default
    does."""

    def measure(settings: Settings) -> Result:
        return Result(10.0 * settings["max_num_seqs"], 0.0, 20.0 * settings["max_num_seqs"])

    dimensions = space.dimensions(ARGUMENTS, "throughput", ["max_num_seqs"])
    for limit, wanted in ((None, 64), (640.0, 32), (330.0, 16), (165.0, 8), (80.0, 4), (1.0, 4)):
        assert climbed(dimensions, measure, limit)[0] == {"max_num_seqs": wanted}


def test_a_loader_is_judged_by_the_start() -> None:
    ready = {"auto": 100.0, "fastsafetensors": 0.0, "runai_streamer": 60.0}

    def measure(settings: Settings) -> Result:
        loader = settings["load_format"]
        return Result(50.0, 0.01, 1.0, ready[loader]) if ready[loader] else Result(failed="not installed")

    best, asked = climbed(space.dimensions(ARGUMENTS, "throughput", ["load_format"]), measure)
    assert best == {"load_format": "runai_streamer"} and len(asked) == 3
    slow = Result(40.0, 0.01, 1.0, 60.0)
    best, _ = climbed(
        space.dimensions(ARGUMENTS, "throughput", ["load_format"]),
        lambda settings: measure(settings) if settings["load_format"] == "auto" else slow,
    )
    assert best == {"load_format": "auto"}


@given(st.dictionaries(st.integers(0, 4), st.tuples(st.floats(0, 1e3), st.floats(0, 1), st.none() | st.floats(0, 1e3))))
def test_it_ends_whatever_it_is_told(told: dict[int, Any]) -> None:
    values = itertools.cycle([*told.values(), None])

    def measure(_: Settings) -> Result:
        found = next(values)
        return Result(*found) if found else Result(failed="x")

    best, asked = climbed(space.dimensions(ARGUMENTS, "throughput"), measure, 100.0)
    assert len(asked) <= 60 and search.key(best) in {search.key(one) for one in asked}


def test_results_of_repetitions() -> None:
    rows = [
        {"tokens_per_second": value, "ttft_p95_ms": 100.0 + value, "request_p50_ms": 500.0} for value in (9.0, 11.0)
    ]
    made = search.of_rows(rows, "throughput", 55.0)
    assert made == Result(10.0, 0.1, 110.0, 55.0)
    assert search.of_rows(rows, "latency").value == 2.0
    assert search.of_rows([], "throughput").failed and search.of_rows([{"ttft_ms": 1.0}], "latency").failed
    assert not search.better(Result(10.5, 0.05), Result(10.0, 0.05), None)  # within twice the noise
    assert search.better(Result(10.5, 0.001), Result(10.0, 0.001), None)


def test_what_can_be_searched() -> None:
    names = [dimension.name for dimension in space.dimensions(ARGUMENTS, "throughput")]
    assert names == [
        *("max_num_seqs", "max_num_batched_tokens", "kv_cache_dtype"),
        "gpu_memory_utilization",
        "load_format",
    ]
    more = {**ARGUMENTS, "speculative_config": {"method": "mtp", "num_speculative_tokens": 2}}
    first = space.dimensions(more, "latency")[0]
    assert (first.name, first.values, first.start) == ("speculative_tokens", (0, 1, 2, 3, 4), 2)
    fixed = {**ARGUMENTS, "kv_cache_memory_bytes": 1 << 30}
    assert "gpu_memory_utilization" not in [one.name for one in space.dimensions(fixed, "throughput")]
    with pytest.raises(SparkfleetError, match="--search batch: there are max_num_seqs"):
        space.dimensions(ARGUMENTS, "throughput", ["batch"])
    with pytest.raises(SparkfleetError, match="speculative_tokens: this model has one value only"):
        space.dimensions(ARGUMENTS, "throughput", ["speculative_tokens"])


def test_only_what_differs_is_set() -> None:
    more = {**ARGUMENTS, "speculative_config": {"method": "mtp", "num_speculative_tokens": 2}}
    settings = {dimension.name: dimension.values[dimension.start] for dimension in space.dimensions(more, "throughput")}
    assert space.overrides(more, settings) == {}
    assert space.overrides(more, {**settings, "max_num_seqs": 64}) == {"max_num_seqs": 64}
    assert space.overrides(more, {**settings, "speculative_tokens": 3}) == {
        "speculative_config": {"method": "mtp", "num_speculative_tokens": 3}
    }
    assert space.overrides(more, {**settings, "speculative_tokens": 0}) == {"speculative_config": False}
    # vLLM refuses a batch of fewer tokens than sequences.
    small = {"max_num_seqs": 256, "max_num_batched_tokens": 512}
    assert space.overrides(small, {"max_num_seqs": 1024}) == {"max_num_seqs": 1024, "max_num_batched_tokens": 1024}
