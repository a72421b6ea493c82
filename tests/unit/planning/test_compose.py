"""The rendered service against the guide's, and what the offline way changes."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.http import KEY_FILE

from sparkfleet import SparkfleetError
from sparkfleet.cli import main
from sparkfleet.planning import catalog, compose
from tests.unit import DATA

GUIDE = yaml.safe_load((DATA / "guide-compose.yml").read_text(encoding="utf-8"))
SERVICE = "vllm-llama31-8b-fp8"
DOCKER = shutil.which("docker") is not None


@pytest.fixture
def card() -> catalog.Card:
    return catalog.load("llama31-8b-fp8")


def test_hub_source_is_the_guide_key_by_key(card: catalog.Card) -> None:
    document = compose.document(card, card.with_profile("throughput"), source="hub")
    ours, guide = document["services"][SERVICE], GUIDE["services"][SERVICE]
    assert list(document["services"]) == list(GUIDE["services"])
    assert list(ours) == [*guide, "logging"]
    for key, value in guide.items():
        assert ours[key] == value, key


def test_a_ca_is_mounted_and_named(card: catalog.Card) -> None:
    plain = compose.document(card, card.with_profile("throughput"), source="hub")["services"][SERVICE]
    known = compose.document(card, card.with_profile("throughput"), source="hub", ca_file="/etc/ssl/own.pem")
    service = known["services"][SERVICE]
    assert service["volumes"] == [*plain["volumes"], f"/etc/ssl/own.pem:{compose.CA_IN_CONTAINER}:ro"]
    more = dict.fromkeys(("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"), compose.CA_IN_CONTAINER)
    assert service["environment"] == {**plain["environment"], **more}
    assert {key: value for key, value in service.items() if key not in ("volumes", "environment")} == {
        key: value for key, value in plain.items() if key not in ("volumes", "environment")
    }
    local = compose.document(card, card.with_profile("throughput"), ca_file="/etc/ssl/own.pem")["services"][SERVICE]
    assert local["volumes"][-1] == service["volumes"][-1] and local["environment"].items() >= more.items()


def test_command_prints_the_guide(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["compose", "llama31-8b-fp8", "--source", "hub"]) == 0
    services = yaml.safe_load(capsys.readouterr().out)["services"]
    assert services.pop(SERVICE).pop("logging")["driver"] == "json-file" and not services


#: What Compose would replace, refuse or read as something else.
AWKWARD = ["a$b", "${HOME}", "$$", "$", "${", "$(id)", '{"$defs": {}}', "a: b", "# no comment", "${HOME:?no}", "é\n\t"]


def real_compose(file: Path) -> dict[str, Any]:
    """What Docker Compose makes of a file: this machine's plugin, or that of a simulated Spark's image."""
    here = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False) if DOCKER else None
    if here and here.returncode == 0:
        argv = ["docker", "compose"]
    else:
        wanted = ["docker", "images", "--quiet", "--filter", "reference=sparkfleet-sim/dgxos"]
        images = subprocess.run(wanted, capture_output=True, text=True, check=False).stdout.split() if DOCKER else []
        if not images:
            pytest.skip("neither the Compose plugin nor the image of a simulated Spark is on this machine")
        argv = ["docker", "run", "--rm", "--interactive", "--network", "none", "--entrypoint", "docker"]
        argv += ["--env", "HF_TOKEN", "--env", "HOME=/root", images[0], "compose"]
    done = subprocess.run(
        [*argv, "--file", "-", "config", "--format", "json"],
        input=file.read_text(encoding="utf-8"),
        env={**os.environ, "HF_TOKEN": "hf_real"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0 and "level=warning" not in done.stderr, done.stderr
    made: dict[str, Any] = json.loads(done.stdout)
    return made


@pytest.mark.parametrize("source", ["local", "hub"])
def test_compose_itself_replaces_nothing_of_ours(card: catalog.Card, tmp_path: Path, source: compose.Source) -> None:
    arguments: catalog.Arguments = {f"awkward_{place}": value for place, value in enumerate(AWKWARD)}
    environment = {f"AWKWARD_{place}": value for place, value in enumerate(AWKWARD)}
    document = compose.document(
        card,
        {**arguments, "hf_overrides": {"$defs": {"a$b": "${HOME}"}}},
        environment=environment,
        source=source,
        image_digest="sha256:" + "a" * 64,
        cache_dir="/srv/$models",
        api_key_enabled=source == "local",
    )
    file = tmp_path / "compose.yml"
    file.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    made = real_compose(file)["services"][SERVICE]
    # `config` writes `$` as a file has it, `$$`: a file again.
    got = {name: compose.plain(value) for name, value in made["environment"].items()}
    assert {name: got[name] for name in environment} == environment
    words = [compose.plain(word) for word in made["command"]]
    for place, value in enumerate(AWKWARD):
        assert words[words.index(f"--awkward-{place}") + 1] == value
    assert json.loads(words[words.index("--hf-overrides") + 1]) == {"$defs": {"a$b": "${HOME}"}}
    assert compose.plain(made["volumes"][0]["source"]) == "/srv/$models"
    assert made["logging"]["options"] == {"max-file": "5", "max-size": "50m"}
    if source == "hub":
        assert got["HF_TOKEN"] == got["HUGGING_FACE_HUB_TOKEN"] == "hf_real"
    else:
        assert made["cap_drop"] == ["ALL"] and made["pids_limit"] == 8192


def test_a_word_of_compose_and_back() -> None:
    for text in AWKWARD:
        assert compose.plain(compose.literal(text)) == text


def test_the_inventory_s_environment_wins_over_the_card_s_and_that_over_ours(card: catalog.Card) -> None:
    known = dataclasses.replace(card, environment={"A": "card", "B": "card", "HF_HUB_OFFLINE": "card"})
    for source in ("local", "hub"):
        made = compose.document(known, {}, environment={"A": "inventory", "HF_TOKEN": "own"}, source=source)  # type: ignore[arg-type]
        environment = made["services"][SERVICE]["environment"]
        assert environment["A"] == "inventory" and environment["B"] == environment["HF_HUB_OFFLINE"] == "card"
        assert environment["HF_TOKEN"] == "own"


@pytest.mark.parametrize("value", [0.855, 0.9, 0.85, 0.1234, 1.0])
def test_a_utilization_is_handed_on_as_it_is(value: float) -> None:
    assert float(compose.flags({"gpu_memory_utilization": value})[1]) == value


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


def test_what_an_image_compiled_is_kept_in_a_folder_of_its_own(card: catalog.Card) -> None:
    def volumes(**given: Any) -> list[str]:
        document = compose.document(card, {}, compile_cache_dir="/var/cache/own", **given)
        return list(document["services"][SERVICE]["volumes"])

    model = "/opt/hf:/root/.cache/huggingface"
    kept = [f"/var/cache/own/0123456789ab/{name}:{path}" for name, path in compose.COMPILE_CACHES.items()]
    assert volumes(image_digest="sha256:0123456789abcdef" + "0" * 48) == [model, *kept] and kept
    assert volumes() == volumes(source="hub", image_digest="sha256:" + "0" * 64) == [model]


@pytest.mark.parametrize(
    ("addresses", "ports"),
    [
        ([], ["8000:8000"]),
        (["192.0.2.7"], ["127.0.0.1:8000:8000", "192.0.2.7:8000:8000"]),
        (["fd00::7", "127.0.0.1"], ["127.0.0.1:8000:8000", "[fd00::7]:8000:8000"]),
    ],
)
def test_an_engine_with_addresses_is_published_there_and_on_loopback(
    card: catalog.Card, addresses: list[str], ports: list[str]
) -> None:
    assert compose.document(card, {}, addresses=addresses)["services"][SERVICE]["ports"] == ports


def test_only_what_hands_over_the_key_is_taken_off_a_command() -> None:
    plain = ["vllm", "serve", "a/b"]
    assert compose.without_key(plain) == compose.without_key([*compose.KEYED, *plain]) == plain
    assert compose.without_key([*compose.KEYED[:-1], *plain]) == [*compose.KEYED[:-1], *plain]


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
    document = compose.document(card, {}, image=image, api_key_enabled=True)
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


def test_a_text_that_would_be_another_flag_is_refused() -> None:
    with pytest.raises(SparkfleetError, match="would be another flag of vllm serve"):
        compose.flags({"enable_log_requests": "--trust-remote-code"})
    assert compose.flags({"swap_space": "-1"}) == ["--swap-space", "-1"]
