"""The module release_switch: begins a job, joins one, refuses, sees one cut, ends it."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import release_switch
from ansible.module_utils.testing import patch_module_args
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import reclaim
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.docker import Docker
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.releases import Store

from tests.unit.fakes import fake_release
from tests.unit.fakes.fake_engine import Engine

ENGINE = fake_release.an_engine("vllm-m")
Run = Callable[..., dict[str, Any]]


class Job:
    """Stands for systemd-run: notes what it was to start, and lets the test write the journal."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.started: list[list[str]] = []
        self.writes: dict[str, Any] | None = {}
        self.error = ""

    def run(self, argv: list[str], **_options: Any) -> Any:
        self.started.append(argv)
        if self.error:
            return SimpleNamespace(returncode=1, stderr=self.error, stdout="")
        id_ = next((word.partition("=")[2] for word in argv if word.startswith("--id=")), "abc")
        if self.writes is not None:
            self.store.write_switch({**journal(id=id_), **self.writes})
        return SimpleNamespace(returncode=0, stderr="", stdout="")


def journal(**more: Any) -> dict[str, Any]:
    known = {"id": "abc", "to": 1, "from": None, "models": ["m"], "controller": "bob@desk", "verb": "upgrade"}
    return {**known, "began": 0.0, "phase": "waiting", "steps": [], "container": "", "outcome": None, **more}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    made = Store(tmp_path / "project", tmp_path / "state", str(tmp_path / "lock"))
    assert made.stage("a: 1\n", fake_release.plan(ENGINE), fake_release.lock(ENGINE)) == 1
    (tmp_path / "project" / "lib").mkdir()
    (tmp_path / "project" / "lib" / "sparkfleet_host.pyz").touch()
    monkeypatch.setattr(release_switch, "Store", lambda *_folders: made)
    return made


