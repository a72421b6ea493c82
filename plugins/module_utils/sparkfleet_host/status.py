# SPDX-License-Identifier: Apache-2.0
"""What a Spark serves, and how: releases, containers, and of each engine health, figures, the guard's record."""

from __future__ import annotations

import contextlib
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from . import engine, measured
from .docker import Docker, DockerError
from .group import of_release
from .guard import WORST_FIRST, figures, read_state
from .http import Client, HttpError, engine_client
from .metrics import LIMIT
from .on_demand import ASLEEP
from .redaction import redact
from .release_format import MOST_ENGINES
from .releases import ReleaseError, Store

TIMEOUT_SECONDS = 5.0
PACE_SECONDS = 1.0  # between two readings of a counter, while requests run


def gpu() -> dict[str, float | None]:
    """Temperature in °C and draw in W, as far as nvidia-smi reports them."""
    found: dict[str, float | None] = {"temperature": None, "watts": None}
    argv = ["nvidia-smi", "--query-gpu=temperature.gpu,power.draw", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        done = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=True)
        for key, text in zip(found, done.stdout.split(","), strict=False):
            with contextlib.suppress(ValueError):
                found[key] = float(text)
    return found


def state(
    row: dict[str, Any], containers: list[dict[str, Any]], switching: bool, docker: bool, halted: bool = False
) -> str:
    """An engine's state in a word: what a switch or the guard knows takes precedence over the observed state. `halted`:
    no request is to start one."""
    guard = row["guard"] or {}
    if switching:
        return "switching"
    if not docker:
        return "docker-down"
    own = [item["state"] for item in containers if item["service"] == row["service"]]
    if any(word in ("running", "restarting") for word in own):
        if row["healthy"]:
            return "wedged" if guard.get("engine") == "wedged" else "serving"
        return "healing" if guard.get("engine") == "healing" else "loading"
    if guard.get("given_up"):
        return "given-up"
    if own and row.get("on_demand") and not halted:
        return ASLEEP
    return "stopped" if own else "missing"


def pace(client: Client, before: dict[str, float]) -> float:
    """Tokens a second of all requests together, over PACE_SECONDS; zero where none runs. Raises HttpError."""
    if not before.get("num_requests_running"):
        return 0.0
    began = time.monotonic()
    time.sleep(PACE_SECONDS)
    after = figures(client.get("/metrics", TIMEOUT_SECONDS, LIMIT).text)
    made = after.get("generation_tokens", 0.0) - before.get("generation_tokens", 0.0)
    return round(max(made, 0.0) / (time.monotonic() - began), 1)


def rows(store: Store, current: int | None, containers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The engines of the current release; where its files do not name them, those whose containers run."""
    with contextlib.suppress(ReleaseError):
        keys = ("service", "model", "profile", "repo", "image")
        if current is not None:
            known = {record["service"]: record for record in measured.of_release(store, current)}
            return [
                {
                    **{key: getattr(item, key) for key in keys},
                    **{"port": item.port, "measured": known.get(item.service)},
                    "rank": item.group.rank if item.group else None,
                    **({"on_demand": {"port": item.on_demand.port}} if item.on_demand else {}),
                }
                for item in store.engines(current)
            ]
    found = []
    for item in containers:
        ports = [port.get("PublicPort") for port in item.get("Ports") or [] if port.get("PublicPort")]
        if item.get("State") == "running" and ports:
            unknown = dict.fromkeys(("model", "profile", "repo", "image", "measured"))
            found.append({"service": engine.service_of(item), **unknown, "port": int(ports[0]), "rank": None})
    return found[:MOST_ENGINES]


def nodes(store: Store, current: int | None) -> list[str]:
    """The hosts that run the engine of the current release together, by rank; [] for this one alone."""
    group = of_release(store, current)
    return [node.host for node in group.nodes] if group else []


def answers(docker: Docker, row: dict[str, Any], log_lines: int) -> dict[str, Any]:
    """What an engine reports of itself: health, figures, log."""
    found: dict[str, Any] = {"healthy": False, "figures": {}, "tokens_per_second": None, "log": []}
    with contextlib.suppress(DockerError, HttpError):
        client = engine_client(f"http://127.0.0.1:{row['port']}", TIMEOUT_SECONDS)
        found["healthy"] = engine.healthy(client)
        if log_lines:
            seen = engine.inspect(docker, row["service"])
            lines = engine.read_log(docker, row["service"], "", seen["tty"], log_lines)
            found["log"] = [redact(line) for line in lines]
        if row["rank"]:  # it answers nobody
            found["healthy"] = engine.inspect(docker, row["service"])["state"] == "running"
        elif found["healthy"]:
            found["figures"] = figures(client.get("/metrics", TIMEOUT_SECONDS, LIMIT).text)
            found["tokens_per_second"] = pace(client, found["figures"])
    return found


def inspect_host(store: Store, docker: Docker, log_lines: int) -> dict[str, Any]:
    """Everything that the module returns."""
    releases = store.summary()
    for name in ("newest_compose", "switch_compose"):
        releases.pop(name, None)
    listed: list[dict[str, Any]] = []
    there = True
    try:
        listed = engine.ours(docker)
    except DockerError:
        there = False
    containers = []
    for item in listed:
        name = str((item.get("Names") or [item.get("Id")])[0]).lstrip("/")
        containers.append({"name": name, "service": engine.service_of(item), "state": item.get("State", "")})
    engines = rows(store, releases["current"], listed)
    first = engines[0]["service"] if engines else ""
    guards = (read_state(store.state_dir, first)[0] or {}).get("engines") or {}
    with ThreadPoolExecutor(MOST_ENGINES) as pool:  # each may wait for its engine
        found = [*pool.map(lambda row: answers(docker, row, log_lines), engines)] if there else []
    kept = (releases["switch"] or {}).get("kept") or ()
    for place, row in enumerate(engines):
        row.update(found[place] if found else {"healthy": False, "figures": {}, "tokens_per_second": None, "log": []})
        row["guard"] = guards.get(row["service"])
        switching = releases["switch_active"] and row["service"] not in kept
        row["state"] = state(row, containers, switching, there, bool(releases["halted"]))
    return {
        **{"releases": releases, "containers": containers, "docker": there, "gpu": gpu(), "engines": engines},
        "nodes": nodes(store, releases["current"]),
        "engine": overall(engines, containers, bool(releases["switch_active"]), there),
        "healthy": bool(engines) and all(row["healthy"] or row["state"] == ASLEEP for row in engines),
        "log": [f"{row['service']}  {line}" if len(engines) > 1 else line for row in engines for line in row["log"]],
    }


def overall(engines: list[dict[str, Any]], containers: list[dict[str, Any]], switching: bool, docker: bool) -> str:
    """The state of a host: the worst of its engines'."""
    if switching:
        return "switching"
    states = {row["state"] for row in engines}
    if not docker:
        states.add("docker-down")
    elif not states:
        states.add("stopped" if containers else "missing")
    return next(word for word in WORST_FIRST if word in states)
