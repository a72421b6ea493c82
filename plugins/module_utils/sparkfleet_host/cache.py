# SPDX-License-Identifier: Apache-2.0
"""What a Hugging Face cache folder holds of a model, told from the disk alone.

A model is complete when the manifest that the download wrote last is there and every file it names lies in the
snapshot with the size it names. The manifest is `CACHE/.sparkfleet/models--ORG--NAME/COMMIT.json`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

REPO = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
REVISION = re.compile(r"[A-Za-z0-9_][\w./+-]*")
COMMIT = re.compile(r"[0-9a-f]{40}")


def valid_repo(repo: str) -> bool:
    """Whether `repo` can be a Hub repository: ORG/NAME of letters, digits, `-`, `_` and `.`."""
    return bool(REPO.fullmatch(repo)) and ".." not in repo and "--" not in repo


def valid_revision(revision: str) -> bool:
    """Whether `revision` can be a branch, tag or commit (and stays within `refs/` as a path)."""
    return bool(REVISION.fullmatch(revision)) and ".." not in revision and not revision.endswith("/")


def repo_folder(repo: str) -> str:
    """The cache's folder name of a model: `models--ORG--NAME`."""
    return "--".join(("models", *repo.split("/")))


def manifest_path(cache_dir: str | Path, repo: str, commit: str) -> Path:
    """Where the manifest of a finished download lies."""
    return Path(cache_dir) / ".sparkfleet" / repo_folder(repo) / f"{commit}.json"


def resolve_commit(cache_dir: str | Path, repo: str, revision: str) -> str | None:
    """The commit a revision stands for in this cache: itself, or what `refs/REVISION` says; None if unknown."""
    if COMMIT.fullmatch(revision):
        return revision
    try:
        commit = (Path(cache_dir) / repo_folder(repo) / "refs" / revision).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return commit if COMMIT.fullmatch(commit) else None


def model_state(cache_dir: str | Path, repo: str, revision: str) -> dict[str, Any]:
    """What the cache holds of `repo` at `revision`; reads file sizes only, never their content.

    commit: str | None; complete: bool; bytes: int, those of the model on this disk (all blobs, partial ones
    included, where there is no manifest yet); total_bytes: int | None as the manifest has it; missing: list[str],
    files of the manifest that are absent or of another size; path: str | None of the snapshot, if it exists.
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
        "path": str(snapshot) if snapshot and snapshot.is_dir() else None,
    }
    manifest = _manifest(manifest_path(cache_dir, repo, commit)) if commit else None
    if snapshot is None or manifest is None:
        state["bytes"] = _blob_bytes(folder)
        return state
    for name, wanted in manifest["files"].items():
        size = _size(snapshot / name)
        if size == wanted["size"]:
            state["bytes"] += size
        else:
            state["missing"].append(name)
    state["total_bytes"] = manifest["total_bytes"]
    state["complete"] = bool(manifest["files"]) and not state["missing"]
    return state


def _manifest(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text("utf-8"))
        sizes = [int(entry["size"]) for entry in value["files"].values()]
        return {"files": value["files"], "total_bytes": sum(sizes)}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None  # none, or broken: as good as none, the download checks the files again


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
