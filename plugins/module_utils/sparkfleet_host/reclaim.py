# SPDX-License-Identifier: Apache-2.0
"""What pruned releases leave behind: images that were pulled, models that were downloaded, compile caches.

Before a release is pruned, what it needed is noted. After a switch that was verified, each noted part is removed if no
kept release needs it, Sparkfleet brought it to the host and nobody uses it. A part in use stays noted, and the next
switch tries again. Below /var/lib/sparkfleet:

    unneeded.json     parts that pruned releases needed: {"parts": [{"kind", "name", "place"}]}
    images/HEX.json   an image that `image_pull` brought, by its digest: {"names": [its names then]}

Others may write to the model cache: no link is followed in it, and each removal is relative to an open folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from . import bounded, engine, integrity, job
from .bounded import COMMIT, DIGEST, BoundsError, printable
from .cache import FOLDER, MANIFEST_BYTES, MOST_FILES, check_listing, repo_folder, valid_repo, was_downloaded
from .docker import Docker, DockerError
from .releases import ReleaseError, Store, write_json

UNNEEDED, IMAGES = "unneeded.json", "images"
IMAGE, MODEL, COMPILED = "image", "model", "compile cache"
CACHE_DIR, COMPILE_CACHE_DIR = "/opt/hf", "/var/cache/sparkfleet"  # of releases that do not say
SHARED = "/run/sparkfleet/share/serve/settings.json"
MOST_PARTS = 1000
DELETE_SECONDS = 300.0  # that Docker has for an image
ACTIVE = ("running", "paused", "restarting")
_PLACE = re.compile(r"/[^\s:]+")
_COMPILED = re.compile(r"[0-9a-f]{12}")
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class LeftError(Exception):
    """A part stays; the message is the reason."""


@dataclasses.dataclass(frozen=True, order=True)
class Part:
    """Something that a release needs. `kind`: IMAGE, MODEL or COMPILED; `name`: the image's, ORG/NAME@COMMIT, or the
    name of a compile cache; `place`: the folder that a model or a compile cache lies in."""

    kind: str
    name: str
    place: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


def parts(lock: Mapping[str, Any]) -> list[Part]:
    """What a release with this lock needs. The model of a server that downloads by itself is not ours to know."""
    image, repo, commit = (str(lock.get(key) or "") for key in ("image", "repo", "revision"))
    found = [Part(IMAGE, image)] if image else []
    digest = image.partition("@")[2]
    if DIGEST.fullmatch(digest):
        found.append(Part(COMPILED, digest[7:19], _place(lock, "compile_cache_dir", COMPILE_CACHE_DIR)))
    if valid_repo(repo) and COMMIT.fullmatch(commit):
        found.append(Part(MODEL, f"{repo}@{commit}", _place(lock, "cache_dir", CACHE_DIR)))
    return found


def _place(lock: Mapping[str, Any], key: str, default: str) -> str:
    value = lock.get(key)
    return value if isinstance(value, str) and _PLACE.fullmatch(value) else default


# -- notes -----------------------------------------------------------------------------------------------------------


def unneeded(store: Store) -> list[Part]:
    """The parts that are noted; [] where the note cannot be understood."""
    try:
        data = bounded.read_json(store.state_dir / UNNEEDED)
        return [_part(entry) for entry in bounded.as_list(data.get("parts"), UNNEEDED, MOST_PARTS)]
    except (OSError, BoundsError):
        return []


def _part(entry: Any) -> Part:
    made = bounded.as_dict(entry, UNNEEDED)
    part = Part(*(bounded.as_str(made.get(key), f"{UNNEEDED}: {key}", 4096) for key in ("kind", "name", "place")))
    repo, _, commit = part.name.partition("@")
    good = {
        IMAGE: not part.place,
        MODEL: bool(valid_repo(repo) and COMMIT.fullmatch(commit) and _PLACE.fullmatch(part.place)),
        COMPILED: bool(_COMPILED.fullmatch(part.name) and _PLACE.fullmatch(part.place)),
    }
    if not good.get(part.kind):
        raise BoundsError(f"{UNNEEDED}: {printable(str(part), 200)!r} is not a part of a release")
    return part


def note(store: Store, numbers: Iterable[int]) -> None:
    """Note what releases need that are about to be pruned. Raises OSError."""
    new = {part for number in numbers for part in _parts_of(store, number)}
    noted = unneeded(store)
    if new - set(noted):
        _write(store, [*noted, *sorted(new - set(noted))])


def _parts_of(store: Store, number: int) -> list[Part]:
    with contextlib.suppress(ReleaseError):
        return parts(store.lock(number))
    return []


def _write(store: Store, noted: Sequence[Part]) -> None:
    write_json(store.state_dir / UNNEEDED, {"parts": [dataclasses.asdict(part) for part in noted[-MOST_PARTS:]]})


def places(store: Store) -> list[str]:
    """Folders in which parts may be removed."""
    found = [*unneeded(store), *(part for number in store.numbers() for part in _parts_of(store, number))]
    return sorted({part.place for part in found if part.place})


def image_names(image: Mapping[str, Any]) -> set[str]:
    """The names of an image, tags and digests, as Docker lists or inspects it."""
    names = [*(image.get("RepoTags") or []), *(image.get("RepoDigests") or [])]
    return {str(name) for name in names if not str(name).startswith("<none>")}


def images_before(docker: Docker) -> dict[str, set[str]]:
    """The images on the host, id to names. Raises DockerError."""
    return {str(item.get("Id")): image_names(item) for item in docker.call("GET", "/images/json") or []}


def note_image(state_dir: str | Path, image: Mapping[str, Any], before: Mapping[str, set[str]]) -> None:
    """Note that a pull brought an image, or gave a name to one that an earlier pull had brought. One that was there
    without Sparkfleet is somebody's own. `before`: `images_before` the pull. Raises OSError."""
    names = image_names(image)
    digests = {name.partition("@")[2] for name in names if "@" in name}
    same = [
        known
        for identity, known in before.items()
        if identity == image.get("Id") or digests & {name.partition("@")[2] for name in known}
    ]
    known = set().union(*same) if same else None
    for path in _records(state_dir, names):
        noted = _noted_names(path)
        if known is None or noted:
            write_json(path, {"names": sorted(noted | (names - (known or set())))})


