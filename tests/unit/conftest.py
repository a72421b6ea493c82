"""Makes the collection importable as `ansible_collections.sparkfleet.dgx`, as Ansible does."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import hypothesis
import pytest

from tests.unit import ROOT

sys.path.insert(0, str(ROOT / "collections"))
sys.path.insert(0, str(ROOT / "plugins" / "modules"))

# Ansible's own import of collections, before any test imports one of its plugins: what was imported in Python's way
# before would stay without its metadata.
with contextlib.suppress(ImportError):  # where the host package alone is tested there is no Ansible
    from ansible.plugins.loader import init_plugin_loader

    init_plugin_loader([str(ROOT / "collections")])

# Of generated input: `quick` with every run, `long` by hand or at night (SPARKFLEET_HYPOTHESIS=long).
_COMMON = {"deadline": None, "suppress_health_check": list(hypothesis.HealthCheck), "print_blob": True}
hypothesis.settings.register_profile("quick", max_examples=40, derandomize=True, database=None, **_COMMON)
hypothesis.settings.register_profile("long", max_examples=5000, **_COMMON)
hypothesis.settings.load_profile(os.environ.get("SPARKFLEET_HYPOTHESIS", "quick"))

from tests.unit.fakes.fake_engine import docker, engine  # noqa: E402, F401  fixtures
from tests.unit.fakes.fake_vllm import vllm  # noqa: E402, F401
from tests.unit.fakes.unpacked_client import client  # noqa: E402, F401


@pytest.fixture(autouse=True, scope="session")
def unsynced() -> Iterator[None]:
    """Files of tests need not survive a power cut: waiting for the disk was half the time of those that switch
    releases. What is synced, and in which order, is tested in host/test_releases.py."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(os, "fsync", lambda handle: None)
        yield
