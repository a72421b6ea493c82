"""The inventory's variables: names, types, ranges and forms, alone and through Ansible itself."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from sparkfleet_host import share

from sparkfleet import SparkfleetError
from sparkfleet.planning import target, variables
from tests.unit import ROOT


def test_each_number_has_a_range_and_its_default_is_in_it() -> None:
    numbers = {name for name, option in variables.options().items() if option["type"] in ("int", "float")}
    assert numbers == set(variables.RANGES)
    assert set(variables.FORMS) <= set(variables.options())


def test_the_defaults_are_what_they_may_be() -> None:
    known = {name: value for name, value in target.defaults().items() if name in variables.options()}
    plain = {name: value for name, value in known.items() if "{{" not in str(value)}
    assert variables.settle(plain) == plain


def test_settings_have_the_names_and_the_defaults_of_the_inventory() -> None:
    settings, own = (
        target.Settings.of({}),
        {
            "arguments",
            "ca",
            "gateways",
            "gateways_elsewhere",
            "host_program",
            "engines",
            "trial",
            "trial_loads",
            "sparks",
            "monitors",
            "ssh_port",
            "spans",
        },
    )
    names = {field.name for field in dataclasses.fields(settings)} - own
    assert names <= {name.removeprefix("sparkfleet_") for name in variables.options()}
    for name in names:
        option = variables.options()[f"sparkfleet_{name}"]
        assert "default" not in option or getattr(settings, name) == option["default"], name


def test_settings_of_variables_as_they_are_written() -> None:
    values = {
        **{"sparkfleet_start_timeout": "900", "sparkfleet_guard": "no", "sparkfleet_vllm_max_num_seqs": "7"},
        **{"sparkfleet_hf_token": " hf_secret\n", "sparkfleet_engine_key": "key-of-the-engine"},
        "sparkfleet_fetch_timeout": 60,  # of others than the plan
    }
    settings = target.Settings.of(variables.settle(values), address="192.0.2.1")
    assert (settings.start_timeout, settings.guard, settings.address) == (900, False, "192.0.2.1")
    assert settings.arguments == {"max_num_seqs": 7} and settings.hf_token == "hf_secret" and settings.api_key_enabled
    assert "secret" not in repr(settings) and "key-of-the-engine" not in repr(settings)


ENGINES = [
    {"model": "llama31-8b-fp8", "arguments": {"gpu_memory_utilization": "0.3"}},
    {"model": "qwen3-8b-fp8", "profile": "latency", "port": "8100", "tool_calls": False, "environment": {"A": "2"}},
    {"model": "gpt-oss-20b"},
]


def test_several_engines_of_an_inventory() -> None:
    values = {
        "sparkfleet_engines": ENGINES,
        "sparkfleet_port": 8001,
        "sparkfleet_environment": {"A": "1", "B": "1"},
        "sparkfleet_vllm_max_num_seqs": 4,
        "sparkfleet_vllm_gpu_memory_utilization": 0.2,
    }
    first, second, third = target.Settings.of(variables.settle(values)).each()
    assert [engine.port for engine in (first, second, third)] == [8001, 8100, 8101]
    assert first.arguments == {"max_num_seqs": 4, "gpu_memory_utilization": 0.3}
    assert second.arguments == third.arguments == {"max_num_seqs": 4, "gpu_memory_utilization": 0.2}
    assert (first.tool_calls, second.tool_calls, second.profile, third.profile) == (
        True,
        False,
        "latency",
        "throughput",
    )
    assert (first.environment, second.environment) == ({"A": "1", "B": "1"}, {"A": "2", "B": "1"})
    assert len(target.Settings.of(variables.settle({"sparkfleet_engines": []})).each()) == 1


def test_an_engine_on_demand_has_a_port_on_loopback() -> None:
    entries = [
        {"model": "m"},
        {"model": "n", "on_demand": "yes"},
        {"model": "o", "on_demand": True, "loopback_port": 99},
    ]
    _, second, third = target.Settings.of(variables.settle({"sparkfleet_engines": entries})).each()
    assert (second.port, second.loopback_port, second.on_demand) == (8001, 18001, True)
    assert (third.port, third.loopback_port) == (8002, 99)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (
            {"sparkfleet_engines": [{"model": "m", "loopback_port": 1}]},
            r"\[0\].loopback_port: is only for an engine with on_demand",
        ),
        (
            {"sparkfleet_engines": [{"model": "m", "port": 60000, "on_demand": True}]},
            r"\[0\].loopback_port: 70000 is none; give it one",
        ),
        (
            {"sparkfleet_engines": [{"model": "m", "on_demand": True}, {"model": "n", "port": 18000}]},
            r"\[1\].port: 18000 is sparkfleet_engines\[0\].loopback_port already",
        ),
        ({"sparkfleet_engines": [{"model": "m", "on_demand": "perhaps"}]}, r"\[0\].on_demand: must be true or false"),
        ({"sparkfleet_engines": ["m"]}, r"sparkfleet_engines\[0\]: must be a mapping with model, not 'm'"),
        ({"sparkfleet_engines": [{"port": 1}]}, r"sparkfleet_engines\[0\]: has no model"),
        ({"sparkfleet_engines": [{"model": "m", "prot": 1}]}, r"\[0\]: unknown key 'prot'; did you mean port\?"),
        ({"sparkfleet_engines": [{"model": "m", "port": 0}]}, r"sparkfleet_engines\[0\].port: must be .* 1 to 65535"),
        (
            {"sparkfleet_engines": [{"model": "m", "port": 65535}, {"model": "n"}]},
            r"\[1\].port: none is left after 65535",
        ),
        ({"sparkfleet_engines": [{"model": "m", "image": "a b"}]}, r"sparkfleet_engines\[0\].image: must be"),
        ({"sparkfleet_engines": [{"model": "m"}] * 99}, r"sparkfleet_engines: 99 entries, at most"),
        (
            {"sparkfleet_engines": [{"model": "m", "arguments": {"port": 1}}]},
            r"\[0\].arguments.port: Sparkfleet sets this",
        ),
        ({"sparkfleet_engines": [{"model": "m", "environment": {"A B": "1"}}]}, r"\[0\].environment"),
        (
            {"sparkfleet_engines": [{"model": "m", "port": 8100}, {"model": "n", "port": 8100}]},
            r"sparkfleet_engines\[1\].port: 8100 is sparkfleet_engines\[0\].port already",
        ),
        ({"sparkfleet_engines": [{"model": "m", "port": 9109}]}, r"sparkfleet_guard_port: 9109 is sparkfleet_engines"),
        (
            {"sparkfleet_engines": [{"model": "m"}], "sparkfleet_model": "qwen3-8b-fp8"},
            "sparkfleet_model: does not go with sparkfleet_engines",
        ),
        (
            {"sparkfleet_engines": [{"model": "m"}], "sparkfleet_image": "vllm/vllm-openai:v0.17.1"},
            "sparkfleet_image: does not go with sparkfleet_engines",
        ),
    ],
)
def test_a_list_of_engines_that_is_refused(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(SparkfleetError, match=problem):
        variables.settle(values)


def _defined(data: Any) -> set[str]:
    """Names that a playbook or a list of tasks sets: vars, register, set_fact."""
    if isinstance(data, list):
        return set().union(*map(_defined, data))
    if not isinstance(data, dict):
        return set()
    found = {str(data["register"])} if "register" in data else set()
    for key in ("vars", "ansible.builtin.set_fact"):
        found |= set(data[key]) if isinstance(data.get(key), dict) else set()
    return found.union(*map(_defined, data.values()))


def test_what_the_playbooks_define_is_known() -> None:
    """A name that is missing here would be refused in every run."""
    files = [*(ROOT / "playbooks").rglob("*.yml"), *(ROOT / "roles").glob("*/tasks/*.yml"), ROOT / "site.yml"]
    names = set().union(*(_defined(yaml.safe_load(file.read_text(encoding="utf-8"))) for file in files))
    assert variables.unknown(names) == []
    assert "sparkfleet_inspection" in names


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("sparkfleet_max_num_seqs", "sparkfleet_vllm_max_num_seqs"),
        ("sparkfleet_gpu_memory_utilisation", "sparkfleet_vllm_gpu_memory_utilization"),
        ("sparkfleet_modell", "sparkfleet_model"),
        ("sparkfleet_gateway_prot", "sparkfleet_gateway_port"),
    ],
)
def test_an_unknown_name_gets_the_nearest(name: str, near: str) -> None:
    (problem,) = variables.unknown([name, near, "sparkfleet_vllm_anything", "my_own"])
    assert problem.startswith(f"{name}: unknown variable; did you mean {near}?")


@pytest.mark.parametrize(("name", "limits"), variables.RANGES.items())
def test_the_ends_of_a_range(name: str, limits: tuple[float, float]) -> None:
    least, most = limits
    apart = {"sparkfleet_port": 2, "sparkfleet_guard_port": 0, "sparkfleet_share_port": 3}
    for value in limits:
        assert variables.settle({**apart, name: value})[name] == value
        assert variables.settle({**apart, name: str(value)})[name] == value
    for value in (least - 1, most + 1, str(most + 1), "x", "", None, True, [1], float("nan"), float("inf"), 10**5000):
        with pytest.raises(SparkfleetError) as raised:
            variables.settle({name: value})
        assert re.match(rf"{name}: must be a (whole )?number from {least:g} to ", str(raised.value))


@pytest.mark.parametrize(
    ("value", "truth"), [(True, True), ("yes", True), (" No ", False), (0, False), (1, True), ("off", False)]
)
def test_truth(value: Any, truth: bool) -> None:
    assert variables.settle({"sparkfleet_guard": value}) == {"sparkfleet_guard": truth}


@pytest.mark.parametrize("value", [2, 1.0, None, "", "perhaps", [True], pytest.param(10**5000, id="digits")])
def test_no_truth(value: Any) -> None:
    with pytest.raises(SparkfleetError, match="sparkfleet_guard: must be true or false"):
        variables.settle({"sparkfleet_guard": value})


TEXTS = sorted(name for name, option in variables.options().items() if option["type"] in ("str", "path"))


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("value", [2775, 25.1])
def test_a_number_where_text_is_meant(name: str, value: float) -> None:
    with pytest.raises(SparkfleetError) as raised:
        variables.settle({name: value})
    shown = "" if variables.options()[name].get("no_log") else f" {value}"
    assert str(raised.value) == f"{name}: must be text, not the number{shown}: write the value in quotes"


def test_every_problem_is_named_and_no_secret() -> None:
    with pytest.raises(SparkfleetError) as raised:
        variables.settle(
            {"sparkfleet_port": 0, "sparkfleet_swap": "off", "sparkfleet_hf_token": "geheim \x1b[2J", "sparkfleet_x": 1}
        )
    lines = str(raised.value).splitlines()
    assert len(lines) == 4 and "geheim" not in str(raised.value)
    assert "sparkfleet_swap: must be one of keep, disabled, not 'off'" in lines


def play(folder: Path, *words: str, group: str = "", host: str = "") -> str:
    """What ansible-playbook says of an inventory of one Spark that cannot be reached."""
    (folder / "group_vars").mkdir()
    (folder / "host_vars").mkdir()
    (folder / "hosts.yml").write_text("sparks: {hosts: {spark-1: {ansible_host: 192.0.2.1}}}\n", encoding="utf-8")
    (folder / "group_vars" / "sparks.yml").write_text(group, encoding="utf-8")
    (folder / "host_vars" / "spark-1.yml").write_text(host, encoding="utf-8")
    command = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", str(folder), "site.yml", *words]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == 2 and "unreachable" not in said.lower().replace("unreachable=0", "")
    return said


def test_each_port_has_one_use() -> None:
    """Also by default: what runs on a Spark must not be in the way of a run that shares image and model."""
    defaults = [option["default"] for name, option in variables.options().items() if name.endswith("_port")]
    ports = [*defaults, share.REGISTRY_PORT, share.HUB_PORT]
    assert len({*ports}) == len(ports)
    for port in (share.REGISTRY_PORT, share.HUB_PORT):
        with pytest.raises(SparkfleetError, match=f"sparkfleet_prometheus_port: {port} is the port for"):
            variables.settle({"sparkfleet_prometheus_port": port})
        with pytest.raises(SparkfleetError, match=rf"sparkfleet_engines\[0\].port: {port} is the port for"):
            variables.settle({"sparkfleet_engines": [{"model": "llama31-8b-fp8", "port": port}]})


def test_ansible_refuses_names_and_values_before_it_contacts_anybody(tmp_path: Path) -> None:
    said = play(
        tmp_path,
        *("-e", '{"sparkfleet_max_num_seqs": 8}'),
        group="sparkfleet_gpu_memory_utilisation: 0.5\nmy_own: 1\n",
        host="sparkfleet_cache_mode: 2775\nsparkfleet_keep_release: 3\nsparkfleet_guard_wedge_seconds: 0\n"
        "sparkfleet_share_port: 8000\n",
    )
    assert "spark-1: sparkfleet_gpu_memory_utilisation: unknown variable" in said
    assert "did you mean sparkfleet_vllm_gpu_memory_utilization?" in said
    assert "did you mean sparkfleet_vllm_max_num_seqs?" in said
    assert "did you mean sparkfleet_keep_releases?" in said
    assert "sparkfleet_guard_wedge_seconds: must be a number from 1 to 86400, not 0" in said
    assert "sparkfleet_cache_mode: must be text, not the number 2775: write the value in quotes" in said
    assert "sparkfleet_share_port: 8000 is sparkfleet_port already" in said


@pytest.mark.parametrize("place", ["cards", "{{ inventory_dir }}/cards"])
def test_where_a_card_was_looked_for(tmp_path: Path, place: str) -> None:
    said = play(tmp_path, host=f"sparkfleet_model: '{place}/mine.yml'\n")
    folder = ROOT if place == "cards" else tmp_path
    assert f"model card {folder}/cards/mine.yml does not exist" in said
    assert ("sparkfleet_model: '{{ inventory_dir }}/cards/mine.yml'" in said) is (place == "cards")
    assert "llama31-8b-fp8" not in said  # one line, not the whole catalogue


def test_an_inventory_without_the_group(tmp_path: Path) -> None:
    """Of a group of another name it may be the parent."""
    (tmp_path / "group_vars").mkdir()
    (tmp_path / "group_vars" / "gpu.yml").write_text("sparkfleet_port: 0\n", encoding="utf-8")
    (tmp_path / "hosts.yml").write_text("gpu: {hosts: {spark-1: {ansible_host: 192.0.2.1}}}\n", encoding="utf-8")
    command = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", str(tmp_path), "site.yml"]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
    for children, words in (
        ("", "make your group a child of sparks"),
        ("sparks: {children: {gpu: }}\n", "_port: must be"),
    ):
        (tmp_path / "sparks.yml").write_text(children or "{}\n", encoding="utf-8")
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and words in " ".join((done.stdout + done.stderr).split())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "",
            '{"sparkfleet_image": 25}',
            "sparkfleet_image: must be text, not the number 25: write the value in quotes",
        ),
        ("sparkfleet_port", "0", "sparkfleet_port: must be a whole number from 1 to 65535, not '0'"),
        ("sparkfleet_port", "80; touch /tmp/x", "sparkfleet_port"),  # Ansible's own check of types
        ("sparkfleet_image", "x y", "sparkfleet_image: must be the reference of an image"),
        ("sparkfleet_bundle", "~nobody-is-called-so/x", "sparkfleet_bundle '~nobody-is-called-so/x': there is no home"),
    ],
)
def test_bad_input_of_a_verb_is_exit_code_2(tmp_path: Path, name: str, value: str, message: str) -> None:
    (tmp_path / "hosts.yml").write_text("sparks: {hosts: {spark-1: {ansible_host: 192.0.2.1}}}\n", encoding="utf-8")
    command = [
        str(Path(sys.executable).with_name("sparkfleet")),
        "deploy",
        "-i",
        str(tmp_path),
        "-e",
        f"{name}='{value}'" if name else value,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in " ".join(done.stdout.split()) + done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"https://registry.example": "/k"}, "'https://registry.example' is not REGISTRY or REGISTRY/PATH"),
        ({"registry.example/our/*": "/k"}, "is not REGISTRY or REGISTRY/PATH"),
        ({"registry.example/our/x:1": "/k"}, "is not REGISTRY or REGISTRY/PATH"),
        ({5: "/k"}, "the key '5' is not a text"),
        ({"registry.example": None}, "registry.example: must be the path of a public key, not None"),
        ({"registry.example": " "}, "must be the path of a public key"),
        ("registry.example", "must be a mapping"),
    ],
)
def test_a_publisher_that_no_image_can_have_is_refused(keys: Any, problem: str) -> None:
    with pytest.raises(SparkfleetError, match=f"sparkfleet_image_keys: .*{re.escape(problem)}"):
        variables.settle({"sparkfleet_image_keys": keys})
    good = {"nvcr.io": "/k", "registry.example:5000/our/x-y.z/": "~/k", "Registry.Example": "k"}
    assert variables.settle({"sparkfleet_image_keys": good}) == {"sparkfleet_image_keys": good}


@pytest.mark.parametrize("digest", ["sha256:", " ", "sha256: ", "sha256:" + "0" * 63, "md5:" + "0" * 64])
def test_a_digest_of_a_bundle_that_is_none_is_refused(digest: str) -> None:
    with pytest.raises(SparkfleetError, match="sparkfleet_bundle_digest: must be sha256: and 64 hex digits"):
        variables.settle({"sparkfleet_bundle_digest": digest})
    for good in ("", "a" * 64, "sha256:" + "B" * 64):
        assert variables.settle({"sparkfleet_bundle_digest": good}) == {"sparkfleet_bundle_digest": good}
