# SPDX-License-Identifier: Apache-2.0
"""Inspect a Spark, plan on the controller, refuse what cannot work. The settings are the host's variables."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ansible import constants
from ansible.errors import AnsibleActionFail, AnsibleConnectionFailure
from ansible.plugins.action import ActionBase
from ansible_collections.sparkfleet.dgx.plugins.plugin_utils import package  # noqa: F401 - finds what follows
from sparkfleet_host import registry
from sparkfleet_host.bounded import GIB
from sparkfleet_host.engine import PROJECT

from sparkfleet import SparkfleetError, paths
from sparkfleet.documents import certificates
from sparkfleet.fleet import gateway, receivers
from sparkfleet.fleet.model_files import Way
from sparkfleet.monitoring import targets
from sparkfleet.onboarding import hub_card
from sparkfleet.packaging import host_program
from sparkfleet.planning import lock, nodes, plan, variables
from sparkfleet.planning.target import ModelTarget, Settings, Target, listen, locked_model
from sparkfleet.planning.variables import ARGUMENT_PREFIX
from sparkfleet.reporting import report


class ActionModule(ActionBase):  # type: ignore[misc]
    """Runs the module spark_state on the host and makes the plan from what it found."""

    TRANSFERS_FILES = False
    _VALID_ARGS = frozenset(("again", "status", "trial_weights", "trial_loads"))

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return ``plan``; raise one error with every finding when the host or the input is not fit."""
        task_vars = task_vars or {}
        result: dict[str, Any] = super().run(tmp, task_vars)
        host = task_vars["inventory_hostname"]
        status = gateway.truth(self._task.args.get("status", False))
        before = task_vars.get("sparkfleet_inspection") or {}
        if "plan" in before and not gateway.truth(self._task.args.get("again", True)):
            return {**result, "changed": False, "plan": before["plan"], "state": before["state"]}
        try:
            trial = str(self._task.args.get("trial_weights") or "")
            loads = tuple(self._task.args.get("trial_loads") or ())
            settings = dataclasses.replace(self._settings(task_vars, trial), trial=trial, trial_loads=loads)
            if not (settings.bundle or status):
                self._make_card(settings, task_vars)
            target = Target.of(settings)
        except SparkfleetError as error:
            raise _bad_input(f"{host}: {error}") from None

        request = {
            "engines": [
                {
                    "repo": engine.card.repo,
                    "revision": engine.revision,
                    "remote_code": engine.remote_code,
                    "image": engine.image,
                    "port": engine.engine_port,
                    "door": engine.port if engine.on_demand else 0,
                    "executors": settings.spans is not None
                    and nodes.is_asked(target.wanted(engine), engine.image, engine.version),
                    **({"draft": _asked(engine.draft)} if engine.draft else {}),
                }
                for engine in target.engines
            ],
            "project": PROJECT,
            "operator": settings.operator,
            "project_dir": settings.project_dir,
            "cache_dir": settings.cache_dir,
            "token": settings.hf_token,
            "token_file": settings.hf_token_file,
            "engine_key": settings.engine_key,
            "registry_logins": registry.login_file(settings.registry_logins),
            "address": settings.address,
            "gateways": list(settings.gateways) if listen(settings.listen) == "auto" else [],
            "sources": [*settings.gateways, *settings.sparks, *settings.monitors] if settings.firewall else [],
            "hub_endpoint": settings.hub_endpoint,
            "proxy": settings.proxy,
            "no_proxy": settings.no_proxy,
            "ca": settings.ca,
            "registries": target.registries,
            "fabric": settings.spans is not None,
            "now": time.time(),
            # Reporting what is served needs no internet.
            "internet": target.bundle is None and not status,
            "status": status,
        }
        try:
            answer = self._execute_module(
                module_name="sparkfleet.dgx.spark_state", module_args=request, task_vars=task_vars
            )
        except AnsibleConnectionFailure as error:
            raise AnsibleConnectionFailure(_unreachable(host, task_vars, str(error))) from None
        if answer.get("failed"):
            raise AnsibleActionFail(f"{host}: cannot inspect the host: {_first_line(answer)}")

        answer["state"]["host"] = host
        made = plan.make(target, answer["state"], reads=status or bool(task_vars.get("sparkfleet_inspection_reads")))
        if "preflight" in task_vars.get("ansible_run_tags", ()):
            for line in _table(made):
                self._display.display(report.clean(f"{host}  {line}"))
        if made["findings"]:
            lines = [f"  {finding['message']} [{finding['id']}]" for finding in made["findings"]]
            # A later inspection in the same run follows changes.
            untouched = "" if "sparkfleet_inspection" in task_vars else "; nothing was changed on it"
            models = " and ".join(engine["model"] for engine in made["engines"])
            message = f"{host} cannot serve {models} as it is{untouched}:\n" + "\n".join(lines)
            raise AnsibleActionFail(
                message, result={"findings": made["findings"], "failure": made["findings"][0]["id"]}
            )
        lines = _summary(made, answer["state"], first="sparkfleet_inspection" not in task_vars)
        for line in [] if status else lines:
            self._display.display(report.clean(f"{host}  {line}"))
        result.update(changed=False, plan=made, state=answer["state"])
        return result

    def _make_card(self, settings: Settings, task_vars: dict[str, Any]) -> None:
        """The card of each model given as ORG/NAME, made from the Hub where there is none. Raises SparkfleetError."""
        hub = Way(
            endpoint=str(self._templar.template(task_vars.get("sparkfleet_controller_hub")) or settings.hub_endpoint),
            token=settings.hf_token,
            proxy=settings.proxy,
            no_proxy=settings.no_proxy,
            ca=settings.ca,
        )
        locked = settings.lock()
        for engine in settings.each():
            hub_card.ensure(
                locked_model(engine, locked),
                hub,
                lambda text: self._display.display(report.clean(text)),
                once=Path(constants.DEFAULT_LOCAL_TMP),
            )

    def _settings(self, task_vars: dict[str, Any], trial: str) -> Settings:
        """The settings of this host, out of its variables. Raises SparkfleetError with each problem."""
        host, values = task_vars["inventory_hostname"], self._values(task_vars)
        if trial:  # of one model, alone, whatever the host serves otherwise
            values.pop(variables.ENGINES, None)
        settled = variables.settle(values)
        _check_gateways(task_vars)
        _check_receivers(task_vars, settled)
        lock_file = settled.pop("sparkfleet_lock_file", "") or lock.found(
            task_vars.get("ansible_inventory_sources") or ()
        )
        settings = Settings.of(
            settled,
            spans=group(task_vars, self._templar.template),
            lock_file=lock_file,
            address=settled.get("sparkfleet_address") or str(task_vars.get("ansible_host") or host),
            gateways=gateways(task_vars),
            gateways_elsewhere=gateways(task_vars, but=host),
            sparks=_others(task_vars) if settled.get("sparkfleet_firewall") else (),
            monitors=_monitors(task_vars) if settled.get("sparkfleet_monitoring") else (),
            ca=certificates.read(settled.get("sparkfleet_ca_file", "")),
            ssh_port=int(task_vars.get("ansible_port") or 22),
            host_program=hashlib.sha256(host_program.build(paths.CACHE).read_bytes()).hexdigest(),
        )
        gateway.check_key("sparkfleet_engine_key", settings.engine_key)
        return settings

    def _values(self, task_vars: dict[str, Any]) -> dict[str, Any]:
        """The host's variables `sparkfleet_*`, templates resolved. What is none of ours has its name alone: it may be
        of Ansible's own making, or what is registered."""
        ours = [name for name in task_vars if name.startswith(variables.PREFIX)]
        known = [name for name in ours if name in variables.options() or name.startswith(ARGUMENT_PREFIX)]
        return {**dict.fromkeys(ours), **{name: self._templar.template(task_vars[name]) for name in known}}


