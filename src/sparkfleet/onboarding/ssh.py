"""Hosts over ssh, with the user's ssh and settings: their keys, a login, and one inspection.

Nothing is accepted silently: a host key that is not known is shown, and saved only if the user agrees.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import getpass
import hashlib
import hmac
import ipaddress
import os
import re
import secrets
import selectors
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from sparkfleet_host.bounded import HOST, MIB, BoundsError, printable

from sparkfleet import SparkfleetError
from sparkfleet.user_paths import expanded

#: Seconds for the connection, and for a complete inspection.
CONNECT_SECONDS = 8
INSPECT_SECONDS = 40
PORT = 22
#: Kinds of host keys, the best first.
KEYS = ("ssh-ed25519", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521", "ssh-rsa")
#: Limit of a command's output in bytes; an inspection needs a few hundred.
OUTPUT = MIB
_BASE64 = re.compile(r"(?:[A-Za-z0-9+/]{4}){4,1000}(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?")
_USER = re.compile(r"[A-Za-z_][A-Za-z0-9._-]*")
#: Read by sh on the host, after a line that sets `mark`; changes nothing. `sudo -k COMMAND`
#: ignores cached credentials.
_SCRIPT = r"""
say() { printf '%s:%s=%s\n' "$mark" "$1" "$2"; }
say hostname "$(hostname -s 2>/dev/null || uname -n)"
say user "$(id -un)"
say machine "$(cat /etc/machine-id 2>/dev/null)"
say gpu "$(timeout 15 nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)"
say total "$(sed -n 's/^MemTotal: *\([0-9]*\) kB$/\1/p' /proc/meminfo)"
say available "$(sed -n 's/^MemAvailable: *\([0-9]*\) kB$/\1/p' /proc/meminfo)"
say python "$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)"
if [ "$(id -u)" = 0 ]; then say sudo root
elif ! command -v sudo >/dev/null 2>&1; then say sudo missing
elif sudo -kn true 2>/dev/null; then say sudo yes
else say sudo password; fi
say end yes
"""


@dataclasses.dataclass(frozen=True)
class Place:
    """How to reach a host. No address: this machine. No user, port 0: ssh's own defaults."""

    address: str = ""
    user: str = ""
    port: int = 0
    private_key: str = ""
    common_args: str = ""

    @property
    def local(self) -> bool:
        """Whether it is this machine."""
        return not self.address

    @property
    def text(self) -> str:
        """As people write it."""
        if self.local:
            return "this machine"
        host = f"[{self.address}]" if ":" in self.address and self.port else self.address
        return (f"{self.user}@" if self.user else "") + host + (f":{self.port}" if self.port else "")

    def words(self) -> list[str]:
        """Options of ssh, without the host."""
        words = split(self.common_args)
        words += ["-i", self.private_key] if self.private_key else []
        words += ["-p", str(self.port)] if self.port else []
        return words + (["-l", self.user] if self.user else [])

    def command(self, program: str = "ssh") -> str:
        """The command to log in."""
        login = f"{self.user}@{self.address}" if self.user else self.address
        words = [*split(self.common_args), *(["-i", self.private_key] if self.private_key else [])]
        return shlex.join([program, *words, *(["-p", str(self.port)] if self.port else []), login])


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the inspection found; sizes in bytes. `sudo`: yes, password, root or missing. `python`: 3.12, or empty."""

    hostname: str
    user: str
    machine: str
    gpu: str
    total: int
    available: int
    python: str
    sudo: str

    @property
    def identity(self) -> tuple[str, str]:
        """Identical for two addresses of one machine."""
        return self.machine, self.hostname


@dataclasses.dataclass(frozen=True)
class Inspection:
    """Result of an inspection: facts, or a problem (unreachable, key-unknown, key-changed, login, answer) with
    ssh's message; `answer` means an unusable answer."""

    facts: Facts | None = None
    problem: str = ""
    message: str = ""

    @property
    def takes_passwords(self) -> bool:
        """Whether a refused login might work with a password, so that ssh-copy-id can."""
        return "password" in self.message or "keyboard-interactive" in self.message


