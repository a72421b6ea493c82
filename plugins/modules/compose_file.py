#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""The compose file of a project, checked by Docker before it replaces anything."""

from __future__ import annotations

DOCUMENTATION = r"""
module: compose_file
short_description: Writes a compose file that Docker has accepted
description:
  - Unlike M(ansible.builtin.template) it gives a truthful diff in check mode also when the folder does not exist
    yet, and validates with the Compose plugin only where there is one.
options:
  path: {description: The file; its folder is made if missing., type: path, required: true}
  content: {description: The whole text., type: str, required: true}
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Says whether the file would change.}
  diff_mode: {support: full, description: Shows the file before and after.}
"""

EXAMPLES = r"""
- name: Write the compose file
  compose_file:
    path: /opt/sparkfleet/compose.yml
    content: "{{ lookup('ansible.builtin.template', 'compose.yml.j2') }}"
"""

RETURN = r"""
path: {description: The file., returned: always, type: str}
"""

import shutil
import subprocess
import tempfile
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule


def complaint(file: Path) -> str | None:
    """What the Compose plugin says against a file, or None; None also where there is no plugin."""
    docker = shutil.which("docker")
    if docker is None:
        return None
    done = subprocess.run(
        [docker, "compose", "--file", str(file), "config", "--quiet", "--no-interpolate"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return None if done.returncode == 0 else done.stderr.strip() or f"exit code {done.returncode}"


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "content": {"type": "str", "required": True},
        },
        supports_check_mode=True,
    )
    path, content = Path(module.params["path"]), module.params["content"]
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    changed = before != content
    if changed and not module.check_mode:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".yml", delete=False, encoding="utf-8") as file:
            file.write(content)
        temporary = Path(file.name)
        reason = complaint(temporary)
        if reason:
            temporary.unlink()
            module.fail_json(msg=f"Docker Compose refuses the new {path}; the old one is untouched: {reason}")
        temporary.chmod(0o644)
        module.atomic_move(str(temporary), str(path))
    module.exit_json(
        changed=changed,
        path=str(path),
        diff={"before": before, "after": content, "before_header": str(path), "after_header": str(path)},
    )


if __name__ == "__main__":
    main()
