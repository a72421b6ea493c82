"""What Prometheus scrapes, and whom Alertmanager tells: pure functions of the inventory."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sparkfleet_host.bounded import HOST, printable

from sparkfleet import SparkfleetError
from sparkfleet.fleet import gateway
from sparkfleet.planning import target
from sparkfleet.planning.compose import LOOPBACK

#: Groups of the inventory, the one that has the monitor first.
GROUPS = ("monitors", "gateways", "sparks")
_SMTP = re.compile(r"(.+):([0-9]{1,5})")
_ADDRESS = re.compile(r"[^\s@,<>]{1,64}@[^\s@,<>]{1,253}")


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


def receivers(values: Mapping[str, Any]) -> dict[str, Any]:
    """Whom Alertmanager tells, from the variables `sparkfleet_alert_*` without their prefix: the receiver's part of its
    configuration; no keys for none. Raises SparkfleetError naming the variable, never a secret."""
    text = {name: str(value or "").strip() for name, value in values.items()}
    made: dict[str, Any] = {}
    if text["email"]:
        made["email_configs"] = [_email(text)]
    elif text["smtp"] or text["email_from"]:
        raise SparkfleetError("sparkfleet_alert_email: missing, to whom mail goes; sparkfleet_alert_smtp has no use")
    if text["webhook"]:
        made["webhook_configs"] = [_hook("webhook", text["webhook"], text["webhook_token"])]
    elif text["webhook_token"]:
        raise SparkfleetError("sparkfleet_alert_webhook_token: is for sparkfleet_alert_webhook, which is not set")
    if text["ntfy"]:
        # ntfy makes a message of Alertmanager's document with this template of its own.
        joint = "&" if "?" in text["ntfy"] else "?"
        hook = _hook("ntfy", f"{text['ntfy']}{joint}template=alertmanager", text["ntfy_token"])
        made.setdefault("webhook_configs", []).append(hook)
    elif text["ntfy_token"]:
        raise SparkfleetError("sparkfleet_alert_ntfy_token: is for sparkfleet_alert_ntfy, which is not set")
    return made


def _email(text: Mapping[str, str]) -> dict[str, Any]:
    for name in ("email", "email_from"):
        addresses = text[name].split(",") if name == "email" else [text[name]]
        for address in addresses:
            if not _ADDRESS.fullmatch(address.strip()):
                shown = printable(repr(address.strip()), 80)
                raise SparkfleetError(f"sparkfleet_alert_{name}: {shown} is not an address of mail (name@example.org)")
    found = _SMTP.fullmatch(text["smtp"])
    if not found or not (gateway.is_address(found[1].strip("[]")) or HOST.fullmatch(found[1])):
        raise SparkfleetError(
            f"sparkfleet_alert_smtp: {printable(repr(text['smtp']), 80)} is not HOST:PORT of a mail server "
            "(mail.example.org:587)"
        )
    gateway.port_number("sparkfleet_alert_smtp:", found[2])
    made: dict[str, Any] = {
        **{"to": text["email"], "from": text["email_from"], "smarthost": text["smtp"], "send_resolved": True},
    }
    if text["smtp_user"]:
        made |= {"auth_username": text["smtp_user"], "auth_password": text["smtp_password"]}
    # A relay of one's own on this host or net has no TLS often; with a password there is no sending without it.
    return made | {"require_tls": bool(text["smtp_user"])}


def _hook(name: str, url: str, token: str) -> dict[str, Any]:
    if not re.fullmatch(r"https?://[!-~]{1,2000}", url):
        raise SparkfleetError(f"sparkfleet_alert_{name}: is not an address that begins with http:// or https://")
    bearer = {"http_config": {"authorization": {"credentials": token}}} if token else {}
    return {"url": url, "send_resolved": True, **bearer}
