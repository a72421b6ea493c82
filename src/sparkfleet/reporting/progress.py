"""How far each host of a run is: its wave, phase and latest message, from ansible-runner's events. Contacts no host."""

from __future__ import annotations

import dataclasses
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparkfleet.diagnosis import startup_log
from sparkfleet.reporting import report, switch_progress

WAITING, DONE, RESTORE = "waiting", "done", "restore"
#: Phase -> what a host does in it, for totals.
DOING = {
    "inspect": "inspecting",
    "plan": "planning",
    "prepare": "preparing",
    "fetch": "fetching",
    "drain": "draining",
    "stop": "stopping",
    "start": "starting",
    "wait": "loading",
    "verify": "verifying",
    "measure": "measuring",
    "soak": "soaking",
    "return": "returning",
    RESTORE: "restoring",
    "gateway": "in the gateway",
    "remove": "removing",
}
#: Before the names of the collection's own actions and roles.
NAMESPACE = "sparkfleet.dgx."
_ACTIONS = {
    **{"spark_plan": "plan", "spark_status": "plan", "spark_diagnose": "inspect", "spark_drift": "plan"},
    **{"stop_services": "stop", "release_switch": "start", "vllm_wait": "wait", "vllm_verify": "verify"},
    **{"ansible.builtin.pause": "soak", "gateway_plan": "gateway", "spark_remove": "remove"},
}
_ROLES = {
    **dict.fromkeys(("docker", "nvidia_container_toolkit", "hf_cache", "memory", "host_program", "guard"), "prepare"),
    **{"sparkfleet": "plan", "fetch": "fetch", "endpoint": "verify", "gateway": "gateway"},
}
#: Files of tasks that are about a Spark's place in the gateways.
_FILES = {"drain": "drain", "undrain": "return"}
#: Tasks that say nothing of the work.
_SILENT = ("validate_argument_spec", "include_tasks", "import_tasks", "assert", "meta", "set_fact")
_SWITCH = {
    **{"stopping": "stop", "starting": "start", "verifying": "verify", "measuring": "measure", "committing": "verify"},
    **{"restoring": RESTORE, "returning": "start"},
}
_WORDS = [
    (
        re.compile(
            re.escape(switch_progress.WORDS[key]).replace(r"\{to\}", r"release \d+.*").replace(r"\{before\}", ".*")
        ),
        phase,
    )
    for key, phase in _SWITCH.items()
]
_LOG = (
    *(startup_log.STARTING, startup_log.DOWNLOADING, startup_log.LOADING, startup_log.COMPILING),
    *(startup_log.PROFILING, startup_log.CAPTURING, startup_log.SERVING),
)
_TIMED = re.compile(r"^\d+ s  (?P<text>.*)")
#: What fetch_wait says, as "image 43% (1.2 of 2.8 GB, 161 MB/s)  model done (6 s)".
_FETCH = re.compile(r"^(?:image|model) (?:\d|\(|\w+(?=$|  | [\d(]))")
#: Results that end the work on a host: nothing that serves as wanted, and nothing that is broken.
BAD = ("failed", "down", "unreachable")
WARN = ("restored", "refused", "drift")
DRAINED = "drained"
SKIPPED = 0.4  # seconds in which a task that is skipped is over


@dataclasses.dataclass
class Row:
    """A host: `wave` as "canary" or "2/4" ("" for none), `since` when its phase began (s), `result` when it is over."""

    host: str
    since: float
    wave: str = ""
    model: str = ""
    phase: str = WAITING
    message: str = ""
    result: str = ""
    verified: bool = False
    coming: tuple[float, str, str] | None = None  # when a task began that may be skipped; its phase, and its name
    gateway: bool = False  # a host that is nothing but a gateway

    def state(self) -> str:
        """The phase, or what came of it."""
        return self.result or self.phase

    def rank(self) -> int:
        """What is shown first where not all can be: failures, then work, then the rest."""
        if self.result in (*BAD, *WARN):
            return 0
        return {WAITING: 2, DONE: 3, DRAINED: 3}.get(self.state(), 1)


