"""The plan for one Spark: a pure function of settings, model cards and host state.

``state`` is what the module ``spark_state`` found. The plan lists what must not proceed (findings) and
what there is to do (prepare, fetch, deploy); an empty list of reasons means that nothing is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sparkfleet_host import cache
from sparkfleet_host.rank import LAST_WORKER, MEET
from sparkfleet_host.registry import reference, valid_image
from sparkfleet_host.release_format import (
    DUMMY,
    FORMAT,
    GROUP_FORMAT,
    ON_DEMAND_FORMAT,
    TRIAL,
    TRIAL_FORMAT,
)

from sparkfleet import __version__, operator_name
from sparkfleet.documents import yaml_text
from sparkfleet.planning import compose, firewall, preflight, vllm_versions
from sparkfleet.planning.target import EngineTarget, ModelTarget, State, Target


@dataclasses.dataclass
class Work:
    """What one part of a stage has to do, in words; nothing to do when empty."""

    reasons: list[str] = dataclasses.field(default_factory=list)

    def add(self, condition: object, reason: str) -> None:
        """Add a reason if the condition holds."""
        if condition:
            self.reasons.append(reason)


def make(target: Target, state: State, *, reads: bool = False) -> dict[str, Any]:
    """The plan as plain data (it becomes an Ansible variable); `reads`: for one that changes nothing."""
    target = target.connected(state)
    trust = authorities(target, state)
    docker, toolkit, cache, hygiene, program, guard, wall = prepare(target, state)
    fetches = [fetch(target, *pair) for pair in pairs(target, state)]
    document = target.document(state)
    deployment = trial(target, state) if target.settings.trial else deploy(target, state, document)
    installs = packages(target, state)
    images = [found.image.reasons for found in fetches]
    models = [[work.reasons for work in found.models] for found in fetches]
    work = preflight.Work(
        [bool(reasons) for reasons in images],
        [[bool(reasons) for reasons in found] for found in models],
        bool(deployment["start"]),
        bool(installs),
        reads,
    )
    checks, memory = preflight.checks(target, state, work)
    figures = [found.as_dict() if found else None for found in memory]
    known = [dict(one.start) if one and one.start else None for one in preflight.measured(target, state)]
    return {
        "engines": [
            {
                "model": engine.card.name,
                "profile": engine.settings.profile,
                "repo": engine.card.repo,
                "service": engine.service,
                "image": engine.image,
                "revision": engine.revision,
                "remote_code": engine.remote_code,
                "pickle": engine.card.weights.pickle,
                "port": engine.engine_port,
                **({"on_demand": {"port": engine.port}} if engine.on_demand else {}),
                "verify": engine.verify,
                "memory": figures[index],
                "fetch_image": bool(images[index]),
                "fetch_model": any(models[index]),
                "measured": known[index],
            }
            for index, engine in enumerate(target.engines)
        ],
        "fetches": fetched(target, state, fetches),
        "registries": target.registries,
        "lock": str(target.lock.path) if target.lock else "",
        "compose": document,
        "release": release(target, document, figures, state),
        "group": group(target, document, state),
        "notes": [*notes(target, state), *turns(target, figures)],
        "checks": [{"name": check.name, "seen": check.seen, "ok": not check.findings} for check in checks],
        "findings": [dataclasses.asdict(finding) for check in checks for finding in check.findings],
        "prepare": {
            "needed": any(work.reasons for work in (trust, docker, toolkit, cache, hygiene, program, guard, wall)),
            "trust": trust.reasons,
            "docker": docker.reasons,
            "install_docker": not state["docker"]["installed"],
            "restart_docker": stale_proxy(target, state) or stale_trust(target, state),
            "toolkit": toolkit.reasons,
            "cache": cache.reasons,
            "memory": hygiene.reasons,
            "host_program": program.reasons,
            "guard": guard.reasons,
            "firewall": wall.reasons,
            "firewall_rules": target.firewall(state),
            "guard_settings": guard_settings(target, state),
            "program": target.settings.host_program,
            "restart_guard": stale_guard(target, state),
            "packages": bool(installs),
            "preferences": target.lock.preferences(state["os"]) if target.lock and not target.bundle else "",
        },
        "fetch": {
            "needed": any(images) or any(map(any, models)),
            "image": list(dict.fromkeys(itertools.chain.from_iterable(images))),
            "model": [reason for found in models for reasons in found for reason in reasons],
        },
        "deploy": deployment,
    }


def group(target: Target, document: compose.Document, state: State | None = None) -> dict[str, Any] | None:
    """The host's place in the group that runs the engine together (see `sparkfleet_host.group`); None for none."""
    nodes = target.settings.spans
    if nodes is None:
        return None
    (engine,) = target.engines
    return {
        "name": nodes.name,
        "rank": nodes.rank,
        "nodes": [
            {"host": host, "address": address} for host, address in zip(nodes.hosts, nodes.addresses, strict=True)
        ],
        "port": target.settings.guard_port,
        "digest": compose.common(document["services"][engine.service], target.rank(state)),
    }


