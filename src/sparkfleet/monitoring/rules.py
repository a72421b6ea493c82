"""The rules of Prometheus: series of one name for what differs between versions of vLLM, and the alerts with what to do
about each.

This table is the only place of both: `scripts/docs` writes roles/monitoring/files/recording.yml and alerts.yml and
docs/alerts.md from it.

How many Sparks are to serve each model is the inventory's: the role writes it as a rule of its own (`inventory_file`).

Series of an engine have the labels host and model (the name it is served under), the guard's have host and service
(vllm-CARD), those of HAProxy host, proxy and server.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import yaml

from sparkfleet.fleet.gateway import PREVIOUS

NOTE = "Made by scripts/docs from src/sparkfleet/monitoring/rules.py; edit that file."
PAGE = "docs/alerts.md"


@dataclasses.dataclass(frozen=True)
class Record:
    """A recording rule: the name of its series, its expression, and what it is, for the docs."""

    name: str
    expr: str
    text: str


@dataclasses.dataclass(frozen=True)
class Alert:
    """An alert: `expr` while it is true for `wait` (PromQL durations); `summary` is a template of Prometheus.
    `meaning`, `cause`, `remedy` are its entry in the docs, sentences in Markdown."""

    name: str
    severity: str
    expr: str
    wait: str
    summary: str
    meaning: str
    cause: str
    remedy: str

    @property
    def anchor(self) -> str:
        """Its heading in the page, as a link has it."""
        return self.name.lower()


def _either(new: str, old: str, by: str = "host, model") -> str:
    """A counter's rate under its name of today, or under an earlier one; engines of both may be in one fleet."""
    return f"sum by ({by}) (rate({new}[5m]) or rate({old}[5m]))"


def _quantile(share: float, name: str, old: str = "") -> str:
    buckets = _either(f"{name}_bucket", f"{old}_bucket", "host, model, le") if old else _by_bucket(name)
    return f"histogram_quantile({share:g}, {buckets})"


def _by_bucket(name: str) -> str:
    return f"sum by (host, model, le) (rate({name}_bucket[5m]))"


_ITL = ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds")
#: While the engines' key is rotated, some Sparks of a model are servers of one backend, the rest of the other one. The
#: status page's backend has no Sparks.
_SERVERS = 'sum by (host, proxy) (haproxy_server_status{{job="gateway",state="UP",proxy{}}})'
_NOW, _BEFORE = (_SERVERS.format(which) for which in (f'!~"sparkfleet-status|.*{PREVIOUS}"', f'=~".*{PREVIOUS}"'))
_AS_NOW = f'label_replace({_BEFORE}, "proxy", "$1", "proxy", "(.*){PREVIOUS}")'
_DISKS = 'fstype!~"tmpfs|ramfs|squashfs|overlay|fuse.*|nfs.*"'

