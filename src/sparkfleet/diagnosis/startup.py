"""An engine's start as the controller follows it: what to print, and why it failed."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from sparkfleet.diagnosis import failures, startup_log

AT_LEAST = 10.0  # seconds after which a line is printed though nothing moved
KEPT = 4000  # log lines that are searched for a failure


class Watch:
    """What was seen of one start so far, and what to print of it."""

    def __init__(self, host: str, pause: float, download_bytes: int = 0, began: float | None = None) -> None:
        """`began`: the host's clock (Unix time, s) that figures count from; without it the first answer's."""
        self.host, self.pause, self.download_bytes = host, pause, download_bytes
        self.cursor, self.restarts = "", -1
        self.log: deque[str] = deque(maxlen=KEPT)
        self.tracker = startup_log.Tracker(time.time())
        self._began = self._shown_at = time.monotonic()
        self._offset = began  # the host's clock when the wait began
        self._seen = False
        self._now = 0.0

    def elapsed(self) -> float:
        """Seconds since the wait began."""
        return time.monotonic() - self._began

    def take(self, answer: dict[str, Any]) -> list[str]:
        """Note an answer of the module; the lines to print."""
        self._now = float(answer["now"])
        lines = answer["log_lines"]
        if not self._seen:
            self._seen = True
            self._offset = self._now - self.elapsed() if self._offset is None else self._offset
            self.restarts = int(answer["restart_count"])
            started, _ = startup_log.split_stamp(answer["started_at"])
            self.tracker = startup_log.Tracker(started if started and started > 0 else self._offset)
        self.cursor = answer["cursor"] or self.cursor
        self.log.extend(lines)
        steps = self.tracker.feed(lines, self._now)
        if answer.get("downloaded"):
            steps += self.tracker.downloaded(int(answer["downloaded"]), self.download_bytes, self._now)
        assert self._offset is not None
        # Of what happened before the wait began only the last step is news.
        old = [step for step in steps if step.at < self._offset]
        steps = [*old[-1:], *steps[len(old) :]]
        if answer["ready"]:
            steps = [] if steps == old[-1:] else steps
            steps.append(self.tracker.ready(self._now))
        # Once it is ready, what it logs is of its requests.
        loads = self.tracker.step.phase != startup_log.READY
        if not steps and loads and time.monotonic() - self._shown_at + self.pause > AT_LEAST:
            steps = [startup_log.Step(self.tracker.step.phase, self.tracker.step.figure, self._now)]
        if steps:
            self._shown_at = time.monotonic()
        return [f"{self.host}  {max(step.at - self._offset, 0):.0f} s  {step}" for step in steps]

    def crashed(self, answer: dict[str, Any]) -> bool:
        """Whether the container has ended, or was restarted by Docker since the first observation."""
        return bool(answer["state"] != "running" or answer["restart_count"] > self.restarts)

    def phases(self) -> list[dict[str, Any]]:
        """Phases so far with their seconds."""
        return self.tracker.phases(self._now)


def explain(
    container: str, answer: dict[str, Any], watch: Watch, again: bool = True, elapsed: float | None = None
) -> dict[str, Any]:
    """msg and failure of a start that failed; `again`: say that Docker keeps starting it, if it does. `elapsed`:
    seconds that it took; without it those of the watch."""
    log = [*watch.log, *([answer["error"]] if answer["error"] else [])]
    ended = watch.crashed(answer)
    findings = failures.match(log, exit_code=answer["exit_code"] if ended else None, oom_killed=answer["oom_killed"])
    known = [item for item in findings if not item.failure.harmless]
    after = f"after {watch.elapsed() if elapsed is None else elapsed:.0f} s ({watch.tracker.step})"
    more = ""
    if answer["state"] == "missing":
        what, known = f"there is no container {container}", [failures.Finding(failures.BY_ID["container-missing"])]
    elif answer["state"] == "restarting" or answer["restart_count"] > watch.restarts:
        what = f"{container} crashed {after}"
        count = answer["restart_count"]
        times = f"{count} restart{'s' * (count != 1)} so far"
        more = f" Docker keeps starting it again ({times}): `docker stop` it until then." if again else ""
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
        "msg": f"{what}: {why}{more} [{failure.id}]{shown}",
    }
