"""fleet.json: what runs tell the status page, one after the other."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from sparkfleet_host import fleet_file


def news(*names: str, **sparks: dict[str, Any]) -> dict[str, Any]:
    return {"inventory": list(names), "sparks": sparks, "gateways": ["g1"], "monitor": "g1"}


def rollout(wave: int, done: list[str], ended: bool = False, failed: tuple[str, ...] = ()) -> dict[str, Any]:
    waves = {"waves": [["s1"], ["s2"]], "labels": ["canary", "2/2"], "by": "anna@ops"}
    return {**waves, "wave": wave, "done": done, "failed": list(failed), "ended": ended}


def test_a_run_says_what_it_knows_and_keeps_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "fleet.json"
    fleet_file.write(path, news("s1", "s2", s1={"release": 1}, s2={"release": 5}), 100.0)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    fleet_file.write(path, news("s1", "s2", "s3", s1={"release": 2}), 200.0)
    found = json.loads(path.read_text())
    assert found["sparks"] == {"s1": {"release": 2}, "s2": {"release": 5}, "s3": {}} and found["written"] == 200.0
    # A Spark that has left the inventory is gone.
    fleet_file.write(path, news("s2"), 300.0)
    assert fleet_file.read(path)["sparks"] == {"s2": {"release": 5}}


def test_nothing_is_written_while_nothing_happens(tmp_path: Path) -> None:
    path = tmp_path / "fleet.json"
    told = news("s1", s1={"release": 1})
    old, new = fleet_file.write(path, told, 100.0)
    assert (old, new["written"]) == ({}, 100.0)
    before = path.stat().st_mtime_ns
    old, new = fleet_file.write(path, told, 200.0)
    assert old == new and path.stat().st_mtime_ns == before


def test_check_mode_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "fleet.json"
    old, new = fleet_file.write(path, news("s1"), 100.0, check=True)
    assert old != new and not path.exists()


def test_a_rollout_keeps_its_beginning_until_it_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "fleet.json"

    def told(at: float, found: dict[str, Any]) -> dict[str, Any]:
        made = fleet_file.write(path, {**news("s1", "s2"), "rollout": found}, at)[1]["rollout"]
        return dict(made)

    assert told(100.0, rollout(1, []))["began"] == 100.0
    now = told(160.0, rollout(2, ["s1"]))
    assert (now["began"], now["changed"], now["wave"]) == (100.0, 160.0, 2)
    assert told(170.0, rollout(2, ["s1"]))["changed"] == 160.0
    over = told(200.0, rollout(2, ["s1", "s2"], True))
    assert (over["began"], over["changed"]) == (100.0, 200.0)
    # An ordinary run leaves it; the next rollout of the same waves is another one.
    fleet_file.write(path, news("s1", "s2"), 300.0)
    assert fleet_file.read(path)["rollout"] == over
    assert told(400.0, rollout(1, []))["began"] == 400.0


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 2, "sparks": {"s1": {"release": 9}}}', '{"format": 1, "sparks": 3}']
)
def test_a_file_that_cannot_be_read_is_made_again(tmp_path: Path, text: str) -> None:
    path = tmp_path / "fleet.json"
    path.write_text(text)
    fleet_file.write(path, news("s1", "s2", s1={"release": 1}), 100.0)
    assert fleet_file.read(path)["sparks"] == {"s1": {"release": 1}, "s2": {}}


def test_a_link_in_its_place_is_replaced_not_followed(tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"format": 1, "sparks": {"s1": {"release": 9}}}))
    path = tmp_path / "page" / "fleet.json"
    path.parent.mkdir()
    path.symlink_to(other)
    fleet_file.write(path, news("s1"), 100.0)
    assert not path.is_symlink() and json.loads(other.read_text())["sparks"] == {"s1": {"release": 9}}
    assert fleet_file.read(path)["sparks"] == {"s1": {}}
