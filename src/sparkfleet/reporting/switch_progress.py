"""A switch of releases as the controller follows it: what to print, and the outcome."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from sparkfleet_host import measured
from sparkfleet_host.bounded import LATEST, BoundsError, as_int, as_number, as_str, printable
from sparkfleet_host.release_format import NUMBERS, RETURNING, TRIAL, check_journal, storable

from sparkfleet.diagnosis import failures, startup_log
from sparkfleet.diagnosis.startup import Watch, explain
from sparkfleet.planning import calibration
from sparkfleet.reporting import report

VERIFIED, RESTORED, REMOVED, REFUSED = "verified", "restored", "removed", "refused"
#: Phases of the journal in words; those that wait for an engine are shown by its log.
WORDS = {
    "stopping": "stopping {before}",
    "starting": "starting {to}",
    "verifying": "asking it",
    "measuring": "measuring its speed",
    "committing": "it is the current release now",
    "restoring": "{to} failed; bringing back {before}",
    "returning": "bringing back {before}",  # restoring after a trial
    "restore-verifying": "asking it",
}
MOST = 1000  # parts that were reclaimed, sentences
LOG_LINES = 2000  # of an answer
TEXT, NAME = 1000, 300  # characters that are printed of a sentence, of a name
_TIMES = ("ended", "stopped_at", "answering_at", "out_of_service_s")
_WAITING = ("waiting", "restore-waiting")
_ANSWERS = ("verifying", "restore-verifying")
#: The same for one engine of several.
WORDS_OF_ONE = {
    "starting": "starting {service} of {to}",
    "verifying": "asking {service}",
    "restoring": "starting {service} of {before}",
    "restore-verifying": "asking {service}",
}


class Follower:
    """Follows one job from answer to answer of the module release_switch."""

    def __init__(self, host: str, pause: float) -> None:
        self.host, self.pause = host, pause
        self.done = False
        self.joined = self.already = False
        self._id = ""
        self._cut = False
        self._steps = 0
        self._asking = ""  # the kind, or the number of streams, that was last shown
        self._speeds: dict[str, int] = {}  # rows of the benchmark that were shown, by service
        self._journal: dict[str, Any] = {}
        self._watches: dict[tuple[str, str], Watch] = {}  # by release (there: the new one, back: the old) and service
        self._waits: tuple[str, str] | None = None  # for which of them
        self._cursor: tuple[str, str] = ("", "")
        self._read: dict[str, str] = {}  # by container, the time of the last line of its log that was read

    def parameters(self) -> dict[str, Any]:
        """Options for the next call of the module."""
        return {"id": self._id, "recover": not self._cut, "container": self._cursor[0], "cursor": self._cursor[1]}

    def take(self, answer: Mapping[str, Any]) -> list[str]:
        """Record an answer; the lines to print. It comes from the Spark: see `understood`."""
        return [printable(line) for line in self._take(understood(answer))]

    def _take(self, answer: dict[str, Any]) -> list[str]:
        journal = self._journal = answer["journal"]
        lines: list[str] = []
        if not self._id and answer["already"]:
            self.already = True
            lines.append(
                f"{self.host}  {self._name('to')} runs already, verified; {journal['controller'] or 'another run'} "
                f"switched to it with {journal['verb'] or 'Sparkfleet'}"
            )
        if not self._id and answer["joined"]:
            self.joined = True
            lines.append(
                f"{self.host}  joined: {journal['controller'] or 'another run'} began it with "
                f"{journal['verb'] or 'Sparkfleet'}"
            )
        if answer["cut"]:
            self._cut = True
            lines.append(f"{self.host}  the job was killed in the phase {journal['phase']}; it is being ended")
        self._id, self.done = answer["id"], answer["done"]
        if self.already:
            return lines
        since = f"{max(answer['now'] - journal['began'], 0):.0f} s"
        news = journal["steps"][self._steps :]
        self._steps = max(self._steps, len(journal["steps"]))
        # The host reads on where it was with one container; of the one before it starts again.
        read = self._read.get(journal["container"], "")
        answer = {**answer, "log_lines": [line for line in answer["log_lines"] if line.partition(" ")[0] > read]}
        self._read[journal["container"]] = answer["cursor"] or read
        self._cursor = (journal["container"], answer["cursor"])
        back = journal["error"] or journal["phase"] in RETURNING  # a trial goes back without an error
        now = self._key("back" if back else "there", journal["container"])
        fed = False
        for step in news:
            container = step.get("container", "")
            if step["phase"] in _ANSWERS or container:
                # What the log shows belongs between the steps before and after the wait.
                waited, self._waits = self._waits, None
                own = waited == now
                if waited and (not waited[1] or journal["container_ids"].get(waited[1])):
                    shown = answer if own else {**answer, "log_lines": [], "started_at": "", "cursor": ""}
                    lines += self._watch(waited).take({**shown, "ready": True})
                    fed = fed or own
            elif step["phase"] == "restoring":
                self._waits = None
                lines += [f"{self.host}  {since}  {line}" for line in self._speed_words()]
            if step["phase"] in _WAITING:
                self._waits = self._key("there" if step["phase"] == "waiting" else "back", container)
            lines += self._line(step)
        # What an engine logs while its speed is measured is no start.
        more = answer["log_lines"] and now in self._watches and not fed and journal["phase"] != "measuring"
        if journal["phase"] in _WAITING or more:
            lines += self._watch(now).take({**answer, "ready": False})
        if not self.done:
            lines += [f"{self.host}  {since}  {line}" for line in self._speed_words()]
        if journal["asking"] and journal["asking"] != self._asking:
            what = "measuring" if journal["phase"] == "measuring" else "asking it:"
            lines.append(f"{self.host}  {since}  {what} {journal['asking']}")
        self._asking = journal["asking"]
        if self.done:
            lines += [f"{self.host}  {line}" for line in self._measured_words()]
            lines += [f"{self.host}  {trouble}" for trouble in journal["troubles"][:20]]
            lines += _reclaimed(self.host, "reclaimed", journal)
        return lines

    def _measured_words(self) -> list[str]:
        lines = []
        for service, record in self.measured().items():
            which = f"measured of {service}: " if self._several() else "measured: "
            lines += [which + ", ".join(words)] if (words := measured.words(record)) else []
            by = f", by {record['bench']}" if record["bench"] else ""
            lines += [f"{which}{words}{by}" for words in measured.speed_words(record)]
        return lines

    def _speed_words(self) -> list[str]:
        """Rows of the benchmark since the last answer."""
        lines: list[str] = []
        for service, record in self.measured().items():
            shown = self._speeds.get(service, 0)
            lines += [f"measured: {words}" for words in measured.speed_words(record)[shown:]]
            self._speeds[service] = max(shown, len(measured.speed_words(record)))
        return lines

    def measured(self) -> dict[str, dict[str, Any]]:
        """What was measured of the engines that were started, by service."""
        return {record["service"]: record for record in calibration.understood([*self._journal["measured"].values()])}

    def _line(self, step: Mapping[str, Any]) -> list[str]:
        words = self._words(step["phase"], step.get("container", ""))
        return [f"{self.host}  {max(step['at'] - self._journal['began'], 0):.0f} s  {words}"] if words else []

    def _several(self) -> bool:
        """Whether a release has more than one engine, which then have to be distinguished."""
        return max(len(self._journal["models"]), len(self._journal["from_models"])) > 1

    def _key(self, leg: str, container: str) -> tuple[str, str]:
        return leg, container if self._several() else ""

    def _watch(self, key: tuple[str, str]) -> Watch:
        if key not in self._watches:
            self._watches[key] = Watch(self.host, self.pause, began=float(self._journal["began"]))
        return self._watches[key]

    def _words(self, phase: str, service: str) -> str:
        before, kept = self._journal["from"], self._journal["kept"]
        names = {"to": self._name("to"), "before": self._name("from"), "service": service}
        if phase == "stopping" and before is None:
            return ""
        if phase == "stopping" and kept:
            if len(kept) < len(self._journal["from_models"]):
                return f"stopping {names['before']} but for {', '.join(kept)}"
            which = ", ".join(kept) if len(kept) > 1 else "the engine"
            return f"{which} of {names['before']} keep{'s' * (len(kept) == 1)} running for {names['to']}"
        if phase == "restoring" and self._journal["mode"] == TRIAL and not self._journal["error"]:
            return WORDS["returning"].format(**names) if before is not None else "removing its container"
        if service and phase in WORDS_OF_ONE:
            return WORDS_OF_ONE[phase].format(**names)
        if phase == "restoring" and before is None:
            return f"{self._name('to')} failed; removing its container"
        return WORDS.get(phase, "").format(**names)

    def _models(self, which: str) -> list[str]:
        models: list[str] = self._journal["models" if which == "to" else "from_models"]
        return models

    def _name(self, which: str) -> str:
        models = self._named(which)
        return f"release {self._journal[which]}" + (f" ({models})" if models else "")

    def _named(self, which: str) -> str:
        return ", ".join(dict.fromkeys(self._models(which)))

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
            "verification": next(iter(journal["verifications"].values()), None),
            "verifications": journal["verifications"],
            "measured": self.measured(),
            "reclaimed": journal["reclaimed"],
            "reclaimed_bytes": _bytes(journal),
            "left": journal["left"],
            "troubles": journal["troubles"],
        }
        starts = {
            service: {"kv_cache": watch.tracker.kv, "weights_gib": watch.tracker.weights_gib, "phases": watch.phases()}
            for (leg, service), watch in self._watches.items()
            if leg == "there"
        }
        if starts:
            result.update(next(iter(starts.values())), **({"starts": starts} if self._several() else {}))
        tried = journal["mode"] == TRIAL and not journal["error"] and outcome in (RESTORED, REMOVED)
        if tried or outcome == VERIFIED:
            return result
        why = self._why(journal["error"] or {"message": "the Spark gives no reason", "failure": "internal"}, "there")
        head, _, log = why["msg"].partition("\n")
        what = "is not switched to" if outcome == REFUSED else "does not serve"
        message = f"{self.host}: {self._name('to')} {what}: {head}{self._became()}"
        message = report.clean(message + (f"\n{log}" if log else ""))
        return {**result, "failed": True, "failure": why["failure"], "msg": message}

    def _release(self, which: str) -> dict[str, Any] | None:
        number = self._journal[which]
        if number is None:
            return None
        return {"number": number, "model": self._named(which), "models": self._models(which)}

    def _became(self) -> str:
        """What became of the previous release, as a sentence."""
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
        right = [service for service, found in journal["verifications"].items() if found.get("verified") is True]
        serving = f"{', '.join(right)} serve{'s' * (len(right) == 1)}" if right and self._several() else ""
        if journal["from"] == journal["to"] or not journal["restore_error"]:
            stopped = (journal["error"] or {}).get("container") or "It"
            return f"\n  {stopped} was stopped; {serving}." if serving else "\n  It was stopped; nothing serves."
        again = self._why(journal["restore_error"], "back")
        head = again["msg"].partition("\n")[0]
        if serving:
            return f"\n  {self._name('from')} could not be brought back completely, {serving}: {head}"
        return f"\n  {self._name('from')} could not be brought back either, nothing verified serves: {head}"

    def _why(self, error: Mapping[str, Any], leg: str) -> dict[str, Any]:
        """msg and failure (entry in the table of failures) of what went wrong."""
        service = str(error.get("container") or "the engine")
        known = failures.BY_ID.get(str(error.get("failure") or ""))
        if known and known.id != "start-timeout":
            shown = "".join(f"\n  {line}" for line in failures.relevant(error.get("log", []), [])[-5:])
            shown = "" if error.get("checks") else shown
            message = str(error["message"])
            if self._several() and error.get("container") and service not in message:
                message = f"{service}: {message}"
            text = f"{message}. {known.cause[0].upper()}{known.cause[1:]}. {known.remedy} [{known.id}]{shown}"
            return {"failure": known.id, "msg": text}
        watch = self._watches.get(self._key(leg, service)) or Watch(self.host, self.pause)
        watch.restarts = 0  # the switch starts with a fresh engine
        watch.log.extend(line for line in error.get("log", []) if line not in watch.log)
        answer = {
            "state": error.get("state", "missing"),
            "exit_code": error.get("exit_code", 0),
            "restart_count": error.get("restart_count", 0),
            "oom_killed": error.get("oom_killed", False),
            "error": error.get("docker_error", ""),
        }
        if answer["error"] and answer["state"] == "missing":
            answer["state"] = "exited"  # a container was never created
        return explain(service, answer, watch, again=False, elapsed=self._lasted(leg, service))

    def _lasted(self, leg: str, service: str) -> float:
        """Seconds from the start of an engine to its failure; of the first leg, or of the restoration."""
        first, last = ("starting", "restoring") if leg == "there" else ("restore-waiting", "done")
        # Of several engines, those of this one, and those of all of them.
        steps = [step for step in self._journal["steps"] if step.get("container", service) == service]
        at = {step["phase"]: float(step["at"]) for step in reversed(steps)}  # of each the first
        return max(at.get(last, 0.0) - at.get(first, 0.0), 0.0)


def foreseen(host: str, would: Any) -> list[str]:
    """What a switch would remove, in check mode, as lines to print. `would` comes from the Spark."""
    given = would if isinstance(would, Mapping) else {}
    pruned = ", ".join(str(number) for number in _each(given.get("pruned"), _release))
    found = {"reclaimed": _each(given.get("reclaimed"), _part), "left": _each(given.get("left"), _sentence)}
    return [*([f"{host}  would prune release {pruned}"] if pruned else []), *_reclaimed(host, "would reclaim", found)]


def _bytes(found: Mapping[str, Any]) -> int:
    return sum(item["bytes"] for item in found["reclaimed"])


def _reclaimed(host: str, verb: str, found: Mapping[str, Any]) -> list[str]:
    items = [f"{item['kind']} {item['name']} ({item['bytes'] / 1e9:.2f} GB)" for item in found["reclaimed"]]
    lines = [f"{host}  {verb} {_bytes(found) / 1e9:.2f} GB that no kept release needs: {', '.join(items)}"]
    left = [f"{host}  not reclaimed: {reason}" for reason in found["left"]]
    return [printable(line) for line in [*(lines if items else []), *left]]


# -- what a Spark reports --------------------------------------------------------------------------------------------


def understood(answer: Mapping[str, Any]) -> dict[str, Any]:
    """What the module release_switch returns, in the form that it must have, though a Spark may send anything: what has
    another form counts as missing, and every text but the lines of the engine's log can be printed."""
    return {
        "journal": _journal(answer.get("journal")),
        **{key: answer.get(key) is True for key in ("done", "joined", "already", "cut")},
        **{key: _text(answer.get(key)) for key in ("id", "state", "started_at", "cursor")},
        "restart_count": _checked(as_int, answer.get("restart_count"), 0),
        "now": _time(answer.get("now")),
        "log_lines": _log(answer.get("log_lines"), LOG_LINES),
    }


