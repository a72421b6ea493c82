"""What a run would do to the fleet as a whole, seen before anything changes: Sparks that would stop serving at the
same time, and one host under two names. Pure functions of what the hosts' plans and states say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparkfleet import SparkfleetError
from sparkfleet.reporting import report

VARIABLE = "sparkfleet_all_at_once"
#: Verbs of a release that is there already: they know no plan, only what is served (the module spark_status).
SERVICE_VERBS = ("stop", "restart", "rollback")


def stops(plan: Mapping[str, Any], state: Mapping[str, Any], stages: Sequence[str] = ("prepare", "deploy")) -> bool:
    """Whether the stages would stop an engine that serves now, by what spark_plan found on a Spark."""
    ours = [item for item in state["docker"].get("containers", []) if item["ours"] and item["state"] == "running"]
    if not (ours and any(engine["healthy"] for engine in state["engines"])):
        return False
    work = plan["prepare"]
    # A restart of Docker restarts its containers.
    restarts = any("restart" in reason for part in ("docker", "toolkit") for reason in work.get(part, ()))
    switches = bool(plan["deploy"]["start"] or plan["deploy"]["stop_services"])
    return ("prepare" in stages and restarts) or ("deploy" in stages and switches)


def stopped_by(verb: str, status: Mapping[str, Any]) -> bool:
    """Whether one of SERVICE_VERBS would stop an engine that serves now, by what spark_status found."""
    same = verb == "rollback" and status.get("release") == status["releases"]["current"]
    return bool(verb in SERVICE_VERBS and status["engine"] == "serving" and not same)


def units(stopping: Sequence[str], groups: Mapping[str, Sequence[str]]) -> list[str]:
    """The hosts that stop, of those that run one engine together the first alone. `groups`: of a host those of its
    group, none for a host of its own."""
    made = {next((other for other in groups.get(host, ()) if other in stopping), host): None for host in stopping}
    return list(made)


def check(stopping: Sequence[str], allowed: bool, waves: bool) -> None:
    """Raise SparkfleetError where more than one Spark would stop at once and that was not confirmed. `waves`: whether
    `sparkfleet rollout` can do the same."""
    if len(stopping) < 2 or allowed:
        return
    ways = ["one after the other with -l SPARK", f"all at once with --yes (ansible-playbook: -e {VARIABLE}=true)"]
    if waves:
        ways.insert(0, "in waves with `sparkfleet rollout`, which takes the same -e")
    raise SparkfleetError(
        f"{report.count(len(stopping), 'Spark')} serving now would stop at the same time: "
        f"{report.names(list(stopping))}. Nothing was changed. Do it {', or '.join(ways)} [all-at-once]"
    )


def check_identities(machines: Mapping[str, tuple[str, str]]) -> None:
    """Raise SparkfleetError where two names of the inventory are one host. `machines`: name -> machine ID and boot ID;
    cloned systems share the former, containers of one kernel the latter."""
    seen: dict[tuple[str, str], str] = {}
    for name, identity in machines.items():
        if not all(identity):
            continue
        other = seen.setdefault(identity, name)
        if other != name:
            raise SparkfleetError(
                f"{other} and {name} are the same host (machine ID {identity[0]}). Nothing was changed. Remove one of "
                "the two names from the inventory, or correct its ansible_host [same-host]"
            )
