"""Downloads a model into a Hugging Face cache, checks every file, and writes a manifest last.

Runs on a Spark inside a short-lived container, as the entry of the zipapp made by `hub_client`; needs only the
standard library, huggingface_hub and two files of the host package. Speaks JSON lines on stdout:
    {"progress": {"phase", "done", "total"}}   bytes; phases: resolving, downloading, checking
    {"result": {"commit", "path", "files", "bytes", "downloaded", "model_bytes"}}
    {"listing": {"commit", "files": {name: {"size", "sha256" | "sha1"}}}}   with --list, which downloads nothing
    {"listing", "licence"}                     with --lock, each file with its sha256
    {"about": {"listing", "gated", "licence", "texts": {name: content}, "left_out": {name: size}, "tensor_bytes"}}
                                               with --about, what a model card is made of
    {"error": {"id", "message"}}               with exit code 1; ids as in failures.py

With --without-weights, all but the weights is fetched, in megabytes; its list does not say that the model is complete,
and a download of all of it takes what is there.

With --expected, any source must offer exactly the commit and files of that list.

The client (2.x) throws a partial file away when it is interrupted, and takes as many bytes as it is sent. Files are
therefore fetched here, with the client's own `http_get`, locks, names and links, into `blobs/HASH.incomplete`, hashed
on the way and never longer than the Hub's list says. What the Hub says is checked before it touches a path, its answers
are limited in size, number and time, and the token goes to the Hub's own host over TLS alone.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import itertools
import json
import os
import queue
import re
import shutil
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

import httpx2
from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url, set_client_factory
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils._fixes import WeakFileLock
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import hf_raise_for_status, hf_request_event_hook, http_backoff
from huggingface_hub.utils._paths import filter_repo_objects

from sparkfleet_host import bounded
from sparkfleet_host.bounded import COMMIT, SHA256
from sparkfleet_host.cache import (
    CODE,
    FOLDER,
    MANIFEST_BYTES,
    MOST_FILES,
    check_listing,
    difference,
    is_weights,
    repo_folder,
)

# Other copies of the weights, which vLLM does not read when there are safetensors; many of them are pickles, which run
# code when they are loaded.
IGNORE = (
    *("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.tflite", "*.gguf"),
    *("original/*", "metal/*", "onnx/*", "openvino/*", "consolidated*"),
)
#: Of these, those that run code when they are loaded.
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
#: Small files that say what a model is, and the most bytes that are read of one.
TEXTS = ("config.json", "hf_quant_config.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json")
TEXT_BYTES = 4 << 20
HASHED_BYTES = 256 << 20  # of all files outside of LFS, which the Hub keeps small
INDEX = "model.safetensors.index.json"
CHUNK = 4 << 20
ANSWER = MANIFEST_BYTES  # of the Hub's API; a peer sends its complete list in one answer, 7 MB with MOST_FILES files
REFUSAL = 1 << 20  # bytes of an error or of a redirect; the client keeps up to 20 of these until it has its answer
VALUES = 400_000  # arrays, objects and commas in an answer; that list has 200,000
MOST_PAGES = 400  # of a list; the Hub's have 1,000 entries
SECONDS = 600.0  # for commit and list; a rate limit of the Hub is over after 300
MOST_BYTES = 1 << 43  # of a file
SLOWEST = 10_000  # bytes a second, over WINDOW, below which an answer with a file counts as broken, as in registry.py
WINDOW = 120.0
SLOW_ANSWERS = 3  # for one file, after which it is given up
LONGEST = 900.0  # seconds over which a file must come as fast, with all waits; silent peers are asked for 726

# The client writes 10 MB at a time; smaller steps lose less when interrupted and show progress on slow lines.
constants.DOWNLOAD_CHUNK_SIZE = 1 << 20


class FetchError(Exception):
    """A failure with an entry in the table of failures."""

    def __init__(self, id: str, message: str) -> None:
        super().__init__(message)
        self.id = id


@dataclass(frozen=True)
class RemoteFile:
    """A file of the repository as the Hub describes it; `hash` is the sha256 of LFS files, else git's sha1."""

    name: str
    size: int
    hash: str
    lfs: bool

    def hasher(self) -> Any:
        """What `hash` is the hexdigest of, once the content was given to it."""
        if self.lfs:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)


