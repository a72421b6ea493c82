"""The memory plan against logs of real hosts, its verdicts, and the ways out it proposes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sparkfleet_host.bounded import GIB

from sparkfleet import SparkfleetError
from sparkfleet.planning import catalog, kv_layout, memory_plan, vllm_versions, weights
from sparkfleet.planning.memory_plan import Memory
from sparkfleet.planning.vllm_versions import Engine
from sparkfleet.reporting import report
from tests.unit import ROOT

V010 = Engine((0, 10, 1, 1))
V011 = Engine((0, 11, 0))  # the first with --kv-cache-memory-bytes
V031 = Engine((0, 31, 0))


def plan(name: str, profile: str = "throughput", host: Memory | None = None, **change: object) -> memory_plan.Plan:
    card = catalog.load(name)
    version = change.pop("version", None)
    arguments = {**card.with_profile(profile), **change}
    return memory_plan.make(
        card,
        arguments,  # type: ignore[arg-type]
        profile=profile,
        version=version,  # type: ignore[arg-type]
        memory=host or Memory(),
        others=lambda: [catalog.load(other) for other in catalog.names()],
    )


@pytest.mark.parametrize(
    ("name", "bytes_per_token", "limit"),
    [
        ("llama31-8b-fp8", 131_072, 34.0),
        ("qwen3-8b-fp8", 147_456, 33.3),
        ("mistral-nemo-12b-fp8", 163_840, 22.3),
        ("qwen3-32b-fp8", 262_144, 8.33),
        ("qwen3-30b-a3b-fp8", 98_304, 81.0),
        ("llama33-70b-fp8", 327_680, 3.87),
    ],
)
def test_bytes_a_token_and_decode_limit_of_the_guides_models(name: str, bytes_per_token: int, limit: float) -> None:
    made = plan(name)
    assert made.kv_bytes_per_token == bytes_per_token
    assert made.decode_tok_s_limit == pytest.approx(limit, rel=0.003)
    assert made.kv_cache_dtype == "bf16"
    assert made.fits


def test_the_budget_adds_up() -> None:
    made = plan("qwen3-32b-fp8")
    parts = made.weights_gib + made.activation_gib + made.runtime_gib + made.cuda_graphs_gib + made.kv_cache_gib
    assert parts == pytest.approx(made.requested_gib) == pytest.approx(0.90 * 119.7)
    assert made.kv_cache_tokens * made.kv_bytes_per_token <= made.kv_cache_gib * GIB
    assert made.max_concurrency == pytest.approx(made.kv_cache_tokens / 32000, rel=1e-3)


def test_the_seventy_billion_model_of_the_guide() -> None:
    made = plan("llama33-70b-fp8")
    assert made.full_length_sequences == 1  # of the 32 that its settings allow
    assert made.typical_sequences < 32
    assert made.decode_tok_s_limit == pytest.approx(3.87, abs=0.01)
    text = " ".join(made.notes)
    assert "one stream cannot be faster than 3.9 tokens a second (measured: 2.74)" in text
    assert "within 10%" in text
    faster = [suggestion.change["model"] for suggestion in made.suggestions]
    assert faster and "llama33-70b" in faster[0]
    assert all(plan(name).decode_tok_s_limit > made.decode_tok_s_limit * 1.5 for name in faster)


def test_versions_differ() -> None:
    old, new = plan("llama31-8b-fp8", version=V010), plan("llama31-8b-fp8", version=V031)
    assert (old.kv_cache_dtype, new.kv_cache_dtype) == ("bf16", "fp8")
    assert (old.kv_bytes_per_token, new.kv_bytes_per_token) == (131_072, 65_536)
    assert old.cuda_graphs_gib == 0 < new.cuda_graphs_gib
    assert plan("llama31-8b-fp8", version=V031, enforce_eager=True).cuda_graphs_gib == 0
    assert any("page cache" in note for note in old.notes)
    assert not any("page cache" in note for note in plan("llama31-8b-fp8", version=Engine((0, 33))).notes)
    refused = plan("llama31-8b-fp8", version=V010, kv_cache_dtype="fp8")
    assert not refused.fits and "no FP8 KV cache on a GB10" in refused.reasons[0]
    assert refused.suggestions[0].change == {"kv_cache_dtype": "auto"}
    assert plan("llama31-8b-fp8", version=V031, kv_cache_dtype="bfloat16").kv_bytes_per_token == 131_072


def test_a_host_with_too_little_free() -> None:
    made = plan("llama31-8b-fp8", host=Memory(119.7, 90.0))
    assert not made.fits
    assert "90.0 GiB are available: it would refuse to start" in made.reasons[0]
    first = made.suggestions[0]
    assert first.kind == "utilization"
    share = first.change["gpu_memory_utilization"]
    assert plan("llama31-8b-fp8", host=Memory(119.7, 90.0), gpu_memory_utilization=share).fits
    assert not plan("llama31-8b-fp8", host=Memory(119.7, 90.0), gpu_memory_utilization=share + 0.01).fits


def test_the_floor_is_never_planned_away() -> None:
    close = Memory(119.7, 0.90 * 119.7 + memory_plan.BEYOND_BUDGET_GIB + 3.9)
    made = plan("llama31-8b-fp8", host=close)
    assert not made.fits and "leaves 3.9 GiB to the host" in made.reasons[0]
    assert plan("llama31-8b-fp8", host=dataclasses.replace(close, reserve=3.0)).fits


def test_a_context_that_does_not_fit_is_shortened() -> None:
    made = plan("llama33-70b-fp8", max_model_len=131072)
    assert not made.fits and "one sequence of 131072 tokens needs 40.0" in made.reasons[0]
    lengths = [way.change["max_model_len"] for way in made.suggestions if way.kind == "context"]
    assert lengths and plan("llama33-70b-fp8", max_model_len=lengths[0]).fits
    assert any(way.kind == "profile" for way in made.suggestions)


def test_a_model_that_is_too_big_for_one_spark() -> None:
    made = plan("llama33-70b-fp8", host=Memory(64.0, 60.0))
    kinds = [way.kind for way in made.suggestions]
    assert "two_sparks" in kinds and "model" in kinds
    change = dict(next(way for way in made.suggestions if way.kind == "model").change)
    assert plan(change.pop("model"), host=Memory(64.0, 60.0), **change).fits


def test_what_is_proposed_fits() -> None:
    """Each way out, taken, is a plan that fits, over a grid of hosts and models."""
    taken = 0
    for name in ("llama31-8b-fp8", "qwen3-32b-fp8", "llama33-70b-fp8"):
        for available in (40.0, 70.0, 90.0, 105.0, 112.0):
            host = Memory(119.7, available)
            for way in plan(name, host=host).suggestions:
                change = dict(way.change)
                if way.kind == "two_sparks":
                    continue
                other, profile = change.pop("model", name), change.pop("profile", "throughput")
                assert plan(other, profile, host=host, **change).fits, (name, available, way)
                taken += 1
    assert taken > 20


def ways(made: memory_plan.Plan, kind: str) -> list[dict[str, Any]]:
    return [dict(way.change) for way in made.suggestions if way.kind == kind]


def test_a_smaller_batch_is_proposed_where_activations_take_too_much() -> None:
    """131,072 tokens at a time take 10.8 GiB for activations, and the cache is too small for one sequence."""
    tight = {"gpu_memory_utilization": 0.2, "max_num_batched_tokens": 131072}
    assert ways(plan("llama31-8b-fp8", **tight), "batch") == [{"max_num_batched_tokens": 16384}]


def test_fewer_sequences_are_proposed_only_where_they_are_fewer() -> None:
    """The sampler's memory grows with the sequences: 4,096 of them take 18.9 GiB."""
    made = plan("llama31-8b-fp8", version=V011, max_num_seqs=4096, kv_cache_memory_bytes=96 * GIB)
    assert ways(made, "sequences") == [{"max_num_seqs": 64}]
    # The largest number that is both fewer and enough, down to 8.
    for sequences, expected in ((64, 32), (32, 16), (16, 8), (8, None)):
        asked = plan("llama31-8b-fp8", max_num_seqs=sequences, max_num_batched_tokens=64)
        room = memory_plan.activation_gib(catalog.load("llama31-8b-fp8"), 64, (expected or 4), V010)
        cache = (
            asked.available_gib
            - 4
            - memory_plan.BEYOND_BUDGET_GIB
            - asked.weights_gib
            - asked.runtime_gib
            - room
            - 1e-4
        )
        tight = plan(
            "llama31-8b-fp8",
            max_num_seqs=sequences,
            max_num_batched_tokens=64,
            kv_cache_memory_bytes=int(cache * GIB),
            version=V011,
        )
        assert not tight.fits
        assert ways(tight, "sequences") == ([{"max_num_seqs": expected}] if expected else [])


