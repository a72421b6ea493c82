# SPDX-License-Identifier: Apache-2.0
"""The guard of a host: sees an engine that has crashed or hangs, restarts it, and knows when to stop.

Health codes mislead (vLLM's /health stays 200 with a wedged engine), so what counts is progress: counters of
tokens that move, or a one-token canary that is answered. `Guard` decides for one engine, from observations and a clock
alone; `Watcher` observes and acts, for each engine of the current release; `main` is the service, which no single
observation can end.

Ages are compared on the clock since boot, which no time server moves. Unix time is for people, and for what happened
before this boot; a stamp from the future means nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import ipaddress
import json
import math
import os
import re
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from . import asking, bounded, engine, measured, memory, pooling, switch
from . import group as ranks
from . import key as engine_key
from .ages import Instant
from .ages import age as _age
from .ages import stamp as _stamp
from .bounded import BoundsError, as_dict, as_int, as_list, as_number, as_str, as_time, printable
from .docker import SOCKET, Docker, DockerError, DockerUnavailable
from .door import HOLD, POLL, WAYS, Door, Doors, State
from .engine import EngineError
from .group import Group, Record
from .http import HttpError, engine_client
from .metrics import LIMIT as METRICS_LIMIT
from .metrics import sums
from .on_demand import ASLEEP, MOST_PER_HOUR, Decision, OnDemand, Seat
from .redaction import redact
from .release_format import DONE, MOST_ENGINES, SERVICE, Engine
from .releases import HELD_BY_GUARD, LOCK_FILE, PROJECT_DIR, STATE_DIR, ReleaseError, Store, write_json, write_text
from .status_server import StatusServer

SETTINGS_FILE = "/etc/sparkfleet/guard.json"
STATE_FILE = "guard-state.json"
METRICS_FILE = "metrics/sparkfleet.prom"
DOCKER_PID = "/run/docker.pid"
STOP_SECONDS = 10  # until an engine that crashed or hangs is killed
RANK_SECONDS = 10.0  # that a rank of a group may be gone before all are started again
AWAY_SECONDS = 30.0  # that a host of it may not answer: its guard may only be restarting
RANK_PAUSE = 5.0  # between two questions to the other hosts of a group
RANKS_SECONDS = 45.0  # until the workers have started their ranks
PROBE_SECONDS = 5.0  # for /health and /metrics
DOCKER_SECONDS = 10.0  # for an answer of Docker
BACK_SECONDS = 10.0  # after a start of the host or of Docker in which it may still bring its containers back
START_PAUSES = (10.0, 30.0, 60.0)  # before a start is tried again that Docker refused
SAVE_SECONDS = 30.0  # at least so often the state is written, moved or not
FRESH_SECONDS = 60.0  # an observation may take as long as Docker needs to stop an engine
WINDOW_SECONDS = 60.0  # between two tries to listen
REPEAT_SECONDS = 600.0  # after which the same complaint is written to the journal again
RECOVER_SECONDS = 3 * 3600  # an engine, for the end of an interrupted switch: two starts of it, verified
LOAD_SECONDS = 900.0  # in which an engine that starts measures memory; another one waits no longer for it
RECOVER_PAUSE = 60.0  # between two tries to end it, where the first one could not
LOG_SECONDS = 600.0  # a start that logs nothing for so long hangs
LOG_LINES = 150  # of an engine that was given up
KEPT_RESTARTS = 50
STALL_SECONDS = 1.0  # an answer of /metrics takes milliseconds
ANSWERS = 12  # that are kept; in half of them or more a slow engine stalls
#: States of an engine, as state file and metrics name them.
SERVED = ("serving", "loading", "healing", "wedged")
STATES = (
    *("serving", "loading", "stopped", "wedged", "healing", "given-up", "missing", "switching", "docker-down"),
    ASLEEP,
)
DEMAND = "demand"  # why an engine is started that a request has asked for
WANTED_SECONDS = 120.0  # that a request which was refused counts
FINISH_SECONDS = 30.0  # for what doors are passing on when the guard is told to end; TimeoutStopSec is longer
QUICK_SECONDS = 0.5  # between two observations while a request waits for an engine
STUCK = "guard-stuck"  # what /ready answers for an engine that the guard has not observed for long
#: The state of a host is the first of these that one of its engines is in.
WORST_FIRST = (
    *("switching", "docker-down", "given-up", "missing", "stopped", "wedged", "healing", "loading", "serving", ASLEEP),
)
#: Docker's words for a bridge that it believes to be there (26, 28).
BRIDGE_GONE = re.compile(
    r"adding interface \S{1,64} to bridge \S{1,64} failed|could not find bridge|network bridge not found"
)


def clock() -> float:
    """Seconds since boot, those of a suspension too; no time server moves it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Seconds, but for `max_restarts`. An engine that makes no progress for `wedge_seconds`, and lets a canary wait
    for `canary_timeout`, hangs. After `max_restarts` within `restart_window` the guard gives up. `listen_port`: of
    /ready and /metrics, 0 for none; `listen_address`: IP addresses of the host, "" for every one. Requests for an
    engine that starts on demand are held for `on_demand_hold_seconds`, or refused (`on_demand_wait`); see `OnDemand`.
    """

    interval: float = 2.0
    metrics_interval: float = 5.0
    wedge_seconds: float = 180.0
    canary_interval: float = 60.0
    canary_timeout: float = 60.0
    max_restarts: int = 3
    restart_window: float = 3600.0
    start_timeout: float = 1800.0
    listen_port: int = 0
    listen_address: tuple[str, ...] = ("",)
    on_demand_wait: str = HOLD
    on_demand_hold_seconds: float = 900.0
    on_demand_min_seconds: float = 120.0
    on_demand_starts_per_hour: int = 12
    project_dir: str = PROJECT_DIR
    state_dir: str = STATE_DIR
    cache_dir: str = "/opt/hf"  # not the guard's: its unit of the check of model files has it

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Settings:
        """From a file; what is not known or not of its form is an error. Raises ValueError."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(data) - set(known))
        if unknown:
            raise ValueError(f"unknown settings {printable(', '.join(unknown), 200)}; there are {', '.join(known)}")
        read: dict[str, Any] = {}
        for name, value in data.items():
            if name == "max_restarts":
                read[name] = as_int(value, name, 0, 1000)
            elif name == "listen_port":
                read[name] = as_int(value, name, 0, 65535)
            elif name == "on_demand_starts_per_hour":
                read[name] = as_int(value, name, 1, MOST_PER_HOUR)
            elif name == "on_demand_wait":
                read[name] = as_str(value, name, 100)
                if value not in WAYS:
                    raise BoundsError(f"{name}: {printable(value, 80)!r} is none of {', '.join(WAYS)}")
            elif name == "on_demand_min_seconds":
                read[name] = as_number(value, name, 0.0, 1e8)
            elif name == "listen_address":
                given = value if isinstance(value, list) else [value]
                read[name] = tuple(dict.fromkeys(_address(item) for item in as_list(given, name, 16)))
            elif name in ("project_dir", "state_dir", "cache_dir"):
                if not as_str(value, name, 4096).startswith("/") or "\0" in value:
                    raise BoundsError(f"{name}: {printable(value, 80)!r} is not an absolute path")
                read[name] = value
            else:
                read[name] = as_number(value, name, 0.01, 1e8)
        return cls(**read)


def _address(value: Any) -> str:
    text = as_str(value, "listen_address", 100)
    try:
        return str(ipaddress.ip_address(text)) if text else ""
    except ValueError:
        raise BoundsError(f"listen_address: {printable(text, 80)!r} is not an IP address") from None


@dataclasses.dataclass(frozen=True)
class Canary:
    """A request of one token: when it started (seconds since boot), whether it was answered, after how many seconds."""

    began: float
    ok: bool
    seconds: float


