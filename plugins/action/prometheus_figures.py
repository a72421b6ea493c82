# SPDX-License-Identifier: Apache-2.0
"""Action: has the module ask Prometheus for what the status page shows."""

from __future__ import annotations

from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.sparkfleet.dgx.plugins.plugin_utils import (
    optional,
    package,  # noqa: F401 - finds what follows
)

from sparkfleet.monitoring import page, targets


class ActionModule(ActionBase):  # type: ignore[misc]  # ansible has no types
    """Runs the module prometheus_figures on the host."""

    TRANSFERS_FILES = False
    _VALID_ARGS = frozenset(("port", "hours"))

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return what the module found."""
        task_vars = task_vars or {}
        result: dict[str, Any] = super().run(tmp, task_vars)
        arguments = {**self._task.args, "queries": page.queries(), "totals": page.totals()}
        # Without them the report has what the Sparks themselves say.
        monitor = targets.monitor(task_vars["groups"])
        answer = optional.execute(
            self, "sparkfleet.dgx.prometheus_figures", arguments, task_vars, f"no figures of Prometheus on {monitor}"
        )
        return {**result, **answer}
