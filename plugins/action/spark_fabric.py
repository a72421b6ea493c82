# SPDX-License-Identifier: Apache-2.0
"""Action: shows the network between Sparks, and checks it between the hosts of a group."""

from __future__ import annotations

from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.sparkfleet.dgx.plugins.plugin_utils import package  # noqa: F401 - finds what follows
from sparkfleet_host import fabric

from sparkfleet import SparkfleetError
from sparkfleet.planning import nodes
from sparkfleet.reporting import report

display = Display()
#: What the first call registers on each host.
FOUND = "fabric_found"


class ActionModule(ActionBase):  # type: ignore[misc]  # ansible has no types
    """Runs the module spark_fabric on the host. `hosts`: those of its group, by rank, which are asked as well."""

    TRANSFERS_FILES = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return what the module found; fail with each problem."""
        task_vars = task_vars or {}
        result: dict[str, Any] = super().run(tmp, task_vars)
        host, hostvars = task_vars["inventory_hostname"], task_vars["hostvars"]
        arguments = dict(self._task.args)
        hosts = [str(name) for name in arguments.pop("hosts", ())]
        others: dict[str, str] = {}
        if hosts:
            try:
                groups = task_vars["groups"]
                keys = (nodes.NODES, nodes.ADDRESS)
                known = {name: {key: hostvars[name].get(key) for key in keys} for name in groups["sparks"]}
                group = nodes.of(host, groups, known)
            except SparkfleetError as error:
                return {**result, "failed": True, "msg": f"{host}: {error}", "failure": "bad-input"}
            if group:
                others = {address: name for name, address in zip(group.hosts, group.addresses, strict=True)}
                arguments["peers"] = [address for address in others if address != group.address]
                if arguments.get("bandwidth"):
                    arguments["peers"].sort(key=lambda address: address != group.addresses[0])
        answer = self._execute_module(
            module_name="sparkfleet.dgx.spark_fabric", module_args=arguments, task_vars=task_vars
        )
        if "lines" not in answer:
            return {**result, **answer}
        said = list(answer["problems"])
        if not hosts:
            for line in [*(answer["lines"] or ["no ConnectX device was found"]), *answer["advice"], *said]:
                display.display(report.clean(f"{host}  {line}"))
            return {**result, **answer, "changed": False}
        for address, why in answer["reached"].items():
            speeds = ((answer["gbit_s"].get(address), "TCP"), (answer["rdma_gbit_s"].get(address), "RDMA"))
            measured = "".join(f", {speed:g} Gbit/s over {way}" for speed, way in speeds if speed)
            display.display(report.clean(f"{host}  {others[address]} ({address}): {why or 'reached'}{measured}"))
            said += [why] if why else []
        chosen = {name: (hostvars[name].get(FOUND) or {}).get("chosen") for name in hosts}
        if all(chosen.values()):
            said += fabric.between({name: item for name, item in chosen.items() if item})
        if said:
            message = f"{host}: the network between the Sparks is not fit: {'; '.join(said)}"
            return {**result, **answer, "failed": True, "msg": report.clean(message), "failure": "fabric-unfit"}
        return {**result, **answer, "changed": False}
