#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: the state of a Spark."""

from __future__ import annotations

DOCUMENTATION = r"""
module: spark_state
short_description: Reads everything a plan for a Spark needs, in one round trip
description:
  - Inspects the user that it runs as, operating system, GPU, clock, memory with swap and earlyoom, disks, Docker
    engine and Compose plugin, NVIDIA Container Toolkit, the operator's groups, the cache folder, the Hugging Face
    token file, the releases, the guard, monitoring, our containers; of each engine its image, its cached model, its
    health, and who listens on its port.
  - Contacts the registry only if an image is not on the host, and asks the Hugging Face Hub whether a model may be
    downloaded only if it is not complete on the host.
  - Changes nothing. A part that cannot be read is reported as absent, with the reason where there is one.
options:
  engines:
    description: The engines that are to run on the host.
    type: list
    elements: dict
    required: true
    suboptions:
      repo: {description: Model on the Hub (ORG/NAME)., type: str, required: true}
      revision: {description: "Branch, tag or commit of the model.", type: str, required: true}
      remote_code: {description: Whether the engine runs code of the model's repository., type: bool, default: false}
      image: {description: Reference of the engine's image., type: str, required: true}
      port: {description: TCP port that the engine is published on., type: int, required: true}
      door:
        description: TCP port of the clients of an engine that starts on demand; 0 for one that always runs.
        type: int
        default: 0
      executors:
        description: Let the image, where the host has it, say what it has to spread an engine over several hosts.
        type: bool
        default: false
      draft:
        description: The model that drafts for it, if it is one of its own.
        type: dict
        suboptions:
          repo: {description: Model on the Hub (ORG/NAME)., type: str, required: true}
          revision: {description: "Branch, tag or commit of the model.", type: str, required: true}
          remote_code: {description: Whether the engine runs code of its repository., type: bool, default: false}
  project: {description: Name of our Compose project., type: str, required: true}
  project_dir: {description: Folder of the compose file., type: path, required: true}
  cache_dir: {description: Folder of the model cache., type: path, required: true}
  operator: {description: User who should be able to run docker., type: str, required: true}
  token: {description: Hugging Face token to use; empty for the one in I(token_file)., type: str, default: ""}
  token_file: {description: File on the host that holds the token., type: path, required: true}
  engine_key: {description: API key that the engine should require., type: str, default: ""}
  engine_key_file: {description: File on the host that holds it., type: path, default: /etc/sparkfleet/engine_key}
  registry_logins:
    description: Content that the file of registry logins should have; empty for none.
    type: str
    default: ""
  address: {description: Name or address of this host in the inventory., type: str, default: ""}
  gateways:
    description: Names or addresses of the gateways; with them the host's own address facing them is determined.
    type: list
    elements: str
    default: []
  sources:
    description: Names or addresses that the firewall opens ports to; they are resolved on the host.
    type: list
    elements: str
    default: []
  hub_endpoint: {description: Address of the Hub., type: str, default: "https://huggingface.co"}
  proxy: {description: Proxy between the host and the internet., type: str, default: ""}
  no_proxy: {description: Names to reach without it separated by commas., type: str, default: ""}
  ca:
    description: Certificates in PEM that the host is to trust besides its own; registry and Hub are asked with them.
    type: str
    default: ""
  registries:
    description: Registries that Docker is to trust by them.
    type: list
    elements: str
    default: []
  fabric:
    description: Report network interfaces, ConnectX ports and their RDMA devices.
    type: bool
    default: false
  status:
    description: Include what is served, as the module M(sparkfleet.dgx.spark_status) does.
    type: bool
    default: false
  now:
    description: The controller's time in seconds since 1970, to compare with the host's; 0 for no comparison.
    type: float
    default: 0
  internet: {description: Whether to contact the registry and the Hub., type: bool, default: true}
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Reads only.}
  diff_mode: {support: none, description: Reads only.}
"""

EXAMPLES = r"""
- name: Inspect the host
  sparkfleet.dgx.spark_state:
    engines:
      - repo: nvidia/Llama-3.1-8B-Instruct-FP8
        revision: main
        image: nvcr.io/nvidia/vllm:25.09-py3
        port: 8000
    project: sparkfleet
    project_dir: /opt/sparkfleet
    cache_dir: /opt/hf
    operator: nvidia
    token_file: /etc/sparkfleet/hf_token
  register: state
"""

