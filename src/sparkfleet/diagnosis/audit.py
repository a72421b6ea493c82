"""How secure a host is: what `spark_audit` read, graded. The table is also docs/audit.md."""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import urllib.parse
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from sparkfleet_host.audit import UNITS
from sparkfleet_host.bounded import printable
from sparkfleet_host.http import KEY_FILE

from sparkfleet import __version__

GRADES = ("info", "low", "medium", "high", "critical")
EXPIRES_SOON, EXPIRES_NOW = 30, 7  # days
OLD_SECRET = 365  # days
_DOCKER_API = (2375, 2376)
#: What listens in place of containers; Docker itself does with `userland-proxy: false`.
_PROXIES = ("docker-proxy", "dockerd")
_SOCKETS = ("/run/docker.sock", "/run/containerd/containerd.sock", "/run/docker/containerd/containerd.sock")
_SYSTEM = ("/etc", "/root", "/var/lib/docker", "/var/lib/containerd", "/proc", "/dev")
#: Capabilities that lead to the host.
_POWERS = {"ALL", "SYS_ADMIN", "SYS_MODULE", "SYS_PTRACE", "SYS_RAWIO", "DAC_READ_SEARCH"}


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that an audit looks for; `grade` is the usual one."""

    id: str
    grade: str
    title: str
    why: str
    remedy: str


CHECKS = {
    check.id: check
    for check in (
        Check(
            "docker-api",
            "critical",
            "Docker's API listens on TCP",
            "Whoever reaches it is root on the host",
            "Remove tcp:// from `hosts` in /etc/docker/daemon.json and from the unit of Docker, restart it; use SSH "
            "(`docker -H ssh://HOST`)",
        ),
        Check(
            "engine-open",
            "high",
            "An engine is open to the network without a key",
            "Anyone on the network may use it, and call its other routes",
            "Set `sparkfleet_engine_key`, `sparkfleet_firewall: true` or `sparkfleet_listen: loopback`, and deploy",
        ),
        Check(
            "port-unexpected",
            "low",
            "A port is open that the inventory does not mention",
            "What listens there is reachable from the network",
            "Stop what is not needed, bind it to loopback, or close the port with a firewall",
        ),
        Check(
            "statistics-open",
            "low",
            "The gateway's statistics page is open to the network",
            "It shows models, addresses and load, and requires no login",
            "Remove `sparkfleet_gateway_statistics_listen`, or limit the port to your monitoring with a firewall",
        ),
        Check(
            "secret-mode",
            "high",
            "A file with a secret is not root's alone",
            "Other users of the host may read or replace it",
            "`chown root: FILE && chmod 600 FILE`, then replace the secret (`sparkfleet rotate`)",
        ),
        Check(
            "secret-copy",
            "high",
            "A copy of a secret is in another file",
            "It outlives the change of the secret; critical where every user may read it",
            "Remove the file or the line, then replace the secret (`sparkfleet rotate`)",
        ),
        Check(
            "secret-old",
            "low",
            "A secret has not been replaced for a year",
            "The longer it is in use, the more places may have it",
            "`sparkfleet rotate`",
        ),
        Check(
            "docker-login",
            "medium",
            "`docker login` has left a password in clear text",
            "Whoever reads the file, or a backup of it, has the login; high where every user may read it",
            "`docker logout REGISTRY`, and set `sparkfleet_registry_logins`",
        ),
        Check(
            "file-writable",
            "high",
            "Others than root may change what runs",
            "Who changes such a file decides what runs as root, or what is served",
            "`chown root: FILE && chmod go-w FILE`, then compare with `sparkfleet drift`",
        ),
        Check(
            "release-altered",
            "high",
            "Files of the deployed release were changed",
            "What runs is not what was verified",
            "`sparkfleet drift` shows what differs; deploy again",
        ),
        Check(
            "image-differs",
            "high",
            "A container does not run the image of its release",
            "What runs is not what was verified",
            "`sparkfleet drift` shows what differs; deploy again",
        ),
        Check(
            "deployment-differs",
            "low",
            "What runs is not what inventory and lock say",
            "A change was made by hand, or is not deployed yet",
            "`sparkfleet drift` shows what differs; deploy",
        ),
        Check(
            "container-privileged",
            "high",
            "A container is privileged, or as good as that",
            "It can do what root of the host can do",
            "Run it without `privileged`, with the devices and capabilities that it needs",
        ),
        Check(
            "container-socket",
            "high",
            "A container has the socket of Docker or containerd, or the root of the host",
            "It can do what root of the host can do",
            "Run it without that mount; a proxy of the socket can limit the calls",
        ),
        Check(
            "container-mount",
            "medium",
            "A container has a folder of the host's system",
            "It reads what is there: passwords, keys, other containers' files; high where it may write, and so decide "
            "what root does",
            "Mount the file or folder that it needs alone, with `:ro`",
        ),
        Check(
            "container-host",
            "low",
            "A container shares a namespace of the host",
            "It sees processes or the network of the host (that an engine shares its memory segments is intended)",
            "Run it without `network_mode`, `pid`, `uts` or `userns_mode: host`, unless it needs that",
        ),
        Check(
            "unit-altered",
            "medium",
            "A unit of Sparkfleet was changed",
            "A drop-in or an edited file decides what runs as root",
            "`systemctl cat UNIT` shows it; `systemctl revert UNIT` removes drop-ins; remove an edited file, then "
            "`sparkfleet deploy`",
        ),
        Check(
            "certificate-expires",
            "medium",
            "The gateway's certificate ends soon",
            "Clients will refuse to connect; high within a week, critical once it is over",
            "Renew it, and run `playbooks/gateway.yml`; a self-signed one is renewed by that",
        ),
        Check(
            "ssh-root",
            "medium",
            "root may log in by SSH with a password",
            "A guessed password gives the whole host",
            "`PermitRootLogin no` in /etc/ssh/sshd_config.d/, `systemctl reload ssh`",
        ),
        Check(
            "ssh-password",
            "low",
            "SSH accepts passwords",
            "Passwords can be guessed; high if empty ones are accepted",
            "`PasswordAuthentication no` in /etc/ssh/sshd_config.d/ once keys work, `systemctl reload ssh`",
        ),
        Check(
            "updates-off",
            "medium",
            "Security updates are not installed by themselves",
            "Known holes stay open until someone installs them",
            "`apt install unattended-upgrades && dpkg-reconfigure unattended-upgrades`",
        ),
        Check(
            "docker-group",
            "medium",
            "Users are members of the group docker",
            "Each of them is root in effect, without a password",
            "`gpasswd -d USER docker`, and use sudo; `sparkfleet_docker_group: false` adds no one",
        ),
        Check(
            "sudo-nopasswd",
            "info",
            "Users may do everything by sudo without a password",
            "A stolen session of theirs is root",
            "Remove NOPASSWD; Sparkfleet asks for the password with -K (--ask-become-pass)",
        ),
        Check(
            "not-read",
            "info",
            "A part could not be read",
            "It is not audited",
            "The reason is in the finding; run as root (become)",
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that was found: where (a file, a port, a name), and in words what."""

    id: str
    grade: str
    where: str
    what: str

    def as_dict(self) -> dict[str, str]:
        """For JSON, with the table's words."""
        check = CHECKS[self.id]
        return {**dataclasses.asdict(self), "title": check.title, "why": check.why, "remedy": check.remedy}


