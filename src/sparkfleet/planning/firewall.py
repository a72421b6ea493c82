"""The firewall of a Spark: a table of nftables for our ports, which touches no other port.

Docker publishes a port by rewriting a packet's destination before the host's own filter sees it. So the table looks at
packets before Docker does, whichever backend that has, and at those for a container's own address as they are routed.
"""

from __future__ import annotations

import functools
import hashlib
import ipaddress
from collections.abc import Iterable, Mapping, Sequence

from sparkfleet_host.bounded import printable

from sparkfleet import SparkfleetError
from sparkfleet.paths import ROOT

MOST = 256  # entries of sparkfleet_firewall_allow
_HEAD = """\
# Made by Sparkfleet (sparkfleet_firewall, docs/threat-model.md). By hand: change the inventory and run it again.
table inet sparkfleet
delete table inet sparkfleet
table inet sparkfleet {
    # Before Docker's own rules, which rewrite the destination at -100.
    chain incoming {
        type filter hook prerouting priority -150; policy accept;
        iifname "lo" accept
        fib daddr type != local accept
"""
_ROUTED = """\
    }
    # Straight to a container's address, past the port that Docker publishes.
    chain routed {
        type filter hook forward priority -10; policy accept;
        iifname "br-*" accept
        iifname "docker0" accept
        oifname "br-*" tcp dport 8000 ct direction original ct status & dnat != dnat jump clients
    }
"""
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def allowed(entries: Sequence[object]) -> list[str]:
    """The addresses and networks of sparkfleet_firewall_allow. Raises SparkfleetError naming the place of a bad one."""
    if len(entries) > MOST:
        raise SparkfleetError(f"sparkfleet_firewall_allow: {len(entries)} entries, at most {MOST}")
    for place, entry in enumerate(entries, 1):
        try:
            ipaddress.ip_network(entry if isinstance(entry, str) else "")
        except ValueError:
            raise SparkfleetError(
                f"sparkfleet_firewall_allow: entry {place}, {printable(repr(entry), 60)}, is neither an address nor a "
                "network: write 192.0.2.7 or 192.0.2.0/24"
            ) from None
    return [str(entry) for entry in entries]


def networks(entries: Iterable[str]) -> list[Network]:
    """Addresses and networks as few networks, in a fixed order. Loopback and what has a zone are left out."""
    found = [ipaddress.ip_network(entry) for entry in entries if "%" not in entry]
    outside = [network for network in found if not network.is_loopback]
    four = ipaddress.collapse_addresses(item for item in outside if isinstance(item, ipaddress.IPv4Network))
    six = ipaddress.collapse_addresses(item for item in outside if isinstance(item, ipaddress.IPv6Network))
    return [*sorted(four), *sorted(six)]


def rules(ports: Sequence[int], clients: Sequence[Network], share: int, sparks: Sequence[Network]) -> str:
    """The table as a file for `nft -f`: `ports` are open to `clients`, the port `share` to `sparks`, both to the host
    itself. Its last comment is `mark`, by which it is recognised when it is loaded."""
    listed = ", ".join(map(str, sorted({*ports})))
    text = (
        f"{_HEAD}        tcp dport {{ {listed} }} ct direction original jump clients\n"
        f"        tcp dport {share} ct direction original jump sparks\n{_ROUTED}"
        f"    chain clients {{\n{_accept(clients)}        counter drop\n    }}\n"
        f"    chain sparks {{\n{_accept(sparks)}        counter drop"
    )
    return f'{text} comment "{hashlib.sha256(text.encode()).hexdigest()}"\n    }}\n}}\n'


@functools.cache
def unit() -> str:
    """The unit that loads the table."""
    file = ROOT / "roles" / "firewall" / "files" / "sparkfleet-firewall.service"
    return file.read_text(encoding="utf-8")


def mark(text: str) -> str:
    """What a table is recognised by."""
    return text.rpartition('comment "')[2].partition('"')[0]


def _accept(sources: Sequence[Network]) -> str:
    lines = ""
    for family, version in (("ip", 4), ("ip6", 6)):
        listed = ", ".join(str(network) for network in sources if network.version == version)
        lines += f"        {family} saddr {{ {listed} }} accept\n" if listed else ""
    return lines


def check_ports(ports: Mapping[str, int], ssh: int) -> None:
    """Whether SSH stays reachable: {name of a variable: port}. Raises SparkfleetError."""
    for name, port in ports.items():
        if port == ssh:
            raise SparkfleetError(f"{name}: {port} is the port of SSH, which sparkfleet_firewall must not close")
