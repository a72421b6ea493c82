# SPDX-License-Identifier: Apache-2.0
"""The guard of a host: sees an engine that has crashed or hangs, starts it anew, and knows when to stop.

Health codes lie (vLLM's /health stays 200 with a wedged engine), so what counts is progress: counters of tokens that
move, or a one-token canary that comes back. `Guard` decides from observations and a clock alone; `main` looks and acts.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import http.server
import json
import re
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import engine, memory, switch
from .docker import Docker, DockerError, DockerUnavailable
from .engine import EngineError
from .http import HttpError, engine_client
from .redaction import redact
from .releases import PROJECT_DIR, STATE_DIR, ReleaseError, Store, read_json, write_json, write_text

SETTINGS_FILE = "/etc/sparkfleet/guard.json"
STATE_FILE = "guard-state.json"
METRICS_FILE = "metrics/sparkfleet.prom"
STOP_SECONDS = 10  # until an engine that crashed or hangs is killed
LOOK_SECONDS = 5.0  # for /health and /metrics
BACK_SECONDS = 10.0  # after a start of the host or of Docker in which it may still bring its containers back
SAVE_SECONDS = 30.0  # at least so often the state is written, moved or not
FRESH_SECONDS = 60.0  # a look may take as long as Docker needs to stop an engine
WINDOW_SECONDS = 60.0  # between two tries to listen
LOG_SECONDS = 600.0  # a start without a word for so long hangs
LOG_LINES = 150  # of an engine that was given up
KEPT_RESTARTS = 50
#: States of an engine, as state file and metrics name them.
SERVED = ("serving", "loading", "healing", "wedged")
STATES = (*("serving", "loading", "stopped", "wedged", "healing", "given-up", "missing", "switching", "docker-down"),)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Seconds, but for `max_restarts`. An engine that makes no progress for `wedge_seconds`, and lets a canary wait
    for `canary_timeout`, hangs. After `max_restarts` within `restart_window` the guard gives up. `listen_port`: of
    /ready and /metrics, 0 for none."""

    interval: float = 2.0
    metrics_interval: float = 5.0
    wedge_seconds: float = 180.0
    canary_interval: float = 60.0
    canary_timeout: float = 60.0
    max_restarts: int = 3
    restart_window: float = 3600.0
    start_timeout: float = 1800.0
    listen_port: int = 0
    project_dir: str = PROJECT_DIR
    state_dir: str = STATE_DIR

    @classmethod
    def of(cls, data: dict[str, Any]) -> Settings:
        """From a file; what is not known is an error. Raises ValueError."""
        known = {field.name: field.type for field in dataclasses.fields(cls)}
        unknown = sorted(set(data) - set(known))
        if unknown:
            raise ValueError(f"unknown settings {', '.join(unknown)}; there are {', '.join(known)}")
        return cls(**data)


@dataclasses.dataclass(frozen=True)
class Canary:
    """A request of one token: when it began (monotonic), whether it came back, after how many seconds."""

    began: float
    ok: bool
    seconds: float


@dataclasses.dataclass(frozen=True)
class Observation:
    """What a look saw. `state`: missing, exited, restarting, running, paused; `progress`: counters that only a living
    engine moves, None where /metrics does not answer; `canary`: the one that has ended since the last look."""

    now: float  # Unix time
    clock: float  # monotonic
    boot_id: str = "boot"
    docker: bool = True
    switching: bool = False
    interrupted: bool = False
    release: int | None = 1
    state: str = "running"
    started_at: str = ""  # RFC 3339
    restart_count: int = 0
    how: str = ""  # how the container ended last, in words
    logged: float | None = None  # Unix time of the last log line; only while loading
    healthy: bool = True
    progress: tuple[float, ...] | None = None
    running: float = 0.0
    waiting: float = 0.0
    tokens: float = 0.0  # generated so far
    canary: Canary | None = None
    limit: float = 0.0  # tokens a second that memory bandwidth allows one stream; 0 for unknown


@dataclasses.dataclass(frozen=True)
class Action:
    """What to do: nothing, canary, restart, adopt (Docker has started it anew), start, give-up, recover; and why."""

    do: str = "nothing"
    reason: str = ""
    detail: str = ""


NOTHING = Action()


