#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: a Hugging Face model, complete and checked, in a Spark's cache."""

from __future__ import annotations

DOCUMENTATION = r"""
module: model_download
short_description: Download a Hugging Face model at a revision into the cache of a Spark
description:
  - Runs the huggingface_hub client in a short-lived container that needs no image of its own. Its root file
    system is empty but for links, and the host's /usr (with the host's Python) is mounted read-only. So it can run
    while the image of the engine is still being pulled.
  - Downloads are resumed, even after the process or the host died. Every file is checked against the Hub's
    size and checksum; a manifest under CACHE_DIR/.sparkfleet is written last and marks the model complete.
  - A complete model is left unchanged without asking the Hub. One marked suspect (by a failed hash check or a
    nonsensical answer) is hashed first; damaged files are fetched again, at the existing commit. A branch or tag is
    resolved on its first download.
  - Only one download runs at a time. A second job for the same model returns at once with attached=true; watch the
    status file (the action C(sparkfleet.dgx.fetch_wait)) for its end.
options:
  repo:
    description: Repository on the Hub, ORG/NAME.
    type: str
    required: true
  revision:
    description: Branch, tag or commit.
    type: str
    default: main
  cache_dir:
    description: Cache folder (HF_HUB_CACHE), an existing directory.
    type: path
    default: /opt/hf
  client:
    description: The packed client on the Spark, made by sparkfleet.packaging.hub_client.
    type: path
    default: /opt/sparkfleet/lib/hf_client.pyz
  token_file:
    description: File with the Hugging Face token; used if it exists and is not empty; this module never reads it.
    type: path
    default: /etc/sparkfleet/hf_token
  environment:
    description: >-
      Additional environment variables for the client, such as HF_ENDPOINT or HTTPS_PROXY; empty ones are left out. No
      secrets.
    type: dict
    default: {}
  peer:
    description: >-
      Address of another Spark's service on the loopback interface to try first, see
      M(sparkfleet.dgx.share). If it fails, the Hub is used.
    type: str
    default: ""
  expected:
    description:
      - What the Hub has for this revision, as seen by the controller (commit; files, each with size and sha256
        or sha1). Anything else offered by another Spark or the Hub is refused (C(model-differs)).
      - With C(locked) it is what a lock has (C(lock-mismatch)); a model that is complete by another list is checked
        again, file by file.
      - Empty if the controller does not know it. What another Spark offers is then not verified.
    type: dict
    default: {}
  internet:
    description: Whether the Hub may be used at all; with V(false) the other Spark must have the model.
    type: bool
    default: true
  check_hashes:
    description: Hash every file of a complete model, and fetch damaged ones again.
    type: bool
    default: false
  allow:
    description: Only files that match one of these patterns.
    type: list
    elements: str
    default: []
  ignore:
    description:
      - No files that match one of these patterns.
      - By default, where the repository has safetensors, other copies of the weights such as C(*.bin), C(*.pt),
        C(*.pth), C(*.h5), C(*.msgpack), C(*.onnx), C(*.gguf), C(original/*) and C(consolidated*).
      - No code (C(*.py)) either, without O(remote_code).
    type: list
    elements: str
  remote_code:
    description: Also download the code of the repository, which vLLM runs only with trust_remote_code.
    type: bool
    default: false
  weights:
    description:
      - Whether to download the weights. With V(false) only configuration and tokenizer are fetched, some megabytes,
        which is enough for an engine with dummy weights. The model does not count as complete then, and a later
        download of all of it takes what is there.
    type: bool
    default: true
  pickle:
    description: >-
      Weights may be pickles, which run code when they are loaded, where the repository has no safetensors. Refused by
      default (C(weights-pickle)), unless O(ignore) is given.
    type: bool
    default: false
  memory:
    description: Memory limit of the container in bytes; its page cache counts and is reclaimed.
    type: int
    default: 2147483648
  workers:
    description: Files downloaded at the same time.
    type: int
    default: 4
  network:
    description: Docker network of the container.
    type: str
    default: bridge
  status_file:
    description: Where progress is written as JSON.
    type: path
    default: /run/sparkfleet/fetch/model.json
  docker_socket:
    description: Socket of the Docker engine.
    type: path
    default: /var/run/docker.sock
author: ["The Sparkfleet developers"]
attributes:
  check_mode:
    support: full
    description: Reports from the disk whether it would download; does not ask the Hub.
"""