@dataclasses.dataclass(frozen=True)
class Observation:
    """What was observed. `state`: missing, exited, restarting, running, paused; `progress`: counters that only a living
    engine moves, None where /metrics does not answer; `canary`: the one that has ended since the last observation."""

    now: float  # Unix time
    clock: float  # seconds since boot
    boot_id: str = "boot"
    docker: bool = True
    switching: bool = False
    interrupted: bool = False
    release: int | None = 1
    state: str = "running"
    started_at: str = ""  # RFC 3339
    restart_count: int = 0
    how: str = ""  # how the container ended last, or why Docker cannot start it, in words
    foreign: tuple[str, ...] = ()  # running containers of others; only where Docker's network is broken
    logged: float | None = None  # Unix time of the last log line; only while loading
    healthy: bool = True
    progress: tuple[float, ...] | None = None
    running: float = 0.0
    waiting: float = 0.0
    tokens: float = 0.0  # generated so far
    canary: Canary | None = None
    limit: float = 0.0  # tokens a second that memory bandwidth allows one stream; 0 for unknown
    answered: float | None = None  # seconds that /metrics took, if requested
    busy: bool = False  # another engine of the host starts, and measures memory
    on_demand: bool = False  # it stands ready while it does not run
    together: bool = False  # rank 0 of a group, whose ranks Docker does not restart: they start together
    worker: bool = False  # another rank of it, which starts and stops as rank 0 wants
    down: bool = False  # the ranks of the group were stopped on purpose
    away: tuple[str, ...] = ()  # hosts of the group that do not answer
    gone: tuple[str, ...] = ()  # ranks that have ended, in words

    def finite(self) -> Observation:
        """The same without figures that are not numbers: NaN differs from itself, and would seem to move."""
        fixed: dict[str, Any] = {}
        for name in ("running", "waiting", "tokens", "limit"):
            if not math.isfinite(getattr(self, name)):
                fixed[name] = 0.0
        if self.progress is not None and not all(map(math.isfinite, self.progress)):
            fixed["progress"] = tuple(value if math.isfinite(value) else 0.0 for value in self.progress)
        return dataclasses.replace(self, **fixed) if fixed else self


@dataclasses.dataclass(frozen=True)
class Action:
    """What to do: nothing, canary, restart, adopt (Docker has restarted it), start, give-up, recover, restart-docker;
    and why."""

    do: str = "nothing"
    reason: str = ""
    detail: str = ""


NOTHING = Action()


