# SPDX-License-Identifier: Apache-2.0
"""Shares what one Spark fetches with the other Sparks: image by digest, model by the Hub's own protocol.

`share serve FILE`   on the source: a registry that fetches missing blobs once, and the Hub's answers for models in the
                     cache folder, also while they are still being downloaded. Other Sparks come in over TLS, with a
                     key pair made for this run; this host's own Docker over the loopback interface.
`share connect FILE` on receivers: the source's services on ports of the loopback interface, which Docker takes for a
                     registry without TLS by itself.

FILE is JSON (see `Settings`). `ready.json` next to it reports what is ready, or why not. Both stop after
`idle` seconds without a request.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import re
import select
import shutil
import signal
import socket
import socketserver
import ssl
import sys
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from . import bounded
from .bounded import COMMIT, DIGEST, SHA256, BoundsError, printable
from .cache import manifest_path, model_state, repo_folder
from .docker import Docker, DockerError
from .job import FOLDER as JOBS
from .job import JobError, is_alive, read_status
from .registry import Layout, Reference, Registry, TailingBlob, credentials, opened, reference

FOLDER = "/run/sparkfleet/share"
STORE = "/var/lib/sparkfleet/share"
#: What is carried in, for the time of a run.
BUNDLE = "/var/lib/sparkfleet/bundle"
#: On the loopback interface: the source's registry and the source's Hub, on every Spark of a run.
REGISTRY_PORT, HUB_PORT = 9111, 9112
LISTING_BYTES = 32 << 20  # of a model's list of files
WAIT = 100.0  # seconds that a model's list of files may take to appear
CONNECT_SECONDS = 5.0
QUIET_SECONDS = 600.0  # without a byte either way, after which a connection through the tunnel ends
FIRST_BYTE_SECONDS = 10.0  # that a new connection may take to its first byte
BETWEEN_SECONDS = 60.0  # that a connection may be kept without a request
CONNECTIONS = 256  # at a time; each has a thread
CONNECTIONS_OF_ONE = 40  # of them from one address
#: Through a tunnel at a time. A Spark has two to the same source, and fetches need fewer than ten connections each:
#: whatever runs on it, it stays below what the source lets one address have.
CONNECTIONS_OF_TUNNEL = 16


@dataclasses.dataclass
class Settings:
    """What a source serves; sizes in bytes, times in seconds."""

    port: int = 9110  # for the others, over TLS
    listen: list[str] = dataclasses.field(default_factory=list)  # own addresses that the others reach
    images: list[str] = dataclasses.field(default_factory=list)
    digests: dict[str, str] = dataclasses.field(default_factory=dict)  # what images stand for, as the controller knows
    models: list[dict[str, str]] = dataclasses.field(default_factory=list)  # [{"repo", "revision"}]
    cache_dir: str = "/opt/hf"
    store: str = STORE
    offline: bool = False  # the store has all there is
    room: int = 0  # that must stay free in addition to the image's blobs
    docker_config: str = "/root/.docker/config.json"
    idle: float = 900.0


class Refused(Exception):
    """An answer other than the thing asked for."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


# -- models ------------------------------------------------------------------------------------------------