@dataclasses.dataclass(frozen=True)
class HostKey:
    """A host key as it was offered: `kind` and `data` as in known_hosts."""

    kind: str
    data: str

    @property
    def fingerprint(self) -> str:
        """As `ssh-keygen -l` prints it."""
        digest = hashlib.sha256(base64.b64decode(self.data)).digest()
        return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def parse(text: str) -> Place:
    """A host of the command line, [user@]name-or-address[:port]; localhost is this machine. Raises SparkfleetError."""
    user, at, rest = text.rpartition("@")
    host, port = rest, ""
    if found := re.fullmatch(r"\[([^\]]+)\](?::(.+))?", rest):
        host, port = found[1], found[2] or ""
    elif rest.count(":") == 1:
        host, _, port = rest.partition(":")
    if bool(user) != bool(at) or (user and not _USER.fullmatch(user)):
        raise SparkfleetError(f"host '{text}': '{user}' is not a valid user name")
    if not HOST.fullmatch(host) and not is_address(host):
        raise SparkfleetError(f"host '{text}': use [user@]name-or-address[:port], such as nvidia@spark-1a2b.local")
    if rest.endswith(":") or (port and not (re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 65536)):
        raise SparkfleetError(f"host '{text}': '{port}' is not a TCP port")
    if host == "localhost" and not user and not port:
        return Place()
    return Place(host, user, int(port or 0))


def split(arguments: str) -> list[str]:
    """Arguments of ssh as a shell would have them. Raises SparkfleetError."""
    try:
        return shlex.split(arguments)
    except ValueError as error:
        raise SparkfleetError(f"arguments of ssh {arguments!r}: {error}") from None


def is_address(text: str) -> bool:
    """Whether it is an IP address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _run(argv: Sequence[str], seconds: float, script: str = "") -> subprocess.CompletedProcess[str]:
    """A command with its output in English. Raises SparkfleetError when it is not installed, TimeoutExpired, and
    BoundsError for more than OUTPUT bytes of output."""
    pipe, over = subprocess.PIPE, time.monotonic() + seconds
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        child = subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe, env=environment)
    except FileNotFoundError:
        raise SparkfleetError(f"{argv[0]} is not installed: install OpenSSH's client (openssh-client)") from None
    except (OSError, ValueError) as error:  # arguments too long, or with a NUL
        raise SparkfleetError(f"{argv[0]} cannot be run with these arguments: {error}") from None
    with child, selectors.DefaultSelector() as selector:
        assert child.stdin and child.stdout and child.stderr
        try:
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(script.encode())  # less than a pipe holds
                child.stdin.close()
            output = {child.stdout.fileno(): b"", child.stderr.fileno(): b""}
            for handle in output:
                selector.register(handle, selectors.EVENT_READ)
            while selector.get_map():
                ready = selector.select(max(over - time.monotonic(), 0))
                if not ready:
                    raise subprocess.TimeoutExpired(argv, seconds)
                for key, _ in ready:
                    data = os.read(key.fd, 1 << 16)
                    output[key.fd] += data
                    if not data:
                        selector.unregister(key.fd)
                    if len(output[key.fd]) > OUTPUT:
                        raise BoundsError(f"more than {OUTPUT} bytes")
            child.wait(max(over - time.monotonic(), 0.1))
        except BaseException:
            child.kill()
            raise
        out, error_text = (data.decode(errors="replace") for data in output.values())
        return subprocess.CompletedProcess(argv, child.returncode, out, error_text)


def settings(place: Place) -> dict[str, str]:
    """ssh's effective settings: the first value of each, names in lower case. Raises SparkfleetError."""
    try:
        done = _run(["ssh", "-G", *place.words(), "--", place.address], CONNECT_SECONDS)
    except (subprocess.TimeoutExpired, BoundsError) as error:
        raise SparkfleetError(f"ssh -G {place.address} failed: {printable(str(error), 300)}") from None
    if done.returncode:
        raise SparkfleetError(f"ssh rejects its options: {_last(done.stderr)}")
    found: dict[str, str] = {}
    for line in done.stdout.splitlines():
        name, _, value = line.partition(" ")
        if name == "identityfile":
            found[name] = f"{found[name]}\n{value}" if name in found else value
        else:
            found.setdefault(name, value)
    return found


