# SPDX-License-Identifier: Apache-2.0
"""Action: measures the engines of a Spark, shows each figure as it comes, keeps the records on host and controller.

- sparkfleet.dgx.engine_bench:
    step: look                # refuses a Spark that serves others
    loads: {shapes: [chat, "1024:128"], streams: [1, 4, 16], repetitions: 3}
    model: ""                 # name of a card; all engines of the host
    even_if_serving: false
- sparkfleet.dgx.engine_bench:      # the same without `step` measures
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.sparkfleet.dgx.plugins.plugin_utils import package  # noqa: F401 - finds what follows
from sparkfleet_host import benchmarks
from sparkfleet_host.bounded import BoundsError, as_dict, as_str, as_time, printable

from sparkfleet import SparkfleetError, operator_name, paths
from sparkfleet.fleet import gateway
from sparkfleet.performance import loads, records
from sparkfleet.reporting import benchmark, report

display = Display()
#: Of an engine, what a record has of it.
_KNOWN = ("service", "model", "profile", "repo", "revision", "image", "settings", "vllm", "container", "reads")


class ActionModule(ActionBase):  # type: ignore[misc]  # ansible has no types
    """Repeats the module engine_bench, a call for each load."""

    TRANSFERS_FILES = False
    _VALID_ARGS = frozenset(("step", "loads", "model", "even_if_serving", "project_dir", "state_dir"))

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the records; fail where there is nothing to measure, others use it, or a load fails."""
        self._vars = task_vars or {}
        result: dict[str, Any] = super().run(tmp, self._vars)
        host = str(self._vars.get("inventory_hostname", "localhost"))
        try:
            asked = loads.Asked.of(self._task.args.get("loads") or {})
        except SparkfleetError as error:
            raise AnsibleActionFail(f"{host}: {error}", result={"failure": "bad-input"}) from None
        even = gateway.truth(self._task.args.get("even_if_serving", False))
        found = self._module(step="look", model=str(self._task.args.get("model") or ""))
        if found.get("failed"):
            return {**result, **found, "msg": f"{host}: {found.get('msg')} [benchmark]"}
        try:
            engines = {engine["service"]: (engine, *loads.planned(asked, engine)) for engine in found["engines"]}
        except SparkfleetError as error:
            raise AnsibleActionFail(f"{host}: {error}", result={"failure": "bad-input"}) from None
        only_looks = self._task.args.get("step") == "look"
        if not even and (why := self._serving(host, found["engines"], only_looks)):
            raise AnsibleActionFail(f"{host}: {why} [engine-busy]", result={"failure": "engine-busy"})
        for _, _, notes in engines.values() if only_looks else ():
            for note in notes:
                display.display(report.clean(f"{host}  {note}"))
        made = []
        for engine, planned, _ in () if only_looks or self._task.check_mode else engines.values():
            record, failed = self._measure(host, found, engine, planned, asked.repetitions)
            made.append(record)
            if failed:
                return {**result, **failed, "changed": False, "benchmarks": made}
            display.display(benchmark.table(record).rstrip())
        return {**result, "changed": False, "benchmarks": made}

    def _serving(self, host: str, engines: list[Mapping[str, Any]], behind: bool) -> str:
        """Why a Spark is not measured: it serves others. `behind`: whether a gateway counts that sends it requests."""
        ways = "--even-if-serving (ansible-playbook: -e sparkfleet_even_if_serving=true) measures it nevertheless"
        groups = self._vars.get("groups", {})
        drained = gateway.truth(self._templar.template(self._vars.get("sparkfleet_drained", False)))
        gateways = [] if drained else list(groups.get("gateways", ()))
        if behind and gateways:
            others = [name for name in groups.get("sparks", ()) if name != host]
            rest = "the other Sparks serve" if others else "its clients get 503"
            return (
                f"it is behind the gateway {', '.join(gateways)}, which sends it requests; nothing was measured. "
                f"{ways}, drained meanwhile ({rest}) and put back"
            )
        if busy := [f"{item['service']} ({item['busy']})" for item in engines if item["busy"]]:
            return f"others use it now: requests of {', '.join(busy)}; nothing was measured. {ways}"
        return ""

    def _measure(
        self, host: str, found: Mapping[str, Any], engine: Mapping[str, Any], planned: list[Any], repetitions: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The record of an engine, and the result of what failed, {} for nothing."""
        try:
            began = as_time(found["now"], "now")
        except BoundsError as error:
            raise AnsibleActionFail(f"{host}: the time that the host says: {error}") from None
        record: dict[str, Any] = {
            **{"format": benchmarks.FORMAT, "id": records.new_id(began), "at": began, "ended": began, "host": host},
            **{"controller": operator_name.name(), "release": found["release"]},
            **{key: found[key] for key in ("gpu", "driver")},
            **{key: engine[key] for key in (*_KNOWN, "limit_tok_s", "published_tok_s")},
            **{"tool": "", "serving": bool(engine["busy"]), "complete": False, "rows": []},
        }
        for number, (shape, repetition, load) in enumerate(planned, 1):
            answer = self._module(
                step="measure",
                load=load.as_dict(),
                tool=record["tool"],
                **{key: engine[key] for key in ("service", "container", "started_at")},
            )
            if answer.get("failed") or "row" not in answer:
                words = f"{shape.name} with {load.streams} streams: {answer.get('msg') or 'no answer'}"
                message = f"{host}: {printable(words, 2000)} [benchmark]"
                return record, {**answer, "failed": True, "msg": message, "failure": "benchmark"}
            place = {"shape": shape.name, "input": load.input, "output": load.output, "streams": load.streams}
            try:
                given = as_dict(answer["row"], "row")
                row = benchmarks.check_row({**given, **place, "repetition": repetition})
                tool, ended = as_str(answer.get("tool"), "tool", 1000), as_time(answer["now"], "now")
            except BoundsError as error:
                raise AnsibleActionFail(f"{host}: what the host measured: {error}") from None
            record["rows"].append(row)
            record.update(tool=tool, ended=ended, complete=number == len(planned))
            display.display(report.clean(f"{host}  {benchmark.line(row, repetitions)}"))
            self._keep(host, record)
        return record, {}

    def _keep(self, host: str, record: dict[str, Any]) -> None:
        """Lines, since the command shows no warning of a run that ends well."""
        answer = self._module(step="keep", record=record)
        if answer.get("failed"):
            display.display(report.clean(f"{host}  the benchmark is not kept on the host: {answer.get('msg')}"))
        try:
            records.keep(paths.STATE, host, record)
        except (OSError, BoundsError) as error:
            why = printable(getattr(error, "strerror", None) or str(error), 300)
            display.display(report.clean(f"{host}  the benchmark is not kept on this machine: {why}"))

    def _module(self, **arguments: Any) -> dict[str, Any]:
        places = {key: self._task.args[key] for key in ("project_dir", "state_dir") if key in self._task.args}
        began = time.time()
        answer: dict[str, Any] = self._execute_module(
            module_name="sparkfleet.dgx.engine_bench", module_args={**arguments, **places}, task_vars=self._vars
        )
        return {"now": began, **answer}
