"""Records of benchmarks as tests need them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparkfleet_host import benchmarks

ROW: dict[str, Any] = {
    **{"shape": "chat", "input": 3840, "output": 256, "streams": 1, "repetition": 1, "requests": 3},
    **{"tokens_per_second": 10.0, "stream_tokens_per_second": 12.0, "ttft_ms": 200.0, "seconds": 76.8},
    **{"ttft_p50_ms": 200.0, "ttft_p95_ms": 250.0, "itl_p50_ms": 83.0, "itl_p95_ms": 90.0, "output_tokens": 768},
    **{"temperature_c": 61.0, "power_w": 40.0, "joules_per_token": 4.0},
    **{"counted": {"requests": 3, "output_tokens": 768}, "disturbed": False, "throttled": []},
}


def row(**more: Any) -> dict[str, Any]:
    return {**ROW, **more}


def record(rows: Sequence[Mapping[str, Any]] = (ROW,), **more: Any) -> dict[str, Any]:
    return benchmarks.check_record(
        {
            **{"format": 1, "id": "20261129T093000Z-00beef", "at": 1e9, "ended": 1e9 + 80, "host": "spark-1"},
            **{"controller": "ann@desk", "release": 3, "gpu": "NVIDIA GB10", "driver": "580.95.05"},
            **{"service": "vllm-m", "model": "m", "profile": "throughput", "repo": "org/m", "revision": "c" * 40},
            **{"image": "i@sha256:" + "d" * 64, "settings": "e" * 64, "vllm": "0.25.1", "container": "c1"},
            **{"reads": False, "limit_tok_s": 24.0, "published_tok_s": 11.0, "tool": "vllm bench serve"},
            **{"serving": False, "complete": True, "rows": [*rows], **more},
        }
    )
