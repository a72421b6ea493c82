"""A rollout on paper: a fleet of 200, in seconds, with nobody contacted."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparkfleet import SparkfleetError, dry


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
    began = time.monotonic()
    command = [Path(sys.executable).with_name("sparkfleet"), "rollout", "--dry", "-i", str(inventory), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr, time.monotonic() - began


def test_two_hundred_sparks(tmp_path: Path) -> None:
    inventory = fleet(tmp_path, 200, sparkfleet_rollout_waves="10%")
    code, said, seconds = run(inventory, "--json")
    made = json.loads(said)
    assert code == 0 and made["fits"] is True and seconds < 10
    assert {kind["model"]: len(kind["hosts"]) for kind in made["kinds"]} == {
        "llama31-8b-fp8": 149,
        "gpt-oss-120b": 49,
    }
    assert [len(wave) for wave in made["waves"][:3]] == [1, 1, 19] and sum(map(len, made["waves"])) == 198
    assert made["drained"] == ["spark-007", "spark-008"]
    code, said, _ = run(inventory)
    assert "(149 Sparks): llama31-8b-fp8" in said and "rollout  wave 1 of 13: spark-001" in said


def test_what_does_not_work_is_told_for_all_at_once(tmp_path: Path) -> None:
    inventory = fleet(tmp_path, 8, sparkfleet_vllm_max_model_len="abc")
    code, said, _ = run(inventory)
    assert code == 3 and said.count("NO  ") == 2 and "sparkfleet_vllm_max_model_len" in said


def test_what_a_limit_leaves(tmp_path: Path) -> None:
    code, said, _ = run(fleet(tmp_path, 8), "-l", "spark-001,spark-002", "-e", "sparkfleet_profile=low_latency")
    assert code == 0 and "spark-001, spark-002: llama31-8b-fp8 (low_latency)" in said
    code, said, _ = run(tmp_path, "-l", "nobody")
    assert code == 2 and "spark" in said


def test_a_plan_that_does_not_fit() -> None:
    paper = dry.make({"s1": {"sparkfleet_model": "llama33-70b-fp8", "sparkfleet_vllm_max_model_len": 1_000_000}})
    assert not paper.fits and "NO  " in dry.page(paper)


def test_a_policy_is_one() -> None:
    with pytest.raises(SparkfleetError, match="sparkfleet_rollout_canary is 1 for s1 and 2 for s2"):
        dry.make({"s1": {}, "s2": {"sparkfleet_rollout_canary": 2}})
