# SPDX-License-Identifier: Apache-2.0
"""The phases of a vLLM start, read from its log. Pure: lines in, steps out.

Formats are those of vLLM 0.10.1.1 (NGC 25.09), 0.1x, 0.2x and 0.32, GPU and CPU builds. A line that no version is
known to write is passed over, so a new message costs a figure, never the wait.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

STARTING = "starting"
DOWNLOADING = "downloading"
LOADING = "loading weights"
COMPILING = "compiling"
PROFILING = "profiling memory"
CAPTURING = "capturing graphs"
SERVING = "starting server"
READY = "ready"

#: Characters of a line that are read, and those searched for a startup message.
LINE, MESSAGE = 8192, 500

# `(EngineCore_DP0 pid=77) (Worker_TP0 pid=80) INFO 09-29 09:51:29 [backends.py:559] message`; `ERROR 08-06 … ` too.
_PREFIX = re.compile(
    r"^(?:\[[^\]\s]+\]\s*)?(?:\([A-Za-z]\w*(?:[ =]\w+)* pid=\d+\)\s*)*"
    r"(?:(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL):?\s+(?:\d\d-\d\d \d\d:\d\d:\d\d\s+)?(?:\[[^\]]+:\d+\]\s?)?)?"
)
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@dataclasses.dataclass(frozen=True)
class Step:
    """A phase, with its figure in words ("" while there is none), entered or moved on at `at` (Unix time, s)."""

    phase: str
    figure: str
    at: float

    def __str__(self) -> str:
        return f"{self.phase}, {self.figure}" if self.figure else self.phase


def plain(line: str) -> tuple[str, str]:
    """Level ("" if the line has none) and message of a log line, without process names, time and colours.

    Of a progress bar that overwrote itself the last state is kept.
    """
    text = _ANSI.sub("", line[-LINE:] if "\r" in line else line[:LINE]).rstrip()
    if "\r" in text:
        text = next((part for part in reversed(text.split("\r")) if part.strip()), "")
    found = _PREFIX.match(text)
    return (found["level"] or "", text[found.end() :]) if found else ("", text)


IDLE = 1.0  # seconds; a "download" that is shorter found everything there


def _idle(step: Step, following: Step) -> bool:
    """Whether vLLM only looked for files that it had."""
    return step.phase == DOWNLOADING and not step.figure and following.at - step.at < IDLE


Reading = tuple[str, str]  # phase, figure
_Read = Callable[["Tracker", "re.Match[str]"], Reading]


def _say(phase: str, figure: str = "") -> _Read:
    return lambda tracker, found: (phase, found.expand(figure) if figure else "")


def _float(text: str) -> float | None:
    """A number of a log line; None for what only looks like one (`1.2.3`, hundreds of digits)."""
    return float(text) if re.fullmatch(r"\d{1,15}(\.\d{0,15})?|\.\d{1,15}", text, re.ASCII) else None


def _int(text: str) -> int | None:
    """A whole number with commas; None for what only looks like one."""
    return int(text.replace(",", "")) if re.fullmatch(r"\d[\d,]{0,20}", text, re.ASCII) else None


def _available(tracker: Tracker, found: re.Match[str]) -> Reading:
    tracker.note(gib=_float(found[1]))
    return PROFILING, tracker.kv_words()


def _size(tracker: Tracker, found: re.Match[str]) -> Reading:
    tracker.graphs &= found["pool"].startswith("GPU")
    tracker.note(tokens=_int(found["tokens"]))
    if found["times"]:
        return _concurrency(tracker, found)
    return PROFILING, tracker.kv_words()


def _concurrency(tracker: Tracker, found: re.Match[str]) -> Reading:
    times, context = _float(found["times"]), _int(found["context"])
    if times is not None and context is not None:
        tracker.note(max_concurrency=times, context=context)
    return PROFILING, tracker.kv_words()


def _model_loaded(tracker: Tracker, found: re.Match[str]) -> Reading:
    tracker.weights_gib = size = _float(found[1])
    return LOADING, "done" if size is None else f"done, {size:.2f} GiB"


def _graphs(tracker: Tracker, found: re.Match[str]) -> Reading:
    kind = (found["kind"] or "").replace("mixed prefill-decode", "mixed").split(",")[0].strip()
    return CAPTURING, f"{kind + ' ' if kind else ''}{found['k']}/{found['n']}"


_EAGER = re.compile(r"enforce_eager['\"]?[=:] ?True|Cudagraph is disabled|Enforce eager set")
_CONTEXT = r"Maximum concurrency for (?P<context>[\d,]+) tokens per request: (?P<times>[\d.]+)x"
_RULES: tuple[tuple[re.Pattern[str], _Read], ...] = tuple(
    (re.compile(pattern), read)
    for pattern, read in (
        (r"vLLM API server version", _say(STARTING)),
        (r"Initializing a V\d LLM engine \(v([^)+]+)", _say(STARTING, r"vLLM \1")),
        # The server's own download (model_source: hub). vLLM hides the progress bar of the Hub's client.
        (r"Using model weights format", _say(DOWNLOADING)),
        (r"(?:Fetching \d+ files|Downloading shards): .*?(\d+/\d+)", _say(DOWNLOADING, r"file \1")),
        (
            r"[\w.-]+\.safetensors: .*?\| ([\d.]+[kMGT]?)B?/([\d.]+[kMGT]?)B? ",
            _say(DOWNLOADING, r"\1 of \2B"),
        ),
        (r"Time spent downloading weights for .*?: (\d+(?:\.\d)?)\d* seconds", _say(DOWNLOADING, r"done, \1 s")),
        (r"Starting to load model|Loading drafter model|Loading model from scratch", _say(LOADING)),
        (
            r"[Ll]oading (?:[\w.]+ )*(?:shards|Streamer|loader): .*?(\d+)/(\d+)",
            _say(LOADING, r"shard \1/\2"),
        ),
        (r"Loading weights took ([\d.]+) seconds", _say(LOADING, r"done, \1 s")),
        (r"Model loading took ([\d.]+) ?Gi?B", _model_loaded),
        (
            r"Starting torch\.compile|Using cache directory: .*torch_compile_cache|torch\.compile cache is disabled",
            _say(COMPILING),
        ),
        (r"Dynamo bytecode transform time: ([\d.]+) s", _say(COMPILING, r"transform done, \1 s")),
        (r"Cache the graph (?:for|of) ", _say(COMPILING)),
        (r"Compiling a graph for .*takes ([\d.]+) s", _say(COMPILING, r"graph done, \1 s")),
        (r"Directly load the compiled graph.* took ([\d.]+) s", _say(COMPILING, r"from the cache, \1 s")),
        (r"torch\.compile (?:takes|took) ([\d.]+) s in total", _say(COMPILING, r"done, \1 s")),
        (r"Warming up model for the compilation", _say(COMPILING)),
        (r"Warming up done", _say(COMPILING, "done")),
        (
            r"Initial profiling/warmup run took|Memory profiling takes|Encoder cache will be initialized",
            _say(PROFILING),
        ),
        (r"Available KV cache memory: ([\d.]+) GiB", _available),
        (r"(?:Auto|Explicitly) set \(([\d.]+)/[\d.]+\) GiB for KV cache", _available),
        (r"(?P<pool>[\w+ ]+?) KV cache size: (?P<tokens>[\d,]+) tokens(?:, " + _CONTEXT + ")?", _size),
        (_CONTEXT, _concurrency),
        (r"Profiling CUDA graph memory", _say(PROFILING)),
        (r"Capturing CUDA graphs?(?: shapes)?(?: \((?P<kind>[^)]*)\))?.*?: .*?(?P<k>\d+)/(?P<n>\d+)", _graphs),
        (r"Graph capturing finished in ([\d.]+) secs?, took ([-\d.]+) GiB", _say(CAPTURING, r"done, \2 GiB")),
        (r"init engine \(.*\) took", _say(SERVING)),
        (r"Starting vLLM (?:API )?server|Started server process|Application startup complete", _say(SERVING)),
    )
)


class Tracker:
    """Follows one start. `began` is its Unix time in seconds.

    `kv` has what the log reports about the KV cache: gib, tokens, max_concurrency and the context it counts with;
    `weights_gib` the size of the loaded weights, or None.
    """

    def __init__(self, began: float) -> None:
        self.step = Step(STARTING, "", began)
        self.kv: dict[str, float | int] = {}
        self.weights_gib: float | None = None
        self.served: float | None = None  # when the server reported that it listens
        self.graphs = True  # whether CUDA graphs are captured after the KV cache is made
        self._began: list[tuple[str, float]] = [(STARTING, began)]

    def feed(self, lines: Iterable[str], at: float) -> list[Step]:
        """Read log lines seen at `at`; the steps they show, at most one per phase and in order.

        A line may start with Docker's own RFC 3339 time stamp, which then counts instead of `at`.
        """
        steps: list[Step] = []
        for line in lines:
            stamp, text = split_stamp(line)
            for step in self._read(text, stamp or at):
                if (step.phase, step.figure) == (self.step.phase, self.step.figure):
                    continue
                self._enter(step)
                if steps and (steps[-1].phase == step.phase or _idle(steps[-1], step)):
                    steps.pop()
                steps.append(step)
        return steps

    def downloaded(self, done: int, total: int, at: float) -> list[Step]:
        """Bytes that lie in the cache, of `total` (0 for unknown): a step while the server downloads, else none.

        vLLM's own log is silent during a download.
        """
        if self.step.phase != DOWNLOADING or self.step.figure.startswith("done"):
            return []
        of = f" of {total / 1e9:.1f}" if total else ""
        step = Step(DOWNLOADING, f"{done / 1e9:.1f}{of} GB", at)
        if step.figure == self.step.figure:
            return []
        self._enter(step)
        return [step]

    def ready(self, at: float) -> Step:
        """The engine answers at `at`; it was ready when its server reported so, if it did."""
        self._enter(Step(READY, "", at if self.served is None else min(at, self.served)))
        return self.step

    def phases(self, now: float) -> list[dict[str, Any]]:
        """Each phase so far with its duration: [{phase, seconds}], the last one up to `now`; "ready" left out."""
        marks = [*self._began, ("", now)]
        found: dict[str, float] = {}
        for (phase, start), (_, end) in itertools.pairwise(marks):
            if phase != READY and not (phase == DOWNLOADING and end - start < IDLE):
                found[phase] = found.get(phase, 0.0) + max(end - start, 0.0)
        return [{"phase": phase, "seconds": round(seconds, 1)} for phase, seconds in found.items()]

    def note(self, **figures: float | None) -> None:
        """Keep figures of the KV cache, those that are known."""
        self.kv.update({name: figure for name, figure in figures.items() if figure is not None})

    def kv_words(self) -> str:
        """The KV cache in words: `KV cache 66.25 GiB, 271,360 tokens, 8.48 requests of 32,000`."""
        words = [f"{self.kv['gib']:.2f} GiB"] if "gib" in self.kv else []
        if "tokens" in self.kv:
            words.append(f"{self.kv['tokens']:,} tokens")
        if "max_concurrency" in self.kv:
            words.append(f"{self.kv['max_concurrency']:.2f} requests of {self.kv['context']:,}")
        return " ".join(["KV cache", ", ".join(words)]) if words else ""

    def _enter(self, step: Step) -> None:
        if step.phase != self.step.phase:
            # Time stamps are the host's, `at` may be the controller's: never let a phase end before it began.
            self._began.append((step.phase, max(step.at, self._began[-1][1])))
        self.step = step

    def _read(self, text: str, at: float) -> list[Step]:
        _, message = plain(text)
        if _EAGER.search(message):
            self.graphs = False
        if message.startswith("Application startup complete"):
            self.served = at
        for pattern, read in _RULES:
            if found := pattern.search(message[:MESSAGE]):
                phase, figure = read(self, found)
                steps = [Step(phase, figure, at)]
                # The bar of the capture overwrites itself on one line, which Docker's log holds back until its end.
                if read in (_size, _concurrency) and "max_concurrency" in self.kv and self.graphs:
                    steps.append(Step(CAPTURING, "", at))
                return steps
        return []


_STAMP = re.compile(r"^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d{1,12})?(Z|[+-]\d\d:\d\d) ?", re.ASCII)


def split_stamp(line: str) -> tuple[float | None, str]:
    """Unix time and rest of a line that Docker has stamped; None and the line if it has not."""
    found = _STAMP.match(line)
    if found is None:
        return None, line
    zone = "+00:00" if found[3] == "Z" else found[3]
    try:
        seconds = datetime.fromisoformat(found[1] + zone).timestamp()
    except (ValueError, OverflowError):  # the 99th of a month; the year 1 west of Greenwich
        return None, line
    return seconds + float(found[2] or 0), line[found.end() :]
