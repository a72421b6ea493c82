"""The records of benchmarks on the controller, a file each: STATE/benchmarks/HOST/ID.json (docs/benchmark.md)."""

from __future__ import annotations

import contextlib
import re
import secrets
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparkfleet_host import benchmarks, bounded
from sparkfleet_host.bounded import BoundsError, printable
from sparkfleet_host.releases import write_json

from sparkfleet import SparkfleetError
from sparkfleet.user_paths import expanded

FOLDER = "benchmarks"
#: Records of a host that are kept.
MOST = 200
Record = Mapping[str, Any]


def new_id(now: float) -> str:
    """The id of a record that begins now."""
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(now))}-{secrets.token_hex(3)}"


def keep(state: Path, host: str, record: Record) -> Path:
    """Write a record, in place of an earlier state of the same; the newest MOST of a host stay. Raises OSError,
    BoundsError."""
    made = benchmarks.check_record(record)
    folder = state / FOLDER / _name(host)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{made['id']}.json"
    write_json(path, made)
    for old in sorted(folder.glob("*.json"))[:-MOST]:
        with contextlib.suppress(OSError):
            old.unlink()
    return path


def of_host(state: Path, host: str) -> list[dict[str, Any]]:
    """The records of a host that can be read, the oldest first."""
    found = []
    for path in sorted((state / FOLDER / _name(host)).glob("*.json"))[-MOST:]:
        with contextlib.suppress(OSError, BoundsError):
            found.append(_read(path))
    return found


def hosts(state: Path) -> list[str]:
    """Names of the hosts' folders."""
    return sorted(path.name for path in (state / FOLDER).glob("*") if path.is_dir())


def find(state: Path, name: str) -> dict[str, Any]:
    """The record that is meant: HOST for its newest complete one, HOST/ID, ID, or the path of a file. Raises
    SparkfleetError."""
    if name.endswith(".json"):
        path = expanded("benchmark", name)
        try:
            return _read(path)
        except OSError as error:
            raise SparkfleetError(f"benchmark {printable(name, 200)}: {error.strerror}") from None
        except BoundsError as error:
            raise SparkfleetError(f"benchmark {printable(name, 200)} is none: {error}") from None
    host, _, wanted = name.rpartition("/") if benchmarks.ID.fullmatch(name.rpartition("/")[2]) else (name, "", "")
    known = hosts(state)
    if host and _name(host) not in known:
        there = ", ".join(known) or "none"
        raise SparkfleetError(
            f"benchmark {printable(name, 200)}: of that host there is none; there are some of: {there}. Give HOST, ID, "
            "HOST/ID or a file.json"
        )
    found = [record for one in ([_name(host)] if host else known) for record in of_host(state, one)]
    fitting = [record for record in found if record["id"] == wanted or (not wanted and record["complete"])]
    if not fitting:
        raise SparkfleetError(f"benchmark {printable(name, 200)}: there is no such record in {state / FOLDER}")
    return fitting[-1]


def _read(path: Path) -> dict[str, Any]:
    return benchmarks.check_record(bounded.read_json(path, follow=False), str(path))


def _name(host: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "_", host)[:100].lstrip(".") or "_"


# -- a record as a curve ---------------------------------------------------------------------------------------------


def points(record: Record) -> dict[tuple[str, int], list[Mapping[str, Any]]]:
    """The rows of each load: (shape, streams) → a row a repetition, in their order."""
    found: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in record["rows"]:
        found.setdefault((row["shape"], row["streams"]), []).append(row)
    return found


def mean(rows: Iterable[Mapping[str, Any]], key: str) -> float | None:
    """The mean of a figure over repetitions; None where no row has it."""
    values = [float(row[key]) for row in rows if row.get(key) is not None]
    return statistics.mean(values) if values else None


def curve(record: Record) -> list[dict[str, Any]]:
    """A record as a line for each load: {shape, input, output, streams, repetitions, requests; the means of the figures
    of its rows; limit_share, published_share}. `limit_share` is the speed of one stream while it decodes against what
    memory bandwidth allows one stream: of several streams at a time it says how much each still gets.
    `published_share` is one stream against the published figure of the card."""
    made = []
    for (shape, streams), rows in points(record).items():
        keys = {key for row in rows for key, value in row.items() if isinstance(value, int | float)}
        figures = {key: mean(rows, key) for key in sorted(keys - {"input", "output", "streams", "repetition"})}
        speed = figures.get("stream_tokens_per_second")
        throttled = sorted({reason for row in rows for reason in row["throttled"]})
        made.append(
            {
                **{"shape": shape, "input": rows[0]["input"], "output": rows[0]["output"], "streams": streams},
                **{"repetitions": len(rows), **figures, "requests": sum(row["requests"] for row in rows)},
                **{"disturbed": any(row["disturbed"] for row in rows), "throttled": throttled},
                "limit_share": _share(speed, record["limit_tok_s"]),
                "published_share": _share(speed, record["published_tok_s"]) if streams == 1 else None,
            }
        )
    return made


def _share(value: float | None, of: float | None) -> float | None:
    return round(value / of, 4) if value is not None and of else None


def names(found: Sequence[Record]) -> list[str]:
    """HOST/ID of records, as `find` takes them."""
    return [f"{record['host']}/{record['id']}" for record in found]
