# SPDX-License-Identifier: Apache-2.0
"""The first process of a rank's container where vLLM runs over Ray: it forms the cluster, and ends with it.

    python3 /sparkfleet_host.pyz rank --rank 0 --nodes 192.168.100.10,192.168.100.11 -- vllm serve ...

It runs on the image's Python, and imports nothing but the standard library and the image's Ray. All ranks have the
same command but for their number. A release keeps its command, so options may be added here, not changed.

    worker  waits for rank 0 → ray start --address=... --block
    rank 0  ray start --head --block → lets workers join → all ranks alive? → vllm serve

The container ends when Ray, or on rank 0 the engine, ends: whoever watches the container sees that the rank has ended.
What is left of Ray ends with the container.

Workers start before rank 0, perhaps while the rank 0 of the previous start still runs. Ray would let them join that
one. So a worker first asks how long rank 0 has been running, and only joins one that is younger than itself.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

MEET, GCS, OBJECTS, NODE, METRICS, ENVIRONMENTS, AGENT, AGENT_GRPC = range(29502, 29510)
FIRST_WORKER, LAST_WORKER = 29510, 29609
OBJECT_STORE = 512 << 20  # bytes; by default 30% of the memory, of which vLLM uses next to nothing
HEAD_SECONDS = 600.0  # that a worker waits for rank 0, which starts when all workers run
RAY_SECONDS = 120.0  # for Ray on rank 0 to start
JOIN_SECONDS = 180.0  # from then until all ranks are alive
STOP_SECONDS = 2.0  # for Ray to end by itself
ASK_SECONDS = 3.0
PAUSE = 0.5


def began() -> float:
    """When this process was started, seconds since the boot. The first process of a container keeps its time while an
    entry point turns into it, which on a host without page cache takes seconds."""
    text = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace")
    return int(text.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")


BEGAN = began()


def age() -> float:
    """How long this process has been running, seconds."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - BEGAN


class RankError(Exception):
    """The rank cannot run; the message says why."""


def say(text: str) -> None:
    """Write a line to the container's log."""
    print(f"sparkfleet: {text}", file=sys.stderr, flush=True)


def ray_command(rank: int, nodes: Sequence[str]) -> list[str]:
    """The command that makes this host a node of the cluster."""
    words = ["ray", "start", "--block", "--node-ip-address", nodes[rank]]
    if rank:
        words += ["--address", f"{nodes[0]}:{GCS}"]
    else:
        words += ["--head", "--port", str(GCS), "--include-dashboard", "false"]
    ports = {
        "object-manager": OBJECTS,
        "node-manager": NODE,
        "metrics-export": METRICS,
        "runtime-env-agent": ENVIRONMENTS,
        "dashboard-agent-listen": AGENT,
        "dashboard-agent-grpc": AGENT_GRPC,
        "min-worker": FIRST_WORKER,
        "max-worker": LAST_WORKER,
    }
    for name, port in ports.items():
        words += [f"--{name}-port", str(port)]
    # One GPU a Spark. Ray starts an idle process for each CPU; vLLM's workers ask for none.
    return [*words, "--num-gpus", "1", "--num-cpus", "1", "--object-store-memory", str(OBJECT_STORE)]


def ray_environment() -> None:
    """Switch off what Ray sends home, and what kills workers where memory is scarce, which on a Spark it always is. Of
    an engine with a key Ray demands a token, so that not everyone on the network can run code in it; versions of Ray
    that know no tokens ignore it."""
    if key := os.environ.get("VLLM_API_KEY"):
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", hashlib.sha256(f"ray {key}".encode()).hexdigest())
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")


def wrong(nodes: Sequence[str], alive: Iterable[str]) -> str:
    """What is wrong with a cluster that has these nodes; "" if they are those of the ranks."""
    found = list(alive)
    missing = [f"rank {rank} ({node})" for rank, node in enumerate(nodes) if node not in found]
    if missing:
        return f"{', '.join(missing)} {'has' if len(missing) == 1 else 'have'} not joined the Ray cluster of {nodes[0]}"
    strange = sorted({node for node in found if node not in nodes or found.count(node) > 1})
    if strange:
        return f"the Ray cluster of {nodes[0]} has nodes that are not its ranks: {', '.join(strange)}"
    return ""


def check(nodes: Sequence[str], seconds: float) -> int:
    """Wait until the nodes of the cluster are those of the ranks: 0 if they are. It needs a process of its own, which
    connects to Ray."""
    ray = importlib.import_module("ray")
    ray.init(address=f"{nodes[0]}:{GCS}", log_to_driver=False, logging_level="ERROR")
    deadline = time.monotonic() + seconds
    while True:
        problem = wrong(nodes, (node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]))
        if not problem:
            return 0
        if time.monotonic() > deadline:
            say(f"{problem} within {seconds:.0f} s")
            return 1
        time.sleep(PAUSE)


# -- how workers and rank 0 meet -------------------------------------------------------------------------------------


def tell_age(server: socket.socket) -> None:
    """Tell everyone who connects how long this process has been running, until the socket is closed."""
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        with connection, contextlib.suppress(OSError):
            connection.settimeout(ASK_SECONDS)
            connection.sendall(f"{age():.3f}\n".encode())


