"""The report: one file that loads nothing, of what is known; what a Spark says cannot break out of it."""

from __future__ import annotations

import html.parser
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
from simulator import figures

from sparkfleet.reporting import html_report, svg
from tests.unit.performance import benchmark_records

NOW = 1_700_000_000.0
ABOUT = html_report.About(NOW, "anna@ops", "inventory/mine", "0.2.0", 0.3)
EVIL = "<script>alert(1)</script>\"'><img src=x>"


class Page(html.parser.HTMLParser):
    """The text of each section, and every element with its attributes."""

    VOID = frozenset(("meta", "link", "br"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections: dict[str, str] = {"": ""}
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self._at = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        self.sections[self._at] += " " if tag in ("td", "th", "text", "li") else ""
        if tag == "section":
            self._at = str(dict(attrs)["id"])
            self.sections[self._at] = ""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self._at = "" if tag == "section" else self._at

    def handle_data(self, data: str) -> None:
        self.sections[self._at] += data


def row(host: str, **more: Any) -> dict[str, Any]:
    made = {"host": host, "state": "serving", "model": "m", "profile": "throughput", "release": 2, "digest": "abc"}
    made |= {"running": 3, "waiting": 1, "kv_cache": 0.25, "tokens_per_second": 120.5, "temperature": 51, "restarts": 0}
    return {**made, "slow": False, "drained": False, "drift": [], "problem": "", **more}


def window(**more: Any) -> dict[str, Any]:
    times = [int(NOW) - 3600 + 900 * number for number in range(5)]
    made: dict[str, Any] = {"at": int(NOW), "seconds": 3600, "step": 900, "times": times, "missing": []}
    return {**made, "now": {}, "window": {}, "totals": {}, "fired": [], "firing": [], **more}


def page(tmp_path: Path, *rows: dict[str, Any], found: dict[str, Any] | None = None, **more: Any) -> Page:
    shown, histories = more.get("shown", {}), more.get("histories", {})
    return Page(html_report.document(ABOUT, rows or [row("s1")], shown, histories, found or {}, tmp_path))


def test_it_loads_nothing_and_has_no_scripts(tmp_path: Path) -> None:
    fleet = figures.fleet(4, NOW)
    histories = {name: entry["events"] for name, entry in fleet["sparks"].items()}
    made = page(tmp_path, *map(row, fleet["sparks"]), found=window(), shown=fleet["sparks"], histories=histories)
    assert made.open == []
    tags = {tag for tag, _ in made.elements}
    assert not tags & {"script", "img", "iframe", "object", "embed", "form", "base"}
    for _, attributes in made.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:,")), attributes
    policy = next(item["content"] for tag, item in made.elements if item.get("http-equiv"))
    assert "default-src 'none'" in str(policy)
    # Every link of the contents leads somewhere.
    anchors = {str(item["href"])[1:] for tag, item in made.elements if tag == "a"}
    assert anchors == {*made.sections} - {""}


def test_what_others_say_stays_text(tmp_path: Path) -> None:
    shown = {"s1": {"memory": None, "engines": [{"image": EVIL}], "limit": None}}
    histories = {"s1": [{"at": NOW, "event": EVIL, "detail": EVIL, "by": EVIL, "model": EVIL}]}
    firing = [{"labels": {"alertname": EVIL, "severity": EVIL}, "annotations": {"summary": EVIL}, "since": EVIL}]
    found = window(
        firing=firing,
        fired=[[{"alertname": EVIL, "host": EVIL, "severity": EVIL}, {"times": 1, "seconds": 60, "first": NOW}]],
        window={"model_tokens": [[{"model": EVIL}, [1.0, 2.0, 3.0, 4.0, 5.0]]]},
    )
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "s1.json").write_text(
        json.dumps({"model": EVIL, "answer": EVIL, "checks": [{"name": EVIL}]})
    )
    rows = [row("s1", state=EVIL, model=EVIL, digest=EVIL, drift=[EVIL], problem=EVIL, message=EVIL)]
    made = page(tmp_path, *rows, found=found, shown=shown, histories=histories)
    assert made.open == [] and not {"script", "img"} & {tag for tag, _ in made.elements}
    for section in ("fleet", "hours", "alerts", "verification", "drift", "history"):
        assert "<script>" in made.sections[section], section


def test_memory_is_plan_against_measured(tmp_path: Path) -> None:
    memory = {"total": 119.7, "planned": {"weights": 60.0, "kv_cache": 30.0}, "logged": {"weights": 61.5}}
    memory["planned"] |= {"activations": 5.0, "runtime": 2.5, "cuda_graphs": 0.0}
    gib = 1024**3
    found = window(
        now={"memory_total": [[{"host": "s1"}, 119.7 * gib]], "memory_free": [[{"host": "s1"}, 20.2 * gib]]},
    )
    made = page(tmp_path, found=found, shown={"s1": {"memory": memory}})
    text = " ".join(made.sections["memory"].split())
    for words in ("60.0 (61.5)", "30.0", "97.5", "99.5", "119.7", "+2.5%"):
        assert words in text, words
    bars = [item for tag, item in made.elements if item.get("class") == "membar"]
    assert "97.5 of 119.7 GiB planned, 99.5 in use on the host" in str(bars[0]["aria-label"])


def benchmarked(folder: Path, *texts: str) -> None:
    """Files of benchmarks of the Spark s1, in their order."""
    there = folder / "benchmarks" / "s1"
    there.mkdir(parents=True)
    for number, text in enumerate(texts):
        (there / f"{number}.json").write_text(text, encoding="utf-8")


def test_benchmarks_are_drawn_with_their_limit(tmp_path: Path) -> None:
    rows = [
        benchmark_records.row(streams=streams, repetition=number, tokens_per_second=25.0 * streams + number)
        | {"stream_tokens_per_second": 25.0, "ttft_p50_ms": 90.0}
        for streams in (1, 4, 16)
        for number in (0, 2)
    ]
    record = benchmark_records.record(rows, limit_tok_s=31.9)
    benchmarked(tmp_path, json.dumps(record), "{", json.dumps({**record, "rows": {}}))
    made = page(tmp_path)
    text = " ".join(made.sections["benchmarks"].split())
    # The mean of two repetitions, and the share of the limit.
    assert "16 401.0 25.0 78% 90 ms" in text and "limit by memory bandwidth: 31.9 tokens/s a stream" in text
    assert sum(item.get("class") == "limit" for _, item in made.elements) == 1
    assert sum(tag == "circle" for tag, _ in made.elements) == 6


@pytest.mark.parametrize(
    "more",
    [
        {"at": 1e300},
        {"at": -1e18},
        {"rows": [benchmark_records.row(tokens_per_second=5e-324)]},
        {"rows": [benchmark_records.row(tokens_per_second=10**390)]},
        {"rows": [benchmark_records.row(streams=10**390)]},
        {"rows": [benchmark_records.row(streams=0)]},
        {"limit_tok_s": 1e-320},
        {"release": 10**380},
    ],
)
def test_a_damaged_benchmark_does_not_keep_the_report_from_being_made(more: dict[str, Any], tmp_path: Path) -> None:
    record = benchmark_records.record()
    benchmarked(tmp_path, json.dumps(record), json.dumps({**record, **more}))
    assert "org/m" in page(tmp_path, row("s1", model="org/m")).sections["fleet"]
    assert "NVIDIA GB10" in page(tmp_path).sections["benchmarks"]


def test_an_engine_that_starts_on_demand_is_well_asleep(tmp_path: Path) -> None:
    made = page(tmp_path, row("s1"), row("s2", state="asleep"), row("s3", state="given-up"), row("s4", state="loading"))
    tones = [str(item["class"]) for tag, item in made.elements if str(item.get("class")).startswith("badge ")]
    assert tones[:4] == ["badge good", "badge good", "badge bad", "badge busy"]
    assert "Serving2/4Sparks" in "".join(made.sections[""].split())


@pytest.mark.parametrize("at", [1e300, -1e18, float("nan"), float("inf")])
def test_a_time_that_no_clock_shows(at: float) -> None:
    assert html_report.moment(at) == html_report.NONE


@pytest.mark.parametrize("value", [10**390, -(10**390), 1e300, float("nan"), True, "1"])
def test_what_is_no_figure_is_a_dash(value: Any) -> None:
    assert html_report.figure(value) == html_report.NONE


def test_without_benchmarks_and_without_prometheus_it_says_so(tmp_path: Path) -> None:
    made = page(tmp_path, row("s1", drift=None), row("s2", state="unreachable", message="s2: no route to host"))
    assert "No benchmark was run" in made.sections["benchmarks"]
    assert "no Prometheus that answers" in made.sections["hours"] and "Not known" in made.sections["alerts"]
    assert "Not known without Prometheus" in made.sections["costs"]
    assert "s2: no route to host" in made.sections["fleet"]


def test_energy_and_costs(tmp_path: Path) -> None:
    totals = {
        "power": [[{"host": "s1"}, {"sum": 3.6e5, "seconds": 3600}], [{"host": "s2"}, {"sum": 1.8e5, "seconds": 3600}]],
        "tokens": [[{"host": "s1"}, {"sum": 3.6e6, "seconds": 3600}]],
    }
    made = page(tmp_path, found=window(totals=totals))
    text = " ".join(made.sections["costs"].split())
    # 100 W for an hour; 3.6 million tokens; 0.30 a kWh.
    assert "s1 1.0 0.100 3,600,000 0.10 0.03 0.008" in text and "s2 1.0 0.050 0" in text
    assert "all 2.0 0.150 3,600,000 0.15 0.05 0.013" in text


def test_alerts_that_fired_are_counted(tmp_path: Path) -> None:
    labels = {"alertname": "SparkfleetGpuHot", "host": "s1", "severity": "warning"}
    fired = [[labels, {"times": 2, "seconds": 2700, "first": int(NOW) - 3600}]]
    fired.append([{"alertname": "SparkfleetRuleFailing"}, {"times": 1, "seconds": 45, "first": int(NOW) - 60}])
    text = " ".join(page(tmp_path, found=window(fired=fired)).sections["alerts"].split())
    first = time.strftime("%Y-%m-%d %H:%M", time.localtime(NOW - 3600))
    assert f"warning SparkfleetGpuHot s1 {first} 2 45" in text and "None fires." in text
    assert text.endswith(" 1 0.8")


def test_a_verification_of_each_engine(tmp_path: Path) -> None:
    (tmp_path / "reports").mkdir()
    checks = [{"name": "chat", "ok": True}, {"name": "stream", "ok": False}]
    told = {"time": "2026-11-29T08:00:00+00:00", "model": "o/m", "verified": False, "checks": checks, "answer": "Rome"}
    (tmp_path / "reports" / "s1.json").write_text(json.dumps(told))
    (tmp_path / "reports" / "s1-vllm-b.json").write_text(json.dumps({**told, "verified": True, "checks": checks[:1]}))
    (tmp_path / "reports" / "s2.json").write_text("not JSON")
    histories = {"s2": [{"at": NOW, "event": "verified", "release": 4}]}
    made = page(tmp_path, row("s1"), row("s2"), histories=histories)
    text = " ".join(made.sections["verification"].split())
    assert "s1 failed stream 1 / 2 o/m 2026-11-29 08:00:00 Rome none" in text and "s1 verified 1 / 1" in text
    assert "s2 not verified from this controller verified release 4" in text


@pytest.mark.parametrize(
    ("high", "steps"),
    [
        (0, [0, 1]),
        (1, [0, 0.25, 0.5, 0.75, 1.0]),
        (7, [0, 2, 4, 6, 8]),
        (431, [0, 200, 400, 600]),
        (1e-9, None),
        (5e-324, [0, 1]),
        (1.7e308, [0, 1]),
        (math.nan, [0, 1]),
        (math.inf, [0, 1]),
    ],
)
def test_steps_of_a_scale_are_round(high: float, steps: list[float] | None) -> None:
    found = svg.nice(high)
    assert found == steps or (steps is None and 3 <= len(found) <= 6 and found[-1] >= high)


def test_a_gap_is_not_drawn_over_and_a_far_limit_only_said() -> None:
    line = svg.Line("a", [(0.0, 1.0), (1.0, None), (2.0, 3.0), (3.0, 2.0)])
    drawn = svg.lines("t", [line], svg.Scale([]), (100.0, "limit: 100"))
    assert drawn.count("M") - drawn.count("MT") == 2 and 'class="limit"' not in drawn and "limit: 100" in drawn
    assert svg.lines("t", [svg.Line("a", [(0.0, None)])], svg.Scale([])) == ""
