"""Hashing what a cache holds: damage of equal size is found, and found again by the next fetch."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import bounded, integrity
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.cache import (
    clear_suspicion,
    finished,
    manifest_path,
    mark_suspect,
    model_state,
    repo_folder,
    suspect_path,
    suspicion,
)
from hypothesis import given
from hypothesis import strategies as st

REPO, COMMIT = "acme/tiny", "a" * 40
BIG, SMALL = b"weights" * 1000, b'{"a": 1}'


def git(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # noqa: S324


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A complete model of a large and a small file, as the client lays it out."""
    folder = tmp_path / "hf" / repo_folder(REPO)
    snapshot = folder / "snapshots" / COMMIT
    (snapshot / "sub").mkdir(parents=True)
    (folder / "blobs").mkdir()
    sha = hashlib.sha256(BIG).hexdigest()
    for name, content, link in (("w.safetensors", BIG, sha), ("sub/config.json", SMALL, git(SMALL))):
        (folder / "blobs" / link).write_bytes(content)
        (snapshot / name).symlink_to(os.path.relpath(folder / "blobs" / link, (snapshot / name).parent))
    manifest = manifest_path(tmp_path / "hf", REPO, COMMIT)
    manifest.parent.mkdir(parents=True)
    files = {
        "w.safetensors": {"size": len(BIG), "sha256": sha},
        "sub/config.json": {"size": len(SMALL), "sha1": git(SMALL)},
    }
    manifest.write_text(json.dumps({"repo": REPO, "revision": "main", "commit": COMMIT, "files": files}))
    return tmp_path / "hf"


def blob(cache: Path, name: str) -> Path:
    return (cache / repo_folder(REPO) / "snapshots" / COMMIT / name).resolve()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def verify(cache: Path, **more: Any) -> dict[str, Any]:
    return integrity.verify_model(cache, REPO, COMMIT, share=1.0, **more)


def test_a_whole_model_is_sound(cache: Path) -> None:
    ticks: list[int] = []
    found = verify(cache, tick=ticks.append)
    assert (found["files"], found["bytes"], found["damaged"], found["missing"], found["error"]) == (
        2,
        len(BIG) + len(SMALL),
        [],
        [],
        "",
    )
    assert sum(ticks) == found["bytes"]


@pytest.mark.parametrize("name", ["w.safetensors", "sub/config.json"])
def test_one_bit_is_found(cache: Path, name: str) -> None:
    flip(blob(cache, name))
    assert model_state(cache, REPO, COMMIT)["complete"] is True  # sizes alone do not show it
    assert verify(cache)["damaged"] == [name]


def test_a_cut_and_an_absent_file_are_found(cache: Path) -> None:
    blob(cache, "w.safetensors").write_bytes(BIG[:-1])
    blob(cache, "sub/config.json").unlink()
    found = verify(cache)
    assert (found["damaged"], found["missing"]) == (["w.safetensors"], ["sub/config.json"])


def test_a_link_out_of_the_model_is_damage(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(BIG)
    link = cache / repo_folder(REPO) / "snapshots" / COMMIT / "w.safetensors"
    link.unlink()
    link.symlink_to(tmp_path / "outside")
    assert verify(cache)["damaged"] == ["w.safetensors"]


def test_a_pipe_in_place_of_a_file_does_not_hold_it_up(cache: Path) -> None:
    place = blob(cache, "w.safetensors")
    place.unlink()
    os.mkfifo(place)
    assert verify(cache)["damaged"] == ["w.safetensors"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"files": 5}',
        '{"files": {"../../etc/shadow": {"size": 1}}}',
        '{"files": {"a": {"size": -1}}}',
        '{"files": {"a": {"size": 1, "sha256": "x"}}}',
        '{"files": {"a": {"size": 1e400}}}',
        '{"files": {"a": {"size": 2199023255553}}}',
        "[" * 100_000,
    ],
)
def test_a_damaged_manifest_is_said(cache: Path, text: str, tmp_path: Path) -> None:
    manifest_path(cache, REPO, COMMIT).write_text(text)
    assert verify(cache)["error"].startswith("the manifest is damaged")
    assert model_state(cache, REPO, COMMIT)["complete"] is False
    result = tmp_path / "integrity.json"
    assert integrity.main(["--cache-dir", str(cache), "--result", str(result), "--share", "1"]) == integrity.DAMAGED
    assert integrity.damaged(integrity.read_result(result)) == [(REPO, COMMIT, ["its manifest"], 0)]


