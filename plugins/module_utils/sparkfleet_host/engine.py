# SPDX-License-Identifier: Apache-2.0
"""Our containers: their state and logs, and how they are stopped and started."""

from __future__ import annotations

import calendar
import contextlib
import itertools
import json
import os
import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from .bounded import BoundsError, as_dict, parse_json, printable
from .docker import Docker
from .http import Client, HttpError
from .redaction import redact

POLL = 0.25  # seconds between two polls
HEALTH_TIMEOUT = 2.0  # seconds
HEAD = 1500  # lines read at once, counted from the cursor
TAIL = 400  # where there are more: the last lines, which show its state
LINE = 4000  # characters of a line that are kept; the dump of vLLM's configuration is longer


def instant(stamp: str) -> tuple[int, int]:
    """Unix seconds and nanoseconds of an RFC 3339 time in UTC, as Docker writes it; (0, 0) if it is not one."""
    found = re.match(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?Z", stamp, re.ASCII)
    if not found or stamp.startswith("0001-"):
        return 0, 0
    try:
        seconds = calendar.timegm(time.strptime(found[1], "%Y-%m-%dT%H:%M:%S"))
    except ValueError:  # such as the 99th of a month
        return 0, 0
    return seconds, int((found[2] or "0").ljust(9, "0"))


def just_before(stamp: str) -> str:
    """A second before a start: when Docker records it, the first lines may already be written. "" for no time."""
    seconds, _ = instant(stamp)
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds - 1)) if seconds else ""


PROJECT = "sparkfleet"  # the compose project; containers without its label are never touched
#: Profile of the compose file that has the engines which start on demand: `docker compose up` leaves them alone.
ON_DEMAND = "on-demand"
PROJECT_LABEL, SERVICE_LABEL = "com.docker.compose.project", "com.docker.compose.service"


def ours(docker: Docker, project: str = PROJECT) -> list[dict[str, Any]]:
    """Every container of the project, as `docker ps --all` lists it. Raises DockerError."""
    return docker.containers(all=True, filters={"label": [f"{PROJECT_LABEL}={project}"]})


def service_of(item: dict[str, Any]) -> str:
    """The service that a listed container belongs to."""
    return _text(labels(item).get(SERVICE_LABEL))


def labels(item: Mapping[str, Any]) -> dict[str, Any]:
    """The labels of a listed container."""
    return _dict(item.get("Labels"))


def name_of(item: Mapping[str, Any]) -> str:
    """The name of a listed container, for a message."""
    names = item.get("Names")
    return printable(str(names[0] if isinstance(names, list) and names else item.get("Id")).lstrip("/"), 200)


# What Docker reports has the form that the API defines, or counts as not reported.


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    return value[:LINE] if isinstance(value, str) else ""


def _int(value: Any) -> int:
    return value if isinstance(value, int) and abs(value) < 1 << 31 else 0


def identity(docker: Docker, service: str, project: str = PROJECT) -> str | None:
    """The id of a service's container by its labels, or None; a container that only has that name is someone else's. Of
    several, the one that runs, then the youngest. The id of one of ours is returned as it is. Raises DockerError."""
    found = [item for item in ours(docker, project) if service in (item["Id"], service_of(item))]
    best = max(found, key=lambda item: (item.get("State") == "running", _created(item)), default=None)
    return str(best["Id"]) if best else None


def _created(item: Mapping[str, Any]) -> int:
    made = item.get("Created")  # Unix time
    return made if isinstance(made, int) else 0


def inspect(docker: Docker, service: str) -> dict[str, Any]:
    """State of a service's container, as the module returns it, with its `id` ("" for none). Raises DockerError."""
    known = identity(docker, service)
    found = docker.container(known) if known else None
    if found is None:
        return {
            "id": "",
            "state": "missing",
            "exit_code": 0,
            "restart_count": 0,
            "oom_killed": False,
            "error": "",
            "started_at": "",
            "tty": False,
        }
    state = _dict(found.get("State"))
    if state.get("Restarting"):
        word = "restarting"
    elif state.get("Paused"):  # Docker reports it as running, too
        word = "paused"
    elif state.get("Running"):
        word = "running"
    else:
        word = "exited"  # created, exited, dead
    restarts, code = max(_int(found.get("RestartCount")), 0), _int(state.get("ExitCode"))
    name = _text(found.get("Id")) or str(known)
    return {
        "id": name,
        "state": word,
        # For a container that Docker has restarted, `docker inspect` does not show how it ended before.
        "exit_code": _last_exit(docker, name) if word == "running" and restarts else code,
        "restart_count": restarts,
        "oom_killed": bool(state.get("OOMKilled")),
        "error": _text(state.get("Error")),
        "started_at": _text(state.get("StartedAt"))[:100],
        "tty": bool(_dict(found.get("Config")).get("Tty")),
    }


def _last_exit(docker: Docker, identity: str) -> int:
    """Exit code of the last exit that Docker still knows of (it keeps 256 events), or 0."""
    filters = json.dumps({"container": [identity], "event": ["die"]})
    query = urlencode({"since": "0", "until": f"{time.time():.9f}", "filters": filters})
    code = 0
    for event in docker.stream("GET", f"/events?{query}", timeout=docker.timeout):
        with contextlib.suppress(ValueError):
            code = _int(int(_text(_dict(_dict(event.get("Actor")).get("Attributes")).get("exitCode")) or 0))
    return code


