"""Who reaches what: every route of the engine through the gateway, a client beyond its quota and its neighbour, the
firewall from another host before and after.

    python -m simulator.exposure --world NAME [--gateways spark-1] [--only SCENE...] [--json FILE]

The world is one that site.yml has deployed with the same SPARKFLEET_GATEWAYS; `firewall` needs two Sparks. Each scene
puts things back.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simulator.fleet import ENGINE_PORT, PORT, Fleet
from simulator.load import Load, line
from simulator.shell import SimulatorError, expect
from simulator.spark import SERVICE, Spark, bearer, engine_key
from simulator.world import REPOSITORY, World, run_in

KEYS = {"none": "", "wrong": "a-wrong-key", "client": "the-key-of-alice"}
NEIGHBOUR = "the-key-of-bob"
#: What FastAPI and the Prometheus client add to what the engine's document lists.
UNLISTED = ("/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json", "/metrics")
SECONDS = 12.0
GUARD_PORT, SHARE_PORT = 9109, 9110
REACH = """
import socket, sys
for place in sys.argv[1:]:
    host, _, port = place.rpartition(":")
    try:
        socket.create_connection((host, int(port)), 2).close()
        print("open")
    except ConnectionRefusedError:
        print("refused")
    except OSError:
        print("dropped")
"""


def status(where: tuple[str, int], method: str, path: str, key: str = "") -> int:
    """The status of a request with an empty object as body."""
    connection = http.client.HTTPConnection(*where, timeout=30)
    body = b"{}" if method in ("POST", "PUT", "DELETE") else None
    try:
        connection.request(method, path, body, {"Content-Type": "application/json", **bearer(key)})
        return connection.getresponse().status
    finally:
        connection.close()


def routes(fleet: Fleet) -> dict[str, Any]:
    """Each route of the engine's OpenAPI document through the gateway: without a key, with a wrong one, a client's."""
    spark = fleet.spark(fleet.names[-1])
    words = f"-H 'Authorization: Bearer {engine_key()}'" if engine_key() else ""
    document = json.loads(spark.sh(f"curl -s {words} http://127.0.0.1:{ENGINE_PORT}/openapi.json"))
    methods = ("get", "post", "put", "delete", "head")
    listed = [
        (method.upper(), re.sub(r"\{\w+\}", "resp_1", path))
        for path, known in document["paths"].items()
        for method in [name for name in methods if name in (known or {})] or ["post"]
    ]
    fleet.gateway(sparkfleet_gateway_keys=[{"name": "alice", "key": KEYS["client"]}])
    gateway, rows = (fleet.address, PORT), []
    try:
        for method, path in [*listed, *(("GET", path) for path in UNLISTED)]:
            got = {name: status(gateway, method, path, key) for name, key in KEYS.items()}
            rows.append({"method": method, "path": path, **got})
    finally:
        fleet.gateway()
    for row in rows:
        seen = (row["none"], row["wrong"])
        expect(row["path"] == "/health" or seen in ((401, 401), (404, 404)), "open without a key", row)
    closed = [row for row in rows if row["none"] == 404]
    expect(all(row["client"] == 404 for row in closed), "what is closed is closed to clients too", closed)
    return {"routes": len(rows), "closed": len(closed), "rows": rows}


def quota(fleet: Fleet) -> dict[str, Any]:
    """Bob's latency alone, beside Alice who asks with 48 streams and a quota of 4, and beside Alice without a quota."""
    found: dict[str, Any] = {}
    bob = {"name": "bob", "key": NEIGHBOUR}
    try:
        for name, streams, limit in (("alone", 0, 4), ("with_quota", 48, 4), ("without_quota", 48, 0)):
            fleet.gateway(sparkfleet_gateway_keys=[{"name": "alice", "key": KEYS["client"], "streams": limit}, bob])
            url = f"http://{fleet.address}:{PORT}"
            alice = Load(url, streams, KEYS["client"]).start()
            time.sleep(1)
            load = Load(url, 2, NEIGHBOUR).start()
            time.sleep(SECONDS)
            found[name] = {"bob": load.stop(), "alice": alice.stop() if streams else None}
            expect(found[name]["bob"]["failed"] == 0, "the neighbour's requests failed", line(found[name]["bob"]))
        refused = found["with_quota"]["alice"]["reasons"]
        expect(set(refused) == {"ValueError: HTTP 429"}, "a client beyond its quota is refused with 429", refused)
        expect(found["without_quota"]["alice"]["failed"] == 0, "without a quota nothing is refused", found)
    finally:
        fleet.gateway()
    return {
        **{f"{name}_p50_s": each["bob"]["p50_s"] for name, each in found.items()},
        **{f"{name}_p99_s": each["bob"]["p99_s"] for name, each in found.items()},
        "refused": found["with_quota"]["alice"]["failed"],
        "runs": found,
    }


