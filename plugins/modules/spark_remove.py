#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Sparkfleet, taken off a host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: spark_remove
short_description: Removes what Sparkfleet put on a host
description:
  - Containers of ours, releases, the guard and the firewall with their units and settings, journal and metrics,
    compile caches, the CA of C(sparkfleet_ca_file), and the empty image of the downloads. Models, engine images and
    the token only if requested. Docker, the NVIDIA toolkit and earlyoom stay, and so does every container that is not
    ours.
  - Only models that Sparkfleet downloaded itself are removed, according to its lists in the cache;
    all other models stay.
  - If Docker is installed but does not respond, nothing is removed - its containers would come back with it.
  - Check mode lists what would be removed.
options:
  project_dir: {description: Folder of the releases., type: path, default: /opt/sparkfleet}
  cache_dir: {description: Folder of the model cache., type: path, default: /opt/hf}
  compile_cache_dir: {description: Folder of the compile caches., type: path, default: /var/cache/sparkfleet}
  token_file: {description: File of the Hugging Face token., type: path, default: /etc/sparkfleet/hf_token}
  models: {description: Also remove the models that Sparkfleet downloaded., type: bool, default: false}
  images: {description: Also remove the images of the releases., type: bool, default: false}
  token: {description: Also remove the Hugging Face token., type: bool, default: false}
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Lists what would be removed.}
  diff_mode: {support: none, description: See RV(removed).}
"""

EXAMPLES = r"""
- name: List what would be removed
  sparkfleet.dgx.spark_remove:
  check_mode: true
"""

RETURN = r"""
removed: {description: What was or would be removed., returned: success, type: list, elements: str}
"""

import contextlib
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import (
    bounded,
    engine,
    firewall,
    monitoring,
    trust,
)
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.bounded import BoundsError
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.cache import (
    FOLDER,
    MANIFEST_BYTES,
    was_downloaded,
)
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.docker import (
    Docker,
    DockerError,
    DockerUnavailable,
)
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.guard import SETTINGS_FILE
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.http import KEY_FILE
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.registry import LOGINS
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.releases import (
    STATE_DIR,
    ReleaseError,
    Store,
)

UNIT = Path("/etc/systemd/system/sparkfleet-guard.service")
#: Those that are enabled, and the service that they start.
CHECKS = [UNIT.with_name(f"sparkfleet-integrity.{kind}") for kind in ("timer", "path", "service")]
HOST_PYTHON = "sparkfleet/host-python:1"
Item = tuple[str, Callable[[], None]]


def plan(params: dict[str, Any], store: Store, docker: Docker) -> list[Item]:
    """What is there to remove, in order: a name for people, and what removes it."""
    items: list[Item] = []
    if UNIT.exists():
        items.append((f"service {UNIT.name}", remove_unit))
    if firewall.UNIT.exists():
        items.append((f"service {firewall.UNIT.name}", remove_firewall))
    items += [(f"service {name}", remove_monitoring(name)) for name in monitoring.units()]
    images = {HOST_PYTHON}
    if params["images"]:
        for number in store.numbers():
            with contextlib.suppress(ReleaseError):  # of a damaged one it is not known
                images |= {item["image"] for item in store.lock(number)["engines"] if item["image"]}
    if is_there(docker):
        for found in engine.ours(docker):
            items.append((f"container {found['Names'][0].lstrip('/')}", remove_container(docker, found["Id"])))
        # Compose makes a network for the project.
        for network in docker.get(f"/networks?filters={quote(engine_filter())}")[1]:
            items.append((f"network {network['Name']}", call(docker, f"/networks/{network['Id']}")))
        for image in sorted(images):
            if docker.image(image):
                items.append((f"image {image}", call(docker, f"/images/{quote(image, safe='/:@')}")))
    folders = [store.project_dir, store.state_dir, Path(params["compile_cache_dir"]), *map(Path, monitoring.FOLDERS)]
    if params["models"]:
        folders += downloaded(Path(params["cache_dir"]))
    # A link goes with nothing behind it: others may write to the cache.
    here = (folder for folder in folders if folder.is_dir() and not folder.is_symlink())
    items += [(f"{folder}/", remove_folder(folder)) for folder in here]
    keys = [Path(f"{KEY_FILE}{end}") for end in ("", ".next", ".previous")]
    files = [Path(SETTINGS_FILE), Path(LOGINS), *keys, *([Path(params["token_file"])] if params["token"] else [])]
    items += [(str(file), file.unlink) for file in files if file.exists()]
    authorities = trust.Store()
    if authorities.found():
        items.append(("CA of sparkfleet_ca_file", lambda: authorities.apply("", [])))
    return items


def is_there(docker: Docker) -> bool:
    """Whether Docker answers. Raises DockerError where it is installed and does not; False where there is none."""
    try:
        docker.version()
    except DockerUnavailable:
        if any(shutil.which(name) for name in ("dockerd", "docker")) or Path(docker.socket_path).exists():
            raise
        return False
    return True


def downloaded(cache_dir: Path) -> list[Path]:
    """Folders of the models that Sparkfleet downloaded, with its lists of them. One that it only found and checked, or
    without a list, belongs to someone else."""
    found = []
    for place in sorted((cache_dir / FOLDER).glob("models--*")):
        lists = []
        for path in place.glob("*.json"):
            with contextlib.suppress(OSError, BoundsError):
                lists.append(bounded.read_json(path, MANIFEST_BYTES, follow=False))
        if any(map(was_downloaded, lists)):
            found += [cache_dir / place.name, place]
    return found


def engine_filter() -> str:
    """Docker's filter of what belongs to the project."""
    return f'{{"label": ["{engine.PROJECT_LABEL}={engine.PROJECT}"]}}'


