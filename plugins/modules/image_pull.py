#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: a container image on a Spark, with progress that others can read."""

from __future__ import annotations

DOCUMENTATION = r"""
module: image_pull
short_description: Pull a container image, with progress in a status file
description:
  - Pulls through the Docker Engine API. An image that is present is left alone; its tag is not asked for again.
  - Only one pull of this kind runs at a time. A second job for the same image returns at once with attached=true;
    watch the status file (M(fetch_wait)) for its end.
  - When the job dies the engine ends the pull; finished layers stay, the next pull starts with the others.
options:
  image:
    description: NAME:TAG, NAME@sha256:DIGEST, or both.
    type: str
    required: true
  status_file:
    description: Where progress is written as JSON.
    type: path
    default: /run/sparkfleet/fetch/image.json
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
"""

EXAMPLES = r"""
- name: Pull the engine image in the background
  image_pull:
    image: nvcr.io/nvidia/vllm:25.09-py3
  async: "{{ ansible_check_mode | ternary(0, 7200) }}"
  poll: 0
  changed_when: ansible_check_mode and fetch_image.changed  # a launch always says changed; fetch_wait tells the truth
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
import binascii
import contextlib
import json
import re
import shutil
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.sparkfleet_host.docker import Docker, DockerError, DockerUnavailable
from ansible.module_utils.sparkfleet_host.job import Job, JobError

SILENCE = 1800.0  # seconds without a word from the engine; a huge layer may unpack for long
MANIFESTS = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)


@dataclass(frozen=True)
class Reference:
    """An image name taken apart; `registry` is the host, `path` the repository there."""

    name: str
    tag: str
    digest: str
    registry: str
    path: str

    @property
    def wanted(self) -> str:
        """What the API calls tag: the digest where there is one."""
        return self.digest or self.tag

    @property
    def local(self) -> str:
        """How the engine names it locally."""
        return f"{self.name}@{self.digest}" if self.digest else f"{self.name}:{self.tag}"


def reference(image: str) -> Reference:
    """Parse NAME[:TAG][@sha256:DIGEST]; raises JobError. A tag or digest is asked for, `latest` never assumed."""
    match = re.fullmatch(
        r"(?P<name>[a-zA-Z0-9][\w.-]*(?::\d+(?=/))?(?:/[a-z0-9][\w.-]*)*)"
        r"(?::(?P<tag>\w[\w.-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?",
        image,
    )
    if not match or not (match["tag"] or match["digest"]):
        raise JobError("bad-input", f"image {image!r} is not of the form NAME:TAG or NAME@sha256:DIGEST")
    name = match["name"]
    first, _, rest = name.partition("/")
    if rest and ("." in first or ":" in first or first == "localhost"):
        registry, path = first, rest
    else:
        registry, path = "docker.io", name if rest else f"library/{name}"
    return Reference(name, match["tag"] or "", match["digest"] or "", registry, path)


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


@dataclass
class Progress:
    """Adds up the engine's progress messages over all layers."""

    sizes: dict[str, int] = field(default_factory=dict)  # short id: compressed bytes, from the registry
    layers: dict[str, Layer] = field(default_factory=dict)

    def feed(self, event: dict[str, Any]) -> None:
        """One message of the stream: {"status", "id", "progressDetail": {"current", "total"}}."""
        status, id = str(event.get("status", "")), str(event.get("id", ""))
        detail = event.get("progressDetail") or {}
        if not id or not re.fullmatch(r"[0-9a-f]{12}", id):
            return
        layer = self.layers.setdefault(id, Layer())
        current, total = int(detail.get("current") or 0), int(detail.get("total") or 0)
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


def layer_sizes(ref: Reference, arch: str, info: dict[str, Any], auth: dict[str, str] | None) -> dict[str, int]:
    """Sizes of the layers by short id, from the registry's manifest. Best effort ({} on any trouble): the engine
    tells a layer's size only when it starts on it, too late for a total."""
    host = "registry-1.docker.io" if ref.registry == "docker.io" else ref.registry
    context = ssl.create_default_context()
    for authority in sorted(Path("/etc/docker/certs.d", ref.registry).glob("*.crt")):
        with contextlib.suppress(OSError):
            context.load_verify_locations(str(authority))
    proxies = {"http": info.get("HttpProxy") or "", "https": info.get("HttpsProxy") or ""}
    opener = urllib.request.build_opener(
        urllib.request.HTTPSHandler(context=context),
        urllib.request.ProxyHandler({kind: proxy for kind, proxy in proxies.items() if proxy}),
    )
    basic = ""
    if auth:
        basic = "Basic " + base64.b64encode(f"{auth['username']}:{auth['password']}".encode()).decode()
    header = {"Accept": ", ".join(MANIFESTS)}

    def fetch(url: str, headers: dict[str, str]) -> Any:
        with opener.open(urllib.request.Request(url, headers=headers), timeout=15) as answer:  # noqa: S310
            return json.load(answer)

    def manifest(scheme: str, wanted: str) -> dict[str, Any]:
        url = f"{scheme}://{host}/v2/{ref.path}/manifests/{wanted}"
        try:
            return dict(fetch(url, header))
        except urllib.error.HTTPError as error:
            challenge = error.headers.get("WWW-Authenticate", "")
            if error.code != 401:
                raise
            if challenge.lower().startswith("basic"):
                header["Authorization"] = basic
            else:
                given = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
                query = urllib.parse.urlencode({k: given[k] for k in ("service", "scope") if k in given})
                token = fetch(f"{given['realm']}?{query}", {"Authorization": basic} if basic else {})
                header["Authorization"] = f"Bearer {token.get('token') or token['access_token']}"
            return dict(fetch(url, header))

    index = ((info.get("RegistryConfig") or {}).get("IndexConfigs") or {}).get(ref.registry) or {}
    plain = index.get("Secure") is False or re.match(r"(127\.|localhost\b)", ref.registry)
    for scheme in ("https", "http") if plain else ("https",):
        try:
            found = manifest(scheme, ref.wanted)
            for entry in found.get("manifests", []):
                platform = entry.get("platform") or {}
                if platform.get("os") == "linux" and platform.get("architecture") == arch:
                    found = manifest(scheme, entry["digest"])
                    break
            return {layer["digest"].partition(":")[2][:12]: int(layer["size"]) for layer in found["layers"]}
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return {}


