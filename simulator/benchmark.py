"""`sparkfleet bench` against a count of the same run by someone else: the engine's counters, read from outside ten
times a second while it is measured.

    python -m simulator.benchmark --world NAME [--spark spark-1] [--shape 128:64] [--streams 1,4,16] [--json FILE]

The world has the real engine, and the Spark serves what site.yml deploys. Of each load, requests, tokens, tokens a
second and the mean time to the first token must agree within WITHIN.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparkfleet_host import metrics

from simulator.shell import SimulatorError
from simulator.spark import Spark, bearer, engine_key
from simulator.world import World

WITHIN = 0.05
TIMEOUT = 3600.0  # of the whole benchmark
PAUSE = 0.1  # seconds between two readings
QUIET = 1.5  # seconds without a request that end a burst
FIRST = "time_to_first_token_seconds"
COUNTERS = ("generation_tokens", "request_success", f"{FIRST}_sum", f"{FIRST}_count")
OPEN = ("num_requests_running", "num_requests_waiting")


@dataclasses.dataclass
class Burst:
    """Requests without a pause between them: when the first was seen and the last token, and by how much the counters
    moved."""

    began: float
    before: Mapping[str, float]
    ended: float = 0.0
    after: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def moved(self, name: str) -> float:
        """By how much a counter moved."""
        return self.after.get(name, 0.0) - self.before.get(name, 0.0)


class Watcher:
    """Reads an engine's counters until it is stopped."""

    def __init__(self, url: str) -> None:
        self.url, self.bursts = url, []  # type: tuple[str, list[Burst]]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> Watcher:
        """Begin; returns itself."""
        self._thread.start()
        return self

    def stop(self) -> list[Burst]:
        """The bursts seen."""
        self._over.set()
        self._thread.join(30)
        return self.bursts

    def _run(self) -> None:
        before = self._read()
        going: Burst | None = None
        while not self._over.wait(PAUSE):
            now, found = time.monotonic(), self._read()
            moved = any(found.get(name, 0.0) != before.get(name, 0.0) for name in COUNTERS)
            if moved or any(found.get(name) for name in OPEN):
                if going is None:
                    going = Burst(now - PAUSE, before)
                    self.bursts.append(going)
                if moved:
                    going.ended, going.after = now, found
            elif going is not None and now - max(going.ended, going.began) > QUIET:
                going = None
            before = found

    def _read(self) -> dict[str, float]:
        request = urllib.request.Request(f"{self.url}/metrics", headers=bearer(engine_key()))  # noqa: S310
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 - http, loopback
            return metrics.sums(answer.read(metrics.LIMIT).decode("utf-8", "replace"), (*COUNTERS, *OPEN))


def pairs(rows: Sequence[Mapping[str, Any]], bursts: Sequence[Burst]) -> list[dict[str, Any]]:
    """Each row of a record and the burst that it is of, in their order: a burst of as many requests. Figures of both,
    and by how much the row differs. Raises SimulatorError where one is missing."""
    made, left = [], list(bursts)
    for row in rows:
        while left and round(left[0].moved("request_success")) != row["requests"]:
            left.pop(0)
        if not left:
            raise SimulatorError(f"of {row['streams']} streams: no {row['requests']} requests were seen from outside")
        burst = left.pop(0)
        seconds = max(burst.ended - burst.began, 1e-6)
        tokens, firsts = burst.moved("generation_tokens"), burst.moved(f"{FIRST}_count")
        seen = {
            "requests": burst.moved("request_success"),
            "output_tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "ttft_mean_ms": burst.moved(f"{FIRST}_sum") / max(firsts, 1) * 1000,
        }
        made.append(
            {
                "streams": row["streams"],
                "repetition": row["repetition"],
                **{
                    name: {"measured": row[name], "seen": round(value, 2), "differs": round(row[name] / value - 1, 4)}
                    for name, value in seen.items()
                },
            }
        )
    return made


def scene(world: World, name: str, words: Sequence[str]) -> dict[str, Any]:
    """Measure and watch; the pairs and the record. Raises SimulatorError."""
    spark = Spark(world, name, {})
    watcher = Watcher(f"http://127.0.0.1:{spark.port}").start()
    began = time.monotonic()
    code, printed = spark.verb("bench", *words, "--even-if-serving", "--json", seconds=TIMEOUT)
    took = time.monotonic() - began
    bursts = watcher.stop()
    if code != 0:
        raise SimulatorError(f"sparkfleet bench: exit code {code}: {printed[-2000:]}")
    (record,) = json.loads(printed[printed.index("{") :])["hosts"][0]["benchmarks"]
    return {"seconds": round(took, 1), "pairs": pairs(record["rows"], bursts), "record": record}


def main(argv: Sequence[str] | None = None) -> int:
    """Play it; 1 where requests, tokens or tokens a second differ by more than WITHIN."""
    parser = argparse.ArgumentParser(prog="python -m simulator.benchmark", description="A benchmark, counted twice.")
    parser.add_argument("--world", default="demo")
    parser.add_argument("--spark", default="spark-1")
    asked = {"shape": "128:64", "streams": "1,4,16", "repetitions": "2", "rounds": "3"}
    for name, default in asked.items():
        parser.add_argument(f"--{name}", default=default, help="as of bench (default: %(default)s)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    words = [word for name in asked for word in (f"--{name}", getattr(options, name))]
    try:
        made = scene(World(options.world, print), options.spark, words)
    except SimulatorError as error:
        print(f"simulator: {error}", file=sys.stderr)
        return 1
    if options.json:
        options.json.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    for pair in made["pairs"]:
        print(json.dumps(pair))
    differences = [
        abs(value["differs"]) for pair in made["pairs"] for value in pair.values() if isinstance(value, dict)
    ]
    worst = max(differences)
    print(f"{len(made['pairs'])} loads in {made['seconds']} s; the largest difference is {worst:.1%}")
    return 0 if worst <= WITHIN else 1


if __name__ == "__main__":
    sys.exit(main())
