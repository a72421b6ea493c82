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
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import bounded, releases, switch
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.bounded import BoundsError
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.docker import Docker
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.release_format import check_journal
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.releases import (
    ReleaseError,
    Store,
)
from hypothesis import given
from hypothesis import strategies as st

from sparkfleet.reporting import status_page as words
from tests.unit.fakes import fake_release
from tests.unit.fakes.clock import set_time

ENGINE = fake_release.an_engine("vllm-m")
PLAN, LOCK = fake_release.plan(ENGINE), fake_release.lock(ENGINE)
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
    plan, lock = fake_release.flat(ENGINE, number=3)
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "lock.json").write_text(json.dumps(lock))
    assert store.damage(3) == [] and store.find("services: {}\n", PLAN) == 3
    store.commit(3, 1.0)
    sealed = json.loads((folder / "lock.json").read_text())
    assert {key: sealed[key] for key in lock} == lock and set(sealed) - set(lock) == {"sha256"}
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
    other = fake_release.an_engine("vllm-b", 8001)
    for change in ({"verify": 5}, {"port": 0}, {"service": ""}):
        engine = {**ENGINE, **change}
        with pytest.raises(BoundsError):
            store.stage("a\n", fake_release.plan(engine), fake_release.lock(engine))
    for lock in (fake_release.lock(other), fake_release.lock(ENGINE, other), {**LOCK, "format": 3}):
        with pytest.raises(BoundsError):
            store.stage("a\n", PLAN, lock)
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
    assert (
        journal
        and journal["container_ids"] == {}
        and journal["models"] == ["new"]
        and journal["to"] == 2
        and store.switch_damage() == ""
    )
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
        assert set(OLD_JOURNAL) - {"model", "from_model", "verification"} <= set(journal)
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
            time.sleep(0.4)  # longer than a switch waits for anybody else
        released.set()

    holding = threading.Event()
    thread = threading.Thread(target=guard)
    thread.start()
    holding.wait()
    with store.exclusive("guard", patience=0.1) as mine:
        assert not mine
    with store.exclusive(patience=0.1) as mine:
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


# -- writing ---------------------------------------------------------------------------------------------------------


def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_name_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, did = tmp_path / "deep" / "er" / "file", []  # type: Path, list[str]
    fsync, replace = os.fsync, Path.replace

    def synced(handle: int) -> None:
        info = os.fstat(handle)
        did.append("folder" if stat.S_ISDIR(info.st_mode) else f"{info.st_size} bytes {stat.S_IMODE(info.st_mode):o}")
        fsync(handle)

    def replaced(self: Path, target: Path) -> Path:
        did.append("named")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    releases.write_bytes(path, b"12345", 0o640)
    assert did == ["5 bytes 640", "named", "folder"] and path.read_bytes() == b"12345"
    did.clear()
    releases.link(tmp_path / "link", "file")
    assert did == ["named", "folder"] and (tmp_path / "link").readlink() == Path("file")


def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    releases.write_text(path, "old")

    def full(handle: int) -> None:
        if stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        releases.write_text(path, "new")
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_json_is_written_for_people(tmp_path: Path) -> None:
    releases.write_json(tmp_path / "x", {"a": "é"}, 0o600)
    assert (tmp_path / "x").read_text("utf-8") == '{\n  "a": "é"\n}\n'
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o600
    assert releases.read_json(tmp_path / "x") == {"a": "é"} and releases.read_json(tmp_path / "y") is None


def test_without_a_mode_all_may_read(tmp_path: Path) -> None:
    releases.write_bytes(tmp_path / "a", b"")
    releases.write_text(tmp_path / "b", "")
    releases.write_json(tmp_path / "c", {})
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o644}


def test_syncing_a_folder_leaves_no_descriptor_open(tmp_path: Path) -> None:
    before = len([*Path("/proc/self/fd").iterdir()])
    for _ in range(5):
        releases.sync_folder(tmp_path)
    assert len([*Path("/proc/self/fd").iterdir()]) == before


def test_a_link_that_was_half_made_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".current.new").symlink_to("releases/1")
    releases.link(tmp_path / "current", "releases/2")
    assert (tmp_path / "current").readlink() == Path("releases/2") and len([*tmp_path.iterdir()]) == 1