class Model:
    """A model in a Hub cache folder, described as the Hub would."""

    def __init__(self, cache_dir: str, repo: str, revision: str, jobs: str = JOBS) -> None:
        self.cache_dir, self.repo, self.revision = Path(cache_dir), repo, revision
        self.folder = self.cache_dir / repo_folder(repo)
        self._status = Path(jobs, "model.json")
        self._began = time.time()

    def answers_for(self, revision: str) -> bool:
        """Whether `revision` is the one that is served, by its name or its commit."""
        return revision in (self.revision, self.listing()["commit"])

    def listing(self) -> dict[str, Any]:
        """{"commit", "files": {name: {"size", "sha256" | "sha1"}}}; waits while the download finds it out."""
        deadline = time.monotonic() + WAIT
        while True:
            state = model_state(self.cache_dir, self.repo, self.revision)
            place = manifest_path(self.cache_dir, self.repo, state["commit"] or "")
            if not state["complete"]:
                place = place.with_name("fetching.json")
            with contextlib.suppress(OSError, BoundsError):
                found = self._read(place.name)
                if self.revision in (found["revision"], found["commit"]):
                    return found
            if not self.alive() or time.monotonic() > deadline:
                raise Refused(503, f"{self.repo} is neither here nor being downloaded")
            time.sleep(0.2)

    def _read(self, name: str) -> dict[str, Any]:
        """A list from the cache folder. Anyone who can write to the cache can write it, so its content is validated."""
        with bounded.open_below(self.cache_dir, ".sparkfleet", self.folder.name, name) as file:
            body = file.read(LISTING_BYTES + 1)
        found = bounded.as_dict(bounded.parse_json(body, name, LISTING_BYTES), name)
        bounded.matched(COMMIT, found.get("commit"), f"{name}: commit")
        bounded.as_str(found.get("revision"), f"{name}: revision", 1024)
        files = bounded.as_dict(found.get("files"), f"{name}: files")
        for value in files.values():
            entry = bounded.as_dict(value, f"{name}: file")
            bounded.as_int(entry.get("size"), f"{name}: size")
            kind = "sha256" if "sha256" in entry else "sha1"
            bounded.matched(SHA256 if kind == "sha256" else COMMIT, entry.get(kind), f"{name}: {kind}")
        return found

    def alive(self) -> bool:
        """Whether the download may still bring something: it runs, or has not started."""
        status = read_status(self._status)
        if status is None or not str(status.get("what", "")).startswith(f"{self.repo}@"):
            return True
        if status["updated"] < self._began:  # of an earlier run
            return True
        return bool(status["state"] == "running" and is_alive(status))

    def file(self, name: str) -> tuple[dict[str, Any], TailingBlob]:
        """A file's entry of the list, and its content. Raises Refused."""
        entry = self.listing()["files"].get(name)
        if entry is None:
            raise Refused(404, f"{self.repo} has no file {name}")
        name = str(entry.get("sha256") or entry.get("sha1"))
        # Large files are written to a name of ours; the client renames small ones into place.
        names = [name, *([f"{name}.incomplete"] if "sha256" in entry else [])]
        places = [(self.folder.name, "blobs", item) for item in names]
        blob = self.folder / "blobs" / name

        def find() -> BinaryIO | None:
            return opened(self.cache_dir, *places)

        try:
            file = find()
        except OSError as error:
            raise Refused(404, f"{self.repo}: {error}") from None
        if file is not None:
            file.close()
        return entry, TailingBlob(find, int(entry["size"]), lambda: blob.is_file() or self.alive())


# -- the source's server -----------------------------------------------------------------------------------