def test_a_fetch_that_ends_meanwhile_makes_no_false_alarm(cache: Path) -> None:
    flip(blob(cache, "w.safetensors"))
    manifest = manifest_path(cache, REPO, COMMIT)

    def fetched(size: int) -> None:
        text = manifest.read_text()
        manifest.unlink()
        manifest.write_text(text + " ")

    found = verify(cache, tick=fetched)
    assert found["damaged"] == [] and "was replaced" in found["error"]


def test_a_file_of_holes_is_damage_and_is_not_read(cache: Path) -> None:
    size, ticks = 1 << 40, []
    with blob(cache, "w.safetensors").open("r+b") as file:
        file.truncate(size)
    place = manifest_path(cache, REPO, COMMIT)
    manifest = json.loads(place.read_text())
    manifest["files"]["w.safetensors"]["size"] = size
    place.write_text(json.dumps(manifest))

    def tick(read: int) -> None:
        ticks.append(read)
        if sum(ticks) > len(SMALL):
            raise AssertionError("it is read")

    assert verify(cache, tick=tick)["damaged"] == ["w.safetensors"]


@pytest.mark.parametrize(("size", "end"), [(1 << 20, 0), (32 << 20, 4096)])
def test_a_sound_file_with_holes_is_sound(cache: Path, size: int, end: int) -> None:
    """As a copy that leaves out zeros makes it."""
    content = bytes(size - end) + b"x" * end
    with blob(cache, "w.safetensors").open("wb") as file:
        file.truncate(size - end)
        file.seek(size - end)
        file.write(b"x" * end)
    place = manifest_path(cache, REPO, COMMIT)
    manifest = json.loads(place.read_text())
    manifest["files"]["w.safetensors"] = {"size": size, "sha256": hashlib.sha256(content).hexdigest()}
    place.write_text(json.dumps(manifest))
    assert verify(cache)["damaged"] == []


def test_a_file_with_many_names_is_read_once(cache: Path) -> None:
    folder, place = cache / repo_folder(REPO) / "snapshots" / COMMIT, manifest_path(cache, REPO, COMMIT)
    manifest = json.loads(place.read_text())
    entry = manifest["files"]["w.safetensors"]
    for number in range(50):
        os.link(blob(cache, "w.safetensors"), folder / f"link-{number}")
        (folder / f"symlink-{number}").symlink_to("w.safetensors")
        manifest["files"] |= {f"link-{number}": entry, f"symlink-{number}": entry}
    manifest["files"]["wrong"] = {**entry, "sha256": "0" * 64}
    os.link(blob(cache, "w.safetensors"), folder / "wrong")
    place.write_text(json.dumps(manifest))
    found = verify(cache)
    assert (found["files"], found["bytes"]) == (103, 2 * len(BIG) + len(SMALL)) and found["damaged"] == ["wrong"]
    flip(blob(cache, "w.safetensors"))
    assert len(verify(cache)["damaged"]) == 102


def test_reading_takes_its_share_of_the_time(cache: Path) -> None:
    slept: list[float] = []
    integrity.verify_model(cache, REPO, COMMIT, share=1.0, rate=1000.0, sleep=slept.append)
    assert sum(slept) == pytest.approx((len(BIG) + len(SMALL)) / 1000, rel=0.1)
    slept.clear()
    integrity.verify_model(cache, REPO, COMMIT, share=1e-9, sleep=slept.append)
    assert slept and max(slept) == 60.0  # never longer than a minute at once
    slept.clear()
    integrity.verify_model(cache, REPO, COMMIT, share=1.0, sleep=slept.append)
    assert slept == []


# -- the verb --------------------------------------------------------------------------------------------------------


def run(cache: Path, result: Path, *more: str) -> int:
    return integrity.main(["--cache-dir", str(cache), "--result", str(result), "--share", "1", *more])