RETURN = r"""
state:
  description: What was found; sizes in bytes.
  returned: always
  type: dict
"""

import functools
import grp
import hashlib
import http.client
import os
import platform
import pwd
import re
import shutil
import socket
import ssl
import stat
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import (
    executors,
    fabric,
    firewall,
    monitoring,
    network,
    trust,
)
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.bounded import checksum, read_file
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.cache import model_state
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.docker import Docker, DockerUnavailable
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.guard import read_state
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.http import KEY_FILE
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.job import JobError
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.measured import of_release, trials
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.memory import memory_state, unit_state
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.network import reached_at
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.redaction import passwords
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.registry import (
    LOGINS,
    Registry,
    bypasses,
    local_image,
    reference,
)
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.releases import STATE_DIR, Store, read_json
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.systemd import service_environment

#: Names of variables whose values nothing is reported of.
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)
CONTAINERD = "/var/lib/containerd"
PROBE_SECONDS = 10
REACH_SECONDS = 5
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
PROXY_UNIT = Path("/etc/systemd/system/docker.service.d/sparkfleet-proxy.conf")
GUARD_UNIT = Path("/etc/systemd/system/sparkfleet-guard.service")


def run(*argv: str) -> str | None:
    """Standard output of a command, or None when it is absent or fails."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=PROBE_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def user_name(number: int) -> str:
    """Name of a user; the number where it has none."""
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def operating_system() -> dict[str, Any]:
    """Distribution (of /etc/os-release), machine and kernel."""
    release: dict[str, str] = {}
    for line in Path("/etc/os-release").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition("=")
        release[key] = value.strip('"')
    return {
        "id": release.get("ID", ""),
        "version": release.get("VERSION_ID", ""),
        "codename": release.get("VERSION_CODENAME", ""),
        "name": release.get("PRETTY_NAME", ""),
        "machine": platform.machine(),
        "kernel": platform.release(),
        "machine_id": (read_text(Path("/etc/machine-id")) or "").strip(),
        "boot_id": Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip(),
    }


def gpu() -> dict[str, str] | None:
    """Name, driver and compute capability of the first GPU, as nvidia-smi reports them."""
    out = run("nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader")
    if not out:
        return None
    fields = [field.strip() for field in out.splitlines()[0].split(",")]
    if len(fields) != 3:
        return None
    return dict(zip(("name", "driver", "compute_capability"), fields, strict=True))


def gpu_error() -> str:
    """What nvidia-smi says of a GPU that its driver lost; "" for nothing of the kind."""
    try:
        done = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    output = (done.stdout + done.stderr).strip()
    lost = any(
        word in output for word in ("No devices were found", "GPU is lost", "Unable to determine the device handle")
    )
    return output.splitlines()[0][:200] if lost else ""


def disk(path: str) -> dict[str, Any]:
    """Free bytes (for ordinary users) of the file system that holds, or would hold, ``path``."""
    where = Path(path)
    while not where.exists():
        where = where.parent
    figures = os.statvfs(where)
    return {"free": figures.f_bavail * figures.f_frsize, "device": where.stat().st_dev}


def folder(path: str) -> dict[str, Any] | None:
    """Owner, group and mode of a folder, or None when there is none."""
    try:
        info = Path(path).stat()
    except OSError:
        return None

    def name_of(lookup: Callable[[int], Any], number: int) -> str:
        try:
            return str(lookup(number)[0])
        except KeyError:
            return str(number)

    return {
        "owner": name_of(pwd.getpwuid, info.st_uid),
        "group": name_of(grp.getgrgid, info.st_gid),
        "mode": f"{stat.S_IMODE(info.st_mode):04o}",
        "directory": stat.S_ISDIR(info.st_mode),
    }


def token_file(path: str, token: str) -> dict[str, Any]:
    """Whether the token file is there, private, and holds ``token`` (true when none was given)."""
    try:
        info, text = Path(path).stat(), read_file(path, 64 << 10).decode("utf-8", "replace").strip()
    except (OSError, ValueError):
        return {"present": False, "private": False, "current": not token}
    private = stat.S_IMODE(info.st_mode) == 0o600 and info.st_uid == 0
    return {"present": bool(text), "private": private, "current": not token or text == token}


def listener(port: int) -> dict[str, Any] | None:
    """The process that listens on a TCP port; the pid is missing if unknown."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    if not inodes:
        return None
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if str(link.readlink()) in inodes:
                pid = int(link.parts[2])
                return {"pid": pid, "process": Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip()}
        except OSError:
            continue
    return {"pid": None, "process": "unknown"}


