"""Where the collection's own files are, and where a run leaves its own."""

from __future__ import annotations

import os
from pathlib import Path


def _collection() -> Path:
    """The folder with playbooks, roles and model cards: a checkout, an installed collection, or the wheel's copy of it,
    which is where ansible-core searches for collections."""
    here = Path(__file__).resolve()
    for folder in (here.parents[2], here.parents[1] / "ansible_collections" / "sparkfleet" / "dgx"):
        if (folder / "meta" / "runtime.yml").is_file():
            return folder
    raise RuntimeError(f"{here.parents[1]}: the collection sparkfleet.dgx is not next to this package; reinstall it")


ROOT = _collection()
#: The collections path that leads to it under its own name.
COLLECTIONS = ROOT / "collections" if (ROOT / "collections").is_dir() else ROOT.parents[2]
#: Whether this is a checkout, which keeps everything of a run within itself.
CHECKOUT = (ROOT / "pyproject.toml").is_file()


def _user(variable: str, default: str) -> Path:
    """A folder of the user by the XDG base directory specification."""
    named = os.environ.get(variable, "")
    return (Path(named) if named.startswith("/") else Path.home() / default) / "sparkfleet"


#: Event logs and reports.
STATE = ROOT / ".sparkfleet" if CHECKOUT else _user("XDG_STATE_HOME", ".local/state")
#: What can be made again: the packed programs.
CACHE = STATE / "cache" if CHECKOUT else _user("XDG_CACHE_HOME", ".cache")
#: Where `sparkfleet init` writes an inventory by default.
INVENTORY = (ROOT if CHECKOUT else Path.cwd()) / "inventory" / "mine"
