"""What is known of images: the vLLM inside, whether it runs on a GB10, and where versions differ about memory."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any, Literal

from sparkfleet_host.bounded import printable

from sparkfleet import SparkfleetError

Version = tuple[int, ...]

#: Tags of nvcr.io/nvidia/vllm and the vLLM inside: NVIDIA's release notes; 26.02 and 26.06 from dgx-spark-playbooks
#: (issue 79, pull 91), 26.08 from a log in docs/logged-runs.yml.
NGC_VERSIONS = {
    "25.09": "0.10.1.1",
    "25.10": "0.10.2",
    "25.11": "0.11.0",
    "25.12": "0.11.1",
    "26.01": "0.11.1",
    "26.02": "0.15.1",
    "26.03": "0.17.1",
    "26.04": "0.19.0",
    "26.05": "0.20.1",
    "26.06": "0.22.1",
    "26.08": "0.27.1",
    "26.10": "0.31.0",
}
#: The first image of NVIDIA that runs on a GB10, and the first upstream version that has arm64 and sm_121.
FIRST_NGC = "25.09"
FIRST_UPSTREAM: Version = (0, 18)
#: The first vLLM with ``--allowed-media-domains`` and VLLM_MEDIA_URL_ALLOW_REDIRECTS (engine/arg_utils.py, envs.py; the
#: wheel of 0.10.2 has neither).
FIRST_MEDIA_DOMAINS: Version = (0, 11)

#: The first vLLM whose ranks connect to each other by themselves, with ``--nnodes`` (engine/arg_utils.py; the wheel of
#: 0.11.1 has it, that of 0.11.0 has not). The first of the images whose builders left Ray out of them: NVIDIA's 26.04,
#: upstream's v0.19.
FIRST_NNODES: Version = (0, 11, 1)
FIRST_WITHOUT_RAY: Version = (0, 19)

#: Dates of vLLM's changes are those of the first release that has them: read from the wheels of 0.11.0 to 0.32.0 on
#: PyPI, unless a line names another source.


@dataclasses.dataclass(frozen=True)
class Rules:
    """What a version of vLLM does about memory; the fields start as the oldest version known here has them."""

    #: ``kv_cache_dtype: auto`` is FP8 for a checkpoint that requests it.
    kv_follows_checkpoint: bool = False
    #: An FP8 KV cache works on compute capability 12.1.
    has_fp8_kv: bool = False
    #: There is ``--kv-cache-memory-bytes``.
    has_kv_cache_bytes: bool = False
    #: Memory that the host takes while the weights load counts as the engine's own (see memory_plan.OLD_RUNTIME_GIB).
    counts_host_growth: bool = True
    #: The page cache counts as used memory at the start.
    counts_page_cache: bool = True
    #: An estimate for CUDA graphs is taken out of the budget by the V1 model runner, and by the V2 one.
    v1_counts_cuda_graphs: bool = False
    v2_counts_cuda_graphs: bool = False
    #: Bytes a batched token and hidden unit at the peak of a dense model's dummy run with the V1 model runner.
    v1_hidden_bytes: int = 4
    #: Which models the V2 model runner takes unless VLLM_USE_V2_MODEL_RUNNER overrides it: none, dense (full or
    #: sliding attention, no experts), all.
    v2_runner: Literal["none", "dense", "all"] = "none"
    #: The largest bucket of layers sets the layers a group if it is smaller than the smallest times this.
    group_factor: float = 1.0
    #: Attention of different page sizes in one model: blocks are lengthened, or (True) pages padded as well.
    pads_pages: bool = False
    #: A state's page grows to that of a draft's attention.
    pads_states: bool = False
    #: Groups of layers with pages of different size share blocks (vLLM: packed groups), where an index is kept.
    packs_groups: bool = False
    #: Batches in flight that a sliding window holds blocks for, with asynchronous scheduling.
    batches_in_flight: int = 1
    #: States are cached by prefix at all; and prefix caching is on for hybrids unless it is asked for.
    caches_states: bool = False
    hybrid_prefix_caching: bool = False
    #: ``align`` takes a draft's tokens; before, it refuses speculation.
    align_speculates: bool = False
    #: ``mamba_cache_mode`` of Mamba2 models that is chosen with prefix caching; and with speculation.
    mamba2_mode: Literal["all", "align"] = "all"
    mamba2_speculative_mode: Literal["all", "align"] = "all"
    #: Mode ``all`` exists; it keeps blocks for speculative tokens.
    has_mode_all: bool = True
    all_counts_speculation: bool = False
    #: In ``align`` a block may not be longer than a batch.
    batch_holds_block: bool = False
    #: A block besides those of a sequence, for a checkpoint of a prefill.
    mamba2_checkpoint: int = 0
    kda_checkpoint: int = 0
    #: The block of a hybrid is a multiple of ``block_size`` (before: of 16, and block_size is a floor).
    block_size_aligns: bool = False
    #: The block of a hybrid with MLA is a multiple of this.
    mla_alignment: int = 64
    #: ``GPU KV cache size`` is concurrency x max_model_len (before: blocks of a group x tokens of a block).
    prints_by_concurrency: bool = False


#: (first version, what changes, where that is seen)
CHANGES: tuple[tuple[Version, dict[str, Any], str], ...] = (
    (
        (0, 11),
        {"has_fp8_kv": True, "has_kv_cache_bytes": True},
        "spark-facts: 0.10.1.1 has none on capability 12.1; engine/arg_utils.py of 0.11.0, 0.10.1.1 has none",
    ),
    ((0, 11, 1), {"counts_host_growth": False}, "docs/logged-runs.yml"),
    ((0, 12), {"group_factor": 1.25}, "kv_cache_utils.py"),
    ((0, 14), {"kv_follows_checkpoint": True}, "vllm pull 30785"),
    ((0, 15), {"caches_states": True}, "config/cache.py, MambaCacheMode"),
    ((0, 16), {"align_speculates": True}, "models/config.py"),
    ((0, 18), {"group_factor": 1.5, "batch_holds_block": True}, "kv_cache_utils.py, config/vllm.py"),
    (
        (0, 20),
        {"block_size_aligns": True, "mla_alignment": 1, "mamba2_speculative_mode": "align"},
        "platforms/interface.py, models/config.py",
    ),
    ((0, 20, 1), {"prints_by_concurrency": True}, "kv_cache_utils.py"),
    ((0, 21), {"v1_counts_cuda_graphs": True}, "vLLM's own log: default since v0.21.0"),
    (
        (0, 22),
        {"all_counts_speculation": True, "mamba2_speculative_mode": "all"},
        "kv_cache_interface.py, models/config.py",
    ),
    ((0, 24), {"pads_pages": True, "v2_runner": "dense"}, "kv_cache_utils.py, config/vllm.py (0.24: six families)"),
    ((0, 25), {"v1_hidden_bytes": 8}, "docs/gpu-runs.yml (0.25.1); before: the guide's 70B starts with 0.10.1.1"),
    (
        (0, 26),
        {"batches_in_flight": 2, "hybrid_prefix_caching": True},
        "kv_cache_interface.py, config/model.py",
    ),
    (
        (0, 27),
        {"batch_holds_block": False, "pads_states": True, "mla_alignment": 128},
        "config/vllm.py, kv_cache_utils.py, platforms/interface.py",
    ),
    (
        (0, 28),
        {"mamba2_mode": "align", "mamba2_speculative_mode": "align"},
        "models/config.py",
    ),
    (
        (0, 29),
        {"packs_groups": True, "v2_runner": "all", "v2_counts_cuda_graphs": True},
        "kv_cache_utils.py, config/vllm.py, worker/gpu/model_runner.py",
    ),
    ((0, 32), {"has_mode_all": False, "mamba2_checkpoint": 1, "kda_checkpoint": 1}, "mamba_mixer2.py, glm5next"),
    ((0, 33), {"counts_page_cache": False}, "vllm 48140 (on 0.24), 35356"),
)


@functools.cache
def _rules(version: Version) -> Rules:
    made = Rules()
    for since, changed, _ in CHANGES:
        if not version or version >= since:
            made = dataclasses.replace(made, **changed)
    # A version that is not known is planned as the newest, but its page cache is dropped to be on the safe side.
    return made if version else dataclasses.replace(made, counts_page_cache=True)


def since(field: str) -> Version:
    """The version that changed a rule first."""
    return next(version for version, changed, _ in CHANGES if field in changed)


@dataclasses.dataclass(frozen=True)
class Engine:
    """A version of vLLM and what follows from it; ``version`` is () when it is not known.

    ``development``: a build between releases, ``0.26.1rc1.dev1231``; its rules are those of the release that follows.
    """

    version: Version
    development: bool = False

    @property
    def text(self) -> str:
        """The version as people write it."""
        return ".".join(map(str, self.version)) + ".dev" * self.development or "of unknown version"

    @property
    def rules(self) -> Rules:
        """What this version does about memory."""
        return _rules((self.version[0], self.version[1] + 1) if self.development else self.version)

    @property
    def limits_media(self) -> bool:
        """Whether it can be told from which hosts it may fetch media; one that is not known may lack the option."""
        return self.version >= FIRST_MEDIA_DOMAINS

    @property
    def has_nnodes(self) -> bool | None:
        """Whether its ranks connect to each other by themselves; None where its version is not known."""
        return self.version >= FIRST_NNODES if self.version else None

    @classmethod
    def parse(cls, text: str) -> Engine:
        """Of a version as vLLM logs it; raises when the text is none. ``0.1.dev20482`` (built from a copy without
        tags) is not known."""
        numbers = parse_version(text)
        between = bool(re.search(r"\.dev[0-9]", text)) and len(numbers) > 2 and numbers[2] > 0
        return cls(()) if numbers == (0, 1) else cls(numbers, between)


def parse_version(text: str) -> Version:
    """Numbers of a version; raises when the text is none."""
    found = _version(text.strip())
    if not found:
        raise SparkfleetError(f"'{printable(text, 60)}' is not a version of vLLM: write it like 0.10.1.1")
    return found


def _version(text: str) -> Version:
    """Numbers of a version; () when the text is none."""
    suffixes = r"(?:\.?(?:a|b|rc|dev|post)[0-9]{1,9}){0,3}(?:[+-][\w.+-]{1,100})?"
    found = re.fullmatch(rf"v?([0-9]{{1,6}}(?:\.[0-9]{{1,6}}){{0,7}}){suffixes}", text, re.ASCII)
    return tuple(int(part) for part in found[1].split(".")) if found else ()


def _repository(image: str) -> tuple[str, str]:
    """Repository and tag of a reference; a digest is left out."""
    name = image.partition("@")[0]
    head, _, last = name.rpartition("/")
    last, _, tag = last.partition(":")
    return f"{head}/{last}".lstrip("/"), tag


def of_image(image: str) -> Engine:
    """The engine of an image: by NVIDIA's tag or upstream's version, also through a mirror of either."""
    repository, tag = _repository(image)
    if re.search(r"(^|/)nvidia/vllm$", repository):
        month = re.match(r"[0-9]{2}\.[0-9]{2}", tag)
        known = NGC_VERSIONS.get(month[0]) if month else None
        return Engine(parse_version(known) if known else ())
    if re.search(r"(^|/)vllm-openai(-\w+)?$", repository) and tag.startswith("v"):
        return Engine(_version(tag.partition("-")[0]))
    return Engine(())


def has_ray(image: str) -> bool | None:
    """Whether an image has Ray; None for one that is neither NVIDIA's nor upstream's."""
    engine = of_image(image)
    return engine.version < FIRST_WITHOUT_RAY if engine.version else None


def moves(image: str) -> bool:
    """Whether the image's tag is one that is given to another image tomorrow, and no digest pins it."""
    return "@" not in image and _repository(image)[1] in ("", "latest", "nightly", "main")