def operator(name: str) -> dict[str, Any]:
    """Whether the user exists and may use Docker (root always may)."""
    try:
        user = pwd.getpwnam(name)
    except KeyError:
        return {"name": name, "exists": False, "in_docker_group": False}
    groups = {group.gr_name for group in grp.getgrall() if name in group.gr_mem}
    return {"name": name, "exists": True, "in_docker_group": user.pw_uid == 0 or "docker" in groups}


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """The Hub's redirects mean that a file may be had; they are not followed, nor is the token sent on."""

    def redirect_request(self, *_args: Any, **_kwargs: Any) -> None:
        return None


def opener(url: str, proxy: str, no_proxy: str, context: ssl.SSLContext | None = None) -> urllib.request.OpenerDirector:
    """What asks for a URL: through the proxy, unless there is none or the host is an exception."""
    parts = urllib.parse.urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    direct = not proxy or bypasses(parts.hostname or "", port, no_proxy)
    proxies = {} if direct else {"http": proxy, "https": proxy}
    return urllib.request.build_opener(
        NoRedirect, urllib.request.ProxyHandler(proxies), urllib.request.HTTPSHandler(context=context)
    )


def patiently(ask: Callable[[float], dict[str, Any]]) -> dict[str, Any]:
    """Ask a service that may be slow; once more, with more time, if it did not answer in time."""
    answer = ask(REACH_SECONDS)
    return ask(PROBE_SECONDS) if "timed out" in answer["error"] else answer


def hub_access(
    endpoint: str,
    repo: str,
    revision: str,
    token: str,
    proxy: str = "",
    no_proxy: str = "",
    seconds: float = REACH_SECONDS,
    ca: str = "",
) -> dict[str, Any]:
    """What the Hub says of the model's config.json: a status of HTTP and the Hub's own error code. `ca`: authorities to
    trust besides the host's."""
    request = urllib.request.Request(f"{endpoint}/{repo}/resolve/{revision}/config.json", method="HEAD")  # noqa: S310
    # Without TLS anybody on the way could read it.
    if token and (request.type == "https" or request.host.partition(":")[0] in ("127.0.0.1", "localhost")):
        request.add_header("Authorization", f"Bearer {token}")
    try:
        context = trust.context(ca) if ca else None
        with opener(request.full_url, proxy, no_proxy, context).open(request, timeout=seconds) as answer:
            return {"status": answer.status, "error": ""}
    except urllib.error.HTTPError as error:
        status = 200 if error.code in (301, 302, 303, 307, 308) else error.code
        return {"status": status, "error": "" if status == 200 else error.headers.get("X-Error-Code", "")}
    except (OSError, ValueError, http.client.HTTPException) as error:
        return {"status": 0, "error": str(getattr(error, "reason", error))}


def registry_host(image: str) -> str:
    """The registry of an image, as Docker understands references."""
    first, slash, _ = image.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        return "registry-1.docker.io" if first in ("docker.io", "index.docker.io") else first
    return "registry-1.docker.io"


def registry_access(
    image: str,
    proxy: str = "",
    no_proxy: str = "",
    seconds: float = REACH_SECONDS,
    config: dict[str, Any] | None = None,
    ca: str = "",
) -> dict[str, Any]:
    """Whether the image's registry answers, with any status, asked as Docker asks it; `config` is RegistryConfig of
    `docker info`, `ca`: authorities to trust besides the host's. ``failure`` is an id of the table of failures."""
    found = {"host": registry_host(image), "status": 0, "error": "", "failure": ""}
    info = {"HttpProxy": proxy, "HttpsProxy": proxy, "NoProxy": no_proxy, "RegistryConfig": config}
    try:
        return {**found, "status": Registry(reference(image), info, None, seconds, ca=ca).ping()}
    except JobError as error:
        return {**found, "error": str(error), "failure": error.id}
    except OSError as error:
        if isinstance(error, socket.gaierror):
            failure = "registry-name"
        elif isinstance(error, ssl.SSLError):
            failure = "registry-tls"
        else:
            failure = "registry-unreachable"
        return {**found, "error": str(error), "failure": failure}


