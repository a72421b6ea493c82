"""The fault matrix: each fault injected into a simulated Spark, what the operator sees, how the host ends.

    python -m simulator.matrix --world faults [--brief] [--only WORD…] [--docs docs/fault-matrix.md] [--json FILE]

The world has the engine that fails on command (`up --engine fault`) and Sparks that serve. Rows are shared out over
them; each begins and ends with a Spark that has answered a question.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import queue
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from simulator import faults, outside
from simulator.row import (
    ANY,
    AS_SEEN,
    BASE,
    BEFORE,
    CLEAN,
    FOREIGN,
    GUARD_SAYS,
    NEXT,
    NOWHERE,
    SERVES,
    SERVES_NEW,
    STOPPED,
    Row,
    at_start,
    broken,
    healed,
    meanwhile,
    playing,
)
from simulator.shell import SimulatorError
from simulator.spark import ROOT, SERVICE, Prober, Spark
from simulator.world import REPOSITORY, World

#: An hour in place of the default of 180 s for a wedge.
HOUR = 3600 * 5 / 180


@dataclasses.dataclass
class Outcome:
    """What came of a row."""

    row: Row
    spark: str
    seconds: float
    problem: str = ""
    gone: float | None = None  # seconds without an answer, by a prober outside
    output: str = ""


#: What may come of a row that does not hold: the host, a command, or an answer is not as it should be.
TROUBLE = (SimulatorError, subprocess.SubprocessError, OSError, ValueError, LookupError, TypeError)


# -- ways to bring a fault about -----------------------------------------------------------------------------------


def reboot(spark: Spark, run: subprocess.Popen[str]) -> None:
    """A reset of the host."""
    spark.world.reboot(spark.name)


def kill_docker(spark: Spark, run: subprocess.Popen[str]) -> None:
    """Docker's daemon dies; systemd starts it again."""
    spark.sh("systemctl kill --signal=KILL docker.service")


def kill_job(spark: Spark, run: subprocess.Popen[str]) -> None:
    """The job on the host dies."""
    spark.sh("systemctl kill --signal=KILL sparkfleet-switch.service")


def kill_controller(spark: Spark, run: subprocess.Popen[str]) -> None:
    """The controller is gone, without a word."""
    run.kill()


def interrupt_controller(spark: Spark, run: subprocess.Popen[str]) -> None:
    """Ctrl-C."""
    run.send_signal(2)


def cut_ssh(spark: Spark, run: subprocess.Popen[str]) -> None:
    """Every session of ssh ends, the one that Ansible keeps open too."""
    spark.sh("kill -9 $(pgrep -x sshd-session)")


def command(word: str) -> Callable[[Spark], None]:
    """An engine that serves fails on command."""
    return lambda spark: spark.command(word)


def crash_loop(spark: Spark) -> str:
    """The engine crashes after every start, until the guard gives up."""
    spark.command("crash")
    spark.until("the guard gives up", lambda: spark.guard()["engine"] == "given-up")
    before = spark.sh(f"docker inspect -f '{{{{.State.StartedAt}}}}' {SERVICE}")
    time.sleep(3)
    after = spark.sh(f"docker inspect -f '{{{{.State.StartedAt}}}} {{{{.State.Status}}}}' {SERVICE}")
    kept = before.strip() in after and "exited" in after
    return spark.sh(GUARD_SAYS) + ("and it stays stopped" if kept else "but it was started again")


def kill_engine(spark: Spark) -> None:
    """kill -9 of the engine's process."""
    spark.sh(f"kill -9 $(docker inspect -f '{{{{.State.Pid}}}}' {SERVICE})")


def slow_tokens(spark: Spark) -> str:
    """Tokens far below what memory allows."""
    spark.command("slow")
    return ""


def quiet_hour(spark: Spark) -> str:
    """An hour at the pace of BASE: long prefills, each longer than the wedge threshold, and nothing in between."""
    before = spark.guard()["restarts_total"]
    end = time.monotonic() + HOUR
    for seconds in itertools.cycle((7, 9)):
        body = json.dumps({"model": REPOSITORY, "prompt": f"prefill {seconds}", "max_tokens": 4}).encode()
        url = f"http://127.0.0.1:{spark.port}/v1/completions"
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 - http, loopback
            answer.read()
        if time.monotonic() > end:
            break
        time.sleep(6)
    after = spark.guard()["restarts_total"]
    return "no restart" if after == before else f"restarted: {before} → {after}"


