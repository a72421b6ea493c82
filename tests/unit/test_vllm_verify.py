"""Verification against a server that speaks vLLM's API, well and badly."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.sparkfleet_host import http
from ansible.module_utils.sparkfleet_host import verify as verification
from ansible.module_utils.sparkfleet_host.http import Client, HttpError
from ansible.module_utils.sparkfleet_host.verify import CheckError, StreamReader, counters, judge
from ansible.module_utils.testing import patch_module_args
from plugins.action.vllm_verify import advice, record, save, table
from plugins.modules import vllm_verify

from sparkfleet.failures import BY_ID
from tests.unit.fake_vllm import ANSWER, MODEL, Vllm

ROOT = Path(__file__).resolve().parents[2]
CHECKS = ["health", "models", "chat", "completion", "stream", "metrics", "openapi"]
Verify = Callable[..., dict[str, Any]]


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, vllm: Vllm) -> Verify:
    """Run the module as Ansible does."""
    monkeypatch.setattr(verification, "COUNTERS_WAIT", 0.2)

    def run(check: bool = False, **arguments: Any) -> dict[str, Any]:
        given = {"url": vllm.url, "model": MODEL, "timeout": 5, **arguments, "_ansible_check_mode": check}
        with patch_module_args(given), pytest.raises(SystemExit):
            vllm_verify.main()
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        return result

    return run


def failed(result: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["failure"] for check in result["checks"] if not check["ok"]}


def test_a_good_engine(verify: Verify, vllm: Vllm) -> None:
    began = time.monotonic()
    result = verify()
    assert time.monotonic() - began < 2
    assert result["verified"] is True and result["changed"] is False and "failed" not in result
    assert [check["name"] for check in result["checks"]] == CHECKS
    assert result["answer"] == ANSWER and result["completion"] == "Paris."
    assert result["usage"] == {"prompt_tokens": 120, "completion_tokens": 13}
    assert result["ttft_ms"] > 0 and result["tokens_per_second"] > 0
    details = {check["name"]: check["detail"] for check in result["checks"]}
    assert details["metrics"] == "+13 tokens out, +120 in, +3 requests"
    assert details["stream"].startswith("6 events, [DONE], first text after ")


def test_requests_are_short_repeatable_and_named(verify: Verify, vllm: Vllm) -> None:
    first, second = verify(), verify()
    assert first["verify_id"] != second["verify_id"]
    plain, streamed = sorted(vllm.asked("/v1/chat/completions")[:2], key=lambda body: "stream" in body)
    (completion,) = vllm.asked("/v1/completions")[:1]
    for body in (plain, streamed, completion):
        assert body["temperature"] == 0 and body["max_tokens"] <= 32 and isinstance(body["seed"], int)
    assert streamed["stream"] is True and completion["stop"] == ["\n"]
    ids = {headers["X-Request-Id"] for _, body, headers in vllm.seen if body}
    assert len(ids) == 6 and all("sparkfleet-" in id for id in ids)


def test_the_engine_is_asked_with_its_key(
    verify: Verify, vllm: Vllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "KEY_FILE", str(tmp_path / "engine_key"))
    verify()
    assert not any("Authorization" in headers for _, _, headers in vllm.seen)
    (tmp_path / "engine_key").write_text("0123456789\n", encoding="ascii")
    vllm.seen.clear()
    verify()
    assert vllm.seen and all(headers["Authorization"] == "Bearer 0123456789" for _, _, headers in vllm.seen)


def test_no_other_host_gets_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "KEY_FILE", str(tmp_path / "engine_key"))
    (tmp_path / "engine_key").write_text("0123456789\n", encoding="ascii")
    assert http.engine_client("http://192.0.2.1:8000").headers == {}
    assert http.engine_client("http://127.0.0.1:8000").headers


def test_check_mode_asks_too(verify: Verify, vllm: Vllm) -> None:
    assert verify(check=True)["verified"] is True
    assert vllm.asked("/v1/chat/completions")


@pytest.mark.parametrize(
    ("fault", "check", "failure", "words"),
    [
        ("sick", "health", "endpoint-down", "expected 200 from /health, got HTTP 503"),
        ("500", "chat", "request-refused", "HTTP 500: EngineCore encountered an issue."),
        ("no-completions", "openapi", "api-incomplete", "does not name /v1/completions"),
        ("no-metrics", "metrics", "counters-still", "/metrics: HTTP 404"),
        ("counters-still", "metrics", "counters-still", "did not move: vllm:generation_tokens_total, "),
        ("no-done", "stream", "stream-broken", "the stream ended without [DONE], after 6 events"),
        ("malformed", "stream", "stream-broken", "an event that is not JSON"),
        ("not-an-event", "stream", "stream-broken", "a line that is no event: 'Internal Server Error'"),
        ("other-id", "stream", "stream-broken", "expected the id chatcmpl-1, got other"),
        ("no-finish", "stream", "stream-broken", "no finish_reason"),
        ("no-role", "stream", "stream-broken", 'no delta with the role "assistant"'),
        ("after-done", "stream", "stream-broken", "an event after [DONE]"),
        ("content-type", "stream", "stream-broken", "expected text/event-stream, got application/json"),
        ("cut", "stream", "stream-broken", "the answer was cut short"),
        ("error-event", "stream", "request-refused", "an error within the stream"),
    ],
)
def test_bad_engines(verify: Verify, vllm: Vllm, fault: str, check: str, failure: str, words: str) -> None:
    vllm.faults.add(fault)
    result = verify()
    assert result["failed"] is True and result["verified"] is False
    assert failed(result)[check] == failure
    assert failure in BY_ID
    detail = next(item["detail"] for item in result["checks"] if item["name"] == check)
    assert words in detail
    if fault != "500":  # where one thing is wrong, one check fails and the message is its
        assert list(failed(result)) == [check]
        assert result["msg"] == f"{check}: {detail}" and result["failure"] == failure


@pytest.mark.parametrize(
    ("answer", "failure", "words"),
    [
        ("The capital of France is Berlin.", "answer-wrong", 'expected "Paris" in the answer, got "The capital'),
        ("Parisian cafés", "answer-wrong", 'expected "Paris"'),
        ("", "answer-degenerate", "the answer is empty"),
        ("<think>Paris, surely.", "answer-degenerate", "the answer is empty but for thoughts"),
        ("the the the the the", "answer-degenerate", "one token over and over"),
        ("!!!!!!!!!!!!", "answer-degenerate", "one token over and over"),
    ],
)
def test_bad_answers(verify: Verify, vllm: Vllm, answer: str, failure: str, words: str) -> None:
    vllm.answer = answer
    result = verify()
    assert result["failure"] == failure and words in result["msg"]
    assert failed(result)["chat"] == failed(result)["stream"] == failure
    assert "completion" not in failed(result)


def test_wrong_completion(verify: Verify, vllm: Vllm) -> None:
    vllm.completion = " a city"
    assert failed(verify()) == {"completion": "answer-wrong"}


def test_another_model_is_served(verify: Verify, vllm: Vllm) -> None:
    vllm.served = ["Qwen/Qwen3-8B-FP8"]
    result = verify()
    assert result["failure"] == "model-not-served"
    assert result["msg"] == f"models: expected {MODEL}, the endpoint serves Qwen/Qwen3-8B-FP8"
    assert "does not exist" in next(check["detail"] for check in result["checks"] if check["name"] == "chat")


def test_a_wedged_engine(verify: Verify, vllm: Vllm) -> None:
    vllm.faults.add("hang")
    began = time.monotonic()
    result = verify(timeout=0.4)
    assert time.monotonic() - began < 2
    assert failed(result)["chat"] == failed(result)["stream"] == "engine-wedged"
    assert result["failure"] == "engine-wedged" and "/health is 200 all the same" in result["msg"]


def test_a_stream_that_stalls(verify: Verify, vllm: Vllm) -> None:
    vllm.faults.add("stalls")
    result = verify(timeout=0.5)
    assert failed(result) == {"stream": "engine-wedged"}


def test_nobody_there(verify: Verify, vllm: Vllm) -> None:
    result = verify(url="http://127.0.0.1:9")
    assert [check["name"] for check in result["checks"]] == ["health"]
    assert result["failure"] == "endpoint-down" and "nothing listens there" in result["msg"]


def test_bad_url(verify: Verify) -> None:
    assert "is not of the form http://HOST:PORT" in verify(url="localhost:8000")["msg"]


def test_a_template_that_takes_no_arguments(verify: Verify, vllm: Vllm) -> None:
    vllm.faults.add("template")
    assert verify()["verified"] is True


def test_no_proxy_in_between(verify: Verify, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert verify()["verified"] is True


@pytest.mark.parametrize("names", ["vllm:{}_total", "vllm:{}", "ray_vllm_{}_total", "vllm:{}_total_total"])
def test_counters_by_any_of_their_names(verify: Verify, vllm: Vllm, names: str) -> None:
    vllm.names = names
    assert verify()["verified"] is True


def test_counters_are_summed_over_labels() -> None:
    text = (
        'vllm:request_success_total{finished_reason="stop",model_name="a b"} 3.0\n'
        'vllm:request_success_total{finished_reason="length",model_name="a b"} 1e+00\n'
        'vllm:request_success_created{finished_reason="stop"} 1.7e+09\n'
        "vllm:generation_tokens_total 12 1700000000\n"
        'vllm:iteration_tokens_total_bucket{le="1.0"} 9\n'
    )
    assert counters(text) == {"request_success": 4.0, "generation_tokens": 12.0}


@pytest.mark.parametrize("text", ["Paris", "it is PARIS.", "<think>Rome? no</think>\n\nParis!", "(Paris)"])
def test_answers_that_will_do(text: str) -> None:
    judge(text, "Paris")


def test_expectations_are_no_patterns() -> None:
    judge("It costs 3.50 $ here", "3.50 $")
    with pytest.raises(CheckError):
        judge("It costs 3x50", "3.50")


def test_stream_reader_wants_objects() -> None:
    for data in ('"text"', '{"id": "a", "object": "chat.completion", "choices": []}', '{"object": "x"}'):
        with pytest.raises(CheckError) as caught:
            StreamReader().take(data)
        assert caught.value.id == "stream-broken"


def test_a_slow_answer_ends_at_its_time(vllm: Vllm) -> None:
    vllm.faults.add("stalls")
    began = time.monotonic()
    with (
        pytest.raises(HttpError) as caught,
        Client(vllm.url).stream("/v1/chat/completions", {"model": MODEL, "stream": True}, timeout=0.3) as stream,
    ):
        list(stream.events())
    assert caught.value.kind == "timeout" and time.monotonic() - began < 1


# -- the action ------------------------------------------------------------------------------------------------


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
    task = {"vllm_verify": {"url": vllm.url, "model": MODEL, "report": str(report)}}
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
