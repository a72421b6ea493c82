"""`sparkfleet VERB`: what becomes of ansible-runner's events, what is shown, which code it ends with."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import signal
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ansible.utils.collection_loader import AnsibleCollectionRef

from sparkfleet import SparkfleetError
from sparkfleet.cli import main, runner
from sparkfleet.cli.runner import Collector
from sparkfleet.exit_codes import BAD_INPUT, DOWN, INTERRUPTED, OK, REFUSED, RESTORED, UNREACHABLE
from sparkfleet.paths import ROOT
from sparkfleet.reporting import event_log, status_page
from sparkfleet.reporting.host_result import HostResult
from tests.unit.fakes.clock import set_time


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


def test_how_many_places_were_searched_for_an_old_secret_is_said() -> None:
    delegated = {"searched": 900, "found": [], "_ansible_delegated_vars": {"ansible_host": "localhost"}}
    collector = collect(event("runner_on_ok", searched=12, found=["/tmp/a"]), event("runner_on_ok", **delegated))
    assert collector.hosts["spark-1"].message == (
        "12 places searched, 1 with the old secret; on this controller 900 places searched, 0 with the old secret"
    )
    failed = collect(
        event("runner_on_ok", searched=12, found=["/tmp/a"]), event("runner_on_failed", msg="left: /tmp/a")
    )
    assert failed.hosts["spark-1"].message == "left: /tmp/a"


def test_bad_input_is_told_apart() -> None:
    collector = collect(event("runner_on_failed", "localhost", msg="no host of the group sparks is in the inventory"))
    assert collector.code(2) == BAD_INPUT and "sparks" in collector.error
    silent = collect({"event": "verbose", "stdout": "\x1b[0;31m[ERROR]: the limit leaves none\x1b[0m"})
    assert silent.code(1) == BAD_INPUT and silent.error == "[ERROR]: the limit leaves none"
    assert Collector(lambda host, line: None).code(0) == BAD_INPUT


def test_lines_of_hosts_are_shown() -> None:
    printed: list[tuple[str, str]] = []
    collector = Collector(lambda host, line: printed.append((host, line)))
    collector.take(event("runner_on_start"))
    for text in ("spark-1  12 s  loading weights\n", "spark-1  repo at url\n  check  result", "rollout  wave 1 of 1"):
        collector.take({"event": "verbose", "stdout": text})
    assert printed == [
        ("spark-1", "spark-1  12 s  loading weights"),
        # A table belongs to no host's row, and neither does what no host has said.
        *(("", "spark-1  repo at url"), ("", "  check  result"), ("", "rollout  wave 1 of 1")),
    ]
    assert collector.board.rows["spark-1"].message == "loading weights"


WAVES = {
    "waves": [["spark-1"], ["spark-2"]],
    "labels": ["canary", "2/2"],
    "drained": ["spark-4"],
    "hosts": [
        {"name": "spark-1", "model": "m", "needed": True},
        {"name": "spark-2", "model": "m", "needed": True},
        {"name": "spark-3", "model": "m", "needed": False},
    ],
}
END = {"event": "playbook_on_stats", "event_data": {"processed": {"localhost": 1, "spark-1": 1}}}


def scheduled(**res: Any) -> dict[str, Any]:
    data = {"host": "spark-1", "task_action": "sparkfleet.dgx.rollout_schedule", "res": {**WAVES, **res}}
    return {"event": "runner_on_ok", "event_data": data}


def test_what_a_rollout_does_not_reach_is_untouched() -> None:
    collector = collect(
        event("runner_on_ok", "spark-2", changed=True),  # it was fetched for
        scheduled(),
        event("runner_on_start"),
        event("runner_on_failed", outcome="restored", release=RELEASE, **FAILED),
        END,
    )
    assert {name: host.result for name, host in collector.hosts.items()} == {
        "spark-1": "restored",
        "spark-2": "untouched",
    }
    assert collector.code(2) == RESTORED


def test_a_status_after_a_plan_that_failed_is_a_status() -> None:
    row = status_page.summary("spark-1", FOUND, problem="unknown model 'nope'")
    collector = collect(event("runner_on_failed", msg="unknown model 'nope'"), event("runner_on_ok", summary=row))
    assert collector.hosts["spark-1"].result == "ok" and not collector.hosts["spark-1"].message
    assert collector.code(0) == OK


def test_everything_is_logged() -> None:
    log: list[dict[str, Any]] = []
    collector = Collector(lambda host, line: None, log.append)
    task = {"task": "Switch to the release", "task_action": "sparkfleet.dgx.release_switch"}
    for item in (
        {"event": "playbook_on_play_start", "event_data": {"play": "Roll out"}},
        scheduled(),
        {"event": "runner_on_start", "event_data": {"host": "spark-1", **task}},
        {"event": "verbose", "stdout": "spark-1  3 s  loading weights"},
        event("runner_on_failed", outcome="restored", release=RELEASE, **FAILED),
    ):
        collector.take(item)
    assert log == [
        {"event": "play", "play": "Roll out"},
        {"event": "waves", **{key: WAVES[key] for key in ("waves", "labels", "drained")}},
        {"event": "phase", "host": "spark-1", "phase": "start", "wave": "canary"},
        {"event": "phase", "host": "spark-1", "phase": "wait", "wave": "canary"},
        {"event": "line", "host": "spark-1", "text": "3 s  loading weights"},
        {
            **{"event": "result", "host": "spark-1", "result": "restored", "failure": "memory-refused"},
            "message": "spark-1: release 3 does not serve: … [memory-refused]",
        },
    ]


def test_ctrl_c_is_what_it_was_after_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def hold(**given: Any) -> SimpleNamespace:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as ansible-runner does, and leaves it
        return SimpleNamespace(status="successful", rc=0)

    monkeypatch.setattr("ansible_runner.interface.run", hold)
    before = signal.getsignal(signal.SIGINT)
    runner.run("status", "inventory/local", [], Collector(lambda host, line: None))
    assert signal.getsignal(signal.SIGINT) is before


ENGINE: dict[str, Any] = {
    **{"service": "vllm-m", "model": "m", "profile": "throughput", "repo": "o/m", "port": 8000, "state": "serving"},
    "image": "r/i:1@sha256:0123456789abcdef",
    "healthy": True,
    "figures": {"num_requests_running": 2.0, "num_requests_waiting": 1.0, "kv_cache_usage_perc": 0.25},
    "tokens_per_second": 431.2,
    "guard": {"restarts_total": {"crash": 1, "wedge": 1}, "tokens_per_second": 28.4, "slow": False, "given_up": None},
}
FOUND: dict[str, Any] = {
    "engine": "serving",
    "healthy": True,
    "engines": [ENGINE],
    "gpu": {"temperature": 61.0, "watts": 40.0},
    "releases": {
        "current": 2,
        "previous": 1,
        "switch": None,
        "switch_active": False,
    },
}


def test_the_row_of_a_host() -> None:
    row = status_page.summary("spark-1", FOUND, ["image: a → b", "argument --x: 1 → 2"], drained=True)
    assert json.loads(json.dumps(row)) == row
    assert status_page.cells(row) == (
        *("spark-1", "serving, drained", "m", "throughput", "2", "0123456789ab", "2+1", "25%", "431.2", "61 °C", "2"),
        "2 differences",
    )
    assert row["stream_tokens_per_second"] == 28.4
    assert status_page.cells(status_page.summary("spark-1", FOUND, []))[-1] == "-"
    assert status_page.cells(status_page.summary("spark-1", FOUND))[-1] == "?"


def test_a_host_that_cannot_be_reached_is_a_row() -> None:
    rows = [
        status_page.summary("spark-1", FOUND),
        status_page.absent("spark-2", "unreachable", "spark-2: No route to host"),
    ]
    text = status_page.page(rows)
    assert re.search(r"spark-2 +unreachable +- .* \?$", text, re.MULTILINE) and "\nspark-2: No route to host\n" in text
    assert text.endswith("\n2 Sparks: 1 serving, 1 unreachable; 2 running, 1 waiting requests, 431 tokens/s\n")


def test_what_several_sparks_have_to_say_is_said_once() -> None:
    rows = [status_page.summary(name, FOUND, ["image: a → b", "x"]) for name in ("spark-1", "spark-2")]
    assert "spark-1, spark-2: image: a → b, and 1 more (sparkfleet drift lists them)\n" in status_page.table(rows)
    assert status_page.totals(rows)["differ"] == 2


def test_a_narrow_terminal_has_fewer_columns() -> None:
    rows = [status_page.summary("spark-1", FOUND)]
    whole = status_page.table(rows).splitlines()[0]
    assert status_page.table(rows, len(whole)).splitlines()[0] == whole
    cut = status_page.table(rows, 70).splitlines()
    assert max(map(len, cut)) <= 70 and "profile" not in cut[0] and cut[0].endswith("drift")


def test_what_the_guard_gave_up_is_said() -> None:
    engine = {**ENGINE, "state": "given-up", "guard": {"given_up": {"reason": "3 restarts in 3600 s"}}}
    text = status_page.table([status_page.summary("spark-1", {**FOUND, "engine": "given-up", "engines": [engine]})])
    assert "spark-1: the guard gave up: 3 restarts in 3600 s" in text
    found = {**FOUND, "engine": "given-up", "engines": [ENGINE, {**engine, "service": "vllm-b"}]}
    assert "the guard gave up vllm-b: 3 restarts" in status_page.table([status_page.summary("spark-1", found)])


def test_each_engine_of_a_host_has_a_line() -> None:
    second = {**ENGINE, "service": "vllm-b", "model": "b", "state": "loading", "healthy": False, "guard": None}
    second |= {"figures": {}, "tokens_per_second": None, "port": 8001}
    found = {**FOUND, "engine": "loading", "healthy": False, "engines": [ENGINE, second]}
    row = status_page.summary("spark-1", found, ["image: a → b"])
    assert json.loads(json.dumps(row)) == row and [engine["service"] for engine in row["engines"]] == [
        *("vllm-m", "vllm-b"),
    ]
    assert (row["state"], row["model"], row["running"], row["tokens_per_second"]) == ("loading", "m, b", 2.0, 431.2)
    lines = status_page.table([row]).splitlines()
    assert [line.split()[:3] for line in lines[1:3]] == [["spark-1", "serving", "m"], ["spark-1", "loading", "b"]]
    assert "61 °C" in lines[1] and "1 difference" in lines[1]
    assert "°C" not in lines[2] and "difference" not in lines[2]
    assert status_page.totals([row])["states"] == {"loading": 1}


def test_the_last_switch_of_many_is_no_news_where_it_went_well() -> None:
    rows = [
        {**status_page.summary(name, FOUND), "switch": f"1 → 2: {outcome}"}
        for name, outcome in (("spark-1", "verified"), ("spark-2", "restored"))
    ]
    text = status_page.table(rows)
    assert "spark-2: last switch 1 → 2: restored" in text and "spark-1: last" not in text
    assert "spark-1: last switch 1 → 2: verified" in status_page.table(rows[:1])


def test_a_switch_that_runs_is_said() -> None:
    journal = {
        **{"began": 0.0, "from": 1, "to": 2, "controller": "alice@laptop", "verb": "site.yml", "phase": "waiting"},
        "outcome": None,
    }
    assert "1 → 2 by alice@laptop with site.yml" in str(status_page.switch(journal, True))
    assert str(status_page.switch(journal, True)).endswith("phase waiting")
    assert str(status_page.switch(journal, False)).endswith("cut in the phase waiting")


class Calls:
    """Stands in for `run`."""

    def __init__(self, *hosts: HostResult, code: int = 0) -> None:
        self.hosts, self.code = hosts, code
        self.made: list[tuple[str, list[str]]] = []

    def __call__(self, verb: str, inventory: str, arguments: Sequence[str], collector: Collector) -> int:
        self.made.append((verb, list(arguments)))
        collector.hosts = {host.name: host for host in self.hosts}
        return self.code


@pytest.fixture(autouse=True)
def logs_go_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(event_log, "FOLDER", tmp_path / "events")


#: An inventory that has spark-1.
EXAMPLE = ("-i", str(ROOT / "inventory" / "example"))


def command(monkeypatch: pytest.MonkeyPatch, calls: Calls, *words: str) -> int:
    monkeypatch.setattr(main, "run", calls)
    return main.main(words)


def extra(words: Sequence[str]) -> dict[str, Any]:
    """The variables among ansible-playbook's words."""
    found: dict[str, Any] = {}
    for flag, value in itertools.pairwise(words):
        if flag == "-e" and value.startswith("{"):
            found |= json.loads(value)
    return found


