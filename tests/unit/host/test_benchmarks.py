"""What a benchmark finds on a host before it measures: the current engines, and whether others use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import benchmarks, sensors
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.bench import BenchError
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.docker import Docker
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.releases import Store

from tests.unit.fakes import fake_release
from tests.unit.fakes.fake_engine import Engine, deployed_engines, docker, engine
from tests.unit.fakes.fake_vllm import Vllm, vllm

__all__ = ["docker", "engine", "vllm"]  # fixtures

FIRST, SECOND = "vllm-first", "vllm-second"
PLANNED = {"decode_tok_s_limit": 25.0, "measured_tok_s": 20.5, "kv_cache_tokens": 500_000}


class Host:
    """Two engines of one release; the second has no container."""

    def __init__(self, folder: Path, engine: Engine, vllm: Vllm, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine, self.vllm = engine, vllm
        port = int(vllm.url.rpartition(":")[2])
        first = fake_release.an_engine(FIRST, port, memory=PLANNED, revision="c" * 40)
        self.store: Store = deployed_engines(folder, first, fake_release.an_engine(SECOND, port + 1))
        self.command = ["serve", "org/first", "--max-num-seqs", "48"]
        self.state: dict[str, Any] = {"Running": True, "StartedAt": "2026-11-29T09:00:00Z"}
        item = {"Id": "c1", "State": "running", "Created": 5, "Labels": {}}
        item["Labels"] = {"com.docker.compose.project": "sparkfleet", "com.docker.compose.service": FIRST}
        engine.routes["GET", "/containers/json"] = [item]
        engine.routes["GET", "/containers/c1/json"] = self.inspected
        monkeypatch.setattr(benchmarks, "LOOK", 0.3)
        monkeypatch.setattr(sensors, "SMI", ("false",))

    def inspected(self, handler: Any) -> None:
        handler.answer(200, {"Id": "c1", "State": self.state, "Config": {"Cmd": self.command, "Tty": False}})


@pytest.fixture
def host(tmp_path: Path, engine: Engine, vllm: Vllm, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, engine, vllm, monkeypatch)


def test_an_engine_that_serves(host: Host, docker: Docker) -> None:
    found = benchmarks.look(host.store, docker, "first")
    (one,) = found["engines"]
    assert found["release"] == 1 and (one["service"], one["revision"]) == (FIRST, "c" * 40)
    assert (one["limit_tok_s"], one["published_tok_s"], one["kv_tokens"]) == (25.0, 20.5, 500_000)
    assert (one["max_num_seqs"], one["max_model_len"], one["busy"], one["reads"]) == (48, None, 0, False)
    assert benchmarks.same(docker, FIRST, "c1", one["started_at"])
    assert not benchmarks.same(docker, FIRST, "c2", one["started_at"])
    host.state["StartedAt"] = "2026-11-29T09:30:00Z"
    assert not benchmarks.same(docker, FIRST, "c1", one["started_at"])


@pytest.mark.parametrize(
    ("command", "count"),
    [
        (["serve", "--max-num-seqs=12"], 12),
        (["serve", "--max-num-seqs"], None),
        (["serve", "--max-num-seqs", "many"], None),
        (["serve"], None),
        (None, None),
    ],
)
def test_the_size_of_the_batch(host: Host, docker: Docker, command: Any, count: int | None) -> None:
    host.command = command
    assert benchmarks.look(host.store, docker, "first")["engines"][0]["max_num_seqs"] == count


def test_requests_of_others_are_seen(host: Host, docker: Docker) -> None:
    # Two label sets, of which the second has five.
    host.vllm.names = "vllm:{}"
    host.vllm.counters["num_requests_running"] = 2.0
    assert benchmarks.look(host.store, docker, "first")["engines"][0]["busy"] == 7


def test_what_cannot_be_measured_is_said(host: Host, docker: Docker, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="release 1 does not serve third: it serves first, second"):
        benchmarks.look(host.store, docker, "third")
    with pytest.raises(BenchError, match=r"vllm-second does not serve \(missing\)"):
        benchmarks.look(host.store, docker)
    host.vllm.faults.add("sick")
    with pytest.raises(BenchError, match=r"vllm-first does not serve \(running\)"):
        benchmarks.look(host.store, docker, "first")
    with pytest.raises(BenchError, match="nothing is deployed here"):
        benchmarks.look(Store(tmp_path / "none", tmp_path / "none"), docker)
