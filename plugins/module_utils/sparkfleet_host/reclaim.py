# SPDX-License-Identifier: Apache-2.0
"""What pruned releases leave behind: images that were pulled, models that were downloaded, compile caches.

Before a release is pruned, what it needed is recorded. After a verified switch, each recorded part is removed if no
kept release needs it, Sparkfleet brought it to the host and no one uses it. A part in use stays recorded, and the next
switch tries again. Below /var/lib/sparkfleet:

    unneeded.json     parts that pruned releases needed: {"parts": [{"kind", "name", "place"}]}
    images/HEX.json   an image that `image_pull` brought, by its digest: {"names": [its names then]}

Others may write to the model cache, even while it is searched: no link is followed in it, each removal is
relative to an open folder, and all of it together has SECONDS, since a switch holds its lock meanwhile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from . import bounded, engine, integrity, job
from .bounded import COMMIT, DIGEST, BoundsError, printable
from .cache import (
    FOLDER,
    MANIFEST_BYTES,
    MOST_FILES,
    check_listing,
    manifest_path,
    repo_folder,
    valid_repo,
    was_downloaded,
)
from .docker import Docker, DockerError
from .registry import valid_image
from .release_format import check_lock
from .releases import ReleaseError, Store, write_json

UNNEEDED, IMAGES = "unneeded.json", "images"
IMAGE, MODEL, COMPILED = "image", "model", "compile cache"
CACHE_DIR, COMPILE_CACHE_DIR = "/opt/hf", "/var/cache/sparkfleet"  # of releases that do not name them
SHARED = "/run/sparkfleet/share/serve/settings.json"
MOST_PARTS = 1000
MOST_NAMES = 1000  # of an image
OURS = 100  # names of an image that is recorded
MOST_BYTES = 1 << 62
DEPTH = 64  # of nested folders that are open at the same time
PASSES = 1000  # over a folder that is emptied, MOST_FILES of its files at a time
SECONDS = 120.0  # for all parts of a switch
DELETE_SECONDS = 300.0  # that Docker has for an image
ACTIVE = ("running", "paused", "restarting")
_PLACE = re.compile(r"/[^\s:\x00-\x1f\x7f\ud800-\udfff]{1,4095}")
_LIST = re.compile(r"[0-9a-f]{40}(\.config)?\.json|fetching\.json")
_COMPILED = re.compile(r"[0-9a-f]{12}")
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class LeftError(Exception):
    """A part stays; the message is the reason."""


class LateError(LeftError):
    """The time ran out before a part was removed."""


class Deadline:
    """Until when work may continue. `check` raises LateError from then on."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._end = time.monotonic() + seconds

    def check(self) -> None:
        if time.monotonic() >= self._end:
            raise LateError("not finished in time; the next switch continues")


@dataclasses.dataclass(frozen=True, order=True)
class Part:
    """Something that a release needs. `kind`: IMAGE, MODEL or COMPILED; `name`: the image's, ORG/NAME@COMMIT, or the
    name of a compile cache; `place`: the folder that a model or a compile cache is stored in."""

    kind: str
    name: str
    place: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


def parts(lock: Mapping[str, Any]) -> list[Part]:
    """What a release with this lock (see `check_lock`) needs, each once. The model of a server that downloads by itself
    is not ours to know."""
    found: list[Part] = []
    for item in lock["engines"]:
        image, draft = item["image"], item.get("draft") or {"repo": "", "revision": ""}
        found += [Part(IMAGE, image)] if image else []
        digest = image.partition("@")[2]
        if DIGEST.fullmatch(digest):
            found.append(Part(COMPILED, digest[7:19], _place(lock, "compile_cache_dir", COMPILE_CACHE_DIR)))
        for model in (item, draft):
            repo, commit = model["repo"], model["revision"]
            if valid_repo(repo) and COMMIT.fullmatch(commit):
                found.append(Part(MODEL, f"{repo}@{commit}", _place(lock, "cache_dir", CACHE_DIR)))
    return [*dict.fromkeys(found)]


def _place(lock: Mapping[str, Any], key: str, default: str) -> str:
    value = lock.get(key)
    return value if isinstance(value, str) and _PLACE.fullmatch(value) else default


# -- notes -----------------------------------------------------------------------------------------------------------