def test_a_lower_utilization_is_proposed_with_the_context_that_then_fits() -> None:
    made = plan("llama33-70b-fp8", gpu_memory_utilization=0.95, max_model_len=131072)
    assert ways(made, "utilization") == [] and ways(made, "two_sparks") == []
    assert ways(made, "context") == [{"gpu_memory_utilization": 0.9, "max_model_len": 98304}]
    text = next(way.text for way in made.suggestions if way.kind == "context")
    assert text.startswith("gpu_memory_utilization: 0.9, max_model_len: 98304 (105,360 tokens of KV cache")
    texts = [way.text for way in made.suggestions if way.kind in ("profile", "model")]
    assert texts[0].startswith("profile long_context (") and texts[-1].startswith("model gpt-oss-120b (")
    # Where the utilization alone will do, the context stays.
    alone = plan("llama31-8b-fp8", gpu_memory_utilization=0.95)
    assert ways(alone, "utilization") == [{"gpu_memory_utilization": 0.9}] and ways(alone, "context") == []


def test_two_sparks_are_named_in_words() -> None:
    made = plan("llama33-70b-fp8", host=Memory(64.0, 60.0))
    (text,) = (way.text for way in made.suggestions if way.kind == "two_sparks")
    assert text.startswith("two Sparks, half of the model on each") and "ranks" not in text


