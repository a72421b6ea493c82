"""The speed of an engine: by its own benchmark in its container, or by requests of ours."""

from __future__ import annotations

import dataclasses
import itertools
import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import bench, http, sensors
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.bench import BenchError
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.docker import Docker, DockerError
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.release_format import Engine as Item
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.verify import answers
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.fakes.fake_engine import Engine, Handler, docker, engine
from tests.unit.fakes.fake_release import VERIFY
from tests.unit.fakes.fake_vllm import MODEL, Vllm, vllm

__all__ = ["docker", "engine", "vllm"]  # fixtures

COMMIT = "c" * 40
RESULT = {
    **{"completed": 3, "output_throughput": 2.712, "mean_tpot_ms": 357.0, "median_ttft_ms": 321.49, "duration": 70.8},
}


def item(port: int = 8000, revision: str = COMMIT) -> Item:
    return Item("vllm-m", "m", "throughput", MODEL, revision, "i", port, VERIFY, None)


def quiet(streams: int, rows: list[dict[str, Any]]) -> None:
    """Nobody follows."""


class Container:
    """Runs commands by their first words: {words: (exit code, output)}."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.ran = engine, []  # type: ignore[var-annotated]
        self.ends: dict[str, tuple[int, str]] = {"rm": (0, ""), "cat": (0, json.dumps(RESULT)), "vllm": (0, "done\n")}
        self.ends["stat"] = (1, "stat: cannot statx\n")
        self.slow = 0.0
        self.during: Callable[[], None] = lambda: None  # what happens while the benchmark runs
        self.environments: list[list[str]] = []
        engine.routes["POST", "/containers/c1/exec"] = self.make

    def make(self, handler: Handler) -> None:
        asked = json.loads(handler.body)
        assert asked["AttachStdout"] and not asked["Tty"]
        argv = asked["Cmd"]
        self.ran.append(argv)
        self.environments.append(asked.get("Env", []))
        code, output = self.ends["vllm" if argv[0] == "timeout" else argv[0]]
        name = f"e{len(self.ran)}"
        raw = output.encode()

        def start(handler: Handler) -> None:
            time.sleep(self.slow)
            if argv[0] == "timeout":
                self.during()
            # In two frames, as they come.
            parts = (raw[:5], raw[5:])
            handler.chunks(*(struct.pack(">BxxxL", 1, len(part)) + part for part in parts if part))

        self.engine.routes["POST", f"/exec/{name}/start"] = start
        self.engine.routes["GET", f"/exec/{name}/json"] = {"ExitCode": code, "Running": False}
        handler.answer(201, {"Id": name})


@pytest.fixture
def container(engine: Engine) -> Container:
    return Container(engine)


def test_the_engine_s_own_benchmark_is_asked(
    container: Container, docker: Docker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "STREAMS", (1,))
    rows, by = bench.bench(docker, "c1", item(), quiet)
    assert by == "vllm bench serve"
    assert rows == [
        {
            **{"streams": 1, "requests": 3, "tokens_per_second": 2.71, "stream_tokens_per_second": 2.8},
            **{"ttft_ms": 321.5, "seconds": 70.8},
        }
    ]
    argv = next(words for words in container.ran if words[0] == "timeout")
    assert argv[2:6] == ["600", "vllm", "bench", "serve"] and container.environments == [[], [], []]
    given = dict(itertools.pairwise(argv))
    assert given["--max-concurrency"] == "1" and given["--num-prompts"] == "3" and "--ignore-eos" in argv
    assert given["--tokenizer"] == f"/root/.cache/huggingface/models--{MODEL.replace('/', '--')}/snapshots/{COMMIT}"
    assert given["--percentile-metrics"] == "ttft,tpot,itl,e2el" and given["--metric-percentiles"] == "50,95,99"
    assert "--tokenizer" not in bench.command(item(revision="main"), bench.Load(4))


@pytest.mark.parametrize(
    ("result", "why"),
    [
        ("[]", "not an object"),
        ("{", "its result"),
        (json.dumps({**RESULT, "completed": 2}), "2 of 3 requests were answered"),
        (json.dumps({**RESULT, "output_throughput": "much"}), "output_throughput: not a number"),
        (json.dumps({**RESULT, "mean_tpot_ms": -1}), "mean_tpot_ms"),
        (json.dumps({**RESULT, "median_ttft_ms": None}), "median_ttft_ms"),
        (json.dumps({**RESULT, "more": "x" * (2 << 20)}), "its result"),
    ],
)
def test_a_result_of_another_form_is_none(result: str, why: str) -> None:
    with pytest.raises(BenchError, match=why):
        bench.understood(result, bench.Load(1))


def test_without_a_benchmark_requests_are_counted(
    container: Container, docker: Docker, vllm: Vllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "STREAMS", (1, 4))
    container.ends["vllm"] = (2, "usage: vllm [-h]\nvllm: error: argument subparser: invalid choice: 'bench'\n")
    vllm.answer = " ".join(["word"] * bench.OUTPUT)
    told: list[tuple[int, int]] = []
    rows, by = bench.bench(
        docker, "c1", item(int(vllm.url.rpartition(":")[2])), lambda streams, rows: told.append((streams, len(rows)))
    )
    assert told == [(1, 0), (1, 0), (4, 1)]
    assert by.startswith("streamed requests, since vllm bench serve did not work: exit code 2") and "invalid" in by
    assert [(row["streams"], row["requests"]) for row in rows] == [(1, 3), (4, 12)]
    # A token takes 5 ms there: at most 200 a second and stream.
    assert 20 < rows[0]["stream_tokens_per_second"] < 210 and rows[0]["ttft_ms"] > 0
    assert rows[1]["tokens_per_second"] > rows[0]["tokens_per_second"]
    asked = vllm.asked("/v1/completions")
    assert len(asked) == 1 + 3 + 1 + 12
    assert all(len(body["prompt"]) == bench.INPUT and body["ignore_eos"] for body in asked)


def test_answers_that_are_shorter_than_asked_for_are_no_measurement(
    container: Container, docker: Docker, vllm: Vllm
) -> None:
    container.ends["vllm"] = (1, "")
    vllm.answer = "too short"
    with pytest.raises(BenchError, match="2 tokens instead of 64"):
        bench.bench(docker, "c1", item(int(vllm.url.rpartition(":")[2])), quiet)
    vllm.faults.add("500")
    with pytest.raises(BenchError, match="HTTP 500"):
        bench.bench(docker, "c1", item(int(vllm.url.rpartition(":")[2])), quiet)


def test_a_benchmark_that_fails_later_is_a_failure(
    container: Container, docker: Docker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one measure alone all rows can be compared."""
    with pytest.raises(BenchError, match=r"vllm bench serve with 4 streams: 3 of 12"):
        bench.bench(docker, "c1", item(), quiet)