def pairs(target: Target, state: State) -> list[tuple[EngineTarget, State]]:
    """Each engine with what the host has of it: its image, model, port and health."""
    return list(zip(target.engines, state["engines"], strict=True))


def prepare(target: Target, state: State) -> tuple[Work, Work, Work, Work, Work, Work, Work]:
    """Reasons to install or configure Docker, the NVIDIA Container Toolkit, folders with the token, memory guards,
    the program of the services on the host, the guard, the firewall.

    A Docker that is there is never upgraded: other containers may depend on it, and it may not be the distribution's.
    """
    settings, engine = target.settings, state["docker"]
    docker = Work()
    docker.add(not engine["installed"], "install Docker")
    docker.add(engine["installed"] and not engine["running"], f"start Docker ({engine.get('reason', 'stopped')})")
    docker.add(
        stale_proxy(target, state),
        f"let Docker use the proxy {settings.proxy.rpartition('@')[2]} and restart it"
        if settings.proxy
        else "let Docker use no proxy of ours any more and restart it",
    )
    docker.add(stale_trust(target, state), "restart Docker so that it trusts the CA for Docker Hub")
    wants = settings.docker_group and not state["operator"]["in_docker_group"]
    docker.add(wants, f"put {settings.operator} into the group docker")

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
    logins = state["registry_logins"]
    cache.add(settings.registry_logins and not logins["current"], "write the logins of registries")
    cache.add(
        settings.registry_logins and logins["present"] and not logins["private"],
        "make the logins of registries readable by root alone",
    )
    cache.add(not settings.registry_logins and logins["present"], "remove the logins of registries")

    hygiene = Work()
    guard, swap = state["memory"]["earlyoom"], state["memory"]["swap"]
    if settings.earlyoom:
        hygiene.add(not guard["installed"], "install earlyoom")
        hygiene.add(
            guard["installed"] and guard["arguments"] != settings.earlyoom_arguments,
            "change the arguments of earlyoom",
        )
        hygiene.add(
            guard["installed"] and not (guard["active"] and guard["enabled"]), "start earlyoom, now and at boot"
        )
    if settings.swap == "disabled":
        hygiene.add(swap or state["memory"]["swap_in_fstab"], "switch swap off")

    program = Work()
    if settings.host_program and state["host_program"] != settings.host_program:
        program.add(True, f"{'update' if state['host_program'] else 'copy'} the program that switches releases")

    guard, there = Work(), state["guard"]
    if settings.guard:
        guard.add(not there["installed"], "install the guard")
        guard.add(
            there["installed"] and (program.reasons or there["program"] != settings.host_program),
            "restart the guard with its new program",
        )
        guard.add(stale_guard(target, state), "restart the guard: it is older than its unit or settings")
        guard.add(
            there["installed"] and there["settings"] != guard_settings(target, state), "change the guard's settings"
        )
        guard.add(there["installed"] and not (there["active"] and there["enabled"]), "start the guard, now and at boot")
    else:
        guard.add(there["active"] or there["enabled"], "stop the guard")
    return docker, toolkit, cache, hygiene, program, guard, wall(target, state)


def authorities(target: Target, state: State) -> Work:
    """Reasons to change which certificate authorities the host and its Docker trust."""
    work, there = Work(), state["trust"]
    if target.settings.ca:
        work.add(not there["current"], f"trust the CA of {target.settings.ca_file}")
    else:
        work.add(there["present"] or not there["current"], "trust the CA of sparkfleet_ca_file no longer")
    return work


