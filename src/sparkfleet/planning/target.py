"""What is to run on a host: model cards and inventory merged, before any host is inspected.

A host runs a list of engines: a vLLM service each, with its card, port and share of memory. An inventory with
``sparkfleet_model`` is the short form of a list with one entry.
"""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from sparkfleet_host import cache, fabric
from sparkfleet_host.bounded import HOST, printable
from sparkfleet_host.registry import reference, valid_image
from sparkfleet_host.release_format import DUMMY, MOST_ENGINES
from sparkfleet_host.trust import CA_BUNDLE
from sparkfleet_host.verify import GENERATIVE, embeds

from sparkfleet import SparkfleetError
from sparkfleet.packaging import host_program
from sparkfleet.packaging.bundle import Bundle
from sparkfleet.paths import ROOT
from sparkfleet.planning import calibration, catalog, compose, firewall, kv_layout, nodes, variables, verification
from sparkfleet.planning.catalog import Arguments, Card
from sparkfleet.planning.lock import Lock, Model
from sparkfleet.planning.nodes import BACKEND, RAY, Nodes
from sparkfleet.planning.variables import ARGUMENT_PREFIX, PREFIX
from sparkfleet.planning.vllm_versions import Engine

State = Mapping[str, Any]
#: What tells vLLM how to split the layers over the stages of a pipeline.
PARTITION = "VLLM_PP_LAYER_PARTITION"
DEFAULTS = ROOT / "roles" / "sparkfleet" / "defaults" / "main.yml"


def defaults() -> dict[str, Any]:
    """The variables of the inventory with their defaults, as the role has them (templates not resolved)."""
    found: dict[str, Any] = yaml.safe_load(DEFAULTS.read_text(encoding="utf-8"))
    return found


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """What the inventory defines for one engine of a host."""

    model: str
    profile: str = "throughput"
    image: str = ""  # "" for the card's
    revision: str = ""  # "" for the card's
    port: int = 8000
    tool_calls: bool = True
    environment: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of vllm serve
    on_demand: bool = False
    loopback_port: int = 0  # of one on demand: where the engine itself is published

    @property
    def engine_port(self) -> int:
        """The TCP port of the host that the engine itself is published on."""
        return self.loopback_port if self.on_demand else self.port


