"""Paths as people write them: what cannot be one is one clear error wherever it is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparkfleet import SparkfleetError
from sparkfleet.cli import main
from sparkfleet.fleet import image_digest
from sparkfleet.onboarding import model_choice, ssh
from sparkfleet.onboarding.ssh import Place
from sparkfleet.packaging import wheels
from sparkfleet.packaging.bundle import Bundle
from sparkfleet.planning import catalog, memory_plan
from sparkfleet.user_paths import expanded, output
from tests.unit.fakes.fake_registry import FakeRegistry, digest, serving
from tests.unit.planning.test_plan import target

NOBODY = "~nobody-has-this-name/x"


def test_a_home_folder_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert expanded("FOLDER", "~/x") == Path("/home/me/x") and expanded("FOLDER", "a/~b") == Path("a/~b")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (NOBODY, "there is no home directory for ~nobody-has-this-name; use the full path"),
        ("/" + "x" * 300, "File name too long"),
        ("\ud800", "surrogates not allowed"),
    ],
)
def test_what_cannot_be_a_path_is_one_error(text: str, why: str) -> None:
    with pytest.raises(SparkfleetError, match=rf"^FOLDER '.*{why}"):
        expanded("FOLDER", text)


def test_where_nothing_can_be_written_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "no" / "x")
    for name in ("file", "new", "/dev/null"):
        assert output("--output", tmp_path / name) == tmp_path / name
    assert output("--output", tmp_path / "a" / "b", make=True) and output("FOLDER", tmp_path / "a" / "b", folder=True)
    assert output("FOLDER", tmp_path, folder=True) == tmp_path and not (tmp_path / "a").exists()
    for name, given, why in (
        ("no/x", {}, "No such file or directory"),
        ("link", {}, "No such file or directory"),
        (".", {}, "Is a directory"),
        ("file/x", {}, "Not a directory"),
        ("file/x/y", {"make": True}, "Not a directory"),
        ("file", {"folder": True}, "Not a directory"),
        ("file/x", {"folder": True}, "Not a directory"),
    ):
        with pytest.raises(SparkfleetError, match=rf"^--output .*{name}: {why}: choose another path"):
            output("--output", tmp_path / name, **given)
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(SparkfleetError, match="Permission denied"):
        output("--output", tmp_path / "new")


KEY = ssh.HostKey("ssh-ed25519", "AAAA")
KNOWN = {"hostname": "h", "port": "22", "userknownhostsfile": NOBODY, "identityfile": NOBODY}
ROOM = memory_plan.Memory(119.0, 113.0)


@pytest.mark.parametrize(
    "use",
    [
        lambda: Bundle.read(NOBODY),
        lambda: Bundle.open(NOBODY),
        lambda: Bundle.open("/" + "x" * 300),
        lambda: target(bundle=NOBODY),
        lambda: wheels.take(NOBODY, "", "/nowhere"),
        lambda: catalog.load(f"{NOBODY}.yml"),
        lambda: model_choice.offer(f"{NOBODY}.yml", "throughput", ROOM),
        lambda: ssh.known_hosts(Place("h"), KNOWN),
        lambda: ssh.trust(Place("h"), KEY, KNOWN),
        lambda: ssh.own_key(Place("h"), KNOWN),
        lambda: ssh.own_key(Place("h", private_key=NOBODY), {}),
        lambda: ssh.make_key(Place("h", private_key=NOBODY), {}),
    ],
)
def test_whoever_takes_a_path_says_so(use: Callable[[], Any]) -> None:
    with pytest.raises(SparkfleetError, match=r"there is no home directory for ~nobody|File name too long"):
        use()


@pytest.mark.parametrize(
    "words", [["bundle", NOBODY], ["plan", f"{NOBODY}.yml"], ["compose", f"{NOBODY}.yml"], ["init", NOBODY]]
)
def test_a_command_ends_with_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(words) == main.BAD_INPUT
    printed = capsys.readouterr().err
    assert printed.startswith("sparkfleet: ") and printed.count("\n") == 1 and "no home directory" in printed


def test_who_has_no_home_has_no_logins() -> None:
    with serving(FakeRegistry()) as upstream:
        found = image_digest.resolve(f"{upstream.address}/nvidia/vllm:1", {}, config=NOBODY)
        assert found.digest == digest(upstream.index)