class Guard:
    """Decides for one engine. `data` is what survives its own restarts: its part of the state file."""

    def __init__(self, settings: Settings, data: Mapping[str, Any] | None = None) -> None:
        """Raises BoundsError for data that is not of the form it must have."""
        self.settings = settings
        data = as_dict({} if data is None else data, "state")
        self.engine = _optional(data, "engine", as_str) or "missing"
        if self.engine not in STATES:
            raise BoundsError(f"engine: {printable(self.engine, 80)!r} is not a state")
        self.boot_id = _optional(data, "boot_id", as_str) or ""
        forgiven = _optional(data, "forgiven", as_time) or 0.0  # written by an earlier version: Unix time
        items = as_list([] if data.get("restarts") is None else data["restarts"], "restarts", 1000)[-KEPT_RESTARTS:]
        self.restarts = [_restart(item, forgiven) for item in items]
        totals = as_dict({} if data.get("restarts_total") is None else data["restarts_total"], "restarts_total")
        self.totals = {as_str(key, "reason", 100): as_int(totals[key], "restarts_total") for key in [*totals][:100]}
        self.given_up = _form(data.get("given_up"), "given_up", {"at": as_time, "reason": as_str}, _GIVEN_UP)
        self.healing = _form(data.get("healing"), "healing", {"at": as_time, "reason": as_str}, _HEALING)
        self.known: dict[str, Any] = _form(data.get("known"), "known", {}, _KNOWN) or {}
        self.canary = _form(data.get("canary"), "canary", {"at": as_time, "ok": _as_bool, "seconds": as_time}, {})
        # Before the host or Docker went down.
        self.served = _as_bool(data.get("served", self.engine in SERVED), "served")
        self.lost = ""  # what may have taken the engine along: boot, docker
        self.since = _optional(data, "since", as_time) or 0.0
        self.running = self.waiting = 0.0
        self.tokens_per_second: float | None = None
        self.slow = self.stalls = False
        self._answers: deque[float] = deque(maxlen=ANSWERS)
        self._progress: tuple[float, ...] | None = None
        self._moved: float | None = None  # when it last did, on the clock
        self._asked: float | None = None  # when the last canary was sent, on the clock
        self._rate: tuple[float, float] | None = None  # clock and tokens at the beginning of a measurement
        self._exited: float | None = None  # since when, on the clock
        self._logged: tuple[float | None, float] = (None, 0.0)  # the last line's stamp, and when it was seen
        self._docker_restarted = False  # for another engine, since this one ran
        self._rank_gone: float | None = None  # since when a rank of the group is, on the clock

    @property
    def ready_since(self) -> str:
        """The start by which the engine is ready, "" while it is not."""
        return str(self.known.get("started_at") or "") if self.known.get("ready") else ""

    # -- the decision ----------------------------------------------------------------------------------------

    def decide(self, seen: Observation) -> Action:
        """What to do about what was seen. Changes only the guard's own memory."""
        seen = seen.finite()
        if self.boot_id and self.boot_id != seen.boot_id:
            self.known.update(restart_count=0)
            self.known.pop("since", None)
            self.lost = "boot" if self.served else ""
            if self.healing and self.healing["reason"] == DEMAND:  # who wanted it has gone
                self.healing = None
        self.boot_id = seen.boot_id
        if not seen.docker:
            self.lost = self.lost or ("docker" if self.served else "")
            if self.healing:
                self.healing["tries"] = 0
            return self._is("docker-down", seen)
        if seen.switching:
            self.healing, self._exited = None, None
            self._forget()
            return self._is("switching", seen)
        if seen.interrupted:
            return dataclasses.replace(self._is("switching", seen), do="recover")
        if seen.release is None or seen.state == "missing":
            return self._is("missing", seen)
        if seen.release != self.known.get("release"):
            # A new deployment starts with a clean slate.
            self.known = {"release": seen.release, "started_at": seen.started_at, "restart_count": seen.restart_count}
            self.given_up = self.healing = None
            self._forgive()
            self._forget()
        if self.given_up and self._started_since_giving_up(seen):
            self.given_up = None
            self._forgive()
        if seen.worker:
            self.lost = ""
            words = {"running": "serving", "restarting": "healing"}
            return self._is(words.get(seen.state, "stopped"), seen)
        if seen.together:
            before = self._ranks(seen)
            if before is not None:
                return before
        if seen.state in ("exited", "paused"):
            return self._stopped(seen)
        self._exited, self.lost, self._docker_restarted = None, "", False
        if self.given_up:
            return Action("give-up", "again", "it was started by Docker")
        if self.healing and seen.started_at != self.healing.get("before"):
            self.healing["started"] = True
        count = int(self.known.get("restart_count") or 0)
        if seen.restart_count > count or (seen.state == "restarting" and not self.healing):
            self._is("healing", seen)
            return self._restart("crash", seen.how or "it ended by itself", seen, "adopt")
        if seen.state == "restarting":
            return self._is("healing", seen)
        if seen.started_at != self.known.get("started_at"):
            # Started by a person, by Docker after a restart of itself or of the host, or by us.
            self.known.update(
                started_at=seen.started_at, restart_count=seen.restart_count, ready=False, since=seen.clock
            )
            self._forget()
        if not self.known.get("ready"):
            return self._loading(seen)
        return self._serving(seen)

    def _stopped(self, seen: Observation) -> Action:
        """Docker restarts what crashes. This one was stopped by a person or by us, or went down with host or Docker."""
        if self.given_up:
            return self._is("given-up", seen)
        if self.healing and not self.healing.get("started") and seen.state == "exited":
            return self._start_again(self.healing, seen)
        if seen.on_demand and seen.state == "exited":
            self.healing, self.lost, self._exited = None, "", None
            return self._is(ASLEEP, seen)
        if self._exited is None:
            self._exited = seen.clock
        if self.lost and seen.state == "exited":
            # Docker 26 does not restart an engine that ran when dockerd was killed.
            if seen.clock - self._exited < BACK_SECONDS:
                return self._is("loading", seen)
            self.healing = {"reason": self.lost, "before": seen.started_at, "tries": 0, **_stamp(seen)}
            if self._docker_restarted:
                self.healing["docker_restarted"] = True
            return self._start_again(self.healing, seen)
        self.healing = None
        return self._is("stopped", seen)

    def _ranks(self, seen: Observation) -> Action | None:
        """Of rank 0 what a single engine does not have: ranks that end, and hosts that are away; None for the rest."""
        if seen.down:
            self.healing, self.lost = None, ""
            self._rank_gone = None
            return self._is("stopped", seen) if seen.state == "exited" else None
        missing = (*seen.gone, *seen.away)
        if seen.state == "exited" and not self.given_up and not self.healing:
            if self.lost:
                self.healing = {"reason": self.lost, "before": seen.started_at, "tries": 0, **_stamp(seen)}
            else:
                return self._restart("crash", f"rank 0 ended: {seen.how}", seen)
        if self.healing and seen.state == "exited" and seen.away:
            return self._is("healing", seen)  # until all hosts are there
        if not missing or self.given_up or seen.state != "running":
            self._rank_gone = None
            return None
        if self._rank_gone is None:
            self._rank_gone = seen.clock
        if seen.clock - self._rank_gone < (RANK_SECONDS if seen.gone else AWAY_SECONDS):
            return None
        self._rank_gone = None
        return self._restart("rank", "; ".join(missing), seen)

    def _start_again(self, healing: dict[str, Any], seen: Observation) -> Action:
        """Start what should run but does not, after a pause and not indefinitely: Docker may refuse each time."""
        tries = int(healing.get("tries") or 0)
        waited = seen.clock - float(healing.get("tried") or 0.0)
        pause = START_PAUSES[min(tries, len(START_PAUSES)) - 1] if tries else 0.0
        gone = BRIDGE_GONE.search(seen.how) is not None
        if gone and not seen.foreign and not healing.get("docker_restarted"):
            healing.update(docker_restarted=True, tries=0)
            return dataclasses.replace(
                self._is("healing", seen), do="restart-docker", reason="network-missing", detail=seen.how
            )
        word = "loading" if healing["reason"] == DEMAND else "healing"
        if seen.busy or (tries and 0 <= waited < pause):
            return self._is(word, seen)
        if tries >= max(self.settings.max_restarts, 1):
            why = f"Docker could not start it in {tries} tries: {seen.how}"
            if gone and seen.foreign:
                why += f"; Docker was not restarted, because {', '.join(seen.foreign[:5])} would end with it"
            self.healing = None
            self.given_up = {"at": seen.now, "reason": why}
            return dataclasses.replace(self._is("given-up", seen), do="give-up", reason="start", detail=why)
        healing.update(tries=tries + 1, tried=seen.clock)
        return dataclasses.replace(self._is(word, seen), do="start", reason=str(healing["reason"]))

    def demand(self, seen: Observation) -> None:
        """A request needs the engine, and there is room for it: the next decision starts it."""
        self.healing = {"reason": DEMAND, "before": seen.started_at, "tries": 0, **_stamp(seen)}

    def _loading(self, seen: Observation) -> Action:
        """Not ready since it was started: it may take as long as it needs while its log moves."""
        if seen.healthy:
            self.known["ready"] = True
            self._moved, self._progress = seen.clock, seen.progress
            if self.healing:
                self._back(seen)
            return self._is("serving", seen)
        since = float(self.known.setdefault("since", seen.clock))
        if seen.logged is not None and seen.logged != self._logged[0]:
            self._logged = (seen.logged, seen.clock)
        took = seen.clock - since
        silent = seen.clock - max(self._logged[1], since)
        if took > self.settings.start_timeout and silent > min(LOG_SECONDS, self.settings.start_timeout):
            detail = f"not ready after {took:.0f} s, nothing in its log for {silent:.0f} s"
            return self._restart("hung-start", detail, seen)
        healing = self.healing is not None and self.healing["reason"] != DEMAND
        return self._is("healing" if healing else "loading", seen)

    def _serving(self, seen: Observation) -> Action:
        """It was ready: does it still make progress?"""
        if self._moved is None:
            self._moved = seen.clock
        if seen.progress is not None and seen.progress != self._progress:
            self._progress, self._moved = seen.progress, seen.clock
        if seen.canary:
            self.canary = {"at": seen.now, "ok": seen.canary.ok, "seconds": round(seen.canary.seconds, 3)}
            if seen.canary.ok:
                self._moved = max(self._moved, seen.clock)
        self._measure(seen)
        still = seen.clock - self._moved
        if seen.canary and not seen.canary.ok and self._moved <= seen.canary.began:
            if still >= self.settings.wedge_seconds and not seen.busy:
                detail = (
                    f"no token for {still:.0f} s with {seen.running:.0f} requests running and {seen.waiting:.0f} "
                    f"waiting, and a canary was not answered in {seen.canary.seconds:.0f} s"
                )
                self._is("wedged", seen)
                return self._restart("wedge", detail, seen)
            return self._is("wedged", seen)
        wedged = self.engine == "wedged" and still >= self.settings.canary_interval
        asked = math.inf if self._asked is None else seen.clock - self._asked
        # Tokens that flow are the best canary.
        due = still >= self.settings.canary_interval and asked >= self.settings.canary_interval
        if due or (wedged and asked >= self.settings.canary_timeout):
            self._asked = seen.clock
            return dataclasses.replace(self._is("wedged" if wedged else "serving", seen), do="canary")
        return self._is("wedged" if wedged else "serving", seen)

    def _restart(self, reason: str, detail: str, seen: Observation, do: str = "restart") -> Action:
        """Restart it, or let Docker do so, unless that was done too often."""
        window = self.settings.restart_window
        ages = [_age(item, seen) for item in self.restarts if not item.get("forgiven")]
        recent = sum(age is not None and age < window for age in ages)
        if recent >= self.settings.max_restarts:
            why = f"{recent} restarts in {window:.0f} s, and again: {reason}, {detail}"
            self.healing = None
            self.given_up = {"at": seen.now, "reason": why}
            self._is("given-up", seen)
            return Action("give-up", reason, why)
        stamp = _stamp(seen)
        self.healing = {"reason": reason, "started": do == "adopt", "before": seen.started_at, **stamp}
        self.healing["tries"] = 0
        self.restarts = [*self.restarts[1 - KEPT_RESTARTS :], {"reason": reason, "detail": detail, **stamp}]
        self.totals[reason] = self.totals.get(reason, 0) + 1
        # What we start counts from zero.
        self.known.update(restart_count=seen.restart_count if do == "adopt" else 0, ready=False, since=seen.clock)
        self._forget()
        return Action(do, reason, detail)

    def withdraw(self, action: Action) -> None:
        """The action was not taken: someone else was already stopping or starting the engine."""
        self.healing = None
        if action.do == "restart" and self.restarts:
            self.restarts = self.restarts[:-1]
            self.totals[action.reason] = max(self.totals.get(action.reason, 0) - 1, 0)
        if action.do == "give-up" and action.reason != "again":
            self.given_up = None

    def docker_restarts(self) -> None:
        """Docker is being restarted for another engine: this one does not request it again."""
        self._docker_restarted = True
        if self.healing:
            self.healing.update(docker_restarted=True, tries=0)

    # -- parts -----------------------------------------------------------------------------------------------

    def _is(self, state: str, seen: Observation) -> Action:
        if state != self.engine:
            self.engine, self.since = state, seen.now
        if state not in ("docker-down", "switching"):
            self.served = state in SERVED
        self.running, self.waiting = seen.running, seen.waiting
        return NOTHING

    def _forget(self) -> None:
        self._progress = self._moved = self._rate = None
        self.tokens_per_second, self.slow, self.stalls = None, False, False
        self._answers.clear()

    def _forgive(self) -> None:
        """Exclude past restarts from the limit."""
        self.restarts = [{**item, "forgiven": True} for item in self.restarts]

    def _back(self, seen: Observation) -> None:
        began, self.healing = self.healing or {}, None
        lasted = _age(began, seen) if began else None
        if self.restarts and lasted is not None and self.restarts[-1].get("clock") == began.get("clock"):
            self.restarts[-1]["back_after_s"] = round(lasted, 1)

    def _started_since_giving_up(self, seen: Observation) -> bool:
        """Whether it has been started again since the guard gave it up."""
        ended = (self.given_up or {}).get("started_at")
        return seen.state == "running" and ended is not None and seen.started_at != ended

    def _measure(self, seen: Observation) -> None:
        """Tokens a second over half a minute or more in which exactly one request ran, and whether /metrics, which
        costs an engine nothing, is slow repeatedly."""
        if seen.answered is not None:
            self._answers.append(seen.answered)
            late = sum(seconds > STALL_SECONDS for seconds in self._answers)
            self.stalls = len(self._answers) == ANSWERS and late >= ANSWERS / 2
        if seen.progress is None:
            return
        if seen.running != 1:
            self._rate = None
            return
        if self._rate is None or seen.tokens < self._rate[1]:
            self._rate = (seen.clock, seen.tokens)
            return
        lasted = seen.clock - self._rate[0]
        if lasted >= 30:
            self.tokens_per_second = round((seen.tokens - self._rate[1]) / lasted, 2)
            # A prefill generates no tokens: zero is not a rate.
            self.slow = 0 < self.tokens_per_second < seen.limit / 4
            self._rate = (seen.clock, seen.tokens)

    def data(self) -> dict[str, Any]:
        """What is stored, and what status and diagnose read."""
        return {
            "engine": self.engine,
            "served": self.served,
            "since": self.since,
            "restarts": self.restarts,
            "restarts_total": self.totals,
            "given_up": self.given_up,
            "healing": self.healing,
            "canary": self.canary,
            "running": self.running,
            "waiting": self.waiting,
            "tokens_per_second": self.tokens_per_second,
            "slow": self.slow or self.stalls,
            "stalls": self.stalls,
            "boot_id": self.boot_id,
            "known": self.known,
        }


