#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's container runtime in Docker's configuration."""

from __future__ import annotations

DOCUMENTATION = r"""
module: nvidia_container_runtime
short_description: Adds the nvidia runtime to Docker, with nvidia-ctk
description:
  - Runs C(nvidia-ctk runtime configure --runtime=docker) if the configuration does not have the runtime.
    The rest of the file is unchanged.
  - Returns whether the running Docker daemon still needs a restart to load the runtime, so that a restart missed by a
    failed run is made by the next one.
options:
  config: {description: Docker's configuration., type: path, default: /etc/docker/daemon.json}
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Reports whether the file would change.}
  diff_mode: {support: full, description: Shows the file before and after.}
"""

EXAMPLES = r"""
- name: Add the nvidia runtime to Docker
  sparkfleet.dgx.nvidia_container_runtime:
  register: runtime

- name: Restart Docker to load the runtime
  ansible.builtin.systemd_service:
    name: docker.service
    state: restarted
  when: runtime.restart_docker
"""

RETURN = r"""
config: {description: The file., returned: always, type: str}
restart_docker:
  description: Whether the running Docker daemon does not know the runtime. In check mode, whether that would be so.
  returned: always
  type: bool
"""

import json
import shutil
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.docker import Docker, DockerError

ENGINE_SECONDS = 10


def configured(text: str) -> bool:
    """Whether daemon.json names the runtime; raises ValueError when it is not a JSON object."""
    data = json.loads(text) if text.strip() else {}
    if not isinstance(data, dict):
        raise ValueError("not a JSON object")
    return "nvidia" in (data.get("runtimes") or {})


def engine_lacks_it() -> bool:
    """Whether the running Docker engine was started without the runtime; a stopped one does not count."""
    try:
        return "nvidia" not in (Docker(timeout=ENGINE_SECONDS).info().get("Runtimes") or {})
    except (DockerError, OSError):
        return False


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={"config": {"type": "path", "default": "/etc/docker/daemon.json"}},
        supports_check_mode=True,
    )
    path = Path(module.params["config"])
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    try:
        changed = not configured(before)
    except ValueError as error:
        module.fail_json(msg=f"{path} cannot be read ({error}): fix it, Docker does not start with it either")
    command = ["nvidia-ctk", "runtime", "configure", "--runtime=docker", f"--config={path}"]
    after = before
    if changed:
        if module.check_mode and shutil.which("nvidia-ctk") is None:
            # Not installed yet; this is what nvidia-ctk adds.
            runtime = {"nvidia": {"args": [], "path": "nvidia-container-runtime"}}
            data = json.loads(before) if before.strip() else {}
            after = json.dumps({**data, "runtimes": {**(data.get("runtimes") or {}), **runtime}}, indent=4) + "\n"
        elif module.check_mode:
            # --dry-run prints the new file on standard output, and its log on standard error.
            _, after, _ = module.run_command([*command, "--dry-run"], check_rc=True)
        else:
            module.run_command(command, check_rc=True)
            after = path.read_text(encoding="utf-8")
            if not configured(after):
                module.fail_json(msg=f"nvidia-ctk ran, but {path} still has no nvidia runtime")
    module.exit_json(
        changed=changed,
        config=str(path),
        restart_docker=engine_lacks_it(),
        diff={"before": before, "after": after, "before_header": str(path), "after_header": str(path)},
    )


if __name__ == "__main__":
    main()
