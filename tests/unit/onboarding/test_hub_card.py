"""A card from the Hub, asked by the real client, and from a folder: bounded, with the source of each field."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from simulator.internet import hub as stand_in

from sparkfleet import SparkfleetError
from sparkfleet.fleet import model_files
from sparkfleet.fleet.model_files import Way
from sparkfleet.onboarding import hub_card, model_choice
from sparkfleet.onboarding.hub_card import About
from sparkfleet.packaging import hub_client
from sparkfleet.planning import catalog, memory_plan, model_config, verification
from sparkfleet.planning.card_draft import Draft
from sparkfleet.planning.target import EngineSettings, EngineTarget
from tests.unit.fakes.fake_hub import Hub, serve
from tests.unit.planning.test_model_config import FOLDER, SHAPES, config

TOKEN = "hf_canary"
CONFIG = (FOLDER / "Qwen--Qwen3-8B.json").read_bytes()
INDEX = json.dumps({"metadata": {"total_size": 4900}, "weight_map": {"a": "model.safetensors"}}).encode()
FILES = {
    "config.json": CONFIG,
    "model.safetensors": b"w" * 5000,
    "model.safetensors.index.json": INDEX,
    "tokenizer_config.json": b'{"chat_template": "{% if enable_thinking %}"}',
    "original/model.bin": b"x" * 9000,
    "weights.bin": b"x" * 9000,
}


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, client: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(hub_client, "build", lambda folder: client)
    monkeypatch.setattr(catalog, "STATE", tmp_path / "state")
    for name in ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve(Hub(repo="acme/tiny-8b", files=dict(FILES), large=("model.safetensors",), licence="mit")) as served:
        yield served


def draft(hub: Hub, revision: str = "main", **way: str) -> Draft:
    return hub_card.draft(hub_card.ask(hub.repo, revision, Way(hub.url, **way)))


# -- the Hub ---------------------------------------------------------------------------------------------------------


def test_a_card_from_the_hub(hub: Hub) -> None:
    made = draft(hub)
    card = hub_card.check(made, "it")
    assert (card.name, card.service, card.repo) == ("tiny-8b", "vllm-tiny-8b", "acme/tiny-8b")
    assert card.revision == hub.commit
    assert (card.licence.name, card.licence.gated) == ("mit", False)
    assert card.shape.layers == 36 and card.tool_call_parser == "hermes" and not card.verified
    assert card.arguments["default_chat_template_kwargs"] == {"enable_thinking": False}
    assert made.origin["revision"] == "what main is on the Hub"
    assert made.origin["shape.layers"] == "config.json: num_hidden_layers"
    assert made.origin["weights.loaded_gib"].endswith("total_size of the safetensors' index")
    asked = {path.rpartition("/")[2] for _, path, _ in hub.asked if "/resolve/" in path}
    assert asked == {"config.json", "tokenizer_config.json", "model.safetensors.index.json"}  # and no weights


def test_the_sizes_are_those_of_what_is_fetched(hub: Hub) -> None:
    about = hub_card.ask(hub.repo, "main", Way(hub.url))
    assert set(about.files) == {name for name in FILES if not name.endswith(".bin")}
    assert about.tensor_bytes == 4900


def test_a_revision_is_asked_for(hub: Hub) -> None:
    assert draft(hub, hub.commit).origin["revision"] == "the requested commit"
    with pytest.raises(SparkfleetError, match=r"no card for acme/tiny-8b@v9: .*has no revision v9"):
        draft(hub, "v9")


def test_a_gated_model_needs_a_token_and_says_so(hub: Hub) -> None:
    hub.gated, hub.tokens = True, {TOKEN: True, "hf_other": False}
    with pytest.raises(SparkfleetError, match=r"is gated and this host has no Hugging Face token.*hf auth login"):
        draft(hub)
    with pytest.raises(SparkfleetError, match="accept its licence") as error:
        draft(hub, token="hf_other")
    assert "hf_other" not in str(error.value)
    card = hub_card.check(draft(hub, token=TOKEN), "it")
    assert card.licence.gated
    assert TOKEN not in draft(hub, token=TOKEN).text()


def test_a_hub_that_is_not_reached_or_slow(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SparkfleetError, match=r"cannot be reached.*sparkfleet card FOLDER --repo acme/tiny-8b"):
        hub_card.ask("acme/tiny-8b", "main", Way("http://127.0.0.1:9"))
    monkeypatch.setattr(hub_card, "SECONDS", 5.05)
    hub.pause = 0.5
    with pytest.raises(SparkfleetError, match="within"):
        draft(hub)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("config.json", b"[" * 500 + b"]" * 500, "nested more than 64 deep"),
        ("config.json", b'{"num_hidden_layers": 1e999}', "a number is out of range"),
        ("config.json", b"{", "not JSON"),
        ("config.json", b"[]", "not an object"),
        ("config.json", b"{}", "model_type"),
        ("config.json", b"\xff\xfe{}", "not JSON"),
        ("config.json", b'{"a": "' + b"x" * (5 << 20) + b'"}', "too large to be read"),
        ("tokenizer_config.json", b"{", ""),
        ("model.safetensors.index.json", b'{"metadata": {"total_size": "many"}}', ""),
        ("model.safetensors.index.json", b"[" * 3000, ""),
    ],
)
def test_files_that_are_not_what_they_should_be(hub: Hub, name: str, content: bytes, complaint: str) -> None:
    hub.files[name] = content
    if not complaint:  # of a file that the card can do without
        assert draft(hub).data["repo"] == hub.repo
        return
    with pytest.raises(SparkfleetError) as error:
        draft(hub)
    assert complaint in str(error.value) and str(error.value).count("\n") == 0


def test_a_file_that_is_another_than_the_list_says(hub: Hub) -> None:
    hub.corrupt["config.json"] = 99
    with pytest.raises(SparkfleetError, match=r"config.json of acme/tiny-8b arrived with a content other than"):
        draft(hub)


def test_what_has_no_safetensors_or_no_config(hub: Hub) -> None:
    del hub.files["config.json"]
    with pytest.raises(SparkfleetError, match=r"acme/tiny-8b: config.json is missing in the Hub \(127"):
        draft(hub)
    hub.files = {"config.json": CONFIG, "tiny.gguf": b"x"}
    with pytest.raises(SparkfleetError, match=r"there are no safetensors in .* \(there are gguf, json\)"):
        draft(hub)


def test_infinity_in_config_json(hub: Hub) -> None:
    hub.files["config.json"] = CONFIG.replace(b'"use_cache": true', b'"time_step_limit": [0.0, Infinity]')
    assert draft(hub).data["shape"]["layers"] == 36


@pytest.mark.parametrize(
    ("verb", "body"),
    [
        ("revision", b"[]"),
        ("tree", b"{}"),
        ("revision", b'{"id": "a/b", "sha": "../x", "siblings": []}'),
        ("tree", b"[["),
    ],
)
def test_answers_that_no_hub_gives(hub: Hub, verb: str, body: bytes) -> None:
    hub.answer[verb] = body
    with pytest.raises(SparkfleetError, match="no card for"):
        draft(hub)


def test_the_simulated_internet_gives_a_card(tmp_path: Path) -> None:
    folder = tmp_path / "hub" / "acme" / "tiny"
    (folder / "files").mkdir(parents=True)
    (folder / "repo.json").write_text(json.dumps({"gated": False, "license": "apache-2.0"}))
    for name in ("config.json", "model.safetensors"):
        (folder / "files" / name).write_bytes(FILES[name])
    server: ThreadingHTTPServer = stand_in.server(tmp_path / "hub", tmp_path / "tokens.json", "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        about = hub_card.ask("acme/tiny", "main", Way(f"http://127.0.0.1:{server.server_address[1]}"))
    finally:
        server.shutdown()
        server.server_close()
    assert about.licence == "apache-2.0" and about.gated is False
    made = hub_card.draft(about)
    assert any("no chat template" in words for words in made.unknown)


# -- a folder --------------------------------------------------------------------------------------------------------


def folder_of(tmp_path: Path, files: dict[str, bytes]) -> Path:
    folder = tmp_path / "model"
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_a_card_from_a_folder(tmp_path: Path) -> None:
    front = b"---\nlicense: other\nlicense_name: acme-1\n---\n# Tiny\n"
    folder = folder_of(tmp_path, {**FILES, "README.md": front, ".git/x": b"1", "modeling.py": b"code"})
    about = hub_card.inspect_folder(folder, "acme/tiny@v1")
    assert set(about.files) == {*(name for name in FILES if not name.endswith(".bin")), "README.md"}
    made = hub_card.draft(about)
    card = hub_card.check(made, "it")
    assert (card.repo, card.revision, card.licence.name) == ("acme/tiny", "v1", "acme-1")
    assert any("(gated)" in words for words in made.unknown)
    assert made.origin["licence.gated"] == "not stated anywhere"


def test_a_folder_of_the_hub_cache_says_what_it_is(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--acme--tiny" / "snapshots" / ("1" * 40)
    folder_of(tmp_path, FILES).rename(tmp_path / "blobs")
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).symlink_to(tmp_path / "blobs" / name)
    about = hub_card.inspect_folder(snapshot)
    assert (about.repo, about.revision) == ("acme/tiny", "1" * 40)
    assert about.files == {"config.json": len(CONFIG), "model.safetensors": 5000}


def test_folders_that_will_not_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path, FILES)
    with pytest.raises(SparkfleetError, match="does not show which model of the Hub it holds: add --repo"):
        hub_card.inspect_folder(folder)
    with pytest.raises(SparkfleetError, match="--repo 'acme': write ORG/NAME"):
        hub_card.inspect_folder(folder, "acme")
    monkeypatch.setattr(hub_card, "MOST_FILES", 3)
    with pytest.raises(SparkfleetError, match="more than 3 files"):
        hub_card.inspect_folder(folder, "acme/tiny")


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_real_models_give_cards_with_a_plan(name: str, tmp_path: Path) -> None:
    """Every model that is read ends as a card that the schema takes, and the planner answers it."""
    repo = name.replace("--", "/", 1)
    about = About("the Hub", repo, "main", "", {"a.safetensors": 10**10}, {"config.json": json.dumps(config(name))})
    made = hub_card.draft(about)
    path = tmp_path / "card.yml"
    path.write_text(made.text(), encoding="utf-8")
    card = catalog.parse(path)
    assert card.shape.layers == SHAPES[name][0]
    assert card.vision is ("vision_config" in config(name))
    made_plan = memory_plan.make(card, card.arguments)
    assert made_plan.weights_gib > 0
    assert (made_plan.kv_cache_tokens > 0) is (card.shape.attention[0].kind != "encoder")


ENCODER = config("sentence-transformers--all-MiniLM-L6-v2")
TWO_STEPS = {"modules.json": "[]"}


@pytest.mark.parametrize(
    ("data", "files", "kinds", "share"),
    [
        (ENCODER, TWO_STEPS, ("embeddings",), 0.1),
        ({**ENCODER, "architectures": ["BertForSequenceClassification"]}, {}, ("rerank",), 0.1),
        (config("Qwen--Qwen3-8B"), TWO_STEPS, ("embeddings",), 0.8),
        (config("Qwen--Qwen3-8B"), {}, ("chat", "completion", "stream", "concurrency", "tool_call", "json_schema",
                                        "needle"), 0.8),
    ],
)  # fmt: skip
def test_a_model_that_gives_vectors_or_scores(
    data: dict[str, Any], files: dict[str, str], kinds: tuple[str, ...], share: float, tmp_path: Path
) -> None:
    sizes = {"a.safetensors": 10**8, **dict.fromkeys(files, 2)}
    made = hub_card.draft(About("the Hub", "acme/it", "main", "", sizes, {"config.json": json.dumps(data)}))
    (tmp_path / "card.yml").write_text(made.text(), encoding="utf-8")
    target = EngineTarget.of(EngineSettings(str(tmp_path / "card.yml")), "local")
    card, arguments = target.card, target.arguments
    assert {*verification.kinds(card, arguments)} == {*kinds}
    assert card.arguments["gpu_memory_utilization"] == share
    pools = kinds[0] in ("embeddings", "rerank")
    assert (card.arguments.get("runner") == "pooling") is pools
    assert any("chat template" in words for words in made.unknown) is not pools
    assert ("enable_auto_tool_choice" in arguments) is not pools


# -- cards that a run makes ------------------------------------------------------------------------------------------


def test_a_run_makes_a_card_once_and_says_when_the_hub_moves_on(hub: Hub, tmp_path: Path) -> None:
    said: list[str] = []
    model = hub.repo
    path = hub_card.ensure(model, Way(hub.url), said.append)
    assert path is not None and path.parent == tmp_path / "state" / "cards"
    assert "a card was made from the Hub" in said[0] and str(path) in said[0]
    first = catalog.load(model)
    assert first.revision == hub.commit and not first.source.name.startswith(".")

    assert hub_card.ensure(model, Way(hub.url), said.append) == path and len(said) == 1
    hub.files["README.md"] = b"new"
    run = tmp_path / "run"
    run.mkdir()
    for _ in range(3):
        hub_card.ensure(model, Way(hub.url), said.append, once=run)
    assert len(said) == 2 and f"main on the Hub is {hub.commit[:12]} by now" in said[1] and "--refresh" in said[1]
    assert catalog.load(model).revision == first.revision

    hub_card.ensure(model, Way(hub.url), said.append, refresh=True)
    assert catalog.load(model).revision == hub.commit


def test_a_card_that_is_there_needs_no_hub(hub: Hub) -> None:
    hub_card.ensure(hub.repo, Way(hub.url), print)
    assert hub_card.ensure(hub.repo, Way("http://127.0.0.1:9"), print)
    assert hub_card.ensure("llama31-8b-fp8", Way("http://127.0.0.1:9"), print) is None
    assert hub_card.ensure("./card.yml", Way("http://127.0.0.1:9"), print) is None


def test_init_names_a_model_of_the_hub_as_it_was_given(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_card, "way", lambda: Way(hub.url))
    hub_card.ensure_reported(hub.repo)
    made = model_choice.offer(hub.repo, "throughput", memory_plan.Memory())
    assert made.model == hub.repo and made.variables({})["sparkfleet_model"] == hub.repo


def test_a_pinned_commit_is_never_asked_for_again(hub: Hub) -> None:
    model = f"{hub.repo}@{hub.commit}"
    hub_card.ensure(model, Way(hub.url), print)
    hub.asked.clear()
    hub_card.ensure(model, Way(hub.url), print)
    assert hub.asked == []


def test_a_model_of_the_hub_without_a_card_is_told_how() -> None:
    with pytest.raises(SparkfleetError, match="acme/none has no card yet: `sparkfleet plan acme/none` makes one"):
        catalog.load("acme/none")


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ("acme/tiny", ("acme/tiny", "main")),
        ("acme/tiny@refs/pr/1", ("acme/tiny", "refs/pr/1")),
        ("llama31-8b-fp8", None),
        ("cards/mine.yml", None),
        ("./acme/tiny", None),
        ("/acme/tiny", None),
        ("../tiny", None),
        ("a/b/c", None),
        ("acme/tiny@../x", None),
        ("acme/tiny\n", None),
    ],
)
def test_names_of_the_hub(model: str, named: Any) -> None:
    assert catalog.hub_name(model) == named


def test_a_file_comes_before_a_name_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acme").mkdir()
    (tmp_path / "acme" / "tiny").write_text("")
    assert catalog.hub_name("acme/tiny") is None


# -- text ------------------------------------------------------------------------------------------------------------

ODD = st.text(max_size=30) | st.sampled_from(
    ["a: b # c", "'", '"', "- x", "{", "null", "\x1b[31m", "é", "1e3", "@x", "%"]
)


@given(licence=ODD, place=ODD, chat=ODD)
def test_whatever_the_hub_says_the_card_is_one(licence: str, place: str, chat: str) -> None:
    texts = {"config.json": CONFIG.decode(), "tokenizer_config.json": chat, "chat_template.jinja": chat}
    about = About(place, "acme/tiny", "1" * 40, place, {"x.safetensors": 10**9}, texts, 0, True, licence, place)
    made = hub_card.draft(about)
    assert yaml.safe_load(made.text())["repo"] == "acme/tiny"
    assert "\x1b" not in made.text()


def test_the_catalogue_has_figures_like_those_that_are_made() -> None:
    """The same model, its size given: what is calculated is what a person wrote into the card."""
    sizes = {"qwen3-8b-fp8": 8.79, "llama31-8b-fp8": 8.46, "mistral-nemo-12b-fp8": 12.66}
    shapes = {"qwen3-8b-fp8": "Qwen--Qwen3-8B", "llama31-8b-fp8": "meta-llama--Meta-Llama-3.1-8B"}
    for name, file in shapes.items():
        card = catalog.load(name)
        texts = {"config.json": json.dumps(config(file))}
        about = About("x", card.repo, "main", "", {"x.safetensors": int(sizes[name] * 2**30)}, texts)
        made = hub_card.check(hub_card.draft(about), "it")
        assert made.weights.read_gb_per_token == pytest.approx(card.weights.read_gb_per_token, rel=0.01)
        assert made.shape.attention == card.shape.attention
    assert model_config.CONFIG == "config.json"


def test_a_hub_that_is_not_to_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_files, "run_client", lambda *_: pytest.fail("asked"))
    monkeypatch.setenv("HF_ENDPOINT", "hub.example")
    with pytest.raises(SparkfleetError, match=r"HF_ENDPOINT: must be .* https://\.\.\., not 'hub\.example'"):
        hub_card.way()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SparkfleetError, match=r"HF_HUB_OFFLINE is set, so the Hub is not asked; .* `sparkfleet card"):
        hub_card.ask("org/m", "main", Way())