def guards(settings: Settings, data: Mapping[str, Any]) -> dict[str, Guard]:
    """The guards of a state file, by service. One of format 1 holds that of one engine, which has the name "" then.
    Raises BoundsError."""
    if "engines" not in data:
        return {"": Guard(settings, data)}
    engines = as_dict(data["engines"], "engines")
    if len(engines) > MOST_ENGINES:
        raise BoundsError(f"engines: more than {MOST_ENGINES} items")
    for service in engines:
        if service and not SERVICE.fullmatch(service):
            raise BoundsError(f"engines: {printable(repr(service), 80)} is not the name of a service")
    return {service: Guard(settings, item) for service, item in engines.items()}


def read_state(state_dir: Path, first: str = "") -> tuple[dict[str, Any] | None, str]:
    """What the guard wrote, {at, clock, boot_id, release, engines: {service: `Guard.data`}}, None for nothing of use,
    and what is wrong with the file ("" for nothing). `first`: the service of the current release's first engine, whose
    record a file of format 1 holds."""
    path = state_dir / STATE_FILE
    try:
        data = bounded.read_json(path)
        guards(Settings(), data)
    except FileNotFoundError:
        return None, ""
    except (BoundsError, OSError) as error:
        return None, f"{path}: {str(error).removeprefix(f'{path}: ')}"
    if "engines" not in data:
        host: dict[str, Any] = {key: data[key] for key in ("at", "clock", "boot_id", "release") if key in data}
        return {**host, "engines": {first: data}}, ""
    return {**data, "engines": {service or first: item for service, item in data["engines"].items()}}, ""


# -- the form of the state file ----------------------------------------------------------------------------------------

Read = Callable[[Any, str], Any]


def _as_bool(value: Any, what: str) -> bool:
    if not isinstance(value, bool):
        raise BoundsError(f"{what}: not true or false: {printable(repr(value), 80)}")
    return value


def _as_lines(value: Any, what: str) -> list[str]:
    return [as_str(line, what) for line in as_list(value, what, 10_000)]


def _optional(data: Mapping[str, Any], name: str, read: Read) -> Any:
    return None if data.get(name) is None else read(data[name], name)


def _form(value: Any, what: str, needed: Mapping[str, Read], others: Mapping[str, Read]) -> dict[str, Any] | None:
    """An object with these members, others left out; None for null. Raises BoundsError."""
    if value is None:
        return None
    data = as_dict(value, what)
    read = {name: check(data.get(name), f"{what}.{name}") for name, check in needed.items()}
    for name, check in others.items():
        if data.get(name) is not None:
            read[name] = check(data[name], f"{what}.{name}")
    return read


_STAMP: dict[str, Read] = {"clock": as_time, "boot_id": as_str}
_GIVEN_UP: dict[str, Read] = {"log": _as_lines, "started_at": as_str}
_HEALING: dict[str, Read] = {
    **{"started": _as_bool, "before": as_str, "tries": as_int, "tried": as_time, "docker_restarted": _as_bool},
    **_STAMP,
}
_KNOWN: dict[str, Read] = {
    **{"release": as_int, "started_at": as_str, "restart_count": as_int, "ready": _as_bool, "since": as_time},
}


def _restart(value: Any, forgiven: float) -> dict[str, Any]:
    others: dict[str, Read] = {**_STAMP, "back_after_s": as_time, "forgiven": _as_bool}
    read = _form(as_dict(value, "restarts"), "restarts", {"at": as_time, "reason": as_str, "detail": as_str}, others)
    assert read is not None
    return {**read, "forgiven": True} if read["at"] <= forgiven else read


def metrics(data: Mapping[str, Any]) -> str:
    """The content of the state file as Prometheus text, for node_exporter's textfile collector."""
    lines: list[str] = []
    engines: Mapping[str, Mapping[str, Any]] = data["engines"]

    def add(name: str, kind: str, text: str, samples: Sequence[tuple[str, float]]) -> None:
        if samples:
            lines.append(f"# HELP sparkfleet_{name} {text}")
            lines.append(f"# TYPE sparkfleet_{name} {kind}")
            lines.extend(f"sparkfleet_{name}{labels} {value:g}" for labels, value in samples)

    def each(value: Callable[[Mapping[str, Any]], float | None]) -> list[tuple[str, float]]:
        found = ((service, value(item)) for service, item in engines.items())
        return [(f'{{engine="{service}"}}', number) for service, number in found if number is not None]

    def each_of(label: str, names: Sequence[str], value: Callable[[Mapping[str, Any], str], float]) -> Any:
        return [
            (f'{{engine="{service}",{label}="{name}"}}', value(item, name))
            for service, item in engines.items()
            for name in names
        ]

    def canary(item: Mapping[str, Any], key: str) -> float | None:
        return float(item["canary"][key]) if item["canary"] else None

    add("engine_up", "gauge", "Whether the engine serves.", each(lambda item: float(item["engine"] == "serving")))
    states = each_of("state", STATES, lambda item, name: float(item["engine"] == name))
    add("engine_state", "gauge", "State of the engine, 1 for the one it is in.", states)
    totals = each_of("reason", REASONS, lambda item, name: float(item["restarts_total"].get(name, 0)))
    add("engine_restarts_total", "counter", "Restarts by the guard.", totals)
    given_up = each(lambda item: float(bool(item["given_up"])))
    add("engine_given_up", "gauge", "Whether the guard gave up.", given_up)
    slow = each(lambda item: float(item["slow"]))
    add("engine_slow", "gauge", "Whether one stream is far below the plan's limit, or the engine stalls.", slow)
    add("release", "gauge", "Number of the current release, 0 for none.", [("", float(data["release"] or 0))])
    add("canary_ok", "gauge", "Whether the last canary was answered.", each(lambda item: canary(item, "ok")))
    add("canary_seconds", "gauge", "Duration of the last canary.", each(lambda item: canary(item, "seconds")))
    for name, kind, key, text in ON_DEMAND_METRICS:
        found: Mapping[str, int] = data.get("on_demand", {}).get(key, {})
        add(name, kind, text, [(f'{{engine="{service}"}}', float(number)) for service, number in found.items()])
    lines.append("# HELP sparkfleet_guard_last_look_seconds Unix time of the guard's last observation.")
    lines.append("# TYPE sparkfleet_guard_last_look_seconds gauge")
    lines.append(f"sparkfleet_guard_last_look_seconds {data['at']:.0f}")
    return "\n".join(lines) + "\n"


ON_DEMAND_METRICS = (
    ("on_demand_starts_total", "counter", "totals", "Starts of the engine because a request needed it."),
    ("on_demand_waiting", "gauge", "waiting", "Requests that wait for the engine."),
)
REASONS = ("crash", "wedge", "hung-start", "rank")
#: Of vLLM's metrics, those that only an engine that computes moves; in a long prefill it is the KV cache that grows.
_MOVING = (
    *("generation_tokens", "prompt_tokens", "request_success", "num_preemptions", "kv_cache_usage_perc"),
    *("gpu_cache_usage_perc", "prefix_cache_queries", "gpu_prefix_cache_queries", "iteration_tokens_total_count"),
)


_WANTED = frozenset((*_MOVING, "num_requests_running", "num_requests_waiting"))


