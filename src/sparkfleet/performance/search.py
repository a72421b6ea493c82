"""The search of `tune`: which settings to measure next, of what was measured so far. Pure.

A run on a Spark costs minutes, so the budget is a dozen or two, while a grid of five settings with five values has
3,125. The values of most settings are ordered, and their effect has one peak or none. So the search climbs: from the
default it changes one setting by one step, keeps a change that is better by more than noise, goes on in the same
direction, and ends when no single change is better (docs/decisions/0015).

The order of its questions follows from the answers alone: told the same answers, it asks the same, which is how an
interrupted search is resumed.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Generator, Mapping, Sequence
from typing import Any

THROUGHPUT, LATENCY = OBJECTIVES = ("throughput", "latency")
#: A change is better if it is by this share at least; less is not worth an own profile.
LEAST = 0.02
#: Passes through all settings; each begins where the last has ended.
PASSES = 3
#: Share by which a loader must shorten the start.
LOADER = 0.05
Settings = dict[str, Any]
Key = tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Dimension:
    """A setting and its values; `start` is the place of the default. `ordered`: between two values that are no better
    there is none that is. `of_start`: it is judged by the time of a start."""

    name: str
    values: tuple[Any, ...]
    start: int
    ordered: bool = True
    of_start: bool = False


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run showed. `value`: tokens a second, or answers a second of one stream (1000 / ms); `noise`: its relative
    standard error, 0.0 for unknown; `ttft_ms`: p95, None for unknown; `failed`: why there are no figures, "" for none.
    """

    value: float = 0.0
    noise: float = 0.0
    ttft_ms: float | None = None
    ready_s: float | None = None
    failed: str = ""

    def allowed(self, limit_ms: float | None) -> bool:
        """Whether its first token comes in time."""
        return not self.failed and (limit_ms is None or (self.ttft_ms is not None and self.ttft_ms <= limit_ms))


def of_rows(rows: Sequence[Mapping[str, Any]], objective: str, ready_s: float | None = None) -> Result:
    """The result of a run's rows, which are repetitions of one load."""
    if objective == LATENCY:
        values = [1000 / row["request_p50_ms"] for row in rows if row.get("request_p50_ms")]
    else:
        values = [float(row["tokens_per_second"]) for row in rows if row.get("tokens_per_second")]
    if not values:
        return Result(failed="no figures")
    middle = statistics.mean(values)
    error = statistics.stdev(values) / len(values) ** 0.5 / middle if len(values) > 1 else 0.0
    firsts = [float(row["ttft_p95_ms"]) for row in rows if row.get("ttft_p95_ms") is not None]
    return Result(middle, error, statistics.mean(firsts) if firsts else None, ready_s)


def better(new: Result, old: Result, limit_ms: float | None) -> bool:
    """Whether one result is better than another by more than noise. What keeps the limit of the first token is better
    than what does not; of two that do not, the one that is nearer to it."""
    if new.failed or old.failed:
        return bool(old.failed and not new.failed)
    if new.allowed(limit_ms) != old.allowed(limit_ms):
        return new.allowed(limit_ms)
    margin = max(LEAST, 2 * math.hypot(new.noise, old.noise))
    if not new.allowed(limit_ms):
        return bool(new.ttft_ms is not None and old.ttft_ms is not None and new.ttft_ms < old.ttft_ms * (1 - margin))
    return new.value > old.value * (1 + margin)


def starts_faster(new: Result, old: Result, limit_ms: float | None) -> bool:
    """Whether an engine starts faster and is not slower."""
    if new.failed or not new.ready_s or not old.ready_s:
        return False
    return new.ready_s < old.ready_s * (1 - LOADER) and not better(old, new, limit_ms)


def key(settings: Mapping[str, Any]) -> Key:
    """What distinguishes settings from each other."""
    return tuple(sorted((name, repr(value)) for name, value in settings.items()))


class Climb:
    """The search. `steps` yields settings to measure and is sent the result of each; the default comes first, and none
    comes twice. `best` is the best so far, and what the search has found once it is over."""

    def __init__(self, space: Sequence[Dimension], limit_ms: float | None) -> None:
        self.space, self.limit_ms = space, limit_ms
        self._places = {dimension.name: dimension.start for dimension in space}
        self._known: dict[Key, Result] = {}

    @property
    def best(self) -> Settings:
        """The settings where it is."""
        return self._settings(self._places)

    @property
    def result(self) -> Result | None:
        """What the best showed; None before the default was measured."""
        return self._known.get(key(self.best))

    def steps(self) -> Generator[Settings, Result, None]:
        """See the class."""
        best = yield from self._measured(self._places)
        for _ in range(PASSES):
            before = dict(self._places)
            for dimension in self.space:
                for way in self._ways(dimension):
                    moved = False
                    for place in way:
                        there = {**self._places, dimension.name: place}
                        found = yield from self._measured(there)
                        judge = starts_faster if dimension.of_start else better
                        if judge(found, best, self.limit_ms):
                            self._places, best, moved = there, found, True
                        elif dimension.ordered:
                            break
                    if moved:
                        break
            if self._places == before:
                return

    def _ways(self, dimension: Dimension) -> list[range]:
        """The places to try one after the other, until one is no better: upwards, or else downwards. Of values without
        an order all are tried."""
        here, end = self._places[dimension.name], len(dimension.values)
        if not dimension.ordered:
            return [range(here), range(here + 1, end)] if here else [range(1, end)]
        return [range(here + 1, end), range(here - 1, -1, -1)]

    def _settings(self, at: Mapping[str, int]) -> Settings:
        return {dimension.name: dimension.values[at[dimension.name]] for dimension in self.space}

    def _measured(self, at: Mapping[str, int]) -> Generator[Settings, Result, Result]:
        made = self._settings(at)
        if key(made) not in self._known:
            self._known[key(made)] = yield made
        return self._known[key(made)]


def around(default: int, factors: Sequence[float], least: int, most: int) -> tuple[tuple[int, ...], int]:
    """Whole values about a default, in their order, and its place."""
    values = sorted({default, *(min(max(round(default * factor), least), most) for factor in factors)})
    return tuple(values), values.index(default)
