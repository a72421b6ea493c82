"""The model catalogue: one YAML file a model, read into a typed card.

A card holds what is true of a model wherever it runs: its place on the Hub, its sizes and shape, how vLLM is to
be started for it, its profiles, and the question whose answer is known. ``models/schema.json`` defines what a card may
hold; docs/models.md explains it.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import json
import re
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparkfleet_host.bounded import printable, read_file

from sparkfleet import SparkfleetError
from sparkfleet.documents import yaml_text
from sparkfleet.documents.schema import MOST, Document, digest, joined, problems
from sparkfleet.paths import ROOT, STATE
from sparkfleet.planning import vllm_versions, weights
from sparkfleet.planning.vllm_versions import Engine
from sparkfleet.user_paths import expanded

#: A card's file, bytes.
LARGEST = 256 << 10
#: Arguments of `vllm serve` that follow from other variables.
OURS = {
    "model": "sparkfleet_model",
    "model_tag": "sparkfleet_model",
    "host": "sparkfleet_listen",
    "port": "sparkfleet_port",
    "uds": "sparkfleet_listen",
    "api_key": "sparkfleet_engine_key",
    "revision": "sparkfleet_revision",
    "tokenizer_revision": "sparkfleet_revision",
    "download_dir": "sparkfleet_cache_dir",
    "config": "the arguments one by one",
}
#: Secrets, which would be readable in the compose file.
SECRETS = {
    "HF_TOKEN": "sparkfleet_hf_token",
    "HUGGING_FACE_HUB_TOKEN": "sparkfleet_hf_token",
    "VLLM_API_KEY": "sparkfleet_engine_key",
}
#: Kinds of attention that are not counted as layers.
EXTRA_KINDS = ("conv", "cache")
ArgumentValue = str | int | float | bool | dict[str, Any]
Arguments = dict[str, ArgumentValue]


@dataclasses.dataclass(frozen=True)
class Question:
    """What verification asks, the word the answer must contain, and the tokens it may have. ``kinds``: what is asked
    besides or instead; () for what follows from the card (see ``planning.verification``)."""

    question: str = ""
    expect: str = ""
    prompt: str = ""
    prompt_expect: str = ""
    max_tokens: int = 32
    kinds: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Licence:
    """Whether the Hub gives the files only to accounts that accepted a licence, and where to accept it."""

    name: str
    gated: bool
    page: str


@dataclasses.dataclass(frozen=True)
class Weights:
    """Sizes: files in GiB, memory in GiB as vLLM logs it, and GB (1e9 bytes) read for one token of output.

    ``parameters``: 1e9 of them in each format (``weights.BYTES``), where the memory was never logged. ``pickle``: they
    may be pickles, which run code when they are loaded.
    """

    download_gib: float
    read_gb_per_token: float
    loaded_gib: float = 0.0
    parameters: dict[str, float] = dataclasses.field(default_factory=dict)
    pickle: bool = False

    @property
    def memory_gib(self) -> float:
        """What the loaded weights take: as logged, from the parameters, or the size of the files."""
        return self.loaded_gib or (weights.gib(self.parameters) if self.parameters else self.download_gib)


@dataclasses.dataclass(frozen=True)
class Attention:
    """A kind of attention and the number of layers that have it.

    ``full`` and ``sliding`` keep keys of ``head_dim`` and values of ``value_dim`` (the same by default) for
    ``kv_heads`` heads, for all tokens or for the last ``window``; ``mla`` keeps one compressed vector of ``rank +
    rope_dim``. Besides them a layer may keep an index: ``index_bytes`` for ``index_tokens`` tokens.
    ``gdn``, ``mamba2`` and ``kda`` keep a state of fixed size, a convolution of ``conv`` taps and a matrix in
    ``state_dtype``. ``encoder`` sees a whole text at once and keeps nothing of it, nor does ``none``; ``linear`` keeps
    a state whose size is not known.
    What a layer keeps besides is an entry that is not counted as a layer: ``conv`` a convolution alone, ``width`` wide;
    ``cache`` ``bytes`` for every ``every`` tokens, for all or the last ``window``, in blocks of ``block`` tokens (the
    engine's by default) that are padded to a multiple of ``align``.
    """

    kind: str
    layers: int
    kv_heads: int = 0
    head_dim: int = 0
    value_dim: int = 0
    window: int = 0
    rank: int = 0
    rope_dim: int = 0
    index_bytes: int = 0
    index_tokens: int = 1
    heads: int = 0
    key_heads: int = 0
    value_heads: int = 0
    key_dim: int = 0
    state: int = 0
    groups: int = 0
    conv: int = 0
    chunk: int = 0
    width: int = 0
    bytes: int = 0
    every: int = 1
    block: int = 0
    align: int = 1
    state_dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class Draft:
    """A model of its own that drafts tokens: its layers that keep keys and values (none where it reads the target's),
    and what its weights take in memory, GiB. ``download_gib``: of its files; 0 for as much as that."""

    repo: str
    attention: tuple[Attention, ...]
    loaded_gib: float
    #: The shape is not published: what is given here is an assumption, and plans note it.
    assumed: bool = False
    revision: str = "main"
    download_gib: float = 0.0


@dataclasses.dataclass(frozen=True)
class Shape:
    """What of a model's configuration decides about memory: ``context`` in tokens, ``mlp`` the width of the MLP, of a
    mixture of experts that of one expert; ``mtp_layers`` those of multi-token prediction, on top of ``layers``;
    ``quantization`` how activations are brought to the weights' type, as far as memory differs."""

    layers: int
    hidden: int
    mlp: int
    vocab: int
    context: int
    attention: tuple[Attention, ...]
    heads: int = 0
    experts_per_token: int = 0
    mtp_layers: int = 0
    kv_cache_dtype: str = "auto"
    quantization: str = ""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Tokens a second of one stream measured on a Spark."""

    tok_s: float
    source: str
    ttft_ms: float = 0.0
    engine: str = ""
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Card:
    """A model card. ``arguments`` are those of ``vllm serve`` in snake_case; a profile overrides some of them."""

    name: str
    service: str
    repo: str
    revision: str
    image: str
    verified: bool
    licence: Licence
    weights: Weights
    shape: Shape
    tool_call_parser: str
    arguments: Arguments
    profiles: dict[str, Arguments]
    verify: Question
    measured: tuple[Measurement, ...]
    source: Path
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    profiles_line: int = dataclasses.field(default=1, compare=False)
    sparks: int = 1
    draft: Draft | None = None
    #: Whether it takes pictures.
    vision: bool = False
    #: vLLM in the image, where the image's name does not show it.
    vllm: str = ""
    #: Of what the card says, however it is written.
    digest: str = ""

    def engine(self, image: str = "") -> Engine:
        """vLLM in the card's image, or in another that takes its place; unknown when neither name nor card gives it."""
        named = vllm_versions.of_image(image or self.image)
        other = image.partition("@")[0] not in ("", self.image.partition("@")[0])
        if named.version or not self.vllm or other:
            return named
        return Engine.parse(self.vllm)

    def with_profile(self, profile: str) -> Arguments:
        """Arguments of ``vllm serve`` under a profile; raises when the card has no such profile."""
        if profile not in self.profiles:
            raise SparkfleetError(
                f"{self.source}:{self.profiles_line}: model {self.name} has no profile '{profile}': "
                f"choose one of {', '.join(self.profiles)}"
            )
        return {**self.arguments, **self.profiles[profile]}


def catalogue_folder() -> Path:
    """The folder ``models/`` of the checkout this package is installed from (``pip install -e``)."""
    return ROOT / "models"


@functools.cache
def schema() -> dict[str, Any]:
    """The JSON schema of a card."""
    found: dict[str, Any] = json.loads((catalogue_folder() / "schema.json").read_text(encoding="utf-8"))
    return found


def names(folder: Path | None = None) -> list[str]:
    """Names of all models in the catalogue, sorted."""
    return sorted(path.stem for path in (folder or catalogue_folder()).glob("*.yml"))


#: ORG/NAME of the Hub, with @REVISION.
_HUB = re.compile(
    r"(?P<repo>[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95})(@(?P<revision>[A-Za-z0-9_][\w./+-]{0,99}))?",
    re.ASCII,
)


def hub_name(model: str) -> tuple[str, str] | None:
    """Repository and revision (main) of a model given as ORG/NAME[@REVISION]; None for a name of the catalogue and for
    a path: one that ends like a card or is there."""
    found = _HUB.fullmatch(model)
    if not found or model.endswith((".yml", ".yaml")) or ".." in model or Path(model).is_file():
        return None
    return found["repo"], found["revision"] or "main"


def made_card(repo: str, revision: str) -> Path:
    """The path of the card that was made for a model of the Hub (`onboarding.hub_card` makes it)."""
    quoted = urllib.parse.quote(revision, safe="")
    return STATE / "cards" / f"{repo.replace('/', '--')}@{quoted}.yml"


def load(model: str, folder: Path | None = None) -> Card:
    """The card of ``model``: a name of the catalogue, the path of a card of the user's own, or ORG/NAME of the Hub with
    a card that was made before."""
    folder = folder or catalogue_folder()
    if named := hub_name(model):
        made = made_card(*named)
        if not made.is_file():
            raise SparkfleetError(
                f"{model} has no card yet: `sparkfleet plan {model}` makes one from the Hub, and so does a run that "
                "reaches it (a card of your own in a file is written with .yml at its end)"
            )
        return parse(made)
    if model.endswith((".yml", ".yaml")) or "/" in model:
        path = expanded("model card", model)
        if not path.is_file():
            own = "'{{ inventory_dir }}/cards/mine.yml' for one next to the inventory"
            hint = "" if path.is_absolute() else f" (sparkfleet_model: {own})"
            raise SparkfleetError(
                f"model card {printable(str(path.absolute()), 400)} does not exist: give the path of a YAML file"
                f"{hint}, ORG/NAME of the Hub, or a name that `sparkfleet models` lists"
            )
        return parse(path)
    known = names(folder)
    if model not in known:
        near = difflib.get_close_matches(model[:100], known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise SparkfleetError(
            f"unknown model '{printable(model, 100)}': {hint}`sparkfleet models` lists the catalogue; a card of your "
            "own is given by its path (./mine.yml), a model of the Hub as ORG/NAME"
        )
    path = folder / f"{model}.yml"
    there = path.stat()
    return _kept(path, there.st_mtime_ns, there.st_size)


@functools.lru_cache(maxsize=256)
def _kept(path: Path, changed: int, size: int) -> Card:
    """A card of the catalogue, read once while its file stays: suggestions search all of them."""
    return parse(path)


def parse(path: Path) -> Card:
    """Read and check one card; an error names file, line and key, of each problem there is."""
    try:
        text = read_file(path, LARGEST).decode("utf-8")
    except (OSError, ValueError) as error:
        raise SparkfleetError(f"model card {path} cannot be read: {error}") from None
    return of_text(path, text)


def of_text(path: Path, text: str) -> Card:
    """The card in a text; errors name `path`."""
    document = Document(path, text)
    if not isinstance(document.data, Mapping):  # a script, say, which may hold secrets
        way = f"`sparkfleet card --from {path}` makes a card of a recipe or a command"
        raise document.error((), f"the file: must be a mapping, as a model card is; {way}")
    document.check(schema())
    data = document.data
    shape = {**data["shape"], "attention": tuple(Attention(**entry) for entry in data["shape"]["attention"])}
    draft = data.get("draft")
    card = Card(
        **{key: data[key] for key in ("name", "service", "repo", "revision", "image", "verified")},
        **{key: data[key] for key in ("arguments", "profiles")},
        licence=Licence(**data["licence"]),
        weights=Weights(**data["weights"]),
        shape=Shape(**shape),
        tool_call_parser=data.get("tool_call_parser", ""),
        verify=Question(**{**data["verify"], "kinds": tuple(data["verify"].get("kinds", ()))}),
        measured=tuple(Measurement(**entry) for entry in data.get("measured", ())),
        source=path,
        environment={name: str(value) for name, value in data.get("environment", {}).items()},
        profiles_line=document.line(("profiles",)),
        sparks=data.get("sparks", 1),
        draft=Draft(**{**draft, "attention": tuple(Attention(**entry) for entry in draft["attention"])})
        if draft
        else None,
        vision=data.get("vision", False),
        vllm=data.get("vllm", ""),
        digest=digest(data),
    )
    _check_sense(card, document)
    return card


def _check_sense(card: Card, document: Document) -> None:
    """What a schema cannot express: figures that contradict each other."""
    described = sum(entry.layers for entry in card.shape.attention if entry.kind not in EXTRA_KINDS)
    if described != card.shape.layers:
        raise document.error(
            ("shape", "attention"),
            f"shape.attention: describes {described} layers, but shape.layers is {card.shape.layers}",
        )
    if card.vllm:
        try:
            vllm_versions.parse_version(card.vllm)
        except SparkfleetError as error:
            raise document.error(("vllm",), f"vllm: {error}") from None
    tensor, pipeline = (card.arguments.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline"))
    sizes = all(isinstance(size, int) and not isinstance(size, bool) for size in (tensor, pipeline))
    if not sizes or tensor * pipeline != card.sparks:  # type: ignore[operator]
        stages = f" and arguments.pipeline_parallel_size {pipeline}" if pipeline != 1 else ""
        raise document.error(
            ("sparks",) if card.sparks != 1 else ("arguments", "tensor_parallel_size"),
            f"sparks: {card.sparks}, but arguments.tensor_parallel_size is {tensor}{stages}: each Spark has one GPU",
        )
    for name in card.environment:
        if name in SECRETS:
            raise document.error(("environment", name), _secret(name, "environment."))
    _check_questions(card.verify, document)
    places: list[tuple[Arguments, tuple[str, ...]]] = [(card.arguments, ("arguments",))]
    places += [(arguments, ("profiles", name)) for name, arguments in card.profiles.items()]
    for arguments, place in places:
        length = arguments.get("max_model_len")
        # rope scaling through hf_overrides extends a context on purpose
        if isinstance(length, int) and length > card.shape.context and "hf_overrides" not in card.arguments:
            raise document.error(
                (*place, "max_model_len"),
                f"{'.'.join(place)}.max_model_len: {length} is longer than the model's context of "
                f"{card.shape.context} tokens (shape.context)",
            )


#: The fields of a card's questions that each kind needs.
_NEEDS = {
    **dict.fromkeys(("chat", "stream", "concurrency"), ("question", "expect")),
    "completion": ("prompt", "prompt_expect"),
}


def _check_questions(asked: Question, document: Document) -> None:
    """Whether the questions are there that the kinds need; without kinds those of a chat model."""
    for kind in asked.kinds or _NEEDS:
        missing = [key for key in _NEEDS.get(kind, ()) if not getattr(asked, key)]
        if missing:
            words = f"the kind {kind} needs {' and '.join(missing)}"
            raise document.error(("verify",), f"verify: {words}; a model that answers no questions has other kinds")


def check_environment(environment: Mapping[str, Any], prefix: str) -> None:
    """Check variables of the engine's environment that do not come from a card."""
    yaml_text.check(environment, prefix.rstrip("."))
    rules = {**schema()["properties"]["environment"], "$defs": schema()["$defs"]}
    found = [text for _, text in problems(dict(environment), rules, prefix)]
    found += [_secret(name, prefix) for name in environment if name in SECRETS]
    if found:
        raise SparkfleetError(joined(found))


def _secret(name: str, prefix: str) -> str:
    return f"{prefix}{name}: is a secret, and would be readable in the compose file; set {SECRETS[name]} instead"


def check_arguments(arguments: Mapping[str, Any], prefix: str) -> None:
    """Check arguments of ``vllm serve`` that do not come from a card; ``prefix`` is what precedes their names where
    they were given: that of their variables, or `--set `."""
    for name, value in arguments.items():
        yaml_text.check(name, f"a name after {prefix.strip()}")
        yaml_text.check(value, f"{prefix}{name}")
    found = [
        text
        for _, text in problems(dict(arguments), {**schema()["$defs"]["arguments"], "$defs": schema()["$defs"]}, prefix)
    ]
    known = schema()["$defs"]["arguments"]["properties"]
    for name in itertools.islice((name for name in arguments if name not in known), MOST):
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.9)
        if near:  # vLLM takes an unambiguous prefix for the full name, and the plan would not see it
            found.append(f"{prefix}{name}: did you mean {prefix}{near[0]}?")
        elif name in OURS:
            found.append(f"{prefix}{name}: Sparkfleet sets this argument itself; set {OURS[name]} instead")
    if found:
        raise SparkfleetError(joined(found))


@functools.cache
def known_arguments() -> frozenset[str]:
    """Arguments of ``vllm serve`` that a version of vLLM, the schema or a card of the catalogue has."""
    lines = Path(__file__).with_name("vllm_arguments.txt").read_text(encoding="utf-8").splitlines()
    known = {line for line in lines if not line.startswith("#")} | {*schema()["$defs"]["arguments"]["properties"]}
    for card in map(load, names()):
        known.update(card.arguments, *card.profiles.values())
    return frozenset(known)


def check_typed(arguments: Mapping[str, Any], prefix: str) -> None:
    """`check_arguments` for what a person types: names that no vLLM is known to have are refused as well."""
    check_arguments(arguments, prefix)
    for name in arguments:
        if name.removeprefix("no_") in known_arguments() or name in known_arguments():
            continue
        near = difflib.get_close_matches(name, known_arguments(), n=1)
        hint = f"did you mean {near[0]}?" if near else "no version of vLLM that is known here has it"
        raise SparkfleetError(
            f"{prefix}{printable(name, 80)}: unknown argument of vllm serve: {hint} (one of a newer vLLM goes into the "
            "card or the inventory)"
        )
