"""The roles keep their promises: every default is specified, every page is current."""

from __future__ import annotations

import grp
import importlib
import os
import pwd
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit import ROOT

ROLES = sorted(path.name for path in (ROOT / "roles").iterdir())


def entry_points(role: str) -> dict[str, Any]:
    text = (ROOT / "roles" / role / "meta" / "argument_specs.yml").read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text)["argument_specs"]
    return found


SETTINGS = entry_points("sparkfleet")["main"]["options"]


@pytest.mark.parametrize("role", ROLES)
def test_defaults_and_specs_name_the_same_variables(role: str) -> None:
    """Of settings of the inventory the role sparkfleet has the defaults."""
    file = ROOT / "roles" / role / "defaults" / "main.yml"
    defaults = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}
    options = {name: option for entry in entry_points(role).values() for name, option in entry["options"].items()}
    own = {name: option for name, option in options.items() if role == "sparkfleet" or name not in SETTINGS}
    assert set(defaults) == {name for name, option in own.items() if not option.get("required")}
    for name, option in own.items():
        if "default" in option:
            assert option["default"] == defaults[name], name


@pytest.mark.parametrize("role", [role for role in ROLES if role != "sparkfleet"])
def test_a_role_specifies_the_settings_that_it_reads_as_the_inventory_has_them(role: str) -> None:
    folder = ROOT / "roles" / role
    files = [file for part in ("tasks", "templates", "vars", "handlers") for file in (folder / part).glob("*")]
    words = {word for file in files for word in re.findall(r"\bsparkfleet_\w+", file.read_text(encoding="utf-8"))}
    specified = {name: option for name, option in entry_points(role)["main"]["options"].items() if name in SETTINGS}
    assert set(specified) == words & set(SETTINGS)
    assert specified == {name: SETTINGS[name] for name in specified}
    meta = yaml.safe_load((folder / "meta" / "main.yml").read_text(encoding="utf-8"))
    assert meta["dependencies"] == ([{"role": "sparkfleet.dgx.sparkfleet"}] if specified else [])


def test_generated_pages_are_current() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "docs", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def played(folder: Path, play: dict[str, Any], hosts: dict[str, dict[str, Any]], *words: str) -> str:
    """What ansible-playbook prints of a play over hosts that are this machine, each in its own case."""
    (folder / "play.yml").write_text(yaml.safe_dump([{"hosts": "all", "gather_facts": False, **play}]))
    local = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    (folder / "hosts.yml").write_text(yaml.safe_dump({"all": {"hosts": hosts, "vars": local}}))
    command = [Path(sys.executable).with_name("ansible-playbook"), "-i", folder / "hosts.yml", folder / "play.yml"]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
    done = subprocess.run([*command, *words], capture_output=True, text=True, env=environment, check=False)
    return done.stdout + done.stderr


