"""config.json of real models: the right shape, or refused by name; whatever it holds, no traceback."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sparkfleet_host.bounded import parse_json

from sparkfleet import SparkfleetError
from sparkfleet.planning import model_config
from sparkfleet.planning.model_config import describe, quantisation
from tests.unit import ROOT

FOLDER = ROOT / "tests" / "unit" / "data" / "configs"


def config(name: str) -> dict[str, Any]:
    made: dict[str, Any] = parse_json((FOLDER / f"{name}.json").read_text(encoding="utf-8"), name, constants=True)
    return made


NAMES = sorted(path.stem for path in FOLDER.glob("*.json") if not path.stem.endswith(".hf_quant"))

#: name: layers, hidden, mlp, experts a token, vocab, context, then kinds of attention. From the models' own pages and
#: papers where they say it: what a reader of config.json by hand would write into a card.
FULL, SLIDING, MLA = "full", "sliding", "mla"
SHAPES: dict[str, tuple[Any, ...]] = {
    "meta-llama--Meta-Llama-3.1-8B": (32, 4096, 14336, 0, 128256, 131072, (FULL, 32, 8, 128)),
    "nvidia--Llama-3.1-70B-Instruct-FP8": (80, 8192, 28672, 0, 128256, 131072, (FULL, 80, 8, 128)),
    "mistralai--Mistral-7B-v0.1": (32, 4096, 14336, 0, 32000, 32768, (SLIDING, 32, 8, 128, 4096)),
    "mistralai--Mixtral-8x7B-v0.1": (32, 4096, 14336, 2, 32000, 32768, (FULL, 32, 8, 128)),
    "Qwen--Qwen2.5-7B": (28, 3584, 18944, 0, 152064, 131072, (FULL, 28, 4, 128)),
    "Qwen--Qwen3-8B": (36, 4096, 12288, 0, 151936, 40960, (FULL, 36, 8, 128)),
    "Qwen--Qwen3-30B-A3B": (48, 2048, 768, 8, 151936, 40960, (FULL, 48, 4, 128)),
    "Qwen--Qwen3-VL-30B-A3B-Instruct": (48, 2048, 768, 8, 151936, 262144, (FULL, 48, 4, 128)),
    "google--gemma-2-2b-it": (26, 2304, 9216, 0, 256000, 8192, (SLIDING, 13, 4, 256, 4096), (FULL, 13, 4, 256)),
    "google--gemma-3-12b-it-text": (48, 3840, 15360, 0, 262208, 131072, (SLIDING, 40, 8, 256, 1024), (FULL, 8, 8, 256)),
    "google--gemma-4-26B-A4B": (30, 2816, 704, 11, 262144, 262144, (SLIDING, 25, 8, 256, 1024), (FULL, 5, 2, 512)),
    "openai--gpt-oss-20b": (24, 2880, 2880, 4, 201088, 131072, (SLIDING, 12, 8, 64, 128), (FULL, 12, 8, 64)),
    "microsoft--Phi-4-mini-instruct": (32, 3072, 8192, 0, 200064, 131072, (FULL, 32, 8, 128)),
    "deepseek-ai--DeepSeek-V2.5": (60, 5120, 1536, 8, 102400, 163840, (MLA, 60, 512, 64)),
    "deepseek-ai--DeepSeek-V3": (61, 7168, 2048, 9, 129280, 163840, (MLA, 61, 512, 64)),
    "moonshotai--Kimi-K2.5": (61, 7168, 2048, 9, 163840, 262144, (MLA, 61, 512, 64)),
    "zai-org--GLM-4.7-FP8": (92, 5120, 1536, 9, 151552, 202752, (FULL, 92, 8, 128)),
    "zai-org--GLM-4.7-Flash": (47, 2048, 1536, 5, 154880, 202752, (MLA, 47, 512, 64)),
    "MiniMaxAI--MiniMax-M2.7": (62, 3072, 1536, 8, 200064, 204800, (FULL, 62, 8, 128)),
    "Qwen--Qwen3-Next-80B-A3B-Thinking": (48, 2048, 512, 11, 151936, 262144, ("gdn", 36), (FULL, 12, 2, 256)),
    "Qwen--Qwen3.5-35B-A3B": (40, 2048, 512, 9, 248320, 262144, ("gdn", 30), (FULL, 10, 2, 256)),
    "Qwen--Qwen3.5-27B": (64, 5120, 17408, 0, 248320, 262144, ("gdn", 48), (FULL, 16, 4, 256)),
    "ibm-granite--granite-4.0-h-small": (40, 4096, 768, 12, 100352, 131072, ("mamba2", 36), (FULL, 4, 8, 128)),
    "moonshotai--Kimi-Linear-48B-A3B-Instruct": (27, 2304, 1024, 9, 163840, 1048576, ("kda", 20), (MLA, 7, 512, 64)),
    "moonshotai--Kimi-K3": (93, 7168, 3072, 18, 163840, 1048576, ("kda", 69), (MLA, 24, 512, 64)),
    "nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-NVFP4": (
        *(52, 2688, 1856, 8, 131072, 262144),
        *(("mamba2", 23), ("none", 23), (FULL, 6, 2, 128)),
    ),
    "nvidia--NVIDIA-Nemotron-3-Super-120B-A12B-NVFP4": (
        *(88, 4096, 2688, 24, 131072, 262144),
        *(("mamba2", 40), ("none", 40), (FULL, 8, 2, 128)),
    ),
    "nvidia--NVIDIA-Nemotron-3.5-Lightning-30B-A3B-NVFP4": (
        *(52, 2688, 1856, 8, 131072, 1048576),
        *(("mamba2", 23), ("none", 23), (FULL, 6, 2, 128)),
    ),
    "nvidia--Nemotron-H-56B-Base-8K": (
        *(118, 8192, 32768, 0, 131072, 8192),
        *(("mamba2", 54), ("none", 54), (FULL, 10, 8, 128)),
    ),
    "sentence-transformers--all-MiniLM-L6-v2": (6, 384, 1536, 0, 30522, 512, ("encoder", 6)),
}
REFUSED = {
    "deepseek-ai--DeepSeek-V3.2": "deepseek_v32",
    "MiniMaxAI--MiniMax-M3": "minimax_m3",
    "XiaomiMiMo--MiMo-V2-Flash": "mimo_v2_flash",
    "meta-llama--Llama-4-Scout-17B-16E-Instruct": "llama4",
    "zai-org--GLM-5.1": "glm_moe_dsa",
}
FIGURES = {FULL: ("kv_heads", "head_dim"), SLIDING: ("kv_heads", "head_dim", "window"), MLA: ("rank", "rope_dim")}


def test_each_file_is_one_that_is_read_or_one_that_is_refused() -> None:
    assert set(NAMES) == {*SHAPES, *REFUSED}
    assert len(NAMES) >= 15 and len({describe(config(name)).model_type for name in SHAPES}) >= 8


def parts(name: str) -> list[tuple[Any, ...]]:
    return [part for part in SHAPES[name] if isinstance(part, tuple)]


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_the_shape_of_a_real_model(name: str) -> None:
    made = describe(config(name)).shape
    layers, hidden, mlp, experts, vocab, context, *_ = SHAPES[name]
    assert (made["layers"], made["hidden"], made["mlp"]) == (layers, hidden, mlp)
    assert (made.get("experts_per_token", 0), made["vocab"], made["context"]) == (experts, vocab, context)
    wanted = set()
    for kind, number, *figures in parts(name):
        wanted.add((kind, number, tuple(zip(FIGURES.get(kind, ()), figures, strict=True))))
    found = {
        (e["kind"], e["layers"], tuple((key, e[key]) for key in FIGURES.get(e["kind"], ()))) for e in made["attention"]
    }
    assert found == wanted


def test_what_google_leaves_out_is_the_default_of_transformers() -> None:
    """Google's own files have only what differs from it; the head size is not the quotient of width and heads."""
    whole = config("google--gemma-3-12b-it-text")
    kept = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")
    inner = {"model_type": "gemma3_text", **{name: whole[name] for name in (*kept, "sliding_window")}}
    made = describe({"model_type": "gemma3", "text_config": inner, "vision_config": {}})
    assert made.shape == describe(whole).shape
    assert made.origin["shape.vocab"] == "not in config.json; default of gemma3 in transformers: vocab_size"
    assert made.origin["shape.hidden"] == "config.json: text_config.hidden_size"