def test_the_verb_writes_what_it_found_and_marks_the_model(cache: Path, tmp_path: Path) -> None:
    result = tmp_path / "state" / "integrity.json"
    assert run(cache, result) == integrity.SOUND
    assert integrity.damaged(integrity.read_result(result)) == []
    assert suspicion(cache, REPO, COMMIT) == ""
    flip(blob(cache, "w.safetensors"))
    assert run(cache, result, "--model", f"{REPO}@{COMMIT}") == integrity.DAMAGED
    reported = integrity.read_result(result)
    assert reported["finished"] is True
    assert integrity.damaged(reported) == [(REPO, COMMIT, ["w.safetensors"], 0)]
    state = model_state(cache, REPO, COMMIT)
    assert state["complete"] is False and "w.safetensors" in state["suspect"]


def test_what_was_found_before_of_another_model_stays(cache: Path, tmp_path: Path) -> None:
    result = tmp_path / "integrity.json"
    flip(blob(cache, "w.safetensors"))
    run(cache, result)
    other = manifest_path(cache, "acme/other", "b" * 40)
    other.parent.mkdir()
    other.write_text(json.dumps({"files": {}}))
    assert run(cache, result, "--model", f"acme/other@{'b' * 40}") == integrity.DAMAGED
    assert sorted(integrity.read_result(result)["models"]) == [f"acme/other@{'b' * 40}", f"{REPO}@{COMMIT}"]
    manifest_path(cache, REPO, COMMIT).unlink()  # removed: no permanent alarm
    assert run(cache, result, "--model", f"acme/other@{'b' * 40}") == integrity.SOUND


@pytest.mark.parametrize(
    "words",
    [
        ["--model", "x"],
        ["--model", f"../x@{COMMIT}"],
        ["--model", f"a/b@{COMMIT}"] * 257,
        ["--share", "0"],
        ["--share", "nan"],
        ["--rate", "-1"],
        ["--cache-dir", "/nowhere"],
    ],
)
def test_bad_words_are_refused(cache: Path, tmp_path: Path, words: list[str]) -> None:
    assert run(cache, tmp_path / "r.json", *words) == integrity.USAGE
    assert not (tmp_path / "r.json").exists()