def started_since(unit: str, moment: float) -> bool:
    """Whether the main process of a unit was started at or after a moment, seconds since 1970; False if it does not
    run."""
    # Of the clock that is never set.
    value = run("systemctl", "show", "--property=ExecMainStartTimestampMonotonic", "--value", unit) or "0"
    started = int(value) / 1e6 if value.isdigit() else 0.0
    return bool(started) and time.monotonic() - started <= time.time() - moment


def trusted(store: trust.Store, pem: str, registries: Sequence[str]) -> dict[str, Any]:
    """What there is of certificate authorities: `present`: files of ours, `current`: they are those that are wanted,
    `program`: what writes the host's bundle is there, `daemon`: Docker was started after the newest of them was
    written."""
    found = store.found()
    newest = max((path.stat().st_mtime for path in found if path.parent == store.local), default=None)
    return {
        "present": bool(found),
        "current": store.is_current(pem, registries),
        "program": store.has_program(),
        "daemon": newest is not None and started_since("docker.service", newest),
    }


def docker_engine(project: str, images: Sequence[str], proxy: str = "", no_proxy: str = "") -> dict[str, Any]:
    """Engine, Compose plugin, runtimes, the images, and every container with its published ports; `proxy_current`:
    whether the engine that runs has this proxy, and where none is wanted, none of ours."""
    found: dict[str, Any] = {
        "installed": shutil.which("dockerd") is not None and shutil.which("docker") is not None,
        "running": False,
        "compose": run("docker", "compose", "version", "--short") if shutil.which("docker") else None,
    }
    try:
        docker = Docker(timeout=PROBE_SECONDS)
        info = docker.info()
        found.update(
            running=True,
            version=info.get("ServerVersion", ""),
            root=info.get("DockerRootDir", "/var/lib/docker"),
            **image_store(info),
            runtimes=sorted(info.get("Runtimes") or {}),
            proxy=info.get("HttpsProxy") or info.get("HttpProxy") or "",
            no_proxy=info.get("NoProxy") or "",
            registries=info.get("RegistryConfig") or {},
        )
        own = service_environment("docker.service") if proxy else {}
        has = [own.get(name, "") for name in PROXIES]
        found["proxy_current"] = has == [proxy, proxy, no_proxy] if proxy else not PROXY_UNIT.exists()
        found["images"] = {name: image(docker, name) for name in dict.fromkeys(images)}
        found["containers"] = [container(docker, item, project) for item in docker.containers(all=True)]
    except (DockerUnavailable, OSError) as error:
        found["reason"] = str(error)
    return found


def image(docker: Docker, name: str) -> dict[str, Any] | None:
    """An image that Docker has: its id, size in bytes, architecture and digest."""
    try:
        known = local_image(docker, reference(name))
    except JobError:
        known = docker.image(name)
    if not known:
        return None
    return {
        "id": known["Id"],
        "size": known.get("Size", 0),
        "architecture": known.get("Architecture", ""),
        **pinned(known, name),
    }


def image_store(info: dict[str, Any], config: Path = Path("/etc/containerd/config.toml")) -> dict[str, str]:
    """Who keeps Docker's images, and in which folder: containerd, as with new installations of Docker 29 and later,
    keeps each layer twice, compressed and unpacked."""
    root = str(info.get("DockerRootDir") or "/var/lib/docker")
    kinds = [str(row[1]) for row in info.get("DriverStatus") or [] if len(row) == 2 and row[0] == "driver-type"]
    if not any(kind.startswith("io.containerd.snapshotter.") for kind in kinds):
        return {"store": "docker", "images_at": root}
    address = str((info.get("Containerd") or {}).get("Address") or "")
    if "/docker/containerd/" in address:  # one that Docker starts for itself
        return {"store": "containerd", "images_at": f"{root}/containerd/daemon"}
    named = re.search(r"""^root\s*=\s*["'](/[^"'\n]+)["']""", read_text(config) or "", re.MULTILINE)
    return {"store": "containerd", "images_at": named[1] if named else CONTAINERD}