def test_contexts_are_proposed_in_steps_that_people_choose() -> None:
    kib = [192, 160, 128, 96, 80, 64, 48, 40, 32, 24, 20, 16, 12, 10, 8, 6, 4]
    assert memory_plan._lengths(1 << 30) == [n << 10 for n in kib]
    assert memory_plan._lengths(8192) == [6144, 4096] and memory_plan._lengths(4096) == []


def test_what_vllm_does_unasked() -> None:
    """Its defaults: 2,048 tokens a batch, 256 sequences, utilization 0.92."""
    card = catalog.load("llama31-8b-fp8")
    said: dict[str, Any] = {"max_num_batched_tokens": 2048, "max_num_seqs": 256, "gpu_memory_utilization": 0.92}
    bare = memory_plan.make(card, {}, version=V010)
    assert bare == memory_plan.make(card, said, version=V010) and bare.max_model_len == card.shape.context
    assert bare.activation_gib == memory_plan.activation_gib(card, 2048, 256, V010)
    one = memory_plan.make(card, {"max_num_seqs": 1}, version=V010)
    assert one.activation_gib == memory_plan.activation_gib(card, 2048, 1, V010) < bare.activation_gib


@pytest.mark.parametrize(("read", "slow"), [(273 / 6.0, False), (273 / 5.99, True)])
def test_below_six_tokens_a_second_a_faster_model_is_proposed(read: float, slow: bool) -> None:
    card = catalog.load("llama31-8b-fp8")
    heavy = dataclasses.replace(card, weights=dataclasses.replace(card.weights, read_gb_per_token=read))
    made = memory_plan.make(heavy, card.with_profile("throughput"), others=lambda: [catalog.load("gpt-oss-20b")])
    assert made.fits and bool(made.suggestions) is slow
    assert any("one stream cannot be faster" in note for note in made.notes) is slow


@pytest.mark.parametrize("version", ["0.20", "0.20.1"])
def test_tokens_of_a_hybrid_are_those_that_fit(version: str) -> None:
    """What vLLM logs before 0.20.1 contradicts the number of sequences."""
    card = catalog.load("qwen35-122b-a10b-nvfp4")
    made = memory_plan.make(card, card.with_profile("throughput"), version=vllm_versions.Engine.parse(version))
    assert made.kv_cache_held_tokens == int(made.max_concurrency * made.max_model_len)
    old = version == "0.20"
    assert (made.kv_cache_tokens < made.kv_cache_held_tokens / 3) is old
    assert any(f"logs this KV cache as {made.kv_cache_tokens:,} tokens" in note for note in made.notes) is old
    assert f"KV cache       {made.kv_cache_held_tokens:,} tokens" in report.page(made.as_dict())


