"""What happened on a Spark: from its records, as it may have written them or anyone else, and from event logs."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sparkfleet_host.releases import Store

from sparkfleet.reporting import event_log, history
from tests.unit import ROOT

DATA = ROOT / "tests" / "unit" / "data" / "format-1"


def found() -> dict[str, Any]:
    """What spark_status returns of a host with files of format 1."""
    guard = json.loads((DATA / "guard-state.json").read_text())
    guard["given_up"] = {"at": 1795428500.0, "reason": "3 restarts within an hour"}
    releases = Store(DATA, DATA).summary()
    return {"releases": releases, "engines": [{"model": "qwen3-8b-fp8", "guard": guard}]}


def test_releases_the_switch_and_restarts_in_order() -> None:
    events = history.events(found())
    assert [event["at"] for event in events] == sorted(event["at"] for event in events)
    told = {(event["event"], event.get("release"), event.get("by")) for event in events}
    assert ("staged", 2, "alice@laptop") in told and ("verified", 1, None) in told
    assert ("restarted", None, "guard") in told and ("given up", None, "guard") in told
    (switch,) = [event for event in events if event["event"] == "site"]
    assert (switch["by"], switch["release"], switch["model"]) == ("alice@laptop", 2, "qwen3-8b-fp8")
    assert switch["detail"] == "from release 1, verified, 4 s without service"
    (restart,) = [event for event in events if event["event"] == "restarted"]
    assert restart["detail"] == "crash: exit code 1, back after 300 s"


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
_KEYS = ("numbers", "locks", "outcomes", "switch")


@given(
    st.fixed_dictionaries(
        {
            "releases": _JSON | st.fixed_dictionaries(dict.fromkeys(_KEYS, _JSON)),
            "engines": _JSON | st.lists(st.fixed_dictionaries({"guard": _JSON, "model": _JSON}), max_size=2),
        }
    )
)
def test_a_spark_may_answer_anything(answer: dict[str, Any]) -> None:
    events = history.events(answer)
    assert "\x1b" not in history.page({"spark-1": events}, [])
    json.dumps(events, allow_nan=False)


def events(folder: Path, name: str, *lines: dict[str, Any], limit: str | None = None, cut: str = "") -> Path:
    """An event log of inventory i."""
    begin = {"at": 1.7e9, "event": "begin", "verb": name, "inventory": "i", "limit": limit, "controller": "ann@desk"}
    path = folder / f"20261129T093000Z-{name}.jsonl"
    folder.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in (begin, *lines)) + cut, encoding="utf-8")
    return path


def verbs(folder: Path, *hosts: str) -> set[str]:
    return {run["event"] for run in history.runs(folder, "i", hosts)}


def test_a_run_without_an_end_is_that_of_the_hosts_it_names(tmp_path: Path) -> None:
    phases = [{"event": "phase", "host": f"spark-{number}", "phase": "wait"} for number in (1, 2, 3)]
    results = [{"event": "result", "host": f"spark-{number}", "result": "changed"} for number in (1, 2)]
    failed = {"event": "result", "host": "spark-3", "result": "failed"}
    killed = (*phases, *results, failed, {"event": "phase", "host": "spark-1", "phase": "done"})
    events(tmp_path, "rollout", *killed, cut='{"event": "phase", "host": "spark-9')
    (run,) = history.runs(tmp_path, "i", ["spark-2"])
    assert run["detail"] == "did not end, or still runs"
    assert run["hosts"] == {"spark-1": "changed", "spark-2": "", "spark-3": "failed"}
    assert "spark-1 changed, spark-2, spark-3 failed" in history.page({}, [run])
    assert verbs(tmp_path, "spark-4") == set()
    # Interrupted, as earlier versions wrote it.
    events(tmp_path, "deploy", phases[0], {"event": "end", "exit_code": 130})
    assert verbs(tmp_path, "spark-1") == {"rollout", "deploy"}
    assert history.runs(tmp_path, "i", ["spark-1"])[0]["detail"] in ("exit code 130", "did not end, or still runs")


def test_a_run_that_names_no_host_is_that_of_its_limit(tmp_path: Path) -> None:
    for name, limit in (
        ("stop", "spark-1"),
        ("start", "spark-*,!spark-9"),
        ("switch", "sparks:&rack1"),
        ("trial", None),
    ):
        events(tmp_path, name, limit=limit)
    events(tmp_path, "tune", {"event": "end", "exit_code": 3}, limit="spark-7")
    events(tmp_path, "remove", {"event": "end", "exit_code": 2, "hosts": []})  # it has touched none
    assert verbs(tmp_path, "spark-1") == {"stop", "start", "switch", "trial"}
    assert verbs(tmp_path, "spark-7") == {"start", "switch", "trial", "tune"}
    assert verbs(tmp_path, "other") == {"switch", "trial"}


@pytest.mark.parametrize("size", [1, 3000, 1_500_000, 5_000_000])
def test_a_last_line_of_any_length(tmp_path: Path, size: int) -> None:
    """Earlier versions wrote into it all that they knew of each host."""
    end = {
        "event": "end",
        "exit_code": 0,
        "seconds": 5,
        "hosts": [{"name": "spark-1", "result": "ok", "x": "y" * size}],
    }
    events(tmp_path, "rollout", {"event": "line", "text": "x" * 100_000}, end)
    (run,) = history.runs(tmp_path, "i", ["spark-1"])
    assert run["detail"] == "exit code 0, 5 s" and run["hosts"] == {"spark-1": "ok"}


def test_a_last_line_without_an_end_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "LAST_BYTES", 64 << 10)
    events(tmp_path, "rollout", {"event": "end", "hosts": [{"name": "spark-1", "x": "y" * 200_000}]})
    assert history.runs(tmp_path, "i")[0]["detail"] == "did not end, or still runs"


@given(st.lists(st.fixed_dictionaries(dict.fromkeys(("event", "host", "result", "phase", "hosts"), _JSON)), max_size=4))
def test_an_event_log_may_have_any_lines(lines: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        events(Path(folder), "rollout", *lines)
        (run,) = history.runs(Path(folder), "i")
        json.dumps(history.runs(Path(folder), "i", ["spark-1"]), allow_nan=False)
        assert "\x1b" not in history.page({}, [run])


def test_runs_of_this_controller(tmp_path: Path) -> None:
    with event_log.keep(tmp_path, "rollout", False, [], inventory="i", limit=None) as log:
        log.end(0, 61.2, {"spark-1": "changed"})
    with event_log.keep(tmp_path, "switch", False, [], inventory="i", limit=None) as log:
        log({"event": "phase", "host": "spark-2"})
    folder = tmp_path / event_log.FOLDER
    (folder / "x.jsonl").write_text("not JSON\n")
    (folder / "y.jsonl").write_bytes(b"")
    rollout, switch = history.runs(folder, "i")
    assert rollout["event"] == "rollout" and rollout["detail"] == "exit code 0, 61 s" and "@" in rollout["by"]
    assert rollout["hosts"] == {"spark-1": "changed"} and switch["detail"] == "did not end, or still runs"
    assert history.runs(folder, "i", ["spark-1"]) == [rollout] and history.runs(tmp_path / "none", "i") == []
    assert history.runs(folder, "another") == []
    page = history.page({"spark-1": history.events(found()), "spark-2": []}, [rollout])
    assert "spark-1 changed" in page and "spark-2\nno record of a release" in page
