"""The images of the simulated world, each made once and named by a hash of what went into it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import tarfile
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO

import docker

from simulator import docker_host, engine_image
from simulator.shell import SimulatorError, run

FOLDER = Path(__file__).parent
PREFIX = "sparkfleet-sim"
LABELS = {"sparkfleet.sim": "image"}
#: Held while it is installed: two root file systems are made at once.
MMDEBSTRAP = threading.Lock()
#: What the engines that fail on command say they are: one, and one to upgrade to.
FAULT_VERSIONS = ("0.10.1.1", "0.10.2")
Say = Callable[[str], None]


def prepare(
    client: docker.DockerClient, flavours: Sequence[str], engines: Sequence[str], cache: Path, say: Say
) -> None:
    """Make the images of worlds beside each other: each mostly waits for downloads, or uses one processor.

    What is there already costs a question. `flavours` and `engines` (vllm: the CPU's) are those of World.up().
    """

    def machines() -> None:
        for target in ("internet", *flavours):
            build(client, target, cache, say)
        if "fault" in engines:
            for version in FAULT_VERSIONS:
                fault_engine(client, version, cache, say)

    tasks: list[Callable[[], object]] = [machines]
    if "vllm" in engines:
        tasks.append(partial(engine, client, cache, say))
    with ThreadPoolExecutor(len(tasks)) as pool:
        for task in [pool.submit(task) for task in tasks]:
            task.result()


def exists(client: docker.DockerClient, name: str) -> bool:
    """Whether the engine has an image of this name."""
    try:
        client.images.get(name)
    except docker.errors.ImageNotFound:
        return False
    return True


def debian(client: docker.DockerClient, suite: str, cache: Path, say: Say) -> str:
    """A plain Debian root file system: from a container registry where one answers, else made with mmdebstrap."""
    name = f"{PREFIX}/debian:{suite}"
    if exists(client, name):
        return name
    say(f"fetching Debian {suite}")
    try:
        client.images.pull("debian", f"{suite}-slim").tag(name)
    except docker.errors.APIError:
        with MMDEBSTRAP:
            docker_host.ensure_mmdebstrap(cache.parent, say)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            tar = Path(folder) / "root.tar"
            run(["mmdebstrap", "--variant=minbase", suite, str(tar)], f"making Debian {suite} with mmdebstrap", say)
            repository, _, tag = name.partition(":")
            client.api.import_image_from_file(str(tar), repository=repository, tag=tag)
    return name


def build(client: docker.DockerClient, target: str, cache: Path, say: Say) -> str:
    """An image of simulator/Dockerfile: bare, dgxos, internet or no-engine."""
    name = f"{PREFIX}/{target}:{_hash()}"
    if exists(client, name):
        return name
    base = debian(client, "trixie", cache, say)
    say(f"building the image {target}")
    _docker_build(client, name, FOLDER / "Dockerfile", {"DEBIAN": base}, target)
    return name


def fault_engine(client: docker.DockerClient, version: str, cache: Path, say: Say) -> str:
    """An engine that fails on command, and says that it is vLLM of this version."""
    folder = FOLDER / "fault_engine"
    name = f"{PREFIX}/fault-engine-{version}:{_digest([folder / 'Dockerfile', folder / 'vllm'])}"
    if not exists(client, name):
        base = debian(client, "trixie", cache, say)
        say(f"building the engine that fails on command, {version}")
        arguments = {"DEBIAN": base, "VERSION": version}
        _docker_build(client, name, folder / "Dockerfile", arguments, None)
    return name


def foreign(client: docker.DockerClient, image: str, say: Say) -> str:
    """The same image, but built for a processor that this machine has not, as its description says."""
    repository, _, tag = image.partition(":")
    name = f"{repository}-of-another-processor:{tag}"
    if not exists(client, name):
        say("making an image for another processor")
        other = "amd64" if platform.machine() == "aarch64" else "arm64"
        with tempfile.TemporaryDirectory() as folder:
            saved, changed = Path(folder, "saved.tar"), Path(folder, "changed.tar")
            run(["docker", "save", "-o", str(saved), image], "saving it", say)
            _relabel(saved, changed, other, name)
            run(["docker", "load", "-i", str(changed)], "loading it", say)
    return name


def _relabel(saved: Path, changed: Path, architecture: str, name: str) -> None:
    """Copy what `docker save` wrote, with another architecture in the configuration and another name."""
    with tarfile.open(saved) as source, tarfile.open(changed, "w") as target:
        (manifest,) = json.load(member(source, "manifest.json"))
        config = {**json.load(member(source, manifest["Config"])), "architecture": architecture}
        texts = {
            "config.json": json.dumps(config),
            "manifest.json": json.dumps([{**manifest, "Config": "config.json", "RepoTags": [name]}]),
        }
        for layer in manifest["Layers"]:
            target.addfile(source.getmember(layer), member(source, layer))
        for path, text in texts.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(text.encode())
            target.addfile(entry, io.BytesIO(text.encode()))


def member(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    """The content of a file in an image that was saved. Raises SimulatorError."""
    file = archive.extractfile(name)
    if file is None:
        raise SimulatorError(f"{name} is not a file in the saved image")
    return file


def engine(client: docker.DockerClient, cache: Path, say: Say) -> str:
    """The image of the real engine (2.4 GB)."""
    if exists(client, engine_image.tag()):
        return engine_image.tag()
    with ThreadPoolExecutor(1) as pool:
        wheels = pool.submit(engine_image.download_wheels, cache, say)
        base = debian(client, "bookworm", cache, say)
        file = FOLDER / "engine" / "Dockerfile.base"
        name = f"{PREFIX}/engine-base:{_digest([file, FOLDER / 'engine_image.py'])}"
        if not exists(client, name):
            say("building the engine's base")
            packages = " ".join(engine_image.BASE_PACKAGES)
            _docker_build(client, name, file, {"DEBIAN": base, "PACKAGES": packages}, None)
        return engine_image.build_engine_image(client, name, wheels.result(), say)


def _docker_build(
    client: docker.DockerClient, name: str, file: Path, arguments: dict[str, str], target: str | None
) -> None:
    # A machine that reaches its package registries through a proxy says so in its environment.
    proxies = {key: os.environ[key] for key in ("http_proxy", "https_proxy", "no_proxy") if os.environ.get(key)}
    try:
        client.images.build(
            path=str(FOLDER),
            dockerfile=str(file.relative_to(FOLDER)),
            tag=name,
            target=target,
            buildargs={**proxies, **arguments},
            labels=LABELS,
            rm=True,
            forcerm=True,
        )
    except docker.errors.BuildError as error:
        tail = [str(item.get("stream", item.get("error", ""))).rstrip() for item in error.build_log]
        raise SimulatorError(f"building {name} failed:\n" + "\n".join([line for line in tail if line][-15:])) from None


def _hash() -> str:
    return _digest([FOLDER / "Dockerfile", *sorted((FOLDER / "rootfs").rglob("*")), FOLDER / "internet" / "hub.py"])


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            digest.update(f"{file.relative_to(FOLDER)}\0{file.stat().st_mode:o}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]
