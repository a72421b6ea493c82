"""Engines of the simulator that are processes, Docker's API over them, and the real guard: one engine that always runs
and two that start on demand, of which one at a time has room."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.releases import Store

from tests.unit import ROOT
from tests.unit.fakes import fake_release
from tests.unit.fakes.fake_engine import Engine, Handler, deployed_engines

ENGINE = ROOT / "simulator" / "fault_engine" / "vllm"
ALWAYS, FIRST, SECOND = "vllm-a", "vllm-b", "vllm-c"
QUESTION = "What is the capital of France? Answer in one short sentence."


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in socks:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in socks]


class Host:
    """Docker's API over engines of the simulator that are processes, and a guard."""

    def __init__(
        self, docker: Engine, folder: Path, load_seconds: float, repos: dict[str, str], **settings: Any
    ) -> None:
        """`repos`: the models' names by service, org/SERVICE for the others; `settings`: of the guard."""
        self.docker, self.folder, self.load_seconds = docker, folder, load_seconds
        self.guard_port, *ports = free_ports(6)
        self.ports = dict(zip((ALWAYS, FIRST, SECOND), ports[:3], strict=True))
        self.door = dict(zip((FIRST, SECOND), ports[3:], strict=True))
        self.repos = {**{service: f"org/{service}" for service in self.ports}, **repos}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.started: dict[str, int] = {}
        self.did: list[str] = []
        engines = [
            fake_release.an_engine(
                service,
                self.ports[service],
                repo=self.repos[service],
                **(
                    {"on_demand": {"port": self.door[service], "needs_gib": 30.0, "room_gib": 40.0}}
                    if service != ALWAYS
                    else {}
                ),
            )
            for service in self.ports
        ]
        self.store: Store = deployed_engines(folder, *engines)
        self.settings = folder / "guard.json"
        data = {"interval": 0.1, "metrics_interval": 0.1, "listen_port": self.guard_port, "listen_address": "127.0.0.1"}
        data |= {"project_dir": str(self.store.project_dir), "state_dir": str(self.store.state_dir)}
        self.settings.write_text(json.dumps({**data, "on_demand_min_seconds": 0.0, **settings}), encoding="utf-8")
        for service in self.ports:
            for what, do in (("start", self.start), ("stop", self.stop)):
                self.docker.routes[("POST", f"/containers/{service}/{what}")] = self.route(service, do)
        self.docker.routes[("GET", "/containers/json")] = self.listed
        for service in self.ports:
            self.docker.routes[("GET", f"/containers/{service}/json")] = self.inspected(service)
            self.docker.routes[("GET", f"/containers/{service}/logs")] = lambda handler: handler.chunks()
        self.guard: subprocess.Popen[bytes] | None = None
        self.start(ALWAYS)
        self.run_guard()

    def runs(self, service: str) -> bool:
        process = self.processes.get(service)
        return process is not None and process.poll() is None

    def route(self, service: str, do: Callable[[str], None]) -> Callable[[Handler], None]:
        def answer(handler: Handler) -> None:
            do(service)
            handler.answer(200, {})

        return answer

    def start(self, service: str) -> None:
        self.did.append(f"start {service}")
        self.started[service] = self.started.get(service, 0) + 1
        environment = {**os.environ, "SIMULATED_LOAD_SECONDS": str(self.load_seconds)}
        environment["SIMULATED_COMMAND"] = str(self.folder / "no-command")
        environment["SIMULATED_PORT"] = str(self.ports[service])
        argv = [sys.executable, str(ENGINE), "serve", self.repos[service]]
        self.processes[service] = subprocess.Popen(argv, env=environment, stdout=subprocess.DEVNULL)

    def stop(self, service: str) -> None:
        self.did.append(f"stop {service}")
        self.processes[service].terminate()
        self.processes[service].wait(10)

    def listed(self, handler: Handler) -> None:
        project, name = "com.docker.compose.project", "com.docker.compose.service"
        items = [
            {
                "Id": service,
                "Names": [f"/{service}"],
                "State": "running" if self.runs(service) else "exited",
                "Labels": {project: "sparkfleet", name: service},
            }
            for service in self.ports
        ]
        handler.answer(200, items)

    def inspected(self, service: str) -> Callable[[Handler], None]:
        def answer(handler: Handler) -> None:
            stamp = f"2026-01-01T00:00:{self.started.get(service, 0):02}.0Z"
            state = {"Running": self.runs(service), "StartedAt": stamp}
            handler.answer(200, {"Id": service, "RestartCount": 0, "State": state, "Config": {"Tty": False}})

        return answer

    def run_guard(self) -> None:
        argv = [sys.executable, "-m", "sparkfleet_host", "guard", f"--settings={self.settings}"]
        argv += [f"--docker={self.docker.server_address}", f"--lock-file={self.store.lock_file}"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "plugins" / "module_utils")}
        with (self.folder / "log").open("a", encoding="utf-8") as log:
            self.guard = subprocess.Popen(argv, stdout=log, stderr=log, env=environment)
        self.until(lambda: self.ask("GET", self.guard_port, "/ready")[0] == 200)

    def end_guard(self, number: int = signal.SIGKILL) -> None:
        assert self.guard is not None
        self.guard.send_signal(number)
        self.guard.wait(70)

    def close(self) -> None:
        self.end_guard()
        for process in self.processes.values():
            process.kill()
            process.wait()

    def said(self) -> str:
        return (self.folder / "log").read_text(encoding="utf-8")

    def until(self, true: Callable[[], bool], seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)

    def ask(
        self, method: str, port: int, path: str, body: Any = None, timeout: float = 30.0
    ) -> tuple[int, dict[str, str], str]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
        try:
            data = json.dumps(body) if body is not None else None
            connection.request(method, path, data, {"Content-Type": "application/json"} if data else {})
            answer = connection.getresponse()
            return answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read().decode()
        except (OSError, http.client.HTTPException) as error:
            return 0, {}, f"{type(error).__name__}: {error}"
        finally:
            connection.close()

    def chat(
        self, service: str, stream: bool = False, timeout: float = 30.0, content: str = QUESTION
    ) -> tuple[int, dict[str, str], str]:
        body = {"model": self.repos[service], "messages": [{"role": "user", "content": content}], "stream": stream}
        return self.ask("POST", self.door[service], "/v1/chat/completions", {**body, "max_tokens": 32}, timeout)
