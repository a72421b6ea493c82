"""Hosts to be added to an inventory: inspected in parallel, helped with host keys and logins, and evaluated."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import re
import shlex
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from sparkfleet_host.bounded import GIB

from sparkfleet.onboarding import ssh
from sparkfleet.onboarding.prompts import Prompter, report_line
from sparkfleet.onboarding.ssh import Facts, HostKey, Inspection, Place
from sparkfleet.planning import memory_plan
from sparkfleet.planning.preflight import version
from sparkfleet.reporting import report

S = TypeVar("S")
T = TypeVar("T")
#: Oldest Python on a host that our modules run with.
PYTHON = "3.10"
TOGETHER = 32
#: A host cannot have the name of a group.
GROUPS = ("all", "ungrouped", "sparks", "gateways")
#: GiB of used memory, beyond an idle Spark's, that are worth a note.
TAKEN_GIB = 8.0
#: Short messages for problems that may still be solved.
SHORT = {
    "key-unknown": "its host key is not known yet",
    "key-changed": "its host key has changed",
    "login": "key login failed",
}


@dataclasses.dataclass
class Host:
    """A host to be added.

    `known`: the inventory has it; `any_gpu`: and allows it not to be a Spark. `result`: ok, same (already there
    under another name), refused or unreachable. `message`: why, with the remedy; `notes`: of one that is ok.
    """

    place: Place
    name: str = ""
    known: bool = False
    any_gpu: bool = False
    inspection: Inspection = dataclasses.field(default_factory=Inspection)
    result: str = "ok"
    message: str = ""
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def label(self) -> str:
        """Its name, or how it was given."""
        return self.name or self.place.text

    @property
    def new(self) -> bool:
        """Whether it is to be added."""
        return self.result == "ok" and not self.known

    def as_dict(self) -> dict[str, Any]:
        """For JSON: what is empty is left out."""
        facts = self.inspection.facts
        data: dict[str, Any] = {"name": self.name, "ssh": self.place.text, "result": self.result, "known": self.known}
        if facts:
            data |= {"hostname": facts.hostname, "gpu": facts.gpu, "sudo": facts.sudo}
            data |= {"memory_gib": round(facts.total / GIB, 1), "available_gib": round(facts.available / GIB, 1)}
        data |= {"message": self.message, "notes": self.notes}
        return {key: value for key, value in data.items() if value not in ("", [])}


def at_once(work: Callable[[S], T], items: Sequence[S]) -> list[T]:
    """Run for all items in parallel; results in their order."""
    with concurrent.futures.ThreadPoolExecutor(max(1, min(TOGETHER, len(items)))) as pool:
        return list(pool.map(work, items))


def check(hosts: Sequence[Host], person: Prompter, accept_keys: bool) -> None:
    """Inspect all hosts; if the user agrees, accept host keys and copy a login key where one is missing.

    Afterwards each has its name and result. Raises SparkfleetError for general failures, such as no ssh.
    """
    report_line(f"Inspecting {_count(hosts)} ...")
    _inspect(hosts)
    if unknown := [host for host in hosts if host.inspection.problem == "key-unknown"]:
        _inspect(_accepted(unknown, person, accept_keys))
    refused = [host for host in hosts if host.inspection.problem == "login" and host.inspection.takes_passwords]
    if person.there and refused:
        _inspect(_logins(refused, person))
    seen: dict[tuple[str, str], Host] = {}
    # Those of the inventory first: a new one may be one of them.
    for host in sorted(hosts, key=lambda host: not host.known):
        _evaluate(host, seen, {*GROUPS, *(other.name for other in hosts)})


def _count(hosts: Sequence[Host]) -> str:
    return hosts[0].label if len(hosts) == 1 else f"{len(hosts)} hosts"


def _inspect(hosts: Sequence[Host]) -> None:
    def one(host: Host) -> None:
        host.inspection = ssh.inspect(host.place)
        report_line(f"  {host.label}  {_outcome(host.inspection)}")

    at_once(one, hosts)


def _outcome(inspection: Inspection) -> str:
    facts = inspection.facts
    if facts is None:
        return SHORT.get(inspection.problem, inspection.message)
    return f"{facts.gpu or 'no NVIDIA GPU'}, {facts.total / GIB:.1f} GiB, {facts.hostname}"


def _accepted(hosts: Sequence[Host], person: Prompter, accept: bool) -> list[Host]:
    """Show the hosts' keys; save the accepted ones, and return their hosts."""
    if not (accept or person.there):
        return []

    def one(host: Host) -> tuple[dict[str, str], HostKey | None]:
        known = ssh.settings(host.place)
        return known, ssh.host_key(host.place, known)

    offered = [(host, known, key) for host, (known, key) in zip(hosts, at_once(one, hosts), strict=True) if key]
    if not offered:
        return []
    rows = [(host.label, key.kind.removeprefix("ssh-"), key.fingerprint) for host, _, key in offered if key]
    table = report.table([("host", "kind", "fingerprint"), *rows])
    report_line("Host keys that are not known yet:\n" + textwrap.indent(table.rstrip(), "  "))
    if not accept:
        report_line("To compare, run on each Spark: ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub")
        accept = person.agrees("Are these yours?", False)
    if not accept:
        return []
    files = {str(ssh.trust(host.place, key, known)) for host, known, key in offered if key}
    report_line(f"  accepted, in {', '.join(sorted(files))}")
    return [host for host, _, _ in offered]


