#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: what a Spark without internet will need, put together on one that has it."""

from __future__ import annotations

DOCUMENTATION = r"""
module: bundle_collect
short_description: Collects the image, model and packages of a bundle
description:
  - Fetches the image's blobs and the packages into a folder on the host, and lists them together with the model's files
    in the cache. Existing files are not fetched again. The action C(bundle) copies everything to the controller.
  - Packages come with all dependencies, as for a host with nothing installed, from the host's own sources. Each group
    is resolved on its own, since packages of two groups may conflict (Docker's own and the distribution's).
options:
  image: {description: Reference of the image., type: str, required: true}
  digest: {description: "Its digest, where the controller knows it.", type: str, default: ""}
  repo: {description: Model on the Hub; empty for none., type: str, default: ""}
  revision: {description: Its revision., type: str, default: main}
  cache_dir: {description: Folder of the model cache., type: path, default: /opt/hf}
  packages:
    description: Groups of package names; the packages of a group are installed together.
    type: list
    elements: list
    default: []
  have: {description: Names of files already in the bundle., type: list, elements: str, default: []}
  folder: {description: Where to collect., type: path, default: /var/lib/sparkfleet/bundle}
  docker_config:
    description: Docker's configuration file with credentials of the registry.
    type: path
    default: /root/.docker/config.json
  status_file: {description: Where progress is written., type: path, default: /run/sparkfleet/fetch/bundle.json}
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Does nothing.}
  diff_mode: {support: none, description: The host itself is not changed.}
"""

EXAMPLES = r"""
- name: Collect
  sparkfleet.dgx.bundle_collect:
    image: nvcr.io/nvidia/vllm:25.09-py3
    repo: nvidia/Llama-3.1-8B-Instruct-FP8
    packages: [[docker.io, docker-compose-v2], [haproxy]]
"""

RETURN = r"""
image: {description: Its name digest media_type size and blobs., returned: success, type: dict}
model: {description: REPO@REVISION., returned: success, type: str}
listing: {description: The model's files; empty without a model., returned: success, type: dict}
packages: {description: Requested packages that are available., returned: success, type: list, elements: str}
left_out: {description: Packages that the host's sources do not have., returned: success, type: list, elements: str}
files: {description: name in the bundle path size and sha256 or sha1 of each file., returned: success, type: list}
"""

import hashlib
import subprocess
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.bounded import BoundsError
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.cache import (
    CODE,
    manifest_path,
    model_state,
    read_manifest,
    repo_folder,
)
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.docker import Docker, DockerError
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.job import Job, JobError
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.registry import (
    Layout,
    Registry,
    credentials,
    reference,
)
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.share import BUNDLE


def blob_name(digest: str) -> str:
    """Name of a blob in the bundle."""
    return f"image/blobs/sha256/{digest.partition(':')[2]}"


def collect_image(params: dict[str, Any], job: Job) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The image's entry of the bundle, and its files. Raises JobError."""
    ref, layout = reference(params["image"]), Layout(Path(params["folder"], "image"))
    docker = Docker()
    registry = Registry(ref, docker.info(), credentials(Path(params["docker_config"]), ref.registry), timeout=60)
    try:
        digest, blobs = layout.add(params["image"], registry, str(docker.version().get("Arch") or ""), params["digest"])
        missing = [blob for blob in dict.fromkeys(blobs) if blob_name(blob) not in params["have"]]
        total = sum(layout.sizes[blob] for blob in missing)
        layout.fetch(missing, lambda done: job.update("downloading", done, total))
    except (OSError, KeyError, ValueError) as error:
        raise JobError("registry-unreachable", f"{ref.registry}, asked for {params['image']}: {error}") from error
    files = [
        {
            "name": blob_name(blob),
            "path": str(layout.path(blob)),
            "size": layout.sizes[blob],
            "sha256": layout.path(blob).name,
        }
        for blob in dict.fromkeys(blobs)
    ]
    entry = {"name": params["image"], "digest": digest, "media_type": layout.media_type(digest)}
    return {**entry, "size": layout.sizes[digest], "blobs": list(dict.fromkeys(blobs))}, files


