"""Diagnosis from end to end on this machine: the module's parts, the actions, and what the command's exit code says."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import spark_diagnose
from ansible.errors import AnsibleActionFail
from ansible.module_utils.testing import patch_module_args
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import guard
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.docker import Docker
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.releases import Store
from hypothesis import given
from hypothesis import strategies as st

from sparkfleet.cli.runner import Collector
from sparkfleet.diagnosis import diagnose
from sparkfleet.exit_codes import DOWN, DRIFT, OK
from sparkfleet.fleet import drift
from tests.unit.diagnosis.test_diagnose import HEALTHY, ids, known
from tests.unit.fakes import fake_release
from tests.unit.fakes.fake_engine import Engine
from tests.unit.plugins.test_fleet_actions import load

UNIT = {"installed": True, "enabled": True, "active": True, "state": "active"}


class Stage:
    """The action spark_diagnose or spark_drift, run by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, folder: Path) -> None:
        self.printed: list[str] = []
        self.sent: list[dict[str, Any]] = []
        self.action, self.folder = load(name), folder
        monkeypatch.setattr(self.action.display, "display", self.printed.append)

    def run(self, answer: dict[str, Any] | None = None, **given: Any) -> dict[str, Any]:
        plugin = object.__new__(self.action.ActionModule)
        plugin._task = SimpleNamespace(args=given, check_mode=False, async_val=0, diff=False, action="x")
        plugin._connection = SimpleNamespace(_shell=SimpleNamespace(tmpdir=None), has_pipelining=True)
        plugin._early_needs_tmp_path = lambda: False
        plugin._loader = SimpleNamespace(path_dwim=lambda path: str(self.folder / path))

        def execute(module_name: str, module_args: dict[str, Any], task_vars: dict[str, Any]) -> dict[str, Any]:
            self.sent.append(module_args)
            return copy.deepcopy(answer or {})

        plugin._execute_module = execute
        found: dict[str, Any] = plugin.run(task_vars={"inventory_hostname": "spark-1"})
        return found


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Stage:
    return Stage(monkeypatch, "spark_diagnose", tmp_path)


def facts(**changes: Any) -> dict[str, Any]:
    return {"facts": known(**changes)}


def test_all_is_well(stage: Stage, tmp_path: Path) -> None:
    made = stage.run(facts(), project_dir="/p", report="reports/a.json", bundles="bundles")
    assert not made.get("failed") and made["findings"] == [] and made["serves"] and made["changed"] is False
    assert stage.sent == [{"project_dir": "/p"}]  # what is the controller's own is not sent
    assert json.loads((tmp_path / "reports" / "a.json").read_text())["host"] == "spark-1"
    assert Path(made["bundle"]).parent == tmp_path / "bundles"
    assert stage.printed[0].startswith("spark-1  nothing is wrong: engine")


def test_something_is_wrong(stage: Stage) -> None:
    lost = {**HEALTHY["commands"], "nvidia-smi": ["No devices were found", "(exit code 6)"]}
    made = stage.run(facts(commands=lost))
    assert made["failed"] and made["failure"] == "gpu-lost" and made["serves"]
    assert made["msg"] == "spark-1: it serves; found: gpu-lost"
    assert "Reboot the host" in stage.printed[0]


def test_what_is_over_or_harmless_does_not_fail(stage: Stage) -> None:
    restarts = [{"at": 1.0, "reason": "crash", "detail": "exit code 1"}]
    assert not stage.run(facts(record={"restarts": restarts})).get("failed")
    line = "WARNING: Found GPU0 NVIDIA GB10 which is of cuda capability 12.1."
    assert not stage.run(facts(container={"log": [line]})).get("failed")


def test_an_answer_without_facts_is_passed_on(stage: Stage) -> None:
    assert stage.run({"failed": True, "msg": "no python"})["msg"] == "no python"


