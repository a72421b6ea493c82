"""What systemd knows of a unit, with a stand-in of systemctl and a real process."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.systemd import service_environment


def test_the_environment_of_a_service_is_that_of_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen(["sleep", "60"], env={"HTTP_PROXY": "http://me:a%40b=@proxy:3128"})
    try:
        tool = tmp_path / "systemctl"
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        for answer, found in (
            (f"echo {process.pid}", {"HTTP_PROXY": "http://me:a%40b=@proxy:3128"}),
            ("echo 0", {}),
            ("echo", {}),
            ("echo many", {}),
            ("exit 4", {}),
        ):
            tool.write_text(f"#!/bin/sh\n{answer}\n", encoding="utf-8")
            tool.chmod(0o755)
            assert service_environment("docker.service") == found
    finally:
        process.kill()
        process.wait()
