#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""The network between Sparks, as one of them sees it."""

from __future__ import annotations

DOCUMENTATION = r"""
module: spark_fabric
short_description: Shows the ConnectX ports of a host, checks and measures the way to others
version_added: 0.2.0
description:
  - Finds the ConnectX interfaces of a host, both of each port, with link, speed, MTU, RDMA device, GID index and
    addresses. Changes nothing.
  - With O(peers) it also sends them packets that fill the MTU and must not be fragmented, and measures the bandwidth to
    each one if O(bandwidth) is true, over TCP with C(iperf3) and over RDMA with C(ib_write_bw), where both have it.
options:
  address: {description: "The host's own address on that network, with or without prefix.", type: str, default: ""}
  management: {description: Accept another network than that of ConnectX ports., type: bool, default: false}
  peers: {description: Addresses of the other hosts., type: list, elements: str, default: []}
  hosts:
    description: The action's; names of the hosts of the group, by rank, which are then O(peers).
    type: list
    elements: str
    default: []
  serve:
    description:
      - Wait for the measurements of others for so many seconds, with C(iperf3) on O(address), and with C(ib_write_bw)
        on its RDMA device. The latter's handshake (TCP 18515) is on all addresses.
    type: int
    default: 0
  bandwidth: {description: Measure with C(iperf3) and C(ib_write_bw)., type: bool, default: false}
  seconds: {description: "Duration of a measurement, the same on both sides.", type: int, default: 3}
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Changes nothing.}
  diff_mode: {support: none, description: There is nothing to show.}
"""

EXAMPLES = r"""
- name: Show the ports, and whether the other Spark is reached
  sparkfleet.dgx.spark_fabric:
    address: 192.168.100.10
    peers: [192.168.100.11]
"""

RETURN = r"""
lines: {description: A line for each ConnectX interface., returned: success, type: list, elements: str}
interfaces: {description: All interfaces with a device or an address., returned: success, type: list, elements: dict}
chosen: {description: "Of O(address); interface, mtu, speed and address with prefix.", returned: success, type: dict}
problems: {description: What is wrong., returned: success, type: list, elements: str}
advice: {description: What makes it slower than it could be., returned: success, type: list, elements: str}
reached: {description: "Of each of O(peers) an empty text, or why not.", returned: success, type: dict}
gbit_s: {description: Of each of O(peers) the bandwidth over TCP that was measured., returned: success, type: dict}
rdma_gbit_s:
  description: The same over RDMA; of one RDMA device, of which each port has two that share its bandwidth.
  returned: success
  type: dict
"""

import math
import shutil
import subprocess
import threading
import time
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import fabric
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.bounded import (
    BoundsError,
    as_dict,
    as_number,
    parse_json,
    printable,
)

HEADERS = 28  # of IPv4 and ICMP
PINGS = 3
PORT = "5201"
RDMA_PORT = "18515"
RDMA_TRIES = 3  # the other side listens again only when its last measurement has ended
PAUSE = 1.0  # seconds


def reach(own: str, peer: str, mtu: int) -> str:
    """Whether packets of the whole MTU come back: "" for yes, or why not."""
    size = max(mtu - HEADERS, 56)
    argv = ["ping", "-n", "-q", "-c", str(PINGS), "-i", "0.2", "-W", "2", "-M", "do", "-s", str(size), "-I", own, peer]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, errors="replace", timeout=20, check=False)
    except FileNotFoundError:
        return "ping is not installed: install iputils-ping"
    except (OSError, subprocess.SubprocessError) as error:
        return f"ping: {printable(str(error), 200)}"
    if done.returncode == 0:
        return ""
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "loss" in line or "error" in line.lower()]
    return f"{peer} does not answer packets of {mtu} bytes: {printable(lines[0] if lines else 'no answer', 200)}"


def measure(own: str, peer: str, seconds: int) -> float | None:
    """Gbit/s to a peer that serves; None where it cannot be measured."""
    argv = [
        "iperf3",
        "--client",
        peer,
        "--bind",
        own,
        "--port",
        PORT,
        "--time",
        str(seconds),
        "--parallel",
        "4",
        "--json",
    ]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=seconds + 20, check=False)
        data = as_dict(parse_json(done.stdout, "iperf3", 1 << 20), "iperf3")
        end = as_dict(as_dict(data.get("end"), "end").get("sum_received"), "sum_received")
        return round(float(as_number(end.get("bits_per_second"), "bits_per_second")) / 1e9, 2)
    except (OSError, subprocess.SubprocessError, BoundsError):
        return None