@dataclass
class Request:
    """What to fetch; `workers` files at the same time."""

    repo: str
    revision: str
    cache_dir: Path
    allow: list[str] = field(default_factory=list)
    ignore: list[str] | None = None  # None: IGNORE, where the repository has safetensors, and code
    remote_code: bool = False  # the engine may run the repository's code
    weights: bool = True  # False: all but the weights, for a trial
    pickle: bool = False  # weights may be pickles, where the repository has no safetensors
    workers: int = 4
    expected: dict[str, Any] | None = None  # {"commit", "files"} as the controller had it of the Hub
    seconds: float = SECONDS  # for commit and list

    @property
    def folder(self) -> Path:
        return self.cache_dir / repo_folder(self.repo)


def say(**value: Any) -> None:
    """One JSON line on stdout."""
    sys.stdout.write(json.dumps(value, separators=(",", ":")) + "\n")
    sys.stdout.flush()


class Limited(httpx2.SyncByteStream):
    """The body of an answer that is kept in memory: an error once it has more than `limit` bytes, or more than VALUES
    values of JSON, of which three bytes can become an object of 80. In one piece, whatever pieces it comes in."""

    def __init__(self, stream: httpx2.SyncByteStream, url: str, limit: int) -> None:
        self._stream, self._url, self._limit = stream, url, limit

    def __iter__(self) -> Iterator[bytes]:
        body, values = bytearray(), 0
        for part in self._stream:
            body += part
            values += sum(part.count(mark) for mark in b"[{,")
            if len(body) > self._limit:
                raise FetchError("hub-answer-odd", f"{self._url} answers with more than {self._limit} bytes")
            if values > VALUES:
                raise FetchError("hub-answer-odd", f"{self._url} answers with more than {VALUES} values")
        yield bytes(body)

    def close(self) -> None:
        self._stream.close()


class Pace:
    """How fast a file comes, over all the answers that it takes."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.bytes = self.slow_answers = 0
        self._since, self._before = time.monotonic(), 0

    def check(self) -> None:
        """Raises FetchError if too little came over LONGEST; asked by another thread than the one that reads."""
        spent = time.monotonic() - self._since
        if spent > LONGEST:
            came = self.bytes - self._before
            if came < SLOWEST * spent:
                raise self.too_slow(came, spent)
            self._since, self._before = time.monotonic(), self.bytes

    def too_slow(self, came: int, spent: float) -> FetchError:
        return FetchError(
            "hub-unreachable",
            f"{constants.ENDPOINT} sends {self.name} too slowly ({came} bytes in {spent:.0f} s); check it, and this "
            "host's network and proxy, then run again: it resumes",
        )


class Paced(httpx2.SyncByteStream):
    """The body of an answer to who asks for a file: an error where it is waited for longer than `window` and less than
    SLOWEST comes. The client then resumes from there; the last of SLOW_ANSWERS is a FetchError."""

    def __init__(self, stream: httpx2.SyncByteStream, pace: Pace, window: float | None = None) -> None:
        self._stream, self._pace, self._window = stream, pace, WINDOW if window is None else window

    def __iter__(self) -> Iterator[bytes]:
        parts, came, waited = iter(self._stream), 0, 0.0
        while True:
            began = time.monotonic()
            part = next(parts, None)
            waited += time.monotonic() - began  # not what the disk takes
            if part is None:
                return
            came += len(part)
            self._pace.bytes += len(part)
            yield part
            if waited > self._window:
                if came < SLOWEST * waited:
                    self._give_up(came, waited)
                came, waited = 0, 0.0

    def _give_up(self, came: int, waited: float) -> NoReturn:
        self._pace.slow_answers += 1
        if self._pace.slow_answers >= SLOW_ANSWERS:
            raise self._pace.too_slow(came, waited)
        raise httpx2.ReadTimeout(f"{came} bytes in {waited:.0f} s: too slow")

    def close(self) -> None:
        self._stream.close()


#: Set by who asks for a file, whose content goes to `Hashed` piece by piece, which knows its size.
_asks_for_file: ContextVar[Pace | None] = ContextVar("asks_for_file", default=None)


def keep_token_home(request: httpx2.Request) -> None:
    """Takes the token out of a request to another host than the Hub's (the next page of a list, a redirect)."""
    home = httpx2.URL(constants.ENDPOINT)
    if (request.url.scheme, request.url.host, request.url.port) != (home.scheme, home.host, home.port):
        request.headers.pop("Authorization", None)


def ask_plainly(request: httpx2.Request) -> None:
    """Asks for every answer as it is, uncompressed: its size is then what is read of it."""
    request.headers["Accept-Encoding"] = "identity"


