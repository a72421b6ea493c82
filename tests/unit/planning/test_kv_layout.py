"""How the KV cache is laid out, against vLLM's own figures and as properties."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sparkfleet_host.bounded import GIB

from sparkfleet import SparkfleetError
from sparkfleet.planning import catalog, kv_layout, vllm_versions
from sparkfleet.planning.catalog import Attention, Card, Draft
from sparkfleet.planning.vllm_versions import Engine

GDN = Attention("gdn", 30, key_heads=16, key_dim=128, value_heads=32, value_dim=128, conv=4)
FULL = Attention("full", 10, kv_heads=2, head_dim=256)
MAMBA2 = Attention("mamba2", 40, heads=128, head_dim=64, state=128, groups=8, conv=4, chunk=128)
V025, V028, V032 = Engine((0, 25, 1)), Engine((0, 28, 0)), Engine((0, 32, 0))


def model(*entries: Attention, **shape: Any) -> Card:
    """A card with these layers and nothing else of its own."""
    card = catalog.load("llama31-8b-fp8")
    layers = sum(entry.layers for entry in entries)
    changed = dataclasses.replace(card.shape, attention=entries, layers=layers, kv_cache_dtype="auto", **shape)
    return dataclasses.replace(card, shape=changed, arguments={})


def cut(card: Card, version: Engine = V025, **arguments: Any) -> kv_layout.Layout:
    return kv_layout.layout(card, arguments, version)


def mtp(tokens: int, **more: Any) -> dict[str, Any]:
    return {"speculative_config": {"method": "mtp", "num_speculative_tokens": tokens, **more}}


def test_full_attention_is_one_group_of_blocks_of_sixteen_tokens() -> None:
    made = cut(model(Attention("full", 32, 8, 128)))
    assert (made.block, made.block_bytes, made.bytes_per_token) == (16, 16 * 32 * 4096, 131_072)
    assert made.blocks(32768) == 2048 and made.blocks(1) == 1


def test_sliding_windows_cost_little_and_stay_bounded() -> None:
    half = model(Attention("full", 16, 8, 128), Attention("sliding", 16, 8, 128, window=1024))
    made = cut(half, max_num_batched_tokens=2048)
    assert made.bytes_per_token == 65_536
    # vLLM: the window, a batch that is being computed, and one block more
    assert made.blocks(131072) == 131072 // 16 + -(-(1023 + 2048) // 16) + 1
    assert made.blocks(512) == 512 // 16 + 512 // 16 + 1
    assert made.block_bytes == 16 * 16 * 2 * 8 * 128 * 2
    # from 0.26 on two batches are in flight, unless they are computed one after the other
    newer = cut(half, V028, max_num_batched_tokens=2048)
    assert newer.blocks(131072) - made.blocks(131072) == 2048 // 16
    assert cut(half, V028, max_num_batched_tokens=2048, async_scheduling=False).blocks(131072) == made.blocks(131072)


def test_kinds_of_different_size_share_a_page() -> None:
    """Gemma-4-31B in bf16: hybrid-kv of the project's reference, read from vLLM's source."""
    made = cut(model(Attention("sliding", 50, 16, 256, window=1024), Attention("full", 10, 4, 512)))
    assert [(group.block, len(group.specs)) for group in made.groups[:1]] == [(16, 1)]
    assert {group.block for group in made.groups} == {16, 32}
    assert made.block_bytes == 2_621_440 and len(made.groups) == 6


def test_mla_keeps_one_vector() -> None:
    mla = model(Attention("mla", 61, rank=512, rope_dim=64))
    assert cut(mla).bytes_per_token == 61 * 576 * 2
    assert cut(mla, kv_cache_dtype="fp8").bytes_per_token == 61 * 576


@pytest.mark.parametrize(
    ("version", "tokens", "caching", "block", "page", "blocks"),
    [
        (V028, 0, True, 2096, 21_463_040, 132),
        (V028, 3, True, 2144, 24_150_016, 138),
        (V025, 0, True, 2096, 21_463_040, 132),
        (V025, 0, None, 2096, 21_463_040, 126 + 3),  # hybrids cache no prefixes before 0.26 unless asked
        (V028, 0, None, 2096, 21_463_040, 132),
    ],
)
def test_qwen36_35b(version: Engine, tokens: int, caching: bool | None, block: int, page: int, blocks: int) -> None:
    arguments: dict[str, Any] = {"kv_cache_dtype": "fp8", **(mtp(tokens) if tokens else {})}
    arguments |= {} if caching is None else {"enable_prefix_caching": caching}
    made = cut(model(GDN, FULL, mtp_layers=1), version, **arguments)
    assert (made.block, made.block_bytes, made.blocks(262144)) == (block, page, blocks)


@pytest.mark.parametrize(
    ("entries", "tokens", "gpus", "block", "page", "blocks"),
    [
        # hybrid-kv: NVIDIA's recipes with MTP at 262,144 tokens
        ((Attention("gdn", 48, key_heads=16, key_dim=128, value_heads=48, value_dim=128, conv=4),
          Attention("full", 16, 4, 256)), 5, 1, 1616, 56_262_656, 184),
        ((Attention("gdn", 48, key_heads=16, key_dim=128, value_heads=48, value_dim=128, conv=4),
          Attention("full", 16, 4, 256)), 5, 2, 1616, 28_131_328, 184),
        ((Attention("gdn", 36, key_heads=16, key_dim=128, value_heads=64, value_dim=128, conv=4),
          Attention("full", 12, 2, 256)), 3, 1, 4240, 56_442_880, 77),
        ((MAMBA2, Attention("full", 8, 2, 128), Attention("none", 40)), 3, 1, 8432, 38_854_656, 57),
    ],
)  # fmt: skip
def test_recipes_with_multi_token_prediction(
    entries: tuple[Attention, ...], tokens: int, gpus: int, block: int, page: int, blocks: int
) -> None:
    made = cut(
        model(*entries, mtp_layers=1),
        V028,
        kv_cache_dtype="fp8",
        max_num_batched_tokens=16384,
        tensor_parallel_size=gpus,
        **mtp(tokens),
    )
    assert (made.block, made.block_bytes, made.blocks(262144)) == (block, page, blocks)


def test_states_by_mode_and_version() -> None:
    nemotron = model(MAMBA2, Attention("full", 8, 2, 128))

    def one(version: Engine, **arguments: Any) -> int:
        made = cut(nemotron, version, kv_cache_dtype="fp8", max_num_batched_tokens=16384, **arguments)
        return made.blocks(131072) - -(-131072 // made.block)

    asked = {"enable_prefix_caching": True}
    assert one(V025) == 5 * 1  # no prefix caching: one block a group
    assert one(V025, **asked, mamba_cache_mode="align") == 5 * 2
    assert one(V028, **asked) == 5 * 2
    assert one(V032, **asked) == 5 * 3  # a checkpoint of the prefill
    everything = cut(nemotron, V025, **asked)
    assert everything.mode == "all" and everything.blocks(131072) == 6 * -(-131072 // everything.block)
    assert "has no mamba_cache_mode all" in cut(nemotron, V032, **asked, mamba_cache_mode="all").refusals[0]


def test_a_block_may_not_be_longer_than_a_batch_in_some_versions() -> None:
    nemotron = model(MAMBA2, Attention("full", 8, 2, 128))
    arguments = {"enable_prefix_caching": True, "mamba_cache_mode": "align", "kv_cache_dtype": "fp8"}
    refused = cut(nemotron, Engine((0, 24, 0)), max_num_batched_tokens=8192, **arguments).refusals
    assert len(refused) == 1 and "8320 tokens long" in refused[0] and "max_num_batched_tokens to 8320" in refused[0]
    assert not cut(nemotron, Engine((0, 24, 0)), max_num_batched_tokens=8320, **arguments).refusals
    assert not cut(nemotron, V028, max_num_batched_tokens=8192, **arguments).refusals


def test_a_state_of_half_precision_shortens_blocks() -> None:
    whole, half = (cut(model(GDN, FULL), V028, mamba_ssm_cache_dtype=dtype) for dtype in ("float32", "float16"))
    assert half.block < whole.block


def test_the_group_factor_changed() -> None:
    """13 layers next to 16: padded to 16 from 0.18 on, before only where they are within a quarter."""
    uneven = model(Attention("full", 13, 8, 128), Attention("sliding", 18, 8, 128, window=512))
    sizes = {version: len(cut(uneven, Engine(version)).groups) for version in ((0, 11), (0, 17), (0, 18))}
    assert sizes == {(0, 11): 3, (0, 17): 3, (0, 18): 2}


def test_printed_tokens_follow_the_version() -> None:
    hybrid = model(GDN, FULL, mtp_layers=1)
    arguments = {"kv_cache_dtype": "fp8", "enable_prefix_caching": True, **mtp(2)}
    old, new = (cut(hybrid, Engine(version), **arguments) for version in ((0, 20, 0), (0, 20, 1)))
    pool = old.pool(int(52.66 * GIB))
    assert pool == new.pool(int(52.66 * GIB)) == 2358
    assert old.tokens(pool, 65536) == 1_253_392  # as a Spark logged it
    assert new.tokens(pool, 65536) == int(pool / new.blocks(65536) * 65536) > old.tokens(pool, 65536)


def test_a_draft_with_its_own_keys_and_values_adds_groups() -> None:
    """Qwen3.8-27B with DFlash2: five layers with a sliding window, whose page is as large as the target's."""
    target = model(
        Attention("gdn", 48, key_heads=16, key_dim=128, value_heads=48, value_dim=128, conv=4),
        Attention("full", 16, 4, 256),
    )
    draft = Draft("z-lab/draft", (Attention("sliding", 5, 8, 128, window=2048),), 3.6)
    asked = {"speculative_config": {"method": "dflash", "model": "z-lab/draft", "num_speculative_tokens": 8}}
    made = cut(dataclasses.replace(target, draft=draft), V028, kv_cache_dtype="fp8", **asked)
    assert made.block == 1648 and made.block_bytes == 5 * 1648 * 2048
    assert len(made.groups) == 10 + 4 + 1
    shared = dataclasses.replace(target, draft=Draft("z-lab/draft", (), 1.0))
    assert len(cut(shared, V028, kv_cache_dtype="fp8", **asked).groups) == 4


