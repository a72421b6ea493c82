# SPDX-License-Identifier: Apache-2.0
"""The speed of an engine that runs: tokens a second of 1, 4 and 16 streams, and the time to the first token.

The engine's own `vllm bench serve` asks, inside its container; where the image has none that works, requests are
streamed from here and counted by the engine's usage. Random tokens of a fixed seed, and every answer is as long as it
may be, so that dummy weights and real ones do the same work.

Of an engine that gives vectors in place of text, requests from here count the tokens that it reads; the time is that of
the whole answer.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from .bounded import COMMIT, MIB, BoundsError, as_dict, as_int, as_number, parse_json, printable
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
SECONDS = 600.0  # for one number of streams
PORT = 8000  # that the engine listens on in its container
CACHE = "/root/.cache/huggingface"  # the model cache there
RESULT = "/tmp/sparkfleet-bench.json"  # noqa: S108 - the container's
OWN = "vllm bench serve"
REQUESTS = "streamed requests"
TEXTS = "requests for embeddings"
LOWEST, HIGHEST = 100, 1000  # tokens that every vocabulary has


class BenchError(Exception):
    """The speed could not be measured; the message says why."""


def bench(
    docker: Docker, container: str, item: Engine, told: Callable[[int, list[dict[str, Any]]], None]
) -> tuple[list[dict[str, Any]], str]:
    """Measure an engine: [{streams, requests, tokens_per_second, stream_tokens_per_second, ttft_ms}], and what measured
    it. `told` gets each number of streams before it is measured, with the rows so far. Raises BenchError, HttpError."""
    rows: list[dict[str, Any]] = []
    if embeds(item.verify.get("kinds", ())):
        for streams in STREAMS:
            told(streams, [*rows])
            rows.append(by_texts(item, streams))
        return rows, TEXTS
    try:
        for streams in STREAMS:
            told(streams, [*rows])
            rows.append(by_vllm(docker, container, item, streams))
        return rows, OWN
    except (DockerError, BenchError) as error:
        if rows:
            raise BenchError(f"{OWN} with {streams} streams: {error}") from None
        why = printable(str(error), 300)
    for streams in STREAMS:
        told(streams, [*rows])
        rows.append(by_requests(item, streams))
    return rows, f"{REQUESTS}, since {OWN} did not work: {why}"


def command(item: Engine, streams: int) -> list[str]:
    """The engine's own benchmark. The tokenizer is named by its folder: an offline engine knows no other revision."""
    commit = item.revision if COMMIT.fullmatch(item.revision) else ""
    tokenizer = f"{CACHE}/{repo_folder(item.repo)}/snapshots/{commit}" if commit else ""
    return [
        *("vllm", "bench", "serve", "--model", item.repo, *(("--tokenizer", tokenizer) if tokenizer else ())),
        *("--host", "127.0.0.1", "--port", str(PORT), "--endpoint", "/v1/completions"),
        *("--dataset-name", "random", "--random-input-len", str(INPUT), "--random-output-len", str(OUTPUT)),
        *("--num-prompts", str(streams * ROUNDS), "--max-concurrency", str(streams), "--request-rate", "inf"),
        *("--ignore-eos", "--seed", str(SEED), "--save-result", "--result-filename", RESULT),
    ]


def by_vllm(docker: Docker, container: str, item: Engine, streams: int) -> dict[str, Any]:
    """What `vllm bench serve` finds. Raises DockerError, BenchError."""
    docker.execute(container, ["rm", "-f", RESULT], 30.0)
    code, lines = docker.execute(container, command(item, streams), SECONDS)
    if code:
        last = next((line for line in reversed(lines) if line.strip()), "no output")
        raise BenchError(f"exit code {code}: {printable(last.strip(), 200)}")
    code, lines = docker.execute(container, ["cat", RESULT], 30.0)
    if code:
        raise BenchError("it wrote no result")
    return understood("\n".join(lines), streams)


def understood(text: str, streams: int) -> dict[str, Any]:
    """The result file of `vllm bench serve`. Raises BenchError for one that is none, or of requests that failed."""
    try:
        data = as_dict(parse_json(text, "its result", MIB), "its result")
        done = as_int(data.get("completed"), "completed", 0, 1 << 20)
        total = as_number(data.get("output_throughput"), "output_throughput")
        each = as_number(data.get("mean_tpot_ms"), "mean_tpot_ms")
        first = as_number(data.get("median_ttft_ms"), "median_ttft_ms")
    except BoundsError as error:
        raise BenchError(str(error)) from None
    if done != streams * ROUNDS or not total or not each:
        raise BenchError(f"{done} of {streams * ROUNDS} requests were answered")
    return row(streams, done, total, 1000 / each, first)


def row(streams: int, done: int, total: float, each: float, first: float) -> dict[str, Any]:
    """A line of the result: tokens a second of all streams together and of one while it decodes; milliseconds."""
    speeds = {"tokens_per_second": round(total, 2), "stream_tokens_per_second": round(each, 2)}
    return {"streams": streams, "requests": done, **speeds, "ttft_ms": round(first, 1)}


def by_requests(item: Engine, streams: int) -> dict[str, Any]:
    """The same by requests of our own. Raises BenchError, HttpError."""
    answers, took = _asked(_ask, item, streams, ROUNDS)
    each = statistics.mean((count - 1) / max(last - first, 1e-6) for count, _, first, last in answers)
    first = statistics.median(first - start for _, start, first, _ in answers) * 1000
    return row(streams, len(answers), sum(count for count, *_ in answers) / took, each, first)


def by_texts(item: Engine, streams: int) -> dict[str, Any]:
    """Tokens that an engine turns into vectors. Raises BenchError, HttpError."""
    answers, took = _asked(_embed, item, streams, TEXT_ROUNDS)
    each = statistics.mean(count / max(seconds, 1e-6) for count, seconds in answers)
    middle = statistics.median(seconds for _, seconds in answers) * 1000
    return row(streams, len(answers), sum(count for count, _ in answers) / took, each, middle)


def _asked(
    ask: Callable[[Engine, list[int], float], Answer], item: Engine, streams: int, rounds: int
) -> tuple[list[Answer], float]:
    """The answers to the requests of so many streams at a time, and the seconds that they took together."""
    prompts = _prompts(streams * rounds)
    deadline = time.monotonic() + SECONDS
    ask(item, prompts[0], deadline)  # warms it up
    began = time.monotonic()
    with ThreadPoolExecutor(streams) as pool:
        answers = list(pool.map(lambda prompt: ask(item, prompt, deadline), prompts))
    return answers, time.monotonic() - began


def _prompts(count: int) -> list[list[int]]:
    """Tokens of so many requests, the same each time."""
    dice = random.Random(SEED)  # noqa: S311
    return [[dice.randint(LOWEST, HIGHEST) for _ in range(INPUT)] for _ in range(count)]


def _embed(item: Engine, prompt: list[int], deadline: float) -> tuple[int, float]:
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


def _ask(item: Engine, prompt: list[int], deadline: float) -> tuple[int, float, float, float]:
    """Tokens of an answer, and the monotonic times of its request, its first and its last text."""
    body = {
        **{"model": item.repo, "prompt": prompt, "max_tokens": OUTPUT, "ignore_eos": True, "temperature": 0},
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
    if count != OUTPUT or not times:
        raise BenchError(f"{count} tokens instead of {OUTPUT}")
    return count, start, times[0], times[-1]
