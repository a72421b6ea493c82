# SPDX-License-Identifier: Apache-2.0
"""The default output, with one message for a failure that explains itself."""

from __future__ import annotations

from typing import Any

from ansible import constants as C
from ansible.plugins.callback.default import CallbackModule as Default

import sparkfleet.plan  # noqa: F401 - once for all workers, which are forked from this process
from sparkfleet.reporting import report
from sparkfleet.diagnosis.ansible_errors import bare, explained

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

#: Actions whose messages are written for the operator.
OWN = frozenset(
    {
        *("fetch_wait", "image_pull", "model_download", "nvidia_container_runtime", "release_stage", "release_switch"),
        *("fleet_check", "spark_diagnose", "spark_remove", "spark_status"),
        *("secret_file", "spark_plan", "stop_services", "swap", "vllm_verify", "vllm_wait"),
        *("ansible.builtin.assert", "ansible.builtin.fail", "ansible.builtin.validate_argument_spec"),
        *("bundle", "bundle_collect", "share"),
        *("gateway_plan", "haproxy_server", "rollout_schedule", "rollout_wave", "spark_drift"),
    }
)


class CallbackModule(Default):  # type: ignore[misc]
    """Prints as the default does, failures of OWN actions apart."""

    CALLBACK_NAME = "sparkfleet"

    def _is_plain(self, result: Any) -> bool:
        message = str(result.result.get("msg") or "")
        own = str(result.task.action) in OWN or explained(message) != bare(message)
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
