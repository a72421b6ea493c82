"""What a Spark serves, in words."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from sparkfleet_host import measured
from sparkfleet_host.bounded import LATEST, printable
from sparkfleet_host.release_format import MOST_ENGINES

from sparkfleet.planning import calibration
from sparkfleet.reporting import report
from sparkfleet.reporting.host_result import HostResult

COLUMNS = (
    *("host", "state", "model", "profile", "release", "digest", "run+wait", "KV", "tok/s", "GPU", "restarts", "drift"),
)
#: What is left out first where a terminal is narrow.
SPARE = ("profile", "restarts", "digest", "GPU")


def summary(
    host: str,
    found: Mapping[str, Any],
    drift: Sequence[str] | None = None,
    problem: str = "",
    drained: bool = False,
) -> dict[str, Any]:
    """The row of a host: plain data, for tables and for JSON, with `engines`, a row of each engine. What it has of the
    host is the sum or the worst of them, and its names are theirs. `found` is what the module spark_status returned,
    `drift` how the host differs from the inventory (None where that is not known), `problem` why it is not."""
    found = understood(found)
    releases = found["releases"]
    engines = [_engine(row) for row in found["engines"]]
    return {
        "host": host,
        "state": found["engine"],
        **{key: _names(engines, key) for key in ("model", "profile")},
        "release": releases["current"],
        "previous": releases["previous"],
        **{key: _names(engines, key) for key in ("image", "digest")},
        "healthy": found["healthy"],
        **{key: _known(sum, engines, key) for key in ("running", "waiting")},
        "kv_cache": _known(max, engines, "kv_cache"),
        "tokens_per_second": _known(sum, engines, "tokens_per_second"),
        "stream_tokens_per_second": _known(min, engines, "stream_tokens_per_second"),
        "temperature": found["gpu"]["temperature"],
        "restarts": sum(engine["restarts"] for engine in engines),
        "given_up": next((engine["given_up"] for engine in engines if engine["given_up"]), None),
        "slow": any(engine["slow"] for engine in engines),
        "engines": engines,
        "switch": switch(releases["switch"], bool(releases["switch_active"])),
        "drift": None if drift is None else list(drift),
        "problem": problem,
        "damaged": damaged(releases),
        "drained": drained,
    }


def understood(found: Mapping[str, Any]) -> dict[str, Any]:
    """What the module spark_status returned, in the form that it must have: a Spark may answer anything. A text is cut
    and printable, a number finite; what has another form counts as not known."""
    releases, gpu, switched = (
        _mapping(value)
        for value in (found.get("releases"), found.get("gpu"), _mapping(found.get("releases")).get("switch"))
    )
    journal = {
        **{key: _text(switched.get(key)) for key in ("phase", "outcome", "controller", "verb")},
        **{key: _number(switched.get(key)) for key in ("began", "from", "to")},
    }
    unreadable = releases.get("unreadable")
    return {
        "engine": _text(found.get("engine"), 30) or "unknown",
        "healthy": found.get("healthy") is True,
        "gpu": {"temperature": _number(gpu.get("temperature"))},
        "engines": [_checked_engine(_mapping(row)) for row in _listed(found.get("engines"))[:MOST_ENGINES]],
        "releases": {
            **{key: _number(releases.get(key)) for key in ("current", "previous")},
            "switch": journal if switched else None,
            "switch_active": releases.get("switch_active") is True,
            "damaged": {_text(key): _text(value) for key, value in _mapping(releases.get("damaged")).items()},
            "unreadable": [_text(line) for line in _listed(unreadable)[:100]],
        },
    }


def _checked_engine(row: Mapping[str, Any]) -> dict[str, Any]:
    guard = _mapping(row.get("guard"))
    totals = {key: _number(value) or 0 for key, value in _mapping(guard.get("restarts_total")).items()}
    return {
        **{key: _text(row.get(key)) for key in ("service", "model", "profile", "repo", "image")},
        "state": _text(row.get("state"), 30) or "unknown",
        "healthy": row.get("healthy") is True,
        "port": _number(_mapping(row.get("on_demand") or row).get("port")),
        "figures": {key: _number(value) for key, value in _mapping(row.get("figures")).items()},
        "tokens_per_second": _number(row.get("tokens_per_second")),
        "measured": next(iter(calibration.understood([row.get("measured")])), None),
        "guard": {
            "restarts_total": totals,
            "given_up": {"reason": _text(_mapping(guard.get("given_up")).get("reason")) or None},
            "tokens_per_second": _number(guard.get("tokens_per_second")),
            "slow": guard.get("slow") is True,
        },
    }


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else []


def _text(value: Any, longest: int = 600) -> str:
    return printable(value, longest) if isinstance(value, str) else ""


def _number(value: Any) -> Any:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return value if plain and abs(value) < LATEST else None  # NaN is not less


def _engine(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row of an engine, of what the module spark_status returned of it."""
    guard, figures, image = row["guard"] or {}, row["figures"], row["image"] or None
    return {
        **{key: row[key] for key in ("service", "state")},
        **{key: row[key] or None for key in ("model", "profile", "repo")},
        "image": image,
        "digest": str(image or "").partition("@sha256:")[2][:12] or None,
        "port": row["port"],
        "healthy": row["healthy"],
        "running": figures.get("num_requests_running"),
        "waiting": figures.get("num_requests_waiting"),
        "kv_cache": figures.get("kv_cache_usage_perc", figures.get("gpu_cache_usage_perc")),
        "tokens_per_second": row["tokens_per_second"],
        "stream_tokens_per_second": guard.get("tokens_per_second"),
        "restarts": sum((guard.get("restarts_total") or {}).values()),
        "given_up": (guard.get("given_up") or {}).get("reason"),
        "slow": bool(guard.get("slow")),
        "measured": row["measured"],
    }


