"""Engines that start on demand behind HAProxy, with the real guard."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.fakes.engine_host import FIRST, QUESTION, SECOND, Host
from tests.unit.fakes.fake_engine import Engine
from tests.unit.roles.haproxy import LLAMA, OSS, Answer, Gateway, running

REPOS = {FIRST: LLAMA, SECOND: OSS}


@pytest.fixture
def spark(engine: Engine, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Host]:
    made = Host(engine, tmp_path / "host", **{"load_seconds": 0.5, "repos": REPOS, **getattr(request, "param", {})})
    yield made
    made.close()


@pytest.fixture
def gateway(spark: Host, tmp_path: Path) -> Iterator[Gateway]:
    """HAProxy for the inventory of the host."""
    engines = [
        {"model": model, "port": spark.door[service], "on_demand": True, "loopback_port": spark.ports[service]}
        for model, service in (("llama31-8b-fp8", FIRST), ("gpt-oss-120b", SECOND))
    ]
    place = {"ansible_host": "127.0.0.1", "sparkfleet_guard_port": spark.guard_port, "sparkfleet_engines": engines}
    with running(tmp_path / "gateway", {"spark-1": place}, gateway_answer_timeout="30s") as made:
        made.until(llama31_8b_fp8_spark_1="UP", gpt_oss_120b_spark_1="UP")
        yield made


def chat(gateway: Gateway, repo: str) -> Answer:
    body = {"model": repo, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 32}
    return gateway.ask("/v1/chat/completions", body=json.dumps(body).encode())


@pytest.mark.parametrize("spark", [{"on_demand_min_seconds": 0.5}], indirect=True)
def test_the_gateway_loses_no_request_while_engines_take_turns(spark: Host, gateway: Gateway) -> None:
    assert gateway.ask("/v1/models", "GET").status == 200 and spark.did == ["start vllm-a"]
    over, results = threading.Event(), []

    def client(repo: str) -> None:
        while not over.is_set():
            began = time.monotonic()
            answer: Any = chat(gateway, repo)
            results.append((answer.status == 200 and "Paris" in answer.body, time.monotonic() - began, answer))

    threads = [threading.Thread(target=client, args=(repo,), daemon=True) for repo in (LLAMA, OSS, LLAMA, OSS)]
    for thread in threads:
        thread.start()
    spark.until(lambda: len(spark.did) >= 1 + 5, 60)  # three starts
    over.set()
    for thread in threads:
        thread.join(30)
    lost = [result for result in results if not result[0]]
    print(
        f"{len(results)} requests, {len(lost)} lost, slowest {max(result[1] for result in results):.1f} s, {spark.did}"
    )
    assert not lost, (lost[:3], spark.said())


@pytest.mark.parametrize("spark", [{"on_demand_wait": "refuse", "load_seconds": 2.0}], indirect=True)
def test_the_gateway_passes_on_when_to_come_again(spark: Host, gateway: Gateway) -> None:
    answer = chat(gateway, LLAMA)
    assert answer.status == 503 and 1 <= int(answer.headers["retry-after"]) <= 60
    assert json.loads(answer.body)["error"]["code"] == 503
    spark.until(lambda: chat(gateway, LLAMA).status == 200)


def test_one_that_was_stopped_is_down_for_the_gateway(spark: Host, gateway: Gateway) -> None:
    spark.store.halt(True)
    gateway.until(llama31_8b_fp8_spark_1="DOWN", gpt_oss_120b_spark_1="DOWN")
    assert chat(gateway, LLAMA).status == 503 and spark.did == ["start vllm-a"]
