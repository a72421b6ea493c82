"""A model card that is written by the program: its data, the source of each field, and what is not stated. Pure.

The text is a card of the catalogue's format (`models/schema.json`) whose comments name the source of each field, and
starts with what is not known; `catalog.of_text` reads it as it reads any other card.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import yaml
from sparkfleet_host.bounded import GIB, printable

from sparkfleet.planning.catalog import Arguments
from sparkfleet.planning.model_config import Description, Quantisation

#: The engine of an untried card: the newest that the catalogue has run on a Spark. gpt-oss has NVIDIA's,
#: since upstream's answered it with noise on a GB10 (models/gpt-oss-20b.yml).
IMAGE = "vllm/vllm-openai:v0.28.0"
IMAGES = {"gpt_oss": "nvcr.io/nvidia/vllm:26.05-py3"}
#: vLLM's --tool-call-parser by kind of model (docs.vllm.ai, "Tool calling"); by a word of the name before that.
PARSERS = {
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_vl", "qwen3_vl_moe"), "hermes"),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe"), "qwen3_xml"),
    **dict.fromkeys(("mistral", "mixtral"), "mistral"),
    **dict.fromkeys(("granite", "granitemoe", "granitemoehybrid"), "granite"),
    **dict.fromkeys(("glm4_moe", "glm4_moe_lite"), "glm45"),
    "gpt_oss": "openai",
    "deepseek_v3": "deepseek_v3",
    "kimi_k2": "kimi_k2",
    "minimax_m2": "minimax_m2",
    "gemma4": "gemma4",
    "nemotron_h": "qwen3_coder",
}
PARSERS_BY_NAME = (
    (re.compile(r"qwen3.*coder", re.I), "qwen3_coder"),
    (re.compile(r"glm-4\.[7-9]", re.I), "glm47"),
    (re.compile(r"deepseek-v3\.1", re.I), "deepseek_v31"),
    (re.compile(r"llama-3|llama3", re.I), "llama3_json"),
    (re.compile(r"hermes", re.I), "hermes"),
)
#: Usual settings of an untuned card.
LENGTH = 32_768
LONG, SHORT = 131_072, 16_384
VERIFY = {
    "question": "What is the capital of France? Answer in one short sentence.",
    "expect": "Paris",
    "prompt": "The capital of France is",
    "prompt_expect": "Paris",
}
#: Tokens of an answer of a model that thinks first.
THINKING_TOKENS = 1024
OURS = "ours"
NO_PARSER = "the parser of tool calls"
NOT_STATED = "not stated anywhere"


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a model besides its config.json. Bytes are those of files; 0 and "" are not known; `chat` and
    `gated` None too. `where` names the place of files: the Hub's list, a folder."""

    repo: str
    revision: str
    where: str
    revision_origin: str
    download_bytes: int = 0
    weight_bytes: int = 0
    weight_origin: str = ""
    licence: str = ""
    licence_origin: str = ""
    gated: bool | None = None
    chat: bool | None = None
    embeds: bool = False  # of sentence-transformers: it gives vectors, whatever its architecture
    thinks: str = ""  # "switch" with enable_thinking in its template, "always" with <think>, "" for neither


@dataclasses.dataclass
class Draft:
    """A card's `data`, the `origin` of its fields {"shape.layers": words}, what is `unknown`, and what of someone
    else's settings was `left` out: a line each."""

    data: dict[str, Any]
    origin: dict[str, str]
    unknown: list[str]
    head: str = "Made by `sparkfleet card`"
    left: list[str] = dataclasses.field(default_factory=list)

    def text(self) -> str:
        """The card as YAML."""
        lines = [f"# {_line(self.head)}. Each field is followed by its source."]
        lines += ["#", "# Not known, to be checked:"] if self.unknown else []
        lines += [f"# - {_line(words)}" for words in self.unknown]
        lines += ["#", "# Not taken:", *(f"# - {_line(words)}" for words in self.left)] if self.left else []
        return "\n".join(["---", *lines, *self._fields(self.data, (), 0)]) + "\n"

    def _fields(self, part: Mapping[str, Any], place: tuple[str, ...], depth: int) -> list[str]:
        lines = []
        for key, value in part.items():
            here = (*place, key)
            note = self.origin.get(".".join(here), "")
            comment = f"  # {_line(note)}" if note else ""
            start = f"{'  ' * depth}{_scalar(key)}:"
            if isinstance(value, Mapping) and value and not (place and place[0] in ("arguments", "profiles")):
                lines += [start + comment, *self._fields(value, here, depth + 1)]
            elif isinstance(value, list) and value:
                lines += [start + comment, *(f"{'  ' * (depth + 1)}- {_scalar(item)}" for item in value)]
            else:
                lines.append(f"{start} {_scalar(value)}{comment}")
        return lines


