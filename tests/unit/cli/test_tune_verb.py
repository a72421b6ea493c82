"""The verb tune: what it tries, what it keeps, what it writes, and how it goes on after it was killed. The latter with
ansible-playbook and stand-ins for what acts on a Spark, the rest with a stand-in for the run of a trial."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from sparkfleet import exit_codes, paths
from sparkfleet.cli import main, tune
from sparkfleet.cli.runner import Collector
from sparkfleet.planning import catalog
from sparkfleet.reporting import event_log, history
from sparkfleet.reporting.host_result import HostResult
from tests.unit import ROOT
from tests.unit.cli.test_canaries import children
from tests.unit.cli.test_trial_verb import answers, journal
from tests.unit.cli.test_verbs import calls, elsewhere, inventory, overlay

__all__ = ["calls", "elsewhere", "inventory"]  # fixtures

HOST = "tune-stand-in"
MODULE = """#!/usr/bin/python
# WANT_JSON
import json, pathlib, re, sys, time
given = json.load(open(sys.argv[1]))
folder, answer = pathlib.Path({folder!r}), json.loads({answer!r})
if {name!r} == "release_stage":
    words = re.findall(r"--?max-num-seqs[^0-9]+([0-9]+)", given["compose"])
    with (folder / "staged").open("a") as file:
        file.write(json.dumps([int(words[0]), given["plan"].get("loads"), given["plan"]["weights"]]) + "\\n")
if {name!r} == "release_switch":
    lines = (folder / "staged").read_text().splitlines()
    seqs = json.loads(lines[-1])[0]
    if (folder / "slow").exists() and len(lines) == 2:
        (folder / "slow").rename(folder / "reached")
        time.sleep(60)
    wiggle = (len(lines) % 3) * 0.01
    (record,) = answer["journal"]["measured"].values()
    record["speed"] = [
        {{"streams": 16, "requests": 32, "tokens_per_second": {speeds!r}[seqs] + wiggle + number / 100,
          "stream_tokens_per_second": 9.0, "ttft_ms": 100.0, "ttft_p95_ms": 2.0 * seqs, "request_p50_ms": 900.0}}
        for number in range(2)
    ]
    record["bench"] = "vllm bench serve"
print(json.dumps(answer))
"""
#: Tokens a second by max_num_seqs; the default of the card is 64.
SPEEDS = {16: 40.0, 32: 60.0, 64: 80.0, 128: 100.0, 256: 90.0}


class Bench:
    """A Spark that is as fast as SPEEDS has it."""

    def __init__(self, folder: Path, speeds: dict[int, float]) -> None:
        self.folder = folder
        known = {"folder": str(folder), "speeds": speeds}
        modules = {
            f"modules/{name}.py": MODULE.format(name=name, answer=json.dumps(answer), **known)
            for name, answer in answers(journal()).items()
        }
        self.collections = overlay(folder, modules)
        local = {"ansible_connection": "local", "ansible_become": False, "ansible_python_interpreter": sys.executable}
        self.inventory = folder / "fleet.yml"
        hosts = {HOST: {"sparkfleet_operator": "nvidia", **local}}
        self.inventory.write_text(yaml.safe_dump({"sparks": {"hosts": hosts}}), encoding="utf-8")
        self.output = folder / "card.yml"

    def words(self, *more: str) -> list[str]:
        given = ("--search", "max_num_seqs", "--repetitions", "2", "--output", str(self.output))
        return ["tune", "llama31-8b-fp8", "-i", str(self.inventory), *given, *more]

    def staged(self) -> list[Any]:
        """Of each trial max_num_seqs, loads and weights."""
        return [json.loads(line) for line in (self.folder / "staged").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "state"
    monkeypatch.setattr(paths, "STATE", folder)
    return folder


class Spark:
    """In place of the runs of a trial: a Spark that is as fast as SPEEDS has it, with the wiggle of its repetitions."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.output, self.tried, self.given = folder / "card.yml", [], {}  # type: tuple[Path, list[int], dict[str, Any]]
        self.ends: dict[int, dict[str, Any]] = {}
        hosts = {HOST: {"sparkfleet_vllm_max_num_seqs": 64}}
        self.inventory = folder / "fleet.yml"
        self.inventory.write_text(yaml.safe_dump({"sparks": {"hosts": hosts}}), encoding="utf-8")
        monkeypatch.setattr(tune, "run", self.run)

    def run(self, verb: str, inventory: str, words: list[str], collector: Collector) -> int:
        assert verb == "trial" and words[-1] == HOST
        self.given = json.loads(words[words.index("-e") + 1])
        seqs = self.given.get("sparkfleet_vllm_max_num_seqs", 64)
        self.tried.append(seqs)
        host = collector.hosts.setdefault(HOST, HostResult(HOST, "changed"))
        for name, value in self.ends.get(seqs, {}).items():
            setattr(host, name, value)
        if host.result == "changed":
            wiggle = len(self.tried) % 3 / 100
            rows = [
                {"streams": 16, "tokens_per_second": SPEEDS[seqs] + wiggle + number / 100, "ttft_p95_ms": 2.0 * seqs}
                for number in range(len(self.given["sparkfleet_trial_loads"]))
            ]
            host.measured = {"vllm-m": {"speed": rows, "ready_s": 50.0}}
        return 0

    def tune(self, *more: str) -> int:
        given = ("--search", "max_num_seqs", "--output", str(self.output), "-i", str(self.inventory))
        return main.main(["tune", "llama31-8b-fp8", *given, *more])


