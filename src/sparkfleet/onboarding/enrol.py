"""Hosts on their way into an inventory: looked at all at once, helped over what keeps them out, and judged."""

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
from sparkfleet.onboarding.prompts import Prompter, tell
from sparkfleet.onboarding.ssh import Facts, HostKey, Inspection, Place
from sparkfleet.planning import memory_plan
from sparkfleet.planning.preflight import version
from sparkfleet.reporting import report

S = TypeVar("S")
T = TypeVar("T")
#: Oldest Python on a host that our modules run with.
PYTHON = "3.10"
TOGETHER = 32
#: A host of the name of a group would be neither.
GROUPS = ("all", "ungrouped", "sparks", "gateways")
#: Memory that a Spark has less than an idle one, GiB, to be worth a word.
TAKEN_GIB = 8.0
#: What is said of a problem while there may be help for it.
SHORT = {
    "key-unknown": "its host key is not known yet",
    "key-changed": "its host key is not the one that is known",
    "login": "no login with a key",
}


@dataclasses.dataclass
class Host:
    """A host on its way.

    `known`: the inventory has it; `any_gpu`: and says that it need be no Spark. `result`: ok, same (it is there
    already under another name), refused or unreachable. `message`: why, with the remedy; `notes`: of one that is ok.
    """

    place: Place
    name: str = ""
    known: bool = False
    any_gpu: bool = False
    look: Inspection = dataclasses.field(default_factory=Inspection)
    result: str = "ok"
    message: str = ""
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def label(self) -> str:
        """How it is called while it has no name."""
        return self.name or self.place.text

    @property
    def new(self) -> bool:
        """Whether it is to be written down."""
        return self.result == "ok" and not self.known

    def as_dict(self) -> dict[str, Any]:
        """For JSON: what is empty is left out."""
        facts = self.look.facts
        data: dict[str, Any] = {"name": self.name, "ssh": self.place.text, "result": self.result, "known": self.known}
        if facts:
            data |= {"hostname": facts.hostname, "gpu": facts.gpu, "sudo": facts.sudo}
            data |= {"memory_gib": round(facts.total / GIB, 1), "available_gib": round(facts.available / GIB, 1)}
        data |= {"message": self.message, "notes": self.notes}
        return {key: value for key, value in data.items() if value not in ("", [])}


def at_once(work: Callable[[S], T], items: Sequence[S]) -> list[T]:
    """Do the same for all, together; results in their order."""
    with concurrent.futures.ThreadPoolExecutor(max(1, min(TOGETHER, len(items)))) as pool:
        return list(pool.map(work, items))


def check(hosts: Sequence[Host], person: Prompter, accept_keys: bool) -> None:
    """Look at all hosts; with the person's word accept host keys and bring a login key where one is missing.

    Afterwards each has its name and its result. Raises SparkfleetError for what keeps all from it, such as no ssh.
    """
    tell(f"Looking at {_count(hosts)} ...")
    _look(hosts)
    if unknown := [host for host in hosts if host.look.problem == "key-unknown"]:
        _look(_accepted(unknown, person, accept_keys))
    refused = [host for host in hosts if host.look.problem == "login" and host.look.takes_passwords]
    if person.there and refused:
        _look(_logins(refused, person))
    seen: dict[tuple[str, str], Host] = {}
    # Those of the inventory first: a new one that is one of them is no other.
    for host in sorted(hosts, key=lambda host: not host.known):
        _judge(host, seen, {*GROUPS, *(other.name for other in hosts)})


def _count(hosts: Sequence[Host]) -> str:
    return hosts[0].label if len(hosts) == 1 else f"{len(hosts)} hosts"


def _look(hosts: Sequence[Host]) -> None:
    def one(host: Host) -> None:
        host.look = ssh.look(host.place)
        tell(f"  {host.label}  {_said(host.look)}")

    at_once(one, hosts)


def _said(look: Inspection) -> str:
    if look.facts is None:
        return SHORT.get(look.problem, look.message)
    return f"{look.facts.gpu or 'no NVIDIA GPU'}, {look.facts.total / GIB:.1f} GiB, {look.facts.hostname}"


def _accepted(hosts: Sequence[Host], person: Prompter, accept: bool) -> list[Host]:
    """Show the host keys of hosts; write down those that are accepted, and return their hosts."""
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
    tell("Host keys that are not known yet:\n" + textwrap.indent(table.rstrip(), "  "))
    if not accept:
        tell("The same is shown on each Spark by: ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub")
        accept = person.agrees("Are these yours?", False)
    if not accept:
        return []
    files = {str(ssh.trust(host.place, key, known)) for host, known, key in offered if key}
    tell(f"  accepted, in {', '.join(sorted(files))}")
    return [host for host, _, _ in offered]


