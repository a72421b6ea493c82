"""The model for new Sparks: chosen by the user, or the default, with its plan on the smallest of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sparkfleet import SparkfleetError
from sparkfleet.onboarding import hub_card
from sparkfleet.onboarding.prompts import Prompter, report_line
from sparkfleet.planning import catalog, memory_plan, target
from sparkfleet.planning.catalog import Card
from sparkfleet.reporting import report
from sparkfleet.user_paths import expanded

PROFILE = "throughput"


class DoesNotFit(SparkfleetError):
    """A plan that does not fit, and no terminal to ask for another."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """What the Sparks are to serve: `model` as the inventory names it, `plan` None where there can be none, and why."""

    card: Card
    model: str
    profile: str
    plan: memory_plan.Plan | None
    problem: str = ""

    @property
    def fits(self) -> bool:
        """Whether the plan fits."""
        return bool(self.plan and self.plan.fits)

    @property
    def why(self) -> str:
        """Why it does not fit, and what would."""
        if self.plan is None:
            return f"cannot determine whether {self.card.name} fits: {self.problem}"
        ways = "; or ".join(way.text for way in self.plan.suggestions[:2])
        return f"{self.card.name} does not fit: {'; '.join(self.plan.reasons)}" + (
            f". What would: {ways}" if ways else ""
        )

    def variables(self, has: Mapping[str, Any]) -> dict[str, Any]:
        """For the inventory, without what a host `has` anyway. One that was forced is to be started all the same."""
        wanted = {"sparkfleet_model": self.model, "sparkfleet_profile": self.profile}
        wanted |= {} if self.fits else {"sparkfleet_memory_plan": "warn"}
        return {name: value for name, value in wanted.items() if has.get(name) != value}


def default() -> str:
    """The model of an inventory that names none."""
    return str(target.defaults()["sparkfleet_model"])


def choose(person: Prompter, model: str, profile: str, room: memory_plan.Memory, force: bool) -> Choice:
    """Model and profile, asked for where they are empty, with the plan. Raises DoesNotFit, SparkfleetError."""
    if not model and person.there:
        offers = [offer(name, PROFILE, room) for name in catalog.names()]
        fits = {made.card.name: made.plan.fits if made.plan else None for made in offers}
        print(f"\nModels, and whether they fit {room.total:.1f} GiB:")
        print(report.models([made.card for made in offers], fits), end="")
    while True:
        made = _asked(person, model, profile, room)
        if made.plan:
            report_line(f"{made.card.name} ({made.profile}): {report.brief(made.plan.as_dict())}")
        if made.fits or force:
            return made
        if not person.there or (model and profile):
            raise DoesNotFit(f"{made.why}. Choose another --model or --profile, or use --force")
        report_line(f"  {made.why}")
        model = profile = ""


def _asked(person: Prompter, model: str, profile: str, room: memory_plan.Memory) -> Choice:
    def known(name: str) -> str:
        hub_card.ensure_reported(name)
        catalog.load(name)
        return name

    def has(name: str) -> str:
        card.with_profile(name)
        return name

    model = model or person.ask("Model", default(), known)
    card = catalog.load(model)
    if not profile:
        profile = PROFILE if PROFILE in card.profiles or not card.profiles else next(iter(card.profiles))
        if len(card.profiles) > 1:
            profile = person.ask(f"Profile ({', '.join(card.profiles)})", profile, has)
    return offer(model, profile, room)


def offer(model: str, profile: str, room: memory_plan.Memory) -> Choice:
    """A model with its plan on a Spark with this memory. Raises SparkfleetError for one that there is not."""
    card = catalog.load(model)
    path = ("/" in model or model.endswith((".yml", ".yaml"))) and catalog.hub_name(model) is None
    name = str(expanded("model card", model).absolute()) if path else model
    arguments = card.with_profile(profile)
    if card.sparks > 1:
        return Choice(card, name, profile, None, f"{card.name} spans {card.sparks} Sparks: docs/several-sparks.md")
    try:
        plan = memory_plan.make(card, arguments, profile=profile, memory=room, others=_catalogue)
    except SparkfleetError as error:
        return Choice(card, name, profile, None, str(error))
    return Choice(card, name, profile, plan)


def _catalogue() -> list[Card]:
    return [catalog.load(name) for name in catalog.names()]
