"""`sparkfleet init`: who is found, what is checked, asked and written, and that a second run does nothing."""

from __future__ import annotations

import builtins
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest
import yaml
import zeroconf
from hypothesis import example, given
from hypothesis import strategies as st
from sparkfleet_host.bounded import BoundsError

from sparkfleet import SparkfleetError
from sparkfleet.cli import main
from sparkfleet.onboarding import discovery, enrol, init, inventory_file, ssh
from sparkfleet.onboarding.inventory_file import Entry
from sparkfleet.onboarding.ssh import Place
from tests.unit import ROOT

KEY = "AAAAC3NzaC1lZDI1NTE5AAAAIPmCkC5OJufOYDhmaBOZ7crxxgPfpqIp4L0fTXoSVHni"
FINGERPRINT = "SHA256:+KusbMvXWiet1cCNfMPfWvhrlJ2K2KRHDnlXyJffQC4"
KIB = 125_513_990  # 119.7 GiB


class Network:
    """A network of hosts behind a fake ssh."""

    def __init__(self, home: Path) -> None:
        self.home, self.world = home, {}
        self.known = home / "known_hosts"
        self.save()

    def host(self, place: str, name: str, known: bool = True, **other: Any) -> None:
        host = {"hostname": name, "machine": name, "gpu": "NVIDIA GB10", "total": KIB, "available": KIB - 4_000_000}
        host |= {"python": "3.12", "sudo": "yes", "key": KEY, "login": True, "passwords": True}
        address, _, port = place.partition(":")
        self.world[f"{address}:{port or 22}"] = {**host, **other}
        if known:
            with self.known.open("a", encoding="utf-8") as file:
                file.write(f"{f'[{address}]:{port}' if port else address} ssh-ed25519 {KEY}\n")
        self.save()

    def save(self) -> None:
        (self.home / "world.json").write_text(json.dumps(self.world), encoding="utf-8")

    def calls(self, program: str = "") -> list[str]:
        path = self.home / "calls"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [line for line in lines if line.startswith(program)]


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Network:
    home = tmp_path / "ssh"
    home.mkdir()
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("ssh", "ssh-keyscan", "ssh-copy-id"):
        script = programs / name
        body = (ROOT / "tests" / "unit" / "fakes" / "fake_ssh.py").read_text(encoding="utf-8").partition("\n")[2]
        script.write_text(f"#!{sys.executable} -I\n{body}", encoding="utf-8")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SSH", str(home))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(discovery, "browse", lambda *_: [])
    return Network(home)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def made(*words: str) -> tuple[int, str, str]:
        code = main.main(["init", *words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return made


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def person(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Simulates a user at a terminal, with the beginning of each question and the answers to it, in order. A question
    besides these fails the test, and so does an answer that was not asked for."""
    left: list[tuple[str, str]] = []

    def answer(prompt: str) -> str:
        assert left and prompt.strip().startswith(left[0][0]), f"asked {prompt!r}, expected {left[:1]}"
        return left.pop(0)[1]

    def sits(*pairs: tuple[str, str]) -> None:
        left.extend(pairs)
        monkeypatch.setattr(builtins, "input", answer)
        monkeypatch.setattr(init, "Prompter", lambda there: enrol.Prompter(True))

    yield sits
    assert not left


Sits = Callable[..., None]
FIRST = """\
---
# Made by `sparkfleet init`, yours to edit (docs/inventory.md); `sparkfleet init` adds Sparks to it.
sparks:
  hosts:
    spark-1a2b:
      ansible_host: 192.0.2.11
    spark-3c4d:
      ansible_host: spark-3c4d.local
      ansible_port: 2222
      ansible_user: alice
  vars:
    ansible_user: nvidia
# One address for all Sparks (docs/gateway.md):
# gateways:
#   hosts:
#     spark-1a2b: {}
"""
SETTINGS = """\
---
# Every variable has a default; docs/inventory.md lists them all.
sparkfleet_model: llama31-8b-fp8
# A token is read from HF_TOKEN in your environment, or better from a vault:
# sparkfleet_hf_token: "{{ vault_hf_token }}"
"""


def two(net: Network) -> list[str]:
    net.host("192.0.2.11", "spark-1a2b")
    net.host("192.0.2.14", "spark-5e6f")
    net.host("spark-3c4d.local:2222", "other-name")
    return ["nvidia@192.0.2.11", "alice@spark-3c4d.local:2222", "--user", "nvidia"]


def test_a_first_run(net: Network, run: Run, tmp_path: Path) -> None:
    """Two users: the one that most have is the group's."""
    words = two(net)
    code, out, _ = run("new/inv", *words, "192.0.2.14")
    assert code == 0
    text = (tmp_path / "new/inv/hosts.yml").read_text()
    assert text == FIRST.replace("  vars:", "    spark-5e6f:\n      ansible_host: 192.0.2.14\n  vars:")
    assert (tmp_path / "new/inv/group_vars/sparks.yml").read_text() == SETTINGS
    assert "sparkfleet preflight -i new/inv\n" in out and "requires a licence: accept it at https://" in out
    argv = ["ansible-inventory", "-i", "new/inv", "--host", "spark-3c4d"]
    found = json.loads(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)
    assert found["ansible_user"] == "alice" and found["sparkfleet_model"] == "llama31-8b-fp8"
    lint = ["yamllint", "--strict", "-c", str(ROOT / ".yamllint"), "new/inv"]
    assert subprocess.run(lint, capture_output=True, text=True, check=False).stdout == ""


def test_a_second_run_asks_and_writes_nothing(net: Network, run: Run, tmp_path: Path, person: Sits) -> None:
    words = two(net)
    run("inv/", *words)
    person()
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.glob("inv/**/*.yml")}
    assert len(before) == 2
    for again in ([], words, ["spark-1a2b", "--model", "llama31-8b-fp8"]):
        code, out, _ = run("inv/", *again)
        assert code == 0 and "nothing to write" in out and out.count("  ok\n") == 2
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.glob("inv/**/*.yml")} == before
    net.world["192.0.2.11:22"]["key"] = "AAAA"
    net.save()
    code, out, _ = run("inv/")
    assert code == 7 and "key-changed" in out and "ssh-keygen -R 192.0.2.11" in out


def test_a_new_host_is_added_among_what_a_person_wrote(net: Network, run: Run, tmp_path: Path, person: Sits) -> None:
    run("inv/", *two(net))
    path = tmp_path / "inv/hosts.yml"
    mine = FIRST.replace("  vars:", "    # spark-9 is at the repair shop\n  vars:   # of all").replace(
        "nvidia", "'nvidia'"
    )
    path.write_text(mine)
    net.host("192.0.2.15", "spark-7788", known=False)
    person(("Are these yours?", "yes"), ("Write this?", "yes"))
    code, out, err = run("inv/", "192.0.2.15", "192.0.2.11")
    assert code == 0 and FINGERPRINT in err
    added = "    spark-7788:\n      ansible_host: 192.0.2.15\n"
    assert path.read_text() == mine.replace("    # spark-9", f"{added}    # spark-9")
    assert "+    spark-7788:" in out and "ssh-rsa" not in net.known.read_text()


def test_a_host_of_another_model(net: Network, run: Run, tmp_path: Path) -> None:
    run("inv/", *two(net))
    net.host("192.0.2.14", "spark-5e6f")
    code, _, err = run("inv/", "--model", "gpt-oss-120b")
    assert code == 2 and "inv says llama31-8b-fp8; change sparkfleet_model there" in err
    assert run("inv/", "192.0.2.14", "--model", "gpt-oss-120b")[0] == 0
    hosts = yaml.safe_load((tmp_path / "inv/hosts.yml").read_text())["sparks"]["hosts"]
    assert hosts["spark-5e6f"] == {"ansible_host": "192.0.2.14", "sparkfleet_model": "gpt-oss-120b"}
    net.host("192.0.2.15", "spark-7788")
    assert run("inv/", "192.0.2.15", "--profile", "long_context")[0] == 0
    hosts = yaml.safe_load((tmp_path / "inv/hosts.yml").read_text())["sparks"]["hosts"]
    assert hosts["spark-7788"] == {"ansible_host": "192.0.2.15", "sparkfleet_profile": "long_context"}


def test_what_keeps_hosts_out(net: Network, run: Run, tmp_path: Path) -> None:
    """Each is a row with its remedy; those that are fine are written all the same."""
    two(net)
    net.host("192.0.2.21", "new", known=False)
    net.host("192.0.2.22", "closed", login=False)
    net.host("192.0.2.23", "keys-only", login=False, passwords=False)
    net.host("192.0.2.24", "pc", gpu="NVIDIA GeForce RTX 4090")
    net.host("192.0.2.25", "bare", python="")
    net.host("192.0.2.26", "poor", sudo="missing")
    net.host("192.0.2.27", "busy", sudo="password", available=KIB // 2)
    net.host("192.0.2.28", "spark-1a2b")
    places = ["192.0.2.11", *(f"192.0.2.{number}" for number in range(20, 29))]
    code, out, _ = run("inv/", *places, "--user", "nvidia")
    assert code == 7
    assert list(yaml.safe_load((tmp_path / "inv/hosts.yml").read_text())["sparks"]["hosts"]) == ["spark-1a2b", "busy"]
    rows = {line.split()[0]: line.split()[-1] for line in out.splitlines() if "nvidia@192" in line.split(":")[0]}
    assert rows["192.0.2.20"] == "unreachable" and rows["192.0.2.21"] == "key-unknown"
    assert rows["192.0.2.22"] == rows["192.0.2.23"] == "login" and rows["192.0.2.28"] == "same"
    assert rows["pc"] == rows["bare"] == rows["poor"] == "refused" and rows["busy"] == "new"
    for printed in (
        "No route to host. Is it powered on, and is the address right? `ssh nvidia@192.0.2.20` must work from here",
        "Log in once with `ssh nvidia@192.0.2.21`, or run this with --accept-host-keys",
        "Copy your key there: `ssh-copy-id nvidia@192.0.2.22`",
        "It does not accept passwords: have your public key added to ~/.ssh/authorized_keys there",
        "not a Spark: nvidia-smi reports NVIDIA GeForce RTX 4090.",
        "Python 3.10 or newer is required there, found none: install python3",
        "sudo is not installed",
        "59.8 GiB of its memory is available now, 115.2 when idle",
        "the same machine as spark-1a2b",
        "busy: sudo asks for a password there; that is fine: run with -K",
        "sparkfleet deploy -i inv -K",
    ):
        assert printed in out
    assert not net.calls("ssh-copy-id") and not net.calls("ssh-keyscan")


def test_nothing_is_written_where_nobody_is_reached(net: Network, run: Run, tmp_path: Path) -> None:
    net.host("192.0.2.24", "pc", gpu="")
    code, out, _ = run("inv/", "nvidia@192.0.2.24")
    assert code == 3 and "nvidia-smi reports nothing" in out and "nothing was written" in out
    assert run("inv/", "nvidia@192.0.2.20")[0] == 7 and not (tmp_path / "inv").exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("nvidia@",), "host 'nvidia@': use [user@]name-or-address[:port]"),
        (("-oProxyCommand=x",), ""),
        (("spark-1:ssh",), "'ssh' is not a TCP port"),
        (("spark-1:70000",), "'70000' is not a TCP port"),
        (("a b@spark-1",), "'a b' is not a valid user name"),
        (("@spark-1",), "is not a valid user name"),
        (("one/", "two/"), "are two folders"),
        (("192.0.2.11", "--user", "-x"), ""),
        (("192.0.2.11", "--user", "a b"), "'a b' is not a valid user name"),
        (("192.0.2.11", "--private-key", "/nowhere"), "--private-key /nowhere: no such file"),
        (("192.0.2.11", "--ssh-common-args", "-o Foo=bar"), "ssh rejects its options: command-line: line 0: Bad"),
        (("192.0.2.11", "--model", "llama31"), "did you mean llama31-8b-fp8?"),
        (("192.0.2.11", "--profile", "fast"), "has no profile 'fast'"),
        (("192.0.2.11", "192.0.2.14", "--gateway", "spark-9"), "is not one of the Sparks to be added: spark-1a2b"),
        (("--no-discover",), "no Spark was found. Name them"),
    ],
)
def test_bad_input(
    net: Network, capsys: pytest.CaptureFixture[str], tmp_path: Path, words: tuple[str, ...], complaint: str
) -> None:
    two(net)
    before = sorted(tmp_path.rglob("*"))
    try:
        code = main.main(["init", *(() if "one/" in words else ("inv/",)), *words])
    except SystemExit as stop:
        code = int(stop.code or 0)
    printed = capsys.readouterr()
    assert code == 2 and complaint in printed.err and "Traceback" not in printed.err
    assert [path for path in sorted(tmp_path.rglob("*")) if path not in before and path.name != "calls"] == []


