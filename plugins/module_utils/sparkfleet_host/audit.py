# SPDX-License-Identifier: Apache-2.0
"""What an audit looks at on a host: who listens, files and their modes, containers, units, certificates, logins. It
reads; nothing is judged here."""

from __future__ import annotations

import base64
import calendar
import contextlib
import grp
import hashlib
import json
import os
import pwd
import re
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import bounded, engine, firewall, http
from .bounded import BoundsError
from .copies import PLACES, SHORTEST, search
from .docker import Docker
from .registry import LOGINS
from .releases import Store

SECONDS = 10.0
COPIES_SECONDS = 40.0
MOST = 200  # entries of a list
UNITS = Path("/etc/systemd/system")
HAPROXY = Path("/etc/haproxy/sparkfleet")
PROXY_FILE = UNITS / "docker.service.d" / "sparkfleet-proxy.env"
CERTIFICATE = HAPROXY / "gateway.pem"
NAMESPACES = ("NetworkMode", "PidMode", "IpcMode", "UTSMode", "UsernsMode")
#: The last line of a unit, as the roles write it.
_CHECKSUM = re.compile(r"^# SHA-256 of the lines above: ([0-9a-f]{64})\n", re.M)
SSHD = ("permitrootlogin", "passwordauthentication", "permitemptypasswords", "kbdinteractiveauthentication")


def look(project_dir: str, state_dir: str, token_file: str, docker: Docker) -> dict[str, Any]:
    """Everything, as plain data; a part that cannot be read is `{"error": REASON}`."""
    store = Store(project_dir, state_dir)
    secrets = secret_files(project_dir, token_file)
    parts: dict[str, Callable[[], Any]] = {
        "listeners": listeners,
        "secrets": lambda: [known for path in secrets if (known := about(path))],
        "files": lambda: ours(project_dir),
        "copies": lambda: copies(secrets),
        "docker_logins": docker_logins,
        "containers": lambda: containers(docker),
        "firewall": firewall.closed,
        "docker_users": docker_users,
        "releases": lambda: releases(store, docker),
        "units": units,
        "certificates": lambda: [known for path in (CERTIFICATE,) if (known := certificate(path))],
        "sshd": sshd,
        "updates": updates,
        "sudo": sudo,
    }
    return {"now": time.time(), **{name: part(read) for name, read in parts.items()}}


def part(read: Callable[[], Any]) -> Any:
    """What is read, or why it cannot be."""
    try:
        return read()
    except Exception as error:
        return {"error": bounded.printable(f"{type(error).__name__}: {error}", 300)}


def run(*words: str) -> str:
    """What a program prints. Raises OSError, subprocess.SubprocessError."""
    # Those of a login of root, whatever sudo and sshd made of it.
    environment = {**os.environ, "PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"}
    return subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, check=True, env=environment).stdout


# -- who listens -----------------------------------------------------------------------------------------------------


def listeners() -> list[dict[str, Any]]:
    """TCP sockets that listen: {address, port, process}."""
    found: dict[str, dict[str, Any]] = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text(encoding="ascii").splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A":
                    address, _, port = fields[1].rpartition(":")
                    entry = {"address": plain_address(address), "port": int(port, 16), "process": ""}
                    found[f"socket:[{fields[9]}]"] = entry
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if (known := found.get(str(link.readlink()))) and not known["process"]:
                known["process"] = Path(f"/proc/{link.parts[2]}/comm").read_text(encoding="utf-8").strip()
    unique = {(item["address"], item["port"]): item for item in found.values()}
    return sorted(unique.values(), key=lambda item: (item["port"], item["address"]))[:MOST]


def plain_address(words: str) -> str:
    """An address as /proc/net/tcp has it, in 32-bit words of the host's order."""
    data = b"".join(bytes.fromhex(words[at : at + 8])[::-1] for at in range(0, len(words), 8))
    if data[:12] == b"\0" * 10 + b"\xff\xff":
        data = data[12:]
    if len(data) == 4:
        return ".".join(map(str, data))
    if not any(data):
        return "::"
    return "::1" if data == b"\0" * 15 + b"\1" else ":".join(data[at : at + 2].hex() for at in range(0, 16, 2))


# -- files -----------------------------------------------------------------------------------------------------------


def secret_files(project_dir: str, token_file: str) -> list[Path]:
    """Files that have secrets, as far as Sparkfleet writes them."""
    keys = [Path(f"{http.KEY_FILE}{end}") for end in ("", ".next", ".previous")]
    gateway = [HAPROXY / name for name in ("keys", "engine_keys", "gateway.pem", "gateway.pem.key")]
    return [Path(token_file), *keys, Path(LOGINS), Path(project_dir) / ".env", PROXY_FILE, *gateway]


def about(path: Path) -> dict[str, Any] | None:
    """{path, mode, owner, age (days)} of a file; None where there is none."""
    try:
        info = path.lstat()
    except OSError:
        return None
    age = (time.time() - info.st_mtime) / 86400
    return {"path": str(path), "mode": f"{stat.S_IMODE(info.st_mode):04o}", "owner": name_of(info.st_uid), "age": age}