def pinned(known: dict[str, Any], image: str = "") -> dict[str, Any]:
    """The digest that an image has under its own name (it may have others under other names), and `known_as`:
    NAME@DIGEST where Docker knows it by another name than its own. One that came out of a bundle is known by the
    address of the Spark's own registry alone."""
    names = [str(name) for name in known.get("RepoDigests") or []]
    own = [name for name in names if not name.startswith("127.0.0.1:")]
    try:
        ref = reference(image)
    except JobError:
        mine = []
    else:
        mine = [name for name in own if name.partition("@")[0] == ref.familiar]
        # The same image may have several digests, as a manifest and in an index.
        mine.sort(key=lambda name: name.partition("@")[2] != ref.digest)
    first = next(iter([*mine, *own, *names]), "")
    return {"digest": first.partition("@")[2] or None, "known_as": None if own else first or None}


def container(docker: Docker, item: dict[str, Any], project: str) -> dict[str, Any]:
    """One container: name, image, state, ports; for ours also what it was started with, of the environment's values
    their sha256 ("" for what may be a secret)."""
    labels = item.get("Labels") or {}
    ours = labels.get("com.docker.compose.project") == project
    result: dict[str, Any] = {
        "name": item["Names"][0].lstrip("/"),
        "image": item["Image"],
        "state": item["State"],
        "ports": sorted({port["PublicPort"] for port in item.get("Ports") or [] if port.get("PublicPort")}),
        "ours": ours,
        "service": labels.get("com.docker.compose.service") if ours else None,
    }
    detail = docker.container(item["Id"]) if ours else None
    if detail:
        config, host = detail["Config"], detail["HostConfig"]
        bound = (host.get("PortBindings") or {}).values()
        result["started_with"] = {
            "image": config["Image"],
            "command": config.get("Cmd") or [],
            "environment": {
                name: "" if _SECRET.search(name) else hashlib.sha256(value.encode()).hexdigest()
                for name, _, value in (pair.partition("=") for pair in config.get("Env") or [])
            },
            "ports": sorted({int(bind["HostPort"]) for binds in bound for bind in binds or []}),
            "published": sorted(map(published, (bind for binds in bound for bind in binds or []))),
            "volumes": sorted(host.get("Binds") or []),
            "restart": (host.get("RestartPolicy") or {}).get("Name", ""),
        }
        result["restart_count"] = detail.get("RestartCount", 0)
        # A published port is held by a running container only; a stopped one must not appear as the holder.
        result["ports"] = result["started_with"]["ports"] if item["State"] == "running" else result["ports"]
    return result


def published(bind: dict[str, str]) -> str:
    """Address and port of a binding as a compose file has them; the port alone for one of all addresses."""
    address = bind.get("HostIp") or ""
    if address in ("", "0.0.0.0", "::"):  # noqa: S104  what Docker says, nothing that is opened
        return bind["HostPort"]
    return f"{f'[{address}]' if ':' in address else address}:{bind['HostPort']}"


