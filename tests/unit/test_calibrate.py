"""What scripts/calibrate reads of an engine's log and writes; it needs a GPU to run whole."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.unit import ROOT
from tests.unit.planning import logged_runs

LOGS = ROOT / "tests" / "unit" / "data" / "gpu-logs"
#: Cut short in the logs that are kept, or said by another version's words.
CUT = {"kv_cache_dtype", "cuda_graphs_estimated_gib"}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("calibrate_script", str(ROOT / "scripts" / "calibrate"))
    spec = importlib.util.spec_from_loader("calibrate_script", loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    sys.modules["calibrate_script"] = module
    loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["gpt-oss-20b", "llama8b-guide-fp8kv", "llama8b-v1-guide"])
def test_figures_of_real_logs(script: ModuleType, name: str) -> None:
    known = next(run for run in logged_runs.load_gpu_runs() if run["id"] == name)["logged"]
    found = script.figures((LOGS / f"{name}.log").read_text(encoding="utf-8"))
    for key in set(known) - CUT:
        assert found[key] == known[key], key


def test_a_start_that_failed_says_why(script: ModuleType) -> None:
    run = script.Run("a:2048", "a", "org/a", 0.8, {"max_num_seqs": 8}, {})
    log = 'INFO loading\nSFPROBE {"host_used": 1\ntorch.OutOfMemoryError: CUDA out of memory\n'
    made = script.entry(run, log, "0.25.1", "NVIDIA H200", 139.8, 95.76)
    assert made["started"] is False and made["id"] == "a-2048"
    assert made["failed"] == "torch.OutOfMemoryError: CUDA out of memory"
    assert "too little time" in script.entry(run, "", "0.25.1", "NVIDIA H200", 139.8, 95.76)["failed"]


def test_entries_are_kept_as_they_come(script: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "runs.yml"
    file.write_text((ROOT / "docs" / "gpu-runs.yml").read_text(encoding="utf-8"), encoding="utf-8")
    before: list[dict[str, Any]] = yaml.safe_load(file.read_text(encoding="utf-8"))["runs"]
    head = file.read_text(encoding="utf-8").partition("\nruns:")[0]
    run = script.Run("gpt-oss-20b", "gpt-oss-20b", "openai/gpt-oss-20b", 0.8, {"max_num_seqs": 64}, {})
    log = (LOGS / "gpt-oss-20b.log").read_text(encoding="utf-8")
    made = script.entry(run, log, "0.28.0", "NVIDIA H200", 139.801, 95.76)
    script.keep(file, made)
    script.keep(file, {**made, "date": "2026-12-01"})  # the same run again takes its place
    text = file.read_text(encoding="utf-8")
    after = yaml.safe_load(text)["runs"]
    assert after[:-1] == before and text.startswith(head)
    assert after[-1]["started"] and after[-1]["engine"] == "0.28.0" and after[-1]["date"] == "2026-12-01"
    assert after[-1]["logged"]["kv_cache_tokens"] == 3_112_044
    script.keep(tmp_path / "new.yml", made)
    assert [item["id"] for item in yaml.safe_load((tmp_path / "new.yml").read_text())["runs"]] == ["gpt-oss-20b"]


def test_runs_are_the_cards_for_one_spark(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed[0].startswith("diffusiongemma") and not any("-2x" in line for line in listed)
    own = [line for line in listed if ":" not in line.split()[0]]
    assert listed[: len(own)] == own  # every card once, before other numbers of batched tokens
    assert script.main(["--list", "--only", "llama31-8b-fp8"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["llama31-8b-fp8", "llama31-8b-fp8:2048", "llama31-8b-fp8:8192"]
    assert script.main(["--list", "--only", "nothing"]) == 2
    assert "no run starts with nothing" in capsys.readouterr().err


def test_every_config_is_of_a_card(script: ModuleType) -> None:
    folders = {path.name for path in (ROOT / "scripts" / "configs").iterdir()}
    assert folders <= {run.model for run in script.runs(ROOT / "models")}


def test_without_vllm_and_gpu_it_says_so(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is here")
    assert script.main(["--only", "llama31-8b-fp8"]) == 2
    assert "needs vLLM and an NVIDIA GPU" in capsys.readouterr().err
