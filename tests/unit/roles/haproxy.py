"""The distribution's HAProxy, run with what the role `gateway` renders, before engines and guards that are sockets."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template
from sparkfleet_host import key as engine_key

from sparkfleet.fleet import gateway
from tests.unit import ROOT

ROLE = ROOT / "roles" / "gateway"
LLAMA, OSS = "nvidia/Llama-3.1-8B-Instruct-FP8", "openai/gpt-oss-120b"
PROGRAM = shutil.which("haproxy", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
#: Shorter than in production, or of this test's own.
QUICK = {
    **{
        "gateway_listen": "127.0.0.1",
        "gateway_user": "",
        "gateway_log": "127.0.0.1:9",
        "gateway_check_interval": "100ms",
    },
    **{"gateway_request_timeout": "1s", "gateway_answer_timeout": "1500ms", "gateway_connect_timeout": "500ms"},
}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Spark(http.server.ThreadingHTTPServer):
    """An engine with its guard on one port: what it serves, and what it was asked."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, name: str, repo: str = LLAMA, port: int = 0) -> None:
        self.name, self.repo, self.key = name, repo, ""
        self.guarded, self.strict, self.refused = True, False, 0  # strict: asks for its key
        self.asked: list[tuple[str, str, dict[str, str], bytes]] = []
        self.checked: list[tuple[str, dict[str, str]]] = []
        self.behaviour: list[str] = []  # of the next requests: hang-up, half, 503, silent; right when empty
        super().__init__(("127.0.0.1", port), Engine)
        self.port = int(self.server_address[1])
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """What hangs up is part of the play."""


class Engine(http.server.BaseHTTPRequestHandler):
    server: Spark
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        spark, headers = self.server, {key.lower(): value for key, value in self.headers.items()}
        if self.path.startswith("/ready"):
            spark.checked.append((self.path, headers))
            asked, _, name = self.path.partition("&key=")
            right = spark.guarded and asked == f"/ready?model={spark.repo}" and name in ("", engine_key.name(spark.key))
            return self.answer(200 if right else 503, f"serving {spark.repo}\n" if right else "another-model\n")
        body = self.rfile.read(int(headers.get("content-length") or 0))
        if headers.get("transfer-encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        if spark.strict and self.path != "/v1/models" and headers.get("authorization") != f"Bearer {spark.key}":
            spark.refused += 1
            return self.answer(401, "another key")
        if self.path == "/v1/models" and "user-agent" not in headers and "x-client" not in headers:
            spark.checked.append((self.path, headers))
            if spark.key and headers.get("authorization") != f"Bearer {spark.key}":
                return self.answer(401, f"no key, no {spark.repo}")
            return self.answer(200, json.dumps({"data": [{"id": spark.repo}]}))
        spark.asked.append((self.command, self.path, headers, body))
        behaviour = spark.behaviour.pop(0) if spark.behaviour else ""
        if behaviour == "hang-up":
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        if behaviour == "half":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        if behaviour == "503":
            return self.answer(503, "busy")
        if behaviour == "silent":
            time.sleep(4)
        if behaviour == "slow":
            time.sleep(1)
        return self.answer(200, json.dumps({"spark": spark.name, "repo": spark.repo}))

    do_POST = do_HEAD = do_DELETE = do_OPTIONS = do_PUT = do_TRACE = do_GET

    def answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text.encode())

    def log_message(self, *args: Any) -> None:
        """Silence."""


def rendered(made: dict[str, Any], folder: Path, template: str = "haproxy.cfg.j2", **more: Any) -> str:
    """What Ansible makes of a template of the role, and the files that its tasks write next to it."""
    loader = DataLoader()
    loader.set_basedir(str(ROLE / "tasks"))
    defaults = loader.load_from_file(str(ROLE / "defaults" / "main.yml"), trusted_as_template=True)
    values = {
        **defaults,
        **{"inventory_hostname": "gateway-1", "ansible_managed": "", "gateway_backends": made["backends"]},
        "gateway_previous_backends": made["previous"],
        **{"gateway_models": made["models"], "gateway_engine_keys": made["engine_keys"], "gateway_folder": str(folder)},
        **more,
    }
    files = {}
    lookup = "{{{{ lookup('template', '{}') }}}}"
    for task in loader.load_from_file(str(ROLE / "tasks" / "main.yml"), trusted_as_template=True):
        for action, key in (("sparkfleet.dgx.secret_file", "path"), ("ansible.builtin.copy", "dest")):
            if action in task:
                for item in [*made["backends"], *made["previous"]] if "loop" in task else [None]:
                    templar = Templar(loader, variables={**values, "item": item})
                    files[templar.template(task[action][key])] = templar.template(task[action]["content"])
        if (written := task.get("ansible.builtin.template", {})).get("src", "haproxy.cfg.j2") != "haproxy.cfg.j2":
            source = trust_as_template(lookup.format(ROLE / "templates" / written["src"]))
            templar = Templar(loader, variables=values)
            files[templar.template(written["dest"])] = templar.template(source)
    folder.mkdir(parents=True, exist_ok=True)
    for path, content in files.items():
        Path(path).write_text(str(content or ""), encoding="utf-8")
    source = trust_as_template(lookup.format(ROLE / "templates" / template))
    return str(Templar(loader, variables=values).template(source))


