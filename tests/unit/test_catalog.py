"""Every card of the catalogue, and what a wrong card is answered."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparkfleet import SparkfleetError, catalog

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


@pytest.mark.parametrize("name", catalog.names())
def test_every_card_of_the_catalogue(name: str) -> None:
    card = catalog.load(name)
    assert card.name == name
    assert "throughput" in card.profiles
    for profile in card.profiles:
        assert card.with_profile(profile)["max_model_len"]


@pytest.mark.parametrize("service", GUIDE_SETTINGS)
def test_settings_of_the_guide(service: str) -> None:
    card = next(card for card in map(catalog.load, catalog.names()) if card.service == service)
    chosen = card.with_profile("throughput")
    names = ("max_model_len", "gpu_memory_utilization", "max_num_batched_tokens", "max_num_seqs")
    assert (card.repo, *(chosen[name] for name in names)) == GUIDE_SETTINGS[service]


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("max_num_seqs: 64", "max_num_seqs: -1", r"card\.yml:16: arguments\.max_num_seqs: must be a whole number"),
        ("gpu_memory_utilization: 0.90", "gpu_memory_utilization: 90", "share between 0 and 1, not 90"),
        ("revision: main", "revison: main", r"card\.yml:5: revison: unknown key"),
        ("download_gib: 8.46", "download_gib: -8", "positive number of GiB, not -8"),
        ("repo: nvidia/", "repo: ", "does not have the form"),
        ("gated: true", "gated: perhaps", "must be true or false, not 'perhaps'"),
        ("expect: Paris", "expect:", r"verify\.expect: must be a non-empty string"),
        ("profiles:", "profiles: [", "is not valid YAML"),
        ("  max_num_seqs: 64", "  --max-num-seqs: 64", "snake_case"),
    ],
)
def test_wrong_cards(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    assert old in CARD
    path = tmp_path / "card.yml"
    path.write_text(CARD.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(SparkfleetError, match=complaint):
        catalog.load(str(path))


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


def test_unknown_profile() -> None:
    with pytest.raises(SparkfleetError, match=r"unknown profile 'fast'.*choose one of throughput"):
        catalog.load("llama31-8b-fp8").with_profile("fast")