class Guard:
    """Decides. `data` is what is kept across its own restarts: the content of the state file."""

    def __init__(self, settings: Settings, data: dict[str, Any] | None = None) -> None:
        self.settings = settings
        data = data or {}
        self.engine = str(data.get("engine") or "missing")
        self.boot_id = str(data.get("boot_id") or "")
        self.restarts: list[dict[str, Any]] = list(data.get("restarts") or [])
        self.totals: dict[str, int] = dict(data.get("restarts_total") or {})
        self.given_up: dict[str, Any] | None = data.get("given_up")
        self.healing: dict[str, Any] | None = data.get("healing")
        self.known: dict[str, Any] = dict(data.get("known") or {})  # started_at, restart_count, ready, release
        self.canary: dict[str, Any] | None = data.get("canary")
        self.served = bool(data.get("served", self.engine in SERVED))  # before the host or Docker went down
        self.lost = ""  # what may have taken the engine along: boot, docker
        self.since = float(data.get("since") or 0.0)
        self.forgiven = float(data.get("forgiven") or 0.0)  # restarts before this do not count any more, Unix time
        self.running = self.waiting = 0.0
        self.tokens_per_second: float | None = None
        self.slow = False
        self._progress: tuple[float, ...] | None = None
        self._moved: float | None = None  # when it last did, monotonic
        self._asked = 0.0  # when the last canary began, monotonic
        self._rate: tuple[float, float] | None = None  # clock and tokens at the beginning of a measurement
        self._exited: float | None = None  # since when, monotonic

    # -- the decision ----------------------------------------------------------------------------------------

    def decide(self, seen: Observation) -> Action:
        """What to do about what was seen. Changes only the guard's own memory."""
        rebooted = bool(self.boot_id) and self.boot_id != seen.boot_id
        if rebooted:
            self.known.update(restart_count=0)
            self.lost = "boot" if self.served else ""
        self.boot_id = seen.boot_id
        if not seen.docker:
            self.lost = self.lost or ("docker" if self.served else "")
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
            # Somebody deployed: a new start, and a clean slate.
            self.known = {"release": seen.release, "started_at": seen.started_at, "restart_count": seen.restart_count}
            self.given_up = self.healing = None
            self.forgiven = seen.now
            self._forget()
        if self.given_up and self._started_since_giving_up(seen):
            self.given_up, self.forgiven = None, seen.now
        if seen.state in ("exited", "paused"):
            return self._stopped(seen)
        self._exited, self.lost = None, ""
        if self.given_up:
            return Action("give-up", "again", "it was started by Docker")
        if self.healing and engine.instant(seen.started_at)[0] >= int(self.healing["at"]):
            self.healing["started"] = True
        count = int(self.known.get("restart_count") or 0)
        if seen.restart_count > count or (seen.state == "restarting" and not self.healing):
            self._is("healing", seen)
            return self._restart("crash", seen.how or "it ended by itself", seen, "adopt")
        if seen.state == "restarting":
            return self._is("healing", seen)
        if seen.started_at != self.known.get("started_at"):
            # Started by a person, by Docker after a restart of itself or of the host, or by us.
            self.known.update(started_at=seen.started_at, restart_count=seen.restart_count, ready=False)
            self._forget()
        if not self.known.get("ready"):
            return self._loading(seen)
        return self._serving(seen)

    def _stopped(self, seen: Observation) -> Action:
        """Docker starts what crashes. This one a person stopped, or we did, or it went down with host or Docker."""
        if self.given_up:
            return self._is("given-up", seen)
        if self.healing and not self.healing.get("started") and seen.state == "exited":
            return dataclasses.replace(self._is("healing", seen), do="start", reason=self.healing["reason"])
        if self._exited is None:
            self._exited = seen.clock
        if self.lost and seen.state == "exited":
            # Docker 26 forgets an engine that ran when dockerd was killed.
            if seen.clock - self._exited < BACK_SECONDS:
                return self._is("loading", seen)
            self.healing = {"reason": self.lost, "at": seen.now}
            return dataclasses.replace(self._is("healing", seen), do="start", reason=self.lost)
        self.healing = None
        return self._is("stopped", seen)

    def _loading(self, seen: Observation) -> Action:
        """Never ready since it was started: it may take its time, as long as its log moves."""
        if seen.healthy:
            self.known["ready"] = True
            self._moved, self._progress = seen.clock, seen.progress
            if self.healing:
                self._back(seen)
            return self._is("serving", seen)
        started, _ = engine.instant(seen.started_at)
        took = seen.now - started if started else 0.0
        silent = seen.now - (seen.logged or started) if started else 0.0
        if took > self.settings.start_timeout and silent > min(LOG_SECONDS, self.settings.start_timeout):
            detail = f"not ready after {took:.0f} s, nothing in its log for {silent:.0f} s"
            return self._restart("hung-start", detail, seen)
        return self._is("healing" if self.healing else "loading", seen)

    def _serving(self, seen: Observation) -> Action:
        """It was ready: does it still get on?"""
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
            if still >= self.settings.wedge_seconds:
                detail = (
                    f"no token for {still:.0f} s with {seen.running:.0f} requests running and {seen.waiting:.0f} "
                    f"waiting, and a canary was not answered in {seen.canary.seconds:.0f} s"
                )
                self._is("wedged", seen)
                return self._restart("wedge", detail, seen)
            return self._is("wedged", seen)
        wedged = self.engine == "wedged" and still >= self.settings.canary_interval
        # Tokens that flow are the best canary.
        due = still >= self.settings.canary_interval and seen.clock - self._asked >= self.settings.canary_interval
        if due or (wedged and seen.clock - self._asked >= self.settings.canary_timeout):
            self._asked = seen.clock
            return dataclasses.replace(self._is("wedged" if wedged else "serving", seen), do="canary")
        return self._is("wedged" if wedged else "serving", seen)

    def _restart(self, reason: str, detail: str, seen: Observation, do: str = "restart") -> Action:
        """Start it anew, or let Docker do so, unless that was done too often."""
        window = self.settings.restart_window
        recent = [item for item in self.restarts if seen.now - window < float(item["at"]) > self.forgiven]
        if len(recent) >= self.settings.max_restarts:
            why = f"{len(recent)} restarts in {window:.0f} s, and again: {reason}, {detail}"
            self.given_up = {"at": seen.now, "reason": why}
            self._is("given-up", seen)
            return Action("give-up", reason, why)
        self.healing = {"reason": reason, "at": seen.now, "started": do == "adopt"}
        self.restarts = [*self.restarts[1 - KEPT_RESTARTS :], {"at": seen.now, "reason": reason, "detail": detail}]
        self.totals[reason] = self.totals.get(reason, 0) + 1
        # What we start counts from nought.
        self.known.update(restart_count=seen.restart_count if do == "adopt" else 0, ready=False)
        self._forget()
        return Action(do, reason, detail)

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
        self.tokens_per_second, self.slow = None, False

    def _back(self, seen: Observation) -> None:
        began = float((self.healing or {}).get("at") or seen.now)
        self.healing = None
        if self.restarts and self.restarts[-1]["at"] == began:
            self.restarts[-1]["back_after_s"] = round(seen.now - began, 1)

    def _started_since_giving_up(self, seen: Observation) -> bool:
        started, _ = engine.instant(seen.started_at)
        return seen.state == "running" and started > float((self.given_up or {})["at"])

    def _measure(self, seen: Observation) -> None:
        """Tokens a second over half a minute or more in which exactly one request ran."""
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
            # A prefill gives no tokens: nought is no rate.
            self.slow = 0 < self.tokens_per_second < seen.limit / 4
            self._rate = (seen.clock, seen.tokens)

    def data(self, now: float) -> dict[str, Any]:
        """What is kept, and what status and diagnose read."""
        return {
            "at": now,
            "engine": self.engine,
            "served": self.served,
            "since": self.since,
            "release": self.known.get("release"),
            "restarts": self.restarts,
            "restarts_total": self.totals,
            "given_up": self.given_up,
            "healing": self.healing,
            "canary": self.canary,
            "running": self.running,
            "waiting": self.waiting,
            "tokens_per_second": self.tokens_per_second,
            "slow": self.slow,
            "boot_id": self.boot_id,
            "known": self.known,
            "forgiven": self.forgiven,
        }


