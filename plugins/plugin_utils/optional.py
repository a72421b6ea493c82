# SPDX-License-Identifier: Apache-2.0
"""Modules without which a run goes on."""

from __future__ import annotations

from typing import Any

from ansible.errors import AnsibleError
from ansible.plugins.action import ActionBase


def execute(
    action: ActionBase, module_name: str, module_args: dict[str, Any], task_vars: dict[str, Any], lost: str
) -> dict[str, Any]:
    """What the module returned; where it failed, or its host cannot be reached, an unchanged result with a warning:
    `lost`, and why."""
    try:
        answer: dict[str, Any] = action._execute_module(
            module_name=module_name, module_args=module_args, task_vars=task_vars
        )
    except AnsibleError as error:
        answer = {"failed": True, "msg": str(error)}
    if not (answer.get("failed") or answer.get("unreachable")):
        return answer
    # One line: ssh says more than that.
    reason = " ".join(str(answer.get("msg") or "no reason given").split())
    return {"changed": False, "warnings": [f"{lost}: {reason}"]}
