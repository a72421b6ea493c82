"""The commands plan, models and compose as people and programs use them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparkfleet.cli import main
from sparkfleet.planning import catalog
from sparkfleet.reporting import report

KEYS = {
    *("model", "profile", "weights_gib", "kv_bytes_per_token", "kv_cache_gib", "kv_cache_tokens", "max_concurrency"),
    *("requested_gib", "available_gib", "fits", "reasons", "suggestions", "decode_tok_s_limit"),
}


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    try:
        code = main.main(words)
    except SystemExit as stop:  # argparse
        code = int(stop.code or 0)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_plan_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", "qwen3-32b-fp8", "--json")
    made = json.loads(out)
    assert code == 0 and made["fits"] is True and made["reasons"] == []
    assert set(made) >= KEYS
    assert made["kv_bytes_per_token"] == 262144


def test_plan_that_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", "llama33-70b-fp8", "--available-gib", "60", "--json")
    made = json.loads(out)
    assert code == 3 and made["fits"] is False
    assert made["reasons"] and made["suggestions"][0]["text"]


def test_plan_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", "llama33-70b-fp8")
    assert code == 0
    assert "FITS" in out and "at most 3.9 tokens a second; measured 2.74" in out
    bar = next(line for line in out.splitlines() if "[" in line)
    assert bar.count("W") == round(67.7 / 119.7 * 60) and "\033" not in out
    code, out, _ = run(capsys, "plan", "llama33-70b-fp8", "--total-gib", "64")
    assert code == 3 and "DOES NOT FIT" in out and "two Sparks" in out


def test_figures_change_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    def tokens(*words: str) -> int:
        return int(json.loads(run(capsys, "plan", "llama31-8b-fp8", "--json", *words)[1])["kv_cache_tokens"])

    usual = tokens()
    assert tokens("--engine", "0.31.0") > 1.9 * usual  # FP8 KV cache
    assert tokens("--profile", "low_latency") < usual
    assert tokens("--set", "gpu_memory_utilization=0.5") < 0.6 * usual
    assert tokens("--total-gib", "121.63", "--available-gib", "118") > usual


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("plan", "llama31-8b"), "did you mean llama31-8b-fp8?"),
        (("plan", "llama31-8b-fp8", "--profile", "fast"), "has no profile 'fast'"),
        (("plan", "llama31-8b-fp8", "--total-gib", "much"), "'much' is not a number of GiB"),
        (("plan", "llama31-8b-fp8", "--total-gib", "nan"), "'nan' is not a number of GiB"),
        (("plan", "llama31-8b-fp8", "--available-gib", "-1"), "'-1' is not a number of GiB"),
        (("plan", "llama31-8b-fp8", "--total-gib", "64", "--available-gib", "65"), "is more than the host's total"),
        (("plan", "llama31-8b-fp8", "--engine", "new"), "'new' is not a version of vLLM"),
        (("plan", "llama31-8b-fp8", "--set", "max_num_seqs"), "write ARGUMENT=VALUE"),
        (("plan", "llama31-8b-fp8", "--set", "max_num_seqs=0"), "max_num_seqs: must be a whole number from 1 to 65536"),
        (("plan", "/nowhere.yml"), "/nowhere.yml does not exist"),
        (("plan", "qwen3-8b-fp8", "--set", "max_num_seqs=x"), "--set max_num_seqs: must be a whole number"),
        (
            ("plan", "qwen3-8b-fp8", "--set", "enforce-eagr=true"),
            "--set enforce_eagr: did you mean --set enforce_eager",
        ),
        (("plan", "qwen3-8b-fp8", "--set", "enable_prefx_cach=1"), "did you mean enable_prefix_caching?"),
        (("compose", "qwen3-8b-fp8", "--set", "zzz=1"), "--set zzz: unknown argument of vllm serve"),
        (("plan", "qwen3-8b-fp8", "--set", "port=1"), "--set port: Sparkfleet sets this argument itself"),
        (("compose", "llama31-8b-fp8", "--profile", "fast"), "has no profile 'fast'"),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], complaint: str) -> None:
    code, out, err = run(capsys, *words)
    assert code == 2 and out == "" and complaint in err
    assert len(err.splitlines()[-1]) < 400 and "sparkfleet_vllm_" not in err


@pytest.mark.parametrize("name", ["no_enable_prefix_caching", "gdn_decode_kernel", "swap-space", "seed"])
def test_arguments_of_any_version_are_taken(capsys: pytest.CaptureFixture[str], name: str) -> None:
    value = "4" if name in ("swap-space", "seed") else "true"
    code, out, err = run(capsys, "compose", "qwen3-8b-fp8", "--set", f"{name}={value}")
    assert code == 0 and name.replace("_", "-") in out, err


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_the_table_of_models_fits_the_terminal(width: int) -> None:
    cards = [catalog.load(name) for name in catalog.names()]
    text = report.models(cards, dict.fromkeys(catalog.names(), True), width)
    assert max(map(len, text.splitlines())) <= width
    assert (cards[0].repo in text) is (width == 200)
    assert ("tested:" in text) is ("tested" in text.splitlines()[0])


def test_a_card_of_ones_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.yml"
    text = (catalog.catalogue_folder() / "llama31-8b-fp8.yml").read_text(encoding="utf-8")
    path.write_text(text.replace("name: llama31-8b-fp8", "name: mine", 1), encoding="utf-8")
    code, out, _ = run(capsys, "plan", str(path), "--json")
    assert code == 0 and json.loads(out)["model"] == "mine"
    code, out, _ = run(capsys, "compose", str(path))
    assert code == 0 and "vllm-llama31-8b-fp8:" in out


def test_models(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "models")
    assert code == 0
    rows, _, legend = out.partition("\n\n")
    assert [row.split()[0] for row in rows.splitlines()[1:]] == catalog.names()
    assert max(map(len, out.splitlines())) <= 100
    for column in rows.splitlines()[0].split()[1:]:
        assert f"{column}:" in " ".join(legend.split()), column
    code, out, _ = run(capsys, "models", "--json")
    data = json.loads(out)
    assert [entry["name"] for entry in data] == catalog.names()
    assert {entry["fits"] for entry in data} == {True}
    asked = {entry["name"]: entry["verify"]["kinds"] for entry in data}
    assert "tool_call" in asked["llama31-8b-fp8"] and "reasoning" not in asked["llama31-8b-fp8"]
