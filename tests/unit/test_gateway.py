"""The gateway: its plan, its configuration, the server that is drained, the guard's window that it looks through."""

from __future__ import annotations

import http.client
import json
import socketserver
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import haproxy_server
import jinja2
import pytest
from ansible.module_utils.sparkfleet_host.guard import Guard, Settings, Window, open_window
from ansible.module_utils.testing import patch_module_args

from sparkfleet import SparkfleetError, gateway

ROOT = Path(__file__).resolve().parents[2]
HOSTS: dict[str, dict[str, Any]] = {
    "spark-1": {"ansible_host": "192.0.2.11"},
    "spark-2": {"ansible_host": "192.0.2.12", "sparkfleet_address": "spark-2.lan", "sparkfleet_port": 8001},
    "spark-3": {"sparkfleet_model": "gpt-oss-120b", "sparkfleet_guard": False},
    "spark-4": {"sparkfleet_drained": True},
}


def plan(hosts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return gateway.plan(gateway.settings(hosts))


def test_a_backend_a_model_a_server_a_spark() -> None:
    made = plan(HOSTS)
    llama, oss = made["backends"]
    assert llama["repo"] == "nvidia/Llama-3.1-8B-Instruct-FP8"
    assert llama["servers"] == [
        {"name": "spark-1", "address": "192.0.2.11", "port": 8000, "check_port": 9109},
        {"name": "spark-2", "address": "spark-2.lan", "port": 8001, "check_port": 9109},
    ]
    assert [(server["name"], server["check_port"]) for server in oss["servers"]] == [("spark-3", 0)]
    assert made["drained"] == ["spark-4"]
    assert [item["id"] for item in json.loads(made["models"])["data"]] == [llama["repo"], oss["repo"]]


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"sparkfleet_model": "no-such"}, "spark-1: "),
        ({"sparkfleet_port": "http"}, "spark-1: sparkfleet_port 'http' is no TCP port"),
        ({"sparkfleet_guard_port": 70000}, "sparkfleet_guard_port 70000"),
        ({"sparkfleet_address": "a b"}, "sparkfleet_address 'a b'"),
        ({"sparkfleet_drained": True}, "no Spark is left"),
    ],
)
def test_what_is_wrong_is_named(variables: dict[str, Any], words: str) -> None:
    with pytest.raises(SparkfleetError, match=words):
        plan({"spark-1": variables})


def test_a_bad_key_is_told_by_its_place() -> None:
    assert gateway.keys(["0123456789"]) == ["0123456789"]
    with pytest.raises(SparkfleetError, match="entry 2") as error:
        gateway.keys(["0123456789", "my secret key"])
    assert "secret" not in str(error.value)


def render(made: dict[str, Any], **more: Any) -> str:
    folder = ROOT / "roles" / "gateway"
    values = {"gateway_folder": "/etc/haproxy/sparkfleet", "gateway_port": 8080, "gateway_statistics_port": 8404}
    values |= {"gateway_connections": 4096, "gateway_keys": [], "gateway_certificate": "", **more}
    options = {"trim_blocks": True, "keep_trailing_newline": True, "undefined": jinja2.StrictUndefined}
    environment = jinja2.Environment(**options)  # noqa: S701 - no HTML
    template = environment.from_string((folder / "templates" / "haproxy.cfg.j2").read_text(encoding="utf-8"))
    return template.render(**values, gateway_backends=made["backends"], gateway_models=made["models"])


def test_one_model_takes_everything() -> None:
    text = render(plan({"spark-1": {"ansible_host": "192.0.2.11"}}))
    assert "default_backend llama31-8b-fp8" in text and "json_query" not in text
    assert "server spark-1 192.0.2.11:8000 check port 9109" in text and "uri /ready" in text
    assert "on-marked-down" not in text and "retry-on conn-failure empty-response 503" in text
    assert "401" not in text and "ssl" not in text


def test_several_models_are_told_apart() -> None:
    text = render(plan(HOSTS), gateway_keys=["k" * 10], gateway_certificate="self-signed")
    assert "acl path_gpt-oss-120b path_beg /gpt-oss-120b/" in text
    assert "str(gpt-oss-120b) if { var(txn.model) -m str openai/gpt-oss-120b }" in text
    assert "http_auth_bearer -m str -f /etc/haproxy/sparkfleet/keys" in text and "kkkk" not in text
    assert "ssl crt /etc/haproxy/sparkfleet/gateway.pem" in text
    assert "http-check expect string openai/gpt-oss-120b" in text  # no guard there


