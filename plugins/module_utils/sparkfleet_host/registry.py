# SPDX-License-Identifier: Apache-2.0
"""A container registry asked as Docker asks it, and images kept as an OCI layout; standard library only.

Sources: https://distribution.github.io/distribution/spec/api/ (requests),
https://distribution.github.io/distribution/spec/auth/token/ (tokens),
https://github.com/opencontainers/image-spec/blob/main/image-layout.md (folder).
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import http.client
import json
import os
import re
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .job import JobError

INDEXES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
MANIFESTS = (
    *INDEXES,
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
#: Annotation of a layout's index that names an image.
NAME = "org.opencontainers.image.ref.name"
CHUNK = 1 << 20
SILENCE = 120.0  # seconds without a byte after which a transfer counts as broken
TRIES = 3


@dataclass(frozen=True)
class Reference:
    """An image name taken apart; `registry` is the host, `path` the repository there."""

    name: str
    tag: str
    digest: str
    registry: str
    path: str

    @property
    def wanted(self) -> str:
        """What the API calls tag: the digest where there is one."""
        return self.digest or self.tag

    @property
    def local(self) -> str:
        """How the engine names it locally."""
        return f"{self.name}@{self.digest}" if self.digest else f"{self.name}:{self.tag}"


def reference(image: str) -> Reference:
    """Parse NAME[:TAG][@sha256:DIGEST]; raises JobError. A tag or digest is asked for, `latest` never assumed."""
    match = re.fullmatch(
        r"(?P<name>[a-zA-Z0-9][\w.-]*(?::\d+(?=/))?(?:/[a-z0-9][\w.-]*)*)"
        r"(?::(?P<tag>\w[\w.-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?",
        image,
    )
    if not match or not (match["tag"] or match["digest"]):
        raise JobError("bad-input", f"image {image!r} is not of the form NAME:TAG or NAME@sha256:DIGEST")
    name = match["name"]
    first, _, rest = name.partition("/")
    if rest and ("." in first or ":" in first or first == "localhost"):
        registry, path = first, rest
    else:
        registry, path = "docker.io", name if rest else f"library/{name}"
    return Reference(name, match["tag"] or "", match["digest"] or "", registry, path)


def credentials(config: Path, registry: str) -> dict[str, str] | None:
    """User and password that `docker login` left for a registry; None where there are none."""
    try:
        entries = json.loads(config.read_text("utf-8")).get("auths") or {}
        keys = [registry, f"https://{registry}", f"https://{registry}/v1/", f"https://{registry}/v2/"]
        if registry == "docker.io":
            keys.insert(0, "https://index.docker.io/v1/")
        for key in keys:
            if (entries.get(key) or {}).get("auth"):
                user, _, password = base64.b64decode(entries[key]["auth"]).decode().partition(":")
                return {"username": user, "password": password.rstrip("\0"), "serveraddress": key}
    except (OSError, ValueError, AttributeError, binascii.Error):
        return None
    return None


class Registry:
    """The registry of an image. `info` is what `docker info` says (proxies, registries without TLS), `auth` what
    `credentials` gives. Every method raises OSError when there is no good answer."""

    def __init__(self, ref: Reference, info: dict[str, Any], auth: dict[str, str] | None, timeout: float = 15) -> None:
        self.ref, self.timeout = ref, timeout
        self.host = "registry-1.docker.io" if ref.registry == "docker.io" else ref.registry
        context = ssl.create_default_context()
        for authority in sorted(Path("/etc/docker/certs.d", ref.registry).glob("*.crt")):
            with contextlib.suppress(OSError):
                context.load_verify_locations(str(authority))
        proxies = {"http": info.get("HttpProxy") or "", "https": info.get("HttpsProxy") or ""}
        self._opener = urllib.request.build_opener(
            urllib.request.HTTPSHandler(context=context),
            urllib.request.ProxyHandler({kind: proxy for kind, proxy in proxies.items() if proxy}),
        )
        self._basic = ""
        if auth:
            self._basic = "Basic " + base64.b64encode(f"{auth['username']}:{auth['password']}".encode()).decode()
        self._authorization = ""
        index = ((info.get("RegistryConfig") or {}).get("IndexConfigs") or {}).get(ref.registry) or {}
        plain = index.get("Secure") is False or re.match(r"(127\.|localhost\b)", ref.registry)
        self._schemes = ["https", "http"] if plain else ["https"]

    def manifest(self, wanted: str) -> tuple[bytes, str]:
        """The bytes of a manifest or an index, and their media type; `wanted` is a tag or a digest."""
        with self._ask(f"manifests/{wanted}", {"Accept": ", ".join(MANIFESTS)}) as answer:
            return answer.read(), answer.headers.get_content_type()

    def blob(self, digest: str, start: int = 0) -> http.client.HTTPResponse:
        """A blob from a byte on, as a stream; status 206 where `start` was heeded."""
        return self._ask(f"blobs/{digest}", {"Range": f"bytes={start}-"} if start else {})

    def _ask(self, what: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        while True:
            try:
                return self._send(f"{self._schemes[0]}://{self.host}/v2/{self.ref.path}/{what}", headers)
            except urllib.error.HTTPError:
                raise
            except OSError:
                if len(self._schemes) == 1:
                    raise
                self._schemes.pop(0)

    def _send(self, url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        try:
            return self._open(url, headers, self._authorization)
        except urllib.error.HTTPError as error:
            challenge = error.headers.get("WWW-Authenticate", "")
            if error.code != 401 or not challenge:
                raise
            self._authorization = self._answer(challenge)
            return self._open(url, headers, self._authorization)

    def _answer(self, challenge: str) -> str:
        if challenge.lower().startswith("basic"):
            return self._basic
        given = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
        query = urllib.parse.urlencode({key: given[key] for key in ("service", "scope") if key in given})
        with self._open(f"{given.get('realm', '')}?{query}", {}, self._basic) as answer:
            token = json.load(answer)
        return f"Bearer {token.get('token') or token.get('access_token')}"

    def _open(self, url: str, headers: dict[str, str], authorization: str) -> http.client.HTTPResponse:
        if not url.startswith(("https://", "http://")):
            raise OSError(f"{self.host} names an address that is none: {url[:80]}")
        request = urllib.request.Request(url, headers=headers)  # noqa: S310  checked above
        if authorization:  # blobs are redirected to a store that knows nothing of it
            request.add_unredirected_header("Authorization", authorization)
        answer: http.client.HTTPResponse = self._opener.open(request, timeout=self.timeout)
        return answer


def resolve(registry: Registry, wanted: str, arch: str) -> list[tuple[str, str, bytes]]:
    """What `wanted` stands for: (digest, media type, bytes) of its index, if it is one, and of the manifest for
    `arch` (Go's name, as `docker version` has it). Raises OSError."""
    found = []
    body, media_type = registry.manifest(wanted)
    found.append((_digest(body, wanted), media_type, body))
    for entry in json.loads(body).get("manifests") or []:
        platform = entry.get("platform") or {}
        if platform.get("os") == "linux" and platform.get("architecture") == arch:
            body, media_type = registry.manifest(entry["digest"])
            found.append((_digest(body, entry["digest"]), media_type, body))
            break
    return found


def _digest(body: bytes, wanted: str) -> str:
    digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
    if DIGEST.fullmatch(wanted) and wanted != digest:
        raise OSError(f"asked for {wanted}, got {digest}")
    return digest


def layer_sizes(ref: Reference, arch: str, info: dict[str, Any], auth: dict[str, str] | None) -> dict[str, int]:
    """Sizes of the layers by short id, from the registry's manifest. Best effort ({} on any trouble): the engine
    tells a layer's size only when it starts on it, too late for a total."""
    try:
        manifest = json.loads(resolve(Registry(ref, info, auth), ref.wanted, arch)[-1][2])
        return {layer["digest"].partition(":")[2][:12]: int(layer["size"]) for layer in manifest["layers"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


class Growing:
    """A file that somebody else may still be writing, read as it grows.

    `find` gives the path to read now, or None while there is none; `size` is that of the whole file in bytes;
    `alive` tells whether the writer still works (asked when nothing comes).
    """

    def __init__(self, find: Callable[[], Path | None], size: int, alive: Callable[[], bool]) -> None:
        self._find, self.size, self._alive = find, size, alive

    def read(self, start: int, end: int) -> Iterator[bytes]:
        """Bytes `start` to `end` (exclusive). Raises OSError when the writer gave up or nothing comes for long."""
        file: BinaryIO | None = None
        moved = time.monotonic()
        try:
            while start < end:
                if file is None and (path := self._find()) is not None:
                    with contextlib.suppress(FileNotFoundError):  # it has just got its final name
                        file = path.open("rb")
                chunk = b""
                if file is not None:
                    file.seek(start)
                    chunk = file.read(min(CHUNK, end - start))
                if chunk:
                    start, moved = start + len(chunk), time.monotonic()
                    yield chunk
                    continue
                if not self._alive() and not self._whole(start):
                    raise OSError("the fetch that this waits for has ended")
                if time.monotonic() - moved > SILENCE:
                    raise OSError(f"nothing came for {SILENCE:.0f} s")
                time.sleep(0.1)
                if file is not None and self._replaced(file):
                    file.close()
                    file = None
        finally:
            if file is not None:
                file.close()

    def _whole(self, start: int) -> bool:
        """Whether what is there now goes beyond `start`; the writer may have ended just after it was read."""
        path = self._find()
        with contextlib.suppress(OSError):
            return path is not None and path.stat().st_size > start
        return False

    def _replaced(self, file: BinaryIO) -> bool:
        """Whether the path is another file by now (begun again, or a partial one that was removed)."""
        path = self._find()
        try:
            return path is None or path.stat().st_ino != os.fstat(file.fileno()).st_ino
        except OSError:
            return True


class Layout:
    """Images in a folder, as an OCI image layout: `blobs/sha256/HEX`, `index.json`, `oci-layout`.

    What is missing is fetched when it is asked for, once, whoever asks. Safe across threads.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.blobs = self.folder / "blobs" / "sha256"
        self.sizes: dict[str, int] = {}
        self._origin: dict[str, Registry] = {}
        self._running: dict[str, threading.Thread] = {}
        self._errors: dict[str, str] = {}
        self._mutex = threading.Lock()

    # -- what is there -------------------------------------------------------------------------------------

    def path(self, digest: str) -> Path:
        """Where a blob lies once it is whole."""
        return self.blobs / digest.partition(":")[2]

    def names(self) -> dict[str, str]:
        """Images of the folder: name -> digest."""
        try:
            entries = json.loads((self.folder / "index.json").read_text("utf-8"))["manifests"]
            return {entry["annotations"][NAME]: entry["digest"] for entry in entries}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def media_type(self, digest: str) -> str:
        """Media type of a manifest in the folder."""
        try:
            body = json.loads(self.path(digest).read_text("utf-8"))
        except (OSError, ValueError):
            return "application/octet-stream"
        return str(body.get("mediaType") or (INDEXES[0] if "manifests" in body else MANIFESTS[2]))

    def know(self, digest: str) -> list[str]:
        """Note the blobs that a manifest or index in the folder names; what is there of them, by digest."""
        body = json.loads(self.path(digest).read_text("utf-8"))
        self.sizes[digest] = self.path(digest).stat().st_size
        found = [digest]
        for entry in body.get("manifests") or []:
            if self.path(entry["digest"]).is_file():
                found += self.know(entry["digest"])
        for entry in [*([body["config"]] if "config" in body else []), *(body.get("layers") or [])]:
            self.sizes[entry["digest"]] = int(entry["size"])
            found.append(entry["digest"])
        return found

    # -- fetching ------------------------------------------------------------------------------------------

    def add(self, image: str, registry: Registry, arch: str) -> tuple[str, list[str]]:
        """Fetch the manifests of an image: its digest, and those of all its blobs. Raises OSError."""
        self.blobs.mkdir(parents=True, exist_ok=True)
        manifests = resolve(registry, registry.ref.wanted, arch)
        for digest, _, body in manifests:
            _write(self.path(digest), body)
        digest, media_type, body = manifests[0]
        self._name(image, {"mediaType": media_type, "digest": digest, "size": len(body)})
        wanted = self.know(digest)
        for blob in wanted:
            self._origin[blob] = registry
        return digest, wanted

    def _name(self, image: str, entry: dict[str, Any]) -> None:
        index: dict[str, Any] = {"schemaVersion": 2, "manifests": []}
        with contextlib.suppress(OSError, ValueError):
            index = json.loads((self.folder / "index.json").read_text("utf-8"))
        others = [item for item in index["manifests"] if (item.get("annotations") or {}).get(NAME) != image]
        index["manifests"] = [*others, {**entry, "annotations": {NAME: image}}]
        _write(self.folder / "index.json", json.dumps(index, indent=1).encode() + b"\n")
        _write(self.folder / "oci-layout", b'{"imageLayoutVersion": "1.0.0"}\n')

    def prune(self, keep: list[str]) -> None:
        """Remove the blobs, partial ones included, that are not in `keep`."""
        wanted = {digest.partition(":")[2] for digest in keep}
        for path in self.blobs.glob("*"):
            if path.name.partition(".")[0] not in wanted:
                path.unlink()

    def open(self, digest: str) -> Growing:
        """A blob, whole or not; fetching begins unless it runs. Raises KeyError for one that no image names."""
        size = self.sizes[digest]
        path = self.path(digest)
        partial = path.with_name(f"{path.name}.incomplete")
        if not path.is_file():
            self._begin(digest, path, partial, size)

        def find() -> Path | None:
            return next((item for item in (path, partial) if item.is_file()), None)

        return Growing(find, size, lambda: path.is_file() or self._works(digest))

    def fetch(self, digests: list[str], tell: Callable[[int], Any]) -> None:
        """Fetch blobs to their end, three at a time as Docker does; `tell` hears bytes there are. Raises OSError."""
        waiting = list(dict.fromkeys(digests))
        total = dict.fromkeys(waiting, 0)
        while waiting:
            for digest in waiting[:3]:
                self.open(digest)
            time.sleep(0.2)
            for digest in list(total):
                path = self.path(digest)
                partial = path.with_name(f"{path.name}.incomplete")
                with contextlib.suppress(OSError):
                    total[digest] = (path if path.is_file() else partial).stat().st_size
            tell(sum(total.values()))
            for digest in waiting[:3]:
                if self.path(digest).is_file():
                    waiting.remove(digest)
                elif not self._works(digest):
                    raise OSError(self._errors.get(digest, "the fetch ended"))

    def _works(self, digest: str) -> bool:
        with self._mutex:
            return digest in self._running

    def _begin(self, digest: str, path: Path, partial: Path, size: int) -> None:
        with self._mutex:
            if digest in self._running or path.is_file() or digest not in self._origin:
                return
            self._errors.pop(digest, None)
            thread = threading.Thread(target=self._work, args=(digest, path, partial, size), daemon=True)
            self._running[digest] = thread
            thread.start()

    def _work(self, digest: str, path: Path, partial: Path, size: int) -> None:
        for attempt in range(TRIES):
            try:
                self._download(digest, path, partial, size)
                break
            except (OSError, http.client.HTTPException) as error:
                self._errors[digest] = f"{type(error).__name__}: {error}"
                if getattr(error, "errno", None) == 28:  # no space: trying again makes none
                    break
                time.sleep(attempt + 1)
        with self._mutex:
            self._running.pop(digest, None)

    def _download(self, digest: str, path: Path, partial: Path, size: int) -> None:
        sha = hashlib.sha256()
        with partial.open("a+b") as file:
            file.seek(0)
            while chunk := file.read(CHUNK):
                sha.update(chunk)
            there = file.tell()
            if there < size:
                with self._origin[digest].blob(digest, there) as answer:
                    if there and answer.status != 206:
                        file.truncate(0)
                        sha = hashlib.sha256()
                    while chunk := answer.read(CHUNK):
                        file.write(chunk)
                        file.flush()
                        sha.update(chunk)
            there = file.tell()
        if there < size:
            raise OSError(f"{digest} was cut after {there} of {size} bytes")
        if f"sha256:{sha.hexdigest()}" != digest:
            partial.unlink()
            raise OSError(f"{digest} arrived with another content")
        partial.replace(path)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_bytes(content)
    temporary.replace(path)
