"""A trial: a release that is measured and never becomes the current one, whatever happens to it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import engine, measured, switch
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.bench import BenchError, Load
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.bounded import BoundsError
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.docker import Docker
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.release_format import (
    Engine,
    check_plan,
    identity,
)
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.releases import Store
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.switch import recover

from tests.unit import ROOT
from tests.unit.fakes import fake_release
from tests.unit.host.test_switch import NEW, OLD, PowerCut, World, deployed, run, stage, store, world

__all__ = ["deployed", "store", "world"]  # fixtures

LOG = (ROOT / "tests" / "unit" / "data" / "vllm-0.10.1.1-gpu.log").read_text(encoding="utf-8").splitlines()
ROW = {"streams": 1, "requests": 3, "tokens_per_second": 2.7, "stream_tokens_per_second": 2.8, "ttft_ms": 320.0}
PLANNED = {"kv_cache_gib": 66.5, "weights_gib": 8.5, "decode_tok_s_limit": 25.0}


@pytest.fixture(autouse=True)
def benched(monkeypatch: pytest.MonkeyPatch, world: World) -> list[str]:
    """The benchmark: it is asked while the trial's engine runs, of its container."""
    asked: list[str] = []

    def bench(
        docker: Docker, container: str, item: Engine, told: Any, loads: Sequence[Load]
    ) -> tuple[list[dict[str, Any]], str]:
        asked.extend(f"{load.streams} x {load.input}:{load.output}" for load in loads)
        world.step("bench")
        assert world.containers[item.service] == "running"
        asked.append(container)
        told(1, [])
        world.step("measure 1")
        told(4, [ROW])
        world.step("measure 4")
        return [ROW, {**ROW, "streams": 4}], "vllm bench serve"

    def answers(params: dict[str, Any]) -> dict[str, Any]:
        world.step("answers")
        running = world.at(int(params["url"].rpartition(":")[2]))
        return {"verified": world.bad.get(running) != "mute", "msg": "no", "failure": "answer-malformed", "checks": [],
                "answer": ""}  # fmt: skip

    def read_log(docker: Docker, name: str, since: str, tty: bool, tail: int | None = None, most: int = 0) -> list[str]:
        return LOG

    monkeypatch.setattr(switch, "bench", bench)
    monkeypatch.setattr(switch, "answers", answers)
    monkeypatch.setattr(engine, "read_log", read_log)
    return asked


def stage_trial(store: Store, service: str = NEW, weights: str = "dummy", **more: Any) -> int:
    made = fake_release.an_engine(service, model=service, memory=PLANNED, revision="c" * 40)
    plan = {**fake_release.plan(made), "format": 3, "kind": "trial", "weights": weights, **more}
    number: int = store.stage(f"services: {{{service}: {{}}}}\n", plan, fake_release.lock(made))
    return number


def serves_as_before(store: Store, world: World, before: int) -> None:
    assert world.containers == {OLD: "running"} and store.current() == before
    outcome = store.outcome(before)
    assert outcome and outcome["state"] == "verified"
    assert outcome["container_ids"] == {OLD: world.ids[OLD]}
    assert store.numbers() == [before]


@pytest.mark.parametrize("weights", ["dummy", "real"])
def test_a_trial_is_measured_and_the_release_before_serves_again_verified(
    store: Store, world: World, deployed: int, benched: list[str], weights: str
) -> None:
    journal = run(store, stage_trial(store, weights=weights), "trial")
    assert (journal["outcome"], journal["error"]) == ("restored", None)
    serves_as_before(store, world, deployed)
    assert world.did[-1] == f"remove {NEW}" and "verify" not in world.did
    assert benched == [journal["measured"][NEW]["container"]]
    assert journal["out_of_service_s"] > 0
    (record,) = measured.trials(store)
    assert (record["weights"], record["vllm"]) == (weights, "0.10.1.1+381074ae.nv25.09")
    assert record["figures"]["kv_cache_gib"] == 66.25 and record["figures"]["kv_cache_tokens"] == 542720
    assert record["planned"] == {"kv_cache_gib": 66.5, "weights_gib": 8.5}
    assert record["speed"] == [ROW, {**ROW, "streams": 4}] and record["bench"] == "vllm bench serve"
    phases = [step["phase"] for step in journal["steps"]]
    assert phases.index("verifying") < phases.index("measuring") < phases.index("restoring")


