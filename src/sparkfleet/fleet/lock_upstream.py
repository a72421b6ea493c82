"""Makes a lock: what the inventory needs, and what registry and Hub say that it is now, asked by the controller."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from sparkfleet_host import bounded
from sparkfleet_host.bounded import BoundsError, printable
from sparkfleet_host.registry import Registry, parse_manifest, resolve

from sparkfleet import SparkfleetError
from sparkfleet.documents import certificates
from sparkfleet.fleet import image_digest, model_files
from sparkfleet.fleet.model_files import Way
from sparkfleet.planning import catalog, target
from sparkfleet.planning.lock import File, Image, Lock, Model
from sparkfleet.planning.target import EngineSettings, EngineTarget, Settings

#: A Spark's processor; an image of one platform alone is locked as what it is.
PLATFORM = "linux/arm64"
#: For the list of a model and its small files, and for an image, seconds.
MODEL_SECONDS, IMAGE_SECONDS = 300.0, 60.0
CONFIG_BYTES = 4 << 20
LICENCE = re.compile(r"(.*/)?(licen[cs]e|copying|notice|use_policy|terms)[^/]*", re.IGNORECASE)


class UpstreamError(SparkfleetError):
    """Registry or Hub did not say what a tag or revision stands for."""


@dataclasses.dataclass(frozen=True)
class Ways:
    """How this controller reaches registries and Hub for a host."""

    hub: Way
    registries: Mapping[str, str] = dataclasses.field(default_factory=dict)
    proxy: str = ""
    no_proxy: str = ""
    logins: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict, repr=False)
    ca: str = ""

    @classmethod
    def of(cls, values: Mapping[str, Any], token: str = "") -> Ways:
        """From a host's variables, as `variables.settle` returns them; `token` is the user's, where they have none."""
        settings = Settings.of(values)
        ca = certificates.read(settings.ca_file)
        return cls(
            Way(
                endpoint=values.get("sparkfleet_controller_hub") or settings.hub_endpoint,
                token=settings.hf_token or token,
                proxy=settings.proxy,
                no_proxy=settings.no_proxy,
                ca=ca,
            ),
            values.get("sparkfleet_controller_registries") or {},
            settings.proxy,
            settings.no_proxy,
            settings.registry_logins,
            ca,
        )


# -- asking ----------------------------------------------------------------------------------------------------------


def ask_image(image: str, ways: Ways, platform: str = PLATFORM) -> Image:
    """What a reference stands for. Raises UpstreamError, and SparkfleetError for what is no reference."""
    ref = image_digest.checked(image)
    try:
        registry = image_digest.registry_of(
            ref, ways.registries, ways.proxy, ways.no_proxy, logins=ways.logins, ca=ways.ca
        )
        return bounded.in_time(lambda: _image(registry, ref.wanted, platform), IMAGE_SECONDS)
    except (OSError, BoundsError) as error:
        raise UpstreamError(f"{image}: its registry does not say what it is: {printable(str(error), 300)}") from None


def _image(registry: Registry, wanted: str, platform: str) -> Image:
    found = resolve(registry, wanted, platform.partition("/")[2])
    digest, _, body = found[-1]
    manifest = parse_manifest(body)
    config, _ = manifest.blobs[0]
    with registry.blob(config) as answer:
        content = bounded.read_all(answer.read1, "its configuration", CONFIG_BYTES)
    if f"sha256:{hashlib.sha256(content).hexdigest()}" != config:
        raise BoundsError("its configuration arrived with different content")
    described = bounded.as_dict(bounded.parse_json(content, "its configuration"), "its configuration")
    built = "/".join(str(described.get(key) or "unknown") for key in ("os", "architecture"))
    return Image(found[0][0], printable(built, 100), digest, sum(size for _, size in manifest.blobs))


def ask_model(repo: str, revision: str, code: bool, hub: Way, pickle: bool = False) -> Model:
    """What a revision stands for, with the sha256 of every file; small ones are read for it. Raises UpstreamError, and
    SparkfleetError for what is no model."""
    words = ["--lock", f"--seconds={MODEL_SECONDS - 5:g}", *model_files.kinds(code, pickle)]
    output = model_files.run_client(repo, revision, hub, words, MODEL_SECONDS)
    answer = (
        output if isinstance(output, model_files.Answer) else model_files.understand(output, revision, hub.endpoint)
    )
    if not answer.commit or isinstance(output, model_files.Answer):
        reason = answer.reason.replace(hub.token, "***") if hub.token else answer.reason
        raise UpstreamError(f"{repo}@{revision}: the Hub does not say what it is: {reason} [{answer.failure}]")
    try:
        said = bounded.as_dict(
            bounded.parse_json(output.splitlines()[-1], "its client", model_files.LIMIT), "its client"
        )
        licence = printable(bounded.as_str(said.get("licence", ""), "licence", 100), 100)
        files = {name: _file(name, entry) for name, entry in answer.files.items()}
    except BoundsError as error:
        raise UpstreamError(f"{repo}@{revision}: {hub.endpoint} answers oddly: {error}") from None
    return Model(answer.commit, files, licence, code)


def _file(name: str, entry: Mapping[str, Any]) -> File:
    sha256 = bounded.matched(bounded.SHA256, entry.get("sha256"), f"sha256 of {name}")
    return File(entry["size"], sha256, entry.get("sha1", ""))


# -- making ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Maker:
    """Locks what hosts need. What `old` has stays, unless it is to be renewed: `renewed` names models (a card's name,
    ORG/NAME) whose image, revision and card are asked for again; None for none, empty for all. `make_card` makes the
    card of a model of the Hub, given as ORG/NAME@COMMIT."""

    old: Lock
    make_card: Callable[[str, Way], object]
    renewed: Sequence[str] | None = None
    platform: str = PLATFORM
    token: str = dataclasses.field(default="", repr=False)

    def __post_init__(self) -> None:
        self.images: dict[str, Image] = {}
        self.models: dict[str, Model] = {}
        self.cards: dict[str, str] = {}
        self._met: set[str] = set()

    def make(self, hosts: Mapping[str, Mapping[str, Any]]) -> Lock:
        """The lock for hosts with their settled variables: with what else was in the old one, unless all was renewed.
        Raises SparkfleetError."""
        for name, values in hosts.items():
            settings, ways = Settings.of(values), Ways.of(values, self.token)
            if settings.model_source != "local":
                raise SparkfleetError(
                    f"{name}: sparkfleet_model_source: with {settings.model_source} the engine downloads whatever the "
                    "Hub has then, which cannot be locked: set it to local"
                )
            for engine in settings.each():
                self._engine(engine, ways)
        strange = [name for name in self.renewed or () if name not in self._met]
        if strange:
            raise SparkfleetError(
                f"{printable(', '.join(strange), 200)}: not a model of this inventory, which has "
                f"{', '.join(sorted(self._met))}"
            )
        complete = self.renewed is not None and not self.renewed
        kept = Lock(sparkfleet=self.old.sparkfleet) if complete else self.old
        if complete or not (self.old.images or self.old.models):
            kept = dataclasses.replace(kept, sparkfleet=Lock.sparkfleet)
        return dataclasses.replace(
            kept,
            images={**kept.images, **self.images},
            models={**kept.models, **self.models},
            cards={**kept.cards, **self.cards},
            packages=self.old.packages,  # registry and Hub know nothing of them
            path=self.old.path,
        )

    def _engine(self, engine: EngineSettings, ways: Ways) -> None:
        named = catalog.hub_name(engine.model)
        model: Model | None = None
        if named:  # its card is made of the commit
            self._met.add(engine.model)
            code = bool(engine.arguments.get("trust_remote_code"))
            model = self._model(named[0], target.requested(engine), code, ways, self._renews(engine.model, named[0]))
            pinned = f"{named[0]}@{model.commit}"
            self.make_card(pinned, ways.hub)
            engine = dataclasses.replace(engine, model=pinned)
        made = EngineTarget.of(engine, "local")
        card = made.card
        self._met |= {card.name, card.repo}
        renews = self._renews(engine.model, card.name, card.repo)
        if model is None:
            self._model(card.repo, made.revision, made.remote_code, ways, renews, card.weights.pickle)
            self._card(card, renews)
        if made.draft:
            self._model(made.draft.repo, made.draft.revision, made.remote_code, ways, renews)
        if made.image not in self.images:
            old = None if renews else self.old.images.get(made.image)
            self.images[made.image] = old or ask_image(made.image, ways, self.platform)

    def _renews(self, *names: str) -> bool:
        return self.renewed is not None and (not self.renewed or any(name in self.renewed for name in names))

    def _model(self, repo: str, revision: str, code: bool, ways: Ways, renews: bool, pickle: bool = False) -> Model:
        key = f"{repo}@{revision}"
        found = self.models.get(key)
        if found is None or (code and not found.code):
            old = None if renews else self.old.models.get(key)
            if old is not None and code and not old.code:
                # The code of the commit that is locked, not of what the branch is now.
                old = ask_model(repo, old.commit, True, ways.hub, pickle)
            self.models[key] = old or ask_model(repo, revision, code, ways.hub, pickle)
        return self.models[key]

    def _card(self, card: catalog.Card, renews: bool) -> None:
        digest = card.digest if renews else self.old.cards.get(card.name, card.digest)
        if self.cards.setdefault(card.name, digest) != digest:
            raise SparkfleetError(
                f"two different model cards are called {card.name} (one is {card.source}): give one another name"
            )


# -- what has changed ------------------------------------------------------------------------------------------------


def changes(old: Lock, new: Lock) -> list[str]:
    """What a lock has that another has not, a line each; names and licences are the Hub's words."""
    found = [*_each("image", old.images, new.images, _new_image, _image_changes)]
    found += _each("model", old.models, new.models, _new_model, _model_changes)
    found += _each("card", old.cards, new.cards, lambda _: "new", lambda _, __: iter(["changed"]))
    found += _each(
        *("packages of", old.packages, new.packages, lambda known: f"new ({len(known)})", _package_changes),
        removed="removed, as the lock was changed by hand or is not signed: read them again with --packages",
    )
    if old.sparkfleet != new.sparkfleet and (old.images or old.models):
        found.append(f"sparkfleet: {old.sparkfleet} → {new.sparkfleet}")
    return found


