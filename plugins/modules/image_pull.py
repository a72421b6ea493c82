#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: a container image on a Spark, with progress that others can read."""

from __future__ import annotations

DOCUMENTATION = r"""
module: image_pull
short_description: Pull a container image, with progress in a status file
description:
  - Pulls through the Docker Engine API. An image that is present is left unchanged; its tag is not resolved again.
  - Only one pull of this kind runs at a time. A second job for the same image returns at once with attached=true;
    watch the status file (the action C(sparkfleet.dgx.fetch_wait)) for its end.
  - If the job dies, Docker ends the pull; finished layers stay, and the next pull fetches the rest.
options:
  image:
    description: NAME:TAG, NAME@sha256:DIGEST, or both.
    type: str
    required: true
  status_file:
    description: Where progress is written as JSON.
    type: path
    default: /run/sparkfleet/fetch/image.json
  mirror:
    description: >-
      HOST:PORT of a registry to try first, for O(mirror_digest); see M(sparkfleet.dgx.share). If it fails,
      the image's own registry is used.
    type: str
    default: ""
  digest:
    description: >-
      Digest of the tag, sha256:..., as resolved by the controller. Nothing else is accepted from any source. Without it
      a mirror is used only if the image's own registry, asked by this host, returns the same digest as the mirror; if
      it cannot be asked, RV(unverified) reports that.
    type: str
    default: ""
  mirror_digest:
    description: Digest of the image according to the mirror, sha256:...
    type: str
    default: ""
  internet:
    description: Whether the image's own registry may be used at all; with V(false) the mirror must have it.
    type: bool
    default: true
  state_dir:
    description: >-
      Folder that records that the image was pulled by Sparkfleet, so that it can be removed with the last release that
      needs it.
    type: path
    default: /var/lib/sparkfleet
  docker_config:
    description: Docker's configuration file; its C(auths) entry of the registry is sent to the engine.
    type: path
    default: /root/.docker/config.json
  docker_socket:
    description: Socket of the Docker engine.
    type: path
    default: /var/run/docker.sock
author: ["The Sparkfleet developers"]
attributes:
  check_mode:
    support: full
    description: Reports whether it would pull.
"""

EXAMPLES = r"""
- name: Pull the engine image in the background
  sparkfleet.dgx.image_pull:
    image: nvcr.io/nvidia/vllm:25.09-py3
  async: "{{ ansible_check_mode | ternary(0, 7200) }}"
  poll: 0
  # A launch always reports changed; fetch_wait has the real result.
  changed_when: ansible_check_mode and fetch_image.changed
  register: fetch_image
"""

RETURN = r"""
id:
  description: Image id.
  returned: when the image is present
  type: str
digest:
  description: Digest in the registry, sha256:...; empty for an image that came from no registry.
  returned: when the image is present
  type: str
size:
  description: Size on disk in bytes, as the engine counts it.
  returned: when the image is present
  type: int
mirror_failed:
  description: Why the mirror failed; empty if it worked or none was given.
  returned: after a pull
  type: str
unverified:
  description: What could not be verified about the image, and why; empty if everything was.
  returned: after a pull
  type: str
seconds:
  description: How long the job took.
  returned: always
  type: float
attached:
  description: Another job already pulls this image; nothing was done here.
  returned: always
  type: bool
holder_pid:
  description: Process of that other job.
  returned: when attached
  type: int
failure:
  description: Entry in the table of failures.
  returned: on failure
  type: str
"""

import base64
import contextlib
import json
import re
import shutil
import threading
import time
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.bounded import (
    DIGEST,
    BoundsError,
    printable,
)
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.docker import (
    Docker,
    DockerError,
    DockerUnavailable,
)
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.job import Job, JobError
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.reclaim import images_before, note_image
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.registry import (
    Reference,
    Registry,
    credentials,
    digest_of,
    layer_sizes,
    local_image,
    reference,
)
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.releases import STATE_DIR

MOST_LAYERS = 1000  # of an image
SILENCE = 1800.0  # seconds without a word from the engine; a huge layer may unpack for long
SHOWN = 200  # characters of what the engine says of a failure


# -- progress ----------------------------------------------------------------------------------------------


@dataclass
class Layer:
    """Bytes of one layer; `size` None while unknown."""

    size: int | None = None
    pulled: int = 0
    unpacked: int = 0
    present: bool = False

    def whole(self) -> int:
        return self.size or 0


def _bytes(value: Any) -> int:
    """An amount as Docker counts it; 0 for anything else."""
    return value if isinstance(value, int) and 0 < value < 1 << 62 else 0


