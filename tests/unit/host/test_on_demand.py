"""Which engine is started on demand, which makes room; and the guard itself with real engines of the simulator."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.ages import Instant
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.bounded import BoundsError
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.on_demand import (
    ASLEEP,
    Decision,
    OnDemand,
    Seat,
)

from tests.unit.fakes.engine_host import ALWAYS, FIRST, SECOND, Host
from tests.unit.fakes.fake_engine import Engine

NOW = 1_800_000_000.0


def at(seconds: float, boot: str = "b") -> Instant:
    return Instant(NOW + seconds, 5000.0 + seconds, boot)


def asleep(name: str, wanted: float | None = None, needs: float | None = 30.0) -> Seat:
    return Seat(name, ASLEEP, wanted=wanted, needs=needs)


def hot(name: str, unused: float = 100.0, *, ready: float = 500.0, busy: bool = False, needs: float = 30.0) -> Seat:
    return Seat(name, "serving", runs=True, busy=busy, unused=unused, ready=ready, needs=needs)


def decide(
    *seats: Seat, room: float | None = 40.0, loading: bool = False, on_demand: OnDemand | None = None
) -> Decision:
    return (on_demand or OnDemand(120, 12)).decide(seats, room, at(0), loading)


def test_nothing_is_done_that_nobody_wants() -> None:
    made = decide(asleep("a"), hot("b"))
    assert (made.start, made.stop) == ("", ()) and made.doors["b"].open and not made.doors["a"].open


def test_one_that_has_room_is_started_at_once() -> None:
    assert decide(asleep("a", 1.0), asleep("b")).start == "a"
    assert decide(asleep("a", 1.0), hot("b", needs=10.0)).start == "a"
    assert decide(asleep("a", 1.0), loading=True).start == ""


def test_the_one_used_least_recently_makes_room_and_takes_no_more_requests() -> None:
    made = decide(asleep("a", 1.0), hot("b", 100.0, needs=20.0), hot("c", 900.0, needs=20.0), room=60.0)
    assert made.stop == ("c",) and made.start == "" and made.doors["b"].open and not made.doors["c"].open
    made = decide(asleep("a", 1.0), hot("b", 100.0, needs=20.0), hot("c", 900.0, needs=20.0), room=40.0)
    assert made.stop == ("c", "b")


def test_what_it_computes_is_finished_first() -> None:
    on_demand = OnDemand(120, 12)
    made = decide(asleep("a", 1.0), hot("b", busy=True), on_demand=on_demand)
    assert made.stop == () and made.start == "" and not made.doors["b"].open
    assert decide(asleep("a", 2.0), hot("b", 0.0), on_demand=on_demand).stop == ("b",)
    assert decide(asleep("a"), hot("b", 0.0), on_demand=on_demand).doors["b"].open  # who wanted it has gone


def test_who_makes_room_stays_so_though_it_was_used_last() -> None:
    on_demand = OnDemand(120, 12)
    first = (asleep("a", 1.0), hot("b", 9.0, needs=20.0, busy=True), hot("c", 5.0, needs=20.0, busy=True))
    assert not decide(*first, room=60.0, on_demand=on_demand).doors["b"].open
    then = (asleep("a", 2.0), hot("b", 0.0, needs=20.0), hot("c", 5.0, needs=20.0, busy=True))
    assert decide(*then, room=60.0, on_demand=on_demand).stop == ("b",)


def test_one_serves_for_a_while_before_it_makes_room() -> None:
    made = decide(asleep("a", 1.0), hot("b", ready=20.0))
    assert made.stop == () and made.doors["b"].open and made.doors["a"].retry_after == 100 + 60
    assert decide(asleep("a", 1.0), Seat("b", "loading", runs=True, needs=30.0)).stop == ()


def test_without_figures_one_runs_at_a_time() -> None:
    assert decide(asleep("a", 1.0, None), hot("b"), room=None).stop == ("b",)
    assert decide(asleep("a", 1.0, 5.0), hot("b", needs=5.0), room=None).stop == ("b",)
    assert decide(asleep("a", 1.0, None), room=None).start == "a"


def test_whoever_waits_longest_comes_first() -> None:
    made = decide(asleep("a", 1.0), asleep("b", 9.0))
    assert made.start == "b" and made.doors["a"].retry_after is not None


def test_there_are_so_many_starts_an_hour() -> None:
    on_demand = OnDemand(120, 2)
    on_demand.note_start("a", at(-3000))
    on_demand.note_start("b", at(-600))
    made = decide(asleep("a", 1.0), on_demand=on_demand)
    assert made.start == "" and made.doors["a"].retry_after == 600 and "2 starts" in made.doors["a"].why
    assert on_demand.decide([asleep("a", 1.0)], 40.0, at(601)).start == "a"


def test_what_it_has_counted_survives_a_restart_and_a_reboot() -> None:
    before = OnDemand(120, 1)
    before.note_start("a", at(-60))
    before.note_ready("a", 42.0)
    kept = json.loads(json.dumps(before.data()))
    again = OnDemand(120, 1, kept)
    assert again.data() == before.data() and again.start_seconds("a") == 42.0
    assert again.decide([asleep("a", 1.0)], 40.0, at(0)).start == ""
    rebooted = Instant(NOW, 30.0, "another")
    assert OnDemand(120, 1, kept).decide([asleep("a", 1.0)], 40.0, rebooted).start == ""
    for damaged in ({"starts": 5}, {"starts": [{"service": "a"}]}, {"took": {"a": "b"}}, []):
        with pytest.raises(BoundsError):
            OnDemand(120, 1, damaged)  # type: ignore[arg-type]


def test_what_a_door_says_of_one_that_is_not_to_run() -> None:
    doors = decide(*(Seat(name, name) for name in ("given-up", "stopped", "missing", "switching", "loading"))).doors
    assert [doors[name].retry_after for name in ("given-up", "stopped", "missing")] == [None] * 3
    assert not doors["switching"].open and doors["loading"].retry_after == 60


# -- the guard, with engines -------------------------------------------------------------------------------------------


@pytest.fixture
def host(engine: Engine, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Host]:
    made = Host(engine, tmp_path, **{"load_seconds": 0.3, "repos": {}, **getattr(request, "param", {})})
    yield made
    made.close()


def test_a_request_starts_its_engine_and_is_answered(host: Host) -> None:
    began = time.monotonic()
    status, _, text = host.chat(FIRST)
    assert status == 200 and "Paris" in text, host.said()
    cold = time.monotonic() - began
    began = time.monotonic()
    assert host.chat(FIRST, stream=True)[2].rstrip().endswith("[DONE]")
    print(f"cold {cold:.2f} s, warm {time.monotonic() - began:.2f} s")
    assert host.did == [f"start {ALWAYS}", f"start {FIRST}"]
    status, _, text = host.chat(SECOND)
    assert status == 200 and host.did[2:] == [f"stop {FIRST}", f"start {SECOND}"], host.said()
    page = host.ask("GET", host.guard_port, "/metrics")[2]
    assert f'sparkfleet_on_demand_starts_total{{engine="{SECOND}"}} 1' in page
    assert f'sparkfleet_engine_state{{engine="{FIRST}",state="asleep"}} 1' in page
    assert host.ask("GET", host.guard_port, "/ready")[2] == f"serving org/{ALWAYS}, org/{FIRST}, org/{SECOND}\n"


def test_what_only_looks_starts_nothing(host: Host) -> None:
    assert host.ask("GET", host.door[FIRST], "/health")[0] == 200
    assert host.ask("GET", host.door[FIRST], "/metrics")[::2] == (200, "")
    status, _, text = host.ask("GET", host.door[FIRST], "/v1/models")
    assert status == 200 and json.loads(text)["data"][0]["id"] == f"org/{FIRST}"
    assert host.ask("GET", host.door[FIRST], "/docs")[0] == 503
    time.sleep(0.5)
    assert host.did == [f"start {ALWAYS}"]


@pytest.mark.parametrize("host", [{"load_seconds": 1.0, "on_demand_min_seconds": 1.0}], indirect=True)
def test_two_that_are_wanted_in_turn_lose_no_request(host: Host) -> None:
    """Clients of both ask all the time; each swap waits for what is being computed."""
    over, results, lock = threading.Event(), [], threading.Lock()

    def client(service: str, stream: bool) -> None:
        while not over.is_set():
            began = time.monotonic()
            status, _, text = host.chat(service, stream)
            right = status == 200 and ("[DONE]" in text if stream else "Paris" in text)
            with lock:
                results.append((right, time.monotonic() - began, status, text[:200]))

    threads = [
        threading.Thread(target=client, args=(service, stream), daemon=True)
        for service in (FIRST, SECOND)
        for stream in (True, False)
    ]
    for thread in threads:
        thread.start()
    host.until(lambda: len(host.did) >= 1 + 7, 60)  # four starts, three stops
    over.set()
    for thread in threads:
        thread.join(30)
    wrong = [result for result in results if not result[0]]
    print(
        f"{len(results)} requests, {len(wrong)} lost, slowest {max(result[1] for result in results):.1f} s, {host.did}"
    )
    assert not wrong, (wrong[:3], host.said())
    stopped = [line for line in host.did[1:] if line.startswith("stop")]
    assert [line.split()[1] for line in stopped][:2] == [FIRST, SECOND] or [line.split()[1] for line in stopped][
        :2
    ] == [SECOND, FIRST]


@pytest.mark.parametrize("host", [{"on_demand_wait": "refuse", "load_seconds": 1.0}], indirect=True)
def test_without_holding_it_says_when_to_come_again(host: Host) -> None:
    status, headers, text = host.chat(FIRST)
    assert status == 503 and 1 <= int(headers["retry-after"]) <= 60
    assert json.loads(text)["error"]["type"] == "ServiceUnavailableError"
    host.until(lambda: host.chat(FIRST)[0] == 200)
    assert host.did == [f"start {ALWAYS}", f"start {FIRST}"]


@pytest.mark.parametrize("host", [{"on_demand_starts_per_hour": 1}], indirect=True)
def test_beyond_so_many_starts_an_hour_it_refuses_and_says_when(host: Host) -> None:
    assert host.chat(FIRST)[0] == 200
    status, headers, text = host.chat(SECOND)
    assert status == 503 and 3500 <= int(headers["retry-after"]) <= 3600 and "1 starts in an hour" in text
    assert host.chat(FIRST)[0] == 200  # which keeps its place
    host.end_guard()
    host.run_guard()
    assert host.chat(SECOND)[0] == 503  # also by the next guard
    assert host.chat(FIRST)[0] == 200 and host.did == [f"start {ALWAYS}", f"start {FIRST}"]


def test_a_long_answer_is_not_cut(host: Host) -> None:
    """A prefill of three seconds, while another engine is wanted that must have the place."""
    assert host.chat(FIRST)[0] == 200
    found: list[tuple[int, dict[str, str], str]] = []
    long = threading.Thread(target=lambda: found.append(host.chat(FIRST, content="prefill 3")), daemon=True)
    long.start()
    time.sleep(0.5)
    began = time.monotonic()
    assert host.chat(SECOND)[0] == 200
    long.join(10)
    assert found[0][0] == 200 and time.monotonic() - began > 2
    assert host.did[-2:] == [f"stop {FIRST}", f"start {SECOND}"]


def test_a_client_that_goes_wants_nothing_any_more(host: Host) -> None:
    host.load_seconds = 2.0
    assert host.chat(FIRST, timeout=0.3)[0] == 0
    host.until(lambda: "start vllm-b" in host.did)
    page = ""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and 'waiting{engine="vllm-b"} 0' not in page:
        page = host.ask("GET", host.guard_port, "/metrics")[2]
        time.sleep(0.1)
    assert 'sparkfleet_on_demand_waiting{engine="vllm-b"} 0' in page


def test_what_was_stopped_on_purpose_is_not_started_by_a_request(host: Host) -> None:
    host.store.halt(True)
    host.until(lambda: host.ask("GET", host.guard_port, "/ready")[0] == 503)
    status, headers, text = host.chat(FIRST)
    assert status == 503 and "retry-after" not in headers and "was stopped" in text
    host.store.halt(False)
    host.until(lambda: host.ask("GET", host.guard_port, "/ready")[0] == 200)
    assert host.chat(FIRST)[0] == 200


def test_a_switch_keeps_new_requests_waiting(host: Host) -> None:
    assert host.chat(FIRST)[0] == 200
    journal = {"id": "a", "to": 1, "from": 1, "phase": "starting", "began": 1.0, "kept": [ALWAYS, FIRST, SECOND]}
    with host.store.exclusive():
        host.store.write_switch(journal)
        time.sleep(0.5)
        assert host.chat(FIRST, timeout=1.0)[0] == 0
        host.store.write_switch({**journal, "phase": "done"})
    assert host.chat(FIRST)[0] == 200


def test_a_guard_that_is_told_to_end_finishes_what_it_passes_on(host: Host) -> None:
    assert host.chat(FIRST)[0] == 200
    found: list[tuple[int, dict[str, str], str]] = []
    long = threading.Thread(target=lambda: found.append(host.chat(FIRST, content="prefill 2")), daemon=True)
    long.start()
    time.sleep(0.5)
    late = threading.Thread(target=lambda: found.append(host.chat(FIRST)), daemon=True)
    assert host.guard is not None
    host.guard.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    late.start()
    assert host.guard.wait(20) == 0, host.said()
    late.join(10)
    long.join(10)
    assert sorted(status for status, _, _ in found) == [200, 503]
    assert next(headers["retry-after"] for status, headers, _ in found if status == 503) == "1"
    host.run_guard()
    assert host.chat(FIRST)[0] == 200 and host.did == [f"start {ALWAYS}", f"start {FIRST}"]
