"""The verb bench with stand-ins for what acts on hosts: who is refused, drained, measured and put back, in which
order."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparkfleet import exit_codes, paths
from sparkfleet.cli import main
from sparkfleet.performance import records
from tests.unit.cli.test_verbs import calls, elsewhere, inventory, overlay
from tests.unit.performance.benchmark_records import ROW, record, row

__all__ = ["calls", "elsewhere", "inventory"]  # fixtures

MODULE = """#!/usr/bin/python
# WANT_JSON
import json, pathlib, sys
given = json.load(open(sys.argv[1]))
kept = {{key: given[key] for key in ("step", "load", "tool", "servers", "state", "model") if key in given}}
path = pathlib.Path({path!r})
done = path.read_text().count('"measure"') if path.exists() else 0
with path.open("a") as file:
    file.write(json.dumps([{name!r}, kept]) + "\\n")
print(json.dumps({answers!r}.get(given.get("step") or given.get("state"), {{}})
                 if done != {fails!r} or given.get("step") != "measure" else {{"failed": True, "msg": "no answer"}}))
"""
ENGINE = {
    **{"service": "vllm-m", "model": "m", "profile": "throughput", "repo": "org/m", "revision": "c" * 40},
    **{"image": "i", "settings": "e" * 64, "vllm": "0.25.1", "container": "c1", "started_at": "then", "reads": False},
    **{"limit_tok_s": 24.0, "published_tok_s": None, "kv_tokens": 50_000, "max_num_seqs": 8, "max_model_len": 8192},
}


class Fleet:
    """Two Sparks, stand-ins on this machine, and perhaps a gateway."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.ran, self.monkeypatch = folder, folder / "ran", monkeypatch
        self.runs = 0

    def bench(self, *words: str, gateway: bool = False, busy: int = 0, fails: int = -1, **says: Any) -> int:
        """`says`: in place of what the Spark answers usually."""
        self.runs += 1
        look = {
            **{"changed": False, "release": 3, "gpu": "NVIDIA GB10", "driver": "580.95.05", "now": 1e9},
            **{"engines": [{**ENGINE, "busy": busy}], **says.get("look", {})},
        }
        measured = {
            "changed": False,
            "row": ROW,
            "tool": "vllm bench serve",
            "now": 1e9 + 5,
            **says.get("measured", {}),
        }
        bench = {"look": look, "measure": measured, "keep": {"changed": False}}
        servers = {"drain": {"changed": True, "sessions": 0}, "ready": {"changed": True}}
        modules = {
            f"modules/{name}.py": MODULE.format(path=str(self.ran), name=name, answers=answers, fails=fails)
            for name, answers in (("engine_bench", bench), ("haproxy_server", servers))
        }
        self.monkeypatch.setenv("ANSIBLE_COLLECTIONS_PATH", str(overlay(self.folder / str(self.runs), modules)))
        local = {"ansible_connection": "local", "ansible_become": False, "ansible_python_interpreter": sys.executable}
        groups: dict[str, Any] = {"sparks": {"hosts": dict.fromkeys(("bench-1", "bench-2"), local)}}
        groups |= {"gateways": {"hosts": {"gw": local}}} if gateway else {}
        path = self.folder / "fleet.yml"
        path.write_text(yaml.safe_dump(groups), encoding="utf-8")
        return main.main(["bench", *words, "-i", str(path)])

    def lines(self) -> list[tuple[str, dict[str, Any]]]:
        return [(name, given) for name, given in map(json.loads, self.ran.read_text(encoding="utf-8").splitlines())]

    def steps(self) -> list[str]:
        return [given.get("step") or given["state"] for _, given in self.lines()]


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    yield Fleet(tmp_path, monkeypatch)
    for name in ("bench-1", "bench-2"):
        for path in (paths.STATE / "benchmarks" / name).glob("*.json"):
            path.unlink()


