# SPDX-License-Identifier: Apache-2.0
"""Action: divides the planned Sparks into the waves of a rollout. It contacts no host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.sparkfleet.dgx.plugins.plugin_utils import package  # noqa: F401 - finds what follows

from sparkfleet import SparkfleetError
from sparkfleet.fleet import gateway, groups, rollout
from sparkfleet.reporting import report

display = Display()


class ActionModule(ActionBase):  # type: ignore[misc]  # ansible has no types
    """Reads the plans of the run from the variables of its hosts."""

    TRANSFERS_FILES = False
    _VALID_ARGS: frozenset[str] = frozenset()

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the waves; raise one error that names a bad value."""
        task_vars = task_vars or {}
        result: dict[str, Any] = super().run(tmp, task_vars)
        hostvars, names = task_vars["hostvars"], list(task_vars["groups"].get("sparks", ()))
        drained = [name for name in names if gateway.truth(hostvars[name].get("sparkfleet_drained", False))]
        inspected = [name for name in names if "sparkfleet_inspection" in hostvars[name]]
        planned = [name for name in inspected if "plan" in hostvars[name]["sparkfleet_inspection"]]
        lost = [name for name in inspected if name not in planned and name not in drained]
        if lost:
            display.display(f"rollout  no wave starts: {report.names(lost)} cannot be planned")
            planned = []
        hosts = [_host(name, hostvars[name]) for name in planned if name not in drained]
        try:
            shared = rollout.shared({name: hostvars[name] for name in planned})
            canary = rollout.canaries(shared[rollout.CANARY])
            # A group is one unit of a wave.
            units = groups.units({name: hostvars[name]["sparkfleet_inspection"]["plan"] for name in planned})
            heads = [host for host in hosts if host["name"] in units]
            waves = rollout.schedule(heads, canary, shared[rollout.WAVES])
            waves = [[name for first in wave for name in units[first]] for wave in waves]
        except SparkfleetError as error:
            raise AnsibleActionFail(str(error)) from None
        for line in [] if lost else rollout.lines(waves, hosts, drained):
            display.display(line)
        return {
            **result,
            "changed": False,
            "waves": waves,
            "labels": rollout.labels(waves, hosts, canary),
            "serial": [len(wave) for wave in waves] or [1],
            "on_failure": shared[rollout.ON_FAILURE],
            "hosts": hosts,
            "drained": drained,
        }


def _host(name: str, variables: Mapping[str, Any]) -> dict[str, Any]:
    plan = variables["sparkfleet_inspection"]["plan"]
    return {
        "name": name,
        "models": [engine["model"] for engine in plan["engines"]],
        "needed": bool(plan["deploy"]["needed"]),
    }
