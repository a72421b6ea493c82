"""What is wrong with a Spark: from what the module spark_diagnose found to entries of the table of failures.

The cause comes first; what follows from it is named with it, or left out.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparkfleet_host.bounded import GIB, LATEST
from sparkfleet_host.on_demand import ASLEEP

from sparkfleet.diagnosis import failures
from sparkfleet.diagnosis.failures import BY_ID

#: Seconds since the guard's last sign of life; it writes its state twice a minute.
STUCK = 120.0
#: Free space below which writes begin to fail, bytes.
DISK_FLOOR = 1 * GIB
README = """What `sparkfleet diagnose` found on a Spark, fit to attach to a report.

findings.json   what is wrong, by Sparkfleet's table of failures (docs/troubleshooting.md)
facts.json      state: releases, last switch, guard, memory, disks, the questions asked
logs/           the engines' logs, logs of failed releases, journals, commands

Tokens, keys and passwords were replaced by *** on the host. Host names, paths and the model's name are left in.
"""


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that is wrong (or harmless, and marked so). `now`: it still is."""

    id: str
    evidence: tuple[str, ...] = ()
    now: bool = True

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with the table's words."""
        known = BY_ID[self.id]
        return {
            "id": self.id,
            "title": known.title,
            "cause": known.cause,
            "remedy": known.remedy,
            "auto_recovery": known.auto_recovery,
            "harmless": known.harmless,
            "now": self.now,
            "evidence": list(self.evidence),
        }


def findings(facts: Mapping[str, Any]) -> list[Finding]:
    """All findings: what is wrong now, then what went wrong before, then the harmless."""
    found: list[Finding] = []
    for of_host in (_host, _deployed, _files, _running_switch):
        found += of_host(facts)
    for of_engine in (_gave_up, _engine, _answers, _pace):
        found += _of_each(facts, of_engine)
    found += [*_guard(facts), *_last_switch(facts), *_of_each(facts, _restarts)]
    if not facts["status"].get("healthy") and not wrong(found):
        # Whatever it is: one that does not serve is not well.
        down = [engine for engine in facts["engines"] if not engine["healthy"]] or [{}]
        for engine in down:
            state = (engine.get("container") or {}).get("state") or "not there"
            which = f"{engine['service']} is" if len(facts["engines"]) > 1 else "the engine is"
            found.append(Finding("endpoint-down", (f"{which} {state}, and nothing explains it",)))
    seen: dict[str, Finding] = {}
    for item in found:
        before = seen.setdefault(item.id, item)
        if len(facts["engines"]) > 1 and item.now == before.now:  # of another engine
            evidence = tuple(dict.fromkeys((*before.evidence, *item.evidence)))
            seen[item.id] = dataclasses.replace(before, evidence=evidence)
    # A restart loop has a cause, and the cause is what to fix.
    causes = [item for item in seen.values() if item.id not in CONSEQUENCES and not BY_ID[item.id].harmless]
    if causes:
        for name in ("engine-died", "internal"):
            seen.pop(name, None)
    ordered = sorted(seen.values(), key=lambda item: (BY_ID[item.id].harmless, not item.now, item.id in CONSEQUENCES))
    return [*ordered, *_unchecked(facts)]


def _of_each(
    facts: Mapping[str, Any], look: Callable[[Mapping[str, Any], Mapping[str, Any]], list[Finding]]
) -> list[Finding]:
    """The findings of each engine; where there is more than one, the evidence names it."""
    found = []
    for engine in facts["engines"]:
        for item in look(facts, engine):
            named = tuple(f"{engine['service']}: {line}" for line in item.evidence or (BY_ID[item.id].title,))
            found.append(dataclasses.replace(item, evidence=named) if len(facts["engines"]) > 1 else item)
    return found


def _unchecked(facts: Mapping[str, Any]) -> list[Finding]:
    """Explains nothing of the rest."""
    left_out = facts.get("unchecked_models")
    return [Finding("models-unchecked", (f"{left_out} models were not checked",))] if left_out else []


CONSEQUENCES = (
    "container-missing",
    "guard-stuck",
    "restart-loop",
    "endpoint-down",
    "engine-died",
    "guard-gave-up",
    "switch-restored",
    "switch-not-restored",
)


def _match(lines: Sequence[str], now: bool = True, **how: Any) -> list[Finding]:
    found = failures.match(lines, **how)
    return [Finding(item.failure.id, item.lines, now) for item in found]