def group(task_vars: dict[str, Any], template: Callable[[Any], Any]) -> nodes.Nodes | None:
    """The group that a host runs its engine with. Raises SparkfleetError naming the place."""
    keys = (nodes.NODES, nodes.ADDRESS)
    if not task_vars.get(nodes.NODES):
        return None
    host, hostvars = task_vars["inventory_hostname"], task_vars["hostvars"]
    own = {key: template(task_vars.get(key)) for key in keys}
    known = {name: {key: hostvars[name].get(key) for key in keys} for name in task_vars["groups"].get("sparks", ())}
    return nodes.of(host, task_vars["groups"], {**known, host: own})


def _asked(model: ModelTarget) -> dict[str, Any]:
    """What the host is asked of a model."""
    return {"repo": model.repo, "revision": model.revision, "remote_code": model.remote_code}


def _check_gateways(task_vars: dict[str, Any]) -> None:
    """Check the gateways' own variables. Raises SparkfleetError with each problem."""
    for gate in task_vars.get("groups", {}).get("gateways", ()):
        values = task_vars["hostvars"][gate]
        names = [name for name in values if name.startswith(variables.PREFIX)]
        own = {name: values[name] for name in names if name.startswith("sparkfleet_gateway_")}
        try:
            variables.settle({**dict.fromkeys(name for name in names if name not in variables.options()), **own})
        except SparkfleetError as error:
            raise SparkfleetError(f"{gate}: {error}") from None


