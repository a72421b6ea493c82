"""The plan for one Spark: a pure function of settings, model card and host state.

``state`` is what the module ``spark_state`` found. The plan says what must not go on (findings) and
what there is to do (prepare, fetch, deploy); an empty list of reasons means that nothing is.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import yaml

from sparkfleet import SparkfleetError, catalog, compose
from sparkfleet.catalog import Arguments, Card

GIB = 1024**3
#: (ID, VERSION_ID) of /etc/os-release -> where its own packages suffice for Docker with Compose v2.
SUPPORTED_OS = {("ubuntu", "24.04"): True, ("debian", "13"): True, ("debian", "12"): False}
SUPPORTED_MACHINES = ("aarch64", "x86_64")
#: community.docker.docker_compose_v2 asks for this Compose; the engine is the first with the GPU request we use.
MINIMUM_COMPOSE = (2, 18)
MINIMUM_ENGINE = (20, 10)
#: Free space that a plan never uses: logs, package lists, a person's own files.
DISK_RESERVE = 2 * GIB

State = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the inventory says of one host; the fields are the variables ``sparkfleet_<field>``."""

    model: str
    profile: str = "throughput"
    model_source: str = "local"
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    image: str = ""
    revision: str = ""
    port: int = 8000
    project_dir: str = "/opt/sparkfleet"
    cache_dir: str = "/opt/hf"
    cache_owner: str = "root"
    cache_group: str = "docker"
    cache_mode: str = "2775"
    compile_cache_dir: str = "/var/cache/sparkfleet"
    operator: str = "root"
    docker_source: str = "distribution"
    require_gb10: bool = True
    image_disk_gib: float = 25.0
    service_state: str = "started"


@dataclasses.dataclass(frozen=True)
class Finding:
    """A reason not to go on: an id of the table of failures, and the sentence for the operator."""

    id: str
    message: str


@dataclasses.dataclass
class Work:
    """What one part of a stage has to do, in words; nothing to do when empty."""

    reasons: list[str] = dataclasses.field(default_factory=list)

    def add(self, condition: object, reason: str) -> None:
        """Note a reason if the condition holds."""
        if condition:
            self.reasons.append(reason)


@dataclasses.dataclass(frozen=True)
class Target:
    """Model card and settings merged: what is to run, before any host is looked at."""

    card: Card
    settings: Settings
    arguments: Arguments
    image: str
    revision: str

    @classmethod
    def of(cls, settings: Settings) -> Target:
        """Merge in the documented order: model, profile, then ``sparkfleet_arguments`` of the inventory."""
        card = catalog.load(settings.model)
        arguments = card.with_profile(settings.profile)
        for name, value in settings.arguments.items():

            def fail(problem: str, name: str = name) -> SparkfleetError:
                return SparkfleetError(f"sparkfleet_arguments.{name}: {problem}")

            arguments[catalog.check_argument(name, value, fail)] = value
        return cls(card, settings, arguments, settings.image or card.image, settings.revision or card.revision)

    def document(self, state: State | None = None) -> compose.Document:
        """The compose file, pinned to what the host has fetched so far."""
        known_image = ((state or {}).get("docker") or {}).get("image") or {}
        known_model = (state or {}).get("model") or {}
        local = self.settings.model_source == "local"
        return compose.document(
            self.card,
            self.arguments,
            source="local" if local else "hub",
            image=self.image,
            image_digest=known_image.get("digest"),
            commit=known_model.get("commit") if known_model.get("complete") else None,
            cache_dir=self.settings.cache_dir,
            compile_cache_dir=self.settings.compile_cache_dir,
            port=self.settings.port,
        )


def make(target: Target, state: State) -> dict[str, Any]:
    """The plan as plain data (it becomes an Ansible variable)."""
    docker, toolkit, cache = prepare(target, state)
    image, model = fetch(target, state)
    document = target.document(state)
    deployment = deploy(target, state, document)
    return {
        "model": target.card.name,
        "repo": target.card.repo,
        "service": target.card.service,
        "image": target.image,
        "revision": target.revision,
        "compose": document,
        "verify": dataclasses.asdict(target.card.verify),
        "findings": [dataclasses.asdict(finding) for finding in findings(target, state)],
        "prepare": {
            "needed": bool(docker.reasons or toolkit.reasons or cache.reasons),
            "docker": docker.reasons,
            "install_docker": not _engine_suffices(state),
            "toolkit": toolkit.reasons,
            "cache": cache.reasons,
        },
        "fetch": {
            "needed": bool(image.reasons or model.reasons),
            "image": image.reasons,
            "model": model.reasons,
        },
        "deploy": deployment,
    }