def test_a_draft_is_not_faster_than_the_memory() -> None:
    made = plan("qwen35-122b-a10b-nvfp4")
    assert made.speculative_tokens and (made.measured_tok_s or 0) > made.decode_tok_s_limit
    page = report.page(made.as_dict())
    each = made.speculative_tokens + 1
    assert f"at most {made.decode_tok_s_limit:.1f} passes a second, each of 1 to {each} tokens (speculation); " in page
    assert "tokens a second" in page and "cannot be faster" not in page
    plain = plan("qwen35-122b-a10b-nvfp4", speculative_config=False)
    assert plain.measured_tok_s is None, "what was measured with speculation, beside a plan without"
    assert "at most 3.9 tokens a second; measured 2.74\n" in report.page(plan("llama33-70b-fp8").as_dict())


@pytest.mark.parametrize("memory", [memory_plan.Memory(60.0, 55.5), memory_plan.Memory(119.7, 60.0)])
def test_what_does_not_fit_leaves_nothing_to_the_host(memory: memory_plan.Memory) -> None:
    """Weights beyond the budget; a budget beyond what is available."""
    card = catalog.load("llama33-70b-fp8")
    made = memory_plan.make(card, card.with_profile("throughput"), memory=memory)
    assert not made.fits and made.left_gib < 0
    assert f"left to host     0.00 GiB of the {memory.available:.1f} available" in report.page(made.as_dict())
    assert f"{-made.left_gib:.1f} GiB more than the host has" in report.brief(made.as_dict())


def test_kv_cache_memory_bytes_leaves_the_utilization_aside() -> None:
    made = plan("llama31-8b-fp8", version=V011, kv_cache_memory_bytes=20 * GIB)
    assert made.kv_cache_gib == 20
    assert made.gpu_memory_utilization == pytest.approx(made.requested_gib / 119.7)
    graphs = plan("llama31-8b-fp8", version=V031, kv_cache_memory_bytes=20 * GIB)
    assert graphs.cuda_graphs_gib > 0
    assert graphs.requested_gib == pytest.approx(
        graphs.weights_gib + graphs.activation_gib + graphs.runtime_gib + graphs.cuda_graphs_gib + 20
    )
    assert made.requested_gib == pytest.approx(made.weights_gib + made.activation_gib + made.runtime_gib + 20)


def one_sequence(length: int, batched: int) -> int:
    """Bytes of KV cache that one sequence of llama31-8b-fp8 takes."""
    cut = kv_layout.layout(catalog.load("llama31-8b-fp8"), {"max_num_batched_tokens": batched}, V010)
    return cut.blocks(length) * cut.block_bytes


@pytest.mark.parametrize(("more", "fits"), [(0, True), (-1, False), (-(2 << 20), False)])
def test_a_whole_sequence_must_fit_into_the_cache(more: int, fits: bool) -> None:
    made = plan("llama31-8b-fp8", version=V011, kv_cache_memory_bytes=one_sequence(32768, 16384) + more)
    assert made.fits is fits and (made.max_concurrency >= 1) is fits
    assert made.full_length_sequences == fits
    assert any("one sequence of 32768 tokens needs 4.0" in reason for reason in made.reasons) is not fits


@pytest.mark.parametrize(("share", "sure"), [(1.0, False), (1.09, False), (1.11, True)])
def test_a_cache_that_is_all_but_full_is_noted(share: float, sure: bool) -> None:
    made = plan("llama31-8b-fp8", version=V011, kv_cache_memory_bytes=int(one_sequence(32768, 16384) * share))
    assert made.fits and any("all but fills" in note for note in made.notes) is not sure


def test_what_is_left_to_the_host_is_its_floor_or_more() -> None:
    usual = plan("llama31-8b-fp8", host=Memory(100, 80, 0), gpu_memory_utilization=0.5)
    assert usual.requested_gib == 50 and usual.left_gib == 80 - 50 - memory_plan.BEYOND_BUDGET_GIB
    at_the_floor = Memory(100, 80, usual.left_gib)
    assert plan("llama31-8b-fp8", host=at_the_floor, gpu_memory_utilization=0.5).fits
    below = plan("llama31-8b-fp8", host=Memory(100, 80, usual.left_gib + 0.01), gpu_memory_utilization=0.5)
    assert not below.fits and "in danger of freezing" in below.reasons[0] and len(below.reasons) == 1
    refused = plan("llama31-8b-fp8", host=Memory(100, 49.9, 0), gpu_memory_utilization=0.5)
    assert [reason for reason in refused.reasons if "would refuse to start" in reason] == list(refused.reasons)
    assert not any(
        "refuse" in reason
        for reason in plan("llama31-8b-fp8", host=Memory(100, 50, 0), gpu_memory_utilization=0.5).reasons
    )


