"""What the project's speed claims rest on, measured on simulated Sparks: ``scripts/bench``."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import re
import resource
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from simulator.shell import SimulatorError
from simulator.spark import SERVICE, Prober, Spark
from simulator.world import World, progress, run_in

ROOT = Path(__file__).resolve().parents[1]
TRIVIAL = ROOT / "simulator" / "bench_trivial.yml"
#: Enough to make image and model the long part, as on a real line; Mbit/s.
REGISTRY_MBIT, HUB_MBIT = 80.0, 30.0
FLEET = 8
HOSTS = (1, 2, 4, 8, 16)
PARTS = ("fresh", "no-op", "restart", "recovery", "fleet", "controller", "rollout", "once")
#: torch.compile, which the simulated engine leaves out unless asked; vLLM 0.32 fails to load what it compiled ahead of
#: time for a CPU, and compiles again.
COMPILED = (
    '{"sparkfleet_vllm_compilation_config": {"mode": 3}, "sparkfleet_environment": {"VLLM_USE_AOT_COMPILE": "0"}}'
)
START_SECONDS = 400
COMPILE_CACHE = "/var/cache/sparkfleet"


@dataclasses.dataclass(frozen=True)
class Run:
    """One playbook run: wall seconds and what it printed."""

    seconds: float
    output: str


def play(world: str, playbook: str | Path, *words: str, gateways: str = "") -> Run:
    """Run a playbook against a world; raise with the end of its output when it fails."""
    environment = {
        **os.environ,
        "SPARKFLEET_WORLD": world,
        "SPARKFLEET_GATEWAYS": gateways,
        "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
    }
    command = ["ansible-playbook", "-i", str(ROOT / "inventory" / "simulated"), str(playbook), *words]
    began = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - began
    if done.returncode != 0:
        raise SimulatorError(f"{' '.join(command)} failed:\n" + "\n".join(done.stdout.splitlines()[-25:]))
    return Run(seconds, done.stdout)


def last_figure(pattern: str, output: str) -> float:
    """The last number that a pattern finds."""
    found = re.findall(pattern, output)
    if not found:
        raise SimulatorError(f"the run printed nothing like {pattern}")
    return float(found[-1])


def changed(output: str) -> int:
    """Sum of changed= of the recap."""
    return sum(map(int, re.findall(r"changed=(\d+)", output)))


def fresh(world: World) -> None:
    """A fresh deploy with throttled sources against its critical path."""
    world.throttle(REGISTRY_MBIT, HUB_MBIT)
    try:
        run = play(world.name, "site.yml")
    finally:
        world.throttle(None, None)
    pull = last_figure(r"image done \((\d+(?:\.\d+)?) s\)", run.output)
    download = last_figure(r"model done \((\d+(?:\.\d+)?) s\)", run.output)
    start = last_figure(r"(\d+(?:\.\d+)?) s +ready", run.output)
    path = max(pull, download) + start
    print(
        f"fresh deploy          {run.seconds:6.1f} s   image pull {pull:.0f} s, model download {download:.0f} s, "
        f"engine start {start:.0f} s; critical path {path:.0f} s; ratio {run.seconds / path:.2f} (goal: at most 1.15)"
    )


def no_op(world: str, runs: int, *words: str, name: str = "no-op run, verified") -> float:
    """Whole no-op runs in turn with a playbook of one trivial task; the median of the former."""
    ours, trivial = [], []
    for _ in range(runs):
        trivial.append(play(world, TRIVIAL, *words).seconds)
        run = play(world, "site.yml", *words)
        if changed(run.output):
            raise SimulatorError("a run that should change nothing changed something:\n" + run.output)
        ours.append(run.seconds)
    ratio = statistics.median(a / b for a, b in zip(ours, trivial, strict=True))
    print(
        f"{name:21} {statistics.median(ours):6.2f} s   one trivial task {statistics.median(trivial):.2f} s; "
        f"ratio {ratio:.2f} (goal: at most 1.8), {runs} pairs"
    )
    return statistics.median(ours)


def fleet(runs: int, world: World) -> None:
    """A no-op run on eight Sparks without a running engine against one of them."""
    world.up(FLEET, "dgxos", "none")
    stopped = ("-e", "sparkfleet_service_state=stopped")
    play(world.name, "site.yml", *stopped)
    one, all_of_them = [], []
    for _ in range(runs):
        one.append(play(world.name, "site.yml", *stopped, "--limit", "localhost,spark-1").seconds)
        run = play(world.name, "site.yml", *stopped)
        if changed(run.output):
            raise SimulatorError("a run that should change nothing changed something:\n" + run.output)
        all_of_them.append(run.seconds)
    ratio = statistics.median(b / a for a, b in zip(one, all_of_them, strict=True))
    print(
        f"no-op run, {FLEET} Sparks   {statistics.median(all_of_them):6.2f} s   "
        f"one Spark {statistics.median(one):.2f} s; ratio {ratio:.2f} (goal: at most 3), {runs} pairs"
    )


def controller(runs: int, world: World) -> None:
    """Seconds and processor seconds of the controller for a no-op run, by number of hosts; their slopes."""
    world.up(HOSTS[-1], "dgxos", "none")
    stopped = ("-e", "sparkfleet_service_state=stopped")
    play(world.name, "site.yml", *stopped)
    wall, processor = [], []
    for count in HOSTS:
        limit = ",".join(["localhost", *(f"spark-{number}" for number in range(1, count + 1))])
        seconds, used = [], []
        for _ in range(runs):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds.append(play(world.name, "site.yml", *stopped, "--limit", limit).seconds)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            used.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        wall.append(statistics.median(seconds))
        processor.append(statistics.median(used))
        print(f"no-op run, {count:2} hosts    {wall[-1]:6.2f} s   {processor[-1]:.2f} s of processor, {runs} runs")
    print(
        f"each further host     {slope(HOSTS, wall):6.2f} s   {slope(HOSTS, processor):.2f} s of processor "
        f"(goal: at most 0.2 s; the Sparks run on the same {os.cpu_count()} processors)"
    )


def rollout(runs: int, world: World) -> None:
    """No-op rollouts of eight Sparks that serve behind a gateway, in turn with no-op runs of site.yml on them."""
    world.up(FLEET, "dgxos", "fault")
    gateways = "spark-1"
    play(world.name, "site.yml", gateways=gateways)
    site: list[float] = []
    rolled: list[float] = []
    for _ in range(runs):
        for playbook, seconds in (("site.yml", site), ("playbooks/rollout.yml", rolled)):
            run = play(world.name, playbook, gateways=gateways)
            if changed(run.output):
                raise SimulatorError("a run that should change nothing changed something:\n" + run.output)
            seconds.append(run.seconds)
    ratio = statistics.median(b / a for a, b in zip(site, rolled, strict=True))
    print(
        f"no-op rollout, {FLEET} Sparks {statistics.median(rolled):6.2f} s   no-op site.yml on them "
        f"{statistics.median(site):.2f} s; ratio {ratio:.2f} (goal: at most 1.5), {runs} pairs"
    )


def once(world: World) -> None:
    """Bytes that leave the simulated internet, and seconds, for one fresh Spark and for eight at once."""
    left, seconds = [], []
    for count in (1, FLEET):
        world.down()
        world.up(count, "dgxos", "fault")
        before = sent(world)
        run = play(world.name, "site.yml")
        left.append(sent(world) - before)
        seconds.append(run.seconds)
        alone = len(re.findall(r"came from the internet after all|fetches by itself", run.output))
        size = f"{left[-1] / 1e6:.1f} MB left the internet"
        print(f"fetch, {count} fresh Sparks {run.seconds:6.1f} s   {size}; {alone} went alone")
    ratio = left[1] / left[0]
    print(f"bytes, {FLEET} against 1     {ratio:6.3f}     (goal: at most 1.05); time {seconds[1] / seconds[0]:.2f}")


def sent(world: World) -> int:
    """Bytes that the simulated internet has sent to its Sparks so far: registry, Hub and name server."""
    code, output = run_in(world.container("internet"), ["cat", "/sys/class/net/eth0/statistics/tx_bytes"])
    if code != 0:
        raise SimulatorError(f"internet: {output.strip()}")
    return int(output)


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Of the line through the points, by least squares."""
    return statistics.linear_regression(xs, ys).slope