@dataclass
class Progress:
    """Adds up the engine's progress messages over all layers."""

    sizes: dict[str, int] = field(default_factory=dict)  # short id: compressed bytes, from the registry
    layers: dict[str, Layer] = field(default_factory=dict)

    def feed(self, event: dict[str, Any]) -> None:
        """One message of the stream: {"status", "id", "progressDetail": {"current", "total"}}."""
        status, id = str(event.get("status", "")), str(event.get("id", ""))
        detail = event.get("progressDetail")
        detail = detail if isinstance(detail, dict) else {}
        if not re.fullmatch(r"[0-9a-f]{12}", id) or (id not in self.layers and len(self.layers) == MOST_LAYERS):
            return
        layer = self.layers.setdefault(id, Layer())
        current, total = _bytes(detail.get("current")), _bytes(detail.get("total"))
        if detail.get("units"):  # the containerd store reports unpacking in seconds
            current = total = 0
        if total and status == "Downloading":
            layer.size = total
        elif layer.size is None:
            layer.size = self.sizes.get(id)
        if status == "Already exists":
            layer.present = True
        elif status == "Downloading":
            layer.pulled = max(layer.pulled, current)
        elif status in ("Verifying Checksum", "Download complete"):
            layer.pulled = layer.whole()
        elif status == "Extracting":
            layer.size = layer.size or total or None
            layer.pulled, layer.unpacked = layer.whole(), max(layer.unpacked, min(current, layer.whole()))
        elif status == "Pull complete":
            layer.pulled = layer.unpacked = layer.whole()

    def state(self) -> tuple[str, int, int | None]:
        """Phase, bytes done, bytes in all (None while a layer's size is unknown)."""
        layers = {id: layer for id, layer in self.layers.items() if not layer.present}
        for id, layer in layers.items():
            if layer.size is None:
                layer.size = self.sizes.get(id)
        if not layers:
            return "pulling", 0, None
        known = all(layer.size for layer in layers.values())
        total = sum(layer.whole() for layer in layers.values())
        pulled = sum(min(layer.pulled, layer.size or layer.pulled) for layer in layers.values())
        if known and pulled >= total:
            return "extracting", sum(layer.unpacked for layer in layers.values()), total
        return "pulling", pulled, total if known else None


# -- failures ----------------------------------------------------------------------------------------------


def explain(text: str, ref: Reference, room: str = "") -> JobError:
    """The failure behind an error message of the engine, with its remedy."""
    image, host, low = f"{ref.name}{'@' if ref.digest else ':'}{ref.wanted}", ref.registry, text.lower()

    def has(*signs: str) -> bool:
        return any(sign in low for sign in signs)

    if has("no space left on device", "disk quota exceeded"):
        where = f" ({room})" if room else ""
        return JobError(
            "disk-full", f"no space for {image} in Docker's directory{where}; free some space and run again"
        )
    if has("layer verification failed", "unexpected commit digest", "manifest verification failed"):
        return JobError(
            "image-differs",
            f"what {host} sends for {image} does not have the digest it is named by: the registry, a mirror or a proxy "
            f"changes or damages it; check them, then run again ({_short(text)})",
        )
    if has("no matching manifest", "does not match the specified platform"):
        return JobError("image-platform", f"{image} exists, but not for this host's architecture")
    if has("manifest unknown", "manifest for", "name unknown", "not found: manifest", ": not found"):
        return JobError("image-unknown", f"{host} has no {image}; check name and tag")
    if has("x509:", "certificate", "tls: ", "server gave http response to https"):
        return JobError(
            "registry-tls",
            f"{host} presents a certificate that this host does not trust; set sparkfleet_ca_file to that of its CA, "
            f"and run again ({_short(text)})",
        )
    if has("toomanyrequests", "too many requests"):
        return JobError("registry-limit", f"{host} limits the number of pulls; wait, or set sparkfleet_registry_logins")
    if has("unauthorized", "denied", "authentication required", "no basic auth", "403 forbidden", "401 "):
        return JobError(
            "image-denied",
            f"{host} refuses {image}: set sparkfleet_registry_logins to an account that is allowed to pull it, check "
            "the name",
        )
    if has("no such host", "name resolution", "server misbehaving", "lookup "):
        return JobError("registry-name", f"the name {host} does not resolve; check the host's DNS ({_short(text)})")
    if has("refused", "timeout", "unreachable", "no route", "deadline exceeded", "awaiting headers", "reset", "eof"):
        return JobError(
            "registry-unreachable",
            f"{host} cannot be reached; check network, firewall and the engine's proxy ({_short(text)})",
        )
    return JobError("image-pull", f"pull of {image} failed: {_short(text)}")


def _short(text: str) -> str:
    """The end of what Docker says, where the cause is."""
    words = " ".join(text.split())
    return words if len(words) <= SHOWN else f"… {words[-SHOWN:].partition(' ')[2]}"


def room(info: dict[str, Any]) -> str:
    """Docker's directory and its free space, for a message; empty if unknown."""
    root = str(info.get("DockerRootDir") or "")
    try:
        return f"{root}, {shutil.disk_usage(root).free / 1e9:.1f} GB free"
    except OSError:
        return root


