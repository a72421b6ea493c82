"""The memory plan: what vLLM will make of a Spark's unified memory, before anything is started.

Pure functions of card, arguments, engine version and memory figures. GiB is 1024**3 bytes, GB 1e9. The budget is
vLLM's own (``v1/worker/gpu_worker.py``): utilization x total, less weights, less the peak of activations in a dummy
run of max_num_batched_tokens, less what the process takes beside torch, from 0.21 on less CUDA graphs; the rest is KV
cache. How far that is from logs of real hosts is in docs/memory-plan.md, which tests recompute.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sparkfleet_host.bounded import GIB

from sparkfleet import SparkfleetError
from sparkfleet.planning import vllm_versions
from sparkfleet.planning.catalog import Arguments, Attention, Card
from sparkfleet.planning.vllm_versions import Engine

#: Memory bandwidth of a GB10, GB/s (NVIDIA's data sheet).
BANDWIDTH_GB_S = 273.0
#: CUDA's total with older drivers, the smaller of the two that are seen (newer: 121.6); and what an idle DGX OS takes.
USUAL_TOTAL_GIB = 119.7
USUAL_HOST_GIB = 4.5
#: CUDA context, cuBLAS workspaces and host memory of the engine, which a GB10 counts against the budget: 1.5 and 2.2
#: GiB in logs that tell it apart from the weights (docs/logged-runs.yml). Before 0.11.1 what the host takes while the
#: weights load counts as well.
RUNTIME_GIB = 2.2
OLD_RUNTIME_GIB = 2.5
#: What the engine takes beyond its budget: 2.6 and 2.8 GiB measured at utilization 0.20 and 0.40 of a GB10
#: (public preflight script of a vLLM fork); API server, allocator, workspaces.
BEYOND_BUDGET_GIB = 2.8
#: Estimate of vLLM >= 0.21 for its graphs; 0.36 to 0.64 GiB in logs with default capture sizes.
CUDA_GRAPHS_GIB = 0.5
#: Bytes a logit (max_num_seqs x vocab) of the sampler's dummy run: 38.4 to 38.9 in logs of five models
#: (public table of vLLM 0.11 on H100).
SAMPLER_BYTES = 38.6
#: How far KV cache was from the logs that the plan was calibrated on and checked against (docs/memory-plan.md).
ERROR = 0.10
#: Tokens of a usual request, question and answer, for "how many at a time".
TYPICAL_TOKENS = 4096
#: vLLM's defaults where a card says nothing (openai api server, less than 70 GiB or unknown GPU memory).
DEFAULT_UTILIZATION = 0.92
DEFAULT_BATCHED_TOKENS = 2048
DEFAULT_SEQUENCES = 256
BLOCK = 16
SHARE = "gpu_memory_utilization"
#: Below this one stream reads slower than people do.
SLOW_TOK_S = 6.0


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory of a host in GiB: what CUDA reports in total, what is available now, and the floor for the host itself."""

    total: float = USUAL_TOTAL_GIB
    available: float = USUAL_TOTAL_GIB - USUAL_HOST_GIB
    reserve: float = 4.0


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """A way out: ``kind`` is utilization, context, batch, sequences, kv_cache, profile, model or two_sparks."""

    kind: str
    text: str
    change: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Figures in GiB unless named otherwise; ``reasons`` say why it does not fit, ``notes`` what to know if it does."""

    model: str
    profile: str
    engine: str
    max_model_len: int
    gpu_memory_utilization: float
    kv_cache_dtype: str
    weights_gib: float
    activation_gib: float
    runtime_gib: float
    cuda_graphs_gib: float
    kv_bytes_per_token: int
    kv_cache_gib: float
    kv_cache_tokens: int
    max_concurrency: float
    full_length_sequences: int
    typical_sequences: int
    requested_gib: float
    total_gib: float
    available_gib: float
    reserve_gib: float
    left_gib: float
    fits: bool
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    suggestions: tuple[Suggestion, ...]
    decode_tok_s_limit: float
    measured_tok_s: float | None

    def as_dict(self) -> dict[str, Any]:
        """Plain data, rounded for reading."""
        data = dataclasses.asdict(self)
        for key, value in data.items():
            if isinstance(value, float):
                data[key] = round(value, 2)
        return data


def kv_dtype(card: Card, arguments: Arguments, version: Engine) -> str:
    """``bf16`` or ``fp8``: what this version of vLLM keeps keys and values in."""
    asked = str(arguments.get("kv_cache_dtype", "auto"))
    if asked.startswith("fp8"):
        return "fp8"
    if asked == "auto" and card.shape.kv_cache_dtype == "fp8" and version.kv_follows_checkpoint:
        return "fp8"
    return "bf16"


def layer_bytes(entry: Attention, dtype: str) -> int:
    """Bytes that one layer keeps for one token; raises for a layout whose size is not known."""
    size = 1 if dtype == "fp8" else 2
    if entry.kind in ("full", "sliding"):
        return 2 * entry.kv_heads * entry.head_dim * size
    if entry.kind == "mla" and dtype == "bf16":
        return (entry.rank + entry.rope_dim) * size
    what = "MLA with an FP8 KV cache" if entry.kind == "mla" else f"attention of kind {entry.kind}"
    raise SparkfleetError(f"the planner does not know how vLLM lays out {what}, and does not guess")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How vLLM cuts the KV cache: layers in groups of equal number, one block of every group from one pool."""

    block_bytes: int
    full_groups: int
    windows: tuple[int, ...]
    bytes_per_token: int

    def blocks(self, tokens: int, batched_tokens: int) -> int:
        """Blocks of one sequence of ``tokens`` (vLLM: ``max_memory_usage_bytes`` of each group)."""
        needed = self.full_groups * math.ceil(tokens / BLOCK)
        for window in self.windows:
            needed += math.ceil(min(window - 1 + batched_tokens, tokens) / BLOCK) + 1
        return needed


