#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: one Spark serves others what it fetches."""

from __future__ import annotations

DOCUMENTATION = r"""
module: share_service
short_description: Serves image and model to other Sparks, or connects to the Spark that does
description:
  - C(serve) starts the server, C(connect) the tunnel to it (transient systemd
    units); C(absent) stops both. Neither outlives the run, nor 15 idle minutes.
  - If it is not possible, the module explains why in RV(reason) and does not fail; every Spark can fetch for itself.
options:
  state: {description: What to do., type: str, choices: [serve, connect, absent], required: true}
  address: {description: Name or address under which other Sparks reach this host., type: str, default: ""}
  clients:
    description: Names or addresses of the Sparks that copy from this one; with C(serve).
    type: list
    elements: str
    default: []
  settings: {description: "What to serve or where to connect to, set by the action.", type: dict, default: {}}
  pairs: {description: Key and certificate of each source in PEM., type: dict, default: {}}
  clean: {description: With C(absent) also remove what was kept for others., type: bool, default: true}
  program: {description: The packed program., type: path, default: /opt/sparkfleet/lib/sparkfleet_host.pyz}
  folder: {description: Folder of its settings., type: path, default: /run/sparkfleet/share}
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Does nothing.}
  diff_mode: {support: none, description: Leaves nothing behind.}
"""

EXAMPLES = r"""
- name: Serve image and model
  sparkfleet.dgx.share_service:
    state: serve
"""

RETURN = r"""
reason: {description: Why it was not possible; empty if it was., returned: always, type: str}
digests: {description: Digests of the images., returned: with serve, type: dict}
pair: {description: The key pair in use; the action hides it., returned: with serve, type: str}
"""

import contextlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import hardening
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.network import reached_at
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.share import BUNDLE, STORE

UNITS = {"serve": "sparkfleet-share", "connect": "sparkfleet-tunnel"}
READY_SECONDS = 60.0


def systemctl(*words: str) -> None:
    """Stopping a unit that is not running is not a failure."""
    subprocess.run(["systemctl", *words], capture_output=True, timeout=60, check=False)


def running(unit: str) -> bool:
    """Whether a unit of systemd is active."""
    argv = ["systemctl", "is-active", "--quiet", f"{unit}.service"]
    return subprocess.run(argv, timeout=30, check=False).returncode == 0


def read(path: Path) -> str:
    """A file's text; empty where there is none."""
    try:
        return path.read_text("utf-8")
    except OSError:
        return ""


def same(pairs: dict[str, str], place: Path) -> bool:
    """Whether these are the pairs in use."""
    return all(read(place / f"{name}.pem") == content for name, content in pairs.items())


def start(verb: str, settings: dict[str, Any], pairs: dict[str, str], program: Path, folder: Path) -> dict[str, Any]:
    """Start the program; what it says when it is ready: {"error", "digests"}."""
    unit, place = UNITS[verb], folder / verb
    wanted = json.dumps(settings)
    if running(unit) and read(place / "settings.json") == wanted and (verb == "serve" or same(pairs, place)):
        # Of a run that was interrupted; jobs on this and other hosts still take from it.
        return {**json.loads(read(place / "ready.json") or "{}"), "pair": read(place / "run.pem")}
    systemctl("stop", f"{unit}.service")
    if not program.is_file():
        return {"error": f"{program} is missing"}
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    (place / "ready.json").unlink(missing_ok=True)
    files = {f"{name}.pem": content for name, content in pairs.items()}
    for name, content in {**files, "settings.json": wanted}.items():
        (place / name).unlink(missing_ok=True)
        with os.fdopen(os.open(place / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(content)
    python = shutil.which("python3") or "/usr/bin/python3"
    argv = ["systemd-run", "--quiet", "--collect", f"--unit={unit}", "--description=Sparkfleet shares what it fetches"]
    writable = [str(place)]
    if verb == "serve" and not settings.get("offline"):
        writable.append(str(settings.get("store") or STORE))
        Path(writable[-1]).mkdir(parents=True, exist_ok=True)
    # Restarted after a crash; an error it reports itself is not a failure.
    argv += hardening.arguments(["Restart=on-failure", "RestartSec=1", *hardening.share(writable)])
    argv += ["--", python, str(program), "share", verb, str(place / "settings.json")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode != 0:
        return {"error": done.stderr.strip() or f"systemd-run ended with {done.returncode}"}
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError):
            found: dict[str, Any] = json.loads((place / "ready.json").read_text("utf-8"))
            return {**found, "pair": pairs.get("run", "")}
        time.sleep(0.1)
    return {"error": f"not ready after {READY_SECONDS:.0f} s, see journalctl -u {unit}"}


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": [*UNITS, "absent"], "required": True},
            "address": {"type": "str", "default": ""},
            "clients": {"type": "list", "elements": "str", "default": []},
            "settings": {"type": "dict", "default": {}},
            "pairs": {"type": "dict", "default": {}, "no_log": True},
            "clean": {"type": "bool", "default": True},
            "program": {"type": "path", "default": "/opt/sparkfleet/lib/sparkfleet_host.pyz"},
            "folder": {"type": "path", "default": "/run/sparkfleet/share"},
        },
        supports_check_mode=True,
    )
    params = module.params
    if module.check_mode:
        module.exit_json(changed=False, reason="check mode")
    try:
        if params["state"] == "absent":
            systemctl("stop", *(f"{unit}.service" for unit in UNITS.values()))
            shutil.rmtree(params["folder"], ignore_errors=True)
            if params["clean"]:
                for folder in (STORE, BUNDLE):
                    shutil.rmtree(folder, ignore_errors=True)
            module.exit_json(changed=False, reason="")
        settings = params["settings"]
        if params["state"] == "serve" and params["clients"]:
            # Never on every address: on those alone that face the others.
            settings["listen"] = reached_at(params["address"], params["clients"])
            if not settings["listen"]:
                names = ", ".join(params["clients"][:3])
                module.exit_json(
                    changed=False, reason=f"this host has no address facing {names}; see sparkfleet_address"
                )
        found = start(params["state"], settings, params["pairs"], Path(params["program"]), Path(params["folder"]))
        reason, digests = found.get("error") or "", found.get("digests") or {}
        module.exit_json(changed=False, reason=reason, digests=digests, pair=found.get("pair") or "")
    except (OSError, subprocess.SubprocessError) as error:
        module.exit_json(changed=False, reason=str(error))


if __name__ == "__main__":
    main()
