"""What a gateway needs to know of the fleet: a backend a model, a server a Spark. A pure function of the inventory."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import re
import urllib.parse
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sparkfleet_host import key as names_of_keys
from sparkfleet_host.bounded import HOST, printable

from sparkfleet import SparkfleetError
from sparkfleet.documents import secret
from sparkfleet.planning import catalog, nodes, target
from sparkfleet.planning import variables as planned

#: HAProxy takes a line that starts with # for a comment, and a comma for the end of a header's value.
KEY = re.compile(r"(?!#)[!-+\-.-~]{8,256}")
#: A client's name in logs and tables of HAProxy.
CLIENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}")
#: Quotas of a client and their upper bounds; 0 is none.
QUOTAS = {"requests_per_second": 10_000, "streams": 10_000}
#: A path in its normal form, as the gateway compares it; with * at its end, all paths that start like it.
PATH = re.compile(r"(?!.{200})(/(?!\.{1,2}(/|$))[A-Za-z0-9_.~-]+)+/?\*?")
MOST_PATHS = 64
#: Ends the name of a backend of Sparks with the engines' key before.
PREVIOUS = ":previous"
#: Variables of a Spark that a gateway reads.
VARIABLES = ("guard", "guard_port", "address", "drained", "engine_key")
#: Of those the ones of an engine.
ENGINE_VARIABLES = ("model", "port")


def answering(known: Mapping[str, Mapping[str, Any]], groups: Mapping[str, Sequence[str]]) -> list[str]:
    """The Sparks that requests are sent to: of those that run an engine together the one with rank 0. Raises
    SparkfleetError."""
    found = []
    for host in groups.get("sparks", ()):
        try:
            members = nodes.members(host, known[host].get(nodes.NODES), groups)[1]
        except SparkfleetError as error:
            raise SparkfleetError(f"{host}: {error}") from None
        found += [host] if not members or members[0] == host else []
    return found


def settings(hosts: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each host the variables that a gateway reads, defaults filled in, without their prefix; those of its engines
    as a list."""
    defaults = target.defaults()
    found = {}
    for host, variables in hosts.items():
        if not host.isprintable():
            raise SparkfleetError(f"{ascii(host)[:80]} cannot be a host's name: it has characters that cannot be seen")
        values, engine = (
            {key: variables.get(f"sparkfleet_{key}", defaults[f"sparkfleet_{key}"]) for key in keys}
            for keys in (VARIABLES, ENGINE_VARIABLES)
        )
        values["engine_key"] = secret.text(f"{host}: sparkfleet_engine_key", values["engine_key"])
        values["address"], values["engines"] = address(host, variables), _engines(host, variables) or [engine]
        found[host] = values
    return found


