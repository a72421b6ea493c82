# SPDX-License-Identifier: Apache-2.0
"""The format of a release's files and of a switch's journal.

A release holds a list of engines, each a service of its compose file. The engines of plan and lock are in the same
order, which is the order that they are started in:

    plan.json     {"format": 2, "engines": [{service, model, profile, repo, image, verify, memory, settings}]}
    lock.json     {"format": 2, "engines": [{service, model, profile, repo, revision, image, port}], cache_dir,
                  compile_cache_dir, controller, created, number, sha256}; "draft": {repo, revision} of an engine whose
                  tokens another model drafts
    outcome.json  {state, at, verified_at, failure, message, container_ids: {service: id}}
    switch.json   see `_JOURNAL`

Of a trial the plan has format 3, with "kind": "trial", "weights": dummy or real, and perhaps the "loads" that it
measures: [{streams, input, output, rounds, seed, seconds}] (see `bench.Load`). `settings` is a hash of what the
figures of an engine depend on besides image and model; plans of earlier versions have none. An engine that starts on
demand has "on_demand": {port, room_gib, needs_gib}, see `OnDemandPlan`, and the plan then format 5 (2 in releases of
the first versions that had it). Of an engine that spans several hosts the plan
has format 4, and the engine its part `group` (see `group.check_group`): it is this host's rank alone.

Format 1, which has no "format", holds one engine with its fields at the top level. Each function here returns format 2,
whichever format it reads; the files of a release that was staged are never rewritten.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from . import bounded
from .bounded import BoundsError, as_dict, as_int, as_list, as_number, as_str, as_time
from .group import Group, check_group

FORMAT = 2
TRIAL_FORMAT = 3  # of a trial, which an earlier version must neither deploy nor roll back to
GROUP_FORMAT = 4  # of a rank, which an earlier version would start alone
ON_DEMAND_FORMAT = 5  # with engines that start on demand, all of which an earlier version would start
NEWEST = ON_DEMAND_FORMAT
TRIAL = "trial"  # a kind of release, and the mode of its switch
#: Phases of a switch on its way back to the previous release.
RETURNING = ("restoring", "restore-waiting", "restore-verifying")
DUMMY, REAL = WEIGHTS = ("dummy", "real")  # of a trial
MOST_ENGINES = 16  # of a release
MOST_LOADS = 8  # of a trial
#: Of each number of a load, the least and the most.
LOAD = {
    "streams": (1, 1024),
    "input": (1, 1 << 20),
    "output": (1, 1 << 17),
    "rounds": (1, 100),
    "seed": (0, 1 << 31),
    "seconds": (10, 7200),
}
COMPOSE, PLAN = "compose.yml", "plan.json"
HASHED = (COMPOSE, PLAN)  # whose hashes the lock has
VERIFIED, FAILED = "verified", "failed"
DONE = "done"
NUMBERS = 10**9  # a greater number is not a release
LOG_LINES = 400  # of a failed start, kept in the journal
#: As Docker Compose names services.
SERVICE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")
_QUESTIONS = ("question", "expect", "prompt", "prompt_expect")
_PLANNED = ("service", "model", "profile", "repo", "image", "verify", "memory")
_LOCKED = ("service", "model", "profile", "repo", "revision", "image", "port")


class NewerFormatError(BoundsError):
    """A newer version of Sparkfleet wrote the file."""


@dataclasses.dataclass(frozen=True)
class OnDemandPlan:
    """Of an engine that starts on demand: the TCP port of its door, and in GiB what it needs and what is there for all
    such engines of the host that run at the same time (None where no plan says so)."""

    port: int
    needs_gib: float | None = None
    room_gib: float | None = None


@dataclasses.dataclass(frozen=True)
class Engine:
    """An engine of a release. `model` is the name of its card; `verify` the questions that it must answer, see
    `check_plan`; `memory` the figures of the plan, None where there are none; `settings` a hash of what measured
    figures depend on. "" means what a release of an earlier version does not have."""

    service: str
    model: str
    profile: str
    repo: str
    revision: str
    image: str
    port: int
    verify: Mapping[str, Any]
    memory: Mapping[str, Any] | None
    settings: str = ""
    draft: Mapping[str, str] | None = None  # {repo, revision} of the model that drafts for it
    on_demand: OnDemandPlan | None = None  # None for one that always runs
    group: Group | None = None  # of a rank of an engine that spans several hosts

    @property
    def is_worker(self) -> bool:
        """Whether it is a rank other than 0, which answers nobody."""
        return self.group is not None and not self.group.is_head

    @property
    def url(self) -> str:
        """Where it answers, as seen from the host."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def decode_limit(self) -> float:
        """Tokens a second that memory bandwidth allows one stream; 0 for unknown."""
        return float((self.memory or {}).get("decode_tok_s_limit") or 0.0)


