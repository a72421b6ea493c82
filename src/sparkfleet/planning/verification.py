"""What an engine is asked when it is verified: kinds, by what the model is for and how it is served.

The kinds are those of ``sparkfleet_host.verify``, which asks them. A card may list them itself (``verify.kinds``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparkfleet_host.verify import GENERATIVE, KINDS

from sparkfleet.planning.catalog import Arguments, Card

#: What any chat model is asked in depth.
CHATS = ("concurrency", "json_schema", "needle")
#: Tasks of a pooling model that give scores, in the words of `--task` and `--convert`.
SCORES = ("score", "classify", "classification")
EMBEDS = ("embed", "embedding")


def kinds(card: Card, arguments: Arguments) -> tuple[str, ...]:
    """The kinds of a card that is served with these arguments of vllm serve, in the order of KINDS."""
    wanted = {*card.verify.kinds} if card.verify.kinds else _derived(card, arguments)
    return tuple(kind for kind in KINDS if kind in wanted)


def _derived(card: Card, arguments: Arguments) -> set[str]:
    tasks = {str(arguments.get(name)) for name in ("task", "convert")}
    if tasks & {*SCORES}:
        return {"rerank"}
    if arguments.get("runner") == "pooling" or tasks & {*EMBEDS}:
        return {"embeddings"}
    found = {*GENERATIVE, *CHATS}
    # A parser alone parses nothing: the engine must be allowed to choose a tool.
    if arguments.get("tool_call_parser") and arguments.get("enable_auto_tool_choice"):
        found.add("tool_call")
    if arguments.get("reasoning_parser"):
        found.add("reasoning")
    if takes_pictures(card, arguments):
        found.add("image")
    return found


def takes_pictures(card: Card, arguments: Arguments) -> bool:
    """Whether an engine with these arguments takes pictures."""
    return card.vision and not _text_only(arguments)


def _text_only(arguments: Arguments) -> bool:
    """Whether the engine takes no pictures though its model does."""
    most: Any = arguments.get("limit_mm_per_prompt")
    images = most.get("image", 1) if isinstance(most, Mapping) else 1
    return bool(arguments.get("language_model_only")) or images == 0
