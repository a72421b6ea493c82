"""A switch of releases as the controller follows it: what to print, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparkfleet_host.bounded import printable

from sparkfleet.diagnosis import failures
from sparkfleet.diagnosis.startup import Watch, explain

VERIFIED, RESTORED, REMOVED, REFUSED = "verified", "restored", "removed", "refused"
#: Phases of the journal in words; those that wait for an engine are told by its log.
WORDS = {
    "stopping": "stopping {before}",
    "starting": "starting {to}",
    "verifying": "asking it",
    "committing": "it is the current release now",
    "restoring": "{to} failed; bringing back {before}",
    "restore-verifying": "asking it",
}
_WAITING = ("waiting", "restore-waiting")
_ANSWERS = ("verifying", "restore-verifying")


class Follower:
    """Follows one job from answer to answer of the module release_switch."""

    def __init__(self, host: str, pause: float) -> None:
        self.host, self.pause = host, pause
        self.done = False
        self.joined = self.already = False
        self._id = ""
        self._cut = False
        self._steps = 0
        self._journal: dict[str, Any] = {}
        self._watches: dict[str, Watch] = {}  # by phase: one for the new release, one for the old
        self._cursor: tuple[str, str] = ("", "")

    def asks(self) -> dict[str, Any]:
        """What the next call of the module is to be told."""
        return {"id": self._id, "recover": not self._cut, "container": self._cursor[0], "cursor": self._cursor[1]}

    def take(self, answer: Mapping[str, Any]) -> list[str]:
        """Note an answer; the lines to print."""
        journal = self._journal = dict(answer["journal"])
        lines: list[str] = []
        if not self._id and answer.get("already"):
            self.already = True
            lines.append(
                f"{self.host}  {self._name('to')} runs already, verified; {journal['controller'] or 'another run'} "
                f"switched to it with {journal['verb'] or 'Sparkfleet'}"
            )
        if not self._id and answer["joined"]:
            self.joined = True
            lines.append(
                f"{self.host}  joined: {journal['controller']} began it with {journal['verb'] or 'Sparkfleet'}"
            )
        if answer["cut"]:
            self._cut = True
            lines.append(f"{self.host}  the job was killed in the phase {journal['phase']}; it is being ended")
        self._id, self.done = str(answer["id"]), bool(answer["done"])
        if self.already:
            return lines
        news = journal["steps"][self._steps :]
        self._steps = len(journal["steps"])
        self._cursor = (str(journal["container"]), str(answer["cursor"]))
        # What the log tells belongs between the steps before and after the wait.
        after = next((place for place, step in enumerate(news) if step["phase"] in _ANSWERS), len(news))
        for step in news[:after]:
            lines += self._said(step)
        leg = "back" if journal["error"] else "there"
        ready = any(step["phase"] in _ANSWERS for step in news)
        if journal["phase"] in _WAITING or ready or (answer["log_lines"] and leg in self._watches):
            lines += self._watch(leg).take({**answer, "ready": ready})
        for step in news[after:]:
            lines += self._said(step)
        if self.done:
            lines += _reclaimed(self.host, "reclaimed", journal)
        return lines

    def _said(self, step: Mapping[str, Any]) -> list[str]:
        words = self._words(step["phase"])
        return [f"{self.host}  {max(step['at'] - self._journal['began'], 0):.0f} s  {words}"] if words else []

    def _watch(self, leg: str) -> Watch:
        if leg not in self._watches:
            self._watches[leg] = Watch(self.host, self.pause, began=float(self._journal["began"]))
        return self._watches[leg]

    def _words(self, phase: str) -> str:
        before = self._journal["from"]
        if phase == "stopping" and before is None:
            return ""
        if phase == "restoring" and before is None:
            return f"{self._name('to')} failed; removing its container"
        return WORDS.get(phase, "").format(to=self._name("to"), before=self._name("from"))

    def _name(self, which: str) -> str:
        model = self._journal["model" if which == "to" else "from_model"]
        return f"release {self._journal[which]}" + (f" ({model})" if model else "")

    # -- the end ---------------------------------------------------------------------------------------------

    def result(self) -> dict[str, Any]:
        """What the action returns when the job is done."""
        journal = self._journal
        outcome = journal["outcome"]
        serving = {VERIFIED: "to", RESTORED: "from"}.get(outcome)
        result = {
            "changed": not self.already and outcome != REFUSED,
            "outcome": outcome,
            "joined": self.joined,
            "already": self.already,
            "release": self._release(serving) if serving else None,
            "previous": self._release("from"),
            "out_of_service_s": journal["out_of_service_s"],
            "seconds": round((journal["ended"] or 0) - journal["began"], 1),
            "verification": journal["verification"],
            "reclaimed": journal.get("reclaimed") or [],
            "reclaimed_bytes": _bytes(journal),
            "left": journal.get("left") or [],
        }
        watch = self._watches.get("there")
        if watch:
            result.update(kv_cache=watch.tracker.kv, weights_gib=watch.tracker.weights_gib, phases=watch.phases())
        if outcome == VERIFIED:
            return result
        why = self._why(journal["error"], watch)
        head, _, log = why["msg"].partition("\n")
        what = "is not switched to" if outcome == REFUSED else "does not serve"
        message = f"{self.host}: {self._name('to')} {what}: {head}{self._became()}"
        return {**result, "failed": True, "failure": why["failure"], "msg": message + (f"\n{log}" if log else "")}

    def _release(self, which: str) -> dict[str, Any] | None:
        number = self._journal[which]
        if number is None:
            return None
        return {"number": number, "model": self._journal["model" if which == "to" else "from_model"]}

    def _became(self) -> str:
        """What became of the release before, as a sentence."""
        journal = self._journal
        if journal["outcome"] == RESTORED:
            gone = journal["out_of_service_s"]
            service = f"; no service for {gone:.0f} s" if gone is not None else ""
            return f"\n  {self._name('from')} was started again and is verified{service}."
        if journal["outcome"] == REFUSED:
            before = f"; {self._name('from')} is as it was" if journal["from"] is not None else ""
            return f"\n  Nothing was stopped{before}."
        if journal["outcome"] == REMOVED:
            return "\n  There was no release before it: its container was removed, and nothing serves."
        if journal["from"] == journal["to"] or not journal["restore_error"]:
            return "\n  It was stopped; nothing serves."
        again = self._why(journal["restore_error"], self._watches.get("back"))
        head = again["msg"].partition("\n")[0]
        return f"\n  {self._name('from')} could not be brought back either, nothing verified serves: {head}"

    def _why(self, error: Mapping[str, Any], watch: Watch | None) -> dict[str, Any]:
        """msg and failure (entry in the table of failures) of what went wrong."""
        service = str(error.get("container") or "the engine")
        known = failures.BY_ID.get(str(error.get("failure") or ""))
        if known and known.id != "start-timeout":
            shown = "".join(f"\n  {line}" for line in failures.relevant(error.get("log", []), [])[-5:])
            shown = "" if error.get("checks") else shown
            text = f"{error['message']}. {known.cause[0].upper()}{known.cause[1:]}. {known.remedy} [{known.id}]{shown}"
            return {"failure": known.id, "msg": text}
        watch = watch or Watch(self.host, self.pause)
        watch.restarts = 0  # the switch begins with a fresh start
        watch.log.extend(line for line in error.get("log", []) if line not in watch.log)
        answer = {
            "state": error.get("state", "missing"),
            "exit_code": error.get("exit_code", 0),
            "restart_count": error.get("restart_count", 0),
            "oom_killed": error.get("oom_killed", False),
            "error": error.get("docker_error", ""),
        }
        if answer["error"] and answer["state"] == "missing":
            answer["state"] = "exited"  # it never came to a container
        return explain(service, answer, watch, again=False, elapsed=self._lasted(error is self._journal["error"]))

    def _lasted(self, first: bool) -> float:
        """Seconds from the start of an engine to its failure; of the first leg, or of the way back."""
        begins, ends = ("starting", "restoring") if first else ("restore-waiting", "done")
        at = {step["phase"]: float(step["at"]) for step in self._journal["steps"]}
        return max(at.get(ends, 0.0) - at.get(begins, 0.0), 0.0)


def foreseen(host: str, would: Mapping[str, Any]) -> list[str]:
    """What a switch would remove, in check mode, as lines to print."""
    pruned = ", ".join(map(str, would.get("pruned") or []))
    return [*([f"{host}  would prune release {pruned}"] if pruned else []), *_reclaimed(host, "would reclaim", would)]


def _bytes(found: Mapping[str, Any]) -> int:
    return sum(int(item["bytes"]) for item in found.get("reclaimed") or [])


def _reclaimed(host: str, verb: str, found: Mapping[str, Any]) -> list[str]:
    items = [f"{item['kind']} {item['name']} ({item['bytes'] / 1e9:.2f} GB)" for item in found.get("reclaimed") or []]
    lines = [f"{host}  {verb} {_bytes(found) / 1e9:.2f} GB that no kept release needs: {', '.join(items)}"]
    left = [f"{host}  not reclaimed: {reason}" for reason in found.get("left") or []]
    return [printable(line) for line in [*(lines if items else []), *left]]
