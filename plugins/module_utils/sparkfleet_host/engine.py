# SPDX-License-Identifier: Apache-2.0
"""Our containers: what they do, what they log, how they are stopped and started."""

from __future__ import annotations

import calendar
import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from .docker import Docker
from .http import Client, HttpError
from .redaction import redact

POLL = 0.25  # seconds between two looks
HEALTH_TIMEOUT = 2.0  # seconds
HEAD = 1500  # lines read at once, counted from the cursor
TAIL = 400  # where there are more: the last lines, which tell how it stands
LINE = 4000  # characters of a line that are kept; the dump of vLLM's configuration is longer


def instant(stamp: str) -> tuple[int, int]:
    """Unix seconds and nanoseconds of an RFC 3339 time in UTC, as Docker writes it; (0, 0) if it is none."""
    found = re.match(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?Z", stamp)
    if not found or stamp.startswith("0001-"):
        return 0, 0
    seconds = calendar.timegm(time.strptime(found[1], "%Y-%m-%dT%H:%M:%S"))
    return seconds, int((found[2] or "0").ljust(9, "0"))


def just_before(stamp: str) -> str:
    """A second before a start: Docker notes it when the first lines may be written already. "" for no time."""
    seconds, _ = instant(stamp)
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds - 1)) if seconds else ""


def look(docker: Docker, name: str) -> dict[str, Any]:
    """State of a container, as the module returns it. Raises DockerError."""
    found = docker.container(name)
    if found is None:
        return {
            "state": "missing",
            "exit_code": 0,
            "restart_count": 0,
            "oom_killed": False,
            "error": "",
            "started_at": "",
            "tty": False,
        }
    state = found.get("State") or {}
    if state.get("Restarting"):
        word = "restarting"
    elif state.get("Running"):
        word = "running"
    else:
        word = "exited"  # created, exited, dead
    restarts, code = int(found.get("RestartCount") or 0), int(state.get("ExitCode") or 0)
    return {
        "state": word,
        # Of a container that Docker has started again `docker inspect` does not tell how it ended before.
        "exit_code": _last_exit(docker, str(found["Id"])) if word == "running" and restarts else code,
        "restart_count": restarts,
        "oom_killed": bool(state.get("OOMKilled")),
        "error": str(state.get("Error") or ""),
        "started_at": str(state.get("StartedAt") or ""),
        "tty": bool((found.get("Config") or {}).get("Tty")),
    }


def _last_exit(docker: Docker, identity: str) -> int:
    """Exit code of the last end that Docker still knows of (it keeps 256 events), or 0."""
    filters = json.dumps({"container": [identity], "event": ["die"]})
    query = urlencode({"since": "0", "until": f"{time.time():.9f}", "filters": filters})
    code = 0
    for event in docker.stream("GET", f"/events?{query}", timeout=docker.timeout):
        with contextlib.suppress(ValueError):
            code = int(((event.get("Actor") or {}).get("Attributes") or {}).get("exitCode") or 0)
    return code


def read_log(docker: Docker, name: str, since: str, tty: bool, tail: int | None = None) -> list[str]:
    """Log lines later than `since`, oldest first: the first HEAD of them, or the last `tail`. Raises DockerError."""
    seconds, nanos = instant(since)
    query = urlencode(
        {
            "stdout": 1,
            "stderr": 1,
            "timestamps": 1,
            "since": f"{seconds}.{nanos:09d}" if seconds else 0,
            "tail": "all" if tail is None else tail,
        }
    )
    frames = docker.frames(f"/containers/{quote(name, safe='')}/logs?{query}", tty, docker.timeout)
    later = (line for line in frames if instant(line.partition(" ")[0]) > (seconds, nanos))
    return [line[:LINE] for line in itertools.islice(later, HEAD)]


def healthy(client: Client) -> bool:
    """Whether /health answers 200."""
    try:
        return bool(client.get("/health", HEALTH_TIMEOUT).status == 200)
    except HttpError:
        return False


def wait(docker: Docker, client: Client, name: str, seconds: float, restarts: int) -> dict[str, Any]:
    """The long poll. Raises DockerError."""
    deadline = time.monotonic() + seconds
    while True:
        found = look(docker, name)
        found["ready"] = found["state"] == "running" and healthy(client)
        over = found["ready"] or found["state"] != "running" or 0 <= restarts < found["restart_count"]
        left = deadline - time.monotonic()
        if over or left <= 0:
            return found
        time.sleep(min(POLL, left))


