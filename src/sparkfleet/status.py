"""What a Spark serves, in words."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from sparkfleet import report

COLUMNS = ("host", "state", "model", "profile", "release", "image", "requests", "KV", "tok/s", "GPU", "restarts")


def summary(host: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a host: plain data, for tables and for JSON. `found` is what the module spark_status returned."""
    releases, guard = found["releases"], found["guard"] or {}
    current = releases["current"]
    lock = releases["locks"].get(str(current)) or {}
    figures = found["figures"]
    return {
        "host": host,
        "state": found["engine"],
        "model": lock.get("model"),
        "profile": lock.get("profile"),
        "release": current,
        "previous": releases["previous"],
        "image": lock.get("image"),
        "digest": str(lock.get("image") or "").partition("@sha256:")[2][:12] or None,
        "healthy": found["healthy"],
        "running": figures.get("num_requests_running"),
        "waiting": figures.get("num_requests_waiting"),
        "kv_cache": figures.get("kv_cache_usage_perc", figures.get("gpu_cache_usage_perc")),
        "tokens_per_second": guard.get("tokens_per_second"),
        "temperature": found["gpu"]["temperature"],
        "restarts": sum((guard.get("restarts_total") or {}).values()),
        "given_up": (guard.get("given_up") or {}).get("reason"),
        "slow": bool(guard.get("slow")),
        "switch": switch(releases["switch"], bool(releases["switch_active"])),
    }


def absent(host: str, state: str, message: str) -> dict[str, Any]:
    """The row of a host that could not be looked at."""
    empty = dict.fromkeys(
        ("model", "profile", "release", "digest", "running", "waiting", "kv_cache", "tokens_per_second", "temperature")
    )
    return {"host": host, "state": state, **empty, "restarts": None, "slow": False, "message": message}


def switch(journal: Mapping[str, Any] | None, active: bool) -> str | None:
    """The switch that runs or ran last, in a line."""
    if not journal:
        return None
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(journal["began"]))
    way = f"{journal['from'] or 'none'} → {journal['to']}"
    state = f"phase {journal['phase']}" if active else (journal["outcome"] or f"cut in the phase {journal['phase']}")
    return f"{way} by {journal['controller'] or '?'} with {journal['verb'] or '?'} at {when}: {state}"


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The row as text, in the order of COLUMNS."""

    def text(value: Any, form: str = "{}") -> str:
        return "-" if value is None else form.format(value)

    requests = None if row["running"] is None else f"{row['running']:.0f}+{row['waiting'] or 0:.0f}"
    return (
        row["host"],
        row["state"] + (", slow" if row["slow"] else ""),
        text(row["model"]),
        text(row["profile"]),
        text(row["release"]),
        text(row["digest"]),
        text(requests),
        text(row["kv_cache"], "{:.0%}"),
        text(row["tokens_per_second"], "{:.1f}"),
        text(row["temperature"], "{:.0f} °C"),
        text(row["restarts"]),
    )


def table(rows: list[Mapping[str, Any]]) -> str:
    """All hosts as a table, with what is worth a sentence below."""
    lines = report.table([COLUMNS, *(cells(row) for row in rows)])
    for row in rows:
        if row.get("message"):
            lines += f"{row['host']}: {row['message'].removeprefix(row['host'] + ': ')}\n"
        if row.get("given_up"):
            lines += f"{row['host']}: the guard gave up: {row['given_up']}\n"
        if row.get("switch"):
            lines += f"{row['host']}: last switch {row['switch']}\n"
    return lines
