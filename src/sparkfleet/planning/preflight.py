"""Preflight: everything about a host that would make a deployment fail, found before anything is changed.

Each check reports what it saw and, if that is insufficient, findings: an id of the table of failures and a sentence
with the remedy. All are returned at once.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from sparkfleet_host import cache, fabric
from sparkfleet_host.bounded import COMMIT, GIB
from sparkfleet_host.release_format import REAL

from sparkfleet import SparkfleetError
from sparkfleet.diagnosis.failures import BY_ID
from sparkfleet.documents import yaml_text
from sparkfleet.packaging.bundle import Bundle
from sparkfleet.planning import calibration, catalog, kv_layout, memory_plan, nodes, vllm_versions
from sparkfleet.planning.catalog import Arguments
from sparkfleet.planning.target import EngineTarget, ModelTarget, State, Target, listen

#: (ID, VERSION_ID) of /etc/os-release -> where its own packages suffice for Docker with Compose v2.
SUPPORTED_OS = {("ubuntu", "24.04"): True, ("debian", "13"): True, ("debian", "12"): False}
SUPPORTED_MACHINES = ("aarch64", "x86_64")
#: What Docker calls them.
ARCHITECTURES = {"aarch64": "arm64", "x86_64": "amd64"}
#: CUDA 13, which the first image for the GB10 has, came with this driver.
MINIMUM_DRIVER = (580,)
#: The first Compose that is tested here; the engine is the first with the GPU request we use.
MINIMUM_COMPOSE = (2, 18)
MINIMUM_ENGINE = (20, 10)
#: The first with `nvidia-ctk runtime configure`.
MINIMUM_TOOLKIT = (1, 12)
#: A clock that is further off breaks certificates and signatures, seconds.
CLOCK_TOLERANCE = 300
#: containerd's image store keeps layers compressed alongside the unpacked ones: 10 GiB for 22 GiB of the images that
#: NVIDIA has for the GB10.
BOTH_KEPT = 1.5
#: Free space that a plan never uses: logs, package lists, a person's own files.
DISK_RESERVE = 2 * GIB
#: Configuration and tokenizer of a model, GiB: 17 MB are usual.
TRIAL_GIB = 0.1


@dataclasses.dataclass(frozen=True)
class Finding:
    """A reason not to proceed: an id of the table of failures, and the sentence for the operator."""

    id: str
    message: str


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that was checked: what was seen, and what is wrong with it."""

    name: str
    seen: str
    findings: tuple[Finding, ...] = ()


@dataclasses.dataclass(frozen=True)
class Work:
    """What the plan will do, as far as the checks depend on it: of each engine, whether its image is pulled, and
    whether each of its models is downloaded."""

    pulls: Sequence[bool]
    downloads: Sequence[Sequence[bool]]
    starts: bool
    installs: bool = False
    #: Nothing is changed, and what another user than root sees is enough.
    reads: bool = False


@dataclasses.dataclass(frozen=True)
class ModelCase:
    """A model of an engine, what the host has of it, {"model", "hub"}, and whether it is downloaded."""

    model: ModelTarget
    found: State
    downloads: bool


@dataclasses.dataclass(frozen=True)
class Case:
    """An engine, what the host has of it, and what is fetched for it."""

    engine: EngineTarget
    found: State
    pulls: bool
    models: tuple[ModelCase, ...]


def version(text: str | None) -> tuple[int, ...]:
    """Leading numbers of a version, (0,) when there is none."""
    found = re.match(r"v?([0-9]{1,9}(?:\.[0-9]{1,9}){0,7})(?![0-9])", text or "")
    return tuple(int(part) for part in found[1].split(".")) if found else (0,)


def dotted(numbers: tuple[int, ...]) -> str:
    """A version as people write it."""
    return ".".join(map(str, numbers))


def known(identifier: str, fact: str) -> Finding:
    """A finding with the remedy of the table."""
    return Finding(identifier, f"{fact}. {BY_ID[identifier].remedy}")