def _logins(hosts: Sequence[Host], person: Prompter) -> list[Host]:
    """Offer to copy a login key to hosts; return those that got one."""
    names = ", ".join(host.label for host in hosts)
    report_line(f"Key login failed: {names}")
    if not person.agrees("Copy your key there now? Each host asks for the user's password once (ssh-copy-id).", True):
        return []
    done: list[Host] = []
    for host in hosts:
        known = ssh.settings(host.place)
        public = ssh.own_key(host.place, known)
        if public is None:
            question = "You have no SSH key. Create one without a passphrase (`ssh-keygen -p` adds one later)?"
            if not person.agrees(question, True):
                return done
            public = ssh.make_key(host.place, known)
            report_line(f"  made {public}")
        report_line(f"{host.label}: {shlex.join(ssh.copy_command(host.place, public))}")
        if ssh.copy_key(host.place, public):
            done.append(host)
    return done


def _evaluate(host: Host, seen: dict[tuple[str, str], Host], taken: set[str]) -> None:
    facts = host.inspection.facts
    if facts is None:
        host.result, host.message = "unreachable", _remedy(host)
        return
    other = seen.setdefault(facts.identity, host)
    if other is not host:
        host.result, host.message = "same", f"the same machine as {other.label}"
        return
    host.name = host.name or _free(_name(host.place, facts), taken)
    taken.add(host.name)
    if "GB10" not in facts.gpu and not host.any_gpu:
        host.result = "refused"
        host.message = (
            f"not a Spark: nvidia-smi reports {facts.gpu or 'nothing'}. Check the address; on a Spark install "
            "its driver; to use this host anyway, add it by hand with sparkfleet_require_gb10: false"
        )
    elif version(facts.python) < version(PYTHON):
        host.result = "refused"
        host.message = f"Python {PYTHON} or newer is required there, found {facts.python or 'none'}: install python3"
    elif facts.sudo == "missing":
        host.result, host.message = "refused", "sudo is not installed: install it, or log in as root"
    idle = facts.total / GIB - memory_plan.USUAL_HOST_GIB
    if host.result == "ok" and not host.known and idle - facts.available / GIB > TAKEN_GIB:
        host.notes.append(
            f"{facts.available / GIB:.1f} GiB of its memory is available now, {idle:.1f} when idle; stop "
            "what runs there to make room for a model"
        )


def _remedy(host: Host) -> str:
    place, inspection = host.place, host.inspection
    if inspection.problem == "key-unknown":
        return f"{inspection.message} Log in once with `{place.command()}`, or run this with --accept-host-keys"
    if inspection.problem == "key-changed":
        _, name = ssh.known_hosts(place, ssh.settings(place))
        return (
            f"{inspection.message}. If the host was reinstalled, run `ssh-keygen -R {shlex.quote(name)}` and try "
            "again; if not, this may be another machine"
        )
    if inspection.problem == "answer":
        return (
            f"{inspection.message}. Check what `{place.command()}` prints: is it the right host, with a standard shell?"
        )
    if inspection.problem == "login":
        message = f"{inspection.message} Is the user right (--user)?"
        if not inspection.takes_passwords:
            return f"{message} It does not accept passwords: have your public key added to ~/.ssh/authorized_keys there"
        copy = shlex.join(ssh.copy_command(place, ssh.own_key(place, ssh.settings(place))))
        return f"{message} Copy your key there: `{copy}`, or run this on a terminal without --yes"
    return f"{inspection.message}. Is it powered on, and is the address right? `{place.command()}` must work from here"


def _name(place: Place, facts: Facts) -> str:
    """The name for a host: the one given, without its domain, otherwise its own."""
    given = place.address.partition(".")[0].lower()
    own = re.sub(r"[^a-z0-9_-]", "-", facts.hostname).strip("-_")
    return own or "spark" if place.local or ssh.is_address(place.address) else given


def _free(name: str, taken: set[str]) -> str:
    name = name if name != "localhost" else "spark"
    return next(free for free in (name, *(f"{name}-{number}" for number in range(2, 9999))) if free not in taken)


def table(hosts: Sequence[Host]) -> str:
    """One row per host; below them, what to do."""
    rows = [("host", "ssh", "GPU", "memory", "sudo", "result")]
    for host in hosts:
        facts = host.inspection.facts
        seen = ("-", "-", "-")
        if facts:
            seen = (facts.gpu or "none", f"{facts.total / GIB:.1f} GiB", facts.sudo)
        rows.append((host.name or host.place.address, host.place.text, *seen, _result(host)))
    text = report.table(rows)
    message = [(host.label, line) for host in hosts for line in ([host.message] if host.message else host.notes)]
    asking = [
        host.name
        for host in hosts
        if host.result == "ok" and host.inspection.facts and host.inspection.facts.sudo == "password"
    ]
    if asking:
        message.append(
            (", ".join(asking), "sudo asks for a password there; that is fine: run with -K (--ask-become-pass)")
        )
    return text + report.clean("".join(f"{who}: {line}\n" for who, line in message))


def _result(host: Host) -> str:
    if host.result == "unreachable":
        return host.inspection.problem
    if host.result != "ok":
        return host.result
    return "ok" if host.known else "ok, new"
