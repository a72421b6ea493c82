"""A model's config.json, read into the shape that a card has. Pure: what reads files and asks the Hub is
`onboarding.hub_card`.

Each kind of model has its reader here, by the ``model_type`` of its text model; names and rules are those of vLLM and
of transformers' configuration classes. A model that is not known, or that keeps a cache which a card cannot describe,
is refused by its name: its memory would be guessed.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from sparkfleet_host import bounded
from sparkfleet_host.bounded import BoundsError, printable

from sparkfleet import SparkfleetError

CONFIG = "config.json"
MOST_LAYERS = 10_000
MOST_WIDTH = 10_000_000
MOST_COUNT = 1_000_000_000
BY_HAND = "write the card by hand (docs/models.md)"
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Experts:
    """Routed experts: layers that have them, how many there are a layer and a token passes, parameters of one."""

    layers: int
    routed: int
    per_token: int
    parameters: int

    @property
    def total(self) -> int:
        """Parameters of all of them."""
        return self.layers * self.routed * self.parameters

    @property
    def idle_share(self) -> float:
        """The part of them that one token does not read."""
        return 1 - min(self.per_token / self.routed, 1)


@dataclasses.dataclass(frozen=True)
class Description:
    """The content of config.json: ``shape`` as a card has it, ``origin`` {place in the card: where it comes from},
    ``unknown`` what it does not give, or a card cannot hold; and what the weights' size follows from."""

    model_type: str
    architecture: str
    shape: dict[str, Any]
    origin: dict[str, str]
    unknown: tuple[str, ...]
    tied_embeddings: bool = False
    experts: Experts | None = None
    vision: bool = False  # or hearing: weights besides those of the text
    pictures: bool = False
    remote_code: bool = False

    @property
    def hybrid(self) -> bool:
        """Whether some layers keep a state in place of a cache that grows."""
        known = ("full", "sliding", "mla", "encoder", "none")
        return any(entry["kind"] not in known for entry in self.shape["attention"])

    @property
    def encoder(self) -> bool:
        """Whether it gives vectors or scores in place of text."""
        return any(entry["kind"] == "encoder" for entry in self.shape["attention"])

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding table that one token does not read; a tied one is read as the output layer."""
        return 0 if self.tied_embeddings else int(self.shape["vocab"] * self.shape["hidden"])


class _Config:
    """A mapping of config.json: values within bounds, and the place of each. ``defaults``: what transformers takes
    where a name is not there."""

    def __init__(self, data: Mapping[str, Any], place: str = "", defaults: Mapping[str, int] | None = None) -> None:
        self.defaults = {name: value for name, value in (defaults or {}).items() if data.get(name) is None}
        self.data, self.place = {**data, **self.defaults}, place

    def where(self, name: str) -> str:
        return f"{self.place}.{name}" if self.place else name

    def get(self, *names: str) -> tuple[str, Any]:
        """The first of `names` that is there and not null, with its value; ("", None) if none is."""
        return next(((name, self.data[name]) for name in names if self.data.get(name) is not None), ("", None))

    def integer(self, *names: str, least: int = 1, most: int = MOST_WIDTH) -> int:
        """The first of `names` that is there. Raises SparkfleetError if none is, or it is not an integer in bounds."""
        name, value = self.get(*names)
        if not name:
            raise SparkfleetError(f"{CONFIG}: {' or '.join(map(self.where, names))} is missing; {BY_HAND}")
        return self._whole(name, value, least, most)

    def integer_or(self, default: int, *names: str, least: int = 0, most: int = MOST_WIDTH) -> int:
        """The same, `default` if none is there."""
        name, value = self.get(*names)
        return self._whole(name, value, least, most) if name else default

    def _whole(self, name: str, value: Any, least: int, most: int) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        return self._bounded(name, lambda place: bounded.as_int(value, place, least, most))

    def number_or(self, default: float, *names: str) -> float:
        """A finite number from 0 to 1e6."""
        name, value = self.get(*names)
        return self._bounded(name, lambda place: bounded.as_number(value, place, 0, 1e6)) if name else default

    def words(self, name: str) -> list[str] | None:
        """A list of texts, None if it is not there."""
        return self._list(name, lambda item, place: bounded.as_str(item, place, 64))

    def numbers(self, name: str) -> list[int] | None:
        """A list of whole numbers, None if it is not there."""
        return self._list(name, lambda item, place: bounded.as_int(item, place, 0, MOST_LAYERS))

    def _list(self, name: str, read: Callable[[Any, str], _T]) -> list[_T] | None:
        value = self.data.get(name)
        if value is None:
            return None
        return self._bounded(
            name, lambda place: [read(item, place) for item in bounded.as_list(value, place, MOST_LAYERS)]
        )

    def _bounded(self, name: str, read: Callable[[str], _T]) -> _T:
        """What `read` makes of the value at this place. Raises SparkfleetError with the remedy."""
        try:
            return read(f"{CONFIG}: {self.where(name)}")
        except BoundsError as error:
            raise SparkfleetError(f"{error}; {BY_HAND}") from None

    def text(self, name: str) -> str:
        """A short text, "" if there is none."""
        value = self.data.get(name)
        return printable(value, 80) if isinstance(value, str) else ""

    def pattern(self) -> str:
        """Nemotron-H's letter a layer; "" if there is none."""
        value = self.data.get("hybrid_override_pattern")
        return value if isinstance(value, str) and len(value) <= MOST_LAYERS else ""

    def inner(self, name: str) -> _Config | None:
        """A mapping within it."""
        value = self.data.get(name)
        return _Config(value, self.where(name)) if isinstance(value, Mapping) else None

    def true(self, name: str) -> bool:
        return self.data.get(name) is True


