"""Hosts of a group that switch together: whatever ends when, all of them serve the same release, or none does."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import (
    bounded,
    engine,
    group,
    guard,
    http,
    memory,
    status,
    switch,
)
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.docker import Docker
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.engine import EngineError
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.group import Group, Record, Status
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.releases import Store
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.switch import Switch

from tests.unit.fakes import fake_release

SERVICE = "vllm-wide"
DIGEST = "a" * 64
HOSTS = 3


class PowerCut(BaseException):
    """The host is gone at this moment."""


class Host:
    """One of the group: its store, container, and whether it has power."""

    def __init__(self, rank: int, root: Path) -> None:
        self.rank, self.root = rank, root
        self.store = Store(root / "project", root / "state", str(root / "lock"))
        self.docker = Docker(str(root / "docker.sock"))
        self.state, self.seq, self.release = "missing", 0, 0
        self.up = True
        self.cut_at: str | None = None  # phase of its journal at which the power goes
        self.fails = False  # its rank ends as soon as it has started
        self.over = threading.Event()
        self.did: list[str] = []


class World:
    """Three hosts. Rank 0 answers while every worker's rank runs that was started for this start of rank 0."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
        self.hosts = [Host(rank, root / str(rank)) for rank in range(HOSTS)]
        self.count = itertools.count(1)
        self.formed: tuple[int, ...] = ()
        self.wrong = 0  # a release that answers wrong
        self.lock = threading.RLock()
        self.boots = False  # a host that loses power comes back at once
        for name in ("ours", "start", "stop", "remove", "compose_up", "inspect", "healthy", "read_log"):
            monkeypatch.setattr(engine, name, getattr(self, name))
        monkeypatch.setattr(switch, "verify", self.verify)
        monkeypatch.setattr(switch, "precheck", lambda *_: [])
        monkeypatch.setattr(http, "KEY_FILE", str(root / "engine_key"))
        monkeypatch.setattr(memory, "drop_page_cache", lambda: None)
        monkeypatch.setattr(group, "ask", self.ask)
        for module, name, value in (
            *((switch, name, 0.01) for name in ("ASK_PAUSE",)),
            *((switch, name, 1.5) for name in ("JOIN_SECONDS", "RANKS_SECONDS", "HEAD_SECONDS")),
            (switch, "LOST_SECONDS", 0.3),
            *((guard, name, 0.03) for name in ("RANK_PAUSE", "RECOVER_PAUSE")),
            *((guard, name, 0.3) for name in ("RANK_SECONDS", "AWAY_SECONDS")),
            (guard, "RANKS_SECONDS", 0.5),
            (guard, "START_PAUSES", (0.05,)),
        ):
            monkeypatch.setattr(module, name, value)

    def at(self, docker: Docker) -> Host:
        return next(host for host in self.hosts if str(host.root) in docker.socket_path)

    def of(self, path: str) -> Host:
        return next(host for host in self.hosts if path.startswith(str(host.root)))

    def ask(self, own: Group, rank: int, seconds: float = 3) -> Status | None:
        host = self.hosts[rank]
        if not host.up:
            return None
        return group.understood(group.as_text(group.status(host.store, host.docker)))

    # -- Docker ----------------------------------------------------------------------------------------------

    def ours(self, docker: Docker) -> list[dict[str, Any]]:
        host = self.at(docker)
        labels = {"com.docker.compose.service": SERVICE}
        return [] if host.state == "missing" else [{"Id": SERVICE, "State": host.state, "Labels": labels}]

    def _end(self, host: Host) -> None:
        host.state = "exited"

    def stop(self, docker: Docker, name: str, timeout: int = 60) -> bool:
        self._end(self.at(docker))
        return True

    def remove(self, docker: Docker, name: str) -> None:
        self.at(docker).state = "missing"

    def start(self, docker: Docker, name: str) -> None:
        self._run(self.at(docker), self.at(docker).release)

    def compose_up(self, project_dir: str, file: str, service: str, recreate: bool = False) -> None:
        assert service == SERVICE
        self._run(self.of(project_dir), int(Path(file).parent.name))

    def _run(self, host: Host, release: int) -> None:
        with self.lock:
            if not host.up:
                raise EngineError("no power")
            host.state, host.seq, host.release = "running", next(self.count), release
            host.did.append(f"start {release}")
            if host.fails:
                self._end(host)
            if host.rank == 0:
                workers = tuple(other.seq for other in self.hosts[1:])
                fresh = not self.formed or all(
                    new != old for new, old in zip(workers, self.formed[1:], strict=True)
                )  # a rank joins once
                same = {other.release for other in self.hosts} == {release}
                self.formed = (host.seq, *workers) if fresh and same else ()

    def inspect(self, docker: Docker, name: str) -> dict[str, Any]:
        host = self.at(docker)
        facts = {"restart_count": 0, "error": "", "exit_code": 1, "oom_killed": False, "tty": False}
        return {"id": f"id-{host.seq}", "state": host.state, "started_at": f"start-{host.seq}", **facts}

    def serves(self) -> bool:
        with self.lock:
            return bool(self.formed) and self.formed == tuple(
                host.seq if host.state == "running" else -1 for host in self.hosts
            )

    def healthy(self, client: Any) -> bool:
        return self.hosts[0].state == "running" and self.serves()

    def read_log(self, *_: Any) -> list[str]:
        return []

    def verify(self, params: dict[str, Any]) -> dict[str, Any]:
        right = self.serves() and self.hosts[0].release != self.wrong
        failed = {"verified": False, "msg": "chat: got Rome", "failure": "answer-wrong", "checks": [], "answer": "Rome"}
        return {"verified": True, "checks": [], "answer": "Paris"} if right else failed

    # -- what happens ----------------------------------------------------------------------------------------

    def stage(self, number: int = 0) -> int:
        nodes = [{"host": f"spark-{rank}", "address": f"10.0.0.{rank + 1}"} for rank in range(HOSTS)]
        made = fake_release.an_engine(SERVICE, model="wide")
        for host in self.hosts:
            plan = fake_release.plan(made)
            own = {"name": "trio", "rank": host.rank, "nodes": nodes, "port": 9109, "digest": DIGEST}
            plan = {"format": 4, "engines": [{**plan["engines"][0], "group": own}]}
            text = yaml.safe_dump({"services": {SERVICE: {"image": f"{number}"}}})
            number = host.store.stage(text, plan, fake_release.lock(made), number)
        return number

    def switch(self, to: int, id_: str, only: Iterator[int] | None = None, mode: str = "deploy") -> None:
        """Switch on every host, each in a thread of its own, as the jobs on real hosts; then the guards, until all is
        decided."""
        threads = [
            threading.Thread(target=self._job, args=(self.hosts[rank], to, id_, mode), daemon=True)
            for rank in (only or range(HOSTS))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive(), "a job does not end"

    def _job(self, host: Host, to: int, id_: str, mode: str) -> None:
        request = {"id": id_, "to": to, "mode": mode, "start_timeout": 1.5, "reclaim": False}
        write = host.store.write_switch

        def write_or_cut(journal: dict[str, Any]) -> None:
            write(journal)
            if journal["phase"] == host.cut_at:
                host.cut_at = None
                raise PowerCut

        host.store.write_switch = write_or_cut  # type: ignore[method-assign]
        try:
            with host.store.exclusive() as mine:
                assert mine
                Switch(host.store, host.docker, request, pause=0.01).run()
        except PowerCut:
            host.up = False
            self._end(host)
        finally:
            del host.store.write_switch  # type: ignore[method-assign]
        if self.boots and not host.up:  # while the others still switch
            time.sleep(0.2)
            host.up = True
            deadline = time.monotonic() + 3
            decided = lambda: (host.store.switch() or {})["phase"] == "done" or time.monotonic() > deadline  # noqa: E731
            self._guard(host, decided, [])

    def guards(self, until: Callable[[], bool], seconds: float = 60) -> list[str]:
        """Let the guards of all hosts work until something holds; what they said."""
        for host in self.hosts:
            host.up = True
        over, said = threading.Event(), list[str]()

        threads = [
            threading.Thread(target=self._guard, args=(host, over.is_set, said), daemon=True) for host in self.hosts
        ]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + seconds
        try:
            while not until():
                assert time.monotonic() < deadline, "\n".join(said[-40:])
                time.sleep(0.02)
        finally:
            over.set()
            for thread in threads:
                thread.join(10)
        return said

    def _guard(self, host: Host, over: Callable[[], bool], said: list[str]) -> None:
        settings = guard.Settings(project_dir=str(host.store.project_dir), state_dir=str(host.store.state_dir))
        watcher = guard.Watcher(settings, host.store, host.docker, lambda text: said.append(f"{host.rank} {text}"))
        deadline = time.monotonic() + 90
        while not over() and time.monotonic() < deadline:
            watcher.step()
            time.sleep(0.01)

    def settled(self, *releases: int | None) -> bool:
        """Whether the engine serves, and every host has the same of these releases and nothing left to end."""
        current = {host.store.current() for host in self.hosts}
        journals = [host.store.switch() for host in self.hosts]
        over = all(journal is not None and journal["phase"] == "done" for journal in journals)
        running = {host.release for host in self.hosts}
        return over and len(current) == 1 and current <= {*releases} and self.serves() and running == current

    def outcomes(self) -> list[str]:
        return [(host.store.switch() or {})["outcome"] for host in self.hosts]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    return World(monkeypatch, tmp_path)


@pytest.fixture
def deployed(world: World) -> int:
    number = world.stage()
    world.switch(number, "first")
    assert world.settled(number) and world.outcomes() == ["verified"] * HOSTS
    return number


def test_a_first_deployment_starts_the_workers_before_the_head(world: World) -> None:
    number = world.stage()
    world.switch(number, "first")
    assert world.settled(1)
    head, *workers = (host.seq for host in world.hosts)
    assert head > max(workers)
    assert all(host.store.outcome(1) for host in world.hosts)


def test_a_switch_stops_and_starts_each_rank_once(world: World, deployed: int) -> None:
    number = world.stage()
    world.switch(number, "second")
    assert world.settled(number) and number == 2
    assert [host.did for host in world.hosts] == [["start 1", "start 2"]] * HOSTS


def test_a_release_that_answers_wrong_is_left_everywhere(world: World, deployed: int) -> None:
    world.wrong = world.stage()
    world.switch(world.wrong, "second")
    assert world.settled(deployed) and world.outcomes() == ["restored"] * HOSTS
    errors = [(host.store.switch() or {})["error"]["message"] for host in world.hosts]
    assert errors[0] == "chat: got Rome" and all("rank 0 (spark-0)" in words for words in errors[1:])


def test_a_first_release_that_answers_wrong_leaves_nothing(world: World) -> None:
    world.wrong = world.stage()
    world.switch(world.wrong, "first")
    assert world.outcomes() == ["removed"] * HOSTS
    assert {host.state for host in world.hosts} == {"missing"} and world.hosts[0].store.current() is None


def test_a_rank_that_ends_at_its_start_brings_the_others_back(world: World, deployed: int) -> None:
    world.stage()
    threading.Timer(0.5, lambda: setattr(world.hosts[2], "fails", False)).start()
    world.hosts[2].fails = True
    world.switch(2, "second")
    error = (world.hosts[0].store.switch() or {})["error"]
    assert error["failure"] == "rank-failed" and "rank 2 (spark-2)" in error["message"]
    assert {host.store.current() for host in world.hosts} == {deployed}


def test_nothing_stops_while_a_host_does_not_take_part(world: World, deployed: int) -> None:
    world.stage()
    world.switch(2, "second", iter((0, 1)))
    assert world.serves() and {host.store.current() for host in world.hosts} == {deployed}
    journal = world.hosts[0].store.switch() or {}
    assert journal["outcome"] == "refused"
    assert journal["error"]["failure"] == "group-incomplete" and "rank 2 (spark-2)" in journal["error"]["message"]
    other = (world.hosts[1].store.switch() or {})["error"]
    assert other["failure"] == "rank-failed" and "rank 2 (spark-2)" in other["message"], other


def test_ranks_that_differ_are_not_started(world: World, deployed: int) -> None:
    world.stage()
    path = world.hosts[1].store
    plan = path.plan(2)
    other = {**plan["engines"][0], "group": {**plan["engines"][0]["group"], "digest": "b" * 64}}
    changed = path.stage("services: {vllm-wide: {}}\n", {**plan, "engines": [other]}, path.lock(2))
    assert changed == 3
    for host in (world.hosts[0], world.hosts[2]):
        host.store.stage("services: {vllm-wide: {}}\n", host.store.plan(2), host.store.lock(2))
    world.switch(3, "second")
    assert world.serves() and world.outcomes() == ["refused"] * HOSTS
    assert (world.hosts[0].store.switch() or {})["error"]["failure"] == "group-differs"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("phase", ["checking", "stopping", "waiting", "verifying", "committing"])
def test_a_host_that_loses_power_in_a_switch_leaves_no_half_group(
    world: World, deployed: int, rank: int, phase: str
) -> None:
    world.stage()
    world.hosts[rank].cut_at = phase
    world.switch(2, "second")
    said = world.guards(lambda: world.settled(1, 2))
    current = world.hosts[0].store.current()
    # A journal says committing before the link that makes it so.
    assert current == 1 or (rank, phase) in ((1, "verifying"), (1, "committing")), said


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("phase", ["stopping", "verifying"])
def test_a_host_that_is_back_while_the_others_still_switch(world: World, deployed: int, rank: int, phase: str) -> None:
    world.stage()
    world.hosts[rank].cut_at, world.boots = phase, True
    world.switch(2, "second")
    world.guards(lambda: world.settled(1, 2))
    # A worker that is back in time takes part again; rank 0 goes back.
    assert {host.store.current() for host in world.hosts} in ([{1}] if rank == 0 else [{1}, {2}])


def test_ranks_start_again_together_when_one_ends(world: World, deployed: int) -> None:
    before = [host.seq for host in world.hosts]
    world.hosts[2].state = "exited"
    said = world.guards(lambda: world.settled(1) and world.hosts[0].seq != before[0])
    assert all(host.seq != old for host, old in zip(world.hosts, before, strict=True))
    assert any("rank: " in line and "rank 2 (spark-2)" in line for line in said)


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_start_again_after_a_host_was_restarted(world: World, deployed: int, rank: int) -> None:
    world.hosts[rank].state = "exited"
    seq = world.hosts[rank].seq
    world.guards(lambda: world.settled(1) and world.hosts[rank].seq != seq)


def test_what_was_stopped_on_purpose_stays_stopped_everywhere(world: World, deployed: int) -> None:
    group.keep_down(world.hosts[0].store)
    world.hosts[0].state = "exited"
    world.guards(lambda: {host.state for host in world.hosts} == {"exited"})
    time.sleep(0.1)
    assert {host.state for host in world.hosts} == {"exited"}
    world.switch(1, "again", mode="restart")
    assert world.settled(1) and not group.read_record(world.hosts[0].store).down


def test_the_guard_gives_up_on_a_rank_that_always_ends(world: World, deployed: int) -> None:
    world.hosts[1].fails = True
    world.hosts[1].state = "exited"
    world.guards(lambda: world.hosts[0].state == "exited" and group.read_record(world.hosts[0].store).down, 20)
    starts = len(world.hosts[1].did)
    assert starts <= 6  # the first one, and the guard's limit


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"epoch": -1}',
        '{"epoch": true}',
        '{"active": 1}',
        '{"id": 7}',
        '{"id": "' + "x" * 3000 + '"}',
        '{"release": "1"}',
    ],
)
def test_an_answer_that_is_none(text: str) -> None:
    with pytest.raises(bounded.BoundsError):
        group.understood(text)


def test_a_record_that_is_damaged_is_the_first_one(world: World) -> None:
    store = world.hosts[0].store
    group.write_record(store, Record(7, 2, True))
    assert group.read_record(store) == Record(7, 2, True)
    (store.state_dir / group.RECORD).write_text('{"epoch": "many"}')
    assert group.read_record(store) == Record()


def test_the_status_of_each_host(world: World, deployed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "figures", lambda text: {})
    monkeypatch.setattr(http.Client, "get", lambda *_, **__: http.Answer(200, "text/plain", b""))
    for host in world.hosts:
        found = status.inspect_host(host.store, host.docker, 0)
        assert (found["engine"], found["engines"][0]["rank"]) == ("serving", host.rank)
        assert found["nodes"] == ["spark-0", "spark-1", "spark-2"]
    world.hosts[1].state = "exited"
    assert status.inspect_host(world.hosts[1].store, world.hosts[1].docker, 0)["engine"] == "stopped"
