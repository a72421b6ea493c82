#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""The switch to a release: start it, follow it."""

from __future__ import annotations

DOCUMENTATION = r"""
module: release_switch
short_description: Switches to a release, or back to what ran before
description:
  - Starts a job on the host that stops the old engines, starts the new ones one after the other, waits, verifies them,
    and makes the release the current one; on any failure the old ones are started and verified again. The job outlives
    the connection.
  - An engine that both releases define in the same way keeps running, and is verified with the others.
  - Whatever can be known is checked first; if there is a problem, nothing is stopped. A release that runs already,
    in the container that was verified, is left alone by O(mode=deploy).
  - The module alone starts the job, or joins one that switches to the same release, and follows it for O(slice)
    seconds. The action of the same name repeats that until the job is done, showing phases with their figures, and
    fails naming both releases.
options:
  to: {description: Number of the release., type: int, required: true}
  mode:
    description:
      - C(deploy) and C(rollback) differ in wording only; C(restart) is for the current release.
      - C(trial) is for a release that is a trial; once it answers, its figures are read, its speed is measured, and
        what ran before is started and verified again, whatever happened.
    type: str
    choices: [deploy, rollback, restart, trial]
    default: deploy
  verb: {description: The command that was run., type: str, default: ""}
  controller: {description: "Operator, USER@HOST; the action sets it.", type: str, default: ""}
  start_timeout: {description: Seconds that an engine may take to become ready., type: float, default: 1800}
  verify:
    description:
      - What the engines are asked before the release becomes the current one. C(quick) takes seconds, C(deep) adds what
        their models are for, and takes minutes. Releases that are restored are asked the quick set.
    type: str
    choices: [quick, deep]
    default: quick
  verify_seconds: {description: Seconds of what C(deep) adds for each engine., type: float, default: 300}
  keep_releases: {description: Number of releases that are kept., type: int, default: 5}
  reclaim:
    description:
      - Once the release is verified, remove what no kept release needs of what Sparkfleet fetched - images that it
        pulled, models that it downloaded, compile caches. What others use stays; the next switch tries again.
    type: bool
    default: true
  lock: {description: "In check mode, what the release is pinned to if it is not staged.", type: dict, default: {}}
  services:
    description: With O(mode=restart) the engines (services of the compose file) that are restarted; empty for all.
    type: list
    elements: str
    default: []
  recreate: {description: Recreate the container even if its file has not changed., type: bool, default: false}
  new_key:
    description: Use the key staged in C(/etc/sparkfleet/engine_key.next); a failed switch restores the old one.
    type: bool
    default: false
  project_dir: {description: Folder of the releases., type: path, default: /opt/sparkfleet}
  state_dir: {description: Folder of the journal., type: path, default: /var/lib/sparkfleet}
  begin: {description: Name of the job that this call starts unless there is one; the action's., type: str, default: ""}
  id: {description: The job to follow; empty to start one. The action's., type: str, default: ""}
  slice: {description: Seconds of one long poll., type: float, default: 3}
  recover: {description: End a job that was killed., type: bool, default: true}
  container: {description: The container whose log was read last., type: str, default: ""}
  cursor: {description: RFC 3339 time of the last log line seen., type: str, default: ""}
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Checks a staged release; reports what would be pruned and reclaimed.}
  diff_mode: {support: none, description: M(sparkfleet.dgx.release_stage) shows the file.}
"""

EXAMPLES = r"""
- name: Switch to the release
  sparkfleet.dgx.release_switch:
    to: "{{ staged.release }}"
    verb: site.yml
"""