@dataclasses.dataclass(frozen=True)
class Layer:
    """What one layer keeps: an entry of a card's ``attention`` without its number of layers."""

    kind: str
    figures: tuple[tuple[str, int | str], ...] = ()


class _Reader:
    """Reads one text model; collects where each value comes from."""

    def __init__(self, text: _Config, model_type: str) -> None:
        self.text, self.model_type = text, model_type
        self.origin: dict[str, str] = {}
        self.unknown: list[str] = []
        self.layers = self._number_of_layers()

    def _number_of_layers(self) -> int:
        if self.text.pattern():
            self.origin["shape.layers"] = f"{CONFIG}: length of {self.text.where('hybrid_override_pattern')}"
            return len(self.text.pattern())
        if self.text.get("num_hidden_layers", "n_layer")[0]:
            return self.take("shape.layers", "num_hidden_layers", "n_layer", most=MOST_LAYERS)
        # transformers 5 writes only the list for some hybrids
        types = self.text.words("layers_block_type") or self.text.words("layer_types")
        if not types:
            raise SparkfleetError(f"{CONFIG}: {self.text.where('num_hidden_layers')} is missing; {BY_HAND}")
        self.origin["shape.layers"] = f"{CONFIG}: length of {self.text.where('layers_block_type')}"
        return len(types)

    def take(self, field: str, *names: str, least: int = 1, most: int = MOST_WIDTH) -> int:
        """A whole number for a field of the card, noted with its place."""
        value = self.text.integer(*names, least=least, most=most)
        name = self.text.get(*names)[0]
        default = f"not in {CONFIG}; default of {self.model_type} in transformers: {name}"
        self.origin[field] = default if name in self.text.defaults else f"{CONFIG}: {self.text.where(name)}"
        return value

    # -- layers ------------------------------------------------------------------------------------------------------

    @property
    def heads(self) -> int:
        return self.text.integer("num_attention_heads", "n_head")

    def head_dim(self, *names: str) -> int:
        names = names or ("head_dim", "attention_head_dim")
        if self.text.get(*names)[0]:
            return self.text.integer(*names)
        hidden, heads = self.text.integer("hidden_size", "n_embd"), self.heads
        if hidden % heads:
            raise SparkfleetError(
                f"{CONFIG}: {self.text.where('hidden_size')} {hidden} is not a multiple of num_attention_heads "
                f"{heads}, and there is no head_dim; {BY_HAND}"
            )
        return hidden // heads

    def full(self) -> Layer:
        kv_heads, head_dim = self.text.integer_or(self.heads, "num_key_value_heads", least=1), self.head_dim()
        if self.heads % kv_heads:
            raise SparkfleetError(
                f"{CONFIG}: {self.text.where('num_key_value_heads')} {kv_heads} does not divide num_attention_heads "
                f"{self.heads}; {BY_HAND}"
            )
        return Layer("full", (("kv_heads", kv_heads), ("head_dim", head_dim)))

    def sliding(self, window: int | None = None) -> Layer:
        """A layer that keeps the last tokens; all of them, where the window is as long as the context."""
        if window is None:
            window = self.text.integer("sliding_window", most=MOST_COUNT)
        layer = self.full()
        return layer if window >= self.context() else Layer("sliding", (*layer.figures, ("window", window)))

    def mla(self) -> Layer:
        rank = self.text.integer("kv_lora_rank")
        return Layer("mla", (("rank", rank), ("rope_dim", self.text.integer("qk_rope_head_dim", least=0))))

    def types(self) -> list[str] | None:
        """`layer_types`, one a layer."""
        found = self.text.words("layer_types")
        if found is not None and len(found) != self.layers:
            raise SparkfleetError(
                f"{CONFIG}: {self.text.where('layer_types')} has {len(found)} entries for {self.layers} layers; "
                f"{BY_HAND}"
            )
        return found

    def by_type(self, types: Iterable[str], known: Mapping[str, Callable[[], Layer]]) -> list[Layer]:
        """A layer for each of `types`. Refuses a type that is not known."""
        made: dict[str, Layer] = {}
        found = []
        for name in types:
            if name not in known:
                raise _refused(self.model_type, f"layers of type {name!r} keep a cache that a card cannot describe")
            if name not in made:
                made[name] = known[name]()
            found.append(made[name])
        return found

    # -- what all models have ----------------------------------------------------------------------------------------

    def context(self) -> int:
        """The longest context in tokens, as vLLM derives it: a stretched one where rope scaling defines it."""
        names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length")
        longest = self.take("shape.context", *names, most=MOST_COUNT)
        if self.model_type in ("roberta", "xlm-roberta"):  # positions begin after that of the padding
            longest = max(longest - self.text.integer_or(1, "pad_token_id") - 1, 1)
        name = "rope_scaling" if self.text.inner("rope_scaling") else "rope_parameters"
        scaling = self.text.inner(name)
        if scaling is None or self.model_type.startswith("gemma"):
            return longest
        kind = scaling.text("rope_type") or scaling.text("type")
        factor = scaling.number_or(1.0, "factor")
        if kind == "yarn":
            longest = scaling.integer_or(longest, "original_max_position_embeddings", least=1, most=MOST_COUNT)
        elif kind not in ("linear", "dynamic"):
            return longest
        if factor > 1:
            longest = min(int(longest * factor), MOST_COUNT)
            self.origin["shape.context"] += f", {self.text.where(name)} ({kind}, factor {factor:g})"
        return longest

    def experts(self) -> tuple[int, int, Experts | None]:
        """Width of the MLP, experts a token passes (0 without), and the routed experts."""
        text = self.text
        routed = text.integer_or(0, "num_experts", "n_routed_experts", "num_local_experts", most=1_000_000)
        per_token = text.integer_or(
            0, "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "top_k_experts", most=1_000_000
        )
        # granitemoehybrid writes a number of experts per token where it has none
        if not routed or not per_token:
            return self.take("shape.mlp", "intermediate_size", "n_inner", "shared_intermediate_size"), 0, None
        width = self.take("shape.mlp", "moe_intermediate_size", "intermediate_size")
        place = text.where(text.get("num_experts_per_tok", "num_experts_per_token", "top_k_experts")[0] or "experts")
        self.origin["shape.experts_per_token"] = f"{CONFIG}: {place}"
        shared = self._shared_experts(width)
        if shared:
            self.origin["shape.experts_per_token"] += f" and {shared} shared"
        latent = text.integer_or(0, "moe_latent_size")
        matrices = 2 if text.text("mlp_hidden_act") == "relu2" else 3  # with a gate or without
        one = matrices * width * (latent or text.integer("hidden_size"))
        return width, per_token + shared, Experts(self._layers_with_experts(), routed, per_token, one)

    def _shared_experts(self, width: int) -> int:
        """How many experts the shared ones are as wide as."""
        if self.text.true("enable_moe_block"):  # Gemma 4: an MLP besides them
            return math.ceil(self.text.integer("intermediate_size") / width)
        own = ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size")
        if self.text.get(*own)[0]:
            return math.ceil(self.text.integer(*own, least=0) / width)
        return self.text.integer_or(0, "n_shared_experts", "num_shared_experts", most=1000)

    def _layers_with_experts(self) -> int:
        text = self.text
        if letters := text.pattern():
            return letters.count("E")
        for name, marks in (("layers_block_type", ("moe",)), ("mlp_layer_types", ("sparse", "moe"))):
            types = text.words(name)
            if types and set(types) & {*marks, "dense"}:
                return sum(item in marks for item in types)
        dense = set(text.numbers("mlp_only_layers") or ())
        step = max(text.integer_or(1, "decoder_sparse_step", "interleave_moe_layer_step"), 1)
        first = text.integer_or(0, "first_k_dense_replace")
        return sum(layer >= first and layer not in dense and (layer + 1) % step == 0 for layer in range(self.layers))