# -- the pull ----------------------------------------------------------------------------------------------


def describe(image: dict[str, Any], ref: Reference) -> dict[str, Any]:
    """id, digest and size of an image as inspected. Docker's two stores agree in RepoDigests; the id is the digest of
    the configuration in one, that of the index or manifest in the other (containerd)."""
    listed = image.get("RepoDigests")
    digests = [str(entry) for entry in listed if "@" in str(entry)] if isinstance(listed, list) else []
    mine = [entry for entry in digests if entry.partition("@")[0] in (ref.familiar, ref.name)] or digests
    size = image.get("Size")
    return {
        "id": str(image.get("Id") or ""),
        "digest": ref.digest or (mine[0].partition("@")[2] if mine else ""),
        "size": size if isinstance(size, int) else 0,
    }


def pull(docker: Docker, ref: Reference, config: Path, job: Job) -> dict[str, Any]:
    """Pulls, reporting to `job`; returns the result of `describe`. Raises JobError and DockerError."""
    auth = credentials(config, ref.registry)
    headers = {}
    if auth:
        headers["X-Registry-Auth"] = base64.urlsafe_b64encode(json.dumps(auth).encode()).decode()
    info, progress = docker.info(), Progress()
    arch = str(docker.version().get("Arch") or "")
    threading.Thread(target=lambda: progress.sizes.update(layer_sizes(ref, arch, info, auth)), daemon=True).start()
    query = urllib.parse.urlencode({"fromImage": ref.name, "tag": ref.wanted})
    try:
        for event in docker.stream("POST", f"/images/create?{query}", headers=headers, timeout=SILENCE):
            if "error" in event:
                raise explain(str(event["error"]), ref, room(info))
            progress.feed(event)
            job.update(*progress.state())
    except DockerError as error:
        if error.status:
            raise explain(str(error), ref, room(info)) from error
        raise
    found = docker.image(ref.local)
    if found is None:
        raise JobError("image-pull", f"the engine pulled {ref.local} but does not have it; see journalctl -u docker")
    # Docker chooses from an index of platforms, and takes a single manifest as it comes.
    built = str(found.get("Architecture") or "")
    if arch and built and built != arch:
        raise JobError(
            "image-platform", f"{ref.local} is built for {built}, this host is {arch}; docker rmi frees its space"
        )
    return describe(found, ref)


def bring(docker: Docker, ref: Reference, params: dict[str, Any], job: Job) -> dict[str, Any]:
    """`get`, and a note that the image was not here before. Without the note it is never removed: where Docker does not
    say in an orderly way what was here, nothing is noted."""
    before: dict[str, set[str]] | None = None
    with contextlib.suppress(DockerError, BoundsError):
        before = images_before(docker)
    result = get(docker, ref, params, job)
    if before is not None:
        with contextlib.suppress(DockerError, OSError, BoundsError):
            note_image(params["state_dir"], local_image(docker, ref) or {}, before)
    return result


def get(docker: Docker, ref: Reference, params: dict[str, Any], job: Job) -> dict[str, Any]:
    """Pulls from the mirror, if there is one that may be believed, else from the image's own registry."""
    config, reason, unverified = Path(params["docker_config"]), "", ""
    known = ref.digest or params["digest"]
    for name in ("digest", "mirror_digest"):
        if params[name] and not DIGEST.fullmatch(params[name]):
            raise JobError("bad-input", f"{name} {printable(params[name], 80)!r} is not of the form sha256:DIGEST")
    if params["mirror"]:
        try:
            unverified = check_mirror(docker, ref, known, params, config)
            return {**from_mirror(docker, ref, params, config, job), "unverified": unverified}
        except (JobError, DockerError) as error:
            if not params["internet"] or (isinstance(error, JobError) and error.id in ("disk-full", "image-platform")):
                raise
            reason = str(error)
            job.update("pulling", 0, None, f"{params['mirror']} failed: {reason}")
    if not params["internet"]:
        raise JobError(
            "bundle", f"neither this host nor another Spark serves {ref.local}, and the internet must not be used"
        )
    if not known:
        return {**pull(docker, ref, config, job), "mirror_failed": reason, "unverified": ""}
    own = reference(f"{ref.name}@{known}")
    pull(docker, own, config, job)
    found = tagged(docker, ref, own.local)
    return {**describe(found, own), "mirror_failed": reason, "unverified": ""}