RETURN = r"""
id: {description: Of the job., returned: always, type: str}
joined: {description: Whether the job was started by another run., returned: always, type: bool}
already: {description: Whether the release already runs; there was nothing to do., returned: always, type: bool}
done: {description: Whether the job has ended., returned: always, type: bool}
cut: {description: "Whether the job was killed, and is now being finished.", returned: always, type: bool}
journal: {description: Its journal., returned: always, type: dict}
state: {description: State of the container it waits for; missing for none., returned: always, type: str}
restart_count: {description: How often Docker restarted it., returned: always, type: int}
started_at: {description: RFC 3339 time of its last start., returned: always, type: str}
log_lines: {description: Its lines since the cursor., returned: always, type: list, elements: str}
cursor: {description: Time of the last line read., returned: always, type: str}
would: {description: Releases that would be pruned and what would be reclaimed., returned: check mode, type: dict}
now: {description: Unix time of the host., returned: always, type: float}
release: {description: By the action; number model and models that serve now., returned: action, type: dict}
previous: {description: By the action; number model and models that served before., returned: action, type: dict}
outcome: {description: "By the action; verified, restored, removed, refused or failed.", returned: action, type: str}
out_of_service_s: {description: By the action; seconds without an answer., returned: action, type: float}
reclaimed: {description: By the action; kind name and bytes of what was removed., returned: action, type: list}
reclaimed_bytes: {description: By the action; their sum., returned: action, type: int}
left: {description: "By the action; what stays although no release needs it, and why.", returned: action, type: list}
troubles: {description: By the action; what could not be written or removed., returned: action, type: list}
seconds: {description: By the action; total., returned: action, type: float}
verification: {description: By the action; result of the first engine's verification., returned: action, type: dict}
measured: {description: By the action; what was measured of each engine by service., returned: action, type: dict}
verifications: {description: By the action; results of the verifications by service., returned: action, type: dict}
failure: {description: By the action; entry in the table of failures., returned: failure, type: str}
"""

import contextlib
import re
import secrets
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import hardening, reclaim
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.docker import (
    Docker,
    DockerError,
    DockerUnavailable,
)
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.engine import (
    inspect,
    just_before,
    new_lines,
)
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.guard import SETTINGS_FILE
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.precheck import precheck
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.release_format import DONE, TRIAL
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.releases import (
    GUARD_PATIENCE,
    HELD_BY_GUARD,
    HELD_BY_SWITCH,
    ReleaseError,
    Store,
    read_json,
)
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.switch import VERIFIED
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.verify import BUDGET, DEEP, QUICK

UNIT = "sparkfleet-switch"
PROGRAM = "lib/sparkfleet_host.pyz"
POLL = 0.25
BEGIN_SECONDS = 20.0  # until the job has written its first line


def who(store: Store, journal: dict[str, Any] | None, holder: dict[str, Any] | None = None) -> str:
    """Who does what since when, of a switch that runs."""
    if journal is None or journal["phase"] == DONE:
        pid = f" (pid {holder['pid']})" if holder and holder["pid"] else ""
        process = str((holder or {}).get("process") or "a process")
        return f"another switch is beginning: {process}{pid} holds {store.lock_file}"
    since = time.strftime("%H:%M:%S", time.localtime(journal["began"])) if journal["began"] else "some time"
    models = ", ".join(dict.fromkeys(journal["models"])) or "model unknown"
    return (
        f"{journal['controller'] or 'another run'} is switching it to release {journal['to']} "
        f"({models}) with {journal['verb'] or 'a run of Sparkfleet'} since {since}, "
        f"phase {journal['phase']}"
    )


def cache_dir() -> str:
    """The model cache, as the guard's settings have it."""
    found = (read_json(Path(SETTINGS_FILE)) or {}).get("cache_dir")
    return found if isinstance(found, str) and re.fullmatch(r"/[^\s:]+", found) else "/opt/hf"