def _each(
    kind: str,
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    described: Callable[[Any], str],
    changed: Callable[[Any, Any], Iterator[str]],
    removed: str = "removed, no host of the inventory uses it",
) -> Iterator[str]:
    for name in sorted({*old, *new}):
        if name not in new:
            yield f"{kind} {name}: {removed}"
        elif name not in old:
            yield f"{kind} {name}: {described(new[name])}"
        elif old[name] != new[name]:
            yield from (f"{kind} {name}: {line}" for line in changed(old[name], new[name]))


def _new_image(image: Image) -> str:
    return f"new, {short(image.digest)} ({image.platform}, {amount(image.size)})"


def _image_changes(old: Image, new: Image) -> Iterator[str]:
    if old.digest != new.digest:
        yield f"tag moved, {short(old.digest)} → {short(new.digest)} ({amount(old.size)} → {amount(new.size)})"
    elif old != new:
        yield f"{old.platform} {short(old.manifest)} → {new.platform} {short(new.manifest)}, of the same digest"


def _new_model(model: Model) -> str:
    licence = f", licence {model.licence}" if model.licence else ""
    return f"new, commit {model.commit[:12]} ({len(model.files)} files, {amount(model.size)}{licence})"


def _model_changes(old: Model, new: Model) -> Iterator[str]:
    if old.commit != new.commit:
        yield f"revision moved, {old.commit[:12]} → {new.commit[:12]} ({amount(old.size)} → {amount(new.size)})"
    if old.licence != new.licence:
        yield f"licence {old.licence or 'unnamed'} → {new.licence or 'unnamed'}"
    if old.code != new.code:
        yield f"code of the repository: {'now' if new.code else 'no longer'} part of it"
    for name in sorted({*old.files, *new.files}):
        before, after = old.files.get(name), new.files.get(name)
        text = "licence text" if LICENCE.fullmatch(name) else "file"
        shown = printable(name, 200)
        if before is None and after is not None:
            yield f"{text} {shown} added ({amount(after.size)})"
        elif after is None and before is not None:
            yield f"{text} {shown} removed ({amount(before.size)})"
        elif before is not None and after is not None and before != after:
            moved = "" if old.commit != new.commit else ", although the commit is the same"
            hashes = f"sha256:{before.sha256[:12]} → {after.sha256[:12]}"
            sizes = f"{amount(before.size)} → {amount(after.size)}" if before.size != after.size else "same size"
            yield f"{text} {shown} changed ({hashes}, {sizes}){moved}"


def _package_changes(old: Mapping[str, str], new: Mapping[str, str]) -> Iterator[str]:
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            yield f"{name} {old.get(name, 'none')} → {new.get(name, 'none')}"


def short(digest: str) -> str:
    """A digest as people compare it."""
    return digest[: len("sha256:") + 12]


def amount(size: int) -> str:
    """Bytes in words."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size} bytes"
