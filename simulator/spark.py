"""A simulated Spark as those use it who harm and measure it: scripts, playbooks, questions from outside."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from simulator.shell import SimulatorError
from simulator.world import REPOSITORY, World, run_in

ROOT = Path(__file__).resolve().parents[1]
QUESTION = "What is the capital of France? Answer in one short sentence."
SERVICE = "vllm-llama31-8b-fp8"
END_SECONDS = 75.0  # until a host must be as it is waited for


def engine_key() -> str:
    """The key that engines ask for, as the inventory of simulated Sparks reads it; "" for none."""
    return os.environ.get("SPARKFLEET_ENGINE_KEY", "")


def bearer(key: str) -> dict[str, str]:
    """The header of a key."""
    return {"Authorization": f"Bearer {key}"} if key else {}


class Spark:
    """One Spark of a world. `variables`: of the inventory, for every run."""

    def __init__(self, world: World, name: str, variables: Mapping[str, Any]) -> None:
        self.world, self.name, self.variables = world, name, variables
        self.port = int(world.state()["sparks"][name]["http"])

    def sh(self, script: str) -> str:
        """Run a script on the Spark as root; its output. Raises SimulatorError."""
        code, output = run_in(self.world.container(self.name), ["sh", "-euc", script])
        if code != 0:
            raise SimulatorError(f"{self.name}: {script}: {output.strip() or code}")
        return output

    def python(self, script: str) -> str:
        """Run Python on the Spark as root; its output. Raises SimulatorError."""
        code, output = run_in(self.world.container(self.name), ["python3", "-c", script])
        if code != 0:
            raise SimulatorError(f"{self.name}: {output.strip()[-600:] or code}")
        return output

    def start(self, playbook: str, **variables: Any) -> subprocess.Popen[str]:
        """Begin to run a playbook against this Spark."""
        values = json.dumps({**self.variables, **variables})
        argv = ["ansible-playbook", "-i", "inventory/simulated", playbook, "--limit", f"{self.name},localhost"]
        environment = {**os.environ, "SPARKFLEET_WORLD": self.world.name, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")}
        return subprocess.Popen(
            [*argv, "-e", values],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def play(self, playbook: str = "site.yml", **variables: Any) -> str:
        """Run a playbook to its end; what it printed."""
        return self.start(playbook, **variables).communicate(timeout=900)[0]

    def verb(self, *words: str, seconds: float = 600) -> tuple[int, str]:
        """Run `sparkfleet WORDS` against this Spark within so many seconds; exit code and output."""
        values = ["-e", json.dumps(dict(self.variables))] if self.variables else []
        done = subprocess.run(
            ["sparkfleet", *words, "-i", "inventory/simulated", "-l", self.name, *values],
            cwd=ROOT,
            env={**os.environ, "SPARKFLEET_WORLD": self.world.name, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            timeout=seconds,
            check=False,
        )
        return done.returncode, done.stdout

    def answers(self, seconds: float = 2, model: str = REPOSITORY) -> bool:
        """Whether it answers the question right within so many seconds, asked from outside."""
        body = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 32}
        url = f"http://127.0.0.1:{self.port}/v1/chat/completions"
        headers = {"Content-Type": "application/json", **bearer(engine_key())}
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=seconds) as answer:  # noqa: S310 - http, loopback
                return "Paris" in json.load(answer)["choices"][0]["message"]["content"]
        except (OSError, http.client.HTTPException, ValueError, KeyError):
            return False

    def release(self) -> str:
        """The current release's number."""
        return self.sh("readlink /opt/sparkfleet/current || true").strip().rpartition("/")[2]

    def fingerprint(self) -> str:
        """What must be the same on an untouched host: our containers with their starts, releases, settings."""
        return self.sh(
            "docker ps -a --no-trunc --filter label=com.docker.compose.project=sparkfleet -q | sort | xargs -r docker "
            "inspect -f '{{.Id}} {{.State.Status}} {{.State.StartedAt}}'; readlink /opt/sparkfleet/current; "
            "cd /opt/sparkfleet && find releases -name compose.yml | sort | xargs sha256sum; "
            "sha256sum /etc/sparkfleet/*"
        )

    def guard(self) -> dict[str, Any]:
        """The guard's record of the first engine. Raises ValueError where it has none."""
        data = json.loads(self.sh("cat /var/lib/sparkfleet/guard-state.json"))
        for record in data["engines"].values():
            return dict(record)
        raise ValueError("the guard watches no engine")

    def until(self, what: str, test: Callable[[], bool], seconds: float = END_SECONDS) -> float:
        """Wait for something; the seconds it took. Raises SimulatorError."""
        began = time.monotonic()
        while True:
            try:
                if test():
                    return time.monotonic() - began
            except (SimulatorError, ValueError):  # the host is being restarted, or a file is being written
                pass
            if time.monotonic() - began > seconds:
                raise SimulatorError(f"{self.name}: not within {seconds:.0f} s: {what}")
            time.sleep(0.2)

    def phase(self, *names: str) -> None:
        """Wait until a switch that runs is in one of these phases."""
        script = (
            "systemctl -q is-active sparkfleet-switch && "
            'sed -n \'s/^  "phase": "\\(.*\\)",$/\\1/p\' /var/lib/sparkfleet/switch.json || true'
        )
        self.until(f"phase {'/'.join(names)}", lambda: self.sh(script).strip() in names, 40)

    def command(self, word: str) -> None:
        """Tell the running engine to fail. (docker exec: needs a memlock limit that this machine cannot give.)"""
        self.sh(f"echo {word} >/proc/$(docker inspect -f '{{{{.State.Pid}}}}' {SERVICE})/root/tmp/simulated-fault")

    def diagnose(self) -> list[str]:
        """The ids that diagnose names."""
        self.play("playbooks/diagnose.yml")
        report = ROOT / ".sparkfleet" / "reports" / f"{self.name}-diagnose.json"
        return [item["id"] for item in json.loads(report.read_text(encoding="utf-8"))["findings"]]


class Prober:
    """Asks all the time; how long no right answer came."""

    def __init__(self, spark: Spark) -> None:
        self.spark, self.longest = spark, 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        last = time.monotonic()
        while not self._over.is_set():
            if self.spark.answers():
                last = time.monotonic()
            self.longest = max(self.longest, time.monotonic() - last)
            self._over.wait(0.2)

    def end(self) -> float:
        """The longest time without an answer, s."""
        self._over.set()
        self._thread.join(5)
        return self.longest