def _names(engines: Sequence[Mapping[str, Any]], key: str) -> str | None:
    return ", ".join(dict.fromkeys(str(engine[key]) for engine in engines if engine[key])) or None


def _known(combine: Callable[[list[float]], float], engines: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [engine[key] for engine in engines if engine[key] is not None]
    return combine(values) if len(values) > 1 else values[0] if values else None


def damaged(releases: Mapping[str, Any]) -> list[str]:
    """Files of releases and of the switch that are damaged or were changed by hand, a line each. Of releases that are
    not the current one it does not matter until they are rolled back to."""
    current = str(releases["current"])
    found = [
        f"release {number}{' (current)' if number == current else ''}: {reason}"
        for number, reason in (releases.get("damaged") or {}).items()
    ]
    return [printable(line, 600) for line in [*found, *(releases.get("unreadable") or [])]]


def absent(host: str, state: str, message: str) -> dict[str, Any]:
    """The row of a host that could not be inspected."""
    empty = dict.fromkeys(
        (
            *("model", "profile", "release", "digest", "running", "waiting", "kv_cache", "tokens_per_second"),
            *("temperature", "restarts", "drift"),
        )
    )
    return {"host": host, "state": state, **empty, "slow": False, "engines": [], "drained": False, "message": message}


def rows(hosts: Sequence[HostResult]) -> list[dict[str, Any]]:
    """The rows of all hosts of a run of `status`, those that were not reached as well."""
    return [host.summary or absent(host.name, host.result, host.message) for host in hosts]


def switch(journal: Mapping[str, Any] | None, active: bool) -> str | None:
    """The switch that runs or ran last, in a line."""
    if not journal:
        return None
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(journal["began"] or 0.0))
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
        row["state"] + (", slow" if row["slow"] else "") + (", drained" if row["drained"] else ""),
        text(row["model"]),
        text(row["profile"]),
        text(row["release"]),
        text(row["digest"]),
        text(requests),
        text(row["kv_cache"], "{:.0%}"),
        text(row["tokens_per_second"], "{:.1f}"),
        text(row["temperature"], "{:.0f} °C"),
        text(row["restarts"]),
        "?" if row["drift"] is None else report.count(len(row["drift"]), "difference") if row["drift"] else "-",
    )


