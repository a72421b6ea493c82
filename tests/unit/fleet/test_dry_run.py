"""A rollout on paper: a fleet of 200, in seconds, with no host contacted."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparkfleet import SparkfleetError
from sparkfleet.fleet import dry_run


def fleet(folder: Path, count: int, **group: Any) -> Path:
    """An inventory of so many Sparks, a quarter of them with another model, two drained."""
    hosts = {
        f"spark-{number:03}": {
            "ansible_host": f"192.0.2.{number}",
            **({"sparkfleet_model": "{{ 'gpt' ~ '-oss-120b' }}"} if number % 4 == 0 else {}),
            **({"sparkfleet_drained": True} if number in (7, 8) else {}),
        }
        for number in range(1, count + 1)
    }
    (folder / "group_vars").mkdir()
    (folder / "hosts.yml").write_text(yaml.safe_dump({"sparks": {"hosts": hosts}}), encoding="utf-8")
    (folder / "group_vars" / "sparks.yml").write_text(yaml.safe_dump(group), encoding="utf-8")
    return folder


def run(inventory: Path, *words: str) -> tuple[int, str, float]:
    """Exit code, output, and seconds of a processor: other tests run beside this one."""
    began = _seconds()
    command = [Path(sys.executable).with_name("sparkfleet"), "rollout", "--dry", "-i", str(inventory), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr, _seconds() - began


def _seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_two_hundred_sparks(tmp_path: Path) -> None:
    inventory = fleet(tmp_path, 200, sparkfleet_rollout_waves="10%")
    code, printed, seconds = run(inventory, "--json")
    made = json.loads(printed)
    assert code == 0 and made["fits"] is True and seconds < 10
    assert {kind["engines"][0]["model"]: len(kind["hosts"]) for kind in made["kinds"]} == {
        "llama31-8b-fp8": 149,
        "gpt-oss-120b": 49,
    }
    assert [len(wave) for wave in made["waves"][:3]] == [1, 1, 19] and sum(map(len, made["waves"])) == 198
    assert made["drained"] == ["spark-007", "spark-008"]
    code, printed, _ = run(inventory)
    assert "(149 Sparks): llama31-8b-fp8" in printed and "rollout  wave 1 of 13: spark-001" in printed


def test_what_does_not_work_is_told_for_all_at_once(tmp_path: Path) -> None:
    inventory = fleet(tmp_path, 8, sparkfleet_vllm_max_model_len="abc")
    code, printed, _ = run(inventory)
    assert code == 2 and printed.count("sparkfleet_vllm_max_model_len: must be a whole number") == 2


def test_what_a_limit_leaves(tmp_path: Path) -> None:
    code, printed, _ = run(fleet(tmp_path, 8), "-l", "spark-001,spark-002", "-e", "sparkfleet_profile=low_latency")
    assert code == 0 and "spark-001, spark-002: llama31-8b-fp8 (low_latency)" in printed
    code, printed, _ = run(tmp_path, "-l", "nobody")
    assert code == 2 and "spark" in printed


def test_a_plan_that_does_not_fit() -> None:
    paper = dry_run.make({"s1": {"sparkfleet_model": "llama33-70b-fp8", "sparkfleet_vllm_max_model_len": 1_000_000}})
    assert not paper.fits and "NO  " in dry_run.page(paper)


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("image", "x y", "must be the reference of an image"),
        ("image", "nvcr.io/nvidia/vllm:25.09-py3\n", "must be the reference of an image"),
        ("revision", "../../x", "must be a branch, tag or commit"),
        ("revision", "main\n", "must be a branch, tag or commit"),
        ("port", "80; touch /tmp/x", "must be a whole number from 1 to 65535, not '80; touch /tmp/x'"),
        ("port", 0, "from 1 to 65535, not 0"),
        ("port", 70000, "from 1 to 65535, not 70000"),
        ("port", 9109, "is sparkfleet_port already"),
        ("port", True, "not True"),
        pytest.param("port", 10**5000, "a number of thousands of digits", id="port"),
        ("model", 1, "sparkfleet_model: must be text, not the number 1: write the value in quotes"),
        ("model", ["a"], "must be a text"),
        ("model", "~nosuchuser/x.yml", "nosuchuser"),
        ("model", "a" * 5000 + ".yml", "sparkfleet_model"),
        ("profile", {"a": 1}, "must be a text"),
        ("memory_reserve_gib", float("nan"), "must be a number from 0 to 1000"),
        ("memory_reserve_gib", "1e999", "must be a number from 0 to 1000"),
        ("memory_plan", "perhaps", "must be one of enforce, warn"),
        ("tool_calls", "perhaps", "must be true or false"),
        ("guard_interval", 0, "must be a number from 0.1 to 3600"),
        ("cache_dir", "opt/hf", "must be an absolute path"),
        ("cache_dir", "/opt/../etc", "must be an absolute path"),
        ("environment", {1: "x"}, "the key '1' is not a text"),
        ("environment", ["x"], "must be a mapping"),
        ("listen", "somewhere", "write auto, all, loopback"),
        pytest.param("rollout_waves", 10**5000, "is not a number within its limits", id="rollout_waves"),
        ("rollout_waves", 2.5, "2.5 is not a wave size"),
        ("rollout_canary", -1, "from 0 to 10000"),
        ("max_num_seqs", 8, "did you mean sparkfleet_vllm_max_num_seqs?"),
        ("modell", "x", "did you mean sparkfleet_model?"),
        pytest.param("vllm_max_num_seqs", 10**5000, "is not a number within its limits", id="vllm_max_num_seqs"),
        ("vllm_hf_overrides", {1: 2}, "sparkfleet_vllm_hf_overrides: the key '1' is not a text"),
        ("vllm_port", 9000, "set sparkfleet_port instead"),
        ("engine_key", "geheim", "sparkfleet_engine_key: must be a key of 8 characters or more"),
    ],
)
def test_bad_variables(name: str, value: Any, complaint: str) -> None:
    with pytest.raises(SparkfleetError) as raised:
        dry_run.make({"s1": {f"sparkfleet_{name}": value}})
    assert complaint in str(raised.value)
    assert "geheim" not in str(raised.value)


def test_whom_alerts_go_to_is_checked_where_monitoring_is_on() -> None:
    values = {"sparkfleet_alert_webhook": "http://geheim:port/hook"}
    assert dry_run.make({"s1": values}).fits
    with pytest.raises(SparkfleetError) as raised:
        dry_run.make({name: {**values, "sparkfleet_monitoring": "yes"} for name in ("s1", "s2")})
    assert str(raised.value).startswith("s1, s2: sparkfleet_alert_webhook: has neither a name nor an address of a host")
    assert "geheim" not in str(raised.value)


def test_words_of_the_command_line_are_numbers_where_numbers_are_wanted() -> None:
    paper = dry_run.make(
        {"s1": {"sparkfleet_port": "8001", "sparkfleet_memory_reserve_gib": "6", "sparkfleet_drained": "no"}}
    )
    (planned,) = paper.kinds[0].engines
    assert planned.plan and planned.plan["reserve_gib"] == 6 and not paper.drained


def test_a_policy_is_one() -> None:
    with pytest.raises(SparkfleetError, match="sparkfleet_rollout_canary is 1 for s1 and 2 for s2"):
        dry_run.make({"s1": {}, "s2": {"sparkfleet_rollout_canary": 2}})
