# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of the engines of this host, as they are kept here and on the controller (docs/benchmark.md has the form).

    /var/lib/sparkfleet/benchmarks.json    {"format": 1, "records": [the newest MOST]}

A record is one benchmark of one engine: what ran (release, image, revision, settings, version of vLLM), where (GPU,
driver), and a row for each load and repetition. It is written after each row, so that a run that is cut leaves what it
has measured; `complete` says whether that is all.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import bounded, engine, metrics, sensors
from .bench import BenchError
from .bounded import SHA256, BoundsError, as_dict, as_int, as_list, as_number, as_str, as_time, printable
from .docker import Docker
from .http import engine_client
from .release_format import Engine
from .releases import Store, write_json
from .verify import embeds

FORMAT = 1
FILE = "benchmarks.json"
MOST = 32  # records of a host
MOST_ROWS = 256  # of a record
LOOK = 3.0  # seconds in which requests of others are looked for
LARGEST = 16 * bounded.MIB  # of the file
LEAST = 1e-9  # of a figure that is not zero: no engine is so slow, and a ratio to it may be beyond a float
#: Form of a record's id, which is part of a file's name.
ID = re.compile(r"[0-9]{8}T[0-9]{6}Z-[0-9a-f]{6}")
SHAPE = re.compile(r"[a-z0-9][a-z0-9_.:-]{0,31}")
_TEXTS = ("service", "model", "profile", "container", "image", "gpu", "driver", "tool", "controller", "host")
_ANY = re.compile(r"[\w.+-]{0,80}", re.ASCII)
#: Numbers of a row: whole ones, and measured ones, None or left out where they are not known.
_COUNTS = ("input", "output", "streams", "repetition", "requests")
_FIGURES = (
    *("tokens_per_second", "stream_tokens_per_second", "ttft_ms", "ttft_mean_ms", "seconds"),
    *("input_tokens", "output_tokens", "temperature_c", "power_w", "joules_per_token"),
    *(f"{name}_p{share}_ms" for name in ("ttft", "itl", "request") for share in (50, 95, 99)),
)
#: What each row has.
_MEASURED = ("tokens_per_second", "ttft_ms")
_COUNTED = ("requests", "output_tokens", "input_tokens", "preemptions", "cached_tokens", "ttft_mean_ms")


def check_record(value: Any, what: str = "a benchmark") -> dict[str, Any]:
    """A record, with its known fields alone. Raises BoundsError."""
    given = as_dict(value, what)
    if as_int(given.get("format"), f"{what}: format", 1) > FORMAT:
        raise BoundsError(f"{what}: format {given['format']} was written by a newer version of Sparkfleet")
    made: dict[str, Any] = {"format": FORMAT, "id": bounded.matched(ID, given.get("id"), f"{what}: id")}
    for key in _TEXTS:
        made[key] = printable(as_str(given.get(key) or "", f"{what}: {key}", 1000))
    made["repo"] = bounded.matched(bounded.REPO, given.get("repo"), f"{what}: repo")
    made["revision"] = bounded.matched(bounded.REVISION, given.get("revision") or "main", f"{what}: revision")
    made["vllm"] = bounded.matched(_ANY, given.get("vllm") or "", f"{what}: vllm")
    made["settings"] = bounded.matched(SHA256, given["settings"], f"{what}: settings") if given.get("settings") else ""
    made["release"] = as_int(given.get("release"), f"{what}: release", 0, 10**9)
    for key in ("at", "ended"):
        made[key] = as_time(given.get(key), f"{what}: {key}")
    for key in ("limit_tok_s", "published_tok_s"):
        made[key] = figure(given.get(key), f"{what}: {key}")
    for key in ("reads", "serving", "complete"):
        made[key] = given.get(key) is True
    made["rows"] = [check_row(row, f"{what}: rows") for row in as_list(given.get("rows"), f"{what}: rows", MOST_ROWS)]
    return made


def check_row(value: Any, what: str = "a row") -> dict[str, Any]:
    """One load and repetition: {shape, input, output, streams, repetition, requests, …}. Raises BoundsError."""
    given = as_dict(value, what)
    made: dict[str, Any] = {"shape": bounded.matched(SHAPE, given.get("shape"), f"{what}.shape")}
    made.update({key: as_int(given.get(key), f"{what}.{key}", 0, 1 << 30) for key in _COUNTS})
    for key in _MEASURED:
        as_number(given.get(key), f"{what}.{key}")
    made.update({key: figure(given[key], f"{what}.{key}") for key in _FIGURES if key in given})
    made.update({"at": as_time(given["at"], f"{what}.at")} if given.get("at") is not None else {})
    counted = as_dict(given.get("counted") or {}, f"{what}.counted")
    made["counted"] = {key: figure(counted[key], f"{what}.counted") for key in _COUNTED if key in counted}
    made["disturbed"] = given.get("disturbed") is True
    reasons = as_list(given.get("throttled") or [], f"{what}.throttled", 16)
    made["throttled"] = [printable(as_str(reason, f"{what}.throttled", 64)) for reason in reasons]
    return made


