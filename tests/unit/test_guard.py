"""The guard's decisions, by a clock of the test's own: what is healed, what is left alone, when it gives up."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import time
from typing import Any

import pytest
from ansible.module_utils.sparkfleet_host.bounded import BoundsError
from ansible.module_utils.sparkfleet_host.guard import (
    STATES,
    Action,
    Canary,
    Guard,
    Observation,
    Settings,
    figures,
    metrics,
)
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

START = 1_800_000_000.0
SETTINGS = Settings()


def stamp(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000000000Z", time.gmtime(at))


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
        self.guard = Guard(self.settings, json.loads(json.dumps(self.guard.data(self.now))))


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


def test_a_load_that_hangs_is_started_anew(host: Host) -> None:
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
    text = metrics(host.guard.data(host.now))
    assert "sparkfleet_engine_given_up 1\n" in text and "sparkfleet_engine_up 0\n" in text
    assert 'sparkfleet_engine_restarts_total{reason="crash"} 3\n' in text
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
    json.dumps(host.guard.data(host.now), allow_nan=False)


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
    assert host.guard.data(host.now)["slow"] and host.guard.stalls and host.guard.restarts == []
    host.more = {"answered": 0.01}
    host.run(60)
    assert not host.guard.data(host.now)["slow"]


# -- the state file --------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**18), 10**18) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(sorted(Guard(SETTINGS).data(0)))


@given(st.dictionaries(KEYS, JSON))
def test_a_state_of_any_form_is_taken_or_refused(data: dict[str, Any]) -> None:
    try:
        guard = Guard(SETTINGS, data)
    except BoundsError:
        return
    for more in ({}, {"state": "exited"}, {"boot_id": "other"}, {"canary": Canary(0.0, False, 9.0)}):
        guard.decide(Observation(now=START, clock=1000.0, **more))
        metrics(json.loads(json.dumps(guard.data(START))))


@given(KEYS, st.sampled_from(("at", "reason", "clock", "started", "log", "release", "ready", "tries")), JSON)
def test_a_member_of_any_form_is_taken_or_refused(key: str, member: str, value: Any) -> None:
    host = Host()
    host.crash()
    loop(host, 60)
    data = json.loads(json.dumps(host.guard.data(START)))
    if isinstance(data[key], dict):
        data[key][member] = value
    elif isinstance(data[key], list) and data[key]:
        data[key][0][member] = value
    with contextlib.suppress(BoundsError):
        guard = Guard(SETTINGS, data)
        guard.decide(Observation(now=START, clock=1000.0))
        metrics(json.loads(json.dumps(guard.data(START))))


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
        self.acted: list[tuple[float, str]] = []  # since somebody deployed or started it
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
        json.dumps(self.host.guard.data(self.host.now), allow_nan=False)

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
        ({"max_restarts": 1.5}, "max_restarts: not a whole number"),
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
