# SPDX-License-Identifier: Apache-2.0
"""Action: finds out what is wrong with a Spark, prints it, and writes a bundle to attach to a report. It fails where
something is wrong that needs an operator or the guard.

- sparkfleet.dgx.spark_diagnose:
    report: .sparkfleet/reports/spark-1-diagnose.json       # on the controller
    bundles: .sparkfleet/bundles                            # a folder on the controller
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.sparkfleet.dgx.plugins.plugin_utils import package  # noqa: F401 - finds what follows

from sparkfleet.diagnosis import diagnose

CHECKED = "engine, answers, releases, the last switch, guard, Docker, GPU, disks, kernel"
display = Display()


class ActionModule(ActionBase):  # type: ignore[misc]  # ansible has no types
    """Runs the module spark_diagnose on the host."""

    TRANSFERS_FILES = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return findings, the place of the bundle, and whether the engine serves."""
        task_vars = task_vars or {}
        result: dict[str, Any] = super().run(tmp, task_vars)
        arguments = dict(self._task.args)
        report, bundles = (str(arguments.pop(key, "") or "") for key in ("report", "bundles"))
        answer = self._execute_module(
            module_name="sparkfleet.dgx.spark_diagnose", module_args=arguments, task_vars=task_vars
        )
        if "facts" not in answer:
            return {**result, **answer}
        host = str(task_vars.get("inventory_hostname", "localhost"))
        found = diagnose.findings(answer["facts"])
        display.display(diagnose.page(host, found, CHECKED))
        data: dict[str, Any] = {"host": host, "findings": [item.as_dict() for item in found], "bundle": None}
        try:
            if bundles:
                stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
                path = Path(self._loader.path_dwim(bundles)) / f"{host}-{stamp}.tar.gz"
                data["bundle"] = str(diagnose.bundle(path, host, answer["facts"], found))
                display.display(f"{host}  bundle: {data['bundle']}")
            if report:
                place = Path(self._loader.path_dwim(report))
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise AnsibleActionFail(
                f"{error.filename} on this machine: {error.strerror}; choose another path"
            ) from None
        result.update(data, changed=False, diagnosed=True, serves=bool(answer["facts"]["status"].get("healthy")))
        wrong = diagnose.wrong(found)
        if not wrong:
            return result
        names = ", ".join(item.id for item in wrong)
        serves = "it serves" if result["serves"] else "it does not serve"
        healthy = [bool(engine["healthy"]) for engine in answer["facts"]["engines"]]
        if len(healthy) > 1 and not result["serves"]:
            serves = f"{sum(healthy)} of {len(healthy)} engines serve"
        return {**result, "failed": True, "failure": wrong[0].id, "msg": f"{host}: {serves}; found: {names}"}
