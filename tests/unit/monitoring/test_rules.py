"""The rules of Prometheus, by Prometheus' own promtool: each alert fires for its fault and ends after it, and none
fires under ordinary load."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparkfleet.fleet import gateway
from sparkfleet.monitoring import rules
from tests.unit import ROOT

PROMTOOL = shutil.which("promtool", path="/usr/bin:/usr/local/bin")
FILES = [ROOT / "roles" / "monitoring" / "files" / f"{name}.yml" for name in ("recording", "alerts")]
#: A sample each 15 s; a fault lasts 45 of the 75 minutes.
BAD, GOOD = 180, 120
ENGINE = 'host="spark-1",model="m",engine="0"'
DISK = 'job="node",host="spark-1",device="/dev/nvme0n1p2",fstype="ext4"'
GUARD = 'job="guard",host="spark-1",service="vllm-m"'


def moving(step: float) -> str:
    return f"0+{step:g}x{BAD + GOOD}"


def still(value: float) -> str:
    return f"{value:g}+0x{BAD + GOOD}"


def bad_then_good(bad: float, good: float = 0.0) -> str:
    return f"{bad:g}+0x{BAD} {good:g}+0x{GOOD}"


def histogram(name: str, step: dict[str, float]) -> dict[str, str]:
    return {f'{name}_bucket{{{ENGINE},le="{le}"}}': moving(count) for le, count in step.items()}


def state(of: dict[str, str]) -> dict[str, str]:
    return {
        f'sparkfleet_engine_state{{{GUARD},state="{name}"}}': of.get(name, still(float(name == "serving" and not of)))
        for name in ("serving", "loading", "stopped", "wedged", "healing", "given-up", "missing", "switching")
    }


def up(job: str, values: str) -> dict[str, str]:
    return {f'up{{job="{job}",host="spark-1",instance="spark-1:1"}}': values}


def server(name: str, values: str, proxy: str = "m") -> dict[str, str]:
    return {f'haproxy_server_status{{job="gateway",host="gw",proxy="{proxy}",server="{name}",state="UP"}}': values}


#: A Spark and a gateway under ordinary load, with what their exporters report.
ORDINARY: dict[str, str] = {
    **up("engine", still(1)),
    **up("guard", still(1)),
    **up("gateway", still(1)),
    **up("node", still(1)),
    f"sparkfleet_engine_up{{{GUARD}}}": still(1),
    **state({}),
    f'sparkfleet_engine_restarts_total{{{GUARD},reason="wedge"}}': still(3),
    f'sparkfleet_engine_restarts_total{{{GUARD},reason="crash"}}': still(1),
    f"sparkfleet_engine_given_up{{{GUARD}}}": still(0),
    f"sparkfleet_engine_slow{{{GUARD}}}": still(0),
    'sparkfleet_guard_last_look_seconds{job="guard",host="spark-1"}': moving(15),
    f"vllm:num_requests_running{{{ENGINE}}}": still(8),
    f"vllm:num_requests_waiting{{{ENGINE}}}": still(2),
    f"vllm:kv_cache_usage_perc{{{ENGINE}}}": still(0.6),
    f"vllm:generation_tokens_total{{{ENGINE}}}": moving(900),
    f"vllm:prompt_tokens_total{{{ENGINE}}}": moving(300),
    f"vllm:num_preemptions_total{{{ENGINE}}}": still(4),
    f"vllm:prefix_cache_hits_total{{{ENGINE}}}": moving(100),
    f"vllm:prefix_cache_queries_total{{{ENGINE}}}": moving(300),
    f'vllm:request_success_total{{{ENGINE},finished_reason="stop"}}': moving(3),
    **histogram("vllm:time_to_first_token_seconds", {"0.5": 15, "20": 15, "80": 15, "+Inf": 15}),
    **histogram("vllm:inter_token_latency_seconds", {"0.05": 900, "0.1": 1000, "+Inf": 1000}),
    'node_memory_MemAvailable_bytes{job="node",host="spark-1"}': still(9e9),
    f"node_filesystem_avail_bytes{{{DISK}}}": still(5e11),
    f"node_filesystem_size_bytes{{{DISK}}}": still(4e12),
    'sparkfleet_gpu_up{host="spark-1"}': still(1),
    'sparkfleet_certificate_expires_seconds{host="gw",port="8080"}': still(1e9),
    'sparkfleet_drift_differences{host="spark-1"}': still(0),
    'sparkfleet_gpu_temperature_celsius{host="spark-1",gpu="0"}': still(70),
    'sparkfleet_gpu_throttled{host="spark-1",gpu="0",reason="hw-thermal-slowdown"}': still(0),
    **server("spark-1", still(1)),
    **server("spark-2", still(1)),
    'sparkfleet:gateway_servers_meant{proxy="m"}': still(2),
    'prometheus_rule_evaluation_failures_total{rule_group="sparkfleet"}': still(0),
    'prometheus_notifications_dropped_total{job="prometheus"}': still(0),
    'alertmanager_notifications_failed_total{integration="email"}': still(0),
}
STEP = f"0+0x{BAD - 40} 1+0x{GOOD + 40}"  # a counter that moves at minute 35


@dataclasses.dataclass(frozen=True)
class Fault:
    """What differs from ordinary load, and the minutes at which the alert fires and no longer does."""

    series: dict[str, str | None]
    fires: int = 44
    ends: int = 75


STUCK: dict[str, str | None] = {
    f"vllm:generation_tokens_total{{{ENGINE}}}": f"0+0x{BAD} 0+900x{GOOD}",
    f"vllm:prompt_tokens_total{{{ENGINE}}}": f"0+0x{BAD} 0+300x{GOOD}",
}
FAULTS: dict[str, Fault] = {
    "SparkfleetEngineDown": Fault(
        {f"sparkfleet_engine_up{{{GUARD}}}": bad_then_good(0, 1), **state({"missing": bad_then_good(1)})}
    ),
    "SparkfleetEngineWedged": Fault({f'sparkfleet_engine_restarts_total{{{GUARD},reason="wedge"}}': STEP}, 37),
    "SparkfleetEngineStuck": Fault(STUCK),
    "SparkfleetEngineGivenUp": Fault({f"sparkfleet_engine_given_up{{{GUARD}}}": bad_then_good(1)}),
    "SparkfleetEngineRestarts": Fault(
        {f'sparkfleet_engine_restarts_total{{{GUARD},reason="crash"}}': f"0+0x20 1+0x20 2+0x{BAD + GOOD}"}, 20, 72
    ),
    "SparkfleetEngineStartSlow": Fault(
        {f"sparkfleet_engine_up{{{GUARD}}}": bad_then_good(0, 1), **state({"loading": bad_then_good(1)})}
    ),
    "SparkfleetQueueing": Fault({f"vllm:num_requests_waiting{{{ENGINE}}}": bad_then_good(9, 1)}),
    "SparkfleetSlowFirstToken": Fault(
        {
            f'vllm:time_to_first_token_seconds_bucket{{{ENGINE},le="0.5"}}': f"0+0x{BAD} 0+15x{GOOD}",
            f'vllm:time_to_first_token_seconds_bucket{{{ENGINE},le="20"}}': f"0+0x{BAD} 0+15x{GOOD}",
        }
    ),
    "SparkfleetCertificateExpires": Fault(
        {'sparkfleet_certificate_expires_seconds{host="gw",port="8080"}': bad_then_good(1.2e6, 1e9)}
    ),
    "SparkfleetDrift": Fault({'sparkfleet_drift_differences{host="spark-1"}': bad_then_good(3)}),
    "SparkfleetSlowEngine": Fault({f"sparkfleet_engine_slow{{{GUARD}}}": bad_then_good(1)}),
    "SparkfleetKvCacheFull": Fault({f"vllm:kv_cache_usage_perc{{{ENGINE}}}": bad_then_good(0.99, 0.4)}),
    "SparkfleetPreemptions": Fault({f"vllm:num_preemptions_total{{{ENGINE}}}": f"0+6x{BAD} {6 * BAD}+0x{GOOD}"}),
    "SparkfleetMemoryLow": Fault(
        {'node_memory_MemAvailable_bytes{job="node",host="spark-1"}': bad_then_good(2.2e9, 9e9)}
    ),
    "SparkfleetDiskFull": Fault({f"node_filesystem_avail_bytes{{{DISK}}}": bad_then_good(1e10, 5e11)}),
    "SparkfleetGpuHot": Fault({'sparkfleet_gpu_temperature_celsius{host="spark-1",gpu="0"}': bad_then_good(91, 60)}),
    "SparkfleetGpuThrottled": Fault(
        {'sparkfleet_gpu_throttled{host="spark-1",gpu="0",reason="hw-thermal-slowdown"}': bad_then_good(1)}
    ),
    "SparkfleetGpuXid": Fault({'sparkfleet_gpu_xid_last_seconds{host="spark-1",xid="31"}': still(2000)}),
    "SparkfleetGpuLost": Fault({'sparkfleet_gpu_up{host="spark-1"}': bad_then_good(0, 1)}),
    "SparkfleetGatewayNoServer": Fault(
        {**server("spark-1", bad_then_good(0, 1)), **server("spark-2", bad_then_good(0, 1))}
    ),
    "SparkfleetGatewayNoBackup": Fault(server("spark-2", bad_then_good(0, 1))),  # type: ignore[arg-type]
    "SparkfleetTargetMissing": Fault(up("node", bad_then_good(0, 1))),  # type: ignore[arg-type]
    "SparkfleetGuardStuck": Fault(
        {'sparkfleet_guard_last_look_seconds{job="guard",host="spark-1"}': f"0+0x{BAD} {15 * BAD}+15x{GOOD}"}
    ),
    "SparkfleetRuleFailing": Fault({'prometheus_rule_evaluation_failures_total{rule_group="sparkfleet"}': STEP}, 37),
    "SparkfleetNotificationsFailing": Fault({'alertmanager_notifications_failed_total{integration="email"}': STEP}, 37),
}


def promtool(folder: Path, tests: list[dict[str, Any]], *more: Path) -> str:
    """What promtool says against these tests; "" where they pass. `more`: files of rules besides the role's."""
    assert PROMTOOL, "promtool is missing: apt-get install --no-install-recommends prometheus"
    file = folder / "tests.yml"
    file.write_text(
        yaml.safe_dump(
            {"rule_files": [str(path) for path in (*FILES, *more)], "evaluation_interval": "15s", "tests": tests}
        )
    )
    done = subprocess.run([PROMTOOL, "test", "rules", file], capture_output=True, text=True, check=False, timeout=120)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def world(series: dict[str, str], firing: dict[int, list[str]]) -> dict[str, Any]:
    """A test: these series, and at these minutes these alerts fire and no others."""
    return {
        "interval": "15s",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": f"{minute}m",
                "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in sorted(names)],
            }
            for minute, names in firing.items()
        ],
    }


