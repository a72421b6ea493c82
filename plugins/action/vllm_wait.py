# SPDX-License-Identifier: Apache-2.0
"""Action: waits until an engine is ready, shows its phases, and explains a failure.

    - vllm_wait:
        container: vllm-llama31-8b-fp8
        url: http://127.0.0.1:8000    # as seen from the host
        timeout: 1800                 # seconds
        download_dir: /opt/hf/models--ORG--NAME     # both only where the server downloads by itself
        download_bytes: 9083000000
      register: started               # started.seconds, started.phases, started.kv_cache

The host is asked in slices of a few seconds, so a broken connection or Ctrl-C leaves nothing behind.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

from sparkfleet import failures, phases

AT_LEAST = 10.0  # seconds after which a line is printed though nothing moved
KEPT = 4000  # log lines that a failure is looked for in

display = Display()


class ActionModule(ActionBase):  # type: ignore[misc]  # ansible has no types
    """Repeats the module vllm_wait until the engine is ready, has failed, or the time is over."""

    TRANSFERS_FILES = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return seconds, phases and KV cache figures; fail with cause, remedy and the lines that say why."""
        task_vars = task_vars or {}
        result: dict[str, Any] = super().run(tmp, task_vars)
        _, options = self.validate_argument_spec(
            argument_spec={
                "container": {"type": "str", "required": True},
                "url": {"type": "str", "default": "http://127.0.0.1:8000"},
                "timeout": {"type": "float", "default": 1800.0},
                "slice": {"type": "float", "default": 3.0},
                "download_dir": {"type": "path", "default": ""},
                "download_bytes": {"type": "int", "default": 0},
                "socket": {"type": "path", "default": "/var/run/docker.sock"},
            }
        )
        container = options["container"]
        if self._task.check_mode:
            return {
                **result,
                "changed": False,
                "msg": f"would wait until {container} answers at {options['url']}/health",
            }
        host = str(task_vars.get("inventory_hostname", "localhost"))
        watch = Watch(host, float(options["slice"]), int(options.pop("download_bytes")))
        while True:
            answer = self._execute_module(
                module_name="vllm_wait",
                module_args={
                    **options,
                    "slice": max(min(options["slice"], options["timeout"] - watch.elapsed()), 0.0),
                    "cursor": watch.cursor,
                    "restarts": watch.restarts,
                },
                task_vars=task_vars,
            )
            if answer.get("failed") or "ready" not in answer:
                return {**result, **answer}
            for line in watch.take(answer):
                display.display(line)
            late = watch.elapsed() >= options["timeout"]
            if answer["ready"] or watch.crashed(answer) or late:
                break
        result.update(
            changed=False,
            ready=answer["ready"],
            seconds=round(watch.elapsed(), 1),
            restart_count=answer["restart_count"],
        )
        if not answer["ready"]:
            return {**result, "failed": True, **explain(container, answer, watch)}
        result.update(
            phases=watch.phases(),
            kv_cache=watch.tracker.kv,
            weights_gib=watch.tracker.weights_gib,
            started_at=answer["started_at"],
        )
        return result


class Watch:
    """What was seen of one start so far, and what to print of it."""

    def __init__(self, host: str, pause: float, download_bytes: int = 0) -> None:
        self.host, self.pause, self.download_bytes = host, pause, download_bytes
        self.cursor, self.restarts = "", -1
        self.log: deque[str] = deque(maxlen=KEPT)
        self.tracker = phases.Tracker(time.time())
        self._began = self._shown_at = time.monotonic()
        self._offset: float | None = None  # the host's clock when the wait began
        self._now = 0.0

    def elapsed(self) -> float:
        """Seconds since the wait began."""
        return time.monotonic() - self._began

    def take(self, answer: dict[str, Any]) -> list[str]:
        """Note an answer of the module; the lines to print."""
        self._now = float(answer["now"])
        lines = answer["log_lines"]
        if self._offset is None:
            self._offset = self._now - self.elapsed()
            self.restarts = int(answer["restart_count"])
            started, _ = phases.split_stamp(answer["started_at"])
            self.tracker = phases.Tracker(started if started and started > 0 else self._offset)
        self.cursor = answer["cursor"] or self.cursor
        self.log.extend(lines)
        steps = self.tracker.feed(lines, self._now)
        if answer.get("downloaded"):
            steps += self.tracker.downloaded(int(answer["downloaded"]), self.download_bytes, self._now)
        # Of what happened before the wait began only the last step is news.
        old = [step for step in steps if step.at < self._offset]
        steps = [*old[-1:], *steps[len(old) :]]
        if answer["ready"]:
            steps = [] if steps == old[-1:] else steps
            steps.append(self.tracker.ready(self._now))
        if not steps and time.monotonic() - self._shown_at + self.pause > AT_LEAST:
            steps = [phases.Step(self.tracker.step.phase, self.tracker.step.figure, self._now)]
        if steps:
            self._shown_at = time.monotonic()
        return [f"{self.host}  {max(step.at - self._offset, 0):.0f} s  {step}" for step in steps]

    def crashed(self, answer: dict[str, Any]) -> bool:
        """Whether the container has ended, or was started anew by Docker since the first look."""
        return bool(answer["state"] != "running" or answer["restart_count"] > self.restarts)

    def phases(self) -> list[dict[str, Any]]:
        """Phases so far with their seconds."""
        return self.tracker.phases(self._now)


def explain(container: str, answer: dict[str, Any], watch: Watch) -> dict[str, Any]:
    """msg and failure of a start that failed."""
    log = [*watch.log, *([answer["error"]] if answer["error"] else [])]
    ended = watch.crashed(answer)
    findings = failures.match(log, exit_code=answer["exit_code"] if ended else None, oom_killed=answer["oom_killed"])
    known = [item for item in findings if not item.failure.harmless]
    after = f"after {watch.elapsed():.0f} s ({watch.tracker.step})"
    again = ""
    if answer["state"] == "missing":
        what, known = f"there is no container {container}", [failures.Finding(failures.BY_ID["container-missing"])]
    elif answer["state"] == "restarting" or answer["restart_count"] > watch.restarts:
        what = f"{container} crashed {after}"
        count = answer["restart_count"]
        times = f"{count} restart{'s' * (count != 1)} so far"
        again = f" Docker keeps starting it again ({times}): `docker stop` it until then."
        known = known or [failures.Finding(failures.BY_ID["restart-loop"])]
    elif ended and answer["error"]:
        what = f"{container} could not be started"
    elif ended:
        what = f"{container} ended with exit code {answer['exit_code']} {after}"
    else:
        what = f"{container} was not ready {after}"
        known = known or [failures.Finding(failures.BY_ID["start-timeout"])]
    failure = known[0].failure if known else failures.BY_ID["engine-died"]
    # Of what was seen from outside the title would say the same again.
    why = known[0].message if known and known[0].lines else f"{failure.cause}. {failure.remedy}"
    shown = "".join(f"\n  {line}" for line in failures.relevant(log, known))
    return {
        "failure": failure.id,
        "msg": f"{what}: {why}{again} [{failure.id}]{shown}",
    }
