# SPDX-License-Identifier: Apache-2.0
"""The switch from one release to another: what runs at the end has answered a question, or is what ran before.

    check → stop the old engines → start the new ones, one after the other: drop the page cache → start → wait
      │       → verify all of them → commit
      │                                          any failure → the same back to the old ones
      └ a problem found beforehand → nothing is stopped

An engine that starts on demand is started and verified after the others, alone among its kind, and stopped: from then
on the guard starts it. One that both releases define in the same way stays as it is.

An engine that both releases define in the same way keeps running, and is verified with the others. Engines start one
after the other because vLLM measures the free memory while it starts. What their logs show of that is kept beside the
release (see `measured`).

A trial is a release that never becomes the current one: once it answers, its figures are read and its speed is
measured, and then, whatever happened, the previous release is started and verified again, or nothing is left running.

It runs on the host as the transient unit `sparkfleet-switch.service`, so that a controller may vanish halfway. Each
step is in the journal (/var/lib/sparkfleet/switch.json) before it starts; `recover` ends a switch that a power cut
or a kill interrupted. Once the old engine has stopped, nothing that cannot be written or removed keeps the switch
from finishing: it is listed among the `troubles` of the journal.

Of an engine that spans several hosts each host switches its own rank, under the same id and to the same release. Rank 0
asks the workers whether they could, before anything stops, and decides as above; the workers, which start their rank
when it wants them to, take over what it decided: the release that is current there (see `group`, and `mirror`).
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from . import engine, integrity, key, measured, memory, network, reclaim
from . import group as ranks
from .asking import Budget
from .bench import BenchError, Load, bench
from .bounded import printable
from .docker import Docker, DockerError, DockerUnavailable
from .engine import EngineError
from .group import Group, Record, Status
from .http import Client, HttpError, engine_client
from .metrics import LIMIT as METRICS_LIMIT
from .metrics import sums
from .precheck import Problem, precheck
from .redaction import redact
from .release_format import DONE, DUMMY, LOG_LINES, RETURNING, TRIAL, Engine, trial_weights
from .releases import PROJECT_DIR, STATE_DIR, ReleaseError, Store
from .verify import BUDGET, DEEP, QUICK, answers, is_over, joined, steps, verify

DEPLOY, ROLLBACK, RESTART = "deploy", "rollback", "restart"
VERIFIED, RESTORED, REMOVED, FAILED, REFUSED = "verified", "restored", "removed", "failed", "refused"
CHECKING = "checking"  # the phase in which nothing has changed yet
FORWARD = ("stopping", "starting", "waiting", "verifying", "committing")
MEASURING = "measuring"  # the phase of a trial that answers
TROUBLES = 50  # that are kept
BUSY = 75  # exit code where another switch runs (EX_TEMPFAIL)
START_SECONDS = 1800.0
VERIFY_SECONDS = 120.0
KEEP = 5
QUIET_SECONDS = 5.0  # without a request until such an engine is stopped; the guard looks every 2 seconds
IDLE_SECONDS = 60.0  # for what an engine computes that makes room for another
DOOR_SECONDS = 10.0  # until the guard has closed a door
FAILED_STOP_SECONDS = 5  # until an engine that did not work is killed
PATIENCE = 120.0  # seconds that Docker may be away: systemd brings it back
SETTLE = 20.0  # seconds after its return in which containers come back
JOIN_SECONDS = 180.0  # for rank 0, until all hosts of a group have checked that they could switch
RANKS_SECONDS = 300.0  # until all workers have started their rank
LOST_SECONDS = 30.0  # that a worker may not answer while the engine starts
HEAD_SECONDS = 120.0  # that a worker waits for an answer of rank 0; then its switch stays undecided
ASK_PAUSE = 1.0  # between two questions to another host


def boot_id() -> str:
    """What distinguishes one boot of the host from another."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def verify_params(engine: Engine) -> dict[str, Any]:
    """The options of the quick verification of an engine by what its release says of it."""
    return {
        "url": engine.url,
        "model": engine.repo,
        **{key: engine.verify[key] for key in ("question", "expect", "prompt", "prompt_expect", "max_tokens")},
        "kinds": steps(engine.verify.get("kinds", ()))[0],
        "timeout": VERIFY_SECONDS,
        "chat_template_kwargs": {"enable_thinking": False},
    }


class FailedError(Exception):
    """A release does not work. `facts` describe the failure; see `Switch.failed`."""

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.facts = facts


