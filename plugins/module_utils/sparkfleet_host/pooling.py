# SPDX-License-Identifier: Apache-2.0
"""What is asked of models that give numbers in place of text: known neighbours, a known order, a known label."""

from __future__ import annotations

import math
from typing import Any

from .asking import Asker, CheckError
from .bounded import as_dict, as_int, as_list, as_number, as_str

EMBEDDINGS, RERANK, CLASSIFY = "/v1/embeddings", "/v1/rerank", "/classify"
#: Sentences of the same meaning in other words; no two have a noun in common.
PAIRS = (
    ("A cat is sleeping on the sofa.", "The kitten naps on a couch."),
    ("Share prices fell sharply on the stock exchange today.", "Investors lost money as markets dropped."),
    ("Mix flour, water and yeast to make bread.", "A recipe for baking a loaf of dough."),
)
QUERY = "What is the capital of France?"
#: From the best to the worst.
DOCUMENTS = (
    "The capital of France is Paris.",
    "France is a country in Western Europe that is known for its wine.",
    "A bicycle tyre should be pumped up every few weeks.",
)
DIMENSIONS = 65_536  # most that an embedding has
LARGEST = 1e9  # of a component


def embeddings(asker: Asker) -> str:
    """/v1/embeddings puts sentences of the same meaning next to each other. Raises CheckError, HttpError,
    BoundsError."""
    texts = [text for pair in PAIRS for text in pair]
    data = asker.post(EMBEDDINGS, {"model": asker.params["model"], "input": texts}, "embeddings")
    vectors: dict[int, list[float]] = {}
    for entry in as_list(data.get("data"), "data", 1000):
        item = as_dict(entry, "an embedding")
        place = as_int(item.get("index"), "index", 0, len(texts) - 1)
        vectors[place] = _unit(item.get("embedding"))
    lengths = {len(vector) for vector in vectors.values()}
    if len(vectors) != len(texts) or len(lengths) != 1:
        sizes = " and ".join(map(str, sorted(lengths))) or "no"
        raise CheckError("verify-embeddings", f"expected {len(texts)} of one size, got {len(vectors)} of {sizes}")
    closest = 1.0
    for place, vector in vectors.items():
        near = {other: _dot(vector, vectors[other]) for other in vectors if other != place}
        partner = place ^ 1
        best = max(near, key=lambda other: near[other])
        if best != partner or near[partner] <= max(near[other] for other in near if other != partner):
            raise CheckError(
                "verify-embeddings",
                f'"{texts[place]}" is closer to "{texts[best]}" ({near[best]:.2f}) than to "{texts[partner]}" '
                f"({near[partner]:.2f})",
            )
        closest = min(closest, near[partner] - max(near[other] for other in near if other != partner))
    return f"{len(PAIRS)} pairs are neighbours, {lengths.pop():,} dimensions, margin {closest:.2f}"


def _unit(value: Any) -> list[float]:
    vector = [as_number(part, "an embedding", -LARGEST, LARGEST) for part in as_list(value, "embedding", DIMENSIONS)]
    length = math.sqrt(_dot(vector, vector))
    if not length:
        raise CheckError("verify-embeddings", "an embedding is empty, or zero throughout")
    return [part / length for part in vector]


def _dot(one: list[float], other: list[float]) -> float:
    return sum(map(float.__mul__, one, other))


def rerank(asker: Asker) -> str:
    """/v1/rerank orders texts by how well they answer. Raises CheckError, HttpError, BoundsError."""
    order = [1, 2, 0]  # as they are sent: neither right already nor reversed
    body = {"model": asker.params["model"], "query": QUERY, "documents": [DOCUMENTS[place] for place in order]}
    scores: dict[int, float] = {}
    for entry in as_list(asker.post(RERANK, body, "rerank").get("results"), "results", 1000):
        item = as_dict(entry, "a result")
        place = order[as_int(item.get("index"), "index", 0, len(order) - 1)]
        scores[place] = as_number(item.get("relevance_score"), "relevance_score", -LARGEST, LARGEST)
    shown = ", ".join(f"{scores[place]:.3f}" for place in sorted(scores))
    if len(scores) != len(DOCUMENTS) or not scores[0] > scores[1] > scores[2]:
        raise CheckError("verify-rerank", f"expected falling scores from the best document to the worst, got {shown}")
    return f"{len(scores)} documents in the right order: {shown}"


def classify(asker: Asker) -> str:
    """/classify gives the question of the card the label that it expects. Raises CheckError, HttpError, BoundsError."""
    text, expected = str(asker.params["question"]), str(asker.params["expect"])
    data = asker.post(CLASSIFY, {"model": asker.params["model"], "input": [text]}, "classification")
    found = [as_dict(entry, "a classification") for entry in as_list(data.get("data"), "data", 1000)]
    if len(found) != 1:
        raise CheckError("verify-classify", f"expected 1 classification, got {len(found)}")
    probs = [
        as_number(part, "probs", -LARGEST, LARGEST) for part in as_list(found[0].get("probs"), "probs", DIMENSIONS)
    ]
    if not probs or not all(0 <= part <= 1 for part in probs):
        raise CheckError("verify-classify", f"probabilities are none: {', '.join(f'{part:g}' for part in probs[:5])}")
    label = as_str(found[0].get("label") or "", "label", 1000)
    if label.casefold() != expected.casefold():
        shown = ", ".join(f"{part:.3f}" for part in probs[:8])
        raise CheckError("verify-classify", f'expected "{expected}" for "{text}", got "{label}" ({shown})')
    return f'"{label}" of {len(probs)}, {max(probs):.3f}'
