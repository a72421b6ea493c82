"""A hunt for secrets: six are planted in the inventory of simulated Sparks, every verb is run, at -vvv as well, runs
that fail too, the controller is killed; then all that was printed, kept and left is searched for them.

    python -m simulator.canaries --world NAME [--json FILE]

The world has the engine that fails on command; SPARKFLEET_GATEWAYS=spark-1 makes the first Spark the gateway. A proxy
that asks for a password runs in the world's internet, whose registry demands a login meanwhile.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from sparkfleet_host import copies

from simulator import keys
from simulator.shell import SimulatorError, expect
from simulator.spark import ROOT, Spark
from simulator.world import World, run_in

NEXT = "nvcr.io/nvidia/vllm:25.10-py3"
PROXY_PORT = 3128
USER = "$oauthtoken"  # as NGC has it
#: Files on a host that are to have a secret, 0600 and root's.
OWN = {
    *("/etc/sparkfleet/hf_token", "/etc/sparkfleet/engine_key", "/etc/sparkfleet/registry_logins.json"),
    *("/etc/haproxy/sparkfleet/keys", "/etc/haproxy/sparkfleet/engine_keys"),
    "/etc/systemd/system/docker.service.d/sparkfleet-proxy.env",
}
#: Processes that have a secret in their environment, which root alone can read: Docker the proxy's, an engine its key.
OWN_PROCESSES = ("dockerd", "containerd", "docker-proxy", "docker", "vllm", "python3", "sh")
SECONDS = 600
BASE = {"sparkfleet_start_timeout": 40, "sparkfleet_guard_interval": 0.5, "sparkfleet_all_at_once": True}

PROXY = """
import base64, os, select, socket, socketserver, sys
open("/run/proxy.pid", "w").write(str(os.getpid()))
WANTED = "Basic " + base64.b64encode(sys.argv[1].encode()).decode()

class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        line = self.rfile.readline(65536).decode("latin-1").split()
        headers, raw = {}, []
        while (text := self.rfile.readline(65536)) not in (b"\\r\\n", b""):
            name, _, value = text.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
            if name.lower() != "proxy-authorization":
                raw.append(text)
        if headers.get("proxy-authorization") != WANTED:
            return self.wfile.write(
                b"HTTP/1.1 407 Proxy Authentication Required\\r\\nProxy-Authenticate: Basic realm=x\\r\\n"
                b"Content-Length: 0\\r\\nConnection: close\\r\\n\\r\\n")
        method, target, version = line
        if method == "CONNECT":
            host, _, port = target.rpartition(":")
        else:
            host, _, rest = target.partition("://")[2].partition("/")
            host, _, port = host.partition(":")
        # The simulated internet is on this machine; package mirrors are the real ones.
        other = socket.create_connection(("127.0.0.1" if host in sys.argv[3:] else host, int(port or 80)), timeout=60)
        if method == "CONNECT":
            self.wfile.write(b"HTTP/1.1 200 OK\\r\\n\\r\\n")
        else:
            other.sendall(f"{method} /{rest} HTTP/1.0\\r\\n".encode() + b"".join(raw) + b"\\r\\n")
        pair = {self.connection: other, other: self.connection}
        while True:
            for ready in select.select(list(pair), [], [], 300)[0]:
                data = ready.recv(65536)
                if not data:
                    return
                pair[ready].sendall(data)

class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True