def test_a_folder_that_is_no_inventory(net: Network, run: Run, tmp_path: Path) -> None:
    two(net)
    (tmp_path / "inv").mkdir()
    (tmp_path / "inv/hosts.ini").write_text("[sparks]\nspark-7 ansible_host=192.0.2.11\n")
    code, _, err = run("inv/", "192.0.2.14")
    assert code == 2 and "no YAML file there has the group sparks" in err
    assert run("inv/")[0] == 0  # but it can be inspected
    (tmp_path / "inv/hosts.ini").unlink()
    (tmp_path / "inv/hosts.yml").write_text("sparks: [")
    code, _, err = run("inv/", "192.0.2.14")
    assert code == 2 and "hosts.yml" in err
    (tmp_path / "file").write_text("")
    code, _, err = run("./file")
    assert code == 2 and "is a file" in err


def test_which_word_is_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lab").mkdir()
    assert init.words([]) == (ROOT / "inventory" / "mine", [])
    assert init.words(["lab", "me@spark-1"]) == (Path("lab"), [Place("spark-1", "me")])
    assert init.words(["spark-1", "a/b", "spark-1"]) == (Path("a/b"), [Place("spark-1")])


def test_all_questions(net: Network, run: Run, tmp_path: Path, person: Sits) -> None:
    """From hosts without known keys to an inventory, by answers alone."""
    net.host("192.0.2.11", "spark-1a2b", known=False, login=False)
    net.host("192.0.2.14", "spark-5e6f", known=False)
    person(
        ("User on the Sparks [me]", "no such user"),
        ("User on the Sparks [me]", "nvidia"),
        ("Are these yours? [no]", "yes"),
        ("Copy your key there now?", "yes"),
        ("You have no SSH key. Create one", "yes"),
        ("Model [llama31-8b-fp8]", "llama"),
        ("Model [llama31-8b-fp8]", "minimax-m27-nvfp4-2x"),
        ("Model [llama31-8b-fp8]", ""),
        ("Profile (throughput, long_context, low_latency) [throughput]", "fast"),
        ("Profile (throughput, long_context, low_latency) [throughput]", "long_context"),
        ("Gateway, one address for all", "spark-9"),
        ("Gateway, one address for all", "spark-5e6f"),
        ("Write this?", "perhaps"),
        ("Write this?", ""),
    )
    monkey_user = pytest.MonkeyPatch()
    monkey_user.setattr("getpass.getuser", lambda: "me")
    code, out, err = run("inv/", "192.0.2.11", "192.0.2.14")
    monkey_user.undo()
    assert code == 0
    assert err.count(FINGERPRINT) == 2 and net.known.read_text().count(KEY) == 2
    assert net.calls("ssh-copy-id") == [f"ssh-copy-id -i {net.home / 'id_ed25519.pub'} nvidia@192.0.2.11"]
    assert (net.home / "id_ed25519").stat().st_mode & 0o777 == 0o600 and (tmp_path / "home/.ssh").is_dir()
    assert "cannot determine whether" in err and "gpt-oss-120b" in out and "KV cache" in err
    assert yaml.safe_load((tmp_path / "inv/hosts.yml").read_text())["gateways"] == {"hosts": {"spark-5e6f": {}}}
    settings = yaml.safe_load((tmp_path / "inv/group_vars/sparks.yml").read_text())
    assert settings == {"sparkfleet_model": "llama31-8b-fp8", "sparkfleet_profile": "long_context"}