def unneeded(store: Store) -> list[Part]:
    """The parts that are recorded, those left out that cannot be understood; [] where the entire note cannot be."""
    try:
        return _noted(store)
    except (OSError, BoundsError):
        return []


def _noted(store: Store) -> list[Part]:
    """The same. Raises BoundsError, OSError."""
    noted: list[Part] = []
    data = bounded.read_json(store.state_dir / UNNEEDED)
    for entry in bounded.as_list(data.get("parts"), UNNEEDED, MOST_PARTS):
        with contextlib.suppress(BoundsError):
            noted.append(_part(entry))
    return noted


def _part(entry: Any) -> Part:
    made = bounded.as_dict(entry, UNNEEDED)
    part = Part(*(bounded.as_str(made.get(key), f"{UNNEEDED}: {key}", 4096) for key in ("kind", "name", "place")))
    repo, _, commit = part.name.partition("@")
    good = {
        IMAGE: valid_image(part.name) and not part.place,
        MODEL: bool(valid_repo(repo) and COMMIT.fullmatch(commit) and _PLACE.fullmatch(part.place)),
        COMPILED: bool(_COMPILED.fullmatch(part.name) and _PLACE.fullmatch(part.place)),
    }
    if not good.get(part.kind):
        raise BoundsError(f"{UNNEEDED}: {printable(str(part), 200)!r} is not a part of a release")
    return part


def note(store: Store, numbers: Iterable[int], tried: bool = False) -> None:
    """Record what releases need that are about to be pruned. `tried`: they are trials, which fetch configurations; a
    model that is complete was fetched for something else. Raises OSError."""
    new = {
        part
        for number in numbers
        for part in _parts_of(store, number)
        if not (tried and part.kind == MODEL and _is_complete(part))
    }
    try:
        noted = _noted(store)
    except FileNotFoundError:
        noted = []
    except BoundsError:
        bounded.set_aside(store.state_dir / UNNEEDED)
        noted = []
    if new - set(noted):
        _write(store, [*noted, *sorted(new - set(noted))])


def _parts_of(store: Store, number: int) -> list[Part]:
    """What may be removed with a release; an image whose name no pull can have is not ours."""
    with contextlib.suppress(ReleaseError):
        return [part for part in parts(store.lock(number)) if part.kind != IMAGE or valid_image(part.name)]
    return []


def _is_complete(part: Part) -> bool:
    repo, _, commit = part.name.partition("@")
    return manifest_path(part.place, repo, commit).exists()


def _write(store: Store, noted: Sequence[Part]) -> None:
    write_json(store.state_dir / UNNEEDED, {"parts": [dataclasses.asdict(part) for part in noted[-MOST_PARTS:]]})


def places(store: Store) -> list[str]:
    """Folders in which parts may be removed."""
    found = [*unneeded(store), *(part for number in store.numbers() for part in _parts_of(store, number))]
    return sorted({part.place for part in found if part.place})


def image_names(image: Mapping[str, Any]) -> set[str]:
    """The names of an image, tags and digests, as Docker lists or inspects it. Raises BoundsError."""
    names: list[str] = []
    for key in ("RepoTags", "RepoDigests"):
        listed = [] if image.get(key) is None else bounded.as_list(image[key], key, MOST_NAMES)
        names += [bounded.as_str(name, key, 4096) for name in listed]
    return {name for name in names if not name.startswith("<none>")}


def images_before(docker: Docker) -> dict[str, set[str]]:
    """The images on the host, id to names. Raises DockerError, BoundsError."""
    return {item["Id"]: image_names(item) for item in docker.images()}


def note_image(state_dir: str | Path, image: Mapping[str, Any], before: Mapping[str, set[str]]) -> None:
    """Record that a pull brought an image, or gave a name to one that an earlier pull had brought. One that was there
    without Sparkfleet is someone's own. `before`: `images_before` the pull. A name that no pull can have is not
    recorded, so that it counts as someone's. Raises OSError, BoundsError."""
    names = {name for name in image_names(image) if valid_image(name)}
    if len(names) > OURS:
        raise BoundsError(f"an image with more than {OURS} names")
    digests = {name.partition("@")[2] for name in names if "@" in name}
    same = [
        known
        for identity, known in before.items()
        if identity == image.get("Id") or digests & {name.partition("@")[2] for name in known}
    ]
    known = set().union(*same) if same else None
    for path in _records(state_dir, names):
        noted = _noted_names(path)
        ours = noted | (names - (known or set()))
        if (known is None or noted) and ours != noted and len(ours) <= MOST_NAMES:
            write_json(path, {"names": sorted(ours)})


