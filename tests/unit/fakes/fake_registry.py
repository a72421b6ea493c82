"""A registry of a few lines: an image behind an index, and whatever a test lets it answer instead."""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import json
import re
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"


def digest(body: bytes) -> str:
    return "sha256:" + hashlib.sha256(body).hexdigest()


def image_manifest(layers: list[bytes], config: bytes = b'{"architecture": "arm64"}', **more: Any) -> bytes:
    entries = [{"digest": digest(body), "size": len(body)} for body in layers]
    described = {"digest": digest(config), "size": len(config)}
    return json.dumps({"mediaType": MANIFEST, "config": described, "layers": entries, **more}).encode()


@dataclass
class FakeRegistry:
    """Serves REPOSITORY nvidia/vllm with the tag 1; `answers` (path -> what to do) come first. `seen` is what was
    asked: path and headers. With `token` only who has it is answered; `realm` is where to get one."""

    layers: list[bytes] = field(default_factory=lambda: [b"a" * 300_000, b"b" * 5_000])
    answers: dict[str, Callable[[BaseHTTPRequestHandler], None]] = field(default_factory=dict)
    seen: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    token: str = ""
    challenge: str = ""
    port: int = 0

    def __post_init__(self) -> None:
        config = b'{"architecture": "arm64"}'
        self.manifest = image_manifest(self.layers, config)
        platforms = (("amd64", digest(b"other")), ("arm64", digest(self.manifest)))
        entries = [{"digest": d, "size": 1, "platform": {"os": "linux", "architecture": a}} for a, d in platforms]
        self.index = json.dumps({"mediaType": INDEX, "manifests": entries}).encode()
        self.things = {digest(body): body for body in (*self.layers, config, self.manifest, self.index)}
        self.things["1"] = self.index

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def paths(self) -> list[str]:
        return [path for path, _ in self.seen]

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        self.seen.append((handler.path, dict(handler.headers)))
        path = handler.path.partition("?")[0]
        if path in self.answers:
            self.answers[path](handler)
        elif path == "/token":
            reply(handler, json.dumps({"token": self.token}).encode())
        elif self.token and handler.headers.get("Authorization") != f"Bearer {self.token}":
            reply(handler, b"", 401, {"WWW-Authenticate": self.challenge})
        else:
            thing = self.things.get(path.rpartition("/")[2])
            reply(handler, thing or b"{}", 200 if thing else 404)

    def serve_tag(self, body: bytes) -> None:
        self.things["1"] = self.things[digest(body)] = body


def reply(
    handler: BaseHTTPRequestHandler, body: bytes, status: int = 200, headers: dict[str, str] | None = None
) -> None:
    """An answer that heeds a Range."""
    found = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
    size, start = len(body), int(found[1]) if found and status == 200 else 0
    handler.send_response(206 if start else status)
    if start:
        handler.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
    for key, value in (headers or {}).items():
        handler.send_header(key, value)
    handler.send_header("Content-Length", str(size - start))
    handler.end_headers()
    handler.wfile.write(body[start:])


def certificate(folder: Path, *names: str) -> Path:
    """Key and self-signed certificate in one file, for host names or addresses."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
    now = datetime.datetime.now(datetime.timezone.utc)
    alternatives: list[x509.GeneralName] = [
        x509.IPAddress(ipaddress.ip_address(item)) if item[0].isdigit() else x509.DNSName(item) for item in names
    ]
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = folder / f"{names[0]}.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return file


@contextmanager
def serving(made: FakeRegistry, pair: Path | None = None) -> Iterator[FakeRegistry]:
    """The registry on a port of the loopback interface; over TLS with a key and certificate."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            made.handle(self)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *args: Any) -> None:
            pass

    with Server(("127.0.0.1", 0), Handler) as server:
        if pair:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(pair)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        made.port = server.server_address[1]
        if not made.challenge:
            scheme = "https" if pair else "http"
            made.challenge = f'Bearer realm="{scheme}://127.0.0.1:{made.port}/token",service="s"'
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield made
        server.shutdown()
