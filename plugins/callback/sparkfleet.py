# SPDX-License-Identifier: Apache-2.0
"""The relevant output of a run: changes, failures, and the progress of actions."""

from __future__ import annotations

import dataclasses
import threading
import time
from typing import Any

from ansible import constants as C
from ansible.playbook.task_include import TaskInclude
from ansible.plugins.callback.default import CallbackModule as Default
from ansible_collections.sparkfleet.dgx.plugins.plugin_utils import package  # noqa: F401 - finds what follows
from sparkfleet_host.bounded import printable

import sparkfleet.planning.plan  # noqa: F401 - once for all workers, which are forked from this process
from sparkfleet.diagnosis.ansible_errors import bare, explained
from sparkfleet.reporting import report

DOCUMENTATION = r"""
name: sparkfleet
type: stdout
short_description: Changes and failures, and nothing that was right already
version_added: 0.2.0
description:
  - A line for each change, the whole of each failure, warnings, what M(ansible.builtin.debug) shows, and what actions
    say of their progress. Plays and tasks that change nothing are passed over.
  - A failure of a task whose message says value, place and remedy is printed once, as that message.
  - A task that lasts says so.
  - With C(-v) everything is printed, as P(ansible.builtin.default#callback) does.
options:
  quiet_seconds:
    description: After so long without a word the name of the task that runs is printed, and again each time.
    type: float
    default: 8
    env: [{name: SPARKFLEET_QUIET_SECONDS}]
    ini: [{section: callback_sparkfleet, key: quiet_seconds}]
extends_documentation_fragment: [default_callback, result_format_callback]
requirements: ["ansible-core 2.19 or newer"]
author: ["The Sparkfleet developers"]
"""

#: Actions that report their progress themselves.
PROGRESS = frozenset(f"sparkfleet.dgx.{name}" for name in ("bundle", "fetch_wait", "release_switch", "vllm_wait"))
#: Characters of a task's name or an item's label that are shown.
SHOWN = 300
#: Strategies under which no task is the current one.
FREE = ("free", "host_pinned", "ansible.builtin.free", "ansible.builtin.host_pinned")
#: Of these, and of all of our own, the messages are written for the operator.
FOR_OPERATORS = ("ansible.builtin.assert", "ansible.builtin.fail", "ansible.builtin.validate_argument_spec")


