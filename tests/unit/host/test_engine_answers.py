"""Engines that answer with anything: each odd answer is a failed check, none an exception, an endless read or wait."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sparkfleet_host import http as host_http
from sparkfleet_host import verify as verification
from sparkfleet_host.http import Answer, Client, HttpError, Stream
from sparkfleet_host.verify import CheckError, StreamReader, Verification, verify

from sparkfleet.diagnosis.failures import BY_ID

PARAMS = {
    **{"url": "http://127.0.0.1:1", "model": "m", "question": "q", "expect": "Paris", "prompt": "p"},
    **{"prompt_expect": "Paris", "timeout": 5.0, "max_tokens": 32, "chat_template_kwargs": {}},
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    *(
                        "data",
                        "id",
                        "paths",
                        "choices",
                        "usage",
                        "message",
                        "content",
                        "text",
                        "prompt_tokens",
                        "delta",
                    ),
                    *("completion_tokens", "error", "object", "finish_reason", "role"),
                ]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


def stream_of(body: bytes, status: int = 200, kind: str = "text/event-stream") -> Stream:
    """An answer as http.client gives it."""

    class Socket:
        def makefile(self, _mode: str) -> io.BytesIO:
            return io.BytesIO(b"HTTP/1.1 %d X\r\nContent-Type: %s\r\n\r\n%s" % (status, kind.encode(), body))

    response = http.client.HTTPResponse(Socket())  # type: ignore[arg-type]
    response.begin()
    return Stream(response, "there")


class Fake(Client):
    """Answers every request with the same."""

    def __init__(self, body: bytes, status: int = 200) -> None:
        super().__init__("http://127.0.0.1:1")
        self.answer = Answer(status, "application/json", body)

    def get(self, *_: Any, **__: Any) -> Answer:
        return self.answer

    post = get

    def stream(self, *_: Any, **__: Any) -> Stream:
        return stream_of(self.answer.body, self.answer.status)


def checks(body: bytes, status: int = 200) -> list[dict[str, Any]]:
    """The results of all checks of an engine that answers everything with `body`."""
    made = Verification(PARAMS)
    made.client = Fake(body, status)
    names: list[Callable[[], str]] = [made.models, made.openapi, made.chat, made.complete, made.stream]
    return [made._timed(check) for check in names] + [made._timed(lambda: made.metrics(made._counters()))]


ODD = [
    *(b'{"data": 5}', b'{"paths": 5}', b"[" * 200_000, b"[1]", b"5", b"null", b'"x"', b"", b"\xff\xfe", b"{", b"NaN"),
    *(b'{"choices": [1]}', b'{"choices": [{"message": 5, "text": 7}]}', b'{"choices": {"0": 1}}', b'{"choices": null}'),
    *(
        json.dumps({"choices": [{"message": {"content": "Paris"}, "text": "Paris"}], "usage": usage}).encode()
        for usage in (
            *({"prompt_tokens": "x"}, {"prompt_tokens": [1]}, {"completion_tokens": {"a": 1}}, {"prompt_tokens": True}),
            *([1], "x", {"prompt_tokens": -1}, {"prompt_tokens": 1.5}, {"prompt_tokens": 10**30}),
        )
    ),
    b'{"choices": [{"message": {"content": "Paris"}, "text": "Paris"}], "usage": {"prompt_tokens": 1e400}}',
    b'{"choices": [{"message": {"content": ["Paris"]}, "text": ["Paris"]}]}',
]


@pytest.mark.parametrize("body", ODD, ids=[str(place) for place in range(len(ODD))])
def test_an_odd_answer_is_a_failed_check(body: bytes) -> None:
    found = checks(body)
    assert not any(check["ok"] for check in found)
    assert all(check["failure"] in BY_ID and check["detail"] for check in found)
    asked = [found[place]["failure"] for place in (2, 3)]
    assert set(asked) <= {"answer-malformed", "answer-degenerate"}


@given(JSON, st.sampled_from([200, 400, 500]))
def test_any_json_is_a_checked_answer(value: Any, status: int) -> None:
    for check in checks(json.dumps(value).encode(), status):
        assert check["ok"] is False and check["failure"] in BY_ID


@given(st.binary(max_size=200))
def test_any_bytes_are_a_checked_answer(body: bytes) -> None:
    assert all(check["failure"] in BY_ID for check in checks(body))


CHUNK = {"id": "a", "object": "chat.completion.chunk", "choices": [{"delta": {"role": "assistant", "content": "x"}}]}


@given(st.lists(JSON | st.just(CHUNK) | JSON.map(lambda value: {**CHUNK, "choices": [{"delta": value}]}), max_size=6))
def test_any_events_end_in_a_checked_stream(events: list[Any]) -> None:
    reader = StreamReader()
    with contextlib.suppress(CheckError):
        for event in events:
            reader.take(json.dumps(event))
        reader.take("[DONE]")
        reader.end()
        assert isinstance(reader.text, str)


@given(st.binary(max_size=300), st.sampled_from([b"data: ", b"data:", b"\n\n", b"event: x\n", b""]))
def test_any_stream_of_events(body: bytes, between: bytes) -> None:
    with contextlib.suppress(HttpError):
        for event in stream_of(between.join([body[:50], body[50:], b"\n\n"])).events():
            assert isinstance(event, str)


def test_an_odd_id_or_content_within_a_stream() -> None:
    for change in ({"id": 5}, {"id": ["a"]}, {"choices": [{"delta": {"content": 5}}]}, {"choices": [5]}):
        with pytest.raises(CheckError) as caught:
            StreamReader().take(json.dumps({**CHUNK, **change}))
        assert caught.value.id == "stream-broken"


def test_terminal_escapes_of_an_answer_are_not_shown() -> None:
    assert "\x1b" not in verification.words("\x1b[31mred\x9b31m") and "\x9b" not in verification.words("\x9b")
    assert "\x1b" not in verification.refusal(Answer(500, "text/plain", b"\x1b[2Jgone"))


# -- over a connection ---------------------------------------------------------------------------------------------


@pytest.fixture
def served() -> Iterator[Callable[[Callable[[socket.socket], None]], str]]:
    """Serve connections with a function; the URL."""
    with contextlib.ExitStack() as stack:

        def start(serve: Callable[[socket.socket], None]) -> str:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

            def loop() -> None:
                while True:
                    try:
                        connection, _ = listener.accept()
                    except OSError:
                        return
                    threading.Thread(target=one, args=(connection,), daemon=True).start()

            def one(connection: socket.socket) -> None:
                with connection, contextlib.suppress(OSError):
                    connection.recv(65536)
                    serve(connection)

            threading.Thread(target=loop, daemon=True).start()
            return f"http://127.0.0.1:{listener.getsockname()[1]}"

        yield start


def endless(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
    while True:
        connection.sendall(b"data: " + b"x" * 65530)


def trickle(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        connection.sendall(b"x")
        time.sleep(0.05)


def test_an_endless_answer_ends_at_its_limit(
    served: Callable[[Callable[[socket.socket], None]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(served(endless), 10)
    with pytest.raises(HttpError, match="more than 100000 bytes") as caught:
        client.get("/metrics", limit=100_000)
    assert caught.value.kind == "malformed"
    with pytest.raises(HttpError, match="more than 16777216 bytes"):
        client.post("/", {})
    with client.stream("/", {}) as stream, pytest.raises(HttpError, match="more than"):
        list(stream.events())
    result = verify({**PARAMS, "url": client.url})
    assert not result["verified"] and all(check["failure"] in BY_ID for check in result["checks"] if not check["ok"])


def test_a_head_that_trickles_ends_in_time(served: Callable[[Callable[[socket.socket], None]], str]) -> None:
    client, began = Client(served(trickle), 0.4), time.monotonic()
    with pytest.raises(HttpError) as caught:
        client.get("/health")
    assert caught.value.kind == "timeout" and time.monotonic() - began < 2


def test_what_is_no_http_at_all(served: Callable[[Callable[[socket.socket], None]], str]) -> None:
    for raw in (b"SSH-2.0-OpenSSH\r\n\r\n", b"HTTP/1.1 xx\r\n\r\n", b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 500):
        client = Client(served(lambda connection, raw=raw: connection.sendall(raw)), 5)  # type: ignore[misc]
        with pytest.raises(HttpError):
            client.get("/health")
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc"
    with pytest.raises(HttpError):
        Client(served(lambda connection: connection.sendall(chunked)), 5).get("/")


@pytest.mark.parametrize("url", ["http://[::1", "http://h:x", "http://h:99999", "ftp://h", "http://"])
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(HttpError) as caught:
        Client(url)
    assert caught.value.kind == "address"


def test_a_key_file_that_is_no_text(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_bytes(b"\xff\n")
    monkeypatch.setattr(host_http, "KEY_FILE", str(tmp_path / "key"))
    assert host_http.engine_client("http://127.0.0.1:1").headers == {}
