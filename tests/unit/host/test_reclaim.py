"""What pruned releases leave behind goes, and nothing else does."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import bounded, job, reclaim
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.docker import Docker
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.reclaim import (
    COMPILED,
    IMAGE,
    MODEL,
    Part,
    Reclaim,
)
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.release_format import check_journal
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.releases import Store

from tests.unit.fakes import fake_release
from tests.unit.fakes.clock import set_time
from tests.unit.fakes.fake_engine import Engine, Handler

OLD, NEW = "a" * 40, "b" * 40
DIGEST, OTHER = "sha256:" + "1" * 64, "sha256:" + "2" * 64
NAME, TAG = f"nvcr.io/nvidia/vllm@{DIGEST}", "nvcr.io/nvidia/vllm:25.09-py3"


class Host:
    """A host with a cache in which two commits of a model share a file, compile caches, and an image."""

    def __init__(self, tmp_path: Path, engine: Engine) -> None:
        self.path, self.engine = tmp_path, engine
        self.docker = Docker(str(engine.server_address), timeout=5)
        self.store = Store(tmp_path / "project", tmp_path / "state", str(tmp_path / "lock"))
        self.cache, self.compiled, self.jobs = (tmp_path / name for name in ("hf", "compiled", "jobs"))
        self.containers: list[dict[str, Any]] = []
        engine.routes["GET", "/containers/json"] = lambda handler: handler.answer(200, self.containers)
        self.model = self.cache / "models--org--m"
        self.snapshot(OLD, {"config.json": "old", "shared": "shared"})
        self.snapshot(NEW, {"config.json": "newer", "shared": "shared"}, "main")

    def snapshot(self, commit: str, files: dict[str, str], ref: str = "", downloaded: int = 9) -> None:
        listing: dict[str, Any] = {"commit": commit, "files": {}, "downloaded_bytes": downloaded}
        (self.model / "blobs").mkdir(parents=True, exist_ok=True)
        (self.model / "snapshots" / commit).mkdir(parents=True)
        for name, text in files.items():
            hash = text.encode().hex().ljust(64, "0")
            (self.model / "blobs" / hash).write_text(text)
            (self.model / "snapshots" / commit / name).symlink_to(f"../../blobs/{hash}")
            listing["files"][name] = {"size": len(text), "sha256": hash}
        if ref:
            (self.model / "refs").mkdir(exist_ok=True)
            (self.model / "refs" / ref).write_text(commit)
        self.list(f"{commit}.json", listing)

    def list(self, name: str, listing: dict[str, Any]) -> None:
        path = self.cache / ".sparkfleet" / "models--org--m" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(listing))

    def image(self, digest: str = DIGEST, tag: str = TAG, noted: bool = True) -> None:
        """An image with its digest and a tag; with the last of them it is gone."""
        name = f"nvcr.io/nvidia/vllm@{digest}"
        image = {"Id": f"id-{digest[7:9]}", "RepoTags": [tag], "RepoDigests": [name], "Size": 5_000_000_000}
        names = (name, tag, image["Id"])
        for one in names:
            self.engine.routes["GET", f"/images/{one}/json"] = image

        def delete(handler: Handler) -> None:
            for one in names:
                self.engine.routes.pop(("GET", f"/images/{one}/json"), None)
                self.engine.routes.pop(("DELETE", f"/images/{one}"), None)
            handler.answer(200, [])

        self.engine.routes["DELETE", f"/images/{tag}"] = delete
        if noted:
            reclaim.note_image(self.store.state_dir, image, {})

    def compile(self, digest: str = DIGEST) -> Path:
        folder = self.compiled / digest[7:19] / "vllm"
        folder.mkdir(parents=True)
        (folder / "kernel").write_text("x" * 100)
        return folder.parent

    def lock(self, commit: str = OLD, digest: str = DIGEST, **more: Any) -> dict[str, Any]:
        image = f"nvcr.io/nvidia/vllm@{digest}"
        folders = {"cache_dir": str(self.cache), "compile_cache_dir": str(self.compiled)}
        own = {key: more.pop(key) for key in ("image", "repo", "revision", "draft") if key in more}
        engine = fake_release.an_engine("v", **{"repo": "org/m", "revision": commit, "image": image, **own})
        return fake_release.lock(engine, **{**folders, **more})

    def stage(self, lock: dict[str, Any], text: str = "a") -> int:
        return self.store.stage(
            text, fake_release.plan(*({**fake_release.an_engine("v"), **item} for item in lock["engines"])), lock
        )

    def run(self, *kept: dict[str, Any], dry: bool = False) -> Reclaim:
        """Reclaim what a release with the old commit and the first image needed."""
        made = Reclaim(self.docker, kept or [self.lock(NEW, OTHER)], self.store.state_dir, dry, str(self.jobs))
        self.again = made.run(reclaim.parts(self.lock()))
        return made

    def deleted(self) -> list[str]:
        return [path for method, path, *_ in self.engine.seen if method == "DELETE"]

    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.path)) for path in self.path.rglob("*"))


@pytest.fixture
def host(tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.setattr(reclaim, "SHARED", str(tmp_path / "shared.json"))
    return Host(tmp_path, engine)


def test_what_only_the_pruned_release_needed_goes(host: Host) -> None:
    host.image()
    host.compile()
    kept = host.compile(OTHER)
    found = host.run()
    assert found.left == [] and host.again == []
    assert found.reclaimed == [
        {"kind": IMAGE, "name": NAME, "bytes": 5_000_000_000},
        {"kind": COMPILED, "name": "1" * 12, "bytes": 100},
        {"kind": MODEL, "name": f"org/m@{OLD}", "bytes": len("old")},
    ]
    assert host.deleted() == [f"/images/{TAG}", f"/images/{NAME}"]
    assert list(host.compiled.iterdir()) == [kept]
    assert [path.name for path in (host.model / "snapshots").iterdir()] == [NEW]
    assert {(host.model / "snapshots" / NEW / name).read_text() for name in ("config.json", "shared")} == {
        *("newer", "shared"),
    }
    assert len(list((host.model / "blobs").iterdir())) == 2 and (host.model / "refs" / "main").read_text() == NEW
    assert [path.name for path in (host.cache / ".sparkfleet" / "models--org--m").iterdir()] == [f"{NEW}.json"]
    assert not list((host.store.state_dir / "images").iterdir())
    again = host.run()
    assert (again.reclaimed, again.left, host.again) == ([], [], [])


def test_what_a_trial_fetched_goes_and_what_it_found_stays(host: Host) -> None:
    lists = host.cache / ".sparkfleet" / "models--org--m"
    trial = host.stage(host.lock(NEW, OTHER))
    reclaim.note(host.store, [trial], tried=True)
    # Its image, and what was compiled; the model is complete.
    assert {part.kind for part in reclaim.unneeded(host.store)} == {IMAGE, COMPILED}
    (lists / f"{OLD}.json").rename(lists / f"{OLD}.config.json")
    reclaim.note(host.store, [host.stage(host.lock(OLD, OTHER), "b")], tried=True)
    assert MODEL in {part.kind for part in reclaim.unneeded(host.store)}
    assert [item["name"] for item in host.run().reclaimed if item["kind"] == MODEL] == [f"org/m@{OLD}"]
    assert [path.name for path in lists.iterdir()] == [f"{NEW}.json"]
    assert [path.name for path in (host.model / "snapshots").iterdir()] == [NEW]


def test_files_that_a_trial_of_another_commit_fetched_stay(host: Host) -> None:
    lists = host.cache / ".sparkfleet" / "models--org--m"
    (lists / f"{NEW}.json").rename(lists / f"{NEW}.config.json")
    blobs = {path.name for path in (host.model / "blobs").iterdir()}
    host.run()
    # The blob of the old commit alone.
    assert len(blobs - {path.name for path in (host.model / "blobs").iterdir()}) == 1


def test_a_model_that_drafts_goes_with_its_release_and_stays_with_another(host: Host) -> None:
    draft = {"repo": "org/m", "revision": OLD}
    drafted = host.lock(NEW, repo="org/target", draft=draft)
    assert f"org/m@{OLD}" in [part.name for part in reclaim.parts(drafted)]
    host.run(host.lock(NEW, OTHER, repo="org/target", draft=draft))
    assert {path.name for path in (host.model / "snapshots").iterdir()} == {OLD, NEW}


def test_the_last_commit_takes_its_folders_with_it(host: Host) -> None:
    work = Reclaim(host.docker, [], host.store.state_dir, jobs=str(host.jobs))
    work.run([Part(MODEL, f"org/m@{commit}", str(host.cache)) for commit in (OLD, NEW)])
    assert [item["bytes"] for item in work.reclaimed] == [len("old"), len("newer") + len("shared")]
    assert [path.name for path in host.cache.rglob("*")] == [".sparkfleet"]


def test_dry_says_the_same_and_touches_nothing(host: Host) -> None:
    host.image()
    host.compile()
    before = host.files()
    shown = host.run(dry=True)
    assert host.files() == before and host.deleted() == []
    assert shown.reclaimed == host.run().reclaimed and len(shown.reclaimed) == 3


@pytest.mark.parametrize(
    "kept",
    [
        {},
        {"cache_dir": "/elsewhere", "compile_cache_dir": "/elsewhere"},
    ],
)
def test_what_a_kept_release_needs_stays_and_is_not_tried_again(host: Host, kept: dict[str, Any]) -> None:
    host.image()
    host.compile()
    found = host.run(host.lock(**kept))
    assert (found.reclaimed, found.left, host.again, host.deleted()) == ([], [], [], [])


def test_an_image_that_a_kept_release_names_otherwise_stays(host: Host) -> None:
    host.image()
    assert not any(item["kind"] == IMAGE for item in host.run(host.lock(NEW, image=TAG)).reclaimed)
    assert host.deleted() == []


def test_a_kept_release_without_a_commit_keeps_its_model(host: Host) -> None:
    found = host.run(host.lock("main", OTHER))
    assert found.reclaimed == [] and found.left == [
        f"model org/m@{OLD}: a kept release uses whatever commit the cache has"
    ]


# -- what is not ours ------------------------------------------------------------------------------------------------


def test_an_image_that_was_there_before_stays(host: Host) -> None:
    host.image(noted=False)
    image = {"Id": "id-11", "RepoTags": [TAG], "RepoDigests": [NAME]}
    reclaim.note_image(host.store.state_dir, image, {"id-11": {"mine:1"}})
    reclaim.note_image(host.store.state_dir, {**image, "Id": "id of the other store"}, {"id-11": {NAME}})
    found = host.run()
    assert not any(item["kind"] == IMAGE for item in found.reclaimed) and host.deleted() == []
    assert (found.left, host.again) == ([], [])  # nothing to speak of


def test_an_image_that_somebody_named_stays(host: Host) -> None:
    host.image()
    host.engine.routes["GET", f"/images/{NAME}/json"] = {
        **{"Id": "id-11", "RepoTags": [TAG, "mine:1"], "RepoDigests": [NAME]},
    }
    found = host.run()
    assert found.left == [f"image {NAME}: someone named it mine:1"] and host.deleted() == []
    assert host.again == [Part(IMAGE, NAME)]


def test_a_name_that_a_later_pull_gave_is_ours_too(host: Host) -> None:
    host.image()
    image = {"Id": "id-11", "RepoTags": [TAG, "nvcr.io/nvidia/vllm:new"], "RepoDigests": [NAME], "Size": 1}
    host.engine.routes["GET", f"/images/{NAME}/json"] = image
    reclaim.note_image(host.store.state_dir, image, {"id-11": {TAG, NAME}})
    assert any(item["kind"] == IMAGE for item in host.run().reclaimed)


def test_a_model_that_was_only_checked_stays(host: Host) -> None:
    listing = bounded.read_json(host.cache / ".sparkfleet" / "models--org--m" / f"{OLD}.json")
    host.list(f"{OLD}.json", {**listing, "downloaded_bytes": 0})
    before = host.files()
    found = host.run()
    assert (found.reclaimed, host.again) == ([], [])
    assert [name for name in host.files() if "hf" in name] == [name for name in before if "hf" in name]


def test_files_that_a_download_or_a_snapshot_by_hand_has_stay(host: Host) -> None:
    blob = b"old".hex().ljust(64, "0")
    host.list("fetching.json", {"commit": "c" * 40, "files": {"config.json": {"size": 3, "sha256": blob}}})
    assert host.run().reclaimed == [{"kind": MODEL, "name": f"org/m@{OLD}", "bytes": 0}]
    assert (host.model / "blobs" / blob).exists()
    host.snapshot("d" * 40, {"x": "by hand"})
    (host.cache / ".sparkfleet" / "models--org--m" / f"{'d' * 40}.json").unlink()
    host.snapshot("e" * 40, {"x": "by hand", "y": "own"})
    work = Reclaim(host.docker, [], host.store.state_dir, jobs=str(host.jobs))
    work.run([Part(MODEL, f"org/m@{'e' * 40}", str(host.cache))])
    assert [item["bytes"] for item in work.reclaimed] == [len("own")]
    assert (host.model / "snapshots" / ("d" * 40) / "x").read_text() == "by hand"


# -- what is in use --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["running", "exited"])
def test_an_image_that_another_container_uses_stays(host: Host, state: str) -> None:
    host.image()
    host.containers = [{"Id": "x", "Names": ["/theirs"], "ImageID": "id-11", "State": state, "Mounts": []}]
    found = host.run()
    assert found.left == [f"image {NAME}: the container theirs uses it"] and host.deleted() == []
    host.containers = []
    assert any(item["kind"] == IMAGE for item in host.run().reclaimed)  # the next switch tries again


def test_an_image_that_docker_refuses_to_remove_stays_noted(host: Host) -> None:
    host.image()
    host.engine.routes["DELETE", f"/images/{TAG}"] = lambda handler: handler.answer(409, {"message": "in use by x"})
    found = host.run()
    assert found.left == [f"image {NAME}: in use by x"] and host.again == [Part(IMAGE, NAME)]


@pytest.mark.parametrize(
    ("source", "state", "labels", "stays"),
    [
        ("hf", "running", {}, True),
        ("hf/models--org--m", "paused", {}, True),
        (".", "running", {}, True),
        ("hf", "exited", {}, False),
        ("hf", "running", {"com.docker.compose.project": "sparkfleet"}, False),
        ("/", "running", {}, False),
    ],
)
def test_a_cache_that_another_container_has_stays(
    host: Host, source: str, state: str, labels: dict[str, str], stays: bool
) -> None:
    mounts = [{"Source": str(host.path / source)}]
    host.containers = [{"Id": "x", "Names": ["/theirs"], "State": state, "Labels": labels, "Mounts": mounts}]
    found = host.run()
    assert (f"model org/m@{OLD}: the container theirs has {host.cache} mounted" in found.left) is stays
    assert (host.model / "snapshots" / OLD).exists() is stays


def test_a_compile_cache_that_a_container_has_stays(host: Host) -> None:
    folder = host.compile()
    host.containers = [{"Id": "x", "State": "exited", "Mounts": [{"Source": f"{folder}/vllm"}]}]
    assert f"compile cache {'1' * 12}: the container x has it mounted" in host.run().left and folder.exists()


@pytest.mark.parametrize(
    ("lock", "reason"),
    [
        ("hf/.locks/models--org--m/x.lock", "someone is downloading it"),
        ("state/integrity.json.lock", "the files of the models are being hashed"),
    ],
)
def test_nothing_goes_under_a_lock_of_another(host: Host, lock: str, reason: str) -> None:
    path = host.path / lock
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert host.run().left == [f"model org/m@{OLD}: {reason}"]
    assert (host.model / "snapshots" / OLD).exists()
    assert host.run().reclaimed


def test_nothing_goes_while_a_fetch_runs(host: Host) -> None:
    host.image()
    for name in ("image", "model"):
        assert job.Job(host.jobs / f"{name}.json", name, f"the {name}").acquire() is None
    assert host.run().left == [
        *(f"image {NAME}: the image is being fetched", f"model org/m@{OLD}: the model is being fetched"),
    ]


def test_what_other_sparks_take_stays(host: Host) -> None:
    Path(reclaim.SHARED).write_text(json.dumps({"models": [{"repo": "org/m", "revision": "main"}]}))
    assert host.run().left == [f"model org/m@{OLD}: other Sparks take it from here"]


def test_a_fetch_waits_for_what_is_being_reclaimed(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    hold = job.hold(host.jobs / "model.json")

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        hold.__exit__(None, None, None)

    set_time(monkeypatch, job, sleep=sleep)
    assert hold.__enter__() is None
    assert job.Job(host.jobs / "model.json", "model", "m").acquire() is None and len(waited) == 1


# -- links -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["model", "blobs", "snapshots", "commit", "refs", "lists", "manifest", "compiled"])
def test_no_link_is_followed_out_of_the_cache(host: Host, place: str, tmp_path: Path) -> None:
    host.compile()
    paths = {
        "model": host.model,
        **{name: host.model / name for name in ("blobs", "snapshots", "refs")},
        "commit": host.model / "snapshots" / OLD,
        "lists": host.cache / ".sparkfleet" / "models--org--m",
        "manifest": host.cache / ".sparkfleet" / "models--org--m" / f"{OLD}.json",
        "compiled": host.compiled / ("1" * 12),
    }
    outside = tmp_path / "outside"
    paths[place].rename(outside)
    paths[place].symlink_to(outside)
    before = sorted(str(path) for path in outside.rglob("*"))
    host.run()
    assert outside.exists() and sorted(str(path) for path in outside.rglob("*")) == before


def test_a_link_in_a_tree_goes_and_what_it_leads_to_stays(host: Host, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("x")
    for folder in (host.compile(), host.model / "snapshots" / OLD):
        (folder / "folder").symlink_to(tmp_path / "outside")
        (folder / "file").symlink_to(tmp_path / "outside" / "file")
    assert len(host.run().reclaimed) == 2
    assert (tmp_path / "outside" / "file").exists()


def test_an_error_leaves_the_rest_to_go(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.compile()

    def broken(*_: Any) -> int:
        raise RecursionError("too deep")

    monkeypatch.setattr(reclaim, "_remove_tree", broken)
    host.image()
    found = host.run()
    assert [item["kind"] for item in found.reclaimed] == [IMAGE]
    assert found.left[0] == f"compile cache {'1' * 12}: RecursionError: too deep"


def test_a_removal_that_is_cut_is_ended_by_the_next(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = host.compile()
    with monkeypatch.context() as until:
        until.setattr(reclaim.os, "unlink", lambda *_, **__: (_ for _ in ()).throw(OSError(5, "cut")))
        assert len(host.run().left) == 2
    assert not folder.exists()  # no engine takes what is left of it for a compile cache
    assert [item["bytes"] for item in host.run().reclaimed] == [100, len("old")]
    assert not list(host.compiled.iterdir()) and not (host.model / "snapshots" / OLD).exists()


def deep(folder: Path, levels: int) -> None:
    """A tree of many levels, with a file of a byte in each: deeper than a path or the stack goes."""
    at = os.open(folder, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("deeper", dir_fd=at)
        below = os.open("deeper", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
        os.close(os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=at))
        os.truncate(f"/proc/self/fd/{at}/file", 1)
    os.close(at)


@pytest.fixture(scope="module")
def open_files() -> Iterator[None]:
    """As few as a service may have open."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.fixture
