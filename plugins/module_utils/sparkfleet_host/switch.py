# SPDX-License-Identifier: Apache-2.0
"""The switch from one release to another: what runs in the end has answered a question, or is what ran before.

    check → stop the old engine → drop the page cache → start the new one → wait → verify → commit
      │                                          any failure → the same back to the old one
      └ a problem that is known beforehand → nothing is stopped

It runs on the host as the transient unit `sparkfleet-switch.service`, so that a controller may vanish half way. Each
step is in the journal (/var/lib/sparkfleet/switch.json) before it begins; `recover` ends a switch that a power cut
or a kill interrupted. Once the old engine has stopped, nothing that cannot be written or removed keeps the switch from
its end: it is among the `troubles` of the journal.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from . import engine, integrity, key, memory, reclaim
from .bounded import printable
from .docker import Docker, DockerError, DockerUnavailable
from .engine import EngineError
from .http import Client, HttpError, engine_client
from .precheck import Problem, precheck
from .redaction import redact
from .releases import DONE, LOG_LINES, PROJECT_DIR, STATE_DIR, ReleaseError, Store
from .verify import verify

DEPLOY, ROLLBACK, RESTART = "deploy", "rollback", "restart"
VERIFIED, RESTORED, REMOVED, FAILED, REFUSED = "verified", "restored", "removed", "failed", "refused"
CHECKING = "checking"  # the phase in which nothing has changed yet
FORWARD = ("stopping", "starting", "waiting", "verifying", "committing")
TROUBLES = 50  # that are kept
BUSY = 75  # exit code where another switch runs (EX_TEMPFAIL)
START_SECONDS = 1800.0
VERIFY_SECONDS = 120.0
KEEP = 5
FAILED_STOP_SECONDS = 5  # until an engine that did not work is killed
PATIENCE = 120.0  # seconds that Docker may be away: systemd brings it back
SETTLE = 20.0  # seconds after its return in which containers come back


def boot_id() -> str:
    """What tells one boot of the host from another."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def verify_params(plan: dict[str, Any], port: int) -> dict[str, Any]:
    """The options of a verification by the questions of a release's plan."""
    asked = plan["verify"]
    return {
        "url": f"http://127.0.0.1:{port}",
        "model": plan["repo"],
        **{key: asked[key] for key in ("question", "expect", "prompt", "prompt_expect")},
        "max_tokens": asked.get("max_tokens", 32),
        "timeout": VERIFY_SECONDS,
        "chat_template_kwargs": {"enable_thinking": False},
    }


class FailedError(Exception):
    """A release does not work. `facts` say how that showed itself; see `Switch.failed`."""

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.facts = facts