def _records(state_dir: str | Path, names: Iterable[str]) -> list[Path]:
    digests = {name.partition("@")[2] for name in names}
    return [Path(state_dir, IMAGES, f"{digest[7:]}.json") for digest in sorted(digests) if DIGEST.fullmatch(digest)]


def _noted_names(path: Path) -> set[str]:
    try:
        names = bounded.as_list(bounded.read_json(path).get("names"), str(path), MOST_NAMES)
    except (OSError, BoundsError):
        return set()
    return {name for name in names if isinstance(name, str) and valid_image(name)}


# -- the removal -----------------------------------------------------------------------------------------------------


class Reclaim:
    """Removes parts that are not needed. `kept`: the locks of the releases that are kept; `dry`: only finds out what
    would go; `seconds`: for a run. `reclaimed` are {"kind", "name", "bytes"}, `left` sentences that name what stays and
    why."""

    def __init__(
        self,
        docker: Docker,
        kept: Sequence[Mapping[str, Any]],
        state_dir: str | Path,
        dry: bool = False,
        jobs: str = job.FOLDER,
        seconds: float = SECONDS,
    ) -> None:
        self.docker, self.state_dir, self.dry, self.jobs = docker, Path(state_dir), dry, jobs
        self.seconds, self._deadline = seconds, Deadline(seconds)
        self.reclaimed: list[dict[str, Any]] = []
        self.left: list[str] = []
        self._needed = {(part.kind, part.name) for lock in kept for part in parts(lock)}
        # A release without a commit may use any of its model.
        engines = [item for lock in kept for item in lock["engines"]]
        self._repos = {item["repo"] for item in engines if not COMMIT.fullmatch(item["revision"])}

    def run(self, noted: Iterable[Part]) -> list[Part]:
        """Remove what may be removed; returns the parts to be tried again, last the one that took too long: the others
        come first then."""
        again: list[Part] = []
        late: list[Part] = []
        self._deadline = Deadline(self.seconds)
        work = {IMAGE: self._image, MODEL: self._model, COMPILED: self._compiled}
        for part in noted:
            if (part.kind, part.name) in self._needed:
                continue  # recorded again when the release that needs it is pruned
            started = False
            try:
                self._deadline.check()
                started = True
                size = work[part.kind](part)
            except Exception as error:  # a switch that was verified must not fail for this
                expected = isinstance(error, LeftError | OSError | DockerError | BoundsError)
                reason = str(error) if expected else f"{type(error).__name__}: {error}"
                self.left.append(f"{printable(str(part), 600)}: {printable(reason, 300)}")
                (late if started and isinstance(error, LateError) else again).append(part)
                continue
            if size is not None:
                self.reclaimed.append({"kind": part.kind, "name": part.name, "bytes": size})
        return again + late

    @contextlib.contextmanager
    def _idle(self, kind: str) -> Iterator[None]:
        """Keep fetches of a kind from starting. Raises LeftError while one runs."""
        if self.dry:
            yield
            return
        with job.hold(Path(self.jobs, f"{kind}.json")) as holder:
            if holder is not None:
                raise LeftError(f"{holder['what']} is being fetched")
            yield

    @contextlib.contextmanager
    def _unchecked(self) -> Iterator[None]:
        """Keep a check of the models from starting. Raises LeftError while one runs."""
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
                raise LeftError(f"someone named it {printable(others[0], 200)}")
            for item in self.docker.containers():
                if identity == item.get("ImageID") or any(name == item.get("Image") for name in names):
                    raise LeftError(f"the container {engine.name_of(item)} uses it")
            if not self.dry:
                self._remove_image(identity, names)
                for path in records:
                    path.unlink()
            size = found.get("Size")
            return size if isinstance(size, int) and 0 <= size <= MOST_BYTES else 0

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
            with contextlib.ExitStack() as opened:
                try:
                    files = opened.enter_context(ModelFiles(part.place, repo, commit, self._deadline))
                except FileNotFoundError:
                    return None
                return files.remove(self.dry)

    def _check_unused(self, repo: str, cache_dir: str) -> None:
        """Raises LeftError where others may read the cache: any model may be the one that they serve."""
        for item in self.docker.containers():
            ours = engine.labels(item).get(engine.PROJECT_LABEL) == engine.PROJECT
            if not ours and item.get("State") in ACTIVE and _mounts(item, cache_dir):
                raise LeftError(f"the container {engine.name_of(item)} has {cache_dir} mounted")
        with contextlib.suppress(OSError, BoundsError):
            given = bounded.as_list(bounded.read_json(SHARED).get("models") or [], SHARED)
            if any(isinstance(model, dict) and model.get("repo") == repo for model in given):
                raise LeftError("other Sparks take it from here")

    # -- compile caches --------------------------------------------------------------------------------------

    def _compiled(self, part: Part) -> int | None:
        folder = f"{part.place}/{part.name}"
        for item in self.docker.containers():
            if _mounts(item, folder):
                raise LeftError(f"the container {engine.name_of(item)} has it mounted")
        try:
            top = os.open(part.place, _DIRECTORY)
        except FileNotFoundError:
            return None
        aside = f".{part.name}.unneeded"
        try:
            there = [name for name in (aside, part.name) if _is_folder(name, top)]
            size = 0
            for name in there:
                if self.dry:
                    size += _tree_bytes(name, top, self._deadline)
                    continue
                if name == part.name:  # interrupted halfway, it must not be taken for a compile cache
                    try:
                        os.rename(name, aside, src_dir_fd=top, dst_dir_fd=top)
                    except NotADirectoryError:
                        os.unlink(aside, dir_fd=top)
                        os.rename(name, aside, src_dir_fd=top, dst_dir_fd=top)
                size += _remove_tree(aside, top, self._deadline)
            return size if there else None
        finally:
            os.close(top)