def name_of(user: int) -> str:
    """The name of a user, or the number."""
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)


def ours(project_dir: str) -> list[dict[str, Any]]:
    """Files and folders that decide what runs, as far as others than root may change them."""
    tops = [Path(project_dir), Path("/etc/sparkfleet"), Path("/var/lib/sparkfleet"), HAPROXY]
    paths = [*UNITS.glob("sparkfleet-*"), Path("/etc/haproxy/haproxy.cfg"), *_below(tops)]
    return [known for path in paths if (known := _writable(path))][:MOST]


def _below(tops: Sequence[Path]) -> Iterator[Path]:
    for top in tops:
        yield top
        for folder, folders, names in os.walk(top):
            yield from (Path(folder, name) for name in (*folders, *names))


def _writable(path: Path) -> dict[str, Any] | None:
    try:
        info = path.lstat()
    except OSError:
        return None
    if stat.S_ISLNK(info.st_mode) or (info.st_uid == 0 and not info.st_mode & 0o022):
        return None
    return about(path)


def copies(paths: Sequence[Path]) -> dict[str, Any]:
    """Where else the secrets of these files are: {found: [about], searched, unfinished}."""
    values = held(paths)
    if not values:
        return {"found": [], "searched": 0, "unfinished": False}
    result: dict[str, Any] = search(sorted(values), PLACES, list(map(str, paths)), COPIES_SECONDS)
    # The engine has its key in its environment, which is root's.
    known = [about(Path(path)) for path in result["found"] if not path.startswith("/proc/")]
    return {**result, "found": [item for item in known if item][:MOST]}


def held(paths: Sequence[Path]) -> set[str]:
    """The secrets in these files."""
    values: set[str] = set()
    for path in paths:
        with contextlib.suppress(OSError, BoundsError):
            values.update(values_of(path, bounded.read_file(path, 1 << 20).decode("utf-8", "replace")))
    return values


def values_of(path: Path, text: str) -> Iterator[str]:
    """The secrets in one of Sparkfleet's files."""
    if path.suffix == ".pem":
        return
    if path == Path(LOGINS):
        with contextlib.suppress(ValueError, AttributeError, TypeError, KeyError):
            for entry in json.loads(text)["auths"].values():
                yield entry["auth"]
                yield base64.b64decode(entry["auth"]).decode("utf-8", "replace").partition(":")[2]
        return
    for line in filter(None, map(str.strip, text.splitlines())):
        if path.name == "engine_keys":
            word = line.split()[-1]
        elif path.name == "keys":
            word = line.split()[0]
        elif path == PROXY_FILE:
            found = re.search(r"://[^/:@]*:([^/]+)@", line)
            word = found[1] if found else ""
        else:
            word = line.partition("=")[2] or line
        if len(word) >= max(SHORTEST, 8):
            yield word


def docker_logins() -> list[dict[str, Any]]:
    """Docker's own configuration files with passwords in them, as `docker login` leaves them."""
    found = []
    homes = {entry.pw_dir for entry in pwd.getpwall()}
    for path in sorted({Path(home) / ".docker" / "config.json" for home in homes}):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            auths = bounded.read_json(path).get("auths") or {}
            names = [name for name, entry in auths.items() if isinstance(entry, dict) and entry.get("auth")]
            if names and (known := about(path)):
                found.append({**known, "registries": [bounded.printable(name, 100) for name in names[:20]]})
    return found[:MOST]


# -- Docker ----------------------------------------------------------------------------------------------------------


def containers(docker: Docker) -> list[dict[str, Any]]:
    """The containers that run: what each may do to the host, and who may reach it. `ours`: of the project; `key`: it
    has the engine's key."""
    found = []
    for item in docker.containers(all=False)[:MOST]:
        detail = docker.container(item["Id"])
        if detail is None:
            continue
        host, config = detail["HostConfig"], detail["Config"]
        binds = [mount for mount in detail.get("Mounts") or [] if mount.get("Source")]  # a tmpfs has none
        # As Docker chose them, such as for `-P`; the wish alone where it names none.
        bindings = (detail.get("NetworkSettings") or {}).get("Ports") or host.get("PortBindings") or {}
        found.append(
            {
                "name": str(detail["Name"]).lstrip("/"),
                "image": str(config.get("Image") or ""),
                "ours": (config.get("Labels") or {}).get(engine.PROJECT_LABEL) == engine.PROJECT,
                "privileged": bool(host.get("Privileged")),
                "mounts": [mounted(mount) for mount in binds[:MOST]],
                "host": [name for name in NAMESPACES if host.get(name) == "host"],
                "capabilities": [str(name) for name in host.get("CapAdd") or []],
                "key": http.KEY_FILE in [mount["Source"] for mount in binds],
                "published": [*published(bindings)][:MOST],
            }
        )
    return found