RECORDS = (
    Record(
        "sparkfleet:requests_running",
        "sum by (host, model) (vllm:num_requests_running)",
        "Requests in the batch.",
    ),
    Record(
        "sparkfleet:requests_waiting",
        "sum by (host, model) (vllm:num_requests_waiting)",
        "Requests in the queue.",
    ),
    Record(
        "sparkfleet:kv_cache_usage_ratio",
        "max by (host, model) (vllm:kv_cache_usage_perc or vllm:gpu_cache_usage_perc)",
        "Share of the KV cache in use, 0 to 1 (`gpu_cache_usage_perc` before vLLM 0.9.2).",
    ),
    Record(
        "sparkfleet:generation_tokens:rate1m",
        "sum by (host, model) (rate(vllm:generation_tokens_total[1m]))",
        "Generated tokens a second.",
    ),
    Record(
        "sparkfleet:prompt_tokens:rate1m",
        "sum by (host, model) (rate(vllm:prompt_tokens_total[1m]))",
        "Prompt tokens a second.",
    ),
    Record(
        "sparkfleet:requests:rate5m",
        "sum by (host, model, finished_reason) (rate(vllm:request_success_total[5m]))",
        "Finished requests a second, by how they ended.",
    ),
    Record(
        "sparkfleet:preemptions:rate5m",
        "sum by (host, model) (rate(vllm:num_preemptions_total[5m]))",
        "Preempted requests a second.",
    ),
    Record(
        "sparkfleet:prefix_cache_hit_ratio:5m",
        _either("vllm:prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits_total")
        + " / "
        + _either("vllm:prefix_cache_queries_total", "vllm:gpu_prefix_cache_queries_total"),
        "Share of prompt tokens found in the prefix cache (`gpu_prefix_cache_*` before vLLM 0.9.2).",
    ),
    *(
        Record(f"sparkfleet:{name}_seconds:p{share * 100:.0f}_5m", _quantile(share, *series), text)
        for name, series, text in (
            ("time_to_first_token", ("vllm:time_to_first_token_seconds",), "Time to the first token."),
            (
                "inter_token_latency",
                _ITL,
                "Time between two tokens of a stream (`time_per_output_token_seconds` before vLLM 0.11).",
            ),
            ("request_duration", ("vllm:e2e_request_latency_seconds",), "Duration of requests."),
            ("queue_time", ("vllm:request_queue_time_seconds",), "Time in the queue."),
        )
        for share in (0.5, 0.95)
    ),
    Record(
        "sparkfleet:memory_available_bytes",
        'min by (host) (node_memory_MemAvailable_bytes{job="node"})',
        "Memory that is available on the host, the GPU's as well: it is unified.",
    ),
    Record(
        "sparkfleet:disk_free_ratio",
        f'min by (host, device) (node_filesystem_avail_bytes{{job="node",{_DISKS}}}'
        f' / node_filesystem_size_bytes{{job="node",{_DISKS}}})',
        "Share of each local file system that is free.",
    ),
    Record(
        "sparkfleet:gateway_servers_up",
        f"{_NOW} + on (host, proxy) {_AS_NOW} or {_NOW}",
        "Sparks that the gateway sends requests of a model to, with the engines' key of now or the one before.",
    ),
    Record(
        "sparkfleet:gateway_requests:rate5m",
        'sum by (host, proxy, code) (rate(haproxy_backend_http_responses_total{job="gateway"}[5m]))',
        "Answers a second that the gateway passed on, by class of status.",
    ),
)

MEANT = Record(
    "sparkfleet:gateway_servers_meant",
    "vector(N)",
    "Sparks that are to serve a model (`proxy`), from the inventory, without those that are drained.",
)

#: States in which the guard itself says why an engine does not serve, or in which it is not meant to.
_EXPLAINED = "stopped|switching|loading|wedged|given-up|asleep"

