"""The files of a release as the controller writes them, of a few engines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VERIFY = {"question": "q", "expect": "Paris", "prompt": "p", "prompt_expect": "Paris", "max_tokens": 32, "kinds": []}


def an_engine(service: str, port: int = 8000, **more: Any) -> dict[str, Any]:
    """All that a release says of an engine."""
    names = {"model": service.removeprefix("vllm-"), "profile": "throughput", "repo": f"org/{service}", "image": "i"}
    return {"service": service, **names, "revision": "main", "port": port, "verify": VERIFY, "memory": None, **more}


def plan(*engines: Mapping[str, Any]) -> dict[str, Any]:
    """plan.json."""
    keys = ("service", "model", "profile", "repo", "image", "verify", "memory")
    in_turn = [{"on_demand": engine["on_demand"]} if engine.get("on_demand") else {} for engine in engines]
    each = [{**{key: engine[key] for key in keys}, **more} for engine, more in zip(engines, in_turn, strict=True)]
    return {"format": 2, "engines": each}


def lock(*engines: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """lock.json, but for what is added when it is staged."""
    keys = ("service", "model", "profile", "repo", "revision", "image", "port")
    drafts = [{"draft": engine["draft"]} if engine.get("draft") else {} for engine in engines]
    each = [{**{key: engine[key] for key in keys}, **draft} for engine, draft in zip(engines, drafts, strict=True)]
    return {"format": 2, "engines": each, **more}


def flat(engine: Mapping[str, Any], **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """plan.json and lock.json of format 1, which held one engine."""
    known = {key: engine[key] for key in ("model", "profile", "repo", "service", "image")}
    questions = {"verify": engine["verify"], "memory": engine["memory"]}
    return {**known, **questions}, {**known, "revision": engine["revision"], "port": engine["port"], **more}
