# SPDX-License-Identifier: Apache-2.0
"""Action: checks what a Spark serves, prints it, and finds the release that a verb is about.

- sparkfleet.dgx.spark_status:
    show: false
    inspection: "{{ sparkfleet_inspection }}"
    # What the action spark_plan returned with `status: true`: no second round trip, and the drift from the inventory.
    want: previous          # current, previous, or the number of a release; fails with those there are
  register: status          # status.summary, status.release
- sparkfleet.dgx.spark_status:
    problem: "{{ ansible_failed_result.msg }}"    # why the Spark cannot be compared with the inventory
"""

from __future__ import annotations

from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.sparkfleet.dgx.plugins.plugin_utils import package  # noqa: F401 - finds what follows

from sparkfleet.fleet import drift, gateway
from sparkfleet.monitoring import page
from sparkfleet.reporting import history, status_page

display = Display()


class ActionModule(ActionBase):  # type: ignore[misc]  # ansible has no types
    """Runs the module spark_status on the host."""

    TRANSFERS_FILES = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return what the module found, with `summary`, and `release` if one was wanted."""
        task_vars = task_vars or {}
        result: dict[str, Any] = super().run(tmp, task_vars)
        arguments = dict(self._task.args)
        want = str(arguments.pop("want", "") or "")
        wants_history = bool(arguments.pop("history", False))
        inspection, problem = arguments.pop("inspection", None) or {}, str(arguments.pop("problem", "") or "")
        answer = (inspection.get("state") or {}).get("status")
        if answer is None:
            answer = self._execute_module(
                module_name="sparkfleet.dgx.spark_status", module_args=arguments, task_vars=task_vars
            )
        if "releases" not in answer:
            return {**result, **answer}
        host = str(task_vars.get("inventory_hostname", "localhost"))
        differs = drift.reasons(inspection["plan"], inspection["state"]) if inspection.get("plan") else None
        drained = gateway.truth(self._templar.template(task_vars.get("sparkfleet_drained", False)))
        answer["summary"] = status_page.summary(host, answer, differs, problem=_bare(problem), drained=drained)
        if wants_history:
            answer["history"] = history.events(answer)
            answer["shown"] = page.spark(answer["summary"], inspection.get("plan"), answer["history"])
        if want:
            answer["release"] = choose(host, want, answer["releases"])
        if arguments.get("show", True):
            display.display(status_page.table([answer["summary"]]).rstrip())
        return {**result, **answer, "changed": False}


def _bare(problem: str) -> str:
    """A failure's message in a line."""
    return " ".join(problem.removeprefix("Task failed: ").removeprefix("Action failed: ").split())


def choose(host: str, want: str, releases: dict[str, Any]) -> int:
    """The number of the release that is wanted. Raises AnsibleActionFail with those there are."""
    there = ", ".join(map(str, releases["numbers"])) or "none"
    if want in ("current", "previous"):
        if releases[want] is not None:
            return int(releases[want])
        first = f"; the current one is {releases['current']}" if releases["current"] else ""
        raise AnsibleActionFail(
            f"{host} has no {want} release{first}; there are {there}. Deploy with site.yml [bad-input]"
        )
    if not want.isdigit() or int(want) not in releases["numbers"]:
        raise AnsibleActionFail(f"{host} has no release {want}; there are {there} [bad-input]")
    return int(want)
