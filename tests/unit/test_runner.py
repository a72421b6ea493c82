"""`sparkfleet VERB`: what becomes of ansible-runner's events, what is shown, which code it ends with."""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparkfleet import SparkfleetError, cli, runner, status
from sparkfleet.live import Live, closing
from sparkfleet.runner import BAD_INPUT, DOWN, OK, REFUSED, RESTORED, UNREACHABLE, Collector, Host


def event(kind: str, host: str = "spark-1", **res: Any) -> dict[str, Any]:
    return {"event": kind, "event_data": {"host": host, "res": res}}


def collect(*events: dict[str, Any]) -> Collector:
    collector = Collector(lambda host, line: None)
    for item in events:
        collector.take(item)
    return collector


RELEASE = {"number": 3, "model": "llama31-8b-fp8"}
FAILED = {"msg": "Task failed: spark-1: release 3 does not serve: … [memory-refused]", "failure": "memory-refused"}


@pytest.mark.parametrize(
    ("events", "result", "code"),
    [
        ([event("runner_on_ok")], "ok", OK),
        ([event("runner_on_ok", changed=True), event("runner_on_ok")], "changed", OK),
        ([event("runner_on_unreachable", msg="No route to host")], "unreachable", UNREACHABLE),
        ([event("runner_on_failed", outcome="restored", release=RELEASE, **FAILED)], "restored", RESTORED),
        ([event("runner_on_failed", outcome="failed", release=RELEASE, **FAILED)], "failed", DOWN),
        ([event("runner_on_failed", msg="no", findings=[{"id": "disk-full"}])], "refused", REFUSED),
        ([event("runner_on_failed", msg="alice is at work [switch-running-other]")], "refused", REFUSED),
    ],
    ids=["ok", "changed", "unreachable", "restored", "failed", "findings", "another run"],
)
def test_a_host_and_its_code(events: list[dict[str, Any]], result: str, code: int) -> None:
    collector = collect(*events)
    assert collector.hosts["spark-1"].result == result
    assert collector.code(2 if code else 0) == code


def test_the_gravest_counts() -> None:
    collector = collect(
        event("runner_on_ok"),
        event("runner_on_failed", "spark-2", outcome="restored", **FAILED),
        event("runner_on_unreachable", "spark-3", msg="no"),
    )
    assert collector.code(4) == UNREACHABLE


def test_the_failure_is_named_and_the_message_bare() -> None:
    host = collect(event("runner_on_failed", msg="Task failed: spark-1: it is down [engine-died]")).hosts["spark-1"]
    assert host.message == "spark-1: it is down [engine-died]" and host.failure == "engine-died"
    assert host.as_dict() == {
        **{"name": "spark-1", "result": "failed", "message": host.message, "failure": "engine-died"},
        "seconds": host.seconds,
    }


def test_bad_input_is_told_apart() -> None:
    collector = collect(event("runner_on_failed", "localhost", msg="no host of the group sparks is in the inventory"))
    assert collector.code(2) == BAD_INPUT and "sparks" in collector.error
    silent = collect({"event": "verbose", "stdout": "\x1b[0;31m[ERROR]: the limit leaves none\x1b[0m"})
    assert silent.code(1) == BAD_INPUT and silent.error == "[ERROR]: the limit leaves none"
    assert Collector(lambda host, line: None).code(0) == BAD_INPUT


def test_lines_of_hosts_are_shown() -> None:
    said: list[tuple[str, str]] = []
    collector = Collector(lambda host, line: said.append((host, line)))
    collector.take({"event": "verbose", "stdout": "spark-1  12 s  loading weights\n\n  check  result"})
    assert said == [("spark-1", "spark-1  12 s  loading weights"), ("", "  check  result")]


def test_on_a_terminal_steps_replace_each_other() -> None:
    screen = io.StringIO()
    live = Live(screen, terminal=True)
    live.show("spark-1", "spark-1  1 s  starting")
    live.show("spark-2", "spark-2  1 s  starting")
    live.show("spark-1", "spark-1  2 s  loading weights")
    live.show("", "a table")
    live.close()
    text = screen.getvalue()
    assert text.count("\033[2F\033[J") == 2  # two lines were drawn, then erased
    assert text.endswith("a table\nspark-1  2 s  loading weights\nspark-2  1 s  starting\n")


def test_elsewhere_every_line_stands_and_nothing_is_coloured() -> None:
    file = io.StringIO()
    live = Live(file)
    live.show("spark-1", "spark-1  1 s  starting")
    live.show("spark-1", "spark-1  2 s  ready")
    assert file.getvalue() == "spark-1  1 s  starting\nspark-1  2 s  ready\n"


def test_the_table_at_the_end() -> None:
    good = Host("spark-1", "changed", release=RELEASE, out_of_service_s=41.4, seconds=60)
    bad = Host("spark-2", "restored", "spark-2: release 3 does not serve", "memory-refused", seconds=20)
    text = closing([good, bad])
    assert re.search(r"spark-1 +changed +3 \(llama31-8b-fp8\) +60 +41 s", text)
    assert "restored [memory-refused]" in text and text.endswith("\nspark-2: release 3 does not serve\n")


FOUND: dict[str, Any] = {
    "engine": "serving",
    "healthy": True,
    "figures": {"num_requests_running": 2.0, "num_requests_waiting": 1.0, "kv_cache_usage_perc": 0.25},
    "gpu": {"temperature": 61.0, "watts": 40.0},
    "guard": {"restarts_total": {"crash": 1, "wedge": 1}, "tokens_per_second": 28.4, "slow": False, "given_up": None},
    "releases": {
        "current": 2,
        "previous": 1,
        "switch": None,
        "switch_active": False,
        "locks": {"2": {"model": "m", "profile": "throughput", "image": "r/i:1@sha256:0123456789abcdef"}},
    },
}


