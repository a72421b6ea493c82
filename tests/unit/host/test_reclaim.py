"""What pruned releases leave behind goes, and nothing else does."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
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
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.releases import Store, check_journal

from tests.unit.fakes.fake_engine import Engine, Handler

OLD, NEW = "a" * 40, "b" * 40
DIGEST, OTHER = "sha256:" + "1" * 64, "sha256:" + "2" * 64
NAME, TAG = f"nvcr.io/nvidia/vllm@{DIGEST}", "nvcr.io/nvidia/vllm:25.09-py3"
VERIFY = {"question": "q", "expect": "Paris", "prompt": "p", "prompt_expect": "Paris"}


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
        return {"port": 8000, "service": "v", "repo": "org/m", "revision": commit, "image": image, **folders, **more}

    def stage(self, lock: dict[str, Any], text: str = "a") -> int:
        plan = {"model": "m", "repo": "org/m", "service": "v", "verify": VERIFY}
        return self.store.stage(text, plan, lock)

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
    assert found.left == [f"image {NAME}: somebody named it mine:1"] and host.deleted() == []
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
        ("hf/.locks/models--org--m/x.lock", "somebody is downloading it"),
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

    monkeypatch.setattr(job.time, "sleep", sleep)
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

    monkeypatch.setattr(reclaim, "_tree_bytes", broken)
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


# -- with the releases -----------------------------------------------------------------------------------------------


def serve(host: Host, number: int, at: float) -> None:
    host.store.commit(number, at, "id")


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


def test_places_are_those_of_releases_and_notes(host: Host) -> None:
    number = host.stage(host.lock(cache_dir="/srv/hf"))
    reclaim.note(host.store, [number])
    host.store.remove([number])
    host.stage(host.lock(), "b")
    assert reclaim.places(host.store) == sorted({"/srv/hf", str(host.cache), str(host.compiled)})
