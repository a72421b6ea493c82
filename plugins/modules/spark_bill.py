#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: what a Spark runs, for a bill of materials."""

from __future__ import annotations

DOCUMENTATION = r"""
module: spark_bill
short_description: Reads what a Spark runs
description:
  - Reads the operating system, the deployed release with its images and models, the hashes of the models' files as they
    were fetched, Sparkfleet's own program, and the versions of some packages. The action of the same name makes a bill
    of materials of it.
  - Changes nothing.
version_added: 0.3.0
options:
  project_dir: {description: Sparkfleet's folder on the host., type: path, default: /opt/sparkfleet}
  cache_dir: {description: Folder of the model cache., type: path, default: /opt/hf}
  packages:
    description: Names of packages; those that are not installed are left out.
    type: list
    elements: str
    default: []
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Reads only.}
  diff_mode: {support: none, description: Reads only.}
"""

EXAMPLES = r"""
- name: Read what the Spark runs
  sparkfleet.dgx.spark_bill:
    packages: [docker.io, earlyoom]
"""

RETURN = r"""
facts:
  description: Operating system, release, engines, program and packages.
  returned: success
  type: dict
"""

import platform
import subprocess
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import bounded, cache
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.bounded import BoundsError
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.releases import ReleaseError, Store

SECONDS = 30


def system() -> dict[str, str]:
    """The operating system."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    names = {"id": "ID", "version": "VERSION_ID", "codename": "VERSION_CODENAME", "name": "PRETTY_NAME"}
    return {**{key: release.get(name, "") for key, name in names.items()}, "machine": platform.machine()}


def packages(names: list[str]) -> dict[str, dict[str, str]]:
    """Version and architecture of those that are installed. Raises OSError, SubprocessError."""
    form = "${db:Status-Status}\t${Package}\t${Version}\t${Architecture}\t${source:Package}\n"
    # Exit code 1: it does not know one of them.
    done = subprocess.run(
        ["dpkg-query", "--show", f"--showformat={form}", "--", *names],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    if done.returncode not in (0, 1):
        raise OSError(f"dpkg-query: {done.stderr.strip()[-200:]}")
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    return {
        row[1]: {"version": row[2], "architecture": row[3], "source": row[4]}
        for row in rows
        if len(row) == 5 and row[0] == "installed"
    }


def engines(store: Store, number: int, cache_dir: str) -> list[dict[str, Any]]:
    """Each engine of a release: image, and its models with the hashes of their files. Raises ReleaseError."""
    found = []
    for engine in store.engines(number):
        models = [{"repo": engine.repo, "revision": engine.revision}, *([dict(engine.draft)] if engine.draft else [])]
        for model in models:
            model["files"] = files(cache_dir, model["repo"], model["revision"])
        found.append({"service": engine.service, "image": engine.image, "models": models})
    return found


def files(cache_dir: str, repo: str, revision: str) -> dict[str, dict[str, Any]]:
    """The files of a model as they were fetched; none of one that the engine downloaded by itself."""
    try:
        listing = cache.read_manifest(cache.manifest_path(cache_dir, repo, revision))
    except (OSError, BoundsError):
        return {}
    names = ("size", "sha256", "sha1")
    return {name: {key: entry[key] for key in names if key in entry} for name, entry in listing["files"].items()}


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "project_dir": {"type": "path", "default": "/opt/sparkfleet"},
            "cache_dir": {"type": "path", "default": "/opt/hf"},
            "packages": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
    )
    params = module.params
    store = Store(params["project_dir"])
    try:
        number = store.current()
        facts = {
            "os": system(),
            "release": number,
            "engines": engines(store, number, params["cache_dir"]) if number is not None else [],
            "program": bounded.checksum(Path(params["project_dir"]) / "lib" / "sparkfleet_host.pyz"),
            "packages": packages(params["packages"]) if params["packages"] else {},
        }
    except (ReleaseError, OSError, subprocess.SubprocessError) as error:
        module.fail_json(msg=f"what is installed cannot be read: {error}")
    module.exit_json(changed=False, facts=facts)


if __name__ == "__main__":
    main()