@pytest.fixture(autouse=True)
def containers(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What Docker has; the container of the release runs."""
    labels = {"com.docker.compose.project": "sparkfleet", "com.docker.compose.service": "vllm-m"}
    listed: list[dict[str, Any]] = [{"Id": "a" * 64, "Names": ["/vllm-m"], "State": "running", "Labels": labels}]
    engine.routes["GET", "/containers/json"] = listed
    for name in ("a" * 64, "b" * 64):
        engine.routes["GET", f"/containers/{name}/json"] = {"Id": name, "State": {"Running": True}}
    monkeypatch.setattr(release_switch, "Docker", lambda: Docker(str(engine.server_address), timeout=5))
    return listed


@pytest.fixture
def job(store: Store, monkeypatch: pytest.MonkeyPatch) -> Job:
    made = Job(store)
    monkeypatch.setattr(release_switch.subprocess, "run", made.run)
    monkeypatch.setattr(release_switch, "BEGIN_SECONDS", 0.1)
    return made


@pytest.fixture
def run(store: Store, job: Job, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(check: bool = False, **arguments: Any) -> dict[str, Any]:
        given = {"to": 1, "slice": 0, "project_dir": str(store.project_dir), "_ansible_check_mode": check, **arguments}
        with patch_module_args(given), pytest.raises(SystemExit):
            release_switch.main()
        answer: dict[str, Any] = json.loads(capsys.readouterr().out)
        return answer

    return call


def serving(store: Store) -> None:
    store.commit(1, 100.0, {"vllm-m": "a" * 64})
    store.write_switch(journal(id="other", phase="done", outcome="verified"))


def test_what_another_run_did_since_the_look_is_not_done_again(run: Run, job: Job, store: Store) -> None:
    serving(store)
    result = run()
    assert job.started == [] and result["already"] and not result["joined"] and result["done"]
    assert result["journal"]["controller"] == "bob@desk"
    job.writes = {"phase": "done", "outcome": "verified"}
    for again in ({"mode": "restart"}, {"mode": "rollback"}, {"recreate": True}, {"new_key": True}):
        assert not run(**again)["already"]  # asked for whatever is current
        serving(store)
    assert "--new-key" in job.started[-1] and "--new-key" not in job.started[0]
    store.write_switch(journal(id="other", phase="done", outcome="restored"))
    assert not run()["already"]


@pytest.mark.parametrize(
    "how", ["edited", "another container", "stopped", "gone", "not ours", "old version", "renamed"]
)
def test_an_old_success_is_not_reported_when_something_else_runs(
    run: Run, job: Job, store: Store, engine: Engine, containers: list[dict[str, Any]], how: str
) -> None:
    serving(store)
    if how == "edited":
        (store.folder(1) / "compose.yml").chmod(0o644)
        (store.folder(1) / "compose.yml").write_text("a: 2\n")
    elif how == "another container":  # `docker compose up -d` after an edit that was reverted
        containers[0]["Id"] = "b" * 64
    elif how == "stopped":
        engine.routes["GET", f"/containers/{'a' * 64}/json"]["State"] = {"Running": False}
    elif how == "gone":
        containers.clear()
    elif how == "not ours":
        containers[0]["Labels"] = {}
    elif how == "old version":
        store.commit(1, 100.0)
    elif how == "renamed":
        assert store.current() == 1
        (store.project_dir / "current").unlink()
    job.writes = {"phase": "done", "outcome": "verified"}
    result = run()
    assert not result["already"] and not result["joined"] and len(job.started) == 1
    assert result["journal"]["id"] == result["id"] != "other"


def test_a_journal_of_any_form_is_no_obstacle(run: Run, job: Job, store: Store) -> None:
    for text in ('{"version": 99}', "[]", "", "{", '{"to": "x"}', '{"to": 1, "began": "noon", "phase": 5}'):
        (store.state_dir / "switch.json").write_text(text)
        job.writes = {"phase": "done", "outcome": "verified"}
        assert run()["journal"]["outcome"] == "verified"


def test_a_lock_that_somebody_else_holds_is_named(run: Run, job: Job, store: Store) -> None:
    store.lock_file.touch()
    holder = subprocess.Popen(["flock", str(store.lock_file), "sleep", "60"])
    try:
        deadline = time.monotonic() + 5
        while store.holder() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        result = run()
    finally:
        holder.terminate()
        holder.wait()
    assert result["failure"] == "lock-held" and job.started == [] and str(store.lock_file) in result["msg"]
    assert "None" not in result["msg"] and "pid" in result["msg"]


def test_a_switch_that_has_not_written_yet_is_no_release_none(run: Run, job: Job, store: Store) -> None:
    with store.exclusive():
        result = run()
    assert result["failure"] == "switch-running-other" and "None" not in result["msg"]
    assert "another switch is beginning" in result["msg"] and str(store.lock_file) in result["msg"]


def test_what_the_guard_does_is_waited_for(run: Run, job: Job, store: Store) -> None:
    job.writes = None
    with store.exclusive("guard") as mine:
        assert mine and not store.switch_active()

        def later() -> None:
            time.sleep(0.5)  # longer than BEGIN_SECONDS
            id_ = next(word.partition("=")[2] for word in job.started[0] if word.startswith("--id="))
            store.write_switch(journal(id=id_, phase="done", outcome="verified"))

        thread = threading.Thread(target=later)
        thread.start()
        result = run()
        thread.join()
    assert result["done"] and result["journal"]["outcome"] == "verified"


def test_check_mode_says_what_keeps_a_release_from_running(run: Run, job: Job, store: Store) -> None:
    (store.folder(1) / "plan.json").unlink()
    result = run(check=True)
    assert result["failure"] == "release-damaged" and "plan.json is missing" in result["msg"] and job.started == []


def test_a_job_is_begun_that_needs_no_connection(run: Run, job: Job, store: Store) -> None:
    job.writes = {"phase": "done", "outcome": "verified"}
    result = run(controller="alice@laptop", verb="site.yml", start_timeout=600, keep_releases=4, recreate=True)
    assert result["done"] and not result["joined"] and result["journal"]["id"] == result["id"]
    (argv,) = job.started
    assert argv[0] == "systemd-run" and "--unit=sparkfleet-switch" in argv
    assert {"--property=ProtectSystem=strict", f"--property=ReadWritePaths=-{store.project_dir}"} <= {*argv}
    assert argv[argv.index("switch") - 1] == str(store.project_dir / "lib" / "sparkfleet_host.pyz")
    for word in ("--to=1", "--mode=deploy", "--controller=alice@laptop", "--keep=4", "--recreate"):
        assert word in argv
    assert "--start-timeout=600.0" in argv


def test_a_job_whose_first_answer_was_lost_is_not_begun_twice(run: Run, job: Job, store: Store) -> None:
    job.writes = {"phase": "done", "outcome": "restored"}
    first = run(begin="0123456789ab")
    assert first["id"] == "0123456789ab" and not first["joined"]
    assert run(begin="0123456789ab")["journal"]["outcome"] == "restored"
    assert len(job.started) == 1


def test_check_mode_begins_nothing(run: Run, job: Job) -> None:
    assert run(check=True, to=9)["msg"] == "would switch to release 9"
    assert job.started == []


@pytest.mark.parametrize("asked", ["id", "begin"])
def test_the_release_of_a_trial_goes_before_its_job_was_seen_to_end(
    run: Run, job: Job, store: Store, asked: str
) -> None:
    store.write_switch(journal(mode="trial", phase="done", outcome="removed"))
    store.remove([1])
    result = run(mode="trial", **{asked: "abc"})
    assert result["done"] and result["journal"]["outcome"] == "removed" and job.started == []
    assert run(mode="trial", **{asked: "other"})["failed"]


def test_a_release_that_is_not_there(run: Run, job: Job) -> None:
    result = run(to=9)
    assert result["failed"] and "there are releases 1" in result["msg"] and job.started == []


def test_another_ones_job_is_named_and_left_alone(run: Run, job: Job, store: Store) -> None:
    store.write_switch(journal(to=5))
    with store.exclusive():
        result = run()
    assert result["failure"] == "switch-running-other" and job.started == []
    assert "bob@desk is switching it to release 5 (m) with upgrade since some time, phase waiting" in result["msg"]


def test_a_job_that_does_the_same_is_joined(run: Run, job: Job, store: Store) -> None:
    store.write_switch(journal())
    with store.exclusive():
        result = run()
    assert result["joined"] and result["id"] == "abc" and not result["done"] and job.started == []


def test_a_job_that_was_faster_by_a_moment(run: Run, job: Job, store: Store) -> None:
    store.write_switch(journal(to=5))
    job.error = "Failed to start transient service unit: Unit sparkfleet-switch.service was already loaded"
    assert run()["failure"] == "switch-running-other"


def test_a_job_that_cannot_be_started(run: Run, job: Job) -> None:
    job.error = "Failed to connect to bus"
    assert "cannot be started: Failed to connect to bus" in run()["msg"]
    job.error, job.writes = "", None
    assert "did not start: see journalctl -u sparkfleet-switch" in run()["msg"]


def test_the_program_must_be_there(run: Run, job: Job, store: Store) -> None:
    (store.project_dir / "lib" / "sparkfleet_host.pyz").unlink()
    assert "playbooks/prepare.yml" in run()["msg"] and job.started == []


def test_a_job_that_was_cut_is_ended_once(run: Run, job: Job, store: Store) -> None:
    store.write_switch(journal())
    result = run(id="abc")
    assert result["cut"] and not result["done"]
    assert "--recover" in job.started[0]
    result = run(id="abc", recover=False)
    assert result["failure"] == "switch-interrupted" and len(job.started) == 1


def test_a_job_that_another_replaced(run: Run, store: Store) -> None:
    store.write_switch(journal(id="other", to=5))
    result = run(id="abc")
    assert result["failure"] == "switch-running-other" and "bob@desk" in result["msg"]


def test_check_mode_says_what_would_be_pruned_and_reclaimed(run: Run, store: Store, engine: Engine) -> None:
    def lock(number: int) -> dict[str, Any]:
        return fake_release.lock({**ENGINE, "image": f"reg/x:{number}"})

    for number in (2, 3, 4):
        store.stage(f"a: {number}\n", fake_release.plan(ENGINE), lock(number))
        store.commit(number, float(number), {"vllm-m": "a" * 64})
    image = {"Id": "i2", "RepoTags": ["reg/x:2"], "RepoDigests": [f"reg/x@sha256:{'2' * 64}"], "Size": 7}
    engine.routes["GET", "/images/reg/x:2/json"] = image
    reclaim.note_image(store.state_dir, image, {})
    engine.routes["GET", "/containers/json"] = []
    said = run(check=True, to=5, keep_releases=2, lock=lock(5))
    assert said["would"] == {
        **{"pruned": [1, 2, 3], "left": []},
        "reclaimed": [{"kind": "image", "name": "reg/x:2", "bytes": 7}],
    }
    assert run(check=True, to=5, keep_releases=2, lock=lock(2))["would"]["reclaimed"] == []
    assert run(check=True, to=5, keep_releases=2, reclaim=False)["would"] == {"pruned": [1, 2, 3]}
    assert store.numbers() == [1, 2, 3, 4] and not (store.state_dir / "unneeded.json").exists()


def test_the_job_may_write_where_it_reclaims(run: Run, job: Job, store: Store) -> None:
    pinned = {**ENGINE, "image": f"reg/x@sha256:{'1' * 64}"}
    lock = fake_release.lock(pinned, compile_cache_dir="/srv/compiled")
    store.stage("b: 1\n", fake_release.plan(pinned), lock)
    run()
    assert "--property=ReadWritePaths=-/srv/compiled" in job.started[0] and "--no-reclaim" not in job.started[0]
    run(begin="second", reclaim=False)
    assert any("--no-reclaim" in argv for argv in job.started)


def test_one_engine_alone_is_restarted(run: Run, job: Job, store: Store) -> None:
    job.writes = {"phase": "waiting", "services": ["vllm-m"]}
    run(mode="restart", services=["vllm-m", "vllm-b"])
    assert [word for word in job.started[0] if word.startswith("--service")] == ["--service=vllm-m", "--service=vllm-b"]
    result = run(services=["vllm-m"])
    assert result["failure"] == "bad-input" and "a deployment restarts what differs" in result["msg"]


@pytest.mark.parametrize(("services", "joins"), [(["vllm-m"], True), ([], False), (["vllm-b"], False)])
def test_a_restart_is_joined_by_one_of_the_same_engines(
    run: Run, job: Job, store: Store, services: list[str], joins: bool
) -> None:
    with store.exclusive():
        store.write_switch(journal(mode="restart", services=["vllm-m"]))
        result = run(mode="restart", services=services)
    assert job.started == [] and result.get("joined", False) is joins
    assert result.get("failure") == (None if joins else "switch-running-other")


def test_a_release_of_two_engines_runs_where_both_do(
    run: Run, job: Job, store: Store, containers: list[dict[str, Any]]
) -> None:
    both = (ENGINE, fake_release.an_engine("vllm-b", 8001))
    number = store.stage("b: 1\n", fake_release.plan(*both), fake_release.lock(*both))
    store.commit(number, 100.0, {"vllm-m": "a" * 64, "vllm-b": "b" * 64})
    store.write_switch(journal(id="other", to=number, phase="done", outcome="verified"))
    job.writes = {"to": number, "phase": "done", "outcome": "verified"}
    assert not run(to=number)["already"]
    labels = {**containers[0]["Labels"], "com.docker.compose.service": "vllm-b"}
    containers.append({**containers[0], "Id": "b" * 64, "Labels": labels})
    store.write_switch(journal(id="other", to=number, phase="done", outcome="verified"))
    assert run(to=number)["already"]
