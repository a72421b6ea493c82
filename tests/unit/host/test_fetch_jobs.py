"""Background jobs: lock, status file, what fetch_status makes of them and what fetch_wait shows."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import job as jobs
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.job import Job, is_alive, read_status
from hypothesis import given
from hypothesis import strategies as st
from plugins.action import fetch_wait
from plugins.action.fetch_wait import describe, entry, failure, gigabytes, line
from plugins.modules import fetch_status, model_download

from tests.unit.fakes.clock import set_time


@pytest.fixture
def job(tmp_path: Path) -> Job:
    found = Job(tmp_path / "fetch" / "model.json", "model", "acme/tiny@main")
    assert found.acquire() is None
    return found


def status(job: Job) -> dict[str, Any]:
    found: dict[str, Any] | None = read_status(job.path)
    assert found is not None
    return found


def test_second_job_learns_who_holds_the_lock(job: Job) -> None:
    assert Job(job.path, "model", "other").acquire() == {"pid": os.getpid(), "what": "acme/tiny@main"}
    assert status(job)["what"] == "acme/tiny@main"
    assert job.path.stat().st_mode & 0o777 == 0o644
    assert job.path.parent.stat().st_mode & 0o777 == 0o755


def test_lock_is_free_when_its_holder_is_dead(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import sparkfleet_host.job as j;"
        "print(j.Job(sys.argv[2], 'model', 'x').acquire())"
    )
    util = str(Path(str(jobs.__file__)).parent.parent)
    run = subprocess.run([sys.executable, "-c", code, util, str(path)], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "None"
    found = read_status(path)
    assert found is not None
    assert not is_alive(found)
    assert fetch_status.job_state({"name": "model", "status_file": str(path)})["state"] == "died"
    assert Job(path, "model", "x").acquire() is None


def test_writes_are_few_and_percent_never_goes_back(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[int] = []
    real = job._write

    def count() -> None:
        writes.append(1)
        real()

    monkeypatch.setattr(job, "_write", count)
    for done in range(1000):
        job.update("downloading", done, 2000)
    assert len(writes) < 10
    assert status(job)["phase"] == "downloading"
    job.update("downloading", 10, 2000)
    assert job.status["percent"] == 49
    job.update("checking", 0, 2000)
    assert (job.status["percent"], status(job)["phase"]) == (99, "checking")
    job.update("downloading", 2000, 2000)
    assert job.status["percent"] == 99
    job.done({"commit": "c"})
    assert (status(job)["state"], status(job)["percent"], status(job)["result"]) == ("done", 100, {"commit": "c"})


def test_rate(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    set_time(monkeypatch, jobs, time_=lambda: now)
    job.update("downloading", 0, 10**9)
    now += 2
    job.update("downloading", 160_000_000, 10**9)
    assert job.status["rate"] == 80_000_000


def test_failure_is_in_the_status(job: Job) -> None:
    job.failed("hub-no-access", "open the page")
    found = fetch_status.job_state({"name": "model", "status_file": str(job.path)})
    assert (found["state"], found["failure"], found["message"]) == ("failed", "hub-no-access", "open the page")


def asked(job: Job, results: Path) -> dict[str, Any]:
    return {"name": "model", "status_file": str(job.path), "results_file": str(results)}


def test_old_status_is_not_taken_for_the_new_job(job: Job, tmp_path: Path) -> None:
    job.done({})
    results = tmp_path / "j1"
    results.write_text('{"started": true, "finished": false, "ansible_job_id": "j1"}')
    later = time.time() + 5
    os.utime(results, (later, later))
    assert fetch_status.job_state(asked(job, results))["state"] == "starting"
    assert fetch_status.job_state(asked(job, results), now=later + 100)["state"] == "died"


def test_result_of_the_async_job_counts(job: Job, tmp_path: Path) -> None:
    results = tmp_path / "j1"
    results.write_text('{"changed": true, "digest": "sha256:1", "diff": {}, "invocation": {}}')
    found = fetch_status.job_state(asked(job, results))
    assert (found["state"], found["result"]) == ("done", {"changed": True, "digest": "sha256:1"})
    results.write_text('{"failed": true, "msg": "no space; free some space", "failure": "disk-full"}')
    found = fetch_status.job_state(asked(job, results))
    assert (found["state"], found["failure"], found["message"]) == ("failed", "disk-full", "no space; free some space")
    results.write_text('{"failed": true, "msg": "Traceback\\n  x\\nKeyError: 1"}')
    assert fetch_status.job_state(asked(job, results))["message"] == "KeyError: 1"


def test_attached_job_follows_the_holder(job: Job, tmp_path: Path) -> None:
    results = tmp_path / "j1"
    results.write_text(json.dumps({"changed": False, "attached": True, "holder_pid": os.getpid()}))
    assert fetch_status.job_state(asked(job, results))["state"] == "running"
    job.done({"commit": "c", "changed": True})
    assert fetch_status.job_state(asked(job, results))["result"] == {"commit": "c", "changed": True}
    results.write_text(json.dumps({"changed": False, "attached": True, "holder_pid": 1}))
    assert fetch_status.job_state(asked(job, results))["state"] == "starting"


def test_killed_job(job: Job, tmp_path: Path) -> None:
    dead = {**status(job), "pid": 2**22 + 1}
    job.path.write_text(json.dumps(dead))
    results = tmp_path / "j1"
    results.write_text('{"failed": true, "msg": "ValueError: No start of json char found"}')
    assert fetch_status.job_state(asked(job, results))["state"] == "died"


def test_poll_waits_for_the_end_and_no_longer(job: Job) -> None:
    jobs = [{"name": "model", "status_file": str(job.path)}]
    began = time.monotonic()
    assert fetch_status.poll(jobs, 0.3)[0]["state"] == "running"
    assert 0.3 <= time.monotonic() - began < 1
    job.done({})
    began = time.monotonic()
    assert fetch_status.poll(jobs, 30)[0]["state"] == "done"
    assert time.monotonic() - began < 1


def running(name: str, **more: Any) -> dict[str, Any]:
    base = {"name": name, "state": "running", "phase": "pulling", "done": 0, "total": None, "percent": None}
    return {**base, "rate": 0, "result": {}, "message": "", **more}


def test_line() -> None:
    image = running("image", done=1_300_000_000, total=3_000_000_000, percent=43, rate=80_000_000)
    model = running("model", phase="checking", done=110_000_000, total=270_000_000, percent=99)
    assert line("spark-1", [image, model]) == (
        "spark-1  image 43% (1.3 of 3.0 GB, 80 MB/s)  model checking 0.11 of 0.27 GB"
    )
    assert describe(running("image", done=5_000_000)) == "image (0.01 GB)"
    assert describe(running("image", phase="starting")) == "image starting"
    assert describe({"name": "image", "state": "done", "result": {"changed": True, "seconds": 35.2}}) == (
        "image done (35 s)"
    )
    assert describe({"name": "image", "state": "done", "result": {"changed": False}}) == "image present"
    assert gigabytes(0, 2_000_000_000) == "0.0 of 2.0 GB"


def test_failure_names_the_fate_of_the_other() -> None:
    bad = running("image", state="failed", message="nvcr.io refuses it: log in.")
    assert failure([running("model")]) is None
    assert failure([bad, running("model")]) == (
        "image: nvcr.io refuses it: log in. model continues in the background (run again to attach)"
    )
    assert failure([bad, running("model", state="done")]) == "image: nvcr.io refuses it: log in. model is done"
    assert "run again, it resumes" in str(failure([running("model", state="died", message="gone")]))


def test_registered_results() -> None:
    started = {"started": 1, "finished": 0, "ansible_job_id": "j1", "results_file": "/root/.ansible_async/j1"}
    query, state = entry({"name": "image", "job": started})
    assert state is None
    assert query == {
        "name": "image",
        "status_file": "/run/sparkfleet/fetch/image.json",
        "results_file": "/root/.ansible_async/j1",
    }
    assert entry({"name": "image", "job": {"skipped": True}})[1]["state"] == "skipped"  # type: ignore[index]
    finished = entry({"name": "image", "job": {"changed": True, "msg": "would pull"}})[1]
    assert finished is not None
    assert (finished["state"], finished["result"]["changed"]) == ("done", True)
    failed = entry({"name": "image", "job": {"failed": True, "msg": "no"}})[1]
    assert failed is not None
    assert failed["state"] == "failed"


PARAMS: dict[str, Any] = {
    "repo": "acme/tiny",
    "revision": "main",
    "cache_dir": "/opt/hf",
    "client": "/opt/sparkfleet/lib/hf_client.pyz",
    "environment": {"HF_ENDPOINT": "https://hub.test", "HTTPS_PROXY": ""},
    "allow": [],
    "ignore": None,
    "memory": 2 << 30,
    "workers": 4,
    "network": "bridge",
}


def test_container_is_confined_and_never_told_the_token(tmp_path: Path) -> None:
    token = tmp_path / "hf_token"
    token.write_text("hf_canary")
    spec = model_download.container_spec({**PARAMS, "token_file": str(token)})
    host = spec["HostConfig"]
    assert "hf_canary" not in json.dumps(spec)
    assert (host["ReadonlyRootfs"], host["CapDrop"], host["SecurityOpt"]) == (True, ["ALL"], ["no-new-privileges"])
    mounts = {mount["Target"]: mount for mount in host["Mounts"]}
    assert mounts["/run/secrets/hf_token"]["Source"] == str(token)
    assert [target for target, mount in mounts.items() if not mount["ReadOnly"]] == ["/opt/hf"]
    assert "/etc/ssl" not in mounts  # private keys live there
    assert "HF_TOKEN_PATH=/run/secrets/hf_token" in spec["Env"]
    assert "HF_HUB_DISABLE_XET=1" in spec["Env"]
    assert "HF_ENDPOINT=https://hub.test" in spec["Env"]
    assert not [variable for variable in spec["Env"] if variable.startswith("HTTPS_PROXY")]


@pytest.mark.parametrize("content", [None, ""])
def test_without_token_nothing_is_mounted(tmp_path: Path, content: str | None) -> None:
    token = tmp_path / "hf_token"
    if content is not None:
        token.write_text(content)
    spec = model_download.container_spec({**PARAMS, "token_file": str(token)})
    assert not [mount for mount in spec["HostConfig"]["Mounts"] if "hf_token" in mount["Target"]]
    assert not [variable for variable in spec["Env"] if "TOKEN" in variable]


def test_command() -> None:
    plain = model_download.command(PARAMS)
    assert plain[1:5] == ["-I", "-S", "-B", "/hf_client.pyz"]
    assert plain[0].startswith("/usr/bin/python3")
    chosen = model_download.command({**PARAMS, "allow": ["-x*"], "ignore": ["a", "b"]})
    assert chosen[-3:] == ["--allow=-x*", "--ignore=a", "--ignore=b"]
    assert model_download.command({**PARAMS, "ignore": []})[-1] == "--ignore-nothing"


def test_root_holds_only_links_and_empty_folders() -> None:
    with tarfile.open(fileobj=io.BytesIO(model_download.root_tar())) as tar:
        members = {member.name: member for member in tar.getmembers()}
    assert members["usr"].isdir()
    assert members["lib"].linkname == "usr/lib"
    assert sum(member.size for member in members.values()) < 1000
    assert model_download.root_tar() == model_download.root_tar()


# -- damaged files ---------------------------------------------------------------------------------------------------

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
fields = st.sampled_from([*jobs.FIELDS, "state"])


@given(st.dictionaries(fields, values | st.sampled_from(jobs.STATES)), st.binary(max_size=40))
def test_a_status_of_any_form_is_understood_or_none(content: dict[str, Any], garbage: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.json")
        results = Path(folder, "results")
        for text in (json.dumps(content), json.dumps({**content, "state": "running"})):
            path.write_text(text)
            results.write_bytes(garbage)
            found = read_status(path)
            if found is not None:
                assert found["state"] in jobs.STATES
                assert is_alive(found) in (True, False)
            for asked in ({}, {"results_file": str(results)}):
                state = fetch_status.job_state({"name": "model", "status_file": str(path), **asked})
                assert state["state"] in ("absent", "starting", "running", "done", "failed", "died")
                shown = {**state, "failure": state["failure"]}
                assert describe(shown).startswith("model")
        path.write_bytes(garbage)
        assert read_status(path) is None


@pytest.mark.parametrize(
    "content", ['{"pid": "x"}', '{"pid": [1]}', "[]", "{", "", '{"pid": 1, "what": 5}', "9" * 5000]
)
def test_a_damaged_lock_names_nobody(job: Job, content: str) -> None:
    job.lock_path.write_text(content)
    assert Job(job.path, "model", "other").acquire() == {"pid": 0, "what": "unknown"}


def test_a_status_that_is_too_large_is_none(job: Job) -> None:
    job.path.write_text('{"state": "done", "what": "' + "x" * (2 << 20) + '"}')
    assert read_status(job.path) is None


def test_a_status_that_is_a_pipe_keeps_nobody_waiting(job: Job) -> None:
    job.path.unlink()
    os.mkfifo(job.path)
    assert read_status(job.path) is None


@pytest.mark.parametrize("field", ["pid", "pid_start", "updated", "error", "what", "result", "total"])
@pytest.mark.parametrize("value", ["x", [1], {"a": 1}, True, -1.5, None, 10**399])
def test_a_field_of_another_type_has_its_first_value(job: Job, field: str, value: Any) -> None:
    job.path.write_text(json.dumps({**job.status, field: value}))
    found = status(job)
    assert isinstance(found[field], jobs.FIELDS[field][0]) or found[field] == jobs.FIELDS[field][1]
    assert found["name"] == "model"
    assert describe({**found, "state": "running", "phase": "downloading"}).startswith("model")


@pytest.mark.parametrize(("source", "instead"), [("spark-1", "instead of spark-1"), ("", "instead")])
def test_a_source_that_could_not_be_used_is_named(monkeypatch: pytest.MonkeyPatch, source: str, instead: str) -> None:
    printed: list[str] = []
    monkeypatch.setattr(fetch_wait, "display", SimpleNamespace(display=printed.append, warning=printed.append))
    job = {"changed": True, "peer_failed": "model.safetensors differs"}
    arguments = {"jobs": [{"name": "model", "job": job, "source": source}]}
    task = SimpleNamespace(
        args=arguments, async_val=0, check_mode=False, diff=False, environment=None, delegate_to=None
    )
    stand_in = SimpleNamespace(_shell=SimpleNamespace(tmpdir="none"))
    result = fetch_wait.ActionModule(task, *[stand_in] * 5).run(task_vars={"inventory_hostname": "spark-2"})
    assert result["changed"] and not result.get("failed")
    assert printed == [f"spark-2  model was fetched from the internet {instead}: model.safetensors differs"]
