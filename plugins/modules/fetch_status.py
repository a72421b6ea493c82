#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: how far the background jobs of a Spark are (a long poll; see the action fetch_wait)."""

from __future__ import annotations

DOCUMENTATION = r"""
module: fetch_status
short_description: Read the status of background jobs, waiting briefly for them to finish
description:
  - Returns when every job has ended, when one has failed, or after the slice. Changes nothing.
  - A job whose process is gone without a final state is reported as died.
options:
  jobs:
    description: The jobs to check.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: Name of the job, for the result.
        type: str
        required: true
      status_file:
        description: The job's status file.
        type: path
        required: true
      results_file:
        description: Ansible's own file of the async job; without it only the status file is used.
        type: path
  slice:
    description: Seconds to wait for the jobs to finish.
    type: float
    default: 3.0
author: ["The Sparkfleet developers"]
attributes:
  check_mode:
    support: full
    description: Changes nothing.
"""

EXAMPLES = r"""
- name: Check running jobs
  sparkfleet.dgx.fetch_status:
    slice: 0
    jobs:
      - {name: image, status_file: /run/sparkfleet/fetch/image.json}
      - {name: model, status_file: /run/sparkfleet/fetch/model.json}
"""

RETURN = r"""
jobs:
  description:
    - One entry per job, in the given order. name, state (absent, starting, running, done, failed, died), what, phase,
      done, total, percent, rate (bytes, bytes per second), message, failure, result.
  returned: always
  type: list
  elements: dict
"""

import time
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import bounded
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.bounded import BoundsError, printable
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.job import is_alive, read_status

POLL = 0.25  # seconds
START_WITHIN = 60.0  # seconds an async job may take before its first status
CONFIRM = 0.5  # seconds after which a death is believed
ENDED = ("absent", "done", "failed", "died")
BAD = ("failed", "died")
SHOWN = ("what", "phase", "done", "total", "percent", "rate", "message")
RESULT_BYTES = 64 << 20  # of Ansible's file of a job; the list of a bundle's files is long
NOISE = ("diff", "invocation", "ansible_job_id", "finished", "started", "stderr", "stderr_lines", "failed")


def job_state(job: dict[str, Any], now: float | None = None) -> dict[str, Any]:
    """The state of one job from its files; `died` is how it appears at this instant."""
    now = time.time() if now is None else now
    outcome, launched = async_outcome(job.get("results_file"))
    status = read_status(job["status_file"])
    entry = {"name": job["name"], "state": "absent", "failure": "", "result": {}, **dict.fromkeys(SHOWN)}
    entry["message"] = ""
    if outcome and not outcome.get("attached"):
        if outcome.get("failed"):
            if "failure" not in outcome and status and status["state"] == "running" and not is_alive(status):
                return {**entry, "state": "died", "message": f"its process {status['pid']} was killed"}
            message = str(outcome.get("msg") or "").strip() or "no message"
            failure = str(outcome.get("failure") or "internal")
            if failure == "internal":
                message = printable(message.splitlines()[-1])  # of a traceback the last line says it
            return {**entry, "state": "failed", "message": message, "failure": failure}
        result = {key: value for key, value in outcome.items() if key not in NOISE}
        return {**entry, "state": "done", "phase": "done", "percent": 100, "result": result}
    if outcome:
        # Another job does the work; until it writes its first status, the file still describes an earlier job.
        if status is None or (status["state"] != "running" and status["pid"] != outcome.get("holder_pid")):
            late = now - launched > START_WITHIN
            return {**entry, "state": "died" if late else "starting", "message": "no status" if late else ""}
    elif launched and (status is None or status["started"] < launched):
        late = now - launched > START_WITHIN
        return {**entry, "state": "died" if late else "starting", "message": "it did not start" if late else ""}
    if status is None:
        return entry
    entry.update({key: status.get(key) for key in SHOWN}, state=status["state"], result=status["result"])
    if status["error"]:
        entry["failure"] = status["error"]["id"]
    if status["state"] == "running" and not is_alive(status):
        entry.update(state="died", message=f"its process {status['pid']} is gone")
    return entry


def async_outcome(path: str | None) -> tuple[dict[str, Any] | None, float]:
    """What the async job returned (None while it runs, or without such a file) and when it was launched."""
    if not path:
        return None, 0.0
    try:
        launched = Path(path).stat().st_mtime
        value = bounded.read_json(path, RESULT_BYTES)
    except (OSError, BoundsError):
        return None, 0.0
    if "finished" in value and not value["finished"]:
        return None, launched
    return value, launched


def poll(jobs: list[dict[str, Any]], seconds: float) -> list[dict[str, Any]]:
    """`job_state` at every job until all have ended, one failed, or the time is over."""
    end = time.monotonic() + seconds
    while True:
        found = [job_state(job) for job in jobs]
        if any(entry["state"] == "died" for entry in found):
            time.sleep(CONFIRM)  # a job may end between the reading of its two files
            found = [job_state(job) for job in jobs]
        over = all(entry["state"] in ENDED for entry in found) or any(entry["state"] in BAD for entry in found)
        if over or time.monotonic() >= end:
            return found
        time.sleep(min(POLL, max(0.0, end - time.monotonic())))


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "jobs": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "name": {"type": "str", "required": True},
                    "status_file": {"type": "path", "required": True},
                    "results_file": {"type": "path"},
                },
            },
            "slice": {"type": "float", "default": 3.0},
        },
        supports_check_mode=True,
    )
    module.exit_json(changed=False, jobs=poll(module.params["jobs"], module.params["slice"]))


if __name__ == "__main__":
    main()
