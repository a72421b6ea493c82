#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Swap, off now and at boot."""

from __future__ import annotations

DOCUMENTATION = r"""
module: swap
short_description: Disables swap, now and at boot
description:
  - Disables every swap device (C(swapoff)) and comments out the swap entries in C(/etc/fstab).
  - Refuses before anything has changed if the swapped-out memory plus 4 GiB does not fit into available memory.
  - Swap that is not in C(/etc/fstab) (zram, a custom unit) is disabled as well, but whatever creates it at boot
    is left unchanged; a warning names it.
options:
  state: {description: Wanted state of swap., type: str, choices: [disabled], required: true}
  fstab: {description: Path of the file system table., type: path, default: /etc/fstab}
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Reports what it would do.}
  diff_mode: {support: full, description: Shows the file before and after.}
"""

EXAMPLES = r"""
- name: No swap
  sparkfleet.dgx.swap:
    state: disabled
"""

RETURN = r"""
devices: {description: Devices that were in use., returned: success, type: list, elements: str}
"""

import re
import tempfile
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.bounded import GIB
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.memory import memory_state, swap_in_fstab

MARK = "# swap off: "
#: Left to the host when swap has come back into memory; the plan's own floor.
RESERVE = 4 * GIB


def without_swap(text: str) -> str:
    """The table with its lines of type swap commented out."""
    return re.sub(r"^(?=[ \t]*[^#\s]\S*[ \t]+\S+[ \t]+swap(?:\s|$))", MARK, text, flags=re.MULTILINE)


def unexplained(devices: list[str], sources: list[str]) -> list[str]:
    """Devices that no line of the table made; one that names a UUID or a label may have made any disk's."""
    by_tag = any("=" in source for source in sources)
    return [name for name in devices if name not in sources and (name.startswith("/dev/zram") or not by_tag)]


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["disabled"], "required": True},
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
    if devices and used + RESERVE > memory["available"]:
        module.fail_json(
            msg=f"swap holds {used / GIB:.1f} GiB and {memory['available'] / GIB:.1f} GiB of memory are available, "
            f"of which {RESERVE / GIB:.0f} GiB are reserved for the host: stop what uses memory, or set "
            "sparkfleet_swap: keep"
        )
    foreign = unexplained(devices, swap_in_fstab(before))
    if foreign:
        module.warn(
            f"{table} does not contain the swap {', '.join(foreign)}: it will be created again at boot; "
            "`systemctl list-units --all '*swap*' '*zram*'` finds it"
        )
    if not module.check_mode:
        for device in devices:
            code, _, error = module.run_command(["swapoff", device])
            if code != 0:
                module.fail_json(msg=f"swapoff {device}: {error.strip()}: free memory, or set sparkfleet_swap: keep")
        if after != before:
            with tempfile.NamedTemporaryFile("w", dir=table.parent, delete=False, encoding="utf-8") as file:
                file.write(after)
            module.atomic_move(file.name, str(table))  # keeps owner and mode
    module.exit_json(
        changed=bool(devices or after != before),
        devices=devices,
        diff={"before_header": str(table), "after_header": str(table), "before": before, "after": after},
    )


if __name__ == "__main__":
    main()
