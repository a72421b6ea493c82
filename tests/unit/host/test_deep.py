"""Deep probes against scripted answers: what is asked, what is right, and whatever an engine may send instead."""

from __future__ import annotations

import itertools
import json
import re
import struct
import time
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sparkfleet_host import asking, deep, pooling, verify
from sparkfleet_host.asking import Budget, CheckError, StreamReader
from sparkfleet_host.http import Answer, Client, HttpError

from sparkfleet.diagnosis.failures import BY_ID
from tests.unit.fakes.clock import set_time

PARAMS = {
    **{"url": "http://127.0.0.1:1", "model": "m", "question": "q", "expect": "Paris", "prompt": "p"},
    **{"prompt_expect": "Paris", "timeout": 5.0, "max_tokens": 32, "chat_template_kwargs": {"enable_thinking": False}},
}
Reply = Callable[[str, dict[str, Any]], Any]


class Scripted(Client):
    """Answers a request with what a function makes of it; `asked` has path, body and timeout of each."""

    def __init__(self, reply: Reply) -> None:
        super().__init__("http://127.0.0.1:1")
        self.reply, self.asked = reply, []
        self.asked: list[tuple[str, dict[str, Any], float | None]]

    def get(self, path: str, *_: Any, **__: Any) -> Answer:
        return self.post(path, {})

    def post(self, path: str, body: Any, timeout: float | None = None, *_: Any, **__: Any) -> Answer:
        self.asked.append((path, body, timeout))
        made = self.reply(path, body)
        if isinstance(made, Exception):
            raise made
        raw = made if isinstance(made, bytes) else json.dumps(made).encode()
        return Answer(200, "application/json", raw)


def message(content: Any = None, tokens: int = 0, finish: str = "stop", **more: Any) -> dict[str, Any]:
    choice = {"message": {"role": "assistant", "content": content, **more}, "finish_reason": finish}
    return {"choices": [choice], "usage": {"prompt_tokens": tokens, "completion_tokens": 1}}


def check(kind: str, reply: Reply, budget: float = 60.0, **params: Any) -> tuple[dict[str, Any], Scripted]:
    """The row of one kind, as a verification has it, and the client."""
    made = verify.Verification({**PARAMS, "kinds": [kind], "budget": budget, **params})
    made.client = client = Scripted(reply)
    made.run()
    rows = [row for row in made.checks if row["name"] == kind]
    return rows[0], client


# -- a long context --------------------------------------------------------------------------------------------------


def reader(served: Any = 32_768, blind: Callable[[int], int] = lambda tokens: tokens, usage: bool = True) -> Reply:
    """An engine that finds the numbers in as many tokens of the text as `blind` says, five characters each."""

    def reply(path: str, body: dict[str, Any]) -> Any:
        if path == "/v1/models":
            return {"data": [{"id": "m", "max_model_len": served}]}
        text = body["messages"][0]["content"]
        tokens = len(text) // 5
        assert tokens + body["max_tokens"] <= served
        seen = dict(re.findall(r"The number of (\w+) is (\d+)\.", text[: 5 * blind(tokens)]))
        cities = re.split(", | and ", re.findall(r"(?:numbers|is the number) of (.*) in the text", text)[0])
        return message(" ".join(seen.get(city, "?") for city in cities), tokens if usage else 0)

    return reply


def test_the_haystack_is_made_from_its_seed() -> None:
    text, numbers = deep.haystack(200, 7)
    assert (text, numbers) == deep.haystack(200, 7) != deep.haystack(200, 8)
    assert len({*numbers.values()}) == 3 and re.findall(r"\d+", text) == [*numbers.values()]
    for depth, number in zip((25, 50, 90), numbers.values(), strict=True):
        assert text.index(number) / len(text) * 100 == pytest.approx(depth, abs=2)