def restart(runs: int, world: World) -> None:
    """Restarts of the engine with the compile cache kept, in turn with restarts without it."""
    play(world.name, "site.yml", "-e", COMPILED)
    kept, emptied = [], []
    for _ in range(runs):
        emptied.append(start(world, f"find {COMPILE_CACHE} -mindepth 2 -delete"))
        kept.append(start(world, "true"))
    size = run_in(world.container("spark-1"), ["du", "-sh", COMPILE_CACHE])[1].split()[0]
    ratio = statistics.median(a / b for a, b in zip(kept, emptied, strict=True))
    print(
        f"restart of the engine {statistics.median(kept):6.1f} s   without its compile cache "
        f"{statistics.median(emptied):.1f} s; ratio {ratio:.2f}, {runs} pairs, {size} of cache"
    )


#: What is done to an engine that serves, as a script on the Spark.
CRASH = f"kill -9 $(docker inspect -f '{{{{.State.Pid}}}}' {SERVICE})"
WEDGE = "kill -STOP $(pgrep -f '[V]LLM::EngineCore')"


def recovery(world: World) -> None:
    """A failed upgrade, a crash, a wedge: seconds without an answer, seen from outside, with the default settings."""
    play(world.name, "site.yml")
    spark = Spark(world, "spark-1", {})
    release = spark.release()
    prober = Prober(spark)
    output = spark.play(sparkfleet_vllm_no_such_thing=1)
    gone = prober.end()
    if "was started again and is verified" not in output or spark.release() != release:
        raise SimulatorError(f"the old release does not serve:\n{output[-2000:]}")
    print(f"failed upgrade        {gone:6.1f} s   without an answer, then the old release by itself")

    def serves() -> bool:
        return bool(spark.guard()["engine"] == "serving" and spark.answers())

    for name, harm in (("crash (kill -9)", CRASH), ("wedge (SIGSTOP)", WEDGE)):
        spark.until("it serves", serves)
        known, prober = len(spark.guard()["restarts"]), Prober(spark)
        spark.sh(harm)
        restarted = functools.partial(_restarted, spark, known)
        spark.until("the guard starts it", restarted, START_SECONDS)
        spark.until("a right answer", serves, START_SECONDS)
        gone, noted = prober.end(), spark.guard()["restarts"][-1]
        print(f"{name:21} {gone:6.1f} s   until it answered again, {noted['back_after_s']:.1f} s of it to start")


