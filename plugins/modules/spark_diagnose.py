#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""All that tells what is wrong with a Spark, in one look."""

from __future__ import annotations

DOCUMENTATION = r"""
module: spark_diagnose
short_description: Collects what tells why a Spark does not serve
description:
  - What M(spark_status) sees; the engine's log and those that failed releases left; the journal of the last switch and
    of the guard; the questions of the verification, asked; memory, disks, GPU, port, units and the kernel's words.
  - Each part is bounded in time and size, and one that fails does not hinder the others. Tokens and keys are removed on
    the host. Changes nothing.
options:
  project_dir: {description: Folder of the releases., type: path, default: /opt/sparkfleet}
  state_dir: {description: Folder of journal and guard., type: path, default: /var/lib/sparkfleet}
  cache_dir: {description: Folder of the model cache., type: path, default: /opt/hf}
  token_file:
    description: File of the token; its content is removed wherever it stands.
    type: path
    default: /etc/sparkfleet/hf_token
  port: {description: Port of the engine where no release tells it., type: int, default: 8000}
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Reads only.}
  diff_mode: {support: none, description: Reads only.}
"""

EXAMPLES = r"""
- name: Find out what is wrong
  spark_diagnose:
"""

RETURN = r"""
facts: {description: What was found., returned: always, type: dict}
"""

import contextlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.sparkfleet_host import engine
from ansible.module_utils.sparkfleet_host.docker import Docker, DockerError
from ansible.module_utils.sparkfleet_host.http import KEY_FILE
from ansible.module_utils.sparkfleet_host.memory import memory_state
from ansible.module_utils.sparkfleet_host.redaction import redacted
from ansible.module_utils.sparkfleet_host.releases import Store, read_json
from ansible.module_utils.sparkfleet_host.status import look
from ansible.module_utils.sparkfleet_host.switch import verify_params
from ansible.module_utils.sparkfleet_host.verify import verify

COMMAND_SECONDS = 10
ANSWER_SECONDS = 8.0
LOG_LINES = 1500
JOURNAL_LINES = 80
COMMANDS = {
    "nvidia-smi": ["nvidia-smi"],
    "units": [
        *("systemctl", "show", "--property=Id,ActiveState,SubState,NRestarts,Result"),
        *("docker.service", "containerd.service", "sparkfleet-guard.service", "sparkfleet-switch.service"),
    ],
    "journal-guard": ["journalctl", "--unit=sparkfleet-guard", f"--lines={JOURNAL_LINES}", "--no-pager"],
    "journal-switch": ["journalctl", "--unit=sparkfleet-switch", f"--lines={JOURNAL_LINES}", "--no-pager"],
    "journal-docker": ["journalctl", "--unit=docker", f"--lines={JOURNAL_LINES}", "--no-pager"],
    "journal-earlyoom": ["journalctl", "--unit=earlyoom", "--lines=30", "--no-pager"],
    "kernel": ["journalctl", "--dmesg", "--priority=warning", f"--lines={JOURNAL_LINES}", "--no-pager"],
    "memory": ["ps", "-eo", "rss,pid,comm", "--sort=-rss"],
    "ports": ["ss", "-Hltnp"],
    "disks": ["df", "-h", "--output=source,size,avail,pcent,ipcent,target", "-x", "tmpfs", "-x", "overlay"],
    "images": ["docker", "images", "--digests"],
    "containers": ["docker", "ps", "--all"],
    "versions": ["docker", "version"],
}


def command(argv: list[str]) -> list[str]:
    """What a command prints, its errors too; the reason where it cannot be run."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return [f"{argv[0]}: {error}"]
    return (done.stdout + done.stderr).splitlines()[-200:]


def part(read: Callable[[], Any]) -> Any:
    """One part of the whole; what it raises is its value."""
    try:
        return read()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def engine_log(docker: Docker, service: str) -> dict[str, Any]:
    """State and log of a container of ours."""
    found = engine.look(docker, service)
    return {**found, "log": engine.read_log(docker, service, "", found["tty"], LOG_LINES)}


def asked(store: Store, release: int) -> dict[str, Any]:
    """The questions of the verification, with little patience."""
    plan, lock = store.plan(release), store.lock(release)
    result: dict[str, Any] = verify({**verify_params(plan, int(lock["port"])), "timeout": ANSWER_SECONDS})
    return result


def failed(store: Store) -> dict[str, Any]:
    """What the failed releases left: outcome and log by number."""
    found: dict[str, Any] = {}
    for number in store.numbers():
        outcome = store.outcome(number) or {}
        if outcome.get("state") == "failed":
            lines: list[str] = []
            with contextlib.suppress(OSError):
                text = (store.folder(number) / "engine.log").read_text(encoding="utf-8", errors="replace")
                lines = text.splitlines()[-LOG_LINES:]
            found[str(number)] = {**outcome, "log": lines}
    return found


def free(path: str) -> dict[str, Any]:
    """Free bytes and inodes of the file system of a folder."""
    where = Path(path)
    while not where.exists():
        where = where.parent
    figures = os.statvfs(where)
    return {"path": path, "free": figures.f_bavail * figures.f_frsize, "inodes": figures.f_favail}


def collect(params: dict[str, Any]) -> dict[str, Any]:
    """Everything."""
    store, docker = Store(params["project_dir"], params["state_dir"]), Docker(timeout=10.0)
    status = part(lambda: look(store, docker, 0))
    current = store.current()
    lock = part(lambda: store.lock(current)) if current else {}
    facts: dict[str, Any] = {
        "status": status,
        "switch": store.switch(),
        "guard": read_json(store.state_dir / "guard-state.json"),
        "failed": part(lambda: failed(store)),
        "plan": part(lambda: store.plan(current)) if current else None,
        "port": lock.get("port", params["port"]),
        "memory": part(memory_state),
        "disk": [free(path) for path in (params["cache_dir"], "/var/lib/docker", "/var/lib")],
        "engine": None,
        "asked": None,
        "commands": {name: command(argv) for name, argv in COMMANDS.items()},
    }
    if current:
        with contextlib.suppress(DockerError):
            facts["engine"] = engine_log(docker, str(lock.get("service")))
        if status.get("healthy"):
            facts["asked"] = part(lambda: asked(store, current))
    return facts


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "project_dir": {"type": "path", "default": "/opt/sparkfleet"},
            "state_dir": {"type": "path", "default": "/var/lib/sparkfleet"},
            "cache_dir": {"type": "path", "default": "/opt/hf"},
            "token_file": {"type": "path", "default": "/etc/sparkfleet/hf_token"},
            "port": {"type": "int", "default": 8000},
        },
        supports_check_mode=True,
    )
    facts = collect(module.params)
    for path in (module.params["token_file"], KEY_FILE):
        with contextlib.suppress(OSError):
            facts = redacted(facts, Path(path).read_text(encoding="utf-8").strip())
    module.exit_json(changed=False, facts=redacted(facts))


if __name__ == "__main__":
    main()