def faulty(name: str) -> dict[str, str]:
    changed = {**ORDINARY, **FAULTS[name].series}
    return {series: values for series, values in changed.items() if values is not None}


def test_every_alert_has_a_fault_and_every_name_is_its_own() -> None:
    names = [alert.name for alert in rules.ALERTS]
    assert set(FAULTS) == set(names) and len(set(names)) == len(names)
    assert len({record.name for record in rules.RECORDS}) == len(rules.RECORDS)


def test_none_fires_under_ordinary_load(tmp_path: Path) -> None:
    assert promtool(tmp_path, [world(ORDINARY, {minute: [] for minute in range(1, 75)})]) == ""


@pytest.mark.parametrize("name", FAULTS)
def test_an_alert_fires_for_its_fault_alone_and_ends(name: str, tmp_path: Path) -> None:
    fault = FAULTS[name]
    assert promtool(tmp_path, [world(faulty(name), {fault.fires: [name], fault.ends: []})]) == ""


def meant(folder: Path, **servers: int) -> Path:
    """The rules of an inventory in which so many Sparks are to serve each model."""
    (folder / "inventory.yml").write_text(rules.inventory_file(servers), encoding="utf-8")
    return folder / "inventory.yml"


@pytest.mark.parametrize(
    ("servers", "up", "firing"),
    [
        # Each Spark is a server of each backend; here each of the two serves a model of its own.
        ({"a": 1, "b": 1}, {"a": "10", "b": "01"}, []),
        ({"a": 2, "b": 1}, {"a": "100", "b": "001"}, ["SparkfleetGatewayNoBackup"]),
        ({"a": 2, "b": 0}, {"a": "11", "b": "00"}, []),
        ({"a": 1, "b": 1}, {"a": "10", "b": "00"}, ["SparkfleetGatewayNoServer"]),
        # What the inventory does not say yet, of a model that is new, does not silence the alert.
        ({"a": 1}, {"a": "10", "b": "00"}, ["SparkfleetGatewayNoServer"]),
    ],
)
def test_servers_count_against_those_that_are_meant(
    servers: dict[str, int], up: dict[str, str], firing: list[str], tmp_path: Path
) -> None:
    series: dict[str, str] = {}
    for proxy, states in up.items():
        for place, state in enumerate(states):
            series |= server(f"spark-{place}", still(float(state)), proxy)
    assert promtool(tmp_path, [world(series, {30: firing})], meant(tmp_path, **servers)) == ""


