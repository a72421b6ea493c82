# SPDX-License-Identifier: Apache-2.0
"""Addresses of this host, and at which of them others reach it. Only name lookups send packets."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .bounded import read_file

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


def is_wildcard(address: str) -> bool:
    """Whether an address stands for all of the host: Docker writes "" for it too."""
    try:
        return not address or ipaddress.ip_address(address).is_unspecified
    except ValueError:
        return False


def overlap(one: str, other: str) -> bool:
    """Whether listening on one address keeps others from listening on the other at the same port."""
    return is_wildcard(one) or is_wildcard(other) or one == other


def listeners(port: int) -> list[dict[str, Any]]:
    """Who listens on a TCP port: [{address, pid, process}]; pid None and process "" if unknown."""
    found: dict[str, str] = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            for line in Path(table).read_text(encoding="ascii").splitlines()[1:]:
                fields = line.split()
                address, _, number = fields[1].rpartition(":")
                if fields[3] == "0A" and int(number, 16) == port:
                    found[f"socket:[{fields[9]}]"] = _address(address)
    if not found:
        return []
    holders: dict[str, int] = {}
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if (name := str(link.readlink())) in found:
                holders.setdefault(name, int(link.parts[2]))
    listed = []
    for name, address in found.items():
        pid, process = holders.get(name), ""
        with contextlib.suppress(OSError):
            process = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip() if pid else ""
        listed.append({"address": address, "pid": pid, "process": process})
    return listed


def is_guard(listener: Mapping[str, Any]) -> bool:
    """Whether one of `listeners` is Sparkfleet's guard, which keeps the door of an engine that starts on demand."""
    try:
        words = read_file(f"/proc/{listener['pid']}/cmdline", 8192).split(b"\0")
    except (OSError, ValueError):
        return False
    return len(words) > 2 and words[1].endswith(b"/sparkfleet_host.pyz") and words[2] == b"guard"


def _address(digits: str) -> str:
    """An address of /proc/net/tcp: hexadecimal, each word of four bytes in the order of the host (little endian)."""
    raw = bytes.fromhex(digits)
    packed = b"".join(raw[place : place + 4][::-1] for place in range(0, len(raw), 4))
    address = ipaddress.ip_address(packed)
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)
