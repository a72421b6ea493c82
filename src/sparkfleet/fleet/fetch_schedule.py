"""Which Sparks fetch from the internet, and which copy from them: a pure function of what each Spark needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Missing:
    """What one Spark needs or has. `serves`: it may serve others."""

    host: str
    image: str
    needs_image: bool
    repo: str
    revision: str
    needs_model: bool
    has_model: bool
    serves: bool = True

    @property
    def model(self) -> tuple[str, str]:
        """What makes two models the same."""
        return self.repo, self.revision


@dataclasses.dataclass
class Source:
    """A Spark that others copy from; `leader` is the Spark whose tasks manage it."""

    host: str
    leader: str
    images: list[str] = dataclasses.field(default_factory=list)
    models: list[dict[str, str]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Schedule:
    """Sources by name; for each Spark that needs something, where it copies image and model from (absent: the
    internet)."""

    sources: dict[str, Source] = dataclasses.field(default_factory=dict)
    image_from: dict[str, str] = dataclasses.field(default_factory=dict)
    model_from: dict[str, str] = dataclasses.field(default_factory=dict)

    def leads(self, host: str) -> list[Source]:
        """The sources that a Spark's tasks manage."""
        return [source for source in self.sources.values() if source.leader == host]

    def summary(self, leader: str) -> list[str]:
        """A line for each source that a Spark's tasks manage."""
        lines = []
        for source in self.leads(leader):
            receivers = sorted(
                host
                for host in {*self.image_from, *self.model_from}
                if host != source.host and source.host in (self.image_from.get(host), self.model_from.get(host))
            )
            what = [*source.images, *(model["repo"] for model in source.models)]
            if receivers:  # from a bundle a Spark may serve only itself
                lines.append(f"{source.host} serves {' and '.join(what)} to {', '.join(receivers)}")
        return lines


def schedule(needs: Sequence[Missing], bundle: bool = False, alone: bool = False) -> Schedule:
    """Each image and each model is fetched from the internet once, or not at all if a Spark already has the model.

    An image is served by the first Spark that needs it, while it fetches it: Docker keeps no copy in registry form. A
    model is served by one that has it, otherwise by the first that needs it. With a `bundle` the first Spark that
    needs anything gets all of it, and copies from itself as well; with `alone` so does each that needs something.
    """
    made = Schedule()
    for image in dict.fromkeys(need.image for need in needs if need.needs_image):
        receivers = [need for need in needs if need.image == image and need.needs_image]
        for group, source in _bundled(needs, receivers, alone) if bundle else _assigned(made, receivers, []):
            _source(made, source, source.host).images.append(image)
            made.image_from.update({need.host: source.host for need in group})
    for model in dict.fromkeys(need.model for need in needs if need.needs_model):
        receivers = [need for need in needs if need.model == model and need.needs_model]
        holders = [need for need in needs if need.model == model and need.has_model and need.serves]
        for group, source in _bundled(needs, receivers, alone) if bundle else _assigned(made, receivers, holders):
            leader = source.host if source.needs_model or source.needs_image else group[0].host
            repo, revision = model
            _source(made, source, leader).models.append({"repo": repo, "revision": revision})
            made.model_from.update({need.host: source.host for need in group if bundle or need.host != source.host})
    return made


def _assigned(made: Schedule, receivers: list[Missing], holders: list[Missing]) -> list[tuple[list[Missing], Missing]]:
    """Which Sparks copy from which source; empty where sharing is not worth it."""
    candidates = holders or ([receiver for receiver in receivers if receiver.serves] if len(receivers) > 1 else [])
    # Preferably one that is a source already.
    return [(receivers, min(candidates, key=lambda need: need.host not in made.sources))] if candidates else []


def _bundled(needs: Sequence[Missing], receivers: list[Missing], alone: bool) -> list[tuple[list[Missing], Missing]]:
    """The same with a bundle: from the first Spark that needs anything, or from itself."""
    if alone:
        return [([receiver], receiver) for receiver in receivers]
    needing = [need for need in needs if need.needs_image or need.needs_model]
    return [(receivers, next((need for need in needing if need.serves), needing[0]))]


def _source(made: Schedule, source: Missing, leader: str) -> Source:
    return made.sources.setdefault(source.host, Source(source.host, leader))


def of_host(host: str, inspection: Mapping[str, Any], serves: bool, number: int = 0) -> Missing | None:
    """What `spark_plan` returned for a host, by its place in the list `fetches`; None where that is shorter."""
    fetches = inspection["plan"]["fetches"]
    if number >= len(fetches):
        return None
    plan = fetches[number]
    return Missing(
        host=host,
        image=plan["image"],
        needs_image=bool(plan["fetch_image"]),
        repo=plan["repo"],
        revision=plan["revision"],
        needs_model=bool(plan["fetch_model"]),
        has_model=bool(plan["has_model"]),
        serves=serves,
    )
