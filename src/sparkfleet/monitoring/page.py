"""The status page: what it asks Prometheus, and what deployments write for it (fleet.json).

The page (web/) is static. It reads Prometheus with the expressions below, and no others: `scripts/docs` writes them to
web/src/queries.json, and the gateway passes only these. What Prometheus cannot know (models by name, the memory plan,
drift, events, the waves of a rollout) is in fleet.json, next to the page.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sparkfleet_host.bounded import printable

#: Events of a Spark that are kept for the page, the newest ones.
EVENTS = 6
#: Lines of drift and of damage that are kept.
LINES = 10
#: Parts of the memory plan, in the order of the bar: key here, key of the plan.
PARTS = (
    ("weights", "weights_gib"),
    ("activations", "activation_gib"),
    ("runtime", "runtime_gib"),
    ("cuda_graphs", "cuda_graphs_gib"),
    ("kv_cache", "kv_cache_gib"),
)


@dataclasses.dataclass(frozen=True)
class Query:
    """An expression of the page: `name` in its code; `text`, what it shows there. `window` is true where the page asks
    for its last hours too."""

    name: str
    expr: str
    text: str
    window: bool = False


QUERIES = (
    Query("state", 'sparkfleet_engine_state{job="guard"} == 1', "health: the state that the guard sees"),
    Query("up", 'min by (host) (up{job="engine"})', "health, of a Spark without a guard: whether /metrics answers"),
    Query("release", 'max by (host) (sparkfleet_release{job="guard"})', "release"),
    Query("running", "sum by (host) (sparkfleet:requests_running)", "requests in the batch"),
    Query("waiting", "sum by (host) (sparkfleet:requests_waiting)", "requests in the queue"),
    Query("tokens", "sum by (host) (sparkfleet:generation_tokens:rate1m)", "generated tokens a second", True),
    Query("kv", "max by (host) (sparkfleet:kv_cache_usage_ratio)", "share of the KV cache in use", True),
    Query("temperature", "max by (host) (sparkfleet_gpu_temperature_celsius)", "temperature of the GPU", True),
    Query("power", "max by (host) (sparkfleet_gpu_power_watts)", "power draw of the GPU", True),
    Query("throttled", "max by (host) (sparkfleet_gpu_throttled)", "whether the GPU is slowed down"),
    Query("restarts", 'sum by (host) (sparkfleet_engine_restarts_total{job="guard"})', "restarts by the guard"),
    Query("memory_total", 'max by (host) (node_memory_MemTotal_bytes{job="node"})', "memory bar: its length"),
    Query("memory_free", "min by (host) (sparkfleet:memory_available_bytes)", "memory bar: what is measured", True),
    Query("model_tokens", "sum by (model) (sparkfleet:generation_tokens:rate1m)", "chart of tokens a second", True),
    Query("fleet_running", "sum(sparkfleet:requests_running)", "chart of requests", True),
    Query("fleet_waiting", "sum(sparkfleet:requests_waiting)", "chart of requests", True),
    Query(
        "first_token",
        "max by (model) (sparkfleet:time_to_first_token_seconds:p95_5m)",
        "chart of the time to the first token",
        True,
    ),
    Query("gateway", "sum by (host, proxy) (sparkfleet:gateway_servers_up)", "Sparks behind each gateway"),
)


def expressions() -> dict[str, str]:
    """Every expression of the page, by what it shows."""
    return {f"status page: {query.name}": query.expr for query in QUERIES}


def queries() -> dict[str, dict[str, Any]]:
    """The expressions as plain data: {name: {expr, window}}."""
    return {query.name: {"expr": query.expr, "window": query.window} for query in QUERIES}


def totals() -> dict[str, str]:
    """What the report adds up over its hours, by name. It asks on the monitor itself, not through a gateway."""
    of = {query.name: query.expr for query in QUERIES}
    # Tokens without their energy would make it look cheap.
    return {"power": of["power"], "tokens": f"{of['tokens']} and on (host) {of['power']}"}


def queries_file() -> str:
    """The same, as the page's code imports it."""
    return json.dumps(queries(), indent=2) + "\n"


