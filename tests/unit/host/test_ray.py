"""Two hosts that form a real Ray cluster, with the commands that their compose files have.

A host is a network, process and mount namespace with an address of its own, joined to the other by a pair of virtual
interfaces. In place of vLLM a program asks Ray for a task on each node: vLLM's CPU build refuses Ray ("does not support
ray", vllm/v1/executor/ray_utils.py), so an engine itself is not tested here.

Needs root and Ray: SPARKFLEET_RAY names a virtual environment that has it (`pip install ray`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sparkfleet_host import rank

from sparkfleet.packaging import host_program
from sparkfleet.planning import compose
from sparkfleet.planning.nodes import Nodes
from sparkfleet.planning.target import Settings, Target

BIN = Path(os.environ.get("SPARKFLEET_RAY") or sys.prefix) / "bin"
ADDRESSES = ("10.213.77.1", "10.213.77.2")
KEY = "the-key-of-the-engine"
#: What stands in for `vllm serve`: a task on each node, each of which needs a GPU, as vLLM's workers do.
ENGINE = """#!{python}
import json, sys, time, ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
assert sys.argv[1] == "serve", sys.argv
ray.init(log_to_driver=False, logging_level="ERROR")
@ray.remote(num_cpus=0, num_gpus=1)
def where(): return ray.util.get_node_ip_address()
nodes = [node for node in ray.nodes() if node["Alive"]]
places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
tasks = [where.options(scheduling_strategy=place).remote() for place in places]
print("ran " + json.dumps(sorted(ray.get(tasks, timeout=60))), flush=True)
time.sleep(600)
"""
#: Asks a cluster for its nodes without its token.
STRANGER = "import ray; ray.init(address='{address}', log_to_driver=False); print('joined', len(ray.nodes()))"


def missing() -> str:
    """Why this cannot run here; "" if it can."""
    if not (BIN / "ray").exists():
        return "Ray is not installed: SPARKFLEET_RAY names a virtual environment that has it"
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    trial = subprocess.run(["unshare", "--net", "--pid", "--fork", "ip", "link"], capture_output=True, check=False)
    return "" if trial.returncode == 0 else "network namespaces are not allowed here"


pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "it can run")


class Pair:
    """Two hosts, and what runs on them."""

    def __init__(self, root: Path, key: str) -> None:
        self.root, self.key = root, key
        self.names = [f"sfray{os.getpid()}{letter}" for letter in "ab"]
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.program = host_program.build(root)
        (root / "bin").mkdir()
        engine = root / "bin" / "vllm"
        engine.write_text(ENGINE.format(python=BIN / "python3"))
        engine.chmod(engine.stat().st_mode | stat.S_IXUSR)

    def up(self) -> None:
        """Make the network."""
        first, second = self.names
        for name in self.names:
            run("ip", "netns", "add", name)
        run("ip", "link", "add", "fabric0", "netns", first, "type", "veth", "peer", "name", "fabric0", "netns", second)
        for name, address in zip(self.names, ADDRESSES, strict=True):
            run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "fabric0")
            for interface in ("lo", "fabric0"):
                run("ip", "-n", name, "link", "set", interface, "up")

    def down(self) -> None:
        """End everything; the processes of a host end with its first one, as those of a container."""
        for process in self.processes.values():
            process.kill()
            process.wait()
        for name in self.names:
            run("ip", "netns", "del", name)

    def command(self, number: int) -> list[str]:
        """The command of a rank's container."""
        nodes = Nodes("pair", number, ("spark-1", "spark-2"), ADDRESSES)
        given: dict[str, Any] = {"model": "qwen3-8b-fp8", "image": "nvcr.io/nvidia/vllm:25.09-py3"}
        target = Target.of(Settings(spans=nodes, **given))
        words = [compose.plain(word) for word in target.document()["services"][target.engines[0].service]["command"]]
        assert words[1] == compose.PROGRAM_IN_CONTAINER
        return [words[0], f"/mnt/{self.program.name}", *words[2:]]

    def start(self, number: int, *options: str) -> None:
        """Start a rank; `options` come before its command."""
        words = self.command(number)
        place = words.index("--")
        self.run_at(number, f"rank{number}", [*words[:place], *options, *words[place:]])

    def run_at(self, number: int, name: str, words: list[str], key: bool = True) -> None:
        """Run something on a host, in a process namespace of its own, with an empty /tmp; the root is at /mnt."""
        environment = {"PATH": f"/mnt/bin:{BIN}:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/mnt"}
        if key and self.key:
            environment["VLLM_API_KEY"] = self.key
        inside = ["unshare", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
        # Ray keeps sockets in /tmp, whose paths must be short.
        inside += [
            "sh",
            "-c",
            'mount --bind "$0" /mnt && mount -t tmpfs none /tmp && exec "$@"',
            str(self.root),
            *words,
        ]
        with (self.root / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                ["ip", "netns", "exec", self.names[number], *inside], env=environment, stdout=log, stderr=log
            )

    def said(self, name: str) -> str:
        return (self.root / f"{name}.log").read_text(errors="replace")

    def until(self, condition: Callable[[], object], seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, {name: self.said(name)[-3000:] for name in self.processes}
            time.sleep(0.2)

    def pids(self, number: int) -> list[int]:
        """The processes of a host."""
        return [int(word) for word in run("ip", "netns", "pids", self.names[number]).split()]

    def pid(self, number: int, pattern: str) -> int:
        """The process whose command line has a pattern."""
        for pid in self.pids(number):
            with contextlib.suppress(OSError):
                if re.search(pattern, Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()):
                    return pid
        raise AssertionError(f"no process {pattern}")

    def listening(self, number: int) -> dict[int, str]:
        """Ports that something listens on, with its address."""
        lines = run("ip", "netns", "exec", self.names[number], "ss", "-Hltn").splitlines()
        return {int(line.split()[3].rpartition(":")[2]): line.split()[3].rpartition(":")[0] for line in lines}


def run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    return done.stdout


def shared() -> set[str]:
    """Shared memory of the machine that is Ray's."""
    return {path.name for path in Path("/dev/shm").iterdir() if re.search("plasma|ray|sem\\.", path.name)}


def left() -> list[bytes]:
    """Command lines of processes that have an address of the hosts."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            found.append((process / "cmdline").read_bytes())
    return [line for line in found if any(address.encode() in line for address in ADDRESSES)]


@pytest.fixture
def pair(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Pair]:
    before = shared()
    made = Pair(tmp_path, getattr(request, "param", ""))
    try:
        made.up()
        yield made
    finally:
        made.down()
    made.until(lambda: shared() == before and not left(), 20)


@pytest.mark.parametrize("pair", [KEY], indirect=True)
def test_two_hosts_form_a_cluster_and_each_computes(pair: Pair) -> None:
    pair.start(1)
    pair.until(lambda: "rank 1 waits for rank 0" in pair.said("rank1"))
    pair.start(0)
    pair.until(lambda: "ran [" in pair.said("rank0"))
    assert "2 nodes are alive; starting the engine" in pair.said("rank0")
    assert json.loads(pair.said("rank0").partition("ran ")[2].splitlines()[0]) == sorted(ADDRESSES)
    assert "Usage stats collection is disabled" in pair.said("rank0")
    # Nothing but the documented ports, and no dashboard.
    for number in (0, 1):
        ports = pair.listening(number)
        assert rank.NODE in ports and not [port for port in ports if not rank.GCS <= port <= rank.LAST_WORKER], ports
    assert rank.MEET not in pair.listening(0)  # who starts later belongs to another start
    # Who does not have the engine's key cannot use the cluster.
    stranger = [str(BIN / "python3"), "-c", STRANGER.format(address=f"{ADDRESSES[0]}:{rank.GCS}")]
    pair.run_at(1, "stranger", stranger, key=False)
    assert pair.processes["stranger"].wait(120) != 0
    assert "joined" not in pair.said("stranger") and "ConnectionError" in pair.said("stranger")
    # A rank that ends takes its Ray with it.
    os.kill(pair.pid(0, r"^python3 /mnt/sparkfleet"), signal.SIGTERM)
    assert pair.processes["rank0"].wait(60) == 0
    pair.until(lambda: not pair.pids(0), 20)
    os.kill(pair.pid(1, r"^python3 /mnt/sparkfleet"), signal.SIGKILL)
    pair.processes["rank1"].wait(60)
    pair.until(lambda: not pair.pids(1), 20)


def test_a_host_that_is_missing_is_named(pair: Pair) -> None:
    pair.start(0, "--join-seconds", "5")
    assert pair.processes["rank0"].wait(180) == 1
    said = pair.said("rank0")
    assert f"rank 1 ({ADDRESSES[1]}) has not joined the Ray cluster of {ADDRESSES[0]} within 5 s" in said
    assert "ran [" not in said and not pair.pids(0)


def test_rank_0_ends_when_its_ray_does(pair: Pair) -> None:
    pair.start(1)
    pair.until(lambda: "rank 1 waits for rank 0" in pair.said("rank1"))
    pair.start(0)
    pair.until(lambda: "ran [" in pair.said("rank0"))
    os.kill(pair.pid(0, "raylet/raylet"), signal.SIGKILL)
    assert pair.processes["rank0"].wait(60) == 1
    assert "Ray of rank 0 ended" in pair.said("rank0") and not pair.pids(0)