def healthy(port: int) -> bool:
    """Whether the engine answers /health; says nothing of its answers."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            f"http://127.0.0.1:{port}/health", timeout=3
        ) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError, http.client.HTTPException):  # the listener may not speak HTTP
        return False


def toolkit() -> dict[str, Any]:
    """The NVIDIA Container Toolkit's command, and whether Docker's configuration names the runtime."""
    daemon = read_json(Path("/etc/docker/daemon.json")) or {}
    output = re.search(r"version (\S+)", run("nvidia-ctk", "--version") or "")
    return {
        "installed": shutil.which("nvidia-ctk") is not None,
        "version": output[1] if output else "",
        "configured": "nvidia" in (daemon.get("runtimes") or {}),
    }


def read_text(path: Path) -> str | None:
    """Content of a text file, or None where there is none that can be read."""
    try:
        return str(read_file(path), "utf-8")
    except (OSError, ValueError):
        return None


def guard() -> dict[str, Any]:
    """The guard's unit and settings, the program that the unit names (SHA-256), whether the process that runs was
    started from this unit, and what the guard says of the engine."""
    file = read_text(GUARD_UNIT)
    installed = file is not None
    written = dict(re.findall(r"^Environment=(SPARKFLEET_\w+)=(\w+)$", file or "", re.M))
    runs = service_environment("sparkfleet-guard.service").get("SPARKFLEET_GENERATION", "") if installed else ""
    unit = unit_state("sparkfleet-guard.service") if installed else {}
    return {
        "installed": installed,
        "active": unit.get("ActiveState") == "active",
        "enabled": unit.get("UnitFileState") == "enabled",
        "program": written.get("SPARKFLEET_PROGRAM", ""),
        "current": runs == written.get("SPARKFLEET_GENERATION", ""),
        "settings": read_json(Path("/etc/sparkfleet/guard.json")),
        "state": read_state(Path(STATE_DIR))[0],
    }


def other_than_guard(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """A listener, unless it is the guard, which closes the door of an engine that starts on demand no longer."""
    return None if found and found["pid"] and network.is_guard(found) else found


def door(port: int) -> dict[str, Any] | None:
    """Who listens on the port of the clients of an engine that starts on demand, unless it is the guard."""
    return next((found for found in network.listeners(port) if not network.is_guard(found)), None) if port else None


def status(store: Store) -> dict[str, Any]:
    """What the module spark_status sees."""
    from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.status import inspect_host as served  # noqa: PLC0415 - most runs do not need it

    found: dict[str, Any] = served(store, Docker(timeout=PROBE_SECONDS), 0)
    return found


def gather(params: dict[str, Any]) -> dict[str, Any]:
    """Everything, the slow parts at the same time."""
    stored = read_text(Path(params["token_file"])) or ""
    wanted = params["engines"]
    with ThreadPoolExecutor(max_workers=4) as pool:
        graphics = pool.submit(gpu)
        images = [engine["image"] for engine in wanted]
        engine = pool.submit(docker_engine, params["project"], images, params["proxy"], params["no_proxy"])
        health = [pool.submit(healthy, engine["port"]) for engine in wanted]
        store = Store(params["project_dir"])
        wall = pool.submit(firewall.state, params["sources"])
        served = pool.submit(status, store) if params["status"] else None
        models = [
            model_state(params["cache_dir"], engine["repo"], engine["revision"], engine["remote_code"])
            for engine in wanted
        ]
        drafts = [engine.get("draft") for engine in wanted]
        drafting = [
            model_state(params["cache_dir"], draft["repo"], draft["revision"], draft["remote_code"]) if draft else None
            for draft in drafts
        ]
        token = params["token"] or stored.strip()
        hubs, draft_hubs = (
            [
                pool.submit(patiently, functools.partial(ask_hub, params, asked, token))
                if asked and model and not model["complete"] and params["internet"]
                else None
                for asked, model in zip(asked_for, known, strict=True)
            ]
            for asked_for, known in ((wanted, models), (drafts, drafting))
        )
        trusts = pool.submit(trusted, trust.Store(), params["ca"], params["registries"])
        docker = engine.result()
        config, here = docker.pop("registries", {}), docker.pop("images", {})
        # What pulls is Docker: its own proxy counts where it has one.
        through = docker if docker.get("proxy") else params
        registries = {
            name: pool.submit(patiently, functools.partial(ask_registry, name, through, config, params["ca"]))
            for name in dict.fromkeys(images)
            if not here.get(name) and params["internet"]
        }
        asked = {
            name: pool.submit(executors.ask, name)
            for name in dict.fromkeys(engine["image"] for engine in wanted if engine.get("executors"))
            if here.get(name)
        }
        return {
            "user": {"id": os.geteuid(), "name": user_name(os.geteuid())},
            "os": operating_system(),
            "gpu": graphics.result(),
            "gpu_error": "" if graphics.result() else gpu_error(),
            "clock": {"offset": time.time() - params["now"] if params["now"] else 0.0},
            "memory": memory_state(),
            "disk": {
                "cache": disk(params["cache_dir"]),
                "docker": disk(docker.get("images_at", "/var/lib/docker")),
                # Where they will lie if Docker is installed out of its own repository.
                "containerd": disk(CONTAINERD),
            },
            "docker": docker,
            "toolkit": toolkit(),
            "operator": operator(params["operator"]),
            "cache": folder(params["cache_dir"]),
            "project_dir": folder(params["project_dir"]),
            "token": token_file(params["token_file"], params["token"]),
            "engine_key": token_file(params["engine_key_file"], params["engine_key"]),
            "registry_logins": token_file(LOGINS, params["registry_logins"]),
            "reached_at": reached_at(params["address"], params["gateways"]) if params["gateways"] else [],
            "engines": [
                {
                    "image": here.get(engine["image"]),
                    "registry": registries[engine["image"]].result() if engine["image"] in registries else None,
                    "model": model,
                    "hub": hub.result() if hub else None,
                    "draft": {"model": draft, "hub": draft_hub.result() if draft_hub else None} if draft else None,
                    "listener": other_than_guard(listener(engine["port"])),
                    "door": door(engine.get("door") or 0),
                    **({"executors": asked[engine["image"]].result()} if engine["image"] in asked else {}),
                    "healthy": answers.result(),
                }
                for engine, model, hub, draft, draft_hub, answers in zip(
                    wanted, models, hubs, drafting, draft_hubs, health, strict=True
                )
            ],
            "compose_file": read_text(Path(params["project_dir"]) / "compose.yml"),
            "releases": store.summary(),
            # Of the current release, and of trials.
            "measured": [*trials(store), *of_release(store, store.current())],
            "host_program": checksum(Path(params["project_dir"]) / "lib" / "sparkfleet_host.pyz"),
            "trust": trusts.result(),
            "guard": guard(),
            "firewall": wall.result(),
            "fabric": fabric.summary(fabric.collect()) if params["fabric"] else None,
            "monitoring": bool(monitoring.units()),
            "status": served.result() if served else None,
        }


def ask_hub(params: dict[str, Any], engine: dict[str, Any], token: str, seconds: float) -> dict[str, Any]:
    """`hub_access` for an engine's model."""
    proxies = (params["proxy"], params["no_proxy"])
    return hub_access(
        params["hub_endpoint"], engine["repo"], engine["revision"], token, *proxies, seconds, params["ca"]
    )