def test_one_check_at_a_time(cache: Path, tmp_path: Path) -> None:
    with (tmp_path / "r.json.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run(cache, tmp_path / "r.json") == integrity.BUSY


def add(cache: Path, repo: str, names: list[str]) -> None:
    """A manifest of files that are not there."""
    place = manifest_path(cache, repo, COMMIT)
    place.parent.mkdir(parents=True)
    place.write_text(json.dumps({"files": {name: {"size": 1} for name in names}}))


def test_whatever_is_found_can_be_read_again(cache: Path, tmp_path: Path) -> None:
    """Whoever writes to the cache cannot make the result so large that it is set aside, and its findings with it."""
    letters, number = ("\U0001f600" * 60, '"' * 240, "x" * 240), integrity.MOST_MODELS + 10
    names = ["/".join([f"{index:02}{letters[index % 3]}"] * 4) for index in range(40)]
    for index in range(number - 1):
        add(cache, f"a{index:03}{'o' * 90}/{'m' * 96}", names)
    result = tmp_path / "integrity.json"
    assert run(cache, result) == integrity.DAMAGED
    reported = integrity.read_result(result)
    assert reported["finished"] and reported["left_out"] == 10 and len(reported["models"]) == integrity.MOST_MODELS
    assert result.stat().st_size <= bounded.STATE_FILE
    for _, _, shown, more in integrity.damaged(reported):
        assert 0 < len(shown) <= 20 and len(shown) + more == 40
    last, commit = f"{REPO}", COMMIT  # behind them by name
    assert f"{last}@{commit}" not in reported["models"]
    assert run(cache, result, "--model", f"{last}@{commit}") == integrity.DAMAGED
    reported = integrity.read_result(result)
    assert f"{last}@{commit}" in reported["models"] and len(reported["models"]) == integrity.MOST_MODELS
    assert integrity.damaged(reported)[0][3] > 20  # what was left out before is still counted


def test_the_largest_result_fits(tmp_path: Path) -> None:
    entry = {"checked": 1 << 62, "files": 1 << 62, "bytes": 1 << 62, "seconds": 1e300, "more": 1 << 61}
    names = ["\U0001f600" * 50 for _ in range(100)]
    for name in (names, ['"' * 97] * 100, ["\x01" * 33] * 100):
        models = {}
        for index in range(integrity.MOST_MODELS):
            repo = f"{index:03}{'o' * 93}/{'m' * 96}"
            found = {
                **entry,
                "repo": repo,
                "commit": COMMIT,
                "damaged": name,
                "missing": name,
                "error": "\u56fe" * 9999,
            }
            models[f"{repo}@{COMMIT}"] = integrity._brief(found)
        reported = {
            "version": 1,
            "cache_dir": "x" * 4096,
            "began": 1,
            "updated": 1,
            "finished": True,
            "left_out": 1 << 62,
        }
        place = tmp_path / "integrity.json"
        integrity.write_json(place, {**reported, "models": models})
        assert place.stat().st_size <= bounded.STATE_FILE * 3 // 4
        assert len(integrity.damaged(integrity.read_result(place))) == integrity.MOST_MODELS


@pytest.mark.parametrize(("seconds", "writes"), [(30.0, 1), (0.0, 42)])
def test_the_result_is_written_now_and_then(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, writes: int
) -> None:
    """All of it each time: after each model the cost would grow with the square of their number."""
    written: list[int] = []
    monkeypatch.setattr(integrity, "WRITE_SECONDS", seconds)
    monkeypatch.setattr(integrity, "write_json", lambda path, reported: written.append(len(reported["models"])))
    for index in range(40):
        add(cache, f"a/m{index}", [])
    integrity.verify_all(cache, tmp_path / "integrity.json", share=1)
    assert len(written) == writes and written[-1] == 41


@given(st.recursive(st.none() | st.integers() | st.text(), lambda one: st.lists(one) | st.dictionaries(st.text(), one)))
def test_any_result_file_is_read_or_set_aside(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    place = tmp_path_factory.mktemp("state") / "integrity.json"
    for data in (value, {"version": 1, "models": {"a": value}}, {"version": 1, "models": value}):
        place.write_text(json.dumps(data))
        integrity.damaged(integrity.read_result(place))


# -- suspicion -------------------------------------------------------------------------------------------------------


def test_a_suspect_model_is_not_complete_until_it_was_hashed(cache: Path) -> None:
    assert mark_suspect(cache, REPO, COMMIT, "the answer was nonsense") is True
    state = model_state(cache, REPO, COMMIT)
    assert (state["complete"], state["suspect"], state["missing"]) == (False, "the answer was nonsense", [])
    assert list(finished(cache)) == [(REPO, COMMIT)]  # the mark is not taken for a manifest
    suspect_path(cache, REPO, COMMIT).write_text("{")
    assert model_state(cache, REPO, COMMIT)["suspect"] == "marked"
    clear_suspicion(cache, REPO, COMMIT)
    assert model_state(cache, REPO, COMMIT)["complete"] is True


def test_the_mark_is_never_written_through_a_link(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    folder = manifest_path(cache, REPO, COMMIT).parent
    folder.rename(tmp_path / "moved")
    folder.symlink_to(tmp_path / "etc")
    assert mark_suspect(cache, REPO, COMMIT, "x") is False
    assert list((tmp_path / "etc").iterdir()) == []
    assert mark_suspect(cache, "acme/none", COMMIT, "x") is False


def test_a_check_is_asked_for_after_nonsense_alone(tmp_path: Path) -> None:
    path = tmp_path / "check-models"
    assert not integrity.request("endpoint-down", str(path)) and not path.exists()
    assert not integrity.request("answer-wrong", str(tmp_path / "none" / "x"))
    assert integrity.request("answer-degenerate", str(path)) and path.exists()


@pytest.mark.parametrize(
    ("state", "words", "marked"),
    [
        ("running", ["serve", f"/opt/hf/models--x/snapshots/{COMMIT}"], True),
        ("running", ["serve", "--revision", COMMIT], True),
        ("running", ["serve", "--revision", "main"], False),
        ("exited", ["serve", "--revision", COMMIT], False),
    ],
)
def test_only_what_a_running_engine_serves_is_marked(cache: Path, state: str, words: list[str], marked: bool) -> None:
    class Docker:
        def containers(self, **_: Any) -> list[dict[str, Any]]:
            return [{"Id": "1", "State": state}]

        def container(self, name: str) -> dict[str, Any]:
            mounts = [{"Source": str(cache)}, {"Source": "/nowhere"}]
            return {"Config": {"Cmd": words}, "Mounts": mounts}

    docker: Any = Docker()
    found = integrity.mark_served(docker, "an odd answer")
    assert found == ([f"{REPO}@{COMMIT}"] if marked else [])
    assert model_state(cache, REPO, COMMIT)["complete"] is not marked


@pytest.mark.parametrize(
    ("chosen", "marked"),
    [
        ({}, ["a/one", "a/two"]),
        ({"service": "vllm-b"}, ["a/two"]),
        ({"service": "vllm-c"}, []),
        ({"port": 8000}, ["a/one"]),
        ({"port": 9999}, ["a/one", "a/two"]),  # behind something that is not ours
    ],
)
def test_the_model_of_the_engine_that_answered_is_marked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, chosen: dict[str, Any], marked: list[str]
) -> None:
    names = {"1": "a/one", "2": "a/two"}
    for name in names:
        (tmp_path / name / ".sparkfleet").mkdir(parents=True)

    class Docker:
        def containers(self, **_: Any) -> list[dict[str, Any]]:
            return [
                {
                    **{"Id": name, "State": "running", "Ports": [{"PublicPort": 8000 + place}, {}]},
                    "Labels": {"com.docker.compose.service": f"vllm-{'ab'[place]}"},
                }
                for place, name in enumerate(names)
            ]

        def container(self, name: str) -> dict[str, Any]:
            return {"Config": {"Cmd": [COMMIT]}, "Mounts": [{"Source": str(tmp_path / name)}]}

    monkeypatch.setattr(integrity, "finished", lambda place: [(names[Path(place).name], COMMIT)])
    monkeypatch.setattr(integrity, "mark_suspect", lambda *_: True)
    docker: Any = Docker()
    assert integrity.mark_served(docker, "odd", **chosen) == [f"{name}@{COMMIT}" for name in marked]


def test_no_more_models_are_marked_than_are_looked_at(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Docker:
        def containers(self, **_: Any) -> list[dict[str, Any]]:
            return [{"Id": "1", "State": "running"}]

        def container(self, name: str) -> dict[str, Any]:
            return {"Config": {"Cmd": [COMMIT]}, "Mounts": [{"Source": str(cache)}]}

    docker: Any = Docker()
    monkeypatch.setattr(integrity, "MOST_MODELS", 3)
    for index in range(9):
        add(cache, f"a/m{index}", [])
    assert integrity.mark_served(docker, "an odd answer") == [f"a/m{index}@{COMMIT}" for index in range(3)]


def test_a_check_that_finds_all_files_sound_removes_the_mark(cache: Path, tmp_path: Path) -> None:
    mark_suspect(cache, REPO, COMMIT, "the answer was nonsense")
    integrity.verify_all(cache, tmp_path / "integrity.json", share=1)
    assert model_state(cache, REPO, COMMIT)["complete"] is True

    mark_suspect(cache, REPO, COMMIT, "the answer was nonsense")
    flip(blob(cache, "w.safetensors"))
    integrity.verify_all(cache, tmp_path / "integrity.json", share=1)
    assert "w.safetensors" in suspicion(cache, REPO, COMMIT)


def test_a_mark_that_is_made_during_a_check_stays(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark_suspect(cache, REPO, COMMIT, "before")
    verify = integrity.verify_model

    def marked(*args: Any, **kwargs: Any) -> dict[str, Any]:
        mark_suspect(cache, REPO, COMMIT, "meanwhile")
        return verify(*args, **kwargs)

    monkeypatch.setattr(integrity, "verify_model", marked)
    integrity.verify_all(cache, tmp_path / "integrity.json", share=1)
    assert suspicion(cache, REPO, COMMIT) == "meanwhile"
