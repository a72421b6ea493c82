"""The lock of an inventory: its text, what is refused of it, and what a plan takes from it."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sparkfleet_host import bounded, cache

from sparkfleet import SparkfleetError, __version__
from sparkfleet.diagnosis.ansible_errors import explained
from sparkfleet.packaging import debian
from sparkfleet.planning import catalog, lock, plan
from sparkfleet.planning.lock import File, Image, Lock, Model
from sparkfleet.planning.target import EngineSettings, Settings, Target
from tests.unit.planning import test_plan

CARD = catalog.load("llama31-8b-fp8")
KEY = f"{CARD.repo}@main"
COMMIT = test_plan.COMMIT
FILES = {"config.json": File(12, "1" * 64, "2" * 40), "model.safetensors": File(5000, "3" * 64)}


def locked(path: Path = Path(lock.NAME), **more: Any) -> Lock:
    known: dict[str, Any] = {
        "images": {CARD.image: Image(test_plan.DIGEST, "linux/arm64", "sha256:" + "e" * 64, 123)},
        "models": {KEY: Model(COMMIT, FILES, "llama3.1")},
        "cards": {CARD.name: CARD.digest},
    }
    return Lock(**{**known, "path": path, **more})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / lock.NAME
    locked(path).write()
    return path


# -- the text --------------------------------------------------------------------------------------------------------


def test_the_file_can_be_read_by_people_and_others(file: Path) -> None:
    text = file.read_text()
    assert f"\n      model.safetensors: 5000 sha256:{'3' * 64}\n" in text  # a line a file
    assert f"\n      config.json: 12 sha256:{'1' * 64} git:{'2' * 40}\n" in text
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert list(file.parent.iterdir()) == [file]
    assert Lock.read(file) == locked()
    turned = Lock(images={}, models={"a/b@main": Model(COMMIT, dict(reversed(FILES.items())))}).text()
    assert turned == Lock(models={"a/b@main": Model(COMMIT, FILES)}).text()


HEX = st.text("0123456789abcdef", min_size=64, max_size=64)
SIZES = st.integers(0, cache.FILE_BYTES)
NAMES = st.text(min_size=1, max_size=40).filter(bounded.is_repository_path) | st.sampled_from(
    [
        "a: b",
        "'",
        '"',
        "#x",
        "- x",
        "1",
        "1e3",
        "null",
        "yes",
        "2024-01-01",
        "<<",
        "=",
        "a" * 200,
        "ü/é",
        "?",
        "{}",
        "*a",
    ]
)
COMMITS = st.text("0123456789abcdef", min_size=40, max_size=40)
FILE_ENTRIES = st.builds(File, SIZES, HEX, st.just("") | COMMITS)
DIGESTS = HEX.map("sha256:{}".format)
LOCKS = st.builds(
    Lock,
    images=st.dictionaries(
        st.from_regex(r"[a-z]{1,5}\.io/[a-z0-9]{1,8}:[a-z0-9][a-z0-9.]{0,7}", fullmatch=True),
        st.builds(Image, DIGESTS, st.sampled_from(["linux/arm64", "linux/amd64"]), DIGESTS, SIZES),
        max_size=3,
    ),
    models=st.dictionaries(
        st.from_regex(r"[A-Za-z0-9]{1,8}/[A-Za-z0-9]{1,8}@[a-z0-9]{1,8}", fullmatch=True),
        st.builds(
            Model,
            COMMITS,
            st.dictionaries(NAMES, FILE_ENTRIES, min_size=1, max_size=5),
            st.text(st.characters(exclude_categories=["C", "Z"]), max_size=20),
            st.booleans(),
        ),
        max_size=3,
    ),
    cards=st.dictionaries(st.from_regex(r"[a-z0-9.-]{1,12}", fullmatch=True), DIGESTS, max_size=3),
)


@given(LOCKS)
def test_what_is_written_is_read_again(made: Lock) -> None:
    there = Lock.of_text(Path("x"), made.text())
    assert there == made and there.text() == made.text()
    assert Lock.of_text(Path("x"), made.text().replace("\n", "\r\n")) == made  # as Git may check it out


@given(LOCKS, st.data())
def test_whatever_is_changed_is_noticed_or_nothing(made: Lock, data: st.DataObject) -> None:
    """An edit of any character: it is refused with the file's name, or means the same."""
    text = made.text()
    place = data.draw(st.integers(0, len(text) - 1))
    changed = text[:place] + data.draw(st.characters()) + text[place + 1 :]
    try:
        assert Lock.of_text(Path("the-file"), changed) == made
    except SparkfleetError as error:
        assert str(error).startswith("the-file:")


