"""The catalogue against NVIDIA's recipes for Sparks: image, environment, every flag, speculation, measured figures."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from sparkfleet import SparkfleetError
from sparkfleet.planning import catalog, compose, memory_plan, vllm_versions
from sparkfleet.planning.catalog import Card
from sparkfleet.planning.target import Settings, Target
from tests.unit import ROOT

FACTS: dict[str, Any] = yaml.safe_load(
    (ROOT / "tests" / "unit" / "data" / "nvidia-spark-recipes.yml").read_text(encoding="utf-8")
)
RECIPES: list[dict[str, Any]] = FACTS["recipes"]
CARDS = [catalog.load(name) for name in catalog.names()]
#: Flags that Sparkfleet sets itself, by variables of the inventory.
OURS = {"host", "port"}


def card_of(recipe: dict[str, Any]) -> Card:
    (found,) = (card for card in CARDS if card.repo == recipe["hf"] and card.sparks == recipe["sparks"])
    return found


def plain(flags: dict[str, Any]) -> dict[str, Any]:
    """Flags as vLLM understands them: JSON read, dotted names nested, sizes in bytes."""
    made: dict[str, Any] = {}
    for name, value in flags.items():
        given = json.loads(value) if isinstance(value, str) and value.startswith("{") else value
        if name == "kv_cache_memory_bytes" and given == "8G":
            given = 8 << 30
        head, dot, rest = name.partition(".")
        if dot:
            made.setdefault(head, {})[rest] = given
        else:
            made[head] = given
    return made


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: f"{recipe['id']} on {recipe['sparks']}")
def test_a_recipe_is_a_card_flag_by_flag(recipe: dict[str, Any]) -> None:
    card = card_of(recipe)
    assert card.image == recipe["image"]["name"]
    assert card.environment == {name: str(value) for name, value in recipe["env"].items()}
    made = dict(Target.of(Settings(model=card.name)).engines[0].arguments)
    wanted = plain({name: value for name, value in recipe["flags"].items() if name not in OURS})
    assert made == wanted
    # vLLM in the image, as the recipe says or the tag names it
    if recipe["vllm"]:
        assert card.engine() == vllm_versions.Engine.parse(recipe["vllm"])
    assert vllm_versions.moves(card.image) == recipe["image"]["mutable"]
    assert f"{recipe['commit']}, {recipe['file']}" in " ".join(card.source.read_text(encoding="utf-8").split())
    speeds = {entry.tok_s: entry for entry in card.measured}
    for figure in recipe["measured"]:
        entry = speeds[figure["decode_tok_s_per_user"]]
        assert entry.ttft_ms == (figure["ttft_ms_calc"] or 0) and figure["commit"] in entry.source


def test_one_spark_and_more() -> None:
    sparks = [recipe["sparks"] for recipe in RECIPES]
    assert (sparks.count(1), sparks.count(2), sparks.count(4)) == (10, 8, 1)
    assert sorted(card.name for card in CARDS if card.sparks > 1) == sorted(
        card_of(recipe).name for recipe in RECIPES if recipe["sparks"] > 1
    )


@pytest.mark.parametrize("name", [card.name for card in CARDS if card.sparks > 1])
def test_more_sparks_are_planned_for_each_of_them_and_not_deployed(name: str) -> None:
    card = catalog.load(name)
    plan = memory_plan.make(card, card.with_profile("throughput"))
    assert plan.fits and plan.sparks == card.sparks
    assert plan.weights_gib < card.weights.memory_gib
    with pytest.raises(SparkfleetError, match=rf"model {name} spans {card.sparks} Sparks.*not deploy one engine"):
        compose.document(card, card.arguments)