class Switch:
    """One switch. `request`: {id, to, mode, controller, verb, start_timeout, keep, reclaim, recreate, new_key};
    times in seconds."""

    def __init__(
        self,
        store: Store,
        docker: Docker,
        request: dict[str, Any],
        now: Callable[[], float] = time.time,
        pause: float = engine.POLL,
    ) -> None:
        self.store, self.docker, self.request, self.now, self.pause = store, docker, request, now, pause
        self.start_timeout = float(request.get("start_timeout") or START_SECONDS)
        self.journal: dict[str, Any] = {}
        self.recovering = False  # an engine has stopped already

    # -- the whole -------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Switch; the journal as it is in the end. The lock of switches must be held. Raises ReleaseError where there
        is no such release, OSError where the journal cannot be written."""
        to = int(self.request["to"])
        if to not in self.store.numbers():
            self.store.plan(to)  # says which there are
        self.store.set_journal_aside()
        if not self.request.get("new_key"):
            key.forget_staged()
        self.begin(to)
        problems = self.problems(to)
        if problems:
            first, *more = problems
            also = "".join(f"; also: {problem.message} [{problem.failure}]" for problem in more)
            self.journal["error"] = {"message": f"{first.message}{also}", "failure": first.failure, "state": ""}
            key.forget_staged()
            self.end(REFUSED)
            return self.journal
        return self.go()

    def begin(self, to: int, phase: str = CHECKING) -> None:
        """Begin a journal. Raises OSError."""
        current = self.store.current()
        kept = {"keep": int(self.request.get("keep") or KEEP), "start_timeout": self.start_timeout}
        self.journal = {
            **{key: str(self.request.get(key) or "") for key in ("id", "mode", "controller", "verb")},
            **{"to": to, "from": current, "model": self._model(to) or "", "from_model": self._model(current)},
            **{"pid": os.getpid(), "boot_id": boot_id(), "began": self.now(), "ended": None, **kept},
            **{"phase": "", "steps": [], "container": "", "outcome": None, "error": None, "restore_error": None},
            **{"stopped_at": None, "answering_at": None, "out_of_service_s": None, "verification": None},
            **{"container_id": "", "repaired": [], "reclaimed": [], "left": [], "troubles": []},
        }
        self.phase(phase)

    def problems(self, to: int) -> list[Problem]:
        """What keeps the release from running that can be known now. Its files, and those of the release to go back to,
        are repaired where they can be."""
        before = self.journal["from"]
        try:
            self.journal["repaired"] = self.store.repair(to)
        except ReleaseError as error:
            return [Problem("release-damaged", str(error))]
        if before is not None and before != to:
            try:
                self.journal["repaired"] += self.store.repair(before, discard=False)
            except ReleaseError as error:
                self.journal["repaired"] += [str(error)]
        self.journal.update(model=self._model(to) or "", from_model=self._model(before))
        found: list[Problem] = []

        def look() -> None:
            found.extend(precheck(self.store, self.docker, to))

        try:
            self.patiently(look)
        except FailedError as error:
            return [Problem("docker", str(error))]
        except Exception as error:
            return [Problem("internal", _reason(error))]
        return found

    def go(self) -> dict[str, Any]:
        """Switch, all being checked."""
        to = self.journal["to"]
        try:
            self.phase("stopping")
        except Exception as error:  # a journal that cannot be written could not be recovered from
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            self.journal["error"] = {
                "message": f"the journal cannot be written: {_reason(error)}",
                "failure": "disk-full" if full else "internal",
                "state": "",
            }
            key.forget_staged()
            self.end(REFUSED)
            return self.journal
        try:
            self.activate(to, FORWARD[:4], bool(self.request.get("recreate")))
        except Exception as error:
            self.journal["error"] = _failure(error)
            self.restore()
            return self.journal
        try:
            self.commit(to)
        except Exception as error:
            if not self._stays(to, error):
                message = f"the release could not be made current: {_reason(error)}"
                self.journal["error"] = {"message": message, "state": "running"}
                self.restore()
                return self.journal
        self.finish(to)
        return self.journal

    def _stays(self, to: int, error: Exception) -> bool:
        """Whether a release stays that works and of which it could not be noted: there is none to go back to, and it is
        the current one already, or can be made so."""
        if self.journal["from"] not in (None, to):
            return False
        self._trouble(f"release {to} could not be noted as verified", error)
        with self._regardless(f"release {to} could not be made current"):
            if self.store.current() != to:
                self.store.point(to)
        return self.store.current() == to

    def commit(self, to: int) -> None:
        """The new release works: make it the current one. Raises what `Store.commit` raises."""
        self.phase("committing")
        self.store.commit(to, self.now(), self.journal["container_id"])

    def finish(self, to: int) -> None:
        """The new release is the current one, which nothing undoes: remove what the old one left."""
        self.tidy(to)
        if self.request.get("reclaim", True):
            with self._regardless("what no release needs could not be removed"):  # it stays noted
                self.journal["reclaimed"], self.journal["left"] = reclaim.after_switch(self.store, self.docker)
        self.end(VERIFIED)

    def tidy(self, to: int) -> None:
        """What is left to do once a release is the current one."""
        with self._regardless("the key of before could not be removed"):
            key.keep()
        self._remove_others(to)
        # A release that goes without a note would leave for ever what it needed.
        with self._regardless("old releases could not be removed"):
            keep = int(self.journal.get("keep") or KEEP)
            reclaim.note(self.store, self.store.surplus(keep))
            self.store.prune(keep)
        with self._regardless("the files of the releases could not be checked"):
            self.journal.setdefault("repaired", []).extend(self.store.repair_all())

    def restore(self) -> None:
        """The new release does not work: back to what was there before."""
        to, before = self.journal["to"], self.journal["from"]
        error = self.journal["error"]
        self.phase("restoring")
        with self._regardless(f"the failure of release {to} could not be noted"):
            self.store.note_failure(to, self.now(), error.get("failure", ""), error["message"], error.get("log", []))
        with self._regardless("the key of before could not be brought back"):
            key.give_back()
        if before is None or before == to:
            # Nothing to go back to. A first deployment leaves no container; what served before stays to be looked at.
            self._clear(remove=before is None)
            self.end(REMOVED if before is None else FAILED)
            return
        with self._regardless(f"release {before} could not be repaired"), contextlib.suppress(ReleaseError):
            self.store.repair(before, discard=False)  # where it cannot be, `activate` says so
        try:
            self.activate(before, ("restoring", "restoring", "restore-waiting", "restore-verifying"), False)
        except Exception as again:
            self.journal["restore_error"] = found = self._explained(before, _failure(again))
            if found.get("state") != "running":
                self._clear(remove=False)  # or Docker starts it again for ever
            self.end(FAILED)
            return
        with self._regardless(f"release {before} could not be noted as verified"):
            self.store.commit(before, self.now(), self.journal["container_id"])
        with self._regardless(f"release {before} could not be made current again"):
            if self.store.current() != before:
                self.store.point(before)
        self._remove_others(before)
        self.end(RESTORED)

    def _explained(self, number: int, facts: dict[str, Any]) -> dict[str, Any]:
        """The failure of a release that was not checked before its start, with what the check would have said."""
        with contextlib.suppress(Exception):
            problems = [] if facts.get("failure") else precheck(self.store, self.docker, number)
            for problem in problems[:1]:
                facts.update(message=f"{facts['message']}: {problem.message}", failure=problem.failure)
        return facts

    # -- the steps -------------------------------------------------------------------------------------------

    def activate(self, number: int, names: Sequence[str], recreate: bool) -> None:
        """Stop what runs, start a release, wait for it, verify it. `names`: the phases, of which the first is noted
        already. Raises FailedError."""
        stopping, starting, waiting, verifying = names
        try:
            plan, lock = self.store.plan(number), self.store.lock(number)
            file = self.store.compose_file(number)
        except ReleaseError as error:
            raise FailedError(str(error), failure="release-damaged", state="missing") from None
        service, url = str(plan["service"]), f"http://127.0.0.1:{int(lock['port'])}"
        try:
            self.patiently(lambda: self.stop_all(engine_client(self._url_before() or url)))
            self.phase(starting, service)
            if stopping == "stopping" and self.request.get("new_key"):
                key.take()
            with contextlib.suppress(OSError):  # not allowed in some containers; then the start itself will tell
                memory.drop_page_cache()
            self.patiently(lambda: engine.compose_up(str(self.store.project_dir), str(file), service, recreate))
            self.phase(waiting, service)
            client = engine_client(url)  # with the key of now
            self.wait(service, client)
            self.phase(verifying, service)
            self.verify(service, plan, client)
        except (EngineError, DockerError) as error:
            raise FailedError(str(error), **self.facts(service, {"docker_error": str(error)})) from None
        except (FailedError, OSError) as error:
            if isinstance(error, FailedError):
                raise
            raise FailedError(str(error), **self.facts(service, {"failure": "internal"})) from None
        except Exception as error:  # a mistake of ours must not end the switch half way
            message = f"{type(error).__name__}: {printable(str(error), 400)}"
            raise FailedError(message, **self.facts(service, {"failure": "internal"})) from error

    def stop_all(self, client: Client) -> None:
        """Stop every running engine of ours; memory is given back before the next one starts."""
        for item in engine.ours(self.docker):
            if item["State"] in ("running", "restarting", "paused"):
                if self.journal["stopped_at"] is None and engine.healthy(client):
                    self.journal["stopped_at"] = self.now()
                # One that failed has nothing to finish.
                engine.stop(
                    self.docker, item["Id"], FAILED_STOP_SECONDS if self.journal["error"] else engine.STOP_SECONDS
                )

    def wait(self, service: str, client: Client) -> None:
        """Until the engine is ready. Raises FailedError when it ends, is restarted, or takes too long."""
        deadline = time.monotonic() + self.start_timeout
        away = settled = revived = 0.0
        while True:
            now = time.monotonic()
            try:
                found = engine.look(self.docker, service)
                if away:
                    away, settled = 0.0, now + SETTLE
                # Docker restarts what crashes. One that stays down went down with Docker, which may not bring it back.
                if found["state"] == "exited" and not revived:
                    settled = revived = now + SETTLE
                    engine.start(self.docker, service)
            except DockerUnavailable as error:
                away = away or now
                if now - away > PATIENCE:
                    raise FailedError(str(error), **self.facts(service, {"failure": "docker"})) from None
                time.sleep(self.pause)
                continue
            if found["state"] == "running" and engine.healthy(client):
                self.journal["container_id"] = str(found.get("id") or "")
                return
            if now > settled:
                if found["state"] != "running":
                    raise FailedError(f"{service} ended", **self.facts(service, found))
                if found["restart_count"]:
                    raise FailedError(f"{service} crashed", **self.facts(service, found))
            if now > deadline:
                found["failure"] = "start-timeout"
                message = f"{service} was not ready after {self.start_timeout:.0f} s"
                raise FailedError(message, **self.facts(service, found))
            time.sleep(self.pause)

    def verify(self, service: str, plan: dict[str, Any], client: Client) -> None:
        """Ask the questions of the plan. Raises FailedError unless the answers are right."""
        params = verify_params(plan, int(client.url.rpartition(":")[2]))
        try:
            result = verify(params)
        except HttpError as error:
            raise FailedError(str(error), **self.facts(service, {"failure": "endpoint-down"})) from None
        self.journal["verification"] = result
        if not result["verified"]:
            if result["failure"] in integrity.NONSENSE:
                integrity.mark_served(self.docker, f"a verification failed ({result['failure']})")
            integrity.request(str(result["failure"]))
            facts = {"failure": result["failure"], "checks": result["checks"], "answer": result["answer"]}
            raise FailedError(result["msg"], **self.facts(service, facts))
        self.journal["answering_at"] = self.now()

    # -- parts -----------------------------------------------------------------------------------------------

    def phase(self, name: str, container: str = "") -> None:
        """Note what is done next, before it is done. Raises OSError as long as nothing has changed; later on the way
        matters more than its record."""
        before, steps = self.journal["phase"], list(self.journal["steps"])
        if name != before:
            self.journal["steps"].append({"phase": name, "at": self.now()})
        self.journal.update(phase=name, container=container)
        try:
            self.store.write_switch(self.journal)
        except Exception as error:
            if before in ("", CHECKING) and name != DONE and not self.recovering:
                self.journal.update(phase=before, steps=steps)
                raise
            self._trouble("the journal could not be written", error)
            with self._regardless("nor could it be kept in memory"):
                self.store.spare_switch(self.journal)

    def end(self, outcome: str) -> None:
        """Note how it ended."""
        stopped, answering = self.journal["stopped_at"], self.journal["answering_at"]
        served = outcome in (VERIFIED, RESTORED)
        if outcome != VERIFIED:
            with self._regardless("releases that never served could not be removed"):
                unused = self.store.never_verified(int(self.journal.get("keep") or KEEP))
                unused = [number for number in unused if number != self.journal["to"]]
                reclaim.note(self.store, unused)
                self.store.remove(unused)
        self.journal["out_of_service_s"] = round(answering - stopped, 1) if stopped and answering and served else None
        self.journal.update(outcome=outcome, ended=self.now())
        self.phase(DONE)

    @contextlib.contextmanager
    def _regardless(self, what: str) -> Iterator[None]:
        """What fails here is noted and ends nothing: that an engine serves matters more."""
        try:
            yield
        except Exception as error:
            self._trouble(what, error)

    def _trouble(self, what: str, error: Exception) -> None:
        line = f"{what}: {_reason(error)}"
        troubles = self.journal.setdefault("troubles", [])
        if line not in troubles and len(troubles) < TROUBLES:
            troubles.append(line)

    def facts(self, service: str, found: dict[str, Any]) -> dict[str, Any]:
        """How a container stands, with what it logged last; what is known already (`found`) counts first."""
        state: dict[str, Any] = {}
        log: list[str] = []
        with contextlib.suppress(Exception):  # of a failure that is known already
            state = engine.look(self.docker, service)
            log = engine.read_log(self.docker, service, engine.just_before(state["started_at"]), state["tty"])
            if len(log) < 5 or (state["state"] == "running" and state["restart_count"]):  # why is in the run before
                log = engine.read_log(self.docker, service, "", state["tty"], LOG_LINES)
        merged = {**state, **found}
        return {
            "container": service,
            "state": merged.get("state", "missing"),
            "exit_code": merged.get("exit_code", 0),
            "oom_killed": merged.get("oom_killed", False),
            "restart_count": merged.get("restart_count", 0),
            "docker_error": merged.get("docker_error") or merged.get("error", ""),
            **{key: merged[key] for key in ("failure", "checks", "answer") if key in merged},
            "log": [redact(line) for line in log[-LOG_LINES:]],
        }

    def patiently(self, action: Callable[[], None]) -> None:
        """Do something with Docker; again for a while when it is away. Raises FailedError."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                action()
                return
            except DockerUnavailable as error:
                if time.monotonic() > deadline:
                    raise FailedError(str(error), failure="docker", state="missing") from None
            except EngineError as error:
                # Compose has its own words for a daemon that is away.
                gone = any(word in str(error) for word in ("Cannot connect to the Docker daemon", "daemon running?"))
                if not gone or time.monotonic() > deadline:
                    raise
            time.sleep(1)

    def _remove_others(self, number: int) -> None:
        """Remove the containers of ours that are no part of a release."""
        try:
            service = self.store.plan(number)["service"]
        except ReleaseError:
            return
        for item in self._ours():
            if engine.service_of(item) != service:
                with self._regardless(f"the container {engine.name_of(item)} could not be removed"):
                    engine.remove(self.docker, item["Id"])

    def _url_before(self) -> str:
        """Where the release before answers."""
        with contextlib.suppress(ReleaseError):
            if self.journal["from"] is not None:
                return f"http://127.0.0.1:{int(self.store.lock(self.journal['from'])['port'])}"
        return ""

    def _ours(self) -> list[dict[str, Any]]:
        with self._regardless("the containers could not be listed"):
            return engine.ours(self.docker)
        return []

    def _clear(self, remove: bool) -> None:
        """Stop, or remove, the containers of ours."""
        for item in self._ours():
            with self._regardless(f"the container {engine.name_of(item)} could not be stopped"):
                engine.stop(self.docker, item["Id"])
                if remove:
                    engine.remove(self.docker, item["Id"])

    def _model(self, number: int | None) -> str | None:
        if number is None:
            return None
        try:
            return str(self.store.plan(number)["model"])
        except (ReleaseError, KeyError):
            return None


