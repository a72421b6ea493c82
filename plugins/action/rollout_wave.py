# SPDX-License-Identifier: Apache-2.0
"""Action: whether the next wave of a rollout may begin: whether every Spark of the waves before it serves. It contacts
no host."""

from __future__ import annotations

from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.sparkfleet.dgx.plugins.plugin_utils import package  # noqa: F401 - finds what follows

from sparkfleet.fleet import rollout
from sparkfleet.reporting import report

display = Display()


class ActionModule(ActionBase):  # type: ignore[misc]  # ansible has no types
    """Reads from the variables of the hosts which of them were marked as done."""

    TRANSFERS_FILES = False
    _VALID_ARGS = frozenset(("schedule",))

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return whether to continue, which Sparks of earlier waves do not serve, and whether it is a canary's."""
        task_vars = task_vars or {}
        result: dict[str, Any] = super().run(tmp, task_vars)
        schedule, hostvars = self._task.args["schedule"], task_vars["hostvars"]
        waves = [[str(name) for name in wave] for wave in schedule["waves"]]
        number = rollout.number(waves, task_vars["ansible_play_batch"])
        done = {name for wave in waves for name in wave if "sparkfleet_rollout_done" in hostvars[name]}
        unfinished = rollout.unfinished(waves, number, done)
        go = not unfinished or schedule["on_failure"] == "continue"
        if not go:
            left = [name for wave in waves[number - 1 :] for name in wave]
            display.display(
                f"rollout  stops before wave {number} of {len(waves)}: {report.names(unfinished)} do not serve; "
                f"untouched: {report.names(left)}"
            )
        canary = schedule["labels"][number - 1] == rollout.CANARY_LABEL
        return {**result, "changed": False, "go": go, "unfinished": unfinished, "canary": canary}