LOAD = {"streams": 16, "input": 1024, "output": 128, "rounds": 2, "seed": 1, "seconds": 600}


def test_a_trial_measures_what_its_plan_says(store: Store, world: World, deployed: int, benched: list[str]) -> None:
    number = stage_trial(store, loads=[LOAD, {**LOAD, "seed": 2}])
    assert identity(store.plan(number)) != identity({**store.plan(number), "loads": []})
    assert run(store, number, "trial")["error"] is None
    assert benched[:2] == ["16 x 1024:128"] * 2
    serves_as_before(store, world, deployed)


@pytest.mark.parametrize("loads", [[{**LOAD, "streams": 0}], [{"streams": 1}], [LOAD] * 9, [{**LOAD, "seconds": 1e9}]])
def test_loads_of_another_form(loads: Any) -> None:
    plan = {**fake_release.plan(fake_release.an_engine(NEW)), "format": 3, "kind": "trial", "weights": "real"}
    assert check_plan({**plan, "loads": [LOAD]})["loads"] == [LOAD]
    with pytest.raises(BoundsError, match="load"):
        check_plan({**plan, "loads": loads})


def test_real_weights_must_answer_right(store: Store, world: World, deployed: int) -> None:
    world.bad[NEW] = "wrong"
    assert run(store, stage_trial(store), "trial")["error"] is None
    journal = run(store, stage_trial(store, weights="real"), "trial")
    assert journal["error"]["failure"] == "answer-wrong" and journal["outcome"] == "restored"
    serves_as_before(store, world, deployed)


def test_without_a_release_before_nothing_is_left(store: Store, world: World) -> None:
    journal = run(store, stage_trial(store), "trial")
    assert (journal["outcome"], journal["error"]) == ("removed", None)
    assert world.containers == {} and store.current() is None and store.numbers() == []
    assert len(measured.trials(store)) == 1
    assert stage(store, NEW) == 2  # a number is never used twice


@pytest.mark.parametrize("bad", ["crash", "silent", "mute", "port"])
def test_a_trial_that_fails_brings_the_release_before_back(
    store: Store, world: World, deployed: int, benched: list[str], bad: str
) -> None:
    world.bad[NEW] = bad
    journal = run(store, stage_trial(store), "trial")
    assert journal["outcome"] == "restored" and journal["error"]["message"]
    assert benched == [] and measured.trials(store) == []
    serves_as_before(store, world, deployed)


