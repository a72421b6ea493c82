# SPDX-License-Identifier: Apache-2.0
"""What an engine was measured to need and to do on this host: the figures of its own log, and of a trial its speed.

    /opt/sparkfleet/releases/N/measured.json    {"format": 1, "records": [of each engine its last start]}
    /var/lib/sparkfleet/trials.json             {"format": 1, "records": [of each image, model and settings the last]}

The file of a release is beside its sealed files and not part of them. A record holds what the figures depend on, so
that nobody compares what differs: image, model, revision, and `settings`, a hash of arguments and environment that the
plan has. Memory is in GiB, speed in tokens a second, times in seconds, TTFT in milliseconds. `bench` says what measured
the speed, and is empty until that is done for every number of streams.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import bounded, engine, engine_log
from .bounded import SHA256, BoundsError, as_dict, as_int, as_list, as_number, as_str, printable
from .docker import Docker
from .engine import instant
from .release_format import REAL, WEIGHTS, Engine
from .releases import Store, write_json
from .verify import embeds

FORMAT = 1
FILE, TRIALS = "measured.json", "trials.json"
MOST = 64  # records of a file
MOST_STREAMS = 8  # rows of a benchmark
LOG_LINES = 20_000  # of one start
#: Of the plan, what can be compared.
PLANNED = (
    *("weights_gib", "activation_gib", "runtime_gib", "cuda_graphs_gib", "kv_cache_gib", "kv_cache_tokens"),
    *("max_concurrency", "requested_gib", "total_gib", "correction_gib"),
)
_KEY = ("image", "repo", "revision", "settings", "weights", "bench")
_SPEED = ("tokens_per_second", "stream_tokens_per_second", "ttft_ms")
#: Of these a row has what was measured.
_SPEED_TOO = ("ttft_p95_ms", "itl_p50_ms", "itl_p95_ms", "request_p50_ms", "seconds", "input_tokens", "output_tokens")
_ANY = re.compile(r"[\w.+-]{0,80}", re.ASCII)


def check_record(value: Any, what: str = "a record") -> dict[str, Any]:
    """A record, with its known fields alone: {service, model, repo, revision, image, settings, weights, vllm,
    container, started_at: str; at: Unix time; planned, figures: {name: number}; ready_s: number or None; speed:
    [{streams, tokens_per_second, stream_tokens_per_second, ttft_ms, requests}]; bench: str; reads: bool, whether the
    tokens are those that were read, and the time that of the whole answer}. Raises BoundsError."""
    given = as_dict(value, what)
    texts = ("service", "model", "image", "container", "started_at", "bench")
    made: dict[str, Any] = {key: printable(as_str(given.get(key, ""), f"{what}: {key}", 1000)) for key in texts}
    made["repo"] = bounded.matched(bounded.REPO, given.get("repo"), f"{what}: repo")
    made["revision"] = bounded.matched(bounded.REVISION, given.get("revision") or "main", f"{what}: revision")
    made["vllm"] = bounded.matched(_ANY, given.get("vllm", ""), f"{what}: vllm")
    made["settings"] = bounded.matched(SHA256, given["settings"], f"{what}: settings") if given.get("settings") else ""
    if given.get("weights", REAL) not in WEIGHTS:
        raise BoundsError(f"{what}: weights: none of {', '.join(WEIGHTS)}")
    made["weights"] = given.get("weights", REAL)
    made["reads"] = given.get("reads") is True
    made["at"] = as_number(given.get("at"), f"{what}: at", 0.0, bounded.LATEST)
    made["ready_s"] = _optional(given.get("ready_s"), f"{what}: ready_s")
    for key, names in (("planned", PLANNED), ("figures", tuple(engine_log.FIGURES))):
        part = as_dict(given.get(key, {}), f"{what}: {key}")
        numbers = {name: _optional(part.get(name), f"{what}: {key}.{name}", -1e6) for name in names}
        made[key] = {name: number for name, number in numbers.items() if number is not None}
    made["speed"] = [_speed(row, f"{what}: speed") for row in as_list(given.get("speed") or [], what, MOST_STREAMS)]
    return made


def _optional(value: Any, what: str, least: float = 0.0) -> float | int | None:
    if value is None:
        return None
    number = as_number(value, what, least, 1e12)
    return value if isinstance(value, int) else number


def _speed(value: Any, what: str) -> dict[str, Any]:
    row = as_dict(value, what)
    counts = {key: as_int(row.get(key), f"{what}.{key}", 0, 1 << 20) for key in ("streams", "requests")}
    more = {key: _optional(row[key], f"{what}.{key}") for key in _SPEED_TOO if row.get(key) is not None}
    return {**counts, **{key: _optional(row.get(key), f"{what}.{key}") for key in _SPEED}, **more}


def check_records(value: Any, what: str) -> list[dict[str, Any]]:
    """The records of a file. Raises BoundsError."""
    data = as_dict(value, what)
    if as_int(data.get("format"), f"{what}: format", 1) > FORMAT:
        raise BoundsError(f"{what}: format {data['format']} was written by a newer version of Sparkfleet")
    return [check_record(item, what) for item in as_list(data.get("records"), f"{what}: records", MOST)]


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file; [] where there is none that can be read: they are advice, and made again."""
    try:
        return check_records(bounded.read_json(path, follow=False), str(path))
    except (OSError, BoundsError):
        return []


def of_release(store: Store, number: int | None) -> list[dict[str, Any]]:
    """What was measured of the engines of a release."""
    return read(store.folder(number) / FILE) if number is not None else []


