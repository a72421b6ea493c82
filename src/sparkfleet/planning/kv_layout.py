"""How vLLM lays out the KV cache: tokens a block, bytes of a block, blocks of a sequence.

Every layer keeps *pages*, one for each block of its block table; layers with the same needs form *groups*, and one
pool of blocks serves all groups. A model with layers of fixed state (GDN, Mamba2, KDA) and attention gets blocks so
long that a page of attention holds a state. The code follows ``v1/core/kv_cache_utils.py``,
``v1/kv_cache_interface.py`` and ``platforms/interface.py`` of vLLM; what differs by version is in ``vllm_versions``,
and ``scripts/oracle`` compares with vLLM's own code. All figures are for one GPU (one rank).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from sparkfleet import SparkfleetError
from sparkfleet.planning.catalog import Arguments, Attention, Card
from sparkfleet.planning.vllm_versions import Engine, Rules, since

#: Tokens of a block that every attention backend of a GB10 takes and prefers.
BLOCK = 16
#: vLLM's default where a card gives none (openai api server, less than 70 GiB or unknown GPU memory).
DEFAULT_BATCHED_TOKENS = 2048
TENSOR, PIPELINE = "tensor_parallel_size", "pipeline_parallel_size"
STATES = ("gdn", "mamba2", "kda", "conv")
#: Methods of speculation that need no layers: tokens come from the text itself.
WITHOUT_LAYERS = ("ngram", "ngram_gpu", "suffix")
Mode = Literal["none", "align", "all"]


@dataclasses.dataclass(frozen=True)
class Spec:
    """Layers that keep the same: ``block`` tokens in ``page`` bytes. ``fixed`` blocks a sequence whatever its length
    (a state, or a ring of an index); of those that grow, ``extra`` on top."""

    kind: Literal["full", "sliding", "state", "ring"]
    layers: int
    block: int
    page: int
    what: tuple[Any, ...] = ()
    window: int = 0
    fixed: int = 0
    extra: int = 0

    @property
    def same(self) -> tuple[Any, ...]:
        """What must be equal for two entries to be one (vLLM compares whole specifications)."""
        return (self.kind, self.block, self.page, self.what, self.window, self.fixed, self.extra)

    def blocks(self, tokens: int, in_flight: int) -> int:
        """Blocks of one sequence of ``tokens``, with ``in_flight`` tokens being computed."""
        if self.fixed:
            return self.fixed
        if self.kind == "sliding":
            # The window, what is being computed, and a block more: a window need not start at a block.
            return math.ceil(min(self.window - 1 + in_flight, tokens) / self.block) + 1
        return math.ceil(tokens / self.block) + self.extra


@dataclasses.dataclass(frozen=True)
class Group:
    """Layers that share a block table; ``page`` bytes of one block over all of them."""

    specs: tuple[Spec, ...]
    page: int

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return self.specs[0].block

    def blocks(self, tokens: int, in_flight: int) -> int:
        """Blocks of one sequence."""
        return max(spec.blocks(tokens, in_flight) for spec in self.specs)

    @property
    def grows(self) -> bool:
        """Whether longer sequences need more blocks."""
        return any(not spec.fixed and spec.kind != "sliding" for spec in self.specs)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The pool: ``block_bytes`` a block; every sequence takes blocks for each of the groups. An encoder has no groups,
    and needs no blocks.

    ``refusals``: why vLLM would not start with it, whatever its memory.
    """

    groups: tuple[Group, ...]
    block_bytes: int
    in_flight: int
    mode: Mode
    prints_by_concurrency: bool
    prefix_caching: bool
    speculative_tokens: int
    refusals: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def block(self) -> int:
        """Tokens of a block, the shortest of those that grow: reuse of prefixes goes in steps of it."""
        growing = [group.block for group in self.groups if group.grows]
        # Where every layer has a window, none grows.
        return min(growing or [group.block for group in self.groups], default=0)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one more token of a long sequence takes, padding included."""
        return round(sum(self.block_bytes / group.block for group in self.groups if group.grows))

    def pool(self, available: int) -> int:
        """Blocks in ``available`` bytes."""
        return max(available // self.block_bytes, 0) if self.groups else 0

    def blocks(self, tokens: int) -> int:
        """Blocks of one sequence of ``tokens``."""
        return sum(group.blocks(tokens, self.in_flight) for group in self.groups)

    def tokens(self, pool: int, length: int) -> int:
        """What this version prints as the size of the cache, tokens, for sequences of ``length``."""
        if not self.groups:
            return 0
        if self.prints_by_concurrency:
            return int(pool / self.blocks(length) * length)
        shortest = min(
            group.block if self.mode != "none" or not group.specs[0].fixed else length for group in self.groups
        )
        return pool // len(self.groups) * shortest

    def longest(self, pool: int, most: int) -> int:
        """The longest sequence that ``pool`` blocks hold, at most ``most`` tokens; 0 when there is none."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.blocks(middle) <= pool else (low, middle - 1)
        return low


