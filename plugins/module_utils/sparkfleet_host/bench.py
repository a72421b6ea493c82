# SPDX-License-Identifier: Apache-2.0
"""The speed of an engine that runs: tokens a second of so many streams, and the time to the first token.

The engine's own `vllm bench serve` asks, inside its container; where the image has none that works, requests are
streamed from here and counted by the engine's usage. Random tokens of a fixed seed, and every answer is as long as it
may be, so that dummy weights and real ones do the same work.

Of an engine that gives vectors in place of text, requests from here count the tokens that it reads; the time is that of
the whole answer.

`bench` is what a trial measures; `measure` one load of a benchmark, with what the engine itself counted meanwhile and
what the GPU drew.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from . import metrics, sensors
from .bounded import COMMIT, MIB, BoundsError, as_dict, as_int, as_number, as_time, parse_json, printable
from .cache import repo_folder
from .docker import Docker, DockerError
from .http import HttpError, engine_client
from .pooling import EMBEDDINGS
from .release_format import Engine
from .verify import embeds

Answer = TypeVar("Answer")

STREAMS = (1, 4, 16)
INPUT, OUTPUT = 128, 64  # tokens of a request
ROUNDS = 3  # requests of each stream
TEXT_ROUNDS = 20  # the same of texts that are read alone
SEED = 0
WARM = 1 << 40  # added to the seed of a request that is not counted
SECONDS = 600.0  # for one number of streams
PORT = 8000  # that the engine listens on in its container
CACHE = "/root/.cache/huggingface"  # the model cache there
RESULT = "/tmp/sparkfleet-bench.json"  # noqa: S108 - the container's
OWN = "vllm bench serve"
REQUESTS = "streamed requests"
TEXTS = "requests for embeddings"
LOWEST, HIGHEST = 100, 1000  # tokens that every vocabulary has
PERCENTILES = (50, 95, 99)
TIMED_OUT = 124  # exit code of timeout(1)
#: Fields of a row beyond those of `row`, of `vllm bench serve`'s result, digits.
_FURTHER = (
    *((f"ttft_p{share}_ms", f"p{share}_ttft_ms", 1) for share in PERCENTILES),
    *((f"itl_p{share}_ms", f"p{share}_itl_ms", 2) for share in PERCENTILES),
    *((f"request_p{share}_ms", f"p{share}_e2el_ms", 1) for share in PERCENTILES),
    *(("ttft_mean_ms", "mean_ttft_ms", 1), ("seconds", "duration", 3)),
    *(("input_tokens", "total_input_tokens", 0), ("output_tokens", "total_output_tokens", 0)),
)
#: Of the engine's own counters.
_COUNTERS = (
    *("generation_tokens", "prompt_tokens", "request_success", "num_preemptions"),
    *("prefix_cache_hits", "gpu_prefix_cache_hits"),
    *(f"{name}_{part}" for name in ("time_to_first_token_seconds",) for part in ("sum", "count")),
)
SETTLE = 3.0  # seconds in which an engine's counters come to rest
#: Share by which what the engine counted may differ from what was answered.
AGREE = 0.02
SENSE = 1.0  # seconds between two readings of the GPU, and of which one is the mean (NVML: of the last second)


class BenchError(Exception):
    """The speed could not be measured; the message says why."""


@dataclasses.dataclass(frozen=True)
class Load:
    """What an engine is asked: so many streams at a time, `rounds` requests of each, of so many tokens; `seed` of the
    random tokens (no two loads of a benchmark have the same, or the prefix cache would answer); `seconds` that it may
    take."""

    streams: int
    input: int = INPUT
    output: int = OUTPUT
    rounds: int = ROUNDS
    seed: int = SEED
    seconds: float = SECONDS

    @classmethod
    def of(cls, given: Mapping[str, int]) -> Load:
        """Of plain data, as `release_format.check_load` returns it."""
        return cls(**{**given, "seconds": float(given["seconds"])})  # type: ignore[arg-type]

    def as_dict(self) -> dict[str, int]:
        """As plain data."""
        return {**dataclasses.asdict(self), "seconds": int(self.seconds)}

    @property
    def requests(self) -> int:
        """Of all streams."""
        return self.streams * self.rounds


def bench(
    docker: Docker,
    container: str,
    item: Engine,
    told: Callable[[int, list[dict[str, Any]]], None],
    loads: Sequence[Load] = (),
) -> tuple[list[dict[str, Any]], str]:
    """Measure an engine: the rows (see `row`), and what measured it. `loads`: 1, 4 and 16 streams unless given. `told`
    gets each number of streams before it is measured, with the rows so far. Raises BenchError, HttpError."""
    rows: list[dict[str, Any]] = []
    if loads and not embeds(item.verify.get("kinds", ())):
        _warm_up(_ask, item, loads[0])
    loads = loads or [Load(streams) for streams in STREAMS]
    if embeds(item.verify.get("kinds", ())):
        for load in loads:
            told(load.streams, [*rows])
            rows.append(by_texts(item, dataclasses.replace(load, rounds=TEXT_ROUNDS)))
        return rows, TEXTS
    try:
        for load in loads:
            told(load.streams, [*rows])
            rows.append(by_vllm(docker, container, item, load))
        return rows, OWN
    except (DockerError, BenchError) as error:
        if rows:
            raise BenchError(f"{OWN} with {load.streams} streams: {error}") from None
        why = printable(str(error), 300)
    for load in loads:
        told(load.streams, [*rows])
        rows.append(by_requests(item, load))
    return rows, f"{REQUESTS}, since {OWN} did not work: {why}"


def measure(docker: Docker, container: str, item: Engine, load: Load, tool: str = "") -> tuple[dict[str, Any], str]:
    """One load of a benchmark, after a request that warms the engine up: a row with `at` (Unix time), `counted` (what
    the engine counted meanwhile), `disturbed` (whether that is more than was asked for), `temperature_c`, `power_w`,
    `throttled` and `joules_per_token`; and what measured it. `tool` is what measured the loads before, so that all can
    be compared. Raises BenchError, HttpError."""
    if embeds(item.verify.get("kinds", ())):
        _warm_up(_embed, item, load)
        return _watched(item, load, lambda: by_texts(item, load, warm=False)), TEXTS
    _warm_up(_ask, item, load)
    if not tool or tool == OWN:
        try:
            asked = _watched(
                item, load, lambda: by_vllm(docker, container, item, load), lambda: _end(docker, container)
            )
            return asked, OWN
        except (DockerError, BenchError) as error:
            if tool:
                raise BenchError(f"{OWN}: {error}") from None
            tool = f"{REQUESTS}, since {OWN} did not work: {printable(str(error), 300)}"
    return _watched(item, load, lambda: by_requests(item, load, warm=False)), tool


def command(item: Engine, load: Load) -> list[str]:
    """The engine's own benchmark. The tokenizer is named by its folder: an offline engine knows no other revision."""
    commit = item.revision if COMMIT.fullmatch(item.revision) else ""
    tokenizer = f"{CACHE}/{repo_folder(item.repo)}/snapshots/{commit}" if commit else ""
    return [
        # Without it, one that hangs would go on asking an engine that serves.
        *("timeout", "--kill-after=5", f"{load.seconds:.0f}"),
        *("vllm", "bench", "serve", "--model", item.repo, *(("--tokenizer", tokenizer) if tokenizer else ())),
        *("--host", "127.0.0.1", "--port", str(PORT), "--endpoint", "/v1/completions"),
        *("--dataset-name", "random", "--random-input-len", str(load.input), "--random-output-len", str(load.output)),
        *("--num-prompts", str(load.requests), "--max-concurrency", str(load.streams), "--request-rate", "inf"),
        *("--ignore-eos", "--temperature", "0", "--seed", str(load.seed)),
        *("--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", ",".join(map(str, PERCENTILES))),
        *("--save-result", "--result-filename", RESULT),
    ]


