"""The verb trial with stand-ins for what acts on a Spark: what is asked of whom, in which order."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from sparkfleet_host import measured

from sparkfleet import exit_codes, paths
from sparkfleet.cli import main
from sparkfleet.packaging import host_program
from sparkfleet.planning import calibration
from tests.unit.cli.test_verbs import calls, elsewhere, inventory, overlay
from tests.unit.planning import test_plan

__all__ = ["calls", "elsewhere", "inventory"]  # fixtures

MODULE = """#!/usr/bin/python
# WANT_JSON
import json, pathlib, sys
given = json.load(open(sys.argv[1]))
asked = {{key: value for key, value in given.items() if key in ("to", "mode", "weights", "plan", "compose")}}
with pathlib.Path({path!r}).open("a") as file:
    file.write(json.dumps([{name!r}, asked]) + "\\n")
print(json.dumps({answer!r}))
"""
RECORD = {
    **{"service": test_plan.SERVICE, "repo": "nvidia/Llama-3.1-8B-Instruct-FP8", "image": "i", "at": 5.0},
    **{"figures": {"kv_cache_gib": 95.1}, "planned": {"kv_cache_gib": 95.4}},
}


def journal(**more: Any) -> dict[str, Any]:
    steps = [{"phase": phase, "at": 10.0} for phase in ("stopping", "starting", "waiting", "measuring", "done")]
    return {
        **{"id": "x", "to": 3, "from": 2, "mode": "trial", "models": ["m"], "from_models": ["n"], "phase": "done"},
        **{"steps": steps, "outcome": "restored", "began": 5.0, "ended": 90.0, "out_of_service_s": 60.0},
        **{"measured": {test_plan.SERVICE: RECORD}, **more},
    }


def answers(made: dict[str, Any]) -> dict[str, Any]:
    """Of the modules that act on a Spark which serves: what they return in a trial that ends with this journal."""
    state = test_plan.serving()
    state["os"] |= {"boot_id": "", "machine_id": ""}
    digest = hashlib.sha256(host_program.build(paths.CACHE).read_bytes()).hexdigest()
    state["host_program"] = state["guard"]["program"] = digest
    return {
        "spark_state": {"changed": False, "state": state},
        "release_stage": {"changed": True, "release": 3, "current": 2, "repaired": []},
        "release_switch": {
            **{"changed": False, "id": "x", "joined": False, "already": False, "done": True, "cut": False, "now": 9.0},
            **{"journal": made, "state": "missing", "restart_count": 0, "started_at": ""},
            **{"log_lines": [], "cursor": ""},
        },
    }


@pytest.fixture
def kept() -> Iterator[dict[str, Path]]:
    """Two hosts, and where this machine keeps what is measured there."""
    files = {f"stand-in-{number}": paths.STATE / calibration.FOLDER / f"stand-in-{number}.json" for number in (1, 2)}
    yield files
    for path in files.values():
        path.unlink(missing_ok=True)


@pytest.mark.parametrize(("error", "code"), [(None, 0), ({"message": "no", "failure": "trial-speed"}, 5)])
def test_one_spark_after_the_other_until_one_fails(
    error: Any,
    code: int,
    kept: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ran = tmp_path / "ran"
    modules = {
        f"modules/{name}.py": MODULE.format(path=str(ran), name=name, answer=answer)
        for name, answer in answers(journal(error=error)).items()
    }
    monkeypatch.setenv("ANSIBLE_COLLECTIONS_PATH", str(overlay(tmp_path, modules)))
    local = {"ansible_connection": "local", "ansible_become": False, "ansible_python_interpreter": sys.executable}
    hosts = {name: {"sparkfleet_operator": "nvidia", **local} for name in kept}
    fleet = tmp_path / "fleet.yml"
    fleet.write_text(yaml.safe_dump({"sparks": {"hosts": hosts}}), encoding="utf-8")
    got = main.main(["trial", "llama31-8b-fp8", "-i", str(fleet), "--json"])
    made = json.loads(capsys.readouterr().out)
    lines = [json.loads(line) for line in ran.read_text(encoding="utf-8").splitlines()]
    assert got == code, made
    one = ["spark_state", "release_stage", "release_switch"]
    assert [name for name, _ in lines] == (one * 2 if code == exit_codes.OK else one)
    assert lines[1][1]["plan"]["kind"] == "trial" and "load-format" in lines[1][1]["compose"]
    assert lines[2][1] == {"to": 3, "mode": "trial"}
    first = made["hosts"][0]
    assert first["measured"][test_plan.SERVICE]["figures"] == {"kv_cache_gib": 95.1}
    (record,) = measured.read(kept[first["name"]])
    assert record["figures"] == {"kv_cache_gib": 95.1}
    if code == exit_codes.OK:
        assert [host["result"] for host in made["hosts"]] == ["changed", "changed"]
    else:
        assert first["result"] == "restored" and first["failure"] == "trial-speed"


def test_weights_and_model_are_passed_on(calls: Path, inventory: Path) -> None:
    assert main.main(["trial", "qwen3-32b-fp8", "--weights", "real", "-i", str(inventory)]) == exit_codes.UNREACHABLE
    options = main._parser().parse_args(["trial", "m", "--weights", "real", "--profile", "long"])
    words = main._arguments(options)
    given = {key: value for word in words if word.startswith("{") for key, value in json.loads(word).items()}
    assert given == {"sparkfleet_model": "m", "sparkfleet_profile": "long", "sparkfleet_trial_weights": "real"}
    with pytest.raises(SystemExit):
        main.main(["trial", "m", "--weights", "half"])
