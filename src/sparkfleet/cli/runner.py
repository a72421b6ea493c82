"""Runs the playbook of a verb through ansible-runner, and makes results of its events."""

from __future__ import annotations

import contextlib
import functools
import getpass
import json
import os
import re
import select
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ansible_runner

from sparkfleet import SparkfleetError
from sparkfleet.diagnosis.ansible_errors import explained
from sparkfleet.exit_codes import (
    BAD_INPUT,
    CODES,
    OK,
)
from sparkfleet.paths import COLLECTIONS, ROOT
from sparkfleet.reporting.host_result import HostResult
from sparkfleet.reporting.progress import DONE, Board, phase_of

#: ansible-core's default search path; an inventory plugin may be there.
FURTHER_COLLECTIONS = ("~/.ansible/collections", "/usr/share/ansible/collections")
#: Playbooks that have another name than their verb.
NAMES = {"deploy": "site", "preflight": "site", "bench": "benchmark"}
#: Name of the only run in a folder of ansible-runner.
IDENT = "run"
#: Failures that end a run before anything has changed: on one host, and on all hosts of the play.
OF_ALL = frozenset(("all-at-once", "same-host"))
#: Actions that run on the monitor, and say nothing of the host for which they run.
ASIDE = frozenset(("sparkfleet.dgx.fleet_file", "sparkfleet.dgx.prometheus_figures"))
#: Result of a host whose run was cut.
CUT = "interrupted"
REFUSALS = OF_ALL | {"switch-running-other", "bad-input", "engine-busy"}
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_FAILURE = re.compile(r"\[([a-z][a-z0-9-]+)\]")
#: A host's latest message is a separate line: "HOST  12 s  loading weights".
_LINE = re.compile(r"^(?P<host>\S+)  (?P<text>.*)")


