"""The door of an engine that starts on demand, over sockets."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import door as module
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.door import REFUSE, Door, Doors, State

OPEN = State(open=True)
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"


class Engine:
    """Answers each connection with what the test says; b"" is to close it without a word."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self.listener.getsockname()[1])
        self.answers: list[bytes] = []
        self.seen: list[bytes] = []
        self.pause = 0.0
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            received = b""
            while b"\r\n\r\n" not in received:
                received += connection.recv(65536)
            head, _, rest = received.partition(b"\r\n\r\n")
            length = next((int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length:")), 0)
            while len(rest) < length:
                rest += connection.recv(65536)
            self.seen.append(head + b"\r\n\r\n" + rest)
            time.sleep(self.pause)
            connection.sendall(self.answers.pop(0) if self.answers else ANSWER)


class Entrance:
    """A door that is open to the test."""

    def __init__(self, folder: Path, **more: object) -> None:
        self.engine = Engine()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        self.asked = 0
        self.key = folder / "key"
        given = {"asked": self.count, "key_file": str(self.key), "hold_seconds": 30.0, **more}
        self.door = Door("org/m", port, self.engine.port, **given)  # type: ignore[arg-type]
        self.doors = Doors()
        self.doors.open(self.door, ["127.0.0.1"])

    def count(self) -> None:
        self.asked += 1

    def raw(self, data: bytes, seconds: float = 10.0) -> bytes:
        with socket.create_connection(("127.0.0.1", self.door.port), timeout=seconds) as connection:
            connection.sendall(data)
            parts = []
            with contextlib.suppress(ConnectionResetError):
                while part := connection.recv(65536):
                    parts.append(part)
            return b"".join(parts)

    def post(self, body: bytes = b"{}", *headers: str, seconds: float = 10.0) -> bytes:
        lines = ["POST /v1/x HTTP/1.1", "Host: h", f"Content-Length: {len(body)}", *headers, "", ""]
        return self.raw("\r\n".join(lines).encode() + body, seconds)

    def until(self, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while not true():
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture
def entrance(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Entrance]:
    made = Entrance(tmp_path, **getattr(request, "param", {}))
    yield made
    made.doors.close(made.door)
    made.engine.listener.close()


def test_what_passes_is_not_changed_but_for_the_end_of_its_connection(entrance: Entrance) -> None:
    entrance.door.set(OPEN)
    body = b"x" * 3_000_000
    assert entrance.post(body, "Connection: keep-alive", "Authorization: Bearer k") == ANSWER
    head, _, rest = entrance.engine.seen[0].partition(b"\r\n\r\n")
    assert rest == body and head.split(b"\r\n") == [
        *(
            b"POST /v1/x HTTP/1.1",
            b"Host: h",
            b"Content-Length: 3000000",
            b"Authorization: Bearer k",
            b"Connection: close",
        ),
    ]
    entrance.until(lambda: entrance.door.active == 0)
    assert entrance.asked == 0 and entrance.door.waiting == 0


def test_what_is_held_passes_once_it_may(entrance: Entrance) -> None:
    found: list[bytes] = []
    held = threading.Thread(target=lambda: found.append(entrance.post(b"x" * 1000)))
    held.start()
    entrance.until(lambda: entrance.door.waiting == 1)
    assert entrance.asked == 1 and entrance.door.wanted is not None and entrance.engine.seen == []
    entrance.door.set(OPEN)
    held.join(5)
    assert found == [ANSWER] and entrance.door.wanted is None


@pytest.mark.parametrize("entrance", [{"hold_seconds": 0.5}], indirect=True)
def test_it_is_held_for_so_long_and_refused_at_once_where_that_is_hopeless(entrance: Entrance) -> None:
    entrance.door.set(State(why="sleeps", retry_after=0.2))
    began = time.monotonic()
    answer = entrance.post()
    assert b" 503 " in answer and b"Retry-After: 1\r\n" in answer and 0.2 <= time.monotonic() - began < 3
    for state in (State(why="waits", retry_after=60.4), State(why="is gone", retry_after=None)):
        entrance.door.set(state)
        began = time.monotonic()
        answer = entrance.post()
        assert time.monotonic() - began < 0.4 and (b"Retry-After: 60\r\n" in answer) is (state.retry_after is not None)
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"] == f"org/m {state.why}"


def test_a_client_that_goes_is_noticed(entrance: Entrance) -> None:
    with contextlib.suppress(TimeoutError):
        entrance.post(b"x" * 5000, seconds=0.3)
    entrance.until(lambda: entrance.door.waiting == 0)
    assert entrance.door.wanted is None and entrance.asked == 1


def test_nobody_without_the_key_starts_an_engine(entrance: Entrance) -> None:
    entrance.key.write_text("the-key\n", encoding="ascii")
    assert b" 401 " in entrance.post() and b" 401 " in entrance.post(b"{}", "Authorization: Bearer other")
    assert b" 401 " in entrance.raw(b"GET /v1/models HTTP/1.1\r\n\r\n")
    assert entrance.asked == 0
    held = threading.Thread(target=lambda: entrance.post(b"{}", "Authorization: Bearer the-key"))
    held.start()
    entrance.until(lambda: entrance.asked == 1)
    entrance.door.set(OPEN)
    held.join(5)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01\r\n\r\n", b" 400 "),
        (b"GET / HTTP/2.0\r\n\r\n", b" 400 "),
        (b"POST /v1/x HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b" 400 "),
        (b"POST /v1/x HTTP/1.1\r\nno header\r\n\r\n", b" 400 "),
        (b"GET /x HTTP/1.1\r\n" + b"A: b\r\n" * 20_000, b" 431 "),
    ],
)
def test_what_is_no_request_is_refused(entrance: Entrance, data: bytes, status: bytes) -> None:
    assert status in entrance.raw(data)[:30]


def test_who_says_nothing_is_hung_up_on(entrance: Entrance, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEAD_SECONDS", 0.2)
    assert entrance.raw(b"") == b"" and b" 408 " in entrance.raw(b"POST /v1")


def test_an_engine_that_has_just_ended_is_asked_once_more(entrance: Entrance) -> None:
    entrance.door.set(OPEN)
    entrance.engine.answers = [b""]
    assert entrance.post() == ANSWER and len(entrance.engine.seen) == 2
    entrance.engine.answers = [b"", b""]
    assert b" 502 " in entrance.post()
    entrance.until(lambda: entrance.door.active == 0)


def test_an_engine_that_is_not_there_is_waited_for(entrance: Entrance) -> None:
    entrance.door.set(OPEN)
    port, entrance.door.engine_port = entrance.door.engine_port, 1
    found: list[bytes] = []
    held = threading.Thread(target=lambda: found.append(entrance.post()))
    held.start()
    entrance.until(lambda: entrance.door.waiting == 1)
    assert b" 502 " in entrance.raw(b"GET /v1/models HTTP/1.1\r\n\r\n")
    entrance.door.engine_port = port
    held.join(5)
    assert found == [ANSWER]


@pytest.mark.parametrize("entrance", [{"way": REFUSE}], indirect=True)
def test_without_holding_it_is_wanted_all_the_same(entrance: Entrance) -> None:
    assert b" 503 " in entrance.post() and entrance.asked == 1 and entrance.door.wanted is not None
    entrance.door.set(OPEN)
    assert entrance.post() == ANSWER and entrance.door.wanted is None


def test_a_client_that_goes_ends_what_is_computed_for_it(entrance: Entrance) -> None:
    entrance.door.set(OPEN)
    entrance.engine.pause = 3.0
    with contextlib.suppress(TimeoutError):
        entrance.post(seconds=0.3)
    began = time.monotonic()
    entrance.until(lambda: entrance.door.active == 0)
    assert time.monotonic() - began < 2


def test_a_door_that_is_closed_frees_its_port(entrance: Entrance) -> None:
    entrance.doors.close(entrance.door)
    with pytest.raises(ConnectionRefusedError):
        entrance.post()
    with socket.create_server(("127.0.0.1", entrance.door.port)), pytest.raises(OSError, match="in use"):
        entrance.doors.open(entrance.door, ["127.0.0.1"])
    entrance.doors.open(entrance.door, ["127.0.0.1"])
    entrance.door.set(OPEN)
    assert entrance.post() == ANSWER
