"""The tables that scripts/docs makes, and the examples of docs/roles.md."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator

from tests.unit import ROOT

SCRIPT = ROOT / "scripts" / "docs"


@pytest.fixture(scope="module")
def docs() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("docs_script", str(SCRIPT))
    spec = importlib.util.spec_from_loader("docs_script", loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def cells(row: str) -> list[str]:
    """Cells of a row as Markdown has them: a `|` behind a backslash is a character."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]


def test_a_row_keeps_its_cells_and_a_list_all_its_items(docs: ModuleType) -> None:
    options = {
        "a": {"type": "list", "elements": "str", "description": "One|two."},
        "b": {"type": "str", "description": ["x", "y"], "choices": ["p", "q"]},
        "sparkfleet_port": {"type": "int", "description": "Port."},
    }
    defaults = {"a": ["one", "two", "three"], "b": "^(x|y)$", "sparkfleet_port": 8000}
    rows = [cells(row) for row in docs.table(options, defaults).splitlines()[2:]]
    assert rows[0] == ["`a`", "list of str", "`[one, two, three]`", r"One\|two."]
    assert rows[1] == ["`b`", "str", r"`^(x\|y)$`", "x y One of `p`, `q`."]
    assert rows[2] == ["`sparkfleet_port`", "int", "`8000`", "Port. From 1 to 65535."]


def test_keys_of_a_mapping_and_of_items_have_their_rows(docs: ModuleType) -> None:
    nested = {
        "word": {"type": "str", "required": True, "description": "Word."},
        "most": {"type": "int", "default": 32, "description": "Most."},
    }
    options = {
        "a": {"type": "dict", "required": True, "description": "A.", "options": nested},
        "b": {"type": "list", "elements": "dict", "description": "B.", "options": {"c": {**nested["word"]}}},
    }
    rows = [cells(row) for row in docs.table(options, {"b": []}).splitlines()[2:]]
    assert [row[0] for row in rows] == ["`a`", "`a.word`", "`a.most`", "`b`", "`b[].c`"]
    assert rows[1] == ["`a.word`", "str", "**required**", "Word."]
    assert rows[2] == ["`a.most`", "int", "`32`", "Most."]


def test_every_row_of_every_role_has_four_cells(docs: ModuleType) -> None:
    for folder in sorted((docs.ROOT / "roles").iterdir()):
        for row in re.findall(r"^\|.*$", docs.readme(folder), re.MULTILINE):
            assert len(cells(row)) == 4, row


ROLES_PAGE = (ROOT / "docs" / "roles.md").read_text(encoding="utf-8")
EXAMPLES = [
    text
    for text in re.findall(r"^```yaml\n(.*?)^```$", ROLES_PAGE, re.MULTILINE | re.DOTALL)
    if not text.startswith("collections:")
]
PLAYS = [text for text in EXAMPLES if text.startswith("- name:")]
(CONFIGURATION,) = re.findall(r"^```ini\n(.*?)^```$", ROLES_PAGE, re.MULTILINE | re.DOTALL)


def used(play: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The roles of a play with the variables that they are given, other than the play's."""
    found = {
        role["role"]: {key: value for key, value in role.items() if key != "role"} for role in play.get("roles", ())
    }
    imported = [task for task in play.get("tasks", ()) if "ansible.builtin.import_role" in task]
    return found | {task["ansible.builtin.import_role"]["name"]: task["vars"] for task in imported}


def test_each_example_names_variables_of_its_role_and_all_that_are_required(docs: ModuleType) -> None:
    roles = [item for text in PLAYS for play in yaml.safe_load(text) for item in used(play).items()]
    assert {name.removeprefix("sparkfleet.dgx.") for name, _ in roles} == {
        *("docker", "hf_cache", "memory", "nvidia_container_toolkit", "fetch", "gateway", "endpoint")
    }
    for play in (play for text in PLAYS for play in yaml.safe_load(text)):
        folders = [ROOT / "roles" / name.removeprefix("sparkfleet.dgx.") for name in used(play)]
        taken = {name for folder in folders for name in docs.role(folder)[0]["main"]["options"]}
        assert set(play.get("vars", {})) <= taken, play["name"]
    for name, given in roles:
        folder = name.removeprefix("sparkfleet.dgx.")
        spec = yaml.safe_load((ROOT / "roles" / folder / "meta" / "argument_specs.yml").read_text(encoding="utf-8"))
        options = spec["argument_specs"]["main"]["options"]
        assert set(given) <= set(options), name
        for key, option in options.items():
            assert key in given or not option.get("required"), key
            templated = "{{" in str(given.get(key))
            if key in given and not templated:
                assert not ArgumentSpecValidator({key: option}).validate({key: given[key]}).error_messages, key


def test_the_examples_are_playbooks(tmp_path: Path) -> None:
    """In a project of its own with the collection in it."""
    (tmp_path / "collections").symlink_to(ROOT / "collections")
    (tmp_path / "ansible.cfg").write_text(CONFIGURATION, encoding="utf-8")
    (inventory,) = (text for text in EXAMPLES if text not in PLAYS)
    group = "gateways: {hosts: {gateway-1: }}\nyour_group: {hosts: {spark-1: }}\n"
    (tmp_path / "hosts.yml").write_text(inventory + group, encoding="utf-8")
    names = []
    for number, text in enumerate(PLAYS):
        names.append(f"play-{number}.yml")
        (tmp_path / names[-1]).write_text(text, encoding="utf-8")
    ansible = Path(sys.executable).with_name("ansible-playbook")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ANSIBLE_")}
    command = [ansible, "--syntax-check", "-i", "hosts.yml", *names]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "phrase",
    [
        "a row a host",
        "for ever",
        "goes on to its end",
        "is no Spark",
        "look into the",
        "lost line",
        "release before",
        "taken back",
        "unless told",
        "what lacks",
    ],
)
def test_phrases_that_are_not_used(phrase: str) -> None:
    """Codespell knows single words alone; docs/.words has those."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *(ROOT / "docs").glob("*.md")]
    generated = {"inventory.md", "fault-matrix.md"}
    found = [page.name for page in pages if page.name not in generated and phrase in page.read_text(encoding="utf-8")]
    assert not found