def version(text: str | None) -> tuple[int, ...]:
    """Leading numbers of a version, (0,) when there is none."""
    found = re.match(r"v?(\d+(?:\.\d+)*)", text or "")
    return tuple(int(part) for part in found[1].split(".")) if found else (0,)


def _engine_suffices(state: State) -> bool:
    """Whether Docker is installed, running and recent enough, so that no package is touched."""
    engine = state["docker"]
    return bool(
        engine["running"]
        and version(engine["version"]) >= MINIMUM_ENGINE
        and version(engine["compose"]) >= MINIMUM_COMPOSE
    )


def prepare(target: Target, state: State) -> tuple[Work, Work, Work]:
    """Reasons to install or configure Docker, the NVIDIA Container Toolkit, and folders with the token."""
    settings, engine = target.settings, state["docker"]
    docker = Work()
    docker.add(not engine["installed"], "install Docker")
    docker.add(engine["installed"] and not engine["running"], f"start Docker ({engine.get('reason', 'stopped')})")
    docker.add(
        engine["running"] and version(engine["version"]) < MINIMUM_ENGINE,
        f"upgrade Docker {engine.get('version')} to {'.'.join(map(str, MINIMUM_ENGINE))} or newer",
    )
    docker.add(
        version(engine["compose"]) < MINIMUM_COMPOSE,
        f"install Docker's Compose plugin {'.'.join(map(str, MINIMUM_COMPOSE))} or newer "
        f"(found {engine['compose'] or 'none'})",
    )
    docker.add(not state["operator"]["in_docker_group"], f"put {settings.operator} into the group docker")

    toolkit = Work()
    toolkit.add(not state["toolkit"]["installed"], "install the NVIDIA Container Toolkit")
    toolkit.add(
        not state["toolkit"]["configured"] or (engine["running"] and "nvidia" not in engine["runtimes"]),
        "make nvidia a runtime of Docker and restart it",
    )

    cache = Work()
    wanted = {
        "owner": settings.cache_owner,
        "group": settings.cache_group,
        "mode": settings.cache_mode.zfill(4),
    }
    found = state["cache"]
    cache.add(found is None, f"make {settings.cache_dir}")
    if found:
        differs = [f"{key} {found[key]} to {value}" for key, value in wanted.items() if found[key] != value]
        cache.add(differs, f"change {settings.cache_dir}: {', '.join(differs)}")
    cache.add(not state["token"]["current"], "write the Hugging Face token")
    cache.add(
        state["token"]["present"] and not state["token"]["private"],
        "make the Hugging Face token readable by root alone",
    )
    return docker, toolkit, cache


def fetch(target: Target, state: State) -> tuple[Work, Work]:
    """Reasons to pull the image and to download the model."""
    image, model = Work(), Work()
    image.add(not state["docker"].get("image"), f"pull {target.image}")
    if target.settings.model_source == "local":
        model.add(
            not state["model"]["complete"],
            f"download {target.card.repo} at {target.revision} ({target.card.download_gib:g} GiB)",
        )
    return image, model