def after_switch(store: Store, docker: Docker) -> tuple[list[dict[str, Any]], list[str]]:
    """Remove what the releases that are kept do not need: `Reclaim.reclaimed` and `Reclaim.left`."""
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
        try:
            _write(store, again)
        except OSError as error:  # what is gone is searched for once more, and not found
            work.left.append(f"{UNNEEDED} cannot be written: {error.strerror}")
    return work.reclaimed, work.left


def foresee(
    store: Store, docker: Docker, keep: int, to: int, lock: Mapping[str, Any]
) -> tuple[list[int], list[dict[str, Any]], list[str]]:
    """What a switch to release `to` would do: the releases that it would prune, `Reclaim.reclaimed`, `Reclaim.left`.
    `lock`: that of the release, which need not be staged yet; {} where it is not known."""
    surplus = store.surplus(keep, to)
    try:
        kept = [store.lock(number) for number in store.numbers() if number not in (to, *surplus)]
        kept += [store.lock(to)] if to in store.numbers() else [check_lock(dict(lock))] if lock else []
    except (ReleaseError, BoundsError) as error:
        return surplus, [], [f"what releases need is not known: {printable(str(error), 300)}"]
    noted = dict.fromkeys([*unneeded(store), *(part for number in surplus for part in _parts_of(store, number))])
    work = Reclaim(docker, kept, store.state_dir, dry=True)
    work.run(noted)
    return surplus, work.reclaimed, work.left


def _mounts(item: Mapping[str, Any], folder: str) -> bool:
    """Whether a container sees files of a folder. One that sees the entire host (a monitor) does not count. Raises
    BoundsError where Docker does not report what it sees."""
    wanted, what = Path(os.path.realpath(folder)), f"the mounts of the container {engine.name_of(item)}"
    for mount in bounded.as_list([] if item.get("Mounts") is None else item["Mounts"], what):
        path = bounded.as_str(bounded.as_dict(mount, what).get("Source") or "/", what)
        try:
            source = Path(os.path.realpath(path))
        except ValueError:
            raise BoundsError(f"{what}: {printable(path, 80)!r} cannot be a path") from None
        if source != Path("/") and (source.is_relative_to(wanted) or wanted.is_relative_to(source)):
            return True
    return False


