"""Proxies of Docker, whose API hides their passwords."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import docker_proxy
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.registry import Registry, reference

HIDDEN = "http://xxxxx:xxxxx@proxy:3128"
OWN = "http://ops:p%40ss@proxy:3128"


@pytest.fixture(autouse=True)
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of Docker on a host without daemon.json."""
    environment: dict[str, str] = {}
    monkeypatch.setattr(docker_proxy, "CONFIGURATION", tmp_path / "daemon.json")
    monkeypatch.setattr(docker_proxy, "service_environment", lambda unit: environment)
    return environment


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy"])
def test_a_password_is_that_of_docker_s_environment(engine: dict[str, str], name: str) -> None:
    engine[name] = OWN
    info = {"HttpProxy": "http://other:3128", "HttpsProxy": HIDDEN, "NoProxy": ""}
    assert docker_proxy.proxies(info) == {"http": "http://other:3128", "https": OWN}


def test_a_password_is_that_of_daemon_json(engine: dict[str, str]) -> None:
    docker_proxy.CONFIGURATION.write_text(json.dumps({"proxies": {"https-proxy": f"{OWN}/"}}), encoding="utf-8")
    engine["HTTPS_PROXY"] = "http://ops:another@proxy:3128"
    assert docker_proxy.proxies({"HttpsProxy": f"{HIDDEN}/"})["https"] == f"{OWN}/"


@pytest.mark.parametrize(
    ("shown", "own"),
    [
        ("", OWN),
        ("http://proxy:3128", OWN),
        (HIDDEN, "http://ops:secret@elsewhere:3128"),
        (HIDDEN, "http://proxy:3128"),
        (HIDDEN, ""),
    ],
    ids=["none", "open", "another", "without", "gone"],
)
def test_what_docker_shows_stays(engine: dict[str, str], shown: str, own: str) -> None:
    engine["HTTPS_PROXY"] = own
    assert docker_proxy.proxies({"HttpsProxy": shown}) == {"http": "", "https": shown}


@pytest.mark.parametrize("text", ["{", "[]", '{"proxies": 1}', "\x00", "x" * 70000])
def test_a_configuration_that_cannot_be_read(engine: dict[str, str], text: str) -> None:
    docker_proxy.CONFIGURATION.write_text(text, encoding="utf-8")
    engine["HTTP_PROXY"] = OWN
    assert docker_proxy.proxies({"HttpProxy": HIDDEN})["http"] == OWN


def test_a_registry_is_asked_with_the_password(engine: dict[str, str]) -> None:
    """Through a real proxy that wants it, with what `docker info` shows."""
    asked: list[str] = []

    class Proxy(BaseHTTPRequestHandler):
        def do_CONNECT(self) -> None:
            asked.append(self.headers.get("Proxy-Authorization", ""))
            self.send_error(502)

        def log_message(self, *words: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"127.0.0.1:{server.server_address[1]}"
        engine["HTTPS_PROXY"] = f"http://ops:p%40ss@{place}"
        info = {"HttpsProxy": f"http://xxxxx:xxxxx@{place}"}
        with pytest.raises(OSError, match="502"):
            Registry(reference("registry.example/x:1"), info, None, timeout=5).ping()
        server.shutdown()
    assert asked == [f"Basic {base64.b64encode(b'ops:p@ss').decode()}"]
