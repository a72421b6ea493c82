"""Makes plugins/module_utils importable as `ansible.module_utils.NAME`, as Ansible does on a host."""

from __future__ import annotations

import sys
from pathlib import Path

import ansible.module_utils

ROOT = Path(__file__).resolve().parents[2]
ansible.module_utils.__path__.append(str(ROOT / "plugins" / "module_utils"))
sys.path.insert(0, str(ROOT / "plugins" / "modules"))

from tests.unit.fake_engine import docker, engine  # noqa: E402, F401  fixtures
from tests.unit.fake_vllm import vllm  # noqa: E402, F401