def figures(text: str) -> dict[str, float]:
    """Those of vLLM's metrics that the guard reads, summed over their label sets; only finite ones."""
    return sums(text, _WANTED)


class Notify:
    """Notifies systemd that the service is alive (sd_notify(3)); does nothing where systemd did not start it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.path = environment.get("NOTIFY_SOCKET", "")
        self.watchdog_usec = environment.get("WATCHDOG_USEC", "")

    def __call__(self, *lines: str) -> None:
        """Send lines such as WATCHDOG=1."""
        if not self.path:
            return
        address = f"\0{self.path[1:]}" if self.path.startswith("@") else self.path
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(1.0)
            sock.sendto("\n".join(lines).encode(), address)

    def alive(self) -> None:
        """Nothing hangs."""
        self("WATCHDOG=1")

    @contextlib.contextmanager
    def patiently(self, seconds: float) -> Any:
        """Within this the service may be silent for so long."""
        if self.watchdog_usec:
            self(f"WATCHDOG_USEC={seconds * 1e6:.0f}", "WATCHDOG=1")
        try:
            yield
        finally:
            if self.watchdog_usec:
                self(f"WATCHDOG_USEC={self.watchdog_usec}", "WATCHDOG=1")


class Watched:
    """An engine that is watched: its guard, what was read of it last, and its canary. `engine` is None while the files
    of the current release do not name it."""

    def __init__(self, service: str, guard: Guard) -> None:
        self.service, self.guard = service, guard
        self.engine: Engine | None = None
        self.canary: Canary | None = None  # that has ended since the last observation
        self.asking = False
        self.figures: dict[str, float] | None = None
        self.read_at = -math.inf
        self.start: tuple[str, float] | None = None  # the one in progress, and since when it is known
        self.asked_ranks = -math.inf  # when the other hosts of the group were asked
        self.away: tuple[str, ...] = ()
        self.gone: tuple[str, ...] = ()
        self.looked_at = clock()
        self.seen: Observation | None = None  # the last one
        self.door: Door | None = None  # of an engine that starts on demand
        self.ready_at: float | None = None  # since when it serves, as far as this guard knows

    @property
    def name(self) -> str:
        """For messages."""
        return self.service or "engine"

    @property
    def loads(self) -> bool:
        """Whether it measures memory now, or may."""
        return self.start is not None and clock() - self.start[1] < LOAD_SECONDS

    def note_start(self, seen: Mapping[str, Any]) -> None:
        """Record from an observation whether it loads."""
        start, known = str(seen.get("started_at") or ""), self.guard.known
        if seen["state"] not in ("running", "restarting") or (known.get("ready") and known.get("started_at") == start):
            self.start = None
        elif self.start is None or self.start[0] != start:
            self.start = start, clock()


class Watcher:
    """Observes and acts. `store` and `docker` are those of the host."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        docker: Docker,
        say: Callable[[str], None],
        notify: Notify | None = None,
    ) -> None:
        self.settings, self.store, self.docker, self._say = settings, store, docker, say
        self.notify = notify or Notify({})
        self.boot_id = switch.boot_id()
        self.idle = "missing"  # the state of a host without engines
        self._saved_at = -math.inf
        self.looked_at = clock()
        self._saved = ""
        self._complaints: dict[str, tuple[str, float]] = {}
        self._listening: set[str] = set()
        self._recover_at = -math.inf  # not before
        self._ended: tuple[Any, ...] | None = None  # which switch was ended though its journal does not record it
        self.doors = Doors()
        self.wake = threading.Event()  # set when a request finds an engine asleep
        self.ends: float | None = None  # when the guard ends, on the clock; None for not
        self.on_demand = OnDemand(settings.on_demand_min_seconds, settings.on_demand_starts_per_hour)
        self.watched = {service: Watched(service, guard) for service, guard in self._load().items()}
        self.refresh()
        self.page = metrics(self._data())

    def say(self, text: str) -> None:
        """A line for the journal; what it quotes may come from anywhere."""
        self._say(printable(redact(text), 2000))

    def complain(self, what: str, text: str) -> None:
        """The same, but only now and then for what persists."""
        before = self._complaints.get(what)
        if before is None or before[0] != text or clock() - before[1] > REPEAT_SECONDS:
            self._complaints[what] = (text, clock())
            self.say(f"{what}: {text}")

    def _load(self) -> dict[str, Guard]:
        """The guards with what they kept; a state file that cannot be understood is set aside, and a new one is
        started."""
        path = self.store.state_dir / STATE_FILE
        settings = self.settings
        try:
            data = bounded.read_json(path)
            self.on_demand = OnDemand(
                settings.on_demand_min_seconds, settings.on_demand_starts_per_hour, data.get("on_demand")
            )
            return guards(settings, data)
        except FileNotFoundError:
            return {}
        except (BoundsError, OSError) as error:
            kept = bounded.set_aside(path)
            where = f"it is kept as {kept}" if kept else "it could not be set aside"
            self.say(f"{path} is damaged ({str(error).removeprefix(f'{path}: ')}); {where}, and a new one is started")
            return {}

    def refresh(self) -> None:
        """Watch the engines of the current release. One that it does not have is forgotten; while its files cannot be
        read, or there is none, all records stay."""
        release = self.store.current()
        engines: tuple[Engine, ...] | None = None
        if release is not None:
            try:
                engines = self.store.engines(release)
            except ReleaseError as error:
                self.complain(f"release {release}", str(error))
        if engines is None:
            for item in self.watched.values():
                item.engine = None
                self._shut(item)
            return
        before, watched = self.watched, {}
        for place, made in enumerate(engines):
            known = before.get(made.service) or (before.get("") if place == 0 else None)
            item = known or Watched(made.service, Guard(self.settings))
            item.service, item.engine = made.service, made
            watched[made.service] = item
        for service, item in before.items():
            if service not in watched:
                self._shut(item)
        self.watched = watched

    def observe(self, item: Watched, locked: bool = False) -> Observation:
        """What the host shows of an engine now. `locked`: the lock of switches is ours."""
        known: dict[str, Any] = {"now": time.time(), "clock": clock(), "boot_id": self.boot_id}
        if not locked and self.store.switch_active() and item.service not in self._kept():
            item.start = None
            return Observation(**known, switching=True)
        known.update(interrupted=not locked and self._interrupted(), release=self.store.current())
        try:
            known.update(self._engine(item) if known["release"] is not None else {"state": "missing"})
        except (DockerUnavailable, DockerError):
            item.start = None
            return Observation(**{**known, "docker": False})
        item.note_start(known)
        known["busy"] = any(other.loads for other in self.watched.values() if other is not item)
        if locked:
            return Observation(**known)
        canary, item.canary = item.canary, None
        return Observation(**known, canary=canary)

    def _kept(self) -> Sequence[str]:
        """Services that the switch that runs leaves running."""
        journal = self.store.switch()
        return journal["kept"] if journal and journal["phase"] not in ("", switch.CHECKING, DONE) else ()

    def _interrupted(self) -> bool:
        """Whether there is a switch to be ended. One that was ended is not ended again merely because nothing can be
        recorded of it, neither on the disk nor in memory."""
        return switch.interrupted(self.store) and self._which() != self._ended

    def _which(self) -> tuple[Any, ...]:
        journal = self.store.switch() or {}
        return tuple(journal.get(key) for key in ("id", "to", "began"))

    def _engine(self, item: Watched) -> dict[str, Any]:
        """The engine's container, its log while it loads, its metrics when it is ready."""
        if item.engine is None:
            return {"state": "missing"}
        found = engine.inspect(self.docker, item.service)
        seen = {key: found[key] for key in ("state", "started_at", "restart_count")}
        killed = ", out of memory" if found["oom_killed"] else ""
        seen["how"] = found["error"] or f"exit code {found['exit_code']}{killed}"
        if found["state"] == "exited" and BRIDGE_GONE.search(found["error"]):
            seen["foreign"] = foreign(self.docker)
        seen["limit"] = item.engine.decode_limit
        seen["on_demand"] = item.engine.on_demand is not None and not self.store.halted()
        if item.engine.is_worker:
            return {**seen, "worker": True}  # it answers nobody: rank 0 knows whether it computes
        if item.engine.group:
            seen |= self._ranks(item, item.engine.group)
        if found["state"] != "running":
            return seen
        client = engine_client(item.engine.url, PROBE_SECONDS)
        if not item.guard.known.get("ready"):
            seen["healthy"] = engine.healthy(client)
            lines = [] if seen["healthy"] else engine.read_log(self.docker, item.service, "", found["tty"], 1)
            seconds, nanos = engine.instant(lines[-1].partition(" ")[0]) if lines else (0, 0)
            return {**seen, "logged": seconds + nanos / 1e9 if seconds else None}
        # More than once while an engine may be stuck.
        pause = min(self.settings.metrics_interval, self.settings.wedge_seconds / 4)
        began = clock()
        if began - item.read_at >= pause:
            item.read_at, item.figures, seen["answered"] = began, None, PROBE_SECONDS
            with contextlib.suppress(HttpError):
                answer = client.get("/metrics", PROBE_SECONDS, limit=METRICS_LIMIT)
                if answer.status == 200:
                    item.figures, seen["answered"] = figures(answer.text), clock() - began
        values = item.figures
        if values is None:
            return {**seen, "healthy": False}
        return {
            **seen,
            "progress": tuple(values.get(name, 0.0) for name in _MOVING),
            "running": values.get("num_requests_running", 0.0),
            "waiting": values.get("num_requests_waiting", 0.0),
            "tokens": values.get("generation_tokens", 0.0),
        }

    def _ranks(self, item: Watched, group: Group) -> dict[str, Any]:
        """What rank 0 sees of the other ranks, asked now and then."""
        record = ranks.read_record(self.store)
        if clock() - item.asked_ranks >= RANK_PAUSE:
            item.asked_ranks = clock()
            found = ranks.ask_workers(group)
            words = ranks.absent(group, found, record.epoch, ("running",))
            item.away = tuple(text for rank, text in words.items() if found[rank] is None)
            item.gone = tuple(text for rank, text in words.items() if found[rank] is not None)
        return {"together": True, "down": record.down, "away": item.away, "gone": item.gone}

    def follow(self, item: Watched) -> None:
        """Of a worker: start or stop its rank as rank 0 wants. A switch of this host does that itself."""
        group = item.engine.group if item.engine else None
        if group is None or self.store.switch_active() or self._interrupted():
            return
        if clock() - item.asked_ranks < RANK_PAUSE / 2:
            return
        item.asked_ranks = clock()
        head, current, record = ranks.ask(group, 0), self.store.current(), ranks.read_record(self.store)
        if head is None or head.release != current or current is None:
            return
        starts = not head.down and head.epoch not in (0, record.epoch)
        if not (starts or head.down):
            return
        with self.store.exclusive(HELD_BY_GUARD) as mine:
            if not mine:
                return
            if head.down and engine.inspect(self.docker, item.service)["state"] in ("running", "restarting", "paused"):
                self.say(f"{item.name}: {group.named(0)} was stopped; stopping its rank")
                engine.stop(self.docker, item.service, STOP_SECONDS)
            elif starts:
                self.say(f"{item.name}: {group.named(0)} starts the ranks again (epoch {head.epoch})")
                engine.stop(self.docker, item.service, STOP_SECONDS)
                self.notify.alive()
                drop_page_cache()
                file = str(self.store.compose_file(current))
                engine.compose_up(self.settings.project_dir, file, item.service)
                ranks.write_record(self.store, Record(head.epoch, current))

    def _start_ranks(self, item: Watched, group: Group) -> None:
        """Let the workers start their ranks, before that of rank 0. Raises EngineError where one does not."""
        record = ranks.read_record(self.store)
        epoch = record.epoch + 1
        ranks.write_record(self.store, Record(epoch, self.store.current()))
        deadline = clock() + RANKS_SECONDS
        while missing := ranks.absent(group, ranks.ask_workers(group), epoch, ("running",)):
            self.notify.alive()
            if clock() > deadline:
                raise EngineError("; ".join(missing.values()))
            time.sleep(1)
        item.gone, item.away = (), ()

    def act(self, item: Watched, action: Action, seen: Observation) -> None:
        """Do it; what fails is logged, and retried after the next observation, or after a pause."""
        with self._going_on(action.do):
            if action.do == "canary":
                self._ask(item)
            elif action.do == "adopt":
                self.say(f"{item.name}: {action.reason}: {action.detail}; Docker restarts it")
                if not seen.busy and not self.store.switch_active():
                    drop_page_cache()  # before the engine measures what is free, some seconds after its start
            elif action.do != "nothing":
                self._locked(item, action, seen)

    @contextlib.contextmanager
    def _going_on(self, what: str) -> Iterator[None]:
        try:
            yield
        except (DockerError, EngineError, ReleaseError, HttpError, OSError) as error:
            self.say(f"{what}: {error}")
        except Exception as error:
            self.say(f"{what}: {type(error).__name__}: {error}")

    def _recover(self) -> None:
        """End a switch that was interrupted; retry after a pause where that fails, but not because its journal cannot
        be written."""
        if clock() < self._recover_at:
            return
        self._recover_at = clock() + RECOVER_PAUSE
        self.say("a switch was interrupted; ending it")
        with self.notify.patiently(RECOVER_SECONDS * max(len(self.watched), 1)):
            ended = switch.recover(self.store, self.docker)
        self.say(f"the switch ended: {ended['outcome'] or 'not yet' if ended else 'by another'}")
        if ended is None:
            return
        if ended["outcome"] is None:
            self.say("  rank 0 has not decided, or does not answer; it is asked again")
            self._recover_at = clock() + RANK_PAUSE
            return
        for trouble in ended.get("troubles") or []:
            self.say(f"  {trouble}")
        self._recover_at = -math.inf
        if switch.interrupted(self.store):
            self._ended = self._which()

    def _locked(self, item: Watched, action: Action, seen: Observation) -> None:
        """What stops or starts, under the lock of switches: no switch starts meanwhile, and none is disturbed."""
        with self.store.exclusive(HELD_BY_GUARD) as mine:
            now = self.observe(item, locked=True) if mine else None
            same = now is not None and now.docker and now.release == seen.release
            if now is not None and action.do in ("restart", "start"):
                same = same and (now.state, now.started_at) == (seen.state, seen.started_at)
            if not same:
                why = "the engine has changed meanwhile" if mine else "a switch has started"
                self.say(f"{item.name}: {action.do} ({action.reason}) left alone: {why}")
                item.guard.withdraw(action)
                return
            self.notify.alive()
            if action.do == "restart":
                self.say(f"{item.name}: {action.reason}: {action.detail}; restarting it")
                self.save()  # a reboot between stop and start must end in a start
                engine.stop(self.docker, item.service, STOP_SECONDS)
                self._start(item, seen)
            elif action.do == "start":
                self.say(f"{item.name}: starting it ({action.reason})")
                self.save()
                self._start(item, seen)
            elif action.do == "give-up":
                self._give_up(item, action)
            elif action.do == "restart-docker":
                self.say(f"{item.name}: {action.detail}; restarting Docker, which makes its networks again")
                self.save()
                restart_docker()
                for other in self.watched.values():
                    if other is not item:
                        other.guard.docker_restarts()

    def _start(self, item: Watched, seen: Observation) -> None:
        self.notify.alive()
        if not seen.busy:
            drop_page_cache()
        self.notify.alive()
        item.start = "", clock()
        if item.engine and item.engine.group:
            self._start_ranks(item, item.engine.group)
        engine.start(self.docker, item.service)

    def _give_up(self, item: Watched, action: Action) -> None:
        if item.engine and item.engine.group:
            ranks.keep_down(self.store)
        engine.stop(self.docker, item.service, STOP_SECONDS)
        found = engine.inspect(self.docker, item.service)
        if item.guard.given_up is None:
            return
        # What it was started by; another start is a person's.
        item.guard.given_up["started_at"] = found["started_at"]
        if "log" not in item.guard.given_up:
            lines = engine.read_log(self.docker, item.service, "", found["tty"], LOG_LINES)
            item.guard.given_up["log"] = [redact(line) for line in lines]
            self.say(f"{item.name}: giving up: {action.detail}; it stays stopped until it is deployed or started")
            for line in item.guard.given_up["log"][-10:]:
                self.say(f"  {line}")

    def _ask(self, item: Watched) -> None:
        """Send a canary in a thread of its own: observations continue while it waits."""
        asked = item.engine
        if item.asking or asked is None:
            return
        item.asking = True
        began = clock()

        def ask() -> None:
            ok = False
            try:
                client = engine_client(asked.url, self.settings.canary_timeout)
                path, body = canary_request(asked)
                ok = client.post(path, body, headers={"X-Request-Id": "sparkfleet-canary"}).status == 200
            except Exception:
                ok = False
            finally:
                item.canary = Canary(began, ok, clock() - began)
                item.asking = False

        try:
            threading.Thread(target=ask, name="canary", daemon=True).start()
        except RuntimeError as error:  # no more threads: this means nothing about the engine
            item.asking = False
            self.complain("canary", str(error))

    # -- engines that start on demand --------------------------------------------------------------------------

    def _shut(self, item: Watched) -> None:
        """Close an engine's door."""
        if item.door is not None:
            self.doors.close(item.door)
            item.door.set(State(why="is not here any more", retry_after=None))
            item.door = None

    def _open_doors(self) -> None:
        """Have a door open for each engine that starts on demand. One whose port the switch that runs gives to another
        engine is closed."""
        claimed: set[int] = set()
        journal = self.store.switch() if self.store.switch_active() else None
        if journal is not None:
            with contextlib.suppress(ReleaseError):
                claimed = {made.port for made in self.store.engines(journal["to"])}
        settings = self.settings
        for item in self.watched.values():
            made = item.engine
            plan = made.on_demand if made is not None else None
            door = item.door
            if made is None or plan is None or plan.port in claimed:
                self._shut(item)
                continue
            if door is not None and (door.repo, door.port, door.engine_port) == (made.repo, plan.port, made.port):
                continue
            self._shut(item)
            door = Door(
                *(made.repo, plan.port, made.port),
                way=settings.on_demand_wait,
                hold_seconds=settings.on_demand_hold_seconds,
                asked=self.wake.set,
            )
            try:
                self.doors.open(door, settings.listen_address)
                item.door = door
                if threading.current_thread() is threading.main_thread():
                    signal.signal(signal.SIGTERM, self._told_to_end)
            except (OSError, RuntimeError) as error:
                reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
                self.complain(f"{item.name}: port {plan.port} of its clients", f"{reason}; trying again")

    def _told_to_end(self, *_: object) -> None:
        self.ends = self.ends or clock() + FINISH_SECONDS
        self.wake.set()

    def ended(self) -> bool:
        """Whether the guard was told to end, and its doors are passing on nothing any more. What waits then is answered
        with 503, and may come again at once: to the next guard."""
        if self.ends is None:
            return False
        doors = [item.door for item in self.watched.values() if item.door is not None]
        if any(door.active for door in doors) and clock() < self.ends:
            return False
        for door in doors:
            door.turn_away()
        time.sleep(POLL * 3 if any(door.waiting for door in doors) else 0)
        return True

    def _seat(self, item: Watched, door: Door) -> Seat:
        seen, made = item.seen, item.engine
        now = time.monotonic()
        asked = door.asked_at is not None and (door.waiting or now - door.asked_at < WANTED_SECONDS)
        serving = item.guard.engine == "serving"
        item.ready_at = (item.ready_at or clock()) if serving else None
        return Seat(
            item.service,
            item.guard.engine,
            runs=seen is not None and seen.state in ("running", "restarting", "paused"),
            busy=bool(door.active or item.asking or (seen and (seen.running or seen.waiting))),
            unused=None if door.used is None else now - door.used,
            ready=None if item.ready_at is None else clock() - item.ready_at,
            wanted=now - door.wanted if asked and door.wanted is not None else None,
            needs=made.on_demand.needs_gib if made and made.on_demand else None,
        )

    def _swap(self) -> None:
        """Start what requests wait for, once what must make room for it has finished."""
        self._open_doors()
        items = {item.service: (item, item.door) for item in self.watched.values() if item.door is not None}
        if not items:
            return
        moment = Instant(time.time(), clock(), self.boot_id)
        seats = [self._seat(item, door) for item, door in items.values()]
        rooms = [item.engine.on_demand.room_gib for item, _ in items.values() if item.engine and item.engine.on_demand]
        known = [room for room in rooms if room is not None]
        loading = any(item.loads for item in self.watched.values())
        # A switch makes room for what it verifies, whatever serves: new requests wait meanwhile.
        journal = self.store.switch() if self.store.switch_active() else None
        if journal is not None and journal["phase"] not in ("", switch.CHECKING, DONE):
            seats = [dataclasses.replace(seat, state="switching") for seat in seats]
        if self.ends is not None:
            for _, door in items.values():
                door.set(State(why="waits for the guard", retry_after=1.0))
            return
        decision = self.on_demand.decide(seats, min(known) if len(known) == len(rooms) else None, moment, loading)
        for service, (_, door) in items.items():
            door.set(decision.doors[service])
        if decision.stop or decision.start:
            with self._going_on("on demand"):
                self._make_room(decision, moment)

    def _make_room(self, decision: Decision, moment: Instant) -> None:
        with self.store.exclusive(HELD_BY_GUARD) as mine:
            if not mine or self._interrupted() or self.store.halted():
                return
            for service in decision.stop:
                item = self.watched[service]
                if item.door is None or item.door.active or not self._is_idle(item):
                    continue
                self.notify.alive()
                self.say(f"{item.name}: stopping it, its place is needed")
                engine.stop(self.docker, service, STOP_SECONDS)
                self.wake.set()
            if decision.start:
                item = self.watched[decision.start]
                if item.seen is not None:
                    item.guard.demand(item.seen)
                    self.on_demand.note_start(item.service, moment)
                    self.wake.set()

    def _is_idle(self, item: Watched) -> bool:
        """Whether the engine itself says that it computes nothing; one that hangs has nothing to lose."""
        assert item.engine is not None
        try:
            answer = engine_client(item.engine.url, PROBE_SECONDS).get("/metrics", PROBE_SECONDS, limit=METRICS_LIMIT)
        except HttpError:
            return item.guard.engine == "wedged"
        found = figures(answer.text)
        return not (found.get("num_requests_running") or found.get("num_requests_waiting"))

    def pause(self, seconds: float) -> None:
        """Wait for the next observation; shorter while a request waits."""
        doors = [item.door for item in self.watched.values() if item.door is not None]
        if not doors:
            time.sleep(seconds)
            return
        if self.ends is not None or any(door.waiting or door.wanted is not None for door in doors):
            seconds = min(seconds, QUICK_SECONDS)
        self.wake.wait(seconds)
        self.wake.clear()

    def _data(self) -> dict[str, Any]:
        """The content of the state file."""
        waiting = {item.service: item.door.waiting for item in self.watched.values() if item.door is not None}
        return {
            "on_demand": {**self.on_demand.data(), "waiting": waiting},
            **{"at": time.time(), "clock": clock(), "boot_id": self.boot_id, "release": self.store.current()},
            "engines": {service: item.guard.data() for service, item in self.watched.items()},
        }

    def save(self) -> None:
        """Write state and metrics, when something has changed or it is time."""
        data = self._data()
        try:
            text = json.dumps({key: value for key, value in data.items() if key not in ("at", "clock")}, sort_keys=True)
            self.page = metrics(data)
            if text == self._saved and clock() - self._saved_at < SAVE_SECONDS:
                return
            write_json(self.store.state_dir / STATE_FILE, data)
            write_text(self.store.state_dir / METRICS_FILE, self.page)
        except Exception as error:  # what is about to be done matters more than its record
            known = isinstance(error, OSError) and error.strerror
            self.complain("the state cannot be written", str(known or f"{type(error).__name__}: {error}"))
            return
        self._saved, self._saved_at = text, clock()

    def step(self) -> dict[str, Action]:
        """One observation, one decision, one action for each engine; the actions, by service. What a switch left
        undone is ended once for all of them."""
        self.refresh()
        actions: dict[str, Action] = {}
        for item in self.watched.values():
            try:
                actions[item.service] = self._watch(item)
            except Exception as error:  # the others are watched all the same
                which = f"{item.name}: " if len(self.watched) > 1 else ""
                self.complain(f"{which}this observation failed", f"{type(error).__name__}: {error}")
        cut = any(action.do == "recover" for action in actions.values())
        if not self.watched:
            cut = self._interrupted()
            self.idle = "switching" if cut or self.store.switch_active() else "missing"
            self.looked_at = clock()
        if cut:
            with self._going_on("recover"):
                self._recover()
        with self._going_on("on demand"):
            self._swap()
        self.save()
        return actions

    def _watch(self, item: Watched) -> Action:
        seen = item.seen = self.observe(item)
        item.looked_at = clock()
        self.notify.alive()
        before, ready, began = item.guard.engine, item.guard.ready_since, item.guard.healing
        action = item.guard.decide(seen)
        if seen.worker or (item.engine and item.engine.is_worker and seen.state == "missing"):
            self.follow(item)
        if item.guard.engine != before:
            self.say(f"{item.name}: {before} → {item.guard.engine}")
        if item.guard.ready_since not in ("", ready):
            self._keep_figures(item, seen)
            if began and began["reason"] == DEMAND:
                took = _age(began, seen)
                self.on_demand.note_ready(item.service, took or 0.0)
                self.say(f"{item.name}: ready {took or 0.0:.0f} s after a request asked for it")
        if action.do not in ("nothing", "recover"):
            self.act(item, action, seen)
        return action

    def _keep_figures(self, item: Watched, seen: Observation) -> None:
        """Keep what the log of an engine that has become ready shows, beside its release. A switch keeps the figures of
        those that it started itself."""
        if item.engine is None or seen.release is None:
            return
        try:
            kept = measured.of_release(self.store, seen.release)
            if any((one["service"], one["started_at"]) == (item.service, seen.started_at) for one in kept):
                return
            record = measured.of_start(self.docker, item.engine, seen.now)
            measured.keep_start(self.store, seen.release, [record])
        except Exception as error:  # they are advice
            self.complain(f"{item.name}: its figures could not be kept", f"{type(error).__name__}: {error}")

    def survive(self) -> None:
        """`step`, whatever happens in it: the guard continues."""
        try:
            self.step()
        except Exception as error:
            self.complain("this observation failed", f"{type(error).__name__}: {error}")

    def answer(self, target: str) -> tuple[int, str]:
        """Of /ready (200 only while all engines serve; with `?model=` while that model's does, with `&key=` as long as
        their key has that name) and /metrics."""
        try:
            parts = urlsplit(target)
        except ValueError:
            return 400, "not a path\n"
        if parts.path == "/metrics":
            return 200, self.page
        if parts.path == ranks.PATH:
            return 200, ranks.as_text(ranks.status(self.store, Docker(self.docker.socket_path, PROBE_SECONDS)))
        if parts.path != "/ready":
            return 404, "there are /ready, /metrics and /group\n"
        try:
            asked = parse_qs(parts.query, keep_blank_values=True, max_num_fields=8).get("key")
            if asked is not None and asked != [engine_key.current()]:
                return 503, "another-key\n"
            return readiness(parts.query, self._states(), self._fresh(self.idle, self.looked_at))
        except ValueError:
            return 400, "parameters: model, key\n"

    def _states(self) -> list[tuple[str, str]]:
        """Model and state of each engine. One that starts on demand answers through its door while it does not run."""
        found = []
        for item in self.watched.values():
            state = item.guard.engine
            if item.door is not None and state in (ASLEEP, "loading"):
                state = "serving"
            found.append((item.engine.repo if item.engine else "", self._fresh(state, item.looked_at)))
        return found

    @staticmethod
    def _fresh(state: str, looked_at: float) -> str:
        """A state, unless nothing was observed for long."""
        return state if clock() - looked_at < FRESH_SECONDS else STUCK

    def open_window(self) -> bool:
        """Serve /ready and /metrics, a thread an address; False, and a message, if one of them cannot be listened on:
        it is in use, or the host does not have it yet."""
        port = self.settings.listen_port
        for address in self.settings.listen_address:
            if address in self._listening:
                continue
            try:
                StatusServer([address], port, self.answer).start()
                self._listening.add(address)
            except (OSError, RuntimeError) as error:
                reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
                where = f"port {port} of /ready and /metrics" + (f" on {address}" if address else "")
                self.complain(where, f"{reason}; trying again")
        return self._listening >= {*self.settings.listen_address}