def no_tree_stays(tmp_path: Path) -> Iterator[None]:
    """One that a failure leaves is too deep for what pytest removes its folders with, then and in every later run."""
    yield
    subprocess.run(["rm", "-rf", "--", str(tmp_path)], check=True)


def test_a_tree_of_any_depth_goes(host: Host, open_files: None, no_tree_stays: None) -> None:
    folder = host.compile()
    deep(folder, 3000)
    deep(host.model / "snapshots" / OLD, 3000)
    found = host.run()
    assert (found.left, host.again) == ([], [])
    assert [item["bytes"] for item in found.reclaimed] == [100 + 3000, len("old") + 3000]
    assert not list(host.compiled.iterdir()) and not (host.model / "snapshots" / OLD).exists()
    assert not (host.cache / ".sparkfleet" / "models--org--m" / f"{OLD}.json").exists()


def test_a_folder_of_any_size_goes(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = host.compile()
    for number in range(50):
        (folder / f"folder-{number}").mkdir()
        (folder / f"folder-{number}" / "file").write_text("x")
    monkeypatch.setattr(reclaim, "MOST_FILES", 7)
    assert host.run().reclaimed[0] == {"kind": COMPILED, "name": "1" * 12, "bytes": 150}
    assert not list(host.compiled.iterdir())


def test_a_snapshot_that_is_too_deep_to_look_at_keeps_its_model(host: Host, open_files: None) -> None:
    """Its links may be to files of the one that goes."""
    deep(host.model / "snapshots" / NEW, 100)
    found = host.run()
    assert found.left[0].startswith(f"model org/m@{OLD}: ") and f"{NEW} is too large or too deep" in found.left[0]
    assert len(host.again) == 1 and (host.model / "snapshots" / OLD / "config.json").read_text() == "old"


def test_a_folder_in_the_place_of_a_mark_goes_with_the_model(host: Host) -> None:
    mark = host.cache / ".sparkfleet" / "models--org--m" / f"{OLD}.suspect.json"
    (mark / "folder").mkdir(parents=True)
    (mark / "folder" / "file").write_text("x")
    host.compile()
    found = host.run()
    assert (found.left, host.again) == ([], []) and len(found.reclaimed) == 2
    assert [path.name for path in mark.parent.iterdir()] == [f"{NEW}.json"]


def descriptors() -> list[str]:
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("place", [f"{OLD}.json", f"{NEW}.json", "fetching.json"])
def test_a_folder_in_the_place_of_a_list_keeps_the_model_and_nothing_else(host: Host, place: str) -> None:
    path = host.cache / ".sparkfleet" / "models--org--m" / place
    path.unlink(missing_ok=True)
    path.mkdir()
    host.compile()
    opened = descriptors()
    with pytest.raises(bounded.BoundsError), reclaim.ModelFiles(str(host.cache), "org/m", OLD) as files:
        files.remove()
    assert descriptors() == opened
    found = host.run()
    assert found.left == [f"model org/m@{OLD}: {place}: not a regular file"]
    assert host.again == [Part(MODEL, f"org/m@{OLD}", str(host.cache))]
    assert [item["kind"] for item in found.reclaimed] == [COMPILED]


def test_what_can_go_of_a_model_goes_and_the_rest_stays_on_record(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The snapshot cannot be removed: its blobs go, and the manifest stays, so that the next switch tries again."""
    (host.model / "snapshots" / OLD / "folder").mkdir()
    (host.model / "refs" / "old").write_text(OLD)
    (host.model / "refs" / "link").symlink_to("old")
    (host.model / "refs" / "folder").mkdir()
    rmdir = os.rmdir

    def busy(name: str, *, dir_fd: int) -> None:
        if name == "folder":
            raise OSError(16, "Device or resource busy")
        rmdir(name, dir_fd=dir_fd)

    blob = host.model / "blobs" / b"old".hex().ljust(64, "0")
    manifest = host.cache / ".sparkfleet" / "models--org--m" / f"{OLD}.json"
    with monkeypatch.context() as until:
        until.setattr(reclaim.os, "rmdir", busy)
        found = host.run()
    assert found.left == [f"model org/m@{OLD}: [Errno 16] Device or resource busy"] and len(host.again) == 1
    assert not blob.exists() and not (host.model / "refs" / "old").exists() and manifest.exists()
    assert (host.model / "refs" / "main").read_text() == NEW
    found = host.run()
    assert (found.left, host.again) == ([], []) and not manifest.exists()


def test_what_vanishes_meanwhile_does_not_take_the_record_along(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(self: Any, name: str) -> dict[str, Any]:
        if not name.startswith(OLD):
            raise FileNotFoundError(2, "No such file or directory", name)
        return listing(self, name)

    listing = reclaim.ModelFiles._listing
    monkeypatch.setattr(reclaim.ModelFiles, "_listing", gone)
    assert "No such file" in host.run().left[0] and len(host.again) == 1


def test_a_file_in_the_place_of_what_is_left_of_a_compile_cache_is_no_obstacle(host: Host) -> None:
    host.compile()
    (host.compiled / f".{'1' * 12}.unneeded").write_text("x")
    assert host.run().reclaimed[0]["bytes"] == 100 and not list(host.compiled.iterdir())


# -- time ------------------------------------------------------------------------------------------------------------


class Clock:
    """Advances by a second each time it is read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(reclaim, "time", SimpleNamespace(monotonic=self, monotonic_ns=time.monotonic_ns))

    def __call__(self) -> float:
        self.now += 1
        return self.now


LATE = "not finished in time; the next switch continues"


def limited(host: Host, seconds: float, *noted: Part, dry: bool = False) -> Reclaim:
    work = Reclaim(host.docker, [host.lock(NEW, OTHER)], host.store.state_dir, dry, str(host.jobs), seconds)
    host.again = work.run(noted or reclaim.parts(host.lock()))
    return work


def test_a_tree_that_grows_faster_than_it_goes_does_not_hold_the_switch_up(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.compile()
    Clock(monkeypatch)
    content, looks = reclaim._content, 0

    def growing(folder: int) -> tuple[list[str], list[str], bool]:
        nonlocal looks
        looks += 1
        if looks > 1000:
            raise ValueError("without end")
        os.mkdir(f"folder-{looks}", dir_fd=folder)
        return content(folder)

    with monkeypatch.context() as until:
        until.setattr(reclaim, "_content", growing)
        found = limited(host, 100)
    assert found.left == [f"compile cache {'1' * 12}: {LATE}", f"model org/m@{OLD}: {LATE}"] and 0 < looks <= 100
    compiled, model = Part(COMPILED, "1" * 12, str(host.compiled)), Part(MODEL, f"org/m@{OLD}", str(host.cache))
    assert host.again == [model, compiled]  # the one that took too long waits for the others
    found = limited(host, 10_000, *host.again)
    assert (found.left, host.again, len(found.reclaimed)) == ([], [], 2) and not list(host.compiled.iterdir())


@pytest.mark.parametrize("dry", [False, True])
def test_a_tree_of_very_many_folders_is_not_looked_through_for_ever(
    host: Host, monkeypatch: pytest.MonkeyPatch, dry: bool
) -> None:
    looks = []
    content = reclaim._content
    monkeypatch.setattr(reclaim, "_content", lambda folder: looks.append(1) or content(folder))
    for place in (host.compile(), host.model / "snapshots" / NEW, host.model / "refs"):
        for number in range(100):
            (place / f"folder-{number}").mkdir()
    Clock(monkeypatch)
    for part in (MODEL, COMPILED):
        looks.clear()
        found = limited(host, 30, *(one for one in reclaim.parts(host.lock()) if one.kind == part), dry=dry)
        assert found.left[0].endswith(LATE) and len(host.again) == 1 and len(looks) <= 30


def test_very_many_lists_do_not_hold_the_switch_up(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = host.cache / ".sparkfleet" / "models--org--m"
    for number in range(100):
        os.link(lists / f"{NEW}.json", lists / f"{number:040x}.json")
    read, listing = [], reclaim.ModelFiles._listing

    def counted(self: Any, name: str) -> dict[str, Any]:
        read.append(name)
        return listing(self, name)

    monkeypatch.setattr(reclaim.ModelFiles, "_listing", counted)
    with monkeypatch.context() as until:
        Clock(until)
        assert limited(host, 30).left == [f"model org/m@{OLD}: {LATE}"] and len(read) <= 30
    assert (lists / f"{OLD}.json").exists() and (host.model / "snapshots" / OLD / "config.json").exists()
    assert limited(host, 1000).left == [] and not (lists / f"{OLD}.json").exists()


def test_lists_of_other_names_are_none(host: Host) -> None:
    hash = b"old".hex().ljust(64, "0")
    listing = {"files": {"config.json": {"size": 3, "sha256": hash}}}
    for name in ("x.json", f"{'A' * 40}.json", f"{'c' * 40}.json.json", f"{'c' * 40}.suspect.json"):
        host.list(name, listing)
    assert host.run().reclaimed == [{"kind": MODEL, "name": f"org/m@{OLD}", "bytes": 3}]


def test_whenever_the_time_is_over_the_next_switch_goes_on(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.compile()
    deep(host.compiled / ("1" * 12), 150)
    for place in (host.model / "snapshots" / OLD, host.model / "refs"):
        for number in range(5):
            (place / f"folder-{number}").mkdir()
            (place / f"folder-{number}" / "file").write_text("x")
    manifest = host.cache / ".sparkfleet" / "models--org--m" / f"{OLD}.json"
    noted = [part for part in reclaim.parts(host.lock()) if part.kind != IMAGE]
    Clock(monkeypatch)
    for seconds in range(1, 300):
        found = limited(host, seconds, *noted)
        assert all(line.endswith(LATE) for line in found.left) and len(found.left) == len(host.again)
        assert manifest.exists() is any(part.kind == MODEL for part in host.again)
        noted = host.again
        if not noted:
            break
    assert not noted and seconds > 10 and not list(host.compiled.iterdir())
    assert not (host.model / "snapshots" / OLD).exists()
    assert {path.read_text() for path in (host.model / "snapshots" / NEW).iterdir()} == {"newer", "shared"}


# -- with the releases -----------------------------------------------------------------------------------------------


def serve(host: Host, number: int, at: float) -> None:
    host.store.commit(number, at, {"v": "id"})


def test_a_pruned_release_leaves_a_note_and_what_it_needed_goes(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "FOLDER", str(host.jobs))
    host.image()
    serve(host, host.stage(host.lock(OLD, DIGEST)), 1.0)
    for count in (2, 3):
        serve(host, host.stage(host.lock(NEW, OTHER), f"text {count}"), float(count))
    assert reclaim.after_switch(host.store, host.docker) == ([], [])
    pruned, would, _ = reclaim.foresee(host.store, host.docker, 1, 4, host.lock(NEW, OTHER))
    assert (pruned, [item["kind"] for item in would]) == ([1, 2], [IMAGE, MODEL])
    # What the release that is to come needs does not go, though it is not staged yet.
    assert reclaim.foresee(host.store, host.docker, 1, 4, host.lock(OLD, DIGEST))[1] == []
    reclaim.note(host.store, host.store.surplus(1))
    assert host.store.prune(1) == [1]
    done, left = reclaim.after_switch(host.store, host.docker)
    assert [item["kind"] for item in done] == [IMAGE, MODEL] and left == []
    assert check_journal({"to": 1, "reclaimed": done, "left": left})["reclaimed"] == done
    assert reclaim.unneeded(host.store) == [] and reclaim.after_switch(host.store, host.docker) == ([], [])


def test_nothing_goes_while_a_kept_release_cannot_be_read(host: Host) -> None:
    reclaim.note(host.store, [host.stage(host.lock())])
    number = host.stage(host.lock(NEW, OTHER), "b")
    (host.store.folder(number) / "lock.json").unlink()
    done, left = reclaim.after_switch(host.store, host.docker)
    assert done == [] and "lock.json is missing or damaged" in left[0]
    assert len(reclaim.unneeded(host.store)) == 3


@pytest.mark.parametrize(
    "part",
    [
        {"kind": "compile cache", "name": "../../../etc", "place": "/var"},
        {"kind": "model", "name": f"../m@{OLD}", "place": "/opt/hf"},
        {"kind": "model", "name": "org/m@main", "place": "/opt/hf"},
        {"kind": "model", "name": f"org/m@{OLD}", "place": "hf"},
        {"kind": "folder", "name": "/etc", "place": ""},
    ],
)
def test_a_note_of_another_form_counts_for_nothing(host: Host, part: dict[str, str]) -> None:
    host.store.state_dir.mkdir()
    (host.store.state_dir / reclaim.UNNEEDED).write_text(json.dumps({"parts": [part]}))
    assert reclaim.unneeded(host.store) == []


@pytest.mark.parametrize(
    "name",
    ["", "vllm", "x:\x1b[2J", "a b:1", "../x:1", "x:1\n", "x@sha256:1", "x:\ud800", "x:\0", f"{'x' * 600}:1", "-x:1"],
)
def test_a_name_that_is_none_of_an_image_counts_for_nothing(host: Host, name: str) -> None:
    """Of a note that someone changed the rest counts; of a release such a name is not noted."""
    host.store.state_dir.mkdir()
    good = {"kind": "image", "name": NAME, "place": ""}
    parts = [{**good, "name": name}, good, 5, {**good, "place": "/x"}]
    (host.store.state_dir / reclaim.UNNEEDED).write_text(json.dumps({"parts": parts}))
    assert reclaim.unneeded(host.store) == [Part(IMAGE, NAME)]
    number = host.stage(host.lock(image=name))
    reclaim.note(host.store, [number])
    assert reclaim.unneeded(host.store) == [Part(IMAGE, NAME), Part(MODEL, f"org/m@{OLD}", str(host.cache))]


def test_a_note_that_is_damaged_as_a_whole_is_set_aside(host: Host) -> None:
    host.store.state_dir.mkdir()
    path = host.store.state_dir / reclaim.UNNEEDED
    path.write_text("{")
    assert reclaim.unneeded(host.store) == []
    reclaim.note(host.store, [host.stage(host.lock())])
    assert len(reclaim.unneeded(host.store)) == 3 and len(list(path.parent.glob(f"{path.name}.damaged-*"))) == 1


def test_what_is_left_is_said_without_control_characters(host: Host) -> None:
    work = Reclaim(host.docker, [], host.store.state_dir, jobs=str(host.jobs))
    image = {"Id": "id-11", "RepoTags": [TAG, "x\x1b[31m:1"], "RepoDigests": [NAME]}
    host.image()
    host.engine.routes["GET", f"/images/{NAME}/json"] = image
    work.run([Part(IMAGE, NAME), Part(COMPILED, "\x1b[2J" + "x" * 5000, "/nowhere\0")])
    assert work.left[0] == f"image {NAME}: someone named it x\ufffd[31m:1"
    assert work.left[1].startswith("compile cache \ufffd[2Jxxx") and len(work.left[1]) < 1000


def test_a_note_that_cannot_be_written_is_said(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "FOLDER", str(host.jobs))
    reclaim.note(host.store, [host.stage(host.lock(image=""))])
    host.store.remove([1])

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reclaim, "write_json", full)
    done, left = reclaim.after_switch(host.store, host.docker)
    assert [item["kind"] for item in done] == [MODEL]
    assert left == ["unneeded.json cannot be written: No space left on device"]
    assert len(reclaim.unneeded(host.store)) == 1


@pytest.mark.parametrize("place", ["/opt/\0hf", "/opt/\x1b", "/opt/\ud800", "opt", f"/{'x' * 5000}"])
def test_a_place_that_can_be_no_folder_is_not_one(host: Host, place: str) -> None:
    assert reclaim.parts(host.lock(cache_dir=place))[-1].place == "/opt/hf"


def test_each_engine_needs_its_parts_and_all_of_them_once(host: Host) -> None:
    second = fake_release.an_engine("w", 8001, repo="org/n", revision=NEW, image=NAME)
    lock = host.lock()
    lock["engines"] += fake_release.lock(second)["engines"]
    assert reclaim.parts(lock) == [
        *(
            Part(IMAGE, NAME),
            Part(COMPILED, "1" * 12, str(host.compiled)),
            Part(MODEL, f"org/m@{OLD}", str(host.cache)),
        ),
        Part(MODEL, f"org/n@{NEW}", str(host.cache)),
    ]
    number = host.stage(lock)
    assert reclaim.foresee(host.store, host.docker, 1, number, {})[2] == []
    kept = Reclaim(host.docker, [lock], host.store.state_dir, jobs=str(host.jobs))
    assert kept.run(reclaim.parts(host.lock())) == [] and kept.reclaimed == kept.left == []


# -- what Docker says ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("odd", [5, "x:1", {}, [5], [None], ["x" * 5000], [["x"]], ["x:1"] * 1001, True])
@pytest.mark.parametrize("key", ["RepoTags", "RepoDigests"])
def test_names_of_another_form_are_one_typed_error(host: Host, odd: Any, key: str) -> None:
    with pytest.raises(bounded.BoundsError, match=key):
        reclaim.image_names({"Id": "i", key: odd})
    host.engine.routes["GET", "/images/json"] = [{"Id": "i", key: odd}]
    with pytest.raises(bounded.BoundsError, match=key):
        reclaim.images_before(host.docker)
    with pytest.raises(bounded.BoundsError, match=key):
        reclaim.note_image(host.store.state_dir, {"Id": "i", "RepoDigests": [NAME], key: odd}, {})
    host.image()
    image = {"Id": "id-11", "RepoTags": [TAG], "RepoDigests": [NAME]}
    host.engine.routes["GET", f"/images/{NAME}/json"] = {**image, key: odd}
    assert host.run().left[0].startswith(f"image {NAME}: {key}") and host.deleted() == []


def test_images_before_a_pull(host: Host) -> None:
    host.engine.routes["GET", "/images/json"] = [
        {"Id": "a", "RepoTags": ["<none>:<none>"]},
        {"Id": "b", "RepoTags": [TAG]},
    ]
    assert reclaim.images_before(host.docker) == {"a": set(), "b": {TAG}}
    host.engine.routes["GET", "/images/json"] = lambda handler: handler.answer(200, None)
    assert reclaim.images_before(host.docker) == {}


def test_a_name_that_can_be_no_pull_s_is_not_noted_and_keeps_its_image(host: Host) -> None:
    odd = "../containers/x?force=1:1"
    image = {"Id": "id-11", "RepoTags": [TAG, odd], "RepoDigests": [NAME]}
    reclaim.note_image(host.store.state_dir, image, {})
    (record,) = (host.store.state_dir / "images").iterdir()
    assert json.loads(record.read_text()) == {"names": [TAG, NAME]}
    record.write_text(json.dumps({"names": [TAG, NAME, odd, 5]}))
    host.engine.routes["GET", f"/images/{NAME}/json"] = image
    assert host.run().left == [f"image {NAME}: someone named it {odd}"] and host.deleted() == []


def test_the_names_of_an_image_that_are_noted_are_few(host: Host) -> None:
    image = {"Id": "i", "RepoTags": [f"x:{number}" for number in range(100)], "RepoDigests": [NAME]}
    with pytest.raises(bounded.BoundsError, match="more than 100"):
        reclaim.note_image(host.store.state_dir, image, {})
    for begin in range(0, 2000, 90):
        image = {"Id": "i", "RepoTags": [f"x:{number}" for number in range(begin, begin + 90)], "RepoDigests": [NAME]}
        reclaim.note_image(host.store.state_dir, image, {})
    (record,) = (host.store.state_dir / "images").iterdir()
    assert 900 < len(json.loads(record.read_text())["names"]) <= 1000


@pytest.mark.parametrize("odd", [5, "x", [5], [None], [{"Source": 5}], [{"Source": "/\0"}], [{"Source": "/\ud800"}]])
def test_where_docker_does_not_say_what_a_container_sees_nothing_goes(host: Host, odd: Any) -> None:
    folder = host.compile()
    host.containers = [{"Id": "x", "Names": odd, "State": "running", "Labels": odd, "Mounts": odd}]
    found = host.run()
    assert (
        found.reclaimed == []
        and len(found.left) == 2
        and all("the mounts of the container" in line for line in found.left)
    )
    assert folder.exists() and (host.model / "snapshots" / OLD).exists()


@pytest.mark.parametrize("size", [-1, 1 << 80, "5", None, 1.5, [5]])
def test_a_size_of_another_form_counts_for_nothing(host: Host, size: Any) -> None:
    host.image()
    image = {"Id": "id-11", "RepoTags": [TAG], "RepoDigests": [NAME], "Size": size}
    host.engine.routes["GET", f"/images/{NAME}/json"] = image
    host.containers = [{"Id": "x", "Image": ["odd"], "ImageID": {}}]
    found = host.run()
    assert found.reclaimed[0] == {"kind": IMAGE, "name": NAME, "bytes": 0}
    assert check_journal({"to": 1, "reclaimed": found.reclaimed})["reclaimed"] == found.reclaimed


def test_places_are_those_of_releases_and_notes(host: Host) -> None:
    number = host.stage(host.lock(cache_dir="/srv/hf"))
    reclaim.note(host.store, [number])
    host.store.remove([number])
    host.stage(host.lock(), "b")
    assert reclaim.places(host.store) == sorted({"/srv/hf", str(host.cache), str(host.compiled)})
