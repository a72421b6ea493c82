"""Alerts fired and ended by faults in a simulated fleet, with the time that each takes, and who is told.

    python -m simulator.alerts --world NAME [--only CASE...] [--again] [--json FILE]

The world has two Sparks with the engine that fails on command and spark-1 as gateway (SPARKFLEET_GATEWAYS=spark-1), and
what site.yml deploys. Monitoring is deployed by its playbook; then, on the Spark that monitors, intervals, ranges and
waits of all rules are divided by SCALE, so that half an hour takes a minute. Thresholds stay, but for the two that are
a time since something. Mail, webhook and ntfy go to small servers on that Spark, which keep what they are sent.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shlex
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from simulator import faults, sink
from simulator.load import Load
from simulator.monitoring import Query, play, querying
from simulator.shell import SimulatorError
from simulator.spark import SERVICE, Spark
from simulator.world import World
from sparkfleet.monitoring import rules

SCALE = 30
INTERVAL = 15.0  # seconds, of scrapes and rules as they are deployed
FOLDER = "/etc/sparkfleet/monitoring"
HOOK, SMTP = 9199, 9198
FIRE_SECONDS, END_SECONDS = 240.0, 200.0
PEM = "/etc/haproxy/sparkfleet/gateway.pem"
SETTINGS = {
    "sparkfleet_gateway_certificate": "self-signed",
    **{"sparkfleet_guard_interval": 0.5, "sparkfleet_guard_wedge_seconds": 6, "sparkfleet_guard_canary_interval": 2},
    **{"sparkfleet_guard_canary_timeout": 4, "sparkfleet_drain_timeout": 5},
}
RECEIVERS = {
    **{"sparkfleet_monitoring": True, "sparkfleet_alert_webhook": f"http://127.0.0.1:{HOOK}/hook"},
    **{"sparkfleet_alert_ntfy": f"http://127.0.0.1:{HOOK}/topic", "sparkfleet_alert_email": "ops@example.org"},
    **{"sparkfleet_alert_email_from": "sparks@example.org", "sparkfleet_alert_smtp": f"127.0.0.1:{SMTP}"},
}
#: Alerts that no fault here brings about, and why.
LEFT_OUT = {
    "SparkfleetDiskFull": "a file system of its own needs a loop device, which a container has not; the disk of the "
    "machine is not to be filled",
}
KEPT, SINK = "/run/sparkfleet-sink", "/run/sparkfleet-sink.py"
LISTEN = f"systemd-run --quiet --unit=sparkfleet-sink python3 {SINK} {KEPT} {HOOK} {SMTP}"
#: Sets servers of the gateway to a state, by HAProxy's socket.
SERVERS = """
import socket
def ask(text):
    with socket.socket(socket.AF_UNIX) as link:
        link.connect("/run/haproxy/admin.sock")
        link.sendall(text.encode() + b"\\n")
        return link.makefile().read()
for line in ask("show servers state").splitlines():
    words = line.split()
    if line[:1].isdigit() and len(words) > 4 and (not {names!r} or words[3] in {names!r}):
        ask("set server " + words[1] + "/" + words[3] + " state {state}")