def trials(store: Store) -> list[dict[str, Any]]:
    """What trials measured on this host, the oldest first."""
    return read(store.state_dir / TRIALS)


def keep(path: Path, records: list[dict[str, Any]], key: tuple[str, ...] = _KEY) -> None:
    """Add records to a file, each in place of one with the same `key`; the newest MOST stay. Raises OSError,
    BoundsError for what is none."""
    new = [check_record(record) for record in records]

    def identity(record: Mapping[str, Any]) -> tuple[Any, ...]:
        # Whatever measured the speed: that there is one distinguishes a trial from a start.
        return tuple(bool(record[name]) if name == "bench" else record[name] for name in key)

    known = {identity(record) for record in new}
    old = [record for record in read(path) if identity(record) not in known]
    write_json(path, {"format": FORMAT, "records": [*old, *new][-MOST:]})


def keep_start(store: Store, number: int, records: list[dict[str, Any]]) -> None:
    """Keep what starts of a release's engines showed. Raises OSError."""
    if store.folder(number).is_dir():
        keep(store.folder(number) / FILE, records, ("service",))


def keep_trial(store: Store, record: dict[str, Any]) -> None:
    """Keep the result of a trial. Raises OSError."""
    keep(store.state_dir / TRIALS, [record])


def of_start(docker: Docker, item: Engine, at: float, weights: str = REAL) -> dict[str, Any]:
    """The record of an engine that runs and is ready, of its log since it started. Raises DockerError."""
    seen = engine.inspect(docker, item.service)
    lines = engine.read_log(docker, item.service, engine.just_before(seen["started_at"]), seen["tty"], most=LOG_LINES)
    planned = {key: value for key, value in (item.memory or {}).items() if key in PLANNED}
    return {
        **{key: getattr(item, key) for key in ("service", "model", "repo", "revision", "image", "settings")},
        **{"weights": weights, "vllm": engine_log.version(lines), "at": at},
        **{"reads": embeds(item.verify.get("kinds", ()))},
        **{"container": seen["id"], "started_at": seen["started_at"]},
        **{"planned": planned, "figures": engine_log.figures(lines), "ready_s": _ready(seen["started_at"], lines)},
        **{"speed": [], "bench": ""},
    }


def _ready(started: str, lines: list[str]) -> float | None:
    """Seconds from the start of the container until its server listened."""
    last = next((line for line in reversed(lines) if "Application startup complete" in line[: engine_log.LINE]), "")
    (end, rest), (begin, part) = instant(last.partition(" ")[0]), instant(started)
    return round(max(end - begin + (rest - part) / 1e9, 0.0), 1) if end and begin else None


def words(record: Mapping[str, Any]) -> list[str]:
    """Plan against measured, a figure each: "KV cache 95.1 GiB (planned 95.4)"."""
    planned, found, made = record["planned"], record["figures"], []
    for key, name in (
        ("weights_gib", "weights"),
        ("activation_gib", "activations"),
        ("cuda_graphs_gib", "graphs"),
        ("kv_cache_gib", "KV cache"),
    ):
        if key in found:
            plan = f" (planned {planned[key]:.1f})" if key in planned else ""
            made.append(f"{name} {found[key]:.1f} GiB{plan}")
    # Where the plan has none, this version takes its graphs beyond the budget (`vllm_versions`).
    within = planned.get("cuda_graphs_gib", 1) > 0
    if (rest := _rest(found, planned.get("requested_gib"), within)) is not None and "activation_gib" not in found:
        wanted = _rest(planned, planned["requested_gib"], within)
        plan = f" (planned {wanted:.1f})" if wanted is not None else ""
        made.append(f"activations and runtime {rest:.1f} GiB{plan}")
    if "kv_cache_tokens" in found:
        plan = f" (planned {planned['kv_cache_tokens']:,.0f})" if "kv_cache_tokens" in planned else ""
        made.append(f"{found['kv_cache_tokens']:,} tokens{plan}")
    made += [f"loaded in {found['load_s']:.0f} s"] if "load_s" in found else []
    made += [f"ready after {record['ready_s']:.0f} s"] if record["ready_s"] is not None else []
    return made


def _rest(figures: Mapping[str, Any], requested: float | None, graphs: bool) -> float | None:
    """GiB of the engine's budget besides weights, KV cache and, if they are within it, graphs: at its usual level the
    log has only those."""
    if requested is None or "weights_gib" not in figures or "kv_cache_gib" not in figures:
        return None
    within = figures.get("cuda_graphs_gib", 0.0) if graphs else 0.0
    return float(requested - figures["weights_gib"] - within - figures["kv_cache_gib"])


def speed_words(record: Mapping[str, Any]) -> list[str]:
    """What a trial measured: "1 stream 2.7 tok/s, first token after 320 ms"; of a model that gives vectors "1 stream
    2,700.0 tok/s read, answered after 47 ms"."""
    made = []
    what, when = ("tok/s read", "answered") if record.get("reads") else ("tok/s", "first token")
    for row in record["speed"]:
        total, first = row["tokens_per_second"], row["ttft_ms"]
        if total is not None:
            ttft = f", {when} after {first:.0f} ms" if first is not None else ""
            made.append(f"{streams_words(row['streams'])} {total:,.1f} {what}{ttft}")
    return made


def streams_words(count: int) -> str:
    """As "4 streams"."""
    return f"{count} stream{'s' * (count != 1)}"