def checked(text: str, folder: Path) -> str:
    """What `haproxy -c` says against it; "" for nothing."""
    assert PROGRAM, "haproxy is needed: apt-get install haproxy (scripts/test does it)"
    path = folder / "haproxy.cfg"
    path.write_text(text, encoding="utf-8")
    done = subprocess.run([PROGRAM, "-c", "-f", str(path)], capture_output=True, text=True, timeout=30, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


@dataclasses.dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: str

    @property
    def spark(self) -> str:
        return str(json.loads(self.body)["spark"])


@dataclasses.dataclass
class Gateway:
    """HAProxy that runs; `port` of clients, `statistics` of the page."""

    folder: Path
    port: int
    statistics: int
    process: subprocess.Popen[bytes]
    given: dict[str, Any] = dataclasses.field(default_factory=dict)

    def reload(self, hosts: dict[str, dict[str, Any]], installed: str | None = None) -> None:
        """As the role does it for another inventory; `installed` as gateway.plan takes it."""
        made = gateway.plan(gateway.settings(hosts), None, (), installed)
        error = checked(rendered(made, self.folder, **self.given), self.folder)
        assert not error, error
        before = self.runtime("show info").partition("\nPid: ")[2].split()[0]
        self.process.send_signal(signal.SIGUSR2)
        end = time.monotonic() + 30
        while time.monotonic() < end:
            with contextlib.suppress(OSError, IndexError):
                if self.runtime("show info").partition("\nPid: ")[2].split()[0] != before:
                    return
            time.sleep(0.02)
        raise AssertionError((self.folder / "haproxy.log").read_text())

    def ask(self, path: str = "/v1/completions", method: str = "POST", port: int = 0, **more: Any) -> Answer:
        """One request; `headers`, `body`, `key`, `tls` (a context)."""
        headers = {"X-Client": "test", **more.get("headers", {})}
        if "key" in more:
            headers["Authorization"] = f"Bearer {more['key']}"
        tls = more.get("tls")
        where, number = "127.0.0.1", port or self.port
        connection = (
            http.client.HTTPSConnection(where, number, timeout=10, context=tls)
            if tls
            else http.client.HTTPConnection(where, number, timeout=10)
        )
        with contextlib.closing(connection):
            connection.request(method, path, more.get("body", b"{}" if method == "POST" else None), headers)
            answer = connection.getresponse()
            got = {key.lower(): value for key, value in answer.getheaders()}
            return Answer(answer.status, got, answer.read().decode())

    def raw(self, data: bytes, seconds: float = 5.0) -> bytes:
        """What comes back for these bytes, until HAProxy closes or for some seconds."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as connection:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may refuse before it has read all
                connection.sendall(data)
            parts = []
            with contextlib.suppress(TimeoutError, ConnectionResetError):
                while part := connection.recv(65536):
                    parts.append(part)
            return b"".join(parts)

    def runtime(self, command: str) -> str:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5)
            connection.connect(str(self.folder / "admin.sock"))
            connection.sendall(command.encode() + b"\n")
            with connection.makefile() as file:
                return file.read()

    def states(self) -> dict[str, str]:
        """Of each backend/server its state."""
        lines = [line.split(",") for line in self.runtime("show stat -1 4 -1").splitlines() if line.strip()]
        head = [name.lstrip("# ") for name in lines[0]]
        rows = [dict(zip(head, line, strict=False)) for line in lines[1:]]
        return {f"{row['pxname']}/{row['svname']}": row["status"] for row in rows}

    def until(self, **states: str) -> None:
        """Wait until servers, BACKEND/SERVER with / and - as _, are in a state. Raises AssertionError."""
        end = time.monotonic() + 30
        while time.monotonic() < end:
            now = {key.replace("/", "_").replace("-", "_"): value for key, value in self.states().items()}
            if all(now.get(key, "").startswith(value) for key, value in states.items()):
                return
            time.sleep(0.05)
        raise AssertionError(f"{states} is expected: {self.states()}")


@contextlib.contextmanager
def running(folder: Path, hosts: dict[str, dict[str, Any]], **more: Any) -> Iterator[Gateway]:
    """HAProxy for an inventory; `ports` and `models` of gateway.plan, else variables of the role."""
    ports, models = more.pop("ports", None), more.pop("models", ())
    made = gateway.plan(gateway.settings(hosts), ports, models)
    port, statistics = free_port(), free_port()
    given = {**QUICK, "gateway_port": port, "gateway_statistics_port": statistics}
    given |= {"gateway_socket": str(folder / "admin.sock"), **more}
    error = checked(rendered(made, folder, **given), folder)
    assert not error, error
    assert PROGRAM
    with (folder / "haproxy.log").open("wb") as log:
        process = subprocess.Popen([PROGRAM, "-W", "-db", "-f", str(folder / "haproxy.cfg")], stdout=log, stderr=log)
    try:
        end = time.monotonic() + 30
        while not (folder / "admin.sock").exists() or not open_port(port):
            assert process.poll() is None and time.monotonic() < end, (folder / "haproxy.log").read_text()
            time.sleep(0.02)
        yield Gateway(folder, port, statistics, process, given)
    finally:
        process.terminate()
        process.wait()


def open_port(port: int, address: str = "127.0.0.1") -> bool:
    with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=10):
        return True
    return False