def ask_registry(
    image: str, through: dict[str, Any], config: dict[str, Any], ca: str, seconds: float
) -> dict[str, Any]:
    """`registry_access` for an image, through the proxy that Docker uses."""
    return registry_access(image, through["proxy"], through["no_proxy"], seconds, config, ca)


def main() -> None:
    """Entry point of the module."""
    text = {"type": "str", "required": True}
    path = {"type": "path", "required": True}
    module = AnsibleModule(
        argument_spec={
            "engines": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    **dict.fromkeys(("repo", "revision", "image"), text),
                    "remote_code": {"type": "bool", "default": False},
                    "port": {"type": "int", "required": True},
                    "door": {"type": "int", "default": 0},
                    "executors": {"type": "bool", "default": False},
                    "draft": {
                        "type": "dict",
                        "options": {
                            **dict.fromkeys(("repo", "revision"), text),
                            "remote_code": {"type": "bool", "default": False},
                        },
                    },
                },
            },
            **dict.fromkeys(("project", "operator"), text),
            **dict.fromkeys(("project_dir", "cache_dir", "token_file"), path),
            "token": {"type": "str", "default": "", "no_log": True},
            "engine_key": {"type": "str", "default": "", "no_log": True},
            "engine_key_file": {"type": "path", "default": KEY_FILE, "no_log": False},
            "registry_logins": {"type": "str", "default": "", "no_log": True},
            "address": {"type": "str", "default": ""},
            "gateways": {"type": "list", "elements": "str", "default": []},
            "sources": {"type": "list", "elements": "str", "default": []},
            "hub_endpoint": {"type": "str", "default": "https://huggingface.co"},
            "proxy": {"type": "str", "default": ""},
            "no_proxy": {"type": "str", "default": ""},
            "ca": {"type": "str", "default": ""},
            "registries": {"type": "list", "elements": "str", "default": []},
            "status": {"type": "bool", "default": False},
            "fabric": {"type": "bool", "default": False},
            "now": {"type": "float", "default": 0},
            "internet": {"type": "bool", "default": True},
        },
        supports_check_mode=True,
    )
    state = gather(module.params)
    # Docker may have a proxy of its own.
    module.no_log_values.update(passwords(module.params["proxy"], str(state["docker"].get("proxy") or "")))
    module.exit_json(changed=False, state=state)


if __name__ == "__main__":
    main()