def _host(facts: Mapping[str, Any]) -> list[Finding]:
    found = []
    for disk in facts["disk"]:
        if isinstance(disk.get("free"), int) and disk["free"] < DISK_FLOOR:
            found.append(Finding("disk-full", (f"{disk['path']}: {disk['free'] / 1e6:.0f} MB free",)))
    status = facts["status"]
    if status.get("docker") is False:
        found.append(Finding("docker", tuple(facts["commands"].get("containers", ())[-1:])))
    smi = facts["commands"].get("nvidia-smi", [])
    kernel = [item for item in _match(facts["commands"].get("kernel", [])) if item.id in ("gpu-lost", "gpu-xid")]
    gone = [item for item in _match(smi) if item.id == "gpu-lost"]
    if gone:
        found.append(Finding("gpu-lost", (*gone[0].evidence, *(line for item in kernel for line in item.evidence))))
    elif smi and "nvidia-smi:" in smi[0] and "No such file" in smi[0]:
        found.append(Finding("gpu-invisible", (smi[0],)))
    elif any("NVIDIA-SMI has failed" in line for line in smi):
        found.append(Finding("gpu-invisible", tuple(smi[:1])))
    else:
        # An engine that serves got over it.
        found += [dataclasses.replace(item, now=not status.get("healthy")) for item in kernel]
    return found


def _deployed(facts: Mapping[str, Any]) -> list[Finding]:
    """Whether there is a current release at all."""
    releases = facts["status"].get("releases") or {}
    if releases.get("current") is not None or releases.get("switch_active"):
        return []
    numbers, containers = releases.get("numbers") or [], facts["status"].get("containers") or []
    if numbers or containers:
        there = f"releases {', '.join(map(str, numbers))}" if numbers else "no release"
        running = f"; container {containers[0].get('name')} is {containers[0].get('state')}" if containers else ""
        # A failed one with nothing before it is not damaged.
        outcomes = [outcome for outcome in (releases.get("outcomes") or {}).values() if outcome]
        if numbers and not any(outcome.get("verified_at") for outcome in outcomes):
            return [Finding("nothing-deployed", (f"{there}, none of them verified{running}",))]
        return [Finding("release-damaged", (f"/opt/sparkfleet/current names no release; there is {there}{running}",))]
    return [Finding("nothing-deployed")]


def _files(facts: Mapping[str, Any]) -> list[Finding]:
    """The model cache, files that were found damaged, and state files."""
    found = []
    cache, deployed = facts.get("cache") or {}, (facts["status"].get("releases") or {}).get("current") is not None
    if deployed and cache.get("empty"):
        mount = f"; {cache['fstab']} of /etc/fstab is not mounted" if cache.get("fstab") else "; not mounted?"
        found.append(Finding("cache-not-mounted", (f"{cache['path']} is empty{mount}",)))
    for item in facts.get("damaged_models") or []:
        shown = item["names"][:3]
        more = len(item["names"]) - len(shown) + item.get("more", 0)
        names = ", ".join(shown) + (f" and {more} more" if more else "") if shown else f"{more} files"
        found.append(Finding("download-incomplete", (f"{item['repo']}: the hash of {names} is wrong",)))
    for item in facts.get("damaged_state") or []:
        found.append(Finding("state-damaged", (str(item),), False))
    return found


def _running_switch(facts: Mapping[str, Any]) -> list[Finding]:
    releases, journal = facts["status"].get("releases") or {}, facts["switch"] or {}
    if releases.get("switch_active"):
        line = f"{journal.get('controller')} with {journal.get('verb')}, phase {journal.get('phase')}"
        return [Finding("switch-running-other", (line,))]
    if journal and journal.get("phase") != "done":
        return [Finding("switch-interrupted", (f"cut in the phase {journal.get('phase')}",))]
    return []


def _gave_up(facts: Mapping[str, Any], engine: Mapping[str, Any]) -> list[Finding]:
    given_up = (engine["guard"] or {}).get("given_up")
    if not given_up:
        return []
    lines = [*(given_up.get("log") or []), str(given_up.get("reason"))]
    causes = [item for item in _match(lines) if not BY_ID[item.id].harmless]
    if "wedge" in str(given_up.get("reason")):
        causes.append(Finding("engine-wedged"))
    return [*causes, Finding("guard-gave-up", (str(given_up.get("reason")),))]