# -- reading ---------------------------------------------------------------------------------------------------------


def test_the_limits_of_a_number(store: Store) -> None:
    for name in ("1", "999999999", "1000000000"):
        store.folder(int(name)).mkdir(parents=True)
    assert store.numbers() == [1, 999999999]


def test_the_current_release_is_one_that_is_there(store: Store) -> None:
    assert store.current() is None
    stage(store)
    for target, current in (("releases/1", 1), ("releases/2", None), ("releases/x", None)):
        releases.link(store.project_dir / "current", target)
        assert store.current() == current


def test_the_previous_release_is_the_last_that_was_verified_whatever_became_of_it(store: Store) -> None:
    for count in range(4):
        stage(store, f"{count}\n")
    assert store.previous() is None
    for number, at in ((3, 10.0), (1, 20.0), (2, 30.0)):
        store.commit(number, at)
    store.note_failure(4, 40.0, "x", "m", [])
    assert (store.current(), store.previous()) == (2, 1)
    store.note_failure(1, 50.0, "x", "m", [])
    assert store.previous() == 1


def test_what_is_missing_is_named_with_what_there_is(store: Store) -> None:
    with pytest.raises(ReleaseError, match=r"^release 7 has no .*/7/compose\.yml; there are releases \(none\)$"):
        store.compose_file(7)
    stage(store), stage(store, "b\n")
    with pytest.raises(ReleaseError, match=r"/7/plan\.json is missing or damaged; there are releases 1, 2$"):
        store.plan(7)
    spoil(store.folder(1) / "lock.json", '{"service": "vllm-m", "port": 0}')
    with pytest.raises(ReleaseError, match=r"/1/lock\.json is missing or damaged \(port: 0 is not between 1 and"):
        store.lock(1)
    (store.folder(2) / "plan.json").unlink()
    (store.folder(2) / "plan.json").mkdir()
    with pytest.raises(ReleaseError, match=r"/2/plan\.json is missing or damaged \([^/]*(/.*not a regular file)?"):
        store.plan(2)


def test_the_whole_summary(store: Store) -> None:
    empty = store.summary()
    assert empty["current"] is empty["previous"] is empty["newest_compose"] is empty["switch"] is None
    assert empty["numbers"] == empty["unreadable"] == empty["set_aside"] == [] and empty["switch_active"] is False
    stage(store), stage(store, "b\n"), stage(store, "c\n")
    store.commit(1, 10.0), store.commit(2, 20.0, {"vllm-m": "abc"})
    error = {"message": "m", "log": ["line"], "checks": [{}], "exit_code": 1}
    store.write_switch({**OLD_JOURNAL, "to": 3, "error": error, "verification": {"answer": "long"}})
    spoil(store.folder(3) / "lock.json")
    with store.exclusive():
        held = store.holder()
        assert held
        summary = store.summary()
    assert (summary["current"], summary["previous"], summary["numbers"]) == (2, 1, [1, 2, 3])
    assert summary["locks"] == {"1": store.lock(1), "2": store.lock(2), "3": {}}
    assert summary["outcomes"]["2"] == {
        **{"state": "verified", "at": 20.0, "verified_at": 20.0, "container_ids": {"vllm-m": "abc"}},
    }
    assert summary["outcomes"]["3"] is None and list(summary["damaged"]) == ["3"]
    assert summary["newest_compose"] == "c\n" == summary["switch_compose"]
    assert summary["switch_active"] is True and summary["lock_holder"] == held
    assert summary["switch"]["error"] == {"message": "m", "exit_code": 1} and "verifications" not in summary["switch"]
    assert summary["unreadable"] == []
    assert store.summary()["switch_compose"] is None  # no switch in progress


# -- damage and repair -----------------------------------------------------------------------------------------------


