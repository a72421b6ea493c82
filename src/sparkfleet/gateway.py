"""What a gateway needs to know of the fleet: a backend a model, a server a Spark. A pure function of the inventory."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sparkfleet import SparkfleetError, catalog, target

#: Variables of a Spark that a gateway reads.
VARIABLES = ("model", "port", "guard", "guard_port", "address", "drained")


def settings(hosts: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each host the variables that a gateway reads, defaults filled in, without their prefix."""
    defaults = target.defaults()
    found = {}
    for host, variables in hosts.items():
        values = {key: variables.get(f"sparkfleet_{key}", defaults[f"sparkfleet_{key}"]) for key in VARIABLES}
        values["address"] = values["address"] or variables.get("ansible_host") or host
        found[host] = values
    return found


def plan(hosts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Backends of what `settings` gives: [{name, model, repo, servers: [{name, address, port, check_port}]}], the JSON
    document of GET /v1/models, and the names that were left out. Raises SparkfleetError naming host and value."""
    backends: dict[str, dict[str, Any]] = {}
    drained = [host for host, values in hosts.items() if truth(values["drained"])]
    for host, values in hosts.items():
        if host in drained:
            continue
        try:
            card = catalog.load(str(values["model"]))
        except SparkfleetError as error:
            raise SparkfleetError(f"{host}: {error}") from None
        server = {
            "name": _word(host),
            "address": _address(host, str(values["address"])),
            "port": _port(host, "sparkfleet_port", values["port"]),
            "check_port": _port(host, "sparkfleet_guard_port", values["guard_port"]) if truth(values["guard"]) else 0,
        }
        known = {"name": _word(card.name), "model": card.name, "repo": card.repo}
        backends.setdefault(card.name, {**known, "servers": []})["servers"].append(server)
    if not backends:
        raise SparkfleetError("no Spark is left for the gateway: the group sparks is empty, or all are drained")
    models = [{"id": item["repo"], "object": "model", "owned_by": "vllm"} for item in backends.values()]
    return {
        "backends": list(backends.values()),
        "models": json.dumps({"object": "list", "data": models}),
        "drained": drained,
    }


def truth(value: Any) -> bool:
    """A truth value as inventories write it."""
    return str(value).lower() in ("true", "yes", "on", "1")


def _word(name: str) -> str:
    """A name as HAProxy takes it."""
    return re.sub(r"[^A-Za-z0-9_.:-]", "_", name)


def _address(host: str, address: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.:-]+", address):
        raise SparkfleetError(f"{host}: sparkfleet_address {address!r} is neither a name nor an address")
    return address


def _port(host: str, name: str, value: Any) -> int:
    if not str(value).isdigit() or not 0 <= int(value) < 65536:
        raise SparkfleetError(f"{host}: {name} {value!r} is no TCP port")
    return int(value)


def keys(wanted: Sequence[str]) -> list[str]:
    """Keys of clients. Raises SparkfleetError naming the place of a bad one, never the key."""
    for place, key in enumerate(wanted, 1):
        if not re.fullmatch(r"[!-~]{8,}", str(key)):
            raise SparkfleetError(
                f"sparkfleet_gateway_keys: entry {place} has blanks or fewer than 8 characters; "
                "`openssl rand -hex 24` makes one"
            )
    return [str(key) for key in wanted]
