"""The action spark_audit: what the inventory expects of a host, and how a run ends."""

from __future__ import annotations

from typing import Any

import pytest
from ansible.errors import AnsibleActionFail

from tests.unit.diagnosis.test_audit import CONTAINER, good, listening, mounts
from tests.unit.plugins.test_fleet_actions import Stage

ON_DEMAND = {
    "sparkfleet_engines": [
        {"model": "llama31-8b-fp8", "port": 8000},
        {"model": "qwen3-32b-fp8", "port": 8001, "on_demand": True, "loopback_port": 18001},
    ]
}


def audited(monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any], **variables: Any) -> dict[str, Any]:
    stage = Stage(monkeypatch, "spark_audit")
    known = {"sparkfleet_share_port": 9110, "group_names": ["sparks"], "inventory_hostname": "spark-1", **variables}
    return stage.run(known, {"facts": facts})


def ids(made: dict[str, Any]) -> list[str]:
    return [item["id"] for item in made["audit"]]


def test_nothing_to_report(monkeypatch: pytest.MonkeyPatch) -> None:
    made = audited(monkeypatch, good(), sparkfleet_model="llama31-8b-fp8")
    assert ids(made) == [] and not made.get("failed") and made["changed"] is False


def test_a_severe_finding_fails_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = good() | {"containers": [{**CONTAINER, "mounts": mounts("/run")}]}
    made = audited(monkeypatch, facts, sparkfleet_model="llama31-8b-fp8")
    assert made["failed"] and made["failure"] == "audit" and "[container-socket]" in made["msg"]


def test_ports_of_engines_on_demand_are_the_guard_s(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = good() | {"secrets": []}
    facts["listeners"] += listening(8001, 18001)
    made = audited(monkeypatch, facts, **ON_DEMAND)
    assert [(item["id"], item["where"]) for item in made["audit"]] == [
        ("engine-open", "0.0.0.0:18001"),
        ("engine-open", "0.0.0.0:8001"),
    ]


@pytest.mark.parametrize(
    ("allow", "found"), [([], []), (["192.0.2.0/24"], []), (["192.0.2.7", "::/0"], ["engine-open"])]
)
def test_a_firewall_that_lets_everyone_in_closes_nothing(
    allow: list[str], found: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = good() | {"containers": [{**CONTAINER, "key": False}], "firewall": [8000, 9109]}
    wall = {"sparkfleet_firewall": True, "sparkfleet_firewall_allow": allow}
    assert ids(audited(monkeypatch, facts, sparkfleet_model="llama31-8b-fp8", **wall)) == found


def test_a_source_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AnsibleActionFail, match="spark-1: sparkfleet_firewall_allow: entry 1"):
        audited(monkeypatch, good(), sparkfleet_model="llama31-8b-fp8", sparkfleet_firewall_allow=["x"])
