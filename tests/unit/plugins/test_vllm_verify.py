"""Verification against a server that speaks vLLM's API, well and badly."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import asking, http
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import verify as verification
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.http import Answer, Client, HttpError
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.verify import (
    CheckError,
    StreamReader,
    check_answer,
    counters,
)
from plugins.modules import vllm_verify

from sparkfleet.diagnosis.failures import BY_ID
from tests.unit.fakes.clock import set_time
from tests.unit.fakes.fake_vllm import ANSWER, MODEL, Vllm

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
    check_answer(text, "Paris")


def test_expectations_are_no_patterns() -> None:
    check_answer("It costs 3.50 $ here", "3.50 $")
    with pytest.raises(CheckError):
        check_answer("It costs 3x50", "3.50")


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


# -- in detail ---------------------------------------------------------------------------------------------------------


def refused(text: str, expect: str = "Paris") -> tuple[str, str]:
    with pytest.raises(CheckError) as caught:
        check_answer(text, expect)
    return caught.value.id, str(caught.value)


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        ("no no no", "answer-wrong"),  # three times may be meant
        ("no no no no", "answer-degenerate"),
        ("no no no yes", "answer-wrong"),
        ("!" * 7, "answer-wrong"),
        ("!" * 8, "answer-degenerate"),
        ("!" * 8 + "?", "answer-wrong"),
        ("  \n", "answer-degenerate"),
        ("<think>a</think><think>b", "answer-degenerate"),
    ],
)
def test_one_token_over_and_over(text: str, failure: str) -> None:
    assert refused(text)[0] == failure


def test_a_failure_says_whether_there_were_thoughts() -> None:
    assert refused("")[1] == "the answer is empty"
    assert refused("<think>x</think>")[1] == "the answer is empty but for thoughts"
    assert refused("Zürich", "Genève")[1] == 'expected "Genève" in the answer, got "Zürich"'


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\n b\tc", '"a b c"'),
        ("x" * 120, f'"{"x" * 120}"'),
        ("x" * 121, f'"{"x" * 117}..."'),
        (" " * 1000 + "x", '""'),
        (" " * 999 + "é", '"é"'),
        ("\x1b[31m", '"\ufffd[31m"'),
    ],
)
def test_what_is_quoted_is_one_short_line(text: str, shown: str) -> None:
    assert verification.words(text) == shown


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('{"error": {"message": "no\\n model"}}', "HTTP 404: no model"),
        ('{"error": "gone"}', "HTTP 404: gone"),
        ('{"detail": "Not Found"}', "HTTP 404: {'detail': 'Not Found'}"),
        ('{"message": "x"}', "HTTP 404: x"),
        ('["x"]', "HTTP 404: ['x']"),
        ("<html> x", "HTTP 404: <html> x"),
        ("y" * 300, f"HTTP 404: {'y' * 199}…"),
        ("", "HTTP 404: "),
        (f'"{" " * 999}ab"', "HTTP 404: a"),
    ],
)
def test_what_an_engine_says_with_an_error(body: str, said: str) -> None:
    assert verification.refusal(Answer(404, "text/html", body.encode())) == said


class Scripted:
    """The client of a `Verification`: an answer, or an error, for each path; what was asked is kept."""

    def __init__(self, **answers: Any) -> None:
        self.answers, self.asked = {f"/{path}": answer for path, answer in answers.items()}, []
        self.asked: list[tuple[Any, ...]]

    def get(self, path: str, *more: Any) -> Answer:
        self.asked.append((path, *more))
        answer = self.answers[path]
        if isinstance(answer, list):
            answer = answer.pop(0) if len(answer) > 1 else answer[0]
        if isinstance(answer, Exception):
            raise answer
        status, value = answer if isinstance(answer, tuple) else (200, answer)
        return Answer(status, "application/json", (value if isinstance(value, str) else json.dumps(value)).encode())

    def post(self, path: str, body: dict[str, Any], timeout: float | None, headers: dict[str, str]) -> Answer:
        return self.get(path, dict(body), headers)


PARAMS: dict[str, Any] = {
    **{"url": "http://127.0.0.1:9", "model": MODEL, "question": "q", "expect": "Paris", "prompt": "p"},
    **{"prompt_expect": "Paris", "timeout": 5, "max_tokens": 32, "chat_template_kwargs": None},
}


def checking(client: Scripted, **params: Any) -> verification.Verification:
    made = verification.Verification({**PARAMS, **params})
    made.client = client  # type: ignore[assignment]
    return made


def outcome(client: Scripted, path: str, **params: Any) -> tuple[bool, str, str]:
    """What a check says: ok, its failure, its detail."""
    made = checking(client, **params)
    done = made._timed(getattr(made, path))
    return done["ok"], done["failure"], done["detail"]


def test_health_in_words() -> None:
    client = Scripted(health="")
    assert outcome(client, "health") == (True, "", "200") and client.asked == [("/health", 10.0)]
    said = "expected 200 from /health, got HTTP 201: x"
    assert outcome(Scripted(health=(201, "x")), "health") == (False, "endpoint-down", said)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"data": [{"id": "a"}, 5, {"id": MODEL}]}, (True, "", MODEL)),
        ({"data": []}, (False, "model-not-served", f"expected {MODEL}, the endpoint serves no model")),
        (
            {"data": [{"id": "a"}, {"id": "b"}]},
            (False, "model-not-served", f"expected {MODEL}, the endpoint serves a, b"),
        ),
        ((500, "x"), (False, "request-refused", "HTTP 500: x")),
        ({"data": [{"id": MODEL}] * 1000}, (True, "", MODEL)),
        (
            {"data": [{"id": MODEL}] * 1001},
            (False, "answer-malformed", "data of /v1/models: more than 1000 items"),
        ),
    ],
)
def test_models_in_words(answer: Any, expected: tuple[bool, str, str]) -> None:
    client = Scripted(**{"v1/models": answer})
    assert outcome(client, "models") == expected and client.asked == [("/v1/models", 10.0)]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (
            {"paths": {path: {} for path in ("/v1/models", "/v1/chat/completions", "/v1/completions", "/x")}},
            (True, "", "4 paths"),
        ),
        (
            {"paths": {"/v1/models": {}}},
            (False, "api-incomplete", "/openapi.json does not name /v1/chat/completions, /v1/completions"),
        ),
        ((404, "x"), (False, "api-incomplete", "HTTP 404: x")),
        ({"paths": []}, (False, "answer-malformed", "paths of /openapi.json: not an object: []")),
    ],
)
def test_openapi_in_words(answer: Any, expected: tuple[bool, str, str]) -> None:
    assert outcome(Scripted(**{"openapi.json": answer}), "openapi") == expected


@pytest.mark.parametrize(
    ("kind", "failure"),
    [
        *(("refused", "endpoint-down"), ("address", "endpoint-down"), ("timeout", "timeout")),
        *(("malformed", "answer-malformed"), ("else", "request-refused")),
    ],
)
def test_what_a_client_s_error_means(kind: str, failure: str) -> None:
    assert outcome(Scripted(health=HttpError(kind, "why")), "health") == (False, failure, "why")


def test_a_check_says_how_long_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((10.0, 12.3456))
    set_time(monkeypatch, verification, asking, monotonic=lambda: next(clock))
    assert checking(Scripted(health=""))._timed(lambda: "x") == {
        **{"ok": True, "detail": "x", "seconds": 2.346, "failure": ""},
    }


def chat(text: Any = "Paris.", **more: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"content": text}, "text": text}], **more}


def test_a_chat_that_is_answered() -> None:
    client = Scripted(**{"v1/chat/completions": chat("x" * 5000 + " Paris ", usage={"prompt_tokens": 3})})
    made = checking(client, max_tokens=7)
    assert made.chat() == f'"{"x" * 117}..."' and made.answer == "x" * 4000
    assert made.usage == {"prompt_tokens": 3, "completion_tokens": 0}
    ((_, body, headers),) = client.asked
    message = {"role": "user", "content": "q"}
    assert body == {"model": MODEL, "temperature": 0, "seed": made.seed, "max_tokens": 7, "messages": [message]}
    assert headers == {"X-Request-Id": f"{made.verify_id}-chat"}
    assert made.verify_id.startswith("sparkfleet-") and made.seed == int(made.verify_id[-6:], 16)
    assert len(made.verify_id) == len("sparkfleet-") + 12


@pytest.mark.parametrize(("most", "asked"), [(32, 12), (12, 12), (5, 5)])
def test_a_completion_is_short(most: int, asked: int) -> None:
    client = Scripted(**{"v1/completions": chat(" Paris" + "x" * 5000 + " Paris")})
    made = checking(client, max_tokens=most)
    made.complete()
    assert len(made.completion) == 4000
    body = {"model": MODEL, "temperature": 0, "seed": made.seed, "max_tokens": asked, "prompt": "p", "stop": ["\n"]}
    assert client.asked == [("/v1/completions", body, {"X-Request-Id": f"{made.verify_id}-completion"})]


@pytest.mark.parametrize(
    ("answer", "failure", "said"),
    [
        (chat(None), "answer-degenerate", "the answer is empty"),
        (chat(5), "answer-malformed", "message.content: not a string: 5"),
        ({"choices": []}, "answer-malformed", 'an answer without choices: "{\\"choices\\": []}"'),
        ({"choices": [5]}, "answer-malformed", "the choice of /v1/chat/completions: not an object: 5"),
        ({"choices": [{}] * 101}, "answer-malformed", "choices of /v1/chat/completions: more than 100 items"),
        ({"choices": [{}]}, "answer-malformed", "message: not an object: None"),
        (chat(usage={"prompt_tokens": (1 << 40) + 1}), "answer-malformed", "usage.prompt_tokens: 1099511627777 is not"),
        (chat(usage=5), "answer-malformed", "usage: not an object: 5"),
        ((400, "chat_template"), "request-refused", "HTTP 400: chat_template"),
        ((201, chat()), "request-refused", "HTTP 201: "),
    ],
)
def test_a_chat_that_is_not_answered(answer: Any, failure: str, said: str) -> None:
    client = Scripted(**{"v1/chat/completions": answer})
    ok, found, detail = outcome(client, "chat")
    assert (ok, found) == (False, failure) and detail.startswith(said) and len(client.asked) == 1


def test_many_choices_and_tokens_are_still_an_answer() -> None:
    many = {"choices": chat()["choices"] * 100, "usage": {"prompt_tokens": 1 << 40, "completion_tokens": None}}
    assert outcome(Scripted(**{"v1/chat/completions": many}), "chat")[0]


@pytest.mark.parametrize(
    ("status", "text", "asked_again"),
    [(400, "chat_template is none", True), (400, "x", False), (500, "chat_template", False)],
)
def test_a_template_that_takes_nothing_is_asked_without(status: int, text: str, asked_again: bool) -> None:
    client = Scripted(**{"v1/chat/completions": [(status, text), chat()]})
    kwargs = {"enable_thinking": False}
    ok, _, _ = outcome(client, "chat", chat_template_kwargs=kwargs)
    assert ok is asked_again and ["chat_template_kwargs" in body for _, body, _ in client.asked] == (
        [True, False] if asked_again else [True]
    )
    assert client.asked[0][2] == client.asked[-1][2]


def page(generated: float, prompt: float = 5, success: float = 1) -> str:
    names = {"generation_tokens": generated, "prompt_tokens": prompt, "request_success": success}
    return "".join(f"vllm:{name}_total {value}\n" for name, value in names.items())


class Clock:
    """Time that passes in sleep alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        set_time(monkeypatch, verification, asking, monotonic=lambda: self.now, sleep=self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now = round(self.now + seconds, 6)


def test_counters_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, client = Clock(monkeypatch), Scripted(metrics=[page(1), page(1), page(1), page(9, 8, 3)])
    made = checking(client)
    made.usage["completion_tokens"] = 1
    assert made.metrics(made._counters()) == "+8 tokens out, +3 in, +2 requests" and clock.now == 100.1
    assert client.asked[0] == ("/metrics", 10.0, 8 << 20)


@pytest.mark.parametrize(("tokens", "seconds"), [(0, 0.0), (1, 3.0)])
def test_counters_are_waited_for_where_something_was_answered(
    monkeypatch: pytest.MonkeyPatch, tokens: int, seconds: float
) -> None:
    clock, made = Clock(monkeypatch), checking(Scripted(metrics=page(5)))
    made.usage["completion_tokens"] = tokens
    with pytest.raises(
        CheckError, match="did not move: vllm:generation_tokens_total, vllm:prompt_tokens_total, vllm:r"
    ):
        made.metrics({"generation_tokens": 5.0, "prompt_tokens": 6.0, "request_success": 1.0})
    assert clock.now - 100 == pytest.approx(seconds)
    with pytest.raises(CheckError) as caught:
        checking(Scripted(metrics="vllm:prompt_tokens_total 1\n")).metrics({})
    assert (
        str(caught.value) == "did not move: vllm:generation_tokens_total (absent), vllm:request_success_total (absent)"
    )


def test_counters_that_could_not_be_read_before() -> None:
    made = checking(Scripted(metrics=HttpError("timeout", "late")))
    with pytest.raises(CheckError, match="late") as caught:
        made._counters()
    assert caught.value.id == "counters-still"
    with pytest.raises(CheckError, match="late"):  # whatever can be read after
        checking(Scripted(metrics=page(1))).metrics(caught.value)
    with pytest.raises(CheckError, match="/metrics: HTTP 404: x"):
        checking(Scripted(metrics=(404, "x")))._counters()


# -- the stream ------------------------------------------------------------------------------------------------------


def event(text: Any = None, finish: str | None = None, **more: Any) -> str:
    choice = {"delta": {} if text is None else {"content": text}, "finish_reason": finish}
    return json.dumps({"id": "a", "object": "chat.completion.chunk", "choices": [choice], **more})


ROLE = json.dumps({"id": "a", "object": "chat.completion.chunk", "choices": [{"delta": {"role": "assistant"}}]})


@pytest.mark.parametrize(
    ("events", "failure", "said"),
    [
        (["[DONE]", " x"], "stream-broken", 'an event after [DONE]: "x"'),
        ([event("a"), "{"], "stream-broken", 'an event that is not JSON: "{" (after 1 events, text so far "a")'),
        (["5"], "stream-broken", 'an event that is not an object: "5"'),
        (['{"error": "dead"}'], "request-refused", 'an error within the stream: "\\"dead\\""'),
        ([event(object="x")], "stream-broken", "an event that is not a chat.completion.chunk: "),
        ([event(choices={})], "stream-broken", "an event that is not a chat.completion.chunk: "),
        ([event(id="")], "stream-broken", "expected the id of the stream, got "),
        ([event(), event(id="b")], "stream-broken", "expected the id a, got b"),
        ([event(id=5)], "stream-broken", 'an id that is not a string: "5"'),
        ([event(choices=[5])], "stream-broken", 'a choice without delta: "{}"'),
        ([event(choices=[{"delta": None}])], "stream-broken", "a choice without delta: "),
        ([event(5)], "stream-broken", 'content that is not a string: "5"'),
        ([event("a", "stop"), event("b")], "stream-broken", 'text after finish_reason: "b"'),
    ],
)
def test_events_that_break_a_stream(events: list[str], failure: str, said: str) -> None:
    reader = StreamReader()
    for data in events[:-1]:
        reader.take(data)
    with pytest.raises(CheckError) as caught:
        reader.take(events[-1])
    assert caught.value.id == failure and str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("events", "said"),
    [
        ([ROLE, event("a", "stop")], 'the stream ended without [DONE], after 1 events, text so far "a"'),
        ([ROLE, event("a"), "[DONE]"], 'no finish_reason, after 1 events, text so far "a"'),
        ([event("a", "stop"), "[DONE]"], 'no delta with the role "assistant"'),
    ],
)
def test_streams_that_are_not_whole(events: list[str], said: str) -> None:
    reader = StreamReader()
    for data in events:
        reader.take(data)
    with pytest.raises(CheckError) as caught:
        reader.end()
    assert (caught.value.id, str(caught.value)) == ("stream-broken", said)


