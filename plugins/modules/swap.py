#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Swap, off now and at boot."""

from __future__ import annotations

DOCUMENTATION = r"""
module: swap
short_description: Switches swap off, now and at boot
description:
  - Ends the use of every swap device (C(swapoff)) and comments out the lines of type swap in the table of file systems.
  - Refuses before anything has changed when what is swapped out does not fit into the memory that is available.
  - Swap on compressed memory (zram) is switched off too; what makes it at boot is left alone.
options:
  state: {description: What swap shall be., type: str, choices: ["off"], required: true}
  fstab: {description: Table of file systems., type: path, default: /etc/fstab}
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Says what it would do.}
  diff_mode: {support: full, description: Shows the table before and after.}
"""

EXAMPLES = r"""
- name: No swap
  swap:
    state: "off"
"""

RETURN = r"""
devices: {description: Devices that were in use., returned: always, type: list, elements: str}
"""

import os
import re
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.sparkfleet_memory import memory_state

MARK = "# swap off: "


def without_swap(text: str) -> str:
    """The table with its lines of type swap commented out."""
    return re.sub(r"^(?!#)(\S+\s+\S+\s+swap\b)", rf"{MARK}\1", text, flags=re.M)


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["off"], "required": True},
            "fstab": {"type": "path", "default": "/etc/fstab"},
        },
        supports_check_mode=True,
    )
    table = Path(module.params["fstab"])
    before = table.read_text(encoding="utf-8") if table.exists() else ""
    after = without_swap(before)
    memory = memory_state()
    devices = [entry["path"] for entry in memory["swap"]]
    used = memory["swap_total"] - memory["swap_free"]
    if devices and used > memory["available"]:
        module.fail_json(
            msg=f"swap holds {used / 1024**3:.1f} GiB and {memory['available'] / 1024**3:.1f} GiB of memory are "
            "available: stop what uses memory on the host first, or set sparkfleet_swap: keep"
        )
    if not module.check_mode:
        if after != before:
            module.atomic_move(write_beside(table, after), str(table))
        for device in devices:
            module.run_command(["swapoff", device], check_rc=True)
    module.exit_json(
        changed=bool(devices or after != before),
        devices=devices,
        diff={"before_header": str(table), "after_header": str(table), "before": before, "after": after},
    )


def write_beside(path: Path, text: str) -> str:
    """A file next to ``path`` with its mode, to take its place in one step."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.chmod(path.stat().st_mode & 0o7777)
    os.sync()
    return str(temporary)


if __name__ == "__main__":
    main()
