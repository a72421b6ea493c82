"""What a download does as root in a folder that others may write to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.cache import mark_suspect, model_state
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.job import Job
from plugins.modules import model_download

from tests.unit.host.test_integrity import COMMIT, REPO, blob, cache, flip  # noqa: F401  a fixture


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names that were given to the owner; every file counts as root's, and the cache as another's."""
    names: list[str] = []
    real = os.stat

    def chown(name: str, uid: int, gid: int, *, dir_fd: int, follow_symlinks: bool) -> None:
        assert not follow_symlinks
        where = os.readlink(f"/proc/self/fd/{dir_fd}")  # noqa: PTH115
        names.append(f"{where}/{name}")

    def stat(path: Any, **more: Any) -> os.stat_result:
        about = list(real(path, **more))
        about[4] = 0
        return os.stat_result(about)

    monkeypatch.setattr(model_download.os, "chown", chown)
    monkeypatch.setattr(model_download.os, "stat", stat)
    return names


class Owned(type(Path())):  # type: ignore[misc]
    """A cache folder of another user."""

    def stat(self, **more: Any) -> os.stat_result:
        about = list(super().stat(**more))
        about[4] = 1000
        return os.stat_result(about)


def test_a_planted_link_gives_nothing_outside_away(given: list[str], tmp_path: Path) -> None:
    outside, hub = tmp_path / "etc", tmp_path / "hf"
    (outside / "deep").mkdir(parents=True)
    (outside / "shadow").write_text("x")
    (outside / "deep" / "key").write_text("x")
    model = hub / "models--acme--tiny"
    (model / "blobs").mkdir(parents=True)
    (model / "blobs" / "a").write_text("x")
    (model / "snapshots").symlink_to(outside)
    (hub / ".locks").symlink_to(outside)
    (hub / ".sparkfleet").mkdir()
    os.link(outside / "shadow", hub / ".sparkfleet" / "hard")
    model_download.give_to_owner(Owned(hub), REPO)
    assert [name for name in given if name.startswith(str(outside))] == []
    assert f"{model}/blobs/a" in given and f"{hub}/models--acme--tiny" in given
    assert f"{hub}/.sparkfleet/hard" not in given  # the same file has a name elsewhere


# -- hashes ----------------------------------------------------------------------------------------------------------


def hashed(cache: Path, tmp_path: Path, check: bool = False) -> dict[str, Any]:  # noqa: F811
    job = Job(tmp_path / "run" / "model.json", "model", REPO)
    job.acquire()
    params = {"cache_dir": str(cache), "repo": REPO, "revision": COMMIT, "check_hashes": check, "weights": True}
    return model_download.hashed(params, model_state(cache, REPO, COMMIT), job)


def test_a_suspect_model_that_is_sound_is_complete_without_a_hub(cache: Path, tmp_path: Path) -> None:  # noqa: F811
    mark_suspect(cache, REPO, COMMIT, "the answer was nonsense")
    assert hashed(cache, tmp_path)["complete"] is True
    assert model_state(cache, REPO, COMMIT)["complete"] is True


def test_damage_of_equal_size_is_found_when_asked_for(cache: Path, tmp_path: Path) -> None:  # noqa: F811
    flip(blob(cache, "w.safetensors"))
    assert hashed(cache, tmp_path)["complete"] is True  # not asked for
    state = hashed(cache, tmp_path, check=True)
    assert state["complete"] is False and "w.safetensors" in state["suspect"]
    assert model_state(cache, REPO, COMMIT)["suspect"]  # also for a run that is cut here
