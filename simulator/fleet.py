"""A fleet behind its gateway, under load the whole time: rollouts good and bad, an engine and a Spark that die, drift.

    python -m simulator.fleet --world NAME [--streams 8] [--json FILE]

The world has the engine that fails on command, a gateway (SPARKFLEET_GATEWAYS=spark-1), and what site.yml deploys.
Each scene ends with every Spark serving again.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from simulator.load import Load, line
from simulator.shell import SimulatorError
from simulator.spark import ROOT, SERVICE, Spark
from simulator.world import World, run_in

NEXT = "nvcr.io/nvidia/vllm:25.10-py3"
PORT = 8080
BASE = {"sparkfleet_start_timeout": 30, "sparkfleet_guard_interval": 0.5, "sparkfleet_rollout_waves": "50%"}
DRIFT = 4


@dataclasses.dataclass
class Fleet:
    """The Sparks of a world, and the gateway on one of them."""

    world: World
    gateway: str
    streams: int

    def __post_init__(self) -> None:
        self.names = sorted(self.world.state()["sparks"])
        code, said = run_in(self.world.container(self.gateway), ["hostname", "-i"])
        if code != 0:
            raise SimulatorError(f"{self.gateway}: {said}")
        self.address = said.split()[0]  # the world's network is bridged to this machine

    def sparkfleet(self, *words: str, **variables: Any) -> tuple[int, str, float]:
        """Run a verb; exit code, what it printed, seconds."""
        environment = {**os.environ, "SPARKFLEET_WORLD": self.world.name, "SPARKFLEET_GATEWAYS": self.gateway}
        argv = [str(Path(sys.executable).with_name("sparkfleet")), *words, "-i", "inventory/simulated"]
        began = time.monotonic()
        done = subprocess.run(
            [*argv, "-e", json.dumps({**BASE, **variables})],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr, time.monotonic() - began

    def under_load(self, scene: Callable[[], None]) -> dict[str, Any]:
        """Do something while requests come through the gateway; what became of them."""
        load = Load(f"http://{self.address}:{PORT}", self.streams).start()
        time.sleep(2)
        try:
            scene()
            time.sleep(2)
        finally:
            result = load.stop()
        return result

    def releases(self) -> dict[str, str]:
        """The current release of each Spark, and since when its engine runs."""
        found = {}
        for name in self.names:
            spark = self.spark(name)
            found[name] = spark.release() + spark.sh(f"docker inspect -f '{{{{.State.StartedAt}}}}' {SERVICE}")
        return found

    def spark(self, name: str) -> Spark:
        return Spark(self.world, name, BASE)

    def healthy(self) -> None:
        """Wait until every Spark answers, and the gateway knows."""
        for name in self.names:
            spark = self.spark(name)
            spark.until("a right answer", spark.answers)
            spark.until("the guard serves", functools.partial(serves, spark))
        time.sleep(2)


def serves(spark: Spark) -> bool:
    """Whether its guard says so."""
    return bool(spark.guard()["engine"] == "serving")


def expect(fact: bool, what: str, detail: object = "") -> None:
    """Raise unless it is so."""
    if not fact:
        raise SimulatorError(f"{what}: {str(detail)[-3000:]}")


def good(fleet: Fleet) -> dict[str, Any]:
    """Another image, in waves."""
    took: list[float] = []

    def scene() -> None:
        code, said, seconds = fleet.sparkfleet("rollout", sparkfleet_image=NEXT)
        expect(code == 0, "the rollout failed", said)
        took.append(seconds)

    before = fleet.releases()
    result = fleet.under_load(scene)
    after = fleet.releases()
    expect(all(before[name] != after[name] for name in fleet.names), "not every Spark was rolled out", after)
    expect(result["failed"] == 0, "requests failed", line(result))
    return {**result, "rollout_s": round(took[0], 1)}


def bad(fleet: Fleet) -> dict[str, Any]:
    """A release that answers wrong: the canary is taken back, nobody else is touched."""
    before = fleet.releases()

    def scene() -> None:
        wrong = {"SIMULATED_FAULT": "answer-wrong"}
        code, said, _ = fleet.sparkfleet("rollout", sparkfleet_image=NEXT, sparkfleet_environment=wrong)
        expect(code == 5, "the rollout did not end as restored (5)", f"{code} {said}")

    result = fleet.under_load(scene)
    after = fleet.releases()
    changed = [name for name in fleet.names if before[name] != after[name]]
    expect(len(changed) == 1, "more or less than the canary was touched", changed)
    release = {name: text.partition("2")[0] for name, text in after.items()}
    expect(fleet.spark(changed[0]).answers(), "the canary does not serve", release)
    expect(result["failed"] == 0, "requests failed", line(result))
    return {**result, "untouched": len(fleet.names) - 1}


def killed(fleet: Fleet) -> dict[str, Any]:
    """kill -9 of an engine: what was in flight there is lost, nothing else."""
    victim = fleet.spark(fleet.names[-1])
    result = fleet.under_load(lambda: kill(victim))
    expect(result["failed"] <= fleet.streams, "more failed than was in flight", line(result))
    return result


def kill(spark: Spark) -> None:
    """kill -9 of the engine, and time to route around it."""
    spark.sh(f"kill -9 $(docker inspect -f '{{{{.State.Pid}}}}' {SERVICE})")
    time.sleep(5)


def gone(fleet: Fleet) -> dict[str, Any]:
    """A whole Spark dies, and comes back."""

    def scene() -> None:
        fleet.world.reboot(fleet.names[-1])
        time.sleep(3)

    result = fleet.under_load(scene)
    expect(result["failed"] <= fleet.streams, "more failed than was in flight", line(result))
    return result


def drift(fleet: Fleet) -> dict[str, Any]:
    """Nothing differs; then one engine is stopped by hand, and it is told."""
    code, said, _ = fleet.sparkfleet("drift", "--json", sparkfleet_image=NEXT)
    expect(code == 0, "there is drift", said)
    victim = fleet.spark(fleet.names[-1])
    victim.sh(f"docker stop -t 2 {SERVICE}")
    code, said, seconds = fleet.sparkfleet("drift", sparkfleet_image=NEXT)
    expect(code == DRIFT and f"{victim.name} differs from the inventory" in said, "it is not told", f"{code} {said}")
    code, said, _ = fleet.sparkfleet("start", "-l", victim.name)
    expect(code == 0, "it does not start again", said)
    return {"seconds": round(seconds, 1)}


def resumed(fleet: Fleet) -> dict[str, Any]:
    """A rollout of what all have is nothing to do."""
    code, said, seconds = fleet.sparkfleet("rollout", sparkfleet_image=NEXT)
    expect(code == 0 and "has it already" in said, "it was rolled out again", said)
    return {"seconds": round(seconds, 1)}


SCENES = (good, resumed, bad, killed, gone, drift)


def main(argv: Sequence[str] | None = None) -> int:
    """Play the scenes; 1 when one does not end as it should."""
    parser = argparse.ArgumentParser(prog="python -m simulator.fleet", description="A fleet under load.")
    parser.add_argument("--world", default="fleet")
    parser.add_argument("--gateway", default="spark-1")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--only", nargs="*", choices=[scene.__name__ for scene in SCENES])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    world = World(options.world, lambda text: None)
    found: dict[str, Any] = {}
    try:
        fleet = Fleet(world, options.gateway, options.streams)
        for scene in SCENES:
            if options.only and scene.__name__ not in options.only:
                continue
            fleet.healthy()
            found[scene.__name__] = result = scene(fleet)
            more = {key: result[key] for key in ("rollout_s", "untouched") if key in result}
            print(f"{scene.__name__}: {line(result) if 'sent' in result else ''} {more or result}", flush=True)
    except SimulatorError as error:
        print(f"FAILED after {', '.join(found) or 'nothing'}: {error}", file=sys.stderr)
        return 1
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