def checks(target: Target, state: State, work: Work) -> tuple[list[Check], list[memory_plan.Plan | None]]:
    """All checks, in the order in which an operator would fix things, those of an engine once for each; and the memory
    plans of the engines, None when there is none. Without root nothing else that was seen is sure, so that is the only
    one then."""
    cases = [
        Case(engine, found, pulls, tuple(map(ModelCase, engine.models, engine.found(found), downloads)))
        for engine, found, pulls, downloads in zip(
            target.engines, state["engines"], work.pulls, work.downloads, strict=True
        )
    ]
    # Engines may share a draft.
    models = list({(case.model.repo, case.model.revision): case for part in cases for case in part.models}.values())
    memory, plans = _memory(target, state, work)
    user = state.get("user") or {"id": 0}
    if user["id"] != 0 and not work.reads:
        finding = known("not-root", f"needs root, runs as {user['name']}")
        return [Check("user", str(user["name"]), (finding,))], plans
    return [
        _gpu(target, state),
        _system(target, state),
        _clock(state),
        *([_trust(state)] if target.settings.ca else []),
        _docker(target, state),
        _toolkit(state),
        *(_image(target, state, case) for case in cases),
        *([_executor(target, state)] if target.settings.spans else []),
        *(_code(case, work) for case in models if case.model.remote_code and target.settings.model_source == "local"),
        *memory,
        _disk(target, state, cases, models),
        *([_fabric(target, state)] if target.settings.spans else []),
        *(_port(target, state, case) for case in cases),
        *([_address(target, state)] if target.settings.gateways else []),
        *([_firewall(target, state)] if target.settings.firewall else []),
        _switch(target, state),
        *([_bundle(target.bundle, state, cases, models, work)] if target.bundle else []),
        *([_weights(case) for case in models] if target.settings.trial == REAL else []),
        *(_registry(case) for case in cases),
        *(_hub(state, case) for case in models),
        _folders(target, state),
    ], plans


def _gpu(target: Target, state: State) -> Check:
    gpu, found = state["gpu"], []
    if state.get("gpu_error"):
        found.append(known("gpu-lost", f"nvidia-smi: {state['gpu_error']}"))
    elif target.settings.require_gb10 and (gpu is None or "GB10" not in gpu["name"]):
        found.append(
            Finding(
                "not-a-spark",
                f"no GB10: nvidia-smi reports {gpu['name'] if gpu else 'nothing'}. Check the address in the inventory; "
                "on a Spark, install its driver (nvidia-smi must answer); to proceed anyway, set "
                "sparkfleet_require_gb10: false",
            )
        )
    if target.settings.require_gb10 and gpu and version(gpu["driver"]) < MINIMUM_DRIVER:
        found.append(
            known(
                "driver-too-old", f"driver {gpu['driver']} is older than {dotted(MINIMUM_DRIVER)}, which CUDA 13 needs"
            )
        )
    return Check("gpu", f"{gpu['name']}, driver {gpu['driver']}" if gpu else "none", tuple(found))


def _system(target: Target, state: State) -> Check:
    settings, system, found = target.settings, state["os"], []
    release = (system["id"], system["version"])
    if release not in SUPPORTED_OS:
        found.append(
            Finding(
                "os-unsupported",
                f"{system['name'] or '/etc/os-release'} is not supported: DGX OS (Ubuntu 24.04) is; "
                "so are Debian 12 and 13",
            )
        )
    elif not SUPPORTED_OS[release] and not state["docker"]["installed"] and settings.docker_source == "distribution":
        found.append(
            Finding(
                "os-without-compose",
                f"{system['name']} has no package of Compose v2: set sparkfleet_docker_source: docker",
            )
        )
    if system["machine"] not in SUPPORTED_MACHINES:
        found.append(
            Finding(
                "machine-unsupported",
                f"processor {system['machine']}: a Spark is aarch64; x86_64 is for simulation",
            )
        )
    return Check("system", f"{system['name']}, {system['machine']}", tuple(found))


