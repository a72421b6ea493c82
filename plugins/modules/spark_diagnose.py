#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Everything needed to find out what is wrong with a Spark, in one round trip."""

from __future__ import annotations

DOCUMENTATION = r"""
module: spark_diagnose
short_description: Collects the facts that explain why a Spark does not serve
description:
  - What M(sparkfleet.dgx.spark_status) sees; the engines' logs and those that failed releases left; the journal of the
    last switch and of the guard; the answers to the verification questions; memory, disks, GPU, port, units, the
    kernel's messages, the model cache and what was found damaged.
  - Each part is limited in time and size, and one that fails does not affect the rest. Tokens and keys are removed on
    the host. Changes nothing.
options:
  project_dir: {description: Folder of the releases., type: path, default: /opt/sparkfleet}
  state_dir: {description: Folder of journal and guard., type: path, default: /var/lib/sparkfleet}
  cache_dir: {description: Folder of the model cache., type: path, default: /opt/hf}
  token_file:
    description: File of the token; its content is removed wherever it appears.
    type: path
    default: /etc/sparkfleet/hf_token
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Reads only.}
  diff_mode: {support: none, description: Reads only.}
"""

EXAMPLES = r"""
- name: Diagnose the host
  sparkfleet.dgx.spark_diagnose:
"""

RETURN = r"""
facts: {description: What was found., returned: always, type: dict}
"""

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import (
    audit,
    bounded,
    engine,
    group,
    guard,
    integrity,
)
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.docker import Docker
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.memory import memory_state, unit_state
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.redaction import redacted
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.release_format import MOST_ENGINES, Engine
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.releases import Store
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.status import inspect_host
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.switch import boot_id, verify_params
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.verify import verify

COMMAND_SECONDS = 10
ANSWER_SECONDS = 8.0
LOG_LINES = 1500
JOURNAL_LINES = 80
LINE = 2000  # characters of a line of a command that are kept
GUARD_SETTINGS = guard.SETTINGS_FILE
GUARD_UNIT = "sparkfleet-guard.service"
FSTAB = "/etc/fstab"
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
    lines = [line[:LINE] for line in (done.stdout + done.stderr).splitlines()[-200:]]
    return [*lines, *([f"(exit code {done.returncode})"] if done.returncode else [])]


def part(read: Callable[[], Any]) -> Any:
    """One part of the result; what it raises becomes its value."""
    try:
        return read()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def engine_log(docker: Docker, service: str) -> dict[str, Any]:
    """State and log of a container of ours."""
    found = engine.inspect(docker, service)
    return {**found, "log": engine.read_log(docker, service, "", found["tty"], LOG_LINES)}


def asked(item: Engine) -> dict[str, Any]:
    """The questions of the verification of an engine, with little patience."""
    result: dict[str, Any] = verify({**verify_params(item), "timeout": ANSWER_SECONDS})
    return result


def ranks(store: Store, item: Engine) -> list[str]:
    """What is wrong with the other hosts of the engine's group, as this one sees them."""
    if item.group is None:
        return []
    if not item.group.is_head:
        head = group.ask(item.group, 0)
        where = f"{item.group.head.address}:{item.group.port}"
        return [] if head else [f"{item.group.named(0)} does not answer at {where}"]
    record = group.read_record(store)
    found = group.absent(item.group, group.ask_workers(item.group), record.epoch, ("running",))
    return [] if record.down else list(found.values())


