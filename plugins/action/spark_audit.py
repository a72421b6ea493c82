# SPDX-License-Identifier: Apache-2.0
"""Action: grades what the module spark_audit reads on a host; it fails at findings of a grade."""

from __future__ import annotations

import ipaddress
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.sparkfleet.dgx.plugins.plugin_utils import package  # noqa: F401 - finds what follows

from sparkfleet import SparkfleetError
from sparkfleet.diagnosis import audit
from sparkfleet.fleet import drift, gateway
from sparkfleet.planning import firewall, target, variables
from sparkfleet.reporting import report

display = Display()
#: Ports of every host with SSH, and of names and DHCP.
USUAL = {22: "SSH", 53: "DNS", 111: "rpcbind", 5353: "mDNS"}


class ActionModule(ActionBase):  # type: ignore[misc]  # ansible has no types
    """Runs the module spark_audit on the host."""

    TRANSFERS_FILES = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return `audit`, the findings; failed where one has the grade `fail_on` or a more severe one."""
        task_vars = task_vars or {}
        result: dict[str, Any] = super().run(tmp, task_vars)
        arguments = dict(self._task.args)
        fail_on = str(arguments.pop("fail_on", "high"))
        inspection = arguments.pop("inspection", None) or {}
        host = str(task_vars.get("inventory_hostname", "localhost"))
        if fail_on not in audit.GRADES:
            raise AnsibleActionFail(
                f"sparkfleet_audit_fail_on: {fail_on!r} is none of {', '.join(audit.GRADES)}",
                result={"failure": "bad-input"},
            )
        answer = self._execute_module(
            module_name="sparkfleet.dgx.spark_audit", module_args=arguments, task_vars=task_vars
        )
        if "facts" not in answer:
            return {**result, **answer}
        found = audit.findings(answer["facts"], self._expected(task_vars, inspection))
        for item in found:
            display.display(report.clean(f"{host}  {item.grade:<8} {item.id}: {item.what}"))
        if not found:
            display.display(f"{host}  nothing to report")
        result.update(changed=False, audit=[item.as_dict() for item in found])
        severe = audit.reaches(found, fail_on)
        if not severe:
            return result
        lines = [f"  {item.what}: {audit.CHECKS[item.id].remedy} [{item.id}]" for item in severe]
        head = f"{host}: {report.count(len(severe), 'finding')} of the grade {fail_on} or above"
        return {**result, "failed": True, "failure": "audit", "msg": "\n".join([f"{head}:", *lines])}

    def _expected(self, task_vars: dict[str, Any], inspection: dict[str, Any]) -> audit.Expected:
        names = [name for name in variables.options() if name in task_vars]
        values = {name: self._templar.template(task_vars[name]) for name in names if name not in variables.SECRETS}
        groups = task_vars.get("group_names", ())
        ports, engines, doors, wall = dict(USUAL), set[int](), set[int](), False
        try:
            settings = target.Settings.of(variables.settle(values))
            if "sparks" in groups:
                ports |= {port: "engine" for one in settings.each() for port in (one.port, one.engine_port)}
                ports |= {settings.guard_port: "guard", int(values.get("sparkfleet_share_port", 0)): "sharing"}
                engines = {engine.engine_port for engine in settings.each()}
                doors = {engine.port for engine in settings.each() if engine.on_demand}
                named = [ipaddress.ip_network(source) for source in firewall.allowed(settings.firewall_allow)]
                wall = settings.firewall and all(network.prefixlen for network in named)  # 0.0.0.0/0 names everyone
            if "gateways" in groups:
                own = ("sparkfleet_gateway_port", "sparkfleet_gateway_peer_port")
                numbers = [*(values[name] for name in own), *(values.get("sparkfleet_gateway_ports") or {}).values()]
                ports |= {int(number): "gateway" for number in numbers}
        except (SparkfleetError, ValueError) as error:
            raise AnsibleActionFail(
                f"{task_vars.get('inventory_hostname')}: {error}", result={"failure": "bad-input"}
            ) from None
        wants = gateway.truth(values.get("sparkfleet_docker_group", False))
        return audit.Expected(
            ports,
            engines,
            doors,
            wall,
            operator=settings.operator if wants else "",
            statistics_port=int(values.get("sparkfleet_gateway_statistics_port") or 0) if "gateways" in groups else 0,
            differs=drift.reasons(inspection["plan"], inspection["state"]) if "plan" in inspection else (),
        )
