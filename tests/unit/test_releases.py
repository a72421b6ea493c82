"""Releases on a host: sealed, repaired or set aside, never renumbered; state files of any form; the lock."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.sparkfleet_host import bounded, releases, switch
from ansible.module_utils.sparkfleet_host.bounded import BoundsError
from ansible.module_utils.sparkfleet_host.docker import Docker
from ansible.module_utils.sparkfleet_host.releases import ReleaseError, Store, check_journal
from hypothesis import given
from hypothesis import strategies as st

from sparkfleet import status as words

PLAN: dict[str, Any] = {
    **{"model": "m", "profile": "throughput", "repo": "org/m", "service": "vllm-m", "memory": None},
    "verify": {"question": "q", "expect": "Paris", "prompt": "p", "prompt_expect": "Paris", "max_tokens": 32},
}
LOCK = {"service": "vllm-m", "port": 8000, "model": "m"}
FILES = ("compose.yml", "plan.json", "lock.json", ".sealed.json")
ODD = ["", "{", "[]", "null", '{"version": 99}', "\0", "[" * 100_000, '{"a": NaN}', '{"a": 1e400}', '"x"', "5"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "project", tmp_path / "state", str(tmp_path / "run" / "switch.lock"))


def stage(store: Store, text: str = "services: {}\n") -> int:
    return store.stage(text, PLAN, LOCK)


def spoil(path: Path, text: str = "{") -> None:
    path.chmod(0o644)
    path.write_text(text, encoding="utf-8")


# -- sealed files ----------------------------------------------------------------------------------------------------


def test_files_are_read_only_and_their_hashes_are_in_the_lock(store: Store) -> None:
    number = stage(store)
    for name in FILES:
        assert stat.S_IMODE((store.folder(number) / name).stat().st_mode) == 0o444
    assert set(store.lock(number)["sha256"]) == {"compose.yml", "plan.json"}
    assert store.damage(number) == [] and store.repair(number) == []


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["edited", "truncated", "removed", "empty"])
def test_one_damaged_file_is_named_brought_back_and_kept(store: Store, name: str, how: str) -> None:
    number = stage(store)
    path = store.folder(number) / name
    before = path.read_text()
    if how == "removed":
        path.unlink()
    else:
        changed = before.replace("8000", "9000").replace("Paris", "Rome").replace("{}", "{ }")
        spoil(path, {"edited": changed, "truncated": before[: len(before) // 2], "empty": ""}[how])
    if name == "lock.json" or how != "edited":
        assert str(path) in "; ".join(store.damage(number))
    assert str(path) in "; ".join(store.repair(number))
    assert path.read_text() == before and store.damage(number) == []
    kept = list(path.parent.glob(f"{name}.damaged-*"))
    assert len(kept) == (name != ".sealed.json" and how != "removed")
    assert store.find("services: {}\n", PLAN) == number


@pytest.mark.parametrize("spoiled", [("lock.json", ".sealed.json"), ("plan.json", "lock.json", ".sealed.json")])
@pytest.mark.parametrize("text", ["", "{", '{"port": 8000'])
def test_a_release_that_cannot_be_repaired_is_set_aside_with_all_it_has(
    store: Store, spoiled: tuple[str, ...], text: str
) -> None:
    number = stage(store)
    for name in spoiled:
        spoil(store.folder(number) / name, text)
    assert store.find("services: {}\n", PLAN) is None
    assert store.numbers() == [number]
    assert "lock.json is missing or damaged" in store.summary()["damaged"][str(number)]
    with pytest.raises(
        ReleaseError, match=r"release 1 is damaged, set aside as .*/releases/1\.damaged-\d+: .*lock\.json"
    ):
        store.repair(number)
    assert store.numbers() == [] and len(store.set_aside_files()) == 1
    assert stage(store) == 2  # and the next is another


def test_the_current_release_is_not_set_aside_as_a_whole(store: Store) -> None:
    number = stage(store)
    store.commit(number, 1.0)
    for name in ("lock.json", ".sealed.json"):
        spoil(store.folder(number) / name)
    assert "release 1 is damaged: " in store.repair_all()[0]
    assert store.current() == number == stage(store, "other: 1\n") - 1
    store.commit(2, 2.0)
    assert "set aside as" in store.repair_all()[0] and store.numbers() == [2]


def test_an_edit_through_the_link_is_drift_and_is_kept(store: Store) -> None:
    number = stage(store)
    store.commit(number, 1.0)
    link = store.project_dir / "compose.yml"
    spoil(link, "services: {other: {}}\n")
    summary = store.summary()
    assert summary["damaged"] == {"1": f"{store.folder(1) / 'compose.yml'} was changed"}
    (line,) = words.damaged(summary)
    assert line.startswith("release 1 (current): ") and "compose.yml was changed" in line
    store.repair_all()
    assert link.read_text() == "services: {}\n"
    (kept,) = store.folder(1).glob("compose.yml.damaged-*")
    assert kept.read_text() == "services: {other: {}}\n"


def test_a_file_in_the_place_of_the_link_is_kept(store: Store) -> None:
    store.commit(stage(store), 1.0)
    (store.project_dir / "compose.yml").unlink()
    (store.project_dir / "compose.yml").write_text("mine\n")
    store.commit(1, 2.0)
    assert (store.project_dir / "compose.yml").is_symlink()
    (kept,) = store.project_dir.glob("compose.yml.damaged-*")
    assert kept.read_text() == "mine\n"


def test_a_release_of_an_earlier_version_is_sealed_when_it_is_verified(store: Store) -> None:
    folder = store.folder(3)
    folder.mkdir(parents=True)
    (folder / "compose.yml").write_text("services: {}\n")
    (folder / "plan.json").write_text(json.dumps(PLAN))
    (folder / "lock.json").write_text(json.dumps({"number": 3, **LOCK}))
    assert store.damage(3) == [] and store.find("services: {}\n", PLAN) == 3
    store.commit(3, 1.0)
    assert (folder / ".sealed.json").is_file() and store.damage(3) == []
    spoil(folder / "compose.yml", "edited\n")
    assert store.repair(3) and (folder / "compose.yml").read_text() == "services: {}\n"


def test_a_copied_release_is_no_other(store: Store) -> None:
    """A folder copied by hand has the copies of another number."""
    stage(store)
    subprocess.run(["cp", "-r", str(store.folder(1)), str(store.folder(7))], check=True)
    store.repair(7)
    assert store.damage(7) == []


@given(data=st.data())
def test_any_content_of_any_file(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("store")
    store = Store(folder / "project", folder / "state", str(folder / "run" / "lock"))
    stage(store)
    store.commit(1, 1.0)
    store.write_switch({"to": 1})
    folders = {**dict.fromkeys((*FILES, "outcome.json"), store.folder(1)), "switch.json": store.state_dir}
    for name in data.draw(st.lists(st.sampled_from([*folders]), min_size=1, unique=True)):
        content = data.draw(st.binary(max_size=30) | JSON.map(lambda value: json.dumps(value).encode()))
        (folders[name] / name).chmod(0o644)
        (folders[name] / name).write_bytes(content)
    summary = store.summary()
    json.dumps(summary)
    words.damaged(summary)
    if summary["switch"]:
        words.switch(summary["switch"], active=True)
    store.set_journal_aside()
    with contextlib.suppress(ReleaseError):
        store.repair(1)
        store.plan(1), store.lock(1), store.compose_file(1)
    assert store.find("services: {}\n", PLAN) in (None, 1)
    assert stage(store) == 2 and store.damage(2) == []
    assert store.switch_damage() == ""


# -- numbers ---------------------------------------------------------------------------------------------------------


def test_a_number_is_never_used_twice(store: Store) -> None:
    assert (stage(store), stage(store, "b\n")) == (1, 2)
    subprocess.run(["rm", "-rf", str(store.folder(2))], check=True)
    assert stage(store, "c\n") == 3
    subprocess.run(["rm", "-rf", str(store.project_dir / "releases")], check=True)
    assert stage(store, "d\n") == 4
    (store.state_dir / "last-release").write_text("no number\n")
    assert stage(store, "e\n") == 5
    (store.state_dir / "last-release").unlink()
    store.write_switch({"to": 9, "from": 8})
    assert stage(store, "f\n") == 10


def test_what_is_not_a_number_is_no_release(store: Store) -> None:
    stage(store)
    for name in ("01", "0", "-1", "1x", "²", "9" * 30, "2.damaged-5"):
        (store.project_dir / "releases" / name).mkdir()
    (store.project_dir / "releases" / "7").write_text("a file")
    assert store.numbers() == [1] and stage(store, "b\n") == 3


def test_two_stagings_at_once_do_not_delete_each_others_files(store: Store) -> None:
    errors: list[BaseException] = []

    def many(name: str) -> None:
        try:
            for count in range(8):
                stage(store, f"{name}{count}\n")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=many, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and store.numbers() == list(range(1, 25))
    assert all(store.damage(number) == [] for number in store.numbers())
    assert len({store.compose_file(number).read_text() for number in store.numbers()}) == 24


def test_leftovers_of_a_killed_staging_go(store: Store) -> None:
    stage(store)
    leftover = store.project_dir / "releases" / ".staged-abc"
    leftover.mkdir()
    (leftover / "compose.yml").write_text("half")
    stage(store, "b\n")
    assert not leftover.exists() and not list((store.project_dir / "releases").glob(".staged-*"))


def test_one_staging_waits_for_another_and_not_for_ever(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(releases, "STAGE_PATIENCE", 0.2)
    with store.staging(), pytest.raises(TimeoutError, match="another staging"):
        stage(store)
    assert stage(store) == 1


def test_what_is_no_plan_is_not_staged(store: Store) -> None:
    for plan, lock in (({**PLAN, "verify": 5}, LOCK), (PLAN, {**LOCK, "port": 0}), ({**PLAN, "service": ""}, LOCK)):
        with pytest.raises(BoundsError):
            store.stage("a\n", plan, lock)
    assert not (store.project_dir / "releases").exists()


# -- prune, failure ----------------------------------------------------------------------------------------------------


def test_prune_keeps_the_previous_release_however_old(store: Store) -> None:
    for count in range(6):
        stage(store, f"{count}\n")
    store.commit(1, 1.0)
    store.commit(2, 2.0)
    assert store.prune(2) == [3, 4] and store.numbers() == [1, 2, 5, 6]
    assert store.previous() == 1


def test_a_release_that_was_removed_meanwhile_is_not_made_of_its_outcome(store: Store) -> None:
    stage(store)
    subprocess.run(["rm", "-rf", str(store.folder(1))], check=True)
    store.note_failure(1, 1.0, "", "m", ["line"])
    with pytest.raises(OSError, match="was removed"):
        store.commit(1, 1.0)
    assert store.numbers() == [] and store.current() is None


# -- the journal -----------------------------------------------------------------------------------------------------

OLD_JOURNAL = {  # as commit a6d52a1 wrote it
    **{"id": "abc", "mode": "deploy", "controller": "alice@laptop", "verb": "site.yml", "to": 2, "from": 1},
    **{"model": "new", "from_model": "old", "pid": 1, "boot_id": "b", "began": 1.0, "ended": None, "phase": "waiting"},
    **{"steps": [{"phase": "stopping", "at": 1.0}], "container": "vllm-new", "outcome": None, "error": None},
    **{"restore_error": None, "stopped_at": 1.5, "answering_at": None, "out_of_service_s": None, "verification": None},
}


def test_a_journal_of_an_earlier_version_is_understood(store: Store) -> None:
    store.write_switch(OLD_JOURNAL)
    journal = store.switch()
    assert journal and journal["container_id"] == "" and journal["to"] == 2 and store.switch_damage() == ""
    assert switch.interrupted(store)
    for missing in ("error", "from", "boot_id", "steps", "id", "mode", "pid", "container"):
        store.write_switch({key: value for key, value in OLD_JOURNAL.items() if key != missing})
        assert store.switch() is not None


@pytest.mark.parametrize("text", [*ODD, '{"to": 1, "from": "x"}', '{"to": 1, "steps": [5]}', '{"to": 1, "error": []}'])
def test_a_journal_that_cannot_be_understood_is_named_and_set_aside(store: Store, text: str) -> None:
    path = store.state_dir / "switch.json"
    path.parent.mkdir()
    path.write_text(text)
    summary = store.summary()
    assert summary["switch"] is None and str(path) in summary["unreadable"][0]
    (line,) = words.damaged(summary)
    assert str(path) in line and "Error" not in line and "Traceback" not in line
    assert not switch.interrupted(store)  # the guard looks so; it sets it aside
    assert store.summary()["unreadable"] == [] and not path.exists()
    (kept,) = store.set_aside_files()
    assert Path(kept).read_text() == text
    assert switch.recover(store, Docker("/nowhere")) is None


@given(st.dictionaries(st.sampled_from([*OLD_JOURNAL]), JSON) | JSON)
def test_any_journal_is_understood_or_refused(value: Any) -> None:
    with contextlib.suppress(BoundsError):
        journal = check_journal({**OLD_JOURNAL, **value} if isinstance(value, dict) else value)
        assert set(OLD_JOURNAL) <= set(journal)
        assert words.switch(journal, active=True)
        assert check_journal(bounded.parse_json(json.dumps(journal), "again")) == journal


# -- the lock --------------------------------------------------------------------------------------------------------


def test_the_lock_lies_where_root_alone_may_look() -> None:
    assert Path(releases.LOCK_FILE).parent == Path("/run/sparkfleet")


def test_the_folder_of_the_lock_is_private_and_links_are_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = store.lock_file.parent
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    monkeypatch.setattr(releases, "RUN_DIR", str(folder))
    with store.exclusive() as mine:
        assert mine and stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE(store.lock_file.stat().st_mode) == 0o600
    victim = folder / "victim"
    victim.write_text("precious")
    store.lock_file.unlink()
    store.lock_file.symlink_to(victim)
    with pytest.raises(OSError, match=r"symbolic|Too many"), store.exclusive():
        pass
    assert victim.read_text() == "precious" and store.holder() is None


def test_who_holds_the_lock(store: Store) -> None:
    assert store.holder() is None
    with store.exclusive():
        held = store.holder()
        assert held and (held["holder"], held["pid"]) == ("switch", os.getpid()) and store.switch_active()
    with store.exclusive("guard"):
        held = store.holder()
        assert held and held["holder"] == "guard" and not store.switch_active()
        assert not store.summary()["switch_active"]
    assert store.holder() is None and not store.switch_active()


def test_a_foreign_program_that_holds_the_lock_is_no_switch(store: Store) -> None:
    with store.exclusive():  # leaves nothing that could be taken for its name
        pass
    store.lock_file.write_text(json.dumps({"holder": "switch", "pid": os.getpid()}))
    with subprocess.Popen(["flock", str(store.lock_file), "sleep", "60"]) as process:
        try:
            deadline = time.monotonic() + 5
            while store.holder() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            held = store.holder()
            assert held and held["holder"] == "other" and not store.switch_active()
        finally:
            process.terminate()


def test_a_switch_waits_for_the_guard_and_the_guard_for_nobody(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    def guard() -> None:
        with store.exclusive("guard") as mine:
            assert mine
            holding.set()
            time.sleep(1.5)  # longer than a switch waits for anybody else
        released.set()

    holding = threading.Event()
    thread = threading.Thread(target=guard)
    thread.start()
    holding.wait()
    with store.exclusive("guard", patience=0.1) as mine:
        assert not mine
    with store.exclusive() as mine:
        assert mine and released.is_set()
    thread.join()
    monkeypatch.setattr(releases, "GUARD_PATIENCE", 0.3)
    with store.exclusive("guard"), store.exclusive(patience=0.1) as mine:
        assert not mine


def test_one_who_may_not_open_the_lock_asks_the_journal(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> int:
        raise PermissionError(13, "Permission denied")

    store.write_switch({**OLD_JOURNAL, "pid": os.getpid()})
    with monkeypatch.context() as as_user:
        as_user.setattr(store, "lock_file", store.lock_file)
        as_user.setattr(releases.os, "open", refused)
        as_user.setattr(store, "switch", lambda: check_journal({**OLD_JOURNAL, "pid": os.getpid()}))
        assert store.switch_active()
        as_user.setattr(store, "switch", lambda: check_journal({**OLD_JOURNAL, "pid": 2**22}))
        assert not store.switch_active()
