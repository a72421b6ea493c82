# SPDX-License-Identifier: Apache-2.0
"""Action: works out backends and servers of a gateway from the inventory. It contacts no host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.sparkfleet.dgx.plugins.plugin_utils import package  # noqa: F401 - finds what follows

from sparkfleet import SparkfleetError
from sparkfleet.fleet import gateway
from sparkfleet.monitoring import page, targets
from sparkfleet.planning.compose import LOOPBACK

display = Display()
PORTS = {"port": 8080, "statistics_port": 8404, "peer_port": 8405}


def unfinished(names: Sequence[str], known: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Models of Sparks that a rollout of this run did not bring to their end: they serve what they served before."""
    found = []
    for name in names:
        if "sparkfleet_rollout_done" not in known[name]:
            releases = (known[name].get("sparkfleet_inspection") or {}).get("state", {}).get("releases") or {}
            lock = releases.get("locks", {}).get(str(releases.get("current"))) or {}
            found += [str(engine.get("model") or "") for engine in lock.get("engines") or []]
    return list(dict.fromkeys(filter(None, found)))


class ActionModule(ActionBase):  # type: ignore[misc]  # ansible has no types
    """Reads the variables of the groups sparks and gateways."""

    TRANSFERS_FILES = False
    _VALID_ARGS = frozenset(
        (
            "keys",
            "address",
            "port",
            "statistics_port",
            "peer_port",
            "ports",
            "models",
            "paths",
            "rotating",
            "monitoring",
            "prometheus_port",
            *gateway.QUOTAS,
        )
    )

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the plan; raise one error that names a bad value."""
        task_vars = task_vars or {}
        result: dict[str, Any] = super().run(tmp, task_vars)
        groups, known, host = task_vars["groups"], task_vars["hostvars"], task_vars["inventory_hostname"]
        arguments = self._task.args
        ports = arguments.get("ports") or {}
        try:
            keys = gateway.clients(
                arguments.get("keys") or [], {name: arguments.get(name, 0) for name in gateway.QUOTAS}
            )
            paths = gateway.paths(arguments.get("paths") or [])
            gateway.check_ports(
                {
                    **{f"sparkfleet_gateway_{name}": arguments.get(name, port) for name, port in PORTS.items()},
                    **{f"sparkfleet_gateway_ports.{model}": port for model, port in ports.items()},
                }
            )
            if arguments.get("address"):
                gateway.floating(str(arguments["address"]))
            sparks = gateway.settings({name: known[name] for name in gateway.answering(known, groups)})
            further = [*(arguments.get("models") or []), *unfinished(groups.get("sparkfleet_rollout", ()), known)]
            rotating = arguments.get("rotating") or {}
            made = gateway.plan(sparks, ports, further, rotating.get("engine_keys"))
            before = []
            if rotating.get("client"):
                before = gateway.previous_clients(str(rotating["keys"]), str(rotating["client"]), keys)
            gateways = [
                {"name": name, "address": gateway.address(name, known[name])} for name in groups.get("gateways", ())
            ]
            made["status"] = ""
            # Prometheus listens on loopback alone.
            if gateway.truth(arguments.get("monitoring", False)) and targets.monitor(groups) == host:
                port = gateway.port_number("sparkfleet_prometheus_port:", arguments.get("prometheus_port", 9112))
                made["status"] = f"{LOOPBACK}:{port}"
            made["status_expressions"] = list(dict.fromkeys(page.expressions().values()))
        except SparkfleetError as error:
            raise AnsibleActionFail(str(error), result={"failure": "bad-input"}) from None
        for item in made["backends"]:
            display.display(f"{host}  {item['repo']}: {', '.join(server['name'] for server in item['servers'])}")
        if made["drained"]:
            display.display(f"{host}  drained, left out: {', '.join(made['drained'])}")
        made.update(gateways=gateways, client_keys=[*keys, *before], previous_keys=before, paths=paths)
        own = (item["address"] for item in gateways if item["name"] == host)
        made["certificate_names"] = gateway.names(host, "localhost", *own, str(arguments.get("address") or ""))
        made["certificate_shown"] = gateway.shown(made["certificate_names"])
        # Keys of engines and clients are among it.
        return {**result, **made, "changed": False, "_ansible_no_log": True}
