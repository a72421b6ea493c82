"""What a run ends with: a row a host, whole messages of failures, and what became of a rollout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparkfleet.exit_codes import CODES, OK
from sparkfleet.reporting import report
from sparkfleet.reporting.host_result import HostResult
from sparkfleet.reporting.progress import WARN, Board


def page(hosts: Sequence[HostResult], board: Board) -> str:
    """The table at the end, and the whole message of each host that failed."""
    head = ("host", "result", "release", "seconds", "without service")
    rows = [(*head[:1], "wave", *head[1:]) if board.waves else head]
    for host in hosts:
        release = f"{host.release['number']} ({host.release['model']})" if host.release else "-"
        gone = f"{host.out_of_service_s:.0f} s" if host.out_of_service_s is not None else "-"
        result = host.result + (f" [{host.failure}]" if host.failure and host.failure != host.result else "")
        result = board.skipped.get(host.name, result) if host.result in ("ok", "changed") else result
        wave = ((board.rows[host.name].wave if host.name in board.rows else "") or "-",) if board.waves else ()
        rows.append((host.name, *wave, result, release, f"{host.seconds:.0f}", gone))
    text = report.table(rows) if len(rows) > 1 else ""
    for host in hosts:
        if host.message:
            text += f"\n{host.name}: {host.message.removeprefix(f'{host.name}: ')}\n"
    return report.clean(text)


def of_rollout(hosts: Sequence[HostResult], board: Board) -> dict[str, Any]:
    """What became of a rollout, as plain data. `waves` with their Sparks, `reached` of them; Sparks that were rolled
    out, skipped (with why), rolled back or failed (with the failure), and those that it did not get to."""
    bad = {host.name: host.failure or host.result for host in hosts if CODES[host.result] != OK}
    reached = [name for wave in board.waves[: board.wave] for name in wave]
    known = {host.name: host for host in hosts}
    return {
        "waves": board.waves,
        "reached": board.wave,
        "rolled_out": [name for name in reached if name in known and name not in bad],
        "skipped": dict(board.skipped),
        "rolled_back": {name: why for name, why in bad.items() if known[name].result in WARN and name in reached},
        "failed": {name: why for name, why in bad.items() if known[name].result not in WARN or name not in reached},
        "untouched": board.unreached(),
        "seconds": round(board.seconds(), 1),
    }


def words(found: dict[str, Any], log: str) -> str:
    """`of_rollout` in words, and where the events are."""
    waves, done = len(found["waves"]), len(found["rolled_out"])
    total = sum(map(len, found["waves"]))
    lines = []
    if waves:
        of = f"{found['reached']} of {report.count(waves, 'wave')}" if found["reached"] < waves else ""
        lines.append(f"rolled out    {done} of {report.count(total, 'Spark')}, {of or report.count(waves, 'wave')}")
    elif found["failed"] or found["rolled_back"]:
        lines.append("rolled out    nothing: it ended before the first wave")
    else:
        lines.append("rolled out    nothing: there was nothing to do")
    for title, key in (("rolled back", "rolled_back"), ("failed", "failed")):
        if found[key]:
            lines.append(f"{title:<14}{', '.join(f'{name} ({why})' for name, why in found[key].items())}")
    if found["untouched"]:
        lines.append(f"{'untouched':<14}{report.names(found['untouched'])}")
    for why in dict.fromkeys(found["skipped"].values()):
        names = [name for name, reason in found["skipped"].items() if reason == why]
        lines.append(f"{'skipped':<14}{report.names(names)}: {why}")
    lines.append(f"{'took':<14}{found['seconds']:.0f} s")
    if log:
        lines.append(f"{'events':<14}{log}")
    return report.clean("\n".join(lines) + "\n")