def figure(value: Any, what: str) -> float | int | None:
    """A measured number, None for one that is not known. Raises BoundsError."""
    if value is None:
        return None
    number = as_number(value, what, 0.0, 1e12)
    if 0 < number < LEAST:
        raise BoundsError(f"{what}: {number:g} is less than {LEAST:g}")
    return value if isinstance(value, int) else number


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file, the oldest first; [] where there is none that can be read."""
    try:
        data = as_dict(bounded.read_json(path, LARGEST, follow=False), str(path))
        if as_int(data.get("format"), f"{path}: format", 1) > FORMAT:
            return []
        return [check_record(item, str(path)) for item in as_list(data.get("records"), f"{path}: records", MOST)]
    except (OSError, BoundsError):
        return []


def keep(store: Store, record: Mapping[str, Any]) -> None:
    """Add a record to those of this host, in place of one with the same id. Raises OSError, BoundsError."""
    new = check_record(record)
    path = store.state_dir / FILE
    others = [item for item in read(path) if item["id"] != new["id"]]
    write_json(path, {"format": FORMAT, "records": [*others, new][-MOST:]})


# -- what there is to measure ------------------------------------------------------------------------------------------


def look(store: Store, docker: Docker, model: str = "") -> dict[str, Any]:
    """What can be measured here: {release, gpu, driver, engines: [{service, model, profile, repo, revision, image,
    settings, vllm, container, started_at, reads, limit_tok_s, published_tok_s, max_num_seqs, max_model_len, kv_tokens,
    busy}]}; of the engines of the current release those that serve `model` (a card's name), all for "". `busy` is how
    many requests of others were seen in LOOK seconds. Raises BenchError where there is nothing to measure."""
    number = store.current()
    if number is None:
        raise BenchError("nothing is deployed here: run site.yml first, or `sparkfleet trial` to measure a model")
    items = store.engines(number)
    chosen = [item for item in items if model in ("", item.model)]
    if not chosen:
        there = ", ".join(item.model for item in items)
        raise BenchError(f"release {number} does not serve {printable(model, 100)}: it serves {there}")
    return {"release": number, **machine(), "engines": [_engine(docker, item) for item in chosen]}


def _engine(docker: Docker, item: Engine) -> dict[str, Any]:
    seen = engine.inspect(docker, item.service)
    client = engine_client(item.url)
    if seen["state"] != "running" or not engine.healthy(client):
        raise BenchError(f"{item.service} does not serve ({seen['state']}): `sparkfleet status` says more")
    served = client.get("/v1/models").json()
    version = client.get("/version")
    memory = item.memory or {}
    return {
        **{key: getattr(item, key) for key in ("service", "model", "profile", "repo", "revision", "image", "settings")},
        **{"vllm": str(as_dict(version.json(), "version").get("version") or "") if version.status == 200 else ""},
        **{"container": seen["id"], "started_at": seen["started_at"]},
        **{"reads": embeds(item.verify.get("kinds", ())), "limit_tok_s": item.decode_limit or None},
        **{"published_tok_s": memory.get("measured_tok_s"), "kv_tokens": memory.get("kv_cache_tokens")},
        **{"max_num_seqs": _sequences(docker, seen["id"]), "max_model_len": _length(served)},
        "busy": _busy(item),
    }


def _busy(item: Engine) -> int:
    """The most requests that ran or waited at a time, or were finished, in LOOK seconds."""
    most, first, deadline = 0.0, None, time.monotonic() + LOOK
    while True:
        text = engine_client(item.url).get("/metrics", limit=metrics.LIMIT).text
        found = metrics.sums(text, ("num_requests_running", "num_requests_waiting", "request_success"))
        done = found.get("request_success", 0.0)
        first = done if first is None else first
        open_now = found.get("num_requests_running", 0.0) + found.get("num_requests_waiting", 0.0)
        most = max(most, open_now, done - first)
        if time.monotonic() > deadline:
            return round(most)
        time.sleep(0.25)


def _sequences(docker: Docker, container: str) -> int | None:
    """`--max-num-seqs` of a container's command; None where it has none."""
    found = docker.container(container) or {}
    words = as_list(as_dict(found.get("Config") or {}, "Config").get("Cmd") or [], "Cmd")
    for word, value in zip(words, [*words[1:], ""], strict=False):
        name, equals, given = str(word).partition("=")
        if name == "--max-num-seqs":
            text = given if equals else str(value)
            return int(text) if text.isdecimal() and len(text) < 7 else None
    return None


def _length(served: Any) -> int | None:
    """`max_model_len` as the engine says it."""
    for entry in as_list(as_dict(served, "/v1/models").get("data") or [], "data"):
        length = as_dict(entry, "a model").get("max_model_len")
        if isinstance(length, int) and not isinstance(length, bool):
            return length
    return None


def machine() -> dict[str, str]:
    """The GPU's name and its driver's version; "" for what nvidia-smi does not say."""
    text = sensors.Program(("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")).output() or ""
    cells = [cell.strip() for cell in next(iter(text.splitlines()), "").split(",")]
    named = cells if len(cells) == 2 else ["", ""]
    return {"gpu": printable(named[0], 100), "driver": printable(named[1], 100)}


def same(docker: Docker, service: str, container: str, started_at: str) -> bool:
    """Whether a service still runs in this container, started then."""
    seen = engine.inspect(docker, service)
    return bool(seen["state"] == "running" and seen["id"] == container and seen["started_at"] == started_at)