# -- credentials and failures ------------------------------------------------------------------------------


def credentials(config: Path, registry: str) -> dict[str, str] | None:
    """User and password that `docker login` left for a registry; None where there are none."""
    try:
        entries = json.loads(config.read_text("utf-8")).get("auths") or {}
        keys = [registry, f"https://{registry}", f"https://{registry}/v1/", f"https://{registry}/v2/"]
        if registry == "docker.io":
            keys.insert(0, "https://index.docker.io/v1/")
        for key in keys:
            if (entries.get(key) or {}).get("auth"):
                user, _, password = base64.b64decode(entries[key]["auth"]).decode().partition(":")
                return {"username": user, "password": password.rstrip("\0"), "serveraddress": key}
    except (OSError, ValueError, AttributeError, binascii.Error):
        return None
    return None


def explain(text: str, ref: Reference, room: str = "") -> JobError:
    """The failure behind an error message of the engine, with its remedy."""
    image, host, low = f"{ref.name}{'@' if ref.digest else ':'}{ref.wanted}", ref.registry, text.lower()

    def has(*signs: str) -> bool:
        return any(sign in low for sign in signs)

    if has("no space left on device", "disk quota exceeded"):
        where = f" ({room})" if room else ""
        return JobError("disk-full", f"no space for {image} in Docker's directory{where}; make room and run again")
    if has("no matching manifest", "does not match the specified platform"):
        return JobError("image-platform", f"{image} exists, but not for this host's architecture")
    if has("manifest unknown", "manifest for", "name unknown", "not found: manifest", ": not found"):
        return JobError("image-unknown", f"{host} has no {image}; check name and tag")
    if has("x509:", "certificate", "tls: ", "server gave http response to https"):
        return JobError(
            "registry-tls",
            f"{host} shows a certificate this host does not trust; install its CA as"
            f" /etc/docker/certs.d/{host}/ca.crt ({_short(text)})",
        )
    if has("toomanyrequests", "too many requests"):
        return JobError("registry-limit", f"{host} limits the number of pulls; wait, or log in: docker login {host}")
    if has("unauthorized", "denied", "authentication required", "no basic auth", "403 forbidden", "401 "):
        return JobError(
            "image-denied",
            f"{host} refuses {image}: log in with an account that may pull it (docker login {host}), check the name",
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
    return " ".join(text.split())[-200:]


def room(info: dict[str, Any]) -> str:
    """Docker's directory and its free space, for a message; empty if unknown."""
    root = str(info.get("DockerRootDir") or "")
    try:
        return f"{root}, {shutil.disk_usage(root).free / 1e9:.1f} GB free"
    except OSError:
        return root


# -- the pull ----------------------------------------------------------------------------------------------


def describe(image: dict[str, Any], ref: Reference) -> dict[str, Any]:
    """id, digest and size of an image as inspected."""
    digests = [str(entry) for entry in image.get("RepoDigests") or []]
    mine = [entry for entry in digests if entry.partition("@")[0] == ref.name] or digests
    return {
        "id": image.get("Id", ""),
        "digest": ref.digest or (mine[0].partition("@")[2] if mine else ""),
        "size": int(image.get("Size") or 0),
    }


def pull(docker: Docker, ref: Reference, config: Path, job: Job) -> dict[str, Any]:
    """Pulls, telling `job`; what `describe` says afterwards. Raises JobError and DockerError."""
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


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "image": {"type": "str", "required": True},
            "status_file": {"type": "path", "default": "/run/sparkfleet/fetch/image.json"},
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
                found = docker.image(ref.local)
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
        found = docker.image(ref.local)
        changed = found is None
        result = describe(found, ref) if found else pull(docker, ref, Path(params["docker_config"]), job)
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