Server(("", int(sys.argv[2])), Handler).serve_forever()
"""


@dataclasses.dataclass(frozen=True)
class Hit:
    """A secret where it must not be."""

    secret: str
    place: str


class Hunt:
    """The Sparks of a world with an inventory that has the secrets, and all that runs print."""

    def __init__(self, world: World) -> None:
        self.world, self.folder = world, world.folder / "canaries"
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "inventory" / "group_vars").mkdir(parents=True, mode=0o700)
        self.names = sorted(world.state()["sparks"])
        token = (world.folder / "hf_token").read_text(encoding="utf-8").strip()
        names = ("engine", "client", "registry", "proxy", "vault")
        made = {name: f"canary-{name}-{os.urandom(12).hex()}" for name in names}
        self.secrets = {"hub": token, **made}
        self.printed: list[tuple[str, str]] = []
        self.codes: dict[str, int] = {}
        self.began = time.time()

    def plant(self) -> None:
        """Write the inventory: each secret from another kind of source."""
        internet = self.world.container("internet")
        address = run_in(internet, ["hostname", "-i"])[1].split()[0]
        stop = "[ ! -f /run/proxy.pid ] || kill $(cat /run/proxy.pid) || true"
        run_in(internet, ["sh", "-c", f"{stop}; cat >/run/proxy.py <<'END'\n{PROXY}\nEND"])
        login = f"fleet:{self.secrets['proxy']}"
        internet.exec_run(["python3", "/run/proxy.py", login, str(PROXY_PORT), *keys.NAMES], detach=True)
        files = {
            "client": self.secrets["client"],
            "proxy": f"http://{login}@{address}:{PROXY_PORT}",
            "vault": self.secrets["vault"],
        }
        self.world.demand_login(USER, self.secrets["registry"])
        for name, text in files.items():
            path = self.folder / name
            path.touch(mode=0o600)
            path.write_text(text + "\n", encoding="utf-8")
        done = subprocess.run(
            ["ansible-vault", "encrypt_string", "--stdin-name", "sparkfleet_engine_key"],
            input=self.secrets["engine"],
            env=self.environment(),
            capture_output=True,
            text=True,
            check=True,
        )
        command = {"command": ["cat", str(self.folder / "client")]}
        password = {"env": "CANARY_REGISTRY"}
        values = {
            **BASE,
            "sparkfleet_hf_token": {"file": str(self.world.folder / "hf_token")},
            "sparkfleet_gateway_keys": [{"name": "web", "key": command}],
            "sparkfleet_proxy": {"file": str(self.folder / "proxy")},
            "sparkfleet_registry_logins": {"nvcr.io": {"username": USER, "password": password}},
        }
        place = self.folder / "inventory"
        (place / "group_vars" / "all.yml").write_text(f"{yaml.safe_dump(values)}{done.stdout}", encoding="utf-8")
        shutil.copy(ROOT / "inventory" / "simulated" / "sparks.py", place / "sparks.py")

    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "SPARKFLEET_WORLD": self.world.name,
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_VAULT_PASSWORD_FILE": str(self.folder / "vault"),
            "CANARY_REGISTRY": self.secrets["registry"],
        }

    def start(self, *words: str, **variables: Any) -> subprocess.Popen[str]:
        """Begin a run in a session of its own."""
        more = ["-e", json.dumps(variables)] if variables else []
        return subprocess.Popen(
            [str(Path(sys.executable).with_name(words[0])), *words[1:], "-i", str(self.folder / "inventory"), *more],
            cwd=ROOT,
            env=self.environment(),
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def run(self, *words: str, codes: Sequence[int] = (0,), **variables: Any) -> str:
        """Run it to its end; it must have one of these exit codes."""
        name, began = " ".join([*words, *map(str, variables.values())]), time.monotonic()
        process = self.start(*words, **variables)
        printed = process.communicate(timeout=SECONDS)[0]
        self.printed.append((name, printed))
        self.codes[name] = process.returncode
        print(f"{time.monotonic() - began:6.1f} s  exit {process.returncode}  {name}", flush=True)
        if process.returncode not in codes:
            raise SimulatorError(f"{name}: exit code {process.returncode}: {printed[-3000:]}")
        return printed

    def verbs(self) -> None:
        """Every verb, as a command and as a playbook at -vvv."""
        play, verb = ("ansible-playbook", "-vvv"), "sparkfleet"
        limit = ("-l", self.names[0])
        self.run(*play, "site.yml", "--check", "--diff", codes=(0, 2))
        self.run(*play, "site.yml")
        for name in ("preflight", "deploy", "verify", "status", "drift", "logs", "restart", "rollout"):
            self.run(verb, name, *limit, codes=(0, 4))
        self.run(verb, "diagnose", *limit, codes=(0, 4, 6))
        self.run(verb, "audit", codes=(0, 5))
        self.run(verb, "audit", "--json", codes=(0, 5))
        for name in ("status", "drift", "diagnose", "audit", "verify", "restart", "stop", "start", "gateway", "plan"):
            self.run(*play, f"playbooks/{name}.yml", *limit, codes=(0, 2))
        # The registry demands its login: without it an image that is not there yet is refused, with it it is pulled.
        refused = self.run(*play, "site.yml", *limit, codes=(2,), sparkfleet_image=NEXT, sparkfleet_registry_logins={})
        expect("image-denied" in refused, "an image without a login is refused", refused[-3000:])
        self.run(verb, "upgrade", NEXT, *limit, codes=(0,))
        self.run(verb, "rollback", *limit)
        self.run(verb, "rotate", "hub-token")
        self.run(*play, "playbooks/rotate.yml", sparkfleet_rotate="engine_key")
        self.run(*play, "playbooks/rotate.yml", sparkfleet_rotate="client_key", sparkfleet_client="web")
        self.run(verb, "bundle", str(self.folder / "bundle"), *limit, codes=(0, 2, 3, 6))
        self.run(verb, "lock", codes=(0, 2, 4, 7))

    def failures(self) -> None:
        """Runs that fail, each at another place."""
        play, limit = ("ansible-playbook", "-vvv", "site.yml"), ("-l", f"{self.names[0]},localhost")
        self.run(*play, *limit, codes=(2,), sparkfleet_image="nvcr.io/nvidia/vllm:0.0-none")
        self.run(*play, *limit, codes=(2,), sparkfleet_environment={"SIMULATED_FAULT": "answer-wrong"})
        self.run(*play, *limit, codes=(2,), sparkfleet_engine_key={"file": "/nowhere/key"})
        self.run(*play, *limit, codes=(2,), sparkfleet_hf_token={"command": ["false"]})
        self.run(*play, *limit, codes=(2,), sparkfleet_port="many")
        self.run("ansible-playbook", "-vvv", "playbooks/gateway.yml", codes=(2,), sparkfleet_gateway_ports={"none": 1})

    def kill(self) -> None:
        """The controller dies in the middle of a deployment, as a command and as a playbook."""
        commands = (("sparkfleet", "upgrade", NEXT), ("ansible-playbook", "-vvv", "site.yml"))
        for words, seconds in ((words, seconds) for words in commands for seconds in (4, 9)):
            process = self.start(*words, "-l", f"{self.names[0]},localhost")
            time.sleep(seconds)
            children = below(process.pid)
            for pid in (process.pid, *children):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            self.printed.append((f"SIGKILL after {seconds} s: {' '.join(words)}", process.communicate(timeout=60)[0]))
            print(f"         killed after {seconds} s  {' '.join(words)}", flush=True)
        time.sleep(5)
        self.run("ansible-playbook", "site.yml")

    # -- the search ----------------------------------------------------------------------------------------

    def forms(self) -> dict[str, str]:
        """Each secret as it may be written -> its name."""
        found = {}
        users = {"registry": USER, "proxy": "fleet"}
        for name, value in self.secrets.items():
            found[value] = name
            found[urllib.parse.quote(value, safe="")] = name
            if name in users:
                found[base64.b64encode(f"{users[name]}:{value}".encode()).decode()] = name
        return found

    def hits(self) -> tuple[list[Hit], dict[str, int]]:
        """Where secrets are that must not be there, and the number of places searched, by kind."""
        forms, found, places = self.forms(), [], {"printed": len(self.printed)}
        for name, text in self.printed:
            found += [Hit(secret, f"printed by {name}") for form, secret in forms.items() if form in text]
        controller = list(self.left())
        places["controller"] = len(controller)
        for path in controller:
            for where, data in contents(path):
                found += [Hit(secret, where) for form, secret in forms.items() if form.encode() in data]
        places["hosts"] = 0
        for name in self.names:
            number, hits = self.host(name)
            places["hosts"] += number
            found += hits
        return sorted(set(found), key=str), places

    def left(self) -> Iterator[Path]:
        """Files that runs have written on this controller."""
        own = {self.folder / name for name in ("client", "proxy", "vault")}
        folders = [ROOT / ".sparkfleet", Path("~/.ansible").expanduser(), Path("/dev/shm"), self.folder]  # noqa: S108
        folders += [path for path in Path("/tmp").iterdir() if re.match(r"sparkfleet|ansible", path.name)]  # noqa: S108
        for top in folders:
            for path in top.rglob("*") if top.is_dir() else [top]:
                with contextlib.suppress(OSError):
                    new = path.is_file() and not path.is_symlink() and path.stat().st_mtime >= self.began - 1
                    if new and path not in own:
                        yield path

    def host(self, name: str) -> tuple[int, list[Hit]]:
        """The search on a Spark."""
        spark, found, number = Spark(self.world, name, {}), [], 0
        source = Path(copies.__file__).read_text(encoding="utf-8")
        script = f"{source}\nimport json, sys\nprint(json.dumps(search([sys.argv[1]], PLACES, [], 300)))\n"
        container = self.world.container(name)
        run_in(container, ["sh", "-c", "cat >/opt/canaries.py <<'END'\n" + script + "\nEND"])
        for form, secret in self.forms().items():
            code, output = run_in(container, ["python3", "/opt/canaries.py", form])
            if code:
                raise SimulatorError(f"{name}: {output[-500:]}")
            result = json.loads(output)
            number = result["searched"]
            for place in result["found"]:
                if place in OWN and spark.sh(f"stat -c '%a %U' {place}").strip() == "600 root":
                    continue
                if place.endswith("/environ"):
                    with contextlib.suppress(SimulatorError):
                        if spark.sh(f"cat /proc/{place.split('/')[2]}/comm").strip() in OWN_PROCESSES:
                            continue
                found.append(Hit(secret, f"{name}:{place}"))
        return number, found


def below(pid: int) -> list[int]:
    """All processes below one."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            if int(path.read_text(encoding="utf-8").rpartition(")")[2].split()[1]) == pid:
                child = int(path.parent.name)
                found += [child, *below(child)]
    return found


