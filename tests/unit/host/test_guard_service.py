"""The guard as a process: floods, endless answers, damaged files. What it decides and does is tested in process."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.releases import Store

from tests.unit import ROOT
from tests.unit.fakes.fake_engine import Engine, Handler, deployed

SERVICE = "vllm-m"
ID = "ab" * 32
REPO = "org/model"


class Hostile(ThreadingHTTPServer):
    """An engine that is ready when it is told so, and whose /metrics never ends where it shall not."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HostileHandler)
        self.ready, self.endless, self.asked = False, True, 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


class HostileHandler(BaseHTTPRequestHandler):
    server: Hostile

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/health":
            self.send_response(200 if self.server.ready else 503)
            self.end_headers()
            return
        self.server.asked += 1
        self.send_response(200)
        self.end_headers()
        line = b"vllm:_total_total" * 4000 + b"\n"
        while self.server.endless:
            self.wfile.write(line)
        self.wfile.write(b"vllm:generation_tokens_total 1.0\n")

    def do_POST(self) -> None:
        self.send_response(200)
        self.end_headers()


@pytest.fixture
def hostile() -> Iterator[Hostile]:
    with Hostile() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.endless = False
        server.shutdown()


def container(**state: Any) -> dict[str, Any]:
    """As `docker inspect` shows the engine."""
    return {
        "Id": ID,
        "Name": f"/{SERVICE}",
        "RestartCount": 0,
        "State": {"Running": True, "StartedAt": "2026-01-01T00:00:00.000000000Z", **state},
        "Config": {"Tty": False},
    }


def routes(engine: Engine, **state: Any) -> None:
    labels = {"com.docker.compose.project": "sparkfleet", "com.docker.compose.service": SERVICE}
    listed = {"Id": ID, "Names": [f"/{SERVICE}"], "State": "running", "Labels": labels, "Created": 1}
    engine.routes[("GET", "/containers/json")] = [listed]
    for name in (SERVICE, ID):
        engine.routes[("GET", f"/containers/{name}/json")] = container(**state)
        engine.routes[("GET", f"/containers/{name}/logs")] = long_line


def long_line(handler: Handler) -> None:
    """A log whose last line has 1 MB, in frames of 16 KiB as Docker sends it."""
    parts = [b"2026-01-01T00:00:01.000000000Z " + b"x" * 16000, *[b"y" * 16000] * 64, b"\n"]
    handler.chunks(*(struct.pack(">BxxxL", 1, len(part)) + part for part in parts))


@pytest.fixture
def store(tmp_path: Path, hostile: Hostile) -> Store:
    return deployed(tmp_path, hostile.server_port)


