# SPDX-License-Identifier: Apache-2.0
"""The network between the hosts of a group: ConnectX-7 ports, their RDMA devices, addresses and links.

A DGX Spark shows each of its two ports as two network interfaces, on PCI domains of their own, which share the cable:
enp1s0f0np0 and enP2p1s0f0np0 are port 0, enp1s0f1np1 and enP2p1s0f1np1 port 1. One cable gives the full bandwidth, if
NCCL is given the RDMA devices of both.

`collect` runs commands; all the rest is a function of what they printed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .bounded import KIB, BoundsError, as_dict, as_int, as_list, as_str, parse_json, read_file

DRIVER = "mlx5_core"
COMMAND_SECONDS = 10.0
OUTPUT = 256 * KIB  # of a command
MOST = 64  # interfaces
ROCE_2 = "RoCE v2"
FULL_MBIT = 200_000  # what a ConnectX-7 port of a Spark has with the right cable, and a switch that is set to it
ADDRESSES, ROUTES, RDMA = "ip -j address show", "ip -j route show default", "rdma -j link show"
IBDEV2NETDEV = "ibdev2netdev"
NETWORK = Path("/sys/class/net")
INFINIBAND = Path("/sys/class/infiniband")


@dataclasses.dataclass(frozen=True)
class Interface:
    """A network interface. `link`: whether there is a cable with something at its other end; `speed` in Mbit/s, 0 for
    unknown; `addresses`: IPv4 with prefix; `pci`: its place, such as 0002:01:00.0; `gid`: index of the RoCE v2 GID of
    its IPv4 address, None for none; `default`: whether the host's default route leaves there."""

    name: str
    driver: str = ""
    pci: str = ""
    link: bool = False
    speed: int = 0
    mtu: int = 0
    addresses: tuple[str, ...] = ()
    rdma: str = ""
    rdma_active: bool = False
    gid: int | None = None
    default: bool = False

    @property
    def is_fabric(self) -> bool:
        """Whether it is one of a ConnectX."""
        return self.driver == DRIVER

    @property
    def port(self) -> str:
        """Which port of the card it is: the function of its PCI address, or its name."""
        return self.pci.rpartition(".")[2] if self.is_fabric and "." in self.pci else self.name


# -- what is read ----------------------------------------------------------------------------------------------------


def collect() -> dict[str, str]:
    """Outputs of the commands, by command; those that are not there or fail are left out. `ethtool` is asked of each
    interface of a device, the GIDs are read of each RDMA device."""
    found = {command: _run(*command.split()) for command in (ADDRESSES, ROUTES, RDMA, IBDEV2NETDEV)}
    for path in sorted(NETWORK.glob("*/device/driver"))[:MOST]:
        name = path.parts[-3]
        found[f"ethtool -i {name}"] = _run("ethtool", "-i", name) or _driver(name)
        found[f"ethtool {name}"] = _run("ethtool", name) or _link(name)
    for device in sorted(INFINIBAND.glob("*"))[:MOST]:
        found[f"gids {device.name}"] = _gids(device)
    return {command: output for command, output in found.items() if output}


def _run(*argv: str) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            argv, capture_output=True, text=True, errors="replace", timeout=COMMAND_SECONDS, check=False
        )
        return done.stdout[:OUTPUT] if done.returncode == 0 else ""
    return ""


def _text(path: Path) -> str:
    try:
        return read_file(path, 4 * KIB).decode("utf-8", "replace").strip()
    except (OSError, BoundsError):
        return ""


def _driver(name: str) -> str:
    """What `ethtool -i` prints, where there is no ethtool."""
    device = NETWORK / name / "device"
    try:
        return f"driver: {(device / 'driver').resolve().name}\nbus-info: {device.resolve().name}\n"
    except OSError:
        return ""


def _link(name: str) -> str:
    """The same of `ethtool NAME`."""
    speed, carrier = _text(NETWORK / name / "speed"), _text(NETWORK / name / "carrier")
    return f"\tSpeed: {speed}Mb/s\n\tLink detected: {'yes' if carrier == '1' else 'no'}\n"


def _gids(device: Path) -> str:
    """A line for each GID of the first port: index, type, interface, GID."""
    lines = []
    for path in sorted(device.glob("ports/1/gids/*"), key=lambda path: path.name.zfill(4))[:256]:
        attributes = device / "ports/1/gid_attrs"
        kind, netdev = _text(attributes / "types" / path.name), _text(attributes / "ndevs" / path.name)
        gid = _text(path)
        if gid.strip("0:") and netdev:
            lines.append(f"{path.name}\t{kind}\t{netdev}\t{gid}")
    return "\n".join(lines)


# -- what it says ----------------------------------------------------------------------------------------------------


