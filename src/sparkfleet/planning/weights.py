"""What weights take in memory, from the number of parameters that a checkpoint keeps in each format.

Bytes a parameter, scales included: FP8 with a scale a tensor or channel; FP8 in blocks of 128 x 128 with a float32
each; NVFP4, 4 bits and an FP8 scale for 16; MXFP4, 4 bits and an 8-bit exponent for 32 (OCP Microscaling). A checkpoint
in FP8 or FP4 keeps embedding, head, norms and often attention in bf16, so a model's own mixture counts.
"""

from __future__ import annotations

from collections.abc import Mapping

from sparkfleet_host.bounded import GIB

BYTES = {
    "float32": 4.0,
    "bf16": 2.0,
    "fp8": 1.0,
    "block_fp8": 1 + 4 / (128 * 128),
    "nvfp4": 0.5 + 1 / 16,
    "mxfp4": 0.5 + 1 / 32,
}
#: vLLM logs a little more than its parameters: 0.05 GiB for Llama-3.1-8B, 0.12 for Qwen3.6-35B-A3B (rotary caches,
#: buffers; docs/gpu-runs.yml).
BUFFERS_GIB = 0.1


def gib(parameters: Mapping[str, float]) -> float:
    """GiB in memory of ``parameters``, thousand millions (1e9) in each format of `BYTES`; a format that is not there
    is a KeyError."""
    return sum(count * 1e9 * BYTES[name] for name, count in parameters.items()) / GIB + BUFFERS_GIB
