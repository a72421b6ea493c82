"""The network between Sparks, from what the commands print on hosts that are wired in different ways."""

from __future__ import annotations

import json
from typing import Any

import pytest
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import bounded, fabric

#: Interface, PCI address and RDMA device, as a DGX Spark has them: two ports, two interfaces each.
CARD = (
    ("enp1s0f0np0", "0000:01:00.0", "rocep1s0f0"),
    ("enp1s0f1np1", "0000:01:00.1", "rocep1s0f1"),
    ("enP2p1s0f0np0", "0002:01:00.0", "roceP2p1s0f0"),
    ("enP2p1s0f1np1", "0002:01:00.1", "roceP2p1s0f1"),
)
MANAGEMENT = "enP7s7"
#: What ethtool prints of a port with a cable, and of one without (Ubuntu 24.04, mlx5_core; shortened).
ETHTOOL_UP = """Settings for {name}:
\tSupported ports: [ FIBRE ]
\tSupported link modes:   1000baseKX/Full
\t                        200000baseCR4/Full
\tSpeed: {speed}Mb/s
\tDuplex: Full
\tAuto-negotiation: on
\tPort: Direct Attach Copper
\tLink detected: yes
"""
ETHTOOL_DOWN = """Settings for {name}:
\tSupported ports: [ FIBRE ]
\tSpeed: Unknown!
\tDuplex: Unknown! (255)
\tPort: None
\tLink detected: no
"""
ETHTOOL_I = """driver: {driver}
version: 6.17.0-1008-nvidia
firmware-version: 28.45.4028 (NVD0000000087)
expansion-rom-version:
bus-info: {pci}
supports-statistics: yes
"""


def address_of(name: str, mtu: int, up: bool, addresses: list[str], link_type: str = "ether") -> dict[str, Any]:
    """An entry of `ip -j address show`."""
    carrier = ["UP", "LOWER_UP"] if up else ["NO-CARRIER", "UP"]
    return {
        **{"ifindex": 3, "ifname": name, "flags": ["BROADCAST", "MULTICAST", *carrier], "mtu": mtu, "qdisc": "mq"},
        **{"operstate": "UP" if up else "DOWN", "group": "default", "txqlen": 1000, "link_type": link_type},
        **{"address": "4c:bb:47:00:00:01", "broadcast": "ff:ff:ff:ff:ff:ff"},
        "addr_info": [
            {
                **{"family": "inet", "local": one.partition("/")[0], "prefixlen": int(one.partition("/")[2])},
                **{"scope": "global", "label": name, "valid_life_time": 4294967295},
            }
            for one in addresses
        ]
        + [{"family": "inet6", "local": "fe80::4ebb:47ff:fe00:1", "prefixlen": 64, "scope": "link"}],
    }