def test_a_folder_that_cannot_be_written_is_named(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(AnsibleActionFail, match=r"file.*choose another path"):
        stage.run(facts(), report="file/a.json")


@pytest.mark.parametrize(
    ("serves", "failed", "code"), [(True, False, OK), (True, True, DRIFT), (False, True, DOWN)], ids=str
)
def test_the_exit_code(serves: bool, failed: bool, code: int) -> None:
    collector = Collector(lambda host, line: None)
    res = {"diagnosed": True, "serves": serves, "findings": [{"id": "x"}] if failed else [], "failed": failed}
    data = {"host": "spark-1", "task_action": "spark_diagnose", "res": {**res, "msg": "spark-1: found: x"}}
    collector.take({"event": "runner_on_failed" if failed else "runner_on_ok", "event_data": data})
    assert collector.code(2 if failed else 0) == code


def test_drift_is_a_line_a_difference(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stage = Stage(monkeypatch, "spark_drift", tmp_path)
    monkeypatch.setattr(drift, "reasons", lambda plan, state, answers: ["a → b"] if answers is False else [])
    same = stage.run(inspection={"plan": {}, "state": {}}, verified={"verified": True})
    assert not same.get("failed") and same["drift"] == [] and same["changed"] is False
    assert stage.printed == ["spark-1  matches the inventory"]
    other = stage.run(inspection={"plan": {}, "state": {}}, verified={"verified": False})
    assert other["failed"] and other["drift"] == ["a → b"]
    assert other["msg"] == "spark-1 differs from the inventory:\n  a → b"
    assert stage.sent == []


# -- findings ---------------------------------------------------------------------------------------------------------

GONE = {"current": None, "switch_active": False, "numbers": [1, 2], "outcomes": {"1": {"verified_at": 5.0}, "2": None}}
DOWN_STATUS = {"healthy": False}
STOPPED = {"state": "exited", "exit_code": 0, "oom_killed": False, "error": "", "log": []}
BRIDGE = "failed to create endpoint m on network n: adding interface veth6 to bridge br-1 failed: Device does not exist"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"commands": {"nvidia-smi": ["No devices were found", "(exit code 6)"]}}, ["gpu-lost"]),
        ({"commands": {"kernel": ["spark kernel: NVRM: Xid (PCI:000f:01:00): 79, GPU has fallen off"]}}, ["gpu-lost"]),
        ({"status": {"releases": GONE}}, ["release-damaged"]),
        ({"status": {"releases": {**GONE, "numbers": []}, "containers": []}, "engines": []}, ["nothing-deployed"]),
        ({"status": {"releases": {**GONE, "outcomes": {"1": {"state": "failed"}}}}}, ["nothing-deployed"]),
        ({"cache": {"path": "/opt/hf", "empty": True, "fstab": "/opt/hf"}}, ["cache-not-mounted"]),
        ({"damaged_models": [{"repo": "a/b", "commit": "c", "names": ["m.safetensors"]}]}, ["download-incomplete"]),
        ({"damaged_models": [{"repo": "a/b", "commit": "c", "names": [], "more": 2}]}, ["download-incomplete"]),
        ({"unchecked_models": 3}, ["models-unchecked"]),
        (
            {"status": DOWN_STATUS, "asked": None, "container": {**STOPPED, "exit_code": 77}, "unchecked_models": 3},
            ["engine-died", "models-unchecked"],
        ),
        ({"guard_unit": {**UNIT, "active": False, "state": "failed"}}, ["guard-down"]),
        (
            {"guard_unit": UNIT, "guard": {"boot_id": "b", "clock": 10.0}, "boot_id": "b", "clock": 500.0},
            ["guard-stuck"],
        ),
        ({"record": {"stalls": True, "slow": True}}, ["engine-stalls"]),
        (
            {"status": DOWN_STATUS, "asked": None, "container": STOPPED, "image": {"ref": "i", "present": False}},
            ["image-missing", "engine-stopped"],
        ),
        (
            {"status": DOWN_STATUS, "asked": None, "container": None, "image": {"ref": "i", "present": False}},
            ["image-missing", "container-missing"],
        ),
        (
            {
                "status": DOWN_STATUS,
                "asked": None,
                "container": None,
                "name_holder": {"name": "vllm-m", "image": "nginx"},
            },
            ["name-taken", "container-missing"],
        ),
        (
            {"status": DOWN_STATUS, "asked": None, "container": {**STOPPED, "exit_code": 128, "error": BRIDGE}},
            ["network-missing"],
        ),
        (
            {"status": DOWN_STATUS, "asked": None, "container": {**STOPPED, "exit_code": 128, "error": "odd"}},
            ["docker"],
        ),
        ({"status": DOWN_STATUS, "asked": None, "container": {**STOPPED, "exit_code": 77}}, ["engine-died"]),
        (
            {
                **{"status": DOWN_STATUS, "asked": None, "container": STOPPED},
                "record": {"given_up": {"reason": f"Docker could not start it in 3 tries: {BRIDGE}", "log": []}},
            },
            ["network-missing", "guard-gave-up"],
        ),
        (
            {
                **{"status": DOWN_STATUS, "asked": None},
                "container": {
                    **STOPPED,
                    "exit_code": 1,
                    "log": ["ValueError: Weight files referenced in index but missing"],
                },
            },
            ["download-incomplete"],
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong(changes: dict[str, Any], expected: list[str]) -> None:
    assert ids(**changes) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"guard_unit": {**UNIT, "active": False, "enabled": False, "state": "inactive"}},  # not wanted
        {"guard_unit": {**UNIT, "installed": False}},
        {"guard_unit": UNIT, "guard": {"boot_id": "b", "clock": 450.0}, "boot_id": "b", "clock": 500.0},
        {"guard_unit": UNIT, "guard": {"boot_id": "before", "clock": 10.0}, "boot_id": "b", "clock": 500.0},
        {"guard_unit": UNIT, "guard": {}, "boot_id": "", "clock": 500.0},
        {"cache": {"path": "/opt/hf", "empty": False, "fstab": ""}, "image": {"ref": "i", "present": True}},
    ],
)
def test_what_is_not(changes: dict[str, Any]) -> None:
    assert ids(**changes) == []


