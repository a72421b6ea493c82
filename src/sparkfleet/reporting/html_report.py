"""`sparkfleet report`: the fleet on paper. One HTML file without scripts that loads nothing, of what the Sparks, their
Prometheus and this controller know; what is not known is left out or said."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from sparkfleet_host import bounded
from sparkfleet_host.bounded import BoundsError, printable

from sparkfleet.performance import records
from sparkfleet.reporting import report, status_page, svg

HERE = Path(__file__).parent
GIB = 1024**3
#: Benchmarks of a host that are drawn, the newest; events and alerts that are listed.
BENCHMARKS, EVENTS, ALERTS = 3, 100, 100
MOST_LINES = 6
NONE = "\N{EN DASH}"
#: Beyond it a number is not one that was measured.
LARGEST = 1e15
PART_NAMES = {"weights": "weights", "activations": "activations", "runtime": "runtime", "cuda_graphs": "CUDA graphs"}
PART_NAMES["kv_cache"] = "KV cache"


@dataclasses.dataclass(frozen=True)
class About:
    """When (Unix time) and by whom, of which inventory, by which version; `price` of a kWh, None for no costs."""

    at: float
    by: str
    inventory: str
    version: str
    price: float | None = None


def document(
    about: About,
    rows: Sequence[Mapping[str, Any]],
    shown: Mapping[str, Mapping[str, Any]],
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    figures: Mapping[str, Any],
    state: Path,
) -> str:
    """The report as HTML. `rows` are those of `sparkfleet status`, `shown` what fleet.json has of each Spark,
    `histories` their events, `figures` what the module prometheus_figures returned ({} without monitoring), `state` the
    controller's folder, with benchmarks and verifications."""
    totals = status_page.totals(rows)
    made = [_row(row, shown.get(row["host"], {})) for row in rows]
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["moment"] = moment
    environment.filters["figure"] = figure
    environment.filters["code"] = code
    template = environment.from_string((HERE / "report.html.j2").read_text(encoding="utf-8"))
    return template.render(
        about=about,
        css=(HERE / "colours.css").read_text(encoding="utf-8") + (HERE / "report.css").read_text(encoding="utf-8"),
        summary=status_page.words(totals),
        totals=totals,
        serving=sum(row["tone"] == "good" for row in made),
        rows=made,
        memory=_memory(rows, shown, figures),
        parts=PART_NAMES,
        charts=_charts(figures),
        benchmarks=_benchmarks(state, [row["host"] for row in rows]),
        verifications=[_verified(state, row["host"], histories.get(row["host"], ())) for row in rows],
        events=_events(histories),
        firing=_firing(figures),
        fired=_fired(figures),
        drift=[row for row in rows if row.get("drift") or row.get("problem")],
        costs=_costs(figures, about.price),
        figures=figures,
        hours=report.count(round(figures["seconds"] / 3600), "hour") if figures else "",
    )


def moment(at: float | None) -> str:
    """A time of the controller's clock; a dash for none, and for one that no clock shows."""
    with contextlib.suppress(OSError, OverflowError, ValueError):
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(at)) if at else NONE
    return NONE


