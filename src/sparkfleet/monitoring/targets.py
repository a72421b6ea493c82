"""What Prometheus scrapes: a pure function of the inventory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparkfleet import SparkfleetError
from sparkfleet.fleet import gateway
from sparkfleet.planning import target
from sparkfleet.planning.compose import LOOPBACK

#: Groups of the inventory, the one that has the monitor first.
GROUPS = ("monitors", "gateways", "sparks")


def monitor(groups: Mapping[str, Sequence[str]]) -> str:
    """The host that monitors the others: the first of the group monitors, else of gateways, else of sparks; "" where
    there is none of them."""
    return next((groups[name][0] for name in GROUPS if groups.get(name)), "")


def plan(groups: Mapping[str, Sequence[str]], hosts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The targets of a fleet, from the groups of the inventory and the variables of each host.

    Returns `monitor` (a host), `address` (the one under which it is reached), `targets` ({job: [{targets, labels}]}, as
    Prometheus reads them from files), `meant` ({backend of the gateways: Sparks that are to serve its model}), and
    `unreached` (a line for each gateway whose statistics listen on loopback alone). The monitor reaches itself on
    loopback, the others at their addresses of the inventory.
    Raises SparkfleetError naming host and value."""
    where = monitor(groups)
    if not where:
        raise SparkfleetError("sparkfleet_monitoring: the inventory has none of the groups monitors, gateways, sparks")
    defaults = target.defaults()

    def value(host: str, name: str) -> Any:
        return hosts[host].get(f"sparkfleet_{name}", defaults[f"sparkfleet_{name}"])

    def at(host: str, port: Any, name: str, own: str = LOOPBACK) -> dict[str, Any]:
        number = gateway.port_number(f"{host}: sparkfleet_{name}", port)
        address = own if host == where else gateway.address(host, hosts[host])
        return {
            "targets": [f"[{address}]:{number}" if ":" in address else f"{address}:{number}"],
            "labels": {"host": host},
        }

    answering = gateway.answering(hosts, groups)
    sparks = gateway.settings({host: hosts[host] for host in groups.get("sparks", ())})
    made: dict[str, list[dict[str, Any]]] = {"engine": [], "guard": [], "gateway": [], "node": []}
    for host, values in sparks.items():
        # Of those that run an engine together, rank 0 alone has its metrics.
        made["engine"] += [at(host, engine["port"], "port") for engine in values["engines"] if host in answering]
        if gateway.truth(values["guard"]) and str(values["guard_port"]) != "0":
            made["guard"].append(at(host, values["guard_port"], "guard_port"))
    unreached = []
    for host in groups.get("gateways", ()):
        if host != where and str(value(host, "gateway_statistics_listen")) in ("", LOOPBACK, "localhost"):
            unreached.append(
                f"{host}: HAProxy's metrics listen on loopback alone, and are not scraped; "
                "sparkfleet_gateway_statistics_listen opens them"
            )
            continue
        made["gateway"].append(at(host, value(host, "gateway_statistics_port"), "gateway_statistics_port"))
    every = dict.fromkeys(host for name in reversed(GROUPS) for host in groups.get(name, ()))
    made["node"] = [at(host, value(host, "node_exporter_port"), "node_exporter_port") for host in every]
    further = [model for host in groups.get("gateways", ()) for model in value(host, "gateway_models") or ()]
    served = {host: values for host, values in sparks.items() if host in answering}
    return {
        "monitor": where,
        "address": gateway.address(where, hosts[where]),
        "targets": made,
        "meant": gateway.meant(served, further) if groups.get("gateways") else {},
        "unreached": unreached,
    }
