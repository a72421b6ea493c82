"""A simulated world: Sparks, and the internet that they see.

Each world has a network of its own, one container that stands for the internet, and one for each Spark. What a
person connects to is published on the loopback interface of this machine, on ports that were free.
"""

from __future__ import annotations

import dataclasses
import fcntl
import io
import ipaddress
import json
import os
import secrets
import shutil
import socket
import subprocess
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import docker
from docker.models.containers import Container

from simulator import cuda_image, docker_host, gpu, images, keys, model
from simulator.push import push
from simulator.shell import SimulatorError

IMAGE = "nvidia/vllm:25.09-py3"
#: Of a world with --engine fault: one to upgrade to, and one for another processor.
IMAGE_NEXT, IMAGE_FOREIGN = "nvidia/vllm:25.10-py3", "nvidia/vllm:25.11-py3"
#: The first with a vLLM that connects several Sparks by itself is 25.12.
IMAGE_RANKS = "nvidia/vllm:26.10-py3"
REPOSITORY = "nvidia/Llama-3.1-8B-Instruct-FP8"
#: The small model by its own name, for a second engine (simulator/cards).
SECOND = "HuggingFaceTB/SmolLM2-135M-Instruct"
#: One that gives vectors in place of text.
ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
#: What the simulated Hub has, and whether access is gated.
REPOSITORIES = {REPOSITORY: True, SECOND: False, ENCODER: False}
FLAVOURS = ("dgxos", "bare")
#: Where Docker keeps images: its own graph drivers, or containerd's snapshotters, with which newer Docker begins.
STORES = ("graph", "containerd")
RUNTIMES = {"runtimes": {"nvidia": {"args": [], "path": "nvidia-container-runtime"}}}
LABEL = "sparkfleet.sim.world"
#: What dockerd and systemd need inside; --privileged asks for more than some machines have.
CAPABILITIES = (  # noqa: SIM905 - one name a line would hide the list
    "AUDIT_CONTROL AUDIT_READ AUDIT_WRITE BLOCK_SUSPEND DAC_READ_SEARCH IPC_LOCK IPC_OWNER LEASE LINUX_IMMUTABLE "
    "MAC_ADMIN MAC_OVERRIDE NET_ADMIN NET_BROADCAST SYS_ADMIN SYS_BOOT SYS_CHROOT SYS_MODULE SYS_NICE SYS_PACCT "
    "SYS_PTRACE SYS_RAWIO SYS_TIME SYS_TTY_CONFIG SYSLOG WAKE_ALARM"
).split()
MEMINFO = """MemTotal:       125513728 kB
MemFree:        118034432 kB
MemAvailable:   120795136 kB
Buffers:          262144 kB
Cached:          2621440 kB
SwapCached:            0 kB
Active:          1835008 kB
Inactive:        1441792 kB
SwapTotal:             0 kB
SwapFree:              0 kB
Dirty:               512 kB
AnonPages:       1310720 kB
Mapped:           524288 kB
Shmem:             32768 kB
Slab:            1048576 kB
"""
READY_SECONDS = 120
Say = Callable[[str], None]


