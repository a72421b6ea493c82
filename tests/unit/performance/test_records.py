"""Records of benchmarks on the controller."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sparkfleet_host import benchmarks
from sparkfleet_host.bounded import BoundsError
from sparkfleet_host.releases import Store

from sparkfleet import SparkfleetError
from sparkfleet.performance import records
from sparkfleet.reporting import benchmark
from tests.unit.performance.benchmark_records import record, row


def id_(number: int) -> str:
    return f"20261129T0930{number:02}Z-00beef"


def test_a_record_is_found_by_host_id_or_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MOST", 3)
    for number in range(5):
        path = records.keep(tmp_path, "spark-1", record(id=id_(number)))
    records.keep(tmp_path, "rack/spark 2", record(id=id_(9), host="rack/spark 2"))
    records.keep(tmp_path, "spark-1", record(id=id_(5), complete=False))
    assert [one["id"] for one in records.of_host(tmp_path, "spark-1")] == [id_(3), id_(4), id_(5)]
    assert records.find(tmp_path, "spark-1")["id"] == id_(4)  # the newest that is complete
    assert records.find(tmp_path, f"spark-1/{id_(5)}")["id"] == id_(5)
    assert records.find(tmp_path, id_(9))["host"] == "rack/spark 2"
    assert records.find(tmp_path, str(path))["id"] == id_(4)
    assert records.find(tmp_path, "rack/spark 2")["id"] == id_(9)
    assert records.names([record()]) == ["spark-1/20261129T093000Z-00beef"]
    for name, why in {
        **{"spark-3": "of that host there is none; there are some of: rack_spark_2, spark-1"},
        **{id_(0): "no such record", "none.json": "No such file", "spark-1/x": "none"},
    }.items():
        with pytest.raises(SparkfleetError, match=why):
            records.find(tmp_path, name)


def test_a_file_of_another_form_is_none(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text in ("[]", "{", json.dumps({**record(), "format": 2}), json.dumps({**record(), "id": "../x"})):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(SparkfleetError, match=r"x\.json is none"):
            records.find(tmp_path, str(path))
    folder = tmp_path / records.FOLDER / "spark-1"
    folder.mkdir(parents=True)
    (folder / f"{id_(1)}.json").write_text("{", encoding="utf-8")
    assert records.of_host(tmp_path, "spark-1") == []


@pytest.mark.parametrize(
    "more",
    [
        {"rows": [row(shape="a b")]},
        {"rows": [row(streams=-1)]},
        {"rows": [row(ttft_ms="soon")]},
        {"rows": [row(ttft_ms=None)]},
        {"rows": [row(tokens_per_second=1e-320)]},
        {"rows": [{key: value for key, value in row().items() if key != "tokens_per_second"}]},
        {"rows": [row(at=1e300)]},
        {"rows": [row(at=-1e18)]},
        {"rows": [row(at="then")]},
        {"limit_tok_s": 1e-320},
        {"rows": [row()] * (benchmarks.MOST_ROWS + 1)},
        {"repo": "no repo"},
        {"at": None},
        {"at": 1e300},
        {"ended": -1e18},
    ],
)
def test_the_form_is_checked(more: dict[str, object]) -> None:
    with pytest.raises(BoundsError):
        record(**{"rows": [row()], **more})  # type: ignore[arg-type]


def test_the_host_keeps_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks, "MOST", 2)
    store = Store(tmp_path / "project", tmp_path)
    for number in (1, 2, 3):
        benchmarks.keep(store, record(id=id_(number), complete=False))
    benchmarks.keep(store, record(id=id_(3)))  # the same, further
    kept = benchmarks.read(tmp_path / benchmarks.FILE)
    assert [(one["id"], one["complete"]) for one in kept] == [(id_(2), False), (id_(3), True)]
    (tmp_path / benchmarks.FILE).write_text("{")
    assert benchmarks.read(tmp_path / benchmarks.FILE) == []


def test_a_curve_against_the_limits() -> None:
    rows = [
        row(repetition=1, stream_tokens_per_second=11.0),
        row(repetition=2, stream_tokens_per_second=13.0, throttled=["sw-power-cap"]),
        row(streams=4, requests=12, tokens_per_second=32.0, stream_tokens_per_second=9.6, power_w=None),
    ]
    one, four = records.curve(record(rows))
    assert (one["streams"], one["repetitions"], one["requests"]) == (1, 2, 6)
    assert one["stream_tokens_per_second"] == 12.0 and one["limit_share"] == 0.5
    assert one["published_share"] == pytest.approx(12 / 11, abs=1e-4) and one["throttled"] == ["sw-power-cap"]
    assert four["limit_share"] == 0.4 and four["published_share"] is None
    unknown = records.curve(record(rows, limit_tok_s=None, published_tok_s=None))[0]
    assert unknown["limit_share"] is unknown["published_share"] is None


def test_the_table_says_what_it_depends_on() -> None:
    text = benchmark.table(record([row(), row(streams=4, tokens_per_second=32.0, stream_tokens_per_second=9.6)]))
    one, four = (line.split() for line in text.splitlines()[2:4])
    assert one[:6] == ["chat", "3840:256", "1", "10.0", "12.00", "50%"]
    assert four[:6] == ["chat", "3840:256", "4", "32.0", "9.60", "40%"]
    assert "limit: 24.0 tok/s a stream" in text and "published: 11 tok/s of one stream; here 109% of it" in text
    assert "up to 61 °C" in text and "energy" not in text
    text = benchmark.table(record([row(power_w=None, joules_per_token=None, disturbed=True)], complete=False))
    assert "energy: nvidia-smi reports no power here" in text and "others used the engine meanwhile" in text
    assert "it was cut" in text
