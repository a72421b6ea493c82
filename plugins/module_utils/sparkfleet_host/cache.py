# SPDX-License-Identifier: Apache-2.0
"""What a Hugging Face cache folder holds of a model, from the disk alone.

A model is complete when the manifest that the download wrote last is there, every file it names lies in the snapshot
with the size it names, and it is not marked as suspect. Below `CACHE/.sparkfleet/models--ORG--NAME/`:

    COMMIT.json           the manifest of a finished download
    COMMIT.config.json    the list of what was downloaded without weights, for a trial: such a model is not complete
    COMMIT.suspect.json   why its files are to be hashed before they are used again (see `mark_suspect`)
    fetching.json         the list of a download that is under way
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import bounded
from .bounded import COMMIT, REPO, REVISION, SHA256, BoundsError

FOLDER = ".sparkfleet"
MANIFEST_BYTES = 16 << 20
MOST_FILES = 20_000
FILE_BYTES = 2 << 40  # of a file of a model: more than any has
MARK_BYTES = bounded.STATE_FILE // 4  # of names in a mark, so that it can be read again however JSON escapes them
#: Files with weights, by their ends.
WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".onnx", ".onnx_data", ".tflite"),
    *(".gguf", ".npz"),
)
CODE = ".py"  # what vLLM runs of a model with trust_remote_code alone


def valid_repo(repo: Any) -> bool:
    """Whether `repo` can be a Hub repository: ORG/NAME of letters, digits, `-`, `_` and `.`."""
    return isinstance(repo, str) and bool(REPO.fullmatch(repo)) and ".." not in repo and "--" not in repo


def valid_revision(revision: Any) -> bool:
    """Whether `revision` can be a branch, tag or commit (and stays within `refs/` as a path)."""
    return (
        isinstance(revision, str)
        and bool(REVISION.fullmatch(revision))
        and ".." not in revision
        and not revision.endswith("/")
    )


def repo_folder(repo: str) -> str:
    """The cache's folder name of a model: `models--ORG--NAME`."""
    return "--".join(("models", *repo.split("/")))


def repo_of(folder: str) -> str | None:
    """The model of a cache folder's name, None for another folder: the reverse of `repo_folder`."""
    kind, _, name = folder.partition("--")
    repo = name.replace("--", "/", 1)
    return repo if kind == "models" and valid_repo(repo) and repo_folder(repo) == folder else None


def manifest_path(cache_dir: str | Path, repo: str, commit: str) -> Path:
    """Where the manifest of a finished download lies."""
    return Path(cache_dir) / FOLDER / repo_folder(repo) / f"{commit}.json"


def suspect_path(cache_dir: str | Path, repo: str, commit: str) -> Path:
    """Where it lies that a model's files are to be hashed before they are used again."""
    return manifest_path(cache_dir, repo, commit).with_name(f"{commit}.suspect.json")


def config_path(cache_dir: str | Path, repo: str, commit: str) -> Path:
    """Where it lies what was downloaded of a model without its weights."""
    return manifest_path(cache_dir, repo, commit).with_name(f"{commit}.config.json")


def is_weights(name: str) -> bool:
    """Whether a file of a model has weights."""
    return name.lower().endswith(WEIGHTS)


# -- manifests -------------------------------------------------------------------------------------------------------


def check_listing(value: Any, what: str) -> dict[str, Any]:
    """The list of a model's files from a Hub, a peer, a bundle or the disk: {"files": {name: {"size", "sha256" |
    "sha1"}}, …}. Names, sizes and hashes are of the form they must have. Raises BoundsError, which names `what`."""
    listing = bounded.as_dict(value, what)
    files = bounded.as_dict(listing.get("files"), f"{what}: files")
    if len(files) > MOST_FILES:
        raise BoundsError(f"{what}: more than {MOST_FILES} files")
    for name, item in files.items():
        if not bounded.is_repository_path(name):
            raise BoundsError(f"{what}: {bounded.printable(repr(name), 120)} is not a valid file name")
        entry = bounded.as_dict(item, f"{what}: {name}")
        bounded.as_int(entry.get("size"), f"{what}: size of {name}", 0, FILE_BYTES)
        if "sha256" in entry:
            bounded.matched(SHA256, entry["sha256"], f"{what}: sha256 of {name}")
        if "sha1" in entry:
            bounded.matched(COMMIT, entry["sha1"], f"{what}: sha1 of {name}")
    for key, pattern in (("commit", COMMIT), ("repo", REPO), ("revision", REVISION)):
        if key in listing:
            bounded.matched(pattern, listing[key], f"{what}: {key}")
    return listing


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest, checked, with `total_bytes` counted. Raises OSError and BoundsError."""
    listing = check_listing(_read_below(path, MANIFEST_BYTES), str(path))
    return {**listing, "total_bytes": sum(entry["size"] for entry in listing["files"].values())}


def _read_below(path: Path, limit: int = bounded.STATE_FILE) -> Any:
    """The JSON in CACHE/FOLDER/MODEL/NAME. Others may write to the cache: no link in it is followed, and an error shows
    nothing of the content. Raises OSError and BoundsError."""
    with bounded.open_below(path.parents[2], *path.parts[-3:]) as file:
        return bounded.parse_json(file.read(limit + 1), str(path), limit, quote=False)


def _open_folder(cache_dir: str | Path, repo: str) -> int:
    """The folder CACHE/FOLDER/MODEL, opened without following a link in the cache. Raises OSError."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    folder = os.open(cache_dir, flags)  # may itself be a link of the operator's
    for name in (FOLDER, repo_folder(repo)):
        try:
            inner = os.open(name, flags | os.O_NOFOLLOW, dir_fd=folder)
        finally:
            os.close(folder)
        folder = inner
    return folder


