"""The status page in headless Chromium, behind a gateway with keys, before a Prometheus that has figures of 200 Sparks.

Where Chromium or the modules of web/ are missing (`scripts/page check` installs them) it is skipped; Prometheus and
HAProxy are there for other tests.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from simulator import figures
from sparkfleet_host import prometheus

from sparkfleet.fleet import gateway as planned
from sparkfleet.monitoring import page
from sparkfleet.reporting import html_report
from tests.unit import ROOT
from tests.unit.reporting.test_html_report import row, window
from tests.unit.roles.haproxy import Gateway, Spark, running

WEB = ROOT / "web"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or ""
NODE = shutil.which("node")
KEY = "a-key-of-a-client"
SPARKS = 200
#: A page with figures in both layouts and schemes, and each fault once.
LOOKS = (
    "well:desktop:light",
    "well:phone:dark",
    "silent:phone:light",
    "empty:desktop:dark",
    "no-fleet-file:desktop:light",
)


@pytest.fixture(scope="module")
def monitor() -> Iterator[str]:
    """Address of Prometheus with figures of a fleet in a rollout."""
    with figures.serving(SPARKS, rollout=True) as (address, _):
        yield address


@pytest.fixture(scope="module")
def door(monitor: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    engine = Spark("spark-1")
    hosts = {
        "spark-1": {"ansible_host": "127.0.0.1", "sparkfleet_port": engine.port, "sparkfleet_model": "llama31-8b-fp8"}
    }
    variables = {
        "gateway_status": monitor.removeprefix("http://"),
        "gateway_status_expressions": list(page.expressions().values()),
        "gateway_keys": planned.clients([KEY]),
        # Of a test's own are shorter than Prometheus may need on a busy machine.
        "gateway_answer_timeout": "30s",
    }
    with running(tmp_path_factory.mktemp("gateway"), hosts, **variables) as gateway:
        yield gateway
    engine.close()


def test_every_expression_has_figures(monitor: str) -> None:
    """Of the fleet that does not exist; of a real one `python -m simulator.monitoring` asks."""
    port, end = int(monitor.rpartition(":")[2]), time.monotonic() + 30
    firing: set[str] = set()
    while "SparkfleetGpuXid" not in firing and time.monotonic() < end:  # the rules are evaluated every 2 s
        found = prometheus.figures(port, page.queries(), 6 * 3600, page.totals())
        firing = {alert["labels"]["alertname"] for alert in found["firing"]}
    assert "SparkfleetGpuXid" in firing
    assert found["missing"] == []
    assert [name for name, samples in found["now"].items() if not samples] == []
    assert {*found["window"]} == {query.name for query in page.QUERIES if query.window}
    # One Spark has no figures, and one that gave up has none of late.
    assert len(found["now"]["temperature"]) == SPARKS - 1
    line = next(values for labels, values in found["window"]["tokens"] if labels["host"] == "spark-2")
    assert len(line) == len(found["times"]) and sum(value is not None for value in line) > 90


browser = pytest.mark.skipif(
    not (NODE and CHROMIUM and (WEB / "node_modules").is_dir()), reason="no Chromium, or web/ not installed"
)


def looked(address: str, out: Path, looks: Sequence[str], *words: str) -> dict[str, dict[str, Any]]:
    """What web/check.mjs found, by look; nothing of it may be wrong."""
    argv = [str(NODE), str(WEB / "check.mjs"), address, "--out", str(out), "--only", ",".join(looks), *words]
    environment = {**os.environ, "CHROMIUM": CHROMIUM}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {f"{item['scene']}:{item['size']}:{item['scheme']}": item for item in json.loads(done.stdout)}
    assert {*found} == {*looks}
    for name, item in found.items():
        assert item["errors"] == [] and item["elsewhere"] == [], (name, item)
        assert item["axe"] == [], (name, item["axe"])
        assert item["sideways"] <= 0, f"{name}: wider than the screen"
        assert (out / f"{item['scene']}-{item['size']}-{item['scheme']}.png").stat().st_size > 10_000
    return found


@browser
def test_the_report_in_a_browser(tmp_path: Path) -> None:
    out = Path(os.environ.get("SPARKFLEET_SCREENSHOTS") or tmp_path)
    now = time.time()
    fleet = figures.fleet(12, now)["sparks"]
    about = html_report.About(now, "anna@ops-1", "inventory/mine", "0.2.0", 0.3)
    events = {name: entry["events"] for name, entry in fleet.items()}
    found = window(window={"model_tokens": [[{"model": "o/m"}, [1.0, 3.0, 2.0, None, 4.0]]]})
    made = html_report.document(about, [row(name) for name in fleet], fleet, events, found, tmp_path)
    (tmp_path / "report.html").write_text(made, encoding="utf-8")
    address = (tmp_path / "report.html").as_uri()
    looks = looked(address, out, ["report:desktop:light", "report:phone:dark"])
    assert {item["requests"] for item in looks.values()} == {1}


@browser
def test_the_page_in_a_browser(door: Gateway, tmp_path: Path) -> None:
    out = Path(os.environ.get("SPARKFLEET_SCREENSHOTS") or tmp_path)
    address = f"http://127.0.0.1:{door.port}/status/"
    looks = looked(address, out, LOOKS, "--key", KEY)
    for name in LOOKS[:2]:
        item = looks[name]
        assert item["sparks"] == SPARKS and item["banner"] == "" and item["freshness"] == "live"
        assert "wave 3 of 4" in item["rollout"] and "spark-5 switching" in item["rollout"]
        # With the keyboard: a row was opened, and a chart followed to a point in time.
        assert item["opened"] == "true" and item["moment"] != "now"
        assert item["filtered"] == 1
        # An engine that starts on demand is well asleep, and the other one of its Spark says more.
        assert (item["states"]["spark-21"], item["states"]["spark-22"]) == ("asleep", "serving")
        assert {"spark-5", "spark-10", "spark-12"} <= {*item["attention"]}
        assert not {"spark-21", "spark-22"} & {*item["attention"]}
    assert "Prometheus does not answer" in looks["silent:phone:light"]["banner"]
    assert "no figures of these Sparks yet" in looks["empty:desktop:dark"]["banner"]
    assert "fleet.json is not there" in looks["no-fleet-file:desktop:light"]["banner"]
    # Those that Prometheus knows.
    assert looks["no-fleet-file:desktop:light"]["sparks"] == SPARKS - 1
