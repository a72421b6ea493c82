"""The loads of a benchmark: which an engine takes, and what is wrong with what was asked for."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkfleet import SparkfleetError
from sparkfleet.performance import loads

ENGINE = {"max_num_seqs": 64, "max_model_len": 32768, "kv_tokens": 1_000_000}


def streams(asked: dict[str, Any], **engine: Any) -> list[int]:
    planned, _ = loads.planned(loads.Asked.of({"repetitions": 1, **asked}), {**ENGINE, **engine})
    return [load.streams for _, _, load in planned]


def test_as_many_streams_as_the_engine_takes() -> None:
    assert streams({}) == [1, 4, 16, 32, 64]
    assert streams({}, max_num_seqs=None) == [1, 4, 16, 32, 64, 128]  # which the KV cache holds
    assert streams({}, max_num_seqs=None, kv_tokens=None) == [1, 4, 16, 32, 64, 128, 256]
    assert streams({}, kv_tokens=4096 * 5) == [1, 4]
    assert streams({}, kv_tokens=100) == [1]
    assert streams({"streams": [32, 8, 8]}) == [8, 32]
    assert streams({"shapes": ["nvidia"]}) == [1]
    assert streams({"shapes": ["chat", "64:8"], "streams": "2"}) == [2, 2]


def test_what_is_left_out_is_said() -> None:
    planned, notes = loads.planned(
        loads.Asked.of({"shapes": ["chat", "long"], "repetitions": 1}), ENGINE | {"max_model_len": 8192}
    )
    assert {shape.name for shape, _, _ in planned} == {"chat"}
    assert notes == ["long is left out: 32768 tokens, the engine takes 8192"]
    _, notes = loads.planned(loads.Asked.of({"streams": [128]}), ENGINE)
    assert notes == ["chat: of 128 streams 64 run at a time (max_num_seqs)"]
    _, notes = loads.planned(loads.Asked.of({}), ENGINE | {"kv_tokens": 4096 * 5})
    assert notes == ["chat: up to 5 streams, which the KV cache holds"]
    with pytest.raises(SparkfleetError, match="nothing to measure: chat is left out"):
        loads.planned(loads.Asked.of({}), ENGINE | {"max_model_len": 2048})


def test_repetitions_go_through_all_loads_in_turn() -> None:
    planned, _ = loads.planned(loads.Asked.of({"streams": [1, 4], "repetitions": 3}), ENGINE)
    assert [(repetition, load.streams) for _, repetition, load in planned] == [
        *((1, 1), (1, 4), (2, 1), (2, 4), (3, 1), (3, 4))
    ]
    # The prefix cache would answer what was asked before.
    assert len({load.seed for _, _, load in planned}) == 6
    again, _ = loads.planned(loads.Asked.of({"streams": [1, 4], "repetitions": 3}), ENGINE)
    assert again == planned


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (
            {"shapes": ["chatty"]},
            "shape 'chatty': one of chat, long, nvidia, or tokens of prompt and answer as 1024:128",
        ),
        ({"shapes": ["0:5"]}, "shape 0:5: 0 is not an integer from 1"),
        ({"shapes": ["chat"] * 9}, "9 of them: at most 8"),
        ({"streams": [0.5]}, "streams: 0.5 is not an integer from 1 to 1024"),
        ({"streams": [True]}, "streams: True is not"),
        ({"rounds": 101}, "rounds: 101"),
        ({"repetitions": "many"}, "repetitions: many"),
        ({"seconds": 9}, "seconds: 9"),
        ({"stream": 1}, "loads: stream: unknown"),
        (
            {"shapes": ["1:1", "1:2", "1:3"], "repetitions": 20, "streams": [1, 2, 3, 4, 5]},
            "15 loads 20 times are more",
        ),
    ],
)
def test_what_cannot_be_asked_for(asked: dict[str, Any], why: str) -> None:
    with pytest.raises(SparkfleetError, match=why):
        loads.planned(loads.Asked.of(asked), ENGINE)


@given(st.dictionaries(st.text(max_size=12), st.one_of(st.none(), st.integers(), st.text(), st.lists(st.integers()))))
def test_anything_is_understood_or_refused(given: dict[str, Any]) -> None:
    try:
        loads.planned(loads.Asked.of(given), ENGINE)
    except SparkfleetError:
        return