def canary_request(asked: Engine) -> tuple[str, dict[str, Any]]:
    """Path and body of what costs an engine the least: a token, or a number for a model that gives no text."""
    kinds = asked.verify.get("kinds", ())
    if "embeddings" in kinds:
        return pooling.EMBEDDINGS, {"model": asked.repo, "input": "1"}
    if "rerank" in kinds:
        return pooling.RERANK, {"model": asked.repo, "query": "1", "documents": ["1"]}
    if "classify" in kinds:
        return pooling.CLASSIFY, {"model": asked.repo, "input": "1"}
    return asking.COMPLETIONS, {"model": asked.repo, "prompt": "1", "max_tokens": 1, "temperature": 0}


def readiness(query: str, engines: Sequence[tuple[str, str]], idle: str) -> tuple[int, str]:
    """Status and text of GET /ready. `engines`: model and state of each; `idle`: the state of a host without any. 200
    while all serve; with `model=REPO`, while one of that model does. The text names the models. Raises ValueError for
    a query of more than a few parameters."""
    wanted = parse_qs(query, keep_blank_values=True, max_num_fields=8).get("model") if query else None
    asked = engines if wanted is None else [pair for pair in engines if [pair[0]] == wanted]
    serving = [model for model, state in asked if state == "serving"]
    if serving and (wanted is not None or len(serving) == len(engines)):
        return 200, f"serving {', '.join(dict.fromkeys(serving))}\n"
    states = {state for _, state in asked or engines} or {idle}
    state = next((state for state in (STUCK, *WORST_FIRST) if state in states), idle)
    return 503, "another-model\n" if state == "serving" else f"{state}\n"


