"""Every verb as it is typed: through the real ansible-runner and ansible-playbook, with a recorder in place of ssh."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pexpect
import pytest
import yaml

from sparkfleet import exit_codes
from sparkfleet.cli import main, runner
from sparkfleet.reporting import event_log
from tests.unit import ROOT
from tests.unit.collection import overlay
from tests.unit.planning import test_plan

SSH = """#!{python} -I
import json, os, sys
with open({calls!r}, "a", encoding="utf-8") as calls:
    calls.write(json.dumps(sys.argv) + "\\n")
print("nvidia@192.0.2.11: Permission denied (publickey).", file=sys.stderr)
sys.exit(255)
"""
#: What each verb needs besides its name.
WORDS = {
    "switch": ("qwen3-32b-fp8",),
    "upgrade": ("nvcr.io/nvidia/vllm:25.11-py3",),
    "bundle": ("folder",),
    "remove": ("--yes",),
    "trial": ("qwen3-32b-fp8",),
    "rotate": ("engine-key",),
    "sbom": ("folder",),
}


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(event_log, "FOLDER", tmp_path / "events")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that the ssh on PATH writes its words to, a JSON list a line."""
    path, folder = tmp_path / "calls", tmp_path / "bin"
    folder.mkdir()
    (folder / "ssh").write_text(SSH.format(python=sys.executable, calls=str(path)), encoding="utf-8")
    (folder / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return path


@pytest.fixture
def inventory(tmp_path: Path) -> Path:
    path = tmp_path / "hosts.yml"
    host = {"ansible_host": "192.0.2.11", "ansible_user": "nvidia"}
    path.write_text(yaml.safe_dump({"sparks": {"hosts": {"spark-1": host}}}), encoding="utf-8")
    return path


@pytest.mark.parametrize("verb", main.PLAYBOOKS)
def test_host_keys_are_checked(
    verb: str, calls: Path, inventory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """ansible-runner switches that off by itself; an environment that says so is not followed either."""
    monkeypatch.setenv("ANSIBLE_HOST_KEY_CHECKING", "False")
    assert main.main([verb, *WORDS.get(verb, ()), "-i", str(inventory)]) == exit_codes.UNREACHABLE, capsys.readouterr()
    given = [json.loads(line) for line in calls.read_text(encoding="utf-8").splitlines()]
    assert given
    for argv in given:
        text = " ".join(argv).lower()
        assert "stricthostkeychecking" not in text and "userknownhostsfile" not in text, text
        # A connection that another project opened without the check is not ridden.
        (socket,) = [word for word in argv if word.startswith("ControlPath=")]
        assert Path(json.loads(socket.partition("=")[2])).parent.name == "cp-sparkfleet"


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """inventory/local, for a user without sudo and with no Docker of theirs."""
    shutil.copytree(ROOT / "inventory" / "local", tmp_path / "local")
    path = tmp_path / "local" / "hosts.yml"
    text = path.read_text(encoding="utf-8")
    more = f"      ansible_become: false\n      sparkfleet_project_dir: {tmp_path}/sparkfleet\n"
    path.write_text(text.rstrip("\n") + "\n" + more, encoding="utf-8")
    return path.parent


@pytest.mark.parametrize(
    ("words", "codes"),
    [
        (("logs",), (0,)),
        (("status", "-l", "localhost"), (6,)),
        (("diagnose", "-C"), (0, 3, 6)),
        (("stop", "-C"), (0,)),
        (("deploy", "-C"), (3,)),
        (("rollout", "-C"), (3,)),
        (("rollback",), (2, 3, 6)),
    ],
    ids=lambda value: value[0] if isinstance(value[0], str) else "",
)
def test_the_spark_may_be_this_machine(
    words: tuple[str, ...], codes: tuple[int, ...], local: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`localhost` in a play of the Sparks is a Spark; what becomes of it is reported as of any other."""
    code = main.main([*words, "-i", str(local), "--json"])
    made = json.loads(capsys.readouterr().out)
    assert code in codes, made
    assert [host["name"] for host in made["hosts"]] == ["localhost"] and "error" not in made


@pytest.mark.parametrize("verb", ["restart", "status"])
def test_this_machine_is_left_alone_unless_it_is_named(
    verb: str, local: Path, calls: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where localhost is one of the Sparks, a limit to another one does not have it."""
    with (local / "hosts.yml").open("a", encoding="utf-8") as file:
        file.write("    spark-2: {ansible_host: 192.0.2.2}\n")
    assert main.main([verb, "-l", "spark-2", "-i", str(local), "--json"]) == exit_codes.UNREACHABLE
    assert [host["name"] for host in json.loads(capsys.readouterr().out)["hosts"]] == ["spark-2"]
    assert calls.exists()
    assert main.main([verb, "-l", "spark-3", "-i", str(local)]) == exit_codes.BAD_INPUT
    printed = capsys.readouterr().err
    assert printed.endswith("no host or group matches 'spark-3': did you mean spark-2 or sparks?\n")


def test_a_run_that_is_killed_leaves_no_secret(inventory: Path, tmp_path: Path) -> None:
    """Neither while it runs nor after SIGKILL is a secret in a file: sudo's password, a value of -e, HF_TOKEN."""
    secrets = {"password": "pass-4711-word", "variable": "value-4711-secret", "token": "hf_4711abcdefgh"}
    folder, going, stop = tmp_path / "bin", tmp_path / "going", tmp_path / "stop"
    folder.mkdir()
    script = f"#!/bin/sh\ntouch {going}\nwhile [ ! -e {stop} ]; do sleep 0.1; done\nexit 255\n"
    (folder / "ssh").write_text(script, encoding="utf-8")
    (folder / "ssh").chmod(0o755)
    places = {name: tmp_path / name for name in ("XDG_RUNTIME_DIR", "TMPDIR")}
    for place in places.values():
        place.mkdir()
    environment = {
        **os.environ,
        **{name: str(place) for name, place in places.items()},
        **{"PATH": f"{folder}:{os.environ['PATH']}", "HF_TOKEN": secrets["token"]},
    }
    command = [sys.executable, "-m", "sparkfleet.cli.main", "status", "-i", str(inventory), "-K"]
    child = pexpect.spawn(
        command[0], [*command[1:], "-e", f"sparkfleet_hf_token={secrets['variable']}"], env=environment, timeout=60
    )
    try:
        child.expect("BECOME password: ")
        child.sendline(secrets["password"])
        deadline = time.monotonic() + 60
        while not going.exists():
            assert time.monotonic() < deadline and child.isalive()
            time.sleep(0.1)
        assert not found(secrets, places.values())
        child.kill(signal.SIGKILL)
        child.wait()
        assert list(places["XDG_RUNTIME_DIR"].iterdir()), "this test looks in the wrong place"
        assert not found(secrets, places.values())
    finally:
        stop.touch()
        child.close(force=True)


def found(secrets: dict[str, str], folders: Iterable[Path]) -> list[str]:
    """Which secret is in which file."""
    paths = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return [
        f"{name} in {path}"
        for path in paths
        for name, secret in secrets.items()
        if secret.encode() in path.read_bytes()
    ]


@pytest.mark.parametrize("where", ["home", "named"])
def test_roles_are_those_of_the_playbooks(
    where: str, inventory: Path, calls: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever else is installed for the user: another version of the collection, or a path without ours."""
    if where == "home":
        other = tmp_path / ".ansible" / "collections" / "ansible_collections" / "sparkfleet" / "dgx"
        (other / "roles" / "sparkfleet" / "tasks").mkdir(parents=True)
        (other / "roles" / "sparkfleet" / "tasks" / "plan.yml").write_text("- ansible.builtin.no_such_module:\n")
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.delenv("ANSIBLE_COLLECTIONS_PATH", raising=False)
    else:
        monkeypatch.setenv("ANSIBLE_COLLECTIONS_PATH", str(tmp_path / "elsewhere"))
    assert main.main(("preflight", "-i", str(inventory))) == exit_codes.UNREACHABLE
    assert calls.read_text(encoding="utf-8")


def test_without_an_activated_environment(inventory: Path, calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ansible-playbook is found next to the Python that runs sparkfleet."""
    monkeypatch.setenv("PATH", f"{calls.parent / 'bin'}:/usr/bin:/bin")
    assert main.main(["stop", "-i", str(inventory), "--json"]) == exit_codes.UNREACHABLE
    assert calls.exists()


MODULE = """#!/usr/bin/python
# WANT_JSON
import json, pathlib
pathlib.Path({path!r}).open("a").write({name!r} + "\\n")
print(json.dumps({answer!r}))
"""
SERVED: dict[str, Any] = {
    "changed": False,
    **{"engine": "serving", "healthy": True, "engines": [], "gpu": {"temperature": 41.0}},
    **{"containers": [{"service": "vllm-m", "state": "running"}], "log": []},
    "releases": {
        **{"current": 2, "previous": 1, "numbers": [1, 2], "outcomes": {}, "switch": None, "switch_active": False},
        "locks": {"2": {"model": "m", "profile": "throughput", "image": "i:1@sha256:0123456789abcdef"}},
    },
}


FIGURES: dict[str, Any] = {
    **{"at": 1_700_000_000, "seconds": 3600, "step": 900, "times": [1_699_996_400 + 900 * n for n in range(5)]},
    **{"now": {}, "totals": {}, "fired": [], "firing": [], "missing": []},
    "window": {"model_tokens": [[{"model": "o/m"}, [1.0, 2.0, 3.0, 4.0, 5.0]]]},
}


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Two Sparks that serve, by what stands in for the modules; the inventory, and a file with the modules that ran."""
    ran = tmp_path / "ran"
    state = test_plan.serving()
    state["os"] |= {"boot_id": "", "machine_id": ""}
    state["guard"]["settings"] = None  # something to prepare, so that more than one stage would run
    answers = {
        "spark_state": {"changed": False, "state": state},
        "spark_status": SERVED,
        "prometheus_figures": {"changed": False, "figures": FIGURES},
        "release_switch": {"changed": True},
        "stop_services": {"changed": True},
    }
    modules = {
        f"modules/{name}.py": MODULE.format(path=str(ran), name=name, answer=answer) for name, answer in answers.items()
    }
    monkeypatch.setenv("ANSIBLE_COLLECTIONS_PATH", str(overlay(tmp_path, modules)))
    local = {"ansible_connection": "local", "ansible_become": False, "ansible_python_interpreter": sys.executable}
    hosts = {f"spark-{number}": {"sparkfleet_operator": "nvidia", **local} for number in (1, 2)}
    inventory = tmp_path / "fleet.yml"
    inventory.write_text(yaml.safe_dump({"sparks": {"hosts": hosts}}), encoding="utf-8")
    return inventory, ran


@pytest.mark.parametrize("verb", ["stop", "restart", "rollback", "deploy", "switch", "upgrade"])
def test_several_sparks_are_not_stopped_at_once(
    verb: str, fleet: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    inventory, ran = fleet
    change = ("-e", "sparkfleet_vllm_max_num_seqs=7") if verb == "deploy" else ()
    words = (verb, *WORDS.get(verb, ()), "-i", str(inventory), "--json", *change)
    assert main.main(words) == exit_codes.REFUSED
    made = json.loads(capsys.readouterr().out)
    assert {host["name"]: host["result"] for host in made["hosts"]} == {"spark-1": "refused", "spark-2": "refused"}
    assert made["hosts"][0]["failure"] == "all-at-once" and "spark-1, spark-2" in made["hosts"][0]["message"]
    inspected = {"spark_status", "spark_state"}
    assert set(ran.read_text(encoding="utf-8").split()) <= inspected
    if verb in ("stop", "restart"):
        assert main.main([*words, "-l", "!spark-1"]) == 0
        assert main.main([*words, "--yes"]) == 0
        names = [name for name in ran.read_text(encoding="utf-8").split() if name not in inspected]
        assert len(names) == 3


def test_a_report(fleet: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inventory, ran = fleet
    file = tmp_path / "fleet.html"
    words = ("report", "-i", str(inventory), "-o", str(file), "-e", "sparkfleet_monitoring=true", "--hours", "1")
    assert main.main(words) == 0, capsys.readouterr()
    assert f"{file}: 2 Sparks: 2 serving" in capsys.readouterr().out
    text = file.read_text(encoding="utf-8")
    assert "Last 1 hour" in text and "o/m" in text and "spark-1" in text and "spark-2" in text
    assert ran.read_text(encoding="utf-8").split().count("prometheus_figures") == 1
    # An unreachable monitor does not make a Spark count as unreachable.
    data = yaml.safe_load(inventory.read_text(encoding="utf-8"))
    data["monitors"] = {"hosts": {"watch": {"ansible_host": "127.0.0.1", "ansible_port": 1}}}
    inventory.write_text(yaml.safe_dump(data), encoding="utf-8")
    assert main.main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"verb": "report", "exit_code": 0, "file": str(file)}
    assert "There is no Prometheus that answers" in file.read_text(encoding="utf-8")
    assert main.main([*words[:3], "-o", str(tmp_path / "no" / "fleet.html")]) == exit_codes.BAD_INPUT
    assert f"--output {tmp_path}/no/fleet.html: No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [("audit", "--sarif", "no/x"), ("report", "-o", "no/x"), ("sbom", "file/x"), ("bundle", "file")]
)
def test_a_result_that_has_no_place_is_not_asked_for(
    words: tuple[str, ...], inventory: Path, calls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main.main([*words, "-i", str(inventory)]) == exit_codes.BAD_INPUT
    said = capsys.readouterr()
    assert said.out == "" and ": choose another path" in said.err and said.err.count("\n") == 1
    assert not calls.exists()


def test_a_page_that_cannot_be_written_in_the_end_hides_no_finding(
    inventory: Path, calls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder was there when it began, and the disk is full by now."""
    words = ("-i", str(inventory), "--json")
    assert main.main(["audit", "--sarif", "/dev/full", *words]) == exit_codes.UNREACHABLE
    said = capsys.readouterr()
    assert json.loads(said.out)["exit_code"] == exit_codes.UNREACHABLE
    assert "/dev/full cannot be written: No space left on device" in said.err


@pytest.mark.parametrize(
    ("option", "value"), [("--hours", "0"), ("--hours", "day"), ("--price", "-1"), ("--price", "nan")]
)
def test_a_report_of_no_such_time_or_price(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(["report", option, value])
    assert ended.value.code == exit_codes.BAD_INPUT and value in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["preflight", "deploy", "drift", "status"])
def test_without_root(verb: str, fleet: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """What changes a Spark is refused with what to do; what reads only goes on."""
    inventory, ran = fleet
    module = inventory.parent / "ansible_collections/sparkfleet/dgx/plugins/modules/spark_state.py"
    text = module.read_text(encoding="utf-8").replace("'os': {", "'user': {'id': 1000, 'name': 'nvidia'}, 'os': {", 1)
    module.write_text(text, encoding="utf-8")
    main.main((verb, "-i", str(inventory), "-l", "spark-1", "--json"))
    printed = capsys.readouterr().out
    assert "spark_state" in ran.read_text(encoding="utf-8")
    assert ("needs root, runs as nvidia. Set become: true" in printed) == (verb in ("preflight", "deploy")), printed
    assert ('"not-root"' in printed) == (verb in ("preflight", "deploy")), printed


@pytest.fixture
def rack(tmp_path: Path) -> Path:
    """Three Sparks, the second in a group of its own."""
    path = tmp_path / "hosts.yml"
    hosts = {f"spark-{number}": {"ansible_host": f"192.0.2.{number}"} for number in (1, 2, 3)}
    group = {"hosts": hosts, "children": {"rack1": {"hosts": {"spark-2": {}}}}}
    path.write_text(yaml.safe_dump({"sparks": group}), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("words", "numbers"),
    [(("logs", "sparks:!spark-3"), {"1", "2"}), (("rollout", "-l", "sparks:&rack1"), {"2"})],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_only_hosts_of_the_limit_are_contacted(
    words: tuple[str, ...], numbers: set[str], calls: Path, rack: Path
) -> None:
    assert main.main([*words, "-i", str(rack)]) == exit_codes.UNREACHABLE
    given = [json.loads(line) for line in calls.read_text(encoding="utf-8").splitlines()]
    contacted = {word for argv in given for word in argv if word.startswith("192.")}
    assert contacted == {f"192.0.2.{number}" for number in numbers}


@pytest.mark.parametrize(
    ("words", "limit"),
    [
        (("status", "-l", "!spark-3"), {"spark-1", "spark-2"}),
        (("logs", "sparks:!spark-3"), {"spark-1", "spark-2"}),
        (("rollout", "-l", "sparks:&rack1"), {"spark-2"}),
        (("stop", "-l", "&rack1"), {"spark-2"}),
        (("preflight", "-l", "spark-1:spark-2"), {"spark-1", "spark-2"}),
        (("drift", "-l", "spark-1,spark-3"), {"spark-1", "spark-3"}),
        (("drift", "-l", "spark-*,rack1"), {"spark-*", "rack1"}),
        (("stop", "-l", "sparks,!rack1"), {"spark-1", "spark-3"}),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_limits(words: tuple[str, ...], limit: set[str], rack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Ansible is given, in names."""
    given: list[str] = []

    def run(verb: str, inventory: str, arguments: list[str], collector: runner.Collector) -> int:
        given.extend(arguments)
        return 0

    monkeypatch.setattr(main, "run", run)
    main.main([*words, "-i", str(rack)])
    names = given[given.index("--limit") + 1].split(",")
    assert {*names} == limit and len(names) == len(limit)


@pytest.mark.parametrize(
    "limit", ["&", "!", "", " ", ",", "[", "sparks[x]", "~(", "!spark-33", "@/nowhere", "sparks:!sparks"]
)
def test_limits_that_are_none(limit: str, inventory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An empty one is not all hosts; one that excludes nothing is a slip."""
    assert main.main(["stop", "-l", limit, "-i", str(inventory)]) == exit_codes.BAD_INPUT
    printed = capsys.readouterr().err
    assert printed.startswith("sparkfleet: --limit ") and printed.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("stop", "-l", "spark-1,spork-2"), "'spork-2': did you mean spark-2"),
        (("stop", "-l", "spark-1,rakc1"), "'rakc1': did you mean rack1?"),
        (("rollout", "-l", "spark-1,spark-2,typo*"), "'typo*'"),
        (("deploy", "-l", "sparks:!rack2"), "'rack2': did you mean rack1"),
        (("deploy", "-l", "sparks:&rack2"), "'rack2': did you mean rack1"),
        (("logs", "spark-1,nothing"), "'nothing'"),
        (("tune", "llama31-8b-fp8", "-l", "spark-1,nothing"), "'nothing'"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_part_of_a_limit_that_matches_nothing_is_refused(
    words: tuple[str, ...], part: str, rack: Path, calls: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ansible warns, and leaves it out: the run would be of other hosts than were meant."""
    assert main.main([*words, "-i", str(rack)]) == exit_codes.BAD_INPUT
    printed = capsys.readouterr().err
    assert f"no host or group matches {part}" in printed and printed.count("\n") == 1
    assert not calls.exists()


NOISY = """#!/bin/sh
# sshd, for a user whose shell prints something before it runs a command
for command; do :; done
printf '{}'
exec sh -c "$command"
"""


@pytest.mark.parametrize(
    ("problem", "words"),
    [("noise", "keep it for interactive shells"), ("sudo", "run again with -K (--ask-become-pass)")],
)
def test_what_ansible_says_of_itself_has_its_remedy(
    problem: str, words: str, inventory: Path, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the verbs, and for ansible-playbook alone: once, and what to do."""
    folder = calls.parent / "bin"
    if problem == "noise":
        (folder / "ssh").write_text(NOISY, encoding="utf-8")
    else:
        (folder / "ssh").write_text('#!/bin/sh\nfor command; do :; done\nexec sh -c "$command"\n', encoding="utf-8")
        (folder / "sudo").write_text("#!/bin/sh\necho 'sudo: a password is required' >&2\nexit 1\n", encoding="utf-8")
        (folder / "sudo").chmod(0o755)
    become = "true" if problem == "sudo" else "false"
    extra = ("-e", f"ansible_become={become}", "-e", f"ansible_python_interpreter={sys.executable}")
    for playbook in ("site.yml", "playbooks/stop.yml"):
        command = [Path(sys.executable).with_name("ansible-playbook"), ROOT / playbook, "-i", inventory, *extra]
        environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, check=False, stdin=subprocess.DEVNULL
        )
        printed = done.stdout + done.stderr
        assert done.returncode == 2 and printed.count(words) == 1, printed
        assert "Origin:" not in printed and "[ERROR]" not in printed
    collected = runner.Collector(lambda host, line: None)
    runner.run("stop", str(inventory), extra, collected)
    assert words in collected.hosts["spark-1"].message


def test_programs_in_sbin_are_found() -> None:
    """A login that leaves them out of PATH does not make Docker look uninstalled."""
    script = "import sparkfleet_host, shutil; print(shutil.which('ldconfig'))"
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT / "plugins" / "module_utils")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip().endswith("sbin/ldconfig")
