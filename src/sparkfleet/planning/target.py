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
from sparkfleet_host.bounded import printable
from sparkfleet_host.release_format import DUMMY, MOST_ENGINES

from sparkfleet import SparkfleetError
from sparkfleet.packaging.bundle import Bundle
from sparkfleet.paths import ROOT
from sparkfleet.planning import calibration, catalog, compose, variables, verification
from sparkfleet.planning.catalog import Arguments, Card
from sparkfleet.planning.lock import Lock, Model
from sparkfleet.planning.variables import ARGUMENT_PREFIX, PREFIX
from sparkfleet.planning.vllm_versions import Engine

State = Mapping[str, Any]
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
    address: str = ""  # where gateways reach the host
    engine_key: str = dataclasses.field(default="", repr=False)
    project_dir: str = "/opt/sparkfleet"
    cache_dir: str = "/opt/hf"
    cache_owner: str = "root"
    cache_group: str = "docker"
    cache_mode: str = "2775"
    compile_cache_dir: str = "/var/cache/sparkfleet"
    ca_file: str = ""  # certificate authorities of the host, for an engine that downloads by itself
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
    bundle: str = ""  # folder on the controller in place of the internet
    bundle_digest: str = ""  # of its bundle.json; empty: not checked
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # sparkfleet_vllm_<name>
    gateways: tuple[str, ...] = ()  # names or addresses of the inventory's gateways
    gateways_elsewhere: tuple[str, ...] = ()  # those on other hosts
    trial: str = ""  # weights of a trial, which is not to serve: dummy or real
    host_program: str = ""  # sha256 of the program that is to be on the host; empty: not checked
    lock_file: str = ""  # what tags and revisions stand for; empty: what registry and Hub say

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
        return tuple(self.engines) or (EngineSettings(**{name: getattr(self, name) for name in names}),)


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
class EngineTarget:
    """One engine: model card and settings merged."""

    card: Card
    settings: EngineSettings
    arguments: Arguments
    image: str
    revision: str
    locked: Model | None = None  # what the revision is, where there is a lock

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
        return dataclasses.replace(self, image=lock.pinned(self.image), revision=model.commit, locked=model)

    @property
    def service(self) -> str:
        """The service of the compose file, and the name of its container."""
        return self.card.service

    @property
    def port(self) -> int:
        """The TCP port of the host that the engine is published on."""
        return self.settings.port

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
    def settings_hash(self) -> str:
        """A hash of what its memory depends on besides image and model, see `calibration`."""
        return calibration.settings(self.card, self.arguments, self.settings.environment)

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
        if settings.bundle and settings.model_source != "local":
            raise SparkfleetError(
                f"sparkfleet_model_source: {settings.model_source} needs the internet; with sparkfleet_bundle set it "
                "to local"
            )
        if settings.trial and (settings.model_source != "local" or len(settings.each()) > 1):
            raise SparkfleetError(
                "a trial is of one model with sparkfleet_model_source: local; name the model with -e sparkfleet_model, "
                "and leave out sparkfleet_engines with -e sparkfleet_engines=[]"
            )
        lock = Lock.read(settings.lock_file) if settings.lock_file else None
        if lock and settings.model_source != "local":
            raise SparkfleetError(
                f"sparkfleet_model_source: with {settings.model_source} the engine downloads whatever the Hub has "
                f"then, whatever the lock {lock.path} has: set it to local"
            )
        engines = tuple(EngineTarget.of(engine, settings.model_source, lock) for engine in settings.each())
        _check_engines(engines)
        bundle = Bundle.read(settings.bundle, settings.bundle_digest) if settings.bundle else None
        return cls(settings, engines, bundle, lock)

    def document(self, state: State | None = None) -> compose.Document:
        """The compose file, pinned to what the host has fetched so far."""
        known: Sequence[State] = (state or {}).get("engines") or [{}] * len(self.engines)
        pairs = zip(self.engines, known, strict=True)
        return compose.merged([self._document(engine, found, self.addresses(state)) for engine, found in pairs])

    def _document(self, engine: EngineTarget, found: State, addresses: list[str]) -> compose.Document:
        image, model = found.get("image") or {}, found.get("model") or {}
        # One that is to be hashed again is the same model.
        complete = model.get("complete") or (model.get("suspect") and not model.get("missing"))
        arguments, trial = engine.arguments, self.settings.trial
        environment = {name: str(value) for name, value in engine.settings.environment.items()}
        if trial:
            addresses = [compose.LOOPBACK]  # no client is to use it by mistake
        if trial == DUMMY:
            arguments = {**arguments, "load_format": "dummy"}
            complete = complete or model.get("config")
        made = compose.document(
            engine.card,
            arguments,
            environment=environment,
            source="local" if self.settings.model_source == "local" else "hub",
            image=engine.image,
            image_digest=image.get("digest"),
            image_known_as=image.get("known_as"),
            commit=model.get("commit") if complete else None,
            cache_dir=self.settings.cache_dir,
            compile_cache_dir=self.settings.compile_cache_dir,
            ca_file=self.settings.ca_file,
            port=engine.port,
            addresses=addresses,
            api_key_enabled=self.settings.api_key_enabled and not trial,
        )
        if trial:
            made["services"][engine.service]["restart"] = "no"  # a restart of the host ends it
        return made

    def addresses(self, state: State | None = None) -> list[str]:
        """Addresses that the engines' ports are published on, besides loopback; none for everywhere."""
        wanted = listen(self.settings.listen)
        if isinstance(wanted, list):
            return wanted
        # In an order independent of the name server.
        return sorted((state or {}).get("reached_at") or []) if wanted == "auto" and self.settings.gateways else []

    def is_open(self, state: State | None = None) -> bool:
        """Whether anyone on the host's network reaches, or may reach, the engines: without a gateway or a key."""
        addresses = self.addresses(state)
        everywhere = not addresses or not all(ipaddress.ip_address(address).is_loopback for address in addresses)
        return everywhere and not self.settings.gateways and not self.settings.api_key_enabled


def _check_engines(engines: Sequence[EngineTarget]) -> None:
    """Whether services, models and ports distinguish the engines of a host. Raises SparkfleetError."""
    if len(engines) > MOST_ENGINES:
        raise SparkfleetError(f"{len(engines)} engines on one host: at most {MOST_ENGINES}")
    seen: dict[tuple[str, str], str] = {}
    for engine in engines:
        for what, value in (("service", engine.service), ("model", engine.card.repo), ("port", str(engine.port))):
            if (what, value) in seen:
                other = seen[what, value]
                raise SparkfleetError(f"the engines {other} and {engine.card.name} have the same {what}: {value}")
            seen[what, value] = engine.card.name
