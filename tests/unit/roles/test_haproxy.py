"""The gateway as HAProxy runs it: what the role renders for an inventory, talked to over sockets."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import ssl
import string
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import yaml
from hypothesis import strategies as st
from plugins.modules import haproxy_server
from sparkfleet_host import names

from sparkfleet import SparkfleetError
from sparkfleet.fleet import gateway as planned
from sparkfleet.monitoring import page
from tests.unit.roles.haproxy import (
    LLAMA,
    OSS,
    QUICK,
    ROLE,
    Answer,
    Spark,
    checked,
    free_port,
    open_port,
    rendered,
    running,
)

KEY = "a-key-of-a-client"
ENGINE_KEY = "a-key-of-engines"
Make = Callable[..., Spark]
DEFAULTS = yaml.safe_load((ROLE / "defaults" / "main.yml").read_text(encoding="utf-8"))
ROLE_PATHS = ["/health", *DEFAULTS["gateway_paths"]]


@pytest.fixture
def spark() -> Iterator[Make]:
    made: list[Spark] = []

    def make(name: str, repo: str = LLAMA) -> Spark:
        made.append(Spark(name, repo))
        return made[-1]

    yield make
    for item in made:
        item.close()


def host(spark: Spark, **more: Any) -> dict[str, Any]:
    """Its variables in an inventory."""
    place = {"ansible_host": "127.0.0.1", "sparkfleet_port": spark.port, "sparkfleet_guard_port": spark.port}
    return {
        **place,
        "sparkfleet_model": "llama31-8b-fp8",
        **{f"sparkfleet_{key}": value for key, value in more.items()},
    }


def test_one_model_goes_to_sparks_in_turn(tmp_path: Path, spark: Make) -> None:
    one, two = spark("spark-1"), spark("spark-2")
    with running(tmp_path, {"spark-1": host(one), "spark-2": host(two)}) as gateway:
        gateway.until(llama31_8b_fp8_spark_1="UP", llama31_8b_fp8_spark_2="UP")
        assert {gateway.ask().spark for _ in range(4)} == {"spark-1", "spark-2"}
        assert len({gateway.ask(headers={"X-Session-ID": "s"}).spark for _ in range(6)}) == 1
        assert gateway.ask("/v1/models", "GET").status == gateway.ask("/health", "GET").status == 200
        assert all(path == f"/ready?model={LLAMA}" for path, _ in one.checked)
        assert "authorization" not in one.asked[-1][2]


@pytest.mark.parametrize(
    ("status", "method", "path"),
    [
        *((404, "POST", path) for path in ("/pause", "/tokenize", "/metrics", "/v1", "/", "/V1/x", "/healthy")),
        *((404, "POST", path) for path in ("/v1/load_lora_adapter", "/v1/completions/", "/v1/completions/render")),
        *((400, "POST", f"/v1/{path}") for path in ("../pause", "%2e%2e/pause", "%2E./x", "..%2fx", "a/../../x", "..")),
        *((400, "POST", path) for path in ("//v1/x", "/v1//x", "/v1/./x", "/v1/x%5c..%5cy", "/v1/..;/pause", "/v1/.")),
        *((400, "POST", path) for path in ("/v1/%252e%252e/pause", "/v1/x\\..\\pause", "/v1/a%00", "/health/../pause")),
        *((405, method, "/v1/models") for method in ("PUT", "TRACE", "PATCH", "PROPFIND")),
        *((200, method, "/v1/responses/resp_?x=a%2F%2e%2e") for method in ("GET", "POST", "DELETE", "OPTIONS", "HEAD")),
        *((405, method, "/health") for method in ("POST", "DELETE", "OPTIONS")),
        (400, "GET", "/v1/%6dodels"),
        (400, "CONNECT", "/v1/models"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("door")
def test_what_is_let_through(door: Any, status: int, method: str, path: str) -> None:
    gateway, engine = door
    engine.asked.clear()
    line = f"{method} {path} HTTP/1.1\r\nHost: g\r\nX-Client: t\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    answer = gateway.raw(line.encode())
    assert answer.startswith(f"HTTP/1.1 {status} ".encode()), answer[:300]
    assert len(engine.asked) == (1 if status == 200 else 0)
    if engine.asked:
        assert engine.asked[0][1] == "/v1/responses/resp_?x=a%2F%2e%2e"


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    engine = Spark("spark-1")
    with running(tmp_path_factory.mktemp("door"), {"spark-1": host(engine)}) as gateway:
        gateway.until(llama31_8b_fp8_spark_1="UP")
        yield gateway, engine
    engine.close()


@pytest.mark.parametrize(
    "head", ["Content-Length: 5\r\n\r\nhello", "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"]
)
def test_health_takes_no_body(door: Any, head: str) -> None:
    gateway, engine = door
    engine.asked.clear()
    answer = gateway.raw(f"GET /health HTTP/1.1\r\nHost: g\r\nX-Client: t\r\nConnection: close\r\n{head}".encode())
    assert answer.startswith(b"HTTP/1.1 413 ") and engine.asked == []


def test_no_other_protocol_is_spoken_behind_the_door(door: Any) -> None:
    gateway, engine = door
    engine.asked.clear()
    for upgrade in ("h2c", "websocket"):
        head = f"GET /v1/models HTTP/1.1\r\nHost: g\r\nConnection: Upgrade\r\nUpgrade: {upgrade}\r\n"
        assert gateway.raw((head + "HTTP2-Settings: AAMAAABk\r\n\r\n").encode(), 2).startswith(b"HTTP/1.1 400 ")
    assert engine.asked == []


def http2(method: int, path: str) -> bytes:
    """An HTTP/2 connection with one request, as by prior knowledge; `method`: HPACK's index, 2 for GET, 3 for POST."""

    def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
        return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload

    def text(index: int, value: str) -> bytes:
        return bytes([index, len(value)]) + value.encode()

    # :method and :scheme http by index; :path, :authority and X-Client as text.
    client = b"\x00" + text(8, "x-client")[1:] + b"\x01t"
    head = bytes([0x80 | method, 0x86]) + text(0x04, path) + text(0x01, "g") + client
    return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0) + frame(1, 0x05, 1, head)