@given(st.text(max_size=300) | st.binary(max_size=100).map(lambda data: data.decode("latin-1")))
def test_what_is_no_lock_is_one_error(text: str) -> None:
    with pytest.raises(SparkfleetError, match="the-file"):
        Lock.of_text(Path("the-file"), text)


@pytest.mark.parametrize(
    ("old", "new", "line", "problem"),
    [
        ("format: 1", "format: 2", "format", "format: 2 is not known here"),
        ("digest: sha256:d", "digest: sha256:D", "digest", "digest: 'sha256:Dd"),
        (f"commit: {COMMIT}", "commit: main", "commit", "commit: 'main' is not valid"),
        ("5000 sha256", "-1 sha256", "model.safetensors", r"must be SIZE sha256:HEX"),
        ("5000 sha256", "5000  sha256", "model.safetensors", r"must be SIZE sha256:HEX"),
        ("config.json:", "../config.json:", "../config.json", r"'../config.json' is not a valid file name"),
        ("size: 123", "size: many", "size", "size: not an integer: 'many'"),
        ("size: 123", "size: 123\n    more: 1", "more", "unknown key"),
        (CARD.image, "not an image", "not an image", "'not an image' is not NAME:TAG"),
        (KEY, "../x@main", "../x@main", "is not ORG/NAME@REVISION"),
        ("size: 123", "size: 124", "seal", r"changed after .* `sparkfleet lock --update`"),
        ("5000 sha256:3", "5000 sha256:4", "seal", "changed after"),
        ("<<<", "", "", ""),
    ],
)
def test_a_damaged_lock_is_one_error_with_its_line(file: Path, old: str, new: str, line: str, problem: str) -> None:
    text = file.read_text()
    if old == "<<<":  # of a merge
        text, old, new, problem = f"<<<<<<< ours\n{text}", "<<<<<<<", "<<<<<<<", "not valid YAML"
    assert old in text
    file.write_text(text.replace(old, new))
    numbers = [number for number, row in enumerate(file.read_text().splitlines(), 1) if f"{line}:" in row]
    with pytest.raises(SparkfleetError, match=problem) as caught:
        Lock.read(file)
    assert len(str(caught.value).splitlines()) == 1
    assert not line or int(str(caught.value).split(":")[1]) in numbers


def test_a_lock_is_read_within_limits(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "LIMIT", 100)
    with pytest.raises(SparkfleetError, match="more than 100 bytes"):
        Lock.read(file)
    with pytest.raises(SparkfleetError, match="does not exist: `sparkfleet lock` writes it"):
        Lock.read(tmp_path / "other.yml")
    with pytest.raises(SparkfleetError, match="cannot be read"):
        Lock.read(tmp_path)


def test_a_lock_that_could_not_be_read_again_is_not_written(file: Path) -> None:
    before = file.read_text()
    many = {f"file-{number}": FILES["config.json"] for number in range(11_000)}
    with pytest.raises(SparkfleetError, match="more than 20000 values"):
        locked(file, models={KEY: Model(COMMIT, many)}).write()
    assert file.read_text() == before


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(SparkfleetError, match=r"cannot be written .*sparkfleet_lock_file names another place"):
        locked(tmp_path / "none" / lock.NAME).write()