def by_rdma(item: fabric.Interface | None) -> bool:
    """Whether a host can measure over RDMA at an interface."""
    return bool(item and item.rdma_active and item.gid is not None and shutil.which("ib_write_bw"))


def rdma_command(item: fabric.Interface, seconds: int) -> list[str]:
    """`ib_write_bw` on an interface's device; it prints the average alone, in Gbit/s."""
    device = ["--ib-dev", item.rdma, "--gid-index", str(item.gid), "--port", RDMA_PORT]
    return ["ib_write_bw", *device, "--CPU-freq", "--duration", str(seconds), "--report_gbits", "--output", "bandwidth"]


def measure_rdma(item: fabric.Interface, peer: str, seconds: int) -> float | None:
    """Gbit/s that are written into the memory of a peer that serves; None where it cannot be measured."""
    for left in reversed(range(RDMA_TRIES)):
        try:
            argv = [*rdma_command(item, seconds), peer]
            done = subprocess.run(argv, capture_output=True, text=True, timeout=seconds + 20, check=False)
            if done.returncode == 0 and math.isfinite(rate := float(done.stdout[-4096:].split()[-1])):
                return round(rate, 2)
        except (OSError, subprocess.SubprocessError):
            return None
        except (ValueError, IndexError):
            pass
        if left:
            time.sleep(PAUSE)
    return None


def serve(own: str, item: fabric.Interface | None, seconds: int, measured: int) -> list[str]:
    """Listen for measurements of so many seconds with what there is; ends by itself. Returns the programs."""
    ways = {}
    if shutil.which("iperf3"):
        ways["iperf3"] = ["iperf3", "--server", "--bind", own, "--port", PORT]
    if item and by_rdma(item):
        ways["ib_write_bw"] = rdma_command(item, measured)
    threads = [threading.Thread(target=listen, args=(argv, seconds)) for argv in ways.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(ways)


def listen(argv: list[str], seconds: int) -> None:
    """Run a server again and again, as `ib_write_bw` ends with each measurement."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        try:
            subprocess.run(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=left, check=False)
        except (OSError, subprocess.SubprocessError):
            return
        time.sleep(min(PAUSE, max(end - time.monotonic(), 0)))


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "address": {"type": "str", "default": ""},
            "management": {"type": "bool", "default": False},
            "peers": {"type": "list", "elements": "str", "default": []},
            "serve": {"type": "int", "default": 0},
            "bandwidth": {"type": "bool", "default": False},
            "seconds": {"type": "int", "default": 3},
        },
        supports_check_mode=True,
    )
    params = module.params
    own = params["address"].partition("/")[0]
    summary = fabric.summary(fabric.collect())
    if summary["error"]:
        module.fail_json(msg=f"the network interfaces cannot be understood: {summary['error']}", failure="internal")
    found = fabric.known(summary)
    item = fabric.at(found, own) if own else None
    if params["serve"]:
        module.exit_json(changed=False, served=serve(own, item, params["serve"], params["seconds"]))
    chosen: dict[str, Any] = {}
    if item:
        with_prefix = next(one for one in item.addresses if one.partition("/")[0] == own)
        chosen = {"interface": item.name, "mtu": item.mtu, "speed": item.speed, "address": with_prefix}
    reached = {peer: reach(own, peer, item.mtu) for peer in params["peers"]} if item else {}
    there = [peer for peer, why in reached.items() if params["bandwidth"] and not why]
    seconds = params["seconds"]
    tcp = {peer: measure(own, peer, seconds) for peer in there if shutil.which("iperf3")}
    written = {peer: measure_rdma(item, peer, seconds) for peer in there if item and by_rdma(item)}
    module.exit_json(
        changed=False,
        lines=fabric.described(found),
        interfaces=summary["interfaces"],
        chosen=chosen,
        problems=fabric.problems(found, own, params["management"]) if own else [],
        advice=fabric.advice(found, own) if own else [],
        reached=reached,
        gbit_s={peer: value for peer, value in tcp.items() if value is not None},
        rdma_gbit_s={peer: value for peer, value in written.items() if value is not None},
    )


if __name__ == "__main__":
    main()
