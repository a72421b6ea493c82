"""Whether two benchmarks differ by more than noise.

What is compared is the mean of a figure over the repetitions of a load, as a ratio: Student's t-test of the logarithms,
with the noise of both sides together. (Of two or three repetitions the noise of a side alone is hardly known: Welch's
test, which lets each side have its own, calls noise a difference two to six times as often as it promises where the
other side has ten.) Requests within a repetition are not independent of each other (they share the
batch, the temperature, the moment), so they count as one. Of all loads and figures together the chance to call noise a
difference is ALPHA (Holm's method). With one repetition on a side nothing can be said, and nothing is; nor of a load
in which others used the engine, whose figures are not its own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sparkfleet import SparkfleetError
from sparkfleet.performance import records
from sparkfleet.performance.records import Record

ALPHA = 0.05
#: Figures that are compared: key of a row, its name, whether more of it is better.
FIGURES = (
    ("tokens_per_second", "tokens a second", True),
    ("stream_tokens_per_second", "tokens a second of a stream", True),
    ("ttft_ms", "first token", False),
)
#: The figures are rounded to about this: repetitions that are all equal are not free of noise.
ROUNDING = 1e-3
#: Logarithm of a ratio beyond which it is no other.
FARTHEST = 50.0
FASTER, SLOWER, NOISE, UNKNOWN = "faster", "slower", "noise", "unknown"


@dataclasses.dataclass(frozen=True)
class Difference:
    """One figure of one load, B against A: `change` is B/A - 1, `low` and `high` its 95% interval (of this figure
    alone), `p` the chance of noise to differ by as much; None where it is not judged. `verdict`: FASTER, SLOWER, NOISE
    or UNKNOWN, and `why` that, "" otherwise."""

    shape: str
    streams: int
    figure: str
    first: float
    second: float
    change: float
    repetitions: tuple[int, int]
    low: float | None = None
    high: float | None = None
    p: float | None = None
    verdict: str = UNKNOWN
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """`differs`: what the two records differ in besides the figures, {name: (A's, B's)}; `left_out`: loads that one of
    them has not."""

    first: Record
    second: Record
    differences: tuple[Difference, ...]
    differs: dict[str, tuple[Any, Any]]
    left_out: tuple[str, ...]

    @property
    def slower(self) -> bool:
        """Whether B is slower in any figure by more than noise."""
        return any(item.verdict == SLOWER for item in self.differences)

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "first": records.names([self.first])[0],
            "second": records.names([self.second])[0],
            "slower": self.slower,
            "differs": {name: list(pair) for name, pair in self.differs.items()},
            "left_out": list(self.left_out),
            "differences": [dataclasses.asdict(item) for item in self.differences],
        }


def compare(first: Record, second: Record) -> Comparison:
    """B against A. Raises SparkfleetError where they have no load in common."""
    ours, theirs = records.points(first), records.points(second)
    common = [
        place
        for place, rows in ours.items()
        if place in theirs and all(rows[0][key] == theirs[place][0][key] for key in ("input", "output"))
    ]
    if not common:
        have = ["; ".join(_word(place) for place in side) or "nothing" for side in (ours, theirs)]
        raise SparkfleetError(f"these benchmarks have no load in common: the first has {have[0]}, the second {have[1]}")
    found = []
    for place in common:
        disturbed = [name for name, rows in (("A", ours[place]), ("B", theirs[place])) if _disturbed(rows)]
        why = f"others used the engine in {' and '.join(disturbed)}" if disturbed else ""
        for key, name, more in FIGURES:
            before, after = (_values(rows, key) for rows in (ours[place], theirs[place]))
            if before and after:
                found.append((_difference(place, name, before, after, why), more))
    return Comparison(
        first,
        second,
        tuple(_judged(found)),
        {key: (first[key], second[key]) for key in _ABOUT if first[key] != second[key]},
        tuple(_word(place) for place in dict.fromkeys([*ours, *theirs]) if place not in common),
    )


_ABOUT = ("host", "gpu", "driver", "model", "profile", "revision", "image", "vllm", "settings", "release", "tool")


def _word(place: tuple[str, int]) -> str:
    return f"{place[0]} x {place[1]}"


def _values(rows: Sequence[Any], key: str) -> list[float]:
    return [float(row[key]) for row in rows if row.get(key)]


def _disturbed(rows: Sequence[Mapping[str, Any]]) -> bool:
    return any(row["disturbed"] for row in rows)


def _difference(
    place: tuple[str, int], name: str, first: Sequence[float], second: Sequence[float], why: str
) -> Difference:
    """`why`: it is not to be judged, "" for nothing."""
    ours, theirs = statistics.mean(first), statistics.mean(second)
    made = Difference(*place, name, ours, theirs, theirs / ours - 1, (len(first), len(second)), why=why)
    if min(made.repetitions) < 2:
        made = dataclasses.replace(made, why=why or "it takes two repetitions of both or more to know the noise")
    if made.why:
        return made
    change, low, high, p = ratio(first, second)
    return dataclasses.replace(made, change=change, low=low, high=high, p=p)


def ratio(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float, float]:
    """How much larger the second is than the first, as a share, its 95% interval, and the chance of noise to differ by
    as much; of two values a side or more, each above zero."""
    logs = [[math.log(value) for value in side] for side in (first, second)]
    shift = statistics.mean(logs[1]) - statistics.mean(logs[0])
    freedom = sum(len(side) - 1 for side in logs)
    squares = sum((len(side) - 1) * statistics.variance(side) for side in logs)
    error = math.sqrt(max(squares / freedom, ROUNDING**2) * sum(1 / len(side) for side in logs))
    width = t_quantile(1 - ALPHA / 2, freedom) * error
    change, low, high = (math.expm1(min(value, FARTHEST)) for value in (shift, shift - width, shift + width))
    return change, low, high, 2 * t_tail(abs(shift) / error, freedom)


def _judged(found: Sequence[tuple[Difference, bool]]) -> list[Difference]:
    """The differences with their verdicts: Holm's step-down method over those that can be judged."""
    chances = {index: item.p for index, (item, _) in enumerate(found) if item.p is not None}
    order = sorted(chances, key=chances.__getitem__)
    verdicts = dict.fromkeys(order, NOISE)
    for step, index in enumerate(order):
        item, more = found[index]
        if chances[index] > ALPHA / (len(order) - step):
            break
        verdicts[index] = FASTER if (item.change > 0) == more else SLOWER
    return [dataclasses.replace(item, verdict=verdicts.get(index, UNKNOWN)) for index, (item, _) in enumerate(found)]


# -- Student's t -----------------------------------------------------------------------------------------------------


def t_tail(t: float, freedom: float) -> float:
    """The chance that Student's t of so many degrees of freedom is larger than `t` >= 0."""
    return 0.5 * _beta(freedom / (freedom + t * t), freedom / 2, 0.5)


@functools.cache
def t_quantile(share: float, freedom: float) -> float:
    """The t that is not exceeded with the chance `share` > 0.5."""
    low, high = 0.0, 1.0
    while t_tail(high, freedom) > 1 - share and high < 1e9:
        high *= 2
    for _ in range(45):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, freedom) > 1 - share else (low, middle)
    return high


def _beta(x: float, a: float, b: float) -> float:
    """The regularized incomplete beta function, by its continued fraction (Lentz's method)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # where it converges fast
        return 1 - _beta(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    tiny = 1e-300
    c, d = 1.0, 0.0
    value = 1.0
    for step in range(300):
        m = step // 2
        if step == 0:
            term = 1.0
        elif step % 2 == 0:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1 / ((1 + term * d) or tiny)
        c = (1 + term / c) or tiny
        value *= c * d
        if abs(1 - c * d) < 1e-14:
            break
    return front * (value - 1)