def inspect(place: Place) -> Inspection:
    """Log in and inspect the host, once. Raises SparkfleetError if ssh is not installed here."""
    argv = ["sh", "-s"]
    if not place.local:
        asks = ["-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}"]
        # A shared connection that stays open would hold our pipe.
        asks += ["-o", "ControlMaster=no", "-o", "ControlPath=none", "-T"]
        argv = ["ssh", *asks, *place.words(), "--", place.address, *argv]
    # The mark is unpredictable, so login output of the shell is never mistaken for an answer.
    mark = f"sparkfleet-{secrets.token_hex(8)}"
    try:
        done = _run(argv, INSPECT_SECONDS, f"mark={mark}\n{_SCRIPT}")
        found = {}
        for line in done.stdout.splitlines():
            name, equals, value = line.removeprefix(f"{mark}:").partition("=")
            if equals and line.startswith(f"{mark}:"):
                found[name] = value
        if found.get("end") == "yes":
            return Inspection(_facts(found))
    except subprocess.TimeoutExpired:
        return Inspection(None, "unreachable", f"no answer within {INSPECT_SECONDS} s")
    except BoundsError as error:
        return Inspection(None, "answer", f"unusable answer: {error}")
    return Inspection(None, *problem(done.stderr))


def _facts(found: Mapping[str, str]) -> Facts:
    """Facts from the script's output. Raises BoundsError for output that a healthy host cannot produce."""

    def number(name: str) -> int:
        text = found.get(name, "")
        if not re.fullmatch(r"[0-9]{0,12}", text):
            raise BoundsError(f"{name} is {printable(text, 40)!r}, not a number of KiB")
        return int(text or 0) * 1024

    def one_of(name: str, pattern: str) -> str:
        text = found.get(name, "")
        if not re.fullmatch(pattern, text):
            raise BoundsError(f"{name} is {printable(text, 40)!r}")
        return text

    def words(name: str) -> str:
        return printable(found.get(name, ""), 120).strip()

    return Facts(
        hostname=words("hostname").partition(".")[0].lower(),
        user=words("user"),
        machine=words("machine"),
        gpu=words("gpu"),
        total=number("total"),
        available=number("available"),
        python=one_of("python", r"([0-9]{1,3}\.[0-9]{1,3})?"),
        sudo=one_of("sudo", "yes|password|root|missing"),
    )