class Board:
    """All hosts of a run. `log` gets each change of phase; `clock` gives seconds."""

    def __init__(
        self, log: Callable[[dict[str, Any]], None] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.log, self.clock = log or (lambda item: None), clock
        self.began = clock()
        self.rows: dict[str, Row] = {}
        self.waves: list[list[str]] = []
        self.wave = 0  # the current one, from 1; 0 before the first
        self.skipped: dict[str, str] = {}  # host -> why a rollout leaves it out

    def row(self, host: str) -> Row:
        """The row of a host."""
        return self.rows.setdefault(host, Row(host, self.clock()))

    def ordered(self) -> list[Row]:
        """All rows as they are to be shown, by name and with 10 after 9."""
        rows = [self._shown(row) for row in list(self.rows.values())]
        return sorted(rows, key=lambda row: report.natural(row.host))

    def _shown(self, row: Row) -> Row:
        if row.coming is None or self.clock() - row.coming[0] < SKIPPED:
            return row
        since = row.since if row.coming[1] == row.phase else row.coming[0]
        message = row.message if row.verified else row.coming[2]
        return dataclasses.replace(row, phase=row.coming[1], message=message, since=since)

    # -- what happens ----------------------------------------------------------------------------------------

    def play(self) -> None:
        """A play begins: what still works waits for its turn in it."""
        for row in self.rows.values():
            row.coming = None
            if row.verified and not row.result:
                self._enter(row, DONE)
            elif not row.result and row.phase != DONE:
                row.phase, row.message, row.since = WAITING, "", self.clock()

    def schedule(self, found: Mapping[str, Any]) -> None:
        """What rollout_schedule returned."""
        self.waves = [list(wave) for wave in found["waves"]]
        self.log({"event": "waves", **{key: found[key] for key in ("waves", "labels", "drained")}})
        for names, label in zip(self.waves, found["labels"], strict=True):
            for name in names:
                self.row(name).wave = label
        self.skipped = dict.fromkeys(found["drained"], DRAINED)
        self.skipped.update({host["name"]: "has it already" for host in found["hosts"] if not host["needed"]})
        for name, why in self.skipped.items():
            row = self.row(name)
            row.message, row.since = why, self.clock()
            if why == DRAINED:
                row.result = DRAINED
            else:
                row.phase = DONE

    def task(self, host: str, data: Mapping[str, Any]) -> None:
        """A task begins on a host; `data` are ansible-runner's."""
        new = host not in self.rows
        action = str(data.get("task_action") or "").removeprefix(NAMESPACE)
        found = phase_of(data)
        row = self.row(host)
        if new:
            row.gateway = found == "gateway"
        row.gateway &= found == "gateway"
        if row.wave and action != "rollout_wave":  # it may say that the wave does not begin
            self._reach(host)
        if found and row.result not in (*BAD, *WARN):
            name = row.message if action.rpartition(".")[2].startswith(_SILENT) else str(data.get("task") or "")
            row.coming = (self.clock(), found, name)

    def skip(self, host: str) -> None:
        """The task is none of this host's."""
        self.row(host).coming = None

    def _settle(self, row: Row) -> None:
        """The task that began is not skipped."""
        if row.coming:
            at, phase, name = row.coming
            row.coming, row.message = None, row.message if row.verified else name
            self._enter(row, phase, at)

    def proved(self, host: str, note: str) -> None:
        """A host has answered its questions; `note` is what stands in its row from then on."""
        row = self.row(host)
        row.verified, row.message = True, note

    def line(self, host: str, text: str) -> None:
        """What a host says, without its name."""
        row = self.row(host)
        self._settle(row)
        timed = _TIMED.match(text)
        row.message = timed["text"] if timed else text.strip()
        if timed and row.phase != RESTORE:
            self._enter(row, phase_in_text(timed["text"]) or row.phase)

    def result(self, host: str, result: str, message: str) -> None:
        """What came of a task, and of the host so far: ok and changed are not the end."""
        row = self.row(host)
        self._settle(row)
        if result in (*BAD, *WARN) and result != row.result:
            row.result, row.since = result, self.clock()
            row.message = message.removeprefix(f"{host}: ").partition("\n")[0]

    def model(self, host: str, model: Any) -> None:
        """The model that a host is to serve."""
        if isinstance(model, str):
            self.row(host).model = model

    def end(self) -> None:
        """The run is over."""
        rows = list(self.rows.values())
        # What waited when others failed was not reached.
        cut = any(row.result in (*BAD, *WARN) for row in rows)
        for row in rows:
            if not row.result and row.host not in self.unreached() and not (cut and row.phase == WAITING):
                self._enter(row, DONE)

    def unreached(self) -> list[str]:
        """Hosts of waves that never began."""
        return [name for wave in self.waves[self.wave :] for name in wave]

    def _reach(self, host: str) -> None:
        number = next((at for at, wave in enumerate(self.waves, 1) if host in wave), 0)
        self.wave = max(self.wave, number)

    def _enter(self, row: Row, phase: str, at: float | None = None) -> None:
        if phase != row.phase:
            row.phase, row.since = phase, self.clock() if at is None else at
            self.log({"event": "phase", "host": row.host, "phase": phase, **({"wave": row.wave} if row.wave else {})})

    def passing(self, host: str, text: str) -> bool:
        """Whether a line of a host is only of the moment, so that its row is place enough."""
        again = bool(self.waves) and host in self.rows and self.rows[host].phase == "plan"  # reported before the waves
        return bool(host) and (again or is_step(text))

    # -- in words --------------------------------------------------------------------------------------------

    def seconds(self) -> float:
        """Since the run began."""
        return self.clock() - self.began

    def totals(self) -> str:
        """As "wave 2 of 4; 8 Sparks: 3 done, 1 verifying, 4 waiting; 1:05"."""
        rows = [row for row in self.ordered() if not row.gateway]
        wave = f"wave {self.wave} of {len(self.waves)}; " if self.wave else ""
        return f"{wave}{report.count(len(rows), 'Spark')}: {counted(rows) or 'none yet'}; {minutes(self.seconds())}"


def phase_of(data: Mapping[str, Any]) -> str:
    """The phase that a task belongs to; "" for one that belongs to none."""
    action = str(data.get("task_action") or "")
    file = Path(str(data.get("task_path") or "").rpartition(":")[0]).stem
    return (
        _FILES.get(file)
        or _ACTIONS.get(action.removeprefix(NAMESPACE))
        or _ROLES.get(str(data.get("role") or "").removeprefix(NAMESPACE), "")
    )


def phase_in_text(text: str) -> str:
    """The phase that a line of a switch is about; "" for an unknown one."""
    for pattern, phase in _WORDS:
        if pattern.fullmatch(text):
            return phase
    return "wait" if text.startswith(_LOG) else ""


def is_step(text: str) -> bool:
    """Whether a line only says how far something is, so that the next one may take its place."""
    return bool(_TIMED.match(text) or _FETCH.match(text))


def counted(rows: Sequence[Row]) -> str:
    """How many rows are in which state: "3 done, 1 verifying"; failures first."""
    found = Counter(row.state() for row in sorted(rows, key=Row.rank))
    return ", ".join(f"{count} {DOING.get(state, state)}" for state, count in found.items())


def minutes(seconds: float) -> str:
    """As "0:07", "12:05", "1:02:03"."""
    whole = int(seconds)
    hours = f"{whole // 3600}:{whole // 60 % 60:02d}" if whole >= 3600 else f"{whole // 60}"
    return f"{hours}:{whole % 60:02d}"