def test_heads_that_do_not_share_keys_evenly() -> None:
    with pytest.raises(SparkfleetError, match="num_key_value_heads 7 does not divide num_attention_heads 32; write"):
        describe({**config("Qwen--Qwen3-8B"), "num_key_value_heads": 7})


@pytest.mark.parametrize(("name", "kind"), REFUSED.items())
def test_what_is_refused_is_named_with_the_reason(name: str, kind: str) -> None:
    with pytest.raises(SparkfleetError, match=rf"model_type '{kind}' cannot be put into a card: .*by hand"):
        describe(config(name))


def test_the_figures_of_states() -> None:
    gdn = next(e for e in describe(config("Qwen--Qwen3.5-35B-A3B")).shape["attention"] if e["kind"] == "gdn")
    assert gdn == {
        **{"kind": "gdn", "layers": 30, "key_heads": 16, "key_dim": 128},
        **{"value_heads": 32, "value_dim": 128, "conv": 4},
    }
    mamba = next(
        e
        for e in describe(config("nvidia--NVIDIA-Nemotron-3-Super-120B-A12B-NVFP4")).shape["attention"]
        if e["kind"] == "mamba2"
    )
    assert {key: mamba[key] for key in ("heads", "head_dim", "state", "groups", "conv")} == {
        **{"heads": 128, "head_dim": 64, "state": 128, "groups": 8, "conv": 4}
    }
    kda = next(e for e in describe(config("moonshotai--Kimi-K3")).shape["attention"] if e["kind"] == "kda")
    assert (kda["heads"], kda["head_dim"], kda["conv"]) == (96, 128, 4)
    assert describe(config("Qwen--Qwen3.5-35B-A3B")).shape["mtp_layers"] == 1
    assert describe(config("Qwen--Qwen3.5-35B-A3B")).shape["heads"] == 16


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen--Qwen3-30B-A3B", 29.0),
        ("mistralai--Mixtral-8x7B-v0.1", 45.1),
        ("deepseek-ai--DeepSeek-V3", 653.9),
        ("openai--gpt-oss-20b", 19.1),
        ("zai-org--GLM-4.7-Flash", 27.8),
        ("moonshotai--Kimi-Linear-48B-A3B-Instruct", 47.1),
    ],
)
def test_parameters_of_all_experts(name: str, billions: float) -> None:
    """All but a few billions of these models are in their experts."""
    experts = describe(config(name)).experts
    assert experts is not None and experts.total / 1e9 == pytest.approx(billions, abs=0.1)