def test_a_command_in_a_container(container: Container, docker: Docker, engine: Engine) -> None:
    container.ends["ls"] = (3, "".join(f"line {number}\n" for number in range(500)))
    code, lines = docker.execute("c1", ["ls"], 5.0)
    assert code == 3 and len(lines) == 200 and lines[-1] == "line 499"
    with pytest.raises(DockerError, match="No such thing"):
        docker.execute("c2", ["ls"], 5.0)
    container.slow = 1.0
    with pytest.raises(DockerError, match=r"`ls -l` did not end within 0 s|in time"):
        docker.execute("c1", ["ls", "-l"], 0.2)
    engine.routes["POST", "/containers/c1/exec"] = {"Id": 5}
    with pytest.raises(DockerError, match="has no Id"):
        docker.execute("c1", ["ls"], 5.0)


def params(vllm: Vllm) -> dict[str, Any]:
    asked = {key: VERIFY[key] for key in ("question", "expect", "prompt", "prompt_expect", "max_tokens")}
    return {**asked, "url": vllm.url, "model": MODEL, "timeout": 5.0, "chat_template_kwargs": {}}


def test_dummy_weights_have_to_answer_and_not_to_be_right(vllm: Vllm) -> None:
    vllm.completion = " ".join(["noise"] * 16)
    found = answers(params(vllm))
    assert found["verified"] and [check["name"] for check in found["checks"]] == ["health", "models", "completion"]
    vllm.completion = "noise"
    found = answers(params(vllm))
    assert not found["verified"] and "1 tokens instead of 16" in found["msg"]
    vllm.served = ["org/other"]
    assert answers(params(vllm))["failure"] == "model-not-served"
    vllm.faults.add("sick")
    found = answers(params(vllm))
    assert found["failure"] == "endpoint-down" and len(found["checks"]) == 1