def _clock(state: State) -> Check:
    offset = round(state["clock"]["offset"])
    if abs(offset) <= CLOCK_TOLERANCE:
        return Check("clock", "agrees with this machine's")
    size = f"{abs(offset) / 86400:.1f} days" if abs(offset) >= 86400 else f"{abs(offset) / 60:.0f} minutes"
    seen = f"{size} {'ahead of' if offset > 0 else 'behind'} this machine's"
    return Check("clock", seen, (known("clock-wrong", f"the host's clock is {seen}"),))


def _trust(state: State) -> Check:
    """Whether the host can be given a CA."""
    trust = state["trust"]
    if trust["program"]:
        return Check("ca", "trusted" if trust["current"] else "not trusted yet; will be")
    fact = "the host has no update-ca-certificates, which adds the CA of sparkfleet_ca_file to what it trusts"
    return Check("ca", "no update-ca-certificates", (known("ca-program-missing", fact),))


def _docker(target: Target, state: State) -> Check:
    docker, found = state["docker"], []
    if not docker["installed"]:
        return Check("docker", "not installed; will be")
    if docker["running"] and version(docker["version"]) < MINIMUM_ENGINE:
        found.append(known("docker-too-old", f"Docker {docker['version']} is older than {dotted(MINIMUM_ENGINE)}"))
    if version(docker["compose"]) < MINIMUM_COMPOSE:
        found.append(
            known(
                "compose-too-old",
                f"Docker's Compose plugin {dotted(MINIMUM_COMPOSE)} or newer is needed, found "
                f"{docker['compose'] or 'none'}",
            )
        )
    for item in docker.get("containers", []):
        if not item["ours"] and item["name"] in {engine.service for engine in target.engines}:
            found.append(
                Finding(
                    "name-taken",
                    f"a container named {item['name']} exists that Sparkfleet did not make: "
                    f"`docker rm -f {item['name']}` on the host, if it is not needed",
                )
            )
    running = docker["version"] if docker["running"] else "not running"
    return Check("docker", f"{running}, Compose {docker['compose'] or 'missing'}", tuple(found))


def _toolkit(state: State) -> Check:
    toolkit = state["toolkit"]
    if not toolkit["installed"]:
        return Check("toolkit", "not installed; will be")
    seen = toolkit["version"] or "of unknown version"
    if toolkit["version"] and version(toolkit["version"]) < MINIMUM_TOOLKIT:
        fact = f"NVIDIA Container Toolkit {seen} is older than {dotted(MINIMUM_TOOLKIT)}"
        return Check("toolkit", seen, (known("toolkit-too-old", fact),))
    return Check("toolkit", seen)


def _image(target: Target, state: State, case: Case) -> Check:
    image = case.engine.image
    seen, found = f"{image}, vLLM {case.engine.version.text}", []
    if target.settings.require_gb10 and (reason := vllm_versions.unfit(image)):
        found.append(known("image-unsupported", reason))
    built = (case.found.get("image") or {}).get("architecture", "")
    if case.pulls and target.lock:
        built = target.lock.platform(image).partition("/")[2].replace("unknown", "")
    if built and ARCHITECTURES.get(state["os"]["machine"], built) != built:
        found.append(known("image-platform", f"{image} is built for {built}, the host is {state['os']['machine']}"))
    return Check("image", seen, tuple(found))


def _code(case: ModelCase, work: Work) -> Check:
    """Code of the model's repository, which the engine runs: of a commit that someone could review."""
    repo, revision = case.model.repo, case.model.revision
    if COMMIT.fullmatch(revision) or work.reads or not (work.starts or case.downloads):
        return Check("code", f"that of {repo} at {revision}")
    fact = f"trust_remote_code lets the engine run the code of {repo} at whatever commit {revision} is then"
    return Check("code", f"that of {repo} at {revision}", (known("remote-code-unreviewed", fact),))