@given(
    state=st.sampled_from(("missing", "exited", "restarting", "running", "paused", "odd")),
    exit_code=st.integers(0, 300),
    error=st.sampled_from(("", BRIDGE, "odd")),
    log=st.lists(st.sampled_from(("", "INFO ok", "Found GPU0 which is of cuda capability 12.1.", "x")), max_size=2),
    oom_killed=st.booleans(),
    docker=st.booleans(),
    current=st.sampled_from((None, 1)),
    gone=st.booleans(),
)
def test_what_does_not_serve_is_never_well(
    state: str, exit_code: int, error: str, log: list[str], oom_killed: bool, docker: bool, current: Any, gone: bool
) -> None:
    seen = {"state": state, "exit_code": exit_code, "error": error, "log": log, "oom_killed": oom_killed}
    status = {"docker": docker, "healthy": False, "releases": {"current": current, "switch_active": False}}
    facts = known(status=status, container=None if gone else seen, asked=None)
    facts["commands"] = {"ports": []}
    found = diagnose.findings(facts)
    assert diagnose.wrong(found), page_of(found)


def page_of(found: list[diagnose.Finding]) -> str:
    return diagnose.page("spark-1", found, "")


def test_an_xid_that_the_engine_got_over_is_before() -> None:
    from sparkfleet.diagnosis.diagnose import findings, wrong  # noqa: PLC0415

    kernel = ["spark kernel: NVRM: Xid (PCI:000f:01:00): 31, pid=5, name=VLLM"]
    found = findings({**HEALTHY, "commands": {**HEALTHY["commands"], "kernel": kernel}})
    assert [(item.id, item.now) for item in found] == [("gpu-xid", False)] and wrong(found) == []


# -- the module -------------------------------------------------------------------------------------------------------

SERVICE = "vllm-m"


