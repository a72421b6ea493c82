# SPDX-License-Identifier: Apache-2.0
"""Action: works out from the inventory what Prometheus scrapes and whom Alertmanager tells. It contacts no host."""

from __future__ import annotations

from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.sparkfleet.dgx.plugins.plugin_utils import package  # noqa: F401 - finds what follows

from sparkfleet import SparkfleetError
from sparkfleet.fleet import receivers
from sparkfleet.monitoring import rules, targets

display = Display()


class ActionModule(ActionBase):  # type: ignore[misc]  # ansible has no types
    """Reads the variables of the groups sparks, gateways and monitors."""

    TRANSFERS_FILES = False
    _VALID_ARGS = frozenset(("receivers",))

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the plan; raise one error that names a bad value."""
        task_vars = task_vars or {}
        result: dict[str, Any] = super().run(tmp, task_vars)
        groups = {name: list(task_vars["groups"].get(name, ())) for name in targets.GROUPS}
        known = task_vars["hostvars"]
        try:
            made = targets.plan(groups, {host: known[host] for names in groups.values() for host in names})
            told = receivers.configuration(self._task.args["receivers"])
        except SparkfleetError as error:
            raise AnsibleActionFail(str(error)) from None
        host = task_vars["inventory_hostname"]
        if host == made["monitor"]:
            for line in made["unreached"]:
                display.warning(line)
        made["rules"] = rules.inventory_file(made["meant"])
        # Passwords and tokens are among it.
        return {**result, **made, "receivers": told, "changed": False, "_ansible_no_log": True}