@pytest.mark.parametrize(
    ("available", "share"), [(87.5 + 2.8 + 4, 0.87), (87.99 + 2.8 + 4, 0.87), (6.8, 0.0), (1.0, -0.06)]
)
def test_the_highest_share_is_rounded_down(available: float, share: float) -> None:
    """Rounded up, the host would have less than its floor."""
    assert memory_plan.highest_share(Memory(100, available, 4)) == share


def test_activations_are_those_of_the_mlp_or_of_the_sampler() -> None:
    card = catalog.load("llama31-8b-fp8")
    shape = card.shape
    peak = memory_plan.activation_gib
    assert peak(card, 1000, 1, V010) == pytest.approx(1000 * (5 * shape.mlp + 4 * shape.hidden) / GIB)
    assert peak(card, 1000, 1, V031) == pytest.approx(1000 * (5 * shape.mlp + 8 * shape.hidden) / GIB)
    assert peak(card, 1000, 1, V031, v2=True) == pytest.approx(1000 * (7 * shape.mlp + 4 * shape.hidden) / GIB)
    assert peak(card, 1, 256, V010) == pytest.approx(256 * shape.vocab * 38.6 / GIB)
    halved = peak(card, 1000, 1, V031, gpus=2, v2=True)
    assert halved == pytest.approx(1000 * (3.5 * shape.mlp + 4 * shape.hidden) / GIB)
    experts = dataclasses.replace(card, shape=dataclasses.replace(shape, experts_per_token=4))
    mixture = 1000 * (2 * 4 * 3 * shape.mlp + memory_plan.EXPERT_STREAMS * shape.hidden) / GIB
    assert peak(experts, 1000, 1, V010) == pytest.approx(mixture)
    queries = dataclasses.replace(card, shape=dataclasses.replace(shape, quantization="block_fp8", heads=32))
    assert peak(queries, 1000, 1, V010) - peak(card, 1000, 1, V010) == pytest.approx(1000 * 2 * 32 * 128 / GIB)


def test_sequences_are_no_more_than_are_taken_at_a_time() -> None:
    one = plan("llama31-8b-fp8", max_num_seqs=1)
    assert one.full_length_sequences == one.typical_sequences == 1
    assert not any("are kept waiting" in note for note in one.notes)
    many = plan("llama31-8b-fp8", max_num_seqs=1000)
    assert many.full_length_sequences == int(many.max_concurrency) < many.typical_sequences < 1000
    assert any("are kept waiting" in note for note in many.notes)
    # A short context counts with itself, not with the usual request.
    short = plan("llama31-8b-fp8", max_num_seqs=1000, max_model_len=1024)
    assert short.typical_sequences == short.full_length_sequences


def test_a_context_beyond_the_model_s_is_refused_unless_it_is_stretched() -> None:
    long = catalog.load("llama31-8b-fp8").shape.context + 1
    assert "longer than the model's context" in plan("llama31-8b-fp8", max_model_len=long).reasons[0]
    assert not plan("llama31-8b-fp8", max_model_len=long - 1).reasons
    stretched = plan("llama31-8b-fp8", max_model_len=long, hf_overrides={"rope_scaling": {}})
    assert not any("longer than" in reason for reason in stretched.reasons)


def test_graphs_count_from_their_version_on_and_not_where_there_are_none() -> None:
    new = vllm_versions.Engine((0, 21))
    card = catalog.load("llama31-8b-fp8")
    arguments = card.with_profile("throughput")
    assert memory_plan.make(card, arguments, version=new).cuda_graphs_gib == memory_plan.CUDA_GRAPHS_GIB
    assert memory_plan.make(card, {**arguments, "enforce_eager": True}, version=new).cuda_graphs_gib == 0
    assert memory_plan.make(card, arguments, version=vllm_versions.Engine((0, 20, 9))).cuda_graphs_gib == 0


@pytest.mark.parametrize("value", ["nan", "inf", "1e999", "-1", "-5e9", "9" * 400])
def test_figures_of_a_command_that_no_engine_runs_with_count_as_nothing(value: str) -> None:
    for flag in ("--gpu-memory-utilization", "--kv-cache-memory-bytes"):
        assert memory_plan.requested_gib(["vllm", flag, value], 100) == pytest.approx(0, abs=2)


