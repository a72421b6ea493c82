"""Findings from what a Spark shows: the cause first, what follows from it after."""

from __future__ import annotations

import copy
import json
import stat
import tarfile
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.redaction import redact, redacted

from sparkfleet.diagnosis import diagnose, failures
from sparkfleet.diagnosis.diagnose import findings, page

ENGINE: dict[str, Any] = {
    **{"service": "vllm-m", "model": "m", "repo": "org/m", "port": 8000, "memory": {"decode_tok_s_limit": 30.0}},
    **{"healthy": True, "image": {"ref": "i", "present": True}, "name_holder": None},
    "guard": {"restarts": [], "given_up": None, "slow": False, "forgiven": 0},
    "container": {"state": "running", "exit_code": 0, "oom_killed": False, "error": "", "log": ["INFO all is well"]},
    "asked": {"verified": True, "checks": [], "tokens_per_second": 20.0},
}
HEALTHY: dict[str, Any] = {
    "status": {"docker": True, "healthy": True, "releases": {"current": 1, "switch_active": False}},
    "switch": {"phase": "done", "outcome": "verified", "error": None, "to": 1},
    "guard": {},
    "failed": {},
    "memory": {},
    "disk": [{"path": "/opt/hf", "free": 500 * 10**9, "inodes": 10**6}],
    "engines": [ENGINE],
    "commands": {"ports": ['LISTEN 0 4096 0.0.0.0:8000 users:(("docker-proxy",pid=1,fd=7))'], "nvidia-smi": ["GB10"]},
}


def known(**changes: Any) -> dict[str, Any]:
    """The facts of a host with one engine. Of the changes, those of `container`, `asked`, `image`, `name_holder` and
    `record` (the guard's) are of the engine, and it is as healthy as the host."""
    facts = copy.deepcopy(HEALTHY)
    engine = facts["engines"][0]
    for key, value in changes.items():
        name = "guard" if key == "record" else key
        part = engine if key == "record" or (key in ENGINE and key != "guard") else facts
        part[name] = {**part[name], **value} if isinstance(value, dict) and isinstance(part.get(name), dict) else value
    engine["healthy"] = bool(facts["status"].get("healthy"))
    return facts


def ids(**changes: Any) -> list[str]:
    return [item.id for item in findings(known(**changes))]


def down(**engine: Any) -> dict[str, Any]:
    """The engine has ended."""
    status = {**HEALTHY["status"], "healthy": False}
    return {"status": status, "container": {"state": "exited", **engine}, "asked": None, "commands": {"ports": []}}


def test_nothing_is_wrong() -> None:
    assert findings(HEALTHY) == []
    assert page("spark-1", [], "all of it") == "spark-1  nothing is wrong: all of it"


