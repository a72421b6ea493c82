# SPDX-License-Identifier: Apache-2.0
"""Action: proves that an endpoint answers, shows the checks as a table, saves the result on the controller.

    - sparkfleet.dgx.vllm_verify:
        model: nvidia/Llama-3.1-8B-Instruct-FP8
        question: What is the capital of France? Answer in one short sentence.
        expect: Paris
        report: reports/spark-1.json      # on the controller; none when empty

All other options are those of the module of the same name. With `engines`, as `spark_plan` returns them, each engine of
the host is verified on 127.0.0.1 in turn; those after one that fails are not asked. The report has what was measured of
it: of `measured` (by service), or of the engine. Where there are several, the
name of the report ends in that of the service (`reports/spark-1-SERVICE.json`).

With `mode: deep` each kind that is not of the quick set is a call of the module of its own, so that a run of minutes
shows where it is; `budget` (seconds) is that of all of them, for one engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.sparkfleet.dgx.plugins.plugin_utils import package  # noqa: F401 - finds what follows
from sparkfleet_host import releases, verify
from sparkfleet_host.asking import Budget
from sparkfleet_host.bounded import printable

from sparkfleet.diagnosis import failures
from sparkfleet.planning import calibration

# Of the module's result; Ansible adds keys of its own, not all of them plain data.
KEPT = (
    "verified",
    "msg",
    "failure",
    "checks",
    "answer",
    "completion",
    "ttft_ms",
    "tokens_per_second",
    "usage",
    "verify_id",
    "seconds",
)

display = Display()


class ActionModule(ActionBase):  # type: ignore[misc]  # ansible has no types
    """Runs the module vllm_verify on the host."""

    TRANSFERS_FILES = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return what the module found; fail with the first check that did, its cause and its remedy."""
        task_vars = task_vars or {}
        result: dict[str, Any] = super().run(tmp, task_vars)
        arguments = dict(self._task.args)
        report = str(arguments.pop("report", "") or "")
        engines = arguments.pop("engines", None)
        verified = arguments.pop("verified", None)
        measured = arguments.pop("measured", None) or {}
        if engines is None:
            return self._verify(arguments, {}, report, task_vars, result)
        results: list[dict[str, Any]] = []
        answer: dict[str, Any] = {**result, "changed": False, "verified": True}
        for index, engine in enumerate(engines):
            asked = {**arguments, **question(engine)}
            path = report if len(engines) == 1 or not report else sibling(report, str(engine.get("service") or index))
            service = engine.get("service")
            before = verified.get(service) if isinstance(verified, Mapping) else None
            if engine.get("on_demand"):
                host = str(task_vars.get("inventory_hostname", "localhost"))
                display.display(in_turn(host, engine, asked, before))
                results.append({"service": engine.get("service", ""), "verified": True, "on_demand": True})
                continue
            started = measured.get(service) if isinstance(measured, Mapping) else None
            known = calibration.understood([started or engine.get("measured")])
            answer = self._verify(asked, before, path, task_vars, result, next(iter(known), None))
            results.append({"service": engine.get("service", ""), **answer})
            if answer.get("failed"):
                break
        return {**answer, "engines": results} if len(engines) > 1 else answer

    def _verify(
        self,
        arguments: dict[str, Any],
        before: Any,
        report: str,
        task_vars: dict[str, Any],
        result: dict[str, Any],
        measured: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        host = str(task_vars.get("inventory_hostname", "localhost"))
        answer = self._asked(host, arguments, before, task_vars)
        if "checks" not in answer:
            return {**result, **answer}
        answer.pop("exception", None)  # the module's own account of its failure; the message below has more
        display.display(table(host, answer))
        if report and not self._task.check_mode:
            path = Path(self._loader.path_dwim(report))
            save(path, record(host, answer) | ({"measured": measured} if measured else {}))
            answer["report"] = str(path)
        if not answer.get("failed"):
            return {**result, **answer, "changed": False}
        # The table was shown and the report has the rest: what fails a play is one message.
        failure = str(answer.get("failure", ""))
        kept: dict[str, Any] = {key: answer[key] for key in ("verified", "answer", "report") if key in answer}
        message = f"{host} is not verified: {answer['msg']}{advice(failure)}"
        return {**result, **kept, "changed": False, "failed": True, "failure": failure, "msg": message}

    def _asked(self, host: str, arguments: dict[str, Any], before: Any, task_vars: dict[str, Any]) -> dict[str, Any]:
        """The module's result, of one call for each step; or the first result that is none."""
        mode, kinds = arguments.pop("mode", verify.QUICK), arguments.pop("kinds", None) or verify.GENERATIVE
        if mode not in (verify.QUICK, verify.DEEP):
            raise AnsibleActionFail(f"vllm_verify: mode: {printable(repr(mode), 80)} is neither quick nor deep")
        unknown = [str(kind) for kind in kinds if kind not in verify.KINDS]
        if unknown:
            raise AnsibleActionFail(
                f"vllm_verify: kinds: {printable(', '.join(unknown), 200)}: there are {', '.join(verify.KINDS)}"
            )
        try:
            budget = Budget(float(arguments.pop("budget", verify.BUDGET)))
        except (TypeError, ValueError):
            raise AnsibleActionFail("vllm_verify: budget must be a number of seconds") from None
        answer: dict[str, Any] = {}
        for step in verify.steps(kinds, mode):
            if answer and (passed := proved(before, step)):
                answer = verify.joined(answer, passed)
                continue
            more: dict[str, Any] = {"kinds": step}
            if answer:
                display.display(f"{host}  asking it: {', '.join(step)}")
                more.update(budget=max(budget.left(), 0.001), verify_id=answer["verify_id"])
            found = self._execute_module(
                module_name="sparkfleet.dgx.vllm_verify", module_args={**arguments, **more}, task_vars=task_vars
            )
            if "checks" not in found:
                return dict(found)
            answer = verify.joined(answer, found) if answer else dict(found)
            if verify.is_over(answer):
                break
        return {**answer, "failed": not answer["verified"]}


def proved(before: Any, kinds: Sequence[str]) -> dict[str, Any] | None:
    """The part of a result of a switch that has passed all of these kinds; None where there is none. What it holds
    comes from the Spark."""
    checks = before.get("checks") if isinstance(before, Mapping) and before.get("verified") is True else None
    passed: dict[str, dict[str, Any]] = {}
    for check in checks if isinstance(checks, list) else ():
        if isinstance(check, Mapping) and check.get("ok") is True and str(check.get("name")) in kinds:
            seconds = check.get("seconds")
            passed[str(check["name"])] = {
                **{"name": str(check["name"]), "ok": True, "failure": ""},
                "detail": printable(str(check.get("detail") or ""), 1000),
                "seconds": float(seconds) if isinstance(seconds, int | float) else 0.0,
            }
    if {*passed} != {*kinds}:
        return None
    rows = [passed[kind] for kind in kinds]
    return {"verified": True, "checks": rows, "usage": {}, "seconds": sum(row["seconds"] for row in rows)}


def in_turn(host: str, engine: Mapping[str, Any], asked: Mapping[str, Any], before: Any) -> str:
    """What is shown of an engine that starts on demand, which is not started to be asked: what a switch of this run has
    asked it, and where it is."""
    steps = verify.steps(asked["kinds"], verify.QUICK)
    port = engine["on_demand"]["port"]
    passed = proved(before, steps[0])
    where = f"{host}  {asked['model']} starts on demand: the first request to port {port} starts it"
    if passed is None:
        return f"{where} (verified when it was deployed)"
    return f"{table(host, {**passed, 'asked': asked})}\n{where}"


def question(engine: Any) -> dict[str, Any]:
    """The module's options for an engine of a plan. Raises AnsibleActionFail for what is not one."""
    asked = engine.get("verify") if isinstance(engine, Mapping) else None
    needed = ("question", "expect", "prompt", "prompt_expect")
    if not isinstance(asked, Mapping) or {"repo", "port"} - {*engine} or {*needed} - {*asked}:
        raise AnsibleActionFail(
            f"vllm_verify: engines: {printable(repr(engine), 200)} is not an engine: it needs repo, port and "
            f"verify with {', '.join(needed)}"
        )
    return {
        "url": f"http://127.0.0.1:{engine['port']}",
        "model": engine["repo"],
        **{key: asked[key] for key in needed},
        "max_tokens": asked.get("max_tokens") or 32,
        "kinds": asked.get("kinds") or list(verify.GENERATIVE),
    }


def sibling(report: str, service: str) -> str:
    """The path of one engine's report."""
    path = Path(report)
    return str(path.with_name(f"{path.stem}-{service}{path.suffix}"))


def advice(failure: str) -> str:
    """Cause, remedy and name of an entry in the table of failures; "" for none."""
    known = failures.BY_ID.get(failure)
    return f". {known.cause[0].upper()}{known.cause[1:]}. {known.remedy} [{failure}]" if known else ""


def table(host: str, answer: dict[str, Any]) -> str:
    """Checks, results, details and times in aligned columns, then question and answer."""
    asked = answer["asked"]
    rows = [("check", "result", "detail", "time")]
    rows += [
        (check["name"], "ok" if check["ok"] else "FAILED", check["detail"], f"{check['seconds']:.2f} s")
        for check in answer["checks"]
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    widths[2] = min(widths[2], 60)
    lines = [f"{host}  {asked['model']} at {asked['url']}"]
    for name, result, detail, seconds in rows:
        # A long detail is one of a failure: it is shown in full in the message.
        short = detail if len(detail) <= widths[2] else f"{detail[: widths[2] - 3]}..."
        lines.append(f"  {name:<{widths[0]}}  {result:<{widths[1]}}  {short:<{widths[2]}}  {seconds:>7}")
    if answer.get("answer"):
        lines += [f"  question: {asked['question']}", f"  answer:   {printable(' '.join(answer['answer'].split()))}"]
    return "\n".join(lines)


def record(host: str, answer: dict[str, Any]) -> dict[str, Any]:
    """What is saved: host, time (UTC), url, model, question, and the result of the module."""
    return {
        "host": host,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **answer["asked"],
        **{key: answer[key] for key in KEPT if key in answer},
    }


def save(path: Path, data: dict[str, Any]) -> None:
    """Write JSON completely or not at all, mode 0644; folders are made. Raises AnsibleActionFail."""
    try:
        releases.write_json(path, data)
    except OSError as error:
        raise AnsibleActionFail(f"report {path} on this machine: {error.strerror}; set another path") from None
