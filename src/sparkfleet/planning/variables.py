"""The variables of the inventory: which exist, and what each may be.

Types, choices and defaults are those of the role's argument specs; ranges and forms are here, for all that checks them:
the plan before it inspects a host, a rollout on paper, and the documentation. Names that start with `sparkfleet_` are
Sparkfleet's own; variables of a user's own have other names.
"""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import yaml
from sparkfleet_host.bounded import HOST, printable
from sparkfleet_host.release_format import MOST_ENGINES

from sparkfleet import SparkfleetError
from sparkfleet.documents import schema, secret, yaml_text
from sparkfleet.paths import ROOT
from sparkfleet.planning import catalog

PREFIX = "sparkfleet_"
#: Prefix of the variables of vLLM's arguments; Ansible's own precedence merges them.
ARGUMENT_PREFIX = "sparkfleet_vllm_"
SPECS = ROOT / "roles" / "sparkfleet" / "meta" / "argument_specs.yml"

_DAY = 86400
#: Lower and upper bound of each number.
RANGES: dict[str, tuple[float, float]] = {
    "sparkfleet_port": (1, 65535),
    "sparkfleet_image_disk_gib": (0, 100_000),
    "sparkfleet_memory_reserve_gib": (0, 1000),
    "sparkfleet_guard_interval": (0.1, 3600),
    "sparkfleet_guard_wedge_seconds": (1, _DAY),
    "sparkfleet_guard_canary_interval": (0.5, _DAY),
    "sparkfleet_guard_canary_timeout": (0.5, 3600),
    "sparkfleet_guard_max_restarts": (0, 1000),
    "sparkfleet_guard_restart_window": (1, 7 * _DAY),
    "sparkfleet_guard_port": (0, 65535),
    "sparkfleet_on_demand_hold_seconds": (1, 6 * 3600),
    "sparkfleet_on_demand_min_seconds": (0, _DAY),
    "sparkfleet_on_demand_starts_per_hour": (1, 1000),
    "sparkfleet_fetch_timeout": (1, 7 * _DAY),
    "sparkfleet_share_port": (1, 65535),
    "sparkfleet_start_timeout": (1, _DAY),
    "sparkfleet_keep_releases": (1, 1000),
    "sparkfleet_drain_timeout": (0, _DAY),
    "sparkfleet_gateway_port": (1, 65535),
    "sparkfleet_gateway_statistics_port": (1, 65535),
    "sparkfleet_gateway_peer_port": (1, 65535),
    "sparkfleet_gateway_requests_per_second": (0, 10_000),
    "sparkfleet_gateway_streams": (0, 10_000),
    "sparkfleet_gateway_router_id": (1, 255),
    "sparkfleet_monitoring_retention_days": (1, 3650),
    "sparkfleet_monitoring_retention_gib": (1, 100_000),
    "sparkfleet_node_exporter_port": (1, 65535),
    "sparkfleet_prometheus_port": (1, 65535),
    "sparkfleet_alertmanager_port": (1, 65535),
    "sparkfleet_rollout_canary": (0, 10_000),
    "sparkfleet_rollout_soak": (0, _DAY),
    "sparkfleet_verify_seconds": (10, 7200),
    "sparkfleet_fabric_mtu": (0, 9978),
}

