#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: observe a starting engine, one long poll."""

from __future__ import annotations

DOCUMENTATION = r"""
module: vllm_wait
short_description: Observes a starting engine, waiting briefly for a change
description:
  - Polls the container's state and C(/health) until the engine is ready, the container has ended or restarted, or
    the slice is over; then returns the log lines since the cursor. Changes nothing.
  - The action of the same name repeats it until the engine is ready, has failed or O(timeout) has passed, shows the
    phases with their figures, and explains failures. The module alone ignores O(timeout).
options:
  container:
    description: Name of the engine's container.
    type: str
    required: true
  url:
    description: Where the engine answers, as seen from the host.
    type: str
    default: http://127.0.0.1:8000
  timeout:
    description: Seconds until the action gives up.
    type: float
    default: 1800
  slice:
    description: Seconds of one long poll.
    type: float
    default: 3
  cursor:
    description: RFC 3339 time of the last log line seen; empty for all lines since the container's last start.
    type: str
    default: ""
  restarts:
    description: Return at once when the container was restarted more often than this; -1 for never.
    type: int
    default: -1
  download_dir:
    description: Folder of the model in the cache (models--ORG--NAME), where the server downloads by itself.
    type: path
    default: ""
  download_bytes:
    description: Size of that download, for the action to show.
    type: int
    default: 0
  socket:
    description: Socket of the Docker engine.
    type: path
    default: /var/run/docker.sock
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: The module only reads; the action reports that it would wait.}
  diff_mode: {support: none, description: There is nothing to show.}
"""

EXAMPLES = r"""
- name: Wait until the engine is ready
  sparkfleet.dgx.vllm_wait:
    container: vllm-llama31-8b-fp8
    url: http://127.0.0.1:8000
    timeout: 1800
"""

RETURN = r"""
ready: {description: Whether C(/health) answered 200 and the container runs., returned: always, type: bool}
state:
  description: running, paused, exited, restarting or missing. A container that could not be started counts as exited.
  returned: always
  type: str
exit_code: {description: Exit code of the last run., returned: always, type: int}
restart_count: {description: How often Docker restarted the container., returned: always, type: int}
oom_killed: {description: Whether the kernel killed it for memory., returned: always, type: bool}
error: {description: Docker's error about a failed start., returned: always, type: str}
started_at: {description: RFC 3339 time of the last start., returned: always, type: str}
log_lines: {description: Lines since the cursor with their times., returned: always, type: list, elements: str}
cursor: {description: Time of the last line read., returned: always, type: str}
downloaded: {description: Bytes in O(download_dir); 0 without it., returned: always, type: int}
now: {description: Unix time of the host., returned: always, type: float}
seconds: {description: By the action; how long it waited., returned: action, type: float}
phases: {description: By the action; phase and seconds of each., returned: action, type: list, elements: dict}
kv_cache: {description: "By the action; gib, tokens, max_concurrency and context of it.", returned: action, type: dict}
weights_gib: {description: By the action; size of the loaded weights., returned: action, type: float}
failure: {description: By the action; entry in the table of failures., returned: failure, type: str}
"""

import contextlib
import time
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.docker import Docker, DockerError
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.engine import new_lines, wait
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.http import Client, HttpError


def downloaded(folder: str) -> int:
    """Bytes of a model's blobs, partial ones included; 0 for no folder."""
    total = 0
    for file in Path(folder, "blobs").glob("*") if folder else ():
        with contextlib.suppress(OSError):  # a partial file was just renamed
            total += file.stat().st_blocks * 512  # a partial file may be sparse
    return total


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "container": {"type": "str", "required": True},
            "url": {"type": "str", "default": "http://127.0.0.1:8000"},
            "timeout": {"type": "float", "default": 1800.0},
            "slice": {"type": "float", "default": 3.0},
            "cursor": {"type": "str", "default": ""},
            "restarts": {"type": "int", "default": -1},
            "download_dir": {"type": "path", "default": ""},
            "download_bytes": {"type": "int", "default": 0},
            "socket": {"type": "path", "default": "/var/run/docker.sock"},
        },
        supports_check_mode=True,
    )
    params = module.params
    docker = Docker(params["socket"])
    try:
        client = Client(params["url"])
        found = wait(docker, client, params["container"], params["slice"], params["restarts"])
        lines = new_lines(docker, params["container"], found, params["cursor"])
    except (DockerError, HttpError) as error:
        module.fail_json(msg=str(error))
    del found["tty"]
    cursor = lines[-1].partition(" ")[0] if lines else params["cursor"]
    found.update(log_lines=lines, cursor=cursor, downloaded=downloaded(params["download_dir"]), now=time.time())
    module.exit_json(changed=False, **found)


if __name__ == "__main__":
    main()