def test_words_become_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(HostResult("spark-1"))
    assert (
        command(monkeypatch, calls, "switch", "gpt-oss-120b", "--profile", "low_latency", "-l", "spark-1", *EXAMPLE)
        == 0
    )
    ((verb, words),) = calls.made
    assert verb == "switch" and words[:2] == ["--limit", "spark-1"]
    assert extra(words) == {"sparkfleet_model": "gpt-oss-120b", "sparkfleet_profile": "low_latency"}
    command(monkeypatch, calls, "rollback", "4", "-C", "-e", "sparkfleet_port=8001")
    assert extra(calls.made[-1][1]) == {"sparkfleet_release": 4}
    assert {"--check", "--diff", "sparkfleet_port=8001"} <= {*calls.made[-1][1]}
    command(monkeypatch, calls, "verify", "--deep")
    assert calls.made[-1][0] == "verify" and extra(calls.made[-1][1]) == {"sparkfleet_verify": "deep"}
    command(monkeypatch, calls, "verify")
    assert extra(calls.made[-1][1]) == {}


def test_status_of_a_fleet_that_does_not_serve(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = Calls(HostResult("spark-1", summary=status_page.summary("spark-1", {**FOUND, "engine": "stopped"})))
    assert command(monkeypatch, calls, "status", "--json") == DOWN
    made = json.loads(capsys.readouterr().out)
    assert made["exit_code"] == DOWN and made["hosts"][0]["summary"]["state"] == "stopped"


def test_an_unreachable_spark_is_a_row_and_exit_code_7(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = HostResult("spark-1", summary=status_page.summary("spark-1", FOUND, []))
    calls = Calls(
        good, HostResult("spark-10", "unreachable", "no"), HostResult("spark-9", "unreachable", "no"), code=UNREACHABLE
    )
    assert command(monkeypatch, calls, "status") == UNREACHABLE
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows[:4]] == ["host", "spark-1", "spark-9", "spark-10"]
    assert "3 Sparks: 2 unreachable, 1 serving" in rows[-1]


def test_a_status_is_watched_until_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = Calls(HostResult("spark-1", summary=status_page.summary("spark-1", FOUND, [])))
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            raise KeyboardInterrupt

    set_time(monkeypatch, main, sleep=pause)
    assert command(monkeypatch, calls, "status", "--watch", "3") == OK
    assert pauses == [3.0, 3.0] and capsys.readouterr().out.count("again after 3 s") == 2
    assert command(monkeypatch, calls, "status", "--watch", "--json") == BAD_INPUT
    with pytest.raises(SystemExit):
        command(monkeypatch, calls, "status", "--watch", "soon")


def test_a_rollout_ends_with_what_runs_where(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = status_page.summary("spark-1", FOUND, [])
    calls = Calls(HostResult("spark-1", "changed", release=RELEASE, summary=row))
    words = ("rollout", "-l", "spark-1", "-e", "sparkfleet_image=i:2", *EXAMPLE)
    assert command(monkeypatch, calls, *words) == OK
    printed = capsys.readouterr().out
    assert "spark-1  serving" in printed and "events" in printed
    # The final inspection covers only the requested hosts.
    assert calls.made[1] == ("status", ["--limit", "spark-1", "-e", "sparkfleet_image=i:2"])
    assert command(monkeypatch, calls, *words, "--json") == OK
    made = json.loads(capsys.readouterr().out)
    assert made["now"][0]["digest"] == "0123456789ab" and made["rollout"]["waves"] == []
    lines = Path(made["events"]).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["begin", "summary", "end"]
    summary, end = (json.loads(line) for line in lines[1:])
    assert summary["rollout"] == made["rollout"] and summary["hosts"] == made["hosts"]
    assert end["hosts"] == [{"name": "spark-1", "result": "changed"}] and end["exit_code"] == OK


def test_an_interrupted_run_says_so_in_its_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def cut(verb: str, inventory: str, words: Sequence[str], collector: Collector) -> int:
        for name in ("spark-1", "spark-2", "spark-3"):
            collector.take(event("runner_on_start", name, task_action="sparkfleet.dgx.vllm_verify"))
        for name, result in (("spark-1", "changed"), ("spark-2", "failed"), ("spark-3", "changed")):
            collector.hosts[name] = HostResult(name, result)
        collector.board.rows["spark-1"].phase = "done"
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "run", cut)
    assert main.main(["deploy"]) == INTERRUPTED
    (log,) = (tmp_path / "events").iterdir()
    end = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    assert end["exit_code"] == INTERRUPTED and end["seconds"] >= 0
    assert {host["name"]: host["result"] for host in end["hosts"]} == {
        **{"spark-1": "changed", "spark-2": "failed", "spark-3": "interrupted"}
    }


def test_remove_shows_first_and_asks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = Calls(HostResult("spark-1", removed=["container vllm-m", "/opt/sparkfleet/"]))
    monkeypatch.setattr("builtins.input", lambda prompt: "no")
    assert command(monkeypatch, calls, "remove") == BAD_INPUT
    printed = capsys.readouterr()
    assert "spark-1: container vllm-m, /opt/sparkfleet/" in printed.out and "nothing was removed" in printed.err
    assert [words[-1] for _, words in calls.made] == ["--check"]
    monkeypatch.setattr("builtins.input", lambda prompt: "yes")
    assert command(monkeypatch, calls, "remove", "--models") == 0
    assert "--check" not in calls.made[-1][1]
    assert extra(calls.made[-1][1]) == {"sparkfleet_remove_models": True, "sparkfleet_confirm": True}


def test_an_inventory_that_is_not_there() -> None:
    with pytest.raises(SparkfleetError, match="inventory '/nowhere': no such file"):
        runner.run("status", "/nowhere", [], Collector(lambda host, line: None))


@pytest.mark.parametrize("verb", main.PLAYBOOKS)
def test_every_verb_has_its_playbook(verb: str) -> None:
    plays = yaml.safe_load(runner.playbook(verb).read_text(encoding="utf-8"))
    assert plays and all(
        "ansible.builtin.import_playbook" in play
        or play["hosts"] in ("sparks", "sparks:all", "localhost", "sparkfleet_rollout")
        or "'sparks:gateways'" in play["hosts"]
        or "'monitors'" in play["hosts"]
        for play in plays
    )


@pytest.mark.parametrize("name", sorted(file.stem for file in (ROOT / "playbooks").glob("*.yml")))
def test_a_playbook_can_be_imported_from_the_collection(name: str) -> None:
    assert AnsibleCollectionRef.is_valid_fqcr(f"sparkfleet.dgx.{name}", "playbook")


def test_words_reach_ansible_as_they_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []

    def ran(cmdline: str, **_: Any) -> SimpleNamespace:
        runs.append(cmdline)
        return SimpleNamespace(status="successful", rc=0)

    monkeypatch.setattr("ansible_runner.interface.run", ran)
    words = ["-e", 'motd=it\'s "ours" $HOME', "", "-l", "spark-1,!spark-2", "\\", "a\nb", "ü"]
    runner.run("status", "inventory/local", words, Collector(lambda host, line: None))
    assert shlex.split(runs[0])[-len(words) :] == words


def test_the_default_inventory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANSIBLE_INVENTORY", "/somewhere")
    assert runner.default_inventory() == "/somewhere"
    monkeypatch.delenv("ANSIBLE_INVENTORY")
    assert Path(runner.default_inventory()).name == "local"


def test_a_sudo_that_wants_a_password_has_its_remedy() -> None:
    local = "Premature end of stream waiting for become success.\n>>> Standard Error\nsudo: a password is required"
    assert runner.message({"msg": f"Task failed: {local}"}).startswith(
        "sudo: a password is required: run again with -K"
    )
    assert runner.message({"msg": "Task failed: Missing sudo password"}) == (
        "Missing sudo password: run again with -K (--ask-become-pass), and type the password of the user you log in as"
    )


def test_sudo_s_password_is_asked_once_and_given_to_ansible(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr("getpass.getpass", lambda prompt: given.append(prompt) or "secret")
    runs: list[dict[str, Any]] = []
    done = SimpleNamespace(status="successful", rc=0)
    monkeypatch.setattr("ansible_runner.interface.run", lambda **words: runs.append(words) or done)
    runner.become_password.cache_clear()
    try:
        for words in ([], ["--ask-become-pass"], ["--ask-become-pass"]):
            runner.run("status", "inventory/local", words, Collector(lambda host, line: None))
    finally:
        runner.become_password.cache_clear()
    assert given == ["BECOME password: "]
    assert runs[0]["passwords"] is None
    assert [list(run["passwords"].values()) for run in runs[1:]] == [["secret"], ["secret"]]
    assert all(re.search(pattern, "BECOME password: ") for pattern in runs[1]["passwords"])
    assert "secret" not in str(runs[1]["cmdline"])


EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e"


@pytest.mark.parametrize("verb", ["logs", "stop", "status", "remove"])
def test_nothing_that_is_shown_moves_the_terminal(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names, messages, models and lines of logs come from hosts and engines."""
    row = {**status_page.summary("spark-1", FOUND, [f"image: {EVIL}"]), "model": f"m{EVIL}", "switch": f"1 {EVIL}"}
    host = HostResult("spark-1", "failed", f"no {EVIL}", log=[f"\x1b[36m(EngineCore)\x1b[0m up {EVIL}"], removed=[EVIL])
    host.summary = row if verb == "status" else None
    monkeypatch.setattr("builtins.input", lambda prompt: "no")
    command(monkeypatch, Calls(host, code=DOWN), verb)
    printed = "".join(capsys.readouterr())
    assert printed.strip() and not re.search("[\x1b\x07\x9b\u202e]", printed)
    if verb == "logs":
        assert "(EngineCore) up" in printed  # colours alone go without a trace


def test_what_a_trial_fetched_is_said_against_the_model() -> None:
    shown: list[str] = []
    collector = Collector(lambda host, line: shown.append(line))
    collector.take(event("runner_on_ok", downloaded=3_400_000, model_bytes=8_460_000_000))
    assert shown == ["spark-1  fetched 3.4 MB; the whole model has 8460.0 MB"]
    assert collector.hosts["spark-1"].as_dict()["fetched"] == {"bytes": 3_400_000, "model_bytes": 8_460_000_000}
    collector.take(event("runner_on_ok", downloaded="x", model_bytes=5))
    assert len(shown) == 1