def _reason(error: Exception) -> str:
    """Why something failed, for a message."""
    known = isinstance(error, FailedError | ReleaseError | EngineError | DockerError)
    if isinstance(error, OSError) and error.strerror:
        return printable(error.strerror, 400)
    return printable(str(error) if known else f"{type(error).__name__}: {error}", 400)


def _failure(error: Exception) -> dict[str, Any]:
    """How a release failed, for the journal. What is no FailedError is a mistake of ours."""
    if isinstance(error, FailedError):
        return {"message": str(error), **error.facts}
    return {"message": _reason(error), "failure": "internal"}


def interrupted(store: Store) -> bool:
    """Whether a switch was begun that nobody goes on with. A journal that cannot be understood is set aside."""
    journal = store.switch()
    if journal is None:
        if store.switch_damage() and store.holder() is None:
            store.set_journal_aside()
        return False
    return journal["phase"] != DONE and not store.switch_active()


def recover(store: Store | None = None, docker: Docker | None = None) -> dict[str, Any] | None:
    """End a switch that was interrupted: what was current is started and verified again. The journal, or None where
    there was nothing to do. Raises OSError where the lock cannot be had."""
    store = store or Store()
    with store.exclusive() as mine:
        if not mine:
            return None
        store.set_journal_aside()
        journal = store.switch()
        if journal is None or journal["phase"] == DONE:
            return None
        kept = ("id", "to", "mode", "verb", "controller", "keep", "start_timeout")
        # Recovery is to be short: what no release needs waits for the next switch.
        request = {**{key: journal.get(key) for key in kept}, "reclaim": False}
        switch = Switch(store, docker or Docker(), request)
        switch.journal, switch.recovering = journal, True
        # It becomes the current one when it is verified. The journal of then may not have been written.
        another = journal["to"] != journal["from"] and journal["phase"] in FORWARD
        if (journal["phase"] == "committing" or another) and store.current() == journal["to"]:
            switch.finish(journal["to"])
            return journal
        why = "the host was restarted" if journal["boot_id"] != boot_id() else "its process was killed"
        if journal["error"] is None:
            message = f"the switch to release {journal['to']} was cut in the phase {journal['phase']}: {why}"
            journal["error"] = {"message": message, "failure": "switch-interrupted", "state": "missing"}
        if journal["phase"] in ("", CHECKING):
            key.forget_staged()
            switch.end(REFUSED)  # nothing had changed
            return journal
        if journal["to"] == journal["from"] and journal["to"] in store.numbers():
            # Nothing else to go back to: begin again. What was stopped is not kept down by a check.
            with contextlib.suppress(Exception):  # where it cannot be, its start says so
                store.repair(journal["to"])
            switch.request["new_key"] = True  # if one is staged still
            switch.begin(journal["to"], "stopping")
            return switch.go()
        switch.restore()
        return journal


