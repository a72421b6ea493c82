"""The switch between releases: whatever fails, wherever it is cut, what ran before runs again, verified."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.sparkfleet_host import engine, http, memory, releases, switch
from ansible.module_utils.sparkfleet_host.docker import Docker, DockerUnavailable
from ansible.module_utils.sparkfleet_host.engine import EngineError
from ansible.module_utils.sparkfleet_host.precheck import Problem
from ansible.module_utils.sparkfleet_host.releases import ReleaseError, Store
from ansible.module_utils.sparkfleet_host.switch import Switch, interrupted, recover
from hypothesis import given, settings
from hypothesis import strategies as st

OLD, NEW = "vllm-old", "vllm-new"


class PowerCut(BaseException):
    """The job is gone at this moment."""


class World:
    """A Docker engine with our containers: name -> state. `bad` says how a service fails: crash, silent, wrong."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
        self.store = store
        self.containers: dict[str, str] = {}
        self.bad: dict[str, str] = {}
        self.away = 0  # looks that Docker does not answer
        self.cut: str | None = None  # phase at which the power goes
        self.problems: list[Problem] = []
        self.ids: dict[str, str] = {}  # by service; another one for each container that is made
        self.made: dict[str, str] = {}  # text of the compose file that a container was made from
        self.keys: dict[str, str] = {}  # key that a container was started with
        self.step: Callable[[str], None] = lambda _what: None  # called before each thing that is done
        self.did: list[str] = []
        self.clock = 1000.0
        for name in ("ours", "start", "stop", "remove", "compose_up", "look", "healthy", "read_log"):
            monkeypatch.setattr(engine, name, getattr(self, name))
        monkeypatch.setattr(switch, "verify", self.verify)
        monkeypatch.setattr(switch, "precheck", self.precheck)
        monkeypatch.setattr(http, "KEY_FILE", str(store.state_dir / "etc" / "engine_key"))
        monkeypatch.setattr(memory, "drop_page_cache", lambda: self.did.append("drop"))
        monkeypatch.setattr(switch.time, "sleep", self.sleep)
        monkeypatch.setattr(switch.time, "monotonic", lambda: self.clock)
        write = store.write_switch

        def write_or_cut(journal: dict[str, Any]) -> None:
            write(journal)
            if journal["phase"] == self.cut:
                raise PowerCut

        monkeypatch.setattr(store, "write_switch", write_or_cut)

    def precheck(self, store: Store, docker: Docker, number: int) -> list[Problem]:
        self.look(docker, "")
        return list(self.problems)

    def key(self) -> str:
        path = Path(http.KEY_FILE)
        return path.read_text() if path.exists() else ""

    def sleep(self, seconds: float) -> None:
        self.clock += max(seconds, 1.0)

    def ours(self, docker: Docker) -> list[dict[str, Any]]:
        labels = "com.docker.compose.service"
        return [{"Id": name, "State": state, "Labels": {labels: name}} for name, state in self.containers.items()]

    def start(self, docker: Docker, name: str) -> None:
        self.step(f"start {name}")
        self.did.append(f"start {name}")
        self.keys[name] = self.key()
        if self.bad.get(name) != "stays down":
            self.containers[name] = "running"

    def stop(self, docker: Docker, name: str, timeout: int = 60) -> bool:
        self.step(f"stop {name}")
        self.did.append(f"stop {name}")
        self.containers[name] = "exited"
        return True

    def remove(self, docker: Docker, name: str) -> None:
        self.step(f"remove {name}")
        self.did.append(f"remove {name}")
        del self.containers[name]

    def compose_up(self, project_dir: str, file: str, service: str, recreate: bool = False) -> None:
        self.step(f"up {service}")
        self.did.append(f"up {Path(file).parent.name}")
        if self.bad.get(service) == "port":
            raise EngineError("docker compose up: Bind for 0.0.0.0:8000 failed: port is already allocated")
        assert all(state != "running" for state in self.containers.values()), "two engines at once"
        ends = {"crash": "restarting", "forgotten": "exited", "stays down": "exited"}
        self.containers[service] = ends.get(self.bad.get(service, ""), "running")
        text = Path(file).read_text()
        if self.made.get(service) != text or recreate:
            self.made[service], self.ids[service] = text, f"id-{len(self.did)}"
        self.keys[service] = self.key()

    def look(self, docker: Docker, name: str) -> dict[str, Any]:
        if self.away:
            self.away -= 1
            raise DockerUnavailable("nothing listens there")
        state = self.containers.get(name, "missing")
        return {
            "id": self.ids.get(name, ""),
            "state": state,
            "exit_code": 1,
            "restart_count": 0,
            "error": "",
            "started_at": "",
            "tty": False,
        }

    def healthy(self, client: Any) -> bool:
        running = [name for name, state in self.containers.items() if state == "running"]
        return bool(running) and self.bad.get(running[0]) != "silent"

    def read_log(self, docker: Docker, name: str, since: str, tty: bool, tail: int | None = None) -> list[str]:
        return [f"2026-11-23T10:00:00Z {name} says api_key='secret'"]

    def verify(self, params: dict[str, Any]) -> dict[str, Any]:
        self.step("verify")
        running = next(name for name, state in self.containers.items() if state == "running")
        assert params["model"] == f"org/{running}"
        if self.bad.get(running) == "wrong":
            return {
                "verified": False,
                "msg": "chat: got Rome",
                "failure": "answer-wrong",
                "checks": [],
                "answer": "Rome",
            }
        return {"verified": True, "checks": [], "answer": "Paris"}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "project", tmp_path / "state", str(tmp_path / "lock"))


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, store: Store) -> World:
    return World(monkeypatch, store)


