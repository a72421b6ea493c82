"""What became of a host in a run."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass
class HostResult:
    """`result` is a key of exit_codes.CODES; times are seconds."""

    name: str
    result: str = "ok"
    message: str = ""
    failure: str = ""
    findings: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    release: dict[str, Any] | None = None
    out_of_service_s: float | None = None
    summary: dict[str, Any] | None = None
    log: list[str] = dataclasses.field(default_factory=list)
    history: list[dict[str, Any]] | None = None
    shown: dict[str, Any] | None = None
    removed: list[str] | None = None
    measured: dict[str, Any] = dataclasses.field(default_factory=dict)
    fetched: dict[str, int] = dataclasses.field(default_factory=dict)  # of a trial: bytes, and those of the whole model
    benchmarks: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    drift: list[str] = dataclasses.field(default_factory=list)
    audit: list[dict[str, str]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON: what is empty is left out."""
        data = dataclasses.asdict(self)
        empty: tuple[Any, ...] = ("", [], {}, None)
        return {key: value for key, value in data.items() if key in ("name", "result") or value not in empty}