def test_a_harmless_line_is_said_as_such() -> None:
    line = "WARNING: Found GPU0 NVIDIA GB10 which is of cuda capability 12.1."
    assert ids(container={"log": [line]}) == ["capability-warning"]
    (found,) = findings(known(container={"log": [line]}))
    assert "harmless" in page("spark-1", [found], "")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            down(exit_code=1, log=["ValueError: Free memory on device (1/2 GiB) on startup is less than desired GPU"]),
            [],
        ),
        (down(exit_code=137, log=[]), ["engine-killed"]),
        (down(exit_code=137, oom_killed=True, log=[]), ["out-of-memory"]),
        (down(exit_code=0, log=[]), ["engine-stopped"]),
        (
            {"container": None, "status": {"healthy": False}, "asked": None, "commands": {"ports": []}},
            ["container-missing"],
        ),
        (
            {**down(log=[]), "commands": {"ports": ['LISTEN 0 5 0.0.0.0:8000 users:(("python3",pid=9,fd=3))']}},
            ["port-taken", "engine-stopped"],
        ),
        ({"status": {"docker": False, "healthy": False}, "container": None, "asked": None}, ["docker"]),
        ({"disk": [{"path": "/opt/hf", "free": 10**6, "inodes": 5}]}, ["disk-full"]),
        ({"commands": {"nvidia-smi": ["NVIDIA-SMI has failed because it couldn't communicate"]}}, ["gpu-invisible"]),
        ({"asked": {"tokens_per_second": 3.0}}, ["low-throughput"]),
        ({"record": {"slow": True, "tokens_per_second": 2.5}}, ["low-throughput"]),
        ({"status": {"healthy": False}, "asked": None}, ["endpoint-down"]),
        ({"status": {"healthy": False}, "container": {"state": "paused"}, "asked": None}, ["endpoint-down"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_now(changes: dict[str, Any], expected: list[str]) -> None:
    assert ids(**changes) == (expected or ["memory-refused"])


def test_an_answer_that_is_wrong_comes_with_what_was_said() -> None:
    bad = {"name": "chat", "ok": False, "detail": 'expected "Paris", got "Rome"'}
    asked = {"verified": False, "failure": "answer-wrong", "checks": [bad]}
    (found,) = findings(known(asked=asked))
    assert found.id == "answer-wrong" and found.now and "Rome" in found.evidence[0]


def test_a_release_that_was_taken_back_says_why() -> None:
    log = ["vllm: error: unrecognized arguments: --x"]
    error = {"message": "vllm-m ended", "failure": "", "state": "restarting", "exit_code": 2, "log": log}
    journal = {"phase": "done", "outcome": "restored", "to": 2, "models": ["m"], "error": error}
    found = findings({**HEALTHY, "switch": journal})
    assert [(item.id, item.now) for item in found] == [("argument-unknown", False), ("switch-restored", False)]
    assert ids(switch={**journal, "outcome": "failed"}) == ["switch-not-restored", "argument-unknown"]


def test_a_switch_that_runs_or_was_cut() -> None:
    journal = {"phase": "waiting", "controller": "alice@laptop", "verb": "site.yml", "outcome": None}
    assert ids(switch=journal) == ["switch-interrupted"]
    releases = {"current": 1, "switch_active": True}
    (found,) = findings({**HEALTHY, "switch": journal, "status": {**HEALTHY["status"], "releases": releases}})
    assert found.id == "switch-running-other" and "alice@laptop" in found.evidence[0]


def test_giving_up_has_a_cause() -> None:
    lines = ["torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."]
    given_up = {"reason": "3 restarts in 3600 s, and again: crash", "log": lines}
    assert ids(**{**down(exit_code=1, log=lines), "record": {"given_up": given_up}}) == [
        *("out-of-memory", "guard-gave-up"),
    ]
    wedged = {"reason": "3 restarts in 3600 s, and again: wedge, no token", "log": []}
    assert ids(record={"given_up": wedged})[0] == "engine-wedged"


def test_what_the_guard_healed_is_before() -> None:
    restarts = [
        {"at": 100.0, "reason": "crash", "detail": "exit code 1"},
        {"at": 300.0, "reason": "wedge", "detail": "no token for 180 s", "back_after_s": 40.0},
    ]
    found = findings(known(record={"restarts": restarts, "forgiven": 200.0}))
    assert [(item.id, item.now) for item in found] == [("engine-wedged", False)]
    assert "back after 40.0 s" in found[0].evidence[0]


def test_every_finding_has_a_remedy() -> None:
    data = diagnose.Finding("disk-full", ("/: 0 MB free",)).as_dict()
    assert data["remedy"] and data["cause"] and data["now"] is True


CHAPTER = (
    *("Container Fails with Memory Errors", "FP8 Quantization Fails", "Model Download Requires License Acceptance"),
    *("Model Download Incomplete", '"Compute Capability 12.1" Warning', "Lower Than Expected Throughput"),
)


@pytest.mark.parametrize("issue", CHAPTER)
def test_every_issue_of_the_guide_is_in_the_table(issue: str) -> None:
    assert any(failure.chapter == issue for failure in failures.TABLE)


@pytest.mark.parametrize(
    "line",
    [
        "token hf_abcdefghijklmnop is wrong",
        "non-default args: {'api_key': ['topsecret'], 'port': 8000}",
        "--api-key topsecret",
        "password: topsecret",
        "Authorization: Bearer topsecret123",
        "http://alice:topsecret@proxy:3128",
        "NGC nvapi-topsecret0123456789",
    ],
)
def test_secrets_are_removed(line: str) -> None:
    printed = redact(line)
    assert "topsecret" not in printed and "abcdefghij" not in printed and "***" in printed


def test_the_token_itself_is_removed_wherever_it_stands() -> None:
    data = {"a": ["x whatever-it-is y", 5, None], "b": {"c": "whatever-it-is"}}
    assert redacted(data, "whatever-it-is") == {"a": ["x *** y", 5, None], "b": {"c": "***"}}
    assert redact("a short one: ab", "ab") == "a short one: ab"  # or every "ab" would go


def test_the_bundle_is_whole_and_private(tmp_path: Path) -> None:
    facts = {**HEALTHY, "failed": {"2": {"state": "failed", "message": "vllm-m ended", "log": ["Traceback"]}}}
    found = [diagnose.Finding("disk-full", ("/: 0 MB free",))]
    path = diagnose.bundle(tmp_path / "bundles" / "spark-1-now.tar.gz", "spark-1", facts, found)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with tarfile.open(path) as archive:
        names = archive.getnames()
        member = archive.extractfile("spark-1-now/findings.json")
        assert member and json.load(member)[0]["id"] == "disk-full"
        log = archive.extractfile("spark-1-now/logs/release-2.log")
        assert log and b"Traceback" in log.read()
    assert {f"spark-1-now/{name}" for name in ("README", "facts.json", "logs/engine.log", "logs/ports.txt")} <= {*names}


# -- more than one engine ----------------------------------------------------------------------------------------------


def two(**changes: Any) -> dict[str, Any]:
    """A host with a second engine, of which this is known; the first is well."""
    facts = known(status={"healthy": False} if changes.get("healthy") is False else {})
    facts["engines"][0]["healthy"] = True
    facts["engines"].append({**copy.deepcopy(ENGINE), "service": "vllm-b", "port": 8001, **changes})
    return facts


def test_the_evidence_names_the_engine() -> None:
    assert findings(two()) == []
    (found,) = findings(two(healthy=False, container=None, asked=None))
    assert found.id == "container-missing" and [line[:8] for line in found.evidence] == ["vllm-b: "]
    (found,) = findings(two(guard={"slow": True, "tokens_per_second": 2.5}))
    assert found.id == "low-throughput" and found.evidence[0].startswith("vllm-b: the guard measured 2.5")


def test_what_two_engines_have_in_common_is_one_finding_with_both() -> None:
    facts = two(guard={"given_up": {"reason": "3 restarts", "log": []}})
    facts["engines"][0]["guard"] = {"given_up": {"reason": "5 restarts", "log": []}}
    (found,) = findings(facts)
    assert (found.id, found.evidence) == ("guard-gave-up", ("vllm-m: 5 restarts", "vllm-b: 3 restarts"))


def test_each_engine_has_its_log_in_the_bundle(tmp_path: Path) -> None:
    facts = two(service="../b")
    path = diagnose.bundle(tmp_path / "now.tar.gz", "spark-1", facts, [])
    with tarfile.open(path) as archive:
        assert {"now/logs/engine-vllm-m.log", "now/logs/engine-.._b.log"} <= {*archive.getnames()}
        member = archive.extractfile("now/facts.json")
        assert member and "all is well" not in member.read().decode()
