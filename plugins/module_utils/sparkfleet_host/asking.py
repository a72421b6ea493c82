# SPDX-License-Identifier: Apache-2.0
"""Requests of a verification to an engine, and what an answer must be."""

from __future__ import annotations

import json
import re
import secrets
import threading
import time
from typing import Any

from .bounded import BoundsError, as_dict, as_int, as_list, parse_json, printable
from .http import Answer, Client, HttpError, engine_client

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PROBE_TIMEOUT = 10.0  # seconds for what needs no model
TOKENS = 1 << 40  # more than that is not a count


class CheckError(Exception):
    """A check failed; `id` is an entry in the table of failures."""

    def __init__(self, id: str, message: str) -> None:
        super().__init__(message)
        self.id = id


def words(text: str) -> str:
    """Text on one line, shortened, in quotes."""
    flat = printable(" ".join(text[:1000].split()))
    return json.dumps(flat if len(flat) <= 120 else f"{flat[:117]}...", ensure_ascii=False)


def spoken(text: str) -> str:
    """Text without thoughts, which are not an answer; unfinished ones are all there is."""
    return re.sub(r"<think>.*?(?:</think>|\Z)", "", text, flags=re.DOTALL).strip()


def check_answer(text: str, expect: str) -> None:
    """Raises CheckError unless the text contains what is expected, as whole words."""
    answer = spoken(text)
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


class Budget:
    """What is left of the seconds that something may take."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds; 0 once there are none."""
        return max(self._end - time.monotonic(), 0.0)


class Asker:
    """Asks one engine. `params`: url, model, timeout (seconds for an answer), max_tokens, question,
    chat_template_kwargs; verify_id, whose last six digits are the seed, of the verification that this continues.
    `usage` sums the tokens of all answers; safe across threads."""

    def __init__(self, params: dict[str, Any]) -> None:
        self.params = params
        self.client: Client = engine_client(params["url"], params["timeout"])
        self.verify_id = str(params.get("verify_id") or f"sparkfleet-{secrets.token_hex(6)}")
        self.seed = int(self.verify_id[-6:], 16)
        self.usage = {"prompt_tokens": 0, "completion_tokens": 0}
        self._lock = threading.Lock()

    def headers(self, name: str) -> dict[str, str]:
        """Those of a request; `name` tells it apart in the engine's log."""
        return {"X-Request-Id": f"{self.verify_id}-{name}"}

    def body(self, **more: Any) -> dict[str, Any]:
        """The body of a request that is to be answered in the same way each time."""
        tokens = self.params["max_tokens"]
        return {"model": self.params["model"], "temperature": 0, "seed": self.seed, "max_tokens": tokens, **more}

    def chat_body(self, content: Any = None, **more: Any) -> dict[str, Any]:
        """The same of a chat: of the question, or of another message's content."""
        message = {"role": "user", "content": self.params["question"] if content is None else content}
        body = self.body(**{"messages": [message], **more})
        if self.params["chat_template_kwargs"]:
            body.setdefault("chat_template_kwargs", self.params["chat_template_kwargs"])
        return body

    def post(self, path: str, body: dict[str, Any], name: str, timeout: float | None = None) -> dict[str, Any]:
        """The object that answers a request. Raises CheckError, HttpError, BoundsError."""
        answer = self.client.post(path, body, timeout=timeout, headers=self.headers(name))
        if answer.status == 400 and "chat_template" in answer.text and "chat_template_kwargs" in body:
            del body["chat_template_kwargs"]  # Mistral's own tokenizer accepts none
            answer = self.client.post(path, body, timeout=timeout, headers=self.headers(name))
        if answer.status != 200:
            raise CheckError("request-refused", refusal(answer))
        data = as_dict(answer.json(), f"the answer of {path}")
        self.count(data.get("usage"))
        return data

    def ask(self, path: str, body: dict[str, Any], name: str, timeout: float | None = None) -> dict[str, Any]:
        """The first choice of an answer. Raises CheckError, HttpError, BoundsError."""
        return first_choice(self.post(path, body, name, timeout), path)

    def read_stream(self, body: dict[str, Any], name: str, timeout: float | None = None) -> tuple[StreamReader, float]:
        """A streamed chat, read to its end, and when it was asked (monotonic). Raises CheckError unless it is a
        well-formed event stream, and HttpError, BoundsError."""
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        reader = StreamReader()
        began = time.monotonic()
        for _ in range(2):
            with self.client.stream(CHAT, body, timeout=timeout, headers=self.headers(name)) as stream:
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
        reader.tokens = self.count(reader.usage)["completion_tokens"] or reader.events
        return reader, began

    def served(self) -> dict[str, Any]:
        """The model's entry in /v1/models. Raises CheckError, HttpError, BoundsError."""
        answer = self.client.get("/v1/models", PROBE_TIMEOUT)
        if answer.status != 200:
            raise CheckError("request-refused", refusal(answer))
        entries = as_list(as_dict(answer.json(), "/v1/models").get("data"), "data of /v1/models", 1000)
        found = {str(entry.get("id")): entry for entry in entries if isinstance(entry, dict)}
        if self.params["model"] not in found:
            names = printable(", ".join(found), 200) or "no model"
            raise CheckError("model-not-served", f"expected {self.params['model']}, the endpoint serves {names}")
        return found[self.params["model"]]

    def count(self, usage: Any) -> dict[str, int]:
        """Add the tokens of an answer to `usage`; those of the answer itself. Raises BoundsError."""
        tokens = counted(usage)
        with self._lock:
            for key, count in tokens.items():
                self.usage[key] += count
        return tokens


def counted(usage: Any) -> dict[str, int]:
    """prompt_tokens and completion_tokens as an answer counts them, 0 for none. Raises BoundsError."""
    found = {} if usage is None else as_dict(usage, "usage")
    keys = ("prompt_tokens", "completion_tokens")
    return {key: as_int(found.get(key) or 0, f"usage.{key}", most=TOKENS) for key in keys}


def first_choice(data: dict[str, Any], path: str) -> dict[str, Any]:
    """The first choice of an answer. Raises CheckError, BoundsError."""
    choices = as_list(data.get("choices"), f"choices of {path}", 100)
    if not choices:
        raise CheckError("answer-malformed", f"an answer without choices: {words(json.dumps(data))}")
    return as_dict(choices[0], f"the choice of {path}")


class StreamReader:
    """Checks the events of a streamed chat one by one. Raises CheckError (stream-broken, request-refused)."""

    def __init__(self) -> None:
        self.text = ""
        self.events = 0  # with text
        self.first: float | None = None  # monotonic times of first and last text
        self.last: float | None = None
        self.usage: Any = None
        self.tokens = 0  # of the answer
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