def drop_page_cache() -> None:
    """Drop the page cache where that is allowed."""
    with contextlib.suppress(OSError):
        memory.drop_page_cache()


def foreign(docker: Docker) -> tuple[str, ...]:
    """Names of the running containers that are not ours. Raises DockerError."""
    own = {item["Id"] for item in engine.ours(docker)}
    return tuple(engine.name_of(item) for item in docker.containers(all=False) if item["Id"] not in own)


def restart_docker(pid_file: str = DOCKER_PID) -> None:
    """End dockerd, which systemd then starts again (Restart=always in every package of it). `systemctl` would need
    rights over the host that the guard does not have. Raises OSError."""
    try:
        pid = as_int(int(bounded.read_file(pid_file, 100).decode("ascii")), pid_file, 2, 1 << 22)
        name = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip()
    except ValueError as error:
        raise OSError(f"{pid_file}: {error}") from None
    if name != "dockerd":
        raise OSError(f"{pid_file}: process {pid} is {name!r}, not dockerd")
    os.kill(pid, signal.SIGTERM)


def say(text: str) -> None:
    """A line for the journal."""
    print(text, flush=True)


def read_settings(path: Path) -> Settings:
    """The settings of a file; the defaults where there is none. Raises ValueError, OSError."""
    try:
        return Settings.of(bounded.read_json(path))
    except FileNotFoundError:
        return Settings()


