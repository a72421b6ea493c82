"""Dashboards for a Grafana of one's own: the fleet, one Spark, one model, as Grafana imports them.

`scripts/docs` writes them to roles/monitoring/files. Each asks which Prometheus it is to read.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

#: Grafana's schema of dashboards that all versions from 9 on read, and migrate.
SCHEMA = 37
COLUMNS, HEIGHT = 24, 8
_SOURCE = {"type": "prometheus", "uid": "${source}"}


@dataclasses.dataclass(frozen=True)
class Panel:
    """A graph: title, Grafana's unit, and an expression with a legend for each line. `$host` and `$model` are chosen
    on the dashboard."""

    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Dashboard:
    """`by`: the label that is chosen on it, "" for none."""

    name: str
    title: str
    by: str
    panels: tuple[Panel, ...]


def _of(series: str, by: str) -> str:
    return f'{series}{{{by}=~"${by}"}}'


def _quantiles(name: str, by: str, legend: str) -> tuple[tuple[str, str], ...]:
    shares = ("p50", "p95")
    return tuple((_of(f"sparkfleet:{name}_seconds:{share}_5m", by), f"{legend} {share}") for share in shares)


def _engine(by: str) -> tuple[Panel, ...]:
    legend = "{{host}} {{model}}"
    return (
        Panel("Generated tokens a second", "short", ((_of("sparkfleet:generation_tokens:rate1m", by), legend),)),
        Panel("Prompt tokens a second", "short", ((_of("sparkfleet:prompt_tokens:rate1m", by), legend),)),
        Panel(
            "Requests",
            "short",
            (
                (_of("sparkfleet:requests_running", by), f"{legend} running"),
                (_of("sparkfleet:requests_waiting", by), f"{legend} waiting"),
            ),
        ),
        Panel("KV cache in use", "percentunit", ((_of("sparkfleet:kv_cache_usage_ratio", by), legend),)),
        Panel("Time to the first token", "s", _quantiles("time_to_first_token", by, legend)),
        Panel("Time between two tokens", "s", _quantiles("inter_token_latency", by, legend)),
        Panel("Duration of requests", "s", _quantiles("request_duration", by, legend)),
        Panel("Prefix cache hits", "percentunit", ((_of("sparkfleet:prefix_cache_hit_ratio:5m", by), legend),)),
        Panel("Preemptions a second", "short", ((_of("sparkfleet:preemptions:rate5m", by), legend),)),
    )


DASHBOARDS = (
    Dashboard(
        "fleet",
        "Sparkfleet: fleet",
        "",
        (
            Panel(
                "Engines that serve",
                "short",
                (("sum(sparkfleet_engine_up)", "serve"), ("count(sparkfleet_engine_up)", "all")),
            ),
            Panel(
                "Generated tokens a second",
                "short",
                (("sum by (model) (sparkfleet:generation_tokens:rate1m)", "{{model}}"),),
            ),
            Panel(
                "Requests",
                "short",
                (
                    ("sum by (model) (sparkfleet:requests_running)", "{{model}} running"),
                    ("sum by (model) (sparkfleet:requests_waiting)", "{{model}} waiting"),
                ),
            ),
            Panel(
                "Time to the first token, p95",
                "s",
                (("max by (model) (sparkfleet:time_to_first_token_seconds:p95_5m)", "{{model}}"),),
            ),
            Panel("Sparks up behind the gateway", "short", (("sparkfleet:gateway_servers_up", "{{proxy}}"),)),
            Panel(
                "Answers of the gateway a second",
                "short",
                (("sum by (proxy, code) (sparkfleet:gateway_requests:rate5m)", "{{proxy}} {{code}}"),),
            ),
            Panel("Temperature", "celsius", (("max by (host) (sparkfleet_gpu_temperature_celsius)", "{{host}}"),)),
            Panel("Memory available", "bytes", (("sparkfleet:memory_available_bytes", "{{host}}"),)),
            Panel("Restarts", "short", (("sum by (host) (sparkfleet_engine_restarts_total)", "{{host}}"),)),
        ),
    ),
    Dashboard(
        "spark",
        "Sparkfleet: one Spark",
        "host",
        (
            *_engine("host"),
            Panel(
                "State of the engine",
                "short",
                (('sparkfleet_engine_state{host=~"$host"} == 1', "{{service}} {{state}}"),),
            ),
            Panel("Memory available", "bytes", ((_of("sparkfleet:memory_available_bytes", "host"), "{{host}}"),)),
            Panel("Temperature", "celsius", ((_of("sparkfleet_gpu_temperature_celsius", "host"), "{{host}}"),)),
            Panel("Power", "watt", ((_of("sparkfleet_gpu_power_watts", "host"), "{{host}}"),)),
            Panel("Clock", "hertz", ((_of("sparkfleet_gpu_sm_clock_hertz", "host"), "{{host}}"),)),
            Panel("Slowed down", "short", ((_of("sparkfleet_gpu_throttled", "host"), "{{reason}}"),)),
            Panel("Disks free", "percentunit", ((_of("sparkfleet:disk_free_ratio", "host"), "{{device}}"),)),
        ),
    ),
    Dashboard("model", "Sparkfleet: one model", "model", _engine("model")),
)


def expressions() -> dict[str, str]:
    """Every expression of every dashboard by where it stands, with each choice set to all."""
    return {
        f"{board.name}: {panel.title} ({legend})": expr.replace("$host", ".*").replace("$model", ".*")
        for board in DASHBOARDS
        for panel in board.panels
        for expr, legend in panel.lines
    }


def as_json(board: Dashboard) -> str:
    """A dashboard as Grafana imports it."""
    width = COLUMNS // 3
    data = {
        "uid": f"sparkfleet-{board.name}",
        "title": board.title,
        "tags": ["sparkfleet"],
        "schemaVersion": SCHEMA,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": [_source(), *([_choice(board.by)] if board.by else [])]},
        "panels": [
            {
                "id": place + 1,
                "type": "timeseries",
                "title": panel.title,
                "datasource": _SOURCE,
                "gridPos": {"x": place % 3 * width, "y": place // 3 * HEIGHT, "w": width, "h": HEIGHT},
                "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
                "targets": [
                    {"refId": chr(ord("A") + index), "datasource": _SOURCE, "expr": expr, "legendFormat": legend}
                    for index, (expr, legend) in enumerate(panel.lines)
                ],
            }
            for place, panel in enumerate(board.panels)
        ],
    }
    return json.dumps(data, indent=1) + "\n"


def _source() -> dict[str, Any]:
    return {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _choice(label: str) -> dict[str, Any]:
    query = f"label_values(sparkfleet:requests_running, {label})"
    return {
        **{"name": label, "type": "query", "datasource": _SOURCE, "definition": query},
        **{"query": {"query": query, "refId": "A"}, "refresh": 2, "sort": 1, "multi": True, "includeAll": True},
        **{"allValue": ".*", "current": {"text": "All", "value": "$__all"}},
    }
