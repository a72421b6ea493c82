"""The figures of the report, of a real Prometheus: what lasts for minutes counts, wherever between points it falls."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from simulator import figures
from sparkfleet_host import prometheus

from sparkfleet.monitoring import page
from tests.unit.reporting.test_html_report import page as report

HOURS = 24
QUARTER, LATER = 900, 3600
#: Without a marker of its end a series lasts so much longer; rules write one, blocks from text have none.
LOOKBACK = 300
HOT = 'ALERTS{alertname="SparkfleetMemoryLow",alertstate="firing",host="s1",severity="critical"}'
LONG = 'ALERTS{alertname="SparkfleetRuleFailing",alertstate="firing",severity="warning"}'
ONCE = 'ALERTS{alertname="SparkfleetGpuHot",alertstate="firing",host="s2",severity="warning"}'


def samples(begin: int, end: int, now: int) -> Iterator[str]:
    """The GPU of s1 works for three minutes of each quarter of an hour, never at its ends; the power of s2 is known for
    the last six hours."""
    for at in range(begin, end, prometheus.GRAIN):
        busy = 300 <= at % QUARTER < 480
        yield f'sparkfleet_gpu_power_watts{{host="s1",gpu="0"}} {110 if busy else 10} {at}'
        yield f'sparkfleet:generation_tokens:rate1m{{host="s1",model="m"}} {1000 if busy else 0} {at}'
        # No request, no quantile.
        first = "0.5" if busy else "NaN"
        yield f'sparkfleet:time_to_first_token_seconds:p95_5m{{host="s1",model="m"}} {first} {at}'
        yield f'sparkfleet:generation_tokens:rate1m{{host="s2",model="m"}} 10 {at}'
        if at > now - 6 * 3600:
            yield f'sparkfleet_gpu_power_watts{{host="s2",gpu="0"}} 40 {at}'
        if busy:
            yield f"{HOT} 1 {at}"
        if now - 7200 <= at < now - 7000:
            yield f"{ONCE} 1 {at}"
        yield f"{LONG} 1 {at}"
    yield "# EOF"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder, now = tmp_path_factory.mktemp("prometheus"), int(time.time())
    text = folder / "samples.txt"
    lines = sorted(samples(now // QUARTER * QUARTER - (HOURS + 1) * 3600, now + LATER, now), key=order)
    text.write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = ["promtool", "tsdb", "create-blocks-from", "openmetrics", "--quiet", str(text), str(folder / "data")]
    subprocess.run(command, check=True, capture_output=True)
    with figures.prometheus(folder, figures.free_port()) as address:
        port = int(address.rpartition(":")[2])
        return prometheus.figures(port, page.queries(), HOURS * 3600, page.totals())


def order(line: str) -> tuple[bool, str]:
    """Samples of a series stand together, the end at the end."""
    return line == "# EOF", line.partition("{")[0]


def of(found: list[Any], **labels: str) -> Any:
    return next(value for known, value in found if labels.items() <= known.items())


def test_nothing_is_missing_and_the_window_is_as_long_as_was_asked(found: dict[str, Any]) -> None:
    assert found["missing"] == [] and found["seconds"] == HOURS * 3600
    assert len(found["times"]) == prometheus.POINTS and found["at"] - found["times"][-1] < prometheus.GRAIN
    assert found["times"][0] - found["step"] == found["times"][-1] - found["seconds"]


def test_power_and_tokens_between_two_points_count(found: dict[str, Any]) -> None:
    power, tokens = found["totals"]["power"], found["totals"]["tokens"]
    # 110 W for a fifth of the day and 10 W for the rest: 0.72 kWh.
    assert of(power, host="s1") == {"sum": 0.72 * 3.6e6, "seconds": HOURS * 3600}
    assert of(tokens, host="s1")["sum"] == 96 * 180 * 1000


def test_tokens_count_while_power_was_measured(found: dict[str, Any]) -> None:
    power, tokens = of(found["totals"]["power"], host="s2"), of(found["totals"]["tokens"], host="s2")
    assert power["seconds"] == pytest.approx(6 * 3600, abs=30) and power["sum"] == 40 * power["seconds"]
    assert tokens == {"sum": 10 * power["seconds"], "seconds": power["seconds"]}


def test_a_chart_has_the_mean_of_each_step(found: dict[str, Any]) -> None:
    line = of(found["window"]["model_tokens"], model="m")
    assert len(line) == prometheus.POINTS and line[10:20] == [pytest.approx(210)] * 10
    assert of(found["window"]["first_token"], model="m")[10:20] == [pytest.approx(0.5)] * 10


def test_alerts_between_two_points_are_counted(found: dict[str, Any]) -> None:
    hot = of(found["fired"], alertname="SparkfleetMemoryLow", host="s1", severity="critical")
    # One may be cut in two by the ends of the window.
    assert hot["times"] in (96, 97)
    assert hot["seconds"] == pytest.approx(96 * (180 + LOOKBACK), abs=96 * prometheus.GRAIN)
    once = of(found["fired"], alertname="SparkfleetGpuHot", host="s2")
    assert once["times"] == 1 and once["seconds"] == pytest.approx(200 + LOOKBACK, abs=30)
    assert once["first"] == pytest.approx(found["at"] - 7200, abs=60)
    # It fired before the window and fires still.
    whole = of(found["fired"], alertname="SparkfleetRuleFailing")
    first = found["times"][0] - found["step"] + prometheus.GRAIN
    assert whole == {"times": 1, "seconds": HOURS * 3600, "first": first}


def test_the_report_has_them(found: dict[str, Any], tmp_path: Path) -> None:
    sections = report(tmp_path, found=found).sections
    assert "s1 24.0 0.720 17,280,000 0.15" in " ".join(sections["costs"].split())
    assert "critical SparkfleetMemoryLow s1" in " ".join(sections["alerts"].split())


@pytest.mark.parametrize("hours", [1, 2, 5, 24, 168, 2160])
def test_a_window_is_whole_steps_and_nearly_as_long_as_was_asked(hours: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def ask(client: object, path: str, **words: Any) -> list[Any]:
        asked.append(words)
        return []

    monkeypatch.setattr(prometheus, "_ask", ask)
    monkeypatch.setattr(prometheus, "_alerts", lambda client: [])
    monkeypatch.setattr(prometheus.Client, "get", lambda *words, **more: None)
    made = prometheus.figures(1, {"a": {"expr": "a", "window": True}}, hours * 3600, {"b": "b"})
    assert 0.95 * hours * 3600 <= made["seconds"] <= hours * 3600 and made["step"] % prometheus.GRAIN == 0
    assert len(made["times"]) * made["step"] == made["seconds"] and len(made["times"]) <= prometheus.POINTS
    # Parts follow one another without a gap, and none is too much for Prometheus.
    ends = [words["time"] for words in asked if words["query"].startswith("sum_over_time")]
    lengths = [after - before for before, after in zip([made["times"][0] - made["step"], *ends], ends, strict=False)]
    assert sum(lengths) == made["seconds"] and max(lengths) <= prometheus.PART
