"""What the action makes of a verification: its table, its advice, its report; and once through ansible-playbook."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from plugins.action.vllm_verify import advice, proved, record, save, table
from sparkfleet_host.http import Client, HttpError

from tests.unit import ROOT
from tests.unit.fakes.fake_vllm import MODEL, Vllm


def test_table_is_aligned() -> None:
    checks = [
        {"name": "health", "ok": True, "detail": "200", "seconds": 0.002},
        {"name": "completion", "ok": False, "detail": "x" * 200, "seconds": 12.3456},
    ]
    asked = {"model": "m", "url": "u", "question": "Q?"}
    lines = table("spark-1", {"asked": asked, "checks": checks, "answer": "A\nB"}).split("\n")
    assert lines[0] == "spark-1  m at u"
    assert len({len(line) for line in lines[1:4]}) == 1 and len(lines[1]) < 100
    assert lines[3].split()[:2] == ["completion", "FAILED"] and lines[3].endswith("12.35 s")
    assert lines[4:] == ["  question: Q?", "  answer:   A B"]


def test_advice_names_cause_remedy_and_entry() -> None:
    text = advice("engine-wedged")
    assert "docker compose restart" in text and text.endswith("[engine-wedged]")
    assert advice("") == advice("no such entry") == ""


def test_report_is_written_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "spark-1.json"
    save(path, record("spark-1", {"asked": {"url": "u", "model": "m"}, "verified": True, "changed": False}))
    data = json.loads(path.read_text(encoding="utf-8"))
    assert (data["host"], data["url"], data["model"], data["verified"]) == ("spark-1", "u", "m", True)
    assert data["time"].endswith("+00:00") and "changed" not in data
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [entry.name for entry in path.parent.iterdir()] == ["spark-1.json"]


def test_report_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Exception, match=r"report .*file/x\.json on this machine"):
        save(tmp_path / "file" / "x.json", {})


@pytest.mark.parametrize(("good", "check"), [(True, False), (False, False), (True, True)])
def test_through_ansible_playbook(vllm: Vllm, tmp_path: Path, good: bool, check: bool) -> None:
    if not good:
        vllm.answer = "Berlin."
    report = tmp_path / "out" / "spark-1.json"
    task = {"sparkfleet.dgx.vllm_verify": {"url": vllm.url, "model": MODEL, "report": str(report)}}
    play = {"hosts": "all", "gather_facts": False, "connection": "local", "tasks": [task]}
    play["vars"] = {"ansible_python_interpreter": sys.executable}
    book = tmp_path / "play.json"
    book.write_text(json.dumps([play]), encoding="utf-8")
    command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", "spark-1,", str(book)]
    command += ["--check"] if check else []
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        cwd=ROOT,
    )
    assert run.returncode == (0 if good else 2), run.stdout + run.stderr
    assert "  chat        " in run.stdout and "  question: What is the capital of France?" in run.stdout
    assert report.exists() is not check
    if not check:
        assert json.loads(report.read_text(encoding="utf-8"))["verified"] is good
    if good:
        assert "changed=0" in run.stdout
    else:
        assert 'spark-1 is not verified: chat: expected "Paris" in the answer, got "Berlin."' in run.stdout
        assert "[answer-wrong]" in run.stdout and "Traceback" not in run.stdout + run.stderr


def test_half_of_a_surrogate_pair_is_saved(tmp_path: Path) -> None:
    save(tmp_path / "r.json", {"answer": "Paris \ud800"})
    assert json.loads((tmp_path / "r.json").read_text(encoding="utf-8")) == {"answer": "Paris \ud800"}
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_the_report_has_what_was_measured(vllm: Vllm, tmp_path: Path) -> None:
    """Of this run's start, or as the host keeps it; what is no record is left out."""
    verify = {"question": "What is the capital of France? Answer in one short sentence.", "expect": "Paris"}
    verify |= {"prompt": "The capital of France is", "prompt_expect": "Paris"}
    known = {"service": "vllm-m", "repo": MODEL, "image": "i", "at": 5.0, "figures": {"kv_cache_gib": 90.0}}
    engine = {"service": "vllm-m", "repo": MODEL, "port": int(vllm.url.rpartition(":")[2]), "verify": verify}
    cases = {
        "kept": ({**engine, "measured": known}, {}, 90.0),
        "started": ({**engine, "measured": known}, {"vllm-m": {**known, "figures": {"kv_cache_gib": 91.0}}}, 91.0),
        "odd": ({**engine, "measured": {"at": "soon"}}, {}, None),
    }
    tasks = [
        {
            "sparkfleet.dgx.vllm_verify": {
                **{"model": MODEL, "engines": [given], "measured": measured},
                "report": str(tmp_path / f"{name}.json"),
            }
        }
        for name, (given, measured, _) in cases.items()
    ]
    code, out = run_tasks(tmp_path, *tasks)
    assert code == 0, out
    for name, (_, _, gib) in cases.items():
        found = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8")).get("measured")
        assert (found["figures"]["kv_cache_gib"] if found else None) == gib


# -- in depth --------------------------------------------------------------------------------------------------------

