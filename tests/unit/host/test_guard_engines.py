"""The guard of a host with two engines: what befalls one is no matter of the other."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import guard as module
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.docker import Docker
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.guard import Canary, Settings, Watcher
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.http import Answer, HttpError
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.releases import Store

from tests.unit.fakes import fake_release
from tests.unit.fakes.fake_engine import deployed_engines

FIRST, SECOND = "vllm-a", "vllm-b"
A = fake_release.an_engine(FIRST, 8001, repo="org/a")
B = fake_release.an_engine(SECOND, 8002, repo="org/b")
PORTS = {8001: FIRST, 8002: SECOND}
BRIDGE = "adding interface veth1 to bridge br-1 failed: Device does not exist"


class Client:
    """An engine's HTTP, by its port."""

    def __init__(self, host: Host, url: str) -> None:
        self.host, self.service = host, PORTS[int(url.rpartition(":")[2])]

    def get(self, path: str, timeout: float, limit: int) -> Answer:
        if not self.host.healthy(self):
            raise HttpError("connection", "refused")
        text = f"vllm:generation_tokens_total {self.host.tokens[self.service]}\n"
        return Answer(200, "text/plain", text.encode())

    def post(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> Answer:
        self.host.asked.append((self.service, body["model"]))
        return Answer(503 if self.service in self.host.frozen else 200, "application/json", b"{}")


class Host:
    """Two engines that compute, and the guard; a look each ten seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
        self.store, self.now = store, 10_000.0
        self.state = {FIRST: "running", SECOND: "running"}
        self.started = dict.fromkeys(self.state, 1)
        self.count: dict[str, int] = defaultdict(int)
        self.error: dict[str, str] = defaultdict(str)
        self.tokens: dict[str, float] = defaultdict(float)
        self.frozen: set[str] = set()
        self.loads_until: dict[str, float] = defaultdict(float)
        self.did: list[str] = []
        self.asked: list[tuple[str, str]] = []
        self.said: list[str] = []
        self.odd: dict[str, Exception] = {}
        monkeypatch.setattr(module, "clock", lambda: self.now)
        monkeypatch.setattr(module, "engine_client", lambda url, timeout: Client(self, url))
        monkeypatch.setattr(module, "drop_page_cache", lambda: self.did.append("drop"))
        monkeypatch.setattr(module, "restart_docker", lambda: self.did.append("docker"))
        monkeypatch.setattr(module, "foreign", lambda docker: ())
        for name in ("inspect", "stop", "start", "healthy", "read_log"):
            monkeypatch.setattr(module.engine, name, getattr(self, name))
        self.watcher = Watcher(Settings(), store, Docker("/nowhere"), self.said.append)

    def inspect(self, docker: Docker, service: str) -> dict[str, Any]:
        if service in self.odd:
            raise self.odd[service]
        started = f"2026-01-01T00:00:{self.started[service]:02}Z"
        found = {"id": service, "state": self.state[service], "started_at": started, "exit_code": 1, "tty": False}
        return {**found, "restart_count": self.count[service], "oom_killed": False, "error": self.error[service]}

    def stop(self, docker: Docker, service: str, timeout: int) -> bool:
        self.did.append(f"stop {service}")
        self.state[service] = "exited"
        return True

    def start(self, docker: Docker, service: str) -> None:
        self.did.append(f"start {service}")
        self.state[service] = "running"
        self.started[service] += 1
        self.loads_until[service] = self.now + 100
        self.frozen.discard(service)

    def healthy(self, client: Client) -> bool:
        return self.state[client.service] == "running" and self.now >= self.loads_until[client.service]

    def read_log(self, docker: Docker, service: str, *_: Any) -> list[str]:
        return [f"2026-01-01T00:00:01Z {service} at {self.now}"]

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            for service in self.state:
                self.tokens[service] += service not in self.frozen
            self.watcher.survive()
            for item in self.watcher.watched.values():
                if item.asking:  # its thread has answered
                    self.wait(item)
            self.now += 10

    def wait(self, item: Any) -> None:
        for thread in module.threading.enumerate():
            if thread.name == "canary":
                thread.join(5)
        if item.service in self.frozen and item.canary:
            item.canary = Canary(self.now - 60, False, 60.0)

    def states(self) -> list[str]:
        return [item.guard.engine for item in self.watcher.watched.values()]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Host:
    made = Host(monkeypatch, deployed_engines(tmp_path, A, B))
    made.run(30)
    assert made.states() == ["serving", "serving"] and made.did == []
    return made


def written(host: Host) -> dict[str, Any]:
    return dict(json.loads((host.store.state_dir / "guard-state.json").read_text()))


def test_a_wedge_of_one_restarts_that_one(host: Host) -> None:
    host.frozen = {SECOND}
    host.run(400)
    assert host.did == [f"stop {SECOND}", "drop", f"start {SECOND}"]
    host.run(120)
    assert host.states() == ["serving", "serving"]
    totals = {service: item["restarts_total"] for service, item in written(host)["engines"].items()}
    assert totals == {FIRST: {}, SECOND: {"wedge": 1}}
    assert {model for service, model in host.asked if service == SECOND} == {"org/b"}


def test_one_is_given_up_and_the_other_serves(host: Host) -> None:
    for _ in range(4):
        host.count[FIRST] += 1
        host.started[FIRST] += 1
        host.run(20)
    assert host.states() == ["given-up", "serving"] and host.state == {FIRST: "exited", SECOND: "running"}
    get = host.watcher.answer
    assert get("/ready") == (503, "given-up\n") == get("/ready?model=org/a")
    assert get("/ready?model=org/b") == (200, "serving org/b\n") and get("/ready?model=org/c") == (503, "given-up\n")
    page = get("/metrics")[1]
    assert f'sparkfleet_engine_up{{engine="{FIRST}"}} 0\n' in page
    assert f'sparkfleet_engine_up{{engine="{SECOND}"}} 1\n' in page and "sparkfleet_release 1\n" in page
    assert f'sparkfleet_engine_restarts_total{{engine="{FIRST}",reason="crash"}} 3\n' in page


def test_all_serve(host: Host) -> None:
    get = host.watcher.answer
    assert get("/ready") == (200, "serving org/a, org/b\n") and get("/ready?model=org/a") == (200, "serving org/a\n")
    assert get("/ready?model=org/c") == (503, "another-model\n")


def test_one_starts_after_the_other_has_loaded(host: Host) -> None:
    """vLLM measures the free memory while it loads."""
    host.watcher.boot_id = "another"
    host.state.update({FIRST: "exited", SECOND: "exited"})
    host.run(30)
    assert host.did == ["drop", f"start {FIRST}"] and host.states() == ["healing", "healing"]
    host.run(100)
    assert host.did == ["drop", f"start {FIRST}", "drop", f"start {SECOND}"]
    host.run(110)
    assert host.states() == ["serving", "serving"]


def test_a_wedge_waits_while_the_other_loads(host: Host) -> None:
    host.started[FIRST] += 1
    host.loads_until[FIRST] = host.now + 5000
    host.frozen = {SECOND}
    host.run(890)
    assert host.did == [] and host.states() == ["loading", "wedged"]
    host.run(200)  # that long it measures no memory
    assert host.did == [f"stop {SECOND}", "drop", f"start {SECOND}"] and host.states()[0] == "loading"


def test_docker_is_restarted_once_for_both(host: Host) -> None:
    host.watcher.boot_id = "another"
    for service in host.state:
        host.state[service], host.error[service] = "exited", BRIDGE
    host.run(200)
    assert host.did.count("docker") == 1


def test_what_cannot_be_observed_of_one_does_not_hide_the_other(host: Host) -> None:
    host.odd[FIRST] = MemoryError("odd")
    host.frozen = {SECOND}
    host.run(400)
    assert f"start {SECOND}" in host.did and f"{FIRST}: this observation failed: MemoryError: odd" in host.said
    host.run(120)
    assert host.watcher.answer("/ready?model=org/a") == (503, "guard-stuck\n") == host.watcher.answer("/ready")
    assert host.watcher.answer("/ready?model=org/b")[0] == 200


def test_a_deployment_that_drops_an_engine_forgets_its_record(host: Host) -> None:
    host.count[SECOND] += 1
    host.run(30)
    number = host.store.stage("b\n", fake_release.plan(B), fake_release.lock(B))
    host.store.commit(number, 2.0)
    host.run(30)
    assert [*written(host)["engines"]] == [SECOND] and written(host)["release"] == 2
    assert written(host)["engines"][SECOND]["restarts_total"] == {"crash": 1}
    (host.store.project_dir / "current").unlink()
    host.run(30)
    assert [*written(host)["engines"]] == [SECOND] and host.states() == ["missing"]


def test_an_engine_that_a_switch_keeps_is_watched_meanwhile(host: Host) -> None:
    journal = {"id": "a", "to": 2, "from": 1, "phase": "waiting", "began": 1.0, "kept": [FIRST]}
    with host.store.exclusive():
        host.store.write_switch(journal)
        host.state[SECOND] = "exited"
        host.run(60)
        assert host.states() == ["serving", "switching"]
        assert host.watcher.answer("/ready?model=org/a")[0] == 200 and host.watcher.answer("/ready")[0] == 503
        host.count[FIRST] += 1
        host.run(10)
        assert host.did == []  # it is counted, and nothing is done that another engine could feel
        host.store.write_switch({**journal, "phase": "done"})
        host.run(10)
        assert host.states() == ["switching", "switching"]
    host.run(10)
    assert host.states()[1] == "stopped"


def test_a_switch_that_was_cut_is_ended_once_for_all(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[int] = []
    monkeypatch.setattr(module.switch, "recover", lambda store, docker: ends.append(1) or {"outcome": "restored"})
    host.store.write_switch({"id": "a", "to": 2, "from": 1, "phase": "waiting", "began": 1.0})
    assert {action.do for action in host.watcher.step().values()} == {"recover"} and ends == [1]


def test_a_first_deployment_that_was_cut_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "project", tmp_path / "state", str(tmp_path / "lock"))
    made = Host(monkeypatch, store)
    assert made.watcher.answer("/ready") == (503, "missing\n") and made.watcher.step() == {}
    ends: list[int] = []
    monkeypatch.setattr(module.switch, "recover", lambda store, docker: ends.append(1) or {"outcome": "removed"})
    store.write_switch({"id": "a", "to": 1, "from": None, "phase": "waiting", "began": 1.0})
    made.watcher.step()
    assert ends == [1] and made.watcher.answer("/ready") == (503, "switching\n") and written(made)["engines"] == {}


@pytest.mark.parametrize("readable", [True, False])
def test_the_record_of_format_1_is_that_of_the_first_engine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, readable: bool
) -> None:
    store = deployed_engines(tmp_path, A, B)
    flat = {"engine": "serving", "restarts_total": {"crash": 4}, "known": {"release": 1}, "at": 1.0, "release": 1}
    (store.state_dir / "guard-state.json").write_text(json.dumps(flat))
    plan = store.folder(1) / "plan.json"
    text = plan.read_text()
    if not readable:
        plan.chmod(0o644)
        plan.write_text("{")
    made = Host(monkeypatch, store)
    if not readable:
        made.run(20)
        assert written(made)["engines"][""]["restarts_total"] == {"crash": 4}
        made = Host(monkeypatch, store)
        plan.write_text(text)
    made.run(20)
    assert written(made)["engines"][FIRST]["restarts_total"] == {"crash": 4}
    assert [*written(made)["engines"]] == [FIRST, SECOND]