def _memory(target: Target, state: State, work: Work) -> tuple[list[Check], list[memory_plan.Plan | None]]:
    """The memory of each engine, those before it in the list being started already."""
    settings = target.settings
    total, available = state["memory"]["total"] / GIB, state["memory"]["available"] / GIB
    held = sum(
        _held(item, state, total)
        for item in state["docker"].get("containers", [])
        if item["ours"] and item["state"] == "running" and item.get("started_with")
    )
    # What ours hold will be free again; a host never gets all.
    free = max(available, min(available + held, total - memory_plan.USUAL_HOST_GIB))
    found: list[Check] = []
    plans: list[memory_plan.Plan | None] = []
    known = measured(target, state)
    # What serves is not planned again because it was measured.
    corrections = [one.correction if one and work.starts else 0.0 for one in known]
    for (room, made), one in zip(memory_plans(target, total, free, corrections), known, strict=True):
        if one and isinstance(made, memory_plan.Plan):
            made = noted(made, one, work.starts)  # noqa: PLW2901
        seen = f"{room if plans else available:.1f} of {total:.1f} GiB available"
        plans.append(None if isinstance(made, SparkfleetError) else made)
        found.append(_memory_check(made, seen, enforced=settings.memory_plan != "warn" and work.starts))
    together = _together(target, total, free) if any(check.findings for check in found) else ""
    return [_more(check, together) for check in found], plans


def _held(container: State, state: State, total: float) -> float:
    """What an engine of ours that runs holds, GiB. An encoder, without a KV cache, holds less than it requested."""
    records = [one for one in calibration.understood(state.get("measured")) if one["service"] == container["name"]]
    planned = max(records, key=lambda one: float(one["at"]))["planned"] if records else {}
    if planned.get("kv_cache_gib") == 0:
        parts = ("weights_gib", "activation_gib", "runtime_gib", "cuda_graphs_gib")
        return sum(float(planned.get(part, 0.0)) for part in parts)
    return memory_plan.requested_gib(container["started_with"]["command"], total)


def _together(target: Target, total: float, available: float) -> str:
    """With which utilizations several engines fit together, as a sentence; of those that start on demand the largest
    counts."""
    in_turn = [engine for engine in target.engines if engine.on_demand]
    largest = max(in_turn, key=lambda engine: engine.card.weights.memory_gib, default=None)
    counted = [engine for engine in target.engines if not engine.on_demand or engine is largest]
    engines = [(engine.card, engine.arguments, engine.version) for engine in counted]
    if len(engines) < 2:
        return ""
    try:
        found = memory_plan.shares(engines, memory_plan.Memory(total, available, target.settings.memory_reserve_gib))
    except SparkfleetError:  # said by the check of that engine
        return ""
    if not found:
        return ". Together the engines do not fit at any gpu_memory_utilization: take smaller models or contexts"
    each = [f"{share:g} for {engine.card.name}" for share, engine in zip(found, counted, strict=True)]
    return f". Together they fit with a gpu_memory_utilization of {', '.join(each)}"


def _more(check: Check, words: str) -> Check:
    """A check whose finding that memory is short ends with more words."""
    found = (
        dataclasses.replace(finding, message=finding.message + words) if finding.id == "memory-short" else finding
        for finding in check.findings
    )
    return dataclasses.replace(check, findings=tuple(found))


def measured(target: Target, state: State) -> list[calibration.Known | None]:
    """What was measured on this host of each engine as it is planned."""
    records = calibration.understood(state.get("measured"))
    found: list[calibration.Known | None] = []
    for engine, here in zip(target.engines, state["engines"], strict=True):
        digest, commit = (here.get("image") or {}).get("digest"), here["model"].get("commit")
        wanted = {"repo": engine.card.repo, "settings": engine.settings_hash, "revision": str(commit)}
        wanted["image"] = f"{engine.image.partition('@')[0]}@{digest}"
        host = str(state.get("host") or "this host")
        found.append(calibration.known(records, host, wanted) if digest and commit else None)
    return found