def wired(
    up: tuple[int, ...],
    addresses: dict[str, str],
    speed: int = 200000,
    mtus: dict[str, int] | None = None,
    card: bool = True,
    rdma_json: bool = True,
) -> dict[str, str]:
    """Outputs of a host with cables in these ports."""
    cards = CARD if card else ()
    links = {name: int(pci[-1]) in up for name, pci, _ in cards}
    entries = [
        address_of("lo", 65536, True, ["127.0.0.1/8"], "loopback"),
        address_of(MANAGEMENT, 1500, True, ["192.0.2.11/24"]),
        *(
            address_of(name, (mtus or {}).get(name, 9000), links[name], [addresses[name]] if name in addresses else [])
            for name, _, _ in cards
        ),
        address_of("docker0", 1500, False, ["172.17.0.1/16"]),
    ]
    outputs = {
        fabric.ADDRESSES: json.dumps(entries),
        fabric.ROUTES: json.dumps([{"dst": "default", "gateway": "192.0.2.1", "dev": MANAGEMENT, "protocol": "dhcp"}]),
        f"ethtool -i {MANAGEMENT}": ETHTOOL_I.format(driver="r8127", pci="0007:01:00.0"),
        f"ethtool {MANAGEMENT}": ETHTOOL_UP.format(name=MANAGEMENT, speed=10000),
    }
    for name, pci, device in cards:
        outputs[f"ethtool -i {name}"] = ETHTOOL_I.format(driver="mlx5_core", pci=pci)
        outputs[f"ethtool {name}"] = (ETHTOOL_UP if links[name] else ETHTOOL_DOWN).format(name=name, speed=speed)
        if name in addresses:
            ip = ".".join(addresses[name].partition("/")[0].split("."))
            words = "{:02x}{:02x}:{:02x}{:02x}".format(*map(int, ip.split(".")))
            outputs[f"gids {device}"] = "\n".join(
                [
                    f"0\tIB/RoCE v1\t{name}\tfe80:0000:0000:0000:4ebb:47ff:fe00:0001",
                    f"1\tRoCE v2\t{name}\tfe80:0000:0000:0000:4ebb:47ff:fe00:0001",
                    f"2\tIB/RoCE v1\t{name}\t0000:0000:0000:0000:0000:ffff:{words}",
                    f"3\tRoCE v2\t{name}\t0000:0000:0000:0000:0000:ffff:{words}",
                ]
            )
    if card:
        outputs[fabric.IBDEV2NETDEV] = "".join(
            f"{device} port 1 ==> {name} ({'Up' if links[name] else 'Down'})\n" for name, _, device in cards
        )
    if card and rdma_json:
        outputs[fabric.RDMA] = json.dumps(
            [
                {
                    **{"ifindex": number, "ifname": device, "port": 1, "state": "ACTIVE" if links[name] else "DOWN"},
                    "physical_state": "LINK_UP" if links[name] else "DISABLED",
                    **{"netdev": name, "netdev_index": number + 3},
                }
                for number, (name, _, device) in enumerate(cards)
            ]
        )
    return outputs


OWN = {"enp1s0f0np0": "192.168.100.10/24", "enP2p1s0f0np0": "192.168.101.10/24"}
ADDRESS = "192.168.100.10"


def seen(outputs: dict[str, str]) -> list[fabric.Interface]:
    return fabric.interfaces(outputs)


def test_no_card() -> None:
    found = seen(wired((), {}, card=False))
    assert fabric.ports(found) == {} and fabric.described(found) == []
    assert fabric.problems(found, "192.0.2.11") == [
        "no ConnectX device was found: `lspci -d 15b3:` lists them, the driver is mlx5_core"
    ]
    assert fabric.problems(found, "192.0.2.11", management=True) == []


@pytest.mark.parametrize("rdma_json", [True, False])
def test_one_cable(rdma_json: bool) -> None:
    """Both interfaces of the port have a link; NCCL is given the RDMA devices of both."""
    found = seen(wired((0,), OWN, rdma_json=rdma_json))
    assert {port: [item.name for item in own] for port, own in fabric.ports(found).items()} == {
        "0": ["enp1s0f0np0", "enP2p1s0f0np0"],
        "1": ["enp1s0f1np1", "enP2p1s0f1np1"],
    }
    chosen = fabric.at(found, ADDRESS)
    assert chosen and (chosen.name, chosen.speed, chosen.gid) == ("enp1s0f0np0", 200000, 3)
    assert fabric.rdma(found, chosen) == ["rocep1s0f0", "roceP2p1s0f0"]
    assert fabric.problems(found, ADDRESS) == [] == fabric.advice(found, ADDRESS)
    assert fabric.described(found)[0] == (
        "port 0  enp1s0f0np0  200 Gbit/s, MTU 9000, rocep1s0f0 (active), GID 3, 192.168.100.10/24"
    )
    assert fabric.described(found)[2].startswith("port 1  enp1s0f1np1  no link, MTU 9000, rocep1s0f1 (down)")


def test_two_cables() -> None:
    found = seen(wired((0, 1), OWN))
    chosen = fabric.at(found, ADDRESS)
    assert chosen and fabric.rdma(found, chosen) == ["rocep1s0f0", "roceP2p1s0f0"]
    assert fabric.problems(found, ADDRESS) == []
    assert fabric.advice(found, ADDRESS) == [
        "both ports have a link: one cable gives the full bandwidth, a second one adds nothing"
    ]