def starts_with_serve(image: str) -> bool:
    """Whether the image's own entry point is ``vllm serve``, as upstream's is; NVIDIA's takes any command."""
    return bool(re.search(r"(^|/)vllm-openai(-\w+)?$", _repository(image)[0]))


def unfit(image: str) -> str:
    """Why an image cannot run on a GB10; empty when nothing speaks against it."""
    repository, tag = _repository(image)
    if re.search(r"(^|/)nvidia/vllm$", repository):
        month = re.match(r"[0-9]{2}\.[0-9]{2}", tag)
        if month and month[0] < FIRST_NGC:
            return f"{image} is older than {FIRST_NGC}, the first of NVIDIA's images with support for the GB10"
        return ""
    if not re.search(r"(^|/)vllm-openai$", repository):
        return ""
    if "x86_64" in tag or "amd64" in tag:
        return f"{image} is built for x86_64; a Spark is aarch64"
    if tag in ("", "latest"):
        return (
            f"{image} names no version: `latest` of 2025 fails on the GB10 (FP8 in CUTLASS, Triton on sm_121a), and "
            "a moving tag is another engine tomorrow"
        )
    version = _version(tag.partition("-")[0]) if tag.startswith("v") else ()
    if version and version < FIRST_UPSTREAM:
        return (
            f"{image} does not support the GB10 (FP8 in CUTLASS, Triton on sm_121a): "
            f"upstream's images do from v{'.'.join(map(str, FIRST_UPSTREAM))} on"
        )
    return ""
