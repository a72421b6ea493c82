"""The lock of an inventory: what its tags and revisions stood for when `sparkfleet lock` asked, and every file's hash.

With a lock the plan takes digests, commits and hashes from it, whatever registry and Hub say by now; what it does not
have is refused. It is text to be committed and read as a diff: YAML in a fixed order, a line a file. Its last key is a
hash of all others, so that an edit or a merge that went wrong is noticed; whoever may write the file decides what runs.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import yaml
from sparkfleet_host import bounded, cache
from sparkfleet_host.bounded import COMMIT, DIGEST, SHA256, BoundsError, printable
from sparkfleet_host.registry import valid_image

from sparkfleet import SparkfleetError, __version__
from sparkfleet.documents import schema
from sparkfleet.documents.schema import Document, Place
from sparkfleet.packaging import debian, signature
from sparkfleet.user_paths import expanded

#: Beside the inventory. Ansible takes every other name in the folder of an inventory for a part of it.
NAME = ".sparkfleet.lock.yml"
FORMAT = 1
#: Of the file, in characters; a file of a model takes some 150.
LIMIT = 4 << 20
VARIABLE = "sparkfleet_lock_file"
HEAD = "# Written by `sparkfleet lock`: commit it, do not edit it. docs/supply-chain.md explains it.\n"
Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class Image:
    """What a reference stands for: `digest` of the index, or of the manifest where there is no index; `manifest` of the
    platform (OS/ARCHITECTURE); `size` of its blobs in bytes."""

    digest: str
    platform: str
    manifest: str
    size: int


@dataclasses.dataclass(frozen=True)
class File:
    """A file of a model. `git`: the hash by which the Hub names it, where that is not its sha256."""

    size: int
    sha256: str
    git: str = ""

    def __str__(self) -> str:
        return f"{self.size} sha256:{self.sha256}" + (f" git:{self.git}" if self.git else "")


@dataclasses.dataclass(frozen=True)
class Model:
    """What a revision stands for. `licence`: its name on the Hub; `code`: whether the repository's code is among the
    files."""

    commit: str
    files: Mapping[str, File]
    licence: str = ""
    code: bool = False

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())

    def expected(self, code: bool) -> dict[str, Any]:
        """As model_download takes it, with the repository's code or without: what differs is refused as a difference
        from the lock."""
        files = {
            name: {"size": file.size, "sha256": file.sha256, **({"sha1": file.git} if file.git else {})}
            for name, file in self.files.items()
            if code or not name.endswith(cache.CODE)
        }
        return {"commit": self.commit, "files": files, "locked": True}


@dataclasses.dataclass(frozen=True)
class Lock:
    """`images` by reference, `models` by ORG/NAME@REVISION, `cards` (name -> sha256 of what is in one), `packages`
    (system -> versions by name). `sparkfleet`: the version that wrote it. `path`: where it was read, for messages."""

    images: Mapping[str, Image] = dataclasses.field(default_factory=dict)
    models: Mapping[str, Model] = dataclasses.field(default_factory=dict)
    cards: Mapping[str, str] = dataclasses.field(default_factory=dict)
    packages: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    sparkfleet: str = __version__
    path: Path = dataclasses.field(default=Path(NAME), compare=False)

    @classmethod
    def read(cls, file: str | Path, sealed: bool = True, signers: str = "") -> Lock:
        """The lock in a file. Raises SparkfleetError, which names file, line and remedy, for one that cannot be read,
        is of another form, (`sealed`) was changed after it was written, or that none of the file `signers` has signed
        (see `signature`); no signature is asked for where that is empty."""
        path = expanded(VARIABLE, file)
        try:
            data = bounded.read_file(path, LIMIT)
            text = data.decode("utf-8")
        except FileNotFoundError:
            raise SparkfleetError(
                f"{VARIABLE}: {path} does not exist: `sparkfleet lock` writes it, or restore it from version control"
            ) from None
        except (OSError, ValueError) as error:
            raise SparkfleetError(f"the lock {path} cannot be read: {error}") from None
        if signers:
            signature.check(data, signature.read(path), signers, f"the lock {path}", signature.LOCK)
        return cls.of_text(path, text, sealed)

    @classmethod
    def of_text(cls, path: Path, text: str, sealed: bool = True) -> Lock:
        """The lock in a text; errors name `path`. Raises SparkfleetError."""
        document = Document(path, text, LIMIT)
        reader = _Reader(document)
        data = reader.mapping((), document.data)
        if data.get("format") != FORMAT:
            shown = printable(repr(data.get("format")), 60)
            raise document.error(("format",), f"format: {shown} is not known here: a newer Sparkfleet wrote it")
        reader.only((), data, ("format", "sparkfleet", "images", "models", "cards", "packages", "seal"))
        made = cls(
            images=reader.each("images", data, valid_image, "NAME:TAG", reader.image),
            models=reader.each("models", data, _is_model, "ORG/NAME@REVISION", reader.model),
            cards=reader.each("cards", data, bool, "a name", reader.digest),
            packages=reader.each(
                "packages", {"packages": {}, **data}, _is_system, "ID CODENAME MACHINE", reader.packages
            ),
            sparkfleet=reader.text(("sparkfleet",), data.get("sparkfleet")),
            path=path,
        )
        if sealed and data.get("seal") != made.seal():
            raise document.error(
                ("seal",),
                "the lock was changed after `sparkfleet lock` had written it: restore it from version control, or see "
                "with `sparkfleet lock --update` what differs from registry and Hub, and write it again",
            )
        return made

    def data(self) -> dict[str, Any]:
        """All but the seal, as plain data in the order of the file."""
        return {
            "format": FORMAT,
            "sparkfleet": self.sparkfleet,
            "images": {name: dataclasses.asdict(image) for name, image in sorted(self.images.items())},
            "models": {name: _model_data(model) for name, model in sorted(self.models.items())},
            "cards": dict(sorted(self.cards.items())),
            # Not of every lock: those of before stay as they are.
            **(
                {"packages": {name: dict(sorted(known.items())) for name, known in sorted(self.packages.items())}}
                if self.packages
                else {}
            ),
        }

    def seal(self) -> str:
        """The hash of what is in it, however the file is written."""
        return schema.digest(self.data())

    def text(self) -> str:
        """The file."""
        body = yaml.safe_dump({**self.data(), "seal": self.seal()}, sort_keys=False, width=10**6)
        return HEAD + str(body)

    def write(self) -> None:
        """Put it in its place at once, readable by all. Raises SparkfleetError, also for one that has too much to be
        read again."""
        text = self.text()
        Lock.of_text(self.path, text)
        scratch = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        try:
            with scratch.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            scratch.chmod(0o644)
            scratch.replace(self.path)
        except OSError as error:
            scratch.unlink(missing_ok=True)
            raise SparkfleetError(
                f"the lock {self.path} cannot be written ({error.strerror}): {VARIABLE} names another place"
            ) from None

    # -- what a plan asks ----------------------------------------------------------------------------------

    def pinned(self, image: str) -> str:
        """The reference with the digest of the lock. Raises SparkfleetError for an image that it does not have."""
        found = self.images.get(image)
        if found is None:
            raise self._lacks(f"the image {image}")
        return image if "@" in image else f"{image}@{found.digest}"

    def platform(self, image: str) -> str:
        """OS/ARCHITECTURE of an image, pinned or not; "" for one that it does not have."""
        found = self.images.get(image) or self.images.get(image.partition("@")[0])
        return found.platform if found else ""

    def model(self, repo: str, revision: str, code: bool = False) -> Model:
        """What a revision stands for. Raises SparkfleetError for one that it does not have, or has without the code
        that the engine is to run."""
        found = self.models.get(f"{repo}@{revision}")
        if found is None:
            raise self._lacks(f"the model {repo}@{revision}")
        if code and not found.code:
            raise self._lacks(f"the code of {repo}@{revision}, which trust_remote_code lets the engine run")
        return found

    def at(self, repo: str, commit: str) -> Model:
        """The model at a commit. Raises SparkfleetError for one that it does not have."""
        for name, found in self.models.items():
            if name.partition("@")[0] == repo and found.commit == commit:
                return found
        raise self._lacks(f"the model {repo}@{commit}")

    def preferences(self, system: Mapping[str, Any]) -> str:
        """What makes apt install the versions of the lock on a system and no others, as apt_preferences(5) has it; ""
        where the lock has none for it."""
        entries = []
        for name, version in sorted(self.packages.get(debian.system_name(system), {}).items()):
            entries += [f"Package: {name}\nPin: version {version}\nPin-Priority: 1001\n"]
            entries += [f"Package: {name}\nPin: release *\nPin-Priority: -1\n"]
        return "\n".join(entries)

    def check_card(self, name: str, digest: str, source: Path) -> None:
        """Whether a card is the one that was locked. Raises SparkfleetError."""
        known = self.cards.get(name)
        if known is None:
            raise self._lacks(f"the model card {name}")
        if known != digest:
            raise SparkfleetError(
                f"the model card {name} ({source}) has changed since it was locked in {self.path}: restore it, or take "
                "the change with `sparkfleet lock --update`"
            )

    def _lacks(self, what: str) -> SparkfleetError:
        return SparkfleetError(
            f"{what} is not in the lock {self.path}: `sparkfleet lock` with the same inventory and variables (-i, -e) "
            "adds it"
        )


def _model_data(model: Model) -> dict[str, Any]:
    return {
        "commit": model.commit,
        "licence": model.licence,
        **({"code": True} if model.code else {}),
        "files": {name: str(file) for name, file in sorted(model.files.items())},
    }


def _is_system(name: str) -> bool:
    return bool(debian.SYSTEM.fullmatch(name))


def _is_model(name: str) -> bool:
    repo, at, revision = name.partition("@")
    return bool(at) and "/" in repo and cache.valid_repo(repo) and cache.valid_revision(revision)


class _Reader:
    """Takes the data of a document apart; every error names its line."""

    def __init__(self, document: Document) -> None:
        self.document = document

    def mapping(self, place: Place, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.document.error(place, f"{_name(place)}: must be a mapping")
        return value

    def only(self, place: Place, data: Mapping[str, Any], known: Sequence[str]) -> None:
        for key in data:
            if key not in known:
                raise self.document.error((*place, key), f"{_name((*place, key))}: unknown key")

    def text(self, place: Place, value: Any, limit: int = 200) -> str:
        if not isinstance(value, str) or len(value) > limit:
            raise self.document.error(place, f"{_name(place)}: must be a text of at most {limit} characters")
        return value

    def bounded(self, place: Place, check: Callable[[str], Value]) -> Value:
        try:
            return check(_name(place))
        except BoundsError as error:
            raise self.document.error(place, str(error)) from None

    def each(
        self,
        key: str,
        data: Mapping[str, Any],
        valid: Callable[[str], bool],
        words: str,
        made: Callable[[Place, Any], Value],
    ) -> dict[str, Value]:
        found: dict[str, Value] = {}
        for name, value in self.mapping((key,), data.get(key)).items():
            if not valid(name):
                raise self.document.error((key, name), f"{key}: {printable(name, 100)!r} is not {words}")
            found[name] = made((key, name), value)
        return found

    def digest(self, place: Place, value: Any) -> str:
        return self.bounded(place, lambda what: bounded.matched(DIGEST, value, what))

    def image(self, place: Place, value: Any) -> Image:
        data = self.mapping(place, value)
        self.only(place, data, [field.name for field in dataclasses.fields(Image)])
        return Image(
            digest=self.digest((*place, "digest"), data.get("digest")),
            platform=self.text((*place, "platform"), data.get("platform")),
            manifest=self.digest((*place, "manifest"), data.get("manifest")),
            size=self.bounded((*place, "size"), lambda what: bounded.as_int(data.get("size"), what)),
        )

    def model(self, place: Place, value: Any) -> Model:
        data = self.mapping(place, value)
        self.only(place, data, ("commit", "licence", "code", "files"))
        commit = self.bounded((*place, "commit"), lambda what: bounded.matched(COMMIT, data.get("commit"), what))
        files = {}
        for name, text in self.mapping((*place, "files"), data.get("files")).items():
            there = (*place, "files", name)
            if not bounded.is_repository_path(name):
                raise self.document.error(there, f"{printable(name, 100)!r} is not a valid file name")
            files[name] = self.file(there, text)
        if not files:
            raise self.document.error((*place, "files"), f"{_name((*place, 'files'))}: there are none")
        return Model(commit, files, self.text((*place, "licence"), data.get("licence")), data.get("code") is True)

    def packages(self, place: Place, value: Any) -> dict[str, str]:
        found = {}
        for name, version in self.mapping(place, value).items():
            there = (*place, name)
            if name not in debian.PREPARED:
                known = ", ".join(debian.PREPARED)
                raise self.document.error(there, f"{_name(there)}: not a package that Sparkfleet installs ({known})")
            found[name] = self.bounded(there, partial(bounded.matched, debian.VERSION, version))
        return found

    def file(self, place: Place, value: Any) -> File:
        words = value.split(" ") if isinstance(value, str) else []
        hashes = dict(word.partition(":")[::2] for word in words[1:])
        known = (["sha256"], ["sha256", "git"])
        if not (words and words[0].isascii() and words[0].isdigit() and len(words[0]) < 16 and [*hashes] in known):
            raise self.document.error(place, f"{_name(place)}: must be SIZE sha256:HEX, with git:HEX or without")
        return File(
            self.bounded(place, lambda what: bounded.as_int(int(words[0]), what, most=cache.FILE_BYTES)),
            self.bounded(place, lambda what: bounded.matched(SHA256, hashes["sha256"], what)),
            self.bounded(place, lambda what: bounded.matched(COMMIT, hashes["git"], what)) if "git" in hashes else "",
        )


def _name(place: Place) -> str:
    return printable(": ".join(map(str, place)), 300) or "the lock"


def beside(inventory: str | Path) -> Path:
    """Where the lock of an inventory is by default: in its folder."""
    place = Path(inventory)
    return (place if place.is_dir() else place.parent) / NAME


def found(inventories: Sequence[str]) -> str:
    """The lock beside the sources of an inventory, "" for none. Raises SparkfleetError for several, and for one that is
    no file: whoever has a lock must not deploy without it."""
    there = list(dict.fromkeys(str(place) for place in map(beside, _files(inventories)) if _is_there(place)))
    if len(there) > 1:
        raise SparkfleetError(f"several locks: {', '.join(there)}: name the one to use in {VARIABLE}")
    return next(iter(there), "")


def _is_there(place: Path) -> bool:
    try:
        if stat.S_ISREG(place.stat().st_mode):
            return True
        reason = "it is no regular file"
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR) and not place.is_symlink():
            return False
        reason = str(error.strerror)
    raise SparkfleetError(
        f"the lock {place} cannot be read: {reason}: restore it from version control, remove it to deploy without a "
        f"lock, or name the one to use in {VARIABLE}"
    )


def _files(inventories: Sequence[str]) -> list[str]:
    """Those that are files and folders; others are lists of hosts."""
    return [name for name in inventories if name and "," not in name and Path(name).exists()]