def contents(path: Path) -> Iterator[tuple[str, bytes]]:
    """What is in a file; of an archive each of its members."""
    with contextlib.suppress(OSError):
        if path.name.endswith(".tar.gz"):
            with contextlib.suppress(tarfile.TarError), tarfile.open(path) as archive:
                for member in archive:
                    if data := archive.extractfile(member):
                        yield f"{path}:{member.name}", data.read()
        else:
            with path.open("rb") as file:
                yield str(path), file.read(256 << 20)


def main(argv: Sequence[str] | None = None) -> int:
    """Plant, run, search; 1 where a secret is where it must not be."""
    parser = argparse.ArgumentParser(prog="python -m simulator.canaries", description="A hunt for secrets.")
    parser.add_argument("--world", default="canaries")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    hunt = Hunt(World(options.world, lambda text: None))
    hunt.plant()
    try:
        for part in (hunt.verbs, hunt.failures, hunt.kill):
            part()
    except SimulatorError as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    finally:
        hunt.world.demand_login()
    hits, places = hunt.hits()
    for hit in hits:
        print(f"HIT {hit.secret}: {hit.place}")
    print(f"{len(hunt.secrets)} secrets, {len(hunt.printed)} runs, places {places}, {len(hits)} hits")
    if options.json:
        found = {"secrets": sorted(hunt.secrets), "runs": hunt.codes, "places": places}
        options.json.write_text(json.dumps({**found, "hits": list(map(vars, hits))}, indent=2) + "\n", encoding="utf-8")
    return 1 if hits else 0


if __name__ == "__main__":
    sys.exit(main())
