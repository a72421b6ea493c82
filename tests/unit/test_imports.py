"""The rooms of the package: who may import whom."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit import ROOT

SOURCE = ROOT / "src" / "sparkfleet"
HOST = ROOT / "plugins" / "module_utils" / "sparkfleet_host"
#: From the ground up; a room imports from those before it and from itself. "" are the modules outside the rooms.
ROOMS = (
    *("", "documents", "diagnosis", "packaging", "planning", "performance", "reporting", "fleet", "monitoring"),
    *("onboarding", "cli"),
)
#: Of the modules outside the rooms, these are the way in from above.
ENTRY = ("sparkfleet.__main__",)
#: What runs on a host has the standard library alone; the download has the Hub's client packed with it.
PACKED = {"fetch_model": {"huggingface_hub", "httpx2"}}


def imported(path: Path, package: str) -> Iterator[str]:
    """Full names that a module imports, those within functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [package if node.level else "", node.module or ""]))
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def name_of(path: Path) -> str:
    return ".".join(("sparkfleet", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sorted(SOURCE.rglob("*.py"))}
ARROWS = {
    name: {other for other in imported(path, "") if other in MODULES and other != name}
    for name, path in MODULES.items()
}


def room(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else ""


def test_every_package_is_a_room() -> None:
    assert {path.name for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__"} == {*ROOMS[1:]}


@pytest.mark.parametrize("name", sorted(set(MODULES) - set(ENTRY)))
def test_no_arrow_goes_up(name: str) -> None:
    up = [other for other in ARROWS[name] if ROOMS.index(room(other)) > ROOMS.index(room(name))]
    assert not up


def test_no_circles() -> None:
    left = {name: set(arrows) for name, arrows in ARROWS.items()}
    while free := [name for name, arrows in left.items() if not arrows & set(left)]:
        for name in free:
            del left[name]
    assert not left


@pytest.mark.parametrize("path", sorted(HOST.glob("*.py")), ids=lambda path: path.stem)
def test_the_host_package_has_the_standard_library_alone(path: Path) -> None:
    names = {name.split(".")[0] for name in imported(path, "sparkfleet_host")}
    assert names <= {*sys.stdlib_module_names, "sparkfleet_host", *PACKED.get(path.stem, ())}


def test_nothing_outside_the_simulator_needs_it() -> None:
    ours = [*MODULES.values(), *(ROOT / "plugins").rglob("*.py")]
    assert not [
        path for path in ours if any(name.split(".")[0] in ("simulator", "tests") for name in imported(path, ""))
    ]


def constants(path: Path) -> Iterator[tuple[str, str]]:
    """Name and value of what a module sets once to a text, a number of bytes, or a tuple or set of such."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            reported = isinstance(node.value, ast.Constant | ast.Tuple | ast.Set | ast.Dict)
            if reported and name.isupper() and name not in ("DOCUMENTATION", "EXAMPLES", "RETURN"):
                yield name, ast.unparse(node.value)


def test_no_constant_is_defined_twice() -> None:
    """Of the same name and value. Numbers of seconds belong to their module alone."""
    found: dict[tuple[str, str], list[str]] = {}
    for path in (*MODULES.values(), *(ROOT / "plugins").rglob("*.py")):
        for name, value in constants(path):
            if not value.replace(".", "").isdigit():
                found.setdefault((name, value), []).append(str(path.relative_to(ROOT)))
    assert {key: paths for key, paths in found.items() if len(paths) > 1} == {}