def problem(output: str) -> tuple[str, str]:
    """Why ssh failed, from its output: a problem of `Inspection`, and the line that shows it."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for word, kind in (
        ("HOST IDENTIFICATION HAS CHANGED", "key-changed"),
        ("host key is known for", "key-unknown"),
        ("Permission denied", "login"),
        ("Too many authentication failures", "login"),
        ("Host key verification failed", "key-unknown"),
    ):
        for line in lines:
            if word in line:
                return kind, "its host key has changed" if kind == "key-changed" else _bare(line)
    return "unreachable", _bare(_last(output))


def _bare(line: str) -> str:
    """A line of ssh without its prefix."""
    return printable(re.sub(r"^(ssh|\S{1,300}@\S{1,300}): ", "", line), 300)


def _last(output: str) -> str:
    return next(
        (printable(line.strip(), 300) for line in reversed(output.splitlines()) if line.strip()), "no reason given"
    )


def host_key(place: Place, known: Mapping[str, str]) -> HostKey | None:
    """The best host key offered at the place; None if there is none, or if the connection goes through
    another host. `known` comes from `settings`."""
    if any(known.get(name, "none") != "none" for name in ("proxycommand", "proxyjump")):
        return None
    kinds = "ed25519,ecdsa,rsa"
    argv = ["ssh-keyscan", "-T", str(CONNECT_SECONDS), "-p", known["port"], "-t", kinds, "--", known["hostname"]]
    try:
        done = _run(argv, 4 * CONNECT_SECONDS)
    except (subprocess.TimeoutExpired, BoundsError):
        return None
    offered = [line.split() for line in done.stdout.splitlines() if line and not line.startswith("#")]
    keys = [
        HostKey(words[1], words[2])
        for words in offered
        if len(words) == 3 and words[1] in KEYS and _BASE64.fullmatch(words[2])
    ]
    return min(keys, key=lambda key: KEYS.index(key.kind), default=None)


def known_hosts(place: Place, known: Mapping[str, str]) -> tuple[Path, str]:
    """The file for a new host key, and the name under which ssh looks it up there. Raises SparkfleetError."""
    file = expanded("UserKnownHostsFile", known["userknownhostsfile"].split()[0])
    host = known.get("hostkeyalias") or known["hostname"]
    return file, host if known["port"] == str(PORT) or "hostkeyalias" in known else f"[{host}]:{known['port']}"


def trust(place: Place, key: HostKey, known: Mapping[str, str]) -> Path:
    """Write a host key into the user's known_hosts, as ssh itself does; returns the file. Raises SparkfleetError."""
    file, name = known_hosts(place, known)
    if known.get("hashknownhosts") == "yes":
        salt = secrets.token_bytes(20)
        digest = hmac.new(salt, name.encode(), hashlib.sha1).digest()
        name = f"|1|{base64.b64encode(salt).decode()}|{base64.b64encode(digest).decode()}"
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    before = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a", encoding="utf-8") as stream:
        stream.write(("" if before.endswith("\n") or not before else "\n") + f"{name} {key.kind} {key.data}\n")
    return file


def own_key(place: Place, known: Mapping[str, str]) -> Path | None:
    """The public key that ssh would log in with, or None when there is none. Raises SparkfleetError."""
    named = [place.private_key] if place.private_key else known.get("identityfile", "").splitlines()
    for name in named:
        public = expanded("IdentityFile", f"{name}.pub")
        if public.is_file():
            return public
    return None


def make_key(place: Place, known: Mapping[str, str]) -> Path:
    """Create a key pair (ed25519, no passphrase) in ssh's default location; return the public key. Raises
    SparkfleetError."""
    places = [name for name in known.get("identityfile", "").splitlines() if name.endswith("id_ed25519")]
    private = expanded("IdentityFile", place.private_key or (places or ["~/.ssh/id_ed25519"])[0])
    private.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    comment = f"{getpass.getuser()}@{os.uname().nodename}"
    done = _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(private)], CONNECT_SECONDS)
    if done.returncode:
        raise SparkfleetError(f"ssh-keygen could not create {private}: {_last(done.stderr)}")
    return private.with_name(f"{private.name}.pub")


def copy_command(place: Place, public: Path | None) -> list[str]:
    """ssh-copy-id for a place, which knows -o and -p, but not ssh's other options."""
    words: list[str] = []
    for word in (given := iter(split(place.common_args))):
        words += ["-o", f"ProxyJump={next(given, '')}"] if word == "-J" else [word]
    words += ["-i", str(public)] if public else []
    words += ["-p", str(place.port)] if place.port else []
    return ["ssh-copy-id", *words, f"{place.user}@{place.address}" if place.user else place.address]


def copy_key(place: Place, public: Path) -> bool:
    """Run ssh-copy-id on the terminal, which asks for the password; whether it went well. Raises SparkfleetError."""
    (Path.home() / ".ssh").mkdir(mode=0o700, exist_ok=True)  # it works there, and does not make it
    try:
        return subprocess.run(copy_command(place, public), check=False).returncode == 0
    except FileNotFoundError:
        raise SparkfleetError("ssh-copy-id is not installed: install OpenSSH's client (openssh-client)") from None
