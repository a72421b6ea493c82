# SPDX-License-Identifier: Apache-2.0
"""Action: says how a Spark differs from the inventory, and fails where it does. It changes nothing."""

from __future__ import annotations

from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.sparkfleet.dgx.plugins.plugin_utils import package  # noqa: F401 - finds what follows

from sparkfleet.fleet import drift

display = Display()


class ActionModule(ActionBase):  # type: ignore[misc]  # ansible has no types
    """Compares; contacts no host."""

    TRANSFERS_FILES = False
    _VALID_ARGS = frozenset(("inspection", "verified"))

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return `drift`, a line a difference; failed unless there is none."""
        task_vars = task_vars or {}
        result: dict[str, Any] = super().run(tmp, task_vars)
        host = str(task_vars.get("inventory_hostname", "localhost"))
        inspection, verified = self._task.args["inspection"], self._task.args.get("verified") or {}
        found = drift.reasons(inspection["plan"], inspection["state"], verified.get("verified"))
        result.update(changed=False, drift=found)
        if found:
            return {**result, "failed": True, "msg": f"{host} differs from the inventory:\n  " + "\n  ".join(found)}
        display.display(f"{host}  matches the inventory")
        return result