def _restarted(spark: Spark, known: int) -> bool:
    return len(spark.guard()["restarts"]) > known


def start(world: World, between: str) -> float:
    """Remove the engine's container, run a command, start it; seconds from the start until /health answers."""
    spark, compose = world.container("spark-1"), "docker compose --project-directory /opt/sparkfleet"
    code, output = run_in(spark, ["sh", "-euc", f"{compose} down; {between}; {compose} up --detach"])
    began = time.monotonic()
    if code != 0:
        raise SimulatorError(f"the engine was not started: {output.strip()}")
    health = f"http://127.0.0.1:{world.state()['sparks']['spark-1']['http']}/health"
    while time.monotonic() - began < START_SECONDS:
        try:
            with urllib.request.urlopen(health, timeout=2) as answer:
                if answer.status == 200:
                    return time.monotonic() - began
        except OSError:
            time.sleep(0.2)
    raise SimulatorError(f"the engine does not answer after {START_SECONDS} s")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; exit 1 when a run fails."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Measure on simulated Sparks.")
    parser.add_argument("--runs", type=int, default=5, help="pairs of runs (default: %(default)s)")
    parser.add_argument("--only", choices=PARTS, action="append", help="this part only")
    parser.add_argument("--keep", action="store_true", help="leave the worlds up")
    options = parser.parse_args(argv)
    parts = options.only or PARTS
    with progress() as say:
        world, many, fresh_ones = World("bench", say), World("bench-fleet", say), World("bench-once", say)
        try:
            if "fresh" in parts or "no-op" in parts:
                if "fresh" in parts:
                    world.down()
                world.up(1, "dgxos", "vllm")
            if "fresh" in parts:
                fresh(world)
            elif "no-op" in parts:
                play(world.name, "site.yml")
            if "no-op" in parts:
                no_op(world.name, options.runs)
            if "restart" in parts:
                world.up(1, "dgxos", "vllm")
                restart(min(options.runs, 3), world)
            if "recovery" in parts:
                world.up(1, "dgxos", "vllm")
                recovery(world)
            if "fleet" in parts:
                world.down()
                fleet(options.runs, many)
            if "controller" in parts:
                world.down()
                controller(min(options.runs, 3), many)
            if "rollout" in parts:
                many.down()
                rollout(min(options.runs, 3), many)
            if "once" in parts:
                world.down()
                once(fresh_ones)
        except SimulatorError as error:
            print(f"bench: {error}", file=sys.stderr)
            return 1
        finally:
            if not options.keep:
                world.down()
                many.down()
                fresh_ones.down()
    return 0


if __name__ == "__main__":
    sys.exit(main())
