"""An Ansible engineer elsewhere: collection and wheel, each from an empty folder, against a simulated Spark.

    python -m simulator.consumer --world NAME

Builds both here, installs the collection with ansible-galaxy and the wheel with pip (not editable), runs
a playbook of three lines and a role alone, and asks the Spark. Each must use its own copy of the package `sparkfleet`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from simulator.shell import SimulatorError
from simulator.spark import ROOT, Spark
from simulator.world import REPOSITORY, World

SITE = """\
- name: Sparks
  ansible.builtin.import_playbook: sparkfleet.dgx.site
"""
ROLE = f"""\
- name: One role
  hosts: sparks
  become: true
  gather_facts: false
  roles:
    - role: sparkfleet.dgx.endpoint
      endpoint_engines:
        - repo: {REPOSITORY}
          port: 8000
          verify:
            question: What is the capital of France? Answer in one short sentence.
            expect: Paris
            prompt: The capital of France is
            prompt_expect: Paris
"""
WHERE = """\
- name: Where reports go
  hosts: localhost
  gather_facts: false
  tasks:
    - name: Say it
      ansible.builtin.debug:
        msg: "state: {{ lookup('sparkfleet.dgx.state_dir') }}"
"""
PLAYBOOKS = {"site.yml": SITE, "role.yml": ROLE, "where.yml": WHERE}


class Consumer:
    """An empty folder, an environment without anything of this repository, and what was run in it."""

    def __init__(self, world: str, folder: Path, **environment: str) -> None:
        self.folder, self.steps = folder, 0
        folder.mkdir()
        for name, text in PLAYBOOKS.items():
            (folder / name).write_text(text, encoding="utf-8")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("ANSIBLE_", "PYTHON"))}
        self.state = folder / "state"
        self.environment = {
            **kept,
            "SPARKFLEET_WORLD": world,
            "XDG_STATE_HOME": str(self.state),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "SPARKFLEET_SIM_HOME": str(_home(kept)),
            **environment,
        }

    def run(self, *words: str, sees: str = "") -> str:
        """Run a command here; it must end with 0 and show `sees`. Raises SimulatorError."""
        began = time.monotonic()
        argv = [str(Path(sys.executable).parent / words[0]), *words[1:]]
        done = subprocess.run(
            argv,
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
            check=False,
        )
        shown = " ".join(words).replace(str(ROOT), "…")
        print(f"{time.monotonic() - began:6.1f} s  exit {done.returncode}  {shown}", flush=True)
        if done.returncode != 0 or sees not in done.stdout:
            raise SimulatorError(f"{shown}: exit code {done.returncode}, wants {sees!r}:\n{done.stdout[-4000:]}")
        self.steps += 1
        return done.stdout

    def play(self, playbook: str, sees: str = "") -> str:
        """Run a playbook of this folder against the simulated Sparks."""
        return self.run("ansible-playbook", "-i", str(ROOT / "inventory" / "simulated"), playbook, sees=sees)


def _home(environment: Mapping[str, str]) -> Path:
    cache = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(environment.get("SPARKFLEET_SIM_HOME") or f"{cache}/sparkfleet").expanduser()


def walk(world: str, folder: Path) -> int:
    """All of it; the number of steps. Raises SimulatorError for the first that goes wrong."""
    spark = Spark(World(world), "spark-1", {})
    dist = folder / "dist"
    one = Consumer(world, folder / "collection")
    one.run("ansible-galaxy", "collection", "build", str(ROOT), "--output-path", str(dist))
    (built,) = dist.glob("*.tar.gz")
    one.run("ansible-galaxy", "collection", "install", str(built), "-p", "collections")
    _both(one, spark)

    target = folder / "site-packages"
    two = Consumer(world, folder / "wheel", PYTHONPATH=str(target))
    two.run("python", "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(dist), str(ROOT))
    (wheel,) = dist.glob("*.whl")
    two.run("python", "-m", "pip", "install", "--no-deps", "--target", str(target), str(wheel))
    _both(two, spark)
    inventory = ("-i", str(ROOT / "inventory" / "simulated"))
    shown = json.loads(two.run("python", "-m", "sparkfleet", "status", "--json", *inventory))
    if shown["fleet"]["states"] != {"serving": 1}:
        raise SimulatorError(f"sparkfleet status of the wheel: {shown}")
    two.run("python", "-m", "sparkfleet", "deploy", *inventory)
    if not list((two.state / "sparkfleet" / "events").glob("*-deploy.jsonl")):
        raise SimulatorError(f"sparkfleet deploy of the wheel left no event log in {two.state}")
    return one.steps + two.steps


def _both(consumer: Consumer, spark: Spark) -> None:
    consumer.play("where.yml", sees=f"state: {consumer.state / 'sparkfleet'}")
    consumer.play("site.yml", sees="failed=0")
    if not spark.answers(60):
        raise SimulatorError(f"{spark.name} does not answer right after {consumer.folder.name}'s site.yml")
    if not (consumer.state / "sparkfleet" / "reports" / f"{spark.name}.json").exists():
        raise SimulatorError(f"no report of the verification in {consumer.state}")
    consumer.play("role.yml", sees="The capital of France is Paris")


def main() -> int:
    """Run it; 1 and the reason where a step goes wrong."""
    parser = argparse.ArgumentParser(prog="python -m simulator.consumer")
    parser.add_argument("--world", required=True)
    with tempfile.TemporaryDirectory(prefix="sparkfleet-consumer-") as folder:
        try:
            steps = walk(parser.parse_args().world, Path(folder))
        except SimulatorError as error:
            print(error, file=sys.stderr)
            return 1
    print(f"{steps} steps, all right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