def _check_receivers(task_vars: dict[str, Any], settled: dict[str, Any]) -> None:
    """Check whom Alertmanager is to tell, before anything is changed: what this host says of it, and the one that
    monitors it. Raises SparkfleetError."""
    receivers.check(settled)
    name = targets.monitor(task_vars.get("groups", {})) if settled.get("sparkfleet_monitoring") else ""
    if name and name != task_vars["inventory_hostname"]:
        values = task_vars["hostvars"][name]
        keys = [key for key in values if key == "sparkfleet_monitoring" or key.startswith("sparkfleet_alert_")]
        try:
            receivers.check({key: values[key] for key in keys})
        except SparkfleetError as error:
            raise SparkfleetError(f"{name}: {error}") from None


def gateways(task_vars: dict[str, Any], but: str = "") -> tuple[str, ...]:
    """Where the gateways of the inventory are, all but the host of that name."""
    names = (name for name in task_vars.get("groups", {}).get("gateways", ()) if name != but)
    return tuple(gateway.address(name, task_vars["hostvars"][name]) for name in names)


def _others(task_vars: dict[str, Any]) -> tuple[str, ...]:
    """Where the other Sparks of the inventory are."""
    names = (name for name in task_vars["groups"]["sparks"] if name != task_vars["inventory_hostname"])
    return tuple(gateway.address(name, task_vars["hostvars"][name]) for name in names)


def _monitors(task_vars: dict[str, Any]) -> tuple[str, ...]:
    """Where the host that monitors this one is."""
    name = targets.monitor(task_vars["groups"])
    return (gateway.address(name, task_vars["hostvars"][name]),) if name else ()


def _bad_input(message: str) -> AnsibleActionFail:
    return AnsibleActionFail(message, result={"failure": "bad-input"})


def _unreachable(host: str, task_vars: dict[str, Any], reason: str) -> str:
    address = task_vars.get("ansible_host", host)
    user = task_vars.get("ansible_user")
    port = task_vars.get("ansible_port", 22)
    login = f"{user}@{address}" if user else address
    return (
        f"{host} is not reached at {login}:{port}: {' '.join(reason.split()).rstrip('.')}. Check that "
        f"`ssh -p {port} {login}` works from here, and ansible_host, ansible_port and ansible_user in the inventory."
    )


def _first_line(answer: dict[str, Any]) -> str:
    for key in ("msg", "module_stderr", "exception", "module_stdout"):
        lines = str(answer.get(key) or "").strip().splitlines()
        if lines:
            return lines[-1]
    return "the module gave no reason; run again with -vvv"


def _table(made: dict[str, Any]) -> list[str]:
    """What preflight saw, a line a check, and what to know of the memory plan."""
    lines = [f"{check['name']:<10}{'ok' if check['ok'] else 'NO':<4}{check['seen']}" for check in made["checks"]]
    notes = [note for engine in made["engines"] for note in (engine["memory"] or {}).get("notes", ())]
    return lines + [f"{'':<14}{note}" for note in notes]


def _summary(made: dict[str, Any], state: dict[str, Any], first: bool) -> list[str]:
    gpu = (state["gpu"] or {}).get("name", "no GPU")
    total, free = (state["memory"][key] / GIB for key in ("total", "available"))
    models = " and ".join(f"{engine['model']} ({engine['profile']})" for engine in made["engines"])
    lines = [f"{models} on {gpu}, {free:.1f} of {total:.1f} GiB of memory available"]
    for engine in made["engines"] if first and made["deploy"]["start"] else ():
        if engine["memory"]:
            which = f" of {engine['model']}" if len(made["engines"]) > 1 else ""
            lines.append(f"  memory{which}: {report.brief(engine['memory'])}")
            lines += [f"  {note}" for note in engine["memory"]["notes"] if "measured" in note and engine["measured"]]
    for stage in ("prepare", "fetch", "deploy"):
        reasons = [
            reason
            for key, value in made[stage].items()
            if isinstance(value, list) and key != "stop_services"
            for reason in value
        ]
        if reasons:
            lines.append(f"  {stage}: {'; '.join(reasons)}")
    lines = lines if len(lines) > 1 else [lines[0] + "; nothing to change"]
    return [*lines, *(f"  note: {note}" for note in made["notes"] if first)]