def test_what_a_running_engine_holds() -> None:
    command = ["vllm", "serve", "x", "--gpu-memory-utilization", "0.50"]
    assert memory_plan.requested_gib(command, 100) == 50 + memory_plan.BEYOND_BUDGET_GIB
    assert memory_plan.requested_gib(["vllm", "serve", "x"], 100) == 92 + memory_plan.BEYOND_BUDGET_GIB
    assert memory_plan.requested_gib(["vllm", "serve", "x", "--kv-cache-memory-bytes", str(20 * GIB)], 100) == 20
    assert memory_plan.requested_gib(["vllm", "serve", "x", "--gpu-memory-utilization"], 100) > 92
    assert memory_plan.requested_gib(["vllm", "serve", "x", "--gpu-memory-utilization", "much"], 100) == 0
    for share, held in (("0", 2.8), ("1", 102.8), ("1.001", 0)):  # 0 is held by no engine, but is a number
        assert memory_plan.requested_gib(["vllm", "--gpu-memory-utilization", share], 100) == pytest.approx(held)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("0.10.1.1+381074ae.nv25.09", (0, 10, 1, 1)),
        ("v0.24.0", (0, 24, 0)),
        (" 0.25.1.post1 ", (0, 25, 1)),
        ("0.11.0rc2.dev12+gabc", (0, 11, 0)),
    ],
)
def test_a_version(text: str, numbers: tuple[int, ...]) -> None:
    assert vllm_versions.parse_version(text) == numbers


@pytest.mark.parametrize("text", ["", "0x10", "1.2.", "1..2", "latest", "-1", "9" * 7, "1 2", "\u0661.2"])
def test_what_is_no_version(text: str) -> None:
    with pytest.raises(SparkfleetError, match="is not a version of vLLM"):
        vllm_versions.parse_version(text)


@pytest.mark.parametrize(
    ("image", "version"),
    [
        ("nvcr.io/nvidia/vllm:25.09-py3", (0, 10, 1, 1)),
        ("mirror.example:5000/nvidia/vllm:26.10-py3@sha256:" + "a" * 64, (0, 31, 0)),
        ("vllm/vllm-openai:v0.24.0-aarch64", (0, 24, 0)),
        ("nvcr.io/nvidia/vllm:27.01-py3", ()),
        ("someone/vllm:1", ()),
    ],
)
def test_engine_of_an_image(image: str, version: tuple[int, ...]) -> None:
    assert vllm_versions.of_image(image).version == version


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("vllm/vllm-openai:latest", "names no version"),
        ("vllm/vllm-openai", "names no version"),
        ("docker.io/vllm/vllm-openai:v0.10.0", "does not support the GB10"),
        ("vllm/vllm-openai:v0.24.0-x86_64", "built for x86_64"),
        ("nvcr.io/nvidia/vllm:25.06-py3", "older than 25.09"),
        ("nvcr.io/nvidia/vllm:25.09-py3", ""),
        ("vllm/vllm-openai:v0.24.0", ""),
        ("someone/vllm:1", ""),
    ],
)
def test_images_that_cannot_run(image: str, reason: str) -> None:
    said = vllm_versions.unfit(image)
    assert (reason in said) if reason else said == ""


def test_a_batch_that_holds_a_block_is_proposed_where_vllm_asks_for_one() -> None:
    made = plan("nemotron3-super-120b-a12b-nvfp4", max_num_batched_tokens=8192)
    assert not made.fits and "a block of this model is 8432 tokens long" in made.reasons[0]
    assert ways(made, "batch") == [{"max_num_batched_tokens": 8432}]
    assert plan("nemotron3-super-120b-a12b-nvfp4", max_num_batched_tokens=8432).fits
    assert plan("nemotron3-super-120b-a12b-nvfp4", max_num_batched_tokens=8192, version=Engine((0, 28))).fits


def test_a_loader_that_keeps_memory_is_counted() -> None:
    plain, kept = plan("llama31-8b-fp8"), plan("llama31-8b-fp8", load_format="instanttensor")
    assert plain.kv_cache_gib - kept.kv_cache_gib == pytest.approx(memory_plan.LOADER_GIB["instanttensor"])
    assert plan("llama31-8b-fp8", load_format="fastsafetensors").kv_cache_gib == plain.kv_cache_gib


