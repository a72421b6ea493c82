"""What happened on a Spark: from its records, as it may have written them or anyone else, and from event logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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


def test_runs_of_this_controller(tmp_path: Path) -> None:
    with event_log.keep(tmp_path, "rollout", False, [], inventory="i", limit=None) as log:
        log({"event": "end", "seconds": 61.2, "exit_code": 0, "hosts": [{"name": "spark-1", "result": "changed"}]})
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