def test_what_is_wrong_with_a_release(store: Store) -> None:
    number = stage(store)
    folder = store.folder(number)
    assert store.damage(9) == [f"{store.folder(9)} is missing"]
    spoil(folder / "plan.json", json.dumps(fake_release.plan({**ENGINE, "model": "other"})))
    spoil(folder / "compose.yml", "\udcff".encode("utf-8", "surrogateescape").decode("latin-1"))
    (folder / "outcome.json").write_text('{"state": "fine"}')
    (folder / ".sealed.json").unlink()
    assert store.damage(number) == [
        f"{folder / '.sealed.json'} is missing or damaged",
        f"{folder / 'compose.yml'} was changed",
        f"{folder / 'plan.json'} was changed",
        f"{folder / 'outcome.json'} is damaged (state: 'fine' is none)",
    ]
    (folder / "compose.yml").write_bytes(b"\xff")
    assert f"{folder / 'compose.yml'} is missing or damaged" in store.damage(number)


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "../../../etc/shadow", "x" * 5000])
def test_a_lock_with_the_hash_of_another_name_is_damaged(store: Store, name: str) -> None:
    """Whoever edited the lock may have removed the copies as well."""
    number = stage(store)
    path = store.folder(number) / "lock.json"
    path.chmod(0o644)
    lock = json.loads(path.read_text())
    path.write_text(json.dumps({**lock, "sha256": {**lock["sha256"], name: "a" * 64}}))
    (store.folder(number) / ".sealed.json").unlink()
    (reason,) = store.damage(number)
    assert reason.startswith(f"{path} is missing or damaged (sha256: ") and reason.isprintable() and len(reason) < 400
    with pytest.raises(ReleaseError, match=r"lock\.json is missing or damaged"):
        store.lock(number)
    with pytest.raises(ReleaseError, match="is damaged"):
        store.repair(number)
    assert store.summary()["numbers"] == []


def test_an_outcome_alone_is_set_aside(store: Store) -> None:
    number = stage(store)
    path = store.folder(number) / "outcome.json"
    path.write_text("{")
    assert "outcome.json is damaged" in "; ".join(store.repair(number))
    assert not path.exists() and store.damage(number) == [] and len(store.set_aside_files()) == 1


def test_a_link_in_the_place_of_a_file_is_replaced_and_not_followed(store: Store, tmp_path: Path) -> None:
    number = stage(store)
    path = store.folder(number) / "compose.yml"
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")
    assert store.repair(number) and not path.is_symlink() and path.read_text() == "services: {}\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    (kept,) = store.folder(number).glob("compose.yml.damaged-*")
    assert kept.is_symlink() and not (tmp_path / "nowhere").exists()


def test_only_the_copies_are_lost(store: Store) -> None:
    number = stage(store)
    (store.folder(number) / ".sealed.json").unlink()
    assert store.repair(number) == [f"{store.folder(number) / '.sealed.json'} is missing or damaged"]
    assert store.damage(number) == []


@pytest.mark.parametrize("part", ["sha256", "number", "plan"])
def test_copies_that_are_not_of_this_release_are_none(store: Store, part: str) -> None:
    number = stage(store)
    path = store.folder(number) / ".sealed.json"
    data = json.loads(path.read_text())
    if part == "sha256":
        data["files"]["compose.yml"] = "services: {evil: {}}\n"
    else:
        name, change = ("lock.json", {"number": 7}) if part == "number" else ("plan.json", {"engines": []})
        data["files"][name] = json.dumps({**json.loads(data["files"][name]), **change})
        data["sha256"] = releases._sha256(json.dumps(data["files"], sort_keys=True))
    spoil(path, json.dumps(data))
    assert store.damage(number) == [f"{path} is missing or damaged"]
    assert store.repair(number) and store.damage(number) == []
    assert (store.folder(number) / "compose.yml").read_text() == "services: {}\n"


def test_a_whole_release_is_not_sealed_again(store: Store) -> None:
    number = stage(store)
    path = store.folder(number) / ".sealed.json"
    before = path.stat().st_ino
    store.seal(number)
    assert path.stat().st_ino == before
    path.unlink()
    spoil(store.folder(number) / "compose.yml", "edited\n")
    store.seal(number)  # what was edited is nothing to be kept as it was staged
    assert not path.exists()


def test_a_release_that_is_not_there_cannot_be_repaired(store: Store) -> None:
    stage(store)
    with pytest.raises(ReleaseError, match=r"^/\S+/7 is missing; there are releases 1$"):
        store.repair(7)