def noted(plan: memory_plan.Plan, known: calibration.Known, applied: bool) -> memory_plan.Plan:
    """A plan with what was measured of it."""
    speed = known.tok_s if known.tok_s is not None else plan.measured_tok_s
    return dataclasses.replace(plan, notes=(*plan.notes, *known.notes(applied)), measured_tok_s=speed)


def memory_plans(
    target: Target, total: float, available: float, corrections: Sequence[float] = ()
) -> list[tuple[float, memory_plan.Plan | SparkfleetError]]:
    """For each engine of a host: what is available when it starts (GiB), and its memory plan, or why there is none."""
    found: dict[int, tuple[float, memory_plan.Plan | SparkfleetError]] = {}
    # Those that start on demand have what the others leave, each for itself.
    order = sorted(range(len(target.engines)), key=lambda index: target.engines[index].on_demand)
    for index in order:
        engine, correction = target.engines[index], corrections[index] if corrections else 0.0
        room = available
        try:
            made = memory_plan.make(
                engine.card,
                engine.arguments,
                profile=engine.settings.profile,
                version=engine.version,
                memory=memory_plan.Memory(total, room, target.settings.memory_reserve_gib, correction),
                others=lambda: [catalog.load(name) for name in catalog.names()],
            )
            if not engine.on_demand:
                available = max(made.left_gib, 0.0)
            found[index] = (room, made)
        except SparkfleetError as error:
            found[index] = (room, error)
    return [found[index] for index in range(len(target.engines))]


def _memory_check(plan: memory_plan.Plan | SparkfleetError, seen: str, enforced: bool) -> Check:
    if isinstance(plan, SparkfleetError):
        if not enforced:
            return Check("memory", f"{seen}; not planned: {plan}")
        return Check("memory", seen, (known("layout-unknown", str(plan)),))
    seen += f", {plan.requested_gib:.1f} requested, "
    seen += f"{plan.left_gib:.1f} left to the host" if plan.left_gib >= 0 else f"{-plan.left_gib:.1f} too little"
    if plan.fits or not enforced:
        return Check("memory", seen)
    ways = [suggestion.text for suggestion in plan.suggestions[:2]]
    way = f". What would fit: {'; or '.join(ways)}" if ways else f". {BY_ID['memory-short'].remedy}"
    return Check("memory", seen, (Finding("memory-short", "; ".join(plan.reasons) + way),))


def _disk(target: Target, state: State, cases: Sequence[Case], models: Sequence[ModelCase]) -> Check:
    needs: dict[int, list[tuple[str, str, float]]] = {}
    free: dict[int, int] = {}
    where, root, twice = _image_store(target, state)
    images = {case.engine.image for case in cases if case.pulls}
    if images:
        size = len(images) * target.settings.image_disk_gib * GIB * (BOTH_KEPT if twice else 1)
        what = "the image" if len(images) == 1 else f"{len(images)} images"
        needs.setdefault(where["device"], []).append((what, root, size))
        free[where["device"]] = where["free"]
    least = min(where["free"], state["disk"]["cache"]["free"]) / GIB
    downloads = [case for case in models if case.downloads]
    if downloads:
        where = state["disk"]["cache"]
        rest = sum(
            TRIAL_GIB * GIB
            if target.settings.trial
            else max(case.model.download_gib * GIB - case.found["model"]["bytes"], 0)
            for case in downloads
        )
        what = "the model" if len(downloads) == 1 else f"{len(downloads)} models"
        needs.setdefault(where["device"], []).append((what, target.settings.cache_dir, rest))
        free[where["device"]] = where["free"]
    found, needed_in_all = [], 0.0
    for device, parts in needs.items():
        needed = sum(size for _, _, size in parts) + DISK_RESERVE
        needed_in_all += needed
        if free[device] < needed:
            what = " and ".join(f"{size / GIB:.1f} GiB for {name} in {path}" for name, path, size in parts)
            found.append(
                Finding(
                    "disk-full",
                    f"{free[device] / GIB:.1f} GiB free, {needed / GIB:.1f} GiB needed ({what}, "
                    f"{DISK_RESERVE / GIB:.0f} GiB kept free): free some (`docker system df` and `du -sh "
                    f"{target.settings.cache_dir}/*` show what is there), or set sparkfleet_cache_dir to a larger disk",
                )
            )
    return Check("disk", f"{least:.0f} GiB free, {needed_in_all / GIB:.0f} needed", tuple(found))