@dataclasses.dataclass(frozen=True)
class Settings:
    """The inventory's settings of one host; the fields are the variables ``sparkfleet_<field>``, with their defaults.

    Fields below ``arguments`` are not variables. The fields of `EngineSettings` are those of the host's only engine,
    unless ``engines`` lists several.
    """

    model: str = ""
    profile: str = "throughput"
    model_source: str = "local"
    environment: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tool_calls: bool = True
    image: str = ""
    revision: str = ""
    port: int = 8000
    engines: Sequence[EngineSettings] = ()
    listen: Any = "auto"
    media_domains: Sequence[Any] = dataclasses.field(default_factory=list)
    firewall: bool = False
    firewall_allow: Sequence[Any] = dataclasses.field(default_factory=list)
    share_port: int = 9110
    address: str = ""  # where gateways reach the host
    engine_key: str = dataclasses.field(default="", repr=False)
    project_dir: str = "/opt/sparkfleet"
    cache_dir: str = "/opt/hf"
    cache_owner: str = "root"
    cache_group: str = "docker"
    cache_mode: str = "2775"
    compile_cache_dir: str = "/var/cache/sparkfleet"
    ca_file: str = ""  # certificates on the controller of authorities that hosts trust besides their own
    operator: str = "root"
    hf_token: str = dataclasses.field(default="", repr=False)
    registry_logins: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict, repr=False)
    hf_token_file: str = "/etc/sparkfleet/hf_token"  # noqa: S105 - a path
    hub_endpoint: str = "https://huggingface.co"
    docker_group: bool = False
    docker_source: str = "distribution"
    require_gb10: bool = True
    image_disk_gib: float = 25.0
    memory_plan: str = "enforce"
    memory_reserve_gib: float = 4.0
    proxy: str = dataclasses.field(default="", repr=False)
    no_proxy: str = ""
    earlyoom: bool = True
    earlyoom_arguments: str = dataclasses.field(
        default_factory=lambda: str(variables.options()["sparkfleet_earlyoom_arguments"]["default"])
    )
    swap: str = "keep"
    service_state: str = "started"
    start_timeout: int = 1800
    guard: bool = True
    guard_interval: float = 2.0
    guard_wedge_seconds: float = 180.0
    guard_canary_interval: float = 60.0
    guard_canary_timeout: float = 60.0
    guard_max_restarts: int = 3
    guard_restart_window: float = 3600.0
    guard_port: int = 9109
    on_demand_wait: str = "hold"
    on_demand_hold_seconds: float = 900.0
    on_demand_min_seconds: float = 120.0
    on_demand_starts_per_hour: int = 12
    bundle: str = ""  # folder on the controller in place of the internet
    bundle_digest: str = ""  # of its bundle.json; empty: not checked
    bundle_signers: str = ""  # file of those one of whom must have signed it; empty: not checked
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # sparkfleet_vllm_<name>
    executor: str = nodes.AUTO  # what connects the ranks of an engine over several hosts
    gateways: tuple[str, ...] = ()  # names or addresses of the inventory's gateways
    gateways_elsewhere: tuple[str, ...] = ()  # those on other hosts
    sparks: tuple[str, ...] = ()  # names or addresses of the other Sparks, where there is a firewall
    monitors: tuple[str, ...] = ()  # and of the host that monitors this one
    node_exporter_port: int = 9113
    ssh_port: int = 22
    trial: str = ""  # weights of a trial, which is not to serve: dummy or real
    trial_loads: Sequence[Mapping[str, int]] = ()  # that it measures (sparkfleet_host.release_format); () for its own
    ca: str = ""  # what ca_file has, in PEM
    host_program: str = ""  # sha256 of the program that is to be on the host; empty: not checked
    lock_file: str = ""  # what tags and revisions stand for; empty: what registry and Hub say
    lock_signers: str = ""  # file of those one of whom must have signed it; empty: not checked

    def lock(self) -> Lock | None:
        """The lock, if there is one. Raises SparkfleetError where it may not be used, or is missing."""
        if self.lock_file:
            return Lock.read(self.lock_file, signers=self.lock_signers)
        if self.lock_signers:
            raise SparkfleetError(
                "sparkfleet_lock_signers wants a signed lock, and there is none: `sparkfleet lock` with "
                "sparkfleet_lock_key writes it"
            )
        return None

    spans: Nodes | None = None  # the hosts that run the engine together, and which of them this is
    fabric_management: bool = False  # accept another network between them than that of ConnectX ports

    @classmethod
    def of(cls, settled: Mapping[str, Any], **known: Any) -> Settings:
        """From a host's variables as `variables.settle` returns them; `known` are fields known from elsewhere.
        What is not set takes its default."""
        names = {PREFIX + field.name: field.name for field in dataclasses.fields(cls)}
        found = {names[name]: value for name, value in settled.items() if name in names and name in variables.options()}
        found.setdefault("model", variables.options()["sparkfleet_model"]["default"])
        for secret in ("engine_key", "hf_token"):
            found[secret] = found.get(secret, "").strip()
        arguments = variables.arguments(settled)
        shared = {"tool_calls": found.get("tool_calls", True)}
        found["engines"] = tuple(
            EngineSettings(
                **{
                    **shared,
                    **engine,
                    "environment": {**found.get("environment", {}), **engine.get("environment", {})},
                    "arguments": {**arguments, **engine.get("arguments", {})},
                }
            )
            for engine in found.get("engines", ())
        )
        return cls(**{**found, "arguments": arguments, **known})

    @property
    def api_key_enabled(self) -> bool:
        """Whether the engines require a key."""
        return bool(self.engine_key)

    def each(self) -> tuple[EngineSettings, ...]:
        """The engines of the host, in the order in which they start; one where ``engines`` is empty."""
        names = [field.name for field in dataclasses.fields(EngineSettings)]
        shared = {name: getattr(self, name) for name in names if hasattr(self, name)}
        return tuple(self.engines) or (EngineSettings(**shared),)