def stale_trust(target: Target, state: State) -> bool:
    """Whether Docker has to be restarted to trust the CA. It reads the host's certificates once, and those of a
    registry at each pull; with its own image store it has none for Docker Hub."""
    docker, there = state["docker"], state["trust"]
    if not (target.settings.ca and docker["running"]) or docker.get("store") == "containerd" or target.bundle:
        return False
    pulls = [engine.image for engine, found in pairs(target, state) if not found.get("image")]
    asked = any(reference(image).registry == "docker.io" for image in pulls if valid_image(image))
    return asked and not (there["current"] and there["daemon"])


def wall(target: Target, state: State) -> Work:
    """Reasons to load or remove the firewall."""
    work, there, rules = Work(), state["firewall"], target.firewall(state)
    if rules:
        work.add(not there["unit"], "set up the firewall")
        if there["unit"]:
            work.add(there["rules"] != rules or there["unit"] != firewall.unit(), "change the firewall")
            lost = there["rules"] == rules and there["loaded"] != firewall.mark(rules)
            work.add(lost or not (there["active"] and there["enabled"]), "load the firewall, now and at boot")
    else:
        work.add(there["unit"] or there["rules"], "remove the firewall")
    return work


def stale_proxy(target: Target, state: State) -> bool:
    """Whether the running Docker uses the wrong proxy. Its files may already be right: a run that fails before it
    restarts Docker leaves it so."""
    engine = state["docker"]
    return bool(engine["running"] and not engine["proxy_current"])


def stale_guard(target: Target, state: State) -> bool:
    """Whether a guard runs that was started before its unit was last written."""
    there = state["guard"]
    return bool(target.settings.guard and there["installed"] and there["active"] and not there["current"])


def packages(target: Target, state: State) -> list[str]:
    """What the stage prepare installs with apt, in words."""
    there = {"Docker": state["docker"]["installed"], "the NVIDIA Container Toolkit": state["toolkit"]["installed"]}
    if target.settings.earlyoom:
        there["earlyoom"] = state["memory"]["earlyoom"]["installed"]
    if target.settings.firewall:
        there["nftables"] = state["firewall"]["installed"]
    return [name for name, installed in there.items() if not installed]


def guard_settings(target: Target, state: State) -> dict[str, Any]:
    """The content of the guard's settings file. Its own port is open where the engine's is."""
    settings, addresses = target.settings, target.addresses(state)
    in_turn = {
        "on_demand_wait": settings.on_demand_wait,
        "on_demand_hold_seconds": settings.on_demand_hold_seconds,
        "on_demand_min_seconds": settings.on_demand_min_seconds,
        "on_demand_starts_per_hour": settings.on_demand_starts_per_hour,
    }
    own = [settings.spans.address] if settings.spans else []  # where the other hosts of the group ask it
    where = list(dict.fromkeys((compose.LOOPBACK, *addresses, *own))) if addresses else [""]
    return {
        **(in_turn if any(engine.on_demand for engine in target.engines) else {}),
        "interval": settings.guard_interval,
        "wedge_seconds": settings.guard_wedge_seconds,
        "canary_interval": settings.guard_canary_interval,
        "canary_timeout": settings.guard_canary_timeout,
        "max_restarts": settings.guard_max_restarts,
        "restart_window": settings.guard_restart_window,
        "start_timeout": float(settings.start_timeout),
        "listen_port": settings.guard_port,
        "listen_address": where,
        "project_dir": settings.project_dir,
        "cache_dir": settings.cache_dir,
    }


