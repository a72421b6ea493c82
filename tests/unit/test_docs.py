"""The tables that scripts/docs makes."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "docs"


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
        spec, defaults = docs.role(folder)
        for row in docs.table(spec["options"], defaults).splitlines():
            assert len(cells(row)) == 4, row