def _image_store(target: Target, state: State) -> tuple[dict[str, Any], str, bool]:
    """Free space of the file system where images are, or will be, its folder, and whether layers are kept twice."""
    docker = state["docker"]
    if not docker["installed"]:  # Docker's own packages, from 29 on, start with containerd's store
        own = target.settings.docker_source == "docker"
        return state["disk"]["containerd" if own else "docker"], f"/var/lib/{'containerd' if own else 'docker'}", own
    return state["disk"]["docker"], docker.get("images_at", "/var/lib/docker"), docker.get("store") == "containerd"


def _port(target: Target, state: State, case: Case) -> Check:
    port, containers, listener = case.engine.engine_port, state["docker"].get("containers", []), case.found["listener"]
    remedy = "stop it, or set sparkfleet_port to a free port"
    if case.found.get("door"):  # something else is where the guard is to listen, perhaps an engine of ours until now
        port, listener = case.engine.port, case.found["door"]
    holders = [item for item in containers if port in item["ports"] and item["state"] == "running"]
    # While a container of ours is being restarted, Docker's proxy may still, or already, hold its port.
    passing = not holders and (listener or {}).get("process") == "docker-proxy"
    # One on the network of the host publishes nothing.
    rank = target.settings.spans is not None and case.found["healthy"]
    if rank and any(item["service"] == case.engine.service and item["state"] == "running" for item in containers):
        return Check("port", f"{port}, ours")
    if any(item["ours"] for item in (containers if passing else holders)):
        return Check("port", f"{port}, ours")
    if holders:
        who = f"container {holders[0]['name']} ({holders[0]['image']})"
    elif listener:
        pid = listener["pid"]
        who = f"{listener['process']} (pid {pid})" if pid else "a process that could not be named"
    else:
        return Check("port", f"{port}, free")
    if target.settings.service_state != "started":
        return Check("port", f"{port}, held by {who}; not needed")
    return Check("port", f"{port}, held by {who}", (Finding("port-taken", f"port {port} is held by {who}: {remedy}"),))


def _fabric(target: Target, state: State) -> Check:
    """Whether the host has its address on the network between the hosts of its group, on the right interface."""
    nodes = target.settings.spans
    assert nodes is not None
    seen = state["fabric"] or {"interfaces": [], "error": "it was not looked for"}
    found = fabric.known(seen)
    said = (
        [seen["error"]] if seen["error"] else fabric.problems(found, nodes.address, target.settings.fabric_management)
    )
    chosen = fabric.at(found, nodes.address)
    where = f"{nodes.address} on {chosen.name}" if chosen else nodes.address
    return Check(
        "fabric",
        f"rank {nodes.rank} of {nodes.name}, {where}",
        tuple(known("fabric-unfit", fact) for fact in said),
    )


def _executor(target: Target, state: State) -> Check:
    """Whether the image has what is to connect the ranks."""
    (engine,) = target.engines
    chosen, problem = target.executor(engine, state["engines"][0].get("executors"))
    seen = "over Ray" if chosen == nodes.RAY else "vLLM itself"
    return Check("executor", seen, (known("executor-missing", problem),) if problem else ())


def fits_alone(engine: EngineTarget, state: State) -> bool:
    """Whether a model that is spread over several Sparks would fit this one."""
    total = float(state["memory"]["total"]) / GIB
    memory = memory_plan.Memory(total, total - memory_plan.USUAL_HOST_GIB)
    alone: Arguments = {kv_layout.TENSOR: 1, kv_layout.PIPELINE: 1, nodes.BACKEND: False}
    try:
        made = memory_plan.make(engine.card, {**engine.arguments, **alone}, version=engine.version, memory=memory)
    except SparkfleetError:  # a layout that is not known
        return False
    return made.fits