def test_a_person_who_says_no(net: Network, run: Run, tmp_path: Path, person: Sits) -> None:
    words = two(net)
    printed = (("Profile", ""), ("Gateway", ""), ("Write this?", "no"))
    person(*printed)
    code, _, err = run("inv/", *words, "--model", "llama31-8b-fp8")
    assert code == 2 and err.endswith("sparkfleet: nothing was written\n") and not (tmp_path / "inv").exists()
    net.host("192.0.2.21", "new", known=False)
    person(("Are these yours?", ""))
    code, out, _ = run("inv/", "nvidia@192.0.2.21")
    assert code == 7 and "key-unknown" in out and "192.0.2.21" not in net.known.read_text()


def test_interrupted(net: Network, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(prompt: str) -> str:
        raise EOFError

    monkeypatch.setattr(builtins, "input", leave)
    monkeypatch.setattr(init, "Prompter", lambda there: enrol.Prompter(True))
    code, _, err = run("inv/", *two(net))
    assert code == 130 and "the inventory is unchanged" in err and not (tmp_path / "inv").exists()


def test_on_a_real_terminal(net: Network, tmp_path: Path) -> None:
    net.host("192.0.2.11", "spark-1a2b", known=False)
    argv = ["init", "inv/", "nvidia@192.0.2.11"]
    child = pexpect.spawn(str(Path(sys.executable).with_name("sparkfleet")), argv, encoding="utf-8", timeout=20)
    child.expect("Are these yours\\? \\[no\\]: ")
    child.sendline("yes")
    child.expect("Model \\[llama31-8b-fp8\\]: ")
    child.sendline("gpt-oss-20b")
    child.expect("Profile .*: ")
    child.sendline("")
    child.expect("Write this\\? \\[yes\\]: ")
    child.sendline("")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    assert "sparkfleet_model: gpt-oss-20b\n" in (tmp_path / "inv/group_vars/sparks.yml").read_text()


def test_a_model_that_does_not_fit(net: Network, run: Run, tmp_path: Path) -> None:
    """The smallest Spark decides. One that is forced would start: preflight warns only."""
    net.host("192.0.2.11", "spark-1a2b")
    net.host("192.0.2.12", "small", total=KIB // 2)
    places = ("inv/", "nvidia@192.0.2.11", "nvidia@192.0.2.12")
    code, _, err = run(*places, "--model", "llama33-70b-fp8")
    assert code == 3 and "does not fit: weights (67.7 GiB)" in err and "What would: " in err
    assert not (tmp_path / "inv").exists()
    assert run(*places, "--model", "llama33-70b-fp8", "--force")[0] == 0
    settings = yaml.safe_load((tmp_path / "inv/group_vars/sparks.yml").read_text())
    assert settings == {"sparkfleet_model": "llama33-70b-fp8", "sparkfleet_memory_plan": "warn"}


def test_for_programs_and_without_the_token(
    net: Network, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    key = tmp_path / "key"
    key.write_text("")
    arguments = "-o ProxyJump=door"
    code, out, err = run("inv/", *two(net)[:1], "--json", "--private-key", "key", "--ssh-common-args", arguments)
    made = json.loads(out)
    assert code == 0 and made["exit_code"] == 0 and made["model"] == "llama31-8b-fp8" and made["plan"]["fits"] is True
    assert made["hosts"][0]["name"] == "spark-1a2b" and made["hosts"][0]["memory_gib"] == 119.7
    assert made["written"] == [str(tmp_path / "inv/hosts.yml"), str(tmp_path / "inv/group_vars/sparks.yml")]
    text = "".join(path.read_text() for path in tmp_path.glob("inv/**/*.yml"))
    assert "hf_secret" not in text + out + err
    shared = yaml.safe_load((tmp_path / "inv/hosts.yml").read_text())["sparks"]["vars"]
    assert shared["ansible_ssh_private_key_file"] == str(key) and shared["ansible_ssh_common_args"] == arguments
    made = json.loads(run("inv/", "--json")[1])  # by what the inventory has
    assert made["hosts"][0]["result"] == "ok" and made["written"] == []
    assert net.calls("ssh")[-1].endswith(f"-o ProxyJump=door -i {key} -l nvidia -- 192.0.2.11 sh -s")


def test_vaults(net: Network, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("inv/", *two(net))
    (tmp_path / "word").write_text("secret")
    (tmp_path / "inv/group_vars/all.yml").write_text("vault_hf_token: hf_secret\n")
    argv = ["ansible-vault", "encrypt", "--vault-password-file", "word", "inv/group_vars/all.yml"]
    subprocess.run(argv, check=True, capture_output=True)
    argv = [str(Path(sys.executable).with_name("sparkfleet")), "init", "inv/", "--no-discover"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "ANSIBLE_VAULT_PASSWORD_FILE" in done.stderr
    monkeypatch.setenv("ANSIBLE_VAULT_PASSWORD_FILE", "word")
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "nothing to write" in done.stdout


def found(*names: str) -> list[discovery.Found]:
    return [discovery.Found(name, (f"192.0.2.{number}",)) for number, name in enumerate(names, 11)]


def test_sparks_that_nobody_named(
    net: Network, run: Run, tmp_path: Path, person: Sits, monkeypatch: pytest.MonkeyPatch
) -> None:
    net.host("192.0.2.11", "nas", gpu="")
    net.host("192.0.2.12", "spark-1a2b")
    net.host("192.0.2.13", "gx10-5e6f")
    monkeypatch.setattr(discovery, "browse", lambda *_: found("nas", "spark-1a2b", "gx10-5e6f"))
    code, out, _ = run("inv/", "--user", "nvidia")
    assert code == 0 and "192.0.2.11" not in out
    hosts = yaml.safe_load((tmp_path / "inv/hosts.yml").read_text())["sparks"]["hosts"]
    assert hosts == {"spark-1a2b": {"ansible_host": "192.0.2.12"}, "gx10-5e6f": {"ansible_host": "192.0.2.13"}}
    monkeypatch.setattr(discovery, "browse", lambda *_: found("nas", "spark-1a2b", "gx10-5e6f", "spark-7788"))
    code, out, _ = run("inv/")
    assert code == 0 and "also on this network: spark-7788; `sparkfleet init inv 192.0.2.14` adds it" in out
    assert out.count("also") == 1
    numbers = "Which are your Sparks? Enter numbers, or other hosts [1,2,3]"  # the likely ones first
    person((numbers, "9"), (numbers, "1"), ("Profile", ""), ("Write", ""))
    code, _, err = run("other/", "--user", "nvidia", "--model", "gpt-oss-20b")
    assert code == 0 and "number 9 is not in the list" in err


def test_this_machine(net: Network, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a Spark itself: alone it needs no ssh; with others it says where they reach it."""
    facts = ssh.Facts("spark-1a2b", "me", "m", "NVIDIA GB10", KIB * 1024, KIB * 1000, "3.12", "yes")
    real = ssh.inspect
    monkeypatch.setattr(ssh, "inspect", lambda place: ssh.Inspection(facts) if place.local else real(place))
    monkeypatch.setattr(discovery, "own_address", lambda: "192.0.2.11")
    here = {"ansible_connection": "local", "ansible_python_interpreter": "/usr/bin/python3"}
    assert run("inv/", "--no-discover")[0] == 0
    assert yaml.safe_load((tmp_path / "inv/hosts.yml").read_text()) == {"sparks": {"hosts": {"spark-1a2b": here}}}
    assert run("inv/", "localhost")[1].count("this machine") == 1
    net.host("192.0.2.14", "spark-5e6f")
    assert run("two/", "localhost", "nvidia@192.0.2.14")[0] == 0
    hosts = yaml.safe_load((tmp_path / "two/hosts.yml").read_text())["sparks"]["hosts"]
    assert hosts["spark-1a2b"] == {"ansible_host": "192.0.2.11", **here, "ansible_user": init.getpass.getuser()}


def test_the_look_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script as sh runs it, here."""
    for name, body in (
        ("nvidia-smi", "echo NVIDIA GB10; echo second"),
        ("hostname", "echo Spark-1A2B"),
        ("sudo", "exit 1"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "id").write_text('#!/bin/sh\n[ "$1" = -u ] && echo 1000 || echo nvidia\n')
    (tmp_path / "id").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    facts = ssh.inspect(Place()).facts
    assert facts and (facts.hostname, facts.gpu, facts.user) == ("spark-1a2b", "NVIDIA GB10", "nvidia")
    memory = Path("/proc/meminfo").read_text(encoding="ascii").split()
    assert facts.total == int(memory[memory.index("MemTotal:") + 1]) * 1024 and 0 < facts.available <= facts.total
    assert facts.python.startswith("3.") and facts.sudo == "password"
    (tmp_path / "sudo").write_text('#!/bin/sh\n[ "$*" = "-kn true" ]\n')
    facts = ssh.inspect(Place()).facts
    assert facts and facts.sudo == "yes"


def test_a_host_that_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ssh").write_text("#!/bin/sh\nexec sleep 30\n")
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(ssh, "INSPECT_SECONDS", 0.3)
    began = time.monotonic()
    places = [Place(f"192.0.2.{number}") for number in range(1, 21)]
    inspections = enrol.at_once(ssh.inspect, places)
    assert {inspection.problem for inspection in inspections} == {"unreachable"} and time.monotonic() - began < 3
    assert "no answer within" in inspections[0].message
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(SparkfleetError, match="ssh is not installed"):
        ssh.inspect(places[0])


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("spark-1a2b.local", Place("spark-1a2b.local")),
        ("nvidia@192.0.2.11:2222", Place("192.0.2.11", "nvidia", 2222)),
        ("fd00::2", Place("fd00::2")),
        ("[fd00::2]:2222", Place("fd00::2", "", 2222)),
        ("localhost", Place()),
        ("localhost:2222", Place("localhost", "", 2222)),
    ],
)
def test_hosts_as_people_write_them(text: str, place: Place) -> None:
    assert ssh.parse(text) == place
    assert ssh.parse(place.text) == place if not place.local else place.text == "this machine"


@pytest.mark.parametrize(
    ("printed", "problem", "message"),
    [
        ("ssh: connect to host 192.0.2.1 port 22: Connection timed out", "unreachable", "Connection timed out"),
        ("ssh: Could not resolve hostname x: Name or service not known", "unreachable", "Name or service not known"),
        ("no such identity: /x: No such file\nnvidia@192.0.2.1: Permission denied (publickey).", "login", "Permission"),
        ("Received disconnect from 192.0.2.1 port 22:2: Too many authentication failures", "login", "Too many"),
        ("No ED25519 host key is known for x and you ...\nHost key verification failed.", "key-unknown", "No ED25519"),
        (
            "@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.",
            "key-changed",
            "has changed",
        ),
        ("sh: 1: Syntax error", "unreachable", "sh: 1: Syntax error"),
        ("", "unreachable", "no reason given"),
    ],
)
def test_what_ssh_says(printed: str, problem: str, message: str) -> None:
    kind, line = ssh.problem(printed)
    assert kind == problem and message in line and not line.startswith(("ssh: ", "nvidia@"))


@pytest.mark.parametrize("hashed", ["yes", "no"])
def test_known_hosts_as_ssh_reads_it(tmp_path: Path, hashed: str) -> None:
    key = ssh.HostKey("ssh-ed25519", KEY)
    file = tmp_path / ".ssh" / "known_hosts"
    known = {
        "hostname": "192.0.2.11",
        "port": "2222",
        "userknownhostsfile": f"{file} {file}2",
        "hashknownhosts": hashed,
    }
    assert key.fingerprint == FINGERPRINT
    assert ssh.trust(Place("192.0.2.11", "", 2222), key, known) == file
    file.write_text(file.read_text().rstrip("\n"))  # a file without its last line end
    ssh.trust(Place("192.0.2.12"), key, {**known, "hostname": "192.0.2.12", "port": "22"})
    assert file.stat().st_mode & 0o777 == 0o600 and ("192.0.2.11" in file.read_text()) is (hashed == "no")
    for name in ("[192.0.2.11]:2222", "192.0.2.12"):
        argv = ["ssh-keygen", "-l", "-F", name, "-f", str(file)]
        assert FINGERPRINT in subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def test_real_ssh_takes_our_words(tmp_path: Path) -> None:
    """Against the ssh that is installed; no host is contacted."""
    (tmp_path / "key").write_text("")
    place = Place("192.0.2.11", "nvidia", 2222, str(tmp_path / "key"), "-o UserKnownHostsFile=/tmp/kh -J door")
    known = ssh.settings(place)
    assert (known["hostname"], known["user"], known["port"]) == ("192.0.2.11", "nvidia", "2222")
    assert known["userknownhostsfile"] == "/tmp/kh" and known["identityfile"] == str(tmp_path / "key")
    assert ssh.host_key(place, known) is None  # the way there is through another host
    copy = ssh.copy_command(place, Path("/tmp/key.pub"))
    assert copy[1:5] == ["-o", "UserKnownHostsFile=/tmp/kh", "-o", "ProxyJump=door"] and copy[-1] == "nvidia@192.0.2.11"


@pytest.fixture
def announced() -> Iterator[None]:
    """Hosts that announce ssh by mDNS, on the loopback."""
    net = zeroconf.Zeroconf(["127.0.0.1"])
    for name, kind, port, addresses in (
        ("spark-1a2b", "_ssh", 22, ["169.254.7.7", "127.0.0.1"]),
        ("spark-1a2b", "_sftp-ssh", 22, ["127.0.0.1"]),
        ("nas", "_sftp-ssh", 2222, ["127.0.0.9"]),
        ("printer", "_ipp", 631, ["127.0.0.10"]),
    ):
        service = f"_{kind.strip('_')}._tcp.local."
        info = zeroconf.ServiceInfo(
            service, f"{name}.{service}", port=port, parsed_addresses=addresses, server=f"{name}.local."
        )
        net.register_service(info, cooperating_responders=True)  # without asking whether the name is free
    yield
    net.close()


def test_discovery(announced: None) -> None:
    assert discovery.browse(2.5, ["127.0.0.1"]) == [
        discovery.Found("nas", ("127.0.0.9",), 2222),
        discovery.Found("spark-1a2b", ("127.0.0.1", "169.254.7.7")),
    ]


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(zeroconf, "Zeroconf", fails)
    assert discovery.browse() == []


def test_name_or_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that Avahi may change, or that this machine does not find, is not an address to save."""
    monkeypatch.setattr(discovery, "resolved", lambda name: [] if name.startswith("gone") else ["192.0.2.11"])
    for name, address in (
        ("spark-1a2b", "spark-1a2b.local"),
        ("spark-1a2b-30", "192.0.2.11"),
        ("gone-1a2b", "192.0.2.11"),
    ):
        assert discovery.place(discovery.Found(name, ("192.0.2.11",))) == Place(address)
    assert discovery.place(discovery.Found("spark-x", ("192.0.2.12",), 2222)) == Place("192.0.2.12", "", 2222)
    likely = [
        name
        for name in ("spark-1", "gx10-d56e", "promaxgb10-41b1", "nas", "bespark")
        if discovery.Found(name, ()).likely
    ]
    assert likely == ["spark-1", "gx10-d56e", "promaxgb10-41b1"]


def test_the_address_to_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network that we share first, the Sparks' fabric and what DHCP did not give last."""
    own = [("10.0.0.2", 24, "eth0"), ("192.168.100.10", 24, "enp1s0f0np0")]
    monkeypatch.setattr(discovery, "own_addresses", lambda: own)
    addresses = ["169.254.1.1", "192.168.100.11", "172.20.0.3", "10.0.0.21"]
    assert sorted(addresses, key=discovery._rank) == ["10.0.0.21", "172.20.0.3", "192.168.100.11", "169.254.1.1"]


NEW = Entry("new", {"ansible_host": "192.0.2.9", "ansible_ssh_common_args": "-o A=b, c"})
LINES = ["new:", "  ansible_host: 192.0.2.9", "  ansible_ssh_common_args: -o A=b, c"]


@pytest.mark.parametrize(
    "text",
    [
        "sparks:\n  hosts:\n    a:\n      ansible_host: x\n# tail\n# more\n",
        "sparks:\n  hosts:\n    a:\n    b:\n  vars: {x: 1}\n",
        "sparks:\n    hosts:\n        a: {ansible_host: x} # the first\n\n\nother: {}\n",
        "sparks:\n  hosts: {a: {ansible_host: x}, b: }  # both\n  vars:\n    y: 2\n",
        "sparks:\n  hosts:\n    a:\n      motd: |\n        one\n\n        two\n\n    # between\n  vars:\n    y: 2\n",
        "sparks:\n  hosts:\n    a:\n      list:\n      - 1\n      - {b: 2}\n",
        "sparks:\n  vars:\n    y: 2\n",
        "sparks:\n  hosts:\n",
        "other:\n  hosts:\n    z:\nall:\n  children:\n    sparks:\n      hosts:\n        a:\n          key: !vault |\n"
        "            $ANSIBLE_VAULT;1.1;AES256\n            6162\n",
        "sparks:\n  children:\n    west: {}\nall:\n  children:\n    sparks:\n      hosts:\n        a: {}\n",
        "sparks:\r\n  hosts:\r\n    a:\r\n      ansible_host: x\r\n  vars:\r\n    y: 2\r\n",
        "sparks:\n  hosts:\n    a: {ansible_host: x}",
    ],
)
def test_a_host_added_to_any_inventory(text: str, tmp_path: Path) -> None:
    """What was there stays byte for byte, and the new host says what it is to say."""
    path = tmp_path / "hosts.yml"
    inventory_file.write(path, text)
    assert inventory_file.group_file(tmp_path) == path and inventory_file.read(path) == text
    made = inventory_file.add(path, text, [NEW])
    inserted = len(made) - len(text)
    assert any(made[:cut] + made[cut + inserted :] == text for cut in range(len(text) + 1))

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!vault", lambda loader, node: node.value)
    groups = yaml.load(made, Loader=Loader)  # noqa: S506
    group = groups["all"]["children"]["sparks"] if "all" in groups else groups["sparks"]
    assert group["hosts"]["new"] == NEW.variables
    again = inventory_file.add(path, made, [Entry("newer", {})])
    assert "newer" in again


@pytest.mark.parametrize(
    "text",
    [
        "sparks: {vars: {a: 1}}\n",
        "x: &h {ansible_host: 1}\nsparks:\n  hosts:\n    a: *h\n",
        "sparks: {}\n",
    ],
)
def test_an_inventory_that_cannot_be_added_to(text: str, tmp_path: Path) -> None:
    """Rather none than a wrong one; the lines to write by hand are named."""
    path = tmp_path / "hosts.yml"
    with pytest.raises(SparkfleetError, match="add by hand:\n") as caught:
        inventory_file.add(path, text, [NEW])
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [line.strip() for line in LINES]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SparkfleetError, match="cannot be written"):
        inventory_file.write(tmp_path / "file" / "hosts.yml", "x")
    inventory_file.write(tmp_path / "a" / "hosts.yml", "x")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["hosts.yml"]


def test_values_that_need_quotes() -> None:
    made = inventory_file.hosts([Entry("a", {"ansible_user": "yes", "x": "a: b #c", "n": 5})], {"p": "{{ x }}"})
    group = yaml.safe_load(made)["sparks"]
    assert group["hosts"]["a"] == {"ansible_user": "yes", "x": "a: b #c", "n": 5} and group["vars"] == {"p": "{{ x }}"}
    assert "gateways" not in made  # one Spark needs none
    on = inventory_file.hosts([Entry("on", {}), Entry("1e3", {"x": [1, "yes"]})], {})
    assert yaml.safe_load(on)["sparks"]["hosts"] == {"on": {}, "1e3": {"x": [1, "yes"]}}


BANNERS = [
    "sparkfleet:end=yes",
    "sparkfleet:gpu=NVIDIA GB10\nsparkfleet:total=abc\nsparkfleet:end=yes",
    "sparkfleet:nothing",
    "sparkfleet-0000000000000000:end=yes",
    "\x1b[2J\x1b]0;owned\x07{{ lookup('pipe', 'touch /tmp/owned') }}",
    "{}\n[]",
]


@pytest.mark.parametrize("banner", BANNERS)
def test_a_message_of_the_day_is_no_answer(banner: str, net: Network, run: Run) -> None:
    net.host("192.0.2.11", "spark-1", banner=banner)
    net.host("192.0.2.12", "spark-2")
    code, out, err = run("--yes", "--model", "llama31-8b-fp8", "lab/inv", "192.0.2.11", "192.0.2.12")
    assert code == 0, err
    assert "spark-1" in out and "spark-2" in out and "\x1b" not in out + err


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"total": "12x"}, "total is '12x', not a number of KiB"),
        ({"available": "9" * 40}, "not a number of KiB"),
        ({"python": "3.12\x1b[31m"}, "python is"),
        ({"sudo": "perhaps"}, "sudo is 'perhaps'"),
    ],
)
def test_an_answer_that_cannot_be_used(wrong: dict[str, Any], words: str, net: Network, run: Run) -> None:
    """One host that answers nonsense is a row with its reason; the others are written."""
    net.host("192.0.2.11", "spark-1", **wrong)
    net.host("192.0.2.12", "spark-2")
    code, out, err = run("--yes", "--model", "llama31-8b-fp8", "lab/inv", "192.0.2.11", "192.0.2.12")
    assert code == 7 and words in out and "answer" in out, out + err
    assert "spark-2" in (net.home.parent / "lab" / "inv" / "hosts.yml").read_text(encoding="utf-8")
    assert "\x1b" not in out + err


