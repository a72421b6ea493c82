"""The switch between releases: whatever fails, wherever it is cut, what ran before runs again, verified."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import (
    asking,
    engine,
    http,
    memory,
    releases,
    switch,
)
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.docker import Docker, DockerUnavailable
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.engine import EngineError
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.precheck import Problem
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.release_format import Engine
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.releases import ReleaseError, Store
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.switch import (
    FailedError,
    Switch,
    interrupted,
    recover,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.fakes import fake_release
from tests.unit.fakes.clock import set_time

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
        self.ports: dict[str, int] = {}  # by service; 8000 for the others
        for name in ("ours", "start", "stop", "remove", "compose_up", "inspect", "healthy", "read_log", "resolved"):
            monkeypatch.setattr(engine, name, getattr(self, name))
        monkeypatch.setattr(switch, "verify", self.verify)
        monkeypatch.setattr(switch, "precheck", self.precheck)
        monkeypatch.setattr(http, "KEY_FILE", str(store.state_dir / "etc" / "engine_key"))
        monkeypatch.setattr(memory, "drop_page_cache", lambda: self.did.append("drop"))
        set_time(monkeypatch, switch, asking, monotonic=lambda: self.clock, sleep=self.sleep)
        write = store.write_switch

        def write_or_cut(journal: dict[str, Any]) -> None:
            write(journal)
            if journal["phase"] == self.cut:
                raise PowerCut

        monkeypatch.setattr(store, "write_switch", write_or_cut)

    def precheck(self, store: Store, docker: Docker, number: int) -> list[Problem]:
        self.inspect(docker, "")
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
        release = {item.service for item in self.store.engines(int(Path(file).parent.name))}
        assert all(name in release for name, state in self.containers.items() if state == "running"), "not stopped"
        assert self.containers.get(service) != "running", "not stopped"
        ends = {"crash": "restarting", "forgotten": "exited", "stays down": "exited"}
        self.containers[service] = ends.get(self.bad.get(service, ""), "running")
        text = Path(file).read_text()
        if self.defined(self.made.get(service, ""), service) != self.defined(text, service) or recreate:
            self.ids[service] = f"id-{len(self.did)}"
        self.made[service] = text
        self.keys[service] = self.key()

    @staticmethod
    def defined(text: str, service: str) -> Any:
        data = yaml.safe_load(text)
        return engine.definition(data, service) if isinstance(data, dict) else text

    def resolved(self, project_dir: str, file: str) -> dict[str, Any]:
        data = yaml.safe_load(Path(file).read_text())
        if not isinstance(data, dict):
            raise EngineError("docker compose config: no mapping")
        return data

    def at(self, port: int) -> str:
        """The service that answers on a port; "" for none."""
        names = [name for name, state in self.containers.items() if state == "running"]
        return next((name for name in names if self.ports.get(name, 8000) == port), "")

    def inspect(self, docker: Docker, name: str) -> dict[str, Any]:
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
        name = self.at(client.port)
        return bool(name) and self.bad.get(name) != "silent"

    def read_log(
        self, docker: Docker, name: str, since: str, tty: bool, tail: int | None = None, most: int = 0
    ) -> list[str]:
        return [f"2026-11-23T10:00:00Z {name} says api_key='secret'"]

    def verify(self, params: dict[str, Any]) -> dict[str, Any]:
        self.step("verify")
        running = self.at(int(params["url"].rpartition(":")[2]))
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


class Power:
    """The power goes before the n-th thing that is done: for the first of `cuts` in a switch, for the next ones each
    time that the switch is recovered."""

    def __init__(self, world: World, cuts: list[int]) -> None:
        self._store, self._cuts, self._left = world.store, list(cuts), -1
        world.step = self.tick

    def tick(self, _what: str = "") -> None:
        self._left -= self._left >= 0
        if self._left == 0:
            self._left = -1
            raise PowerCut

    def _arm(self) -> None:
        self._left = self._cuts.pop(0) + 1 if self._cuts else -1

    def ended(self, begin: Callable[[], Any]) -> bool:
        """Switch, and recover until nothing is interrupted; whether anything of the switch was written."""
        self._arm()
        try:
            begin()
            return True
        except PowerCut:
            started = interrupted(self._store)
        while interrupted(self._store):
            self._arm()
            with contextlib.suppress(PowerCut):
                recover(self._store, Docker("/nowhere"))
        return started


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "project", tmp_path / "state", str(tmp_path / "lock"))


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, store: Store) -> World:
    return World(monkeypatch, store)


def stage(store: Store, service: str, text: str = "") -> int:
    made = fake_release.an_engine(service, model=service)
    text = text or f"services: {{{service}: {{}}}}\n"
    return store.stage(text, fake_release.plan(made), fake_release.lock(made))


def run(store: Store, to: int, mode: str = "deploy", **more: Any) -> dict[str, Any]:
    request = {"id": "abc", "to": to, "mode": mode, "controller": "alice@laptop", "verb": "site.yml", "keep": 3, **more}
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
    assert store.current() == 1 and journal["verifications"][OLD]["answer"] == "Paris"
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


def test_an_old_engine_that_runs_and_answers_wrong_is_left_for_inspection(
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
        with store.exclusive(patience=0.0) as also:
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
    assert not interrupted(store)  # the end is kept next to the lock
    (store.lock_file.parent / "switch-spare.json").unlink()  # the host was restarted
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
            assert world.clock - began[0] < 10 * switch.PATIENCE, "it waits indefinitely"
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


# -- waiting, to the second ------------------------------------------------------------------------------------------

CLIENT = http.Client("http://127.0.0.1:8000")


class Waiting:
    """`Switch.wait` by a clock of the test's: `states` says from when on Docker shows which."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, world: World, **states: Any) -> None:
        self.world, self.began = world, world.clock
        self.shown: dict[float, dict[str, Any] | Exception] = {}
        self.switch = Switch(world.store, Docker("/nowhere"), {"start_timeout": 300})
        self.switch.journal = {"container_ids": {}}
        self.started: list[float] = []
        self.ready_at = 10.0**9
        monkeypatch.setattr(engine, "inspect", self.inspect)
        monkeypatch.setattr(engine, "start", lambda docker, name: self.started.append(self.now))
        monkeypatch.setattr(engine, "healthy", lambda client: self.now >= self.ready_at)

    @property
    def now(self) -> float:
        return self.world.clock - self.began

    def inspect(self, docker: Docker, name: str) -> dict[str, Any]:
        shown = self.shown[max(at for at in self.shown if at <= self.now)]
        if isinstance(shown, Exception):
            raise shown
        base = {"id": "abc", "state": "running", "restart_count": 0, "exit_code": 0, "started_at": "", "tty": False}
        return {**base, **shown}

    def failure(self) -> tuple[str, float]:
        with pytest.raises(FailedError) as caught:
            self.switch.wait(NEW, CLIENT)
        self.facts = caught.value.facts
        return str(caught.value), self.now


AWAY = DockerUnavailable("nothing listens there")


