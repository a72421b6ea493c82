"""The model catalogue: one YAML file a model, read into a typed card.

A card holds what is true of a model wherever it runs: where it lies on the Hub, how vLLM is to be
started for it, its profiles, and the question whose answer is known. See docs/models.md.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sparkfleet import SparkfleetError

#: Arguments of ``vllm serve`` whose value is checked; any other flag is passed on as it stands.
POSITIVE_INTEGERS = ("max_model_len", "max_num_batched_tokens", "max_num_seqs")
_REPO = re.compile(r"[\w.-]+/[\w.-]+")
_SERVICE = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+")
_ARGUMENT = re.compile(r"[a-z][a-z0-9_]*")

ArgumentValue = str | int | float | bool
Arguments = dict[str, ArgumentValue]


@dataclasses.dataclass(frozen=True)
class Question:
    """What verification asks, and the word the answer must contain."""

    question: str
    expect: str
    prompt: str
    prompt_expect: str


@dataclasses.dataclass(frozen=True)
class Licence:
    """Whether the Hub gives the files only to accounts that accepted a licence, and where to accept it."""

    name: str
    gated: bool
    page: str


@dataclasses.dataclass(frozen=True)
class Card:
    """A model card of the catalogue.

    ``download_gib`` is the size of the weights on disk in GiB. ``arguments`` are those of
    ``vllm serve`` in snake_case; a profile replaces some of them.
    """

    name: str
    service: str
    repo: str
    revision: str
    image: str
    download_gib: float
    licence: Licence
    arguments: Arguments
    profiles: dict[str, Arguments]
    verify: Question
    source: Path

    def with_profile(self, profile: str) -> Arguments:
        """Arguments of ``vllm serve`` under a profile; raises when the card has no such profile."""
        if profile not in self.profiles:
            raise SparkfleetError(
                f"unknown profile '{profile}' for model {self.name} ({self.source}): "
                f"choose one of {', '.join(self.profiles)}"
            )
        return {**self.arguments, **self.profiles[profile]}


def catalogue_folder() -> Path:
    """The folder ``models/`` of the checkout this package is installed from (``pip install -e``)."""
    return Path(__file__).resolve().parents[2] / "models"


def names(folder: Path | None = None) -> list[str]:
    """Names of all models in the catalogue, sorted."""
    return sorted(path.stem for path in (folder or catalogue_folder()).glob("*.yml"))


def load(model: str, folder: Path | None = None) -> Card:
    """The card of ``model``: a name of the catalogue, or the path of a card of the user's own."""
    folder = folder or catalogue_folder()
    if model.endswith((".yml", ".yaml")) or "/" in model:
        path = Path(model).expanduser()
        if not path.is_file():
            raise SparkfleetError(
                f"model card {path} does not exist: give the path of a YAML file, "
                f"or one of the names {', '.join(names(folder))}"
            )
    else:
        path = folder / f"{model}.yml"
        if not path.is_file():
            known = names(folder)
            near = difflib.get_close_matches(model, known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}? " if near else ""
            raise SparkfleetError(
                f"unknown model '{model}': {hint}The catalogue has {', '.join(known)}; "
                "a card of your own is given by its path (sparkfleet_model: /path/to/card.yml)"
            )
    return parse(path)


def parse(path: Path) -> Card:
    """Read and check one card; an error names file, line and key."""
    text = path.read_text(encoding="utf-8")
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SparkfleetError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    return _Reader(path, text).card(data)


class _Reader:
    """Turns the parsed YAML of one card into a Card, with errors that name the line."""

    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        self.lines = text.splitlines()

    def fail(self, key: str, problem: str) -> SparkfleetError:
        pattern = re.compile(rf"^\s*{re.escape(key.rsplit('.', 1)[-1])}\s*:")
        line = next((n for n, text in enumerate(self.lines, 1) if pattern.match(text)), 1)
        return SparkfleetError(f"{self.path}:{line}: {key}: {problem}")

    def mapping(self, data: Any, key: str, known: tuple[str, ...] | None = None) -> dict[str, Any]:
        if not isinstance(data, Mapping):
            raise self.fail(key, f"must be a mapping, not {data!r}")
        if known is not None:
            for name in data:
                if name not in known:
                    where = f"{key}.{name}" if key != "card" else str(name)
                    raise self.fail(where, f"unknown key; known here are {', '.join(known)}")
        return dict(data)

    def string(self, data: Mapping[str, Any], key: str, pattern: re.Pattern[str] | None = None) -> str:
        value = data.get(key.rsplit(".", 1)[-1])
        if not isinstance(value, str) or not value:
            raise self.fail(key, f"must be a non-empty string, not {value!r}")
        if pattern is not None and not pattern.fullmatch(value):
            raise self.fail(key, f"'{value}' does not have the form {pattern.pattern}")
        return value

    def arguments(self, data: Any, key: str) -> Arguments:
        arguments: Arguments = {}
        for name, value in self.mapping(data, key).items():
            arguments[check_argument(str(name), value, lambda problem, n=name: self.fail(f"{key}.{n}", problem))] = (
                value
            )
        return arguments

    def card(self, data: Any) -> Card:
        known = (
            *("name", "service", "repo", "revision", "image", "download_gib", "licence"),
            *("arguments", "profiles", "verify", "sources"),
        )
        card = self.mapping(data, "card", known)
        size = card.get("download_gib")
        if isinstance(size, bool) or not isinstance(size, int | float) or size <= 0:
            raise self.fail("download_gib", f"must be a positive number of GiB, not {size!r}")
        licence = self.mapping(card.get("licence"), "licence", ("name", "gated", "page"))
        if not isinstance(licence.get("gated"), bool):
            raise self.fail("licence.gated", f"must be true or false, not {licence.get('gated')!r}")
        verify = self.mapping(card.get("verify"), "verify", ("question", "expect", "prompt", "prompt_expect"))
        profiles = self.mapping(card.get("profiles"), "profiles")
        return Card(
            name=self.string(card, "name"),
            service=self.string(card, "service", _SERVICE),
            repo=self.string(card, "repo", _REPO),
            revision=self.string(card, "revision"),
            image=self.string(card, "image"),
            download_gib=float(size),
            licence=Licence(
                self.string(licence, "licence.name"), licence["gated"], self.string(licence, "licence.page")
            ),
            arguments=self.arguments(card.get("arguments"), "arguments"),
            profiles={str(name): self.arguments(value, f"profiles.{name}") for name, value in profiles.items()},
            verify=Question(
                *(self.string(verify, f"verify.{k}") for k in ("question", "expect", "prompt", "prompt_expect"))
            ),
            source=self.path,
        )


def check_argument(name: str, value: Any, fail: Any) -> str:
    """Check one argument of ``vllm serve``; ``fail(problem)`` makes the exception to raise."""
    if not _ARGUMENT.fullmatch(name):
        raise fail("write arguments of vllm serve in snake_case, without dashes")
    if not isinstance(value, str | int | float | bool):
        raise fail(f"must be a string, a number or true/false, not {value!r}")
    if name in POSITIVE_INTEGERS and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise fail(f"must be a whole number above 0, not {value!r}")
    if name == "gpu_memory_utilization" and (isinstance(value, bool | str) or not 0 < value <= 1):
        raise fail(f"must be a share between 0 and 1, not {value!r}")
    return name
