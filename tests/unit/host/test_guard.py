"""The guard's decisions, by a clock of the test's own: what is healed, what is left alone, when it gives up."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.bounded import LATEST, BoundsError
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.guard import (
    REASONS,
    STATES,
    Action,
    Canary,
    Guard,
    Observation,
    Settings,
    figures,
    metrics,
    read_state,
)
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

START = 1_800_000_000.0
SETTINGS = Settings()


def stamp(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000000000Z", time.gmtime(at))


def page(*guards: Guard, **more: Any) -> str:
    """The metrics of a host with these engines."""
    engines = {f"vllm-{number}": json.loads(json.dumps(guard.data())) for number, guard in enumerate(guards, 1)}
    return metrics({"at": START + 2.4, "release": 1, "engines": engines, **more})


class Host:
    """An engine and a clock. Each `look` is one look of the guard; what it does is done to the engine."""

    def __init__(self, settings: Settings = SETTINGS, data: dict[str, Any] | None = None) -> None:
        self.settings, self.guard = settings, Guard(settings, data)
        self.now, self.did = START, []  # type: float, list[Action]
        self.load_seconds = 300.0
        self.skew = 0.0  # of the host's clock, seconds
        self.state, self.count, self.started = "running", 0, self.now - 10_000
        self.stamp = stamp(self.started)
        self.ready_at = self.started
        self.frozen = False
        self.tokens = 0.0
        self.rate = 0.0  # tokens a second; 0: idle, or a prefill
        self.kv = 0.0
        self.running = self.waiting = 0.0
        self.logged: float | None = None
        self.canary: tuple[float, float] | None = None  # began, will end at
        self.canary_after = 0.2
        self.more: dict[str, Any] = {}

    @property
    def clock(self) -> float:
        """Since boot."""
        return self.now - START + 50_000

    def observation(self) -> Observation:
        ended = None
        if self.canary and self.clock >= self.canary[1]:
            took = self.canary[1] - self.canary[0]
            ended = Canary(self.canary[0], took < self.settings.canary_timeout, took)
            self.canary = None
            if ended.ok:
                self.tokens += 1
        ready = self.now >= self.ready_at
        return Observation(
            **{
                **{"now": self.now + self.skew, "clock": self.clock, "state": self.state, "started_at": self.stamp},
                **{"restart_count": self.count, "how": "exit code 1", "logged": self.logged, "canary": ended},
                **{"healthy": ready and self.state == "running"},
                **{"progress": (self.tokens, self.kv) if ready else None, "tokens": self.tokens},
                **{"running": self.running, "waiting": self.waiting},
                **self.more,
            }
        )

    def look(self) -> Action:
        if not self.frozen:
            self.tokens += self.rate * self.settings.interval
        action = self.guard.decide(self.observation())
        if action.do in ("restart", "start"):
            self.start()
        elif action.do == "adopt" and self.state == "restarting":
            self.start(self.count)
        elif action.do == "give-up":
            self.state = "exited"
            assert self.guard.given_up
            self.guard.given_up["started_at"] = self.stamp
        elif action.do == "canary":
            after = self.settings.canary_timeout if self.frozen else self.canary_after
            self.canary = (self.clock, self.clock + min(after, self.settings.canary_timeout))
        if action.do != "nothing":
            self.did.append(action)
        self.now += self.settings.interval
        return action

    def start(self, count: int = 0) -> None:
        """The engine begins to load."""
        self.state, self.started, self.count, self.frozen = "running", self.now, count, False
        self.stamp = stamp(self.now + self.skew)
        self.ready_at, self.canary = self.now + self.load_seconds, None

    def crash(self) -> None:
        """It ends, and Docker starts it again at once."""
        self.start(self.count + 1)

    def run(self, seconds: float) -> list[str]:
        """What the guard did in this time, canaries left out."""
        before, until = len(self.did), self.now + seconds
        while self.now < until:
            self.look()
        return [action.do for action in self.did[before:] if action.do != "canary"]

    def again(self) -> None:
        """The guard itself is restarted, with the state it has written."""
        self.guard = Guard(self.settings, json.loads(json.dumps(self.guard.data())))


@pytest.fixture
def host() -> Host:
    made = Host()
    assert made.run(10) == [] and made.guard.engine == "serving"
    return made


def test_an_idle_engine_gets_a_canary_now_and_then_and_is_left_alone(host: Host) -> None:
    assert host.run(3600) == []
    canaries = [action for action in host.did if action.do == "canary"]
    assert 50 <= len(canaries) <= 60
    assert host.guard.canary and host.guard.canary["ok"]


def test_tokens_that_flow_need_no_canary(host: Host) -> None:
    host.rate, host.running = 20.0, 1
    host.run(600)
    assert host.did == []


def test_a_crash_is_healed_once_and_the_time_noted(host: Host) -> None:
    host.crash()
    assert host.run(4) == ["adopt"] and host.did[-1].reason == "crash" and host.did[-1].detail == "exit code 1"
    assert host.guard.engine == "healing"
    assert host.run(600) == [] and host.guard.engine == "serving"
    assert 298 <= host.guard.restarts[-1]["back_after_s"] <= 306
    assert host.guard.totals == {"crash": 1}


def test_a_container_that_docker_is_about_to_start_again(host: Host) -> None:
    host.state, host.count = "restarting", 1
    assert host.look().do == "adopt"


def test_dockers_pause_before_a_restart_counts_once(host: Host) -> None:
    host.state, host.count = "restarting", 1
    for _ in range(30):  # Docker waits longer from time to time
        action = host.guard.decide(host.observation())
        host.now += host.settings.interval
    assert action.do == "nothing" and host.guard.engine == "healing" and len(host.guard.restarts) == 1
    host.start(1)
    assert host.run(400) == [] and host.guard.engine == "serving" and len(host.guard.restarts) == 1


@pytest.mark.parametrize("running", [0, 3], ids=["idle", "with requests"])
def test_a_wedge_is_seen_by_tokens_that_stand_still(host: Host, running: int) -> None:
    host.running, host.rate, host.frozen = running, 20.0 * running, True
    began = host.now
    while not any(action.do == "restart" for action in host.did):
        host.look()
        assert host.now - began < 400
    assert host.did[-1].reason == "wedge"
    assert SETTINGS.wedge_seconds - 10 <= host.now - began <= SETTINGS.wedge_seconds + 2 * SETTINGS.canary_interval + 10
    assert f"{running} requests running" in host.did[-1].detail
    assert host.run(900) == []


def test_a_long_prefill_is_no_wedge(host: Host) -> None:
    # 70 billion, 128,000 tokens: a chunk takes a minute, tokens come after a quarter of an hour.
    host.running = 1
    for _ in range(15):
        host.kv += 0.05
        host.canary_after = 58
        assert host.run(60) == []


def test_a_prefill_step_of_two_minutes_is_no_wedge(host: Host) -> None:
    host.running, host.canary_after = 1, 120.0  # the canary waits for the step, and is given up
    for _ in range(10):
        host.kv += 0.05
        assert host.run(120) == []


def test_a_full_queue_lets_the_canary_wait_while_tokens_flow(host: Host) -> None:
    host.running, host.waiting, host.rate, host.canary_after = 64, 200, 300.0, 10_000
    assert host.run(3600) == []


def test_a_quiet_hour_with_long_prefills_has_no_restart(host: Host) -> None:
    for minute in range(60):
        host.running = minute % 3
        host.kv = minute / 60
        host.rate = 15.0 if minute % 10 < 3 else 0.0
        host.canary_after = (0.2, 30.0, 59.0, 100.0)[minute % 4]
        host.run(60)
    assert [action for action in host.did if action.do != "canary"] == []
    assert host.guard.engine in ("serving", "wedged") and host.guard.restarts == []


def test_a_first_load_of_50_minutes_with_a_moving_log(host: Host) -> None:
    host.load_seconds = 3000
    host.more = {"release": 2}
    host.start()
    for _ in range(100):
        host.logged = host.now
        assert host.run(30) == []
    assert host.run(60) == [] and host.guard.engine == "serving"


def test_a_load_that_hangs_is_restarted(host: Host) -> None:
    host.load_seconds = 1e9
    host.more = {"release": 2}
    host.start()
    host.logged = host.now
    assert host.run(SETTINGS.start_timeout - 10) == [] and host.guard.engine == "loading"
    assert host.run(30) == ["restart"] and host.did[-1].reason == "hung-start"


def loop(host: Host, seconds: float = 7200) -> list[str]:
    """An engine that crashes five seconds after each start."""
    done: list[str] = []
    until = host.now + seconds
    while host.now < until:
        if host.state == "running" and host.now - host.started > 5 and not host.now >= host.ready_at:
            host.crash()
        done += host.run(SETTINGS.interval)
    return done


def test_restarts_are_capped(host: Host) -> None:
    host.crash()
    assert loop(host) == ["adopt"] * 3 + ["give-up"]
    assert host.guard.engine == "given-up" and host.state == "exited"
    assert host.guard.given_up and "3 restarts in 3600 s, and again: crash" in host.guard.given_up["reason"]


def test_the_cap_holds_over_restarts_of_the_guard_and_of_the_host(host: Host) -> None:
    host.crash()
    done = loop(host, 12)
    host.again()
    done += loop(host, 60)
    assert done == ["adopt"] * 3 + ["give-up"]
    host.again()
    host.more = {"boot_id": "another"}
    assert host.run(600) == [] and host.guard.engine == "given-up"


def test_giving_up_ends_when_somebody_starts_it(host: Host) -> None:
    host.crash()
    loop(host, 60)
    host.now += 100
    host.start()
    assert host.run(400) == [] and host.guard.engine == "serving" and host.guard.given_up is None
    host.crash()
    assert host.run(4) == ["adopt"]  # what was before does not count any more


def test_giving_up_ends_with_another_release(host: Host) -> None:
    host.crash()
    loop(host, 60)
    host.more = {"release": 2}
    host.start()
    assert host.run(400) == [] and host.guard.engine == "serving"


def test_restarts_that_are_long_ago_do_not_count(host: Host) -> None:
    for _ in range(6):
        host.crash()
        assert host.run(1800) == ["adopt"]


def test_what_a_person_stopped_stays_stopped(host: Host) -> None:
    host.state = "exited"
    assert host.run(3600) == [] and host.guard.engine == "stopped"
    host.start()
    assert host.run(400) == [] and host.guard.engine == "serving"


def test_a_paused_engine_is_left_alone(host: Host) -> None:
    host.state = "paused"
    assert host.run(3600) == [] and host.guard.engine == "stopped"


def test_nothing_is_done_while_a_switch_runs(host: Host) -> None:
    host.more = {"switching": True}
    host.crash()
    host.state = "restarting"
    assert host.run(600) == [] and host.guard.engine == "switching"
    host.more = {"release": 2}
    host.start()
    assert host.run(400) == [] and host.guard.engine == "serving"


def test_a_switch_that_was_cut_is_ended(host: Host) -> None:
    host.more = {"interrupted": True}
    assert host.look().do == "recover"


def test_a_restart_of_docker_is_no_crash(host: Host) -> None:
    host.more = {"docker": False}
    assert host.run(60) == [] and host.guard.engine == "docker-down"
    host.more = {}
    host.start()
    assert host.run(400) == [] and host.guard.engine == "serving" and host.guard.restarts == []


def test_an_engine_that_docker_forgets_is_started(host: Host) -> None:
    host.more = {"docker": False}
    host.run(6)
    host.more, host.state = {}, "exited"
    assert host.run(8) == []
    assert host.run(8) == ["start"]
    assert host.run(400) == [] and host.guard.engine == "serving" and host.guard.restarts == []


def test_one_that_was_stopped_before_docker_went_stays_stopped(host: Host) -> None:
    host.state = "exited"
    host.run(60)
    host.more = {"docker": False}
    host.run(60)
    host.more = {}
    assert host.run(600) == [] and host.guard.engine == "stopped"


def test_a_person_may_stop_an_engine_that_is_being_healed(host: Host) -> None:
    host.crash()
    assert host.run(30) == ["adopt"] and host.guard.engine == "healing"
    host.state = "exited"
    assert host.run(600) == [] and host.guard.engine == "stopped"


def test_a_person_may_stop_an_engine_soon_after_a_reboot(host: Host) -> None:
    host.again()
    host.more = {"boot_id": "another"}
    host.start()
    host.run(20)
    host.state = "exited"
    assert host.run(600) == [] and host.guard.engine == "stopped"


def test_a_reboot_is_no_crash(host: Host) -> None:
    host.count = 2
    host.guard.known["restart_count"] = 2
    host.again()
    host.more = {"boot_id": "another"}
    host.start()
    assert host.run(400) == [] and host.guard.engine == "serving"


def test_an_engine_that_docker_does_not_bring_back_after_a_reboot_is_started(host: Host) -> None:
    host.again()
    host.more, host.state = {"boot_id": "another"}, "exited"
    assert host.run(8) == []
    assert host.run(8) == ["start"]
    assert host.run(400) == [] and host.guard.engine == "serving"


def test_one_that_was_stopped_before_the_reboot_stays_stopped(host: Host) -> None:
    host.state = "exited"
    host.run(60)
    host.again()
    host.more = {"boot_id": "another"}
    assert host.run(600) == []


def test_a_guard_that_is_killed_between_stop_and_start(host: Host) -> None:
    host.frozen, action = True, host.look()
    while action.do != "restart":  # written down, then the stop, then the end
        if action.do == "canary":
            host.canary = (host.clock, host.clock + host.settings.canary_timeout)
        host.now += host.settings.interval
        action = host.guard.decide(host.observation())
    host.state = "exited"
    host.again()
    assert host.run(4) == ["start"]
    assert host.run(400) == [] and host.guard.engine == "serving" and len(host.guard.restarts) == 1


def test_a_canary_after_a_short_stall_is_believed(host: Host) -> None:
    host.running, host.frozen = 1, True
    host.run(100)
    host.frozen, host.rate, host.canary = False, 10.0, None
    assert host.run(600) == [] and host.guard.engine == "serving"


def test_slow_tokens_are_noticed_and_never_a_reason_to_restart(host: Host) -> None:
    host.running, host.rate, host.more = 1, 0.5, {"limit": 25.0}
    assert host.run(600) == [] and host.guard.slow and host.guard.tokens_per_second == 0.5
    host.rate = 20.0
    host.run(120)
    assert not host.guard.slow and host.guard.tokens_per_second == pytest.approx(20, rel=0.1)


def test_nothing_deployed(host: Host) -> None:
    host.more = {"release": None, "state": "missing"}
    assert host.run(60) == [] and host.guard.engine == "missing"


def test_metrics_are_valid_and_say_what_is(host: Host) -> None:
    host.crash()
    loop(host, 60)
    text = page(host.guard)
    assert 'given_up{engine="vllm-1"} 1\n' in text and 'sparkfleet_engine_up{engine="vllm-1"} 0\n' in text
    assert 'sparkfleet_engine_restarts_total{engine="vllm-1",reason="crash"} 3\n' in text
    assert sum(line.endswith(" 1") for line in text.splitlines() if "engine_state{" in line) == 1
    assert all(f'state="{name}"' in text for name in STATES)
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names))
    for line in text.splitlines():
        assert line.startswith("#") or line.split("{")[0].split()[0] in names


# -- the clock -------------------------------------------------------------------------------------------------------

YEAR = 365 * 86400.0


@pytest.mark.parametrize("skew", [YEAR, -YEAR, 864000.0, -864000.0])
def test_a_clock_that_is_set_during_a_load_is_no_hung_start(host: Host, skew: float) -> None:
    host.load_seconds, host.more = 900, {"release": 2}
    host.start()
    for minute in range(14):
        host.logged = host.now + host.skew
        assert host.run(60) == []
        host.skew = skew if minute % 2 else 0.0
    assert host.run(120) == [] and host.guard.engine == "serving"


@pytest.mark.parametrize("skew", [YEAR, -YEAR])
def test_a_load_that_hangs_is_seen_whatever_the_clock_says(host: Host, skew: float) -> None:
    host.load_seconds, host.more = 1e9, {"release": 2}
    host.start()
    host.logged = host.now
    host.run(60)
    host.skew = skew
    assert host.run(SETTINGS.start_timeout - 100) == []
    assert host.run(60) == ["restart"]


def test_crashes_by_a_clock_ten_days_ahead_do_not_count_days_later(host: Host) -> None:
    host.skew = 10 * 86400.0
    for _ in range(3):
        host.crash()
        assert host.run(400) == ["adopt"]
    host.skew = 0.0
    host.now += 3 * 86400
    host.crash()
    assert host.run(400) == ["adopt"] and host.guard.given_up is None


def test_nor_over_a_reboot(host: Host) -> None:
    host.skew = 10 * 86400.0
    for _ in range(3):
        host.crash()
        host.run(400)
    host.skew, host.more = 0.0, {"boot_id": "another"}
    host.again()
    host.start()
    host.run(400)
    host.crash()
    assert host.run(400) == ["adopt"]


@pytest.mark.parametrize("skew", [YEAR, -YEAR])
def test_a_clock_that_is_set_does_not_lift_the_cap(host: Host, skew: float) -> None:
    for step in range(3):
        host.crash()
        assert host.run(400) == ["adopt"]
        host.skew = skew * (step % 2)
    host.crash()
    assert host.run(4) == ["give-up"]


@pytest.mark.parametrize("skew", [864000.0, -864000.0])
def test_giving_up_ends_by_a_start_whatever_the_clock_says(host: Host, skew: float) -> None:
    host.crash()
    loop(host, 60)
    host.skew = skew
    assert host.run(600) == []
    host.start()
    assert host.run(400) == [] and host.guard.engine == "serving" and host.guard.given_up is None


# -- figures that are none -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_no_progress(host: Host, value: float) -> None:
    host.frozen = True
    host.more = {"progress": (5.0, value), "running": value, "waiting": value, "tokens": value, "limit": value}
    assert host.run(400) == ["restart"]
    json.dumps(host.guard.data(), allow_nan=False)


# -- starts that Docker refuses --------------------------------------------------------------------------------------

GONE = "failed to create endpoint m on network n: adding interface veth6 to bridge br-1 failed: Device does not exist"


class Refusing(Host):
    """Docker cannot start the engine."""

    def start(self, count: int = 0) -> None:
        self.state, self.tries = "exited", getattr(self, "tries", 0) + 1


def refusing(how: str, **more: Any) -> Refusing:
    host = Refusing()
    host.run(10)
    host.frozen, host.more = True, {"how": how, **more}
    return host


def test_starts_that_fail_are_capped_and_not_in_a_row() -> None:
    host = refusing("driver failed: port is already allocated")
    done = host.run(3600)
    assert done == ["restart", *["start"] * SETTINGS.max_restarts, "give-up"] and host.tries == 4
    assert host.guard.given_up and "port is already allocated" in host.guard.given_up["reason"]
    assert host.run(3600) == []
    host.more = {}
    Host.start(host)
    assert host.run(400) == [] and host.guard.engine == "serving"


def test_a_bridge_that_is_gone_is_docker_s_to_make_again_once() -> None:
    host = refusing(GONE)
    assert host.run(400)[:3] == ["restart", "restart-docker", "start"]
    assert host.run(3600).count("restart-docker") == 0
    assert host.guard.given_up and "to bridge br-1 failed" in host.guard.given_up["reason"]


def test_docker_is_not_restarted_under_the_containers_of_others() -> None:
    host = refusing(GONE, foreign=("database",))
    done = host.run(3600)
    assert "restart-docker" not in done and done[-1] == "give-up"
    assert host.guard.given_up and "database would end with it" in host.guard.given_up["reason"]


def test_a_bridge_that_comes_back() -> None:
    host = refusing(GONE)
    while not any(action.do == "restart-docker" for action in host.did):
        host.look()
    host.more = {"docker": False}
    host.run(6)
    host.more, host.did = {}, []
    host.__class__ = Host  # Docker starts it now
    assert host.run(20) == ["start"]
    assert host.run(400) == [] and host.guard.engine == "serving" and host.guard.given_up is None


def test_after_a_reboot_starts_are_capped_too() -> None:
    host = Refusing()
    host.run(10)
    host.again()
    host.state, host.more = "exited", {"boot_id": "another", "how": "port is already allocated"}
    assert host.run(3600) == [*["start"] * SETTINGS.max_restarts, "give-up"]


# -- an engine that stalls -------------------------------------------------------------------------------------------


def test_an_engine_that_stands_still_again_and_again_is_slow(host: Host) -> None:
    for number in range(40):
        host.more = {"answered": 5.0 if number % 10 else 0.01}
        host.look()
    assert host.guard.data()["slow"] and host.guard.stalls and host.guard.restarts == []
    host.more = {"answered": 0.01}
    host.run(60)
    assert not host.guard.data()["slow"]


# -- the state file --------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**18), 10**18) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(sorted(Guard(SETTINGS).data()))


@given(st.dictionaries(KEYS, JSON))
def test_a_state_of_any_form_is_taken_or_refused(data: dict[str, Any]) -> None:
    try:
        guard = Guard(SETTINGS, data)
    except BoundsError:
        return
    for more in ({}, {"state": "exited"}, {"boot_id": "other"}, {"canary": Canary(0.0, False, 9.0)}):
        guard.decide(Observation(now=START, clock=1000.0, **more))
        page(guard)


@given(KEYS, st.sampled_from(("at", "reason", "clock", "started", "log", "release", "ready", "tries")), JSON)
def test_a_member_of_any_form_is_taken_or_refused(key: str, member: str, value: Any) -> None:
    host = Host()
    host.crash()
    loop(host, 60)
    data = json.loads(json.dumps(host.guard.data()))
    if isinstance(data[key], dict):
        data[key][member] = value
    elif isinstance(data[key], list) and data[key]:
        data[key][0][member] = value
    with contextlib.suppress(BoundsError):
        guard = Guard(SETTINGS, data)
        guard.decide(Observation(now=START, clock=1000.0))
        page(guard)


TIMES = [
    ("restarts", "at"),
    ("restarts", "clock"),
    ("restarts", "back_after_s"),
    ("known", "since"),
    ("canary", "at"),
    ("canary", "seconds"),
    ("given_up", "at"),
    ("healing", "at"),
    ("healing", "tried"),
    ("since", ""),
]


@pytest.mark.parametrize(("key", "member"), TIMES)
@pytest.mark.parametrize(("value", "taken"), [(LATEST, True), (LATEST * 1.01, False), (1e300, False), (-1.0, False)])
def test_times_of_a_state_are_those_of_a_clock(key: str, member: str, value: float, taken: bool) -> None:
    """No printed form, and no metric, is asked for a time that no clock shows."""
    whole: dict[str, Any] = {"at": START, "reason": "crash", "detail": "x", "ok": True, "seconds": 1.0}
    item = {**whole, member: value} if member else value
    with contextlib.nullcontext() if taken else pytest.raises(BoundsError, match=f"{key}.*not between"):
        page(Guard(SETTINGS, {key: [item] if key == "restarts" else item}))


@pytest.mark.parametrize("data", [{"restarts": 7}, {"engine": 5}, {"engine": "x"}, {"known": []}, {"given_up": "x"}])
def test_a_damaged_state_is_named(data: dict[str, Any]) -> None:
    with pytest.raises(BoundsError, match=next(iter(data))):
        Guard(SETTINGS, data)


def test_the_state_of_a_version_before_is_understood() -> None:
    restarts = [{"at": START - 100.0 * number, "reason": "crash", "detail": "x"} for number in (4, 3, 2)]
    guard = Guard(SETTINGS, {"engine": "serving", "restarts": restarts, "forgiven": START - 250.0})
    assert [item.get("forgiven", False) for item in guard.restarts] == [True, True, False]


# -- whatever happens ------------------------------------------------------------------------------------------------


class Anything(RuleBasedStateMachine):
    """Events in any order; what the guard does is done to the engine. Physical time is the test's own."""

    def __init__(self) -> None:
        super().__init__()
        self.settings = dataclasses.replace(SETTINGS, wedge_seconds=60, canary_interval=20, canary_timeout=20)
        self.host = Host(self.settings)
        self.host.load_seconds = 30
        self.host.run(10)
        self.acted: list[tuple[float, str]] = []  # since someone deployed or started it
        self.stopped = False

    def looked(self) -> None:
        before = len(self.host.did)
        self.host.look()
        for action in self.host.did[before:]:
            if action.do != "canary":
                assert not self.stopped, f"{action} on an engine that a person stopped"
            if action.do in ("restart", "adopt"):
                self.acted.append((self.host.now, action.do))
        recent = [at for at, _ in self.acted if self.host.now - at < self.settings.restart_window - 60]
        assert len(recent) <= self.settings.max_restarts
        json.dumps(self.host.guard.data(), allow_nan=False)

    @rule(count=st.integers(1, 120))
    def time_passes(self, count: int) -> None:
        for _ in range(count):
            self.looked()

    @rule()
    def it_crashes(self) -> None:
        if self.host.state == "running":
            self.host.crash()
            self.looked()

    @rule()
    def it_hangs(self) -> None:
        self.host.frozen = True

    @rule(skew=st.sampled_from((0.0, YEAR, -YEAR, 864000.0)))
    def the_clock_is_set(self, skew: float) -> None:
        self.host.skew = skew

    @rule()
    def the_guard_is_restarted(self) -> None:
        self.host.again()

    @rule()
    def a_person_stops_it(self) -> None:
        if self.host.guard.healing is None:
            self.looked()
            if self.host.guard.healing is None:
                self.host.state, self.stopped = "exited", True

    @rule(release=st.booleans())
    def a_person_starts_it(self, release: bool) -> None:
        self.host.now += 2
        if release:
            self.host.more = {"release": int(self.host.more.get("release", 1)) + 1}
        elif self.host.state == "running":
            return
        given_up = self.host.guard.given_up is not None
        self.host.start()
        self.stopped = False
        if release or given_up:
            self.acted = []


