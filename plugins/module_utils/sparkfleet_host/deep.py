# SPDX-License-Identifier: Apache-2.0
"""What a deep verification asks besides: a fact in a long context, a tool call, a schema, thoughts apart from the
answer, the same from many streams at once, a picture.

Each probe is a function of the asker and the seconds that it may take; it returns what it saw, and raises CheckError,
HttpError or BoundsError. Whatever it asks is made from the seed of the verification, so that no answer can come from a
cache, and none is right by chance.
"""

from __future__ import annotations

import base64
import json
import random
import re
import struct
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .asking import CHAT, Asker, Budget, CheckError, check_answer, counted, first_choice, spoken, words
from .bounded import BoundsError, as_dict, as_int, as_list, as_str, parse_json, printable

SPENT = "verify-budget"  # the failure of a probe for which no time is left
LEAST = 2.0  # seconds without which a probe is not begun
STREAMS = 8
DEPTHS = (25, 50, 90)  # % of the long context
ANSWER_TOKENS = 96  # of an answer of a few words, where the model does not think first
REASONING_TOKENS = 2048
#: Sentences of the first context that is tried, about 2,000 tokens.
SENTENCES = 128
#: Tokens of the longest sentence, and those that a chat template may add.
SENTENCE_TOKENS, TEMPLATE_TOKENS = 24, 128
LONGEST = 1 << 24  # tokens of a context
CONTENT = 64 << 10  # characters of an answer

_CITIES = ("Lisbon", "Oslo", "Quito", "Cairo", "Hanoi", "Dublin", "Nairobi", "Lima", "Vienna", "Seoul")
_WHO = ("The old miller", "A young painter", "The night watchman", "My neighbour", "The tall carpenter", "A sailor")
_DID = ("repaired", "described", "carried home", "looked after", "talked about", "remembered", "painted", "sold")
_WHAT = ("a wooden boat", "the garden gate", "an empty basket", "the red bicycle", "a long letter", "the church bell")
_WHERE = ("near the river", "behind the station", "in the small market", "on the northern road", "by the lake")
_WHEN = ("early in the morning", "after the rain", "on a quiet Sunday", "before the harvest", "late in autumn")


def failure(kind: str) -> str:
    """The entry of the table of failures for a kind."""
    return f"verify-{kind.replace('_', '-')}"


def ask(asker: Asker, kind: str, budget: Budget) -> str:
    """Ask what a kind asks; what was seen. Raises CheckError, HttpError, BoundsError."""
    left = budget.left()
    if left < LEAST:
        raise CheckError(SPENT, "not asked: no time is left of what a deep verification may take")
    limit, probe = PROBES[kind]
    return probe(asker, Budget(min(limit, left)))


def _content(message: dict[str, Any]) -> str:
    return as_str(message.get("content") or "", "message.content", CONTENT).strip()


def _message(choice: dict[str, Any]) -> dict[str, Any]:
    return as_dict(choice.get("message"), "message")


def _tokens(asker: Asker) -> int:
    """Of a short answer: those of the card, for a model that thinks first."""
    return max(int(asker.params["max_tokens"]), ANSWER_TOKENS)


# -- many at once ----------------------------------------------------------------------------------------------------


def concurrency(asker: Asker, budget: Budget) -> str:
    """The same question on STREAMS streams at once gets the same, right answer."""
    body = asker.chat_body()

    def one(number: int) -> str:
        reader, _ = asker.read_stream(dict(body), f"stream-{number}", budget.left())
        return " ".join(spoken(reader.text).split())

    with ThreadPoolExecutor(max_workers=STREAMS) as pool:
        answers = list(pool.map(one, range(1, STREAMS + 1)))
    for text in answers:
        check_answer(text, asker.params["expect"])
    (usual, count), *others = Counter(answers).most_common()
    if others:
        also = ", ".join(words(text) for text, _ in others[:2])
        raise CheckError("verify-concurrency", f"{count} of {STREAMS} streams answer {words(usual)}, others {also}")
    return f"{STREAMS} streams at once, the same answer"


# -- a long context --------------------------------------------------------------------------------------------------


