"""What a benchmark asks an engine: shapes of requests, numbers of streams, repetitions. Pure functions."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sparkfleet_host import bench, benchmarks
from sparkfleet_host.bounded import printable

from sparkfleet import SparkfleetError

#: The guide's usual request, 4,096 tokens in all, and its long one, 32,768.
CHAT, LONG = "chat", "long"
#: As NVIDIA's recipes are measured: 8,192 tokens in, one stream.
NVIDIA = "nvidia"
STREAMS = (1, 4, 16, 32, 64, 128, 256, 512)
#: vLLM's `max_num_seqs` where nobody says one.
DEFAULT_SEQUENCES = 256
REPETITIONS, ROUNDS, SECONDS = 3, 3, 1800
MOST_REPETITIONS, MOST_ROUNDS, MOST_SHAPES, MOST_STREAMS, MOST_TOKENS = 20, 100, 8, 1024, 1 << 20


@dataclasses.dataclass(frozen=True)
class Shape:
    """Tokens of a request: of the prompt, and of the answer. `streams` where they are part of it, () for all."""

    name: str
    input: int
    output: int
    streams: tuple[int, ...] = ()


SHAPES = {
    shape.name: shape
    for shape in (Shape(CHAT, 3840, 256), Shape(LONG, 32512, 256), Shape(NVIDIA, 8192, 256, streams=(1,)))
}


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is to be measured. `streams`: () for the usual ones that the engine takes; `rounds`: requests of each
    stream; `seconds`: that one load may take."""

    shapes: tuple[Shape, ...] = (SHAPES[CHAT],)
    streams: tuple[int, ...] = ()
    repetitions: int = REPETITIONS
    rounds: int = ROUNDS
    seconds: int = SECONDS

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Asked:
        """Of plain data: {shapes: [NAME or INPUT:OUTPUT], streams: [int], repetitions, rounds, seconds}, each of which
        may be left out. Raises SparkfleetError."""
        unknown = [str(name) for name in given if name not in {field.name for field in dataclasses.fields(cls)}]
        if unknown:
            raise SparkfleetError(f"loads: {printable(', '.join(unknown), 100)}: unknown; there are shapes, streams, …")
        names = _listed(given.get("shapes") or [CHAT], "shapes")
        streams = _listed(given.get("streams") or [], "streams")
        return cls(
            shapes=tuple(dict.fromkeys(shape(str(name)) for name in names)),
            streams=tuple(sorted({_whole(count, "streams", 1, MOST_STREAMS) for count in streams})),
            repetitions=_whole(given.get("repetitions", REPETITIONS), "repetitions", 1, MOST_REPETITIONS),
            rounds=_whole(given.get("rounds", ROUNDS), "rounds", 1, MOST_ROUNDS),
            seconds=_whole(given.get("seconds", SECONDS), "seconds", 10, 7200),
        )


def shape(text: str) -> Shape:
    """The shape of a name, or of INPUT:OUTPUT in tokens. Raises SparkfleetError."""
    if text in SHAPES:
        return SHAPES[text]
    found = re.fullmatch(r"([0-9]{1,7}):([0-9]{1,7})", text)
    if not found:
        raise SparkfleetError(
            f"shape {printable(text, 60)!r}: one of {', '.join(SHAPES)}, or tokens of prompt and answer as 1024:128"
        )
    first, second = (_whole(int(part), f"shape {text}", 1, MOST_TOKENS) for part in found.groups())
    return Shape(text, first, second)


def _listed(value: Any, what: str) -> Sequence[Any]:
    items = value if isinstance(value, list | tuple) else [value]
    if len(items) > MOST_SHAPES:
        raise SparkfleetError(f"{what}: {len(items)} of them: at most {MOST_SHAPES}")
    return items


def _whole(value: Any, what: str, least: int, most: int) -> int:
    text = str(value)
    if isinstance(value, bool) or not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= most:
        raise SparkfleetError(f"{what}: {printable(text, 40)} is not an integer from {least} to {most}")
    return int(text)


def planned(asked: Asked, engine: Mapping[str, Any]) -> tuple[list[tuple[Shape, int, bench.Load]], list[str]]:
    """The loads of a benchmark of an engine, as `benchmarks.look` describes it: [(shape, repetition from 1 on, load)],
    and what is left out and why. Repetitions go through all loads in turn, so that whatever drifts (temperature) meets
    all of them. No two loads ask the same tokens. Raises SparkfleetError where nothing is left to measure."""
    notes: list[str] = []
    points: list[tuple[Shape, int]] = []
    for one in asked.shapes:
        length = engine.get("max_model_len")
        if length and one.input + one.output > length:
            notes.append(f"{one.name} is left out: {one.input + one.output} tokens, the engine takes {length}")
            continue
        points += [(one, streams) for streams in _streams(asked, one, engine, notes)]
    if not points:
        raise SparkfleetError(f"nothing to measure: {'; '.join(notes)}")
    if len(points) * asked.repetitions > benchmarks.MOST_ROWS:
        raise SparkfleetError(
            f"{len(points)} loads {asked.repetitions} times are more than {benchmarks.MOST_ROWS}: take fewer streams, "
            "shapes or repetitions"
        )
    made: list[tuple[Shape, int, bench.Load]] = []
    for repetition in range(1, asked.repetitions + 1):
        for one, streams in points:
            load = bench.Load(streams, one.input, one.output, asked.rounds, len(made) + 1, float(asked.seconds))
            made.append((one, repetition, load))
    return made, notes


def _streams(asked: Asked, one: Shape, engine: Mapping[str, Any], notes: list[str]) -> list[int]:
    """The numbers of streams of a shape: those that are asked for; else the usual ones that run at a time, in the batch
    and in the KV cache."""
    most = engine.get("max_num_seqs") or DEFAULT_SEQUENCES
    if asked.streams or one.streams:
        chosen = [*(asked.streams or one.streams)]
        for count in chosen:
            if count > most:
                notes.append(f"{one.name}: of {count} streams {most} run at a time (max_num_seqs)")
        return chosen
    held = int(engine["kv_tokens"] / (one.input + one.output)) if engine.get("kv_tokens") else most
    if held < most:
        notes.append(f"{one.name}: up to {max(held, 1)} streams, which the KV cache holds")
    return [count for count in STREAMS if count <= max(min(most, held), 1)]
