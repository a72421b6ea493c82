# SPDX-License-Identifier: Apache-2.0
"""Addresses of this host, and which of them others reach it at. Nothing here sends a packet but name look-ups."""

from __future__ import annotations

import ipaddress
import json
import socket
import subprocess
from typing import Any

PROBE_SECONDS = 10


def _probe(address: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)


def is_own(address: str) -> bool:
    """Whether this host has the address."""
    with _probe(address) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def resolve(name: str) -> list[str]:
    """The addresses that a name stands for on this host; none where it stands for nothing."""
    try:
        return list(dict.fromkeys(str(item[4][0]) for item in socket.getaddrinfo(name, None, type=socket.SOCK_DGRAM)))
    except OSError:
        return []


def towards(address: str) -> str:
    """The own address that packets to another leave from; "" where no way leads there."""
    with _probe(address) as probe:
        try:
            probe.connect((address, 9))
        except OSError:
            return ""
        return str(probe.getsockname()[0])


def reached_at(name: str, others: list[str]) -> list[str]:
    """Own addresses under which others reach this host: those that its name stands for. Where that is none but loopback
    (/etc/hosts of Debian and Ubuntu has the host's own name there), also those that face the others."""
    own = [address for address in resolve(name) if is_own(address)]
    outside = [address for address in own if not ipaddress.ip_address(address).is_loopback]
    facing = (towards(address) for other in others for address in resolve(other)[:1])
    return outside or list(dict.fromkeys([*own, *filter(None, facing)]))


def interfaces() -> dict[str, list[str]]:
    """IPv4 addresses with their prefixes by network interface. Raises OSError, SubprocessError or ValueError."""
    argv = ["ip", "-json", "-4", "address", "show"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=PROBE_SECONDS, check=True)
    found: list[dict[str, Any]] = json.loads(done.stdout or "[]")
    return {
        item["ifname"]: [f"{known['local']}/{known['prefixlen']}" for known in item.get("addr_info", ())]
        for item in found
        if item.get("ifname")
    }
