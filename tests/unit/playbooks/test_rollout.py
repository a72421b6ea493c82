"""playbooks/rollout.yml itself, run by ansible-playbook: only what acts on a Spark is put in its place, so that a Spark
can be lost or fail on command."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit import ROOT
from tests.unit.collection import overlay

#: Takes the place of every action and module that contacts a host; `script` says what becomes of a call.
STAND_IN = """
import json, os
from pathlib import Path
from ansible.errors import AnsibleActionFail, AnsibleConnectionFailure
from ansible.plugins.action import ActionBase

FOLDER = Path(os.environ["STAND_IN"])

class ActionModule(ActionBase):
    def run(self, tmp=None, task_vars=None):
        host, name = task_vars["inventory_hostname"], Path(__file__).stem
        script = json.loads((FOLDER / "script.json").read_text())
        gateway = self._task.delegate_to if name == "haproxy_server" else None
        kept = ("servers", "state", "verify", "verify_seconds", "mode", "budget", "verified", "lock", "rotating")
        args = {key: self._task.args[key] for key in kept if key in self._task.args}
        calls = FOLDER / f"calls.{host}.{name}"
        before = len(calls.read_text()) if calls.exists() else 0
        calls.write_text("x" * (before + 1))
        with open(FOLDER / "log", "a") as file:
            file.write(json.dumps({"host": host, "name": name, "gateway": gateway, **args}) + "\\n")
        fate = script["fates"].get(f"{host} {name} {before + 1}", script["fates"].get(f"{host} {name}"))
        if fate == "unreachable":
            raise AnsibleConnectionFailure(f"{host}: no route to host")
        if fate == "failed":
            raise AnsibleActionFail(f"{host}: {name} failed")
        done = FOLDER / f"released.{host}"
        if name == "release_switch" and not self._task.check_mode:
            done.write_text("")
        needed = host in script["needed"] and not done.exists()
        if name == "spark_plan":
            state = {"docker": {"containers": []}, "engines": [{"healthy": False}], "os": {}}
            if host in script["twins"]:
                state["os"] = {"machine_id": "m", "boot_id": "b"}
            return {"changed": False, "plan": plan(needed, script["fetches"].get(host, [])), "state": state}
        if name == "share":
            return {"changed": False, "sources": [], "takes": False, "takes_part": True}
        release = {"number": 2, "engines": [{"model": "m"}]}
        return {"changed": name == "release_switch", "release": release, "verifications": {"vllm-m": {"by": host}}}

def plan(needed, fetches):
    deploy = {"needed": needed, "stage": [], "start": ["x"], "stop": [], "wait": [], "release": 2, "mode": "deploy",
              "recreate": False, "services": [], "new_key": False, "stop_services": []}
    verify = {"question": "q", "expect": "e", "prompt": "p", "prompt_expect": "e"}
    engine = {"model": "m", "profile": "throughput", "repo": "o/m", "service": "vllm-m", "port": 8000, "verify": verify,
              "image": "i:1", "revision": "main", "remote_code": False, "pickle": False,
              "fetch_image": "image" in fetches, "fetch_model": "model" in fetches}
    return {"engines": [engine], "fetches": [engine], "compose": {}, "release": {"plan": {}, "lock": {}},
            "prepare": {"needed": False}, "fetch": {"needed": bool(fetches)}, "deploy": deploy, "lock": "/the.lock"}
