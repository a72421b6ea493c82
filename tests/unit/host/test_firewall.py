"""What a host says of its firewall, with the kernel's own table in a network namespace of the test's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sparkfleet_host import firewall

from sparkfleet.planning import firewall as planned

SCRIPT = """
import json, subprocess, sys
from pathlib import Path
from sparkfleet_host import firewall
firewall.RULES, firewall.UNIT = Path(sys.argv[1]), Path(sys.argv[2])
firewall.unit_state = lambda name: {"ActiveState": "active", "UnitFileState": "enabled"}
found, closed = [firewall.state(["127.0.0.1", "no-such-gateway.invalid"])], [firewall.closed()]
for argv in (["-f", sys.argv[1]], ["flush", "ruleset"]):
    subprocess.run(["/usr/sbin/nft", *argv], check=True)
    found.append(firewall.state([]))
    closed.append(firewall.closed())
rules = firewall.RULES.read_text()
firewall.RULES.write_text(rules.replace("counter drop", "counter accept", 1))
subprocess.run(["/usr/sbin/nft", "-f", sys.argv[1]], check=True)
print(json.dumps([found, [*closed, firewall.closed()]]))
"""


def test_a_host_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(firewall, "RULES", tmp_path / "rules")
    monkeypatch.setattr(firewall, "UNIT", tmp_path / "unit")
    found = firewall.state([])
    assert found.pop("installed") in (True, False)
    assert found == {"rules": "", "unit": "", "active": False, "enabled": False, "loaded": "", "sources": {}}
    (tmp_path / "rules").write_bytes(b"\xff")  # damaged
    assert firewall.state([])["rules"] == "" and firewall.closed() == []


@pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/usr/sbin/nft").exists() or shutil.which("unshare") is None,
    reason="root, nft and unshare are needed",
)
def test_the_table_that_is_loaded_is_recognised(tmp_path: Path) -> None:
    rules = planned.rules([8000, 9109], planned.networks(["192.0.2.5", "fd00::/8"]), 9110, [])
    (tmp_path / "rules").write_text(rules, encoding="utf-8")
    (tmp_path / "unit").write_text(planned.unit(), encoding="utf-8")
    argv = ["unshare", "--net", sys.executable, "-c", SCRIPT, str(tmp_path / "rules"), str(tmp_path / "unit")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]]
    found, closed = json.loads(done.stdout)
    assert closed == [[], [8000, 9109], [], []]  # the last one was edited
    assert [state["loaded"] for state in found] == ["", planned.mark(rules), ""]
    assert found[0]["sources"] == {"127.0.0.1": ["127.0.0.1"], "no-such-gateway.invalid": []}
    assert all(state["rules"] == rules and state["unit"] == planned.unit() for state in found)
    assert all(state["installed"] and state["active"] and state["enabled"] for state in found)
