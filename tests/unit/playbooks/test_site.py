"""site.yml itself, run by ansible-playbook on several Sparks; what acts on a Spark has a stand-in."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit import ROOT
from tests.unit.playbooks.test_rollout import Fleet

SITE = "playbooks/site.yml"
UNREACHABLE, FAILED = 4, 2  # as ansible-playbook ends


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path, 3)


def called(fleet: Fleet) -> set[str]:
    """Actions that were called, without the inspection."""
    return {path.name.rpartition(".")[2] for path in fleet.folder.glob("calls.*")} - {"spark_plan"}


@pytest.mark.parametrize(
    ("fate", "code"), [("unreachable", UNREACHABLE), ("failed", FAILED)], ids=["unreachable", "refused"]
)
def test_a_spark_that_is_lost_keeps_no_other_one_from_its_deployment(fleet: Fleet, fate: str, code: int) -> None:
    """`any_errors_fatal` once was a template, which ansible-core takes for true."""
    ended, printed = fleet.run(playbook=SITE, s2_spark_plan=fate)
    assert ended == code, printed
    assert fleet.released() == ["s1", "s3"]
    assert sorted(entry["host"] for entry in fleet.log("vllm_verify")) == ["s1", "s3"]


def test_a_rollout_does_not_start_without_one_of_its_sparks(fleet: Fleet) -> None:
    code, printed = fleet.run(s2_spark_plan="unreachable")
    assert code == UNREACHABLE, printed
    assert fleet.released() == []


@pytest.mark.parametrize(
    ("tag", "actions"),
    [
        ("preflight", set()),
        ("prepare", set()),
        ("fetch", set()),
        ("deploy", {"release_switch"}),
        ("verify", {"vllm_verify"}),
        ("gateway", set()),
        ("preflight,verify", {"vllm_verify"}),
    ],
)
def test_each_stage_by_its_tag(tmp_path: Path, tag: str, actions: set[str]) -> None:
    fleet = Fleet(tmp_path, 1)
    code, printed = fleet.run("--tags", tag, playbook=SITE)
    assert code == 0, printed
    assert called(fleet) == actions, printed
    code, printed = fleet.run("--skip-tags", tag, playbook=SITE, needed=[])
    assert code == 0, printed
    assert not called(fleet) & actions, printed


@pytest.mark.parametrize("playbook", [SITE, "playbooks/rollout.yml"])
@pytest.mark.parametrize("needed", [[], ["s1"]], ids=["up to date", "one to deploy"])
def test_one_host_under_two_names_is_refused(fleet: Fleet, playbook: str, needed: list[str]) -> None:
    code, printed = fleet.run(playbook=playbook, needed=needed, twins=("s1", "s3"))
    assert code == FAILED and "s1 and s3 are the same host" in printed, printed
    assert not called(fleet) - {"rollout_schedule"}, printed


@pytest.mark.parametrize("playbook", [SITE, "playbooks/rollout.yml"])
def test_sparks_fetch_together_although_they_lack_different_things(fleet: Fleet, playbook: str) -> None:
    """A source is there for the others only while it takes part itself: none may end before all have started."""
    fetches = {"s1": ["image"], "s2": ["image", "model"], "s3": ["model"]}
    code, printed = fleet.run("--check", playbook=playbook, fetches=fetches)
    assert code == 0, printed
    states = [entry["state"] for entry in fleet.log("share")]
    assert states[:3] == ["schedule"] * 3 and "schedule" not in states[3:] and len(states) == 6


def test_the_lock_of_the_plan_takes_the_place_of_the_hub(fleet: Fleet) -> None:
    code, printed = fleet.run("--check", playbook=SITE, fetches={"s1": ["image", "model"]})
    assert code == 0, printed
    assert [entry["lock"] for entry in fleet.log("model_files")] == ["/the.lock"]


def test_everything_tagged_from_outside(fleet: Fleet) -> None:
    (fleet.folder / "own.yml").write_text(f"- import_playbook: {ROOT / SITE}\n  tags: [sparks]\n", encoding="utf-8")
    code, printed = fleet.run("--tags", "sparks", playbook=str(fleet.folder / "own.yml"))
    assert code == 0, printed
    assert fleet.released() == ["s1", "s2", "s3"] and "vllm_verify" in called(fleet)


def test_switch_is_refused_where_the_inventory_lists_engines(fleet: Fleet) -> None:
    fleet.inventory(sparkfleet_engines=[{"model": "llama31-8b-fp8"}])
    code, printed = fleet.run("-e", "sparkfleet_model=qwen3-8b-fp8", playbook="playbooks/switch.yml")
    assert code == FAILED and "has sparkfleet_engines in the inventory: change its entries" in printed, printed
    assert not called(fleet) and not fleet.released()
