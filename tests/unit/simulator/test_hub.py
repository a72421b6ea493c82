"""The Hub stand-in, asked by the real client over plain HTTP. The client's version is the one Sparkfleet ships."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from simulator.internet import hub as stand_in

from sparkfleet.packaging import hub_client

OPEN, GATED = "acme/open", "acme/gated"
SHARD = random.Random(2).randbytes(1_500_000)  # noqa: S311
FILES = {
    "config.json": b'{"a": 1}\n',
    "sub/notes.txt": b"hello\n",
    "model-1.safetensors": SHARD,
    "model-2.safetensors": SHARD[::-1],
}
ALICE, BOB = "hf_alice_accepted", "hf_bob_did_not"


@dataclass
class Hub:
    """A running stand-in. `cut` closes the connection after so many bytes of a file's content, once."""

    root: Path
    port: int = 0
    cut: dict[str, int] = field(default_factory=dict)
    asked: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, Range

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def commit(self, repo: str) -> str:
        sha = self.api().model_info(repo).sha
        assert sha
        return sha

    def api(self, token: str | bool = False) -> HfApi:
        return HfApi(endpoint=self.url, token=token)

    def gets(self, name: str) -> list[str]:
        """The Range headers of the GETs of a file."""
        return [asked for method, path, asked in self.asked if method == "GET" and path.endswith(f"/{name}")]

    def raw(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        """One request as no client would make it; header names in small letters."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def snapshot(self, cache: Path, repo: str = OPEN, token: str | bool = False, **more: Any) -> Path:
        return Path(snapshot_download(repo, cache_dir=cache, endpoint=self.url, token=token, max_workers=1, **more))

    def hf(self, home: Path, *argv: str, token: str = "") -> subprocess.CompletedProcess[str]:
        """The real `hf`, knowing nothing but this Hub."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        if token:
            environment["HF_TOKEN"] = token
        hf = Path(sys.executable).with_name("hf")
        return subprocess.run([hf, *argv], env=environment, capture_output=True, text=True, check=False, timeout=60)


def write(root: Path, repo: str, gated: bool, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = root / repo / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (root / repo / "repo.json").write_text(json.dumps({"gated": gated}))


def grant(root: Path, accepted: dict[str, list[str]]) -> None:
    tokens = {token: {"name": token.split("_")[1], "accepted": repos} for token, repos in accepted.items()}
    (root / "tokens.json").write_text(json.dumps(tokens))


def cutting(write: Callable[[bytes], int], left: int) -> Callable[[bytes], int]:
    """`write` of a connection that breaks after `left` more bytes."""

    def limited(data: bytes) -> int:
        nonlocal left
        part = data[:left]
        left -= len(part)
        write(part)
        if len(part) < len(data):
            raise BrokenPipeError
        return len(part)

    return limited


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    root = tmp_path / "hub"
    write(root, OPEN, False, FILES)
    write(root, GATED, True, FILES)
    grant(root, {ALICE: [GATED], BOB: []})
    made = Hub(root)
    server = stand_in.server(root, root / "tokens.json", "127.0.0.1", 0)
    handler: Any = server.RequestHandlerClass

    class Watched(handler):  # type: ignore[misc]
        def parse_request(self) -> bool:
            good: bool = super().parse_request()
            if good:
                made.asked.append((self.command, self.path.split("?")[0], self.headers.get("Range", "")))
            return good

        def end_headers(self) -> None:
            super().end_headers()
            left = made.cut.pop(self.path.rpartition("/")[2], None) if self.command == "GET" else None
            if left is not None:
                self.wfile.write = cutting(self.wfile.write, left)

    server.RequestHandlerClass = Watched
    made.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def etag(content: bytes) -> str:
    """What the Hub names a file: sha256 of a large one, git's blob id of a small one."""
    if len(content) >= 1_000_000:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # noqa: S324


def test_whole_download(hub: Hub, tmp_path: Path) -> None:
    snapshot = hub.snapshot(tmp_path / "cache")
    folder = tmp_path / "cache" / "models--acme--open"
    assert {p.relative_to(snapshot).as_posix(): p.read_bytes() for p in snapshot.rglob("*") if p.is_file()} == FILES
    assert {p.name for p in (folder / "blobs").iterdir()} == {etag(content) for content in FILES.values()}
    assert (folder / "refs" / "main").read_text() == hub.commit(OPEN) == snapshot.name
    assert len(snapshot.name) == 40


def test_a_second_download_asks_for_no_content(hub: Hub, tmp_path: Path) -> None:
    hub.snapshot(tmp_path / "cache")
    hub.asked.clear()
    hub.snapshot(tmp_path / "cache")
    assert hub.asked
    assert not [path for method, path, _ in hub.asked if method == "GET" and "/resolve/" in path]


def test_command_line_downloads_and_verifies(hub: Hub, tmp_path: Path) -> None:
    run = hub.hf(tmp_path, "download", OPEN)
    assert run.returncode == 0, run.stderr
    run = hub.hf(tmp_path, "cache", "verify", OPEN, "--fail-on-missing-files", "--fail-on-extra-files")
    assert run.returncode == 0, run.stderr
    for content in (FILES["config.json"], SHARD):  # by git's blob id, by sha256
        blob = tmp_path / "hub" / "models--acme--open" / "blobs" / etag(content)
        blob.write_bytes(content[:-1] + b"!")
        run = hub.hf(tmp_path, "cache", "verify", OPEN)
        assert run.returncode != 0
        assert etag(content) in run.stdout + run.stderr
        blob.write_bytes(content)


def test_cut_connection_is_resumed_where_it_broke(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)  # the client forgets a chunk (10 MB) cut short
    hub.cut["model-1.safetensors"] = 700_000
    snapshot = hub.snapshot(tmp_path / "cache")
    assert (snapshot / "model-1.safetensors").read_bytes() == SHARD
    assert hub.gets("model-1.safetensors") == ["", "bytes=700000-"]
    assert hub.gets("model-2.safetensors") == [""]


def test_sparkfleets_download_goes_on_from_a_partial_file(hub: Hub, tmp_path: Path) -> None:
    cache, packed = tmp_path / "cache", hub_client.build(tmp_path / "packed")
    blobs = cache / "models--acme--open" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{etag(SHARD)}.incomplete").write_bytes(SHARD[:900_000])
    run = subprocess.run(
        [sys.executable, "-I", "-B", "-S", packed, "--repo", OPEN, "--revision", "main", "--cache-dir", cache],
        env={"HF_ENDPOINT": hub.url, "HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN_PATH": "/none"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads(run.stdout.splitlines()[-1])["result"]
    assert result["commit"] == hub.commit(OPEN)
    assert result["downloaded"] == result["bytes"] - 900_000
    assert hub.gets("model-1.safetensors") == ["bytes=900000-"]
    assert (blobs / etag(SHARD)).read_bytes() == SHARD


@pytest.mark.parametrize(
    ("headers", "status", "sent", "content_range"),
    [
        ({}, 200, SHARD, None),
        ({"Range": "bytes=10-19"}, 206, SHARD[10:20], "bytes 10-19/1500000"),
        ({"Range": "bytes=1499990-"}, 206, SHARD[-10:], "bytes 1499990-1499999/1500000"),
        ({"Range": "bytes=1499990-9999999"}, 206, SHARD[-10:], "bytes 1499990-1499999/1500000"),
        ({"Range": "bytes=5-", "If-Range": f'"{etag(SHARD)}"'}, 206, SHARD[5:], "bytes 5-1499999/1500000"),
        ({"Range": "bytes=5-", "If-Range": '"another"'}, 200, SHARD, None),
        ({"Range": "bytes=1500000-"}, 416, b"", "bytes */1500000"),
    ],
)
def test_ranges(hub: Hub, headers: dict[str, str], status: int, sent: bytes, content_range: str | None) -> None:
    got, answer, body = hub.raw("GET", f"/{OPEN}/resolve/main/model-1.safetensors", headers)
    assert (got, body == sent, answer.get("content-range")) == (status, True, content_range)


@pytest.mark.parametrize("name", ["model-1.safetensors", "config.json"])
def test_head(hub: Hub, name: str) -> None:
    status, headers, body = hub.raw("HEAD", f"/{OPEN}/resolve/main/{name}", {})
    content = FILES[name]
    assert (status, body) == (200, b"")
    assert (headers["etag"], headers["content-length"]) == (f'"{etag(content)}"', str(len(content)))
    assert (headers["x-repo-commit"], headers["accept-ranges"]) == (hub.commit(OPEN), "bytes")
    linked = (f'"{etag(SHARD)}"', "1500000") if content is SHARD else (None, None)
    assert (headers.get("x-linked-etag"), headers.get("x-linked-size")) == linked


def test_metadata(hub: Hub) -> None:
    info = hub.api().model_info(OPEN, files_metadata=True)
    assert (info.id, info.gated, info.sha) == (OPEN, False, hub.commit(OPEN))
    sizes = {s.rfilename: (s.size, s.lfs and s.lfs.sha256) for s in info.siblings or []}
    tree = list(hub.api().list_repo_tree(OPEN, recursive=True, expand=True))
    listed = {f.path: (f.size, f.lfs and f.lfs.sha256) for f in tree if isinstance(f, RepoFile)}
    expected = {n: (len(c), etag(c) if len(c) > 1_000_000 else None) for n, c in FILES.items()}
    assert sizes == listed == expected
    small = next(f for f in tree if f.path == "config.json")
    assert isinstance(small, RepoFile)
    assert small.blob_id == etag(FILES["config.json"])


def test_commit_follows_from_the_content(hub: Hub, tmp_path: Path) -> None:
    before = hub.commit(OPEN)
    assert before == hub.commit(GATED)  # same files
    pinned = hub.snapshot(tmp_path / "cache", revision=before)
    assert pinned.name == before
    write(hub.root, OPEN, False, {"config.json": b'{"a": 22}\n'})
    assert hub.commit(OPEN) not in ("", before)
    with pytest.raises(RevisionNotFoundError):  # no history is kept
        hub.api().model_info(OPEN, revision=before)


@pytest.mark.parametrize("revision", ["v9", "0" * 40])
def test_unknown_revision(hub: Hub, tmp_path: Path, revision: str) -> None:
    with pytest.raises(RevisionNotFoundError, match=f"Invalid rev id: {revision}") as caught:
        hub.api().model_info(OPEN, revision=revision)
    assert caught.value.response.status_code == 404
    with pytest.raises(RevisionNotFoundError):
        list(hub.api().list_repo_tree(OPEN, revision=revision))
    with pytest.raises(RevisionNotFoundError):
        hub.snapshot(tmp_path / "cache", revision=revision)


@pytest.mark.parametrize(("token", "status"), [(False, 401), ("hf_unknown", 401), (ALICE, 404)])
def test_unknown_repository_is_no_business_of_strangers(hub: Hub, token: str | bool, status: int) -> None:
    with pytest.raises(RepositoryNotFoundError) as caught:
        hub.api(token).model_info("acme/none")
    assert caught.value.response.status_code == status


@pytest.mark.parametrize("name", ["none.json", "sub", "%2e%2e/repo.json", "%2e%2e/%2e%2e/%2e%2e/tokens.json"])
def test_nothing_but_the_files(hub: Hub, name: str) -> None:
    status, headers, body = hub.raw("GET", f"/{OPEN}/resolve/main/{name}", {})
    assert (status, headers["x-error-code"]) == (404, "EntryNotFound")
    assert b"accepted" not in body


def test_missing_file_as_the_client_sees_it(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(OPEN, "none.json", cache_dir=tmp_path, endpoint=hub.url, token=False)


@pytest.mark.parametrize(
    ("token", "status", "message"),
    [
        (False, 401, f"Access to model {GATED} is restricted. You must have access to it and be authenticated"),
        ("hf_unknown", 401, f"Access to model {GATED} is restricted. You must have access to it"),
        (BOB, 403, f"Access to model {GATED} is restricted and you are not in the authorized list. Visit"),
    ],
)
def test_gated_and_refused(hub: Hub, tmp_path: Path, token: str | bool, status: int, message: str) -> None:
    assert hub.api(token).model_info(GATED).gated == "manual"  # what there is may be seen by all
    with pytest.raises(GatedRepoError, match=message) as caught:
        hub.snapshot(tmp_path / "cache", GATED, token)
    assert caught.value.response.status_code == status
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_gated_and_accepted(hub: Hub, tmp_path: Path) -> None:
    snapshot = hub.snapshot(tmp_path / "cache", GATED, ALICE)
    assert (snapshot / "model-2.safetensors").read_bytes() == FILES["model-2.safetensors"]


def test_acceptance_and_revocation_count_at_once(hub: Hub, tmp_path: Path) -> None:
    grant(hub.root, {BOB: [GATED]})
    assert hub.snapshot(tmp_path / "cache", GATED, BOB).is_dir()
    with pytest.raises(GatedRepoError) as caught:
        hub.snapshot(tmp_path / "other", GATED, ALICE)
    assert caught.value.response.status_code == 401


def test_command_line_is_told_why(hub: Hub, tmp_path: Path) -> None:
    run = hub.hf(tmp_path, "download", GATED, token=BOB)
    assert run.returncode != 0
    assert f"'{GATED}' requires approval" in run.stdout + run.stderr


def test_it_is_ready_when_all_is_hashed(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.raw("GET", "/ready", {})[0] == 200

    def read(path: Path) -> bytes:
        raise AssertionError(f"{path} is read again")

    monkeypatch.setattr(stand_in.Path, "read_bytes", read)
    assert hub.commit(OPEN)


def test_whoami(hub: Hub) -> None:
    assert hub.api(ALICE).whoami()["name"] == "alice"
    with pytest.raises(HfHubHTTPError) as caught:
        hub.api("hf_unknown").whoami()
    assert caught.value.response.status_code == 401


def test_log_has_a_line_a_request_and_no_token(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.snapshot(tmp_path / "cache", GATED, ALICE)
    path, log, until = f"/{GATED}/resolve/{hub.commit(GATED)}/model-1.safetensors", "", time.monotonic() + 5
    while f"GET {path}" not in log and time.monotonic() < until:  # written after the last byte has gone out
        time.sleep(0.02)
        log += capsys.readouterr().err
    assert f"HEAD {path} 200 0 bytes" in log
    assert f"GET {path} 200 1500000 bytes" in log
    assert ALICE not in log
