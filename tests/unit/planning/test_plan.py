"""The plan against host states, from a bare host to one that needs nothing."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import re
from typing import Any

import pytest
import yaml
from sparkfleet_host.bounded import GIB
from sparkfleet_host.trust import CA_BUNDLE

from sparkfleet import SparkfleetError
from sparkfleet.planning import firewall, plan, preflight, variables
from sparkfleet.planning.compose import CA_IN_CONTAINER
from sparkfleet.planning.target import EngineSettings, Settings, Target

SERVICE = "vllm-llama31-8b-fp8"
DIGEST = "sha256:" + "d" * 64
COMMIT = "c" * 40
EARLYOOM = str(variables.options()["sparkfleet_earlyoom_arguments"]["default"])
State = dict[str, Any]


def target(**settings: Any) -> Target:
    return Target.of(Settings(**{"model": "llama31-8b-fp8", "operator": "nvidia", **settings}))


def bare() -> State:
    """A fresh host: no Docker, no toolkit, no folders."""
    return {
        "os": {"id": "ubuntu", "version": "24.04", "name": "Ubuntu 24.04.3 LTS", "machine": "aarch64"},
        "gpu": {"name": "NVIDIA GB10", "driver": "580.142", "compute_capability": "12.1"},
        "clock": {"offset": 0.4},
        "memory": {
            "total": 120 * GIB,
            "available": 116 * GIB,
            "swap": [],
            "swap_in_fstab": [],
            "earlyoom": {"installed": False, "active": False, "enabled": False, "arguments": ""},
        },
        "disk": {place: {"free": 900 * GIB, "device": 1} for place in ("cache", "docker", "containerd")},
        "docker": {"installed": False, "running": False, "compose": None, "reason": "no socket"},
        "toolkit": {"installed": False, "configured": False, "version": ""},
        "operator": {"name": "nvidia", "exists": True, "in_docker_group": False},
        "cache": None,
        "project_dir": None,
        "token": {"present": False, "private": False, "current": False},
        "registry_logins": {"present": False, "private": False, "current": True},
        "trust": {"present": False, "current": True, "program": True, "daemon": False},
        "engines": [
            {
                "image": None,
                "registry": {"host": "nvcr.io", "status": 401, "error": "", "failure": ""},
                "model": {"commit": None, "complete": False, "bytes": 0},
                "hub": {"status": 200, "error": ""},
                "listener": None,
                "healthy": False,
            }
        ],
        "compose_file": None,
        "releases": {
            "current": None,
            "previous": None,
            "numbers": [],
            "newest_compose": None,
            "switch": None,
            "switch_active": False,
            "switch_compose": None,
        },
        "host_program": "",
        "firewall": {
            **{"installed": True, "rules": "", "unit": "", "active": False, "enabled": False, "loaded": ""},
            "sources": {},
        },
        "guard": {
            **dict.fromkeys(("installed", "active", "enabled", "current"), False),
            **{"program": "", "settings": None, "state": None},
        },
    }


def prepared() -> State:
    """DGX OS after the stage prepare."""
    state = bare()
    state["docker"] = {
        "installed": True,
        "running": True,
        "version": "29.2.1",
        "compose": "2.40.3",
        "root": "/var/lib/docker",
        "runtimes": ["nvidia", "runc"],
        "proxy": "",
        "no_proxy": "",
        "proxy_current": True,
        "containers": [],
    }
    state["toolkit"] = {"installed": True, "configured": True, "version": "1.19.0"}
    state["memory"]["earlyoom"] = {"installed": True, "active": True, "enabled": True, "arguments": EARLYOOM}
    state["operator"]["in_docker_group"] = True
    state["cache"] = {"owner": "root", "group": "docker", "mode": "2775", "directory": True}
    state["guard"].update(installed=True, active=True, enabled=True, current=True)
    state["guard"]["settings"] = {
        **{"interval": 2, "wedge_seconds": 180, "canary_interval": 60, "canary_timeout": 60},
        **{"max_restarts": 3, "restart_window": 3600, "start_timeout": 1800, "listen_port": 9109},
        "project_dir": "/opt/sparkfleet",
        "cache_dir": "/opt/hf",
        "listen_address": [""],
    }
    state["project_dir"] = {"owner": "root", "group": "root", "mode": "0755", "directory": True}
    state["token"] = {"present": True, "private": True, "current": True}
    return state


def fetched() -> State:
    state = prepared()
    state["engines"][0]["image"] = {"id": "sha256:1", "digest": DIGEST, "size": 20 * GIB}
    state["engines"][0]["model"] = {"commit": COMMIT, "complete": True, "bytes": 9 * GIB}
    state["engines"][0].update(hub=None, registry=None)
    return state


def serving(goal: Target | None = None) -> State:
    """A Spark that does what ``goal`` says."""
    goal = goal or target()
    state = fetched()
    document = goal.document(state)
    state["compose_file"] = "# a comment\n" + yaml.safe_dump(document)
    state["releases"].update(current=3, previous=2, numbers=[2, 3], newest_compose=state["compose_file"])
    state["docker"]["containers"] = [started(document, goal.engines[0].service, goal.engines[0].port)]
    state["engines"][0]["listener"] = {"pid": 7, "process": "docker-proxy"}
    state["engines"][0]["healthy"] = True
    return state


def started(document: dict[str, Any], name: str, port: int) -> State:
    """The container of a service, running as the compose file says."""
    service, found = document["services"][name], container(name, ports=[port])
    found["started_with"] = {
        "image": service["image"],
        "command": [word.replace("$$", "$") for word in service["command"]],
        "environment": {
            name: hashlib.sha256(value.encode()).hexdigest()
            for name, value in {**service["environment"], "PATH": "/usr/bin"}.items()
        },
        "ports": [port],
        "published": sorted(port.rpartition(":")[0] for port in service["ports"]),
        "volumes": sorted(f"{volume}:rw" for volume in service["volumes"]),
        "restart": "unless-stopped",
    }
    return found


def container(name: str, ours: bool = True, state: str = "running", ports: list[int] | None = None) -> State:
    return {
        "name": name,
        "image": "an-image",
        "state": state,
        "ports": ports or [],
        "ours": ours,
        "service": name if ours else None,
    }


def ids(goal: Target, state: State) -> list[str]:
    return [finding["id"] for finding in plan.make(goal, state)["findings"]]


def test_nothing_to_do_when_serving() -> None:
    made = plan.make(target(), serving())
    assert made["findings"] == []
    assert not any(made[stage]["needed"] for stage in ("prepare", "fetch", "deploy"))


def test_bare_host_needs_everything() -> None:
    made = plan.make(target(), bare())
    assert made["findings"] == []
    assert all(made[stage]["needed"] for stage in ("prepare", "fetch", "deploy"))
    assert "install Docker" in made["prepare"]["docker"]
    assert made["prepare"]["install_docker"]
    assert "install the NVIDIA Container Toolkit" in made["prepare"]["toolkit"]
    assert "make /opt/hf" in made["prepare"]["cache"]
    assert made["fetch"]["model"] == ["download nvidia/Llama-3.1-8B-Instruct-FP8 at main (8.46 GiB)"]


def test_prepared_host_is_left_alone() -> None:
    made = plan.make(target(), prepared())
    assert not made["prepare"]["needed"]
    assert made["fetch"]["image"] and made["fetch"]["model"]


@pytest.mark.parametrize(
    ("path", "value", "part", "words"),
    [
        (("docker", "version"), "20.10.5", "docker", ""),
        (("docker", "running"), False, "docker", "start Docker"),
        (("docker", "runtimes"), ["runc"], "toolkit", "make nvidia a runtime"),
        (("operator", "in_docker_group"), False, "docker", ""),
        (("cache", "mode"), "0755", "cache", "mode 0755 to 2775"),
        (("token", "current"), False, "cache", "write the Hugging Face token"),
        (("token", "private"), False, "cache", "readable by root alone"),
        (("registry_logins", "present"), True, "cache", "remove the logins of registries"),
    ],
)
def test_differences_of_a_prepared_host(path: tuple[str, str], value: Any, part: str, words: str) -> None:
    state = prepared()
    state[path[0]][path[1]] = value
    reasons = plan.make(target(), state)["prepare"][part]
    assert (words in "; ".join(reasons)) if words else not reasons


def test_the_group_docker_is_for_those_who_ask_for_it() -> None:
    state = prepared()
    state["operator"]["in_docker_group"] = False
    made = plan.make(target(docker_group=True), state)
    assert made["prepare"]["docker"] == ["put nvidia into the group docker"]


def test_logins_of_registries_are_written_when_they_differ() -> None:
    logins = {"nvcr.io": {"username": "$oauthtoken", "password": "a-secret-of-a-registry"}}
    state = prepared()
    for known, words in (
        ({"present": False, "private": False, "current": False}, ["write the logins of registries"]),
        ({"present": True, "private": True, "current": True}, []),
        (
            {"present": True, "private": False, "current": True},
            ["make the logins of registries readable by root alone"],
        ),
    ):
        state["registry_logins"] = known
        made = plan.make(target(registry_logins=logins), state)
        assert made["prepare"]["cache"] == words
        assert "a-secret-of-a-registry" not in repr(made)


def test_pins_are_those_of_what_was_fetched() -> None:
    made = plan.make(target(), fetched())
    service = made["compose"]["services"][SERVICE]
    assert service["image"].endswith("@" + DIGEST)
    assert COMMIT in service["command"]
    assert "/var/cache/sparkfleet/dddddddddddd/triton:/root/.triton" in service["volumes"]
    assert not made["fetch"]["needed"]


def test_another_model_is_a_release_that_stops_the_one_that_runs() -> None:
    state = serving(target(model="qwen3-8b-fp8"))
    made = plan.make(target(), state)
    assert made["findings"] == []
    deployment = made["deploy"]
    assert deployment["stage"] == ["stage a release after 3"]
    assert deployment["start"] == ["switch to it, stopping vllm-qwen3-8b-fp8"]
    # The switch itself stops what runs, so that it can bring it back.
    assert deployment["stop_services"] == [] and deployment["mode"] == "deploy" and not deployment["wait"]


def test_a_changed_argument_is_a_release() -> None:
    deployment = plan.make(target(arguments={"max_num_seqs": 32}), serving())["deploy"]
    assert deployment["stage"] and deployment["start"] == ["switch to it"]
    assert deployment["release"] is None and not deployment["recreate"]


def test_a_release_says_what_it_is() -> None:
    made = plan.make(target(profile="low_latency", port=9000), fetched())["release"]
    assert made["plan"]["format"] == made["lock"]["format"] == 2
    assert made["lock"]["engines"] == [
        {
            "model": "llama31-8b-fp8",
            "profile": "low_latency",
            "repo": "nvidia/Llama-3.1-8B-Instruct-FP8",
            "service": SERVICE,
            "revision": COMMIT,
            "image": f"nvcr.io/nvidia/vllm:25.09-py3@{DIGEST}",
            "port": 9000,
        }
    ]
    assert "@" in made["lock"]["controller"]
    (engine,) = made["plan"]["engines"]
    assert engine["verify"]["expect"] == "Paris" and engine["memory"]["fits"]


TWO = (
    EngineSettings("llama31-8b-fp8", arguments={"gpu_memory_utilization": 0.3, "max_model_len": 8192}),
    EngineSettings("qwen3-8b-fp8", port=8001, arguments={"gpu_memory_utilization": 0.3, "max_model_len": 8192}),
)


def two(state: State) -> State:
    """The host of a test with two engines, of which it knows the same."""
    state["engines"].append(copy.deepcopy(state["engines"][0]))
    return state


def test_two_engines_are_planned_together() -> None:
    goal = target(engines=TWO)
    made = plan.make(goal, two(fetched()))
    assert made["findings"] == []
    assert [(engine["model"], engine["port"]) for engine in made["engines"]] == [
        ("llama31-8b-fp8", 8000),
        ("qwen3-8b-fp8", 8001),
    ]
    services = made["compose"]["services"]
    assert list(services) == [SERVICE, "vllm-qwen3-8b-fp8"]
    assert services["vllm-qwen3-8b-fp8"]["ports"] == ["8001:8000"]
    first, second = (engine["memory"] for engine in made["engines"])
    assert second["available_gib"] == pytest.approx(first["left_gib"])  # what the first takes is not there any more
    assert [engine["port"] for engine in made["release"]["lock"]["engines"]] == [8000, 8001]
    assert any("ports 8000, 8001 are open" in note for note in made["notes"])


def test_two_engines_that_do_not_fit_together() -> None:
    engines = [dataclasses.replace(engine, arguments={"gpu_memory_utilization": 0.6}) for engine in TWO]
    assert ids(target(engines=engines), two(fetched())) == ["memory-short"]
    assert ids(target(engines=engines[:1]), fetched()) == []
    (finding,) = plan.make(target(engines=engines), two(fetched()))["findings"]
    said = re.search(
        r"Together they fit with a gpu_memory_utilization of ([\d.]+) for \S+, ([\d.]+) for ", finding["message"]
    )
    assert said, finding
    shares = [{"gpu_memory_utilization": float(share)} for share in said.groups()]
    offered = [dataclasses.replace(engine, arguments=share) for engine, share in zip(engines, shares, strict=True)]
    assert ids(target(engines=offered), two(fetched())) == []


def test_two_engines_that_do_not_fit_at_any_utilization() -> None:
    engines = [TWO[0], dataclasses.replace(TWO[1], model="gpt-oss-120b")]
    engines.append(dataclasses.replace(TWO[1], model="llama33-70b-nvfp4", port=8002))
    state = two(fetched())
    state["engines"].append(copy.deepcopy(state["engines"][0]))
    found = plan.make(target(engines=engines), state)["findings"]
    assert any("Together the engines do not fit at any gpu_memory_utilization" in item["message"] for item in found)


def test_what_an_engine_lacks_is_fetched_for_it_alone() -> None:
    state = two(fetched())
    state["engines"][1] = bare()["engines"][0]
    made = plan.make(target(engines=TWO), state)
    assert [(engine["fetch_image"], engine["fetch_model"]) for engine in made["engines"]] == [
        (False, False),
        (True, True),
    ]
    assert made["fetch"]["needed"] and len(made["fetch"]["model"]) == 1


def test_each_engine_is_seen_to() -> None:
    goal = target(engines=TWO)
    state = two(fetched())
    document = goal.document(state)
    state["compose_file"] = yaml.safe_dump(document)
    state["releases"].update(current=1, numbers=[1], newest_compose=state["compose_file"])
    services = list(document["services"])
    state["docker"]["containers"] = [started(document, services[0], 8000)]
    state["engines"][0]["healthy"] = True
    made = plan.make(goal, state)["deploy"]
    assert made["start"] == [f"create and start {services[1]}"] and made["services"] == services[1:]
    state["docker"]["containers"].append(started(document, services[1], 8001))
    made = plan.make(goal, state)["deploy"]
    assert made["start"] == [] and made["wait"] == [f"wait for {services[1]}"]
    state["engines"][1]["healthy"] = True
    assert not plan.make(goal, state)["deploy"]["needed"]
    only = target(engines=TWO[:1])
    state["engines"].pop()
    assert plan.make(only, state)["deploy"]["start"] == [f"switch to it, stopping {services[1]}"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [({"port": 8000}, "the same port: 8000"), ({"model": "llama31-8b-fp8"}, "the same service: " + SERVICE)],
)
def test_engines_of_a_host_differ(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(SparkfleetError, match=problem):
        target(engines=(TWO[0], dataclasses.replace(TWO[1], **changes)))


def switching(state: State, to: Target) -> State:
    """The same host while someone else switches it to ``to``."""
    journal = {"to": 4, "models": [to.engines[0].card.name], "controller": "bob@laptop", "verb": "upgrade"}
    journal["phase"] = "waiting"
    text = yaml.safe_dump(to.document(state))
    state["releases"].update(switch=journal, switch_active=True, switch_compose=text)
    return state


def test_another_run_that_does_something_else_is_named() -> None:
    state = switching(serving(), target(model="qwen3-8b-fp8"))
    findings = plan.make(target(arguments={"max_num_seqs": 32}), state)["findings"]
    assert [finding["id"] for finding in findings] == ["switch-running-other"]
    assert "bob@laptop is switching this host to release 4 (qwen3-8b-fp8) with upgrade" in findings[0]["message"]


def test_another_run_that_does_the_same_is_joined() -> None:
    wanted = target(arguments={"max_num_seqs": 32})
    made = plan.make(wanted, switching(serving(), wanted))
    assert made["findings"] == [] and made["deploy"]["start"]


def test_an_image_for_another_processor_never_stops_what_runs() -> None:
    state = serving()
    state["engines"][0]["image"]["architecture"] = "amd64"
    findings = plan.make(target(arguments={"max_num_seqs": 32}), state)["findings"]
    assert [finding["id"] for finding in findings] == ["image-platform"]
    assert "is built for amd64, the host is aarch64" in findings[0]["message"]
    state["engines"][0]["image"]["architecture"] = "arm64"
    assert plan.make(target(), state)["findings"] == []


@pytest.mark.parametrize(
    ("machine", "built", "refused"),
    [
        ("aarch64", "arm64", False),
        ("x86_64", "amd64", False),
        ("x86_64", "arm64", True),
        ("aarch64", "amd64", True),
        ("aarch64", "", False),  # an engine that does not say
    ],
)
def test_an_image_is_for_the_host_s_processor(machine: str, built: str, refused: bool) -> None:
    state = fetched()
    state["os"]["machine"] = machine
    state["engines"][0]["image"]["architecture"] = built
    assert ("image-platform" in ids(target(), state)) is refused


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image", "other"),
        ("command", ["vllm", "serve", "other"]),
        ("environment", {}),
        ("published", ["9000"]),
        ("published", ["0.0.0.0:8000"]),
        ("volumes", []),
        ("restart", "no"),
    ],
)
def test_a_container_that_drifted_is_recreated(key: str, value: Any) -> None:
    state = serving()
    state["docker"]["containers"][0]["started_with"][key] = value
    deployment = plan.make(target(), state)["deploy"]
    assert deployment["recreate"] and deployment["start"] and not deployment["stage"]
    assert deployment["mode"] == "restart" and deployment["release"] == 3


def test_a_model_that_is_to_be_hashed_is_still_the_one_that_is_deployed() -> None:
    state = serving()
    state["engines"][0]["model"] |= {"complete": False, "suspect": "a verification failed", "missing": []}
    made = plan.make(target(), state)
    assert made["fetch"]["needed"] and not made["deploy"]["needed"]


def test_a_container_with_dollars_in_its_settings_is_as_its_file_says() -> None:
    """Compose reads `$$` as `$`: what runs is compared with that."""
    goal = target(arguments={"hf_overrides": {"$defs": "a$b"}}, environment={"A": "${HOME}", "B": "$$"})
    state = serving(goal)
    started = state["docker"]["containers"][0]["started_with"]
    assert '{"$defs": "a$b"}' in started["command"]
    started["environment"] |= {
        name: hashlib.sha256(value.encode()).hexdigest() for name, value in {"A": "${HOME}", "B": "$$"}.items()
    }
    assert not plan.make(goal, state)["deploy"]["needed"]
    started["environment"]["A"] = hashlib.sha256(b"/root").hexdigest()
    assert plan.make(goal, state)["deploy"]["recreate"]


def test_a_token_in_the_environment_is_there_but_not_compared() -> None:
    goal = target(model_source="hub")
    state = serving(goal)
    started = state["docker"]["containers"][0]["started_with"]
    started["environment"] |= {"HF_TOKEN": "", "HUGGING_FACE_HUB_TOKEN": ""}
    assert not plan.make(goal, state)["deploy"]["needed"]
    del started["environment"]["HF_TOKEN"]
    assert plan.make(goal, state)["deploy"]["recreate"]


@pytest.mark.parametrize(
    ("settings", "ports", "guard", "is_open"),
    [
        ({}, ["8000:8000"], [""], True),
        ({"listen": "all"}, ["8000:8000"], [""], True),
        ({"listen": "loopback"}, ["127.0.0.1:8000:8000"], ["127.0.0.1"], False),
        ({"listen": "127.0.0.1"}, ["127.0.0.1:8000:8000"], ["127.0.0.1"], False),
        (
            {"listen": ["192.0.2.11", "fd00::1"]},
            ["127.0.0.1:8000:8000", "192.0.2.11:8000:8000", "[fd00::1]:8000:8000"],
            ["127.0.0.1", "192.0.2.11", "fd00::1"],
            True,
        ),
        ({"engine_key": "k" * 8}, ["8000:8000"], [""], False),
        ({"gateways": ("gw",)}, ["127.0.0.1:8000:8000", "192.0.2.11:8000:8000"], ["127.0.0.1", "192.0.2.11"], False),
        (
            {"gateways": ("gw",), "address": "127.0.0.1", "listen": "loopback"},
            ["127.0.0.1:8000:8000"],
            ["127.0.0.1"],
            False,
        ),
    ],
)
def test_where_engine_and_guard_listen_and_whether_that_is_said(
    settings: dict[str, Any], ports: list[str], guard: list[str], is_open: bool
) -> None:
    made = plan.make(target(**settings), fetched() | {"reached_at": ["192.0.2.11"], "engine_key": {"current": True}})
    assert made["compose"]["services"][SERVICE]["ports"] == ports
    assert made["prepare"]["guard_settings"]["listen_address"] == guard
    notes = [note for note in made["notes"] if "open to the network" in note]
    assert len(notes) == is_open and all("sparkfleet_listen: loopback" in note for note in notes)


def test_addresses_do_not_follow_the_order_of_a_name_server() -> None:
    goal = target(gateways=("gw",))
    assert goal.addresses({"reached_at": ["b", "a"]}) == goal.addresses({"reached_at": ["a", "b"]}) == ["a", "b"]


def test_loopback_and_a_gateway_elsewhere_exclude_each_other() -> None:
    with pytest.raises(SparkfleetError, match=r"no gateway on another host \(192.0.2.4\) reaches the engine"):
        target(listen="loopback", gateways=("192.0.2.4",), gateways_elsewhere=("192.0.2.4",), address="127.0.0.1")
    with pytest.raises(SparkfleetError, match=r"set sparkfleet_address: 127\.0\.0\.1 with it"):
        target(listen="loopback", gateways=("192.0.2.4",), address="192.0.2.4")


def test_code_of_a_repository_is_noted() -> None:
    assert not any("trust-remote-code" in note for note in plan.make(target(), bare())["notes"])
    assert any("trust-remote-code" in note for note in plan.make(target(model_source="hub"), bare())["notes"])


def test_code_of_a_repository_is_fetched_where_the_engine_is_to_run_it() -> None:
    assert plan.make(target(), bare())["engines"][0]["remote_code"] is False
    assert plan.make(target(arguments={"trust_remote_code": True}), bare())["engines"][0]["remote_code"] is True


GATEWAYS: dict[str, Any] = {"gateways": ("gateway-1",)}


def test_code_of_a_repository_is_run_of_a_commit_alone() -> None:
    code = {"trust_remote_code": True}
    (finding,) = plan.make(target(arguments=code), prepared())["findings"]
    assert finding["id"] == "remote-code-unreviewed"
    assert "at whatever commit main is then" in finding["message"] and "`sparkfleet lock`" in finding["message"]
    assert plan.make(target(arguments=code, revision=COMMIT), prepared())["findings"] == []
    assert plan.make(target(arguments=code), prepared(), reads=True)["findings"] == []
    goal = target(arguments=code)  # what runs already is not stopped for it
    assert plan.make(goal, serving(goal))["findings"] == []


def test_with_gateways_the_engine_listens_where_they_reach_it() -> None:
    goal = target(**GATEWAYS)
    state = {**serving(), "reached_at": ["192.0.2.11"]}
    made = plan.make(goal, state)
    assert made["compose"]["services"][goal.engines[0].service]["ports"] == [
        "127.0.0.1:8000:8000",
        "192.0.2.11:8000:8000",
    ]
    assert made["deploy"]["stage"]  # it was everywhere
    again = serving(goal) | {"reached_at": ["192.0.2.11"]}
    again["compose_file"] = yaml.safe_dump(goal.document(again))
    again["docker"]["containers"][0]["started_with"]["published"] = ["127.0.0.1:8000", "192.0.2.11:8000"]
    assert not plan.make(goal, again)["deploy"]["needed"]


def test_where_gateways_reach_it_must_be_known() -> None:
    state = {**serving(), "reached_at": []}
    assert [item["id"] for item in plan.make(target(**GATEWAYS), state)["findings"]] == ["address-unknown"]
    for listen in ("all", "192.0.2.11, fd00::11", ["192.0.2.11"]):
        assert not plan.make(target(**GATEWAYS, listen=listen), state)["findings"]
    assert target(listen="192.0.2.11, fd00::11").document()["services"]["vllm-llama31-8b-fp8"]["ports"] == [
        "127.0.0.1:8000:8000",
        "192.0.2.11:8000:8000",
        "[fd00::11]:8000:8000",
    ]
    with pytest.raises(SparkfleetError, match="sparkfleet_listen: 'spark-1' is not valid: write auto"):
        target(listen="spark-1")


def test_another_key_restarts_the_engine() -> None:
    goal = target(engine_key="k" * 8)
    state = serving(goal) | {"engine_key": {"present": True, "private": True, "current": True}}
    assert not plan.make(goal, state)["deploy"]["needed"]
    state["engine_key"]["current"] = False
    deployment = plan.make(goal, state)["deploy"]
    assert deployment["start"] == ["restart vllm-llama31-8b-fp8: its key has changed"]
    assert deployment["mode"] == "restart" and deployment["release"] == 3 and not deployment["stage"]


def test_an_engine_that_still_starts_is_only_waited_for() -> None:
    state = serving()
    state["engines"][0]["healthy"] = False
    deployment = plan.make(target(), state)["deploy"]
    assert deployment["wait"] and not (deployment["start"] or deployment["stage"] or deployment["stop_services"])


def test_a_stopped_container_is_started() -> None:
    state = serving()
    state["docker"]["containers"][0]["state"] = "exited"
    state["engines"][0]["healthy"], state["engines"][0]["listener"] = False, None
    assert plan.make(target(), state)["deploy"]["start"] == [f"start {SERVICE} (exited)"]


def test_wanted_stopped() -> None:
    deployment = plan.make(target(service_state="stopped"), serving())["deploy"]
    assert deployment["stop_services"] == [SERVICE]
    assert not deployment["start"] and not deployment["wait"]


def test_the_program_on_the_host_is_the_one_of_the_controller() -> None:
    state, wanted = serving(), target(host_program="f" * 64)
    assert plan.make(wanted, state)["prepare"]["host_program"] == ["copy the program that switches releases"]
    state["host_program"] = "e" * 64
    assert plan.make(wanted, state)["prepare"]["host_program"] == ["update the program that switches releases"]
    state["host_program"] = state["guard"]["program"] = "f" * 64
    assert not plan.make(wanted, state)["prepare"]["needed"]


def test_the_guard_is_installed_changed_and_stopped() -> None:
    def reasons(state: State, **settings: Any) -> list[str]:
        made: list[str] = plan.make(target(**settings), state)["prepare"]["guard"]
        return made

    state = serving()
    assert reasons(state) == []
    assert reasons(bare()) == ["install the guard"]
    assert reasons(state, guard_wedge_seconds=60.0) == ["change the guard's settings"]
    assert reasons(state, host_program="f" * 64) == ["restart the guard with its new program"]
    assert reasons(state, guard=False) == ["stop the guard"]
    # The new program was copied, or the unit written, and the run ended before the guard was restarted.
    state["host_program"] = "f" * 64
    assert reasons(state, host_program="f" * 64) == ["restart the guard with its new program"]
    state["guard"].update(program="f" * 64, current=False)
    assert reasons(state, host_program="f" * 64) == ["restart the guard: it is older than its unit or settings"]
    state["guard"].update(program="", active=False)
    assert reasons(state) == ["start the guard, now and at boot"]
    state["guard"].update(enabled=False)
    assert reasons(state, guard=False) == []


def test_wanted_stopped_is_staged_once() -> None:
    state, wanted = fetched(), target(service_state="stopped")
    first = plan.make(wanted, state)["deploy"]
    assert first["stage"] and not first["start"] and not first["stop_services"]
    state["releases"].update(numbers=[1], newest_compose=yaml.safe_dump(wanted.document(state)))
    assert not plan.make(wanted, state)["deploy"]["needed"]
    assert plan.make(target(), state)["deploy"]["start"]


def test_a_second_service_of_ours_is_stopped_and_the_right_one_left_alone() -> None:
    state = serving()
    state["docker"]["containers"].append({**container("vllm-other"), "service": "vllm-other"})
    deployment = plan.make(target(), state)["deploy"]
    assert deployment["stop_services"] == ["vllm-other"] and not deployment["start"]


def test_an_edited_file_gives_way_to_a_release() -> None:
    state = serving()
    state["compose_file"] = state["compose_file"].replace("'64'", "'65'")
    assert plan.make(target(), state)["deploy"]["stage"]
    state["compose_file"] = "{ not yaml"
    assert plan.make(target(), state)["deploy"]["stage"]


@pytest.mark.parametrize(
    ("change", "identifier", "words"),
    [
        ({"gpu": None}, "not-a-spark", "nvidia-smi reports nothing"),
        ({"gpu": {"name": "NVIDIA A100", "driver": "590.1"}}, "not-a-spark", "NVIDIA A100"),
        ({"gpu": {"name": "NVIDIA GB10", "driver": "570.86"}}, "driver-too-old", "570.86 is older than 580"),
        ({"clock": {"offset": -259200}}, "clock-wrong", "3.0 days behind"),
        ({"clock": {"offset": 900}}, "clock-wrong", "15 minutes ahead of"),
        (
            {"registry": {"host": "nvcr.io", "status": 0, "error": "refused", "failure": "registry-unreachable"}},
            "registry-unreachable",
            "does not reach nvcr.io (refused)",
        ),
        (
            {"registry": {"host": "nvcr.io", "status": 0, "error": "unknown", "failure": "registry-name"}},
            "registry-name",
            "nvcr.io (unknown)",
        ),
        ({"os": {"id": "fedora", "version": "42", "name": "Fedora 42", "machine": "aarch64"}}, "os-unsupported", "Fed"),
        (
            {"os": {"id": "debian", "version": "12", "name": "Debian 12", "machine": "x86_64"}},
            "os-without-compose",
            "sparkfleet_docker_source: docker",
        ),
        ({"listener": {"pid": 42, "process": "nginx"}}, "port-taken", "nginx (pid 42)"),
        ({"hub": {"status": 401, "error": "GatedRepo"}}, "hub-token-rejected", "rejects the token"),
        ({"hub": {"status": 403, "error": "GatedRepo"}}, "hub-no-access", "huggingface.co/nvidia/Llama-3.1"),
        ({"hub": {"status": 404, "error": "RepoNotFound"}}, "hub-repo-unknown", "llama31-8b-fp8.yml"),
        ({"hub": {"status": 404, "error": "RevisionNotFound"}}, "hub-revision-unknown", "'main'"),
        ({"hub": {"status": 0, "error": "Name or service not known"}}, "hub-unreachable", "name server"),
        ({"hub": {"status": 503, "error": ""}}, "hub-unreachable", "503"),
        ({"operator": {"exists": False, "in_docker_group": False}}, "operator-unknown", "'nvidia'"),
        ({"cache": {"owner": "x", "group": "x", "mode": "0644", "directory": False}}, "cache-not-a-folder", "/opt/hf"),
    ],
)
def test_refusals(change: State, identifier: str, words: str) -> None:
    state = bare()
    for key, value in change.items():
        (state if key in state else state["engines"][0])[key] = value
    found = plan.make(target(), state)["findings"]
    assert [finding["id"] for finding in found] == [identifier]
    assert words in found[0]["message"]


def test_missing_token_is_told_from_a_rejected_one() -> None:
    state = bare()
    state["engines"][0]["hub"], state["token"]["current"] = {"status": 401, "error": "GatedRepo"}, True
    found = plan.make(target(), state)["findings"]
    assert found[0]["id"] == "hub-token-missing"
    assert "sparkfleet_hf_token" in found[0]["message"]


def test_port_of_another_container_and_name_taken() -> None:
    state = prepared()
    state["docker"]["containers"] = [container("web", ours=False, ports=[8000])]
    assert ids(target(), state) == ["port-taken"]
    assert ids(target(port=8001), state) == []
    state["docker"]["containers"] = [container(SERVICE, ours=False, state="exited")]
    assert ids(target(), state) == ["name-taken"]


def test_port_held_by_ours_is_fine() -> None:
    assert ids(target(), serving(target(model="qwen3-8b-fp8"))) == []


def test_disk_is_summed_on_one_device_and_split_over_two() -> None:
    state = bare()
    state["disk"] = {"cache": {"free": 20 * GIB, "device": 1}, "docker": {"free": 20 * GIB, "device": 1}}
    found = plan.make(target(image_disk_gib=12), state)["findings"]
    assert [finding["id"] for finding in found] == ["disk-full"]
    assert "20.0 GiB free, 22.5 GiB needed" in found[0]["message"]
    state["disk"]["docker"]["device"] = 2
    assert ids(target(image_disk_gib=12), state) == []


def test_disk_counts_what_is_there_already() -> None:
    state = bare()
    state["disk"] = {"cache": {"free": 5 * GIB, "device": 1}, "docker": {"free": 99 * GIB, "device": 2}}
    assert ids(target(), state) == ["disk-full"]
    state["engines"][0]["model"]["bytes"] = 6 * GIB
    assert ids(target(), state) == []


def test_containerd_s_image_store_needs_half_as_much_again_where_it_lies() -> None:
    """Docker 29: images lie under /var/lib/containerd, each layer compressed and unpacked."""
    state = prepared()
    state["docker"] |= {"store": "containerd", "images_at": "/var/lib/containerd"}
    state["disk"]["docker"] = {"free": 30 * GIB, "device": 2}
    (finding,) = plan.make(target(image_disk_gib=20), state)["findings"]
    assert finding["id"] == "disk-full"
    assert "30.0 GiB free, 32.0 GiB needed (30.0 GiB for the image in /var/lib/containerd" in finding["message"]
    state["docker"]["store"] = "docker"
    assert ids(target(image_disk_gib=20), state) == []


def test_docker_that_is_still_to_come_keeps_images_where_its_packages_do() -> None:
    state = bare()
    state["disk"]["containerd"] = {"free": GIB, "device": 3}
    assert ids(target(), state) == []
    made = plan.make(target(docker_source="docker"), state)
    assert [finding["id"] for finding in made["findings"]] == ["disk-full"]
    assert "/var/lib/containerd" in made["findings"][0]["message"]


def test_not_a_spark_may_be_allowed() -> None:
    assert ids(target(require_gb10=False), {**bare(), "gpu": None}) == []


def test_hub_source_fetches_no_model() -> None:
    state = prepared()
    assert plan.make(target(model_source="hub"), state)["fetch"]["model"] == []


def test_wrong_argument_names_the_variable() -> None:
    with pytest.raises(SparkfleetError, match=r"sparkfleet_vllm_max_num_seqs: must be a whole number from 1 to 65536"):
        target(arguments={"max_num_seqs": "many"})


@pytest.mark.parametrize(
    ("part", "key", "value", "identifier"),
    [
        ("docker", "version", "19.03.1", "docker-too-old"),
        ("docker", "compose", "2.17.0", "compose-too-old"),
        ("docker", "compose", None, "compose-too-old"),
        ("toolkit", "version", "1.10.0", "toolkit-too-old"),
    ],
)
def test_what_is_installed_and_too_old_is_not_upgraded_but_named(
    part: str, key: str, value: str | None, identifier: str
) -> None:
    state = prepared()
    state[part][key] = value
    made = plan.make(target(), state)
    assert [finding["id"] for finding in made["findings"]] == [identifier]
    assert not made["prepare"]["install_docker"]


@pytest.mark.parametrize(
    "image", ["vllm/vllm-openai:latest", "nvcr.io/nvidia/vllm:25.08-py3", "vllm/vllm-openai:v0.9.2"]
)
def test_images_that_do_not_run_on_a_gb10(image: str) -> None:
    assert ids(target(image=image), prepared()) == ["image-unsupported"]
    assert ids(target(image=image, require_gb10=False), prepared()) == []


def test_without_root_nothing_else_is_said() -> None:
    state = {**prepared(), "user": {"id": 1000, "name": "nvidia"}}
    state["engines"][0]["listener"] = {"pid": 0, "process": ""}
    (finding,) = plan.make(target(), state)["findings"]
    assert finding["id"] == "not-root" and finding["message"].startswith("needs root, runs as nvidia. Set become: true")
    assert "--become" in finding["message"]
    # What reads only tells what it sees.
    found = plan.make(target(), state, reads=True)["findings"]
    assert [finding["id"] for finding in found] == ["port-taken"]
    assert ids(target(), {**prepared(), "user": {"id": 0, "name": "root"}}) == []


def test_every_finding_at_once() -> None:
    state = prepared()
    state["gpu"] = {"name": "NVIDIA A100", "driver": "535.1", "compute_capability": "8.0"}
    state["os"] = {"id": "fedora", "version": "42", "name": "Fedora 42", "machine": "i686"}
    state["clock"]["offset"] = 1e6
    state["docker"]["compose"] = "2.10.2"
    state["toolkit"]["version"] = "1.10.0"
    state["memory"]["available"] = 30 * GIB
    state["disk"]["cache"] = {"free": GIB, "device": 2}
    state["engines"][0]["listener"] = {"pid": 1, "process": "x"}
    state["engines"][0]["registry"].update(status=0, error="refused", failure="registry-unreachable")
    state["engines"][0]["hub"] = {"status": 403, "error": "GatedRepo"}
    found = ids(target(image="vllm/vllm-openai:latest"), state)
    assert found == [
        *("not-a-spark", "driver-too-old", "os-unsupported", "machine-unsupported", "clock-wrong", "compose-too-old"),
        *("toolkit-too-old", "image-unsupported", "memory-short", "disk-full", "port-taken", "registry-unreachable"),
        "hub-no-access",
    ]


def test_memory_is_compared_with_what_will_be_free() -> None:
    state = serving()
    state["memory"]["available"] = 5 * GIB  # the engine holds the rest
    assert ids(target(), state) == []
    # another model replaces the one that runs, and may have its memory
    assert ids(target(model="qwen3-8b-fp8"), state) == []
    state["docker"]["containers"] = []
    state["engines"][0]["listener"], state["engines"][0]["healthy"] = None, False
    found = plan.make(target(), state)["findings"]
    assert [finding["id"] for finding in found] == ["memory-short"]
    assert "would refuse to start" in found[0]["message"]
    assert ids(target(memory_plan="warn"), state) == []
    assert ids(target(service_state="stopped"), state) == []


def test_memory_guards_are_part_of_prepare() -> None:
    state = prepared()
    state["memory"]["earlyoom"] |= {"active": False, "arguments": "-m 5"}
    state["memory"]["swap"] = [{"path": "/swap.img", "size": GIB}]
    made = plan.make(target(earlyoom_arguments="-m 3", swap="disabled"), state)["prepare"]
    assert made["memory"] == ["change the arguments of earlyoom", "start earlyoom, now and at boot", "switch swap off"]
    assert not plan.make(target(earlyoom=False), state)["prepare"]["memory"]


def test_a_proxy_is_given_to_docker() -> None:
    state = prepared()
    state["docker"]["proxy_current"] = False
    made = plan.make(target(proxy="http://me:secret@proxy:3128"), state)["prepare"]
    assert made["docker"] == ["let Docker use the proxy proxy:3128 and restart it"] and made["restart_docker"]
    made = plan.make(target(), state)["prepare"]
    assert made["docker"] == ["let Docker use no proxy of ours any more and restart it"] and made["restart_docker"]
    made = plan.make(target(proxy="http://me:secret@proxy:3128"), prepared())["prepare"]
    assert not made["docker"] and not made["restart_docker"]


def test_a_private_ca_is_given_to_the_host_and_taken_away() -> None:
    state, wanted = prepared(), target(ca_file="/srv/ca.pem", ca="PEM")
    state["trust"]["current"] = False
    assert plan.make(wanted, state)["registries"] == ["nvcr.io"]
    made = plan.make(wanted, state)["prepare"]
    assert made["trust"] == ["trust the CA of /srv/ca.pem"] and made["needed"]
    assert not made["docker"] and not made["restart_docker"]
    state["trust"] |= {"current": True, "present": True}
    assert not plan.make(wanted, state)["prepare"]["trust"]
    assert plan.make(target(), state)["prepare"]["trust"] == ["trust the CA of sparkfleet_ca_file no longer"]
    # The files are gone, what was built of them is not.
    state["trust"] |= {"current": False, "present": False}
    assert plan.make(target(), state)["prepare"]["trust"] == ["trust the CA of sparkfleet_ca_file no longer"]


def test_an_engine_that_downloads_by_itself_trusts_what_its_host_trusts() -> None:
    wanted = target(model_source="hub", ca_file="/srv/ca.pem", ca="PEM")
    volumes = wanted.document(fetched())["services"][SERVICE]["volumes"]
    assert f"{CA_BUNDLE}:{CA_IN_CONTAINER}:ro" in volumes
    assert "/srv/ca.pem" not in str(wanted.document(fetched()))


@pytest.mark.parametrize(
    ("settings", "trusts"),
    [
        ({"model": "llama31-8b-fp8"}, False),
        ({"model": "qwen36-27b-nvfp4"}, False),  # pictures from nowhere
        ({"model": "qwen36-27b-nvfp4", "media_domains": ["images.example.com"]}, True),
        ({"model": "qwen36-27b-nvfp4", "media_domains": ["*"]}, True),
        ({"model": "qwen36-27b-nvfp4", "arguments": {"allowed_media_domains": "images.example.com"}}, True),
        (
            {
                **{"model": "qwen36-27b-nvfp4", "media_domains": ["*"]},
                "arguments": {"language_model_only": True},
            },
            False,
        ),
    ],
)
def test_an_engine_that_fetches_media_trusts_what_its_host_trusts(settings: dict[str, Any], trusts: bool) -> None:
    made = target(ca_file="/srv/ca.pem", ca="PEM", **settings)
    (service,) = made.document(fetched())["services"].values()
    assert (f"{CA_BUNDLE}:{CA_IN_CONTAINER}:ro" in service["volumes"]) is trusts
    assert ("SSL_CERT_FILE" in service["environment"]) is trusts


def test_docker_is_restarted_for_a_ca_only_where_it_would_not_read_it() -> None:
    def work(image: str, ca: str = "PEM", **docker: Any) -> dict[str, Any]:
        state["docker"] |= docker
        found = plan.make(target(ca_file="/srv/ca.pem" if ca else "", ca=ca, image=image), state)["prepare"]
        assert any("restart" in reason for reason in found["docker"]) == found["restart_docker"]
        return dict(found)

    state, hub = prepared(), "vllm/vllm-openai:v0.24.0"
    state["trust"]["current"] = False
    assert work(hub)["docker"] == ["restart Docker so that it trusts the CA for Docker Hub"]
    assert not work("nvcr.io/nvidia/vllm:25.09-py3")["restart_docker"]
    assert not work(hub, ca="")["restart_docker"]
    assert not work(hub, store="containerd")["restart_docker"]
    assert not work(hub, store="docker", running=False, installed=False, compose=None)["restart_docker"]
    state["docker"] |= {"running": True, "installed": True, "compose": "2.40.3"}
    # It has been there for longer than Docker runs, or for less.
    state["trust"] |= {"current": True, "present": True, "daemon": True}
    assert not work(hub)["restart_docker"]
    state["trust"]["daemon"] = False
    assert work(hub)["restart_docker"]
    state["engines"][0]["image"] = {"id": "sha256:1", "digest": DIGEST, "size": 20 * GIB}
    assert not work(hub)["restart_docker"]


def test_a_host_that_cannot_be_given_a_ca_is_refused() -> None:
    state = prepared()
    state["trust"]["program"] = False
    assert "ca-program-missing" in ids(target(ca_file="/srv/ca.pem", ca="PEM"), state)
    assert "ca-program-missing" not in ids(target(), state)


def test_tool_calls_are_the_cards_and_can_be_left_out() -> None:
    assert target().engines[0].arguments["tool_call_parser"] == "llama3_json"
    assert "tool_call_parser" not in target(tool_calls=False).engines[0].arguments
    assert "tool_call_parser" not in target(model_source="hub").engines[0].arguments
    assert target(arguments={"tool_call_parser": "mine"}).engines[0].arguments["tool_call_parser"] == "mine"


def test_environment_comes_on_top_of_the_cards() -> None:
    goal = target(environment={"VLLM_USE_AOT_COMPILE": 0})
    service = goal.document()["services"][SERVICE]
    assert service["environment"]["VLLM_USE_AOT_COMPILE"] == "0"
    assert service["environment"]["HF_HUB_OFFLINE"] == "1"
    assert plan.make(goal, serving())["deploy"]["start"]
    with pytest.raises(SparkfleetError, match=r"sparkfleet_environment\.vllm: must be the name of a variable"):
        target(environment={"vllm": "x"})
    with pytest.raises(SparkfleetError, match=r"sparkfleet_environment\.A: must be a text or a number, not \['x'\]"):
        target(environment={"A": ["x"]})
    with pytest.raises(SparkfleetError, match=r"VLLM_API_KEY: is a secret.* sparkfleet_engine_key") as refused:
        target(environment={"VLLM_API_KEY": "sesame"})
    assert "sesame" not in str(refused.value)


def test_plan_does_not_touch_the_state() -> None:
    state = serving()
    before = copy.deepcopy(state)
    plan.make(target(), state)
    assert state == before


@pytest.mark.parametrize(
    ("text", "numbers"), [("29.2.1", (29, 2, 1)), ("v2.26.1-4", (2, 26, 1)), (None, (0,)), ("", (0,))]
)
def test_version(text: str | None, numbers: tuple[int, ...]) -> None:
    assert preflight.version(text) == numbers


def test_what_an_operator_should_know_of_a_tag_that_moves() -> None:
    notes = plan.make(target(model="gemma4-31b-nvfp4"), bare())["notes"]
    assert not any("mutable" in note for note in notes)
    notes = plan.make(target(model="diffusiongemma-26b-a4b-nvfp4"), bare())["notes"]
    assert any("the tag of eugr/spark-vllm:latest is mutable" in note for note in notes)


# -- a model that drafts -----------------------------------------------------------------------------------------------

DRAFT = "google/gemma-4-31B-it-assistant"
DRAFTED = "d" * 40
NONE = {"commit": None, "complete": False, "bytes": 0}


def drafting(own: State | None = None, draft: State | None = None, hub: State | None = None) -> State:
    """A prepared Spark with an engine whose draft is a model of its own; what it has of both."""
    state = prepared()
    found = {"commit": COMMIT, "complete": True, "bytes": 9 * GIB} if own is None else own
    state["engines"][0]["image"] = {"id": "sha256:1", "digest": DIGEST, "size": 20 * GIB}
    state["engines"][0].update(model=found, hub=None, registry=None, draft={"model": draft or NONE, "hub": hub})
    return state


def test_a_draft_is_fetched_beside_its_model() -> None:
    goal = target(model="gemma4-31b-nvfp4")
    made = plan.make(goal, drafting())
    assert made["fetch"]["model"] == [f"download the draft {DRAFT} at main (0.9 GiB)"], made["fetch"]
    assert [(one["repo"], one["fetch_image"], one["fetch_model"], one["has_model"]) for one in made["fetches"]] == [
        ("nvidia/Gemma-4-31B-IT-NVFP4", False, False, True),
        (DRAFT, False, True, False),
    ]
    both = plan.make(goal, drafting(own=NONE))
    assert len(both["fetch"]["model"]) == 2 and [one["fetch_model"] for one in both["fetches"]] == [True, True]
    there = plan.make(goal, drafting(draft={"commit": DRAFTED, "complete": True, "bytes": GIB}))
    assert not there["fetch"]["needed"]
    suspect = {"commit": DRAFTED, "complete": False, "bytes": GIB, "suspect": "damaged", "missing": []}
    assert plan.make(goal, drafting(draft=suspect))["fetch"]["model"] == [
        f"hash the files of the draft {DRAFT}: damaged"
    ]


def test_the_engine_gets_its_draft_as_a_folder_at_a_commit() -> None:
    goal = target(model="gemma4-31b-nvfp4")
    made = plan.make(goal, drafting(draft={"commit": DRAFTED, "complete": True, "bytes": GIB}))
    command = made["compose"]["services"][goal.engines[0].service]["command"]
    given = json.loads(command[command.index("--speculative-config") + 1])
    folder = f"/root/.cache/huggingface/models--google--gemma-4-31B-it-assistant/snapshots/{DRAFTED}"
    assert given == {"model": folder, "num_speculative_tokens": 4}
    (locked,) = made["release"]["lock"]["engines"]
    assert locked["draft"] == {"repo": DRAFT, "revision": DRAFTED} and locked["revision"] == COMMIT
    # What is planned and measured does not depend on the folder.
    assert goal.engines[0].arguments["speculative_config"]["model"] == DRAFT
    before = plan.make(goal, drafting())
    assert "draft" not in before["release"]["lock"]["engines"][0]
    online = target(model="gemma4-31b-nvfp4", model_source="hub")
    assert plan.make(online, drafting(draft={"commit": DRAFTED, "complete": True, "bytes": GIB}))["fetches"][0]
    command = online.document(drafting())["services"][online.engines[0].service]["command"]
    assert json.loads(command[command.index("--speculative-config") + 1])["model"] == DRAFT


def test_a_draft_counts_on_the_disk_and_must_be_given() -> None:
    goal = target(model="gemma4-31b-nvfp4")
    state = drafting(hub={"status": 403, "error": "GatedRepo"})
    state["disk"]["cache"]["free"] = int(2.5 * GIB)
    found = {item["id"]: item["message"] for item in plan.make(goal, state)["findings"]}
    assert "0.9 GiB for the model in /opt/hf" in found["disk-full"]
    assert f"no access to {DRAFT}: accept the licence at https://huggingface.co/{DRAFT}" in found["hub-no-access"]
    for error, said in (
        ("RevisionNotFound", "set revision in the draft of"),
        ("RepoNotFound", f"the Hub has no model {DRAFT}: check speculative_config.model in"),
    ):
        made = plan.make(goal, drafting(hub={"status": 404, "error": error}))
        assert any(said in item["message"] for item in made["findings"])


def test_a_trial_needs_the_configuration_of_a_draft() -> None:
    goal = target(model="gemma4-31b-nvfp4", trial="dummy")
    config = {**NONE, "commit": COMMIT, "config": True}
    made = plan.make(goal, drafting(own=config))
    assert made["fetch"]["model"] == [f"download the draft {DRAFT} without its weights"]
    made = plan.make(goal, drafting(own=config, draft={**NONE, "commit": DRAFTED, "config": True}))
    assert not made["fetch"]["needed"] and DRAFTED in str(made["compose"])
    real = plan.make(target(model="gemma4-31b-nvfp4", trial="real"), drafting())
    assert [item["id"] for item in real["findings"]] == ["model-not-in-cache"] and DRAFT in str(real["findings"])


def test_a_draft_that_is_a_folder_is_not_fetched() -> None:
    given = {"method": "ngram", "num_speculative_tokens": 3}
    goal = target(model="gemma4-31b-nvfp4", arguments={"speculative_config": given})
    assert goal.engines[0].draft is None and len(plan.make(goal, drafting())["fetches"]) == 1
    pinned = {"model": DRAFT, "revision": DRAFTED, "num_speculative_tokens": 3}
    goal = target(model="gemma4-31b-nvfp4", arguments={"speculative_config": pinned})
    assert goal.engines[0].draft and goal.engines[0].draft.revision == DRAFTED


WALL: dict[str, Any] = {"firewall": True, "gateways": ("gateway-1.lan",), "sparks": ("spark-2.lan",)}


def walled(**more: Any) -> State:
    """A host with a firewall, as the plan of WALL has it."""
    state = fetched()
    state["reached_at"] = ["192.0.2.11"]
    state["firewall"]["sources"] = {"gateway-1.lan": ["192.0.2.5", "fd00::5"], "spark-2.lan": ["192.0.2.12"]}
    rules = plan.make(target(**WALL), state)["prepare"]["firewall_rules"]
    state["firewall"].update(rules=rules, unit=firewall.unit(), active=True, enabled=True, loaded=firewall.mark(rules))
    state["firewall"].update(more)
    return state


def test_the_firewall_opens_ports_to_gateways_and_sparks() -> None:
    made = plan.make(target(**WALL, firewall_allow=["192.0.2.64/26"], guard_port=0), walled())["prepare"]
    assert made["firewall"] == ["change the firewall"] and made["needed"]
    rules = made["firewall_rules"]
    assert "tcp dport { 8000 }" in rules and "tcp dport 9110 ct" in rules
    clients, sparks = rules.partition("chain clients {")[2].split("chain sparks {")
    assert "ip saddr { 192.0.2.5/32, 192.0.2.64/26 } accept" in clients and "ip6 saddr { fd00::5/128 }" in clients
    assert "ip saddr { 192.0.2.12/32 } accept" in sparks and "192.0.2.5" not in sparks


def test_the_firewall_lets_the_monitor_in_and_nobody_else_to_the_host_s_figures() -> None:
    state = walled()
    state["firewall"]["sources"]["monitor"] = ["192.0.2.77"]
    rules = plan.make(target(**WALL, monitors=("monitor",)), state)["prepare"]["firewall_rules"]
    clients = rules.partition("chain clients {")[2].partition("chain sparks {")[0]
    assert "tcp dport { 8000, 9109, 9113 }" in rules and "192.0.2.77/32" in clients


@pytest.mark.parametrize(
    ("there", "reasons"),
    [
        ({}, []),
        ({"unit": "", "rules": "", "loaded": "", "active": False}, ["set up the firewall"]),
        ({"unit": "of an earlier version"}, ["change the firewall"]),
        ({"loaded": ""}, ["load the firewall, now and at boot"]),
        ({"active": False}, ["load the firewall, now and at boot"]),
        ({"enabled": False}, ["load the firewall, now and at boot"]),
    ],
)
def test_what_is_to_be_done_about_the_firewall(there: State, reasons: list[str]) -> None:
    state = walled(**there)
    assert plan.make(target(**WALL), state)["prepare"]["firewall"] == reasons
    assert plan.make(target(), state)["prepare"]["firewall"] == ["remove the firewall"] * bool(
        state["firewall"]["rules"]
    )


def test_a_gateway_that_the_firewall_would_shut_out_is_a_finding() -> None:
    state = walled()
    state["firewall"]["sources"]["gateway-1.lan"] = []
    made = plan.make(target(**WALL), state)
    assert [item["id"] for item in made["findings"]] == ["firewall-source-unknown"]
    assert "gateway-1.lan stands for no address" in made["findings"][0]["message"]


def test_a_firewall_that_nobody_passes_is_told_and_one_that_closes_ssh_is_refused() -> None:
    notes = plan.make(target(firewall=True), bare())["notes"]
    assert any("opens the engine's port to nobody" in note for note in notes)
    assert not any("open to the network" in note for note in notes)
    with pytest.raises(SparkfleetError, match="sparkfleet_port of llama31-8b-fp8: 2222 is the port of SSH"):
        target(firewall=True, port=2222, ssh_port=2222)


def command(**settings: Any) -> tuple[list[str], dict[str, str]]:
    (service,) = target(**settings).document()["services"].values()
    return service["command"], service["environment"]


REDIRECTS = "VLLM_MEDIA_URL_ALLOW_REDIRECTS"


def test_an_engine_that_takes_pictures_fetches_none_unless_it_is_told_from_where() -> None:
    words, environment = command(model="qwen36-27b-nvfp4")
    assert words[-2:] == ["--allowed-media-domains", "none.invalid"] and environment[REDIRECTS] == "0"
    assert not any("--allowed-local-media-path" in word for word in words)
    words, environment = command(model="qwen36-27b-nvfp4", media_domains=["images.example.com", "B.example"])
    assert words[-3:] == ["--allowed-media-domains", "images.example.com", "b.example"]
    words, environment = command(model="qwen36-27b-nvfp4", environment={REDIRECTS: 1})
    assert environment[REDIRECTS] == "1"
    # It may take videos then.
    words, environment = command(model="qwen36-27b-nvfp4", arguments={"limit_mm_per_prompt": {"image": 0}})
    assert words[-2:] == ["--allowed-media-domains", "none.invalid"] and environment[REDIRECTS] == "0"
    arguments = {"allowed_media_domains": "example.com"}
    words, _ = command(model="qwen36-27b-nvfp4", arguments=arguments)
    assert words.count("--allowed-media-domains") == 1 and "example.com" in words


@pytest.mark.parametrize(
    "settings",
    [
        {"model": "llama31-8b-fp8"},
        {"model": "qwen36-27b-nvfp4", "media_domains": ["*"]},
        {"model": "qwen36-27b-nvfp4", "arguments": {"language_model_only": True}},
        {"model": "qwen36-27b-nvfp4", "image": "nvcr.io/nvidia/vllm:25.10-py3"},  # vLLM 0.10.2
        {"model": "qwen36-27b-nvfp4", "image": "registry.example/mine:1"},
    ],
)
def test_what_is_not_told_where_pictures_come_from(settings: dict[str, Any]) -> None:
    words, environment = command(**settings)
    assert "--allowed-media-domains" not in words and REDIRECTS not in environment
    notes = [note for note in plan.make(target(**settings), bare())["notes"] if "fetches pictures" in note]
    assert bool(notes) == ("image" in settings)


def test_a_domain_of_pictures_that_is_none_is_refused_by_its_place() -> None:
    with pytest.raises(
        SparkfleetError, match=r"sparkfleet_media_domains: entry 2, 'http://x', is not the name of a host"
    ):
        target(media_domains=["a.example", "http://x"])


def test_a_model_that_spans_sparks_is_not_deployed() -> None:
    with pytest.raises(SparkfleetError, match="minimax-m27-nvfp4-2x spans 2 Sparks"):
        plan.make(target(model="minimax-m27-nvfp4-2x"), bare())


def test_what_an_encoder_that_runs_holds_is_not_what_it_requested() -> None:
    goal, state = target(), serving()
    there = state["docker"]["containers"][0]
    memory = {"total": 120 * GIB, "available": 30 * GIB}
    state["memory"].update(memory)

    def seen() -> str:
        found = plan.make(goal, state)["checks"]
        return next(str(check["seen"]) for check in found if check["name"] == "memory")

    as_requested = seen()
    record = {"service": there["name"], "repo": "org/m", "image": "i", "at": 5.0}
    state["measured"] = [{**record, "planned": {"kv_cache_gib": 0.0, "weights_gib": 0.5, "runtime_gib": 2.5}}]
    as_encoder = seen()
    assert "too little" not in as_requested and "too little" in as_encoder
    # A newer start of another kind counts.
    state["measured"].append({**record, "at": 6.0, "planned": {"kv_cache_gib": 60.0}})
    assert seen() == as_requested


def test_a_trial_is_of_a_model_that_gives_text_or_vectors() -> None:
    with pytest.raises(SparkfleetError, match="gives neither text nor vectors, whose speed a trial measures"):
        target(trial="dummy", arguments={"convert": "classify"})
    assert target(arguments={"convert": "classify"}) and target(trial="dummy", arguments={"runner": "pooling"})


# -- engines that start on demand --------------------------------------------------------------------------------------

IN_TURN = (
    dataclasses.replace(TWO[0], on_demand=True, port=8002, loopback_port=18002),
    TWO[1],
    EngineSettings(
        "gpt-oss-20b",
        port=8003,
        arguments={"gpu_memory_utilization": 0.45},
        on_demand=True,
        loopback_port=18003,
    ),
)


def three(state: State) -> State:
    return two(two(state))


def test_engines_on_demand_are_planned_each_beside_those_that_always_run() -> None:
    goal = target(engines=IN_TURN)
    made = plan.make(goal, three(fetched()))
    assert made["findings"] == []
    first, always, last = (engine["memory"] for engine in made["engines"])
    assert first["available_gib"] == last["available_gib"] == pytest.approx(always["left_gib"])
    note = next(note for note in made["notes"] if note.startswith("on demand"))
    assert re.search(
        r"in the [\d.]+ GiB .*: llama31-8b-fp8 \([\d.]+ GiB\), gpt-oss-20b \([\d.]+ GiB\); one at a time", note
    )
    assert made["release"]["plan"]["format"] == 5 and made["release"]["lock"]["format"] == 2
    places = [engine.get("on_demand") for engine in made["release"]["plan"]["engines"]]
    assert places[1] is None and places[0]["port"] == 8002 and places[2]["needs_gib"] > places[0]["needs_gib"] > 36
    assert places[0]["room_gib"] == places[2]["room_gib"] == pytest.approx(always["left_gib"] - 4)
    small = (
        dataclasses.replace(IN_TURN[0], arguments={"gpu_memory_utilization": 0.15, "max_model_len": 4096}),
        *IN_TURN[1:],
    )
    small = (
        *small[:2],
        dataclasses.replace(small[2], arguments={"gpu_memory_utilization": 0.2, "max_model_len": 8192}),
    )
    made = plan.make(target(engines=small), three(fetched()))
    assert any(note.endswith("they fit at the same time") for note in made["notes"]), made["notes"]


def test_an_engine_on_demand_that_does_not_fit_beside_the_others_is_refused() -> None:
    engines = (*IN_TURN[:2], dataclasses.replace(IN_TURN[2], arguments={"gpu_memory_utilization": 0.7}))
    (finding,) = plan.make(target(engines=engines), three(fetched()))["findings"]
    said = re.search(
        r"Together they fit with a gpu_memory_utilization of ([\d.]+) for \S+, ([\d.]+) for ", finding["message"]
    )
    assert finding["id"] == "memory-short" and said, finding


def test_the_engine_is_on_loopback_and_its_clients_ask_the_guard() -> None:
    goal = target(engines=IN_TURN)
    service = goal.document(three(fetched()))["services"][SERVICE]
    assert service["ports"] == ["127.0.0.1:18002:8000"]
    assert service["profiles"] == ["on-demand"] and service["labels"] == {"sparkfleet.port": "8002"}
    assert service["restart"] == "unless-stopped"
    made = plan.make(goal, three(fetched()))
    assert [engine["port"] for engine in made["engines"]] == [18002, 8001, 18003]
    assert made["prepare"]["guard_settings"]["on_demand_wait"] == "hold"
    assert "on_demand_wait" not in plan.make(target(), fetched())["prepare"]["guard_settings"]
    assert "profiles" not in goal.document(three(fetched()))["services"]["vllm-qwen3-8b-fp8"]


def test_an_engine_that_sleeps_is_as_it_should_be() -> None:
    goal = target(engines=IN_TURN)
    state = three(fetched())
    document = goal.document(state)
    state["compose_file"] = yaml.safe_dump(document)
    state["releases"].update(current=1, numbers=[1], newest_compose=state["compose_file"], halted=False)
    services = list(document["services"])
    ports = (18002, 8001, 18003)
    state["docker"]["containers"] = [started(document, name, port) for name, port in zip(services, ports, strict=True)]
    for place in (0, 2):
        state["docker"]["containers"][place]["state"] = "exited"
    state["engines"][1]["healthy"] = True
    made = plan.make(goal, state)["deploy"]
    assert not made["needed"], made
    state["releases"]["halted"] = True
    made = plan.make(goal, state)["deploy"]
    assert made["start"] == [f"let requests start {services[0]} again", f"let requests start {services[2]} again"]
    assert made["services"] == [services[0], services[2]]
    stopped = target(engines=IN_TURN, service_state="stopped")
    assert plan.make(stopped, state)["deploy"]["halt"] is True
    state["releases"]["halted"] = False
    state["docker"]["containers"][0]["started_with"]["command"] = ["other"]
    made = plan.make(goal, state)["deploy"]
    assert made["start"] == [f"restart {services[0]}: it runs with other settings than its file"]
    del state["docker"]["containers"][0]
    assert plan.make(goal, state)["deploy"]["start"] == [f"create and start {services[0]}"]


def test_somebody_else_where_the_guard_is_to_listen() -> None:
    state = three(fetched())
    state["engines"][0]["door"] = {"address": "192.0.2.1", "pid": 5, "process": "nginx"}
    (finding,) = plan.make(target(engines=IN_TURN), state)["findings"]
    assert finding["id"] == "port-taken" and "port 8002 is held by nginx (pid 5)" in finding["message"]


def test_an_engine_that_always_ran_may_start_on_demand_at_the_same_port() -> None:
    state = three(fetched())
    state["engines"][0]["door"] = {"address": "", "pid": 5, "process": "docker-proxy"}
    state["docker"]["containers"] = [container(SERVICE, ports=[8002])]
    assert plan.make(target(engines=IN_TURN), state)["findings"] == []


def test_without_a_guard_nobody_starts_them() -> None:
    with pytest.raises(SparkfleetError, match="sparkfleet_guard: false leaves nobody"):
        target(engines=IN_TURN, guard=False)


def test_kv_cache_in_bytes_beside_another_engine() -> None:
    """vLLM wants its share of the memory to be free at the start, whatever the KV cache is."""
    image = "nvcr.io/nvidia/vllm:26.08-py3"
    given = {"kv_cache_memory_bytes": 8 * GIB, "max_model_len": 8192}
    engines = [
        dataclasses.replace(TWO[0], image=image),
        dataclasses.replace(TWO[1], image=image, arguments={**given, "gpu_memory_utilization": 0.9}),
    ]
    (finding,) = plan.make(target(engines=engines), two(fetched()))["findings"]
    said = re.search(r"Set gpu_memory_utilization to ([\d.]+) besides", finding["message"])
    assert finding["id"] == "memory-short" and said, finding
    engines[1] = dataclasses.replace(engines[1], arguments={**given, "gpu_memory_utilization": float(said[1])})
    assert plan.make(target(engines=engines), two(fetched()))["findings"] == []
    engines[1] = dataclasses.replace(engines[1], image="nvcr.io/nvidia/vllm:25.09-py3")
    (finding,) = plan.make(target(engines=engines), two(fetched()))["findings"]
    assert "vLLM 0.10.1.1 has no --kv-cache-memory-bytes" in finding["message"]