def test_the_lock_is_in_the_folder_of_the_inventory(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    hosts = tmp_path / "mine" / "hosts.yml"
    hosts.write_text("")
    place = tmp_path / "mine" / lock.NAME
    assert lock.found([str(hosts), "spark-1,", ""]) == ""
    locked(place).write()
    assert lock.found([str(hosts)]) == lock.found([str(hosts.parent), str(hosts), "spark-1,"]) == str(place)
    other = tmp_path / lock.NAME
    locked(other).write()
    (tmp_path / "more.yml").write_text("")
    with pytest.raises(SparkfleetError, match=r"several locks: .*sparkfleet_lock_file"):
        lock.found([str(hosts), str(tmp_path / "more.yml")])


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (os.mkfifo, "it is no regular file"),
        (os.mkdir, "it is no regular file"),
        (lambda place: place.symlink_to("/dev/null"), "it is no regular file"),
        (lambda place: place.symlink_to(place.name), "Too many levels of symbolic links"),
        (lambda place: place.symlink_to("nowhere"), "No such file or directory"),
    ],
    ids=["pipe", "folder", "device", "loop", "dangling"],
)
def test_a_lock_that_is_no_file_is_not_taken_for_none(tmp_path: Path, make: Callable[[Path], None], why: str) -> None:
    hosts = tmp_path / "hosts.yml"
    hosts.write_text("")
    make(tmp_path / lock.NAME)
    with pytest.raises(SparkfleetError, match=rf"{lock.NAME} cannot be read: {why}: .*{lock.VARIABLE}"):
        lock.found([str(hosts)])


def test_a_lock_may_be_a_link_to_one(file: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "hosts.yml").write_text("")
    place = tmp_path / "mine" / lock.NAME
    place.symlink_to(file)
    assert lock.found([str(place.with_name("hosts.yml"))]) == str(place)


def test_versions_of_packages_are_what_apt_is_to_install(tmp_path: Path) -> None:
    system = {"id": "ubuntu", "codename": "noble", "machine": "aarch64"}
    path = tmp_path / lock.NAME
    known = locked(path, packages={"ubuntu noble aarch64": {"docker.io": "26.1", "earlyoom": "1:2.0~rc1-3"}})
    known.write()
    assert Lock.read(path) == known  # 26.1 and 1:2 are no numbers
    assert known.preferences(system).split("\n\n")[:2] == [
        "Package: docker.io\nPin: version 26.1\nPin-Priority: 1001",
        "Package: docker.io\nPin: release *\nPin-Priority: -1",
    ]
    assert known.preferences({**system, "codename": "jammy"}) == locked().preferences(system) == ""
    assert "packages" not in locked().data()  # the seal of a lock of before is right
    for wrong in ({"ubuntu": {}}, {"ubuntu noble x": {"a b": "1"}}, {"ubuntu noble x": {"ab": "1\nPackage: *"}}):
        Path(path).write_text(dataclasses.replace(known, packages=wrong).text())
        with pytest.raises(SparkfleetError, match=r"packages"):
            Lock.read(path)


