"""What one Spark fetches, others take: blobs once, files as they grow, and none without the run's key pair."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import socket
import socketserver
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import share as host_share
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.job import JobError
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.registry import (
    Layout,
    Registry,
    reference,
    resolve,
)
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.share import (
    Activity,
    Model,
    Refused,
    Server,
    Settings,
    Source,
    Tunnel,
    client_context,
    part,
    server_context,
)
from hypothesis import given
from hypothesis import strategies as st
from plugins.action.share import key_pair, understood
from plugins.modules import share_service as share_module

from sparkfleet.fleet import fetch_schedule
from sparkfleet.fleet.fetch_schedule import Missing

IMAGE = "nvcr.io/nvidia/vllm:25.09-py3"


def digest(body: bytes) -> str:
    return "sha256:" + hashlib.sha256(body).hexdigest()


@dataclass
class Upstream:
    """A registry of one image for arm64, behind an index; `cut` bytes are sent of a blob the first time."""

    layers: list[bytes] = field(default_factory=lambda: [b"a" * 3_000_000, b"b" * 50_000])
    asked: list[str] = field(default_factory=list)
    cut: int = 0
    spoil: bool = False
    pause: float = 0.0
    port: int = 0

    def __post_init__(self) -> None:
        config = b'{"architecture": "arm64"}'
        self.blobs = {digest(body): body for body in (*self.layers, config)}
        entries = [{"digest": digest(body), "size": len(body)} for body in self.layers]
        manifest = {"config": {"digest": digest(config), "size": len(config)}, "layers": entries}
        self.manifest = json.dumps({**manifest, "mediaType": "application/vnd.oci.image.manifest.v1+json"}).encode()
        arm = {"digest": digest(self.manifest), "platform": {"os": "linux", "architecture": "arm64"}}
        other = {"digest": digest(b"other"), "platform": {"os": "linux", "architecture": "amd64"}}
        self.index = json.dumps({"manifests": [other, arm]}).encode()

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        self.asked.append(handler.path)
        if not handler.headers.get("Authorization", "").startswith("Bearer secret") and "/token" not in handler.path:
            handler.send_response(401)
            realm = f"http://127.0.0.1:{self.port}/token"
            handler.send_header("WWW-Authenticate", f'Bearer realm="{realm}",service="s",scope="pull"')
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        named = handler.path.rpartition("/")[2]
        known = {"25.09-py3": self.index, digest(self.index): self.index, digest(self.manifest): self.manifest}
        body = b'{"token": "secret"}' if "/token" in handler.path else known.get(named) or self.blobs[named]
        start = int((re.findall(r"bytes=(\d+)-", handler.headers.get("Range", "")) or ["0"])[0])
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Type", "application/vnd.oci.image.index.v1+json")
        handler.send_header("Content-Length", str(len(body) - start))
        handler.end_headers()
        time.sleep(self.pause if named in self.blobs else 0)
        if self.spoil and named in self.blobs:
            body = b"!" * len(body)
        if self.cut and named == digest(self.layers[0]):
            handler.wfile.write(body[start : start + self.cut])
            self.cut = 0
            handler.close_connection = True
            handler.connection.close()
            return
        handler.wfile.write(body[start:])


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    made = Upstream()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            made.serve(self)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        made.port = server.server_address[1]
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield made
        server.shutdown()


def image(upstream: Upstream) -> str:
    return f"127.0.0.1:{upstream.port}/nvidia/vllm:25.09-py3"


@pytest.fixture
def layout(upstream: Upstream, tmp_path: Path) -> Layout:
    made = Layout(tmp_path / "store")
    name = image(upstream)
    made.add(name, Registry(reference(name), {}, None), "arm64")
    return made


def content(layout: Layout, name: str) -> bytes:
    growing = layout.open(name)
    return b"".join(growing.read(0, growing.size))


# -- images ------------------------------------------------------------------------------------------------


def test_whoever_asks_a_blob_is_fetched_once(layout: Layout, upstream: Upstream) -> None:
    upstream.pause = 0.2
    wanted, got = digest(upstream.layers[0]), []
    threads = [threading.Thread(target=lambda: got.append(content(layout, wanted))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert got == [upstream.layers[0]] * 5
    assert len([path for path in upstream.asked if wanted in path]) == 1


def test_a_blob_that_is_cut_is_resumed(layout: Layout, upstream: Upstream) -> None:
    upstream.cut = 1_200_000
    assert content(layout, digest(upstream.layers[0])) == upstream.layers[0]
    assert len([path for path in upstream.asked if digest(upstream.layers[0]) in path]) == 2


def test_a_blob_with_another_content_is_never_kept(
    layout: Layout, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{Layout.__module__}.TRIES", 1)
    upstream.spoil = True
    with pytest.raises(OSError, match="different content"):
        layout.fetch([digest(upstream.layers[1])], lambda done: None)
    assert not layout.path(digest(upstream.layers[1])).exists()


def test_a_manifest_of_another_content_is_refused(upstream: Upstream) -> None:
    ref = reference(image(upstream))
    upstream.index = upstream.index + b" "
    wrong = digest(b"something")
    upstream.blobs[wrong] = b"something else"
    with pytest.raises(OSError, match="asked for"):
        resolve(Registry(ref, {}, None), wrong, "arm64")


def test_layout_is_one_that_others_read(layout: Layout, upstream: Upstream) -> None:
    layout.fetch(list(layout.sizes), lambda done: None)
    index = json.loads((layout.folder / "index.json").read_text())
    assert index["manifests"][0]["digest"] == digest(upstream.index)
    assert json.loads((layout.folder / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    assert {path.name for path in layout.blobs.iterdir()} >= {name.partition(":")[2] for name in upstream.blobs}
    assert Layout(layout.folder).names() == {image(upstream): digest(upstream.index)}


def test_prune_leaves_what_is_wanted(layout: Layout, upstream: Upstream) -> None:
    (layout.blobs / "old").write_bytes(b"x")
    (layout.blobs / ("f" * 64 + ".incomplete")).write_bytes(b"x")
    layout.prune(list(layout.sizes))
    assert {path.name for path in layout.blobs.iterdir()} == {
        digest(upstream.index).partition(":")[2],
        digest(upstream.manifest).partition(":")[2],
    }


# -- models ------------------------------------------------------------------------------------------------

BIG, SMALL = b"w" * 200_000, b"{}"
LISTING = {
    "repo": "org/name",
    "revision": "main",
    "commit": "c" * 40,
    "files": {
        "model.safetensors": {"size": len(BIG), "sha256": "1" * 64},
        "config.json": {"size": len(SMALL), "sha1": "2" * 40},
    },
    "total_bytes": len(BIG) + len(SMALL),
}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    place = tmp_path / "hf"
    (place / ".sparkfleet" / "models--org--name").mkdir(parents=True)
    (place / "models--org--name" / "blobs").mkdir(parents=True)
    (place / ".sparkfleet" / "models--org--name" / "fetching.json").write_text(json.dumps(LISTING))
    return place


def job(tmp_path: Path, state: str) -> str:
    status = {"what": "org/name@main", "state": state, "pid": 1, "pid_start": -1, "updated": time.time() + 60}
    (tmp_path / "model.json").write_text(json.dumps(status))
    return str(tmp_path)


def test_a_file_is_read_while_it_grows(cache: Path, tmp_path: Path) -> None:
    model = Model(str(cache), "org/name", "main", str(tmp_path))
    blob = cache / "models--org--name" / "blobs" / ("1" * 64)

    def download() -> None:
        with blob.with_name(blob.name + ".incomplete").open("wb", buffering=0) as file:
            for start in range(0, len(BIG), 50_000):
                time.sleep(0.1)
                file.write(BIG[start : start + 50_000])
        blob.with_name(blob.name + ".incomplete").rename(blob)

    thread = threading.Thread(target=download)
    thread.start()
    growing = model.file("model.safetensors")[1]
    assert b"".join(growing.read(1000, growing.size)) == BIG[1000:]
    thread.join()


def test_a_download_that_failed_keeps_nobody_waiting(cache: Path, tmp_path: Path) -> None:
    model = Model(str(cache), "org/name", "main", job(tmp_path, "failed"))
    growing = model.file("model.safetensors")[1]
    began = time.monotonic()
    with pytest.raises(OSError, match="has ended"):
        list(growing.read(0, growing.size))
    assert time.monotonic() - began < 2


def test_a_model_that_never_comes_is_refused(cache: Path, tmp_path: Path) -> None:
    (cache / ".sparkfleet" / "models--org--name" / "fetching.json").unlink()
    with pytest.raises(Refused, match="neither here nor being downloaded"):
        Model(str(cache), "org/name", "main", job(tmp_path, "failed")).listing()


# -- server and tunnel -------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    file = tmp_path / "run.pem"
    file.write_text(key_pair())
    return file


@pytest.fixture
def way(upstream: Upstream, cache: Path, pair: Path, tmp_path: Path) -> Iterator[str]:
    """A source and a tunnel to it: the tunnel's address."""
    settings = Settings(
        images=[image(upstream)],
        models=[{"repo": "org/name", "revision": "main"}],
        cache_dir=str(cache),
        store=str(tmp_path / "store"),
    )

    class Docker:
        def info(self) -> dict[str, Any]:
            return {}

        def version(self) -> dict[str, Any]:
            return {"Arch": "arm64"}

    source = Source(settings, Docker(), str(tmp_path))  # type: ignore[arg-type]
    assert source.prepare() == {image(upstream): digest(upstream.index)}
    activity = Activity()
    server = Server(("127.0.0.1", 0), source, activity, server_context(pair))
    tunnel = Tunnel(0, ("127.0.0.1", server.server_address[1]), client_context(pair), activity)
    for each in (server, tunnel):
        threading.Thread(target=each.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{tunnel.server_address[1]}"
    for each in (server, tunnel):
        each.shutdown()
        each.server_close()


def get(url: str, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:  # noqa: S310
        return answer.status, answer.read(), dict(answer.headers)


def test_registry_as_docker_asks_it(way: str, upstream: Upstream) -> None:
    assert get(f"{way}/v2/")[0] == 200
    for wanted in ("25.09-py3", digest(upstream.index)):
        status, body, headers = get(f"{way}/v2/nvidia/vllm/manifests/{wanted}")
        assert (status, body, headers["Docker-Content-Digest"]) == (200, upstream.index, digest(upstream.index))
    assert get(f"{way}/v2/nvidia/vllm/manifests/{digest(upstream.manifest)}")[1] == upstream.manifest
    layer = digest(upstream.layers[0])
    assert get(f"{way}/v2/nvidia/vllm/blobs/{layer}")[1] == upstream.layers[0]
    status, body, headers = get(f"{way}/v2/nvidia/vllm/blobs/{layer}", Range="bytes=2999990-")
    assert (status, body, headers["Content-Range"]) == (206, b"a" * 10, "bytes 2999990-2999999/3000000")


@pytest.mark.parametrize(
    "path", ["/v2/other/image/manifests/latest", "/v2/nvidia/vllm/blobs/sha256:" + "0" * 64, "/etc/passwd", "/api/x/y"]
)
def test_nothing_else_is_served(way: str, path: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        get(f"{way}{path}")
    assert refused.value.code == 404


def test_hub_as_its_client_asks_it(way: str, cache: Path) -> None:
    (cache / "models--org--name" / "blobs" / ("2" * 40)).write_bytes(SMALL)
    assert json.loads(get(f"{way}/api/models/org/name/revision/main")[1])["sha"] == "c" * 40
    listed = json.loads(get(f"{way}/api/models/org/name/tree/{'c' * 40}?recursive=true")[1])
    assert {item["path"]: item.get("lfs", {}).get("oid") for item in listed} == {
        "model.safetensors": "1" * 64,
        "config.json": None,
    }
    status, body, headers = get(f"{way}/org/name/resolve/{'c' * 40}/config.json")
    assert (status, body, headers["X-Repo-Commit"]) == (200, SMALL, "c" * 40)
    assert headers["ETag"] == f'"{"2" * 40}"'
    with pytest.raises(urllib.error.HTTPError):
        get(f"{way}/org/name/resolve/other/config.json")


def test_strangers_are_not_let_in(way: str, pair: Path, tmp_path: Path, upstream: Upstream) -> None:
    stranger = tmp_path / "stranger.pem"
    stranger.write_text(key_pair())
    source = Source(Settings(images=[], models=[]), object())  # type: ignore[arg-type]
    server = Server(("127.0.0.1", 0), source, Activity(), server_context(pair))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    anybody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anybody.check_hostname = False
    anybody.verify_mode = ssl.CERT_NONE
    for context in (client_context(stranger), anybody):
        tunnel = Tunnel(0, ("127.0.0.1", server.server_address[1]), context, Activity())
        threading.Thread(target=tunnel.serve_forever, args=(0.02,), daemon=True).start()
        with pytest.raises(OSError):
            get(f"http://127.0.0.1:{tunnel.server_address[1]}/v2/")
        tunnel.shutdown()
        tunnel.server_close()
    server.shutdown()
    server.server_close()


def test_source_without_room_says_so(upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Docker:
        def info(self) -> dict[str, Any]:
            return {}

        def version(self) -> dict[str, Any]:
            return {"Arch": "arm64"}

    settings = Settings(images=[image(upstream)], store=str(tmp_path / "store"), room=1 << 60)
    with pytest.raises(JobError, match="GB free"):
        Source(settings, Docker()).prepare()  # type: ignore[arg-type]


def test_idle_time_counts_from_the_end_of_the_last_request() -> None:
    activity = Activity()
    with activity:
        time.sleep(0.05)
        assert activity.idle() == 0
    assert 0 <= activity.idle() < 0.05


def test_verb_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert host_share.main(["give"]) == 2
    assert "serve|connect" in capsys.readouterr().err
    assert host_share.main(["--help"]) == 0
    printed = capsys.readouterr()
    assert "serve|connect" in printed.out and not printed.err


# -- what the engine's container may have put into the cache ---------------------------------------------------------


def blobs(cache: Path) -> Path:
    return cache / "models--org--name" / "blobs"


@pytest.mark.parametrize("place", ["blob", "partial", "blobs", "repository"])
def test_a_link_in_the_cache_is_not_served(way: str, cache: Path, tmp_path: Path, place: str) -> None:
    secrets = tmp_path / "secrets" / "blobs"
    secrets.mkdir(parents=True)
    (secrets / ("1" * 64)).write_bytes(BIG)
    if place == "repository":
        blobs(cache).rmdir()
        blobs(cache).parent.rmdir()
        blobs(cache).parent.symlink_to(secrets.parent)
    elif place == "blobs":
        blobs(cache).rmdir()
        blobs(cache).symlink_to(secrets)
    else:
        name = "1" * 64 + (".incomplete" if place == "partial" else "")
        (blobs(cache) / name).symlink_to(secrets / ("1" * 64))
    with pytest.raises(urllib.error.HTTPError) as refused:
        get(f"{way}/org/name/resolve/main/model.safetensors")
    assert refused.value.code == 404


def test_a_device_or_pipe_in_the_cache_is_not_served(way: str, cache: Path) -> None:
    os.mkfifo(blobs(cache) / ("1" * 64))
    with pytest.raises(urllib.error.HTTPError):
        get(f"{way}/org/name/resolve/main/model.safetensors")


def test_a_blob_that_becomes_a_link_while_it_is_read_is_cut(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"s" * len(BIG))
    part = blobs(cache) / ("1" * 64 + ".incomplete")
    part.write_bytes(BIG[:100])
    growing = Model(str(cache), "org/name", "main", str(tmp_path)).file("model.safetensors")[1]
    reading = growing.read(0, growing.size)
    assert next(reading) == BIG[:100]
    part.unlink()
    (blobs(cache) / ("1" * 64)).symlink_to(tmp_path / "secret")
    with pytest.raises(OSError):
        list(reading)


BAD_LISTINGS: list[Any] = [
    [],
    {},
    {**LISTING, "files": 5},
    {**LISTING, "files": {"config.json": 5}},
    {**LISTING, "files": {"config.json": {"size": 5, "sha256": "../../../../etc/shadow"}}},
    {**LISTING, "files": {"config.json": {"size": 5, "sha1": "../../../../../etc/shadow"}}},
    {**LISTING, "files": {"config.json": {"size": 5}}},
    {**LISTING, "files": {"config.json": {"size": "5", "sha1": "2" * 40}}},
    {**LISTING, "files": {"config.json": {"size": -5, "sha1": "2" * 40}}},
    {**LISTING, "commit": "../x"},
    {**LISTING, "commit": 5},
    {**LISTING, "revision": None},
]


@pytest.mark.parametrize("listing", BAD_LISTINGS)
def test_a_list_that_names_something_else_than_hashes_is_none(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listing: Any
) -> None:
    monkeypatch.setattr(host_share, "WAIT", 0.0)
    (cache / ".sparkfleet" / "models--org--name" / "fetching.json").write_text(json.dumps(listing))
    with pytest.raises(Refused, match="neither here nor being downloaded"):
        Model(str(cache), "org/name", "main", job(tmp_path, "failed")).listing()


def test_a_list_that_is_a_link_is_none(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_share, "WAIT", 0.0)
    place = cache / ".sparkfleet" / "models--org--name" / "fetching.json"
    place.rename(tmp_path / "moved.json")
    place.symlink_to(tmp_path / "moved.json")
    with pytest.raises(Refused):
        Model(str(cache), "org/name", "main", job(tmp_path, "failed")).listing()


def test_a_bundle_that_was_changed_is_refused(layout: Layout, upstream: Upstream) -> None:
    layout.path(digest(upstream.index)).write_bytes(b'{"manifests": []}')
    source = Source(Settings(images=[image(upstream)], store=str(layout.folder), offline=True))
    with pytest.raises(JobError, match="damaged") as refused:
        source.prepare()
    assert refused.value.id == "bundle"


def test_the_units_are_hardened_and_listen_on_no_other_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[list[str]] = []

    def run(argv: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        ran.append(argv)
        if argv[0] == "systemd-run":
            (tmp_path / "run" / "serve" / "ready.json").write_text('{"error": "", "digests": {}}')
        return subprocess.CompletedProcess(argv, 1 if "is-active" in argv else 0, "", "")

    monkeypatch.setattr(share_module.subprocess, "run", run)
    (tmp_path / "program").write_text("")
    arguments: dict[str, Any] = {
        "state": "serve",
        "settings": {"store": str(tmp_path / "store"), "images": ["a:1"]},
        "pairs": {"run": "x"},
        "program": str(tmp_path / "program"),
        "folder": str(tmp_path / "run"),
    }

    def call(**more: Any) -> dict[str, Any]:
        with patch_module_args({**arguments, **more}), pytest.raises(SystemExit):
            share_module.main()
        return dict(json.loads(capsys.readouterr().out))

    assert call(address="127.0.0.1", clients=["127.0.0.1"])["reason"] == ""
    [argv] = [item for item in ran if item[0] == "systemd-run"]
    for wanted in ("NoNewPrivileges=yes", "ProtectSystem=strict", "CapabilityBoundingSet=CAP_DAC_READ_SEARCH"):
        assert f"--property={wanted}" in argv
    settings = json.loads((tmp_path / "run" / "serve" / "settings.json").read_text())
    assert settings["listen"] == ["127.0.0.1"]
    assert Settings(**settings).listen == ["127.0.0.1"]
    ran.clear()
    assert "this host has no address" in call(address="nowhere.invalid", clients=["nowhere.invalid"])["reason"]
    assert not any(item[0] == "systemd-run" for item in ran)


# -- requests --------------------------------------------------------------------------------------------------------


@given(st.text(max_size=30) | st.from_regex(r"bytes=[0-9]{0,22}-[0-9]{0,22}", fullmatch=True), st.integers(0, 1 << 50))
def test_any_range_is_a_part_or_the_whole(wanted: str, size: int) -> None:
    found = part(wanted, size)
    if found is not None:
        start, end = found
        assert start >= 0 and end <= size
        assert start < end or start >= size


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("bytes=0-", (0, 10)),
        ("bytes=3-", (3, 10)),
        ("bytes=3-3", (3, 4)),
        ("bytes=3-99", (3, 10)),
        ("bytes=3-9", (3, 10)),
        ("bytes=10-", (10, 10)),
        ("bytes=5-2", None),
        ("bytes=-5", None),
        ("bytes=0-1,3-4", None),
        ("bytes=" + "9" * 5000 + "-", None),
        ("", None),
    ],
)
def test_parts(wanted: str, expected: tuple[int, int] | None) -> None:
    assert part(wanted, 10) == expected


def raw(way: str, text: bytes) -> bytes:
    host, port = way.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(text)
        return connection.recv(200)


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b"GET http://[ HTTP/1.1", b"400"),
        (b"GET /v2/nvidia/vllm/blobs/sha256:../../../../etc/shadow HTTP/1.1", b"404"),
        (b"GET /v2/nvidia/vllm/blobs/..%2f..%2fetc%2fshadow HTTP/1.1", b"404"),
        (b"GET /org/name/resolve/main/..%2f..%2f..%2fetc%2fshadow HTTP/1.1", b"404"),
        (b"GET /org/name/resolve/main/%00 HTTP/1.1", b"404"),
        (b"POST /v2/ HTTP/1.1", b"501"),
        (b"GET /v2/ HTTP/1.1\r\nRange: bytes=9-1", b"200"),
    ],
)
def test_odd_requests_have_an_answer(way: str, line: bytes, status: bytes) -> None:
    assert raw(way, line + b"\r\nHost: x\r\n\r\n").split()[1] == status


