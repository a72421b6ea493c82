"""The memory plan: what vLLM will make of a Spark's unified memory, before anything is started.

Pure functions of card, arguments, engine version and memory figures. GiB is 1024**3 bytes, GB 1e9. The budget is
vLLM's own (``v1/worker/gpu_worker.py``): utilization x total, less weights, less the peak of activations in a dummy
run of max_num_batched_tokens, less what the process takes besides torch, from 0.21 on less CUDA graphs; the rest is KV
cache, which ``kv_layout`` cuts into blocks. Of a model that spans several Sparks the figures are those of one of them.
How far that is from logs of real hosts is in docs/memory-plan.md, which tests recompute.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sparkfleet_host.bounded import GIB
from sparkfleet_host.rank import OBJECT_STORE
from sparkfleet_host.verify import GENERATIVE

from sparkfleet import SparkfleetError
from sparkfleet.planning import catalog, kv_layout, verification, vllm_versions
from sparkfleet.planning.catalog import Arguments, Card
from sparkfleet.planning.kv_layout import DEFAULT_BATCHED_TOKENS, Stage
from sparkfleet.planning.kv_layout import number as _number
from sparkfleet.planning.vllm_versions import Engine

#: Memory bandwidth of a GB10, GB/s (NVIDIA's data sheet).
BANDWIDTH_GB_S = 273.0
#: CUDA's total with older drivers, the smaller of the two that are seen (newer: 121.6); and what an idle DGX OS takes.
USUAL_TOTAL_GIB = 119.7
USUAL_HOST_GIB = 4.5
#: CUDA context, cuBLAS workspaces and host memory of the engine, which a GB10 counts against the budget: 1.5 and 2.2
#: GiB in logs that list it apart from the weights (docs/logged-runs.yml). Before 0.11.1 what the host takes while the
#: weights load counts as well.
RUNTIME_GIB = 2.2
OLD_RUNTIME_GIB = 2.5
#: What a loader keeps besides the weights: 4.43 GiB less KV cache with instanttensor than without, on a Spark
#: (MiaAI-Lab/GLM-5.3-Flash-EXL3-2x-DGX-Sparks issue 204).
LOADER_GIB = {"instanttensor": 4.4}
#: What the engine takes beyond its budget: 2.6 and 2.8 GiB measured at utilization 0.20 and 0.40 of a GB10
#: (public preflight script of a vLLM fork); API server, allocator, workspaces.
BEYOND_BUDGET_GIB = 2.8
#: What Ray takes besides on each Spark: 0.6 GiB of processes (resident, Ray 2.60, on the host of rank 0), and its
#: object store (`sparkfleet_host.rank`).
RAY_GIB = 0.6 + OBJECT_STORE / GIB
#: Bytes of an element of embedding and output layer, which quantized checkpoints keep in bf16.
EMBEDDING_BYTES = 2
#: Bytes a token and hidden unit of what a stage of a pipeline gets from the one before: hidden states and residual in
#: bf16, in a buffer and as they are received (worker/gpu_model_runner.py; calculated, not measured).
HANDED_ON_BYTES = 8
#: Estimate of vLLM >= 0.21 for its graphs; 0.36 to 0.64 GiB in logs with default capture sizes. Where it is not
#: subtracted, the graphs come on top of the budget.
CUDA_GRAPHS_GIB = 0.5
#: Bytes a token and hidden unit of what a mixture of experts keeps besides its experts' own: residual, norms, router,
#: shared expert, output (fitted to one run of gpt-oss-20b, docs/gpu-runs.yml).
EXPERT_STREAMS = 19
#: Bytes a logit (max_num_seqs x vocab) of the sampler's dummy run: 38.4 to 38.9 in logs of five models
#: (public table of vLLM 0.11 on H100).
SAMPLER_BYTES = 38.6
#: How far KV cache was from the logs that the plan was calibrated on and checked against (docs/memory-plan.md).
ERROR = 0.10
#: Tokens of a usual request, question and answer, for "how many at a time".
TYPICAL_TOKENS = 4096
#: vLLM's defaults where a card gives none (openai api server, less than 70 GiB or unknown GPU memory).
DEFAULT_UTILIZATION = 0.92
DEFAULT_SEQUENCES = 256
SHARE = "gpu_memory_utilization"
#: Below this one stream reads slower than people do.
SLOW_TOK_S = 6.0


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory of a host in GiB: what CUDA reports in total, what is available now, the floor for the host itself, and
    what the engine was measured there to take more than planned (see `calibration`)."""

    total: float = USUAL_TOTAL_GIB
    available: float = USUAL_TOTAL_GIB - USUAL_HOST_GIB
    reserve: float = 4.0
    correction: float = 0.0


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """A way out: ``kind`` is utilization, context, batch, sequences, kv_cache, profile, model or two_sparks."""

    kind: str
    text: str
    change: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Figures in GiB unless named otherwise; ``reasons`` why it does not fit, ``notes`` what to know if it does.

    ``kv_cache_tokens`` is what this version of vLLM logs as the size of the KV cache, ``kv_cache_held_tokens`` what
    fits into it in sequences of ``max_model_len``. ``left_gib`` is negative where the engine needs more than there is.
    An encoder keeps no KV cache, and takes less than vLLM requests: the latter must be available when it starts.
    ``decode_tok_s_limit`` is 0 for a model that gives numbers in place of text.
    """

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
    sparks: int = 1
    kv_block_tokens: int = 0
    kv_block_bytes: int = 0
    kv_blocks: int = 0
    kv_blocks_per_sequence: int = 0
    prefix_caching: bool = True
    mamba_cache_mode: str = "none"
    speculative_tokens: int = 0
    kv_cache_held_tokens: int = 0
    correction_gib: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain data, rounded for reading."""
        data = dataclasses.asdict(self)
        for key, value in data.items():
            if isinstance(value, float):
                data[key] = round(value, 2)
        return data