def by_vllm(docker: Docker, container: str, item: Engine, load: Load) -> dict[str, Any]:
    """What `vllm bench serve` finds. Raises DockerError, BenchError."""
    docker.execute(container, ["rm", "-f", RESULT], 30.0)
    key = engine_client(item.url).headers.get("Authorization", "").removeprefix("Bearer ")
    environment = {"OPENAI_API_KEY": key} if key else {}
    code, lines = docker.execute(container, command(item, load), load.seconds + 30.0, environment=environment)
    if code == TIMED_OUT:
        raise BenchError(f"it took more than {load.seconds:.0f} s")
    if code:
        last = next((line for line in reversed(lines) if line.strip()), "no output")
        raise BenchError(f"exit code {code}: {printable(last.strip(), 200)}")
    code, lines = docker.execute(container, ["cat", RESULT], 30.0)
    if code:
        raise BenchError("it wrote no result")
    return understood("\n".join(lines), load)


def _end(docker: Docker, container: str) -> float | None:
    """When `vllm bench serve` wrote its result (Unix time; a container has its host's clock), as soon as all answers
    were there; None where the container does not say."""
    try:
        code, lines = docker.execute(container, ["stat", "--format=%.Y", RESULT], 30.0)
        return as_time(float(lines[-1]), RESULT) if code == 0 and lines else None
    except (DockerError, ValueError):  # BoundsError is one
        return None