def figure(value: Any, digits: int = 0, unit: str = "") -> str:
    """A number for people; a dash for none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        return NONE
    return f"{value:,.{digits}f}{unit}"


def code(text: str) -> Markup:
    """Text in which `words` are code."""
    parts = text.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if place % 2 else part for place, part in enumerate(parts)
    )


#: An engine that starts on demand is well asleep.
TONES = {"serving": "good", "asleep": "good", "loading": "busy", "switching": "busy"}


def _row(row: Mapping[str, Any], shown: Mapping[str, Any]) -> dict[str, Any]:
    tone = TONES.get(row["state"], "bad")
    return {**row, "tone": tone, "limit": shown.get("limit"), "image": next(iter(_images(shown)), "")}


def _images(shown: Mapping[str, Any]) -> list[str]:
    return [engine["image"] for engine in shown.get("engines") or () if engine.get("image")]


# -- memory ------------------------------------------------------------------------------------------------------------


def _now(figures: Mapping[str, Any], name: str) -> dict[str, float]:
    """Samples of now by host."""
    return {labels["host"]: value for labels, value in figures.get("now", {}).get(name, ()) if "host" in labels}


def _memory(
    rows: Sequence[Mapping[str, Any]], shown: Mapping[str, Mapping[str, Any]], figures: Mapping[str, Any]
) -> list[dict[str, Any]]:
    total, free = _now(figures, "memory_total"), _now(figures, "memory_free")
    made = []
    for row in rows:
        host, found = row["host"], shown.get(row["host"], {}).get("memory")
        if not found:
            continue
        planned = sum(found["planned"].values())
        length = max(total.get(host, 0.0) / GIB, found["total"], planned)
        used = (total[host] - free[host]) / GIB if host in total and host in free else None
        words = f"{planned:.1f} of {length:.1f} GiB planned" + (f", {used:.1f} in use on the host" if used else "")
        parts = [(name, size) for name, size in found["planned"].items() if size]
        # What the log names, against the plan of the same parts.
        both = [
            (found["planned"][name], found["logged"][name]) for name in found["logged"] if found["planned"].get(name)
        ]
        sums = [sum(pair) for pair in zip(*both, strict=True)] or [0.0, 0.0]
        made.append(
            {
                **{"host": host, "planned": found["planned"], "logged": found["logged"], "engines": planned},
                **{"total": length, "used": used, "bar": svg.bar(parts, length, used, words)},
                "error": (sums[1] - sums[0]) / sums[0] if sums[0] else None,
            }
        )
    return made


# -- time --------------------------------------------------------------------------------------------------------------


def _series(figures: Mapping[str, Any], name: str, label: str) -> list[svg.Line]:
    """The lines of a window by a label, the largest first; beyond MOST_LINES they are left out, and that is said."""
    found = figures.get("window", {}).get(name, ())
    times = figures.get("times", ())
    made = [
        svg.Line(labels.get(label, "all"), list(zip(times, values, strict=False)))
        for labels, values in found
        if any(value is not None for value in values)
    ]
    made.sort(key=lambda line: -sum(value or 0.0 for _, value in line.points))
    return made[:MOST_LINES]


def _charts(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    if not figures:
        return []
    times = figures["times"]
    form = "%H:%M" if figures["seconds"] <= 2 * 86400 else "%d %b"
    every = max(len(times) // 6, 1)
    ticks = [(at, time.strftime(form, time.localtime(at))) for at in times[every // 2 :: every]]
    requests = [
        dataclasses.replace(line, label=word)
        for name, word in (("fleet_running", "running"), ("fleet_waiting", "waiting"))
        for line in _series(figures, name, "none")
    ]
    made = (
        ("Generated tokens a second, by model", _series(figures, "model_tokens", "model"), "{:,.0f}".format),
        ("Requests", requests, "{:,.0f}".format),
        ("Time to the first token, p95, by model", _series(figures, "first_token", "model"), "{:.2g} s".format),
        ("Temperature, the hottest GPUs", _series(figures, "temperature", "host"), "{:.0f} °C".format),
    )
    return [
        {"title": title, "lines": lines, "svg": svg.lines(title, lines, svg.Scale(ticks, show=show))}
        for title, lines, show in made
        if lines
    ]


# -- benchmarks --------------------------------------------------------------------------------------------------------


def _benchmarks(state: Path, hosts: Sequence[str]) -> list[dict[str, Any]]:
    """The newest benchmarks of each host that `sparkfleet bench` has kept, as curves over the streams at a time."""
    made = [_benchmark(host, record) for host in hosts for record in records.of_host(state, host)[-BENCHMARKS:]]
    return [item for item in made if item["curves"]]


def _benchmark(host: str, record: records.Record) -> dict[str, Any]:
    loads: dict[str, dict[int, list[Mapping[str, Any]]]] = defaultdict(dict)
    for (shape, streams), rows in records.points(record).items():
        if streams:
            loads[shape][streams] = rows
    texts = ("model", "profile", "vllm", "image", "gpu", "id")
    return {
        "host": host,
        **{key: record[key] for key in (*texts, "release", "at", "complete")},
        "curves": [_curve(shape, points, record["limit_tok_s"]) for shape, points in loads.items()],
        "limit": record["limit_tok_s"],
        "published": record["published_tok_s"],
    }


def _curve(shape: str, points: Mapping[int, Sequence[Mapping[str, Any]]], limit: float | None) -> dict[str, Any]:
    keys = (
        *("tokens_per_second", "stream_tokens_per_second", "ttft_ms", "ttft_p50_ms", "ttft_p95_ms", "itl_p95_ms"),
        *("joules_per_token", "temperature_c"),
    )
    rows: list[dict[str, Any]] = []
    for streams in sorted(points):
        figures: dict[str, Any] = {key: records.mean(points[streams], key) for key in keys}
        stream = figures["stream_tokens_per_second"]
        figures["share"] = stream / limit if stream is not None and limit else None
        rows.append({"streams": streams, "repetitions": len(points[streams]), **figures})
    ticks = [(float(row["streams"]), str(row["streams"])) for row in rows]
    scale = svg.Scale(ticks, math.log2, lambda value: f"{value:,.4g}")
    total = [svg.Line("all streams", [(row["streams"], row["tokens_per_second"]) for row in rows], True)]
    one = [svg.Line("one stream", [(row["streams"], row["stream_tokens_per_second"]) for row in rows], True)]
    mark = (limit, f"limit by memory bandwidth: {limit:,.1f} tokens/s a stream") if limit else None
    return {
        "shape": shape,
        "rows": rows,
        "total": svg.lines(f"{shape}: tokens a second of all streams", total, scale, size=(420, 220)),
        "stream": svg.lines(f"{shape}: tokens a second of one stream", one, scale, mark, size=(420, 220)),
    }


# -- what happened -----------------------------------------------------------------------------------------------------


def _verified(state: Path, host: str, events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The last verification of a host that this controller saw, and the last one that its own records name."""
    made: dict[str, Any] = {"host": host, "reports": [], "own": None}
    made["own"] = next((event for event in reversed(events) if event["event"] in ("verified", "failed")), None)
    for path in sorted((state / "reports").glob(f"{host}.json")) + sorted(
        (state / "reports").glob(f"{host}-vllm-*.json")
    ):
        with contextlib.suppress(OSError, BoundsError):
            data = bounded.read_json(path, follow=False)
            checks = [item for item in bounded.as_list(data.get("checks"), "checks", 200) if isinstance(item, dict)]
            made["reports"].append(
                {
                    "time": printable(str(data.get("time") or ""), 40).replace("T", " ").removesuffix("+00:00"),
                    "model": printable(str(data.get("model") or ""), 200),
                    "verified": data.get("verified") is True,
                    "passed": sum(item.get("ok") is True for item in checks),
                    "checks": len(checks),
                    "failed": [printable(str(item.get("name")), 80) for item in checks if item.get("ok") is not True],
                    "answer": printable(str(data.get("answer") or ""), 200),
                }
            )
    return made