def v2_runner(card: Card, version: Engine) -> bool:
    """Whether vLLM's V2 model runner takes the model: the environment's setting, or this version's choice."""
    asked = card.environment.get("VLLM_USE_V2_MODEL_RUNNER")
    if asked is not None:
        return asked not in ("0", "")
    dense = not card.shape.experts_per_token and not any(e.kind in kv_layout.STATES for e in card.shape.attention)
    return version.rules.v2_runner == "all" or (version.rules.v2_runner == "dense" and dense)


def activation_gib(
    card: Card, batched_tokens: int, sequences: int, version: Engine, *, gpus: int = 1, v2: bool = False
) -> float:
    """Peak of the dummy run on one of ``gpus``: the widest layer for all batched tokens, or the sampler for all
    sequences.

    Bytes a batched token were fitted to a real engine (docs/gpu-runs.yml): static FP8 dense 7 mlp + 4 hidden with the
    ``v2`` runner and 5 mlp + 8 hidden with V1; block FP8 the queries on top. In a mixture of experts gate, up, their
    product and the output of every expert; of linear attention its projections, convolution and states a chunk.
    """
    shape = card.shape
    if shape.experts_per_token:
        expert = max(2 * shape.mlp, shape.hidden) + shape.mlp
        width = 2 * shape.experts_per_token * expert / gpus + EXPERT_STREAMS * shape.hidden
    else:
        width = (
            (7 * shape.mlp / gpus + 4 * shape.hidden)
            if v2
            else (5 * shape.mlp / gpus + version.rules.v1_hidden_bytes * shape.hidden)
        )
        if shape.quantization == "block_fp8":
            head_dim = max((entry.head_dim for entry in shape.attention), default=0)
            width += 2 * shape.heads * head_dim / gpus
    linear = max((_linear_width(entry) for entry in shape.attention), default=0.0) / gpus
    sampler = sequences * shape.vocab * SAMPLER_BYTES
    return max(batched_tokens * (width + linear), sampler) / GIB


def _linear_width(entry: catalog.Attention) -> float:
    """Bytes a token of a layer of linear attention: projections, convolution, q, k and v apart, output, and the states
    that are kept for each chunk of 64 tokens."""
    if entry.kind == "gdn":
        keys, values = entry.key_heads * entry.key_dim, entry.value_heads * entry.value_dim
        states = values * entry.key_dim / 64
    elif entry.kind == "kda":
        keys = values = entry.heads * entry.head_dim
        states = values * entry.head_dim / 64
    elif entry.kind == "mamba2":
        keys, values = entry.groups * entry.state, entry.heads * entry.head_dim
        states = values * entry.state / max(entry.chunk, 64)
    else:
        return 0.0
    return 2 * ((2 * keys + 2 * values) + (2 * keys + values) + 3 * values + values + states)