ALERTS = (
    Alert(
        "SparkfleetEngineDown",
        "critical",
        '(sparkfleet_engine_up{job="guard"} == 0 unless on (host, service) '
        f'(sparkfleet_engine_state{{job="guard",state=~"{_EXPLAINED}"}} == 1)) '
        'or (up{job="engine"} == 0 unless on (host) sparkfleet_engine_up{job="guard"})',
        "2m",
        "{{ $labels.host }}: the engine {{ with $labels.service }}{{ . }}{{ else }}at "
        "{{ $labels.instance }}{{ end }} does not serve",
        "The engine has not served for two minutes, and nobody stopped it. Of a host without a guard: its `/metrics` "
        "does not answer.",
        "Docker hangs, it or the container is gone, or the guard's restart does not help.",
        "`sparkfleet status`, then `sparkfleet diagnose -l HOST`, which names cause and remedy.",
    ),
    Alert(
        "SparkfleetEngineWedged",
        "critical",
        'sparkfleet_engine_state{job="guard",state="wedged"} == 1 or on (host, service) '
        'increase(sparkfleet_engine_restarts_total{job="guard",reason="wedge"}[10m]) > 0',
        "0m",
        "{{ $labels.host }}: the engine {{ $labels.service }} hung",
        "The engine ran and made no tokens; its `/health` says 200 all the same. The guard restarts it.",
        "A kernel that never ends, or a bug of this version of vLLM.",
        "Once: nothing, it serves again. Again and again: `sparkfleet diagnose -l HOST`, and another image "
        "(`sparkfleet upgrade`) or `sparkfleet rollback`.",
    ),
    Alert(
        "SparkfleetEngineStuck",
        "warning",
        "sparkfleet:requests_running > 0 and sparkfleet:generation_tokens:rate1m == 0 "
        "and sparkfleet:prompt_tokens:rate1m == 0 and on (host, model) "
        "delta(sparkfleet:kv_cache_usage_ratio[5m]) == 0",
        "5m",
        "{{ $labels.host }}: {{ $labels.model }} has requests and makes no tokens",
        "Requests run, and for five minutes neither tokens nor the use of the KV cache have changed. It is what the "
        "guard looks at, seen from outside: for hosts without a guard, and for a guard that does not act.",
        "As for a wedged engine; on a Spark with a guard, a guard that is stopped.",
        "`systemctl status sparkfleet-guard` on the host; `sparkfleet restart -l HOST`.",
    ),
    Alert(
        "SparkfleetEngineGivenUp",
        "critical",
        'sparkfleet_engine_given_up{job="guard"} == 1',
        "0m",
        "{{ $labels.host }}: the guard gave up on {{ $labels.service }}; it stays stopped",
        "The engine failed more often within an hour than `sparkfleet_guard_max_restarts` allows.",
        "What is deployed cannot run: memory, a damaged model, an image that does not fit.",
        "`sparkfleet diagnose -l HOST` has the engine's last lines; then `sparkfleet rollback -l HOST`, or "
        "`sparkfleet start -l HOST` when the cause is gone.",
    ),
    Alert(
        "SparkfleetEngineRestarts",
        "warning",
        'sum by (host, service) (increase(sparkfleet_engine_restarts_total{job="guard"}[1h])) > 1.5',
        "0m",
        "{{ $labels.host }}: {{ $labels.service }} was restarted {{ $value | humanize }} times within an hour",
        "Close to the cap of restarts (3 an hour by default), after which the guard gives up.",
        "Crashes or hangs that come back.",
        "`sparkfleet diagnose -l HOST` before the cap is reached.",
    ),
    Alert(
        "SparkfleetEngineStartSlow",
        "warning",
        'sparkfleet_engine_state{job="guard",state="loading"} == 1',
        "30m",
        "{{ $labels.host }}: {{ $labels.service }} has been starting for half an hour",
        "The largest model of the catalogue starts in less.",
        "A disk that is slow or full, or compilation without a cache.",
        "`sparkfleet logs HOST` shows the phase it is in.",
    ),
    Alert(
        "SparkfleetQueueing",
        "warning",
        "sparkfleet:requests_waiting > 5",
        "5m",
        "{{ $labels.host }}: {{ $value | humanize }} requests wait for {{ $labels.model }}",
        "More than five requests have waited for five minutes: clients ask for more than the engine takes at a time.",
        "Load; or a batch (`max_num_seqs`) or KV cache too small for it.",
        "Another Spark with that model behind the gateway, or `sparkfleet plan` for another profile.",
    ),
    Alert(
        "SparkfleetSlowFirstToken",
        "warning",
        "sparkfleet:time_to_first_token_seconds:p95_5m > 20",
        "10m",
        "{{ $labels.host }}: the first token of {{ $labels.model }} takes {{ $value | humanizeDuration }} (p95)",
        "One request in twenty has waited longer than 20 s for its first token, for ten minutes.",
        "A queue, or long prompts without a hit in the prefix cache.",
        "Look at queue time and prefix hit ratio of that engine; the profile `latency` takes fewer at a time.",
    ),
    Alert(
        "SparkfleetSlowEngine",
        "warning",
        'sparkfleet_engine_slow{job="guard"} == 1',
        "10m",
        "{{ $labels.host }}: {{ $labels.service }} is far below what this Spark's memory allows",
        "One stream makes far fewer tokens a second than the bandwidth of the memory allows (the plan's limit), or "
        "the engine stalls.",
        "Throttling, swap, or another process that uses the memory.",
        "The alerts of temperature, throttling and memory say which; otherwise `sparkfleet diagnose -l HOST`.",
    ),
    Alert(
        "SparkfleetKvCacheFull",
        "warning",
        "sparkfleet:kv_cache_usage_ratio > 0.95",
        "10m",
        "{{ $labels.host }}: the KV cache of {{ $labels.model }} is {{ $value | humanizePercentage }} full",
        "New requests wait and running ones may be preempted.",
        "Contexts longer, or more of them, than the plan's usual ones.",
        "A smaller `max_num_seqs`, an FP8 KV cache, or a second Spark; `sparkfleet plan` shows what fits.",
    ),
    Alert(
        "SparkfleetPreemptions",
        "warning",
        "sparkfleet:preemptions:rate5m > 0.1",
        "10m",
        "{{ $labels.host }}: {{ $labels.model }} preempts {{ $value | humanize }} requests a second",
        "The engine throws requests out of its batch and computes them again: work is done twice.",
        "A KV cache too small for the batch.",
        "As for a full KV cache.",
    ),
    Alert(
        "SparkfleetMemoryLow",
        "critical",
        "sparkfleet:memory_available_bytes < 3e9",
        "1m",
        "{{ $labels.host }}: {{ $value | humanize1024 }}B of memory are available",
        "A Spark without memory freezes; earlyoom kills the engine at 2 GiB.",
        "A process beside the engine, or an engine that takes more than its plan.",
        "`sparkfleet diagnose -l HOST` names what uses the memory; a larger `sparkfleet_memory_reserve_gib`.",
    ),
    Alert(
        "SparkfleetDiskFull",
        "warning",
        "sparkfleet:disk_free_ratio < 0.05",
        "10m",
        "{{ $labels.host }}: {{ $value | humanizePercentage }} of {{ $labels.device }} is free",
        "A download, a release or a log soon fails.",
        "Models and images of earlier releases, or files of others.",
        "`docker system df`, `du -xh --max-depth=1 /opt/hf`; a smaller `sparkfleet_keep_releases`.",
    ),
    Alert(
        "SparkfleetGpuHot",
        "warning",
        "sparkfleet_gpu_temperature_celsius > 85",
        "5m",
        "{{ $labels.host }}: the GPU has {{ $value | humanize }} °C",
        "The GPU is about to slow itself down.",
        "Blocked vents, or Sparks stacked on one another.",
        "Room to breathe; the alert ends by itself.",
    ),
    Alert(
        "SparkfleetGpuThrottled",
        "warning",
        "max by (host, reason) (sparkfleet_gpu_throttled) == 1",
        "5m",
        "{{ $labels.host }}: the GPU is slowed down ({{ $labels.reason }})",
        "The GPU has run below its clock for five minutes; tokens come more slowly.",
        "Temperature (`*-thermal-slowdown`), or power: a power supply other than the one that came with the Spark "
        "(`sw-power-cap`, `hw-power-brake`).",
        "Cooling, or the original power supply.",
    ),
    Alert(
        "SparkfleetGpuXid",
        "warning",
        "time() - sparkfleet_gpu_xid_last_seconds < 1800",
        "0m",
        "{{ $labels.host }}: Xid {{ $labels.xid }} of NVIDIA's driver",
        "The driver reported an error within the last half hour.",
        "13, 31 and 45 come from the application; 48, 63, 64, 94 and 95 from memory; 79, 119 and 120 mean that the GPU "
        "is lost until the host is rebooted.",
        "`sparkfleet diagnose -l HOST`; NVIDIA's list of Xids has the others.",
    ),
    Alert(
        "SparkfleetGpuLost",
        "critical",
        "sparkfleet_gpu_up == 0",
        "5m",
        "{{ $labels.host }}: nvidia-smi reports no GPU",
        "The driver has lost the GPU, or nvidia-smi hangs or is not installed.",
        "Xid 79, an update of the driver without a reboot.",
        "Reboot the host; if it happens again, update DGX OS and its firmware.",
    ),
    Alert(
        "SparkfleetGatewayNoServer",
        "critical",
        f"sparkfleet:gateway_servers_up == 0 unless on (proxy) {MEANT.name} == 0",
        "1m",
        "{{ $labels.host }}: no Spark answers requests of {{ $labels.proxy }}",
        "Clients of that model get 503.",
        "All Sparks with that model are down, drained, or serve another. A model that no Spark is meant to serve "
        "(`sparkfleet_gateway_models`) does not count.",
        "`sparkfleet status` shows what each serves.",
    ),
    Alert(
        "SparkfleetGatewayNoBackup",
        "warning",
        f"sparkfleet:gateway_servers_up == 1 and on (proxy) {MEANT.name} > 1",
        "10m",
        "{{ $labels.host }}: one Spark is left for {{ $labels.proxy }}",
        "Of several Sparks that are to serve the model one is left: its end is the end of the service.",
        "The others are down, or serve another model. Those with `sparkfleet_drained: true` do not count.",
        "`sparkfleet status`. After a rollout that changed which Sparks are to serve the model: `site.yml --tags "
        "monitoring`, which tells Prometheus.",
    ),
    Alert(
        "SparkfleetCertificateExpires",
        "warning",
        "sparkfleet_certificate_expires_seconds - time() < 14 * 86400",
        "10m",
        "{{ $labels.host }}: the gateway's certificate is valid for {{ $value | humanizeDuration }}",
        "The certificate that the gateway serves expires within two weeks; clients refuse it then.",
        "A certificate of your own that was not renewed, or a self-signed one and no run of `playbooks/gateway.yml` "
        "for years.",
        "Put the new one where `sparkfleet_gateway_certificate` says, and run `playbooks/gateway.yml`, which renews a "
        "self-signed one by itself.",
    ),
    Alert(
        "SparkfleetDrift",
        "warning",
        "sparkfleet_drift_differences > 0",
        "0m",
        "{{ $labels.host }} differs from the inventory in {{ $value | humanize }} respects",
        "`sparkfleet drift` has found it; run it from a timer, and this alert says what it finds.",
        "A change by hand, a deployment that failed, or an inventory that was not deployed.",
        "`sparkfleet drift -l HOST` lists the differences, `site.yml` fixes them; `sparkfleet drift` again ends the "
        "alert.",
    ),
    Alert(
        "SparkfleetTargetMissing",
        "warning",
        'up{job!="engine"} == 0',
        "5m",
        "{{ $labels.host }}: Prometheus does not reach {{ $labels.job }} at {{ $labels.instance }}",
        "What this target measures is unknown, and the alerts on it are blind.",
        "The host or its service is down, or a firewall is between; of `guard`, the engine is watched by no one.",
        "`systemctl status sparkfleet-guard sparkfleet-node-exporter` on the host.",
    ),
    Alert(
        "SparkfleetGuardStuck",
        "warning",
        'time() - sparkfleet_guard_last_look_seconds{job="guard"} > 300',
        "1m",
        "{{ $labels.host }}: the guard has observed nothing for {{ $value | humanizeDuration }}",
        "The guard answers, and does not look at the engine.",
        "A disk that hangs, or a `sparkfleet_guard_interval` of more than five minutes.",
        "`journalctl -k -u sparkfleet-guard` on the host.",
    ),
    Alert(
        "SparkfleetRuleFailing",
        "warning",
        "increase(prometheus_rule_evaluation_failures_total[10m]) > 0",
        "0m",
        "A rule of Prometheus fails: {{ $labels.rule_group }}",
        "An alert or a series of this page is not computed.",
        "A version of vLLM or HAProxy whose series have other labels.",
        "`journalctl -u sparkfleet-prometheus` has the error; report it.",
    ),
    Alert(
        "SparkfleetNotificationsFailing",
        "warning",
        "increase(alertmanager_notifications_failed_total[10m]) > 0 "
        "or increase(prometheus_notifications_dropped_total[10m]) > 0",
        "0m",
        "Notifications {{ with $labels.integration }}by {{ . }} {{ end }}fail",
        "An alert does not reach anyone this way.",
        "A mail server, webhook or ntfy topic that refuses it.",
        "`journalctl -u sparkfleet-alertmanager`; then `sparkfleet test-alert`.",
    ),
)


