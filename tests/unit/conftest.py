"""Makes plugins/module_utils importable as `ansible.module_utils.NAME`, as Ansible does on a host."""

from __future__ import annotations

from tests.unit import ROOT

import os
import sys
from pathlib import Path

import ansible.module_utils
import hypothesis

ansible.module_utils.__path__.append(str(ROOT / "plugins" / "module_utils"))
sys.path.insert(0, str(ROOT / "plugins" / "modules"))

# Of generated input: `quick` with every run, `long` by hand or at night (SPARKFLEET_HYPOTHESIS=long).
_COMMON = {"deadline": None, "suppress_health_check": list(hypothesis.HealthCheck), "print_blob": True}
hypothesis.settings.register_profile("quick", max_examples=40, derandomize=True, database=None, **_COMMON)
hypothesis.settings.register_profile("long", max_examples=5000, **_COMMON)
hypothesis.settings.load_profile(os.environ.get("SPARKFLEET_HYPOTHESIS", "quick"))

from tests.unit.fakes.fake_engine import docker, engine  # noqa: E402, F401  fixtures
from tests.unit.fakes.fake_vllm import vllm  # noqa: E402, F401
