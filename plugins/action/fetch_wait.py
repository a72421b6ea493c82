# SPDX-License-Identifier: Apache-2.0
"""Action: waits for the background jobs of a host and shows how far they are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.sparkfleet.dgx.plugins.plugin_utils import package  # noqa: F401 - finds what follows
from sparkfleet_host.bounded import printable
from sparkfleet_host.job import FOLDER, TRANSFER

from sparkfleet.diagnosis.startup import AT_LEAST
from sparkfleet.fleet.reconnect import ReconnectingExecutor

SLICE = 3.0  # seconds of one long poll; also the shortest time between two lines
ENDED = ("absent", "done", "failed", "died", "skipped")

display = Display()


def gigabytes(done: int, total: int | None) -> str:
    """`1.3 of 3.0 GB` (1 GB = 1e9 bytes); two decimals below 1 GB."""
    digits = 2 if (total or done) < 1e9 else 1
    if total is None:
        return f"{done / 1e9:.{digits}f} GB"
    return f"{done / 1e9:.{digits}f} of {total / 1e9:.{digits}f} GB"


def describe(job: dict[str, Any]) -> str:
    """One job in a few words: `image 43% (1.3 of 3.0 GB, 80 MB/s)`."""
    name, state, phase = job["name"], job["state"], job.get("phase") or ""
    if state == "done":
        result = job.get("result") or {}
        if result.get("changed") is False:
            return f"{name} present"
        return f"{name} done ({result.get('seconds', 0):.0f} s)"
    if state != "running" or not phase or phase in ("starting", "resolving"):
        return f"{name} {'starting' if state == 'running' else state}"
    amount = gigabytes(job["done"] or 0, job["total"])
    if phase not in TRANSFER:
        return f"{name} {phase} {amount}"
    rate = f", {job['rate'] / 1e6:.0f} MB/s" if job.get("rate") else ""
    percent = f"{job['percent']}% " if job["percent"] is not None else ""
    return f"{name} {percent}({amount}{rate})"


def line(host: str, jobs: Sequence[dict[str, Any]]) -> str:
    """The line printed for a host."""
    return "  ".join([host, *(describe(job) for job in jobs)])


def failure(jobs: Sequence[dict[str, Any]]) -> str | None:
    """The message of the first failed job, and the state of the rest; None if none failed."""
    bad = next((job for job in jobs if job["state"] in ("failed", "died")), None)
    if bad is None:
        return None
    message = str(bad["message"]).rstrip(".")
    if bad["state"] == "died":
        message = f"the job died on the host ({message}); run again, it resumes"
    if bad.get("failure"):
        message += f" [{bad['failure']}]"
    others = [
        f"{job['name']} {'is done' if job['state'] == 'done' else job['state']}"
        if job["state"] in ENDED
        else f"{job['name']} continues in the background (run again to attach)"
        for job in jobs
        if job is not bad
    ]
    return ". ".join([f"{bad['name']}: {message}", *others])


def entry(given: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What to ask the host about a job, and its state when that is known already. Raises AnsibleActionFail."""
    if not isinstance(given, dict) or not given.get("name") or set(given) - {"name", "job", "status_file", "source"}:
        raise AnsibleActionFail(f"fetch_wait: a job is {{name: image, job: REGISTERED RESULT}}, not {given!r}")
    name, job = str(given["name"]), given.get("job") or {}
    query = {"name": name, "status_file": given.get("status_file") or f"{FOLDER}/{name}.json"}
    state: dict[str, Any] = {"name": name, "message": "", "failure": "", "result": {}}
    if job.get("skipped"):
        return query, {**state, "state": "skipped"}
    if job.get("failed"):
        return query, {**state, "state": "failed", "message": job.get("msg", ""), "failure": job.get("failure", "")}
    if job.get("results_file"):
        query["results_file"] = job["results_file"]
        return query, None
    if not job or job.get("attached"):
        return query, None
    noise = ("diff", "failed", "invocation", "exception", "warnings", "deprecations")
    result = {key: value for key, value in job.items() if key not in noise}
    return query, {**state, "state": "done", "result": result}


class ActionModule(ActionBase):  # type: ignore[misc]  # ansible has no types
    """See the module's docstring."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _supports_async = False
    _VALID_ARGS = frozenset(("jobs", "timeout"))

    def run(self, tmp: None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Waits for the end of all jobs or the first failure; raises AnsibleActionFail on bad arguments only."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        task_vars = task_vars or {}
        wanted, timeout = self._task.args.get("jobs"), float(self._task.args.get("timeout", 7200))
        if not isinstance(wanted, list) or not wanted:
            raise AnsibleActionFail("fetch_wait: jobs must be a list of {name, job}")
        pairs = [entry(given) for given in wanted]
        sources = {str(given["name"]): str(given.get("source") or "") for given in wanted}
        host = str(task_vars.get("inventory_hostname", "localhost"))
        self._executor = ReconnectingExecutor(self, host, display.display)
        began = shown_at = time.monotonic()
        shown = ""
        while True:
            jobs, answer = self._look(pairs, task_vars)
            if answer is not None:
                return {**result, **answer}
            message = failure(jobs)
            over = message is not None or all(job["state"] in ENDED for job in jobs)
            now, text = time.monotonic(), line(host, jobs)
            if text != shown or now - shown_at >= AT_LEAST:
                if shown or not over:  # nothing to report for jobs that had nothing to do
                    display.display(text)
                shown, shown_at = text, now
            if over:
                break
            if now - began >= timeout:
                message = f"not done after {timeout:.0f} s ({text}); the jobs continue, run again to attach"
                break
        for job in jobs:
            alone = job["result"].get("mirror_failed") or job["result"].get("peer_failed")
            if alone:
                instead = f"instead of {sources[job['name']]}" if sources[job["name"]] else "instead"
                display.display(
                    f"{host}  {job['name']} was fetched from the internet {instead}: {printable(str(alone), 500)}"
                )
            if unverified := job["result"].get("unverified"):
                display.warning(f"{host}  {job['name']} not verified: {printable(str(unverified), 600)}")
            result[job["name"]] = {**job["result"], "state": job["state"]}
        result["changed"] = any(bool(job["result"].get("changed")) for job in jobs)
        result["seconds"] = round(time.monotonic() - began, 1)
        if message:
            bad = next((job for job in jobs if job["state"] in ("failed", "died")), None)
            failure_id = (bad["failure"] or "fetch-died") if bad else "fetch-timeout"
            result.update(failed=True, msg=message, failure=failure_id)
        return result

    def _look(
        self, pairs: list[tuple[dict[str, Any], dict[str, Any] | None]], task_vars: dict[str, Any]
    ) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
        """The state of every job; the second value is a failed answer of the module instead."""
        queries = [query for query, state in pairs if state is None]
        found: dict[str, dict[str, Any]] = {}
        # Once one job has failed there is nothing to wait for; still report the state of the rest.
        failed = any(state is not None and state["state"] == "failed" for _, state in pairs)
        if queries:
            answer = self._executor.execute(
                module_name="sparkfleet.dgx.fetch_status",
                module_args={"jobs": queries, "slice": 0.0 if failed else SLICE},
                task_vars=task_vars,
            )
            if answer.get("failed") or "jobs" not in answer:
                return [], answer
            found = {job["name"]: job for job in answer["jobs"]}
        jobs = [state if state is not None else found[query["name"]] for query, state in pairs]
        for job in jobs:
            if job["state"] == "absent":
                job.update(state="died", message=job["message"] or "no such job")
        return jobs, None