def test_an_engine_that_gives_vectors_is_measured_by_what_it_reads(
    docker: Docker, vllm: Vllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "STREAMS", (1, 4))
    monkeypatch.setattr(bench, "TEXT_ROUNDS", 2)
    told: list[int] = []
    engine = Item("vllm-m", "m", "throughput", MODEL, COMMIT, "i", 8000, {**VERIFY, "kinds": ["embeddings"]}, None)
    engine = dataclasses.replace(engine, port=int(vllm.url.rpartition(":")[2]))
    rows, by = bench.bench(docker, "c1", engine, lambda streams, _: told.append(streams))
    assert by == "requests for embeddings" and told == [1, 4]
    assert [(row["streams"], row["requests"]) for row in rows] == [(1, 2), (4, 8)]
    assert all(row["tokens_per_second"] > 0 and row["ttft_ms"] > 0 for row in rows)
    asked = vllm.asked("/v1/embeddings")
    assert len(asked) == 1 + 2 + 1 + 8 and all(len(body["input"]) == bench.INPUT for body in asked)
    vllm.faults.add("500")
    with pytest.raises(BenchError, match="HTTP 500"):
        bench.bench(docker, "c1", engine, quiet)


def test_dummy_weights_of_an_engine_that_gives_vectors(vllm: Vllm) -> None:
    found = answers({**params(vllm), "kinds": ["embeddings"]})
    assert found["verified"] and [check["name"] for check in found["checks"]] == ["health", "models", "embeddings"]
    assert vllm.asked("/v1/completions") == []


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    file = tmp_path / "key"
    file.write_text("the-engine-s-key\n")
    monkeypatch.setattr(http, "KEY_FILE", str(file))
    return "the-engine-s-key"


def test_the_key_is_in_no_argument(container: Container, docker: Docker, key: str) -> None:
    bench.by_vllm(docker, "c1", item(), bench.Load(1))
    assert container.environments == [[], [f"OPENAI_API_KEY={key}"], []]
    assert not [word for argv in container.ran for word in argv if key in word]


def test_one_that_hangs_ends_in_time(container: Container, docker: Docker) -> None:
    container.ends["vllm"] = (124, "")
    with pytest.raises(BenchError, match="it took more than 20 s"):
        bench.by_vllm(docker, "c1", item(), bench.Load(1, seconds=20.0))


FULL = {
    **RESULT,
    **{"p50_ttft_ms": 321.49, "p95_ttft_ms": 400.0, "p99_ttft_ms": 410.26, "mean_ttft_ms": 330.0},
    **{"p50_itl_ms": 80.123, "total_input_tokens": 384, "total_output_tokens": 192, "p95_e2el_ms": 6000.0},
}


def test_a_result_with_percentiles() -> None:
    row = bench.understood(json.dumps(FULL), bench.Load(1))
    assert row["ttft_p95_ms"] == 400.0 and row["ttft_p99_ms"] == 410.3 and row["itl_p50_ms"] == 80.12
    assert row["request_p95_ms"] == 6000.0 and row["seconds"] == 70.8
    assert (row["input_tokens"], row["output_tokens"]) == (384, 192) and "itl_p95_ms" not in row