def needle(asker: Asker, budget: Budget) -> str:
    """Numbers at DEPTHS of a long text are found. The text grows, from about 2,000 tokens to the context that the
    engine serves, as far as the time allows: the engine counts the tokens, and each length shows what the next one
    takes."""
    served = as_int(asker.served().get("max_model_len"), "max_model_len of /v1/models", 1, LONGEST)
    room = served - _tokens(asker) - TEMPLATE_TOKENS
    sentences = min(SENTENCES, room // SENTENCE_TOKENS)
    if sentences < len(DEPTHS):
        raise CheckError("verify-needle", f"a context of {served:,} tokens has no room for a text")
    attempt = 0
    while True:
        began = time.monotonic()
        tokens = _find(asker, sentences, asker.seed + attempt, budget)
        seconds = max(time.monotonic() - began, 1e-3)
        # Half of what is left, were it linear: should attention make it quadratic, the time suffices nevertheless.
        grow = min(4.0, 0.98 * room / tokens, (0.5 * budget.left() / seconds) ** (2 / 3))
        if tokens >= 0.9 * room or grow < 1.25:
            return f"at {_percent(DEPTHS)} of {tokens:,} tokens; {served:,} are served"
        sentences, attempt = int(sentences * grow), attempt + 1


def _find(asker: Asker, sentences: int, seed: int, budget: Budget) -> int:
    """Ask for the numbers in a text, together, then for each that was missing alone: a small model may not keep three
    in mind. The tokens of the prompt, as the engine counts them."""
    text, numbers = haystack(sentences, seed)
    cities = list(numbers)
    asked = f"What are the numbers of {', '.join(cities[:-1])} and {cities[-1]} in the text above?"
    order = f"Answer with the {len(cities)} numbers alone, in this order."
    answer, tokens = _read(asker, f"{text}\n\n{asked} {order}", budget)
    missing = {depth: city for depth, city in zip(DEPTHS, cities, strict=True) if not _has(answer, numbers[city])}
    lost, wrong = [], ""
    for depth, city in missing.items():
        alone = f"{text}\n\nWhat is the number of {city} in the text above? Answer with the number alone."
        answer, _ = _read(asker, alone, budget)
        if not _has(answer, numbers[city]):
            lost.append(depth)
            wrong = answer
    if lost:
        where = f"{_percent(lost)} of {tokens:,} tokens"
        raise CheckError("verify-needle", f"not found at {where}: the answer is {words(wrong)}")
    return tokens


def _read(asker: Asker, content: str, budget: Budget) -> tuple[str, int]:
    """The answer to a long message, and the tokens of the prompt."""
    data = asker.post(CHAT, asker.chat_body(content, max_tokens=_tokens(asker)), "needle", budget.left())
    tokens = counted(data.get("usage"))["prompt_tokens"]
    if not tokens:
        raise CheckError("verify-needle", "the answer does not say how many tokens the prompt has (usage)")
    return spoken(_content(_message(first_choice(data, CHAT)))), tokens


def haystack(sentences: int, seed: int) -> tuple[str, dict[str, str]]:
    """A text of so many sentences without a number, and, at each of DEPTHS, one with the number of a city; these by
    city, in their order."""
    choose = random.Random(seed)  # noqa: S311 - repeatable, not secret
    cities = choose.sample(_CITIES, len(DEPTHS))
    numbers = dict(zip(cities, map(str, choose.sample(range(10_000, 100_000), len(DEPTHS))), strict=True))
    told = {sentences * depth // 100: city for depth, city in zip(DEPTHS, cities, strict=True)}
    parts = []
    for place in range(sentences):
        if place in told:
            parts.append(f"The number of {told[place]} is {numbers[told[place]]}.")
        parts.append(f"{' '.join(map(choose.choice, (_WHO, _DID, _WHAT, _WHERE, _WHEN)))}.")
    return " ".join(parts), numbers


def _percent(depths: Sequence[int]) -> str:
    """As "25, 50 and 90 %"."""
    *some, last = map(str, depths)
    return f"{', '.join(some)} and {last} %" if some else f"{last} %"


def _has(text: str, number: str) -> bool:
    """Whether a text has a number, as a whole, with or without a separator of thousands."""
    return number in re.findall(r"\d+", re.sub(r"(?<=\d)[,.\u202f](?=\d{3}(?!\d))", "", text))


# -- a schema --------------------------------------------------------------------------------------------------------


def json_schema(asker: Asker, budget: Budget) -> str:
    """An answer keeps a schema that the question does not mention."""
    choose = random.Random(asker.seed)  # noqa: S311
    flag, colour, list_ = choose.sample(("amber", "cedar", "delta", "ember", "fjord", "grove", "ivory"), 3)
    colours, sides = ["red", "green", "blue"], ["north", "south", "east"]
    properties: dict[str, Any] = {
        flag: {"type": "boolean"},
        colour: {"type": "string", "enum": colours},
        list_: {"type": "array", "items": {"type": "string", "enum": sides}, "minItems": 2, "maxItems": 2},
    }
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    body = asker.chat_body(
        "Describe the flag of France as JSON.", max_tokens=max(_tokens(asker), 256), response_format=wanted
    )
    choice = asker.ask(CHAT, body, "json-schema", budget.left())
    content = spoken(_content(_message(choice)))
    try:
        found = parse_json(content, "the answer")
    except BoundsError:
        cut = " (cut at max_tokens)" if choice.get("finish_reason") == "length" else ""
        raise CheckError("verify-json-schema", f"the answer is not JSON{cut}: {words(content)}") from None
    kept = (
        isinstance(found, dict)
        and {*found} == {*properties}
        and isinstance(found[flag], bool)
        and found[colour] in colours
        and isinstance(found[list_], list)
        and len(found[list_]) == 2
        and all(item in sides for item in found[list_])
    )
    if not kept:
        keys = ", ".join(properties)
        raise CheckError("verify-json-schema", f"not of the schema, which has {keys}: {words(content)}")
    return f"kept: {json.dumps(found)}"


# -- tools -----------------------------------------------------------------------------------------------------------


def tool_call(asker: Asker, budget: Budget) -> str:
    """A question that only a tool can answer becomes a call of it, and the tool's result the answer."""
    choose = random.Random(asker.seed)  # noqa: S311
    city, degrees = choose.choice(_CITIES), str(choose.randrange(11, 39))
    name = "get_temperature"
    tool = {
        "type": "function",
        "function": {
            "name": name,
            "description": "The temperature in a city at this moment, in degrees Celsius.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Name of the city"}},
                "required": ["city"],
            },
        },
    }
    question = {"role": "user", "content": f"What is the temperature in {city} now? Use the tool."}
    tokens = max(_tokens(asker), 256)
    body = asker.chat_body(messages=[question], tools=[tool], tool_choice="auto", max_tokens=tokens)
    message = _message(asker.ask(CHAT, body, "tool-call", budget.left()))
    calls = as_list(message.get("tool_calls") or [], "tool_calls", 100)
    if not calls:
        raise CheckError("verify-tool-call", f"no tool was called; the answer is {words(_content(message))}")
    call = as_dict(calls[0], "a tool call")
    function = as_dict(call.get("function"), "function")
    called = as_str(function.get("name"), "function.name", 1000)
    given = as_str(function.get("arguments"), "function.arguments")
    id_ = as_str(call.get("id"), "the id of a tool call", 1000)
    if called != name:
        raise CheckError("verify-tool-call", f"expected a call of {name}, got one of {printable(called, 80)}")
    arguments = as_dict(parse_json(given, "function.arguments"), "function.arguments")
    if city.lower() not in str(arguments.get("city")).lower():
        raise CheckError("verify-tool-call", f"expected {city} among the arguments, got {words(given)}")
    echoed = {"id": id_, "type": "function", "function": {"name": name, "arguments": given}}
    result = {"role": "tool", "tool_call_id": id_, "content": json.dumps({"city": city, "celsius": int(degrees)})}
    assistant = {"role": "assistant", "content": _content(message), "tool_calls": [echoed]}
    body = asker.chat_body(messages=[question, assistant, result], tools=[tool], max_tokens=tokens)
    answer = spoken(_content(_message(asker.ask(CHAT, body, "tool-result", budget.left()))))
    if not _has(answer, degrees):
        raise CheckError("verify-tool-call", f"the tool said {degrees}, the answer is {words(answer)}")
    return f"{name}({city}) called, its {degrees} in the answer"