def test_a_part_of_a_file_and_of_none(way: str, upstream: Upstream) -> None:
    layer = digest(upstream.layers[1])
    url = f"{way}/v2/nvidia/vllm/blobs/{layer}"
    assert get(url, Range="bytes=10-19")[:2] == (206, b"b" * 10)
    assert get(url, Range="bytes=20-10")[:2] == (200, upstream.layers[1])
    assert get(url, Range="bytes=10-19", **{"If-Range": '"other"'})[0] == 200
    with pytest.raises(urllib.error.HTTPError) as refused:
        get(url, Range="bytes=50000-")
    assert refused.value.code == 416 and refused.value.headers["Content-Range"] == "bytes */50000"


def test_a_slow_client_is_served_through_the_tunnel(way: str) -> None:
    host, port = way.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        time.sleep(0.5)  # session tickets of TLS arrive before there is anything to ask
        connection.sendall(b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(12) == b"HTTP/1.1 200"


@contextlib.contextmanager
def running(*servers: socketserver.BaseServer) -> Iterator[None]:
    for each in servers:
        threading.Thread(target=each.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield
    finally:
        for each in servers:
            each.shutdown()
            each.server_close()


def server(context: ssl.SSLContext | None = None) -> Server:
    """One that shares nothing; it answers /v2/."""
    return Server(("127.0.0.1", 0), Source(Settings(), object()), Activity(), context)  # type: ignore[arg-type]


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_open(connection: socket.socket) -> bool:
    connection.settimeout(0.3)
    try:
        return connection.recv(1) != b""
    except TimeoutError:
        return True
    except ConnectionResetError:
        return False


def test_connections_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Server, "most", 2)
    with running(source := server()):
        address = source.server_address[:2]
        held = [socket.create_connection(address, timeout=5) for _ in range(2)]
        until(lambda: source._held.total() == 2)
        with socket.create_connection(address, timeout=5) as third:
            assert not is_open(third)
        for connection in held:
            connection.close()
        until(lambda: not source._held)
        assert get(f"http://127.0.0.1:{address[1]}/v2/")[0] == 200


def test_one_that_takes_leaves_places_for_the_others(pair: Path) -> None:
    """A Spark whose local users fill its tunnels, and one that goes round its tunnels with the run's key pair."""
    source, context = server(server_context(pair)), client_context(pair)
    tunnels = [Tunnel(0, source.server_address[:2], context, Activity()) for _ in range(2)]
    with running(source, *tunnels), contextlib.ExitStack() as held:
        for tunnel in tunnels:
            for _ in range(Server.most):
                local = held.enter_context(socket.create_connection(tunnel.server_address[:2], timeout=5))
                with contextlib.suppress(OSError):  # closed: no place in the tunnel
                    local.sendall(b"G")
        until(lambda: source._held["127.0.0.1"] == sum(tunnel.most for tunnel in tunnels))
        for _ in range(Server.most):
            held.enter_context(socket.create_connection(source.server_address[:2], timeout=5))
        until(lambda: source._held["127.0.0.1"] == Server.most_of_one)
        assert sum(tunnel.most for tunnel in tunnels) < Server.most_of_one <= Server.most // 6
        other = socket.create_connection(source.server_address[:2], timeout=5, source_address=("127.0.0.2", 0))
        with context.wrap_socket(other) as wrapped:
            wrapped.sendall(b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n")
            assert wrapped.recv(12) == b"HTTP/1.1 200"


def test_local_connections_that_say_nothing_reach_no_source_and_end(
    pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_share, "FIRST_BYTE_SECONDS", 1.0)
    source, activity = server(server_context(pair)), Activity()
    asked: list[int] = []
    monkeypatch.setattr(source, "verify_request", lambda *_: asked.append(1) or True)
    tunnel = Tunnel(0, source.server_address[:2], client_context(pair), activity)
    with running(source, tunnel):
        held = [socket.create_connection(tunnel.server_address[:2], timeout=5) for _ in range(tunnel.most)]
        until(lambda: tunnel._held.total() == tunnel.most)
        assert activity.idle() > 0  # they keep no program running
        with socket.create_connection(tunnel.server_address[:2], timeout=5) as more:
            assert not is_open(more)
        until(lambda: not tunnel._held)
        assert [is_open(connection) for connection in held] == [False] * tunnel.most and not asked
        assert get(f"http://127.0.0.1:{tunnel.server_address[1]}/v2/")[0] == 200 and asked == [1]


def test_a_connection_without_a_request_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_share, "FIRST_BYTE_SECONDS", 0.2)
    monkeypatch.setattr(host_share, "BETWEEN_SECONDS", 0.2)
    with running(source := server()):
        for text, answer in (
            (b"", b""),
            (b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n", b"HTTP/1.1 200"),
            (b"GET /v2/", b""),
        ):
            with socket.create_connection(source.server_address[:2], timeout=5) as connection:
                connection.sendall(text)
                whole = b"".join(iter(lambda: connection.recv(4096), b""))
                assert whole[:12] == answer
        until(lambda: not source._held)


def test_a_place_comes_back_where_there_is_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched, running(source := server()):
        patched.setattr(socketserver.ThreadingMixIn, "process_request", none)
        with socket.create_connection(source.server_address[:2], timeout=5) as connection:
            assert not is_open(connection)
        until(lambda: not source._held)


# -- who takes from whom -----------------------------------------------------------------------------------


def needing(host: str, *, image: bool = True, model: bool = True, has: bool = False, repo: str = "org/a") -> Missing:
    return Missing(host, IMAGE, image, repo, "main", model and not has, has)


def test_one_fetches_and_the_others_take() -> None:
    made = fetch_schedule.schedule([needing("a"), needing("b"), needing("c")])
    assert list(made.sources) == ["a"]
    assert made.sources["a"].images == [IMAGE]
    assert made.image_from == {"a": "a", "b": "a", "c": "a"}  # Docker of the source asks the source's own registry
    assert made.model_from == {"b": "a", "c": "a"}
    assert made.summary("a") == [f"a serves {IMAGE} and org/a to b, c"]


def test_one_alone_fetches_by_itself() -> None:
    assert fetch_schedule.schedule([needing("a")]) == fetch_schedule.Schedule()
    assert fetch_schedule.schedule([needing("a"), needing("b", image=False, model=False)]).sources == {}


def test_a_newcomer_takes_the_model_from_one_that_has_it() -> None:
    made = fetch_schedule.schedule([needing("a", image=False, has=True), needing("b")])
    assert made.model_from == {"b": "a"}
    assert made.image_from == {}  # Docker of a keeps no copy as it travelled
    assert made.sources["a"].leader == "b"  # a has nothing to do itself


def test_different_models_share_an_image() -> None:
    made = fetch_schedule.schedule([needing("a"), needing("b", repo="org/b"), needing("c", repo="org/b"), needing("d")])
    assert set(made.image_from.values()) == {"a"}
    assert made.model_from == {"d": "a", "c": "b"}
    assert [source.host for source in made.leads("b")] == ["b"]


def test_who_must_not_serve_does_not() -> None:
    drained = Missing("a", IMAGE, True, "org/a", "main", True, False, serves=False)
    made = fetch_schedule.schedule([drained, needing("b"), needing("c")])
    assert set(made.image_from.values()) == {"b"}
    assert made.model_from == {"a": "b", "c": "b"}


def test_tls_is_answered_as_http_so_that_docker_falls_back(way: str) -> None:
    hello = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(*hello, server_hostname="127.0.0.1")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    assert raw(way, hello[1].read()).startswith(b"HTTP/1.0 400 ")


@pytest.mark.parametrize("odd", [5, "x", ["x"], {"n": 5}, {"n": "sha256:x"}, None])
def test_an_answer_of_another_spark_is_of_the_types_that_it_must_have(odd: Any) -> None:
    found = understood({"reason": "\x1b[2Jno", "pair": odd, "digests": odd})
    assert found["reason"] == "\ufffd[2Jno" and found["digests"] == {}
    assert found["pair"] == (odd if isinstance(odd, str) else "")
    sound = {"nvcr.io/x:1": "sha256:" + "a" * 64}
    assert understood({"reason": odd, "digests": sound})["digests"] == sound
