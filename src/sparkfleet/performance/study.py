"""What a search of `tune` has measured, kept on the controller so that it goes on where it was interrupted:
STATE/tune/HOST/KEY.json.

    {"format": 1, "asked": {what it searches, for which engine of which host}, "runs": [{settings, rows, ready_s,
     failed, seconds, at, confirms}], "winner": settings or None, "verdict": ""}

Another question (another objective, image, load, host) is another file. `confirms`: the run measures the winner or the
default once more, after the search.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparkfleet_host import benchmarks, bounded
from sparkfleet_host.bounded import BoundsError, as_dict, as_int, as_list, as_str, as_time
from sparkfleet_host.releases import write_json

from sparkfleet import SparkfleetError
from sparkfleet.performance import search
from sparkfleet.performance.search import Result

FORMAT = 1
FOLDER = "tune"
MOST_RUNS = 500
_ROW = ("tokens_per_second", "stream_tokens_per_second", "ttft_ms", "ttft_p95_ms", "request_p50_ms", "itl_p50_ms")


class Study:
    """A search that is kept. `asked`: plain data."""

    def __init__(self, path: Path, asked: Mapping[str, Any]) -> None:
        self.path, self.asked = path, dict(asked)
        self.runs: list[dict[str, Any]] = []
        self.winner: dict[str, Any] | None = None
        self.verdict = ""

    @property
    def seconds(self) -> float:
        """That all runs took."""
        return float(sum(run["seconds"] for run in self.runs))

    def results(self, objective: str) -> dict[search.Key, Result]:
        """The result of each settings that the search has measured."""
        return {search.key(run["settings"]): result(run, objective) for run in self.runs if not run["confirms"]}

    def add(self, run: Mapping[str, Any]) -> None:
        """Keep a run. Raises SparkfleetError, also for what a Spark cannot have measured."""
        try:
            self.runs.append(_run(dict(run)))
        except BoundsError as error:
            raise SparkfleetError(f"what the Spark measured: {error}") from None
        self.write()

    def write(self) -> None:
        """Replace the file as a whole. Raises SparkfleetError."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self.as_dict())
        except OSError as error:
            raise SparkfleetError(f"{self.path}: {error.strerror}: without it the search cannot be resumed") from None

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as the file has it."""
        known = {"asked": self.asked, "runs": self.runs, "winner": self.winner, "verdict": self.verdict}
        return {"format": FORMAT, **known}


def result(run: Mapping[str, Any], objective: str) -> Result:
    """What a run showed."""
    if run["failed"]:
        return Result(failed=run["failed"])
    return search.of_rows(run["rows"], objective, run["ready_s"])


def name(asked: Mapping[str, Any]) -> str:
    """Name of the file of a question."""
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


@contextlib.contextmanager
def opened(state: Path, host: str, asked: Mapping[str, Any], fresh: bool) -> Iterator[Study]:
    """The study of a question, with what was measured before unless `fresh`, for this process alone. Raises
    SparkfleetError."""
    folder = state / FOLDER / re.sub(r"[^A-Za-z0-9_.-]", "_", host)[:100].lstrip(".")
    path = folder / f"{name(asked)}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise SparkfleetError(f"{folder}: {error.strerror}; make it writable") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SparkfleetError(f"another process runs this search of {host}") from None
        study = Study(path, asked)
        if not fresh:
            _read(study)
        yield study
    finally:
        os.close(handle)


def _read(study: Study) -> None:
    try:
        data = bounded.read_json(study.path, follow=False)
        if as_int(data.get("format"), "format", 1) > FORMAT:
            raise BoundsError(f"format {data['format']} was written by a newer version of Sparkfleet")
        study.runs = [_run(run) for run in as_list(data.get("runs"), "runs", MOST_RUNS)]
    except FileNotFoundError:
        return
    except (OSError, BoundsError) as error:
        raise SparkfleetError(f"{study.path}: {error}; --fresh starts the search over") from None
    study.winner, study.verdict = None, ""  # follow from the runs


def _run(value: Any) -> dict[str, Any]:
    run = as_dict(value, "a run")
    rows = []
    for item in as_list(run.get("rows"), "rows", 64):
        row = as_dict(item, "a row")
        rows.append({key: benchmarks.figure(row[key], key) for key in _ROW if row.get(key) is not None})
    return {
        "settings": as_dict(run.get("settings"), "settings"),
        "rows": rows,
        "ready_s": benchmarks.figure(run.get("ready_s"), "ready_s"),
        "failed": as_str(run.get("failed") or "", "failed", 4000),
        "seconds": as_time(run.get("seconds"), "seconds"),
        "at": as_time(run.get("at"), "at"),
        "confirms": run.get("confirms") is True,
    }