def test_names_and_figures_of_a_hostile_host(net: Network, run: Run) -> None:
    """What a host says of itself is shown without escapes and written without templates."""
    evil = "{{ lookup('pipe', 'id') }}\x1b[2J"
    net.host("192.0.2.11", evil, gpu=f"NVIDIA GB10 {evil}", machine=evil)
    code, out, err = run("--yes", "--model", "llama31-8b-fp8", "lab/inv", "192.0.2.11")
    text = (net.home.parent / "lab" / "inv" / "hosts.yml").read_text(encoding="utf-8")
    assert code == 0 and "{{" not in text and "\x1b" not in text + out + err
    assert list(yaml.safe_load(text)["sparks"]["hosts"]) == ["lookup--pipe----id-------2j"]


def test_endless_output_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ssh").write_text("#!/bin/sh\ncat > /dev/null\nexec cat /dev/zero\n")
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    began = time.monotonic()
    found = ssh.inspect(Place("192.0.2.1"))
    assert found.problem == "answer" and "more than" in found.message and time.monotonic() - began < 20


@given(
    st.dictionaries(
        st.sampled_from(["hostname", "user", "machine", "gpu", "total", "available", "python", "sudo"]),
        st.text(max_size=60),
    )
)
def test_any_facts(found: dict[str, str]) -> None:
    try:
        facts = ssh._facts(found)
    except BoundsError:
        return
    host = enrol.Host(Place("192.0.2.1"), inspection=ssh.Inspection(facts))
    enrol._judge(host, {}, {"all"})
    shown = enrol.table([host])
    assert "\x1b" not in shown and re.fullmatch(r"[a-z0-9_-]+", host.name)