def interfaces(outputs: Mapping[str, str]) -> list[Interface]:
    """The interfaces of a host that have a device or an IPv4 address, in the order of the kernel. Raises BoundsError
    for JSON that is none."""
    defaults = {str(route.get("dev")) for route in _listed(outputs.get(ROUTES, ""), ROUTES)}
    devices = _devices(outputs)
    made = []
    for item in _listed(outputs.get(ADDRESSES, ""), ADDRESSES):
        name = as_str(item.get("ifname"), "ifname", 64)
        if item.get("link_type") == "loopback":
            continue
        driver, ethtool = outputs.get(f"ethtool -i {name}", ""), outputs.get(f"ethtool {name}", "")
        addresses = tuple(
            f"{as_str(one.get('local'), 'local', 64)}/{as_int(one.get('prefixlen'), 'prefixlen', 0, 32)}"
            for one in (as_dict(entry, "addr_info") for entry in as_list(item.get("addr_info", []), "addr_info", 256))
            if one.get("family") == "inet"
        )
        rdma, active = devices.get(name, ("", False))
        link = re.search(r"Link detected: (yes|no)", ethtool)
        speed = re.search(r"Speed: (\d{1,9})Mb/s", ethtool)
        up = link[1] == "yes" if link else str(item.get("operstate")) == "UP"
        made.append(
            Interface(
                name=name,
                driver=_word(r"^driver: (\S{1,64})", driver),
                pci=_word(r"^bus-info: (\S{1,64})", driver),
                link=up,
                speed=int(speed[1]) if speed and up else 0,
                mtu=as_int(item.get("mtu", 0), "mtu", 0, 1 << 20),
                addresses=addresses,
                rdma=rdma,
                rdma_active=active,
                gid=_gid(outputs.get(f"gids {rdma}", ""), name, addresses) if rdma else None,
                default=name in defaults,
            )
        )
    return [item for item in made if item.driver or item.addresses]


def _listed(text: str, what: str) -> list[dict[str, Any]]:
    if not text.strip():
        return []
    return [as_dict(item, what) for item in as_list(parse_json(text, what, OUTPUT), what, 1000)]


def _word(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.M)
    return found[1] if found else ""


def _devices(outputs: Mapping[str, str]) -> dict[str, tuple[str, bool]]:
    """RDMA device of each interface, and whether it is active: of `rdma`, else of `ibdev2netdev`."""
    found: dict[str, tuple[str, bool]] = {}
    for line in outputs.get(IBDEV2NETDEV, "").splitlines()[:MOST]:
        # rocep1s0f0 port 1 ==> enp1s0f0np0 (Up)
        if seen := re.fullmatch(r"\s*(\S{1,64}) port \d+ ==> (\S{1,64}) \((\w+)\)\s*", line):
            found[seen[2]] = (seen[1], seen[3] == "Up")
    for item in _listed(outputs.get(RDMA, ""), RDMA):
        if item.get("netdev") and item.get("ifname"):
            netdev, name = as_str(item["netdev"], "netdev", 64), as_str(item["ifname"], "ifname", 64)
            found[netdev] = (name.partition("/")[0], item.get("state") == "ACTIVE")
    return found


def _gid(text: str, name: str, addresses: Sequence[str]) -> int | None:
    """Index of the GID of type RoCE v2 that is an IPv4 address of the interface."""
    wanted = {ipaddress.IPv4Address(address.partition("/")[0]) for address in addresses}
    for line in text.splitlines()[:256]:
        index, kind, netdev, gid = ([*line.split("\t"), "", "", ""])[:4]
        with contextlib.suppress(ValueError):
            mapped = ipaddress.IPv6Address(gid).ipv4_mapped
            if kind == ROCE_2 and netdev == name and mapped in wanted and index.isdecimal():
                return int(index)
    return None


def ports(found: Sequence[Interface]) -> dict[str, list[Interface]]:
    """The interfaces of ConnectX devices by the port that they share."""
    made: dict[str, list[Interface]] = {}
    for item in found:
        if item.is_fabric:
            made.setdefault(item.port, []).append(item)
    return dict(sorted(made.items()))


def at(found: Sequence[Interface], address: str) -> Interface | None:
    """The interface that has an address."""
    return next((item for item in found if any(own.partition("/")[0] == address for own in item.addresses)), None)


def rdma(found: Sequence[Interface], chosen: Interface) -> list[str]:
    """The active RDMA devices of the port of an interface."""
    return [item.rdma for item in found if item.is_fabric and item.port == chosen.port and item.rdma_active]


# -- what is wrong with it -------------------------------------------------------------------------------------------


