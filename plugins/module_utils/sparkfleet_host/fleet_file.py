# SPDX-License-Identifier: Apache-2.0
"""fleet.json: what the status page shows and Prometheus cannot know.

    {"format": 1, "written": Unix time of its last change, "sparks": {name: {...}}, "gateways": [name], "monitor": name,
     "rollout": null, or {"began", "changed": Unix time, "by": name, "waves": [[name]], "labels": [word of each wave],
                          "wave": the one of this moment, from 1, "done": [name], "failed": [name], "ended": bool}}

A run knows the Sparks that it reached, so what it says of them is merged into what is there. The file says the same as
before as long as nothing has happened, and is then not written.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import bounded
from .bounded import BoundsError
from .releases import write_json

FORMAT = 1
LIMIT = 8 * bounded.MIB  # 1 MiB is that of about 400 Sparks


def read(path: Path) -> dict[str, Any]:
    """What the file says; {} where there is none that can be read: it is made again by the next runs."""
    try:
        data = bounded.read_json(path, LIMIT, follow=False)
    except (OSError, BoundsError):
        return {}
    return data if data.get("format") == FORMAT else {}


def merged(old: Mapping[str, Any], news: Mapping[str, Any], now: float) -> dict[str, Any]:
    """What the file is to say. `news`: {inventory: [names], sparks: {name: entry}, gateways, monitor, rollout: {...}},
    where `rollout` may be missing. `now` is Unix time."""
    known = old.get("sparks")
    known = known if isinstance(known, dict) else {}
    told = news.get("sparks") or {}
    rollout = old.get("rollout")
    if news.get("rollout"):
        rollout = _rollout(rollout if isinstance(rollout, dict) else {}, news["rollout"], now)
    made: dict[str, Any] = {
        "format": FORMAT,
        "sparks": {name: told.get(name) or known.get(name) or {} for name in news["inventory"]},
        "gateways": list(news.get("gateways") or ()),
        "monitor": news.get("monitor") or "",
        "rollout": rollout,
    }
    same = made == {key: value for key, value in old.items() if key != "written"}
    return {**made, "written": old.get("written", now) if same else now}


def _rollout(old: Mapping[str, Any], news: Mapping[str, Any], now: float) -> dict[str, Any]:
    """A rollout goes on while its waves are the same and it has not ended; otherwise it is another one."""
    if {key: value for key, value in old.items() if key not in ("began", "changed")} == dict(news):
        return dict(old)
    goes_on = old.get("waves") == news["waves"] and not old.get("ended")
    return {**news, "began": old.get("began", now) if goes_on else now, "changed": now}


def write(
    path: Path, news: Mapping[str, Any], now: float, check: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Bring the file up to date, readable by all; what it said and what it says now. Raises OSError."""
    old = read(path)
    new = merged(old, news, now)
    if new != old and not check:
        write_json(path, new)
    return old, new