class Switch:
    """One switch. `request`: {id, to, mode, controller, verb, start_timeout, keep, reclaim, recreate, new_key,
    services, verify, verify_seconds}; times in seconds. `verify`: QUICK or DEEP, of what is switched to; what is
    brought back is asked the quick set. `services`: those that alone a RESTART concerns, [] for all."""

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
        self.running: set[str] = set()  # services that `activate` left running
        self.verified: set[str] = set()  # services that it found to answer right
        self.weights = ""  # of the trial's engine while it is tried: dummy or real
        self.quiet = QUIET_SECONDS
        self.epoch = 0  # of the ranks of a group that were started last
        self.head_seconds = HEAD_SECONDS

    # -- the sequence ----------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Switch; the final journal. The lock of switches must be held. Raises ReleaseError where there
        is no such release, OSError where the journal cannot be written."""
        to = int(self.request["to"])
        if to not in self.store.numbers():
            self.store.plan(to)  # its error names the releases there are
        self.store.set_journal_aside()
        if not self.request.get("new_key"):
            key.forget_staged()
        self.begin(to)
        problems = self.problems(to) or self.agree(to)
        if problems:
            first, *more = problems
            also = "".join(f"; also: {problem.message} [{problem.failure}]" for problem in more)
            self.journal["error"] = {"message": f"{first.message}{also}", "failure": first.failure, "state": ""}
            key.forget_staged()
            self.end(REFUSED)
            return self.journal
        return self.go()

    def begin(self, to: int, phase: str = CHECKING) -> None:
        """Start a journal. Raises OSError."""
        current = self.store.current()
        kept = {"keep": int(self.request.get("keep") or KEEP), "start_timeout": self.start_timeout}
        asked = {"verify": str(self.request.get("verify") or QUICK), "asking": ""}
        seconds = {"verify_seconds": float(self.request.get("verify_seconds") or BUDGET)}
        self.journal = {
            **{key: str(self.request.get(key) or "") for key in ("id", "mode", "controller", "verb")},
            **{"to": to, "from": current, "models": self._models(to), "from_models": self._models(current)},
            **{"services": [*(self.request.get("services") or [])], "kept": []},
            **{"pid": os.getpid(), "boot_id": boot_id(), "began": self.now(), "ended": None, **kept},
            **{**asked, **seconds},
            **{"phase": "", "steps": [], "container": "", "outcome": None, "error": None, "restore_error": None},
            **{"stopped_at": None, "answering_at": None, "out_of_service_s": None, "verifications": {}},
            **{"container_ids": {}, "measured": {}, "repaired": [], "reclaimed": [], "left": [], "troubles": []},
            "joined": False,
        }
        self.phase(phase)

    def problems(self, to: int) -> list[Problem]:
        """What is known in advance to keep the release from running. Its files, and those of the release to go back to,
        are repaired where possible."""
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
        self.journal.update(models=self._models(to), from_models=self._models(before))
        found: list[Problem] = []
        with contextlib.suppress(ReleaseError):  # precheck reports it
            if bool(trial_weights(self.store.plan(to))) != self.trial:
                what = "is not a trial" if self.trial else "is a trial, which never serves"
                return [Problem("bad-input", f"release {to} {what}")]
            there = [item.service for item in self.store.engines(to)]
            for service in self.journal["services"]:
                if service not in there:
                    message = f"release {to} has no engine {printable(service, 200)}; it has {', '.join(there)}"
                    return [Problem("bad-input", message)]

        def resolve() -> None:
            found.extend(precheck(self.store, self.docker, to))

        try:
            self.patiently(resolve)
        except FailedError as error:
            return [Problem("docker", str(error))]
        except Exception as error:
            return [Problem("internal", _reason(error))]
        return found

    def go(self) -> dict[str, Any]:
        """Switch; everything has been checked."""
        to = self.journal["to"]
        self.journal["container_ids"] = kept = self.to_keep(to)
        self.journal["kept"] = [*kept]
        try:
            self.phase("stopping")
        except Exception as error:  # without a journal there could be no recovery
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            self.journal["error"] = {
                "message": f"the journal cannot be written: {_reason(error)}",
                "failure": "disk-full" if full else "internal",
                "state": "",
            }
            key.forget_staged()
            self.end(REFUSED)
            return self.journal
        with self._regardless("requests do not start engines yet"):
            self.store.halt(False)
        if self.is_worker(to):
            return self.mirror()
        try:
            self.activate(to, FORWARD[:4], bool(self.request.get("recreate")))
            self.check_ranks(to)
            if self.trial:
                self.measure(to)
        except Exception as error:
            self.journal["error"] = _failure(error)
        if self.trial or self.journal["error"]:
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

    @property
    def trial(self) -> bool:
        """Whether this is a trial, after which the previous release is restored in any case."""
        return bool(self.journal["mode"] == TRIAL)

    def measure(self, to: int) -> None:
        """Read the figures of a trial's engine, which answers, and measure its speed. What was measured is kept at
        once. Raises FailedError where the speed cannot be measured."""
        plan = self.store.plan(to)
        weights, loads = trial_weights(plan), [Load.of(item) for item in plan.get("loads", ())]
        for item in self.store.engines(to):
            self.phase(MEASURING, item.service)
            self._attempt(item.service, functools.partial(self._measure, item, weights, loads))

    def _measure(self, item: Engine, weights: str, loads: Sequence[Load]) -> None:
        record = measured.of_start(self.docker, item, self.now(), weights)
        self.journal["measured"][item.service] = record
        failed = ""

        def told(streams: int, rows: list[dict[str, Any]]) -> None:
            record["speed"], self.journal["asking"] = rows, measured.streams_words(streams)
            self.phase(MEASURING, item.service)

        try:
            record["speed"], record["bench"] = bench(self.docker, str(record["container"]), item, told, loads)
        except (BenchError, DockerError, HttpError) as error:
            failed = str(error)
        finally:
            self.journal["asking"] = ""
        with self._regardless("what was measured could not be kept"):
            measured.keep_trial(self.store, record)
        if failed:
            raise FailedError(failed, **self.facts(item.service, {"failure": "trial-speed"}))

    def note_starts(self, number: int) -> dict[str, dict[str, Any]]:
        """Keep what the logs of the engines show that were started just now, beside their release; the records, by
        service."""
        found = {}
        with self._regardless("the engines' figures could not be kept"):
            for item in self.store.engines(number):
                if item.service not in self.journal["kept"]:
                    found[item.service] = measured.of_start(self.docker, item, self.now())
            measured.keep_start(self.store, number, list(found.values()))
        return found

    def to_keep(self, to: int) -> dict[str, str]:
        """The engines that need not stop, service to container: those that a restart does not name, or that a release
        and the current one define in the same way. Each runs, healthy, in the container that was verified."""
        before = self.journal["from"]
        if before is None or self.trial or self.request.get("recreate") or self.request.get("new_key"):
            return {}
        try:
            engines = self.store.engines(to)
            if any(item.group for item in engines):  # ranks start together
                return {}
            same = {item.service for item in engines} if before == to else self._unchanged(before, to)
            if self.request.get("mode") == RESTART:
                named = {*self.journal["services"]}
                same = same - named if named else set()
            verified = (self.store.outcome(before) or {}).get("container_ids") or {}
            wanted = {item.service: verified.get(item.service, "") for item in engines if item.service in same}
            return self._serving(engines, wanted)
        except Exception:  # then they stop, as any other
            return {}

    def _unchanged(self, before: int, to: int) -> set[str]:
        """Services that both releases define in the same way. Raises ReleaseError, EngineError."""
        numbers = (before, to)
        services = set.intersection(*({item.service for item in self.store.engines(number)} for number in numbers))
        if not services:
            return set()
        files = [str(self.store.compose_file(number)) for number in numbers]
        first, second = (engine.resolved(str(self.store.project_dir), file) for file in files)
        return {
            service
            for service in services
            if (defined := engine.definition(first, service)) and defined == engine.definition(second, service)
        }

    def _serving(self, engines: Sequence[Engine], wanted: dict[str, str]) -> dict[str, str]:
        """Of containers (service to id) those that run and are healthy, or stand ready to be started on demand. Raises
        DockerError."""
        found = {}
        for item in engines:
            if not wanted.get(item.service):
                continue
            seen = engine.inspect(self.docker, item.service)
            if seen["id"] != wanted[item.service]:
                continue
            ready = item.on_demand is not None and seen["state"] == "exited"
            if ready or (seen["state"] == "running" and engine.healthy(engine_client(item.url))):
                found[item.service] = str(seen["id"])
        return found

    def _stays(self, to: int, error: Exception) -> bool:
        """Whether a working release stays whose success could not be recorded: there is none to go back to, and it is
        the current one already, or can be made so."""
        if self.journal["from"] not in (None, to):
            return False
        self._trouble(f"release {to} could not be recorded as verified", error)
        with self._regardless(f"release {to} could not be made current"):
            if self.store.current() != to:
                self.store.point(to)
        return self.store.current() == to

    def commit(self, to: int) -> None:
        """The new release works: make it the current one. Raises what `Store.commit` raises."""
        self.phase("committing")
        self.store.commit(to, self.now(), self.journal["container_ids"])

    def finish(self, to: int) -> None:
        """The new release is the current one, which nothing undoes: remove what the old one left."""
        self.tidy(to)
        self.journal["measured"] = self.note_starts(to)
        if self.request.get("reclaim", True):
            with self._regardless("what no release needs could not be removed"):  # it stays recorded
                self.journal["reclaimed"], self.journal["left"] = reclaim.after_switch(self.store, self.docker)
        self.end(VERIFIED)

    def tidy(self, to: int) -> None:
        """What is left to do once a release is the current one."""
        with self._regardless("the previous key could not be removed"):
            key.keep()
        self._remove_others(to)
        # A release removed without a note would leave behind indefinitely what it needed.
        with self._regardless("old releases could not be removed"):
            keep = int(self.journal.get("keep") or KEEP)
            reclaim.note(self.store, self.store.surplus(keep))
            self.store.prune(keep)
        with self._regardless("the files of the releases could not be checked"):
            self.journal.setdefault("repaired", []).extend(self.store.repair_all())

    def restore(self) -> None:
        """The new release does not work, or was a trial: back to what was there before."""
        to, before = self.journal["to"], self.journal["from"]
        error = self.journal["error"]
        self.journal["asking"] = ""  # of a process that was killed
        self.phase("restoring")
        with self._regardless(f"the failure of release {to} could not be recorded"):
            if error:
                self.store.note_failure(
                    to, self.now(), error.get("failure", ""), error["message"], error.get("log", [])
                )
        with self._regardless("the previous key could not be restored"):
            key.give_back()
        if before is None or before == to:
            # Nothing to go back to. A first deployment leaves no container; what served before stays for inspection.
            self._clear(remove=before is None, spare=() if before is None else self._spared(self.verified))
            self.end(REMOVED if before is None else FAILED)
            return
        with self._regardless(f"release {before} could not be repaired"), contextlib.suppress(ReleaseError):
            self.store.repair(before, discard=False)  # where that fails, `activate` reports it
        try:
            self.activate(before, ("restoring", "restoring", "restore-waiting", "restore-verifying"), False)
        except Exception as again:
            self.journal["restore_error"] = self._explained(before, _failure(again))
            self._clear(remove=False, spare=self._spared(self.running))  # or Docker restarts it indefinitely
            self.end(FAILED)
            return
        with self._regardless(f"release {before} could not be recorded as verified"):
            self.store.commit(before, self.now(), self.journal["container_ids"])
        with self._regardless(f"release {before} could not be made current again"):
            if self.store.current() != before:
                self.store.point(before)
        self._remove_others(before)
        self.note_starts(before)
        self.end(RESTORED)

    def _explained(self, number: int, facts: dict[str, Any]) -> dict[str, Any]:
        """The failure of a release that was not checked before its start, with what the check would have found."""
        with contextlib.suppress(Exception):
            problems = [] if facts.get("failure") else precheck(self.store, self.docker, number)
            for problem in problems[:1]:
                facts.update(message=f"{facts['message']}: {problem.message}", failure=problem.failure)
        return facts

    # -- the steps -------------------------------------------------------------------------------------------

    def activate(self, number: int, names: Sequence[str], recreate: bool) -> None:
        """Stop what runs, start a release's engines one after the other, verify them. Those that are `kept` are only
        verified. `names`: the phases, of which the first is recorded already. Where there is no other release to go to,
        an engine that fails does not keep the rest from starting. Raises FailedError, for the first that fails."""
        stopping, starting, waiting, verifying = names
        forward = stopping == "stopping"
        self.weights = ""
        # What served before is not kept from serving again by what it was not asked then.
        mode = str(self.journal.get("verify") or QUICK) if forward else QUICK
        self.running, self.verified = set(), set()
        try:
            engines, file = self.store.engines(number), str(self.store.compose_file(number))
        except ReleaseError as error:
            raise FailedError(str(error), failure="release-damaged", state="missing") from None
        if forward and self.trial:
            self.weights = trial_weights(self.store.plan(number))
        kept = self._still_kept(engines)
        self.running.update(kept)
        lasting = [item for item in engines if item.on_demand is None]
        # One at a time has room beside those that always run. A trial's runs like any other.
        in_turn = [item for item in engines if item.on_demand is not None and item.service not in kept]
        fresh = [item for item in lasting if item.service not in kept]
        results: dict[str, Any] = {}
        failed: dict[str, FailedError] = {}

        def make_room() -> None:
            for item in engines:
                if item.on_demand is not None:
                    self.put_to_sleep(item)

        own = next((item.group for item in engines if item.group), None)

        def prepare() -> None:
            if own:
                self.raise_epoch(number)
            self.patiently(lambda: self.stop_all(kept))
            if fresh:
                make_room()
            if forward and self.request.get("new_key"):
                key.take()

        def start(item: Engine) -> None:
            self.phase(starting, item.service)
            self._await_port(item)
            if item.group:
                self.await_ranks(item.group, item.service)
            with contextlib.suppress(OSError):  # not allowed in some containers; then the start itself shows it
                memory.drop_page_cache()
            self.patiently(lambda: engine.compose_up(str(self.store.project_dir), file, item.service, recreate))
            self.phase(waiting, item.service)
            self.wait(item.service, engine_client(item.url), item.group)  # with the current key
            self.running.add(item.service)

        def check(item: Engine) -> None:
            self.phase(verifying, item.service)
            if item.service in kept:
                with contextlib.suppress(FailedError):
                    self.verify(item, results, mode)
                    return
                # It may have hung for a long time: give it a fresh start, as any other engine had.
                del kept[item.service]
                self.journal["kept"] = [*kept]
                self.patiently(lambda: self.stop_all(self.running - {item.service}))
                start(item)
                self.phase(verifying, item.service)
            self.verify(item, results, mode)

        def once(item: Engine) -> None:
            make_room()
            start(item)
            self.phase(verifying, item.service)
            self.verify(item, results, mode)
            self._stop(item)

        def attempt(service: str, work: Callable[[], None]) -> None:
            try:
                self._attempt(service, work)
            except FailedError as error:
                self.running.discard(service)
                if error.facts.get("state") == "running":
                    self.running.add(service)
                if forward and self.journal["from"] != number:
                    raise
                failed[service] = error

        self._attempt((fresh or in_turn or engines)[0].service, prepare)
        for item in fresh:
            attempt(item.service, functools.partial(start, item))
        for item in lasting:
            if item.service in self.running and item.service not in failed:
                attempt(item.service, functools.partial(check, item))
        for item in in_turn:
            attempt(item.service, functools.partial(once, item))
        if failed:
            raise next(iter(failed.values()))

    def put_to_sleep(self, item: Engine) -> None:
        """Stop an engine that starts on demand, once it has finished what it computes (IDLE_SECONDS at most). The guard
        keeps new requests from it while a switch runs, and needs a moment to see that one does. Raises FailedError,
        DockerError, EngineError."""
        if engine.inspect(self.docker, item.service)["state"] in ("exited", "missing"):
            return
        began = idle = time.monotonic()
        while (now := time.monotonic()) - began < IDLE_SECONDS and now - idle < self.quiet:
            try:
                answer = engine_client(item.url).get("/metrics", limit=METRICS_LIMIT)
            except HttpError:
                break
            if any(sums(answer.text, ("num_requests_running", "num_requests_waiting")).values()):
                idle = now
            time.sleep(self.pause)
        self._stop(item)

    def _stop(self, item: Engine) -> None:
        def stop() -> None:
            engine.stop(self.docker, item.service)

        self.patiently(stop)

    def _await_port(self, item: Engine) -> None:
        """The guard closes the door of an engine whose port becomes another's; it needs a moment for it."""
        deadline = time.monotonic() + DOOR_SECONDS
        while time.monotonic() < deadline and any(map(network.is_guard, network.listeners(item.port))):
            time.sleep(self.pause)

    def _still_kept(self, engines: Sequence[Engine]) -> dict[str, str]:
        """Those that were kept when the switch started, and are still serving, service to container."""
        ids = self.journal["container_ids"]
        kept: dict[str, str] = {}
        with contextlib.suppress(Exception):  # then they stop, as any other
            kept = self._serving(engines, {service: ids.get(service, "") for service in self.journal["kept"]})
        self.journal.update(kept=[*kept], container_ids={**kept})
        return kept

    def _attempt(self, service: str, work: Callable[[], None]) -> None:
        """Do something that concerns a service. Raises FailedError, whatever goes wrong."""
        try:
            work()
        except (EngineError, DockerError) as error:
            raise FailedError(str(error), **self.facts(service, {"docker_error": str(error)})) from None
        except FailedError:
            raise
        except OSError as error:
            raise FailedError(str(error), **self.facts(service, {"failure": "internal"})) from None
        except Exception as error:  # a bug of ours must not end the switch halfway
            message = f"{type(error).__name__}: {printable(str(error), 400)}"
            raise FailedError(message, **self.facts(service, {"failure": "internal"})) from error

    def stop_all(self, spared: Collection[str]) -> None:
        """Stop every running engine of ours but those of some services; memory is freed before the next one
        starts."""
        urls = self._urls()
        for item in engine.ours(self.docker):
            service = engine.service_of(item)
            if service not in spared and item["State"] in ("running", "restarting", "paused"):
                url = urls.get(service) or next(iter(urls.values()), "")
                if self.journal["stopped_at"] is None and url and engine.healthy(engine_client(url)):
                    self.journal["stopped_at"] = self.now()
                # One that failed, or was tried, has nothing to finish.
                idle = self.journal["error"] or self.journal["phase"] in RETURNING
                engine.stop(self.docker, item["Id"], FAILED_STOP_SECONDS if idle else engine.STOP_SECONDS)

    def wait(self, service: str, client: Client, group: Group | None = None) -> None:
        """Until the engine is ready. Raises FailedError when it ends, is restarted, or takes too long, or a rank of its
        group does."""
        deadline = time.monotonic() + self.start_timeout
        away = settled = revived = 0.0
        watched = RankWatch(group, self.epoch) if group else None
        while True:
            now = time.monotonic()
            if watched and (gone := watched.gone(now)):
                raise FailedError(gone, **self.facts(service, {"failure": "rank-failed"}))
            try:
                found = engine.inspect(self.docker, service)
                if away:
                    away, settled = 0.0, now + SETTLE
                # Docker restarts what crashes. One that stays down went down with Docker, which may not bring it back.
                if found["state"] == "exited" and not revived and not group:
                    settled = revived = now + SETTLE
                    engine.start(self.docker, service)
            except DockerUnavailable as error:
                away = away or now
                if now - away > PATIENCE:
                    raise FailedError(str(error), **self.facts(service, {"failure": "docker"})) from None
                time.sleep(self.pause)
                continue
            if found["state"] == "running" and engine.healthy(client):
                self.journal["container_ids"][service] = str(found.get("id") or "")
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

    def verify(self, item: Engine, results: dict[str, Any], mode: str) -> None:
        """Ask an engine what its release says, QUICK or DEEP; `results`: of the engines verified before it. Raises
        FailedError unless the answers are right."""
        service = item.service
        try:
            # Dummy weights answer, but know nothing.
            result = answers(verify_params(item)) if self.weights == DUMMY else self._asked(item, mode)
        except HttpError as error:
            raise FailedError(str(error), **self.facts(service, {"failure": "endpoint-down"})) from None
        results[service] = result
        self.journal["verifications"] = {**results}
        if not result["verified"]:
            if result["failure"] in integrity.NONSENSE:
                integrity.mark_served(self.docker, f"a verification failed ({result['failure']})", service)
            if self.weights != DUMMY:
                integrity.request(str(result["failure"]))
            facts = {"failure": result["failure"], "checks": result["checks"], "answer": result["answer"]}
            raise FailedError(result["msg"], **self.facts(service, facts))
        self.verified.add(service)

    def _asked(self, item: Engine, mode: str) -> dict[str, Any]:
        """The result of a verification. It answers once the quick set is right. Raises HttpError."""
        params = verify_params(item)
        result = verify(params)
        budget = Budget(float(self.journal.get("verify_seconds") or BUDGET))
        if result["verified"] and not self.weights:
            self.journal["answering_at"] = self.now()
        for kinds in steps(item.verify.get("kinds", ()), mode)[1:]:
            if is_over(result):
                break
            self.journal["asking"] = kinds[0]
            self.phase(self.journal["phase"], self.journal["container"])
            more = {"kinds": kinds, "budget": budget.left(), "verify_id": result["verify_id"]}
            result = joined(result, verify({**params, **more}))
        self.journal["asking"] = ""
        return result

    # -- ranks of a group ------------------------------------------------------------------------------------

    def group_of(self, number: int | None) -> Group | None:
        """The group that a release is a rank of; None for a release of this host alone."""
        return ranks.of_release(self.store, number)

    def is_worker(self, number: int | None) -> bool:
        """Whether a release is a rank other than 0."""
        group = self.group_of(number)
        return group is not None and not group.is_head

    def agree(self, to: int) -> list[Problem]:
        """What keeps the hosts of a group from switching together; nothing has changed on any of them. Rank 0 waits for
        the workers, and the workers for rank 0."""
        group = self.group_of(to)
        if group is None:
            return []
        if self.trial:
            return [Problem("bad-input", "a trial is of one host, not of a group")]
        # Rank 0 gives up first: it knows which host is missing, and the others then say what it said.
        deadline = time.monotonic() + (JOIN_SECONDS if group.is_head else 2 * JOIN_SECONDS)
        self.journal["joined"] = True
        self.phase(CHECKING)
        while True:
            found = self._gathered(group) if group.is_head else self._admitted(group)
            if found is None:
                return []
            if found and (found[0].failure != "group-incomplete" or time.monotonic() > deadline):
                return found
            time.sleep(ASK_PAUSE)

    def _gathered(self, group: Group) -> list[Problem] | None:
        """Whether all workers could switch: None for yes, a problem of `group-incomplete` for not yet."""
        waiting = []
        for rank, seen in ranks.ask_workers(group).items():
            if seen is None:
                waiting.append(f"{group.named(rank)} does not answer at {group.nodes[rank].address}:{group.port}")
            elif seen.id != self.journal["id"]:
                waiting.append(f"{group.named(rank)} has not begun")
            elif seen.outcome:
                why = seen.error or seen.outcome
                return [Problem("rank-failed", f"{group.named(rank)} cannot switch: {why}")]
            elif (seen.to, seen.digest) != (self.journal["to"], group.digest):
                what = f"release {seen.to}" if seen.to != self.journal["to"] else "another image, model or arguments"
                return [Problem("group-differs", f"{group.named(rank)} is to switch to {what}")]
            elif not seen.joined:
                waiting.append(f"{group.named(rank)} is still checking")
        return [Problem("group-incomplete", "; ".join(waiting))] if waiting else None

    def _admitted(self, group: Group) -> list[Problem] | None:
        """Whether rank 0 goes on, asked by a worker: as `_gathered`."""
        head = ranks.ask(group, 0)
        if head is None:
            where = f"{group.head.address}:{group.port}"
            return [Problem("group-incomplete", f"{group.named(0)} does not answer at {where}")]
        if head.id != self.journal["id"]:
            return [Problem("group-incomplete", f"{group.named(0)} has not begun")]
        if head.phase == DONE:
            return [Problem("rank-failed", f"{group.named(0)} did not switch: {head.error or head.outcome}")]
        if head.phase in ("", CHECKING):
            return [Problem("group-incomplete", f"{group.named(0)} is still checking")]
        return None

    def raise_epoch(self, number: int) -> None:
        """Let the workers start their ranks of a release. Raises OSError."""
        self.epoch = ranks.read_record(self.store).epoch + 1
        ranks.write_record(self.store, Record(self.epoch, number))

    def await_ranks(self, group: Group, service: str) -> None:
        """Until every worker has started its rank. Raises FailedError."""
        deadline = time.monotonic() + RANKS_SECONDS
        while True:
            seen = ranks.ask_workers(group)
            missing = ranks.absent(group, seen, self.epoch, ("running",))
            if not missing:
                return
            # What a worker has started it does not start again, and one that has ended its switch does not follow.
            over = any(
                one and (one.epoch == self.epoch or (one.outcome and self.journal["phase"] not in RETURNING))
                for rank, one in seen.items()
                if rank in missing and one and one.id == self.journal["id"]
            )
            if over or time.monotonic() > deadline:
                raise FailedError("; ".join(missing.values()), **self.facts(service, {"failure": "rank-failed"}))
            time.sleep(ASK_PAUSE)

    def check_ranks(self, to: int) -> None:
        """Whether all ranks of the release that was verified still run, before it becomes the current one. Raises
        FailedError."""
        group = self.group_of(to)
        if group and (missing := ranks.absent(group, ranks.ask_workers(group), self.epoch, ("running",))):
            service = self.store.engines(to)[0].service
            raise FailedError("; ".join(missing.values()), **self.facts(service, {"failure": "rank-failed"}))

    def mirror(self) -> dict[str, Any]:
        """A worker's switch: do what rank 0 wants until it has decided. The journal, which stays without an outcome
        where rank 0 does not answer for long: then it is asked again (see `recover`)."""
        to, before = self.journal["to"], self.journal["from"]
        group = self.group_of(to) or self.group_of(before)
        assert group is not None
        answered = time.monotonic()
        while True:
            head = ranks.ask(group, 0)
            ours = head is not None and head.id == self.journal["id"]
            if head is not None and ours and head.phase != DONE and head.active:
                answered = time.monotonic()
                back = head.phase in RETURNING
                if back and self.group_of(before) is None:
                    return self._leave(group, head)
                self._follow(group, head)
            elif head is not None and (ours or not head.active) and (head.phase == DONE or not ours):
                return self._settle(group, head)
            elif time.monotonic() - answered > self.head_seconds:
                return self.journal
            time.sleep(ASK_PAUSE)

    def _follow(self, group: Group, head: Status) -> None:
        """Start this host's rank where rank 0 has raised the epoch, and show in the journal where it is."""
        back = head.phase in RETURNING
        if head.release in self.store.numbers() and head.epoch != ranks.read_record(self.store).epoch and head.epoch:
            assert head.release is not None
            self.start_rank(head.release, head.epoch, back or head.release != self.journal["to"])
        elif head.phase != self.journal["phase"] and head.phase in ("verifying", "committing", "restore-verifying"):
            self.phase(head.phase, self.journal["container"])

    def start_rank(self, number: int, epoch: int, back: bool) -> None:
        """Stop what runs here and start this host's rank. Rank 0 sees the container, or that there is none."""
        self.phase("restoring" if back else "stopping")
        item = self.store.engines(number)[0]
        with self._regardless(f"rank of release {number}"):
            self.patiently(lambda: self.stop_all(()))
            self.phase("restoring" if back else "starting", item.service)
            with contextlib.suppress(OSError):
                memory.drop_page_cache()
            file = str(self.store.compose_file(number))
            if self.request.get("new_key") and not back:
                key.take()
            self.patiently(lambda: engine.compose_up(str(self.store.project_dir), file, item.service, False))
            self.journal["container_ids"][item.service] = str(engine.inspect(self.docker, item.service)["id"])
        ranks.write_record(self.store, Record(epoch, number))
        self.phase("restore-waiting" if back else "waiting", item.service)

    def _leave(self, group: Group, head: Status) -> dict[str, Any]:
        """Back to a release of this host alone: that needs no other."""
        self.journal["error"] = self._given_up(group, head)
        self.restore()
        return self.journal

    def _given_up(self, group: Group, head: Status) -> dict[str, Any]:
        """Why a worker's release does not stay, for the journal."""
        message = f"{group.named(0)} did not switch to it: {head.error or head.outcome or 'it was restarted'}"
        service = next((item.service for item in self.store.engines(self.journal["to"])), "")
        return {"message": message, **self.facts(service, {"failure": "rank-failed"})}

    def _settle(self, group: Group, head: Status) -> dict[str, Any]:
        """Rank 0 has decided: the release that is current there becomes so here."""
        to, before = self.journal["to"], self.journal["from"]
        if head.current == to and not (head.id == self.journal["id"] and to == before and head.outcome == FAILED):
            self.journal["error"] = None
            try:
                self.commit(to)
            except Exception as error:
                if not self._stays(to, error):
                    self._trouble(f"release {to} could not be recorded as verified", error)
                    with self._regardless(f"release {to} could not be made current"):
                        self.store.point(to)
            self.finish(to)
            return self.journal
        if self.journal["error"] is None:
            with self._regardless("the reason"):
                self.journal["error"] = self._given_up(group, head)
        if before is None or before == to or head.current != before or self.group_of(before) is None:
            self.restore()
            return self.journal
        why = self.journal["error"] or {}
        with self._regardless(f"the failure of release {to} could not be recorded"):
            self.store.note_failure(to, self.now(), str(why.get("failure", "")), str(why.get("message", "")), [])
        with self._regardless("the previous key could not be restored"):
            key.give_back()
        with self._regardless(f"release {before} could not be made current again"):
            self.store.commit(before, self.now(), self.journal["container_ids"])
        self._remove_others(before)
        self.end(RESTORED)
        return self.journal

    # -- parts -----------------------------------------------------------------------------------------------

    def phase(self, name: str, container: str = "") -> None:
        """Record the next step before it is taken. Raises OSError as long as nothing has changed; later the step
        matters more than its record."""
        before, steps = self.journal["phase"], list(self.journal["steps"])
        several = max(len(self.journal.get(key) or ()) for key in ("models", "from_models")) > 1
        if name != before or (several and container not in ("", self.journal["container"])):
            which = {"container": container} if several and container else {}
            self.journal["steps"].append({"phase": name, "at": self.now(), **which})
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
        """Record how it ended."""
        stopped, answering = self.journal["stopped_at"], self.journal["answering_at"]
        served = outcome in (VERIFIED, RESTORED)
        if outcome != VERIFIED:
            with self._regardless("releases that never served could not be removed"):
                unused = self.store.never_verified(int(self.journal.get("keep") or KEEP))
                unused = [number for number in unused if number != self.journal["to"]]
                tried = [self.journal["to"]] if self.trial and self.journal["to"] != self.journal["from"] else []
                reclaim.note(self.store, unused)
                reclaim.note(self.store, tried, tried=True)
                self.store.remove([*unused, *tried])  # its figures are kept; nobody can want it back
        self.journal["out_of_service_s"] = round(answering - stopped, 1) if stopped and answering and served else None
        last = self.journal.get("restore_error") or self.journal.get("error") or {}
        if outcome == FAILED and last.get("failure") != "rank-failed":
            ranks.keep_down(self.store)  # else the guard starts the ranks once their hosts are there
        self.journal.update(outcome=outcome, ended=self.now())
        self.phase(DONE)

    @contextlib.contextmanager
    def _regardless(self, what: str) -> Iterator[None]:
        """What fails here is recorded and ends nothing: that an engine serves matters more."""
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
        """The state of a container, with its last log lines; what is already known (`found`) wins."""
        state: dict[str, Any] = {}
        log: list[str] = []
        with contextlib.suppress(Exception):  # of a failure that is known already
            state = engine.inspect(self.docker, service)
            log = engine.read_log(self.docker, service, engine.just_before(state["started_at"]), state["tty"])
            if len(log) < 5 or (state["state"] == "running" and state["restart_count"]):  # see the run before
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
        """Do something with Docker; retry for a while when it is unavailable. Raises FailedError."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                action()
                return
            except DockerUnavailable as error:
                if time.monotonic() > deadline:
                    raise FailedError(str(error), failure="docker", state="missing") from None
            except EngineError as error:
                # Compose has its own words for a daemon that is unavailable.
                gone = any(word in str(error) for word in ("Cannot connect to the Docker daemon", "daemon running?"))
                if not gone or time.monotonic() > deadline:
                    raise
            time.sleep(1)

    def _remove_others(self, number: int) -> None:
        """Remove the containers of ours that are not part of a release."""
        try:
            services = {item.service for item in self.store.engines(number)}
        except ReleaseError:
            return
        for item in self._ours():
            if engine.service_of(item) not in services:
                with self._regardless(f"the container {engine.name_of(item)} could not be removed"):
                    engine.remove(self.docker, item["Id"])

    def _urls(self) -> dict[str, str]:
        """Where engines answer, by service; those of the previous release come first."""
        found: dict[str, str] = {}
        for number in (self.journal["from"], self.journal["to"]):
            with contextlib.suppress(ReleaseError):
                for item in self.store.engines(number) if number is not None else ():
                    found.setdefault(item.service, item.url)
        return found

    def _ours(self) -> list[dict[str, Any]]:
        with self._regardless("the containers could not be listed"):
            return engine.ours(self.docker)
        return []

    def _spared(self, services: Collection[str]) -> set[str]:
        """These services, and those that no step of the switch has touched."""
        return {*services, *self.journal["kept"]}

    def _clear(self, remove: bool, spare: Collection[str]) -> None:
        """Stop, or remove, the containers of ours but those of some services."""
        for item in self._ours():
            if engine.service_of(item) in spare:
                continue
            with self._regardless(f"the container {engine.name_of(item)} could not be stopped"):
                engine.stop(self.docker, item["Id"])
                if remove:
                    engine.remove(self.docker, item["Id"])

    def _models(self, number: int | None) -> list[str]:
        """The models of a release's engines; [] where they are not known."""
        with contextlib.suppress(ReleaseError):
            return [item["model"] for item in self.store.plan(number)["engines"]] if number is not None else []
        return []


