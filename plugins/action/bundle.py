# SPDX-License-Identifier: Apache-2.0
"""Action: a bundle, from a Spark with internet to the controller, and from there to Sparks without."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ansible.errors import AnsibleActionFail, AnsibleError
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.sparkfleet.dgx.plugins.plugin_utils import package  # noqa: F401 - finds what follows
from sparkfleet_host import bounded
from sparkfleet_host.bounded import BoundsError

from sparkfleet import SparkfleetError
from sparkfleet.diagnosis.startup import AT_LEAST
from sparkfleet.packaging import signature, wheels
from sparkfleet.packaging.bundle import LAYOUT, NAME, Bundle, Collected, Entry, Item, total

display = Display()
#: Bytes to transfer before the host is asked to install the files.
BATCH = 256 << 20
#: What this process may write to other files while one comes from a Spark, bytes.
SLACK = 64 << 20


class TransferProgress:
    """Files on their way, with a line now and then; `total` in bytes."""

    def __init__(self, host: str, what: str, count: int, total: int) -> None:
        self.host, self.what, self.count, self.total = host, what, count, total
        self.files = self.done = 0

    def line(self, size: int, began: float) -> str:
        """How far it is, with the file that travels now."""
        text = f"{self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB, file {self.files + 1} of {self.count}"
        return f"{self.host}  {self.what} {text} ({size / 1e9:.2f} GB) for {time.monotonic() - began:.0f} s"

    def carry(self, work: Callable[[], Any], size: int) -> None:
        """Process one file, and report progress."""
        over, began = threading.Event(), time.monotonic()

        def report_progress() -> None:
            while not over.wait(AT_LEAST):
                display.display(self.line(size, began))

        thread = threading.Thread(target=report_progress, daemon=True)
        thread.start()
        try:
            work()
        finally:
            over.set()
            thread.join()
        self.files, self.done = self.files + 1, self.done + size

    def end(self, began: float) -> None:
        """The last line."""
        if self.count:
            size = f"{self.total / 1e9:.2f} GB in {self.count} files"
            display.display(f"{self.host}  {self.what} {size}, {time.monotonic() - began:.0f} s")


class ActionModule(ActionBase):  # type: ignore[misc]  # ansible has no types
    """See the module's docstring."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _VALID_ARGS = frozenset(("state", "bundle", "collected", "engine", "images", "models", "packages"))

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """What the state asks for; raises AnsibleActionFail with one sentence."""
        task_vars = task_vars or {}
        result: dict[str, Any] = super().run(tmp, task_vars)
        result["changed"] = False
        self._host = str(task_vars["inventory_hostname"])
        work = {
            "schedule": self._schedule,
            "fetch": self._fetch,
            "python": self._python,
            "push": self._push,
            "absent": self._absent,
        }
        if self._task.check_mode and self._task.args["state"] != "schedule":
            return result
        try:
            return {**result, **work[str(self._task.args["state"])](task_vars)}
        except SparkfleetError as error:
            raise AnsibleActionFail(f"{self._host}: {error}", result={"failure": "bundle"}) from None

    # -- making one ----------------------------------------------------------------------------------------

    def _schedule(self, task_vars: Mapping[str, Any]) -> dict[str, Any]:
        """Of Sparks that want the same on the same system, the first collects."""
        mine, first = None, dict[tuple[str, ...], str]()
        for name in task_vars["ansible_play_hosts_all"]:
            inspection = task_vars["hostvars"][name].get("sparkfleet_inspection") or {}
            if inspection.get("plan"):
                plan, system = inspection["plan"], inspection["state"]["os"]
                fetches = ((one["image"], one["repo"], one["revision"]) for one in plan["fetches"])
                wants = (*itertools.chain.from_iterable(fetches), system["codename"], system["machine"])
                first.setdefault(wants, name)
                mine = wants if name == self._host else mine
        have = Bundle.open(self._task.args["bundle"]).complete() if self._task.args.get("bundle") else []
        return {"collects": mine is not None and first[mine] == self._host, "have": have}

    def _fetch(self, task_vars: Mapping[str, Any]) -> dict[str, Any]:
        bundle, inspection = self._open(), task_vars["sparkfleet_inspection"]
        known = inspection["state"]["os"]
        system = {key: str(known[key]) for key in ("id", "codename", "machine")}
        bundle.check_system(system)
        collected = self._collected(inspection["plan"]["fetches"][int(self._task.args.get("engine", 0))])
        entries = {item.name: entry for item in collected.items if (entry := _is_here(bundle, item)) is not None}
        waiting = [item for item in collected.items if item.name not in entries]
        progress = TransferProgress(self._host, "to the controller:", len(waiting), sum(item.size for item in waiting))
        began = time.monotonic()
        for item in waiting:

            def come(item: Item = item) -> None:
                entries[item.name] = self._fetch_file(bundle, item)

            progress.carry(come, item.size)
        progress.end(began)
        before = [*bundle.images, *bundle.models, *bundle.packages]
        bundle.add(collected, system, entries)
        bundle.write()
        if collected.left_out:
            names = ", ".join(collected.left_out)
            display.display(f"{self._host}  package sources do not have {names}; left out of the bundle")
        changed = bool(waiting) or before != [*bundle.images, *bundle.models, *bundle.packages]
        return {"changed": changed, "folder": str(bundle.folder)}

    def _collected(self, asked: Mapping[str, Any]) -> Collected:
        """What the host says it has collected, checked against what it was asked for. Raises SparkfleetError."""
        given = self._task.args["collected"]
        model = f"{asked['repo']}@{asked['revision']}" if given.get("model") else ""
        try:
            return Collected.of(given, asked["image"], model)
        except BoundsError as error:
            raise SparkfleetError(
                f"refused this host's list of collected files: {error}; nothing was written. Sparkfleet never produces "
                "such a list: find out what runs on this host"
            ) from None

    def _fetch_file(self, bundle: Bundle, item: Item) -> Entry:
        """Take one file; it gets its name once size and hash are right. Raises SparkfleetError, AnsibleError."""
        name = f"{item.name}.incomplete"
        partial = bundle.folder / name
        try:
            bundle.folder.mkdir(parents=True, exist_ok=True)
            os.close(bounded.open_beneath(bundle.folder, name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, make=True))
            with _no_more_than(item.size + SLACK):
                self._connection.fetch_file(item.path, str(partial))
            entry, digest = bundle.entry_of(name, item.kind, limit=item.size)
            if (entry.size, digest) != (item.size, item.digest):
                raise BoundsError("its content differs")
        except (OSError, BoundsError, AnsibleError) as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            reason = bounded.printable(" ".join(str(error).split())[-200:])
            raise SparkfleetError(f"{item.path} was not transferred intact ({reason}): run again") from None
        partial.replace(bundle.folder / item.name)
        return entry

    def _python(self, task_vars: Mapping[str, Any]) -> dict[str, Any]:
        bundle = self._open()
        before = dict(bundle.files)
        names = wheels.download(bundle.folder / "python", filter(None, [bundle.system.get("machine")]), display.display)
        bundle.files = {name: entry for name, entry in bundle.files.items() if not name.startswith("python/")}
        try:
            bundle.files.update({f"python/{name}": bundle.entry_of(f"python/{name}")[0] for name in names})
        except (OSError, BoundsError) as error:
            raise SparkfleetError(f"{bundle.folder}: {error}") from None
        digest = bundle.write()
        display.display(f"{bundle.folder}: {len(bundle.files)} files, {total(bundle.files.values()) / 1e9:.2f} GB")
        display.display(
            f"digest of this bundle: sha256:{digest}\n"
            "  Send it separately from the folder, and set it where the folder is used: sparkfleet_bundle_digest"
        )
        key = str(self._templar.template(task_vars.get("sparkfleet_bundle_key") or ""))
        if key:
            made = signature.sign(bundle.folder / NAME, key, signature.BUNDLE)
            display.display(f"signed: {made}; sparkfleet_bundle_signers, where the folder is used, names who may sign")
        return {"changed": before != bundle.files, "digest": f"sha256:{digest}"}

    def _open(self) -> Bundle:
        folder = str(self._task.args.get("bundle") or "")
        if not folder:
            raise SparkfleetError("no destination: use sparkfleet bundle FOLDER, or -e sparkfleet_bundle_folder=FOLDER")
        return Bundle.open(folder)

    # -- using one -----------------------------------------------------------------------------------------

    def _push(self, task_vars: dict[str, Any]) -> dict[str, Any]:
        trust, arguments = Bundle.trust(task_vars, self._templar.template), self._task.args
        bundle = Bundle.read(arguments["bundle"], *trust)
        images = list(arguments.get("images") or [])
        models = [f"{model['repo']}@{model['revision']}" for model in arguments.get("models") or []]
        fetched = bundle.of_fetch(images, models)
        packages = sorted(bundle.of_packages()) if arguments.get("packages") else []
        # Lists are small: they go as text, which was checked here.
        texts = {name: bundle.text(name) for name in fetched if name.endswith("/fetching.json")}
        if images:
            texts.update({"image/index.json": bundle.index(images), "image/oci-layout": LAYOUT})
        names = [name for name in [*fetched, *packages] if name not in texts]
        missing = [name for name in names if not bundle.has(name, bundle.files[name].size)]
        if missing:
            raise SparkfleetError(f"the bundle {bundle.folder} lacks {missing[0]}, or it is cut: recreate it")
        want = {"texts": texts, "packages": bool(packages), "user": self._user(task_vars)}
        if self._connection.transport == "local":
            # Image and model are read where they lie: Docker and the Hub's client check each file by its digest. What
            # apt installs is copied and checked.
            folders = sorted({name.rpartition("/")[0] for name in names if not name.startswith("packages/")})
            links = {name: str(bundle.folder.resolve() / name) for name in folders}
            copies = {name: _entry(name, bundle.files[name]) for name in packages}
            self._receive(task_vars, **want, links=links, source=str(bundle.folder.resolve()), moves=copies)
            return {}
        sizes = {name: bundle.files[name].size for name in names}
        there = self._receive(
            task_vars, user=want["user"], needed=sum(sizes.values()), largest=max(sizes.values(), default=0)
        )
        waiting = [name for name in names if there["files"].get(name) != bundle.files[name].sha256]
        progress = TransferProgress(self._host, "bundle:", len(waiting), sum(sizes[name] for name in waiting))
        began, moves, size = time.monotonic(), {}, 0
        for place, name in enumerate(waiting):
            self._put(progress, bundle, name, f"{there['incoming']}/{place}")
            moves[str(place)] = _entry(name, bundle.files[name])
            size += sizes[name]
            if size >= BATCH:  # an interrupted transfer resumes here
                self._receive(task_vars, user=want["user"], moves=moves)
                moves, size = {}, 0
        self._receive(task_vars, **want, moves=moves)
        progress.end(began)
        return {}

    def _put(self, progress: TransferProgress, bundle: Bundle, name: str, incoming: str) -> None:
        size = bundle.files[name].size
        try:
            progress.carry(lambda: self._connection.put_file(str(bundle.folder / name), incoming), size)
        except AnsibleError as error:
            reason = " ".join(str(error).split())[-200:]
            raise SparkfleetError(
                f"{name} of the bundle was not transferred: {reason}. Run again: it resumes"
            ) from None

    def _user(self, task_vars: Mapping[str, Any]) -> str:
        return str(self._connection.get_option("remote_user") or "") if self._connection.transport == "ssh" else ""

    def _receive(self, task_vars: dict[str, Any], **arguments: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self._execute_module(
            module_name="sparkfleet.dgx.bundle_receive", module_args=arguments, task_vars=task_vars
        )
        if answer.get("failed"):
            failure = {"failure": str(answer.get("failure") or "bundle")}
            raise AnsibleActionFail(f"{self._host}: {answer.get('msg')}", result=failure)
        return answer

    def _absent(self, task_vars: dict[str, Any]) -> dict[str, Any]:
        self._receive(task_vars, state="absent")
        return {}


def _entry(name: str, entry: Entry) -> dict[str, Any]:
    return {"name": name, "size": entry.size, "sha256": entry.sha256}


def _is_here(bundle: Bundle, item: Item) -> Entry | None:
    """A file that need not travel: noted in the bundle, or whole although an interruption came before it was noted."""
    if not bundle.has(item.name, item.size):
        return None
    noted = bundle.files.get(item.name)
    if noted and noted.size == item.size and (item.kind == "sha1" or noted.sha256 == item.digest):
        return noted
    try:
        entry, digest = bundle.entry_of(item.name, item.kind, limit=item.size)
    except (OSError, BoundsError):
        return None
    return entry if digest == item.digest else None


@contextlib.contextmanager
def _no_more_than(size: int) -> Iterator[None]:
    """No file that this process or its children write gets longer, so that a Spark that sends without end does not
    fill the disk. A task has a process of its own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    unlimited = resource.RLIM_INFINITY
    limits = [size, *(limit for limit in (soft, hard) if limit != unlimited)]
    resource.setrlimit(resource.RLIMIT_FSIZE, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
