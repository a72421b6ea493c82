"""The wait for an engine: long poll, log, what is printed, and how a failure is explained."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.docker import Docker
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.engine import (
    HEAD,
    LINE,
    TAIL,
    inspect,
    instant,
    redact,
    wait,
)
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.http import Client
from plugins.action import vllm_wait as action
from plugins.modules import vllm_wait

from sparkfleet.diagnosis.failures import BY_ID
from sparkfleet.diagnosis.startup import Watch, explain
from tests.unit import DATA
from tests.unit.fakes.fake_engine import Engine, Handler
from tests.unit.fakes.fake_vllm import Vllm

BASE = datetime(2026, 11, 23, 15, 0, 0, tzinfo=timezone.utc).timestamp()
STARTED = "2026-11-23T15:00:00.5Z"
Poll = Callable[..., dict[str, Any]]


def stamp(second: float) -> str:
    return f"2026-11-23T15:00:{second:012.9f}Z"


class Container:
    """A container of the fake engine: `state` as Docker has it, `log` as (second, text)."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.state: dict[str, Any] = {"Running": True, "ExitCode": 0, "StartedAt": STARTED}
        self.restarts = 0
        self.log: list[tuple[float, str]] = []
        self.deaths: list[int] = []  # exit codes
        engine.routes["GET", "/events"] = self.events
        labels = {"com.docker.compose.project": "sparkfleet", "com.docker.compose.service": "vllm"}
        engine.routes["GET", "/containers/json"] = [{"Id": "abc", "State": "running", "Labels": labels}]
        engine.routes["GET", "/containers/abc/json"] = self.inspect
        engine.routes["GET", "/containers/abc/logs"] = self.logs

    def inspect(self, handler: Handler) -> None:
        found = {"Id": "abc", "State": self.state, "RestartCount": self.restarts, "Config": {"Tty": False}}
        handler.answer(200, found)

    def events(self, handler: Handler) -> None:
        assert "until=" in handler.path and "abc" in handler.path  # else it would never end
        actors = [{"Action": "die", "Actor": {"Attributes": {"exitCode": str(code)}}} for code in self.deaths]
        handler.chunks(*(json.dumps(actor).encode() + b"\n" for actor in actors))

    def logs(self, handler: Handler) -> None:
        # Docker's `since` is inclusive; `tail` counts from the end.
        query = dict(part.split("=") for part in handler.path.partition("?")[2].split("&"))
        since = float(query["since"]) - BASE
        lines = [f"{stamp(second)} {text}\n".encode() for second, text in self.log if second >= since - 1e-6]
        lines = lines if query["tail"] == "all" else lines[-int(query["tail"]) :]
        handler.chunks(*(struct.pack(">BxxxL", 1, len(line)) + line for line in lines))


@pytest.fixture
def container(engine: Engine) -> Container:
    return Container(engine)


@pytest.fixture
def poll(engine: Engine, vllm: Vllm, capsys: pytest.CaptureFixture[str]) -> Poll:
    """Run the module as Ansible does."""

    def run(**arguments: Any) -> dict[str, Any]:
        given = {"container": "vllm", "url": vllm.url, "socket": str(engine.server_address), "slice": 0, **arguments}
        with patch_module_args(given), pytest.raises(SystemExit):
            vllm_wait.main()
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        return result

    return run


# -- the module ------------------------------------------------------------------------------------------------


def test_ready_returns_at_once(poll: Poll, container: Container) -> None:
    container.log = [(1, "hello"), (2, "world")]
    began = time.monotonic()
    result = poll(slice=30)
    assert time.monotonic() - began < 2
    assert result["ready"] is True and result["state"] == "running" and result["changed"] is False
    assert result["log_lines"] == [f"{stamp(1)} hello", f"{stamp(2)} world"]
    assert result["cursor"] == stamp(2) and result["started_at"] == STARTED