def test_a_benchmark_that_fails_leaves_the_figures(
    store: Store, world: World, deployed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise BenchError("5 of 12 requests were answered")

    monkeypatch.setattr(switch, "bench", fail)
    journal = run(store, stage_trial(store), "trial")
    assert journal["error"]["failure"] == "trial-speed" and "5 of 12" in journal["error"]["message"]
    (record,) = measured.trials(store)
    assert record["speed"] == [] and record["figures"]["kv_cache_gib"] == 66.25
    serves_as_before(store, world, deployed)


PHASES = ("checking", "stopping", "starting", "waiting", "verifying", "measuring", "restoring", "restore-waiting",
          "restore-verifying")  # fmt: skip


@pytest.mark.parametrize("phase", PHASES)
def test_cut_anywhere_the_release_before_serves(store: Store, world: World, deployed: int, phase: str) -> None:
    world.cut = phase
    number = stage_trial(store)
    with pytest.raises(PowerCut):
        run(store, number, "trial")
    world.cut = None
    ended = recover(store, Docker("/nowhere"))
    assert ended and ended["outcome"] == ("refused" if phase == "checking" else "restored")
    assert recover(store, Docker("/nowhere")) is None
    serves_as_before(store, world, deployed)


@pytest.mark.parametrize("phase", PHASES[1:7])
def test_cut_without_a_release_before_nothing_is_left(store: Store, world: World, phase: str) -> None:
    world.cut = phase
    with pytest.raises(PowerCut):
        run(store, stage_trial(store), "trial")
    world.cut = None
    ended = recover(store, Docker("/nowhere"))
    assert ended and ended["outcome"] == "removed"
    assert world.containers == {} and store.numbers() == []


def test_killed_while_it_is_measured(store: Store, world: World, deployed: int) -> None:
    def kill(what: str) -> None:
        if what == "bench":
            raise PowerCut

    world.step = kill
    with pytest.raises(PowerCut):
        run(store, stage_trial(store), "trial")
    assert world.containers[NEW] == "running" and world.containers[OLD] == "exited"
    ended = recover(store, Docker("/nowhere"))
    assert ended and ended["error"]["failure"] == "switch-interrupted" and "measuring" in ended["error"]["message"]
    serves_as_before(store, world, deployed)


def test_each_number_of_streams_is_recorded_as_it_is_measured(store: Store, world: World, deployed: int) -> None:
    seen: list[tuple[str, str, Any]] = []

    def look(what: str) -> None:
        if what.startswith("measure"):
            journal = store.switch() or {}
            seen.append((journal["phase"], journal["asking"], journal["measured"][NEW]))
        if what == "measure 4":
            raise PowerCut

    world.step = look
    with pytest.raises(PowerCut):
        run(store, stage_trial(store), "trial")
    assert [(phase, asking) for phase, asking, _ in seen] == [("measuring", "1 stream"), ("measuring", "4 streams")]
    assert [record["speed"] for *_, record in seen] == [[], [ROW]]
    assert seen[0][2]["figures"]["kv_cache_gib"] == 66.25
    ended = recover(store, Docker("/nowhere"))
    assert ended and ended["asking"] == "" and measured.trials(store) == []
    # Half of a measurement is none.
    assert ended["measured"][NEW]["bench"] == ""
    serves_as_before(store, world, deployed)


def test_the_same_engine_is_started_afresh_for_a_trial(store: Store, world: World, deployed: int) -> None:
    journal = run(store, stage_trial(store, OLD, "real"), "trial")
    assert journal["kept"] == [] and journal["error"] is None
    assert world.did.count(f"stop {OLD}") == 2
    serves_as_before(store, world, deployed)


@pytest.mark.parametrize("mode", ["deploy", "rollback", "restart"])
def test_a_trial_is_never_deployed(store: Store, world: World, deployed: int, mode: str) -> None:
    journal = run(store, stage_trial(store), mode)
    assert (journal["outcome"], journal["error"]["failure"]) == ("refused", "bad-input")
    assert world.containers == {OLD: "running"} and "which never serves" in journal["error"]["message"]
    journal = run(store, stage(store, NEW), "trial")
    assert journal["outcome"] == "refused" and "is not a trial" in journal["error"]["message"]


def test_a_trial_has_a_format_of_its_own() -> None:
    made = fake_release.an_engine(NEW)
    plain, trial = fake_release.plan(made), {**fake_release.plan(made), "format": 3, "kind": "trial", "weights": "real"}
    assert check_plan(trial) == trial and check_plan(plain) == plain
    assert identity(trial) != identity(plain) != identity({**trial, "weights": "dummy"}) != identity(trial)
    for bad in ({"kind": ""}, {"kind": "other"}, {"weights": "none"}, {"weights": None}, {"format": 2}, {"format": 4}):
        with pytest.raises(BoundsError):
            check_plan({**trial, **bad})


def test_a_trial_of_the_same_file_is_another_release(store: Store, world: World) -> None:
    number = stage(store, NEW)
    text = store.compose_file(number).read_text()
    assert store.find(text, store.plan(number)) == number
    trial = stage_trial(store)
    assert store.find(text, store.plan(number)) == number and store.find(text, store.plan(trial)) == trial


# -- calibration -------------------------------------------------------------------------------------------------------


def test_every_start_leaves_its_figures_beside_the_release(
    store: Store, world: World, deployed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (record,) = measured.of_release(store, deployed)
    assert record["service"] == OLD and record["weights"] == "real" and record["figures"]["weights_gib"] == 8.4911
    assert store.damage(deployed) == []
    number = stage(store, NEW)
    journal = run(store, number)
    assert journal["measured"][NEW]["figures"]["kv_cache_tokens"] == 542720
    monkeypatch.setattr(engine, "read_log", lambda *_, **__: ["INFO Available KV cache memory: 65.00 GiB"])
    assert run(store, number, "restart")["outcome"] == "verified"
    (record,) = measured.of_release(store, number)
    assert record["figures"] == {"kv_cache_gib": 65.0}
    assert store.damage(number) == [] and store.find(store.compose_file(number).read_text(), store.plan(number))


def test_an_engine_that_keeps_running_keeps_its_figures(store: Store, world: World, deployed: int) -> None:
    journal = run(store, deployed)
    assert journal["kept"] == [OLD] and journal["measured"] == {}
    assert len(measured.of_release(store, deployed)) == 1


def test_figures_that_cannot_be_kept_are_a_trouble(
    store: Store, world: World, deployed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(measured, "write_json", full)
    journal = run(store, stage(store, NEW))
    assert journal["outcome"] == "verified" and "figures" in journal["troubles"][0]


def a_record(**more: Any) -> dict[str, Any]:
    return {"service": "vllm-m", "repo": "org/m", "image": "i", "at": 5.0, **more}


def test_records_replace_those_of_the_same_and_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "trials.json"
    for number in range(70):
        measured.keep(path, [a_record(image=f"i{number}")])
    measured.keep(path, [a_record(image="i69", at=9.0)])
    found = measured.read(path)
    assert len(found) == 64 and found[-1]["at"] == 9.0 and found[0]["image"] == "i6"
    path.write_text('{"format": 2, "records": []}')
    assert measured.read(path) == []
    path.write_text("{")
    assert measured.read(path) == []


@pytest.mark.parametrize(
    "bad",
    [
        {"repo": "../etc"},
        {"at": float("inf")},
        {"at": "x"},
        {"weights": "half"},
        {"settings": "x"},
        {"vllm": "a b"},
        {"figures": {"kv_cache_gib": "much"}},
        {"figures": {"kv_cache_gib": 1e300}},
        {"planned": []},
        {"speed": [{}]},
        {"speed": [ROW] * 9},
        {"service": "s" * 2000},
        {"revision": "a b"},
    ],
)
def test_what_is_no_record(bad: dict[str, Any]) -> None:
    assert measured.check_record(a_record())["revision"] == "main"
    with pytest.raises(BoundsError):
        measured.check_record(a_record(**bad))


def test_what_a_record_does_not_know_is_left_out() -> None:
    made = measured.check_record(a_record(more=5, figures={"kv_cache_gib": 1.5, "odd": 3}, service="a\x1b[31m"))
    assert "more" not in made and made["figures"] == {"kv_cache_gib": 1.5} and "\x1b" not in made["service"]


def test_plan_against_measured_in_words() -> None:
    record = measured.check_record(
        a_record(planned=PLANNED, figures={"kv_cache_gib": 66.25, "load_s": 311.9}, ready_s=400.0, speed=[ROW])
    )
    assert measured.words(record) == ["KV cache 66.2 GiB (planned 66.5)", "loaded in 312 s", "ready after 400 s"]
    figures = {"weights_gib": 8.5, "cuda_graphs_gib": 0.5, "kv_cache_gib": 90.0}
    planned = {"weights_gib": 8.5, "kv_cache_gib": 91.0, "requested_gib": 103.0}
    found = measured.words(measured.check_record(a_record(planned=planned, figures=figures)))
    assert "activations and runtime 4.0 GiB (planned 3.5)" in found
    beyond = a_record(planned={**planned, "cuda_graphs_gib": 0.0}, figures=figures)
    assert "activations and runtime 4.5 GiB (planned 3.5)" in measured.words(measured.check_record(beyond))
    found = measured.words(measured.check_record(a_record(planned=planned, figures={**figures, "activation_gib": 1.5})))
    assert "activations 1.5 GiB" in found and not any("runtime" in word for word in found)
    assert measured.speed_words(record) == ["1 stream 2.7 tok/s, first token after 320 ms"]
