#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Module: where a gateway meets the other gateways, and where a floating address belongs."""

from __future__ import annotations

DOCUMENTATION = r"""
module: gateway_network
short_description: Find the network between gateways, and the interface for a floating address
description:
  - Resolves the gateways' names on this host, and finds its own address facing them with its interface.
  - keepalived takes addresses only, no names. Reads only.
options:
  name: {description: This gateway's name., type: str, required: true}
  gateways: {description: "All of them, each with C(name) and C(address).", type: list, elements: dict, required: true}
  address: {description: Floating IPv4 address with or without prefix; empty for none., type: str, default: ""}
  interface: {description: Interface of the floating address; found by default., type: str, default: ""}
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Reads only.}
  diff_mode: {support: none, description: Reads only.}
"""

EXAMPLES = r"""
- name: Find the network shared with the other gateways
  sparkfleet.dgx.gateway_network:
    name: gateway-1
    gateways: [{name: gateway-1, address: gateway-1.lan}, {name: gateway-2, address: gateway-2.lan}]
    address: 192.0.2.4
  register: network
"""

RETURN = r"""
own: {description: Own address facing the other gateways., returned: success, type: str}
interface: {description: Interface that has it., returned: success, type: str}
address: {description: The floating address with its prefix; empty for none., returned: success, type: str}
peers: {description: All gateways with their addresses resolved., returned: success, type: list, elements: dict}
"""

import ipaddress
import subprocess
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import network


def first_ipv4(name: str) -> str:
    """The first IPv4 address that a name stands for, not loopback. Raises ValueError."""
    known = [found for found in map(ipaddress.ip_address, network.resolve(name)) if not found.is_loopback]
    found = next((str(address) for address in known if address.version == 4), "")
    if not found:
        raise ValueError(
            f"{name} does not resolve to an IPv4 address here; set sparkfleet_address of that gateway to one"
        )
    return found


def resolve(params: dict[str, Any], interfaces: dict[str, list[str]]) -> dict[str, Any]:
    """What the module returns. Raises ValueError with what cannot be determined, and what to set."""
    others = {
        item["name"]: first_ipv4(item["address"]) for item in params["gateways"] if item["name"] != params["name"]
    }
    floating = ipaddress.IPv4Interface(params["address"]) if params["address"] else None
    wanted = params["interface"]
    if wanted and not interfaces.get(wanted):
        there = ", ".join(interfaces)
        raise ValueError(f"sparkfleet_gateway_interface: {wanted} has no IPv4 address here; there are {there}")
    goal = next(iter(others.values()), str(floating.ip) if floating else "")
    own = interfaces[wanted][0].partition("/")[0] if wanted else network.towards(goal) if goal else ""
    place = {text.partition("/")[0]: (name, text) for name, texts in interfaces.items() for text in texts}
    if own not in place:
        raise ValueError(f"no route to {goal}; set sparkfleet_gateway_interface")
    name, with_prefix = place[own]
    address = ""
    if floating:
        address = str(floating)
        if "/" not in params["address"]:
            if floating.ip not in ipaddress.IPv4Interface(with_prefix).network:
                raise ValueError(
                    f"sparkfleet_gateway_address: {floating.ip} is not in the network of {name} ({with_prefix}); "
                    "specify it with its prefix (192.0.2.4/24), and sparkfleet_gateway_interface if it belongs "
                    "elsewhere"
                )
            address = f"{floating.ip}/{with_prefix.partition('/')[2]}"
        if str(floating.ip) in others.values():
            raise ValueError(
                f"sparkfleet_gateway_address: {floating.ip} is a gateway's own address; it must be a free one"
            )
    peers = [{"name": item["name"], "address": others.get(item["name"], own)} for item in params["gateways"]]
    return {"own": own, "interface": name, "address": address, "peers": peers}


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "gateways": {"type": "list", "elements": "dict", "required": True},
            "address": {"type": "str", "default": ""},
            "interface": {"type": "str", "default": ""},
        },
        supports_check_mode=True,
    )
    try:
        found = resolve(module.params, network.interfaces())
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        module.fail_json(msg=f"{module.params['name']}: {error}")
        raise SystemExit(1) from None
    module.exit_json(changed=False, **found)


if __name__ == "__main__":
    main()