@pytest.fixture
def host(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> SimpleNamespace:
    """A host with nothing but Docker, on which the module runs."""
    monkeypatch.setattr(spark_diagnose, "Docker", lambda timeout: Docker(str(engine.server_address), timeout))
    monkeypatch.setattr(spark_diagnose, "COMMANDS", {"echo": ["sh", "-c", "echo hf_abcdefghijkl; exit 6"]})
    monkeypatch.setattr(spark_diagnose, "GUARD_SETTINGS", str(tmp_path / "guard.json"))
    monkeypatch.setattr(spark_diagnose, "FSTAB", str(tmp_path / "fstab"))
    monkeypatch.setattr(
        spark_diagnose, "unit_state", lambda name: {"ActiveState": "failed", "UnitFileState": "enabled"}
    )
    engine.routes["GET", "/containers/json"] = []
    folder = {"project_dir": tmp_path / "project", "state_dir": tmp_path / "state", "cache_dir": tmp_path / "hf"}

    def run() -> dict[str, Any]:
        given = {key: str(path) for key, path in folder.items()}
        with patch_module_args({**given, "token_file": str(tmp_path / "token")}), pytest.raises(SystemExit):
            spark_diagnose.main()
        found: dict[str, Any] = json.loads(capsys.readouterr().out)["facts"]
        return found

    return SimpleNamespace(run=run, path=tmp_path, engine=engine, **folder)


def test_a_bare_host(host: SimpleNamespace) -> None:
    found = host.run()
    assert found["guard"] is None and found["damaged_state"] == [] and found["damaged_models"] == []
    assert found["commands"]["echo"] == ["***", "(exit code 6)"]
    assert found["cache"] == {"path": str(host.cache_dir), "empty": True, "fstab": ""}
    assert found["guard_unit"]["state"] == "failed" and found["settings_error"] == ""
    assert abs(found["clock"] - guard.clock()) < 60 and found["boot_id"]


@pytest.mark.parametrize("text", ["{", '{"restarts": 7}', "[]"])
def test_damaged_files_are_named(host: SimpleNamespace, text: str) -> None:
    host.state_dir.mkdir()
    (host.state_dir / "guard-state.json").write_text(text)
    now = int(time.time())
    (host.state_dir / f"switch.json.damaged-{now}").write_text("{")
    (host.state_dir / f"switch.json.damaged-{now - 30 * 86400}").write_text("{")  # long ago
    (host.path / "guard.json").write_text('{"interval": "x"}')
    found = host.run()
    assert found["guard"] is None and len(found["damaged_state"]) == 2
    assert "guard-state.json: " in found["damaged_state"][0] and f"damaged-{now}" in found["damaged_state"][1]
    assert "guard.json: interval: not a number" in found["settings_error"]


def test_what_the_check_of_the_models_found_is_named(host: SimpleNamespace) -> None:
    host.state_dir.mkdir()
    entry = {"repo": "a/b", "commit": "c" * 40, "checked": 1, "damaged": ["m"], "missing": [], "more": 2, "error": ""}
    reported = {"version": 1, "models": {f"a/b@{'c' * 40}": entry}, "left_out": 3}
    (host.state_dir / "integrity.json").write_text(json.dumps(reported))
    found = host.run()
    assert found["damaged_models"] == [{"repo": "a/b", "commit": "c" * 40, "names": ["m"], "more": 2}]
    assert found["unchecked_models"] == 3


@pytest.mark.parametrize(
    ("names", "more", "output"),
    [
        (["a"], 0, "the hash of a is wrong"),
        (["a", "b", "c", "d"], 5, "the hash of a, b, c and 6 more is wrong"),
        ([], 2, "the hash of 2 files is wrong"),
    ],
)
def test_damaged_files_are_counted(names: list[str], more: int, output: str) -> None:
    damaged = [{"repo": "o/m", "commit": "c", "names": names, "more": more}]
    assert diagnose.findings({**HEALTHY, "damaged_models": damaged})[0].evidence == (f"o/m: {output}",)


def test_a_mount_that_is_missing_is_named(host: SimpleNamespace) -> None:
    (host.path / "fstab").write_text(f"# x\nUUID=1 / ext4\n/dev/sdb1 {host.cache_dir} xfs defaults 0 0\nbad\n")
    assert host.run()["cache"]["fstab"] == str(host.cache_dir)
    (host.cache_dir / "models--a--b").mkdir(parents=True)
    assert host.run()["cache"]["empty"] is False


def test_image_and_name_of_the_current_release(host: SimpleNamespace) -> None:
    store = Store(host.project_dir, host.state_dir)
    made = fake_release.an_engine(SERVICE, 1, image="reg/i:1")
    store.commit(store.stage("services: {}\n", fake_release.plan(made), fake_release.lock(made)), 1.0)
    other = {"Id": "ab" * 32, "State": {}, "Config": {"Image": "nginx", "Labels": {}}}
    host.engine.routes["GET", f"/containers/{SERVICE}/json"] = other
    (found,) = host.run()["engines"]
    assert found["image"] == {"ref": "reg/i:1", "present": False}
    assert found["name_holder"] == {"name": SERVICE, "image": "nginx"}
    host.engine.routes["GET", "/images/reg/i:1/json"] = {"Id": "sha256:1"}
    other["Config"]["Labels"] = {"com.docker.compose.project": "sparkfleet"}
    (found,) = host.run()["engines"]
    assert found["image"]["present"] is True and found["name_holder"] is None
