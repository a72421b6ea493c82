"""The module hub_token, against a Hub."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import hub_token
import pytest
from ansible.module_utils.testing import patch_module_args

from tests.unit.fakes import fake_hub
from tests.unit.fakes.fake_hub import Hub

TOKEN = "hf_the-new-token"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with fake_hub.serve(Hub(accounts={TOKEN: "alice"})) as served:
        yield served


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Any:
    def ask(**arguments: Any) -> dict[str, Any]:
        with patch_module_args({"token": TOKEN, **arguments}), pytest.raises(SystemExit):
            hub_token.main()
        printed = capsys.readouterr().out
        assert TOKEN not in printed
        result: dict[str, Any] = json.loads(printed)
        return result

    return ask


def test_a_token_has_an_account(hub: Hub, ask: Any) -> None:
    result = ask(endpoint=f"{hub.url}/")
    assert (result["account"], result["changed"]) == ("alice", False)
    assert hub.tokens_seen == [("/api/whoami-v2", f"Bearer {TOKEN}")]


def test_a_token_that_is_not_accepted(hub: Hub, ask: Any) -> None:
    hub.accounts.clear()
    result = ask(endpoint=hub.url)
    assert result["failed"] and result["failure"] == "hub-token-rejected"
    assert "does not accept the new token (401): create a read token at" in result["msg"]


@pytest.mark.parametrize(
    "answer",
    [b"{}", b"[]", b'{"name": 7}', b"<html>", b'{"name": "' + b"a" * 300 + b'"}', b"[" * 9000, b" " * (2 << 20)],
)
def test_an_odd_answer_is_none(hub: Hub, ask: Any, answer: bytes) -> None:
    hub.answer["whoami"] = answer
    result = ask(endpoint=hub.url)
    assert result["failure"] == "hub-answer-odd" and len(result["msg"]) < 400


def test_an_answer_without_end_is_given_up(hub: Hub, ask: Any) -> None:
    hub.drip["whoami"] = "head"
    began = time.monotonic()
    result = ask(endpoint=hub.url, seconds=0.5)
    assert result["failure"] == "hub-unreachable" and "no answer within 0.5 s" in result["msg"]
    assert time.monotonic() - began < 5


def test_a_hub_that_is_not_there(ask: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    result = ask(endpoint=f"http://127.0.0.1:{port}")
    assert result["failure"] == "hub-unreachable"
    assert "check network and proxy, and run again" in result["msg"]


def test_the_token_does_not_leave_for_another_host_or_without_tls(hub: Hub, ask: Any) -> None:
    with fake_hub.serve(Hub(answer={"whoami": b'{"name": "mallory"}'}), "127.0.0.2") as other:
        hub.redirect["whoami"] = f"{other.url}/api/whoami-v2"
        ask(endpoint=hub.url)
        assert other.tokens_seen == [("/api/whoami-v2", "")]
    assert ask(endpoint="http://hub.example")["failure"] == "hub-token-in-clear"
    assert ask(endpoint="https://[hub.example")["failure"] == "bad-input"


def test_the_proxy_gets_its_password_and_not_the_token(ask: Any) -> None:
    heads: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError), server.accept()[0] as client:
                heads.append(client.recv(65536))
                client.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")

        threading.Thread(target=serve, daemon=True).start()
        proxy = f"http://fleet:a-pass-word@127.0.0.1:{server.getsockname()[1]}"
        result = ask(endpoint="https://hub.example", proxy=proxy)
    assert result["failure"] == "hub-unreachable" and "407" in result["msg"] and "a-pass-word" not in json.dumps(result)
    assert heads[0].startswith(b"CONNECT hub.example:443") and TOKEN.encode() not in heads[0]
    assert b"proxy-authorization: basic " in heads[0].lower()
