#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""A private file whose content is never shown."""

from __future__ import annotations

DOCUMENTATION = r"""
module: secret_file
short_description: Writes a secret to a file that only root can read
description:
  - Unlike M(ansible.builtin.copy), the content is sent with the module (on standard input when pipelining), so
    it is never in a temporary file on either side, nor in a diff.
  - Creates the parent folder (0755) if it is missing.
options:
  path: {description: The file., type: path, required: true}
  content: {description: Content; a newline is added., type: str, required: true}
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Reports whether the file would change.}
  diff_mode: {support: none, description: Secrets are never shown.}
"""

EXAMPLES = r"""
- name: Write the Hugging Face token
  sparkfleet.dgx.secret_file:
    path: /etc/sparkfleet/hf_token
    content: "{{ sparkfleet_hf_token }}"
"""

RETURN = r"""
path: {description: The file., returned: always, type: str}
"""

import os
import stat
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.releases import write_bytes


def is_current(path: Path, content: bytes) -> bool:
    """Whether the file is there with this content, owner root (or the one who asks) and mode 0600."""
    try:
        info = path.stat()
        return stat.S_IMODE(info.st_mode) == 0o600 and info.st_uid == os.geteuid() and path.read_bytes() == content
    except OSError:
        return False


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "content": {"type": "str", "required": True, "no_log": True},
        },
        supports_check_mode=True,
    )
    path, content = Path(module.params["path"]), module.params["content"].strip().encode() + b"\n"
    changed = not is_current(path, content)
    if changed and not module.check_mode:
        try:
            write_bytes(path, content, 0o600)
        except OSError as error:
            module.fail_json(msg=f"cannot write {path}: {error.strerror}")
    module.exit_json(changed=changed, path=str(path))


if __name__ == "__main__":
    main()