"""
ACTIONS = (
    "spark_plan",
    "release_stage",
    "release_switch",
    "stop_services",
    "vllm_wait",
    "vllm_verify",
    "haproxy_server",
    *("image_digest", "model_files", "share", "image_pull", "model_download", "fetch_wait"),
)


def fleet_file(folder: Path) -> str:
    """The module that tells the status page, with its file in `folder`/page, and a line for each time it was called."""
    source = (ROOT / "plugins" / "modules" / "fleet_file.py").read_text(encoding="utf-8")
    end = "    module.exit_json(changed=new != old"
    assert source.count(end) == 1
    log = "    with open(f'{path}.log', 'a') as log:\n        log.write(json.dumps(new) + '\\n')\n"
    return source.replace("/var/lib/sparkfleet-page", str(folder / "page")).replace(end, log + end)


@dataclasses.dataclass
class Fleet:
    """A folder with an inventory of Sparks s1…, and what becomes of calls."""

    folder: Path
    count: int = 5

    def __post_init__(self) -> None:
        replaced = {f"action/{name}.py": STAND_IN for name in (*ACTIONS, "gateway_plan", "spark_status")}
        overlay(self.folder, {**replaced, "modules/fleet_file.py": fleet_file(self.folder)})
        self.names = [f"s{number}" for number in range(1, self.count + 1)]
        self.inventory()

    def inventory(self, gateways: tuple[str, ...] = (), **variables: Any) -> None:
        shared = {
            "sparkfleet_rollout_waves": [2],
            "ansible_connection": "local",
            "ansible_become": False,
            "ansible_python_interpreter": sys.executable,
            "sparkfleet_project_dir": str(self.folder / "project"),
            **variables,
        }
        groups: dict[str, Any] = {"sparks": {"hosts": dict.fromkeys(self.names), "vars": shared}}
        if gateways:
            groups["gateways"] = {"hosts": dict.fromkeys(gateways), "vars": {"ansible_connection": "local"}}
        (self.folder / "hosts.yml").write_text(json.dumps(groups), encoding="utf-8")

    def run(
        self,
        *words: str,
        needed: list[str] | None = None,
        fetches: dict[str, list[str]] | None = None,
        twins: tuple[str, ...] = (),
        playbook: str = "playbooks/rollout.yml",
        **fates: str,
    ) -> tuple[int, str]:
        """Roll out, or run another playbook. `fetches`: what a Spark has to fetch (image, model); `twins`: names of
        one host; `fates`: HOST_ACTION[_CALL]="unreachable" or "failed". The exit code and what was printed."""
        script = {
            "needed": self.names if needed is None else needed,
            "fetches": fetches or {},
            "twins": twins,
            "fates": {split(key): value for key, value in fates.items()},
        }
        (self.folder / "script.json").write_text(json.dumps(script), encoding="utf-8")
        for path in (*self.folder.glob("calls.*"), *self.folder.glob("log")):
            path.unlink()
        environment = {
            **os.environ,
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_COLLECTIONS_PATH": str(self.folder),
            "STAND_IN": str(self.folder),
            "ANSIBLE_FORKS": "5",
        }
        argv = ["ansible-playbook", playbook, "-i", str(self.folder / "hosts.yml"), *words]
        argv[0] = str(Path(sys.executable).with_name(argv[0]))
        done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
        return done.returncode, done.stdout + done.stderr

    def log(self, name: str) -> list[dict[str, Any]]:
        lines = (self.folder / "log").read_text(encoding="utf-8").splitlines()
        return [entry for line in lines if (entry := json.loads(line))["name"] == name]

    def shown(self) -> list[dict[str, Any]]:
        """The rollout on the status page, each time that it was said."""
        lines = (self.folder / "page" / "fleet.json.log").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["rollout"] for line in lines]

    def released(self) -> list[str]:
        return sorted({path.name.partition(".")[2] for path in self.folder.glob("released.*")})


def split(key: str) -> str:
    """HOST_ACTION_CALL as "HOST ACTION CALL"."""
    host, _, rest = key.partition("_")
    action, _, call = rest.rpartition("_")
    return f"{host} {action} {call}" if call.isdigit() else f"{host} {rest}"


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


def test_in_waves_to_the_end_and_nothing_the_second_time(fleet: Fleet) -> None:
    code, printed = fleet.run()
    assert code == 0, printed
    assert fleet.released() == fleet.names
    assert "wave 3 of 3: s4, s5" in printed
    code, printed = fleet.run()
    assert code == 0 and "up to date: s1, s2, s3, s4, s5" in printed, printed
    assert "changed=1" not in printed


@pytest.mark.parametrize("action", ["spark_plan_2", "vllm_verify"])
def test_a_spark_that_is_lost_in_the_second_wave_ends_the_rollout_and_the_next_run_resumes_it(
    fleet: Fleet, action: str
) -> None:
    """At the beginning of its turn, or after it was switched."""
    code, printed = fleet.run(**{f"s2_{action}": "unreachable"})
    assert code == 4, printed
    touched = {entry["host"] for name in ACTIONS[1:-1] for entry in fleet.log(name)}
    assert touched <= {"s1", "s2", "s3"}
    assert {"s1", "s3"} <= set(fleet.released()) and not {"s4", "s5"} & set(fleet.released())
    assert "rollout  stops before wave 3 of 3: s2 do not serve; untouched: s4, s5" in printed
    code, printed = fleet.run()
    assert code == 0 and fleet.released() == fleet.names, printed


def test_a_spark_that_fails_lets_its_wave_end_and_nothing_after_it_begin(fleet: Fleet) -> None:
    fleet.inventory(gateways=("g1",))
    code, printed = fleet.run(s2_vllm_verify="failed")
    assert code == 2, printed
    assert not {"s4", "s5"} & {entry["host"] for entry in fleet.log("release_switch")}
    # The other Spark of the wave is verified and put back, although its neighbour failed first.
    assert {entry["host"] for entry in fleet.log("vllm_verify")} == {"s1", "s2", "s3"}
    back = [entry["servers"] for entry in fleet.log("haproxy_server") if entry["state"] == "ready"]
    assert sorted(back) == [["s1"], ["s2"], ["s3"]]
    assert fleet.log("gateway_plan") == []


def test_a_canary_that_is_lost(fleet: Fleet) -> None:
    code, printed = fleet.run(s1_release_switch="unreachable")
    assert code != 0 and fleet.released() == [], printed
    assert {entry["host"] for entry in fleet.log("release_switch")} == {"s1"}


@pytest.mark.parametrize(
    ("fates", "missing"),
    [
        ({"s1_spark_plan_2": "unreachable"}, "s1"),  # a whole wave
        ({"s2_vllm_verify": "failed"}, "s2"),
    ],
)
def test_going_on_all_the_same_ends_with_an_error(fleet: Fleet, fates: dict[str, str], missing: str) -> None:
    fleet.inventory(sparkfleet_rollout_on_failure="continue")
    code, printed = fleet.run(**fates)
    assert code != 0 and f"{missing} was not rolled out: see above" in printed, printed
    assert {*fleet.released(), missing} == set(fleet.names)


def test_going_on_all_the_same_puts_back_and_deploys_the_gateways(fleet: Fleet) -> None:
    fleet.inventory(gateways=("g1",), sparkfleet_rollout_on_failure="continue")
    fleet.run(s1_release_switch="failed", s4_spark_plan_2="unreachable")
    states = [(entry["servers"], entry["state"]) for entry in fleet.log("haproxy_server")]
    out = [servers for servers, state in states if state == "drain"]
    assert sorted(out) == [["s1"], ["s2"], ["s3"], ["s5"]] and all((servers, "ready") in states for servers in out)
    assert [entry["host"] for entry in fleet.log("gateway_plan")] == ["g1"]


@pytest.mark.parametrize(("limit", "expected"), [("!s3", ["s1", "s2", "s4", "s5"]), ("sparks:&s4", ["s4"])])
def test_a_limit_is_rolled_out(fleet: Fleet, limit: str, expected: list[str]) -> None:
    code, printed = fleet.run("--limit", limit)
    assert code == 0 and fleet.released() == expected, printed


def test_a_limit_without_sparks_is_refused(fleet: Fleet) -> None:
    fleet.inventory(gateways=("g1",))
    code, printed = fleet.run("--limit", "g1")
    assert code != 0 and "--limit g1 leaves no host of the group sparks" in printed, printed


def test_one_call_a_gateway_puts_back_what_has_the_release_already(fleet: Fleet) -> None:
    fleet.inventory(gateways=("g1", "g2"), sparkfleet_drained=False)
    fleet.run(needed=[])
    calls = fleet.log("haproxy_server")
    assert [(call["gateway"], call["servers"], call["state"]) for call in calls] == [
        ("g1", fleet.names, "ready"),
        ("g2", fleet.names, "ready"),
    ]


def test_check_mode_releases_nothing(fleet: Fleet) -> None:
    code, printed = fleet.run("--check")
    assert code == 0 and fleet.released() == [], printed


# -- how a release is verified ---------------------------------------------------------------------------------------


def asked(fleet: Fleet) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """What each Spark's switch was to verify, and what its verifications were after that."""
    switches = {entry["host"]: (entry["verify"], entry["verify_seconds"]) for entry in fleet.log("release_switch")}
    after: dict[str, list[Any]] = {}
    for entry in fleet.log("vllm_verify"):
        after.setdefault(entry["host"], []).append((entry["mode"], entry["budget"], entry["verified"]))
    return switches, after


