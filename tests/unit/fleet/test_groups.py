"""Hosts of a group do the same: what each would do by itself, and what all of them do."""

from __future__ import annotations

from typing import Any

import pytest

from sparkfleet import SparkfleetError
from sparkfleet.fleet import gateway, groups, outage

NOTHING: dict[str, Any] = {
    **{"needed": False, "stage": [], "stop": [], "stop_services": [], "start": [], "mode": "restart", "release": 3},
    **{"services": [], "recreate": False, "new_key": False, "wait": []},
}
STAGES = {
    **NOTHING,
    "needed": True,
    "stage": ["stage it"],
    "start": ["switch to it"],
    "mode": "deploy",
    "release": None,
}
RESTARTS = {**NOTHING, "needed": True, "start": ["restart vllm-m: it runs with other settings"], "recreate": True}


def host(
    deploy: dict[str, Any],
    current: int | None = 3,
    following: int = 4,
    digest: str = "a",
    fetch: bool = False,
    **lock: str,
) -> dict[str, Any]:
    engine = {"image": "i@sha256:1", "model": "m", "revision": "c", **lock}
    return {
        "plan": {
            **{"deploy": deploy, "fetch": {"needed": fetch}, "group": {"digest": digest}},
            "release": {"lock": {"engines": [engine]}},
        },
        "state": {"releases": {"current": current, "next": following}},
    }


def test_nothing_to_do() -> None:
    made = groups.deploys("pair", {"a": host(NOTHING), "b": host(NOTHING)})
    assert made == {"a": {**NOTHING, "number": 0}, "b": {**NOTHING, "number": 0}}


def test_all_stage_a_release_of_the_highest_number_if_one_does() -> None:
    made = groups.deploys("pair", {"a": host(NOTHING), "b": host(STAGES, following=9)})
    for name in ("a", "b"):
        assert (made[name]["needed"], made[name]["mode"], made[name]["number"]) == (True, "deploy", 9)
        assert made[name]["release"] is None and made[name]["stage"] == ["stage release 9 of the group pair"]
    assert made["a"]["start"] == ["switch to it with the group pair"]


def test_hosts_with_different_releases_get_a_new_one() -> None:
    made = groups.deploys("pair", {"a": host(NOTHING, current=3), "b": host(NOTHING, current=2)})
    assert {item["number"] for item in made.values()} == {4} and all(item["start"] for item in made.values())


def test_all_restart_if_one_does() -> None:
    made = groups.deploys("pair", {"a": host(RESTARTS), "b": host(NOTHING)})
    assert made["b"]["start"] == ["restart its rank with the group pair"] and made["b"]["recreate"]
    assert {(item["mode"], item["release"], item["number"]) for item in made.values()} == {("restart", 3, 0)}


def test_what_was_made_of_a_plan_before_is_not_its_own() -> None:
    hosts = {"a": host(NOTHING), "b": host(STAGES)}
    first = groups.deploys("pair", hosts)["a"]
    hosts["a"]["plan"] = {**hosts["a"]["plan"], "deploy": first, "group": {"digest": "a", "own": NOTHING}}
    hosts["b"] = host(NOTHING)
    assert groups.deploys("pair", hosts)["a"] == {**NOTHING, "number": 0}


def test_a_group_that_is_stopped_is_only_staged() -> None:
    stopped = {**STAGES, "start": [], "mode": "deploy"}
    made = groups.deploys("pair", {"a": host(stopped), "b": host(stopped)})
    assert [item["start"] for item in made.values()] == [[], []] and made["a"]["number"] == 4


def test_ranks_that_differ() -> None:
    with pytest.raises(SparkfleetError, match=r"image i@sha256:1 on a; other on b\. Set what differs.*group-differs"):
        groups.deploys("pair", {"a": host(NOTHING), "b": host(NOTHING, digest="b", image="other")})
    with pytest.raises(SparkfleetError, match="arguments or environment differ between a and b"):
        groups.deploys("pair", {"a": host(NOTHING), "b": host(NOTHING, digest="b")})
    # Before all of it is fetched, image and revision are not pinned yet.
    groups.deploys("pair", {"a": host(STAGES), "b": host(STAGES, digest="b", fetch=True)})


def test_units_of_a_run() -> None:
    pair = {"group": {"nodes": [{"host": "a"}, {"host": "b"}]}}
    assert groups.units({"a": pair, "b": pair, "c": {"group": None}}) == {"a": ["a", "b"], "c": ["c"]}
    assert groups.units({"b": pair}) == {"b": ["b"]}
    assert outage.units(["a", "b", "c"], {"a": ("a", "b"), "b": ("a", "b")}) == ["a", "c"]


def test_a_gateway_has_one_server_for_a_group() -> None:
    known: dict[str, dict[str, Any]] = {"a": {"sparkfleet_nodes": "pair"}, "b": {"sparkfleet_nodes": "pair"}, "c": {}}
    there = {"sparks": ["a", "b", "c"], "pair": ["a", "b"]}
    assert gateway.answering(known, there) == ["a", "c"]
    with pytest.raises(SparkfleetError, match="c: sparkfleet_nodes: 'pears' is no group"):
        gateway.answering({**known, "c": {"sparkfleet_nodes": "pears"}}, there)
