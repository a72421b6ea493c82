"""What a run does to the hosts of a group, which change together. Pure functions of their plans and states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparkfleet import SparkfleetError

Known = Mapping[str, Mapping[str, Any]]


def deploys(name: str, hosts: Known) -> dict[str, dict[str, Any]]:
    """Of each host of a group the part `deploy` of its plan, so that all of them do the same: stage a release of the
    same number and switch to it, restart the current one, or nothing. `hosts`: of each {plan, state}, by rank. Raises
    SparkfleetError where the ranks would not be of one engine."""
    own = {host: _own(item["plan"]) for host, item in hosts.items()}
    if not any(item["plan"]["fetch"]["needed"] for item in hosts.values()):
        check_same(name, hosts)
    current = {host: item["state"]["releases"]["current"] for host, item in hosts.items()}
    number = max(int(item["state"]["releases"]["next"]) for item in hosts.values())
    started = any(deploy["start"] or deploy["stage"] for deploy in own.values())
    stops = all(not deploy["start"] and deploy["stop"] for deploy in own.values())
    apart = len(set(current.values())) > 1 and not stops
    made = {}
    for host, deploy in own.items():
        if any(one["stage"] for one in own.values()) or apart:
            because = [] if deploy["stage"] or deploy["start"] else [f"with the group {name}"]
            made[host] = {
                **deploy,
                **{"needed": True, "mode": "deploy", "release": None, "number": number, "services": []},
                **{"stage": [f"stage release {number} of the group {name}"], "wait": [], "recreate": False},
                "start": deploy["start"] or [f"switch to it{''.join(f' {word}' for word in because)}"],
            }
            if not any(one["start"] for one in own.values()) and not apart:
                made[host]["start"] = []  # service_state stopped: it is only staged
        elif started:
            made[host] = {
                **deploy,
                **{"needed": True, "mode": "restart", "release": current[host], "number": 0, "services": []},
                "start": deploy["start"] or [f"restart its rank with the group {name}"],
                "recreate": any(one["recreate"] for one in own.values()),
                "wait": [],
            }
        else:
            made[host] = {**deploy, "number": 0}
    return made


def _own(plan: Mapping[str, Any]) -> dict[str, Any]:
    """What the host alone would do, whatever was made of it for the group before."""
    return dict(plan["group"].get("own") or plan["deploy"])


def check_same(name: str, hosts: Known) -> None:
    """Raise SparkfleetError where image, model or arguments differ between the ranks."""
    digests: dict[str, list[str]] = {}
    for host, item in hosts.items():
        digests.setdefault(item["plan"]["group"]["digest"], []).append(host)
    if len(digests) < 2:
        return
    said = []
    for what in ("image", "model", "revision"):
        found: dict[str, list[str]] = {}
        for host, item in hosts.items():
            found.setdefault(str(item["plan"]["release"]["lock"]["engines"][0][what]), []).append(host)
        if len(found) > 1:
            said.append(f"{what} {'; '.join(f'{value} on {_names(those)}' for value, those in found.items())}")
    words = ", ".join(said) or f"arguments or environment differ between {' and '.join(map(_names, digests.values()))}"
    raise SparkfleetError(
        f"the hosts of the group {name} would not run the same: {words}. Set what differs for the whole group "
        "[group-differs]"
    )


def _names(hosts: list[str]) -> str:
    return ", ".join(hosts)


def units(hosts: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """The hosts of a run by what changes as one: those of a group under the name of its first, others by themselves.
    `hosts`: of each its plan, or what has a part `group`."""
    made: dict[str, list[str]] = {}
    for host, item in hosts.items():
        group = item.get("group") or {}
        first = next((node["host"] for node in group.get("nodes", ())), host)
        made.setdefault(first if first in hosts else host, []).append(host)
    return made