@pytest.mark.skipif(not shutil.which("apt-get"), reason="needs apt")
def test_apt_itself_installs_the_version_of_the_lock_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a source with two versions, neither of which need be the newest."""
    for name in ("source", "parts", "lists/partial"):
        (tmp_path / name).mkdir(parents=True)
    entries = [
        f"Package: sf-x\nVersion: {version}\nArchitecture: all\nFilename: ./{version}.deb\nSize: 1\n"
        f"SHA256: {'0' * 64}\n"
        for version in ("1.0", "2.0")
    ]
    (tmp_path / "source" / "Packages").write_text("\n".join(entries))
    (tmp_path / "list").write_text(f"deb [trusted=yes] file:{tmp_path}/source ./\n")
    (tmp_path / "status").touch()
    settings = {
        **{"Dir::Etc::SourceList": "list", "Dir::Etc::SourceParts": "parts", "Dir::Etc::PreferencesParts": "parts"},
        **{"Dir::State::Lists": "lists", "Dir::State::Status": "status", "Dir::Cache": ""},
        "Dir::Etc::Preferences": "preferences",
    }
    lines = [f'{key} "{tmp_path}/{name}";\n' for key, name in settings.items()]
    (tmp_path / "apt.conf").write_text("".join([*lines, 'APT::Sandbox::User "root";\n']))
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    subprocess.run(["apt-get", "-q", "update"], check=True, capture_output=True, timeout=60)
    system = {"id": "ubuntu", "codename": "noble", "machine": "aarch64"}
    chosen = {}
    for version in ("1.0", "2.0", "3.0"):
        known = Lock(packages={debian.system_name(system): {"sf-x": version}})
        (tmp_path / "preferences").write_text(known.preferences(system))
        argv = ["apt-get", "--simulate", "-q", "install", "sf-x"]
        done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=60)
        found = re.search(r"Inst sf-x \((\S+) ", done.stdout)
        chosen[version] = found[1] if found else explained(done.stderr)
    assert (chosen["1.0"], chosen["2.0"]) == ("1.0", "2.0")
    assert "has no installation candidate" in chosen["3.0"] and "`sparkfleet lock --packages HOSTS`" in chosen["3.0"]


# -- what a plan takes from it ---------------------------------------------------------------------------------------


def test_a_plan_takes_digest_and_commit_from_the_lock(file: Path) -> None:
    target = test_plan.target(lock_file=str(file))
    (engine,) = target.engines
    assert (engine.image, engine.revision) == (f"{CARD.image}@{test_plan.DIGEST}", COMMIT)
    assert engine.version == test_plan.target().engines[0].version
    made = plan.make(target, test_plan.prepared())
    assert made["lock"] == str(file)
    assert made["fetch"]["image"] == [f"pull {CARD.image}@{test_plan.DIGEST}"]
    assert plan.make(test_plan.target(), test_plan.prepared())["lock"] == ""


def test_a_lock_changes_nothing_of_what_runs_from_the_same_bytes(file: Path) -> None:
    """The compose file of a Spark that was deployed before there was a lock is the same."""
    state = test_plan.serving()
    state["engines"][0]["model"]["listing"] = cache.listing_digest(locked().models[KEY].expected(False)["files"])
    made = plan.make(test_plan.target(lock_file=str(file)), state)
    assert not made["fetch"]["needed"] and not made["deploy"]["needed"]


def test_a_model_that_is_complete_by_another_list_is_checked_again(file: Path) -> None:
    state = test_plan.serving()
    state["engines"][0]["model"]["listing"] = "other"
    made = plan.make(test_plan.target(lock_file=str(file)), state)
    assert made["fetch"]["model"] == [f"check {CARD.repo} again: the list of its files is not that of the lock"]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"image": "nvcr.io/nvidia/vllm:25.11-py3"}, r"the image nvcr.io/nvidia/vllm:25.11-py3 is not in the lock"),
        ({"revision": "v2"}, r"the model .*@v2 is not in the lock"),
        ({"model": "qwen3-32b-fp8"}, r"the model card qwen3-32b-fp8 is not in the lock"),
        ({"arguments": {"trust_remote_code": True}}, r"the code of .* is not in the lock"),
        ({"model_source": "hub"}, r"sparkfleet_model_source: with hub the engine downloads whatever the Hub has"),
    ],
)
def test_what_is_not_in_the_lock_is_refused(file: Path, settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(SparkfleetError, match=problem) as caught:
        test_plan.target(**settings, lock_file=str(file))
    assert str(file) in str(caught.value)
    assert "model_source" in settings or "`sparkfleet lock` with the same inventory" in str(caught.value)


def test_a_card_that_has_changed_is_refused(file: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yml"
    mine.write_text(f"# A comment changes nothing.\n{CARD.source.read_text()}")
    assert test_plan.target(model=str(mine), lock_file=str(file)).engines[0].revision == COMMIT
    mine.write_text(CARD.source.read_text().replace("max_num_seqs: ", "max_num_seqs: 1"))
    with pytest.raises(SparkfleetError, match=r"the model card llama31-8b-fp8 .* has changed since it was locked"):
        test_plan.target(model=str(mine), lock_file=str(file))


def test_a_model_of_the_hub_has_the_card_of_the_locked_commit(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    def load(model: str) -> catalog.Card:
        loaded.append(model)
        return dataclasses.replace(CARD, repo="acme/tiny", revision=COMMIT)

    monkeypatch.setattr(catalog, "load", load)
    locked(file, models={"acme/tiny@main": Model(COMMIT, FILES)}, cards={}).write()
    (engine,) = test_plan.target(model="acme/tiny", lock_file=str(file)).engines
    assert loaded == [f"acme/tiny@{COMMIT}"] and engine.revision == COMMIT
    with pytest.raises(SparkfleetError, match="the model acme/tiny@v2 is not in the lock"):
        test_plan.target(model="acme/tiny@v2", lock_file=str(file))


def test_several_engines_with_one_lock(file: Path) -> None:
    other = catalog.load("qwen3-8b-fp8")
    both = locked(file)
    locked(
        file,
        images={**both.images, other.image: both.images[CARD.image]},
        models={**both.models, f"{other.repo}@main": Model("b" * 40, FILES)},
        cards={**both.cards, other.name: other.digest},
    ).write()
    engines = (EngineSettings(CARD.name), EngineSettings(other.name, port=8001))
    made = Target.of(Settings(engines=engines, lock_file=str(file)))
    assert [engine.revision for engine in made.engines] == [COMMIT, "b" * 40]


@pytest.mark.parametrize(
    ("platform", "refused"), [("linux/amd64", True), ("linux/arm64", False), ("linux/unknown", False)]
)
def test_an_image_for_another_processor_is_refused_before_it_is_pulled(
    file: Path, platform: str, refused: bool
) -> None:
    image = dataclasses.replace(locked().images[CARD.image], platform=platform)
    locked(file, images={CARD.image: image}).write()
    found = plan.make(test_plan.target(lock_file=str(file)), test_plan.prepared())["findings"]
    assert [finding["id"] for finding in found] == (["image-platform"] if refused else [])


def test_a_lock_makes_code_of_the_repository_one_that_was_reviewed(file: Path) -> None:
    files = {**FILES, "modeling.py": File(4, "5" * 64, "6" * 40)}
    locked(file, models={KEY: Model(COMMIT, files, code=True)}).write()
    target = test_plan.target(arguments={"trust_remote_code": True}, lock_file=str(file))
    assert plan.make(target, test_plan.prepared())["findings"] == []
    (engine,) = target.engines
    assert engine.locked is not None and "modeling.py" in engine.locked.expected(True)["files"]
    assert "modeling.py" not in engine.locked.expected(False)["files"]


def test_a_lock_of_another_version_is_noted(file: Path) -> None:
    locked(file, sparkfleet="0.0.1").write()
    (note,) = (
        line for line in plan.notes(test_plan.target(lock_file=str(file)), test_plan.fetched()) if "lock" in line
    )
    assert f"written by Sparkfleet 0.0.1, this is {__version__}" in note


def test_a_model_that_drafts_is_locked_as_well(tmp_path: Path) -> None:
    card = catalog.load("gemma4-31b-nvfp4")
    known = {
        "images": {card.image: Image(test_plan.DIGEST, "linux/arm64", "sha256:" + "e" * 64, 123)},
        "models": {f"{card.repo}@main": Model(COMMIT, FILES)},
        "cards": {card.name: card.digest},
    }
    path = tmp_path / lock.NAME
    Lock(**known, path=path).write()  # type: ignore[arg-type]
    settings = Settings(model=card.name, operator="nvidia", lock_file=str(path))
    with pytest.raises(SparkfleetError, match=f"the model {test_plan.DRAFT}@main is not in the lock"):
        Target.of(settings)
    known["models"] |= {f"{test_plan.DRAFT}@main": Model("d" * 40, FILES)}
    Lock(**known, path=path).write()  # type: ignore[arg-type]
    goal = Target.of(settings)
    own, draft = goal.engines[0].models
    assert (own.revision, draft.revision) == (COMMIT, "d" * 40)
    # One that is complete by another list is checked against the lock before it drafts.
    found = {"commit": "d" * 40, "complete": True, "bytes": 1, "listing": "other"}
    state = test_plan.drafting(draft=found)
    state["engines"][0]["model"]["listing"] = cache.listing_digest(own.locked.expected(False)["files"], False)  # type: ignore[union-attr]
    made = plan.make(goal, state)
    assert [one["fetch_model"] for one in made["fetches"]] == [False, True]
    assert f"check the draft {test_plan.DRAFT} again" in made["fetch"]["model"][0]
