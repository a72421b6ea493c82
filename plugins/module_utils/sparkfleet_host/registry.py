# SPDX-License-Identifier: Apache-2.0
"""A container registry asked as Docker asks it, and images kept as an OCI layout; standard library only.

Sources: https://distribution.github.io/distribution/spec/api/ (requests),
https://distribution.github.io/distribution/spec/auth/token/ (tokens),
https://github.com/opencontainers/image-spec/blob/main/image-layout.md (folder).

A registry is not trusted: what it sends is bounded in size and time, names in it are matched before a path or a URL is
made of them, and bytes count only if they have the digest that was asked for.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import errno
import functools
import hashlib
import http.client
import ipaddress
import json
import os
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from . import bounded, docker_proxy
from .bounded import DIGEST, BoundsError, printable
from .docker import Docker
from .http import Deadline, Timed
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
#: Annotation of a layout's index that names an image.
NAME = "org.opencontainers.image.ref.name"
CERTIFICATES = "/etc/docker/certs.d"
#: Logins of the inventory, 0600, in the format of Docker's configuration.
LOGINS = "/etc/sparkfleet/registry_logins.json"
CHUNK = 1 << 20
MANIFEST_BYTES = 4 << 20  # what registries take at most; the specification asks for no more
TOKEN_BYTES = 1 << 20
ENTRIES = 1000  # of an index, layers of an image
VALUES = 400_000  # arrays, objects and commas of a manifest; one with 1000 layers and annotations has 20,000
BLOB_BYTES = 1 << 40
TAG = re.compile(r"\w[\w.-]{0,127}", re.ASCII)
PATH = re.compile(r"[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*)*")
ANSWER_SECONDS = 60.0  # for a whole manifest or token, and for the head of any answer; the timeout bounds silence
SILENCE = 120.0  # seconds without a byte after which a transfer counts as broken
SLOWEST = 10_000  # bytes a second, over SILENCE, below which it does as well
TRIES = 3


class RegistryError(OSError):
    """A registry gave no good answer. `id`: entry in the table of failures; `status`: that of HTTP, 0 for none."""

    def __init__(self, message: str, id: str = "registry-unreachable", status: int = 0) -> None:
        super().__init__(message)
        self.id, self.status = id, status


# -- names -----------------------------------------------------------------------------------------------------------


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

    @property
    def familiar(self) -> str:
        """The name as Docker shows it: without what it adds by itself."""
        return self.path.removeprefix("library/") if self.registry == "docker.io" else f"{self.registry}/{self.path}"


def reference(image: str) -> Reference:
    """Parse NAME[:TAG][@sha256:DIGEST] as Docker does; raises JobError. A tag or digest is asked for, `latest` never
    assumed."""
    rest, at, digest = image.partition("@")
    name, colon, tag = rest.rpartition(":")
    if "/" in tag or not colon:  # the colon of a port, or none
        name, colon, tag = rest, "", ""
    first, slash, below = name.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost" or first != first.lower()):
        registry, path = first, below
    else:
        registry, path = "docker.io", name
    if registry in ("docker.io", "index.docker.io"):
        registry, path = "docker.io", path if "/" in path else f"library/{path}"
    host, with_port, port = registry.partition(":")
    good = (
        len(image) <= 512
        and bool(colon or at)
        and (not colon or bool(TAG.fullmatch(tag)))
        and (not at or bool(DIGEST.fullmatch(digest)))
        and bool(bounded.HOST.fullmatch(host) and PATH.fullmatch(path))
        and (not with_port or bool(re.fullmatch(r"[0-9]{1,5}", port)))
    )
    if not good:
        raise JobError(
            "bad-input", f"image {printable(image, 200)!r} is not of the form NAME:TAG or NAME@sha256:DIGEST"
        )
    return Reference(name, tag, digest, registry, path)


def valid_image(name: str) -> bool:
    """Whether a name can be that of an image, with its tag or digest."""
    try:
        reference(name)
    except JobError:
        return False
    return True


def local_image(docker: Docker, ref: Reference) -> dict[str, Any] | None:
    """What Docker has of an image. One with tag and digest that came out of a bundle has the tag, and the digest under
    the name of the Spark's own registry alone. Raises DockerError."""
    found: dict[str, Any] | None = docker.image(ref.local)
    if found is None and ref.digest and ref.tag:
        tagged = docker.image(f"{ref.name}:{ref.tag}") or {}
        listed = tagged.get("RepoDigests")
        if any(str(name).endswith(f"@{ref.digest}") for name in (listed if isinstance(listed, list) else ())):
            found = tagged
    return found


