"""Generated cards, inventories, flags, `--set` and log lines: an answer or one message and exit code 2, never anything
else. `SPARKFLEET_HYPOTHESIS=long` tries a hundred times as many."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkfleet import SparkfleetError
from sparkfleet.cli import main
from sparkfleet.diagnosis import (
    startup,
    startup_log,
)
from sparkfleet.documents import yaml_text
from sparkfleet.fleet import (
    drift,
    dry_run,
)
from sparkfleet.planning import (
    catalog,
    compose,
    preflight,
    variables,
    vllm_versions,
)
from sparkfleet.planning.memory_plan import requested_gib
from tests.unit import ROOT

#: What people, editors and attackers write in place of a value.
NASTY = [
    *(
        "",
        " ",
        "~",
        "null",
        "{",
        "[",
        "}",
        "a={",
        "{{ 1 }}",
        "{% x %}",
        "!!python/object/apply:os.system [id]",
        "&a [*a]",
    ),
    *(
        "2020-99-99",
        "2020-01-01",
        "!!int x",
        "!!float y",
        "!!binary x",
        "!!timestamp 0",
        "0b_",
        "0x_",
        "1_0",
        "1:99",
        "9" * 5000,
    ),
    *(
        ".inf",
        "-.inf",
        ".nan",
        "1e400",
        "1.0e+400",
        "-1",
        "0",
        "1e-300",
        "1.5",
        "true",
        "no",
        "{1: 2}",
        "{a: {b: [1, x]}}",
    ),
    *(
        "[" * 3000,
        "{a: " * 500,
        "a\nb",
        "a\n",
        "\x00",
        "\x1b[2J",
        "\u202e",
        "\ud800",
        "\\",
        "'",
        '"',
        "'x",
        "$HOME",
        "${X:?}",
    ),
    *(
        "../..",
        "/etc/passwd",
        "~nosuchuser/x.yml",
        "x.yml",
        "a" * 5000,
        "a" * 300 + ".yml",
        "-rf",
        "--help",
        "; touch /tmp/x",
    ),
    *(
        "&a [x, x]\nb: [*a]",
        "<<: *a",
        "<<: 1",
        "? [1]\n: 2",
        "*a",
        "%YAML 9.9\n---\n1",
        "--- 1\n--- 2",
        '"\\UFFFFFFFF"',
        "@x",
    ),
    "\n".join(
        ["a0: &a0 [x,x,x,x,x,x,x,x,x,x]", *(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9))]
    ),
]
words = st.one_of(st.sampled_from(NASTY), st.text(max_size=30), st.integers().map(str), st.floats().map(str))
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    words,
    st.dates(),
    st.binary(max_size=4),
    st.builds(lambda: 10**5000),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(words, st.integers(), st.booleans()), inner, max_size=3)
    ),
    max_leaves=6,
)
names = st.one_of(
    st.sampled_from(sorted(catalog.schema()["$defs"]["arguments"]["properties"])),
    st.sampled_from(["hf_overrides", "port", "tool_call_parser", "max-model-len", "x", "A", "a.b", "1", ""]),
    st.text(max_size=12),
)
models = st.one_of(st.sampled_from([*catalog.names(), "llama31", "..", "./x"]), words)
flags = st.lists(
    st.one_of(
        st.tuples(names, words).map(lambda pair: ["--set", "=".join(pair)]),
        words.map(lambda word: ["--set", word]),
        st.tuples(
            st.sampled_from(["--total-gib", "--available-gib", "--reserve-gib", "--engine", "--profile"]), words
        ).map(list),
        st.sampled_from([["--json"], ["--source", "hub"], ["--source", "x"], ["--profile", "low_latency"]]),
    ),
    max_size=4,
)
CARD = yaml.safe_load((catalog.catalogue_folder() / "gpt-oss-120b.yml").read_text(encoding="utf-8"))


def places(data: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield from places(value, (*at, key))


def run(argv: list[str]) -> tuple[int, str, str]:
    """The command in this process: exit code and what it printed. Any exception but SystemExit is a failure."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main.main(argv)
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), err.getvalue()


