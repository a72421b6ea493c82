# SPDX-License-Identifier: Apache-2.0
"""Which engine that starts on demand is started, and which of them stops to make room. Decides from what the guard and
the doors observe, and a clock; does nothing itself.

A request starts its engine. Where memory does not suffice, those that were used least recently make room: requests that
come for them wait from then on, what they are computing ends first, and only then they are stopped. One that has become
ready keeps its place for `min_seconds`, and there are at most `per_hour` starts, so that two engines that are wanted in
turn do not do nothing but load.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from .ages import Moment, age, stamp
from .bounded import as_dict, as_int, as_list, as_str, as_time
from .door import State

HOUR = 3600.0
START_SECONDS = 60.0  # that a start takes, before one was seen
SOON = 10.0  # Retry-After where it is only the work of others that is waited for
KEPT_STARTS = 1000
MOST_PER_HOUR = 1000
#: States of an engine that stands ready to be started, and of one whose place another may take.
ASLEEP = "asleep"
_SETTLED = ("serving", "wedged")


@dataclasses.dataclass(frozen=True)
class Seat:
    """An engine: its state as the guard names it; whether its container runs; whether it computes something; seconds
    since it was used, since it became ready, and since a request for it waits (None for never or none); the GiB that it
    takes (None for not known)."""

    service: str
    state: str
    runs: bool = False
    busy: bool = False
    unused: float | None = None
    ready: float | None = None
    wanted: float | None = None
    needs: float | None = None


@dataclasses.dataclass(frozen=True)
class Decision:
    """The state of each door, the engines to stop, and the one to start ("" for none)."""

    doors: Mapping[str, State]
    stop: tuple[str, ...] = ()
    start: str = ""


class OnDemand:
    """Decides for all engines of a host that start on demand."""

    def __init__(self, min_seconds: float, per_hour: int, data: Mapping[str, Any] | None = None) -> None:
        """`data`: what survives a restart, see `data`. Raises BoundsError for what is not of its form."""
        self.min_seconds, self.per_hour = min_seconds, per_hour
        given = as_dict({} if data is None else data, "on_demand")
        self.starts = [_start(item) for item in as_list(given.get("starts") or [], "starts", KEPT_STARTS)]
        took = as_dict(given.get("took") or {}, "took")
        self.took = {as_str(name, "took", 200): as_time(took[name], "took") for name in [*took][:100]}
        totals = as_dict(given.get("totals") or {}, "totals")
        self.totals = {as_str(name, "totals", 200): as_int(totals[name], "totals") for name in [*totals][:100]}
        self._for = ""  # for which engine others make room
        self._making_room: frozenset[str] = frozenset()

    def data(self) -> dict[str, Any]:
        """What is kept: {starts: [{service, at, clock, boot_id}], took: {service: seconds}, totals: {service: int}}."""
        return {"starts": self.starts, "took": self.took, "totals": self.totals}

    def note_start(self, service: str, moment: Moment) -> None:
        """It is being started."""
        recent = [item for item in self.starts if (past := age(item, moment)) is not None and past < HOUR]
        self.starts = [*recent[1 - KEPT_STARTS :], {"service": service, **stamp(moment)}]
        self.totals[service] = self.totals.get(service, 0) + 1

    def note_ready(self, service: str, seconds: float) -> None:
        """It took so long to start."""
        self.took[service] = round(seconds, 1)

    def start_seconds(self, service: str) -> float:
        """How long its start is expected to take."""
        return self.took.get(service, START_SECONDS)

    def decide(self, seats: Sequence[Seat], room: float | None, moment: Moment, loading: bool = False) -> Decision:
        """What to do now. `room`: GiB that those that run may take together, None for not known: then one of them runs
        at a time. `loading`: an engine of the host is starting, and measures memory."""
        doors = {seat.service: self._door(seat, moment) for seat in seats}
        wanted = [seat for seat in seats if seat.state == ASLEEP and seat.wanted is not None]
        wanted.sort(key=lambda seat: -(seat.wanted or 0.0))
        if not wanted:
            self._for, self._making_room = "", frozenset()
            return Decision(doors)
        first = wanted[0]
        for seat in wanted[1:]:
            doors[seat.service] = State(why="waits for another to be started", retry_after=2 * START_SECONDS)
        paused = self._until_allowed(moment)
        if paused > 0:
            why = f"is not started: there were {self.per_hour} starts in an hour already"
            doors[first.service] = State(why=why, retry_after=paused)
            self._for, self._making_room = "", frozenset()
            return Decision(doors)
        leaving, pause = self._leaving(first, seats, room)
        if pause > 0:
            why = "waits for the place of another, which has been ready for a short time"
            doors[first.service] = State(why=why, retry_after=pause + self.start_seconds(first.service))
            return Decision(doors)
        for seat in leaving:
            doors[seat.service] = State(why="makes room for another", retry_after=2 * START_SECONDS)
        if leaving:
            doors[first.service] = State(why="waits for another to finish", retry_after=SOON)
            return Decision(doors, stop=tuple(seat.service for seat in leaving if not seat.busy))
        return Decision(doors, start="" if loading else first.service)

    def _door(self, seat: Seat, moment: Moment) -> State:
        """Of an engine that nothing is decided about."""
        expected = self.start_seconds(seat.service)
        if seat.state == "serving":
            return State(open=True)
        if seat.state == ASLEEP:
            return State(why="is about to be started", retry_after=expected)
        if seat.state in ("given-up", "stopped", "missing"):
            words = {"given-up": "failed to start too often", "stopped": "was stopped", "missing": "is not deployed"}
            return State(why=words[seat.state], retry_after=None)
        if seat.state == "switching":
            return State(why="is being deployed", retry_after=2 * START_SECONDS)
        began = [past for item in self.starts if item["service"] == seat.service and (past := age(item, moment))]
        return State(why="is starting", retry_after=max(expected - min(began, default=0.0), SOON))

    def _until_allowed(self, moment: Moment) -> float:
        """Seconds until another start is allowed."""
        ages = sorted(past for item in self.starts if (past := age(item, moment)) is not None and past < HOUR)
        return HOUR - ages[self.per_hour - 1] if len(ages) >= self.per_hour else 0.0

    def _leaving(self, first: Seat, seats: Sequence[Seat], room: float | None) -> tuple[list[Seat], float]:
        """Those that make room for one, and seconds until there can be enough of them. Who has been chosen stays so:
        what it finishes meanwhile would make it the one used last."""
        running = [seat for seat in seats if seat.runs and seat.service != first.service]
        if self._for == first.service:
            chosen = [seat for seat in running if seat.service in self._making_room]
            if _fits(first, [seat for seat in running if seat not in chosen], room):
                return chosen, 0.0
        by_use = sorted(running, key=lambda seat: -(seat.unused if seat.unused is not None else float("inf")))
        leaving: list[Seat] = []
        pauses: list[float] = []
        for seat in by_use:
            if _fits(first, [other for other in running if other not in leaving], room):
                break
            pause = self.min_seconds - (seat.ready or 0.0) if seat.state in _SETTLED else SOON
            if pause > 0:
                pauses.append(pause)
            else:
                leaving.append(seat)
        if not _fits(first, [other for other in running if other not in leaving], room):
            return [], min(pauses, default=SOON)
        self._for, self._making_room = first.service, frozenset(seat.service for seat in leaving)
        return leaving, 0.0


def _fits(first: Seat, beside: Sequence[Seat], room: float | None) -> bool:
    """Whether an engine has room beside others. Alone it was verified when it was deployed."""
    if not beside:
        return True
    needs = [seat.needs for seat in (first, *beside)]
    return room is not None and None not in needs and sum(value or 0.0 for value in needs) <= room


def _start(value: Any) -> dict[str, Any]:
    item = as_dict(value, "starts")
    read: dict[str, Any] = {"service": as_str(item.get("service"), "starts.service", 200)}
    for name, check in (("at", as_time), ("clock", as_time), ("boot_id", as_str)):
        read[name] = check(item.get(name), f"starts.{name}")
    return read