# -- files -----------------------------------------------------------------------------------------------------------


class ModelFiles:
    """The files of one commit of a model in a cache. Raises FileNotFoundError where the cache does not have it."""

    def __init__(self, cache_dir: str, repo: str, commit: str, deadline: Deadline | None = None) -> None:
        self._deadline = deadline or Deadline()
        self.cache_dir, self.commit, self._name = cache_dir, commit, repo_folder(repo)
        # Of a download, and of one without weights for a trial; the first that is there counts.
        self._own = (f"{commit}.json", f"{commit}.config.json")
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
        that Sparkfleet downloaded them, and it stays where any of them cannot be removed. Bytes; None where Sparkfleet
        did not. Raises LeftError, BoundsError, OSError."""
        listing: dict[str, Any] | None = None
        for name in reversed(self._own):
            with contextlib.suppress(FileNotFoundError):
                listing = self._listing(name)
        if listing is None or not was_downloaded(listing):
            return None
        self._check_locks()
        doomed = _hashes(listing) - self._used_elsewhere()
        blobs = self._child("blobs")
        snapshots = self._child("snapshots")
        sizes = {name: size for name in doomed if blobs is not None and (size := _file_bytes(name, blobs)) is not None}
        total = sum(sizes.values())
        there = snapshots is not None and _is_folder(self.commit, snapshots)
        if dry:
            return total + (_tree_bytes(self.commit, snapshots, self._deadline) if there else 0)
        errors: list[Exception] = []
        with _noted_in(errors):
            self._remove_refs(errors)
        if snapshots is not None and there:
            with _noted_in(errors):
                total += _remove_tree(self.commit, snapshots, self._deadline)
        for name in sizes:
            self._deadline.check()
            with _noted_in(errors):
                os.unlink(name, dir_fd=blobs)
        with _noted_in(errors):
            _remove(f"{self.commit}.suspect.json", self._lists, self._deadline)
        if errors:
            raise errors[0]
        for name in reversed(self._own):
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
        data = _read(name, self._lists, MANIFEST_BYTES)
        return check_listing(bounded.parse_json(data, name, MANIFEST_BYTES, quote=False), name)

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
                    raise LeftError("someone is downloading it") from None
                finally:
                    os.close(handle)

    def _used_elsewhere(self) -> set[str]:
        """Blobs that another list or another snapshot has."""
        used: set[str] = set()
        for name in _names(self._lists):
            if name not in self._own and _LIST.fullmatch(name):
                self._deadline.check()
                used |= _hashes(self._listing(name))
        snapshots = self._child("snapshots")
        for name in _names(snapshots) if snapshots is not None else ():
            if name != self.commit and _is_folder(name, snapshots):
                used |= {Path(target).name for target in _links(name, snapshots, self._deadline)}
        return used

    def _remove_refs(self, errors: list[Exception]) -> None:
        if not _is_folder("refs", self._model):
            return
        for folder, names in _walk("refs", self._model, self._deadline):
            for name in names:
                with _noted_in(errors):
                    if _file_bytes(name, folder) is None:
                        continue  # a link or similar: not a ref
                    if _read(name, folder, 100)[:100].strip() == self.commit.encode():
                        os.unlink(name, dir_fd=folder)


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


def _read(name: str, at: int, limit: int) -> bytes:
    """The first bytes of a regular file, one more than `limit` at most. Raises BoundsError, OSError."""
    handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=at)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise BoundsError(f"{printable(name, 200)}: not a regular file")
        with os.fdopen(handle, "rb", closefd=False) as file:
            return file.read(limit + 1)
    finally:
        os.close(handle)


def _content(folder: int) -> tuple[list[str], list[str], bool]:
    """Names of the folders in an open one, and of all else (links, to folders as well); at most MOST_FILES of them, and
    whether there may be more."""
    folders: list[str] = []
    others: list[str] = []
    with os.scandir(folder) as entries:
        for entry in itertools.islice(entries, MOST_FILES):
            (folders if entry.is_dir(follow_symlinks=False) else others).append(entry.name)
    return folders, others, len(folders) + len(others) == MOST_FILES


def _walk(name: str, at: int, deadline: Deadline, strict: bool = True) -> Iterator[tuple[int, list[str]]]:
    """Each folder of a tree, opened, with the names of its other entries. No link is followed. Raises LeftError
    for a tree that is too large or too deep (not `strict` passes over the rest of it), OSError."""
    path: list[tuple[int, list[str]]] = []  # from the topmost on, with the folders that are still to come
    inner, parent = name, at
    try:
        while True:
            deadline.check()
            folder = os.open(inner, _DIRECTORY, dir_fd=parent)
            path.append((folder, []))
            folders, others, more = _content(folder)
            if strict and (more or (folders and len(path) == DEPTH)):
                raise LeftError(f"{printable(name, 80)} is too large or too deep to be searched")
            path[-1][1].extend(folders if len(path) < DEPTH else ())
            yield folder, others
            while path and not path[-1][1]:
                os.close(path.pop()[0])
            if not path:
                return
            parent, inner = path[-1][0], path[-1][1].pop()
    finally:
        for folder, _ in path:
            os.close(folder)


def _tree_bytes(name: str, at: int | None, deadline: Deadline) -> int:
    """Bytes of a tree's files; of one that is too deep those of its upper part."""
    assert at is not None
    return sum(
        _file_bytes(file, folder) or 0 for folder, files in _walk(name, at, deadline, strict=False) for file in files
    )