def firewall(fleet: Fleet) -> dict[str, Any]:
    """What answers on the last Spark to its gateway and to a stranger on its network (the host that plays the
    internet): before, with the firewall, after a flush, a restart of Docker, a reboot, and when it is off again."""
    gate, victim = fleet.spark(fleet.gateways[0]), fleet.spark(fleet.names[-1])
    expect(gate.name != victim.name, "the last Spark is a gateway", gate.name)
    address = fleet.own(victim.name)
    inside = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
    container = victim.sh(f"docker inspect -f '{inside}' {SERVICE}").strip()
    ways = {
        **{"SSH": (address, 22), "engine": (address, ENGINE_PORT), "guard": (address, GUARD_PORT)},
        **{"share": (address, SHARE_PORT), "container": (container, ENGINE_PORT)},
    }
    listener = f"systemd-run --quiet --unit share-stand-in python3 -m http.server {SHARE_PORT}"
    net = container.rpartition(".")[0] + ".0/24"

    def seen() -> dict[str, dict[str, str]]:
        victim.sh(f"systemctl is-active -q share-stand-in || {listener}; sleep 1")
        places = [f"{host}:{port}" for host, port in ways.values()]
        ask = f"ip route replace {net} via {address}; python3 -c '{REACH}' {' '.join(places)}; ip route del {net}"
        code, printed = run_in(fleet.world.container("internet"), ["sh", "-euc", ask])
        expect(code == 0, "the stranger asks", printed)
        rows = {"gateway": gate.sh(ask).split(), "stranger": printed.split()}
        return {who: dict(zip(ways, row, strict=True)) for who, row in rows.items()}

    def site(**more: Any) -> str:
        code, printed, _ = fleet.run("ansible-playbook", "site.yml", **more)
        expect(code == 0, "site.yml failed", printed[-3000:])
        return printed

    on = {"sparkfleet_firewall": True}
    found: dict[str, Any] = {"before": seen()}
    code, printed, _ = fleet.run("ansible-playbook", "site.yml", "--check", "--diff", **on)
    expect(code == 0 and "set up the firewall" in printed, "check mode says it", printed[-3000:])
    expect("inet sparkfleet" not in victim.sh("nft list tables 2>/dev/null || true"), "check mode changes nothing", "")
    site(**on)
    try:
        found["with"] = seen()
        expect("changed=0" in counted(site(**on), victim.name), "the second run changes nothing", victim.name)
        expect(status((fleet.address, PORT), "GET", "/v1/models") == 200, "the gateway serves", fleet.address)
        victim.sh("nft delete table inet sparkfleet")
        expect("load the firewall" in site(**on), "a table that was flushed is loaded again", victim.name)
        victim.sh("systemctl restart docker")
        victim.until("its engine answers", lambda: answers(victim))
        found["docker restarted"] = seen()
        reboot(fleet, victim)
        found["rebooted"] = seen()
        dropped = re.findall(r"counter packets (\d+)", victim.sh("nft list table inet sparkfleet"))
        found["dropped"] = [int(count) for count in dropped]
    finally:
        printed = site()
    found["off"] = seen()
    victim.sh("systemctl stop share-stand-in")
    left = victim.sh(
        "{ nft list tables; ls /etc/sparkfleet /etc/systemd/system; } | grep 'inet sparkfleet\\|firewall' || true"
    )
    expect(not left.strip(), "it is gone altogether", left)
    expect(found["off"] == found["before"], "it is as before", found)
    for when in ("with", "docker restarted", "rebooted"):
        expect(found[when] == found["with"], "it is the same afterwards", found)
    shut = {"SSH": "open", **dict.fromkeys(("engine", "guard", "share", "container"), "dropped")}
    expect(found["with"]["stranger"] == shut, "a stranger reaches SSH alone", found)
    open_to = {name: found["with"]["gateway"][name] for name in ("SSH", "engine", "guard", "share")}
    expect(set(open_to.values()) == {"open"}, "the gateway reaches them", found)
    return found


def counted(printed: str, host: str) -> str:
    """A host's line of the recap."""
    return next((text for text in printed.splitlines() if re.match(rf"{host}\s+: ok=", text)), "changed=?")


def reboot(fleet: Fleet, spark: Spark) -> None:
    """Restart a Spark and wait until its engine answers."""
    fleet.world.reboot(spark.name)
    spark.until("its engine answers", lambda: answers(spark))


def answers(spark: Spark) -> bool:
    """Whether its engine answers on the Spark itself."""
    words = f"-H 'Authorization: Bearer {engine_key()}'" if engine_key() else ""
    return REPOSITORY in spark.sh(f"curl -s {words} http://127.0.0.1:{ENGINE_PORT}/v1/models || true")


SCENES = (routes, quota, firewall)


def main(argv: Sequence[str] | None = None) -> int:
    """Play the scenes; 1 when one does not end as it should."""
    parser = argparse.ArgumentParser(prog="python -m simulator.exposure", description="Who reaches what.")
    parser.add_argument("--world", default="exposure")
    parser.add_argument("--gateways", default=os.environ.get("SPARKFLEET_GATEWAYS") or "spark-1")
    parser.add_argument("--only", nargs="*", choices=[scene.__name__ for scene in SCENES])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    found: dict[str, Any] = {}
    try:
        fleet = Fleet(World(options.world, lambda text: None), options.gateways.split(","), 8)
        for scene in SCENES:
            if scene.__name__ in (options.only or [known.__name__ for known in SCENES]):
                found[scene.__name__] = result = scene(fleet)
                short = {key: value for key, value in result.items() if key not in ("rows", "runs")}
                print(f"{scene.__name__}: {json.dumps(short)}", flush=True)
    except SimulatorError as error:
        print(f"FAILED after {', '.join(found) or 'nothing'}: {error}", file=sys.stderr)
        return 1
    finally:
        if options.json and found:
            options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
