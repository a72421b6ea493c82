"""What the disk alone says about a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import bounded
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.cache import (
    check_listing,
    clear_suspicion,
    damaged_files,
    difference,
    listing_digest,
    manifest_path,
    mark_suspect,
    model_state,
    read_manifest,
    repo_folder,
    repo_of,
    resolve_commit,
    suspect_path,
    suspicion,
    valid_repo,
    valid_revision,
)

REPO, COMMIT = "acme/tiny", "a" * 40


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A complete model of two files, 3 + 5 bytes."""
    folder = tmp_path / repo_folder(REPO)
    snapshot = folder / "snapshots" / COMMIT
    (snapshot / "sub").mkdir(parents=True)
    (folder / "blobs").mkdir()
    (folder / "blobs" / "b1").write_bytes(b"abc")
    (snapshot / "one").symlink_to("../../blobs/b1")
    (snapshot / "sub" / "two").write_bytes(b"defgh")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    manifest = manifest_path(tmp_path, REPO, COMMIT)
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"files": {"one": {"size": 3}, "sub/two": {"size": 5}}}))
    return tmp_path


@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_complete(cache: Path, revision: str) -> None:
    assert model_state(cache, REPO, revision) == {
        "commit": COMMIT,
        "complete": True,
        "bytes": 8,
        "total_bytes": 8,
        "missing": [],
        "listing": listing_digest({"one": {"size": 3}, "sub/two": {"size": 5}}),
        "suspect": "",
        "config": True,
        "path": str(cache / repo_folder(REPO) / "snapshots" / COMMIT),
    }


def test_absent_model_and_revision(cache: Path) -> None:
    nothing = model_state(cache, "acme/other", "main")
    assert (nothing["commit"], nothing["complete"], nothing["bytes"], nothing["path"]) == (None, False, 0, None)
    assert model_state(cache, REPO, "v2")["complete"] is False


def test_link_without_its_blob_is_missing(cache: Path) -> None:
    (cache / repo_folder(REPO) / "blobs" / "b1").unlink()
    state = model_state(cache, REPO, "main")
    assert (state["complete"], state["missing"], state["bytes"]) == (False, ["one"], 5)


def test_other_size_is_missing(cache: Path) -> None:
    (cache / repo_folder(REPO) / "snapshots" / COMMIT / "sub" / "two").write_bytes(b"d")
    assert model_state(cache, REPO, "main")["missing"] == ["sub/two"]


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}", '{"files": {}}', '{"files": {"one": 3}}'])
def test_no_or_broken_manifest_is_incomplete_and_counts_blobs(cache: Path, text: str | None) -> None:
    manifest = manifest_path(cache, REPO, COMMIT)
    if text is None:
        manifest.unlink()
    else:
        manifest.write_text(text)
    (cache / repo_folder(REPO) / "blobs" / "b2.incomplete").write_bytes(b"1234")
    state = model_state(cache, REPO, "main")
    assert state["complete"] is False
    assert state["bytes"] == (0 if text == '{"files": {}}' else 7)


def test_broken_ref_is_no_commit(cache: Path) -> None:
    (cache / repo_folder(REPO) / "refs" / "main").write_text("")
    assert resolve_commit(cache, REPO, "main") is None


@pytest.mark.parametrize("repo", ["acme/../x", "/etc/passwd", "a/b/c", "", "a b/c", "acme/--x", "-a/b"])
def test_bad_repositories(repo: str) -> None:
    assert not valid_repo(repo)


@pytest.mark.parametrize("revision", ["../main", "a/../../b", "", "/x", "x/", "a b", "-x"])
def test_bad_revisions(revision: str) -> None:
    assert not valid_revision(revision)


def test_good_names() -> None:
    assert valid_repo("nvidia/Llama-3.1-8B-Instruct-FP8")
    assert all(valid_revision(name) for name in ("main", "refs/pr/1", "v1.0", COMMIT))


@pytest.mark.parametrize("name", ["config.json", ".gitattributes", "a/b c.txt", "图.png", "x" * 255])
def test_names_of_files_that_a_repository_may_have(name: str) -> None:
    assert bounded.is_repository_path(name)


@pytest.mark.parametrize(
    "name",
    ["", "/etc/passwd", "../x", "a/../b", "a//b", "a/", ".git/config", "a/.GIT/x", "a\\b", "a\nb", "x" * 256, 5, None,
     "/".join("a" * 17), "\x1b[2J", ".", " a", "\udc80"],
)  # fmt: skip
def test_names_that_no_file_of_a_repository_has(name: object) -> None:
    assert not bounded.is_repository_path(name)


def test_a_folder_names_its_model() -> None:
    assert repo_of(repo_folder("acme/tiny")) == "acme/tiny"
    assert repo_of("models--gpt2") == "gpt2"
    for name in ("datasets--a--b", "models--..--..", "models--a--b--c", "models--", "version.txt"):
        assert repo_of(name) is None


# -- who may write to the cache is not trusted -----------------------------------------------------------------------