def layout(card: Card, dtype: str) -> Layout:
    """The layout of a model; raises when it is not known."""
    entries = card.shape.attention
    sizes = {layer_bytes(entry, dtype) for entry in entries}
    if len(sizes) > 1:
        raise SparkfleetError(
            f"{card.source}: its kinds of attention keep {' and '.join(map(str, sorted(sizes)))} bytes a token and "
            "layer; the planner knows only layouts with one size, and does not guess"
        )
    size = sizes.pop()
    group = min(entry.layers for entry in entries)
    full = [entry for entry in entries if entry.kind != "sliding"]
    return Layout(
        block_bytes=size * group * BLOCK,
        full_groups=sum(math.ceil(entry.layers / group) for entry in full),
        windows=tuple(
            entry.window for entry in entries if entry.kind == "sliding" for _ in range(math.ceil(entry.layers / group))
        ),
        bytes_per_token=size * sum(entry.layers for entry in full),
    )


def activation_gib(card: Card, batched_tokens: int, sequences: int) -> float:
    """Peak of the dummy run: one layer's MLP for all batched tokens, or the sampler for all sequences."""
    shape = card.shape
    paths = max(shape.experts_per_token, 1)
    # gate and up in bf16, their product quantized, the output of each expert, the residual stream and its norm
    widths = 2.5 * shape.mlp * paths + (shape.hidden * paths if paths > 1 else 0) + 2 * shape.hidden
    forward = batched_tokens * widths * 2
    sampler = sequences * shape.vocab * SAMPLER_BYTES
    return max(forward, sampler) / GIB


def kv_cache_gib(utilization: float, total: float, consumed: float, activation: float, graphs: float = 0.0) -> float:
    """vLLM's sum: what is left of utilization x total for the KV cache; negative when the rest alone is too much."""
    return utilization * total - consumed - activation - graphs