# -- reasoning -------------------------------------------------------------------------------------------------------


def reasoning(asker: Asker, budget: Budget) -> str:
    """Thoughts are apart from the answer, and the answer is right."""
    choose = random.Random(asker.seed)  # noqa: S311
    one, other = choose.randrange(12, 30), choose.randrange(12, 30)
    # The switch has two names among chat templates; each ignores the other's.
    switches = {**(asker.params["chat_template_kwargs"] or {}), "enable_thinking": True, "thinking": True}
    body = asker.chat_body(
        f"What is {one} times {other}? Think about it, then answer with the number.",
        max_tokens=max(int(asker.params["max_tokens"]), REASONING_TOKENS),
        chat_template_kwargs=switches,
    )
    choice = asker.ask(CHAT, body, "reasoning", budget.left())
    message = _message(choice)
    # vLLM renamed it.
    thoughts = as_str(message.get("reasoning") or message.get("reasoning_content") or "", "reasoning", 1 << 20).strip()
    content = _content(message)
    if mark := re.search(r"</?think(ing)?>|<\|channel\|?>|\[/?THINK\]", content):
        raise CheckError("verify-reasoning", f"thoughts are in the answer ({mark[0]}): {words(content)}")
    if not thoughts:
        raise CheckError("verify-reasoning", f"no reasoning apart from the answer {words(content)}")
    if not content:
        cut = f" within {body['max_tokens']:,} tokens" if choice.get("finish_reason") == "length" else ""
        raise CheckError("verify-reasoning", f"no answer{cut}, only reasoning: {words(thoughts)}")
    if not _has(content, str(one * other)):
        raise CheckError("verify-reasoning", f"expected {one * other} in the answer, got {words(content)}")
    return f"{len(thoughts):,} characters of reasoning, the answer {words(content)} apart"


