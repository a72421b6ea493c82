# SPDX-License-Identifier: Apache-2.0
"""The port of an engine that starts on demand: always open, whether the engine runs or not.

The engine itself is published on loopback alone, on another port. A request that comes while it serves is passed on;
one that comes while it does not is held until it does, or answered with 503 and Retry-After, and wakes the guard. Since
every request passes here, the guard knows which engine was used last and whether one is idle, and can keep new
requests from an engine that it is about to stop: none is cut off.

A connection is one request: the engine is told to close it after its answer, so that nothing needs to be understood
but the head of the request. One thread serves all doors; connections, bytes and seconds are bounded.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Sequence

from .bounded import read_file
from .http import KEY_FILE

CONNECTIONS = 256  # of a door
BACKLOG = 128
HEAD_BYTES = 64 << 10  # as vLLM's own server takes
HEAD_SECONDS = 10.0
BODY_BYTES = 128 << 10  # of a request that is held; the rest stays with the client
BODY_SECONDS = 30.0
CHUNK = 64 << 10
CONNECT_SECONDS = 5.0
TRIES = 2  # of a request by which an engine may have ended
ANSWER_SECONDS = 6 * 3600.0
POLL = 0.1  # seconds between two looks of a request that is held
HOLD, REFUSE = WAYS = ("hold", "refuse")

_REQUEST = re.compile(rb"([A-Z]{1,16}) (/[!-~]{0,8000}|\*) HTTP/1\.[01]")
_REASONS = {
    **{200: "OK", 400: "Bad Request", 401: "Unauthorized", 408: "Request Timeout", 431: "Headers Too Large"},
    **{502: "Bad Gateway", 503: "Service Unavailable"},
}
_TYPES = {
    **{400: "BadRequestError", 401: "AuthenticationError", 408: "TimeoutError", 431: "BadRequestError"},
    **{502: "InternalServerError", 503: "ServiceUnavailableError"},
}


@dataclasses.dataclass(frozen=True)
class State:
    """Whether requests pass; if not, why, and after how many seconds they may (None for not until someone acts)."""

    open: bool = False
    why: str = "is about to be started"
    retry_after: float | None = 10.0


@dataclasses.dataclass
class Request:
    """The head of a request, and what came after it. `length`: of its body as it names it; None for not named."""

    method: bytes
    path: bytes
    lines: list[bytes]
    rest: bytes
    length: int | None = None
    tries: int = 0  # in which an engine ended without a word

    @classmethod
    def of(cls, head: bytes, rest: bytes) -> Request | None:
        """None for what is not one."""
        first, *lines = head.split(b"\r\n")
        found = _REQUEST.fullmatch(first)
        if not found or any(b":" not in line or b"\n" in line or b"\0" in line for line in lines):
            return None
        made = cls(found[1], found[2].partition(b"?")[0], [first, *lines], rest)
        length = made.header(b"content-length")
        if length is not None:
            if not length.isdigit() or len(length) > 18:
                return None
            made.length = int(length)
        return made

    def header(self, name: bytes) -> bytes | None:
        """The value of the first header of that name (lower case)."""
        pairs = (line.partition(b":") for line in self.lines[1:])
        return next((value.strip() for key, _, value in pairs if key.strip().lower() == name), None)

    @property
    def whole(self) -> bool:
        """Whether all of it is here."""
        return len(self.rest) == (self.length or 0) and self.header(b"transfer-encoding") is None

    def once(self) -> bytes:
        """The same for an engine that is to close the connection after its answer."""
        kept = [
            line
            for line in self.lines
            if line.partition(b":")[0].strip().lower() not in (b"connection", b"keep-alive", b"proxy-connection")
        ]
        return b"\r\n".join([*kept, b"Connection: close", b"", b""]) + self.rest


class Door:
    """One engine's. Its counters change in the thread of the doors and are read by the guard."""

    def __init__(
        self,
        repo: str,
        port: int,
        engine_port: int,
        *,
        way: str = HOLD,
        hold_seconds: float = 900.0,
        asked: Callable[[], object] = lambda: None,
        key_file: str = KEY_FILE,
    ) -> None:
        """`port`: of clients; `engine_port`: of the engine on loopback; `asked`: called when a request finds it
        closed."""
        self.repo, self.port, self.engine_port = repo, port, engine_port
        self.way, self.hold_seconds, self.asked, self.key_file = way, hold_seconds, asked, key_file
        self._lock = threading.Lock()
        self._state = State()
        self.active = 0  # requests that were passed on and are not over
        self.waiting = 0  # that are held
        self.used: float | None = None  # when one was passed on last, or ended, on the clock of time.monotonic
        self.wanted: float | None = None  # since when one was not passed on
        self.asked_at: float | None = None  # when the last one was not

    @property
    def state(self) -> State:
        """What the guard set last."""
        return self._state

    def set(self, state: State) -> None:
        """What holds from now on. After this returns, `active` includes all that passed under the state before."""
        with self._lock:
            self._state = state
            if state.open and not self.waiting:
                self.wanted = None

    def turn_away(self) -> None:
        """Answer what is held, and what still comes, with 503: it may come again in a second."""
        self.way = REFUSE
        self.set(State(why="waits for the guard", retry_after=1.0))

    def _enter(self) -> State:
        """Pass, where that is possible."""
        with self._lock:
            if self._state.open:
                self.active += 1
                self.used = time.monotonic()
            return self._state

    def _leave(self) -> None:
        with self._lock:
            self.active -= 1
            self.used = time.monotonic()

    def _want(self) -> None:
        first = self.wanted is None
        self.asked_at = time.monotonic()
        if first:
            self.wanted = self.asked_at
            self.asked()

    # -- a connection ----------------------------------------------------------------------------------------

    async def serve(self, client: socket.socket) -> None:
        """Answer one request. Whatever happens, the connection ends."""
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            received = bytearray()
            try:
                request = await asyncio.wait_for(_head(client, received), HEAD_SECONDS)
            except asyncio.TimeoutError:
                request = 408 if received else 0
            if isinstance(request, int):
                if request:
                    await _say(client, request, "not a whole HTTP request")
                return
            await self._request(client, request)

    async def _request(self, client: socket.socket, request: Request) -> None:
        over = time.monotonic() + self.hold_seconds
        if request.method != b"POST":  # nothing that is only looked at starts an engine
            state = self._enter()
            if not state.open:
                await self._instead(client, request, state)
            elif not await self._pass(client, request):
                await _say(client, 502, f"the engine of {self.repo} does not answer")
            return
        held = False
        try:
            while True:
                state = self._enter()
                if state.open:
                    if held:
                        held = self._held(False)
                    if await self._pass(client, request):
                        return
                    state = State(why="does not answer", retry_after=5.0)
                elif not self._allowed(request):
                    await _say(client, 401, "a key is needed: Authorization: Bearer KEY")
                    return
                self._want()
                left = over - time.monotonic()
                hopeless = state.retry_after is None or state.retry_after > left
                if self.way == REFUSE or hopeless:
                    await self._refuse(client, state)
                    return
                if not held:
                    held = self._held(True)
                    await asyncio.wait_for(_more(client, request), BODY_SECONDS)
                if _gone(client):
                    return
                await asyncio.sleep(POLL)
        finally:
            if held:
                self._held(False)

    def _held(self, held: bool) -> bool:
        with self._lock:
            self.waiting += 1 if held else -1
            if not self.waiting:
                self.wanted = None  # all were passed on, or have gone
        return held

    def _allowed(self, request: Request) -> bool:
        """Whether a request has the engine's key, where there is one: the engine is not there to ask."""
        try:
            key = read_file(self.key_file, 4096).strip()
        except FileNotFoundError:
            return True
        except (OSError, ValueError):
            return False
        return hmac.compare_digest(request.header(b"authorization") or b"", b"Bearer " + key)

    async def _pass(self, client: socket.socket, request: Request) -> bool:
        """Pass a request on, which has entered; False where the engine did not take it, or ended without a word the
        first time: then it may be tried again."""
        loop = asyncio.get_running_loop()
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as engine:
                engine.setblocking(False)
                engine.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                try:
                    await asyncio.wait_for(loop.sock_connect(engine, ("127.0.0.1", self.engine_port)), CONNECT_SECONDS)
                    await loop.sock_sendall(engine, request.once())
                except (OSError, asyncio.TimeoutError):
                    return False
                up = asyncio.ensure_future(_copy(client, engine))
                down = asyncio.ensure_future(_copy(engine, client))
                done, _ = await asyncio.wait({up, down}, timeout=ANSWER_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if up in done and up.exception() is not None:  # the engine takes no more: it has answered already
                    await asyncio.wait({down}, timeout=ANSWER_SECONDS)
                up.cancel()
                down.cancel()
                sent, _ = await asyncio.gather(down, up, return_exceptions=True)
                if sent == 0:
                    request.tries += 1
                    if request.whole and request.tries < TRIES:  # it has just crashed, and is restarted
                        return False
                    await _say(client, 502, f"the engine of {self.repo} ended without an answer")
                return True
        finally:
            self._leave()

    async def _instead(self, client: socket.socket, request: Request, state: State) -> None:
        """What an engine that does not run would say of itself."""
        if request.path == b"/health" and state.retry_after is not None:
            await _send(client, 200, "text/plain", b"")
        elif request.path == b"/metrics":
            await _send(client, 200, "text/plain; version=0.0.4; charset=utf-8", b"")
        elif request.path == b"/v1/models":
            if not self._allowed(request):
                await _say(client, 401, "a key is needed: Authorization: Bearer KEY")
                return
            listed = {"object": "list", "data": [{"id": self.repo, "object": "model", "owned_by": "vllm"}]}
            await _send(client, 200, "application/json", json.dumps(listed).encode())
        else:
            await self._refuse(client, state)

    async def _refuse(self, client: socket.socket, state: State) -> None:
        await _say(client, 503, f"{self.repo} {state.why}", state.retry_after)


class Doors:
    """All doors of a host, served by one thread, which starts with the first of them."""

    def __init__(self) -> None:
        self._running: asyncio.AbstractEventLoop | None = None
        self._accepting: dict[Door, list[asyncio.Task[None]]] = {}
        self._requests: set[asyncio.Task[None]] = set()  # the loop itself keeps none from being collected

    def open(self, door: Door, addresses: Sequence[str]) -> None:
        """Listen on the door's port of these addresses ("" for every IPv4 one). Raises OSError where one of them cannot
        be listened on, RuntimeError where there can be no thread; then it listens on none."""
        listeners: list[socket.socket] = []
        try:
            for address in addresses:
                family = socket.AF_INET6 if ":" in address else socket.AF_INET
                listener = socket.create_server((address, door.port), family=family, backlog=BACKLOG)
                listener.setblocking(False)
                listeners.append(listener)
            loop = self._loop()
        except (OSError, RuntimeError):
            for listener in listeners:
                listener.close()
            raise
        asyncio.run_coroutine_threadsafe(self._open(door, listeners), loop).result()

    def _loop(self) -> asyncio.AbstractEventLoop:
        if self._running is None:
            loop = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="doors", daemon=True).start()
            self._running = loop
        return self._running

    def close(self, door: Door) -> None:
        """Listen no more: the port is free when this returns. What has been accepted is answered."""
        if door in self._accepting:
            asyncio.run_coroutine_threadsafe(self._close(door), self._loop()).result()

    def is_open(self, door: Door) -> bool:
        """Whether it listens."""
        return door in self._accepting

    async def _open(self, door: Door, listeners: Sequence[socket.socket]) -> None:
        limit = asyncio.Semaphore(CONNECTIONS)
        self._accepting[door] = [asyncio.ensure_future(self._accept(door, listener, limit)) for listener in listeners]

    async def _close(self, door: Door) -> None:
        tasks = self._accepting.pop(door)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    async def _accept(self, door: Door, listener: socket.socket, limit: asyncio.Semaphore) -> None:
        loop = asyncio.get_running_loop()
        with listener:
            while True:
                await limit.acquire()
                try:
                    client, _ = await loop.sock_accept(listener)
                except OSError:  # such as no more file descriptors
                    limit.release()
                    await asyncio.sleep(0.05)
                    continue
                task = asyncio.ensure_future(self._serve(door, client, limit))
                self._requests.add(task)
                task.add_done_callback(self._requests.discard)

    async def _serve(self, door: Door, client: socket.socket, limit: asyncio.Semaphore) -> None:
        try:
            client.setblocking(False)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            await door.serve(client)
        except OSError:
            pass
        finally:
            client.close()
            limit.release()


