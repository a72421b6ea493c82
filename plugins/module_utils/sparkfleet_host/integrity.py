# SPDX-License-Identifier: Apache-2.0
"""Whether the files of the models on a host still have the content that the Hub named.

`sparkfleet_host.pyz integrity` hashes every completely fetched model of a cache, at a bounded share of the
disk's speed, and writes what it found to /var/lib/sparkfleet/integrity.json:

    {"version": 1, "cache_dir", "began", "updated", "finished": bool,          Unix times
     "left_out",                                                               models that no check covers
     "models": {"ORG/NAME@COMMIT": {"repo", "commit", "checked", "files", "bytes", "seconds", "damaged": [name],
                                    "missing": [name], "more", "error": ""}}}  more: names left out

Others may write to the cache. However many models and files it has, what is written can be read again: names, messages
and models are limited (MOST_…), and what was left out is counted. A file that is almost all holes is not read, and one
with many names in a model is read once.

A model with damaged files is marked suspect (see `cache.mark_suspect`), so that the next fetch replaces them; a mark
from before the check is removed when all files are sound.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import heapq
import itertools
import os
import stat
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import bounded, engine
from .bounded import BoundsError
from .cache import (
    FOLDER,
    clear_suspicion,
    finished,
    manifest_path,
    mark_suspect,
    read_manifest,
    repo_folder,
    suspect_path,
    valid_repo,
)
from .docker import Docker, DockerError
from .releases import STATE_DIR, write_json

RESULT = f"{STATE_DIR}/integrity.json"
VERSION = 1
#: A file that makes systemd start a check (sparkfleet-integrity.path of the role guard).
REQUEST = "/run/sparkfleet/check-models"
#: Answers of this kind come from damaged weights too (entries of the table of failures).
NONSENSE = ("answer-wrong", "answer-degenerate")
CHUNK = 4 << 20
#: A file that is larger than HOLES times what it occupies on the disk, and SPARE bytes, is damaged: it is made of
#: holes, which cost an attacker nothing, and the check days. Weights do not compress that far.
HOLES, SPARE = 4, 64 << 20
#: Of the time that passes; the rest is left to others.
SHARE = 0.25
#: Maximum number of models to check, in order of name; a cache has a handful.
MOST_MODELS = 256
#: In the result, of a model: names of damaged files and names of missing ones, the bytes of either, characters of the
#: error. With MOST_MODELS of them it stays within bounded.STATE_FILE.
MOST_NAMES, NAMES_BYTES, ERROR = 20, 4096, 400
#: Seconds between two results during a check: each is written completely.
WRITE_SECONDS = 30.0
LIST = "the manifest is damaged"
SOUND, DAMAGED, USAGE, BUSY = 0, 1, 2, 3


def verify_model(
    cache_dir: str | Path,
    repo: str,
    commit: str,
    share: float = SHARE,
    rate: float = 0.0,
    sleep: Callable[[float], Any] = time.sleep,
    tick: Callable[[int], Any] = lambda size: None,
) -> dict[str, Any]:
    """Hash every file of a model's manifest.

    `share`: of the time, that reading may take (0 < share <= 1); `rate`: bytes a second at most, 0 for no limit;
    `tick` is called with the number of bytes that were read. What was read leaves the page cache again, unless the
    file is in use: on a Spark the page cache is the GPU's memory.
    Returns {"repo", "commit", "checked" (Unix time), "files", "bytes", "seconds", "damaged", "missing", "error"};
    `error` is not "" where the manifest itself is missing, damaged, or was replaced meanwhile (a fetch ended).
    """
    began = time.monotonic()
    found: dict[str, Any] = {
        "repo": repo,
        "commit": commit,
        "checked": int(time.time()),
        "files": 0,
        "bytes": 0,
        "seconds": 0.0,
        "damaged": [],
        "missing": [],
        "error": "",
    }
    place = manifest_path(cache_dir, repo, commit)
    try:
        before = _identity(place)
        manifest = read_manifest(place)
    except FileNotFoundError:
        found["error"] = f"{place}: the manifest is missing"
        return found
    except (OSError, BoundsError) as error:
        found["error"] = f"{LIST}: {error}"
        return found
    folder = Path(cache_dir, repo_folder(repo))
    pace = _Pace(share, rate, sleep)
    known: dict[tuple[Any, ...], bool] = {}

    def count(size: int) -> None:
        found["bytes"] += size
        tick(size)
        pace.after(size)

    for name, entry in sorted(manifest["files"].items()):
        found["files"] += 1
        verdict = check_file(folder, folder / "snapshots" / commit / name, entry, count, known)
        if verdict:
            found[verdict].append(name)
    with contextlib.suppress(OSError):
        if _identity(place) == before:
            before = None
    if before is not None:
        found.update(damaged=[], missing=[], error=f"{place} was replaced while its files were read")
    found["seconds"] = round(time.monotonic() - began, 1)
    return found


def check_file(
    folder: Path,
    path: Path,
    entry: Mapping[str, Any],
    tick: Callable[[int], Any],
    known: dict[tuple[Any, ...], bool],
) -> str:
    """ "damaged", "missing" or "" for a file of a snapshot. `folder` is the model's; a link that leads out of it, like
    anything but a regular file, counts as damaged. An entry without a hash is checked for its size alone. `known`: what
    was hashed already, and whether it was sound."""
    try:
        real = path.resolve(strict=True)
        if not real.is_relative_to(folder.resolve()):
            return "damaged"
        handle = os.open(real, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return "missing"
    except (OSError, RuntimeError):  # RuntimeError: a loop of links, before Python 3.13
        return "damaged"
    with os.fdopen(handle, "rb", buffering=0) as file:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode) or about.st_size != entry["size"]:
            return "damaged"
        if about.st_size > HOLES * about.st_blocks * 512 + SPARE:
            return "damaged"
        key = (about.st_dev, about.st_ino, entry.get("sha256"), entry.get("sha1"), about.st_size)
        if key not in known:
            known[key] = _hash(file.fileno(), entry, tick)
        return "" if known[key] else "damaged"


def _hash(handle: int, entry: Mapping[str, Any], tick: Callable[[int], Any]) -> bool:
    size = int(entry["size"])
    if "sha256" in entry:
        sha, wanted = hashlib.sha256(), entry["sha256"]
    elif "sha1" in entry:  # as Git names a file
        sha, wanted = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False), entry["sha1"]
    else:
        return True
    at = 0
    while at < size:
        try:
            chunk = os.pread(handle, min(CHUNK, size - at), at)
        except OSError:
            return False  # the disk cannot read it
        if not chunk:
            return False
        sha.update(chunk)
        # Only clean, unmapped pages are dropped.
        os.posix_fadvise(handle, at, len(chunk), os.POSIX_FADV_DONTNEED)
        at += len(chunk)
        tick(len(chunk))
    return at == size and sha.hexdigest() == wanted


class _Pace:
    """Sleeps so that reading takes no more than its share of the time and of the bytes a second."""

    def __init__(self, share: float, rate: float, sleep: Callable[[float], Any]) -> None:
        if not 0 < share <= 1 or not 0 <= rate < float("inf"):
            raise ValueError(f"share {share} is not in (0, 1], or rate {rate} is negative")
        self._share, self._rate, self._sleep = share, rate, sleep
        self._since = time.monotonic()

    def after(self, size: int) -> None:
        took = time.monotonic() - self._since
        pause = max(took / self._share - took, size / self._rate - took if self._rate else 0.0)
        if pause > 0:
            self._sleep(min(pause, 60.0))
        self._since = time.monotonic()


def _mark(cache_dir: str | Path, repo: str, commit: str) -> tuple[int, int, int] | None:
    """The mark of a model; None for none."""
    with contextlib.suppress(OSError):
        return _identity(suspect_path(cache_dir, repo, commit))
    return None


def _identity(path: Path) -> tuple[int, int, int] | None:
    about = path.stat()
    return about.st_ino, about.st_mtime_ns, about.st_size


def request(failure: str = NONSENSE[0], path: str = REQUEST) -> bool:
    """Have the models checked now, in the background, if damaged weights would explain `failure`; whether that
    could be requested."""
    if failure not in NONSENSE or not Path(path).parent.is_dir():
        return False
    with contextlib.suppress(OSError):
        Path(path).touch(mode=0o600)
        return True
    return False


# -- all models ------------------------------------------------------------------------------------------------------


def verify_all(
    cache_dir: str | Path,
    result: Path,
    wanted: Sequence[tuple[str, str]] | None = None,
    share: float = SHARE,
    rate: float = 0.0,
    say: Callable[[str], Any] = print,
) -> dict[str, Any]:
    """Hash the models of a cache (`wanted`: some of them, as (repo, commit)), write `result` meanwhile and at the end,
    and mark those with damage. What `result` holds of models still there that were not hashed now is kept.
    Raises OSError where the result cannot be written."""
    present, left_out = _first(finished(cache_dir))
    chosen = present if wanted is None else list(wanted)[:MOST_MODELS]
    known = read_result(result).get("models", {})
    old = {key: entry for key, entry in known.items() if _is_there(cache_dir, key, entry)}
    keys = {f"{repo}@{commit}" for repo, commit in chosen}
    others = sorted(old.keys() - keys, key=lambda key: (not _names(old[key]), key))[: MOST_MODELS - len(keys)]
    report: dict[str, Any] = {
        "version": VERSION,
        "cache_dir": str(cache_dir),
        "began": int(time.time()),
        "updated": int(time.time()),
        "finished": False,
        "left_out": left_out,
        "models": {key: _brief(old[key]) for key in (*(old.keys() & keys), *others)},
    }
    written = time.monotonic()
    for repo, commit in chosen:
        mark = _mark(cache_dir, repo, commit)
        found = verify_model(cache_dir, repo, commit, share, rate)
        wrong = [*found["damaged"], *found["missing"]]
        if wrong:
            reason = f"{len(wrong)} of its files are damaged or missing, such as {wrong[0]}"
            mark_suspect(cache_dir, repo, commit, reason, wrong)
        elif mark and not found["error"] and _mark(cache_dir, repo, commit) == mark:
            with contextlib.suppress(OSError):  # the next fetch hashes it then
                clear_suspicion(cache_dir, repo, commit)
        report["models"][f"{repo}@{commit}"] = _brief(found)
        report["updated"] = int(time.time())
        if time.monotonic() - written >= WRITE_SECONDS:
            write_json(result, report)
            written = time.monotonic()
        state = found["error"] or (f"damaged or missing: {', '.join(wrong[:5])}" if wrong else "sound")
        say(f"{repo}@{commit[:12]}: {found['files']} files, {found['bytes'] / 1e9:.2f} GB: {state}")
    report["finished"] = True
    write_json(result, report)
    return report


def _first(models: Iterable[tuple[str, str]]) -> tuple[list[tuple[str, str]], int]:
    """The first MOST_MODELS by name, and how many more there are."""
    number = itertools.count()
    first = heapq.nsmallest(MOST_MODELS, (model for model, _ in zip(models, number, strict=False)))
    return first, next(number) - len(first)


def _is_there(cache_dir: str | Path, key: str, entry: Mapping[str, Any]) -> bool:
    """Whether the model of an entry of a result is still in the cache."""
    repo, commit = entry["repo"], entry["commit"]
    named = f"{repo}@{commit}" == key and valid_repo(repo) and bounded.COMMIT.fullmatch(commit)
    return bool(named) and os.path.lexists(manifest_path(cache_dir, repo, commit))


def _brief(found: Mapping[str, Any]) -> dict[str, Any]:
    """What is written of a model."""
    names = {kind: bounded.fitting(found[kind], MOST_NAMES, NAMES_BYTES) for kind in ("damaged", "missing")}
    more = found.get("more", 0) + sum(len(found[kind]) - len(names[kind]) for kind in names)
    kept = {key: found.get(key, 0) for key in ("repo", "commit", "checked", "files", "bytes", "seconds")}
    return {**kept, **names, "more": more, "error": bounded.printable(found["error"], ERROR)}


def read_result(path: str | Path = RESULT) -> dict[str, Any]:
    """What the last check wrote, of the form in this module's docstring; {} where there is nothing that can be read
    (a damaged file is set aside)."""
    place = Path(path)
    try:
        value = bounded.read_json(place)
        if bounded.as_int(value.get("version"), "version") != VERSION:
            raise BoundsError(f"{place}: of another version")
        models = bounded.as_dict(value.get("models"), f"{place}: models")
        for key, entry in models.items():
            found = bounded.as_dict(entry, f"{place}: {key}")
            for name in ("damaged", "missing"):
                for item in bounded.as_list(found.get(name), f"{place}: {name}"):
                    bounded.as_str(item, f"{place}: {name}")
            for name in ("repo", "commit", "error"):
                bounded.as_str(found.get(name), f"{place}: {name}")
            bounded.as_int(found.get("checked"), f"{place}: checked")
            for name in ("files", "bytes", "more"):
                bounded.as_int(found.get(name, 0), f"{place}: {name}")
            bounded.as_number(found.get("seconds", 0), f"{place}: seconds")
        bounded.as_int(value.get("left_out", 0), f"{place}: left_out")
    except OSError:
        return {}
    except BoundsError:
        bounded.set_aside(place)
        return {}
    return value


def damaged(result: Mapping[str, Any]) -> list[tuple[str, str, list[str], int]]:
    """(repo, commit, names, how many more) of each model with damaged or missing files in a result that was read."""
    found = []
    for entry in (result.get("models") or {}).values():
        names, more = _names(entry), entry.get("more", 0)
        if names or more:
            found.append((str(entry["repo"]), str(entry["commit"]), names, more))
    return found


def _names(entry: Mapping[str, Any]) -> list[str]:
    return [*entry["damaged"], *entry["missing"], *(["its manifest"] if entry["error"].startswith(LIST) else [])]


def _ports(item: Mapping[str, Any]) -> list[Any]:
    return [one.get("PublicPort") for one in item.get("Ports") or []]


def mark_served(docker: Docker, reason: str, service: str = "", port: int = 0) -> list[str]:
    """Mark the model that an engine of ours serves, once an answer made no sense: the next fetch hashes it. Of which
    engine: given by its `service`, or the `port` that it is published on; all that run where neither is given.
    "ORG/NAME@COMMIT" of each; [] where Docker does not report it."""
    marked = []
    with contextlib.suppress(DockerError, KeyError, TypeError, AttributeError):
        running = [item for item in engine.ours(docker) if item["State"] == "running"]
        named = [item for item in running if service and engine.service_of(item) == service]
        named += [item for item in running if port and port in _ports(item)]
        for item in named or ([] if service else running):
            container = docker.container(item["Id"]) or {}
            words = {str(word) for word in (container.get("Config") or {}).get("Cmd") or []}
            for mount in container.get("Mounts") or []:
                if not Path(str(mount["Source"]), FOLDER).is_dir():
                    continue
                # The command names the commit, or the path of its snapshot.
                served = (item for item in finished(str(mount["Source"])) if any(item[1] in word for word in words))
                for repo, commit in _first(served)[0]:
                    if mark_suspect(mount["Source"], repo, commit, reason):
                        marked.append(f"{repo}@{commit}")
    return marked


def main(argv: Sequence[str]) -> int:
    """`integrity [--cache-dir D] [--model ORG/NAME@COMMIT]… [--share F] [--rate BYTES] [--result FILE]`. The exit code:
    0 intact, 1 something is damaged or was not checked, 2 usage, 3 another check is running."""
    parser = argparse.ArgumentParser(prog="sparkfleet_host.pyz integrity")
    parser.add_argument("--cache-dir", default="/opt/hf")
    parser.add_argument("--model", action="append", default=None, metavar="ORG/NAME@COMMIT")
    parser.add_argument("--share", type=float, default=SHARE, help="share of time to spend reading")
    parser.add_argument("--rate", type=float, default=0.0, help="maximum bytes per second; 0: no limit")
    parser.add_argument("--result", default=RESULT)
    given = parser.parse_args(list(argv))
    wanted = None
    if given.model is not None:
        wanted = [(name.partition("@")[0], name.partition("@")[2]) for name in given.model]
        for (repo, commit), name in zip(wanted, given.model, strict=True):
            if not valid_repo(repo) or not bounded.COMMIT.fullmatch(commit):
                print(f"{bounded.printable(name, 80)!r} is not ORG/NAME@COMMIT", file=sys.stderr)
                return USAGE
        if len(wanted) > MOST_MODELS:
            print(f"{len(wanted)} models; at most {MOST_MODELS} are checked at once", file=sys.stderr)
            return USAGE
    if not Path(given.cache_dir).is_dir():
        print(
            f"{given.cache_dir}: not visible to the check; if it is a link into /root or similar, "
            "sparkfleet_cache_dir must name its target",
            file=sys.stderr,
        )
        return USAGE
    if not 0 < given.share <= 1 or not 0 <= given.rate < float("inf"):
        print("--share must be above 0 and at most 1, --rate at least 0", file=sys.stderr)
        return USAGE
    result = Path(given.result)
    try:
        result.parent.mkdir(parents=True, exist_ok=True)
        with result.with_name(f"{result.name}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("another check of this host's models is running", file=sys.stderr)
                return BUSY
            report = verify_all(given.cache_dir, result, wanted, given.share, given.rate)
    except OSError as error:
        print(f"{result}: {error}", file=sys.stderr)
        return USAGE
    if report["left_out"]:
        print(f"{report['left_out']} models were not checked: only the first {MOST_MODELS} are", file=sys.stderr)
    return DAMAGED if damaged(report) or report["left_out"] else SOUND
