"""The first process of a rank over Ray: what it starts, whom it waits for, and when it ends. Ray is a stand-in here;
the real one is in test_ray.py."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sparkfleet_host import rank

from tests.unit import ROOT

_hosts = itertools.count(1)
#: Listens where rank 0's Ray does, until it is ended or a file is there.
RAY = """#!{python}
import os, pathlib, socket, sys, time
with open({log!r}, "a") as log:
    log.write(" ".join([os.environ["RAY_USAGE_STATS_ENABLED"], *sys.argv[1:]]) + chr(10))
address = sys.argv[sys.argv.index("--node-ip-address") + 1]
with socket.create_server((address, 29503 if "--head" in sys.argv else 29510)):
    while not pathlib.Path({over!r}).exists():
        time.sleep(0.1)
sys.exit(7)
"""
#: What the check imports: the nodes are those that a file lists.
MODULE = """import pathlib
def init(**given): pathlib.Path({log!r}).open("a").write(f"init {{given['address']}}" + chr(10))
def nodes():
    listed = pathlib.Path({nodes!r})
    return [{{"NodeManagerAddress": a, "Alive": True}} for a in (listed.read_text().split() if listed.exists() else ())]
"""


@pytest.fixture
def nodes() -> list[str]:
    """Addresses that no other test has."""
    number = next(_hosts)
    return [f"127.{100 + os.getpid() % 100}.{number}.{host}" for host in (1, 2, 3)]


class World:
    """A folder with a program `ray`, a module `ray` and an engine."""

    def __init__(self, root: Path, nodes: Sequence[str]) -> None:
        self.root, self.nodes, self.log = root, nodes, root / "log"
        self.alive, self.started, self.over = root / "nodes", root / "engine", root / "over"
        self.ray()
        (root / "ray.py").write_text(MODULE.format(log=str(self.log), nodes=str(self.alive)))
        self.processes: list[subprocess.Popen[str]] = []

    def ray(self) -> None:
        path = self.root / "bin" / "ray"
        path.parent.mkdir(exist_ok=True)
        path.write_text(RAY.format(python=sys.executable, log=str(self.log), over=str(self.over)))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def start(
        self, number: int, engine: str = "import time; time.sleep(60)", join: float = 60, head: float = 60
    ) -> int:
        code = (
            f"import os, pathlib; pathlib.Path({str(self.started)!r}).write_text(os.environ['RAY_ADDRESS']); {engine}"
        )
        words = ["-m", "sparkfleet_host", "rank", "--rank", str(number), "--nodes", ",".join(self.nodes)]
        words += ["--join-seconds", str(join), "--head-seconds", str(head), "--", sys.executable, "-c", code]
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
            "PATH": f"{self.root / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": f"{self.root}:{ROOT / 'plugins' / 'module_utils'}",
        }
        process = subprocess.Popen(
            [sys.executable, *words], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        self.processes.append(process)
        return len(self.processes) - 1

    def ended(self, index: int, seconds: float = 90) -> tuple[int, str]:
        """Exit code and what was said."""
        said = self.processes[index].communicate(timeout=seconds)[1]
        return self.processes[index].returncode, said

    def until(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def said(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def world(tmp_path: Path, nodes: list[str]) -> Iterator[World]:
    made = World(tmp_path, nodes)
    yield made
    for process in made.processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.stderr:
            process.stderr.close()


def test_what_makes_a_host_a_node() -> None:
    nodes = ["10.0.0.1", "10.0.0.2"]
    head, worker = (rank.ray_command(number, nodes) for number in (0, 1))
    assert head[:7] == ["ray", "start", "--block", "--node-ip-address", "10.0.0.1", "--head", "--port"]
    assert worker[3:7] == ["--node-ip-address", "10.0.0.2", "--address", "10.0.0.1:29503"]
    assert head[head.index("--include-dashboard") + 1] == "false" and "--include-dashboard" not in worker
    ports = [int(value) for word, value in itertools.pairwise(worker) if word.endswith("-port")]
    assert len(ports) == len(set(ports)) == 8 and all(29502 < port <= 29609 for port in ports)


@given(st.lists(st.sampled_from(["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.9"]), max_size=6))
def test_a_cluster_is_right_with_each_rank_once_and_no_other(alive: list[str]) -> None:
    nodes = ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
    said = rank.wrong(nodes, alive)
    assert (said == "") == (sorted(alive) == nodes)
    for number, node in enumerate(nodes):
        assert (f"rank {number} ({node})" in said) == (node not in alive)


def test_a_key_of_the_engine_is_one_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "VLLM_API_KEY"):
        monkeypatch.setenv(name, "")  # so that the end of the test puts them back
        monkeypatch.delenv(name)
    rank.ray_environment()
    assert "RAY_AUTH_TOKEN" not in os.environ and os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    monkeypatch.setenv("VLLM_API_KEY", "secret-of-the-engine")
    rank.ray_environment()
    token = os.environ["RAY_AUTH_TOKEN"]
    assert os.environ["RAY_AUTH_MODE"] == "token" and len(token) == 64 and "secret" not in token


def served(address: str, *answers: bytes) -> socket.socket:
    """A server that gives these answers, the last one again and again."""
    server = socket.create_server((address, rank.MEET))

    def serve() -> None:
        for answer in itertools.chain(answers, itertools.repeat(answers[-1])):
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connection.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    return server


def test_a_worker_does_not_join_a_rank_0_that_was_there_before_it(
    nodes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank, "PAUSE", 0.01)
    monkeypatch.setattr(rank, "BEGAN", time.clock_gettime(time.CLOCK_BOOTTIME) - 5)
    with served(nodes[0], b"900.0\n", b"no number\n", b"", b"nan\n", b"\xff\n", b"1" * 100, b"4.5\n") as server:
        rank.await_head(nodes[0], 10)
        server.shutdown(socket.SHUT_RDWR)
    with served(nodes[0], b"60.0\n") as server, pytest.raises(rank.RankError, match=r"rank 0 \(127\..* within 5 s"):
        rank.await_head(nodes[0], 5.2)
    with pytest.raises(rank.RankError):
        rank.await_head(nodes[1], 5)


def test_the_age_that_rank_0_tells(nodes: list[str]) -> None:
    with socket.create_server((nodes[0], rank.MEET)) as server:
        thread = threading.Thread(target=rank.tell_age, args=(server,), daemon=True)
        thread.start()
        first, second = rank.ask_age(nodes[0]), rank.ask_age(nodes[0])
        assert first is not None and second is not None
        assert 0 <= first <= second <= rank.age() + 0.001
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)
        assert not thread.is_alive()


def test_the_engine_starts_once_all_ranks_are_alive(world: World) -> None:
    world.start(1)
    world.start(2)
    time.sleep(0.3)
    assert not world.said()  # they wait for rank 0
    head = world.start(0, "raise SystemExit(3)")
    world.until(lambda: len([line for line in world.said() if " --address " in line]) == 2)
    assert not world.started.exists()
    world.alive.write_text(" ".join(world.nodes))
    code, said = world.ended(head)
    assert world.started.read_text() == f"{world.nodes[0]}:29503"
    assert code == 3 and "3 nodes are alive" in said and "the engine of rank 0 ended with status 3" in said
    assert world.said()[0].startswith("0 start --block") and f"init {world.nodes[0]}:29503" in world.said()


def test_a_rank_that_is_missing_is_named_and_no_engine_is_started(world: World) -> None:
    world.alive.write_text(f"{world.nodes[0]} {world.nodes[2]}")
    code, said = world.ended(world.start(0, join=0.5))
    assert code == 1 and f"rank 1 ({world.nodes[1]}) has not joined the Ray cluster of {world.nodes[0]}" in said
    assert not world.started.exists()


def test_a_stranger_in_the_cluster_keeps_the_engine_from_starting(world: World) -> None:
    world.alive.write_text(" ".join([*world.nodes, "10.9.9.9"]))
    code, said = world.ended(world.start(0, join=0.5))
    assert code == 1 and "has nodes that are not its ranks: 10.9.9.9" in said and not world.started.exists()


def test_the_rank_ends_with_its_ray(world: World) -> None:
    world.alive.write_text(" ".join(world.nodes))
    head = world.start(0)
    world.until(world.started.exists)
    world.over.touch()
    code, said = world.ended(head)
    assert code == 1 and "Ray of rank 0 ended with status 7" in said


def test_ray_that_does_not_start(world: World) -> None:
    (world.root / "bin" / "ray").write_text("#!/bin/sh\nexit 4\n")
    code, said = world.ended(world.start(0))
    assert code == 1 and f"Ray did not start on rank 0 ({world.nodes[0]}:29503)" in said


def test_an_image_without_ray(world: World) -> None:
    (world.root / "bin" / "ray").unlink()
    code, said = world.ended(world.start(1))
    assert code == 1 and "the image has no Ray: set sparkfleet_executor to native" in said


def test_sigterm_ends_the_engine_first(world: World) -> None:
    world.alive.write_text(" ".join(world.nodes))
    note = world.root / "note"
    engine = (
        "import signal, sys, time\n"
        f"def end(*_): pathlib.Path({str(note)!r}).write_text('ended'); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        f"pathlib.Path({str(note)!r}).write_text('ready')\n"
        "time.sleep(60)"
    )
    head = world.start(0, engine.replace("import signal", "\nimport signal", 1))
    world.until(lambda: note.exists() and note.read_text() == "ready")
    world.processes[head].terminate()
    code, _ = world.ended(head)
    assert code == 0 and note.read_text() == "ended"


@pytest.mark.parametrize("number", [0, 1])
def test_sigterm_before_there_is_an_engine(world: World, number: int) -> None:
    index = world.start(number, join=30, head=30)
    world.until(lambda: bool(world.said()) if number == 0 else True)
    time.sleep(0.5)
    world.processes[index].terminate()
    assert world.ended(index, 60)[0] == 0
