"""Groups of hosts that run one engine together: what an inventory may say, and what a rank is started with."""

from __future__ import annotations

from typing import Any

import pytest
from sparkfleet_host.release_format import check_lock, check_plan, merged

from sparkfleet import SparkfleetError
from sparkfleet.planning import catalog, nodes, plan
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


@pytest.mark.parametrize("value", ["", None, "fe80::1", "spark-2", "10.0.0.300", "127.0.0.1", "224.0.0.1"])
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
    with pytest.raises(SparkfleetError, match=r"2 hosts, but .* is spread over 4"):
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