EXAMPLES = r"""
- name: Download the model while the image is pulled
  sparkfleet.dgx.model_download:
    repo: nvidia/Llama-3.1-8B-Instruct-FP8
    revision: main
  async: "{{ ansible_check_mode | ternary(0, 7200) }}"
  poll: 0
  # A launch always reports changed; fetch_wait has the real result.
  changed_when: ansible_check_mode and fetch_model.changed
  register: fetch_model
"""

RETURN = r"""
commit:
  description: Commit of the revision; null in check mode where it is not known yet.
  returned: unless attached
  type: str
snapshot:
  description: Folder of the snapshot.
  returned: unless attached
  type: str
files:
  description: How many files.
  returned: after a download
  type: int
bytes:
  description: Size of the model.
  returned: unless attached
  type: int
downloaded:
  description: Bytes that were not on this disk before.
  returned: after a download
  type: int
model_bytes:
  description: Size of the whole model, also where its weights were left out; null where it is not known.
  returned: unless attached
  type: int
peer_failed:
  description: Why the other Spark failed; empty if it worked or none was given.
  returned: after a download
  type: str
seconds:
  description: How long the job took.
  returned: always
  type: float
attached:
  description: Another job already downloads this model; nothing was done here.
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

import contextlib
import io
import json
import os
import signal
import stat
import sys
import tarfile
import time
from collections import deque
from pathlib import Path
from typing import Any, NoReturn

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.bounded import (
    COMMIT,
    BoundsError,
    as_int,
)
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.cache import (
    check_listing,
    clear_suspicion,
    config_path,
    listing_digest,
    manifest_path,
    mark_suspect,
    model_state,
    read_manifest,
    repo_folder,
    valid_repo,
    valid_revision,
)
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.docker import Docker, DockerError
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.integrity import verify_model
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.job import Job, JobError
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.redaction import passwords
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.trust import CA_BUNDLE

IMAGE = "sparkfleet/host-python:1"
CONTAINER = "sparkfleet-fetch"
TRUST = ("/etc/ssl/certs", "/etc/ssl/openssl.cnf", "/etc/ca-certificates")  # not /etc/ssl/private
TOKEN = "/run/secrets/hf_token"  # noqa: S105  a path, not a token
CLIENT = "/hf_client.pyz"
EXPECTED = "/run/expected.json"
MERGED = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")


def root_tar() -> bytes:
    """The root file system as a tar: the host's links into /usr, empty folders, and name resolution by DNS."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:

        def add(name: str, kind: bytes, link: str = "", content: bytes = b"", mode: int = 0o755) -> None:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname, entry.mode, entry.size = kind, link, mode, len(content)
            tar.addfile(entry, io.BytesIO(content))

        for name in ("dev", "etc", "etc/ssl", "etc/ssl/certs", "opt", "proc", "run", "run/secrets", "sys"):
            add(name, tarfile.DIRTYPE)
        for name in ("tmp", "usr"):
            add(name, tarfile.DIRTYPE, mode=0o1777 if name == "tmp" else 0o755)
        for name in MERGED:
            here = Path("/", name)
            if here.is_symlink():
                add(name, tarfile.SYMTYPE, str(here.readlink()))
        for name, text in {
            "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
            "etc/passwd": "root:x:0:0:root:/tmp:/usr/sbin/nologin\n",
            "etc/group": "root:x:0:\n",
            "etc/hosts": "",
            "etc/hostname": "",
            "etc/resolv.conf": "",
            CLIENT.lstrip("/"): "",
        }.items():
            add(name, tarfile.REGTYPE, content=text.encode(), mode=0o644)
    return buffer.getvalue()


def python() -> str:
    """The host's Python as the container sees it (only /usr is there)."""
    mine = os.path.realpath(sys.executable)
    return mine if mine.startswith("/usr/bin/") else os.path.realpath("/usr/bin/python3")


