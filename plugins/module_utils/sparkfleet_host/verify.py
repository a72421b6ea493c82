# SPDX-License-Identifier: Apache-2.0
"""Proof that an endpoint answers: questions with known answers, a complete stream, counters that move."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from . import metrics
from .bounded import BoundsError, as_dict, as_int, as_list, as_str, parse_json, printable
from .http import Answer, HttpError, engine_client

PROBE_TIMEOUT = 10.0  # seconds for what needs no model
COUNTERS_WAIT = 3.0  # seconds until counters have moved; vLLM updates them just after an answer
COUNTERS = ("generation_tokens", "prompt_tokens", "request_success")
PATHS = ("/v1/models", "/v1/chat/completions", "/v1/completions")
ASKED = ("url", "model", "question", "expect", "prompt", "prompt_expect")
STOP = ["\n"]
SHOWN = 4000  # characters of an answer that are kept
TOKENS = 1 << 40  # more than that is not a count
ANSWERED = 16  # tokens that an engine with dummy weights is to generate
PROMPT = list(range(100, 132))  # tokens that every vocabulary has


class CheckError(Exception):
    """A check failed; `id` is an entry in the table of failures."""

    def __init__(self, id: str, message: str) -> None:
        super().__init__(message)
        self.id = id


def words(text: str) -> str:
    """Text on one line, shortened, in quotes."""
    flat = printable(" ".join(text[:1000].split()))
    return json.dumps(flat if len(flat) <= 120 else f"{flat[:117]}...", ensure_ascii=False)


def check_answer(text: str, expect: str) -> None:
    """Raises CheckError unless the text contains what is expected, as whole words."""
    # Thoughts are not an answer; unfinished ones are all there is.
    answer = re.sub(r"<think>.*?(?:</think>|\Z)", "", text, flags=re.DOTALL).strip()
    if not answer:
        raise CheckError("answer-degenerate", "the answer is empty" + (" but for thoughts" if text.strip() else ""))
    parts = answer.split()
    if (len(parts) >= 4 and len(set(parts)) == 1) or (len(answer) >= 8 and len(set(answer)) == 1):
        raise CheckError("answer-degenerate", f"the answer is one token over and over: {words(answer)}")
    if not re.search(rf"(?<!\w){re.escape(expect)}(?!\w)", answer, re.IGNORECASE):
        raise CheckError(
            "answer-wrong", f"expected {json.dumps(expect, ensure_ascii=False)} in the answer, got {words(answer)}"
        )


def refusal(answer: Answer) -> str:
    """What an engine answers with an error status."""
    try:
        data = answer.json()
        error = data.get("error", data) if isinstance(data, dict) else data
        message = error.get("message", error) if isinstance(error, dict) else error
    except HttpError:
        message = answer.text
    return f"HTTP {answer.status}: {printable(' '.join(str(message)[:1000].split()), 200)}"


def counters(text: str) -> dict[str, float]:
    """The counters of COUNTERS, summed over their label sets, from Prometheus text."""
    return metrics.sums(text, COUNTERS)


class Verification:
    """The checks of one endpoint. `run` does them, concurrently where possible; the rest are its results."""

    def __init__(self, params: dict[str, Any]) -> None:
        self.params = params
        self.client = engine_client(params["url"], params["timeout"])
        self.verify_id = f"sparkfleet-{secrets.token_hex(6)}"
        self.seed = int(self.verify_id[-6:], 16)
        self.answer = self.completion = ""
        self.ttft_ms: float | None = None
        self.tokens_per_second: float | None = None
        self.usage = {"prompt_tokens": 0, "completion_tokens": 0}
        self.checks: list[dict[str, Any]] = []

    def run(self) -> None:
        """Run all checks; `checks` has them in a fixed order."""
        with ThreadPoolExecutor(max_workers=7) as pool:
            before = pool.submit(self._counters)
            probes = {
                "health": pool.submit(self._timed, self.health),
                "models": pool.submit(self._timed, self.models),
            }
            api = pool.submit(self._timed, self.openapi)
            try:
                start: dict[str, float] | CheckError = before.result()
            except CheckError as error:
                start = error
            # Nothing is there: no need to ask seven times.
            down = probes["health"].result()
            if down["failure"] == "endpoint-down":
                self.checks = [{"name": "health", **down}]
                return
            asked: dict[str, Future[dict[str, Any]]] = {
                "chat": pool.submit(self._timed, self.chat),
                "completion": pool.submit(self._timed, self.complete),
                "stream": pool.submit(self._timed, self.stream),
            }
            done = {name: future.result() for name, future in {**probes, **asked}.items()}
            done["metrics"] = self._timed(lambda: self.metrics(start))
            done["openapi"] = api.result()
        self.checks = [{"name": name, **check} for name, check in done.items()]
        for check in self.checks:
            if check["failure"] == "timeout":
                check["failure"] = "engine-wedged" if down["ok"] else "endpoint-down"
                check["detail"] += "; /health is 200 all the same" if down["ok"] else ""

    def _timed(self, check: Callable[[], str]) -> dict[str, Any]:
        began = time.monotonic()
        ok, failure = True, ""
        try:
            detail = check()
        except CheckError as error:
            ok, failure, detail = False, error.id, str(error)
        except HttpError as error:
            kinds = {
                **{"refused": "endpoint-down", "address": "endpoint-down", "timeout": "timeout"},
                **{"malformed": "answer-malformed"},
            }
            ok, failure, detail = False, kinds.get(error.kind, "request-refused"), str(error)
        except BoundsError as error:
            ok, failure, detail = False, "answer-malformed", str(error)
        return {"ok": ok, "detail": detail, "seconds": round(time.monotonic() - began, 3), "failure": failure}

    # -- without the model -----------------------------------------------------------------------------------

    def health(self) -> str:
        """/health answers 200."""
        answer = self.client.get("/health", PROBE_TIMEOUT)
        if answer.status != 200:
            raise CheckError("endpoint-down", f"expected 200 from /health, got {refusal(answer)}")
        return "200"

    def models(self) -> str:
        """/v1/models lists the model."""
        answer = self.client.get("/v1/models", PROBE_TIMEOUT)
        if answer.status != 200:
            raise CheckError("request-refused", refusal(answer))
        entries = as_list(as_dict(answer.json(), "/v1/models").get("data"), "data of /v1/models", 1000)
        names = [str(entry.get("id")) for entry in entries if isinstance(entry, dict)]
        if self.params["model"] not in names:
            served = printable(", ".join(names), 200) or "no model"
            raise CheckError("model-not-served", f"expected {self.params['model']}, the endpoint serves {served}")
        return str(self.params["model"])

    def openapi(self) -> str:
        """/openapi.json names the paths that clients use."""
        answer = self.client.get("/openapi.json", PROBE_TIMEOUT)
        if answer.status != 200:
            raise CheckError("api-incomplete", refusal(answer))
        paths = as_dict(as_dict(answer.json(), "/openapi.json").get("paths"), "paths of /openapi.json")
        missing = [path for path in PATHS if path not in paths]
        if missing:
            raise CheckError("api-incomplete", f"/openapi.json does not name {', '.join(missing)}")
        return f"{len(paths)} paths"

    # -- with the model --------------------------------------------------------------------------------------

    def _headers(self, name: str) -> dict[str, str]:
        return {"X-Request-Id": f"{self.verify_id}-{name}"}

    def _body(self, **more: Any) -> dict[str, Any]:
        return {
            "model": self.params["model"],
            "temperature": 0,
            "seed": self.seed,
            "max_tokens": self.params["max_tokens"],
            **more,
        }

    def _chat_body(self, **more: Any) -> dict[str, Any]:
        body = self._body(messages=[{"role": "user", "content": self.params["question"]}], **more)
        if self.params["chat_template_kwargs"]:
            body["chat_template_kwargs"] = self.params["chat_template_kwargs"]
        return body

    def _ask(self, path: str, body: dict[str, Any], name: str) -> dict[str, Any]:
        answer = self.client.post(path, body, headers=self._headers(name))
        if answer.status == 400 and "chat_template" in answer.text and "chat_template_kwargs" in body:
            del body["chat_template_kwargs"]  # Mistral's own tokenizer accepts none
            answer = self.client.post(path, body, headers=self._headers(name))
        if answer.status != 200:
            raise CheckError("request-refused", refusal(answer))
        data = as_dict(answer.json(), f"the answer of {path}")
        choices = as_list(data.get("choices"), f"choices of {path}", 100)
        if not choices:
            raise CheckError("answer-malformed", f"an answer without choices: {words(answer.text)}")
        self._count(data.get("usage"))
        return as_dict(choices[0], f"the choice of {path}")

    def _count(self, usage: Any) -> int:
        """Add the tokens of an answer to `usage`; those of the answer itself. Raises BoundsError."""
        counted = {} if usage is None else as_dict(usage, "usage")
        tokens = {key: as_int(counted.get(key) or 0, f"usage.{key}", most=TOKENS) for key in self.usage}
        for key, count in tokens.items():
            self.usage[key] += count
        return tokens["completion_tokens"]

    def chat(self) -> str:
        """/v1/chat/completions gives the expected answer."""
        choice = self._ask("/v1/chat/completions", self._chat_body(), "chat")
        message = as_dict(choice.get("message"), "message")
        content = as_str(message.get("content") or "", "message.content").strip()
        self.answer = content[:SHOWN]
        check_answer(content, self.params["expect"])
        return words(content)

    def complete(self) -> str:
        """/v1/completions continues as expected."""
        body = self._body(prompt=self.params["prompt"], stop=STOP)
        body["max_tokens"] = min(self.params["max_tokens"], 12)
        text = as_str(self._ask("/v1/completions", body, "completion").get("text") or "", "text").strip()
        self.completion = text[:SHOWN]
        check_answer(text, self.params["prompt_expect"])
        return words(text)

    def stream(self) -> str:
        """A streamed chat is a well-formed event stream that ends in [DONE] and holds the expected answer."""
        body = self._chat_body(stream=True, stream_options={"include_usage": True})
        reader = StreamReader()
        began = time.monotonic()
        for _ in range(2):
            with self.client.stream("/v1/chat/completions", body, headers=self._headers("stream")) as stream:
                if stream.status != 200:
                    answer = stream.answer()
                    if (
                        answer.status == 400
                        and "chat_template" in answer.text
                        and body.pop("chat_template_kwargs", None)
                    ):
                        began = time.monotonic()
                        continue
                    raise CheckError("request-refused", refusal(answer))
                if stream.content_type != "text/event-stream":
                    raise CheckError(
                        "stream-broken", f"expected text/event-stream, got {stream.content_type or 'nothing'}"
                    )
                try:
                    for event in stream.events():
                        reader.take(event)
                except HttpError as error:
                    if error.kind == "timeout":
                        raise
                    raise CheckError("stream-broken", f"{error} ({reader.so_far()})") from error
            break
        reader.end()
        tokens = self._count(reader.usage) or reader.events
        check_answer(reader.text, self.params["expect"])
        if reader.first is not None and reader.last is not None:
            self.ttft_ms = round((reader.first - began) * 1000, 1)
            if tokens > 1 and reader.last > reader.first:
                self.tokens_per_second = round((tokens - 1) / (reader.last - reader.first), 2)
        return f"{reader.events} events, [DONE]" + (f", first text after {self.ttft_ms:.0f} ms" if self.ttft_ms else "")

    # -- counters --------------------------------------------------------------------------------------------

    def _counters(self) -> dict[str, float]:
        try:
            answer = self.client.get("/metrics", PROBE_TIMEOUT, metrics.LIMIT)
        except HttpError as error:
            raise CheckError("counters-still", str(error)) from error
        if answer.status != 200:
            raise CheckError("counters-still", f"/metrics: {refusal(answer)}")
        return counters(answer.text)

    def metrics(self, before: dict[str, float] | CheckError) -> str:
        """The counters moved between two readings."""
        if isinstance(before, CheckError):
            raise before
        # With no request answered there is nothing to wait for.
        deadline = time.monotonic() + (COUNTERS_WAIT if self.usage["completion_tokens"] else 0.0)
        while True:
            now = self._counters()
            grown = {name: now.get(name, 0.0) - before.get(name, 0.0) for name in COUNTERS}
            still = [name for name, by in grown.items() if by <= 0]
            if not still:
                return (
                    f"+{grown['generation_tokens']:.0f} tokens out, +{grown['prompt_tokens']:.0f} in, "
                    f"+{grown['request_success']:.0f} requests"
                )
            if time.monotonic() >= deadline:
                named = ", ".join(f"vllm:{name}_total{'' if name in now else ' (absent)'}" for name in still)
                raise CheckError("counters-still", f"did not move: {named}")
            time.sleep(0.05)


class StreamReader:
    """Checks the events of a streamed chat one by one. Raises CheckError (stream-broken, request-refused)."""

    def __init__(self) -> None:
        self.text = ""
        self.events = 0  # with text
        self.first: float | None = None  # monotonic times of first and last text
        self.last: float | None = None
        self.usage: Any = None
        self._id = ""
        self._role = False
        self._finish = ""
        self._done = False

    def so_far(self) -> str:
        """How far the stream got."""
        return f"after {self.events} events, text so far {words(self.text)}"

    def take(self, data: str) -> None:
        """The data of one event."""
        if self._done:
            raise CheckError("stream-broken", f"an event after [DONE]: {words(data)}")
        if data.strip() == "[DONE]":
            self._done = True
            return
        try:
            chunk = parse_json(data, "an event")
        except BoundsError:
            raise CheckError("stream-broken", f"an event that is not JSON: {words(data)} ({self.so_far()})") from None
        if not isinstance(chunk, dict):
            raise CheckError("stream-broken", f"an event that is not an object: {words(data)}")
        if "error" in chunk:
            raise CheckError("request-refused", f"an error within the stream: {words(json.dumps(chunk['error']))}")
        if chunk.get("object") != "chat.completion.chunk" or not isinstance(chunk.get("choices"), list):
            raise CheckError("stream-broken", f"an event that is not a chat.completion.chunk: {words(data)}")
        if not chunk.get("id") or (self._id and chunk["id"] != self._id):
            got = printable(str(chunk.get("id")), 80)
            raise CheckError("stream-broken", f"expected the id {self._id or 'of the stream'}, got {got}")
        if not isinstance(chunk["id"], str):
            raise CheckError("stream-broken", f"an id that is not a string: {words(str(chunk['id']))}")
        self._id = chunk["id"]
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk["choices"]:
            self._choice(choice if isinstance(choice, dict) else {})

    def _choice(self, choice: dict[str, Any]) -> None:
        delta = choice.get("delta")
        if not isinstance(delta, dict):
            raise CheckError("stream-broken", f"a choice without delta: {words(json.dumps(choice))}")
        self._role = self._role or delta.get("role") == "assistant"
        text = delta.get("content") or ""
        if not isinstance(text, str):
            raise CheckError("stream-broken", f"content that is not a string: {words(json.dumps(text))}")
        if self._finish and text:
            raise CheckError("stream-broken", f"text after finish_reason: {words(text)}")
        if text:
            self.last = time.monotonic()
            self.first = self.first or self.last
            self.text += text
            self.events += 1
        self._finish = str(choice.get("finish_reason") or self._finish)

    def end(self) -> None:
        """The stream is over: was it complete?"""
        if not self._done:
            raise CheckError("stream-broken", f"the stream ended without [DONE], {self.so_far()}")
        if not self._finish:
            raise CheckError("stream-broken", f"no finish_reason, {self.so_far()}")
        if not self._role:
            raise CheckError("stream-broken", 'no delta with the role "assistant"')


def verify(params: dict[str, Any]) -> dict[str, Any]:
    """Ask, and assess the answers: the result of the module `vllm_verify`, with `msg` and `failure` unless `verified`.

    Of `params` (the module's options) all but ASKED, `timeout` (seconds), `max_tokens` and `chat_template_kwargs` are
    ignored. Raises HttpError for an address that is none.
    """
    began = time.monotonic()
    verification = Verification(params)
    verification.run()
    return _result(params, verification, began)


def _result(params: dict[str, Any], verification: Verification, began: float) -> dict[str, Any]:
    bad = next((check for check in verification.checks if not check["ok"]), None)
    result = {
        "verified": bad is None,
        "asked": {key: params[key] for key in ASKED},
        "checks": verification.checks,
        "answer": verification.answer,
        "completion": verification.completion,
        "ttft_ms": verification.ttft_ms,
        "tokens_per_second": verification.tokens_per_second,
        "usage": verification.usage,
        "verify_id": verification.verify_id,
        "seconds": round(time.monotonic() - began, 3),
    }
    if bad is not None:
        result.update(msg=f"{bad['name']}: {bad['detail']}", failure=bad["failure"])
    return result


def answers(params: dict[str, Any], tokens: int = ANSWERED) -> dict[str, Any]:
    """Whether an engine answers at all, whatever it says, as one with dummy weights does: it is healthy, lists the
    model and generates `tokens` tokens. The same result as `verify`. Raises HttpError for an address that is none."""
    began = time.monotonic()
    verification = Verification(params)

    def complete() -> str:
        # As numbers: the tokenizer may be that of a model that nobody knows.
        body = {"model": params["model"], "prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
        verification._ask("/v1/completions", body, "completion")
        if verification.usage["completion_tokens"] != tokens:
            raise CheckError(
                "answer-malformed", f"{verification.usage['completion_tokens']} tokens instead of {tokens}"
            )
        return f"{tokens} tokens"

    steps = {"health": verification.health, "models": verification.models, "completion": complete}
    for name, step in steps.items():
        verification.checks.append({"name": name, **verification._timed(step)})
        if not verification.checks[-1]["ok"]:
            break
    return _result(params, verification, began)
