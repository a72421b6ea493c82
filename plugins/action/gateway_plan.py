# SPDX-License-Identifier: Apache-2.0
"""Action: works out backends and servers of a gateway from the inventory. It contacts nobody.

- gateway_plan:
    keys: "{{ sparkfleet_gateway_keys }}"
  register: gateway       # gateway.backends, gateway.models
"""

from __future__ import annotations

from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

from sparkfleet import SparkfleetError, gateway

display = Display()


class ActionModule(ActionBase):  # type: ignore[misc]  # ansible has no types
    """Reads the variables of the group sparks."""

    TRANSFERS_FILES = False
    _VALID_ARGS = frozenset(("keys",))

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the plan; raise one error that names a bad value."""
        task_vars = task_vars or {}
        result: dict[str, Any] = super().run(tmp, task_vars)
        sparks = {name: task_vars["hostvars"][name] for name in task_vars["groups"].get("sparks", ())}
        try:
            gateway.keys(self._task.args.get("keys") or [])
            made = gateway.plan(gateway.settings(sparks))
        except SparkfleetError as error:
            raise AnsibleActionFail(str(error)) from None
        host = task_vars["inventory_hostname"]
        for item in made["backends"]:
            display.display(f"{host}  {item['repo']}: {', '.join(server['name'] for server in item['servers'])}")
        if made["drained"]:
            display.display(f"{host}  drained, left out: {', '.join(made['drained'])}")
        return {**result, **made, "changed": False}