def stopped_by_hand(spark: Spark) -> str:
    """docker stop, and time for the guard to notice."""
    spark.sh(f"docker stop -t 2 {SERVICE}")
    time.sleep(3)
    return str(spark.guard()["engine"])


def port_between(spark: Spark) -> str:
    """A foreigner takes the port of a stopped engine."""
    spark.sh(f"docker stop -t 2 {SERVICE}")
    faults.break_(spark.world, spark.name, ["port"])
    return spark.play("playbooks/start.yml")


def first_deployment(spark: Spark) -> str:
    """A host without Sparkfleet, and an engine that does not start there."""
    removed = spark.play("playbooks/remove.yml", sparkfleet_confirm=True)
    return removed + spark.play(sparkfleet_environment={"SIMULATED_FAULT": "memory-refused"})


def corrupt_cache(spark: Spark) -> str:
    """A model file is truncated; the inspection finds it, fetch repairs it."""
    spark.sh("f=$(find -L /opt/hf/models--*/snapshots -name '*.safetensors' | head -n 1); truncate -s -4096 \"$f\"")
    return spark.play()


def two_controllers(spark: Spark) -> str:
    """A second run that wants something else, while the first one's switch runs."""
    first = spark.start("site.yml", sparkfleet_environment={"SIMULATED_LOAD_SECONDS": "9"})
    spark.phase("waiting")
    second = spark.play(sparkfleet_vllm_max_num_seqs=7)
    return f"{second}\n--- the first one:\n{first.communicate(timeout=300)[0]}"


def two_that_agree(spark: Spark) -> str:
    """A second run that wants the same."""
    wanted = {"SIMULATED_LOAD_SECONDS": "7"}
    first = spark.start("site.yml", sparkfleet_environment=wanted)
    spark.phase("waiting")
    second = spark.play(sparkfleet_environment=wanted)
    return f"{second}\n--- the first one:\n{first.communicate(timeout=300)[0]}"


BACK = "was started again and is verified"
STARTS = {
    "memory-refused": "less memory free than vLLM asks for",
    "memory-profiling": "memory freed while vLLM measures it",
    "kv-cache-too-small": "no room for one sequence",
    "out-of-memory": "CUDA out of memory while loading",
    "triton-sm121a": "ptxas does not know sm_121a",
    "fp8-cutlass": "an FP8 kernel of CUTLASS fails",
    "kernel-image-missing": "no code for the GPU in the image",
    "driver-too-old": "the driver is older than the image's CUDA",
    "gpu-invisible": "the container sees no GPU",
    "disk-full": "the disk is full when the engine starts",
    "download-incomplete": "a file of weights is cut",
    "model-not-in-cache": "files are missing, and the engine is offline",
    "context-too-long": "max_model_len beyond the model's context",
    "model-unsupported": "an architecture that this vLLM does not know",
    "engine-killed": "the engine is killed (137) while it loads",
    "start-timeout": "the engine never gets ready",
}
ANSWERS = {
    "answer-wrong": ("answer-wrong", "the engine answers Rome"),
    "answer-degenerate": ("answer-degenerate", "one token over and over"),
    "answer-empty": ("answer-degenerate", "the answer is empty"),
    "stream-broken": ("stream-broken", "the event stream ends half way"),
    "model-not-served": ("model-not-served", "another model is served"),
    "request-refused": ("request-refused", "requests get HTTP 500"),
}


#: What a brief run brings about: of rows that go the same way one, and those that protect the most.
BRIEF = (
    *("host rebooted: the new engine is asked", "crash loop", "wedge", "two controllers", "ssh cut"),
    *("memory-refused", "answer-wrong", "port held by a container", "lock.json cut", "guard-state.json damaged"),
    *("image not fetched", "compose.yml broken", "guard besieged", "weights changed", "one host, two names"),
    *("cache not mounted", "no internet", "container removed", "memory taken", "GPU lost"),
)


def brief(row: Row) -> bool:
    """Whether a row is part of a brief run."""
    return row.name in BRIEF


