"""The packed Hub client as a folder of compiled modules: the same program, started in the same way.

Python compiles a packed one at each start, which takes longer than most of what is asked of it. Tests of the
packed file itself are in packaging/test_hub_client.py, plugins/test_spark_plan_card.py and simulator/test_hub.py.
"""

from __future__ import annotations

import compileall
import zipfile
from pathlib import Path

import pytest

from sparkfleet.packaging import hub_client


@pytest.fixture(scope="session")
def client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("client")
    unpacked = folder / "hf_client"
    with zipfile.ZipFile(hub_client.build(folder)) as packed:
        packed.extractall(unpacked)
    assert compileall.compile_dir(unpacked, quiet=2)
    return unpacked
