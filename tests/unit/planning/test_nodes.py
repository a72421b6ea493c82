"""Groups of hosts that run one engine together: what an inventory may say, and what a rank is started with."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given as drawn
from hypothesis import strategies as st
from sparkfleet_host.release_format import check_lock, check_plan, merged

from sparkfleet import SparkfleetError
from sparkfleet.planning import catalog, compose, nodes, plan, vllm_versions
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
#: Images: of a vLLM that connects its ranks by itself, and of two that need Ray, or have it.
NATIVE, OLD, UPSTREAM = "nvcr.io/nvidia/vllm:26.05-py3", "nvcr.io/nvidia/vllm:25.09-py3", "vllm/vllm-openai:v0.18.1"
UNKNOWN = "example.org/vllm:1"


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


@pytest.mark.parametrize(("image", "executor"), [(NATIVE, "auto"), (OLD, "auto"), (UPSTREAM, "ray")])
@pytest.mark.parametrize("key", ["", "a-key-of-the-engine"])
def test_ranks_differ_in_nothing_but_their_place(image: str, executor: str, key: str) -> None:
    services, releases = [], []
    given: dict[str, Any] = {"model": SMALL, "image": image, "executor": executor, "engine_key": key}
    for rank in (0, 1):
        target = Target.of(Settings(spans=group(rank), **given))
        document = target.document({"fabric": FABRIC, "engines": [{}]})
        services.append(document["services"][target.engines[0].service])
        releases.append(plan.release(target, document, None, {"fabric": FABRIC}))
    head, worker = ([*service.get("entrypoint", ()), *service["command"]] for service in services)
    if image == NATIVE:
        assert head[: head.index("--node-rank")] == worker[: worker.index("--node-rank")]
        assert worker[-1] == "--headless" and "--headless" not in head
    else:
        place = head.index("--rank") + 1
        assert (head[place], worker[place]) == ("0", "1") and head[:place] == worker[:place]
        assert head[place + 1 :] == worker[place + 1 :] and "--nnodes" not in head
        assert head[head.index("--nodes") + 1 : head.index("--nodes") + 5] == [
            "10.0.0.1,10.0.0.2",
            "--",
            "vllm",
            "serve",
        ]
        assert head[head.index("--distributed-executor-backend") + 1] == "ray"
        assert services[0]["volumes"][-1] == "/opt/sparkfleet/lib/sparkfleet_host.pyz:/sparkfleet_host.pyz:ro"
        assert compose.of_engine(services[1]["command"])[-1] == services[1]["command"][-1]
    assert services[0]["environment"]["VLLM_HOST_IP"] == "10.0.0.1"
    assert all("ports" not in service and service["network_mode"] == "host" for service in services)
    assert all(service["restart"] == "no" for service in services)
    groups = [release["plan"]["engines"][0]["group"] for release in releases]
    assert groups[0]["digest"] == groups[1]["digest"] and [item["rank"] for item in groups] == [0, 1]
    for release in releases:
        (made,) = merged(check_plan(release["plan"]), check_lock(release["lock"]))
        assert made.group is not None and made.is_worker == (made.group.rank == 1)
    other = Target.of(Settings(spans=group(), arguments={"max_model_len": 4096}, **given))
    changed = plan.group(other, other.document({"engines": [{}]}))
    assert changed and changed["digest"] != groups[0]["digest"]


def test_a_card_of_several_sparks_needs_a_group() -> None:
    with pytest.raises(SparkfleetError, match="list them in sparkfleet_nodes"):
        Target.of(Settings(model="minimax-m3-nvfp4-4x")).document()


# -- what connects the ranks -----------------------------------------------------------------------------------------


def asked(native: bool, ray: bool) -> dict[str, Any]:
    return {"vllm": "0.9.9", "native": native, "ray": ray}


@pytest.mark.parametrize(
    ("wanted", "image", "answer", "chosen", "words"),
    [
        ("auto", NATIVE, None, nodes.NATIVE, ""),
        ("auto", OLD, None, nodes.RAY, ""),
        ("auto", UPSTREAM, None, nodes.NATIVE, ""),
        ("auto", UNKNOWN, None, nodes.NATIVE, ""),
        ("auto", UNKNOWN, asked(native=True, ray=False), nodes.NATIVE, ""),
        ("auto", UNKNOWN, asked(native=False, ray=True), nodes.RAY, ""),
        ("auto", UNKNOWN, asked(native=False, ray=False), nodes.RAY, "0.9.9 .*over Ray alone, and .* has no Ray: set"),
        ("ray", UPSTREAM, None, nodes.RAY, ""),
        ("ray", NATIVE, None, nodes.RAY, "sparkfleet_executor: ray: .*26.05-py3 has no Ray: set .*: native"),
        ("ray", UNKNOWN, asked(native=True, ray=False), nodes.RAY, "has no Ray"),
        (
            "native",
            OLD,
            None,
            nodes.NATIVE,
            r"vLLM 0.10.1.1 in .*\(0.11.1 and later can\): set sparkfleet_executor: ray",
        ),
        ("native", UNKNOWN, asked(native=False, ray=False), nodes.NATIVE, "set sparkfleet_image to a newer one$"),
        ("native", NATIVE, None, nodes.NATIVE, ""),
    ],
)
def test_what_connects_the_ranks(
    wanted: str, image: str, answer: dict[str, Any] | None, chosen: str, words: str
) -> None:
    found, problem = nodes.executor(wanted, image, vllm_versions.of_image(image), answer)
    assert found == chosen and bool(problem) == bool(words)
    assert re.search(words, problem), problem


def test_only_images_that_nothing_is_known_of_are_asked() -> None:
    unknown, old = vllm_versions.Engine(()), vllm_versions.Engine((0, 10, 2))
    assert nodes.is_asked("auto", UNKNOWN, unknown) and nodes.is_asked("ray", UNKNOWN, unknown)
    assert nodes.is_asked("auto", UNKNOWN, old)  # the card knows the version, nobody knows of Ray
    for wanted in ("auto", "ray", "native"):
        assert not nodes.is_asked(wanted, OLD, vllm_versions.of_image(OLD))
        assert not nodes.is_asked(wanted, NATIVE, vllm_versions.of_image(NATIVE))


def test_an_image_s_answer_decides_for_the_host_that_has_it() -> None:
    target = Target.of(Settings(model=SMALL, image=UNKNOWN, spans=group()))
    assert "--nnodes" in target.document()["services"][target.engines[0].service]["command"]
    state = {"fabric": FABRIC, "engines": [{"executors": asked(native=False, ray=True)}]}
    command = target.document(state)["services"][target.engines[0].service]["command"]
    assert command[:3] == ["python3", "/sparkfleet_host.pyz", "rank"] and "--nnodes" not in command
    connected = target.connected(state)
    assert connected.connected(state) == connected and connected.rank(state).over_ray


def test_settings_that_contradict_each_other_about_ray() -> None:
    backend = "distributed_executor_backend"
    with pytest.raises(SparkfleetError, match=f"sparkfleet_vllm_{backend}: mp and sparkfleet_executor: ray contradict"):
        Target.of(Settings(model=SMALL, spans=group(), executor="ray", arguments={backend: "mp"}))
    with pytest.raises(SparkfleetError, match=f"sparkfleet_vllm_{backend}: 'uni' does not connect several Sparks"):
        Target.of(Settings(model=SMALL, spans=group(), arguments={backend: "uni"}))
    with pytest.raises(SparkfleetError, match=r"sparkfleet_executor: native: vLLM 0\.10\.1\.1"):
        Target.of(Settings(model=SMALL, image=OLD, spans=group(), executor="native"))
    target = Target.of(Settings(model=SMALL, image=UPSTREAM, spans=group(), arguments={backend: "ray"}))
    assert target.rank(None).over_ray
    alone = Target.of(Settings(model=SMALL, executor="ray"))
    assert "ray" not in alone.document()["services"][alone.engines[0].service]["command"]


def test_open_ports_of_ray_are_noted_where_no_key_closes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan.preflight, "fits_alone", lambda *_: False)
    state = {"fabric": FABRIC, "engines": [{}], "reached_at": []}

    def noted(**given: Any) -> bool:
        made = Target.of(Settings(model=SMALL, spans=group(1), **given))
        return any(
            "Ray runs code of whoever reaches its ports 29502 to 29609" in note for note in plan.notes(made, state)
        )

    assert noted(image=OLD) and not noted(image=OLD, engine_key="a-key-of-the-engine") and not noted(image=NATIVE)


# -- pipeline parallelism --------------------------------------------------------------------------------------------


def test_tensor_parallelism_is_what_the_stages_leave() -> None:
    card = catalog.load(SMALL)
    made = nodes.spread(card, {"pipeline_parallel_size": 2}, 4)
    assert (made["tensor_parallel_size"], made["pipeline_parallel_size"]) == (2, 2)
    assert nodes.spread(card, {"pipeline_parallel_size": 3}, 3)["tensor_parallel_size"] == 1
    assert nodes.splits(card, {}, 6) == [(2, 3), (1, 6)]


@pytest.mark.parametrize(
    ("model", "arguments", "count", "words"),
    [
        (SMALL, {}, 3, "KV heads are not divisible by 3. What is possible over 3 hosts: .*tensor_parallel_size: 1 and"),
        (
            SMALL,
            {"pipeline_parallel_size": 2},
            5,
            r"pipeline_parallel_size: 5 hosts \(sparkfleet_nodes\) cannot be divided",
        ),
        (
            SMALL,
            {"pipeline_parallel_size": 2, "tensor_parallel_size": 2},
            2,
            "spread over 4 .*tensor_parallel_size 2 x pip",
        ),
        (SMALL, {"pipeline_parallel_size": 9}, 2, "pipeline_parallel_size: 9 is not from 1 to 8"),
        (SMALL, {"pipeline_parallel_size": True}, 2, "pipeline_parallel_size: True is not"),
        ("gpt-oss-120b", {}, 3, "not divisible by 3$"),  # its layers differ, so no split is proposed
    ],
)
def test_sizes_that_do_not_fit(model: str, arguments: dict[str, Any], count: int, words: str) -> None:
    with pytest.raises(SparkfleetError, match=words):
        nodes.spread(catalog.load(model), arguments, count)


@drawn(st.sampled_from(["qwen3-8b-fp8", "llama33-70b-nvfp4", "qwen3-30b-a3b-fp8"]), st.integers(2, 8))
def test_each_split_that_is_proposed_is_accepted(model: str, count: int) -> None:
    card = catalog.load(model)
    found = nodes.splits(card, {}, count)
    for tensor, pipeline in found:
        assert tensor * pipeline == count
        sizes: Any = {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline}
        assert nodes.spread(card, sizes, count) == sizes
    assert (1, count) in found


def test_another_split_of_the_layers_than_the_planned_one() -> None:
    sizes = {"pipeline_parallel_size": 2}
    settings = Settings(model=SMALL, image=NATIVE, spans=group(), arguments=sizes)
    command = Target.of(settings).document()["services"][Target.of(settings).engines[0].service]["command"]
    assert command[command.index("--pipeline-parallel-size") + 1] == "2"
    assert command[command.index("--tensor-parallel-size") + 1] == "1"
    with pytest.raises(SparkfleetError, match="sparkfleet_environment: VLLM_PP_LAYER_PARTITION"):
        Target.of(
            Settings(model=SMALL, spans=group(), arguments=sizes, environment={"VLLM_PP_LAYER_PARTITION": "20,16"})
        )