def test_the_container_that_became_ready_is_noted(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    waiting = Waiting(monkeypatch, world)
    waiting.shown, waiting.ready_at = {0: {}}, 42
    waiting.switch.wait(NEW, CLIENT)
    assert waiting.now == 42 and waiting.switch.journal["container_ids"] == {NEW: "abc"} and waiting.started == []


def test_an_engine_that_is_never_ready_has_the_time_of_its_start(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    waiting = Waiting(monkeypatch, world)
    waiting.shown = {0: {}}
    assert waiting.failure() == ("vllm-new was not ready after 300 s", 301)
    assert waiting.facts["failure"] == "start-timeout" and waiting.facts["state"] == "running"


@pytest.mark.parametrize(
    ("shown", "message"),
    [
        ({"restart_count": 1}, "vllm-new crashed"),
        ({"state": "restarting", "exit_code": 1}, "vllm-new ended"),
        ({"state": "missing"}, "vllm-new ended"),
    ],
)
def test_an_engine_that_ends_is_a_failure_at_once(
    monkeypatch: pytest.MonkeyPatch, world: World, shown: dict[str, Any], message: str
) -> None:
    waiting = Waiting(monkeypatch, world)
    waiting.shown = {0: {}, 50: shown}
    assert waiting.failure() == (message, 50)


def test_an_engine_that_stays_down_is_started_once_and_given_a_moment(
    monkeypatch: pytest.MonkeyPatch, world: World
) -> None:
    waiting = Waiting(monkeypatch, world)
    waiting.shown = {0: {}, 50: {"state": "exited"}}
    assert waiting.failure() == ("vllm-new ended", 71) and waiting.started == [50]


def test_after_docker_was_away_containers_have_a_moment_to_come_back(
    monkeypatch: pytest.MonkeyPatch, world: World
) -> None:
    waiting = Waiting(monkeypatch, world)
    waiting.shown = {0: {}, 10: AWAY, 130: {"state": "restarting"}, 150: {}, 151: AWAY, 271: {"restart_count": 1}}
    assert waiting.failure() == ("vllm-new crashed", 292)


def test_docker_may_be_away_for_two_minutes_while_an_engine_starts(
    monkeypatch: pytest.MonkeyPatch, world: World
) -> None:
    waiting = Waiting(monkeypatch, world)
    waiting.shown = {0: {}, 10: AWAY}
    assert waiting.failure() == ("nothing listens there", 131) and waiting.facts["failure"] == "docker"


DAEMON = EngineError("docker compose up: Cannot connect to the Docker daemon at unix:///var/run/docker.sock")


@pytest.mark.parametrize(
    ("error", "seconds", "raised"),
    [
        (AWAY, 121, FailedError),
        (DAEMON, 121, EngineError),
        (EngineError("docker compose up: Is the docker daemon running?"), 121, EngineError),
        (EngineError("docker compose up: port is already allocated"), 0, EngineError),
    ],
)
def test_docker_is_waited_for_whoever_says_that_it_is_away(
    world: World, error: Exception, seconds: float, raised: type[Exception]
) -> None:
    began, tried = world.clock, []  # type: float, list[float]

    def action() -> None:
        tried.append(world.clock - began)
        raise error

    with pytest.raises(raised) as caught:
        Switch(world.store, Docker("/nowhere"), {}).patiently(action)
    assert tried == [*range(int(seconds) + 1)]
    if isinstance(caught.value, FailedError):
        assert caught.value.facts == {"failure": "docker", "state": "missing"}


# -- what is noted ---------------------------------------------------------------------------------------------------


def test_a_journal_as_it_begins(store: Store, world: World, deployed: int) -> None:
    number = stage(store, NEW)
    begun = Switch(store, Docker("/nowhere"), {"to": number, "verb": "upgrade"}, now=lambda: 7.0)
    begun.begin(number)
    assert begun.journal == {
        **{"id": "", "mode": "", "controller": "", "verb": "upgrade", "to": 2, "from": 1, "models": [NEW]},
        **{
            "from_models": [OLD],
            "services": [],
            "kept": [],
            "pid": os.getpid(),
            "boot_id": switch.boot_id(),
            "began": 7.0,
            "ended": None,
            "keep": 5,
        },
        **{"verify": "quick", "verify_seconds": 300.0, "asking": ""},
        **{"start_timeout": 1800.0, "phase": "checking", "steps": [{"phase": "checking", "at": 7.0}], "container": ""},
        **{"outcome": None, "error": None, "restore_error": None, "stopped_at": None, "answering_at": None},
        **{
            "out_of_service_s": None,
            "verifications": {},
            "container_ids": {},
            "measured": {},
            "repaired": [],
            "reclaimed": [],
            "left": [],
            "troubles": [],
            "joined": False,
        },
    }
    begun.phase("checking")  # again is no other step
    assert len(begun.journal["steps"]) == 1 and store.switch() == begun.journal
    begun.phase("starting", NEW)
    assert (begun.journal["phase"], begun.journal["container"]) == ("starting", NEW)


def test_a_boot_has_an_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(switch.boot_id()) == 36

    def absent(path: Path, encoding: str) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", absent)
    assert switch.boot_id() == ""


@pytest.mark.parametrize(
    ("phase", "raises"),
    [("", True), ("checking", True), ("stopping", False), ("waiting", False)],
)
def test_a_full_disk_is_an_error_only_as_long_as_nothing_has_changed(
    store: Store, world: World, monkeypatch: pytest.MonkeyPatch, phase: str, raises: bool
) -> None:
    def full(journal: dict[str, Any]) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write_switch", full)
    job = Switch(store, Docker("/nowhere"), {}, now=lambda: 1.0)
    job.journal = {"phase": phase, "steps": []}
    with pytest.raises(OSError, match="No space") if raises else contextlib.nullcontext():
        job.phase("next")
    assert job.journal["phase"] == (phase if raises else "next") and len(job.journal["steps"]) == (not raises)
    job.phase("done")
    assert job.journal["phase"] == "done"


@pytest.mark.parametrize(
    ("outcome", "stopped", "answering", "seconds"),
    [
        ("verified", 10.0, 52.26, 42.3),
        ("restored", 10.0, 52.0, 42.0),
        ("failed", 10.0, 52.0, None),
        ("removed", 10.0, None, None),
        ("verified", None, 52.0, None),
    ],
)
def test_how_long_nothing_served(
    store: Store, outcome: str, stopped: float | None, answering: float | None, seconds: float | None
) -> None:
    job = Switch(store, Docker("/nowhere"), {}, now=lambda: 99.0)
    job.journal = {"phase": "verifying", "steps": [], "stopped_at": stopped, "answering_at": answering}
    job.end(outcome)
    assert (job.journal["out_of_service_s"], job.journal["ended"]) == (seconds, 99.0)
    assert (job.journal["outcome"], job.journal["phase"]) == (outcome, "done")


@pytest.mark.parametrize(
    ("lines", "state", "restarts", "again"),
    [
        (4, "exited", 0, True),
        (5, "exited", 0, False),
        (5, "running", 1, True),
        (5, "running", 0, False),
        (5, "exited", 1, False),
    ],
)
def test_the_log_of_the_run_before_is_read_where_this_one_says_little(
    world: World, monkeypatch: pytest.MonkeyPatch, lines: int, state: str, restarts: int, again: bool
) -> None:
    asked: list[tuple[Any, ...]] = []

    def read_log(docker: Docker, *args: Any) -> list[str]:
        asked.append(args)
        return [f"line {number}" for number in range(lines if len(asked) == 1 else 500)]

    shown = {"state": state, "restart_count": restarts, "started_at": "2026-01-01T00:00:01Z", "tty": True}
    monkeypatch.setattr(
        engine, "inspect", lambda docker, name: {**shown, "exit_code": 3, "oom_killed": True, "error": "e"}
    )
    monkeypatch.setattr(engine, "read_log", read_log)
    facts = Switch(world.store, Docker("/nowhere"), {}).facts(NEW, {"failure": "x", "answer": "Rome", "state": "odd"})
    assert asked[0] == (NEW, "2026-01-01T00:00:00Z", True) and asked[1:] == [(NEW, "", True, 400)] * again
    log = facts.pop("log")
    assert log == [f"line {number}" for number in (range(100, 500) if again else range(lines))]
    assert facts == {
        **{"container": NEW, "state": "odd", "exit_code": 3, "oom_killed": True, "restart_count": restarts},
        **{"docker_error": "e", "failure": "x", "answer": "Rome"},
    }


def test_where_docker_says_nothing_the_facts_are_few(world: World) -> None:
    world.away = 1
    assert Switch(world.store, Docker("/nowhere"), {}).facts(NEW, {"docker_error": "port is taken"}) == {
        **{"container": NEW, "state": "missing", "exit_code": 0, "oom_killed": False, "restart_count": 0},
        **{"docker_error": "port is taken", "log": []},
    }


# -- the verification ------------------------------------------------------------------------------------------------


def test_what_a_verification_is_asked() -> None:
    asked = {"question": "q", "expect": "e", "prompt": "p", "prompt_expect": "pe", "max_tokens": 5}
    made = Engine(**{**fake_release.an_engine("vllm-m", 8001), "repo": "org/m", "verify": asked})
    assert switch.verify_params(made) == {
        **{"url": "http://127.0.0.1:8001", "model": "org/m", **asked, "timeout": 120.0},
        **{"kinds": ["chat", "completion", "stream"], "chat_template_kwargs": {"enable_thinking": False}},
    }


@pytest.mark.parametrize(
    ("failure", "marks"),
    [("answer-wrong", True), ("answer-degenerate", True), ("endpoint-down", False)],
)
def test_nonsense_makes_the_files_of_the_model_suspect(
    store: Store, world: World, deployed: int, monkeypatch: pytest.MonkeyPatch, failure: str, marks: bool
) -> None:
    did: list[str] = []
    monkeypatch.setattr(switch.integrity, "mark_served", lambda docker, why, service: did.append(f"{service}: {why}"))
    monkeypatch.setattr(switch.integrity, "request", did.append)

    def verify(params: dict[str, Any]) -> dict[str, Any]:
        verified = f"org/{OLD}" == params["model"]
        return {"verified": verified, "msg": "no", "failure": failure, "checks": [{"name": "chat"}], "answer": "x"}

    monkeypatch.setattr(switch, "verify", verify)
    journal = run(store, stage(store, NEW))
    assert did == [f"{NEW}: a verification failed ({failure})"] * marks + [failure]
    error = journal["error"]
    assert (error["message"], error["failure"], error["answer"]) == ("no", failure, "x")
    assert error["checks"] == [{"name": "chat"}] and journal["verifications"][OLD]["verified"]


class Depths:
    """An engine that is asked kind by kind: `wrong` are those that it does not pass, by service."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
        self.wrong: dict[str, str] = {}
        self.asked: list[tuple[str, list[str]]] = []
        self.shown: list[str] = []
        self.params: list[dict[str, Any]] = []
        self.store = store
        monkeypatch.setattr(switch, "verify", self.verify)

    def verify(self, params: dict[str, Any]) -> dict[str, Any]:
        service, kinds = params["model"].removeprefix("org/"), params["kinds"]
        self.asked.append((service, kinds))
        self.params.append(params)
        self.shown.append((self.store.switch() or {})["asking"])
        bad = self.wrong.get(service, "")
        checks = [{"name": kind, "ok": kind != bad, "failure": f"verify-{kind}" * (kind == bad)} for kind in kinds]
        result = {"verified": bad not in kinds, "checks": checks, "answer": "Paris", "verify_id": "sparkfleet-0"}
        result |= {"usage": {"prompt_tokens": 5}, "seconds": 1.0}
        return result if result["verified"] else {**result, "msg": f"{bad}: no", "failure": f"verify-{bad}"}


DEEP_KINDS = ["stream", "chat", "completion", "needle", "concurrency", "from a later version"]


def stage_kinds(store: Store, service: str) -> int:
    asked = {**fake_release.VERIFY, "kinds": DEEP_KINDS}
    made = fake_release.an_engine(service, model=service, verify=asked)
    return store.stage(f"services: {{{service}: {{}}}}\n", fake_release.plan(made), fake_release.lock(made))


QUICK_SET = ["chat", "completion", "stream"]


def test_a_release_is_asked_in_depth_kind_by_kind(
    store: Store, world: World, deployed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    depths = Depths(monkeypatch, store)
    journal = run(store, stage_kinds(store, NEW), verify="deep", verify_seconds=60)
    assert journal["outcome"] == "verified" and journal["verify"] == "deep"
    assert depths.asked == [(NEW, QUICK_SET), (NEW, ["concurrency"]), (NEW, ["needle"])]
    assert depths.shown == ["", "concurrency", "needle"] and journal["asking"] == ""
    assert [params.get("budget") for params in depths.params] == [None, 60.0, 60.0]  # time stands still here
    assert {params.get("verify_id") for params in depths.params[1:]} == {"sparkfleet-0"}
    found = journal["verifications"][NEW]
    assert [check["name"] for check in found["checks"]] == [*QUICK_SET, "concurrency", "needle"]
    assert found["verified"] is True and found["usage"] == {"prompt_tokens": 15} and found["seconds"] == 3.0


def test_a_release_with_a_garbled_context_is_rolled_back(
    store: Store, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What served before is not asked in depth, whatever it would answer."""
    depths = Depths(monkeypatch, store)
    assert run(store, stage_kinds(store, OLD))["outcome"] == "verified"
    depths.asked.clear()
    depths.wrong = {OLD: "needle", NEW: "needle"}
    journal = run(store, stage_kinds(store, NEW), verify="deep")
    assert journal["outcome"] == "restored" and store.current() == journal["from"]
    assert journal["error"]["failure"] == "verify-needle" and journal["error"]["message"] == "needle: no"
    assert depths.asked == [(NEW, QUICK_SET), (NEW, ["concurrency"]), (NEW, ["needle"]), (OLD, QUICK_SET)]


def test_by_default_a_release_is_not_asked_in_depth(
    store: Store, world: World, deployed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    depths = Depths(monkeypatch, store)
    depths.wrong = {NEW: "needle"}
    assert run(store, stage_kinds(store, NEW))["outcome"] == "verified"
    assert depths.asked == [(NEW, QUICK_SET)]


@pytest.mark.parametrize(("wrong", "last"), [("chat", QUICK_SET), ("concurrency", ["needle"])])
def test_an_engine_that_fails_the_quick_set_is_asked_no_more(
    store: Store, world: World, deployed: int, monkeypatch: pytest.MonkeyPatch, wrong: str, last: list[str]
) -> None:
    depths = Depths(monkeypatch, store)
    depths.wrong = {NEW: wrong}
    journal = run(store, stage_kinds(store, NEW), verify="deep")
    assert journal["outcome"] == "restored" and journal["error"]["failure"] == f"verify-{wrong}"
    assert [kinds for service, kinds in depths.asked if service == NEW][-1] == last


def test_a_restart_that_was_cut_is_asked_as_it_was_to_be(
    store: Store, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    depths = Depths(monkeypatch, store)
    number = stage_kinds(store, NEW)
    run(store, number)
    world.cut = "waiting"
    with pytest.raises(PowerCut):
        run(store, number, "restart", verify="deep", verify_seconds=9)
    world.cut = None
    depths.asked.clear()
    ended = recover(store, Docker("/nowhere"))
    assert ended is not None and ended["outcome"] == "verified" and ended["verify_seconds"] == 9.0
    assert depths.asked == [(NEW, QUICK_SET), (NEW, ["concurrency"]), (NEW, ["needle"])]


def test_an_engine_that_does_not_answer_its_questions_is_down(
    store: Store, world: World, deployed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = world.verify

    def silent(params: dict[str, Any]) -> dict[str, Any]:
        if params["model"] == f"org/{NEW}":
            raise http.HttpError("timeout", "no answer in 120 s")
        return verify(params)

    monkeypatch.setattr(switch, "verify", silent)
    journal = run(store, stage(store, NEW))
    assert journal["outcome"] == "restored" and journal["error"]["failure"] == "endpoint-down"
    assert "no answer in 120 s" in journal["error"]["message"]


# -- what stops, and what is removed ---------------------------------------------------------------------------------


def test_an_engine_has_a_minute_to_finish_and_one_that_failed_five_seconds(
    store: Store, world: World, deployed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped: list[tuple[str, int]] = []
    stop = world.stop

    def noted(docker: Docker, name: str, timeout: int = 60) -> bool:
        stopped.append((name, timeout))
        return stop(docker, name)

    monkeypatch.setattr(engine, "stop", noted)
    world.bad[NEW] = "wrong"
    assert run(store, stage(store, NEW))["outcome"] == "restored"
    assert stopped == [(OLD, 60), (NEW, 5)]


@pytest.mark.parametrize(("state", "stops"), [("restarting", True), ("paused", True), ("exited", False)])
def test_whatever_takes_memory_is_stopped(store: Store, world: World, state: str, stops: bool) -> None:
    world.containers["vllm-third"] = state
    journal = run(store, stage(store, NEW))
    assert ("stop vllm-third" in world.did) is stops and journal["outcome"] == "verified"
    assert world.containers == {NEW: "running"}  # what is no part of the release goes


def test_health_is_asked_where_the_release_before_answers(
    store: Store, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = fake_release.an_engine(OLD, 8001)
    world.ports[OLD] = 8001
    asked: list[int] = []
    healthy = world.healthy

    def noted(client: http.Client) -> bool:
        asked.append(client.port)
        return healthy(client)

    monkeypatch.setattr(engine, "healthy", noted)
    assert (
        run(store, store.stage("services: {}\n", fake_release.plan(made), fake_release.lock(made)))["outcome"]
        == "verified"
    )
    assert asked == [8001]
    assert run(store, stage(store, NEW))["outcome"] == "verified"
    assert asked == [8001, 8001, 8000]


def test_one_that_cannot_be_removed_does_not_undo_a_switch(
    store: Store, world: World, deployed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(docker: Docker, name: str) -> None:
        raise EngineError("cannot remove it")

    monkeypatch.setattr(engine, "remove", refuse)
    assert run(store, stage(store, NEW))["outcome"] == "verified"


def test_every_problem_that_is_known_beforehand_is_said(store: Store, world: World, deployed: int) -> None:
    world.problems = [Problem("image-missing", "no image"), Problem("disk-full", "no space")]
    journal = run(store, stage(store, NEW))
    message = "no image; also: no space [disk-full]"
    assert journal["error"] == {"message": message, "failure": "image-missing", "state": ""}
    assert (journal["outcome"], journal["models"], journal["from_models"]) == ("refused", [NEW], [OLD])


def test_a_release_that_is_damaged_for_good_is_known_beforehand(store: Store, world: World, deployed: int) -> None:
    for number in (deployed, stage(store, NEW)):
        for name in ("lock.json", ".sealed.json"):
            (store.folder(number) / name).chmod(0o644)
            (store.folder(number) / name).write_text("{")
    journal = run(store, 2)
    assert journal["outcome"] == "refused" and journal["error"]["failure"] == "release-damaged" and world.did == []
    number = stage(store, NEW)
    journal = run(store, number)  # a damaged one that serves is no obstacle for the next
    assert journal["outcome"] == "verified" and "release 1 is damaged" in journal["repaired"][0]


def test_what_came_to_nothing_is_kept_with_the_release(store: Store, world: World, deployed: int) -> None:
    world.bad[NEW] = "crash"
    run(store, stage(store, NEW))
    outcome = store.outcome(2)
    assert outcome and outcome["state"] == "failed" and outcome["message"] == "vllm-new ended"
    assert "vllm-new says" in (store.folder(2) / "engine.log").read_text()
    assert store.outcome(1) == {**(store.outcome(1) or {}), "state": "verified"}


def test_a_release_that_cannot_be_made_current_is_taken_back(
    store: Store, world: World, deployed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = store.commit

    def full(number: int, at: float, container_ids: dict[str, str]) -> None:
        if number != deployed:
            raise OSError(28, "No space left on device")
        commit(number, at, container_ids)

    monkeypatch.setattr(store, "commit", full)
    journal = run(store, stage(store, NEW))
    assert journal["outcome"] == "restored" and world.containers == {OLD: "running"}
    assert "could not be made current" in journal["error"]["message"] and journal["error"]["state"] == "running"


def test_why_the_old_one_does_not_come_back_is_explained(store: Store, world: World, deployed: int) -> None:
    def spoil(what: str) -> None:
        if what == f"up {NEW}":
            world.problems = [Problem("image-missing", "its image is gone"), Problem("disk-full", "x")]

    world.step = spoil
    world.bad.update({OLD: "crash", NEW: "crash"})
    journal = run(store, stage(store, NEW))
    assert journal["outcome"] == "failed"
    assert journal["restore_error"]["message"] == "vllm-old ended: its image is gone"
    assert journal["restore_error"]["failure"] == "image-missing"
    assert world.containers[OLD] == "exited"  # or Docker restarts it indefinitely


def damage(store: Store, number: int, *names: str) -> None:
    for name in names:
        (store.folder(number) / name).chmod(0o644)
        (store.folder(number) / name).write_text("{")


def test_the_release_to_go_back_to_is_checked_before_anything_stops(store: Store, world: World, deployed: int) -> None:
    number = stage(store, NEW)
    job = Switch(store, Docker("/nowhere"), {"to": number})
    job.begin(number)
    damage(store, deployed, "plan.json")
    damage(store, number, "lock.json")
    assert job.problems(number) == []
    assert [text.partition(" is missing")[0] for text in job.journal["repaired"]] == [
        *(str(store.folder(number) / "lock.json"), str(store.folder(deployed) / "plan.json")),
    ]
    damage(store, deployed, "lock.json", ".sealed.json")
    assert job.problems(number) == []
    assert len(job.journal["repaired"]) == 1 and "release 1 is damaged: " in job.journal["repaired"][0]
    assert store.numbers() == [1, 2]


def test_a_release_that_serves_and_cannot_be_repaired_is_said_once(store: Store, world: World, deployed: int) -> None:
    job = Switch(store, Docker("/nowhere"), {"to": deployed})
    job.begin(deployed)
    damage(store, deployed, "plan.json")
    assert job.problems(deployed) == [] and len(job.journal["repaired"]) == 1


def test_after_a_switch_every_release_is_whole(store: Store, world: World, deployed: int) -> None:
    other = stage(store, "vllm-other")
    number = stage(store, NEW)
    damage(store, other, "compose.yml")
    journal = run(store, number)
    assert store.damage(other) == [] and "compose.yml was changed; restored" in journal["repaired"][0]


def test_an_old_release_that_is_damaged_for_good_cannot_come_back(store: Store, world: World, deployed: int) -> None:
    world.bad[NEW] = "crash"
    damage(store, deployed, "lock.json", ".sealed.json")
    journal = run(store, stage(store, NEW))
    assert journal["outcome"] == "failed" and journal["restore_error"]["failure"] == "release-damaged"
    assert "lock.json is missing or damaged" in journal["restore_error"]["message"]


def test_recovery_sets_a_damaged_journal_aside(store: Store, world: World, deployed: int) -> None:
    (store.state_dir / "switch.json").write_text("{")
    assert recover(store, Docker("/nowhere")) is None
    assert not (store.state_dir / "switch.json").exists() and len(store.set_aside_files()) == 1


def test_a_key_of_a_switch_that_was_cut_before_it_changed_anything_is_forgotten(
    store: Store, world: World, key: Path, deployed: int
) -> None:
    key.write_text("old")
    world.cut = "checking"
    with pytest.raises(PowerCut):
        switch_with_key(store, stage(store, NEW), "new", key)
    world.cut = None
    ended = recover(store, Docker("/nowhere"))
    assert ended and ended["outcome"] == "refused"
    assert key.read_text() == "old" and [path.name for path in key.parent.iterdir()] == [key.name]


# -- the end of one that was cut, and the job ------------------------------------------------------------------------


@pytest.mark.parametrize(("boot", "why"), [("another", "the host was restarted"), ("", "its process was killed")])
def test_why_a_switch_was_cut(store: Store, world: World, deployed: int, boot: str, why: str) -> None:
    world.cut = "waiting"
    with pytest.raises(PowerCut):
        run(store, stage(store, NEW))
    world.cut = None
    journal = store.switch()
    assert journal
    store.write_switch({**journal, **({"boot_id": boot} if boot else {})})
    ended = recover(store, Docker("/nowhere"))
    assert ended and ended["error"] == {
        "message": f"the switch to release 2 was interrupted in the phase waiting: {why}",
        **{"failure": "switch-interrupted", "state": "missing"},
    }


def test_a_failure_that_was_known_before_the_cut_stays(store: Store, world: World, deployed: int) -> None:
    world.bad[NEW], world.cut = "crash", "restoring"
    with pytest.raises(PowerCut):
        run(store, stage(store, NEW))
    world.cut = None
    ended = recover(store, Docker("/nowhere"))
    assert ended and ended["error"]["message"] == "vllm-new ended" and ended["outcome"] == "restored"


@pytest.mark.parametrize("outcome", ["verified", "failed"])
def test_a_restart_that_was_cut_begins_again(store: Store, world: World, deployed: int, outcome: str) -> None:
    world.cut = "waiting"
    with pytest.raises(PowerCut):
        run(store, deployed, "restart")
    world.cut = None
    world.did.clear()
    if outcome == "failed":
        world.bad[OLD] = "wrong"
    ended = recover(store, Docker("/nowhere"))
    assert ended and ended["outcome"] == outcome and f"up {deployed}" in world.did
    assert ended["steps"][0]["phase"] == "stopping" and ended["id"] == "abc"


def test_a_journal_without_its_release_or_lock(store: Store, world: World, deployed: int) -> None:
    journal = store.switch()
    assert journal and not interrupted(store)
    store.write_switch({**journal, "phase": "waiting"})
    assert interrupted(store)
    with store.exclusive():
        assert not interrupted(store)
        (store.state_dir / "switch.json").write_text("{")
        assert not interrupted(store) and (store.state_dir / "switch.json").exists()  # its writer may be at work
    assert not interrupted(store) and not (store.state_dir / "switch.json").exists()
    assert recover(store, Docker("/nowhere")) is None


def test_a_switch_that_another_ends_is_left_to_it(store: Store, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(releases, "_locked", lambda handle, limit: False)
    store.write_switch({"to": 1, "phase": "waiting"})
    assert recover(store, Docker("/nowhere")) is None and world.did == []


class Job:
    """`main` on this store."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
        self.folders = [f"--project-dir={store.project_dir}", f"--state-dir={store.state_dir}"]
        monkeypatch.setattr(switch, "Store", lambda *folders: self.made(store, folders))

    def made(self, store: Store, folders: tuple[str, ...]) -> Store:
        assert folders == (str(store.project_dir), str(store.state_dir))
        return store

    def main(self, *words: str) -> int:
        return switch.main([*words, *self.folders])


def test_the_job_says_by_its_exit_code_whether_the_release_serves(
    store: Store, world: World, deployed: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job(monkeypatch, store)
    number = stage(store, NEW)
    assert job.main(f"--to={number}", "--id=abc", "--verb=upgrade", "--keep=7", "--start-timeout=60") == 0
    journal = store.switch()
    assert journal and (journal["id"], journal["verb"], journal["mode"]) == ("abc", "upgrade", "deploy")
    assert (journal["keep"], journal["start_timeout"]) == (7, 60.0)
    assert job.main("--to=9") == 1 and "there are releases 1, 2" in capsys.readouterr().out
    world.bad[OLD] = "wrong"
    assert job.main(f"--to={deployed}") == 1  # the other serves, which is not what was asked for
    with pytest.raises(SystemExit) as caught:
        job.main()
    assert caught.value.code == 2 and "--to and --recover" in capsys.readouterr().err


def test_a_lock_that_is_held_has_an_exit_code_of_its_own(
    store: Store, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job(monkeypatch, store)
    monkeypatch.setattr(releases, "_locked", lambda handle, limit: False)
    assert job.main("--to=1") == 75
    assert capsys.readouterr().out == f"the lock {store.lock_file} is held: None\n"


@pytest.mark.parametrize(
    ("outcome", "code"),
    [(None, 0), ("verified", 0), ("restored", 0), ("removed", 0), ("failed", 1), ("refused", 1)],
)
def test_the_end_of_a_switch_that_was_cut_has_an_exit_code(
    store: Store, monkeypatch: pytest.MonkeyPatch, outcome: str | None, code: int
) -> None:
    job = Job(monkeypatch, store)
    monkeypatch.setattr(switch, "recover", lambda store: outcome and {"outcome": outcome})
    assert job.main("--recover") == code


def test_a_container_is_recreated_where_that_is_asked_for(store: Store, world: World, deployed: int) -> None:
    request = {"id": "abc", "to": deployed, "mode": "restart", "keep": 3}
    before = world.ids[OLD]
    assert Switch(store, Docker("/nowhere"), request).run()["container_ids"] == {OLD: before}
    again = Switch(store, Docker("/nowhere"), {**request, "recreate": True}).run()
    assert again["container_ids"][OLD] not in ("", before)
    outcome = store.outcome(deployed)
    assert outcome and outcome["container_ids"] == again["container_ids"]


# -- more than one engine ----------------------------------------------------------------------------------------------

FIRST, SECOND, THIRD = "vllm-first", "vllm-second", "vllm-third"
PORTS = {FIRST: 8001, SECOND: 8002, THIRD: 8003}


def stage_all(store: Store, world: World, **tags: str) -> int:
    """A release with these engines, each with a tag that stands for how it is defined."""
    engines = [fake_release.an_engine(f"vllm-{name}", PORTS[f"vllm-{name}"]) for name in tags]
    world.ports.update(PORTS)
    services = "".join(f"  vllm-{name}: {{image: 'x:{tag}'}}\n" for name, tag in tags.items())
    return store.stage(f"services:\n{services}", fake_release.plan(*engines), fake_release.lock(*engines))


@pytest.fixture
def both(store: Store, world: World) -> int:
    """A release of two engines serves."""
    number = stage_all(store, world, first="1", second="1")
    assert run(store, number)["outcome"] == "verified"
    world.did.clear()
    return number


def test_engines_start_one_after_the_other_in_the_order_of_the_release(
    store: Store, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    world.step = events.append
    healthy = world.healthy

    def noted(client: http.Client) -> bool:
        events.append(f"healthy {world.at(client.port)}")
        return healthy(client)

    monkeypatch.setattr(engine, "healthy", noted)
    journal = run(store, stage_all(store, world, second="1", first="1"))
    assert events == [
        *(f"up {SECOND}", f"healthy {SECOND}", f"up {FIRST}", f"healthy {FIRST}", "verify", "verify"),
    ]
    assert world.did == ["drop", "up 1", "drop", "up 1"] and journal["outcome"] == "verified"
    assert [(step["phase"], step.get("container")) for step in journal["steps"]] == [
        *(("checking", None), ("stopping", None), ("starting", SECOND), ("waiting", SECOND), ("starting", FIRST)),
        *(("waiting", FIRST), ("verifying", SECOND), ("verifying", FIRST), ("committing", None), ("done", None)),
    ]
    assert journal["models"] == ["second", "first"] and journal["container_ids"] == world.ids
    assert {service: found["answer"] for service, found in journal["verifications"].items()} == {
        **{SECOND: "Paris", FIRST: "Paris"},
    }
    assert (store.outcome(1) or {})["container_ids"] == world.ids


@pytest.mark.parametrize("mode", ["deploy", "rollback"])
def test_an_engine_that_is_the_same_keeps_running_and_is_verified(
    store: Store, world: World, both: int, mode: str
) -> None:
    before = dict(world.ids)
    journal = run(store, stage_all(store, world, first="1", second="2"), mode)
    assert world.did == [f"stop {SECOND}", "drop", "up 2"]
    assert (journal["outcome"], journal["kept"]) == ("verified", [FIRST]) and world.ids[FIRST] == before[FIRST]
    assert {*journal["verifications"]} == {FIRST, SECOND} and journal["out_of_service_s"] is not None
    assert (store.outcome(2) or {})["container_ids"] == world.ids


def test_a_release_that_only_drops_or_adds_an_engine_leaves_the_others(store: Store, world: World, both: int) -> None:
    assert run(store, stage_all(store, world, first="1"))["outcome"] == "verified"
    assert world.did == [f"stop {SECOND}", f"remove {SECOND}"] and world.containers == {FIRST: "running"}
    world.did.clear()
    journal = run(store, stage_all(store, world, third="1", first="1"))
    assert world.did == ["drop", "up 3"] and journal["kept"] == [FIRST] and journal["stopped_at"] is None
    world.did.clear()
    assert run(store, stage_all(store, world, first="1", third="1"))["outcome"] == "verified"
    assert world.did == []  # nothing but the order


@pytest.mark.parametrize("how", ["stopped", "silent", "another container", "never verified", "recreate", "new key"])
def test_only_an_engine_that_serves_as_it_was_verified_is_kept(
    store: Store, world: World, both: int, key: Path, how: str
) -> None:
    request = {"id": "a", "mode": "deploy", "keep": 3}
    if how == "stopped":
        world.containers[FIRST] = "exited"
    elif how == "silent":
        world.bad[FIRST] = "silent"
        world.step = lambda what: world.bad.pop(FIRST, None) if what == f"up {FIRST}" else None
    elif how == "another container":
        world.ids[FIRST] = "made by hand"
    elif how == "never verified":
        store.commit(both, 5.0)
    else:
        request["recreate" if how == "recreate" else "new_key"] = True
        key.with_name("engine_key.next").write_text("new")
    number = stage_all(store, world, first="1", second="2")
    journal = Switch(store, Docker("/nowhere"), {**request, "to": number}, now=lambda: 5.0).run()
    assert journal["outcome"] == "verified" and journal["kept"] == []
    assert world.did.count("up 2") == 2


def test_the_second_engine_fails_and_the_first_is_as_it_was(store: Store, world: World, both: int) -> None:
    before = dict(world.ids)
    for how in ("crash", "wrong", "silent", "port"):
        world.did.clear()
        started: list[str] = []

        def fails_once(what: str, how: str = how, started: list[str] = started) -> None:
            if what == f"up {SECOND}":
                world.bad[SECOND] = "" if started else how
                started.append(what)

        world.step = fails_once
        journal = run(store, stage_all(store, world, first="1", second=how))
        assert journal["outcome"] == "restored" and journal["error"]["container"] == SECOND, how
        assert not any(FIRST in what for what in world.did) and world.ids[FIRST] == before[FIRST]
        assert world.containers == {FIRST: "running", SECOND: "running"} and store.current() == both
        assert {*journal["verifications"]} == {FIRST, SECOND} and journal["kept"] == [FIRST]
        assert (store.outcome(both) or {})["container_ids"] == world.ids


def test_a_kept_engine_that_hangs_is_started_anew_before_that_is_a_failure(
    store: Store, world: World, both: int
) -> None:
    world.bad[FIRST] = "wrong"
    world.step = lambda what: world.bad.pop(FIRST, None) if what == f"up {FIRST}" else None
    journal = run(store, stage_all(store, world, first="1", second="2"))
    assert journal["outcome"] == "verified" and journal["kept"] == []
    assert world.did == [f"stop {SECOND}", "drop", "up 2", f"stop {FIRST}", "drop", "up 2"]
    world.bad[FIRST] = "wrong"
    world.step = lambda what: None
    journal = run(store, stage_all(store, world, first="1", second="3"))
    assert journal["outcome"] == "failed" and journal["error"]["container"] == FIRST
    assert world.containers == {FIRST: "running", SECOND: "running"}  # left for a person to inspect


def restart(store: Store, *services: str) -> dict[str, Any]:
    request = {"id": "abc", "to": store.current(), "mode": "restart", "keep": 3, "services": [*services]}
    ticks = iter(range(100, 10_000))
    return Switch(store, Docker("/nowhere"), request, now=lambda: float(next(ticks))).run()


def test_a_restart_is_of_all_engines_or_of_those_that_are_named(store: Store, world: World, both: int) -> None:
    assert restart(store)["outcome"] == "verified"
    assert world.did == [f"stop {FIRST}", f"stop {SECOND}", "drop", "up 1", "drop", "up 1"]
    world.did.clear()
    journal = restart(store, SECOND)
    assert journal["outcome"] == "verified" and world.did == [f"stop {SECOND}", "drop", "up 1"]
    assert (journal["services"], journal["kept"]) == ([SECOND], [FIRST])
    world.did.clear()
    journal = restart(store, "vllm-none")
    assert journal["outcome"] == "refused" and world.did == [] and journal["error"]["failure"] == "bad-input"
    assert journal["error"]["message"] == f"release 1 has no engine vllm-none; it has {FIRST}, {SECOND}"


def test_a_restart_of_one_engine_that_fails_stops_no_other(store: Store, world: World, both: int) -> None:
    world.bad[SECOND] = "crash"
    assert restart(store, SECOND)["outcome"] == "failed"
    assert world.containers == {FIRST: "running", SECOND: "exited"}
    world.bad = {FIRST: "crash"}
    journal = restart(store)  # the rest of a release is started though one of it fails
    assert journal["outcome"] == "failed" and journal["error"]["container"] == FIRST
    assert world.containers == {FIRST: "exited", SECOND: "running"} and {*journal["verifications"]} == {SECOND}


def test_the_rest_of_a_release_comes_back_though_one_engine_does_not(store: Store, world: World, both: int) -> None:
    number = stage_all(store, world, third="1")
    world.bad = {THIRD: "crash", FIRST: "crash"}
    journal = run(store, number)
    assert journal["outcome"] == "failed" and journal["restore_error"]["container"] == FIRST
    assert world.containers[FIRST] == "exited" and world.containers[SECOND] == "running"


@pytest.mark.parametrize("phase", PHASES)
def test_cut_anywhere_the_engine_that_was_kept_stays(store: Store, world: World, both: int, phase: str) -> None:
    world.cut = phase
    with pytest.raises(PowerCut):
        run(store, stage_all(store, world, first="1", second="2"))
    world.cut = None
    kept = store.switch()
    assert kept and kept["kept"] == [FIRST]
    journal = recover(store, Docker("/nowhere"))
    assert journal and journal["outcome"] == "restored" and not any(FIRST in what for what in world.did)
    assert world.containers == {FIRST: "running", SECOND: "running"} and store.current() == both


def test_after_a_reboot_every_engine_is_brought_back(store: Store, world: World, both: int) -> None:
    world.cut = "waiting"
    with pytest.raises(PowerCut):
        run(store, stage_all(store, world, first="1", second="2"))
    world.cut = None
    world.containers.update({FIRST: "exited", SECOND: "exited"})
    journal = recover(store, Docker("/nowhere"))
    assert journal and journal["outcome"] == "restored" and journal["kept"] == []
    assert world.containers == {FIRST: "running", SECOND: "running"}


def test_a_restart_of_one_engine_that_was_cut_begins_again_with_it_alone(store: Store, world: World, both: int) -> None:
    world.cut = "waiting"
    with pytest.raises(PowerCut):
        restart(store, SECOND)
    world.cut = None
    world.did.clear()
    journal = recover(store, Docker("/nowhere"))
    assert journal and journal["outcome"] == "verified" and journal["services"] == [SECOND]
    assert not any(FIRST in what for what in world.did) and "up 1" in world.did


def test_a_switch_of_format_1_that_was_cut_is_ended(store: Store, world: World, deployed: int) -> None:
    """The program was upgraded while the host was down: release and journal are of the version before."""
    number = stage(store, NEW)
    for release, service in ((deployed, OLD), (number, NEW)):
        plan, lock = fake_release.flat(fake_release.an_engine(service, model=service), number=release)
        for name, data in (("plan.json", plan), ("lock.json", lock)):
            (store.folder(release) / name).chmod(0o644)
            (store.folder(release) / name).write_text(json.dumps(data))
        (store.folder(release) / ".sealed.json").unlink()
    world.containers = {OLD: "exited", NEW: "running"}
    old = {"id": "a", "to": number, "from": deployed, "model": NEW, "from_model": OLD, "phase": "waiting", "began": 5.0}
    releases.write_json(
        store.state_dir / "switch.json", {**old, "container": NEW, "container_id": "", "steps": [], "mode": "deploy"}
    )
    journal = recover(store, Docker("/nowhere"))
    assert journal and journal["outcome"] == "restored" and world.containers == {OLD: "running"}
    assert (journal["models"], journal["from_models"]) == ([NEW], [OLD]) and store.current() == deployed


@given(
    bad=st.dictionaries(st.sampled_from([FIRST, SECOND]), st.sampled_from(["crash", "wrong", "port"]), max_size=2),
    cuts=st.lists(st.integers(0, 60), max_size=3),
    to=st.sampled_from(["other", "same", "restart", "one"]),
)
def test_whatever_is_cut_all_engines_of_a_release_serve(
    bad: dict[str, str], cuts: list[int], to: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("world")
    store = Store(folder / "project", folder / "state", str(folder / "lock"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        world = World(monkeypatch, store)
        assert run(store, stage_all(store, world, first="1", second="1"))["outcome"] == "verified"
        tags = {"other": {"first": "1", "second": "2"}, "same": {"second": "1", "first": "1"}}.get(to)
        number = stage_all(store, world, **tags) if tags else 1
        power = Power(world, cuts)
        world.bad = dict(bad)
        services = [SECOND] if to == "one" else []
        started = power.ended(lambda: restart(store, *services) if number == 1 else run(store, number))
        ended = store.switch()
        if not started or not ended:
            return
        running = {name for name, state in world.containers.items() if state == "running"}
        if ended["outcome"] in ("verified", "restored"):
            assert running == {FIRST, SECOND} and not (ended["outcome"] == "verified" and "wrong" in bad.values())
            assert store.current() == (number if ended["outcome"] == "verified" else 1)
            assert (store.outcome(store.current() or 0) or {})["container_ids"] == {
                service: world.ids[service] for service in running
            }
        else:
            assert ended["outcome"] in ("failed", "refused") and (bad or not cuts)


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
        power = Power(world, cuts)
        for name in ("write_text", "link"):
            done = getattr(releases, name)

            def cut_before(*args: Any, _done: Callable[..., Any] = done, **more: Any) -> None:
                power.tick()
                _done(*args, **more)

            monkeypatch.setattr(releases, name, cut_before)
        world.bad = dict(bad)
        if not power.ended(lambda: switch_with_key(store, number, "new", path) if rekeyed else run(store, number)):
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


# -- what cannot be written ------------------------------------------------------------------------------------------

ERRORS = [
    OSError(28, "No space left on device"),
    OSError(30, "Read-only file system"),
    UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"),
    TypeError("Object of type set is not JSON serializable"),
    RecursionError("maximum recursion depth exceeded"),
]


class Disk:
    """Fails each write from the n-th on, those to memory (the spare journal) as well if so wished."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int, error: Exception, memory: bool) -> None:
        self.left, self.error, self.memory, self.works = after, error, memory, False
        for name in ("write_text", "link"):
            done = getattr(releases, name)

            def write(path: Path, *args: Any, _done: Callable[..., Any] = done, **more: Any) -> None:
                self.left -= 1
                if self.left < 0 and not self.works and (path.name != releases.SPARE or not self.memory):
                    raise self.error
                _done(path, *args, **more)

            monkeypatch.setattr(releases, name, write)


@given(
    bad=st.dictionaries(st.sampled_from([OLD, NEW]), st.sampled_from(["crash", "wrong", "port"]), max_size=1),
    after=st.integers(0, 25),
    error=st.sampled_from(ERRORS),
    memory=st.booleans(),
    to=st.sampled_from(["new", "restart", "first"]),
    cut=st.none() | st.integers(0, 12),
)
@settings(max_examples=max(settings.default.max_examples, 150))
def test_whatever_cannot_be_written_an_engine_serves(
    bad: dict[str, str],
    after: int,
    error: Exception,
    memory: bool,
    to: str,
    cut: int | None,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """From the n-th write on nothing can be written any more; perhaps the job is killed, and ended by the guard. In the
    end an engine that works serves, `current` says which, and the switch is not ended again; nor does it end otherwise
    when the host restarts with an empty disk."""
    folder = tmp_path_factory.mktemp("world")
    store = Store(folder / "project", folder / "state", str(folder / "lock"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        world = World(monkeypatch, store)
        if to != "first":
            assert run(store, stage(store, OLD))["outcome"] == "verified"
        number = 1 if to == "restart" else stage(store, NEW)
        disk = Disk(monkeypatch, after, error, memory)
        world.bad, left = dict(bad), [cut if cut is not None else 1000]
        world.did.clear()

        def tick(_what: str) -> None:
            left[0] -= 1
            if left[0] == -1:
                raise PowerCut

        world.step = tick
        ended: dict[str, Any] | None = None
        try:
            ended = run(store, number)
        except PowerCut:
            if interrupted(store):
                ended = recover(store, Docker("/nowhere"))
        except Exception as caught:
            assert caught is error and world.did == []  # nothing had changed

        def check(ended: dict[str, Any]) -> None:
            running = [name for name, state in world.containers.items() if state == "running"]
            if ended["outcome"] in ("verified", "restored"):
                assert running == [OLD if ended["outcome"] == "restored" or to == "restart" else NEW]
                assert [item.service for item in store.engines(store.current() or 0)] == running
            else:
                assert ended["outcome"] in ("refused", "removed", "failed")
            if not bad and to != "first":
                assert ended["outcome"] in ("verified", "restored", "refused") and len(running) == 1

        if ended:
            check(ended)
            assert not memory or not interrupted(store)
        disk.works, left[0] = True, 1000
        (folder / "switch-spare.json").unlink(missing_ok=True)
        if interrupted(store):
            again = recover(store, Docker("/nowhere"))
            assert again and not interrupted(store)
            check(again)
            if ended and ended["outcome"] == "verified" and to == "new":
                assert again["outcome"] in ("verified", "refused")


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("bad", ["", "crash"])
def test_what_could_not_be_written_is_said_and_kept_in_memory(
    store: Store, world: World, deployed: int, monkeypatch: pytest.MonkeyPatch, bad: str, error: Exception
) -> None:
    number = stage(store, NEW)
    world.bad[NEW] = bad
    write = store.write_switch

    def broken(journal: dict[str, Any]) -> None:
        if journal["phase"] not in ("checking", "stopping"):
            raise error
        write(journal)

    monkeypatch.setattr(store, "write_switch", broken)
    with monkeypatch.context() as until:
        until.setattr(store, "note_failure", lambda *_: broken({"phase": "x"}))
        ended = run(store, number)
    assert ended["outcome"] == ("restored" if bad else "verified")
    assert world.containers == {OLD if bad else NEW: "running"}
    line = ended["troubles"][0]
    assert line.startswith("the journal could not be written: ") and str(error).rpartition("] ")[2] in line
    assert len(ended["troubles"]) == 1 + bool(bad)  # each once
    assert (store.switch() or {})["outcome"] == ended["outcome"] and not interrupted(store)
    assert (store.lock_file.parent / "switch-spare.json").stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr(store, "write_switch", write)
    assert run(store, number)["troubles"] == [] and not (store.lock_file.parent / "switch-spare.json").exists()


def test_a_journal_in_memory_counts_only_instead_of_the_one_that_it_was_kept_for(
    store: Store, world: World, deployed: int
) -> None:
    before = store.switch()
    assert before
    store.spare_switch({**before, "phase": "done", "outcome": "failed"})
    assert (store.switch() or {})["outcome"] == "failed"
    write = (store.state_dir / "switch.json").read_text()
    (store.state_dir / "switch.json").unlink()
    assert store.switch() is None
    path = store.state_dir / "switch.json"
    for text, outcome in (
        (write, "failed"),  # a backup of the same one
        ("{", "failed"),
        (json.dumps({**before, "id": "another"}), "verified"),
        (json.dumps({**before, "began": 1.0}), "verified"),
        (json.dumps({**before, "steps": [*before["steps"], before["steps"][-1]]}), "verified"),  # it went on
    ):
        path.unlink(missing_ok=True)
        path.write_text(text)
        assert (store.switch() or {})["outcome"] == outcome and store.switch_damage() == ""
    path.write_text("{")
    store.spare_switch({**before, "outcome": "restored"})
    assert (store.switch() or {})["outcome"] == "restored" and store.switch_damage() == ""
    (store.lock_file.parent / "switch-spare.json").write_text("{")
    assert store.switch() is None and "switch.json" in store.switch_damage()


@pytest.mark.parametrize("damaged", [False, True])
def test_a_switch_that_ended_is_not_interrupted_again_by_a_touch(store: Store, damaged: bool) -> None:
    began = {"to": 1, "id": "a", "began": 5.0, "steps": [{"phase": "stopping", "at": 5.0}]}
    store.lock_file.parent.mkdir(exist_ok=True)
    store.write_switch({**began, "phase": "stopping"})
    store.spare_switch({**began, "phase": "done", "outcome": "restored"})
    if damaged:
        (store.state_dir / "switch.json").write_text("{bad")
    else:
        os.utime(store.state_dir / "switch.json", (1, 1))
    assert (store.switch() or {})["phase"] == "done" and not interrupted(store) and store.switch_damage() == ""


def test_a_journal_in_memory_that_stayed_behind_does_not_undo_the_end(store: Store) -> None:
    steps = [{"phase": "stopping", "at": 5.0}, {"phase": "waiting", "at": 6.0}, {"phase": "done", "at": 7.0}]
    store.lock_file.parent.mkdir(exist_ok=True)
    store.write_switch({"to": 1, "id": "a", "began": 5.0, "phase": "stopping", "steps": steps[:1]})
    store.spare_switch({"to": 1, "id": "a", "began": 5.0, "phase": "waiting", "steps": steps[:2]})
    spare = (store.lock_file.parent / "switch-spare.json").read_text()
    store.write_switch({"to": 1, "id": "a", "began": 5.0, "phase": "done", "steps": steps})
    (store.lock_file.parent / "switch-spare.json").write_text(spare)  # it was killed before it removed it
    assert (store.switch() or {})["phase"] == "done" and not interrupted(store)


def test_a_restart_that_was_cut_begins_again_on_a_full_disk(
    store: Store, world: World, deployed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.cut = "starting"
    with pytest.raises(PowerCut):
        run(store, deployed, "restart")
    world.cut = None
    assert world.containers == {OLD: "exited"}
    Disk(monkeypatch, 0, ERRORS[0], memory=False)
    ended = recover(store, Docker("/nowhere"))
    assert ended and world.containers == {OLD: "running"} and store.current() == deployed
    assert "the journal could not be written: No space left on device" in ended["troubles"]


@pytest.mark.parametrize("phase", ["stopping", "starting", "waiting", "verifying"])
def test_a_release_that_became_current_stays_though_the_journal_does_not_know(
    store: Store, world: World, deployed: int, phase: str
) -> None:
    journal = run(store, stage(store, NEW))
    world.did.clear()
    store.write_switch({**journal, "phase": phase, "outcome": None, "answering_at": None, "stopped_at": 5.0})
    ended = recover(store, Docker("/nowhere"))
    assert ended and ended["outcome"] == "verified" and ended["out_of_service_s"] is None
    assert world.containers == {NEW: "running"} and world.did == [] and store.current() == 2


def test_a_link_that_is_made_and_reported_as_failed_is_taken_back(
    store: Store, world: World, deployed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder cannot be synced after the rename, nor the outcome of the old release be written."""
    number, link, write = stage(store, NEW), releases.link, releases.write_json
    full = OSError(5, "Input/output error")

    def made(path: Path, target: str) -> None:
        link(path, target)
        if target == f"releases/{number}":
            raise full

    def unwritten(path: Path, data: Any, mode: int = 0o644) -> None:
        if path.name == "outcome.json" and path.parent.name == str(deployed):
            raise full
        write(path, data, mode)

    monkeypatch.setattr(releases, "link", made)
    monkeypatch.setattr(releases, "write_json", unwritten)
    journal = run(store, number)
    assert journal["outcome"] == "restored" and world.containers == {OLD: "running"} and store.current() == deployed
    assert journal["troubles"] == ["release 1 could not be recorded as verified: Input/output error"]


@pytest.mark.parametrize("error", [*ERRORS, KeyError("surprise")])
def test_nothing_that_fails_after_the_commit_undoes_it(
    store: Store, world: World, deployed: int, reclaims: Reclaims, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(*_: Any) -> None:
        raise error

    monkeypatch.setattr(switch.reclaim, "after_switch", broken)
    monkeypatch.setattr(switch.reclaim, "note", broken)
    monkeypatch.setattr(switch.key, "keep", broken)
    monkeypatch.setattr(store, "repair_all", broken)
    monkeypatch.setattr(engine, "remove", broken)
    journal = run(store, stage(store, NEW))
    assert journal["outcome"] == "verified" and store.current() == 2 and world.containers[NEW] == "running"
    assert [line.partition(": ")[0] for line in journal["troubles"]] == [
        *("the previous key could not be removed", "the container vllm-old could not be removed"),
        *("old releases could not be removed", "the files of the releases could not be checked"),
        "what no release needs could not be removed",
    ]
    assert store.switch() == json.loads(json.dumps(journal))


@pytest.mark.parametrize("error", ERRORS)
def test_nothing_that_fails_on_the_way_back_keeps_the_old_one_down(
    store: Store, world: World, deployed: int, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise error

    world.bad[NEW] = "crash"
    for name in ("note_failure", "never_verified", "commit"):
        monkeypatch.setattr(store, name, broken)
    monkeypatch.setattr(switch.key, "give_back", broken)
    monkeypatch.setattr(engine, "read_log", broken)
    journal = run(store, stage(store, NEW))
    assert journal["outcome"] == "restored" and world.containers == {OLD: "running"} and store.current() == deployed
    assert len(journal["troubles"]) == 5 and journal["error"]["message"] == "vllm-new ended"


def test_docker_s_odd_answers_are_a_failure_like_any_other(
    store: Store, world: World, deployed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    number, inspect = stage(store, NEW), world.inspect

    def odd(docker: Docker, name: str) -> dict[str, Any]:
        if name == NEW:
            raise TypeError("'int' object is not subscriptable")
        return inspect(docker, name)

    monkeypatch.setattr(engine, "inspect", odd)
    journal = run(store, number)
    assert journal["outcome"] == "restored" and journal["error"]["failure"] == "internal"
    assert world.containers == {OLD: "running"}
    monkeypatch.setattr(switch, "precheck", lambda *_: odd(Docker("/nowhere"), NEW))
    journal = run(store, number)
    assert journal["outcome"] == "refused" and journal["error"]["failure"] == "internal"


def test_troubles_are_said_by_the_job(
    store: Store, world: World, deployed: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job(monkeypatch, store)
    number = stage(store, NEW)
    world.bad[NEW] = "crash"
    monkeypatch.setattr(store, "note_failure", lambda *_: (_ for _ in ()).throw(ValueError("odd\x1b[2J")))
    assert job.main(f"--to={number}") == 1
    assert capsys.readouterr().out == "the failure of release 2 could not be recorded: ValueError: odd\ufffd[2J\n"
    monkeypatch.setattr(switch, "recover", lambda store: {"outcome": "restored", "troubles": ["one"]})
    assert job.main("--recover") == 0 and capsys.readouterr().out == "one\n"


def test_a_lock_that_is_given_back_while_its_holder_is_looked_up_is_taken(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.ExitStack() as held:
        assert held.enter_context(Store(lock_file=str(store.lock_file)).exclusive("guard"))
        monkeypatch.setattr(Store, "holder", lambda self: held.close())  # at this very moment, and then it is free
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
    plan, lock = store.plan(number), store.lock(number)
    lock["engines"][0]["image"] = image
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


def test_a_restart_of_a_release_that_is_not_the_current_one_keeps_only_what_is_the_same(
    store: Store, world: World, both: int
) -> None:
    assert run(store, stage_all(store, world, first="2", second="1"))["outcome"] == "verified"
    for tags, kept in (({"first": "1", "second": "2"}, []), ({"first": "2", "second": "3"}, [FIRST])):
        request = {"id": "a", "to": stage_all(store, world, **tags), "mode": "restart", "services": [SECOND]}
        job = Switch(store, Docker("/nowhere"), request, now=lambda: 5.0)
        job.begin(int(request["to"]))
        assert [*job.to_keep(int(request["to"]))] == kept


def test_what_a_container_is_made_from() -> None:
    service = {
        **{"image": "x", "networks": {"default": None}, "secrets": [{"source": "key", "target": "/run/key"}]},
        "volumes": [{"type": "volume", "source": "v", "target": "/v"}, {"type": "bind", "source": "/opt/hf"}],
    }
    document = {
        "services": {"a": service, "b": {"image": "y"}, "c": "odd"},
        "networks": {"default": {"name": "n"}, "other": {}},
        "secrets": {"key": {"file": "/etc/key"}, "unused": {}},
        "volumes": {"v": {"name": "p_v"}},
    }
    assert engine.definition(document, "a") == {
        **{"service": service, "networks": {"default": {"name": "n"}}, "secrets": {"key": {"file": "/etc/key"}}},
        **{"volumes": {"v": {"name": "p_v"}}, "configs": {}},
    }
    assert engine.definition(document, "b") != engine.definition({**document, "services": {"b": {"image": "z"}}}, "b")
    assert engine.definition({**document, "networks": {}}, "b") == engine.definition(document, "b")
    for odd in (document, {}, {"services": None}, {"services": {"c": []}}):
        assert engine.definition(odd, "c") is None


# -- engines that start on demand --------------------------------------------------------------------------------------


def stage_in_turn(store: Store, world: World, **tags: str) -> int:
    """The first always runs, the others start on demand."""
    engines = [
        fake_release.an_engine(
            f"vllm-{name}",
            PORTS[f"vllm-{name}"],
            **({} if name == "first" else {"on_demand": {"port": PORTS[f"vllm-{name}"] + 100}}),
        )
        for name in tags
    ]
    world.ports.update(PORTS)
    services = "".join(f"  vllm-{name}: {{image: 'x:{tag}'}}\n" for name, tag in tags.items())
    return store.stage(f"services:\n{services}", fake_release.plan(*engines), fake_release.lock(*engines))


@pytest.fixture
def in_turn(store: Store, world: World) -> int:
    """A release whose first engine serves, and whose others sleep."""
    number = stage_in_turn(store, world, second="1", first="1", third="1")
    assert run(store, number)["outcome"] == "verified"
    return number


def test_engines_on_demand_are_verified_after_the_others_one_at_a_time_and_stopped(
    store: Store, world: World, in_turn: int
) -> None:
    assert world.did == [
        *("drop", "up 1"),
        *("drop", "up 1", f"stop {SECOND}", "drop", "up 1", f"stop {THIRD}"),
    ]
    assert world.containers == {FIRST: "running", SECOND: "exited", THIRD: "exited"}
    journal = store.switch() or {}
    assert {*journal["verifications"]} == {FIRST, SECOND, THIRD} == {*(store.outcome(1) or {})["container_ids"]}


@pytest.mark.parametrize("awake", [(), (THIRD,)])
def test_one_on_demand_that_is_the_same_stays_as_it_is(
    store: Store, world: World, in_turn: int, awake: tuple[str, ...]
) -> None:
    world.containers.update(dict.fromkeys(awake, "running"))
    world.did.clear()
    journal = run(
        store, stage_in_turn(store, world, second="1", first="1", third="1") if awake else in_turn, "rollback"
    )
    assert journal["outcome"] == "verified" and journal["kept"] == [SECOND, FIRST, THIRD]
    assert world.did == [] and world.containers[THIRD] == ("running" if awake else "exited")
    assert {*journal["verifications"]} == {FIRST}  # which serves


def test_one_on_demand_that_runs_makes_room_for_one_that_is_to_be_verified(
    store: Store, world: World, in_turn: int
) -> None:
    world.containers[THIRD] = "running"
    world.did.clear()
    journal = run(store, stage_in_turn(store, world, second="2", first="1", third="1"))
    assert journal["outcome"] == "verified" and journal["kept"] == [FIRST, THIRD]
    assert world.did == [f"stop {THIRD}", "drop", "up 2", f"stop {SECOND}"]


def test_one_on_demand_makes_room_for_one_that_always_runs(store: Store, world: World, in_turn: int) -> None:
    world.containers[THIRD] = "running"
    world.did.clear()
    assert run(store, stage_in_turn(store, world, second="1", first="2", third="1"))["outcome"] == "verified"
    assert world.did == [f"stop {FIRST}", f"stop {THIRD}", "drop", "up 2"]


def test_one_on_demand_that_is_wrong_brings_the_old_release_back(store: Store, world: World, in_turn: int) -> None:
    world.did.clear()
    world.bad[SECOND] = "wrong"
    verify = world.verify

    def heal(params: dict[str, Any]) -> dict[str, Any]:
        found = verify(params)
        if world.at(int(params["url"].rpartition(":")[2])) == SECOND:
            world.bad.clear()
        return found

    world.verify = heal  # type: ignore[method-assign]
    switch.verify = heal  # type: ignore[attr-defined]
    journal = run(store, stage_in_turn(store, world, second="2", first="1", third="1"))
    assert (journal["outcome"], journal["error"]["failure"]) == ("restored", "answer-wrong")
    assert world.containers == {FIRST: "running", SECOND: "exited", THIRD: "exited"}
    assert "stop vllm-first" not in world.did and store.current() == in_turn


def test_a_switch_lets_requests_start_engines_again(store: Store, world: World, in_turn: int) -> None:
    assert store.halt(True) and not store.halt(True)
    run(store, in_turn, "restart", services=[SECOND])
    assert not store.halted() and world.containers[SECOND] == "exited"


def test_what_an_engine_on_demand_computes_is_finished_for_a_minute(
    store: Store, world: World, in_turn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = [3.0, 1.0, *[0.0] * 50]

    class Busy:
        def get(self, path: str, **_: Any) -> http.Answer:
            number = busy.pop(0) if busy else 0.0
            return http.Answer(200, "text/plain", f"vllm:num_requests_running {number}\n".encode())

    made = Switch(store, Docker("/nowhere"), {"to": in_turn})
    made.journal = {"troubles": []}
    monkeypatch.setattr(switch, "engine_client", lambda url: Busy())
    (third,) = [item for item in store.engines(in_turn) if item.service == THIRD]
    world.containers[THIRD] = "running"
    began = world.clock
    made.put_to_sleep(third)
    assert world.containers[THIRD] == "exited" and 6 <= world.clock - began <= 7
    busy[:] = [1.0] * 1000
    world.containers[THIRD], began = "running", world.clock
    made.put_to_sleep(third)
    assert world.containers[THIRD] == "exited" and 60 <= world.clock - began <= 62
    world.did.clear()
    made.put_to_sleep(third)
    assert world.did == []
