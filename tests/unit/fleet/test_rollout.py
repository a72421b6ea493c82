"""The schedule of a rollout."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from sparkfleet import SparkfleetError
from sparkfleet.fleet.rollout import agreed, canaries, labels, lines, number, schedule, shared, unfinished
from sparkfleet.reporting.report import names


def fleet(count: int, model: str = "m", first: int = 1, needed: bool = True) -> list[dict[str, Any]]:
    return [{"name": f"s{number}", "models": [model], "needed": needed} for number in range(first, first + count)]


def sizes(hosts: list[dict[str, Any]], canary: int, waves: Any) -> list[int]:
    made = schedule(hosts, canary, waves)
    flat = [name for wave in made for name in wave]
    assert sorted(flat) == sorted(host["name"] for host in hosts if host["needed"])
    return [len(wave) for wave in made]


@pytest.mark.parametrize(
    ("count", "canary", "waves", "expected"),
    [
        (8, 1, "25%", [1, 2, 2, 2, 1]),
        (8, 1, 3, [1, 3, 3, 1]),
        (8, 2, "100%", [2, 6]),
        (8, 0, 4, [4, 4]),
        (8, 1, [1, 2, "50%"], [1, 1, 2, 4]),
        (8, 1, ["2", "4"], [1, 2, 4, 1]),
        (2, 1, "25%", [1, 1]),
        (1, 1, "25%", [1]),
        (0, 1, "25%", []),
        (200, 1, "10%", [1, *[20] * 9, 19]),
        (10, 0, "25%", [2] * 5),  # a share is rounded down: 2.5 Sparks would be three that may fail at once
        (3, 0, "10%", [1, 1, 1]),
        (3, 5, "100%", [3]),
        (4, 0, " 2 ", [2, 2]),
    ],
)
def test_sizes(count: int, canary: int, waves: Any, expected: list[int]) -> None:
    assert sizes(fleet(count), canary, waves) == expected


def test_each_model_has_its_canary() -> None:
    hosts = fleet(3, "a") + fleet(3, "b", first=4)
    assert schedule(hosts, 1, 2) == [["s1"], ["s4"], ["s2", "s3"], ["s5", "s6"]]


def test_what_has_it_is_left_out_so_that_a_rollout_resumes() -> None:
    hosts = fleet(2, needed=False) + fleet(2, first=3)
    assert schedule(hosts, 1, 2) == [["s3"], ["s4"]]
    assert lines(schedule(hosts, 1, 2), hosts, ["s9"]) == [
        "rollout  wave 1 of 2: s3 (m)",
        "rollout  wave 2 of 2: s4 (m)",
        "rollout  up to date: s1, s2",
        "rollout  drained, skipped: s9",
    ]
    assert lines([], [], []) == ["rollout  nothing to do"]


def test_what_waves_are_called() -> None:
    hosts = [*fleet(2, "a"), *fleet(2, "b", first=3), *fleet(1, "c", first=5, needed=False)]
    waves = schedule(hosts, 1, 1)
    assert labels(waves, hosts, 1) == ["canary", "canary", "3/4", "4/4"]
    assert labels(schedule(hosts, 0, 2), hosts, 0) == ["1/2", "2/2"]


def test_names_of_many_are_shortened() -> None:
    eight = [f"s{number}" for number in range(1, 9)]
    assert names(eight) == ", ".join(eight)
    assert names([*eight, "s9"]) == "s1, s2, s3 … s9 (9 Sparks)"


def test_a_setting_of_the_rollout_has_its_default() -> None:
    assert shared({"s1": {}}) == {
        "sparkfleet_rollout_canary": 1,
        "sparkfleet_rollout_waves": "25%",
        "sparkfleet_rollout_on_failure": "stop",
    }


@pytest.mark.parametrize(
    "waves", ["0", 0, "101%", "0%", "1000000", 1_000_000, -1, "half", "120%", "", None, True, 2.5, [], [1, "x"]]
)
def test_a_size_that_is_none_is_named(waves: Any) -> None:
    with pytest.raises(SparkfleetError, match="sparkfleet_rollout_waves"):
        schedule(fleet(4), 1, waves)


@pytest.mark.parametrize("value", [-1, "one", True, None, 1.5, "9" * 5000])
def test_a_number_of_canaries_that_is_none(value: Any) -> None:
    with pytest.raises(SparkfleetError, match="sparkfleet_rollout_canary is"):
        canaries(value)
    assert canaries("2") == 2 and canaries(0) == 0


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (True, "True"),
        (-1, "-1"),
        (1_000_000, "a number of many digits"),
        (10**5000, "a number of many digits"),  # Python would not even print it
        (-(10**5000), "a number of many digits"),
        (1.5, "1.5"),
        ("x" * 70, "'" + "x" * 55),
    ],
    ids=itertools.count(),
)
def test_a_value_that_is_wrong_is_shown_and_never_at_length(value: Any, shown: str) -> None:
    for ask in (lambda: canaries(value), lambda: schedule(fleet(1), 0, value)):
        with pytest.raises(SparkfleetError) as refused:
            ask()
        assert shown in str(refused.value) and "x" * 61 not in str(refused.value)


def test_the_largest_numbers() -> None:
    assert canaries(999_999) == canaries("999999") == 999_999


def test_a_wave_begins_when_all_before_it_came_to_their_end() -> None:
    waves = [["s1"], ["s2", "s3"], ["s4", "s5"]]
    assert [number(waves, batch) for batch in (["s1"], ["s3"], ["s4", "s5"])] == [1, 2, 3]
    assert unfinished(waves, 1, set()) == []
    assert unfinished(waves, 3, {"s1", "s3"}) == ["s2"]
    assert unfinished(waves, 3, {"s1", "s2", "s3"}) == [] and unfinished(waves, 2, {"s3"}) == ["s1"]
    with pytest.raises(SparkfleetError, match="s9: in no wave"):
        number(waves, ["s9"])


def test_a_policy_is_one_of_two() -> None:
    key = "sparkfleet_rollout_on_failure"
    assert shared({"s1": {}})[key] == "stop"
    with pytest.raises(SparkfleetError, match=f"{key}: 'go' is neither stop nor continue"):
        shared({"s1": {key: "go"}})


@pytest.mark.parametrize(("count", "share", "size"), [(7, "50%", 3), (7, "25%", 1), (10, "25%", 2), (3, "33%", 1)])
def test_a_share_is_rounded_down(count: int, share: str, size: int) -> None:
    """To the smaller risk."""
    assert len(schedule(fleet(count), 0, share)[0]) == size


def test_the_ends_of_a_size() -> None:
    assert schedule(fleet(2), 0, "1%") == [["s1"], ["s2"]] and len(schedule(fleet(2), 0, 999_999)) == 1
    assert schedule(fleet(1), 0, "100%") == [["s1"]]


def test_a_rollout_has_one_policy() -> None:
    key = "sparkfleet_rollout_waves"
    assert agreed(key, "25%", {"s1": {key: 2}, "s2": {key: 2}}) == 2
    assert agreed(key, "25%", {}) == "25%"
    with pytest.raises(SparkfleetError, match="is 2 for s1 and '25%' for s2"):
        agreed(key, "25%", {"s1": {key: 2}, "s2": {}})
