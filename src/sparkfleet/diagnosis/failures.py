# SPDX-License-Identifier: Apache-2.0
"""The table of failures: how each one shows, why it happens, and what to do.

Preflight, fetch, the wait for readiness, verification and the docs read it. `python -m sparkfleet.diagnosis.failures`
prints it as Markdown. Order matters: of two entries that match the same log, the earlier one is reported first.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence

from sparkfleet.diagnosis.startup_log import plain, split_stamp

# Chapters of the guide's "Troubleshooting".
MEMORY = "Container Fails with Memory Errors"
FP8 = "FP8 Quantization Fails"
LICENCE = "Model Download Requires License Acceptance"
INCOMPLETE = "Model Download Incomplete"
CAPABILITY = '"Compute Capability 12.1" Warning'
THROUGHPUT = "Lower Than Expected Throughput"


@dataclasses.dataclass(frozen=True)
class Failure:
    """One known failure.

    `id` is what results and tests name. `signature` has regular expressions over single log lines or messages of
    Docker; `statuses` are the Hub's HTTP codes, `exit_codes` the container's. `unless` names entries that explain the
    same lines better. `harmless`: seen in the log of an engine that works. `chapter` is the guide's, "" if it has none.
    `auto_recovery`: what fixes it automatically, and how; "" for nothing.
    """

    id: str
    title: str
    cause: str
    remedy: str
    signature: tuple[str, ...] = ()
    statuses: tuple[int, ...] = ()
    exit_codes: tuple[int, ...] = ()
    unless: tuple[str, ...] = ()
    harmless: bool = False
    chapter: str = ""
    auto_recovery: str = ""


@dataclasses.dataclass(frozen=True)
class Finding:
    """A table entry and the lines that matched it (none for an exit code, a status or a fact)."""

    failure: Failure
    lines: tuple[str, ...] = ()

    @property
    def message(self) -> str:
        """What failed, why, and what to do, in one or two sentences."""
        return f"{self.failure.title}: {self.failure.cause}. {self.failure.remedy}"


TABLE: tuple[Failure, ...] = (
    # -- the engine's start: memory ---------------------------------------------------------------------------
    Failure(
        "memory-refused",
        "vLLM refused to start for lack of free memory",
        "less memory is free than gpu_memory_utilization asks for; memory is shared with the CPU, and vLLM 0.10.1.1 "
        "counts the page cache as used",
        "Stop whatever else uses memory on the host and deploy again (the page cache is dropped just before the "
        "start), or lower gpu_memory_utilization. A smaller max_model_len or `docker system prune` does not help.",
        (r"Free memory on device .*is less than desired", r"Free memory on device .*is less than the engine's budget"),
        chapter=MEMORY,
        auto_recovery="every start by a switch or the guard drops the page cache first",
    ),
    Failure(
        "memory-profiling",
        "vLLM failed while profiling memory",
        "memory was freed during the measurement: another process ended, or the page cache was dropped",
        "Deploy again while nothing else is starting or stopping on the host.",
        (r"Error in memory profiling", r"AssertionError: .*[Ii]nitial free memory"),
        chapter=MEMORY,
        auto_recovery="the guard restarts it, up to its limit",
    ),
    Failure(
        "kv-cache-too-small",
        "no room for the KV cache",
        "the memory that the weights leave within gpu_memory_utilization cannot hold one request of max_model_len "
        "tokens",
        "Raise gpu_memory_utilization, or lower max_model_len or max_num_batched_tokens.",
        (
            r"larger than the available KV cache memory",
            r"No available memory for the cache blocks",
            r"is larger than the maximum number of tokens that can be stored in KV cache",
            r"Available memory on node .* is less than requested memory for kv",
        ),
        chapter=MEMORY,
    ),
    Failure(
        "out-of-memory",
        "the engine ran out of memory",
        "weights, activations and KV cache need more than the host has; on a Spark GPU and CPU share it",
        "Lower gpu_memory_utilization or max_num_batched_tokens, and stop whatever else uses memory on the host.",
        (
            r"OutOfMemoryError",
            r"CUDA out of memory",
            r"CUDA error: out of memory",
            r"NV_ERR_NO_MEMORY",
            r"\bMemoryError\b",
        ),
        chapter=MEMORY,
    ),
    Failure(
        "shared-memory-small",
        "the container's shared memory is too small",
        "Docker's default size for /dev/shm is 64 MiB",
        "Give the service `ipc: host`, as Sparkfleet's compose file does.",
        (r"Insufficient space in /dev/shm", r"insufficient shared memory", r"No space left on device: '/dev/shm"),
    ),
    # -- the engine's start: kernels and GPU -------------------------------------------------------------------
    Failure(
        "triton-sm121a",
        "the image cannot compile for the GB10 (sm_121a)",
        "the ptxas bundled with Triton is older than the GPU",
        "Use NVIDIA's image (nvcr.io/nvidia/vllm:25.09-py3 or later); vllm/vllm-openai works on a Spark from 2026 on.",
        (
            r"'sm_121a?' is not defined for option",
            r"PTXASError",
            r"not supported on \.target 'sm_121",
            r"Internal Triton PTX codegen error",
        ),
    ),
    Failure(
        "fp8-cutlass",
        "an FP8 kernel failed",
        "the image's CUTLASS kernels do not support the GB10, or --quantization fp8 was set for a model that is not "
        "FP8",
        "Use NVIDIA's image and a model that is already quantized (such as those in the catalogue), without "
        "--quantization fp8.",
        (r"cutlass_scaled_mm", r"cutlass_gemm_caller", r"RuntimeError: Error Internal", r"No compiled cutlass"),
        chapter=FP8,
    ),
    Failure(
        "kernel-image-missing",
        "the image has no kernels for this GPU",
        "it was built without compute capability 12.1",
        "Use NVIDIA's image (nvcr.io/nvidia/vllm:25.09-py3 or later).",
        (r"no kernel image is available for execution",),
        unless=("triton-sm121a",),
    ),
    Failure(
        "driver-too-old",
        "the GPU driver is too old for the image",
        "the image's CUDA is newer than the driver supports",
        "Update DGX OS (driver 580 or later for CUDA 13), or use an older image. Keep the image's entry point: it "
        "enables CUDA forward compatibility.",
        (
            r"CUDA driver version is insufficient",
            r"NVIDIA driver on your system is too old",
            r"unsatisfied condition: cuda",
            r"cudaErrorUnsupportedPtxVersion",
            r"provided PTX was compiled with an unsupported toolchain",
        ),
    ),
    Failure(
        "nvidia-runtime-missing",
        "Docker cannot give the container a GPU",
        "the NVIDIA Container Toolkit is missing or Docker does not know its runtime",
        "Run playbooks/prepare.yml: it installs the toolkit, configures Docker with nvidia-ctk and restarts it.",
        (
            r'could not select device driver "?(?:nvidia)?"? with capabilities',
            r"unknown or invalid runtime name: nvidia",
            r"nvidia-container-cli: ",
            r"error running prestart hook.*nvidia",
        ),
    ),
    Failure(
        "gpu-lost",
        "the GPU no longer responds",
        "it fell off the bus or its driver lost it (Xid 79, 119 and 120 in the kernel log); only a reboot of "
        "the host brings it back",
        "Reboot the host; if it happens again, update DGX OS and its firmware, then contact NVIDIA with the Xid lines "
        "from `journalctl -k`.",
        (
            r"No devices were found",
            r"GPU is lost",
            r"GPU has fallen off the bus",
            r"Unable to determine the device handle",
            r"\bXid\b.*: (?:79|119|120)\b",
        ),
    ),
    Failure(
        "gpu-xid",
        "the driver reported a GPU error",
        "an Xid in the kernel log: 13, 31 and 45 come from the application, 48, 63, 64, 94 and 95 from memory, others "
        "from the driver or hardware",
        "Look the number up in NVIDIA's list of Xid errors. If the engine serves, just watch whether it recurs; "
        "otherwise restart the engine, then reboot the host.",
        (r"\bXid\b.*: \d+",),
        unless=("gpu-lost",),
        auto_recovery="the guard restarts an engine that crashes or hangs because of it, up to its limit",
    ),
    Failure(
        "gpu-invisible",
        "the container sees no GPU",
        "it was started without one, or the driver on the host does not respond",
        "Check nvidia-smi on the host; deploy again so that the service reserves the GPU.",
        (
            r"No CUDA GPUs are available",
            r"Failed to infer device type",
            r"Found no NVIDIA driver",
            r"NVML.*(?:Driver Not Loaded|Unknown Error)",
            r"libcuda\.so\S*: cannot open shared object",
        ),
    ),
    Failure(
        "capability-warning",
        "warning about compute capability 12.1",
        "PyTorch was built before the GB10 was supported; its kernels for 12.0 run on 12.1",
        "Nothing to do.",
        (
            r"is of (?:cuda|compute) capability (?:\(CC\) )?12\.1",
            r"Maximum cuda capability supported",
        ),
        harmless=True,
        chapter=CAPABILITY,
    ),
    # -- the engine's start: files and arguments ---------------------------------------------------------------
    Failure(
        "disk-full",
        "a disk is full",
        "image, model and compile caches need more space than is free",
        "Free some space (see `docker system df` and `du -sh /opt/hf/*`), or set sparkfleet_cache_dir to a "
        "larger disk, and run again: downloads resume.",
        (r"[Nn]o space left on device", r"\bENOSPC\b", r"[Dd]isk quota exceeded"),
        chapter=INCOMPLETE,
    ),
    Failure(
        "download-incomplete",
        "the model's files are incomplete or damaged",
        "a download was interrupted, or a copy was incomplete",
        "Run playbooks/fetch.yml: it checks every file against the pinned revision and fetches what is missing. "
        "Partial files are /opt/hf/models--ORG--NAME/blobs/*.incomplete; delete none while a download runs.",
        (
            r"SafetensorError",
            r"MetadataIncompleteBuffer",
            r"incomplete metadata, file not fully covered",
            r"Cannot find any model weights",
            r"PytorchStreamReader failed",
            r"[Cc]onsistency check failed",
            r"Weight files referenced in index but missing",
            r"weights were not initialized from checkpoint",
        ),
        chapter=INCOMPLETE,
        auto_recovery="playbooks/fetch.yml checks every file and fetches the damaged ones again",
    ),
    Failure(
        "models-unchecked",
        "some models in the cache are not checked",
        "a check covers 256 models, and the cache has manifests for more; anyone who can write to it can add any "
        "number",
        "Remove the directories of models you do not recognise from /opt/hf/.sparkfleet; `systemctl start "
        "sparkfleet-integrity` on the host checks again.",
    ),
    Failure(
        "model-not-in-cache",
        "the model is not in the cache",
        "the engine runs offline from fetched files, and some of them are missing for this revision",
        "Run playbooks/fetch.yml, then deploy again.",
        (
            r"LocalEntryNotFoundError",
            r"OfflineModeIsEnabled",
            r"offline mode is enabled",
            r"outgoing traffic has been disabled",
        ),
        chapter=INCOMPLETE,
    ),
    Failure(
        "cache-read-only",
        "the model cache is read-only",
        "its file system is mounted read-only: by /etc/fstab, or by the kernel after a disk error",
        "Check `findmnt -T /opt/hf` and `dmesg`; mount it writable, then run again.",
        (r"Read-only file system.*(?:/opt/hf|huggingface)", r"(?:/opt/hf|huggingface).*Read-only file system"),
    ),
    Failure(
        "cache-permission",
        "the engine cannot read or write its cache",
        "a directory under the cache directory has the wrong owner or mode",
        "Run playbooks/prepare.yml: it sets the owner and mode of the cache directory.",
        (r"PermissionError: .*(?:huggingface|/opt/hf|\.cache)", r"PermissionError: .*Permission denied"),
    ),
    Failure(
        "context-too-long",
        "max_model_len is longer than the model's context",
        "the model supports fewer tokens than the service asks for",
        "Lower max_model_len to the value in the message, or choose another profile.",
        (r"User-specified max_model_len .*is greater", r"than the derived max_model_len"),
    ),
    Failure(
        "executor-missing",
        "the image cannot connect the ranks of a group as it is told to",
        "vLLM before 0.11.1 connects several hosts over Ray alone, and newer images are built without Ray",
        "Set sparkfleet_executor to auto, or sparkfleet_image to one that has what the message names "
        "(docs/several-sparks.md).",
        (
            r"unrecognized arguments: .*--nnodes",
            r"sparkfleet: the image has no Ray",
            r"Failed to import Ray",
            r"current platform \S+ does not support ray",
        ),
    ),
    Failure(
        "ray-incomplete",
        "the Ray cluster of a group is not complete",
        "a rank did not reach rank 0 on the ports 29502 to 29609 in time, or its Ray ended; the message names it",
        "See `docker logs` of the engine on the host that is named, and playbooks/fabric.yml for the network between "
        "the hosts.",
        (
            r"sparkfleet: .* not joined the Ray cluster",
            r"sparkfleet: rank 0 .* could not be joined",
            r"sparkfleet: the Ray cluster of \S+ has nodes",
            r"sparkfleet: Ray did not start on rank 0",
            r"sparkfleet: Ray of rank \d+ ended",
        ),
        auto_recovery="every host of the group goes back to the previous release; in service the guards start all "
        "ranks again, up to their limit",
    ),
    Failure(
        "argument-unknown",
        "vLLM does not know an argument",
        "the model card's arguments are for a different version than the image's",
        "Remove the argument named in the message from the model card, or use an image whose vLLM supports it.",
        (r"error: unrecognized arguments", r"vllm.*: error: ", r"error: argument .*: (?:invalid|expected)"),
    ),
    Failure(
        "model-unsupported",
        "this vLLM cannot run the model",
        "its architecture or quantization is newer than the image",
        "Use a newer image, or a model from the catalogue.",
        (
            r"Model architectures .* (?:are not supported|failed to be inspected)",
            r"does not recognize this architecture",
            r"Unknown quantization method",
            r"set the option `trust_remote_code=True`",
        ),
    ),
    Failure(
        "port-taken",
        "the port is taken",
        "another process or container on the host is listening on it",
        "Stop it (`ss -ltnp` names it), or set sparkfleet_port to a free port.",
        (
            r"[Aa]ddress already in use(?!.*Retrying)",
            r"port is already allocated",
            r"failed to bind host port",
        ),
    ),
    Failure(
        "address-unknown",
        "no address is known at which a gateway can reach the engine",
        "the inventory has gateways, but the Spark's name in it does not resolve to one of the Spark's addresses, and "
        "the Spark has no route to the gateways",
        "Set sparkfleet_address to the Spark's address, or sparkfleet_listen to addresses or to `all`.",
    ),
    Failure(
        "firewall-source-unknown",
        "the firewall would shut out a gateway",
        "sparkfleet_firewall opens the engine's ports to the gateways of the inventory, and the Spark does not resolve "
        "the name of one of them",
        "Set ansible_host or sparkfleet_address of the gateway to its address, or make the name resolve on the Spark.",
    ),
    Failure(
        "address-gone",
        "the host no longer has the address that the engine is published on",
        "its address has changed since the deployment (DHCP without a reservation)",
        "Deploy again, which uses the current address, or set sparkfleet_listen: all.",
        (r"[Cc]annot assign requested address",),
    ),
    Failure(
        "name-taken",
        "the container name is already in use",
        "a container with that name exists that Sparkfleet did not create",
        "Remove it with `docker rm -f NAME` on the host, if it is not needed.",
        (r"The container name .* is already in use",),
    ),
    Failure(
        "network-missing",
        "the bridge of the Docker network is gone",
        "someone, a firewall or a network service removed the interface; Docker believes it still exists",
        "Restart Docker (`systemctl restart docker`), which recreates it; this briefly stops other containers.",
        (r"adding interface \S+ to bridge \S+ failed", r"could not find bridge", r"network bridge not found"),
        auto_recovery="the guard restarts Docker once, unless that would stop other containers",
    ),
    Failure(
        "mount-missing",
        "a file or directory that the engine's container mounts is missing",
        "it was removed, or its disk is not mounted",
        "Restore it, or run site.yml, which rewrites what Sparkfleet manages.",
    ),
    Failure(
        "cache-not-mounted",
        "the model cache is empty",
        "its disk is not mounted, or it was emptied",
        "Mount it (`findmnt`, /etc/fstab), then `sparkfleet start`; or run site.yml to fetch the model again.",
    ),
    Failure(
        "compose-invalid",
        "Docker Compose rejects the release's compose file",
        "it was edited by hand, or Compose parses an argument or variable differently",
        "Correct what the message names in the inventory or the model card and deploy again; the running engine is "
        "untouched.",
    ),
    # -- images ------------------------------------------------------------------------------------------------
    Failure(
        "image-differs",
        "the offered image is not the expected one",
        "another Spark or a bundle offered a different digest than the registry has for this tag, or a layer arrived "
        "with different content",
        "Check what offered it: the Spark, the registry, a mirror or a proxy. A lock, or an image NAME@sha256:DIGEST, "
        "settles what is right.",
    ),
    Failure(
        "model-differs",
        "the offered model is not the expected one",
        "another Spark or a bundle offered a different commit, file or hash than the Hub has for this revision",
        "Check the Spark that offered it. If the branch has moved since, set the commit as the revision.",
    ),
    Failure(
        "lock-mismatch",
        "a model is not the one in the lock",
        "the Hub, another Spark, a bundle or a host offered a different commit, file or hash than the lock has",
        "Find out where it comes from. `sparkfleet lock --check` shows whether the Hub has changed it; "
        "`sparkfleet lock --update` takes the change into the lock.",
    ),
    Failure(
        "weights-pickle",
        "the weights may run code when they are loaded",
        "the model's repository has no safetensors, but pickles (*.bin, *.pt)",
        "Use a model with safetensors, or convert it. A card whose weights have `pickle: true` accepts them.",
    ),
    Failure(
        "remote-code-unreviewed",
        "code of the model's repository would run unreviewed",
        "the engine has trust_remote_code, and the revision is a branch or tag that its owner can move",
        "Read the code, then name its commit (revision in the card, sparkfleet_revision), or write a lock with "
        "`sparkfleet lock`; or set sparkfleet_vllm_trust_remote_code: false if the model works without.",
    ),
    Failure(
        "image-unsigned",
        "the image is not signed by its publisher's key",
        "sparkfleet_image_keys names a key for it; the registry has no signature by that key, or does not answer",
        "Find out who put the image there. An image of one's own is signed with `cosign sign --key`; for a publisher "
        "who does not sign, take the name out of sparkfleet_image_keys.",
    ),
    Failure(
        "image-platform",
        "the image is for another architecture",
        "a Spark is aarch64; the image was built for something else",
        "Use an image for linux/arm64 (NVIDIA's have it).",
        (
            r"exec format error",
            r"no matching manifest for linux",
            r"does not match the (?:detected host|specified) platform",
        ),
    ),
    Failure(
        "image-missing",
        "the image of the release is not on the host",
        "it was not fetched, or it was removed (`docker image prune`)",
        "Run site.yml, or playbooks/fetch.yml and then the same command again: it pulls the pinned image.",
        (r"No such image",),
    ),
    Failure(
        "image-unknown",
        "the registry has no such image",
        "the name or tag is wrong, or the tag was removed",
        "Check sparkfleet_image, or `image` in the model card.",
        (r"manifest unknown", r"manifest for .* not found", r"repository does not exist"),
    ),
    Failure(
        "image-denied",
        "the registry refuses the image",
        "it requires an account, or the account is not allowed to pull it",
        "Set sparkfleet_registry_logins to an account that is; check the image's name.",
        (r"pull access denied", r"unauthorized: authentication required"),
    ),
    Failure(
        "image-pull",
        "the image could not be pulled",
        "Docker reported a reason that is not in this table",
        "See `journalctl -u docker` on the host.",
    ),
    Failure(
        "registry-name",
        "the registry's name does not resolve",
        "the host has no working name server for it",
        "Check /etc/resolv.conf and the host's network.",
        (r"dial tcp: lookup \S+.*(?:no such host|server misbehaving|i/o timeout)",),
    ),
    Failure(
        "registry-unreachable",
        "the registry cannot be reached",
        "the network, a firewall or a proxy blocks the connection",
        "Check the host's network and the proxy of its Docker engine, then run again: the pull resumes.",
        (r"net/http: (?:request canceled|TLS handshake timeout)", r"Client\.Timeout exceeded while awaiting headers"),
    ),
    Failure(
        "registry-tls",
        "the registry's certificate is not trusted",
        "a private CA, a proxy that intercepts TLS, or a certificate that has expired",
        "With a private CA set sparkfleet_ca_file to its certificate, a PEM file on the controller; one that has "
        "expired is renewed by its owner, unless the host's clock is wrong.",
        (r"x509: certificate", r"tls: failed to verify certificate"),
    ),
    Failure(
        "registry-limit",
        "the registry limits the pull rate",
        "too many pulls from this address",
        "Wait, or set sparkfleet_registry_logins to an account.",
        (r"toomanyrequests",),
    ),
    # -- the Hugging Face Hub ----------------------------------------------------------------------------------
    Failure(
        "hub-repo-unknown",
        "the Hub has no such model",
        "the repository's name is wrong, or it is private and the token has no access to it",
        "Check `repo` in the model card.",
        (r"RepositoryNotFoundError", r"Repository Not Found for url", r"is not a valid model identifier"),
        statuses=(404,),
        chapter=LICENCE,
    ),
    Failure(
        "hub-revision-unknown",
        "the model has no such revision",
        "the branch, tag or commit does not exist in the repository",
        "Set sparkfleet_revision to one listed on the model's page.",
        (r"RevisionNotFoundError", r"Revision Not Found for url", r"is not a valid git identifier"),
    ),
    Failure(
        "hub-token-rejected",
        "the Hub rejects the token",
        "it is mistyped, expired or revoked",
        "Create a new read token at https://huggingface.co/settings/tokens and set sparkfleet_hf_token.",
        (r"Invalid credentials in Authorization header", r"Invalid user token", r"token .{0,40}is (?:invalid|expired)"),
        chapter=LICENCE,
    ),
    Failure(
        "hub-token-missing",
        "the model is gated and there is no token",
        "its licence must be accepted with the account that the token belongs to",
        "Accept the licence on the model's page, create a read token at https://huggingface.co/settings/tokens, and "
        "set sparkfleet_hf_token (or export HF_TOKEN before the run).",
        (
            r"401 Client Error",
            r"you must have access to it and be authenticated",
            r"You must be authenticated to access",
        ),
        statuses=(401,),
        unless=("hub-repo-unknown", "hub-token-rejected"),
        chapter=LICENCE,
    ),
    Failure(
        "hub-no-access",
        "the token's account has no access to the model",
        "its licence was not accepted with that account, or a fine-grained token does not have permission to read "
        "gated repositories",
        "Open the model's page with that account and accept the licence (NVIDIA's Llama models may require Meta's "
        "first); give a fine-grained token that permission.",
        (r"403 Client Error", r"not in the authorized list", r"awaiting a review from the repo authors"),
        statuses=(403,),
        chapter=LICENCE,
    ),
    Failure(
        "hub-gated",
        "the model is gated",
        "token missing (401) or licence not accepted (403)",
        "Accept the licence on the model's page and set sparkfleet_hf_token to a read token of that account.",
        (r"Cannot access gated repo", r"trying to access a gated repo", r"GatedRepoError"),
        unless=("hub-token-missing", "hub-no-access", "hub-token-rejected"),
        chapter=LICENCE,
    ),
    Failure(
        "hub-unreachable",
        "the Hugging Face Hub cannot be reached",
        "the host's DNS, network, proxy or certificates",
        "Check `curl -I https://huggingface.co` on the host, set sparkfleet_ca_file if a CA of your own signs what it "
        "sees there, then run again: downloads resume.",
        (
            r"[Cc]ouldn't connect to '?https://huggingface",
            r"HTTPSConnectionPool\(host='huggingface\.co'",
            r"Failed to resolve 'huggingface\.co'",
            r"Temporary failure in name resolution",
            r"Network is unreachable",
        ),
        statuses=(0, 429, 500, 502, 503, 504),
        unless=("model-not-in-cache",),
    ),
    Failure(
        "hub-answer-odd",
        "unexpected answer from the Hub",
        "something other than a Hub answers at its address, a proxy alters its answers, or the repository "
        "has invalid file names",
        "Check sparkfleet_hub_endpoint, the proxy, and the repository's page.",
    ),
    Failure(
        "hub-token-in-clear",
        "the Hub token would be sent without TLS",
        "sparkfleet_hub_endpoint starts with http://",
        "Use https://, or remove the token from the host.",
    ),
    # -- background jobs of the fetch --------------------------------------------------------------------------
    Failure(
        "fetch-busy",
        "another fetch is running on the host",
        "only one fetch of an image and one of a model may run at a time",
        "Wait for it, then run again.",
    ),
    Failure(
        "bundle",
        "the bundle is missing something that the host needs",
        "it was made for another image, model, OS or architecture, or some of its files are missing or truncated",
        "Recreate it with `sparkfleet bundle FOLDER` and the inventory to be deployed.",
    ),
    Failure(
        "packages",
        "packages could not be collected or listed",
        "apt failed: its sources do not respond, or a package is missing from them",
        "Run `apt-get update` on the host and fix what it reports.",
    ),
    Failure(
        "fetch-died",
        "a background job ended without a result",
        "it was killed, or the host was rebooted",
        "Run again: it resumes.",
        auto_recovery="the next run resumes where it stopped",
    ),
    Failure(
        "fetch-timeout",
        "a fetch timed out",
        "the source is slow; the job continues in the background",
        "Run again to attach to it.",
    ),
    Failure(
        "fetch-io",
        "a file of the fetch could not be read or written",
        "permissions, a failing disk or a missing directory on the host",
        "Run playbooks/prepare.yml, then fetch again.",
    ),
    Failure(
        "checksum",
        "a downloaded file does not match its checksum on the Hub",
        "it was damaged in transit, or something altered it on the way",
        "Run again: the file is fetched again. If that does not help, look for a proxy that alters downloads.",
        chapter=INCOMPLETE,
        auto_recovery="the next run fetches the file again",
    ),
    Failure(
        "docker",
        "Docker refused a request or does not respond",
        "the daemon is not running, or the operator is not allowed to use it",
        "Check `systemctl status docker` and `journalctl -u docker` on the host; run playbooks/prepare.yml.",
        (r"Cannot connect to the Docker daemon", r"Is the docker daemon running"),
        auto_recovery="systemd restarts Docker; a switch waits two minutes for it",
    ),
    # -- before anything changes -------------------------------------------------------------------------------
    Failure(
        "memory-short",
        "the plan does not fit in the host's memory",
        "GPU and CPU share memory; what the engine asks for is not available, would leave the host too little, or "
        "cannot hold one sequence of max_model_len tokens",
        "Stop whatever else uses memory on the host, or choose what `sparkfleet plan MODEL` proposes: a lower "
        "gpu_memory_utilization, a shorter max_model_len, another profile or model. sparkfleet_memory_plan: warn "
        "continues anyway.",
        chapter=MEMORY,
    ),
    Failure(
        "layout-unknown",
        "the planner does not know the model's KV cache",
        "its attention keeps state whose size cannot be derived from the model card",
        "Set sparkfleet_memory_plan: warn to continue without a plan, and watch the first start.",
    ),
    Failure(
        "image-unsupported",
        "the image does not run on a GB10",
        "it predates the GB10, was built for another architecture, or its name does not show its version",
        "Use nvcr.io/nvidia/vllm:25.09-py3 or later, or a vllm/vllm-openai version from 2026.",
        chapter=FP8,
    ),
    Failure(
        "not-root",
        "Sparkfleet does not run as root on the host",
        "packages, services and directories on the host belong to root; other users cannot even see which process owns "
        "a port",
        "Set become: true (ansible_become: true in the inventory), or run ansible-playbook with --become.",
    ),
    Failure(
        "clock-wrong",
        "the host's clock is wrong",
        "it is not synchronised; certificates and signatures look expired or not yet valid",
        "Set it: `timedatectl set-ntp true` on the host, and make sure it reaches a time server.",
    ),
    Failure(
        "ca-program-missing",
        "the host cannot be given a CA",
        "the package ca-certificates is not installed",
        "Install it: `apt-get install ca-certificates` on the host.",
    ),
    Failure(
        "docker-too-old",
        "Docker is too old",
        "the GPU request format that Sparkfleet uses needs Docker 20.10",
        "Upgrade it the way it was installed; Sparkfleet does not touch a Docker that other containers depend on.",
    ),
    Failure(
        "compose-too-old",
        "Docker's Compose plugin is missing or too old",
        "Ansible's module for Compose needs 2.18",
        "Install or upgrade it the way Docker was installed (packages docker-compose-plugin, docker-compose-v2 or "
        "docker-compose).",
    ),
    Failure(
        "toolkit-too-old",
        "the NVIDIA Container Toolkit is too old",
        "`nvidia-ctk runtime configure` needs 1.12",
        "Upgrade it: `apt-get install --only-upgrade nvidia-container-toolkit` on the host.",
    ),
    Failure(
        "not-a-spark",
        "the host has no GB10",
        "the address belongs to another machine, or the driver is not installed",
        "Check the inventory and nvidia-smi; set sparkfleet_require_gb10: false to continue anyway.",
    ),
    Failure(
        "os-unsupported",
        "the operating system is not supported",
        "only DGX OS (Ubuntu 24.04) is; Debian 12 and 13 are for the simulator",
        "Install DGX OS.",
    ),
    Failure(
        "os-without-compose",
        "the distribution has no package for Compose v2",
        "it is too old",
        "Set sparkfleet_docker_source: docker.",
    ),
    Failure(
        "machine-unsupported",
        "the architecture is not supported",
        "a Spark is aarch64; x86_64 is for the simulator",
        "Check the address in the inventory.",
    ),
    Failure(
        "operator-unknown",
        "the operator's user does not exist",
        "it is neither in /etc/passwd nor in the host's directory service",
        "Set sparkfleet_operator to a user that exists.",
    ),
    Failure(
        "cache-not-a-folder",
        "the cache path is not a directory",
        "a file with that name exists",
        "Move it, or set sparkfleet_cache_dir.",
    ),
    Failure(
        "bad-input",
        "a value is invalid",
        "the message names it",
        "Correct it in the inventory or model card.",
    ),
    Failure(
        "all-at-once",
        "more than one serving Spark would stop at the same time",
        "the command covers several hosts that are serving, and stopping them all was not confirmed",
        "Use `sparkfleet rollout`, or -l to do one at a time, or confirm with --yes (ansible-playbook: "
        "-e sparkfleet_all_at_once=true).",
    ),
    Failure(
        "same-host",
        "one host appears twice in the inventory",
        "both names refer to the same machine: machine ID and boot ID are identical",
        "Remove one of the names from the inventory, or correct its ansible_host.",
    ),
    # -- waiting and verifying: observed, not found in a log -------------------------------------------------
    Failure(
        "switch-running-other",
        "another run is switching this host to a release",
        "two operators, or an interrupted run of yours: its job continues on the host",
        "Wait until it finishes (`sparkfleet status` shows it), then run again.",
    ),
    Failure(
        "lock-held",
        "another program holds the switch lock",
        "someone took it by hand (`flock`), or a Sparkfleet process hangs",
        "End the process that the message names, then run again.",
    ),
    Failure(
        "switch-interrupted",
        "a switch was interrupted",
        "the host was rebooted, or the job was killed",
        "Nothing to do: the previous release is started and verified again. Then run again.",
        auto_recovery="the guard, or the next run, restores the previous release",
    ),
    Failure(
        "rank-failed",
        "a rank of an engine over several Sparks failed",
        "a host of the group is off, its network is cut, or its container ended; its own log says why",
        "See `docker logs` of the engine on the host that is named, and playbooks/fabric.yml for the network between "
        "the hosts. Then run again, for all hosts of the group.",
        auto_recovery="every host of the group goes back to the previous release; in service the guards start all "
        "ranks again, up to their limit",
    ),
    Failure(
        "group-incomplete",
        "the hosts of a group did not switch together",
        "one of them did not begin, or its guard does not answer the others",
        "Run again for all hosts of the group. `systemctl status sparkfleet-guard` on the host that is named, and "
        "whether its guard's port is reached from the others, say more.",
    ),
    Failure(
        "group-differs",
        "the hosts of a group would not run the same",
        "image, model, revision or arguments differ between them",
        "Set what differs in the variables of the group, not of a host, and run again.",
    ),
    Failure(
        "fabric-unfit",
        "a host of a group is not reached by the others as it should",
        "its sparkfleet_fabric_address is not on a ConnectX port with a link",
        "playbooks/fabric.yml shows ports and addresses. sparkfleet_fabric_management: true accepts another network.",
    ),
    Failure(
        "trial-speed",
        "the speed of a trial could not be measured",
        "the engine answered, but its benchmark failed or did not end in time",
        "The memory figures of the trial are kept. See the message for the reason, then run the trial again.",
        auto_recovery="the previous release is started and verified again",
    ),
    Failure(
        "benchmark",
        "the speed of an engine could not be measured",
        "it does not serve, was restarted meanwhile, or its benchmark failed or did not end in time",
        "See the message for the reason, then run the benchmark again; what was measured before is kept.",
    ),
    Failure(
        "engine-busy",
        "a benchmark was refused on a Spark that serves others",
        "a gateway sends it requests, or requests of others were seen while it was looked at",
        "Run it when the Spark is idle, or with --even-if-serving, which drains it in the gateway meanwhile.",
    ),
    Failure(
        "switch-restored",
        "the last switch failed, and the previous release was restored",
        "the new release did not verify",
        "Fix the cause reported with it and deploy again; the release's log is kept in /opt/sparkfleet/releases/N.",
    ),
    Failure(
        "switch-not-restored",
        "the last switch failed, and so did the rollback",
        "a problem with the host keeps both releases from serving",
        "Fix the cause reported with it, then run `sparkfleet start` or deploy again.",
    ),
    Failure(
        "guard-gave-up",
        "the guard gave up: the engine failed too often",
        "each start fails the same way, and restart loops leak memory until a Spark stops responding",
        "Fix the cause reported with it; `sparkfleet start` or a deployment makes the guard try again.",
    ),
    Failure(
        "guard-down",
        "the guard is not running",
        "it was stopped or disabled by hand, or its settings are damaged",
        "Run site.yml, which writes its settings and starts it; `systemctl status sparkfleet-guard` shows why it "
        "stopped. To run without a guard, set sparkfleet_guard: false.",
    ),
    Failure(
        "guard-stuck",
        "the guard is running but not observing",
        "its process was stopped (SIGSTOP) or hangs",
        "Run `systemctl restart sparkfleet-guard` on the host.",
        auto_recovery="systemd kills and restarts it after 90 s without a watchdog ping",
    ),
    Failure(
        "state-damaged",
        "a state file could not be parsed",
        "it was edited, or part of it was lost on disk",
        "Nothing to do: it was moved aside under the name shown, and a new one was started. Its counts are lost.",
        auto_recovery="the reader moves it aside and starts a new one",
    ),
    Failure(
        "engine-crashed",
        "the engine crashed and was restarted",
        "its last log lines show why, if they are in this table",
        "Nothing to do if it happened once; `sparkfleet logs` shows the lines before it.",
        auto_recovery="the guard restarts it, up to its limit",
    ),
    Failure(
        "engine-stopped",
        "the engine was stopped",
        "someone stopped it: `sparkfleet stop`, `docker stop`",
        "`sparkfleet start` starts and verifies it.",
    ),
    Failure(
        "release-damaged",
        "a release on the host is damaged",
        "files under /opt/sparkfleet/releases were changed or removed",
        "Run site.yml: it restores the files from their copies, or moves the release aside and stages a new one. "
        "Edited files are kept next to them; settings belong in the inventory.",
    ),
    Failure(
        "nothing-deployed",
        "nothing is deployed",
        "no release has been verified on this host yet, or Sparkfleet was removed from it",
        "Run site.yml.",
    ),
    Failure(
        "container-missing",
        "the container does not exist",
        "it was never started, or it was removed",
        "Run site.yml: it fetches what is missing and starts it.",
    ),
    Failure(
        "restart-loop",
        "the engine keeps crashing",
        "each start fails the same way; on a Spark every restart can leak memory until the host stops responding",
        "Stop it (`docker compose stop` in /opt/sparkfleet) and fix what its log reports before starting it again.",
    ),
    Failure(
        "engine-killed",
        "the engine was killed",
        "by earlyoom or the kernel because memory ran out, or by hand (`docker kill`)",
        "Check `journalctl -k -u earlyoom`; if memory ran out, lower gpu_memory_utilization.",
        exit_codes=(137,),
        chapter=MEMORY,
        auto_recovery="the guard restarts it, up to its limit",
    ),
    Failure(
        "engine-died",
        "the engine ended",
        "its log matches no failure in this table",
        "Read the lines below and the container's `docker logs`.",
        exit_codes=(1, 2, 132, 134, 135, 139, 143),
    ),
    Failure(
        "start-timeout",
        "the engine was not ready in time",
        "a long load or compilation, or a hung start",
        "Check the container's `docker logs`; if it is making progress, run again with a larger "
        "sparkfleet_start_timeout.",
    ),
    Failure(
        "endpoint-down",
        "the endpoint does not respond",
        "the engine is not running, or is still starting",
        "Run site.yml: it starts the engine and waits until it is ready.",
    ),
    Failure(
        "engine-wedged",
        "the engine is alive but produces nothing",
        "/health says 200 while requests get no token (vLLM issues 39863 and 40926)",
        "Restart the service: `docker compose restart` in /opt/sparkfleet.",
        auto_recovery="the guard notices that no tokens are produced, and restarts it",
    ),
    Failure(
        "model-not-served",
        "the endpoint serves another model",
        "the engine on this port was started for a different one",
        "Run site.yml to serve the model that the inventory names.",
    ),
    Failure(
        "request-refused",
        "the engine refused a request",
        "it answered with an error instead of text",
        "Read its message and the container's `docker logs`.",
    ),
    Failure(
        "answer-malformed",
        "an answer does not conform to the API",
        "something other than vLLM answers on the port, or the engine is damaged",
        "Check which container holds the port; use the image of the model card.",
    ),
    Failure(
        "answer-wrong",
        "the answer is wrong",
        "a question with a known answer was answered wrongly: damaged weights, a wrong chat template, a broken kernel, "
        "or a model too small for the question",
        "Run playbooks/fetch.yml: it hashes every file of the model and replaces what is damaged. If all are intact, "
        "change `verify` in the model card if the model cannot know the answer.",
    ),
    Failure(
        "answer-degenerate",
        "the answer is empty or repeats one token",
        "the engine computes garbage: damaged weights, or kernels that do not suit the GPU",
        "Run playbooks/fetch.yml: it hashes every file of the model and replaces what is damaged. If all are intact, "
        "use the image of the model card.",
    ),
    Failure(
        "stream-broken",
        "the event stream is malformed",
        "the engine died while answering, or a proxy in between buffers or truncates the stream",
        "Check the container's `docker logs`; query the engine's own port.",
    ),
    Failure(
        "counters-still",
        "the engine's counters did not move",
        "the answers came from something other than this engine, or its metrics are disabled",
        "Check which container holds the port; remove --disable-log-stats.",
    ),
    Failure(
        "api-incomplete",
        "the engine does not offer the complete API",
        "its description (/openapi.json) is missing paths that clients use",
        "Use the image and the arguments of the model card.",
    ),
    # -- what a deep verification asks -------------------------------------------------------------------------
    Failure(
        "verify-needle",
        "a fact in a long context is not found",
        "attention or the KV cache is wrong beyond short prompts: a kernel that does not suit the GPU, an FP8 KV cache "
        "without scales, wrong rope scaling, or a model that cannot read that far",
        "Use the image of the model card; try sparkfleet_vllm_kv_cache_dtype: auto and "
        "sparkfleet_vllm_enable_prefix_caching: false. If it is the model, lower sparkfleet_vllm_max_model_len to a "
        "length that passes, or list the kinds without needle in the model card (verify.kinds).",
    ),
    Failure(
        "verify-concurrency",
        "the same question gets different answers from streams at once",
        "a kernel that is chosen for larger batches computes something else than the one for a single request",
        "Use the image of the model card; try sparkfleet_vllm_enforce_eager: true, or another attention or MoE "
        "backend. If all answers are right in other words, give the card a question with a shorter answer.",
    ),
    Failure(
        "verify-json-schema",
        "an answer does not keep the JSON schema that was asked for",
        "structured outputs are switched off or not supported for this model, or the reasoning parser lets the answer "
        "pass as thoughts (vLLM issue 19222)",
        "Check --structured-outputs-config and the reasoning parser among the arguments; use the image of the model "
        "card, or list the kinds without json_schema in it (verify.kinds).",
    ),
    Failure(
        "verify-tool-call",
        "a tool is not called, or its result is not used",
        "the tool-call parser does not suit the model or its chat template, or the model is too small for tools",
        "Use the parser that the model's page names (tool_call_parser in the model card); sparkfleet_tool_calls: false "
        "disables tool calls, and the check with them.",
    ),
    Failure(
        "verify-reasoning",
        "thoughts and answer are not kept apart",
        "the reasoning parser does not suit the model, or the model does not think, or thinks longer than it may",
        "Use the parser that the model's page names (sparkfleet_vllm_reasoning_parser); raise verify.max_tokens in the "
        "model card if the answer was cut.",
    ),
    Failure(
        "verify-image",
        "a picture is not read",
        "the vision part of the model is damaged, or the engine does not accept pictures",
        "Check limit_mm_per_prompt among the arguments; use the image of the model card. For a model without vision "
        "remove vision from its card.",
    ),
    Failure(
        "verify-embeddings",
        "embeddings have the wrong neighbours",
        "the pooling does not suit the model (its type, or its normalisation), or weights are damaged",
        "Check the pooler among the arguments (--pooler-config, --convert); run playbooks/fetch.yml, which hashes "
        "every file of the model.",
    ),
    Failure(
        "verify-rerank",
        "texts are ranked in the wrong order",
        "the model is not one that ranks, or lacks the template or the overrides that it needs",
        "Check --hf-overrides and the chat template that the model's page names.",
    ),
    Failure(
        "verify-classify",
        "a text gets the wrong label",
        "the model is not one that classifies, or its card expects another label",
        "Set question and expect in the card's verify to a text and the label that the model's page has for it; check "
        "--convert and --hf-overrides.",
    ),
    Failure(
        "verify-budget",
        "the time for a deep verification was not enough",
        "the engine is slower than expected, or the time is too short for what the model is for",
        "Raise sparkfleet_verify_seconds; compare the speed with the plan (`sparkfleet plan`).",
    ),
    Failure(
        "low-throughput",
        "throughput is lower than expected",
        "one stream is bound by memory bandwidth (273 GB/s); throughput above that limit is impossible",
        "Send requests concurrently: batching multiplies the total. Watch vllm:num_requests_running and "
        "vllm:kv_cache_usage_perc; raise max_num_batched_tokens only if prompts are long.",
        chapter=THROUGHPUT,
    ),
    Failure(
        "engine-stalls",
        "the engine stalls repeatedly",
        "its processes get no CPU time: they are stopped and continued, another program uses the CPUs, or the host "
        "swaps; /metrics, which costs nothing, took more than a second in most of the last minute",
        "Check `top` and `vmstat 1` on the host for what uses CPU and memory; run `sparkfleet restart` if an engine "
        "stays slow on an idle host.",
    ),
    Failure(
        "cuda-error",
        "CUDA reported an error",
        "a CUDA kernel failed, or the driver lost the GPU",
        "Look for Xid lines in `dmesg`; reboot the host if nvidia-smi does not respond.",
        (r"CUDA error: (?!out of memory)", r"cudaError\w+"),
        unless=("out-of-memory", "gpu-lost", "kernel-image-missing", "driver-too-old", "fp8-cutlass"),
    ),
    Failure(
        "internal",
        "an error that is not in this table",
        "a new kind of failure, or a bug in Sparkfleet",
        "Please report it with the message.",
    ),
)

BY_ID = {failure.id: failure for failure in TABLE}
_COMPILED = [(failure, [re.compile(text, re.IGNORECASE) for text in failure.signature]) for failure in TABLE]
LINES_A_FINDING = 3


def match(
    lines: Iterable[str],
    *,
    status: int | None = None,
    exit_code: int | None = None,
    oom_killed: bool = False,
) -> list[Finding]:
    """The failures that log lines, a Hub HTTP status or a container's exit match, in table order, harmless
    ones last. An exit code counts only where nothing else was found."""
    read = [plain(split_stamp(line)[1]) for line in lines]
    found: dict[str, Finding] = {}
    for failure, patterns in _COMPILED:
        hits = [
            message.strip()
            for level, message in read
            # What vLLM itself logs as a warning or info is not the cause.
            if (failure.harmless or level not in ("DEBUG", "INFO", "WARNING"))
            and any(pattern.search(message) for pattern in patterns)
        ]
        if (
            hits
            or (status is not None and status in failure.statuses)
            or (oom_killed and failure.id == "out-of-memory")
        ):
            found[failure.id] = Finding(failure, tuple(dict.fromkeys(hits))[:LINES_A_FINDING])
    kept = [item for item in found.values() if not any(other in found for other in item.failure.unless)]
    if exit_code is not None and all(item.failure.harmless for item in kept):
        kept += [Finding(failure) for failure in TABLE if exit_code in failure.exit_codes][:1]
    return sorted(kept, key=lambda item: item.failure.harmless)


def clean(line: str) -> str:
    """A log line without Docker's time stamp and vLLM's prefix."""
    return plain(split_stamp(line)[1])[1].strip()


_ERROR = re.compile(
    r"^(?:[A-Za-z_][\w.]*\.)?[A-Z]\w*(?:Error|Exception|Interrupt|Exit|Enabled|Warning)\b(?::|$)|: error: "
)
_NOISE = re.compile(
    r"^\s*$|^Traceback |^File \"|^[\^~\s]+$|^raise |^return |^self\.|^During handling of|^The above exception|"
    r"^Process \w+:?$|^\[rank\d+\]:|Engine core initialization failed|EngineCore (?:failed|encountered)|See root cause"
)
_GENERIC = re.compile(
    r"Engine core initialization failed|EngineDeadError|EngineCore encountered|WorkerProc initialization"
)


def relevant(lines: Sequence[str], findings: Sequence[Finding] = (), limit: int = 15) -> list[str]:
    """The log lines that say why it ended: those of the findings, the innermost errors with what belongs to
    them, else the last ones. Never a whole traceback; oldest first, each once, at most `limit`."""
    cleaned = [clean(line) for line in lines]
    wanted = {line for finding in findings if not finding.failure.harmless for line in finding.lines}
    picked: list[str] = [line for line in cleaned if line in wanted]
    following = 0
    for raw, line in zip(lines, cleaned, strict=True):
        level = plain(split_stamp(raw)[1])[0]
        if _ERROR.search(line) and "Warning" not in line.split(":", 1)[0] and not _GENERIC.search(line):
            picked.append(line)
            following = 4
        elif following and line and not _NOISE.search(line) and level in ("", "ERROR"):
            picked.append(line)
            following -= 1
        else:
            following = 0
            if level in ("ERROR", "CRITICAL") and not raw_is_code(raw) and not _NOISE.search(line):
                picked.append(line)
    if not picked:
        picked = [line for line in cleaned if line and not _NOISE.search(line)][-limit:]
    once = list(dict.fromkeys(line[:400] for line in picked))
    return once[:limit]


def raw_is_code(raw: str) -> bool:
    """Whether a line shows source code of a traceback: its message is indented."""
    return plain(split_stamp(raw)[1])[1].startswith("  ")


def markdown() -> str:
    """The table as a docs page."""
    parts = [
        "# Failures and what to do\n",
        "Generated from `src/sparkfleet/diagnosis/failures.py` by `python -m sparkfleet.diagnosis.failures`; do not "
        "edit.\n",
        "Each error from Sparkfleet ends with the name of its entry here, in brackets.\n",
    ]
    for failure in TABLE:
        parts.append(f"## {failure.id}\n")
        title = failure.title if failure.title.startswith("vLLM") else failure.title[0].upper() + failure.title[1:]
        parts.append(f"{title}{' (harmless)' if failure.harmless else ''}.\n")
        shown = [f"`{text}`" for text in failure.signature]
        shown += [f"HTTP {', '.join(map(str, failure.statuses))} of the Hub"] if failure.statuses else []
        shown += [f"exit code {', '.join(map(str, failure.exit_codes))}"] if failure.exit_codes else []
        if shown:
            parts.append(f"- Shows as: {'; '.join(shown)}")
        parts.append(f"- Cause: {failure.cause}.")
        parts.append(f"- Remedy: {failure.remedy}")
        if failure.auto_recovery:
            parts.append(f"- Automatic recovery: {failure.auto_recovery}.")
        if failure.chapter:
            parts.append(f"- In the guide: {failure.chapter}")
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
