"""What the action makes of a verification: its table, its advice, its report; and once through ansible-playbook."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from plugins.action.vllm_verify import advice, record, save, table

from tests.unit import ROOT
from tests.unit.fakes.fake_vllm import MODEL, Vllm


def test_table_is_aligned() -> None:
    checks = [
        {"name": "health", "ok": True, "detail": "200", "seconds": 0.002},
        {"name": "completion", "ok": False, "detail": "x" * 200, "seconds": 12.3456},
    ]
    asked = {"model": "m", "url": "u", "question": "Q?"}
    lines = table("spark-1", {"asked": asked, "checks": checks, "answer": "A\nB"}).split("\n")
    assert lines[0] == "spark-1  m at u"
    assert len({len(line) for line in lines[1:4]}) == 1 and len(lines[1]) < 100
    assert lines[3].split()[:2] == ["completion", "FAILED"] and lines[3].endswith("12.35 s")
    assert lines[4:] == ["  question: Q?", "  answer:   A B"]


def test_advice_names_cause_remedy_and_entry() -> None:
    text = advice("engine-wedged")
    assert "docker compose restart" in text and text.endswith("[engine-wedged]")
    assert advice("") == advice("no such entry") == ""


def test_report_is_written_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "spark-1.json"
    save(path, record("spark-1", {"asked": {"url": "u", "model": "m"}, "verified": True, "changed": False}))
    data = json.loads(path.read_text(encoding="utf-8"))
    assert (data["host"], data["url"], data["model"], data["verified"]) == ("spark-1", "u", "m", True)
    assert data["time"].endswith("+00:00") and "changed" not in data
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [entry.name for entry in path.parent.iterdir()] == ["spark-1.json"]


def test_report_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Exception, match=r"report .*file/x\.json on this machine"):
        save(tmp_path / "file" / "x.json", {})


@pytest.mark.parametrize(("good", "check"), [(True, False), (False, False), (True, True)])
def test_through_ansible_playbook(vllm: Vllm, tmp_path: Path, good: bool, check: bool) -> None:
    if not good:
        vllm.answer = "Berlin."
    report = tmp_path / "out" / "spark-1.json"
    task = {"sparkfleet.dgx.vllm_verify": {"url": vllm.url, "model": MODEL, "report": str(report)}}
    play = {"hosts": "all", "gather_facts": False, "connection": "local", "tasks": [task]}
    play["vars"] = {"ansible_python_interpreter": sys.executable}
    book = tmp_path / "play.json"
    book.write_text(json.dumps([play]), encoding="utf-8")
    command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", "spark-1,", str(book)]
    command += ["--check"] if check else []
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        cwd=ROOT,
    )
    assert run.returncode == (0 if good else 2), run.stdout + run.stderr
    assert "  chat        " in run.stdout and "  question: What is the capital of France?" in run.stdout
    assert report.exists() is not check
    if not check:
        assert json.loads(report.read_text(encoding="utf-8"))["verified"] is good
    if good:
        assert "changed=0" in run.stdout
    else:
        assert 'spark-1 is not verified: chat: expected "Paris" in the answer, got "Berlin."' in run.stdout
        assert "[answer-wrong]" in run.stdout and "Traceback" not in run.stdout + run.stderr


def test_half_of_a_surrogate_pair_is_saved(tmp_path: Path) -> None:
    save(tmp_path / "r.json", {"answer": "Paris \ud800"})
    assert json.loads((tmp_path / "r.json").read_text(encoding="utf-8")) == {"answer": "Paris \ud800"}
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_the_report_has_what_was_measured(vllm: Vllm, tmp_path: Path) -> None:
    """Of this run's start, or as the host keeps it; what is no record is left out."""
    verify = {"question": "What is the capital of France? Answer in one short sentence.", "expect": "Paris"}
    verify |= {"prompt": "The capital of France is", "prompt_expect": "Paris"}
    known = {"service": "vllm-m", "repo": MODEL, "image": "i", "at": 5.0, "figures": {"kv_cache_gib": 90.0}}
    engine = {"service": "vllm-m", "repo": MODEL, "port": int(vllm.url.rpartition(":")[2]), "verify": verify}
    cases = {
        "kept": ({**engine, "measured": known}, {}, 90.0),
        "started": ({**engine, "measured": known}, {"vllm-m": {**known, "figures": {"kv_cache_gib": 91.0}}}, 91.0),
        "odd": ({**engine, "measured": {"at": "soon"}}, {}, None),
    }
    tasks = [
        {
            "sparkfleet.dgx.vllm_verify": {
                **{"model": MODEL, "engines": [given], "measured": measured},
                "report": str(tmp_path / f"{name}.json"),
            }
        }
        for name, (given, measured, _) in cases.items()
    ]
    play = {"hosts": "all", "gather_facts": False, "connection": "local", "tasks": tasks}
    play["vars"] = {"ansible_python_interpreter": sys.executable}
    book = tmp_path / "play.json"
    book.write_text(json.dumps([play]), encoding="utf-8")
    command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", "spark-1,", str(book)]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr
    for name, (_, _, gib) in cases.items():
        found = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8")).get("measured")
        assert (found["figures"]["kv_cache_gib"] if found else None) == gib