def _address(target: Target, state: State) -> Check:
    """Whether it is known where gateways reach the engines."""
    found = ", ".join(target.addresses(state))
    if found or listen(target.settings.listen) == "all":
        return Check("address", f"gateways reach {found}" if found else "everywhere")
    return Check("address", "not known", (known("address-unknown", "no address of this host leads to a gateway"),))


def _firewall(target: Target, state: State) -> Check:
    """Whether it is known to whom the firewall opens the engines' ports: one that is not would be shut out."""
    known_here = state["firewall"]["sources"]
    missing = [name for name in target.settings.gateways if not known_here.get(name)]
    if missing:
        fact = f"the gateway {', '.join(missing)} stands for no address on this host"
        return Check("firewall", "not known", (known("firewall-source-unknown", fact),))
    return Check("firewall", f"open to {len(target.settings.gateways)} gateways and sparkfleet_firewall_allow")


def _switch(target: Target, state: State) -> Check:
    """Whether another run is at work here. One that does the same is joined."""
    releases = state["releases"]
    if not releases["switch_active"]:
        return Check("switch", f"none; current release {releases['current'] or 'none'}")
    journal = releases["switch"] or {}
    models = ", ".join(journal.get("models") or ()) or "unknown"
    fact = (
        f"{journal.get('controller') or 'another run'} is switching this host to release {journal.get('to')} "
        f"({models}) with {journal.get('verb') or 'Sparkfleet'}, phase {journal.get('phase')}"
    )
    same = yaml_text.compose_file(releases["switch_compose"]) == target.document(state)
    return Check("switch", fact, () if same else (known("switch-running-other", fact),))


def _bundle(bundle: Bundle, state: State, cases: Sequence[Case], models: Sequence[ModelCase], work: Work) -> Check:
    """Whether a bundle has what is to be fetched and installed."""
    system, gaps, differs = state["os"], [], []
    for case in cases:
        engine = case.engine
        if case.pulls and not bundle.image_key(engine.image):
            has = [_digested(name, entry["digest"]) if engine.locked else name for name, entry in bundle.images.items()]
            gaps.append(f"no image {engine.image} (it has {', '.join(sorted(has)) or 'none'})")
    for model in (case.model for case in models if case.downloads):
        if not bundle.model_key(model.repo, model.revision):
            has = [f"{name} ({entry['commit']})" if model.locked else name for name, entry in bundle.models.items()]
            gaps.append(f"no model {model.repo}@{model.revision} (it has {', '.join(sorted(has)) or 'none'})")
        if model.locked and (listing := bundle.listing(model.repo, model.revision)):
            wrong = cache.difference(model.locked.expected(model.remote_code), listing)
            if wrong:
                what = f"the bundle {bundle.folder} has a different {model.repo} than the lock: {wrong}"
                differs.append(known("lock-mismatch", what))
    here = {"id": system["id"], "codename": system["codename"], "machine": system["machine"]}
    if work.installs and bundle.system != here:
        packages = " ".join(bundle.system.values()) or "nothing"
        gaps.append(f"packages for {packages}, the host is {' '.join(here.values())}")
    elif any(work.pulls) and bundle.system.get("machine") != here["machine"]:
        gaps.append(f"an image for {bundle.system.get('machine')}, the host is {here['machine']}")
    incomplete = bundle.missing_files()
    if incomplete:
        gaps.append(f"{len(incomplete)} of {len(bundle.files)} files missing or cut, such as {incomplete[0]}")
    if gaps:
        differs.append(known("bundle", f"the bundle {bundle.folder} has {'; '.join(gaps)}"))
    if not differs:
        return Check("bundle", f"{bundle.folder} has what is needed")
    return Check("bundle", "; ".join(gaps) or "not what the lock has", tuple(differs))