def command(params: dict[str, Any]) -> list[str]:
    """The client's command line; -I -S -B: nothing but the standard library and the packed client."""
    argv = [python(), "-I", "-S", "-B", CLIENT, "--repo", params["repo"], "--revision", params["revision"]]
    argv += ["--cache-dir", params["cache_dir"], "--workers", str(params["workers"])]
    for pattern in params["allow"]:
        argv.append(f"--allow={pattern}")
    if params.get("remote_code"):
        argv.append("--remote-code")
    if not params.get("weights", True):
        argv.append("--without-weights")
    if params.get("pickle"):
        argv.append("--pickle")
    if params["ignore"] == []:
        argv.append("--ignore-nothing")
    for pattern in params["ignore"] or []:
        argv.append(f"--ignore={pattern}")
    if params.get("expected"):
        argv += ["--expected", EXPECTED]
    return argv


def expected_file(params: dict[str, Any]) -> Path:
    """Where the list that is expected lies while the container runs."""
    return Path(params["status_file"]).with_name("model.expected.json")


def write_expected(params: dict[str, Any]) -> None:
    """The list for the container; none is left of another run."""
    place = expected_file(params)
    place.unlink(missing_ok=True)
    if params.get("expected"):
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with os.fdopen(os.open(place, flags, 0o644), "w", encoding="utf-8") as file:
            file.write(json.dumps(params["expected"]))


def container_spec(params: dict[str, Any]) -> dict[str, Any]:
    """The body of POST /containers/create. The token is a mounted file, never an argument or a variable."""

    def bind(source: str, target: str, read_only: bool = True) -> dict[str, Any]:
        return {"Type": "bind", "Source": source, "Target": target, "ReadOnly": read_only}

    mounts = [
        bind("/usr", "/usr"),
        bind(params["client"], CLIENT),
        bind(params["cache_dir"], params["cache_dir"], False),
    ]
    mounts += [bind(path, path) for path in TRUST if Path(path).exists()]
    if params.get("expected"):
        mounts.append(bind(str(expected_file(params)), EXPECTED))
    environment = {
        "HOME": "/tmp",  # noqa: S108  a tmpfs of this container alone
        "HF_HOME": "/tmp/hf",  # noqa: S108
        "LANG": "C.UTF-8",
        "PATH": "/usr/bin:/bin",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    }
    if Path(CA_BUNDLE).exists():
        environment.update(SSL_CERT_FILE=CA_BUNDLE, REQUESTS_CA_BUNDLE=CA_BUNDLE)
    environment.update({str(k): str(v) for k, v in params["environment"].items() if v not in (None, "")})
    if has_token(params["token_file"]):
        mounts.append(bind(params["token_file"], TOKEN))
        environment["HF_TOKEN_PATH"] = TOKEN
    return {
        "Image": IMAGE,
        "Cmd": command(params),
        "Env": [f"{key}={value}" for key, value in sorted(environment.items())],
        "WorkingDir": "/tmp",  # noqa: S108
        "User": "0:0",
        "Labels": {"sparkfleet.role": "fetch", "sparkfleet.repo": params["repo"]},
        "HostConfig": {
            "Mounts": mounts,
            "Tmpfs": {"/tmp": "rw,nosuid,nodev,size=64m,mode=1777"},  # noqa: S108
            "ReadonlyRootfs": True,
            "CapDrop": ["ALL"],
            "CapAdd": ["DAC_OVERRIDE"],  # the cache may belong to the operator
            "SecurityOpt": ["no-new-privileges"],
            "Memory": params["memory"],
            "PidsLimit": 256,
            "NetworkMode": params["network"],
            "LogConfig": {"Type": "json-file", "Config": {"max-size": "5m"}},
        },
    }


def has_token(path: str) -> bool:
    """Whether there is a token to mount; its content is not read."""
    try:
        return Path(path).stat().st_size > 0 and Path(path).is_file()
    except OSError:
        return False


