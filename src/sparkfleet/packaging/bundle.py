"""A folder to carry in: images, models and packages for Sparks without internet.

bundle.json                      what is in it, each file with its sha256 (see `Bundle`)
bundle.json.sig                  its signature, if it has one (see `signature`)
image/                           an OCI image layout: index.json, oci-layout, blobs/sha256/HEX
hub/models--ORG--NAME/blobs/HASH files of a model, by the Hub's hash
hub/.sparkfleet/models--ORG--NAME/fetching.json   their list
packages/                        a repository for apt: *.deb, Packages
python/                          wheels for scripts/setup of another controller

What a Spark says when a bundle is made, and what lies in the folder of one that was carried in, may both be hostile:
names are matched against what they may be, no link below the folder is followed, and a file counts only with the size
and sha256 that bundle.json has. The sha256 of bundle.json itself is shown when it is written; whoever carries the
folder in can have it checked (sparkfleet_bundle_digest).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from sparkfleet_host import bounded, cache
from sparkfleet_host.bounded import COMMIT, DIGEST, SHA256, BoundsError
from sparkfleet_host.registry import reference

from sparkfleet import SparkfleetError
from sparkfleet.packaging import signature
from sparkfleet.user_paths import expanded

NAME, SIGNATURE = "bundle.json", "bundle.json.sig"
VERSION = 2
LIMIT = 4 << 20  # of bundle.json, bytes; a file takes some 300 there
CHUNK = 4 << 20
IMAGE = re.compile(r"[a-zA-Z0-9][\w.:/@-]{0,511}", re.ASCII)
MEDIA_TYPE = re.compile(r"[\w.+/-]{1,200}", re.ASCII)
PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]{0,100}")
WORD = re.compile(r"[\w.-]{1,64}", re.ASCII)
#: What a file of a bundle may be called.
FILE = re.compile(
    r"image/blobs/sha256/[0-9a-f]{64}"
    r"|hub/models--[A-Za-z0-9][\w.-]*/blobs/([0-9a-f]{40}|[0-9a-f]{64})"
    r"|hub/\.sparkfleet/models--[A-Za-z0-9][\w.-]*/fetching\.json"
    r"|packages/([A-Za-z0-9][\w.+~%:-]*\.deb|Packages)"
    r"|python/[A-Za-z0-9][\w.+-]*",
    re.ASCII,
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A file of a bundle; `size` in bytes."""

    size: int
    sha256: str


