"""The rendered service against the guide's, and what the offline way changes."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import pytest
import yaml
from ansible.module_utils.sparkfleet_host.http import KEY_FILE

from sparkfleet import catalog, cli, compose

GUIDE = yaml.safe_load((Path(__file__).parent / "data" / "guide-compose.yml").read_text(encoding="utf-8"))
SERVICE = "vllm-llama31-8b-fp8"


@pytest.fixture
def card() -> catalog.Card:
    return catalog.load("llama31-8b-fp8")


def test_hub_source_is_the_guide_key_by_key(card: catalog.Card) -> None:
    document = compose.document(card, card.with_profile("throughput"), source="hub")
    ours, guide = document["services"][SERVICE], GUIDE["services"][SERVICE]
    assert list(document["services"]) == list(GUIDE["services"])
    assert list(ours) == list(guide)
    for key, value in guide.items():
        assert ours[key] == value, key


def test_command_prints_the_guide(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compose", "llama31-8b-fp8", "--source", "hub"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["services"] == GUIDE["services"]


def test_local_source_is_offline_pinned_and_without_token(card: catalog.Card) -> None:
    document = compose.document(
        card, card.with_profile("throughput"), image_digest="sha256:" + "a" * 64, commit="b" * 40
    )
    service = document["services"][SERVICE]
    assert service["image"] == "nvcr.io/nvidia/vllm:25.09-py3@sha256:" + "a" * 64
    assert service["environment"] == {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": "/root/.cache/huggingface"}
    words = service["command"]
    assert words[words.index("--revision") + 1] == words[words.index("--tokenizer-revision") + 1] == "b" * 40
    assert words[words.index("--served-model-name") + 1] == card.repo
    assert "--trust-remote-code" not in words
    assert "TOKEN" not in yaml.safe_dump(document)


def test_a_digest_in_the_reference_is_replaced_not_doubled(card: catalog.Card) -> None:
    document = compose.document(card, {}, image="r.example/v@sha256:" + "1" * 64, image_digest="sha256:" + "2" * 64)
    assert document["services"][SERVICE]["image"] == "r.example/v@sha256:" + "2" * 64


@pytest.mark.parametrize(
    ("image", "first"),
    [
        ("nvcr.io/nvidia/vllm:26.06-py3", "vllm"),
        ("vllm/vllm-openai:v0.24.0-ubuntu2404", "nvidia/Llama-3.1-8B-Instruct-FP8"),
        ("mirror.example/vllm/vllm-openai@sha256:" + "1" * 64, "nvidia/Llama-3.1-8B-Instruct-FP8"),
    ],
)
def test_upstreams_images_serve_by_themselves(card: catalog.Card, image: str, first: str) -> None:
    assert compose.document(card, {}, image=image)["services"][SERVICE]["command"][0] == first


@pytest.mark.parametrize(
    ("image", "entrypoint", "command"),
    [
        ("nvcr.io/nvidia/vllm:26.06-py3", None, [*compose.KEYED, "vllm", "serve"]),
        ("vllm/vllm-openai:v0.24.0", [*compose.KEYED, "vllm", "serve"], ["nvidia/Llama-3.1-8B-Instruct-FP8"]),
    ],
)
def test_a_key_comes_from_a_file_and_into_no_argument(
    card: catalog.Card, image: str, entrypoint: list[str] | None, command: list[str]
) -> None:
    document = compose.document(card, {}, image=image, keyed=True)
    service = document["services"][SERVICE]
    assert service.get("entrypoint") == entrypoint
    assert service["command"][: len(command)] == command
    assert service["secrets"] == ["engine_key"] and "VLLM_API_KEY" not in service["environment"]
    assert document["secrets"] == {"engine_key": {"file": KEY_FILE}} and compose.KEY_FILE == KEY_FILE
    assert compose.without_key(service["command"])[-1] == card.repo


def test_the_key_is_in_the_engine_s_environment() -> None:
    """As Compose hands it over: `$$` is `$` then."""
    script = compose.KEYED[2].replace("$$", "$").replace("/run/secrets/", "./")
    with tempfile.TemporaryDirectory() as folder:
        argv = ["sh", "-c", script, "sh", "sh", "-c", 'echo "$VLLM_API_KEY $1"', "sh", "a b"]
        refused = subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=False)
        assert refused.returncode != 0 and refused.stdout == ""  # no key, no engine
        Path(folder, "engine_key").write_text("0123456789\n", encoding="ascii")
        done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout == "0123456789 a b\n"


def test_profile_and_port(card: catalog.Card) -> None:
    document = compose.document(card, card.with_profile("low_latency"), port=8123)
    words = document["services"][SERVICE]["command"]
    assert words[words.index("--max-model-len") + 1] == "16384"
    assert words[words.index("--gpu-memory-utilization") + 1] == "0.85"
    assert document["services"][SERVICE]["ports"] == ["8123:8000"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"enforce_eager": True}, ["--enforce-eager"]),
        ({"enable_prefix_caching": False}, []),
        ({"max_num_seqs": 8, "dtype": "auto"}, ["--max-num-seqs", "8", "--dtype", "auto"]),
        ({"speculative_config": {"method": "mtp"}}, ["--speculative-config", '{"method": "mtp"}']),
        ({"gpu_memory_utilization": 0.9}, ["--gpu-memory-utilization", "0.90"]),
    ],
)
def test_flags(arguments: catalog.Arguments, words: list[str]) -> None:
    assert compose.flags(arguments) == words