def run_client(docker: Docker, params: dict[str, Any], job: Job) -> dict[str, Any]:
    """Runs the container to its end and removes it; what the client returned. Raises JobError, DockerError."""
    if docker.image(IMAGE) is None:
        repository, _, tag = IMAGE.partition(":")
        for event in docker.stream(
            "POST", f"/images/create?fromSrc=-&repo={repository}&tag={tag}", body=root_tar(), timeout=120
        ):
            if "error" in event:
                raise DockerError(f"import of {IMAGE}: {event['error']}")
    remove(docker)
    write_expected(params)
    docker.call("POST", f"/containers/create?name={CONTAINER}", container_spec(params))
    result: dict[str, Any] | None = None
    error: dict[str, str] | None = None
    other: deque[str] = deque(maxlen=10)
    try:
        docker.call("POST", f"/containers/{CONTAINER}/start")
        for line in docker.frames(f"/containers/{CONTAINER}/logs?follow=1&stdout=1&stderr=1", tty=False):
            event = parse(line)
            if "progress" in event:
                progress = event["progress"]
                job.update(progress["phase"], progress["done"], progress["total"] or None)
            elif "result" in event:
                result = event["result"]
            elif "error" in event:
                error = event["error"]
            elif line.strip():
                other.append(line.strip())
        state = (docker.container(CONTAINER) or {}).get("State") or {}
    finally:
        remove(docker)
    if error:
        where = f" (file {params['token_file']})" if error["id"] == "hub-token-missing" else ""
        raise JobError(error["id"], error["message"] + where)
    if result is None:
        raise JobError("fetch-died", died(params, state, other))
    return result


def fetch(docker: Docker, params: dict[str, Any], job: Job) -> dict[str, Any]:
    """Downloads from another Spark, if one is named, else from the Hub. What has arrived is not asked for again."""
    reason = ""
    if params["peer"]:
        # On the loopback interface, so in the host's network; a file may still be on its way to the other Spark.
        there = {"HF_ENDPOINT": params["peer"], "HF_HUB_DOWNLOAD_TIMEOUT": "180", "HF_HUB_ETAG_TIMEOUT": "120"}
        try:
            ways = {"environment": there, "network": "host", "token_file": ""}
            expected = params["expected"] or params.get("known") or {}
            result = run_client(docker, {**params, **ways, "expected": expected}, job)
            return {**result, "peer_failed": ""}
        except JobError as error:
            reason = str(error)
            if expected and error.id in ("hub-repo-unknown", "hub-revision-unknown"):
                commit = expected["commit"]
                reason = f"the other Spark does not have commit {commit} of {params['revision']}"
            if error.id in ("model-differs", "lock-mismatch"):
                reason += "; check the Spark that offered it"
            if error.id == "disk-full" or not params["internet"]:
                raise JobError(error.id, reason) from None
    if not params["internet"]:
        raise JobError(
            "bundle", f"neither this host nor another Spark serves {params['repo']}, and the internet must not be used"
        )
    return {**run_client(docker, params, job), "peer_failed": reason}


def current_state(params: dict[str, Any]) -> dict[str, Any]:
    """What the cache has of the model, see `model_state`."""
    code = bool(params.get("remote_code"))
    state: dict[str, Any] = model_state(params["cache_dir"], params["repo"], params["revision"], code)
    expected = params.get("expected") or {}
    if expected.get("locked") and state["listing"] != listing_digest(expected["files"], code):
        state["complete"] = False  # by a list that is not the lock's
    return state


def enough(params: dict[str, Any], state: dict[str, Any]) -> bool:
    """Whether the cache has what is asked for."""
    return bool(state["complete"] or (not params["weights"] and state["config"]))


def model_bytes(params: dict[str, Any], state: dict[str, Any]) -> int | None:
    """The size of the whole model, as far as the cache knows it."""
    if state["total_bytes"] is not None or not state["commit"]:
        known: int | None = state["total_bytes"]
        return known
    try:
        listing = read_manifest(config_path(params["cache_dir"], params["repo"], state["commit"]))
        size: int = as_int(listing.get("model_bytes"), "model_bytes")
        return size
    except (OSError, BoundsError):
        return None


def hashed(params: dict[str, Any], state: dict[str, Any], job: Job) -> dict[str, Any]:
    """The state, once every file of a suspect model (or of any, where that is asked for) was hashed: a sound one is
    complete, a damaged one is marked, and is fetched."""
    commit, where = state["commit"], (params["cache_dir"], params["repo"])
    if (
        not params["weights"]
        or not commit
        or state["missing"]
        or not (state["suspect"] or (params["check_hashes"] and state["complete"]))
    ):
        return state
    done = 0

    def tick(size: int) -> None:
        nonlocal done
        done += size
        job.update("checking", done, state["total_bytes"])

    found = verify_model(*where, commit, share=1.0, tick=tick)
    wrong = [*found["damaged"], *found["missing"]]
    if not wrong and not found["error"]:
        clear_suspicion(*where, commit)
        return current_state(params)
    reason = f"damaged: {', '.join(wrong[:3])}" if wrong else str(found["error"])
    mark_suspect(*where, commit, reason, wrong)
    return {**state, "complete": False, "suspect": reason}


