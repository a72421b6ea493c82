# SPDX-License-Identifier: Apache-2.0
"""Action: lets the hosts of a group, which run one engine together, do the same. It contacts no host."""

from __future__ import annotations

from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.sparkfleet.dgx.plugins.plugin_utils import package  # noqa: F401 - finds what follows

from sparkfleet import SparkfleetError
from sparkfleet.fleet import gateway, groups
from sparkfleet.planning import nodes
from sparkfleet.reporting import report

display = Display()


class ActionModule(ActionBase):  # type: ignore[misc]  # ansible has no types
    """Reads the plans of the group's hosts from their variables."""

    TRANSFERS_FILES = False
    _VALID_ARGS = frozenset(("reads",))

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the inspection of the host with what the group does; raise one error where its hosts differ, or one of
        them is not part of the run."""
        task_vars = task_vars or {}
        result: dict[str, Any] = super().run(tmp, task_vars)
        host, hostvars = task_vars["inventory_hostname"], task_vars["hostvars"]
        inspection = task_vars["sparkfleet_inspection"]
        group = (inspection.get("plan") or {}).get("group")
        if not group:
            return {**result, **inspection}
        hosts = [node["host"] for node in group["nodes"]]
        known = {name: hostvars[name].get("sparkfleet_inspection") or {} for name in hosts}
        there = [name for name in hosts if "plan" in known[name] and name in task_vars["ansible_play_hosts_all"]]
        reads = gateway.truth(self._task.args.get("reads", False))
        if reads and there != hosts:
            return {**result, **inspection}
        try:
            nodes.complete(group["name"], hosts, there)
            made = groups.deploys(group["name"], known)[host]
        except SparkfleetError as error:
            if reads:
                display.display(report.clean(f"{host}  {error}"))
                return {**result, **inspection}
            raise AnsibleActionFail(f"{host}: {error}", result={"failure": "bad-input"}) from None
        own = group.get("own") or inspection["plan"]["deploy"]
        # What the host would do by itself its own plan says.
        for line in [*made["stage"], *made["start"]] if not (own["stage"] or own["start"]) else []:
            display.display(report.clean(f"{host}  group {group['name']}, rank {group['rank']}: {line}"))
        plan = {**inspection["plan"], "deploy": made, "group": {**group, "own": own}}
        return {**result, "changed": False, "plan": plan, "state": inspection["state"]}