def collect_model(params: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The model's list, and its files. Raises JobError if the cache does not have it."""
    if not params["repo"]:
        return {}, []
    code = bool(params.get("remote_code"))
    state = model_state(params["cache_dir"], params["repo"], params["revision"], code)
    if not state["complete"]:
        raise JobError("download-incomplete", f"{params['repo']} is not complete in {params['cache_dir']}")
    path = manifest_path(params["cache_dir"], params["repo"], str(state["commit"]))
    try:
        listing: dict[str, Any] = {**read_manifest(path), "revision": params["revision"]}
    except BoundsError as error:
        raise JobError("download-incomplete", str(error)) from None
    if not code:  # an earlier version fetched it
        listing["files"] = {name: entry for name, entry in listing["files"].items() if not name.endswith(CODE)}
    folder = repo_folder(params["repo"])
    files = {}
    for entry in listing["files"].values():
        name = str(entry.get("sha256") or entry["sha1"])
        place = Path(params["cache_dir"], folder, "blobs", name)
        files[name] = {"name": f"hub/{folder}/blobs/{name}", "path": str(place), **entry}
    return listing, list(files.values())


def apt(*words: str, seconds: float = 1800) -> str:
    """Standard output of a program of apt. Raises JobError with its last words."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=seconds, check=False)
    if done.returncode != 0:
        raise JobError("packages", f"{words[0]}: {' '.join((done.stderr or done.stdout).split())[-300:]}")
    return done.stdout


def collect_packages(params: dict[str, Any], job: Job) -> tuple[list[str], list[dict[str, Any]]]:
    """Names that there are, and the files of a repository for apt. Raises JobError."""
    if not params["packages"]:
        return [], []
    job.update("packages", 0, None)
    apt("apt-get", "--quiet", "update")
    # `pkgnames` has what is installed as well, whose source may be gone.
    asked = list(dict.fromkeys(name for group in params["packages"] for name in group))
    known = {line.partition("|")[0].strip() for line in apt("apt-cache", "madison", "--", *asked).splitlines()}
    names = [name for name in asked if name in known]
    folder = Path(params["folder"], "packages")
    (folder / "partial").mkdir(parents=True, exist_ok=True)
    nothing = folder / "partial" / "status"
    nothing.write_text("", "utf-8")
    options = {"Dir::State::status": nothing, "Dir::Cache::archives": f"{folder}/", "APT::Sandbox::User": "root"}
    for group in params["packages"]:
        some = [name for name in group if name in known]
        if some:
            apt(
                *("apt-get", "--quiet", "--yes", "--no-install-recommends", "--download-only"),
                *(f"--option={key}={value}" for key, value in options.items()),
                *("install", "--", *some),
            )
    paragraphs, files = [], []
    for deb in sorted(folder.glob("*.deb")):
        content = deb.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        control = apt("dpkg-deb", "--field", str(deb)).strip()
        paragraphs.append(f"{control}\nFilename: ./{deb.name}\nSize: {len(content)}\nSHA256: {digest}\n")
        files.append({"name": f"packages/{deb.name}", "path": str(deb), "size": len(content), "sha256": digest})
    index = "\n".join(paragraphs).encode()
    (folder / "Packages").write_bytes(index)
    digest = hashlib.sha256(index).hexdigest()
    files.append({"name": "packages/Packages", "path": str(folder / "Packages"), "size": len(index), "sha256": digest})
    return names, files


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "image": {"type": "str", "required": True},
            "digest": {"type": "str", "default": ""},
            "repo": {"type": "str", "default": ""},
            "revision": {"type": "str", "default": "main"},
            "remote_code": {"type": "bool", "default": False},
            "cache_dir": {"type": "path", "default": "/opt/hf"},
            "packages": {"type": "list", "elements": "list", "default": []},
            "have": {"type": "list", "elements": "str", "default": []},
            "folder": {"type": "path", "default": BUNDLE},
            "docker_config": {"type": "path", "default": "/root/.docker/config.json"},
            "status_file": {"type": "path", "default": "/run/sparkfleet/fetch/bundle.json"},
        },
        supports_check_mode=True,
    )
    params = module.params
    if module.check_mode:
        module.exit_json(changed=False, msg="check mode")
    job = Job(params["status_file"], "bundle", params["image"])
    holder = job.acquire()
    if holder is not None:
        module.fail_json(
            msg=f"a bundle is already being collected here (process {holder['pid']})", failure="fetch-busy"
        )
    try:
        listing, of_model = collect_model(params)
        image, of_image = collect_image(params, job)
        names, of_packages = collect_packages(params, job)
        model = f"{params['repo']}@{params['revision']}" if listing else ""
        left_out = sorted({name for group in params["packages"] for name in group} - set(names))
        files = [*of_image, *of_model, *of_packages]
        result: dict[str, Any] = {"image": image, "model": model, "listing": listing, "packages": names}
        result.update(left_out=left_out, files=files)
        job.done({**result, "changed": False})
        module.exit_json(changed=False, **result)
    except JobError as error:
        job.failed(error.id, str(error))
        module.fail_json(msg=str(error), failure=error.id)
    except (DockerError, OSError, subprocess.SubprocessError) as error:
        job.failed("fetch-io", str(error))
        module.fail_json(msg=f"the bundle: {error}", failure="fetch-io")


if __name__ == "__main__":
    main()
