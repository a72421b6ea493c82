"""The log of what happened: where it is, and what is not in it."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkfleet import SparkfleetError
from sparkfleet.reporting import event_log


def lines(path: Path | None) -> list[dict[str, object]]:
    assert path
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_verb_that_changes_something_keeps_one(tmp_path: Path) -> None:
    with event_log.keep(tmp_path, "rollout", False, [], inventory="mine", limit=None) as log:
        log({"event": "play", "play": "Plan"})
    first, second = lines(log.path)
    assert first["event"] == "begin" and first["verb"] == "rollout" and first["inventory"] == "mine"
    assert second["play"] == "Plan" and isinstance(second["at"], float)
    assert log.path and log.path.name.endswith("Z-rollout.jsonl")
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o600


def test_its_last_line_has_names_and_results_alone(tmp_path: Path) -> None:
    with event_log.keep(tmp_path, "rollout", False, []) as log:
        log.end(6, 12.345, {f"spark-{number}": "changed" for number in range(400)}, runs=3)
    end = lines(log.path)[-1]
    assert (end["event"], end["exit_code"], end["seconds"], end["runs"]) == ("end", 6, 12.3, 3)
    assert isinstance(end["hosts"], list) and end["hosts"][399] == {"name": "spark-399", "result": "changed"}
    assert len(json.dumps(end)) < 32_000


@pytest.mark.parametrize(("verb", "check"), [("status", False), ("drift", False), ("rollout", True)])
def test_one_that_changes_nothing_does_not(tmp_path: Path, verb: str, check: bool) -> None:
    with event_log.keep(tmp_path, verb, check, []) as log:
        log({"event": "play"})
    assert log.path is None and not list(tmp_path.iterdir())


def test_two_that_begin_in_the_same_second(tmp_path: Path) -> None:
    paths = set()
    for _ in range(3):
        with event_log.keep(tmp_path, "stop", False, []) as log:
            paths.add(log.path)
    assert len(paths) == 3


def test_no_secret_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "unusual-token")
    extra = ["sparkfleet_hf_token=given-here port=8001", '{"gateway_password": "correct horse"}', "@vault.yml"]
    with event_log.keep(tmp_path, "deploy", False, extra) as log:
        log({"text": "unusual-token given-here", "hosts": [{"message": "correct horse, hf_abcdefghij"}]})
        log({"text": "Authorization: Bearer abcdefgh1234 at https://me:hidden@proxy:3128"})
    assert log.path
    text = log.path.read_text(encoding="utf-8")
    for secret in ("unusual-token", "given-here", "correct horse", "hf_abcdefghij", "abcdefgh1234", "hidden", "8001"):
        assert secret not in text
    assert lines(log.path)[0]["variables"] == ["@vault.yml", "gateway_password", "port", "sparkfleet_hf_token"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "events").write_text("a file")
    with pytest.raises(SparkfleetError, match="make it writable"), event_log.keep(tmp_path, "deploy", False, []):
        pass


@pytest.mark.parametrize("point", ["write", "make", "close"])
def test_a_full_disk_does_not_end_a_run(point: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log ends, the run continues, and that is reported."""
    full = OSError(errno.ENOSPC, "No space left on device")

    def fails(*_: object, **__: object) -> int:
        raise full

    if point == "make":
        monkeypatch.setattr(os, "open", fails)
    with event_log.keep(tmp_path, "rollout", False, []) as log:
        if point != "make":
            real = Path("/dev/full").open("w", encoding="utf-8")  # noqa: SIM115  closed by the log
            log.file, before = real, log.file
            assert before
            before.close()
        if point == "write":
            log({"event": "play"})
            log({"event": "play"})
        elif point == "close":
            assert log.file
            log.file.write("x")
    assert ("No space left on device" in log.problem) == (point != "close")


@pytest.mark.parametrize(
    "given",
    [
        '{"sparkfleet_gateway_keys": ["correct horse", "battery"]}',
        "{sparkfleet_gateway_keys: [correct horse, battery]}",
        '{"a": {"passwords": {"of_me": "correct horse", "of_you": ["battery"]}}}',
        'sparkfleet_gateway_keys=\'["correct horse","battery"]\'',
        "port=1 api_token='correct horse' other_key=battery",
    ],
)
def test_secrets_at_any_depth(given: str, tmp_path: Path) -> None:
    with event_log.keep(tmp_path, "deploy", False, [given]) as log:
        log({"text": "said: correct horse, battery", "list": [{"x": "battery"}]})
    assert log.path
    text = log.path.read_text(encoding="utf-8")
    assert "horse" not in text and "battery" not in text


@pytest.mark.parametrize(
    "url", ["http://me:p@ss@proxy:3128/x", "socks5://me:a@b@c@proxy", "https://me:correct@proxy and ftp://u:p@ss@h"]
)
def test_passwords_with_an_at_in_them(url: str) -> None:
    assert not re.search(r"p@ss|a@b|correct|ss@", str(event_log.EventLog().redacted(url)))
    assert "proxy" in event_log.EventLog().redacted(url)


@given(st.text(max_size=200), st.lists(st.text(max_size=80), max_size=3))
def test_any_text_and_any_variables(text: str, extra: list[str]) -> None:
    """Nothing is raised, whatever is said or given."""
    log = event_log.EventLog(secrets=event_log._secrets(extra))
    assert isinstance(log.redacted(text), str)


def test_redaction_takes_time_in_proportion() -> None:
    log = event_log.EventLog()
    for text in ("a" * 300_000, "x://" * 80_000, "x://u:" + "p" * 300_000, "bearer " * 50_000, "x://u:p@" * 40_000):
        began = time.process_time()  # not of the clock: other programs take time as well
        log.redacted(text)
        assert time.process_time() - began < 2, text[:20]