def test_http2_has_the_same_rules(door: Any) -> None:
    """HAProxy takes HTTP/2 without TLS from those who begin with it."""
    gateway, engine = door
    # The first byte of the answer's headers is its status: 200, 404, 400 of HPACK's static table.
    for method, path, status in (
        (2, "/v1/models", 0x88),
        (2, "/metrics", 0x8D),
        (2, "/v1/models/../metrics", 0x8C),
        (2, "//metrics", 0x8C),
        (3, "/pause", 0x8D),
    ):
        engine.asked.clear()
        answer, found = gateway.raw(http2(method, path), 1), 0
        while answer and not found:
            length, kind = int.from_bytes(answer[:3], "big"), answer[3]
            found = answer[9] if kind == 1 else 0
            answer = answer[9 + length :]
        assert found == status, (path, hex(found))
        assert bool(engine.asked) is (status == 0x88)


def test_a_request_is_bounded(tmp_path: Path, spark: Make) -> None:
    engine = spark("spark-1")
    with running(tmp_path, {"spark-1": host(engine)}, gateway_body=1000, gateway_answer_timeout="60s") as gateway:
        gateway.until(llama31_8b_fp8_spark_1="UP")
        assert gateway.ask(body=b"x" * 1001).status == 413 and gateway.ask(body=b"x" * 1000).status == 200
        began = time.monotonic()
        late = gateway.raw(
            b"POST /v1/completions HTTP/1.1\r\nHost: g\r\nX-Client: t\r\nContent-Length: 10\r\n\r\nhal", 8
        )
        assert late.startswith(b"HTTP/1.1 408 ") and time.monotonic() - began > 0.5
        assert gateway.raw(b"GET /v1/models HTTP/1.1\r\nHos", 8).startswith(b"HTTP/1.1 408 ")
        assert len(engine.asked) == 1


