# SPDX-License-Identifier: Apache-2.0
"""Action: a bundle, from a Spark with internet to the controller, and from there to Sparks without.

- bundle: {state: schedule}                # collects: whether this host puts a part of it together
- bundle: {state: fetch, folder: DIR, collected: RESULT}     # takes what bundle_collect put together
- bundle: {state: python, folder: DIR}     # wheels for a controller without internet
- bundle: {state: push, folder: DIR, images: [...], models: [{repo, revision}], packages: false}
- bundle: {state: absent}                  # takes off the host what was pushed

A file that is there as it should be does not travel again.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail, AnsibleError
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

from sparkfleet import SparkfleetError, wheels
from sparkfleet.bundle import Bundle

display = Display()
#: Files that travel before the host is told to put them where they belong, bytes.
BATCH = 256 << 20
#: A line of progress at least so often, seconds.
AT_LEAST = 10.0
CHUNK = 4 << 20


class Travel:
    """Files on their way, with a line now and then; `total` in bytes."""

    def __init__(self, host: str, what: str, count: int, total: int) -> None:
        self.host, self.what, self.count, self.total = host, what, count, total
        self.files = self.done = 0

    def line(self, size: int, began: float) -> str:
        """How far it is, with the file that travels now."""
        text = f"{self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB, file {self.files + 1} of {self.count}"
        return f"{self.host}  {self.what} {text} ({size / 1e9:.2f} GB) for {time.monotonic() - began:.0f} s"

    def carry(self, work: Callable[[], Any], size: int) -> None:
        """Do one file, and say that it goes on."""
        over, began = threading.Event(), time.monotonic()

        def tell() -> None:
            while not over.wait(AT_LEAST):
                display.display(self.line(size, began))

        thread = threading.Thread(target=tell, daemon=True)
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
    _VALID_ARGS = frozenset(("state", "folder", "collected", "images", "models", "packages"))

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
            look = task_vars["hostvars"][name].get("sparkfleet_look") or {}
            if look.get("plan"):
                plan, system = look["plan"], look["state"]["os"]
                wants = (plan["image"], plan["repo"], plan["revision"], system["codename"], system["machine"])
                first.setdefault(wants, name)
                mine = wants if name == self._host else mine
        have = Bundle.open(self._task.args["folder"]).complete() if self._task.args.get("folder") else []
        return {"collects": mine is not None and first[mine] == self._host, "have": have}

    def _fetch(self, task_vars: Mapping[str, Any]) -> dict[str, Any]:
        bundle, collected = self._open(), self._task.args["collected"]
        known = task_vars["sparkfleet_look"]["state"]["os"]
        system = {key: str(known[key]) for key in ("id", "codename", "machine")}
        bundle.check_system(system)
        # What came before an interruption is there without being noted yet.
        waiting = [item for item in collected["files"] if not _is_here(bundle, item)]
        travel = Travel(self._host, "to the controller:", len(waiting), sum(item["size"] for item in waiting))
        began = time.monotonic()
        for item in waiting:
            travel.carry(lambda item=item: self._fetch_file(bundle.folder, item), item["size"])  # type: ignore[misc]
        travel.end(began)
        before = [*bundle.images, *bundle.models, *bundle.packages]
        bundle.add(collected, system)
        bundle.write()
        if collected["left_out"]:
            names = ", ".join(collected["left_out"])
            display.display(f"{self._host}  its sources have no package {names}; left out of the bundle")
        changed = bool(waiting) or before != [*bundle.images, *bundle.models, *bundle.packages]
        return {"changed": changed, "folder": str(bundle.folder)}

    def _fetch_file(self, folder: Path, item: Mapping[str, Any]) -> None:
        place = folder / item["name"]
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_name(f"{place.name}.incomplete")
        self._connection.fetch_file(item["path"], str(partial))
        name, digest = ("sha256", item["sha256"]) if "sha256" in item else ("sha1", item["sha1"])
        if _digest(partial, name, int(item["size"])) != digest:
            partial.unlink(missing_ok=True)
            raise SparkfleetError(f"{item['path']} did not arrive as it is on the host: run again")
        partial.replace(place)

    def _python(self, task_vars: Mapping[str, Any]) -> dict[str, Any]:
        bundle = self._open()
        before = set(bundle.files)
        names = wheels.download(bundle.folder / "python", filter(None, [bundle.system.get("machine")]), display.display)
        bundle.files = {name: size for name, size in bundle.files.items() if not name.startswith("python/")}
        bundle.files.update({f"python/{name}": (bundle.folder / "python" / name).stat().st_size for name in names})
        bundle.write()
        size = sum(bundle.files.values())
        display.display(f"{bundle.folder}: {len(bundle.files)} files, {size / 1e9:.2f} GB")
        return {"changed": before != set(bundle.files)}

    def _open(self) -> Bundle:
        folder = str(self._task.args.get("folder") or "")
        if not folder:
            raise SparkfleetError("say where to: sparkfleet bundle FOLDER, or -e sparkfleet_bundle_folder=FOLDER")
        return Bundle.open(folder)

    # -- using one -----------------------------------------------------------------------------------------

    def _push(self, task_vars: dict[str, Any]) -> dict[str, Any]:
        bundle, arguments = Bundle.read(self._task.args["folder"]), self._task.args
        images = list(arguments.get("images") or [])
        models = [f"{model['repo']}@{model['revision']}" for model in arguments.get("models") or []]
        names = bundle.of_fetch(images, models) + (list(bundle.of_packages()) if arguments.get("packages") else [])
        texts = {"image/index.json": bundle.index(images)} if images else {}
        want = {"texts": texts, "packages": bool(arguments.get("packages")), "user": self._user(task_vars)}
        if self._connection.transport == "local":
            parts = sorted({name.partition("/")[0] for name in names})
            links = {part: str(bundle.folder.resolve() / part) for part in parts}
            self._receive(task_vars, **{**want, "texts": {}}, links=links)
            return {}
        needed = sum(bundle.files[name] for name in names)
        there = self._receive(task_vars, user=want["user"], needed=needed)
        waiting = [name for name in names if there["files"].get(name) != bundle.files[name]]
        travel = Travel(self._host, "bundle:", len(waiting), sum(bundle.files[name] for name in waiting))
        began, moves, size = time.monotonic(), {}, 0
        for place, name in enumerate(waiting):
            incoming = f"{there['incoming']}/{place}"
            self._put(travel, bundle, name, incoming)
            moves[incoming] = name
            size += bundle.files[name]
            if size >= BATCH:  # what was interrupted goes on from here
                self._receive(task_vars, user=want["user"], moves=moves)
                moves, size = {}, 0
        self._receive(task_vars, **want, moves=moves)
        travel.end(began)
        return {}

    def _put(self, travel: Travel, bundle: Bundle, name: str, incoming: str) -> None:
        try:
            travel.carry(lambda: self._connection.put_file(str(bundle.folder / name), incoming), bundle.files[name])
        except AnsibleError as error:
            reason = " ".join(str(error).split())[-200:]
            raise SparkfleetError(f"{name} of the bundle did not arrive: {reason}. Run again: it resumes") from None

    def _user(self, task_vars: Mapping[str, Any]) -> str:
        return str(self._connection.get_option("remote_user") or "") if self._connection.transport == "ssh" else ""

    def _receive(self, task_vars: dict[str, Any], **arguments: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self._execute_module("bundle_receive", module_args=arguments, task_vars=task_vars)
        if answer.get("failed"):
            failure = {"failure": str(answer.get("failure") or "bundle")}
            raise AnsibleActionFail(f"{self._host}: {answer.get('msg')}", result=failure)
        return answer

    def _absent(self, task_vars: dict[str, Any]) -> dict[str, Any]:
        self._receive(task_vars, state="absent")
        return {}


def _is_here(bundle: Bundle, item: Mapping[str, Any]) -> bool:
    """Whether a file need not travel. The others are called by their content or version; apt's list always the same."""
    there = bundle.has(item["name"], item["size"])
    if there and item["name"] == "packages/Packages":
        return _digest(bundle.folder / item["name"], "sha256", item["size"]) == str(item["sha256"])
    return there


def _digest(path: Path, name: str, size: int) -> str:
    """sha256 of a file, or git's sha1 of it."""
    sha = hashlib.sha256() if name == "sha256" else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            sha.update(chunk)
    return sha.hexdigest()