def test_a_needle_in_all_of_the_context() -> None:
    row, client = check("needle", reader())
    found = re.fullmatch(r"at 25, 50 and 90 % of ([\d,]+) tokens; 32,768 are served", row["detail"])
    assert row["ok"] and found and 0.9 * 32_500 < int(found[1].replace(",", "")) < 32_768 - 96
    lengths = [len(body["messages"][0]["content"]) // 5 for path, body, _ in client.asked if body]
    assert len(lengths) == 3 and all(2 < then / now <= 4.1 for now, then in itertools.pairwise(lengths))
    texts = [body["messages"][0]["content"][:200] for _, body, _ in client.asked if body]
    assert len({*texts}) == len(texts)  # or the engine's cache would have the beginning


@pytest.mark.parametrize(
    ("blind", "lost"),
    [
        (lambda tokens: tokens if tokens < 3000 else 0, "25, 50 and 90 %"),
        (lambda tokens: min(tokens, 3000), "50 and 90 %"),
        (lambda tokens: tokens * 4 // 5, "90 %"),
    ],
)
def test_a_needle_that_is_not_found(blind: Callable[[int], int], lost: str) -> None:
    row, _ = check("needle", reader(blind=blind))
    assert (row["ok"], row["failure"]) == (False, "verify-needle")
    assert re.match(rf"not found at {re.escape(lost)} of [\d,]+ tokens: the answer is ", row["detail"])


def test_a_model_that_cannot_keep_three_numbers_in_mind_is_asked_for_each() -> None:
    answer = reader(served=2_000)

    def one_only(path: str, body: dict[str, Any]) -> Any:
        found = answer(path, body)
        if body:
            told = found["choices"][0]["message"]
            told["content"] = told["content"].split(" ")[0]
        return found

    row, client = check("needle", one_only)
    assert row["ok"], row
    asked = [body["messages"][0]["content"].rpartition("\n\n")[2] for _, body, _ in client.asked if body]
    assert [words.startswith("What are") for words in asked] == [True, False, False] * 2


def test_a_long_context_takes_no_more_time_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 seconds for 1,000 tokens, and twice the tokens take four times as long."""
    clock = [100.0]
    set_time(monkeypatch, asking, deep, verify, monotonic=lambda: clock[0])
    answer = reader(served=1_000_000)

    def slow(path: str, body: dict[str, Any]) -> Any:
        found = answer(path, body)
        if body:
            clock[0] += 10 * (found["usage"]["prompt_tokens"] / 1000) ** 2
        return found

    row, client = check("needle", slow, budget=600.0)
    assert row["ok"], row
    assert clock[0] - 100 < 600 and len(client.asked) > 2
    limits = [timeout for _, body, timeout in client.asked if body]
    assert limits[0] == 600 and limits == sorted(limits, reverse=True)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (reader(served=200), "a context of 200 tokens has no room for a text"),
        (reader(served=None), "max_model_len of /v1/models: not an integer: None"),
        (reader(served=-5), "max_model_len of /v1/models: -5 is not between 1 and "),
        (reader(served=10**12), "max_model_len of /v1/models: 1000000000000 is not between"),
        (reader(usage=False), "the answer does not say how many tokens the prompt has (usage)"),
    ],
)
def test_a_context_of_unknown_length(reply: Reply, words: str) -> None:
    row, _ = check("needle", reply)
    assert (row["ok"], row["failure"]) == (False, "verify-needle") and row["detail"].startswith(words)


def test_a_small_context_is_still_read() -> None:
    row, _ = check("needle", reader(served=400))
    assert row["ok"] and row["detail"].endswith("; 400 are served")


@pytest.mark.parametrize(
    ("text", "has"),
    [
        ("12345", True),
        ("it is 12,345.", True),
        ("12.345", True),
        ("112345", False),
        ("12,3451", False),
        ("1,2345", False),
    ],
)
def test_a_number_is_found_as_a_whole(text: str, has: bool) -> None:
    assert deep._has(text, "12345") is has


# -- the other kinds -------------------------------------------------------------------------------------------------


def test_a_picture_is_a_png_with_its_digits() -> None:
    data = deep.png("1074")
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    place, kinds, pixels = 8, [], b""
    while place < len(data):
        size, kind = struct.unpack(">I4s", data[place : place + 8])
        chunk = data[place + 8 : place + 8 + size]
        assert struct.unpack(">I", data[place + 8 + size : place + 12 + size])[0] == zlib.crc32(kind + chunk)
        kinds.append(kind)
        pixels += chunk if kind == b"IDAT" else b""
        place += 12 + size
    assert kinds == [b"IHDR", b"IDAT", b"IEND"]
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    raw = zlib.decompress(pixels)
    assert (depth, colour) == (8, 0) and len(raw) == height * (width + 1)
    rows = [raw[line * (width + 1) : (line + 1) * (width + 1)] for line in range(height)]
    assert all(row[0] == 0 for row in rows)
    dots = ["".join(" #"[row[1 + column] == 0] for column in range(0, width, deep.DOT)) for row in rows[:: deep.DOT]]
    assert [line.rstrip() for line in dots[3:10]] == [
        "     #    ###  #####    #",
        "    ##   #   #     #   ##",
        "     #   #  ##    #   # #",
        "     #   # # #   #   #  #",
        "     #   ##  #  #    #####",
        "     #   #   #  #       #",
        "    ###   ###   #       #",
    ]


def test_a_tool_s_result_goes_back_to_the_engine() -> None:
    def reply(path: str, body: dict[str, Any]) -> Any:
        last = body["messages"][-1]
        if last["role"] == "tool":
            return message(f"{json.loads(last['content'])['celsius']} °C")
        city = re.findall(r"temperature in (\w+)", last["content"])[0]
        function = {"name": "get_temperature", "arguments": json.dumps({"city": f"{city}, its country"})}
        return message(tool_calls=[{"id": "abc", "type": "function", "function": function}])

    row, client = check("tool_call", reply)
    assert row["ok"], row
    (_, first, _), (_, second, _) = client.asked
    assert first["tool_choice"] == "auto" and [item["role"] for item in second["messages"]] == [
        "user",
        "assistant",
        "tool",
    ]
    assert second["messages"][1]["tool_calls"][0]["id"] == second["messages"][2]["tool_call_id"] == "abc"


@pytest.mark.parametrize(
    ("calls", "words"),
    [
        ([], "no tool was called; the answer is "),
        ([5], "a tool call: not an object: 5"),
        (
            [{"id": "a", "function": {"name": "rm", "arguments": "{}"}}],
            "expected a call of get_temperature, got one of rm",
        ),
        ([{"id": "a", "function": {"name": "get_temperature", "arguments": "{"}}], "function.arguments: not JSON"),
        (
            [{"id": "a", "function": {"name": "get_temperature", "arguments": "[]"}}],
            "function.arguments: not an object",
        ),
        ([{"id": "a", "function": {"name": "get_temperature", "arguments": "{}"}}], "expected "),
        (
            [{"id": 5, "function": {"name": "get_temperature", "arguments": "{}"}}],
            "the id of a tool call: not a string",
        ),
        ({"0": 1}, "tool_calls: not an array"),
    ],
)
def test_a_call_that_is_none(calls: Any, words: str) -> None:
    row, _ = check("tool_call", lambda path, body: message("x", tool_calls=calls))
    assert (row["ok"], row["failure"]) == (False, "verify-tool-call") and row["detail"].startswith(words)


def thinking(**more: Any) -> Reply:
    def reply(path: str, body: dict[str, Any]) -> Any:
        assert body["chat_template_kwargs"] == {"enable_thinking": True, "thinking": True}
        assert body["max_tokens"] == 2048
        one, other = re.findall(r"\d+", body["messages"][0]["content"])
        product = str(int(one) * int(other))
        return message(**{key: value.format(product) if value else value for key, value in more.items()})

    return reply


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"content": "{}", "reasoning": "so {}"}, ""),
        ({"content": "It is {}.", "reasoning_content": "so {}"}, ""),
        ({"content": "{}"}, "no reasoning apart from the answer"),
        ({"content": "<think>x</think>{}"}, "thoughts are in the answer (<think>)"),
        ({"content": "x</think>{}", "reasoning": "y"}, "thoughts are in the answer (</think>)"),
        ({"content": "<|channel|>analysis {}", "reasoning": "y"}, "thoughts are in the answer (<|channel|>)"),
        ({"content": None, "reasoning": "{}"}, "no answer, only reasoning"),
        ({"content": None, "reasoning": "x", "finish": "length"}, "no answer within 2,048 tokens, only reasoning"),
        ({"content": "7", "reasoning": "x"}, "expected "),
    ],
)
def test_thoughts_are_apart(more: dict[str, Any], words: str) -> None:
    row, _ = check("reasoning", thinking(**more))
    assert row["ok"] == (not words)
    assert words in row["detail"] and row["failure"] == ("verify-reasoning" if words else "")


def instance(schema: dict[str, Any]) -> Any:
    if "enum" in schema:
        return schema["enum"][-1]
    if schema["type"] == "object":
        return {key: instance(value) for key, value in schema["properties"].items()}
    return [instance(schema["items"])] * schema["minItems"] if schema["type"] == "array" else False


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: found, ""),
        (lambda found: {**found, "more": 1}, "not of the schema, which has "),
        (lambda found: dict([*found.items()][1:]), "not of the schema, which has "),
        (lambda found: dict.fromkeys(found, True), "not of the schema, which has "),
        (dict.fromkeys, "not of the schema, which has "),
        (lambda found: [found], "not of the schema, which has "),
    ],
)
def test_a_schema_is_kept(change: Callable[[Any], Any], words: str) -> None:
    def reply(path: str, body: dict[str, Any]) -> Any:
        return message(json.dumps(change(instance(body["response_format"]["json_schema"]["schema"]))))

    row, _ = check("json_schema", reply)
    assert row["ok"] == (not words) and words in row["detail"]


def test_json_that_is_none() -> None:
    row, _ = check("json_schema", lambda path, body: message("```json\n{", finish="length"))
    assert row["detail"].startswith("the answer is not JSON (cut at max_tokens): ")


def streams(monkeypatch: pytest.MonkeyPatch, answers: list[str]) -> dict[str, Any]:
    """The row of streams at once that are answered so."""
    left = list(answers)

    def read_stream(self: Any, body: Any, name: str, timeout: float | None = None) -> tuple[StreamReader, float]:
        made = StreamReader()
        made.text = left.pop()
        return made, 0.0

    monkeypatch.setattr(asking.Asker, "read_stream", read_stream)
    return check("concurrency", lambda path, body: {})[0]


def test_streams_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    same = ["It is\nParis."] * 8
    assert streams(monkeypatch, ["<think>a</think>It is Paris.", *same[1:]])["ok"]
    row = streams(monkeypatch, ["Paris it is.", *same[1:]])
    assert row["failure"] == "verify-concurrency"
    assert row["detail"] == '7 of 8 streams answer "It is Paris.", others "Paris it is."'
    row = streams(monkeypatch, ["!!!!!!!!!!!!", *same[1:]])
    assert not row["ok"] and "one token over and over" in row["detail"]


# -- models that give numbers ----------------------------------------------------------------------------------------


def vectors(change: Callable[[list[list[float]]], Any] = lambda found: found) -> Reply:
    right = [[1.0, 0, 0.1], [0.9, 0.1, 0], [0, 1.0, 0.1], [0.1, 0.9, 0], [0, 0, 1.0], [0.1, 0, 0.9]]
    made = change(right)
    return lambda path, body: {"data": [{"index": place, "embedding": vector} for place, vector in enumerate(made)]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: found[1:] + found[:1], " is closer to "),
        (lambda found: [[1.0, 2.0]] * 6, " is closer to "),
        (lambda found: [[0.0, 0.0]] * 6, "an embedding is empty, or zero throughout"),
        (lambda found: [[]] * 6, "an embedding is empty, or zero throughout"),
        (lambda found: found[:5], "expected 6 of one size, got 5 of 3"),
        (lambda found: [[1.0], *found[1:]], "expected 6 of one size, got 6 of 1 and 3"),
        (lambda found: [["x"]] * 6, "an embedding: not a number: 'x'"),
        (lambda found: [[1e300]] * 6, "an embedding: 1e+300 is not between"),
        (lambda found: [5] * 6, "embedding: not an array: 5"),
        (lambda found: [[1.0] * 70_000] * 6, "embedding: more than 65536 items"),
    ],
)
def test_embeddings_with_other_neighbours(change: Callable[[list[list[float]]], Any], words: str) -> None:
    made = verify.Verification(PARAMS)
    made.client = Scripted(vectors(change))
    with pytest.raises((CheckError, ValueError)) as caught:
        pooling.embeddings(made)
    assert words in str(caught.value)


def test_embeddings_with_their_neighbours() -> None:
    made = verify.Verification(PARAMS)
    made.client = Scripted(vectors())
    assert pooling.embeddings(made).startswith("3 pairs are neighbours, 3 dimensions, margin 0.")


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ({0: 0.5, 1: 0.1, 2: 0.9}, ""),
        ({0: 0.9, 1: 0.1, 2: 0.5}, "expected falling scores"),
        ({0: 0.5, 1: 0.5, 2: 0.5}, "expected falling scores"),
        ({2: 0.9, 0: 0.5}, "expected falling scores"),
        ({3: 0.9}, "index: 3 is not between 0 and 2"),
        ({0: "high"}, "relevance_score: not a number"),
    ],
)
def test_an_order_of_texts(scores: dict[int, Any], words: str) -> None:
    made = verify.Verification(PARAMS)
    results = [{"index": place, "relevance_score": score} for place, score in scores.items()]
    made.client = Scripted(lambda path, body: {"results": results})
    try:
        said = pooling.rerank(made)
    except ValueError as error:
        said = str(error)
    except CheckError as error:
        said = str(error)
    assert said.startswith(words or "3 documents in the right order: 0.900, 0.500, 0.100")


# -- whatever an engine sends ----------------------------------------------------------------------------------------

SENT = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    *(
                        "choices",
                        "message",
                        "content",
                        "reasoning",
                        "tool_calls",
                        "function",
                        "name",
                        "arguments",
                        "id",
                    ),
                    *("usage", "prompt_tokens", "data", "index", "embedding", "results", "relevance_score"),
                    *("max_model_len", "finish_reason"),
                ]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([kind for kind in deep.PROBES if kind != "concurrency"]), SENT, SENT)
def test_any_json_is_a_checked_row(kind: str, models: Any, sent: Any) -> None:
    served = {"data": [{"id": "m", "max_model_len": models if isinstance(models, int) else 4096}]}
    row, _ = check(kind, lambda path, body: served if path == "/v1/models" else sent)
    assert row["ok"] is False and row["failure"] == deep.failure(kind) and row["failure"] in BY_ID and row["detail"]


@settings(max_examples=30, deadline=None)
@given(SENT)
def test_any_json_is_a_checked_number(sent: Any) -> None:
    made = verify.Verification(PARAMS)
    made.client = Scripted(lambda path, body: sent)
    for ask in (pooling.embeddings, pooling.rerank):
        row = made._timed(lambda ask=ask: ask(made))  # type: ignore[misc]
        assert row["ok"] is False and row["failure"] in BY_ID


@pytest.mark.parametrize("kind", deep.PROBES)
@pytest.mark.parametrize("raw", [b"", b"\xff", b"[" * 100_000, b'{"choices": 1e999}', b"x" * 1000])
def test_any_bytes_are_a_checked_row(monkeypatch: pytest.MonkeyPatch, kind: str, raw: bytes) -> None:
    def read_stream(self: Any, body: Any, name: str, timeout: float | None = None) -> tuple[StreamReader, float]:
        self.post(asking.CHAT, body, name)
        raise AssertionError

    monkeypatch.setattr(asking.Asker, "read_stream", read_stream)
    row, _ = check(kind, lambda path, body: raw)
    assert row["ok"] is False and row["failure"] == deep.failure(kind) and len(row["detail"]) < 1000


def test_what_an_engine_says_is_shown_without_escapes() -> None:
    row, _ = check("json_schema", lambda path, body: message("\x1b[31m" * 100))
    assert "\x1b" not in row["detail"] and len(row["detail"]) < 300


# -- time, and an engine that goes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "failure"),
    [("refused", "endpoint-down"), ("timeout", "verify-json-schema"), ("broken", "verify-json-schema")],
)
def test_an_engine_that_goes_while_it_is_asked(kind: str, failure: str) -> None:
    row, _ = check("json_schema", lambda path, body: HttpError(kind, "gone"))
    assert (row["ok"], row["failure"], row["detail"]) == (False, failure, "gone")


def test_without_time_nothing_is_asked() -> None:
    row, client = check("json_schema", lambda path, body: message("{}"), budget=0.0)
    assert (row["ok"], row["failure"], client.asked) == (False, "verify-budget", [])
    with pytest.raises(CheckError, match="no time is left"):
        deep.ask(verify.Verification(PARAMS), "needle", Budget(1.0))


def test_a_kind_that_the_time_does_not_suffice_for_is_not_called_wrong() -> None:
    row, _ = check("needle", reader_that_is_late, budget=2.5)
    assert (row["ok"], row["failure"], row["detail"]) == (False, "verify-budget", "no answer within 1 s")


def reader_that_is_late(path: str, body: dict[str, Any]) -> Any:
    if not body:
        return {"data": [{"id": "m", "max_model_len": 4096}]}
    time.sleep(0.6)
    return HttpError("timeout", "no answer within 1 s")


def test_each_kind_has_a_limit_of_its_own() -> None:
    _, client = check("json_schema", lambda path, body: message("{}"), budget=5000.0)
    assert client.asked[0][2] == pytest.approx(120.0, abs=1)
    _, client = check("json_schema", lambda path, body: message("{}"), budget=50.0)
    assert client.asked[0][2] == pytest.approx(50.0, abs=1)


# -- what is asked in which order ------------------------------------------------------------------------------------


def test_the_quick_set_comes_first_and_at_once() -> None:
    kinds = sorted(verify.KINDS)
    assert verify.steps(kinds) == [["chat", "completion", "stream", "embeddings", "rerank", "classify"]]
    first, *others = verify.steps(kinds, verify.DEEP)
    assert first == verify.steps(kinds)[0] and others == [[kind] for kind in deep.PROBES]
    assert others[-1] == ["needle"]  # which takes what is left


def test_a_model_without_kinds_chats() -> None:
    assert verify.steps([]) == verify.steps(["needle", "of a later version"]) == [["chat", "completion", "stream"]]
    assert verify.steps(["embeddings"], verify.DEEP) == [["embeddings"]]


def test_each_kind_has_an_entry_in_the_table_of_failures() -> None:
    for kind in (*deep.PROBES, "embeddings", "rerank", "classify"):
        assert BY_ID[deep.failure(kind)].remedy
    assert BY_ID[deep.SPENT].remedy


def row(name: str, ok: bool = True, failure: str = "") -> dict[str, Any]:
    checks = [{"name": name, "ok": ok, "failure": failure}]
    result = {"verified": ok, "checks": checks, "usage": {"prompt_tokens": 1}, "seconds": 0.5, "answer": name}
    return result if ok else {**result, "msg": f"{name}: no", "failure": failure}


def test_results_are_joined() -> None:
    both = verify.joined(row("chat"), row("needle", False, "verify-needle"))
    assert both["verified"] is False and both["failure"] == "verify-needle" and both["answer"] == "chat"
    assert both["usage"] == {"prompt_tokens": 2} and both["seconds"] == 1.0 and len(both["checks"]) == 2
    again = verify.joined(both, row("image", False, "verify-image"))
    assert (again["msg"], again["failure"]) == ("needle: no", "verify-needle")  # the first one
    assert verify.joined(row("chat"), row("needle"))["verified"] is True


@pytest.mark.parametrize(
    ("name", "failure", "over"),
    [
        ("needle", "verify-needle", False),
        ("needle", "endpoint-down", True),
        ("needle", "verify-budget", True),
        ("chat", "answer-wrong", True),
        ("embeddings", "verify-embeddings", True),
    ],
)
def test_when_no_more_is_asked(name: str, failure: str, over: bool) -> None:
    assert verify.is_over(row(name, False, failure)) is over
    assert verify.is_over(row(name)) is False


def test_a_verification_that_goes_on_keeps_its_seed() -> None:
    first = verify.Verification(PARAMS)
    then = verify.Verification({**PARAMS, "verify_id": first.verify_id})
    assert (then.verify_id, then.seed) == (first.verify_id, first.seed)
