"""A row of the fault matrix, and the usual ways to bring a fault about."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

from simulator import faults
from simulator.spark import Spark

NEXT, FOREIGN, NOWHERE = (f"nvcr.io/nvidia/vllm:25.{month}-py3" for month in ("10", "11", "99"))
#: The inventory's settings for all rows: hours compressed to seconds.
BASE = {
    "sparkfleet_start_timeout": 12,
    "sparkfleet_guard_interval": 0.3,
    "sparkfleet_guard_wedge_seconds": 5,
    "sparkfleet_guard_canary_interval": 1.5,
    "sparkfleet_guard_canary_timeout": 1.5,
    "sparkfleet_guard_restart_window": 600,
}
SERVES, SERVES_NEW, BEFORE = "serves the old", "serves the new", "untouched"
STOPPED, CLEAN = "stopped", "no container is left"
#: Either release, the old one or a newer; and what the row itself has checked.
ANY, AS_SEEN = "serves", "as said"


@dataclasses.dataclass(frozen=True)
class Row:
    """One fault. `act` brings it about and returns what the operator saw; `sees` must all be in that. `ends`: how the
    host must be then. `diagnosis`: what diagnose must name, "" where the fault leaves no trace."""

    name: str
    where: str
    what: str
    act: Callable[[Spark], str]
    sees: tuple[str, ...]
    ends: str
    diagnosis: str = ""
    undo: str = ""  # a script that puts the host right again where site.yml is not to
    new: bool = False


def at_start(fault: str, **more: Any) -> Callable[[Spark], str]:
    """A release whose engine fails in this way."""
    return lambda spark: spark.play(sparkfleet_environment={"SIMULATED_FAULT": fault}, **more)


def playing(playbook: str, **variables: Any) -> Callable[[Spark], str]:
    """An ordinary run."""
    return lambda spark: spark.play(playbook, **variables)


def broken(*names: str, playbook: str = "site.yml", **variables: Any) -> Callable[[Spark], str]:
    """A run on a host with faults of `python -m simulator break`."""

    def act(spark: Spark) -> str:
        faults.break_(spark.world, spark.name, names)
        return spark.play(playbook, **variables)

    return act


def meanwhile(
    phase: Sequence[str],
    harm: Callable[[Spark, subprocess.Popen[str]], None],
    before: Callable[[Spark], object] = lambda spark: None,
    **environment: str,
) -> Callable[[Spark], str]:
    """A deployment that is harmed in a phase of its switch. `before`: what is done to the engine that serves."""

    def act(spark: Spark) -> str:
        before(spark)
        run = spark.start("site.yml", sparkfleet_environment=environment or {"SIMULATED_LOAD_SECONDS": "5"})
        spark.phase(*phase)
        harm(spark, run)
        return run.communicate(timeout=300)[0]

    return act


GUARD_SAYS = "journalctl --unit=sparkfleet-guard --output=cat --lines=12"


def healed(harm: Callable[[Spark], None]) -> Callable[[Spark], str]:
    """Harm an engine that serves, and wait until the guard has restarted it; what it said in the journal."""

    def act(spark: Spark) -> str:
        known = len(spark.guard()["restarts"])
        harm(spark)
        spark.until(
            "the guard recovers it",
            lambda: len(spark.guard()["restarts"]) > known and spark.guard()["engine"] == "serving",
        )
        return spark.sh(GUARD_SAYS)

    return act
