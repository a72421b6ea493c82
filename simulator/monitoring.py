"""Monitoring of a simulated Spark under load: every expression of the rules, the dashboards and the status page against
the Prometheus that the role set up, the test alert, and what it all costs the Spark.

    python -m simulator.monitoring --world NAME [--seconds 120] [--json FILE]

The world has the real engine, spark-1 as its gateway (SPARKFLEET_GATEWAYS=spark-1), and what site.yml deploys. The
scene gives the gateway a certificate, switches monitoring on, runs again (nothing may change), puts load on the
gateway, has an Xid in the kernel's log, asks Prometheus, sends a test alert to a receiver on the Spark, and leaves
monitoring on; `--remove` removes it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from simulator import faults
from simulator.load import Load, line
from simulator.shell import SimulatorError
from simulator.spark import Spark
from simulator.world import World
from sparkfleet.monitoring import dashboards, page, rules

GATEWAY, PROMETHEUS, RECEIVER = 8080, 9114, 9199
CERTIFICATE = "/etc/haproxy/sparkfleet/gateway.pem"
PORTS = ":911[123]$|:9090$|:9093$|:9100$"  # ours, and those of the distribution's services
UNITS = ("prometheus", "alertmanager", "node-exporter", "sensors")
#: PromQL → the samples of an instant query.
Query = Callable[[str], Sequence[Mapping[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Row:
    """An expression of a rule and the number of series that it gives."""

    rule: str
    expr: str
    series: int


def look(query: Query) -> list[Row]:
    """Every expression of rules, dashboards and status page. Of an alert, which gives nothing while all is well, the
    series that it is made of."""
    rows = [Row(record.name, record.expr, len(query(record.expr))) for record in rules.RECORDS]
    # What a rule records is there under its name.
    rows += [Row(record.name, record.name, len(query(record.name))) for record in rules.RECORDS]
    for alert in rules.ALERTS:
        query(alert.expr)  # it must be one that Prometheus evaluates
        rows += [Row(alert.name, selector, len(query(selector))) for selector in rules.selectors(alert.expr)]
    drawn = dashboards.expressions() | page.expressions()
    rows += [Row(name, expr, len(query(expr))) for name, expr in drawn.items()]
    return rows


ASK = """
import json, urllib.parse, urllib.request
words = urllib.parse.urlencode({{"query": {expr!r}}})
with urllib.request.urlopen("http://127.0.0.1:{port}/api/v1/query?" + words) as answer:
    print(json.dumps(json.load(answer)["data"]["result"]))