def home() -> Path:
    """Where worlds and caches are kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("SPARKFLEET_SIM_HOME") or f"{cache}/sparkfleet").expanduser()


@dataclasses.dataclass
class World:
    """A world by name; what is known of it is in ``folder/state.json``."""

    name: str
    say: Say = print

    @property
    def folder(self) -> Path:
        """Private files of this world."""
        return home() / "worlds" / self.name

    def state(self) -> dict[str, Any]:
        """What up() has written; empty when the world is not there."""
        file = self.folder / "state.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def container_name(self, host: str) -> str:
        """Name of the container that stands for a host."""
        return f"sparkfleet-{self.name}-{host}"

    # -- up ---------------------------------------------------------------------------------------------------

    def up(
        self, sparks: int, flavour: str, engine: str, store: str = "graph", use_gpu: bool = True, trusting: bool = True
    ) -> None:
        """Bring the world up, or add to it what is missing; `flavour`, `store` and whether they trust the CA of their
        internet are those of the Sparks it adds.

        `use_gpu`: a new world with the real engine gets this machine's NVIDIA GPU, if there is one. The Sparks of a
        world share it.
        """
        client = docker_host.ensure(home(), self.say)
        cache = home() / "cache"
        cache.mkdir(parents=True, exist_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        state = self.state()
        if not state:
            state = {"world": self.name, "engine": engine, "sparks": {}}
            if use_gpu and engine == "vllm":
                state |= self._gpu(client)
        if state["engine"] != engine:
            raise SimulatorError(
                f"world {self.name} was made with --engine {state['engine']}: take it down first, "
                f"or choose another --world"
            )
        keys.ensure(self.folder)
        tokens = self._tokens()
        images.prepare(client, (flavour,), () if "gpu" in state else (engine,), cache, self.say)
        subnet = self._network(client)
        state["address"], hub_address = str(subnet[-2]), str(subnet[-3])
        state["hub_address"] = hub_address
        internet = self._internet(client, state, subnet, tokens)
        listed = run_in(internet, ["gpg", "--homedir", "/srv/gnupg", "--list-keys", "--with-colons"])[1]
        state["key_fingerprint"] = next((line.split(":")[9] for line in listed.splitlines() if line[:4] == "fpr:"), "")
        self._fill(client, internet, state, cache, engine)
        for number in range(1, sparks + 1):
            name = f"spark-{number}"
            if name not in state["sparks"]:
                state["sparks"][name] = {
                    **{"flavour": flavour, "store": store, "trusting": trusting},
                    **{"ssh": free_port(), "http": free_port()},
                }
                self._save(state)
            self._spark(client, name, state, cache)
        self._write_known_hosts(state)
        for name in state["sparks"]:
            self._wait(client, name, state["sparks"][name])
        self._save(state)

    def _gpu(self, client: docker.DockerClient) -> dict[str, Any]:
        """What a new world's state says of this machine's GPU; nothing without one, or without an engine for it."""
        found, text = gpu.find()
        if text:
            self.say(text)
        if found is None:
            return {}
        try:
            cuda_image.ensure(client, self.say)
        except SimulatorError as error:
            self.say(f"{error}; the engine runs on the CPU. {cuda_image.VARIABLE} names an image that has vLLM")
            return {}
        return {"gpu": found.state()}

    def _save(self, state: dict[str, Any]) -> None:
        write_private(self.folder / "state.json", json.dumps(state, indent=2) + "\n")

    def _tokens(self) -> dict[str, Any]:
        file = self.folder / "tokens.json"
        if not file.exists():
            with_access, without = (f"hf_{secrets.token_hex(17)}" for _ in range(2))
            tokens = {
                with_access: {"name": "alice", "accepted": [REPOSITORY]},
                without: {"name": "bob", "accepted": []},
            }
            write_private(file, json.dumps(tokens))
            write_private(self.folder / "hf_token", with_access + "\n")
            write_private(self.folder / "hf_token_without_access", without + "\n")
        tokens_known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return tokens_known

    def _network(self, client: docker.DockerClient) -> ipaddress.IPv4Network:
        name = f"sparkfleet-{self.name}"
        try:
            network = client.networks.get(name)
        except docker.errors.NotFound:
            # Addresses can be given out only in a subnet that was asked for: let Docker choose a free one first.
            probe = client.networks.create(f"{name}-probe", labels={LABEL: self.name})
            probe.reload()
            subnet = probe.attrs["IPAM"]["Config"][0]["Subnet"]
            probe.remove()
            pool = docker.types.IPAMConfig(pool_configs=[docker.types.IPAMPool(subnet=subnet)])
            network = client.networks.create(name, ipam=pool, labels={LABEL: self.name})
            network.reload()
        return ipaddress.IPv4Network(network.attrs["IPAM"]["Config"][0]["Subnet"])

    def _create(
        self,
        client: docker.DockerClient,
        host: str,
        image: str,
        ports: dict[str, int],
        volumes: dict[str, Any],
        address: str | None = None,
        devices: Sequence[str] = (),
    ) -> Container:
        network = f"sparkfleet-{self.name}"
        limits = client.api.create_host_config(
            cap_add=CAPABILITIES,
            security_opt=["seccomp=unconfined", "apparmor=unconfined"],
            device_cgroup_rules=["a *:* rwm"],
            devices=[f"{path}:{path}:rwm" for path in devices],
            tmpfs={"/run": "exec", "/run/lock": "", "/tmp": "exec,mode=1777"},  # noqa: S108 - the container's own
            shm_size="2g",
            port_bindings={port: ("127.0.0.1", number) for port, number in ports.items()},
            binds=volumes,
            network_mode=network,
        )
        # What `--security-opt systempaths=unconfined` and `--cgroupns=private` mean to the engine.
        limits |= {"MaskedPaths": [], "ReadonlyPaths": [], "CgroupnsMode": "private"}
        endpoint = client.api.create_endpoint_config(ipv4_address=address)
        created = client.api.create_container(
            image,
            name=self.container_name(host),
            hostname=host,
            ports=[tuple(port.split("/")) for port in ports],
            volumes=[bind["bind"] for bind in volumes.values()],
            host_config=limits,
            networking_config={"EndpointsConfig": {network: endpoint}},
            labels={LABEL: self.name},
        )
        container: Container = client.containers.get(created["Id"])
        return container

    def _internet(
        self, client: docker.DockerClient, state: dict[str, Any], subnet: ipaddress.IPv4Network, tokens: dict[str, Any]
    ) -> Container:
        name = "internet"
        try:
            container = client.containers.get(self.container_name(name))
        except docker.errors.NotFound:
            image = images.build(client, "internet", home() / "cache", self.say)
            state["registry_port"] = free_port()
            self._save(state)
            # Worlds with and without a GPU serve another image under the same name.
            registry = f"{images.PREFIX}-registry-{state['engine']}{'-cuda' if 'gpu' in state else ''}"
            volumes = {
                registry: {"bind": "/var/lib/docker-registry", "mode": "rw"},
                f"{images.PREFIX}-hub": {"bind": "/srv/hub", "mode": "rw"},
            }
            ports = {"5000/tcp": state["registry_port"]}
            container = self._create(client, name, image, ports, volumes, state["address"])
            files = {
                "etc/simulator/server.pem": (self.folder / "ca" / "server.pem").read_bytes(),
                "etc/simulator/server.key": (self.folder / "ca" / "server.key").read_bytes(),
                "etc/simulator/addresses": f"HUB_ADDRESS={state['hub_address']}/{subnet.prefixlen}\n".encode(),
                "etc/simulator/tokens.json": json.dumps(tokens).encode(),
                "etc/dnsmasq.d/simulator.conf": dnsmasq(state["address"], state["hub_address"]).encode(),
            }
            put(container, files)
        container.start()
        self._until(lambda: registry_answers(state["registry_port"]), "the simulated registry")
        return container

    def _fill(
        self, client: docker.DockerClient, internet: Container, state: dict[str, Any], cache: Path, engine: str
    ) -> None:
        """Serve image and model; what the shared volumes hold already is left alone."""
        # Worlds share the volumes, and may come up at the same time.
        with (home() / "fill.lock").open("w") as lock, ThreadPoolExecutor(1) as pool:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Converting the small model takes one processor.
            models = pool.submit(self._models, client, internet, cache)
            self._push(client, state, cache, engine)
            for repository, (mark, source) in models.result().items():
                self._fill_hub(internet, repository, mark, source)
        ask = "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8001/ready', timeout=60)"
        self._until(lambda: run_in(internet, ["python3", "-c", ask])[0] == 0, "the simulated Hub")

    def _push(self, client: docker.DockerClient, state: dict[str, Any], cache: Path, engine: str) -> None:
        port = state["registry_port"]
        for image, tags in self._engines(client, cache, engine, "gpu" in state).items():
            version = image.rpartition(":")[2]
            marks = {tag: f"sim-{tag.partition(':')[2]}-{version}" for tag in tags}
            lacking = {tag: mark for tag, mark in marks.items() if not registry_serves(port, tag, mark)}
            if lacking:
                self.say(f"pushing {', '.join(f'nvcr.io/{tag}' for tag in lacking)}")
                names = [*lacking, *(f"{tag.partition(':')[0]}:{mark}" for tag, mark in lacking.items())]
                push(client, image, port, names, cache, self.say)

    def _models(self, client: docker.DockerClient, internet: Container, cache: Path) -> dict[str, tuple[str, Path]]:
        """What the simulated Hub lacks: mark and folder by repository."""
        found = {}
        for repository in REPOSITORIES:
            wanted = model.encoder_mark() if repository == ENCODER else model.mark()
            if run_in(internet, ["cat", f"/srv/hub/{repository}/mark"])[1] == wanted:
                continue
            if repository == ENCODER:
                source = model.ensure_encoder(cache, self.say)
            else:
                # Of the engines' images, the CPU's alone surely has what reads the GGUF.
                source = model.ensure_model(client, partial(images.engine, client, cache, self.say), cache, self.say)
            found[repository] = (wanted, source)
        return found

    def _fill_hub(self, internet: Container, repository: str, mark: str, source: Path) -> None:
        self.say(f"filling the simulated huggingface.co: {repository}")
        run_in(internet, ["rm", "-rf", f"/srv/hub/{repository}"])
        paths = [path for path in source.rglob("*") if path.is_file()]
        place = f"srv/hub/{repository}/files"
        put(internet, {f"{place}/{path.relative_to(source)}": path.read_bytes() for path in paths}, mode=0o644)
        # The mark comes last: without it the next `up` fills again.
        entry = json.dumps({"gated": REPOSITORIES[repository]}).encode()
        put(internet, {f"srv/hub/{repository}/repo.json": entry}, mode=0o644)
        put(internet, {f"srv/hub/{repository}/mark": mark.encode()}, mode=0o644)

    def _engines(self, client: docker.DockerClient, cache: Path, engine: str, cuda: bool) -> dict[str, list[str]]:
        """What the simulated nvcr.io serves: local image -> repository and tag."""
        if engine == "vllm":
            made = cuda_image.ensure(client, self.say) if cuda else images.engine(client, cache, self.say)
            return {made: [IMAGE, IMAGE_RANKS]}
        if engine == "none":
            return {images.build(client, "no-engine", cache, self.say): [IMAGE]}
        first, second = (images.fault_engine(client, version, cache, self.say) for version in images.FAULT_VERSIONS)
        foreign = images.foreign(client, first, self.say)
        return {first: [IMAGE], second: [IMAGE_NEXT, IMAGE_RANKS], foreign: [IMAGE_FOREIGN]}

    def _spark(self, client: docker.DockerClient, name: str, state: dict[str, Any], cache: Path) -> None:
        known = state["sparks"][name]
        try:
            container = client.containers.get(self.container_name(name))
        except docker.errors.NotFound:
            image = images.build(client, known["flavour"], cache, self.say)
            self.say(f"starting {name} ({known['flavour']})")
            volumes = {}
            for folder in ("docker", "containerd"):
                volume = client.volumes.create(f"sparkfleet-{self.name}-{name}-{folder}", labels={LABEL: self.name})
                volumes[volume.name] = {"bind": f"/var/lib/{folder}", "mode": "rw"}
            ports = {"22/tcp": known["ssh"], "8000/tcp": known["http"]}
            found = gpu.Gpu.of(state["gpu"]) if "gpu" in state else None
            for file, place in found.files.items() if found else ():
                volumes[file] = {"bind": place, "mode": "ro"}
            container = self._create(client, name, image, ports, volumes, devices=found.devices if found else ())
            ssh = self.folder / "ssh"
            put(
                container,
                {
                    "etc/ssh/ssh_host_ed25519_key": (ssh / "host_ed25519").read_bytes(),
                },
            )
            put(
                container,
                {
                    # Of one image all would have the same; it is used to detect one host under two names.
                    "etc/machine-id": f"{secrets.token_hex(16)}\n".encode(),
                    "etc/simulator/nameserver": f"nameserver {state['address']}\n".encode(),
                    "etc/simulator/meminfo": (gpu.meminfo(MEMINFO, found) if found else MEMINFO).encode(),
                    "etc/ssh/authorized_keys": (ssh / "id_ed25519.pub").read_bytes(),
                },
                mode=0o644,
            )
            if known.get("trusting", True):
                authority = (self.folder / "ca" / "ca.pem").read_bytes()
                put(container, {"usr/local/share/ca-certificates/simulator.crt": authority}, mode=0o644)
            if known.get("store") == "containerd":
                settings: dict[str, Any] = {"features": {"containerd-snapshotter": True}}
                settings |= RUNTIMES if known["flavour"] == "dgxos" else {}
                put(container, {"etc/docker/daemon.json": json.dumps(settings, indent=4).encode()}, mode=0o644)
            if found:
                self._hand_over(container, found)
                self.say(f"{found.name}: handed to {name}")
        container.start()
        if "gpu" in state:
            # Libraries are asked for by names that are links to the mounted files.
            run_in(container, ["ldconfig", "-n", f"{gpu.FOLDER}/lib64"])

    def _hand_over(self, container: Container, found: gpu.Gpu) -> None:
        """Put into a Spark what hands its GPU on to the containers that ask for one."""
        files = {path: str(path.relative_to(gpu.ROOTFS)) for path in sorted(gpu.ROOTFS.rglob("*")) if path.is_file()}
        for mode in (0o644, 0o755):
            chosen = {name: path for path, name in files.items() if bool(mode & 0o100) == os.access(path, os.X_OK)}
            put(container, {name: path.read_bytes() for name, path in chosen.items()}, mode=mode)
        put(container, {"etc/simulator/gpu.json": found.spark_file().encode()}, mode=0o644)

    def _write_known_hosts(self, state: dict[str, Any]) -> None:
        key = (self.folder / "ssh" / "host_ed25519.pub").read_text(encoding="ascii").strip()
        lines = [f"[127.0.0.1]:{known['ssh']} {key}" for known in state["sparks"].values()]
        write_private(self.folder / "ssh" / "known_hosts", "\n".join(lines) + "\n")

    def _wait(self, client: docker.DockerClient, name: str, known: dict[str, Any]) -> None:
        container = client.containers.get(self.container_name(name))
        port = self.state()["sparks"][name]["ssh"]

        def ready() -> bool:
            if not ssh_answers(port):
                return False
            starts = (
                known["flavour"] == "dgxos" and run_in(container, ["systemctl", "is-enabled", "docker.service"])[0] == 0
            )
            if starts and run_in(container, ["docker", "version"])[0] != 0:
                return False
            unverified = [] if known.get("trusting", True) else ["--insecure"]
            return run_in(container, ["curl", *unverified, "-fsS", "-o", "/dev/null", "https://nvcr.io/v2/"])[0] == 0

        self._until(ready, name)

    def _until(self, ready: Callable[[], bool], what: str) -> None:
        began = reported = time.monotonic()
        while not ready():
            now = time.monotonic()
            if now - began > READY_SECONDS:
                raise SimulatorError(f"{what} is not ready after {READY_SECONDS} s: docker logs, or `down` and `up`")
            if now - reported > 10:
                reported = now
                self.say(f"waiting for {what}: {now - began:.0f} s")
            time.sleep(0.5)

    # -- what else one does with a world ----------------------------------------------------------------------

    def down(self) -> None:
        """Remove containers, networks, volumes and files of this world; images and shared volumes stay."""
        client = docker_host.connect()
        if client is not None:
            remove(client, f"{LABEL}={self.name}")
        shutil.rmtree(self.folder, ignore_errors=True)

    def container(self, host: str) -> Container:
        """The running container of a host; an error that names the hosts there are."""
        client = docker_host.connect()
        if client is None or not self.state():
            raise SimulatorError(f"world {self.name} is not up: python -m simulator up --world {self.name}")
        try:
            found: Container = client.containers.get(self.container_name(host))
        except docker.errors.NotFound:
            known = ", ".join([*self.state()["sparks"], "internet"])
            raise SimulatorError(f"world {self.name} has no host {host}: it has {known}") from None
        return found

    def reboot(self, host: str) -> None:
        """Restart a host as a reset button would."""
        container = self.container(host)
        container.kill()
        container.start()
        known = self.state()["sparks"].get(host)
        client = docker_host.connect()
        if known and client is not None:
            self._wait(client, host, known)

    def unplug(self, plugged: bool = False) -> None:
        """Cut the internet connection, the simulated and the real one, or give it back; Sparks reach each other and the
        name server all the same."""
        run_in(self.container("internet"), ["systemctl", "start" if plugged else "stop", "nginx.service"])
        for host in self.state()["sparks"]:
            spark = self.container(host)
            networks = spark.attrs["NetworkSettings"]["Networks"].values()
            gateway = next(str(network["Gateway"]) for network in networks)
            run_in(spark, ["ip", "route", *(("replace", "default", "via", gateway) if plugged else ("del", "default"))])
            if (run_in(spark, ["ip", "route", "show", "default"])[1].strip() != "") != plugged:
                raise SimulatorError(f"{host}: its way to the internet is {'not there' if plugged else 'still there'}")

    def demand_login(self, user: str = "", password: str = "") -> None:
        """nvcr.io answers to this login alone; to all without one. Raises SimulatorError."""
        name = "etc/docker/registry/config.yml"
        own = Path(__file__).with_name("rootfs").joinpath("internet", name).read_text(encoding="utf-8")
        files = {name: own.encode()}
        if user:
            salt = f"$2b$05${secrets.token_hex(11)}"
            hashed = subprocess.run(
                ["perl", "-e", "chomp($_ = <STDIN>); print crypt($_, $ARGV[0])", salt],
                input=password,
                capture_output=True,
                text=True,
                check=False,
            ).stdout
            if not hashed.startswith("$2b$"):
                raise SimulatorError("perl cannot make a bcrypt hash, as the registry wants them")
            where = "etc/docker/registry/htpasswd"
            own += f"auth: {{htpasswd: {{realm: nvcr.io, path: /{where}}}}}\n"
            files = {name: own.encode(), where: f"{user}:{hashed}\n".encode()}
        internet = self.container("internet")
        put(internet, files, 0o644)
        code, output = run_in(internet, ["systemctl", "restart", "docker-registry.service"])
        if code != 0:
            raise SimulatorError(f"docker-registry: {output.strip()}")
        self._until(lambda: registry_answers(self.state()["registry_port"]), "the simulated registry")

    def throttle(self, registry: float | None, hub: float | None) -> None:
        """Limit what leaves nvcr.io and huggingface.co, in megabits a second; None is no limit."""
        internet, state = self.container("internet"), self.state()
        run_in(internet, ["tc", "qdisc", "del", "dev", "eth0", "root"])
        commands = ["qdisc add dev eth0 root handle 1: htb"]
        for number, address, rate in ((1, state["address"], registry), (2, state["hub_address"], hub)):
            if rate is None:
                continue
            commands += [
                f"class add dev eth0 parent 1: classid 1:{number} htb rate {rate}mbit burst 256k",
                f"filter add dev eth0 parent 1: protocol ip u32 match ip src {address}/32 "
                f"match ip sport 443 0xffff flowid 1:{number}",
            ]
        if len(commands) == 1:
            return
        for command in commands:
            code, output = run_in(internet, ["tc", *command.split()])
            if code != 0:
                raise SimulatorError(f"tc {command}: {output.strip()}")


def prepare(say: Say) -> None:
    """Make what any world without a GPU needs, so that a later `up` only starts it."""
    client, cache = docker_host.ensure(home(), say), home() / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    images.prepare(client, FLAVOURS, ("vllm", "fault"), cache, say)
    model.ensure_encoder(cache, say)
    model.ensure_model(client, partial(images.engine, client, cache, say), cache, say)


def remove(client: docker.DockerClient, label: str) -> None:
    """Remove containers, networks and volumes with a label."""
    for container in client.containers.list(all=True, filters={"label": label}):
        container.remove(force=True, v=True)
    for network in client.networks.list(filters={"label": label}):
        network.remove()
    for volume in client.volumes.list(filters={"label": label}):
        volume.remove()


def purge(say: Say) -> None:
    """Remove every trace: worlds, images, volumes, files, and a Docker that was installed for it."""
    client = docker_host.connect()
    worlds = home() / "worlds"
    for folder in sorted(worlds.iterdir()) if worlds.is_dir() else []:
        say(f"removing world {folder.name}")
        World(folder.name, say).down()
    if client is not None:
        remove(client, LABEL)
        for volume in client.volumes.list():
            if volume.name.startswith(f"{images.PREFIX}-"):
                volume.remove()
        for image in client.images.list():
            if any(tag.startswith(f"{images.PREFIX}/") for tag in image.tags):
                for tag in image.tags:
                    with suppress(docker.errors.APIError):
                        client.images.remove(tag, force=True)
        client.images.prune(filters={"label": "sparkfleet.sim"})
        client.close()
    docker_host.remove(home(), say)
    shutil.rmtree(home(), ignore_errors=True)


def dnsmasq(address: str, hub_address: str) -> str:
    """Configuration of the name server: our names here, the rest where Docker sends them, which keeps no name of a
    host that is off; so nothing is cached."""
    lines = [f"address=/{name}/{hub_address if name == 'huggingface.co' else address}" for name in keys.NAMES]
    lines += [f"listen-address={address}", "bind-dynamic", "no-resolv", "server=127.0.0.11", "cache-size=0"]
    return "\n".join(lines) + "\n"


def put(container: Container, files: dict[str, bytes], mode: int = 0o600) -> None:
    """Write files into a container, running or not."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        folders: set[str] = set()
        for name, content in files.items():
            for parent in reversed(Path(name).parents):
                if str(parent) not in (".", *folders):
                    folders.add(str(parent))
                    info = tarfile.TarInfo(str(parent))
                    info.type, info.mode = tarfile.DIRTYPE, 0o755
                    archive.addfile(info)
            info = tarfile.TarInfo(name)
            info.size, info.mode, info.mtime = len(content), mode, int(time.time())
            archive.addfile(info, io.BytesIO(content))
    container.put_archive("/", buffer.getvalue())