# -- kinds of model --------------------------------------------------------------------------------------------------


def _full(reader: _Reader) -> list[Layer]:
    """Full attention in every layer; a list of types takes precedence."""
    types = reader.types()
    if types is None:
        return [reader.full()] * reader.layers
    return reader.by_type(types, {"full_attention": reader.full, "sliding_attention": reader.sliding})


def _mistral(reader: _Reader) -> list[Layer]:
    """A window in every layer, where there is one."""
    if reader.text.data.get("layer_types") is not None or reader.text.data.get("sliding_window") is None:
        return _full(reader)
    return [reader.sliding()] * reader.layers


def _encoder(reader: _Reader) -> list[Layer]:
    """Layers that see the whole text."""
    return [Layer("encoder")] * reader.layers


def _qwen(reader: _Reader) -> list[Layer]:
    """A window from layer `max_window_layers` on, if `use_sliding_window` is set."""
    text = reader.text
    if text.data.get("layer_types") is not None or not text.true("use_sliding_window"):
        return _full(reader) if text.data.get("layer_types") is not None else [reader.full()] * reader.layers
    first = min(text.integer_or(0, "max_window_layers"), reader.layers)
    return [reader.full()] * first + [reader.sliding()] * (reader.layers - first)


def _every(step: int, *names: str) -> Callable[[_Reader], list[Layer]]:
    """One full layer after `step` - 1 with a window; a number under `names` comes before `step`, `layer_types` before
    both."""

    def read(reader: _Reader) -> list[Layer]:
        types = reader.types()
        if types is None:
            number = max(reader.text.integer_or(step, *names, most=MOST_LAYERS), 1) if names else step
            types = [
                "sliding_attention" if (layer + 1) % number else "full_attention" for layer in range(reader.layers)
            ]
            reader.unknown.append(
                f"which layers have a window: {CONFIG} has no layer_types; every {number}th is taken to have none, as "
                f"in transformers' {reader.model_type}"
            )
        return reader.by_type(types, {"full_attention": reader.full, "sliding_attention": reader.sliding})

    return read