def test_the_canary_is_verified_in_depth_by_its_switch(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, 3)
    code, out = fleet.run()
    assert code == 0, out
    switches, after = asked(fleet)
    assert switches == {"s1": ("deep", 300), "s2": ("quick", 300), "s3": ("quick", 300)}
    assert after["s1"] == [("deep", 300, {"vllm-m": {"by": "s1"}})] and after["s2"][0][0] == "quick"


def test_how_canaries_and_the_others_are_verified_can_be_chosen(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, 2)
    fleet.inventory(sparkfleet_rollout_verify="quick", sparkfleet_verify="deep", sparkfleet_verify_seconds=900)
    code, out = fleet.run()
    assert code == 0, out
    assert asked(fleet)[0] == {"s1": ("quick", 900), "s2": ("deep", 900)}


def test_after_a_while_a_canary_is_asked_again(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, 1)
    fleet.inventory(sparkfleet_rollout_soak=1)
    code, out = fleet.run()
    assert code == 0, out
    assert asked(fleet)[1]["s1"] == [("deep", 300, {"vllm-m": {"by": "s1"}}), ("deep", 300, {})]


def test_a_canary_that_fails_in_depth_stops_the_rollout(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, 3)
    code, out = fleet.run(s1_release_switch="failed")
    assert code == 2 and "the rollout stops after this wave" in out
    assert asked(fleet)[0] == {"s1": ("deep", 300)} and fleet.released() == []