def kv_cache_gib(utilization: float, total: float, consumed: float, activation: float, graphs: float = 0.0) -> float:
    """vLLM's sum: what is left of utilization x total for the KV cache; negative when the rest alone is too much."""
    return utilization * total - consumed - activation - graphs


def requested_gib(command: Sequence[str], total: float) -> float:
    """What an engine that was started with this command holds, GiB; rather too little than too much."""
    given = dict(itertools.pairwise(command))
    try:
        if "--kv-cache-memory-bytes" in given:  # and the weights, which the command does not show
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
    version = version or card.engine()
    made = _budget(card, arguments, profile, version, memory)
    if not made.fits:
        found = list(_ways_out(card, arguments, profile, version, memory, made, others()))
    elif 0 < made.decode_tok_s_limit < SLOW_TOK_S:
        found = list(_faster(card, memory, others()))
    else:
        found = []
    return dataclasses.replace(made, suggestions=tuple(found))


def _budget(card: Card, arguments: Arguments, profile: str, version: Engine, memory: Memory) -> Plan:
    """The plan of the stage of a pipeline that has the fewest blocks: vLLM gives all stages as many."""
    stages = dict.fromkeys(kv_layout.stages(card, arguments))
    return min((_of_stage(card, arguments, profile, version, memory, stage) for stage in stages), key=_tightness)


def _tightness(plan: Plan) -> tuple[float, float]:
    return plan.kv_blocks, plan.left_gib


def stage_gib(card: Card, arguments: Arguments, stage: Stage) -> float:
    """Weights of a stage, all ranks of it together: its share of the layers, with the embedding, and the output layer.
    Where those are the same tensor, the first and the last stage each have it. A card does not say whether they are, so
    the larger figure of either case counts."""
    whole = card.weights.memory_gib
    if stage.first and stage.last:
        return whole
    end = min(card.shape.vocab * card.shape.hidden * EMBEDDING_BYTES / GIB, whole)
    return (whole - end) * stage.layers / card.shape.layers + end * (stage.first or stage.last)


