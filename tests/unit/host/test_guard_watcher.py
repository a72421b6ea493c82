"""What the guard observes and does, on a host that is not there: the clock, Docker and the engine are the test's."""

from __future__ import annotations

import dataclasses
import http.client
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import guard as module
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import http as host_http
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import key as engine_key
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import measured, releases
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.docker import (
    Docker,
    DockerError,
    DockerUnavailable,
)
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.guard import (
    Action,
    Canary,
    Guard,
    Notify,
    Observation,
    Settings,
    Watched,
    Watcher,
    restart_docker,
)
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.http import Answer as HttpAnswer
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.http import HttpError
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.releases import Store

from tests.unit.fakes import fake_release
from tests.unit.fakes.clock import set_time
from tests.unit.fakes.fake_engine import Engine, Handler, deployed

REPO = "org/model"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return deployed(tmp_path, 1)


class Client:
    """The engine as the guard's client sees it; what is asked is kept."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.status, self.seconds, self.error = 200, 0.0, None  # type: int, float, Exception | None
        self.page = "vllm:generation_tokens_total 1\n"
        self.pass_time: Any = lambda seconds: None

    def made(self, url: str, timeout: float) -> Client:
        self.url, self.timeout = url, timeout
        return self

    def get(self, path: str, timeout: float, limit: int) -> HttpAnswer:
        self.asked.append((path, timeout, limit))
        self.pass_time(self.seconds)
        if self.error:
            raise self.error
        return HttpAnswer(self.status, "text/plain", self.page.encode())

    def post(self, path: str, body: Any, headers: dict[str, str]) -> HttpAnswer:
        self.asked.append((path, body, headers))
        self.pass_time(self.seconds)
        if self.error:
            raise self.error
        return HttpAnswer(self.status, "application/json", b"{}")


class Single(Watcher):
    """The guard of a host with one engine, without its name in each call."""

    @property
    def item(self) -> Watched:
        (item,) = self.watched.values()
        return item

    @property
    def guard(self) -> Guard:
        return self.item.guard

    def observe(self, item: Watched | None = None, locked: bool = False) -> Observation:
        if item is None:
            self.refresh()
        return super().observe(item or self.item, locked)

    def do(self, action: Action, seen: Observation) -> None:
        self.act(self.item, action, seen)

    def one_step(self) -> Action:
        (action,) = self.step().values()
        return action


class World:
    """Docker's part, the engine's and the clock's, and in which order Docker was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
        self.store, self.calls, self.during = store, [], lambda: None  # type: Store, list[str], Any
        self.found = {"state": "running", "started_at": "2026-01-01T00:00:00Z", "restart_count": 0, "tty": False}
        self.found |= {"oom_killed": False, "error": "", "exit_code": 0, "id": "c1"}
        self.said: list[str] = []
        self.now, self.healthy, self.log = 10_000.0, True, ["line"]
        self.client = Client()
        self.client.pass_time = self.wait
        self.log_asked: list[tuple[Any, ...]] = []
        monkeypatch.setattr(module, "clock", lambda: self.now)
        monkeypatch.setattr(module, "engine_client", self.client.made)
        monkeypatch.setattr(module.engine, "inspect", self.inspect)
        monkeypatch.setattr(module.engine, "stop", self.stop)
        monkeypatch.setattr(module.engine, "start", self.start)
        monkeypatch.setattr(module.engine, "healthy", lambda client: self.healthy)
        monkeypatch.setattr(module.engine, "read_log", self.read_log)
        monkeypatch.setattr(module, "drop_page_cache", lambda: self.calls.append("drop"))
        self.notified: list[tuple[str, ...]] = []
        notify = Notify({"WATCHDOG_USEC": "90000000"})
        monkeypatch.setattr(Notify, "__call__", lambda _, *lines: self.notified.append(lines))
        self.settings = Settings()
        self.watcher = Single(self.settings, store, Docker("/nowhere"), self.said.append, notify)

    def wait(self, seconds: float) -> None:
        self.now += seconds

    def read_log(self, *args: Any, most: int = 0) -> list[str]:
        self.log_asked.append(args[1:])
        return self.log

    def inspect(self, docker: Any, name: str) -> dict[str, Any]:
        return dict(self.found)

    def stop(self, docker: Any, name: str, timeout: int) -> bool:
        kept = store_state(self.store)
        self.calls.append(f"stop, {(kept.get('healing') or {}).get('reason')} is kept")
        assert timeout == 10
        self.during()
        self.found["state"] = "exited"
        return True

    def start(self, docker: Any, name: str) -> None:
        self.calls.append("start")
        self.found.update(state="running", started_at="2026-01-01T01:00:00Z")

    def wedge(self) -> tuple[Action, Observation]:
        """The guard has just decided for a restart."""
        self.watcher.step()
        seen = self.watcher.observe()
        action = self.watcher.guard._restart("wedge", "no token", seen)
        assert action.do == "restart"
        return action, seen