class RankWatch:
    """Whether the ranks of a group still run while rank 0 starts. `epoch`: that they were started in."""

    def __init__(self, group: Group, epoch: int) -> None:
        self.group, self.epoch = group, epoch
        self._asked = -ASK_PAUSE
        self._lost: dict[int, float] = {}  # since when a rank does not answer

    def gone(self, now: float) -> str:
        """What is wrong, "" for nothing. `now`: of the monotonic clock."""
        if now - self._asked < ASK_PAUSE:
            return ""
        self._asked = now
        found = ranks.ask_workers(self.group)
        missing = ranks.absent(self.group, found, self.epoch, ("running",))
        self._lost = {rank: self._lost.get(rank, now) for rank, seen in found.items() if seen is None}
        patient = {rank for rank, since in self._lost.items() if now - since < LOST_SECONDS}
        return "; ".join(words for rank, words in missing.items() if rank not in patient)


def _reason(error: Exception) -> str:
    """Why something failed, for a message."""
    known = isinstance(error, FailedError | ReleaseError | EngineError | DockerError)
    if isinstance(error, OSError) and error.strerror:
        return printable(error.strerror, 400)
    return printable(str(error) if known else f"{type(error).__name__}: {error}", 400)


def _failure(error: Exception) -> dict[str, Any]:
    """How a release failed, for the journal. What is not a FailedError is a bug of ours."""
    if isinstance(error, FailedError):
        return {"message": str(error), **error.facts}
    return {"message": _reason(error), "failure": "internal"}


