"""A lock beside the inventory, as ansible-playbook and `sparkfleet` meet it; only the inspection has a stand-in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparkfleet.planning import lock
from sparkfleet.planning.lock import Lock
from tests.unit import ROOT
from tests.unit.collection import overlay
from tests.unit.planning.test_lock import CARD, COMMIT, locked
from tests.unit.planning.test_plan import DIGEST, serving

#: Takes the place of the module that inspects a host: says what it was asked, and what a serving Spark would.
STAND_IN = """
import json
from pathlib import Path
from ansible.module_utils.basic import AnsibleModule

FOLDER = Path({folder!r})
options = ("engines", "project", "operator", "project_dir", "cache_dir", "token", "token_file", "engine_key", "address",
           "gateways", "sources", "registry_logins", "hub_endpoint", "proxy", "no_proxy", "now", "internet", "status",
           "fabric", "ca", "registries")
module = AnsibleModule({{name: {{"type": "raw", "no_log": False}} for name in options}}, supports_check_mode=True)
(FOLDER / "asked.json").write_text(json.dumps(module.params["engines"]))
module.exit_json(changed=False, state=json.loads((FOLDER / "state.json").read_text()))
"""


class Place:
    """A folder with an inventory of one Spark, which is this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.inventory = folder, folder / "mine"
        self.inventory.mkdir()
        overlay(folder, {"modules/spark_state.py": STAND_IN.format(folder=str(folder))})
        state = {**serving(), "user": {"id": 0, "name": "root"}}
        state["engines"][0]["model"]["listing"] = "of another making"
        (folder / "state.json").write_text(json.dumps(state))
        shared = {
            "ansible_connection": "local",
            "ansible_become": False,
            "ansible_python_interpreter": sys.executable,
            "sparkfleet_operator": "nvidia",
        }
        hosts = {"sparks": {"hosts": {"s1": None}, "vars": shared}}
        (self.inventory / "hosts.yml").write_text(json.dumps(hosts))

    def write(self, **more: Any) -> Lock:
        made = locked(self.inventory / lock.NAME, **more)
        made.write()
        return made

    def run(self, *words: str, of: str = "") -> tuple[int, str]:
        """The plan alone; the exit code and what was printed."""
        (self.folder / "asked.json").unlink(missing_ok=True)
        environment = {
            **os.environ,
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_COLLECTIONS_PATH": str(self.folder),
        }
        program = str(Path(sys.executable).with_name("ansible-playbook"))
        argv = [program, "playbooks/site.yml", "--tags", "preflight", "-i", str(self.inventory / of), *words]
        done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
        return done.returncode, done.stdout + done.stderr

    @property
    def asked(self) -> list[dict[str, Any]]:
        """The engines that the host was inspected for; [] if it was not."""
        file = self.folder / "asked.json"
        found: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
        return found


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.mark.parametrize("of", ["", "hosts.yml"])
def test_a_spark_is_inspected_for_what_the_lock_has(place: Place, of: str) -> None:
    place.write()
    code, printed = place.run(of=of)
    assert code == 0, printed
    (engine,) = place.asked
    assert (engine["image"], engine["revision"]) == (f"{CARD.image}@{DIGEST}", COMMIT)
    assert f"fetch: check {CARD.repo} again: the list of its files is not that of the lock" in printed


def test_without_a_lock_all_is_as_before(place: Place) -> None:
    code, printed = place.run()
    assert code == 0, printed
    (engine,) = place.asked
    assert (engine["image"], engine["revision"]) == (CARD.image, "main")
    assert "of the lock" not in printed


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["-e", "sparkfleet_image=nvcr.io/nvidia/vllm:25.11-py3"], "the image nvcr.io/nvidia/vllm:25.11-py3 is not in"),
        (["-e", "sparkfleet_model=qwen3-8b-fp8"], "the model card qwen3-8b-fp8 is not in the lock"),
        (["-e", "sparkfleet_lock_file=/nowhere.yml"], "sparkfleet_lock_file: /nowhere.yml does not exist"),
    ],
)
def test_what_is_not_in_the_lock_is_refused_before_the_spark_is_looked_at(
    place: Place, words: list[str], problem: str
) -> None:
    place.write()
    code, printed = place.run(*words)
    assert code == 2 and f"s1: {problem}" in printed, printed
    assert place.asked == []


def test_a_lock_that_was_edited_ends_the_command_as_bad_input(place: Place) -> None:
    path = place.write().path
    path.write_text(path.read_text().replace("size: 123", "size: 124"))
    words = [sys.executable, "-m", "sparkfleet", "deploy", "-i", str(place.inventory), "--json"]
    environment = {**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(place.folder), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    (host,) = json.loads(done.stdout)["hosts"]
    assert (host["result"], host["failure"]) == ("refused", "bad-input")
    assert f"{path}:" in host["message"] and "changed after `sparkfleet lock` had written it" in host["message"]
    assert place.asked == []