def store_state(store: Store) -> dict[str, Any]:
    """What is written of the one engine, and of the host."""
    path = store.state_dir / "guard-state.json"
    data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"engines": {"": {}}}
    (item,) = data.pop("engines").values()
    return {**data, **item}


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, store: Store) -> World:
    return World(monkeypatch, store)


def test_what_it_is_about_to_do_is_kept_before_it_stops(world: World) -> None:
    world.watcher.do(*world.wedge())
    assert world.calls == ["stop, wedge is kept", "drop", "start"]


def test_no_switch_begins_while_it_acts(world: World, store: Store) -> None:
    begun: list[bool] = []

    def other() -> None:
        with Store(store.project_dir, store.state_dir, str(store.lock_file)).exclusive() as mine:
            begun.append(mine)

    action, seen = world.wedge()
    thread = threading.Thread(target=other)
    world.during = lambda: (thread.start(), time.sleep(0.3))
    world.watcher.do(action, seen)
    thread.join()
    # Refused, or after the start: never between stop and start.
    assert world.calls[-1] == "start" and begun in ([False], [True])


def test_nothing_is_done_once_a_switch_has_begun(world: World, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = releases._locked
    monkeypatch.setattr(releases, "_locked", lambda handle, limit: locked(handle, lambda: 0.0))
    action, seen = world.wedge()
    with store.exclusive():
        world.watcher.do(action, seen)
        assert world.calls == [] and "a switch has started" in world.said[-1]
        assert world.watcher.one_step().do == "nothing"
    assert world.watcher.guard.restarts == [] and world.watcher.guard.totals == {"wedge": 0}


def test_nothing_is_done_to_an_engine_that_was_stopped_or_started_meanwhile(world: World) -> None:
    for change in ({"state": "exited"}, {"started_at": "2026-01-01T02:00:00Z"}):
        action, seen = world.wedge()
        world.found.update(change)
        world.watcher.do(action, seen)
        assert world.calls == [] and "has changed meanwhile" in world.said[-1]
        world.found["state"] = "exited"
        for _ in range(3):
            assert world.watcher.one_step().do == "nothing"
        assert world.watcher.guard.engine == "stopped" and world.calls == []
        world.found.update(state="running", started_at="2026-01-01T03:00:00Z")


def test_giving_up_keeps_by_which_start(world: World) -> None:
    world.watcher.step()
    seen = world.watcher.observe()
    world.watcher.guard.given_up = {"at": 1.0, "reason": "x"}
    world.watcher.do(Action("give-up", "crash", "x"), seen)
    assert world.watcher.guard.given_up["started_at"] == world.found["started_at"]
    assert world.watcher.guard.given_up["log"] == ["line"]
    assert world.watcher.one_step().do == "nothing" and world.watcher.guard.engine == "given-up"


def test_a_canary_that_ends_while_it_reads_belongs_to_this_observation(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = Canary(1.0, True, 0.5)

    def look(docker: Any, name: str) -> dict[str, Any]:
        world.watcher.item.canary = ended
        return dict(world.found)

    monkeypatch.setattr(module.engine, "inspect", look)
    assert world.watcher.observe().canary is ended and world.watcher.item.canary is None


def test_no_observation_ends_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def look(docker: Any, name: str) -> dict[str, Any]:
        raise MemoryError("odd")

    monkeypatch.setattr(module.engine, "inspect", look)
    for _ in range(5):
        world.watcher.survive()
    assert world.said == ["this observation failed: MemoryError: odd"]  # once, not at each


def test_no_more_threads_is_no_sign_of_the_engine(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    world.watcher.do(Action("canary"), Observation(now=1.0, clock=1.0))
    assert world.said == ["canary: can't start new thread"] and not world.watcher.item.asking


def test_docker_that_is_away_is_seen(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def look(docker: Any, name: str) -> dict[str, Any]:
        raise DockerUnavailable("away")

    monkeypatch.setattr(module.engine, "inspect", look)
    assert world.watcher.observe().docker is False


def test_a_disk_that_is_full_is_said_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_json", full)
    for _ in range(5):
        world.watcher.step()
        world.now += 30
    assert sum("cannot be written" in line for line in world.said) == 1
    assert world.watcher.answer("/metrics")[1].startswith("# HELP") and world.watcher.answer("/ready")[0] == 200


def test_ready_is_what_the_guard_knows(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    get = world.watcher.answer
    world.watcher.step()
    assert get("/ready") == (200, f"serving {REPO}\n")
    assert get("/ready?model=org/model") == get("/ready?model=org%2Fmodel") == get("/ready")
    for query in ("model=org/other", "model=", "model=m", "model=org/model&model=org/other"):
        assert get(f"/ready?{query}") == (503, "another-model\n")
    assert get("/ready?" + "&".join(f"a{number}=1" for number in range(20)))[0] == 400
    assert 'sparkfleet_engine_up{engine="vllm-m"} 1' in get("/metrics")[1] and get("/else")[0] == 404
    world.watcher.guard.engine = "wedged"
    assert get("/ready") == get("/ready?model=org/model") == (503, "wedged\n")
    world.watcher.guard.engine = "serving"
    monkeypatch.setattr(world.watcher.item, "looked_at", world.watcher.item.looked_at - 1000)
    assert get("/ready") == get("/ready?model=org/model") == (503, "guard-stuck\n")


def test_docker_is_restarted_by_its_process_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append((pid, number)))
    path = tmp_path / "docker.pid"
    for text in ("x", "1", "-1", str(os.getpid()), "99999999999", "9" * 200):
        path.write_text(text, encoding="ascii")
        with pytest.raises(OSError, match=r"docker\.pid"):
            restart_docker(str(path))
    assert killed == []
    monkeypatch.setattr(Path, "read_text", lambda path, encoding: f"{path} dockerd\n".removeprefix("/proc/7/comm "))
    path.write_text("7\n", encoding="ascii")
    restart_docker(str(path))
    assert killed == [(7, signal.SIGTERM)]


def test_systemd_waits_longer_for_the_end_of_a_switch(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "n"))
        sock.settimeout(1)
        notify = Notify({"NOTIFY_SOCKET": str(tmp_path / "n"), "WATCHDOG_USEC": "90000000"})
        with notify.patiently(3600):
            assert sock.recv(100) == b"WATCHDOG_USEC=3600000000\nWATCHDOG=1"
        assert sock.recv(100) == b"WATCHDOG_USEC=90000000\nWATCHDOG=1"
    Notify({}).alive()  # without systemd


# -- what it observes --------------------------------------------------------------------------------------------------


def test_a_loading_engine_shows_its_health_and_the_last_line_of_its_log(world: World) -> None:
    world.healthy, world.log = False, ["2026-01-01T00:00:01.250000000Z older", "2026-01-01T00:00:02.500000000Z newest"]
    seen = world.watcher.observe()
    assert (seen.state, seen.healthy, seen.logged) == ("running", False, 1767225602.5)
    assert world.log_asked == [("vllm-m", "", False, 1)]
    assert (world.client.url, world.client.timeout) == ("http://127.0.0.1:1", 5.0) and world.client.asked == []
    for world.log in ([], ["no time"]):
        assert world.watcher.observe().logged is None
    world.healthy, world.log = True, ["2026-01-01T00:00:02.500000000Z newest"]
    seen = world.watcher.observe()
    assert seen.healthy and seen.logged is None and seen.answered is None


def test_the_figures_of_a_start_that_no_switch_made_are_kept(world: World, store: Store) -> None:
    world.log = ["2026-01-01T00:00:09.000000000Z INFO Available KV cache memory: 61.50 GiB"]
    world.healthy = False
    world.watcher.step()
    assert measured.of_release(store, 1) == []
    world.healthy = True
    world.watcher.step()
    (record,) = measured.of_release(store, 1)
    assert record["figures"] == {"kv_cache_gib": 61.5} and record["started_at"] == world.found["started_at"]
    asked = len(world.log_asked)
    world.watcher.step()
    assert len(world.log_asked) == asked  # once a start
    world.found["started_at"], world.log = "2026-01-02T00:00:00Z", ["INFO Available KV cache memory: 60.00 GiB"]
    world.watcher.step()
    (record,) = measured.of_release(store, 1)
    assert record["figures"] == {"kv_cache_gib": 60.0} and world.said == [
        *("vllm-m: missing → loading", "vllm-m: loading → serving"),
    ]


def test_figures_of_a_switch_stay_as_it_kept_them(world: World, store: Store) -> None:
    made = {"service": "vllm-m", "repo": "org/m", "image": "i", "at": 5.0, "started_at": world.found["started_at"]}
    measured.keep_start(store, 1, [{**made, "figures": {"kv_cache_gib": 50.0}}])
    world.watcher.step()
    assert measured.of_release(store, 1)[0]["figures"] == {"kv_cache_gib": 50.0} and world.log_asked == []


def test_figures_that_cannot_be_kept_keep_nothing_down(
    world: World, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(measured, "write_json", full)
    assert world.watcher.one_step().do == "nothing" and world.watcher.guard.engine == "serving"
    assert any("its figures could not be kept" in line for line in world.said)


def test_a_serving_engine_is_asked_for_its_metrics_at_their_interval(world: World) -> None:
    world.watcher.step()
    world.client.seconds = 0.25
    world.client.page = (
        "vllm:generation_tokens_total 7\nvllm:prompt_tokens_total 5\nvllm:num_requests_running 2\n"
        "vllm:num_requests_waiting 3\n"
    )
    seen = world.watcher.observe()
    assert (seen.running, seen.waiting, seen.tokens, seen.answered) == (2.0, 3.0, 7.0, 0.25)
    assert seen.progress is not None and seen.progress[:2] == (7.0, 5.0) and set(seen.progress[2:]) == {0.0}
    assert world.client.asked == [("/metrics", 5.0, 8 << 20)]
    world.now += 4.7  # an interval of 5 s, from question to question
    again = world.watcher.observe()
    assert (again.tokens, again.answered) == (7.0, None) and len(world.client.asked) == 1
    world.now += 0.1
    assert world.watcher.observe().answered == pytest.approx(0.25) and len(world.client.asked) == 2


def test_an_impatient_guard_reads_metrics_four_times_before_it_calls_a_wedge(world: World) -> None:
    world.watcher.settings = dataclasses.replace(world.settings, wedge_seconds=8.0)
    world.watcher.step()
    assert [world.watcher.observe().answered is not None for world.now in (1e5, 1e5 + 1.9, 1e5 + 2)] == [
        True,
        False,
        True,
    ]


def test_metrics_that_do_not_answer_are_no_figures_and_as_late_as_can_be(world: World) -> None:
    world.watcher.step()
    assert world.watcher.observe().progress is not None
    for world.client.error, world.client.status in ((HttpError("timeout", "x"), 200), (None, 500)):
        world.now += 5
        seen = world.watcher.observe()
        assert (seen.progress, seen.healthy, seen.answered) == (None, False, 5.0)
        world.now += 1
        seen = world.watcher.observe()  # not asked again yet, and nothing is known
        assert (seen.progress, seen.healthy, seen.answered) == (None, False, None)


@pytest.mark.parametrize(
    ("found", "how"),
    [
        ({"exit_code": 1}, "exit code 1"),
        ({"exit_code": 137, "oom_killed": True}, "exit code 137, out of memory"),
        ({"exit_code": 128, "error": "port is taken"}, "port is taken"),
    ],
)
def test_how_an_engine_ended(world: World, found: dict[str, Any], how: str) -> None:
    world.found |= {"state": "exited", "restart_count": 2, **found}
    seen = world.watcher.observe()
    assert (seen.how, seen.state, seen.restart_count, seen.foreign) == (how, "exited", 2, ())
    assert world.client.asked == [] and world.log_asked == []


def test_the_containers_of_others_are_named_where_the_bridge_is_gone(world: World, engine: Engine) -> None:
    ours = {"Id": "a", "Names": ["/vllm-m"]}
    others = [{"Id": "b", "Names": ["/database", "/alias"]}, {"Id": "c", "Names": None}]

    def listed(handler: Handler) -> None:
        handler.answer(200, [ours] if "filters" in handler.path else [ours, *others])

    engine.routes[("GET", "/containers/json")] = listed
    world.watcher.docker = Docker(str(engine.server_address))
    world.found |= {"state": "exited", "error": "could not find bridge br-1"}
    assert world.watcher.observe().foreign == ("database", "c")
    assert sorted("all=1" in path for _, path, _, _ in engine.seen) == [False, True]  # of others, what runs
    world.found["state"] = "running"
    assert world.watcher.observe().foreign == ()


@pytest.mark.parametrize(("memory", "limit"), [({"decode_tok_s_limit": 25}, 25.0), ({}, 0.0), (None, 0.0)])
def test_the_limit_of_one_stream_is_the_plan_s(world: World, store: Store, memory: Any, limit: float) -> None:
    (engine,) = store.engines(1)
    world.watcher.store.engines = lambda number: (  # type: ignore[method-assign]
        dataclasses.replace(engine, memory=memory),
    )
    assert world.watcher.observe().limit == limit


def test_without_a_release_or_with_a_damaged_one_there_is_no_engine(world: World, store: Store) -> None:
    (store.project_dir / "releases" / "1" / "plan.json").write_text("{", encoding="utf-8")
    for _ in range(3):
        assert world.watcher.observe().state == "missing"
    assert len(world.said) == 1 and world.said[0].startswith("release 1: ")
    (store.project_dir / "current").unlink()
    seen = world.watcher.observe()
    assert (seen.release, seen.state) == (None, "missing") and len(world.said) == 1


def test_a_switch_that_runs_is_seen_and_one_that_was_cut(
    world: World, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = world.watcher.observe()
    assert (seen.switching, seen.interrupted, seen.release, seen.docker) == (False, False, 1, True)
    monkeypatch.setattr(module.switch, "interrupted", lambda store: True)
    assert world.watcher.observe().interrupted and not world.watcher.observe(locked=True).interrupted
    monkeypatch.setattr(store, "switch_active", lambda: True)
    world.found["state"] = "exited"
    assert world.watcher.observe().switching and world.watcher.observe().state == "running"  # not inspected
    locked = world.watcher.observe(locked=True)
    assert not locked.switching and locked.state == "exited"


def test_a_look_under_the_lock_leaves_the_canary_for_the_next(world: World) -> None:
    ended = world.watcher.item.canary = Canary(1.0, True, 0.5)
    assert world.watcher.observe(locked=True).canary is None
    assert world.watcher.observe().canary is ended and world.watcher.observe().canary is None


# -- the canary --------------------------------------------------------------------------------------------------------


def canary(world: World) -> Canary:
    """Send one, and wait for its end."""
    world.watcher.do(Action("canary"), world.watcher.observe())
    for thread in threading.enumerate():
        if thread.name == "canary":
            thread.join(5)
    assert world.watcher.item.canary and not world.watcher.item.asking
    return world.watcher.item.canary


def test_a_canary_is_one_token_of_the_model(world: World) -> None:
    world.client.seconds = 2.5
    assert canary(world) == Canary(10_000.0, True, 2.5)
    body = {"model": REPO, "prompt": "1", "max_tokens": 1, "temperature": 0}
    assert world.client.asked == [("/v1/completions", body, {"X-Request-Id": "sparkfleet-canary"})]
    assert (world.client.url, world.client.timeout) == ("http://127.0.0.1:1", 60.0)


@pytest.mark.parametrize("error", [HttpError("timeout", "x"), RuntimeError("odd"), None])
def test_a_canary_that_is_not_answered_has_failed(world: World, error: Exception | None) -> None:
    world.client.error, world.client.status = error, 503
    assert not canary(world).ok


def test_one_canary_at_a_time_and_none_keeps_the_guard_alive(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    answered, post = threading.Event(), world.client.post

    def slow(*args: Any, **more: Any) -> HttpAnswer:
        answered.wait(5)
        return post(*args, **more)

    monkeypatch.setattr(world.client, "post", slow)
    seen = world.watcher.observe()
    for _ in range(3):
        world.watcher.do(Action("canary"), seen)
    threads = [thread for thread in threading.enumerate() if thread.name == "canary"]
    answered.set()
    for thread in threads:
        thread.join(5)
    assert len(threads) == len(world.client.asked) == 1 and threads[0].daemon


def test_a_canary_that_ends_under_the_lock_belongs_to_the_next_observation(world: World) -> None:
    seen = world.watcher.observe()
    ended = world.watcher.item.canary = Canary(2.0, True, 0.5)
    world.watcher.do(Action("start", "boot"), seen)
    assert world.calls == ["drop", "start"] and world.watcher.observe().canary is ended


def test_the_page_cache_is_dropped_where_that_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def drop() -> None:
        tried.append("drop")
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module.memory, "drop_page_cache", drop)
    module.drop_page_cache()
    assert tried == ["drop"]


# -- what it does with the engine --------------------------------------------------------------------------------------


def test_a_restart_tells_systemd_and_people(world: World) -> None:
    action, seen = world.wedge()
    world.notified.clear()
    world.watcher.do(action, seen)
    assert world.notified == [("WATCHDOG=1",)] * 3  # before each part that may take long
    assert world.said[-1] == "vllm-m: wedge: no token; restarting it"


def test_a_start_is_kept_before_it_is_made(world: World, store: Store) -> None:
    world.found["state"] = "exited"
    seen = world.watcher.observe()
    world.watcher.guard.decide(seen)
    world.watcher.guard.healing = {"at": 1.0, "reason": "boot"}
    world.watcher.do(Action("start", "boot"), seen)
    assert world.calls == ["drop", "start"] and store_state(store)["healing"]["reason"] == "boot"
    assert world.said[-1] == "vllm-m: starting it (boot)"


def test_docker_restarts_what_crashed(world: World) -> None:
    world.watcher.step()
    world.watcher.do(Action("adopt", "crash", "exit code 1"), world.watcher.observe())
    assert world.calls == ["drop"] and world.said[-1] == "vllm-m: crash: exit code 1; Docker restarts it"


def test_docker_is_restarted_under_the_lock(world: World, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def restart() -> None:
        world.calls.append(f"docker, {store_state(store)['engine']} is kept, by {(store.holder() or {}).get('holder')}")

    monkeypatch.setattr(module, "restart_docker", restart)
    world.watcher.step()
    seen = world.watcher.observe()
    world.watcher.guard.engine = "healing"
    world.watcher.do(Action("restart-docker", "network-missing", "no bridge"), seen)
    assert world.calls == ["docker, healing is kept, by guard"]
    assert world.said[-1] == "vllm-m: no bridge; restarting Docker, which makes its networks again"


@pytest.mark.parametrize("do", ["restart", "start", "give-up", "restart-docker"])
def test_nothing_is_done_where_docker_is_away_or_another_release_is_there(
    world: World, monkeypatch: pytest.MonkeyPatch, do: str
) -> None:
    monkeypatch.setattr(module, "restart_docker", lambda: world.calls.append("docker"))
    seen = world.watcher.observe()
    for change in ({"release": 2}, {"release": None}):
        world.watcher.do(Action(do, "crash"), dataclasses.replace(seen, **change))
        assert world.calls == [] and world.said[-1].endswith("left alone: the engine has changed meanwhile")

    def away(docker: Any, name: str) -> Any:
        raise DockerUnavailable("away")

    monkeypatch.setattr(module.engine, "inspect", away)
    world.watcher.do(Action(do, "crash"), seen)
    assert world.calls == [] and world.said[-1] == (
        f"vllm-m: {do} (crash) left alone: the engine has changed meanwhile"
    )


def test_it_gives_up_whatever_the_engine_has_become(world: World) -> None:
    world.log = [f"line {number}" for number in range(20)]
    world.watcher.step()
    seen = world.watcher.observe()
    world.watcher.guard.given_up = {"at": 1.0, "reason": "x"}
    world.found.update(state="restarting", started_at="2026-01-01T02:00:00Z")
    world.watcher.do(Action("give-up", "crash", "3 restarts"), seen)
    assert world.calls == ["stop, None is kept"] and world.watcher.guard.given_up["log"] == world.log
    assert world.log_asked[-1] == ("vllm-m", "", False, 150)
    assert world.said[-11:] == [
        "vllm-m: giving up: 3 restarts; it stays stopped until it is deployed or started",
        *(f"  line {number}" for number in range(10, 20)),
    ]
    # Docker has started it once more: it is stopped, and the log of why it was given up stays.
    world.log, count = ["later"], len(world.said)
    world.watcher.do(Action("give-up", "again"), dataclasses.replace(seen))
    assert world.watcher.guard.given_up["log"][0] == "line 0" and len(world.said) == count


def test_a_switch_that_was_cut_is_ended_while_systemd_waits(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for ended, said in (({"outcome": "restored"}, "restored"), (None, "by another")):
        monkeypatch.setattr(module.switch, "recover", lambda store, docker, ended=ended: ended)
        world.notified.clear()
        world.watcher._recover()
        assert world.notified == [
            ("WATCHDOG_USEC=10800000000", "WATCHDOG=1"),
            ("WATCHDOG_USEC=90000000", "WATCHDOG=1"),
        ]
        assert world.said[-2:] == ["a switch was interrupted; ending it", f"the switch ended: {said}"]


def cut(store: Store) -> None:
    store.write_switch({"id": "abc", "to": 1, "from": None, "phase": "waiting", "began": 5.0})


def test_a_switch_that_was_ended_is_not_ended_again_though_nothing_can_be_written(
    world: World, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(store)
    ends: list[int] = []

    def recover(store: Store, docker: Docker) -> dict[str, Any]:
        ends.append(1)
        return {"outcome": "restored", "troubles": ["the journal could not be written: \x1b[2J"]}

    monkeypatch.setattr(module.switch, "recover", recover)
    assert world.watcher.one_step().do == "recover"
    assert world.said[-1] == "  the journal could not be written: \ufffd[2J"
    for _ in range(3):
        world.now += 100
        assert world.watcher.one_step().do in ("nothing", "canary")
    assert ends == [1] and world.watcher.guard.engine == "serving"
    store.write_switch({"id": "def", "to": 1, "from": None, "phase": "waiting", "began": 6.0})
    assert world.watcher.one_step().do == "recover" and ends == [1, 1]  # that is another one


def test_a_switch_that_cannot_be_ended_is_tried_again_after_a_minute(
    world: World, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(store)
    tries: list[float] = []
    outcomes: list[Any] = [OSError(28, "No space left on device"), KeyError("odd"), None, {"outcome": "restored"}]

    def recover(store: Store, docker: Docker) -> Any:
        tries.append(world.now)
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(module.switch, "recover", recover)
    for _ in range(100):
        world.watcher.step()
        world.now += 2
    assert tries == [10_000.0, 10_060.0, 10_120.0, 10_180.0]
    assert [line for line in world.said if line.startswith("recover")] == [
        *("recover: [Errno 28] No space left on device", "recover: KeyError: 'odd'"),
    ]


def test_a_switch_that_was_cut_is_ended_once_on_a_full_disk(
    world: World, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real `recover`: of the journal nothing can be written."""
    store.write_switch({"id": "abc", "to": 1, "from": 1, "phase": "checking", "began": 5.0})

    def full(path: Path, *_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(releases, "write_text", full)
    assert [world.watcher.one_step().do for _ in range(4)] == ["recover", "nothing", "nothing", "nothing"]
    assert "the switch ended: refused" in world.said
    assert "  the journal could not be written: No space left on device" in world.said


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("odd"), RecursionError("deep")])
def test_a_state_that_cannot_be_written_keeps_no_engine_down(
    world: World, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(*_: Any) -> None:
        raise error

    monkeypatch.setattr(module, "write_json", broken)
    world.watcher.do(*world.wedge())
    assert world.calls == ["stop, None is kept", "drop", "start"]
    said = "No space left on device" if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    assert world.said.count(f"the state cannot be written: {said}") == 1


def test_a_state_that_cannot_be_encoded_keeps_no_engine_down(world: World) -> None:
    action, seen = world.wedge()
    world.watcher.guard.known["odd"] = {5}
    world.watcher.do(action, seen)
    assert world.calls[1:] == ["drop", "start"] and "set is not JSON serializable" in world.said[-1]


def test_a_mistake_of_ours_is_said_and_the_state_is_kept(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def odd(*_: Any) -> None:
        raise AttributeError("'int' object has no attribute 'get'")

    monkeypatch.setattr(module.engine, "stop", odd)
    world.watcher.do(*world.wedge())
    assert world.said[-1] == "restart: AttributeError: 'int' object has no attribute 'get'"
    assert store_state(world.store)["healing"]


def test_what_fails_is_said_and_the_guard_goes_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    action, seen = world.wedge()

    def fail(*args: Any) -> None:
        raise DockerError("no")

    monkeypatch.setattr(module.engine, "stop", fail)
    world.watcher.do(action, seen)
    assert world.said[-1] == "restart: no" and world.watcher.guard.healing


# -- what it writes and says -------------------------------------------------------------------------------------------


def test_the_state_is_written_when_it_moves_and_every_half_minute(world: World, store: Store) -> None:
    written: list[float] = []

    def at() -> float:
        return float(store_state(store)["clock"])

    world.watcher.step()
    written.append(at())
    for seconds in (29.9, 0.1, 29.9):
        world.now += seconds
        world.watcher.save()
        written.append(at())
    assert written == [10_000.0, 10_000.0, 10_030.0, 10_030.0]
    world.watcher.guard.running = 3.0
    world.watcher.save()
    assert at() == world.now and store_state(store)["running"] == 3.0
    page = (store.state_dir / "metrics" / "sparkfleet.prom").read_text(encoding="utf-8")
    assert page == world.watcher.page and 'sparkfleet_engine_up{engine="vllm-m"} 1\n' in page


def test_the_same_complaint_is_said_again_after_ten_minutes(world: World) -> None:
    for seconds, text, count in ((0, "a", 1), (600, "a", 1), (0.1, "a", 2), (1, "b", 3), (1, "b", 3), (1, "a", 4)):
        world.now += seconds
        world.watcher.complain("x", text)
        assert len(world.said) == count and world.said[-1] == f"x: {text}"
    world.watcher.complain("y", "a")
    assert world.said[-1] == "y: a"


def test_what_changes_is_said_once_and_no_secret_or_control_character(world: World) -> None:
    world.watcher.step()
    assert world.said == ["vllm-m: missing → serving"]
    world.watcher.step()
    assert len(world.said) == 1
    world.watcher.say("token hf_" + "a" * 34 + " and \x1b[31m")
    assert "hf_aaaa" not in world.said[-1] and "\x1b" not in world.said[-1]


def test_ready_is_not_answered_from_what_was_seen_a_minute_ago(world: World) -> None:
    world.watcher.step()
    world.now += 59.9
    assert world.watcher.answer("/ready")[0] == 200
    world.now += 0.1
    assert world.watcher.answer("/ready") == (503, "guard-stuck\n")
    queries = ("&".join(f"a{number}=1" for number in range(count)) for count in (8, 9))
    assert [world.watcher.answer(f"/ready?{query}")[0] for query in queries] == [503, 400]


def test_ready_with_the_name_of_a_key_is_of_that_key(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway that rotates the key asks which one a Spark has."""
    file = tmp_path / "engine_key"
    monkeypatch.setattr(host_http, "KEY_FILE", str(file))
    world.watcher.step()
    names = [engine_key.name(text) for text in ("the-key-before", "the-key-after")]

    def answers() -> list[int]:
        return [world.watcher.answer(f"/ready?key={name}")[0] for name in names]

    assert answers() == [503, 503] and world.watcher.answer("/ready")[0] == 200
    for text, expected in (("the-key-before\n", [200, 503]), ("the-key-after", [503, 200])):
        file.write_text(text)
        assert answers() == expected
    assert world.watcher.answer(f"/ready?key={names[0]}") == (503, "another-key\n")
    assert world.watcher.answer(f"/ready?key={names[1]}&model=org/other")[0] == 503
    assert world.watcher.answer("/ready?key=")[0] == 503
    assert not any(part in name for name in names for part in ("key", "before", "after"))


def test_a_damaged_state_is_set_aside_and_said(world: World, store: Store) -> None:
    path = store.state_dir / "guard-state.json"
    path.write_text('{"engine": "x"}', encoding="utf-8")
    said: list[str] = []
    fresh = Single(world.settings, store, Docker("/nowhere"), said.append)
    (kept,) = path.parent.glob("guard-state.json.damaged-*")
    assert fresh.guard.engine == "missing" and not path.exists()
    assert said == [
        f"{path} is damaged (engine: 'x' is not a state); it is kept as {kept}, and a new one is started",
    ]


def test_the_state_is_taken_up_again(world: World, store: Store) -> None:
    world.watcher.step()
    assert Single(world.settings, store, Docker("/nowhere"), world.said.append).guard.engine == "serving"


# -- the service -------------------------------------------------------------------------------------------------------


class Ended(Exception):
    """The test has seen enough."""


class Service:
    """`main` with a watcher of the test's; ends after some rounds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, world: World, rounds: int, **settings: Any) -> None:
        self.world, self.rounds, self.opened, self.slept = world, rounds, [], []  # type: World, int, list[float], list[float]
        self.opens = False
        self.round_seconds = 0.0
        monkeypatch.setattr(module, "read_settings", lambda path: Settings(**settings))
        monkeypatch.setattr(Watcher, "open_window", lambda watcher: self.open_window())
        monkeypatch.setattr(Watcher, "survive", lambda watcher: world.wait(self.round_seconds))
        set_time(monkeypatch, module, sleep=self.sleep)

    def open_window(self) -> bool:
        self.opened.append(self.world.now - 10_000)
        return self.opens

    def sleep(self, seconds: float) -> None:
        self.slept.append(round(seconds, 3))
        self.world.wait(seconds)
        if len(self.slept) == self.rounds:
            raise Ended

    def run(self) -> None:
        with pytest.raises(Ended):
            module.main([f"--lock-file={self.world.store.lock_file}"])


def test_a_port_that_cannot_be_had_is_tried_every_minute(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(monkeypatch, world, 70, listen_port=1, state_dir=str(world.store.state_dir))
    service.run()
    assert service.opened == [0, 60, 120] and service.slept == [2.0] * 70
    assert world.notified == [("READY=1",), *[("WATCHDOG=1",)] * 70]


def test_a_port_that_is_had_is_not_opened_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(monkeypatch, world, 70, listen_port=1, state_dir=str(world.store.state_dir))
    service.opens = True
    service.run()
    assert service.opened == [0]


def test_without_a_port_none_is_opened_and_a_slow_round_is_followed_at_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service(monkeypatch, world, 3, state_dir=str(world.store.state_dir))
    service.round_seconds = 1.5
    service.run()
    assert service.opened == [] and service.slept == [0.5] * 3
    service = Service(monkeypatch, world, 3, state_dir=str(world.store.state_dir))
    service.round_seconds = 1.99
    service.run()
    assert service.slept == [0.05] * 3


def test_damaged_settings_end_the_service(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "guard.json"
    path.write_text('{"interval": "x"}', encoding="utf-8")
    assert module.main([f"--settings={path}"]) == 2
    assert capsys.readouterr().err == (f"{path}: interval: not a number: 'x'; run site.yml, which writes it again\n")
    assert world.notified == [("STATUS=its settings are damaged", "ERRNO=22")]
    assert module.read_settings(tmp_path / "none.json") == Settings()


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told_at_its_socket(tmp_path: Path, abstract: bool) -> None:
    name = f"sparkfleet-test-{os.getpid()}" if abstract else str(tmp_path / "n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0{name}" if abstract else name)
        sock.settimeout(1)
        notify = Notify({"NOTIFY_SOCKET": f"@{name}" if abstract else name})
        notify("READY=1", "STATUS=x")
        assert sock.recv(100) == b"READY=1\nSTATUS=x"
        with notify.patiently(5):  # without a watchdog nothing is waited for
            notify.alive()
        assert sock.recv(100) == b"WATCHDOG=1"
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.recv(100)
    Notify({"NOTIFY_SOCKET": str(tmp_path / "gone")}).alive()


# -- the addresses that it listens on ----------------------------------------------------------------------------------


def test_a_port_that_is_taken_is_tried_again(
    store: Store, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as holder:
        settings = Settings(listen_port=holder.getsockname()[1], listen_address=("127.0.0.1",))
        watcher = Watcher(settings, store, Docker(str(engine.server_address)), said.append)
        assert not watcher.open_window() and said[0].endswith("in use; trying again")
    assert watcher.open_window()


def test_an_address_that_the_host_lacks_does_not_close_the_others(store: Store, engine: Engine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
    said: list[str] = []
    settings = Settings(listen_port=port, listen_address=("192.0.2.77", "127.0.0.1"))
    watcher = Watcher(settings, store, Docker(str(engine.server_address)), said.append)
    assert not watcher.open_window() and not watcher.open_window()
    assert len(said) == 1 and "on 192.0.2.77: Cannot assign requested address; trying again" in said[0]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3)
    connection.request("GET", "/metrics")
    assert connection.getresponse().status == 200


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), OSError("odd")])
def test_whatever_keeps_it_from_listening_is_said(
    world: World, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(*args: Any) -> None:
        raise error

    monkeypatch.setattr(module, "StatusServer", refuse)
    assert not world.watcher.open_window()
    assert world.said == [f"port 0 of /ready and /metrics: {error}; trying again"]


@pytest.mark.parametrize(
    ("kinds", "path", "field"),
    [
        ([], "/v1/completions", "prompt"),
        (["chat", "needle"], "/v1/completions", "prompt"),
        (["embeddings"], "/v1/embeddings", "input"),
        (["rerank"], "/v1/rerank", "documents"),
        (["classify"], "/classify", "input"),
    ],
)
def test_a_canary_is_what_the_model_can_answer(kinds: list[str], path: str, field: str) -> None:
    asked = {**fake_release.VERIFY, "kinds": kinds}
    found, body = module.canary_request(module.Engine(**fake_release.an_engine("vllm-m", verify=asked)))
    assert found == path and body["model"] == "org/vllm-m" and field in body