def known(params: dict[str, Any], commit: str) -> dict[str, Any]:
    """The list of a model that was complete here once; {} where it is damaged."""
    try:
        found = read_manifest(manifest_path(params["cache_dir"], params["repo"], commit))
        return check_expected({"commit": commit, "files": found["files"]})
    except (OSError, BoundsError):
        return {}


def check_expected(value: dict[str, Any]) -> dict[str, Any]:
    """A list of commit and files, each with a hash, or {}. Raises BoundsError for what is neither."""
    if not value:
        return {}
    listing: dict[str, Any] = check_listing(value, "expected")
    if "commit" not in listing or not listing["files"]:
        raise BoundsError("expected: without a commit or without files")
    for name, entry in listing["files"].items():
        if not {"sha256", "sha1"} & entry.keys():
            raise BoundsError(f"expected: {name} has no hash")
    return listing


def died(params: dict[str, Any], state: dict[str, Any], lines: deque[str]) -> str:
    """Why a container ended without reporting a result."""
    if state.get("OOMKilled"):
        return f"the download of {params['repo']} exceeded its {params['memory'] >> 20} MiB; raise its memory limit"
    last = f"; last output: {' | '.join(list(lines)[-3:])[:400]}" if lines else ""
    code = state.get("ExitCode", "unknown")
    return f"the download of {params['repo']} was stopped (exit code {code}); run again, it resumes{last}"


def parse(line: str) -> dict[str, Any]:
    """A JSON line of the client; {} for anything else."""
    try:
        value = json.loads(line) if line.startswith("{") else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def remove(docker: Docker) -> None:
    """Removes the container, running or not; that of a dead job included (the lock says it is dead)."""
    docker.request("DELETE", f"/containers/{CONTAINER}?force=1&v=1")