def limit_answer(response: httpx2.Response) -> None:
    """Bounds what is read of an answer into memory: all but the content of a file that was asked for. Where a request
    was redirected to does not matter; a redirect and an error have no content of a file. Whatever answers who asks for
    a file comes in good time."""
    url = str(response.request.url)
    if response.headers.get("Content-Encoding", "").strip().lower() not in ("", "identity"):
        raise FetchError("hub-answer-odd", f"{url} sent a compressed answer, which was not requested")
    stream, pace = response.stream, _asks_for_file.get()
    if not isinstance(stream, httpx2.SyncByteStream):
        return
    if pace:
        stream = Paced(stream, pace)
    if not (pace and response.is_success):
        stream = Limited(stream, url, ANSWER if response.is_success else REFUSAL)
    response.stream = stream


def make_client() -> httpx2.Client:
    """The client that huggingface_hub uses for everything."""
    return httpx2.Client(
        event_hooks={"request": [hf_request_event_hook, keep_token_home, ask_plainly], "response": [limit_answer]},
        follow_redirects=True,
        timeout=None,
    )


def check_endpoint() -> None:
    """Refuses to send a token where anybody on the way can read it. Raises FetchError."""
    url = httpx2.URL(constants.ENDPOINT)
    near = url.host == "localhost" or re.fullmatch(r"127(\.\d{1,3}){3}|::1", url.host)
    if url.scheme != "https" and not near and Path(constants.HF_TOKEN_PATH).is_file():
        raise FetchError(
            "hub-token-in-clear",
            f"the Hub at {constants.ENDPOINT} has no TLS, so the token could be intercepted: use https:// "
            "in sparkfleet_hub_endpoint, or remove the token from the host",
        )