def listen(value: Any) -> str | list[str]:
    """`auto`, `all`, or addresses, of sparkfleet_listen; `loopback` is its address. Raises SparkfleetError naming what
    is invalid."""
    if value in ("auto", "all"):
        return str(value)
    if value == "loopback":
        return [compose.LOOPBACK]
    found = value if isinstance(value, list | tuple) else str(value).split(",") if isinstance(value, str) else []
    made: list[str] = []
    for item in found:
        try:
            address = ipaddress.ip_address(item.strip() if isinstance(item, str) else "")
        except ValueError:
            made = []
            break
        made.append(compose.LOOPBACK if address.is_loopback else str(address))
    if not made or any("%" in address for address in made):
        raise SparkfleetError(
            f"sparkfleet_listen: {printable(str(value), 80)!r} is not valid: write auto, all, loopback, or addresses "
            "of the Spark"
        )
    return list(dict.fromkeys(made))


def media_domains(wanted: Sequence[Any]) -> list[str] | None:
    """Hosts of sparkfleet_media_domains; None where `*` is among them: all. Raises SparkfleetError."""
    for place, domain in enumerate(wanted, 1):
        if domain != "*" and not (isinstance(domain, str) and HOST.fullmatch(domain)):
            raise SparkfleetError(
                f"sparkfleet_media_domains: entry {place}, {printable(repr(domain), 80)}, is not the name of a host: "
                "write images.example.com, or '*' for every host"
            )
    return None if "*" in wanted else [str(domain).lower() for domain in wanted]


def _check_listen(settings: Settings) -> None:
    wanted = listen(settings.listen)
    if not settings.gateways or isinstance(wanted, str) or set(wanted) != {compose.LOOPBACK}:
        return
    if settings.gateways_elsewhere:
        where = ", ".join(settings.gateways_elsewhere)
        raise SparkfleetError(
            f"sparkfleet_listen: on loopback alone no gateway on another host ({where}) "
            "reaches the engine: set it to auto, which opens the port where gateways reach it"
        )
    if settings.address not in (compose.LOOPBACK, "localhost", "::1"):
        raise SparkfleetError(
            f"sparkfleet_listen: on loopback alone the gateway does not reach {settings.address or 'the Spark'}, the "
            f"address of the inventory: set sparkfleet_address: {compose.LOOPBACK} with it, or sparkfleet_listen: auto"
        )


@dataclasses.dataclass(frozen=True)
class ModelTarget:
    """A model that is fetched for an engine: its own, or the one that drafts. `download_gib`: of its files, 0 for not
    known; `page`: where its licence is read; `repo_in`, `revision_in`: what an operator sets; `locked`: what the
    revision is, where there is a lock."""

    repo: str
    revision: str
    download_gib: float
    page: str
    repo_in: str
    revision_in: str
    pickle: bool = False
    remote_code: bool = False
    drafts: bool = False
    locked: Model | None = None


