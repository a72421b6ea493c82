"""The status of hosts that answer anything."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkfleet.reporting import status_page

ESCAPE = "\x1b]0;pwned\x07\x1b[2J"
ENGINE: dict[str, Any] = {
    **{"service": "vllm-m", "model": "m", "profile": "throughput", "repo": "o/m", "image": "i:1", "port": 8000},
    **{"state": "serving", "healthy": True, "figures": {"num_requests_running": 1.0}, "tokens_per_second": 2.0},
    "guard": {"restarts_total": {"crash": 1}, "given_up": None, "tokens_per_second": 3.0, "slow": False},
}
FOUND: dict[str, Any] = {
    **{"engine": "serving", "healthy": True, "gpu": {"temperature": 41.0}, "engines": [ENGINE]},
    "releases": {
        **{"current": 2, "previous": 1, "damaged": {}, "unreadable": [], "switch_active": False},
        "switch": {
            "from": 1,
            "to": 2,
            "began": 1.0,
            "phase": "done",
            "outcome": "verified",
            "controller": "c",
            "verb": "v",
        },
    },
}
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just(ESCAPE),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=6,
)


def page(found: dict[str, Any]) -> str:
    row = status_page.summary("spark-1", found)
    return status_page.page([row])


def test_what_a_host_answers_is_a_row() -> None:
    assert "serving" in page(FOUND) and "1 Spark: 1 serving; 1 running" in page(FOUND)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("engine",), ESCAPE * 100_000),
        (("engines",), None),
        (("engines",), [ENGINE] * 20_000),
        (("gpu", "temperature"), "x"),
        (("gpu", "temperature"), 10**390),
        (("releases", "damaged"), [1]),
        (("releases", "switch", "began"), 1e300),
        (("engines", 0, "figures", "num_requests_running"), "1"),
        (("engines", 0, "guard", "tokens_per_second"), ESCAPE),
    ],
)
def test_a_hostile_answer_is_a_row_all_the_same(place: tuple[str | int, ...], value: Any) -> None:
    found: Any = copy.deepcopy(FOUND)
    at = found
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    shown = page(found)
    assert "\x1b" not in shown and len(shown) < 20_000


@given(st.sampled_from([*FOUND, *ENGINE, *FOUND["releases"]]), ANYTHING)
def test_no_answer_ends_in_a_traceback(key: str, value: Any) -> None:
    found: Any = copy.deepcopy(FOUND)
    (found if key in found else found["releases"] if key in found["releases"] else found["engines"][0])[key] = value
    assert "\x1b" not in page(found)


def test_plan_against_measured() -> None:
    record = {"service": "vllm-m", "repo": "org/m", "image": "i", "at": 5.0, "ready_s": 80.0}
    record |= {"figures": {"kv_cache_gib": 95.1}, "planned": {"kv_cache_gib": 95.4}}
    found = copy.deepcopy(FOUND)
    found["engines"][0]["measured"] = record
    row = status_page.summary("spark-1", found)
    assert row["engines"][0]["measured"]["figures"] == {"kv_cache_gib": 95.1}
    words = "spark-1: measured: KV cache 95.1 GiB (planned 95.4), ready after 80 s"
    assert words in status_page.table([row]).splitlines()
    assert "measured" not in status_page.table([row, {**row, "host": "spark-2"}])  # of many it is in the JSON
    found["engines"][0]["measured"] = {**record, "figures": {"kv_cache_gib": "\x1b[2J"}}
    assert status_page.summary("spark-1", found)["engines"][0]["measured"] is None