def spark(summary: Mapping[str, Any], plan: Mapping[str, Any] | None, events: Sequence[Any]) -> dict[str, Any]:
    """What fleet.json says of a Spark. `summary` is its row of `sparkfleet status`, `plan` the plan of the run (None
    where it cannot be planned), `events` those of its history. Nothing in it changes while nothing happens."""
    engines = summary["engines"]
    planned = {engine["service"]: engine.get("memory") for engine in (plan or {}).get("engines") or ()}
    return {
        "release": summary["release"],
        "previous": summary.get("previous"),
        "engines": [
            {key: engine[key] for key in ("service", "model", "profile", "repo", "image", "port")} for engine in engines
        ],
        "memory": memory([_memory(engine, planned.get(engine["service"])) for engine in engines]),
        "limit": _limit([planned.get(engine["service"]) for engine in engines]),
        "drift": None if summary["drift"] is None else [printable(line, 300) for line in summary["drift"][:LINES]],
        "problem": printable(summary.get("problem") or "", 600),
        "damaged": [printable(line, 300) for line in (summary.get("damaged") or ())[:LINES]],
        "drained": bool(summary.get("drained")),
        "events": [dict(event) for event in events[-EVENTS:]],
    }


def _memory(engine: Mapping[str, Any], plan: Mapping[str, Any] | None) -> dict[str, Any]:
    """Plan and log of the engine that serves: what was planned for the release, else for the inventory."""
    record = engine.get("measured") or {}
    return {"planned": record.get("planned") or plan or {}, "figures": record.get("figures") or {}, "plan": plan or {}}


def memory(engines: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The memory of a Spark in GiB, over all its engines: {total, planned: {part: GiB}, logged: {part: GiB}}; None
    where nothing is planned. `logged` is what the engines' own logs say, of the parts that they name."""
    planned: dict[str, float] = {}
    logged: dict[str, float] = {}
    total = 0.0
    for engine in engines:
        total = max(total, _number(engine["planned"].get("total_gib")), _number(engine["plan"].get("total_gib")))
        for name, key in PARTS:
            # A record has the parts that the log can be compared with; the plan has the rest.
            value = engine["planned"].get(key, engine["plan"].get(key))
            planned[name] = round(planned.get(name, 0.0) + _number(value), 2)
            if key in engine["figures"]:
                logged[name] = round(logged.get(name, 0.0) + _number(engine["figures"][key]), 2)
    if not total or not any(planned.values()):
        return None
    return {"total": round(total, 2), "planned": planned, "logged": logged}


def _limit(plans: Sequence[Mapping[str, Any] | None]) -> float | None:
    """Tokens a second that one stream cannot exceed, of a Spark with one engine."""
    value = _number((plans[0] or {}).get("decode_tok_s_limit")) if len(plans) == 1 else 0.0
    return value or None


def _number(value: Any) -> float:
    plain = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if plain else 0.0


def rollout(
    schedule: Mapping[str, Any], wave: int, go: bool, done: Collection[str], failed: Collection[str]
) -> dict[str, Any]:
    """A rollout as fleet.json has it. `schedule` is what the action rollout_schedule returned, `wave` the one of this
    moment, from 1, and `go` whether it may start; `done` serve, `failed` do not.

    A Spark of an earlier wave that is in neither did not come to its end, whatever kept it."""
    waves = [[str(name) for name in names] for names in schedule["waves"]]
    reached = [name for names in waves[: wave if go else wave - 1] for name in names]
    lost = {name for names in waves[: wave - 1] for name in names if name not in done}
    bad = {name for name in failed if name in reached} | lost
    over = all(name in done or name in bad for name in reached)
    stops = bool(bad) and schedule["on_failure"] == "stop"
    return {
        "waves": waves,
        "labels": [str(label) for label in schedule["labels"]],
        "wave": wave if go else wave - 1,
        "done": [name for name in reached if name in done],
        "failed": [name for name in reached if name in bad],
        "ended": over and (stops or not go or wave == len(waves)),
    }
