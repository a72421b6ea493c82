"""A failure that explains itself is printed once and alone; with -v, as Ansible prints it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit import ROOT

PLAYBOOK = """
- hosts: localhost
  connection: local
  gather_facts: false
  tasks:
    - ansible.builtin.{action}: {arguments}
"""


def run(tmp_path: Path, action: str, arguments: str, *words: str) -> str:
    playbook = tmp_path / "playbook.yml"
    playbook.write_text(PLAYBOOK.format(action=action, arguments=arguments), encoding="utf-8")
    command = [Path(sys.executable).with_name("ansible-playbook"), "-i", "localhost,", playbook, *words]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    return done.stdout + done.stderr


def test_one_message(tmp_path: Path) -> None:
    output = run(tmp_path, "assert", "{that: false, fail_msg: port 8000 is held}")
    assert output.count("port 8000 is held") == 1
    assert "fatal: [localhost]: port 8000 is held" in output
    assert "[ERROR]" not in output


@pytest.mark.parametrize(("action", "words"), [("assert", ["-v"]), ("slurp", [])])
def test_everything_else_as_ansible_prints_it(tmp_path: Path, action: str, words: list[str]) -> None:
    arguments = "{that: false, fail_msg: why}" if action == "assert" else "{src: /nowhere/why}"
    output = run(tmp_path, action, arguments, *words)
    assert "FAILED! =>" in output and "why" in output
