# SPDX-License-Identifier: Apache-2.0
"""The default output, with one message for a failure that explains itself."""

from __future__ import annotations

from typing import Any

from ansible import constants as C
from ansible.plugins.callback.default import CallbackModule as Default
from ansible_collections.sparkfleet.dgx.plugins.plugin_utils import package  # noqa: F401 - finds what follows

import sparkfleet.planning.plan  # noqa: F401 - once for all workers, which are forked from this process
from sparkfleet.diagnosis.ansible_errors import bare, explained
from sparkfleet.reporting import report

DOCUMENTATION = r"""
name: sparkfleet
type: stdout
short_description: The default output, with short errors
description:
  - As P(ansible.builtin.default#callback), but a failure of a task whose message says value, place and remedy is
    printed once, as that message. Since 2.19 Ansible prints it twice, with the source and all results of the task.
  - With C(-v) everything is printed as the default does.
extends_documentation_fragment: [default_callback, result_format_callback]
requirements: ["ansible-core 2.19 or newer"]
author: ["The Sparkfleet developers"]
"""

#: Of these, and of all of our own, the messages are written for the operator.
FOR_OPERATORS = ("ansible.builtin.assert", "ansible.builtin.fail", "ansible.builtin.validate_argument_spec")


class CallbackModule(Default):  # type: ignore[misc]
    """Prints as the default does, failures that explain themselves apart."""

    CALLBACK_NAME = "sparkfleet.dgx.sparkfleet"

    def _is_plain(self, result: Any) -> bool:
        message = str(result.result.get("msg") or "")
        action = str(result.task.resolved_action or result.task.action)
        own = action.startswith("sparkfleet.dgx.") or action in FOR_OPERATORS or explained(message) != bare(message)
        return own and bool(message) and "results" not in result.result and self._display.verbosity == 0

    def _print_message(self, result: Any, word: str) -> None:
        if self._last_task_banner != result.task._uuid:
            self._print_task_banner(result.task)
        message = report.clean(explained(str(result.result["msg"])))
        self._display.display(f"{word}: [{self.host_label(result)}]: {message}", color=C.COLOR_ERROR)

    def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False) -> None:
        """Print a failure."""
        if ignore_errors or not self._is_plain(result):
            super().v2_runner_on_failed(result, ignore_errors=ignore_errors)
        else:
            self._print_message(result, "fatal")

    def v2_runner_on_unreachable(self, result: Any) -> None:
        """Print that a host is not reached."""
        if self._is_plain(result):
            self._print_message(result, "unreachable")
        else:
            super().v2_runner_on_unreachable(result)
