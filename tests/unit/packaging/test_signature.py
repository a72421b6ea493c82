"""Signatures of bundles and locks, by ssh-keygen itself."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from sparkfleet import SparkfleetError
from sparkfleet.packaging import signature
from sparkfleet.packaging.signature import BUNDLE, LOCK


def make(folder: Path, name: str, passphrase: str = "") -> Path:
    file = folder / name
    argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-C", name, "-f", str(file)]
    subprocess.run(argv, check=True, capture_output=True, timeout=30)
    return file


def signers(folder: Path, *keys: Path, options: str = "") -> str:
    """The file of those who may sign."""
    file = folder / "signers"
    lines = (f"{key.name}@example.com {options}{key.with_suffix('.pub').read_text(encoding='utf-8')}" for key in keys)
    file.write_text("".join(lines), encoding="utf-8")
    return str(file)


def test_who_signed_is_told(tmp_path: Path) -> None:
    alice, bob = make(tmp_path, "alice"), make(tmp_path, "bob")
    data = tmp_path / "bundle.json"
    data.write_bytes(b"{}")
    made = signature.sign(data, str(bob), BUNDLE).read_bytes()
    allowed = signers(tmp_path, alice, bob)
    assert signature.check(b"{}", made, allowed, "it", BUNDLE) == "bob@example.com"
    with pytest.raises(SparkfleetError, match="it is not signed by anyone in"):
        signature.check(b"{ }", made, allowed, "it", BUNDLE)
    with pytest.raises(SparkfleetError, match="it is not signed by anyone in"):
        signature.check(b"{}", made, signers(tmp_path, alice), "it", BUNDLE)
    with pytest.raises(SparkfleetError, match="it is not signed by anyone in"):
        signature.check(b"{}", b"no signature", allowed, "it", BUNDLE)
    with pytest.raises(SparkfleetError, match="it is not signed, and sparkfleet_bundle_signers wants"):
        signature.check(b"{}", None, allowed, "it", BUNDLE)
    expired = signers(tmp_path, bob, options='valid-before="20200101" ')
    with pytest.raises(SparkfleetError, match="it is not signed by anyone in"):
        signature.check(b"{}", made, expired, "it", BUNDLE)


def test_a_signature_of_another_kind_is_none(tmp_path: Path) -> None:
    key = make(tmp_path, "alice")
    data = tmp_path / "bundle.json"
    data.write_bytes(b"{}")
    of_lock = signature.sign(data, str(key), LOCK).read_bytes()
    assert signature.check(b"{}", of_lock, signers(tmp_path, key), "it", LOCK) == "alice@example.com"
    with pytest.raises(SparkfleetError, match="it is not signed by anyone in"):
        signature.check(b"{}", of_lock, signers(tmp_path, key), "it", BUNDLE)
    signature.beside(data).unlink()
    argv = ["ssh-keygen", "-q", "-Y", "sign", "-f", str(key), "-n", "git", str(data)]
    subprocess.run(argv, check=True, capture_output=True, timeout=30)
    with pytest.raises(SparkfleetError, match="it is not signed by anyone in"):
        signature.check(b"{}", (tmp_path / "bundle.json.sig").read_bytes(), signers(tmp_path, key), "it", BUNDLE)


def test_a_key_that_cannot_sign_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    data = tmp_path / "bundle.json"
    data.write_bytes(b"{}")
    for name, words in (("nowhere", "is not a file"), ("locked", "does not sign: "), ("text", "does not sign: ")):
        if name == "locked":
            make(tmp_path, name, "a passphrase")
        if name == "text":
            (tmp_path / name).write_text("no key", encoding="utf-8")
        with pytest.raises(SparkfleetError, match=f"sparkfleet_bundle_key: .*{name} {words}"):
            signature.sign(data, str(tmp_path / name), BUNDLE)
    with pytest.raises(SparkfleetError, match=r"sparkfleet_bundle_signers: .*nowhere is not a file"):
        signature.check(b"{}", b"", str(tmp_path / "nowhere"), "it", BUNDLE)


def test_without_ssh_keygen_nothing_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = signers(tmp_path, make(tmp_path, "alice"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SparkfleetError, match="ssh-keygen is not installed"):
        signature.check(b"{}", b"x", allowed, "it", BUNDLE)
