"""A connection that breaks while a job on the host continues."""

from __future__ import annotations

from typing import Any

import pytest
from ansible.errors import AnsibleConnectionFailure

from sparkfleet.fleet.reconnect import ReconnectingExecutor


class Action:
    """An action plugin whose host is away for some calls."""

    def __init__(self, away: int) -> None:
        self.away, self.resets = away, 0
        self._connection = self

    def reset(self) -> None:
        self.resets += 1
        raise RuntimeError("no control socket")

    def _execute_module(self, **arguments: Any) -> dict[str, Any]:
        if self.away:
            self.away -= 1
            raise AnsibleConnectionFailure("Failed to connect\nNo route to host\n")
        return arguments


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("sparkfleet.fleet.reconnect.time.monotonic", lambda: now[0])
    monkeypatch.setattr("sparkfleet.fleet.reconnect.time.sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))


@pytest.mark.usefixtures("clock")
def test_a_host_that_comes_back() -> None:
    printed: list[str] = []
    action = Action(away=5)
    assert ReconnectingExecutor(action, "spark-1", printed.append).execute(module_name="m") == {"module_name": "m"}
    assert printed == [
        "spark-1  connection lost; jobs on the host continue; reconnecting (No route to host)",
        "spark-1  reconnected after 10 s",
    ]
    assert action.resets == 5


@pytest.mark.usefixtures("clock")
def test_a_host_that_stays_away() -> None:
    action = Action(away=10**6)
    with pytest.raises(AnsibleConnectionFailure, match="No route to host"):
        ReconnectingExecutor(action, "spark-1", lambda text: None, seconds=60).execute()
    assert 10**6 - action.away == 31


def test_a_host_that_is_there_needs_no_word() -> None:
    printed: list[str] = []
    assert ReconnectingExecutor(Action(0), "spark-1", printed.append).execute(a=1) == {"a": 1} and printed == []