def stage(store: Store, service: str, text: str = "") -> int:
    verify = {"question": "q", "expect": "Paris", "prompt": "p", "prompt_expect": "Paris", "max_tokens": 32}
    plan = {"model": service, "profile": "throughput", "repo": f"org/{service}", "service": service, "verify": verify}
    return store.stage(text or f"services: {{{service}: {{}}}}\n", plan, {"service": service, "port": 8000})


def run(store: Store, to: int, mode: str = "deploy") -> dict[str, Any]:
    request = {"id": "abc", "to": to, "mode": mode, "controller": "alice@laptop", "verb": "site.yml", "keep": 3}
    ticks = iter(range(100, 10_000))
    return Switch(store, Docker("/nowhere"), request, now=lambda: float(next(ticks))).run()


@pytest.fixture
def deployed(store: Store, world: World) -> int:
    """The old release serves."""
    number = stage(store, OLD)
    assert run(store, number)["outcome"] == "verified"
    world.did.clear()
    return number


def test_a_first_deployment(store: Store, world: World) -> None:
    journal = run(store, stage(store, NEW))
    assert (journal["outcome"], journal["from"], journal["phase"]) == ("verified", None, "done")
    assert world.did == ["drop", "up 1"]
    assert [step["phase"] for step in journal["steps"]] == [
        *("checking", "stopping", "starting", "waiting", "verifying", "committing", "done"),
    ]
    assert store.current() == 1 and (store.project_dir / "compose.yml").read_text().startswith("services")
    assert (store.project_dir / "compose.yml").readlink() == Path("current/compose.yml")
    assert journal["out_of_service_s"] is None  # nothing served before
    assert store.switch() == json.loads(json.dumps(journal))


def test_the_old_engine_stops_before_the_new_one_starts_and_is_removed_in_the_end(
    store: Store, world: World, deployed: int
) -> None:
    journal = run(store, stage(store, NEW))
    assert world.did == [f"stop {OLD}", "drop", "up 2", f"remove {OLD}"]
    assert journal["outcome"] == "verified" and store.current() == 2 and store.previous() == 1
    assert journal["out_of_service_s"] == journal["answering_at"] - journal["stopped_at"] > 0


@pytest.mark.parametrize(
    ("how", "message", "failure"),
    [
        ("crash", "vllm-new ended", None),
        ("stays down", "vllm-new ended", None),
        ("silent", "vllm-new was not ready after 1800 s", "start-timeout"),
        ("wrong", "chat: got Rome", "answer-wrong"),
        ("port", "docker compose up: Bind for 0.0.0.0:8000 failed: port is already allocated", None),
    ],
)
def test_a_release_that_fails_brings_the_old_one_back(
    store: Store, world: World, deployed: int, how: str, message: str, failure: str | None
) -> None:
    world.bad[NEW] = how
    journal = run(store, stage(store, NEW))
    assert journal["outcome"] == "restored"
    assert journal["error"]["message"] == message and journal["error"].get("failure") == failure
    assert world.containers == {OLD: "running"}
    assert store.current() == 1 and journal["verification"]["answer"] == "Paris"
    outcome = store.outcome(2)
    assert outcome and outcome["state"] == "failed" and outcome["message"] == message
    kept = (store.folder(2) / "engine.log").read_text()
    assert "vllm-new says" in kept and "secret" not in kept
    assert journal["out_of_service_s"] > 0