class Source:
    """What a source has to give."""

    def __init__(self, settings: Settings, docker: Docker | None = None, jobs: str = JOBS) -> None:
        self.settings = settings
        self.layout = Layout(settings.store)
        self.images: dict[str, tuple[Reference, str]] = {}  # repository there -> reference, digest
        self.models = {
            item["repo"]: Model(settings.cache_dir, item["repo"], item["revision"], jobs) for item in settings.models
        }
        self._docker = docker or Docker()

    def prepare(self) -> dict[str, str]:
        """Find out what the images stand for: {image: digest}. Raises JobError."""
        info: dict[str, Any] = {}
        arch = ""
        if self.settings.images and not self.settings.offline:
            info, arch = self._docker.info(), str(self._docker.version().get("Arch") or "")
        kept: list[str] = []
        for image in self.settings.images:
            ref = reference(image)
            if self.settings.offline:
                digest = self.layout.names().get(image, "")
                if not digest:
                    raise JobError("bundle", f"{image} is not in the bundle")
                try:
                    kept += self.layout.know(digest)
                except (OSError, BoundsError) as error:
                    raise JobError("bundle", f"{image} in the bundle is damaged: {error}") from error
            else:
                auth = credentials(Path(self.settings.docker_config), ref.registry)
                try:
                    wanted = self.settings.digests.get(image, "")
                    digest, blobs = self.layout.add(image, Registry(ref, info, auth), arch, wanted)
                except (OSError, BoundsError) as error:
                    failure = getattr(error, "id", "registry-unreachable")
                    raise JobError(failure, f"{ref.registry}, asked for {image}: {error}") from error
                kept += blobs
            self.images[ref.path] = (ref, digest)
        if not self.settings.offline and self.settings.images:
            self.layout.prune(kept)
            self._check_room(kept)
        return {image: self.images[reference(image).path][1] for image in self.settings.images}

    def blobs(self) -> list[str]:
        """The blobs of all images, manifests included."""
        return [blob for _, digest in self.images.values() for blob in self.layout.know(digest)]

    def _check_room(self, blobs: list[str]) -> None:
        missing = sum(self.layout.sizes[blob] for blob in set(blobs) if not self.layout.path(blob).is_file())
        free = shutil.disk_usage(self.settings.store).free
        if free < missing + self.settings.room:
            needed = f"{missing / 1e9:.1f} GB for the image in transit besides {self.settings.room / 1e9:.1f} GB"
            raise JobError("disk-full", f"{self.settings.store} has {free / 1e9:.1f} GB free, it takes {needed}")


def _path(target: str) -> str:
    """The path of a request. Raises Refused."""
    try:
        return unquote(urlsplit(target).path)
    except ValueError:
        raise Refused(400, "not an address") from None


TLS_HANDSHAKE = b"\x16"  # the first byte of a TLS record of that kind