"""


def scaled(text: str) -> str:
    """A file of rules with all durations divided by SCALE: ranges, waits, and thresholds that are a time since."""
    text = re.sub(r"\[(\d+)([smhd])\]", lambda found: f"[{_shorter(found[1], found[2])}]", text)
    text = re.sub(r"^( *for: )(\d+)([smhd])$", lambda found: found[1] + _shorter(found[2], found[3]), text, flags=re.M)

    def since(found: re.Match[str]) -> str:
        return f"{found[1]}{int(found[2]) / SCALE:g}"

    return re.sub(r"(time\(\)\s*-\s*[\w:{}=\"\s]+[<>]\s*)(\d+)", since, text)


def _shorter(number: str, unit: str) -> str:
    seconds = int(number) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[unit] / SCALE
    return f"{round(seconds * 1000)}ms"


@dataclasses.dataclass(frozen=True)
class Case:
    """A fault, the alerts that it fires, and its end. `host`: of the alerts, "" for any."""

    name: str
    alerts: tuple[str, ...]
    begin: Callable[[], object]
    end: Callable[[], object]
    host: str = ""


class Scene:
    """A fleet with monitoring, and the faults."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.monitor, self.other = (Spark(world, name, {**SETTINGS, **RECEIVERS}) for name in ("spark-1", "spark-2"))
        self.query: Query = querying(self.monitor)
        self._loads: dict[str, Load] = {}

    # -- monitoring, faster ----------------------------------------------------------------------------------

    def prepare(self, again: bool) -> None:
        """Start the sink, deploy monitoring unless it is there `again`, and divide its times."""
        text = Path(sink.__file__).read_text(encoding="utf-8")
        self.monitor.sh(
            f"printf %s {shlex.quote(text)} >{SINK}; rm -f {KEPT}; systemctl stop sparkfleet-sink 2>/dev/null || true"
        )
        self.monitor.sh(LISTEN)
        for spark in () if again else (self.monitor, self.other):
            play(spark, "playbooks/monitoring.yml")
        self.hasten()

    def hasten(self) -> None:
        """Divide all times of the monitor by SCALE."""
        interval = f"{round(INTERVAL / SCALE * 1000)}ms"
        files = {"recording": rules.recording_file(), "alerts": rules.alerts_file()}
        for name, text in files.items():
            self.monitor.sh(f"printf %s {shlex.quote(scaled(text))} >{FOLDER}/rules/{name}.yml")
        self.monitor.sh(
            f"sed -i -e 's/interval: 15s/interval: {interval}/; s/scrape_timeout: 10s/scrape_timeout: {interval}/' "
            f"{FOLDER}/prometheus.yml\n"
            f"sed -i -e 's/group_wait: 10s/group_wait: 300ms/; s/group_interval: 1m/group_interval: 2s/' "
            f"{FOLDER}/alertmanager.yml\n"
            f"promtool check rules {FOLDER}/rules/*.yml\n"
            "systemctl reload sparkfleet-prometheus sparkfleet-alertmanager"
        )

    def firing(self) -> set[tuple[str, str]]:
        """Alerts that fire now, with their hosts."""
        found = self.query('ALERTS{alertstate="firing"}')
        return {(sample["metric"]["alertname"], sample["metric"].get("host", "")) for sample in found}

    def fires(self, alert: str, host: str) -> bool:
        """Whether an alert fires, of a host or of any."""
        return any(name == alert and host in ("", of) for name, of in self.firing())

    # -- faults ----------------------------------------------------------------------------------------------

    def load(self, spark: Spark, streams: int) -> None:
        """Put so many streams on a Spark's engine, in place of those before."""
        self.rest(spark)
        self._loads[spark.name] = Load(f"http://127.0.0.1:{spark.port}", streams).start()

    def rest(self, spark: Spark) -> None:
        """End its load; requests that hang are left behind."""
        load = self._loads.pop(spark.name, None)
        if load:
            threading.Thread(target=load.stop, daemon=True).start()

    def word(self, spark: Spark, word: str, streams: int = 0) -> Callable[[], None]:
        """The engine of a Spark does so from now on, under a load."""

        def begin() -> None:
            spark.command(word)
            if streams:
                self.load(spark, streams)

        return begin

    def well(self, spark: Spark, *scripts: str) -> Callable[[], None]:
        """The engine of a Spark does as it should again, after some scripts."""

        def end() -> None:
            # The word is removed first, so that what hangs ends.
            spark.sh(
                f"pid=$(docker inspect -f '{{{{.State.Pid}}}}' {SERVICE}); "
                "[ $pid = 0 ] || rm -f /proc/$pid/root/tmp/simulated-fault"
            )
            self.rest(spark)
            for script in scripts:
                spark.sh(script)

        return end

    def host_fault(self, spark: Spark, name: str, *units: str) -> tuple[Callable[[], None], Callable[[], None]]:
        """A fault of the host, seen by services that start afterwards."""
        again = f"systemctl restart {' '.join(units)}" if units else "true"

        def begin() -> None:
            faults.break_(self.world, spark.name, [name])
            spark.sh(again)

        def end() -> None:
            faults.fix(self.world, spark.name, [name])
            spark.sh(again)

        return begin, end

    def servers(self, state: str, *names: str) -> Callable[[], object]:
        """Put servers of the gateway into a state, all unless some are named."""
        return lambda: self.monitor.python(SERVERS.format(state=state, names=names))

    def drift(self, *variables: str) -> Callable[[], object]:
        """Have `sparkfleet drift` compare a Spark with the inventory, or with one that says otherwise."""
        words = [word for pair in variables for word in ("-e", pair)]

        def look() -> None:
            code, printed = self.other.verb("drift", *words)
            if (code != 0) != bool(variables):
                raise SimulatorError(f"sparkfleet drift {' '.join(words)}: exit code {code}: {printed[-600:]}")

        return look

    def script(self, spark: Spark, text: str) -> Callable[[], object]:
        """Run a script on a Spark."""
        return lambda: spark.sh(text)

    def lanes(self) -> list[list[Case]]:
        """Cases that do not disturb each other, those of a lane one after the other."""
        a, b = self.monitor, self.other
        layer = f"$(docker inspect -f '{{{{.GraphDriver.Data.UpperDir}}}}' {SERVICE})"
        command = f"{layer}/tmp/simulated-fault"  # noqa: S108 - the container's
        # Of a container that runs: what is written beneath an overlay that is mounted is not seen in it.
        inside = f"/proc/$(docker inspect -f '{{{{.State.Pid}}}}' {SERVICE})/root/tmp/simulated-fault"
        start = f"docker start {SERVICE} >/dev/null"
        guard, again = "/etc/sparkfleet/guard.json", "systemctl restart sparkfleet-guard"
        sensors, node = "sparkfleet-sensors", "sparkfleet-node-exporter"
        engines = [
            # First: the guard has another rate only after half a minute of one stream.
            Case("slow", ("SparkfleetSlowEngine",), self.word(b, "slow", 1), self.word(b, "well"), b.name),
            Case(
                "queue",
                ("SparkfleetQueueing", "SparkfleetSlowFirstToken"),
                self.word(b, "queue", 24),
                self.well(b),
                b.name,
            ),
            Case("kv-full", ("SparkfleetKvCacheFull",), self.word(b, "kv-full"), self.well(b), b.name),
            Case("preempting", ("SparkfleetPreemptions",), self.word(b, "preempting"), self.well(b), b.name),
            Case(
                "stuck",
                ("SparkfleetEngineStuck",),
                lambda: (b.sh("systemctl stop sparkfleet-guard"), self.word(b, "engine-stuck", 2)()),
                self.well(b, "systemctl start sparkfleet-guard"),
                b.name,
            ),
            Case("wedge", ("SparkfleetEngineWedged",), self.word(b, "engine-wedged once", 1), self.well(b), b.name),
            Case(
                "down",
                ("SparkfleetEngineDown",),
                self.script(b, f"systemctl stop sparkfleet-guard; docker stop -t 1 {SERVICE}"),
                self.script(b, f"{start}; systemctl start sparkfleet-guard"),
                b.name,
            ),
            Case(
                "loading",
                ("SparkfleetEngineStartSlow",),
                self.script(b, f"echo endless-load >{inside}; docker restart -t 1 {SERVICE}"),
                self.well(b),
                b.name,
            ),
            Case("alone", ("SparkfleetGatewayNoBackup",), self.servers("maint", b.name), self.servers("ready")),
            Case("none", ("SparkfleetGatewayNoServer",), self.servers("maint"), self.servers("ready")),
            Case(
                "crash",
                ("SparkfleetEngineRestarts", "SparkfleetEngineGivenUp"),
                self.word(b, "crash"),
                self.script(b, f"rm -f {command}; {start}"),
                b.name,
            ),
            Case(
                "looks-rarely",
                ("SparkfleetGuardStuck",),
                self.script(
                    b, f'cp -p {guard} /run/guard.json; sed -i \'s/"interval": .*/"interval": 60,/\' {guard}; {again}'
                ),
                self.script(b, f"cp -p /run/guard.json {guard}; {again}"),
                b.name,
            ),
            Case(
                "docker-hangs",
                ("SparkfleetEngineDown",),
                self.script(b, "kill -STOP $(pidof dockerd)"),
                self.script(b, "kill -CONT $(pidof dockerd)"),
                b.name,
            ),
        ]
        low = "sed -E '/^Mem(Free|Available)/s/[0-9]+/2600000/' /etc/simulator/meminfo"
        broken = "groups: [{name: broken, rules: [{record: broken, expr: 'up / on (host) up'}]}]"
        reload = "systemctl reload sparkfleet-prometheus"
        hosts = [
            Case("hot", ("SparkfleetGpuHot", "SparkfleetGpuThrottled"), *self.host_fault(b, "hot"), b.name),
            Case("xid", ("SparkfleetGpuXid",), *self.host_fault(b, "xid", sensors), b.name),
            Case("gpu-lost", ("SparkfleetGpuLost",), *self.host_fault(b, "gpu-lost"), b.name),
            Case(
                "memory",
                ("SparkfleetMemoryLow",),
                self.script(
                    b, f"{low} >/run/meminfo; mount --bind /run/meminfo /proc/meminfo; systemctl restart {node}"
                ),
                self.script(b, f"umount /proc/meminfo; systemctl restart {node}"),
                b.name,
            ),
            Case(
                "target",
                ("SparkfleetTargetMissing",),
                # The other's guard is stopped by other cases.
                self.script(a, f"systemctl stop {node}"),
                self.script(a, f"systemctl start {node}"),
                a.name,
            ),
            Case("drift", ("SparkfleetDrift",), self.drift("sparkfleet_vllm_max_num_seqs=5"), self.drift(), b.name),
            Case(
                "certificate",
                ("SparkfleetCertificateExpires",),
                self.script(
                    a,
                    f"cp -p {PEM} /run/gateway.pem; cp -p {PEM}.key /run/gateway.pem.key\n"
                    f"openssl req -x509 -newkey rsa:2048 -nodes -days 5 -subj /CN=a -keyout {PEM}.key -out {PEM} 2>&1\n"
                    f"systemctl reload haproxy; systemctl restart {sensors}",
                ),
                self.script(
                    a,
                    f"cp -p /run/gateway.pem {PEM}; cp -p /run/gateway.pem.key {PEM}.key\n"
                    f"systemctl reload haproxy; systemctl restart {sensors}",
                ),
                a.name,
            ),
            Case(
                "rule",
                ("SparkfleetRuleFailing",),
                self.script(a, f"printf %s {shlex.quote(broken)} >{FOLDER}/rules/broken.yml; {reload}"),
                self.script(a, f"rm -f {FOLDER}/rules/broken.yml; {reload}"),
            ),
            Case(
                "nobody-told",
                ("SparkfleetNotificationsFailing",),
                # Some alert has to be sent meanwhile.
                lambda: (a.sh("systemctl stop sparkfleet-sink"), b.sh(f"systemctl stop {node}")),
                lambda: (
                    b.sh(f"systemctl start {node}"),
                    a.sh(LISTEN),
                ),
            ),
        ]
        return [engines, hosts]

    # -- the cases -------------------------------------------------------------------------------------------

    def run(self, case: Case) -> list[dict[str, Any]]:
        """Bring a fault about and end it: of each alert the seconds to fire and to end, or what was wrong."""
        rows = [{"case": case.name, "alert": alert, "problem": ""} for alert in case.alerts]
        before = self.firing()
        for row in rows:
            if any(name == row["alert"] and case.host in ("", host) for name, host in before):
                row["problem"] = "it fired before"
        try:
            case.begin()
            self._until(case, rows, True, "fired_s", FIRE_SECONDS)
            case.end()
            self._until(case, rows, False, "ended_s", END_SECONDS)
        except SimulatorError as error:
            for row in rows:
                row["problem"] = row["problem"] or str(error)[-400:]
        for row in rows:
            print(json.dumps(row), flush=True)
        return rows

    def _until(self, case: Case, rows: list[dict[str, Any]], wanted: bool, key: str, seconds: float) -> None:
        began = time.monotonic()
        waiting = [row for row in rows if not row["problem"]]
        while waiting and time.monotonic() - began < seconds:
            now = self.firing()
            for row in [*waiting]:
                fires = any(name == row["alert"] and case.host in ("", host) for name, host in now)
                if fires is wanted:
                    row[key] = round(time.monotonic() - began, 1)
                    waiting.remove(row)
            time.sleep(0.3)
        for row in waiting:
            row["problem"] = f"{'did not fire' if wanted else 'did not end'} within {seconds:.0f} s"

    def told(self) -> dict[str, dict[str, list[str]]]:
        """Of each way the alerts that it told of when they began, and when they ended."""
        made: dict[str, dict[str, set[str]]] = {}
        for line in self.monitor.sh(f"cat {KEPT} 2>/dev/null || true").splitlines():
            item = json.loads(line)
            states = made.setdefault(item["way"], {"firing": set(), "resolved": set()})
            if item["way"] == "mail":
                subject = next((text for text in item["body"].splitlines() if text.startswith("Subject:")), "")
                state = "resolved" if "RESOLVED" in subject else "firing"
                states[state].update(re.findall(r"\bSparkfleet\w+", subject))
                continue
            for alert in json.loads(item["body"])["alerts"]:
                states[alert["status"]].add(alert["labels"]["alertname"])
        return {way: {state: sorted(names) for state, names in states.items()} for way, states in made.items()}


