"""One-file programs for a host: zip archives that Python runs, the same bytes for the same content."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

from sparkfleet_host import releases


def write(target: Path, content: Mapping[str, bytes], key: str) -> Path:
    """Write `content` (name in the archive -> bytes) to `target`, atomically. `key` identifies what it was
    made from; see `key_of`."""
    with io.BytesIO() as raw:
        with zipfile.ZipFile(raw, "w") as archive:
            for name in sorted(content):
                entry = zipfile.ZipInfo(name)  # of 1980-01-01, so that the bytes depend on the content alone
                entry.create_system = 3
                entry.external_attr = 0o644 << 16
                archive.writestr(entry, content[name], zipfile.ZIP_DEFLATED, 9)
            archive.comment = key.encode()
        releases.write_bytes(target, raw.getvalue())
    return target


def key_of(archive: Path) -> str | None:
    """The key that an archive was written with; None for none."""
    try:
        with zipfile.ZipFile(archive) as opened:
            return opened.comment.decode("ascii", "replace")
    except (OSError, zipfile.BadZipFile):
        return None
