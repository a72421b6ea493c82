"""The collection with some of its plugins replaced."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tests.unit import ROOT


def overlay(folder: Path, replaced: Mapping[str, str]) -> Path:
    """A collections path below `folder` with the repository's collection, where each file `plugins/KIND/NAME.py` that
    `replaced` names (`KIND/NAME.py`: text) is that text, whether it exists here or not."""
    made = folder / "ansible_collections" / "sparkfleet" / "dgx"
    (made / "plugins").mkdir(parents=True)
    for entry in ("galaxy.yml", "inventory", "meta", "models", "playbooks", "pyproject.toml", "roles", "src"):
        (made / entry).symlink_to(ROOT / entry)
    for kind in (ROOT / "plugins").iterdir():
        mine = made / "plugins" / kind.name
        if not any(name.startswith(f"{kind.name}/") for name in replaced):
            mine.symlink_to(kind)
            continue
        mine.mkdir()
        for file in kind.glob("*.py"):
            if f"{kind.name}/{file.name}" not in replaced:
                (mine / file.name).symlink_to(file)
    for name, text in replaced.items():
        (made / "plugins" / name).write_text(text, encoding="utf-8")
    return folder
