"""A fleet behind its gateways, under load: rollouts good and bad, an engine, a Spark and a gateway that die, drift;
keys, TLS, paths, ports and drain of the gateway; what it costs.

    python -m simulator.fleet --world NAME [--gateways spark-1,spark-2] [--streams 8] [--only SCENE...] [--json FILE]

The world has the engine that fails on command, one gateway or two (SPARKFLEET_GATEWAYS=spark-1,spark-2; two have a
floating address), a key of the engines or none (SPARKFLEET_ENGINE_KEY), and what site.yml deploys. Each scene ends with
every Spark serving again.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import http.client
import io
import ipaddress
import json
import os
import re
import secrets
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from simulator.load import Load, line
from simulator.shell import SimulatorError, expect
from simulator.spark import ROOT, SERVICE, Spark, bearer, engine_key
from simulator.world import REPOSITORY, World

NEXT = "nvcr.io/nvidia/vllm:25.10-py3"
PORT, MODEL_PORT, ENGINE_PORT = 8080, 8081, 8000
MODEL = SERVICE.removeprefix("vllm-")
CLIENT_KEY = "a-key-of-a-client"
GAP_SECONDS = 6.0  # within which clients must get an answer, whatever happens to a gateway
PREFILL = 30  # seconds; longer than the gateway takes to notice
COST_STREAMS, COST_ROUNDS, COST_SECONDS = (1, 8, 64), 3, 4.0
TOKENS = ("hf_token", "hf_token_without_access")
BASE = {"sparkfleet_start_timeout": 30, "sparkfleet_guard_interval": 0.5, "sparkfleet_rollout_waves": "50%"}
DRIFT, UNREACHABLE = 4, 7
SHOWN = (
    *("rollout_s", "untouched", "down_s", "back_s", "longest_gap_s", "killed_gap_s", "stopped_gap_s"),
    *("rotated_s", "searched", "copies", "exit_code", "resumed_s", "restarted_s", "served_s", "joined_s"),
)


@dataclasses.dataclass
class Fleet:
    """The Sparks of a world, and the gateway on one of them."""

    world: World
    gateways: list[str]
    streams: int

    def __post_init__(self) -> None:
        self.names = sorted(self.world.state()["sparks"])
        # The world's network is bridged to this machine. A floating address is that of the inventory.
        floating = ipaddress.IPv4Address(self.world.state()["address"]) - 2
        self.address = str(floating) if len(self.gateways) > 1 else self.own(self.gateways[0])

    def own(self, name: str) -> str:
        """The address of a Spark itself."""
        return self.spark(name).sh("hostname -i").split()[0]

    def holder(self, but: str = "") -> Spark:
        """The gateway that has the address at this moment; `but` is dead. Raises SimulatorError."""
        for name in self.gateways:
            if name != but and f" {self.address}/" in self.spark(name).sh("ip -4 address show"):
                return self.spark(name)
        raise SimulatorError(f"no gateway has {self.address}")

    def run(self, program: str, *words: str, **variables: Any) -> tuple[int, str, float]:
        """Run a program of ours with the world's inventory; exit code, what it printed, seconds."""
        began = time.monotonic()
        done = self.start(program, *words, **variables)
        printed, _ = done.communicate(timeout=900)
        return done.returncode, printed, time.monotonic() - began

    def start(self, program: str, *words: str, **variables: Any) -> subprocess.Popen[str]:
        """Begin to run it."""
        environment = {
            **os.environ,
            "SPARKFLEET_WORLD": self.world.name,
            "SPARKFLEET_GATEWAYS": ",".join(self.gateways),
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            # The connections that a run leaves open have its environment.
            "SPARKFLEET_ENGINE_KEY": str(variables.get("sparkfleet_engine_key", engine_key())),
        }
        argv = [str(Path(sys.executable).with_name(program)), *words, "-i", "inventory/simulated"]
        return subprocess.Popen(
            [*argv, "-e", json.dumps({**BASE, **variables})],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def sparkfleet(self, *words: str, **variables: Any) -> tuple[int, str, float]:
        """Run a verb; exit code, what it printed, seconds."""
        return self.run("sparkfleet", *words, **variables)

    def gateway(self, **variables: Any) -> str:
        """Redeploy the gateways; what was printed. Raises SimulatorError."""
        code, printed, _ = self.run("ansible-playbook", "playbooks/gateway.yml", **variables)
        expect(code == 0, "playbooks/gateway.yml failed", printed)
        return printed

    def logged(self, spark: Spark, since: float, words: str) -> list[float]:
        """When a gateway logged something, as seconds since a moment."""
        journal = f"journalctl --no-pager -o short-unix --since @{int(since)} -t haproxy"
        printed = spark.sh(f"{journal} | grep -F '{words}' || true")
        times = sorted(float(text.split()[0]) - since for text in printed.splitlines())
        return [round(at, 2) for at in times if at >= 0]

    def under_load(self, scene: Callable[[], object]) -> dict[str, Any]:
        """Do something while requests come through the gateway; what became of them."""
        load = Load(f"http://{self.address}:{PORT}", self.streams).start()
        time.sleep(2)
        try:
            scene()
            time.sleep(2)
        finally:
            result = load.stop()
        return result

    def releases(self) -> dict[str, str]:
        """The current release of each Spark, and since when its engine runs."""
        found = {}
        for name in self.names:
            spark = self.spark(name)
            found[name] = spark.release() + spark.sh(f"docker inspect -f '{{{{.State.StartedAt}}}}' {SERVICE}")
        return found

    def spark(self, name: str) -> Spark:
        return Spark(self.world, name, BASE)

    def healthy(self) -> None:
        """Wait until every Spark answers, and the gateway knows."""
        for name in self.names:
            spark = self.spark(name)
            spark.until("a right answer", spark.answers)
            spark.until("the guard serves", functools.partial(serves, spark))
        time.sleep(2)


def serves(spark: Spark) -> bool:
    """Whether its guard says so."""
    return bool(spark.guard()["engine"] == "serving")


def trusted(spark: Spark) -> bool:
    """Whether no model in its cache is marked suspect."""
    return not spark.sh("find /opt/hf/.sparkfleet -name '*.suspect.json'").strip()


def good(fleet: Fleet) -> dict[str, Any]:
    """Another image, in waves."""
    took: list[float] = []

    def scene() -> None:
        code, printed, seconds = fleet.sparkfleet("rollout", sparkfleet_image=NEXT)
        expect(code == 0, "the rollout failed", printed)
        took.append(seconds)

    before = fleet.releases()
    result = fleet.under_load(scene)
    after = fleet.releases()
    expect(all(before[name] != after[name] for name in fleet.names), "not every Spark was rolled out", after)
    expect(result["failed"] == 0, "requests failed", line(result))
    return {**result, "rollout_s": round(took[0], 1)}


def bad(fleet: Fleet) -> dict[str, Any]:
    """A release that answers wrong: the canary is rolled back, no other Spark is touched."""
    before = fleet.releases()

    def scene() -> None:
        wrong = {"SIMULATED_FAULT": "answer-wrong"}
        code, printed, _ = fleet.sparkfleet("rollout", sparkfleet_image=NEXT, sparkfleet_environment=wrong)
        expect(code == 5, "the rollout did not end as restored (5)", f"{code} {printed}")

    result = fleet.under_load(scene)
    after = fleet.releases()
    changed = [name for name in fleet.names if before[name] != after[name]]
    expect(len(changed) == 1, "more or less than the canary was touched", changed)
    release = {name: text.partition("2")[0] for name, text in after.items()}
    expect(fleet.spark(changed[0]).answers(), "the canary does not serve", release)
    expect(result["failed"] == 0, "requests failed", line(result))
    return {**result, "untouched": len(fleet.names) - 1}


def killed(fleet: Fleet) -> dict[str, Any]:
    """kill -9 of an engine: what was in flight there is lost, nothing else."""
    victim, times = fleet.spark(fleet.names[-1]), list[float]()

    def scene() -> None:
        times.append(time.time())
        victim.sh(f"kill -9 $(docker inspect -f '{{{{.State.Pid}}}}' {SERVICE})")
        rejoined(fleet, victim)

    return around(fleet, victim, fleet.under_load(scene), times[0])


def gone(fleet: Fleet) -> dict[str, Any]:
    """A whole Spark dies, and comes back."""
    victim, times = fleet.spark(fleet.names[-1]), list[float]()

    def scene() -> None:
        times.append(time.time())
        fleet.world.reboot(victim.name)
        rejoined(fleet, victim)

    return around(fleet, victim, fleet.under_load(scene), times[0])


def rejoined(fleet: Fleet, victim: Spark) -> None:
    """Wait until its guard says that it serves, and the gateway agrees."""
    time.sleep(1)  # they have seen it go
    gateway = fleet.holder()
    victim.until("it serves again", functools.partial(serves, victim))
    gateway.until("it gets requests again", lambda: statistics(gateway, victim.name)["status"].startswith("UP"))


def around(fleet: Fleet, victim: Spark, result: dict[str, Any], since: float) -> dict[str, Any]:
    """What became of requests while a Spark was away; seconds until the gateway's log has it down, and up again."""
    expect(result["failed"] <= fleet.streams, "more failed than was in flight", line(result))
    gateway, server = fleet.holder(), f"/{victim.name} is "
    down, back = (fleet.logged(gateway, since, f"{server}{word}") for word in ("DOWN", "UP"))
    expect(bool(down and back), "the gateway did not see it go and come back", (down, back))
    return {**result, "down_s": down[0], "back_s": back[-1]}


def unplugged(fleet: Fleet) -> dict[str, Any]:
    """The cable of a Spark is pulled: a request that waits there is given to another one, one that streams ends."""
    victim = fleet.spark(fleet.names[-1])
    gateway = fleet.holder()
    others = [name for name in fleet.names if name != victim.name]
    for name in others:
        runtime(gateway, f"set server {MODEL}/{name} state maint")
    waiting = Asked(fleet, f"prefill {PREFILL}", session="unplugged")
    victim.until("it is there", lambda: statistics(gateway, victim.name)["scur"] == "1")
    for name in others:
        runtime(gateway, f"set server {MODEL}/{name} state ready")
    began, route = time.monotonic(), victim.sh("ip route show default").strip()
    victim.sh("ip link set eth0 down")
    try:
        whole = waiting.whole(120)
    finally:
        victim.sh(f"ip link set eth0 up; ip route replace {route}")
    expect(whole, "the request was not answered by another Spark", waiting.text)
    return {"answered_by_another_s": round(time.monotonic() - began - PREFILL, 1)}


def unreachable(fleet: Fleet) -> dict[str, Any]:
    """A Spark of the second wave of a rollout cannot be reached when its turn comes: its neighbour ends its turn, the
    third wave is untouched, and the same command continues once it is back."""
    expect(len(fleet.names) > 3, "at least four Sparks are needed", fleet.names)
    order = sorted(fleet.names)  # as the inventory has them
    canary, victim, untouched = fleet.spark(order[0]), fleet.spark(order[2]), order[3:]
    before = fleet.releases()
    wanted = {
        "sparkfleet_image": NEXT,
        "sparkfleet_rollout_waves": 2,
        "sparkfleet_environment": {"SCENE": f"unreachable {time.time():.0f}"},
    }
    found: dict[str, Any] = {}

    def scene() -> None:
        began = time.monotonic()
        rollout = fleet.start("sparkfleet", "rollout", **wanted)
        first = canary.release()
        canary.until("the canary has its release", lambda: canary.release() != first, 400)
        # It keeps serving: only its SSH is gone, the connection that is kept open too.
        victim.sh("systemctl stop ssh.socket ssh.service; pkill -9 -x 'sshd|sshd-session' || true")
        printed, _ = rollout.communicate(timeout=600)
        found.update(exit_code=rollout.returncode, rollout_s=round(time.monotonic() - began, 1), printed=printed)

    try:
        result = fleet.under_load(scene)
    finally:
        victim.sh("systemctl start ssh.service")
    printed = found.pop("printed")
    expect(found["exit_code"] == UNREACHABLE, "it did not end as unreachable (7)", f"{found} {printed}")
    after = fleet.releases()
    expect(all(before[name] == after[name] for name in untouched), "a later wave was touched", printed)
    expect(before[order[1]] != after[order[1]], "the other Spark of its wave did not end its turn", printed)
    expect(result["failed"] == 0, "requests failed", line(result))
    code, printed, seconds = fleet.sparkfleet("rollout", **wanted)
    last = fleet.releases()
    expect(code == 0, "it was not resumed", printed)
    expect(all(last[name] != before[name] for name in order), "not every Spark was rolled out", last)
    return {**result, **found, "untouched": len(untouched), "resumed_s": round(seconds, 1)}


def unresolved(fleet: Fleet) -> dict[str, Any]:
    """A Spark is off, and its name stands for nothing: HAProxy is reloaded and restarted all the same, the others
    serve, and it joins when its name is back."""
    gateway, victim = fleet.holder(), fleet.spark(fleet.names[-1])
    name = f"sparkfleet-{fleet.world.name}-{victim.name}"
    container = fleet.world.container(victim.name)

    def reload() -> None:
        gateway.sh("systemctl reload haproxy")
        time.sleep(2)

    container.kill()
    try:
        gateway.until("its name is gone", lambda: not gateway.sh(f"getent hosts {name} || true").strip())
        result = fleet.under_load(reload)
        expect(result["failed"] == 0, "requests failed over a reload", line(result))
        began = time.monotonic()
        gateway.sh("systemctl restart haproxy")
        gateway.until("others serve", lambda: ask(fleet) == 200)
        restarted = time.monotonic() - began
        # A server counts as up until it has been asked.
        gateway.until("it is known to be down", lambda: statistics(gateway, victim.name)["status"] == "DOWN")
        before = int(statistics(gateway, victim.name)["stot"])
    finally:
        began = time.monotonic()
        container.start()
    victim.until("it serves again", victim.answers)
    served = time.monotonic() - began

    def given() -> bool:
        ask(fleet)
        seen = statistics(gateway, victim.name)
        return seen["status"].startswith("UP") and int(seen["stot"]) > before

    gateway.until("it gets requests again", given)
    joined = time.monotonic() - began - served
    return {**result, "restarted_s": round(restarted, 1), "served_s": round(served, 1), "joined_s": round(joined, 1)}


def gateway_gone(fleet: Fleet) -> dict[str, Any]:
    """The gateway that has the floating address dies with its whole host; the other one knows its sessions."""
    if len(fleet.gateways) < 2:
        return {"left out": "there is one gateway"}
    before = fleet.holder()
    other = next(fleet.spark(name) for name in fleet.gateways if name != before.name)
    ask(fleet, session="kept")
    where = stuck(other, "kept")
    expect(where == stuck(before, "kept") != "", "the gateways do not share sessions", where)

    def scene() -> None:
        fleet.world.container(before.name).kill()
        time.sleep(5)

    result = fleet.under_load(scene)
    expect(fleet.holder(but=before.name).name == other.name, "the address has not moved")
    expect(result["longest_gap_s"] < GAP_SECONDS, f"nothing was answered for {GAP_SECONDS:g} s", line(result))
    expect(stuck(other, "kept") == where, "the session was lost")
    fleet.world.container(before.name).start()
    fleet.healthy()
    expect(fleet.holder().name == other.name, "the address went back by itself")
    return result


def haproxy_gone(fleet: Fleet) -> dict[str, Any]:
    """HAProxy alone dies (systemd restarts it), and is stopped for good (the address moves)."""
    first = fleet.holder()

    def scene(script: str) -> None:
        first.sh(script)
        time.sleep(4)

    result = fleet.under_load(lambda: scene("kill -9 $(pidof haproxy)"))
    expect(result["longest_gap_s"] < GAP_SECONDS, f"nothing was answered for {GAP_SECONDS:g} s", line(result))
    more: dict[str, Any] = {"killed_gap_s": result["longest_gap_s"]}
    if len(fleet.gateways) > 1:
        stopped = fleet.under_load(lambda: scene("systemctl stop haproxy"))
        first.sh("systemctl start haproxy")
        expect(stopped["longest_gap_s"] < GAP_SECONDS, f"nothing was answered for {GAP_SECONDS:g} s", line(stopped))
        more["stopped_gap_s"] = stopped["longest_gap_s"]
    return {**result, **more}


def door(fleet: Fleet) -> dict[str, Any]:
    """Client keys, a certificate made on the spot, allowed paths, a port of the model; a stream that began before goes
    on over both reloads."""
    stream = Asked(fleet, "prefill 9")
    wanted = {"sparkfleet_gateway_keys": [CLIENT_KEY], "sparkfleet_gateway_ports": {MODEL: MODEL_PORT}}
    printed = fleet.gateway(**wanted, sparkfleet_gateway_certificate="self-signed")
    expect(CLIENT_KEY not in printed, "a key was printed")
    holder, model = fleet.holder(), f"/{MODEL}"
    forbidden = ("/tokenize", "/metrics", "/v1", f"{model}/pause")
    wishes: list[tuple[int, dict[str, Any]]] = [
        (401, {}),
        (401, {"key": "another-key"}),
        (200, {"key": CLIENT_KEY}),
        (200, {"key": CLIENT_KEY, "path": f"{model}/v1/models"}),
        (200, {"key": CLIENT_KEY, "port": MODEL_PORT}),
        (401, {"port": MODEL_PORT}),
        (200, {"path": "/health"}),
        *((404, {"key": CLIENT_KEY, "path": path}) for path in forbidden),
    ]
    tls = ssl.create_default_context(cadata=holder.sh("cat /etc/haproxy/sparkfleet/gateway.pem"))
    try:
        for status, more in wishes:
            got = ask(fleet, tls=tls, **more)
            expect(got == status, f"{more}: {status} is expected", got)
        direct = ask(fleet, address=fleet.own(fleet.names[-1]), port=ENGINE_PORT)
        expect(direct == (401 if engine_key() else 200), "the engine itself asks for its key", direct)
    finally:
        fleet.gateway()
    expect(stream.whole(), "the stream was cut", stream.text)
    return {"stream": "whole"}


def drained(fleet: Fleet) -> dict[str, Any]:
    """A Spark is drained: its stream completes, new requests go elsewhere, including those of its sessions."""
    stream = Asked(fleet, "prefill 5", session="drained")
    holder = fleet.holder()
    time.sleep(1)  # it is on its way
    victim = stuck(holder, "drained") or in_flight(holder)
    words = ("gateways", "--become", "--module-name", "sparkfleet.dgx.haproxy_server", "--args")
    began = time.monotonic()
    draining = fleet.start("ansible", *words, json.dumps({"servers": [victim], "state": "drain", "timeout": 30}))
    holder.until("it is drained", lambda: statistics(holder, victim)["status"].startswith(("MAINT", "DRAIN")))
    before = statistics(holder, victim)["stot"]
    for _ in range(2 * len(fleet.names)):
        expect(ask(fleet, session="drained") == 200, "a request was refused")
    expect(statistics(holder, victim)["stot"] == before, "a drained Spark got a request")
    printed, _ = draining.communicate(timeout=60)
    seconds = time.monotonic() - began
    code, more, _ = fleet.run("ansible", *words, json.dumps({"servers": [victim], "state": "ready"}))
    expect(draining.returncode == 0 and code == 0, "it was not drained and put back", printed + more)
    expect(stream.whole(), "the stream was cut", stream.text)
    return {"waited_s": round(seconds, 1)}


def cost(fleet: Fleet) -> dict[str, Any]:
    """The same load straight at the engines and through the gateway, in turn."""
    engines = ",".join(f"http://{fleet.own(name)}:{ENGINE_PORT}" for name in fleet.names)
    ways = {"direct": (engines, engine_key()), "gateway": (f"http://{fleet.address}:{PORT}", "")}
    found: dict[str, Any] = {}
    for streams in COST_STREAMS:
        loads: dict[str, list[Load]] = {name: [] for name in ways}
        for _ in range(COST_ROUNDS):
            for name, (url, key) in ways.items():
                load = Load(url, streams, key).start()
                time.sleep(COST_SECONDS)
                result = load.stop()
                expect(result["failed"] == 0, f"requests failed, {name}", line(result))
                loads[name].append(load)
        direct, gateway = (merged(loads[name]) for name in ways)
        added = {f"added_{key}": round(gateway[key] - direct[key], 1) for key in ("p50_ms", "p99_ms")}
        found[str(streams)] = {"direct": direct, "gateway": gateway, **added}
    return found


def merged(loads: Sequence[Load]) -> dict[str, float]:
    """Median and 99th percentile of all the latencies in ms, requests a second."""
    ordered = sorted(second for load in loads for second in load.latencies)
    seconds = sum(load.result()["seconds"] for load in loads)
    return {
        "p50_ms": round(1000 * ordered[len(ordered) // 2], 1),
        "p99_ms": round(1000 * ordered[int(0.99 * len(ordered))], 1),
        "requests_per_second": round(len(ordered) / seconds, 1),
    }


class Asked:
    """One long stream through the gateway, in a thread of its own."""

    def __init__(self, fleet: Fleet, text: str, session: str = "") -> None:
        self.text = ""
        headers = {"Content-Type": "application/json", **({"X-Session-ID": session} if session else {})}
        body = {"model": REPOSITORY, "messages": [{"role": "user", "content": text}], "max_tokens": 32, "stream": True}
        self._connection = http.client.HTTPConnection(fleet.address, PORT, timeout=150)
        self._connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            self.text = self._connection.getresponse().read().decode("utf-8", "replace")
        except (OSError, http.client.HTTPException) as error:
            self.text = f"{type(error).__name__}: {error}"

    def whole(self, seconds: float = 60) -> bool:
        """Whether it ended as it should."""
        self._thread.join(seconds)
        return self.text.rstrip().endswith("data: [DONE]")


def ask(
    fleet: Fleet,
    path: str = "/v1/models",
    key: str = "",
    session: str = "",
    address: str = "",
    port: int = PORT,
    tls: ssl.SSLContext | None = None,
) -> int:
    """The status of a GET, with the gateway's certificate checked where there is one."""
    where = address or fleet.address
    plain = tls is None or bool(address)
    connection = (
        http.client.HTTPConnection(where, port, timeout=10)
        if plain
        else http.client.HTTPSConnection(where, port, timeout=10, context=tls)
    )
    connection.request("GET", path, headers={**bearer(key), **({"X-Session-ID": session} if session else {})})
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status


def runtime(gateway: Spark, command: str) -> str:
    """What HAProxy's runtime socket says."""
    program = (
        "import socket; s = socket.socket(socket.AF_UNIX); s.connect('/run/haproxy/admin.sock'); "
        f"s.sendall(b'{command}\\n'); print(s.makefile().read())"
    )
    return gateway.sh(f'python3 -c "{program}"')


def statistics(gateway: Spark, server: str) -> dict[str, str]:
    """A server's row of the statistics."""
    text = runtime(gateway, "show stat").lstrip("# ")
    return next(row for row in csv.DictReader(io.StringIO(text)) if row["svname"] == server)


def in_flight(gateway: Spark) -> str:
    """The first server that has a request."""
    text = runtime(gateway, "show stat -1 4 -1").lstrip("# ")
    return next((row["svname"] for row in csv.DictReader(io.StringIO(text)) if int(row["scur"] or 0)), "")


def stuck(gateway: Spark, session: str) -> str:
    """The server that a session stays on, as a gateway knows it; "" for none."""
    found = re.search(rf"key={session} .*server_key=(\S+)", runtime(gateway, f"show table {MODEL}"))
    return found[1] if found else ""


def drift(fleet: Fleet) -> dict[str, Any]:
    """Nothing differs; then one engine is stopped by hand, and it is reported."""
    for name in fleet.names:  # a wrong answer had the files of the model checked
        spark = fleet.spark(name)
        spark.until("its model is no longer suspect", functools.partial(trusted, spark))
    code, printed, _ = fleet.sparkfleet("drift", "--json", sparkfleet_image=NEXT)
    expect(code == 0, "there is drift", printed)
    victim = fleet.spark(fleet.names[-1])
    victim.sh(f"docker stop -t 2 {SERVICE}")
    code, printed, seconds = fleet.sparkfleet("drift", sparkfleet_image=NEXT)
    expect(
        code == DRIFT and f"{victim.name} differs from the inventory" in printed,
        "it is not reported",
        f"{code} {printed}",
    )
    code, printed, _ = fleet.sparkfleet("start", "-l", victim.name)
    expect(code == 0, "it does not start again", printed)
    return {"seconds": round(seconds, 1)}


def resumed(fleet: Fleet) -> dict[str, Any]:
    """A rollout of what all have is nothing to do."""
    code, printed, seconds = fleet.sparkfleet("rollout", sparkfleet_image=NEXT)
    expect(code == 0 and "up to date" in printed, "it was rolled out again", printed)
    return {"seconds": round(seconds, 1)}


def rotated(fleet: Fleet) -> dict[str, Any]:
    """The engines' key is replaced, and the first one put back, under load; then a client's, and the token: no request
    fails, what is old is refused, and no copy of it is left."""
    found: dict[str, Any] = {}
    # Random: the search for copies looks through this machine too. So must be SPARKFLEET_ENGINE_KEY.
    first, second = engine_key(), secrets.token_hex(16)
    expect(bool(first), "the engines have no key: set SPARKFLEET_ENGINE_KEY, such as $(openssl rand -hex 16)")
    searched: list[str] = []
    # Nothing but the key may differ from the inventory; earlier scenes leave other images.
    code, printed, _ = fleet.sparkfleet("rollout")
    expect(code == 0, "the fleet is not as the inventory has it", printed)

    def rotate(key: str) -> None:
        code, printed, seconds = fleet.sparkfleet("rotate", "engine-key", sparkfleet_engine_key=key)
        expect(code == 0, "the key was not rotated", printed)
        expect(first not in printed and second not in printed, "a key was printed")
        searched.extend(places(printed))
        found.setdefault("rotated_s", round(seconds, 1))

    loads = [fleet.under_load(functools.partial(rotate, second))]
    own = fleet.own(fleet.names[-1])
    statuses = [ask(fleet, address=own, port=ENGINE_PORT, key=key) for key in (first, second)]
    expect(statuses == [401, 200], "the old key is refused, the new one not", statuses)
    loads.append(fleet.under_load(functools.partial(rotate, first)))
    for result in loads:
        expect(result["failed"] == 0, "requests failed", line(result))
    client = {"name": "web", "key": secrets.token_hex(16)}
    fleet.gateway(sparkfleet_gateway_keys=[client])
    try:
        loads += client_key(fleet, client["key"], {**client, "key": secrets.token_hex(16)}, searched)
    finally:
        fleet.gateway()
    tokens = [(fleet.world.folder / name).read_text(encoding="utf-8").strip() for name in TOKENS]
    for token in reversed(tokens):
        code, printed, _ = fleet.sparkfleet("rotate", "hub-token", sparkfleet_hf_token=token)
        expect(code == 0 and not any(token in printed for token in tokens), "the token was not rotated", printed)
        searched.extend(places(printed))
    expect(len(searched) == 5 * len(fleet.names), "not every host was searched", searched)
    sent, failed = (sum(result[key] for result in loads) for key in ("sent", "failed"))
    return {**loads[0], **found, "sent": sent, "failed": failed, "searched": sum(map(int, searched)), "copies": 0}


def client_key(fleet: Fleet, old: str, client: dict[str, str], searched: list[str]) -> list[dict[str, Any]]:
    """Replace a client's key, which the client changes meanwhile; its loads with the one and the other."""
    url = f"http://{fleet.address}:{PORT}"
    before = Load(url, fleet.streams, old).start()
    expect(ask(fleet, key=client["key"]) == 401, "the new key is valid too early")
    rotation = fleet.start(
        "sparkfleet", "rotate", "client-key", "web", "--overlap", "8", sparkfleet_gateway_keys=[client]
    )
    end = time.monotonic() + 120
    while ask(fleet, key=client["key"]) != 200 and time.monotonic() < end:
        time.sleep(0.2)
    both = [ask(fleet, key=key) for key in (old, client["key"])]
    after = Load(url, fleet.streams, client["key"]).start()
    results = [before.stop()]
    printed = rotation.communicate(timeout=300)[0]
    results.append(after.stop())
    expect(rotation.returncode == 0, "the client's key was not rotated", printed)
    expect(both == [200, 200], "both keys are not valid in between", both)
    expect(ask(fleet, key=old) == 401, "the old key is still valid")
    for result in results:
        expect(result["failed"] == 0, "requests failed", line(result))
    searched.extend(places(printed))
    return results


def places(printed: str) -> list[str]:
    """How many places were searched on each host without finding a copy, as `rotate` says."""
    return re.findall(r"(?<!controller )\b(\d+) places searched, 0 with the old secret", " ".join(printed.split()))


SCENES = (good, resumed, bad, killed, gone, drift, drained, door, haproxy_gone, gateway_gone)
MORE = (cost, unplugged, unreachable, unresolved, rotated)  # only by name


def main(argv: Sequence[str] | None = None) -> int:
    """Play the scenes; 1 when one does not end as it should."""
    parser = argparse.ArgumentParser(prog="python -m simulator.fleet", description="A fleet under load.")
    parser.add_argument("--world", default="fleet")
    parser.add_argument("--gateways", default=os.environ.get("SPARKFLEET_GATEWAYS") or "spark-1")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--only", nargs="*", choices=[scene.__name__ for scene in (*SCENES, *MORE)])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    world = World(options.world, lambda text: None)
    found: dict[str, Any] = {}
    began = time.monotonic()

    def progress(text: str) -> None:
        print(f"[{time.monotonic() - began:4.0f} s] {text} ...", file=sys.stderr, flush=True)

    try:
        fleet = Fleet(world, options.gateways.split(","), options.streams)
        for scene in (*SCENES, *MORE):
            if scene.__name__ not in (options.only or [known.__name__ for known in SCENES]):
                continue
            progress(f"{scene.__name__}: waiting for the fleet to be healthy")
            fleet.healthy()
            progress(f"{scene.__name__}: {' '.join((scene.__doc__ or '').split()).partition('.')[0]}")
            found[scene.__name__] = result = scene(fleet)
            more = {key: result[key] for key in SHOWN if key in result}
            print(f"{scene.__name__}: {line(result) if 'sent' in result else ''} {more or result}", flush=True)
    except SimulatorError as error:
        print(f"FAILED after {', '.join(found) or 'nothing'}: {error}", file=sys.stderr)
        return 1
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