def requested_gib(command: Sequence[str], total: float) -> float:
    """What an engine that was started with this command holds, GiB; rather too little than too much."""
    given = dict(itertools.pairwise(command))
    try:
        if "--kv-cache-memory-bytes" in given:  # and the weights, which the command does not tell
            held = float(given["--kv-cache-memory-bytes"]) / GIB
        else:
            held = float(given.get("--gpu-memory-utilization", DEFAULT_UTILIZATION)) * total + BEYOND_BUDGET_GIB
    except (ValueError, OverflowError):
        return 0.0
    return held if 0 <= held <= total + BEYOND_BUDGET_GIB else 0.0  # not for NaN either


def make(
    card: Card,
    arguments: Arguments,
    *,
    profile: str = "throughput",
    version: Engine | None = None,
    memory: Memory = Memory(),
    others: Callable[[], Sequence[Card]] = tuple,
) -> Plan:
    """Plan ``card`` under ``arguments`` (profile and overrides merged) on a host with ``memory``.

    ``others`` gives the cards that may be proposed instead; it is called only when one is needed. Raises when the
    layout of the KV cache is not known.
    """
    version = version or vllm_versions.of_image(card.image)
    made = _budget(card, arguments, profile, version, memory)
    if not made.fits:
        found = list(_ways_out(card, arguments, profile, version, memory, made, others()))
    elif made.decode_tok_s_limit < SLOW_TOK_S:
        found = list(_faster(card, memory, others()))
    else:
        found = []
    return dataclasses.replace(made, suggestions=tuple(found))


def _number(arguments: Arguments, key: str, default: float) -> float:
    value = arguments.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else default