def _engines(host: str, variables: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Model and port of each entry of a host's `sparkfleet_engines`. Raises SparkfleetError."""
    if not variables.get(planned.ENGINES):
        return []
    names = (planned.ENGINES, "sparkfleet_port")
    try:
        settled = planned.settle({name: variables[name] for name in names if name in variables})
    except SparkfleetError as error:
        raise SparkfleetError(f"{host}: {error}") from None
    return [{key: engine[key] for key in ENGINE_VARIABLES} for engine in settled[planned.ENGINES]]


def address(host: str, variables: Mapping[str, Any]) -> str:
    """Name or address under which a host of the inventory is reached. Raises SparkfleetError."""
    found = str(variables.get("sparkfleet_address") or variables.get("ansible_host") or host)
    if not is_address(found) and not HOST.fullmatch(found):
        raise SparkfleetError(
            f"{host}: sparkfleet_address {printable(repr(found), 80)} is neither a name nor an address"
        )
    return found


def is_address(text: str) -> bool:
    """Whether it is an IPv4 or IPv6 address (without a zone), not a name."""
    with contextlib.suppress(ValueError):
        return "%" not in text and bool(ipaddress.ip_address(text))
    return False


def plan(
    hosts: Mapping[str, Mapping[str, Any]],
    ports: Mapping[str, Any] | None = None,
    models: Sequence[Any] = (),
    installed: str | None = None,
) -> dict[str, Any]:
    """Backends of what `settings` gives: [{name, model, repo, ports, servers: [{name, address, literal, port,
    check_port, check, meant}]}], the JSON document of GET /v1/models, the engines' keys by backend, the Sparks that
    were left out, and whether there are servers by name.

    A Spark is a server of the backend of each model whose engines have its key: which of them it serves now,
    the guard reports; which are `meant`, the inventory. Where one is not meant, it is expected on the port of the
    Spark's first engine. `ports` are further ones, {model: port}; `models` have a backend although no Spark is to serve
    them. `installed` are the engines' keys that the gateway has, while they are rotated: a Spark that still has the
    key before is a server of a further backend (`previous`), with that key, until the guard reports the new one.
    Raises SparkfleetError naming host and value."""
    cards = {host: [_card(host, engine["model"]) for engine in values["engines"]] for host, values in hosts.items()}
    drained = [host for host, values in hosts.items() if truth(values["drained"])]
    left = {host: values for host, values in hosts.items() if host not in drained}
    if not left:
        raise SparkfleetError("no Spark is left for the gateway: the group sparks is empty, or all are drained")
    _one_name(left)
    keys = {host: check_key(f"{host}: sparkfleet_engine_key", values["engine_key"]) for host, values in left.items()}
    servers = {host: _server(host, values) for host, values in left.items()}
    further = [_card("sparkfleet_gateway_models", name) for name in models]
    backends: dict[str, dict[str, Any]] = {}
    engine_keys: dict[str, str] = {}
    for card in [*(card for host in left for card in cards[host]), *further]:
        if card.name in backends:
            continue
        meant = {host: keys[host] for host in left if card.name in {own.name for own in cards[host]}}
        key = _one_key(card.name, meant or keys)
        if key:
            engine_keys[_word(card.name)] = key
        backends[card.name] = {
            **{"name": _word(card.name), "model": card.name, "repo": card.repo, "ports": []},
            "servers": [
                {
                    **servers[host],
                    "port": _port(host, hosts[host], cards[host], card),
                    "check": _check(servers[host], card.repo, key if installed is not None else ""),
                    "meant": host in meant,
                }
                for host in left
                if keys[host] == key
            ],
        }
    _distinct(backends)
    before = previous_keys(installed or "", engine_keys)
    previous = [
        {
            **item,
            "name": item["name"] + PREVIOUS,
            "of": item["name"],
            "servers": [
                {**server, "check": _check(server, item["repo"], before[item["name"]])} for server in item["servers"]
            ],
        }
        for item in backends.values()
        if item["name"] in before
    ]
    # Until a Spark is switched it has the key before.
    for item in backends.values():
        if item["name"] in before:
            item["servers"] = [{**server, "meant": False} for server in item["servers"]]
    engine_keys |= {name + PREVIOUS: key for name, key in before.items()}
    known = {card.name for own in cards.values() for card in own} | set(backends)
    for model, port in (ports or {}).items():
        if model not in known:
            there = ", ".join(sorted(known))
            raise SparkfleetError(f"sparkfleet_gateway_ports: no Spark serves {model!r}; there are {there}")
        number = port_number(f"sparkfleet_gateway_ports.{model}:", port)
        if model in backends:
            backends[model]["ports"].append(number)
    listed = [{"id": item["repo"], "object": "model", "owned_by": "vllm"} for item in backends.values()]
    return {
        "backends": list(backends.values()),
        "previous": previous,
        "models": json.dumps({"object": "list", "data": listed}),
        "engine_keys": engine_keys,
        "drained": drained,
        "names": not all(server["literal"] for server in servers.values()),
    }


def meant(hosts: Mapping[str, Mapping[str, Any]], models: Sequence[Any] = ()) -> dict[str, int]:
    """Of each backend of `plan` how many Sparks that are not drained are meant to serve its model. Raises
    SparkfleetError naming the host."""
    found = {_word(_card("sparkfleet_gateway_models", name).name): 0 for name in models}
    for host, values in hosts.items():
        own = {_word(_card(host, engine["model"]).name) for engine in values["engines"]}
        for name in sorted(own) if not truth(values["drained"]) else ():
            found[name] = found.get(name, 0) + 1
    return found


def _card(place: str, name: Any) -> catalog.Card:
    try:
        return catalog.load(str(name))
    except SparkfleetError as error:
        raise SparkfleetError(f"{place}: {error}") from None


def _server(host: str, values: Mapping[str, Any]) -> dict[str, Any]:
    guarded = truth(values["guard"])
    return {
        "name": _word(host),
        "address": values["address"],
        "literal": is_address(values["address"]),
        "port": port_number(f"{host}: sparkfleet_port", values["engines"][0]["port"]),
        "check_port": port_number(f"{host}: sparkfleet_guard_port", values["guard_port"]) if guarded else 0,
    }


def _port(host: str, values: Mapping[str, Any], own: Sequence[catalog.Card], card: catalog.Card) -> int:
    """Where a host serves a model: the port of its engine, or of its first where it is not meant to."""
    engines = values["engines"]
    engine = next((engine for engine, known in zip(engines, own, strict=True) if known.name == card.name), engines[0])
    return port_number(f"{host}: sparkfleet_port", engine["port"])


def _check(server: Mapping[str, Any], repo: str, key: str = "") -> str:
    """What a health check requests: the guard whether the model is served, with this key where one is given, or the
    engine which models it has, which it says only with its key."""
    asked = f"/ready?model={urllib.parse.quote(repo, safe='/')}{f'&key={names_of_keys.name(key)}' if key else ''}"
    return asked if server["check_port"] else "/v1/models"


def previous_keys(installed: str, wanted: Mapping[str, str]) -> dict[str, str]:
    """Of each backend whose key changes the key before, out of the lines `BACKEND Bearer KEY` that a gateway has.
    Raises SparkfleetError where a rotation to another key is under way."""
    lines = (line.partition(" Bearer ") for line in installed.splitlines())
    known = {name: key.strip() for name, _, key in lines if key}
    found = {}
    for name, key in wanted.items():
        if name + PREVIOUS in known and known.get(name) != key:
            raise SparkfleetError(
                f"sparkfleet_engine_key: the gateway is between two keys of {name} already, and the inventory has a "
                "third: finish with the second one first (`sparkfleet rotate engine-key`), or deploy with "
                "`sparkfleet rollout`, during which requests may fail"
            )
        before = known.get(name + PREVIOUS) or known.get(name, "")
        if before not in ("", key):
            found[name] = before
    return found


def previous_clients(installed: str, name: str, wanted: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The keys of a client that a gateway has (lines `KEY NAME/...`) and the inventory no longer has, as `clients`
    returns them. Raises SparkfleetError for a client that the inventory does not have."""
    own = next((client for client in wanted if client["name"] == name), None)
    if own is None:
        there = ", ".join(dict.fromkeys(client["name"] for client in wanted)) or "none"
        raise SparkfleetError(
            f"sparkfleet_gateway_keys: no client is called {printable(name, 80)!r}; there are {there}"
        )
    current = {client["key"] for client in wanted}
    lines = (line.partition(" ") for line in installed.splitlines())
    found = [key for key, _, rest in lines if rest.partition("/")[0] == name and key not in current]
    return [{**own, "key": key} for key in found if KEY.fullmatch(key)]


def _one_name(hosts: Collection[str]) -> None:
    """Whether HAProxy has a name of its own for each Spark."""
    known: dict[str, str] = {}
    for host in hosts:
        other = known.setdefault(_word(host), host)
        if other != host:
            raise SparkfleetError(
                f"{host} and {other} are both called {_word(host)} in the gateway; rename one of them"
            )


def _distinct(backends: Mapping[str, Mapping[str, Any]]) -> None:
    """Whether a request's model selects its backend."""
    known: dict[str, str] = {}
    for name, item in backends.items():
        for word in (item["name"], item["repo"]):
            other = known.setdefault(word, name)
            if other != name:
                raise SparkfleetError(f"the models {name} and {other} are both called {word} in the gateway")


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
        number = port_number(f"{name}:", value)
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
    """What a certificate is issued for (subjectAltName): names and addresses of a gateway, each once."""
    found = []
    for item in filter(None, addresses):
        try:
            found.append(f"IP:{ipaddress.ip_interface(item).ip}")
        except ValueError:
            found.append(f"DNS:{item}")
    return list(dict.fromkeys(found))


def shown(wanted: Sequence[str]) -> list[str]:
    """`names` as `openssl x509 -ext subjectAltName` prints them."""
    found = []
    for item in wanted:
        kind, _, value = item.partition(":")
        if kind == "IP":
            address = ipaddress.ip_address(value)
            groups = address.exploded.split(":")
            value = str(address) if address.version == 4 else ":".join(f"{int(group, 16):X}" for group in groups)
        found.append(f"{'IP Address' if kind == 'IP' else kind}:{value}")
    return found


def truth(value: Any) -> bool:
    """A truth value as inventories write it."""
    return str(value).lower() in ("true", "yes", "on", "1")


def _word(name: str) -> str:
    """A name as HAProxy takes it."""
    return re.sub(r"[^A-Za-z0-9_.:-]", "_", name)


def port_number(name: str, value: Any) -> int:
    """A TCP port as inventories write it. Raises SparkfleetError."""
    if not re.fullmatch(r"[0-9]{1,5}", str(value)) or not 0 < int(value) < 65536:
        raise SparkfleetError(f"{name} {printable(repr(value), 60)} is not a TCP port (1 to 65535)")
    return int(value)


def check_key(name: str, key: Any) -> str:
    """A key, or "" for none. Raises SparkfleetError with the name, never the key."""
    if key in (None, ""):
        return ""
    if isinstance(key, int | float):
        raise SparkfleetError(f"{name} must be text, not a number: write the key in quotes")
    if not isinstance(key, str) or not KEY.fullmatch(key):
        raise SparkfleetError(
            f"{name} has blanks or commas, not 8 to 256 characters, or starts with #; `openssl rand -hex 24` makes one"
        )
    return key


def clients(wanted: Sequence[Any], quotas: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """The keys of clients: [{name, key, requests_per_second, streams}], of entries that are a key, or a mapping of
    these. A key without a name is called by its place, key-1. `quotas`: those of entries without their own; 0 is none.
    Several keys may have one name, so that a client can change its key: they share its quotas.
    Raises SparkfleetError naming the place of what is wrong, never the key."""
    usual = {
        name: _quota(f"sparkfleet_gateway_{name}", (quotas or {}).get(name, 0), most) for name, most in QUOTAS.items()
    }
    if any(usual.values()) and not wanted:
        name = next(name for name, value in usual.items() if value)
        raise SparkfleetError(
            f"sparkfleet_gateway_{name}: {usual[name]} is a quota of each client key, but there are no "
            "sparkfleet_gateway_keys; add them, or leave it out"
        )
    found: list[dict[str, Any]] = []
    for place, entry in enumerate(wanted, 1):
        at = f"sparkfleet_gateway_keys: entry {place}"
        given = dict(entry) if isinstance(entry, Mapping) else {"key": entry}
        if unknown := [name for name in given if name not in ("name", "key", *QUOTAS)]:
            there = ", ".join(("name", "key", *QUOTAS))
            raise SparkfleetError(f"{at}: unknown key {printable(repr(unknown[0]), 60)}; there are {there}")
        name = given.get("name", f"key-{place}")
        if not isinstance(name, str) or not CLIENT.fullmatch(name):
            raise SparkfleetError(
                f"{at}: its name {printable(repr(name), 80)} is not valid: letters, digits and _.@-, at most 64"
            )
        own = {key: _quota(f"{at}: {key}", given[key], most) for key, most in QUOTAS.items() if key in given}
        found.append({"name": name, "key": check_key(at, given.get("key") or " "), **usual, **own})
    _one_quota(found)
    return found


def _one_quota(clients: Sequence[Mapping[str, Any]]) -> None:
    """Whether each key is there once, and the keys of a client have the same quotas."""
    keys: dict[str, int] = {}
    names: dict[str, int] = {}
    for place, client in enumerate(clients, 1):
        first = keys.setdefault(client["key"], place)
        if first != place:
            raise SparkfleetError(f"sparkfleet_gateway_keys: entry {place} has the key of entry {first}; remove one")
        first = names.setdefault(client["name"], place)
        for quota in QUOTAS:
            if clients[first - 1][quota] != client[quota]:
                raise SparkfleetError(
                    f"sparkfleet_gateway_keys: entries {first} and {place} are both called {client['name']}, but "
                    f"{quota} is {clients[first - 1][quota]} and {client[quota]}: a client has one quota"
                )


def _quota(name: str, value: Any, most: int) -> int:
    if isinstance(value, bool) or not re.fullmatch(r"[0-9]{1,6}", str(value)) or int(value) > most:
        raise SparkfleetError(f"{name}: {printable(repr(value), 60)} is not a whole number from 0 (no quota) to {most}")
    return int(value)


def paths(wanted: Sequence[Any]) -> list[str]:
    """Paths that a gateway opens besides its own. Raises SparkfleetError naming the place of a bad one."""
    if len(wanted) > MOST_PATHS:
        raise SparkfleetError(f"sparkfleet_gateway_paths: {len(wanted)} entries, at most {MOST_PATHS}")
    for place, path in enumerate(wanted, 1):
        if not isinstance(path, str) or not PATH.fullmatch(path):
            raise SparkfleetError(
                f"sparkfleet_gateway_paths: entry {place}, {printable(repr(path), 80)}, is not a path in its normal "
                "form: write /tokenize, or /v1/files/* for all below it"
            )
    return [str(path) for path in wanted]
