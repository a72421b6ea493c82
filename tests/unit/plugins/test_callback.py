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


QUIET = """
- name: Some play
  hosts: localhost
  connection: local
  gather_facts: false
  tasks:
    - name: Right already
      ansible.builtin.command: /bin/true
      changed_when: false
    - name: Not for this host
      ansible.builtin.command: /bin/true
      when: false
    - name: Something new
      ansible.builtin.command: /bin/true
      changed_when: true
    - name: Each of them
      ansible.builtin.command: /bin/true
      changed_when: item == 'second'
      loop: [first, second]
    - name: What was asked for
      ansible.builtin.debug:
        msg: shown all the same
"""


def lines(tmp_path: Path, text: str, *words: str, **environment: str) -> list[str]:
    """Lines of a playbook that ends well, above the recap."""
    playbook = tmp_path / "playbook.yml"
    playbook.write_text(text, encoding="utf-8")
    command = [Path(sys.executable).with_name("ansible-playbook"), "-i", "localhost,", playbook, *words]
    command += ["-e", f"ansible_python_interpreter={sys.executable}"]
    settings = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1", **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=settings, check=True)
    return [line for line in done.stdout.partition("PLAY RECAP")[0].splitlines() if line.strip()]


def test_changes_alone_are_shown(tmp_path: Path) -> None:
    printed = lines(tmp_path, QUIET)
    assert printed[:2] == ["localhost  Something new", "localhost  Each of them: second"]
    assert "shown all the same" in "".join(printed[2:])
    assert not [line for line in printed if "PLAY" in line or "Right already" in line or "Not for this host" in line]


def test_with_v_nothing_is_hidden(tmp_path: Path) -> None:
    printed = "\n".join(lines(tmp_path, QUIET, "-v"))
    for name in ("PLAY [Some play]", "TASK [Right already]", "TASK [Not for this host]", "TASK [Something new]"):
        assert name in printed
    assert "(item=first)" in printed and "skipping: [localhost]" in printed


def test_a_task_that_lasts_says_so(tmp_path: Path) -> None:
    text = "- hosts: localhost\n  connection: local\n  gather_facts: false\n  tasks:\n" + (
        "    - {name: Wait for it, ansible.builtin.command: sleep 2, changed_when: false}\n"
    )
    printed = lines(tmp_path, text, SPARKFLEET_QUIET_SECONDS="0.5")
    assert len(printed) >= 2 and all(line.startswith("Wait for it (") for line in printed)
    assert lines(tmp_path, text, SPARKFLEET_QUIET_SECONDS="60") == []


#: What Ansible takes for a host's Python.
HOSTILE = r"""#!{python}
import json
print(json.dumps({{
    "failed": True, "changed": False,
    "warnings": ["\x1b[2J\x1b]0;owned\x07x"],
    "msg": "no\nspark-2  release 8 (m) is verified\nPLAY RECAP *****",
}}))
"""


@pytest.mark.parametrize("action", ["ansible.builtin.stat: {path: /}", "sparkfleet.dgx.swap: {state: disabled}"])
def test_a_host_says_nothing_in_the_name_of_another(tmp_path: Path, action: str) -> None:
    """Neither escape sequences nor lines of its own."""
    interpreter = tmp_path / "python3"
    interpreter.write_text(HOSTILE.format(python=sys.executable), encoding="utf-8")
    interpreter.chmod(0o755)
    playbook = tmp_path / "playbook.yml"
    playbook.write_text(f"- hosts: all\n  gather_facts: false\n  tasks:\n    - {action}\n", encoding="utf-8")
    command = [Path(sys.executable).with_name("ansible-playbook"), "-i", "spark-1,", "-c", "local", playbook]
    command += ["-e", f"ansible_python_interpreter={interpreter}"]
    settings = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=settings, check=False)
    printed = done.stdout + done.stderr
    assert done.returncode == 2 and "release 8 (m) is verified" in printed, printed
    assert "\x1b" not in printed and "\x07" not in printed
    assert not [line for line in printed.splitlines() if line.startswith("spark-2")]
    assert printed.count("\nPLAY RECAP") == 1