def _gemma4(reader: _Reader) -> list[Layer]:
    """Layers without a window have heads of their own number and width."""
    text = reader.text
    if text.integer_or(0, "num_kv_shared_layers"):
        raise _refused(reader.model_type, "some layers share the cache of others (num_kv_shared_layers)")

    def full() -> Layer:
        kv_heads = text.integer("num_global_key_value_heads", "num_key_value_heads")
        return Layer("full", (("kv_heads", kv_heads), ("head_dim", reader.head_dim("global_head_dim", "head_dim"))))

    types = reader.types()
    if types is None:
        raise SparkfleetError(f"{CONFIG}: {text.where('layer_types')} is missing; {BY_HAND}")
    return reader.by_type(types, {"full_attention": full, "sliding_attention": reader.sliding})


def _mla(reader: _Reader) -> list[Layer]:
    """One compressed vector a token in every layer."""
    if reader.text.get("index_topk", "index_head_dim")[0]:
        raise _refused(reader.model_type, "sparse attention keeps an index besides the cache (index_head_dim)")
    return [reader.mla()] * reader.layers


def _state_dtype(reader: _Reader, *names: str) -> tuple[tuple[str, int | str], ...]:
    """What a state is kept in, where that is not float32, vLLM's default for all these models."""
    dtype = next((reader.text.text(name) for name in names if reader.text.text(name)), "float32")
    if dtype not in ("float32", "float16", "bfloat16"):
        raise _refused(reader.model_type, f"its state is kept in {dtype}")
    return (("state_dtype", dtype),) if dtype != "float32" else ()


def _gdn(reader: _Reader) -> list[Layer]:
    """Gated DeltaNet alongside full attention (Qwen3-Next, Qwen3.5 and later)."""
    text = reader.text

    def linear() -> Layer:
        names = {
            "key_heads": "linear_num_key_heads",
            "key_dim": "linear_key_head_dim",
            "value_heads": "linear_num_value_heads",
            "value_dim": "linear_value_head_dim",
            "conv": "linear_conv_kernel_dim",
        }
        figures = [(figure, text.integer(name)) for figure, name in names.items()]
        return Layer("gdn", (*figures, *_state_dtype(reader, "mamba_ssm_dtype")))

    types = reader.types()
    if types is None:
        step = text.integer("full_attention_interval", most=MOST_LAYERS)
        types = ["linear_attention" if (layer + 1) % step else "full_attention" for layer in range(reader.layers)]
    return reader.by_type(types, {"full_attention": reader.full, "linear_attention": linear})


