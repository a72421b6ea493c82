# SPDX-License-Identifier: Apache-2.0
"""The one table of failures: how each shows itself, why it happens, what to do.

Preflight, fetch, the wait for readiness, verification and the docs read it. `python -m sparkfleet.diagnosis.failures`
prints it as Markdown. Order matters: of two entries that fit the same log, the one further up is reported first.
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
    `auto_recovery`: what mends it without a person, and how; "" for nothing.
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
    """An entry of the table and the lines that gave it away (none for an exit code, a status or a fact)."""

    failure: Failure
    lines: tuple[str, ...] = ()

    @property
    def message(self) -> str:
        """What failed, why, and what to do, in one sentence or two."""
        return f"{self.failure.title}: {self.failure.cause}. {self.failure.remedy}"


TABLE: tuple[Failure, ...] = (
    # -- the engine's start: memory ---------------------------------------------------------------------------
    Failure(
        "memory-refused",
        "vLLM refused to start for lack of free memory",
        "less is free than gpu_memory_utilization asks for; memory is shared with the CPU, and vLLM 0.10.1.1 counts "
        "the page cache as used",
        "Stop what else uses memory on the host and deploy again (the page cache is dropped just before the start), or "
        "lower gpu_memory_utilization. A smaller max_model_len or `docker system prune` does not help.",
        (r"Free memory on device .*is less than desired", r"Free memory on device .*is less than the engine's budget"),
        chapter=MEMORY,
        auto_recovery="every start by a switch or the guard drops the page cache first",
    ),
    Failure(
        "memory-profiling",
        "vLLM gave up while it measured memory",
        "memory was freed during the measurement: another process ended, or the page cache was dropped",
        "Deploy again while nothing else starts or stops on the host.",
        (r"Error in memory profiling", r"AssertionError: .*[Ii]nitial free memory"),
        chapter=MEMORY,
        auto_recovery="the guard starts it again, up to its cap",
    ),
    Failure(
        "kv-cache-too-small",
        "no room for the KV cache",
        "what the weights leave of gpu_memory_utilization holds less than one request of max_model_len tokens",
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
        "Lower gpu_memory_utilization or max_num_batched_tokens, and stop what else uses memory on the host.",
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
        "Docker's default of /dev/shm is 64 MiB",
        "Give the service `ipc: host`, as Sparkfleet's compose file does.",
        (r"Insufficient space in /dev/shm", r"insufficient shared memory", r"No space left on device: '/dev/shm"),
    ),
    # -- the engine's start: kernels and GPU -------------------------------------------------------------------
    Failure(
        "triton-sm121a",
        "the image cannot compile for the GB10 (sm_121a)",
        "the ptxas that Triton brings along is older than the GPU",
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
        "the image's CUTLASS kernels do not fit the GB10, or --quantization fp8 was put on a model that is not FP8",
        "Use NVIDIA's image and a model that is quantized already (as those of the catalogue); leave out "
        "--quantization fp8.",
        (r"cutlass_scaled_mm", r"cutlass_gemm_caller", r"RuntimeError: Error Internal", r"No compiled cutlass"),
        chapter=FP8,
    ),
    Failure(
        "kernel-image-missing",
        "the image has no code for this GPU",
        "its CUDA build leaves out compute capability 12.1",
        "Use NVIDIA's image (nvcr.io/nvidia/vllm:25.09-py3 or later).",
        (r"no kernel image is available for execution",),
        unless=("triton-sm121a",),
    ),
    Failure(
        "driver-too-old",
        "the GPU driver is too old for the image",
        "the image's CUDA is newer than the driver supports",
        "Update DGX OS (driver 580 or later for CUDA 13), or use an older image. Keep the image's entry point: it "
        "switches CUDA forward compatibility on.",
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
        "the GPU does not answer any more",
        "it fell off the bus or its driver lost it (Xid 79, 119 and 120 in the kernel's log); nothing but a restart of "
        "the host brings it back",
        "Restart the host; if it happens again, update DGX OS and its firmware, then ask NVIDIA with the Xid lines of "
        "`journalctl -k`.",
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
        "the driver reported an error of the GPU",
        "an Xid in the kernel's log: 13, 31 and 45 come from the program that ran, 48, 63, 64, 94 and 95 from memory, "
        "others from driver or hardware",
        "Look the number up in NVIDIA's list of Xid errors. If the engine serves, nothing is to be done but to watch "
        "whether it comes again; else restart it, then the host.",
        (r"\bXid\b.*: \d+",),
        unless=("gpu-lost",),
        auto_recovery="an engine that ends or hangs by it is started again by the guard, up to its cap",
    ),
    Failure(
        "gpu-invisible",
        "the container sees no GPU",
        "it was started without one, or the driver on the host does not answer",
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
        "warning of compute capability 12.1",
        "PyTorch was built before the GB10 was on its list; its kernels for 12.0 run on 12.1",
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
        "image, model and compile caches need more room than is free",
        "Make room (`docker system df`, `du -sh /opt/hf/*` show what is there), or set sparkfleet_cache_dir to a "
        "larger disk, and run again: downloads resume.",
        (r"[Nn]o space left on device", r"\bENOSPC\b", r"[Dd]isk quota exceeded"),
        chapter=INCOMPLETE,
    ),
    Failure(
        "download-incomplete",
        "the model's files are incomplete or damaged",
        "a download was cut, or a copy was not whole",
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
        "the files of some models in the cache are not checked",
        "a check looks at 256 models, and the cache has manifests of more; whoever may write to it can add any number",
        "Remove from /opt/hf/.sparkfleet the folders of models that you know nothing of; `systemctl start "
        "sparkfleet-integrity` on the host checks again.",
    ),
    Failure(
        "model-not-in-cache",
        "the model is not in the cache",
        "the engine runs offline from fetched files and some of them are not there at this revision",
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
        "its file system is mounted read-only: by /etc/fstab, or by the kernel after an error of the disk",
        "Look at `findmnt -T /opt/hf` and `dmesg`; mount it writable, then run again.",
        (r"Read-only file system.*(?:/opt/hf|huggingface)", r"(?:/opt/hf|huggingface).*Read-only file system"),
    ),
    Failure(
        "cache-permission",
        "the engine may not read or write its cache",
        "owner or mode of a folder under the cache directory does not fit",
        "Run playbooks/prepare.yml: it sets owner and mode of the cache directory.",
        (r"PermissionError: .*(?:huggingface|/opt/hf|\.cache)", r"PermissionError: .*Permission denied"),
    ),
    Failure(
        "context-too-long",
        "max_model_len is longer than the model's context",
        "the model was made for fewer tokens than the service asks for",
        "Lower max_model_len to what the message names, or choose another profile.",
        (r"User-specified max_model_len .*is greater", r"than the derived max_model_len"),
    ),
    Failure(
        "argument-unknown",
        "vLLM does not know an argument",
        "the arguments of the model card belong to another version than the image's",
        "Take the argument that the message names out of the model card, or use an image whose vLLM has it.",
        (r"error: unrecognized arguments", r"vllm.*: error: ", r"error: argument .*: (?:invalid|expected)"),
    ),
    Failure(
        "model-unsupported",
        "this vLLM cannot run the model",
        "its architecture or quantization is newer than the image",
        "Use a newer image, or a model of the catalogue.",
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
        "another process or container on the host listens there",
        "Stop it (`ss -ltnp` names it), or set sparkfleet_port to a free port.",
        (
            r"[Aa]ddress already in use(?!.*Retrying)",
            r"port is already allocated",
            r"failed to bind host port",
        ),
    ),
    Failure(
        "address-unknown",
        "it is not known where a gateway reaches the engine",
        "the inventory has gateways; the Spark's name in it stands for no address of the Spark's own, and no way leads "
        "from there to the gateways",
        "Set sparkfleet_address to the Spark's address, or sparkfleet_listen to addresses or to `all`.",
    ),
    Failure(
        "address-gone",
        "the host does not have the address that the engine is published on",
        "it has got another address since it was deployed (DHCP without a reservation)",
        "Deploy again, which takes the address of today, or set sparkfleet_listen: all.",
        (r"[Cc]annot assign requested address",),
    ),
    Failure(
        "name-taken",
        "the container's name is taken",
        "a container of that name exists that Sparkfleet did not make",
        "Remove it with `docker rm -f NAME` on the host, if it is not needed.",
        (r"The container name .* is already in use",),
    ),
    Failure(
        "network-missing",
        "the bridge of Docker's network is gone",
        "somebody removed the interface, or a firewall or network service did; Docker believes that it is there",
        "Restart Docker (`systemctl restart docker`), which makes it again; it stops other containers for a moment.",
        (r"adding interface \S+ to bridge \S+ failed", r"could not find bridge", r"network bridge not found"),
        auto_recovery="the guard restarts Docker once, unless containers of others would end with it",
    ),
    Failure(
        "mount-missing",
        "a file or folder that the engine's container mounts is not there",
        "it was removed, or its disk is not mounted",
        "Bring it back, or run site.yml, which writes what Sparkfleet writes.",
    ),
    Failure(
        "cache-not-mounted",
        "the model cache is empty",
        "its disk is not mounted, or it was emptied",
        "Mount it (`findmnt`, /etc/fstab), then `sparkfleet start`; or run site.yml to fetch the model again.",
    ),
    Failure(
        "compose-invalid",
        "Docker Compose refuses the file of the release",
        "it was written by hand, or an argument or variable has a form that Compose understands in another way",
        "Correct what the message names in the inventory or the model card and deploy again; what runs is untouched.",
    ),
    # -- images ------------------------------------------------------------------------------------------------
    Failure(
        "image-differs",
        "what was offered is not the image",
        "another Spark or a bundle gave another digest than the registry has for this tag",
        "Look into the Spark that gave it. An image NAME@sha256:DIGEST is certain.",
    ),
    Failure(
        "model-differs",
        "what was offered is not the model",
        "another Spark or a bundle offered another commit, file or hash than the Hub has for this revision",
        "Look into the Spark that offered it. Where a branch has moved on since, set the commit as the revision.",
    ),
    Failure(
        "image-platform",
        "the image is for another processor",
        "a Spark is aarch64; the image was built for something else",
        "Use an image with linux/arm64 (NVIDIA's have it).",
        (
            r"exec format error",
            r"no matching manifest for linux",
            r"does not match the (?:detected host|specified) platform",
        ),
    ),
    Failure(
        "image-missing",
        "the image of the release is not on the host",
        "it was not fetched, or somebody removed it (`docker image prune`)",
        "Run site.yml, or playbooks/fetch.yml and then the same again: it pulls what is pinned.",
        (r"No such image",),
    ),
    Failure(
        "image-unknown",
        "the registry has no such image",
        "name or tag are wrong, or the tag was removed",
        "Check sparkfleet_image, or image in the model card.",
        (r"manifest unknown", r"manifest for .* not found", r"repository does not exist"),
    ),
    Failure(
        "image-denied",
        "the registry refuses the image",
        "it needs an account, or the account may not pull it",
        "`docker login REGISTRY` on the host with an account that may; check the image's name.",
        (r"pull access denied", r"unauthorized: authentication required"),
    ),
    Failure(
        "image-pull",
        "the image could not be pulled",
        "Docker gave a reason that is not in this table",
        "See `journalctl -u docker` on the host.",
    ),
    Failure(
        "registry-name",
        "the registry's name does not resolve",
        "the host has no working name server for it",
        "Check /etc/resolv.conf and the network of the host.",
        (r"dial tcp: lookup \S+.*(?:no such host|server misbehaving|i/o timeout)",),
    ),
    Failure(
        "registry-unreachable",
        "the registry cannot be reached",
        "network, firewall or proxy stand between the host and the registry",
        "Check the network of the host and the proxy of its Docker engine, then run again: the pull resumes.",
        (r"net/http: (?:request canceled|TLS handshake timeout)", r"Client\.Timeout exceeded while awaiting headers"),
    ),
    Failure(
        "registry-tls",
        "the registry's certificate is not trusted",
        "a private CA, or a proxy that opens TLS",
        "Put its CA at /etc/docker/certs.d/REGISTRY/ca.crt on the host.",
        (r"x509: certificate", r"tls: failed to verify certificate"),
    ),
    Failure(
        "registry-limit",
        "the registry limits the number of pulls",
        "too many pulls from this address",
        "Wait, or `docker login REGISTRY` on the host.",
        (r"toomanyrequests",),
    ),
    # -- the Hugging Face Hub ----------------------------------------------------------------------------------
    Failure(
        "hub-repo-unknown",
        "the Hub has no such model",
        "the repository's name is wrong, or it is private and the token may not see it",
        "Check repo in the model card.",
        (r"RepositoryNotFoundError", r"Repository Not Found for url", r"is not a valid model identifier"),
        statuses=(404,),
        chapter=LICENCE,
    ),
    Failure(
        "hub-revision-unknown",
        "the model has no such revision",
        "branch, tag or commit do not exist in the repository",
        "Set sparkfleet_revision to one that its page lists.",
        (r"RevisionNotFoundError", r"Revision Not Found for url", r"is not a valid git identifier"),
    ),
    Failure(
        "hub-token-rejected",
        "the Hub rejects the token",
        "it is mistyped, expired or revoked",
        "Make a new read token at https://huggingface.co/settings/tokens and set sparkfleet_hf_token.",
        (r"Invalid credentials in Authorization header", r"Invalid user token", r"token .{0,40}is (?:invalid|expired)"),
        chapter=LICENCE,
    ),
    Failure(
        "hub-token-missing",
        "the model is gated and there is no token",
        "its licence must be accepted by the account that a token belongs to",
        "Accept the licence on the model's page, make a read token at https://huggingface.co/settings/tokens, and set "
        "sparkfleet_hf_token (or export HF_TOKEN before the run).",
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
        "its licence was not accepted with that account, or a fine-grained token lacks the right to read gated "
        "repositories",
        "Open the model's page with that account and accept the licence (for NVIDIA's Llama models Meta's may be asked "
        "for first); give a fine-grained token the right.",
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
        "name server, network, proxy or certificates of the host",
        "Check `curl -I https://huggingface.co` on the host, then run again: downloads resume.",
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
        "the Hub's answer is not one that a Hub gives",
        "something else answers at the address of the Hub, a proxy alters its answers, or the repository has files "
        "whose names cannot be",
        "Check sparkfleet_hub_endpoint and the proxy; open the repository's page.",
    ),
    Failure(
        "hub-token-in-clear",
        "the Hub's token would travel without TLS",
        "sparkfleet_hub_endpoint begins with http://",
        "Give it with https://, or take the token off the host.",
    ),
    # -- background jobs of the fetch --------------------------------------------------------------------------
    Failure(
        "fetch-busy",
        "another fetch runs on the host",
        "image and model are fetched one at a time",
        "Wait for it, then run again.",
    ),
    Failure(
        "bundle",
        "the bundle does not have what the host needs",
        "it was made for another image, model, system or processor, or files of it are missing or cut",
        "Make it again with `sparkfleet bundle FOLDER` and the inventory that is to be deployed.",
    ),
    Failure(
        "packages",
        "packages could not be put together, or not be listed",
        "apt refused: its sources do not answer, or lack a package",
        "Run `apt-get update` on the host and mend what it complains of.",
    ),
    Failure(
        "fetch-died",
        "a background job ended without a result",
        "it was killed, or the host was restarted",
        "Run again: it resumes.",
        auto_recovery="the next run goes on where it stopped",
    ),
    Failure(
        "fetch-timeout",
        "a fetch took longer than allowed",
        "the source is slow; the job goes on in the background",
        "Run again to attach to it.",
    ),
    Failure(
        "fetch-io",
        "a file of the fetch could not be read or written",
        "permissions, a broken disk or a missing folder on the host",
        "Run playbooks/prepare.yml, then fetch again.",
    ),
    Failure(
        "checksum",
        "a downloaded file is not what the Hub says it is",
        "the transfer damaged it, or something in between changed it",
        "Run again: the file is fetched again. If that does not help, look for a proxy that alters downloads.",
        chapter=INCOMPLETE,
        auto_recovery="the next run fetches the file again",
    ),
    Failure(
        "docker",
        "Docker refused or does not answer",
        "the engine is not running, or the operator may not use it",
        "See `systemctl status docker` and `journalctl -u docker` on the host; run playbooks/prepare.yml.",
        (r"Cannot connect to the Docker daemon", r"Is the docker daemon running"),
        auto_recovery="systemd starts Docker again; a switch waits two minutes for it",
    ),
    # -- before anything changes -------------------------------------------------------------------------------
    Failure(
        "memory-short",
        "the plan does not fit into the host's memory",
        "GPU and CPU share one memory; what the engine asks for is not available, would leave the host too little, or "
        "holds less than one sequence of max_model_len tokens",
        "Stop what else uses memory on the host, or choose what `sparkfleet plan MODEL` proposes: a lower "
        "gpu_memory_utilization, a shorter max_model_len, another profile or model. sparkfleet_memory_plan: warn goes "
        "on all the same.",
        chapter=MEMORY,
    ),
    Failure(
        "layout-unknown",
        "the planner does not know the model's KV cache",
        "its attention keeps something whose size does not follow from the model card",
        "Set sparkfleet_memory_plan: warn to go on without a plan, and watch the first start.",
    ),
    Failure(
        "image-unsupported",
        "the image does not run on a GB10",
        "it was built before the GB10, for another processor, or its name does not say which version it is",
        "Use nvcr.io/nvidia/vllm:25.09-py3 or later, or vllm/vllm-openai at a version of 2026.",
        chapter=FP8,
    ),
    Failure(
        "not-root",
        "Sparkfleet does not run as root on the host",
        "packages, services and folders of the host are root's; another user does not even see whose a port is",
        "Set become: true (ansible_become: true in the inventory), or run ansible-playbook with --become.",
    ),
    Failure(
        "clock-wrong",
        "the host's clock is wrong",
        "it was not set by a time server; certificates and signatures look expired or not yet valid",
        "Set it: `timedatectl set-ntp true` on the host, and let it reach a time server.",
    ),
    Failure(
        "docker-too-old",
        "Docker is too old",
        "requests for a GPU in the form that Sparkfleet uses came with Docker 20.10",
        "Upgrade it the way it was installed; Sparkfleet does not touch a Docker that other containers depend on.",
    ),
    Failure(
        "compose-too-old",
        "Docker's Compose plugin is missing or too old",
        "Ansible's module for Compose asks for 2.18",
        "Install or upgrade it the way Docker was installed (packages docker-compose-plugin, docker-compose-v2 or "
        "docker-compose).",
    ),
    Failure(
        "toolkit-too-old",
        "the NVIDIA Container Toolkit is too old",
        "`nvidia-ctk runtime configure` came with 1.12",
        "Upgrade it: `apt-get install --only-upgrade nvidia-container-toolkit` on the host.",
    ),
    Failure(
        "not-a-spark",
        "the host has no GB10",
        "the address is another machine's, or its driver is not installed",
        "Check the inventory and nvidia-smi; to go on all the same set sparkfleet_require_gb10: false.",
    ),
    Failure(
        "os-unsupported",
        "the operating system is not supported",
        "DGX OS (Ubuntu 24.04) is; Debian 12 and 13 are for the simulator",
        "Install DGX OS.",
    ),
    Failure(
        "os-without-compose",
        "the distribution has no package of Compose v2",
        "it is too old",
        "Set sparkfleet_docker_source: docker.",
    ),
    Failure(
        "machine-unsupported",
        "the processor is not supported",
        "a Spark is aarch64; x86_64 is for the simulator",
        "Check the address in the inventory.",
    ),
    Failure(
        "operator-unknown",
        "the operator's user does not exist",
        "it is neither in /etc/passwd nor in the directory service of the host",
        "Set sparkfleet_operator to a user that exists.",
    ),
    Failure(
        "cache-not-a-folder",
        "the cache directory is not a folder",
        "a file of that name exists",
        "Move it, or set sparkfleet_cache_dir.",
    ),
    Failure(
        "bad-input",
        "a value is not of the form it must have",
        "the message names it",
        "Correct it in the inventory or the model card.",
    ),
    Failure(
        "all-at-once",
        "more than one Spark that serves would stop at the same time",
        "the verb was given several hosts that serve now, and nobody confirmed that all may stop",
        "Use `sparkfleet rollout`, or -l for one after the other, or confirm it with --yes (ansible-playbook: "
        "-e sparkfleet_all_at_once=true).",
    ),
    Failure(
        "same-host",
        "one host has two names in the inventory",
        "both names lead to the same machine: its machine ID and boot ID are the same",
        "Remove one of the names from the inventory, or correct its ansible_host.",
    ),
    # -- waiting and verifying: found by looking, not in a log -------------------------------------------------
    Failure(
        "switch-running-other",
        "another run is switching the host to a release",
        "two operators, or a run of yours that was cut: its job goes on on the host",
        "Wait until it is over (`sparkfleet status` shows it), then run again.",
    ),
    Failure(
        "lock-held",
        "another program holds the lock of switches",
        "somebody took it by hand (`flock`), or a process of Sparkfleet hangs",
        "End the process that the message names, then run again.",
    ),
    Failure(
        "switch-interrupted",
        "a switch was cut half way",
        "the host was restarted, or the job was killed",
        "Nothing to do: the release before is started and verified again. Then run again.",
        auto_recovery="the guard, or the next run, brings the release before back",
    ),
    Failure(
        "switch-restored",
        "the last switch failed, and what ran before was brought back",
        "the new release did not verify",
        "Mend what is named beside it, and deploy again; the release's log is kept in /opt/sparkfleet/releases/N.",
    ),
    Failure(
        "switch-not-restored",
        "the last switch failed, and so did the way back",
        "what is wrong with the host keeps both releases from serving",
        "Mend what is named beside it; then `sparkfleet start`, or deploy again.",
    ),
    Failure(
        "guard-gave-up",
        "the guard gave up: the engine failed too often",
        "each start fails the same way, and restart loops leak memory until a Spark stops answering",
        "Mend what is named beside it; `sparkfleet start` or a deployment ends the giving up.",
    ),
    Failure(
        "guard-down",
        "the guard does not run",
        "it was stopped or disabled by hand, or its settings are damaged",
        "Run site.yml, which writes its settings and starts it; `systemctl status sparkfleet-guard` says why it ended. "
        "Where no guard is wanted set sparkfleet_guard: false.",
    ),
    Failure(
        "guard-stuck",
        "the guard runs and observes nothing",
        "its process was stopped (SIGSTOP) or hangs",
        "`systemctl restart sparkfleet-guard` on the host.",
        auto_recovery="systemd kills and starts it again after 90 s without a sign of life",
    ),
    Failure(
        "state-damaged",
        "a state file could not be understood",
        "it was edited, or the disk lost part of it",
        "Nothing to do: it was set aside under the name beside this, and a new one was begun. What it counted is lost.",
        auto_recovery="whoever reads it sets it aside and begins another",
    ),
    Failure(
        "engine-crashed",
        "the engine crashed and was restarted",
        "its last lines say why, where they are in this table",
        "Nothing to do if it stays with the one time; `sparkfleet logs` shows the lines before it.",
        auto_recovery="the guard starts it again, up to its cap",
    ),
    Failure(
        "engine-stopped",
        "the engine was stopped",
        "somebody stopped it: `sparkfleet stop`, `docker stop`",
        "`sparkfleet start` starts and verifies it.",
    ),
    Failure(
        "release-damaged",
        "a release on the host is damaged",
        "files under /opt/sparkfleet/releases were changed or removed",
        "Run site.yml: it brings the files back from their copies, or sets the release aside and stages a new one. "
        "What was edited is kept beside them; a setting belongs into the inventory.",
    ),
    Failure(
        "nothing-deployed",
        "nothing is deployed",
        "no release was ever verified on this host, or Sparkfleet was removed from it",
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
        "the engine crashes again and again",
        "each start fails the same way; on a Spark every round can leak memory until the host stops answering",
        "Stop it (`docker compose stop` in /opt/sparkfleet) and mend what its log says before the next start.",
    ),
    Failure(
        "engine-killed",
        "the engine was killed",
        "earlyoom or the kernel for want of memory, or a person (`docker kill`)",
        "Look for it in `journalctl -k -u earlyoom`; if memory ran out, lower gpu_memory_utilization.",
        exit_codes=(137,),
        chapter=MEMORY,
        auto_recovery="the guard starts it again, up to its cap",
    ),
    Failure(
        "engine-died",
        "the engine ended",
        "its log has no failure of this table",
        "Read the lines below and `docker logs` of the container.",
        exit_codes=(1, 2, 132, 134, 135, 139, 143),
    ),
    Failure(
        "start-timeout",
        "the engine was not ready in time",
        "a long load or compilation, or a start that hangs",
        "Look at `docker logs` of the container; if it moves on, run again with a larger sparkfleet_start_timeout.",
    ),
    Failure(
        "endpoint-down",
        "nothing answers at the endpoint",
        "the engine is not running or still starting",
        "Run site.yml: it starts the engine and waits until it is ready.",
    ),
    Failure(
        "engine-wedged",
        "the engine is alive but produces nothing",
        "/health says 200 while requests get no token (vLLM issues 39863 and 40926)",
        "Restart the service: `docker compose restart` in /opt/sparkfleet.",
        auto_recovery="the guard sees that no token moves, and restarts it",
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
        "Read its message, and `docker logs` of the container.",
    ),
    Failure(
        "answer-malformed",
        "an answer is not of the form that the API has",
        "something else than vLLM answers on the port, or the engine is damaged",
        "Check which container holds the port; use the image of the model card.",
    ),
    Failure(
        "answer-wrong",
        "the answer is wrong",
        "a question with a known answer did not get it: damaged weights, a wrong chat template, a kernel that computes "
        "nonsense, or a model too small for the question",
        "Run playbooks/fetch.yml: it hashes every file of the model and replaces what is damaged. If all are sound, "
        "change verify in the model card if the model cannot know the answer.",
    ),
    Failure(
        "answer-degenerate",
        "the answer is empty or one token over and over",
        "the engine computes nonsense: damaged weights, or kernels that do not fit the GPU",
        "Run playbooks/fetch.yml: it hashes every file of the model and replaces what is damaged. If all are sound, "
        "use the image of the model card.",
    ),
    Failure(
        "stream-broken",
        "the event stream is malformed",
        "the engine died during the answer, or a proxy in between buffers or cuts it",
        "See `docker logs` of the container; ask the engine's own port.",
    ),
    Failure(
        "counters-still",
        "the engine's counters did not move",
        "the answers came from something else than this engine, or its metrics are switched off",
        "Check which container holds the port; leave out --disable-log-stats.",
    ),
    Failure(
        "api-incomplete",
        "the engine does not offer all of the API",
        "its description (/openapi.json) lacks paths that clients use",
        "Use the image and the arguments of the model card.",
    ),
    Failure(
        "low-throughput",
        "throughput is lower than expected",
        "one stream is bound by memory bandwidth (273 GB/s); figures above that limit cannot be reached",
        "Send requests at the same time: batching multiplies the total. Watch vllm:num_requests_running and "
        "vllm:kv_cache_usage_perc; raise max_num_batched_tokens only if prompts are long.",
        chapter=THROUGHPUT,
    ),
    Failure(
        "engine-stalls",
        "the engine stands still again and again",
        "its processes get no time: they are stopped and continued, another program takes the processors, or the host "
        "swaps; /metrics, which costs nothing, took more than a second in most of the last minute",
        "See `top` and `vmstat 1` on the host for what takes processors and memory; `sparkfleet restart` if an engine "
        "stays slow on an idle host.",
    ),
    Failure(
        "cuda-error",
        "CUDA reported an error",
        "a kernel failed or the driver lost the GPU",
        "Look for Xid lines in `dmesg`; restart the host if nvidia-smi does not answer.",
        (r"CUDA error: (?!out of memory)", r"cudaError\w+"),
        unless=("out-of-memory", "gpu-lost", "kernel-image-missing", "driver-too-old", "fp8-cutlass"),
    ),
    Failure(
        "internal",
        "an error that is not in this table",
        "a case nobody met before, or a mistake in Sparkfleet",
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
    """What log lines, an HTTP status of the Hub or a container's end tell: failures in the order of the table, then
    harmless ones. An exit code counts only where nothing else was found."""
    read = [plain(split_stamp(line)[1]) for line in lines]
    found: dict[str, Finding] = {}
    for failure, patterns in _COMPILED:
        hits = [
            message.strip()
            for level, message in read
            # What vLLM itself calls a warning or an information did not end it.
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
    """The lines of a log that say why it ended: those of the findings, the innermost errors with what belongs to
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
    """The table as a page of the docs."""
    parts = [
        "# Failures and what to do\n",
        "Made from `src/sparkfleet/diagnosis/failures.py` by `python -m sparkfleet.diagnosis.failures`; do not edit.\n",
        "An error of Sparkfleet ends in the name of its entry here, in brackets.\n",
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
            parts.append(f"- Recovers by itself: {failure.auto_recovery}.")
        if failure.chapter:
            parts.append(f"- In the guide: {failure.chapter}")
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