class Counting:
    """An engine's counters that move once, when the benchmark has run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **moved: float) -> None:
        self.moved, self.asked = moved, 0
        monkeypatch.setattr(bench, "counters", self)
        monkeypatch.setattr(bench, "SETTLE", 0.2)

    def __call__(self, item: Item) -> dict[str, float]:
        self.asked += 1
        return {name: 100.0 + (value if self.asked > 1 else 0.0) for name, value in self.moved.items()}


def gpu(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    program = folder / "smi"
    program.write_text(f"#!/bin/sh\necho '{text}'\n")
    program.chmod(0o755)
    monkeypatch.setattr(sensors, "SMI", (str(program),))


def measured_once(docker: Docker, vllm: Vllm, load: bench.Load) -> dict[str, Any]:
    vllm.answer = " ".join(["word"] * load.output)
    row, by = bench.measure(docker, "c1", item(int(vllm.url.rpartition(":")[2])), load)
    assert by == "vllm bench serve"
    return row


def test_what_the_engine_counted_and_the_gpu_drew(
    container: Container, docker: Docker, vllm: Vllm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    container.ends["cat"] = (0, json.dumps(FULL))
    counted = {"generation_tokens": 192.0, "request_success": 3.0, "prompt_tokens": 384.0, "num_preemptions": 1.0}
    first = {"time_to_first_token_seconds_sum": 0.99, "time_to_first_token_seconds_count": 3.0}
    Counting(monkeypatch, **counted, **first)
    gpu(tmp_path, monkeypatch, "61, 40.0, 2000, 96, 0x0000000000000020")
    row = measured_once(docker, vllm, bench.Load(1))
    assert row["counted"] == {
        **{"requests": 3, "output_tokens": 192, "input_tokens": 384, "preemptions": 1, "ttft_mean_ms": 330.0}
    }
    assert row["power_w"] == 40.0 and row["temperature_c"] == 61.0 and row["throttled"] == ["sw-thermal-slowdown"]
    assert row["joules_per_token"] == pytest.approx(40 * 70.8 / 192, abs=1e-3) and not row["disturbed"]
    warm = vllm.asked("/v1/completions")
    assert len(warm) == 1 and len(warm[0]["prompt"]) == bench.INPUT  # which no counter of the row has


@pytest.mark.parametrize("said", [True, False])
def test_the_power_is_that_of_the_benchmark_s_own_seconds(
    container: Container, docker: Docker, vllm: Vllm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: bool
) -> None:
    """Its libraries take as long as it does; what comes after its result is left out where the container says when it
    was written."""
    container.ends["cat"] = (0, json.dumps({**FULL, "duration": 0.6, "total_output_tokens": 60}))
    Counting(monkeypatch)
    gpu(tmp_path, monkeypatch, "")
    monkeypatch.setattr(bench, "SENSE", 0.02)

    def phases() -> None:
        for power, seconds in ((10, 0.6), (100, 0.6), (10, 0.6 if said else 0.0)):
            reading = f"{power // 2}, {power}.0, 2000, 96, {'0x20' if power == 10 else '0x4'}"
            # Replaced as a whole: it may be read at any time.
            (tmp_path / "new").write_text(f"#!/bin/sh\necho '{reading}'\n", encoding="utf-8")
            (tmp_path / "new").chmod(0o755)
            (tmp_path / "new").replace(tmp_path / "smi")
            time.sleep(seconds)
            if power == 100 and said:
                container.ends["stat"] = (0, f"{time.time():.9f}\n")

    container.during = phases
    row = measured_once(docker, vllm, bench.Load(1))
    assert row["power_w"] == pytest.approx(100.0, abs=25.0) and row["temperature_c"] == 50.0
    assert row["joules_per_token"] == pytest.approx(1.0, abs=0.25) and "sw-power-cap" in row["throttled"]


def reading(power: float) -> list[str]:
    return ["50", f"{power:.1f}", "2000", "96", "0x0"]


def test_readings_of_another_time_say_nothing() -> None:
    made = {"seconds": 10.0, "output_tokens": 100}
    around = [(float(at), reading(100.0 if 90 < at <= 100 else 10.0)) for at in range(80, 111)]
    assert bench._drawn(around, made, 100.0)["joules_per_token"] == 10.0  # without the one at 90, a mean of what was
    assert bench._drawn(around, {**made, "seconds": 0.5}, 100.2)["power_w"] == 100.0
    nothing = bench._drawn(around[:3], made, 100.0)
    assert nothing["power_w"] is nothing["temperature_c"] is nothing["joules_per_token"] is None


@given(
    st.lists(st.tuples(st.floats(0, 100), st.floats(0, 500)), max_size=30),
    st.floats(0, 100),
    st.none() | st.floats(0, 50),
)
def test_the_power_is_one_that_was_read(read: list[tuple[float, float]], end: float, seconds: float | None) -> None:
    found = bench._drawn([(at, reading(power)) for at, power in read], {"seconds": seconds}, end)["power_w"]
    within = [power for at, power in read if end - (seconds or 1e9) <= at <= end]
    assert (found is None) == (not within)
    assert found is None or min(within) - 0.1 <= found <= max(within) + 0.1


@pytest.mark.parametrize(
    ("code", "text", "when"),
    [
        (0, "1700000000.250000000\n", 1700000000.25),
        (0, "", None),
        (0, "soon", None),
        (0, "nan", None),
        (0, "1e300", None),
        (1, "7", None),
    ],
)
def test_when_the_result_was_written(
    container: Container, docker: Docker, code: int, text: str, when: float | None
) -> None:
    container.ends["stat"] = (code, text)
    assert bench._end(docker, "c1") == when
    assert bench._end(docker, "c2") is None


@pytest.mark.parametrize(("tokens", "disturbed"), [(192.0, False), (256.0, False), (300.0, True)])
def test_tokens_of_others_are_said(
    container: Container,
    docker: Docker,
    vllm: Vllm,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tokens: float,
    disturbed: bool,
) -> None:
    """256: earlier versions ask once before they measure."""
    container.ends["cat"] = (0, json.dumps(FULL))
    Counting(monkeypatch, generation_tokens=tokens, request_success=4.0)
    gpu(tmp_path, monkeypatch, "[N/A], [N/A], [N/A], [N/A], [N/A]")
    row = measured_once(docker, vllm, bench.Load(1))
    assert row["disturbed"] is disturbed
    assert row["power_w"] is row["joules_per_token"] is row["temperature_c"] is None and row["throttled"] == []


@pytest.mark.parametrize("moved", [{"generation_tokens": 150.0}, {"generation_tokens": 192.0, "request_success": 2.0}])
def test_more_answers_than_the_engine_counted_are_no_measurement(
    container: Container,
    docker: Docker,
    vllm: Vllm,
    monkeypatch: pytest.MonkeyPatch,
    moved: dict[str, float],
) -> None:
    container.ends["cat"] = (0, json.dumps(FULL))
    Counting(monkeypatch, **moved)
    with pytest.raises(BenchError, match="were answered, and the engine counted"):
        measured_once(docker, vllm, bench.Load(1))


def test_requests_of_ours_count_as_the_engine_does(
    container: Container, docker: Docker, vllm: Vllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counters are the stand-in's own, at /metrics."""
    container.ends["vllm"] = (127, "exec: timeout: not found")
    vllm.answer = " ".join(["word"] * 8)
    load = bench.Load(2, input=16, output=8, rounds=2, seed=5)
    row, by = bench.measure(docker, "c1", item(int(vllm.url.rpartition(":")[2])), load)
    assert by.startswith("streamed requests, since vllm bench serve did not work: exit code 127")
    assert (row["requests"], row["output_tokens"], row["input_tokens"]) == (4, 32, 64)
    assert row["ttft_p50_ms"] <= row["ttft_p95_ms"] <= row["ttft_p99_ms"] and row["itl_p50_ms"] > 0
    prompts = [tuple(body["prompt"]) for body in vllm.asked("/v1/completions")]
    assert len(prompts) == len({*prompts}) == 5  # the first warms it up, and is not counted
    assert row["counted"]["requests"] == 4 and row["counted"]["output_tokens"] == 32 and not row["disturbed"]
    # Of a tool that measured before, another does not take the place.
    with pytest.raises(BenchError, match="exit code 127"):
        bench.measure(docker, "c1", item(int(vllm.url.rpartition(":")[2])), load, tool=bench.OWN)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40))
def test_percentiles_are_those_of_numpy(values: list[float]) -> None:
    ordered = sorted(values)
    assert bench.quantile(values, 0) == ordered[0] and bench.quantile(values, 100) == ordered[-1]
    assert ordered[0] <= bench.quantile(values, 50) <= bench.quantile(values, 95) <= ordered[-1]
    assert bench.quantile([1.0, 2.0, 3.0, 4.0], 95) == pytest.approx(3.85)  # numpy.percentile