def test_a_first_deployment_that_fails_leaves_no_container(store: Store, world: World) -> None:
    world.bad[NEW] = "crash"
    journal = run(store, stage(store, NEW))
    assert journal["outcome"] == "removed" and world.containers == {}
    assert store.current() is None and not (store.project_dir / "compose.yml").exists()
    world.bad.clear()
    assert run(store, 1)["outcome"] == "verified"  # and can be tried again


def test_both_fail(store: Store, world: World, deployed: int) -> None:
    world.bad.update({NEW: "wrong", OLD: "crash"})
    journal = run(store, stage(store, NEW))
    assert journal["outcome"] == "failed" and journal["restore_error"]["message"] == "vllm-old ended"
    assert "running" not in world.containers.values() and store.current() == 1


def test_an_old_engine_that_runs_and_answers_wrong_is_left_to_be_looked_at(
    store: Store, world: World, deployed: int
) -> None:
    world.bad.update({NEW: "crash", OLD: "wrong"})
    assert run(store, stage(store, NEW))["outcome"] == "failed"
    assert world.containers[OLD] == "running"


def test_a_restart_has_nothing_to_go_back_to(store: Store, world: World, deployed: int) -> None:
    journal = run(store, deployed, "restart")
    assert journal["outcome"] == "verified" and world.did == [f"stop {OLD}", "drop", "up 1"]
    world.bad[OLD] = "crash"
    journal = run(store, deployed, "restart")
    assert journal["outcome"] == "failed" and store.current() == deployed
    assert world.containers == {OLD: "exited"}


def test_rollback_goes_to_what_served_before_and_back(store: Store, world: World, deployed: int) -> None:
    assert run(store, stage(store, NEW))["outcome"] == "verified"
    assert store.previous() == 1
    assert run(store, 1, "rollback")["outcome"] == "verified"
    assert (store.current(), store.previous()) == (1, 2)


def test_docker_that_is_away_for_a_while_is_waited_for(store: Store, world: World, deployed: int) -> None:
    world.away = 30
    assert run(store, stage(store, NEW))["outcome"] == "verified"


def test_an_engine_that_docker_forgets_is_started(store: Store, world: World, deployed: int) -> None:
    world.bad[NEW] = "forgotten"
    assert run(store, stage(store, NEW))["outcome"] == "verified"
    assert f"start {NEW}" in world.did


def test_docker_that_stays_away_is_a_failure(store: Store, world: World, deployed: int) -> None:
    world.away = 130
    journal = run(store, stage(store, NEW))
    assert journal["outcome"] == "refused" and journal["error"]["failure"] == "docker" and world.did == []
    world.step = lambda what: setattr(world, "away", 130 if what == f"up {NEW}" else world.away)
    world.away = 0
    journal = run(store, 2)
    assert journal["outcome"] == "restored" and journal["error"]["failure"] == "docker"


PHASES = ("stopping", "starting", "waiting", "verifying", "committing")


@pytest.mark.parametrize("phase", PHASES)
def test_cut_anywhere_it_is_ended_later(store: Store, world: World, deployed: int, phase: str) -> None:
    world.cut = phase
    with pytest.raises(PowerCut):
        run(store, stage(store, NEW))
    world.cut = None
    assert interrupted(store)
    journal = recover(store, Docker("/nowhere"))
    assert journal and journal["outcome"] == "restored" and journal["error"]["failure"] == "switch-interrupted"
    assert phase in journal["error"]["message"]
    assert world.containers == {OLD: "running"} and store.current() == deployed
    assert not interrupted(store) and recover(store, Docker("/nowhere")) is None


@pytest.mark.parametrize("phase", ["restoring", "restore-waiting", "restore-verifying"])
def test_cut_on_the_way_back(store: Store, world: World, deployed: int, phase: str) -> None:
    world.bad[NEW], world.cut = "crash", phase
    with pytest.raises(PowerCut):
        run(store, stage(store, NEW))
    world.cut = None
    journal = recover(store, Docker("/nowhere"))
    assert journal and journal["outcome"] == "restored" and journal["error"]["message"] == "vllm-new ended"
    assert world.containers == {OLD: "running"}


