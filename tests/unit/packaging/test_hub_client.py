"""The packed client: same bytes from same inputs, and nothing it needs is left out."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from sparkfleet import SparkfleetError
from sparkfleet.packaging import hub_client


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub_client.build(tmp_path_factory.mktemp("client"))


def test_same_bytes_every_time(client: Path, tmp_path: Path) -> None:
    again = hub_client.build(tmp_path)
    assert hashlib.sha256(again.read_bytes()).digest() == hashlib.sha256(client.read_bytes()).digest()


def test_up_to_date_is_left_alone_and_fast(client: Path) -> None:
    before = client.stat()
    began = time.monotonic()
    assert hub_client.build(client.parent) == client
    assert time.monotonic() - began < 1
    after = client.stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)


def test_changed_or_damaged_is_recreated(client: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / hub_client.NAME
    target.write_bytes(b"damaged")
    assert hub_client.build(tmp_path).read_bytes() == client.read_bytes()
    other = {"sparkfleet/fetch_model.py": b"def run() -> None:\n    print('other')\n"}
    monkeypatch.setattr(hub_client, "_ours", lambda: other)
    assert hub_client.build(tmp_path).read_bytes() != client.read_bytes()


def test_pure_python_and_small(client: Path) -> None:
    names = zipfile.ZipFile(client).namelist()
    assert not [name for name in names if name.endswith((".so", ".pyd", ".pyc", ".pyi"))]
    assert {name.split("/")[0] for name in names} >= {"__main__.py", "huggingface_hub", "httpx2", "sparkfleet_host"}
    assert not [name for name in names if name.startswith(("hf_xet", "click"))]
    assert [name for name in names if "licenses/LICENSE" in name]
    assert client.stat().st_size < 3_000_000


def test_runs_without_any_package(client: Path) -> None:
    """-I -S: the standard library alone, as in the container on a Spark."""
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-B", str(client), "--help"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "--cache-dir" in run.stdout


def test_missing_package_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SparkfleetError, match="no-such-package is not installed"):
        hub_client.distributions("no-such-package")
