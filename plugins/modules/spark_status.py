#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""What a Spark serves now."""

from __future__ import annotations

DOCUMENTATION = r"""
module: spark_status
short_description: What a Spark serves, and how
description:
  - Releases, the containers of ours, the guard's record, health and figures of the engine, temperature; in one round
    trip, without a plan. Changes nothing. The action of the same name prints it, and can refuse.
options:
  project_dir: {description: Folder of the releases., type: path, default: /opt/sparkfleet}
  state_dir: {description: Folder of journal and guard., type: path, default: /var/lib/sparkfleet}
  log_lines: {description: Lines of the engine's log to bring along., type: int, default: 0}
  show: {description: By the action; print the status., type: bool, default: true}
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Reads only.}
  diff_mode: {support: none, description: Reads only.}
"""

EXAMPLES = r"""
- name: Look what is served
  spark_status:
  register: status
"""

RETURN = r"""
releases: {description: current previous numbers locks outcomes switch switch_active., returned: always, type: dict}
engine: {description: "serving, loading, stopped, missing, given-up, switching…", returned: always, type: str}
containers: {description: Name and state of each of ours., returned: always, type: list, elements: dict}
healthy: {description: Whether the engine answers., returned: always, type: bool}
figures: {description: Figures of vLLM's metrics., returned: always, type: dict}
guard: {description: The guard's record., returned: always, type: dict}
gpu: {description: Temperature in degrees Celsius and draw in W or null., returned: always, type: dict}
log: {description: The engine's last lines., returned: always, type: list, elements: str}
summary: {description: By the action; the row that is printed., returned: action, type: dict}
"""

import contextlib
import subprocess
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.sparkfleet_host import engine
from ansible.module_utils.sparkfleet_host.docker import Docker, DockerError
from ansible.module_utils.sparkfleet_host.guard import figures
from ansible.module_utils.sparkfleet_host.http import Client, HttpError
from ansible.module_utils.sparkfleet_host.releases import ReleaseError, Store, read_json

LOOK_SECONDS = 5.0


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


def look(store: Store, docker: Docker, log_lines: int) -> dict[str, Any]:
    """Everything that the module returns."""
    found: dict[str, Any] = {
        "releases": store.summary(),
        "containers": [],
        "docker": True,
        "healthy": False,
        "figures": {},
        "guard": read_json(store.state_dir / "guard-state.json"),
        "gpu": gpu(),
        "log": [],
    }
    for name in ("newest_compose", "switch_compose"):
        found["releases"].pop(name, None)
    try:
        for item in engine.ours(docker):
            name = item["Names"][0].lstrip("/")
            found["containers"].append({"name": name, "service": engine.service_of(item), "state": item["State"]})
    except DockerError:
        found["docker"] = False
    current = found["releases"]["current"]
    if current is not None and found["docker"]:
        with contextlib.suppress(ReleaseError, KeyError, DockerError, HttpError):
            lock = store.lock(current)
            client = Client(f"http://127.0.0.1:{lock['port']}", LOOK_SECONDS)
            found["healthy"] = engine.healthy(client)
            if log_lines:
                seen = engine.look(docker, lock["service"])
                lines = engine.read_log(docker, lock["service"], "", seen["tty"], log_lines)
                found["log"] = [engine.redact(line) for line in lines]
            if found["healthy"]:
                found["figures"] = figures(client.get("/metrics", LOOK_SECONDS).text)
    found["engine"] = state(found)
    return found


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "project_dir": {"type": "path", "default": "/opt/sparkfleet"},
            "state_dir": {"type": "path", "default": "/var/lib/sparkfleet"},
            "log_lines": {"type": "int", "default": 0},
            "show": {"type": "bool", "default": True},
        },
        supports_check_mode=True,
    )
    params = module.params
    store = Store(Path(params["project_dir"]), Path(params["state_dir"]))
    module.exit_json(changed=False, **look(store, Docker(timeout=10.0), params["log_lines"]))


if __name__ == "__main__":
    main()