@pytest.mark.parametrize(
    ("card", "arguments", "words"),
    [
        (model(FULL, Attention("linear", 24)), {}, r"24 layers of kind linear.*write them as gdn \(key_heads"),
        (model(GDN), {}, "no layer of attention"),
        (model(FULL), mtp(3), "no shape.mtp_layers"),
        (model(FULL), mtp(3, model="org/draft"), "org/draft: the draft's attention is missing"),
        (model(FULL), mtp(0), "num_speculative_tokens: must be a whole number from 1 to 1024, not 0"),
        (model(FULL), {"speculative_config": "mtp"}, "speculative_config: must be a mapping"),
        (
            model(FULL),
            {"decode_context_parallel_size": 2},
            "decode_context_parallel_size 2: the planner knows only ten",
        ),
        (
            model(FULL, FULL),
            {"pipeline_parallel_size": 2},
            "pipeline_parallel_size 2: the planner knows it only of models",
        ),
        (model(GDN, FULL), {"pipeline_parallel_size": 2}, "does not guess which layers"),
        (model(FULL), {"pipeline_parallel_size": 11}, "the model has 10 layers, and each stage needs one"),
        (model(FULL), {"pipeline_parallel_size": 2, **mtp(3)}, "what drafts on the last stage"),
        (
            dataclasses.replace(model(FULL), vision=True),
            {"pipeline_parallel_size": 2},
            "which stages of a model that tak",
        ),
        (model(GDN, FULL), {"tensor_parallel_size": 3}, "tensor_parallel_size 3 does not divide"),
        (model(FULL), {"tensor_parallel_size": 3}, "tensor_parallel_size 3 and the . KV heads of full layers do not"),
        (model(dataclasses.replace(FULL, index_bytes=256, index_tokens=4)), {}, "planned from vLLM 0.29 on"),
        (
            model(dataclasses.replace(MAMBA2, chunk=0), FULL),
            {"enable_prefix_caching": True, "mamba_cache_mode": "all"},
            "the key chunk",
        ),
    ],
)
def test_what_is_missing_is_named(card: Card, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(SparkfleetError, match=words):
        cut(card, **arguments)


@given(st.integers(1, 200), st.integers(1, 8))
def test_layers_are_split_over_stages_as_vllm_does(layers: int, count: int) -> None:
    card = model(dataclasses.replace(FULL, layers=layers))
    if count > layers:
        return
    sizes = [layers // count] * count
    for place in range(2, layers % count + 2):  # vllm/distributed/utils.py, get_pp_indices
        sizes[-place] += 1
    made = kv_layout.stages(card, {"pipeline_parallel_size": count})
    assert [stage.layers for stage in made] == sizes and sum(sizes) == layers
    assert [stage.first for stage in made] == [True] + [False] * (count - 1)
    assert [stage.last for stage in made] == [False] * (count - 1) + [True]


def test_a_stage_keeps_what_its_layers_need() -> None:
    card, arguments = model(Attention("full", 32, 8, 128)), {"pipeline_parallel_size": 4}
    for stage in kv_layout.stages(card, arguments):
        made = kv_layout.layout(card, arguments, V025, stage)
        assert made.block_bytes * 4 == cut(card).block_bytes and made.blocks(32768) == cut(card).blocks(32768)


def test_without_the_hybrid_manager_windows_keep_all_tokens() -> None:
    half = model(Attention("full", 16, 8, 128), Attention("sliding", 16, 8, 128, window=1024))
    made = cut(half, disable_hybrid_kv_cache_manager=True)
    assert made.blocks(131072) == 131072 // 16 and len(made.groups) == 1 and not made.refusals
    assert "does not start a hybrid" in cut(model(GDN, FULL), disable_hybrid_kv_cache_manager=True).refusals[0]


def test_tokens_from_the_text_itself_need_no_layers() -> None:
    made = cut(model(GDN, FULL), speculative_config={"method": "ngram", "num_speculative_tokens": 2})
    assert made.speculative_tokens == 2 and len(made.groups) == 4


def test_rules_are_dated() -> None:
    """Every change is of a field that exists, and versions ascend."""
    dates = [version for version, _, _ in vllm_versions.CHANGES]
    assert dates == sorted(dates) and len(set(dates)) == len(dates)
    fields = {field.name for field in dataclasses.fields(vllm_versions.Rules)}
    for _, changed, source in vllm_versions.CHANGES:
        assert set(changed) <= fields and source
    assert fields == {name for _, changed, _ in vllm_versions.CHANGES for name in changed}


@pytest.mark.parametrize(
    ("text", "said", "like"),
    [
        ("0.28.0", "0.28.0", (0, 28, 0)),
        ("0.26.1rc1.dev1231+g7a9993878.d20260826", "0.26.1.dev", (0, 27)),
        ("0.11.0rc2.dev12+gabc", "0.11.0", (0, 11, 0)),
        ("0.1.dev20482+g83cb22a0e.d20260903", "of unknown version", ()),
    ],
)
def test_builds_between_releases_have_the_rules_of_the_next(text: str, said: str, like: tuple[int, ...]) -> None:
    engine = Engine.parse(text)
    assert engine.text == said and engine.rules == Engine(like).rules


ENTRIES = st.lists(
    st.one_of(
        st.builds(Attention, kind=st.just("full"), layers=st.integers(1, 40), kv_heads=st.sampled_from([1, 2, 4, 8]),
                  head_dim=st.sampled_from([64, 128, 256])),
        st.builds(Attention, kind=st.just("sliding"), layers=st.integers(1, 60), kv_heads=st.sampled_from([2, 4, 8]),
                  head_dim=st.sampled_from([64, 128]), window=st.integers(1, 8192)),
        st.builds(Attention, kind=st.just("gdn"), layers=st.integers(1, 60), key_heads=st.sampled_from([8, 16]),
                  key_dim=st.just(128), value_heads=st.sampled_from([16, 32, 64]), value_dim=st.just(128),
                  conv=st.just(4)),
        st.builds(Attention, kind=st.just("mamba2"), layers=st.integers(1, 60), heads=st.sampled_from([64, 128]),
                  head_dim=st.just(64), state=st.just(128), groups=st.just(8), conv=st.just(4), chunk=st.just(128)),
    ),
    min_size=1, max_size=4,
).filter(lambda entries: any(entry.kind == "full" for entry in entries))  # fmt: skip
VERSIONS = st.sampled_from(
    [(0, 10, 1, 1), (0, 17, 1), (0, 19, 0), (0, 20, 1), (0, 24, 0), (0, 25, 1), (0, 28, 0), (0, 32), ()]
)


@settings(max_examples=150, deadline=None)
@given(
    entries=ENTRIES, version=VERSIONS, gib=st.integers(1, 200), length=st.integers(1, 1 << 20),
    tokens=st.integers(0, 8), fp8=st.booleans(),
)  # fmt: skip
def test_properties(
    entries: list[Attention], version: tuple[int, ...], gib: int, length: int, tokens: int, fp8: bool
) -> None:
    card = model(*entries, mtp_layers=1)
    arguments: dict[str, Any] = {"kv_cache_dtype": "fp8"} if fp8 else {}
    try:
        made = cut(card, Engine(version), **arguments, **(mtp(tokens) if tokens else {}))
    except SparkfleetError as error:
        assert "cannot bring to one size" in str(error) or "missing" in str(error)
        return
    pool = made.pool(gib * GIB)
    each = made.blocks(length)
    assert pool >= 0 and each >= len([group for group in made.groups if group.grows]) and made.block >= 16
    assert made.pool((gib + 1) * GIB) >= pool  # more memory never holds less
    assert made.blocks(length + 1) >= each  # nor does a longer sequence need less
    assert made.tokens(pool, length) <= made.tokens(made.pool((gib + 1) * GIB), length)
    assert pool * made.block_bytes <= gib * GIB
    longest = made.longest(pool, 1 << 20)
    assert longest == 0 or made.blocks(longest) <= pool
    assert longest == 1 << 20 or made.blocks(longest + 1) > pool
    if made.prints_by_concurrency:
        assert made.tokens(pool, length) == int(pool / each * length)
    # what layers keep is at most what the pool keeps for them
    kept = sum(
        kv_layout.token_bytes(entry, "fp8" if fp8 else "bf16") * entry.layers
        for entry in entries
        if entry.kind == "full"
    )
    assert made.bytes_per_token >= kept
