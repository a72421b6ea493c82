"""Settings that someone else wrote, as those of a card: a recipe of sparkrun (its formats 1 and 2, which
eugr/spark-vllm-docker shares) or a command line `vllm serve ...`.

Nothing is run, and nothing is dropped in silence: what a card has no place for is listed, with the place it has here.
Values that may be secrets are never shown.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

from sparkfleet_host import bounded, cache
from sparkfleet_host.bounded import BoundsError, printable

from sparkfleet import SparkfleetError
from sparkfleet.documents import yaml_text
from sparkfleet.planning import catalog
from sparkfleet.planning.catalog import OURS, ArgumentValue

#: Of a recipe or a command line.
CHARACTERS = 256 << 10
WORDS = 2000
#: Short forms of vLLM's flags.
SHORT = {
    "tp": "tensor_parallel_size",
    "pp": "pipeline_parallel_size",
    "dp": "data_parallel_size",
    "dcp": "decode_context_parallel_size",
    "ep": "enable_expert_parallel",
    "q": "quantization",
    "cc": "compilation_config",
    "sc": "speculative_config",
    "asc": "additional_config",
    "n": "nnodes",
    "r": "node_rank",
}
#: Names that sparkrun has for vLLM's.
SPARKRUN = {
    "tensor_parallel": "tensor_parallel_size",
    "pipeline_parallel": "pipeline_parallel_size",
    "data_parallel": "data_parallel_size",
}
#: How many Sparks an engine spans is the inventory's.
PLACEMENT = frozenset(
    (
        *("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "decode_context_parallel_size"),
        *("distributed_executor_backend", "nnodes", "node_rank", "master_addr", "master_port", "headless"),
        *("data_parallel_address", "data_parallel_rpc_port", "data_parallel_backend", "data_parallel_rank"),
        *("data_parallel_size_local", "data_parallel_start_rank", "api_server_count"),
    )
)
#: Flags without a value, besides those whose name shows it.
BARE = frozenset(
    (
        *(
            "trust_remote_code",
            "enforce_eager",
            "async_scheduling",
            "headless",
            "skip_tokenizer_init",
            "fully_sharded_loras",
        ),
        *("skip_mm_profiling", "use_tqdm_on_load", "allow_credentials", "return_tokens_as_token_ids", "log_requests"),
        *("calculate_kv_scales", "interleave_mm_strings", "enable_lora", "generate_with_fallback", "multi_step_stream"),
    )
)
_BARE_BEGINNINGS = ("enable_", "disable_", "no_", "skip_", "exclude_")
#: Flags of these names with a value all the same.
VALUED = frozenset(("enable_log_requests_level", "disable_log_stats_interval", "no_proxy"))
#: Amounts that vLLM takes as 32k, 32K, 1.5M, 8G.
AMOUNTS = frozenset(("max_model_len", "max_num_batched_tokens", "max_num_seqs", "kv_cache_memory_bytes"))
_FACTORS = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH", re.I)
#: Parts of names that only seem to name a secret.
_NO_SECRET = re.compile(r"TOKENIZER|TOKENS|MAX_TOKEN|KEYED|MONKEY|NUM_TOKEN", re.I)
#: A URL with a user's name or password.
_USERINFO = re.compile(r"://[^/\s@]*@")
#: Arguments and variables that run code from outside the image.
_CODE = frozenset(("trust_remote_code", "worker_extension_cls", "worker_cls", "middleware", "LD_PRELOAD", "PYTHONPATH"))
_COMMAND = re.compile(r"(^|[\s/])(vllm\s+serve|vllm\.entrypoints|vllm-openai[:@]|docker\s+run)")
_NUMBER = re.compile(r"[+-]?[0-9]{1,18}(\.[0-9]{0,18})?(e[+-]?[0-9]{1,2})?", re.I | re.ASCII)
_OPERATORS = frozenset(("&&", "||", ";", "|", "&", ">", ">>", "<", "<<", "2>&1", ">&"))
#: Keys of a recipe that describe it and change nothing.
_DESCRIBING = frozenset(("recipe_version", "name", "description", "metadata", "maintainer", "benchmark", "version"))
#: Keys whose meaning has another place here, and which.
_ELSEWHERE = {
    "mods": "patches of the image: build an image that has them, and name it",
    "build_args": "arguments of a build: name an image that is built already",
    "builder": "a build: name an image that is built already",
    "builder_config": "a build: name an image that is built already",
    "containers": "an image a host: sparkfleet_image in the inventory",
    "pre_exec": "commands before the start are not run here",
    "post_exec": "commands after the start are not run here",
    "post_commands": "commands after the start are not run here",
    "stop_after_post": "commands after the start are not run here",
    "executor_config": "how the container runs is Sparkfleet's",
    "distribution_config": "how files reach a host is Sparkfleet's",
    "runtime_cache": "the compile cache is Sparkfleet's (sparkfleet_compile_cache_dir)",
    "runtime_config": "settings of sparkrun's runtime",
    "runtime_version": "it only informs",
    **dict.fromkeys(
        ("min_nodes", "max_nodes", "solo_only", "cluster_only", "mode", "cluster_config"),
        "how many Sparks an engine spans is the inventory's",
    ),
}


@dataclasses.dataclass
class Settings:
    """The content of a recipe or command, in a card's terms; ``left`` lists what was not taken: a line each, name and
    reason; ``doubts`` what of the rest may not work here. ``model`` is ORG/NAME or "", ``image`` "" where none can
    be taken."""

    kind: str
    model: str = ""
    revision: str = ""
    image: str = ""
    tool_call_parser: str = ""
    sparks: int = 1
    arguments: dict[str, ArgumentValue] = dataclasses.field(default_factory=dict)
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    left: list[str] = dataclasses.field(default_factory=list)
    doubts: list[str] = dataclasses.field(default_factory=list)

    def leave(self, what: str, why: str) -> None:
        """Note that something is not taken."""
        self.left.append(f"{printable(what, 120)}: {why}")


def read(text: str, place: str) -> Settings:
    """A recipe (YAML with `model` or `command`) or a command line; `place` names it in errors. Raises
    SparkfleetError."""
    if len(text) > CHARACTERS:
        raise SparkfleetError(f"{place}: more than {CHARACTERS} characters: that is not a recipe")
    text = text.removeprefix("\ufeff")  # the byte order mark of some editors
    if found := yaml_text.control(text):
        raise SparkfleetError(f"{place}:{found[1]}: the control character {found[0]}: remove it")
    if _COMMAND.search(text) and not re.search(r"^[ \t]*(command|model|container)[ \t]*:", text, re.M):
        return command(text, place)
    try:
        data = yaml_text.load(_without_tabs(text), CHARACTERS)
    except yaml_text.YamlError as error:
        line = f":{error.line}" if error.line else ""
        raise SparkfleetError(f"{place}{line}: {error}; it is neither a recipe nor a `vllm serve` command") from None
    if not isinstance(data, Mapping) or not {"model", "command", "container"} & set(data):
        raise SparkfleetError(
            f"{place}: it is neither a recipe of sparkrun (a mapping with model, container, defaults, command) nor a "
            "`vllm serve` command"
        )
    return recipe(data, place)


def _without_tabs(text: str) -> str:
    return text.replace("\t", "  ")


# -- recipes ---------------------------------------------------------------------------------------------------------


def recipe(data: Mapping[str, Any], place: str) -> Settings:
    """A recipe of sparkrun. Raises SparkfleetError for one that is for another engine than vLLM."""
    version = str(data.get("recipe_version", "2"))
    made = Settings(f"sparkrun recipe, format {printable(version, 20)}")
    if version not in ("1", "2"):
        made.leave(f"recipe_version {version}", "formats 1 and 2 are known; the rest is read as 2")
    _check_runtime(data, place)
    defaults = data.get("defaults") or {}
    if not isinstance(defaults, Mapping):
        raise SparkfleetError(f"{place}: defaults: must be a mapping, not {_shown(defaults)}")
    template = data.get("command")
    if template is not None and not isinstance(template, str):
        raise SparkfleetError(f"{place}: command: must be a text, not {_shown(template)}")
    _model(made, data.get("model"), data.get("model_revision"))
    if template:
        used = _command_of(made, template, {**defaults, "model": data.get("model") or ""}, place)
        for name in defaults:
            if name not in used:
                made.leave(f"defaults.{name}", "the recipe's command does not use it")
    else:
        for name, value in defaults.items():
            _argument(made, SPARKRUN.get(name, name.replace("-", "_")), value)
    _image(made, data.get("container"))
    environment = data.get("env") or {}
    if not isinstance(environment, Mapping):
        raise SparkfleetError(f"{place}: env: must be a mapping, not {_shown(environment)}")
    for name, value in environment.items():
        _variable(made, str(name), value)
    for key, value in data.items():
        if key in ("model", "model_revision", "container", "defaults", "command", "env", "runtime") or value in (
            None,
            [],
            {},
            False,
            "",
        ):
            continue
        if key in _DESCRIBING or _is_one_spark(key, value):
            continue
        made.leave(key, _ELSEWHERE.get(key, "unknown key"))
    _settle(made)
    return made


def _is_one_spark(key: str, value: Any) -> bool:
    """Whether a key states what a card states anyway."""
    return (
        (key == "min_nodes" and value == 1)
        or (key == "max_nodes" and isinstance(value, int))
        or (key == "solo_only" and value is True)
        or (key == "mode" and value in ("auto", "solo"))
    )


def _check_runtime(data: Mapping[str, Any], place: str) -> None:
    runtime = str(data.get("runtime") or "vllm")
    if runtime not in ("vllm", "vllm-ray", "vllm-distributed", "eugr-vllm"):
        raise SparkfleetError(
            f"{place}: runtime: {printable(runtime, 60)} is not vLLM; only recipes for vLLM become cards"
        )


def _command_of(made: Settings, template: str, values: Mapping[str, Any], place: str) -> set[str]:
    """Settings of a recipe's command; the names of the defaults that it uses."""
    used: set[str] = set()

    def value(found: re.Match[str]) -> str:
        if found[0] in ("{{", "}}"):
            return found[0][0]
        if found[1] not in values:
            return found[0]
        used.add(found[1])
        return _word(values[found[1]])

    # In format 1 a doubled brace is a literal one; sparkrun decides by the first.
    pattern = r"\{\{|\{([A-Za-z_]\w{0,63})\}|\}\}" if "{{" in template else r"\{([A-Za-z_]\w{0,63})\}"
    text = template
    for _ in range(5):  # a default may name another one
        before, text = text, re.sub(pattern, value, text, flags=re.ASCII)
        if len(text) > CHARACTERS:
            raise SparkfleetError(f"{place}: command: more than {CHARACTERS} characters once its defaults are put in")
        if before == text:
            break
        pattern = r"\{([A-Za-z_]\w{0,63})\}"
    _line(made, text, place)
    return used


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping | list):
        return json.dumps(value)
    return str(value)