def rotated(before: str, now: str) -> dict[str, str]:
    """Two Sparks while the engines' key is rotated: those that are up with the key before, and with that of now."""
    series: dict[str, str] = {}
    for place in (0, 1):
        series |= server(f"spark-{place}", still(float(before[place])), f"m{gateway.PREVIOUS}")
        series |= server(f"spark-{place}", still(float(now[place])))
    return series


@pytest.mark.parametrize(
    ("before", "now", "count", "firing"),
    [
        ("11", "00", 2, []),
        ("01", "10", 2, []),
        ("00", "11", 2, []),
        ("01", "00", 1, ["SparkfleetGatewayNoBackup"]),
        ("00", "10", 1, ["SparkfleetGatewayNoBackup"]),
        ("00", "00", 0, ["SparkfleetGatewayNoServer"]),
    ],
)
def test_while_a_key_is_rotated_both_backends_of_a_model_count(
    before: str, now: str, count: int, firing: list[str], tmp_path: Path
) -> None:
    test = world(rotated(before, now), {30: firing})
    name = "sparkfleet:gateway_servers_up"
    samples = [{"labels": f'{name}{{host="gw",proxy="m"}}', "value": count}]
    test["promql_expr_test"].append({"expr": name, "eval_time": "30m", "exp_samples": samples})
    assert promtool(tmp_path, [test], meant(tmp_path, m=2)) == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sparkfleet:kv_cache_usage_ratio", 0.7),
        ("sparkfleet:prefix_cache_hit_ratio:5m", 0.5),
        ("sparkfleet:inter_token_latency_seconds:p50_5m", 0.05),
    ],
)
def test_earlier_names_of_vllm_are_recorded_under_the_same_name(name: str, value: float, tmp_path: Path) -> None:
    """vLLM 0.10 has gpu_cache_usage_perc, gpu_prefix_cache_* and time_per_output_token_seconds; an engine of today and
    one of then give a series each."""
    old = 'host="spark-2",model="m",engine="0"'
    series = {
        **ORDINARY,
        f"vllm:gpu_cache_usage_perc{{{old}}}": still(0.7),
        f"vllm:gpu_prefix_cache_hits_total{{{old}}}": moving(10),
        f"vllm:gpu_prefix_cache_queries_total{{{old}}}": moving(20),
        f'vllm:time_per_output_token_seconds_bucket{{{old},le="0.1"}}': moving(10),
        f'vllm:time_per_output_token_seconds_bucket{{{old},le="+Inf"}}': moving(10),
        # Both names at once, as 0.9.2 to 0.11 have it, are one series and count once.
        f"vllm:gpu_cache_usage_perc{{{ENGINE}}}": still(0.6),
        f"vllm:gpu_prefix_cache_hits_total{{{ENGINE}}}": moving(100),
    }
    test = {
        "interval": "15s",
        "input_series": [{"series": key, "values": values} for key, values in series.items()],
        "promql_expr_test": [
            {
                "expr": f'{name}{{host="spark-2"}}',
                "eval_time": "30m",
                "exp_samples": [{"labels": f'{name}{{host="spark-2",model="m"}}', "value": value}],
            },
            {"expr": f"count({name})", "eval_time": "30m", "exp_samples": [{"labels": "{}", "value": 2}]},
        ],
    }
    assert promtool(tmp_path, [test]) == ""


def test_promtool_sees_a_wrong_expectation(tmp_path: Path) -> None:
    assert "SparkfleetGpuHot" in promtool(tmp_path, [world(ORDINARY, {30: ["SparkfleetGpuHot"]})])


def test_the_series_of_each_expression_are_found_in_it() -> None:
    assert rules.selectors('(a_b{x="y"} == 0) or up{job="engine"} == 0 unless on (host) sparkfleet_engine_up') == [
        'up{job="engine"}',
        "sparkfleet_engine_up",
    ]
    assert all(rules.selectors(expr) for expr in rules.expressions().values())
