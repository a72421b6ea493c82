"""The steps of a single-Spark owner, run inside a simulated Spark.

    python -m simulator.owner --world NAME [--spark spark-1] [--json FILE]

An ordinary user, whose sudo asks for a password, clones the repository, runs scripts/setup, types the password for
`ansible-playbook site.yml --ask-become-pass`, and then uses every verb of `sparkfleet` with the default inventory.
Afterwards the Spark is restarted and must serve. Python packages come from a folder, as `scripts/setup FOLDER` takes
them, because a Spark may not reach a registry of packages from inside this machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import platform
import re
import shlex
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pexpect

from simulator.shell import SimulatorError
from simulator.spark import ROOT, Spark
from simulator.world import World, home
from sparkfleet.packaging import bundle, wheels

USER, PASSWORD = "owner", "not so secret: a simulation"
#: What the user may do, as docs/operations.md has it.
SUDOERS = f"{USER} ALL=(root) ALL"
SUDOERS_FILE = "/etc/sudoers.d/sparkfleet"
SOURCE, PACKAGES = "/srv/sparkfleet", "/srv/packages"
#: The Python of the simulated Sparks, Debian 13's.
PYTHON = "3.13"
NEXT_IMAGE = "nvcr.io/nvidia/vllm:25.10-py3"
#: What asks: Ansible's --ask-become-pass, and sudo itself, which must not.
PROMPTS = ["BECOME password: ?", r"\[sudo\] password for \w+: ?", pexpect.EOF, pexpect.TIMEOUT]
SECONDS = 600


@dataclasses.dataclass
class Step:
    """One command of the owner: exit code wanted and found, seconds, and what is wrong with it."""

    name: str
    code: int
    found: int
    seconds: float
    problem: str = ""


class Owner:
    """A login of the user USER on a Spark."""

    def __init__(self, spark: Spark, say: Callable[[str], None]) -> None:
        self.spark, self.say = spark, say
        self.steps: list[Step] = []
        self.token = (spark.world.folder / "hf_token").read_text(encoding="utf-8").strip()

    def run(self, command: str, code: int = 0, sees: str = "", answers: Sequence[str] = (), name: str = "") -> str:
        """Type a command; the password where it is asked for, and `answers` to other questions. Notes whether it
        ended with `code` and showed `sees`."""
        began = time.monotonic()
        script = f"cd ~/sparkfleet 2>/dev/null; [ ! -e .venv ] || . .venv/bin/activate; {command}"
        inside = ["su", "-l", USER, "-c", f"export HF_TOKEN={self.token}; {script}"]
        container = self.spark.world.container_name(self.spark.name)
        child = pexpect.spawn(
            "docker",
            ["exec", "-it", container, *inside],
            encoding="utf-8",
            codec_errors="replace",
            timeout=SECONDS,
            dimensions=(50, 160),
        )
        output, typed = "", 0
        while True:
            found = child.expect(
                [*PROMPTS, *(re.escape(question) for question, _ in zip(answers[::2], answers[1::2], strict=True))]
            )
            output += str(child.before or "")
            if found == 0:
                child.sendline(PASSWORD)
                typed += 1
            elif found == 1:
                child.close(force=True)
                output += "\nsudo itself asked for the password"
                break
            elif found in (2, 3):
                child.close(force=found == 3)
                break
            else:
                child.sendline(answers[2 * (found - len(PROMPTS)) + 1])
        ended = child.exitstatus if child.exitstatus is not None else -1
        step = Step(name or command, code, ended, time.monotonic() - began)
        if ended != code:
            step.problem = f"exit code {ended}, not {code}"
        elif sees and sees not in re.sub(r"\s+", " ", output):
            step.problem = f"does not show {sees!r}"
        elif "Traceback (most recent call last)" in output:
            step.problem = "a traceback"
        self.steps.append(step)
        self.say(
            f"{step.seconds:6.1f} s  exit {ended}  {step.name}{'  FAILED: ' + step.problem if step.problem else ''}"
        )
        if step.problem:
            self.say("\n".join(output.splitlines()[-30:]))
        return output

    def note(self, name: str, seconds: float, problem: str = "") -> None:
        """Record something that is not a command."""
        self.steps.append(Step(name, 0, 1 if problem else 0, seconds, problem))
        self.say(f"{seconds:6.1f} s  {name}{'  FAILED: ' + problem if problem else ''}")


def packages(say: Callable[[str], None]) -> Path:
    """A folder with the Python packages of scripts/setup for a Spark, kept in the cache."""
    folder = home() / "cache" / "python"
    say("Python packages for the Spark")
    for version in wheels.SPARK_PYTHONS:
        wheels._pip(folder, wheels._platform(platform.machine(), version))
    return folder


def bundle_json(folder: Path) -> bytes:
    """The list of a bundle that has nothing but these Python packages."""
    made = bundle.Bundle(folder.parent)
    files = {name: made.entry_of(name)[0] for name in (f"python/{wheel.name}" for wheel in folder.iterdir())}
    known = {"version": bundle.VERSION, "system": {}, "images": {}, "models": {}, "packages": []}
    entries = {name: dataclasses.asdict(entry) for name, entry in files.items()}
    return json.dumps({**known, "files": entries}).encode()


def furnish(spark: Spark, folder: Path) -> None:
    """What is there before the owner comes: a user with a password, the repository to clone, Python packages."""
    spark.sh(
        f"id {USER} >/dev/null 2>&1 || useradd --create-home --shell /bin/bash {USER}; "
        f"echo {shlex.quote(SUDOERS)} >{SUDOERS_FILE}; chmod 440 {SUDOERS_FILE}; visudo -cqf {SUDOERS_FILE}; "
        f"echo {shlex.quote(f'{USER}:{PASSWORD}')} | chpasswd; rm -rf {SOURCE} ~{USER}/sparkfleet {PACKAGES}"
    )
    container = spark.world.container(spark.name)
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in names.split("\0"):
            if name and (ROOT / name).exists():
                archive.add(ROOT / name, f"{SOURCE.lstrip('/')}/{name}", recursive=False)
        for wheel in folder.iterdir():
            archive.add(wheel, f"{PACKAGES.lstrip('/')}/python/{wheel.name}", recursive=False)
        listed = bundle_json(folder)
        entry = tarfile.TarInfo(f"{PACKAGES.lstrip('/')}/{bundle.NAME}")
        entry.size, entry.mode = len(listed), 0o644
        archive.addfile(entry, io.BytesIO(listed))
    container.put_archive("/", buffer.getvalue())
    # git clones only from a folder of one's own.
    spark.sh(
        f"chown -R root: {SOURCE} {PACKAGES} && cd {SOURCE} && git init -q && git add -A && "
        "git -c user.name=simulator -c user.email=simulator@localhost "
        f"commit -qm 'The repository' && chown -R {USER}: {SOURCE}"
    )


def verbs(owner: Owner) -> None:
    """Every verb with the default inventory, in a plausible order."""
    run = owner.run
    run("sparkfleet models", sees="llama31-8b-fp8")
    run("sparkfleet plan llama31-8b-fp8", sees="FITS")
    run("sparkfleet compose llama31-8b-fp8", sees="vllm-llama31-8b-fp8")
    run("sparkfleet status", 6, sees="-K", name="sparkfleet status (without -K)")
    run("sparkfleet preflight -K")
    run("sparkfleet deploy -K")
    run("sparkfleet verify -K", sees="Paris")
    run("sparkfleet status -K", sees="serving")
    run("sparkfleet logs -K", sees="Application startup complete")
    run("sparkfleet drift -K")
    run("sparkfleet diagnose -K")
    run("sparkfleet rollout --dry")
    run("sparkfleet rollout -K")
    run(f"sparkfleet upgrade {NEXT_IMAGE} -K")
    run("sparkfleet drift -K", 4, name="sparkfleet drift -K (after an upgrade)")
    run("sparkfleet rollback -K")
    run("sparkfleet switch --profile low_latency -K")
    run("sparkfleet rollback -K", name="sparkfleet rollback -K (of the switch)")
    run("sparkfleet restart -K")
    run("sparkfleet stop -K")
    run("sparkfleet status -K", 6, sees="stopped", name="sparkfleet status -K (stopped)")
    run("sparkfleet start -K")
    run(
        f"PIP_NO_INDEX=1 PIP_FIND_LINKS={PACKAGES}/python sparkfleet bundle ~/bundle -K",
        name="sparkfleet bundle ~/bundle -K",
    )
    run("sparkfleet init --yes", sees="this machine")


def walk(spark: Spark, say: Callable[[str], None]) -> tuple[list[Step], float]:
    """The whole path; its steps, and the seconds from the clone to a right answer."""
    furnish(spark, packages(say))
    owner = Owner(spark, say)
    began = time.monotonic()
    owner.run(f"git clone -q {SOURCE}", name="git clone")
    owner.run(f"scripts/setup {PACKAGES}", sees="Ready")
    owner.run("ansible-playbook site.yml --ask-become-pass", sees="failed=0")
    right = spark.answers()
    answered = time.monotonic() - began
    owner.note("a right answer, from outside", answered, "" if right else "no right answer")
    if not right:
        return owner.steps, answered
    owner.run("ansible-playbook site.yml --ask-become-pass", sees="changed=0", name="site.yml again")
    verbs(owner)
    restarted, problem = time.monotonic(), ""
    spark.world.reboot(spark.name)
    try:
        spark.until("a right answer after a restart", spark.answers, 180)
    except SimulatorError as error:
        problem = str(error)
    owner.note("the Spark restarts and serves again", time.monotonic() - restarted, problem)
    owner.run("sparkfleet remove --yes -K")
    left = spark.sh(
        "docker ps -aq --filter label=com.docker.compose.project=sparkfleet; ls -d /opt/sparkfleet 2>&1 || true"
    )
    owner.note("nothing is left", 0.0, "" if "No such file" in left else left.strip())
    return owner.steps, answered


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; 1 when a step does not hold."""
    parser = argparse.ArgumentParser(prog="python -m simulator.owner", description="The path of an owner of one Spark.")
    parser.add_argument("--world", default="owner")
    parser.add_argument("--spark", default="spark-1")
    parser.add_argument("--json", type=Path, help="write what was found")
    options = parser.parse_args(argv)
    world = World(options.world, lambda text: None)
    if options.spark not in world.state().get("sparks", {}):
        print(f"world {options.world} has no {options.spark}: python -m simulator up --engine fault", file=sys.stderr)
        return 1
    steps, answered = walk(Spark(world, options.spark, {}), lambda text: print(text, flush=True))
    bad = [step for step in steps if step.problem]
    print(f"{answered:.0f} s from the clone to a right answer; {len(steps)} steps, {len(bad)} failed")
    if options.json:
        options.json.write_text(json.dumps([vars(step) for step in steps], indent=2) + "\n", encoding="utf-8")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