@dataclasses.dataclass(frozen=True)
class Expected:
    """What the inventory says of a host: ports with what they are for, and whether it wants members of group docker;
    `engines`: ports of engines themselves, `doors`: those where the guard takes requests for one that starts on demand;
    `firewall`: the firewall lets named sources alone reach them; `differs`: reasons why it is not as the inventory
    says."""

    ports: Mapping[int, str]
    engines: Collection[int] = ()
    doors: Collection[int] = ()
    firewall: bool = False
    operator: str = ""
    statistics_port: int = 0
    differs: Sequence[str] = ()


def findings(facts: Mapping[str, Any], expected: Expected) -> list[Finding]:
    """What is to be known of a host, the most severe first."""
    found: list[Finding] = []
    for part, value in facts.items():
        if isinstance(value, Mapping) and set(value) == {"error"}:
            found.append(_found("not-read", part, str(value["error"])))
        elif judge := _JUDGES.get(part):
            found += judge(value, facts, expected)
    found += _open_engines(facts, expected)
    found += [_found("deployment-differs", "release", reason) for reason in expected.differs]
    unique = dict.fromkeys(found)
    return sorted(unique, key=lambda item: (-GRADES.index(item.grade), item.id, item.where))


def reaches(found: Iterable[Finding], grade: str) -> list[Finding]:
    """Those of a grade or a more severe one."""
    return [item for item in found if GRADES.index(item.grade) >= GRADES.index(grade)]