# -- command lines ---------------------------------------------------------------------------------------------------


def command(text: str, place: str) -> Settings:
    """A command line with `vllm serve` in it: alone, after variables, or behind `docker run`. Raises SparkfleetError
    for one that has none."""
    made = Settings("vllm serve command")
    _line(made, text, place)
    _settle(made)
    return made


def _line(made: Settings, text: str, place: str) -> None:
    joined = re.sub(r"\\[ \t]*\r?\n", " ", text)
    lexer = shlex.shlex(joined, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters = True, "#"
    words: list[str] = []
    try:
        for word in lexer:
            words.append(word)
            if len(words) > WORDS:
                raise SparkfleetError(f"{place}: more than {WORDS} words: that is not a command")
    except ValueError as error:
        raise SparkfleetError(f"{place}: the command cannot be read: {error} (a quote that is not closed?)") from None
    start = _start(words)
    if start is None:
        raise SparkfleetError(f"{place}: there is no `vllm serve` in the command; only vLLM is served here")
    _before(made, words[: start[0]])
    _flags(made, words[start[1] :])


def _start(words: list[str]) -> tuple[int, int] | None:
    """Where the words of vLLM start, and where its arguments do."""
    for at, word in enumerate(words):
        if word.rpartition("/")[2] == "vllm" and words[at + 1 : at + 2] == ["serve"]:
            return at, at + 2
        if word.startswith("vllm.entrypoints."):
            return max(at - 2, 0), at + 1
        # upstream's image has `vllm serve` as its entry point
        if re.search(r"(^|/)vllm-openai(:|@|$)", word):
            rest = words[at + 1 : at + 3]
            return (at + 1, at + 3) if rest == ["vllm", "serve"] else (at + 1, at + 1)
    return None


def _before(made: Settings, words: list[str]) -> None:
    """Variables, and `docker run` with its image."""
    docker = next((at for at, word in enumerate(words) if word.rpartition("/")[2] in ("docker", "podman")), None)
    for word in words if docker is None else words[:docker]:
        name, equals, value = word.partition("=")
        if equals and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            _variable(made, name, value)
        elif word not in ("exec", "sudo", "env", "export", "nohup", "time", "-m", "python", "python3"):
            made.leave("words before the command", "they may hold secrets, and are not shown")
    if docker is None:
        return
    rest = iter(words[docker + 1 :])
    last, left = "", []
    for word in rest:
        flag, equals, value = word.partition("=")
        if flag in ("-e", "--env"):
            name, _, content = (value if equals else next(rest, "")).partition("=")
            _variable(made, name, content)
        elif word.startswith("-e") and not word.startswith("--"):  # -eNAME=VALUE
            name, _, content = word[2:].partition("=")
            _variable(made, name, content)
        elif word.startswith("-"):
            left.append(flag if word.startswith("--") else word[:2])
            last = ""
        else:
            last = word
    if last:
        _image(made, last)
    if left:
        made.leave(f"options of docker run ({' '.join(left)[:80]})", "how the container runs is Sparkfleet's")


def _flags(made: Settings, words: list[str]) -> None:
    """The arguments of vllm serve."""
    for at, word in enumerate(words):
        if word in _OPERATORS or word.endswith(";"):
            made.leave("words after the command", "they may hold secrets, and are not shown")
            words = [*words[:at], *([word[:-1]] if word.endswith(";") and len(word) > 1 else [])]
            break
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        if not _is_flag(word):
            if made.model or not _is_model(word):
                if word != made.model:
                    made.leave("a word that is not a flag", "it may be a secret, and is not shown")
            else:
                _model(made, word, None)
            continue
        name, equals, value = word.lstrip("-").partition("=")
        name = _name(word, name)
        values = [value] if equals else []
        if not equals and not _is_bare(name):
            while at < len(words) and not _is_flag(words[at]):
                if values and _is_model(words[at]) and not made.model and "served" not in name:
                    break
                values.append(words[at])
                at += 1
        _given(made, name, values)


def _is_flag(word: str) -> bool:
    return word.startswith("-") and len(word) > 1 and not _NUMBER.fullmatch(word)


def _is_bare(name: str) -> bool:
    return name in BARE or (name.startswith(_BARE_BEGINNINGS) and name not in VALUED and "." not in name)


def _is_model(word: str) -> bool:
    return cache.valid_repo(word) and "/" in word


def _name(word: str, name: str) -> str:
    if word.startswith("--"):
        return name.replace("-", "_")
    head, dot, tail = name.partition(".")
    if re.fullmatch(r"O[0-3]", head):
        return "O"
    return SHORT.get(head, head) + dot + tail.replace("-", "_")


def _given(made: Settings, name: str, values: list[str]) -> None:
    """One flag with its words."""
    if "." in name:  # --speculative-config.method mtp
        head, *path = name.split(".")
        if head in OURS or head in PLACEMENT or head in _CODE or _is_secret(head) or not _NAME.fullmatch(head):
            made.leave(f"--{head}.… (value not shown)", "it is not an argument that a card can have as a mapping")
            return
        inner = made.arguments.setdefault(head, {})
        if not isinstance(inner, dict) or len(values) > 1 or len(path) > 8:
            made.leave(f"--{name}", "it contradicts what was given before")
            return
        for part in path[:-1]:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                made.leave(f"--{name}", "it contradicts what was given before")
                return
        inner[path[-1]] = _value(values[0]) if values else True
        return
    if not values:
        _argument(made, name, True)
    elif len(values) > 1 and name == "served_model_name":
        _argument(made, name, " ".join(values))
    elif len(values) > 1:
        words = " ".join(values)[:80] if all(map(_NUMBER.fullmatch, values)) else "(values not shown)"
        made.leave(f"--{name.replace('_', '-')} {words}", "a card has no arguments with several words")
    else:
        _argument(made, name, _value(values[0]))


def _value(word: str) -> ArgumentValue:
    """A word of the command line as a value: a number, true, a mapping in JSON, or a text."""
    if _NUMBER.fullmatch(word):
        number = float(word)
        return int(word) if re.fullmatch(r"[+-]?[0-9]+", word) else number
    if word in ("true", "True", "false", "False"):
        return word.lower() == "true"
    if word.startswith("{"):
        try:
            return bounded.as_dict(bounded.parse_json(word, "it", CHARACTERS, depth=20), "it")
        except BoundsError:
            return word
    return word


_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


def _is_secret(name: str) -> bool:
    """Whether a name says that its value may be a secret."""
    return _SECRET.search(_NO_SECRET.sub("", name)) is not None


# -- single settings -------------------------------------------------------------------------------------------------


def _argument(made: Settings, name: str, value: Any) -> None:
    """One argument of vllm serve, or where else it belongs."""
    shown = f"--{name.replace('_', '-')}" + ("" if _is_secret(name) or value is True else f" {_shown(value)}")
    if isinstance(value, str) and re.search(r"\$[A-Za-z_{(]|`", value):
        made.leave(f"--{name.replace('_', '-')}", "its value is of a shell: write it out")
    elif isinstance(value, str) and re.fullmatch(r"\{[A-Za-z_]\w*\}", value):
        made.leave(shown, "the placeholder has no value")
    elif isinstance(value, str) and value.startswith("-") and not _NUMBER.fullmatch(value):
        made.leave(shown, "its value would be another flag of vllm serve")
    elif name not in OURS and (_is_secret(name) or (isinstance(value, str) and _USERINFO.search(value))):
        made.leave(f"--{name.replace('_', '-')} (value not shown)", "it is a secret; the Hub's is sparkfleet_hf_token")
    elif name in ("model", "model_tag"):
        _model(made, value, None)
    elif name == "revision":
        _model(made, None, value)
    elif name == "served_model_name":
        if value != made.model:
            made.leave(shown, "clients ask for the model by its name on the Hub here")
    elif name == "tensor_parallel_size" and value in catalog.schema()["properties"]["sparks"]["enum"]:
        if value != 1:
            made.sparks = made.arguments[name] = int(value)
    elif name in PLACEMENT:
        if value not in (1, 0, "mp", "uni"):
            made.leave(shown, "how many Sparks an engine spans is the inventory's")
    elif name in OURS:
        usual = (name, value) in (("host", "0.0.0.0"), ("port", 8000), ("download_dir", "/root/.cache/huggingface/hub"))  # noqa: S104
        if not usual:
            made.leave(shown, f"it is {OURS[name]} in the inventory")
    elif name == "tool_call_parser":
        made.tool_call_parser = printable(str(value), 200)
    elif name == "enable_auto_tool_choice":
        pass  # what sparkfleet_tool_calls does, with the parser
    elif name in AMOUNTS:
        _amount(made, name, value, shown)
    elif isinstance(value, list) or value is None:
        made.leave(shown, "a card's arguments are texts, numbers, true, false and mappings")
    elif name == "O" or not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", name):
        made.leave("-O" if name == "O" else shown, "it is not among the arguments of vllm serve")
    elif name == "kv_cache_dtype" and value not in _kv_dtypes():
        made.leave(shown, f"the memory plan knows {', '.join(_kv_dtypes())}")
    elif isinstance(value, str | int | float | bool):
        made.arguments[name] = value.strip() if isinstance(value, str) else value
        if isinstance(value, str) and value.strip().startswith("{"):
            made.arguments[name] = _value(value.strip())
    elif isinstance(value, Mapping):
        made.arguments[name] = dict(value)
    else:
        made.leave(shown, "its value is of no kind that an argument has")


def _kv_dtypes() -> list[str]:
    found: list[str] = catalog.schema()["$defs"]["arguments"]["properties"]["kv_cache_dtype"]["enum"]
    return found


def _amount(made: Settings, name: str, value: Any, shown: str) -> None:
    """A number that may be written as 32k or 8G; the longest length that fits, as `auto`."""
    if name == "max_model_len" and value in ("auto", -1):
        made.arguments[name] = "auto"
        return
    schema = catalog.schema()["$defs"]
    rule = schema["arguments"]["properties"][name]
    rule = schema[rule["$ref"].rpartition("/")[2]] if "$ref" in rule else rule
    if isinstance(value, str):
        found = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)([kmgtKMGT]?)i?[bB]?", value.strip(), re.ASCII)
        if found:
            value = int(float(found[1]) * _FACTORS.get(found[2], 1))
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not rule["minimum"] <= value <= rule["maximum"]:
        made.leave(shown, f"it must be {rule['expected']} here")
    else:
        made.arguments[name] = value


