"""The actions rollout_schedule and spark_status, with the modules' answers put in their way."""

from __future__ import annotations

import importlib.util
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.unit import ROOT

ENGINE: dict[str, Any] = {
    **{"engine": "serving", "healthy": True, "engines": [], "gpu": {"temperature": 41.0}, "containers": []},
    "releases": {
        **{"current": 2, "previous": 1, "numbers": [1, 2], "outcomes": {}, "switch": None, "switch_active": False},
    },
}
PLAN: dict[str, Any] = {
    **{
        "engines": [{"model": "m"}],
        "compose": {},
        "prepare": {"docker": ["install Docker"]},
        "fetch": {"image": [], "model": []},
    },
    "deploy": {"needed": True, "stage": [], "start": [], "stop": [], "wait": []},
}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"action_{name}", ROOT / "plugins" / "action" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Stage:
    """An action that is run by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.printed: list[str] = []
        self.asked: list[str] = []
        self.action = load(name)
        monkeypatch.setattr(self.action.display, "display", self.printed.append)

    def run(self, task_vars: dict[str, Any], answer: dict[str, Any] | None = None, **given: Any) -> dict[str, Any]:
        plugin = object.__new__(self.action.ActionModule)
        plugin._task = SimpleNamespace(args=given, check_mode=False, async_val=0, diff=False, action="x")
        plugin._connection = SimpleNamespace(_shell=SimpleNamespace(tmpdir=None), has_pipelining=True)
        plugin._early_needs_tmp_path = lambda: False
        plugin._templar = SimpleNamespace(template=lambda value: value)

        def execute(module_name: str, module_args: dict[str, Any], task_vars: dict[str, Any]) -> dict[str, Any]:
            self.asked.append(module_name)
            assert not {"inspection", "problem", "want"} & {*module_args}
            return dict(answer or {})

        plugin._execute_module = execute
        found: dict[str, Any] = plugin.run(task_vars=task_vars)
        return found


def fleet(**inspections: dict[str, Any]) -> dict[str, Any]:
    """Variables of a run over Sparks that were inspected with these results."""
    hostvars = {name: {"sparkfleet_inspection": look} if look else {} for name, look in inspections.items()}
    hostvars.get("s4", {}).update(sparkfleet_drained=True)
    return {"hostvars": hostvars, "groups": {"sparks": list(inspections)}}


def planned(model: str = "m", needed: bool = True) -> dict[str, Any]:
    return {"plan": {"engines": [{"model": model}], "deploy": {"needed": needed}}}


def test_waves_have_names(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, "rollout_schedule")
    inspections = {
        "s1": planned(),
        "s2": planned("n"),
        "s3": planned(),
        "s5": planned(needed=False),
        "s4": {},
        "s6": {},
    }
    made = stage.run(fleet(**inspections))
    assert made["waves"] == [["s1"], ["s2"], ["s3"]] and made["labels"] == ["canary", "canary", "3/3"]
    assert made["drained"] == ["s4"]  # s6 is out of the limit
    assert "rollout  up to date: s5" in stage.printed


@pytest.mark.parametrize(("policy", "expected"), [({}, "stop"), ({"on_failure": "continue"}, "continue")])
def test_what_a_failure_means_is_handed_on(
    monkeypatch: pytest.MonkeyPatch, policy: dict[str, str], expected: str
) -> None:
    run = fleet(s1=planned(), s2=planned())
    for variables in run["hostvars"].values():
        variables.update({f"sparkfleet_rollout_{key}": value for key, value in policy.items()})
    made = Stage(monkeypatch, "rollout_schedule").run(run)
    assert made["on_failure"] == expected and made["serial"] == [1, 1]


@pytest.mark.parametrize(
    ("batch", "done", "policy", "go", "unfinished"),
    [
        (["s1"], [], "stop", True, []),
        (["s4"], ["s1", "s2", "s3"], "stop", True, []),
        (["s4"], ["s1", "s3"], "stop", False, ["s2"]),
        (["s4"], ["s1", "s3"], "continue", True, ["s2"]),
        (["s2", "s3"], [], "stop", False, ["s1"]),
    ],
)
def test_a_wave_begins_only_if_those_before_it_serve(
    monkeypatch: pytest.MonkeyPatch, batch: list[str], done: list[str], policy: str, go: bool, unfinished: list[str]
) -> None:
    names = ["s1", "s2", "s3", "s4"]
    hostvars = {name: {"sparkfleet_rollout_done": True} if name in done else {} for name in names}
    stage = Stage(monkeypatch, "rollout_wave")
    schedule = {"waves": [["s1"], ["s2", "s3"], ["s4"]], "on_failure": policy}
    schedule["labels"] = ["canary", "2/3", "3/3"]
    made = stage.run({"hostvars": hostvars, "ansible_play_batch": batch}, schedule=schedule)
    assert (made["go"], made["unfinished"]) == (go, unfinished)
    assert made["canary"] is (batch == ["s1"])
    assert len(stage.printed) == (0 if go else 1)


def test_a_spark_that_cannot_be_planned_stops_the_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, "rollout_schedule")
    # Ansible registers what it has of a host that it does not reach.
    made = stage.run(fleet(s1=planned(), s2={"unreachable": True, "msg": "no route"}, s4={"unreachable": True}))
    assert made["waves"] == [] and stage.printed == ["rollout  no wave starts: s2 cannot be planned"]


def test_status_takes_one_round_trip(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, "spark_status")
    inspection = {"plan": PLAN, "state": {"status": ENGINE, "engines": [{"healthy": True}]}}
    row = stage.run({"inventory_hostname": "s1", "sparkfleet_drained": "yes"}, inspection=inspection)["summary"]
    assert stage.asked == [] and row["drift"] == ["install Docker"] and row["drained"] is True
    assert "1 difference" in stage.printed[0]


def test_status_of_a_spark_that_cannot_be_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, "spark_status")
    problem = "Task failed: Action failed: s1: unknown model 'nope'"
    row = stage.run({"inventory_hostname": "s1"}, ENGINE, problem=problem)["summary"]
    assert stage.asked == ["sparkfleet.dgx.spark_status"] and row["drift"] is None and row["state"] == "serving"
    assert "s1: not compared with the inventory: unknown model 'nope'" in stage.printed[0]