def _found(name: str, where: str, what: str, grade: str = "") -> Finding:
    return Finding(name, grade or CHECKS[name].grade, printable(where, 300), printable(what, 400))


# -- ports -----------------------------------------------------------------------------------------------------------


def is_open(address: str) -> bool:
    """Whether others than the host itself reach an address."""
    try:
        return not ipaddress.ip_address(address.strip("[]")).is_loopback
    except ValueError:
        return True


def _listeners(value: Any, facts: Mapping[str, Any], expected: Expected) -> Iterator[Finding]:
    containers = _read(facts, "containers")
    published = {port["port"]: item["ours"] for item in containers for port in item["published"]}
    for item in value:
        address, port, process = item["address"], int(item["port"]), item["process"]
        proxy = process in _PROXIES and port in published
        if is_open(address) and not (proxy and not published[port]):  # others' containers are named by what they are
            what = f"{process or 'a process'} listens on {address}:{port}"
            yield from _open_port(f"{address}:{port}", port, what, expected, api=process == "dockerd" and not proxy)


def _open_port(where: str, port: int, what: str, expected: Expected, api: bool = False) -> Iterator[Finding]:
    if api or port in _DOCKER_API:
        yield _found("docker-api", where, what)
    elif port == expected.statistics_port:
        yield _found("statistics-open", where, what)
    elif port not in expected.ports:
        yield _found("port-unexpected", where, what)


def _open_engines(facts: Mapping[str, Any], expected: Expected) -> Iterator[Finding]:
    """Engines without a key that others reach: published by Docker, on the network of the host (a rank), or behind the
    guard, which asks for the key of its file."""
    ours = [item for item in _read(facts, "containers") if item["ours"]]
    keys, told = {port["port"]: item["key"] for item in ours for port in item["published"]}, set[int]()
    safe = {*(_read(facts, "firewall") if expected.firewall else ())}
    for item in ours:
        for port in item["published"] if not item["key"] else ():
            if is_open(port["address"]) and port["port"] not in safe:
                where = _place(port)
                told.add(port["port"])
                yield _found("engine-open", where, f"container {item['name']} is published on {where} and has no key")
    on_host = [item for item in ours if "NetworkMode" in item["host"]]
    key_file = any(item["path"] == KEY_FILE for item in _read(facts, "secrets"))
    for item in _read(facts, "listeners"):
        port, where = int(item["port"]), f"{item['address']}:{item['port']}"
        door = port in expected.doors
        # A gateway on this host may have the engine's port at another address.
        if not (door or port in expected.engines) or port in told | safe or item["process"] == "haproxy":
            continue
        keyed = keys.get(port, all(one["key"] for one in on_host) if on_host and not door else key_file)
        if is_open(item["address"]) and not keyed:
            what = "takes requests for an engine" if door else "serves an engine"
            yield _found("engine-open", where, f"{item['process'] or 'a process'} {what} on {where} without a key")


def _place(port: Mapping[str, Any]) -> str:
    protocol = "" if port["protocol"] == "tcp" else f"/{port['protocol']}"
    return f"{port['address']}:{port['port']}{protocol}"


def _read(facts: Mapping[str, Any], part: str) -> Sequence[Any]:
    """A part that is a list; nothing where it could not be read."""
    value = facts.get(part)
    return value if isinstance(value, list) else ()


# -- files -----------------------------------------------------------------------------------------------------------


def _secrets(value: Any, facts: Mapping[str, Any], expected: Expected) -> Iterator[Finding]:
    for item in value:
        if item["owner"] != "root" or int(item["mode"], 8) & 0o077:
            yield _found("secret-mode", item["path"], f"{item['path']} is {item['owner']}'s with mode {item['mode']}")
        if item["age"] > OLD_SECRET and not item["path"].endswith(".pem"):
            yield _found("secret-old", item["path"], f"{item['path']} is {item['age']:.0f} days old")