def number(arguments: Arguments, key: str, default: float) -> float:
    """A numeric argument, or what holds without it."""
    value = arguments.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else default


def ranks(card: Card, arguments: Arguments) -> int:
    """GPUs that share each layer of the model; raises for ways of sharing that are not planned."""
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if number(arguments, name, 1) > 1:
            raise SparkfleetError(
                f"{card.source}: {name} {arguments[name]}: the planner knows only {TENSOR} and {PIPELINE} and does not "
                "guess; leave it at 1"
            )
    stages = max(int(number(arguments, PIPELINE, 1)), 1)
    return max(int(number(arguments, TENSOR, card.sparks // stages)), 1)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of a pipeline: how many layers it has, and whether it is the ``first``, with the embedding, and the
    ``last``, with the output layer. Without pipeline parallelism there is one."""

    layers: int
    first: bool = True
    last: bool = True


def stages(card: Card, arguments: Arguments) -> list[Stage]:
    """The stages that the layers of a model are split over (vLLM: ``get_pp_indices``); raises where it cannot be split
    so, or is not planned."""
    count, layers = max(int(number(arguments, PIPELINE, 1)), 1), card.shape.layers
    if count == 1:
        return [Stage(layers)]
    if why := unsplit(card, arguments, count):
        raise SparkfleetError(f"{card.source}: {PIPELINE} {count}: {why}")
    each, rest = divmod(layers, count)
    # What is left over goes to the stages before the last one.
    sizes = [each + (1 if count - 1 - rest <= place < count - 1 else 0) for place in range(count)]
    return [Stage(size, place == 0, place == count - 1) for place, size in enumerate(sizes)]


def unsplit(card: Card, arguments: Arguments, count: int) -> str:
    """Why a model cannot be split into so many stages, or is not planned so; "" for nothing."""
    kinds = card.shape.attention
    if count > card.shape.layers:
        return f"the model has {card.shape.layers} layers, and each stage needs one"
    if len(kinds) != 1 or kinds[0].kind not in ("full", "mla") or kinds[0].index_bytes:
        return (
            "the planner knows it only of models whose layers all keep the same, and does not guess which layers of "
            f"the others a stage gets; use {TENSOR}"
        )
    if card.vision:
        return f"the planner does not know which stages of a model that takes pictures have its encoder; use {TENSOR}"
    if speculation(card, arguments).tokens:
        return (
            "the planner does not know what drafts on the last stage alone: leave speculative_config out, or use "
            f"{TENSOR}"
        )
    return ""


@dataclasses.dataclass(frozen=True)
class Speculation:
    """Tokens that are drafted at a time, and by whom: ``method`` as vLLM names it."""

    tokens: int = 0
    method: str = ""
    model: str = ""


def speculation(card: Card, arguments: Arguments) -> Speculation:
    """What ``speculative_config`` requests; raises when vLLM does not accept it."""
    given: Any = arguments.get("speculative_config")
    if not given:  # also false, which leaves the flag out
        return Speculation()
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            given = None
    if not isinstance(given, dict):
        raise SparkfleetError(f"{card.source}: speculative_config: must be a mapping, or a text of JSON with one")
    tokens = given.get("num_speculative_tokens")
    if not isinstance(tokens, int) or isinstance(tokens, bool) or not 0 < tokens <= 1024:
        raise SparkfleetError(
            f"{card.source}: speculative_config.num_speculative_tokens: must be a whole number from 1 to 1024, "
            f"not {tokens!r}"
        )
    model = str(given.get("model") or "")
    method = str(given.get("method") or ("draft_model" if model else "mtp"))
    return Speculation(tokens, method, "" if model == card.repo else model)


def kv_dtype(card: Card, arguments: Arguments, version: Engine) -> str:
    """``bf16`` or ``fp8``: what this version of vLLM keeps keys and values in."""
    asked = str(arguments.get("kv_cache_dtype", "auto"))
    if asked.startswith("fp8"):
        return "fp8"
    if asked == "auto" and card.shape.kv_cache_dtype == "fp8" and version.rules.kv_follows_checkpoint:
        return "fp8"
    return "bf16"


def token_bytes(entry: Attention, dtype: str, gpus: int = 1) -> int:
    """Bytes that one layer of attention keeps for one token on one of ``gpus``."""
    size = 1 if dtype == "fp8" else 2
    if entry.kind == "mla":
        return (entry.rank + entry.rope_dim) * size
    return max(entry.kv_heads // gpus, 1) * (entry.head_dim + (entry.value_dim or entry.head_dim)) * size


def state_bytes(entry: Attention, arguments: Arguments, drafted: int = 0, gpus: int = 1) -> int:
    """Bytes of one layer's state of one sequence on one of ``gpus`` (vLLM: ``MambaStateShapeCalculator``).

    The convolution keeps ``conv - 1`` columns in bf16, and one more for each drafted token.
    """
    asked = str(arguments.get("mamba_ssm_cache_dtype", "auto"))
    size = 4 if (entry.state_dtype if asked == "auto" else asked) == "float32" else 2
    conv_size = 4 if arguments.get("mamba_cache_dtype") == "float32" else 2
    columns = entry.conv - 1 + drafted
    if entry.kind == "gdn":
        width = 2 * entry.key_heads * entry.key_dim + entry.value_heads * entry.value_dim
        matrix = entry.value_heads // gpus * entry.value_dim * entry.key_dim
    elif entry.kind == "mamba2":
        groups = entry.groups if entry.groups % gpus == 0 else gpus
        width = entry.heads * entry.head_dim + 2 * groups * entry.state
        matrix = entry.heads // gpus * entry.head_dim * entry.state
    elif entry.kind == "kda":
        width = 3 * entry.heads * entry.head_dim
        matrix = entry.heads // gpus * entry.head_dim * entry.head_dim
    else:  # conv: every rank keeps all of it
        return columns * entry.width * conv_size
    return columns * (width // gpus) * conv_size + matrix * size


def layout(card: Card, arguments: Arguments, version: Engine, stage: Stage | None = None) -> Layout:
    """The layout of a model, or a stage of it, under arguments of ``vllm serve``; raises, with what is missing, when it
    is not known."""
    stage = stage or stages(card, arguments)[0]
    if stage.layers != card.shape.layers:
        (only,) = card.shape.attention
        attention = (dataclasses.replace(only, layers=stage.layers),)
        card = dataclasses.replace(card, shape=dataclasses.replace(card.shape, attention=attention))
    return _Cut(card, arguments, version).layout()


class _Cut:
    """One model's layout in progress: what is requested, the specifications of its layers, their groups."""

    def __init__(self, card: Card, arguments: Arguments, version: Engine) -> None:
        self.card, self.arguments, self.rules = card, arguments, version.rules
        self.version = version
        self.gpus = ranks(card, arguments)
        self.dtype = kv_dtype(card, arguments, version)
        self.drafting = speculation(card, arguments)
        self.attention = [entry for entry in card.shape.attention if entry.kind in ("full", "sliding", "mla")]
        self.caches = [entry for entry in card.shape.attention if entry.kind == "cache"]
        self.states = [entry for entry in card.shape.attention if entry.kind in STATES]
        self.batched = int(number(arguments, "max_num_batched_tokens", DEFAULT_BATCHED_TOKENS))
        self.refusals: list[str] = []
        self.notes: list[str] = []

    def layout(self) -> Layout:
        self._known()
        if any(entry.kind == "encoder" for entry in self.card.shape.attention):
            return Layout((), 0, 0, "none", self.rules.prints_by_concurrency, False, 0)
        prefixes = self._prefixes()
        mode = self._mode(prefixes)
        block = self._block(mode)
        specs = self._attention_specs(block) + self._state_specs(block, mode)
        if self.arguments.get("disable_hybrid_kv_cache_manager") is True:
            specs = [dataclasses.replace(spec, kind="full", window=0) if spec.window else spec for spec in specs]
            if self.states:
                self.refusals.append(
                    "disable_hybrid_kv_cache_manager: vLLM does not start a hybrid with it; leave it out"
                )
        groups, block_bytes = grouped(specs, self.rules, self.card)
        return Layout(
            groups=tuple(groups),
            block_bytes=block_bytes,
            in_flight=self._in_flight(),
            mode=mode,
            prints_by_concurrency=self.rules.prints_by_concurrency,
            prefix_caching=prefixes,
            speculative_tokens=self.drafting.tokens,
            refusals=tuple(self.refusals),
            notes=tuple(self.notes),
        )

    def _known(self) -> None:
        missing = next((entry for entry in self.card.shape.attention if entry.kind == "linear"), None)
        if missing:
            raise SparkfleetError(
                f"{self.card.source}: shape.attention: {missing.layers} layers of kind linear, whose state the planner "
                "does not know and does not guess: write them as gdn (key_heads, key_dim, value_heads, value_dim, "
                "conv), mamba2 (heads, head_dim, state, groups, conv) or kda (heads, head_dim, conv)"
            )
        extra = bool(self.caches) or any(entry.index_bytes for entry in self.attention)
        if extra and not self.rules.packs_groups:
            first = ".".join(map(str, since("packs_groups")))
            raise SparkfleetError(
                f"{self.card.source}: shape.attention: what it keeps besides its attention (an index, caches) is "
                f"planned from vLLM {first} on; of {self.version.text} the planner does not know it, and does not guess"
            )
        encoders = [entry for entry in self.card.shape.attention if entry.kind == "encoder"]
        if encoders and (self.attention or self.caches or self.states):
            raise SparkfleetError(
                f"{self.card.source}: shape.attention: layers of kind encoder beside others: the planner does not know "
                "such models, and does not guess"
            )
        if not self.attention and not self.caches and not encoders:
            raise SparkfleetError(
                f"{self.card.source}: shape.attention: no layer of attention (full, sliding or mla): the planner does "
                "not know such models, and does not guess"
            )
        for entry in self.states:
            heads = {"gdn": (entry.key_heads, entry.value_heads), "conv": ()}.get(entry.kind, (entry.heads,))
            if any(count % self.gpus for count in heads):
                raise SparkfleetError(
                    f"{self.card.source}: tensor_parallel_size {self.gpus} does not divide the {heads} heads of "
                    f"{entry.kind} layers: vLLM does not start"
                )
        for entry in self.card.shape.attention:
            # vLLM gives several ranks the same head only where each rank has one.
            if entry.kv_heads % self.gpus and self.gpus % max(entry.kv_heads, 1):
                raise SparkfleetError(
                    f"{self.card.source}: tensor_parallel_size {self.gpus} and the {entry.kv_heads} KV heads of "
                    f"{entry.kind} layers do not divide each other: vLLM does not start"
                )

    def _prefixes(self) -> bool:
        """Whether prefix caching is on: requested, or this version's default."""
        given = self.arguments.get("enable_prefix_caching")
        if self.arguments.get("no_enable_prefix_caching") is True:
            return False
        if isinstance(given, bool) and given:
            return not self.states or self.rules.caches_states
        # false leaves the flag out, so the default holds
        return self.rules.hybrid_prefix_caching if self.states else True

    def _mode(self, prefixes: bool) -> Mode:
        """The mode of the states' cache (``mamba_cache_mode``)."""
        if not self.states or not prefixes:
            return "none"
        asked = str(self.arguments.get("mamba_cache_mode", "none"))
        rules, mamba2 = self.rules, any(entry.kind == "mamba2" for entry in self.states)
        if asked == "all" and not rules.has_mode_all:
            self.refusals.append(f"vLLM {self.version.text} has no mamba_cache_mode all: leave it out")
        if asked in ("align", "all"):
            chosen: Mode = "all" if asked == "all" and mamba2 else "align"
        elif not mamba2:
            chosen = "align"
        else:
            chosen = rules.mamba2_speculative_mode if self.drafting.tokens else rules.mamba2_mode
        if chosen == "align":
            if self.arguments.get("no_enable_chunked_prefill") is True:
                self.refusals.append("mamba_cache_mode align needs enable_chunked_prefill")
            if self.drafting.tokens and not rules.align_speculates:
                self.refusals.append(
                    f"vLLM {self.version.text} does not speculate in mamba_cache_mode align: leave "
                    "enable_prefix_caching or speculative_config out, or use a newer image"
                )
        return chosen

    def _block(self, mode: Mode) -> int:
        """Tokens of a block of attention."""
        given = int(number(self.arguments, "block_size", 0))
        drafted = self.drafting.tokens
        state = max((state_bytes(entry, self.arguments, drafted, self.gpus) for entry in self.states), default=0)
        if not state:
            return given or BLOCK
        main = next((entry for entry in self.attention if entry.kind != "sliding"), self.attention[0])
        token = token_bytes(main, self.dtype, self.gpus)
        multiple = max(BLOCK, given) if self.rules.block_size_aligns else BLOCK
        if main.kind == "mla":
            multiple = max(multiple, self.rules.mla_alignment)
        if mode == "all":
            chunk = int(number(self.arguments, "mamba_block_size", 0)) or max(entry.chunk for entry in self.states)
            if not chunk:
                raise SparkfleetError(
                    f"{self.card.source}: shape.attention: the key chunk (chunk_size of config.json) of the mamba2 "
                    "layers is missing, which mamba_cache_mode all needs"
                )
            multiple = math.lcm(chunk, multiple)
        block = max(multiple * math.ceil(state / (multiple * token)), given)
        if mode == "align" and self.rules.batch_holds_block and block > self.batched:
            self.refusals.append(
                f"a block of this model is {block} tokens long, more than max_num_batched_tokens {self.batched}, which "
                f"vLLM {self.version.text} refuses: set max_num_batched_tokens to {block} or more"
            )
        return block

    def _layers(self) -> list[Attention]:
        """Entries of attention, with what drafts: layers of the model's own, or another model's."""
        drafting, card = self.drafting, self.card
        found = list(self.attention)
        if not drafting.tokens or drafting.method in WITHOUT_LAYERS:
            return found
        if drafting.model:
            if not card.draft or card.draft.repo != drafting.model:
                raise SparkfleetError(
                    f"{card.source}: speculative_config.model {drafting.model}: the draft's attention is missing from "
                    "the card (draft: {repo, attention, loaded_gib}), and the planner does not guess"
                )
            if card.draft.assumed:
                self.notes.append(
                    f"the shape of the draft {card.draft.repo} is not published: its part of the KV cache is an "
                    "assumption of the card's"
                )
            return found + list(card.draft.attention)
        if self.caches and not self.attention:  # what drafts is among them
            return found
        if not card.shape.mtp_layers:
            raise SparkfleetError(
                f"{card.source}: speculative_config: method {drafting.method} without a model, but the card has no "
                "shape.mtp_layers (num_nextn_predict_layers or mtp_num_hidden_layers of config.json)"
            )
        main = next((entry for entry in self.attention if entry.kind != "sliding"), self.attention[0])
        return [*found, dataclasses.replace(main, layers=card.shape.mtp_layers)]

    def _attention_specs(self, block: int) -> list[Spec]:
        specs: list[Spec] = []
        for entry in self._layers():
            size = token_bytes(entry, self.dtype, self.gpus)
            what = (entry.kind == "mla", entry.kv_heads, entry.head_dim, entry.rank)
            kind: Literal["full", "sliding"] = "sliding" if entry.kind == "sliding" else "full"
            specs.append(Spec(kind, entry.layers, block, block * size, what, entry.window))
            if entry.index_bytes:
                held = block // entry.index_tokens * entry.index_bytes
                specs.append(Spec("full", entry.layers, block, held, (True, "index")))
                if entry.index_tokens > 1:
                    # The tokens of a group that is not full yet, and those drafted (vLLM: CircularBufferSpec).
                    ring = entry.index_tokens * math.ceil(
                        (entry.index_tokens + self.drafting.tokens) / entry.index_tokens
                    )
                    specs.append(Spec("ring", entry.layers, ring, ring * entry.index_bytes, ("ring",), fixed=1))
        for entry in self.caches:
            held = entry.block or block
            page = math.ceil(held // entry.every * entry.bytes / entry.align) * entry.align
            kind = "sliding" if entry.window else "full"
            specs.append(Spec(kind, entry.layers, held, page, (True, "index", entry.bytes, entry.every), entry.window))
        return _merged(specs)

    def _state_specs(self, block: int, mode: Mode) -> list[Spec]:
        if not self.states:
            return []
        main = next((entry for entry in self.attention if entry.kind != "sliding"), self.attention[0])
        padded = block * token_bytes(main, self.dtype, self.gpus)
        rules, drafted = self.rules, self.drafting.tokens
        specs: list[Spec] = []
        for entry in self.states:
            size = state_bytes(entry, self.arguments, drafted, self.gpus)
            checkpoint = {"mamba2": rules.mamba2_checkpoint, "kda": rules.kda_checkpoint}.get(entry.kind, 0)
            fixed = {"none": 1 + drafted, "align": 2 + drafted + checkpoint, "all": 0}[mode]
            extra = drafted if rules.all_counts_speculation else 0
            specs.append(
                Spec(
                    "state",
                    entry.layers,
                    block,
                    max(padded, size),
                    (entry.kind,),
                    fixed=fixed,
                    extra=0 if fixed else extra,
                )
            )
        return _merged(specs)

    def _in_flight(self) -> int:
        """Tokens that are being computed while a sliding window still holds what is behind it."""
        serial = self.arguments.get("async_scheduling") is False or self.arguments.get("no_async_scheduling") is True
        serial = serial or self.drafting.method in ("ngram", "suffix")
        return self.batched * (1 if serial else self.rules.batches_in_flight)


def _merged(specs: Sequence[Spec]) -> list[Spec]:
    """One entry for layers that keep the same, in their order."""
    layers: Counter[tuple[Any, ...]] = Counter()
    for spec in specs:
        layers[spec.same] += spec.layers
    first = {spec.same: spec for spec in reversed(specs)}
    return [dataclasses.replace(first[same], layers=count) for same, count in layers.items()]


def grouped(specs: Sequence[Spec], rules: Rules, card: Card) -> tuple[list[Group], int]:
    """Groups and the bytes of a block (vLLM: ``get_kv_cache_groups``); raises when pages cannot be made equal."""
    if _uniform(specs):
        page = sum(spec.page * spec.layers for spec in specs)
        return [Group(tuple(specs), page)], page
    if rules.packs_groups and any("index" in spec.what for spec in specs):
        return _packed(specs)
    return _equal(_same_page(specs, rules, card), rules)


def _uniform(specs: Sequence[Spec]) -> bool:
    """Whether all layers need the same number of blocks, so that one group takes them all."""
    first = specs[0]
    return all(
        (spec.kind, spec.block, spec.window, spec.fixed) == (first.kind, first.block, first.window, first.fixed)
        for spec in specs
    )


def _same_page(specs: Sequence[Spec], rules: Rules, card: Card) -> list[Spec]:
    """The same layers with pages of one size: blocks of the smaller ones are lengthened, or pages padded."""
    largest = max(spec.page for spec in specs)
    made = []
    for spec in specs:
        if spec.page == largest:
            made.append(spec)
        elif spec.kind == "state" and rules.pads_states:
            made.append(dataclasses.replace(spec, page=largest))
        elif largest % spec.page == 0 and spec.kind != "state":
            made.append(dataclasses.replace(spec, page=largest, block=spec.block * (largest // spec.page)))
        elif rules.pads_pages and spec.kind in ("full", "sliding") and spec.what[:1] != (True,):
            made.append(dataclasses.replace(spec, page=largest))
        else:
            raise SparkfleetError(
                f"{card.source}: its layers keep pages of {spec.page} and {largest} bytes, which this version of vLLM "
                "cannot bring to one size: it does not start; take a newer image, or leave speculative_config out"
            )
    return made


def _equal(specs: Sequence[Spec], rules: Rules) -> tuple[list[Group], int]:
    """Groups of an equal number of layers, of equal pages; the last of a kind is padded."""
    counts = [spec.layers for spec in specs]
    size = max(counts) if max(counts) < min(counts) * rules.group_factor else min(counts)
    page = specs[0].page * size
    groups = [Group((spec,), page) for spec in specs for _ in range(math.ceil(spec.layers / size))]
    return groups, page


def _packed(specs: Sequence[Spec]) -> tuple[list[Group], int]:
    """Groups of layers whose pages differ, side by side in blocks as large as attention needs anyway; states are
    split until they fit (vLLM: ``_get_packed_kv_cache_groups``)."""
    buckets: list[list[Spec]] = []
    for spec in specs:
        for bucket in buckets:
            if _uniform([*bucket, spec]) and (spec.kind != "state" or spec.what == bucket[0].what):
                bucket.append(spec)
                break
        else:
            buckets.append([spec])

    def per_page(bucket: Sequence[Spec]) -> Counter[int]:
        found: Counter[int] = Counter()
        for spec in bucket:
            found[spec.page] += spec.layers
        return found

    pages = [per_page(bucket) for bucket in buckets]
    balanced = [len(set(found.values())) == 1 for found in pages]
    repeated = [max(found.values()) for found, even in zip(pages, balanced, strict=True) if even and len(found) > 1]
    repeats = (
        _least_padding([max(f.values()) for f, even in zip(pages, balanced, strict=True) if even], max(repeated))
        if repeated
        else 0
    )

    def is_state(bucket: Sequence[Spec]) -> bool:
        return bucket[0].kind in ("state", "ring") or (not repeats and bucket[0].kind == "sliding")

    def count(found: Counter[int], even: bool) -> int:
        return math.ceil(max(found.values()) / repeats) if even and repeats else 1

    def widest(found: Counter[int], number_of_groups: int) -> int:
        return sum(math.ceil(layers / number_of_groups) * page for page, layers in found.items())

    anchor = max(
        widest(found, sum(found.values()) if is_state(bucket) else count(found, even))
        for bucket, found, even in zip(buckets, pages, balanced, strict=True)
    )
    groups = []
    for bucket, found, even in zip(buckets, pages, balanced, strict=True):
        split = count(found, even)
        if is_state(bucket):
            split = max(split, math.ceil(sum(found.values()) / max(anchor // bucket[0].page, 1)))
        groups += [Group(tuple(bucket), widest(found, split)) for _ in range(split)]
    return groups, max(group.page for group in groups)


def _least_padding(values: Sequence[int], least: int) -> int:
    """The step from ``least`` on to whose multiples the values are raised with the least padding, the largest of
    equals."""
    steps = range(max(1, least), max(values) + 1) or range(least, least + 1)
    return min(steps, key=lambda step: (sum(-value % step for value in values), -step))