def remove_unit() -> None:
    """Stop and forget the guard's service, and the check of model files."""
    checks = [path for path in CHECKS if path.exists()]
    names = [UNIT.name, *(path.name for path in checks if path.suffix != ".service")]
    subprocess.run(["systemctl", "disable", "--now", *names], capture_output=True, timeout=60, check=True)
    for path in (UNIT, *checks):
        path.unlink()
    subprocess.run(["systemctl", "daemon-reload"], capture_output=True, timeout=60, check=True)


def remove_firewall() -> None:
    """Stop its unit, which removes the table, and forget it."""
    subprocess.run(["systemctl", "disable", "--now", firewall.UNIT.name], capture_output=True, timeout=60, check=True)
    firewall.UNIT.unlink()
    firewall.RULES.unlink(missing_ok=True)
    subprocess.run(["systemctl", "daemon-reload"], capture_output=True, timeout=60, check=True)


def remove_monitoring(name: str) -> Callable[[], None]:
    """Stop and forget a service of monitoring; the distribution's packages stay."""

    def remove() -> None:
        subprocess.run(["systemctl", "disable", "--now", name], capture_output=True, timeout=120, check=True)
        (monitoring.UNIT_FOLDER / name).unlink()
        subprocess.run(["systemctl", "daemon-reload"], capture_output=True, timeout=60, check=True)

    return remove


def remove_container(docker: Docker, name: str) -> Callable[[], None]:
    """Stop and remove a container of ours."""

    def remove() -> None:
        engine.stop(docker, name)
        engine.remove(docker, name)

    return remove


def call(docker: Docker, path: str) -> Callable[[], None]:
    """A deletion by Docker."""
    return lambda: docker.call("DELETE", path)


def remove_folder(folder: Path) -> Callable[[], None]:
    """Remove a folder with all that is in it."""
    return lambda: shutil.rmtree(folder)


def main() -> None:
    """Entry point of the module."""
    flag = {"type": "bool", "default": False}
    module = AnsibleModule(
        argument_spec={
            "project_dir": {"type": "path", "default": "/opt/sparkfleet"},
            "cache_dir": {"type": "path", "default": "/opt/hf"},
            "compile_cache_dir": {"type": "path", "default": "/var/cache/sparkfleet"},
            "token_file": {"type": "path", "default": "/etc/sparkfleet/hf_token"},
            **dict.fromkeys(("models", "images", "token"), flag),
        },
        supports_check_mode=True,
    )
    params = module.params
    store = Store(params["project_dir"], STATE_DIR)
    if store.switch_active():
        module.fail_json(msg="a release switch is running on this host; run again when it has finished")
    try:
        items = plan(params, store, Docker(timeout=60.0))
    except DockerError as error:
        module.fail_json(
            msg=f"Docker does not respond ({error}), and its containers would come back with it: nothing was removed. "
            "Start it (`systemctl start docker`), then run again",
            failure="docker",
        )
    done: list[str] = []
    if not module.check_mode:
        for name, remove in items:
            try:
                remove()
            except (OSError, DockerError, engine.EngineError, trust.TrustError, subprocess.SubprocessError) as error:
                module.fail_json(msg=f"cannot remove {name}: {error}; removed so far: {', '.join(done) or 'nothing'}")
            done.append(name)
    module.exit_json(changed=bool(items), removed=[name for name, _ in items])


if __name__ == "__main__":
    main()
