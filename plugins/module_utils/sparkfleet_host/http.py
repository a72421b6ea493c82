# SPDX-License-Identifier: Apache-2.0
"""HTTP to a server on this very host, standard library only: JSON in and out, and event streams.

http.client goes straight to the address; proxy variables of the environment are not read, so a company proxy never
stands between a Spark and its own engine.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

KEY_FILE = "/etc/sparkfleet/engine_key"


class HttpError(Exception):
    """No answer came, or not a whole one. `kind`: address, refused, timeout or broken."""

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
        """The body decoded from JSON. Raises HttpError (broken)."""
        try:
            return json.loads(self.body)
        except ValueError as error:
            raise HttpError("broken", f"not JSON: {' '.join(self.text.split())[:120]!r}") from error


class Client:
    """Requests to one server. `url` is `http://HOST:PORT`, `timeout` bounds a whole exchange, in seconds.

    Every request has a connection of its own, so a client is safe across threads.
    """

    def __init__(self, url: str, timeout: float = 10.0, headers: dict[str, str] | None = None) -> None:
        parts = urlsplit(url)
        try:
            self.host, self.port = parts.hostname or "", parts.port or 80
        except ValueError as error:
            raise HttpError("address", f"url {url!r}: {error}") from error
        if parts.scheme != "http" or not self.host:
            raise HttpError("address", f"url {url!r} is not of the form http://HOST:PORT")
        self.prefix = parts.path.rstrip("/")
        self.url = f"http://{parts.netloc}{self.prefix}"
        self.timeout = timeout
        self.headers = dict(headers or {})

    def get(self, path: str, timeout: float | None = None) -> Answer:
        """GET a path. Raises HttpError; the status is the caller's to judge."""
        return self._whole("GET", path, None, timeout, None)

    def post(self, path: str, body: Any, timeout: float | None = None, headers: dict[str, str] | None = None) -> Answer:
        """POST JSON. Raises HttpError; the status is the caller's to judge."""
        return self._whole("POST", path, body, timeout, headers)

    def stream(
        self, path: str, body: Any, timeout: float | None = None, headers: dict[str, str] | None = None
    ) -> Stream:
        """POST JSON and read the answer as it comes."""
        return Stream(*self._open("POST", path, body, timeout, headers))

    def _whole(
        self, method: str, path: str, body: Any, timeout: float | None, headers: dict[str, str] | None
    ) -> Answer:
        with Stream(*self._open(method, path, body, timeout, headers)) as stream:
            return stream.answer()

    def _open(
        self, method: str, path: str, body: Any, timeout: float | None, headers: dict[str, str] | None
    ) -> tuple[socket.socket, http.client.HTTPResponse, float, str]:
        seconds = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + seconds
        where = f"{self.url}{path}"
        connection = http.client.HTTPConnection(self.host, self.port, timeout=seconds)
        sent = {"Accept": "*/*", "Connection": "close", **self.headers, **(headers or {})}
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            sent["Content-Type"] = "application/json"
        try:
            connection.request(method, self.prefix + path, body=data, headers=sent)
            # With `Connection: close` the connection drops its socket as soon as the head of the answer is read.
            sock = connection.sock
            sock.settimeout(max(deadline - time.monotonic(), 0.001))
            return sock, connection.getresponse(), deadline, where
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise explain(error, where, seconds) from error


def engine_client(url: str, timeout: float = 10.0) -> Client:
    """A client of the engine on this host, with its key where there is one. An engine without does not mind."""
    client = Client(url, timeout)
    if client.host in ("127.0.0.1", "::1", "localhost"):
        with contextlib.suppress(OSError):
            client.headers["Authorization"] = f"Bearer {Path(KEY_FILE).read_text(encoding='ascii').strip()}"
    return client


class Stream:
    """An answer that is still coming. Use as a context manager; closing it ends the connection."""

    def __init__(self, sock: socket.socket, response: http.client.HTTPResponse, deadline: float, where: str) -> None:
        self._socket, self._response, self._deadline, self._where = sock, response, deadline, where
        self.status = response.status
        self.content_type = (response.getheader("Content-Type") or "").partition(";")[0].strip().lower()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        self._response.close()

    def answer(self) -> Answer:
        """The whole answer. Raises HttpError when the server goes silent or cuts it short."""
        return Answer(self.status, self.content_type, b"".join(self._parts()))

    def lines(self) -> Iterator[bytes]:
        """Lines with their ends, as they come. Raises HttpError as `answer` does."""
        rest = b""
        for part in self._parts():
            *whole, rest = (rest + part).split(b"\n")
            for line in whole:
                yield line + b"\n"
        if rest:
            yield rest

    def _parts(self) -> Iterator[bytes]:
        while True:
            left = self._deadline - time.monotonic()
            try:
                if left <= 0:
                    raise TimeoutError
                if self._response.isclosed():
                    return
                self._socket.settimeout(left)
                part = self._response.read1(65536)  # raises IncompleteRead for a chunk that is cut
            except (OSError, http.client.HTTPException) as error:
                raise explain(error, self._where, None) from error
            if not part:
                if self._response.length:
                    raise HttpError("broken", f"{self._where}: the answer was cut short")
                return
            yield part

    def events(self) -> Iterator[str]:
        """The data of each server-sent event (https://html.spec.whatwg.org/multipage/server-sent-events.html).

        Raises HttpError (broken) for a line that is no field of an event, and for an event without its blank line.
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
                raise HttpError("broken", f"a line that is no event: {line[:80]!r}")
        if data:
            raise HttpError("broken", f"the last event has no end: {data[-1][:80]!r}")


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
    return HttpError("broken", f"{where}: {type(error).__name__}: {error}")