class Hashed:
    """A file for `http_get` to write to, hashed as it is written so that it need not be read again, and never longer
    than what the Hub's list says."""

    def __init__(self, file: BinaryIO, expected: RemoteFile) -> None:
        self._file, self._expected = file, expected
        self.sha = expected.hasher()
        self._hash_existing()

    def _hash_existing(self) -> None:
        end = self._file.seek(0, os.SEEK_END)
        self._file.seek(0)
        self.sha = self._expected.hasher()
        while self._file.tell() < end and (chunk := self._file.read(CHUNK)):
            self.sha.update(chunk)

    def write(self, data: bytes) -> int:
        if self._file.tell() + len(data) > self._expected.size:
            raise FetchError(
                "checksum",
                f"{self._expected.name} is longer than the {self._expected.size} bytes in the Hub's list",
            )
        self.sha.update(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def truncate(self) -> int:
        """Called by http_get when the server ignored the range: what is left is hashed from the start."""
        size = self._file.truncate()
        self._hash_existing()
        return size


class Fetch:
    """One download, from resolving the revision to the manifest."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.commit = ""
        self.files: list[RemoteFile] = []
        self.info: Any = None  # what the Hub says of the repository
        self.downloaded = 0
        self.model_bytes = 0  # of all of it, whatever is fetched
        self._known: dict[str, str] = {}  # blob -> hash computed while it was written
        self._checked = 0
        self._paces: dict[str, Pace] = {}  # blob -> that of the file that comes
        self._lock = threading.Lock()

    @property
    def total(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def snapshot(self) -> Path:
        return self.request.folder / "snapshots" / self.commit

    def run(self) -> dict[str, Any]:
        """Everything; the result for the last line. Raises FetchError and what `explain` understands."""
        say(progress={"phase": "resolving", "done": 0, "total": 0})
        self.in_time(self.resolve)
        if self.request.weights:
            self._write(self._listing(), "fetching")
        before = self._on_disk()
        self._check_space(before)
        with self._progress("downloading", self._on_disk):
            self.download(self.files)
        with self._progress("checking", lambda: self._checked):
            wrong = self.check(self.files)
        if wrong:
            with self._progress("downloading", self._on_disk):
                self.fetch_again(wrong)
        self.downloaded = max(0, self.total - before) + sum(file.size for file in wrong)
        self._write_ref()
        self._write_manifest()
        return {
            "commit": self.commit,
            "path": str(self.snapshot),
            "files": len(self.files),
            "bytes": self.total,
            "downloaded": self.downloaded,
            "model_bytes": self.model_bytes,
        }

    # -- what there is -------------------------------------------------------------------------------------

    def in_time(self, request: Callable[[], None]) -> None:
        """Does `resolve` or `look_up` within the time of the request. What lasts longer ends with the process (`run`).
        Raises FetchError, and what they raise."""
        try:
            bounded.in_time(request, self.request.seconds)
        except TimeoutError:
            raise FetchError(
                "hub-unreachable",
                f"{constants.ENDPOINT} did not list its files within {self.request.seconds:g} s",
            ) from None

    def resolve(self) -> None:
        """Commit and files; the first file is asked for, since a gated repository shows its list to anyone. Raises
        FetchError for what is not the list that was expected."""
        self.look_up()
        self.check_weights()
        if self.request.expected is not None:
            self._compare(self.request.expected)
        self.model_bytes = self.total
        if not self.request.weights:
            self.files = [file for file in self.files if not is_weights(file.name)]
            if not self.files:
                raise FetchError("hub-revision-unknown", f"{self.request.repo} at {self.commit} has weights alone")
        if any(not self._blob(file).exists() for file in self.files):
            get_hf_file_metadata(hf_hub_url(self.request.repo, self.files[0].name, revision=self.commit))

    def look_up(self) -> None:
        """Commit and files. Raises FetchError for an answer that a Hub does not give."""
        try:
            self._look_up()
        except HfHubHTTPError:  # has a ValueError among its causes
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            reason = bounded.printable(" ".join(f"{type(error).__name__}: {error}".split()), 200)
            raise FetchError("hub-answer-odd", f"{constants.ENDPOINT} does not answer like a Hub ({reason})") from error

    def check_weights(self) -> None:
        """Whether the weights are of a form that is only data, unless others were asked for. Raises FetchError."""
        names = [file.name for file in self.files]
        if self.request.pickle or self.request.ignore is not None or any(map(_is_safe, names)):
            return
        if pickles := list(filter_repo_objects(names, allow_patterns=list(PICKLES))):
            raise FetchError(
                "weights-pickle",
                f"{self.request.repo} has no safetensors, and {pickles[0]} is a pickle, which may run any code when it "
                "is loaded: use a model with safetensors, or a card with `pickle: true` below weights",
            )

    def _look_up(self) -> None:
        repo, revision = self.request.repo, self.request.revision
        if self.request.expected is not None:
            revision = self.request.expected["commit"]  # the branch may have moved on
        check_endpoint()
        info = HfApi().model_info(repo, revision=revision)
        if not info.sha or not COMMIT.fullmatch(info.sha):
            raise FetchError("hub-revision-unknown", f"the Hub named no commit for {repo} at {revision}")
        self.commit, self.info = info.sha, info
        found = []
        for place, entry in enumerate(itertools.chain.from_iterable(self._pages())):
            if place >= MOST_FILES:
                raise FetchError("hub-answer-odd", f"the Hub lists more than {MOST_FILES} files of {repo}")
            if entry["type"] == "file":
                found.append(_remote_file(repo, entry))
        wanted = set(self._chosen([file.name for file in found]))
        self.files = sorted({file for file in found if file.name in wanted}, key=lambda file: file.name)
        twice = [one.name for one, other in itertools.pairwise(self.files) if one.name == other.name]
        if twice:
            raise FetchError("hub-answer-odd", f"the Hub lists {twice[0]} of {repo} twice, with different content")
        if not self.files:
            raise FetchError("hub-revision-unknown", f"{repo} at {self.commit} has none of the requested files")

    def about(self) -> dict[str, Any]:
        """What a model card is made of: the list, the small files, licence and gating. Raises FetchError, and what
        `explain` understands."""
        self.look_up()
        named = {file.name: file for file in self.files}
        texts, left_out = {}, {}
        for name in filter(named.__contains__, TEXTS):
            if named[name].size > TEXT_BYTES:
                left_out[name] = named[name].size
            else:
                texts[name] = self._content(named[name]).decode("utf-8", "replace")
        tensors = 0
        if INDEX in named and named[INDEX].size <= ANSWER:
            tensors = self._tensor_bytes(self._content(named[INDEX]))
        gated, licence = _terms(self.info)
        return {
            "listing": self.listing(),
            "gated": gated,
            "licence": licence,
            "texts": texts,
            "left_out": left_out,
            "tensor_bytes": tensors,
        }

    def _content(self, file: RemoteFile) -> bytes:
        """A small file, which must be what the list says."""
        response = http_backoff(
            "GET", hf_hub_url(self.request.repo, file.name, revision=self.commit), headers=build_hf_headers()
        )
        hf_raise_for_status(response)
        content: bytes = response.content
        sha = file.hasher()
        sha.update(content)
        if len(content) != file.size or sha.hexdigest() != file.hash:
            raise FetchError(
                "checksum", f"{file.name} of {self.request.repo} arrived with a content other than the Hub names"
            )
        return content

    def _tensor_bytes(self, content: bytes) -> int:
        """`metadata.total_size` of the index, 0 where it does not say."""
        try:
            metadata = bounded.as_dict(bounded.parse_json(content, INDEX, ANSWER), INDEX).get("metadata")
            return bounded.as_int(bounded.as_dict(metadata, INDEX).get("total_size"), INDEX, 0, MOST_BYTES * 1000)
        except bounded.BoundsError:
            return 0

    def _pages(self) -> Iterator[list[Any]]:
        """The list of files as `HfApi.list_repo_tree` asks for it, which follows any number of pages."""
        url = f"{constants.ENDPOINT}/api/models/{self.request.repo}/tree/{self.commit}"
        query: dict[str, Any] | None = {"recursive": True, "expand": False}
        what, headers = f"the list of {self.request.repo}", build_hf_headers()
        for _ in range(MOST_PAGES):
            response = http_backoff("GET", url, params=query, headers=headers)
            hf_raise_for_status(response)
            yield bounded.as_list(bounded.parse_json(response.content, what, ANSWER), what)
            if not (url := response.links.get("next", {}).get("url", "")):
                return
            query = None  # it is in the URL
        raise FetchError(
            "hub-answer-odd", f"the Hub lists the files of {self.request.repo} on more than {MOST_PAGES} pages"
        )

    def _compare(self, expected: dict[str, Any]) -> None:
        wanted = set(self._chosen(list(expected["files"])))
        files = {name: entry for name, entry in expected["files"].items() if name in wanted}
        wrong = difference({**expected, "files": files}, self.listing())
        if wrong:
            failure, side = ("lock-mismatch", "lock") if expected.get("locked") else ("model-differs", "controller")
            raise FetchError(
                failure, f"{constants.ENDPOINT} offers a different {self.request.repo} than the {side} has: {wrong}"
            )

    def _chosen(self, names: list[str]) -> list[str]:
        """The names that are asked for."""
        ignore = self.request.ignore
        if ignore is None:
            ignore = list(IGNORE) if any(map(_is_safe, names)) else []
            ignore += [] if self.request.remote_code else [f"*{CODE}"]
        return list(
            filter_repo_objects(names, allow_patterns=self.request.allow or None, ignore_patterns=ignore or None)
        )

    def _blob(self, file: RemoteFile) -> Path:
        return self.request.folder / "blobs" / file.hash

    def _partials(self, file: RemoteFile) -> list[Path]:
        """Ours (HASH.incomplete) and those of an interrupted `hf download` (HASH.XXXXXXXX.incomplete)."""
        return sorted(self._blob(file).parent.glob(f"{file.hash}*.incomplete"))

    def _on_disk(self) -> int:
        done = 0
        for file in {file.hash: file for file in self.files}.values():
            sizes = [_size(path) for path in self._partials(file)]
            done += _size(self._blob(file)) or min(file.size, max(sizes, default=0))
        return min(done, self.total)

    def _check_space(self, present: int) -> None:
        cache = self.request.cache_dir
        needed, free = self.total - present, shutil.disk_usage(cache).free
        if needed > free:
            raise FetchError(
                "disk-full",
                f"{self.request.repo} needs {needed / 1e9:.1f} GB more in {cache}, which has"
                f" {free / 1e9:.1f} GB free; free some space there or set another cache directory",
            )

    # -- download ------------------------------------------------------------------------------------------

    def download(self, files: Sequence[RemoteFile]) -> None:
        """What is not there yet, the largest first, each with resume; then the links of the snapshot."""
        waiting = sorted((file for file in files if not self._blob(file).exists()), key=lambda file: -file.size)
        self._in_threads(self._fetch_blob, list({file.hash: file for file in waiting}.values()))
        for file in files:
            self._link(file)

    def _link(self, file: RemoteFile) -> None:
        """The link of a snapshot to its blob, as the client makes it; a file that is there is left to be checked."""
        place, blob = self.snapshot / file.name, self._blob(file)
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            place.unlink(missing_ok=True)
            place.symlink_to(os.path.relpath(blob, place.parent))

    def _fetch_blob(self, file: RemoteFile) -> None:
        blob = self._blob(file)
        lock = self.request.cache_dir / ".locks" / self.request.folder.name / f"{file.hash}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        blob.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if blob.exists():
                return
            partial = blob.with_name(f"{file.hash}.incomplete")
            # With the lock held no one else writes to these; the longest is worth most.
            *rest, longest = sorted(self._partials(file), key=_size) or [partial]
            for path in rest:
                path.unlink()
            if longest != partial:
                longest.rename(partial)
            if _size(partial) > file.size:
                partial.unlink()
            with partial.open("r+b" if partial.exists() else "w+b") as raw:
                sink = Hashed(raw, file)
                url = hf_hub_url(self.request.repo, file.name, revision=self.commit)
                headers = build_hf_headers()  # may ask the Hub's API something
                pace = self._paces[file.hash] = Pace(file.name)
                asks = _asks_for_file.set(pace)
                try:
                    http_get(
                        url, cast(BinaryIO, sink), resume_size=sink.tell(), headers=headers, expected_size=file.size
                    )
                finally:
                    _asks_for_file.reset(asks)
                    self._paces.pop(file.hash, None)
                raw.flush()
                os.fsync(raw.fileno())  # the manifest must not outlive a power cut that the data does not
            partial.chmod(0o644)
            partial.replace(blob)
        with self._lock:
            self._known[file.hash] = sink.sha.hexdigest()

    def _in_threads(self, work: Callable[[RemoteFile], Any], files: Sequence[RemoteFile]) -> list[Any]:
        """Runs `work` on each file; the first failure ends the waiting ones and is raised, as is a file that comes too
        slowly, whose thread ends with the process (`run`)."""
        done: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
        pool = ThreadPoolExecutor(self.request.workers)
        try:
            futures = [pool.submit(work, file) for file in files]
            for future in futures:
                future.add_done_callback(done.put)
            for _ in futures:
                self._next(done).result()
            return [future.result() for future in futures]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _next(self, done: queue.SimpleQueue[Future[Any]]) -> Future[Any]:
        """The next of the futures, while the transfer rate is checked. Raises FetchError."""
        while True:
            with contextlib.suppress(queue.Empty):
                return done.get(timeout=1)
            for pace in list(self._paces.values()):
                pace.check()

    # -- check ---------------------------------------------------------------------------------------------

    def check(self, files: Sequence[RemoteFile]) -> list[RemoteFile]:
        """The files that are absent, of the wrong size or of the wrong content."""
        self._checked = 0
        return [file for file, good in zip(files, self._in_threads(self._is_good, files), strict=True) if not good]

    def _is_good(self, file: RemoteFile) -> bool:
        path = self.snapshot / file.name
        if _size(path) != file.size:
            return False
        locked = self._locked(file)
        if not locked and path.resolve() == self._blob(file).resolve() and file.hash in self._known:
            self._tick(file.size)
            return self._known[file.hash] == file.hash
        hashers = {file.hash: file.hasher()}
        if locked:
            hashers[locked] = hashlib.sha256()
        with path.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                for sha in hashers.values():
                    sha.update(chunk)
                self._tick(len(chunk))
        return all(sha.hexdigest() == wanted for wanted, sha in hashers.items())

    def _locked(self, file: RemoteFile) -> str:
        """The sha256 that a lock adds for a file that the Hub names by Git's sha1 alone; "" for none."""
        entry = {} if file.lfs else (self.request.expected or {}).get("files", {}).get(file.name, {})
        return str(entry.get("sha256", ""))

    def _tick(self, size: int) -> None:
        with self._lock:
            self._checked += size

    def fetch_again(self, files: Sequence[RemoteFile]) -> None:
        """Deletes what is wrong and downloads it once more; still wrong raises `checksum`."""
        for file in files:
            for path in (self.snapshot / file.name, self._blob(file), *self._partials(file)):
                path.unlink(missing_ok=True)
            self._known.pop(file.hash, None)
        self.download(files)
        still = self.check(files)
        if still:
            for file in still:
                (self.snapshot / file.name).unlink(missing_ok=True)
                self._blob(file).unlink(missing_ok=True)
            locked = bool((self.request.expected or {}).get("locked"))
            raise FetchError(
                "lock-mismatch" if locked else "checksum",
                f"{still[0].name} of {self.request.repo} was downloaded twice with content that differs from the "
                f"{'lock' if locked else 'Hub'}'s; what serves it, a proxy or the disk corrupts it: check them (dmesg, "
                "HTTPS_PROXY), then run again",
            )

    # -- the end -------------------------------------------------------------------------------------------

    def _write_ref(self) -> None:
        if self.request.revision != self.commit:
            _write(self.request.folder / "refs" / self.request.revision, self.commit)

    def _listing(self) -> dict[str, Any]:
        return {
            "repo": self.request.repo,
            "revision": self.request.revision,
            **self.listing(),
            "total_bytes": self.total,
            "remote_code": self.request.remote_code or self.request.ignore is not None,
        }

    def to_lock(self) -> dict[str, Any]:
        """List and licence; files that the Hub names by Git's sha1 are read, and have the sha256 as well. Raises
        FetchError, and what `explain` understands."""
        self.look_up()
        self.check_weights()
        listing, left = self.listing(), HASHED_BYTES
        for file in self.files:
            if not file.lfs:
                left -= file.size
                if left < 0:
                    raise FetchError(
                        "hub-answer-odd", f"{self.request.repo} has more than {HASHED_BYTES >> 20} MiB outside of LFS"
                    )
                listing["files"][file.name]["sha256"] = hashlib.sha256(self._content(file)).hexdigest()
        return {"listing": listing, "licence": _terms(self.info)[1]}

    def listing(self) -> dict[str, Any]:
        """{"commit", "files"}, once they are known."""
        files = {f.name: {"size": f.size, "sha256" if f.lfs else "sha1": f.hash} for f in self.files}
        return {"commit": self.commit, "files": files}

    def _write_manifest(self) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        listing = {**self._listing(), "completed_at": now, "downloaded_bytes": self.downloaded}
        if not self.request.weights:
            self._write({**listing, "model_bytes": self.model_bytes}, f"{self.commit}.config")
            return
        place = self._write(listing, self.commit)
        place.with_name("fetching.json").unlink()
        place.with_name(f"{self.commit}.config.json").unlink(missing_ok=True)
        place.with_name(f"{self.commit}.suspect.json").unlink(missing_ok=True)  # every file was hashed just now

    def _write(self, listing: dict[str, Any], name: str) -> Path:
        """`fetching.json` is for others that take files as they come (share.py); the commit's name says complete."""
        path = self.request.cache_dir / FOLDER / self.request.folder.name / f"{name}.json"
        _write(path, json.dumps(listing, indent=1) + "\n")
        return path

    @contextlib.contextmanager
    def _progress(self, phase: str, done: Callable[[], int]) -> Iterator[None]:
        """Says how far the phase is, twice a second and at its end."""
        over = threading.Event()

        def report() -> None:
            while True:
                last = over.wait(0.5)
                say(progress={"phase": phase, "done": done(), "total": self.total})
                if last:
                    return

        say(progress={"phase": phase, "done": done(), "total": self.total})
        thread = threading.Thread(target=report, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def _terms(info: Any) -> tuple[bool | None, str]:
    """Whether the Hub asks to accept a licence (None where it does not say), and the licence's name or ""."""
    gated = getattr(info, "gated", None)
    card = getattr(info, "card_data", None)
    named = [card.get(key) for key in ("license_name", "license")] if card is not None else []
    tags = getattr(info, "tags", None)
    tagged = tags[:1000] if isinstance(tags, list) else []
    named += [tag.partition(":")[2] for tag in tagged if isinstance(tag, str) and tag.startswith("license:")]
    names = [name for name in named if isinstance(name, str) and name.strip()]
    licence = bounded.printable(names[0].strip(), 100) if names else ""
    return (gated not in (False, "") if gated is not None else None), licence


def _remote_file(repo: str, entry: dict[str, Any]) -> RemoteFile:
    """A file of the Hub's list. Raises FetchError for a name, size or hash that it cannot have, and what any other form
    raises."""
    name, lfs = entry["path"], entry.get("lfs")
    if not bounded.is_repository_path(name):
        shown = bounded.printable(repr(name), 120)
        raise FetchError("hub-answer-odd", f"the Hub lists a file {shown} of {repo}: that is not a valid file name")
    size, hash = (lfs["size"], lfs["oid"]) if lfs else (entry["size"], entry["oid"])
    good = isinstance(hash, str) and (SHA256 if lfs else COMMIT).fullmatch(hash)
    if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= MOST_BYTES or not good:
        raise FetchError("hub-answer-odd", f"the Hub lists {name} of {repo} with an invalid size or hash")
    return RemoteFile(name, size, hash, bool(lfs))


def _is_safe(name: str) -> bool:
    return name.endswith(".safetensors")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.chmod(0o644)
    temporary.replace(path)


# -- failures ----------------------------------------------------------------------------------------------


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def explain(error: BaseException, request: Request) -> FetchError:
    """The failure behind an exception of the client, with its remedy; `internal` for what is not known."""

    repo, page = request.repo, f"{constants.ENDPOINT}/{request.repo}"
    token = Path(constants.HF_TOKEN_PATH).is_file()
    for cause in _chain(error):
        if isinstance(cause, FetchError):
            return cause
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return FetchError(
                "disk-full",
                f"no space left in {request.cache_dir} while downloading {repo}; free some space and run again, it "
                "resumes",
            )
        if isinstance(cause, OSError) and cause.errno == errno.EROFS:
            return FetchError(
                "cache-read-only",
                f"{request.cache_dir} is read-only: see `findmnt -T {request.cache_dir}` and `dmesg`; mount it "
                "writable, then run again",
            )
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            if isinstance(cause, RevisionNotFoundError):
                return FetchError(
                    "hub-revision-unknown", f"{repo} has no revision {request.revision}; see {page}/commits/main"
                )
            if isinstance(cause, GatedRepoError):
                if token and status != 401:
                    return FetchError(
                        "hub-no-access",
                        f"the account of the token has no access to {repo}; open {page}, accept its licence,"
                        " then run again",
                    )
                return _no_token(repo, token)
            if isinstance(cause, RepositoryNotFoundError):
                private = "" if token else ", or is private and needs a token"
                return FetchError("hub-repo-unknown", f"{repo} does not exist on {constants.ENDPOINT}{private}")
            if status == 401:
                return _no_token(repo, token)
            if status == 403:
                return FetchError(
                    "hub-no-access", f"access to {repo} refused (403); open {page} with the token's account"
                )
            if status == 404:
                return FetchError("hub-repo-unknown", f"{cause.response.url} not found (404)")
            why = "rate limit reached" if status == 429 else "server error"
            return FetchError("hub-unreachable", f"{constants.ENDPOINT} answered {status} ({why}); run again later")
        if isinstance(cause, ssl.SSLError):
            return _unreachable(f"TLS: {cause.reason or cause}; for a private CA set sparkfleet_ca_file")
        if isinstance(cause, httpx2.TransportError) and not _has_ssl(cause):
            return _unreachable(f"{str(cause) or type(cause).__name__}; check DNS, network and proxy of this host")
    text = " ".join(str(error).split())[:300]
    return FetchError("internal", f"download of {repo} failed: {type(error).__name__}: {text}")


def _has_ssl(error: BaseException) -> bool:
    return any(isinstance(cause, ssl.SSLError) for cause in _chain(error))


def _no_token(repo: str, token: bool) -> FetchError:
    if token:
        return FetchError("hub-token-missing", f"the Hub does not accept the token (needed for {repo}); replace it")
    return FetchError("hub-token-missing", f"{repo} is gated and this host has no Hugging Face token; set one")


def _unreachable(why: str) -> FetchError:

    return FetchError("hub-unreachable", f"{constants.ENDPOINT} cannot be reached: {why}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: `hf_client.pyz --repo ORG/NAME --revision REV --cache-dir DIR [--allow P] [--ignore P]`."""
    parser = argparse.ArgumentParser(prog="hf_client", description="Download a model into a cache.")
    parser.add_argument("--repo", required=True)
    parser.add_argument("--revision", default="main")
    parser.add_argument("--cache-dir", type=Path, required=True)
    parser.add_argument("--allow", action="append", default=[], metavar="PATTERN")
    parser.add_argument("--ignore", action="append", default=None, metavar="PATTERN")
    parser.add_argument("--ignore-nothing", action="store_true")
    parser.add_argument("--remote-code", action="store_true", help="the repository's code too")
    parser.add_argument("--without-weights", dest="weights", action="store_false", help="all but the weights")
    parser.add_argument("--pickle", action="store_true", help="weights may be pickles")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for the commit and the list of files")
    parser.add_argument("--expected", type=Path, metavar="FILE", help="list that the offered files must match")
    parser.add_argument("--list", action="store_true", help="print what the Hub has, and download nothing")
    parser.add_argument("--lock", action="store_true", help="print what a lock has of the model")
    parser.add_argument("--about", action="store_true", help="print what a model card is made of, and download nothing")
    given = parser.parse_args(argv)
    request = Request(
        repo=given.repo,
        revision=given.revision,
        cache_dir=given.cache_dir,
        allow=given.allow,
        ignore=[] if given.ignore_nothing else given.ignore,
        remote_code=given.remote_code,
        weights=given.weights,
        pickle=given.pickle,
        workers=given.workers,
        seconds=given.seconds,
    )
    set_client_factory(make_client)
    try:
        if given.expected:
            request.expected = check_listing(bounded.read_json(given.expected, MANIFEST_BYTES), "expected")
        fetch = Fetch(request)
        if given.about:
            said: list[dict[str, Any]] = []
            fetch.in_time(lambda: said.append(fetch.about()))
            say(about=said[0])
        elif given.lock:
            fetch.in_time(lambda: say(**fetch.to_lock()))
        elif given.list:
            fetch.in_time(fetch.look_up)
            fetch.check_weights()
            say(listing=fetch.listing())
        else:
            say(result=fetch.run())
    except Exception as error:
        failure = explain(error, request)
        say(error={"id": failure.id, "message": str(failure)})
        return 1
    return 0


def run() -> NoReturn:
    """`main` as a program: ends at once, whatever other threads still wait for."""
    code = main()
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    run()
