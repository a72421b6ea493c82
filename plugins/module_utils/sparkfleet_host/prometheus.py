# SPDX-License-Identifier: Apache-2.0
"""What Prometheus on this host knows, for the report: series as plain data, within limits."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

from .bounded import MIB, BoundsError, as_dict, as_list, as_str, printable
from .http import Client, HttpError

LIMIT = 16 * MIB  # of an answer
SERIES = 5000  # of an answer
POINTS = 96  # of a window
LABELS = 32


def figures(port: int, queries: Mapping[str, Any], seconds: float, timeout: float = 30.0) -> dict[str, Any]:
    """{at: Unix time, seconds, step, times: [Unix time], now: {name: [[labels, value]]}, window: {name: [[labels,
    [value or None at each time]]]}, fired: [[labels, [1 or None]]], firing: [{labels, annotations, since}], missing:
    [name]}.

    `queries`: {name: {expr, window: whether its last `seconds` are wanted too}}. Raises HttpError where Prometheus does
    not answer at all."""
    client = Client(f"http://127.0.0.1:{port}", timeout)
    now = int(time.time())
    step = max(int(seconds / POINTS), 15)
    end = now // step * step
    first = end - POINTS * step
    made: dict[str, Any] = {"at": now, "seconds": end - first, "step": step, "now": {}, "window": {}, "missing": []}
    made["times"] = list(range(first, end + 1, step))
    client.get("/-/ready", 5.0)
    span = {"start": first, "end": end, "step": step}
    for name, query in queries.items():
        try:
            made["now"][name] = _instant(_ask(client, "query", query=query["expr"]))
            if query["window"]:
                made["window"][name] = _lines(_ask(client, "query_range", query=query["expr"], **span), span)
        except (HttpError, BoundsError):
            made["missing"].append(name)
    try:
        alerts = 'max by (alertname, host, severity) (ALERTS{alertstate="firing"})'
        made["fired"] = _lines(_ask(client, "query_range", query=alerts, **span), span)
        made["firing"] = _alerts(client)
    except (HttpError, BoundsError):
        made["missing"].append("alerts")
    return made


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
