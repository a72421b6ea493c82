"""The schedule of a rollout: which Sparks get a change in which wave. A pure function of hosts and settings."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sparkfleet_host.bounded import printable

from sparkfleet import SparkfleetError
from sparkfleet.planning import target
from sparkfleet.reporting import report

WAVES = "sparkfleet_rollout_waves"
CANARY = "sparkfleet_rollout_canary"
ON_FAILURE = "sparkfleet_rollout_on_failure"
CANARY_LABEL = "canary"
POLICIES = ("stop", "continue")
SHARED = (CANARY, WAVES, ON_FAILURE)
_EXAMPLES = "write a number of Sparks (2), a share (25%), or a list of both ([1, 2, 50%])"


def schedule(hosts: Sequence[Mapping[str, Any]], canary: int, waves: Any) -> list[list[str]]:
    """The waves, as names of hosts, in the order of `hosts`: [{name, models, needed}].

    First `canary` Sparks of each kind (those with the same models), one kind after the other: a bad image stops at one
    Spark, whatever the model.
    Then what is left in waves of a size: a number, a share of all that need the change, or a list whose last entry
    goes on. Hosts that need nothing are left out. Raises SparkfleetError naming a bad value.
    """
    needed = [host for host in hosts if host["needed"]]
    sizes = [_size(value, len(needed)) for value in (waves if isinstance(waves, list) else [waves])]
    if not sizes:
        raise SparkfleetError(f"{WAVES} is an empty list: {_EXAMPLES}")
    made: list[list[str]] = []
    left = [str(host["name"]) for host in needed]
    if canary:
        kinds: dict[str, list[str]] = {}
        for host in needed:
            kinds.setdefault(_kind(host), []).append(str(host["name"]))
        made = [names[:canary] for names in kinds.values()]
        first = {name for wave in made for name in wave}
        left = [name for name in left if name not in first]
    while left:
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        made.append(left[:size])
        left = left[size:]
    return made


def _kind(host: Mapping[str, Any]) -> str:
    return " + ".join(host["models"])


def canaries(value: Any) -> int:
    """The number of canaries, as an inventory writes it. Raises SparkfleetError."""
    text, shown = _written(value)
    if not re.fullmatch(r"\s*[0-9]{1,6}\s*", text):
        raise SparkfleetError(f"{CANARY} is {shown}: use 0 for none, or a number of Sparks")
    return int(text)


def _size(value: Any, total: int) -> int:
    """Sparks of a wave: at least one. Raises SparkfleetError."""
    text, shown = _written(value)
    found = re.fullmatch(r"\s*([0-9]{1,6})\s*(%?)\s*", text)
    if not found or int(found[1]) == 0 or (found[2] and int(found[1]) > 100):
        raise SparkfleetError(f"{WAVES}: {shown} is not a wave size; {_EXAMPLES}")
    return max(math.floor(total * int(found[1]) / 100), 1) if found[2] else int(found[1])


def _written(value: Any) -> tuple[str, str]:
    """A value as text, empty when it is neither a whole number nor text; and what an error is to show of it."""
    if isinstance(value, int) and not isinstance(value, bool):
        # Python does not print a number of more than 4,300 digits.
        return (str(value), str(value)) if abs(value) < 1_000_000 else ("", "a number of many digits")
    return value if isinstance(value, str) else "", printable(repr(value), 60)


def number(waves: Sequence[Sequence[str]], batch: Sequence[str]) -> int:
    """Which wave a batch of Ansible is, from 1: the earliest that one of its hosts is in. Raises SparkfleetError."""
    found = next((place for place, wave in enumerate(waves, 1) if set(wave) & set(batch)), 0)
    if not found:
        raise SparkfleetError(f"{report.names(batch)}: in no wave of the schedule")
    return found


def unfinished(waves: Sequence[Sequence[str]], number: int, done: Collection[str]) -> list[str]:
    """Hosts of the waves before wave `number` that did not come to their end, whatever kept them."""
    return [name for wave in waves[: number - 1] for name in wave if name not in done]


def labels(waves: Sequence[Sequence[str]], hosts: Sequence[Mapping[str, Any]], canary: int) -> list[str]:
    """What the waves are called, in a word each: "canary" for those of the canaries, else "2/4"."""
    first = len({_kind(host) for host in hosts if host["needed"]}) if canary else 0
    return [CANARY_LABEL if number <= first else f"{number}/{len(waves)}" for number in range(1, len(waves) + 1)]


def lines(waves: Sequence[Sequence[str]], hosts: Sequence[Mapping[str, Any]], drained: Sequence[str]) -> list[str]:
    """The schedule in words."""
    kind_of = {str(host["name"]): _kind(host) for host in hosts}
    lines = []
    for number, wave in enumerate(waves, 1):
        kinds = ", ".join(dict.fromkeys(kind_of[name] for name in wave))
        lines.append(f"rollout  wave {number} of {len(waves)}: {report.names(wave)} ({kinds})")
    done = [str(host["name"]) for host in hosts if not host["needed"]]
    if done:
        lines.append(f"rollout  up to date: {report.names(done)}")
    if drained:
        lines.append(f"rollout  drained, skipped: {report.names(drained)}")
    return lines or ["rollout  nothing to do"]


def shared(hosts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The settings of a rollout, which all of its hosts share. Raises SparkfleetError."""
    defaults = target.defaults()
    found = {key: agreed(key, defaults[key], hosts) for key in SHARED}
    if found[ON_FAILURE] not in POLICIES:
        raise SparkfleetError(f"{ON_FAILURE}: {found[ON_FAILURE]!r} is neither stop nor continue")
    return found


def agreed(key: str, default: Any, hosts: Mapping[str, Mapping[str, Any]]) -> Any:
    """The value of a variable that all hosts share. Raises SparkfleetError with two hosts that differ."""
    found: dict[str, tuple[str, Any]] = {}
    for name, variables in hosts.items():
        value = variables.get(key, default)
        found.setdefault(repr(value), (name, value))
    if len(found) > 1:
        (one, first), (two, second), *_ = found.values()
        raise SparkfleetError(
            f"{key} is {first!r} for {one} and {second!r} for {two}: a rollout needs one value; set it for the group "
            "sparks"
        )
    return next(iter(found.values()))[1] if found else default