load = functools.cache(catalog.load)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(catalog.names()),
    total=st.floats(20, 130),
    more=st.floats(0, 20),
    share=st.floats(0.05, 1),
    batched=st.integers(256, 65536),
)
def test_more_memory_never_holds_less(name: str, total: float, more: float, share: float, batched: int) -> None:
    """For every card: figures are never negative, the parts never exceed what is asked for, more memory never hurts."""
    card = load(name)
    arguments = {key: value for key, value in card.arguments.items() if key != "kv_cache_memory_bytes"}
    arguments |= {"gpu_memory_utilization": share, "max_num_batched_tokens": batched}
    small, large = (memory_plan.make(card, arguments, memory=Memory(host, host)) for host in (total, total + more))
    for made in (small, large):
        assert min(made.kv_cache_gib, made.kv_cache_tokens, made.max_concurrency, made.kv_blocks) >= 0
        assert made.kv_blocks * made.kv_block_bytes <= made.kv_cache_gib * GIB + 1
        parts = made.weights_gib + made.activation_gib + made.runtime_gib + made.cuda_graphs_gib + made.kv_cache_gib
        assert parts == pytest.approx(made.requested_gib) or made.kv_cache_gib == 0
        assert not made.fits or made.max_concurrency >= 1
    assert small.kv_cache_tokens <= large.kv_cache_tokens or arguments.get("max_model_len") == "auto"


def test_weights_by_their_formats() -> None:
    """As vLLM counts Llama-3.1-8B in FP8 on the meta device, 8.458 GiB, and what it logs more."""
    linear = 32 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336) / 1e9
    made = weights.gib({"fp8": linear, "bf16": 2 * 128256 * 4096 / 1e9})
    assert made == pytest.approx(8.51, abs=0.06)
    assert weights.gib({"nvfp4": 16}) == pytest.approx(16e9 * 0.5625 / GIB + weights.BUFFERS_GIB)
    assert weights.gib({"mxfp4": 32}) < weights.gib({"nvfp4": 32}) < weights.gib({"block_fp8": 32})
    sizes = catalog.Weights(download_gib=9.0, read_gb_per_token=8.0, parameters={"fp8": 8.0})
    assert sizes.memory_gib == weights.gib({"fp8": 8.0})
    assert dataclasses.replace(sizes, loaded_gib=7.7).memory_gib == 7.7
    assert dataclasses.replace(sizes, parameters={}).memory_gib == 9.0


ENCODER = str(ROOT / "simulator" / "cards" / "all-minilm-l6-v2.yml")


def test_an_encoder_keeps_no_kv_cache_and_takes_less_than_it_requests() -> None:
    made = plan(ENCODER)
    assert made.fits and (made.kv_cache_gib, made.kv_cache_tokens, made.kv_block_bytes) == (0.0, 0, 0)
    taken = made.weights_gib + made.activation_gib + made.runtime_gib
    assert made.left_gib == pytest.approx(made.available_gib - taken - memory_plan.BEYOND_BUDGET_GIB)
    assert made.requested_gib == pytest.approx(0.1 * made.total_gib) and taken < 3
    assert made.decode_tok_s_limit == 0 and not made.suggestions
    # No sampler: the number of sequences changes nothing.
    assert plan(ENCODER, max_num_seqs=1024).activation_gib == made.activation_gib
    page, brief = report.page(made.as_dict()), report.brief(made.as_dict())
    assert "no KV cache" in page and "at a time      32 of up to 256 tokens" in page and "one stream" not in page
    assert "no KV cache, 32 sequences of 256 at a time" in brief


def test_an_encoder_starts_only_where_what_it_requests_is_available() -> None:
    made = plan(ENCODER, host=Memory(available=11.0))
    assert not made.fits and "vLLM requests 12.0 GiB" in made.reasons[0]
    assert any(suggestion.kind == "utilization" for suggestion in made.suggestions)
    made = plan(ENCODER, host=Memory(available=7.0), gpu_memory_utilization=0.03)
    assert not made.fits and "leaves 1.6 GiB to the host" in made.reasons[0]


