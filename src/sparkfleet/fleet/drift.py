"""How a Spark differs from the inventory: the plan's reasons, and what is different in the deployed file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sparkfleet.documents import yaml_text
from sparkfleet.planning import compose
from sparkfleet.reporting import status_page

#: Reasons that add nothing to the differences of the file.
_STAGE = ("stage", "switch to")


def reasons(plan: Mapping[str, Any], state: Mapping[str, Any], answers: bool | None = None) -> list[str]:
    """What would be done to bring the Spark back, in words; empty where it matches the inventory.

    `answers`: whether the endpoint answered its question; None where it was not asked.
    """
    found: list[str] = []
    for stage in ("prepare", "fetch"):
        found += [reason for value in plan[stage].values() if isinstance(value, list) for reason in value]
    deploy = plan["deploy"]
    if deploy["stage"]:
        deployed = yaml_text.compose_file(state.get("compose_file"))
        found += differences(deployed, plan["compose"]) if isinstance(deployed, dict) else ["nothing is deployed"]
    found += [f"files damaged: {line}" for line in status_page.damaged(state.get("releases") or {"current": None})]
    for kind in ("start", "stop", "wait"):
        found += [reason for reason in deploy[kind] if not reason.startswith(_STAGE)]
    in_turn = [bool(engine.get("on_demand")) for engine in plan.get("engines") or []]
    known = state.get("engines") or []
    answering = [
        engine["healthy"] for place, engine in enumerate(known) if not (place < len(in_turn) and in_turn[place])
    ]
    if (deploy["stage"] or deploy["start"]) and state.get("compose_file") and not all(answering):
        found.append("the engine does not answer" if len(answering) == 1 else "an engine does not answer")
    if answers is False:
        found.append("the endpoint does not answer its question")
    return found


def differences(deployed: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What differs between two compose files: "what: deployed → wanted", a line each; with more than one service the
    line starts with its name."""
    old, new = _services(deployed), _services(wanted)
    if len(old) <= 1 and len(new) == 1:
        lines = _renamed(next(iter(old), ""), next(iter(new))) + _changes(next(iter(old.values()), {}), *new.values())
    else:
        lines = [f"service: {name} → none" for name in old if name not in new]
        for name, service in new.items():
            if name not in old:
                lines.append(f"service: none → {name}")
            else:
                lines += [f"{name}: {line}" for line in _changes(old[name], service)]
    return lines or ["the compose file is written in another way"]


def _renamed(old: str, new: str) -> list[str]:
    return [f"service: {old} → {new}"] if old != new else []


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two services."""
    lines = []
    # What is compiled is stored in a folder of the image's digest.
    follows = {"volumes"} if old.get("image") != new.get("image") else set()
    for key in sorted({*map(str, old), *new} - {"command", "environment"} - follows):
        if old.get(key) != new.get(key):
            before, after = _apart(old.get(key), new.get(key))
            lines.append(f"{key}: {_text(before)} → {_text(after)}")
    for kind, before, after in (
        ("argument", _flags(old.get("command")), _flags(new.get("command"))),
        ("environment", _variables(old.get("environment")), _variables(new.get("environment"))),
    ):
        for key in [*before, *(key for key in after if key not in before)]:
            if before.get(key) != after.get(key):
                lines.append(f"{kind} {key}: {_text(before.get(key))} → {_text(after.get(key))}")
    return lines


def _services(document: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The services of a file, which someone may have edited: of unknown form."""
    services = document.get("services")
    found = services if isinstance(services, dict) else {}
    return {str(name): service if isinstance(service, dict) else {} for name, service in found.items()}


def _flags(command: Any) -> dict[str, str]:
    """Flags of a command with their values; what precedes them is the model."""
    found: dict[str, str] = {}
    flag = "model"
    words = command.split() if isinstance(command, str) else command if isinstance(command, list) else []
    for word in map(compose.plain, compose.of_engine(words)):
        if word.startswith("--"):
            flag = word
            found[flag] = ""
        elif word not in ("vllm", "serve"):
            found[flag] = f"{found.get(flag, '')} {word}".strip()
    return found


def _variables(environment: Any) -> dict[str, str]:
    """Variables of a service, as a mapping or as a list of NAME=VALUE."""
    if isinstance(environment, list):
        environment = dict(str(pair).partition("=")[::2] for pair in environment)
    pairs = environment.items() if isinstance(environment, dict) else ()
    return {str(name): value if value == compose.TOKEN else compose.plain(value) for name, value in pairs}


def _apart(old: Any, new: Any) -> tuple[Any, Any]:
    """Of two lists what only one of them has."""
    if isinstance(old, list) and isinstance(new, list):
        return [item for item in old if item not in new] or None, [item for item in new if item not in old] or None
    return old, new


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if value == "":
        return "set"
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return re.sub(r"(sha256:[0-9a-f]{12})[0-9a-f]{52}", r"\1", text)
