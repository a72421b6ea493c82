"""Who fetches from the internet, and who takes from whom: a pure function of what each Spark lacks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Missing:
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


def schedule(wants: Sequence[Missing], bundle: bool = False, alone: bool = False) -> Schedule:
    """Each image and each model comes from the internet once, or not at all where a Spark has the model already.

    An image is given by the first Spark that lacks it, while it fetches it: Docker keeps no copy of an image as it
    travelled. A model is given by one that has it, else by the first that lacks it. With a `bundle` the first Spark
    that lacks anything gets all of it, and takes from itself as well; with `alone` too each that lacks something.
    """
    made = Schedule()
    for image in dict.fromkeys(want.image for want in wants if want.lacks_image):
        takers = [want for want in wants if want.image == image and want.lacks_image]
        for some, giver in _bundled(wants, takers, alone) if bundle else _givers(made, takers, []):
            _source(made, giver, giver.host).images.append(image)
            made.image_from.update({want.host: giver.host for want in some})
    for model in dict.fromkeys(want.model for want in wants if want.lacks_model):
        takers = [want for want in wants if want.model == model and want.lacks_model]
        holders = [want for want in wants if want.model == model and want.has_model and want.serves]
        for some, giver in _bundled(wants, takers, alone) if bundle else _givers(made, takers, holders):
            leader = giver.host if giver.lacks_model or giver.lacks_image else some[0].host
            repo, revision = model
            _source(made, giver, leader).models.append({"repo": repo, "revision": revision})
            made.model_from.update({want.host: giver.host for want in some if bundle or want.host != giver.host})
    return made


def _givers(made: Schedule, takers: list[Missing], holders: list[Missing]) -> list[tuple[list[Missing], Missing]]:
    """Who takes a thing from whom; nobody where it is not worth it."""
    givers = holders or ([taker for taker in takers if taker.serves] if len(takers) > 1 else [])
    # One that gives already, if it can.
    return [(takers, min(givers, key=lambda want: want.host not in made.sources))] if givers else []


def _bundled(wants: Sequence[Missing], takers: list[Missing], alone: bool) -> list[tuple[list[Missing], Missing]]:
    """The same with a bundle: from the first of all that want anything, or from oneself."""
    if alone:
        return [([taker], taker) for taker in takers]
    lacking = [want for want in wants if want.lacks_image or want.lacks_model]
    return [(takers, next((want for want in lacking if want.serves), lacking[0]))]


def _source(made: Schedule, giver: Missing, leader: str) -> Source:
    return made.sources.setdefault(giver.host, Source(giver.host, leader))


def of_host(host: str, inspection: Mapping[str, Any], serves: bool, engine: int = 0) -> Missing | None:
    """What `spark_plan` returned for an engine of a host, by its place in the list; None where it has fewer engines."""
    engines = inspection["plan"]["engines"]
    if engine >= len(engines):
        return None
    plan, model = engines[engine], inspection["state"]["engines"][engine]["model"]
    return Missing(
        host=host,
        image=plan["image"],
        lacks_image=bool(plan["fetch_image"]),
        repo=plan["repo"],
        revision=plan["revision"],
        lacks_model=bool(plan["fetch_model"]),
        has_model=bool(model["complete"]),
        serves=serves,
    )
