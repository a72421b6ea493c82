# SPDX-License-Identifier: Apache-2.0
"""Action: switches to a release, shows its phases, and fails naming both releases.

    - sparkfleet.dgx.release_switch:
        to: 8
        mode: deploy            # rollback, restart
        verb: site.yml
        start_timeout: 1800     # seconds
      register: switched        # switched.outcome, switched.release, switched.out_of_service_s, …

The job runs on the host: a broken connection or Ctrl-C does not end it, and the same call joins it again.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Any

from ansible import constants
from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.sparkfleet.dgx.plugins.plugin_utils import package  # noqa: F401 - finds what follows

from sparkfleet import SparkfleetError, operator_name, paths
from sparkfleet.fleet.reconnect import ReconnectingExecutor
from sparkfleet.planning import calibration, nodes
from sparkfleet.reporting import report
from sparkfleet.reporting.switch_progress import Follower, foreseen

display = Display()


class ActionModule(ActionBase):  # type: ignore[misc]  # ansible has no types
    """Repeats the module release_switch until the job is done."""

    TRANSFERS_FILES = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return what serves now; fail with cause, remedy, and what became of the previous release."""
        task_vars = task_vars or {}
        result: dict[str, Any] = super().run(tmp, task_vars)
        host = str(task_vars.get("inventory_hostname", "localhost"))
        # Named here, so that a job started by a call whose answer got lost is not started twice.
        options = {"controller": operator_name.name(), "slice": 3.0, "begin": secrets.token_hex(6), **self._task.args}
        try:
            name, hosts = nodes.members(host, self._templar.template(task_vars.get(nodes.NODES)), task_vars["groups"])
            if hosts:
                nodes.complete(name, hosts, task_vars["ansible_play_hosts"])
                check_forks(name, len(task_vars["ansible_play_hosts"]))
                options["begin"] = common_id(name, options)
        except SparkfleetError as error:
            raise AnsibleActionFail(f"{host}: {error}", result={"failure": "bad-input"}) from None
        follower, executor = Follower(host, float(options["slice"])), ReconnectingExecutor(self, host, display.display)
        while not follower.done:
            answer = executor.execute(
                module_name="sparkfleet.dgx.release_switch",
                module_args={**options, **follower.parameters()},
                task_vars=task_vars,
            )
            if answer.get("failed") or not answer.get("journal"):
                for line in foreseen(host, answer.get("would") or {}):
                    display.display(line)
                return {**result, **answer, **refused(host, answer)}
            for line in follower.take(answer):
                display.display(line)
        made = follower.result()
        try:
            calibration.remember(paths.STATE, host, list(made["measured"].values()))
        except OSError as error:
            display.warning(f"{host}: what was measured is not kept on this machine: {error.strerror}")
        return {**result, **made}


def check_forks(name: str, hosts: int) -> None:
    """Whether the hosts of a play switch at the same time: those of a group wait for each other. Raises
    SparkfleetError."""
    if hosts > constants.DEFAULT_FORKS:
        raise SparkfleetError(
            f"the hosts of the group {name} switch together, but Ansible works on {constants.DEFAULT_FORKS} hosts at a "
            f"time and this play has {hosts}: run with --forks {hosts}"
        )


def common_id(name: str, options: dict[str, Any]) -> str:
    """The id of a switch that all hosts of a group have in a run of Ansible."""
    which = [constants.DEFAULT_LOCAL_TMP, name, *(str(options.get(key)) for key in ("to", "mode", "verb"))]
    return hashlib.sha256("\n".join(which).encode()).hexdigest()[:12]


def refused(host: str, answer: dict[str, Any]) -> dict[str, Any]:
    """The message of an answer that is not a journal: check mode, or a refusal before anything has changed."""
    if not answer.get("failed") or not answer.get("failure"):
        return {}
    return {"msg": report.clean(f"{host}: {str(answer.get('msg') or '')[:4000]} [{str(answer['failure'])[:100]}]")}