def deploy(target: Target, state: State, document: compose.Document) -> dict[str, Any]:
    """What the deploy stage has to do: write the file, start (or restart) the service, or only wait for it."""
    service, settings = target.card.service, target.settings
    ours = [item for item in state["docker"].get("containers", []) if item["ours"]]
    current = next((item for item in ours if item["service"] == service), None)
    running = current is not None and current["state"] == "running"
    others = sorted({item["service"] for item in ours if item["service"] != service and item["state"] == "running"})

    write = Work()
    if state["compose_file"] is None:
        write.add(True, f"write {settings.project_dir}/compose.yml")
    else:
        write.add(_parse(state["compose_file"]) != document, f"change {settings.project_dir}/compose.yml")
    start, stop, wait = Work(), Work(), Work()
    drifted = running and not write.reasons and not _matches(current, document["services"][service])
    if settings.service_state == "started":
        stop.add(others, f"stop {', '.join(others)}")
        start.add(current is None, f"create and start {service}")
        start.add(current is not None and not running, f"start {service} ({current and current['state']})")
        start.add(write.reasons and running, f"start {service} anew")
        start.add(drifted, f"start {service} anew: it runs with other settings than its file")
        wait.add(start.reasons or not state["healthy"], f"wait for {service}")
    else:
        stop.add(running or others, f"stop {', '.join([*others, *([service] if running else [])])}")
    # An engine that is started anew gives its memory back first, so that the page cache can be dropped between.
    stops_itself = running and (start.reasons or settings.service_state == "stopped")
    return {
        "needed": bool(write.reasons or start.reasons or stop.reasons or wait.reasons),
        "write": write.reasons,
        "stop": stop.reasons,
        "stop_services": [*others, *([service] if stops_itself else [])],
        "start": start.reasons,
        "recreate": drifted,
        "wait": wait.reasons,
    }


