"""vLLM's metrics from Prometheus text: bounded, linear, and never NaN."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sparkfleet_host import metrics
from sparkfleet_host.verify import COUNTERS, counters

TEXT = """# HELP vllm:generation_tokens_total Number of generation tokens processed.
vllm:generation_tokens_total{engine="0",model_name="a } b \\" {"} 12.0
vllm:generation_tokens_total{engine="1"} 3 1700000000000
ray_vllm_request_success_total_total 4e0
vllm:num_requests_running 1
vllm:generation_tokens_created{engine="0"} 1.7e+09
python_info{version="3"} 1
"""


def test_what_an_engine_says() -> None:
    assert next(metrics.samples(TEXT)) == (
        "vllm:generation_tokens_total",
        '{engine="0",model_name="a } b \\" {"}',
        12.0,
    )
    assert metrics.sums(TEXT, ("generation_tokens", "request_success", "num_requests_running", "absent")) == {
        "generation_tokens": 15.0,
        "request_success": 4.0,
        "num_requests_running": 1.0,
    }


@pytest.mark.parametrize(
    "value",
    ["NaN", "nan", "nan-e", "+Inf", "-Inf", "1e999", "1.2.3", "1_0", "", "x", "1 2 3 x", "0x1", "\u0661", "9" * 500],
)
def test_a_value_that_is_no_finite_number_is_left_out(value: str) -> None:
    if value != "1 2 3 x":
        assert counters(f"vllm:generation_tokens_total {value}\n") == {}
    assert list(metrics.samples(f'a{{b="c"}} {value}'))[:1] in ([], [("a", '{b="c"}', 1.0)])


def test_sums_stay_finite() -> None:
    assert counters("vllm:prompt_tokens 1e308\n" * 3) == {}


@pytest.mark.parametrize(
    "line",
    [
        "vllm:_total" + "_total" * 400_000,
        "vllm:" + "_total" * 2_000 + " x",
        'a{b="' + "\\" * 15_000,
        'a{b="' + 'c"d"' * 3_700,
        "a{" + "b" * 15_000,
        "a " + "1" * 15_000 + "x",
        "a" + " " * 15_000,
    ],
)
def test_no_line_takes_long(line: str) -> None:
    began = time.process_time()
    list(metrics.samples(f"{line}\n" * max(1, (4 << 20) // len(line))))
    assert time.process_time() - began < 5  # the pattern of before: 9.5 s for 96 kB


def test_lines_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "LINES", 10)
    assert len(list(metrics.samples("a 1\n" * 100))) == 10


PIECES = [*'vllm:_{}"\\=, 0123456789.eE+-#\n\tNaInf', "generation_tokens", "_total"]


@given(st.lists(st.sampled_from(PIECES)).map("".join))
def test_any_text(text: str) -> None:
    for name, labels, value in metrics.samples(f"{text}\nvllm:generation_tokens{text}"):
        assert name and math.isfinite(value) and (not labels or labels[0] + labels[-1] == "{}")
    assert all(math.isfinite(value) for value in counters(text).values())


@given(
    st.dictionaries(st.sampled_from(COUNTERS), st.floats(0, 1e15), max_size=3),
    st.sampled_from(["vllm:", "ray_vllm_", "vllm_"]),
    st.sampled_from(["", "_total", "_total_total"]),
    st.lists(st.text(max_size=5), max_size=3),
)
def test_what_is_written_is_read(values: dict[str, float], prefix: str, suffix: str, labels: list[str]) -> None:
    def quoted(text: str) -> str:
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'

    inside = ",".join(f"l{place}={quoted(label)}" for place, label in enumerate(labels))
    head = f"{{{inside}}}" if labels else ""
    text = "\n".join(f"{prefix}{name}{suffix}{head} {value!r}" for name, value in values.items())
    assert metrics.sums(text, COUNTERS) == values