def login_file(logins: Mapping[str, Mapping[str, str]]) -> str:
    """The content of `LOGINS`, in the format of Docker's configuration: {registry: {username, password}}; "" for
    none."""
    entries = {
        name: {"auth": base64.b64encode(f"{login['username']}:{login['password']}".encode()).decode()}
        for name, login in sorted(logins.items())
    }
    return json.dumps({"auths": entries}) if entries else ""


def credentials(config: Path, registry: str) -> dict[str, str] | None:
    """User and password for a registry: those of the inventory, or what `docker login` left; None where there are
    none."""
    return _credentials(Path(LOGINS), registry) or _credentials(config, registry)


def _credentials(config: Path, registry: str) -> dict[str, str] | None:
    keys = [registry, f"https://{registry}", f"https://{registry}/v1/", f"https://{registry}/v2/"]
    if registry == "docker.io":
        keys.insert(0, "https://index.docker.io/v1/")
    try:
        entries = bounded.read_json(config).get("auths")
        for key in keys:
            entry = entries.get(key) if isinstance(entries, dict) else None
            auth = entry.get("auth") if isinstance(entry, dict) else None
            if isinstance(auth, str) and auth:
                user, _, password = base64.b64decode(auth, validate=True).decode().partition(":")
                return {"username": user, "password": password.rstrip("\0"), "serveraddress": key}
    except (OSError, ValueError, binascii.Error):
        return None
    return None


# -- how Docker reaches a registry -----------------------------------------------------------------------------------


def insecure(registry: str, info: dict[str, Any]) -> bool:
    """Whether Docker asks a registry without verified TLS: one of `insecure-registries`, or on the loopback interface.
    `info` is what `docker info` says."""
    config = _dict(info.get("RegistryConfig"))
    known = _dict(_dict(config.get("IndexConfigs")).get(registry))
    if known:
        return known.get("Secure") is False
    address = _address(registry.partition(":")[0])
    if registry.partition(":")[0] == "localhost" or (address and address.is_loopback):
        return True
    networks = config.get("InsecureRegistryCIDRs")
    for text in networks if isinstance(networks, list) else []:
        with contextlib.suppress(ValueError):
            if address and address in ipaddress.ip_network(str(text)):
                return True
    return False


def bypasses(host: str, port: int, no_proxy: str) -> bool:
    """Whether a host is reached past the proxy, by the rules of Docker's `NoProxy`: names with what is below them,
    `.name` for what is below alone, addresses, networks, each but networks with a port if wanted; `*`."""
    host = host.strip("[]").rstrip(".").lower()
    address = _address(host)
    if host == "localhost" or (address and address.is_loopback):
        return True
    return any(_excepts(item.strip().lower(), host, address, port) for item in no_proxy.split(","))


