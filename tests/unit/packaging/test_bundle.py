"""A bundle: what is in it, what a host gets of it, and what is reported when something is missing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.job import Job, JobError
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.registry import Layout
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.share import Model
from plugins.modules import bundle_collect, bundle_receive, spark_state
from sparkfleet_host import cache

from sparkfleet import SparkfleetError
from sparkfleet.fleet import fetch_schedule
from sparkfleet.fleet.fetch_schedule import Missing
from sparkfleet.packaging import wheels
from sparkfleet.packaging.bundle import Bundle, Collected, Entry
from sparkfleet.planning import lock, plan
from sparkfleet.planning.target import Target
from tests.unit import ROOT
from tests.unit.planning.test_plan import bare, fetched, target

IMAGE = "nvcr.io/nvidia/vllm:25.09-py3"
SYSTEM = {"id": "ubuntu", "codename": "noble", "machine": "aarch64"}
REPO, COMMIT = "org/model", "c" * 40
CONFIG = "sha256:" + hashlib.sha256(b"{}").hexdigest()
MANIFEST = json.dumps({"config": {"digest": CONFIG, "size": 2}, "layers": []}).encode()
DIGEST = "sha256:" + hashlib.sha256(MANIFEST).hexdigest()
WEIGHTS = b"weights"
SHA = hashlib.sha256(WEIGHTS).hexdigest()
LISTING = {
    "repo": REPO,
    "revision": "main",
    "commit": COMMIT,
    "files": {"model.safetensors": {"size": len(WEIGHTS), "sha256": SHA}},
    "total_bytes": len(WEIGHTS),
}


CONTENT = {
    f"image/blobs/sha256/{DIGEST.partition(':')[2]}": MANIFEST,
    f"image/blobs/sha256/{CONFIG.partition(':')[2]}": b"{}",
    f"hub/models--org--model/blobs/{SHA}": WEIGHTS,
    "packages/Packages": b"Package: a\n",
    "packages/a_1_arm64.deb": b"deb",
}


def collected(place: Path, content: dict[str, bytes] | None = None) -> dict[str, Any]:
    """What `bundle_collect` returns on a host that has its files in `place`."""
    files = []
    for name, body in (CONTENT if content is None else content).items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
        files.append({"name": name, "path": str(path), "size": len(body), "sha256": hashlib.sha256(body).hexdigest()})
    entry = {"name": IMAGE, "digest": DIGEST, "media_type": "application/vnd.oci.image.manifest.v1+json"}
    return {
        "image": {**entry, "size": len(MANIFEST), "blobs": [DIGEST, CONFIG]},
        "model": f"{REPO}@main",
        "listing": json.loads(json.dumps(LISTING)),
        "packages": ["a"],
        "left_out": [],
        "files": files,
    }


def fill(made: Bundle, given: dict[str, Any] | None = None, system: dict[str, str] | None = None) -> Bundle:
    """What the action does, with files that are there already."""
    known = Collected.of(
        given or collected(made.folder), IMAGE if given is None else given["image"]["name"], f"{REPO}@main"
    )
    entries = {item.name: made.entry_of(item.name)[0] for item in known.items}
    made.add(known, system or SYSTEM, entries)
    made.write()
    return Bundle.read(made.folder)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return fill(Bundle.open(tmp_path / "carry"))


def test_what_is_written_is_read(bundle: Bundle) -> None:
    assert list(bundle.images) == [IMAGE] and list(bundle.models) == [f"{REPO}@main"]
    assert bundle.missing_files() == []
    assert bundle.system["machine"] == "aarch64"
    assert Layout(bundle.folder / "image").names() == {IMAGE: DIGEST}  # what serves it on a Spark


def test_a_spark_serves_the_model_from_it(bundle: Bundle, tmp_path: Path) -> None:
    model = Model(str(bundle.folder / "hub"), REPO, "main", str(tmp_path / "jobs"))
    assert model.listing()["commit"] == COMMIT
    _, content = model.file("model.safetensors")
    assert b"".join(content.read(0, len(WEIGHTS))) == WEIGHTS


def test_files_of_a_fetch_and_of_apt(bundle: Bundle) -> None:
    fetched = bundle.of_fetch([IMAGE], [f"{REPO}@main"])
    assert sorted(fetched) == sorted(name for name in bundle.files if not name.startswith("packages/"))
    assert sorted(bundle.of_packages()) == ["packages/Packages", "packages/a_1_arm64.deb"]
    with pytest.raises(SparkfleetError, match=r"other:1 not in the bundle .*sparkfleet bundle"):
        bundle.of_fetch(["other:1"], [])


def test_a_cut_file_is_told(bundle: Bundle) -> None:
    (bundle.folder / "packages" / "a_1_arm64.deb").write_bytes(b"d")
    assert bundle.missing_files() == ["packages/a_1_arm64.deb"]
    assert "packages/a_1_arm64.deb" not in bundle.complete()


@pytest.mark.parametrize("content", [None, "{", "[]", "5", "[" * 100_000])
def test_a_folder_that_is_no_bundle(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "bundle.json").write_text(content)
    with pytest.raises(SparkfleetError, match=f"sparkfleet_bundle {tmp_path}: no bundle found"):
        Bundle.read(tmp_path)


def test_what_came_before_an_interruption_is_known_without_being_noted(tmp_path: Path) -> None:
    made = Bundle.open(tmp_path)
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "a.deb").write_bytes(b"deb")
    assert made.complete() == []
    assert made.has("packages/a.deb", 3) and not made.has("packages/a.deb", 4) and not made.has("packages/b.deb", 3)


def test_one_bundle_is_for_one_system(bundle: Bundle) -> None:
    bundle.check_system(SYSTEM)
    with pytest.raises(
        SparkfleetError, match=r"is for ubuntu noble aarch64, this host is debian noble aarch64: .*--limit"
    ):
        bundle.check_system({**SYSTEM, "id": "debian"})
    Bundle(bundle.folder).check_system({**SYSTEM, "id": "debian"})  # a new one


def test_what_is_added_later_stays_beside(bundle: Bundle) -> None:
    more = collected(bundle.folder)
    more["image"]["name"], more["packages"] = "other:1", []
    more["files"] = [item for item in more["files"] if not item["name"].startswith("packages/")]
    bundle = fill(bundle, more)
    assert sorted(bundle.images) == [IMAGE, "other:1"]
    assert bundle.packages == ["a"] and bundle.missing_files() == []


# -- who gets it -------------------------------------------------------------------------------------------


def needing(host: str, image: bool = True, model: bool = True) -> Missing:
    return Missing(host, IMAGE, image, REPO, "main", model, not model)


def test_one_spark_gets_the_bundle_and_gives_it_to_all() -> None:
    made = fetch_schedule.schedule([needing("a"), needing("b"), needing("c", image=False)], bundle=True)
    assert list(made.sources) == ["a"]
    assert made.image_from == {"a": "a", "b": "a"}
    assert made.model_from == {"a": "a", "b": "a", "c": "a"}


def test_who_gets_it_gives_what_it_has_itself_as_well() -> None:
    made = fetch_schedule.schedule([needing("a", model=False), needing("b")], bundle=True)
    assert list(made.sources) == ["a"]  # not two, whose ports would be in each other's way
    assert (made.image_from, made.model_from) == ({"a": "a", "b": "a"}, {"b": "a"})


def test_one_alone_gets_it_too() -> None:
    made = fetch_schedule.schedule([needing("a")], bundle=True)
    assert (made.image_from, made.model_from) == ({"a": "a"}, {"a": "a"})
    assert made.summary("a") == []
    assert fetch_schedule.schedule([needing("a", image=False, model=False)], bundle=True).sources == {}


def test_without_sharing_each_gets_it() -> None:
    made = fetch_schedule.schedule([needing("a"), needing("b")], bundle=True, alone=True)
    assert made.image_from == {"a": "a", "b": "b"} and made.model_from == {"a": "a", "b": "b"}


# -- the host's side ---------------------------------------------------------------------------------------


def params(**given: Any) -> dict[str, Any]:
    nothing = {"needed": 0, "largest": 0, "moves": {}, "texts": {}, "links": {}, "packages": False, "source": ""}
    return {**nothing, "user": "", **given}


def entry(name: str, body: bytes) -> dict[str, Any]:
    return {"name": name, "size": len(body), "sha256": hashlib.sha256(body).hexdigest()}


BLOB = f"hub/models--org--model/blobs/{SHA}"


def bring(folder: Path, body: bytes) -> Path:
    """What the login user does."""
    brought = Path(str(bundle_receive.receive(params(), folder)["incoming"]), "0")
    brought.write_bytes(body)
    return brought


def test_files_are_taken_where_they_belong(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    bring(folder, WEIGHTS)
    there = bundle_receive.receive(params(moves={"0": entry(BLOB, WEIGHTS)}, texts={"image/index.json": "{}"}), folder)
    assert there["files"] == {BLOB: SHA}
    assert (folder / BLOB).stat().st_mode & 0o777 == 0o644
    assert os.listdir(str(there["incoming"])) == []  # noqa: PTH208
    (folder / BLOB).write_bytes(b"cut")
    assert bundle_receive.receive(params(), folder)["files"] == {}


def test_who_has_a_file_open_cannot_change_what_is_used(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    with bring(folder, b"good").open("r+b") as still_open:
        bundle_receive.receive(params(moves={"0": entry("packages/a_1_all.deb", b"good")}), folder)
        still_open.write(b"evil")
    assert (folder / "packages/a_1_all.deb").read_bytes() == b"good"


def test_what_is_not_as_bundle_json_says_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    for body in (b"evil", b"goodbye", b"", b"goo"):
        bring(folder, body)
        with pytest.raises(JobError, match=r"a_1_all\.deb does not match bundle\.json") as caught:
            bundle_receive.receive(params(moves={"0": entry("packages/a_1_all.deb", b"good")}), folder)
        assert caught.value.id == "bundle"
        assert not (folder / "packages").exists() and list((folder / ".private").iterdir()) == []


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_a_link_in_the_users_folder_is_never_followed(tmp_path: Path, kind: str) -> None:
    folder, secret = tmp_path / "bundle", tmp_path / "shadow"
    secret.write_bytes(b"root:x")
    secret.chmod(0o600)
    brought = bring(folder, b"")
    brought.unlink()
    if kind == "link":
        brought.symlink_to(secret)
    elif kind == "pipe":
        os.mkfifo(brought)
    else:
        brought.mkdir()
    with pytest.raises((JobError, OSError)):
        bundle_receive.receive(params(moves={"0": entry("packages/a_1_all.deb", b"root:x")}), folder)
    assert secret.stat().st_mode & 0o777 == 0o600
    assert not (folder / "packages").exists()


def test_nothing_is_written_outside(tmp_path: Path) -> None:
    for name in ("../x", "/x", "hub/../../x", "x", ".taken.json", "packages/a\nb"):
        with pytest.raises(JobError, match="outside the bundle"):
            bundle_receive.receive(params(texts={name: ""}), tmp_path / "bundle")
        bring(tmp_path / "bundle", b"1")
        with pytest.raises(JobError, match="outside the bundle"):
            bundle_receive.receive(params(moves={"0": entry(name, b"1")}), tmp_path / "bundle")
    (tmp_path / "x").write_bytes(b"1")
    with pytest.raises(JobError, match="not below"):
        bundle_receive.receive(params(moves={"../../x": entry(BLOB, b"1")}), tmp_path / "bundle")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "x"]


def test_room_is_asked_for_first(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"GB free, the bundle needs 1000000000\.0 GB more") as caught:
        bundle_receive.receive(params(needed=9 * 10**17, largest=10**17), tmp_path / "bundle")
    assert caught.value.id == "disk-full"


def test_a_folder_of_the_host_itself_is_linked_and_packages_are_copied(tmp_path: Path) -> None:
    stick = tmp_path / "usb"
    collected(stick)
    folder = tmp_path / "bundle"
    given = params(
        links={"hub/models--org--model/blobs": str(stick / "hub/models--org--model/blobs")},
        source=str(stick),
        moves={"packages/Packages": entry("packages/Packages", CONTENT["packages/Packages"])},
    )
    for _ in range(2):
        bundle_receive.receive(given, folder)
    assert (folder / BLOB).read_bytes() == WEIGHTS
    assert not (folder / "packages/Packages").is_symlink() and (stick / "packages/Packages").exists()
    (stick / "packages/Packages").write_bytes(b"Package: b\n")
    with pytest.raises(JobError, match="does not match bundle"):
        bundle_receive.receive(given, folder)
    # A later run that carries files itself does not write through what was linked.
    bring(folder, WEIGHTS)
    bundle_receive.receive(params(moves={"0": entry(BLOB, WEIGHTS)}), folder)
    assert not (folder / BLOB).parent.is_symlink()


def test_packages_become_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[tuple[str, ...]] = []

    def apt(*words: str, seconds: float = 0) -> str:
        reported.append(words)
        if "madison" in words:
            return " a | 1 | somewhere\n"
        if "install" in words:
            (tmp_path / "packages" / "a_1_arm64.deb").write_bytes(b"deb")
        return "Package: a\nVersion: 1\n" if words[0] == "dpkg-deb" else ""

    monkeypatch.setattr(bundle_collect, "apt", apt)
    job = Job(tmp_path / "job" / "bundle.json", "bundle", "x")
    job.acquire()
    names, files = bundle_collect.collect_packages({"packages": [["a", "b"]], "folder": str(tmp_path)}, job)
    assert names == ["a"]  # b has no source here
    index = (tmp_path / "packages" / "Packages").read_text()
    assert "Filename: ./a_1_arm64.deb" in index and hashlib.sha256(b"deb").hexdigest() in index
    assert [item["name"] for item in files] == ["packages/a_1_arm64.deb", "packages/Packages"]
    assert any("--download-only" in words and words[-1] == "a" for words in reported)


def test_a_model_that_is_not_complete_is_not_collected(tmp_path: Path) -> None:
    with pytest.raises(JobError) as caught:
        bundle_collect.collect_model({"repo": REPO, "revision": "main", "cache_dir": str(tmp_path)})
    assert caught.value.id == "download-incomplete"


def test_wheels_are_for_the_program_and_its_build() -> None:
    names = [name.partition(">")[0] for name in wheels.requirements()]
    assert {"ansible-core", "huggingface_hub", "hatchling"} <= set(names)
    assert "--python-version" in wheels._platform("aarch64", "3.12")
    assert "manylinux_2_17_aarch64" in wheels._platform("aarch64", "3.12")


def with_wheels(folder: Path) -> Bundle:
    made = Bundle.open(folder)
    (folder / "python").mkdir(parents=True)
    for name in ("a-1-py3-none-any.whl", "b-1-py3-none-any.whl"):
        (folder / "python" / name).write_bytes(f"wheel {name}".encode())
        made.files[f"python/{name}"] = made.entry_of(f"python/{name}")[0]
    made.write()
    return made


@pytest.mark.parametrize("digest", ["sha256:", " ", "SHA256:", "sha256:abc"])
def test_a_digest_that_is_none_accepts_no_bundle(tmp_path: Path, digest: str) -> None:
    """As of a variable of the shell that is not set."""
    folder = tmp_path / "carry"
    made = with_wheels(folder).write()
    with pytest.raises(SparkfleetError, match="sparkfleet_bundle_digest: must be sha256: and 64 hex digits"):
        Bundle.read(folder, digest)
    assert Bundle.read(folder, f" SHA256:{made.upper()} ").files == Bundle.read(folder).files


def test_wheels_are_checked_before_anything_is_installed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "carry"
    digest = with_wheels(folder).write()
    (private := tmp_path / "private").mkdir()
    assert wheels.main([str(folder), f"sha256:{digest}", str(private)]) == 0 and capsys.readouterr().err == ""
    assert {path.name: path.read_bytes() for path in private.iterdir()} == {
        path.name: path.read_bytes() for path in (folder / "python").iterdir()
    }
    (folder / "python" / "b-1-py3-none-any.whl").write_bytes(b"Wheel b-1-py3-none-any.whl")  # of the same size
    (other := tmp_path / "other").mkdir()
    assert wheels.main([str(folder), "", str(other)]) == 2
    printed = capsys.readouterr().err
    assert (
        printed.startswith(f"error: {folder}/python/b-1-py3-none-any.whl does not have the sha256")
        and printed[-1] == "\n"
    )
    assert printed.count("\n") == 1 and "nothing was installed" in printed


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda python: (python / "c-9-py3-none-any.whl").touch(), "python/c-9-py3-none-any.whl is not listed"),
        (lambda python: (python / "index.html").touch(), "python/index.html is not listed"),
        (lambda python: (python / "a-1-py3-none-any.whl").unlink(), "python/a-1-py3-none-any.whl"),
        (lambda python: (python / "a-1-py3-none-any.whl").write_bytes(b"x" * 99), "a-1-py3-none-any.whl: more than"),
        (lambda python: python.rename(python.with_name("other")), "python/a-1-py3-none-any.whl"),
        (lambda python: (python.parent / "bundle.json").unlink(), "no bundle found"),
    ],
)
def test_a_folder_of_wheels_that_is_not_as_listed(tmp_path: Path, change: Any, named: str) -> None:
    with_wheels(tmp_path / "carry")
    change(tmp_path / "carry" / "python")
    with pytest.raises(SparkfleetError) as caught:
        wheels.take(tmp_path / "carry", "", tmp_path)
    assert named in str(caught.value)
    with pytest.raises(SparkfleetError, match="was changed since"):
        wheels.take(with_wheels(tmp_path / "second").folder, "sha256:" + "0" * 64, tmp_path)


@pytest.mark.parametrize("there", ["file", "link"])
def test_a_copy_of_a_wheel_is_a_new_file(tmp_path: Path, there: str) -> None:
    with_wheels(tmp_path / "carry")
    place, outside = tmp_path / "b-1-py3-none-any.whl", tmp_path / "outside"
    place.touch() if there == "file" else place.symlink_to(outside)
    with pytest.raises(SparkfleetError, match="File exists"):
        wheels.take(tmp_path / "carry", "", tmp_path)
    assert not outside.exists()


@pytest.fixture
def setup(tmp_path: Path) -> Callable[[], subprocess.CompletedProcess[str]]:
    """The script itself, in a copy of the repository without an environment; its Python has no packages."""
    root = ROOT
    without = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("meta", "scripts", "src", "plugins/module_utils"):
        shutil.copytree(root / name, tmp_path / "copy" / name, ignore=without)
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(root / name, tmp_path / "copy" / name)
    with_wheels(tmp_path / "carry")
    (tmp_path / "tmp").mkdir()
    environment = {"PATH": os.environ["PATH"], "PYTHONNOUSERSITE": "1", "TMPDIR": str(tmp_path / "tmp")}

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "scripts/setup", str(tmp_path / "carry")],
            cwd=tmp_path / "copy",
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_setup_refuses_an_altered_wheel_before_pip(
    tmp_path: Path, setup: Callable[[], subprocess.CompletedProcess[str]]
) -> None:
    (tmp_path / "carry" / "python" / "a-1-py3-none-any.whl").write_bytes(b"other")
    done = setup()
    assert done.returncode == 2 and f"{tmp_path}/carry/python/a-1-py3-none-any.whl" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "copy" / ".venv").exists()
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("code", [0, 1])
def test_pip_reads_what_was_hashed_though_the_bundle_changes_meanwhile(
    tmp_path: Path, setup: Callable[[], subprocess.CompletedProcess[str]], code: int
) -> None:
    tools = tmp_path / "copy" / ".venv" / "bin"
    tools.mkdir(parents=True)
    pip = f"""#!/usr/bin/env bash
