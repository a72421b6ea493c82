"""A server that a command drains and puts back, as HAProxy reports it while its health check fails."""

from __future__ import annotations

from typing import Any

import haproxy_server
import pytest

STATE = "# be_id be_name srv_id srv_name srv_addr srv_op_state srv_admin_state srv_uweight"


class Socket(haproxy_server.Haproxy):
    """Answers as HAProxy 3.0 does; `status` is what the statistics say, `admin` the state by command."""

    def __init__(self, status: str, admin: int) -> None:
        super().__init__("")
        self.status, self.admin, self.printed = status, admin, list[str]()

    def ask(self, command: str) -> str:
        self.printed.append(command)
        if command == "show servers state":
            return f"1\n{STATE}\n3 m 1 spark-1 192.0.2.1 2 {self.admin} 1\n3 m 2 spark-2 192.0.2.2 2 8 1\n"
        return f"# pxname,svname,scur,status,\nm,spark-1,0,{self.status},\n" if command.startswith("show") else "\n"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(haproxy_server, "READY_SECONDS", 0.0)
    monkeypatch.setattr(haproxy_server, "POLL", 0.01)


def ready(server: str) -> str:
    """What puts a server back, so that it gets no requests before a check."""
    return "; ".join(
        f"set server {server} {step}" for step in ("weight 0", "state ready", "health down", "weight 100%")
    )


class Coming(Socket):
    """A server whose check finds it up only after a while."""

    def ask(self, command: str) -> str:
        if command.startswith("set"):
            self.status, self.admin = "DOWN 1/2", 0
        elif command.startswith("show stat") and len(self.printed) > 6:
            self.status = "UP"
        return super().ask(command)


def test_a_server_is_ready_once_a_check_has_found_it_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(haproxy_server, "READY_SECONDS", 10.0)
    haproxy = Coming("MAINT", 1)
    assert haproxy_server.change(haproxy, ["spark-1"], "ready", 0.0, check=False)["changed"]
    assert haproxy.status == "UP" and haproxy.printed[3].startswith("show stat")


class Two(Socket):
    """Two servers in two backends; one of the four is out, one more only seems so."""

    def ask(self, command: str) -> str:
        self.printed.append(command)
        rows = ["m,a,0,UP,", "m,b,0,MAINT,", "n,a,0,DOWN,", "n,b,0,UP,", "n,c,0,MAINT,"]
        if command == "show servers state":
            return f"1\n{STATE}\n3 n 1 a - 0 1 1\n3 n 3 c - 0 1 1\n"
        return "# pxname,svname,scur,status,\n" + "\n".join(rows) if command.startswith("show") else "\n"


def test_several_servers_are_one_call_and_only_what_differs_is_changed() -> None:
    haproxy = Two("", 0)
    assert haproxy_server.change(haproxy, ["a", "b"], "ready", 0.0, check=False)["changed"]
    printed = [text for text in haproxy.printed if text.startswith("set")]
    assert printed == [ready("m/b"), ready("n/a")]


@pytest.mark.parametrize(
    ("status", "admin", "state", "asked"),
    [
        ("DRAIN", 8, "ready", True),
        ("DOWN", 8, "ready", True),  # it was drained, and its engine is only now back
        ("DOWN", 0, "ready", False),
        ("UP", 0, "ready", False),
        ("DOWN", 8, "drain", False),
        ("DOWN", 0, "drain", True),
        ("MAINT", 1, "ready", True),
    ],
)
def test_what_was_set_by_command_counts(status: str, admin: int, state: str, asked: bool) -> None:
    haproxy = Socket(status, admin)
    result: dict[str, Any] = haproxy_server.change(haproxy, ["spark-1"], state, 0.0, check=False)
    assert result["changed"] is asked
    # Sessions stick with what HAProxy calls drained.
    command = "set server m/spark-1 state maint" if state == "drain" else ready("m/spark-1")
    assert (command in haproxy.printed) is asked
