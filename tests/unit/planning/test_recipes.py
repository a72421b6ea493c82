"""The catalogue against NVIDIA's recipes for Sparks: image, environment, every flag, speculation, measured figures."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from sparkfleet import SparkfleetError
from sparkfleet.planning import catalog, compose, memory_plan, vllm_versions
from sparkfleet.planning.catalog import Card
from sparkfleet.planning.nodes import Nodes
from sparkfleet.planning.target import Settings, Target
from tests.unit import ROOT

FACTS: dict[str, Any] = yaml.safe_load(
    (ROOT / "tests" / "unit" / "data" / "nvidia-spark-recipes.yml").read_text(encoding="utf-8")
)
RECIPES: list[dict[str, Any]] = FACTS["recipes"]
CARDS = [catalog.load(name) for name in catalog.names()]
#: Flags that Sparkfleet sets itself, by variables of the inventory.
OURS = {"host", "port"}
OWN = {"download_dir", "served_model_name", "allowed_media_domains"}


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
def test_more_sparks_are_planned_for_each_of_them_and_need_a_group(name: str) -> None:
    card = catalog.load(name)
    plan = memory_plan.make(card, card.with_profile("throughput"))
    assert plan.fits and plan.sparks == card.sparks
    assert plan.weights_gib < card.weights.memory_gib
    with pytest.raises(SparkfleetError, match=rf"model {name} spans {card.sparks} Sparks.*sparkfleet_nodes"):
        compose.document(card, card.arguments)


def flags_of(service: dict[str, Any]) -> dict[str, Any]:
    """The flags of a service's command as vLLM understands them."""
    words = [compose.plain(word) for word in service["command"]]
    found: dict[str, Any] = {}
    for place, word in enumerate(words):
        if word.startswith("--"):
            following = words[place + 1] if place + 1 < len(words) else "--"
            found[word.removeprefix("--").replace("-", "_")] = (
                True if following.startswith("--") else yaml.safe_load(following)
            )
    return found


@pytest.mark.parametrize(
    "recipe", [recipe for recipe in RECIPES if recipe["sparks"] > 1], ids=lambda recipe: str(recipe["id"])
)
def test_a_recipe_of_several_sparks_is_rendered_for_each_rank(recipe: dict[str, Any]) -> None:
    """Flags and environment are the recipe's, and what NVIDIA gives every rank."""
    card, count, told = card_of(recipe), recipe["sparks"], FACTS["common"]["more_sparks_container"]
    addresses = tuple(f"10.100.32.{number + 1}" for number in range(count))
    hosts = tuple(f"spark-{number + 1}" for number in range(count))
    for rank, own in enumerate(addresses):
        found = [
            {
                **{"name": name, "driver": "mlx5_core", "pci": pci, "link": True, "speed": 200000, "mtu": 9000},
                **{"addresses": [f"{address}/24"], "rdma": device, "rdma_active": True, "gid": 3, "default": False},
            }
            for name, pci, address, device in (
                (told["interface_example"], "0000:01:00.0", own, "rocep1s0f0"),
                ("enP2p1s0f0np0", "0002:01:00.0", f"10.100.33.{rank + 1}", "roceP2p1s0f0"),
            )
        ]
        target = Target.of(Settings(model=card.name, spans=Nodes("group", rank, hosts, addresses)))
        state = {"fabric": {"interfaces": found, "error": ""}, "engines": [{}]}
        service = target.document(state)["services"][card.service]
        ranks = {"nnodes": count, "node_rank": rank, "master_addr": addresses[0], "master_port": 29501}
        assert {*ranks, "headless"} == {*told["flags"]} and told["flags"]["master_port"] == 29501
        # Of our own: where the model lies, under which name it is served, what pictures may be fetched from.
        got = {name: value for name, value in flags_of(service).items() if name not in OWN}
        wanted = {"port": 8000, **{name: value for name, value in plain(recipe["flags"]).items() if value is not False}}
        assert got == {**wanted, **ranks, **({"headless": True} if rank else {})}
        environment = service["environment"]
        assert {environment[name] for name in told["interface_env"]} == {told["interface_example"]}
        for name in ("NCCL_IB_HCA", "NCCL_IB_DISABLE", "NCCL_IGNORE_CPU_AFFINITY"):
            assert environment[name] == str(told["env"][name])
        assert {name: environment[name] for name in recipe["env"]} == {
            name: str(value) for name, value in recipe["env"].items()
        }
        assert (service["network_mode"], service["ipc"], service["ulimits"]["memlock"]) == ("host", "host", -1)
