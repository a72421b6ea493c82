"""Whatever is typed: an exit code of those that are documented, bad input is 2 with one message, and no traceback."""

from __future__ import annotations

import contextlib
import io
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from sparkfleet import SparkfleetError
from sparkfleet.cli import main
from sparkfleet.onboarding import discovery, hub_card
from sparkfleet.onboarding.ssh import Inspection
from sparkfleet.planning import catalog
from sparkfleet.reporting import event_log
from tests.unit.fakes.clock import set_time

CODES = {0, 2, 3, 4, 5, 6, 7, 130}
ODD = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["", " ", "'", "\0", "\udcff", "-", "--", "-1", "0", "1e999", "nan", "inf", "9" * 5000, "/", "~", "~x/y"]
    ),
    st.sampled_from(
        ["{", "[", "{a: 1}", "a={", "a=!!python/object:os.system x", "a=2020-99-99", "a=.inf", "@/nowhere"]
    ),
    st.sampled_from(["!spark-1", "&", "sparks:&x", "*", "~(", "spark-1", "localhost", "a,b", "[0:]"]),
)
FLAGS = st.sampled_from(
    [
        *("-i", "-l", "-e", "-C", "-K", "--json", "--yes", "--profile", "--set", "--total-gib", "--available-gib"),
        *("--reserve-gib", "--engine", "--source", "--dry", "--watch", "-w", "-n", "--models", "--images", "--token"),
        *("--from", "--repo", "--image", "--output", "--refresh"),
        *("--user", "--private-key", "--ssh-common-args", "--model", "--gateway", "--force", "--no-discover", "--help"),
        "--version",
    ]
)
VERBS = st.sampled_from([*main.PLAYBOOKS, "plan", "models", "compose", "init", "card"])
SOUND = st.sampled_from(["llama31-8b-fp8", "qwen3-32b-fp8", "throughput", "max_model_len=4096", "64", "192.0.2.1"])
ARGV = st.tuples(VERBS, st.lists(st.one_of(FLAGS, ODD, SOUND), max_size=6)).map(lambda pair: [pair[0], *pair[1]])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with an inventory, where nothing of the outside is reached: playbooks are not run, hosts not found."""
    folder = tmp_path_factory.mktemp("anywhere")
    hosts = {"spark-1": {"ansible_connection": "local"}, "spark-2": {"ansible_host": "192.0.2.2"}}
    (folder / "hosts.yml").write_text(yaml.safe_dump({"sparks": {"hosts": hosts}}), encoding="utf-8")

    def ran(**given: Any) -> SimpleNamespace:
        shlex.split(given["cmdline"] or "")
        given["event_handler"]({"event": "runner_on_ok", "event_data": {"host": "spark-1", "res": {}}})
        return SimpleNamespace(status="successful", rc=0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ansible_runner.interface.run", ran)
        patch.setattr(event_log, "FOLDER", folder / "events")
        patch.setattr(main, "default_inventory", lambda: str(folder / "hosts.yml"))
        set_time(patch, main, sleep=stop)
        patch.setattr(discovery, "browse", lambda *_: [])
        patch.setattr(hub_card, "ask", no_hub)
        patch.setattr(catalog, "STATE", folder / "events")
        patch.setattr("sparkfleet.onboarding.ssh.inspect", lambda place: Inspection(None, "unreachable", "no route"))
        patch.setattr("sparkfleet.paths.INVENTORY", folder / "inventory" / "mine")
        patch.setattr(sys, "stdin", io.StringIO(""))
        patch.chdir(folder)
        yield folder


def no_hub(repo: str, *_: Any) -> None:
    raise SparkfleetError(f"no card for {repo}: the Hub cannot be reached")


def stop(seconds: float) -> None:
    raise KeyboardInterrupt


def run(argv: list[str]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main.main(argv)
        except SystemExit as end:  # argparse's own
            code = int(end.code or 0)
    return code, out.getvalue(), err.getvalue()


@given(argv=ARGV)
@example(argv=["plan", "llama31-8b-fp8", "--set", "a={"])
@example(argv=["init", "--ssh-common-args", "'", "192.0.2.1"])
@example(argv=["rollback", "9" * 5000])
@example(argv=["logs", "-n", "-5"])
@example(argv=["bundle", "\0"])
@example(argv=["status", "-i", "\0"])
@example(argv=["plan", "~nosuchuser/x.yml"])
@example(argv=["remove"])
@example(argv=["deploy", "-i", "~nosuchuser/x"])
@example(argv=["rollout", "--dry", "-l", "&"])
@example(argv=["rollout", "--dry", "-e", "{"])
@example(argv=["rollout", "--dry", "-e", "@/nowhere"])
@example(argv=["status", "--watch", "1e999"])
def test_any_command(argv: list[str], place: Path) -> None:
    before = {path.name for path in place.iterdir()}
    code, out, err = run(argv)
    assert code in CODES, (code, out, err)
    assert "Traceback" not in out + err and "\x1b" not in out.replace("\x1b[0m", "")
    if code == 2 and "--json" not in argv:
        assert err.strip() or "error" in out
    if code == 2:
        assert {path.name for path in place.iterdir()} <= before | {"events"}


@pytest.mark.parametrize(
    "words",
    [
        ["logs", "-n", "-5"],
        ["logs", "-n", "0"],
        ["logs", "-n", "9" * 30],
        ["rollback", "0"],
        ["rollback", "-1"],
        ["bundle", "\0"],
        ["bundle", ""],
        ["status", "-i", ""],
        ["status", "-i", "\0"],
        ["deploy", "-e", "\0"],
        ["switch"],
        ["switch", ""],
        ["upgrade", ""],
    ],
    ids=repr,
)
def test_bad_input_is_2(words: list[str], place: Path) -> None:
    code, out, err = run(words)
    assert code == 2 and err and "Traceback" not in err, (code, out, err)


NO_NUMBER = st.sampled_from(["", "x", "1e999", "nan", "-5", "0x10", "1,5", "9" * 40])
NO_YAML = st.sampled_from(["{", "[", "a: b: c", "*a", "&a [*a]", "!!python/object:os.system x", ".nan", "9" * 400])
NO_WORD = st.sampled_from(["", "\0", "a\0b", "\x1b[31m\0"])
UNKNOWN = st.text("abcxyz-_/.", min_size=1, max_size=12).map(lambda text: "zz" + text)
ON_PAPER = st.sampled_from(["plan", "compose"])
#: A command line that is wrong, whatever else is in it.
WRONG = st.one_of(
    st.tuples(VERBS, UNKNOWN.map("--".__add__)),
    st.tuples(UNKNOWN),
    st.tuples(ON_PAPER, UNKNOWN),
    st.tuples(ON_PAPER, st.just("qwen3-8b-fp8"), st.just("--profile"), UNKNOWN),
    st.tuples(ON_PAPER, st.just("qwen3-8b-fp8"), st.just("--set"), UNKNOWN),
    st.tuples(ON_PAPER, st.just("qwen3-8b-fp8"), st.just("--set"), NO_YAML.map("max_num_seqs=".__add__)),
    st.tuples(
        st.just("plan"),
        st.just("qwen3-8b-fp8"),
        st.sampled_from(["--total-gib", "--available-gib", "--reserve-gib", "--engine"]),
        NO_NUMBER,
    ),
    st.tuples(st.just("compose"), st.just("qwen3-8b-fp8"), st.just("--source"), UNKNOWN),
    st.tuples(st.just("logs"), st.just("-n"), NO_NUMBER),
    st.tuples(st.just("status"), st.just("--watch"), NO_NUMBER),
    st.tuples(st.just("rollback"), NO_NUMBER),
    st.tuples(st.sampled_from(["upgrade", "switch", "bundle"]), NO_WORD),
    st.tuples(st.sampled_from(sorted(main.PLAYBOOKS)), st.sampled_from(["-i", "-e"]), NO_WORD),
    st.tuples(st.just("rollout"), st.just("--dry"), st.just("-l"), st.sampled_from(["zz9", "!", "&", "sparks:&zz9"])),
    st.tuples(
        st.just("rollout"), st.just("--dry"), st.just("-e"), st.sampled_from(["{", "@/nowhere", "a", "sparkfleet_x=1"])
    ),
).map(list)


@given(argv=WRONG)
def test_a_command_that_is_wrong_is_2(argv: list[str], place: Path) -> None:
    before = {path.name for path in place.iterdir()}
    code, out, err = run(argv)
    assert code == 2 and err.strip() and len(err) < 5000, (argv, code, out, err)
    assert "Traceback" not in out + err and "\x1b" not in out + err
    assert {path.name for path in place.iterdir()} <= before | {"events"}