def recording_file() -> str:
    """The recording rules as a file of Prometheus."""
    return _file("sparkfleet", [{"record": record.name, "expr": record.expr} for record in RECORDS])


def inventory_file(meant: Mapping[str, int]) -> str:
    """What the inventory says, as a file of rules: `meant` are the Sparks that are to serve each model, by backend."""
    made = [
        {"record": MEANT.name, "expr": f"vector({count})", "labels": {"proxy": name}} for name, count in meant.items()
    ]
    return _file("sparkfleet-inventory", made, "Made by Sparkfleet from the inventory.")


def alerts_file() -> str:
    """The alerts as a file of Prometheus."""
    made = [
        {
            **{"alert": alert.name, "expr": alert.expr, "for": alert.wait, "labels": {"severity": alert.severity}},
            "annotations": {
                "summary": alert.summary,
                "description": f"{alert.meaning} {alert.remedy}",
                "runbook": f"{PAGE}#{alert.anchor}",
            },
        }
        for alert in ALERTS
    ]
    return _file("sparkfleet-alerts", made)


class _Indented(yaml.SafeDumper):
    """With items of lists indented, as the other files have them."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _file(group: str, made: list[dict[str, Any]], note: str = NOTE) -> str:
    data = {"groups": [{"name": group, "rules": made}]}
    return f"---\n# {note}\n" + yaml.dump(data, Dumper=_Indented, sort_keys=False, allow_unicode=True, width=60)


#: Names of series in an expression, with their label matchers.
_SELECTOR = re.compile(
    r"\b(?:(?:vllm|sparkfleet):|sparkfleet_|node_|haproxy_|prometheus_|alertmanager_|up(?=\{|\s|$))[a-zA-Z0-9_:]*"
    r"(?:\{[^}]*\})?"
)


def selectors(expr: str) -> list[str]:
    """The series that an expression is made of, as PromQL selects them."""
    return list(dict.fromkeys(found[0] for found in _SELECTOR.finditer(expr)))


def expressions() -> dict[str, str]:
    """Every expression of every rule, by what it is of."""
    return {record.name: record.expr for record in RECORDS} | {alert.name: alert.expr for alert in ALERTS}


def markdown() -> str:
    """The page of alerts and series."""
    parts = [
        f"<!-- {NOTE} -->",
        "# Alerts and what to do\n",
        "What Prometheus warns of with `sparkfleet_monitoring: true` ([monitoring.md](monitoring.md)), and what it "
        "records.\n",
    ]
    for alert in ALERTS:
        parts += [
            f"## {alert.name}\n",
            f"{alert.meaning}\n",
            f"- Severity: {alert.severity}.",
            f"- Cause: {alert.cause}",
            f"- Remedy: {alert.remedy}",
            f"- Fires when this is true{'' if alert.wait == '0m' else f' for {alert.wait}'}: `{alert.expr}`\n",
        ]
    parts += [
        "## Recorded series\n",
        "One name for what versions of vLLM call differently; labels are `host` and `model` unless the expression "
        "has others.\n",
        "| series | what it is | expression |",
        "| --- | --- | --- |",
    ]
    parts += [
        f"| `{record.name}` | {record.text} | `{record.expr.replace('|', chr(92) + '|')}` |"
        for record in (*RECORDS, MEANT)
    ]
    return "\n".join(parts) + "\n"
