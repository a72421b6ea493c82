# SPDX-License-Identifier: Apache-2.0
"""HTTP to a server on this very host, standard library only: JSON in and out, and event streams.

http.client goes straight to the address; proxy variables of the environment are not read, so a company proxy never
stands between a Spark and its own engine.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from .bounded import MIB, BoundsError, limited_lines, parse_json, printable, read_file

KEY_FILE = "/etc/sparkfleet/engine_key"
LIMIT = 16 * MIB  # of a body
LINE_LIMIT = 1 * MIB  # of a line of a stream


class HttpError(Exception):
    """No answer came, or not a whole one. `kind`: address, refused, timeout, broken (cut short, not HTTP) or
    malformed (whole, but too large or not of the form it must have)."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Answer:
    """A whole answer: `status`, `content_type` (lower case, no parameters), `body`."""

    def __init__(self, status: int, content_type: str, body: bytes) -> None:
        self.status = status
        self.content_type = content_type
        self.body = body

    @property
    def text(self) -> str:
        """The body as text."""
        return self.body.decode("utf-8", "replace")

    def json(self) -> Any:
        """The body decoded from JSON. Raises HttpError (malformed)."""
        try:
            return parse_json(self.body, "the answer", LIMIT)
        except BoundsError as error:
            raise HttpError("malformed", str(error)) from None


class Client:
    """Requests to one server. `url` is `http://HOST:PORT`, `timeout` bounds a whole exchange, in seconds.

    `limit`: bytes of a body; a longer one ends in HttpError (malformed). Every request has a connection of its own, so
    a client is safe across threads.
    """

    def __init__(self, url: str, timeout: float = 10.0, headers: dict[str, str] | None = None) -> None:
        try:
            parts = urlsplit(url)
            self.host, self.port = parts.hostname or "", parts.port or 80
        except ValueError as error:
            raise HttpError("address", f"url {url!r}: {error}") from error
        if parts.scheme != "http" or not self.host:
            raise HttpError("address", f"url {url!r} is not of the form http://HOST:PORT")
        self.prefix = parts.path.rstrip("/")
        self.url = f"http://{parts.netloc}{self.prefix}"
        self.timeout = timeout
        self.headers = dict(headers or {})

    def get(self, path: str, timeout: float | None = None, limit: int = LIMIT) -> Answer:
        """GET a path. Raises HttpError; the status is the caller's to judge."""
        return self._whole("GET", path, None, timeout, None, limit)

    def post(
        self,
        path: str,
        body: Any,
        timeout: float | None = None,
        headers: dict[str, str] | None = None,
        limit: int = LIMIT,
    ) -> Answer:
        """POST JSON. Raises HttpError; the status is the caller's to judge."""
        return self._whole("POST", path, body, timeout, headers, limit)

    def stream(
        self, path: str, body: Any, timeout: float | None = None, headers: dict[str, str] | None = None
    ) -> Stream:
        """POST JSON and read the answer as it comes."""
        return Stream(*self._open("POST", path, body, timeout, headers))

    def _whole(
        self, method: str, path: str, body: Any, timeout: float | None, headers: dict[str, str] | None, limit: int
    ) -> Answer:
        with Stream(*self._open(method, path, body, timeout, headers), limit=limit) as stream:
            return stream.answer()

    def _open(
        self, method: str, path: str, body: Any, timeout: float | None, headers: dict[str, str] | None
    ) -> tuple[http.client.HTTPResponse, str]:
        seconds = self.timeout if timeout is None else timeout
        deadline = Deadline(seconds)
        where = f"{self.url}{path}"
        connection = http.client.HTTPConnection(self.host, self.port, timeout=seconds)
        # The deadline is that of the whole exchange: a head or a body of one byte a second does not stretch it.
        connection.response_class = lambda sock, **more: http.client.HTTPResponse(  # type: ignore[assignment]
            Timed(sock, deadline),  # type: ignore[arg-type]
            **more,
        )
        sent = {"Accept": "*/*", "Connection": "close", **self.headers, **(headers or {})}
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            sent["Content-Type"] = "application/json"
        try:
            connection.request(method, self.prefix + path, body=data, headers=sent)
            return connection.getresponse(), where
        except (OSError, http.client.HTTPException, ValueError) as error:
            connection.close()
            raise explain(error, where, seconds) from error


class Deadline:
    """When something must have come; it can be moved on the way."""

    def __init__(self, seconds: float) -> None:
        self.renew(seconds)

    def renew(self, seconds: float) -> None:
        """From now on there are so many seconds."""
        self._seconds, self._at = seconds, time.monotonic() + seconds

    def left(self) -> float:
        """Seconds until then. Raises TimeoutError once there are none."""
        left = self._at - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"not there within {self._seconds:g} s")
        return left


