"""The memory plan against what vLLM logged on real Sparks (docs/logged-runs.yml)."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from sparkfleet_host.bounded import GIB

from sparkfleet.planning import memory_plan
from sparkfleet.planning.catalog import load
from tests.unit.planning import logged_runs

RUNS = logged_runs.load()


@pytest.mark.parametrize("run", RUNS["runs"], ids=lambda run: str(run["name"]))
def test_kv_cache_within_ten_percent(run: dict[str, Any]) -> None:
    plan = logged_runs.plan(run)
    for key, value in run["logged"].items():
        assert getattr(plan, key) == pytest.approx(value, rel=memory_plan.ERROR), key


@pytest.mark.parametrize("run", RUNS["runs"], ids=lambda run: str(run["name"]))
def test_tokens_follow_exactly_from_the_logged_gib(run: dict[str, Any]) -> None:
    """Apart from the budget, the layout: bytes a token, groups, windows."""
    logged = run["logged"]
    if "kv_cache_tokens" not in logged:
        pytest.skip("its layout is not one the planner knows")
    plan = logged_runs.plan(run, kv_cache_memory_bytes=int(logged["kv_cache_gib"] * GIB))
    assert plan.kv_cache_tokens == pytest.approx(logged["kv_cache_tokens"], rel=0.002)
    if "max_concurrency" in logged:
        assert plan.max_concurrency == pytest.approx(logged["max_concurrency"], rel=0.002)


@pytest.mark.parametrize("entry", RUNS["layouts"], ids=lambda entry: str(entry["name"]))
def test_printed_tokens_follow_from_the_size_of_the_cache(entry: dict[str, Any]) -> None:
    """To the token; GiB is printed with two decimals."""
    least, most = (logged_runs.layout_tokens(entry, off) for off in (-0.005, 0.005))
    if entry.get("fork"):
        assert not least <= entry["tokens"] <= most, "no longer another layout: drop `fork`"
    elif entry.get("rank") == "unknown":  # the log is of one rank, the pool that of the one with less
        assert most == pytest.approx(entry["tokens"], rel=0.01)
    else:
        assert least <= entry["tokens"] <= most


@pytest.mark.parametrize("run", logged_runs.load_gpu_runs(), ids=lambda run: str(run["id"]))
def test_a_cuda_engine_with_dummy_weights(run: dict[str, Any]) -> None:
    """Tokens and concurrency exact for the engine's own bytes. Its KV cache within 3% once the logged memory outside
    torch replaces RUNTIME_GIB, of which a GPU with its own memory needs a tenth."""
    logged = run["logged"]
    exact = logged_runs.gpu_plan(run, kv_cache_memory_bytes=logged["kv_available_bytes"])
    assert exact.kv_blocks == logged["num_blocks"]
    assert exact.kv_cache_tokens == logged["kv_cache_tokens"]
    assert exact.max_concurrency == pytest.approx(logged["max_concurrency"], abs=0.006)
    made = logged_runs.gpu_plan(run)
    more = memory_plan.RUNTIME_GIB - logged["non_torch_gib"]
    assert made.kv_cache_gib + more == pytest.approx(logged["kv_cache_gib"], rel=0.03)
    assert made.kv_cache_gib <= logged["kv_cache_gib"]


@pytest.mark.parametrize("total", [119.7, 121.69])
def test_the_guides_run_with_either_total(total: float) -> None:
    """Its log does not tell the total; both that are seen give what it logged, within 10%."""
    run = RUNS["runs"][0] | {"total_gib": total}
    assert logged_runs.plan(run).kv_cache_gib == pytest.approx(66.25, rel=memory_plan.ERROR)


def test_at_least_three_runs_were_kept_aside() -> None:
    assert sum(run["use"] == "check" for run in RUNS["runs"]) >= 3


@pytest.mark.parametrize("entry", RUNS["sums"], ids=lambda entry: str(entry["name"]))
def test_the_engines_own_sum(entry: dict[str, Any]) -> None:
    left = memory_plan.kv_cache_gib(
        *(entry[key] for key in ("gpu_memory_utilization", "total_gib", "consumed_gib", "activation_gib"))
    )
    assert left == pytest.approx(entry["kv_cache_gib"], abs=0.02)


@pytest.mark.parametrize(
    "entry", RUNS["starts"], ids=lambda entry: f"{entry['name']} {entry['gpu_memory_utilization']}"
)
def test_whether_the_engine_starts(entry: dict[str, Any]) -> None:
    """vLLM's own condition, which is the plan's with a floor far below zero."""
    host = memory_plan.Memory(entry["total_gib"], entry["free_gib"], reserve=-100)
    card = load("qwen3-30b-a3b-fp8")
    arguments = {**card.arguments, "gpu_memory_utilization": entry["gpu_memory_utilization"]}
    plan = memory_plan.make(card, arguments, memory=host)
    assert plan.fits is entry["started"]
    # With the floor none of these is accepted: too close to a freeze.
    assert not memory_plan.make(card, arguments, memory=dataclasses.replace(host, reserve=4.0)).fits


@pytest.mark.parametrize("entry", RUNS["activations"], ids=lambda entry: str(entry["name"]))
def test_activations_grow_with_batched_tokens(entry: dict[str, Any]) -> None:
    card = load("qwen3-32b-fp8")
    few, many = (memory_plan.activation_gib(card, tokens, 1, card.engine()) for tokens in entry["tokens"])
    logged_few, logged_many = entry["peak_gib"]
    assert many / few == pytest.approx(logged_many / logged_few, rel=memory_plan.ERROR)