def new_lines(docker: Docker, name: str, found: dict[str, Any], cursor: str) -> list[str]:
    """The log since the cursor; of a container that has ended, its last lines too. Raises DockerError."""
    if found["state"] == "missing":
        return []
    lines = read_log(docker, name, cursor or just_before(found["started_at"]), found["tty"])
    if len(lines) == HEAD and not found["ready"]:
        lines += read_log(docker, name, lines[-1].partition(" ")[0], found["tty"], TAIL)
    return [redact(line) for line in lines]


# -- what stops and starts -------------------------------------------------------------------------------------------

PROJECT = "sparkfleet"  # the compose project; containers without its label are never touched
STOP_SECONDS = 60  # until an engine that does not end by itself is killed
PROJECT_LABEL, SERVICE_LABEL = "com.docker.compose.project", "com.docker.compose.service"
COMPOSE_SECONDS = 120  # for a `docker compose up` that pulls nothing


class EngineError(Exception):
    """A container could not be stopped, started or removed; the message is Docker's."""


def ours(docker: Docker, project: str = PROJECT) -> list[dict[str, Any]]:
    """Every container of the project, as `docker ps --all` lists it. Raises DockerError."""
    return docker.containers(all=True, filters={"label": [f"{PROJECT_LABEL}={project}"]})


def service_of(item: dict[str, Any]) -> str:
    """The service that a listed container belongs to."""
    return str((item.get("Labels") or {}).get(SERVICE_LABEL, ""))


def stop(docker: Docker, name: str, timeout: int = STOP_SECONDS) -> bool:
    """Stop a container, killing it after `timeout` seconds; whether it ran. Raises DockerError."""
    patient = Docker(docker.socket_path, timeout + 30)
    status, answer = patient.request("POST", f"/containers/{quote(name, safe='')}/stop?t={timeout}")
    if status in (304, 404):  # stopped already, or gone
        return False
    if status >= 400:
        raise EngineError(f"cannot stop {name}: {_said(answer)}")
    return True


def start(docker: Docker, name: str) -> None:
    """Start a container that exists. Raises DockerError."""
    status, answer = Docker(docker.socket_path, 60).request("POST", f"/containers/{quote(name, safe='')}/start")
    if status >= 400:
        raise EngineError(f"cannot start {name}: {_said(answer)}")


def remove(docker: Docker, name: str) -> None:
    """Remove a container, running or not; volumes with names stay. Raises DockerError."""
    patient = Docker(docker.socket_path, 60)
    status, answer = patient.request("DELETE", f"/containers/{quote(name, safe='')}?force=1&v=1")
    if status >= 400 and status != 404:
        raise EngineError(f"cannot remove {name}: {_said(answer)}")


def compose_up(project_dir: str, file: str, service: str, recreate: bool = False) -> None:
    """Make the service's container as `file` says and start it; pulls nothing. Raises EngineError with what Compose
    said."""
    argv = ["docker", "compose", "--project-name", PROJECT, "--project-directory", project_dir, "--file", file]
    argv += ["up", "--detach", "--no-deps", "--pull", "never", "--quiet-pull"]
    argv += ["--force-recreate"] if recreate else []
    try:
        done = subprocess.run(
            [*argv, service], capture_output=True, text=True, timeout=COMPOSE_SECONDS, check=False, cwd="/"
        )
    except subprocess.TimeoutExpired:
        raise EngineError(f"docker compose up {service}: no answer in {COMPOSE_SECONDS} s") from None
    except OSError as error:
        raise EngineError(f"docker compose up {service}: {error.strerror}") from None
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise EngineError(f"docker compose up {service}: {redact(lines[-1]) if lines else done.returncode}")


def _said(answer: Any) -> str:
    return redact(str(answer.get("message") if isinstance(answer, dict) else answer).strip())


def complaint(file: Path) -> str:
    """What the Compose plugin says against a file; "" for nothing, and where there is no plugin."""
    docker = shutil.which("docker")
    if docker is None:
        return ""
    done = subprocess.run(
        # With interpolation, as `up` reads it; the token of `model_source: hub` need not be there yet.
        [docker, "compose", "--file", str(file), "config", "--quiet"],
        env={"HF_TOKEN": "unknown", **os.environ},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return "" if done.returncode == 0 else done.stderr.strip() or f"exit code {done.returncode}"