def notes(target: Target, state: State) -> list[str]:
    """What an operator should know of what is to run, though nothing prevents it."""
    settings, found = target.settings, []
    if target.lock and target.lock.sparkfleet != __version__:
        found.append(
            f"the lock was written by Sparkfleet {target.lock.sparkfleet}, this is {__version__}: image and files are "
            "those of the lock, arguments and checks may differ"
        )
    if settings.firewall and not settings.gateways and not settings.firewall_allow:
        found.append(
            "the firewall opens the engine's port to nobody but this Spark: sparkfleet_firewall_allow names clients"
        )
    if target.is_open(state) and settings.service_state == "started" and not settings.trial:
        ports = [str(engine.port) for engine in target.engines]
        which = f"port {ports[0]} is" if len(ports) == 1 else f"ports {', '.join(ports)} are"
        found.append(
            f"{which} open to the network without a key: sparkfleet_listen: loopback closes "
            f"{'it' if len(ports) == 1 else 'them'}, sparkfleet_engine_key requires a key"
        )
    for engine in target.engines:
        if vllm_versions.moves(engine.image):
            found.append(
                f"the tag of {engine.image} is mutable: another run may get another vLLM from it; sparkfleet_image "
                "with a digest (NAME@sha256:...) pins it"
            )
        if engine.fetches_media and not engine.version.limits_media and "*" not in settings.media_domains:
            since = ".".join(map(str, vllm_versions.FIRST_MEDIA_DOMAINS))
            found.append(
                f"{engine.card.name} fetches pictures from whatever address a request names, also inside your network: "
                f"vLLM {engine.version.text} cannot be told which hosts are allowed, {since} and later can"
            )
    if settings.spans and not settings.api_key_enabled and target.connected(state).rank(state).over_ray:
        found.append(
            f"Ray runs code of whoever reaches its ports {MEET} to {LAST_WORKER} on any address of this Spark: "
            "sparkfleet_engine_key makes newer versions of it require a token; keep them closed to all but the group"
        )
    for engine in target.engines if settings.spans and settings.spans.is_head else ():
        if preflight.fits_alone(engine, state):
            found.append(
                f"{engine.card.name} fits one Spark: replicas behind a gateway serve more requests, and go on when one "
                "of them fails; ranks only make one stream faster"
            )
    for engine in target.engines if settings.model_source != "local" else ():
        found.append(
            "model_source hub starts the engine with --trust-remote-code: code in the model's repository, at whatever "
            f"commit {engine.revision} is then, runs in it; model_source local does without"
        )
    return found


def turns(target: Target, figures: Sequence[Mapping[str, Any] | None]) -> list[str]:
    """Which engines that start on demand run at the same time, in words."""
    found = [
        (engine.card.name, _place(plan))
        for engine, plan in zip(target.engines, figures, strict=True)
        if engine.on_demand
    ]
    if not found:
        return []
    if not all(place for _, place in found):
        return [f"on demand, one at a time: {', '.join(name for name, _ in found)}"]
    room = min(place["room_gib"] for _, place in found)
    needs = sorted(place["needs_gib"] for _, place in found)
    together = sum(1 for count in range(1, len(needs) + 1) if sum(needs[:count]) <= room)
    each = ", ".join(f"{name} ({place['needs_gib']:.1f} GiB)" for name, place in found)
    if together == len(needs):
        how = "they fit at the same time" if len(needs) > 1 else "it fits beside the engines that always run"
    else:
        how = f"at most {together} of them at the same time" if together > 1 else "one at a time"
    return [f"on demand, in the {room:.1f} GiB that the other engines and the host leave: {each}; {how}"]


class Fetch(NamedTuple):
    """What is fetched for an engine: its image, and each of `EngineTarget.models`."""

    image: Work
    models: list[Work]


def fetch(target: Target, engine: EngineTarget, state: State) -> Fetch:
    """Reasons to pull an engine's image and to download its models; `state` is what the host has of the engine."""
    image = Work()
    image.add(not state.get("image"), f"pull {engine.image}")
    found = zip(engine.models, engine.found(state), strict=True)
    return Fetch(image, [_download(target, model, one["model"]) for model, one in found])


def _download(target: Target, model: ModelTarget, known: State) -> Work:
    """Reasons to download a model of which the host has `known`."""
    work, what = Work(), f"the draft {model.repo}" if model.drafts else model.repo
    suspect = bool(known.get("suspect")) and not known.get("missing")
    if target.settings.trial:
        there = known["complete"] or known.get("config")
        work.add(not there and target.settings.trial == DUMMY, f"download {what} without its weights")
    elif target.settings.model_source == "local":
        size = f" ({model.download_gib:g} GiB)" if model.download_gib else ""
        work.add(suspect, f"hash the files of {what}: {known.get('suspect')}")
        work.add(not known["complete"] and not suspect, f"download {what} at {model.revision}{size}")
        work.add(
            known["complete"] and differs(model, known),
            f"check {what} again: the list of its files is not that of the lock",
        )
    return work


def differs(model: ModelTarget, known: State) -> bool:
    """Whether the list by which a host's model is complete has other files or hashes than the lock."""
    if model.locked is None:
        return False
    files = model.locked.expected(model.remote_code)["files"]
    return bool(known["listing"] != cache.listing_digest(files, model.remote_code))


