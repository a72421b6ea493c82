"""What a gateway needs to know of the fleet: a backend a model, a server a Spark. A pure function of the inventory."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sparkfleet import SparkfleetError, catalog, target

#: Variables of a Spark that a gateway reads.
VARIABLES = ("model", "port", "guard", "guard_port", "address", "drained", "engine_key")


def settings(hosts: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each host the variables that a gateway reads, defaults filled in, without their prefix."""
    defaults = target.defaults()
    found = {}
    for host, variables in hosts.items():
        values = {key: variables.get(f"sparkfleet_{key}", defaults[f"sparkfleet_{key}"]) for key in VARIABLES}
        values["address"] = address(host, variables)
        found[host] = values
    return found


def address(host: str, variables: Mapping[str, Any]) -> str:
    """Name or address under which a host of the inventory is reached. Raises SparkfleetError."""
    found = str(variables.get("sparkfleet_address") or variables.get("ansible_host") or host)
    if not re.fullmatch(r"[A-Za-z0-9_.:-]+", found):
        raise SparkfleetError(f"{host}: sparkfleet_address {found!r} is neither a name nor an address")
    return found


def plan(hosts: Mapping[str, Mapping[str, Any]], ports: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Backends of what `settings` gives: [{name, model, repo, ports, servers: [{name, address, port, check_port}]}],
    the JSON document of GET /v1/models, the engines' keys by backend, and the names that were left out. `ports` are
    further ones, {model: port}. Raises SparkfleetError naming host and value."""
    backends: dict[str, dict[str, Any]] = {}
    engine_keys: dict[str, dict[str, str]] = {}
    models: set[str] = set()
    drained = [host for host, values in hosts.items() if truth(values["drained"])]
    for host, values in hosts.items():
        try:
            card = catalog.load(str(values["model"]))
        except SparkfleetError as error:
            raise SparkfleetError(f"{host}: {error}") from None
        models.add(card.name)
        if host in drained:
            continue
        server = {
            "name": _word(host),
            "address": values["address"],
            "port": _port(f"{host}: sparkfleet_port", values["port"]),
            "check_port": _port(f"{host}: sparkfleet_guard_port", values["guard_port"])
            if truth(values["guard"])
            else 0,
        }
        known = {"name": _word(card.name), "model": card.name, "repo": card.repo, "ports": []}
        backends.setdefault(card.name, {**known, "servers": []})["servers"].append(server)
        engine_keys.setdefault(card.name, {})[host] = check_key(f"{host}: sparkfleet_engine_key", values["engine_key"])
    if not backends:
        raise SparkfleetError("no Spark is left for the gateway: the group sparks is empty, or all are drained")
    for model, port in (ports or {}).items():
        if model not in models:
            there = ", ".join(sorted(models))
            raise SparkfleetError(f"sparkfleet_gateway_ports: no Spark serves {model!r}; there are {there}")
        number = _port(f"sparkfleet_gateway_ports.{model}:", port)
        if model in backends:
            backends[model]["ports"].append(number)
    listed = [{"id": item["repo"], "object": "model", "owned_by": "vllm"} for item in backends.values()]
    return {
        "backends": list(backends.values()),
        "models": json.dumps({"object": "list", "data": listed}),
        "engine_keys": {_word(model): key for model, found in engine_keys.items() if (key := _one_key(model, found))},
        "drained": drained,
    }


def _one_key(model: str, found: Mapping[str, str]) -> str:
    """The key that all Sparks with a model have. A gateway sets it before it knows which Spark a request goes to."""
    if len(set(found.values())) > 1:
        raise SparkfleetError(
            f"sparkfleet_engine_key: not the same for all Sparks with {model} ({', '.join(found)}); a gateway needs one"
        )
    return next(iter(found.values()))


def check_ports(gateway: Mapping[str, Any]) -> None:
    """Whether each port of a gateway has one use: {name of a variable: port}. Raises SparkfleetError."""
    used: dict[int, str] = {}
    for name, value in gateway.items():
        number = _port(f"{name}:", value)
        if number in used:
            raise SparkfleetError(f"{name}: {number} is the port of {used[number]} already; choose another")
        used[number] = name


def floating(value: str) -> str:
    """A floating address, as it was given. Raises SparkfleetError."""
    try:
        ipaddress.IPv4Interface(value)
    except ValueError:
        raise SparkfleetError(
            f"sparkfleet_gateway_address: {value!r} is no IPv4 address; write 192.0.2.4 or 192.0.2.4/24"
        ) from None
    return value


def names(*addresses: str) -> list[str]:
    """What a certificate says it is for (subjectAltName): names and addresses of a gateway, each once."""
    found = []
    for item in filter(None, addresses):
        try:
            found.append(f"IP:{ipaddress.ip_interface(item).ip}")
        except ValueError:
            found.append(f"DNS:{item}")
    return list(dict.fromkeys(found))


def truth(value: Any) -> bool:
    """A truth value as inventories write it."""
    return str(value).lower() in ("true", "yes", "on", "1")


def _word(name: str) -> str:
    """A name as HAProxy takes it."""
    return re.sub(r"[^A-Za-z0-9_.:-]", "_", name)


def _port(name: str, value: Any) -> int:
    if not str(value).isdigit() or not 0 <= int(value) < 65536:
        raise SparkfleetError(f"{name} {value!r} is no TCP port")
    return int(value)


def check_key(name: str, key: Any) -> str:
    """A key, or "" for none. Raises SparkfleetError with the name, never the key."""
    if key and not re.fullmatch(r"[!-~]{8,}", str(key)):
        raise SparkfleetError(f"{name} has blanks or fewer than 8 characters; `openssl rand -hex 24` makes one")
    return str(key or "")


def keys(wanted: Sequence[str]) -> list[str]:
    """Keys of clients. Raises SparkfleetError naming the place of a bad one, never the key."""
    return [check_key(f"sparkfleet_gateway_keys: entry {place}", key or " ") for place, key in enumerate(wanted, 1)]
