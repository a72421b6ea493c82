"""What happened on a Spark and who did it: from the host's own records, and from the event logs of this controller.

A host keeps its releases (the newest ones, `sparkfleet_keep_releases`), the journal of its last switch, and the guard's
last restarts; an event log is of one run of a verb, on every host it touched.
"""

from __future__ import annotations

import fnmatch
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from sparkfleet_host import bounded
from sparkfleet_host.bounded import LATEST, printable
from sparkfleet_host.release_format import MOST_ENGINES

from sparkfleet.exit_codes import CODES, OK
from sparkfleet.reporting import progress, report

MOST = 500  # events of a host
RUNS = 500  # event logs, the newest
LOG_BYTES = 64 << 20
LINE_BYTES = 1 << 20
LAST_BYTES = 16 << 20  # of its last line, into which earlier versions wrote all that they knew of each host


def events(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The events of a host, the oldest first: [{at, event, release, model, by, detail}], `at` Unix time; a key whose
    value is not known is left out. `found` is what the module spark_status returned; a Spark may answer anything, and
    what has another form counts as not known."""
    releases = _mapping(found.get("releases"))
    made = [*_releases(releases), *_switch(_mapping(releases.get("switch")))]
    for row in _listed(found.get("engines"))[:MOST_ENGINES]:
        made += _guard(_mapping(row))
    known = [event for event in made if event.get("at")]
    return sorted(known, key=lambda event: float(event["at"]))[-MOST:]


def _releases(releases: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    locks, outcomes = _mapping(releases.get("locks")), _mapping(releases.get("outcomes"))
    for number in _listed(releases.get("numbers"))[-MOST:]:
        if not isinstance(number, int):
            continue
        lock, outcome = _mapping(locks.get(str(number))), _mapping(outcomes.get(str(number)))
        what = {"release": number, "model": _models(lock)}
        yield _event(lock.get("created"), "staged", **what, by=lock.get("controller"))
        yield _event(outcome.get("verified_at"), "verified", **what)
        if outcome.get("state") == "failed":
            yield _event(outcome.get("at"), "failed", **what, detail=outcome.get("message") or outcome.get("failure"))


def _models(lock: Mapping[str, Any]) -> str:
    engines = [_mapping(engine) for engine in _listed(lock.get("engines"))] or [lock]
    return " + ".join(filter(None, (_text(engine.get("model"), 80) for engine in engines[:MOST_ENGINES])))


def _switch(journal: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if not journal:
        return
    outcome, gone = _text(journal.get("outcome"), 40), _number(journal.get("out_of_service_s"))
    error = _mapping(journal.get("error"))
    parts = [
        f"from release {number}" if isinstance(number := journal.get("from"), int) else "",
        outcome or _text(journal.get("phase"), 40),
        f"{gone:.0f} s without service" if gone is not None else "",
        _text(error.get("message"), 300),
    ]
    yield _event(
        journal.get("ended") or journal.get("began"),
        _text(journal.get("verb"), 40).removesuffix(".yml") or "switch",
        release=journal.get("to"),
        model=" + ".join(_text(name, 80) for name in _listed(journal.get("models"))[:MOST_ENGINES])
        or journal.get("model"),
        by=journal.get("controller"),
        detail=", ".join(filter(None, parts)),
    )


def _guard(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    guard, model = _mapping(row.get("guard")), row.get("model")
    for item in map(_mapping, _listed(guard.get("restarts"))):
        back = _number(item.get("back_after_s"))
        detail = ": ".join(filter(None, (_text(item.get("reason"), 40), _text(item.get("detail"), 300))))
        after = f", back after {back:.0f} s" if back is not None else ""
        yield _event(item.get("at"), "restarted", model=model, by="guard", detail=detail + after)
    given = _mapping(guard.get("given_up"))
    yield _event(given.get("at"), "given up", model=model, by="guard", detail=given.get("reason"))


def _event(at: Any, event: str, **about: Any) -> dict[str, Any]:
    number = about.pop("release", None)
    texts = {key: _text(value) for key, value in about.items()}
    return {
        "at": _number(at),
        "event": event,
        **({"release": number} if isinstance(number, int) and not isinstance(number, bool) else {}),
        **{key: text for key, text in texts.items() if text},
    }


def runs(folder: Path, inventory: str, hosts: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The runs of verbs that changed something, as this controller's event logs have them, the oldest first: [{at,
    event, by, detail, hosts: {name: result}, file}]; of this inventory, and of `hosts` alone if there are any given.
    What cannot be read is left out."""
    try:
        files = sorted((path for path in folder.iterdir() if path.suffix == ".jsonl"), key=lambda path: path.name)
    except OSError:
        return []
    found = []
    for path in files[-RUNS:]:
        first, last = _ends(path)
        # Another inventory may have hosts of the same names.
        if first.get("event") != "begin" or not _same(_text(first.get("inventory"), 4096), inventory):
            continue
        ended = last.get("event") == "end"
        if whole := ended and isinstance(last.get("hosts"), list):
            results = {
                _text(item.get("name"), 260): _text(item.get("result"), 40) for item in map(_mapping, last["hosts"])
            }
        else:  # it was killed, or still runs
            results = _seen(path)
        if hosts is not None and not {*hosts} & {*results} and (whole or not _meant(first, results, hosts)):
            continue
        code, seconds = _number(last.get("exit_code")), _number(last.get("seconds"))
        parts = [f"exit code {code:.0f}" if code is not None else "", f"{seconds:.0f} s" if seconds is not None else ""]
        run = _event(
            first.get("at"),
            _text(first.get("verb"), 40),
            by=first.get("controller"),
            detail=", ".join(filter(None, parts)) if ended else "did not end, or still runs",
        )
        found.append({**run, "hosts": results, "file": path.name})
    return sorted((run for run in found if run["at"]), key=lambda run: float(run["at"]))


def _seen(path: Path) -> dict[str, str]:
    """The hosts that a log without results names, each with its result as far as it had one, "" for none."""
    results: dict[str, str] = {}
    phases: dict[str, str] = {}
    try:
        with path.open("rb") as file:
            for raw in iter(lambda: file.readline(LINE_BYTES), b""):
                line = _line(raw) if b'"host"' in raw else {}
                if host := _text(line.get("host"), 260):
                    results[host] = _text(line.get("result"), 40) or results.get(host, "ok")
                    phases[host] = _text(line.get("phase"), 40) or phases.get(host, "")
    except OSError:
        return {}
    ended = {host for host, result in results.items() if phases[host] == progress.DONE or CODES.get(result, OK) != OK}
    return {host: result if host in ended else "" for host, result in results.items()}


def _meant(first: Mapping[str, Any], seen: Mapping[str, str], hosts: Sequence[str]) -> bool:
    """Whether a run may have been of one of `hosts`, by its limit; without one by what it has seen, if anything."""
    if first.get("limit") is None:
        return not seen
    parts = [part for part in re.split("[,:]", _text(first["limit"], 4096)) if part[:1] not in ("!", "&", "~")]
    return any(part in ("all", "sparks") or fnmatch.fnmatchcase(host, part) for part in parts for host in hosts)


def _same(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _ends(path: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The first and the last line of an event log."""
    try:
        with path.open("rb") as file:
            first = file.readline(LINE_BYTES)
            file.seek(0, 2)
            size = file.tell()
            if size > LOG_BYTES:
                return {}, {}
            last = _last(file, size)
    except OSError:
        return {}, {}
    return _line(first), _line(last, LAST_BYTES)


def _last(file: BinaryIO, size: int) -> bytes:
    """The last line; b"" for a longer one than LAST_BYTES."""
    taken = 64 << 10
    while True:
        file.seek(max(size - taken, 0))
        _, newline, line = file.read(taken).rstrip(b"\n").rpartition(b"\n")
        if newline or taken >= size:
            return line
        if taken >= LAST_BYTES:
            return b""
        taken *= 4


def _line(raw: bytes, limit: int = LINE_BYTES) -> Mapping[str, Any]:
    try:
        return _mapping(bounded.parse_json(raw, "event log", limit))
    except ValueError:
        return {}


def page(hosts: Mapping[str, Sequence[Mapping[str, Any]]], made: Sequence[Mapping[str, Any]]) -> str:
    """Both as tables, in the time of this controller."""
    parts = []
    if made:
        rows = [("when", "run", "who", "outcome", "hosts")]
        for run in made:
            results = ", ".join(f"{host} {result}".strip() for host, result in run["hosts"].items())
            rows.append((_when(run), run["event"], run.get("by", "-"), run["detail"], printable(results, 120)))
        parts.append("Runs from this controller\n" + report.table(rows))
    for host, found in hosts.items():
        lines = [("when", "what", "release", "model", "who", "detail")]
        for event in found:
            number = str(event.get("release", "-"))
            about = (str(event.get(key, "-")) for key in ("model", "by"))
            lines.append((_when(event), event["event"], number, *about, printable(str(event.get("detail", "")), 160)))
        parts.append(f"{host}\n" + (report.table(lines) if found else "no record of a release\n"))
    return "\n".join(part if part.endswith("\n") else f"{part}\n" for part in parts)


def _when(event: Mapping[str, Any]) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(event["at"])))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else []


def _text(value: Any, longest: int = 600) -> str:
    return printable(value, longest) if isinstance(value, str) else ""


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) and 0 <= value <= LATEST else None
