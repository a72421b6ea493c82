"""One-file programs for a host: zip archives that Python runs, the same bytes for the same content."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path


def write(target: Path, content: Mapping[str, bytes], key: str) -> Path:
    """Write `content` (name in the archive -> bytes) to `target`, as a whole or not at all. `key` tells what it was
    made from; see `key_of`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as raw, zipfile.ZipFile(raw, "w") as archive:
            for name in sorted(content):
                entry = zipfile.ZipInfo(name)  # of 1980-01-01, so that the bytes depend on the content alone
                entry.create_system = 3
                entry.external_attr = 0o644 << 16
                archive.writestr(entry, content[name], zipfile.ZIP_DEFLATED, 9)
            archive.comment = key.encode()
        Path(temporary).chmod(0o644)
        Path(temporary).replace(target)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return target


def key_of(archive: Path) -> str | None:
    """The key that an archive was written with; None for none."""
    try:
        with zipfile.ZipFile(archive) as opened:
            return opened.comment.decode("ascii", "replace")
    except (OSError, zipfile.BadZipFile):
        return None