def fetched(target: Target, state: State, fetches: Sequence[Fetch]) -> list[dict[str, Any]]:
    """What the stage fetch goes through: image and model of each engine, in their order, then the models that draft."""
    own: list[dict[str, Any]] = []
    drafts: list[dict[str, Any]] = []
    for (engine, here), work in zip(pairs(target, state), fetches, strict=True):
        for model, found, reasons in zip(engine.models, engine.found(here), work.models, strict=True):
            entry = {
                "image": engine.image,
                "fetch_image": bool(work.image.reasons) and not model.drafts,
                **{key: getattr(model, key) for key in ("repo", "revision", "remote_code", "pickle")},
                "fetch_model": bool(reasons.reasons),
                # One that is to be checked against a lock is no source yet.
                "has_model": bool(found["model"]["complete"]) and not reasons.reasons,
            }
            (drafts if model.drafts else own).append(entry)
    return [*own, *drafts]


def release(
    target: Target,
    document: compose.Document,
    memory: Sequence[dict[str, Any] | None] | None = None,
    state: State | None = None,
) -> dict[str, Any]:
    """What is kept on the host alongside the compose file (see sparkfleet_host.release_format): the plan, and what it
    is pinned to. `memory`: the memory plan of each engine."""
    plans, locks = [], []
    rank = group(target, document, state)
    for engine, figures in zip(target.engines, memory or [None] * len(target.engines), strict=True):
        card, service = engine.card, document["services"][engine.service]
        known = {
            "service": engine.service,
            "model": card.name,
            "profile": engine.settings.profile,
            "repo": card.repo,
        }
        asked: dict[str, Any] = {"verify": engine.verify, "settings": engine.settings_hash}
        if engine.on_demand:
            asked["on_demand"] = {"port": engine.port, **_place(figures)}
        draft = compose.draft_of(service["command"])
        plans.append({**known, "image": engine.image, **asked, "memory": figures, **({"group": rank} if rank else {})})
        locks.append(
            {
                **known,
                "revision": next(iter(_after("--revision", service["command"])), engine.revision),
                "image": compose.plain(service["image"]),
                "port": engine.engine_port,
                **({"draft": dict(zip(("repo", "revision"), draft, strict=True))} if draft else {}),
            }
        )
    weights = target.settings.trial
    in_turn = any(engine.on_demand for engine in target.engines)
    kind: dict[str, Any] = {"format": GROUP_FORMAT if rank else ON_DEMAND_FORMAT if in_turn else FORMAT}
    if weights:
        kind = {"format": TRIAL_FORMAT, "kind": TRIAL, "weights": weights}
        kind |= {"loads": [*map(dict, loads)]} if (loads := target.settings.trial_loads) else {}
    return {
        "plan": {**kind, "engines": plans},
        "lock": {
            "format": FORMAT,
            "engines": locks,
            "cache_dir": target.settings.cache_dir,
            "compile_cache_dir": target.settings.compile_cache_dir,
            "controller": operator_name.name(),
        },
    }


def _place(figures: Mapping[str, Any] | None) -> dict[str, float]:
    """GiB that an engine which starts on demand takes, and that are there for all of them."""
    if not figures:
        return {}
    room = figures["available_gib"] - figures["reserve_gib"]
    # An engine must find free what it requests, also where it takes less.
    needs = max(figures["available_gib"] - figures["left_gib"], figures["requested_gib"])
    return {"needs_gib": round(needs, 2), "room_gib": round(room, 2)}


def _after(flag: str, command: list[str]) -> list[str]:
    return [compose.plain(value) for word, value in itertools.pairwise(command) if word == flag]