@dataclasses.dataclass(frozen=True)
class EngineTarget:
    """One engine: model card and settings merged."""

    card: Card
    settings: EngineSettings
    arguments: Arguments
    image: str
    revision: str
    locked: Model | None = None  # what the revision is, where there is a lock
    locked_draft: Model | None = None  # the same of the model that drafts

    @classmethod
    def of(cls, settings: EngineSettings, source: str, lock: Lock | None = None) -> EngineTarget:
        """Merge in the documented order: model, profile, then the inventory's (group, host, command line). `source`:
        ``sparkfleet_model_source``. With a lock, image and revision are what it has for them. Raises
        SparkfleetError."""
        card = catalog.load(locked_model(settings, lock))
        arguments = card.with_profile(settings.profile)
        catalog.check_arguments(settings.arguments, ARGUMENT_PREFIX)
        catalog.check_environment(settings.environment, "sparkfleet_environment.")
        if settings.tool_calls and source == "local" and card.tool_call_parser:
            arguments |= {"enable_auto_tool_choice": True, "tool_call_parser": card.tool_call_parser}
        arguments |= settings.arguments
        made = cls(card, settings, arguments, settings.image or card.image, settings.revision or card.revision)
        return made if lock is None else made.lock(lock)

    def lock(self, lock: Lock) -> EngineTarget:
        """The same with what the lock has for image and revision. Raises SparkfleetError for what it does not have, and
        for a card that has changed since."""
        if catalog.hub_name(self.settings.model) is None:
            lock.check_card(self.card.name, self.card.digest, self.card.source)
        model = lock.model(self.card.repo, requested(self.settings, self.card), self.remote_code)
        draft = self.draft
        known = lock.model(draft.repo, draft.revision, draft.remote_code) if draft else None
        pinned = {"image": lock.pinned(self.image), "revision": model.commit, "locked": model, "locked_draft": known}
        return dataclasses.replace(self, **pinned)  # type: ignore[arg-type]

    @property
    def service(self) -> str:
        """The service of the compose file, and the name of its container."""
        return self.card.service

    @property
    def port(self) -> int:
        """The TCP port of the host for clients."""
        return self.settings.port

    @property
    def on_demand(self) -> bool:
        """Whether it is started by the first request for it."""
        return self.settings.on_demand

    @property
    def engine_port(self) -> int:
        """The TCP port of the host that the engine itself is published on."""
        return self.settings.engine_port

    @property
    def verify(self) -> dict[str, Any]:
        """What it is asked when it is verified, as plain data."""
        asked = dataclasses.asdict(self.card.verify)
        return {**asked, "kinds": list(verification.kinds(self.card, self.arguments))}

    @property
    def version(self) -> Engine:
        """The version of vLLM in the image, as far as its name or the card shows it."""
        return self.card.engine(self.image)

    @property
    def takes_media(self) -> bool:
        """Whether requests may name media. One that takes no pictures (limit_mm_per_prompt) may still take videos or
        sound: only one that takes text alone takes none."""
        return self.card.vision and not self.arguments.get("language_model_only")

    @property
    def fetches_media(self) -> bool:
        """Whether it may fetch media that requests name, from hosts that nothing else limits."""
        return self.takes_media and not {"allowed_media_domains", "allowed-media-domains"} & {*self.arguments}

    @property
    def settings_hash(self) -> str:
        """A hash of what its memory depends on besides image and model, see `calibration`."""
        return calibration.settings(self.card, self.arguments, self.settings.environment)

    @property
    def draft(self) -> ModelTarget | None:
        """The model that drafts tokens (speculative_config.model), if it is one of the Hub."""
        repo, known = kv_layout.speculation(self.card, self.arguments).model, self.card.draft
        if not cache.valid_repo(repo):  # none, or a folder
            return None
        given = self.arguments["speculative_config"]
        asked = given.get("revision") if isinstance(given, Mapping) else None
        known = known if known and known.repo == repo else None
        revision = str(asked or (known.revision if known else "main"))
        return ModelTarget(
            repo=repo,
            revision=self.locked_draft.commit if self.locked_draft else revision,
            download_gib=(known.download_gib or known.loaded_gib) if known else 0.0,
            page=f"https://huggingface.co/{repo}",
            repo_in=f"speculative_config.model in {self.card.source}",
            revision_in=f"revision in the draft of {self.card.source}",
            remote_code=self.remote_code,
            drafts=True,
            locked=self.locked_draft,
        )

    @property
    def models(self) -> tuple[ModelTarget, ...]:
        """What is fetched for it: its model, then the one that drafts."""
        own = ModelTarget(
            repo=self.card.repo,
            revision=self.revision,
            download_gib=self.card.weights.download_gib,
            page=self.card.licence.page,
            repo_in=f"repo in {self.card.source}",
            revision_in="sparkfleet_revision",
            pickle=self.card.weights.pickle,
            remote_code=self.remote_code,
            locked=self.locked,
        )
        return (own, self.draft) if self.draft else (own,)

    def found(self, state: State) -> tuple[State, ...]:
        """What a host has of each of `models`, {"model", "hub"}; `state`: what it has of the engine."""
        draft = state.get("draft") or {"model": {"commit": None, "complete": False, "bytes": 0}, "hub": None}
        return tuple(draft if model.drafts else state for model in self.models)

    @property
    def remote_code(self) -> bool:
        """Whether the engine runs code of the model's repository, which is fetched only then."""
        return bool(self.arguments.get("trust_remote_code"))


def requested(settings: EngineSettings, card: Card | None = None) -> str:
    """The revision that an engine's model was asked for by. The card that is made of a model of the Hub has the commit
    that it was made of; asked for was a branch."""
    named = catalog.hub_name(settings.model)
    return settings.revision or (named[1] if named else card.revision if card else "")


