"""The engine that fails on command: what it logs is what the table knows, what it answers is what is verified."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import release_format
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.http import Client, HttpError
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.switch import verify_params
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.verify import KINDS, verify
from simulator import matrix
from simulator.spark import QUESTION

from sparkfleet.diagnosis import failures
from sparkfleet.diagnosis.startup_log import Tracker
from tests.unit import ROOT
from tests.unit.fakes import fake_release

VLLM = ROOT / "simulator" / "fault_engine" / "vllm"
MODEL = "org/model"


class Engine:
    """One that runs."""

    def __init__(self, folder: Path) -> None:
        self.command = folder / "command"
        self.process: subprocess.Popen[str] | None = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.client = Client(f"http://127.0.0.1:{self.port}", 5)

    def start(self, *words: str, fault: str = "") -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "SIMULATED_FAULT": fault,
            "SIMULATED_LOAD_SECONDS": "0",
            "SIMULATED_PORT": str(self.port),
            "SIMULATED_COMMAND": str(self.command),
        }
        self.process = subprocess.Popen(
            [sys.executable, str(VLLM), "serve", MODEL, *words],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        return self.process

    def ready(self) -> None:
        for _ in range(100):
            try:
                if self.client.get("/health").status == 200:
                    return
            except HttpError:
                time.sleep(0.05)
        raise AssertionError("it does not get ready")

    def verify(self, **more: Any) -> dict[str, Any]:
        asked = {"question": QUESTION, "expect": "Paris", "prompt": "The capital of France is"}
        questions = {**asked, "prompt_expect": "Paris", "max_tokens": 32}
        made = release_format.Engine(**fake_release.an_engine("vllm-m", self.port, repo=MODEL, verify=questions))
        result: dict[str, Any] = verify({**verify_params(made), "timeout": 5, **more})
        return result


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    made = Engine(tmp_path)
    yield made
    if made.process:
        made.process.kill()
        made.process.communicate()


def ended(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    out, _ = process.communicate(timeout=20)
    # As a container's: 128 and the signal.
    return (128 - process.returncode if process.returncode < 0 else process.returncode), out.splitlines()


@pytest.mark.parametrize("fault", [name for name in matrix.STARTS if name != "start-timeout"])
def test_what_it_logs_in_its_end_is_recognised(engine: Engine, fault: str) -> None:
    code, lines = ended(engine.start("--max-model-len", "32768", fault=fault))
    assert code in (1, 137)
    assert [item.failure.id for item in failures.match(lines, exit_code=code)] == [fault]


def test_an_argument_that_it_does_not_know(engine: Engine) -> None:
    code, lines = ended(engine.start("--no-such-thing", "1"))
    assert code == 2 and [item.failure.id for item in failures.match(lines, exit_code=code)] == ["argument-unknown"]


def test_its_phases_are_those_of_vllm(engine: Engine) -> None:
    process = engine.start(fault="capability-warning")
    engine.ready()
    process.terminate()
    code, lines = ended(process)
    tracker = Tracker(0.0)
    steps = tracker.feed(lines, 1.0)
    assert code == 0
    assert [item.failure.id for item in failures.match(lines)] == ["capability-warning"]
    assert [str(step) for step in steps] == [
        "starting, vLLM 0.10.1.1",
        "loading weights, done, 8.49 GiB",
        "profiling memory, KV cache 95.40 GiB, 781,712 tokens, 23.86 requests of 32,768",
        "capturing graphs",
        "starting server",
    ]


def test_when_nothing_is_wrong_it_verifies(engine: Engine) -> None:
    engine.start()
    engine.ready()
    assert engine.verify()["verified"] is True


@pytest.mark.parametrize("fault", matrix.ANSWERS)
def test_wrong_answers_are_told_apart(engine: Engine, fault: str) -> None:
    engine.start(fault=fault)
    engine.ready()
    assert engine.verify()["failure"] == matrix.ANSWERS[fault][0]


#: What the engine does wrong, the check that is to find it, and words of what it saw.
WRONG = {
    "garbled-context": ("needle", "not found at 25, 50 and 90 % of 2,"),
    "lost-context": ("needle", "not found at 90 % of 2,"),
    "wrong-in-batch": ("concurrency", 'expected "Paris" in the answer, got "The capital of France is Rome."'),
    "schema-ignored": ("json_schema", "not of the schema, which has "),
    "tool-call-unparsed": ("tool_call", "no tool was called; the answer is "),
    "tool-result-ignored": ("tool_call", "the answer is "),
    "reasoning-in-content": ("reasoning", "thoughts are in the answer (<think>): "),
    "image-misread": ("image", "the picture shows "),
    "embeddings-shuffled": ("embeddings", " is closer to "),
    "rerank-reversed": ("rerank", "expected falling scores from the best document to the worst, got "),
    "label-wrong": ("classify", 'expected "Paris" for "What is the capital of France? '),
}


def test_a_right_engine_passes_every_kind(engine: Engine) -> None:
    engine.start("--max-model-len", "8192")
    engine.ready()
    result = engine.verify(kinds=list(KINDS))
    assert result["verified"] is True, result
    details = {check["name"]: check["detail"] for check in result["checks"]}
    assert [name for name in details if name in KINDS] == list(KINDS)
    found = re.fullmatch(r"at 25, 50 and 90 % of ([\d,]+) tokens; 8,192 are served", details["needle"])
    assert found and 7200 < int(found[1].replace(",", "")) < 8192 - 96


@pytest.mark.parametrize("fault", WRONG)
def test_a_kind_fails_where_an_engine_is_wrong_in_just_that(engine: Engine, fault: str) -> None:
    kind, words = WRONG[fault]
    engine.start("--max-model-len", "8192", fault=fault)
    engine.ready()
    result = engine.verify(kinds=list(KINDS))
    bad = {check["name"]: check for check in result["checks"] if not check["ok"]}
    assert [*bad] == [kind]
    assert words in bad[kind]["detail"]
    assert result["failure"] == bad[kind]["failure"] == f"verify-{kind.replace('_', '-')}"
    assert result["answer"] == "The capital of France is Paris."


def test_what_it_does_wrong_is_tested() -> None:
    text = VLLM.read_text(encoding="utf-8")
    listed = re.findall(r'^    "([a-z-]+)": "', text.split("WRONG = {")[1].split("}")[0], re.MULTILINE)
    assert listed == [*WRONG]


def test_a_wedge_answers_health_and_nothing_else_moves(engine: Engine) -> None:
    engine.start()
    engine.ready()
    engine.command.write_text("engine-wedged once")
    before = engine.client.get("/metrics").text
    with pytest.raises(HttpError):
        Client(engine.client.url, 0.5).post("/v1/completions", {"model": MODEL, "prompt": "1", "max_tokens": 1})
    assert engine.client.get("/health").status == 200
    assert engine.client.get("/metrics").text == before


def test_once_is_once(engine: Engine) -> None:
    engine.command.write_text("crash once")
    engine.start()
    engine.ready()
    assert not engine.command.exists()


def test_the_page_of_the_matrix_has_its_rows() -> None:
    page = (ROOT / "docs" / "fault-matrix.md").read_text(encoding="utf-8").splitlines()
    reported = [line.split(" | ")[0].removeprefix("| ") for line in page if line.startswith("| ")][2:]
    names = [f"{row.name} (new)" if row.new else row.name for row in matrix.rows()]
    assert reported == names


def test_a_row_that_did_not_hold_leaves_its_line_on_the_page() -> None:
    first, second, third = matrix.rows()[:3]
    page = matrix.markdown([matrix.Outcome(row, "spark-1", 1.0) for row in (first, second)])
    again = [matrix.Outcome(second, "spark-1", 1.0, problem="no"), matrix.Outcome(third, "spark-1", 1.0, gone=9.0)]
    lines = matrix.markdown(again, page).splitlines()[-3:]
    assert [line.split(" | ")[0] for line in lines] == [f"| {row.name}" for row in (first, second, third)]
    assert lines[:2] == page.splitlines()[-2:] and lines[2].endswith("| 9.0 s |")


def test_what_the_matrix_names_is_in_the_table() -> None:
    for row in matrix.rows():
        assert not row.diagnosis or row.diagnosis in failures.BY_ID, row.name
        named = [words.strip("[]") for words in row.sees if words.startswith("[") and words.endswith("]")]
        assert all(name in failures.BY_ID for name in named), row.name


def test_an_engine_over_three_hosts_answers_only_with_all_of_them(tmp_path: Path) -> None:
    """As vLLM's: workers wait for rank 0, health stays 200 when one is gone, and requests hang."""
    head = Engine(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        master = str(free.getsockname()[1])
    ranks = ["--nnodes", "3", "--master-addr", "127.0.0.1", "--master-port", master]
    others = [Engine(tmp_path).start(*ranks, "--node-rank", str(rank), "--headless") for rank in (1, 2)]
    first = head.start(*ranks, "--node-rank", "0", "--port", str(head.port))
    try:
        head.ready()
        assert head.verify()["verified"]
        others[1].kill()
        others[1].wait(5)
        assert head.client.get("/health").status == 200
        with pytest.raises(HttpError, match="no answer"):
            head.client.post("/v1/completions", {"model": MODEL, "prompt": "1", "max_tokens": 1}, 1)
        first.kill()
        assert others[0].wait(5) == 1  # it ends with rank 0
    finally:
        for process in (first, *others):
            process.kill()
            process.communicate()
