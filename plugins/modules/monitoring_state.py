#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Module: what of monitoring is on a host, and at which addresses the monitor reaches it."""

from __future__ import annotations

DOCUMENTATION = r"""
module: monitoring_state
short_description: Inspect a host for monitoring
version_added: 0.3.0
description: Finds installed programs, Sparkfleet's units, and own addresses that the monitor reaches. Reads only.
options:
  address: {description: Name or address of this host in the inventory., type: str, default: ""}
  monitor: {description: Name or address of the monitor; empty if it is this host., type: str, default: ""}
  project_dir: {description: Folder of the program that reads the GPU., type: path, default: /opt/sparkfleet}
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Reads only.}
  diff_mode: {support: none, description: Reads only.}
"""

EXAMPLES = r"""
- name: Inspect the host
  sparkfleet.dgx.monitoring_state:
    address: spark-1.lan
    monitor: gateway.lan
  register: state
"""

RETURN = r"""
packages: {description: Those of the three packages that are installed., returned: success, type: list, elements: str}
units: {description: Sparkfleet's units of monitoring on the host., returned: success, type: list, elements: str}
program: {description: SHA-256 of that program; empty if it is missing., returned: success, type: str}
addresses: {description: Own addresses that the monitor reaches., returned: success, type: list, elements: str}
"""

import ipaddress
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import bounded, monitoring, network


def main() -> None:
    """Entry point of the module."""
    text = {"type": "str", "default": ""}
    folder = {"type": "path", "default": "/opt/sparkfleet"}
    module = AnsibleModule(
        argument_spec={"address": text, "monitor": text, "project_dir": folder}, supports_check_mode=True
    )
    address, monitor = module.params["address"], module.params["monitor"]
    found = network.reached_at(address, [monitor]) if monitor else []
    module.exit_json(
        changed=False,
        packages=[name for name, program in monitoring.PACKAGES.items() if Path(program).exists()],
        units=monitoring.units(),
        program=bounded.checksum(Path(module.params["project_dir"]) / "lib" / "sparkfleet_host.pyz"),
        addresses=[one for one in found if not ipaddress.ip_address(one).is_loopback],
    )


if __name__ == "__main__":
    main()