@pytest.fixture
def spark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Spark:
    return Spark(tmp_path, monkeypatch)


def test_the_best_is_confirmed_in_turn_and_written(spark: Spark, capsys: pytest.CaptureFixture[str]) -> None:
    assert spark.tune("--json") == exit_codes.OK
    captured = capsys.readouterr()
    made = json.loads(captured.out)
    # The default, up while it is better, then default and winner in turn.
    assert spark.tried == [64, 128, 256, 64, 128, 64, 128]
    assert made["verdict"] == "better" and made["winner"] == {"max_num_seqs": 128}
    card = catalog.load(str(spark.output))
    assert card.profiles["tuned-throughput"]["max_num_seqs"] == 128 and card.repo == "nvidia/Llama-3.1-8B-Instruct-FP8"
    assert {*catalog.load("llama31-8b-fp8").profiles} < {*card.profiles}
    assert "100.0 tok/s with the profile, 80.0 tok/s with throughput" in spark.output.read_text(encoding="utf-8")
    assert f"sparkfleet switch {spark.output} --profile tuned-throughput" in captured.err
    assert "without sparkfleet_vllm_max_num_seqs, which would take the profile's place" in captured.err
    # The same again has nothing to measure; another question starts over, and adds its profile.
    assert spark.tune("--json") == exit_codes.OK
    assert len(spark.tried) == 7 and json.loads(capsys.readouterr().out)["verdict"] == "better"
    assert spark.tune("--json", "--name", "second", "--streams", "8") == exit_codes.OK
    assert len(spark.tried) == 14 and spark.given["sparkfleet_trial_loads"][0]["streams"] == 8
    assert {"tuned-throughput", "second"} < {*catalog.load(str(spark.output)).profiles}
    assert spark.tune("--fresh", "--json") == exit_codes.OK and len(spark.tried) == 21


def test_the_card_of_another_model_is_not_replaced(spark: Spark, capsys: pytest.CaptureFixture[str]) -> None:
    spark.output.write_text((ROOT / "models" / "qwen3-32b-fp8.yml").read_text(encoding="utf-8"), encoding="utf-8")
    assert spark.tune() == exit_codes.BAD_INPUT and "card of another model" in capsys.readouterr().err
    assert spark.tried == []  # which is said before the search


