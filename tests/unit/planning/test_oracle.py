"""The planner against vLLM's own KV-cache code, whose answers `scripts/oracle` keeps."""

from __future__ import annotations

import json
from typing import Any

import pytest
from sparkfleet_host.bounded import GIB

from sparkfleet import SparkfleetError
from sparkfleet.planning import catalog, kv_layout
from sparkfleet.planning.vllm_versions import Engine
from tests.unit import ROOT

KEPT: dict[str, dict[str, dict[str, Any]]] = json.loads(
    (ROOT / "tests" / "unit" / "data" / "oracle.json").read_text(encoding="utf-8")
)
CARDS = {name: catalog.load(name) for name in catalog.names()}


def planned(version: str, asked: str) -> dict[str, Any]:
    """What the planner answers, in the oracle's terms."""
    name, profile, dtype, gib = asked.rsplit(" ", 3)
    card = CARDS[name]
    arguments = {**card.with_profile(profile), "kv_cache_dtype": "bfloat16" if dtype == "auto" else dtype}
    try:
        cut = kv_layout.layout(card, arguments, Engine.parse(version))
    except SparkfleetError as error:
        return {"refused": str(error)}
    if cut.refusals:
        return {"refused": cut.refusals[0]}
    length = arguments.get("max_model_len", card.shape.context)
    length = card.shape.context if length == "auto" else int(str(length))
    pool = cut.pool(int(float(gib) * GIB))
    return {
        "blocks": pool,
        "blocks_per_sequence": cut.blocks(length),
        "tokens": cut.tokens(pool, length),
        "groups": len(cut.groups),
        "mode": cut.mode,
    }


@pytest.mark.parametrize("version", KEPT)
def test_every_card_and_profile_to_the_block(version: str) -> None:
    different = []
    for asked, answer in KEPT[version].items():
        made = planned(version, asked)
        if ("refused" in answer) != ("refused" in made) or ("refused" not in answer and made != answer):
            different.append((asked, answer, made))
    assert not different, f"{len(different)} of {len(KEPT[version])}: {different[:4]}"


def test_every_card_and_profile_was_asked() -> None:
    """A new card is asked about with `scripts/oracle`."""
    wanted = {f"{card.name} {profile}" for card in CARDS.values() for profile in card.profiles}
    for version, answers in KEPT.items():
        assert {asked.rsplit(" ", 2)[0] for asked in answers} == wanted, version
