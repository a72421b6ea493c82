# SPDX-License-Identifier: Apache-2.0
"""A small HTTP server that withstands any client: one thread; connections, their bytes and their seconds are bounded.

It answers one GET or HEAD a connection, from a function that must be quick. Standard library only.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

CONNECTIONS = 64  # in total; beyond, the oldest that has not sent a request is closed
PER_ADDRESS = 16  # per address; beyond, its oldest is closed
HEAD_BYTES = 8192  # of a request line with its headers
REQUEST_SECONDS = 5.0  # from the first byte to the last of the answer
BACKLOG = 128
#: What answers: path with query → status and text.
Answer = Callable[[str], tuple[int, str]]
_REASONS = {
    **{200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed", 431: "Headers Too Large"},
    **{500: "Internal Error", 503: "Service Unavailable"},
}


class Connection:
    """One that asks: `received` until the headers are whole, then `left` to be sent."""

    def __init__(self, sock: socket.socket, address: str, now: float) -> None:
        self.sock, self.address = sock, address
        self.deadline = now + REQUEST_SECONDS
        self.received = bytearray()
        self.left = memoryview(b"")
        self.answered = False


class StatusServer:
    """Listens on `addresses` ("" for every IPv4 one) until it is closed. `answer` is called in its thread."""

    def __init__(self, addresses: Sequence[str], port: int, answer: Answer) -> None:
        """Raises OSError where one of the addresses cannot be listened on; then it listens on none."""
        self.answer = answer
        self._selector = selectors.DefaultSelector()
        self._listeners: list[socket.socket] = []
        self._open: dict[socket.socket, Connection] = {}
        self._count: Counter[str] = Counter()
        self._closed = False
        try:
            for address in addresses:
                family = socket.AF_INET6 if ":" in address else socket.AF_INET
                listener = socket.create_server((address, port), family=family, backlog=BACKLOG)
                self._listeners.append(listener)
                listener.setblocking(False)
                self._selector.register(listener, selectors.EVENT_READ)
        except OSError:
            self.close()
            raise
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)

    @property
    def port(self) -> int:
        """The port of the first address."""
        return int(self._listeners[0].getsockname()[1])

    def start(self) -> threading.Thread:
        """Serve in a thread of its own. Raises RuntimeError where none can be started."""
        thread = threading.Thread(target=self.serve, name="window", daemon=True)
        thread.start()
        return thread

    def stop(self) -> None:
        """End `serve`."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._wake.send(b"x")

    def close(self) -> None:
        """Close every socket."""
        for sock in [*self._open]:
            self._drop(sock)
        for listener in self._listeners:
            listener.close()
        self._selector.close()

    def serve(self) -> None:
        """Answer, until `stop`."""
        try:
            while not self._closed:
                self.turn()
        finally:
            self.close()

    def turn(self) -> None:
        """Wait for something to do, for a second at most, and do it."""
        now = time.monotonic()
        nearest = min((item.deadline for item in self._open.values()), default=now + 1.0)
        for key, _ in self._selector.select(min(max(nearest - now, 0.0), 1.0)):
            sock = key.fileobj
            assert isinstance(sock, socket.socket)
            if sock is self._woken:
                return
            if sock in self._listeners:
                self._accept(sock)
            elif sock in self._open:
                self._move(self._open[sock])
        now = time.monotonic()
        for item in [item for item in self._open.values() if item.deadline <= now]:
            self._drop(item.sock)

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, peer = listener.accept()
        except BlockingIOError:
            return
        except OSError:  # no more file descriptors: what is open ends within seconds
            time.sleep(0.05)
            return
        address = str(peer[0])
        sock.setblocking(False)
        if self._count[address] >= PER_ADDRESS:
            self._drop(next(item.sock for item in self._open.values() if item.address == address))
        elif len(self._open) >= CONNECTIONS:
            # Of the address that holds most: a flood of one cannot put out another.
            most = self._count.most_common(1)[0][0]
            self._drop(next(item.sock for item in self._open.values() if item.address == most))
        self._open[sock] = Connection(sock, address, time.monotonic())
        self._count[address] += 1
        self._selector.register(sock, selectors.EVENT_READ)

    def _drop(self, sock: socket.socket) -> None:
        item = self._open.pop(sock)
        self._count[item.address] -= 1
        if not self._count[item.address]:
            del self._count[item.address]
        with contextlib.suppress(KeyError, ValueError, OSError):
            self._selector.unregister(sock)
        sock.close()

    def _move(self, item: Connection) -> None:
        """Read what has come, or send what goes; a peer that is gone is ignored."""
        try:
            if not item.answered:
                part = item.sock.recv(4096)
                if not part:
                    self._drop(item.sock)
                    return
                item.received += part
                whole = b"\r\n\r\n" in item.received or b"\n\n" in item.received
                if not whole and len(item.received) <= HEAD_BYTES:
                    return
                item.left = memoryview(self._answered(bytes(item.received), whole))
                item.answered = True
                item.received.clear()
                self._selector.modify(item.sock, selectors.EVENT_WRITE)
            item.left = item.left[item.sock.send(item.left) :]
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._drop(item.sock)
            return
        if not item.left:
            with contextlib.suppress(OSError):
                item.sock.shutdown(socket.SHUT_WR)
            self._drop(item.sock)

    def _answered(self, received: bytes, whole: bool) -> bytes:
        words = received.split(b"\n", 1)[0].decode("latin-1").split()
        if not whole or len(received) > HEAD_BYTES:
            status, text, method = 431, "headers too large\n", "GET"
        elif len(words) != 3 or not words[2].startswith("HTTP/1.") or not words[1].startswith("/"):
            status, text, method = 400, "not an HTTP request\n", "GET"
        elif words[0] not in ("GET", "HEAD"):
            status, text, method = 405, "GET and HEAD only\n", "GET"
        else:
            method = words[0]
            try:
                status, text = self.answer(words[1])
            except Exception as error:  # the server continues
                status, text = 500, f"{type(error).__name__}\n"
        body = text.encode()
        head = (
            f"HTTP/1.1 {status} {_REASONS[status]}\r\n"
            "Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        return head.encode() + (b"" if method == "HEAD" else body)