def run_in(container: Container, command: list[str]) -> tuple[int, str]:
    """Exit code and output of a command in a running container."""
    result = container.exec_run(command)
    output = result.output if isinstance(result.output, bytes) else b"".join(result.output)
    return int(result.exit_code or 0), output.decode(errors="replace")


def registry_answers(port: int) -> bool:
    """Whether the registry behind a loopback port speaks its protocol."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/", timeout=2) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError as error:
        return error.code == 401
    except OSError:
        return False


def registry_serves(port: int, image: str, mark: str) -> bool:
    """Whether an image's tag and a second tag, which names its content, stand for the same manifest."""
    repository, _, tag = image.partition(":")
    digests = set()
    for name in (tag, mark):
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v2/{repository}/manifests/{name}", method="HEAD")
        request.add_header("Accept", "application/vnd.docker.distribution.manifest.v2+json")
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310 - http, loopback
                digests.add(answer.headers["Docker-Content-Digest"])
        except OSError:
            return False
    return len(digests) == 1


def ssh_answers(port: int) -> bool:
    """Whether sshd greets on a loopback port."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            connection.settimeout(2)
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


def free_port() -> int:
    """A TCP port of the loopback interface that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def write_private(path: Path, text: str) -> None:
    """Write a file that its owner alone can read, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}.new")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    temporary.replace(path)


@contextmanager
def progress() -> Iterator[Say]:
    """Lines with the seconds since the start."""
    began = time.monotonic()
    yield lambda text: print(f"[{time.monotonic() - began:4.0f} s] {text}", flush=True)