QUESTIONS = {"question": "What is the capital of France? Answer in one short sentence.", "expect": "Paris"}
PROMPTS = {"prompt": "The capital of France is", "prompt_expect": "Paris"}
KINDS = ["chat", "completion", "stream", "concurrency", "json_schema", "tool_call", "needle"]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[str], int]]:
    """Start the engine that fails on command; its port."""
    with contextlib.ExitStack() as stack:

        def start(fault: str) -> int:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = int(free.getsockname()[1])
            environment = {**os.environ, "SIMULATED_FAULT": fault, "SIMULATED_LOAD_SECONDS": "0"}
            environment |= {"SIMULATED_PORT": str(port), "SIMULATED_COMMAND": str(tmp_path / "command")}
            argv = [sys.executable, str(ROOT / "simulator" / "fault_engine" / "vllm"), "serve", MODEL]
            argv += ["--max-model-len", "4096"]
            process = stack.enter_context(subprocess.Popen(argv, env=environment, stdout=subprocess.DEVNULL))
            stack.callback(process.kill)
            for _ in range(100):
                with contextlib.suppress(HttpError):
                    if Client(f"http://127.0.0.1:{port}").get("/health").status == 200:
                        return port
                time.sleep(0.05)
            raise AssertionError("it does not get ready")

        yield start


def run_tasks(folder: Path, *tasks: dict[str, Any]) -> tuple[int, str]:
    """Run tasks through ansible-playbook: its exit code and what it printed."""
    book: dict[str, Any] = {"hosts": "all", "gather_facts": False, "connection": "local", "tasks": list(tasks)}
    book["vars"] = {"ansible_python_interpreter": sys.executable}
    (folder / "play.json").write_text(json.dumps([book]), encoding="utf-8")
    argv = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", "spark-1,", str(folder / "play.json")]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, check=False, cwd=ROOT)
    return done.returncode, done.stdout + done.stderr


def play(folder: Path, **options: Any) -> tuple[int, str]:
    """Run the action alone."""
    return run_tasks(folder, {"sparkfleet.dgx.vllm_verify": options})


def engine(port: int) -> dict[str, Any]:
    asked = {**QUESTIONS, **PROMPTS, "kinds": KINDS}
    return {"repo": MODEL, "port": port, "service": "vllm-m", "verify": asked}


def test_a_garbled_context_with_a_right_answer_is_found(serve: Callable[[str], int], tmp_path: Path) -> None:
    report = tmp_path / "r.json"
    code, out = play(tmp_path, engines=[engine(serve("garbled-context"))], mode="deep", report=str(report))
    assert code == 2 and "[verify-needle]" in out and "Traceback" not in out
    assert re.search(r"  chat +ok +\"The capital of France is Paris.\"", out)
    assert re.search(r"  needle +FAILED +not found at 25, 50 and 90 % of 2,\d+ tokens", out)
    asking = re.findall(r"spark-1  asking it: (\w+)", out)
    assert asking == ["concurrency", "json_schema", "tool_call", "needle"]
    data = json.loads(report.read_text(encoding="utf-8"))
    assert data["verified"] is False and data["failure"] == "verify-needle"
    names = [check["name"] for check in data["checks"]]
    assert names == ["health", "models", *KINDS[:3], "metrics", "openapi", *KINDS[3:]]


def test_what_a_switch_has_proved_is_shown_and_not_asked_again(serve: Callable[[str], int], tmp_path: Path) -> None:
    rows = [{"name": kind, "ok": True, "detail": "as the switch saw", "seconds": 9.0} for kind in KINDS[3:]]
    before = {"vllm-m": {"verified": True, "checks": rows}}
    # The engine would fail.
    port = serve("garbled-context")
    code, out = play(tmp_path, engines=[engine(port)], mode="deep", verified=before)
    assert code == 0 and "asking it" not in out, out
    assert len(re.findall(r"  ok +as the switch saw +9\.00 s", out)) == 4
    code, out = play(tmp_path, engines=[engine(port)], mode="quick")
    assert code == 0 and "needle" not in out, out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "deeper"}, "vllm_verify: mode: 'deeper' is neither quick nor deep"),
        ({"kinds": ["chat", "smell"]}, "vllm_verify: kinds: smell: there are chat, completion, stream, "),
        ({"budget": "long"}, "vllm_verify: budget must be a number of seconds"),
    ],
)
def test_options_that_are_none(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    code, out = play(tmp_path, model=MODEL, **options)
    assert code == 2 and words in out and "Traceback" not in out


@pytest.mark.parametrize(
    "before",
    [
        *(None, 5, {}, {"verified": True}, {"verified": True, "checks": 5}, {"verified": True, "checks": [5, None]}),
        {"verified": False, "checks": [{"name": "needle", "ok": True}]},
        {"verified": True, "checks": [{"name": "needle", "ok": "yes"}]},
        {"verified": True, "checks": [{"name": "chat", "ok": True}]},
    ],
)
def test_what_proves_nothing(before: Any) -> None:
    assert proved(before, ["needle"]) is None


def test_what_a_spark_says_of_its_proof_can_be_printed() -> None:
    check = {"name": "needle", "ok": True, "detail": "\x1b[2J", "seconds": "x"}
    found = proved({"verified": True, "checks": [check]}, ["needle"])
    assert found is not None and "\x1b" not in found["checks"][0]["detail"] and found["seconds"] == 0.0