def test_a_whole_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, reader = Clock(monkeypatch), StreamReader()
    for data in (ROLE, event(""), event("Pa"), event("ris"), event(None, "stop"), event(None, usage={"x": 1})):
        clock.now += 1
        reader.take(data)
    reader.take(event(choices=[]))
    reader.take(" [DONE]\n")
    reader.end()
    assert (reader.text, reader.events, reader.usage) == ("Paris", 2, {"x": 1})
    assert (reader.first, reader.last) == (103.0, 104.0)


class Streams(Scripted):
    """A client whose streams take a second an event; an event may be an error, an answer stands for no stream."""

    def __init__(self, clock: Clock, *streams: list[Any] | Answer, content_type: str = "text/event-stream") -> None:
        super().__init__()
        self.clock, self.streams, self.content_type = clock, [*streams], content_type

    def stream(self, path: str, body: dict[str, Any], timeout: float | None, headers: dict[str, str]) -> Any:
        self.asked.append((path, dict(body), headers))
        self.shown = self.streams.pop(0)
        self.status = self.shown.status if isinstance(self.shown, Answer) else 200
        return contextlib.nullcontext(self)

    def answer(self) -> Any:
        return self.shown

    def events(self) -> Iterator[str]:
        assert isinstance(self.shown, list)
        for item in self.shown:
            self.clock.now += 1
            if isinstance(item, Exception):
                raise item
            yield item