def _model(made: Settings, model: Any, revision: Any) -> None:
    if model is not None and not (isinstance(model, str) and _is_model(model)):
        made.leave(f"model {_shown(model)}", "it is not ORG/NAME of the Hub")
    elif isinstance(model, str):
        if made.model and made.model != model:
            made.leave(f"model {model}", f"there are two, and {made.model} comes first")
        else:
            made.model = model
    if revision is not None:
        if isinstance(revision, str) and cache.valid_revision(revision):
            made.revision = revision
        else:
            made.leave(f"revision {_shown(revision)}", "it is not a branch, tag or commit")


def _image(made: Settings, image: Any) -> None:
    if image is None:
        return
    rule = catalog.schema()["$defs"]["image"]
    if not isinstance(image, str) or not re.fullmatch(rule["pattern"], image):
        made.leave(f"image {_shown(image)}", "it is not a reference to an image")
    elif "/" not in image:
        made.leave(f"image {image}", "it is built on the host, and no registry has it: name one with --image")
    else:
        made.image = image


def _variable(made: Settings, name: str, value: Any) -> None:
    """A variable of the engine's environment; never a secret."""
    if _is_secret(name) or (isinstance(value, str) and _USERINFO.search(value)):
        made.leave(f"{name} (value not shown)", "it may be a secret; the Hub's token is sparkfleet_hf_token")
    elif name in ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "TRANSFORMERS_CACHE"):
        made.leave(name, "Sparkfleet sets the model's place in the container")
    elif not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,127}", name):
        made.leave(name, "it is not a variable in capitals")
    elif isinstance(value, bool) or not isinstance(value, str | int | float):
        made.leave(name, "its value is neither a text nor a number")
    elif isinstance(value, str) and re.search(r"\$[A-Za-z_{(]|`", value):
        made.leave(name, "its value is of a shell: write it out")
    else:
        made.environment[name] = str(value)