def test_where_each_field_comes_from() -> None:
    origin = describe(config("Qwen--Qwen3.5-35B-A3B")).origin
    assert origin["shape.hidden"] == "config.json: text_config.hidden_size"
    assert origin["shape.experts_per_token"] == "config.json: text_config.num_experts_per_tok and 1 shared"
    assert "yarn, factor 40" in describe(config("deepseek-ai--DeepSeek-V3")).origin["shape.context"]


def test_what_config_json_does_not_say_is_told() -> None:
    assert any("multi-token" in words for words in describe(config("deepseek-ai--DeepSeek-V3")).unknown)
    assert any("which layers have a window" in words for words in describe(config("google--gemma-2-2b-it")).unknown)
    assert not describe(config("Qwen--Qwen3-8B")).unknown


def test_vision_code_and_embeddings() -> None:
    assert describe(config("Qwen--Qwen3-VL-30B-A3B-Instruct")).vision
    assert describe(config("deepseek-ai--DeepSeek-V2.5")).remote_code
    gemma = describe(config("google--gemma-2-2b-it"))
    assert gemma.tied_embeddings and gemma.embedding_parameters == 0
    assert describe(config("Qwen--Qwen3-8B")).embedding_parameters == 151936 * 4096


# -- quantisation ----------------------------------------------------------------------------------------------------


def separate(name: str) -> dict[str, Any]:
    made: dict[str, Any] = json.loads((FOLDER / f"{name}.hf_quant.json").read_text(encoding="utf-8"))
    return made


@pytest.mark.parametrize(
    ("name", "bits", "kv", "linear"),
    [
        ("nvidia--Llama-3.1-70B-Instruct-FP8", 8.0, True, "fp8"),
        ("nvidia--NVIDIA-Nemotron-3-Super-120B-A12B-NVFP4", 4.5, True, "nvfp4"),
    ],
)
def test_the_file_beside_config_json(name: str, bits: float, kv: bool, linear: str) -> None:
    made = quantisation(config(name), separate(name))
    assert (made.expert_bits, made.fp8_kv_cache, made.linear) == (bits, kv, linear)
    assert made.place.startswith("hf_quant_config.json")


@pytest.mark.parametrize(
    ("name", "bits", "linear"),
    [
        ("Qwen--Qwen3-8B", 16.0, ""),
        ("deepseek-ai--DeepSeek-V3", 8.0, "block_fp8"),
        ("openai--gpt-oss-20b", 4.25, "mxfp4"),
        ("moonshotai--Kimi-K2.5", 4.5, ""),
    ],
)
def test_quantisation_in_config_json(name: str, bits: float, linear: str) -> None:
    made = quantisation(config(name))
    assert (made.expert_bits, made.fp8_kv_cache, made.linear) == (bits, False, linear)


@pytest.mark.parametrize("scheme", [{"num_bits": 8, "type": "float"}, "FP8"])
def test_an_fp8_kv_cache_that_the_checkpoint_asks_for(scheme: Any) -> None:
    part = {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": scheme}
    assert quantisation({"quantization_config": part}).fp8_kv_cache
    assert not quantisation({"quantization_config": {**part, "kv_cache_scheme": {"num_bits": 4}}}).fp8_kv_cache


def test_config_json_comes_before_the_file_beside_it_and_a_difference_is_told() -> None:
    own = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}
    made = quantisation(own, {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}})
    assert not made.fp8_kv_cache and "kv_cache_dtype: fp8" in made.unknown[0]