def test_becomes_ready_within_the_slice(poll: Poll, container: Container, vllm: Vllm) -> None:
    vllm.faults.add("sick")

    def heal(handler: Handler) -> None:
        if sum(path == "/containers/abc/json" for _, path, *_ in container.engine.seen) == 3:
            vllm.faults.clear()
        container.inspect(handler)

    container.engine.routes["GET", "/containers/abc/json"] = heal
    began = time.monotonic()
    assert poll(slice=10)["ready"] is True
    assert 0.3 < time.monotonic() - began < 2


def test_slice_ends(poll: Poll, container: Container, vllm: Vllm) -> None:
    vllm.faults.add("sick")
    began = time.monotonic()
    result = poll(slice=0.6)
    assert 0.5 < time.monotonic() - began < 1.5
    assert result["ready"] is False and result["state"] == "running"


def test_only_new_lines(poll: Poll, container: Container) -> None:
    container.log = [(1, "old"), (2, "seen"), (2.000000001, "new"), (3, "newer")]
    result = poll(cursor=stamp(2))
    assert [line.split()[1] for line in result["log_lines"]] == ["new", "newer"]
    assert poll(cursor=stamp(3))["cursor"] == stamp(3)


def test_lines_just_before_docker_noted_the_start_count(poll: Poll, container: Container) -> None:
    container.log = [(0.2, "exec format error")]
    assert len(poll()["log_lines"]) == 1


def test_log_is_bounded_and_its_end_is_there(poll: Poll, container: Container, vllm: Vllm) -> None:
    vllm.faults.add("sick")
    container.log = [(1 + number / 1000, f"line{number}") for number in range(3000)]
    lines = poll()["log_lines"]
    assert len(lines) == HEAD + TAIL
    assert lines[0].endswith("line0") and lines[-1].endswith("line2999")
    container.log = [(1, "x" * 100000)]
    assert len(poll()["log_lines"][0]) <= LINE


@pytest.mark.parametrize(
    ("state", "word"),
    [
        ({"Running": False, "ExitCode": 1, "StartedAt": STARTED}, "exited"),
        ({"Running": True, "Restarting": True, "ExitCode": 1, "StartedAt": STARTED}, "restarting"),
        ({"Running": True, "Paused": True, "ExitCode": 0, "StartedAt": STARTED}, "paused"),
        ({"Status": "created", "Running": False, "Error": "port is already allocated"}, "exited"),
    ],
)
def test_an_end_returns_at_once(poll: Poll, container: Container, state: dict[str, Any], word: str) -> None:
    container.state = state
    result = poll(slice=30)
    assert result["ready"] is False and result["state"] == word
    assert result["error"] == state.get("Error", "") and result["exit_code"] == state.get("ExitCode", 0)


def test_a_restart_returns_at_once(poll: Poll, container: Container, vllm: Vllm) -> None:
    vllm.faults.add("sick")
    container.restarts = 3
    began = time.monotonic()
    assert poll(slice=20, restarts=2)["restart_count"] == 3
    assert time.monotonic() - began < 2
    assert poll(slice=0.3, restarts=3)["state"] == "running"


def test_how_it_ended_before_docker_started_it_again(poll: Poll, container: Container, vllm: Vllm) -> None:
    vllm.faults.add("sick")
    container.restarts, container.deaths = 2, [1, 137]
    assert poll(slice=0.3, restarts=0)["exit_code"] == 137


def test_no_container(poll: Poll, engine: Engine) -> None:
    engine.routes["GET", "/containers/json"] = []
    # One of that name which Sparkfleet did not make is someone else's.
    engine.routes["GET", "/containers/vllm/json"] = {"Id": "other", "State": {"Running": True}}
    result = poll(slice=30)
    assert result["state"] == "missing" and result["log_lines"] == []


def test_no_docker(poll: Poll, tmp_path: Path) -> None:
    result = poll(socket=str(tmp_path / "none.sock"))
    assert result["failed"] is True and "no such socket" in result["msg"]


def test_secrets_leave_no_host(poll: Poll, container: Container) -> None:
    container.log = [(1, "non-default args: {'api_key': ['s3cret'], 'hf_token': 'hf_abcdefghijklmnop', 'port': 8000}")]
    (line,) = poll()["log_lines"]
    assert "s3cret" not in line and "hf_abcdefghijklmnop" not in line and "'port': 8000" in line
    assert redact("--api_key=abc --x") == "--api_key=*** --x"
    assert redact("hf_cache and HF_HUB_CACHE stay") == "hf_cache and HF_HUB_CACHE stay"


