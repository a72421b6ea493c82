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


Hosts = list[dict[str, Any]]


def run(tmp_path: Path, plays: list[dict[str, Any]], groups: dict[str, Any], *words: str) -> tuple[int, str]:
    """Exit code and output of ansible-playbook."""
    playbook, inventory = tmp_path / "playbook.yml", tmp_path / "hosts.yml"
    playbook.write_text(yaml.safe_dump([{"gather_facts": False, **play} for play in plays]), encoding="utf-8")
    inventory.write_text(yaml.safe_dump(groups), encoding="utf-8")
    command = [Path(sys.executable).with_name("ansible-playbook"), "-i", inventory, playbook, *words]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return done.returncode, done.stdout + done.stderr


def tasks(arguments: dict[str, Any], name: str = "it") -> list[dict[str, Any]]:
    """The check, and a task after it that would change something."""
    check = {"sparkfleet.dgx.fleet_check": arguments, "run_once": True}
    return [check, {"ansible.builtin.debug": {"msg": f"{name} goes on"}}]


def play(tmp_path: Path, arguments: dict[str, Any], hosts: dict[str, dict[str, Any]], *words: str) -> tuple[int, str]:
    """A play over these hosts."""
    return run(tmp_path, [{"hosts": "sparks", "tasks": tasks(arguments)}], {"sparks": {"hosts": hosts}}, *words)


DEPLOY: dict[str, Any] = {"stages": ["prepare", "deploy"]}
PREPARE: dict[str, Any] = {"stages": ["prepare"]}
DOCKER = "use the proxy and restart it"
REFUSED: dict[str, tuple[dict[str, Any], Hosts]] = {
    "deploy": (DEPLOY, [{"sparkfleet_inspection": inspected()}, {"sparkfleet_inspection": inspected()}]),
    "docker": (DEPLOY, [{"sparkfleet_inspection": inspected(start=False, docker=DOCKER)}] * 2),
    "prepare": (PREPARE, [{"sparkfleet_inspection": inspected(docker=DOCKER)}] * 2),
    "restart": ({"verb": "restart"}, [{"status": served()}, {"status": served()}]),
    "rollback": ({"verb": "rollback"}, [{"status": served()}, {"status": served()}]),
    "stop": ({"verb": "stop"}, [{"status": served()}, {"status": served("down")}, {"status": served()}]),
}
ALLOWED: dict[str, tuple[dict[str, Any], Hosts]] = {
    "first": (DEPLOY, [{"sparkfleet_inspection": inspected(serves=False)}] * 2),  # a first deployment
    "one": (DEPLOY, [{"sparkfleet_inspection": inspected()}, {"sparkfleet_inspection": inspected(start=False)}]),
    "lost": (DEPLOY, [{"sparkfleet_inspection": inspected()}, {}]),  # one that could not be planned
    "confirmed": (DEPLOY, [{"sparkfleet_inspection": inspected(), "sparkfleet_all_at_once": True}] * 2),
    "prepared": (PREPARE, [{"sparkfleet_inspection": inspected()}] * 2),
    "down": ({"verb": "restart"}, [{"status": served("down")}, {"status": served()}]),
    "at-it": ({"verb": "rollback"}, [{"status": served(release=2)}, {"status": served(release=2)}]),
}


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What one run prints with a play for each case, whose refusal is said and does not end the run."""
    plays, groups = [], {}
    for name, (arguments, hosts) in {**REFUSED, **ALLOWED}.items():
        groups[name] = {"hosts": {f"{name}-{number}": variables for number, variables in enumerate(hosts, 1)}}
        refused = {"ansible.builtin.debug": {"msg": f"{name} is refused -- {{{{ ansible_failed_result.msg }}}}"}}
        plays.append({"hosts": name, "tasks": [{"block": tasks(arguments, name), "rescue": [refused]}]})
    code, printed = run(tmp_path_factory.mktemp("outage"), plays, groups)
    assert code == 2, printed  # for the Sparks of refused cases besides the first, which is rescued
    return " ".join(printed.split())


@pytest.mark.parametrize("name", REFUSED)
def test_several_that_serve_are_not_stopped_at_once(name: str, printed: str) -> None:
    assert f"{name} goes on" not in printed
    message = printed.partition(f"{name} is refused -- ")[2].partition(" is refused -- ")[0]
    assert f"2 Sparks serving now would stop at the same time: {name}-1, " in message
    assert "sparkfleet_all_at_once=true" in message


@pytest.mark.parametrize("name", ALLOWED)
def test_what_needs_no_confirmation(name: str, printed: str) -> None:
    assert f"{name} goes on" in printed and f"{name} is refused" not in printed


def test_a_refusal_ends_the_run(tmp_path: Path) -> None:
    hosts = {f"spark-{number}": {"sparkfleet_inspection": inspected()} for number in (1, 2)}
    code, printed = play(tmp_path, DEPLOY, hosts)
    assert code == 2 and "it goes on" not in printed
    assert "2 Sparks serving now would stop at the same time: spark-1, spark-2" in printed


@pytest.mark.parametrize(
    "words", [("-e", "sparkfleet_all_at_once=true"), ("--check",), ("--limit", "spark-2")], ids=lambda words: words[0]
)
def test_options_that_need_no_confirmation(words: tuple[str, ...], tmp_path: Path) -> None:
    hosts = {f"spark-{number}": {"sparkfleet_inspection": inspected()} for number in (1, 2)}
    code, printed = play(tmp_path, DEPLOY, hosts, *words)
    assert code == 0 and "it goes on" in printed, printed


def test_one_host_under_two_names(tmp_path: Path) -> None:
    hosts = {
        "spark-1": {"sparkfleet_inspection": inspected(False, machine="m1")},
        "other": {"sparkfleet_inspection": inspected(False, machine="m2")},
        "spark-one": {"sparkfleet_inspection": inspected(False, machine="m1")},
    }
    code, printed = play(tmp_path, DEPLOY, hosts, "-e", "sparkfleet_all_at_once=true")
    assert code == 2 and "spark-1 and spark-one are the same host (machine ID m1)" in printed
    assert "it goes on" not in printed
    del hosts["spark-one"]
    assert play(tmp_path, DEPLOY, hosts)[0] == 0


@given(st.dictionaries(st.text(), st.tuples(st.sampled_from(["", "m", "n"]), st.sampled_from(["", "b", "c"]))))
def test_identities(machines: dict[str, tuple[str, str]]) -> None:
    known = [identity for identity in machines.values() if all(identity)]
    if len(known) == len(set(known)):
        outage.check_identities(machines)
    else:
        with pytest.raises(SparkfleetError, match="are the same host"):
            outage.check_identities(machines)
