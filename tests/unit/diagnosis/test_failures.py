"""The table of failures: real messages find their entry, ordinary logs find none, every id in the code is in it."""

from __future__ import annotations

import re

import pytest

from sparkfleet.diagnosis.failures import BY_ID, TABLE, Failure, markdown, match, relevant
from tests.unit import DATA, ROOT

GATED = "https://huggingface.co/nvidia/Llama-3.1-8B-Instruct-FP8/resolve/main/config.json"


def ids(lines: list[str]) -> list[str]:
    return [finding.failure.id for finding in match(lines) if not finding.failure.harmless]


@pytest.mark.parametrize(
    ("id", "log"),
    [
        (
            "memory-refused",
            "(EngineCore_0 pid=17) ERROR 09-28 15:47:24 [core.py:718] ValueError: Free memory on device (33.99/121.63 "
            "GiB) on startup is less than desired GPU memory utilization (0.83, 100.95 GiB). Decrease GPU memory "
            "utilization or reduce GPU memory used by other processes.",
        ),
        (
            "memory-refused",
            "(Worker pid=2) ERROR 03-12 08:22:28 [x.py:8] ValueError: Free memory on device cuda:0 (111.99/139.8 GiB) "
            "on startup is less than desired GPU memory utilization (0.95, 132.81 GiB).",
        ),
        (
            "kv-cache-too-small",
            "ValueError: To serve at least one request with the model's max seq len (65536), (20.0 GiB KV cache is "
            "needed, which is larger than the available KV cache memory (8.1 GiB). Based on the available memory, …",
        ),
        ("out-of-memory", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."),
        ("memory-profiling", "AssertionError: Error in memory profiling. Initial free memory 80 GiB, current free 90."),
        ("shared-memory-small", "RuntimeError: Insufficient space in /dev/shm for shared-memory allocation: 160 MiB"),
        ("fp8-cutlass", "torch.ops._C.cutlass_scaled_mm(out, a, b, scale_a, scale_b)\nRuntimeError: Error Internal"),
        ("triton-sm121a", "ptxas fatal   : Value 'sm_121a' is not defined for option 'gpu-name'"),
        ("kernel-image-missing", "RuntimeError: CUDA error: no kernel image is available for execution on the device"),
        ("driver-too-old", "RuntimeError: The NVIDIA driver on your system is too old (found version 12080)."),
        (
            "nvidia-runtime-missing",
            'Error response from daemon: could not select device driver "nvidia" with capabilities: [[gpu]]',
        ),
        ("gpu-invisible", "RuntimeError: Failed to infer device type, please set the environment variable"),
        ("hub-token-missing", f"401 Client Error. (Request ID: x)\n\nCannot access gated repo for url {GATED}.\n"
         "Access to model x is restricted. You must have access to it and be authenticated to access it."),
        ("hub-no-access", f"403 Client Error. (Request ID: x)\n\nCannot access gated repo for url {GATED}.\n"
         "Access to model x is restricted and you are not in the authorized list. Visit its page to ask for access."),
        ("hub-gated", f"Cannot access gated repo for url {GATED}"),
        ("hub-repo-unknown", "401 Client Error. (Request ID: x)\n\nRepository Not Found for url: https://huggingface.co/a."),
        ("hub-token-rejected", "401 Client Error.\nInvalid credentials in Authorization header"),
        ("hub-revision-unknown", "404 Client Error. Revision Not Found for url: https://huggingface.co/api/models/a"),
        ("hub-unreachable", "OSError: We couldn't connect to 'https://huggingface.co' to load the files"),
        (
            "model-not-in-cache",
            "huggingface_hub.errors.LocalEntryNotFoundError: Cannot find the requested files in the disk cache and "
            "outgoing traffic has been disabled.\nOSError: We couldn't connect to 'https://huggingface.co' to load …",
        ),
        (
            "download-incomplete",
            "safetensors_rust.SafetensorError: Error while deserializing header: MetadataIncompleteBuffer",
        ),
        ("download-incomplete", "RuntimeError: Cannot find any model weights with `/root/.cache/huggingface/x`"),
        ("disk-full", "OSError: [Errno 28] No space left on device: '/root/.cache/vllm/torch_compile_cache/x'"),
        (
            "context-too-long",
            "  Value error, User-specified max_model_len (65536) is greater than the derived max_model_len "
            "(max_position_embeddings=40960 or model_max_length=None in model's config.json).",
        ),
        ("argument-unknown", "vllm: error: unrecognized arguments: --kv-cache-memory-bytes 5"),
        ("model-unsupported", "ValueError: Model architectures ['Qwen4ForCausalLM'] are not supported for now."),
        ("port-taken", "OSError: [Errno 98] Address already in use"),
        (
            "port-taken",
            "driver failed programming external connectivity on endpoint x: Bind for 0.0.0.0:8000 failed: port is "
            "already allocated",
        ),
        ("image-platform", "exec /opt/nvidia/nvidia_entrypoint.sh: exec format error"),
        ("cache-permission", "PermissionError: [Errno 13] Permission denied: '/root/.cache/huggingface/models--a'"),
        ("cuda-error", "torch.AcceleratorError: CUDA error: an illegal memory access was encountered"),
    ],
)  # fmt: skip
def test_messages_of_engines_docker_and_hub(id: str, log: str) -> None:
    assert ids(log.split("\n"))[:1] == [id]


def test_a_gated_repository_is_told_once() -> None:
    log = f"401 Client Error. (Request ID: x)\nCannot access gated repo for url {GATED}."
    assert ids(log.split("\n")) == ["hub-token-missing"]


@pytest.mark.parametrize("name", ["vllm-0.10.1.1-gpu.log", "vllm-0.32-cpu.log"])
def test_a_good_start_has_no_failure(name: str) -> None:
    assert ids((DATA / name).read_text(encoding="utf-8").split("\n")) == []


def test_capability_warning_is_harmless() -> None:
    found = match((DATA / "vllm-0.10.1.1-gpu.log").read_text(encoding="utf-8").split("\n"))
    assert [finding.failure.id for finding in found] == ["capability-warning"]
    assert found[0].failure.harmless


def test_what_vllm_calls_a_warning_is_no_cause() -> None:
    line = "(APIServer pid=1) WARNING 11-23 15:24:07 [model.py:9] User-specified max_model_len (9) is greater than"
    assert ids([line]) == []
    assert ids(["INFO 11-23 15:24:07 [w.py:1] Free memory on device (9/9 GiB) on startup. Desired GPU memory"]) == []
    assert ids(["WARNING 11-23 15:24:07 [p.py:7] Address already in use. Retrying with a new port."]) == []


@pytest.mark.parametrize(
    ("status", "id"),
    [(401, "hub-token-missing"), (403, "hub-no-access"), (404, "hub-repo-unknown"), (503, "hub-unreachable")],
)
def test_statuses_of_the_hub(status: int, id: str) -> None:
    assert [finding.failure.id for finding in match([], status=status)] == [id]


def test_how_the_container_ended() -> None:
    assert [item.failure.id for item in match(["nothing known"], exit_code=1)] == ["engine-died"]
    assert [item.failure.id for item in match([], exit_code=137)] == ["engine-killed"]
    assert [item.failure.id for item in match([], oom_killed=True, exit_code=137)] == ["out-of-memory"]
    assert ids(["OSError: [Errno 98] Address already in use"]) == ["port-taken"]
    found = match(["OSError: [Errno 98] Address already in use"], exit_code=1)
    assert [item.failure.id for item in found] == ["port-taken"]


TRACE = (DATA / "vllm-memory-refused.log").read_text(encoding="utf-8").split("\n")


def test_excerpt_has_the_innermost_error_and_no_traceback() -> None:
    assert relevant(TRACE, match(TRACE)) == [
        "ValueError: Free memory on device (33.99/121.63 GiB) on startup is less than desired GPU memory utilization "
        "(0.83, 100.95 GiB)."
    ]


def test_excerpt_of_an_unknown_error() -> None:
    log = [
        *TRACE[:5],
        "(EngineCore_0 pid=17) ERROR 09-28 15:47:24 [core.py:7] acme.StrangeError: first",
        "  and why",
        "",
    ]
    assert relevant(log) == ["acme.StrangeError: first", "and why"]


def test_excerpt_without_any_error_is_the_end_of_the_log() -> None:
    assert relevant([f"line {number}" for number in range(40)]) == [f"line {number}" for number in range(25, 40)]


def test_excerpt_is_short() -> None:
    assert len(relevant([f"ValueError: number {number} {'x' * 900}" for number in range(40)])) == 15
    assert max(map(len, relevant(["ValueError: " + "x" * 5000]))) <= 400


def test_every_entry_is_whole() -> None:
    assert len(BY_ID) == len(TABLE)
    for failure in TABLE:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", failure.id)
        assert failure.title and failure.cause and not failure.cause.endswith(".")
        assert failure.remedy.endswith(".")
        assert all(other in BY_ID for other in failure.unless), failure.id
        for pattern in failure.signature:
            re.compile(pattern)


def test_every_chapter_of_the_guide_has_an_entry() -> None:
    assert {failure.chapter for failure in TABLE if failure.chapter} == {
        "Container Fails with Memory Errors",
        "FP8 Quantization Fails",
        "Model Download Requires License Acceptance",
        "Model Download Incomplete",
        '"Compute Capability 12.1" Warning',
        "Lower Than Expected Throughput",
    }


def test_every_id_in_the_code_is_in_the_table() -> None:
    """Errors carry an id as first argument: JobError("disk-full", …), refuse("port-taken", …)."""
    pattern = re.compile(r'\b(?:JobError|FetchError|CheckError|refuse|fail|Finding)\(\s*"([a-z0-9]+(?:-[a-z0-9]+)*)"')
    files = [*ROOT.glob("plugins/**/*.py"), *ROOT.glob("src/sparkfleet/*.py")]
    used = {(id, path.name) for path in files for id in pattern.findall(path.read_text(encoding="utf-8"))}
    assert len(used) > 20
    assert {(id, name) for id, name in used if id not in BY_ID} == set()


def test_the_page_of_the_docs_has_every_entry() -> None:
    page = markdown()
    for failure in TABLE:
        assert f"## {failure.id}\n" in page
        assert failure.remedy in page
    assert "(harmless)" in page and "HTTP 403 of the Hub" in page


def test_message_says_what_why_and_what_to_do() -> None:
    (finding,) = match(["OSError: [Errno 98] Address already in use"])
    assert finding.message.startswith("the port is taken: another process")
    assert "sparkfleet_port" in finding.message
    assert finding.lines == ("OSError: [Errno 98] Address already in use",)
    assert isinstance(finding.failure, Failure)
