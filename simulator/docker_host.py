"""A Docker engine on this machine: the one that answers, else one of our own making."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import docker

from simulator.shell import SimulatorError, run

SOCKET = Path("/var/run/docker.sock")
PACKAGES = ("docker.io", "mmdebstrap")
START_SECONDS = 60
Say = Callable[[str], None]


def connect() -> docker.DockerClient | None:
    """A client of the engine that answers (DOCKER_HOST, else the usual socket), or None."""
    try:
        client = docker.from_env(timeout=900)
        client.ping()
    except docker.errors.DockerException:
        return None
    return client


def ensure(home: Path, say: Say) -> docker.DockerClient:
    """A client; installs and starts Docker where that is possible without asking (root, apt)."""
    client = connect()
    if client is not None:
        return client
    if os.environ.get("DOCKER_HOST"):
        raise SimulatorError(f"no Docker engine answers at DOCKER_HOST={os.environ['DOCKER_HOST']}: start it")
    if not _may_install():
        raise SimulatorError(
            "no Docker engine answers: install and start Docker (Debian, Ubuntu: sudo apt-get install docker.io), "
            f"and put {os.environ.get('USER', 'yourself')} into the group docker, or run this as root"
        )
    missing = [name for name in PACKAGES if not _installed(name)]
    if missing:
        _install(home, missing, say)
    if Path("/run/systemd/system").is_dir():
        run(["systemctl", "start", "docker.service"], "starting Docker", say)
    else:
        _start(home, say)
    client = connect()
    if client is None:
        raise SimulatorError(f"Docker was started but does not answer; its log: {home / 'dockerd.log'}")
    return client


def ensure_mmdebstrap(home: Path, say: Say) -> None:
    """The program that makes a Debian root file system; installed where that is possible without asking."""
    if shutil.which("mmdebstrap") is None:
        if not _may_install():
            raise SimulatorError("no container registry answers and mmdebstrap is missing: apt-get install mmdebstrap")
        _install(home, ("mmdebstrap",), say)


def _may_install() -> bool:
    return os.geteuid() == 0 and shutil.which("apt-get") is not None


def remove(home: Path, say: Say) -> None:
    """Stop the engine that ensure() started, and remove the packages that it installed, and only those."""
    pid_file, list_file = home / "dockerd.pid", home / "installed.json"
    if pid_file.exists():
        _stop(int(pid_file.read_text(encoding="ascii")))
        pid_file.unlink()
        _restore_network(home / "iptables.rules")
    if list_file.exists():
        names = json.loads(list_file.read_text(encoding="utf-8"))
        say(f"removing {len(names)} Debian packages that were installed for the simulator")
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        done = subprocess.run(
            ["apt-get", "purge", "-y", "-q", *names], capture_output=True, text=True, env=environment, check=False
        )
        if done.returncode != 0:
            raise SimulatorError(f"apt-get purge {' '.join(names)} failed: {done.stderr.strip().splitlines()[-1]}")
        if "docker.io" in names:
            for folder in ("/var/lib/docker", "/var/lib/containerd", "/etc/docker"):
                shutil.rmtree(folder, ignore_errors=True)
        list_file.unlink()


def _installed(name: str) -> bool:
    done = subprocess.run(["dpkg-query", "-W", "-f=${Status}", name], capture_output=True, text=True, check=False)
    return done.stdout == "install ok installed"


def _all_installed() -> set[str]:
    done = subprocess.run(
        ["dpkg-query", "-W", "-f=${binary:Package} ${Status}\n"], capture_output=True, text=True, check=True
    )
    return {line.split()[0] for line in done.stdout.splitlines() if line.endswith("install ok installed")}


def _install(home: Path, names: list[str] | tuple[str, ...], say: Say) -> None:
    home.mkdir(parents=True, exist_ok=True)
    list_file = home / "installed.json"
    before = _all_installed()
    known = json.loads(list_file.read_text(encoding="utf-8")) if list_file.exists() else []
    environment = [f"{key}={value}" for key, value in os.environ.items() if key != "DEBIAN_FRONTEND"]
    command = ["env", "-i", *environment, "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q"]
    run([*command, "update"], "updating apt's package lists", say)
    try:
        run([*command, "install", "-y", *names], f"installing {', '.join(names)}", say)
    finally:  # also what an interrupted installation has left
        list_file.write_text(json.dumps(sorted({*known, *(_all_installed() - before)})), encoding="utf-8")


def _start(home: Path, say: Say) -> None:
    """Start dockerd in a session of its own: there is no init system to ask, and it must outlive us."""
    say("starting Docker")
    home.mkdir(parents=True, exist_ok=True)
    if shutil.which("iptables-save"):
        rules = subprocess.run(["iptables-save"], capture_output=True, text=True, check=False)
        (home / "iptables.rules").write_text(rules.stdout, encoding="utf-8")
    with (home / "dockerd.log").open("ab") as log:
        process = subprocess.Popen(
            ["dockerd"], stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
    (home / "dockerd.pid").write_text(str(process.pid), encoding="ascii")
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if connect() is not None:
            return
        if process.poll() is not None:
            break
        time.sleep(0.5)
    tail = (home / "dockerd.log").read_text(encoding="utf-8", errors="replace").splitlines()[-3:]
    raise SimulatorError("dockerd does not start:\n" + "\n".join(tail))


def _restore_network(before: Path) -> None:
    """Clean up what dockerd leaves behind when it stops: its bridge and its packet filter rules."""
    if shutil.which("ip"):
        subprocess.run(["ip", "link", "delete", "docker0"], capture_output=True, check=False)
    if before.exists():
        now = subprocess.run(["iptables-save"], capture_output=True, text=True, check=True)
        old = before.read_text(encoding="utf-8")
        subprocess.run(["iptables-restore"], input=without_docker(now.stdout, old), text=True, check=False)


def without_docker(rules: str, before: str) -> str:
    """Rules of iptables-save less Docker's; FORWARD drops only if it did before."""
    kept = [line for line in rules.splitlines() if "DOCKER" not in line and "docker0" not in line]
    if ":FORWARD DROP" not in before:
        kept = [line.replace(":FORWARD DROP", ":FORWARD ACCEPT") for line in kept]
    return "\n".join(kept) + "\n"


def _stop(pid: int) -> None:
    try:
        name = Path(f"/proc/{pid}/comm").read_text(encoding="ascii").strip()
    except OSError:
        return
    if name != "dockerd":  # the PID was reused meanwhile
        return
    os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and Path(f"/proc/{pid}").exists():
        time.sleep(0.2)