class Handler(BaseHTTPRequestHandler):
    """Answers one connection: GET and HEAD of a registry and of the Hub."""

    protocol_version = "HTTP/1.1"
    server_version = "sparkfleet-share"
    server: Server
    timeout = 300  # in the course of an answer

    def handle(self) -> None:
        """Docker with containerd's image store tries TLS first, and HTTP only where an answer begins like one."""
        self.connection.settimeout(FIRST_BYTE_SECONDS)
        try:
            first = self.rfile.peek(1)[:1]  # type: ignore[attr-defined]  # a BufferedReader
            if first == TLS_HANDSHAKE:
                self.wfile.write(b"HTTP/1.0 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        except OSError:
            return
        if first and first != TLS_HANDSHAKE:
            super().handle()

    def handle_one_request(self) -> None:
        """Connection slots are for clients that send a request."""
        self.connection.settimeout(BETWEEN_SECONDS)
        super().handle_one_request()

    def log_message(self, format: str, *args: Any) -> None:
        """One line a request, for the journal."""
        print(f"{self.client_address[0]} {printable(format % args, 400)}", file=sys.stderr, flush=True)

    def do_HEAD(self) -> None:
        """Headers only."""
        self._answer()

    def do_GET(self) -> None:
        """Content."""
        self._answer()

    def _answer(self) -> None:
        self.connection.settimeout(self.timeout)
        with self.server.busy():
            try:
                self._route(_path(self.path))
            except Refused as refused:
                self._json({"errors": [{"code": "UNKNOWN", "message": str(refused)}]}, refused.status)
            except (BrokenPipeError, ConnectionResetError, TimeoutError, ssl.SSLError):
                self.close_connection = True

    def _route(self, path: str) -> None:
        source = self.server.source
        registry = re.fullmatch(r"/v2/(.+)/(manifests|blobs)/([^/]+)", path)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+?))?/?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if path in ("/v2", "/v2/"):
            self._json({})
        elif registry:
            self._blob(source, registry[1], registry[2], registry[3])
        elif api:
            model = self._model(api[1], api[3])
            if api[2] == "tree":
                self._json(tree(model.listing()))
            else:
                self._json(info(model.repo, model.listing()))
        elif file:
            self._file(self._model(file[1], file[2]), file[3])
        else:
            raise Refused(404, "not found")

    # -- registry ------------------------------------------------------------------------------------------

    def _blob(self, source: Source, path: str, kind: str, wanted: str) -> None:
        if path not in source.images:
            raise Refused(404, f"{path} is not shared")
        ref, digest = source.images[path]
        if wanted == ref.tag and kind == "manifests":
            wanted = digest
        if not DIGEST.fullmatch(wanted) or wanted not in source.layout.sizes:
            raise Refused(404, f"{path} has no {wanted}")
        headers = {"Docker-Content-Digest": wanted, "ETag": f'"{wanted}"'}
        headers["Content-Type"] = (
            source.layout.media_type(wanted) if kind == "manifests" else "application/octet-stream"
        )
        # HEAD does not fetch a blob: Docker checks all before it pulls any.
        content = source.layout.open(wanted) if self.command == "GET" else None
        self._content(content, source.layout.sizes[wanted], headers)

    # -- Hub -----------------------------------------------------------------------------------------------

    def _model(self, repo: str, revision: str | None) -> Model:
        model = self.server.source.models.get(repo)
        if model is None or not model.answers_for(revision or "main"):
            raise Refused(404, f"{repo} is not shared")
        return model

    def _file(self, model: Model, name: str) -> None:
        entry, content = model.file(name)
        etag = f'"{entry.get("sha256") or entry.get("sha1")}"'
        headers = {"ETag": etag, "X-Repo-Commit": model.listing()["commit"], "Content-Type": "application/octet-stream"}
        if "sha256" in entry:
            headers.update({"X-Linked-Etag": etag, "X-Linked-Size": str(entry["size"])})
        self._content(content, int(entry["size"]), headers)

    # -- answers -------------------------------------------------------------------------------------------

    def _content(self, content: TailingBlob | None, size: int, headers: dict[str, str]) -> None:
        fresh = self.headers.get("If-Range", headers["ETag"]) == headers["ETag"]
        ranged = part(self.headers.get("Range", ""), size) if fresh else None
        start, end = ranged or (0, size)
        if ranged and start >= size:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{size}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        status = 206 if ranged else 200
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - start))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.end_headers()
        if self.command == "HEAD" or content is None:
            return
        try:
            for chunk in content.read(start, end):
                self.wfile.write(chunk)
        except OSError as error:
            # The length was announced, so the client sees that it was truncated.
            print(f"{self.path}: {error}", file=sys.stderr, flush=True)
            self.close_connection = True

    def _json(self, data: Any, status: int = 200) -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Docker-Distribution-Api-Version", "registry/2.0")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def part(wanted: str, size: int) -> tuple[int, int] | None:
    """First byte and end (exclusive) of a header Range; None for the whole, where it is not one range from a byte on.
    A first byte of `size` or more cannot be satisfied."""
    match = re.fullmatch(r"bytes=([0-9]{1,18})-([0-9]{0,18})", wanted)
    if not match or (match[2] and int(match[2]) < int(match[1])):
        return None
    return int(match[1]), min(int(match[2]) + 1 if match[2] else size, size)


def tree(listing: dict[str, Any]) -> list[dict[str, Any]]:
    """The Hub's GET /api/models/REPO/tree/REVISION?recursive=true."""
    found = []
    for name, entry in listing["files"].items():
        item = {"type": "file", "path": name, "size": entry["size"], "oid": entry.get("sha1") or entry["sha256"][:40]}
        if "sha256" in entry:
            item["lfs"] = {"oid": entry["sha256"], "sha256": entry["sha256"], "size": entry["size"], "pointerSize": 130}
        found.append(item)
    return found


def info(repo: str, listing: dict[str, Any]) -> dict[str, Any]:
    """The Hub's GET /api/models/REPO/revision/REVISION."""
    siblings = [{"rfilename": name, "size": entry["size"]} for name, entry in listing["files"].items()]
    return {"id": repo, "modelId": repo, "sha": listing["commit"], "private": False, "tags": [], "siblings": siblings}