def spawn(module: AnsibleModule, store: Store, words: list[str]) -> None:
    """Start the program's `switch` as a job that outlives this connection."""
    program = Path(store.project_dir, PROGRAM)
    if not program.is_file():
        module.fail_json(msg=f"{program} is missing: run playbooks/prepare.yml", failure="internal")
    python = shutil.which("python3") or "/usr/bin/python3"
    argv = ["systemd-run", "--quiet", "--collect", f"--unit={UNIT}", "--description=Switch of a Sparkfleet release"]
    # At a shutdown the job ends before Docker does, or it would take the end of the engine for a failure.
    argv += ["--property=After=docker.service"]
    places = (module.params["project_dir"], module.params["state_dir"], cache_dir())
    argv += hardening.arguments(hardening.switch(*places, reclaim.places(store)))
    argv += ["--", python, str(program), "switch", *words]
    argv += [f"--project-dir={module.params['project_dir']}", f"--state-dir={module.params['state_dir']}"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode != 0:
        reason = done.stderr.strip() or f"exit code {done.returncode}"
        if "already" in reason:  # another run was faster by a moment
            who_else = who(store, store.switch(), store.holder())
            module.fail_json(msg=f"{who_else}; run again when that is over", failure="switch-running-other")
        module.fail_json(msg=f"the switch cannot be started: {reason}", failure="internal")


def runs(store: Store, docker: Docker, number: int) -> bool:
    """Whether the containers that run are those in which this release was verified, from intact files."""
    verified_in = (store.outcome(number) or {}).get("container_ids") or {}
    if store.current() != number or store.damage(number):
        return False
    try:
        for item in store.engines(number):
            found = inspect(docker, item.service)
            if found["state"] != "running" or not found["id"] or found["id"] != verified_in.get(item.service):
                return False
    except (DockerError, ReleaseError):
        return False
    return True


def begin(module: AnsibleModule, store: Store) -> tuple[str, str]:
    """Start a job, or join the one that does the same: its id, and `started`, `joined`, or `already` where the release
    already runs."""
    params = module.params
    id_ = params["begin"] or secrets.token_hex(6)
    ended = store.switch()
    if ended and ended["id"] == id_:  # started by a call whose answer was lost with the connection
        return id_, "started"
    holder = store.holder()
    if holder and holder["holder"] == HELD_BY_SWITCH:
        journal = store.switch()
        same = journal and journal["to"] == params["to"] and {*journal["services"]} == {*params["services"]}
        if journal and same and journal["phase"] not in ("", DONE):
            return str(journal["id"]), "joined"
        module.fail_json(
            msg=f"{who(store, journal, holder)}; run again when that is over", failure="switch-running-other"
        )
    if holder and holder["holder"] == "other":
        process = f"{holder['process'] or 'a process'} (pid {holder['pid'] or '?'})"
        module.fail_json(
            msg=f"{process} holds {store.lock_file} and is not a switch of Sparkfleet; what runs is untouched",
            failure="lock-held",
        )
    plain = params["mode"] == "deploy" and not params["recreate"] and not params["new_key"]
    verified = plain and ended and ended["to"] == params["to"] and ended["outcome"] == VERIFIED
    # It was not the current one when this run checked: another run with the same aim was faster. The journal alone
    # proves nothing: files and containers are changed by hand.
    if verified and ended and runs(store, Docker(), params["to"]):
        return str(ended["id"]), "already"
    words = [f"--{key}={params[key]}" for key in ("to", "mode", "controller", "verb")]
    words += [f"--keep={params['keep_releases']}", f"--id={id_}", f"--start-timeout={params['start_timeout']}"]
    words += [f"--verify={params['verify']}", f"--verify-seconds={params['verify_seconds']}"]
    words += [] if params["reclaim"] else ["--no-reclaim"]
    words += [f"--service={service}" for service in params["services"]]
    words += [*(["--recreate"] if params["recreate"] else []), *(["--new-key"] if params["new_key"] else [])]
    spawn(module, store, words)
    began = time.monotonic()
    while (store.switch() or {}).get("id") != id_:
        holder = store.holder()
        guarding = holder is not None and holder["holder"] == HELD_BY_GUARD  # the job waits for what the guard does
        if time.monotonic() - began > (GUARD_PATIENCE if guarding else BEGIN_SECONDS):
            if holder:
                who_else = who(store, store.switch(), holder)
                module.fail_json(msg=f"{who_else}; run again when that is over", failure="switch-running-other")
            module.fail_json(
                msg=f"the switch did not start: see journalctl -u {UNIT}; what runs is untouched", failure="internal"
            )
        time.sleep(0.05)
    return id_, "started"


def foresee(params: dict[str, Any], store: Store) -> dict[str, Any]:
    """What the switch would remove: {"pruned": [number], "reclaimed": […], "left": […]}."""
    pruned, reclaimed, left = reclaim.foresee(store, Docker(), params["keep_releases"], params["to"], params["lock"])
    return {"pruned": pruned, **({"reclaimed": reclaimed, "left": left} if params["reclaim"] else {})}


def watch(store: Store, id_: str, seconds: float) -> tuple[dict[str, Any], bool]:
    """The journal once its phase has moved, the job is over or the time is: with whether it is over."""
    deadline = time.monotonic() + seconds
    first = (store.switch() or {}).get("phase")
    while True:
        journal = store.switch() or {}
        # Active first: the journal is written before the lock is released.
        over = not store.switch_active()
        journal = store.switch() or journal
        if journal.get("id") != id_ or journal.get("phase") == DONE or over or journal.get("phase") != first:
            return journal, over or journal.get("phase") == DONE or journal.get("id") != id_
        if time.monotonic() > deadline:
            return journal, False
        time.sleep(POLL)


def log(docker: Docker, journal: dict[str, Any], container: str, cursor: str) -> dict[str, Any]:
    """State and new log lines of the container that the job waits for."""
    name = str(journal.get("container") or "")
    found: dict[str, Any] = {
        "state": "missing",
        "restart_count": 0,
        "started_at": "",
        "log_lines": [],
        "cursor": cursor,
    }
    with contextlib.suppress(DockerError):
        seen = inspect(docker, name) if name else None
        if seen and seen["state"] != "missing":
            # The log of an earlier start is not that of this one.
            since = cursor if name == container else ""
            since = max(since, just_before(seen["started_at"]))
            lines = new_lines(docker, name, {**seen, "ready": False}, since)
            found.update({key: seen[key] for key in ("state", "restart_count", "started_at")}, log_lines=lines)
            found["cursor"] = lines[-1].partition(" ")[0] if lines else since
    return found


def main() -> None:
    """Entry point of the module."""
    text = {"type": "str", "default": ""}
    module = AnsibleModule(
        argument_spec={
            "to": {"type": "int", "required": True},
            "mode": {"type": "str", "choices": ["deploy", "rollback", "restart", "trial"], "default": "deploy"},
            **dict.fromkeys(("verb", "controller", "begin", "id", "container", "cursor"), text),
            "start_timeout": {"type": "float", "default": 1800.0},
            "keep_releases": {"type": "int", "default": 5},
            "reclaim": {"type": "bool", "default": True},
            "lock": {"type": "dict", "default": {}},
            "services": {"type": "list", "elements": "str", "default": []},
            "verify": {"type": "str", "choices": [QUICK, DEEP], "default": QUICK},
            "verify_seconds": {"type": "float", "default": BUDGET},
            "recreate": {"type": "bool", "default": False},
            "new_key": {"type": "bool", "default": False, "no_log": False},
            "project_dir": {"type": "path", "default": "/opt/sparkfleet"},
            "state_dir": {"type": "path", "default": "/var/lib/sparkfleet"},
            "slice": {"type": "float", "default": 3.0},
            "recover": {"type": "bool", "default": True},
        },
        supports_check_mode=True,
    )
    params = module.params
    if params["services"] and params["mode"] != "restart":
        module.fail_json(msg="services are for a restart: a deployment restarts what differs", failure="bad-input")
    store = Store(params["project_dir"], params["state_dir"])
    there = params["to"] in store.numbers()
    if module.check_mode:
        with contextlib.suppress(DockerUnavailable):
            for problem in precheck(store, Docker(), params["to"]) if there else ():
                where = f"release {params['to']} could not be switched to"
                module.fail_json(msg=f"{where}: {problem.message}", failure=problem.failure)
        trial = params["mode"] == TRIAL  # which keeps all other releases
        message = f"would {'try' if trial else 'switch to'} release {params['to']}"
        would = {} if trial else foresee(params, store)
        module.exit_json(changed=True, done=True, journal={}, msg=message, would=would)
    try:
        # That of a trial goes as its job ends.
        begun = (store.switch() or {}).get("id") in {params["id"], params["begin"]} - {""}
        if not (there or begun):
            store.plan(params["to"])  # its error names the releases there are; the job repairs damaged files
    except ReleaseError as error:
        module.fail_json(msg=str(error), failure="bad-input")
    id_, how = (params["id"], "started") if params["id"] else begin(module, store)
    journal, done = watch(store, id_, params["slice"])
    if journal.get("id") != id_:
        another = who(store, store.switch())
        module.fail_json(msg=f"the switch was replaced by another: {another}", failure="switch-running-other")
    cut = done and journal.get("phase") != DONE
    if cut and params["recover"]:
        spawn(module, store, ["--recover"])
    elif cut:
        where = f"the switch to release {journal.get('to')} was interrupted in the phase {journal.get('phase')}"
        module.fail_json(msg=f"{where}, and again when it was ended", failure="switch-interrupted")
    found = log(Docker(), journal, params["container"], params["cursor"])
    module.exit_json(
        changed=False,
        id=id_,
        joined=how == "joined",
        already=how == "already",
        done=done and not cut,
        cut=cut,
        journal=journal,
        now=time.time(),
        **found,
    )


if __name__ == "__main__":
    main()
