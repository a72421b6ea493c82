"""Makes the collection importable as `ansible_collections.sparkfleet.dgx`, as Ansible does."""

from __future__ import annotations

import os
import sys

import hypothesis

from tests.unit import ROOT

sys.path.insert(0, str(ROOT / "collections"))
sys.path.insert(0, str(ROOT / "plugins" / "modules"))

# Of generated input: `quick` with every run, `long` by hand or at night (SPARKFLEET_HYPOTHESIS=long).
_COMMON = {"deadline": None, "suppress_health_check": list(hypothesis.HealthCheck), "print_blob": True}
hypothesis.settings.register_profile("quick", max_examples=40, derandomize=True, database=None, **_COMMON)
hypothesis.settings.register_profile("long", max_examples=5000, **_COMMON)
hypothesis.settings.load_profile(os.environ.get("SPARKFLEET_HYPOTHESIS", "quick"))

from tests.unit.fakes.fake_engine import docker, engine  # noqa: E402, F401  fixtures
from tests.unit.fakes.fake_vllm import vllm  # noqa: E402, F401