def _copies(value: Any, facts: Mapping[str, Any], expected: Expected) -> Iterator[Finding]:
    for item in value["found"]:
        grade = "critical" if int(item["mode"], 8) & 0o004 else ""
        yield _found("secret-copy", item["path"], f"{item['path']} ({item['owner']}, {item['mode']})", grade)
    if value["unfinished"]:
        yield _found(
            "not-read", "copies", f"the search for copies of secrets ended early, after {value['searched']} places"
        )


def _docker_logins(value: Any, facts: Mapping[str, Any], expected: Expected) -> Iterator[Finding]:
    for item in value:
        grade = "high" if int(item["mode"], 8) & 0o077 else ""
        yield _found("docker-login", item["path"], f"{item['path']} for {', '.join(item['registries'])}", grade)


def _files(value: Any, facts: Mapping[str, Any], expected: Expected) -> Iterator[Finding]:
    for item in value:
        yield _found("file-writable", item["path"], f"{item['path']} is {item['owner']}'s with mode {item['mode']}")


# -- Docker ----------------------------------------------------------------------------------------------------------


def _containers(value: Any, facts: Mapping[str, Any], expected: Expected) -> Iterator[Finding]:
    for item in value:
        name = f"container {item['name']}"
        powers = sorted({power.removeprefix("CAP_") for power in item["capabilities"]} & _POWERS)
        if item["privileged"] or powers:
            what = "" if item["privileged"] else f", capabilities {', '.join(powers)}"
            yield _found("container-privileged", name, f"{name} ({item['image']}){what}")
        for mount in item["mounts"]:
            source, how = mount["source"], "writable" if mount["writable"] else "read-only"
            if source == "/" or any(_has(source, place) for place in _SOCKETS):  # to ask a socket is not to write it
                yield _found("container-socket", name, f"{name} ({item['image']}): {source}")
            elif any(_has(source, place) for place in _SYSTEM):
                grade = "high" if mount["writable"] else ""
                yield _found("container-mount", name, f"{name} ({item['image']}): {source}, {how}", grade)
        shared = [key for key in item["host"] if not (item["ours"] and key == "IpcMode")]
        if shared:
            yield _found("container-host", name, f"{name}: {', '.join(shared)}")
        for port in item["published"] if not item["ours"] else ():
            if is_open(port["address"]):
                where = _place(port)
                yield from _open_port(where, port["port"], f"{name} is published on {where}", expected)


def _has(folder: str, place: str) -> bool:
    """Whether a folder is a place, or has it."""
    return place == folder or place.startswith(f"{folder.rstrip('/')}/")


def _docker_users(value: Any, facts: Mapping[str, Any], expected: Expected) -> Iterator[Finding]:
    for user in value:
        if user == expected.operator:
            yield _found("docker-group", f"user {user}", f"{user}, as sparkfleet_docker_group wants it", "info")
        else:
            yield _found("docker-group", f"user {user}", user)


def _releases(value: Any, facts: Mapping[str, Any], expected: Expected) -> Iterator[Finding]:
    for line in value["damage"]:
        yield _found("release-altered", f"release {value['current']}", line)
    for item in value["images"]:
        if item["runs"] and item["wanted"] and item["runs"] != item["wanted"]:
            what = f"{item['service']} runs {item['runs'][:19]}, {item['locked']} is {item['wanted'][:19]}"
            yield _found("image-differs", item["service"], what)


# -- the system ------------------------------------------------------------------------------------------------------


def _units(value: Any, facts: Mapping[str, Any], expected: Expected) -> Iterator[Finding]:
    for item in value:
        for path in item["drop_ins"]:
            yield _found("unit-altered", item["name"], f"{item['name']} has the drop-in {path}")
        if item["reload"]:
            yield _found("unit-altered", item["name"], f"{item['path']} was edited since systemd read it")
        if item["edited"]:
            yield _found("unit-altered", item["name"], f"{item['name']} is not what Sparkfleet wrote")
        if item["path"] != f"{UNITS}/{item['name']}":
            yield _found("unit-altered", item["name"], f"systemd has {item['name']} from {item['path'] or 'nowhere'}")