def as_json(data: Any) -> str:
    """JSON as the files have it."""
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


# -- plan and lock ---------------------------------------------------------------------------------------------------


def check_plan(data: Any) -> dict[str, Any]:
    """A release's plan: {format, engines: [{service, model, repo: not empty; profile, image: str; verify: {question,
    expect, prompt, prompt_expect: str, max_tokens: int, kinds: [str]}; memory: {…} or None; settings: str}], and of a
    trial kind and weights}. Raises BoundsError."""
    plan = as_dict(data, "the plan")
    number = _format(plan, NEWEST)
    if number < FORMAT:
        plan = {"engines": [_of_format_1(plan, _PLANNED)]}
    if (number == TRIAL_FORMAT) != (plan.get("kind") == TRIAL):
        raise BoundsError(f"kind: {bounded.printable(repr(plan.get('kind')), 80)} is none of format {number}")
    if number == TRIAL_FORMAT and plan.get("weights") not in WEIGHTS:
        raise BoundsError(f"weights: none of {', '.join(WEIGHTS)}")
    engines = _engines(plan, _planned)
    if (number == GROUP_FORMAT) != any(engine.get("group") for engine in engines):
        raise BoundsError(f"group: in a plan of format {number}")
    if number == GROUP_FORMAT and len(engines) > 1:
        raise BoundsError("engines: a host with a rank of a group has no other")
    if number == ON_DEMAND_FORMAT and not any(engine.get("on_demand") for engine in engines):
        raise BoundsError(f"on_demand: of no engine in a plan of format {number}")
    loads = {"loads": check_loads(plan["loads"])} if number == TRIAL_FORMAT and plan.get("loads") else {}
    return {**plan, **loads, "format": max(number, FORMAT), "engines": engines}


def check_loads(value: Any) -> list[dict[str, int]]:
    """What a trial measures. Raises BoundsError."""
    return [check_load(item) for item in as_list(value, "loads", MOST_LOADS)]


def check_load(value: Any) -> dict[str, int]:
    """A load as plain data. Raises BoundsError."""
    given = as_dict(value, "a load")
    return {key: as_int(given.get(key), f"load.{key}", *bounds) for key, bounds in LOAD.items()}


def trial_weights(plan: Mapping[str, Any]) -> str:
    """`dummy` or `real` of a trial's plan, "" of a release that is to serve."""
    return str(plan["weights"]) if plan.get("kind") == TRIAL else ""


def check_lock(data: Any) -> dict[str, Any]:
    """What a release is pinned to: {format, engines: [{service, port, and model, profile, repo, revision, image: str}],
    cache_dir, …}. Raises BoundsError."""
    lock = as_dict(data, "the lock")
    if _format(lock) < FORMAT:
        rest = {key: value for key, value in lock.items() if key not in _LOCKED}
        lock = {**rest, "engines": [_of_format_1(lock, _LOCKED)]}
    for key in ("cache_dir", "compile_cache_dir", "controller"):
        if lock.get(key) is not None:
            as_str(lock[key], key, 4096)
    if "sha256" in lock:
        for name, value in as_dict(lock["sha256"], "sha256").items():
            if name not in HASHED:
                raise BoundsError(f"sha256: {bounded.printable(repr(name), 80)} is none of {', '.join(HASHED)}")
            bounded.matched(bounded.SHA256, value, f"sha256 of {name}")
    engines = _engines(lock, _locked)
    _check_unique("port", [engine["port"] for engine in engines])
    return {**lock, "format": FORMAT, "engines": engines}


def merged(plan: Mapping[str, Any], lock: Mapping[str, Any]) -> tuple[Engine, ...]:
    """The engines of a release from its plan and its lock, both checked. Raises BoundsError where they do not have the
    same services."""
    services = [[engine["service"] for engine in part["engines"]] for part in (plan, lock)]
    if services[0] != services[1]:
        raise BoundsError(f"engines: {', '.join(services[1])} in the lock, {', '.join(services[0])} in the plan")
    return tuple(
        Engine(
            **{key: planned[key] for key in ("service", "model", "profile", "repo", "verify", "memory")},
            **{key: locked[key] for key in ("revision", "port")},
            image=locked["image"] or planned["image"],
            settings=planned.get("settings", ""),
            draft=locked.get("draft"),
            on_demand=OnDemandPlan(**planned["on_demand"]) if planned.get("on_demand") else None,
            group=check_group(planned["group"]) if planned.get("group") else None,
        )
        for planned, locked in zip(plan["engines"], lock["engines"], strict=True)
    )


