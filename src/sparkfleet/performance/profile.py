"""Writes settings as a profile: into a card of one's own, a copy of the model's."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from sparkfleet_host.bounded import read_file
from sparkfleet_host.releases import write_text

from sparkfleet import SparkfleetError
from sparkfleet.documents import yaml_text
from sparkfleet.planning import catalog
from sparkfleet.planning.catalog import Card


def check(card: Card, path: Path) -> None:
    """Whether `write` can write there, found out before a search that takes hours. Raises SparkfleetError."""
    try:
        if path.exists():
            _own(card, path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise SparkfleetError(f"{path}: {error.strerror}; give another --output") from None


def _own(card: Card, path: Path) -> None:
    """Raises SparkfleetError for what is not a card of the same model."""
    if catalog.parse(path).repo != card.repo:
        raise SparkfleetError(f"{path}: the card of another model is there; give another --output")


def write(card: Card, name: str, base: str, arguments: Mapping[str, Any], path: Path, comment: Sequence[str]) -> None:
    """Write the card with a profile: that of `base` with `arguments` in place of some of its own. A card that is at
    `path` already keeps its other profiles. Raises SparkfleetError."""
    source = card.source
    if path.exists():
        _own(card, path)
        source = path
    data = yaml_text.load(read_file(source, catalog.LARGEST).decode("utf-8"))
    profiles = {**data["profiles"], name: {**card.profiles[base], **arguments}}
    text = "---\n" + "".join(f"# {line}\n" for line in comment)
    text += yaml.safe_dump({**data, "profiles": profiles}, sort_keys=False, allow_unicode=True, width=110)
    catalog.of_text(path, text)  # what is written can be read
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise SparkfleetError(f"{path}: {error.strerror}; give another --output") from None