def check_mirror(docker: Docker, ref: Reference, known: str, params: dict[str, Any], config: Path) -> str:
    """Whether what a mirror offers is what the image stands for; "", or what could not be checked. Another Spark is not
    believed about that. Raises JobError where it is something else."""
    offered = params["mirror_digest"]
    if not known and params["internet"]:
        auth = credentials(config, ref.registry)
        try:
            known = digest_of(Registry(ref, docker.info(), auth), ref.wanted)
        except OSError as error:
            return (
                f"that {ref.local} is {offered} is only claimed by the source Spark: neither the controller nor this "
                f"host could ask {ref.registry} ({printable(str(error), 120)}); an image @sha256:... avoids this"
            )
    if known and offered != known:
        raise JobError("image-differs", f"{params['mirror']} offers {offered} for {ref.local}, which is {known}")
    return ""


def tagged(docker: Docker, ref: Reference, local: str) -> dict[str, Any]:
    """The image that Docker has as `local`, with its tag. Raises JobError and DockerError."""
    if ref.tag:
        query = urllib.parse.urlencode({"repo": ref.name, "tag": ref.tag})
        docker.call("POST", f"/images/{urllib.parse.quote(local, safe='/:@')}/tag?{query}")
    found: dict[str, Any] | None = docker.image(f"{ref.name}:{ref.tag}" if ref.tag else local)
    if found is None:
        raise JobError("image-pull", f"the engine pulled {local} but does not have {ref.local}")
    return found


def from_mirror(docker: Docker, ref: Reference, params: dict[str, Any], config: Path, job: Job) -> dict[str, Any]:
    """Pulls by digest from a mirror, then lets the image have its own name. Raises JobError and DockerError."""
    digest = params["mirror_digest"]
    there = reference(f"{params['mirror']}/{ref.path}@{digest}")
    pull(docker, there, config, job)
    own = reference(f"{ref.name}@{digest}")
    name = there.local  # without internet Docker knows the digest by the mirror's name alone
    if params["internet"]:
        # Its layers are here: this asks for the manifest alone, and makes Docker know the digest by the own name. Where
        # it fails nothing is unchecked: Docker took the bytes by the digest that `check_mirror` went through.
        with contextlib.suppress(JobError, DockerError):
            pull(docker, own, config, job)
            name = own.local
    found = tagged(docker, ref, name)
    if name == own.local:
        docker.call("DELETE", f"/images/{urllib.parse.quote(there.local, safe='/:@')}?noprune=1")
    return {**describe(found, own), "mirror_failed": ""}


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "image": {"type": "str", "required": True},
            "status_file": {"type": "path", "default": "/run/sparkfleet/fetch/image.json"},
            "mirror": {"type": "str", "default": ""},
            "digest": {"type": "str", "default": ""},
            "mirror_digest": {"type": "str", "default": ""},
            "internet": {"type": "bool", "default": True},
            "state_dir": {"type": "path", "default": STATE_DIR},
            "docker_config": {"type": "path", "default": "/root/.docker/config.json"},
            "docker_socket": {"type": "path", "default": "/var/run/docker.sock"},
        },
        supports_check_mode=True,
    )
    params = module.params
    began = time.time()
    job: Job | None = None

    def fail(id: str, message: str) -> NoReturn:
        if job is not None:
            job.failed(id, message)
        module.fail_json(msg=message, failure=id, seconds=round(time.time() - began, 1))
        raise SystemExit(1)

    try:
        ref = reference(params["image"])
        docker = Docker(params["docker_socket"], timeout=60)
        difference = {"before": "", "after": f"image {params['image']}\n"}
        if module.check_mode:
            try:
                found = local_image(docker, ref)
            except DockerUnavailable:
                found = None  # an earlier task, which check mode has not run either, installs or starts it
            if found is not None:
                module.exit_json(changed=False, attached=False, seconds=0.0, **describe(found, ref))
            message = f"would pull {params['image']}"
            module.exit_json(changed=True, attached=False, seconds=0.0, msg=message, diff=difference)

        claim = Job(params["status_file"], "image", params["image"])
        holder = claim.acquire()
        if holder is not None:
            if holder["what"] != params["image"]:
                other = f"{holder['what']} (process {holder['pid']})"
                fail("fetch-busy", f"{other} is being pulled on this host; wait for it, then ask for {params['image']}")
            module.exit_json(changed=False, attached=True, holder_pid=holder["pid"], seconds=0.0)
        job = claim
        found = local_image(docker, ref)
        changed = found is None
        result = describe(found, ref) if found else bring(docker, ref, params, job)
        seconds = round(time.time() - began, 1)
        job.done({**result, "changed": changed, "seconds": seconds})
        if changed:
            module.exit_json(changed=True, attached=False, seconds=seconds, diff=difference, **result)
        module.exit_json(changed=False, attached=False, seconds=seconds, **result)
    except JobError as error:
        fail(error.id, str(error))
    except DockerError as error:
        fail("docker", f"image pull: {error}")
    except OSError as error:
        fail("disk-full" if error.errno == 28 else "fetch-io", f"image pull: {error}")


if __name__ == "__main__":
    main()
