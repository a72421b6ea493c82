# SPDX-License-Identifier: Apache-2.0
"""Action: refuses what would hurt the fleet as a whole, before anything changes. It runs once for all Sparks of a play
and contacts no host."""

from __future__ import annotations

from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible_collections.sparkfleet.dgx.plugins.plugin_utils import package  # noqa: F401 - finds what follows

from sparkfleet import SparkfleetError
from sparkfleet.fleet import gateway, outage
from sparkfleet.planning import nodes


class ActionModule(ActionBase):  # type: ignore[misc]  # ansible has no types
    """Reads what is known of the hosts of the play from their variables."""

    TRANSFERS_FILES = False
    _VALID_ARGS = frozenset({"stages", "verb"})

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Raise one error that names the Sparks."""
        task_vars = task_vars or {}
        result: dict[str, Any] = super().run(tmp, task_vars)
        verb, stages = self._task.args.get("verb", ""), self._task.args.get("stages") or []
        allowed = gateway.truth(self._templar.template(task_vars.get(outage.VARIABLE, False)))
        # Hosts that left the play, since nothing is done to them, count for identities.
        known = {name: task_vars["hostvars"][name] for name in task_vars["ansible_play_hosts_all"]}
        stopping: list[str] = []
        machines: dict[str, tuple[str, str]] = {}
        for name, variables in known.items():
            inspection, status = variables.get("sparkfleet_inspection") or {}, variables.get("status") or {}
            if verb:
                stops = "releases" in status and outage.stopped_by(verb, status)
            else:
                stops = "plan" in inspection and outage.stops(inspection["plan"], inspection["state"], stages)
            if verb:
                self._complete(name, variables, task_vars)
            stopping += [name] if stops and name in task_vars["ansible_play_hosts"] else []
            if "state" in inspection:
                system = inspection["state"]["os"]
                machines[name] = (str(system.get("machine_id", "")), str(system.get("boot_id", "")))
        try:
            stopping = outage.units(
                stopping, {name: self._members(name, known[name], task_vars)[1] for name in stopping}
            )
            outage.check_identities(machines)
            outage.check(stopping, allowed or bool(self._task.check_mode), waves=not verb and "deploy" in stages)
        except SparkfleetError as error:
            raise AnsibleActionFail(str(error)) from None
        return {**result, "changed": False}

    def _members(self, name: str, variables: Any, task_vars: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
        try:
            return nodes.members(name, variables.get(nodes.NODES), task_vars["groups"])
        except SparkfleetError as error:
            raise AnsibleActionFail(f"{name}: {error}", result={"failure": "bad-input"}) from None

    def _complete(self, name: str, variables: Any, task_vars: dict[str, Any]) -> None:
        """Whether a verb takes the group of a host as a whole."""
        group, hosts = self._members(name, variables, task_vars)
        try:
            nodes.complete(group, hosts, task_vars["ansible_play_hosts"])
        except SparkfleetError as error:
            raise AnsibleActionFail(f"{name}: {error}", result={"failure": "bad-input"}) from None