_ABSOLUTE = (
    r"/(?!.*(^|/)\.\.(/|$))[^\x00-\x1f\x7f:\"']*[^\x00-\x1f\x7f:\"'/]",
    "an absolute path without `:`, quotes and `..`",
)
_NAME = (r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,63}\$?", "the name of a user or group")
_LINE = (r"[^\x00-\x1f\x7f]{0,4000}", "a line of text")
_URL = r"https?://[!-~]{1,500}"
#: For each text, the form it must have altogether, and that form in words. "" is "not set", where that is the default.
FORMS: dict[str, tuple[str, str]] = {
    "sparkfleet_model": (r"[^\x00-\x1f\x7f]{1,1000}", "a name of the catalogue, ORG/NAME of the Hub or a path"),
    "sparkfleet_profile": (r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", "the name of a profile"),
    "sparkfleet_project_dir": _ABSOLUTE,
    "sparkfleet_cache_dir": _ABSOLUTE,
    "sparkfleet_compile_cache_dir": _ABSOLUTE,
    "sparkfleet_hf_token_file": _ABSOLUTE,
    "sparkfleet_ca_file": _ABSOLUTE,
    "sparkfleet_lock_file": _ABSOLUTE,
    "sparkfleet_bundle_digest": (
        r"(sha256:)?[0-9A-Fa-f]{64}",
        "sha256: and 64 hex digits, as `sparkfleet bundle` printed it",
    ),
    "sparkfleet_cache_owner": _NAME,
    "sparkfleet_cache_group": _NAME,
    "sparkfleet_operator": _NAME,
    "sparkfleet_cache_mode": (r"[0-7]{3,5}", "a mode in octal digits, in quotes"),
    "sparkfleet_hf_token": (r"\s*[!-~]{0,500}\s*", "a token without blanks"),
    "sparkfleet_registry_logins": (r"[!-~][ -~]{0,4000}", "a line of text"),
    "sparkfleet_engine_key": (r"\s*[!-~]{8,500}\s*", "a key of 8 characters or more, without blanks"),
    "sparkfleet_hub_endpoint": (_URL, "the address of a Hub, https://..."),
    "sparkfleet_controller_hub": (_URL, "the address of a Hub, https://..."),
    "sparkfleet_proxy": (_URL, "the address of a proxy, http://..."),
    "sparkfleet_no_proxy": (r"[ -~]{0,4000}", "names separated by commas"),
    "sparkfleet_fabric_address": (r"\d{1,3}(\.\d{1,3}){3}", "an IPv4 address without prefix"),
    "sparkfleet_address": (r"[A-Za-z0-9_.:-]{1,253}", "a name or an address"),
    "sparkfleet_gateway_interface": (r"[A-Za-z0-9_.:@-]{1,15}", "the name of a network interface"),
}

#: Texts that may also be kept elsewhere, see `documents.secret`.
SECRETS = ("sparkfleet_hf_token", "sparkfleet_engine_key", "sparkfleet_proxy")
LOGINS = "sparkfleet_registry_logins"
IMAGE_KEYS = "sparkfleet_image_keys"
#: What a key is for: a registry, or what is below a path there.
_PUBLISHER = re.compile(r"(?=.{1,255}\Z)[A-Za-z0-9.-]+(:[0-9]{1,5})?(/[a-z0-9]+([._-]+[a-z0-9]+)*)*/?")

#: Parameters of verbs, which have no place in an inventory, and of the simulated world.
PARAMETERS = frozenset(
    PREFIX + name
    for name in (
        *("bundle_folder", "confirm", "logs_lines", "release", "remove_images", "remove_models", "remove_token"),
        "sbom_folder",
        *("simulated_token_file", "simulated_url"),
    )
)
#: Ports, each of which may have one use on a Spark.
_PORTS = (
    *("sparkfleet_port", "sparkfleet_guard_port", "sparkfleet_share_port"),
    *("sparkfleet_node_exporter_port", "sparkfleet_prometheus_port", "sparkfleet_alertmanager_port"),
)
#: Ports on loopback while Sparks fetch from each other or from a bundle, as in `sparkfleet_host.share`.
_OF_A_RUN = {9111: "the port for sharing images", 9112: "the port for sharing models"}
ENGINES = "sparkfleet_engines"
#: From the port of clients to that of the engine itself, for one that starts on demand.
LOOPBACK_OFFSET = 10_000
#: What each entry of `sparkfleet_engines` says itself, so that it is not said for the whole host.
_OF_ENGINES = ("sparkfleet_model", "sparkfleet_profile", "sparkfleet_image", "sparkfleet_revision")


@functools.cache
def options() -> dict[str, dict[str, Any]]:
    """Each variable with its type, choices, default and description, as argument specs have them."""
    # The C loader where there is libyaml: each host of a run reads it.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    found: dict[str, Any] = yaml.load(SPECS.read_text(encoding="utf-8"), Loader=loader)  # noqa: S506 - both are safe
    options: dict[str, dict[str, Any]] = found["argument_specs"]["main"]["options"]
    return options


@functools.cache
def internal() -> frozenset[str]:
    """Names that playbooks and roles reserve: all that occur in them."""
    root = ROOT
    files = [*(root / "playbooks").rglob("*.yml"), *(root / "roles").glob("*/tasks/*.yml")]
    found = (re.findall(rf"\b{PREFIX}\w+", file.read_text(encoding="utf-8")) for file in files)
    return frozenset(name for names in found for name in names)


def unknown(names: Iterable[str]) -> list[str]:
    """A problem in words for each name that starts with `sparkfleet_` and is not a variable of Sparkfleet."""
    found = []
    for name in sorted(name for name in names if name.startswith(PREFIX)):
        if name in options() or name.startswith(ARGUMENT_PREFIX) or name in PARAMETERS or name in internal():
            continue
        short = {known.removeprefix(PREFIX): known for known in (*options(), *_arguments())}
        near = difflib.get_close_matches(name.removeprefix(PREFIX)[:100], short, n=1)
        hint = f"did you mean {short[near[0]]}? " if near else ""
        found.append(
            f"{printable(name, 100)}: unknown variable; {hint}"
            f"(docs/inventory.md has them all; an argument of vllm serve is {ARGUMENT_PREFIX}NAME)"
        )
    return found


@functools.cache
def _arguments() -> tuple[str, ...]:
    """Variables of arguments that the schema or a card of the catalogue names."""
    names = dict.fromkeys(catalog.schema()["$defs"]["arguments"]["properties"])
    for card in map(catalog.load, catalog.names()):
        names |= dict.fromkeys(card.arguments)
    return tuple(ARGUMENT_PREFIX + name for name in names)


def settle(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `values` (of one host, templates resolved) that are variables of Sparkfleet, each of the type that its
    spec names (what is written `"8000"` is 8000), and the arguments of vllm serve. Raises SparkfleetError with each
    problem: unknown names, wrong types, values out of range or of another form."""
    found = unknown(values)
    made: dict[str, Any] = {}
    for name, value in values.items():
        try:
            if name == ENGINES:
                made[name] = _engines(value)
            elif name == LOGINS:
                made[name] = logins(value)
            elif name == IMAGE_KEYS:
                made[name] = _image_keys(value)
            elif name in SECRETS:
                made[name] = _value(name, secret.text(name, value), {**options()[name], "type": "str", "no_log": True})
            elif option := options().get(name):
                made[name] = _value(name, value, option)
            elif name.startswith(ARGUMENT_PREFIX):
                yaml_text.check(value, name)
                made[name] = value
        except SparkfleetError as error:
            found.append(str(error))
    engines: list[dict[str, Any]] = made.get(ENGINES) or []
    for index, engine in enumerate(engines):
        before = engines[index - 1]["port"] + 1 if index else made.get("sparkfleet_port", _default("sparkfleet_port"))
        engine.setdefault("port", before)
        if engine["port"] > RANGES["sparkfleet_port"][1]:
            found.append(f"{ENGINES}[{index}].port: none is left after {before - 1}; give it one")
        if not engine.get("on_demand"):
            if "loopback_port" in engine:
                found.append(f"{ENGINES}[{index}].loopback_port: is only for an engine with on_demand: true")
            continue
        engine.setdefault("loopback_port", engine["port"] + LOOPBACK_OFFSET)
        if engine["loopback_port"] > RANGES["sparkfleet_port"][1]:
            found.append(f"{ENGINES}[{index}].loopback_port: {engine['loopback_port']} is none; give it one")
    if engines:
        found += [
            f"{name}: does not go with {ENGINES}, whose entries name it each; remove one of the two"
            for name in _OF_ENGINES
            if made.get(name, _default(name)) != _default(name)
        ]
    used: dict[int, str] = dict(_OF_A_RUN)
    for index, engine in enumerate(engines):
        for key in ("port", "loopback_port") if engine.get("on_demand") else ("port",):
            name = f"{ENGINES}[{index}].{key}"
            if engine[key] in used:
                found.append(f"{name}: {engine[key]} is {used[engine[key]]} already; choose another port")
            used.setdefault(engine[key], name)
    for name in _PORTS[1:] if engines else _PORTS:
        port = made.get(name, _default(name))
        if port and port in used and not (name not in made and used[port] not in made and not engines):
            found.append(f"{name}: {port} is {used[port]} already; choose another port")
        used.setdefault(port, name)
    if found:
        raise SparkfleetError(schema.joined(found))
    return made


def _default(name: str) -> Any:
    return options()[name]["default"]


def _engines(value: Any) -> list[dict[str, Any]]:
    """The entries of `sparkfleet_engines`, each value of its type. Raises SparkfleetError with each problem."""
    entries = _value(ENGINES, value, options()[ENGINES])
    if len(entries) > MOST_ENGINES:
        raise SparkfleetError(f"{ENGINES}: {len(entries)} entries, at most {MOST_ENGINES}")
    keys: dict[str, dict[str, Any]] = options()[ENGINES]["options"]
    engines, found = [], []
    for index, entry in enumerate(entries):
        at = f"{ENGINES}[{index}]"
        if not isinstance(entry, Mapping):
            found.append(f"{at}: must be a mapping with model, not {_shown(entry)}")
            continue
        engine: dict[str, Any] = {}
        for key, given in entry.items():
            if key not in keys:
                near = difflib.get_close_matches(str(key)[:100], keys, n=1)
                hint = f"; did you mean {near[0]}?" if near else f": {', '.join(keys)} are the keys"
                found.append(f"{at}: unknown key {_shown(key)}{hint}")
                continue
            try:
                engine[key] = _value(f"{at}.{key}", given, keys[key], rule=PREFIX + key.removeprefix("loopback_"))
                if key == "arguments":
                    engine[key] = {str(name): scalar(argument) for name, argument in given.items()}
                    catalog.check_arguments(engine[key], f"{at}.{key}.")
                elif key == "environment":
                    catalog.check_environment(engine[key], f"{at}.{key}.")
            except SparkfleetError as error:
                found.append(str(error))
        if "model" not in entry:
            found.append(f"{at}: has no model")
        engines.append(engine)
    if found:
        raise SparkfleetError(schema.joined(found))
    return engines


def logins(value: Any) -> dict[str, dict[str, str]]:
    """The entries of `sparkfleet_registry_logins`: registry -> username and password. Raises SparkfleetError, which
    never shows a password."""
    made = {}
    for registry, login in _value(LOGINS, value, {**options()[LOGINS], "no_log": True}).items():
        at = f"{LOGINS}.{printable(str(registry), 80)}"
        host, _, port = str(registry).partition(":")
        if not HOST.fullmatch(host) or (port and not re.fullmatch(r"[0-9]{1,5}", port)):
            raise SparkfleetError(f"{at}: is not a registry, HOST or HOST:PORT")
        if not isinstance(login, Mapping) or set(login) != {"username", "password"}:
            raise SparkfleetError(f"{at}: must be a mapping with username and password")
        found = {key: secret.text(f"{at}.{key}", login[key]) for key in ("username", "password")}
        for key, text in found.items():
            if not isinstance(text, str) or not re.fullmatch(FORMS[LOGINS][0], text):
                raise SparkfleetError(f"{at}.{key}: must be {FORMS[LOGINS][1]}")
        if ":" in found["username"]:
            raise SparkfleetError(f"{at}.username: must not have a colon")
        made[str(registry)] = {key: str(text) for key, text in found.items()}
    return made


def _image_keys(value: Any) -> dict[str, str]:
    """Files by publisher. Raises SparkfleetError for a name that no image can have: nothing would be checked."""
    made = _value(IMAGE_KEYS, value, options()[IMAGE_KEYS])
    for publisher, file in made.items():
        if not isinstance(publisher, str) or not _PUBLISHER.fullmatch(publisher):
            raise SparkfleetError(
                f"{IMAGE_KEYS}: {_shown(publisher)} is not REGISTRY or REGISTRY/PATH, without https://, tag or *"
            )
        if not isinstance(file, str) or not file.strip():
            raise SparkfleetError(f"{IMAGE_KEYS}: {publisher}: must be the path of a public key, not {_shown(file)}")
    return dict(made)


def _value(name: str, value: Any, option: Mapping[str, Any], rule: str = "") -> Any:
    """`rule`: the variable whose range or form holds, if it is another one."""
    hidden = bool(option.get("no_log"))
    kind, rule = option["type"], rule or name
    if kind in _CONVERT:
        convert, words = _CONVERT[kind]
        least, most = RANGES.get(rule, (-math.inf, math.inf))
        if rule in RANGES:
            words = f"{words} from {least:g} to {most:g}" if most < 1e6 else f"{words} from {least:g} to {most:.0f}"
        made = convert(value)
        if made is None or (rule in RANGES and not least <= made <= most):
            raise _wrong(name, value, words, hidden)
        return made
    if kind in ("str", "path"):
        if isinstance(value, int | float) and not isinstance(value, bool):
            # YAML reads something other than what was written: 0775 is 509 there, and 25.10 is 25.1.
            shown = "" if hidden else f" {_shown(value)}"
            raise SparkfleetError(f"{name}: must be text, not the number{shown}: write the value in quotes")
        if not isinstance(value, str):
            raise _wrong(name, value, "a text", hidden)
        yaml_text.check(value, name)
        text = str(value)
        if "choices" in option and text not in option["choices"]:
            raise _wrong(name, value, f"one of {', '.join(option['choices'])}", hidden)
        pattern, words = _form(rule)
        if (text or option.get("default") != "") and not re.fullmatch(pattern, text):
            raise _wrong(name, value, words, hidden)
        return text
    wanted = {"dict": (Mapping, "a mapping"), "list": (list | tuple, "a list")}.get(kind)
    if wanted and not isinstance(value, wanted[0]):
        raise _wrong(name, value, wanted[1], hidden)
    yaml_text.check(value, name)
    return value


def _form(name: str) -> tuple[str, str]:
    if name in ("sparkfleet_image", "sparkfleet_revision"):
        rule = catalog.schema()["$defs"][name.removeprefix(PREFIX)]
        return rule["pattern"], rule["expected"]
    return FORMS.get(name, _LINE)


def _wrong(name: str, value: Any, words: str, secret: bool) -> SparkfleetError:
    return SparkfleetError(f"{name}: must be {words}" + ("" if secret else f", not {_shown(value)}"))


def _shown(value: Any) -> str:
    try:
        return printable(repr(value), 80)
    except ValueError:  # a number of thousands of digits
        return "a number of thousands of digits"


def _integer(value: Any) -> int | None:
    if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,18}", value.strip()):
        return int(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: Any) -> float | None:
    if isinstance(value, str) and len(value) <= yaml_text.NUMBER:
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= yaml_text.LARGEST:
        return None
    return float(value)


def _truth(value: Any) -> bool | None:
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    return words.get(value.strip().lower()) if isinstance(value, str) else None


_CONVERT: dict[str, tuple[Callable[[Any], Any], str]] = {
    "int": (_integer, "a whole number"),
    "float": (_number, "a number"),
    "bool": (_truth, "true or false"),
}


def arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of a host's variables the arguments of vllm serve, without their prefix."""
    return {
        name.removeprefix(ARGUMENT_PREFIX): scalar(value)
        for name, value in values.items()
        if name.startswith(ARGUMENT_PREFIX)
    }


def scalar(value: Any) -> Any:
    """A number or a truth value out of a string: `-e name=value` knows only strings."""
    if not isinstance(value, str):
        return value
    try:
        parsed = yaml_text.load(value, yaml_text.NUMBER)
    except yaml_text.YamlError:
        return value
    return parsed if isinstance(parsed, bool | int | float) else value
