# SPDX-License-Identifier: Apache-2.0
"""The Docker Engine API over its unix socket, standard library only.

Paths carry no API version (`/containers/json`, not `/v1.41/...`): an engine then answers in its own newest
version, so neither an old nor a new engine refuses. Source: https://docs.docker.com/reference/api/engine/
"""

from __future__ import annotations

import http.client
import json
import socket
import struct
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlencode

from .bounded import BoundsError, in_time, parse_json, printable

SOCKET = "/var/run/docker.sock"
LIMIT = 64 << 20  # bytes of an answer
LINE = 1 << 20  # bytes of a line of a stream or a log; longer ones come in pieces
MOST = 10_000  # containers, images
MESSAGE = 4000  # characters of an error


class DockerError(Exception):
    """The engine refused a request. `status` is its HTTP code, 0 where there was none."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class DockerUnavailable(DockerError):
    """No engine answers on the socket; the message says why and what to do."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float | None) -> None:
        super().__init__("docker", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Docker:
    """A client of one Docker engine. Every call opens a connection of its own, so it is safe across threads.

    `timeout` is in seconds and bounds each wait for the engine to say something, not a whole stream.
    """

    def __init__(self, socket_path: str = SOCKET, timeout: float | None = 30.0) -> None:
        self.socket_path = socket_path
        self.timeout = timeout

    # -- plain requests ------------------------------------------------------------------------------------

    def get(self, path: str) -> tuple[int, Any]:
        """GET `path`; the HTTP status and the decoded answer. Raises DockerUnavailable only."""
        return self.request("GET", path)

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """Send a request; `body` is bytes (sent as a tar) or anything JSON. Answers status and decoded body:
        JSON where it is JSON, else text. Raises DockerUnavailable; the status is the caller's to judge."""
        connection, response = self._open(method, path, body, headers, self.timeout)
        try:
            return response.status, _decode(self._read(response))
        finally:
            connection.close()

    def call(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Any:
        """Like `request`, but an answer of 400 or more raises DockerError with the engine's message."""
        status, answer = self.request(method, path, body, headers)
        if status >= 400:
            raise DockerError(_message(answer), status)
        return answer

    def stream(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        timeout: float | None = None,
    ) -> Iterator[dict[str, Any]]:
        """The JSON objects of a progress stream (pull, import, events), as they come.

        `timeout`: seconds of silence from the engine before DockerUnavailable; None waits indefinitely.
        An error status raises DockerError; an error within the stream is an object with the key `error`.
        """
        connection, response = self._open(method, path, body, headers, timeout)
        try:
            if response.status >= 400:
                raise DockerError(_message(_decode(self._read(response))), response.status)
            decoder = json.JSONDecoder()
            for line in self._lines(response):
                text = line.decode("utf-8", "replace").strip()
                while text:
                    value, end = decoder.raw_decode(text)
                    text = text[end:].lstrip()
                    if isinstance(value, dict):
                        yield value
        except (ValueError, RecursionError) as error:
            raise DockerError(f"the engine sent broken JSON for {path.partition('?')[0]}: {error}") from error
        finally:
            connection.close()

    def frames(self, path: str, tty: bool, timeout: float | None = None) -> Iterator[str]:
        """Lines of a container's output stream (`.../logs`, `.../attach`), stdout and stderr as they come."""
        yield from self._framed("GET", path, None, tty, timeout)

    def _framed(self, method: str, path: str, body: Any, tty: bool, timeout: float | None) -> Iterator[str]:
        connection, response = self._open(method, path, body, None, timeout)
        try:
            if response.status >= 400:
                raise DockerError(_message(_decode(self._read(response))), response.status)
            if tty:
                for line in self._lines(response):
                    yield line.decode("utf-8", "replace").rstrip("\r\n")
                return
            # Frame: stream (1 byte), 3 zero bytes, length (big endian u32), payload. A line may span frames.
            pending: dict[int, bytes] = {}
            while len(header := self._read(response, 8)) == 8:
                kind, size = struct.unpack(">BxxxL", header)
                while size > 0:
                    part = self._read(response, min(size, LINE))
                    if not part:
                        break
                    size -= len(part)
                    *lines, rest = (pending.get(kind, b"") + part).split(b"\n")
                    if len(rest) > LINE:
                        lines, rest = [*lines, rest], b""
                    pending[kind] = rest
                    for line in lines:
                        yield line.decode("utf-8", "replace").rstrip("\r")
            for rest in pending.values():
                if rest:
                    yield rest.decode("utf-8", "replace")
        finally:
            connection.close()

    def execute(
        self,
        name: str,
        argv: Sequence[str],
        seconds: float,
        most: int = 200,
        environment: Mapping[str, str] | None = None,
    ) -> tuple[int, list[str]]:
        """Run a command in a container, as `docker exec` does: its exit code and the last `most` lines that it wrote.
        Raises DockerError where it cannot be run or does not end in time; what runs on then ends with the container."""
        path = f"/containers/{quote(name, safe='')}/exec"
        asked: dict[str, Any] = {"Cmd": [*argv], "AttachStdout": True, "AttachStderr": True, "Tty": False}
        if environment:  # where a secret may be: arguments are seen by all
            asked["Env"] = [f"{key}={value}" for key, value in environment.items()]
        made = _object(self.call("POST", path, asked), path).get("Id")
        if not isinstance(made, str) or not made:
            raise DockerError(f"the engine's answer for {path} has no Id")
        path = f"/exec/{quote(made, safe='')}"

        def work() -> list[str]:
            lines = self._framed("POST", f"{path}/start", {"Detach": False, "Tty": False}, False, seconds)
            return list(deque(lines, maxlen=most))

        try:
            lines = in_time(work, seconds)
        except TimeoutError:
            raise DockerError(f"`{printable(' '.join(argv), 80)}` did not end within {seconds:.0f} s") from None
        code = _object(self.call("GET", f"{path}/json"), path).get("ExitCode")
        return (code if isinstance(code, int) else -1), lines

    # -- things the engine knows (each raises DockerError for an answer of another form) ----------------------

    def container(self, name: str) -> dict[str, Any] | None:
        """What `docker inspect NAME` says of a container, or None."""
        return self._inspect(f"/containers/{quote(name, safe='')}/json")

    def containers(self, all: bool = True, filters: dict[str, list[str]] | None = None) -> list[dict[str, Any]]:
        """Containers as `docker ps` lists them, each with an `Id`; `filters` as the API has them, e.g.
        {"label": ["a=b"]}."""
        query = {"all": "1" if all else "0"}
        if filters:
            query["filters"] = json.dumps(filters)
        return _listed(self.call("GET", f"/containers/json?{urlencode(query)}"), "/containers/json")

    def images(self) -> list[dict[str, Any]]:
        """Images as `docker images` lists them, each with an `Id`."""
        return _listed(self.call("GET", "/images/json"), "/images/json")

    def logs(self, name: str, since: float = 0.0, tail: int | None = 200, timestamps: bool = True) -> list[str]:
        """The last `tail` log lines (None: all) since a Unix time, oldest first; [] for no such container.
        With `timestamps` a line starts with its RFC 3339 time and a space."""
        found = self.container(name)
        if found is None:
            return []
        query = urlencode(
            {
                "stdout": 1,
                "stderr": 1,
                "since": f"{since:.9f}" if since else 0,
                "tail": "all" if tail is None else tail,
                "timestamps": int(timestamps),
            }
        )
        config = found.get("Config")
        tty = bool(isinstance(config, dict) and config.get("Tty"))
        return list(self.frames(f"/containers/{quote(name, safe='')}/logs?{query}", tty, self.timeout))

    def image(self, ref: str) -> dict[str, Any] | None:
        """What `docker image inspect REF` says, or None."""
        return self._inspect(f"/images/{quote(ref, safe='/:@')}/json")

    def network(self, name: str) -> dict[str, Any] | None:
        """What `docker network inspect NAME` says, or None."""
        return self._inspect(f"/networks/{quote(name, safe='')}")

    def info(self) -> dict[str, Any]:
        """`docker info` as the API has it."""
        return _object(self.call("GET", "/info"), "/info")

    def version(self) -> dict[str, Any]:
        """`docker version`, server side."""
        return _object(self.call("GET", "/version"), "/version")

    # -- inside --------------------------------------------------------------------------------------------

    def _inspect(self, path: str) -> dict[str, Any] | None:
        status, answer = self.request("GET", path)
        if status == 404:
            return None
        if status >= 400:
            raise DockerError(_message(answer), status)
        return _object(answer, path)

    def _open(
        self, method: str, path: str, body: Any, headers: dict[str, str] | None, timeout: float | None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        sent = dict(headers or {})
        data: bytes | None = None
        if isinstance(body, bytes):
            data = body
            sent.setdefault("Content-Type", "application/x-tar")
        elif body is not None:
            data = json.dumps(body).encode()
            sent.setdefault("Content-Type", "application/json")
        elif method == "POST":
            sent.setdefault("Content-Length", "0")
        connection = _UnixConnection(self.socket_path, timeout)
        try:
            connection.request(method, path, body=data, headers=sent)
            return connection, connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise self._unavailable(error) from error

    def _read(self, response: http.client.HTTPResponse, size: int | None = None) -> bytes:
        try:
            data = response.read(LIMIT + 1 if size is None else size)
            if size is None and len(data) > LIMIT:
                raise DockerError(f"the engine's answer is larger than {LIMIT} bytes")
            return data
        except (OSError, http.client.HTTPException) as error:
            raise self._unavailable(error) from error

    def _lines(self, response: http.client.HTTPResponse) -> Iterator[bytes]:
        try:
            while line := response.readline(LINE):
                yield line
        except (OSError, http.client.HTTPException) as error:
            raise self._unavailable(error) from error

    def _unavailable(self, error: Exception) -> DockerUnavailable:
        where = self.socket_path
        if isinstance(error, FileNotFoundError):
            why = "no such socket; is Docker installed and running (systemctl status docker)?"
        elif isinstance(error, ConnectionRefusedError):
            why = "nothing listens there; start Docker (systemctl start docker)"
        elif isinstance(error, PermissionError):
            why = "permission denied; run as root or as a member of the docker group"
        elif isinstance(error, TimeoutError):
            why = "no answer in time; see journalctl -u docker"
        else:
            why = f"the connection broke ({type(error).__name__}: {error}); see journalctl -u docker"
        return DockerUnavailable(f"Docker on {where}: {why}")


def _decode(raw: bytes) -> Any:
    text = raw.decode("utf-8", "replace").strip()
    try:
        return parse_json(text, "the engine's answer", LIMIT) if text else None
    except BoundsError:
        return text


def _object(answer: Any, path: str) -> dict[str, Any]:
    if not isinstance(answer, dict):
        raise DockerError(f"the engine's answer for {printable(path, 200)} is not an object")
    return answer


def _listed(answer: Any, path: str) -> list[dict[str, Any]]:
    """The items of a list, each with its id; Docker writes null for none. Raises DockerError."""
    items = [] if answer is None else answer
    if not isinstance(items, list) or not all(isinstance(_object(item, path).get("Id"), str) for item in items):
        raise DockerError(f"the engine's answer for {path} is not a list of objects with an ID")
    if len(items) > MOST:
        raise DockerError(f"the engine's answer for {path} has more than {MOST} items")
    return items


def _message(answer: Any) -> str:
    message = answer.get("message") if isinstance(answer, dict) and "message" in answer else answer or "no message"
    return printable(str(message)[: 2 * MESSAGE].strip(), MESSAGE)
