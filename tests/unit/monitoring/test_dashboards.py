"""The dashboards: panels beside one another, and expressions that Prometheus can read and that exist."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from sparkfleet_host import guard, sensors

from sparkfleet.monitoring import dashboards, rules
from tests.unit.monitoring.test_rules import PROMTOOL

BOARDS = [pytest.param(board, id=board.name) for board in dashboards.DASHBOARDS]


def made(board: dashboards.Dashboard) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(dashboards.as_json(board))
    return found


@pytest.mark.parametrize("board", BOARDS)
def test_panels_do_not_overlap_and_have_numbers_of_their_own(board: dashboards.Dashboard) -> None:
    panels = made(board)["panels"]
    taken = [
        (x, y)
        for panel in panels
        for at in [panel["gridPos"]]
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(taken) == len(set(taken)) and max(x for x, _ in taken) < dashboards.COLUMNS
    assert len({panel["id"] for panel in panels}) == len(panels)


@pytest.mark.parametrize("board", BOARDS)
def test_what_is_chosen_on_a_dashboard_is_what_its_expressions_use(board: dashboards.Dashboard) -> None:
    data = made(board)
    chosen = {item["name"] for item in data["templating"]["list"]}
    text = json.dumps(data["panels"])
    assert set(re.findall(r"\$\{?(\w+)", text)) == chosen


def test_every_expression_is_one_of_prometheus(tmp_path: Path) -> None:
    exprs = dict.fromkeys(dashboards.expressions().values())
    records = [{"record": f"x:{number}", "expr": expr} for number, expr in enumerate(exprs)]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "x", "rules": records}]}), encoding="utf-8")
    done = subprocess.run([PROMTOOL or "promtool", "check", "rules", file], capture_output=True, text=True, check=False)
    assert f"{len(records)} rules found" in done.stdout, done.stdout + done.stderr


def test_every_series_is_recorded_or_exported() -> None:
    known = {record.name for record in rules.RECORDS}
    data = {"engine": "serving", "restarts_total": {}, "given_up": None, "slow": False, "canary": None}
    known |= set(re.findall(r"^sparkfleet_\w+", guard.metrics({"at": 1.0, "release": 1, "engines": {"e": data}}), re.M))
    known |= set(re.findall(r"^sparkfleet_\w+", sensors.metrics(sensors.gpus("1, 1, 1, 1, 0x1\n"), {"1": 1.0}), re.M))
    used = {
        selector.partition("{")[0] for expr in dashboards.expressions().values() for selector in rules.selectors(expr)
    }
    assert used and used <= known, used - known