def main(argv: Sequence[str] | None = None) -> int:
    """`switch --to N …`: the job that Ansible starts; `switch --recover`."""
    parser = argparse.ArgumentParser(prog="sparkfleet_host switch", description="Switch to a release, or back.")
    parser.add_argument("--to", type=int, help="number of the release")
    parser.add_argument("--recover", action="store_true", help="end a switch that was interrupted")
    parser.add_argument("--id", default="")
    parser.add_argument("--mode", choices=(DEPLOY, ROLLBACK, RESTART), default=DEPLOY)
    parser.add_argument("--controller", default="")
    parser.add_argument("--verb", default="")
    parser.add_argument("--start-timeout", type=float, default=START_SECONDS)
    parser.add_argument("--keep", type=int, default=KEEP)
    parser.add_argument("--no-reclaim", dest="reclaim", action="store_false", help="keep what no release needs")
    parser.add_argument("--recreate", action="store_true")
    parser.add_argument("--new-key", action="store_true", help="take the key that is staged for this switch")
    parser.add_argument("--project-dir", default=PROJECT_DIR)
    parser.add_argument("--state-dir", default=STATE_DIR)
    options = parser.parse_args(argv)
    store = Store(options.project_dir, options.state_dir)
    if options.recover:
        ended = recover(store)
        _say_troubles(ended)
        return 0 if ended is None or ended["outcome"] in (VERIFIED, RESTORED, REMOVED) else 1
    if options.to is None:
        parser.error("one of --to and --recover is needed")
    with store.exclusive() as mine:
        if not mine:
            print(f"the lock {store.lock_file} is held: {store.holder()}", flush=True)
            return BUSY
        try:
            journal = Switch(store, Docker(), vars(options)).run()
        except (ReleaseError, OSError) as error:
            print(error, flush=True)
            return 1
    _say_troubles(journal)
    return 0 if journal["outcome"] == VERIFIED else 1


def _say_troubles(journal: dict[str, Any] | None) -> None:
    """For journalctl: the journal of the switch may be what cannot be written."""
    for line in (journal or {}).get("troubles") or []:
        print(line, flush=True)
