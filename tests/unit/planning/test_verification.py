"""Which kinds a card is asked: by what the model is for, and how it is served."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import yaml
from sparkfleet_host.verify import GENERATIVE, KINDS

from sparkfleet import SparkfleetError
from sparkfleet.planning import catalog, target, verification

CHATS = {*GENERATIVE, "concurrency", "json_schema", "needle"}


def kinds(model: str, **settings: Any) -> set[str]:
    made = target.EngineTarget.of(target.EngineSettings(model, **settings), "local")
    return {*made.verify["kinds"]}


def test_the_schema_knows_the_kinds() -> None:
    listed = catalog.schema()["properties"]["verify"]["properties"]["kinds"]["items"]["enum"]
    assert listed == [*KINDS]


@pytest.mark.parametrize(
    ("model", "settings", "more"),
    [
        ("llama31-8b-fp8", {}, {"tool_call"}),
        ("llama31-8b-fp8", {"tool_calls": False}, set()),
        ("qwen36-27b-nvfp4", {}, {"tool_call", "reasoning", "image"}),
        ("qwen36-27b-nvfp4", {"arguments": {"limit_mm_per_prompt": {"image": 0}}}, {"tool_call", "reasoning"}),
        ("qwen36-27b-nvfp4", {"arguments": {"limit_mm_per_prompt": {"video": 0}}}, {"tool_call", "reasoning", "image"}),
        ("qwen36-27b-nvfp4", {"arguments": {"language_model_only": True}}, {"tool_call", "reasoning"}),
        ("qwen38-27b-nvfp4", {}, {"tool_call", "reasoning"}),  # its arguments exclude pictures
        ("llama31-8b-fp8", {"arguments": {"reasoning_parser": "x"}}, {"tool_call", "reasoning"}),
    ],
)
def test_a_model_that_gives_text(model: str, settings: dict[str, Any], more: set[str]) -> None:
    assert kinds(model, **settings) == CHATS | more


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"runner": "pooling"}, {"embeddings"}),
        ({"task": "embed"}, {"embeddings"}),
        ({"runner": "pooling", "convert": "embed"}, {"embeddings"}),
        ({"runner": "pooling", "convert": "classify"}, {"rerank"}),
        ({"task": "score"}, {"rerank"}),
    ],
)
def test_a_model_that_gives_numbers(arguments: dict[str, Any], expected: set[str]) -> None:
    assert kinds("llama31-8b-fp8", arguments=arguments) == expected


def test_every_card_has_what_its_kinds_need() -> None:
    for name in catalog.names():
        assert kinds(name) >= CHATS


def test_a_card_that_lists_its_kinds_is_asked_these_in_the_usual_order() -> None:
    card = catalog.load("llama31-8b-fp8")
    asked = dataclasses.replace(card.verify, kinds=("needle", "chat"))
    assert verification.kinds(dataclasses.replace(card, verify=asked), {"reasoning_parser": "x"}) == ("chat", "needle")


def card_with(asked: dict[str, Any]) -> catalog.Card:
    path = catalog.catalogue_folder() / "llama31-8b-fp8.yml"
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    return catalog.of_text(path, yaml.safe_dump({**data, "verify": asked}))


def test_a_model_without_text_needs_no_question() -> None:
    assert card_with({"kinds": ["embeddings"]}).verify == catalog.Question(kinds=("embeddings",))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({}, "verify: the kind chat needs question and expect"),
        ({"question": "q", "prompt": "p", "prompt_expect": "x"}, "verify: the kind chat needs expect"),
        ({"question": "q", "expect": "e"}, "verify: the kind completion needs prompt and prompt_expect"),
        ({"kinds": ["concurrency"]}, "verify: the kind concurrency needs question and expect"),
        ({"kinds": ["chats"]}, "one of chat, completion, stream, embeddings, rerank, classify, "),
        ({"kinds": []}, "verify.kinds: "),
    ],
)
def test_a_card_that_lacks_what_its_kinds_need_is_refused(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(SparkfleetError, match=r"llama31-8b-fp8\.yml:\d+: ") as caught:
        card_with(asked)
    assert words in str(caught.value)