def _budget(card: Card, arguments: Arguments, profile: str, version: Engine, memory: Memory, ranks: int = 1) -> Plan:
    length = int(_number(arguments, "max_model_len", card.shape.context))
    batched = int(_number(arguments, "max_num_batched_tokens", DEFAULT_BATCHED_TOKENS))
    sequences = int(_number(arguments, "max_num_seqs", DEFAULT_SEQUENCES))
    utilization = _number(arguments, SHARE, DEFAULT_UTILIZATION)
    fixed = int(_number(arguments, "kv_cache_memory_bytes", 0))

    dtype = kv_dtype(card, arguments, version)
    cut = layout(card, dtype)
    weights = card.weights.memory_gib / ranks
    activation = activation_gib(card, batched, sequences)
    graphs = CUDA_GRAPHS_GIB if version.counts_cuda_graphs and arguments.get("enforce_eager") is not True else 0.0
    runtime = OLD_RUNTIME_GIB if version.counts_host_growth else RUNTIME_GIB
    spent = weights + activation + runtime + graphs
    if fixed:  # vLLM then leaves the utilization aside
        cache = fixed / GIB
        requested = spent + cache
        utilization = requested / memory.total
    else:
        requested = utilization * memory.total
        cache = kv_cache_gib(utilization, memory.total, weights + runtime, activation, graphs)
    blocks = max(int(cache * GIB) * ranks // cut.block_bytes, 0)
    concurrency = blocks / cut.blocks(length, batched)
    left = memory.available - requested - BEYOND_BUDGET_GIB

    reasons = []
    if dtype == "fp8" and not version.has_fp8_kv:
        reasons.append(
            f"vLLM {version.text} has no FP8 KV cache on a GB10: leave kv_cache_dtype out, or take a newer image"
        )
    if length > card.shape.context and "hf_overrides" not in arguments:
        reasons.append(f"max_model_len {length} is longer than the model's context of {card.shape.context} tokens")
    if memory.available < requested:
        reasons.append(
            f"vLLM asks for {requested:.1f} GiB ({utilization:.2f} of {memory.total:.1f}), {memory.available:.1f} GiB "
            "are available: it would refuse to start"
        )
    elif left < memory.reserve:
        reasons.append(
            f"with the {requested:.1f} GiB of its budget and {BEYOND_BUDGET_GIB} GiB beside it the engine leaves "
            f"{left:.1f} GiB to the host; below {memory.reserve:g} GiB a Spark is in danger of freezing"
        )
    if concurrency < 1:
        one = cut.blocks(length, batched) * cut.block_bytes / GIB / ranks
        reasons.append(
            f"weights ({weights:.1f} GiB), activations ({activation:.1f}) and runtime ({runtime + graphs:.1f}) "
            f"leave {max(cache, 0):.1f} GiB for the KV cache; one sequence of {length} tokens needs {one:.1f}"
        )
    typical = min(blocks // cut.blocks(min(TYPICAL_TOKENS, length), batched), sequences)
    full = min(int(concurrency), sequences)
    limit = BANDWIDTH_GB_S * ranks / card.weights.read_gb_per_token
    measured = max((entry.tok_s for entry in card.measured), default=None)
    notes = []
    if not reasons:
        if concurrency < 1 + ERROR:
            notes.append(
                f"one sequence of {length} tokens all but fills the KV cache, and the plan is right to within "
                f"{ERROR:.0%}: a smaller max_model_len or max_num_batched_tokens makes the start sure"
            )
        if full < sequences:
            notes.append(
                f"max_num_seqs {sequences}: {full} of full length ({length} tokens) fit at a time, "
                f"{typical} of {min(TYPICAL_TOKENS, length)}; more are kept waiting"
            )
        if limit < SLOW_TOK_S:
            notes.append(
                f"each token reads {card.weights.read_gb_per_token:g} GB of weights: one stream cannot be faster than "
                f"{limit:.1f} tokens a second" + (f" (measured: {measured:g})" if measured else "")
            )
        if "speculative_config" in arguments:
            notes.append("with speculative decoding a stream can be faster than the weights can be read for each token")
        if version.counts_page_cache:
            counts = "counts" if version.version else "may count"
            notes.append(f"vLLM {version.text} {counts} the page cache as used: it is dropped just before the start")
        if card.shape.kv_cache_dtype == "fp8" and dtype == "bf16":
            notes.append(
                f"the checkpoint asks for an FP8 KV cache, vLLM {version.text} keeps it in bf16; from "
                f"{'.'.join(map(str, vllm_versions.KV_FOLLOWS_CHECKPOINT))} on it follows, and twice as many tokens fit"
            )
    return Plan(
        model=card.name,
        profile=profile,
        engine=version.text,
        max_model_len=length,
        gpu_memory_utilization=utilization,
        kv_cache_dtype=dtype,
        weights_gib=weights,
        activation_gib=activation,
        runtime_gib=runtime,
        cuda_graphs_gib=graphs,
        kv_bytes_per_token=cut.bytes_per_token,
        kv_cache_gib=max(cache, 0.0),
        kv_cache_tokens=int(concurrency * length),
        max_concurrency=concurrency,
        full_length_sequences=full,
        typical_sequences=typical,
        requested_gib=requested,
        total_gib=memory.total,
        available_gib=memory.available,
        reserve_gib=memory.reserve,
        left_gib=left,
        fits=not reasons,
        reasons=tuple(reasons),
        notes=tuple(notes),
        suggestions=(),
        decode_tok_s_limit=limit,
        measured_tok_s=measured,
    )


def _ways_out(
    card: Card, arguments: Arguments, profile: str, version: Engine, memory: Memory, made: Plan, others: Sequence[Card]
) -> Iterable[Suggestion]:
    """The nearest plans that fit, the smallest change first."""
    highest = highest_share(memory)

    def offer(kind: str, change: Arguments) -> list[Suggestion]:
        plan = _budget(card, {**arguments, **change}, profile, version, memory)
        return [_suggestion(kind, change, plan)] if plan.fits else []

    def first(kind: str, key: str, values: Iterable[float], also: Arguments | None = None) -> list[Suggestion]:
        return next((found for value in values if (found := offer(kind, {**(also or {}), key: value}))), [])

    batched = int(_number(arguments, "max_num_batched_tokens", DEFAULT_BATCHED_TOKENS))
    sequences = int(_number(arguments, "max_num_seqs", DEFAULT_SEQUENCES))
    here: list[Suggestion] = []
    if made.kv_cache_dtype == "fp8" and not version.has_fp8_kv:
        here += offer("kv_cache", {"kv_cache_dtype": "auto"})
    if highest > 0 and abs(highest - made.gpu_memory_utilization) >= 0.005:
        here += offer("utilization", {SHARE: highest})
    here += first("context", "max_model_len", _lengths(made.max_model_len))
    here += first("batch", "max_num_batched_tokens", [n for n in (16384, 8192, 4096, 2048) if n < batched])
    here += first("sequences", "max_num_seqs", [n for n in (64, 32, 16, 8) if n < sequences])
    if not here and highest > 0:  # a lower utilization, and a context that then fits
        here += first("context", "max_model_len", _lengths(made.max_model_len), {SHARE: highest})
    yield from here
    for name, replaced in card.profiles.items():
        if name != profile:
            yield from _with_room("profile", {"profile": name}, card, {**card.arguments, **replaced}, memory, version)
    if not here:
        yield from _with_room("two_sparks", {"ranks": 2}, card, arguments, memory, version)
    yield from _models(card, memory, others, lambda other: other.weights.memory_gib < made.weights_gib)


def highest_share(memory: Memory) -> float:
    """The highest utilization, in steps of 0.01, that leaves the host its floor."""
    return math.floor((memory.available - BEYOND_BUDGET_GIB - memory.reserve) / memory.total * 100) / 100


def _with_room(
    kind: str, change: dict[str, Any], card: Card, arguments: Arguments, memory: Memory, version: Engine
) -> Iterable[Suggestion]:
    """Another plan, with its own utilization or, if that is too much, the highest that the host can give."""
    profile, ranks = str(change.get("profile", "throughput")), int(change.get("ranks", 1))
    for share in ({}, {SHARE: highest_share(memory)}):
        plan = _budget(card, {**arguments, **share}, profile, version, memory, ranks)
        if plan.fits:
            yield _suggestion(kind, {**change, **share}, plan)
            return


def _suggestion(kind: str, change: dict[str, Any], plan: Plan) -> Suggestion:
    said = ["two Sparks, half of the model on each"] if kind == "two_sparks" else []
    said += [f"{key if key in ('profile', 'model') else key + ':'} {change[key]}" for key in change if key != "ranks"]
    return Suggestion(kind, f"{', '.join(said)} ({_room(plan)})", change)


def _lengths(now: int) -> list[int]:
    """Shorter contexts, in steps that people choose."""
    steps = [n * 1024 for n in (192, 160, 128, 96, 80, 64, 48, 40, 32, 24, 20, 16, 12, 10, 8, 6, 4)]
    return [n for n in steps if n < now]


def _faster(card: Card, memory: Memory, others: Sequence[Card]) -> Iterable[Suggestion]:
    """Models that fit and read at most two thirds as much for a token."""
    read = card.weights.read_gb_per_token
    return _models(card, memory, others, lambda other: other.weights.read_gb_per_token <= read * 2 / 3)


def _models(card: Card, memory: Memory, others: Sequence[Card], wanted: Callable[[Card], bool]) -> Iterable[Suggestion]:
    """Two models of the catalogue that fit: first of the same family, then the largest."""
    family = card.name.rsplit("-", 1)[0]
    ranked = sorted(
        (other for other in others if other.name != card.name and wanted(other)),
        key=lambda other: (not other.name.startswith(family), -other.weights.memory_gib),
    )
    found: list[Suggestion] = []
    for other in ranked:
        version, arguments = vllm_versions.of_image(other.image), other.with_profile("throughput")
        try:
            found += _with_room("model", {"model": other.name}, other, arguments, memory, version)
        except SparkfleetError:  # a layout that is not known
            continue
        if len(found) == 2:
            break
    return found


def _room(plan: Plan) -> str:
    return (
        f"{plan.kv_cache_tokens:,} tokens of KV cache, {plan.max_concurrency:.1f} sequences of {plan.max_model_len}, "
        f"at most {plan.decode_tok_s_limit:.1f} tok/s a stream"
    )