async def _head(client: socket.socket, received: bytearray) -> Request | int:
    """The request of a connection, of what is `received`; a status for what is not one, 0 for nothing at all. Raises
    OSError."""
    loop = asyncio.get_running_loop()
    while b"\r\n\r\n" not in received:
        if len(received) > HEAD_BYTES:
            return 431
        part = await loop.sock_recv(client, 8192)
        if not part:
            return 400 if received else 0
        received += part
    head, _, rest = bytes(received).partition(b"\r\n\r\n")
    return Request.of(head, rest) or 400


async def _more(client: socket.socket, request: Request) -> None:
    """Read of a small body what is still to come: then it shows if the client goes. Raises OSError."""
    loop = asyncio.get_running_loop()
    while request.length and len(request.rest) < request.length <= BODY_BYTES:
        part = await loop.sock_recv(client, request.length - len(request.rest))
        if not part:
            return
        request.rest += part


def _gone(client: socket.socket) -> bool:
    """Whether the client has closed the connection."""
    try:
        return client.recv(1, socket.MSG_PEEK) == b""
    except (BlockingIOError, InterruptedError):
        return False
    except OSError:
        return True


async def _copy(source: socket.socket, target: socket.socket) -> int:
    """Pass on what comes until it ends; how many bytes that were. Raises OSError where the target is gone."""
    loop, size = asyncio.get_running_loop(), 0
    while True:
        try:
            part = await loop.sock_recv(source, CHUNK)
        except ConnectionError:
            return size
        if not part:
            return size
        size += len(part)
        await loop.sock_sendall(target, part)


async def _say(client: socket.socket, status: int, message: str, retry_after: float | None = None) -> None:
    error = {"error": {"message": message, "type": _TYPES[status], "code": status}}
    await _send(client, status, "application/json", json.dumps(error).encode(), retry_after)


async def _send(client: socket.socket, status: int, kind: str, body: bytes, retry_after: float | None = None) -> None:
    """A whole answer. What the client still sends is not read, which must not destroy the answer: a client may get a
    reset in its place."""
    loop = asyncio.get_running_loop()
    head = f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
    if retry_after is not None:
        head += f"Retry-After: {max(round(retry_after), 1)}\r\n"
    await loop.sock_sendall(client, f"{head}Connection: close\r\n\r\n".encode() + body)
    with contextlib.suppress(OSError):
        client.shutdown(socket.SHUT_WR)
        for _ in range(64):
            if not await asyncio.wait_for(loop.sock_recv(client, CHUNK), 1.0):
                break
