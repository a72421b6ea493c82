"""Recipes and command lines of others, as settings of a card: each setting taken or listed, no secret shown."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sparkfleet import SparkfleetError
from sparkfleet.onboarding import recipe
from sparkfleet.onboarding.recipe import Settings, read
from tests.unit import ROOT

FOLDER = ROOT / "tests" / "unit" / "data" / "recipes"
EXPECTED: dict[str, dict[str, Any]] = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))


def text(name: str) -> str:
    return (FOLDER / f"{name}.yml").read_text(encoding="utf-8")


def test_recipes_of_both_formats() -> None:
    versions = {str(yaml.safe_load(text(name)).get("recipe_version", "none")) for name in EXPECTED}
    assert versions == {"1", "2", "3", "none"} and len(EXPECTED) >= 18
    assert sum("refused" not in wanted for wanted in EXPECTED.values()) >= 16
    assert {path.stem for path in FOLDER.glob("*.yml")} == {*EXPECTED}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_recipe(name: str) -> None:
    wanted = EXPECTED[name]
    if "refused" in wanted:
        with pytest.raises(SparkfleetError, match="only") as error:
            read(text(name), f"{name}.yml")
        assert str(error.value) == f"{name}.yml: {wanted['refused']}"
        return
    made = read(text(name), f"{name}.yml")
    assert (made.model, made.revision, made.image) == (wanted["model"], wanted["revision"], wanted["image"])
    assert (made.tool_call_parser, made.sparks) == (wanted["tool_call_parser"], wanted["sparks"])
    assert made.arguments == wanted["arguments"]
    assert made.environment == wanted["environment"]
    assert [words.partition(": ")[0] for words in made.left] == wanted["left"]
    assert len(made.doubts) == wanted["doubts"]


@pytest.mark.parametrize("name", sorted(name for name, wanted in EXPECTED.items() if "refused" not in wanted))
def test_nothing_of_a_recipe_is_dropped_in_silence(name: str) -> None:
    """Each key and each default is in the card, listed, or one that says what a card says anyway."""
    data = yaml.safe_load(text(name))
    made = read(text(name), name)
    said = json.dumps([made.arguments, made.environment, made.left, made.tool_call_parser, made.image, made.model])
    for key, value in (data.get("defaults") or {}).items():
        usual = (key, value) == ("port", 8000) or key == "host" or (key.endswith("_parallel") and value == 1)
        flag = {"tensor_parallel": "tensor-parallel-size"}.get(key, key.replace("_", "-"))
        switch = key in ("enable_auto_tool_choice", "revision")
        assert usual or switch or flag in said or key in said or str(value) in said, key
    for key in data:
        assert key in said or key in (
            *("model", "container", "runtime", "defaults", "command", "env", "recipe_version", "name", "description"),
            *("metadata", "benchmark", "maintainer", "model_revision", "max_nodes", "min_nodes", "solo_only", "mods"),
            *("cluster_only",),
        )


def test_a_recipe_without_a_command_is_its_defaults() -> None:
    made = read(
        """
