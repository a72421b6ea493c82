#!/usr/bin/env python3
"""Stand-in for huggingface.co: as much of the Hub's protocol as the real client uses. Standard library only.

Repositories lie in ROOT/ORG/NAME/{repo.json,files/*}; repo.json is {"gated": bool, "license": str}. TOKENS is a JSON
file {token: {"name": str, "accepted": [repository, ...]}}, read for each request. Messages are the real Hub's.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import re
import sys
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

#: Larger files are LFS objects on the Hub: their ETag is a sha256, that of the others a git blob's sha1.
LFS_FROM = 1_000_000
CHUNK = 1 << 18


class Refusal(Exception):
    """An answer other than the thing asked for."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


_hashing = threading.Lock()  # one at a time: several requests for a cold file would each hash it


def _digests(path: Path, size: int, modified: int) -> tuple[str, str]:
    with _hashing:
        return _hashed(path, size, modified)


@functools.lru_cache(maxsize=256)
def _hashed(path: Path, _size: int, _modified: int) -> tuple[str, str]:
    content = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return blob, hashlib.sha256(content).hexdigest()


class Repository:
    """One model on disk."""

    def __init__(self, root: Path, name: str) -> None:
        self.name, self.folder = name, root / name / "files"
        if not self.folder.is_dir():
            raise Refusal(404, "RepoNotFound", "Repository not found")
        said = json.loads((root / name / "repo.json").read_text(encoding="utf-8"))
        self.gated, self.license = bool(said.get("gated")), said.get("license")

    def entry(self, path: Path) -> dict[str, Any]:
        """A file as the Hub's tree lists it."""
        info = path.stat()
        blob, sha256 = _digests(path, info.st_size, info.st_mtime_ns)
        name = path.relative_to(self.folder).as_posix()
        entry: dict[str, Any] = {"type": "file", "path": name, "size": info.st_size, "oid": blob}
        if info.st_size >= LFS_FROM:
            entry["lfs"] = {"oid": sha256, "sha256": sha256, "size": info.st_size, "pointerSize": 130}
        return entry

    def tree(self) -> list[dict[str, Any]]:
        """All files, by name."""
        return [self.entry(path) for path in sorted(self.folder.rglob("*")) if path.is_file()]

    def commit(self) -> str:
        """40 hex digits that follow from names and contents."""
        digest = hashlib.sha1(usedforsecurity=False)
        for entry in self.tree():
            digest.update(f"{entry['path']}\0{entry['oid']}\n".encode())
        return digest.hexdigest()

    def at(self, revision: str) -> str:
        """The commit of a revision."""
        commit = self.commit()
        if revision not in ("main", commit):
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    server_version = "hub-stand-in"
    root: Path
    tokens: Path
    status: int
    sent: int

    def log_message(self, format: str, *args: Any) -> None:
        """The default log would name nothing secret, but one line of our own is enough."""

    def do_HEAD(self) -> None:
        """Headers only."""
        self._answer()

    def do_GET(self) -> None:
        """Content."""
        self._answer()

    def _answer(self) -> None:
        began = time.monotonic()
        self.status, self.sent = 0, 0  # counted as they go out, so that an interrupted transfer is reported correctly
        try:
            self._route(unquote(urlsplit(self.path).path))
        except Refusal as refusal:
            self._body(
                {"error": str(refusal)},
                refusal.status,
                {"X-Error-Code": refusal.code, "X-Error-Message": str(refusal)},
            )
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        line = f"{self.command} {self.path} {self.status} {self.sent} bytes {time.monotonic() - began:.2f} s"
        print(line, file=sys.stderr, flush=True)

    def send_response(self, code: int, message: str | None = None) -> None:
        """Note the status for the log."""
        self.status = int(code)
        super().send_response(code, message)

    def _account(self) -> dict[str, Any] | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        known = json.loads(self.tokens.read_text(encoding="utf-8")) if self.tokens.exists() else {}
        account: dict[str, Any] | None = known.get(token)
        return account

    def _allow(self, repository: Repository) -> None:
        if not repository.gated:
            return
        page = f"https://huggingface.co/{repository.name}"
        account = self._account()
        if account is None:
            raise Refusal(
                401,
                "GatedRepo",
                f"Access to model {repository.name} is restricted. You must have access to it and be authenticated "
                "to access it. Please log in.",
            )
        if repository.name not in account["accepted"]:
            raise Refusal(
                403,
                "GatedRepo",
                f"Access to model {repository.name} is restricted and you are not in the authorized list. "
                f"Visit {page} to ask for access.",
            )

    def _route(self, path: str) -> None:
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?/?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if path == "/api/whoami-v2":
            account = self._account()
            if account is None:
                raise Refusal(401, "", "Invalid username or password.")
            self._body({"type": "user", "name": account["name"], "auth": {"type": "access_token"}})
        elif path == "/ready":  # the real Hub has no such path: all is hashed then, so that no client waits for it
            for folder in self.root.glob("*/*/files"):
                Repository(self.root, folder.parent.relative_to(self.root).as_posix()).commit()
            self._body({"ready": True})
        elif api:
            self._api(self._repository(api[1]), api[2] or "revision", api[3] or "main")
        elif file:
            self._file(self._repository(file[1]), file[2], file[3])
        else:
            raise Refusal(404, "", "Not Found")

    def _repository(self, name: str) -> Repository:
        try:
            return Repository(self.root, name)
        except Refusal:
            if self._account() is None:  # the real Hub does not reveal to strangers what exists
                raise Refusal(401, "RepoNotFound", "Invalid username or password.") from None
            raise

    def _api(self, repository: Repository, verb: str, revision: str) -> None:
        commit = repository.at(revision)
        tree = repository.tree()
        if verb == "tree":
            self._body(tree)
            return
        siblings = [
            {"rfilename": e["path"], "size": e["size"], "blobId": e["oid"], **({"lfs": e["lfs"]} if "lfs" in e else {})}
            for e in tree
        ]
        gated = "manual" if repository.gated else False
        self._body(
            {
                "id": repository.name,
                "modelId": repository.name,
                "sha": commit,
                "private": False,
                "gated": gated,
                "cardData": {"license": repository.license} if repository.license else None,
                "disabled": False,
                "tags": [],
                "siblings": siblings,
            }
        )

    def _file(self, repository: Repository, revision: str, name: str) -> None:
        commit = repository.at(revision)
        self._allow(repository)
        path = (repository.folder / name).resolve()
        if not path.is_file() or repository.folder.resolve() not in path.parents:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        entry = repository.entry(path)
        etag = f'"{entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]}"'
        size, start, end, status = entry["size"], 0, entry["size"] - 1, HTTPStatus.OK
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and self.headers.get("If-Range", etag) == etag:
            start, end = int(wanted[1]), min(int(wanted[2] or end), end)
            if start >= size:
                self.send_response(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
                self.send_header("Content-Range", f"bytes */{size}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            status = HTTPStatus.PARTIAL_CONTENT
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(end - start + 1))
        if status == HTTPStatus.PARTIAL_CONTENT:
            self.send_header("Content-Range", f"bytes {start}-{end}/{size}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", etag)
        self.send_header("X-Repo-Commit", commit)
        if "lfs" in entry:
            self.send_header("X-Linked-Etag", etag)
            self.send_header("X-Linked-Size", str(size))
        self.end_headers()
        if self.command == "HEAD":
            return
        with path.open("rb") as file:
            file.seek(start)
            left = end - start + 1
            while left:
                chunk = file.read(min(CHUNK, left))
                self.wfile.write(chunk)
                self.sent += len(chunk)
                left -= len(chunk)

    def _body(self, data: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            self.sent += len(body)


class Server(ThreadingHTTPServer):
    """As many callers at once as there are Sparks."""

    daemon_threads = True
    request_queue_size = 128


def server(root: Path, tokens: Path, address: str, port: int) -> ThreadingHTTPServer:
    """A server that is ready to serve."""
    handler = type("BoundHandler", (Handler,), {"root": root, "tokens": tokens})
    return Server((address, port), handler)


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--listen", default="127.0.0.1:8001")
    options = parser.parse_args()
    address, _, port = options.listen.rpartition(":")
    server(options.root, options.tokens, address, int(port)).serve_forever()


if __name__ == "__main__":
    main()