def _engine(facts: Mapping[str, Any], engine: Mapping[str, Any]) -> list[Finding]:
    """The container of an engine of the current release."""
    status, seen = facts["status"], engine["container"]
    releases = status.get("releases") or {}
    if releases.get("current") is None or status.get("docker") is False or releases.get("switch_active"):
        return []
    holder = [line for line in facts["commands"].get("ports", []) if f":{engine['port']} " in line]
    holder = [] if holder and "docker-proxy" in holder[0] else holder
    image = engine.get("image") or {}
    gone = [Finding("image-missing", (f"{image.get('ref')} is not there",))] if image.get("present") is False else []
    if seen is None or seen["state"] == "missing":
        other = engine.get("name_holder")
        taken = [Finding("name-taken", (f"{other['name']} is a container of {other['image']}",))] if other else []
        taken += [Finding("port-taken", tuple(holder[:1]))] if holder else []
        return [*taken, *gone, Finding("container-missing")]
    if engine.get("state") == ASLEEP:
        return gone
    if seen["state"] == "running" and engine["healthy"]:
        return [item for item in _match(seen["log"]) if BY_ID[item.id].harmless]
    found = gone if seen["state"] != "running" else []
    if seen["state"] != "running" and holder:
        found.append(Finding("port-taken", tuple(holder[:1])))
    if (engine["guard"] or {}).get("given_up"):
        return found
    code = seen["exit_code"] if seen["state"] == "exited" and seen["exit_code"] else None
    lines = [*seen["log"][-300:], *([seen["error"]] if seen["error"] else [])]
    known = _match(lines, exit_code=code, oom_killed=seen["oom_killed"])
    if seen["state"] == "exited" and code is None and not any(not BY_ID[item.id].harmless for item in known):
        stopped = [] if seen["error"] else [Finding("engine-stopped")]
        return [*found, *(stopped or [Finding("docker", (seen["error"],))]), *known]
    if code is not None and not any(not BY_ID[item.id].harmless for item in known):
        known = [Finding("docker" if seen["error"] else "engine-died", (seen["error"] or f"exit code {code}",)), *known]
    return [*found, *known]


def _answers(_facts: Mapping[str, Any], engine: Mapping[str, Any]) -> list[Finding]:
    asked, seen = engine["asked"], engine["container"] or {}
    if engine.get("ranks"):
        return [Finding("rank-failed", tuple(engine["ranks"]))]
    if asked and asked.get("verified") is False:
        bad = [f"{check['name']}: {check['detail']}" for check in asked["checks"] if not check["ok"]]
        return [Finding(str(asked["failure"]), tuple(bad[:3]))]
    if not engine["healthy"] and seen.get("state") in ("running", "paused"):
        why = "it is paused" if seen["state"] == "paused" else "it runs, and /health does not answer"
        return [Finding("endpoint-down", (why,))]
    return []


def _pace(_facts: Mapping[str, Any], engine: Mapping[str, Any]) -> list[Finding]:
    """Tokens a second of one stream against the limit of the plan."""
    asked, guard = engine["asked"] or {}, engine["guard"] or {}
    limit = (engine["memory"] or {}).get("decode_tok_s_limit") or 0
    measured = asked.get("tokens_per_second")
    if measured and limit and measured < limit / 4:
        return [
            Finding("low-throughput", (f"one stream: {measured:g} tokens a second, the plan's limit is {limit:g}",))
        ]
    if guard.get("stalls"):
        return [Finding("engine-stalls", ("the guard saw it in most of its observations of the last minute",))]
    if guard.get("slow"):
        rate = guard.get("tokens_per_second")
        return [
            Finding("low-throughput", (f"the guard measured {rate} tokens a second, the plan's limit is {limit:g}",))
        ]
    return []


def _guard(facts: Mapping[str, Any]) -> list[Finding]:
    """Whether the guard runs and observes."""
    unit, guard = facts.get("guard_unit") or {}, facts["guard"] or {}
    if not unit.get("installed") or not (unit.get("enabled") or unit.get("active")):
        return []  # not wanted
    if not unit.get("active"):
        why = facts.get("settings_error")
        return [Finding("guard-down", (str(why) if why else f"it is {unit.get('state') or 'not active'}",))]
    same = guard.get("boot_id") == facts.get("boot_id") and isinstance(guard.get("clock"), int | float)
    if not same:
        return []  # an older one wrote it, or none did yet
    age = float(facts.get("clock") or 0.0) - float(guard["clock"])
    return [Finding("guard-stuck", (f"its last sign of life is {age:.0f} s old",))] if age > STUCK else []