def test_the_cable_is_in_the_other_port() -> None:
    found = seen(wired((1,), OWN))
    assert fabric.problems(found, ADDRESS) == [
        "192.168.100.10 is on enp1s0f0np0, which has no link; enp1s0f1np1 and enP2p1s0f1np1 have a link: move the "
        "cable, or the address"
    ]


def test_a_switch_that_negotiates_half_the_speed() -> None:
    found = seen(wired((0,), OWN, speed=100000))
    assert fabric.problems(found, ADDRESS) == []
    assert [line.partition(",")[0] for line in fabric.advice(found, ADDRESS)] == [
        "enp1s0f0np0 runs at 100 Gbit/s",
        "enP2p1s0f0np0 runs at 100 Gbit/s",
    ]
    hosts = {f"spark-{n}": {"mtu": 9000, "speed": 100000, "address": f"192.168.100.{n}/24"} for n in (1, 2, 3, 4)}
    assert fabric.between(hosts) == []


def test_mixed_mtus() -> None:
    found = seen(wired((0,), OWN, mtus={"enp1s0f0np0": 1500}))
    assert fabric.problems(found, ADDRESS) == [
        "the two interfaces of a port have MTUs of 1500 and 9000: give them the same"
    ]
    hosts = {
        "spark-1": {"mtu": 9000, "speed": 200000, "address": "192.168.100.10/24"},
        "spark-2": {"mtu": 1500, "speed": 200000, "address": "192.168.100.11/24"},
    }
    assert fabric.between(hosts) == ["the hosts have different MTUs: 9000 on spark-1; 1500 on spark-2"]


def test_the_management_network_is_refused_unless_it_is_wanted() -> None:
    found = seen(wired((0,), {}))
    said = fabric.problems(found, "192.0.2.11")
    assert len(said) == 2 and "not of a ConnectX" in said[0] and "default route" in said[1]
    assert fabric.problems(found, "192.0.2.11", management=True) == []


def test_an_address_that_no_interface_has() -> None:
    (said,) = fabric.problems(seen(wired((0,), OWN)), "192.168.100.99")
    assert said.startswith("no interface has the address 192.168.100.99; of the ConnectX interfaces enp1s0f0np0 and")


def test_a_second_interface_without_a_network_of_its_own() -> None:
    found = seen(wired((0,), {"enp1s0f0np0": "192.168.100.10/24"}))
    assert fabric.advice(found, ADDRESS) == [
        "enP2p1s0f0np0 has no address, so RDMA uses half of the port: give it one of a network of its own"
    ]
    found = seen(wired((0,), {"enp1s0f0np0": "192.168.100.10/24", "enP2p1s0f0np0": "192.168.100.12/24"}))
    assert fabric.advice(found, ADDRESS) == [
        "enP2p1s0f0np0 is in the same network as enp1s0f0np0, so one of them idles: give it its own"
    ]


def test_hosts_in_different_networks_and_with_one_address() -> None:
    hosts = {
        "spark-1": {"mtu": 9000, "speed": 200000, "address": "192.168.100.10/24"},
        "spark-2": {"mtu": 9000, "speed": 200000, "address": "192.168.101.10/24"},
        "spark-3": {"mtu": 9000, "speed": 200000, "address": "192.168.100.10/24"},
    }
    assert fabric.between(hosts) == [
        "spark-1 and spark-3 have the same address 192.168.100.10",
        "the hosts are in different networks: 192.168.100.0/24: spark-1, spark-3; 192.168.101.0/24: spark-2",
    ]


@pytest.mark.parametrize("text", ["{", "{}", "[1]", '[{"ifname": 7}]', '[{"ifname": "x", "addr_info": 1}]'])
def test_output_that_is_none(text: str) -> None:
    with pytest.raises(bounded.BoundsError):
        fabric.interfaces({fabric.ADDRESSES: text})
    assert fabric.summary({fabric.ADDRESSES: text})["error"]


def test_a_summary_is_plain_data_and_comes_back() -> None:
    outputs = wired((0,), OWN)
    again = json.loads(json.dumps(fabric.summary(outputs)))
    assert fabric.known(again) == seen(outputs)


def test_what_this_machine_has_can_be_read() -> None:
    fabric.interfaces(fabric.collect())
