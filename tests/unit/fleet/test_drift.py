"""How a Spark differs from the inventory, in words."""

from __future__ import annotations

import copy
from typing import Any

import yaml

from sparkfleet.fleet import drift
from sparkfleet.fleet.drift import differences
from sparkfleet.planning import compose
from sparkfleet.planning.target import Settings, Target

DOCUMENT = Target.of(Settings(model="llama31-8b-fp8")).document()
CLEAN: dict[str, Any] = {
    "prepare": {"needed": False, "docker": [], "guard_settings": {"interval": 2}},
    "fetch": {"needed": False, "image": [], "model": []},
    "deploy": {"stage": [], "start": [], "stop": [], "stop_services": [], "wait": []},
    "compose": DOCUMENT,
}
STATE = {"compose_file": yaml.safe_dump(DOCUMENT), "engines": [{"healthy": True}]}


def plan(**changes: Any) -> dict[str, Any]:
    made = copy.deepcopy(CLEAN)
    for stage, values in changes.items():
        made[stage].update(values)
    return made


def test_a_spark_as_the_inventory_says() -> None:
    assert drift.reasons(CLEAN, STATE) == [] and drift.reasons(CLEAN, STATE, True) == []
    assert drift.reasons(CLEAN, STATE, False) == ["the endpoint does not answer its question"]


def test_reasons_of_the_plan_are_named() -> None:
    made = plan(prepare={"docker": ["install Docker"]}, fetch={"image": ["pull i:2"]}, deploy={"wait": ["wait for x"]})
    assert drift.reasons(made, STATE) == ["install Docker", "pull i:2", "wait for x"]


def test_what_is_deployed_is_compared_line_by_line() -> None:
    settings = Settings(model="llama31-8b-fp8", arguments={"max_num_seqs": 4}, environment={"A": "1"}, port=8001)
    made = plan(deploy={"stage": ["stage a release after 1"], "start": ["switch to it"]})
    made["compose"] = Target.of(settings).document()
    assert drift.reasons(made, STATE) == [
        "ports: 8000:8000 → 8001:8000",
        "argument --max-num-seqs: 64 → 4",
        "environment A: none → 1",
    ]
    assert drift.reasons(made, {**STATE, "engines": [{"healthy": False}]})[-1] == "the engine does not answer"
    assert drift.reasons(made, {"compose_file": None}) == ["nothing is deployed"]


def test_a_key_is_told_as_a_secret() -> None:
    made = plan(deploy={"stage": ["stage a release after 1"], "start": ["switch to it"]})
    made["compose"] = Target.of(Settings(model="llama31-8b-fp8", engine_key="k" * 8)).document()
    assert drift.reasons(made, STATE) == ["secrets: none → engine_key"]


def test_another_image_is_one_line() -> None:
    digest = "sha256:" + "ab" * 32
    known = Target.of(Settings(model="llama31-8b-fp8")).document(
        {"engines": [{"image": {"digest": digest}, "model": {"commit": "c" * 40, "complete": True}}]}
    )
    said = differences(known, {**DOCUMENT})
    assert said[0] == "image: nvcr.io/nvidia/vllm:25.09-py3@sha256:abababababab → nvcr.io/nvidia/vllm:25.09-py3"
    assert f"argument --revision: {'c' * 40} → none" in said


def test_another_model_is_another_service() -> None:
    other = Target.of(Settings(model="gpt-oss-120b")).document()
    said = differences(DOCUMENT, other)
    assert said[0] == "service: vllm-llama31-8b-fp8 → vllm-gpt-oss-120b"
    assert "argument model: nvidia/Llama-3.1-8B-Instruct-FP8 → openai/gpt-oss-120b" in said


def test_the_same_written_in_another_way() -> None:
    assert differences(DOCUMENT, DOCUMENT) == ["the compose file is written in another way"]


def test_several_services_are_compared_by_name() -> None:
    one, two = Target.of(Settings(model="llama31-8b-fp8")), Target.of(Settings(model="qwen3-8b-fp8", port=8001))
    both = compose.merged([one.document(), two.document()])
    changed = Target.of(Settings(model="qwen3-8b-fp8", port=8002)).document()
    said = differences(both, compose.merged([one.document(), changed]))
    assert said == ["vllm-qwen3-8b-fp8: ports: 8001:8000 → 8002:8000"]
    assert differences(one.document(), both) == ["service: none → vllm-qwen3-8b-fp8"]
    assert differences(both, one.document()) == ["service: vllm-qwen3-8b-fp8 → none"]