def test_bytes_of_a_download(poll: Poll, container: Container, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "a").write_bytes(b"x" * 8192)
    (tmp_path / "blobs" / "b.incomplete").write_bytes(b"x" * 4096)
    assert poll(download_dir=str(tmp_path))["downloaded"] == 12288
    assert poll(download_dir=str(tmp_path / "none"))["downloaded"] == poll()["downloaded"] == 0


def test_instant() -> None:
    assert instant("1970-01-01T00:00:01.25Z") == (1, 250000000)
    assert instant("1970-01-01T00:00:01Z") == (1, 0)
    assert instant("0001-01-01T00:00:00Z") == instant("") == instant("12:00") == (0, 0)
    assert instant("2026-99-99T99:99:99Z") == instant("0000-01-01T00:00:00Z") == (0, 0)
    assert instant("\u0662026-01-01T00:00:00Z") == (0, 0)


@pytest.mark.parametrize("odd", [None, 5, -1, "x", "x" * 100_000, [5], {"a": []}, 1 << 80, True])
def test_whatever_docker_says_of_a_container_is_understood_or_left_out(
    engine: Engine, container: Container, docker: Docker, odd: Any
) -> None:
    labels = {"com.docker.compose.service": "vllm"}
    known = dict.fromkeys(("State", "Created", "Names"), odd)
    engine.routes["GET", "/containers/json"] = [
        {"Id": "abc", "Labels": labels, **known},
        {"Id": "def", "Labels": labels, "Created": 5},
        {"Id": "ghi", **known, "Labels": odd},
    ]
    states = ({"State": odd}, {"State": dict.fromkeys(("ExitCode", "Error", "StartedAt", "OOMKilled"), odd)})
    container.deaths = [10**400]
    for state in states:
        for name in ("abc", "def"):
            found = {"Id": odd, "Config": odd, "RestartCount": odd, **state}
            engine.routes["GET", f"/containers/{name}/json"] = found
        seen = inspect(docker, "vllm")
        assert isinstance(seen["id"], str) and seen["id"]
        assert len(seen["error"]) <= LINE and len(seen["started_at"]) <= 100
        assert -(1 << 31) < seen["exit_code"] < 1 << 31 and 0 <= seen["restart_count"] < 1 << 31
        assert instant(seen["started_at"]) == (0, 0)


def test_health_is_not_asked_of_a_container_that_does_not_run(container: Container, docker: Docker, vllm: Vllm) -> None:
    container.state = {"Running": False}
    wait(docker, Client(vllm.url), "vllm", 5, -1)
    assert vllm.seen == []


# -- the action ------------------------------------------------------------------------------------------------


def answer(second: float, *log: tuple[float, str], **more: Any) -> dict[str, Any]:
    lines = [f"{stamp(at)} {text}" for at, text in log]
    return {
        "ready": False,
        "state": "running",
        "exit_code": 0,
        "restart_count": 0,
        "oom_killed": False,
        "error": "",
        "started_at": STARTED,
        "log_lines": lines,
        "cursor": lines[-1].split()[0] if lines else "",
        "now": BASE + second,
        **more,
    }