def test_a_disk_that_is_full_keeps_a_release_from_being_repaired(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    number = stage(store)
    spoil(store.folder(number) / "compose.yml", "edited\n")

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(releases, "write_text", full)
    with pytest.raises(ReleaseError, match=r"^release 1 cannot be repaired: No space left on device$"):
        store.repair(number)
    assert store.numbers() == [number]


def test_a_release_may_be_left_where_it_is(store: Store) -> None:
    number = stage(store)
    for name in ("lock.json", ".sealed.json"):
        spoil(store.folder(number) / name)
    with pytest.raises(ReleaseError, match=r"^release 1 is damaged: .*; there are releases 1$"):
        store.repair(number, discard=False)
    assert store.numbers() == [number]


def test_the_newest_of_the_releases_that_were_set_aside_are_kept(store: Store) -> None:
    folder = store.project_dir / "releases"
    for number in range(1, bounded.SET_ASIDE + 1):
        (folder / f"{100 + number}.damaged-{number}").mkdir(parents=True)
    number = stage(store)
    assert number == 100 + bounded.SET_ASIDE + 1
    kept = store.discard(number)
    assert kept and kept.is_dir() and kept.name.startswith(f"{number}.damaged-")
    names = {path.name for path in folder.glob("*.damaged-*")}
    assert len(names) == bounded.SET_ASIDE and kept.name in names and "101.damaged-1" not in names


def test_every_release_is_repaired_and_what_was_done_is_said(store: Store) -> None:
    stage(store), stage(store, "b\n"), stage(store, "c\n")
    store.commit(2, 1.0)
    spoil(store.folder(1) / "compose.yml", "x\n")
    for name in ("lock.json", ".sealed.json"):
        spoil(store.folder(3) / name)
    first, third = store.repair_all()
    assert first == f"{store.folder(1) / 'compose.yml'} was changed; restored, the other is kept alongside it"
    assert third.startswith("release 3 is damaged, set aside as ") and "there are" not in third
    assert store.numbers() == [1, 2] and store.repair_all() == []


def test_a_release_that_is_the_same(store: Store) -> None:
    stage(store), stage(store)
    assert store.find("services: {}\n", fake_release.plan({**ENGINE, "memory": {"decode_tok_s_limit": 5}})) == 2
    assert store.find("other\n", PLAN) is None
    for change in ({"model": "n"}, {"profile": "latency"}, {"verify": {**ENGINE["verify"], "question": "other"}}):
        assert store.find("services: {}\n", fake_release.plan({**ENGINE, **change})) is None
    assert store.find("services: {}\n", fake_release.plan(ENGINE, fake_release.an_engine("vllm-b"))) is None
    (store.folder(2) / "outcome.json").write_text("{")  # says nothing about its files
    assert store.find("services: {}\n", PLAN) == 2
    spoil(store.folder(2) / "lock.json")
    assert store.find("services: {}\n", PLAN) == 1


# -- numbers and writing of releases ---------------------------------------------------------------------------------


def test_the_next_number_is_above_all_that_is_known(store: Store) -> None:
    assert store.next_number() == 1
    stage(store)
    (store.state_dir / "last-release").unlink()
    assert store.next_number() == 2
    (store.project_dir / "releases" / "4.damaged-9").mkdir()
    assert store.next_number() == 5
    releases.link(store.project_dir / "current", "releases/6")
    assert store.next_number() == 7
    store.write_switch({"to": 8, "from": None})
    assert store.next_number() == 9
    store.write_switch({"to": 1, "from": 10})
    assert store.next_number() == 11
    (store.state_dir / "last-release").write_text("12\n")
    assert store.next_number() == 13


def test_the_last_number_never_falls(store: Store) -> None:
    path = store.state_dir / "last-release"
    for number, last in ((3, "3\n"), (2, "3\n"), (4, "4\n")):
        store._note_number(number)
        assert path.read_text() == last
    inode = path.stat().st_ino
    store._note_number(4)
    assert path.stat().st_ino == inode


def test_a_release_is_there_for_all_to_read_and_knows_its_number(store: Store) -> None:
    number = stage(store)
    assert stat.S_IMODE(store.folder(number).stat().st_mode) == 0o755
    assert store.lock(number)["number"] == number and (store.state_dir / "last-release").read_text() == "1\n"
    assert stat.S_IMODE((store.project_dir / "releases" / ".lock").stat().st_mode) == 0o600


def test_a_staging_that_fails_leaves_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context, pytest.raises(OSError, match="No space"):
        context.setattr(releases, "_write_release", full)
        stage(store)
    assert [path.name for path in (store.project_dir / "releases").iterdir()] == [".lock"]
    assert stage(store) == 2


def test_a_release_that_is_verified_is_the_current_one(store: Store) -> None:
    stage(store)
    (store.state_dir / "last-release").unlink()
    store.commit(1, 5.0, {"vllm-m": "abc"})
    assert store.outcome(1) == {
        **{"state": "verified", "at": 5.0, "verified_at": 5.0, "container_ids": {"vllm-m": "abc"}},
    }
    assert (store.project_dir / "current").readlink() == Path("releases/1")
    assert (store.project_dir / "compose.yml").readlink() == Path("current/compose.yml")
    assert (store.state_dir / "last-release").read_text() == "1\n"
    assert store.set_aside_files() == [] and not list(store.project_dir.glob("*.damaged-*"))


def test_a_folder_in_the_place_of_the_link_is_left_alone(store: Store) -> None:
    stage(store)
    (store.project_dir / "compose.yml").mkdir()
    store.commit(1, 5.0)
    assert (store.project_dir / "compose.yml").is_dir() and store.current() == 1
    (store.project_dir / "compose.yml").rmdir()
    (store.project_dir / "compose.yml").symlink_to(".")  # a link to a folder is ours to replace
    store.commit(1, 6.0)
    assert (store.project_dir / "compose.yml").readlink() == Path("current/compose.yml")


def test_a_failure_keeps_when_the_release_was_verified_and_the_end_of_its_log(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage(store), stage(store, "b\n")
    store.commit(1, 5.0, {"vllm-m": "abc"})
    monkeypatch.setattr(releases, "LOG_LIMIT", 8)
    store.note_failure(1, 9.0, "crash", "it ended", ["first", "second"])
    assert store.outcome(1) == {
        **{"state": "failed", "at": 9.0, "verified_at": 5.0, "container_ids": {"vllm-m": "abc"}},
        **{"failure": "crash", "message": "it ended"},
    }
    assert (store.folder(1) / "engine.log").read_text() == "t\nsecond\n"
    store.note_failure(2, 9.0, "", "", [])
    assert store.outcome(2) == {"state": "failed", "at": 9.0, "failure": "", "message": "", "container_ids": {}}
    assert not (store.folder(2) / "engine.log").exists()


def test_prune_keeps_at_least_the_newest(store: Store) -> None:
    for count in range(3):
        stage(store, f"{count}\n")
    assert store.prune(0) == [1, 2] and store.numbers() == [3]
    assert store.prune(5) == []


# -- the journal and the lock, in detail -----------------------------------------------------------------------------


def test_why_a_journal_cannot_be_understood(store: Store) -> None:
    assert store.switch_damage() == "" and store.set_journal_aside() is None
    path = store.state_dir / "switch.json"
    store.write_switch({"to": -1})
    assert store.switch_damage() == f"{path}: to: -1 is not between 0 and 1000000000"
    kept = store.set_journal_aside()
    assert kept and kept.parent == path.parent and not path.exists()
    store.write_switch(OLD_JOURNAL)
    assert store.set_journal_aside() is None and path.exists()
    path.unlink()
    path.symlink_to(path)
    assert store.switch_damage() == f"{path}: Too many levels of symbolic links"


@pytest.mark.parametrize(
    ("change", "held"),
    [
        ({}, True),
        ({"phase": "done"}, False),
        ({"pid": 0}, False),
        ({"pid": 2**22}, False),
    ],
)
def test_whose_switch_it_is_by_the_journal(store: Store, change: dict[str, Any], held: bool) -> None:
    store.write_switch({**OLD_JOURNAL, "pid": os.getpid(), **change})
    process = Path("/proc/self/comm").read_text().strip()
    expected = {"holder": "switch", "pid": os.getpid(), "process": process} if held else None
    assert store._holder_by_journal() == expected
    (store.state_dir / "switch.json").unlink()
    assert store._holder_by_journal() is None


def test_the_lock_names_its_process_and_is_empty_afterwards(store: Store) -> None:
    with store.exclusive("guard"):
        process = Path("/proc/self/comm").read_text().strip()
        assert store.holder() == {"holder": "guard", "pid": os.getpid(), "process": process}
        assert json.loads(store.lock_file.read_text()) == {"holder": "guard", "pid": os.getpid()}
        with store.exclusive("guard", patience=0.0) as mine:
            assert not mine
        assert store.lock_file.read_text()  # who does not get it leaves the name of who has it
    assert store.lock_file.read_text() == ""
    store.lock_file.write_text("x" * 500)
    with store.exclusive():
        assert json.loads(store.lock_file.read_text())["holder"] == "switch"


def test_the_lock_is_held_though_nothing_can_be_written_in_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(releases.os, "pwrite", full)
    with store.exclusive() as mine:
        assert mine
        with Store(store.project_dir, store.state_dir, str(store.lock_file)).exclusive(patience=0.0) as another:
            assert not another


def test_a_name_in_the_lock_that_is_not_its_holder_s_is_not_believed(store: Store) -> None:
    with store.exclusive():
        for text in ("", "{", '{"holder": 5, "pid": 1}', '{"holder": "switch", "pid": 1}'):
            store.lock_file.write_text(text)
            held = store.holder()
            assert held and (held["holder"], held["pid"]) == ("other", os.getpid()) and not store.switch_active()


@pytest.mark.parametrize(
    ("held_by", "asked_as", "patience"),
    [("guard", "guard", 1.0), ("switch", "guard", 1.0), ("switch", "switch", 1.0), ("guard", "switch", 120.0)],
)
def test_for_how_long_the_lock_is_waited_for(
    store: Store, monkeypatch: pytest.MonkeyPatch, held_by: str, asked_as: str, patience: float
) -> None:
    now = [0.0]
    with store.exclusive(held_by) as mine:
        assert mine
        set_time(
            *(monkeypatch, releases),
            monotonic=lambda: now[0],
            sleep=lambda seconds: now.__setitem__(0, now[0] + patience / 4),
        )
        with store.exclusive(asked_as) as second:
            assert not second
    assert now[0] == patience


def test_the_folder_of_another_s_lock_keeps_its_mode(store: Store) -> None:
    folder = store.lock_file.parent
    folder.mkdir()
    folder.chmod(0o755)
    with store.exclusive():
        assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    other = Store(lock_file=str(folder / "deep" / "er" / "lock"))
    with other.exclusive():
        assert stat.S_IMODE((folder / "deep" / "er").stat().st_mode) == 0o700


def test_who_holds_a_lock_as_the_kernel_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lock"
    path.touch()
    with path.open("rb") as file:
        info = os.fstat(file.fileno())
        place = f"{os.major(info.st_dev):02x}:{os.minor(info.st_dev):02x}:{info.st_ino}"
        for lines, pid in (
            ([f"1: FLOCK ADVISORY WRITE 4711 {place} 0 EOF"], 4711),
            ([f"1: POSIX ADVISORY WRITE 4711 {place} 0 EOF"], None),
            ([f"1: FLOCK ADVISORY READ 4711 {place} 0 EOF"], None),
            ([f"1: FLOCK ADVISORY WRITE 4711 {place}9 0 EOF", f"2: FLOCK ADVISORY WRITE 1 {place} 0 EOF"], 1),
            ([f"1: FLOCK ADVISORY WRITE 0 {place} 0 EOF"], None),
            ([f"1: FLOCK ADVISORY WRITE -1 {place} 0 EOF"], None),
            (["1: FLOCK"], None),
        ):
            text = "\n".join(lines).encode()
            monkeypatch.setattr(releases.bounded, "read_file", lambda path, limit, text=text: text)
            assert releases._lock_pid(file.fileno()) == pid
    assert releases._process(None) == releases._process(2**22) == ""


def test_half_of_a_surrogate_pair_in_an_answer_is_written(tmp_path: Path) -> None:
    """A journal that cannot be written would end a switch halfway."""
    answer = json.loads('{"answer": "Paris \\ud800 \u00e9"}')
    releases.write_json(tmp_path / "journal.json", answer)
    assert bounded.read_json(tmp_path / "journal.json") == answer
    assert bounded.printable(answer["answer"]) == "Paris \ufffd \u00e9"