class Collector:
    """Makes results of events. `show` gets (host or "", line) of what is worth showing as it happens; `board` is told
    how far each host is; `log` gets all of it as plain data.

    A Spark may be called localhost (inventory/local). Only in a play of `hosts: localhost` is that the controller.
    """

    def __init__(
        self,
        show: Callable[[str, str], None],
        log: Callable[[dict[str, Any]], None] | None = None,
        board: Board | None = None,
    ) -> None:
        self.show, self.log, self.board = show, log or (lambda item: None), board or Board(log)
        self.hosts: dict[str, HostResult] = {}
        self.figures: dict[str, Any] = {}  # of Prometheus
        self.error = ""  # of the run itself, such as an inventory that cannot be read
        self._began = time.monotonic()
        self._output: list[str] = []

    def take(self, event: Mapping[str, Any]) -> None:
        """Note one event of ansible-runner."""
        kind = str(event.get("event"))
        data = event.get("event_data") or {}
        host = str(data.get("host") or "")
        of_controller = host == "localhost" and data.get("play_pattern", "localhost") == "localhost"
        if kind == "verbose":
            self._lines(_ANSI.sub("", str(event.get("stdout") or "")))
        elif kind == "runner_on_start" and not of_controller:
            self.board.task(host, data)
        elif kind == "runner_on_skipped" and not of_controller:
            self.board.skip(host)
        elif kind == "runner_on_ok" and data.get("task_action") == "sparkfleet.dgx.rollout_schedule":
            self.board.schedule(data.get("res") or {})
        elif data.get("task_action") in ASIDE:
            self.figures = (data.get("res") or {}).get("figures") or self.figures
        elif kind in ("runner_on_ok", "runner_on_failed", "runner_on_unreachable") and not of_controller:
            self._result(kind, self._host(host), data)
        elif kind == "runner_on_failed":
            self.error = message(data.get("res") or {})
        elif kind == "playbook_on_play_start":
            self.log({"event": "play", "play": str(data.get("play"))})
            self.board.play()
        elif kind == "playbook_on_stats":
            self._end([host for host in data.get("processed") or {} if host != "localhost" or host in self.hosts])

    def _end(self, processed: Sequence[str]) -> None:
        for name in processed:
            self._host(name)
        refused = {host.failure for host in self.hosts.values()} & OF_ALL
        for host in self.hosts.values() if refused else ():
            if host.result in ("ok", "changed"):
                host.result, host.failure = "refused", next(iter(refused))
        for name in self.board.unreached():
            host = self._host(name)
            if host.result in ("ok", "changed"):
                host.result, host.message = "untouched", ""
        self.board.end()

    def _host(self, name: str) -> HostResult:
        return self.hosts.setdefault(name, HostResult(name))

    def _lines(self, text: str) -> None:
        lines = [line for line in text.splitlines() if line.strip()]
        for line in lines:
            found = _LINE.match(line)
            if "[ERROR]" in line or "[WARNING]" in line:
                self._output.append(line)
                continue
            host = found["host"] if found and found["host"] in self.board.rows else ""
            text = line.removeprefix(host).strip() if host else line
            # Of more lines than one the first is their heading.
            if host and len(lines) == 1:
                self.board.line(host, text)
            self.log({"event": "line", **({"host": host} if host else {}), "text": text})
            self.show(host if len(lines) == 1 else "", line)

    def _result(self, kind: str, host: HostResult, data: Mapping[str, Any]) -> None:
        res, before = data.get("res") or {}, host.result
        self._note(kind, host, res, bool(data.get("ignore_errors")))
        if phase_of(data):  # a final message to all is not work of each host
            host.seconds = round(time.monotonic() - self._began, 1)
        for key in ("plan", "summary", "release"):
            if models := _models(res.get(key)):
                self.board.model(host.name, " + ".join(models))
        self.board.result(host.name, host.result, host.message)
        if kind == "runner_on_ok" and data.get("task_action") == "sparkfleet.dgx.vllm_verify":
            self.board.proved(host.name, proof(host))
        if host.result != before:
            what = {"result": host.result, "failure": host.failure, "message": host.message}
            self.log({"event": "result", "host": host.name, **{key: value for key, value in what.items() if value}})

    def _note(self, kind: str, host: HostResult, res: Mapping[str, Any], ignored: bool) -> None:
        for key in ("summary", "shown", "log", "history", "removed", "measured", "audit", "benchmarks"):
            if res.get(key):
                setattr(host, key, res[key])
        fetched, whole = res.get("downloaded"), res.get("model_bytes")
        if kind == "runner_on_ok" and isinstance(fetched, int) and isinstance(whole, int):
            host.fetched = {"bytes": fetched, "model_bytes": whole}
            parts = [f"{size / 1e6:.1f} MB" for size in host.fetched.values()]
            self._lines(f"{host.name}  fetched {parts[0]}; the whole model has {parts[1]}")
        if "outcome" in res:
            host.release, host.out_of_service_s = res.get("release"), res.get("out_of_service_s")
        if "audit" in res:  # an inventory that cannot be deployed does not keep a host from being audited
            host.result, host.message, host.failure, host.findings = "ok", "", "", []
        if kind == "runner_on_ok" and res.get("summary"):
            # Status reports the current state even if planning failed.
            host.result, host.message, host.failure, host.findings = "ok", "", "", []
        elif kind == "runner_on_ok":
            if res.get("changed") and host.result == "ok":
                host.result = "changed"
            if res.get("delivered"):
                host.message = f"a test alert was delivered by {', '.join(map(str, res['delivered']))}"
            if isinstance(res.get("searched"), int):  # for an old secret, on the host and on the controller
                where = "on this controller " if "_ansible_delegated_vars" in res else ""
                copies = len(res.get("found") or [])
                searched = f"{where}{res['searched']} places searched, {copies} with the old secret"
                host.message = "; ".join(filter(None, (host.message, searched)))
        elif kind == "runner_on_unreachable":
            host.result, host.message, host.failure = "unreachable", message(res), "unreachable"
        elif not ignored and host.result in ("ok", "changed"):  # a failure that follows from another is none of its own
            host.message = message(res)
            named = _FAILURE.findall(host.message)
            host.failure = str(res.get("failure") or (named[-1] if named else ""))
            if "argument_errors" in res:  # Ansible's own check of a role's arguments
                host.failure = "bad-input"
            host.findings = list(res.get("findings") or [])
            restored = res.get("outcome") == "restored"
            refused = bool(host.findings) or host.failure in REFUSALS
            host.drift = list(res.get("drift") or [])
            host.result = "drift" if host.drift else "restored" if restored else "refused" if refused else "failed"
            if host.failure == "audit":
                host.result = "exposed"
            if res.get("diagnosed"):
                host.result = "faulty" if res.get("serves") else "down"

    def cut(self) -> dict[str, str]:
        """The results of a run that does not go on: of what it has not done with, CUT."""
        done = {name for name, row in self.board.rows.items() if row.phase == DONE}
        found = dict.fromkeys(self.board.rows, CUT)
        for host in self.hosts.values():
            found[host.name] = host.result if CODES[host.result] != OK or host.name in done else CUT
        return found

    def code(self, rc: int) -> int:
        """The exit code of the whole, of ansible-playbook's `rc`."""
        if self.error:
            return BAD_INPUT
        code = max(map(_code, self.hosts.values()), default=OK)
        if code == OK and rc != 0:
            self.error = _ANSI.sub("", " ".join(self._output)) or f"ansible-playbook ended with {rc}"
            return BAD_INPUT
        if not self.hosts:
            self.error = (
                "no host of the group sparks is in the inventory (name your Sparks there, or make your group a child "
                "of sparks), or the limit excludes all"
            )
            return BAD_INPUT
        return code