def locked_model(settings: EngineSettings, lock: Lock | None) -> str:
    """The model of an engine as the catalogue is asked for it: with a lock, one of the Hub at the lock's commit. Raises
    SparkfleetError."""
    named = catalog.hub_name(settings.model)
    if lock is None or named is None:
        return settings.model
    return f"{named[0]}@{lock.model(named[0], requested(settings)).commit}"


@dataclasses.dataclass(frozen=True)
class Target:
    """What is to run on a host: its engines, in the order in which they start."""

    settings: Settings
    engines: tuple[EngineTarget, ...]
    bundle: Bundle | None = None  # what replaces the internet
    lock: Lock | None = None

    @classmethod
    def of(cls, settings: Settings) -> Target:
        """Merge cards and settings. Raises SparkfleetError."""
        _check_listen(settings)
        media_domains(settings.media_domains)
        firewall.allowed(settings.firewall_allow)
        if settings.firewall:
            ports = {f"sparkfleet_port of {engine.model}": engine.port for engine in settings.each()}
            ports |= {"sparkfleet_guard_port": settings.guard_port, "sparkfleet_share_port": settings.share_port}
            if settings.monitors:
                ports["sparkfleet_node_exporter_port"] = settings.node_exporter_port
            firewall.check_ports(ports, settings.ssh_port)
        if settings.bundle and settings.model_source != "local":
            raise SparkfleetError(
                f"sparkfleet_model_source: {settings.model_source} needs the internet; with sparkfleet_bundle set it "
                "to local"
            )
        if settings.trial and (settings.model_source != "local" or len(settings.each()) > 1):
            raise SparkfleetError("a trial is of one model, with sparkfleet_model_source: local")
        lock = settings.lock()
        if lock and settings.model_source != "local":
            raise SparkfleetError(
                f"sparkfleet_model_source: with {settings.model_source} the engine downloads whatever the Hub has "
                f"then, whatever the lock {lock.path} has: set it to local"
            )
        each = settings.each()
        if settings.trial:
            each = tuple(dataclasses.replace(engine, on_demand=False) for engine in each)
        elif not settings.guard and any(engine.on_demand for engine in each):
            raise SparkfleetError(
                "sparkfleet_guard: false leaves nobody to start engines with on_demand: true: remove one of the two"
            )
        engines = tuple(EngineTarget.of(engine, settings.model_source, lock) for engine in each)
        _check_engines(engines)
        if settings.spans:
            _check_nodes(settings, settings.spans)
            engines = tuple(
                dataclasses.replace(one, arguments=nodes.spread(one.card, one.arguments, len(settings.spans.hosts)))
                for one in engines
            )
            _check_split(engines[0])
        for engine in engines if settings.trial else ():
            if not (embeds(engine.verify["kinds"]) or {*engine.verify["kinds"]} & {*GENERATIVE}):
                raise SparkfleetError(
                    f"{engine.card.name} gives neither text nor vectors, whose speed a trial measures: deploy it, what "
                    "it needs is measured at each start"
                )
        bundle = (
            Bundle.read(settings.bundle, settings.bundle_digest, settings.bundle_signers) if settings.bundle else None
        )
        made = cls(settings, engines, bundle, lock)
        if settings.spans and (problem := made.executor(engines[0])[1]):
            raise SparkfleetError(problem)
        return made.connected()

    def executor(self, engine: EngineTarget, asked: Mapping[str, Any] | None = None) -> tuple[str, str]:
        """What connects the ranks of the engine, and why it cannot (`nodes.executor`). `asked`: what its image said."""
        return nodes.executor(self.wanted(engine), engine.image, engine.version, asked)

    def wanted(self, engine: EngineTarget) -> str:
        """What is to connect the ranks: `auto`, `native` or `ray`."""
        given = engine.settings.arguments.get(BACKEND, engine.card.arguments.get(BACKEND))
        by_argument = {nodes.NATIVE: "native", RAY: "ray"}.get(str(given), nodes.AUTO)
        return by_argument if self.settings.executor == nodes.AUTO else self.settings.executor

    def connected(self, state: State | None = None) -> Target:
        """The same with what connects the ranks among the arguments, by what is known of the image. vLLM itself needs
        no word of it."""
        if not self.settings.spans:
            return self
        (engine,), (found,) = self.engines, (state or {}).get("engines") or [{}]
        chosen, _ = self.executor(engine, found.get("executors"))
        arguments = {key: value for key, value in engine.arguments.items() if key != BACKEND}
        if chosen == RAY or BACKEND in engine.settings.arguments:
            arguments[BACKEND] = chosen
        return dataclasses.replace(self, engines=(dataclasses.replace(engine, arguments=arguments),))

    def document(self, state: State | None = None) -> compose.Document:
        """The compose file, pinned to what the host has fetched so far."""
        if (connected := self.connected(state)) != self:
            return connected.document(state)
        known: Sequence[State] = (state or {}).get("engines") or [{}] * len(self.engines)
        pairs = zip(self.engines, known, strict=True)
        return compose.merged([self._document(engine, found, state) for engine, found in pairs])

    @property
    def registries(self) -> list[str]:
        """Registries that images of the engines come from, as Docker names them."""
        return sorted({reference(engine.image).registry for engine in self.engines if valid_image(engine.image)})

    def rank(self, state: State | None) -> compose.Rank:
        """This host's rank, with what was found of its fabric."""
        nodes = self.settings.spans
        assert nodes is not None
        found = fabric.known((state or {}).get("fabric") or {})
        chosen = fabric.at(found, nodes.address)
        devices = tuple(fabric.rdma(found, chosen)) if chosen else ()
        ray = self.engines[0].arguments.get(BACKEND) == RAY
        return compose.Rank(
            *(nodes.rank, len(nodes.hosts), nodes.address, nodes.addresses[0], chosen.name if chosen else "", devices),
            nodes=nodes.addresses,
            program=f"{self.settings.project_dir}/lib/{host_program.NAME}" if ray else "",
        )

    def _document(self, engine: EngineTarget, found: State, state: State | None) -> compose.Document:
        addresses = self.addresses(state)
        image, arguments, trial = found.get("image") or {}, engine.arguments, self.settings.trial
        commits = [self._commit(one.get("model") or {}) for one in engine.found(found)]
        if engine.draft and commits[1] and self.settings.model_source == "local":
            arguments = compose.with_draft(arguments, engine.draft.repo, commits[1])
        environment = {name: str(value) for name, value in engine.settings.environment.items()}
        if trial:
            addresses = [compose.LOOPBACK]  # no client is to use it by mistake
        elif engine.on_demand:
            addresses = [compose.LOOPBACK]  # clients ask the guard
        if trial == DUMMY:
            arguments = {**arguments, "load_format": "dummy"}
        made = compose.document(
            engine.card,
            arguments,
            environment=environment,
            source="local" if self.settings.model_source == "local" else "hub",
            image=engine.image,
            image_digest=image.get("digest"),
            image_known_as=image.get("known_as"),
            commit=commits[0],
            cache_dir=self.settings.cache_dir,
            compile_cache_dir=self.settings.compile_cache_dir,
            ca_file=CA_BUNDLE if self.settings.ca_file and self._downloads(engine) else "",
            port=engine.engine_port,
            addresses=addresses,
            api_key_enabled=self.settings.api_key_enabled and not trial,
            media_domains=self.media_domains(engine),
            rank=self.rank(state) if self.settings.spans else None,
        )
        if trial:
            made["services"][engine.service]["restart"] = "no"  # a restart of the host ends it
        if engine.on_demand:
            made["services"][engine.service] |= compose.on_demand(engine.port)
        return made

    def _commit(self, model: State) -> str | None:
        """The commit of what a host has of a model, None where it is not all there. One that is to be hashed again is
        the same model."""
        complete = model.get("complete") or (model.get("suspect") and not model.get("missing"))
        return model.get("commit") if complete or (self.settings.trial == DUMMY and model.get("config")) else None

    def _downloads(self, engine: EngineTarget) -> bool:
        """Whether an engine asks servers itself: for its model, or for media that requests name."""
        return self.settings.model_source == "hub" or (engine.takes_media and self.media_domains(engine) != [])

    def media_domains(self, engine: EngineTarget) -> list[str] | None:
        """Hosts that an engine may fetch pictures from; None where it is not told."""
        limited = engine.fetches_media and engine.version.limits_media
        return media_domains(self.settings.media_domains) if limited else None

    def addresses(self, state: State | None = None) -> list[str]:
        """Addresses that the engines' ports are published on, besides loopback; none for everywhere."""
        wanted = listen(self.settings.listen)
        if isinstance(wanted, list):
            return wanted
        # In an order independent of the name server.
        return sorted((state or {}).get("reached_at") or []) if wanted == "auto" and self.settings.gateways else []

    def firewall(self, state: State) -> str:
        """The rules of the firewall; "" for none."""
        settings = self.settings
        if not settings.firewall:
            return ""
        known = state["firewall"]["sources"]
        clients, sparks = (
            [address for name in names for address in known.get(name, ())]
            for names in ((*settings.gateways, *settings.monitors), settings.sparks)
        )
        own = (settings.guard_port, settings.node_exporter_port if settings.monitors else 0)
        return firewall.rules(
            [port for port in (*(engine.port for engine in self.engines), *own) if port],
            firewall.networks([*clients, *firewall.allowed(settings.firewall_allow)]),
            settings.share_port,
            firewall.networks(sparks),
        )

    def is_open(self, state: State | None = None) -> bool:
        """Whether anyone on the host's network may reach the engines: without a gateway, a firewall or a key."""
        addresses = self.addresses(state)
        everywhere = not addresses or not all(ipaddress.ip_address(address).is_loopback for address in addresses)
        if self.settings.spans:  # on the network of the host, so also where gateways are
            return self.settings.spans.is_head and everywhere and not self.settings.api_key_enabled
        closed = self.settings.gateways or self.settings.firewall or self.settings.api_key_enabled
        return everywhere and not closed