def _journal(value: Any) -> dict[str, Any]:
    given: dict[str, Any] = {**value} if isinstance(value, Mapping) else {}
    for key, read in (("reclaimed", _part), ("left", _sentence), ("troubles", _sentence), ("repaired", _sentence)):
        given[key] = _each(given.get(key), read)
    given["to"] = _checked(_release, given.get("to"), 0)
    checked = check_journal(storable(given))
    logs = {key: _log(checked[key].pop("log", []), LOG_LINES) for key in ("error", "restore_error") if checked[key]}
    journal: dict[str, Any] = _shown(checked)
    for key, log in logs.items():
        journal[key]["log"] = log
    journal["began"] = _time(journal["began"])
    journal.update({key: None if journal[key] is None else _time(journal[key]) for key in _TIMES})
    journal["steps"] = [{**step, "at": _time(step["at"])} for step in journal["steps"]]
    for step in (journal, *journal["steps"]):
        step.update({key: _text(step[key]) for key in ("controller", "verb", "container", "phase") if key in step})
    journal["asking"] = _text(journal["asking"])
    for key in ("models", "from_models", "kept", "services"):
        journal[key] = [_text(name) for name in journal[key]]
    return journal


def _shown(value: Any) -> Any:
    """Data in which every text can be printed."""
    if isinstance(value, str):
        return printable(value, TEXT)
    if isinstance(value, dict):
        return {printable(key, NAME): _shown(item) for key, item in value.items()}
    return [_shown(item) for item in value] if isinstance(value, list) else value


