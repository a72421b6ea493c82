# SPDX-License-Identifier: Apache-2.0
"""Action: collects what this run knows of the fleet, and has the module write it for the status page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.sparkfleet.dgx.plugins.plugin_utils import (
    optional,
    package,  # noqa: F401 - finds what follows
)

from sparkfleet import operator_name
from sparkfleet.fleet import rollout
from sparkfleet.monitoring import page, targets


class ActionModule(ActionBase):  # type: ignore[misc]  # ansible has no types
    """Reads `sparkfleet_seen` of each Spark, which the action spark_status returned."""

    TRANSFERS_FILES = False
    _VALID_ARGS = frozenset(("path", "schedule"))

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return what the module did."""
        task_vars = task_vars or {}
        result: dict[str, Any] = super().run(tmp, task_vars)
        arguments = dict(self._task.args)
        schedule = arguments.pop("schedule", None)
        groups, known = task_vars["groups"], task_vars["hostvars"]
        names = list(groups.get("sparks", ()))
        news: dict[str, Any] = {
            "inventory": names,
            "gateways": list(groups.get("gateways", ())),
            "monitor": targets.monitor(groups),
        }
        if schedule:
            news["rollout"] = {**_rollout(schedule, task_vars), "by": operator_name.name()}
        else:
            seen = {name: (known[name].get("sparkfleet_seen") or {}).get("shown") for name in names}
            news["sparks"] = {name: shown for name, shown in seen.items() if shown}
        # The page is no reason for a run to fail.
        answer = optional.execute(
            self,
            "sparkfleet.dgx.fleet_file",
            {**arguments, "news": news},
            task_vars,
            f"the status page on {news['monitor']} was not updated",
        )
        return {**result, **answer}


def _rollout(schedule: Mapping[str, Any], task_vars: Mapping[str, Any]) -> dict[str, Any]:
    known = task_vars["hostvars"]
    names = [str(name) for wave in schedule["waves"] for name in wave]
    number = rollout.number(schedule["waves"], task_vars["ansible_play_batch"])
    done, failed = (
        {name for name in names if known[name].get(f"sparkfleet_rollout_{word}")} for word in ("done", "failed")
    )
    return page.rollout(schedule, number, bool(task_vars["sparkfleet_wave"]["go"]), done, failed)