def totals(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The fleet in figures: how many Sparks in which state, requests, tokens a second, how many differ."""
    return {
        "sparks": len(rows),
        "states": dict(Counter(row["state"] for row in rows).most_common()),
        "running": sum(row["running"] or 0 for row in rows),
        "waiting": sum(row["waiting"] or 0 for row in rows),
        "tokens_per_second": round(sum(row["tokens_per_second"] or 0 for row in rows), 1),
        "differ": sum(bool(row.get("drift")) for row in rows),
    }


def words(found: Mapping[str, Any]) -> str:
    """`totals` in a line: "8 Sparks: 7 serving, 1 unreachable; 12 running, 3 waiting requests, 431 tokens/s"."""
    states = ", ".join(f"{count} {state}" for state, count in found["states"].items())
    differ = f"; {found['differ']} not as the inventory says" if found["differ"] else ""
    return (
        f"{report.count(found['sparks'], 'Spark')}: {states}; {found['running']:.0f} running, {found['waiting']:.0f} "
        f"waiting requests, {found['tokens_per_second']:.0f} tokens/s{differ}"
    )


def table(rows: Sequence[Mapping[str, Any]], width: int = 0) -> str:
    """All hosts as a table, without what does not fit into `width` columns (0 for any), and below it what is worth a
    sentence."""
    cut = [COLUMNS, *(line for row in rows for line in _lines(row))]
    for spare in SPARE:
        if width and max(map(len, report.table(cut).splitlines())) > width:
            place = cut[0].index(spare)
            cut = [(*line[:place], *line[place + 1 :]) for line in cut]
    notes: dict[str, list[str]] = {}
    for row in rows:
        for note in _notes(row, len(rows) == 1):
            notes.setdefault(note, []).append(row["host"])
    lines = "".join(f"{report.names(hosts)}: {printable(note)}\n" for note, hosts in notes.items())
    return report.clean(report.table(cut) + lines)


def _lines(row: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The lines of a host: one for each engine; what is of the host alone is in the first."""
    engines = row["engines"]
    if len(engines) < 2:
        return [cells(row)]
    own = ("GPU", "drift")
    lines = [cells({**row, **engine}) for engine in engines]
    rest = [tuple("" if name in own else text for name, text in zip(COLUMNS, line, strict=True)) for line in lines[1:]]
    return [lines[0], *rest]


def _notes(row: Mapping[str, Any], alone: bool) -> Iterator[str]:
    if row.get("message"):
        yield row["message"].removeprefix(f"{row['host']}: ").removeprefix(f"{row['host']} is ")
    several = len(row["engines"]) > 1
    for engine in row["engines"]:
        if engine["given_up"]:
            yield f"the guard gave up{' ' + engine['service'] if several else ''}: {engine['given_up']}"
        # Of many Sparks that is in the JSON.
        if alone and engine.get("measured") and (words := measured.words(engine["measured"])):
            yield f"measured{' of ' + engine['service'] if several else ''}: {', '.join(words)}"
    # Of many Sparks, the last switch of each is not news where it went well.
    if row.get("switch") and (alone or not row["switch"].endswith(": verified")):
        yield f"last switch {row['switch']}"
    for line in row.get("damaged") or ():
        yield f"files damaged: {line} [release-damaged]"
    if row.get("drift"):
        more = len(row["drift"]) - 1
        yield row["drift"][0] + (f", and {more} more (sparkfleet drift lists them)" if more else "")
    if row.get("problem"):
        yield f"not compared with the inventory: {row['problem'].removeprefix(row['host'] + ': ')}"


def page(rows: Sequence[Mapping[str, Any]], width: int = 0) -> str:
    """The table, with the fleet summed up below it."""
    return f"{table(rows, width)}{report.clean(words(totals(rows)))}\n"
