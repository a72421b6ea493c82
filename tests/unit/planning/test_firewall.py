"""The firewall: its rules as the kernel takes them, before a destination that is rewritten as Docker does it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

from sparkfleet import SparkfleetError
from sparkfleet.planning import firewall

NFT = shutil.which("nft", path="/usr/sbin:/usr/bin")
CLIENT, STRANGER, SPARK, OTHER = "192.0.2.5", "192.0.2.6", "192.0.2.1", "192.0.2.2"
#: What Docker does for `-p 8000:8000`.
DOCKER = """
table ip nat {
    chain before {
        type nat hook prerouting priority -100
        fib daddr type local tcp dport 8000 dnat to 172.31.0.2
    }
}
"""
SERVER = """
import socket, sys, threading
for port in map(int, sys.argv[1:]):
    listener = socket.create_server(("", port))
    serve = lambda listener=listener: [one.close() for one, _ in iter(listener.accept, 0)]
    threading.Thread(target=serve, daemon=True).start()
print("ready", flush=True)
sys.stdin.read()
"""
ASK = """
import socket, sys
try:
    socket.create_connection((sys.argv[2], int(sys.argv[3])), 0.7, (sys.argv[1], 0)).close()
except TimeoutError:
    sys.exit("dropped")
"""


def test_networks_are_few_and_in_order() -> None:
    given = ["192.0.2.9", "127.0.1.1", "10.1.2.3", "10.0.0.0/8", "fe80::1%eth0", "fd00::5", "::1", "192.0.2.9"]
    assert [str(item) for item in firewall.networks(given)] == ["10.0.0.0/8", "192.0.2.9/32", "fd00::5/128"]


@pytest.mark.parametrize("wrong", ["spark-1", "192.0.2.7/24", 8000, "", "192.0.2.0/33"])
def test_what_is_no_source_is_refused_by_its_place(wrong: object) -> None:
    with pytest.raises(SparkfleetError, match=r"sparkfleet_firewall_allow: entry 2, .* is neither an address nor"):
        firewall.allowed(["192.0.2.0/24", wrong])


def test_ssh_is_not_closed() -> None:
    firewall.check_ports({"sparkfleet_port": 8000}, 22)
    with pytest.raises(SparkfleetError, match="sparkfleet_guard_port: 2222 is the port of SSH"):
        firewall.check_ports({"sparkfleet_port": 8000, "sparkfleet_guard_port": 2222}, 2222)


def test_a_table_is_recognised_by_what_is_in_it() -> None:
    some = firewall.networks([CLIENT])
    one, other = firewall.rules([8000], some, 9110, []), firewall.rules([8000], [], 9110, [])
    assert len(firewall.mark(one)) == 64 and firewall.mark(one) != firewall.mark(other)
    assert firewall.rules([9109, 8000], [], 9110, []) == firewall.rules([8000, 9109, 8000], [], 9110, [])


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


@pytest.fixture(scope="module")
def net() -> Iterator[str]:
    """A Spark with a container behind it, and others on its network, as namespaces; the prefix of their names."""
    if NFT is None or shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("root, nft and ip are needed")
    name = f"sf{os.getpid()}"
    spark, lan, box = (f"{name}{end}" for end in ("spark", "lan", "box"))
    servers: list[subprocess.Popen[str]] = []
    with contextlib.ExitStack() as stack:
        for space in (spark, lan, box):
            ip("netns", "add", space)
            stack.callback(subprocess.run, ["ip", "netns", "delete", space], check=False)
            ip("-n", space, "link", "set", "lo", "up")
        ip("link", "add", "eth0", "netns", spark, "type", "veth", "peer", "name", "eth0", "netns", lan)
        ip("link", "add", "port", "netns", spark, "type", "veth", "peer", "name", "eth0", "netns", box)
        ip("-n", spark, "link", "add", "br-test", "type", "bridge")
        ip("-n", spark, "link", "set", "port", "master", "br-test", "up")
        for space, link, *addresses in (
            (spark, "eth0", SPARK),
            (spark, "br-test", "172.31.0.1"),
            (box, "eth0", "172.31.0.2"),
            (lan, "eth0", CLIENT, STRANGER, OTHER),
        ):
            ip("-n", space, "link", "set", link, "up")
            for address in addresses:
                ip("-n", space, "address", "add", f"{address}/24", "dev", link)
        ip("-n", box, "route", "add", "default", "via", "172.31.0.1")
        ip("-n", lan, "route", "add", "172.31.0.0/24", "via", SPARK)
        forward = ["ip", "netns", "exec", spark, "sysctl", "-qw", "net.ipv4.ip_forward=1"]
        subprocess.run(forward, check=True, capture_output=True, timeout=20)
        load(spark, DOCKER)
        for space, *ports in ((spark, "22", "9109", "9110"), (box, "8000", "9000")):
            argv = ["ip", "netns", "exec", space, sys.executable, "-c", SERVER, *ports]
            servers.append(subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            stack.callback(servers[-1].kill)
            assert servers[-1].stdout and servers[-1].stdout.readline() == "ready\n"
        yield name


def load(space: str, text: str) -> None:
    argv = ["ip", "netns", "exec", space, str(NFT), "-f", "-"]
    done = subprocess.run(argv, input=text, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, done.stderr


def reached(net: str, space: str, source: str, address: str, port: int) -> bool:
    argv = ["ip", "netns", "exec", net + space, sys.executable, "-c", ASK, source, address, str(port)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0 or done.stderr == "dropped\n", done.stderr
    return done.returncode == 0


def test_our_ports_are_open_to_named_sources_alone(net: str) -> None:
    ways = [(SPARK, 8000), (SPARK, 9109), ("172.31.0.2", 8000), (SPARK, 9110), (SPARK, 22), ("172.31.0.2", 9000)]

    def seen(source: str) -> list[bool]:
        return [reached(net, "lan", source, address, port) for address, port in ways]

    assert seen(STRANGER) == [True] * 6
    clients, sparks = firewall.networks([CLIENT]), firewall.networks([OTHER])
    for _ in range(2):  # it replaces itself
        load(f"{net}spark", firewall.rules([8000, 9109], clients, 9110, sparks))
    assert seen(CLIENT) == [True, True, True, False, True, True]
    assert seen(STRANGER) == [False, False, False, False, True, True]
    assert seen(OTHER) == [False, False, False, True, True, True]
    # The Spark itself is always let in, its containers are not.
    assert reached(net, "spark", SPARK, SPARK, 9109) and reached(net, "spark", "127.0.0.1", "127.0.0.1", 9109)
    assert not reached(net, "box", "172.31.0.2", SPARK, 9109) and reached(net, "box", "172.31.0.2", SPARK, 22)
    load(f"{net}spark", "delete table inet sparkfleet")
    assert seen(STRANGER) == [True] * 6