def _line(text: str) -> str:
    """Text as a comment: one line, without what moves a terminal."""
    return printable(text, 400)


def _scalar(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def name_of(repo: str) -> str:
    """A card's name for ORG/NAME: small letters, digits, dots and dashes, at most 58."""
    name = re.sub(r"[^a-z0-9.-]+", "-", repo.rpartition("/")[2].lower()).strip("-.")[:58].rstrip("-.")
    return name or "model"


def draft(model: Description, quantisation: Quantisation, facts: Facts, image: str = "") -> Draft:
    """The card of a model that is untried on a Spark: figures are the model's, settings are ours and marked so."""
    facts = dataclasses.replace(facts, where=_line(facts.where), licence=_line(facts.licence).strip())
    name = name_of(facts.repo)
    origin = {
        "name": "of the repository",
        "service": "of the name",
        "repo": facts.where,
        "revision": facts.revision_origin,
        "verified": "not known to have been run",
        **model.origin,
        "shape.kv_cache_dtype": f"{quantisation.place}",
    }
    unknown = [*model.unknown, *quantisation.unknown]
    kind = model.model_type
    chosen = image or IMAGES.get(kind, IMAGE)
    origin["image"] = "as you asked" if image else f"{OURS}; not known to have been run with this model"
    shape = dict(model.shape)
    shape["kv_cache_dtype"] = "fp8" if quantisation.fp8_kv_cache else "auto"
    if quantisation.linear:
        shape["quantization"], origin["shape.quantization"] = quantisation.linear, quantisation.place
    data: dict[str, Any] = {
        "name": name,
        "service": f"vllm-{name}",
        "repo": facts.repo,
        "revision": facts.revision,
        "image": chosen,
        "verified": False,
        "licence": _licence(facts, origin, unknown),
        "weights": _weights(model, quantisation, facts, origin, unknown),
        "shape": shape,
    }
    if model.pictures:
        data["vision"], origin["vision"] = True, "config.json: vision_config"
    if (parser := _parser(facts.repo, kind)) and not _pools(model, facts):
        data["tool_call_parser"] = parser
        origin["tool_call_parser"] = f"vLLM's parser for {kind}, by a table of ours"
    elif not _pools(model, facts):
        unknown.append(f"{NO_PARSER}: tool_call_parser is left out, and tool calls are off")
    data["arguments"] = _arguments(model, facts, origin)
    context = shape["context"]
    data["profiles"] = {"throughput": {}}
    if not _pools(model, facts):
        data["profiles"] |= {
            "long_context": {"max_model_len": min(context, LONG), "max_num_seqs": 8},
            "low_latency": {"max_model_len": min(context, SHORT), "max_num_seqs": 8},
        }
    origin["profiles"] = OURS
    data["verify"] = _verify(model, facts, origin, unknown)
    if model.vision:
        unknown.append("memory of pictures and sound: the plan counts text alone")
    if model.remote_code:
        unknown.append(
            "whether the engine needs code of the model's repository (auto_map): it is left off; `trust_remote_code: "
            "true` among the arguments lets the engine run it"
        )
    data["measured"] = []
    data["sources"] = [f"{facts.where}: config.json and list of files at {facts.revision}", "settings are ours"]
    return Draft(data, origin, unknown)


def _licence(facts: Facts, origin: dict[str, str], unknown: list[str]) -> dict[str, Any]:
    origin["licence.name"] = facts.licence_origin if facts.licence else NOT_STATED
    origin["licence.page"] = "where it is read"
    if not facts.licence:
        unknown.append("the licence: read the model's page before you serve it")
    if facts.gated is None:
        unknown.append(
            "whether the Hub asks to accept the licence (gated): a folder does not show it; false is written"
        )
        origin["licence.gated"] = NOT_STATED
    else:
        origin["licence.gated"] = "the Hub"
    return {
        "name": facts.licence or "unknown",
        "gated": bool(facts.gated),
        "page": f"https://huggingface.co/{facts.repo}",
    }


def _weights(
    model: Description, quantisation: Quantisation, facts: Facts, origin: dict[str, str], unknown: list[str]
) -> dict[str, Any]:
    weights = facts.weight_bytes or facts.download_bytes
    made = {"download_gib": _rounded(facts.download_bytes / GIB)}
    origin["weights.download_gib"] = f"{facts.where}: sizes of all files that are fetched"
    if facts.weight_bytes and abs(facts.weight_bytes - facts.download_bytes) > 0.005 * facts.download_bytes:
        made["loaded_gib"] = _rounded(facts.weight_bytes / GIB)
        origin["weights.loaded_gib"] = facts.weight_origin
    read = weights - 2 * model.embedding_parameters
    how = "weights without the embedding table" if model.embedding_parameters else "all weights"
    if model.experts:
        bits = quantisation.expert_bits
        idle = model.experts.total * (bits or 0) / 8 * model.experts.idle_share
        if bits and idle < read:
            read -= int(idle)
            how += f" and the experts that a token does not pass ({bits:g} bits a weight, {quantisation.name})"
        else:
            unknown.append(
                "how much of the experts one token reads: read_gb_per_token is that of all weights, so that the plan "
                "shows too few tokens a second"
            )
    if model.vision or any("multi-token" in words for words in model.unknown):
        how += "; those of pictures and of multi-token prediction are counted, so that it is too much"
    made["read_gb_per_token"] = _rounded(max(read, 1_000_000) / 1e9)
    origin["weights.read_gb_per_token"] = f"calculated: {how}"
    unknown.append(
        "what the weights take in memory: vLLM may pad or convert them; loaded_gib is that of a log "
        "(`Model loading took`)"
    )
    return made


def _rounded(amount: float) -> float:
    return max(round(amount, 2), 0.01)


def _arguments(model: Description, facts: Facts, origin: dict[str, str]) -> Arguments:
    made: Arguments = {
        **({"runner": "pooling"} if _pools(model, facts) else {}),
        # The engine knows the longest text of an encoder, which may be shorter than its positions.
        **({} if model.encoder else {"max_model_len": min(model.shape["context"], LENGTH)}),
        # Without a KV cache only that much has to be available.
        "gpu_memory_utilization": 0.10 if model.encoder else 0.80,
        "max_num_batched_tokens": 8192,
        "max_num_seqs": 32,
    }
    # Of hybrids it costs memory, and works from some version on; what gives no text has no cache to reuse.
    if not model.hybrid and not _pools(model, facts):
        made["enable_prefix_caching"] = True
    if facts.thinks == "switch":
        made["default_chat_template_kwargs"] = {"enable_thinking": False}
        origin["arguments.default_chat_template_kwargs"] = (
            "its chat template has the switch; thinking is off unless a request enables it, so that short answers "
            "stay short"
        )
    origin["arguments"] = f"{OURS}; `sparkfleet plan` shows what they need on a Spark"
    return made


def _verify(model: Description, facts: Facts, origin: dict[str, str], unknown: list[str]) -> dict[str, Any]:
    if _pools(model, facts):
        scores = model.architecture.endswith("ForSequenceClassification")
        origin["verify"] = f"config.json: {model.architecture}" if scores else "it gives vectors in place of text"
        if scores:
            unknown.append("whether its scores order texts by a question (rerank), as verification expects it")
        return {"kinds": ["rerank" if scores else "embeddings"]}
    made: dict[str, Any] = dict(VERIFY)
    origin["verify"] = OURS
    if facts.chat is False:
        unknown.append(
            "whether it can be asked: it has no chat template, and verification asks a question; give one with the "
            "argument chat_template, or take a model that was tuned to chat"
        )
    elif facts.chat is None:
        unknown.append("whether it has a chat template, which verification needs")
    if facts.thinks == "always" or model.model_type == "gpt_oss":
        made["max_tokens"] = THINKING_TOKENS
        origin["verify.max_tokens"] = "it thinks before it answers"
    return made


def _pools(model: Description, facts: Facts) -> bool:
    """Whether it gives vectors or scores in place of text."""
    return model.encoder or facts.embeds


def _parser(repo: str, kind: str) -> str:
    name = repo.rpartition("/")[2]
    found = next((parser for pattern, parser in PARSERS_BY_NAME if pattern.search(name)), "")
    return found or PARSERS.get(kind, "")


def settings(
    made: Draft, arguments: Arguments, environment: Mapping[str, str], parser: str, sparks: int, where: str
) -> None:
    """Put settings that someone else wrote (a recipe, a command line: `where`) in place of ours."""
    if sparks != 1:
        made.data = _after(made.data, "image", {"sparks": sparks})
        made.origin["sparks"] = where
    made.origin = {key: words for key, words in made.origin.items() if not key.startswith("arguments.")}
    made.data["arguments"], made.origin["arguments"] = dict(arguments), where
    made.data["profiles"] = {"throughput": {}}
    made.origin["profiles"] = f"{where} has one set of arguments"
    if parser:
        made.data = _after(made.data, "shape", {"tool_call_parser": parser})
        made.origin["tool_call_parser"] = where
        made.unknown = [words for words in made.unknown if not words.startswith(NO_PARSER)]
    if environment:
        made.data = _after(made.data, "arguments", {"environment": dict(environment)})
        made.origin["environment"] = where
    made.data["sources"] = [*made.data["sources"][:1], where]


def _after(data: Mapping[str, Any], key: str, more: Mapping[str, Any]) -> dict[str, Any]:
    """The same with `more` behind `key`."""
    made: dict[str, Any] = {}
    for name, value in data.items():
        if name not in more:
            made[name] = value
        if name == key:
            made |= more
    return made