WHOLE = [ROLE, event("It is "), event("Paris"), event(None, "stop", usage={"completion_tokens": 5}), "[DONE]"]


def test_the_figures_of_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Streams(Clock(monkeypatch), WHOLE)
    made = checking(client)
    assert made.stream() == "2 events, [DONE], first text after 2000 ms"
    assert (made.ttft_ms, made.tokens_per_second, made.usage["completion_tokens"]) == (2000.0, 4.0, 5)
    ((path, body, headers),) = client.asked
    assert path == "/v1/chat/completions" and headers == {"X-Request-Id": f"{made.verify_id}-stream"}
    assert body["stream"] is True and body["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize(
    ("events", "rate"),
    [
        ([ROLE, event("Paris"), event(" it is"), event(None, "stop"), "[DONE]"], 1.0),  # by its events
        ([ROLE, event("Paris", "stop"), "[DONE]"], None),
        ([ROLE, event("Paris", "stop", usage={"completion_tokens": 5}), "[DONE]"], None),
    ],
)
def test_the_rate_of_a_stream_needs_two_tokens_and_some_time(
    monkeypatch: pytest.MonkeyPatch, events: list[str], rate: float | None
) -> None:
    made = checking(Streams(Clock(monkeypatch), events))
    made.stream()
    assert made.tokens_per_second == rate


