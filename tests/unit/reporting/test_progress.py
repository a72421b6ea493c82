"""Phases of hosts, from the tasks that start and the lines that are printed."""

from __future__ import annotations

from typing import Any

import pytest

from sparkfleet.reporting import progress
from sparkfleet.reporting.progress import Board


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def board(clock: Clock) -> Board:
    return Board(clock=clock)


def task(action: str = "", role: str = "", file: str = "main", name: str = "Do it") -> dict[str, Any]:
    return {"task_action": action, "role": role, "task_path": f"/x/{file}.yml:3", "task": name}


SWITCH = task("release_switch", "vllm")
WAVES: dict[str, Any] = {
    "waves": [["s1"], ["s2"]],
    "labels": ["canary", "2/2"],
    "drained": ["s4"],
    "hosts": [{"name": name, "model": "m", "needed": name != "s3"} for name in ("s1", "s2", "s3")],
}


@pytest.mark.parametrize(
    ("data", "phase"),
    [
        (task("spark_plan", "sparkfleet"), "plan"),
        (task("ansible.builtin.apt", "docker"), "prepare"),
        (task("fetch_wait", "fetch"), "fetch"),
        (task("haproxy_server", file="drain"), "drain"),
        (task("haproxy_server", file="undrain"), "return"),
        (SWITCH, "start"),
        (task("vllm_verify", "endpoint"), "verify"),
        (task("ansible.builtin.pause"), "soak"),
        (task("release_stage", "vllm"), ""),
        (task("ansible.builtin.assert"), ""),
    ],
)
def test_the_phase_of_a_task(data: dict[str, Any], phase: str) -> None:
    assert progress.phase_of(data) == phase


@pytest.mark.parametrize(
    ("text", "phase"),
    [
        ("stopping release 1 (llama31-8b-fp8)", "stop"),
        ("starting release 2 (llama31-8b-fp8)", "start"),
        ("starting, vLLM 0.10.1.1", "wait"),
        ("loading weights, shard 2/4", "wait"),
        ("starting server", "wait"),
        ("asking it", "verify"),
        ("it is the current release now", "verify"),
        ("measuring its speed", "measure"),
        ("bringing back release 1 (m)", "start"),
        ("release 2 (m) failed; bringing back release 1 (m)", "restore"),
        ("anything else", ""),
    ],
)
def test_the_phase_of_a_line(text: str, phase: str) -> None:
    assert progress.phase_in_text(text) == phase


def test_a_switch_goes_through_its_phases(board: Board, clock: Clock) -> None:
    board.task("s1", SWITCH)
    for text, phase in (("0 s  stopping release 1 (m)", "stop"), ("4 s  loading weights, shard 2/4", "wait")):
        clock.now += 4
        board.line("s1", text)
        assert board.rows["s1"].phase == phase and board.rows["s1"].since == clock.now
    assert board.rows["s1"].message == "loading weights, shard 2/4"
    board.line("s1", "9 s  release 2 (m) failed; bringing back release 1 (m)")
    board.line("s1", "12 s  loading weights")
    assert board.rows["s1"].phase == "restore"  # whatever the old release goes through
    board.result("s1", "restored", "s1: release 2 does not serve\n  details")
    assert board.rows["s1"].state() == "restored" and board.rows["s1"].message == "release 2 does not serve"


def test_a_task_that_is_skipped_is_no_phase(board: Board, clock: Clock) -> None:
    board.task("s1", task("spark_plan"))
    board.result("s1", "ok", "")
    board.task("s1", task("stop_services"))
    assert board.ordered()[0].phase == "plan"
    board.skip("s1")
    clock.now += 1
    assert board.ordered()[0].phase == "plan"
    board.task("s1", SWITCH)
    clock.now += 1
    assert board.ordered()[0].phase == "start"  # one that goes on is


def test_a_rollout_from_its_schedule_to_its_end(board: Board, clock: Clock) -> None:
    log: list[dict[str, Any]] = []
    board.log = log.append
    for host in ("s1", "s2", "s3"):
        board.task(host, task("spark_plan"))
        board.result(host, "ok", "")
    board.play()
    board.schedule(WAVES)
    board.play()
    board.task("s1", SWITCH)
    clock.now += 65
    assert board.totals() == "wave 1 of 2; 4 Sparks: 1 starting, 1 waiting, 1 done, 1 drained; 1:05"
    board.line("s1", "0 s  asking it")
    board.proved("s1", "release 2 verified")
    board.task("s1", task("haproxy_server", file="undrain"))
    board.result("s1", "ok", "")
    assert board.unreached() == ["s2"]
    board.play()
    board.task("s2", SWITCH)
    board.result("s2", "changed", "")
    assert board.totals().startswith("wave 2 of 2; 4 Sparks: 1 starting, 2 done, 1 drained")
    board.end()
    assert [(row.host, row.wave, row.state(), row.message) for row in board.ordered()] == [
        ("s1", "canary", "done", "release 2 verified"),
        ("s2", "2/2", "done", "Do it"),
        ("s3", "", "done", "has it already"),
        ("s4", "", "drained", "drained"),
    ]
    assert {item["phase"] for item in log if item.get("host") == "s1"} == {"plan", "start", "verify", "return", "done"}


def test_what_waits_when_others_fail_is_not_done(board: Board) -> None:
    for host in ("s1", "s2"):
        board.task(host, task("spark_plan"))
    board.result("s1", "unreachable", "no route")
    board.play()
    board.end()
    assert [row.state() for row in board.ordered()] == ["unreachable", "waiting"]


def test_a_gateway_is_no_spark(board: Board) -> None:
    board.task("s1", task("spark_plan"))
    board.task("gateway-1", task("gateway_plan"))
    board.task("s1", task("ansible.builtin.apt", "gateway"))  # a Spark that is a gateway as well
    assert "1 Spark: " in board.totals()


def test_lines_that_are_only_of_the_moment(board: Board) -> None:
    assert board.passing("s1", "12 s  loading weights")
    assert board.passing("s1", "image 43% (1.2 of 2.8 GB, 161 MB/s)  model done (6 s)")
    assert board.passing("s1", "image extracting 0.04 of 0.08 GB")
    assert not board.passing("s1", "image was fetched from the internet instead: no route")
    assert not board.passing("", "12 s  loading weights")
    # What a Spark is planned to do is shown once, not again in its wave.
    board.task("s1", task("spark_plan"))
    board.line("s1", "m (throughput) on NVIDIA GB10")
    assert not board.passing("s1", "m (throughput) on NVIDIA GB10")
    board.schedule(WAVES)
    assert board.passing("s1", "m (throughput) on NVIDIA GB10")


def test_spark_10_comes_after_spark_9(board: Board) -> None:
    for number in (10, 9, 1):
        board.row(f"spark-{number}")
    assert [row.host for row in board.ordered()] == ["spark-1", "spark-9", "spark-10"]


def test_minutes() -> None:
    assert [progress.minutes(value) for value in (7.9, 725, 3723)] == ["0:07", "12:05", "1:02:03"]
