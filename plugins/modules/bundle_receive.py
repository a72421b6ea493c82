#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: the host's side of a bundle that is carried in."""

from __future__ import annotations

DOCUMENTATION = r"""
module: bundle_receive
short_description: Puts the files of a bundle where they belong
description:
  - Says what is there, and moves files that the login user has brought; the action C(bundle) calls it.
  - Packages become the only source of apt for those who set C(APT_CONFIG) to C(/var/lib/sparkfleet/bundle/apt.conf);
    nothing in C(/etc/apt) is touched.
options:
  state: {description: Whether it is to be there., type: str, choices: [present, absent], default: present}
  folder: {description: Where the bundle is kept., type: path, default: /var/lib/sparkfleet/bundle}
  user: {description: Who brings files; empty for who calls sudo., type: str, default: ""}
  needed: {description: Bytes that must be free for what is not there yet; 0 for no check., type: int, default: 0}
  moves: {description: Where a file is -> its name in the bundle., type: dict, default: {}}
  texts: {description: Name in the bundle -> content., type: dict, default: {}}
  links: {description: Part of the bundle -> folder of this host that has it., type: dict, default: {}}
  packages: {description: Let apt know the packages., type: bool, default: false}
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Says what is there.}
  diff_mode: {support: none, description: The folder is for the time of a run.}
"""

EXAMPLES = r"""
- name: See what is there
  bundle_receive:
"""

RETURN = r"""
files: {description: Name in the bundle -> size., returned: with state present, type: dict}
incoming: {description: Folder that the user may write to., returned: with state present, type: str}
"""

import os
import pwd
import shutil
import subprocess
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.sparkfleet_host.job import JobError
from ansible.module_utils.sparkfleet_host.share import BUNDLE

APT_CONF = """Dir::Etc::sourcelist "{folder}/sources.list";
Dir::Etc::sourceparts "-";
Dir::State::lists "{folder}/lists";
Acquire::Languages "none";
APT::Sandbox::User "root";
"""
PARTS = ("image", "hub", "packages")
RESERVE = 1 << 30  # bytes that stay free


def inside(folder: Path, name: str) -> Path:
    """The place of a name within the folder. Raises JobError for one outside."""
    if ".." in Path(name).parts or name.startswith("/"):
        raise JobError("bad-input", f"{name} is outside of the bundle")
    return folder / name


def files(folder: Path) -> dict[str, int]:
    """What is there: name -> size; links are not followed."""
    found = {}
    for part in (folder / name for name in PARTS):
        if part.is_dir() and not part.is_symlink():
            paths = (path for path in part.rglob("*") if path.is_file())
            found.update({str(path.relative_to(folder)): path.stat().st_size for path in paths})
    return found


def incoming(folder: Path, user: str) -> Path:
    """An empty folder that the login user may write to."""
    place = folder / ".incoming"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True, mode=0o700)
    owner = pwd.getpwnam(user).pw_uid if user else int(os.environ.get("SUDO_UID") or os.getuid())
    os.chown(place, owner, -1)
    return place


def move(folder: Path, moves: dict[str, str]) -> None:
    """Take what was brought."""
    for source, name in moves.items():
        place = inside(folder, name)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.chown(source, 0, 0)
        Path(source).chmod(0o644)
        shutil.move(source, place)


def link(folder: Path, links: dict[str, str]) -> None:
    """Let a part be a folder of this host."""
    for name, target in links.items():
        place = inside(folder, name)
        if place.is_symlink():
            place.unlink()
        elif place.exists():
            shutil.rmtree(place)
        place.symlink_to(target)


def let_apt_know(folder: Path) -> None:
    """A configuration with the packages as only source, and its lists. Raises JobError."""
    (folder / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    (folder / "sources.list").write_text(f"deb [trusted=yes] file:{(folder / 'packages').resolve()} ./\n", "utf-8")
    (folder / "apt.conf").write_text(APT_CONF.format(folder=folder), "utf-8")
    environment = {**os.environ, "APT_CONFIG": str(folder / "apt.conf"), "LC_ALL": "C"}
    done = subprocess.run(
        ["apt-get", "--quiet", "update"], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode != 0 or "Err:" in done.stdout:
        raise JobError("packages", f"apt does not read the bundle's packages: {' '.join(done.stderr.split())[-300:]}")


def receive(params: dict[str, object], folder: Path) -> dict[str, object]:
    """Everything; what is there afterwards. Raises OSError and JobError."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    there = files(folder)
    free = shutil.disk_usage(folder).free
    missing = int(str(params["needed"])) - sum(there.values())
    if params["needed"] and missing + RESERVE > free:
        raise JobError(
            "disk-full",
            f"{folder} has {free / 1e9:.1f} GB free, the bundle takes {missing / 1e9:.1f} GB more; make room",
        )
    move(folder, dict(params["moves"]))  # type: ignore[call-overload]
    link(folder, dict(params["links"]))  # type: ignore[call-overload]
    for name, text in dict(params["texts"]).items():  # type: ignore[call-overload]
        inside(folder, name).parent.mkdir(parents=True, exist_ok=True)
        inside(folder, name).write_text(text, "utf-8")
    if params["packages"]:
        let_apt_know(folder)
    return {"files": files(folder), "incoming": str(incoming(folder, str(params["user"])))}


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "folder": {"type": "path", "default": BUNDLE},
            "user": {"type": "str", "default": ""},
            "needed": {"type": "int", "default": 0},
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
            module.exit_json(changed=False, files=files(folder), incoming="")
        if module.params["state"] == "absent":
            shutil.rmtree(folder, ignore_errors=True)
            module.exit_json(changed=False)
        module.exit_json(changed=False, **receive(module.params, folder))
    except JobError as error:
        module.fail_json(msg=str(error), failure=error.id)
    except KeyError:
        module.fail_json(msg=f"there is no user {module.params['user']} on the host", failure="bad-input")
    except (OSError, subprocess.SubprocessError) as error:
        full = getattr(error, "errno", None) == 28
        module.fail_json(msg=f"{folder}: {error}", failure="disk-full" if full else "fetch-io")


if __name__ == "__main__":
    main()