def metrics(data: dict[str, Any]) -> str:
    """The state as Prometheus text, for node_exporter's textfile collector."""
    lines: list[str] = []

    def add(name: str, kind: str, text: str, samples: dict[str, float]) -> None:
        lines.append(f"# HELP sparkfleet_{name} {text}")
        lines.append(f"# TYPE sparkfleet_{name} {kind}")
        lines.extend(f"sparkfleet_{name}{labels} {value:g}" for labels, value in samples.items())

    state = data["engine"]
    add("engine_up", "gauge", "Whether the engine serves.", {"": float(state == "serving")})
    states = {f'{{state="{name}"}}': float(name == state) for name in STATES}
    add("engine_state", "gauge", "State of the engine, 1 for the one it is in.", states)
    totals = {f'{{reason="{name}"}}': float(data["restarts_total"].get(name, 0)) for name in REASONS}
    add("engine_restarts_total", "counter", "Restarts by the guard.", totals)
    add("engine_given_up", "gauge", "Whether the guard gave up.", {"": float(bool(data["given_up"]))})
    add("engine_slow", "gauge", "Whether one stream is far below the plan's limit.", {"": float(data["slow"])})
    add("release", "gauge", "Number of the current release, 0 for none.", {"": float(data["release"] or 0)})
    if data["canary"]:
        add("canary_ok", "gauge", "Whether the last canary was answered.", {"": float(data["canary"]["ok"])})
        add("canary_seconds", "gauge", "Duration of the last canary.", {"": float(data["canary"]["seconds"])})
    lines.append("# HELP sparkfleet_guard_last_look_seconds Unix time of the guard's last look.")
    lines.append("# TYPE sparkfleet_guard_last_look_seconds gauge")
    lines.append(f"sparkfleet_guard_last_look_seconds {data['at']:.0f}")
    return "\n".join(lines) + "\n"