def difference(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Where `found` ({"commit", "files"} of a Hub, a peer or a bundle) is not what the controller's list has: the first
    file and both values, or "". Both lists have passed `check_listing`."""
    if found["commit"] != expected["commit"]:
        return f"commit {found['commit']} instead of {expected['commit']}"
    for name in sorted({*expected["files"], *found["files"]}):
        sides = [side["files"].get(name) for side in (found, expected)]
        kind = min(map(_named_by, filter(None, sides)))
        offered, wanted = (_entry(entry, kind) for entry in sides)
        if offered != wanted:
            return f"{bounded.printable(name, 120)} is {offered} instead of {wanted}"
    return ""


def _entry(entry: Mapping[str, Any] | None, kind: str) -> str:
    if entry is None:
        return "no file"
    return f"{kind}:{entry.get(kind, 'unknown')} ({entry['size']} bytes)"


def _named_by(entry: Mapping[str, Any] | None) -> str:
    """The kind of hash by which the Hub names a file: Git's sha1, also where a lock adds the sha256."""
    return "sha1" if entry is not None and "sha1" in entry else "sha256"


def listing_digest(files: Mapping[str, Mapping[str, Any]], remote_code: bool = False) -> str:
    """sha256 of the names, sizes and hashes of a list's files, by which two lists can be compared; without code, unless
    the engine runs it."""
    lines = [
        f"{name}\0{entry['size']}\0{entry.get(_named_by(entry), '')}\n"
        for name, entry in sorted(files.items())
        if remote_code or not name.endswith(CODE)
    ]
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogatepass")).hexdigest()


def was_downloaded(listing: Mapping[str, Any]) -> bool:
    """Whether Sparkfleet downloaded a model, according to its own list. One that it only found and checked is not its
    own."""
    return "files" in listing and listing.get("downloaded_bytes", 1) != 0


def finished(cache_dir: str | Path) -> Iterator[tuple[str, str]]:
    """(repo, commit) of each manifest in a cache, damaged ones included, in no order. Others may write to the cache:
    there may be any number of them."""
    for folder in _names(Path(cache_dir, FOLDER)):
        repo = repo_of(folder)
        for name in _names(Path(cache_dir, FOLDER, folder)) if repo else ():
            commit = name.removesuffix(".json")
            if repo and commit != name and COMMIT.fullmatch(commit):
                yield repo, commit


def _names(folder: Path) -> Iterator[str]:
    """What is in a folder, one at a time."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            yield entry.name


# -- suspicion -------------------------------------------------------------------------------------------------------


def mark_suspect(cache_dir: str | Path, repo: str, commit: str, reason: str, files: Sequence[str] = ()) -> bool:
    """Note that the files of a model are to be hashed before they are used again: the model then counts as not
    complete, the next fetch hashes all of it and replaces what is damaged. False where it could not be noted (a
    read-only cache, no such model). `files`: names that are known to be damaged; without any, those of a mark that is
    there already stay."""
    path = suspect_path(cache_dir, repo, commit)
    note = {
        "reason": reason[:400],
        "files": bounded.fitting(list(files) or damaged_files(cache_dir, repo, commit), 1000, MARK_BYTES),
        "at": int(time.time()),
    }
    scratch = f".{path.name}.{os.getpid()}"
    try:
        folder = _open_folder(cache_dir, repo)
    except OSError:
        return False
    try:
        # Root writes where others may: in this folder, whatever its name leads to meanwhile.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(scratch, dir_fd=folder)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        handle = os.open(scratch, flags, 0o644, dir_fd=folder)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            os.fchmod(handle, 0o644)
            file.write(json.dumps(note) + "\n")
        os.replace(scratch, path.name, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(scratch, dir_fd=folder)
        return False
    finally:
        os.close(folder)
    return True


def suspicion(cache_dir: str | Path, repo: str, commit: str) -> str:
    """Why a model's files are to be hashed; "" for no reason."""
    path = suspect_path(cache_dir, repo, commit)
    try:
        note = bounded.as_dict(_read_below(path), str(path))
        return bounded.printable(str(note.get("reason") or "marked"), 400)
    except FileNotFoundError:
        return ""
    except (OSError, BoundsError):
        return "marked"  # that it is there is enough


def damaged_files(cache_dir: str | Path, repo: str, commit: str) -> list[str]:
    """Names of a model's files that were found damaged and neither replaced nor found sound since. A mark without names
    is a suspicion, no finding."""
    try:
        path = suspect_path(cache_dir, repo, commit)
        names = bounded.as_dict(_read_below(path), str(path)).get("files")
    except (OSError, BoundsError):
        return []
    return [name for name in names if bounded.is_repository_path(name)] if isinstance(names, list) else []


def clear_suspicion(cache_dir: str | Path, repo: str, commit: str) -> None:
    """Forget the mark, once all files were hashed. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        folder = _open_folder(cache_dir, repo)
        try:
            os.unlink(suspect_path(cache_dir, repo, commit).name, dir_fd=folder)
        finally:
            os.close(folder)


# -- state -----------------------------------------------------------------------------------------------------------


def resolve_commit(cache_dir: str | Path, repo: str, revision: str) -> str | None:
    """The commit a revision stands for in this cache: itself, or what `refs/REVISION` says; None if unknown."""
    if COMMIT.fullmatch(revision):
        return revision
    try:
        data = bounded.read_file(Path(cache_dir) / repo_folder(repo) / "refs" / revision, 4096)
        commit = data.decode("ascii").strip()
    except (OSError, ValueError):
        return None
    return commit if COMMIT.fullmatch(commit) else None


def model_state(cache_dir: str | Path, repo: str, revision: str, remote_code: bool = False) -> dict[str, Any]:
    """What the cache holds of `repo` at `revision`; reads file sizes only, never their content. With `remote_code` one
    that was fetched without the code of its repository is not complete.

    commit: str | None; complete: bool; bytes: int, those of the model on this disk (all blobs, partial ones
    included, where the manifest is missing yet); total_bytes: int | None as the manifest has it; missing: list[str],
    files of the manifest that are absent or of another size; suspect: str, why its files are to be hashed before they
    are used again; config: bool, whether all but the weights is there; listing: str, the `listing_digest` of the
    manifest; path: str | None of the snapshot, if it exists.
    """
    commit = resolve_commit(cache_dir, repo, revision)
    folder = Path(cache_dir) / repo_folder(repo)
    snapshot = folder / "snapshots" / commit if commit else None
    state: dict[str, Any] = {
        "commit": commit,
        "complete": False,
        "bytes": 0,
        "total_bytes": None,
        "missing": [],
        "listing": "",
        "suspect": suspicion(cache_dir, repo, commit) if commit else "",
        "config": False,
        "path": str(snapshot) if snapshot and snapshot.is_dir() else None,
    }
    try:
        manifest = read_manifest(manifest_path(cache_dir, repo, commit or ""))
    except (OSError, BoundsError):
        manifest = None  # none, or damaged: as good as none, the download checks the files again
    if snapshot is None or manifest is None:
        state["bytes"] = _blob_bytes(folder)
        state["config"] = bool(snapshot and commit) and _has_config(cache_dir, repo, str(commit), folder, remote_code)
        return state
    for name, wanted in manifest["files"].items():
        size = _size(snapshot / name)
        if size == wanted["size"]:
            state["bytes"] += size
        else:
            state["missing"].append(name)
    state["total_bytes"] = manifest["total_bytes"]
    state["listing"] = listing_digest(manifest["files"], remote_code)
    # A list of an earlier version says nothing of the code, and has it.
    enough = not remote_code or manifest.get("remote_code", True) is not False
    state["complete"] = bool(manifest["files"]) and enough and not state["missing"] and not state["suspect"]
    state["config"] = bool(manifest["files"]) and enough and all(map(is_weights, state["missing"]))
    return state


def _has_config(cache_dir: str | Path, repo: str, commit: str, folder: Path, remote_code: bool) -> bool:
    """Whether all is there that was downloaded without weights."""
    try:
        listing = read_manifest(config_path(cache_dir, repo, commit))
    except (OSError, BoundsError):
        return False
    enough = not remote_code or listing.get("remote_code") is True
    files = listing["files"].items()
    return enough and all(_size(folder / "snapshots" / commit / name) == entry["size"] for name, entry in files)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _blob_bytes(folder: Path) -> int:
    try:
        return sum(_size(blob) or 0 for blob in (folder / "blobs").iterdir())
    except OSError:
        return 0
