"""A dry run of a rollout: plan, input and schedule of a whole inventory, with no host contacted.

What only an inspection shows (free memory, what is deployed) is assumed to be usual: a Spark with nothing else on it,
and every Spark in need of the change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sparkfleet import SparkfleetError
from sparkfleet.documents import schema
from sparkfleet.fleet import receivers, rollout
from sparkfleet.planning import memory_plan, nodes, preflight, variables
from sparkfleet.planning.target import Settings, Target
from sparkfleet.reporting import report

#: Settings that Target and memory plan depend on.
FIELDS = (
    *("model", "profile", "model_source", "arguments", "environment", "tool_calls", "image", "revision", "port"),
    "engines",
    *("listen", "memory_plan", "memory_reserve_gib", "lock_file", "lock_signers"),
)


@dataclasses.dataclass(frozen=True)
class Planned:
    """An engine and its memory plan (of `memory_plan.Plan.as_dict`), or why there is none."""

    model: str
    profile: str
    image: str
    plan: dict[str, Any] | None
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class Kind:
    """Sparks with the same settings."""

    hosts: list[str]
    engines: list[Planned]


@dataclasses.dataclass(frozen=True)
class DryRun:
    """The whole: kinds of Sparks, waves, names that are drained."""

    kinds: list[Kind]
    waves: list[list[str]]
    drained: list[str]

    @property
    def fits(self) -> bool:
        """Whether nothing stands in the way."""
        return all(engine.plan and engine.plan["fits"] for kind in self.kinds for engine in kind.engines)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**dataclasses.asdict(self), "fits": self.fits}


def make(hosts: Mapping[str, Mapping[str, Any]]) -> DryRun:
    """Plan and schedule of hosts with their variables. Raises SparkfleetError with what is wrong in them, and for
    settings that a rollout has once."""
    hosts = settled(hosts)
    drained = [name for name, values in hosts.items() if values.get("sparkfleet_drained", False)]
    if together := [name for name, values in hosts.items() if values.get(nodes.NODES) and name not in drained]:
        raise SparkfleetError(
            f"{nodes.NODES}: {report.names(together)} run an engine together, which is not planned on paper yet: "
            "`sparkfleet preflight` plans it on the hosts, and changes nothing"
        )
    same: dict[str, list[str]] = {}
    settings: dict[str, Settings] = {}
    for name, values in hosts.items():
        if name in drained:
            continue
        of_host = Settings.of(values)
        wanted = {field: getattr(of_host, field) for field in FIELDS}
        key = repr(sorted(wanted.items(), key=str))
        same.setdefault(key, []).append(name)
        settings[key] = Settings(**wanted)
    kinds, problems = [], []
    for key, names in same.items():
        try:
            kinds.append(_kind(names, settings[key]))
        except SparkfleetError as error:
            problems.append(str(error))
    if problems:
        raise SparkfleetError("\n".join(problems))
    models = {name: [engine.model for engine in kind.engines] for kind in kinds for name in kind.hosts}
    needing = [{"name": name, "models": models[name], "needed": True} for name in hosts if name in models]
    shared = rollout.shared(hosts)
    waves = rollout.schedule(needing, rollout.canaries(shared[rollout.CANARY]), shared["sparkfleet_rollout_waves"])
    return DryRun(kinds, waves, drained)


def settled(hosts: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each host's variables, checked. Raises SparkfleetError with each problem and the hosts that have it."""
    settled: dict[str, dict[str, Any]] = {}
    problems: dict[str, list[str]] = {}
    for name, values in hosts.items():
        try:
            settled[name] = {**values, **variables.settle(values)}
            receivers.check(settled[name])
        except SparkfleetError as error:
            for line in str(error).splitlines():
                problems.setdefault(line, []).append(name)
    if problems:
        raise SparkfleetError(schema.joined([f"{report.names(who)}: {line}" for line, who in problems.items()]))
    return settled


def _kind(names: list[str], settings: Settings) -> Kind:
    try:
        target = Target.of(settings)
    except SparkfleetError as error:
        raise SparkfleetError(f"{report.names(names)}: {error}") from None
    total = memory_plan.USUAL_TOTAL_GIB
    plans = preflight.memory_plans(target, total, total - memory_plan.USUAL_HOST_GIB)
    engines = []
    for engine, (_, made) in zip(target.engines, plans, strict=True):
        known = (engine.card.name, engine.settings.profile, engine.image)
        if isinstance(made, SparkfleetError):  # a layout that is not known
            engines.append(Planned(*known, None, str(made)))
        else:
            engines.append(Planned(*known, made.as_dict()))
    return Kind(names, engines)


def page(run: DryRun) -> str:
    """The run for people."""
    lines = []
    for kind in run.kinds:
        for engine in kind.engines:
            lines.append(f"{report.names(kind.hosts)}: {engine.model} ({engine.profile}), {engine.image or 'no image'}")
            if engine.plan is None:
                lines.append(f"  NO  {engine.problem}")
                continue
            lines.append(f"  {'ok' if engine.plan['fits'] else 'NO'}  memory: {report.brief(engine.plan)}")
            lines += [f"      {reason}" for reason in engine.plan["reasons"]]
    hosts = [
        {"name": name, "models": [engine.model for engine in kind.engines], "needed": True}
        for kind in run.kinds
        for name in kind.hosts
    ]
    lines += ["", *rollout.lines(run.waves, hosts, run.drained)]
    lines.append("no host was contacted; `sparkfleet preflight` shows the hosts' state and findings")
    return "\n".join(lines) + "\n"