def _certificates(value: Any, facts: Mapping[str, Any], expected: Expected) -> Iterator[Finding]:
    for item in value:
        days = (item["ends"] - facts["now"]) / 86400
        if days < EXPIRES_SOON:
            grade = "critical" if days < 0 else "high" if days < EXPIRES_NOW else ""
            when = f"ended {-days:.0f} days ago" if days < 0 else f"ends in {days:.0f} days"
            yield _found("certificate-expires", item["path"], f"{item['path']} {when}", grade)


def _sshd(value: Any, facts: Mapping[str, Any], expected: Expected) -> Iterator[Finding]:
    passwords = value.get("passwordauthentication") == "yes" or value.get("kbdinteractiveauthentication") == "yes"
    if value.get("permitrootlogin") == "yes" and passwords:
        yield _found("ssh-root", "sshd", "PermitRootLogin yes, and passwords are accepted")
    if value.get("permitemptypasswords") == "yes" and passwords:
        yield _found("ssh-password", "sshd", "PermitEmptyPasswords yes", "high")
    elif passwords:
        yield _found("ssh-password", "sshd", "PasswordAuthentication or KbdInteractiveAuthentication is yes")


def _updates(value: Any, facts: Mapping[str, Any], expected: Expected) -> Iterator[Finding]:
    if not (value["installed"] and value["enabled"]):
        state = "is off" if value["installed"] else "is not installed"
        yield _found("updates-off", "unattended-upgrades", f"unattended-upgrades {state}")


def _sudo(value: Any, facts: Mapping[str, Any], expected: Expected) -> Iterator[Finding]:
    for who in value:
        yield _found("sudo-nopasswd", f"user {who}", who)


_JUDGES: dict[str, Callable[[Any, Mapping[str, Any], Expected], Iterable[Finding]]] = {
    **{"listeners": _listeners, "secrets": _secrets, "copies": _copies, "docker_logins": _docker_logins},
    **{"files": _files, "containers": _containers, "docker_users": _docker_users, "releases": _releases},
    **{"units": _units, "certificates": _certificates, "sshd": _sshd, "updates": _updates, "sudo": _sudo},
}


# -- pages -----------------------------------------------------------------------------------------------------------


def sarif(hosts: Mapping[str, Sequence[Mapping[str, str]]]) -> str:
    """The findings of hosts as SARIF 2.1.0."""
    levels = {"info": "note", "low": "note", "medium": "warning", "high": "error", "critical": "error"}
    scores = dict(zip(GRADES, ("0.0", "3.0", "5.0", "8.0", "9.5"), strict=True))
    rules = [
        {
            "id": check.id,
            "shortDescription": {"text": check.title},
            "fullDescription": {"text": f"{check.why}."},
            "help": {"text": check.remedy},
            "defaultConfiguration": {"level": levels[check.grade]},
            "properties": {"security-severity": scores[check.grade], "grade": check.grade},
        }
        for check in CHECKS.values()
    ]
    results = [
        {
            "ruleId": item["id"],
            "level": levels[item["grade"]],
            "message": {"text": f"{host}: {item['title']}: {item['what']}. {item['remedy']}"},
            "locations": [
                {
                    "physicalLocation": {"artifactLocation": {"uri": f"{host}/{_uri(item['where'])}"}},
                    "logicalLocations": [
                        {"name": host, "kind": "resource", "fullyQualifiedName": f"{host}: {item['where']}"}
                    ],
                }
            ],
            "properties": {"grade": item["grade"], "host": host},
        }
        for host, found in hosts.items()
        for item in found
    ]
    driver = {"name": "sparkfleet audit", "version": __version__, "rules": rules}
    document = {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{"tool": {"driver": driver}, "results": results}],
    }
    return json.dumps(document, indent=2) + "\n"


def _uri(where: str) -> str:
    return urllib.parse.quote(where.lstrip("/"))


def table() -> str:
    """The checks as Markdown."""
    rows = ["| id | grade | what | why | remedy |", "| --- | --- | --- | --- | --- |"]
    for check in sorted(CHECKS.values(), key=lambda check: (-GRADES.index(check.grade), check.id)):
        rows.append(f"| `{check.id}` | {check.grade} | {check.title} | {check.why} | {check.remedy} |")
    return "\n".join(rows) + "\n"
