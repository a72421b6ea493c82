"""Where secrets of an inventory are kept, and what is said when they cannot be got."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparkfleet import SparkfleetError
from sparkfleet.documents import secret

NAME, VALUE = "sparkfleet_engine_key", "v3ry-secret-value"
MEMORY = "sparkfleet-secrets"


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    secret.forget()
    yield
    secret.forget()


def printing(code: str) -> dict[str, list[str]]:
    return {"command": [sys.executable, "-c", code]}


def test_text_is_itself_and_sources_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    file.write_text(f"  {VALUE}\nlogin: me\n")
    monkeypatch.setenv("THE_KEY", f"{VALUE}\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    sources: list[Any] = [
        VALUE,
        {"file": str(file)},
        {"file": "~/key"},
        {"env": "THE_KEY"},
        printing(f"print('{VALUE}')"),
    ]
    assert [secret.text(NAME, source) for source in sources] == [VALUE] * 5
    assert secret.text(NAME, "") == "" and secret.text(NAME, None) is None


def test_of_several_each_is_got(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(VALUE)
    source = {"file": str(file)}
    wanted = [source, "b" * 8, {"name": "web", "key": source, "streams": 2}, {"name": "batch", "key": "c" * 8}]
    assert secret.each(NAME, wanted) == [
        *(VALUE, "b" * 8, {"name": "web", "key": VALUE, "streams": 2}, {"name": "batch", "key": "c" * 8}),
    ]
    assert secret.each(NAME, "text") == "text"  # what it must be is said by others
    with pytest.raises(SparkfleetError, match=rf"{NAME}: entry 2: cannot read /nowhere/key: No such file"):
        secret.each(NAME, ["b" * 8, {"name": "web", "key": {"file": "/nowhere/key"}}])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "must be text, or a mapping with one of file"),
        ({"file": "/a", "env": "B"}, "must be text, or a mapping with one of file"),
        ({VALUE: 1}, "it has the keys another"),
        ({"file": f"relative/{'x' * 5}"}, "file must be an absolute path or start with ~"),
        ({"file": 7}, "file must be text"),
        ({"file": "/dev/zero"}, "cannot read /dev/zero: more than 64 KiB, or not a regular file"),
        ({"file": "/no/such\0file"}, "file must be text"),
        ({"env": "A-B"}, "env must be the name of an environment variable"),
        ({"env": "NOT_SET_ANYWHERE"}, "the environment variable NOT_SET_ANYWHERE is not set or empty"),
        ({"command": "pass show key"}, "command must be a list of words"),
        ({"command": []}, "command must be a list of words"),
        ({"command": ["pass", 7]}, "command must be a list of words"),
        ({"command": ["/no/such/program"]}, "the command /no/such/program cannot be started: No such file"),
        (printing(f"import sys; print('{VALUE}'); sys.exit(3)"), "ended with 3; run it by hand to see why"),
        (printing("print('')"), "prints is empty"),
        (printing("import os; os.write(1, b'\\xff\\xfe')"), "prints what is not text"),
        (printing(f"while True: print('{VALUE}')"), "prints more than 64 KiB"),
    ],
)
def test_what_cannot_be_got_is_said_without_the_value(source: dict[str, Any], message: str) -> None:
    with pytest.raises(SparkfleetError) as error:
        secret.text(NAME, source)
    assert message in str(error.value) and str(error.value).startswith(f"{NAME}: ")
    assert VALUE not in str(error.value)


def test_a_file_that_is_too_large_or_empty(tmp_path: Path) -> None:
    file = tmp_path / "key"
    for content, message in (
        (b"k" * (64 << 10) + b"k", "more than 64 KiB"),
        (b" \n", "is empty"),
        (b"\xff", "Unicode"),
    ):
        file.write_bytes(content)
        with pytest.raises(SparkfleetError, match=message):
            secret.text(NAME, {"file": str(file)})


def test_a_command_has_its_time_and_its_children_end_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secret, "COMMAND_SECONDS", 1.0)
    mark = tmp_path / "pid"
    began = time.monotonic()
    with pytest.raises(SparkfleetError, match="did not end within 1 s"):
        secret.text(NAME, {"command": ["sh", "-c", f"sleep 60 & echo $! >{mark}; wait"]})
    assert time.monotonic() - began < 10
    child = int(mark.read_text())
    end = time.monotonic() + 5
    while time.monotonic() < end and alive(child):
        time.sleep(0.02)
    assert not alive(child)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_command_runs_once_for_all_processes_forked_from_this_one(tmp_path: Path) -> None:
    log = tmp_path / "log"
    source = {"command": ["sh", "-c", f"echo asked >>{log}; sleep 0.2; echo {VALUE}"]}
    children = []
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            os._exit(0 if secret.text(NAME, source) == VALUE else 1)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0, 0, 0]
    assert secret.text(NAME, source) == VALUE
    assert log.read_text() == "asked\n"


def test_what_a_command_printed_is_in_no_file(tmp_path: Path) -> None:
    secret.text(NAME, printing(f"print('{VALUE}')"))
    ours = [path for path in Path("/proc/self/fd").iterdir() if path.is_symlink() and MEMORY in str(path.readlink())]
    assert ours and all(str(path.readlink()).startswith("/memfd:") for path in ours)
    # No program that is started inherits it.
    assert not [path for path in ours if os.get_inheritable(int(path.name))]