def test_a_stream_is_timed_from_the_question_that_was_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    client = Streams(clock, Answer(400, "", b"chat_template"), WHOLE)
    answer = client.answer
    monkeypatch.setattr(client, "answer", lambda: (clock.sleep(7), answer())[1])
    made = checking(client, chat_template_kwargs={"enable_thinking": False})
    made.stream()
    assert made.ttft_ms == 2000.0
    assert ["chat_template_kwargs" in body for _, body, _ in client.asked] == [True, False]


@pytest.mark.parametrize(
    ("shown", "failure", "said"),
    [
        (Answer(400, "", b"chat_template"), "request-refused", "HTTP 400: chat_template"),
        (Answer(500, "", b"x"), "request-refused", "HTTP 500: x"),
        ([HttpError("cut", "cut short")], "stream-broken", 'cut short (after 0 events, text so far "")'),
        ([HttpError("timeout", "late")], "timeout", "late"),
        ([ROLE, event("Rome", "stop"), "[DONE]"], "answer-wrong", 'expected "Paris" in the answer, got "Rome"'),
    ],
)
def test_a_stream_that_fails(monkeypatch: pytest.MonkeyPatch, shown: Any, failure: str, said: str) -> None:
    assert outcome(Streams(Clock(monkeypatch), shown), "stream") == (False, failure, said)


