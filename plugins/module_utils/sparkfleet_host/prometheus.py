# SPDX-License-Identifier: Apache-2.0
"""What Prometheus on this host knows, for the report: series as plain data, within limits."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

from .bounded import MIB, BoundsError, as_dict, as_list, as_str, printable
from .http import Client, HttpError

LIMIT = 16 * MIB  # of an answer
SERIES = 5000  # of an answer
POINTS = 96  # of a window, at most
LABELS = 32
GRAIN = 15  # seconds between two samples, and between two evaluations of the rules
PART = 12 * 3600  # seconds that are added up at a time: Prometheus has each value of them in memory
FIRING = 'max by (alertname, host, severity) (ALERTS{{alertstate="firing"}}{})'


def figures(
    port: int, queries: Mapping[str, Any], seconds: float, totals: Mapping[str, str], timeout: float = 30.0
) -> dict[str, Any]:
    """{at: Unix time, seconds, step, times: [Unix time], now: {name: [[labels, value]]}, window: {name: [[labels,
    [mean of the step that ends at each time, or None]]]}, totals: {name: [[labels, {sum, seconds}]]}, fired: [[labels,
    {times, seconds, first}]], firing: [{labels, annotations, since}], missing: [name]}.

    `queries`: {name: {expr, window: whether its last `seconds` are wanted too}}. `totals`: {name: expr}, each added up
    over `seconds` (of watts the sum is joules), with the seconds in which it had a value. Whatever is said of a time
    is made of all samples of it: what lasts for less than a step is not lost. Raises HttpError where Prometheus does
    not answer at all."""
    client = Client(f"http://127.0.0.1:{port}", timeout)
    now = int(time.time())
    step = max(math.ceil(seconds / POINTS / GRAIN), 1) * GRAIN
    count = max(int(seconds // step), 1)
    end = now // GRAIN * GRAIN
    first = end - count * step
    made: dict[str, Any] = {"at": now, "seconds": end - first, "step": step, "now": {}, "window": {}, "totals": {}}
    made.update(times=list(range(first + step, end + 1, step)), fired=[], firing=[], missing=[])
    client.get("/-/ready", 5.0)
    span = {"start": first + step, "end": end, "step": step}
    every = max(step // 60 // GRAIN, 1) * GRAIN
    for name, query in queries.items():
        try:
            made["now"][name] = _instant(_ask(client, "query", query=query["expr"]))
            if query["window"]:
                mean = f"avg_over_time({_within(query['expr'], step, every)})"
                made["window"][name] = _lines(_ask(client, "query_range", query=mean, **span), span)
        except (HttpError, BoundsError):
            made["missing"].append(name)
    for name, expr in totals.items():
        try:
            made["totals"][name] = _total(client, expr, first, end)
        except (HttpError, BoundsError):
            made["missing"].append(f"{name}, added up")
    try:
        made["fired"] = _fired(client, first, end)
        made["firing"] = _alerts(client)
    except (HttpError, BoundsError):
        made["missing"].append("alerts")
    return made


def _within(expr: str, seconds: int, every: int = GRAIN) -> str:
    """The values of an expression in the seconds before, without NaN. Prometheus before version 3 counts both ends of a
    range: one second less, and each moment is in one range alone."""
    return f"(({expr}) > -Inf)[{seconds - 1}s:{every}s]"


def _parts(first: int, end: int) -> Iterator[tuple[int, int]]:
    """Length and end of each part of a time."""
    for start in range(first, end, PART):
        yield min(PART, end - start), min(start + PART, end)


def _total(client: Client, expr: str, first: int, end: int) -> list[list[Any]]:
    found: dict[tuple[tuple[str, str], ...], list[Any]] = {}
    for length, at in _parts(first, end):
        for key, function in (("sum", "sum_over_time"), ("seconds", "count_over_time")):
            query = f"{function}({_within(expr, length)})"
            for labels, value in _instant(_ask(client, "query", query=query, time=at)):
                entry = found.setdefault(tuple(sorted(labels.items())), [labels, {"sum": 0.0, "seconds": 0.0}])
                entry[1][key] += value * GRAIN
    return list(found.values())


def _fired(client: Client, first: int, end: int) -> list[list[Any]]:
    """Alerts that fired within a time: how often (one that fired at its start counts), for how long, and since when."""
    now, before = FIRING.format(""), FIRING.format(f" offset {GRAIN}s")
    found: dict[tuple[tuple[str, str], ...], list[Any]] = {}

    def entries(query: str, at: int) -> Iterator[tuple[dict[str, Any], float]]:
        for labels, value in _instant(_ask(client, "query", query=query, time=at)):
            empty = {"times": 0, "seconds": 0, "first": end}
            yield found.setdefault(tuple(sorted(labels.items())), [labels, empty])[1], value

    for entry, _ in entries(f"{now} and {before}", first + GRAIN):
        entry["times"] += 1
    for length, at in _parts(first, end):
        for entry, value in entries(f"count_over_time({_within(now, length)})", at):
            entry["seconds"] += round(value) * GRAIN
        for entry, value in entries(f"count_over_time({_within(f'{now} unless {before}', length)})", at):
            entry["times"] += round(value)
        for entry, value in entries(f"min_over_time({_within(f'{now} * time()', length)})", at):
            entry["first"] = min(entry["first"], round(value))
    return list(found.values())


def _ask(client: Client, path: str, **words: Any) -> list[Any]:
    answer = client.get(f"/api/v1/{path}?{urlencode(words)}", limit=LIMIT)
    data = as_dict(answer.json(), "the answer")
    if answer.status != 200 or data.get("status") != "success":
        raise BoundsError(f"Prometheus refused {words.get('query')}")
    return as_list(as_dict(data.get("data"), "data").get("result"), "result", SERIES)


def _labels(metric: Any) -> dict[str, str]:
    pairs = list(as_dict(metric, "metric").items())[:LABELS]
    return {printable(name, 100): printable(as_str(value, name), 300) for name, value in pairs}


def _number(text: Any) -> float | None:
    """A sample's value; None for what is not finite."""
    try:
        value = float(as_str(text, "a value", 400))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _instant(result: Sequence[Any]) -> list[list[Any]]:
    made = []
    for item in result:
        value = as_list(as_dict(item, "a sample").get("value"), "value", 2)
        if len(value) == 2 and (number := _number(value[1])) is not None:
            made.append([_labels(item.get("metric")), number])
    return made


def _lines(result: Sequence[Any], span: Mapping[str, int]) -> list[list[Any]]:
    made = []
    count = (span["end"] - span["start"]) // span["step"] + 1
    for item in result:
        line: list[float | None] = [None] * count
        for pair in as_list(as_dict(item, "a series").get("values"), "values", count + 1):
            at, text = (*as_list(pair, "a point", 2), None, None)[:2]
            place = round((float(at) - span["start"]) / span["step"]) if isinstance(at, int | float) else -1
            if 0 <= place < count:
                line[place] = _number(text)
        made.append([_labels(item.get("metric")), line])
    return made


def _alerts(client: Client) -> list[dict[str, Any]]:
    data = as_dict(client.get("/api/v1/alerts", limit=LIMIT).json(), "the answer")
    made: list[dict[str, Any]] = []
    for item in as_list(as_dict(data.get("data"), "data").get("alerts"), "alerts", SERIES):
        alert = as_dict(item, "an alert")
        if alert.get("state") == "firing":
            since = printable(as_str(alert.get("activeAt") or "", "activeAt", 100))
            made.append({"labels": _labels(alert.get("labels")), "annotations": _labels(alert.get("annotations"))})
            made[-1]["since"] = since
    return made