def test_experts_of_a_mixed_precision_have_their_own_bits() -> None:
    layers = {"model.layers.0.mlp.experts": {"quant_algo": "W4A16_NVFP4"}, "lm_head": {"quant_algo": "FP8"}}
    part = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    assert quantisation({"quantization_config": part}).expert_bits == 4.5


def test_a_quantisation_that_is_not_known_is_told() -> None:
    made = quantisation({"quantization_config": {"quant_method": "exl3"}})
    assert made.expert_bits is None and made.unknown == ("bits a weight of EXL3",)


# -- wrong input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"num_hidden_layers": None}, "config.json: num_hidden_layers is missing"),
        ({"num_hidden_layers": "36"}, "config.json: num_hidden_layers: not an integer: '36'"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000 is not between 1 and 10000"),
        ({"hidden_size": -1}, "hidden_size: -1 is not between 1 and 10000000"),
        ({"head_dim": None, "num_attention_heads": 7}, "hidden_size 4096 is not a multiple of num_attention_heads 7"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries for 36 layers"),
        ({"layer_types": ["chunked"] * 36}, "layers of type 'chunked' keep a cache that a card cannot describe"),
        ({"model_type": "qwen99"}, "model_type 'qwen99' (Qwen3ForCausalLM) is not known here"),
        ({"model_type": None}, "model_type '(none)' (Qwen3ForCausalLM) is not known here"),
        ({"model_type": "\x1b[31mred"}, "model_type '\ufffd[31mred'"),
        ({"max_position_embeddings": 0}, "max_position_embeddings: 0 is not between"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "four"}}, "rope_scaling.factor: not a number"),
    ],
)
def test_a_value_that_will_not_do_is_named(change: dict[str, Any], complaint: str) -> None:
    wrong = {key: value for key, value in {**config("Qwen--Qwen3-8B"), **change}.items() if value is not None}
    with pytest.raises(SparkfleetError) as error:
        describe(wrong)
    assert complaint in str(error.value) and "\n" not in str(error.value) and "\x1b" not in str(error.value)


def test_a_window_as_long_as_the_context_is_none() -> None:
    made = describe({**config("mistralai--Mistral-7B-v0.1"), "sliding_window": 32768})
    assert made.shape["attention"] == [{"kind": "full", "layers": 32, "kv_heads": 8, "head_dim": 128}]


def test_windows_of_a_qwen_begin_where_it_says() -> None:
    change = {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 30}
    made = describe({**config("Qwen--Qwen3-8B"), **change}).shape["attention"]
    assert [(entry["kind"], entry["layers"]) for entry in made] == [("full", 30), ("sliding", 6)]


VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.integers(0, 200),
        st.floats(),
        st.text(max_size=10),
        st.sampled_from(
            ["full_attention", "linear_attention", "sliding_attention", "mamba", "yarn", "M*E", 10**400, -0.0, "FP8"]
        ),
    ),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def places(data: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in nested mappings."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield (*place, key)
            yield from places(value, (*place, key))


@given(data=st.data())
def test_whatever_stands_in_it(data: st.DataObject) -> None:
    """A changed config.json gives a shape that the schema takes, or one line of error."""
    changed = copy.deepcopy(config(data.draw(st.sampled_from(NAMES))))
    for _ in range(data.draw(st.integers(1, 4))):
        *path, last = data.draw(st.sampled_from(list(places(changed))))
        part = changed
        for key in path:
            part = part[key] if isinstance(part, dict) and isinstance(part.get(key), dict) else {}
        if data.draw(st.booleans()):
            part[last] = data.draw(VALUES)
        else:
            part.pop(last, None)
    check(changed)


def check(data: Any) -> None:
    try:
        made = describe(data)
    except SparkfleetError as error:
        assert str(error).isprintable() and len(str(error)) < 2000
    else:
        assert sum(entry["layers"] for entry in made.shape["attention"]) == made.shape["layers"]
        json.dumps(made.shape)
    with contextlib.suppress(SparkfleetError):
        assert quantisation(data, data).name is not None


@given(st.dictionaries(st.sampled_from(["model_type", "text_config", "num_hidden_layers", "x"]), VALUES))
def test_whatever_it_is(data: dict[str, Any]) -> None:
    check(data)


def test_positions_of_roberta_begin_after_the_padding() -> None:
    data = {**config("sentence-transformers--all-MiniLM-L6-v2"), "max_position_embeddings": 514, "pad_token_id": 1}
    made = describe({**data, "model_type": "xlm-roberta"})
    assert made.shape["context"] == 512 and made.encoder and not made.hybrid


def test_no_kind_of_model_is_read_and_refused() -> None:
    assert not set(model_config.READERS) & set(model_config.REFUSED)
    assert Path(model_config.__file__).exists()