def understood(text: str, load: Load) -> dict[str, Any]:
    """The result file of `vllm bench serve`. Raises BenchError for one that is none, or of requests that failed."""
    try:
        data = as_dict(parse_json(text, "its result", MIB), "its result")
        done = as_int(data.get("completed"), "completed", 0, 1 << 20)
        total = as_number(data.get("output_throughput"), "output_throughput")
        each = as_number(data.get("mean_tpot_ms"), "mean_tpot_ms")
        first = as_number(data.get("median_ttft_ms"), "median_ttft_ms")
        more: dict[str, Any] = {
            name: round(as_number(data[key], key), digits)
            for name, key, digits in _FURTHER
            if data.get(key) is not None
        }
    except BoundsError as error:
        raise BenchError(str(error)) from None
    if done != load.requests or not total or not each:
        raise BenchError(f"{done} of {load.requests} requests were answered")
    return {**row(load.streams, done, total, 1000 / each, first), **more}


def row(streams: int, done: int, total: float, each: float, first: float) -> dict[str, Any]:
    """A line of the result: tokens a second of all streams together and of one while it decodes; milliseconds."""
    speeds = {"tokens_per_second": round(total, 2), "stream_tokens_per_second": round(each, 2)}
    return {"streams": streams, "requests": done, **speeds, "ttft_ms": round(first, 1)}


def by_requests(item: Engine, load: Load, warm: bool = True) -> dict[str, Any]:
    """The same by requests of our own; `warm`: after one that is not counted. Raises BenchError, HttpError."""
    answers, took = _asked(_ask, item, load, warm)
    each = statistics.mean((count - 1) / max(times[-1] - times[0], 1e-6) for count, _, times in answers)
    firsts = [(times[0] - start) * 1000 for _, start, times in answers]
    between = [(late - early) * 1000 for _, _, times in answers for early, late in itertools.pairwise(times)]
    whole = [(times[-1] - start) * 1000 for _, start, times in answers]
    total = sum(count for count, *_ in answers)
    made = row(load.streams, len(answers), total / took, each, statistics.median(firsts))
    for name, values, digits in (("ttft", firsts, 1), ("itl", between, 2), ("request", whole, 1)):
        made.update({f"{name}_p{share}_ms": round(quantile(values, share), digits) for share in PERCENTILES if values})
    made.update(ttft_mean_ms=round(statistics.mean(firsts), 1), seconds=round(took, 3))
    return {**made, "input_tokens": load.input * len(answers), "output_tokens": total}