def rows() -> list[Row]:
    """The matrix; long rows first, so that Sparks end at about the same time."""
    found = [
        Row(
            "long prefills",
            "engine",
            "an hour at the pace of this table; no token for longer than a wedge takes",
            quiet_hour,
            ("no restart",),
            BEFORE,
        ),
        *(
            Row(
                f"host rebooted: {name}",
                "host",
                f"reset while {name}",
                act,
                ("connection lost", "reconnected after", BACK),
                SERVES,
                diagnosis,
            )
            for name, act, diagnosis in (
                ("the old engine stops", meanwhile(("stopping",), reboot, command("slow-stop")), "switch-interrupted"),
                ("the new engine starts", meanwhile(("starting", "waiting"), reboot), "switch-interrupted"),
                ("the new engine loads", meanwhile(("waiting",), reboot), "switch-interrupted"),
                (
                    "the new engine is asked",
                    meanwhile(("verifying",), reboot, SIMULATED_FAULT="slow"),
                    "switch-interrupted",
                ),
                (
                    "the old engine is brought back",
                    meanwhile(("restore-waiting",), reboot, command("slow-load"), SIMULATED_FAULT="out-of-memory"),
                    "out-of-memory",
                ),
            )
        ),
        Row(
            "Docker killed",
            "Docker",
            "dockerd killed while an engine loads",
            meanwhile(("waiting",), kill_docker),
            ("it is the current release now",),
            SERVES_NEW,
        ),
        Row(
            "crash loop",
            "engine",
            "crashes after every start",
            crash_loop,
            ("giving up: 3 restarts in 600 s", "and it stays stopped"),
            STOPPED,
            "guard-gave-up",
        ),
        Row(
            "wedge",
            "engine",
            "/health 200, no token comes",
            healed(command("engine-wedged once")),
            ("wedge: no token",),
            SERVES,
            "engine-wedged",
        ),
        Row(
            "job killed",
            "host",
            "SIGKILL of the switch's process",
            meanwhile(("waiting",), kill_job),
            (BACK, "[switch-interrupted]"),
            SERVES,
            "switch-interrupted",
        ),
        Row(
            "two controllers",
            "controllers",
            "another run wants something else",
            two_controllers,
            ("[switch-running-other]", "it is the current release now"),
            SERVES_NEW,
        ),
        Row("two that agree", "controllers", "another run wants the same", two_that_agree, ("joined: ",), SERVES_NEW),
        Row(
            "controller killed",
            "controllers",
            "SIGKILL of ansible-playbook in a switch",
            meanwhile(("waiting",), kill_controller),
            ("stopping release",),
            SERVES_NEW,
        ),
        Row(
            "Ctrl-C",
            "controllers",
            "SIGINT of ansible-playbook in a switch",
            meanwhile(("waiting",), interrupt_controller),
            ("User interrupted execution",),
            SERVES_NEW,
        ),
        Row(
            "ssh cut",
            "SSH",
            "every ssh session ended in a switch",
            meanwhile(("waiting",), cut_ssh),
            ("connection lost", "reconnected after", "it is the current release now"),
            SERVES_NEW,
        ),
        Row(
            "first deployment",
            "engine",
            "the first release of a host does not start",
            first_deployment,
            ("There was no release before it: its container was removed", "[memory-refused]"),
            CLEAN,
            "memory-refused",
        ),
        Row(
            "crash",
            "engine",
            "EngineDeadError, once",
            healed(command("crash once")),
            ("crash: exit code",),
            SERVES,
            "engine-crashed",
        ),
        Row(
            "engine killed",
            "engine",
            "kill -9 of the engine that serves",
            healed(kill_engine),
            ("crash: exit code",),
            SERVES,
            "engine-crashed",
        ),
        Row(
            "port taken",
            "port",
            "a foreigner listens when the engine is started",
            port_between,
            ("[port-taken]", "Nothing was stopped"),
            STOPPED,
            "port-taken",
        ),
        *(
            Row(name, "engine", what, at_start(name), (f"[{name}]", BACK), SERVES, name)
            for name, what in STARTS.items()
        ),
        *(
            Row(name, "engine", what, at_start(name), (f"[{failure}]", BACK), SERVES, failure)
            for name, (failure, what) in ANSWERS.items()
        ),
        Row(
            "argument-unknown",
            "engine",
            "an argument that this vLLM does not have",
            playing("site.yml", sparkfleet_vllm_no_such_thing=1),
            ("[argument-unknown]", BACK),
            SERVES,
            "argument-unknown",
        ),
        Row(
            "capability-warning",
            "engine",
            "warning of capability 12.1",
            at_start("capability-warning"),
            ("it is the current release now",),
            SERVES_NEW,
            "capability-warning",
        ),
        Row(
            "slow tokens",
            "engine",
            "2.5 tokens a second",
            slow_tokens,
            (),
            BEFORE,
            "low-throughput",
        ),
        Row(
            "stopped by hand",
            "host",
            "docker stop by hand",
            stopped_by_hand,
            ("stopped",),
            STOPPED,
            "engine-stopped",
        ),
        Row("corrupt file", "Hub", "a file of the cached model is cut", corrupt_cache, ("fetch: download",), SERVES),
        Row(
            "upgrade",
            "registry",
            "none: a good image",
            playing("playbooks/upgrade.yml", sparkfleet_image=NEXT),
            ("it is the current release now",),
            SERVES_NEW,
        ),
        Row(
            "image unknown",
            "registry",
            "a tag that does not exist",
            playing("playbooks/upgrade.yml", sparkfleet_image=NOWHERE, sparkfleet_require_gb10=False),
            ("[image-unknown]",),
            BEFORE,
        ),
        Row(
            "image of another processor",
            "registry",
            "an image for another processor",
            playing("playbooks/upgrade.yml", sparkfleet_image=FOREIGN),
            ("[image-platform]",),
            BEFORE,
        ),
        Row(
            "registry unreachable",
            "registry",
            "nothing listens at nvcr.io",
            broken("registry", playbook="playbooks/upgrade.yml", sparkfleet_image="nvcr.io/nvidia/vllm:25.12-py3"),
            ("[registry-unreachable]",),
            BEFORE,
        ),
        Row(
            "Hub unreachable",
            "Hub",
            "nothing listens at huggingface.co",
            broken("hub", playbook="playbooks/switch.yml", sparkfleet_model="qwen3-8b-fp8"),
            ("[hub-unreachable]",),
            BEFORE,
        ),
        Row(
            "no access to the model",
            "Hub",
            "the Hub does not know the model",
            playing("playbooks/switch.yml", sparkfleet_model="qwen3-8b-fp8"),
            ("[hub-",),
            BEFORE,
        ),
        Row(
            "memory taken",
            "memory",
            "another process holds 85 GiB",
            broken("memory", sparkfleet_vllm_max_num_seqs=9, sparkfleet_vllm_gpu_memory_utilization=0.95),
            ("[memory-short]",),
            BEFORE,
        ),
        Row("clock wrong", "host", "the clock is three days behind", broken("clock"), ("[clock-wrong]",), BEFORE),
        Row(
            "driver replaced", "host", "nvidia-smi reports driver 535", broken("driver"), ("[driver-too-old]",), BEFORE
        ),
        Row(
            "release that is not there",
            "host",
            "rollback to release 999",
            playing("playbooks/rollback.yml", sparkfleet_release=999),
            ("has no release 999; there are",),
            BEFORE,
        ),
    ]
    return [*found, *outside.rows()]


