"""Whether two benchmarks differ by more than noise: Student's t, and how often noise is called a difference."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkfleet import SparkfleetError
from sparkfleet.performance import comparison
from sparkfleet.performance.comparison import FASTER, NOISE, SLOWER, UNKNOWN
from sparkfleet.reporting import benchmark
from tests.unit.performance.benchmark_records import record, row


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
