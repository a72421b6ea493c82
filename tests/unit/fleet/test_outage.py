"""More than one Spark stops at once only when that is confirmed; decided by what serves, through real playbooks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sparkfleet import SparkfleetError
from sparkfleet.fleet import outage
from tests.unit import ROOT


def inspected(serves: bool = True, start: bool = True, docker: str = "", machine: str = "") -> dict[str, Any]:
    containers = [{"ours": True, "state": "running"}] if serves else []
    return {
        "plan": {
            "prepare": {"docker": [docker] if docker else [], "toolkit": []},
            "deploy": {"start": ["switch to it"] if start else [], "stop_services": []},
        },
        "state": {
            "engines": [{"healthy": serves}],
            "docker": {"containers": containers},
            "os": {"machine_id": machine, "boot_id": "b"},
        },
    }


def served(engine: str = "serving", release: int = 1, current: int = 2) -> dict[str, Any]:
    return {"engine": engine, "release": release, "releases": {"current": current}}


def play(
    tmp_path: Path, arguments: dict[str, Any], hosts: dict[str, dict[str, Any]], *words: str
) -> subprocess.CompletedProcess[str]:
    """A play of the one task over these hosts, and of one after it that would change something."""
    tasks = [
        {"sparkfleet.dgx.fleet_check": arguments, "run_once": True},
        {"ansible.builtin.debug": {"msg": "it goes on"}},
    ]
    playbook, inventory = tmp_path / "playbook.yml", tmp_path / "hosts.yml"
    playbook.write_text(yaml.safe_dump([{"hosts": "sparks", "gather_facts": False, "tasks": tasks}]), encoding="utf-8")
    inventory.write_text(yaml.safe_dump({"sparks": {"hosts": hosts}}), encoding="utf-8")
    command = [Path(sys.executable).with_name("ansible-playbook"), "-i", inventory, playbook, *words]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


DEPLOY: dict[str, Any] = {"stages": ["prepare", "deploy"]}


@pytest.mark.parametrize(
    ("arguments", "hosts", "words"),
    [
        (DEPLOY, [{"sparkfleet_inspection": inspected()}, {"sparkfleet_inspection": inspected()}], ()),
        (DEPLOY, [{"sparkfleet_inspection": inspected(start=False, docker="use the proxy and restart it")}] * 2, ()),
        (
            {"stages": ["prepare"]},
            [{"sparkfleet_inspection": inspected(docker="use the proxy and restart it")}] * 2,
            (),
        ),
        ({"verb": "restart"}, [{"status": served()}, {"status": served()}], ()),
        ({"verb": "rollback"}, [{"status": served()}, {"status": served()}], ()),
        ({"verb": "stop"}, [{"status": served()}, {"status": served("down")}, {"status": served()}], ()),
    ],
    ids=["deploy", "docker", "prepare", "restart", "rollback", "stop"],
)
def test_several_that_serve_are_not_stopped_at_once(
    arguments: dict[str, Any], hosts: list[dict[str, Any]], words: tuple[str, ...], tmp_path: Path
) -> None:
    named = {f"spark-{number}": variables for number, variables in enumerate(hosts, 1)}
    done = play(tmp_path, arguments, named, *words)
    assert done.returncode == 2 and "it goes on" not in done.stdout
    assert "2 Sparks serving now would stop at the same time: spark-1, " in done.stdout + done.stderr
    assert "sparkfleet_all_at_once=true" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "hosts", "words"),
    [
        (DEPLOY, [{"sparkfleet_inspection": inspected(serves=False)}] * 2, ()),  # a first deployment
        (DEPLOY, [{"sparkfleet_inspection": inspected()}, {"sparkfleet_inspection": inspected(start=False)}], ()),
        (DEPLOY, [{"sparkfleet_inspection": inspected()}, {}], ()),  # one that could not be planned
        (DEPLOY, [{"sparkfleet_inspection": inspected()}] * 2, ("-e", "sparkfleet_all_at_once=true")),
        (DEPLOY, [{"sparkfleet_inspection": inspected(), "sparkfleet_all_at_once": True}] * 2, ()),
        (DEPLOY, [{"sparkfleet_inspection": inspected()}] * 2, ("--check",)),
        (DEPLOY, [{"sparkfleet_inspection": inspected()}] * 2, ("--limit", "spark-2")),
        ({"stages": ["prepare"]}, [{"sparkfleet_inspection": inspected()}] * 2, ()),
        ({"verb": "restart"}, [{"status": served("down")}, {"status": served()}], ()),
        ({"verb": "rollback"}, [{"status": served(release=2)}, {"status": served(release=2)}], ()),
    ],
    ids=["first", "one", "lost", "confirmed", "inventory", "check", "limit", "prepare", "restart", "rollback"],
)
def test_what_needs_no_confirmation(
    arguments: dict[str, Any], hosts: list[dict[str, Any]], words: tuple[str, ...], tmp_path: Path
) -> None:
    named = {f"spark-{number}": variables for number, variables in enumerate(hosts, 1)}
    done = play(tmp_path, arguments, named, *words)
    assert done.returncode == 0 and "it goes on" in done.stdout, done.stdout + done.stderr


def test_one_host_under_two_names(tmp_path: Path) -> None:
    hosts = {
        "spark-1": {"sparkfleet_inspection": inspected(False, machine="m1")},
        "other": {"sparkfleet_inspection": inspected(False, machine="m2")},
        "spark-one": {"sparkfleet_inspection": inspected(False, machine="m1")},
    }
    done = play(tmp_path, DEPLOY, hosts, "-e", "sparkfleet_all_at_once=true")
    printed = done.stdout + done.stderr
    assert done.returncode == 2 and "spark-1 and spark-one are the same host (machine ID m1)" in printed
    assert "it goes on" not in printed
    del hosts["spark-one"]
    assert play(tmp_path, DEPLOY, hosts).returncode == 0


@given(st.dictionaries(st.text(), st.tuples(st.sampled_from(["", "m", "n"]), st.sampled_from(["", "b", "c"]))))
def test_identities(machines: dict[str, tuple[str, str]]) -> None:
    known = [identity for identity in machines.values() if all(identity)]
    if len(known) == len(set(known)):
        outage.check_identities(machines)
    else:
        with pytest.raises(SparkfleetError, match="are the same host"):
            outage.check_identities(machines)