@pytest.mark.parametrize("length", ["", "Content-Length: 10\r\n"], ids=["chunked", "both"])
@pytest.mark.parametrize(
    ("method", "size", "status"),
    [("POST", 190_000, 200), ("POST", 260_000, 413), ("POST", 6_500_000, 413), ("DELETE", 6_500_000, 413)],
)
def test_a_body_without_a_length_is_bounded_too(door: Any, method: str, size: int, status: int, length: str) -> None:
    """Nor does one help that is not that of the chunks."""
    gateway, engine = door
    engine.asked.clear()
    path = "/v1/completions" if method == "POST" else "/v1/responses/resp_1"
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: g\r\nX-Client: t\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    chunk = b"1000\r\n" + b"x" * 4096 + b"\r\n"
    rest = size % 4096
    chunks = chunk * (size // 4096) + f"{rest:x}\r\n".encode() + b"x" * rest + b"\r\n"
    answer = gateway.raw(head.encode() + chunks + b"0\r\n\r\n", 10)
    # The answer may be lost where the rest of a body is in the way.
    assert answer.startswith(f"HTTP/1.1 {status} ".encode()) or (not answer and size > 1_000_000)
    assert [len(asked[3]) for asked in engine.asked] == [size] * (status == 200)


@pytest.mark.parametrize("guarded", [True, False])
def test_the_engines_key_is_rotated_without_a_failed_request(tmp_path: Path, spark: Make, guarded: bool) -> None:
    """The gateway has both keys while one Spark after the other gets the new one, then the new one alone."""
    old, new = "the-key-before", "the-key-after"
    sparks = {f"spark-{number}": spark(f"spark-{number}") for number in range(1, 4)}
    for item in sparks.values():
        item.key, item.strict, item.guarded = old, True, guarded

    def hosts(key: str) -> dict[str, dict[str, Any]]:
        return {name: host(item, engine_key=key, guard=guarded) for name, item in sparks.items()}

    def up(backend: str) -> set[str]:
        states = gateway.states().items()
        return {name.rpartition("/")[2] for name, state in states if name.startswith(f"{backend}/") and state == "UP"}

    def until(backend: str, wanted: set[str]) -> None:
        end = time.monotonic() + 10
        while up(backend) != wanted and time.monotonic() < end:
            time.sleep(0.02)
        assert up(backend) == wanted

    answers: list[int] = []
    over = threading.Event()

    def client(gateway: Any) -> None:
        while not over.is_set():
            answers.append(gateway.ask().status)

    name = "llama31-8b-fp8"
    with running(tmp_path, hosts(old)) as gateway:
        until(name, {*sparks})
        threads = [threading.Thread(target=client, args=(gateway,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            gateway.reload(hosts(new), (tmp_path / "engine_keys").read_text())
            until(f"{name}:previous", {*sparks})
            until(name, set())
            haproxy = haproxy_server.Haproxy(str(tmp_path / "admin.sock"))
            done: set[str] = set()
            for each, item in sparks.items():
                haproxy_server.change(haproxy, [each], "drain", 10, check=False)
                before = len(item.asked)
                item.key = new
                haproxy_server.change(haproxy, [each], "ready", 10, check=False)
                done.add(each)
                until(name, done)
                until(f"{name}:previous", {*sparks} - done)
                # It serves at once, with those that have the key before, as many requests as they.
                time.sleep(0.5)
                assert len(item.asked) > before
            # One that was interrupted and is run again has the same files, so that HAProxy is not reloaded.
            files = {path: path.read_text() for path in tmp_path.iterdir() if path.is_file() and path.suffix != ".log"}
            made = planned.plan(planned.settings(hosts(new)), None, (), (tmp_path / "engine_keys").read_text())
            (tmp_path / "haproxy.cfg").write_text(rendered(made, tmp_path, **gateway.given))
            assert files == {path: path.read_text() for path in files}
            gateway.reload(hosts(new))
            until(name, {*sparks})
            time.sleep(0.3)
        finally:
            over.set()
            for thread in threads:
                thread.join()
        assert {*answers} == {200} and len(answers) > 100
        assert [item.refused for item in sparks.values()] == [0, 0, 0]
        assert old not in (tmp_path / "engine_keys").read_text() + (tmp_path / "haproxy.cfg").read_text()


def test_one_address_has_so_many_connections(tmp_path: Path, spark: Make) -> None:
    engine = spark("spark-1")
    with running(
        tmp_path, {"spark-1": host(engine)}, gateway_client_connections=3, gateway_request_timeout="30s"
    ) as gateway:
        gateway.until(llama31_8b_fp8_spark_1="UP")
        time.sleep(0.2)
        held = [socket.create_connection(("127.0.0.1", gateway.port)) for _ in range(3)]
        end = time.monotonic() + 20
        while "conn_cur=3" not in gateway.runtime("show table sparkfleet") and time.monotonic() < end:
            time.sleep(0.05)
        with pytest.raises((OSError, AssertionError)):
            assert gateway.raw(b"GET /health HTTP/1.0\r\nX-Client: t\r\n\r\n", 2)
        for connection in held:
            connection.close()
        end, got = time.monotonic() + 20, b""
        while not got and time.monotonic() < end:
            with contextlib.suppress(OSError):
                got = gateway.raw(b"GET /health HTTP/1.0\r\nX-Client: t\r\n\r\n", 5)
        assert got.startswith(b"HTTP/1.1 200")


#: Every character that a key may have.
CHARACTERS = "".join(sorted(set(string.printable) - set(string.whitespace) - {","}))
KEYS = [KEY, CHARACTERS.lstrip("#").replace("#", "") + "#", CHARACTERS[::-1], "tail-====", "\\\\%[src]'\"{}"]


def test_keys_of_clients(tmp_path: Path, spark: Make) -> None:
    assert [client["key"] for client in planned.clients(KEYS)] == KEYS
    engine = spark("spark-1")
    with running(tmp_path, {"spark-1": host(engine)}, gateway_keys=planned.clients(KEYS)) as gateway:
        gateway.until(llama31_8b_fp8_spark_1="UP")
        for key in KEYS:
            assert gateway.ask(key=key).status == 200, key
        refused = gateway.ask()
        assert refused.status == 401 and refused.headers["www-authenticate"] == "Bearer"
        for wrong in ("", KEY[:-1], f"{KEY}x", KEY.upper(), f" {KEY}x", "tail-===", "#"):
            assert gateway.ask(key=wrong).status == 401, wrong
        assert gateway.ask("/v1/models", "GET").status == 401
        assert gateway.ask("/health", "GET").status == 200
        assert gateway.ask("/pause", key=KEY).status == 404
        assert all("authorization" not in headers for _, _, headers, _ in engine.asked)


def test_every_route_of_vllm_is_closed_unless_clients_need_it(tmp_path: Path, spark: Make) -> None:
    """Without a key, with a wrong one, with a client's; then with a variable that opens further paths."""
    engine = spark("spark-1")
    text = (Path(__file__).parent / "vllm_routes.txt").read_text(encoding="utf-8")
    routes = [line.replace("{response_id}", "resp_1") for line in text.splitlines() if not line.startswith("#")]
    opened = {*ROLE_PATHS, "/v1/responses/resp_1", "/v1/responses/resp_1/cancel"}
    assert len(routes) > 70 and opened - {"/v1/responses/resp_*"} <= {*routes}
    with running(tmp_path, {"spark-1": host(engine)}, gateway_keys=planned.clients([KEY])) as gateway:
        gateway.until(llama31_8b_fp8_spark_1="UP")
        for route in routes:
            engine.asked.clear()
            method = "GET" if route == "/health" else "POST"
            got = [gateway.ask(route, method, **more).status for more in ({}, {"key": "wrong-key"}, {"key": KEY})]
            wanted = [200] * 3 if route == "/health" else [401, 401, 200] if route in opened else [404] * 3
            assert got == wanted, route
            assert [path for _, path, _, _ in engine.asked] == [route] * wanted.count(200)
    further = planned.paths(["/tokenize", "/v1/completions/*"])
    with running(tmp_path / "two", {"spark-1": host(engine)}, gateway_further_paths=further) as gateway:
        gateway.until(llama31_8b_fp8_spark_1="UP")
        asked = ("/tokenize", "/v1/completions/render", "/v1/completions", "/detokenize", "/tokenize/x")
        assert [gateway.ask(path).status for path in asked] == [200, 200, 200, 404, 404]


def test_a_client_beyond_its_quota_waits_and_nobody_else(tmp_path: Path, spark: Make) -> None:
    engine = spark("spark-1")
    both = [{"name": "alice", "key": key} for key in ("alice-old-key", "alice-new-key")]
    clients = planned.clients([*both, {"name": "bob", "key": "bobs-own-key", "streams": 0}], {"streams": 2})
    with running(tmp_path, {"spark-1": host(engine)}, gateway_keys=clients) as gateway:
        gateway.until(llama31_8b_fp8_spark_1="UP")
        engine.behaviour = ["slow"] * 2
        got: list[Answer] = []
        keys = ("alice-old-key", "alice-new-key")
        running_now = [threading.Thread(target=lambda key=key: got.append(gateway.ask(key=key))) for key in keys]
        for thread in running_now:
            thread.start()
        end = time.monotonic() + 10
        while "conn_cur=2" not in gateway.runtime("show table sparkfleet-clients") and time.monotonic() < end:
            time.sleep(0.02)
        refused = gateway.ask(key="alice-old-key")
        assert refused.status == 429 and refused.headers["retry-after"] == "5"
        assert json.loads(refused.body)["error"]["type"] == "RateLimitError"
        assert [gateway.ask(key="bobs-own-key").status for _ in range(3)] == [200] * 3
        for thread in running_now:
            thread.join()
        assert [answer.status for answer in got] == [200, 200]
        assert gateway.ask(key="alice-new-key").status == 200
        assert len(engine.asked) == 6


def test_requests_a_second(tmp_path: Path, spark: Make) -> None:
    engine = spark("spark-1")
    clients = planned.clients([{"name": "alice", "key": KEY, "requests_per_second": 5}, "another-key"])
    with running(tmp_path, {"spark-1": host(engine)}, gateway_keys=clients) as gateway:
        gateway.until(llama31_8b_fp8_spark_1="UP")
        answers = [gateway.ask(key=KEY) for _ in range(20)]
        passed = [answer for answer in answers if answer.status == 200]
        assert len(passed) == 5 and {answer.status for answer in answers} == {200, 429}
        assert {answer.headers["retry-after"] for answer in answers if answer.status == 429} == {"1"}
        assert [gateway.ask(key="another-key").status for _ in range(20)] == [200] * 20
        assert len(engine.asked) == 25
        # What was refused does not count: who goes on asking is served again.
        end, served = time.monotonic() + 5, 0
        while time.monotonic() < end:
            served += gateway.ask(key=KEY).status == 200
            time.sleep(0.05)
        assert 15 <= served <= 30


def test_a_request_is_logged_by_the_name_of_its_key_and_without_what_was_asked(tmp_path: Path, spark: Make) -> None:
    engine = spark("spark-1")
    clients = planned.clients([{"name": "alice", "key": KEY}])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as log:
        log.bind(("127.0.0.1", 0))
        log.settimeout(5)
        where = f"127.0.0.1:{log.getsockname()[1]}"
        with running(tmp_path, {"spark-1": host(engine)}, gateway_keys=clients, gateway_log=where) as gateway:
            gateway.until(llama31_8b_fp8_spark_1="UP")
            gateway.ask("/v1/completions?q=a-secret-query", key=KEY, body=b'{"prompt": "a-secret-prompt"}')
            gateway.ask(key="a-wrong-key")
            gateway.raw(b'GET /a" client=bob\x01 HTTP/1.1\r\nHost: g\r\n\r\n', 1)
            gateway.raw(b'GET /a"client=bob\\ HTTP/1.1\r\nHost: g\r\nConnection: close\r\n\r\n', 1)
            lines: list[str] = []
            while len(lines) < 4:
                lines += [line for line in [log.recv(65536).decode()] if "client=" in line]
    parts = [dict(part.partition("=")[::2] for part in line.split() if "=" in part) for line in lines]
    (first,) = (line for line in parts if line["client"] == "alice")
    assert (first["model"], first["spark"], first["status"]) == ("llama31-8b-fp8", "spark-1", "200")
    assert (first["method"], first["path"]) == ("POST", '"/v1/completions"')
    assert int(first["bytes_in"]) > 100 and int(first["bytes_out"]) > 60 and int(first["total_ms"]) >= 0
    others = sorted((line["client"], line["status"], line["path"]) for line in parts if line is not first)
    wanted = [("-", "400", '"/a#22client=bob\\\\"'), ("-", "400", '"<BADREQ>"'), ("-", "401", '"/v1/completions"')]
    assert others == wanted
    printed = "".join(lines)
    assert KEY not in printed and "a-wrong-key" not in printed and "secret" not in printed


def test_a_body_without_a_key_is_not_waited_for(tmp_path: Path, spark: Make) -> None:
    engine = spark("spark-1")
    with running(
        tmp_path, {"spark-1": host(engine)}, gateway_keys=planned.clients([KEY]), gateway_request_timeout="60s"
    ) as gateway:
        gateway.until(llama31_8b_fp8_spark_1="UP")
        began = time.monotonic()
        printed = gateway.raw(
            b"POST /v1/completions HTTP/1.1\r\nHost: g\r\nContent-Length: 250000\r\n\r\n" + b"x" * 1000, 20
        )
        assert printed.startswith(b"HTTP/1.1 401 ") and time.monotonic() - began < 15


def test_a_key_may_come_as_anthropic_s_clients_send_it(tmp_path: Path, spark: Make) -> None:
    engine = spark("spark-1")
    engine.key = ENGINE_KEY
    hosts = {"spark-1": host(engine, engine_key=ENGINE_KEY)}
    with running(tmp_path, hosts, gateway_keys=planned.clients([KEY])) as gateway:
        gateway.until(llama31_8b_fp8_spark_1="UP")
        right, wrong = f"X-Api-Key: {KEY}\r\n", "X-Api-Key: another-key\r\n"
        bearer, other = f"Authorization: Bearer {KEY}\r\n", "Authorization: Bearer another-key\r\n"
        asked = {right: 200, wrong: 401, bearer + right: 200, bearer + wrong: 200, other + right: 200, other: 401}
        for sent, status in asked.items():
            head = f"POST /v1/messages HTTP/1.1\r\nHost: g\r\nX-Client: t\r\nConnection: close\r\n{sent}"
            answer = gateway.raw(f"{head}Content-Length: 2\r\n\r\n{{}}".encode(), 5)
            assert answer.startswith(f"HTTP/1.1 {status} ".encode()), (sent, answer)
        assert len(engine.asked) == 4
        for _, _, headers, _ in engine.asked:
            assert headers["authorization"] == f"Bearer {ENGINE_KEY}" and "x-api-key" not in headers


def test_the_engines_key_takes_the_place_of_the_clients(tmp_path: Path, spark: Make) -> None:
    engine, bare = spark("spark-1"), spark("spark-2")
    engine.key = bare.key = ENGINE_KEY
    bare.guarded = False
    hosts = {"spark-1": host(engine, engine_key=ENGINE_KEY), "spark-2": host(bare, engine_key=ENGINE_KEY, guard=False)}
    with running(tmp_path, hosts, gateway_keys=planned.clients([KEY])) as gateway:
        gateway.until(llama31_8b_fp8_spark_1="UP", llama31_8b_fp8_spark_2="UP")
        assert {gateway.ask(key=KEY).spark for _ in range(4)} == {"spark-1", "spark-2"}
        for item in (engine, bare):
            assert {headers["authorization"] for _, _, headers, _ in item.asked} == {f"Bearer {ENGINE_KEY}"}
    # Where every Spark has a guard, nothing but an engine gets the key.
    with running(tmp_path / "two", {"spark-1": hosts["spark-1"]}) as gateway:
        engine.checked.clear()
        gateway.until(llama31_8b_fp8_spark_1="UP")
        assert gateway.ask().status == 200
        assert all("authorization" not in headers for _, headers in engine.checked[2:])


def test_before_the_first_byte_another_spark_is_asked_and_never_after_it(tmp_path: Path, spark: Make) -> None:
    one, two = spark("spark-1"), spark("spark-2")
    with running(tmp_path, {"spark-1": host(one), "spark-2": host(two)}) as gateway:
        gateway.until(llama31_8b_fp8_spark_1="UP", llama31_8b_fp8_spark_2="UP")
        for behaviour in ("hang-up", "503"):
            one.behaviour, two.behaviour = [behaviour] * 30, []
            answers = [gateway.ask(body=b'{"prompt": "all of it"}') for _ in range(4)]
            assert [(answer.status, answer.spark) for answer in answers] == [(200, "spark-2")] * 4
            assert len(one.behaviour) < 30
            one.behaviour = []
            gateway.until(llama31_8b_fp8_spark_1="UP", llama31_8b_fp8_spark_2="UP")
        assert {body for _, _, _, body in (*one.asked, *two.asked)} == {b'{"prompt": "all of it"}'}
        before = len(one.asked) + len(two.asked)
        one.behaviour = two.behaviour = ["half"]
        printed = gateway.raw(b"GET /v1/models HTTP/1.1\r\nHost: g\r\nX-Client: t\r\n\r\n", 5)
        assert printed.endswith(b"half") and len(one.asked) + len(two.asked) == before + 1


def test_an_engine_may_be_silent_only_for_so_long(tmp_path: Path, spark: Make) -> None:
    engine = spark("spark-1")
    with running(tmp_path, {"spark-1": host(engine)}) as gateway:
        gateway.until(llama31_8b_fp8_spark_1="UP")
        engine.behaviour = ["silent"]
        assert gateway.ask().status == 504
        assert len(engine.asked) == 1  # what was started is not repeated elsewhere


def test_a_drained_spark_ends_what_it_has_and_gets_nothing_new(tmp_path: Path, spark: Make) -> None:
    one, two = spark("spark-1"), spark("spark-2")
    with running(tmp_path, {"spark-1": host(one), "spark-2": host(two)}) as gateway:
        gateway.until(llama31_8b_fp8_spark_1="UP", llama31_8b_fp8_spark_2="UP")
        session = {"X-Session-ID": "mine"}
        first = gateway.ask(headers=session).spark
        victim = one if first == "spark-1" else two
        victim.behaviour = ["slow"]
        got: list[Answer] = []
        thread = threading.Thread(target=lambda: got.append(gateway.ask(headers=session)))
        thread.start()
        time.sleep(0.3)
        gateway.runtime(f"set server llama31-8b-fp8/{first} state maint")
        before = len(victim.asked)
        assert all(gateway.ask(headers=session).spark != first for _ in range(4))
        thread.join()
        assert got[0].spark == first and len(victim.asked) == before
        gateway.runtime(f"set server llama31-8b-fp8/{first} state ready")
        gateway.until(**{f"llama31_8b_fp8_{first.replace('-', '_')}": "UP"})


def test_requests_of_a_model_go_where_it_is_served_whatever_the_inventory_says(tmp_path: Path, spark: Make) -> None:
    """A Spark that was switched or rolled back by itself: no step at the gateway."""
    one, two = spark("spark-1"), spark("spark-2", OSS)
    hosts = {"spark-1": host(one), "spark-2": host(two, model="gpt-oss-120b")}
    with running(tmp_path, hosts) as gateway:
        gateway.until(llama31_8b_fp8_spark_1="UP", llama31_8b_fp8_spark_2="DOWN", gpt_oss_120b_spark_2="UP")
        assert {gateway.ask(body=body(LLAMA)).spark for _ in range(4)} == {"spark-1"}
        assert {gateway.ask(body=body(OSS)).spark for _ in range(4)} == {"spark-2"}
        two.repo = LLAMA
        gateway.until(llama31_8b_fp8_spark_2="UP", gpt_oss_120b_spark_2="DOWN")
        assert {gateway.ask(body=body(LLAMA)).spark for _ in range(6)} == {"spark-1", "spark-2"}
        assert gateway.ask(body=body(OSS)).status == 503
        one.repo = OSS
        gateway.until(gpt_oss_120b_spark_1="UP")
        assert gateway.ask(body=body(OSS)).spark == "spark-1"


def test_the_guard_is_asked_at_its_own_port(tmp_path: Path, spark: Make) -> None:
    engine, guard = spark("spark-1"), spark("guard")
    engine.guarded = False
    with running(tmp_path, {"spark-1": {**host(engine), "sparkfleet_guard_port": guard.port}}) as gateway:
        gateway.until(llama31_8b_fp8_spark_1="UP")
        time.sleep(0.5)
        assert gateway.ask().spark == "spark-1" and guard.checked and not engine.checked and not guard.asked


def test_a_spark_without_a_guard_is_asked_for_its_models(tmp_path: Path, spark: Make) -> None:
    one, two = spark("spark-1"), spark("spark-2")
    one.guarded = two.guarded = False
    two.repo = OSS
    with running(tmp_path, {"spark-1": host(one, guard=False), "spark-2": host(two, guard=False)}) as gateway:
        gateway.until(llama31_8b_fp8_spark_1="UP", llama31_8b_fp8_spark_2="DOWN")
        two.repo = LLAMA
        gateway.until(llama31_8b_fp8_spark_2="UP")
        two.key = "that the gateway lacks"
        gateway.until(llama31_8b_fp8_spark_2="DOWN")


def body(model: str) -> bytes:
    return json.dumps({"model": model}).encode()


def test_models_by_port_path_name_and_body(tmp_path: Path, spark: Make) -> None:
    one, two = spark("spark-1"), spark("spark-2", OSS)
    hosts = {"spark-1": host(one), "spark-2": host(two, model="gpt-oss-120b")}
    port = free_port()
    with running(tmp_path, hosts, ports={"gpt-oss-120b": port}, gateway_keys=planned.clients([KEY])) as gateway:
        gateway.until(llama31_8b_fp8_spark_1="UP", gpt_oss_120b_spark_2="UP")

        def ask(path: str = "/v1/completions", **more: Any) -> Answer:
            return gateway.ask(path, key=KEY, **more)

        assert ask(port=port, body=body(LLAMA)).spark == "spark-2"
        assert ask("/gpt-oss-120b/v1/completions").spark == "spark-2" and two.asked[-1][1] == "/v1/completions"
        assert ask("/gpt-oss-120b/v1/models", method="GET").spark == "spark-2"
        assert ask(headers={"Host": "llama31-8b-fp8.lan"}).spark == "spark-1"
        assert ask(body=body(OSS)).spark == "spark-2" and ask(body=body(LLAMA)).spark == "spark-1"
        listed = json.loads(ask("/v1/models", method="GET").body)
        assert [item["id"] for item in listed["data"]] == [LLAMA, OSS]
        for wrong in (b"{}", b"not json", body("other/model"), body("")):
            assert ask(body=wrong).status == 404
        assert ask("/gpt-oss-120b/pause").status == ask("/gpt-oss-120bx/v1/models").status == 404
        assert ask("/gpt-oss-120b/v1/../pause").status == 400
        assert gateway.ask(port=port).status == gateway.ask("/gpt-oss-120b/v1/models").status == 401
        assert gateway.ask("/health", "GET").status == 200


def test_a_further_model_has_its_backend(tmp_path: Path, spark: Make) -> None:
    """A rollback to a model that no Spark is to serve any more."""
    one = spark("spark-1", OSS)
    with running(tmp_path, {"spark-1": host(one)}, models=["gpt-oss-120b"]) as gateway:
        gateway.until(llama31_8b_fp8_spark_1="DOWN", gpt_oss_120b_spark_1="UP")
        assert gateway.ask(body=body(OSS)).spark == "spark-1"


def test_tls(tmp_path: Path, spark: Make) -> None:
    folder = tmp_path / "etc"
    folder.mkdir()
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=g"]
    words += ["-addext", "subjectAltName=IP:127.0.0.1", "-out", str(folder / "gateway.pem")]
    subprocess.run([*words, "-keyout", str(folder / "gateway.pem.key")], check=True, capture_output=True)
    engine = spark("spark-1")
    with running(
        folder, {"spark-1": host(engine)}, gateway_certificate="self-signed", gateway_keys=planned.clients([KEY])
    ) as gateway:
        gateway.until(llama31_8b_fp8_spark_1="UP")
        trusted = ssl.create_default_context(cafile=str(folder / "gateway.pem"))
        assert gateway.ask(tls=trusted, key=KEY).status == 200 and gateway.ask(tls=trusted).status == 401
        old = ssl.create_default_context(cafile=str(folder / "gateway.pem"))
        old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises((ssl.SSLError, OSError)):
            gateway.ask(tls=old, key=KEY)
        assert b"200" not in gateway.raw(b"GET /health HTTP/1.0\r\n\r\n", 2)


def test_statistics_are_for_loopback_and_who_is_told(tmp_path: Path, spark: Make) -> None:
    engine = spark("spark-1")
    with running(tmp_path, {"spark-1": host(engine)}) as gateway:
        assert open_port(gateway.statistics) and not open_port(gateway.statistics, "127.0.0.2")
        assert gateway.ask("/ready", "GET", gateway.statistics).status == 200
        assert "haproxy_process" in gateway.ask("/metrics", "GET", gateway.statistics).body
    with running(tmp_path, {"spark-1": host(engine)}, gateway_statistics_listen="127.0.0.2") as gateway:
        assert open_port(gateway.statistics) and open_port(gateway.statistics, "127.0.0.2")
        assert not open_port(gateway.statistics, "127.0.0.3")
    with running(tmp_path, {"spark-1": host(engine)}, gateway_statistics_listen="*") as gateway:
        assert open_port(gateway.statistics) and open_port(gateway.statistics, "127.0.0.3")


def test_gateways_share_sessions(tmp_path: Path, spark: Make) -> None:
    sparks = [spark(f"spark-{number}") for number in range(1, 5)]
    hosts = {item.name: host(item) for item in sparks}
    port = free_port()
    peers = [{"name": f"gateway-{number}", "address": f"127.0.0.{number}"} for number in (1, 2)]
    more = {"gateway_peers": peers, "gateway_peer_port": port}
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    with (
        running(tmp_path / "1", hosts, inventory_hostname="gateway-1", **more) as first,
        running(tmp_path / "2", hosts, inventory_hostname="gateway-2", **more) as second,
    ):
        for gateway in (first, second):
            gateway.until(**{f"llama31_8b_fp8_spark_{number}": "UP" for number in range(1, 5)})
        sessions = [f"s{number}" for number in range(8)]
        end = time.monotonic() + 8
        while "established" not in first.runtime("show peers").lower() and time.monotonic() < end:
            time.sleep(0.1)
        where = {name: first.ask(headers={"X-Session-ID": name}).spark for name in sessions}
        time.sleep(1)
        # In another order: without a table of its own it would give them to others.
        assert {name: second.ask(headers={"X-Session-ID": name}).spark for name in reversed(sessions)} == where
        assert open_port(port, "127.0.0.1") and not open_port(port, "127.0.0.3")


def test_a_name_that_stands_for_nothing_joins_when_it_comes_back(tmp_path: Path, spark: Make) -> None:
    """The configuration is accepted, HAProxy starts, the other Sparks serve."""
    one, two = spark("spark-1"), spark("spark-2")
    hosts = {"spark-1": host(one), "spark-2": {**host(two), "ansible_host": "no-such-spark.invalid"}}
    answers: dict[str, list[str]] = {}
    with running(tmp_path, hosts) as gateway:
        gateway.until(llama31_8b_fp8_spark_1="UP", llama31_8b_fp8_spark_2="DOWN")
        assert [gateway.ask().spark for _ in range(4)] == ["spark-1"] * 4
        printed: list[str] = []
        keeper = names.Names(str(tmp_path / "admin.sock"), lambda name: answers.get(name, []), printed.append)
        keeper.step()
        assert printed == []
        answers["no-such-spark.invalid"] = ["127.0.0.1"]
        keeper.step()
        time.sleep(0.2)
        keeper.step()
        gateway.until(llama31_8b_fp8_spark_2="UP")
        assert {gateway.ask().spark for _ in range(4)} == {"spark-1", "spark-2"}
        # A new lease; then the name is lost, and the address stays.
        answers["no-such-spark.invalid"] = ["127.0.0.3"]
        for _ in range(3):
            keeper.step()
            time.sleep(0.1)
        gateway.until(llama31_8b_fp8_spark_2="DOWN")
        answers["no-such-spark.invalid"] = ["127.0.0.1"]
        for _ in range(3):
            keeper.step()
            time.sleep(0.1)
        answers.clear()
        keeper.step()
        gateway.until(llama31_8b_fp8_spark_2="UP")
        assert len(printed) == 3 and "no-such-spark.invalid is 127.0.0.1, was 100::1" in printed[0]


def test_names_are_resolved_as_the_host_does() -> None:
    assert names.resolve("127.0.0.1") == ["127.0.0.1"] and names.resolve("no-such-spark.invalid") == []
    assert names.resolve("localhost")[0] == "127.0.0.1" and names.resolve("x" * 300) == []


NAMES = st.text(min_size=1, max_size=20) | st.from_regex(r"spark[-_.@+ ]?[0-9]", fullmatch=True)
PORTS = st.integers(0, 70000) | st.sampled_from(["8000", "080", "", None, "x", True, 8000.5])
SECRETS = st.just("") | st.text(max_size=40) | st.from_regex(r"[!-~]{7,12}", fullmatch=True)
CLIENTS = st.fixed_dictionaries(
    {"key": SECRETS},
    optional={"name": st.text(max_size=8) | st.from_regex(r"[A-Za-z0-9_.@-]{1,8}", fullmatch=True), "streams": PORTS},
)
PLACES = st.ip_addresses().map(str) | st.sampled_from(
    ["a.invalid", "b.local.invalid", "::1%eth0", "a b", "x;y", "", "-a"]
)
MODELS = st.sampled_from(["llama31-8b-fp8", "gpt-oss-120b", "gpt-oss-20b", "no-such", "../x"])
SPARKS = st.fixed_dictionaries(
    {"ansible_host": PLACES},
    optional={
        **{"sparkfleet_model": MODELS, "sparkfleet_port": PORTS, "sparkfleet_guard_port": PORTS},
        **{"sparkfleet_guard": st.booleans(), "sparkfleet_drained": st.booleans(), "sparkfleet_engine_key": SECRETS},
    },
)


@hypothesis.settings(max_examples=15, phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate])
@hypothesis.given(
    hosts=st.dictionaries(NAMES, SPARKS, min_size=1, max_size=4),
    keys=st.lists(SECRETS | CLIENTS, max_size=3),
    further_paths=st.lists(st.from_regex(r"/[!-~]{0,12}", fullmatch=True) | st.text(max_size=8), max_size=2),
    ports=st.dictionaries(MODELS, PORTS, max_size=2),
    further=st.lists(MODELS, max_size=2),
)
def test_what_renders_is_accepted_and_what_is_not_is_refused_with_one_message(
    tmp_path_factory: pytest.TempPathFactory, hosts: Any, keys: Any, ports: Any, further: Any, further_paths: Any
) -> None:
    folder = tmp_path_factory.mktemp("any")
    try:
        clients = planned.clients(keys)
        paths = planned.paths(further_paths)
        planned.check_ports({"sparkfleet_gateway_port": 8080, **ports})
        made = planned.plan(planned.settings(hosts), ports, further)
    except SparkfleetError as error:
        assert "\n" not in str(error) and str(error).isprintable()
        return
    error = checked(rendered(made, folder, **QUICK, gateway_keys=clients, gateway_further_paths=paths), folder)
    assert not error, error


# -- the status page ---------------------------------------------------------------------------------------------------

EXPRESSIONS = list(page.expressions().values())
RANGE = "&start=1700000000&end=1700003600&step=30"


class Monitor(Spark):
    """What the gateway takes for Prometheus: says what it was asked."""


def status_page(monitor: Spark, **more: Any) -> dict[str, Any]:
    """The role's variables for it."""
    address = f"127.0.0.1:{monitor.port}"
    return {"gateway_status": address, "gateway_status_expressions": EXPRESSIONS, **more}


def query(expr: str = EXPRESSIONS[0], path: str = "query", rest: str = "") -> str:
    return f"/status/api/v1/{path}?query={urllib.parse.quote(expr, safe='')}{rest}"


@pytest.fixture(scope="module")
def page_door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    engine, monitor = Spark("spark-1"), Monitor("monitor")
    with running(tmp_path_factory.mktemp("page"), {"spark-1": host(engine)}, **status_page(monitor)) as gateway:
        gateway.until(llama31_8b_fp8_spark_1="UP")
        yield gateway, monitor, engine
    engine.close()
    monitor.close()


@pytest.mark.parametrize("expr", EXPRESSIONS)
def test_the_page_is_given_what_it_asks(page_door: Any, expr: str) -> None:
    gateway, monitor, _ = page_door
    for path, rest in (("query", ""), ("query_range", RANGE)):
        monitor.asked.clear()
        asked = query(expr, path, rest)
        assert gateway.ask(asked, "GET").status == 200
        assert [item[1] for item in monitor.asked] == [asked.removeprefix("/status")]


@pytest.mark.parametrize(
    ("status", "path"),
    [
        *((200, f"/status/{name}") for name in ("", "page.js", "page.css", "icon.svg", "fleet.json", "api/v1/alerts")),
        (302, "/status"),
        *((404, f"/status/{name}") for name in ("index.html", "metrics", "api/v1/series", "api/v1/admin/tsdb")),
        *((404, f"/status/{name}") for name in ("api/v1/query/", "api/v1/", "-/quit", "graph", "user/")),
        *((404, f"/status/api/v1/{name}") for name in ("targets", "status/config", "labels", "rules")),
        *((404, name) for name in ("/statusx", "/api/v1/query", "/user/", "/user/fleet.json")),
        *((400, f"/status/{name}") for name in ("../api/v1/targets", "%2e%2e/x", "./x", "api/v1/../v1/targets", "/x")),
        (400, "/status/api/v1/query"),
        (400, query("up")),
        (400, query(EXPRESSIONS[0] + " or up")),
        (400, query(rest="&query=up")),
        (400, query(rest="&%71uery=up")),
        (400, query(rest=";query=up")),
        (400, query(rest="&time=1700000000")),
        (400, "/status/api/v1/query?%71uery=up&" + query().partition("?")[2]),
        (400, "/status/api/v1/query?x=1;query=up&" + query().partition("?")[2]),
        (400, query(path="query_range", rest="&start=1700000000&end=1700086400&step=15")),
        (400, query(path="query_range", rest="&start=1700000000&end=9999999999&step=99")),
        (200, query(path="query_range", rest="&start=1700000000&end=1700086400&step=720")),
        (400, query(path="query_range", rest="&start=1700000000&end=1700000400&step=0")),
    ],
)  # fmt: skip
def test_nothing_else_of_prometheus_is(page_door: Any, status: int, path: str) -> None:
    gateway, monitor, engine = page_door
    monitor.asked.clear()
    engine.asked.clear()
    answer = gateway.raw(f"GET {path} HTTP/1.1\r\nHost: g\r\nX-Client: t\r\nConnection: close\r\n\r\n".encode())
    assert answer.startswith(f"HTTP/1.1 {status} ".encode()), answer[:300]
    assert len(monitor.asked) == (status == 200) and engine.asked == []


@pytest.mark.parametrize(("status", "method"), [(405, "POST"), (405, "DELETE"), (405, "OPTIONS"), (200, "HEAD")])
def test_the_page_is_only_read(page_door: Any, status: int, method: str) -> None:
    gateway, monitor, _ = page_door
    monitor.asked.clear()
    assert gateway.ask(query(), method, body=None).status == status and len(monitor.asked) == (status == 200)


def test_the_page_takes_no_body(page_door: Any) -> None:
    gateway, monitor, _ = page_door
    monitor.asked.clear()
    body = b"query=up"
    head = (
        f"GET {query()} HTTP/1.1\r\nHost: g\r\nContent-Type: application/x-www-form-urlencoded\r\nConnection: close\r\n"
    )
    assert gateway.raw(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body).startswith(b"HTTP/1.1 413 ")
    assert monitor.asked == []


def test_the_page_may_ask_no_other_host(page_door: Any) -> None:
    gateway, _, _ = page_door
    headers = gateway.ask("/status/", "GET").headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"


def test_clients_keep_their_api_beside_the_page(page_door: Any) -> None:
    gateway, monitor, engine = page_door
    monitor.asked.clear()
    engine.asked.clear()
    assert gateway.ask().spark == "spark-1" and monitor.asked == []


def test_the_page_is_behind_the_clients_keys(tmp_path: Path, spark: Make) -> None:
    engine, monitor = spark("spark-1"), spark("monitor")
    clients = planned.clients([{"name": "alice", "key": KEY, "streams": 1, "requests_per_second": 1}])
    variables = status_page(monitor, gateway_keys=clients)

    def basic(password: str, name: str = "any") -> dict[str, str]:
        return {"Authorization": f"Basic {base64.b64encode(f'{name}:{password}'.encode()).decode()}"}

    with running(tmp_path, {"spark-1": host(engine)}, **variables) as gateway:
        gateway.until(llama31_8b_fp8_spark_1="UP")
        for path in ("/status", "/status/", "/status/fleet.json", "/status/api/v1/alerts", query(), "/status/other"):
            for headers in ({}, basic("wrong"), basic(""), basic("x", KEY), {"Authorization": "Bearer wrong"}):
                answer = gateway.ask(path, "GET", headers=headers)
                assert answer.status == 401 and answer.headers["www-authenticate"].startswith("Basic "), path
        assert monitor.asked == []
        # As often as the page asks: its requests are not the client's quota.
        for _ in range(6):
            assert gateway.ask(query(), "GET", headers=basic(KEY)).status == 200
        assert gateway.ask("/status/", "GET", key=KEY).status == 200
        assert all("authorization" not in headers for _, _, headers, _ in monitor.asked) and len(monitor.asked) == 7
        # The API takes a key as before, and not as a password.
        assert gateway.ask(headers=basic(KEY)).status == 401 and gateway.ask(key=KEY).status == 200


def test_without_a_monitor_here_there_is_no_page(door: Any) -> None:
    gateway, _ = door
    assert {gateway.ask(path, "GET").status for path in ("/status", "/status/", query())} == {404}


def test_prometheus_that_does_not_answer_is_said_at_once(tmp_path: Path, spark: Make) -> None:
    engine, monitor = spark("spark-1"), spark("monitor")
    variables = status_page(monitor)
    monitor.close()
    with running(tmp_path, {"spark-1": host(engine)}, **variables) as gateway:
        gateway.until(llama31_8b_fp8_spark_1="UP")
        began = time.monotonic()
        assert gateway.ask("/status/", "GET").status == 503 and time.monotonic() - began < 3
        assert gateway.ask().status == 200