SECOND_TRIES = 2  # rows of a run that may need one

# -- the runner ----------------------------------------------------------------------------------------------------


def run_row(spark: Spark, row: Row) -> Outcome:
    """One row on a Spark that serves; it serves again afterwards."""
    began = time.monotonic()
    outcome = Outcome(row, spark.name, 0.0)
    release = ""
    try:
        before, release = spark.fingerprint(), spark.release()
        prober = Prober(spark)
        outcome.output = row.act(spark)
        missing = [words for words in row.sees if words not in outcome.output]
        if missing:
            raise SimulatorError(f"the operator does not see {missing}")
        check_end(spark, row, before, release)
        outcome.gone = prober.end()
        if row.diagnosis:
            named = spark.diagnose()
            if row.diagnosis not in named:
                raise SimulatorError(f"diagnose names {named or 'nothing'}, not {row.diagnosis}")
    except TROUBLE as error:
        outcome.problem = f"{type(error).__name__}: {error}" if isinstance(error, LookupError) else str(error)
    try:
        if row.undo:
            spark.sh(row.undo)
        repair(spark, release)
    except TROUBLE as error:
        outcome.problem = outcome.problem or f"not fixed: {error}"
    outcome.seconds = time.monotonic() - began
    return outcome


def check_end(spark: Spark, row: Row, before: str, release: str) -> None:
    """Raise unless the host is as the row says."""
    if row.ends == BEFORE:
        after = spark.fingerprint()
        if after != before:
            raise SimulatorError(f"the host was changed:\n{before}\n---\n{after}")
    elif row.ends == STOPPED:
        if "running" in spark.sh(f"docker inspect -f '{{{{.State.Status}}}}' {SERVICE}"):
            raise SimulatorError("the engine runs")
        return
    elif row.ends == AS_SEEN:
        return
    elif row.ends == CLEAN:
        left = spark.sh("docker ps -aq --filter label=com.docker.compose.project=sparkfleet").strip()
        if left or spark.release():
            raise SimulatorError(f"containers {left or 'none'}, release {spark.release() or 'none'} are left")
        return
    # The journal's steps have phases too; its own is the one that is indented least.
    idle = (
        '! systemctl -q is-active sparkfleet-switch && grep -q \'^  "phase": "done"\' /var/lib/sparkfleet/switch.json'
    )
    spark.until("no switch runs", lambda: bool(spark.sh(f"if {idle}; then echo yes; fi")))
    wanted = {SERVES: spark.release() == release, SERVES_NEW: spark.release() != release, BEFORE: True, ANY: True}
    if not wanted[row.ends]:
        raise SimulatorError(f"current release is {spark.release()}, it was {release}; the row says: {row.ends}")
    if row.name != "slow tokens":  # asked by diagnose
        spark.until("a right answer", spark.answers)