def _code(host: HostResult) -> int:
    return BAD_INPUT if (host.result, host.failure) == ("refused", "bad-input") else CODES[host.result]


def _models(value: Any) -> list[str]:
    """The models of a plan, a summary of a status, or a release."""
    engines = value.get("engines") if isinstance(value, dict) else None
    found = [engine.get("model") for engine in engines or [] if isinstance(engine, dict)]
    return [str(model) for model in found if model]


def proof(host: HostResult) -> str:
    """That a host is verified, in words."""
    number = f"release {host.release['number']} " if host.release else ""
    gone = f", {host.out_of_service_s:.0f} s without service" if host.out_of_service_s is not None else ""
    return f"{number}verified{gone}"


def message(res: Mapping[str, Any]) -> str:
    """The message of a failure, without Ansible's words around it."""
    return explained(str(res.get("msg") or res.get("stderr") or "no message; run again with -v"))


def playbook(verb: str) -> Path:
    """The file of a verb. A collection's playbook cannot have a dash in its name."""
    name = NAMES.get(verb, verb.replace("-", "_"))
    return ROOT / "playbooks" / f"{name}.yml"


@functools.cache
def become_password() -> str:
    """Sudo's password, asked once: ansible-runner keeps ansible-playbook's own question to itself."""
    try:
        return getpass.getpass("BECOME password: ")
    except EOFError:
        raise SparkfleetError("-K asks for the sudo password: run it on a terminal") from None


def run(verb: str, inventory: str, arguments: Sequence[str], collector: Collector) -> int:
    """Run a verb; the exit code. `arguments` are ansible-playbook's own. Raises SparkfleetError."""
    if not playbook(verb).exists():
        raise SparkfleetError(f"{playbook(verb)} is missing; reinstall sparkfleet")
    place = Path(inventory)
    with contextlib.suppress(OSError, RuntimeError):  # a name that is too long, a loop of links
        place = place.resolve(strict=True)
    if not inventory or not place.is_absolute() or not os.path.exists(place):  # noqa: PTH110  raises nothing
        raise SparkfleetError(f"inventory {inventory!r}: no such file or folder; copy inventory/example")

    def take(event: Mapping[str, Any]) -> bool:
        collector.take(event)
        return False  # nothing of it is to be kept

    passwords = {r"BECOME password[^:]*:\s*$": become_password()} if "--ask-become-pass" in arguments else None
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with _private_folder() as folder:
        try:
            done = ansible_runner.interface.run(
                private_data_dir=str(folder),
                ident=IDENT,
                project_dir=str(ROOT),
                playbook=str(playbook(verb)),
                inventory=str(place),
                cmdline=shlex.join(arguments) or None,
                passwords=passwords,
                envvars=_environment(),
                suppress_env_files=True,
                fact_cache_type="none",
                quiet=True,
                event_handler=take,
            )
        except (ansible_runner.exceptions.AnsibleRunnerException, OSError) as error:
            raise SparkfleetError(f"ansible-runner cannot start ansible-playbook: {error}") from None
        finally:
            _restore(handlers)
    if done.status == "canceled":
        raise KeyboardInterrupt
    return collector.code(int(done.rc or 0))


