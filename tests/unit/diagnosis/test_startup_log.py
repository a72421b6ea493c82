"""Phases of a start, from logs of the engines that Sparkfleet meets.

data/vllm-0.32-cpu.log is a real start of the simulator's engine. data/vllm-0.10.1.1-gpu.log is put together from the
messages of that version as public issues show them.
"""

from __future__ import annotations

import pytest

from sparkfleet.diagnosis.startup_log import Tracker, plain, split_stamp
from tests.unit import DATA


def read(name: str) -> list[str]:
    # Not splitlines(): a progress bar's carriage returns stay within a line, as in Docker's log.
    return (DATA / name).read_bytes().decode().removesuffix("\n").split("\n")


def reported(tracker: Tracker, lines: list[str]) -> list[str]:
    return [str(step) for number, line in enumerate(lines) for step in tracker.feed([line], float(number))]


def test_start_on_a_gpu() -> None:
    tracker = Tracker(0.0)
    assert reported(tracker, read("vllm-0.10.1.1-gpu.log")) == [
        "starting, vLLM 0.10.1.1",
        "loading weights",
        "downloading",
        "downloading, done, 239.1 s",
        "loading weights, shard 0/2",
        "loading weights, shard 1/2",
        "loading weights, shard 2/2",
        "loading weights, done, 70.40 s",
        "loading weights, done, 8.49 GiB",
        "compiling",
        "compiling, transform done, 5.70 s",
        "compiling",
        "compiling, graph done, 11.62 s",
        "compiling, done, 17.32 s",
        "profiling memory, KV cache 66.25 GiB",
        "profiling memory, KV cache 66.25 GiB, 542,720 tokens",
        "profiling memory, KV cache 66.25 GiB, 542,720 tokens, 16.56 requests of 32,768",
        "capturing graphs",
        "capturing graphs, mixed 19/19",
        "capturing graphs, done, 0.52 GiB",
        "starting server",
    ]
    assert tracker.kv == {"gib": 66.25, "tokens": 542720, "max_concurrency": 16.56, "context": 32768}
    assert tracker.weights_gib == pytest.approx(8.4911)


def test_start_on_a_cpu_has_no_graphs() -> None:
    tracker = Tracker(0.0)
    assert reported(tracker, read("vllm-0.32-cpu.log")) == [
        "starting, vLLM 0.32.0",
        "loading weights",
        "loading weights, shard 0/2",
        "loading weights, shard 1/2",
        "loading weights, shard 2/2",
        "loading weights, done, 0.32 s",
        "profiling memory, KV cache 1.00 GiB",
        "profiling memory, KV cache 1.00 GiB, 46,592 tokens, 1.42 requests of 32,768",
        "starting server",
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("(EngineCore pid=7) INFO 06-02 00:51:40 [model_runner.py:295] Model loading took 7.64 GiB and 32.96 seconds",
         "loading weights, done, 7.64 GiB"),
        ("(Worker_TP0 pid=9) INFO 09-29 09:51:34 [backends.py:164] Directly load the compiled graph(s) for dynamic "
         "shape from the cache, took 4.495 s", "compiling, from the cache, 4.495 s"),
        ("(EngineCore pid=7) INFO 10-01 10:00:00 [monitor.py:62] torch.compile took 17.00 s in total",
         "compiling, done, 17.00 s"),
        ("(EngineCore pid=7) INFO 10-01 10:00:00 [monitor.py:40] Starting torch.compile", "compiling"),
        ("Loading fastsafetensors checkpoint shards:  20% Completed | 1/5 [00:00<00:02,  1.77it/s]",
         "loading weights, shard 1/5"),
        ("Multi-thread loading shards:  50% Completed | 2/4 [00:00<00:02,  1.77it/s]", "loading weights, shard 2/4"),
        ("Capturing CUDA graphs (decode, FULL): 100%|██████████| 35/35 [00:01<00:00, 33.86it/s]",
         "capturing graphs, decode 35/35"),
        ("Capturing CUDA graphs: 100%|██████████| 67/67 [00:14<00:00,  4.71it/s]", "capturing graphs, 67/67"),
        ("Fetching 4 files:  25%|██▌       | 1/4 [00:10<00:30]", "downloading, file 1/4"),
        ("model-00001-of-00002.safetensors:  43%|████▎     | 2.13G/4.98G [00:30<00:40, 80MB/s]",
         "downloading, 2.13G of 4.98GB"),
    ],
)  # fmt: skip
def test_single_messages(line: str, expected: str) -> None:
    assert [str(step) for step in Tracker(0.0).feed([line], 1.0)] == [expected]


def test_one_step_a_phase_and_poll() -> None:
    shards = [f"Loading safetensors checkpoint shards: 9% Completed | {k}/9 [00:00<?]" for k in range(5)]
    assert [str(step) for step in Tracker(0.0).feed(shards, 1.0)] == ["loading weights, shard 4/9"]


def test_files_that_are_there_are_no_download() -> None:
    tracker = Tracker(0.0)
    lines = [
        "Using model weights format ['*.safetensors']",
        "Loading safetensors checkpoint shards: 0% | 0/2 [00:00<?]",
    ]
    assert [str(step) for step in tracker.feed(lines, 1.0)] == ["loading weights, shard 0/2"]
    assert [phase["phase"] for phase in tracker.phases(9.0)] == ["starting", "loading weights"]


def test_what_is_known_already_is_not_told_again() -> None:
    tracker = Tracker(0.0)
    line = "Loading safetensors checkpoint shards: 50% Completed | 1/2 [00:00<?]"
    assert tracker.feed([line], 1.0)
    assert tracker.feed([line, "INFO 11-23 15:24:07 [model.py:733] a message of a later version"], 2.0) == []


def test_durations_follow_docker_time_stamps() -> None:
    tracker = Tracker(1000.0)
    tracker.feed(
        [
            "1970-01-01T00:16:50.500000000Z Starting to load model x...",
            "1970-01-01T00:17:20.000000000Z Starting torch.compile",
            "1970-01-01T00:17:50.000000000Z INFO:     Application startup complete.",
        ],
        5000.0,
    )
    tracker.ready(5000.0)
    assert tracker.phases(5000.0) == [
        {"phase": "starting", "seconds": 10.5},
        {"phase": "loading weights", "seconds": 29.5},
        {"phase": "compiling", "seconds": 30.0},
        {"phase": "starting server", "seconds": 0.0},
    ]


def test_no_phase_is_negative_when_clocks_differ() -> None:
    tracker = Tracker(2000.0)
    tracker.feed(["Starting to load model x..."], 1000.0)
    assert all(phase["seconds"] >= 0 for phase in tracker.phases(1500.0))


def test_plain_takes_prefixes_colours_and_overwritten_bars_away() -> None:
    assert plain("(EngineCore_DP0 pid=559) (Worker_TP0 pid=566) ERROR 10-24 09:51:22 [core.py:7] ValueError: x") == (
        "ERROR",
        "ValueError: x",
    )
    assert plain("\x1b[1;36m(APIServer pid=1)\x1b[0;0m INFO 10-24 09:51:22 [core.py:7] hello") == ("INFO", "hello")
    assert plain("0%\r50%\r100%\r") == ("", "100%")


def test_split_stamp() -> None:
    assert split_stamp("1970-01-01T00:00:01.250000000Z a b") == (1.25, "a b")
    assert split_stamp("a b") == (None, "a b")