def test_one_load_after_the_other(fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("m", "--shape", "chat", "--streams", "1,4", "--repetitions", "2", "-l", "bench-1", "--json")
    assert fleet.bench(*words) == exit_codes.OK
    made = json.loads(capsys.readouterr().out)
    assert fleet.steps() == ["look", "look", *(["measure", "keep"] * 4)]
    loads = [given["load"] for _, given in fleet.lines() if given.get("step") == "measure"]
    assert [(load["streams"], load["input"], load["seed"]) for load in loads] == [
        *((1, 3840, 1), (4, 3840, 2), (1, 3840, 3), (4, 3840, 4))
    ]
    tools = [given["tool"] for _, given in fleet.lines() if given.get("step") == "measure"]
    assert tools == ["", *["vllm bench serve"] * 3]  # all rows are of one tool
    (record,) = made["hosts"][0]["benchmarks"]
    assert record["complete"] and record["host"] == "bench-1" and len(record["rows"]) == 4
    assert record["gpu"] == "NVIDIA GB10" and record["release"] == 3 and record["limit_tok_s"] == 24.0
    (kept,) = (paths.STATE / "benchmarks" / "bench-1").glob("*.json")
    assert json.loads(kept.read_text())["id"] == record["id"]


def test_a_spark_behind_a_gateway_is_refused(fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    assert fleet.bench("-l", "bench-1", gateway=True) == exit_codes.REFUSED
    assert fleet.steps() == ["look"]
    said = capsys.readouterr().out
    assert "it is behind the gateway gw" in said and "--even-if-serving" in said


def test_requests_of_others_are_respected(fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    assert fleet.bench("-l", "bench-1", busy=2) == exit_codes.REFUSED
    assert fleet.steps() == ["look"] and "others use it now: requests of vllm-m (2)" in capsys.readouterr().out
    fleet.ran.unlink()
    words = ("-l", "bench-1", "--streams", "1", "--repetitions", "1", "--even-if-serving", "--json")
    assert fleet.bench(*words, busy=2) == exit_codes.OK
    (record,) = json.loads(capsys.readouterr().out)["hosts"][0]["benchmarks"]
    assert record["serving"] is True


@pytest.mark.parametrize("fails", [-1, 1])
def test_a_drained_spark_is_put_back(fleet: Fleet, fails: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Also when a load fails."""
    words = ("-l", "bench-1,gw", "--streams", "1", "--repetitions", "2", "--even-if-serving", "--json")
    code = fleet.bench(*words, gateway=True, fails=fails)
    steps = fleet.steps()
    assert steps[:3] == ["look", "drain", "look"] and steps[-1] == "ready"
    assert [given["servers"] for name, given in fleet.lines() if name == "haproxy_server"] == [["bench-1"]] * 2
    made = json.loads(capsys.readouterr().out)["hosts"][0]
    if fails < 0:
        assert code == exit_codes.OK and steps.count("measure") == 2
        return
    assert code == exit_codes.DOWN and made["failure"] == "benchmark"
    assert "chat with 1 stream" in made["message"] and "no answer" in made["message"]
    (kept,) = (paths.STATE / "benchmarks" / "bench-1").glob("*.json")
    assert json.loads(kept.read_text())["complete"] is False  # what was measured before stays


@pytest.mark.parametrize(
    ("says", "why"),
    [
        ({"look": {"now": 1e300}}, "the time that the host says: now"),
        ({"measured": {"now": -1e18}}, "what the host measured: now"),
        ({"measured": {"tool": None}}, "what the host measured: tool"),
        ({"measured": {"row": [1]}}, "what the host measured: row"),
        ({"measured": {"row": {**ROW, "ttft_ms": None}}}, "what the host measured: a row.ttft_ms"),
        ({"measured": {"row": {key: ROW[key] for key in ("ttft_ms", "requests")}}}, "a row.tokens_per_second"),
    ],
)
def test_a_spark_may_answer_anything(
    fleet: Fleet, says: dict[str, Any], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = fleet.bench("-l", "bench-1", "--streams", "1", "--repetitions", "1", "--json", **says)
    (host,) = json.loads(capsys.readouterr().out)["hosts"]
    assert code == exit_codes.DOWN and why in host["message"]


def test_a_record_that_cannot_be_kept_is_said(fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    """An engine's image has a name that is longer than any."""
    engine = {**ENGINE, "busy": 0, "image": "i" * 2000}
    words = ("-l", "bench-1", "--streams", "1", "--repetitions", "1")
    assert fleet.bench(*words, look={"engines": [engine]}) == exit_codes.OK
    assert "the benchmark is not kept on this machine: a benchmark: image" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--shape", "odd"), "shape 'odd': one of chat, long, nvidia"),
        (("--repetitions", "0"), "repetitions: 0 is not an integer from 1 to 20"),
        (("a", "b"), "one MODEL, or `compare A B`"),
        (("compare", "a"), "takes two records"),
        (("compare", "a", "b"), "of that host there is none"),
    ],
)
def test_what_is_wrong_is_said_before_a_host_is_asked(
    words: tuple[str, ...], why: str, calls: Path, inventory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["bench", *words, "-i", str(inventory)]) == exit_codes.BAD_INPUT
    assert why in capsys.readouterr().err and not calls.exists()


def test_compare_says_whether_it_is_slower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(paths, "STATE", tmp_path)
    for host, speed in (("a", 10.0), ("b", 8.0)):
        rows = [row(repetition=number, tokens_per_second=speed + number / 100) for number in (1, 2, 3)]
        records.keep(tmp_path, host, record(rows, host=host))
    assert main.main(["bench", "compare", "a", "b"]) == exit_codes.DRIFT
    assert "B is slower by more than noise." in capsys.readouterr().out
    assert main.main(["bench", "compare", "b", "a", "--json"]) == exit_codes.OK
    made = json.loads(capsys.readouterr().out)
    assert made["differences"][0]["verdict"] == "faster" and made["first"].startswith("b/")
    assert made["notes"]["first"] == made["notes"]["second"] != []
    assert main.main(["bench", "compare", "a", "a"]) == exit_codes.OK


def test_a_file_with_figures_of_no_engine_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, speed in (("a", 20.0), ("b", 1e-320)):
        text = json.dumps({**record(), "rows": [row(repetition=number, tokens_per_second=speed) for number in (1, 2)]})
        (tmp_path / f"{name}.json").write_text(text, encoding="utf-8")
    words = [str(tmp_path / f"{name}.json") for name in "ab"]
    assert main.main(["bench", "compare", *words]) == exit_codes.BAD_INPUT
    assert "b.json is none" in capsys.readouterr().err