def _of_stage(card: Card, arguments: Arguments, profile: str, version: Engine, memory: Memory, stage: Stage) -> Plan:
    batched = int(_number(arguments, "max_num_batched_tokens", DEFAULT_BATCHED_TOKENS))
    sequences = int(_number(arguments, "max_num_seqs", DEFAULT_SEQUENCES))
    utilization = share = _number(arguments, SHARE, DEFAULT_UTILIZATION)
    fixed = int(_number(arguments, "kv_cache_memory_bytes", 0))

    rules, gpus = version.rules, kv_layout.ranks(card, arguments)
    dtype = kv_layout.kv_dtype(card, arguments, version)
    cut = kv_layout.layout(card, arguments, version, stage)
    generates = bool({*verification.kinds(card, arguments)} & {*GENERATIVE})
    speculation = kv_layout.speculation(card, arguments)
    drafted = card.draft is not None and speculation.model == card.draft.repo
    weights = (stage_gib(card, arguments, stage) + (card.draft.loaded_gib if card.draft and drafted else 0)) / gpus
    v2 = v2_runner(card, version)
    # Without text there is no sampler.
    sampled = sequences if generates and stage.last else 0
    activation = activation_gib(card, batched, sampled, version, gpus=gpus, v2=v2)
    if not stage.first:
        activation += batched * card.shape.hidden * HANDED_ON_BYTES / GIB
    captured = 0.0 if arguments.get("enforce_eager") is True else CUDA_GRAPHS_GIB
    graphs = captured if (rules.v2_counts_cuda_graphs if v2 else rules.v1_counts_cuda_graphs) else 0.0
    runtime = OLD_RUNTIME_GIB if rules.counts_host_growth else RUNTIME_GIB
    runtime += LOADER_GIB.get(str(arguments.get("load_format", "")), 0.0)
    spent = weights + activation + runtime + graphs + memory.correction
    if fixed:  # vLLM then leaves the utilization aside, but for what must be free when it starts
        cache = fixed / GIB
        requested = spent + cache
        utilization = requested / memory.total
        pool = cut.pool(fixed)
    else:
        requested = utilization * memory.total
        consumed = weights + runtime + memory.correction
        cache = kv_cache_gib(utilization, memory.total, consumed, activation, graphs) if cut.groups else 0.0
        pool = cut.pool(int(cache * GIB))
    if isinstance(arguments.get("num_gpu_blocks_override"), int):
        pool = int(_number(arguments, "num_gpu_blocks_override", pool))
    longest = card.shape.context
    if arguments.get("max_model_len") == "auto":  # vLLM takes the longest that fits
        length = cut.longest(pool, longest) or longest
    else:
        length = int(_number(arguments, "max_model_len", longest))
    each = cut.blocks(length)
    concurrency = pool / each if cut.groups else float(sequences)
    taken = requested if cut.groups else spent
    beyond = beyond_budget_gib(arguments)
    left = memory.available - taken - beyond

    reasons = list(cut.refusals)
    if dtype == "fp8" and not rules.has_fp8_kv:
        reasons.append(
            f"vLLM {version.text} has no FP8 KV cache on a GB10: leave kv_cache_dtype out, or use a newer image"
        )
    if length > card.shape.context and "hf_overrides" not in arguments:
        reasons.append(f"max_model_len {length} is longer than the model's context of {card.shape.context} tokens")
    if fixed and not rules.has_kv_cache_bytes:
        first = ".".join(map(str, vllm_versions.since("has_kv_cache_bytes")))
        reasons.append(
            f"vLLM {version.text} has no --kv-cache-memory-bytes: use a newer image ({first} has it), or "
            f"{SHARE} in its place"
        )
    if fixed and requested <= memory.available < share * memory.total:
        reasons.append(
            f"also with kv_cache_memory_bytes vLLM starts only while {SHARE} ({share:.2f}) of the memory is free: "
            f"{share * memory.total:.1f} GiB, {memory.available:.1f} are available. Set {SHARE} to "
            f"{math.ceil(utilization * 100) / 100:g} besides"
        )
    if memory.available < requested:
        reasons.append(
            f"vLLM requests {requested:.1f} GiB ({utilization:.2f} of {memory.total:.1f}), {memory.available:.1f} GiB "
            "are available: it would refuse to start"
        )
    elif left < memory.reserve:
        reasons.append(
            f"with the {taken:.1f} GiB of its budget and {beyond:g} GiB besides it the engine leaves "
            f"{left:.1f} GiB to the host; below {memory.reserve:g} GiB a Spark is in danger of freezing"
        )
    if concurrency < 1:
        one = each * cut.block_bytes / GIB
        reasons.append(
            f"weights ({weights:.1f} GiB), activations ({activation:.1f}) and runtime ({runtime + graphs:.1f}) "
            f"leave {max(cache, 0):.1f} GiB for the KV cache; one sequence of {length} tokens needs {one:.1f}"
        )
    typical = min(pool // cut.blocks(min(TYPICAL_TOKENS, length)), sequences) if cut.groups else sequences
    full = min(int(concurrency), sequences)
    # Stages take turns with a token, so only the ranks of one read at a time.
    limit = BANDWIDTH_GB_S * gpus / card.weights.read_gb_per_token if generates else 0.0
    # Measured with the card's own speculation: with other speculation, or none, it says nothing.
    comparable = speculation.tokens == kv_layout.speculation(card, card.arguments).tokens
    measured = max((entry.tok_s for entry in card.measured if comparable), default=None)
    held, logged = int(concurrency * length) if cut.groups else 0, cut.tokens(pool, length)
    notes = list(cut.notes) if not reasons else []
    sparks = gpus * int(_number(arguments, kv_layout.PIPELINE, 1))
    if sparks > 1:
        split = f": {gpus} for each of {sparks // gpus} stages of layers" if sparks > gpus else ""
        notes.append(f"planned for each of {sparks} Sparks{split}")
    if not reasons:
        if not cut.groups:
            notes.append(
                f"an encoder keeps no KV cache: it takes {spent:.1f} GiB, and vLLM starts it where the "
                f"{requested:.1f} GiB of gpu_memory_utilization {utilization:.2f} are available"
            )
        if cut.groups and concurrency < 1 + ERROR:
            notes.append(
                f"one sequence of {length} tokens all but fills the KV cache, and the plan is right to within "
                f"{ERROR:.0%}: a smaller max_model_len or max_num_batched_tokens makes the start sure"
            )
        if full < sequences:
            notes.append(
                f"max_num_seqs {sequences}: {full} of full length ({length} tokens) fit at a time, "
                f"{typical} of {min(TYPICAL_TOKENS, length)}; more are kept waiting"
            )
        if not math.isclose(held, logged, rel_tol=0.02):
            notes.append(
                f"vLLM {version.text} logs this KV cache as {logged:,} tokens: before "
                f"{'.'.join(map(str, vllm_versions.since('prints_by_concurrency')))} it counts each of the "
                f"{len(cut.groups)} groups of layers as if all grew with the sequence"
            )
        if 0 < limit < SLOW_TOK_S and not cut.speculative_tokens:
            notes.append(
                f"each token reads {card.weights.read_gb_per_token:g} GB of weights: one stream cannot be faster than "
                f"{limit:.1f} tokens a second" + (f" (measured: {measured:g})" if measured else "")
            )
        if rules.counts_page_cache:
            counts = "counts" if version.version else "may count"
            notes.append(f"vLLM {version.text} {counts} the page cache as used: it is dropped just before the start")
        if card.shape.kv_cache_dtype == "fp8" and dtype == "bf16":
            notes.append(
                f"the checkpoint requests an FP8 KV cache, vLLM {version.text} keeps it in bf16; from "
                f"{'.'.join(map(str, vllm_versions.since('kv_follows_checkpoint')))} on it follows, and twice as many "
                "tokens fit"
            )
        if cut.mode == "align" and cut.prefix_caching:
            notes.append(
                f"prefixes are reused in steps of {cut.block:,} tokens, a block of this model: shorter ones are "
                "computed again each time"
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
        kv_cache_tokens=logged,
        max_concurrency=concurrency,
        full_length_sequences=full,
        typical_sequences=typical,
        requested_gib=requested,
        total_gib=memory.total,
        available_gib=memory.available,
        reserve_gib=memory.reserve,
        left_gib=min(left, memory.available - spent - beyond),
        fits=not reasons,
        reasons=tuple(reasons),
        notes=tuple(notes),
        suggestions=(),
        decode_tok_s_limit=limit,
        measured_tok_s=measured,
        sparks=sparks,
        kv_block_tokens=cut.block,
        kv_block_bytes=cut.block_bytes,
        kv_blocks=pool,
        kv_blocks_per_sequence=each,
        prefix_caching=cut.prefix_caching,
        mamba_cache_mode=cut.mode,
        speculative_tokens=cut.speculative_tokens,
        kv_cache_held_tokens=held,
        correction_gib=memory.correction,
    )


def beyond_budget_gib(arguments: Arguments) -> float:
    """What an engine takes beyond its budget."""
    return BEYOND_BUDGET_GIB + (RAY_GIB if arguments.get("distributed_executor_backend") == "ray" else 0.0)


def _ways_out(
    card: Card, arguments: Arguments, profile: str, version: Engine, memory: Memory, made: Plan, others: Sequence[Card]
) -> Iterable[Suggestion]:
    """The nearest plans that fit, the smallest change first."""
    highest = highest_share(memory, beyond_budget_gib(arguments))

    def offer(kind: str, change: Arguments) -> list[Suggestion]:
        plan = _budget(card, {**arguments, **change}, profile, version, memory)
        return [_suggestion(kind, change, plan)] if plan.fits else []

    def first(kind: str, key: str, values: Iterable[float], also: Arguments | None = None) -> list[Suggestion]:
        return next((found for value in values if (found := offer(kind, {**(also or {}), key: value}))), [])

    batched = int(_number(arguments, "max_num_batched_tokens", DEFAULT_BATCHED_TOKENS))
    sequences = int(_number(arguments, "max_num_seqs", DEFAULT_SEQUENCES))
    here: list[Suggestion] = []
    if made.kv_cache_dtype == "fp8" and not version.rules.has_fp8_kv:
        here += offer("kv_cache", {"kv_cache_dtype": "auto"})
    if version.rules.batch_holds_block and made.mamba_cache_mode == "align" and made.kv_block_tokens > batched:
        here += offer("batch", {"max_num_batched_tokens": made.kv_block_tokens})
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
    if not here and made.sparks == kv_layout.ranks(card, arguments):
        two = kv_layout.ranks(card, arguments) * 2
        yield from _with_room(
            "two_sparks", {"ranks": 2}, card, {**arguments, "tensor_parallel_size": two}, memory, version
        )
    yield from _models(card, memory, others, lambda other: other.weights.memory_gib < made.weights_gib)


def shares(engines: Sequence[tuple[Card, Arguments, Engine]], memory: Memory) -> list[float]:
    """Utilizations at which several engines fit a host together, in steps of 0.01: what each needs for one sequence of
    full length, and an equal part of what is left; one with kv_cache_memory_bytes takes what that makes. Empty where
    they do not fit at any. Raises when the layout of a KV cache is not known."""
    alone = dataclasses.replace(memory, available=memory.total, correction=0.0)
    fixed = [bool(_number(arguments, "kv_cache_memory_bytes", 0)) for _, arguments, _ in engines]
    steps = [
        math.ceil(_budget(card, arguments, "", version, alone).requested_gib / memory.total * 100)
        if given
        else next((step for step in range(1, 100) if _holds_one(card, arguments, version, alone, step / 100)), 100)
        for (card, arguments, version), given in zip(engines, fixed, strict=True)
    ]
    room = memory.available - memory.reserve - len(engines) * BEYOND_BUDGET_GIB
    spare = math.floor(room / memory.total * 100) - sum(steps)
    if spare < 0:
        return []
    each = spare // max(fixed.count(False), 1)
    return [(step + (0 if given else each)) / 100 for step, given in zip(steps, fixed, strict=True)]


def _holds_one(card: Card, arguments: Arguments, version: Engine, memory: Memory, share: float) -> bool:
    made = _budget(card, {**arguments, SHARE: share}, "", version, memory)
    taken = made.weights_gib + made.activation_gib + made.runtime_gib + made.cuda_graphs_gib
    return made.max_concurrency >= 1 + ERROR and made.requested_gib >= taken


def highest_share(memory: Memory, beyond: float = BEYOND_BUDGET_GIB) -> float:
    """The highest utilization, in steps of 0.01, that leaves the host its floor. ``beyond``: what the engine takes
    beyond its budget."""
    return math.floor((memory.available - beyond - memory.reserve) / memory.total * 100) / 100


def _with_room(
    kind: str, change: dict[str, Any], card: Card, arguments: Arguments, memory: Memory, version: Engine
) -> Iterable[Suggestion]:
    """Another plan, with its own utilization or, if that is too much, the highest that the host can give."""
    profile = str(change.get("profile", "throughput"))
    memory = dataclasses.replace(memory, correction=0.0)  # measured with other settings
    for share in ({}, {SHARE: highest_share(memory, beyond_budget_gib(arguments))}):
        plan = _budget(card, {**arguments, **share}, profile, version, memory)
        if plan.fits:
            yield _suggestion(kind, {**change, **share}, plan)
            return


def _suggestion(kind: str, change: dict[str, Any], plan: Plan) -> Suggestion:
    words = (
        ["two Sparks, half of the model on each (sparkfleet_nodes, docs/several-sparks.md)"]
        if kind == "two_sparks"
        else []
    )
    words += [f"{key if key in ('profile', 'model') else key + ':'} {change[key]}" for key in change if key != "ranks"]
    return Suggestion(kind, f"{', '.join(words)} ({_room(plan)})", change)


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
        (other for other in others if other.name != card.name and other.sparks == 1 and wanted(other)),
        key=lambda other: (not other.name.startswith(family), -other.weights.memory_gib),
    )
    found: list[Suggestion] = []
    for other in ranked:
        version, arguments = other.engine(), other.with_profile("throughput")
        try:
            found += _with_room("model", {"model": other.name}, other, arguments, memory, version)
        except SparkfleetError:  # a layout that is not known
            continue
        if len(found) == 2:
            break
    return found


def _room(plan: Plan) -> str:
    if not plan.kv_block_bytes:
        return f"no KV cache, {plan.full_length_sequences} sequences of {plan.max_model_len} at a time"
    unit = f"passes of 1 to {plan.speculative_tokens + 1} tokens a second" if plan.speculative_tokens else "tok/s"
    return (
        f"{plan.kv_cache_held_tokens:,} tokens of KV cache, {plan.max_concurrency:.1f} sequences of "
        f"{plan.max_model_len}, at most {plan.decode_tok_s_limit:.1f} {unit} a stream"
    )
