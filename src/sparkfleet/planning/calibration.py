"""Plan against measured: which figures of a host are those of an engine that is planned, and what follows from them.

A record (`sparkfleet_host.measured`) counts for an engine only where image, model, revision and all settings that its
memory depends on are the same. What the log shows to be left for the KV cache, against what was planned, corrects the
next plan of that host; a difference that is larger than the plan can be wrong is shown and not applied. Pure functions,
but for the files of the controller.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparkfleet_host import measured
from sparkfleet_host.bounded import COMMIT, BoundsError
from sparkfleet_host.release_format import DUMMY

from sparkfleet.planning.catalog import Arguments, Card

FOLDER = "measured"
Record = Mapping[str, Any]
#: Arguments that what the engine takes besides the KV cache does not depend on.
IRRELEVANT = frozenset(
    (
        *("gpu_memory_utilization", "kv_cache_memory_bytes", "enable_auto_tool_choice", "tool_call_parser"),
        *("reasoning_parser", "default_chat_template_kwargs", "trust_remote_code"),
    )
)
#: GiB that the plan may be wrong by: its largest error in logs is 10% of 80 GiB. More is another matter.
MOST_GIB = 8.0
#: GiB that a correction is worth a word from.
LEAST_GIB = 0.05


def settings(card: Card, arguments: Arguments, environment: Mapping[str, Any]) -> str:
    """A hash of what the memory of an engine depends on, besides image, model and host."""
    kept = {name: value for name, value in arguments.items() if name not in IRRELEVANT}
    given = {name: str(value) for name, value in {**card.environment, **environment}.items()}
    text = json.dumps({"arguments": kept, "environment": given}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Known:
    """What was measured of an engine on a host: the newest figures of a start, and the newest speed of a trial."""

    host: str
    start: Record | None = None
    trial: Record | None = None

    @property
    def correction(self) -> float:
        """GiB that the engine takes besides the KV cache more than planned; 0.0 where that is not known, or is more
        than the plan can be wrong by."""
        found = difference(self.start) if self.start else None
        return found if found is not None and abs(found) <= MOST_GIB else 0.0

    @property
    def tok_s(self) -> float | None:
        """Tokens a second that one stream gets."""
        speeds = (self.trial or {}).get("speed", ()) if not (self.trial or {}).get("reads") else ()
        rows = [row for row in speeds if row["streams"] == 1]
        return next((row["tokens_per_second"] for row in rows), None)

    def notes(self, applied: bool) -> list[str]:
        """For the plan: what was measured, and what became of it. `applied`: whether the plan counts the correction."""
        found = []
        if self.start:
            which = " with dummy weights" if self.start["weights"] == DUMMY else ""
            words = ", ".join(measured.words(self.start))
            found += [f"measured on {self.host}{which}: {words}"] if words else []
        if self.trial and (words := "; ".join(measured.speed_words(self.trial))):
            found.append(f"measured on {self.host}: {words} ({self.trial['bench'].partition(',')[0]})")
        wrong = difference(self.start) if self.start else None
        if wrong is not None and abs(wrong) > MOST_GIB:
            found.append(f"that is {abs(wrong):.1f} GiB from the plan, more than it can be wrong by: not counted")
        elif applied and abs(self.correction) >= LEAST_GIB:
            more = "more" if self.correction > 0 else "less"
            found.append(f"the plan counts {abs(self.correction):.1f} GiB {more} besides the KV cache, as measured")
        return found


def difference(record: Record) -> float | None:
    """GiB of KV cache that were planned without a correction and not there; None where either is not known."""
    planned, found = record["planned"], record["figures"]
    if not planned.get("kv_cache_gib") or "kv_cache_gib" not in found:
        return None
    return float(planned["kv_cache_gib"] + planned.get("correction_gib", 0.0) - found["kv_cache_gib"])


def understood(value: Any) -> list[dict[str, Any]]:
    """The records of a Spark, which may send anything: those that are of their form."""
    found = []
    for item in value[: 2 * measured.MOST] if isinstance(value, list) else ():
        try:
            found.append(measured.check_record(item))
        except BoundsError:
            continue
    return found


def known(records: Iterable[Record], host: str, wanted: Mapping[str, str]) -> Known | None:
    """What records say of an engine. `wanted`: {repo, settings, image, revision}; an image without a digest and a
    revision that is no commit count as the same as any of their name."""
    same = sorted((record for record in records if _same(record, wanted)), key=lambda record: float(record["at"]))
    if not same:
        return None
    with_kv = [record for record in same if "kv_cache_gib" in record["figures"]]
    trials = [record for record in same if record["speed"] and record["bench"]]
    return Known(host, (with_kv or same)[-1], trials[-1] if trials else None)


def _same(record: Record, wanted: Mapping[str, str]) -> bool:
    image, revision = wanted["image"], wanted["revision"]
    named = "@" in image
    found = str(record["image"])
    return bool(
        record["settings"]
        and record["settings"] == wanted["settings"]
        and record["repo"] == wanted["repo"]
        and (found.partition("@")[2] if named else found.partition("@")[0]) == image.partition("@")[2 if named else 0]
        and (not COMMIT.fullmatch(revision) or record["revision"] == revision)
    )


# -- on the controller -----------------------------------------------------------------------------------------------


def remember(state: Path, host: str, records: Sequence[Record]) -> None:
    """Keep what was measured on a host. Raises OSError, BoundsError."""
    if records:
        measured.keep(_file(state, host), [dict(record) for record in records])


def remembered(state: Path, wanted: Mapping[str, str]) -> Known | None:
    """What is kept of an engine, of the host where it was measured last."""
    found: list[Known] = []
    for path in sorted((state / FOLDER).glob("*.json"))[:1000]:
        if one := known(measured.read(path), path.stem, wanted):
            found.append(one)
    return max(found, key=lambda one: float((one.trial or one.start or {}).get("at", 0.0)), default=None)


def _file(state: Path, host: str) -> Path:
    return state / FOLDER / (re.sub(r"[^A-Za-z0-9_.-]", "_", host)[:100].lstrip(".") + ".json")
