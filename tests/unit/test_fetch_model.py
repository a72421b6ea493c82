"""The download itself: the packed client, run as on a Spark, against a Hub in this process."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.sparkfleet_host.cache import manifest_path, model_state

from sparkfleet import hub_client
from tests.unit.fake_hub import Hub, serve

SHARD = random.Random(1).randbytes(3_000_000)  # noqa: S311


@pytest.fixture(scope="session")
def client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub_client.build(tmp_path_factory.mktemp("client"))


@pytest.fixture
def hub() -> Iterator[Hub]:
    files = {
        "config.json": b'{"a": 1}',
        "sub/notes.txt": b"hello",
        "model-1.safetensors": SHARD,
        "model-2.safetensors": SHARD[::-1],
        "original/weights.pth": b"x" * 1000,
    }
    with serve(Hub(files=files, large=("model-1.safetensors", "model-2.safetensors"))) as served:
        yield served


def start(client: Path, hub: Hub, cache: Path, *more: str, token: Path | None = None) -> subprocess.Popen[str]:
    environment = {"HF_ENDPOINT": hub.url, "HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    environment["HF_TOKEN_PATH"] = str(token or cache / "none")
    given = {"--repo": hub.repo, "--revision": "main", "--cache-dir": str(cache)}
    given.update(zip(more[::2], more[1::2], strict=True))
    argv = [sys.executable, "-I", "-B", "-S", str(client), *(word for pair in given.items() for word in pair)]
    return subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def fetch(client: Path, hub: Hub, cache: Path, *more: str, token: Path | None = None) -> list[dict[str, Any]]:
    process = start(client, hub, cache, *more, token=token)
    out, err = process.communicate(timeout=60)
    lines = [json.loads(line) for line in out.splitlines()]
    assert lines, err
    assert process.returncode == (0 if "result" in lines[-1] else 1)
    return lines


def test_downloads_checks_and_writes_the_manifest(client: Path, hub: Hub, tmp_path: Path) -> None:
    lines = fetch(client, hub, tmp_path)
    size = sum(len(content) for name, content in hub.files.items() if name != "original/weights.pth")
    assert lines[-1]["result"] == {
        "commit": hub.commit,
        "path": str(tmp_path / "models--acme--tiny/snapshots" / hub.commit),
        "files": 4,
        "bytes": size,
        "downloaded": size,
    }
    progress = [line["progress"] for line in lines[:-1]]
    assert {"phase": "downloading", "done": size, "total": size} in progress
    assert progress[-1] == {"phase": "checking", "done": size, "total": size}
    state = model_state(tmp_path, hub.repo, "main")
    assert (state["complete"], state["commit"], state["bytes"], state["missing"]) == (True, hub.commit, size, [])
    snapshot = Path(state["path"])
    assert (snapshot / "model-1.safetensors").read_bytes() == SHARD
    assert (snapshot / "model-1.safetensors").is_symlink()
    assert not (snapshot / "original").exists()
    assert json.loads(manifest_path(tmp_path, hub.repo, hub.commit).read_text())["files"]["config.json"] == {
        "size": 8,
        "sha1": hub.hash("config.json"),
    }


def test_without_safetensors_nothing_is_ignored(client: Path, hub: Hub, tmp_path: Path) -> None:
    hub.files = {"config.json": b"{}", "original/weights.pth": b"x" * 1000}
    assert fetch(client, hub, tmp_path)[-1]["result"]["files"] == 2


def test_patterns_are_obeyed(client: Path, hub: Hub, tmp_path: Path) -> None:
    result = fetch(client, hub, tmp_path, "--allow", "*.json", "--ignore", "sub/*")[-1]["result"]
    assert result["files"] == 1


def test_killed_half_way_resumes_where_it_was(client: Path, hub: Hub, tmp_path: Path) -> None:
    hub.rate = 2_000_000
    process = start(client, hub, tmp_path)
    partial = tmp_path / "models--acme--tiny/blobs" / f"{hub.hash('model-1.safetensors')}.incomplete"
    deadline = time.monotonic() + 20
    while not (partial.exists() and partial.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    had = partial.stat().st_size
    assert 0 < had < len(SHARD)
    hub.rate = 0
    hub.asked.clear()
    result = fetch(client, hub, tmp_path)[-1]["result"]
    assert hub.gets("model-1.safetensors") == [f"bytes={had}-"]
    assert result["downloaded"] <= result["bytes"] - had
    assert (Path(result["path"]) / "model-1.safetensors").read_bytes() == SHARD


def test_partial_file_of_an_interrupted_hf_download_is_used(client: Path, hub: Hub, tmp_path: Path) -> None:
    blobs = tmp_path / "models--acme--tiny/blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{hub.hash('model-1.safetensors')}.0badcafe.incomplete").write_bytes(SHARD[:1_000_000])
    (blobs / "other.incomplete").write_bytes(b"another model's")
    fetch(client, hub, tmp_path)
    assert hub.gets("model-1.safetensors") == ["bytes=1000000-"]
    assert sorted(path.name for path in blobs.glob("*.incomplete")) == ["other.incomplete"]


def test_connection_cut_is_resumed_within_a_run(client: Path, hub: Hub, tmp_path: Path) -> None:
    hub.cut_at["model-2.safetensors"] = 1_500_000
    assert "result" in fetch(client, hub, tmp_path)[-1]


def test_downloaded_by_hand_is_checked_and_recorded_without_download(client: Path, hub: Hub, tmp_path: Path) -> None:
    fetch(client, hub, tmp_path)
    manifest_path(tmp_path, hub.repo, hub.commit).unlink()
    assert model_state(tmp_path, hub.repo, "main")["complete"] is False
    hub.asked.clear()
    assert fetch(client, hub, tmp_path)[-1]["result"]["downloaded"] == 0
    assert not [path for method, path, _ in hub.asked if method == "GET" and "/resolve/" in path]
    assert model_state(tmp_path, hub.repo, "main")["complete"] is True


@pytest.mark.parametrize("name", ["model-1.safetensors", "config.json"])
def test_damaged_file_is_fetched_again(client: Path, hub: Hub, tmp_path: Path, name: str) -> None:
    path = Path(fetch(client, hub, tmp_path)[-1]["result"]["path"]) / name
    manifest_path(tmp_path, hub.repo, hub.commit).unlink()
    path.write_bytes(bytes(len(hub.files[name])))
    hub.asked.clear()
    assert fetch(client, hub, tmp_path)[-1]["result"]["downloaded"] == len(hub.files[name])
    assert path.read_bytes() == hub.files[name]
    assert hub.gets(name) == [""]
    assert not [other for other in hub.files if other != name and hub.gets(other)]


@pytest.mark.parametrize("name", ["model-1.safetensors", "config.json"])
def test_wrong_content_once_is_cured(client: Path, hub: Hub, tmp_path: Path, name: str) -> None:
    hub.corrupt[name] = 1
    result = fetch(client, hub, tmp_path)[-1]["result"]
    assert (Path(result["path"]) / name).read_bytes() == hub.files[name]


def test_wrong_content_twice_is_an_error(client: Path, hub: Hub, tmp_path: Path) -> None:
    hub.corrupt["model-1.safetensors"] = 2
    error = fetch(client, hub, tmp_path)[-1]["error"]
    assert error["id"] == "checksum"
    assert "model-1.safetensors" in error["message"]
    assert model_state(tmp_path, hub.repo, hub.commit)["complete"] is False


def test_gated(client: Path, hub: Hub, tmp_path: Path) -> None:
    hub.gated, hub.tokens = True, {"hf_alice": True, "hf_bob": False}
    token = tmp_path / "token"
    assert fetch(client, hub, tmp_path)[-1]["error"]["id"] == "hub-token-missing"
    token.write_text("hf_bob\n")
    error = fetch(client, hub, tmp_path, token=token)[-1]["error"]
    assert error["id"] == "hub-no-access"
    assert f"{hub.url}/{hub.repo}" in error["message"]
    assert "hf_bob" not in json.dumps(error)
    token.write_text("hf_wrong")
    error = fetch(client, hub, tmp_path, token=token)[-1]["error"]
    assert (error["id"], "not accept the token" in error["message"]) == ("hub-token-missing", True)
    token.write_text("hf_alice\n")
    assert "result" in fetch(client, hub, tmp_path, token=token)[-1]


def test_unknown_repository_and_revision(client: Path, hub: Hub, tmp_path: Path) -> None:
    error = fetch(client, hub, tmp_path, "--repo", "acme/nothing")[-1]["error"]
    assert (error["id"], "acme/nothing" in error["message"]) == ("hub-repo-unknown", True)
    error = fetch(client, hub, tmp_path, "--revision", "v9")[-1]["error"]
    assert (error["id"], "v9" in error["message"]) == ("hub-revision-unknown", True)


def test_unreachable(client: Path, tmp_path: Path) -> None:
    error = fetch(client, Hub(url="http://127.0.0.1:9"), tmp_path)[-1]["error"]
    assert error["id"] == "hub-unreachable"
    assert "http://127.0.0.1:9" in error["message"]