@dataclasses.dataclass
class Bundle:
    """What is in a bundle. `images`: name -> {digest, media_type, size, blobs}; `models`: "ORG/NAME@REVISION" ->
    {commit, bytes, files: [HASH]}; `files`: path within the folder -> size and sha256."""

    folder: Path
    system: dict[str, str] = dataclasses.field(default_factory=dict)
    images: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    models: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    packages: list[str] = dataclasses.field(default_factory=list)
    files: dict[str, Entry] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, folder: str | Path, digest: str = "", signers: str = "") -> Bundle:
        """The bundle of a folder; `digest`: sha256 that its bundle.json must have, with or without `sha256:`;
        `signers`: file of those one of whom must have signed it (see `signature`). Raises SparkfleetError for a folder
        that is not a bundle, or one that is of another form or digest, or not signed."""
        place = expanded("sparkfleet_bundle", folder)
        wanted = digest.strip().lower().removeprefix("sha256:")
        if digest and not bounded.SHA256.fullmatch(wanted):
            raise SparkfleetError(
                f"sparkfleet_bundle_digest: must be sha256: and 64 hex digits, as `sparkfleet bundle` printed it, not "
                f"{bounded.printable(digest, 80)!r}"
            )
        try:
            with os.fdopen(bounded.open_beneath(place, NAME), "rb") as file:
                data = file.read(LIMIT + 1)
            known = bounded.as_dict(bounded.parse_json(data, NAME, LIMIT), NAME)
        except (OSError, ValueError) as error:
            raise SparkfleetError(
                f"sparkfleet_bundle {place}: no bundle found ({type(error).__name__}: {error}); create "
                "one with `sparkfleet bundle FOLDER` where there is internet"
            ) from None
        found = hashlib.sha256(data).hexdigest()
        if wanted and wanted != found:
            raise SparkfleetError(
                f"sparkfleet_bundle {place}: its {NAME} has the digest sha256:{found}, but sparkfleet_bundle_digest "
                f"is {bounded.printable(digest, 80)}: it is a different bundle, or was changed since"
            )
        if signers:
            signature.check(data, _signature(place), signers, f"sparkfleet_bundle {place}", signature.BUNDLE)
        if known.get("version") != VERSION:
            raise SparkfleetError(
                f"sparkfleet_bundle {place}: made by an older version of Sparkfleet, without the hashes that this "
                f"one checks: run `sparkfleet bundle {place}` again where there is internet; complete files are not "
                "transferred again"
            )
        try:
            return _checked(place, known)
        except BoundsError as error:
            raise SparkfleetError(
                f"sparkfleet_bundle {place}: {error}; recreate it with `sparkfleet bundle FOLDER`"
            ) from None

    @staticmethod
    def trust(variables: Mapping[str, Any], template: Callable[[Any], Any]) -> tuple[str, str]:
        """Digest and signers that a host's variables have for `read`."""
        names = ("sparkfleet_bundle_digest", "sparkfleet_bundle_signers")
        digest, signers = (str(template(variables.get(name) or "")) for name in names)
        return digest, signers

    @classmethod
    def open(cls, folder: str | Path) -> Bundle:
        """The bundle of a folder to add to, or a new one where there is none. One of an older version is started over;
        files that are there already are kept where they are what they should be."""
        place = expanded("the bundle's folder", folder)
        if not (place / NAME).exists():
            return cls(place)
        with contextlib.suppress(OSError, ValueError):
            if bounded.read_json(place / NAME, LIMIT).get("version") != VERSION:
                return cls(place)
        return cls.read(place)

    def write(self) -> str:
        """Write `bundle.json` and the lists that readers of the parts expect; the sha256 of bundle.json. Raises
        SparkfleetError for one of more files than can be read again."""
        known: dict[str, Any] = {"version": VERSION}
        known |= {name: getattr(self, name) for name in ("system", "images", "models", "packages")}
        known["files"] = {name: dataclasses.asdict(entry) for name, entry in sorted(self.files.items())}
        text = _json(known)
        if len(text) > LIMIT:
            raise SparkfleetError(
                f"the bundle {self.folder}: {len(self.files)} files are more than its {NAME} can list: put the "
                "next model into another folder"
            )
        self._text("image/index.json", self.index(sorted(self.images)))
        self._text("image/oci-layout", LAYOUT)
        with contextlib.suppress(OSError, BoundsError):
            if bounded.read_file(self.folder / NAME, LIMIT) != text.encode():
                (self.folder / SIGNATURE).unlink(missing_ok=True)  # it was of another one
        self._text(NAME, text)
        return hashlib.sha256(text.encode()).hexdigest()

    def index(self, images: Sequence[str]) -> str:
        """`index.json` of an OCI image layout with these images."""
        entries = [
            {
                **{
                    key: self.images[self.image_key(name)][known]
                    for key, known in (("mediaType", "media_type"), ("digest", "digest"), ("size", "size"))
                },
                "annotations": {"org.opencontainers.image.ref.name": name},
            }
            for name in images
        ]
        return _json({"schemaVersion": 2, "manifests": entries})

    def check_system(self, system: Mapping[str, str]) -> None:
        """Whether what is for this system (id, codename, machine) may come in. Raises SparkfleetError."""
        if self.system and self.system != system:
            has, here = (" ".join(item.values()) for item in (self.system, system))
            raise SparkfleetError(
                f"the bundle {self.folder} is for {has}, this host is {here}: create another bundle, or exclude the "
                "host with --limit"
            )

    def add(self, collected: Collected, system: Mapping[str, str], entries: Mapping[str, Entry]) -> None:
        """Note what was collected on a host of this system, once its files are here: `entries`, by name."""
        self.system = dict(system)
        self.images[collected.image["name"]] = {
            key: collected.image[key] for key in ("digest", "media_type", "size", "blobs")
        }
        if collected.listing:
            listing = collected.listing
            hashes = sorted({entry.get("sha256") or entry["sha1"] for entry in listing["files"].values()})
            text = _json(listing)
            name = f"hub/.sparkfleet/{cache.repo_folder(listing['repo'])}/fetching.json"
            self._text(name, text)
            self.files[name] = Entry(len(text.encode()), hashlib.sha256(text.encode()).hexdigest())
            size = sum(entry["size"] for entry in listing["files"].values())
            self.models[collected.model] = {"commit": listing["commit"], "bytes": size, "files": hashes}
        if collected.packages:
            self.packages = list(collected.packages)
            self.files = {name: entry for name, entry in self.files.items() if not name.startswith("packages/")}
        self.files.update(entries)

    def complete(self) -> list[str]:
        """Files that are there with their size."""
        return sorted(set(self.files) - set(self.missing_files()))

    def missing_files(self) -> list[str]:
        """Files that are absent, cut, or reached through a link."""
        return [name for name, entry in sorted(self.files.items()) if not self.has(name, entry.size)]

    def has(self, name: str, size: int) -> bool:
        """Whether a file is there with this size; it gets its name only when it is whole and was checked."""
        try:
            handle = bounded.open_beneath(self.folder, name)
        except (OSError, BoundsError):
            return False
        try:
            return os.fstat(handle).st_size == size
        finally:
            os.close(handle)

    def text(self, name: str) -> str:
        """The content of a small file, which must be what bundle.json says. Raises SparkfleetError."""
        if self.files[name].size > cache.MANIFEST_BYTES:
            raise SparkfleetError(f"the bundle {self.folder}: {name} is larger than {cache.MANIFEST_BYTES} bytes")
        try:
            with os.fdopen(bounded.open_beneath(self.folder, name), "rb") as file:
                data = file.read(self.files[name].size + 1)
        except (OSError, BoundsError) as error:
            raise SparkfleetError(f"the bundle {self.folder}: {error}; recreate it") from None
        if hashlib.sha256(data).hexdigest() != self.files[name].sha256:
            raise SparkfleetError(f"the bundle {self.folder}: {name} was changed since the bundle was made")
        return data.decode("utf-8", "replace")

    def entry_of(
        self, name: str, digest: str = "sha256", limit: int | None = None, into: BinaryIO | None = None
    ) -> tuple[Entry, str]:
        """Size and sha256 of a file that is there, and its digest as the Hub names it (sha256, or sha1 as Git counts
        it), read once; what was hashed is written to `into`. Raises OSError and BoundsError, also for more than `limit`
        bytes."""
        with os.fdopen(bounded.open_beneath(self.folder, name), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if limit is not None and size > limit:
                raise BoundsError(f"{name}: more than {limit} bytes")
            sha, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
            read = 0
            while read < size and (chunk := file.read(min(CHUNK, size - read))):
                sha.update(chunk)
                if digest == "sha1":
                    git.update(chunk)
                if into is not None:
                    into.write(chunk)
                read += len(chunk)
        return Entry(read, sha.hexdigest()), (git if digest == "sha1" else sha).hexdigest()

    def image_key(self, image: str) -> str:
        """The name of an image in the bundle, "" if it does not have it. One that is made without a lock and used with
        one, or the other way round, has the same image under its tag or with its digest."""
        if image in self.images:
            return image
        name, _, digest = image.partition("@")
        for key, entry in self.images.items():
            same = entry["digest"] == digest and reference(key).familiar == reference(image).familiar
            if same if digest else key.partition("@")[0] == name:
                return key
        return ""

    def model_key(self, repo: str, revision: str) -> str:
        """ORG/NAME@REVISION of a model in the bundle, by its revision or commit; "" if it does not have it."""
        if f"{repo}@{revision}" in self.models:
            return f"{repo}@{revision}"
        same = (key for key, entry in self.models.items() if entry["commit"] == revision)
        return next((key for key in same if key.partition("@")[0] == repo), "")

    def listing(self, repo: str, revision: str) -> dict[str, Any]:
        """Commit and files of a model, {} if the bundle does not have it. Raises SparkfleetError."""
        name = f"hub/.sparkfleet/{cache.repo_folder(repo)}/fetching.json"
        if not self.model_key(repo, revision) or name not in self.files:
            return {}
        try:
            found = cache.check_listing(bounded.parse_json(self.text(name), name, cache.MANIFEST_BYTES), name)
            bounded.matched(COMMIT, found.get("commit"), f"{name}: commit")
        except BoundsError as error:
            raise SparkfleetError(f"sparkfleet_bundle {self.folder}: {error}; recreate it") from None
        return found

    def of_packages(self) -> Iterator[str]:
        """Files of the repository for apt."""
        return (name for name in self.files if name.startswith("packages/"))

    def of_fetch(self, images: Sequence[str], models: Sequence[str]) -> list[str]:
        """Files of images and models, without the image's index. Raises SparkfleetError for what is not in it."""
        keys = {name: self.image_key(name) for name in images}
        keys |= {name: self.model_key(*name.partition("@")[::2]) for name in models}
        missing = [name for name, key in keys.items() if not key]
        if missing:
            raise SparkfleetError(
                f"{', '.join(missing)} not in the bundle {self.folder}: `sparkfleet bundle` adds to it"
            )
        blobs = [f"image/blobs/sha256/{_hex(blob)}" for name in images for blob in self.images[keys[name]]["blobs"]]
        found = dict.fromkeys(blobs)
        for model in models:
            folder = cache.repo_folder(model.partition("@")[0])
            found[f"hub/.sparkfleet/{folder}/fetching.json"] = None
            found.update(dict.fromkeys(f"hub/{folder}/blobs/{name}" for name in self.models[keys[model]]["files"]))
        unknown = [name for name in found if name not in self.files]
        if unknown:
            raise SparkfleetError(f"the bundle {self.folder} lists no file {unknown[0]}: recreate it")
        return list(found)

    def _text(self, name: str, text: str) -> None:
        scratch = f"{name}.new"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        self.folder.mkdir(parents=True, exist_ok=True)
        with os.fdopen(bounded.open_beneath(self.folder, scratch, flags, make=True), "w", encoding="utf-8") as file:
            file.write(text)
        (self.folder / scratch).replace(self.folder / name)


LAYOUT = json.dumps({"imageLayoutVersion": "1.0.0"}) + "\n"


def _signature(place: Path) -> bytes | None:
    """The signature in a bundle's folder; None where there is none. Raises SparkfleetError."""
    try:
        with os.fdopen(bounded.open_beneath(place, SIGNATURE), "rb") as file:
            return file.read(signature.LARGEST)
    except FileNotFoundError:
        return None
    except (OSError, BoundsError) as error:
        raise SparkfleetError(f"sparkfleet_bundle {place}: {SIGNATURE}: {error}") from None


def _checked(place: Path, known: Mapping[str, Any]) -> Bundle:
    """A bundle of what bundle.json says. Raises BoundsError."""
    made = Bundle(place)
    for key, value in bounded.as_dict(known.get("system"), "system").items():
        made.system[bounded.matched(WORD, key, "system")] = bounded.matched(WORD, value, f"system: {key}")
    for name, item in bounded.as_dict(known.get("images"), "images").items():
        made.images[bounded.matched(IMAGE, name, "images")] = _image(item, f"images: {name}")
    for name, value in bounded.as_dict(known.get("models"), "models").items():
        entry = bounded.as_dict(value, f"models: {name}")
        made.models[_model(name)] = {
            "commit": bounded.matched(COMMIT, entry.get("commit"), f"{name}: commit"),
            "bytes": bounded.as_int(entry.get("bytes"), f"{name}: bytes"),
            "files": [_hash(one, name) for one in bounded.as_list(entry.get("files"), f"{name}: files")],
        }
    made.packages = [
        bounded.matched(PACKAGE, one, "packages") for one in bounded.as_list(known.get("packages"), "packages")
    ]
    files = bounded.as_dict(known.get("files"), "files")
    for name, value in files.items():
        entry = bounded.as_dict(value, f"files: {name[:200]}")
        size = bounded.as_int(entry.get("size"), f"{name}: size")
        made.files[file_name(name)] = Entry(size, bounded.matched(SHA256, entry.get("sha256"), f"{name}: sha256"))
    return made


def file_name(name: Any) -> str:
    """`name`, which must be that of a file of a bundle. Raises BoundsError."""
    found = bounded.matched(FILE, name, "a file's name")
    if ".." in found:
        raise BoundsError(f"{found} is not a valid file name")
    return found


def _image(value: Any, what: str) -> dict[str, Any]:
    entry = bounded.as_dict(value, what)
    return {
        "digest": bounded.matched(DIGEST, entry.get("digest"), f"{what}: digest"),
        "media_type": bounded.matched(MEDIA_TYPE, entry.get("media_type"), f"{what}: media_type"),
        "size": bounded.as_int(entry.get("size"), f"{what}: size"),
        "blobs": [
            bounded.matched(DIGEST, one, f"{what}: blobs")
            for one in bounded.as_list(entry.get("blobs"), f"{what}: blobs")
        ],
    }


def _model(name: Any) -> str:
    repo, _, revision = bounded.as_str(name, "models", 512).partition("@")
    if not cache.valid_repo(repo) or not cache.valid_revision(revision):
        raise BoundsError(f"models: {bounded.printable(name, 100)!r} is not ORG/NAME@REVISION")
    return str(name)


def _hash(value: Any, what: str) -> str:
    if isinstance(value, str) and (SHA256.fullmatch(value) or COMMIT.fullmatch(value)):
        return value
    raise BoundsError(f"{what}: {bounded.printable(repr(value), 80)} is not a file hash")


# -- what a Spark says it has collected ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Item:
    """A file on a Spark: `name` in the bundle, `path` there, `size` in bytes; `digest` is of the kind `sha256`, or
    `sha1` as Git counts it."""

    name: str
    path: str
    size: int
    kind: str
    digest: str


@dataclasses.dataclass(frozen=True)
class Collected:
    """What `bundle_collect` returned, checked. `listing` is {} without a model."""

    image: dict[str, Any]
    model: str
    listing: dict[str, Any]
    packages: list[str]
    left_out: list[str]
    items: list[Item]

    @classmethod
    def of(cls, value: Any, image: str, model: str) -> Collected:
        """What a Spark says, which was asked for `image` and `model` (ORG/NAME@REVISION, "" for none): every name, size
        and hash must be of the form it must have and belong to what was asked for. Raises BoundsError."""
        known = bounded.as_dict(value, "what was collected")
        found = _image(known.get("image"), "image")
        if bounded.as_dict(known.get("image"), "image").get("name") != image:
            raise BoundsError(f"image: not the requested one, {image}")
        listing: dict[str, Any] = {}
        if model:
            repo, _, revision = model.partition("@")
            listing = cache.check_listing(known.get("listing"), "listing")
            if (listing.get("repo"), listing.get("revision")) != (repo, revision) or "commit" not in listing:
                raise BoundsError(f"listing: not for the requested model, {model}")
            if not all("sha256" in entry or "sha1" in entry for entry in listing["files"].values()):
                raise BoundsError("listing: a file has no hash")
            listing = {key: listing[key] for key in ("repo", "revision", "commit", "files")}
            listing["files"] = {
                name: {key: entry[key] for key in ("size", "sha256", "sha1") if key in entry}
                for name, entry in listing["files"].items()
            }
        names = {
            key: [bounded.matched(PACKAGE, one, key) for one in bounded.as_list(known.get(key), key, 10_000)]
            for key in ("packages", "left_out")
        }
        allowed = {f"image/blobs/sha256/{_hex(blob)}": ("sha256", _hex(blob)) for blob in found["blobs"]}
        for entry in listing.get("files", {}).values():
            kind = "sha256" if "sha256" in entry else "sha1"
            allowed[f"hub/{cache.repo_folder(model.partition('@')[0])}/blobs/{entry[kind]}"] = (kind, entry[kind])
        items = [_item(one, allowed) for one in bounded.as_list(known.get("files"), "files")]
        if len({item.name for item in items}) != len(items):
            raise BoundsError("files: duplicate name")
        absent = set(allowed) - {item.name for item in items}
        if absent:
            raise BoundsError(f"files: {sorted(absent)[0]} is not among them")
        return cls({"name": image, **found}, model, listing, names["packages"], names["left_out"], items)


def _item(value: Any, allowed: Mapping[str, tuple[str, str]]) -> Item:
    entry = bounded.as_dict(value, "files")
    name = file_name(entry.get("name"))
    size = bounded.as_int(entry.get("size"), f"{name}: size", most=1 << 44)
    path = bounded.as_str(entry.get("path"), f"{name}: path", 4096)
    if not path.startswith("/") or bounded.printable(path, 4096) != path:
        raise BoundsError(f"{name}: path {bounded.printable(path, 80)!r} is not absolute")
    if name.startswith("packages/"):
        return Item(name, path, size, "sha256", bounded.matched(SHA256, entry.get("sha256"), f"{name}: sha256"))
    if name not in allowed:
        raise BoundsError(f"files: {name} was not requested")
    kind, digest = allowed[name]
    if entry.get(kind) != digest:
        raise BoundsError(f"{name}: does not match the hash in its name")
    return Item(name, path, size, kind, digest)


def total(entries: Iterable[Entry]) -> int:
    """Bytes of files."""
    return sum(entry.size for entry in entries)


def _hex(digest: str) -> str:
    return digest.partition(":")[2]


def _json(data: Any) -> str:
    return json.dumps(data, indent=1) + "\n"
