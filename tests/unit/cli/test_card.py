"""`sparkfleet card` and `sparkfleet plan ORG/NAME` as people type them."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparkfleet import SparkfleetError
from sparkfleet.fleet import model_files
from sparkfleet.fleet.model_files import Answer, Way
from sparkfleet.onboarding import hub_card
from sparkfleet.onboarding.hub_card import About
from sparkfleet.planning import catalog
from tests.unit.cli.test_main import run
from tests.unit.planning.test_model_config import FOLDER, config

RECIPE = """
recipe_version: "2"
model: Qwen/Qwen3-8B
container: vllm/vllm-openai:v0.28.0
env: {VLLM_X: "1", HF_TOKEN: hf_canary}
mods: [mods/x]
defaults: {port: 8000, tensor_parallel: 1, max_model_len: 40960, gpu_memory_utilization: 0.5}
command: vllm serve {model} --port {port} -tp {tensor_parallel} --max-model-len {max_model_len} --seed 1
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(catalog, "STATE", tmp_path / "state")
    monkeypatch.setattr(hub_card, "ask", asked)
    monkeypatch.setattr(model_files, "resolve", lambda *_: Answer("1" * 40))
    return tmp_path


def asked(repo: str, revision: str, hub: Way) -> About:
    if repo != "Qwen/Qwen3-8B":
        raise SparkfleetError(f"no card for {repo}@{revision}: it does not exist")
    texts = {"config.json": json.dumps(config("Qwen--Qwen3-8B"))}
    files = {"model.safetensors": 16_381_470_720, "config.json": 900}
    return About("the Hub", repo, "1" * 40, "what main is", files, texts, 0, False, "apache-2.0", "the Hub")


def test_a_card_goes_to_standard_output_and_what_is_not_known_to_standard_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, err = run(capsys, "card", "Qwen/Qwen3-8B")
    assert code == 0
    assert yaml.safe_load(out)["shape"]["layers"] == 36
    assert "layers: 36  # config.json: num_hidden_layers" in out
    assert "not known: what the weights take in memory" in err and "# - what the weights take in memory" in out


