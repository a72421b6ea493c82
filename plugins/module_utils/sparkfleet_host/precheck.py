# SPDX-License-Identifier: Apache-2.0
"""What must be there before a release may replace what runs: everything that can be checked without stopping anything.

Each problem names an entry in the table of failures. Nothing here changes the host.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import engine, http, network
from .bounded import printable
from .cache import damaged_files, is_weights, model_state
from .docker import Docker, DockerError, DockerUnavailable
from .engine import EngineError
from .release_format import DUMMY, Engine, trial_weights
from .releases import ReleaseError, Store

INTERFACES = "/sys/class/net"


@dataclasses.dataclass(frozen=True)
class Problem:
    """Why a release cannot run: `failure` is an entry in the table of failures, `message` names value and place."""

    failure: str
    message: str


def precheck(store: Store, docker: Docker, number: int) -> list[Problem]:
    """All problems that a start of the release would meet; [] for none. Raises DockerUnavailable."""
    damaged = store.damage(number)
    try:
        engines, file = store.engines(number), store.compose_file(number)
        dummy = trial_weights(store.plan(number)) == DUMMY
    except ReleaseError as error:
        return [Problem("release-damaged", str(error))]
    if damaged:
        return [Problem("release-damaged", "; ".join(damaged))]
    docker.info()
    try:
        document = engine.resolved(str(store.project_dir), str(file))
    except engine.MissingError as error:
        return [Problem("compose-too-old", str(error))]
    except EngineError as error:
        return [Problem("compose-invalid", f"{file}: {str(error).removeprefix('docker compose config: ')}")]
    services = document.get("services") or {}
    found: list[Problem] = []
    try:
        for item in engines:
            wanted = services.get(item.service)
            if not isinstance(wanted, dict):
                return [Problem("compose-invalid", f"{file} has no service {item.service}")]
            found += _image(docker, wanted)
            found += _name(docker, wanted, item.service)
            found += _port(docker, wanted)
            found += _network(docker, wanted, document)
            found += _mounts(wanted, document)
            found += _model(wanted, item, dummy)
        return [*dict.fromkeys(found)]  # engines share images, networks and models
    except DockerUnavailable:
        raise
    except DockerError as error:
        return [Problem("docker", str(error))]


def _image(docker: Docker, wanted: Mapping[str, Any]) -> Iterator[Problem]:
    """The image, by the digest that the release names; nothing is pulled."""
    reference = str(wanted.get("image") or "")
    if docker.image(reference) is None:
        yield Problem("image-missing", f"Docker does not have the image {reference}")


def _name(docker: Docker, wanted: Mapping[str, Any], service: str) -> Iterator[Problem]:
    """A container of that name that is not ours."""
    name = str(wanted.get("container_name") or "")
    found = docker.container(name) if name else None
    labels = ((found or {}).get("Config") or {}).get("Labels") or {}
    if found and (labels.get(engine.PROJECT_LABEL), labels.get(engine.SERVICE_LABEL)) != (engine.PROJECT, service):
        yield Problem("name-taken", f"a container {name} exists that Sparkfleet did not make")


def _published(wanted: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for port in wanted.get("ports") or []:
        first, _, last = str(port.get("published") or "").partition("-")
        if first.isdecimal():
            address = str(port.get("host_ip") or "")
            yield from ((address, number) for number in range(int(first), int(last or first) + 1))


def _port(docker: Docker, wanted: Mapping[str, Any]) -> Iterator[Problem]:
    """A port that is in use by others, and an address that the host does not have."""
    running = [item for item in docker.containers(all=False) if item.get("State") in (None, "running", "paused")]
    for address, port in dict.fromkeys(_published(wanted)):
        if address and not network.is_wildcard(address) and not network.is_own(address):
            yield Problem("address-gone", f"the release is published on {address}, which this host does not have")
            continue
        ours = False
        for item in running:
            bound = [str(one.get("IP") or "") for one in item.get("Ports") or [] if one.get("PublicPort") == port]
            if not any(network.overlap(address, one) for one in bound):
                continue
            if (item.get("Labels") or {}).get(engine.PROJECT_LABEL) == engine.PROJECT:
                ours = True
            else:
                name = str((item.get("Names") or [item.get("Id")])[0]).lstrip("/")
                yield Problem("port-taken", f"port {port} is published by the container {name}")
                ours = True  # its proxy is the listener
        if not ours:  # while ours runs, the listener is its proxy
            for found in network.listeners(port):
                # The guard closes a door whose port is another's from now on.
                if network.overlap(address, found["address"]) and not network.is_guard(found):
                    who = f"{found['process'] or 'a process'} (pid {found['pid'] or '?'})"
                    yield Problem("port-taken", f"{who} listens on port {port}")
                    break


def _network(docker: Docker, wanted: Mapping[str, Any], document: Mapping[str, Any]) -> Iterator[Problem]:
    """A network that Docker knows and whose bridge is gone. Compose creates one that Docker does not know."""
    for key in wanted.get("networks") or {}:
        name = str(((document.get("networks") or {}).get(key) or {}).get("name") or "")
        found = docker.network(name) if name else None
        if not found or found.get("Driver") != "bridge":
            continue
        options = found.get("Options") or {}
        bridge = str(options.get("com.docker.network.bridge.name") or f"br-{str(found.get('Id'))[:12]}")
        if Path(INTERFACES).is_dir() and not Path(INTERFACES, bridge).exists():
            yield Problem("network-missing", f"the bridge {bridge} of Docker's network {name} does not exist")


def _mounts(wanted: Mapping[str, Any], document: Mapping[str, Any]) -> Iterator[Problem]:
    """Files and folders of the host that Docker would not create itself."""
    for mount in wanted.get("volumes") or []:
        source = str(mount.get("source") or "")
        made = (mount.get("bind") or {}).get("create_host_path")
        if mount.get("type") == "bind" and not made and not Path(source).exists():
            yield Problem("mount-missing", f"{source} does not exist")
    for used in wanted.get("secrets") or []:
        secret = (document.get("secrets") or {}).get(str(used.get("source")))
        source = str((secret or {}).get("file") or "")
        staged = source == http.KEY_FILE and Path(f"{source}.next").is_file()
        if source and not staged and not Path(source).is_file():
            yield Problem("mount-missing", f"{source}, which the engine reads its key from, does not exist")


def _model(wanted: Mapping[str, Any], item: Engine, dummy: bool) -> Iterator[Problem]:
    """The files of the model, by their sizes, if the engine may not fetch any; `dummy`: weights are not needed."""
    environment = wanted.get("environment") or {}
    folder = environment.get("HF_HUB_CACHE")
    if str(environment.get("HF_HUB_OFFLINE") or "") != "1" or not folder:
        return
    sources = [str(mount.get("source")) for mount in wanted.get("volumes") or [] if mount.get("target") == folder]
    if not sources:
        return
    cache = Path(sources[0])
    try:
        entries = any(os.scandir(cache))
    except OSError as error:
        yield Problem("cache-not-mounted", f"{cache}: {error.strerror}; is its disk mounted?")
        return
    if not entries:
        yield Problem("cache-not-mounted", f"{cache} is empty; is its disk mounted?")
        return
    fetch = f"-e sparkfleet_model={shlex.quote(item.model)}"
    revision = item.revision or "main"
    commit = str(model_state(cache, item.repo, revision)["commit"])
    yield from _files(cache, item.repo, revision, f"{fetch} -e sparkfleet_revision={commit}", dummy)
    if item.draft:
        yield from _files(cache, item.draft["repo"], item.draft["revision"], fetch, dummy)


def _files(cache: Path, repo: str, revision: str, fetch: str, dummy: bool) -> Iterator[Problem]:
    """The files of one model in the cache; `fetch`: the arguments of the playbook that fetches it."""
    state = model_state(cache, repo, revision)
    if state["path"] is None:
        yield Problem("model-not-in-cache", f"{cache} has no {repo} at {revision}")
    elif missing := [name for name in state["missing"] if not (dummy and is_weights(name))]:
        files = _few(missing)
        yield Problem("download-incomplete", f"files of {repo} in {cache} are absent or of another size: {files}")
    elif not dummy and (damaged := damaged_files(cache, repo, str(state["commit"]))):
        yield Problem(
            "download-incomplete",
            f"files of {repo} in {cache} were found damaged: {_few(damaged)}; `ansible-playbook playbooks/fetch.yml "
            f"{fetch}` hashes and replaces them",
        )
    elif state["total_bytes"] is None:
        # Not fetched by Sparkfleet: at least what the snapshot names must be there.
        there = sorted(Path(state["path"]).rglob("*"))
        gone = [path.name for path in there if not path.exists()]
        if there and not gone and not dummy and not any(is_weights(path.name) for path in there):
            yield Problem("download-incomplete", f"{state['path']} has no weights, as after a trial")
        elif gone or not there:
            yield Problem(
                "download-incomplete",
                f"{state['path']}: {printable(', '.join(gone[:3]), 300) or 'empty'} does not lead to a file",
            )


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return printable(", ".join(names[:3]), 300) + more
