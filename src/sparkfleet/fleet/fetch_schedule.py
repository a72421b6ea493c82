"""Who fetches from the internet, and who takes from whom: a pure function of what each Spark lacks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Lack:
    """What one Spark wants, and whether it lacks it. `serves`: it can be asked to give to others."""

    host: str
    image: str
    lacks_image: bool
    repo: str
    revision: str
    lacks_model: bool
    has_model: bool
    serves: bool = True

    @property
    def model(self) -> tuple[str, str]:
        """What makes two models the same."""
        return self.repo, self.revision


@dataclasses.dataclass
class Source:
    """A Spark that others take from; `leader` is the Spark whose tasks look after it."""

    host: str
    leader: str
    images: list[str] = dataclasses.field(default_factory=list)
    models: list[dict[str, str]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Schedule:
    """Sources by name; for each Spark that lacks something, where it takes image and model from (absent: the
    internet)."""

    sources: dict[str, Source] = dataclasses.field(default_factory=dict)
    image_from: dict[str, str] = dataclasses.field(default_factory=dict)
    model_from: dict[str, str] = dataclasses.field(default_factory=dict)

    def leads(self, host: str) -> list[Source]:
        """The sources that a Spark's tasks look after."""
        return [source for source in self.sources.values() if source.leader == host]

    def summary(self, leader: str) -> list[str]:
        """A line for each source that a Spark's tasks look after."""
        lines = []
        for source in self.leads(leader):
            takers = sorted(
                host
                for host in {*self.image_from, *self.model_from}
                if host != source.host and source.host in (self.image_from.get(host), self.model_from.get(host))
            )
            what = [*source.images, *(model["repo"] for model in source.models)]
            if takers:  # out of a bundle one may give to itself alone
                lines.append(f"{source.host} gives {' and '.join(what)} to {', '.join(takers)}")
        return lines


def schedule(lacks: Sequence[Lack], bundle: bool = False, alone: bool = False) -> Schedule:
    """Each image and each model comes from the internet once, or not at all where a Spark has the model already.

    An image is given by the first Spark that lacks it, while it fetches it: Docker keeps no copy of an image as it
    travelled. A model is given by one that has it, else by the first that lacks it. With a `bundle` the first Spark
    that lacks anything gets all of it, and takes from itself as well; with `alone` too each that lacks something.
    """
    made = Schedule()
    for image in dict.fromkeys(lack.image for lack in lacks if lack.lacks_image):
        takers = [lack for lack in lacks if lack.image == image and lack.lacks_image]
        for some, giver in _bundled(lacks, takers, alone) if bundle else _givers(made, takers, []):
            _source(made, giver, giver.host).images.append(image)
            made.image_from.update({lack.host: giver.host for lack in some})
    for model in dict.fromkeys(lack.model for lack in lacks if lack.lacks_model):
        takers = [lack for lack in lacks if lack.model == model and lack.lacks_model]
        havers = [lack for lack in lacks if lack.model == model and lack.has_model and lack.serves]
        for some, giver in _bundled(lacks, takers, alone) if bundle else _givers(made, takers, havers):
            leader = giver.host if giver.lacks_model or giver.lacks_image else some[0].host
            repo, revision = model
            _source(made, giver, leader).models.append({"repo": repo, "revision": revision})
            made.model_from.update({lack.host: giver.host for lack in some if bundle or lack.host != giver.host})
    return made


def _givers(made: Schedule, takers: list[Lack], havers: list[Lack]) -> list[tuple[list[Lack], Lack]]:
    """Who takes a thing from whom; nobody where it is not worth it."""
    givers = havers or ([taker for taker in takers if taker.serves] if len(takers) > 1 else [])
    # One that gives already, if it can.
    return [(takers, min(givers, key=lambda lack: lack.host not in made.sources))] if givers else []


def _bundled(lacks: Sequence[Lack], takers: list[Lack], alone: bool) -> list[tuple[list[Lack], Lack]]:
    """The same with a bundle: from the first of all that lack anything, or from oneself."""
    if alone:
        return [([taker], taker) for taker in takers]
    lacking = [lack for lack in lacks if lack.lacks_image or lack.lacks_model]
    return [(takers, next((lack for lack in lacking if lack.serves), lacking[0]))]


def _source(made: Schedule, giver: Lack, leader: str) -> Source:
    return made.sources.setdefault(giver.host, Source(giver.host, leader))


def lack(host: str, look: Mapping[str, Any], serves: bool) -> Lack:
    """Of what `spark_plan` returned for a host."""
    plan, model = look["plan"], look["state"]["model"]
    return Lack(
        host=host,
        image=plan["image"],
        lacks_image=bool(plan["fetch"]["image"]),
        repo=plan["repo"],
        revision=plan["revision"],
        lacks_model=bool(plan["fetch"]["model"]),
        has_model=bool(model["complete"]),
        serves=serves,
    )