def _environment() -> dict[str, str]:
    """What ansible-playbook gets in addition to our own environment.

    ansible-runner disables host key checking by default. Here it is always on, whatever
    the environment says: a connection stays open for the runs after it (ControlPersist), which must be able to trust
    that its host was verified. Programs next to our Python are found without an activated environment.
    """
    # Roles and plugins must be those of the playbooks: another copy of the collection may be installed for the user. A
    # path that the operator has set stays first, and ansible.cfg is overridden by it.
    named = os.environ.get("ANSIBLE_COLLECTIONS_PATH", "")
    collections = [named, str(COLLECTIONS)] if named else [str(COLLECTIONS), *FURTHER_COLLECTIONS]
    programs = Path(sys.executable).parent
    path = os.environ.get("PATH", os.defpath)
    return {
        "ANSIBLE_COLLECTIONS_PATH": os.pathsep.join(collections),
        "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
        "ANSIBLE_FORCE_COLOR": "0",
        "ANSIBLE_HOST_KEY_CHECKING": "True",
        "PATH": f"{programs}{os.pathsep}{path}" if (programs / "ansible-playbook").exists() else path,
    }


@contextlib.contextmanager
def _private_folder() -> Iterator[Path]:
    """ansible-runner's folder for a run, in memory where the system offers that, removed afterwards.

    Nothing in it holds a secret, so that nothing is left when this process is killed: values that ansible-runner
    would write into `env` are passed as arguments (`suppress_env_files`), except for its settings, which it reads from
    there alone; its file `command`, with the whole environment and command line, is a pipe that is read and forgotten.
    """
    folder = Path(tempfile.mkdtemp(prefix="sparkfleet-", dir=_memory_folder()))
    (folder / "env").mkdir()
    settings = {
        "suppress_ansible_output": True,
        "suppress_output_file": True,
        "pexpect_use_poll": True,
        "pexpect_timeout": 0.5,
    }
    (folder / "env" / "settings").write_text(json.dumps(settings), encoding="utf-8")
    artifacts = folder / "artifacts" / IDENT
    artifacts.mkdir(mode=0o700, parents=True)
    os.mkfifo(artifacts / "command", 0o600)
    pipe = os.open(artifacts / "command", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    over = threading.Event()
    reader = threading.Thread(target=_forget, args=(pipe, over), daemon=True)
    reader.start()
    try:
        yield folder
    finally:
        over.set()
        reader.join()
        os.close(pipe)
        shutil.rmtree(folder, ignore_errors=True)


def _forget(pipe: int, over: threading.Event) -> None:
    """Read a pipe until its writer closes it."""
    written = False
    while not over.is_set():
        if select.select([pipe], [], [], 0.1)[0]:
            data = os.read(pipe, 1 << 16)
            written |= bool(data)
            if not data and written:
                return


def _memory_folder() -> str | None:
    """A folder of a file system in memory that this user can write; None where there is none."""
    for name in (os.environ.get("XDG_RUNTIME_DIR", ""), "/dev/shm"):  # noqa: S108  mkdtemp makes a folder of its own
        if name and Path(name).is_dir() and os.access(name, os.W_OK | os.X_OK):
            return name
    return None


def _restore(handlers: Mapping[signal.Signals, Any]) -> None:
    """Restore our Ctrl-C handler, which ansible-runner replaces at its first run."""
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)


def default_inventory() -> str:
    """What ansible.cfg names, unless the environment does."""
    return os.environ.get("ANSIBLE_INVENTORY") or str(ROOT / "inventory" / "local")
