# SPDX-License-Identifier: Apache-2.0
"""What a Spark serves, and how: releases, containers, health, figures, the guard's record."""

from __future__ import annotations

import contextlib
import subprocess
import time
from typing import Any

from . import engine
from .docker import Docker, DockerError
from .guard import figures, read_state
from .http import Client, HttpError, engine_client
from .metrics import LIMIT
from .redaction import redact
from .releases import ReleaseError, Store

LOOK_SECONDS = 5.0
PACE_SECONDS = 1.0  # between two looks at a counter, where requests run


def gpu() -> dict[str, float | None]:
    """Temperature in °C and draw in W, as far as nvidia-smi tells."""
    found: dict[str, float | None] = {"temperature": None, "watts": None}
    argv = ["nvidia-smi", "--query-gpu=temperature.gpu,power.draw", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        done = subprocess.run(argv, capture_output=True, text=True, timeout=LOOK_SECONDS, check=True)
        for key, text in zip(found, done.stdout.split(","), strict=False):
            with contextlib.suppress(ValueError):
                found[key] = float(text)
    return found


def state(found: dict[str, Any]) -> str:
    """The engine's state in a word: what a switch or the guard know counts before what a look tells."""
    guard = found["guard"] or {}
    if found["releases"]["switch_active"]:
        return "switching"
    if not found["docker"]:
        return "docker-down"
    running = [item for item in found["containers"] if item["state"] in ("running", "restarting")]
    if running:
        if found["healthy"]:
            return "wedged" if guard.get("engine") == "wedged" else "serving"
        return "healing" if guard.get("engine") == "healing" else "loading"
    if guard.get("given_up"):
        return "given-up"
    return "stopped" if found["containers"] else "missing"


def pace(client: Client, before: dict[str, float]) -> float:
    """Tokens a second of all requests together, over PACE_SECONDS; nought where none runs. Raises HttpError."""
    if not before.get("num_requests_running"):
        return 0.0
    began = time.monotonic()
    time.sleep(PACE_SECONDS)
    after = figures(client.get("/metrics", LOOK_SECONDS, LIMIT).text)
    made = after.get("generation_tokens", 0.0) - before.get("generation_tokens", 0.0)
    return round(max(made, 0.0) / (time.monotonic() - began), 1)


def serves(store: Store, current: int | None, containers: list[dict[str, Any]]) -> tuple[str, int] | None:
    """Service and port of the current release; where its files do not tell, those of the container that runs."""
    with contextlib.suppress(ReleaseError):
        if current is not None:
            lock = store.lock(current)
            return str(lock["service"]), int(lock["port"])
    for item in containers:
        ports = [port.get("PublicPort") for port in item.get("Ports") or [] if port.get("PublicPort")]
        if item.get("State") == "running" and ports:
            return engine.service_of(item), int(ports[0])
    return None


def look(store: Store, docker: Docker, log_lines: int) -> dict[str, Any]:
    """Everything that the module returns."""
    found: dict[str, Any] = {
        "releases": store.summary(),
        "containers": [],
        "docker": True,
        "healthy": False,
        "figures": {},
        "tokens_per_second": None,
        "guard": read_state(store.state_dir)[0],
        "gpu": gpu(),
        "log": [],
    }
    for name in ("newest_compose", "switch_compose"):
        found["releases"].pop(name, None)
    listed: list[dict[str, Any]] = []
    try:
        listed = engine.ours(docker)
    except DockerError:
        found["docker"] = False
    for item in listed:
        name = str((item.get("Names") or [item.get("Id")])[0]).lstrip("/")
        found["containers"].append({"name": name, "service": engine.service_of(item), "state": item.get("State", "")})
    served = serves(store, found["releases"]["current"], listed) if found["docker"] else None
    if served:
        service, port = served
        with contextlib.suppress(DockerError, HttpError):
            client = engine_client(f"http://127.0.0.1:{port}", LOOK_SECONDS)
            found["healthy"] = engine.healthy(client)
            if log_lines:
                seen = engine.look(docker, service)
                lines = engine.read_log(docker, service, "", seen["tty"], log_lines)
                found["log"] = [redact(line) for line in lines]
            if found["healthy"]:
                found["figures"] = figures(client.get("/metrics", LOOK_SECONDS, LIMIT).text)
                found["tokens_per_second"] = pace(client, found["figures"])
    found["engine"] = state(found)
    return found
