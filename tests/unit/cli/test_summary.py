"""What a run ends with."""

from __future__ import annotations

import re

from sparkfleet.cli import summary
from sparkfleet.reporting.host_result import HostResult
from sparkfleet.reporting.progress import Board

RELEASE = {"number": 3, "model": "llama31-8b-fp8"}
BAD = HostResult("spark-2", "restored", "spark-2: release 3 does not serve", "memory-refused", seconds=20)


def rolled_out(*bad: HostResult) -> tuple[list[HostResult], Board]:
    """A rollout of four waves that ended in the second, and the Sparks that it left out."""
    board = Board(clock=lambda: 0.0)
    board.waves, board.wave = [["spark-1"], ["spark-2"], ["spark-3", "spark-4"]], 2
    board.skipped = {"spark-5": "has it already", "spark-6": "drained"}
    for name, label in (("spark-1", "canary"), ("spark-2", "2/3"), ("spark-3", "3/3"), ("spark-4", "3/3")):
        board.row(name).wave = label
    good = HostResult("spark-1", "changed", release=RELEASE, out_of_service_s=41.4, seconds=60)
    rest = [HostResult("spark-3", "untouched"), HostResult("spark-4", "untouched"), HostResult("spark-5")]
    return [good, *bad, *rest], board


def test_the_table_at_the_end() -> None:
    good = HostResult("spark-1", "changed", release=RELEASE, out_of_service_s=41.4, seconds=60)
    text = summary.page([good, BAD], Board())
    assert re.search(r"spark-1 +changed +3 \(llama31-8b-fp8\) +60 +41 s", text)
    assert "restored [memory-refused]" in text and text.endswith("\nspark-2: release 3 does not serve\n")


def test_the_table_of_a_rollout_has_waves() -> None:
    text = summary.page(*rolled_out(BAD))
    assert re.search(r"spark-1 +canary +changed", text) and re.search(r"spark-2 +2/3 +restored", text)
    assert re.search(r"spark-3 +3/3 +untouched", text) and re.search(r"spark-5 +- +has it already", text)


def test_what_became_of_a_rollout() -> None:
    found = summary.of_rollout(*rolled_out(BAD))
    assert found == {
        "waves": [["spark-1"], ["spark-2"], ["spark-3", "spark-4"]],
        "reached": 2,
        "rolled_out": ["spark-1"],
        "skipped": {"spark-5": "has it already", "spark-6": "drained"},
        "rolled_back": {"spark-2": "memory-refused"},
        "failed": {},
        "untouched": ["spark-3", "spark-4"],
        "seconds": 0.0,
    }
    assert summary.words(found, "log.jsonl").splitlines() == [
        "rolled out    1 of 4 Sparks, 2 of 3 waves",
        "rolled back   spark-2 (memory-refused)",
        "untouched     spark-3, spark-4",
        "skipped       spark-5: has it already",
        "skipped       spark-6: drained",
        "took          0 s",
        "events        log.jsonl",
    ]


def test_a_spark_that_does_not_serve_is_not_one_that_was_rolled_back() -> None:
    found = summary.of_rollout(*rolled_out(HostResult("spark-2", "failed", "it is down", "engine-died")))
    assert found["failed"] == {"spark-2": "engine-died"} and not found["rolled_back"]


def test_a_rollout_without_a_wave() -> None:
    nothing = summary.of_rollout([HostResult("spark-1")], Board())
    assert "nothing: there was nothing to do" in summary.words(nothing, "")
    lost = summary.of_rollout([HostResult("spark-1", "unreachable", "no", "unreachable")], Board())
    assert "nothing: it ended before the first wave" in summary.words(lost, "") and lost["failed"]
