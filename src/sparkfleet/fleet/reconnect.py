"""Waiting for a job of a host over a connection that may break: the job does not mind, so neither does the wait."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from ansible.errors import AnsibleConnectionFailure

SECONDS = 300.0  # a Spark's restart takes less
PAUSE = 2.0


class ReconnectingExecutor:
    """Runs modules for an action plugin. A host that cannot be reached is tried again for `seconds`."""

    def __init__(self, action: Any, host: str, say: Callable[[str], Any], seconds: float = SECONDS) -> None:
        self.action, self.host, self.say, self.seconds = action, host, say, seconds

    def execute(self, **arguments: Any) -> dict[str, Any]:
        """`_execute_module`. Raises AnsibleConnectionFailure when the host stays away."""
        lost: float | None = None
        while True:
            try:
                answer: dict[str, Any] = self.action._execute_module(**arguments)
            except AnsibleConnectionFailure as error:
                if lost is None:
                    lost = time.monotonic()
                    why = next((line for line in str(error).splitlines()[::-1] if line.strip()), "no reason given")
                    self.say(f"{self.host}  connection lost; jobs on the host continue; reconnecting ({why[:120]})")
                if time.monotonic() - lost >= self.seconds:
                    raise
                time.sleep(PAUSE)
                with contextlib.suppress(Exception):  # it may be gone in any state
                    self.action._connection.reset()
            else:
                if lost is not None:
                    self.say(f"{self.host}  reconnected after {time.monotonic() - lost:.0f} s")
                return answer