def _checked(read: Any, value: Any, absent: Any) -> Any:
    try:
        return read(value, "")
    except BoundsError:
        return absent


def _each(value: Any, read: Any) -> list[Any]:
    """The items of a list that are of their form."""
    found = []
    for item in value[:MOST] if isinstance(value, list) else ():
        with contextlib.suppress(BoundsError):
            found.append(read(item, ""))
    return found


def _release(value: Any, what: str) -> int:
    return as_int(value, what, 0, NUMBERS)


def _sentence(value: Any, what: str) -> str:
    return printable(as_str(value, what), TEXT)


def _part(value: Any, what: str) -> dict[str, Any]:
    given = value if isinstance(value, Mapping) else {}
    names = {key: printable(as_str(given.get(key), what), NAME) for key in ("kind", "name")}
    return {**names, "bytes": as_int(given.get("bytes"), what)}


def _text(value: Any) -> str:
    return printable(value, NAME) if isinstance(value, str) else ""


def _time(value: Any) -> float:
    number: float = _checked(as_number, value, 0.0)
    return number if number <= LATEST else 0.0


def _log(value: Any, most: int) -> list[str]:
    """Lines of a log, which are cleaned of what moves a cursor once they are understood."""
    return [
        line[: startup_log.LINE] for line in (value[-most:] if isinstance(value, list) else ()) if isinstance(line, str)
    ]
