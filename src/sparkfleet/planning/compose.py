"""The compose file of a host: the guide's service for each engine, as data.

Compose replaces `$NAME` and `${NAME}` in a file's values, so what comes from cards and inventories is written by
`literal`, and `plain` is what the container gets.

``source="hub"`` is the guide's way, plus limits of the log: the token in the environment, the server downloads.
``source="local"`` is ours: files fetched and checked before, the server offline, no token, image and
model pinned to what was fetched.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from sparkfleet_host.bounded import COMMIT, printable
from sparkfleet_host.cache import repo_folder, repo_of
from sparkfleet_host.engine import ON_DEMAND, PROJECT
from sparkfleet_host.http import KEY_FILE

from sparkfleet import SparkfleetError
from sparkfleet.planning.catalog import Arguments, ArgumentValue, Card
from sparkfleet.planning.vllm_versions import starts_with_serve

CACHE_IN_CONTAINER = "/root/.cache/huggingface"
CA_IN_CONTAINER = "/etc/ssl/certs/sparkfleet-ca.pem"
#: Where Python's HTTP clients read their certificate authorities: httpx and ssl, requests.
CA_VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
ENGINE_PORT = 8000
LOOPBACK = "127.0.0.1"
#: The TCP port of the clients of an engine that starts on demand.
DOOR_LABEL = "sparkfleet.port"
#: For vLLM an empty list of domains is no limit; this one stands for no host (RFC 2606).
NO_DOMAIN = "none.invalid"
#: On the host, 0600; in the container Docker mounts it under the name of the secret.
KEY_NAME = "engine_key"
#: vLLM reads its key from the environment. `docker inspect` shows what Compose puts there, so the command does it.
#: (`$$` is Compose's way to write `$`.)
KEYED = ["sh", "-c", f'VLLM_API_KEY=$$(cat /run/secrets/{KEY_NAME}) && export VLLM_API_KEY && exec "$$@"', "sh"]
#: Where vLLM, Triton, FlashInfer, the CUDA driver and torch keep what they compile, by default.
COMPILE_CACHES = {
    "vllm": "/root/.cache/vllm",
    "triton": "/root/.triton",
    "flashinfer": "/root/.cache/flashinfer",
    "nv": "/root/.nv",
    "inductor": "/tmp/torchinductor_root",  # noqa: S108 - the container's
}
#: Docker's default keeps a log indefinitely.
LOGGING = {"driver": "json-file", "options": {"max-size": "50m", "max-file": "5"}}
#: Defaults of the guide's service that the engine does not need. It runs as root of the container, which without
#: DAC_OVERRIDE cannot write into a cache of another owner (vLLM locks a file there as it loads). Threads count as
#: processes: compilers and OpenMP start hundreds.
HARDENING: dict[str, Any] = {
    "security_opt": ["no-new-privileges:true"],
    "cap_drop": ["ALL"],
    "cap_add": ["DAC_OVERRIDE"],
    "pids_limit": 8192,
}
#: Placeholder in the file for the token, which Compose takes from `.env`.
TOKEN = "${HF_TOKEN}"  # noqa: S105 - a name, not a value

Source = Literal["local", "hub"]
Document = dict[str, Any]
MASTER_PORT = 29501  # of rank 0, where the ranks meet; NVIDIA's recipes have it
INFINIBAND = "/dev/infiniband"
#: The program of the host in a rank's container, and how it is started there.
PROGRAM_IN_CONTAINER = "/sparkfleet_host.pyz"
ENTRY = ("python3", PROGRAM_IN_CONTAINER, "rank")
#: Variables that name the interface of the fabric to NCCL, Gloo, UCX, Open MPI and vLLM.
INTERFACE_VARIABLES = (
    *("MN_IF_NAME", "UCX_NET_DEVICES", "NCCL_SOCKET_IFNAME", "OMPI_MCA_btl_tcp_if_include", "GLOO_SOCKET_IFNAME"),
    "TP_SOCKET_IFNAME",
)


@dataclasses.dataclass(frozen=True)
class Rank:
    """A host's part of an engine that spans several: `number` of `count`, its `address` on the fabric and that of rank
    0, the `interface` that has it, and the RDMA devices of that port. Over Ray also the `nodes`, addresses by rank, and
    the `program` of the host, which forms the cluster (`sparkfleet_host.rank`)."""

    number: int
    count: int
    address: str
    head: str
    interface: str = ""
    rdma: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    program: str = ""

    @property
    def over_ray(self) -> bool:
        """Whether Ray connects the ranks, in place of vLLM itself."""
        return bool(self.program)

    @property
    def entry(self) -> list[str]:
        """Over Ray: what precedes the command of the engine."""
        if not self.over_ray:
            return []
        return [*ENTRY, "--rank", str(self.number), "--nodes", ",".join(self.nodes), "--"]

    @property
    def own(self) -> list[str]:
        """What no other rank has in its command."""
        return ["--rank", str(self.number)] if self.over_ray else self.flags

    @property
    def flags(self) -> list[str]:
        """What tells `vllm serve` of the others; over Ray it finds them in the cluster."""
        if self.over_ray:
            return []
        words = ["--nnodes", str(self.count), "--node-rank", str(self.number)]
        words += ["--master-addr", self.head, "--master-port", str(MASTER_PORT)]
        return [*words, *(["--headless"] if self.number else [])]

    @property
    def environment(self) -> dict[str, str]:
        """The fabric, as the libraries want it named."""
        found = {"VLLM_HOST_IP": self.address}
        if self.interface:
            found |= dict.fromkeys(INTERFACE_VARIABLES, self.interface)
        if self.rdma:
            found |= {"NCCL_IB_HCA": ",".join(self.rdma), "NCCL_IB_DISABLE": "0", "NCCL_IGNORE_CPU_AFFINITY": "1"}
        return found


def common(service: Mapping[str, Any], rank: Rank) -> str:
    """A hash of what has to be the same on all ranks of an engine: image, arguments, environment."""
    own = {*rank.environment, *INTERFACE_VARIABLES, "NCCL_IB_HCA", "NCCL_IB_DISABLE", "NCCL_IGNORE_CPU_AFFINITY"}
    words = list(map(plain, [*(service.get("entrypoint", ()) if rank.over_ray else ()), *service["command"]]))
    start = words.index(rank.own[0])
    command = words[:start] + words[start + len(rank.own) :]
    environment = {name: value for name, value in service["environment"].items() if name not in own}
    same = [plain(service["image"]), command, environment, rank.count, rank.head]
    return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()


def literal(text: Any) -> str:
    """Text as a compose file has it, so that Compose replaces nothing in it."""
    return str(text).replace("$", "$$")


def plain(text: Any) -> str:
    """What Compose makes of a `literal`."""
    return str(text).replace("$$", "$")


def flags(arguments: Arguments) -> list[str]:
    """``vllm serve`` flags in the order given; true is a bare flag, false leaves it out, a mapping is JSON."""
    words: list[str] = []
    for name, value in arguments.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        elif value is not False:
            text = _text(name, value)
            if isinstance(value, str) and text.startswith("-") and not re.fullmatch(r"-[0-9.]+", text):
                raise SparkfleetError(f"{name}: {printable(text, 60)!r} would be another flag of vllm serve")
            words += [flag, text]
    return words


def _text(name: str, value: ArgumentValue) -> str:
    if isinstance(value, dict):
        return json.dumps(value)
    # The guide writes 0.90; a float of YAML has lost the zero.
    two = f"{value:.2f}" if name == "gpu_memory_utilization" and isinstance(value, float) else ""
    return two if two and float(two) == value else str(value)


def with_draft(arguments: Arguments, repo: str, commit: str) -> Arguments:
    """The same with the draft of `speculative_config` as the folder in the container that has it at a commit: an
    offline engine knows no revision of it."""
    given: Any = arguments["speculative_config"]
    config = json.loads(given) if isinstance(given, str) else given
    folder = f"{CACHE_IN_CONTAINER}/{repo_folder(repo)}/snapshots/{commit}"
    return {**arguments, "speculative_config": {**config, "model": folder}}


def draft_of(command: Sequence[Any]) -> tuple[str, str] | None:
    """Repository and commit of the draft that `with_draft` put into a command."""
    for word, text in itertools.pairwise(map(plain, command)):
        if word == "--speculative-config":
            parts = str(json.loads(text).get("model") or "").removeprefix(f"{CACHE_IN_CONTAINER}/").split("/")
            repo = repo_of(parts[0]) if len(parts) == 3 and parts[1] == "snapshots" else None
            return (repo, parts[2]) if repo and COMMIT.fullmatch(parts[2]) else None
    return None


def document(
    card: Card,
    arguments: Arguments,
    *,
    environment: Mapping[str, str] | None = None,
    source: Source = "local",
    image: str | None = None,
    image_digest: str | None = None,
    image_known_as: str | None = None,
    commit: str | None = None,
    cache_dir: str = "/opt/hf",
    compile_cache_dir: str = "/var/cache/sparkfleet",
    ca_file: str = "",
    port: int = ENGINE_PORT,
    addresses: Sequence[str] = (),
    api_key_enabled: bool = False,
    media_domains: Sequence[str] | None = None,
    rank: Rank | None = None,
) -> Document:
    """The compose file of one engine as data: one project, one service, in the key order of the guide.

    ``environment`` comes on top of the card's. ``image_digest`` (``sha256:...``) and ``commit`` (40 hex digits) pin
    what was fetched; they are left out as long as nothing has been fetched. They mean nothing to ``source="hub"``.
    ``image_known_as`` (NAME@DIGEST) is Docker's name for an image that was brought offline.
    ``addresses`` are those of the host that the port is published on, besides loopback; all if there are none.
    ``api_key_enabled``: the engine takes only requests with the key in `KEY_FILE`.
    ``media_domains``: hosts that the engine may fetch pictures from, which clients name as URLs: with none of them it
    takes those of the request itself (``data:``) alone; None leaves it to vLLM, which fetches whatever it reaches.
    ``ca_file``: certificate authorities on the host that an engine trusts which downloads models or media by itself.
    What the engine compiles is kept in ``compile_cache_dir``, one folder an image digest: another image's
    compiled code does not fit.
    ``rank``: of a model that spans several hosts, which is on the network of the host, and started by Sparkfleet alone.
    Raises for a card of several Sparks without one.
    """
    if card.sparks > 1 and rank is None:
        raise SparkfleetError(
            f"model {card.name} spans {card.sparks} Sparks (sparks in {card.source}): list them in sparkfleet_nodes "
            "(docs/several-sparks.md), or choose a model for one Spark (`sparkfleet models`)"
        )
    image = image or card.image
    volumes = [literal(f"{cache_dir}:{CACHE_IN_CONTAINER}")]
    command = [
        *([] if starts_with_serve(image) else ["vllm", "serve"]),
        card.repo,
        "--download-dir",
        CACHE_IN_CONTAINER,
        *flags(arguments),
    ]
    if source == "hub":
        variables = {"HF_TOKEN": TOKEN, "HUGGING_FACE_HUB_TOKEN": TOKEN}
        # The guide's flag, needed by none of its models; offline there is no remote code to trust.
        command.append("--trust-remote-code")
    else:
        # HF_HUB_CACHE: vLLM reads config and tokenizer there, for the weights in --download-dir.
        variables = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": CACHE_IN_CONTAINER}
        # Offline, vLLM replaces the model's name with a path; clients must still find the name.
        command += ["--served-model-name", card.repo]
        if commit:
            command += ["--revision", commit, "--tokenizer-revision", commit]
        if image_digest:
            kept = f"{compile_cache_dir}/{image_digest.partition(':')[2][:12]}"
            volumes += [literal(f"{kept}/{name}:{path}") for name, path in COMPILE_CACHES.items()]
            image = image_known_as or f"{image.partition('@')[0]}@{image_digest}"
    if ca_file:
        variables |= dict.fromkeys(CA_VARIABLES, CA_IN_CONTAINER)
        volumes.append(literal(f"{ca_file}:{CA_IN_CONTAINER}:ro"))
    if media_domains is not None:
        command += ["--allowed-media-domains", *(media_domains or [NO_DOMAIN])]
        # A host that may be asked must not send the engine on to another.
        variables["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] = "0"
    if rank:
        command += ["--host", listen_at(addresses), "--port", str(port), *rank.flags]
        variables |= rank.environment
        if rank.over_ray:
            volumes.append(literal(f"{rank.program}:{PROGRAM_IN_CONTAINER}:ro"))
    given = {**card.environment, **(environment or {})}
    service: Document = {
        "image": literal(image),
        "container_name": card.service,
        # A rank that starts alone cannot join the others: Sparkfleet starts all of them.
        "restart": "no" if rank else "unless-stopped",
        **({"network_mode": "host"} if rank else {"ports": published(port, addresses)}),
        "environment": {**variables, **{name: literal(value) for name, value in given.items()}},
        "ipc": "host",
        "ulimits": {"memlock": -1, "stack": 67108864},
        "command": [literal(word) for word in command],
        "volumes": volumes,
        "deploy": {
            "resources": {"reservations": {"devices": [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]}}
        },
        "logging": copy.deepcopy(LOGGING),
        **(copy.deepcopy(HARDENING) if source == "local" else {}),
    }
    if rank and rank.rdma:
        service["devices"] = [f"{INFINIBAND}:{INFINIBAND}"]
        service["cap_add"] = [*service.get("cap_add", []), "IPC_LOCK"]
    made: Document = {"name": PROJECT, "services": {card.service: service}}
    first = [*(KEYED if api_key_enabled else []), *map(literal, rank.entry if rank else [])]
    if first and starts_with_serve(image):
        service["entrypoint"] = [*first, "vllm", "serve"]
    elif first:
        service["command"] = [*first, *service["command"]]
    if api_key_enabled:
        service["secrets"] = [KEY_NAME]
        made["secrets"] = {KEY_NAME: {"file": KEY_FILE}}
    return made


def on_demand(port: int) -> Document:
    """What the service of an engine has that starts on demand: `docker compose up` leaves it alone, and another port of
    its clients is another definition."""
    return {"profiles": [ON_DEMAND], "labels": {DOOR_LABEL: str(port)}}


def merged(documents: Sequence[Document]) -> Document:
    """One compose file of those of several engines, whose services have different names."""
    made: Document = {"name": PROJECT, "services": {}}
    for one in documents:
        made["services"] |= one["services"]
        if "secrets" in one:
            made["secrets"] = {**made.get("secrets", {}), **one["secrets"]}
    return made


def listen_at(addresses: Sequence[str]) -> str:
    """The one address that an engine on the network of the host listens on: loopback where it is the only one."""
    return LOOPBACK if list(addresses) == [LOOPBACK] else "0.0.0.0"  # noqa: S104 - the default of vLLM


def published(port: int, addresses: Sequence[str]) -> list[str]:
    """The ports of the service: everywhere, or on loopback (for guard and verification) and the addresses given."""
    if not addresses:
        return [f"{port}:{ENGINE_PORT}"]
    hosts = dict.fromkeys((LOOPBACK, *addresses))
    return [f"{f'[{host}]' if ':' in host else host}:{port}:{ENGINE_PORT}" for host in hosts]


def without_key(command: Sequence[Any]) -> list[Any]:
    """A command without the part that passes it the key."""
    return list(command[len(KEYED) :] if list(command[: len(KEYED)]) == KEYED else command)


def of_engine(command: Sequence[Any]) -> list[Any]:
    """A command without what passes it the key, and without what forms the cluster of its ranks."""
    words = without_key(command)
    return words[words.index("--") + 1 :] if tuple(words[: len(ENTRY)]) == ENTRY and "--" in words else words