class Timed:
    """Stands for a socket whose answer must have come by a deadline, whatever pieces it comes in: status, headers,
    sizes of chunks, content and trailers alike. The timeout of the socket bounds silence meanwhile."""

    def __init__(self, sock: socket.socket, deadline: Deadline) -> None:
        self._sock, self._deadline = sock, deadline

    def makefile(self, _mode: str) -> io.BufferedReader:
        """As HTTPResponse calls it."""
        return io.BufferedReader(_TimedReader(self._sock, self._deadline), 64 << 10)


class _TimedReader(io.RawIOBase):
    def __init__(self, sock: socket.socket, deadline: Deadline) -> None:
        self._sock, self._deadline, self._silence = sock, deadline, sock.gettimeout()
        self._raw = sock.makefile("rb", buffering=0)  # keeps the socket when the connection drops it

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._deadline.left()
        self._sock.settimeout(left if self._silence is None else min(left, self._silence))
        try:
            return self._raw.readinto(buffer)
        except TimeoutError:
            self._deadline.left()
            raise

    def close(self) -> None:
        self._raw.close()
        super().close()


def engine_client(url: str, timeout: float = 10.0) -> Client:
    """A client of the engine on this host, with its key where there is one. An engine without does not mind."""
    client = Client(url, timeout)
    if client.host in ("127.0.0.1", "::1", "localhost"):
        with contextlib.suppress(OSError, ValueError):
            key = read_file(KEY_FILE, 4096).decode("ascii").strip()
            client.headers["Authorization"] = f"Bearer {key}"
    return client


class Stream:
    """An answer that is still coming. Use as a context manager; closing it ends the connection."""

    def __init__(self, response: http.client.HTTPResponse, where: str, limit: int = LIMIT) -> None:
        self._response, self._where, self._limit = response, where, limit
        self.status = response.status
        self.content_type = (response.getheader("Content-Type") or "").partition(";")[0].strip().lower()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        self._response.close()

    def answer(self) -> Answer:
        """The whole answer. Raises HttpError when the server goes silent, cuts it short or does not end."""
        parts: list[bytes] = []
        size = 0
        for part in self._parts():
            size += len(part)
            if size > self._limit:
                raise HttpError("malformed", f"{self._where}: more than {self._limit} bytes")
            parts.append(part)
        return Answer(self.status, self.content_type, b"".join(parts))

    def lines(self) -> Iterator[bytes]:
        """Lines with their ends, as they come; what is longer than LINE_LIMIT is cut. Raises HttpError as `answer`
        does."""
        try:
            yield from limited_lines(self._parts(), self._where, LINE_LIMIT, self._limit)
        except BoundsError as error:
            raise HttpError("malformed", str(error)) from None

    def _parts(self) -> Iterator[bytes]:
        while True:
            try:
                if self._response.isclosed():
                    return
                part = self._response.read1(65536)  # raises IncompleteRead for a chunk that is cut
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise explain(error, self._where, None) from error
            if not part:
                if self._response.length:
                    raise HttpError("broken", f"{self._where}: the answer was cut short")
                return
            yield part

    def events(self) -> Iterator[str]:
        """The data of each server-sent event (https://html.spec.whatwg.org/multipage/server-sent-events.html).

        Raises HttpError (malformed) for an invalid event line, and for an event without its blank line.
        """
        data: list[str] = []
        for raw in self.lines():
            line = raw.decode("utf-8", "replace").rstrip("\r\n")
            if not line:
                if data:
                    yield "\n".join(data)
                data = []
                continue
            name, _, value = line.partition(":")
            if name == "data":
                data.append(value[1:] if value.startswith(" ") else value)
            elif name not in ("", "event", "id", "retry"):
                raise HttpError("malformed", f"a line that is no event: {printable(line, 80)!r}")
        if data:
            raise HttpError("malformed", f"the last event has no end: {printable(data[-1], 80)!r}")


def explain(error: Exception, where: str, seconds: float | None) -> HttpError:
    """What became of a request, in a few words."""
    if isinstance(error, TimeoutError):
        return HttpError("timeout", f"{where}: no answer" + (f" within {seconds:g} s" if seconds else " in time"))
    if isinstance(error, ConnectionRefusedError):
        return HttpError("refused", f"{where}: nothing listens there")
    if isinstance(error, socket.gaierror):
        return HttpError("address", f"{where}: the name does not resolve")
    if isinstance(error, http.client.IncompleteRead):
        return HttpError("broken", f"{where}: the answer was cut short")
    if isinstance(error, http.client.RemoteDisconnected):
        return HttpError("broken", f"{where}: the server closed the connection without an answer")
    return HttpError("broken", f"{where}: {type(error).__name__}: {printable(str(error), 200)}")