REASONS = ("crash", "wedge", "hung-start")
_SAMPLE = re.compile(r"(?:ray_)?vllm[:_](\w+?)(?:_total)*(?:\{.*\})?\s+([-+.\deEinfNa]+)(?:\s+\d+)?$")
#: Of vLLM's metrics, those that only an engine that computes moves; in a long prefill it is the KV cache that grows.
_MOVING = (
    *("generation_tokens", "prompt_tokens", "request_success", "num_preemptions", "kv_cache_usage_perc"),
    *("gpu_cache_usage_perc", "prefix_cache_queries", "gpu_prefix_cache_queries", "iteration_tokens_total_count"),
)


def figures(text: str) -> dict[str, float]:
    """Those of vLLM's metrics that the guard reads, summed over their label sets."""
    sums: dict[str, float] = {}
    wanted = {*_MOVING, "num_requests_running", "num_requests_waiting"}
    for line in text.splitlines():
        found = _SAMPLE.match(line)
        if found and found[1] in wanted:
            with contextlib.suppress(ValueError):
                sums[found[1]] = sums.get(found[1], 0.0) + float(found[2])
    return sums


class Watcher:
    """Looks and acts. `store` and `docker` are those of the host."""

    def __init__(self, settings: Settings, store: Store, docker: Docker, say: Callable[[str], None]) -> None:
        self.settings, self.store, self.docker, self.say = settings, store, docker, say
        self.guard = Guard(settings, read_json(store.state_dir / STATE_FILE))
        self.boot_id = switch.boot_id()
        self._canary: Canary | None = None
        self._asking = False
        self._figures: dict[str, float] | None = None
        self._read_at = self._saved_at = 0.0
        self.looked_at = time.monotonic()
        self._saved = ""
        self._name = ""
        self.model = ""  # the repository of the current release's model

    def look(self) -> Observation:
        """One look at the host."""
        known: dict[str, Any] = {
            "now": time.time(),
            "clock": time.monotonic(),
            "boot_id": self.boot_id,
        }
        if self.store.switch_active():
            return Observation(**known, switching=True)
        known.update(interrupted=switch.interrupted(self.store), release=self.store.current())
        try:
            known.update(self._engine(known["release"]))
        except (DockerUnavailable, DockerError):
            return Observation(**{**known, "docker": False})
        canary, self._canary = self._canary, None
        return Observation(**known, canary=canary)

    def _engine(self, release: int | None) -> dict[str, Any]:
        """The container of the release, its log while it loads, its metrics when it is ready."""
        if release is None:
            return {"state": "missing"}
        try:
            plan, port = self.store.plan(release), int(self.store.lock(release)["port"])
        except (ReleaseError, KeyError, ValueError):
            return {"state": "missing"}
        self._name, self.model = str(plan["service"]), str(plan.get("repo") or "")
        found = engine.look(self.docker, self._name)
        seen = {key: found[key] for key in ("state", "started_at", "restart_count")}
        killed = ", out of memory" if found["oom_killed"] else ""
        seen["how"] = found["error"] or f"exit code {found['exit_code']}{killed}"
        seen["limit"] = float((plan.get("memory") or {}).get("decode_tok_s_limit") or 0.0)
        if found["state"] != "running":
            return seen
        client = engine_client(f"http://127.0.0.1:{port}", LOOK_SECONDS)
        if not self.guard.known.get("ready"):
            seen["healthy"] = engine.healthy(client)
            lines = [] if seen["healthy"] else engine.read_log(self.docker, self._name, "", found["tty"], 1)
            seconds, _ = engine.instant(lines[-1].partition(" ")[0]) if lines else (0, 0)
            return {**seen, "logged": float(seconds) or None}
        # More than once while an engine may stand still.
        pause = min(self.settings.metrics_interval, self.settings.wedge_seconds / 4)
        if time.monotonic() - self._read_at >= pause:
            self._read_at, self._figures = time.monotonic(), None
            with contextlib.suppress(HttpError):
                answer = client.get("/metrics", LOOK_SECONDS)
                self._figures = figures(answer.text) if answer.status == 200 else None
        values = self._figures
        if values is None:
            return {**seen, "healthy": False}
        return {
            **seen,
            "progress": tuple(values.get(name, 0.0) for name in _MOVING),
            "running": values.get("num_requests_running", 0.0),
            "waiting": values.get("num_requests_waiting", 0.0),
            "tokens": values.get("generation_tokens", 0.0),
        }

    def act(self, action: Action, seen: Observation) -> None:
        """Do it; what fails is said and tried again after the next look."""
        try:
            if action.do == "canary":
                self._ask(
                    int(self.store.lock(seen.release or 0)["port"]), str(self.store.plan(seen.release or 0)["repo"])
                )
            elif action.do == "recover":
                self.say("a switch was cut; ending it")
                ended = switch.recover(self.store, self.docker)
                self.say(f"the switch ended: {ended['outcome'] if ended else 'by another'}")
            elif action.do == "restart":
                self.say(f"{self._name}: {action.reason}: {action.detail}; starting it anew")
                self.save(force=True)  # a reboot between stop and start must end in a start
                engine.stop(self.docker, self._name, STOP_SECONDS)
                self._start()
            elif action.do == "adopt":
                self.say(f"{self._name}: {action.reason}: {action.detail}; Docker starts it anew")
                drop_page_cache()  # before the engine measures what is free, some seconds after its start
            elif action.do == "start":
                self.say(f"{self._name}: starting it ({action.reason})")
                self._start()
            elif action.do == "give-up":
                self._give_up(action)
        except (DockerError, EngineError, ReleaseError, HttpError, OSError) as error:
            self.say(f"{action.do}: {error}")

    def _start(self) -> None:
        drop_page_cache()
        engine.start(self.docker, self._name)

    def _give_up(self, action: Action) -> None:
        engine.stop(self.docker, self._name, STOP_SECONDS)
        if self.guard.given_up is not None and "log" not in self.guard.given_up:
            found = engine.look(self.docker, self._name)
            lines = engine.read_log(self.docker, self._name, "", found["tty"], LOG_LINES)
            self.guard.given_up["log"] = [redact(line) for line in lines]
            self.say(f"{self._name}: giving up: {action.detail}; it stays stopped until it is deployed or started")
            for line in self.guard.given_up["log"][-10:]:
                self.say(f"  {line}")
        # Not one that was only now stopped counts as started since.
        if self.guard.given_up is not None:
            self.guard.given_up["at"] = time.time()

    def _ask(self, port: int, model: str) -> None:
        """Send a canary in a thread of its own: looks go on while it waits."""
        if self._asking:
            return
        self._asking = True
        began = time.monotonic()

        def ask() -> None:
            ok = False
            try:
                client = engine_client(f"http://127.0.0.1:{port}", self.settings.canary_timeout)
                body = {"model": model, "prompt": "1", "max_tokens": 1, "temperature": 0}
                ok = client.post("/v1/completions", body, headers={"X-Request-Id": "sparkfleet-canary"}).status == 200
            except HttpError:
                ok = False
            finally:
                self._canary = Canary(began, ok, time.monotonic() - began)
                self._asking = False

        threading.Thread(target=ask, daemon=True).start()

    def save(self, force: bool = False) -> None:
        """Write state and metrics, when something has changed or it is time."""
        data = self.guard.data(time.time())
        text = json.dumps({key: value for key, value in data.items() if key != "at"}, sort_keys=True)
        if not force and text == self._saved and time.monotonic() - self._saved_at < SAVE_SECONDS:
            return
        try:
            write_json(self.store.state_dir / STATE_FILE, data)
            write_text(self.store.state_dir / METRICS_FILE, metrics(data))
        except OSError as error:
            self.say(f"the state cannot be written: {error}")
            return
        self._saved, self._saved_at = text, time.monotonic()

    def step(self) -> Action:
        """One look, one decision, one action."""
        seen = self.look()
        self.looked_at = time.monotonic()
        before = self.guard.engine
        action = self.guard.decide(seen)
        if self.guard.engine != before:
            self.say(f"{self._name or 'engine'}: {before} → {self.guard.engine}")
        if action.do != "nothing":
            self.act(action, seen)
        self.save()
        return action