def _last_switch(facts: Mapping[str, Any]) -> list[Finding]:
    """Why the last switch failed, and what became of it."""
    journal = facts["switch"] or {}
    outcome, error = journal.get("outcome"), journal.get("error")
    if outcome in (None, "verified") or not error:
        return []
    way = f"release {journal.get('to')} ({', '.join(dict.fromkeys(journal.get('models') or ()))}), {outcome}"
    if outcome == "refused":  # nothing was stopped
        return _why(error, way)
    became = {"restored": "switch-restored", "removed": "switch-restored"}.get(outcome, "switch-not-restored")
    return [*_why(error, way), Finding(became, (way,), outcome == "failed")]


def _why(error: Mapping[str, Any], way: str) -> list[Finding]:
    named = str(error.get("failure") or "")
    if named in BY_ID and named != "start-timeout":
        return [Finding(named, (f"{way}: {error['message']}",), False)]
    lines = [*error.get("log", []), *([error["docker_error"]] if error.get("docker_error") else [])]
    code = error.get("exit_code") or (1 if error.get("state") in ("exited", "restarting") else None)
    known = _match(lines, False, exit_code=code, oom_killed=bool(error.get("oom_killed")))
    known = [item for item in known if not BY_ID[item.id].harmless]
    return known or [Finding(named if named in BY_ID else "engine-died", (f"{way}: {error['message']}",), False)]


def _restarts(_facts: Mapping[str, Any], engine: Mapping[str, Any]) -> list[Finding]:
    """What the guard healed."""
    guard, found = engine["guard"] or {}, []
    for item in guard.get("restarts") or []:
        if item.get("forgiven") or float(item["at"]) <= float(guard.get("forgiven") or 0):
            continue
        when = time.strftime("%H:%M:%S", time.localtime(min(float(item["at"]), LATEST)))
        line = f"{when}: {item['detail']}; back after {item.get('back_after_s', '?')} s"
        name = "engine-wedged" if item["reason"] in ("wedge", "hung-start") else "engine-crashed"
        found.append(Finding(name, (line,), False))
    return found


def wrong(found: Sequence[Finding]) -> list[Finding]:
    """Those that something is to be done about now."""
    return [item for item in found if item.now and not BY_ID[item.id].harmless]


def page(host: str, found: Sequence[Finding], checked: str) -> str:
    """Findings for people."""
    if not found:
        return f"{host}  nothing is wrong: {checked}"
    lines = []
    for item in found:
        known = BY_ID[item.id]
        when = "" if item.now else " (before)"
        mark = "harmless" if known.harmless else f"[{item.id}]"
        lines.append(f"{host}  {known.title}{when} {mark if known.harmless else ''}".rstrip() + f" [{item.id}]")
        lines += [f"    {failures.clean(line)[:200]}" for line in item.evidence]
        lines.append(f"    {known.cause}. {known.remedy}")
        if known.auto_recovery:
            lines.append(f"    recovers by itself: {known.auto_recovery}")
    return "\n".join(lines)


def bundle(path: Path, host: str, facts: Mapping[str, Any], found: Sequence[Finding]) -> Path:
    """Write all of it as an archive, mode 0600. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rest = {key: value for key, value in facts.items() if key not in ("commands", "failed")}
    logs: dict[str, list[str]] = {}
    rest["engines"] = []
    for engine in facts["engines"]:
        container = dict(engine.get("container") or {})
        service = re.sub(r"[^\w.-]", "_", str(engine["service"]))[:200]
        logs["engine.log" if len(facts["engines"]) == 1 else f"engine-{service}.log"] = container.pop("log", [])
        rest["engines"].append({**engine, "container": container})
    for number, outcome in (facts.get("failed") or {}).items():
        if isinstance(outcome, Mapping):
            logs[f"release-{number}.log"] = [json.dumps({**outcome, "log": None}), *outcome.get("log", [])]
    logs |= {f"{name}.txt": lines for name, lines in facts["commands"].items()}
    files = {
        "README": README,
        "findings.json": json.dumps([item.as_dict() for item in found], indent=2),
        "facts.json": json.dumps(rest, indent=2, ensure_ascii=False),
        **{f"logs/{name}": "\n".join(lines) + "\n" for name, lines in logs.items()},
    }
    path.touch(mode=0o600)
    path.chmod(0o600)
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            raw = text.encode("utf-8", "replace")
            entry = tarfile.TarInfo(f"{path.name.removesuffix('.tar.gz')}/{name}")
            entry.size, entry.mtime, entry.mode = len(raw), int(time.time()), 0o644
            archive.addfile(entry, io.BytesIO(raw))
    return path