def _links(name: str, at: int | None, deadline: Deadline) -> Iterator[str]:
    assert at is not None
    for folder, names in _walk(name, at, deadline):
        for item in names:
            with contextlib.suppress(OSError):  # not a link
                yield os.readlink(item, dir_fd=folder)


@contextlib.contextmanager
def _noted_in(errors: list[Exception]) -> Iterator[None]:
    """What cannot be removed is recorded, and the rest is still removed. What is gone already is not an error. Raises
    LateError."""
    try:
        yield
    except LateError:
        raise
    except FileNotFoundError:
        pass
    except (OSError, BoundsError, LeftError) as error:
        errors.append(error)


@dataclasses.dataclass
class _Emptied:
    """A folder that is being emptied: its name in the one before, and its folders that are still to come."""

    name: str
    folder: int
    below: list[str] = dataclasses.field(default_factory=list)
    more: bool = True
    passes: int = 0


def _remove(name: str, at: int, deadline: Deadline) -> None:
    """Remove whatever has a name. Raises LateError, OSError."""
    if _is_folder(name, at):
        _remove_tree(name, at, deadline)
    else:
        os.unlink(name, dir_fd=at)


def _remove_tree(name: str, at: int, deadline: Deadline) -> int:
    """Remove a tree, relative to an open folder; no link is followed. Bytes of its files. All that can be removed is,
    and OSError raised in the end for the first that cannot. Raises LateError: someone may add to it all the time.

    Neither the stack nor the open folders grow with the depth: what is deeper than DEPTH is moved up to the topmost
    folder, and is removed from there."""
    errors: list[Exception] = []
    freed = 0
    path = [_Emptied(name, os.open(name, _DIRECTORY, dir_fd=at))]
    try:
        while path:
            deadline.check()
            last = path[-1]
            if last.below:
                inner = last.below.pop()
                with _noted_in(errors):
                    if len(path) < DEPTH:
                        path.append(_Emptied(inner, os.open(inner, _DIRECTORY, dir_fd=last.folder)))
                    else:
                        # One that an interrupted earlier removal left here has another name.
                        above = f".unneeded-{os.getpid()}-{time.monotonic_ns()}"
                        os.rename(inner, above, src_dir_fd=last.folder, dst_dir_fd=path[0].folder)
                        path[0].below.append(above)
            elif last.more and last.passes < PASSES and not (errors and last.passes):
                last.passes += 1
                others: list[str] = []
                last.more = False
                with _noted_in(errors):
                    last.below, others, last.more = _content(last.folder)
                for item in others:
                    deadline.check()
                    with _noted_in(errors):
                        size = _file_bytes(item, last.folder) or 0
                        os.unlink(item, dir_fd=last.folder)
                        freed += size
            else:
                os.close(path.pop().folder)
                with _noted_in(errors):
                    os.rmdir(last.name, dir_fd=path[-1].folder if path else at)
    finally:
        for left in path:
            os.close(left.folder)
    if errors:
        raise errors[0]
    return freed