Anything.TestCase.settings = hypothesis_settings(max_examples=40, stateful_step_count=25, deadline=None)
TestAnything = Anything.TestCase


def test_figures_by_any_of_their_names() -> None:
    text = """
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a b"} 2.0
vllm:generation_tokens_total{engine="0"} 10.0
vllm:generation_tokens_total{engine="1"} 5.0
vllm:generation_tokens_created{engine="0"} 1.7e+09
ray_vllm_prompt_tokens_total{x="y"} 7.0
vllm:kv_cache_usage_perc{engine="0"} 0.25
vllm:iteration_tokens_total_count{engine="0"} 4.0
vllm:iteration_tokens_total_bucket{le="8"} 4.0
"""
    found = figures(text)
    assert found["generation_tokens"] == 15 and found["prompt_tokens"] == 7 and found["num_requests_running"] == 2
    assert found["kv_cache_usage_perc"] == 0.25 and "generation_tokens_created" not in found


def test_settings_that_are_not_known_are_named() -> None:
    assert Settings.of({"interval": 0.5}) == dataclasses.replace(SETTINGS, interval=0.5)
    with pytest.raises(ValueError, match="unknown settings wedge_second; there are interval"):
        Settings.of({"wedge_second": 3})


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"interval": "2"}, "interval: not a number: '2'"),
        ({"interval": 0}, "interval: 0 is not between 0.01"),
        ({"max_restarts": 1.5}, "max_restarts: not an integer"),
        ({"listen_port": 70000}, "listen_port: 70000 is not between 0 and 65535"),
        ({"listen_address": "localhost"}, "listen_address: 'localhost' is not an IP address"),
        ({"listen_address": [1]}, "listen_address: not a string"),
        ({"project_dir": "opt"}, "project_dir: 'opt' is not an absolute path"),
    ],
)
def test_settings_of_another_form_are_refused(data: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        Settings.of(data)


def test_addresses_to_listen_on() -> None:
    assert Settings.of({"listen_address": "127.0.0.1"}).listen_address == ("127.0.0.1",)
    assert Settings.of({"listen_address": ["::1", "10.0.0.1", "::1"]}).listen_address == ("::1", "10.0.0.1")
    assert Settings().listen_address == ("",)


# -- limits, to the second -------------------------------------------------------------------------------------------


class Watched:
    """A guard that is told exactly what is seen and when; `at` in seconds since the first look."""

    def __init__(self, data: dict[str, Any] | None = None, **settings: Any) -> None:
        self.guard = Guard(dataclasses.replace(SETTINGS, **settings), data)
        self.more: dict[str, Any] = {"started_at": "first", "progress": (1.0,), "how": "exit code 1"}

    def see(self, at: float, **more: Any) -> str:
        return self.action(at, **more).do

    def action(self, at: float, **more: Any) -> Action:
        seen = {"now": START + at, "clock": 10_000 + at, **self.more, **more}
        return self.guard.decide(Observation(**seen))

    def canary(self, began: float, at: float, ok: bool = False, **more: Any) -> Action:
        """A look that finds the end of a canary."""
        return self.action(at, canary=Canary(10_000 + began, ok, at - began), **more)


@pytest.mark.parametrize(
    ("start_timeout", "last_line", "patience"),
    [(1800, 0, 1800), (1800, 1199, 1800), (1800, 1500, 2100), (100, 90, 190), (100, 0, 100)],
)
def test_a_start_hangs_after_its_time_and_ten_minutes_of_silence(
    start_timeout: float, last_line: float, patience: float
) -> None:
    watched = Watched(start_timeout=start_timeout)
    watched.more["healthy"] = False
    assert watched.see(0) == "nothing" and watched.guard.engine == "loading"
    watched.see(last_line, logged=START + last_line)
    watched.see(last_line + 1, logged=START + last_line)  # the same line again is no news
    assert watched.see(patience, logged=START + last_line) == "nothing"
    action = watched.action(patience + 0.1)
    assert (action.do, action.reason) == ("restart", "hung-start")
    silent = patience - last_line
    assert action.detail == f"not ready after {patience} s, nothing in its log for {silent} s"


def test_a_load_is_timed_by_the_clock_of_another_boot() -> None:
    watched = Watched()
    watched.more["healthy"] = False
    watched.see(0)
    watched.more |= {"boot_id": "another", "clock": 100.0}
    assert watched.see(0) == "nothing"
    assert watched.see(0, clock=1900.0) == "nothing" and watched.see(0, clock=1900.1) == "restart"


def test_an_idle_engine_is_asked_after_the_interval_of_canaries() -> None:
    watched = Watched()
    watched.see(0)
    assert [watched.see(at) for at in (59.9, 60, 60.1, 119.9)] == ["nothing", "canary", "nothing", "nothing"]
    assert watched.canary(60, 61, ok=True).do == "nothing"
    assert watched.guard.canary == {"at": START + 61, "ok": True, "seconds": 1.0}
    # The canary's answer was progress: the next one is due an interval after it, not after the question.
    assert [watched.see(at) for at in (120.9, 121)] == ["nothing", "canary"]


@pytest.mark.parametrize(("ended", "does"), [(179.9, "nothing"), (180, "restart")])
def test_a_wedge_needs_no_token_for_its_time_and_a_canary_that_failed(ended: float, does: str) -> None:
    watched = Watched()
    watched.see(0)
    assert watched.see(100, running=2.0) == "canary"
    action = watched.canary(100, ended, running=2.0, waiting=3.0)
    assert action.do == does and watched.guard.engine == "wedged"
    if does == "restart":
        assert action.reason == "wedge" and action.detail == (
            "no token for 180 s with 2 requests running and 3 waiting, and a canary was not answered in 80 s"
        )


def test_without_a_canary_that_failed_no_silence_is_a_wedge() -> None:
    watched = Watched()
    assert [watched.see(at) for at in (0, 100, 1000)] == ["nothing", "canary", "canary"]
    assert watched.guard.engine == "serving"


@pytest.mark.parametrize(("moved", "engine"), [(60, "wedged"), (60.1, "serving")])
def test_a_canary_counts_only_where_nothing_moved_since_it_began(moved: float, engine: str) -> None:
    watched = Watched()
    watched.see(0)
    watched.see(moved, progress=(2.0,))
    watched.more["progress"] = (2.0,)
    assert watched.canary(60, 119).do == "nothing" and watched.guard.engine == engine


def test_an_engine_that_seems_to_hang_is_asked_as_soon_as_a_canary_has_timed_out() -> None:
    watched = Watched(canary_timeout=20)
    watched.see(0)
    assert watched.see(60) == "canary"
    assert watched.canary(60, 79).do == "nothing" and watched.guard.engine == "wedged"
    assert [watched.see(at) for at in (79.9, 80)] == ["nothing", "canary"] and watched.guard.engine == "wedged"
    watched.see(90, progress=(2.0,))
    assert watched.guard.engine == "serving"


def test_metrics_that_are_silent_are_no_progress() -> None:
    watched = Watched()
    watched.see(0)
    assert watched.see(60, progress=None) == "canary"


@pytest.mark.parametrize(("later", "does"), [(99.9, "give-up"), (100, "adopt")])
def test_restarts_count_within_their_window(later: float, does: str) -> None:
    watched = Watched(max_restarts=1, restart_window=100)
    watched.see(0)
    assert watched.see(10, restart_count=1) == "adopt"
    assert watched.see(10 + later, restart_count=2) == does


def test_two_crashes_within_one_tick_of_the_clock_are_two() -> None:
    watched = Watched(max_restarts=1)
    watched.see(0)
    assert watched.see(10, restart_count=1) == "adopt"
    assert watched.see(10, restart_count=2) == "give-up"


def test_without_restarts_the_first_crash_is_the_end() -> None:
    watched = Watched(max_restarts=0)
    watched.see(0)
    action = watched.action(10, restart_count=1)
    assert (action.do, action.reason) == ("give-up", "crash") and watched.guard.engine == "given-up"
    assert action.detail == "0 restarts in 3600 s, and again: crash, exit code 1"
    assert watched.guard.given_up == {"at": START + 10, "reason": action.detail} and watched.guard.healing is None


def test_the_last_fifty_restarts_are_kept() -> None:
    watched = Watched(restart_window=1)
    watched.see(0)
    for count in range(1, 61):
        assert watched.see(10.0 * count, restart_count=count) == "adopt"
    assert [item["at"] - START for item in watched.guard.restarts] == [10.0 * count for count in range(11, 61)]
    assert watched.guard.totals == {"crash": 60}
    kept = watched.guard.data()
    more = {"at": START, "reason": "wedge", "detail": ""}
    again = Guard(SETTINGS, {**kept, "restarts": [*kept["restarts"], more]})
    assert len(again.restarts) == 50 and again.restarts[-1] == more
    for count, taken in ((1000, True), (1001, False)):
        with contextlib.nullcontext() if taken else pytest.raises(BoundsError, match="restarts"):
            Guard(SETTINGS, {"restarts": [more] * count})


@pytest.mark.parametrize(
    ("tries", "starts"),
    [(5, [0, 10, 40, 100, 160, 220]), (3, [0, 10, 40, 100]), (1, [0, 10])],
)
def test_the_pauses_between_starts_that_docker_refuses(tries: int, starts: list[float]) -> None:
    watched = Watched(max_restarts=tries)
    watched.see(0)
    watched.see(60)
    assert watched.canary(60, 200).do == "restart"
    watched.more["state"] = "exited"
    for number, at in enumerate(starts):
        if number:
            assert watched.see(200 + at - 0.1) == "nothing" and watched.guard.engine == "healing"
        assert watched.see(200 + at) == ("start" if at != starts[-1] else "give-up")
    assert watched.guard.given_up
    assert watched.guard.given_up["reason"] == f"Docker could not start it in {tries} tries: exit code 1"
    assert watched.see(1000) == "nothing" and watched.guard.engine == "given-up"


def test_one_start_after_a_reboot_is_no_restart_and_always_allowed() -> None:
    watched = Watched(max_restarts=0)
    watched.see(0)
    watched.more |= {"state": "exited", "boot_id": "another"}
    assert [watched.see(at) for at in (10, 19.9)] == ["nothing", "nothing"] and watched.guard.engine == "loading"
    action = watched.action(20)
    assert (action.do, action.reason) == ("start", "boot") and watched.guard.engine == "healing"
    assert [watched.see(at) for at in (29.9, 30)] == ["nothing", "give-up"]


def test_a_pause_does_not_outlast_a_reboot() -> None:
    watched = Watched()
    watched.see(0)
    watched.see(60)
    watched.canary(60, 200)
    watched.more["state"] = "exited"
    assert watched.see(201) == "start"
    assert watched.see(202, boot_id="another", clock=30.0) == "start"


def test_a_docker_that_was_away_gets_all_its_tries_again() -> None:
    watched = Watched()
    watched.see(0)
    watched.see(60)
    watched.canary(60, 200)
    watched.more["state"] = "exited"
    assert [watched.see(at) for at in (200, 210)] == ["start", "start"]
    assert watched.see(211, docker=False) == "nothing" and watched.guard.engine == "docker-down"
    assert [watched.see(at) for at in (212, 222, 252, 311, 312)] == ["start", "start", "start", "nothing", "give-up"]


@pytest.mark.parametrize("state", ["exited", "paused"])
def test_a_person_may_stop_an_engine_that_has_begun_to_come_back(state: str) -> None:
    watched = Watched()
    watched.see(0)
    watched.see(60)
    watched.canary(60, 200)
    assert watched.see(210, started_at="second", healthy=False) == "nothing" and watched.guard.engine == "healing"
    assert watched.see(220, started_at="second", state=state) == "nothing"
    assert watched.guard.engine == "stopped" and watched.guard.healing is None


def test_how_long_the_engine_was_away_is_noted_once() -> None:
    watched = Watched()
    watched.see(0)
    watched.see(60)
    watched.canary(60, 200)
    watched.more |= {"started_at": "second", "healthy": False}
    watched.see(210)
    watched.more["healthy"] = True
    watched.see(321.26)
    assert watched.guard.engine == "serving" and watched.guard.healing is None
    assert watched.guard.restarts[-1]["back_after_s"] == 121.3
    # A start that Docker made is no end of that restart.
    watched.see(400, docker=False)
    watched.see(500, started_at="third", healthy=False)
    watched.see(600, started_at="third")
    assert watched.guard.restarts[-1]["back_after_s"] == 121.3


def test_a_start_after_docker_was_away_does_not_end_a_restart_of_before() -> None:
    watched = Watched()
    watched.see(0)
    watched.see(10, restart_count=1)
    watched.see(20, restart_count=1)
    before = dict(watched.guard.restarts[-1])
    watched.more["restart_count"] = 1
    watched.see(30, docker=False)
    assert [watched.see(at, state="exited") for at in (40, 50)] == ["nothing", "start"]
    watched.see(60, started_at="second")
    assert watched.guard.engine == "serving" and watched.guard.restarts == [before]


def test_a_start_of_docker_after_giving_up_is_stopped_again() -> None:
    watched = Watched(max_restarts=0)
    watched.see(0)
    assert watched.see(10, restart_count=1) == "give-up"
    assert watched.guard.given_up
    action = watched.action(20, restart_count=1)
    assert (action.do, action.reason) == ("give-up", "again")
    watched.guard.given_up["started_at"] = "first"
    assert watched.see(30, restart_count=1) == "give-up"
    assert watched.see(40, state="restarting", started_at="second") == "give-up"  # not started by anyone yet
    assert watched.see(50, started_at="second") == "nothing" and watched.guard.given_up is None


def test_what_was_not_done_does_not_count() -> None:
    watched = Watched(max_restarts=2)
    watched.see(0)
    assert watched.see(10, restart_count=1) == "adopt"
    watched.see(11, restart_count=1)
    watched.see(71, restart_count=1)
    action = watched.canary(71, 300, restart_count=1)
    assert action.do == "restart" and watched.guard.totals == {"crash": 1, "wedge": 1}
    watched.guard.withdraw(action)
    assert watched.guard.healing is None and [item["reason"] for item in watched.guard.restarts] == ["crash"]
    assert watched.guard.totals == {"crash": 1, "wedge": 0}
    watched.guard.withdraw(Action("start", "boot"))
    assert len(watched.guard.restarts) == 1
    watched.guard.given_up = {"at": 1.0, "reason": "x"}
    watched.guard.withdraw(Action("give-up", "again"))
    assert watched.guard.given_up
    watched.guard.withdraw(Action("give-up", "crash"))
    assert watched.guard.given_up is None


def test_the_rate_of_one_stream_is_measured_over_half_a_minute() -> None:
    watched = Watched()
    watched.more |= {"running": 1.0, "limit": 40.0}

    def rate(at: float, tokens: float, **more: Any) -> float | None:
        watched.see(at, tokens=tokens, progress=(tokens,), **more)
        return watched.guard.tokens_per_second

    assert [rate(0, 0), rate(1, 100), rate(31, 470), rate(32, 480)] == [None, None, 12.33, 12.33]
    assert rate(60.9, 600) == 12.33 and rate(61, 770) == 10.0
    assert not watched.guard.slow  # a quarter of the limit is not below it
    assert rate(91, 1067) == 9.9 and watched.guard.slow and watched.guard.data()["slow"]
    assert rate(121, 1067) == 0.0 and not watched.guard.slow  # a prefill
    assert rate(130, 1100, running=2.0) == 0.0  # two share the bandwidth: measured again
    assert rate(140, 2000) == rate(169, 2100) == 0.0 and rate(170, 2150) == 5.0
    assert rate(180, 10) == rate(209, 100) == 5.0 and rate(210, 100) == 3.0  # counters from zero


def test_a_new_start_forgets_what_was_measured() -> None:
    watched = Watched()
    watched.more |= {"running": 1.0, "limit": 400.0}
    for at in (0, 1, 31):
        watched.see(at, tokens=10.0 * at)
    assert watched.guard.slow and watched.guard.tokens_per_second == 10.0
    watched.see(40, started_at="second", healthy=False)
    assert not watched.guard.slow and watched.guard.tokens_per_second is None


def test_another_release_begins_with_a_clean_slate() -> None:
    watched = Watched()
    watched.more |= {"running": 1.0, "limit": 400.0, "answered": 2.0}
    for at in (0, 1, *range(31, 60)):
        watched.see(at, tokens=10.0 * at)
    assert watched.guard.slow and watched.guard.stalls
    watched.see(60, release=2, answered=None)
    assert not watched.guard.slow and not watched.guard.stalls and watched.guard.tokens_per_second is None
    watched.see(61, release=2)
    assert not watched.guard.stalls  # by one late answer


def test_after_a_switch_that_changed_nothing_silence_counts_from_the_start() -> None:
    watched = Watched()
    watched.see(0)
    watched.see(60)
    assert watched.see(61, switching=True) == "nothing" and watched.guard.engine == "switching"
    assert watched.canary(60, 200).do == "nothing" and watched.guard.engine == "serving"
    assert [watched.see(at) for at in (259.9, 260)] == ["nothing", "canary"]


@pytest.mark.parametrize(("lines", "taken"), [(10_000, True), (10_001, False)])
def test_the_log_of_an_engine_that_was_given_up_is_bounded(lines: int, taken: bool) -> None:
    data = {"given_up": {"at": START, "reason": "x", "log": ["line"] * lines}}
    with contextlib.nullcontext() if taken else pytest.raises(BoundsError, match=r"given_up\.log"):
        Guard(SETTINGS, data)


@pytest.mark.parametrize(
    ("answers", "stalls"),
    [
        ([1.1] * 6 + [0.0] * 6, True),
        ([1.1] * 5 + [0.0] * 7, False),
        ([1.0] * 12, False),
        ([1.1] * 11, False),
        ([1.1] * 6 + [0.0] * 7, False),
    ],
)
def test_half_of_the_last_answers_of_metrics_are_late(answers: list[float], stalls: bool) -> None:
    watched = Watched()
    for number, seconds in enumerate([0.0, *answers]):  # the first look only sees that it is ready
        watched.see(number, answered=seconds if number else None)
    assert watched.guard.stalls is stalls and watched.guard.data()["slow"] is stalls


def test_crashes_of_another_boot_are_no_younger_than_this_one() -> None:
    stamps = [{"at": START - 10.0, "reason": "crash", "detail": "x", "clock": 20_000.0, "boot_id": "before"}] * 2
    watched = Watched({"engine": "serving", "boot_id": "boot", "restarts": stamps, "known": {"release": 1}})
    watched.more["restart_count"] = 1
    watched.guard.settings = dataclasses.replace(SETTINGS, max_restarts=2, restart_window=5000)
    assert watched.see(0) == "adopt"  # this boot is 10,000 s old
    young = Watched(
        {"engine": "serving", "boot_id": "boot", "restarts": stamps, "known": {"release": 1}}, max_restarts=2
    )
    young.more["restart_count"] = 1
    assert young.see(0, clock=50.0) == "give-up"


def test_crashes_of_a_version_before_count_by_unix_time() -> None:
    for at, does in ((START, "give-up"), (START + 1, "adopt"), (START - 3600, "adopt"), (START - 3599, "give-up")):
        restarts = [{"at": at, "reason": "crash", "detail": "x"}]
        watched = Watched({"engine": "serving", "restarts": restarts, "known": {"release": 1}}, max_restarts=1)
        assert watched.see(0, restart_count=1) == does


def test_figures_that_are_none_are_nought() -> None:
    nan = float("nan")
    seen = Observation(
        now=1.0, clock=1.0, progress=(2.0, nan), running=nan, waiting=3.0, tokens=nan, limit=4.0
    ).finite()
    assert (seen.progress, seen.running, seen.waiting, seen.tokens, seen.limit) == ((2.0, 0.0), 0.0, 3.0, 0.0, 4.0)


def test_the_whole_page_of_metrics() -> None:
    watched = Watched(max_restarts=0)
    watched.see(0)
    watched.canary(0.5, 1, ok=True)
    watched.guard.totals, watched.guard.slow = {"crash": 2, "else": 5}, True
    text = page(watched.guard, Guard(SETTINGS))
    samples = [line for line in text.splitlines() if not line.startswith("#")]
    others = [name for name in STATES if name != "serving"]
    first, second = 'engine="vllm-1"', 'engine="vllm-2"'
    assert samples == [
        f"sparkfleet_engine_up{{{first}}} 1",
        f"sparkfleet_engine_up{{{second}}} 0",
        f'sparkfleet_engine_state{{{first},state="serving"}} 1',
        *(f'sparkfleet_engine_state{{{first},state="{name}"}} 0' for name in others),
        *(f'sparkfleet_engine_state{{{second},state="{name}"}} {int(name == "missing")}' for name in STATES),
        f'sparkfleet_engine_restarts_total{{{first},reason="crash"}} 2',
        f'sparkfleet_engine_restarts_total{{{first},reason="wedge"}} 0',
        f'sparkfleet_engine_restarts_total{{{first},reason="hung-start"}} 0',
        f'sparkfleet_engine_restarts_total{{{first},reason="rank"}} 0',
        *(f'sparkfleet_engine_restarts_total{{{second},reason="{name}"}} 0' for name in REASONS),
        f"sparkfleet_engine_given_up{{{first}}} 0",
        f"sparkfleet_engine_given_up{{{second}}} 0",
        f"sparkfleet_engine_slow{{{first}}} 1",
        f"sparkfleet_engine_slow{{{second}}} 0",
        "sparkfleet_release 1",
        f"sparkfleet_canary_ok{{{first}}} 1",
        f"sparkfleet_canary_seconds{{{first}}} 0.5",
        "sparkfleet_guard_last_look_seconds 1800000002",
    ]
    for sample in samples:
        name = sample.split("{")[0].split()[0]
        assert f"# HELP {name} " in text and f"# TYPE {name} " in text
    bare = page(release=None)
    assert "sparkfleet_release 0\n" in bare and "engine" not in bare and "canary" not in bare


def test_the_state_file_is_read_or_said_to_be_damaged(tmp_path: Path) -> None:
    assert read_state(tmp_path) == (None, "")
    path = tmp_path / "guard-state.json"
    record = json.loads(json.dumps(Guard(SETTINGS).data()))
    data = {"at": START, "clock": 5.0, "boot_id": "boot", "release": 1, "engines": {"vllm-m": record}}
    path.write_text(json.dumps(data), encoding="utf-8")
    assert read_state(tmp_path) == read_state(tmp_path, "vllm-m") == (data, "")
    path.write_text(json.dumps({**record, "at": START, "clock": 5.0, "release": 1}), encoding="utf-8")  # format 1
    found, said = read_state(tmp_path, "vllm-m")
    assert found and said == "" and Guard(SETTINGS, found["engines"]["vllm-m"]).data() == record
    assert (found["at"], found["clock"], found["release"], found["boot_id"]) == (START, 5.0, 1, "")
    for engines in ({f"v{n}": record for n in range(17)}, {"a b": record}, {"v": {"engine": "x"}}, []):
        path.write_text(json.dumps({"engines": engines}), encoding="utf-8")
        assert read_state(tmp_path)[0] is None
    path.write_text('{"engine": "x"}', encoding="utf-8")
    assert read_state(tmp_path) == (None, f"{path}: engine: 'x' is not a state")
    path.write_text("{", encoding="utf-8")
    found, said = read_state(tmp_path)
    assert found is None and said.startswith(f"{path}: ") and said.count(str(path)) == 1


def test_what_is_kept_comes_back_whole(host: Host) -> None:
    host.crash()
    host.run(30)
    kept = json.loads(json.dumps(host.guard.data()))
    again = Guard(SETTINGS, kept).data()
    passing = ("running", "waiting", "tokens_per_second", "slow", "stalls")
    assert {name: again[name] for name in again if name not in passing} == {
        name: kept[name] for name in kept if name not in passing
    }


def test_a_state_begins_with_nothing() -> None:
    assert Guard(SETTINGS).data() == {
        **{"engine": "missing", "served": False, "since": 0.0, "restarts": []},
        **{"restarts_total": {}, "given_up": None, "healing": None, "canary": None, "running": 0.0, "waiting": 0.0},
        **{"tokens_per_second": None, "slow": False, "stalls": False, "boot_id": "", "known": {}},
    }


def test_totals_are_bounded() -> None:
    assert len(Guard(SETTINGS, {"restarts_total": {f"reason {n}": n for n in range(101)}}).totals) == 100
    assert Guard(SETTINGS, {"restarts_total": {"x" * 100: 5}}).totals == {"x" * 100: 5}
    with pytest.raises(BoundsError, match="reason: more than 100 characters"):
        Guard(SETTINGS, {"restarts_total": {"x" * 101: 5}})


def test_whether_it_served_is_known_of_a_version_before() -> None:
    for engine in STATES:
        assert Guard(SETTINGS, {"engine": engine}).served is (engine in ("serving", "loading", "healing", "wedged"))
    assert Guard(SETTINGS, {"engine": "serving", "served": False}).served is False


@pytest.mark.parametrize(
    ("name", "least", "most", "below", "above"),
    [
        ("max_restarts", 0, 1000, -1, 1001),
        ("listen_port", 0, 65535, -1, 65536),
        ("wedge_seconds", 0.01, 1e8, 0.009, 1.1e8),
        ("state_dir", "/", "/" * 4096, "", "/" * 4097),
        ("listen_address", [], ["::1"] * 16, ["\0"], ["::1"] * 17),
    ],
)
def test_the_limits_of_settings(name: str, least: Any, most: Any, below: Any, above: Any) -> None:
    for value in (least, most):
        Settings.of({name: value})
    for value in (below, above):
        with pytest.raises(ValueError, match=name):
            Settings.of({name: value})


def test_a_path_has_no_nul() -> None:
    with pytest.raises(ValueError, match=r"cache_dir: .* is not an absolute path"):
        Settings.of({"cache_dir": "/opt\0/hf"})
