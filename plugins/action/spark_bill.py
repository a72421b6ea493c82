# SPDX-License-Identifier: Apache-2.0
"""Action: writes a bill of materials of what the module spark_bill reads on a Spark to a folder on the controller."""

from __future__ import annotations

from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.sparkfleet.dgx.plugins.plugin_utils import package  # noqa: F401 - finds what follows

from sparkfleet import SparkfleetError
from sparkfleet.packaging import sbom
from sparkfleet.user_paths import expanded

display = Display()


class ActionModule(ActionBase):  # type: ignore[misc]  # ansible has no types
    """Runs the module spark_bill on the host."""

    TRANSFERS_FILES = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return `bill`, the document, and `path`, where it is."""
        task_vars = task_vars or {}
        result: dict[str, Any] = super().run(tmp, task_vars)
        arguments = dict(self._task.args)
        folder = str(arguments.pop("folder", "") or "")
        host = str(task_vars.get("inventory_hostname", "localhost"))
        answer = self._execute_module(
            module_name="sparkfleet.dgx.spark_bill",
            module_args={**arguments, "packages": list(sbom.PACKAGES)},
            task_vars=task_vars,
        )
        if "facts" not in answer:
            return {**result, **answer}
        try:
            made = sbom.spark(host, answer["facts"])
            path = expanded("FOLDER", folder) / f"{host}.cdx.json"
            if not self._task.check_mode:
                sbom.write(path, made)
        except SparkfleetError as error:
            raise AnsibleActionFail(str(error), result={"failure": "bad-input"}) from None
        display.display(f"{host}  {len(made['components'])} components: {path}")
        return {**result, "changed": False, "bill": made, "path": str(path)}