def interrupted(store: Store) -> bool:
    """Whether a switch was started that no one continues. A journal that cannot be understood is set aside."""
    journal = store.switch()
    if journal is None:
        if store.switch_damage() and store.holder() is None:
            store.set_journal_aside()
        return False
    return journal["phase"] != DONE and not store.switch_active()


def recover(store: Store | None = None, docker: Docker | None = None) -> dict[str, Any] | None:
    """End a switch that was interrupted: what was current is started and verified again. The journal, or None where
    there was nothing to do. Raises OSError where the lock cannot be taken."""
    store = store or Store()
    with store.exclusive() as mine:
        if not mine:
            return None
        store.set_journal_aside()
        journal = store.switch()
        if journal is None or journal["phase"] == DONE:
            return None
        kept: tuple[str, ...] = ("id", "to", "mode", "verb", "controller", "keep", "start_timeout")
        kept += ("services", "verify", "verify_seconds")
        # Recovery is to be short: what no release needs waits for the next switch.
        request = {**{key: journal.get(key) for key in kept}, "reclaim": False}
        switch = Switch(store, docker or Docker(), request)
        switch.journal, switch.recovering = journal, True
        switch.head_seconds = 0.0  # the guard asks again
        # It becomes the current one when it is verified. That journal may not have been written.
        another = journal["to"] != journal["from"] and journal["phase"] in FORWARD
        if (journal["phase"] == "committing" or another) and store.current() == journal["to"]:
            switch.finish(journal["to"])
            return journal
        why = "the host was restarted" if journal["boot_id"] != boot_id() else "its process was killed"
        if journal["error"] is None:
            message = f"the switch to release {journal['to']} was interrupted in the phase {journal['phase']}: {why}"
            journal["error"] = {"message": message, "failure": "switch-interrupted", "state": "missing"}
        if journal["phase"] in ("", CHECKING):
            key.forget_staged()
            switch.end(REFUSED)  # nothing had changed
            return journal
        rank = journal["to"] if journal["to"] in store.numbers() else journal["from"]
        if switch.is_worker(rank):
            return switch.mirror()
        if journal["to"] == journal["from"] and journal["to"] in store.numbers():
            # Nothing else to go back to: start over. What was stopped is not kept down by a check.
            with contextlib.suppress(Exception):  # where that fails, its start reports it
                store.repair(journal["to"])
            switch.request["new_key"] = key.is_staged()
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
    parser.add_argument("--mode", choices=(DEPLOY, ROLLBACK, RESTART, TRIAL), default=DEPLOY)
    parser.add_argument("--controller", default="")
    parser.add_argument("--verb", default="")
    parser.add_argument("--start-timeout", type=float, default=START_SECONDS)
    parser.add_argument("--keep", type=int, default=KEEP)
    parser.add_argument("--no-reclaim", dest="reclaim", action="store_false", help="keep what no release needs")
    parser.add_argument("--verify", choices=(QUICK, DEEP), default=QUICK, help="what the release is asked")
    parser.add_argument("--verify-seconds", type=float, default=BUDGET, help="of a deep verification of one engine")
    parser.add_argument("--recreate", action="store_true")
    parser.add_argument("--service", dest="services", action="append", default=[], help="restart this engine alone")
    parser.add_argument("--new-key", action="store_true", help="take the key that is staged for this switch")
    parser.add_argument("--project-dir", default=PROJECT_DIR)
    parser.add_argument("--state-dir", default=STATE_DIR)
    options = parser.parse_args(argv)
    store = Store(options.project_dir, options.state_dir)
    if options.recover:
        ended = recover(store)
        _print_troubles(ended)
        return 0 if ended is None or ended["outcome"] in (VERIFIED, RESTORED, REMOVED) else 1
    if options.to is None:
        parser.error("one of --to and --recover is needed")
    if options.services and options.mode != RESTART:
        parser.error("--service is for --mode restart")
    with store.exclusive() as mine:
        if not mine:
            print(f"the lock {store.lock_file} is held: {store.holder()}", flush=True)
            return BUSY
        try:
            journal = Switch(store, Docker(), vars(options)).run()
        except (ReleaseError, OSError) as error:
            print(error, flush=True)
            return 1
    _print_troubles(journal)
    tried = journal["mode"] == TRIAL and not journal["error"] and journal["outcome"] in (RESTORED, REMOVED)
    return 0 if tried or journal["outcome"] == VERIFIED else 1


def _print_troubles(journal: dict[str, Any] | None) -> None:
    """Print them for journalctl: the journal of the switch may be what cannot be written."""
    for line in (journal or {}).get("troubles") or []:
        print(line, flush=True)
