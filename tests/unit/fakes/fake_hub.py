"""As much of the Hugging Face Hub as the real client asks for, in this process, with faults to order.

Paths and headers as huggingface_hub 2.4 uses them (hf_api.py, file_download.py)."""

from __future__ import annotations

import hashlib
import json
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class Hub:
    """One repository. `large` names are LFS files. Faults: see the fields."""

    repo: str = "acme/tiny"
    files: dict[str, bytes] = field(default_factory=dict)
    large: tuple[str, ...] = ()
    branch: str = "main"
    gated: bool = False
    licence: str = ""
    tokens: dict[str, bool] = field(default_factory=dict)  # token: has access
    accounts: dict[str, str] = field(default_factory=dict)  # token: name of its account, for whoami
    corrupt: dict[str, int] = field(default_factory=dict)  # name: how many times it is sent wrong
    cut_at: dict[str, int] = field(default_factory=dict)  # name: connection closed after so many bytes, once
    rate: float = 0  # bytes a second and connection; 0: no limit
    more: list[dict[str, Any]] = field(default_factory=list)  # entries of the list besides `files`
    next_page: str = ""  # the Link header of the list
    elsewhere: str = ""  # where large files are: a URL that the file's own path is added to
    longer: dict[str, bytes] = field(default_factory=dict)  # name: sent after the content
    answer: dict[str, bytes] = field(default_factory=dict)  # revision, tree, whoami: sent instead
    redirect: dict[str, str] = field(
        default_factory=dict
    )  # revision, tree, whoami, a file's name: path it is redirected to
    redirect_body: bytes = b""
    encoding: dict[str, str] = field(default_factory=dict)  # revision, tree, a file's name: Content-Encoding
    pause: float = 0  # seconds between the bytes of a list
    drip: dict[str, str] = field(default_factory=dict)  # a file's name: head, redirect or rest comes byte by byte
    drips: int = 1_000  # how many times
    url: str = ""
    tokens_seen: list[tuple[str, str]] = field(default_factory=list)  # path, Authorization
    asked: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, Range

    @property
    def commit(self) -> str:
        return hashlib.sha1(b"".join(n.encode() + c for n, c in sorted(self.files.items()))).hexdigest()  # noqa: S324

    def hash(self, name: str) -> str:
        content = self.files[name]
        if name in self.large:
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # noqa: S324

    def tree(self) -> list[dict[str, Any]]:
        entries = []
        for name, content in self.files.items():
            oid = self.hash(name)
            entry = {"type": "file", "path": name, "size": len(content), "oid": oid}
            if name in self.large:
                entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 130}
                entry["oid"] = hashlib.sha1(oid.encode()).hexdigest()  # noqa: S324
            entries.append(entry)
        return [*entries, *self.more]

    def gets(self, name: str) -> list[str]:
        """The Range headers of the GETs of a file's content."""
        return [r for method, path, r in self.asked if method == "GET" and path.endswith(f"/{name}")]


