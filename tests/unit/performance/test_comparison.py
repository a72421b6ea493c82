"""Whether two benchmarks differ by more than noise: Student's t, and how often noise is called a difference."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sparkfleet_host import benchmarks

from sparkfleet import SparkfleetError
from sparkfleet.performance import comparison
from sparkfleet.performance.comparison import FASTER, NOISE, SLOWER, UNKNOWN
from sparkfleet.reporting import benchmark
from tests.unit.performance.benchmark_records import record, row

#: What a record may have.
FIGURE = st.floats(benchmarks.LEAST, 1e12)


def side(speeds: list[float], streams: int = 1, first: float = 200.0) -> list[dict[str, Any]]:
    return [
        row(streams=streams, repetition=number, tokens_per_second=speed, stream_tokens_per_second=speed, ttft_ms=first)
        for number, speed in enumerate(speeds, 1)
    ]


@pytest.mark.parametrize(
    ("freedom", "t"),  # two-sided 5%, of a printed table
    [(1, 12.7062), (2, 4.3027), (4, 2.7764), (10, 2.2281), (30, 2.0423), (1e7, 1.95996)],
)
def test_student_s_t(freedom: float, t: float) -> None:
    assert comparison.t_tail(t, freedom) == pytest.approx(0.025, rel=1e-4)
    assert comparison.t_quantile(0.975, freedom) == pytest.approx(t, rel=1e-4)


@given(st.floats(0, 50), st.floats(1, 200))
def test_its_tail_is_a_chance(t: float, freedom: float) -> None:
    chance = comparison.t_tail(t, freedom)
    assert 0 <= chance <= 0.5 and comparison.t_tail(t + 1, freedom) <= chance + 1e-12


def verdicts(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> dict[str, str]:
    made = comparison.compare(record(first), record(second))
    return {item.figure: item.verdict for item in made.differences}


def test_a_difference_larger_than_noise() -> None:
    slow, fast = [10.0, 10.1, 9.9], [11.0, 11.1, 10.9]
    found = verdicts(side(slow), side(fast))
    assert found == {"tokens a second": FASTER, "tokens a second of a stream": FASTER, "first token": NOISE}
    found = verdicts(side(fast), side(slow, first=100.0))
    assert found == {"tokens a second": SLOWER, "tokens a second of a stream": SLOWER, "first token": FASTER}
    assert set(verdicts(side(slow), side([10.05, 9.95, 10.1])).values()) == {NOISE}
    # As large a difference in more noise is none.
    assert set(verdicts(side([9.0, 11.0, 10.0]), side([10.0, 12.0, 11.0])).values()) == {NOISE}


def test_one_repetition_says_nothing() -> None:
    assert set(verdicts(side([10.0]), side([20.0, 20.1, 20.0])).values()) == {UNKNOWN}
    made = comparison.compare(record(side([10.0])), record(side([20.0])))
    assert not made.slower and "Nothing can be said" in benchmark.compared(made)
    assert "not judged: chat x 1: it takes two repetitions" in benchmark.compared(made)
    assert made.as_dict()["differences"][0]["why"].startswith("it takes two repetitions")


def test_a_load_with_requests_of_others_is_not_judged() -> None:
    rows = [*side([10.0, 10.1, 10.2]), *side([30.0, 30.1, 30.2], streams=4)]
    slow = [*side([5.0, 5.1, 5.2]), *side([30.0, 30.1, 30.3], streams=4)]
    slow[1]["disturbed"] = True
    made = comparison.compare(record(rows), record(slow, complete=False))
    assert not made.slower and {item.verdict for item in made.differences if item.streams == 1} == {UNKNOWN}
    assert {item.verdict for item in made.differences if item.streams == 4} == {NOISE}
    text = benchmark.compared(made)
    assert text.count("not judged: chat x 1: others used the engine in B") == 1
    assert "No difference of the others is larger than noise." in text
    both = comparison.compare(record([row(disturbed=True)]), record([row(disturbed=True)]))
    assert {item.why for item in both.differences} == {"others used the engine in A and B"}
    # What is known of each record is said with it.
    first, _, second = text.partition("\nB  ")
    assert "up to 61 °C" in first and "others used the engine" not in first and "it was cut" not in first
    assert "others used the engine meanwhile" in second and "it was cut: not all loads were measured" in second
    slowed = record([{**one, "throttled": ["sw-power-cap"]} for one in rows])
    assert "the GPU was slowed down: sw-power-cap" in benchmark.compared(comparison.compare(slowed, record(rows)))


@given(st.lists(FIGURE, min_size=2, max_size=4), st.lists(FIGURE, min_size=2, max_size=4))
def test_any_figures_of_records_can_be_compared(first: list[float], second: list[float]) -> None:
    made = comparison.compare(record(side(first)), record(side(second)))
    json.dumps(made.as_dict(), allow_nan=False)
    assert benchmark.compared(made)


def test_noise_is_rarely_called_a_difference() -> None:
    """Of 150 pairs of equal engines with four loads and three repetitions, each with noise of its own."""
    dice = random.Random(4711)  # noqa: S311
    wrong = 0
    for _ in range(150):
        sides = [
            [
                one
                for streams in (1, 4, 16, 32)
                for one in side([100.0 * dice.lognormvariate(0, 0.03) for _ in range(3)], streams)
            ]
            for _ in range(2)
        ]
        made = comparison.compare(*map(record, sides))
        wrong += any(item.verdict in (SLOWER, FASTER) for item in made.differences)
    assert wrong / 150 <= 0.09  # 0.05 is promised; the binomial's 99% bound


@pytest.mark.parametrize("repetitions", [(3, 3), (2, 5), (3, 10), (2, 10)])
def test_so_it_is_however_often_each_was_measured(repetitions: tuple[int, int]) -> None:
    """Of 400 pairs of equal engines, with noise of its own in each of twelve figures."""
    dice = random.Random(11)  # noqa: S311
    wrong = 0
    for _ in range(400):
        first, second = (
            record(
                [
                    row(
                        streams=streams,
                        repetition=number,
                        **{key: 100 * dice.lognormvariate(0, 0.03) for key, *_ in comparison.FIGURES},
                    )
                    for number in range(1, count + 1)
                    for streams in (1, 4, 16, 32)
                ]
            )
            for count in repetitions
        )
        made = comparison.compare(first, second)
        assert len(made.differences) == 12
        wrong += any(item.verdict in (SLOWER, FASTER) for item in made.differences)
    assert wrong / 400 <= 0.075  # as above


def test_a_loss_of_a_tenth_is_usually_seen() -> None:
    dice = random.Random(4711)  # noqa: S311
    seen = sum(
        comparison.compare(
            record(side([100 * dice.lognormvariate(0, 0.01) for _ in range(3)])),
            record(side([90 * dice.lognormvariate(0, 0.01) for _ in range(3)])),
        ).slower
        for _ in range(100)
    )
    assert seen / 100 > 0.9


def test_what_cannot_be_compared_is_said() -> None:
    first = record([*side([10.0, 10.1]), *side([30.0, 30.1], streams=4)])
    second = record(side([10.0, 10.1]), vllm="0.26.0", host="spark-2")
    made = comparison.compare(first, second)
    assert made.left_out == ("chat x 4",) and made.differs == {
        "host": ("spark-1", "spark-2"),
        "vllm": ("0.25.1", "0.26.0"),
    }
    text = benchmark.compared(made)
    assert "vllm: 0.25.1 in A, 0.26.0 in B" in text and "only one of them has it: chat x 4" in text
    assert "No difference is larger than noise." in text
    with pytest.raises(SparkfleetError, match="no load in common: the first has chat x 1, the second chat x 4"):
        comparison.compare(record(side([1.0])), record(side([1.0], streams=4)))
    with pytest.raises(SparkfleetError, match="no load in common"):
        comparison.compare(record(side([1.0])), record([row(input=1)]))