def test_an_encoder_beside_another_engine() -> None:
    engines = []
    for name in ("llama31-8b-fp8", ENCODER):
        card = catalog.load(name)
        engines.append((card, card.with_profile("throughput"), card.engine()))
    large, small = memory_plan.shares(engines, Memory())
    assert large + small <= 1 and small * memory_plan.USUAL_TOTAL_GIB >= plan(ENCODER).weights_gib + 2.5


def test_layers_of_an_encoder_beside_others_are_refused() -> None:
    card = catalog.load(ENCODER)
    mixed = (*card.shape.attention, catalog.Attention("full", 1, kv_heads=1, head_dim=64))
    odd = dataclasses.replace(card, shape=dataclasses.replace(card.shape, attention=mixed))
    with pytest.raises(SparkfleetError, match="kind encoder beside others"):
        memory_plan.make(odd, odd.arguments)


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_a_stage_of_a_pipeline_holds_its_layers_and_an_end_of_the_model(stages: int) -> None:
    whole, made = plan("llama33-70b-fp8"), plan("llama33-70b-fp8", pipeline_parallel_size=stages)
    card = catalog.load("llama33-70b-fp8")
    sizes: dict[str, Any] = {"pipeline_parallel_size": stages}
    each = [memory_plan.stage_gib(card, sizes, stage) for stage in kv_layout.stages(card, sizes)]
    end = card.shape.vocab * card.shape.hidden * 2 / GIB
    # Embedding and output layer, in case that they are one tensor, are there twice.
    assert sum(each) == pytest.approx(card.weights.memory_gib + end)
    assert made.sparks == stages and made.weights_gib in each
    assert made.kv_bytes_per_token == pytest.approx(whole.kv_bytes_per_token / stages, rel=0.02)
    # All stages have as many blocks as the one that has room for the fewest.
    tokens = [
        memory_plan._of_stage(
            card, {**card.arguments, **sizes}, "throughput", card.engine(), Memory(), stage
        ).kv_cache_tokens
        for stage in kv_layout.stages(card, sizes)
    ]
    assert made.kv_cache_tokens == min(tokens) > whole.kv_cache_tokens
    assert made.weights_gib == each[tokens.index(min(tokens))]
    # One stage after the other reads its weights.
    assert made.decode_tok_s_limit == whole.decode_tok_s_limit
    assert f"planned for each of {stages} Sparks: 1 for each of {stages} stages of layers" in made.notes


def test_tensor_and_pipeline_parallelism_together() -> None:
    made = plan("llama33-70b-fp8", pipeline_parallel_size=2, tensor_parallel_size=2)
    half, two = plan("llama33-70b-fp8", tensor_parallel_size=2), plan("llama33-70b-fp8", pipeline_parallel_size=2)
    assert made.sparks == 4 and made.weights_gib == pytest.approx(two.weights_gib / 2)
    assert made.decode_tok_s_limit == half.decode_tok_s_limit
    assert made.kv_bytes_per_token == half.kv_bytes_per_token // 2


def test_a_stage_that_is_not_the_first_keeps_what_is_handed_to_it() -> None:
    card = catalog.load("llama33-70b-fp8")
    arguments: dict[str, Any] = {**card.arguments, "pipeline_parallel_size": 2}
    first, last = (
        memory_plan._of_stage(card, arguments, "throughput", card.engine(), Memory(), stage)
        for stage in kv_layout.stages(card, arguments)
    )
    assert last.activation_gib - first.activation_gib == pytest.approx(32768 * 8192 * 8 / GIB)


def test_ray_takes_memory_besides_the_engine() -> None:
    sizes = {"tensor_parallel_size": 2}
    alone, ray = (
        plan("llama33-70b-fp8", **sizes, **more)  # type: ignore[arg-type]
        for more in ({}, {"distributed_executor_backend": "ray"})
    )
    assert alone.left_gib - ray.left_gib == pytest.approx(memory_plan.RAY_GIB)
    assert alone.kv_cache_gib == ray.kv_cache_gib
    share = memory_plan.highest_share(Memory(), memory_plan.beyond_budget_gib({"distributed_executor_backend": "ray"}))
    assert 0 < memory_plan.highest_share(Memory()) - share <= 0.02


def test_models_that_are_not_planned_over_a_pipeline() -> None:
    for name in ("gpt-oss-120b", "qwen36-27b-nvfp4", "gemma4-31b-nvfp4"):
        with pytest.raises(SparkfleetError, match="pipeline_parallel_size 2: the planner"):
            plan(name, pipeline_parallel_size=2)