@contextmanager
def serve(hub: Hub, host: str = "127.0.0.1", port: int = 0, pair: Path | None = None) -> Iterator[Hub]:
    """Serves `hub` until the end of the block; sets its url. Over TLS with a certificate and its key."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # head and body are two packets

        def log_message(self, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.respond(head=True)

        def do_GET(self) -> None:
            self.respond(head=False)

        def respond(self, head: bool) -> None:
            path = self.path.split("?")[0]
            hub.asked.append((self.command, path, self.headers.get("Range", "")))
            hub.tokens_seen.append((path, self.headers.get("Authorization", "")))
            api = f"/api/models/{hub.repo}/"
            if path == "/api/whoami-v2":
                return self.whoami()
            if path.startswith("/api/"):
                if not path.startswith(api):
                    return self.refuse(404, "RepoNotFound")
                verb, _, revision = path[len(api) :].partition("/")
                if verb in hub.redirect:
                    return self.send_elsewhere(hub.url + hub.redirect[verb])
                if revision not in (hub.branch, hub.commit):
                    return self.refuse(404, "RevisionNotFound")
                tree = hub.tree()
                names = [{"rfilename": entry["path"]} for entry in tree]
                info: dict[str, Any] = {"id": hub.repo, "sha": hub.commit, "siblings": names}
                info["gated"] = "auto" if hub.gated else False
                info["cardData"] = {"license": hub.licence} if hub.licence else None
                body = json.dumps(info if verb == "revision" else tree).encode()
                return self.send_body(hub.answer.get(verb, body), verb)
            name = path.removeprefix(f"/{hub.repo}/resolve/{hub.commit}/")
            if name not in hub.files:
                return self.refuse(404, "EntryNotFound")
            if hub.gated:
                token = self.headers.get("Authorization", "").removeprefix("Bearer ")
                if token not in hub.tokens:
                    return self.refuse(401, "GatedRepo")
                if not hub.tokens[token]:
                    return self.refuse(403, "GatedRepo")
            if not head and hub.drip.get(name) in ("head", "redirect"):
                return self.send_drops(hub.drip[name])
            if name in hub.redirect and not head:
                return self.send_elsewhere(hub.url + hub.redirect[name])
            if hub.elsewhere and name in hub.large:
                return self.send_elsewhere(hub.elsewhere + path)
            self.send_file(name, head)

        def whoami(self) -> None:
            account = hub.accounts.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
            if "whoami" in hub.redirect:
                return self.send_elsewhere(hub.redirect["whoami"])
            if "whoami" in hub.drip:
                return self.send_drops(hub.drip["whoami"])
            if account is None and "whoami" not in hub.answer:
                return self.refuse(401, "")
            self.send_body(hub.answer.get("whoami", json.dumps({"type": "user", "name": account}).encode()), "whoami")

        def send_elsewhere(self, url: str) -> None:
            self.send_response(302)
            self.send_header("Location", url)
            self.send_header("X-Repo-Commit", hub.commit)
            self.send_header("Content-Length", str(len(hub.redirect_body)))
            self.end_headers()
            self.wfile.write(hub.redirect_body)

        def send_drops(self, part: str) -> None:
            self.wfile.write(b"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 9999\r\n")
            self.wfile.write(b"X-More: " if part == "head" else b"\r\n")
            while True:
                self.wfile.write(b"x")
                time.sleep(0.02)

        def send_file(self, name: str, head: bool) -> None:
            content = hub.files[name]
            size, start, asked = len(content), 0, self.headers.get("Range")
            if asked and not head:
                start = int(asked.removeprefix("bytes=").split("-")[0])
            if not head and hub.corrupt.get(name, 0) > 0:
                hub.corrupt[name] -= 1
                content = bytes(len(content))
            self.send_response(206 if start else 200)
            self.send_header("ETag", f'"{hub.hash(name)}"')
            self.send_header("X-Repo-Commit", hub.commit)
            self.send_header("Accept-Ranges", "bytes")
            if name in hub.encoding:
                self.send_header("Content-Encoding", hub.encoding[name])
            more = hub.longer.get(name, b"")
            if more:  # until the connection closes
                self.close_connection = True
            else:
                self.send_header("Content-Length", str(size - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
            self.end_headers()
            if head:
                return
            stop = hub.cut_at.pop(name, size)
            if hub.drip.get(name) == "rest" and hub.drips:
                hub.drips -= 1
                self.wfile.write(content[start : start + (size - start) * 3 // 4])
                for at in range(start + (size - start) * 3 // 4, size):
                    self.wfile.write(content[at : at + 1])
                    time.sleep(0.02)
            for at in range(start, stop, 65536):
                self.wfile.write(content[at : min(stop, at + 65536)])
                if hub.rate:
                    time.sleep(65536 / hub.rate)
            if stop < size:
                self.close_connection = True
            self.wfile.write(more)

        def refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def send_body(self, raw: bytes, verb: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            if verb == "tree" and hub.next_page:
                self.send_header("Link", f'<{hub.next_page}>; rel="next"')
            if verb in hub.encoding:
                self.send_header("Content-Encoding", hub.encoding[verb])
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            step = 1 if verb == "tree" and hub.pause else len(raw) or 1
            for at in range(0, len(raw), step):
                self.wfile.write(raw[at : at + step])
                time.sleep(hub.pause)

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # a client that was killed half way is part of the tests

    with Server((host, port), Handler) as server:
        if pair:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(pair)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        hub.url = f"{'https' if pair else 'http'}://{host}:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield hub
        finally:
            server.shutdown()