def scene(world: World, only: Sequence[str], again: bool) -> dict[str, Any]:
    """Play it."""
    stage = Scene(world)
    stage.prepare(again)
    lanes = [[case for case in lane if not only or case.name in only] for lane in stage.lanes()]
    time.sleep(10)
    made: dict[str, Any] = {"scale": SCALE, "quiet": sorted(stage.firing()), "rows": []}

    def walk(lane: Sequence[Case]) -> None:
        for case in lane:
            made["rows"] += stage.run(case)

    threads = [threading.Thread(target=walk, args=(lane,)) for lane in lanes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    time.sleep(5)
    made["told"] = stage.told()
    fired = {row["alert"] for row in made["rows"] if "fired_s" in row}
    made["missing"] = sorted({alert.name for alert in rules.ALERTS} - fired - {*LEFT_OUT}) if not only else []
    made["left_out"] = LEFT_OUT
    stage.monitor.sh("systemctl stop sparkfleet-sink")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Play the scene; 1 where an alert did not fire or did not end."""
    parser = argparse.ArgumentParser(prog="python -m simulator.alerts", description="Alerts fired by faults.")
    parser.add_argument("--world", default="demo")
    parser.add_argument("--only", nargs="*", default=[], metavar="CASE")
    parser.add_argument("--again", action="store_true", help="an earlier call has deployed monitoring")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    os.environ.setdefault("SPARKFLEET_GATEWAYS", "spark-1")
    try:
        made = scene(World(options.world, print), options.only, options.again)
    except SimulatorError as error:
        print(f"simulator: {error}", file=sys.stderr)
        return 1
    if options.json:
        options.json.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in made.items() if key != "rows"}))
    wrong = [row for row in made["rows"] if row["problem"]]
    print(f"{len(made['rows']) - len(wrong)} of {len(made['rows'])} alerts fired and ended; missing: {made['missing']}")
    return 1 if wrong or made["missing"] else 0


if __name__ == "__main__":
    sys.exit(main())