for wheel in {tmp_path}/carry/python/*; do echo evil >"$wheel"; done
while [[ $1 != --find-links ]]; do shift; done
stat -c %a "$2" >{tmp_path}/mode
cp -r "$2" {tmp_path}/seen
exit {code}
"""
    for name, text in (("python", "#!/bin/sh\n"), ("pip", pip)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    done = setup()
    assert done.returncode == code, done.stderr
    seen = {path.name: path.read_text() for path in (tmp_path / "seen").iterdir()}
    assert seen == {name: f"wheel {name}" for name in ("a-1-py3-none-any.whl", "b-1-py3-none-any.whl")}
    assert (tmp_path / "mode").read_text() == "700\n"
    assert list((tmp_path / "tmp").iterdir()) == []


# -- the plan ----------------------------------------------------------------------------------------------


def bundle_for(target: Target, folder: Path, system: dict[str, str]) -> Target:
    made = fill(Bundle.open(folder), system=system)
    made.models = {f"{target.engines[0].card.repo}@{target.engines[0].revision}": made.models[f"{REPO}@main"]}
    return dataclasses.replace(target, bundle=made)


def spark_here() -> dict[str, Any]:
    state = bare()
    state["os"]["codename"] = "noble"
    state["engines"][0].update(hub=None, registry=None)  # neither was asked
    return state


def test_a_bundle_that_has_all_lets_the_plan_go_on(tmp_path: Path) -> None:
    ready = bundle_for(target(), tmp_path, {"id": "ubuntu", "codename": "noble", "machine": "aarch64"})
    made = plan.make(ready, spark_here())
    assert made["findings"] == []
    assert made["prepare"]["packages"] is True
    assert {check["name"]: check["seen"] for check in made["checks"]}["registry"] == "not queried; there is a bundle"


def test_what_a_bundle_lacks_is_one_finding(tmp_path: Path) -> None:
    other = target(image="nvcr.io/nvidia/vllm:25.10-py3", revision="other")
    ready = bundle_for(target(), tmp_path, {"id": "debian", "codename": "trixie", "machine": "aarch64"})
    (tmp_path / "packages" / "a_1_arm64.deb").unlink()
    (finding,) = plan.make(dataclasses.replace(other, bundle=ready.bundle), spark_here())["findings"]
    assert finding["id"] == "bundle"
    for words in (
        "no image nvcr.io/nvidia/vllm:25.10-py3 (it has nvcr.io/nvidia/vllm:25.09-py3)",
        f"no model {other.engines[0].card.repo}@other (it has {other.engines[0].card.repo}@main)",
        "packages for debian trixie aarch64, the host is ubuntu noble aarch64",
        "1 of 6 files missing or cut, such as packages/a_1_arm64.deb",
        "sparkfleet bundle",
    ):
        assert words in finding["message"]


def locked_target(tmp_path: Path, digest: str = DIGEST, sha256: str = SHA, commit: str = COMMIT) -> Target:
    card = target().engines[0].card
    model = lock.Model(commit, {"model.safetensors": lock.File(len(WEIGHTS), sha256)})
    lock.Lock(
        images={IMAGE: lock.Image(digest, "linux/arm64", digest, 1)},
        models={f"{card.repo}@main": model},
        cards={card.name: card.digest},
        path=tmp_path / lock.NAME,
    ).write()
    return target(lock_file=str(tmp_path / lock.NAME))


def bundled(tmp_path: Path, wanted: Target) -> Target:
    """With a bundle that was made without a lock."""
    ready = bundle_for(target(), tmp_path / "carry", {"id": "ubuntu", "codename": "noble", "machine": "aarch64"})
    assert ready.bundle is not None
    repo = wanted.engines[0].card.repo
    text = json.dumps({**LISTING, "repo": repo})
    name = f"hub/.sparkfleet/{cache.repo_folder(repo)}/fetching.json"
    (ready.bundle.folder / name).parent.mkdir(parents=True, exist_ok=True)
    (ready.bundle.folder / name).write_text(text)
    ready.bundle.files[name] = Entry(len(text), hashlib.sha256(text.encode()).hexdigest())
    return dataclasses.replace(wanted, bundle=ready.bundle)


def test_a_bundle_made_without_a_lock_serves_one_that_has_the_same(tmp_path: Path) -> None:
    ready = bundled(tmp_path, locked_target(tmp_path))
    (engine,), carried = ready.engines, ready.bundle
    assert carried is not None and (engine.image, engine.revision) == (f"{IMAGE}@{DIGEST}", COMMIT)
    assert plan.make(ready, spark_here())["findings"] == []
    assert f"image/blobs/sha256/{DIGEST.partition(':')[2]}" in carried.of_fetch([engine.image], [])
    plain = fill(Bundle.open(tmp_path / "plain"))
    assert plain.of_fetch([], [f"{REPO}@{COMMIT}"]) == plain.of_fetch([], [f"{REPO}@main"])
    (entry,) = json.loads(carried.index([engine.image]))["manifests"]
    assert (entry["digest"], entry["annotations"]["org.opencontainers.image.ref.name"]) == (DIGEST, engine.image)
    # Of one that was made with a lock, without it.
    carried.images = {engine.image: carried.images[IMAGE]}
    assert carried.image_key(IMAGE) == engine.image and carried.image_key(f"{IMAGE}x") == ""


def test_a_bundle_that_is_not_what_the_lock_has_is_a_finding(tmp_path: Path) -> None:
    (finding,) = plan.make(bundled(tmp_path, locked_target(tmp_path, sha256="0" * 64)), spark_here())["findings"]
    assert finding["id"] == "lock-mismatch"
    assert f"model.safetensors is sha256:{SHA}" in finding["message"] and "0" * 64 in finding["message"]
    other = bundled(tmp_path, locked_target(tmp_path, digest="sha256:" + "0" * 64, commit="0" * 40))
    (finding,) = plan.make(other, spark_here())["findings"]
    assert finding["id"] == "bundle"
    assert f"no image {IMAGE}@sha256:{'0' * 64} (it has {IMAGE}@{DIGEST})" in finding["message"]
    assert f"@{'0' * 40} (it has {other.engines[0].card.repo}@main ({COMMIT}))" in finding["message"]


def test_a_spark_that_has_all_needs_nothing_of_it(tmp_path: Path) -> None:
    ready = bundle_for(target(), tmp_path, {"id": "debian", "codename": "trixie", "machine": "x86_64"})
    state = fetched()
    state["os"]["codename"] = "noble"
    assert plan.make(ready, state)["findings"] == []


def test_an_image_out_of_a_bundle_is_pinned_as_docker_knows_it() -> None:
    state = fetched()
    mirror = f"127.0.0.1:9111/nvidia/vllm@{DIGEST}"
    state["engines"][0]["image"] |= spark_state.pinned({"RepoDigests": [mirror]})
    service = target().document(state)["services"]["vllm-llama31-8b-fp8"]
    assert service["image"] == mirror
    own = f"nvcr.io/nvidia/vllm@{DIGEST}"
    foreign = "registry.example/copy@sha256:" + "9" * 64
    found = spark_state.pinned({"RepoDigests": [mirror, foreign, own]}, own.partition("@")[0] + ":1")
    assert found["digest"] == own.partition("@")[2]
    state["engines"][0]["image"] |= spark_state.pinned({"RepoDigests": [mirror, own]})
    service = target().document(state)["services"]["vllm-llama31-8b-fp8"]
    assert service["image"] == f"nvcr.io/nvidia/vllm:25.09-py3@{DIGEST}"


def test_a_server_that_downloads_needs_the_internet(bundle: Bundle) -> None:
    with pytest.raises(SparkfleetError, match=r"sparkfleet_model_source: hub needs the internet"):
        target(bundle=str(bundle.folder), model_source="hub")