class Process:
    """The real guard, and what it needs."""

    def __init__(self, store: Store, engine: Engine, folder: Path, **settings: Any) -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = sock.getsockname()[1]
        self.folder = folder
        self.settings = folder / "guard.json"
        data = {"interval": 0.1, "metrics_interval": 0.1, "listen_port": self.port, "listen_address": "127.0.0.1"}
        data |= {"project_dir": str(store.project_dir), "state_dir": str(store.state_dir), **settings}
        self.settings.write_text(json.dumps(data), encoding="utf-8")
        self.argv = [sys.executable, "-m", "sparkfleet_host", "guard", f"--settings={self.settings}"]
        self.argv += [f"--docker={engine.server_address}", f"--lock-file={store.lock_file}"]
        self.notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notified.bind(str(folder / "notify"))
        self.notified.settimeout(10)
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT / "plugins" / "module_utils"),
            "NOTIFY_SOCKET": str(folder / "notify"),
            "WATCHDOG_USEC": "90000000",
        }

    def __enter__(self) -> Process:
        self.log = (self.folder / "log").open("w", encoding="utf-8")
        self.process = subprocess.Popen(self.argv, stdout=self.log, stderr=self.log, env=self.environment)
        deadline = time.monotonic() + 90  # an emulated Python starts slowly
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, http.client.HTTPException):
                self.get("/metrics")
                return self
            time.sleep(0.05)
        raise AssertionError(self.said())

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()
        self.notified.close()

    def get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=3)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def said(self) -> str:
        return (self.folder / "log").read_text(encoding="utf-8")

    def figure(self, name: str) -> int:
        found = re.search(rf"^{name}:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text(), re.M)
        assert found
        return int(found[1])

    def until(self, path: str, wanted: str, seconds: float = 15) -> None:
        deadline = time.monotonic() + seconds
        while (got := self.get(path)[1]) != wanted:
            assert time.monotonic() < deadline, (got, self.said())
            time.sleep(0.05)


def test_a_flood_an_endless_answer_and_a_long_line_do_not_hurt_it(
    store: Store, engine: Engine, hostile: Hostile, tmp_path: Path, record_property: Any
) -> None:
    routes(engine)
    idle: list[socket.socket] = []
    with Process(store, engine, tmp_path) as guard:
        guard.until("/ready", "loading\n")  # it reads the line of 1 MB at each observation
        hostile.ready = True
        guard.until("/ready", f"serving {REPO}\n")  # and the endless /metrics
        quick: list[float] = []
        for number in range(200):
            sock = socket.create_connection(("127.0.0.1", guard.port), timeout=3)
            idle.append(sock)
            with contextlib.suppress(OSError):
                sock.sendall(b"GET /ready HTTP/1.1\r\nX: " + b"z" * 7000)
            if number % 10 == 0:
                began = time.monotonic()
                assert guard.get("/ready")[0] == 200
                quick.append(time.monotonic() - began)
        before = hostile.asked
        deadline = time.monotonic() + 30
        while hostile.asked < before + 3 and time.monotonic() < deadline:
            assert guard.get("/ready")[0] == 200
            time.sleep(0.2)
        assert hostile.asked >= before + 3, guard.said()
        peak, threads = guard.figure("VmHWM") / 1024, guard.figure("Threads")
        descriptors = len([*Path(f"/proc/{guard.process.pid}/fd").iterdir()])
        assert guard.process.poll() is None
        record_property("peak_mib", peak)
        print(f"peak {peak:.0f} MiB, {threads} threads, {descriptors} descriptors, slowest {max(quick):.3f} s")
        assert peak < 100 and threads <= 4 and descriptors < 100 and max(quick) < 1.0
    for sock in idle:
        sock.close()


def test_connections_end_by_their_deadline_and_their_size(store: Store, engine: Engine, tmp_path: Path) -> None:
    routes(engine)
    with Process(store, engine, tmp_path) as guard:
        with socket.create_connection(("127.0.0.1", guard.port), timeout=10) as slow:
            began = time.monotonic()
            slow.sendall(b"GET ")
            assert slow.recv(100) == b"" and 3 < time.monotonic() - began < 8
        with socket.create_connection(("127.0.0.1", guard.port), timeout=10) as large:
            large.sendall(b"GET /ready HTTP/1.1\r\n" + b"A: b\r\n" * 1000)
            with contextlib.suppress(ConnectionResetError):
                large.sendall(b"A: b\r\n" * 1000)
                assert b" 431 " in large.recv(1000)
        for request, status in (
            (b"POST /ready HTTP/1.1\r\n\r\n", b" 405 "),
            (b"GET /../etc HTTP/1.1\r\n\r\n", b" 404 "),
            (b"\x16\x03\x01\r\n\r\n", b" 400 "),
            (b"GET /ready?model=org%2Fmodel HTTP/1.0\r\n\r\n", b" 503 "),
        ):
            with socket.create_connection(("127.0.0.1", guard.port), timeout=10) as sock:
                sock.sendall(request)
                assert status in sock.recv(1000)


def test_a_ready_guard_says_so_to_systemd_and_lives(store: Store, engine: Engine, tmp_path: Path) -> None:
    routes(engine)
    with Process(store, engine, tmp_path) as guard:
        seen = [guard.notified.recv(1000) for _ in range(6)]
        assert b"READY=1" in seen and seen.count(b"WATCHDOG=1") >= 3
        guard.process.send_signal(signal.SIGSTOP)
        with contextlib.suppress(TimeoutError):
            guard.notified.settimeout(0.5)
            while True:
                guard.notified.recv(1000)
        guard.process.send_signal(signal.SIGCONT)
        guard.notified.settimeout(10)
        assert guard.notified.recv(1000) == b"WATCHDOG=1"


@pytest.mark.parametrize(
    "text", ["{", '{"restarts": 7}', "[]", '{"known": {"release": "x"}}', "\x00" * 100, "{" * 10**5]
)
def test_a_damaged_state_is_set_aside_and_replaced(store: Store, engine: Engine, tmp_path: Path, text: str) -> None:
    routes(engine)
    path = store.state_dir / "guard-state.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    with Process(store, engine, tmp_path) as guard:
        guard.until("/ready", "loading\n")
        (kept,) = path.parent.glob("guard-state.json.damaged-*")
        assert kept.read_text(encoding="utf-8") == text
        assert f"{path} is damaged" in guard.said() and str(kept) in guard.said()
        deadline = time.monotonic() + 10
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
    assert json.loads(path.read_text(encoding="utf-8"))["engines"][SERVICE]["engine"] == "loading"


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "not JSON"), ('{"interval": "x"}', "interval: not a number"), ('{"speed": 1}', "unknown settings speed")],
)
def test_damaged_settings_are_one_clear_error(
    store: Store, engine: Engine, tmp_path: Path, text: str, said: str
) -> None:
    guard = Process(store, engine, tmp_path)
    guard.settings.write_text(text, encoding="utf-8")
    done = subprocess.run(guard.argv, capture_output=True, text=True, env=guard.environment, timeout=20, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"{guard.settings}: ") and said in done.stderr and done.stderr.count("\n") == 1
    guard.notified.close()
