"""Logs of real Sparks (docs/logged-runs.yml) and what the planner says of them: for tests and docs."""

from __future__ import annotations

from typing import Any

import yaml

from sparkfleet.planning import memory_plan, vllm_versions
from sparkfleet.planning.catalog import Attention, Card, Licence, Question, Shape, Weights
from tests.unit import ROOT

FILE = ROOT / "docs" / "logged-runs.yml"


def load() -> dict[str, Any]:
    """The file as data."""
    data: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return data


def plan(run: dict[str, Any], **change: Any) -> memory_plan.Plan:
    """The plan for a logged run, on a host where nothing else needs memory."""
    arguments = {**run["arguments"], **change}
    attention = tuple(Attention(**entry) for entry in run["attention"])
    shape = Shape(
        layers=sum(entry.layers for entry in attention),
        context=int(arguments["max_model_len"]),
        attention=attention,
        **run["shape"],
    )
    card = Card(
        name=run["name"],
        service="logged",
        repo="logged/run",
        revision="main",
        image="",
        verified=True,
        licence=Licence("", False, ""),
        weights=Weights(download_gib=run["loaded_gib"], read_gb_per_token=1.0),
        shape=shape,
        tool_call_parser="",
        arguments=arguments,
        profiles={"throughput": {}},
        verify=Question("", "", "", ""),
        measured=(),
        source=FILE,
    )
    host = memory_plan.Memory(run["total_gib"], run["total_gib"], reserve=-100)
    version = vllm_versions.Engine(vllm_versions.parse_version(run["engine"]))
    return memory_plan.make(card, arguments, version=version, memory=host)


def tables() -> str:
    """Runs and plans side by side, as Markdown."""
    rows = [
        "| run | vLLM | share x total | KV cache logged | planned | error | tokens logged | planned | error | for |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for run in load()["runs"]:
        made, logged = plan(run), run["logged"]
        gib, tokens = logged["kv_cache_gib"], logged.get("kv_cache_tokens")
        mark = "" if run["total"] == "told" else " (assumed)"
        rows.append(
            f"| {run['name']} | {run['engine']} | {made.gpu_memory_utilization:.2f} x {run['total_gib']}{mark} "
            f"| {gib:.2f} GiB | {made.kv_cache_gib:.2f} GiB | {made.kv_cache_gib / gib - 1:+.1%} "
            + (
                f"| {tokens:,} | {made.kv_cache_tokens:,} | {made.kv_cache_tokens / tokens - 1:+.1%} "
                if tokens
                else "| not compared | | "
            )
            + f"| {run['use']} |"
        )
    rows += ["", "Sources: " + "; ".join(f"{run['name']}: {run['source']}" for run in load()["runs"]) + "."]
    return "\n".join(rows) + "\n"