def _records(state_dir: str | Path, names: Iterable[str]) -> list[Path]:
    digests = {name.partition("@")[2] for name in names}
    return [Path(state_dir, IMAGES, f"{digest[7:]}.json") for digest in sorted(digests) if DIGEST.fullmatch(digest)]


def _noted_names(path: Path) -> set[str]:
    try:
        names = bounded.as_list(bounded.read_json(path).get("names"), str(path), 1000)
    except (OSError, BoundsError):
        return set()
    return {name for name in names if isinstance(name, str)}


# -- the whole -------------------------------------------------------------------------------------------------------


class Reclaim:
    """Removes parts that are not needed. `kept`: the locks of the releases that are kept; `dry`: only finds out what
    would go. `reclaimed` are {"kind", "name", "bytes"}, `left` sentences that say what stays and why."""

    def __init__(
        self,
        docker: Docker,
        kept: Sequence[Mapping[str, Any]],
        state_dir: str | Path,
        dry: bool = False,
        jobs: str = job.FOLDER,
    ) -> None:
        self.docker, self.state_dir, self.dry, self.jobs = docker, Path(state_dir), dry, jobs
        self.reclaimed: list[dict[str, Any]] = []
        self.left: list[str] = []
        self._needed = {(part.kind, part.name) for lock in kept for part in parts(lock)}
        # A release without a commit may use any of its model.
        self._repos = {str(lock.get("repo")) for lock in kept if not COMMIT.fullmatch(str(lock.get("revision") or ""))}

    def run(self, noted: Iterable[Part]) -> list[Part]:
        """Remove what may go; the parts that are to be tried again."""
        again = []
        work = {IMAGE: self._image, MODEL: self._model, COMPILED: self._compiled}
        for part in noted:
            if (part.kind, part.name) in self._needed:
                continue  # noted again when the release that needs it is pruned
            try:
                size = work[part.kind](part)
            except Exception as error:  # a switch that was verified must not fail for this
                expected = isinstance(error, LeftError | OSError | DockerError | BoundsError)
                reason = str(error) if expected else f"{type(error).__name__}: {error}"
                self.left.append(f"{part}: {printable(reason, 300)}")
                again.append(part)
                continue
            if size is not None:
                self.reclaimed.append({"kind": part.kind, "name": part.name, "bytes": size})
        return again

    @contextlib.contextmanager
    def _idle(self, kind: str) -> Iterator[None]:
        """Keep fetches of a kind from beginning. Raises LeftError while one runs."""
        if self.dry:
            yield
            return
        with job.hold(Path(self.jobs, f"{kind}.json")) as holder:
            if holder is not None:
                raise LeftError(f"{holder['what']} is being fetched")
            yield

    @contextlib.contextmanager
    def _unchecked(self) -> Iterator[None]:
        """Keep a check of the models from beginning. Raises LeftError while one runs."""
        if self.dry:
            yield
            return
        self.state_dir.mkdir(parents=True, exist_ok=True)
        with Path(self.state_dir, f"{Path(integrity.RESULT).name}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LeftError("the files of the models are being hashed") from None
            yield

    # -- images ----------------------------------------------------------------------------------------------

    def _image(self, part: Part) -> int | None:
        """Bytes as Docker counts them, layers that others share included; None where there is nothing to remove."""
        with self._idle("image"):
            found = self.docker.image(part.name)
            if found is None:
                return None
            identity, names = str(found.get("Id")), image_names(found)
            if any((self.docker.image(name) or {}).get("Id") == identity for name in self._images()):
                return None
            records = [path for path in _records(self.state_dir, names) if path.exists()]
            if not records:
                return None
            others = sorted(names - set().union(*map(_noted_names, records)))
            if others:
                raise LeftError(f"somebody named it {others[0]}")
            for item in self.docker.containers():
                if item.get("ImageID") == identity or item.get("Image") in names:
                    raise LeftError(f"the container {_name(item)} uses it")
            if not self.dry:
                self._remove_image(identity, names)
                for path in records:
                    path.unlink()
            size = found.get("Size")
            return size if isinstance(size, int) else 0

    def _images(self) -> list[str]:
        return [name for kind, name in sorted(self._needed) if kind == IMAGE]

    def _remove_image(self, identity: str, names: Iterable[str]) -> None:
        # With its last tag a digest of the same repository goes too. Without force: Docker refuses one that is used.
        patient = Docker(self.docker.socket_path, DELETE_SECONDS)
        for name in sorted(names, key=lambda name: ("@" in name, name)):
            try:
                patient.call("DELETE", f"/images/{quote(name, safe='/:@')}")
            except DockerError as error:
                if error.status != 404:
                    raise
        if self.docker.image(identity) is not None:
            raise LeftError("Docker still has it")

    # -- models ----------------------------------------------------------------------------------------------

    def _model(self, part: Part) -> int | None:
        repo, _, commit = part.name.partition("@")
        if repo in self._repos:
            raise LeftError("a kept release uses whatever commit the cache has")
        with self._idle("model"), self._unchecked():
            self._check_unused(repo, part.place)
            try:
                with ModelFiles(part.place, repo, commit) as files:
                    return files.remove(self.dry)
            except FileNotFoundError:
                return None

    def _check_unused(self, repo: str, cache_dir: str) -> None:
        """Raises LeftError where others may read the cache: any model may be the one that they serve."""
        for item in self.docker.containers():
            ours = (item.get("Labels") or {}).get(engine.PROJECT_LABEL) == engine.PROJECT
            if not ours and item.get("State") in ACTIVE and _mounts(item, cache_dir):
                raise LeftError(f"the container {_name(item)} has {cache_dir} mounted")
        with contextlib.suppress(OSError, BoundsError):
            given = bounded.as_list(bounded.read_json(SHARED).get("models") or [], SHARED)
            if any(isinstance(model, dict) and model.get("repo") == repo for model in given):
                raise LeftError("other Sparks take it from here")

    # -- compile caches --------------------------------------------------------------------------------------

    def _compiled(self, part: Part) -> int | None:
        folder = f"{part.place}/{part.name}"
        for item in self.docker.containers():
            if _mounts(item, folder):
                raise LeftError(f"the container {_name(item)} has it mounted")
        try:
            top = os.open(part.place, _DIRECTORY)
        except FileNotFoundError:
            return None
        aside = f".{part.name}.unneeded"
        try:
            there = [name for name in (aside, part.name) if _is_folder(name, top)]
            size = sum(_tree_bytes(name, top) for name in there)
            if not self.dry:
                for name in there:  # a folder that is cut half way through must not be taken for a compile cache
                    if name == part.name:
                        os.rename(name, aside, src_dir_fd=top, dst_dir_fd=top)
                    _remove_tree(aside, top)
            return size if there else None
        finally:
            os.close(top)


def after_switch(store: Store, docker: Docker) -> tuple[list[dict[str, Any]], list[str]]:
    """Remove what the releases that are kept do not need: `Reclaim.reclaimed` and `Reclaim.left`. Raises OSError."""
    noted = unneeded(store)
    if not noted:
        return [], []
    try:
        kept = [store.lock(number) for number in store.numbers()]
    except ReleaseError as error:
        return [], [f"what releases need is not known: {printable(str(error), 300)}"]
    work = Reclaim(docker, kept, store.state_dir)
    again = work.run(noted)
    if again != noted:
        _write(store, again)
    return work.reclaimed, work.left


def foresee(
    store: Store, docker: Docker, keep: int, to: int, lock: Mapping[str, Any]
) -> tuple[list[int], list[dict[str, Any]], list[str]]:
    """What a switch to release `to` would do: the releases that it would prune, `Reclaim.reclaimed`, `Reclaim.left`.
    `lock`: that of the release, which need not be staged yet."""
    surplus = store.surplus(keep, to)
    try:
        kept = [store.lock(number) for number in store.numbers() if number not in (to, *surplus)]
        kept.append(store.lock(to) if to in store.numbers() else dict(lock))
    except ReleaseError as error:
        return surplus, [], [f"what releases need is not known: {printable(str(error), 300)}"]
    noted = dict.fromkeys([*unneeded(store), *(part for number in surplus for part in _parts_of(store, number))])
    work = Reclaim(docker, kept, store.state_dir, dry=True)
    work.run(noted)
    return surplus, work.reclaimed, work.left


def _name(item: Mapping[str, Any]) -> str:
    return str((item.get("Names") or [item.get("Id")])[0]).lstrip("/")


def _mounts(item: Mapping[str, Any], folder: str) -> bool:
    """Whether a container sees files of a folder. One that sees the whole host (a monitor) does not count."""
    wanted = Path(os.path.realpath(folder))
    for mount in item.get("Mounts") or []:
        source = Path(os.path.realpath(str(mount.get("Source") or "/")))
        if source != Path("/") and (source.is_relative_to(wanted) or wanted.is_relative_to(source)):
            return True
    return False


# -- files -----------------------------------------------------------------------------------------------------------


class ModelFiles:
    """The files of one commit of a model in a cache. Raises FileNotFoundError where the cache does not have it."""

    def __init__(self, cache_dir: str, repo: str, commit: str) -> None:
        self.cache_dir, self.commit, self._name = cache_dir, commit, repo_folder(repo)
        self._open: list[int] = []

    def __enter__(self) -> ModelFiles:
        try:
            self._top = self._folder(self.cache_dir)
            self._lists = self._folder(self._name, self._folder(FOLDER, self._top))
            self._model = self._folder(self._name, self._top)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            os.close(self._open.pop())

    def _folder(self, name: str, at: int | None = None) -> int:
        # The cache folder itself may be a link of the operator's.
        flags = _DIRECTORY if at is not None else _DIRECTORY & ~os.O_NOFOLLOW
        self._open.append(os.open(name, flags, dir_fd=at))
        return self._open[-1]

    def remove(self, dry: bool = False) -> int | None:
        """Remove refs, snapshot, blobs that no other commit has, and the manifest last: until then it is the record
        that Sparkfleet downloaded them. Bytes; None where Sparkfleet did not. Raises LeftError, BoundsError, OSError.
        """
        listing = self._listing(f"{self.commit}.json")
        if not was_downloaded(listing):
            return None
        self._check_locks()
        doomed = _hashes(listing) - self._used_elsewhere()
        blobs = self._child("blobs")
        snapshots = self._child("snapshots")
        sizes = {name: size for name in doomed if blobs is not None and (size := _file_bytes(name, blobs)) is not None}
        total = sum(sizes.values())
        if snapshots is not None and _is_folder(self.commit, snapshots):
            total += _tree_bytes(self.commit, snapshots)
        if dry:
            return total
        self._remove_refs()
        if snapshots is not None and _is_folder(self.commit, snapshots):
            _remove_tree(self.commit, snapshots)
        for name in sizes:
            os.unlink(name, dir_fd=blobs)
        for name in (f"{self.commit}.suspect.json", f"{self.commit}.json"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self._lists)
        for name in ("blobs", "snapshots", "refs"):
            self._remove_empty(name, self._model)
        self._remove_empty(self._name, self._top)
        with contextlib.suppress(OSError):
            os.rmdir(f"{FOLDER}/{self._name}", dir_fd=self._top)
        return total

    @staticmethod
    def _remove_empty(name: str, at: int) -> None:
        with contextlib.suppress(OSError):
            os.rmdir(name, dir_fd=at)

    def _child(self, name: str) -> int | None:
        try:
            return self._folder(name, self._model)
        except FileNotFoundError:
            return None

    def _listing(self, name: str) -> dict[str, Any]:
        handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._lists)
        with os.fdopen(handle, "rb") as file:
            data = file.read(MANIFEST_BYTES + 1)
        return check_listing(bounded.parse_json(data, name, MANIFEST_BYTES), name)

    def _check_locks(self) -> None:
        """Raises LeftError where a client of the Hub is downloading the model."""
        try:
            folder = self._folder(self._name, self._folder(".locks", self._top))
        except FileNotFoundError:
            return
        for name in _names(folder):
            with contextlib.suppress(FileNotFoundError):
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                handle = os.open(name, flags, dir_fd=folder)
                try:
                    fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise LeftError("somebody is downloading it") from None
                finally:
                    os.close(handle)

    def _used_elsewhere(self) -> set[str]:
        """Blobs that another list or another snapshot has."""
        used: set[str] = set()
        for name in _names(self._lists):
            if name.endswith(".json") and not name.endswith(".suspect.json") and name != f"{self.commit}.json":
                used |= _hashes(self._listing(name))
        snapshots = self._child("snapshots")
        for name in _names(snapshots) if snapshots is not None else ():
            if name != self.commit and _is_folder(name, snapshots):
                used |= {Path(target).name for target in _links(name, snapshots)}
        return used

    def _remove_refs(self) -> None:
        if not _is_folder("refs", self._model):
            return
        for _, _, names, at in os.fwalk("refs", dir_fd=self._model, follow_symlinks=False):
            for name in names:
                handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=at)
                with os.fdopen(handle, "rb") as file:
                    points_here = file.read(100).strip() == self.commit.encode()
                if points_here:
                    os.unlink(name, dir_fd=at)