def _excepts(item: str, host: str, address: Address | None, port: int) -> bool:
    if item == "*":
        return True
    if "/" in item:
        try:
            return address is not None and address in ipaddress.ip_network(item, strict=False)
        except ValueError:
            return False
    name, colon, wanted = item.rpartition(":")
    if not colon or not wanted.isdigit() or (":" in name and not name.endswith("]")):
        name, wanted = item, ""
    name = name.strip("[]").removeprefix("*") if name.startswith("*.") else name.strip("[]")
    if not name or (wanted and int(wanted) != port):
        return False
    if known := _address(name):
        return known == address
    return host.endswith(name) if name.startswith(".") else host == name or host.endswith(f".{name}")


Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def _address(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


class _Proxies(urllib.request.ProxyHandler):
    """The engine's proxies with its exceptions."""

    def __init__(self, proxies: dict[str, str], no_proxy: str) -> None:
        self._no_proxy = no_proxy
        super().__init__(proxies)

    def proxy_open(self, req: urllib.request.Request, proxy: str, type: str) -> Any:
        parts = urllib.parse.urlsplit(req.full_url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        return None if bypasses(parts.hostname or "", port, self._no_proxy) else super().proxy_open(req, proxy, type)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Blobs are redirected to a store; never from https to anything else, and never with the proxy's password."""

    max_redirections = 5

    def http_error_302(self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any) -> Any:
        """Follow it without its body, which urllib would read to its end."""
        fp.close()
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        scheme = urllib.parse.urlsplit(newurl).scheme
        if scheme not in ("https", "http") or (scheme == "http" and req.full_url.startswith("https:")):
            raise RegistryError(f"redirected from https to {printable(newurl, 120)}, not followed")
        made = super().redirect_request(req, fp, code, msg, headers, newurl)
        if made is not None:
            made.headers.pop("Proxy-authorization", None)
        return made


class Answer(http.client.HTTPResponse):
    """An answer that must have come within ANSWER_SECONDS, head and body, unless its reader renews the `deadline`."""

    def __init__(self, sock: socket.socket, *args: Any, **more: Any) -> None:
        self.deadline = Deadline(ANSWER_SECONDS)
        super().__init__(Timed(sock, self.deadline), *args, **more)  # type: ignore[arg-type]


class _InTime(http.client.HTTPConnection):
    """Its answers, that of a proxy to CONNECT among them, come in time or not at all."""

    response_class = Answer


class _InTimeTls(_InTime, http.client.HTTPSConnection):
    """The same over TLS."""


class _Http(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_InTime, req)


class _Https(urllib.request.HTTPSHandler):
    """TLS that is verified, but for the registry's own host where Docker does not verify it either."""

    def __init__(self, context: ssl.SSLContext, unverified: str) -> None:
        super().__init__(context=context)
        self._verified, self._unverified = context, unverified

    def https_open(self, req: urllib.request.Request) -> Any:
        context = self._verified
        if self._unverified and urllib.parse.urlsplit(req.full_url).netloc == self._unverified:
            context = ssl._create_unverified_context()  # noqa: S323  as `insecure-registries` asks
        return self.do_open(functools.partial(_InTimeTls, context=context), req)


def opener(
    proxies: Mapping[str, str], no_proxy: str = "", context: ssl.SSLContext | None = None, unverified: str = ""
) -> urllib.request.OpenerDirector:
    """What asks by http and https alone, in time, with proxies by scheme ("" for none); `unverified` is a HOST[:PORT]
    whose certificate is not verified."""
    made = urllib.request.OpenerDirector()
    for handler in (
        _Proxies({kind: proxy for kind, proxy in proxies.items() if proxy}, no_proxy),
        _Http(),
        _Https(context or ssl.create_default_context(), unverified),
        _Redirects(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.UnknownHandler(),
    ):
        made.add_handler(handler)
    return made


# -- the registry ----------------------------------------------------------------------------------------------------


class Registry:
    """The registry of an image. `info` is what `docker info` says (proxies, registries without TLS), `auth` what
    `credentials` gives, `host` where to ask instead of the registry itself, `ca` certificates in PEM of authorities to
    trust besides this machine's. Every method raises OSError
    (`RegistryError` for a bad answer) on failure."""

    def __init__(
        self,
        ref: Reference,
        info: dict[str, Any],
        auth: dict[str, str] | None,
        timeout: float = 15,
        host: str = "",
        certificates: str | Path = CERTIFICATES,
        ca: str = "",
    ) -> None:
        self.ref, self.timeout = ref, timeout
        self.host = host or ("registry-1.docker.io" if ref.registry == "docker.io" else ref.registry)
        context = ssl.create_default_context()
        for authority in sorted(Path(certificates, host or ref.registry).glob("*.crt")):
            with contextlib.suppress(OSError):
                context.load_verify_locations(authority)
        if ca:
            context.load_verify_locations(cadata=ca)
        plain = insecure(host or ref.registry, info)
        self._opener = opener(
            docker_proxy.proxies(info), str(info.get("NoProxy") or ""), context, self.host if plain else ""
        )
        self._basic = ""
        if auth:
            self._basic = "Basic " + base64.b64encode(f"{auth['username']}:{auth['password']}".encode()).decode()
        self._authorization = ""
        self._schemes = ["https", "http"] if plain else ["https"]

    def manifest(self, wanted: str) -> tuple[bytes, str]:
        """The bytes of a manifest or an index, and their media type; `wanted` is a tag or a digest."""
        if not TAG.fullmatch(wanted) and not DIGEST.fullmatch(wanted):
            raise RegistryError(f"{printable(wanted, 80)!r} is neither a tag nor a digest")
        with self._ask(f"manifests/{wanted}", {"Accept": ", ".join(MANIFESTS)}) as answer:
            body = self._whole(answer, f"manifest of {self.ref.path}", MANIFEST_BYTES)
            media_type = answer.headers.get_content_type()
        return body, media_type if media_type in MANIFESTS else _media_type(body)

    def blob(self, digest: str, start: int = 0) -> Answer:
        """A blob from a byte on, as a stream; status 206 where `start` was heeded."""
        if not DIGEST.fullmatch(digest):
            raise RegistryError(f"{printable(digest, 80)!r} is not a digest")
        return self._ask(f"blobs/{digest}", {"Range": f"bytes={start}-"} if start else {})

    def ping(self) -> int:
        """The status of its first address; 401 is an answer as well."""
        try:
            with self._ask("", {}, authorize=False) as answer:
                return answer.status
        except RegistryError as error:
            if error.status:
                return error.status
            raise

    def _ask(self, what: str, headers: dict[str, str], authorize: bool = True) -> Answer:
        path = f"{self.ref.path}/{what}" if what else ""
        while True:
            try:
                return self._send(f"{self._schemes[0]}://{self.host}/v2/{path}", headers, authorize)
            except urllib.error.HTTPError as error:
                error.close()
                raise RegistryError(
                    f"{self.host} answered {error.code} {printable(str(error.reason), 80)}",
                    {401: "image-denied", 403: "image-denied", 404: "image-unknown", 429: "registry-limit"}.get(
                        error.code, "registry-unreachable"
                    ),
                    error.code,
                ) from None
            except RegistryError:
                raise
            except OSError:
                if len(self._schemes) == 1:
                    raise
                self._schemes.pop(0)

    def _send(self, url: str, headers: dict[str, str], authorize: bool) -> Answer:
        try:
            answer = self._open(url, headers, self._authorization)
            self._schemes = self._schemes[:1]  # one that answers over TLS is not asked without
            return answer
        except urllib.error.HTTPError as error:
            self._schemes = self._schemes[:1]
            challenges = error.headers.get_all("WWW-Authenticate") or []
            # One that the store answers with, where the registry redirects to, is not ours to answer.
            own = urllib.parse.urlsplit(error.url or "").netloc == urllib.parse.urlsplit(url).netloc
            if error.code != 401 or not challenges or not own or not authorize:
                raise
            error.close()
        self._authorization = self._answer(challenges, url)
        return self._open(url, headers, self._authorization)

    def _answer(self, challenges: list[str], url: str) -> str:
        """The header that answers a challenge of the registry at `url`."""
        kinds = {text.strip().partition(" ")[0].lower(): text for text in reversed(challenges)}
        if "bearer" in kinds:
            return f"Bearer {self._token(kinds['bearer'], url)}"
        if "basic" in kinds and self._basic:
            return self._basic
        raise RegistryError(f"{self.host} requires a login, and there is none", "image-denied", 401)

    def _token(self, challenge: str, url: str) -> str:
        given = dict(re.findall(r'(\w+)="([^"]*)"', challenge[:8192]))
        realm = given.get("realm", "")
        try:
            parts = urllib.parse.urlsplit(realm)
            host, own = parts.hostname or "", urllib.parse.urlsplit(url)
        except ValueError:
            raise RegistryError(f"{self.host} names a token service without an address") from None
        # Over http neither password nor token leaves for another host, nor at all where the registry has https.
        plain = parts.scheme == "http" and own.scheme == "http" and host == own.hostname
        if not host or "@" in parts.netloc or not (parts.scheme == "https" or plain):
            raise RegistryError(f"{self.host} names the token service {printable(realm, 120)}, which is not trusted")
        query = urllib.parse.urlencode(
            {
                **({"service": given["service"]} if "service" in given else {}),
                "scope": f"repository:{self.ref.path}:pull",
            }
        )
        with self._open(f"{realm}{'&' if parts.query else '?'}{query}", {}, self._basic) as answer:
            body = self._whole(answer, f"token of {host}", TOKEN_BYTES)
        try:
            found = bounded.as_dict(bounded.parse_json(body, f"token of {host}", TOKEN_BYTES), f"token of {host}")
            token = bounded.as_str(found.get("token") or found.get("access_token"), f"token of {host}")
        except BoundsError as error:
            raise RegistryError(str(error)) from None
        if not re.fullmatch(r"[!-~]+", token):
            raise RegistryError(f"{host} returned an invalid token")
        return token

    def _open(self, url: str, headers: dict[str, str], authorization: str) -> Answer:
        try:
            request = urllib.request.Request(url, headers=headers)  # noqa: S310  https or http by its makers
            if authorization:  # blobs are redirected to a store that knows nothing of it
                request.add_unredirected_header("Authorization", authorization)
            answer: Answer = self._opener.open(request, timeout=self.timeout)
        except urllib.error.HTTPError:
            raise
        except urllib.error.URLError as error:
            raise error.reason if isinstance(error.reason, OSError) else RegistryError(str(error.reason)) from None
        except (http.client.HTTPException, ValueError) as error:
            raise RegistryError(f"{self.host}: {type(error).__name__}: {printable(str(error), 120)}") from None
        return answer

    def _whole(self, answer: Answer, what: str, limit: int) -> bytes:
        try:
            body = bounded.read_all(answer.read1, what, limit)
        except TimeoutError:
            raise TimeoutError(f"{self.host}: {what}: not read completely in time") from None
        except (http.client.HTTPException, ValueError) as error:
            raise RegistryError(f"{self.host}: {printable(str(error), 120)}") from None
        if answer.length:
            raise RegistryError(f"{self.host}: the {what} was cut short")
        return body


# -- manifests -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Manifest:
    """An index or a manifest as far as it matters here: `children` (digest, "OS/ARCHITECTURE") of an index; `blobs`
    (digest, size in bytes) of a manifest, the configuration first. No child is there twice."""

    media_type: str
    children: tuple[tuple[str, str], ...] = ()
    blobs: tuple[tuple[str, int], ...] = ()


def parse_manifest(body: bytes, what: str = "manifest") -> Manifest:
    """Raises BoundsError for what is neither an index nor a manifest of an image, or names something by anything but a
    digest."""
    known = _parse(body, what)
    if "manifests" in known:
        children = []
        for item in bounded.as_list(known["manifests"], f"{what}: manifests", ENTRIES):
            entry = bounded.as_dict(item, f"{what}: manifests")
            platform = _dict(entry.get("platform"))
            name = f"{platform.get('os')}/{platform.get('architecture')}"
            children.append((bounded.matched(DIGEST, entry.get("digest"), f"{what}: digest"), name))
        return Manifest(_kind(known), children=tuple(dict.fromkeys(children)))
    blobs = []
    layers = bounded.as_list(known.get("layers"), f"{what}: layers", ENTRIES)
    for item in [known.get("config"), *layers]:
        entry = bounded.as_dict(item, f"{what}: config or layer")
        digest = bounded.matched(DIGEST, entry.get("digest"), f"{what}: digest")
        blobs.append((digest, bounded.as_int(entry.get("size"), f"{what}: size", 0, BLOB_BYTES)))
    return Manifest(_kind(known), blobs=tuple(blobs))


def _parse(body: bytes, what: str) -> dict[str, Any]:
    """Three bytes of JSON can become an object of 80: values are counted before there are any."""
    if len(body) <= MANIFEST_BYTES and sum(body.count(mark) for mark in b"[{,") > VALUES:
        raise BoundsError(f"{what}: more than {VALUES} values")
    return bounded.as_dict(bounded.parse_json(body, what, MANIFEST_BYTES), what)


def _media_type(body: bytes) -> str:
    try:
        return _kind(_parse(body, "manifest"))
    except BoundsError:
        return "application/octet-stream"


def _kind(known: dict[str, Any]) -> str:
    named = known.get("mediaType")
    return named if named in MANIFESTS else INDEXES[0] if "manifests" in known else MANIFESTS[2]


def resolve(registry: Registry, wanted: str, arch: str) -> list[tuple[str, str, bytes]]:
    """What `wanted` stands for: (digest, media type, bytes) of its index, if it is one, and of the manifest for
    `arch` (Go's name, as `docker version` has it): the first that the index names. Raises OSError."""
    body, media_type = registry.manifest(wanted)
    found = [(_digest(body, wanted), media_type, body)]
    try:
        top = parse_manifest(body, f"manifest {wanted} of {registry.ref.path}")
        if top.blobs:
            return found
        child = next((digest for digest, platform in top.children if platform == f"linux/{arch}"), "")
        if child:
            body, media_type = registry.manifest(child)
            _digest(body, child)
            if not parse_manifest(body, f"manifest {child}").blobs:
                raise BoundsError(f"{child}, named for linux/{arch}, is an index again")
            return [*found, (child, media_type, body)]
    except BoundsError as error:
        raise RegistryError(f"{registry.host}: {error}") from None
    raise RegistryError(f"{registry.host} has {registry.ref.path} {wanted}, but not for linux/{arch}", "image-platform")


def digest_of(registry: Registry, wanted: str) -> str:
    """The digest that `wanted` stands for, of an index or of a manifest. Raises OSError."""
    body, _ = registry.manifest(wanted)
    try:
        parse_manifest(body, f"manifest {wanted} of {registry.ref.path}")
    except BoundsError as error:
        raise RegistryError(f"{registry.host}: {error}") from None
    return _digest(body, wanted)


def _digest(body: bytes, wanted: str) -> str:
    digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
    if DIGEST.fullmatch(wanted) and wanted != digest:
        raise RegistryError(f"asked for {wanted}, got {digest}")
    return digest


def layer_sizes(ref: Reference, arch: str, info: dict[str, Any], auth: dict[str, str] | None) -> dict[str, int]:
    """Sizes of the layers by short id, from the registry's manifest. Best effort ({} on any trouble): the engine
    reports a layer's size only when it starts on it, too late for a total."""
    try:
        manifest = parse_manifest(resolve(Registry(ref, info, auth), ref.wanted, arch)[-1][2])
    except (OSError, ValueError):
        return {}
    return {digest.partition(":")[2][:12]: size for digest, size in manifest.blobs[1:]}


# -- files that grow -------------------------------------------------------------------------------------------------


class TailingBlob:
    """A file that another process may still be writing, read as it grows.

    `find` opens the file to read, or returns None while there is none; `size` is the final size in bytes;
    `alive` says whether the writer still works (asked when nothing comes).
    """

    def __init__(self, find: Callable[[], BinaryIO | None], size: int, alive: Callable[[], bool]) -> None:
        self._find, self.size, self._alive = find, size, alive

    def read(self, start: int, end: int) -> Iterator[bytes]:
        """Bytes `start` to `end` (exclusive). Raises OSError when the writer gave up or nothing comes for long."""
        file: BinaryIO | None = None
        moved = time.monotonic()
        try:
            while start < end:
                if file is None:
                    file = self._find()
                chunk = b""
                if file is not None:
                    file.seek(start)
                    chunk = file.read(min(CHUNK, end - start))
                if chunk:
                    start, moved = start + len(chunk), time.monotonic()
                    yield chunk
                    continue
                if not self._alive() and not self._whole(start):
                    raise OSError("the fetch being waited for has ended")
                if time.monotonic() - moved > SILENCE:
                    raise OSError(f"no data for {SILENCE:.0f} s")
                time.sleep(0.1)
                if file is not None and self._replaced(file):
                    file.close()
                    file = None
        finally:
            if file is not None:
                file.close()

    def _whole(self, start: int) -> bool:
        """Whether what is there now goes beyond `start`; the writer may have ended just after it was read."""
        file = self._find()
        if file is None:
            return False
        with file:
            return os.fstat(file.fileno()).st_size > start

    def _replaced(self, file: BinaryIO) -> bool:
        """Whether the name is another file by now (started over, or a partial one that was removed)."""
        other = self._find()
        if other is None:
            return True
        with other:
            return not os.path.sameopenfile(other.fileno(), file.fileno())


def opened(root: str | Path, *candidates: tuple[str, ...]) -> BinaryIO | None:
    """The first of some files below `root` that is there (see `bounded.open_below`); None for none. Raises OSError for
    a link or anything else that is not a regular file."""
    for names in candidates:
        try:
            return bounded.open_below(root, *names)
        except FileNotFoundError:
            continue
        except BoundsError as error:
            raise OSError(str(error)) from None
    return None


# -- images in a folder ----------------------------------------------------------------------------------------------


class Layout:
    """Images in a folder, as an OCI image layout: `blobs/sha256/HEX`, `index.json`, `oci-layout`.

    Missing blobs are fetched on demand, once for all clients. Safe across threads.
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
        """Where a blob lies once it is whole. Raises BoundsError for what is not a digest."""
        return self.blobs / bounded.matched(DIGEST, digest, "digest").partition(":")[2]

    def names(self) -> dict[str, str]:
        """Images of the folder: name -> digest. What is not well formed is left out."""
        found = {}
        for entry in self._index():
            name = _dict(_dict(entry).get("annotations")).get(NAME)
            digest = _dict(entry).get("digest")
            if isinstance(name, str) and isinstance(digest, str) and DIGEST.fullmatch(digest):
                found[name] = digest
        return found

    def _index(self) -> list[Any]:
        try:
            return bounded.as_list(bounded.read_json(self.folder / "index.json")["manifests"], "index.json")
        except (OSError, ValueError, KeyError):
            return []

    def media_type(self, digest: str) -> str:
        """Media type of a manifest in the folder."""
        try:
            return _media_type(self.body(digest))
        except (OSError, ValueError):
            return "application/octet-stream"

    def body(self, digest: str) -> bytes:
        """A manifest or an index of the folder. Raises OSError, and BoundsError for one with another digest."""
        with bounded.open_below(self.folder, "blobs", "sha256", self.path(digest).name) as file:
            body = file.read(MANIFEST_BYTES + 1)
        if f"sha256:{hashlib.sha256(body).hexdigest()}" != digest:
            raise BoundsError(f"{self.path(digest)} does not match its digest")
        return body

    def know(self, digest: str) -> list[str]:
        """Note the blobs that a manifest or index in the folder names, each once; what is there of them, by digest. A
        nested index is ignored. Raises OSError and BoundsError."""
        top = self._note(digest)
        found = dict.fromkeys([digest, *(blob for blob, _ in top.blobs)])
        for child in dict.fromkeys(child for child, _ in top.children):
            if self.path(child).is_file():
                found.update(dict.fromkeys([child, *(blob for blob, _ in self._note(child).blobs)]))
        return list(found)

    def _note(self, digest: str) -> Manifest:
        body = self.body(digest)
        known = parse_manifest(body, str(self.path(digest)))
        self.sizes.update({digest: len(body), **dict(known.blobs)})
        return known

    # -- fetching ------------------------------------------------------------------------------------------

    def add(self, image: str, registry: Registry, arch: str, wanted: str = "") -> tuple[str, list[str]]:
        """Fetch the manifests of an image: its digest, and those of all its blobs. `wanted` is the digest that it must
        have, where that is known. Raises OSError."""
        self.blobs.mkdir(parents=True, exist_ok=True)
        manifests = resolve(registry, wanted or registry.ref.wanted, arch)
        for digest, _, body in manifests:
            _write(self.path(digest), body)
        digest, media_type, body = manifests[0]
        self._name(image, {"mediaType": media_type, "digest": digest, "size": len(body)})
        blobs = self.know(digest)
        for blob in blobs:
            self._origin[blob] = registry
        return digest, blobs

    def _name(self, image: str, entry: dict[str, Any]) -> None:
        others = [
            item for item in self._index() if _dict(_dict(item).get("annotations")).get(NAME) not in (None, image)
        ]
        index = {"schemaVersion": 2, "manifests": [*others, {**entry, "annotations": {NAME: image}}]}
        _write(self.folder / "index.json", json.dumps(index, indent=1).encode() + b"\n")
        _write(self.folder / "oci-layout", b'{"imageLayoutVersion": "1.0.0"}\n')

    def prune(self, keep: list[str]) -> None:
        """Remove the blobs, partial ones included, that are not in `keep`."""
        wanted = {digest.partition(":")[2] for digest in keep}
        for path in self.blobs.glob("*"):
            if path.name.partition(".")[0] not in wanted:
                path.unlink()

    def open(self, digest: str) -> TailingBlob:
        """A blob, whole or not; fetching begins unless it runs. Raises KeyError for one that no image names."""
        size = self.sizes[digest]
        path = self.path(digest)
        if not path.is_file():
            self._begin(digest, path, size)
        places = [("blobs", "sha256", name) for name in (path.name, f"{path.name}.incomplete")]
        return TailingBlob(lambda: opened(self.folder, *places), size, lambda: path.is_file() or self._works(digest))

    def fetch(self, digests: list[str], report: Callable[[int], Any]) -> None:
        """Fetch blobs completely, three at a time like Docker; `report` gets the number of bytes present. Raises
        OSError."""
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
            report(sum(total.values()))
            for digest in waiting[:3]:
                if self.path(digest).is_file():
                    waiting.remove(digest)
                elif not self._works(digest):
                    raise RegistryError(self._errors.get(digest, "the fetch ended"))

    def _works(self, digest: str) -> bool:
        with self._mutex:
            return digest in self._running

    def _begin(self, digest: str, path: Path, size: int) -> None:
        with self._mutex:
            if digest in self._running or path.is_file() or digest not in self._origin:
                return
            self._errors.pop(digest, None)
            thread = threading.Thread(target=self._work, args=(digest, path, size), daemon=True)
            self._running[digest] = thread
            thread.start()

    def _work(self, digest: str, path: Path, size: int) -> None:
        try:
            for attempt in range(TRIES):
                try:
                    _download(self._origin[digest], digest, size, path)
                    break
                except (OSError, http.client.HTTPException) as error:
                    self._errors[digest] = f"{type(error).__name__}: {error}"
                    if getattr(error, "errno", None) == errno.ENOSPC:  # trying again makes none
                        break
                    time.sleep(attempt + 1)
        finally:
            with self._mutex:
                self._running.pop(digest, None)


def _download(registry: Registry, digest: str, size: int, path: Path) -> None:
    """Fetch a blob of `size` bytes, or its missing part. A blob with different content is removed. Raises OSError."""
    partial = path.with_name(f"{path.name}.incomplete")
    sha = hashlib.sha256()
    with os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644), "r+b") as file:
        while chunk := file.read(CHUNK):
            sha.update(chunk)
        there = file.tell()
        if there < size:
            with registry.blob(digest, there) as answer:
                if there and not _continues(answer, there, size):
                    file.seek(0)
                    file.truncate()
                    there, sha = 0, hashlib.sha256()
                for chunk in _steadily(answer, size - there):
                    file.write(chunk)
                    file.flush()
                    sha.update(chunk)
        there = file.tell()
    if there < size:
        raise RegistryError(f"{digest} ended after {there} of {size} bytes")
    if f"sha256:{sha.hexdigest()}" != digest:
        partial.unlink()
        raise RegistryError(f"{digest} arrived with different content")
    partial.replace(path)


def _continues(answer: http.client.HTTPResponse, start: int, size: int) -> bool:
    """Whether an answer continues at byte `start`; a complete answer does not, and a different range is an error."""
    if answer.status != 206:
        return False
    content_range = re.fullmatch(
        r"bytes ([0-9]{1,15})-([0-9]{1,15})/(?:[0-9]{1,15}|\*)", answer.headers.get("Content-Range", "")
    )
    if content_range and (int(content_range[1]) != start or int(content_range[2]) >= size):
        raise RegistryError(f"asked for bytes from {start} on, got {content_range[0]}")
    return True


def _steadily(answer: Answer, size: int) -> Iterator[bytes]:
    """At most `size` bytes of an answer. Raises TimeoutError where they come slower than SLOWEST, or none for SILENCE,
    whatever else comes (sizes of chunks that have no end)."""
    began, came = time.monotonic(), 0
    while size > 0:
        answer.deadline.renew(SILENCE)
        chunk = answer.read1(min(CHUNK, size))
        if not chunk:
            return
        size -= len(chunk)
        came += len(chunk)
        yield chunk
        spent = time.monotonic() - began
        if spent > SILENCE:
            if came < SLOWEST * spent:
                raise TimeoutError(f"{came} bytes in {spent:.0f} s: too slow")
            began, came = time.monotonic(), 0


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644), "wb") as file:
        file.write(content)
    temporary.replace(path)
