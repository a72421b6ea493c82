"""A Docker engine of a few lines on a unix socket: what to answer is set by the test, what was asked is kept."""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.docker import Docker
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.releases import Store

from tests.unit.fakes import fake_release


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Engine

    def address_string(self) -> str:
        return "unix"

    def log_message(self, *args: Any) -> None:
        pass

    def _handle(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        self.server.seen.append((self.command, self.path, self.body, dict(self.headers)))
        path = self.path.split("?")[0]
        route = self.server.routes.get((self.command, path))
        if route is None:
            self.answer(404, {"message": f"No such thing: {path}"})
        elif callable(route):
            route(self)
        else:
            self.answer(200, route)

    do_GET = do_POST = do_DELETE = _handle

    def answer(self, status: int, value: Any) -> None:
        raw = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def chunks(self, *parts: bytes) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for part in parts:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        self.wfile.write(b"0\r\n\r\n")


class Engine(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True

    def __init__(self, path: Path) -> None:
        self.routes: dict[tuple[str, str], Any] = {}
        self.seen: list[tuple[str, str, bytes, dict[str, str]]] = []
        super().__init__(str(path), Handler)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with Engine(tmp_path / "docker.sock") as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def docker(engine: Engine) -> Docker:
    return Docker(str(engine.server_address), timeout=5)


def deployed(folder: Path, port: int) -> Store:
    """A store whose release 1 is current: service vllm-m, model org/model, on this port."""
    engine = fake_release.an_engine("vllm-m", port, repo="org/model", profile="p", memory={})
    return deployed_engines(folder, engine)


def deployed_engines(folder: Path, *engines: dict[str, Any]) -> Store:
    """A store whose release 1 is current and has these engines."""
    made = Store(folder / "project", folder / "state", str(folder / "run" / "switch.lock"))
    made.commit(made.stage("services: {}\n", fake_release.plan(*engines), fake_release.lock(*engines)), 1.0)
    return made