def _mamba2(heads: str, head_dim: str, state: str, groups: str, conv: str, *dtype: str) -> Callable[[_Reader], Layer]:
    """A Mamba-2 layer, by the names of its figures."""

    def read(reader: _Reader) -> Layer:
        names = {"heads": heads, "head_dim": head_dim, "state": state, "groups": groups, "conv": conv}
        figures = [(figure, reader.text.integer(name)) for figure, name in names.items()]
        chunk = reader.text.integer_or(0, "chunk_size", "mamba_chunk_size")
        return Layer("mamba2", (*figures, *((("chunk", chunk),) if chunk else ()), *_state_dtype(reader, *dtype)))

    return read


_NEMOTRON_MAMBA = _mamba2(
    "mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel", "mamba_ssm_cache_dtype"
)
_GRANITE_MAMBA = _mamba2("mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_n_groups", "mamba_d_conv")
_LETTERS = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}


def _nemotron_h(reader: _Reader) -> list[Layer]:
    """Mamba-2, attention, and layers of experts or an MLP alone."""
    letters = reader.text.pattern()
    if letters and set(letters) - set(_LETTERS):
        odd = printable("".join(sorted(set(letters) - set(_LETTERS))), 20)
        raise _refused(reader.model_type, f"hybrid_override_pattern has the letters {odd!r}")
    types = [_LETTERS[letter] for letter in letters] or reader.text.words("layers_block_type") or reader.types()
    if not types or len(types) != reader.layers:
        raise SparkfleetError(f"{CONFIG}: hybrid_override_pattern or layers_block_type is missing; {BY_HAND}")
    nothing = dict.fromkeys(("moe", "mlp"), lambda: Layer("none"))
    return reader.by_type(types, {**_mixed(reader, _NEMOTRON_MAMBA), **nothing})


def _mixed(reader: _Reader, mamba: Callable[[_Reader], Layer]) -> dict[str, Callable[[], Layer]]:
    """Names of layers, old and new, in models with Mamba-2."""
    names: dict[str, Callable[[], Layer]] = dict.fromkeys(("attention", "full_attention"), reader.full)
    return names | dict.fromkeys(("mamba", "linear_attention"), lambda: mamba(reader))


def _granite_hybrid(reader: _Reader) -> list[Layer]:
    """Mamba-2 and attention, each with an MLP."""
    types = reader.types() or reader.text.words("layers_block_type")
    if types is None or len(types) != reader.layers:
        raise SparkfleetError(f"{CONFIG}: {reader.text.where('layer_types')} is missing; {BY_HAND}")
    return reader.by_type(types, _mixed(reader, _GRANITE_MAMBA))


def _bamba(reader: _Reader) -> list[Layer]:
    """Mamba-2, and attention in the layers of a list."""
    attention = set(reader.text.numbers("attn_layer_indices") or ())
    types = ["attention" if layer in attention else "mamba" for layer in range(reader.layers)]
    return reader.by_type(types, _mixed(reader, _GRANITE_MAMBA))


def _lfm2(reader: _Reader) -> list[Layer]:
    """Short convolutions and attention."""
    text = reader.text

    def convolution() -> Layer:
        width = text.integer("conv_dim", "hidden_size")
        return Layer("conv", (("width", width), ("conv", text.integer("conv_L_cache"))))

    types = reader.types()
    if types is None:
        attention = set(text.numbers("full_attn_idxs") or ())
        types = ["full_attention" if layer in attention else "conv" for layer in range(reader.layers)]
    return reader.by_type(types, {"full_attention": reader.full, "conv": convolution})