@given(st.text(max_size=40), st.one_of(st.none(), st.integers()), st.lists(st.text(max_size=20), max_size=40))
@example("{{lookup('pipe','touch x')}}.local.", 22, ["127.0.0.1"])
@example("spark-1a2b.local.", 22, ["192.0.2.1"])
def test_any_announcement(server: str, port: int | None, addresses: list[str]) -> None:
    """A name of mDNS that is none of a host is left out: it would become a value that Ansible evaluates."""
    found: dict[str, tuple[set[str], int]] = {}
    discovery.add(found, server, port, addresses)
    for name, (known, at) in found.items():
        assert re.fullmatch(r"[a-z0-9_.-]+", name) and len(known) <= discovery.ADDRESSES and 0 < at < 65536
    if server == "spark-1a2b.local.":
        assert [*found] == ["spark-1a2b"]


WORD = st.one_of(
    st.text(max_size=30),
    st.from_regex(r"([a-z]{0,8}@)?[a-z0-9.-]{0,12}(:[0-9]{0,6})?", fullmatch=True),
    st.sampled_from(["localhost", "[::1]:22", "~nosuchuser/x", "a/b", "..", "\x00", "x\x00/y", "a" * 300 + "/b"]),
)


@given(WORD)
def test_any_word_is_a_place_or_refused(word: str) -> None:
    try:
        folder, places = init.words([word])
    except SparkfleetError as error:
        assert str(error)
        return
    for place in (place for place in places if not place.local):
        assert "{" not in place.text and not re.search(r"\s", place.text) and not place.address.startswith("-")
    assert isinstance(folder, Path)