"""
HOOK = f"""
import http.server, pathlib
class Hook(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with open("/run/sparkfleet-hook", "ab") as file:
            file.write(body + b"\\n")
        self.send_response(200)
        self.end_headers()
    def log_message(self, *words):
        pass
http.server.HTTPServer(("127.0.0.1", {RECEIVER}), Hook).serve_forever()
"""


def querying(spark: Spark) -> Query:
    """Prometheus on a Spark."""

    def query(expr: str) -> Sequence[Mapping[str, Any]]:
        found: list[Mapping[str, Any]] = json.loads(spark.python(ASK.format(expr=expr, port=PROMETHEUS)))
        return found

    return query


def cost(spark: Spark) -> dict[str, tuple[float, float]]:
    """CPU seconds so far and MiB of memory of each service."""
    found = {}
    for name in UNITS:
        text = spark.sh(
            f"systemctl show --property=CPUUsageNSec,MainPID sparkfleet-{name}.service; "
            f"echo Rss=$(ps -o rss= -p $(systemctl show --property=MainPID --value sparkfleet-{name}.service))"
        )
        values = {
            key: float(value) if value.isdigit() else 0.0 for key, value in re.findall(r"^(\w+)=(.*)$", text, re.M)
        }
        found[name] = (values["CPUUsageNSec"] / 1e9, values["Rss"] / 1024)
    return found


def changed(output: str, host: str) -> int:
    """How many tasks changed something, of a run's recap."""
    counts = re.findall(rf"^{host}\s.*changed=(\d+)", output, re.M)
    if not counts:
        raise SimulatorError(f"no recap of {host}: {output[-600:]}")
    return int(counts[-1])


def play(spark: Spark, playbook: str, **variables: Any) -> str:
    """Run a playbook; its output. Raises SimulatorError where it fails."""
    run = spark.start(playbook, **variables)
    output, _ = run.communicate(timeout=900)
    if run.returncode != 0:
        raise SimulatorError(f"{playbook}: exit code {run.returncode}: {output[-1500:]}")
    return output


def scene(world: World, seconds: float, remove: bool) -> dict[str, Any]:
    """Play it; the figures."""
    on = {
        **{"sparkfleet_monitoring": True, "sparkfleet_alert_webhook": f"http://127.0.0.1:{RECEIVER}/hook"},
        "sparkfleet_gateway_certificate": "self-signed",
    }
    spark = Spark(world, "spark-1", on)
    spark.sh(
        f"cat >/run/sparkfleet-hook.py <<'END'\n{HOOK}\nEND\nrm -f /run/sparkfleet-hook\n"
        "systemctl stop sparkfleet-hook 2>/dev/null || true\n"
        "systemd-run --quiet --unit=sparkfleet-hook python3 /run/sparkfleet-hook.py"
    )
    made: dict[str, Any] = {}
    play(spark, "playbooks/gateway.yml")
    certificate = world.folder / "gateway.pem"
    certificate.write_text(spark.sh(f"openssl x509 -in {CERTIFICATE}"), encoding="utf-8")
    began = time.monotonic()
    play(spark, "playbooks/monitoring.yml")
    made["installed_s"] = round(time.monotonic() - began, 1)
    began = time.monotonic()
    made["second_run_changed"] = changed(play(spark, "playbooks/monitoring.yml"), "spark-1")
    made["second_run_s"] = round(time.monotonic() - began, 1)
    play(spark, "playbooks/drift.yml")  # leaves its number to Prometheus
    faults.break_(world, "spark-1", ["xid"])
    # What a fault covers is not seen by a service that runs.
    spark.sh("systemctl restart sparkfleet-sensors")
    before, began = cost(spark), time.monotonic()
    address = spark.sh("hostname -i").split()[0]
    load = Load(f"https://{address}:{GATEWAY}", 4, ca=str(certificate), name=spark.name).start()
    time.sleep(seconds)
    after, took = cost(spark), time.monotonic() - began
    query = querying(spark)
    rows = look(query)
    result = load.stop()
    made["load"], made["failed"] = line(result), result["failed"]
    faults.fix(world, "spark-1", ["xid"])
    made["rules"], made["expressions"] = len(rules.RECORDS) + len(rules.ALERTS), len(rows)
    made["empty"] = [dataclasses.asdict(row) for row in rows if row.series == 0]
    made["targets"] = {
        sample["metric"]["job"]: sample["value"][1] for sample in query("sum by (job) (up) / count by (job) (up)")
    }
    made["series"] = int(query("prometheus_tsdb_head_series")[0]["value"][1])
    made["cost"] = {
        name: {
            "cpu_percent": round((after[name][0] - before[name][0]) / took * 100, 2),
            "mib": round(after[name][1], 1),
        }
        for name in UNITS
    }
    made["listeners"] = spark.sh(f"ss -Htln | awk '{{print $4}}' | grep -E '{PORTS}' | sort -u").split()
    play(spark, "playbooks/test_alert.yml")
    made["test_alert"] = [
        alert["labels"]["alertname"]
        for text in filter(str.strip, spark.sh("cat /run/sparkfleet-hook").splitlines())
        for alert in json.loads(text)["alerts"]
    ]
    if remove:
        play(spark, "playbooks/monitoring.yml", sparkfleet_monitoring=False)
        made["left"] = spark.sh(
            "ls -d /etc/sparkfleet/monitoring /var/lib/sparkfleet-prometheus "
            "/etc/systemd/system/sparkfleet-prometheus* 2>/dev/null || true"
        ).split()
    spark.sh("systemctl stop sparkfleet-hook")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Play the scene; 1 where a request failed, an expression is empty, a second run changed something, or no alert
    arrived."""
    parser = argparse.ArgumentParser(prog="python -m simulator.monitoring", description="Monitoring under load.")
    parser.add_argument("--world", default="demo")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--remove", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    try:
        made = scene(World(options.world, print), options.seconds, options.remove)
    except SimulatorError as error:
        print(f"simulator: {error}", file=sys.stderr)
        return 1
    text = json.dumps(made, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    right = (
        not made["failed"]
        and not made["empty"]
        and not made["second_run_changed"]
        and "SparkfleetTest" in made["test_alert"]
    )
    return 0 if right and not made.get("left") else 1


if __name__ == "__main__":
    sys.exit(main())
