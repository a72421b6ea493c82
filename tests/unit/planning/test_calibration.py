"""Plan against measured: what counts for an engine, and what it changes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from sparkfleet_host import measured
from sparkfleet_host.release_format import check_lock, check_plan, merged, trial_weights

from sparkfleet import SparkfleetError, paths
from sparkfleet.cli import main
from sparkfleet.planning import calibration, catalog, plan
from sparkfleet.planning.target import EngineSettings
from tests.unit.planning.test_plan import COMMIT, DIGEST, SERVICE, fetched, serving, target

MODEL = "llama31-8b-fp8"
CARD = catalog.load(MODEL)
IMAGE = f"{CARD.image}@{DIGEST}"
ROWS = [
    {
        **{"streams": streams, "requests": 3 * streams, "tokens_per_second": speed},
        **{"stream_tokens_per_second": 30.0, "ttft_ms": 90.0},
    }
    for streams, speed in ((1, 28.5), (4, 100.0), (16, 300.0))
]


def a_record(**more: Any) -> dict[str, Any]:
    """What a start of the engine showed that `target()` describes: 1.5 GiB less KV cache than planned."""
    (engine,) = target().engines
    record = {
        **{"service": SERVICE, "model": MODEL, "repo": CARD.repo, "revision": COMMIT, "image": IMAGE, "at": 5.0},
        **{"settings": engine.settings_hash, "vllm": "0.10.1.1", "ready_s": 80.0},
        **{"planned": {"kv_cache_gib": 95.4, "weights_gib": 8.5}, "figures": {"kv_cache_gib": 93.9, "load_s": 60.0}},
    }
    return measured.check_record({**record, **more})


def state_with(*records: Any, served: bool = False) -> dict[str, Any]:
    return {**(serving() if served else fetched()), "host": "spark-1", "measured": list(records)}


def memory(state: dict[str, Any], **settings: Any) -> dict[str, Any]:
    found: dict[str, Any] = plan.make(target(**settings), state)["engines"][0]["memory"]
    return found


def test_a_host_s_difference_corrects_its_next_plan() -> None:
    before, after = memory(fetched()), memory(state_with(a_record()))
    assert after["kv_cache_gib"] == pytest.approx(before["kv_cache_gib"] - 1.5, abs=0.02)
    assert (before["correction_gib"], after["correction_gib"]) == (0.0, 1.5)
    assert after["kv_cache_tokens"] < before["kv_cache_tokens"]
    assert "measured on spark-1: KV cache 93.9 GiB (planned 95.4), loaded in 60 s, ready after 80 s" in after["notes"]
    assert "the plan counts 1.5 GiB more besides the KV cache, as measured" in after["notes"]
    # The same again, measured against the corrected plan, stays the same correction.
    again = a_record(planned={"kv_cache_gib": 93.9, "correction_gib": 1.5})
    assert memory(state_with(again))["correction_gib"] == 1.5
    # Another share of the memory takes as much besides the KV cache; other settings may not.
    assert memory(state_with(a_record()), arguments={"gpu_memory_utilization": 0.6})["correction_gib"] == 1.5


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        ({"image": f"{CARD.image}@sha256:{'e' * 64}"}, {}),
        ({"revision": "d" * 40}, {}),
        ({"repo": "org/other"}, {}),
        ({"settings": "f" * 64}, {}),
        ({"settings": ""}, {}),
        ({}, {"arguments": {"max_num_batched_tokens": 4096}}),
        ({}, {"environment": {"VLLM_USE_V2_MODEL_RUNNER": "1"}}),
    ],
)
def test_what_differs_is_not_compared(change: dict[str, Any], settings: dict[str, Any]) -> None:
    found = memory(state_with(a_record(**change)), **settings)
    assert found["correction_gib"] == 0.0 and not any("measured on" in note for note in found["notes"])


def test_a_difference_that_is_too_large_is_said_and_not_counted() -> None:
    found = memory(state_with(a_record(figures={"kv_cache_gib": 1.0})))
    assert found["correction_gib"] == 0.0
    assert any("94.4 GiB from the plan, more than it can be wrong by: not counted" in note for note in found["notes"])


def test_what_serves_is_not_changed_by_a_correction() -> None:
    """Not even by one with which the plan no longer fits."""
    for gib in (93.9, 88.0):
        record = a_record(figures={"kv_cache_gib": gib})
        for state in (serving(), state_with(record, served=True)):
            made = plan.make(target(), state)
            assert not made["deploy"]["needed"] and not made["findings"]
            assert made["engines"][0]["memory"]["correction_gib"] == 0.0
    assert made["engines"][0]["measured"]["figures"] == {"kv_cache_gib": 88.0}
    assert plan.make(target(), state_with(record, served=True))["compose"] == plan.make(target(), serving())["compose"]


@pytest.mark.parametrize("odd", [None, 5, "x", [5], [{"at": 1}], [{"repo": "a/b"}] * 500, {"a": 1}])
def test_a_spark_may_send_anything(odd: Any) -> None:
    state = {**fetched(), "measured": odd}
    assert plan.make(target(), state)["engines"][0]["measured"] is None
    assert calibration.understood(odd) == []


def test_the_newest_counts_and_a_trial_s_speed_stays() -> None:
    trial = a_record(at=1.0, speed=ROWS, bench="vllm bench serve", weights="dummy")
    found = memory(state_with(trial, a_record(at=9.0), a_record(at=3.0, figures={"kv_cache_gib": 95.0})))
    assert found["correction_gib"] == 1.5 and found["measured_tok_s"] == 28.5
    assert any("1 stream 28.5 tok/s, first token after 90 ms; 4 streams" in note for note in found["notes"])
    assert any("measured on spark-1 with dummy weights" in note for note in memory(state_with(trial))["notes"])


# -- the plan of a trial -----------------------------------------------------------------------------------------------


def test_the_plan_of_a_trial() -> None:
    state = fetched()
    state["engines"][0]["model"] = {"commit": COMMIT, "complete": False, "config": True, "bytes": 9}
    made = plan.make(target(trial="dummy", engine_key="k" * 20, gateways=("192.0.2.1",)), state)
    service = made["compose"]["services"][SERVICE]
    command = service["command"]
    assert command[command.index("--load-format") + 1] == "dummy" and command[command.index("--revision") + 1] == COMMIT
    assert service["ports"] == ["127.0.0.1:8000:8000"] and service["restart"] == "no"
    # A level of its own would slow down each step: a line for every token.
    assert "secrets" not in service and "VLLM_LOGGING_LEVEL" not in service["environment"]
    assert service["image"].endswith(DIGEST)
    release = made["release"]
    assert trial_weights(check_plan(release["plan"])) == "dummy" and check_lock(release["lock"])
    (engine,) = merged(check_plan(release["plan"]), check_lock(release["lock"]))
    assert engine.settings == target().engines[0].settings_hash and engine.revision == COMMIT
    assert not made["fetch"]["needed"] and made["deploy"]["mode"] == "trial" and made["deploy"]["needed"]


def test_a_trial_fetches_configuration_alone_and_needs_no_room_for_weights() -> None:
    state = fetched()
    state["engines"][0].update(model={"commit": None, "complete": False, "bytes": 0}, hub={"status": 200, "error": ""})
    for place in state["disk"].values():
        place["free"] = 5 << 30
    assert any(finding["id"] == "disk-full" for finding in plan.make(target(), state)["findings"])
    made = plan.make(target(trial="dummy"), state)
    assert made["findings"] == [] and made["fetch"]["model"] == [f"download {CARD.repo} without its weights"]
    found = plan.make(target(trial="real"), state)["findings"]
    assert [finding["id"] for finding in found] == ["model-not-in-cache"] and "--weights dummy" in found[0]["message"]


def test_a_trial_with_real_weights_is_the_same_engine() -> None:
    made = plan.make(target(trial="real"), fetched())
    assert made["findings"] == [] and "--load-format" not in made["compose"]["services"][SERVICE]["command"]
    assert not made["fetch"]["needed"] and made["release"]["plan"]["weights"] == "real"


def test_a_trial_says_what_it_stops() -> None:
    made = plan.make(target(trial="dummy"), serving())
    assert not any("open to the network" in note for note in made["notes"])  # it is not
    assert made["deploy"]["start"] == [f"try {MODEL} with dummy weights, stopping {SERVICE} for that time"]


def test_a_trial_is_of_one_model_that_is_served_from_the_host() -> None:
    for settings in ({"model_source": "hub"}, {"engines": (EngineSettings(MODEL), EngineSettings("gemma3-27b-fp8"))}):
        with pytest.raises(SparkfleetError, match="a trial is of one model"):
            target(trial="dummy", **settings)


# -- on the controller -------------------------------------------------------------------------------------------------


def test_the_command_uses_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(paths, "STATE", tmp_path)

    def planned(*words: str) -> dict[str, Any]:
        main.main(["plan", MODEL, "--json", *words])
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    before = planned()
    assert before["measured"] is None
    engine = main._target(main._parser().parse_args(["plan", MODEL]), "local").engines[0]
    record = a_record(settings=engine.settings_hash, speed=ROWS, bench="vllm bench serve")
    calibration.remember(tmp_path, "spark-1", [record])
    calibration.remember(tmp_path, "../odd\nname", [{**record, "at": 1.0}])
    assert {path.parent for path in tmp_path.rglob("*.json")} == {tmp_path / "measured"}
    after = planned()
    assert after["measured"]["host"] == "spark-1" and after["measured_tok_s"] == 28.5
    assert after["kv_cache_gib"] == pytest.approx(before["kv_cache_gib"] - 1.5, abs=0.02)
    assert planned("--engine", "0.14")["measured"] is None and planned("--kv-gib", "20")["measured"] is None
    assert planned("--set", "max_num_batched_tokens=4096")["measured"] is None
    assert main.main(["plan", MODEL]) == 0
    assert "measured on spark-1: 1 stream 28.5 tok/s" in capsys.readouterr().out
    (tmp_path / "measured" / "spark-1.json").write_text("{")
    assert planned()["measured"]["host"] != "spark-1"  # one that is damaged counts as none


def test_records_are_not_mixed_up_with_their_trials(tmp_path: Path) -> None:
    trial = a_record(at=1.0, speed=ROWS, bench="vllm bench serve")
    calibration.remember(tmp_path, "spark-1", [trial])
    calibration.remember(tmp_path, "spark-1", [copy.deepcopy(a_record(at=2.0))])
    wanted = {"repo": CARD.repo, "settings": trial["settings"], "image": CARD.image, "revision": "main"}
    known = calibration.remembered(tmp_path, wanted)
    assert known and known.tok_s == 28.5 and known.start and known.start["at"] == 2.0
    assert calibration.remembered(tmp_path, {**wanted, "image": "other:1"}) is None