def recap(printed: str, host: str) -> dict[str, int]:
    """The counts of a host at the end of a run."""
    (line,) = re.findall(rf"^{host} +: (.*)$", printed, re.M)
    return {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", line)}


#: Modes as they are written; unquoted octal digits are another number.
MODES = {"unquoted": ("2775", False), "quoted": ('"2775"', True), "words": ('"g+s"', False)}
MODES |= {"blank": ('"2775 "', False), "narrow": ('"0750"', True)}


def test_the_cache_has_no_mode_that_was_not_written(tmp_path: Path) -> None:
    me = {"owner": pwd.getpwuid(os.getuid()).pw_name, "group": grp.getgrgid(os.getgid()).gr_name}
    settings = {f"sparkfleet_cache_{name}": value for name, value in me.items()}
    hosts = {
        name: {"sparkfleet_cache_mode": yaml.safe_load(mode), "sparkfleet_cache_dir": f"{tmp_path}/{name}", **settings}
        for name, (mode, _) in MODES.items()
    }
    printed = played(tmp_path, {"roles": ["sparkfleet.dgx.hf_cache"]}, hosts)
    for name, (mode, taken) in MODES.items():
        assert (recap(printed, name)["failed"] == 0) == taken == (tmp_path / name).exists(), printed
        if taken:
            assert f"{(tmp_path / name).stat().st_mode & 0o7777:04o}" == yaml.safe_load(mode)
    refused = sum(not taken for _, taken in MODES.values())
    assert " ".join(printed.split()).count("sparkfleet_cache_mode: must be octal digits as text, not ") == refused


def test_a_secret_of_a_command_is_written_once_and_printed_never(tmp_path: Path) -> None:
    """Of several hosts, with all that Ansible prints; and one that cannot be got is said without it."""
    secret, log = "hf_a-secret-of-this-test", tmp_path / "log"
    me = {"owner": pwd.getpwuid(os.getuid()).pw_name, "group": grp.getgrgid(os.getgid()).gr_name}
    settings: dict[str, Any] = {f"sparkfleet_cache_{name}": value for name, value in me.items()}
    sources = {
        "one": {"command": ["sh", "-c", f"echo asked >>{log}; cat {tmp_path}/secret"]},
        "two": {"command": ["sh", "-c", f"echo asked >>{log}; cat {tmp_path}/secret"]},
        "three": {"file": f"{tmp_path}/secret"},
        "four": {"command": ["sh", "-c", f"cat {tmp_path}/secret; exit 3"]},
    }
    (tmp_path / "secret").write_text(f"{secret}\n")
    hosts = {
        name: {
            **settings,
            "sparkfleet_cache_dir": f"{tmp_path}/cache",
            "sparkfleet_hf_token": source,
            "sparkfleet_hf_token_file": f"{tmp_path}/etc/{name}",
        }
        for name, source in sources.items()
    }
    printed = played(tmp_path, {"roles": ["sparkfleet.dgx.hf_cache"]}, hosts, "-vvv")
    assert secret not in printed
    for name in ("one", "two", "three"):
        file = tmp_path / "etc" / name
        assert recap(printed, name)["failed"] == 0, printed
        assert file.read_text() == f"{secret}\n" and f"{file.stat().st_mode & 0o7777:04o}" == "0600"
    assert recap(printed, "four")["failed"] == 1 and not (tmp_path / "etc" / "four").exists()
    assert log.read_text() == "asked\n"


@pytest.mark.parametrize(
    ("tasks", "packages"),
    [
        ("docker/tasks/install.yml", ["docker.io", "docker-cli", "docker-compose"]),
        ("nvidia_container_toolkit/tasks/install.yml", ["nvidia-container-toolkit"]),
        ("memory/tasks/earlyoom.yml", ["earlyoom"]),
    ],
)
def test_check_mode_installs_what_is_not_there(
    tasks: str, packages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A role alone does not know what the inspection found."""
    file = ROOT / "roles" / tasks
    cut = yaml.safe_load(file.read_text(encoding="utf-8"))[:2]  # the inspection, and its result
    (tmp_path / "cut.yml").write_text(yaml.safe_dump(cut), encoding="utf-8")
    variables = {
        "sparkfleet_docker_source": "distribution",
        "docker_os": {"id": "debian"},
        "memory_earlyoom_installed": False,
    }
    cases: dict[str, tuple[list[str], int, list[str]]] = {
        "whole": (["installed"] * len(packages), 0, []),
        "part": (["installed"] * (len(packages) - 1) + ["config-files"], 0, packages[-1:]),
        "none": ([], 1, packages),
    }
    for name, (states, code, _) in cases.items():
        lines = "".join(f"echo {state} {package}\n" for state, package in zip(states, packages, strict=False))
        (tmp_path / f"{name}.sh").write_text(f"{lines}exit {code}\n", encoding="utf-8")
    query = tmp_path / "dpkg-query"
    query.write_text(f'#!/bin/sh\n. "{tmp_path}/$CASE.sh"\n', encoding="utf-8")
    query.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    play = {
        "vars": variables,
        "vars_files": [str(ROOT / "roles" / "docker" / "vars" / "main.yml")],
        "environment": {"CASE": "{{ inventory_hostname }}"},
        "tasks": [{"import_tasks": "cut.yml"}],
    }
    printed = played(tmp_path, play, {name: {} for name in cases}, "--check")
    for name, (_, _, missing) in cases.items():
        found = recap(printed, name)
        assert (found["failed"], found["changed"]) == (0, int(bool(missing))), printed
    wanted = [f"would install {', '.join(missing)}" for _, _, missing in cases.values() if missing]
    words = " ".join(printed.split())
    assert all(line in words for line in wanted) and words.count("would install ") == len(wanted), printed


def tasks(found: Any) -> Iterator[dict[str, Any]]:
    """Every task of a file of tasks or plays, those of blocks included."""
    for item in found if isinstance(found, list) else []:
        yield item
        for part in ("tasks", "pre_tasks", "post_tasks", "block", "rescue", "always", "handlers"):
            yield from tasks(item.get(part))


ACTIONS = [path.stem for path in sorted((ROOT / "plugins" / "action").glob("*.py"))]


@pytest.mark.parametrize("name", ACTIONS)
def test_roles_and_playbooks_give_actions_what_they_take(name: str) -> None:
    takes = importlib.import_module(f"plugins.action.{name}").ActionModule._VALID_ARGS
    files = [*ROOT.glob("roles/*/tasks/*.yml"), *ROOT.glob("playbooks/*.yml"), ROOT / "site.yml"]
    for file in files:
        for task in tasks(yaml.safe_load(file.read_text(encoding="utf-8"))):
            given = task.get(name)
            if takes and isinstance(given, dict):
                assert set(given) <= set(takes), f"{file}: {task.get('name')}"


#: A value that is a setting and nothing else, whatever its type is made.
PASSED_ON = re.compile(r"\{\{\s*sparkfleet_(\w+)\s*(\|\s*(bool|int|float|default\((?:[^()]|\([^()]*\))*\))\s*)*\}\}")


def mappings(found: Any, key: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping of a YAML document with the key that it stands under."""
    if isinstance(found, dict):
        yield key, found
    for name, item in found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ():
        yield from mappings(item, name if isinstance(name, str) else key)


def passed_on(document: Any) -> Iterator[tuple[str, str]]:
    """Setting and the name under which a role, a play or an action or module of ours gets it. The module secret_file
    knows no settings: as Ansible's copy it writes any content into any file."""
    for key, found in mappings(document):
        ours = key.startswith("sparkfleet.dgx.") and key != "sparkfleet.dgx.secret_file"
        if ours or key in ("vars", "roles"):
            for name, value in found.items():
                if setting := PASSED_ON.fullmatch(str(value).strip()):
                    yield setting[1], name


def renamed(setting: str, name: str, roles: tuple[str, ...] = tuple(ROLES)) -> bool:
    """Whether a name is neither the setting's nor, behind a role's prefix or none, its end."""
    own = [name, *(name.removeprefix(f"{role}_") for role in roles)]
    return not any(setting == word or setting.endswith(f"_{word}") for word in own)


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("vars: {vllm_wait_seconds: '{{ sparkfleet_start_timeout }}'}", True),
        ("vars: {vllm_wait_seconds: '{{ sparkfleet_start_timeout | default(1800) | int }}'}", True),
        ("sparkfleet.dgx.release_switch: {keep: '{{ sparkfleet_keep_releases }}'}", True),
        ("vars: {gateway_port: '{{ sparkfleet_gateway_port | default(8080) }}'}", False),
        ("sparkfleet.dgx.vllm_wait: {timeout: '{{ sparkfleet_start_timeout | int }}'}", False),
    ],
)
def test_a_setting_under_another_name_is_found(line: str, wrong: bool) -> None:
    ((setting, name),) = passed_on([{"name": "x", "block": [yaml.safe_load(line)]}])
    assert renamed(setting, name) is wrong


def test_a_setting_has_one_name_from_the_inventory_to_its_use() -> None:
    files = [*ROOT.glob("roles/*/tasks/*.yml"), *ROOT.glob("playbooks/**/*.yml"), ROOT / "site.yml"]
    found = [(*item, file) for file in files for item in passed_on(yaml.safe_load(file.read_text(encoding="utf-8")))]
    known = [item for item in found if f"sparkfleet_{item[0]}" in SETTINGS]
    names = {setting: {name for other, name, _ in known if other == setting} for setting, _, _ in known}
    print(f"{len(SETTINGS)} settings, {len(names)} of them passed on, {len(known)} times")
    assert len(known) > 20
    assert not [
        f"{file.relative_to(ROOT)}: {name}: sparkfleet_{setting}"
        for setting, name, file in known
        if renamed(setting, name)
    ]
    variables = [(setting, name) for setting, name, _ in known if any(name.startswith(f"{role}_") for role in ROLES)]
    assert len({setting for setting, _ in variables}) == len(variables), "a setting is given to one role, once"
