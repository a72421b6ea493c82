"""Six secrets are planted in an inventory, each in another kind of place; whatever runs print at -vvv or leave behind,
one that is killed too, has none of them. On this machine, with what changes nothing; `python -m simulator.canaries`
does the rest on simulated Sparks."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit import ROOT

BIN = Path(sys.executable).parent
SECRETS = {name: f"canary-{name}-5b1d77" for name in ("hub", "engine", "client", "registry", "proxy", "vault")}
#: Of a playbook and its words: all with everything that Ansible prints.
PLAYS = {
    "site.yml": ("--check", "--diff", "--tags", "preflight,prepare"),
    "playbooks/status.yml": (),
    "playbooks/diagnose.yml": (),
    "playbooks/audit.yml": (),
    "playbooks/gateway.yml": ("--check",),
    "playbooks/rotate.yml": ("--check",),
}
VERBS = ("preflight", "drift", "audit")


class World:
    """An inventory with the secrets, and what runs with it print."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.began = folder, time.time()
        self.printed: dict[str, str] = {}
        for name in ("home", "tmp", "inventory/group_vars"):
            (folder / name).mkdir(parents=True)
        proxy = f"http://fleet:{SECRETS['proxy']}@127.0.0.1:9"
        for name, text in {"client": SECRETS["client"], "proxy": proxy, "vault": SECRETS["vault"]}.items():
            (folder / name).write_text(f"{text}\n")
            (folder / name).chmod(0o600)
        made = self.done(
            "ansible-vault", "encrypt_string", "--stdin-name", "sparkfleet_engine_key", given=SECRETS["engine"]
        )
        local = {"ansible_connection": "local", "ansible_become": False, "ansible_python_interpreter": sys.executable}
        values: dict[str, Any] = {
            **local,
            "sparkfleet_require_gb10": False,
            "sparkfleet_memory_plan": "warn",
            "sparkfleet_project_dir": str(folder / "project"),
            "sparkfleet_hf_token": {"env": "CANARY_HUB"},
            "sparkfleet_hf_token_file": str(folder / "etc" / "hf_token"),
            "sparkfleet_gateway_keys": [{"name": "web", "key": {"command": ["cat", str(folder / "client")]}}],
            "sparkfleet_proxy": {"file": str(folder / "proxy")},
            "sparkfleet_registry_logins": {"nvcr.io": {"username": "u", "password": {"env": "CANARY_REGISTRY"}}},
        }
        groups = {"sparks": {"hosts": {"here": None}}, "gateways": {"hosts": {"here": None}}}
        (folder / "inventory" / "hosts.yml").write_text(yaml.safe_dump(groups))
        (folder / "inventory" / "group_vars" / "all.yml").write_text(yaml.safe_dump(values) + made)

    def start(self, *words: str, given: bool = False) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "HOME": str(self.folder / "home"),
            "TMPDIR": str(self.folder / "tmp"),
            "XDG_STATE_HOME": str(self.folder / "home" / "state"),
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_VAULT_PASSWORD_FILE": str(self.folder / "vault"),
            "CANARY_HUB": SECRETS["hub"],
            "CANARY_REGISTRY": SECRETS["registry"],
        }
        return subprocess.Popen(
            [str(BIN / words[0]), *words[1:]],
            cwd=ROOT,
            env=environment,
            text=True,
            stdin=subprocess.PIPE if given else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def done(self, *words: str, given: str = "") -> str:
        process = self.start(*words, given=bool(given))
        text = process.communicate(given or None, timeout=300)[0]
        if not given:
            self.printed[" ".join(words)] = text
        return text

    def left(self) -> Iterator[Path]:
        """What runs have written, besides the inventory and its sources."""
        own = {self.folder / name for name in ("client", "proxy", "vault")}
        for top in (self.folder, ROOT / ".sparkfleet", Path("/dev/shm")):
            for path in top.rglob("*"):
                try:
                    new = path.is_file() and not path.is_symlink() and path.stat().st_mtime >= self.began - 1
                except OSError:
                    continue
                if new and path not in own:
                    yield path

    def hits(self) -> list[str]:
        forms = {value: name for name, value in SECRETS.items()}
        for name, user in (("registry", "u"), ("proxy", "fleet")):
            forms[base64.b64encode(f"{user}:{SECRETS[name]}".encode()).decode()] = name
        found = [f"{forms[form]}: {run}" for run, text in self.printed.items() for form in forms if form in text]
        for path in self.left():
            try:
                data = path.read_bytes()
            except OSError:
                continue
            found += [f"{name}: {path}" for form, name in forms.items() if form.encode() in data]
        return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("canaries"))


@pytest.mark.parametrize("playbook", PLAYS)
def test_what_a_playbook_prints_at_its_most(world: World, playbook: str) -> None:
    printed = world.done("ansible-playbook", "-vvv", "-i", str(world.folder / "inventory"), playbook, *PLAYS[playbook])
    assert "PLAY RECAP" in printed and "must be" not in printed, printed[-2000:]
    assert not world.hits()


@pytest.mark.parametrize("verb", VERBS)
def test_what_a_verb_prints_and_keeps(world: World, verb: str) -> None:
    printed = world.done("sparkfleet", verb, "-i", str(world.folder / "inventory"), "--json")
    assert json.loads(printed)["hosts"][0]["name"] == "here", printed[-2000:]
    assert not world.hits()


def test_what_a_command_leaves_that_is_killed(world: World) -> None:
    process = world.start("sparkfleet", "deploy", "--check", "-i", str(world.folder / "inventory"))
    end, below = time.monotonic() + 60, list[int]()
    while not below and process.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
        below = children(process.pid)
    time.sleep(1)  # it has read the inventory, and is not at its end
    below = children(process.pid) or below
    for pid in (process.pid, *below):
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            continue
    world.printed["killed"] = process.communicate(timeout=60)[0]
    assert below and process.returncode == -signal.SIGKILL
    assert not world.hits()


def children(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found += [int(path.parent.name), *children(int(path.parent.name))]
        except (OSError, ValueError, IndexError):
            continue
    return found


def test_the_hunt_finds_what_is_planted(world: World) -> None:
    """Whoever searches must find."""
    (world.folder / "home" / "leak").write_text(base64.b64encode(f"u:{SECRETS['registry']}".encode()).decode())
    world.printed["leak"] = f"the key is {SECRETS['client']}"
    try:
        assert sorted(world.hits()) == ["client: leak", f"registry: {world.folder}/home/leak"]
    finally:
        (world.folder / "home" / "leak").unlink()
        del world.printed["leak"]
