#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: the host's side of a bundle that is carried in."""

from __future__ import annotations

DOCUMENTATION = r"""
module: bundle_receive
short_description: Installs the files of a bundle on a host
description:
  - Lists existing files, and accepts files that the login user has uploaded; called by the action C(bundle). Each file
    is copied into a folder that only root can enter, and gets its name once size and sha256 match; nothing that the
    login user can still change is ever used, and none of their symbolic links is followed.
  - The packages become apt's only source for commands that set C(APT_CONFIG) to C(/var/lib/sparkfleet/bundle/apt.conf);
    nothing in C(/etc/apt) is touched.
options:
  state: {description: Whether the bundle should be present., type: str, choices: [present, absent], default: present}
  folder: {description: Where the bundle is kept., type: path, default: /var/lib/sparkfleet/bundle}
  user: {description: User who uploads files; by default the user who called sudo., type: str, default: ""}
  needed: {description: Bytes that must be free for missing files; 0 for no check., type: int, default: 0}
  largest: {description: Size of the largest expected file in bytes., type: int, default: 0}
  moves:
    description: >-
      Name of a file in the user-writable folder (in O(source), if given) -> C(name) in the
      bundle, C(size) in bytes and C(sha256).
    type: dict
    default: {}
  source: {description: Folder on this host that O(moves) are copied from; the originals stay., type: str, default: ""}
  texts: {description: Name in the bundle -> content., type: dict, default: {}}
  links: {description: Part of the bundle -> folder on this host that has it., type: dict, default: {}}
  packages: {description: Make the packages known to apt., type: bool, default: false}
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Lists existing files.}
  diff_mode: {support: none, description: The folder exists only during a run.}
"""

EXAMPLES = r"""
- name: List existing files
  sparkfleet.dgx.bundle_receive:
"""

RETURN = r"""
files: {description: Name in the bundle -> sha256 of accepted files., returned: with state present, type: dict}
incoming: {description: Folder that the user can write to., returned: with state present, type: str}
"""

import hashlib
import json
import os
import pwd
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import bounded
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.bounded import SHA256, BoundsError
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.job import JobError
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.share import BUNDLE

APT_CONF = """Dir::Etc::sourcelist "{folder}/sources.list";
Dir::Etc::sourceparts "-";
Dir::State::lists "{folder}/lists";
Acquire::Languages "none";
APT::Sandbox::User "root";
"""
PARTS = ("image", "hub", "packages")
INCOMING, PRIVATE, TAKEN = ".incoming", ".private", ".taken.json"
RESERVE = 1 << 30  # bytes that stay free
CHUNK = 4 << 20


def inside(folder: Path, name: str) -> Path:
    """The place of a name within the folder; root alone makes what is there. Raises JobError for one outside."""
    if not bounded.is_repository_path(name) or name.partition("/")[0] not in PARTS:
        raise JobError("bad-input", f"{bounded.printable(name, 200)} is outside the bundle")
    return folder / name


def taken(folder: Path) -> dict[str, str]:
    """What was taken and is there with its size: name -> sha256."""
    try:
        known = bounded.read_json(folder / TAKEN, limit=64 << 20, follow=False)
    except (OSError, BoundsError):
        return {}
    found = {}
    for name, entry in known.items():
        place = folder / name
        try:
            whole = not place.is_symlink() and place.stat().st_size == entry["size"]
        except (OSError, TypeError, KeyError):
            continue
        if whole:
            found[name] = str(entry["sha256"])
    return found