def deploy(target: Target, state: State, document: compose.Document) -> dict[str, Any]:
    """What the deploy stage has to do: stage a release, switch to it, restart the current one, or only wait."""
    settings = target.settings
    services = [engine.service for engine in target.engines]
    in_turn = {engine.service for engine in target.engines if engine.on_demand}
    ours = [item for item in state["docker"].get("containers", []) if item["ours"]]
    current = {item["service"]: item for item in reversed(ours) if item["service"] in services}
    running = [name for name in services if name in current and current[name]["state"] == "running"]
    others = sorted({item["service"] for item in ours if item["state"] == "running"} - {*services})
    releases = state["releases"]
    deployed = releases["current"] is not None and yaml_text.compose_file(state["compose_file"]) == document
    staged = deployed or yaml_text.compose_file(releases["newest_compose"]) == document

    new_key = settings.api_key_enabled and not state["engine_key"]["current"]
    stage, start, stop, wait = Work(), Work(), Work(), Work()
    restarts: list[str] = []
    there = [name for name in services if name in current and (name in running or name in in_turn)]
    drifted = [name for name in there if deployed and not _matches(current[name], document["services"][name])]
    if settings.service_state == "started":
        what = "the first release" if releases["current"] is None else f"a release after {releases['current']}"
        stage.add(not deployed, f"stage {what}")
        start.add(not deployed, f"switch to it{', stopping ' + ', '.join(others) if others else ''}")
        for name in services if deployed else ():
            start.add(name not in current, f"create and start {name}")
            if name in in_turn:
                start.add(releases.get("halted"), f"let requests start {name} again")
            else:
                found = current.get(name, {}).get("state")
                start.add(name in current and name not in running, f"start {name} ({found})")
            start.add(name in drifted, f"restart {name}: it runs with other settings than its file")
            start.add(name in running and name not in drifted and new_key, f"restart {name}: its key has changed")
            asleep = name in current and name in in_turn and not releases.get("halted")
            if (name not in running and not asleep) or name in drifted or new_key:
                restarts.append(name)
        stop.add(others and not start.reasons, f"stop {', '.join(others)}")
        for engine, known in pairs(target, state):
            # Those asleep, and other ranks than 0, answer nobody.
            answers = known["healthy"] or engine.on_demand or (settings.spans and not settings.spans.is_head)
            wait.add(not start.reasons and not answers, f"wait for {engine.service}")
    else:
        stage.add(not staged, "stage a release")
        stop.add(running or others, f"stop {', '.join([*others, *running])}")
        stop.add(in_turn and not releases.get("halted"), "let no request start an engine")
    return {
        "needed": bool(stage.reasons or start.reasons or stop.reasons or wait.reasons),
        "stage": stage.reasons,
        "stop": stop.reasons,
        "halt": bool(in_turn) and settings.service_state == "stopped",
        "stop_services": [*others, *(running if settings.service_state == "stopped" else [])] if stop.reasons else [],
        "start": start.reasons,
        "mode": "restart" if deployed else "deploy",
        "release": releases["current"] if deployed else None,
        # Of a restart; none where all engines are restarted.
        "services": restarts if len(restarts) < len(services) else [],
        "recreate": bool(drifted),
        "new_key": new_key,
        "wait": wait.reasons,
    }


def trial(target: Target, state: State) -> dict[str, Any]:
    """What a trial does in place of a deployment: in any case it stops what runs, starts the engine, and goes back."""
    running = [item["service"] for item in state["docker"].get("containers", []) if item["ours"]]
    others = f", stopping {', '.join(sorted({*running}))} for that time" if running else ""
    (engine,) = target.engines
    start = f"try {engine.card.name} with {target.settings.trial} weights{others}"
    return {
        **{"needed": True, "stage": ["stage a trial"], "start": [start], "mode": TRIAL, "release": None},
        **{"stop": [], "stop_services": [], "services": [], "recreate": False, "new_key": False, "wait": []},
        "halt": False,
    }


def _bind(volume: str) -> str:
    """A volume of the compose file as Docker lists it, which always names the mode."""
    plain = compose.plain(volume)
    return plain if plain.endswith(":ro") else f"{plain}:rw"


def _matches(container: Mapping[str, Any] | None, service: Mapping[str, Any]) -> bool:
    """Whether a container was started from this service of the compose file."""
    started = (container or {}).get("started_with")
    if not started:
        return False
    environment = {name: value for name, value in service["environment"].items() if value != compose.TOKEN}
    return bool(
        started["image"] == compose.plain(service["image"])
        and started["command"] == [compose.plain(word) for word in service["command"]]
        and set(service["environment"]) <= set(started["environment"])
        # A value is there as its hash; one that may be a secret is left out.
        and all(
            started["environment"][name] in ("", hashlib.sha256(compose.plain(value).encode()).hexdigest())
            for name, value in environment.items()
        )
        and started["published"] == sorted(port.rpartition(":")[0] for port in service.get("ports", ()))
        and started["volumes"] == sorted(map(_bind, service["volumes"]))
        and started["restart"] == service["restart"]
    )
