# SPDX-License-Identifier: Apache-2.0
"""Ages, on the clock since boot, which no time server moves; Unix time is for people, and for what happened before this
boot. A stamp from the future means nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol


class Moment(Protocol):
    """`now`: Unix time; `clock`: seconds since boot."""

    @property
    def now(self) -> float:
        """Unix time."""

    @property
    def clock(self) -> float:
        """Seconds since boot."""

    @property
    def boot_id(self) -> str:
        """Which boot that is."""


class Instant(NamedTuple):
    """A moment."""

    now: float
    clock: float
    boot_id: str


def stamp(moment: Moment) -> dict[str, Any]:
    """A moment as it is kept."""
    return {"at": moment.now, "clock": moment.clock, "boot_id": moment.boot_id}


def age(item: Mapping[str, Any], moment: Moment) -> float | None:
    """Seconds since a stamp; None for one from the future, which a wrong clock made."""
    if "clock" in item and item.get("boot_id") == moment.boot_id:
        seconds = moment.clock - float(item["clock"])
        return seconds if seconds >= 0 else None
    seconds = moment.now - float(item["at"])
    if seconds < 0:
        return None
    # Of another boot: no younger than this one.
    return max(seconds, moment.clock) if "boot_id" in item else seconds