def identity(plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What makes two plans of the same compose file the same release. The figures of memory are not part of it: they
    change with what is free on the host."""
    kind = {"trial": weights, "loads": plan.get("loads", [])} if (weights := trial_weights(plan)) else {}
    return [
        {
            **kind,
            **{key: engine[key] for key in ("service", "model", "profile", "verify")},
            **({"group": engine["group"]} if engine.get("group") else {}),
            **_door(engine),
        }
        for engine in plan["engines"]
    ]


def _door(engine: Mapping[str, Any]) -> dict[str, Any]:
    return {"door": engine["on_demand"]["port"]} if engine.get("on_demand") else {}


def _format(data: Mapping[str, Any], newest: int = FORMAT) -> int:
    number = as_int(data.get("format", 1), "format", 1)
    if number > newest:
        raise NewerFormatError(f"format {number} was written by a newer version of Sparkfleet")
    return number


def _of_format_1(data: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: data[key] for key in keys if data.get(key) is not None}


def _engines(data: Mapping[str, Any], check: Callable[[Any], dict[str, Any]]) -> list[dict[str, Any]]:
    engines = [check(item) for item in as_list(data.get("engines"), "engines", MOST_ENGINES)]
    if not engines:
        raise BoundsError("engines: there is none")
    _check_unique("service", [engine["service"] for engine in engines])
    return engines


def _check_unique(what: str, values: list[Any]) -> None:
    twice = sorted({str(value) for value in values if values.count(value) > 1})
    if twice:
        raise BoundsError(f"engines: two have the {what} {twice[0]}")


def _planned(data: Any) -> dict[str, Any]:
    engine = as_dict(data, "an engine")
    for key in ("model", "repo"):
        if not as_str(engine.get(key), key, 1000):
            raise BoundsError(f"{key} is empty")
    as_str(engine.get("settings", ""), "settings", 64)
    if engine.get("group") is not None:
        check_group(engine["group"])
    asked = as_dict(engine.get("verify"), "verify")
    kinds = as_list(asked.get("kinds", []), "verify.kinds", 100)  # none in releases of earlier versions
    memory = engine.get("memory")
    if memory is not None:
        limit = as_dict(memory, "memory").get("decode_tok_s_limit")
        if limit is not None:
            as_number(limit, "memory.decode_tok_s_limit")
    return {
        **engine,
        **({"on_demand": _on_demand(engine["on_demand"])} if engine.get("on_demand") is not None else {}),
        "service": bounded.matched(SERVICE, engine.get("service"), "service"),
        "profile": as_str(engine.get("profile", ""), "profile", 1000),
        "image": as_str(engine.get("image", ""), "image", 4096),
        "verify": {
            **{key: as_str(asked.get(key), f"verify.{key}") for key in _QUESTIONS},
            "max_tokens": as_int(asked.get("max_tokens", 32), "verify.max_tokens", 1, 1 << 20),
            "kinds": [as_str(kind, "verify.kinds", 100) for kind in kinds],
        },
        "memory": memory,
    }


def _on_demand(data: Any) -> dict[str, Any]:
    given = as_dict(data, "on_demand")
    made: dict[str, Any] = {"port": as_int(given.get("port"), "on_demand.port", 1, 65535)}
    for key in ("needs_gib", "room_gib"):
        value = given.get(key)
        made[key] = None if value is None else as_number(value, f"on_demand.{key}", -1e6, 1e6)
    return made


def _locked(data: Any) -> dict[str, Any]:
    engine = as_dict(data, "an engine")
    draft = {}
    if engine.get("draft") is not None:
        given = as_dict(engine["draft"], "draft")
        draft["draft"] = {
            "repo": bounded.matched(bounded.REPO, given.get("repo"), "draft.repo"),
            "revision": bounded.matched(bounded.COMMIT, given.get("revision"), "draft.revision"),
        }
    return {
        **engine,
        **draft,
        "service": bounded.matched(SERVICE, engine.get("service"), "service"),
        **{key: as_str(engine.get(key, ""), key, 4096) for key in ("model", "profile", "repo", "revision", "image")},
        "port": as_int(engine.get("port"), "port", 1, 65535),
    }


# -- outcome ---------------------------------------------------------------------------------------------------------


def check_outcome(data: Any, first: str = "") -> dict[str, Any]:
    """How a release fared; see `Store.outcome`. `first`: the service whose container an outcome of format 1 names.
    Raises BoundsError."""
    outcome = as_dict(data, "the outcome")
    if outcome.get("state") not in (VERIFIED, FAILED):
        raise BoundsError(f"state: {bounded.printable(repr(outcome.get('state')), 80)} is none")
    as_time(outcome.get("at"), "at")
    if outcome.get("verified_at") is not None:
        as_time(outcome["verified_at"], "verified_at")
    for key in ("failure", "message", "container_id"):
        if outcome.get(key) is not None:
            as_str(outcome[key], key)
    rest = {key: value for key, value in outcome.items() if key != "container_id"}
    before = {first: outcome["container_id"]} if outcome.get("container_id") else {}
    return {**rest, "container_ids": _ids(outcome.get("container_ids", before), "container_ids")}


# -- the journal of a switch -----------------------------------------------------------------------------------------


def _optional(check: Callable[..., Any]) -> Callable[[Any, str], Any]:
    return lambda value, what: None if value is None else check(value, what)


def _steps(value: Any, what: str) -> list[dict[str, Any]]:
    return [_step(as_dict(step, what), what) for step in as_list(value, what, 1000)]


def _step(step: dict[str, Any], what: str) -> dict[str, Any]:
    made = {"phase": as_str(step.get("phase"), what, 100), "at": as_time(step.get("at"), what)}
    return {**made, "container": as_str(step["container"], what, 1000)} if step.get("container") else made


def _error(value: Any, what: str) -> dict[str, Any]:
    error = as_dict(value, what)
    as_str(error.get("message"), f"{what}.message")
    for key in ("failure", "container", "state", "docker_error"):
        if error.get(key) is not None:
            as_str(error[key], f"{what}.{key}")
    for line in as_list(error.get("log", []), f"{what}.log", 10_000):
        as_str(line, f"{what}.log")
    for key in ("exit_code", "restart_count"):
        as_int(error.get(key, 0), f"{what}.{key}", -(1 << 31))
    for check in as_list(error.get("checks", []), f"{what}.checks", 100):
        as_dict(check, f"{what}.checks")
    return error


def _reclaimed(value: Any, what: str) -> list[dict[str, Any]]:
    return [
        {
            **{key: as_str(as_dict(item, what).get(key), f"{what}.{key}", 4096) for key in ("kind", "name")},
            "bytes": as_int(item.get("bytes"), f"{what}.bytes"),
        }
        for item in as_list(value, what, 1000)
    ]


def _sentences(value: Any, what: str) -> list[str]:
    return [as_str(item, what, 4096) for item in as_list(value, what, 1000)]


def _number(value: Any, what: str) -> int:
    return as_int(value, what, 0, NUMBERS)


def _text(value: Any, what: str) -> str:
    return as_str(value, what)


def _truth(value: Any, what: str) -> bool:
    if not isinstance(value, bool):
        raise BoundsError(f"{what}: not true or false")
    return value


def _names(value: Any, what: str) -> list[str]:
    return [as_str(item, what, 1000) for item in as_list(value, what, MOST_ENGINES)]


def _by_service(value: Any, what: str, check: Callable[[Any, str], Any]) -> dict[str, Any]:
    found = as_dict(value, what)
    if len(found) > MOST_ENGINES:
        raise BoundsError(f"{what}: more than {MOST_ENGINES} items")
    return {as_str(key, what, 1000): check(item, what) for key, item in found.items()}


def _ids(value: Any, what: str) -> dict[str, str]:
    return _by_service(value, what, lambda item, what: as_str(item, what, 1000))


def _results(value: Any, what: str) -> dict[str, dict[str, Any]]:
    return _by_service(value, what, as_dict)


#: Of each field of the journal: what checks it, and what it is where an earlier version left it out.
_JOURNAL: dict[str, tuple[Callable[[Any, str], Any], Any]] = {
    **dict.fromkeys(("id", "mode", "controller", "verb", "boot_id", "phase"), (_text, "")),
    "container": (_text, ""),  # the service that the phase concerns
    # quick or deep; which kind of the deep ones is being asked, or how many streams are being measured
    **dict.fromkeys(("verify", "asking"), (_text, "")),
    "verify_seconds": (as_number, 0.0),  # of a deep verification
    "joined": (_truth, False),  # of a worker: it could be switched, and waits for rank 0
    "from": (_optional(_number), None),
    "outcome": (_optional(_text), None),
    **dict.fromkeys(("models", "from_models"), (_names, [])),
    "services": (_names, []),  # those that alone are to be restarted
    "kept": (_names, []),  # services that are the same in both releases and keep running
    "container_ids": (_ids, {}),
    "verifications": (_results, {}),  # results of `verify`, by service
    "measured": (_results, {}),  # figures of the engines that it started (see `measured`), by service
    **dict.fromkeys(("pid", "keep"), (_number, 0)),
    "start_timeout": (as_time, 0.0),
    "began": (as_time, 0.0),
    **dict.fromkeys(("ended", "stopped_at", "answering_at", "out_of_service_s"), (_optional(as_time), None)),
    "steps": (_steps, []),
    **dict.fromkeys(("error", "restore_error"), (_optional(_error), None)),
    "reclaimed": (_reclaimed, []),
    **dict.fromkeys(("left", "repaired", "troubles"), (_sentences, [])),
}
#: What a recovery needs from the journal, and what records how the switch ended.
_NEEDED = (
    *("id", "to", "from", "mode", "controller", "verb", "models", "from_models", "services", "kept", "pid", "boot_id"),
    *("keep", "start_timeout", "began", "ended", "phase", "steps", "container", "container_ids", "outcome", "error"),
    *("restore_error", "stopped_at", "answering_at", "out_of_service_s"),
)
#: Fields of a journal of one engine, and what checks them.
_FORMAT_1: dict[str, Callable[[Any, str], Any]] = {
    **{"model": _text, "from_model": _optional(_text), "container_id": _text, "verification": _optional(as_dict)},
}


def check_journal(data: Any) -> dict[str, Any]:
    """The journal of a switch, with all its fields; some may be missing from one that an earlier version wrote. Raises
    BoundsError."""
    journal = _migrated(as_dict(data, "the journal"))
    checked: dict[str, Any] = {"to": _number(journal.get("to"), "to")}
    for key, (check, absent) in _JOURNAL.items():
        checked[key] = check(journal[key], key) if key in journal else copy.copy(absent)
    return {**journal, **checked}


def _migrated(journal: dict[str, Any]) -> dict[str, Any]:
    """The journal of format 2 for one of format 1. Raises BoundsError."""
    before = {key: check(journal[key], key) for key, check in _FORMAT_1.items() if key in journal}
    if not before:
        return journal
    service = _text(journal.get("container") or "", "container")
    made: dict[str, Any] = {
        **{f"{key}s": [before[key]] for key in ("model", "from_model") if before.get(key)},
        **{f"{key}s": {service: before[key]} for key in ("container_id", "verification") if before.get(key)},
    }
    return {**made, **{key: value for key, value in journal.items() if key not in _FORMAT_1}}


def storable(journal: Mapping[str, Any]) -> dict[str, Any]:
    """A journal as it is written: plain data that `check_journal` takes when it is read back, since a recovery depends
    on it. What is of another form or too long is cut or left out, and of one that is too large altogether all that a
    recovery does not need."""
    kept = _fitting(journal, 64 * bounded.KIB)
    if len(as_json(kept).encode("utf-8", "backslashreplace")) > bounded.STATE_FILE:
        kept = _fitting({key: journal[key] for key in _NEEDED if key in journal}, 200)
    return kept


def _fitting(journal: Mapping[str, Any], longest: int) -> dict[str, Any]:
    kept: dict[str, Any] = _plain(journal, longest, 24)
    for key in ("error", "restore_error"):
        if isinstance(kept.get(key), dict) and isinstance(kept[key].get("log"), list):
            kept[key]["log"] = kept[key]["log"][-LOG_LINES:]
    try:
        kept = _migrated(kept)
    except BoundsError:
        kept = {key: value for key, value in kept.items() if key not in _FORMAT_1}
    for key, (check, absent) in _JOURNAL.items():
        try:
            check(kept.get(key, absent), key)
        except BoundsError:
            kept[key] = copy.copy(absent)
            if key in ("error", "restore_error") and journal.get(key):  # that there was one counts
                given = journal[key] if isinstance(journal[key], Mapping) else {}
                kept[key] = {
                    name: bounded.printable(str(given.get(name) or ""), 200) for name in ("message", "failure")
                }
    return kept


def _plain(value: Any, longest: int, depth: int) -> Any:
    """Data that JSON can hold, texts cut; None for what it cannot hold."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return value[:longest]
    if isinstance(value, int):
        return value if abs(value) < 1 << 62 else None
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if depth and isinstance(value, Mapping):
        return {key[:longest]: _plain(item, longest, depth - 1) for key, item in value.items() if isinstance(key, str)}
    if depth and isinstance(value, list | tuple):
        return [_plain(item, longest, depth - 1) for item in value]
    return None
