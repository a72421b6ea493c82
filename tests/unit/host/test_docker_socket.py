"""The Docker client against an engine of a few lines on a unix socket, and against its absence."""

from __future__ import annotations

import json
import struct
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.docker import (
    Docker,
    DockerError,
    DockerUnavailable,
)

from tests.unit.fakes.fake_engine import Engine, Handler


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


ODD = [None, 5, "text", [5], [{"Id": 5}], [{}], {"Id": []}, [None]]


@pytest.mark.parametrize("odd", ODD)
def test_a_list_of_another_form_is_one_typed_error(engine: Engine, docker: Docker, odd: Any) -> None:
    for path, ask in (("/containers/json", docker.containers), ("/images/json", docker.images)):
        engine.routes["GET", path] = lambda handler: handler.answer(200, odd)
        if odd is None:
            assert ask() == []
        else:
            with pytest.raises(DockerError, match=path):
                ask()


@pytest.mark.parametrize("odd", [None, 5, "text", [["a", "b"]]])
def test_what_is_no_object_is_one_typed_error(engine: Engine, docker: Docker, odd: Any) -> None:
    for path in ("/info", "/version", "/containers/c/json", "/images/i:1/json", "/networks/n"):
        engine.routes["GET", path] = lambda handler: handler.answer(200, odd)
    named = ((docker.container, "c"), (docker.image, "i:1"), (docker.network, "n"))
    for ask in (docker.info, docker.version, *(partial(inspect, name) for inspect, name in named)):
        with pytest.raises(DockerError, match="not an object"):
            ask()


def test_an_answer_is_bounded(engine: Engine, docker: Docker) -> None:
    engine.routes["GET", "/images/json"] = [{"Id": str(number)} for number in range(10_001)]
    with pytest.raises(DockerError, match="more than 10000"):
        docker.images()
    engine.routes["POST", "/x"] = lambda handler: handler.answer(500, {"message": "\x1b[31m" + "x" * 100_000})
    with pytest.raises(DockerError) as caught:
        docker.call("POST", "/x")
    assert len(str(caught.value)) == 4000 and "\x1b" not in str(caught.value)
    deep = b"[" * 100_000
    engine.routes["POST", "/images/create"] = lambda handler: handler.chunks(b'{"a":' + deep + b"\n")
    with pytest.raises(DockerError, match="broken JSON"):
        list(docker.stream("POST", "/images/create"))


def test_an_answer_that_is_nested_too_deep_is_no_json(engine: Engine, docker: Docker) -> None:
    def deep(handler: Handler) -> None:
        raw = b"[" * 100_000 + b"]" * 100_000
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(raw)))
        handler.end_headers()
        handler.wfile.write(raw)

    engine.routes["GET", "/info"] = deep
    with pytest.raises(DockerError, match="not an object"):
        docker.info()