def _parse(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


def _matches(container: Mapping[str, Any] | None, service: Mapping[str, Any]) -> bool:
    """Whether a container was started from this service of the compose file."""
    started = (container or {}).get("started_with")
    if not started:
        return False
    environment = service["environment"]
    return bool(
        started["image"] == service["image"]
        and started["command"] == service["command"]
        # In hub mode the value is the token, which is not looked at.
        and all(key in started["environment"] for key in environment)
        and all(started["environment"][key] == value for key, value in environment.items() if not value.startswith("$"))
        and started["ports"] == sorted(int(port.partition(":")[0]) for port in service["ports"])
        and started["volumes"] == sorted(f"{volume}:rw" for volume in service["volumes"])
        and started["restart"] == service["restart"]
    )


def findings(target: Target, state: State) -> list[Finding]:
    """All reasons not to go on, in the order an operator would mend them."""
    found: list[Finding] = []

    def refuse(identifier: str, message: str) -> None:
        found.append(Finding(identifier, message))

    _host_findings(target, state, refuse)
    _port_findings(target, state, refuse)
    _hub_findings(target, state, refuse)
    _disk_findings(target, state, refuse)
    return found


def _host_findings(target: Target, state: State, refuse: Any) -> None:
    settings, system, gpu = target.settings, state["os"], state["gpu"]
    release = (system["id"], system["version"])
    if release not in SUPPORTED_OS:
        refuse(
            "os-unsupported",
            f"{system['name'] or '/etc/os-release'} is not supported: DGX OS (Ubuntu 24.04) is; "
            "so are Debian 12 and 13",
        )
    elif not SUPPORTED_OS[release] and not state["docker"]["installed"] and settings.docker_source == "distribution":
        refuse(
            "os-without-compose",
            f"{system['name']} has no package of Compose v2: set sparkfleet_docker_source: docker",
        )
    if system["machine"] not in SUPPORTED_MACHINES:
        refuse(
            "machine-unsupported",
            f"processor {system['machine']}: a Spark is aarch64; x86_64 is for simulation",
        )
    if settings.require_gb10 and (gpu is None or "GB10" not in gpu["name"]):
        refuse(
            "not-a-spark",
            f"no GB10: nvidia-smi reports {gpu['name'] if gpu else 'nothing'}. Check the address in the inventory; "
            "on a Spark, install its driver (nvidia-smi must answer); to go on all the same, set "
            "sparkfleet_require_gb10: false",
        )
    if not state["operator"]["exists"]:
        refuse(
            "operator-unknown",
            f"user '{settings.operator}' does not exist: set sparkfleet_operator to one that does",
        )
    if state["cache"] and not state["cache"]["directory"]:
        refuse(
            "cache-not-a-folder",
            f"{settings.cache_dir} is not a folder: move it, or set sparkfleet_cache_dir",
        )


def _port_findings(target: Target, state: State, refuse: Any) -> None:
    port, containers = target.settings.port, state["docker"].get("containers", [])
    remedy = "stop it, or set sparkfleet_port to a free port"
    for item in containers:
        if not item["ours"] and item["name"] == target.card.service:
            refuse(
                "name-taken",
                f"a container named {item['name']} exists that Sparkfleet did not make: "
                f"`docker rm -f {item['name']}` on the host, if it is not needed",
            )
    holders = [item for item in containers if port in item["ports"] and item["state"] == "running"]
    if target.settings.service_state != "started" or any(item["ours"] for item in holders):
        return
    if holders:
        refuse(
            "port-taken",
            f"port {port} is held by container {holders[0]['name']} ({holders[0]['image']}): {remedy}",
        )
    elif state["listener"]:
        pid = state["listener"]["pid"]
        who = f"{state['listener']['process']} (pid {pid})" if pid else "a process that could not be named"
        refuse("port-taken", f"port {port} is held by {who}: {remedy}")


def _hub_findings(target: Target, state: State, refuse: Any) -> None:
    hub, card = state["hub"], target.card
    if hub is None or hub["status"] == 200 or not fetch(target, state)[1].reasons:
        return
    has_token = state["token"]["present"] or not state["token"]["current"]
    page = f"https://huggingface.co/{card.repo}"
    if hub["status"] == 0:
        refuse(
            "hub-unreachable",
            f"the host does not reach the Hugging Face Hub ({hub['error']}): check its name server, proxy "
            "and certificates",
        )
    elif hub["status"] == 401 and not has_token:
        refuse(
            "hub-token-missing",
            f"{card.repo} is not given without a token: accept the licence at {page}, make a read token at "
            "https://huggingface.co/settings/tokens, and set sparkfleet_hf_token (or export HF_TOKEN before the run)",
        )
    elif hub["status"] == 401:
        refuse(
            "hub-token-rejected",
            f"the Hub rejects the token for {card.repo}: it is mistyped or revoked, or there is no such model; "
            "make a new read token at https://huggingface.co/settings/tokens",
        )
    elif hub["status"] == 403:
        refuse(
            "hub-no-access",
            f"the token's account has no access to {card.repo}: accept the licence at {page} with that account, "
            "and give a fine-grained token the right to read gated repositories",
        )
    elif hub["error"] == "RevisionNotFound":
        refuse(
            "hub-revision-unknown",
            f"{card.repo} has no revision '{target.revision}': set sparkfleet_revision to one it has ({page}/commits)",
        )
    elif hub["error"] == "EntryNotFound":
        return  # the repository is there; not every format has a config.json
    elif hub["status"] == 404:
        refuse("hub-repo-unknown", f"the Hub has no model {card.repo}: check repo in {card.source}")
    else:
        refuse("hub-unreachable", f"the Hub answers {hub['status']} for {card.repo}: try again later")


def _disk_findings(target: Target, state: State, refuse: Any) -> None:
    image, model = fetch(target, state)
    needs: dict[int, list[tuple[str, str, float]]] = {}
    free: dict[int, int] = {}
    if image.reasons:
        where = state["disk"]["docker"]
        root = state["docker"].get("root", "/var/lib/docker")
        needs.setdefault(where["device"], []).append(("the image", root, target.settings.image_disk_gib * GIB))
        free[where["device"]] = where["free"]
    if model.reasons:
        where = state["disk"]["cache"]
        rest = max(target.card.download_gib * GIB - state["model"]["bytes"], 0)
        needs.setdefault(where["device"], []).append(("the model", target.settings.cache_dir, rest))
        free[where["device"]] = where["free"]
    for device, parts in needs.items():
        wanted = sum(size for _, _, size in parts) + DISK_RESERVE
        if free[device] < wanted:
            what = " and ".join(f"{size / GIB:.1f} GiB for {name} in {path}" for name, path, size in parts)
            refuse(
                "disk-full",
                f"{free[device] / GIB:.1f} GiB free, {wanted / GIB:.1f} GiB needed ({what}, "
                f"{DISK_RESERVE / GIB:.0f} GiB kept free): free some (`docker system df` and `du -sh "
                f"{target.settings.cache_dir}/*` show what is there), or set sparkfleet_cache_dir to a larger disk",
            )