def _logins(hosts: Sequence[Host], person: Prompter) -> list[Host]:
    """Offer to bring a login key to hosts; those that got one."""
    names = ", ".join(host.label for host in hosts)
    tell(f"No login with a key: {names}")
    if not person.agrees("Bring your key there now? Each asks for the user's password once (ssh-copy-id).", True):
        return []
    done: list[Host] = []
    for host in hosts:
        known = ssh.settings(host.place)
        public = ssh.own_key(host.place, known)
        if public is None:
            question = "You have no SSH key. Make one, without a passphrase (`ssh-keygen -p` gives it one later)?"
            if not person.agrees(question, True):
                return done
            public = ssh.make_key(host.place, known)
            tell(f"  made {public}")
        tell(f"{host.label}: {shlex.join(ssh.copy_command(host.place, public))}")
        if ssh.copy_key(host.place, public):
            done.append(host)
    return done


def _judge(host: Host, seen: dict[tuple[str, str], Host], taken: set[str]) -> None:
    facts = host.look.facts
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
            f"no Spark: nvidia-smi reports {facts.gpu or 'nothing'}. Check the address; on a Spark install its driver; "
            "one that is to serve all the same is written by hand, with sparkfleet_require_gb10: false"
        )
    elif version(facts.python) < version(PYTHON):
        host.result = "refused"
        host.message = f"Python {PYTHON} or newer is needed there, found {facts.python or 'none'}: install python3"
    elif facts.sudo == "missing":
        host.result, host.message = "refused", "there is no sudo: install it, or log in as root"
    idle = facts.total / GIB - memory_plan.USUAL_HOST_GIB
    if host.result == "ok" and not host.known and idle - facts.available / GIB > TAKEN_GIB:
        host.notes.append(
            f"{facts.available / GIB:.1f} GiB of its memory are available now, {idle:.1f} when it is idle; "
            "what runs there has to make room for a model"
        )


def _remedy(host: Host) -> str:
    place, look = host.place, host.look
    if look.problem == "key-unknown":
        return f"{look.message} Log in once by hand, `{place.command()}`, or run this with --accept-host-keys"
    if look.problem == "key-changed":
        _, name = ssh.known_hosts(place, ssh.settings(place))
        return (
            f"{look.message}. If the host was reinstalled, `ssh-keygen -R {shlex.quote(name)}`, and run this again; if "
            "not, somebody else may be answering"
        )
    if look.problem == "answer":
        return f"{look.message}. See what `{place.command()}` prints: is it the right host, and a usual shell?"
    if look.problem == "login":
        said = f"{look.message} Is the user right (--user)?"
        if not look.takes_passwords:
            return f"{said} It takes no passwords: have your public key put into ~/.ssh/authorized_keys there"
        copy = shlex.join(ssh.copy_command(place, ssh.own_key(place, ssh.settings(place))))
        return f"{said} Bring your key there: `{copy}`, or run this on a terminal, without --yes"
    return f"{look.message}. Is it on, and is the address right? `{place.command()}` must work from here"


def _name(place: Place, facts: Facts) -> str:
    """What a person calls a host: the name that they gave, without its domain, else its own."""
    given = place.address.partition(".")[0].lower()
    own = re.sub(r"[^a-z0-9_-]", "-", facts.hostname).strip("-_")
    return own or "spark" if place.local or ssh.is_address(place.address) else given


def _free(name: str, taken: set[str]) -> str:
    name = name if name != "localhost" else "spark"
    return next(free for free in (name, *(f"{name}-{number}" for number in range(2, 9999))) if free not in taken)


def table(hosts: Sequence[Host]) -> str:
    """A row a host; below it, what is to be done."""
    rows = [("host", "ssh", "GPU", "memory", "sudo", "result")]
    for host in hosts:
        facts = host.look.facts
        seen = ("-", "-", "-")
        if facts:
            seen = (facts.gpu or "none", f"{facts.total / GIB:.1f} GiB", facts.sudo)
        rows.append((host.name or host.place.address, host.place.text, *seen, _result(host)))
    text = report.table(rows)
    said = [(host.label, line) for host in hosts for line in ([host.message] if host.message else host.notes)]
    asking = [
        host.name for host in hosts if host.result == "ok" and host.look.facts and host.look.facts.sudo == "password"
    ]
    if asking:
        said.append(
            (", ".join(asking), "sudo asks for a password there, which is fine: run with -K (--ask-become-pass)")
        )
    return text + report.clean("".join(f"{who}: {line}\n" for who, line in said))


def _result(host: Host) -> str:
    if host.result == "unreachable":
        return host.look.problem
    if host.result != "ok":
        return host.result
    return "ok" if host.known else "ok, new"