def test_without_canaries_each_is_verified_as_any_deployment(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, 2)
    fleet.inventory(sparkfleet_rollout_canary=0)
    code, out = fleet.run()
    assert code == 0, out
    assert asked(fleet)[0] == {"s1": ("quick", 300), "s2": ("quick", 300)}


@pytest.mark.parametrize("mode", ["quick", "deep"])
def test_a_deployment_is_verified_as_the_inventory_says(tmp_path: Path, mode: str) -> None:
    fleet = Fleet(tmp_path, 1)
    fleet.inventory(sparkfleet_verify=mode)
    code, out = fleet.run(playbook="playbooks/site.yml")
    assert code == 0, out
    assert asked(fleet) == ({"s1": (mode, 300)}, {"s1": [(mode, 300, {"vllm-m": {"by": "s1"}})]})
    code, out = fleet.run(playbook="playbooks/verify.yml")
    assert code == 0, out
    assert [entry["verified"] for entry in fleet.log("vllm_verify")] == [{}]


# -- the status page ---------------------------------------------------------------------------------------------------


def test_the_status_page_shows_each_wave_and_the_end(fleet: Fleet) -> None:
    (fleet.folder / "page").mkdir()
    fleet.inventory(sparkfleet_monitoring=True)
    code, printed = fleet.run()
    assert code == 0, printed
    seen = [(item["wave"], item["done"], item["ended"]) for item in fleet.shown()]
    assert list(dict.fromkeys(map(str, seen))) == [
        str((1, [], False)),
        str((1, ["s1"], False)),
        str((2, ["s1"], False)),
        str((2, ["s1", "s2", "s3"], False)),
        str((3, ["s1", "s2", "s3"], False)),
        str((3, fleet.names, True)),
    ]
    last = fleet.shown()[-1]
    assert last["waves"] == [["s1"], ["s2", "s3"], ["s4", "s5"]] and last["failed"] == [] and last["by"]


@pytest.mark.parametrize(
    ("fates", "wave", "done", "failed"),
    [
        ({"s1_vllm_verify": "failed"}, 1, [], ["s1"]),
        ({"s2_spark_plan_2": "unreachable"}, 2, ["s1", "s3"], ["s2"]),
    ],
)
def test_the_status_page_shows_where_a_rollout_stopped(
    fleet: Fleet, fates: dict[str, str], wave: int, done: list[str], failed: list[str]
) -> None:
    (fleet.folder / "page").mkdir()
    fleet.inventory(sparkfleet_monitoring=True)
    code, printed = fleet.run(**fates)
    assert code != 0, printed
    last = fleet.shown()[-1]
    assert (last["wave"], last["done"], last["failed"], last["ended"]) == (wave, done, failed, True)


def test_a_monitor_that_is_lost_does_not_keep_a_rollout(fleet: Fleet) -> None:
    fleet.inventory(sparkfleet_monitoring=True)
    hosts = json.loads((fleet.folder / "hosts.yml").read_text())
    hosts["monitors"] = {"hosts": {"m1": {"ansible_host": "127.0.0.1", "ansible_port": 1}}}
    (fleet.folder / "hosts.yml").write_text(json.dumps(hosts))
    code, printed = fleet.run()
    assert code == 0 and fleet.released() == fleet.names, printed
    assert "the status page on m1 was not updated: " in " ".join(printed.split())