def problems(found: Sequence[Interface], address: str, management: bool = False) -> list[str]:
    """What keeps an address from being that of a host on the fabric, in sentences. `management`: a network other than
    that of a ConnectX, and the one of the default route, are accepted."""
    there = ports(found)
    up = [name for own in there.values() for name in (item.name for item in own if item.link)]
    linked = f"{' and '.join(up)} {'has' if len(up) == 1 else 'have'} a link" if up else "none of them has a link"
    if not there and not management:
        return ["no ConnectX device was found: `lspci -d 15b3:` lists them, the driver is mlx5_core"]
    chosen = at(found, address)
    if chosen is None:
        where = f"; of the ConnectX interfaces {linked}" if there else ""
        return [f"no interface has the address {address}{where}: sparkfleet_fabric_address is to be one of the host"]
    said = []
    if not management and not chosen.is_fabric:
        said.append(f"{address} is on {chosen.name}, which is not of a ConnectX; of those {linked}")
    if not management and chosen.default:
        said.append(f"{address} is on {chosen.name}, which the default route leaves by: that is the management network")
    if chosen.is_fabric and not chosen.link:
        said.append(f"{address} is on {chosen.name}, which has no link; {linked}: move the cable, or the address")
    if chosen.is_fabric and chosen.link:
        own = there.get(chosen.port, [])
        mtus = sorted({item.mtu for item in own if item.link})
        if len(mtus) > 1:
            said.append(f"the two interfaces of a port have MTUs of {' and '.join(map(str, mtus))}: give them the same")
    return said


def advice(found: Sequence[Interface], address: str) -> list[str]:
    """What makes the fabric of a host slower than it could be, in sentences."""
    chosen = at(found, address)
    if chosen is None or not chosen.is_fabric:
        return []
    own = [item for item in found if item.is_fabric and item.port == chosen.port]
    said = [
        f"{item.name} runs at {item.speed / 1000:g} Gbit/s, {FULL_MBIT / 1000:g} are possible: check the cable, and "
        "the speed that the switch is set to"
        for item in own
        if 0 < item.speed < FULL_MBIT
    ]
    networks = {item.name: {str(ipaddress.IPv4Interface(one).network) for one in item.addresses} for item in own}
    for item in own:
        others = set().union(*(networks[name] for name in networks if name != item.name))
        if item.rdma and not item.rdma_active:
            said.append(f"the RDMA device {item.rdma} of {item.name} is down")
        elif item.link and not item.addresses:
            said.append(
                f"{item.name} has no address, so RDMA uses half of the port: give it one of a network of its own"
            )
        elif item is not chosen and networks[item.name] & others:
            said.append(f"{item.name} is in the same network as {chosen.name}, so one of them idles: give it its own")
    if any(item.link for item in found if item.is_fabric and item.port != chosen.port):
        said.append("both ports have a link: one cable gives the full bandwidth, a second one adds nothing")
    if chosen.mtu < 9000:
        said.append(f"{chosen.name} has an MTU of {chosen.mtu}: 9000 on all of them is faster")
    return said


def between(hosts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What does not go together among the chosen interfaces of a group's hosts, in sentences. Of each host {interface,
    mtu, speed, address: with prefix}."""
    said = []
    for key, unit in (("mtu", ""), ("speed", " Mbit/s")):
        values: dict[Any, list[str]] = {}
        for host, item in hosts.items():
            values.setdefault(item[key], []).append(host)
        if len(values) > 1:
            words = "; ".join(f"{value}{unit} on {', '.join(names)}" for value, names in values.items())
            said.append(f"the hosts have different {'MTUs' if key == 'mtu' else 'speeds'}: {words}")
    networks: dict[str, list[str]] = {}
    taken: dict[str, str] = {}
    for host, item in hosts.items():
        own = ipaddress.IPv4Interface(item["address"])
        networks.setdefault(str(own.network), []).append(host)
        other = taken.setdefault(str(own.ip), host)
        if other != host:
            said.append(f"{other} and {host} have the same address {own.ip}")
    if len(networks) > 1:
        words = "; ".join(f"{network}: {', '.join(names)}" for network, names in networks.items())
        said.append(f"the hosts are in different networks: {words}")
    return said


def described(found: Sequence[Interface]) -> list[str]:
    """A line for each interface of a ConnectX: port, name, link, RDMA device, addresses."""
    lines = []
    for port, own in ports(found).items():
        for item in own:
            link = f"{item.speed / 1000:g} Gbit/s" if item.speed else "up" if item.link else "no link"
            device = f"{item.rdma} ({'active' if item.rdma_active else 'down'})" if item.rdma else "no RDMA device"
            gid = f", GID {item.gid}" if item.gid is not None else ""
            where = ", ".join(item.addresses) or "no address"
            lines.append(f"port {port}  {item.name}  {link}, MTU {item.mtu}, {device}{gid}, {where}")
    return lines


def summary(outputs: Mapping[str, str]) -> dict[str, Any]:
    """All of it as plain data: {interfaces: [fields of `Interface`], error: "" or why nothing is known}."""
    try:
        return {"interfaces": [dataclasses.asdict(item) for item in interfaces(outputs)], "error": ""}
    except (BoundsError, ValueError) as error:
        return {"interfaces": [], "error": str(error)}


def known(data: Mapping[str, Any]) -> list[Interface]:
    """The interfaces of a `summary`."""
    return [Interface(**{**item, "addresses": tuple(item["addresses"])}) for item in data.get("interfaces", ())]