def _settle(made: Settings) -> None:
    """What contradicts itself once all is known."""
    yaml_text.check(made.arguments, made.kind)
    yaml_text.check(made.environment, made.kind)
    made.left = list(dict.fromkeys(made.left))
    given = made.arguments
    speculative = given.get("speculative_config")
    drafter = speculative.get("model") if isinstance(speculative, Mapping) else None
    if isinstance(drafter, str) and drafter != made.model:
        made.doubts.append(
            f"whether the engine finds {printable(drafter, 100)} (speculative_config): only the model itself is "
            "fetched, and the engine is offline"
        )
    for name in sorted((_CODE - {"trust_remote_code"}) & {*given, *made.environment}):
        made.doubts.append(f"whether what {name} runs can be trusted: it is code from outside the image")
    for name in ("chat_template", "reasoning_parser_plugin", "tool_parser_plugin"):
        if isinstance(given.get(name), str) and re.search(r"\.(jinja|py)$", str(given[name])):
            made.doubts.append(f"whether the image holds {printable(str(given[name]), 100)} ({name})")
    if given.get("task") == "reward":
        made.doubts.append("how to verify it: it answers no questions (task reward)")
    elif given.get("runner") == "pooling" and not {"task", "convert"} & {*given}:
        made.doubts.append(
            "what it is asked when it is verified (runner pooling): embeddings; a model that ranks needs "
            "`kinds: [rerank]` in verify"
        )


def fit_context(made: Settings, context: int) -> None:
    """Take out a length beyond the model's context: vLLM serves it only with a switch, and a card not at all."""
    length = made.arguments.get("max_model_len")
    if isinstance(length, int) and length > context and "hf_overrides" not in made.arguments:
        made.arguments["max_model_len"] = context
        made.leave(f"--max-model-len {length}", f"the model's context is {context} tokens, which is taken in its place")


def _shown(value: Any) -> str:
    try:
        return printable(value if isinstance(value, str) else repr(value), 80)
    except ValueError:  # a number of thousands of digits
        return "a number of thousands of digits"