def read_log(
    docker: Docker, service: str, since: str, tty: bool, tail: int | None = None, most: int = HEAD
) -> list[str]:
    """Log lines of a service's container later than `since`, oldest first: the first `most` of them, or the last
    `tail`; [] for no container. Raises DockerError."""
    name = identity(docker, service)
    if name is None:
        return []
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
    return [line[:LINE] for line in itertools.islice(later, most)]


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
        found = inspect(docker, name)
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

STOP_SECONDS = 60  # until an engine that does not end by itself is killed
COMPOSE_SECONDS = 120  # for a `docker compose up` that pulls nothing


class EngineError(Exception):
    """A container could not be stopped, started or removed; the message is Docker's."""


def stop(docker: Docker, service: str, timeout: int = STOP_SECONDS) -> bool:
    """Stop a service's container, killing it after `timeout` seconds; whether it ran. Raises DockerError."""
    name = identity(docker, service)
    if name is None:
        return False
    patient = Docker(docker.socket_path, timeout + 30)
    status, answer = patient.request("POST", f"/containers/{quote(name, safe='')}/stop?t={timeout}")
    if status in (304, 404):  # stopped already, or gone
        return False
    if status >= 400:
        raise EngineError(f"cannot stop {service}: {_message(answer)}")
    return True


def start(docker: Docker, service: str) -> None:
    """Start a service's container, which must exist. Raises DockerError, EngineError."""
    name = identity(docker, service)
    if name is None:
        raise EngineError(f"cannot start {service}: Sparkfleet has no container of it")
    status, answer = Docker(docker.socket_path, 60).request("POST", f"/containers/{quote(name, safe='')}/start")
    if status >= 400:
        raise EngineError(f"cannot start {service}: {_message(answer)}")


def remove(docker: Docker, service: str) -> None:
    """Remove a service's container, running or not; volumes with names stay. Raises DockerError, EngineError."""
    name = identity(docker, service)
    if name is None:
        return
    patient = Docker(docker.socket_path, 60)
    status, answer = patient.request("DELETE", f"/containers/{quote(name, safe='')}?force=1&v=1")
    if status >= 400 and status != 404:
        raise EngineError(f"cannot remove {service}: {_message(answer)}")


def compose(
    project_dir: str, file: str, *words: str, seconds: float = COMPOSE_SECONDS, absent: Mapping[str, str] | None = None
) -> str:
    """Run a command of Docker Compose for a file of the project; its output. Raises EngineError with Compose's message,
    and MissingError (an EngineError) where there is no Compose. `absent`: variables that count where there is no other
    value."""
    argv = ["docker", "compose", "--project-name", PROJECT, "--project-directory", project_dir, "--file", file]
    argv += ["--profile", ON_DEMAND]
    what = f"docker compose {words[0]}"
    try:
        done = subprocess.run(
            [*argv, *words],
            env={**(absent or {}), **os.environ},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
            cwd="/",
        )
    except subprocess.TimeoutExpired:
        raise EngineError(f"{what}: no answer in {seconds:.0f} s") from None
    except OSError as error:
        raise MissingError(f"{what}: {error.strerror}") from None
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        if any(word in done.stderr for word in ("is not a docker command", "unknown command", "unknown flag")):
            raise MissingError(f"{what}: {lines[0] if lines else done.returncode}")
        raise EngineError(f"{what}: {redact(lines[-1])[:LINE] if lines else done.returncode}")
    return done.stdout


class MissingError(EngineError):
    """There is no Docker Compose that could be run."""


def compose_up(project_dir: str, file: str, service: str, recreate: bool = False) -> None:
    """Create the service's container as `file` defines it and start it; pulls nothing. Raises EngineError with
    Compose's message."""
    words = ["up", "--detach", "--no-deps", "--pull", "never", "--quiet-pull"]
    compose(project_dir, file, *words, *(["--force-recreate"] if recreate else []), service)


def resolved(project_dir: str, file: str) -> dict[str, Any]:
    """The compose file as Compose understands it, variables and defaults filled in. Raises EngineError with its
    complaint, MissingError."""
    output = compose(project_dir, file, "config", "--format", "json", seconds=60)
    try:
        return as_dict(parse_json(output, "docker compose config"), "docker compose config")
    except BoundsError as error:
        raise EngineError(str(error)) from None


def definition(document: Mapping[str, Any], service: str) -> dict[str, Any] | None:
    """What a container of a service is made from, of a `resolved` compose file: the service with the networks, volumes,
    secrets and configs that it uses. None where the file does not have it."""
    wanted = _dict(document.get("services")).get(service)
    if not isinstance(wanted, dict):
        return None
    found: dict[str, Any] = {"service": wanted}
    for section in ("networks", "volumes", "secrets", "configs"):
        used = wanted.get(section) or []
        names = [item if isinstance(item, str) else _dict(item).get("source") for item in used]
        there = _dict(document.get(section))
        found[section] = {name: there[name] for name in names if isinstance(name, str) and name in there}
    return found


def _message(answer: Any) -> str:
    message = str(answer.get("message") if isinstance(answer, dict) else answer)
    return redact(message[: 2 * LINE].strip())[:LINE]


def validate_compose(project_dir: str, file: Path) -> str:
    """Compose's complaint about a file; "" for none, and where there is no Compose."""
    try:
        # With interpolation, as `up` reads it; the token of `model_source: hub` need not be there yet.
        compose(project_dir, str(file), "config", "--quiet", seconds=60, absent={"HF_TOKEN": "unknown"})
    except MissingError:
        return ""
    except EngineError as error:
        return str(error).removeprefix("docker compose config: ")
    return ""
