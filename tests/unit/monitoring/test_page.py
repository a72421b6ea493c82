"""The status page: its expressions, and what deployments say of Sparks and rollouts."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from sparkfleet_host import guard, sensors

from sparkfleet.monitoring import page, rules
from sparkfleet.planning import catalog, memory_plan
from tests.unit.monitoring.test_rules import PROMTOOL

CARD = catalog.load("llama31-8b-fp8")
PLAN = memory_plan.make(CARD, CARD.with_profile("throughput")).as_dict()
SCHEDULE: dict[str, Any] = {
    "waves": [["s1"], ["s2", "s3"], ["s4"]],
    "labels": ["canary", "2/3", "3/3"],
    "on_failure": "stop",
}


def engine(**more: Any) -> dict[str, Any]:
    names = {
        "service": "vllm-a",
        "model": "a",
        "profile": "throughput",
        "repo": "o/a",
        "image": "i@sha256:1",
        "port": 8000,
    }
    return {**names, "measured": None, **more}


def summary(*engines: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"release": 2, "previous": 1, "engines": list(engines), "drift": [], "drained": False, **more}


def planned(**memory: dict[str, Any]) -> dict[str, Any]:
    return {"engines": [{"service": f"vllm-{name}", "memory": plan} for name, plan in memory.items()]}


# -- expressions -------------------------------------------------------------------------------------------------------


def test_every_expression_is_one_of_prometheus(tmp_path: Path) -> None:
    exprs = [*page.expressions().values(), *page.totals().values()]
    records = [{"record": f"x:{number}", "expr": expr} for number, expr in enumerate(exprs)]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "x", "rules": records}]}), encoding="utf-8")
    done = subprocess.run([PROMTOOL or "promtool", "check", "rules", file], capture_output=True, text=True, check=False)
    assert f"{len(records)} rules found" in done.stdout, done.stdout + done.stderr


def test_every_series_is_recorded_or_exported() -> None:
    known = {record.name for record in rules.RECORDS} | {"up", "node_memory_MemTotal_bytes"}
    data = {"engine": "serving", "restarts_total": {}, "given_up": None, "slow": False, "canary": None}
    known |= set(re.findall(r"^sparkfleet_\w+", guard.metrics({"at": 1.0, "release": 1, "engines": {"e": data}}), re.M))
    known |= set(re.findall(r"sparkfleet_gpu_\w+", sensors.__doc__ or ""))
    gpu = {"temperature_celsius", "power_watts", "throttled"}
    known |= {f"sparkfleet_gpu_{name}" for name in gpu}
    used = {re.sub(r"\{.*", "", name) for query in page.QUERIES for name in rules.selectors(query.expr)}
    assert used and used <= known, used - known


def test_names_and_expressions_are_there_once_and_the_file_has_them() -> None:
    names = [query.name for query in page.QUERIES]
    exprs = [query.expr for query in page.QUERIES]
    assert len({*names}) == len(names) and len({*exprs}) == len(exprs)
    assert json.loads(page.queries_file()) == page.queries() and set(page.expressions().values()) == {*exprs}
    # HAProxy reads them as lines, without what stands at their ends.
    assert all(expr == expr.strip() and "\n" not in expr and not expr.startswith("#") for expr in exprs)


# -- a Spark -----------------------------------------------------------------------------------------------------------


def test_what_is_said_of_a_spark() -> None:
    events = [{"at": float(number), "event": "restarted"} for number in range(20)]
    found = page.spark(summary(engine(), drift=["a → b"] * 30, drained=True), planned(a=PLAN), events)
    assert (found["release"], found["previous"], found["drained"]) == (2, 1, True)
    assert found["engines"] == [
        {key: engine()[key] for key in ("service", "model", "profile", "repo", "image", "port")}
    ]
    assert len(found["drift"]) == page.LINES and [event["at"] for event in found["events"]] == [14, 15, 16, 17, 18, 19]
    assert found["memory"]["total"] == PLAN["total_gib"] and found["limit"] == PLAN["decode_tok_s_limit"]
    assert found["memory"]["planned"]["kv_cache"] == PLAN["kv_cache_gib"] and found["memory"]["logged"] == {}
    assert json.loads(json.dumps(found)) == found


def test_the_plan_of_the_release_counts_before_that_of_the_inventory() -> None:
    before = {"weights_gib": 10.0, "kv_cache_gib": 20.0, "total_gib": 100.0}
    record = {"planned": before, "figures": {"weights_gib": 11.0, "load_s": 3.0}}
    found = page.spark(summary(engine(measured=record)), planned(a=PLAN), [])["memory"]
    assert (found["planned"]["weights"], found["planned"]["kv_cache"]) == (10.0, 20.0)
    # What is not in a record is as planned now.
    assert found["planned"]["runtime"] == PLAN["runtime_gib"] and found["logged"] == {"weights": 11.0}


def test_engines_of_a_host_are_added_up_and_have_no_limit_together() -> None:
    two = summary(engine(), engine(service="vllm-b"))
    found = page.spark(two, planned(a=PLAN, b=PLAN), [])
    assert found["memory"]["planned"]["weights"] == pytest.approx(2 * PLAN["weights_gib"], abs=0.02)
    assert found["memory"]["total"] == PLAN["total_gib"] and found["limit"] is None


@pytest.mark.parametrize("plan", [None, planned(), planned(other=PLAN)])
def test_without_a_plan_there_is_no_bar(plan: dict[str, Any] | None) -> None:
    found = page.spark(summary(engine(), drift=None, problem="no such model"), plan, [])
    assert (found["memory"], found["limit"], found["drift"]) == (None, None, None)
    assert found["problem"] == "no such model"


def test_a_spark_that_could_not_be_inspected_has_no_engines() -> None:
    found = page.spark(summary(release=None, previous=None), None, [])
    assert found["engines"] == [] and found["memory"] is None


# -- a rollout ---------------------------------------------------------------------------------------------------------


def progress(wave: int, go: bool = True, done: str = "", failed: str = "", **more: Any) -> tuple[Any, ...]:
    found = page.rollout({**SCHEDULE, **more}, wave, go, done.split(), failed.split())
    return found["wave"], found["done"], found["failed"], found["ended"]


@pytest.mark.parametrize(
    ("now", "found"),
    [
        (progress(1), (1, [], [], False)),
        (progress(2, done="s1"), (2, ["s1"], [], False)),
        (progress(2, done="s1 s2"), (2, ["s1", "s2"], [], False)),
        (progress(3, done="s1 s2 s3 s4"), (3, ["s1", "s2", "s3", "s4"], [], True)),
        # The neighbours of one that failed come to their end.
        (progress(2, done="s1", failed="s2"), (2, ["s1"], ["s2"], False)),
        (progress(2, done="s1 s3", failed="s2"), (2, ["s1", "s3"], ["s2"], True)),
        # One that was lost without a word is noticed when the next wave would begin.
        (progress(3, go=False, done="s1 s3"), (2, ["s1", "s3"], ["s2"], True)),
        (progress(3, done="s1 s3", failed="s2", on_failure="continue"), (3, ["s1", "s3"], ["s2"], False)),
        (progress(3, done="s1 s3 s4", failed="s2", on_failure="continue"), (3, ["s1", "s3", "s4"], ["s2"], True)),
    ],
)
def test_how_far_a_rollout_is(now: tuple[Any, ...], found: tuple[Any, ...]) -> None:
    assert now == found