def quantile(values: Sequence[float], share: float) -> float:
    """The percentile of values, between its neighbours as numpy has it."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * share / 100
    low = math.floor(place)
    return ordered[low] + (ordered[math.ceil(place)] - ordered[low]) * (place - low)


def by_texts(item: Engine, load: Load, warm: bool = True) -> dict[str, Any]:
    """Tokens that an engine turns into vectors. Raises BenchError, HttpError."""
    answers, took = _asked(_embed, item, load, warm)
    each = statistics.mean(count / max(seconds, 1e-6) for count, seconds in answers)
    times = [seconds * 1000 for _, seconds in answers]
    total = sum(count for count, _ in answers)
    made = row(load.streams, len(answers), total / took, each, statistics.median(times))
    made.update({f"request_p{share}_ms": round(quantile(times, share), 1) for share in PERCENTILES})
    return {**made, "seconds": round(took, 3), "input_tokens": total, "output_tokens": 0}


def _asked(
    ask: Callable[[Engine, list[int], Load, float], Answer], item: Engine, load: Load, warm: bool
) -> tuple[list[Answer], float]:
    """The answers to the requests of a load, and the seconds that they took together."""
    prompts = _prompts(load.requests, load.input, load.seed)
    deadline = time.monotonic() + load.seconds
    if warm:
        _warm_up(ask, item, load)
    began = time.monotonic()
    with ThreadPoolExecutor(load.streams) as pool:
        answers = list(pool.map(lambda prompt: ask(item, prompt, load, deadline), prompts))
    return answers, time.monotonic() - began


def _warm_up(ask: Callable[[Engine, list[int], Load, float], Answer], item: Engine, load: Load) -> None:
    """One request that is not measured, of tokens that no load asks again. Raises BenchError, HttpError."""
    ask(item, _prompts(1, load.input, load.seed + WARM)[0], load, time.monotonic() + load.seconds)


def _prompts(count: int, tokens: int, seed: int) -> list[list[int]]:
    """Tokens of so many requests, the same each time."""
    dice = random.Random(seed)  # noqa: S311
    return [[dice.randint(LOWEST, HIGHEST) for _ in range(tokens)] for _ in range(count)]


def _embed(item: Engine, prompt: list[int], load: Load, deadline: float) -> tuple[int, float]:
    """Tokens that were read, and seconds until the answer."""
    start = time.monotonic()
    body = {"model": item.repo, "input": prompt}
    answer = engine_client(item.url).post(EMBEDDINGS, body, max(deadline - start, 0.1))
    if answer.status != 200:
        raise BenchError(f"HTTP {answer.status}: {printable(answer.text, 200)}")
    took = time.monotonic() - start
    try:
        usage = as_dict(as_dict(answer.json(), "the answer").get("usage"), "usage")
        return as_int(usage.get("prompt_tokens"), "prompt_tokens", 1, 1 << 20), took
    except BoundsError as error:
        raise HttpError("malformed", str(error)) from None


def _ask(item: Engine, prompt: list[int], load: Load, deadline: float) -> tuple[int, float, list[float]]:
    """Tokens of an answer, and the monotonic times of its request and of each of its texts."""
    body = {
        **{"model": item.repo, "prompt": prompt, "max_tokens": load.output, "ignore_eos": True, "temperature": 0},
        **{"stream": True, "stream_options": {"include_usage": True}},
    }
    start = time.monotonic()
    times: list[float] = []
    count = 0
    with engine_client(item.url).stream("/v1/completions", body, max(deadline - start, 0.1)) as stream:
        if stream.status != 200:
            raise BenchError(f"HTTP {stream.status}: {printable(stream.answer().text, 200)}")
        for event in stream.events():
            if event.strip() == "[DONE]":
                break
            try:
                chunk = as_dict(parse_json(event, "an event"), "an event")
                usage = as_dict(chunk.get("usage") or {}, "usage")
                count = as_int(usage.get("completion_tokens") or count, "completion_tokens", 0, 1 << 20)
            except BoundsError as error:
                raise HttpError("malformed", str(error)) from None
            times += [time.monotonic()] if chunk.get("choices") else []
    if count != load.output or not times:
        raise BenchError(f"{count} tokens instead of {load.output}")
    return count, start, times


# -- what the engine and the GPU say meanwhile -----------------------------------------------------------------------


def _watched(
    item: Engine, load: Load, work: Callable[[], dict[str, Any]], ended: Callable[[], float | None] = lambda: None
) -> dict[str, Any]:
    """The row that `work` makes, with what was counted while it ran, and what the GPU was in its `seconds`. `ended`
    says when these were over, where that is before `work` is. Raises BenchError where the engine counted less than was
    answered."""
    before, began = counters(item), time.time()
    with gpu_read() as readings:
        made = work()
        end = time.time()
    said = ended()
    end = said if said is not None and began <= said <= end else end
    counted = _settled(item, before, made)
    for kind, key in (("output_tokens", "generation_tokens"), ("requests", "request_success")):
        wanted, found = made.get(kind) or 0, counted.get(key)
        if found is not None and found < wanted * (1 - AGREE):
            raise BenchError(f"{wanted} {kind.replace('_', ' ')} were answered, and the engine counted {found:.0f}")
    more = counted.get("generation_tokens", 0.0) > (made.get("output_tokens") or 0) * (1 + AGREE) + load.output
    return {**made, "at": round(began, 2), "counted": _named(counted), "disturbed": more, **_drawn(readings, made, end)}


def counters(item: Engine) -> dict[str, float]:
    """The engine's counters now; {} where it shows none. Raises HttpError where it does not answer."""
    answer = engine_client(item.url).get("/metrics", limit=metrics.LIMIT)
    return metrics.sums(answer.text, _COUNTERS) if answer.status == 200 else {}


