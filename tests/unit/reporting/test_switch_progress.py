"""Following a switch from the controller: what is printed, and what a failure says."""

from __future__ import annotations

from typing import Any

import pytest

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
        **{"id": "abc", "to": 8, "model": "new-model", "from": 7, "from_model": "old-model", "mode": "deploy"},
        **{"controller": "alice@laptop", "verb": "site.yml", "began": BEGAN, "ended": None, "outcome": None},
        **{"steps": [{"phase": phase, "at": BEGAN + 10 * place} for place, phase in enumerate(phases)]},
        **{"phase": phases[-1], "container": "vllm-new", "error": None, "restore_error": None},
        **{"out_of_service_s": None, "verification": None, "stopped_at": None, "answering_at": None},
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
    assert follower.asks() == {"id": "", "recover": True, "container": "", "cursor": ""}
    assert follower.take(answer(journal("stopping"))) == ["spark-1  0 s  stopping release 7 (old-model)"]
    assert follower.asks()["id"] == "abc"
    lines = follower.take(answer(journal("stopping", "starting", "waiting"), LOG[:1]))
    assert lines[0] == "spark-1  10 s  starting release 8 (new-model)"
    assert lines[1:] == ["spark-1  4 s  starting, vLLM 0.10.1.1"]
    asked = follower.asks()
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
    assert result["release"] == {"number": 8, "model": "new-model"}
    assert result["previous"] == {"number": 7, "model": "old-model"}
    assert (result["outcome"], result["seconds"], result["changed"]) == ("verified", 50.0, True)
    assert "failed" not in result


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
    assert result["release"] == {"number": 7, "model": "old-model"}


def test_a_first_deployment_that_failed() -> None:
    result = finish(outcome="removed", **{"from": None, "from_model": None})
    assert "There was no release before it: its container was removed, and nothing serves." in result["msg"]
    assert result["release"] is None and result["previous"] is None


def test_neither_serves() -> None:
    again = error(message="vllm-old ended", container="vllm-old", exit_code=137, log=[])
    result = finish(outcome="failed", restore_error=again)
    assert "release 7 (old-model) could not be brought back either, nothing verified serves: vllm-old" in result["msg"]
    assert result["release"] is None


def test_a_restart_that_failed() -> None:
    result = finish(outcome="failed", **{"from": 8, "from_model": "new-model", "mode": "restart"})
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
    assert follower.asks()["recover"] is False and not follower.done


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
