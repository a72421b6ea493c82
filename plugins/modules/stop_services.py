#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Services of one compose project, stopped, whatever file they were started from."""

from __future__ import annotations

DOCUMENTATION = r"""
module: stop_services
short_description: Stops running services of a compose project
description:
  - Unlike C(docker compose stop) it does not need a compose file that still has them, so services dropped from a newer
    file are stopped too. Containers of other projects are never touched.
options:
  project: {description: Name of the compose project., type: str, required: true}
  services: {description: Services to stop., type: list, elements: str, required: true}
  timeout: {description: Seconds until a service is killed., type: int, default: 60}
  halt:
    description: Whether requests no longer start engines either that start on demand, until a switch or a start.
    type: bool
    default: false
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Reports which would be stopped.}
  diff_mode: {support: none, description: There is nothing to show.}
"""

EXAMPLES = r"""
- name: Stop the model that holds the port
  sparkfleet.dgx.stop_services:
    project: sparkfleet
    services: [vllm-qwen3-8b-fp8]
"""

RETURN = r"""
stopped: {description: Names of the containers., returned: success, type: list, elements: str}
halted: {description: Whether engines that start on demand do so no longer., returned: success, type: bool}
"""

import json
from typing import Any
from urllib.parse import quote

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import group
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.docker import Docker, DockerUnavailable
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.releases import LOCK_FILE, Store

LOCK = LOCK_FILE
HELD_BY_STOP = "stop"


def running(docker: Docker, project: str, services: list[str]) -> list[dict[str, Any]]:
    """Running (or restarting) containers of these services of the project."""
    filters = quote(json.dumps({"label": [f"com.docker.compose.project={project}"]}))
    _, containers = docker.get(f"/containers/json?filters={filters}")
    return [item for item in containers if item["Labels"].get("com.docker.compose.service") in services]


def stop(module: AnsibleModule, docker: Docker, found: list[dict[str, Any]], timeout: int) -> None:
    """Stop containers as `docker stop` does."""
    for item in found:
        status, answer = docker.request("POST", f"/containers/{item['Id']}/stop?t={timeout}")
        if status >= 400:
            reason = answer.get("message") if isinstance(answer, dict) else answer
            module.fail_json(msg=f"cannot stop {item['Names'][0].lstrip('/')}: {reason}")


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "project": {"type": "str", "required": True},
            "services": {"type": "list", "elements": "str", "required": True},
            "timeout": {"type": "int", "default": 60},
            "halt": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    timeout = module.params["timeout"]
    store = Store(lock_file=LOCK)
    halts = module.params["halt"] and not store.halted()
    try:
        docker = Docker(timeout=timeout + 30)
        found = running(docker, module.params["project"], module.params["services"])
        if not module.check_mode:
            # What the guard is about to do ends first, so that what is stopped here stays stopped.
            with store.exclusive(HELD_BY_STOP) as mine:
                if not mine:
                    module.fail_json(
                        msg="a release switch is running on this host; run again when it has finished",
                        failure="switch-running-other",
                    )
                if halts:
                    store.halt(True)
                if group.rank_service(store, store.current()) in module.params["services"]:
                    group.keep_down(store)  # or rank 0 starts all of them again
                stop(module, docker, found, timeout)
    except DockerUnavailable as error:
        if module.check_mode:  # no engine yet, so nothing of ours runs
            module.exit_json(changed=False, stopped=[], halted=store.halted())
        module.fail_json(msg=str(error))
    stopped = [item["Names"][0].lstrip("/") for item in found]
    module.exit_json(changed=bool(found) or halts, stopped=stopped, halted=halts or store.halted())


if __name__ == "__main__":
    main()