def proper(argv: list[str], *, quiet: bool = True) -> int:
    """Run a command of which nothing but 0, 2 or 3 may come, and with 2 one message. Not `quiet`: Ansible warns."""
    code, out, err = run(argv)
    assert code in (0, 2, 3), (code, err)
    assert "Traceback" not in err and (code != 2 or "sparkfleet" in err), (code, err)
    assert not set(out + (err if quiet else "")) & {"\x1b", "\x00"}
    if code != 2 and "--json" in argv and "-h" not in "".join(argv):
        json.loads(out, parse_constant=lambda text: pytest.fail(f"{text} in JSON"))
    return code


@given(models, flags, st.sampled_from(["plan", "compose"]))
def test_flags(model: str, options: list[list[str]], verb: str) -> None:
    proper(
        [verb, f"{model}" if not model.startswith("-") else f"./{model}", *(word for pair in options for word in pair)]
    )


@given(st.data())
def test_cards(data: st.DataObject) -> None:
    """A card with some of its values replaced, keys added, or cut anywhere."""
    card = json.loads(json.dumps(CARD))
    for _ in range(data.draw(st.integers(1, 3))):
        *way, last = data.draw(st.sampled_from([place for place in places(card) if place]))
        inner = card
        try:
            for step in way:
                inner = inner[step]
            inner[last] = data.draw(values)
            if isinstance(inner, dict) and data.draw(st.booleans()):
                inner[data.draw(st.one_of(words, st.integers(), st.dates()))] = data.draw(values)
        except (TypeError, KeyError, IndexError):
            continue
    try:
        text = yaml.dump(card, sort_keys=False, allow_unicode=True)
    except (ValueError, UnicodeError):
        text = str(data.draw(words))
    text = data.draw(st.sampled_from([text, text[: len(text) // 2], text + str(data.draw(words))]))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "card.yml")
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        proper([data.draw(st.sampled_from(["plan", "compose"])), str(file)])


@given(st.one_of(words, st.binary(max_size=200).map(lambda raw: raw.decode("latin-1"))))
def test_yaml_is_data_of_json_or_an_error(text: str) -> None:
    try:
        data = yaml_text.load(text)
    except yaml_text.YamlError as error:
        assert str(error)
        return
    assert json.loads(json.dumps(data, allow_nan=False)) == data


variable_names = st.one_of(
    st.sampled_from(sorted(variables.options())),
    names.map(lambda name: variables.ARGUMENT_PREFIX + name),
    words.map(lambda name: variables.PREFIX + name),
)


@given(st.dictionaries(st.sampled_from(["s1", "s2"]), st.dictionaries(variable_names, values, max_size=4), min_size=1))
def test_variables(hosts: dict[str, dict[str, Any]]) -> None:
    """What a rollout on paper calls fit is what Compose and a plan take."""
    try:
        paper = dry_run.make(hosts)
    except SparkfleetError as error:
        assert str(error)
        return
    json.dumps(paper.as_dict(), allow_nan=False)
    assert dry_run.page(paper)


@settings(max_examples=max(settings().max_examples // 8, 5))  # Ansible's own reading is slow
@given(st.one_of(st.lists(st.one_of(words, st.sampled_from(["{", ": ", "- ", "\n"])), max_size=8).map(" ".join), words))
def test_inventories_and_extra_variables(text: str) -> None:
    os.environ.setdefault("ANSIBLE_CONFIG", str(ROOT / "ansible.cfg"))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "hosts.yml").write_text("sparks: {hosts: {spark-1: {}}}\n", encoding="utf-8")
        proper(["rollout", "--dry", "-i", folder, "-e", text], quiet=False)
        Path(folder, "group_vars").mkdir()
        Path(folder, "group_vars", "sparks.yml").write_bytes(text.encode("utf-8", "surrogatepass"))
        proper(["rollout", "--dry", "-i", folder], quiet=False)
        Path(folder, "hosts.yml").write_bytes(text.encode("utf-8", "surrogatepass"))
        proper(["rollout", "--dry", "-i", folder], quiet=False)


@pytest.mark.parametrize("text", NASTY)
def test_each_awkward_word_as_a_value_of_the_command_line(text: str) -> None:
    for argv in (
        ["plan", "llama31-8b-fp8", "--set", f"hf_overrides={text}"],
        ["compose", "llama31-8b-fp8", "--set", f"max_num_seqs={text}"],
        ["plan", f"./{text}"],
        *(
            ["plan", "llama31-8b-fp8", f"--{flag}={text}"]
            for flag in ("total-gib", "available-gib", "engine", "profile")
        ),
    ):
        proper(argv)


#: Pieces of vLLM's log.
LOG = st.lists(
    st.one_of(
        st.sampled_from(
            [
                *(
                    "Available KV cache memory: ",
                    "GPU KV cache size: ",
                    " tokens",
                    " GiB",
                    "1.2.3",
                    ",",
                    "1" * 400,
                    ".",
                ),
                *(
                    "Maximum concurrency for ",
                    " tokens per request: ",
                    "x",
                    "Model loading took ",
                    "\r",
                    "\x1b[0m",
                    "²",
                ),
                *("Capturing CUDA graphs (decode): ", "12/34", "Loading weights took ", " seconds", "٣"),
                *(
                    "2025-13-45T25:61:61.1Z ",
                    "0001-01-01T00:00:00+23:59 ",
                    "9999-12-31T23:59:59.999999999Z ",
                    "INFO 09-29",
                ),
            ]
        ),
        st.text(max_size=10),
        st.integers().map(str),
        st.floats().map(str),
    ),
    max_size=8,
).map("".join)


@given(st.lists(LOG, max_size=6))
def test_log_lines(lines: list[str]) -> None:
    tracker = startup_log.Tracker(0.0)
    for step in tracker.feed(lines, 1.0):
        assert str(step)
    json.dumps([tracker.phases(2.0), tracker.kv, tracker.weights_gib], allow_nan=False)
    watch = startup.Watch("s1", 1.0)
    answer = {"now": 5.0, "log_lines": lines, "restart_count": 0, "started_at": "".join(lines[:1]), "cursor": ""}
    watch.take({**answer, "ready": False, "state": "running"})


@pytest.mark.parametrize("line", ["Available KV cache memory: 1.2.3 GiB", "GPU KV cache size: , tokens"])
def test_figures_that_are_none_leave_the_phase(line: str) -> None:
    (step,) = startup_log.Tracker(0.0).feed([line], 1.0)
    assert str(step) == "profiling memory"


@given(
    st.one_of(
        words,
        st.sampled_from(["v", "vllm/vllm-openai:v", "nvcr.io/nvidia/vllm:"]).flatmap(
            lambda head: words.map(lambda tail: head + tail)
        ),
    )
)
def test_versions_of_images_and_programs(text: str) -> None:
    assert vllm_versions.of_image(text).text and isinstance(vllm_versions.unfit(text), str)
    assert preflight.version(text)
    with contextlib.suppress(SparkfleetError):
        assert vllm_versions.parse_version(text)
    held = requested_gib(["vllm", "--gpu-memory-utilization", text, "--kv-cache-memory-bytes", text], 100)
    assert 0 <= held <= 103


@given(values)
def test_a_deployed_file_of_any_form_is_compared(data: Any) -> None:
    wanted = compose.document(catalog.load("llama31-8b-fp8"), {})
    for deployed in (
        data,
        {"services": data},
        {"services": {"x": data}},
        {"services": {"x": {"command": data, "environment": data}}},
    ):
        if isinstance(deployed, dict):
            with contextlib.suppress(ValueError):  # digits of a number that no file gives
                assert drift.differences(deployed, wanted)
