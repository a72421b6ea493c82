"""Recorded figures of a fleet that does not exist, for the status page: blocks of Prometheus and a fleet.json.

    python -m simulator.figures [--sparks 200] [--port 9112] [--rollout]

The distribution's Prometheus serves them with the built page until Ctrl-C. Plans and fleet.json are made by our own
code from the model cards; what is invented is the load, and some faults: a Spark that gave up, one that is hot, one
without figures, one that differs from the inventory. The engine of one is asleep, and of another a second one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sparkfleet_host import fleet_file
from sparkfleet_host.guard import STATES

from simulator.shell import SimulatorError
from sparkfleet.monitoring import page, rules
from sparkfleet.paths import ROOT
from sparkfleet.planning import catalog, memory_plan

MODELS = ("llama31-8b-fp8", "gpt-oss-120b", "qwen3-32b-fp8", "llama33-70b-nvfp4")
STEP, RECENT = 120, 600  # seconds between samples; how long what the page shows as a figure only has been there
AHEAD = 3600  # seconds for which figures are there already
GIB = 1024**3
SLEEPS, SECOND_SLEEPS = 20, 21  # Sparks whose engine, or second engine, starts on demand
PAGE = ROOT / "roles" / "monitoring" / "files" / "page"


def names(sparks: int) -> list[str]:
    """The Sparks."""
    return [f"spark-{number}" for number in range(1, sparks + 1)]


def model_of(place: int) -> str:
    """Most serve the first model."""
    return MODELS[0] if place % 5 < 2 else MODELS[place % len(MODELS)]


def state_of(place: int, switching: Sequence[int]) -> str:
    """Nearly all serve."""
    others = {4: "given-up", 11: "loading", SLEEPS: "asleep"}
    return "switching" if place in switching else others.get(place, "serving")


def openmetrics(sparks: int, hours: float, now: float, switching: Sequence[int] = ()) -> Iterator[str]:
    """Samples as `promtool tsdb create-blocks-from openmetrics` reads them. The third Spark has none."""
    first, last = int(now - hours * 3600) // STEP * STEP, int(now + AHEAD)
    dice = random.Random(15)  # noqa: S311 - figures, the same each time
    for place, host in enumerate(names(sparks)):
        if place == 2:
            continue
        model, state = model_of(place), state_of(place, switching)
        repo, phase, busy = catalog.load(model).repo, dice.random() * 6, 0.25 + dice.random() * 0.6
        serves = state == "serving"
        engine = f'{{host="{host}",model="{repo}"}}'

        def load(at: int, phase: float = phase, busy: float = busy) -> float:
            wave = 0.5 + 0.35 * math.sin(at / 4000 + phase) + 0.15 * math.sin(at / 700 + 3 * phase)
            return max(wave * busy + dice.gauss(0, 0.02), 0.0)

        for at in range(first, last, STEP):
            here = load(at) if serves or at < now - 1500 else 0.0
            recent = at > now - RECENT
            if serves or at < now - 1500:
                yield f"sparkfleet:generation_tokens:rate1m{engine} {here * 420:.2f} {at}"
                yield f"sparkfleet:kv_cache_usage_ratio{engine} {min(here * 1.1, 0.99):.4f} {at}"
                yield f"sparkfleet:requests_running{engine} {round(here * 24)} {at}"
                yield f"sparkfleet:requests_waiting{engine} {max(round(here * 24) - 16, 0)} {at}"
                yield f"sparkfleet:time_to_first_token_seconds:p95_5m{engine} {0.25 + here**2 * 2.2:.3f} {at}"
            heat = 44 + here * 36 + (14 if place == 6 else 0)
            yield f'sparkfleet_gpu_temperature_celsius{{host="{host}",job="node"}} {heat:.1f} {at}'
            used = _used(model) if serves or at < now - 1500 else 3.4
            yield f'sparkfleet:memory_available_bytes{{host="{host}"}} {(119.7 - used - here) * GIB:.0f} {at}'
            if not recent:
                continue
            guard = f'host="{host}",job="guard"'
            service = f'{guard},service="vllm-{model}"'
            for other in STATES:
                yield f'sparkfleet_engine_state{{{service},state="{other}"}} {other == state:d} {at}'
                if place == SECOND_SLEEPS:
                    second = f'{guard},service="vllm-on-demand",state="{other}"'
                    yield f"sparkfleet_engine_state{{{second}}} {other == 'asleep':d} {at}"
            yield f"sparkfleet_engine_up{{{service}}} {serves:d} {at}"
            yield f"sparkfleet_engine_given_up{{{service}}} {state == 'given-up':d} {at}"
            count = 3 if state == "given-up" else place % 7 == 3
            yield f'sparkfleet_engine_restarts_total{{{service},reason="crash"}} {count:d} {at}'
            yield f"sparkfleet_release{{{guard}}} {3 + place % 2} {at}"
            yield f'up{{host="{host}",job="engine"}} {serves:d} {at}'
            yield f'node_memory_MemTotal_bytes{{host="{host}",job="node"}} {119.7 * GIB:.0f} {at}'
            yield f'sparkfleet_gpu_power_watts{{host="{host}",job="node"}} {18 + here * 60:.1f} {at}'
            hot = place == 6
            yield f'sparkfleet_gpu_throttled{{host="{host}",job="node",reason="sw-thermal-slowdown"}} {hot:d} {at}'
            if place == 8:
                yield f'sparkfleet_gpu_xid_last_seconds{{host="{host}",job="node",xid="31"}} {now - 600:.0f} {at}'
    for at in range(int(now - RECENT), last, STEP):
        for model in MODELS:
            up = sum(model_of(place) == model and place not in (2, 4, 11) for place in range(sparks))
            yield f'sparkfleet:gateway_servers_up{{host="gateway-1",proxy="{model}"}} {up} {at}'
    yield "# EOF"


def _plan(model: str) -> dict[str, Any]:
    card = catalog.load(model)
    return memory_plan.make(card, card.with_profile("throughput")).as_dict()


def _used(model: str) -> float:
    """GiB in use on a host that serves it: a little less than planned."""
    plan = _plans().get(model) or _plans().setdefault(model, _plan(model))
    return float(plan["total_gib"] - plan["left_gib"]) * 0.985


def _plans(made: dict[str, dict[str, Any]] = {}) -> dict[str, dict[str, Any]]:  # noqa: B006 - made once
    return made


def fleet(sparks: int, now: float, waves: Sequence[Sequence[str]] = (), wave: int = 0) -> dict[str, Any]:
    """fleet.json of these Sparks; with `waves` in a rollout, at wave number `wave`."""
    entries = {}
    for place, host in enumerate(names(sparks)):
        model = model_of(place)
        _used(model)
        plan, card = _plans()[model], catalog.load(model)
        figures = {
            "weights_gib": plan["weights_gib"] * 1.004,
            "activation_gib": plan["activation_gib"] * 0.93,
            "cuda_graphs_gib": plan["cuda_graphs_gib"] * 1.1,
            "kv_cache_gib": plan["kv_cache_gib"] * 1.01,
        }
        image = "nvcr.io/nvidia/vllm:25.09-py3@sha256:" + f"{place % 3:x}" * 64
        engine = {
            **{"service": f"vllm-{model}", "model": model, "profile": "throughput", "repo": card.repo, "image": image},
            **{"port": 8000, "measured": {"planned": plan, "figures": figures}},
        }
        release, by = 3 + place % 2, "anna@ops-1"
        began = now - 7200 - place * 431
        told = [
            {"at": began, "event": "staged", "release": release, "model": model, "by": by},
            {"at": began + 95, "event": "verified", "release": release, "model": model},
        ]
        if place == 4:
            told.append({"at": now - 900, "event": "given up", "model": model, "by": "guard", "detail": "crash"})
        if place % 7 == 3:
            detail = "crash: exit code 137, back after 61 s"
            told.append(
                {"at": now - 3000 - place, "event": "restarted", "model": model, "by": "guard", "detail": detail}
            )
        drift = ["image: nvcr.io/nvidia/vllm:25.08-py3 → nvcr.io/nvidia/vllm:25.09-py3"] if place == 9 else []
        summary = {
            **{
                "release": release,
                "previous": release - 1,
                "engines": [engine],
                "drift": drift,
                "drained": place == 13,
            },
        }
        entries[host] = page.spark(summary, {"engines": [{"service": engine["service"], "memory": plan}]}, told)
    news: dict[str, Any] = {"inventory": names(sparks), "sparks": entries, "gateways": ["gateway-1"]}
    news["monitor"] = "gateway-1"
    old: dict[str, Any] = {}
    if waves:
        schedule = {"waves": waves, "labels": ["canary", *(f"{n}/{len(waves)}" for n in range(2, len(waves) + 1))]}
        schedule["on_failure"] = "stop"
        done = {name for names_ in waves[: wave - 1] for name in names_}
        news["rollout"] = {**page.rollout(schedule, wave, True, done, ()), "by": "anna@ops-1"}
        old = {"rollout": {**news["rollout"], "wave": 1, "began": now - 840, "changed": now - 700}}
    return fleet_file.merged(old, news, now - 240)


def blocks(folder: Path, sparks: int, hours: float, now: float, switching: Sequence[int] = ()) -> Path:
    """Prometheus' own files of these figures, in `folder`/data."""
    text = folder / "figures.txt"
    with text.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in openmetrics(sparks, hours, now, switching))
    command = ["promtool", "tsdb", "create-blocks-from", "openmetrics", "--quiet", str(text), str(folder / "data")]
    subprocess.run(command, check=True, capture_output=True)
    text.unlink()
    return folder / "data"