@pytest.mark.parametrize(("kind", "got"), [("text/plain", "text/plain"), ("", "nothing")])
def test_a_stream_of_another_type(monkeypatch: pytest.MonkeyPatch, kind: str, got: str) -> None:
    said = f"expected text/event-stream, got {got}"
    client = Streams(Clock(monkeypatch), WHOLE, content_type=kind)
    assert outcome(client, "stream") == (False, "stream-broken", said)


# -- the whole, in process ---------------------------------------------------------------------------------------------


def test_the_result_of_a_verification(vllm: Vllm) -> None:
    result = verification.verify({**PARAMS, "url": vllm.url})
    assert result["verified"] is True and "msg" not in result and "failure" not in result
    assert result["asked"] == {key: {**PARAMS, "url": vllm.url}[key] for key in verification.ASKED}
    assert [check["name"] for check in result["checks"]] == CHECKS and 0 < result["seconds"] < 5
    vllm.faults.add("counters-still")
    vllm.answer = "Rome"
    seen = verification.COUNTERS_WAIT
    verification.COUNTERS_WAIT = 0.0
    try:
        result = verification.verify({**PARAMS, "url": vllm.url})
    finally:
        verification.COUNTERS_WAIT = seen
    assert (result["verified"], result["failure"]) == (False, "answer-wrong")  # the first of several
    assert result["msg"] == 'chat: expected "Paris" in the answer, got "Rome"' and result["answer"] == "Rome"


@pytest.mark.parametrize(("healthy", "failure"), [(True, "engine-wedged"), (False, "endpoint-down")])
def test_an_answer_that_does_not_come_in_time(monkeypatch: pytest.MonkeyPatch, healthy: bool, failure: str) -> None:
    made = checking(Scripted(metrics=page(1)))
    late = HttpError("timeout", "no answer in 5 s")

    def look() -> str:
        if not healthy:
            raise late
        return "200"

    def hang() -> str:
        raise late

    monkeypatch.setattr(made, "health", look)
    for name in ("models", "openapi", "chat", "complete", "stream"):
        monkeypatch.setattr(made, name, hang if name == "chat" else lambda: "x")
    made.run()
    checks = {check["name"]: check for check in made.checks}
    assert checks["chat"]["failure"] == failure
    assert checks["chat"]["detail"] == "no answer in 5 s" + ("; /health is 200 all the same" if healthy else "")
    assert checks["metrics"]["failure"] == "counters-still"