def _check_nodes(settings: Settings, group: Nodes) -> None:
    """What does not go with an engine of several hosts. Raises SparkfleetError."""
    refused = {
        variables.ENGINES: (len(settings.each()) > 1, "a host of a group runs its rank alone: give it one engine"),
        "sparkfleet_model_source": (settings.model_source != "local", "all ranks need the same files: set it to local"),
        "sparkfleet_guard": (not settings.guard, "the guards of the hosts start the ranks together: set it to true"),
        "sparkfleet_guard_port": (not settings.guard_port, "the guards of the hosts ask each other there: give it one"),
        "sparkfleet_firewall": (
            settings.firewall,
            "the ports between ranks are not known in advance, so it cannot open them yet: set it to false",
        ),
        "sparkfleet_listen": (
            isinstance(wanted := listen(settings.listen), list) and wanted != [compose.LOOPBACK],
            "a rank is on the network of the host, and listens on all addresses (auto, all) or on loopback",
        ),
    }
    given, other = settings.each()[0].arguments.get(BACKEND), {"native": RAY, "ray": nodes.NATIVE}
    if given and given == other.get(settings.executor):
        raise SparkfleetError(
            f"sparkfleet_vllm_{BACKEND}: {given} and {nodes.EXECUTOR}: {settings.executor} contradict each other: "
            f"remove the former (group {group.name}, sparkfleet_nodes)"
        )
    for name, (wrong, why) in refused.items():
        if wrong:
            raise SparkfleetError(f"{name}: {why} (group {group.name}, sparkfleet_nodes)")
    if settings.trial:
        raise SparkfleetError(f"a trial is of one Spark, and this one is of the group {group.name} (sparkfleet_nodes)")


def _check_split(engine: EngineTarget) -> None:
    """Whether the layers are split as they are planned to be. Raises SparkfleetError."""
    for place, environment in (
        ("sparkfleet_environment", engine.settings.environment),
        (engine.card.source, engine.card.environment),
    ):
        if PARTITION in environment:
            raise SparkfleetError(
                f"{place}: {PARTITION}: the memory plan is of vLLM's own split of the layers: leave it out"
            )


def _check_engines(engines: Sequence[EngineTarget]) -> None:
    """Whether services, models and ports distinguish the engines of a host. Raises SparkfleetError."""
    if len(engines) > MOST_ENGINES:
        raise SparkfleetError(f"{len(engines)} engines on one host: at most {MOST_ENGINES}")
    seen: dict[tuple[str, str], str] = {}
    for engine in engines:
        ports = dict.fromkeys((engine.port, engine.engine_port))
        named = (("service", engine.service), ("model", engine.card.repo), *(("port", str(port)) for port in ports))
        for what, value in named:
            if (what, value) in seen:
                other = seen[what, value]
                raise SparkfleetError(f"the engines {other} and {engine.card.name} have the same {what}: {value}")
            seen[what, value] = engine.card.name
