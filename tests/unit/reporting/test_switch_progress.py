"""Following a switch from the controller: what is printed, and what a failure says."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plugins.action.release_switch import refused

from sparkfleet.diagnosis.failures import BY_ID
from sparkfleet.reporting.switch_progress import Follower, foreseen

LOG = [
    "2026-11-23T10:00:04.000000000Z INFO 11-23 10:00:04 [core.py] Initializing a V1 LLM engine (v0.10.1.1) with x",
    "2026-11-23T10:00:05.000000000Z usage: vllm [-h] [-v] {chat,complete,serve} ...",
    "2026-11-23T10:00:05.000000000Z vllm: error: unrecognized arguments: --unknown-thing 3",
]
BEGAN = 1795428000.0  # 2026-11-23T10:00:00Z


def journal(*phases: str, **more: Any) -> dict[str, Any]:
    """A journal that came through these phases, ten seconds each."""
    return {
        **{"id": "abc", "to": 8, "models": ["new-model"], "from": 7, "from_models": ["old-model"], "mode": "deploy"},
        **{"controller": "alice@laptop", "verb": "site.yml", "began": BEGAN, "ended": None, "outcome": None},
        **{"steps": [{"phase": phase, "at": BEGAN + 10 * place} for place, phase in enumerate(phases)]},
        **{"phase": phases[-1], "container": "vllm-new", "error": None, "restore_error": None},
        **{"out_of_service_s": None, "verifications": {}, "stopped_at": None, "answering_at": None},
        **more,
    }


def answer(journal: dict[str, Any], lines: list[str] | None = None, **more: Any) -> dict[str, Any]:
    """What the module gives."""
    lines = lines or []
    return {
        **{
            "id": "abc",
            "joined": False,
            "cut": False,
            "done": journal["phase"] == "done",
            "journal": journal,
            "now": BEGAN + 6,
        },
        **{"state": "running", "restart_count": 0, "started_at": "2026-11-23T10:00:03Z", "log_lines": lines},
        "cursor": lines[-1].partition(" ")[0] if lines else "",
        **more,
    }


def error(**facts: Any) -> dict[str, Any]:
    """How a release failed."""
    known = {"message": "vllm-new ended", "container": "vllm-new", "state": "exited", "exit_code": 2}
    return {**known, "oom_killed": False, "restart_count": 0, "docker_error": "", "log": LOG, **facts}


def test_phases_and_the_log_in_the_order_of_time() -> None:
    follower = Follower("spark-1", 3)
    assert follower.parameters() == {"id": "", "recover": True, "container": "", "cursor": ""}
    assert follower.take(answer(journal("stopping"))) == ["spark-1  0 s  stopping release 7 (old-model)"]
    assert follower.parameters()["id"] == "abc"
    lines = follower.take(answer(journal("stopping", "starting", "waiting"), LOG[:1]))
    assert lines[0] == "spark-1  10 s  starting release 8 (new-model)"
    assert lines[1:] == ["spark-1  4 s  starting, vLLM 0.10.1.1"]
    asked = follower.parameters()
    assert (asked["container"], asked["cursor"]) == ("vllm-new", "2026-11-23T10:00:04.000000000Z")
    lines = follower.take(answer(journal("stopping", "starting", "waiting", "verifying"), now=BEGAN + 31))
    assert [line.split("  ")[-1] for line in lines] == ["ready", "asking it"]
    done = journal(
        *("stopping", "starting", "waiting", "verifying", "committing", "done"),
        **{"outcome": "verified", "ended": BEGAN + 50, "out_of_service_s": 31.0},
    )
    assert follower.take(answer(done)) == ["spark-1  40 s  it is the current release now"]
    assert follower.done
    result = follower.result()
    assert result["release"] == {"number": 8, "model": "new-model", "models": ["new-model"]}
    assert result["previous"] == {"number": 7, "model": "old-model", "models": ["old-model"]}
    assert (result["outcome"], result["seconds"], result["changed"]) == ("verified", 50.0, True)
    assert "failed" not in result


def test_what_a_deep_verification_asks_is_shown_once() -> None:
    follower = Follower("spark-1", 3)
    shown = []
    for second, asking in enumerate(("", "needle", "needle", "", "needle", "x" * 9999)):
        made = journal("stopping", "starting", "waiting", "verifying", asking=asking)
        shown += follower.take(answer(made, now=BEGAN + 40 + second))[-1:]
    assert shown[1:-1] == ["spark-1  41 s  asking it: needle", "spark-1  44 s  asking it: needle"]
    assert len(shown[-1]) < 400


def finish(**more: Any) -> dict[str, Any]:
    """The result of a switch that failed while it waited."""
    follower = Follower("spark-1", 3)
    phases = ("stopping", "starting", "waiting", "restoring", "restore-waiting", "restore-verifying", "done")
    follower.take(answer(journal(*phases, error=error(), ended=BEGAN + 60, **more)))
    return follower.result()


def test_a_failure_names_both_releases_the_cause_and_how_long_nothing_served() -> None:
    result = finish(outcome="restored", out_of_service_s=50.0)
    assert result["failed"] and result["failure"] == "argument-unknown"
    first, second, *log = result["msg"].splitlines()
    assert first.startswith("spark-1: release 8 (new-model) does not serve: vllm-new ended with exit code 2 after 20 s")
    assert BY_ID["argument-unknown"].remedy in first and first.endswith("[argument-unknown]")
    assert second == "  release 7 (old-model) was started again and is verified; no service for 50 s."
    assert [line.strip() for line in log] == ["vllm: error: unrecognized arguments: --unknown-thing 3"]
    assert result["release"] == {"number": 7, "model": "old-model", "models": ["old-model"]}


def test_a_first_deployment_that_failed() -> None:
    result = finish(outcome="removed", **{"from": None, "from_models": []})
    assert "There was no release before it: its container was removed, and nothing serves." in result["msg"]
    assert result["release"] is None and result["previous"] is None


def test_neither_serves() -> None:
    again = error(message="vllm-old ended", container="vllm-old", exit_code=137, log=[])
    result = finish(outcome="failed", restore_error=again)
    assert "release 7 (old-model) could not be brought back either, nothing verified serves: vllm-old" in result["msg"]
    assert result["release"] is None


def test_a_restart_that_failed() -> None:
    result = finish(outcome="failed", **{"from": 8, "from_models": ["new-model"], "mode": "restart"})
    assert "It was stopped; nothing serves." in result["msg"]


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"failure": "answer-wrong", "message": "chat: got Rome", "checks": [{}]}, "does not serve: chat: got Rome. "),
        ({"failure": "switch-interrupted", "message": "cut in the phase waiting: the host was restarted"}, "restarted"),
        ({"failure": "start-timeout", "state": "running", "log": LOG[:1]}, "vllm-new was not ready after 20 s"),
        ({"state": "missing", "docker_error": "port is already allocated", "log": []}, "could not be started"),
    ],
)
def test_other_ways_to_fail(facts: dict[str, Any], words: str) -> None:
    follower = Follower("spark-1", 3)
    phases = ("stopping", "starting", "waiting", "restoring", "done")
    ended = {"outcome": "restored", "ended": BEGAN + 60}
    follower.take(answer(journal(*phases, error=error(**facts), **ended)))
    result = follower.result()
    assert words in result["msg"]
    known = facts.get("failure", "port-taken")
    assert result["failure"] == known and f"[{known}]" in result["msg"]


def test_joining_says_whose_job_it_is() -> None:
    follower = Follower("spark-1", 3)
    lines = follower.take(answer(journal("stopping"), joined=True))
    assert lines[0] == "spark-1  joined: alice@laptop began it with site.yml"


def test_a_job_that_was_killed_is_ended_once() -> None:
    follower = Follower("spark-1", 3)
    lines = follower.take(answer(journal("stopping", "starting"), cut=True))
    assert lines[0].startswith("spark-1  the job was killed in the phase starting")
    assert follower.parameters()["recover"] is False and not follower.done


def test_what_was_reclaimed_is_printed_and_counted() -> None:
    found = {
        "reclaimed": [
            {"kind": "image", "name": "nvcr.io/x@sha256:1\x1b[31m", "bytes": 8_500_000_000},
            {"kind": "model", "name": "org/m@abc", "bytes": 24_600_000_000},
        ],
        "left": ["compile cache 123: the container x has it mounted"],
    }
    follower = Follower("spark-1", 3)
    lines = follower.take(answer(journal("done", outcome="verified", ended=BEGAN + 1, **found)))
    assert lines == [
        "spark-1  reclaimed 33.10 GB that no kept release needs: image nvcr.io/x@sha256:1\ufffd[31m (8.50 GB), "
        "model org/m@abc (24.60 GB)",
        "spark-1  not reclaimed: compile cache 123: the container x has it mounted",
    ]
    result = follower.result()
    assert (result["reclaimed_bytes"], len(result["reclaimed"]), len(result["left"])) == (33_100_000_000, 2, 1)
    assert foreseen("spark-1", {"pruned": [1, 2], **found})[:2] == [
        *("spark-1  would prune release 1, 2", lines[0].replace("reclaimed", "would reclaim")),
    ]
    assert foreseen("spark-1", {"pruned": []}) == []


# -- more than one engine ----------------------------------------------------------------------------------------------


def steps(*names: str) -> list[dict[str, Any]]:
    """Phases, ten seconds each; PHASE SERVICE is of an engine."""
    made = [name.partition(" ")[::2] for name in names]
    return [
        {"phase": phase, "at": BEGAN + 10 * place, **({"container": service} if service else {})}
        for place, (phase, service) in enumerate(made)
    ]


def both(*names: str, **more: Any) -> dict[str, Any]:
    """The journal of a release with the engines a and b."""
    made = steps(*names)
    last = {"phase": made[-1]["phase"], "container": made[-1].get("container", "")}
    models = {"models": ["a", "b"], "from_models": ["a", "old-b"]}
    return {**journal("stopping"), **models, **last, "steps": made, "kept": [], "container_ids": {}, **more}


def test_each_engine_is_named_where_there_are_several() -> None:
    follower = Follower("spark-1", 3)
    assert follower.take(answer(both("stopping"))) == ["spark-1  0 s  stopping release 7 (a, old-b)"]
    lines = follower.take(answer(both("stopping", "starting vllm-a", "waiting vllm-a"), LOG[:1]))
    assert lines == ["spark-1  10 s  starting vllm-a of release 8 (a, b)", "spark-1  4 s  starting, vLLM 0.10.1.1"]
    names = ("stopping", "starting vllm-a", "waiting vllm-a", "starting vllm-b", "waiting vllm-b")
    lines = follower.take(answer(both(*names, container_ids={"vllm-a": "1"}), LOG[:1], now=BEGAN + 31))
    assert [line.split("  ", 2)[2] for line in lines] == [
        *("ready", "starting vllm-b of release 8 (a, b)", "starting, vLLM 0.10.1.1"),
    ]
    whole = (*names, "verifying vllm-a", "verifying vllm-b", "committing", "done")
    ids = {"vllm-a": "1", "vllm-b": "2"}
    found = {"vllm-a": {"verified": True, "ttft_ms": 5.0}, "vllm-b": {"verified": True}}
    ended = both(*whole, container_ids=ids, verifications=found, outcome="verified", ended=BEGAN + 99)
    lines = follower.take(answer(ended, now=BEGAN + 60))
    assert [line.split("  ", 2)[2] for line in lines] == [
        *("ready", "asking vllm-a", "asking vllm-b", "it is the current release now"),
    ]
    result = follower.result()
    assert result["release"] == {"number": 8, "model": "a, b", "models": ["a", "b"]} and {*result["starts"]} == {
        "vllm-a",
        "vllm-b",
    }
    assert result["verifications"] == found and result["verification"] == found["vllm-a"]


def test_a_log_that_was_read_is_not_read_again() -> None:
    """The host reads on where it was with one container: asked for another one in between, it starts again."""
    follower = Follower("spark-1", 3)
    names = ("stopping", "starting vllm-a", "waiting vllm-a")
    assert follower.take(answer(both(*names), LOG[:1]))[-1].endswith("starting, vLLM 0.10.1.1")
    names = (*names, "starting vllm-b", "waiting vllm-b")
    follower.take(answer(both(*names, container_ids={"vllm-a": "1"}), LOG[:1]))
    names, ids = (*names, "verifying vllm-a"), {"vllm-a": "1", "vllm-b": "2"}
    lines = follower.take(answer(both(*names, container_ids=ids), LOG[:1]))
    assert [line.split("  ", 2)[2] for line in lines] == ["ready", "asking vllm-a"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"kept": ["vllm-a"]}, "stopping release 7 (a, old-b) but for vllm-a"),
        ({"kept": ["vllm-a", "vllm-b"]}, "vllm-a, vllm-b of release 7 (a, old-b) keep running for release 8 (a, b)"),
        (
            {"kept": ["vllm-a"], "models": ["a"], "from_models": ["a"]},
            "the engine of release 7 (a) keeps running for release 8 (a)",
        ),
    ],
)
def test_engines_that_keep_running_are_said(more: dict[str, Any], words: str) -> None:
    assert Follower("spark-1", 3).take(answer(both("stopping", **more))) == [f"spark-1  0 s  {words}"]


def test_a_failure_of_one_engine_names_it() -> None:
    names = ("stopping", "starting vllm-a", "waiting vllm-a", "starting vllm-b", "waiting vllm-b", "restoring")
    back = (
        "restoring vllm-b",
        "restore-waiting vllm-b",
        "restore-verifying vllm-a",
        "restore-verifying vllm-b",
        "done",
    )
    more = {"kept": ["vllm-a"], "container_ids": {"vllm-a": "1", "vllm-b": "2"}, "ended": BEGAN + 99}
    told = error(message="vllm-b ended", container="vllm-b")
    follower = Follower("spark-1", 3)
    ended = both(*names, *back, error=told, outcome="restored", out_of_service_s=9.0, **more)
    lines = [line.split("  ", 2)[2] for line in follower.take(answer(ended))]
    assert "release 8 (a, b) failed; bringing back release 7 (a, old-b)" in lines
    assert "starting vllm-b of release 7 (a, old-b)" in lines and lines[-2:] == ["asking vllm-a", "asking vllm-b"]
    head = follower.result()["msg"].splitlines()[0]
    assert head.startswith("spark-1: release 8 (a, b) does not serve: vllm-b ended with exit code 2 after 20 s")
    wrong = error(message="chat: got Rome", container="vllm-b", failure="answer-wrong", state="running", checks=[{}])
    follower = Follower("spark-1", 3)
    follower.take(answer(both(*names, *back, error=wrong, outcome="restored", **more)))
    assert "does not serve: vllm-b: chat: got Rome. " in follower.result()["msg"]


def test_what_still_serves_is_said() -> None:
    right = {"vllm-a": {"verified": True}}
    told = error(message="vllm-b ended", container="vllm-b")
    same = both("stopping", "done", error=told, outcome="failed", verifications=right, ended=BEGAN, **{"from": 8})
    follower = Follower("spark-1", 3)
    follower.take(answer(same))
    assert "\n  vllm-b was stopped; vllm-a serves." in follower.result()["msg"]
    follower = Follower("spark-1", 3)
    follower.take(answer({**same, "from": 7, "restore_error": told}))
    assert "could not be brought back completely, vllm-a serves: vllm-b ended" in follower.result()["msg"]


# -- a Spark that says anything --------------------------------------------------------------------------------------

EVIL = "\x1b]0;owned\x07\x1b[2J\r\n\u202egnp"
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]")
PHASES = ("stopping", "starting", "waiting", "verifying", "restoring", "restore-waiting", "restore-verifying", "done")


def harmless(lines: list[str]) -> None:
    for line in lines:
        assert not CONTROL.search(line) and len(line) <= 4000 and line.startswith("spark-1  "), line


@pytest.mark.parametrize("text", [EVIL, EVIL * 100_000, "\ud800"])
@pytest.mark.parametrize("outcome", ["verified", "restored", "failed", "removed", "refused", None])
def test_what_a_spark_says_does_nothing_to_the_terminal(text: str, outcome: str | None) -> None:
    names = {**dict.fromkeys(("controller", "verb", "container"), text), "models": [text], "from_models": [text]}
    told = error(message=text, docker_error=text, container=text, log=[text, f"ValueError: {text}"])
    known = {"error": told, "restore_error": told, "left": [text], "troubles": [text], "outcome": outcome}
    reclaimed = [{"kind": text[:4000], "name": text[:4000], "bytes": 5}]
    for more in ({"already": True, "done": True}, {"joined": True}, {"cut": True}, {}):
        follower = Follower("spark-1", 3)
        first = journal("stopping", "starting", "waiting", **names)
        lines = follower.take(answer(first, [text, f"2026-11-23T10:00:04Z INFO Fetching 5 files: {text} 1/2"], **more))
        harmless(lines)
        asked = follower.parameters()
        assert all(len(str(value)) <= 300 for value in asked.values())
        ended = journal(*PHASES, **names, **known, reclaimed=reclaimed, ended=BEGAN + 60)
        harmless(follower.take(answer(ended, [text])))
        message = follower.result().get("msg", "")
        assert not CONTROL.search(message.replace("\n", "")) and len(message) < 20_000
    harmless(foreseen("spark-1", {"pruned": [1], "reclaimed": reclaimed, "left": [text]}))
    said = refused("spark-1", {"failed": True, "failure": text, "msg": text})["msg"]
    assert not CONTROL.search(said.replace("\n", "")) and len(said) < 5000
    assert refused("spark-1", {"failed": True, "failure": ["x"]})["msg"] == "spark-1:  [['x']]"


def test_troubles_of_a_switch_are_printed() -> None:
    follower = Follower("spark-1", 3)
    trouble = "the journal could not be written: No space left on device"
    lines = follower.take(answer(journal("done", outcome="verified", ended=BEGAN + 1, troubles=[trouble] * 50)))
    assert lines == [f"spark-1  {trouble}"] * 20 and follower.result()["troubles"] == [trouble] * 50


HUGE, NAN, INFINITY = 10**400, float("nan"), float("inf")


@pytest.mark.parametrize(
    "odd",
    [
        *(5, "x", {}, [5], [None], [{}], [[]], True, NAN, {"bytes": 5}),
        *([{"kind": "image", "name": "x", "bytes": size}] for size in (NAN, INFINITY, HUGE, -1, "5", None, True, [5])),
        *([{"kind": kind, "name": "x", "bytes": 5}] for kind in (5, None, [], {}, "x" * 100_000)),
    ],
)
def test_what_was_reclaimed_of_another_form_is_left_out(odd: Any) -> None:
    good = {"kind": "image", "name": "nvcr.io/x:1", "bytes": 2_000_000_000}
    for kept, value in enumerate((odd, [good, *odd] if isinstance(odd, list) else [good, odd])):
        follower = Follower("spark-1", 3)
        ended = journal("done", outcome="verified", ended=BEGAN + 1, reclaimed=value, left=value)
        lines = follower.take(answer(ended))
        result = follower.result()
        assert result["reclaimed"] == ([good] if kept else []) and result["reclaimed_bytes"] == 2_000_000_000 * kept
        assert len(lines) == kept + isinstance(odd, str) * kept
        assert len(foreseen("spark-1", {"reclaimed": value, "left": []})) == kept
    assert foreseen("spark-1", odd) == []
    assert foreseen("spark-1", {"pruned": [3, NAN, -1, "x", HUGE, True]}) == ["spark-1  would prune release 3"]


def test_times_that_are_none_are_not_printed() -> None:
    follower = Follower("spark-1", 3)
    first = journal("stopping", "starting", began=1e300)
    first["steps"] = [{"phase": "stopping", "at": 1e300}, {"phase": "starting", "at": 0}]
    assert all(len(line) < 100 for line in follower.take(answer(first)))
    for value in (1e300, NAN, INFINITY, HUGE, -1, "x"):
        more = dict.fromkeys(("ended", "out_of_service_s", "stopped_at", "answering_at", "began"), value)
        ended = journal(*PHASES, error=error(), outcome="restored", **more)
        harmless(follower.take(answer(ended, now=value)))
        result = follower.result()
        assert len(result["msg"]) < 1000 and abs(result["seconds"]) <= 1e11


def test_steps_are_told_once_however_often_they_are_sent() -> None:
    follower, seen = Follower("spark-1", 3), []
    for count in (1, 3, 1, 3, 2, 3):
        seen += follower.take(answer(journal(*("stopping", "starting", "committing")[:count])))
    assert len(seen) == 3


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([HUGE, EVIL])
ANY = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
FIELDS = {*answer(journal("done")), "already"} - {"journal"}
ANSWER = st.fixed_dictionaries({}, optional=dict.fromkeys(sorted(FIELDS), ANY))
JOURNAL = st.fixed_dictionaries({}, optional=dict.fromkeys([*journal("done"), "reclaimed", "left", "troubles"], ANY))
FACTS = st.fixed_dictionaries({}, optional=dict.fromkeys(error(), ANY))


@given(
    told=ANSWER,
    inner=ANY | JOURNAL,
    facts=st.none() | ANY | FACTS,
    phases=st.lists(st.sampled_from(PHASES), min_size=1),
)
def test_nothing_that_a_spark_says_is_an_error_of_ours(told: Any, inner: Any, facts: Any, phases: list[str]) -> None:
    follower = Follower("spark-1", 3)
    whole = journal(*phases)
    if isinstance(inner, dict):
        inner = {**whole, "error": {**error(), **facts} if isinstance(facts, dict) else facts, **inner}
    for sent in (answer(whole), {**answer(whole), **told, "journal": inner}, {"journal": inner}):
        harmless(follower.take(sent))
        message = follower.result().get("msg", "")
        assert not CONTROL.search(message.replace("\n", ""))


MEASURED = {
    "vllm-new": {
        **{"service": "vllm-new", "repo": "org/m", "image": "i", "at": 5.0, "bench": "vllm bench serve"},
        **{"figures": {"kv_cache_gib": 95.1}, "planned": {"kv_cache_gib": 95.4}},
        "speed": [
            {"streams": 4, "requests": 12, "tokens_per_second": 10.0, "stream_tokens_per_second": 2.6, "ttft_ms": 500.0}
        ],
    }
}
TRIAL = ("stopping", "starting", "waiting", "verifying", "measuring", "restoring", "restore-waiting")


def test_a_trial_ends_well_where_the_release_before_serves_again() -> None:
    follower = Follower("spark-1", 3)
    lines = follower.take(answer(journal(*TRIAL, mode="trial", measured=MEASURED), LOG[:1]))
    assert [line.split("  ")[-1] for line in lines if "release" in line or "measuring" in line] == [
        "stopping release 7 (old-model)",
        "starting release 8 (new-model)",
        "measuring its speed",
        "bringing back release 7 (old-model)",
    ]
    end = {"outcome": "restored", "ended": BEGAN + 90, "out_of_service_s": 80.0, "measured": MEASURED}
    lines = follower.take(answer(journal(*TRIAL, "restore-verifying", "done", mode="trial", **end)))
    assert "spark-1  measured: KV cache 95.1 GiB (planned 95.4)" in lines
    assert "spark-1  measured: 4 streams 10.0 tok/s, first token after 500 ms, by vllm bench serve" in lines
    result = follower.result()
    assert not result.get("failed") and result["outcome"] == "restored" and result["release"]["number"] == 7
    assert result["measured"]["vllm-new"]["figures"] == {"kv_cache_gib": 95.1}


def test_what_is_logged_while_it_is_asked_for_long_is_no_start() -> None:
    follower = Follower("spark-1", 3)
    follower.take(answer(journal("stopping", "starting", "waiting"), LOG[:1]))
    assert follower.take(answer(journal("stopping", "starting", "waiting", "verifying")))[-2].endswith("ready")
    late = ["2026-11-23T10:09:00.000000000Z INFO:     172.18.0.1:34800 - GET /health HTTP/1.1 200 OK"]
    follower.pause = 60.0  # as after a minute of silence
    for watch in follower._watches.values():
        watch.pause = 60.0
    assert follower.take(answer(journal("stopping", "starting", "waiting", "verifying"), late)) == []


def test_the_speed_is_shown_as_it_is_measured() -> None:
    follower = Follower("spark-1", 3)
    follower.take(answer(journal(*TRIAL[:4], mode="trial")))
    rows = [{**MEASURED["vllm-new"]["speed"][0], "streams": streams} for streams in (1, 4, 16)]  # type: ignore[index]
    shown: list[str] = []
    for count, asking in ((0, "1 stream"), (0, "1 stream"), (1, "4 streams"), (2, "16 streams"), (3, "")):
        record = {**MEASURED["vllm-new"], "speed": rows[:count], "bench": "vllm bench serve" if count == 3 else ""}
        phases = TRIAL[:5] if asking else TRIAL[:6]
        made = journal(*phases, mode="trial", measured={"vllm-new": record}, asking=asking)
        shown += [line.split("  ", 2)[-1] for line in follower.take(answer(made))]
    speed = "10.0 tok/s, first token after 500 ms"
    assert shown == [
        *("measuring its speed", "measuring 1 stream"),
        *(f"measured: 1 stream {speed}", "measuring 4 streams"),
        *(f"measured: 4 streams {speed}", "measuring 16 streams"),
        *(f"measured: 16 streams {speed}", "bringing back release 7 (old-model)"),
    ]


def test_a_trial_that_fails_says_what_serves() -> None:
    follower = Follower("spark-1", 3)
    why = error(message="5 of 12 requests were answered", failure="trial-speed", state="running")
    end = {"outcome": "restored", "error": why, "mode": "trial", "measured": {"vllm-new": {"at": "soon"}}}
    follower.take(answer(journal(*TRIAL, "done", **end)))
    result = follower.result()
    assert result["failed"] and result["failure"] == "trial-speed" and result["measured"] == {}
    assert "release 7 (old-model) was started again and is verified" in result["msg"]


def test_a_trial_without_a_release_before() -> None:
    follower = Follower("spark-1", 3)
    made = {"from": None, "from_models": [], "mode": "trial"}
    lines = follower.take(answer(journal("starting", "waiting", "verifying", "measuring", "restoring", **made)))
    assert lines[-1].endswith("removing its container")
    follower.take(answer(journal("starting", "restoring", "done", **made, outcome="removed", ended=BEGAN + 9)))
    assert not follower.result().get("failed")


def test_what_is_logged_while_the_speed_is_measured_is_no_start() -> None:
    follower = Follower("spark-1", 3)
    follower.take(answer(journal("stopping", "starting", "waiting", mode="trial"), LOG[:1]))
    follower.take(answer(journal(*TRIAL[:4], mode="trial")))
    made = journal(*TRIAL[:5], mode="trial")
    assert [line.split("  ")[-1] for line in follower.take(answer(made))] == ["measuring its speed"]
    late = ["2026-11-23T10:09:00.000000000Z INFO 11-23 10:09:00 [loggers.py] Engine 000: Avg generation throughput: 9"]
    follower.pause = 60.0  # as after a minute of silence
    assert follower.take(answer(made, late)) == []