def main(argv: Sequence[str] | None = None) -> int:
    """`guard [--settings FILE]`: runs until it is stopped. Exits with 2 for damaged settings; systemd does not
    restart it then."""
    parser = argparse.ArgumentParser(prog="sparkfleet_host guard", description="Watch the engine, restart it.")
    parser.add_argument("--settings", default=SETTINGS_FILE)
    parser.add_argument("--docker", default=SOCKET, metavar="SOCKET")
    parser.add_argument("--lock-file", default=LOCK_FILE)
    options = parser.parse_args(argv)
    notify = Notify(os.environ)
    try:
        settings = read_settings(Path(options.settings))
    except (ValueError, OSError) as error:
        text = printable(str(error).removeprefix(f"{options.settings}: "), 500)
        print(f"{options.settings}: {text}; run site.yml, which writes it again", file=sys.stderr)
        notify("STATUS=its settings are damaged", "ERRNO=22")
        return 2
    store = Store(settings.project_dir, settings.state_dir, options.lock_file)
    docker = Docker(options.docker, DOCKER_SECONDS)
    watcher = Watcher(settings, store, docker, say, notify)
    notify("READY=1")
    tried = -math.inf if settings.listen_port else math.inf
    while True:
        began = clock()
        if began - tried >= WINDOW_SECONDS:
            tried = math.inf if watcher.open_window() else began
        watcher.survive()
        notify.alive()
        if watcher.ended():
            return 0
        watcher.pause(max(settings.interval - (clock() - began), 0.05))