class Activity:
    """When something was last asked for."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._count, self._last = 0, time.monotonic()

    def __enter__(self) -> None:
        with self._mutex:
            self._count += 1

    def __exit__(self, *exc: object) -> None:
        with self._mutex:
            self._count -= 1
            self._last = time.monotonic()

    def idle(self) -> float:
        """Seconds since."""
        with self._mutex:
            return 0.0 if self._count else time.monotonic() - self._last


class Limited(socketserver.ThreadingMixIn):
    """At most `most` connections at a time, and `most_of_one` from one address; more are closed at once."""

    daemon_threads = True
    request_queue_size = 128
    most, most_of_one = CONNECTIONS, CONNECTIONS_OF_ONE

    def __init__(self, *args: Any) -> None:
        self._mutex = threading.Lock()
        self._held: collections.Counter[str] = collections.Counter()
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread a connection, if there is a place."""
        if not self._enter(client_address[0]):
            self.shutdown_request(request)  # type: ignore[attr-defined]
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread available: nothing else would release the slot
            self._leave(client_address[0])
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """The connection's own thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._leave(client_address[0])

    def _enter(self, peer: str) -> bool:
        with self._mutex:
            if self._held.total() >= self.most or self._held[peer] >= self.most_of_one:
                return False
            self._held[peer] += 1
            return True

    def _leave(self, peer: str) -> None:
        with self._mutex:
            self._held[peer] -= 1
            if not self._held[peer]:
                del self._held[peer]


class Server(Limited, HTTPServer):
    """The source's server; over TLS where there is a `context`."""

    def __init__(self, address: tuple[str, int], source: Source, activity: Activity, context: ssl.SSLContext | None):
        self.source, self._activity, self._context = source, activity, context
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, Handler)

    def busy(self) -> Activity:
        """A context for the time of a request."""
        return self._activity

    def finish_request(self, request: Any, client_address: Any) -> None:
        """In the connection's own thread: a slow handshake delays no other connection."""
        if self._context is None:
            super().finish_request(request, client_address)
            return
        try:
            request.settimeout(CONNECT_SECONDS)
            wrapped = self._context.wrap_socket(request, server_side=True)
        except (OSError, ssl.SSLError) as error:
            print(f"{client_address[0]} was rejected: {error}", file=sys.stderr, flush=True)
            return
        with wrapped:
            super().finish_request(wrapped, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A broken connection is for the other side to handle."""
        print(f"{client_address[0]}: {sys.exc_info()[1]!r}", file=sys.stderr, flush=True)


# -- the others' tunnels -----------------------------------------------------------------------------------


class Tunnel(Limited, socketserver.TCPServer):
    """A port of the loopback interface that leads to a source, over TLS. The source has a place for those alone who say
    something."""

    allow_reuse_address = True
    most = most_of_one = CONNECTIONS_OF_TUNNEL

    def __init__(self, port: int, target: tuple[str, int], context: ssl.SSLContext, activity: Activity) -> None:
        self._target, self._context, self._activity = target, context, activity
        super().__init__(("127.0.0.1", port), socketserver.BaseRequestHandler)

    def connect(self) -> ssl.SSLSocket:
        """A connection to the source. Raises OSError."""
        raw = socket.create_connection(self._target, timeout=CONNECT_SECONDS)
        try:
            wrapped = self._context.wrap_socket(raw, server_hostname=None)
        except OSError:
            raw.close()
            raise
        wrapped.settimeout(None)
        return wrapped

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Carry bytes both ways until either side has done."""
        try:
            request.settimeout(FIRST_BYTE_SECONDS)
            if not request.recv(1, socket.MSG_PEEK):
                return
        except OSError:
            return
        with self._activity:
            try:
                with self.connect() as far:
                    carry(request, far)
            except OSError as error:
                print(f"to {self._target[0]}:{self._target[1]}: {error}", file=sys.stderr, flush=True)


def carry(near: socket.socket, far: ssl.SSLSocket) -> None:
    """Bytes from each to the other, until one closes."""
    while True:
        ready = [far] if far.pending() else select.select([near, far], [], [], QUIET_SECONDS)[0]
        if not ready:
            return
        for here in ready:
            try:
                # What made the TLS side readable may be no data at all (a session ticket): never wait for more.
                here.settimeout(0)
                data = here.recv(1 << 17)
            except (ssl.SSLWantReadError, BlockingIOError):
                continue
            finally:
                here.settimeout(QUIET_SECONDS)
            if not data:
                return
            (far if here is near else near).sendall(data)


# -- the verb ----------------------------------------------------------------------------------------------


def server_context(pair: Path) -> ssl.SSLContext:
    """TLS that lets in those who have the run's key pair alone."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(pair)
    context.load_verify_locations(pair)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(pair: Path) -> ssl.SSLContext:
    """TLS to a server that shows the run's certificate, whatever its name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(pair)
    context.load_verify_locations(pair)
    return context


def write_ready(folder: Path, **what: Any) -> None:
    """`ready.json`, replaced as a whole."""
    temporary = folder / ".ready.json.new"
    temporary.write_text(json.dumps(what) + "\n", "utf-8")
    temporary.replace(folder / "ready.json")


def serve(file: Path) -> int:
    """Serve until idle or stopped."""
    folder = file.parent
    settings = Settings(**json.loads(file.read_text("utf-8")))
    activity = Activity()
    source = Source(settings)
    try:
        digests = source.prepare()
        context = server_context(folder / "run.pem")
        servers = [Server((address, settings.port), source, activity, context) for address in settings.listen]
        # For this host itself; a port that it has no use for may lead to another source.
        if settings.images:
            servers.append(Server(("127.0.0.1", REGISTRY_PORT), source, activity, None))
        if settings.models and settings.offline:
            servers.append(Server(("127.0.0.1", HUB_PORT), source, activity, None))
    except JobError as error:
        write_ready(folder, error=str(error))
        return 0
    except (OSError, DockerError) as error:
        write_ready(folder, error=f"ports {settings.port} and {REGISTRY_PORT}: {error}")
        return 0
    _run(servers, activity, settings.idle, folder, digests=digests)
    _clean(source)
    return 0


def connect(file: Path) -> int:
    """Tunnel to the sources until idle or stopped."""
    folder = file.parent
    settings = json.loads(file.read_text("utf-8"))
    activity = Activity()
    try:
        tunnels = []
        for item in settings["tunnels"]:
            context = client_context(folder / f"{item['pair']}.pem")
            tunnels.append(Tunnel(int(item["listen"]), (item["address"], int(item["port"])), context, activity))
        for tunnel in tunnels:  # better known now than when Docker asks
            tunnel.connect().close()
    except OSError as error:
        where = ", ".join(sorted({f"{item['address']}:{item['port']}" for item in settings["tunnels"]}))
        write_ready(folder, error=f"cannot reach {where}: {error}")
        return 0
    _run(tunnels, activity, float(settings.get("idle", 900)), folder)
    return 0


def _run(
    servers: Sequence[socketserver.BaseServer], activity: Activity, idle: float, folder: Path, **ready: Any
) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    write_ready(folder, error="", **ready)
    while activity.idle() < idle:
        time.sleep(1)


def _clean(source: Source) -> None:
    """After a run that was never seen to end: what is whole here has been fetched; what is not is worth keeping."""
    if not source.settings.offline and all(source.layout.path(blob).is_file() for blob in source.blobs()):
        shutil.rmtree(source.settings.store, ignore_errors=True)


def main(argv: Sequence[str]) -> int:
    """`serve FILE` or `connect FILE`; the exit code."""
    verbs = {"serve": serve, "connect": connect}
    usage = "usage: sparkfleet_host.pyz share serve|connect FILE"
    if list(argv) in (["-h"], ["--help"]):
        print(usage)
        return 0
    if len(argv) != 2 or argv[0] not in verbs:
        print(usage, file=sys.stderr)
        return 2
    return verbs[argv[0]](Path(argv[1]))