def test_cut_after_the_commit_it_stays(store: Store, world: World, deployed: int, monkeypatch: Any) -> None:
    def cut(keep: int) -> list[int]:
        raise PowerCut

    with monkeypatch.context() as until, pytest.raises(PowerCut):
        until.setattr(store, "prune", cut)
        run(store, stage(store, NEW))
    journal = recover(store, Docker("/nowhere"))
    assert journal and journal["outcome"] == "verified" and store.current() == 2
    assert world.containers[NEW] == "running"


def test_cut_first_deployment_leaves_nothing(store: Store, world: World) -> None:
    world.cut = "waiting"
    with pytest.raises(PowerCut):
        run(store, stage(store, NEW))
    world.cut = None
    journal = recover(store, Docker("/nowhere"))
    assert journal and journal["outcome"] == "removed" and world.containers == {}


def test_a_disk_that_fills_up_half_way_does_not_keep_the_old_one_from_coming_back(
    store: Store, world: World, deployed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = stage(store, NEW)
    write: Callable[..., None] = store.write_switch

    def full(journal: dict[str, Any]) -> None:
        if journal["phase"] not in ("checking", "stopping", "starting"):
            raise OSError(28, "No space left on device")
        write(journal)

    monkeypatch.setattr(store, "write_switch", full)
    monkeypatch.setattr(store, "note_failure", lambda *args: full({"phase": "x"}))
    monkeypatch.setattr(store, "commit", lambda *args: full({"phase": "x"}))
    journal = run(store, number)
    assert journal["outcome"] == "restored" and "No space left" in journal["error"]["message"]
    assert world.containers == {OLD: "running"}


def test_a_release_that_is_not_there_changes_nothing(store: Store, world: World, deployed: int) -> None:
    with pytest.raises(ReleaseError, match="there are releases 1"):
        run(store, 9)
    assert world.did == [] and store.switch()["to"] == 1  # type: ignore[index]


def test_one_at_a_time(store: Store) -> None:
    with store.exclusive() as mine:
        assert mine and store.switch_active()
        with store.exclusive() as also:
            assert not also
    assert not store.switch_active()


def test_old_releases_go_but_never_the_current_or_the_previous(store: Store, world: World, deployed: int) -> None:
    for count in range(4):
        stage(store, NEW, f"text {count}\n")
    assert run(store, 2)["outcome"] == "verified"
    # Kept: the newest three, the current one, and the one before.
    assert store.numbers() == [1, 2, 3, 4, 5]
    stage(store, NEW, "text 5\n")
    assert run(store, 6)["outcome"] == "verified"
    assert store.numbers() == [2, 4, 5, 6]


def test_a_damaged_release_is_a_failure_with_a_name(store: Store, world: World, deployed: int) -> None:
    assert run(store, stage(store, NEW))["outcome"] == "verified"
    world.did.clear()
    for name in ("plan.json", ".sealed.json"):
        (store.folder(1) / name).unlink()
    journal = run(store, 1, "rollback")
    assert journal["outcome"] == "refused" and journal["error"]["failure"] == "release-damaged"
    assert "releases/1/plan.json is missing or damaged" in journal["error"]["message"]
    assert world.did == [] and store.current() == 2
    assert store.numbers() == [2] and [path.name[:10] for path in store.folder(2).parent.glob("1.*")] == ["1.damaged-"]


# -- before anything stops -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["deploy", "rollback", "restart"])
def test_what_is_known_beforehand_stops_nothing(store: Store, world: World, deployed: int, mode: str) -> None:
    to = deployed if mode == "restart" else stage(store, NEW)
    world.problems = [Problem("image-missing", "no image X"), Problem("port-taken", "nginx listens on port 8000")]
    journal = run(store, to, mode)
    assert journal["outcome"] == "refused" and journal["error"]["failure"] == "image-missing"
    assert "no image X; also: nginx listens on port 8000 [port-taken]" in journal["error"]["message"]
    assert world.did == [] and world.containers == {OLD: "running"} and store.current() == deployed
    assert not interrupted(store) and store.outcome(to) == (store.outcome(deployed) if to == deployed else None)


def test_a_release_that_can_be_repaired_is_switched_to_as_it_was(store: Store, world: World, deployed: int) -> None:
    number = stage(store, NEW)
    before = store.compose_file(number).read_text()
    for name in ("compose.yml", "lock.json"):
        (store.folder(number) / name).chmod(0o644)
        (store.folder(number) / name).write_text("{ half")
    journal = run(store, number)
    assert journal["outcome"] == "verified" and world.made[NEW] == before
    assert any("compose.yml was changed" in line for line in journal["repaired"])


def test_an_edit_of_what_serves_does_not_come_back(store: Store, world: World, deployed: int) -> None:
    before = store.compose_file(deployed).read_text()
    store.compose_file(deployed).chmod(0o644)
    store.compose_file(deployed).write_text("edited\n")
    world.bad[NEW] = "crash"
    assert run(store, stage(store, NEW))["outcome"] == "restored"
    assert world.made[OLD] == before == store.compose_file(deployed).read_text()
    assert list(store.folder(deployed).glob("compose.yml.damaged-*"))


def test_a_journal_that_cannot_be_written_stops_nothing(
    store: Store, world: World, deployed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    number, write = stage(store, NEW), store.write_switch

    def full(journal: dict[str, Any]) -> None:
        if journal["phase"] != "checking":
            raise OSError(28, "No space left on device")
        write(journal)

    monkeypatch.setattr(store, "write_switch", full)
    journal = run(store, number)
    assert journal["outcome"] == "refused" and journal["error"]["failure"] == "disk-full" and world.did == []
    monkeypatch.setattr(store, "write_switch", write)
    ended = recover(store, Docker("/nowhere"))  # on the disk it is still checking
    assert ended and ended["outcome"] == "refused" and world.did == [] and world.containers == {OLD: "running"}


def test_a_mistake_of_ours_brings_the_old_one_back(store: Store, world: World, deployed: int) -> None:
    def odd(what: str) -> None:
        if what == f"up {NEW}":
            raise KeyError("surprise")

    world.step = odd
    journal = run(store, stage(store, NEW))
    assert journal["outcome"] == "restored" and journal["error"]["failure"] == "internal"
    assert "KeyError: 'surprise'" in journal["error"]["message"] and world.containers == {OLD: "running"}


def test_out_of_service_counts_from_an_engine_that_answered(store: Store, world: World, deployed: int) -> None:
    world.bad[OLD] = "silent"
    journal = run(store, stage(store, NEW))
    assert journal["outcome"] == "verified"
    assert journal["stopped_at"] is None and journal["out_of_service_s"] is None
    world.bad.clear()
    assert run(store, deployed, "rollback")["stopped_at"] is not None


def test_docker_is_waited_for_two_minutes_and_no_longer(store: Store, world: World, deployed: int) -> None:
    """Docker goes away while the old engine is stopped, and stays away."""
    began: list[float] = []

    def away(what: str) -> None:
        if what == f"stop {OLD}":
            began.append(world.clock)
            assert world.clock - began[0] < 10 * switch.PATIENCE, "it waits for ever"
            raise DockerUnavailable("nothing listens there")

    world.step = away
    journal = run(store, stage(store, NEW))
    assert journal["outcome"] == "failed" and journal["error"]["failure"] == "docker"
    assert switch.PATIENCE <= began[-1] - began[0] < 3 * switch.PATIENCE


# -- the key ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def key(store: Store, world: World) -> Path:
    path = Path(http.KEY_FILE)
    path.parent.mkdir(parents=True)
    return path


def switch_with_key(store: Store, to: int, new: str, path: Path) -> dict[str, Any]:
    path.with_name("engine_key.next").write_text(new)
    ticks = iter(range(100, 10_000))
    request = {"id": "abc", "to": to, "mode": "deploy", "keep": 3, "new_key": True}
    return Switch(store, Docker("/nowhere"), request, now=lambda: float(next(ticks))).run()


def test_a_new_key_counts_when_its_engine_is_verified(store: Store, world: World, key: Path, deployed: int) -> None:
    key.write_text("old")
    assert switch_with_key(store, stage(store, NEW), "new", key)["outcome"] == "verified"
    assert world.keys[NEW] == "new" == key.read_text() and [path.name for path in key.parent.iterdir()] == [key.name]


@pytest.mark.parametrize("before", ["old", ""])
def test_a_failed_switch_gives_the_key_back(store: Store, world: World, key: Path, deployed: int, before: str) -> None:
    if before:
        key.write_text(before)
    world.bad[NEW] = "crash"
    assert switch_with_key(store, stage(store, NEW), "new", key)["outcome"] == "restored"
    assert world.keys[NEW] == "new" and world.keys[OLD] == before == world.key()
    assert [path.name for path in key.parent.iterdir()] == ([key.name] if before else [])


def test_a_switch_that_is_refused_changes_no_key(store: Store, world: World, key: Path, deployed: int) -> None:
    key.write_text("old")
    world.problems = [Problem("image-missing", "no image")]
    assert switch_with_key(store, stage(store, NEW), "new", key)["outcome"] == "refused"
    assert key.read_text() == "old" and [path.name for path in key.parent.iterdir()] == [key.name]


def test_a_key_that_an_earlier_run_left_is_not_taken(store: Store, world: World, key: Path, deployed: int) -> None:
    key.write_text("old")
    key.with_name("engine_key.next").write_text("never wanted")
    assert run(store, stage(store, NEW))["outcome"] == "verified"
    assert key.read_text() == "old" == world.keys[NEW] and not key.with_name("engine_key.next").exists()


# -- cut anywhere ----------------------------------------------------------------------------------------------------


@given(
    bad=st.dictionaries(st.sampled_from([OLD, NEW]), st.sampled_from(["crash", "wrong", "port"]), max_size=2),
    cuts=st.lists(st.integers(0, 40), max_size=3),
    to=st.sampled_from(["new", "restart", "first"]),
    rekeyed=st.booleans(),
)
@settings(max_examples=max(settings.default.max_examples, 150))
def test_whatever_is_cut_either_release_serves_verified_with_its_key(
    bad: dict[str, str], cuts: list[int], to: str, rekeyed: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The power goes before the n-th thing that is done (a write, a link, a container), again while that is ended, and
    again. In the end the old or the new one serves, and the journal says which; unless neither works."""
    folder = tmp_path_factory.mktemp("world")
    store = Store(folder / "project", folder / "state", str(folder / "lock"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        world = World(monkeypatch, store)
        path = Path(http.KEY_FILE)
        path.parent.mkdir(parents=True)
        path.write_text("old")
        if to != "first":
            assert run(store, stage(store, OLD))["outcome"] == "verified"
        number = 1 if to == "restart" else stage(store, NEW)
        left: list[int] = []

        def tick(_what: str = "") -> None:
            if left:
                left[0] -= 1
                if left[0] < 0:
                    left.clear()
                    raise PowerCut

        world.step = tick
        for name in ("write_text", "link"):
            done = getattr(releases, name)

            def cut_before(*args: Any, _done: Callable[..., Any] = done, **more: Any) -> None:
                tick()
                _done(*args, **more)

            monkeypatch.setattr(releases, name, cut_before)
        world.bad = dict(bad)
        begun = False
        try:
            left[:] = cuts[:1]
            switch_with_key(store, number, "new", path) if rekeyed else run(store, number)
            begun = True
        except PowerCut:
            begun = interrupted(store)
        waiting = cuts[1:]
        while interrupted(store):
            left[:], waiting = waiting[:1], waiting[1:]
            with contextlib.suppress(PowerCut):
                recover(store, Docker("/nowhere"))
        if not begun:
            return  # cut before anything was written of it
        ended, current = store.switch(), store.current()
        assert ended and ended["phase"] == "done" and not store.switch_damage()
        running = [name for name, state in world.containers.items() if state == "running"]
        outcome = ended["outcome"]
        assert all(store.damage(kept) == [] for kept in store.numbers())
        wanted = OLD if to == "restart" else NEW
        if outcome == "verified":
            assert running == [wanted] and current == number and world.keys[wanted] == world.key()
            assert world.key() in (("new", "old") if rekeyed else ("old",))
        elif outcome == "restored":
            assert running == [OLD] and current == 1 and world.keys[OLD] == world.key() == "old"
        elif outcome == "refused":
            assert running == ([] if to == "first" else [OLD]) and world.key() == "old"
        else:
            assert outcome in ("removed", "failed") and (bad.get(OLD) or to == "first")
            assert world.key() == "old" and not any(world.bad.get(name) is None for name in running)
        if not bad and not cuts:
            assert outcome == "verified" and world.key() == ("new" if rekeyed else "old")
        if not bad.get(OLD) and to == "new":
            assert outcome in ("verified", "restored", "refused")  # the old one works: something serves
        assert not path.with_name("engine_key.previous").exists()


def test_a_lock_that_is_given_back_while_its_holder_is_looked_up_is_taken(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.ExitStack() as held:
        assert held.enter_context(Store(lock_file=str(store.lock_file)).exclusive("guard"))
        monkeypatch.setattr(Store, "holder", lambda self: held.close())  # at this very moment, and then nobody
        with store.exclusive(patience=0.0) as mine:
            assert mine


# -- what no release needs -------------------------------------------------------------------------------------------


class Reclaims:
    """Stands for `reclaim.after_switch`: the notes that it found at each call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[list[str]] = []
        self.error: OSError | None = None
        monkeypatch.setattr(switch.reclaim, "after_switch", self.after_switch)

    def after_switch(self, store: Store, docker: Docker) -> tuple[list[dict[str, Any]], list[str]]:
        self.calls.append([part.name for part in switch.reclaim.unneeded(store)])
        if self.error:
            raise self.error
        return [{"kind": "image", "name": "i", "bytes": 7}], ["x stays"]


@pytest.fixture
def reclaims(monkeypatch: pytest.MonkeyPatch) -> Reclaims:
    return Reclaims(monkeypatch)


def pinned(store: Store, service: str, image: str, text: str) -> int:
    number = stage(store, service, text)
    plan, lock = store.plan(number), {**store.lock(number), "image": image}
    store.remove([number])
    return store.stage(text, plan, lock)


def test_what_pruned_releases_needed_is_noted_and_reclaimed(store: Store, world: World, reclaims: Reclaims) -> None:
    for count in range(4):
        journal = run(store, pinned(store, (OLD, NEW)[count % 2], f"image:{count}", f"text {count}\n"))
        assert journal["outcome"] == "verified"
    assert reclaims.calls == [[], [], [], ["image:0"]]  # 3 are kept
    assert journal["reclaimed"] == [{"kind": "image", "name": "i", "bytes": 7}] and journal["left"] == ["x stays"]
    kept = store.switch()
    assert kept and kept["reclaimed"] == journal["reclaimed"]


def test_nothing_is_reclaimed_unless_the_switch_was_verified(
    store: Store, world: World, deployed: int, reclaims: Reclaims
) -> None:
    reclaims.calls.clear()
    world.bad[NEW] = "crash"
    assert run(store, stage(store, NEW))["outcome"] == "restored"
    request = {"to": deployed, "mode": "restart", "keep": 3, "reclaim": False}
    assert Switch(store, Docker("/nowhere"), request).run()["outcome"] == "verified"
    assert reclaims.calls == []


def test_a_verified_release_stays_though_nothing_can_be_reclaimed(
    store: Store, world: World, deployed: int, reclaims: Reclaims
) -> None:
    reclaims.error = OSError(30, "Read-only file system")
    journal = run(store, stage(store, NEW))
    assert journal["outcome"] == "verified" and store.current() == 2 and len(reclaims.calls) == 1


def test_a_release_whose_needs_cannot_be_noted_is_not_pruned(
    store: Store, world: World, deployed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(switch.reclaim, "note", full)
    for count in range(4):
        assert run(store, stage(store, NEW, f"text {count}\n"))["outcome"] == "verified"
    assert store.numbers() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("how", ["refused", "restored"])
def test_releases_that_never_served_do_not_pile_up(store: Store, world: World, deployed: int, how: str) -> None:
    """Each attempt is another release: the newest few stay, and all that served."""
    assert run(store, stage(store, "vllm-third"))["outcome"] == "verified"
    assert run(store, stage(store, "vllm-fourth"))["outcome"] == "verified"
    world.problems = [Problem("image-missing", "no image X")] if how == "refused" else []
    world.bad[NEW] = "crash"
    for count in range(6):
        to = stage(store, NEW, f"attempt {count}\n")
        assert run(store, to)["outcome"] == how
    first = min(set(store.numbers()) - {1, 2, 3})
    stage(store, NEW, "attempt 6\n")
    assert run(store, first)["outcome"] == how and first in store.numbers()  # the one that was asked for stays
    store.remove([10])
    assert store.numbers() == [1, 2, 3, 7, 8, 9] and store.find("attempt 5\n", store.plan(9)) == 9
