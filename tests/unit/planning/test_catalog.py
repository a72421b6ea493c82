"""Every card of the catalogue, and what a wrong card is answered."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest

from sparkfleet import SparkfleetError
from sparkfleet.planning import catalog, memory_plan, vllm_versions
from tests.unit import ROOT

CARD = (catalog.catalogue_folder() / "llama31-8b-fp8.yml").read_text(encoding="utf-8")

#: Of spark-facts: id, max-model-len, utilisation, batched tokens, sequences.
GUIDE_SETTINGS = {
    "vllm-llama31-8b-fp8": ("nvidia/Llama-3.1-8B-Instruct-FP8", 32768, 0.90, 16384, 64),
    "vllm-qwen3-8b-fp8": ("Qwen/Qwen3-8B-FP8", 32768, 0.90, 16384, 64),
    "vllm-mistral-nemo-12b-fp8": ("neuralmagic/Mistral-Nemo-Instruct-2407-FP8", 65536, 0.90, 16384, 64),
    "vllm-qwen3-32b-fp8": ("Qwen/Qwen3-32B-FP8", 32000, 0.90, 16384, 64),
    "vllm-qwen3-30b-a3b-fp8": ("Qwen/Qwen3-30B-A3B-Instruct-2507-FP8", 32768, 0.85, 16384, 64),
    "vllm-llama33-70b-fp8": ("nvidia/Llama-3.3-70B-Instruct-FP8", 65536, 0.80, 32768, 32),
}


GUIDE_MEASURED = {
    "vllm-llama31-8b-fp8": (23.88, 52),
    "vllm-qwen3-8b-fp8": (21.96, 71),
    "vllm-mistral-nemo-12b-fp8": (15.66, 85),
    "vllm-qwen3-32b-fp8": (6.25, 205),
    "vllm-qwen3-30b-a3b-fp8": (42.02, 78),
    "vllm-llama33-70b-fp8": (2.74, 396),
}


@pytest.mark.parametrize("name", catalog.names())
def test_every_card_of_the_catalogue(name: str) -> None:
    card = catalog.load(name)
    assert card.name == name
    assert card.service == f"vllm-{name}"
    assert "throughput" in card.profiles
    assert not vllm_versions.unfit(card.image)
    assert card.engine().version or vllm_versions.moves(card.image), f"{card.image}: the planner must know its vLLM"
    assert card.licence.page.startswith(f"https://huggingface.co/{card.repo.partition('/')[0]}") or card.licence.gated
    for profile in card.profiles:
        plan = memory_plan.make(card, card.with_profile(profile), profile=profile)
        assert plan.fits, (profile, plan.reasons)


def test_the_catalogue_has_the_six_of_the_guide_and_at_least_six_more() -> None:
    cards = [catalog.load(name) for name in catalog.names()]
    assert {card.service for card in cards} >= set(GUIDE_SETTINGS)
    assert len(cards) >= 12
    assert len({card.service for card in cards}) == len({(card.repo, card.sparks) for card in cards}) == len(cards)
    assert any("NVFP4" in card.repo or "FP4" in card.repo for card in cards if "Llama-3.1-8B" in card.repo)


@pytest.mark.parametrize(("service", "tok_s", "ttft_ms"), [(key, *value) for key, value in GUIDE_MEASURED.items()])
def test_measured_figures_of_the_guide(service: str, tok_s: float, ttft_ms: float) -> None:
    card = next(card for card in map(catalog.load, catalog.names()) if card.service == service)
    entry = card.measured[0]
    assert (entry.tok_s, entry.ttft_ms) == (tok_s, ttft_ms)
    assert "Stravica" in entry.source
    assert tok_s < memory_plan.make(card, card.arguments).decode_tok_s_limit


@pytest.mark.parametrize("service", GUIDE_SETTINGS)
def test_settings_of_the_guide(service: str) -> None:
    card = next(card for card in map(catalog.load, catalog.names()) if card.service == service)
    chosen = card.with_profile("throughput")
    names = ("max_model_len", "gpu_memory_utilization", "max_num_batched_tokens", "max_num_seqs")
    assert (card.repo, *(chosen[name] for name in names)) == GUIDE_SETTINGS[service]


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        (
            "max_num_seqs: 64",
            "max_num_seqs: -1",
            "arguments.max_num_seqs: must be a whole number from 1 to 65536, not -1",
        ),
        ("gpu_memory_utilization: 0.90", "gpu_memory_utilization: 90", "must be a share from 0.01 to 1, not 90"),
        ("revision: main", "revison: main", "revison: unknown key; did you mean revision?"),
        (
            "download_gib: 8.46",
            "download_gib: -8",
            "weights.download_gib: must be a number from 0.001 to 1000000, not -8",
        ),
        ("repo: nvidia/", "repo: ", "repo: must be a model on the Hub, ORG/NAME"),
        ("gated: true", "gated: perhaps", "licence.gated: must be true or false, not 'perhaps'"),
        ("expect: Paris", "expect:", "verify.expect: must be a text of 1 to 4000 characters, not None"),
        ("  max_num_seqs: 64", "  --max-num-seqs: 64", "an argument of vllm serve in snake_case, without dashes"),
        ("kv_heads: 8", "kv_heads: 0", "shape.attention[0].kv_heads: must be a whole number from 1 to 10000000, not 0"),
        (
            "kind: full",
            "kind: round",
            "shape.attention[0].kind: must be one of full, sliding, mla, gdn, mamba2, kda, conv, linear, encoder, "
            "none, cache, not 'round'",
        ),
        ("kind: full", "kind: sliding", "shape.attention[0]: the key window is missing"),
        ("head_dim: 128", "head_dims: 128", "shape.attention[0].head_dims: unknown key; did you mean head_dim?"),
        ("layers: 32,", "layers: 31,", "describes 31 layers, but shape.layers is 32"),
        ("max_model_len: 32768", "max_model_len: 262144", "is longer than the model's context of 131072 tokens"),
        ("throughput:", "througput:", "profiles: the key throughput is missing"),
        ("revision: main", "revision: main\nrevision: v1", "revision stands twice, in lines"),
        ("revision: main", "revision: [main", "not valid YAML"),
        ("revision: main", "revision: main\n---", "not valid YAML: a second document begins here"),
        ("enable_prefix_caching: true", "enable_prefix_caching: maybe", "must be true or false, not 'maybe'"),
        (
            "revision: main",
            "revision: main\nenvironment: {HF_TOKEN: hf_x}",
            "HF_TOKEN: is a secret, and",
        ),
        ("tok_s: 23.88", "tok_s: fast", "measured[0].tok_s: must be a number from 0.001 to 1000000, not 'fast'"),
    ],
)
def test_wrong_cards(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    assert old in CARD
    path = tmp_path / "card.yml"
    text = CARD.replace(old, new, 1)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SparkfleetError) as raised:
        catalog.load(str(path))
    assert complaint in str(raised.value)
    said = int(str(raised.value).removeprefix(f"{path}:").partition(":")[0])
    changed = text[: text.index(new) + new.rfind("\n") + 1].count("\n") + 1
    # what is missing is told at what it is missing from; a bracket that is not closed, where the file goes wrong
    assert (
        said == changed or ("missing" in complaint and said <= changed) or "layers" in complaint or "YAML" in complaint
    )


def test_all_problems_of_a_card_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "card.yml"
    path.write_text(CARD.replace("max_num_seqs: 64", "max_num_seqs: 0").replace("gated: true", "gated: 1"), "utf-8")
    with pytest.raises(SparkfleetError) as raised:
        catalog.load(str(path))
    assert str(raised.value).count(str(path)) == 2


@pytest.mark.parametrize("text", ["", "- a list", "just a word"])
def test_files_that_are_no_cards(tmp_path: Path, text: str) -> None:
    path = tmp_path / "card.yml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SparkfleetError, match=r"card\.yml:1: the file: must be a mapping"):
        catalog.load(str(path))


def test_the_schema_describes_what_cards_may_hold() -> None:
    jsonschema.Draft202012Validator.check_schema(catalog.schema())


def test_a_card_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yml"
    path.write_text(CARD, encoding="utf-8")
    assert catalog.load(str(path)).repo == "nvidia/Llama-3.1-8B-Instruct-FP8"


def test_unknown_model_names_a_near_one() -> None:
    with pytest.raises(SparkfleetError, match=r"unknown model 'llama31-8b': did you mean llama31-8b-fp8\?"):
        catalog.load("llama31-8b")


def test_missing_file() -> None:
    with pytest.raises(SparkfleetError, match=r"/nowhere/card\.yml does not exist"):
        catalog.load("/nowhere/card.yml")
    with pytest.raises(SparkfleetError) as raised:
        catalog.load("cards/mine.yml")
    assert f"model card {Path.cwd()}/cards/mine.yml does not exist" in str(raised.value)
    assert "{{ inventory_dir }}/cards/mine.yml" in str(raised.value)


def test_unknown_profile() -> None:
    with pytest.raises(
        SparkfleetError,
        match=r"llama31-8b-fp8\.yml:\d+: model llama31-8b-fp8 has no profile 'fast': choose one of throughput",
    ):
        catalog.load("llama31-8b-fp8").with_profile("fast")


def test_a_script_in_place_of_a_card_is_not_quoted(tmp_path: Path) -> None:
    path = tmp_path / "serve.yml"
    path.write_text("export HF_TOKEN=hf_secret vllm serve o/m\n", encoding="utf-8")
    with pytest.raises(SparkfleetError, match="as a model card is; `sparkfleet card --from") as raised:
        catalog.load(str(path))
    assert "hf_secret" not in str(raised.value)


def test_a_card_of_several_sparks_is_split_over_all_of_them(tmp_path: Path) -> None:
    text = (
        (ROOT / "models" / "llama33-70b-nvfp4.yml")
        .read_text()
        .replace("tool_call_parser:", "sparks: 6\ntool_call_parser:")
    )
    path = tmp_path / "six.yml"
    path.write_text(
        text.replace("arguments:\n", "arguments:\n  tensor_parallel_size: 2\n  pipeline_parallel_size: 3\n", 1)
    )
    card = catalog.load(str(path))
    assert memory_plan.make(card, card.arguments).sparks == card.sparks == 6
    path.write_text(text.replace("arguments:\n", "arguments:\n  pipeline_parallel_size: 6\n", 1))
    assert memory_plan.make(catalog.load(str(path)), catalog.load(str(path)).arguments).sparks == 6
    path.write_text(text.replace("arguments:\n", "arguments:\n  pipeline_parallel_size: 3\n", 1))
    with pytest.raises(
        SparkfleetError, match=r"sparks: 6, but .*tensor_parallel_size is 1 and .*pipeline_parallel_size 3"
    ):
        catalog.load(str(path))
