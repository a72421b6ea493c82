"""What is known of images: the vLLM inside, whether it runs on a GB10, and where versions differ about memory."""

from __future__ import annotations

import dataclasses
import re

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

#: From here on vLLM takes an FP8 KV cache for a checkpoint that asks for one, by default (vllm pull 30785).
KV_FOLLOWS_CHECKPOINT: Version = (0, 14)
#: V1 has no FP8 KV cache on compute capability 12.1 before (spark-facts; vLLM 0.10.1.1).
FP8_KV: Version = (0, 11)
#: From here on an estimate for CUDA graphs is taken out of the budget (vLLM's own log: "default since v0.21.0").
CUDA_GRAPHS_COUNTED: Version = (0, 21)
#: Before, the page cache counts as used at the start (vllm 48140 on 0.24; 35356; cured in 0.33).
PAGE_CACHE_FORGIVEN: Version = (0, 33)
#: Before, memory that the host takes while the weights load counts as the engine's own (see memory.py).
HOST_GROWTH_FORGIVEN: Version = (0, 11, 1)


@dataclasses.dataclass(frozen=True)
class Engine:
    """A version of vLLM and what follows from it; ``version`` is () when it is not known."""

    version: Version

    @property
    def text(self) -> str:
        """The version as people write it."""
        return ".".join(map(str, self.version)) or "of unknown version"

    @property
    def kv_follows_checkpoint(self) -> bool:
        """Whether ``kv_cache_dtype: auto`` is FP8 for a checkpoint that asks for it."""
        return not self.version or self.version >= KV_FOLLOWS_CHECKPOINT

    @property
    def has_fp8_kv(self) -> bool:
        """Whether an FP8 KV cache works on a GB10."""
        return not self.version or self.version >= FP8_KV

    @property
    def counts_cuda_graphs(self) -> bool:
        """Whether CUDA graphs are taken out of the budget."""
        return not self.version or self.version >= CUDA_GRAPHS_COUNTED

    @property
    def counts_page_cache(self) -> bool:
        """Whether the page cache counts as used memory at the start."""
        return not self.version or self.version < PAGE_CACHE_FORGIVEN

    @property
    def counts_host_growth(self) -> bool:
        """Whether what the host takes while loading counts against the KV cache."""
        return bool(self.version) and self.version < HOST_GROWTH_FORGIVEN


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
    if tag in ("", "latest", "nightly"):
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