@pytest.mark.parametrize("link", [True, False], ids=["a link", "the file itself"])
def test_no_content_of_a_file_that_is_no_manifest_is_shown(cache: Path, tmp_path: Path, link: bool) -> None:
    secret, path = tmp_path / "hf_token", manifest_path(cache, REPO, COMMIT)
    secret.write_text("hf_Secret0123\n", encoding="ascii")
    path.unlink()
    path.symlink_to(secret) if link else path.write_bytes(secret.read_bytes())
    with pytest.raises((OSError, bounded.BoundsError)) as refused:
        read_manifest(path)
    assert "hf_Secret" not in str(refused.value)
    mark = suspect_path(cache, REPO, COMMIT)
    mark.symlink_to(secret) if link else mark.write_bytes(secret.read_bytes())
    assert suspicion(cache, REPO, COMMIT) == "marked" and damaged_files(cache, REPO, COMMIT) == []
    with pytest.raises(bounded.BoundsError) as broken:
        bounded.read_json(secret)
    assert "hf_Secret" not in str(broken.value)


@pytest.mark.parametrize("letter", ["\u00e9", "\u56fe", "\U0001f600", '"'])
def test_a_mark_with_many_long_names_can_be_read_again(cache: Path, letter: str) -> None:
    part = letter * (240 // len(letter.encode()))
    names = ["/".join([f"{index:04}{part}"] * (1024 // (len(part) + 5))) for index in range(1000)]
    assert bounded.is_repository_path(names[-1]) and mark_suspect(cache, REPO, COMMIT, "why", names)
    found = damaged_files(cache, REPO, COMMIT)
    assert len(found) > 100 and found == names[: len(found)] and suspicion(cache, REPO, COMMIT) == "why"


def test_a_mark_is_written_and_removed_in_the_cache_alone(cache: Path, tmp_path: Path) -> None:
    assert mark_suspect(cache, REPO, COMMIT, "why", ["one"]) and suspicion(cache, REPO, COMMIT) == "why"
    clear_suspicion(cache, REPO, COMMIT)
    clear_suspicion(cache, REPO, COMMIT)
    assert suspicion(cache, REPO, COMMIT) == ""
    folder, outside = manifest_path(cache, REPO, COMMIT).parent, tmp_path / "outside"
    folder.rename(outside)
    folder.symlink_to(outside)
    name = suspect_path(cache, REPO, COMMIT).name
    before = {path.name for path in outside.iterdir()}
    assert not mark_suspect(cache, REPO, COMMIT, "why")
    assert {path.name for path in outside.iterdir()} == before
    (outside / name).write_text("{}")
    with pytest.raises(OSError, match=repo_folder(REPO)):
        clear_suspicion(cache, REPO, COMMIT)
    assert (outside / name).exists()


ONE, OTHER = "1" * 64, "2" * 64


def listing(**files: Mapping[str, object]) -> dict[str, object]:
    return {"commit": COMMIT, "files": {name.replace("_", "."): {"size": 3, **entry} for name, entry in files.items()}}


def test_lists_are_told_apart_by_names_sizes_and_hashes_alone() -> None:
    of_hub = {"a": {"size": 3, "sha1": "1" * 40}, "b": {"size": 4, "sha256": ONE}}
    of_lock = {"b": {"sha256": ONE, "size": 4}, "a": {"size": 3, "sha1": "1" * 40, "sha256": OTHER}}
    assert listing_digest(of_hub) == listing_digest(of_lock)
    for name, change in (("a", {"size": 4}), ("a", {"sha1": "2" * 40}), ("b", {"sha256": OTHER})):
        assert listing_digest({**of_hub, name: {**of_hub[name], **change}}) != listing_digest(of_hub)
    assert listing_digest({"b": of_hub["b"]}) != listing_digest(of_hub)
    code = {**of_hub, "modeling.py": {"size": 1, "sha1": "3" * 40}}
    assert listing_digest(code) == listing_digest(of_hub) and listing_digest(code, True) != listing_digest(of_hub, True)


def test_the_difference_to_a_lock_is_in_the_hash_that_the_hub_names() -> None:
    locked = listing(a_json={"sha1": "1" * 40, "sha256": ONE}, w={"sha256": OTHER})
    assert difference(locked, listing(a_json={"sha1": "1" * 40}, w={"sha256": OTHER})) == ""
    wrong = difference(locked, listing(a_json={"sha1": "2" * 40}, w={"sha256": OTHER}))
    assert wrong == f"a.json is sha1:{'2' * 40} (3 bytes) instead of sha1:{'1' * 40} (3 bytes)"
    # A file that Git's hash named does not pass by another kind of hash.
    assert difference(locked, listing(a_json={"sha256": ONE}, w={"sha256": OTHER}))


def test_both_hashes_of_an_entry_are_checked() -> None:
    for kind in ("sha1", "sha256"):
        entry = {"size": 1, "sha1": "1" * 40, "sha256": ONE, kind: "x"}
        with pytest.raises(bounded.BoundsError, match=kind):
            check_listing({"files": {"a": entry}}, "what")