@contextlib.contextmanager
def prometheus(folder: Path, port: int) -> Iterator[str]:
    """Prometheus over `folder`/data with our alerts and, below /user, `folder`/page; its address."""
    (folder / "data").mkdir(exist_ok=True)
    (folder / "alerts.yml").write_text(rules.alerts_file(), encoding="utf-8")
    (folder / "prometheus.yml").write_text(
        "global: {evaluation_interval: 2s}\nrule_files: [alerts.yml]\n", encoding="utf-8"
    )
    command = [
        *("prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"),
        *(f"--web.listen-address=127.0.0.1:{port}", f"--web.user-assets={folder}/page"),
        *("--storage.tsdb.retention.time=30d", "--log.level=error"),
    ]
    with (folder / "prometheus.log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            address, end = f"http://127.0.0.1:{port}", time.monotonic() + 30
            while True:
                if process.poll() is not None or time.monotonic() > end:
                    raise SimulatorError((folder / "prometheus.log").read_text(encoding="utf-8")[-2000:])
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/-/ready", timeout=5):  # noqa: S310
                    break
                time.sleep(0.1)
            yield address
        finally:
            process.terminate()


def free_port() -> int:
    """One that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def waves_of(sparks: int) -> list[list[str]]:
    """A canary, then growing waves."""
    every, made = names(sparks), []
    for size in (1, 3, max(sparks // 8, 1)):
        made.append(every[:size])
        every = every[size:]
    return [wave for wave in (*made, every) if wave]


@contextlib.contextmanager
def serving(sparks: int, rollout: bool, port: int = 0, hours: float = 6.2) -> Iterator[tuple[str, Path]]:
    """The page with figures: address of Prometheus, and the folder with the page's files."""
    with tempfile.TemporaryDirectory(prefix="sparkfleet-figures-") as name:
        folder, now = Path(name), time.time()
        waves = waves_of(sparks) if rollout else []
        switching = [names(sparks).index(host) for host in waves[2][:4]] if len(waves) > 2 else []
        blocks(folder, sparks, hours, now, switching)
        shutil.copytree(PAGE, folder / "page")
        told = fleet(sparks, now, waves, 3 if len(waves) > 2 else 1)
        (folder / "page" / "fleet.json").write_text(json.dumps(told), encoding="utf-8")
        with prometheus(folder, port or free_port()) as address:
            yield address, folder / "page"


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m simulator.figures", description="The status page with figures.")
    parser.add_argument("--sparks", type=int, default=200)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--rollout", action="store_true")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with serving(options.sparks, options.rollout, options.port) as (address, _):
        print(f"{address}/user/", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(86400)
    return 0


if __name__ == "__main__":
    sys.exit(main())