def _hashes(listing: Mapping[str, Any]) -> set[str]:
    return {hash for entry in listing["files"].values() if (hash := entry.get("sha256") or entry.get("sha1"))}


def _names(folder: int) -> list[str]:
    with os.scandir(folder) as entries:
        names = [entry.name for entry in itertools.islice(entries, MOST_FILES + 1)]
    if len(names) > MOST_FILES:
        raise LeftError(f"a folder of the cache has more than {MOST_FILES} files")
    return names


def _is_folder(name: str, at: int | None) -> bool:
    """Whether it is one itself, not a link to one."""
    try:
        return stat.S_ISDIR(os.stat(name, dir_fd=at, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


def _file_bytes(name: str, at: int) -> int | None:
    """Size of a regular file; None for anything else. One with another name elsewhere frees nothing."""
    try:
        about = os.stat(name, dir_fd=at, follow_symlinks=False)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(about.st_mode):
        return None
    return about.st_size if about.st_nlink == 1 else 0


def _tree_bytes(name: str, at: int) -> int:
    walk = os.fwalk(name, dir_fd=at, follow_symlinks=False)
    return sum(_file_bytes(file, folder) or 0 for _, _, files, folder in walk for file in files)


def _links(name: str, at: int | None) -> Iterator[str]:
    for _, folders, files, folder in os.fwalk(name, dir_fd=at, follow_symlinks=False):
        for item in (*folders, *files):
            with contextlib.suppress(OSError):  # not a link
                yield os.readlink(item, dir_fd=folder)


def _remove_tree(name: str, at: int) -> None:
    """As shutil.rmtree does, relative to an open folder (which Python 3.10 cannot). Raises OSError."""
    for _, folders, files, folder in os.fwalk(name, topdown=False, dir_fd=at, follow_symlinks=False):
        for item in files:
            os.unlink(item, dir_fd=folder)
        for item in folders:
            if _is_folder(item, folder):
                os.rmdir(item, dir_fd=folder)
            else:
                os.unlink(item, dir_fd=folder)
    os.rmdir(name, dir_fd=at)