def _digested(image: str, digest: str) -> str:
    return image if "@" in image else f"{image}@{digest}"


def _weights(case: ModelCase) -> Check:
    """Whether the weights are there that a trial is to be made with."""
    repo = case.model.repo
    if case.found["model"]["complete"]:
        return Check("weights", f"{repo} is complete")
    fact = f"{repo} is not complete on this host: fetch it (playbooks/fetch.yml), or try it with --weights dummy"
    return Check("weights", f"{repo} is not complete", (Finding("model-not-in-cache", fact),))


def _registry(case: Case) -> Check:
    registry = case.found["registry"]
    if registry is None or not case.pulls:
        return Check("registry", "image is there" if not case.pulls else "not queried; there is a bundle")
    if registry["status"]:
        return Check("registry", f"{registry['host']} answers")
    fact = f"the host does not reach {registry['host']} ({registry['error']})"
    return Check("registry", f"{registry['host']}: {registry['error']}", (known(registry["failure"], fact),))


def _hub(state: State, case: ModelCase) -> Check:
    hub, wanted, model = case.found["hub"], case.model, case.found["model"]
    if model.get("suspect") and not model.get("missing"):
        return Check("hub", "queried only if a file of the model is damaged")
    if hub is None or not case.downloads:
        return Check("hub", "model is there" if model["complete"] else "not queried; there is a bundle")
    seen = f"{wanted.repo}: {hub['error'] or hub['status']}"
    if hub["status"] == 200 or hub["error"] == "EntryNotFound":  # not every format has a config.json
        return Check("hub", f"gives {wanted.repo}")
    has_token = state["token"]["present"] or not state["token"]["current"]
    page = wanted.page
    commits = f"https://huggingface.co/{wanted.repo}/commits"
    tokens = "https://huggingface.co/settings/tokens"
    if hub["status"] == 0:
        finding = Finding(
            "hub-unreachable",
            f"the host does not reach the Hugging Face Hub ({hub['error']}): check its name server and proxy; "
            "for a Hub or a proxy with a private CA set sparkfleet_ca_file",
        )
    elif hub["status"] == 401 and not has_token:
        finding = Finding(
            "hub-token-missing",
            f"{wanted.repo} is not given without a token: accept the licence at {page}, make a read token at "
            f"{tokens}, and set sparkfleet_hf_token (or export HF_TOKEN before the run)",
        )
    elif hub["status"] == 401:
        finding = Finding(
            "hub-token-rejected",
            f"the Hub rejects the token for {wanted.repo}: it is mistyped or revoked, or there is no such model; "
            f"make a new read token at {tokens}",
        )
    elif hub["status"] == 403:
        finding = Finding(
            "hub-no-access",
            f"the token's account has no access to {wanted.repo}: accept the licence at {page} with that account, "
            "and give a fine-grained token the right to read gated repositories",
        )
    elif hub["error"] == "RevisionNotFound":
        finding = Finding(
            "hub-revision-unknown",
            f"{wanted.repo} has no revision '{wanted.revision}': set {wanted.revision_in} to one it has ({commits})",
        )
    elif hub["status"] == 404:
        finding = Finding("hub-repo-unknown", f"the Hub has no model {wanted.repo}: check {wanted.repo_in}")
    else:
        finding = Finding("hub-unreachable", f"the Hub answers {hub['status']} for {wanted.repo}: try again later")
    return Check("hub", seen, (finding,))


def _folders(target: Target, state: State) -> Check:
    settings, found = target.settings, []
    if not state["operator"]["exists"]:
        found.append(
            Finding(
                "operator-unknown",
                f"user '{settings.operator}' does not exist: set sparkfleet_operator to one that does",
            )
        )
    if state["cache"] and not state["cache"]["directory"]:
        found.append(
            Finding(
                "cache-not-a-folder",
                f"{settings.cache_dir} is not a folder: move it, or set sparkfleet_cache_dir",
            )
        )
    return Check("cache", f"{settings.cache_dir}, for {settings.operator}", tuple(found))