def repair(spark: Spark, release: str = "") -> None:
    """Back to a Spark that serves what the inventory says; `release`: the one that does."""
    spark.until("the host is there", lambda: spark.sh("docker version -f x >/dev/null; echo yes").strip() == "yes")
    faults.fix(spark.world, spark.name, ())
    # A fault's file lies in the container's own layer, and would outlive the row.
    spark.sh(
        f"layer=$(docker inspect -f '{{{{.GraphDriver.Data.UpperDir}}}}' {SERVICE} 2>/dev/null) || exit 0; "
        'rm -f "$layer/tmp/simulated-fault"'
    )
    if release and release == spark.release() and spark.guard()["engine"] == "serving" and spark.answers():
        return
    output = ""
    for _ in range(2):
        output = spark.play()
        if "failed=0" in output.rpartition("PLAY RECAP")[2] and spark.answers():
            return
    raise SimulatorError(f"site.yml does not bring it back:\n{output[-1500:]}")


def run_all(
    world: World,
    wanted: Sequence[Row],
    say: Callable[[str], None],
    note: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """All rows, shared out over the Sparks of the world. `note` gets each as it ends, one at a time. Raises
    SimulatorError where no Spark serves."""
    one = threading.Lock()
    waiting: queue.Queue[Row] = queue.Queue()
    for row in wanted:
        waiting.put(row)
    done: list[Outcome] = []

    def work(name: str) -> None:
        spark = Spark(world, name, BASE)
        try:
            repair(spark)
        except SimulatorError as error:
            say(f"{name} takes no part: {error}")
            return
        while True:
            try:
                row = waiting.get_nowait()
            except queue.Empty:
                return
            outcome = run_row(spark, row)
            with one:
                done.append(outcome)
                note(outcome)
            gone = f", {outcome.gone:.1f} s without an answer" if outcome.gone and outcome.gone > 1 else ""
            state = "FAILED" if outcome.problem else row.ends
            say(f"{len(done)}/{len(wanted)}  {name}  {row.name}: {state} ({outcome.seconds:.0f} s{gone})")
            if outcome.problem:
                say(f"    {outcome.problem}\n" + "\n".join(outcome.output.splitlines()[-25:]))

    names = list(world.state()["sparks"])
    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Times are short and all Sparks share this machine: what failed is tried once more with the machine to itself.
    again = [outcome for outcome in done if outcome.problem]
    for outcome in again if len(again) <= SECOND_TRIES else []:
        done.remove(outcome)
        say(f"{outcome.row.name}: once more, alone")
        waiting.put(outcome.row)
        work(outcome.spark)
    if waiting.qsize():
        raise SimulatorError(f"{waiting.qsize()} rows were not run: no Spark serves")
    order = {row.name: place for place, row in enumerate(wanted)}
    return sorted(done, key=lambda outcome: order[outcome.row.name])


def markdown(outcomes: Sequence[Outcome], before: str = "") -> str:
    """The matrix as a docs page. `before`: the page as it is, from which rows are kept that were not run, or did
    not hold, this time."""
    lines = [
        "# Fault matrix",
        "",
        "Made by `python -m simulator.matrix --docs docs/fault-matrix.md` from a run; `molecule test -s faults`",
        "runs it. Each fault hits a simulated Spark that serves. Afterwards it is asked, from outside, the question",
        "that it must answer, or compared with what it was: containers with their starts, releases, settings.",
        "Rows marked “new” are from a second round, about outside influences: people, neighbours, disks and clocks.",
        "“Without an answer” was measured by an outside prober, with an engine that loads in a second.",
        "",
        "| fault | where | action | the operator sees | final state | `diagnose` names | without an answer |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    known = {line.split(" | ")[0].removeprefix("| "): line for line in before.splitlines() if line.startswith("| ")}
    for outcome in outcomes:
        row = outcome.row
        if outcome.problem:
            continue
        sees = " / ".join(dict.fromkeys(quote(outcome.output, words) for words in row.sees)) or "-"
        gone = f"{outcome.gone:.1f} s" if outcome.gone and outcome.gone > 1 else "-"
        diagnosis = f"`{row.diagnosis}`" if row.diagnosis else "-"
        name = f"{row.name} (new)" if row.new else row.name
        known[name] = f"| {name} | {row.where} | {row.what} | {sees} | {row.ends} | {diagnosis} | {gone} |"
    names = [f"{row.name} (new)" if row.new else row.name for row in rows()]
    lines += [known[name] for name in names if name in known]
    return "\n".join(lines) + "\n"


#: A host's line of PLAY RECAP: that a run ended well, and nothing of what it found.
_RECAP = re.compile(r": ok=\d+ +changed=\d+ ")
#: What a run says that it has to do on a host, a stage a line.
_STAGE = re.compile(r"^spark-\d +(prepare|fetch|deploy): ")


def quote(output: str, words: str) -> str:
    """The line of an output that has these words, short enough for a table. Of a run that ended well, as its recap
    says, what it found to do, or that there was nothing."""
    lines = output.splitlines()
    said = [line for line in lines if not _RECAP.search(line)]
    found = [line for line in said if words in line]
    if not found and any(words in line for line in lines):
        found = [line for line in said if _STAGE.match(line)]
        found = found or [line for line in said if line.endswith("; nothing to change")]
    line = found[0] if found else words
    has_them = words in line
    line = line.replace(f"{ROOT}/", "")
    line = re.sub(r"^(fatal: )?(\[?spark-\d\]?:? +)+(\d+ s  )?", "", line.strip()).replace("|", "/")
    if len(line) > 150:
        line = line[:110].rpartition(" ")[0] + " …" + (f" {words}" if has_them and words not in line[:110] else "")
    return f"`{line}`"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the matrix; 1 when a row does not hold."""
    parser = argparse.ArgumentParser(prog="python -m simulator.matrix", description="The fault matrix.")
    parser.add_argument("--world", default="faults")
    parser.add_argument("--only", nargs="*", metavar="ROW", help="only rows whose name has one of these words")
    parser.add_argument("--without", nargs="*", default=[], metavar="ROW", help="not these rows")
    parser.add_argument("--brief", action="store_true", help="of rows that go the same way, one")
    parser.add_argument("--new", action="store_true", help="only rows of the second round")
    parser.add_argument("--docs", type=Path, help="bring the page of the docs up to date: the rows that held")
    parser.add_argument("--json", type=Path, help="write what was found")
    options = parser.parse_args(argv)
    wanted = [row for row in rows() if not options.only or any(word in row.name for word in options.only)]
    wanted = [row for row in wanted if row.name not in options.without]
    wanted = [row for row in wanted if (not options.brief or brief(row)) and (not options.new or row.new)]
    began = time.monotonic()
    world = World(options.world, lambda text: None)
    if not world.state():
        print(f"world {options.world} is not up: python -m simulator up --engine fault", file=sys.stderr)
        return 1

    def note(outcome: Outcome) -> None:
        """Bring the page up to date: a long run that is ended early leaves what it found."""
        if options.docs:
            before = options.docs.read_text(encoding="utf-8") if options.docs.exists() else ""
            options.docs.write_text(markdown([outcome], before), encoding="utf-8")

    try:
        outcomes = run_all(world, wanted, lambda text: print(text, flush=True), note)
    except SimulatorError as error:
        print(f"simulator: {error}", file=sys.stderr)
        return 1
    bad = [outcome for outcome in outcomes if outcome.problem]
    print(f"{len(outcomes)} faults, {len(bad)} failed, {time.monotonic() - began:.0f} s")
    if options.json:
        data = [{**vars(item), "row": item.row.name} for item in outcomes]
        options.json.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