# -- a picture -------------------------------------------------------------------------------------------------------

#: Digits of 5 by 7 dots; a row is five bits.
_DIGITS = (
    (0b01110, 0b10001, 0b10011, 0b10101, 0b11001, 0b10001, 0b01110),
    (0b00100, 0b01100, 0b00100, 0b00100, 0b00100, 0b00100, 0b01110),
    (0b01110, 0b10001, 0b00001, 0b00110, 0b01000, 0b10000, 0b11111),
    (0b11111, 0b00010, 0b00100, 0b00010, 0b00001, 0b10001, 0b01110),
    (0b00010, 0b00110, 0b01010, 0b10010, 0b11111, 0b00010, 0b00010),
    (0b11111, 0b10000, 0b11110, 0b00001, 0b00001, 0b10001, 0b01110),
    (0b00110, 0b01000, 0b10000, 0b11110, 0b10001, 0b10001, 0b01110),
    (0b11111, 0b00001, 0b00010, 0b00100, 0b01000, 0b01000, 0b01000),
    (0b01110, 0b10001, 0b10001, 0b01110, 0b10001, 0b10001, 0b01110),
    (0b01110, 0b10001, 0b10001, 0b01111, 0b00001, 0b00010, 0b01100),
)
DOT = 20  # pixels
MARGIN = 3  # dots


def image(asker: Asker, budget: Budget) -> str:
    """Digits that are drawn into a picture are read."""
    choose = random.Random(asker.seed)  # noqa: S311
    number = "".join(map(str, choose.sample(range(1, 10), 4)))
    url = f"data:image/png;base64,{base64.b64encode(png(number)).decode('ascii')}"
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "Which number is in the picture? Answer with its digits."},
    ]
    body = asker.chat_body(content, max_tokens=_tokens(asker))
    answer = spoken(_content(_message(asker.ask(CHAT, body, "image", budget.left()))))
    if number not in re.findall(r"\d+", re.sub(r"(?<=\d)[\s,.-]+(?=\d)", "", answer)):
        raise CheckError("verify-image", f"the picture shows {number}, the answer is {words(answer)}")
    return f"{number} read from a picture"


def png(digits: str) -> bytes:
    """Digits, black on white, as a PNG (https://www.w3.org/TR/png-3/): one byte of grey a pixel."""
    columns = 6 * len(digits) - 1 + 2 * MARGIN
    blank = [0xFF] * columns
    rows = [blank] * MARGIN
    for line in range(7):
        row = list(blank)
        for place, digit in enumerate(digits):
            for bit in range(5):
                if _DIGITS[int(digit)][line] & (0b10000 >> bit):
                    row[MARGIN + 6 * place + bit] = 0
        rows.append(row)
    rows += [blank] * MARGIN
    # Each line of pixels begins with its filter, 0 for none.
    data = b"".join((b"\0" + bytes(grey for grey in row for _ in range(DOT))) * DOT for row in rows)
    header = struct.pack(">IIBBBBB", columns * DOT, len(rows) * DOT, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(_chunk, *zip(*chunks, strict=True)))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


#: In the order in which they are asked: seconds at most, and what asks. The long context takes what is left.
PROBES: dict[str, tuple[float, Callable[[Asker, Budget], str]]] = {
    "concurrency": (120.0, concurrency),
    "json_schema": (120.0, json_schema),
    "tool_call": (180.0, tool_call),
    "reasoning": (240.0, reasoning),
    "image": (120.0, image),
    "needle": (3600.0, needle),
}
