"""The log of what happened: where it is, and what is not in it."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from sparkfleet import SparkfleetError, eventlog


def lines(path: Path | None) -> list[dict[str, object]]:
    assert path
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_verb_that_changes_something_keeps_one(tmp_path: Path) -> None:
    with eventlog.keep(tmp_path, "rollout", False, [], inventory="mine", limit=None) as log:
        log({"event": "play", "play": "Plan"})
    first, second = lines(log.path)
    assert first["event"] == "begin" and first["verb"] == "rollout" and first["inventory"] == "mine"
    assert second["play"] == "Plan" and isinstance(second["at"], float)
    assert log.path and log.path.name.endswith("Z-rollout.jsonl")
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o600


@pytest.mark.parametrize(("verb", "check"), [("status", False), ("drift", False), ("rollout", True)])
def test_one_that_changes_nothing_does_not(tmp_path: Path, verb: str, check: bool) -> None:
    with eventlog.keep(tmp_path, verb, check, []) as log:
        log({"event": "play"})
    assert log.path is None and not list(tmp_path.iterdir())


def test_two_that_begin_in_the_same_second(tmp_path: Path) -> None:
    paths = set()
    for _ in range(3):
        with eventlog.keep(tmp_path, "stop", False, []) as log:
            paths.add(log.path)
    assert len(paths) == 3


def test_no_secret_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "unusual-token")
    extra = ["sparkfleet_hf_token=given-here port=8001", '{"gateway_password": "correct horse"}', "@vault.yml"]
    with eventlog.keep(tmp_path, "deploy", False, extra) as log:
        log({"text": "unusual-token given-here", "hosts": [{"message": "correct horse, hf_abcdefghij"}]})
        log({"text": "Authorization: Bearer abcdefgh1234 at https://me:hidden@proxy:3128"})
    assert log.path
    text = log.path.read_text(encoding="utf-8")
    for secret in ("unusual-token", "given-here", "correct horse", "hf_abcdefghij", "abcdefgh1234", "hidden", "8001"):
        assert secret not in text
    assert lines(log.path)[0]["variables"] == ["@vault.yml", "gateway_password", "port", "sparkfleet_hf_token"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / ".sparkfleet").write_text("a file")
    with pytest.raises(SparkfleetError, match="make it writable"), eventlog.keep(tmp_path, "deploy", False, []):
        pass
