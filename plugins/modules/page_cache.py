#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""The kernel's page cache, dropped."""

from __future__ import annotations

DOCUMENTATION = r"""
module: page_cache
short_description: Drops the kernel's page cache
description:
  - On unified memory the page cache counts as used for C(cudaMemGetInfo), so that vLLM 0.10.1.1 refuses to start
    after a large copy (vllm issue 48140). Drop it just before a start, never while vLLM profiles memory.
  - Reports a change whenever it runs.
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Says that it would.}
  diff_mode: {support: none, description: There is nothing to show.}
"""

EXAMPLES = r"""
- name: Drop the page cache
  page_cache:
"""

RETURN = r"""
freed: {description: Growth of MemFree in bytes., returned: success, type: int}
"""

import os
import re
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule


def free_bytes(meminfo: str) -> int:
    """MemFree of the text of /proc/meminfo, in bytes."""
    found = re.search(r"^MemFree:\s+(\d+) kB$", meminfo, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(argument_spec={}, supports_check_mode=True)
    if module.check_mode:
        module.exit_json(changed=True, freed=0)
    meminfo = Path("/proc/meminfo")
    before = free_bytes(meminfo.read_text(encoding="ascii"))
    os.sync()  # only clean pages can be dropped
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n", encoding="ascii")
    except OSError as error:
        module.fail_json(msg=f"cannot drop the page cache (/proc/sys/vm/drop_caches: {error.strerror}): run as root")
    module.exit_json(changed=True, freed=max(free_bytes(meminfo.read_text(encoding="ascii")) - before, 0))


if __name__ == "__main__":
    main()
