"""The lookup of the services' program: its path, and the SHA-256 by which a unit changes with it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from ansible.errors import AnsibleError
from ansible_collections.sparkfleet.dgx.plugins.lookup.host_program import LookupModule

from sparkfleet import paths


def test_path_and_checksum_are_of_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    (path,) = LookupModule().run([], {})
    assert Path(path).parent == tmp_path
    assert LookupModule().run(["sha256"], {}) == [hashlib.sha256(Path(path).read_bytes()).hexdigest()]


def test_nothing_else_is_looked_up() -> None:
    with pytest.raises(AnsibleError, match=r"\['md5'\]: nothing, or 'sha256'"):
        LookupModule().run(["md5"], {})
