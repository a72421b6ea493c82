"""Sparks on this network, by mDNS, and whether this machine is one.

DGX OS announces ssh through Avahi (`_ssh._tcp`; NVIDIA's own `discover-sparks` uses it); a Spark's name there is
spark-1a2b.local, gx10-… of ASUS, promaxgb10-… of Dell, edgexpert-… of MSI.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import logging
import re
import socket
import time
from collections.abc import Iterable, Sequence

import ifaddr
import zeroconf
from sparkfleet_host.bounded import HOST

from sparkfleet.onboarding import ssh

SECONDS = 3.0
TYPES = ("_ssh._tcp.local.", "_sftp-ssh._tcp.local.")
RESOLVE_MS = 1500
#: Maximum number of announcements, and of addresses per host.
MOST, ADDRESSES = 512, 16
_SPARK = re.compile(r"(dgx-?)?spark|gx10|promaxgb10|edgexpert")
#: Avahi assigns such a name to a host that hears its own name announced by others, as Sparks do over their fabric
#: (NVIDIA/dgx-spark-playbooks issue 56); it is another one tomorrow.
_RENAMED = re.compile(r"-\d+$")
_FABRIC = re.compile(r"np\d+$")  # netdevs of the ConnectX


@dataclasses.dataclass(frozen=True)
class Found:
    """A host that announces ssh: its name without `.local`, its IPv4 addresses, the likeliest first."""

    name: str
    addresses: tuple[str, ...]
    port: int = ssh.PORT

    @property
    def likely(self) -> bool:
        """Whether it is called as Sparks are."""
        return bool(_SPARK.match(self.name))


def browse(seconds: float = SECONDS, interfaces: Sequence[str] | None = None) -> list[Found]:
    """Hosts that announce ssh within the time, without this one, in the order of their names; none without a network.

    `interfaces` are own addresses to ask on; all by default.
    """
    logging.getLogger("zeroconf").setLevel(logging.CRITICAL)  # an interface without multicast is not worth a message
    names: dict[str, str] = {}  # service -> its type

    def note(zeroconf: zeroconf.Zeroconf, service_type: str, name: str, state_change: object) -> None:
        if len(names) < MOST:
            names[name] = service_type

    found: dict[str, tuple[set[str], int]] = {}
    try:
        net = zeroconf.Zeroconf(list(interfaces) if interfaces else zeroconf.InterfaceChoice.All)
    except OSError:
        return []
    with contextlib.closing(net):
        browser = zeroconf.ServiceBrowser(net, list(TYPES), handlers=[note])
        time.sleep(seconds)
        browser.cancel()
        # ssh first: its port is the one to take
        for name in sorted(names, key=lambda name: TYPES.index(names[name])):
            with contextlib.suppress(zeroconf.Error, OSError, ValueError):  # whatever a neighbour announces
                info = zeroconf.ServiceInfo(names[name], name)
                if info.load_from_cache(net) or info.request(net, RESOLVE_MS):
                    add(found, info.server, info.port, info.parsed_addresses(zeroconf.IPVersion.V4Only))
    own = {text for text, _, _ in own_addresses()} if interfaces is None else set()
    # What is this machine's too (Docker's bridge has the same address everywhere) reaches no other machine.
    return [
        Found(host, tuple(sorted(addresses - own, key=_rank)), port)
        for host, (addresses, port) in sorted(found.items())
        if addresses - own
    ]


def add(found: dict[str, tuple[set[str], int]], server: str | None, port: int | None, addresses: list[str]) -> None:
    """Note what a host announces, under its name without `.local`. Anybody on the network can announce anything: a
    name that is none of a host is left out, for it becomes one in an inventory, whose values Ansible evaluates."""
    name = (server or "").removesuffix(".").removesuffix(".local").lower()
    if HOST.fullmatch(name) and not name.endswith("."):
        known, _ = found.setdefault(name, (set(), port if port and 0 < port < 65536 else ssh.PORT))
        known.update(addresses[: max(ADDRESSES - len(known), 0)])


def own_addresses() -> list[tuple[str, int, str]]:
    """This machine's IPv4 addresses: address, length of the prefix, interface."""
    return [
        (address.ip, address.network_prefix, adapter.nice_name)
        for adapter in ifaddr.get_adapters()
        for address in adapter.ips
        if isinstance(address.ip, str)
    ]


def _rank(text: str) -> tuple[int, ipaddress.IPv4Address]:
    """Least for an address on a network of ours that is not a Spark's fabric."""
    address = ipaddress.IPv4Address(text)
    if address.is_link_local:
        return 3, address
    for own, prefix, interface in own_addresses():
        if address in ipaddress.IPv4Network(f"{own}/{prefix}", strict=False):
            return (2 if _FABRIC.search(interface) else 0), address
    return 1, address


def place(found: Found) -> ssh.Place:
    """What to write down for a host: its name, where that is sure to stay and this machine finds it; else its address.

    A name outlives a new lease of DHCP.
    """
    port = found.port if found.port != ssh.PORT else 0
    name = f"{found.name}.local"
    if not _RENAMED.search(found.name) and set(resolved(name)) & set(found.addresses):
        return ssh.Place(name, port=port)
    return ssh.Place(found.addresses[0], port=port)


def resolved(name: str) -> list[str]:
    """IPv4 addresses of a name, as this machine's programs find them."""
    try:
        return [str(item[4][0]) for item in socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)]
    except OSError:
        return []


def own_address() -> str:
    """The address under which others reach this machine, or its name."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()


def same(found: Found, addresses: Iterable[str], names: Iterable[str]) -> bool:
    """Whether a found host is one of those with these addresses (or names to be resolved) and names."""
    known = set(addresses)
    return found.name in set(names) or f"{found.name}.local" in known or bool(known & set(found.addresses))