class Stage:
    """An action with the module's answers put in its way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answers: list[dict[str, Any]], **arguments: Any) -> None:
        self.printed: list[str] = []
        self.asked: list[dict[str, Any]] = []
        self.clock = 0.0
        monkeypatch.setattr(action.display, "display", self.printed.append)
        monkeypatch.setattr("sparkfleet.diagnosis.startup.time.monotonic", lambda: self.clock)
        self.plugin = object.__new__(action.ActionModule)
        self.plugin._task = SimpleNamespace(
            args={"container": "vllm", **arguments},
            check_mode=arguments.pop("_check", False),
            async_val=0,
            diff=False,
            action="vllm_wait",
        )
        self.plugin._task.args.pop("_check", None)
        self.answers = answers
        self.plugin._connection = SimpleNamespace(_shell=SimpleNamespace(tmpdir=None), has_pipelining=True)
        self.plugin._early_needs_tmp_path = lambda: False
        self.plugin._execute_module = self.execute

    def execute(self, module_name: str, module_args: dict[str, Any], task_vars: dict[str, Any]) -> dict[str, Any]:
        assert module_name == "sparkfleet.dgx.vllm_wait"
        self.asked.append(module_args)
        found = self.answers.pop(0)
        if "now" in found:
            self.clock = found["now"] - BASE
        return found

    def run(self) -> dict[str, Any]:
        result: dict[str, Any] = self.plugin.run(None, {"inventory_hostname": "spark-1"})
        return result


SHARD = "Loading safetensors checkpoint shards:  50% Completed | {}/4 [00:00<?]"


def test_phases_are_printed_as_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(
        monkeypatch,
        [
            answer(3),
            answer(6, (4, "Starting to load model x..."), (5, SHARD.format(1))),
            answer(9, (8, SHARD.format(2))),
            answer(12),
            answer(15),
            answer(18),
            answer(21, (19, "Available KV cache memory: 66.25 GiB"), (20, "GPU KV cache size: 271,360 tokens")),
            answer(24, (22, "init engine (profile, create kv cache, warmup model) took 9 s"), ready=True),
        ],
    )
    result = stage.run()
    assert stage.printed == [
        "spark-1  5 s  loading weights, shard 1/4",
        "spark-1  8 s  loading weights, shard 2/4",
        "spark-1  18 s  loading weights, shard 2/4",  # ten seconds must not pass in silence
        "spark-1  20 s  profiling memory, KV cache 66.25 GiB, 271,360 tokens",
        "spark-1  22 s  starting server",
        "spark-1  24 s  ready",
    ]
    assert result["ready"] is True and result["changed"] is False and "failed" not in result
    assert result["seconds"] == 24 and result["kv_cache"] == {"gib": 66.25, "tokens": 271360}
    assert result["phases"] == [
        {"phase": "starting", "seconds": 3.5},
        {"phase": "loading weights", "seconds": 15.0},
        {"phase": "profiling memory", "seconds": 3.0},
        {"phase": "starting server", "seconds": 2.0},
    ]
    assert [asked["cursor"] for asked in stage.asked[:4]] == ["", "", stamp(5), stamp(8)]
    assert [asked["restarts"] for asked in stage.asked[:2]] == [-1, 0]


def test_a_download_is_shown_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    seeks = (2, "Using model weights format ['*.safetensors']")
    stage = Stage(
        monkeypatch,
        [
            answer(3, seeks, downloaded=100_000_000),
            answer(6, downloaded=3_100_000_000),
            answer(9, (8, SHARD.format(0)), downloaded=9_100_000_000),
            answer(10, ready=True, downloaded=9_100_000_000),
        ],
        download_dir="/opt/hf/models--a--b",
        download_bytes=9_100_000_000,
    )
    stage.run()
    assert stage.printed == [
        "spark-1  2 s  downloading",
        "spark-1  3 s  downloading, 0.1 of 9.1 GB",
        "spark-1  6 s  downloading, 3.1 of 9.1 GB",
        "spark-1  8 s  loading weights, shard 0/4",
        "spark-1  10 s  ready",
    ]
    assert all("download_bytes" not in asked for asked in stage.asked)


def test_never_silent_for_more_than_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, [*(answer(second) for second in range(3, 60, 3)), answer(60, ready=True)])
    stage.run()
    seconds = [int(line.split()[1]) for line in stage.printed]
    assert all(later - sooner <= 10 for sooner, later in zip([0, *seconds], seconds, strict=False))


def test_an_engine_that_runs_already_tells_no_history(monkeypatch: pytest.MonkeyPatch) -> None:
    old = answer(1800.0, (4, SHARD.format(1)), (9, "INFO:     Application startup complete."), ready=True)
    stage = Stage(monkeypatch, [{**old}])
    monkeypatch.setattr("sparkfleet.diagnosis.startup.time.monotonic", lambda: 0.3)
    result = stage.run()
    assert stage.printed == ["spark-1  0 s  ready"]
    assert sum(phase["seconds"] for phase in result["phases"]) == pytest.approx(8.5)


def test_check_mode_says_what_it_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, [], _check=True)
    result = stage.run()
    assert result["changed"] is False and result["msg"].startswith(
        "would wait until vllm answers at http://127.0.0.1:8000"
    )
    assert stage.asked == []


def test_a_crash_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = (DATA / "vllm-memory-refused.log").read_text(encoding="utf-8").strip().split("\n")
    log = [
        (5 + number / 100, line.removeprefix("2026-11-10T09:00:01.000000000Z ")) for number, line in enumerate(trace)
    ]
    stage = Stage(monkeypatch, [answer(3), answer(6, *log, state="exited", exit_code=1)])
    result = stage.run()
    assert result["failed"] is True and result["failure"] == "memory-refused" and result["changed"] is False
    first, *lines = result["msg"].split("\n")
    assert first.startswith(
        "vllm ended with exit code 1 after 6 s (starting): vLLM refused to start for lack of free memory"
    )
    assert "gpu_memory_utilization" in first and first.endswith("[memory-refused]")
    assert len(lines) == 1 and lines[0].startswith("  ValueError: Free memory on device (33.99/121.63 GiB)")


def test_a_restart_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, [answer(3), answer(6, (5, "vllm: error: unrecognized arguments: --x"), restart_count=1)])
    result = stage.run()
    assert result["failure"] == "argument-unknown"
    assert "crashed after 6 s" in result["msg"] and "`docker stop` it" in result["msg"]
    assert result["msg"].endswith("\n  vllm: error: unrecognized arguments: --x")


def test_earlier_restarts_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, [answer(3, restart_count=2), answer(6, restart_count=2, ready=True)])
    assert stage.run()["ready"] is True


@pytest.mark.parametrize(
    ("last", "failure", "words"),
    [
        ({"state": "missing"}, "container-missing", "there is no container vllm"),
        ({"state": "restarting", "restart_count": 4}, "restart-loop", "(4 restarts so far)"),
        ({"state": "exited", "exit_code": 137, "oom_killed": True}, "out-of-memory", "exit code 137"),
        ({"state": "exited", "exit_code": 3}, "engine-died", "ended with exit code 3"),
        (
            {"state": "exited", "exit_code": 128, "error": "Bind for 0.0.0.0:8000 failed: port is already allocated"},
            "port-taken",
            "vllm could not be started: the port is taken",
        ),
    ],
)
def test_ends_without_a_word_in_the_log(
    monkeypatch: pytest.MonkeyPatch, last: dict[str, Any], failure: str, words: str
) -> None:
    result = Stage(monkeypatch, [answer(3, **last)]).run()
    assert result["failure"] == failure and words in result["msg"]
    assert BY_ID[failure].remedy in result["msg"]


def test_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, [answer(3), answer(6, (5, SHARD.format(2))), answer(10)], timeout=10)
    result = stage.run()
    assert result["failure"] == "start-timeout"
    assert "vllm was not ready after 10 s (loading weights, shard 2/4)" in result["msg"]
    assert stage.asked[-1]["slice"] == 3 and len(stage.asked) == 3


def test_the_last_slice_is_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, [answer(3), answer(4)], timeout=4)
    stage.run()
    assert stage.asked[-1]["slice"] == 1


def test_a_failed_module_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    result = Stage(monkeypatch, [{"failed": True, "msg": "Docker on /x: no such socket"}]).run()
    assert result["failed"] is True and result["msg"] == "Docker on /x: no such socket"


def test_excerpt_is_at_most_fifteen_lines() -> None:
    watch = Watch("spark-1", 3)
    found = answer(3, *((1 + n / 100, f"ValueError: number {n}") for n in range(40)), state="exited", exit_code=1)
    watch.take(found)
    assert len(explain("vllm", found, watch)["msg"].split("\n")) == 16