def test_the_row_of_a_host() -> None:
    row = status.summary("spark-1", FOUND)
    assert json.loads(json.dumps(row)) == row
    assert status.cells(row) == (
        *("spark-1", "serving", "m", "throughput", "2", "0123456789ab", "2+1", "25%", "28.4", "61 °C", "2"),
    )


def test_a_host_that_cannot_be_reached_is_a_row() -> None:
    rows = [status.summary("spark-1", FOUND), status.absent("spark-2", "unreachable", "spark-2: No route to host")]
    text = status.table(rows)
    assert re.search(r"spark-2 +unreachable +- ", text) and text.endswith("spark-2: No route to host\n")


def test_what_the_guard_gave_up_is_said() -> None:
    guard = {**FOUND["guard"], "given_up": {"reason": "3 restarts in 3600 s"}}
    text = status.table([status.summary("spark-1", {**FOUND, "engine": "given-up", "guard": guard})])
    assert "spark-1: the guard gave up: 3 restarts in 3600 s" in text


def test_a_switch_that_runs_is_said() -> None:
    journal = {
        **{"began": 0.0, "from": 1, "to": 2, "controller": "alice@laptop", "verb": "site.yml", "phase": "waiting"},
        "outcome": None,
    }
    assert "1 → 2 by alice@laptop with site.yml" in str(status.switch(journal, True))
    assert str(status.switch(journal, True)).endswith("phase waiting")
    assert str(status.switch(journal, False)).endswith("cut in the phase waiting")


class Calls:
    """Stands in for `run`."""

    def __init__(self, *hosts: Host, code: int = 0) -> None:
        self.hosts, self.code = hosts, code
        self.made: list[tuple[str, list[str]]] = []

    def __call__(self, verb: str, inventory: str, arguments: Sequence[str], collector: Collector) -> int:
        self.made.append((verb, list(arguments)))
        collector.hosts = {host.name: host for host in self.hosts}
        return self.code


def command(monkeypatch: pytest.MonkeyPatch, calls: Calls, *words: str) -> int:
    monkeypatch.setattr(cli, "run", calls)
    return cli.main(words)


def extra(words: Sequence[str]) -> dict[str, Any]:
    """The variables among ansible-playbook's words."""
    found: dict[str, Any] = {}
    for flag, value in itertools.pairwise(words):
        if flag == "-e" and value.startswith("{"):
            found |= json.loads(value)
    return found


def test_words_become_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(Host("spark-1"))
    assert command(monkeypatch, calls, "switch", "gpt-oss-120b", "--profile", "low_latency", "-l", "spark-1") == 0
    ((verb, words),) = calls.made
    assert verb == "switch" and words[:2] == ["--limit", "spark-1,localhost"]
    assert extra(words) == {"sparkfleet_model": "gpt-oss-120b", "sparkfleet_profile": "low_latency"}
    command(monkeypatch, calls, "rollback", "4", "-C", "-e", "sparkfleet_port=8001")
    assert extra(calls.made[-1][1]) == {"sparkfleet_release": 4}
    assert {"--check", "--diff", "sparkfleet_port=8001"} <= {*calls.made[-1][1]}


def test_status_of_a_fleet_that_does_not_serve(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = Calls(Host("spark-1", summary=status.summary("spark-1", {**FOUND, "engine": "stopped"})))
    assert command(monkeypatch, calls, "status", "--json") == DOWN
    made = json.loads(capsys.readouterr().out)
    assert made["exit_code"] == DOWN and made["hosts"][0]["summary"]["state"] == "stopped"


def test_remove_shows_first_and_asks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = Calls(Host("spark-1", removed=["container vllm-m", "/opt/sparkfleet/"]))
    monkeypatch.setattr("builtins.input", lambda prompt: "no")
    assert command(monkeypatch, calls, "remove") == BAD_INPUT
    said = capsys.readouterr()
    assert "spark-1: container vllm-m, /opt/sparkfleet/" in said.out and "nothing was removed" in said.err
    assert [words[-1] for _, words in calls.made] == ["--check"]
    monkeypatch.setattr("builtins.input", lambda prompt: "yes")
    assert command(monkeypatch, calls, "remove", "--models") == 0
    assert "--check" not in calls.made[-1][1]
    assert extra(calls.made[-1][1]) == {"sparkfleet_remove_models": True, "sparkfleet_confirm": True}


def test_an_inventory_that_is_not_there() -> None:
    with pytest.raises(SparkfleetError, match="inventory /nowhere: there is no such file"):
        runner.run("status", "/nowhere", [], Collector(lambda host, line: None))


@pytest.mark.parametrize("verb", cli.PLAYBOOKS)
def test_every_verb_has_its_playbook(verb: str) -> None:
    plays = yaml.safe_load(runner.playbook(verb).read_text(encoding="utf-8"))
    assert plays and all(
        "ansible.builtin.import_playbook" in play or play["hosts"] in ("sparks", "localhost", "sparkfleet_rollout")
        for play in plays
    )


def test_a_word_with_quotes_stays_one() -> None:
    assert runner._quoted("it's") == "'it'\\''s'"


def test_the_default_inventory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANSIBLE_INVENTORY", "/somewhere")
    assert runner.default_inventory() == "/somewhere"
    monkeypatch.delenv("ANSIBLE_INVENTORY")
    assert Path(runner.default_inventory()).name == "local"