model: org/name
model_revision: v1
container: vllm/vllm-openai:v0.28.0
defaults: {port: 9000, tensor_parallel: 1, max_model_len: 64k, served_model_name: me, enable_prefix_caching: true}
foo: 1
""",
        "it",
    )
    assert (made.model, made.revision, made.image) == ("org/name", "v1", "vllm/vllm-openai:v0.28.0")
    assert made.arguments == {"max_model_len": 64000, "enable_prefix_caching": True}
    assert made.left == [
        "--port 9000: it is sparkfleet_port in the inventory",
        "--served-model-name me: clients ask for the model by its name on the Hub here",
        "foo: unknown key",
    ]


def test_braces_of_both_formats() -> None:
    doubled, plain = """'{{"a":{{"b":{n}}}}}'""", """'{"a":{"b":{n}}}'"""
    one, two = (
        read(yaml.safe_dump({"model": "o/m", "defaults": {"n": 3}, "command": f"vllm serve o/m --c {words}"}), "it")
        for words in (doubled, plain)
    )
    assert one.arguments == two.arguments == {"c": {"a": {"b": 3}}}


# -- command lines ---------------------------------------------------------------------------------------------------


def test_a_command_line_with_all_that_one_can_have() -> None:
    made = read(
        "HF_TOKEN=hf_canary VLLM_X=1 vllm serve --trust-remote-code org/name -tp 2 -pp=1 -dp 2 \\\n"
        "  --max-model-len 32K --kv-cache-memory-bytes 8G --gpu-memory-utilization=0.85 --swap-space -1 \\\n"
        '  --speculative-config \'{"method": "mtp", "num_speculative_tokens": 3}\' -cc.mode 3 \\\n'
        "  --no-enable-prefix-caching --enable-auto-tool-choice --tool-call-parser hermes \\\n"
        "  --api-key sk-canary --hf-token hf_canary --cudagraph-capture-sizes 1 2 4 --port $PORT # a comment\n",
        "it",
    )
    assert (made.model, made.tool_call_parser) == ("org/name", "hermes")
    assert made.environment == {"VLLM_X": "1"}
    assert made.sparks == 2
    assert made.arguments == {
        "trust_remote_code": True,
        "max_model_len": 32768,
        "kv_cache_memory_bytes": 8 << 30,
        "gpu_memory_utilization": 0.85,
        "swap_space": -1,
        "speculative_config": {"method": "mtp", "num_speculative_tokens": 3},
        "compilation_config": {"mode": 3},
        "tensor_parallel_size": 2,
        "no_enable_prefix_caching": True,
    }
    left = "\n".join(made.left)
    for words in ("--cudagraph-capture-sizes 1 2 4", "--data-parallel-size 2", "--port", "HF_TOKEN", "--api-key"):
        assert words in left
    assert "canary" not in json.dumps([made.left, made.arguments, made.environment, made.doubts])


@pytest.mark.parametrize(
    "line",
    [
        "docker run --rm --gpus all -e VLLM_X=1 -e HF_TOKEN=abc -v /a:/b vllm/vllm-openai:v0.28.0 --model o/m --seed 4",
        "docker run -it -e VLLM_X=1 nvcr.io/nvidia/vllm:25.09-py3 vllm serve o/m --seed 4",
        "VLLM_X=1 python3 -m vllm.entrypoints.openai.api_server --model o/m --seed 4",
        "VLLM_X=1 exec /usr/bin/vllm serve o/m --seed 4 && echo done",
    ],
)
def test_ways_to_start_it(line: str) -> None:
    made = read(line, "it")
    assert (made.model, made.arguments, made.environment) == ("o/m", {"seed": 4}, {"VLLM_X": "1"})
    assert made.image in ("", "vllm/vllm-openai:v0.28.0", "nvcr.io/nvidia/vllm:25.09-py3")
    assert ("docker" in line) == bool(made.image)


def test_what_was_taken_and_may_not_work_here_is_a_doubt() -> None:
    made = read(
        "vllm serve o/m --speculative-config.model o/draft --chat-template x.jinja --runner pooling "
        "--speculative-config.method dflash",
        "it",
    )
    assert made.arguments["speculative_config"] == {"model": "o/draft", "method": "dflash"}
    assert len(made.doubts) == 3 and "o/draft" in made.doubts[0]
    assert read("vllm serve o/m --runner pooling --convert embed", "it").doubts == []


def test_files_of_other_systems() -> None:
    made = read("\ufeffvllm serve o/m \\\r\n\t--seed 4\r\n", "it")
    assert (made.model, made.arguments) == ("o/m", {"seed": 4})


def test_a_length_beyond_the_context() -> None:
    made = read("vllm serve o/m --max-model-len 300000", "it")
    recipe.fit_context(made, 262144)
    assert made.arguments == {"max_model_len": 262144} and "300000" in made.left[0]


def test_the_longest_length_that_fits() -> None:
    for words in ("auto", "-1"):
        assert read(f"vllm serve o/m --max-model-len {words}", "it").arguments == {"max_model_len": "auto"}


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("", "neither a recipe"),
        ("hello", "neither a recipe"),
        ("sglang serve o/m", "neither a recipe"),
        ("vllm serve 'o/m", "cannot be read: No closing quotation"),
        ("model: o/m\nruntime: sglang", "runtime: sglang is not vLLM"),
        (
            "model: o/m\ncommand: llama-server -hf o/m",
            "there is no `vllm serve` in the command; only vLLM is served here",
        ),
        ("model: o/m\ndefaults: [1]", "defaults: must be a mapping, not [1]"),
        ("model: o/m\nenv: x", "env: must be a mapping, not x"),
        ("model: o/m\ncommand: {a: 1}", "command: must be a text"),
        ("a: &x [*x]", "refers to its own parent"),
        (f"model: &x '{'y' * 100_000}'\ndefaults: [{'*x,' * 9000}]", "more than 262144 characters, those of anchors"),
        (
            "\n".join(
                ["a: &a [x,x,x,x,x]", *(f"{b}: &{b} [{f'*{a},' * 9}]" for a, b in zip("abcdef", "bcdefg", strict=True))]
            ),
            "more than 20000 values, those of anchors",
        ),
        ("vllm serve o/m \\\n --reasoning-parser a\ufffe", "it:2: the control character U+FFFE: remove it"),
        ("vllm serve o/m --x '\U0010ffff'", "it:1: the control character U+10FFFF"),
        ("vllm serve o/m --x a\x1b[31m", "it:1: the control character U+001B"),
        ("model: o/m\nenv: {A: a\x85}", "it:2: the control character U+0085"),
        ("x" * 300_000, "more than 262144 characters"),
        ("vllm serve " + "-a " * 3000, "more than 2000 words"),
    ],
)
def test_what_is_neither(words: str, complaint: str) -> None:
    with pytest.raises(SparkfleetError) as error:
        read(words, "it")
    assert complaint in str(error.value) and str(error.value).startswith("it")


WORDS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            *(
                "vllm",
                "serve",
                "vllm serve",
                "--model",
                "o/m",
                "-tp",
                "-tp=2",
                "--",
                "-",
                "--a.b.c",
                "--a.b",
                "=",
                "--=",
            ),
            *(
                "&&",
                ";",
                "|",
                "'{\"a\": 1}'",
                "{model}",
                "{{",
                "}}",
                "docker run",
                "-e",
                "A=1",
                "\\\n",
                "$X",
                "-1",
                "1e999",
            ),
            *("vllm/vllm-openai:v1", "--max-model-len", "32k", "9" * 50, "--kv-cache-dtype", "'", '"', "#", "--x={"),
        ]
    ),
)


@given(st.lists(WORDS, max_size=12).map(" ".join))
def test_whatever_is_typed(words: str) -> None:
    for given_text in (
        words,
        f"vllm serve {words}",
        yaml.safe_dump({"model": "o/m", "command": f"vllm serve {words}"}),
    ):
        check(given_text)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from(["model", "container", "defaults", "command", "env", "runtime", "recipe_version", "mods", "x"])


@given(st.dictionaries(KEYS, VALUES | st.dictionaries(st.text(max_size=8), VALUES, max_size=3), max_size=6))
def test_whatever_a_recipe_holds(data: dict[str, Any]) -> None:
    check(yaml.safe_dump(data, allow_unicode=True))


def check(words: str) -> None:
    try:
        made = read(words, "it")
    except SparkfleetError as error:
        assert "\x1b" not in str(error)
    else:
        assert isinstance(made, Settings)
        json.dumps([made.arguments, made.environment], allow_nan=False)
        assert all("\n" not in line and "\x1b" not in line for line in made.left)


@pytest.mark.parametrize(
    "line",
    [
        "hf auth login --token CANARY && docker run -eHF_TOKEN=CANARY i/m vllm serve o/m --api-key CANARY CANARY",
        "curl -H CANARY; vllm serve o/m && curl -H 'Authorization: Bearer CANARY' x",
        "MY_TOKENS_API_KEY=CANARY DB_PASS=CANARY AUTH=CANARY HTTPS_PROXY=http://u:CANARY@h vllm serve o/m",
        "vllm serve o/m --api-key.x CANARY --port.x 9 --hf-token.y CANARY --trust-remote-code.x 1",
        "vllm serve o/m --s3-url https://u:CANARY@h/b CANARY",
    ],
)
def test_secrets_of_a_command_are_neither_taken_nor_shown(line: str) -> None:
    made = read(line, "it")
    assert "CANARY" not in json.dumps(dataclasses.asdict(made))
    assert not {"api_key", "port", "hf_token", "trust_remote_code"} & {*made.arguments}


def test_a_value_that_would_be_another_flag_is_not_taken() -> None:
    made = read(
        "model: o/m\ndefaults: {async_scheduling: '--port=9999', enable_log_requests: '--trust-remote-code'}", "it"
    )
    assert made.arguments == {} and len(made.left) == 2


def test_blank_lines_cost_nothing() -> None:
    began = time.monotonic()
    read("vllm serve o/m\n" + "\n" * 100_000, "it")
    assert time.monotonic() - began < 5