def _kimi_linear(reader: _Reader) -> list[Layer]:
    """Kimi Delta Attention alongside MLA; layers are counted from 1."""
    inner = reader.text.inner("linear_attn_config")
    if inner is None:
        raise SparkfleetError(f"{CONFIG}: {reader.text.where('linear_attn_config')} is missing; {BY_HAND}")
    kda = Layer(
        "kda",
        (
            ("heads", inner.integer("num_heads")),
            ("head_dim", inner.integer("head_dim")),
            ("conv", inner.integer("short_conv_kernel_size")),
            *_state_dtype(reader, "mamba_ssm_dtype"),
        ),
    )
    linear, full = (inner.numbers(name) or [] for name in ("kda_layers", "full_attn_layers"))
    if sorted([*linear, *full]) != list(range(1, reader.layers + 1)):
        raise SparkfleetError(
            f"{CONFIG}: {inner.where('kda_layers')} and full_attn_layers do not name each of {reader.layers} layers "
            f"once; {BY_HAND}"
        )
    attention = reader.mla() if reader.text.get("kv_lora_rank")[0] else reader.full()
    found = [attention] * reader.layers
    for number in linear:
        found[number - 1] = kda
    return found


#: model_type of the text model (without `_text` at its end) -> its reader.
READERS: dict[str, Callable[[_Reader], list[Layer]]] = {
    **dict.fromkeys(
        (
            *("llama", "olmo", "olmo2", "granite", "granitemoe", "granitemoeshared", "glm", "glm4", "glm4_moe"),
            *("glm4v", "glm4v_moe", "minimax_m2", "mixtral", "ministral3", "seed_oss", "smollm3", "ernie4_5"),
            *("ernie4_5_moe", "hunyuan_v1_dense", "hunyuan_v1_moe", "dots1", "cohere", "gemma", "nemotron", "phi"),
            *("stablelm", "internlm2", "internlm3", "exaone", "aya_vision", "apertus", "arcee", "olmoe"),
        ),
        _full,
    ),
    **dict.fromkeys(("mistral", "starcoder2", "phi3", "phimoe"), _mistral),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta"), _encoder),
    **dict.fromkeys(
        (
            *("qwen2", "qwen2_moe", "qwen2_vl", "qwen2_5_vl", "qwen3", "qwen3_moe", "qwen3_vl", "qwen3_vl_moe"),
            *("qwen3_omni_moe", "qwen2_5_omni"),
        ),
        _qwen,
    ),
    "gemma2": _every(2),
    "gemma3": _every(6, "sliding_window_pattern"),
    "cohere2": _every(4, "sliding_window_pattern"),
    "gpt_oss": _every(2),
    "olmo3": _every(4),
    "gemma4": _gemma4,
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe_lite", "kimi_vl", "deepseek_vl_v2"), _mla),
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_moe"), _gdn),
    "nemotron_h": _nemotron_h,
    "granitemoehybrid": _granite_hybrid,
    "bamba": _bamba,
    "kimi_linear": _kimi_linear,
    **dict.fromkeys(("lfm2", "lfm2_moe"), _lfm2),
}
#: What config.json leaves out where it is transformers' default: Google's own Gemma 3 has neither `vocab_size` nor
#: `head_dim`, which is not the quotient of width and heads.
DEFAULTS: dict[str, dict[str, int]] = {
    "gemma": {"head_dim": 256},
    "gemma2": {"head_dim": 256},
    "gemma3": {
        **{"vocab_size": 262_208, "max_position_embeddings": 131_072, "sliding_window": 4096},
        **{"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
    },
}
#: Kinds of model that are known and whose cache a card cannot describe.
REFUSED = {
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa"), "sparse attention keeps an index besides the cache"),
    **dict.fromkeys(("deepseek_v4", "deepseek_ref"), "its layers compress their cache by different ratios"),
    **dict.fromkeys(("qwen4_exp", "glm5_next", "minimax_m3", "minimax_m3_vl"), "sparse attention with an index"),
    "llama4": "attention in chunks",
    **dict.fromkeys(("mimo_v2", "mimo_v2_flash", "mimo_v2_pro"), "keys and values differ in width, and by layer"),
    "gemma3n": "layers that share the cache of others",
    "falcon_h1": "attention and Mamba-2 side by side in one layer",
    **dict.fromkeys(("jamba", "mamba", "falcon_mamba", "plamo2", "zamba", "zamba2"), "Mamba layers of another kind"),
    **dict.fromkeys(("minimax", "minimax_text_01", "bailing_moe_linear"), "lightning attention"),
    "nemotron-nas": "each layer has a shape of its own (block_configs)",
    **dict.fromkeys(("step3p5", "step3p7"), "layers with a window have heads of another number"),
    **dict.fromkeys(("t5", "whisper"), "it does not generate text as vLLM serves it"),
}
#: What holds the text model in one that also sees or hears.
_TEXT = ("text_config", "llm_config", "language_config", "language_model")


def describe(data: Mapping[str, Any]) -> Description:
    """The shape in a model's config.json (bounded, as `bounded.parse_json` reads it). Raises SparkfleetError: for a
    kind of model that is not known, for values that are missing or out of bounds, each by its name."""
    top = _Config(data)
    text = _text_model(top)
    own, outer = text.text("model_type").removesuffix("_text"), top.text("model_type")
    model_type = own if own in READERS or own in REFUSED or not outer else outer
    architecture = _architecture(top)
    if model_type in REFUSED:
        raise _refused(model_type, REFUSED[model_type])
    if model_type not in READERS:
        raise SparkfleetError(
            f"{CONFIG}: model_type {model_type or own or '(none)'!r} ({architecture or 'no architecture'}) is not "
            f"known here, and its memory is not guessed; {BY_HAND}, or report it. Known are "
            f"{', '.join(sorted(READERS))}"
        )
    text = _Config(text.data, text.place, DEFAULTS.get(model_type))
    return _described(_Reader(text, model_type), top, architecture)


def _described(reader: _Reader, top: _Config, architecture: str) -> Description:
    text = reader.text
    width, per_token, experts = reader.experts()
    figures = {
        "layers": reader.layers,
        "hidden": reader.take("shape.hidden", "hidden_size", "n_embd"),
        "mlp": width,
        **({"experts_per_token": per_token} if per_token else {}),
        "vocab": reader.take("shape.vocab", "vocab_size", most=MOST_COUNT),
        "context": reader.context(),
    }
    layers = READERS[reader.model_type](reader)
    attention = _attention(layers)
    reader.origin["shape.attention"] = f"{CONFIG}: {reader.model_type}"
    more = _more(reader)
    vision = any(isinstance(top.data.get(name), Mapping) for name in ("vision_config", "audio_config"))
    return Description(
        model_type=reader.model_type,
        architecture=architecture,
        shape={**figures, "attention": attention, **more},
        origin=reader.origin,
        unknown=tuple(reader.unknown),
        tied_embeddings=_tied(top, text, reader.model_type),
        experts=experts,
        vision=vision,
        pictures=isinstance(top.data.get("vision_config"), Mapping),
        remote_code=isinstance(top.data.get("auto_map"), Mapping),
    )


def _tied(top: _Config, text: _Config, model_type: str) -> bool:
    """Whether the output layer is the embedding table; if not given, it is so for models of Google and Cohere."""
    given = [
        part.data["tie_word_embeddings"] for part in (top, text) if part.data.get("tie_word_embeddings") is not None
    ]
    return any(value is True for value in given) if given else model_type.startswith(("gemma", "cohere"))


def _more(reader: _Reader) -> dict[str, int]:
    """What a card may hold besides: query heads, layers of multi-token prediction."""
    text, made = reader.text, {}
    if text.get("num_attention_heads", "n_head")[0]:
        made["heads"] = reader.take("shape.heads", "num_attention_heads", "n_head")
    names = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules", "mtp_num_layers")
    layers = text.integer_or(0, *names, most=MOST_LAYERS)
    if layers:
        made["mtp_layers"] = layers
        reader.origin["shape.mtp_layers"] = f"{CONFIG}: {text.where(text.get(*names)[0])}"
        reader.unknown.append(
            f"whether multi-token prediction helps: {CONFIG} has {layers} {'layer' if layers == 1 else 'layers'} of "
            "it, which are left off until `speculative_config` is among the arguments"
        )
    return made


def _attention(layers: list[Layer]) -> list[dict[str, Any]]:
    """Entries of a card's `attention`: one a kind of layer."""
    found = Counter((layer.kind, layer.figures) for layer in layers)
    return [{"kind": kind, "layers": number, **dict(figures)} for (kind, figures), number in found.items()]


def _text_model(top: _Config) -> _Config:
    for holder in (top, top.inner("thinker_config")):
        for name in _TEXT:
            if holder is not None and (inner := holder.inner(name)) is not None and inner.get("hidden_size")[0]:
                return inner
    return top


def _architecture(top: _Config) -> str:
    value = top.data.get("architectures")
    return printable(value[0], 80) if isinstance(value, list) and value and isinstance(value[0], str) else ""


def _refused(model_type: str, why: str) -> SparkfleetError:
    return SparkfleetError(
        f"{CONFIG}: model_type {model_type!r} cannot be put into a card: {why}; its memory is not guessed: {BY_HAND}"
    )


# -- quantisation ----------------------------------------------------------------------------------------------------

#: Bits a weight, scales included: one of 8 bits for 16 weights (NVFP4), for 32 (MXFP4).
_BITS = {"FP8": 8.0, "NVFP4": 4.5, "W4A16_NVFP4": 4.5, "NVFP4_AWQ": 4.5, "MXFP4": 4.25, "MXFP8": 8.25}
UNQUANTISED_BITS = 16.0


@dataclasses.dataclass(frozen=True)
class Quantisation:
    """How weights are kept: ``name`` in words, ``expert_bits`` a weight of a routed expert (None if not known), and
    whether the checkpoint requests an FP8 KV cache; ``place`` names where."""

    name: str
    expert_bits: float | None
    fp8_kv_cache: bool
    place: str
    unknown: tuple[str, ...] = ()
    linear: str = ""  # of the linear layers, in a card's words: fp8, block_fp8, nvfp4, mxfp4


def quantisation(data: Mapping[str, Any], separate: Mapping[str, Any] | None = None) -> Quantisation:
    """Of config.json's ``quantization_config``, or of hf_quant_config.json (`separate`) where there is none: the order
    in which vLLM reads them."""
    top = _Config(data)
    inner = _text_model(top)
    holders = ((top, "quantization_config"), (inner, "quantization_config"), (top, "compression_config"))
    found = next((part for holder, name in holders if (part := holder.inner(name)) is not None), None)
    file = _Config(separate or {}, "hf_quant_config.json").inner("quantization")
    if found is None and file is None:
        return Quantisation("none (16 bits)", UNQUANTISED_BITS, False, f"{CONFIG}: no quantization_config")
    chosen = found if found is not None else file
    assert chosen is not None
    place = f"{CONFIG}: {chosen.place}" if chosen is found else chosen.place
    algorithm = (chosen.text("quant_algo") or chosen.text("quant_method")).upper()
    unknown = []
    if found is not None and file is not None and _fp8_kv(file) and not _fp8_kv(found):
        unknown.append(
            f"FP8 KV cache: hf_quant_config.json requests one, {place} does not; vLLM reads the latter (set the "
            "argument kv_cache_dtype: fp8 to have one)"
        )
    bits = _bits(chosen, algorithm)
    if bits is None:
        unknown.append(f"bits a weight of {algorithm or 'its quantisation'}")
    return Quantisation(
        algorithm or "unnamed", bits, _fp8_kv(chosen), place, tuple(unknown), _linear(chosen, algorithm)
    )


def _linear(part: _Config, algorithm: str) -> str:
    """How the linear layers are quantised, "" for a way that a card has no word for."""
    if algorithm in ("FP8", "FBGEMM_FP8"):
        return "block_fp8" if part.data.get("weight_block_size") is not None else "fp8"
    return {"NVFP4": "nvfp4", "W4A16_NVFP4": "nvfp4", "NVFP4_AWQ": "nvfp4", "MXFP4": "mxfp4"}.get(algorithm, "")


def _fp8_kv(part: _Config) -> bool:
    scheme = part.inner("kv_cache_scheme")
    if scheme is not None:
        bits = scheme.data.get("num_bits")
        return bits == 8 and scheme.text("type") in ("float", "")
    return "FP8" in (part.text("kv_cache_scheme").upper(), part.text("kv_cache_quant_algo").upper())


def _bits(part: _Config, algorithm: str) -> float | None:
    """Bits a weight of the routed experts, or of all there is."""
    if algorithm in _BITS:
        return _BITS[algorithm]
    if layers := part.inner("quantized_layers"):
        names = (name for name in layers.data if "experts" in name)
        one = layers.inner(next(names, ""))
        return _BITS.get(one.text("quant_algo").upper()) if one else UNQUANTISED_BITS
    if algorithm in ("FBGEMM_FP8", "MODELOPT_FP8"):
        return 8.0
    bits, group = part.data.get("bits"), part.data.get("group_size")
    if groups := part.inner("config_groups"):
        first = groups.inner(next(iter(groups.data), ""))
        weights = first.inner("weights") if first else None
        bits, group = (weights.data.get("num_bits"), weights.data.get("group_size")) if weights else (None, None)
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 16:
        return None
    scales = 16 / group if isinstance(group, int) and not isinstance(group, bool) and 8 <= group <= 1_000_000 else 0.0
    return bits + scales
