"""Logs of real Sparks (docs/logged-runs.yml) and what the planner says of them: for tests and docs."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import yaml
from sparkfleet_host.bounded import GIB

from sparkfleet.planning import catalog, kv_layout, memory_plan, vllm_versions
from sparkfleet.planning.catalog import Attention, Card, Licence, Question, Shape, Weights
from tests.unit import ROOT

FILE = ROOT / "docs" / "logged-runs.yml"
GPU_FILE = ROOT / "docs" / "gpu-runs.yml"
ORACLE_FILE = ROOT / "tests" / "unit" / "data" / "oracle.json"


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


def load_gpu_runs() -> list[dict[str, Any]]:
    """The runs of a CUDA engine with dummy weights (docs/gpu-runs.yml)."""
    runs: list[dict[str, Any]] = yaml.safe_load(GPU_FILE.read_text(encoding="utf-8"))["runs"]
    return [run for run in runs if run["started"]]


def gpu_plan(run: dict[str, Any], **change: Any) -> memory_plan.Plan:
    """The plan for a run of docs/gpu-runs.yml, on a GPU that nothing else uses."""
    environment = {name: str(value) for name, value in run["environment"].items()}
    card = dataclasses.replace(catalog.load(run["model"]), environment=environment)
    host = memory_plan.Memory(run["total_gib"], run["total_gib"], reserve=-100)
    engine = vllm_versions.Engine.parse(run["engine"])
    return memory_plan.make(card, {**run["settings"], **change}, version=engine, memory=host)


def layout_tokens(entry: dict[str, Any], off: float = 0.0) -> int:
    """Tokens that an engine of `layouts` prints for its cache, which may be ``off`` GiB larger than it said."""
    card = catalog.load(entry["card"])
    arguments = {**card.arguments, **entry["arguments"]}
    cut = kv_layout.layout(card, arguments, vllm_versions.Engine.parse(entry["engine"]))
    pool = entry.get("blocks") or cut.pool(int((entry["kv_gib"] + off) * GIB))
    return cut.tokens(pool, int(str(arguments.get("max_model_len", card.shape.context))))


def tables() -> str:
    """Runs and plans side by side, as Markdown."""
    return "\n".join([*_runs(), "", *_layouts(), "", *_gpu_runs(), "", *_oracle()]) + "\n"


def _runs() -> list[str]:
    rows = [
        "| run | vLLM | share x total | KV cache logged | planned | error | tokens logged | planned | error | for |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    worst = (0.0, "")
    for run in load()["runs"]:
        made, logged = plan(run), run["logged"]
        gib, tokens = logged["kv_cache_gib"], logged.get("kv_cache_tokens")
        mark = "" if run["total"] == "told" else " (assumed)"
        worst = max(worst, (abs(made.kv_cache_gib / gib - 1), f"{run['name']}, {made.kv_cache_gib / gib - 1:+.1%}"))
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
    rows += ["", f"Worst case: {worst[1]}."]
    rows += ["", "Sources: " + "; ".join(f"{run['name']}: {run['source']}" for run in load()["runs"]) + "."]
    return rows


def _layouts() -> list[str]:
    rows = [
        "### Tokens for a cache of known size",
        "",
        "Engines on any GPU, of which the log tells how large the cache is (or how many blocks it has). Nothing of the "
        "budget is in it: what is compared is the layout.",
        "",
        "| run | GPU | vLLM | KV cache | tokens a sequence | printed tokens | planned | error |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    entries = load()["layouts"]
    for entry in entries:
        made = layout_tokens(entry)
        card = catalog.load(entry["card"])
        length = entry["arguments"].get("max_model_len") or card.arguments["max_model_len"]
        size = f"{entry['kv_gib']} GiB" if "kv_gib" in entry else f"{entry['blocks']} blocks"
        exact = layout_tokens(entry, -0.005) <= entry["tokens"] <= layout_tokens(entry, 0.005)
        error = "exact" if exact else f"{made / entry['tokens'] - 1:+.1%}"
        rows.append(
            f"| {entry['name']} | {entry['gpu']} | {entry['engine'].partition('+')[0]} | {size} | {length:,} "
            f"| {entry['tokens']:,} | {made:,} | {error}{' (a fork)' if entry.get('fork') else ''} |"
        )
    rows += ["", "Sources: " + "; ".join(f"{entry['name']}: {entry['source']}" for entry in entries) + "."]
    return rows


def _gpu_runs() -> list[str]:
    rows = [
        "### A CUDA engine with dummy weights",
        "",
        "`scripts/calibrate` starts the real engine with weights that mean nothing (docs/gpu-runs.yml). Besides "
        "torch it takes 0.2 to 0.3 GiB on a GPU with memory of its own; a GB10 counts host memory as well.",
        "",
        "| run | vLLM, GPU | activations logged | planned | KV cache logged | planned | error | tokens logged "
        "| planned for that GiB | concurrency logged | planned for that GiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    worst = (0.0, "")
    for run in load_gpu_runs():
        logged, made = run["logged"], gpu_plan(run)
        exact = gpu_plan(run, kv_cache_memory_bytes=logged["kv_available_bytes"])
        error = made.kv_cache_gib / logged["kv_cache_gib"] - 1
        worst = max(worst, (abs(error), f"{run['id']}, {error:+.1%}"))
        rows.append(
            f"| {run['id']} | {run['engine']}, {run['gpu'].removeprefix('NVIDIA ')} "
            f"| {logged['activation_gib']:.2f} GiB | {made.activation_gib:.2f} "
            f"| {logged['kv_cache_gib']:.2f} GiB | {made.kv_cache_gib:.2f} | {error:+.1%} "
            f"| {logged['kv_cache_tokens']:,} | {exact.kv_cache_tokens:,} | {logged['max_concurrency']:.2f} "
            f"| {exact.max_concurrency:.2f} |"
        )
    rows += ["", f"Worst case: {worst[1]}, on the safe side."]
    return rows


def _oracle() -> list[str]:
    kept: dict[str, dict[str, dict[str, Any]]] = json.loads(ORACLE_FILE.read_text(encoding="utf-8"))
    rows = [
        "### vLLM's own code, without a GPU",
        "",
        "`scripts/oracle` hands the layers of every card and profile, with 16- and 8-bit KV cache and two sizes of "
        "memory, to vLLM's own code; tests compare blocks, blocks a sequence, tokens, groups and mode. Refused are "
        "what an index needs before 0.29, and blocks longer than a batch from 0.18 to 0.26.",
        "",
        "| vLLM | asked | answered | refused by both |",
        "| --- | --- | --- | --- |",
    ]
    for version in sorted(kept, key=lambda text: tuple(map(int, text.split(".")))):
        refused = sum("refused" in answer for answer in kept[version].values())
        rows.append(f"| {version} | {len(kept[version])} | {len(kept[version]) - refused}, all exact | {refused} |")
    return rows
