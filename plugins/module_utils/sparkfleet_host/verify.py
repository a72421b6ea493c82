# SPDX-License-Identifier: Apache-2.0
"""Proof that an endpoint answers: questions with known answers, a complete stream, counters that move; and, in a deep
verification, what `deep` asks.

What is asked of a model is a list of kinds. Those of PATHS are part of every verification, the others of a deep one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from . import deep, metrics, pooling
from .asking import (
    CHAT,
    COMPLETIONS,
    PROBE_TIMEOUT,
    Asker,
    Budget,
    CheckError,
    StreamReader,
    check_answer,
    refusal,
    words,
)
from .bounded import BoundsError, as_dict, as_list, as_str
from .http import HttpError

__all__ = ["COUNTERS", "CheckError", "StreamReader", "Verification", "check_answer", "counters", "verify"]

COUNTERS_WAIT = 3.0  # seconds until counters have moved; vLLM updates them just after an answer
COUNTERS = ("generation_tokens", "prompt_tokens", "request_success")
QUICK, DEEP = "quick", "deep"
#: Kinds of the quick set, of which each verification asks those that the model is for, and what each needs of the API.
PATHS = {
    "chat": CHAT,
    "completion": COMPLETIONS,
    "stream": CHAT,
    "embeddings": pooling.EMBEDDINGS,
    "rerank": pooling.RERANK,
    "classify": pooling.CLASSIFY,
}
GENERATIVE = ("chat", "completion", "stream")
KINDS = (*PATHS, *deep.PROBES)
BUDGET = 300.0  # seconds of a deep verification
ASKED = ("url", "model", "question", "expect", "prompt", "prompt_expect")
STOP = ["\n"]
SHOWN = 4000  # characters of an answer that are kept
ANSWERED = 16  # tokens that an engine with dummy weights is to generate
PROMPT = list(range(100, 132))  # tokens that every vocabulary has


def embeds(kinds: Iterable[str]) -> bool:
    """Whether a model that is for some kinds gives vectors in place of text."""
    return "embeddings" in kinds and not {*kinds} & {*GENERATIVE}


def steps(kinds: Iterable[str], mode: str = QUICK) -> list[list[str]]:
    """What is asked of a model that is for some kinds, QUICK or DEEP: the quick set at once, then one kind after the
    other. A model without kinds, as in releases of earlier versions, chats. Kinds that this version does not know are
    left out."""
    wanted = {*kinds}
    if not wanted & {*PATHS}:
        wanted |= {*GENERATIVE}
    more = [[kind] for kind in deep.PROBES if kind in wanted and mode == DEEP]
    return [[kind for kind in PATHS if kind in wanted], *more]


def is_over(result: dict[str, Any]) -> bool:
    """Whether no more needs to be asked: the engine does not answer as it must at all, or no time is left."""
    failures = {check["name"]: check["failure"] for check in result["checks"] if not check["ok"]}
    return bool({"endpoint-down", deep.SPENT} & {*failures.values()} or {*failures} - {*deep.PROBES})


def joined(first: dict[str, Any], then: dict[str, Any]) -> dict[str, Any]:
    """The results of two `steps` as one."""
    bad = first if not first["verified"] else then
    return {
        **first,
        "verified": first["verified"] and then["verified"],
        "checks": [*first["checks"], *then["checks"]],
        "usage": {key: count + then["usage"].get(key, 0) for key, count in first["usage"].items()},
        "seconds": round(first["seconds"] + then["seconds"], 3),
        **{key: bad[key] for key in ("msg", "failure") if key in bad},
    }


def counters(text: str) -> dict[str, float]:
    """The counters of COUNTERS, summed over their label sets, from Prometheus text."""
    return metrics.sums(text, COUNTERS)


class Verification(Asker):
    """The checks of one endpoint. `run` does them; the rest are its results.

    `params["kinds"]`: what is asked, of KINDS (those of GENERATIVE by default); `params["budget"]`: seconds for those
    that are not of the quick set, altogether.
    """

    def __init__(self, params: dict[str, Any]) -> None:
        super().__init__(params)
        self.kinds = [str(kind) for kind in params.get("kinds") or GENERATIVE]
        self.answer = self.completion = ""
        self.ttft_ms: float | None = None
        self.tokens_per_second: float | None = None
        self.checks: list[dict[str, Any]] = []

    def run(self) -> None:
        """Run all checks; `checks` has them in a fixed order."""
        quick = [kind for kind in self.kinds if kind in PATHS]
        if quick:
            self._run_quick(quick)
        if not any(check["failure"] == "endpoint-down" for check in self.checks):
            self._run_deep([kind for kind in self.kinds if kind in deep.PROBES])

    def _run_quick(self, kinds: list[str]) -> None:
        """Those that take seconds, concurrently where possible."""
        asks: dict[str, Callable[[], str]] = {
            "chat": self.chat,
            "completion": self.complete,
            "stream": self.stream,
            "embeddings": lambda: pooling.embeddings(self),
            "rerank": lambda: pooling.rerank(self),
            "classify": lambda: pooling.classify(self),
        }
        with ThreadPoolExecutor(max_workers=4 + len(kinds)) as pool:
            before = pool.submit(self._counters)
            probes = {
                "health": pool.submit(self._timed, self.health),
                "models": pool.submit(self._timed, self.models),
            }
            api = pool.submit(self._timed, self.openapi)
            try:
                start: dict[str, float] | CheckError = before.result()
            except CheckError as error:
                start = error
            # Nothing is there: no need to ask seven times.
            down = probes["health"].result()
            if down["failure"] == "endpoint-down":
                self.checks = [{"name": "health", **down}]
                return
            asked: dict[str, Future[dict[str, Any]]] = {kind: pool.submit(self._timed, asks[kind]) for kind in kinds}
            done = {name: future.result() for name, future in {**probes, **asked}.items()}
            done["metrics"] = self._timed(lambda: self.metrics(start))
            done["openapi"] = api.result()
        self.checks = [{"name": name, **check} for name, check in done.items()]
        for check in self.checks:
            if check["failure"] == "timeout":
                check["failure"] = "engine-wedged" if down["ok"] else "endpoint-down"
                check["detail"] += "; /health is 200 all the same" if down["ok"] else ""

    def _run_deep(self, kinds: list[str]) -> None:
        """Those that may take minutes, one after the other within the budget."""
        given = self.params.get("budget")
        budget = Budget(BUDGET if given is None else float(given))
        for kind in kinds:
            check = self._timed(lambda kind=kind: deep.ask(self, kind, budget))  # type: ignore[misc]
            if check["failure"] == "timeout" and budget.left() < deep.LEAST:  # which is not what the kind is about
                check["failure"] = deep.SPENT
            if not check["ok"] and check["failure"] not in ("endpoint-down", deep.SPENT):
                check["failure"] = deep.failure(kind)
            self.checks.append({"name": kind, **check})
            if check["failure"] == "endpoint-down":
                return

    def _timed(self, check: Callable[[], str]) -> dict[str, Any]:
        began = time.monotonic()
        ok, failure = True, ""
        try:
            detail = check()
        except CheckError as error:
            ok, failure, detail = False, error.id, str(error)
        except HttpError as error:
            kinds = {
                **{"refused": "endpoint-down", "address": "endpoint-down", "timeout": "timeout"},
                **{"malformed": "answer-malformed"},
            }
            ok, failure, detail = False, kinds.get(error.kind, "request-refused"), str(error)
        except BoundsError as error:
            ok, failure, detail = False, "answer-malformed", str(error)
        return {"ok": ok, "detail": detail, "seconds": round(time.monotonic() - began, 3), "failure": failure}

    # -- without the model -----------------------------------------------------------------------------------

    def health(self) -> str:
        """/health answers 200."""
        answer = self.client.get("/health", PROBE_TIMEOUT)
        if answer.status != 200:
            raise CheckError("endpoint-down", f"expected 200 from /health, got {refusal(answer)}")
        return "200"

    def models(self) -> str:
        """/v1/models lists the model."""
        self.served()
        return str(self.params["model"])

    def openapi(self) -> str:
        """/openapi.json names the paths that clients use."""
        answer = self.client.get("/openapi.json", PROBE_TIMEOUT)
        if answer.status != 200:
            raise CheckError("api-incomplete", refusal(answer))
        paths = as_dict(as_dict(answer.json(), "/openapi.json").get("paths"), "paths of /openapi.json")
        needed = dict.fromkeys(["/v1/models", *(PATHS[kind] for kind in self.kinds if kind in PATHS)])
        missing = [path for path in needed if path not in paths]
        if missing:
            raise CheckError("api-incomplete", f"/openapi.json does not name {', '.join(missing)}")
        return f"{len(paths)} paths"

    # -- with the model --------------------------------------------------------------------------------------

    def chat(self) -> str:
        """/v1/chat/completions gives the expected answer."""
        message = as_dict(self.ask(CHAT, self.chat_body(), "chat").get("message"), "message")
        content = as_str(message.get("content") or "", "message.content").strip()
        self.answer = content[:SHOWN]
        check_answer(content, self.params["expect"])
        return words(content)

    def complete(self) -> str:
        """/v1/completions continues as expected."""
        body = self.body(prompt=self.params["prompt"], stop=STOP)
        body["max_tokens"] = min(self.params["max_tokens"], 12)
        text = as_str(self.ask(COMPLETIONS, body, "completion").get("text") or "", "text").strip()
        self.completion = text[:SHOWN]
        check_answer(text, self.params["prompt_expect"])
        return words(text)

    def stream(self) -> str:
        """A streamed chat is a well-formed event stream that ends in [DONE] and holds the expected answer."""
        reader, began = self.read_stream(self.chat_body(), "stream")
        check_answer(reader.text, self.params["expect"])
        if reader.first is not None and reader.last is not None:
            self.ttft_ms = round((reader.first - began) * 1000, 1)
            if reader.tokens > 1 and reader.last > reader.first:
                self.tokens_per_second = round((reader.tokens - 1) / (reader.last - reader.first), 2)
        return f"{reader.events} events, [DONE]" + (f", first text after {self.ttft_ms:.0f} ms" if self.ttft_ms else "")

    # -- counters --------------------------------------------------------------------------------------------

    def _counters(self) -> dict[str, float]:
        try:
            answer = self.client.get("/metrics", PROBE_TIMEOUT, metrics.LIMIT)
        except HttpError as error:
            raise CheckError("counters-still", str(error)) from error
        if answer.status != 200:
            raise CheckError("counters-still", f"/metrics: {refusal(answer)}")
        return counters(answer.text)

    def metrics(self, before: dict[str, float] | CheckError) -> str:
        """The counters moved between two readings."""
        if isinstance(before, CheckError):
            raise before
        generates = any(kind in GENERATIVE for kind in self.kinds)
        wanted = [name for name in COUNTERS if generates or name != "generation_tokens"]
        # With no request answered there is nothing to wait for.
        deadline = time.monotonic() + (COUNTERS_WAIT if any(self.usage.values()) else 0.0)
        while True:
            now = self._counters()
            grown = {name: now.get(name, 0.0) - before.get(name, 0.0) for name in wanted}
            still = [name for name, by in grown.items() if by <= 0]
            if not still:
                out = f"+{grown['generation_tokens']:.0f} tokens out, " if generates else ""
                tokens = "" if generates else "tokens "
                return f"{out}+{grown['prompt_tokens']:.0f} {tokens}in, +{grown['request_success']:.0f} requests"
            if time.monotonic() >= deadline:
                named = ", ".join(f"vllm:{name}_total{'' if name in now else ' (absent)'}" for name in still)
                raise CheckError("counters-still", f"did not move: {named}")
            time.sleep(0.05)


def verify(params: dict[str, Any]) -> dict[str, Any]:
    """Ask, and assess the answers: the result of the module `vllm_verify`, with `msg` and `failure` unless `verified`.

    Of `params` (the module's options) all but ASKED, `kinds`, `budget` and `timeout` (seconds), `max_tokens`,
    `verify_id` and `chat_template_kwargs` are ignored. Raises HttpError for an address that is none.
    """
    began = time.monotonic()
    verification = Verification(params)
    verification.run()
    return _result(params, verification, began)


def _result(params: dict[str, Any], verification: Verification, began: float) -> dict[str, Any]:
    bad = next((check for check in verification.checks if not check["ok"]), None)
    result = {
        "verified": bad is None,
        "asked": {key: params[key] for key in ASKED},
        "checks": verification.checks,
        "answer": verification.answer,
        "completion": verification.completion,
        "ttft_ms": verification.ttft_ms,
        "tokens_per_second": verification.tokens_per_second,
        "usage": verification.usage,
        "verify_id": verification.verify_id,
        "seconds": round(time.monotonic() - began, 3),
    }
    if bad is not None:
        result.update(msg=f"{bad['name']}: {bad['detail']}", failure=bad["failure"])
    return result


def answers(params: dict[str, Any], tokens: int = ANSWERED) -> dict[str, Any]:
    """Whether an engine answers at all, whatever it says, as one with dummy weights does: it is healthy, lists the
    model and generates `tokens` tokens, or a vector. The same result as `verify`. Raises HttpError for an address that
    is none."""
    began = time.monotonic()
    verification = Verification(params)

    def complete() -> str:
        # As numbers: the tokenizer may be that of a model that nobody knows.
        body = {"model": params["model"], "prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
        verification.ask(COMPLETIONS, body, "completion")
        if verification.usage["completion_tokens"] != tokens:
            raise CheckError(
                "answer-malformed", f"{verification.usage['completion_tokens']} tokens instead of {tokens}"
            )
        return f"{tokens} tokens"

    def embed() -> str:
        body = {"model": params["model"], "input": PROMPT}
        vectors = as_list(verification.post(pooling.EMBEDDINGS, body, "embedding").get("data"), "data", 1)
        if not vectors:
            raise CheckError("answer-malformed", "no vector in the answer")
        return "a vector"

    steps = {"health": verification.health, "models": verification.models}
    steps |= {"embeddings": embed} if embeds(verification.kinds) else {"completion": complete}
    for name, step in steps.items():
        verification.checks.append({"name": name, **verification._timed(step)})
        if not verification.checks[-1]["ok"]:
            break
    return _result(params, verification, began)