def note(folder: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Remember what was taken."""
    known: dict[str, Any] = {}
    if (folder / TAKEN).exists():
        known = bounded.read_json(folder / TAKEN, limit=64 << 20, follow=False)
    known.update({entry["name"]: {"size": entry["size"], "sha256": entry["sha256"]} for entry in entries.values()})
    scratch = folder / f"{TAKEN}.new"
    scratch.write_text(json.dumps(known) + "\n", "utf-8")
    scratch.replace(folder / TAKEN)


def incoming(folder: Path, user: str) -> Path:
    """An empty folder that the login user may write to."""
    place = folder / INCOMING
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True, mode=0o700)
    owner = pwd.getpwnam(user).pw_uid if user else int(os.environ.get("SUDO_UID") or os.getuid())
    os.chown(place, owner, -1)
    return place


def take(folder: Path, source: Path, name: str, entry: Mapping[str, Any], stays: bool) -> None:
    """Copy a file, so that a process that has it open can no longer change it, check it, and put it where it
    belongs. Raises JobError for another content, a link, or a name outside; OSError."""
    place = inside(folder, str(entry["name"]))
    private = folder / PRIVATE
    private.mkdir(mode=0o700, exist_ok=True)
    scratch = private / "0"
    scratch.unlink(missing_ok=True)
    size, sha = int(entry["size"]), hashlib.sha256()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        handle = bounded.open_beneath(source, name)
        with os.fdopen(handle, "rb") as brought, os.fdopen(os.open(scratch, flags, 0o600), "wb") as copy:
            left = size + 1
            while left and (chunk := brought.read(min(CHUNK, left))):
                sha.update(chunk)
                copy.write(chunk)
                left -= len(chunk)
            os.fchmod(copy.fileno(), 0o644)
        if left != 1 or sha.hexdigest() != bounded.matched(SHA256, entry["sha256"], "sha256"):
            raise JobError(
                "bundle", f"{entry['name']} does not match bundle.json: it was changed, or damaged in transit"
            )
    except BoundsError as error:
        scratch.unlink(missing_ok=True)
        raise JobError("bundle", f"{entry['name']}: {error}") from None
    except JobError:
        scratch.unlink(missing_ok=True)
        raise
    place.parent.mkdir(parents=True, exist_ok=True)
    scratch.replace(place)
    if not stays:
        (source / name).unlink()


def without_links(folder: Path) -> None:
    """Forget folders of the host that an earlier run has linked to."""
    for part in PARTS:
        for where, folders, names in os.walk(folder / part):
            for name in (*folders, *names):
                if Path(where, name).is_symlink():
                    Path(where, name).unlink()
        if (folder / part).is_symlink():
            (folder / part).unlink()


def link(folder: Path, links: Mapping[str, str]) -> None:
    """Let a part be a folder of this host."""
    for name, target in links.items():
        place = inside(folder, name)
        if place.exists():
            shutil.rmtree(place)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(target)


def let_apt_know(folder: Path) -> None:
    """A configuration with the packages as only source, and its lists. Raises JobError."""
    (folder / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    (folder / "sources.list").write_text(f"deb [trusted=yes] file:{folder / 'packages'} ./\n", "utf-8")
    (folder / "apt.conf").write_text(APT_CONF.format(folder=folder), "utf-8")
    environment = {**os.environ, "APT_CONFIG": str(folder / "apt.conf"), "LC_ALL": "C"}
    done = subprocess.run(
        ["apt-get", "--quiet", "update"], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode != 0 or "Err:" in done.stdout:
        raise JobError("packages", f"apt cannot read the bundle's packages: {' '.join(done.stderr.split())[-300:]}")


def receive(params: Mapping[str, Any], folder: Path) -> dict[str, object]:
    """Everything; what is there afterwards. Raises OSError and JobError."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    there = taken(folder)
    if params["needed"]:
        free = shutil.disk_usage(folder).free
        # The largest is there twice while it is copied.
        more = params["needed"] + params["largest"] - sum((folder / name).stat().st_size for name in there)
        if more + RESERVE > free:
            raise JobError(
                "disk-full",
                f"{folder} has {free / 1e9:.1f} GB free, the bundle needs {more / 1e9:.1f} GB more; free some space",
            )
    if params["moves"] or params["links"] or params["texts"]:
        without_links(folder)
    if params["moves"]:
        source = Path(params["source"] or folder / INCOMING)
        for name, entry in params["moves"].items():
            where = str(entry["name"]) if params["source"] else name
            take(folder, source, where, entry, stays=bool(params["source"]))
        note(folder, params["moves"])
    link(folder, params["links"])
    for name, text in params["texts"].items():
        inside(folder, name).parent.mkdir(parents=True, exist_ok=True)
        inside(folder, name).write_text(text, "utf-8")
    if params["packages"]:
        let_apt_know(folder)
    return {"files": taken(folder), "incoming": str(incoming(folder, str(params["user"])))}


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "folder": {"type": "path", "default": BUNDLE},
            "user": {"type": "str", "default": ""},
            "needed": {"type": "int", "default": 0},
            "largest": {"type": "int", "default": 0},
            "source": {"type": "str", "default": ""},
            "moves": {"type": "dict", "default": {}},
            "texts": {"type": "dict", "default": {}},
            "links": {"type": "dict", "default": {}},
            "packages": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    folder = Path(module.params["folder"])
    try:
        if module.check_mode:
            module.exit_json(changed=False, files=taken(folder), incoming="")
        if module.params["state"] == "absent":
            shutil.rmtree(folder, ignore_errors=True)
            module.exit_json(changed=False)
        module.exit_json(changed=False, **receive(module.params, folder))
    except JobError as error:
        module.fail_json(msg=str(error), failure=error.id)
    except KeyError:
        module.fail_json(msg=f"user {module.params['user']} does not exist on the host", failure="bad-input")
    except (OSError, subprocess.SubprocessError) as error:
        full = getattr(error, "errno", None) == 28
        module.fail_json(msg=f"{folder}: {error}", failure="disk-full" if full else "fetch-io")


if __name__ == "__main__":
    main()