def ask_age(address: str) -> float | None:
    """How long rank 0 has been running, seconds; None where it does not say."""
    try:
        with socket.create_connection((address, MEET), ASK_SECONDS) as connection:
            connection.settimeout(ASK_SECONDS)
            return float(connection.makefile("rb").readline(32))
    except (OSError, ValueError):
        return None


def await_head(address: str, seconds: float) -> None:
    """Until a rank 0 that is younger than this process can be joined. Raises RankError."""
    while True:
        theirs, own = ask_age(address), age()
        if theirs is not None and theirs < own:
            return
        if own > seconds:
            raise RankError(f"rank 0 ({address}) could not be joined within {seconds:.0f} s")
        time.sleep(PAUSE)


def listens(address: str, port: int) -> bool:
    """Whether something accepts connections there."""
    with contextlib.suppress(OSError), socket.create_connection((address, port), ASK_SECONDS):
        return True
    return False


# -- the processes ---------------------------------------------------------------------------------------------------


class Rank:
    """A rank's processes: Ray, and on rank 0 the engine."""

    def __init__(self, rank: int, nodes: Sequence[str], serve: Sequence[str]) -> None:
        self.rank, self.nodes, self.serve = rank, nodes, serve
        self.ray: subprocess.Popen[bytes] | None = None
        self.engine: subprocess.Popen[bytes] | None = None
        self.stopping = False

    def run(self, head_seconds: float, join_seconds: float) -> int:
        """Run until Ray or the engine ends; the exit code. Raises RankError."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.stop)
        if shutil.which("ray") is None:
            raise RankError("the image has no Ray: set sparkfleet_executor to native, or use an image that has it")
        ray_environment()
        try:
            if self.rank:
                say(f"rank {self.rank} waits for rank 0 ({self.nodes[0]})")
                await_head(self.nodes[0], head_seconds)
            self.ray = subprocess.Popen(ray_command(self.rank, self.nodes))
            if self.rank == 0:
                self.form(join_seconds)
                address = {"RAY_ADDRESS": f"{self.nodes[0]}:{GCS}"}
                self.engine = subprocess.Popen(self.serve, env={**os.environ, **address})
            return self.wait()
        finally:
            self.end()

    def form(self, seconds: float) -> None:
        """Until Ray runs here and all workers have joined. Raises RankError."""
        assert self.ray is not None
        deadline = time.monotonic() + RAY_SECONDS
        while not listens(self.nodes[0], GCS):
            if self.ray.poll() is not None or time.monotonic() > deadline:
                raise RankError(f"Ray did not start on rank 0 ({self.nodes[0]}:{GCS})")
            time.sleep(PAUSE)
        with socket.create_server((self.nodes[0], MEET)) as server:
            threading.Thread(target=tell_age, args=(server,), daemon=True).start()
            own = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv[1:])]  # up to the program's file
            words = ["rank", "--rank", "0", "--nodes", ",".join(self.nodes), "--check", f"{seconds:g}"]
            if subprocess.run([*own, *words], check=False).returncode != 0:
                raise RankError("the engine is not started")
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)  # closing it would not wake the thread
        say(f"{len(self.nodes)} nodes are alive; starting the engine")

    def stop(self, *_: object) -> None:
        """Handle SIGTERM: the engine ends first, and all the rest with this process."""
        self.stopping = True
        if self.engine is None:
            raise SystemExit(0)
        self.engine.terminate()

    def wait(self) -> int:
        """Until the engine, or Ray, has ended; the exit code. As the first process of a container it has the orphans of
        all others as children."""
        assert self.ray is not None
        while True:
            pid, status = os.wait()
            code = os.waitstatus_to_exitcode(status)
            for name, process in (("Ray", self.ray), ("the engine", self.engine)):
                if process is not None and pid == process.pid:
                    process.returncode = code
                    if self.stopping:
                        return 0
                    say(f"{name} of rank {self.rank} ended with status {code}")
                    return (code if code > 0 else 128 - code) if process is self.engine else 1

    def end(self) -> None:
        """End what is left."""
        for process in (self.engine, self.ray):
            if process is not None and process.poll() is None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_SECONDS)


def main(argv: Sequence[str] | None = None) -> int:
    """`rank --rank R --nodes A,B -- COMMAND`: run a rank; with `--check SECONDS` whether all are alive."""
    argv = list(sys.argv[1:] if argv is None else argv)
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(prog="sparkfleet_host rank", description="Run a rank over Ray.")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--nodes", type=lambda text: text.split(","), required=True)
    parser.add_argument("--check", type=float)
    parser.add_argument("--head-seconds", type=float, default=HEAD_SECONDS)
    parser.add_argument("--join-seconds", type=float, default=JOIN_SECONDS)
    options = parser.parse_args(argv[:split])
    if options.check is not None:
        return check(options.nodes, options.check)
    try:
        return Rank(options.rank, options.nodes, argv[split + 1 :]).run(options.head_seconds, options.join_seconds)
    except RankError as error:
        say(str(error))
        return 1
