"""Groups of hosts that run one engine together: what an inventory may say, and NVIDIA's recipes for several Sparks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from sparkfleet_host.release_format import check_lock, check_plan, merged

from sparkfleet import SparkfleetError
from sparkfleet.planning import catalog, compose, memory_plan, nodes, plan
from sparkfleet.planning.nodes import Nodes
from sparkfleet.planning.target import Settings, Target

GROUPS = {"sparks": ["a", "b", "c"], "pair": ["a", "b"], "empty": [], "gateways": ["g"]}
ADDRESSES = {"a": "10.0.0.1", "b": "10.0.0.2", "c": "10.0.0.3"}
FABRIC = {
    "error": "",
    "interfaces": [
        {
            **{"name": name, "driver": "mlx5_core", "pci": pci, "link": True, "speed": 200000, "mtu": 9000},
            **{"addresses": [address], "rdma": rdma, "rdma_active": True, "gid": 3, "default": False},
        }
        for name, pci, address, rdma in (
            ("enp1s0f0np0", "0000:01:00.0", "10.0.0.1/24", "rocep1s0f0"),
            ("enP2p1s0f0np0", "0002:01:00.0", "10.0.1.1/24", "roceP2p1s0f0"),
        )
    ],
}
#: A model of one Spark, small and regular.
SMALL = "qwen3-8b-fp8"


def variables(**of: Any) -> dict[str, dict[str, Any]]:
    """Of each host its variables."""
    return {host: {nodes.NODES: of.get(host, "pair"), nodes.ADDRESS: ADDRESSES[host]} for host in ADDRESSES}


def group(rank: int = 0, count: int = 2) -> Nodes:
    hosts = ("a", "b", "c", "d")[:count]
    return Nodes("pair", rank, hosts, tuple(f"10.0.0.{number + 1}" for number in range(count)))


def test_a_group_by_name_and_as_a_list() -> None:
    known = variables(c=[])
    assert nodes.of("b", GROUPS, known) == Nodes("pair", 1, ("a", "b"), ("10.0.0.1", "10.0.0.2"))
    assert nodes.of("c", GROUPS, known) is None
    listed = variables(a=["b", "a"], b=["b", "a"], c="")
    assert nodes.of("a", GROUPS, listed) == Nodes("b+a", 1, ("b", "a"), ("10.0.0.2", "10.0.0.1"))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("pears", "sparkfleet_nodes: 'pears' is no group of the inventory"),
        ("gateways", "g: not in the group sparks"),
        ("empty", "0 hosts, from 2 to 8"),
        (["a"], "1 hosts, from 2 to 8"),
        (["a", "a"], "a is named twice"),
        (["a", "nobody"], "nobody: not in the group sparks"),
        (["b", "c"], "a itself is not among them"),
        ({"a": 1}, "neither the name of a group nor a list of hosts"),
        (7, "neither the name of a group nor a list of hosts"),
    ],
)
def test_what_is_no_group(value: Any, words: str) -> None:
    with pytest.raises(SparkfleetError, match=words):
        nodes.of("a", GROUPS, variables(a=value))


def test_hosts_that_do_not_agree_on_their_group() -> None:
    with pytest.raises(SparkfleetError, match="a has a, b, but b has none"):
        nodes.of("a", GROUPS, variables(b=[]))
    with pytest.raises(SparkfleetError, match="a has a, b, but b has b, c"):
        nodes.of("a", GROUPS, variables(b=["b", "c"]))


@pytest.mark.parametrize("value", ["", None, "fe80::1", "spark-2", "10.0.0.300", "127.0.0.1", "0.0.0.0"])
def test_addresses_that_no_other_host_reaches(value: Any) -> None:
    known = variables()
    known["b"][nodes.ADDRESS] = value
    with pytest.raises(SparkfleetError, match="b: sparkfleet_fabric_address"):
        nodes.of("a", GROUPS, known)


def test_one_address_of_two_hosts() -> None:
    known = variables()
    known["b"][nodes.ADDRESS] = "10.0.0.1"
    with pytest.raises(SparkfleetError, match=r"a and b both have 10\.0\.0\.1"):
        nodes.of("a", GROUPS, known)


def test_a_run_without_one_of_the_hosts() -> None:
    nodes.complete("pair", ("a", "b"), ["c", "b", "a"])
    with pytest.raises(SparkfleetError, match="b of the group pair does not take part"):
        nodes.complete("pair", ("a", "b"), ["a"])


def test_tensor_parallelism_follows_from_the_number_of_hosts() -> None:
    card = catalog.load(SMALL)
    assert nodes.spread(card, {}, 4)["tensor_parallel_size"] == 4
    with pytest.raises(SparkfleetError, match="2 hosts, but .* is spread over 4"):
        nodes.spread(card, {"tensor_parallel_size": 4}, 2)
    with pytest.raises(SparkfleetError, match="its 8 KV heads are not divisible by 3"):
        nodes.spread(card, {}, 3)
    with pytest.raises(SparkfleetError, match="sparkfleet_vllm_node_rank: Sparkfleet sets it"):
        nodes.spread(card, {"node_rank": 1}, 2)
    with pytest.raises(SparkfleetError, match="sparkfleet_vllm_tensor_parallel_size: 'two'"):
        nodes.spread(card, {"tensor_parallel_size": "two"}, 2)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"model_source": "hub"}, "sparkfleet_model_source: all ranks need the same files"),
        ({"guard": False}, "sparkfleet_guard: the guards"),
        ({"guard_port": 0}, "sparkfleet_guard_port"),
        ({"firewall": True, "firewall_allow": []}, "sparkfleet_firewall: .*cannot open them yet"),
        ({"listen": ["10.0.0.1"]}, "sparkfleet_listen"),
        ({"trial": "dummy"}, "a trial is of one Spark"),
    ],
)
def test_what_does_not_go_with_a_group(setting: dict[str, Any], words: str) -> None:
    with pytest.raises(SparkfleetError, match=words):
        Target.of(Settings(model=SMALL, spans=group(), **setting))


def test_ranks_differ_in_nothing_but_their_place() -> None:
    services, releases = [], []
    for rank in (0, 1):
        target = Target.of(Settings(model=SMALL, spans=group(rank)))
        document = target.document({"fabric": FABRIC, "engines": [{}]})
        services.append(document["services"][target.engines[0].service])
        releases.append(plan.release(target, document, None, {"fabric": FABRIC}))
    head, worker = (service["command"] for service in services)
    assert head[: head.index("--node-rank")] == worker[: worker.index("--node-rank")]
    assert worker[-1] == "--headless" and "--headless" not in head
    assert services[0]["environment"]["VLLM_HOST_IP"] == "10.0.0.1"
    assert all("ports" not in service and service["network_mode"] == "host" for service in services)
    assert all(service["restart"] == "no" for service in services)
    groups = [release["plan"]["engines"][0]["group"] for release in releases]
    assert groups[0]["digest"] == groups[1]["digest"] and [item["rank"] for item in groups] == [0, 1]
    for release in releases:
        (made,) = merged(check_plan(release["plan"]), check_lock(release["lock"]))
        assert made.group is not None and made.is_worker == (made.group.rank == 1)
    other = Target.of(Settings(model=SMALL, spans=group(), arguments={"max_model_len": 4096}))
    changed = plan.group(other, other.document({"engines": [{}]}))
    assert changed and changed["digest"] != groups[0]["digest"]


def test_a_card_of_several_sparks_needs_a_group() -> None:
    with pytest.raises(SparkfleetError, match="list them in sparkfleet_nodes"):
        Target.of(Settings(model="minimax-m3-nvfp4-4x")).document()


# -- NVIDIA's recipes for several Sparks -------------------------------------------------------------------------------

#: Cards of them, and what each says of its flags: the facts of NVIDIA's recipes of 2026-11-24, as the cards have them.
RECIPES = {
    **{"deepseek-v4-flash-0731-2x": 2, "deepseek-v4-flash-vision-exp-2x": 2, "deepseek-v4-flash-2x": 2},
    **{"minimax-m27-nvfp4-2x": 2, "qwen38-flash-next-nvfp4-2x": 2, "glm53-flash-nvfp4-2x": 2},
    **{"minimax-m3-nvfp4-4x": 4},
}
FACTS = Path(__file__).parents[1] / "data" / "recipes-several-sparks.yml"


def flags_of(command: list[str]) -> dict[str, Any]:
    """The flags of a command by name; true for one without a value."""
    found: dict[str, Any] = {}
    words = command[command.index("serve") + 2 :]
    for place, word in enumerate(words):
        if word.startswith("--"):
            value = words[place + 1] if place + 1 < len(words) and not words[place + 1].startswith("--") else True
            found[word[2:].replace("-", "_")] = value
    return found


def same(wanted: Any, got: Any) -> bool:
    """Whether a fact of a recipe is what a command says."""
    if isinstance(wanted, str) and wanted.startswith("{"):
        return isinstance(got, str) and json.loads(wanted) == json.loads(got)
    if isinstance(wanted, float | int) and not isinstance(wanted, bool):
        return float(wanted) == float(got)
    return bool(wanted == got)


def facts() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load(FACTS.read_text(encoding="utf-8"))["recipes"]
    return found


@pytest.mark.parametrize("recipe", facts(), ids=lambda recipe: recipe["card"])
def test_a_recipe_of_nvidia_is_rendered_as_it_is(recipe: dict[str, Any]) -> None:
    count = recipe["sparks"]
    for rank in (0, count - 1):
        target = Target.of(Settings(model=recipe["card"], spans=group(rank, count)))
        (engine,) = target.engines
        service = target.document({"fabric": FABRIC, "engines": [{}]})["services"][engine.service]
        got = flags_of([compose.plain(word) for word in service["command"]])
        assert engine.card.repo == recipe["hf"] and engine.card.sparks == count
        wanted = {**recipe["flags"], "nnodes": count, "node_rank": rank, "master_addr": "10.0.0.1", "master_port": 29501}
        wanted |= {"headless": True} if rank else {}
        # What a recipe sets to vLLM's default, a card leaves out.
        missing = {key: value for key, value in wanted.items() if key not in got and key not in recipe["defaults"]}
        assert not missing
        assert {key: (value, got[key]) for key, value in wanted.items() if key in got and not same(value, got[key])} == {}
        for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "UCX_NET_DEVICES", "MN_IF_NAME"):
            assert service["environment"][name] == ("enp1s0f0np0" if rank == 0 else service["environment"].get(name))
        if rank == 0:
            assert service["environment"]["NCCL_IB_HCA"] == "rocep1s0f0,roceP2p1s0f0"
        for name, value in recipe["env"].items():
            assert service["environment"].get(name) == str(value), name
        assert service["network_mode"] == "host" and service["ipc"] == "host"


@pytest.mark.parametrize("recipe", facts(), ids=lambda recipe: recipe["card"])
def test_a_recipe_of_nvidia_is_planned_for_each_rank(recipe: dict[str, Any]) -> None:
    card = catalog.load(recipe["card"])
    made = memory_plan.make(card, card.with_profile("throughput"), "throughput", card.engine(), memory_plan.Memory())
    assert made.sparks == recipe["sparks"]
    assert made.weights_gib == pytest.approx(
        (card.weights.memory_gib + (card.draft.loaded_gib if card.draft else 0)) / recipe["sparks"], rel=0.02
    )
    assert made.weights_gib + made.kv_cache_gib < made.total_gib


def test_all_recipes_have_a_card() -> None:
    assert {recipe["card"]: recipe["sparks"] for recipe in facts()} == RECIPES
    assert dataclasses.is_dataclass(Nodes)