def give_to_owner(cache_dir: Path, repo: str) -> None:
    """What the container wrote as root goes to the owner of the cache folder. Others may write there: no link is
    followed, and a file that has another name elsewhere (a hard link) is left alone."""
    owner = cache_dir.stat()
    if owner.st_uid == 0:
        return

    def give(name: str, folder: int) -> None:
        about = os.stat(name, dir_fd=folder, follow_symlinks=False)
        alone = about.st_nlink == 1 or stat.S_ISDIR(about.st_mode)
        if about.st_uid == 0 and alone:
            os.chown(name, owner.st_uid, owner.st_gid, dir_fd=folder, follow_symlinks=False)

    top = os.open(cache_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in (repo_folder(repo), ".sparkfleet", ".locks"):
            with contextlib.suppress(FileNotFoundError):
                give(name, top)
            # A link in place of a folder is not walked, here and below.
            for _, folders, files, place in os.fwalk(name, dir_fd=top, follow_symlinks=False):
                for child in (*folders, *files):
                    with contextlib.suppress(FileNotFoundError):
                        give(child, place)
    finally:
        os.close(top)


def check(params: dict[str, Any]) -> None:
    """Refuses what cannot work, before anything is done."""
    if not valid_repo(params["repo"]):
        raise JobError("bad-input", f"repo {params['repo']!r} is not of the form ORG/NAME")
    if not valid_revision(params["revision"]):
        raise JobError("bad-input", f"revision {params['revision']!r} is not a branch, tag or commit")
    try:
        commit = check_expected(params["expected"]).get("commit", params["revision"])
    except BoundsError as error:
        raise JobError("bad-input", str(error)) from None
    if COMMIT.fullmatch(params["revision"]) and commit != params["revision"]:
        raise JobError("model-differs", f"{params['repo']}: commit {commit} instead of {params['revision']}")


def check_host(params: dict[str, Any]) -> None:
    if not Path(params["cache_dir"]).is_dir():
        raise JobError("bad-input", f"cache_dir {params['cache_dir']} is not a directory; run the prepare stage")
    if not Path(params["client"]).is_file():
        raise JobError("bad-input", f"client {params['client']} is missing; copy hf_client.pyz there first")
    if os.statvfs(params["cache_dir"]).f_flag & os.ST_RDONLY:
        raise JobError(
            "cache-read-only",
            f"{params['cache_dir']} is read-only: see `findmnt -T {params['cache_dir']}` and `dmesg`; mount it "
            "writable, then run again",
        )


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "repo": {"type": "str", "required": True},
            "revision": {"type": "str", "default": "main"},
            "cache_dir": {"type": "path", "default": "/opt/hf"},
            "client": {"type": "path", "default": "/opt/sparkfleet/lib/hf_client.pyz"},
            "token_file": {"type": "path", "default": "/etc/sparkfleet/hf_token", "no_log": False},
            "environment": {"type": "dict", "default": {}},
            "peer": {"type": "str", "default": ""},
            "expected": {"type": "dict", "default": {}},
            "internet": {"type": "bool", "default": True},
            "check_hashes": {"type": "bool", "default": False},
            "allow": {"type": "list", "elements": "str", "default": []},
            "ignore": {"type": "list", "elements": "str"},
            "remote_code": {"type": "bool", "default": False},
            "weights": {"type": "bool", "default": True},
            "pickle": {"type": "bool", "default": False},
            "memory": {"type": "int", "default": 2 << 30},
            "workers": {"type": "int", "default": 4},
            "network": {"type": "str", "default": "bridge"},
            "status_file": {"type": "path", "default": "/run/sparkfleet/fetch/model.json"},
            "docker_socket": {"type": "path", "default": "/var/run/docker.sock"},
        },
        supports_check_mode=True,
    )
    params = module.params
    module.no_log_values.update(passwords(*map(str, params["environment"].values())))
    began = time.time()
    what = f"{params['repo']}@{params['revision']}" + ("" if params["weights"] else " without weights")
    job: Job | None = None

    def fail(id: str, message: str) -> NoReturn:
        if job is not None:
            job.failed(id, message)
        module.fail_json(msg=message, failure=id, seconds=round(time.time() - began, 1))
        raise SystemExit(1)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that `finally` removes the container
    try:
        check(params)
        state = current_state(params)
        result = {"commit": state["commit"], "snapshot": state["path"], "bytes": state["bytes"], "attached": False}
        result["model_bytes"] = model_bytes(params, state)
        difference = {"before": "", "after": f"{what} in {params['cache_dir']}\n"}
        if module.check_mode:
            if enough(params, state) and not params["check_hashes"]:
                module.exit_json(changed=False, seconds=0.0, **result)
            message = f"would download {what} into {params['cache_dir']}"
            module.exit_json(changed=True, msg=message, diff=difference, seconds=0.0, **result)

        claim = Job(params["status_file"], "model", what)
        holder = claim.acquire()
        if holder is not None:
            if holder["what"] != what:
                other = f"{holder['what']} (process {holder['pid']})"
                fail("fetch-busy", f"{other} is being downloaded on this host; wait for it, then ask for {what}")
            module.exit_json(changed=False, attached=True, holder_pid=holder["pid"], seconds=0.0)
        job = claim
        # Again, now that no one else writes: an earlier job may just have finished.
        state = hashed(params, current_state(params), job)
        if enough(params, state):
            result = {"commit": state["commit"], "snapshot": state["path"], "bytes": state["bytes"]}
            result["model_bytes"] = model_bytes(params, state)
            job.update("downloading", state["bytes"], state["bytes"])
            changed = False
        else:
            check_host(params)
            if params["weights"] and state["commit"] and state["suspect"]:
                # What is damaged is fetched again, of the commit that is there; a branch may have moved on.
                # Another Spark must then have what this one had.
                params = {**params, "revision": state["commit"], "known": known(params, state["commit"])}
                if params["expected"].get("commit") != state["commit"]:
                    params["expected"] = {}
            result = fetch(Docker(params["docker_socket"], timeout=60), params, job)
            result["snapshot"] = result.pop("path")
            give_to_owner(Path(params["cache_dir"]), params["repo"])
            changed = True
        seconds = round(time.time() - began, 1)
        job.done({**result, "changed": changed, "seconds": seconds})
        if changed:
            module.exit_json(changed=True, attached=False, seconds=seconds, diff=difference, **result)
        module.exit_json(changed=False, attached=False, seconds=seconds, **result)
    except JobError as error:
        fail(error.id, str(error))
    except DockerError as error:
        fail("docker", f"model download: {error}")
    except OSError as error:
        fail("disk-full" if error.errno == 28 else "fetch-io", f"model download: {error}")


if __name__ == "__main__":
    main()
