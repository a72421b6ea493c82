"""The Docker client against an engine of a few lines on a unix socket, and against its absence."""

from __future__ import annotations

import json
import socketserver
import struct
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.sparkfleet_docker import Docker, DockerError, DockerUnavailable

Route = Callable[["Handler"], None]


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


def frame(kind: int, payload: bytes) -> bytes:
    return struct.pack(">BxxxL", kind, len(payload)) + payload


def test_get_decodes_json_and_keeps_the_status(engine: Engine, docker: Docker) -> None:
    engine.routes["GET", "/info"] = {"NCPU": 20}
    assert docker.get("/info") == (200, {"NCPU": 20})
    assert docker.info() == {"NCPU": 20}
    assert docker.get("/nothing")[0] == 404


def test_paths_carry_no_version(engine: Engine, docker: Docker) -> None:
    engine.routes["GET", "/version"] = {"ApiVersion": "1.41"}
    docker.version()
    assert [path for _, path, _, _ in engine.seen] == ["/version"]


def test_unknown_container_and_image_are_none(docker: Docker) -> None:
    assert docker.container("nobody") is None
    assert docker.image("nvcr.io/nvidia/vllm:25.09-py3") is None
    assert docker.logs("nobody") == []


def test_image_reference_keeps_slashes_and_digest(engine: Engine, docker: Docker) -> None:
    ref = "nvcr.io/nvidia/vllm@sha256:" + "0" * 64
    engine.routes["GET", f"/images/{ref}/json"] = {"Id": "sha256:1"}
    assert docker.image(ref) == {"Id": "sha256:1"}


def test_containers_sends_filters(engine: Engine, docker: Docker) -> None:
    engine.routes["GET", "/containers/json"] = [{"Id": "1"}]
    assert docker.containers(filters={"label": ["com.docker.compose.project=sparkfleet"]}) == [{"Id": "1"}]
    assert "all=1" in engine.seen[0][1]
    assert "com.docker.compose.project" in engine.seen[0][1]


def test_body_is_sent_as_json_or_tar(engine: Engine, docker: Docker) -> None:
    engine.routes["POST", "/containers/create"] = {"Id": "1"}
    docker.call("POST", "/containers/create", {"Image": "x"})
    docker.call("POST", "/containers/create", b"tar")
    assert json.loads(engine.seen[0][2]) == {"Image": "x"}
    assert engine.seen[1][2:] == (b"tar", engine.seen[1][3])
    assert engine.seen[1][3]["Content-Type"] == "application/x-tar"


def test_refusal_carries_the_engines_message(engine: Engine, docker: Docker) -> None:
    engine.routes["POST", "/x"] = lambda h: h.answer(409, {"message": "name in use"})
    with pytest.raises(DockerError, match="name in use") as caught:
        docker.call("POST", "/x")
    assert caught.value.status == 409


def test_stream_joins_what_chunks_cut(engine: Engine, docker: Docker) -> None:
    engine.routes["POST", "/images/create"] = lambda h: h.chunks(
        b'{"status":"Pull', b'ing"}\r\n{"id":"a"}{"id":"b"}\r\n', b'{"error":"no space"}\r\n'
    )
    found = list(docker.stream("POST", "/images/create?fromImage=x"))
    assert found == [{"status": "Pulling"}, {"id": "a"}, {"id": "b"}, {"error": "no space"}]


def test_stream_refused(engine: Engine, docker: Docker) -> None:
    with pytest.raises(DockerError, match="No such thing") as caught:
        list(docker.stream("POST", "/images/create"))
    assert caught.value.status == 404


def test_stream_cut_in_the_middle_is_unavailable(engine: Engine, docker: Docker) -> None:
    def cut(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b'10\r\n{"status"')
        handler.close_connection = True

    engine.routes["POST", "/images/create"] = cut
    with pytest.raises(DockerUnavailable, match="connection broke"):
        list(docker.stream("POST", "/images/create"))


@pytest.mark.parametrize("tty", [False, True])
def test_logs_are_demultiplexed_unless_tty(engine: Engine, docker: Docker, tty: bool) -> None:
    engine.routes["GET", "/containers/c/json"] = {"Config": {"Tty": tty}}
    framed = frame(1, b"one\ntw") + frame(2, b"err\n") + frame(1, b"o\nlast")
    engine.routes["GET", "/containers/c/logs"] = lambda h: h.chunks(
        *([b"one\r\ntwo\r\n"] if tty else [framed[:5], framed[5:20], framed[20:]])
    )
    assert docker.logs("c", since=1.5, tail=10) == (["one", "two"] if tty else ["one", "err", "two", "last"])
    assert "since=1.500000000" in engine.seen[-1][1]
    assert "tail=10" in engine.seen[-1][1]
    assert "timestamps=1" in engine.seen[-1][1]


def test_absent_engine(tmp_path: Path) -> None:
    with pytest.raises(DockerUnavailable, match=r"nobody\.sock.*no such socket"):
        Docker(str(tmp_path / "nobody.sock")).info()


def test_silent_engine_times_out(engine: Engine) -> None:
    done = threading.Event()
    engine.routes["GET", "/info"] = lambda h: done.wait(5)
    with pytest.raises(DockerUnavailable, match="no answer in time"):
        Docker(str(engine.server_address), timeout=0.1).info()
    done.set()
