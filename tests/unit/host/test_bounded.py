"""Data from outside is read within limits, and fails as one typed error."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sparkfleet_host.bounded import (
    HOST,
    SET_ASIDE,
    BoundsError,
    as_int,
    as_number,
    in_time,
    is_relative_path,
    limited_lines,
    parse_json,
    printable,
    read_all,
    read_file,
    read_json,
    set_aside,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=5), children, max_size=4),
    max_leaves=20,
)  # fmt: skip


@given(JSON)
def test_json_comes_back_as_it_was(value: Any) -> None:
    assert parse_json(json.dumps(value).encode(), "it") == value


@given(st.binary(max_size=200) | st.text(alphabet='[]{}",:0123456789.eE-NaInfty\\u', max_size=200))
def test_anything_is_json_or_one_error(data: bytes | str) -> None:
    try:
        parse_json(data, "it")
    except BoundsError as error:
        assert "it" in str(error)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("NaN", "not a JSON number"),
        ("[-Infinity]", "not a JSON number"),
        ("1e400", "out of range"),
        ("1" * 5000, "out of range"),
        ("[" * 200_000, "nested more than"),
        ("[" * 70 + "]" * 70, "nested more than 64 deep"),
        ('{"a":' * 70 + "1" + "}" * 70, "nested more than 64 deep"),
        ("{", "not JSON"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_what_is_out_of_bounds_is_named(text: str | bytes, why: str) -> None:
    with pytest.raises(BoundsError, match=why):
        parse_json(text, "it")


def test_what_is_too_large_is_not_parsed() -> None:
    with pytest.raises(BoundsError, match="more than 10 bytes"):
        parse_json("[1,2,3,4,5,6]", "it", limit=10)


@pytest.mark.parametrize("value", [True, "5", 5.0, None, [5], 11, -1])
def test_whole_numbers(value: Any) -> None:
    assert as_int(5, "it", 0, 10) == 5
    with pytest.raises(BoundsError):
        as_int(value, "it", 0, 10)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "5", -0.1])
def test_numbers(value: Any) -> None:
    assert as_number(5, "it") == 5.0
    with pytest.raises(BoundsError):
        as_number(value, "it")


def test_what_cannot_be_shown_is_one_error_all_the_same() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    for value in (10**5000, [10**5000], deep):
        for check in (as_int, as_number):
            with pytest.raises(BoundsError, match=r"x: .*\((int|list)\)"):
                check(value, "x")
    while deep:
        deep = deep.pop()


def test_a_file_is_read_up_to_its_limit_and_no_link_is_followed(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_bytes(b'{"a": 1}')
    link.symlink_to(file)
    assert read_json(file) == read_json(link) == {"a": 1}
    with pytest.raises(OSError, match="symbolic"):
        read_file(link, follow=False)
    with pytest.raises(BoundsError, match="more than 5 bytes"):
        read_file(file, 5)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(BoundsError, match="not a regular file"):
        read_file(tmp_path / "fifo")


def test_a_stream_is_read_up_to_its_limit_and_deadline() -> None:
    parts = iter([b"abc", b"de", b""])
    assert read_all(lambda size: next(parts), "it", 5) == b"abcde"
    asked: list[int] = []

    def endless(size: int) -> bytes:
        asked.append(size)
        return b"x" * size

    with pytest.raises(BoundsError, match="more than 100000 bytes"):
        read_all(endless, "it", 100_000)
    assert sum(asked) == 100_001
    with pytest.raises(TimeoutError):
        read_all(endless, "it", 100_000, deadline=0.0)


def test_what_lasts_too_long_is_left_alone() -> None:
    assert in_time(lambda: None, 5) is None
    with pytest.raises(KeyError, match="mine"):
        in_time(lambda: {}["mine"], 5)
    over, others = threading.Event(), set(threading.enumerate())
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.1 s"):
        in_time(over.wait, 0.1)
    assert time.monotonic() - began < 2
    assert [thread.daemon for thread in threading.enumerate() if thread not in others] == [True]
    over.set()


def test_long_lines_are_cut_and_long_streams_refused() -> None:
    lines = limited_lines([b"ab\ncd", b"e\n" + b"x" * 50, b"yyy\nz"], "it", 10, 1000)
    assert list(lines) == [b"ab\n", b"cde\n", b"x" * 10 + b"\n", b"z"]
    with pytest.raises(BoundsError):
        list(limited_lines([b"x" * 600, b"y" * 600], "it", 10, 1000))


@pytest.mark.parametrize(
    "name", ["a", "a/b.c", "model-00001-of-00002.safetensors", "packages/docker-ce_29.2.1-1~x+b1_arm64.deb"]
)
def test_paths_that_stay(name: str) -> None:
    assert is_relative_path(name)


@pytest.mark.parametrize(
    "name",
    ["", "/a", "a/", "a//b", "..", "a/../b", ".ssh/x", "a/.b", "a\nb", "a\x00", "a\\b", "a" * 300, 5, None, "a\n"],
)
def test_paths_that_do_not(name: Any) -> None:
    assert not is_relative_path(name)


@given(st.text(max_size=60))
def test_a_relative_path_never_leaves_its_folder(name: str) -> None:
    if is_relative_path(name):
        assert Path("/root/base", name).resolve().is_relative_to("/root/base")


def test_host_names() -> None:
    assert HOST.fullmatch("spark-1.local") and HOST.fullmatch("10.0.0.1")
    assert not any(HOST.fullmatch(name) for name in ("", "a b", "{{x}}", "-a", "a..b", "a\n", "a;b", "x" * 300))


@given(st.text())
def test_nothing_printed_moves_a_cursor(text: str) -> None:
    assert all(ord(letter) >= 32 and not 127 <= ord(letter) < 160 for letter in printable(text))


def test_a_damaged_file_is_kept_beside(tmp_path: Path) -> None:
    for now in range(5):
        (tmp_path / "state.json").write_text(str(now))
        kept = set_aside(tmp_path / "state.json", 1000 + now)
        assert kept is not None and kept.read_text() == str(now)
    assert len(list(tmp_path.iterdir())) == SET_ASIDE
    assert set_aside(tmp_path / "none") is None