def cleaned(value: Any) -> Any:
    """The same, deep within ansible-core's summaries too, with texts that do nothing to a terminal; lines after the
    first are indented."""
    if isinstance(value, str):
        return report.clean(value).replace("\n", "\n  ")
    if isinstance(value, dict):
        return {key: cleaned(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([cleaned(item) for item in value])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        return dataclasses.replace(value, **{name: cleaned(getattr(value, name)) for name in fields})
    return value


class Silence(threading.Thread):
    """Reports every `seconds` which task runs, while nothing else is printed. Display may be called from any thread of
    the controller's process, as the one that takes the workers' results does."""

    def __init__(self, display: Any, seconds: float) -> None:
        super().__init__(name="sparkfleet-silence", daemon=True)
        self._display, self._seconds = display, max(seconds, 0.1)
        self._over = threading.Event()
        self._task, self._began, self._next = "", 0.0, 0.0

    def now(self, task: str) -> None:
        """A task begins; "" for one that speaks for itself."""
        self._began = time.monotonic()
        self._task, self._next = task, self._began + self._seconds

    def end(self) -> None:
        """The run is over."""
        self._over.set()

    def run(self) -> None:
        """Check four times in each interval."""
        while not self._over.wait(self._seconds / 4):
            task, now = self._task, time.monotonic()
            if task and now >= self._next:
                self._next = now + self._seconds
                self._display.display(f"{task} ({now - self._began:.0f} s)", color=C.COLOR_VERBOSE)


class CallbackModule(Default):  # type: ignore[misc]
    """With -v the default's own output; without, one line a change."""

    CALLBACK_NAME = "sparkfleet.dgx.sparkfleet"

    def __init__(self) -> None:
        super().__init__()
        self._silence: Silence | None = None

    @property
    def _quiet(self) -> bool:
        return bool(self._display.verbosity == 0)

    # -- what is passed over -------------------------------------------------------------------------------

    def v2_playbook_on_play_start(self, play: Any) -> None:
        """Print no banner; changes name their role and task."""
        if not self._quiet:
            super().v2_playbook_on_play_start(play)
            return
        self._play = play
        if self._silence is None:
            self._silence = Silence(self._display, float(self.get_option("quiet_seconds")))
            self._silence.start()

    def _task_start(self, task: Any, prefix: str | None = None) -> None:
        if not self._quiet:
            super()._task_start(task, prefix=prefix)
            return
        if prefix is not None:
            self._task_type_cache[task._uuid] = prefix
        self._last_task_name = None if self._play.strategy in FREE else task.get_name().strip()
        if self._silence:
            self._silence.now("" if task.resolved_action in PROGRESS else self._name(task))

    def v2_runner_on_ok(self, result: Any) -> None:
        """Print a change as one line; that of a loop was printed item by item."""
        if not self._quiet or (self._run_is_verbose(result) and not result.task.loop):
            super().v2_runner_on_ok(result)
            return
        if isinstance(result.task, TaskInclude):
            return
        self._handle_warnings_and_exception(result)
        if result.result.get("changed", False) and not result.task.loop:
            self._display.display(f"{self.host_label(result)}  {self._name(result.task)}", color=C.COLOR_CHANGED)

    def v2_runner_item_on_ok(self, result: Any) -> None:
        """Print a change of one item."""
        if not self._quiet or self._run_is_verbose(result):
            super().v2_runner_item_on_ok(result)
            return
        self._handle_warnings_and_exception(result)
        if result.result.get("changed", False):
            label = printable(str(self._get_item_label(result.result)), SHOWN)
            self._display.display(
                f"{self.host_label(result)}  {self._name(result.task)}: {label}", color=C.COLOR_CHANGED
            )

    def v2_runner_on_skipped(self, result: Any) -> None:
        """Print nothing."""
        if not self._quiet:
            super().v2_runner_on_skipped(result)

    def v2_runner_item_on_skipped(self, result: Any) -> None:
        """Print nothing."""
        if not self._quiet:
            super().v2_runner_item_on_skipped(result)

    def v2_playbook_on_include(self, included_file: Any) -> None:
        """Print nothing."""
        if not self._quiet:
            super().v2_playbook_on_include(included_file)

    def v2_playbook_on_stats(self, stats: Any) -> None:
        """Print the recap."""
        if self._silence:
            self._silence.end()
        super().v2_playbook_on_stats(stats)

    def _name(self, task: Any) -> str:
        name = str(self._last_task_name or task.get_name()).strip()
        return printable(name.removeprefix("sparkfleet.dgx."), SHOWN)

    # -- what comes from hosts -----------------------------------------------------------------------------

    def _handle_warnings(self, res: Any) -> None:
        """As the default does, without what moves a cursor or begins a line: a host words its warnings."""
        for key, show in (("warnings", self._display._warning), ("deprecations", self._display._deprecated)):
            if res.pop(key, None) and self._current_task_result:
                for summary in getattr(self._current_task_result, key) or ():
                    show(cleaned(summary))

    def _handle_exception(self, result: Any, use_stderr: bool = False) -> None:
        """Likewise for errors."""
        if result.pop("exception", None) and self._current_task_result and self._current_task_result.exception:
            self._display._error(cleaned(self._current_task_result.exception), stderr=use_stderr)

    # -- failures ------------------------------------------------------------------------------------------

    def _is_plain(self, result: Any) -> bool:
        message = str(result.result.get("msg") or "")
        action = str(result.task.resolved_action or result.task.action)
        own = action.startswith("sparkfleet.dgx.") or action in FOR_OPERATORS or explained(message) != bare(message)
        return own and bool(message) and "results" not in result.result and self._display.verbosity == 0

    def _print_message(self, result: Any, word: str) -> None:
        # Lines of its own are indented: none can pass for one of another host, or for the recap.
        message = report.clean(explained(str(result.result["msg"]))).rstrip().replace("\n", "\n  ")
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