def readiness(query: str, state: str, model: str, fresh: bool) -> tuple[int, str]:
    """Status and text of GET /ready. 200 while the engine serves; asked `model=REPO`, only while it serves that one,
    which the text names then. A guard that does not look any more knows nothing."""
    wanted = urllib.parse.parse_qs(query, keep_blank_values=True, max_num_fields=8).get("model") if query else None
    if not fresh:
        return 503, "guard-stuck\n"
    if state != "serving":
        return 503, f"{state}\n"
    if wanted is not None and wanted != [model]:
        return 503, "another-model\n"
    return 200, f"serving {model}\n"


def drop_page_cache() -> None:
    """Drop it where that is allowed."""
    with contextlib.suppress(OSError):
        memory.drop_page_cache()


class Window(http.server.ThreadingHTTPServer):
    """What the guard knows, over HTTP: /ready is 200 only while the engine serves (a gateway's check), /metrics is
    Prometheus text. Reads only."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int, watcher: Watcher, address: str = "") -> None:
        self.watcher = watcher
        super().__init__((address, port), _Look)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A gateway's check hangs up once it has seen the status; that is no news for the journal."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Look(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30
    server: Window

    def do_GET(self) -> None:
        watcher = self.server.watcher
        path, _, query = self.path.partition("?")
        if path == "/ready":
            fresh = time.monotonic() - watcher.looked_at < FRESH_SECONDS
            try:
                self._send(*readiness(query, watcher.guard.engine, watcher.model, fresh))
            except ValueError:
                self._send(400, "one parameter: model\n")
        elif path == "/metrics":
            self._send(200, metrics(watcher.guard.data(time.time())))
        else:
            self._send(404, "there are /ready and /metrics\n")

    do_HEAD = do_GET

    def _send(self, status: int, text: str) -> None:
        raw = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def log_message(self, *args: Any) -> None:
        """Checks come every second."""


def open_window(watcher: Watcher, port: int) -> bool:
    """Serve `Window` in a thread; False, and a word, where the port is taken."""
    try:
        window = Window(port, watcher)
    except OSError as error:
        watcher.say(f"port {port} of /ready and /metrics: {error.strerror or error}; trying again")
        return False
    threading.Thread(target=window.serve_forever, daemon=True).start()
    return True


def say(text: str) -> None:
    """A line for the journal."""
    print(text, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """`guard [--settings FILE]`: for ever."""
    parser = argparse.ArgumentParser(prog="sparkfleet_host guard", description="Watch the engine, start it anew.")
    parser.add_argument("--settings", default=SETTINGS_FILE)
    options = parser.parse_args(argv)
    try:
        settings = Settings.of(read_json(Path(options.settings)) or {})
    except (TypeError, ValueError) as error:
        print(f"{options.settings}: {error}", file=sys.stderr)
        return 2
    watcher = Watcher(settings, Store(settings.project_dir, settings.state_dir), Docker(timeout=30.0), say)
    tried = -WINDOW_SECONDS if settings.listen_port else float("inf")
    while True:
        began = time.monotonic()
        if began - tried >= WINDOW_SECONDS:
            tried = float("inf") if open_window(watcher, settings.listen_port) else began
        watcher.step()
        time.sleep(max(settings.interval - (time.monotonic() - began), 0.05))
