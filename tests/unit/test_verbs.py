"""Every verb as it is typed: through the real ansible-runner and ansible-playbook, with a recorder in place of ssh."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pexpect
import pytest
import yaml

from sparkfleet import cli, eventlog, runner

ROOT = Path(__file__).resolve().parents[2]
SSH = """#!{python} -I
import json, os, sys
with open({calls!r}, "a", encoding="utf-8") as calls:
    calls.write(json.dumps(sys.argv) + "\\n")
print("nvidia@192.0.2.11: Permission denied (publickey).", file=sys.stderr)
sys.exit(255)
"""
#: What each verb needs beside its name.
WORDS = {
    "switch": ("qwen3-32b-fp8",),
    "upgrade": ("nvcr.io/nvidia/vllm:25.11-py3",),
    "bundle": ("folder",),
    "remove": ("--yes",),
}


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(eventlog, "FOLDER", tmp_path / "events")
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


@pytest.mark.parametrize("verb", cli.PLAYBOOKS)
def test_host_keys_are_checked(
    verb: str, calls: Path, inventory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """ansible-runner switches that off by itself; an environment that says so is not followed either."""
    monkeypatch.setenv("ANSIBLE_HOST_KEY_CHECKING", "False")
    assert cli.main([verb, *WORDS.get(verb, ()), "-i", str(inventory)]) == runner.UNREACHABLE, capsys.readouterr()
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
    code = cli.main([*words, "-i", str(local), "--json"])
    made = json.loads(capsys.readouterr().out)
    assert code in codes, made
    assert [host["name"] for host in made["hosts"]] == ["localhost"] and "error" not in made


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
    command = [sys.executable, "-m", "sparkfleet.cli", "status", "-i", str(inventory), "-K"]
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


def test_without_an_activated_environment(inventory: Path, calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ansible-playbook is found beside the Python that runs sparkfleet."""
    monkeypatch.setenv("PATH", f"{calls.parent / 'bin'}:/usr/bin:/bin")
    assert cli.main(["stop", "-i", str(inventory), "--json"]) == runner.UNREACHABLE
    assert calls.exists()