@pytest.mark.parametrize(
    ("place", "why"), [("file/card.yml", "File exists|Not a directory"), ("folder", "Is a directory"), ("text", "card")]
)
def test_an_output_that_cannot_be_written_is_said_before_the_search(
    place: str, why: str, spark: Spark, state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("no card", encoding="utf-8")
    assert spark.tune("--output", str(tmp_path / place)) == exit_codes.BAD_INPUT
    assert re.search(why, capsys.readouterr().err) and spark.tried == [] and not state.exists()
    assert (tmp_path / "text").read_text(encoding="utf-8") == "no card"


def test_a_limit_of_the_first_token_and_what_does_not_start(spark: Spark, capsys: pytest.CaptureFixture[str]) -> None:
    """p95 is 2 ms for each sequence: 64 and 32 of them are too late, 16 keep the limit, 128 do not start."""
    spark.ends[128] = {"result": "restored", "message": "no memory"}
    assert spark.tune("--json", "--ttft-p95", "40ms") == exit_codes.OK
    captured = capsys.readouterr()
    made = json.loads(captured.out)
    assert spark.tried == [64, 128, 32, 16, 64, 16, 64, 16]
    assert made["winner"] == {"max_num_seqs": 16} and made["verdict"] == "better"
    assert "its first token comes in time" in captured.err and made["runs"][1]["failed"] == "no memory"


def test_what_does_not_fit_is_not_started(spark: Spark, capsys: pytest.CaptureFixture[str]) -> None:
    finding = [{"id": "memory", "message": "too large"}]
    for seqs in (128, 32):
        spark.ends[seqs] = {"result": "refused", "message": "it needs more", "findings": finding}
    assert spark.tune("--json") == exit_codes.OK
    made = json.loads(capsys.readouterr().out)
    assert spark.tried == [64, 128, 32] and made["verdict"] == "default" and not spark.output.exists()
    assert made["runs"][1]["failed"] == "does not fit: it needs more"


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ({"result": "unreachable", "message": "no route"}, exit_codes.UNREACHABLE),
        ({"result": "failed", "message": "release 2 does not serve"}, exit_codes.DOWN),
        (
            {"result": "refused", "message": "another switch runs", "failure": "switch-running-other"},
            exit_codes.REFUSED,
        ),
    ],
)
def test_what_says_nothing_of_the_settings_ends_it(
    spark: Spark, end: dict[str, Any], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    spark.ends[128] = end
    assert spark.tune() == code
    assert end["message"] in capsys.readouterr().err
    del spark.ends[128]
    assert spark.tune("--budget", "1h") == exit_codes.OK
    assert spark.tried == [64, 128, 128, 256, 64, 128, 64, 128]  # what was measured is not measured again


def ends(state: Path) -> list[dict[str, Any]]:
    """The last line of each event log."""
    files = sorted((state / event_log.FOLDER).glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    return [json.loads(path.read_text(encoding="utf-8").splitlines()[-1]) for path in files]


def test_its_event_log_ends_with_its_spark(
    spark: Spark, state: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spark.ends[128] = {"result": "failed", "message": "release 2 does not serve"}
    assert spark.tune() == exit_codes.DOWN
    del spark.ends[128]
    assert spark.tune() == exit_codes.OK

    def cut(*given: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "run", cut)
    assert spark.tune("--fresh") == exit_codes.INTERRUPTED
    (run, *_) = history.runs(state / event_log.FOLDER, str(spark.inventory), [HOST])
    assert run["event"] == "tune" and run["detail"].startswith("exit code ")
    assert [(end["exit_code"], end["hosts"]) for end in ends(state)] == [
        (exit_codes.DOWN, [{"name": HOST, "result": "failed"}]),
        (exit_codes.OK, [{"name": HOST, "result": "ok"}]),
        (exit_codes.INTERRUPTED, [{"name": HOST, "result": "interrupted"}]),
    ]
    assert all(end["event"] == "end" and end["seconds"] >= 0 and "study" in end for end in ends(state))


def test_what_a_spark_cannot_have_measured_ends_it(
    spark: Spark, state: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SPEEDS, 128, 1e300)
    assert spark.tune() == exit_codes.BAD_INPUT
    assert "what the Spark measured: tokens_per_second" in capsys.readouterr().err
    assert ends(state)[0]["exit_code"] == exit_codes.BAD_INPUT


def test_a_default_that_does_not_start(spark: Spark, capsys: pytest.CaptureFixture[str]) -> None:
    spark.ends[64] = {"result": "restored", "message": "no memory"}
    assert spark.tune() == exit_codes.REFUSED and spark.tried == [64]
    assert "the default settings cannot be measured: no memory" in capsys.readouterr().err


def test_a_budget_ends_it(spark: Spark, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter(range(0, 100_000, 100))
    # A run takes 100 s.
    slow = SimpleNamespace(monotonic=lambda: next(clock), time=time.time, strftime=time.strftime)
    monkeypatch.setattr(tune, "time", slow)
    assert spark.tune("--budget", "650s") == exit_codes.OK
    # One more and the two pairs have room after the first, not after the second.
    assert spark.tried == [64, 128, 64, 128, 64, 128]
    assert "the budget of 650 s ends the search" in capsys.readouterr().out
    assert spark.tune("--budget", "1200s") == exit_codes.OK
    assert spark.tried[6:] == [256]


def test_a_search_that_was_killed_goes_on(tmp_path: Path, state: Path) -> None:
    bench = Bench(tmp_path, {64: 80.0, 128: 70.0, 32: 70.0})
    (tmp_path / "slow").touch()
    script = f"import sys; from pathlib import Path; from sparkfleet import paths; paths.STATE = Path({str(state)!r}); "
    script += f"from sparkfleet.cli import main; sys.exit(main.main({bench.words('--json')!r}))"
    environment = {**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(bench.collections)}
    argv = [sys.executable, "-c", script]
    killed = subprocess.Popen(argv, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "reached").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    below = children(killed.pid)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait(10)
    for pid in below:  # ansible-playbook has a session of its own
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert [seqs for seqs, *_ in bench.staged()] == [64, 128]
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert [seqs for seqs, *_ in bench.staged()] == [64, 128, 128, 32]  # the one that was cut, and what comes after
    assert "resumed: 1 run" in done.stderr and json.loads(done.stdout)["verdict"] == "default"
    _, loads, weights = bench.staged()[0]
    assert [load["seed"] for load in loads] == [1, 2] and loads[0]["streams"] == 16 and weights == "real"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--budget", "2"), "write a time as 300ms, 2s, 90m or 2h"),
        (("--search", "batch"), "--search batch: there are"),
        (("--name", "Best"), "--name Best: small letters"),
        (("--repetitions", "1"), "--repetitions 1: 2 to 8"),
        (("--shape", "odd"), "shape 'odd'"),
        (("--streams", "0"), "streams: 0 is not an integer from 1 to 1024"),
        (("--profile", "odd"), "has no profile 'odd'"),
    ],
)
def test_what_is_wrong_is_said_before_a_host_is_asked(
    words: tuple[str, ...], why: str, calls: Path, inventory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main.main(["tune", "llama31-8b-fp8", *words, "-i", str(inventory)])
    except SystemExit as error:
        code = int(str(error.code))
    assert code == exit_codes.BAD_INPUT and why in capsys.readouterr().err and not calls.exists()


def test_one_spark_is_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "two.yml"
    path.write_text(yaml.safe_dump({"sparks": {"hosts": {"a": None, "b": None}}}), encoding="utf-8")
    assert main.main(["tune", "llama31-8b-fp8", "-i", str(path)]) == exit_codes.BAD_INPUT
    assert "tune needs one Spark: name it with -l; there are a, b" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "seconds"), [("300ms", 0.3), ("2s", 2.0), ("1.5m", 90.0), ("2h", 7200.0)])
def test_durations(text: str, seconds: float) -> None:
    assert tune.duration(text) == pytest.approx(seconds)


def test_a_study_of_another_form_is_said(spark: Spark, state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert spark.tune("--budget", "1ms") == exit_codes.OK
    (path,) = (state / "tune" / HOST).glob("*.json")
    for data in ({"format": 1, "runs": [{"settings": []}]}, {"format": 2, "runs": []}):
        path.write_text(json.dumps(data), encoding="utf-8")
        assert spark.tune() == exit_codes.BAD_INPUT
        assert "--fresh starts the search over" in capsys.readouterr().err
    with path.with_suffix(".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert spark.tune("--fresh") == exit_codes.BAD_INPUT
    assert "another process runs this search" in capsys.readouterr().err
    # No run has begun but the first.
    assert len(ends(state)) == 1 and ends(state)[0]["event"] == "end"