def engine_facts(store: Store, docker: Docker, item: Engine, row: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of an engine of the current release. `row`: its status."""
    there = optional(lambda: docker.image(item.image) is not None) if item.image else None
    healthy = bool(row.get("healthy"))
    return {
        **{"service": item.service, "model": item.model, "repo": item.repo, "port": item.port, "memory": item.memory},
        "healthy": healthy,
        "state": str(row.get("state") or ""),
        "guard": row.get("guard"),
        "container": optional(lambda: engine_log(docker, item.service)),
        "name_holder": optional(lambda: name_holder(docker, item.service)),
        "image": {"ref": item.image, "present": there},
        "asked": part(lambda: asked(item)) if healthy and not item.is_worker else None,
        "ranks": optional(lambda: ranks(store, item)),
    }


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


def mount_of(path: Path, fstab: str) -> str:
    """The mount point of a text like /etc/fstab that holds a path and on which nothing is mounted; "" for none."""
    for line in fstab.splitlines():
        words = line.split()
        if len(words) < 3 or words[0].startswith("#") or words[2] == "swap" or words[1] in ("/", "none"):
            continue
        point = Path(words[1])
        if (point == path or point in path.parents) and not os.path.ismount(point):
            return str(point)
    return ""


def cache(path: str) -> dict[str, Any]:
    """Whether the model cache is empty, and which mount of /etc/fstab it misses."""
    where = Path(path)
    try:
        names = [entry.name for entry in os.scandir(where)]
    except FileNotFoundError:
        names = []
    fstab = ""
    with contextlib.suppress(OSError, bounded.BoundsError):
        fstab = bounded.read_file(FSTAB).decode("utf-8", "replace")
    empty = not any(name.startswith("models--") for name in names)
    return {"path": path, "empty": empty, "fstab": mount_of(where, fstab)}


def guard_unit() -> dict[str, Any]:
    """State of the guard's unit."""
    unit = unit_state(GUARD_UNIT)
    return {
        "installed": unit.get("UnitFileState", "") != "",
        "enabled": unit.get("UnitFileState") == "enabled",
        "active": unit.get("ActiveState") in ("active", "activating", "reloading"),
        "state": unit.get("ActiveState", ""),
    }


def damaged(store: Store, project_dir: Path) -> list[str]:
    """State files that were set aside in the last week, newest first."""
    since = time.time() - 7 * 86400
    places = [*store.state_dir.glob("*.damaged-*"), *project_dir.glob("releases/*.damaged-*")]
    places += [*project_dir.glob("releases/*/*.damaged-*")]
    stamped = sorted(((_stamp(path), str(path)) for path in places), reverse=True)
    return [path for at, path in stamped if at > since][:10]


def _stamp(path: Path) -> float:
    end = path.name.rpartition(".damaged-")[2]
    return float(end) if end.isdecimal() and len(end) < 15 else 0.0


def name_holder(docker: Docker, service: str) -> dict[str, str] | None:
    """A container that has the engine's name and is not of ours."""
    found = docker.container(service)
    if found is None:
        return None
    labels = (found.get("Config") or {}).get("Labels") or {}
    if labels.get(engine.PROJECT_LABEL) == engine.PROJECT:
        return None
    return {"name": service, "image": str((found.get("Config") or {}).get("Image") or "")}


def settings_error() -> str:
    """What is wrong with the guard's settings; "" for nothing."""
    try:
        guard.read_settings(Path(GUARD_SETTINGS))
        return ""
    except (ValueError, OSError) as error:
        return f"{GUARD_SETTINGS}: {str(error).removeprefix(f'{GUARD_SETTINGS}: ')}"


def optional(read: Callable[[], Any]) -> Any:
    """A part that findings are made of; None where it cannot be read."""
    try:
        return read()
    except Exception:
        return None


def collect(params: dict[str, Any]) -> dict[str, Any]:
    """Everything."""
    store, docker = Store(params["project_dir"], params["state_dir"]), Docker(timeout=10.0)
    status = part(lambda: inspect_host(store, docker, 0))
    current = store.current()
    engines: Sequence[Engine] = (optional(lambda: store.engines(current)) or ()) if current else ()
    rows = {row["service"]: row for row in status.get("engines") or ()}
    state, problem = guard.read_state(store.state_dir)
    aside = optional(lambda: damaged(store, Path(params["project_dir"]))) or []
    models = optional(lambda: integrity.read_result(store.state_dir / "integrity.json")) or {}
    facts: dict[str, Any] = {
        "status": status,
        "switch": store.switch(),
        "now": time.time(),
        "clock": guard.clock(),
        "boot_id": boot_id(),
        "guard": state and {key: value for key, value in state.items() if key != "engines"},
        "guard_unit": optional(guard_unit),
        "settings_error": settings_error(),
        "damaged_state": [*([problem] if problem else []), *aside],
        "damaged_models": [
            {"repo": repo, "commit": commit, "names": names, "more": more}
            for repo, commit, names, more in integrity.damaged(models)
        ],
        "unchecked_models": models.get("left_out", 0),
        "cache": optional(lambda: cache(params["cache_dir"])),
        "failed": part(lambda: failed(store)),
        "memory": part(memory_state),
        "disk": [free(path) for path in (params["cache_dir"], "/var/lib/docker", "/var/lib")],
        "engines": [],
        "commands": {name: command(argv) for name, argv in COMMANDS.items()},
    }
    with ThreadPoolExecutor(MOST_ENGINES) as pool:
        made = pool.map(lambda item: engine_facts(store, docker, item, rows.get(item.service) or {}), engines)
        facts["engines"] = [*made]
    return facts


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "project_dir": {"type": "path", "default": "/opt/sparkfleet"},
            "state_dir": {"type": "path", "default": "/var/lib/sparkfleet"},
            "cache_dir": {"type": "path", "default": "/opt/hf"},
            "token_file": {"type": "path", "default": "/etc/sparkfleet/hf_token"},
        },
        supports_check_mode=True,
    )
    facts = collect(module.params)
    secrets = audit.held(audit.secret_files(module.params["project_dir"], module.params["token_file"]))
    module.exit_json(changed=False, facts=redacted(facts, *sorted(secrets, key=len, reverse=True)))


if __name__ == "__main__":
    main()