def test_a_card_goes_to_a_file_and_replaces_none(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    code, out, err = run(capsys, "card", "Qwen/Qwen3-8B", "-o", "cards/mine.yml")
    assert (code, out) == (0, "") and "cards/mine.yml: the card of Qwen/Qwen3-8B" in err
    assert catalog.parse(place / "cards" / "mine.yml").repo == "Qwen/Qwen3-8B"
    code, _, err = run(capsys, "card", "Qwen/Qwen3-8B", "-o", "cards/mine.yml")
    assert code == 2 and "is there already: --force replaces it" in err
    assert run(capsys, "card", "Qwen/Qwen3-8B", "-o", "cards/mine.yml", "--force")[0] == 0
    code, _, err = run(capsys, "card", "Qwen/Qwen3-8B", "-o", "cards", "--force")
    assert code == 2 and "is there already: name a file" in err
    assert run(capsys, "plan", "cards/mine.yml", "--json")[0] == 0


def test_a_recipe(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    (place / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    code, out, err = run(capsys, "card", "--from", "recipe.yaml")
    made = yaml.safe_load(out)
    assert code == 0 and made["arguments"] == {"max_model_len": 40960, "seed": 1}
    assert made["environment"] == {"VLLM_X": "1"} and made["image"] == "vllm/vllm-openai:v0.28.0"
    assert made["profiles"] == {"throughput": {}}
    for words in ("mods", "HF_TOKEN (value not shown)", "defaults.gpu_memory_utilization"):
        assert f"not taken: {words}" in err and f"# - {words}" in out
    assert "canary" not in out + err
    assert "image: vllm/vllm-openai:v0.28.0  # the sparkrun recipe, format 2 in recipe.yaml" in out


def test_a_command_on_standard_input(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    line = "vllm serve Qwen/Qwen3-8B --max-model-len 99999 --tool-call-parser mine"
    monkeypatch.setattr(sys, "stdin", io.StringIO(line))
    code, out, err = run(capsys, "card", "--from", "-", "--image", "nvcr.io/nvidia/vllm:26.05-py3")
    made = yaml.safe_load(out)
    assert code == 0 and made["arguments"] == {"max_model_len": 40960}
    assert (made["tool_call_parser"], made["image"]) == ("mine", "nvcr.io/nvidia/vllm:26.05-py3")
    assert "--max-model-len 99999: the model's context is 40960 tokens" in err


def test_a_recipe_with_a_folder_makes_no_request(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    (place / "recipe.yaml").write_text(RECIPE.replace("Qwen/Qwen3-8B", "acme/other"), encoding="utf-8")
    folder = place / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((FOLDER / "Qwen--Qwen3-8B.json").read_bytes())
    (folder / "model.safetensors").write_bytes(b"x" * 1000)
    code, out, err = run(capsys, "card", "./model", "--repo", "acme/mine", "--from", "recipe.yaml")
    assert code == 0 and yaml.safe_load(out)["repo"] == "acme/mine"
    assert "not taken: model acme/other: you gave acme/mine" in err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["card"], "name a model of the Hub (ORG/NAME), a folder, or a recipe"),
        (["card", "nowhere"], "'nowhere' is neither a folder that is there nor a model of the Hub"),
        (["card", "acme/none"], "no card for acme/none@main: it does not exist"),
        (["card", "--from", "nowhere.yml"], "--from nowhere.yml cannot be read"),
        (["card", "--from", "/dev/null"], "cannot be read: /dev/null: not a regular file"),
        (["card", "Qwen/Qwen3-8B", "--repo", "a/b"], "--repo names the model that a folder holds"),
        (["card", "Qwen/Qwen3-8B", "--image", "UPPER CASE"], "image: must be the reference of an image"),
        (["card", "x", "--refresh"], "--refresh is for a model of the Hub"),
        (["plan", "acme/none"], "no card for acme/none@main: it does not exist"),
        (["plan", "a/b/c"], "does not exist: give the path of a YAML file"),
        (["card", "Qwen/Qwen3-8B", "-o", "/proc/nowhere/x.yml"], "cannot be written"),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], words: list[str], complaint: str) -> None:
    code, out, err = run(capsys, *words)
    assert code == 2 and complaint in err and out == ""
    assert err.startswith("sparkfleet: ") or "not known" in err


def test_a_recipe_without_a_model(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    (place / "recipe.yaml").write_text("model: /nfs/weights\ncommand: vllm serve {model}\n", encoding="utf-8")
    code, _, err = run(capsys, "card", "--from", "recipe.yaml")
    assert code == 2 and "it names no model of the Hub as ORG/NAME" in err and "/nfs/weights" in err


def test_plan_makes_a_card_and_uses_it_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = run(capsys, "plan", "Qwen/Qwen3-8B", "--json")
    made: dict[str, Any] = json.loads(out)
    assert code == 0 and made["model"] == "qwen3-8b" and made["fits"]
    assert "Qwen/Qwen3-8B: a card was made from the Hub at 111111111111" in err
    monkeypatch.setattr(hub_card, "ask", lambda *_: pytest.fail("asked again"))
    code, again, err = run(capsys, "plan", "Qwen/Qwen3-8B", "--json")
    assert (code, json.loads(again), err) == (0, made, "")
    monkeypatch.setattr(model_files, "resolve", lambda *_: Answer("2" * 40))
    code, _, err = run(capsys, "compose", "Qwen/Qwen3-8B")
    assert code == 0 and "main on the Hub is 222222222222 by now; the card stays at 111111111111" in err
    monkeypatch.setattr(hub_card, "ask", asked)
    code, _, err = run(capsys, "card", "Qwen/Qwen3-8B", "--refresh")
    assert code == 0 and "a card was made" in err


def test_the_token_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_TOKEN", "HF_TOKEN_PATH", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert hub_card.way() == Way()
    (tmp_path / "token").write_text("hf_file\n")
    assert hub_card.way().token == "hf_file"
    monkeypatch.setenv("HF_TOKEN", " hf_env ")
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example")
    assert hub_card.way() == Way("https://hub.example", "hf_env")


def test_an_inventory_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (("lock", "--check"), ("rollout", "--dry"), ("status",)):
        code, _, err = run(capsys, *words, "-i", "/nowhere")
        assert (code, err) == (2, "sparkfleet: inventory '/nowhere': no such file or folder; copy inventory/example\n")