class Haproxy(socketserver.ThreadingUnixStreamServer):
    """A runtime socket of a few lines; sessions end one a look."""

    daemon_threads = True

    def __init__(self, path: Path) -> None:
        self.status, self.sessions = "UP", 0
        self.asked: list[str] = []
        super().__init__(str(path), Ask)


class Ask(socketserver.StreamRequestHandler):
    server: Haproxy

    def handle(self) -> None:
        command = self.rfile.readline().decode().strip()
        self.server.asked.append(command)
        if command.startswith("show stat"):
            rows = ["# pxname,svname,scur,status,", f"m,spark-1,{self.server.sessions},{self.server.status},"]
            self.server.sessions = max(self.server.sessions - 1, 0)
            self.wfile.write("\n".join(rows).encode() + b"\n\n")
        elif command.endswith("drain"):
            self.server.status = "DRAIN"
            self.wfile.write(b"\n")
        elif command.endswith("ready"):
            self.server.status = "UP"
            self.wfile.write(b"\n")


@pytest.fixture
def haproxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Haproxy]:
    monkeypatch.setattr(haproxy_server, "POLL", 0.01)
    with Haproxy(tmp_path / "admin.sock") as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def change(haproxy: Haproxy, capsys: pytest.CaptureFixture[str], check: bool = False, **more: Any) -> dict[str, Any]:
    given = {"server": "spark-1", "socket": str(haproxy.server_address), "_ansible_check_mode": check, **more}
    with patch_module_args(given), pytest.raises(SystemExit):
        haproxy_server.main()
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_drain_waits_for_the_end_of_what_runs(haproxy: Haproxy, capsys: pytest.CaptureFixture[str]) -> None:
    haproxy.sessions = 4
    result = change(haproxy, capsys, state="drain")
    assert result["changed"] and result["sessions"] == 0 and result["backends"] == ["m"]
    assert haproxy.status == "DRAIN" and "set server m/spark-1 state drain" in haproxy.asked
    assert not change(haproxy, capsys, state="drain")["changed"]
    assert change(haproxy, capsys, state="ready")["changed"] and haproxy.status == "UP"
    assert not change(haproxy, capsys, state="ready")["changed"]


def test_drain_in_check_mode_and_with_little_patience(haproxy: Haproxy, capsys: pytest.CaptureFixture[str]) -> None:
    assert change(haproxy, capsys, check=True, state="drain")["changed"] and haproxy.status == "UP"
    haproxy.sessions = 10**6
    result = change(haproxy, capsys, state="drain", timeout=0.1)
    assert result["sessions"] > 0 and "failed" not in result


def test_a_spark_that_the_gateway_does_not_know(haproxy: Haproxy, capsys: pytest.CaptureFixture[str]) -> None:
    result = change(haproxy, capsys, server="spark-9", state="drain")
    assert not result["changed"] and result["backends"] == []


def test_a_gateway_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with patch_module_args({"server": "s", "state": "ready", "socket": "/nowhere.sock"}), pytest.raises(SystemExit):
        haproxy_server.main()
    assert "is the gateway deployed" in json.loads(capsys.readouterr().out)["msg"]


@pytest.fixture
def window() -> Iterator[Window]:
    """The guard's, on a port that was free."""
    said: list[str] = []
    watcher: Any = SimpleNamespace(guard=Guard(Settings()), looked_at=time.monotonic(), say=said.append, said=said)
    with Window(0, watcher, "127.0.0.1") as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def get(window: Window, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", window.server_address[1], timeout=5)
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_ready_is_what_the_guard_knows(window: Window) -> None:
    window.watcher.guard.engine = "serving"
    assert get(window, "/ready") == (200, "serving\n")
    window.watcher.guard.engine = "wedged"
    assert get(window, "/ready") == (503, "wedged\n")
    window.watcher.guard.engine, window.watcher.looked_at = "serving", time.monotonic() - 3600
    assert get(window, "/ready") == (503, "guard-stuck\n")
    assert "sparkfleet_engine_up 1" in get(window, "/metrics")[1]
    assert get(window, "/else")[0] == 404


def test_a_port_that_is_taken_is_said(window: Window) -> None:
    watcher: Any = window.watcher
    taken = Window(0, watcher)
    assert open_window(watcher, taken.server_address[1]) is False
    assert "Address already in use" in watcher.said[0]
    taken.server_close()