def _events(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    every = [{"host": host, **event} for host, events in histories.items() for event in events]
    return sorted(every, key=lambda event: -float(event["at"]))[:EVENTS]


def _firing(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = [
        {
            "name": alert["labels"].get("alertname", ""),
            "severity": alert["labels"].get("severity", ""),
            "summary": alert["annotations"].get("summary", ""),
            "description": alert["annotations"].get("description", ""),
            "since": alert["since"][:16].replace("T", " "),
        }
        for alert in figures.get("firing", ())
    ]
    return sorted(found, key=lambda alert: (alert["severity"] != "critical", alert["name"]))[:ALERTS]


def _fired(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Alerts that fired within the window: how often, and for how long in all."""
    made = [
        {
            **{"name": labels.get("alertname", ""), "host": labels.get("host", NONE)},
            **{"severity": labels.get("severity", ""), "times": found["times"]},
            **{"first": found["first"], "minutes": found["seconds"] / 60},
        }
        for labels, found in figures.get("fired", ())
        if found["seconds"]
    ]
    made.sort(key=lambda item: (item["severity"] != "critical", -item["minutes"]))
    return made[:ALERTS]


def _costs(figures: Mapping[str, Any], price: float | None) -> dict[str, Any] | None:
    """Energy of the GPUs and tokens of the window, by host and in all; None where power was not measured."""
    power, tokens = (
        {labels.get("host", ""): total for labels, total in figures.get("totals", {}).get(name, ())}
        for name in ("power", "tokens")
    )
    made = []
    for host in sorted(power, key=report.natural):
        count = tokens[host]["sum"] if host in tokens else 0.0
        made.append({"host": host, **_cost(power[host]["seconds"] / 3600, power[host]["sum"] / 3.6e6, count, price)})
    if not made:
        return None
    hours, kwh, count = (sum(row[key] for row in made) for key in ("hours", "kwh", "tokens"))
    total = _cost(hours, kwh, count, price)
    return {"rows": made, "total": total, "price": price}


def _cost(hours: float, kwh: float, tokens: float, price: float | None) -> dict[str, Any]:
    millions = tokens / 1e6
    return {
        "hours": hours,
        "kwh": kwh,
        "tokens": tokens,
        "joules": kwh * 3.6e6 / tokens if tokens else None,
        "cost": kwh * price if price is not None else None,
        "million": kwh * price / millions if price is not None and millions else None,
    }