@pytest.mark.parametrize(
    "words",
    [
        ("--ssh-common-args", "'", "192.0.2.1"),
        ("--ssh-common-args", "\x00", "192.0.2.1"),
        ("--private-key", "~nosuchuser/key", "192.0.2.1"),
        ("--private-key", "\x00", "192.0.2.1"),
        ("--user", "a b", "192.0.2.1"),
        ("192.0.2.1:99999999999999999999",),
        ("192.0.2.1:²",),
        ("~nosuchuser/x", "192.0.2.1"),
        ("x\x00/y", "192.0.2.1"),
        ("a" * 5000 + "/y", "192.0.2.1"),
    ],
    ids=repr,
)
def test_bad_words(words: tuple[str, ...], net: Network, run: Run) -> None:
    code, out, err = run("--yes", *words)
    assert (code == 2 and err.startswith("sparkfleet: ") and not out and not net.calls("ssh ")) or "-G" in str(
        net.calls()
    )


YAML = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["sparks", "hosts", "children", "vars", "all", "a", "b"]), inner, max_size=4),
    ),
    max_leaves=12,
)


@given(YAML, st.sampled_from([None, False, True]))
def test_any_inventory_is_added_to_or_refused(document: Any, flow: bool | None) -> None:
    """Either the new host is there and all else as it was, or one error."""
    added_or_refused(yaml.safe_dump(document, default_flow_style=flow))


@given(st.text(alphabet=st.sampled_from("sparkhoet:{}[],&*!|>-# \n'\"\t\r%@`"), max_size=60))
def test_any_text_is_added_to_or_refused(text: str) -> None:
    added_or_refused(text)
    added_or_refused(f"sparks:\n  hosts:\n    a: {text}")


def added_or_refused(text: str) -> None:
    try:
        made = inventory_file.add(Path("hosts.yml"), text, [NEW])
    except SparkfleetError as error:
        assert str(error).startswith("hosts.yml")
        return
    assert "new" in made and "192.0.2.9" in made
    yaml.compose(made, Loader=yaml.SafeLoader)