def mounted(mount: Mapping[str, Any]) -> dict[str, Any]:
    """{source, writable} of a mount; `/var/run` and whatever else is a link is what it names."""
    return {"source": os.path.realpath(str(mount["Source"])), "writable": mount.get("RW") is not False}


def published(bindings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """{address, port, protocol} of each port of the host that a container has."""
    for inside, binds in bindings.items():
        for bind in binds or []:
            if str(bind.get("HostPort") or "").isdecimal():
                address = bind.get("HostIp") or "0.0.0.0"  # noqa: S104 - what Docker takes it for
                protocol = inside.partition("/")[2] or "tcp"
                yield {"address": address, "port": int(bind["HostPort"]), "protocol": protocol}


def docker_users() -> list[str]:
    """Members of the group docker, who are root in effect."""
    try:
        group = grp.getgrnam("docker")
    except KeyError:
        return []
    primary = [entry.pw_name for entry in pwd.getpwall() if entry.pw_gid == group.gr_gid]
    return sorted({*group.gr_mem, *primary} - {"root"})[:MOST]


def releases(store: Store, docker: Docker) -> dict[str, Any]:
    """{current, damage (of the current one), images: [{service, locked, runs}]}."""
    number = store.current()
    if number is None:
        return {"current": None, "damage": [], "images": []}
    images = []
    for item in store.engines(number):
        detail = docker.container(item.service)
        there = docker.image(item.image) if item.image else None
        images.append(
            {
                "service": item.service,
                "locked": item.image,
                "wanted": str((there or {}).get("Id") or ""),
                "runs": str((detail or {}).get("Image") or ""),
            }
        )
    return {"current": number, "damage": store.damage(number), "images": images}


# -- the system ------------------------------------------------------------------------------------------------------


def units() -> list[dict[str, Any]]:
    """Sparkfleet's units: {name, path, drop_ins, reload (its file is newer than what systemd has read), edited (its
    file is not what was written), state}."""
    names = sorted(path.name for path in UNITS.glob("sparkfleet-*.*") if path.suffix in (".service", ".timer", ".path"))
    found = []
    for name in names[:MOST]:
        keys = "FragmentPath,DropInPaths,NeedDaemonReload,UnitFileState,ActiveState"
        shown = dict(
            line.partition("=")[::2] for line in run("systemctl", "show", f"--property={keys}", name).splitlines()
        )
        found.append(
            {
                "name": name,
                "path": shown.get("FragmentPath", ""),
                "drop_ins": shown.get("DropInPaths", "").split(),
                "reload": shown.get("NeedDaemonReload") == "yes",
                "edited": edited(UNITS / name),
                "state": shown.get("ActiveState", ""),
            }
        )
    return found


def edited(path: Path) -> bool:
    """Whether a unit is another than its checksum says; one without a checksum is not known to be."""
    try:
        text = bounded.read_file(path, 1 << 20).decode("utf-8", "replace")
    except FileNotFoundError:  # removed meanwhile
        return False
    found = _CHECKSUM.search(text)
    if found is None:
        return False
    return hashlib.sha256(text[: found.start()].encode()).hexdigest() != found[1] or found.end() != len(text)


def certificate(path: Path) -> dict[str, Any] | None:
    """{path, ends (Unix time)} of a certificate; None where there is none."""
    if not path.is_file():
        return None
    ends = run("openssl", "x509", "-noout", "-enddate", "-in", str(path)).strip().partition("=")[2]
    moment = time.strptime(ends, "%b %d %H:%M:%S %Y %Z")
    return {"path": str(path), "ends": float(calendar.timegm(moment))}


def sshd() -> dict[str, str]:
    """Settings of sshd that decide who may log in how, as it has read them."""
    lines = (line.partition(" ") for line in run("sshd", "-T").splitlines())
    return {name.lower(): value.strip() for name, _, value in lines if name.lower() in SSHD}


def updates() -> dict[str, Any]:
    """Whether security updates are installed by themselves: {installed, enabled}."""
    installed = Path("/usr/bin/unattended-upgrade").exists()
    shown = run("apt-config", "dump", "APT::Periodic")
    values: Mapping[str, str] = dict(re.findall(r'^APT::Periodic::([\w-]+) "([^"]*)";$', shown, re.M))
    on = all(values.get(name, "0") not in ("0", "") for name in ("Update-Package-Lists", "Unattended-Upgrade"))
    return {"installed": installed, "enabled": on}


def sudo() -> list[str]:
    """Users and groups that may do everything without a password."""
    found = []
    for path in (Path("/etc/sudoers"), *sorted(Path("/etc/sudoers.d").glob("*"))):
        with contextlib.suppress(OSError, UnicodeError):
            for line in path.read_text(encoding="utf-8").splitlines():
                match = re.match(r"\s*(?P<who>[%\w.-]+)\s.*NOPASSWD:\s*ALL\s*$", line)
                if match:
                    found.append(match["who"])
    return found[:MOST]