def _settled(item: Engine, before: dict[str, float], made: dict[str, Any]) -> dict[str, float]:
    """By how much the counters have moved, once they have reached what was answered, or no longer wait for it."""
    deadline = time.monotonic() + SETTLE
    while True:
        moved = {name: value - before.get(name, 0.0) for name, value in counters(item).items()}
        there = moved.get("generation_tokens", 0.0) >= (made.get("output_tokens") or 0)
        if (there and moved.get("request_success", 0.0) >= made["requests"]) or time.monotonic() > deadline:
            return moved
        time.sleep(0.1)


def _named(moved: dict[str, float]) -> dict[str, Any]:
    """The figures of the engine's counters, under the names of a row."""
    names = (
        ("requests", "request_success"),
        ("output_tokens", "generation_tokens"),
        ("input_tokens", "prompt_tokens"),
        ("preemptions", "num_preemptions"),
        ("cached_tokens", "prefix_cache_hits" if "prefix_cache_hits" in moved else "gpu_prefix_cache_hits"),
    )
    made: dict[str, Any] = {name: round(moved[key]) for name, key in names if key in moved}
    if count := moved.get("time_to_first_token_seconds_count"):
        made["ttft_mean_ms"] = round(moved["time_to_first_token_seconds_sum"] / count * 1000, 1)
    return made


@contextmanager
def gpu_read() -> Iterator[list[tuple[float, list[str]]]]:
    """The sensors' rows of the GPU and when they were read (Unix time), once a second as long as the context lasts."""
    rows: list[tuple[float, list[str]]] = []
    program, ended = sensors.Program(sensors.SMI), threading.Event()

    def read() -> None:
        while True:
            found = sensors.gpus(program.output() or "")[:1]
            rows.extend((time.time(), row) for row in found)
            if ended.wait(SENSE):
                return

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        yield rows
    finally:
        ended.set()
        thread.join(sensors.TIMEOUT + 1)


def _drawn(readings: Sequence[tuple[float, Sequence[str]]], made: dict[str, Any], end: float) -> dict[str, Any]:
    """Temperature (°C, the highest), power (W, the mean), why the GPU was slowed down, and energy a token; None for
    what the GPU does not say. Of the `seconds` before `end` alone: `vllm bench serve` first loads its libraries and its
    tokenizer and tries one request, and what the GPU draws meanwhile is not what the tokens took. (That the engine has
    requests would be no better sign: the one that is tried is one too.)"""
    begin = end - (made.get("seconds") or math.inf)
    rows = [row for at, row in readings if begin <= at <= end]
    # The first reading is in part of what was before.
    later = [row for at, row in readings if begin + SENSE <= at <= end] or rows
    heat, power = (
        [value for row in chosen if (value := sensors.number(row[sensors.FIELDS.index(field)])) is not None]
        for field, chosen in (("temperature.gpu", rows), ("power.draw", later))
    )
    mean = statistics.mean(power) if power else None
    tokens = made.get("output_tokens") or made.get("input_tokens")
    energy = mean * made["seconds"] / tokens if mean is not None and tokens and made.get("seconds") else None
    reasons = {reason for row in rows for reason in sensors.slowed(row[-1])}
    return {
        "temperature_c": max(heat, default=None),
        "power_w": round(mean, 2) if mean is not None else None,
        "throttled": sorted(reasons),
        "joules_per_token": round(energy, 4) if energy is not None else None,
    }
