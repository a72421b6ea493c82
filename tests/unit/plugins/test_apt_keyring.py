"""Keys of package repositories, made with the real GnuPG where it is there, else the one that was made with it."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import apt_keyring
import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.bounded import BoundsError
from hypothesis import given
from hypothesis import strategies as st

from tests.unit import DATA

#: Two keys (ed25519, made by GnuPG 2.2 with --quick-generate-key), and what `gpg --with-colons` says of them.
FIRST, SECOND = (DATA / f"key-{name}.asc" for name in ("first", "second"))
PRINTS = json.loads((DATA / "keys.json").read_text(encoding="utf-8"))


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    file = tmp_path / "served"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(file.read_bytes())

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/key", file
        server.shutdown()


def run(capsys: pytest.CaptureFixture[str], check: bool = False, **arguments: Any) -> dict[str, Any]:
    with patch_module_args({**arguments, "_ansible_check_mode": check}), pytest.raises(SystemExit):
        apt_keyring.main()
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_fingerprints_are_those_of_gnupg() -> None:
    for file, name in ((FIRST, "first"), (SECOND, "second")):
        assert list(apt_keyring.keys(file.read_bytes())) == [PRINTS[name]]
        assert list(apt_keyring.keys(apt_keyring.binary(file.read_bytes()))) == [PRINTS[name]]


def test_only_the_key_that_is_meant_is_kept(
    tmp_path: Path, site: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    url, served = site
    served.write_bytes(FIRST.read_bytes() + SECOND.read_bytes())
    dest = tmp_path / "keyrings" / "x.gpg"
    spaced = " ".join(PRINTS["second"][place : place + 4] for place in range(0, 40, 4)).lower()
    wanted = {"url": url, "dest": str(dest), "fingerprints": [spaced]}
    assert run(capsys, check=True, **wanted)["changed"] and not dest.exists()
    assert run(capsys, **wanted)["changed"]
    assert dest.read_bytes() == apt_keyring.binary(SECOND.read_bytes()) and dest.stat().st_mode & 0o777 == 0o644
    served.unlink()  # not asked again
    assert not run(capsys, **wanted)["changed"]


def test_another_key_is_not_written(tmp_path: Path, site: tuple[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    url, served = site
    served.write_bytes(FIRST.read_bytes())
    result = run(capsys, url=url, dest=str(tmp_path / "x.gpg"), fingerprints=[PRINTS["second"]])
    assert result["failed"] and PRINTS["first"] in result["msg"] and not (tmp_path / "x.gpg").exists()
    served.write_bytes(b"<html>" + b"x" * 300_000)
    assert "more than" in run(capsys, url=url, dest=str(tmp_path / "x.gpg"), fingerprints=[PRINTS["first"]])["msg"]


@given(st.one_of(st.binary(max_size=400), st.integers(0, 200).map(lambda cut: base64.b64decode(b"mDMEZg==")[:cut])))
def test_bytes_from_outside_end_as_a_bounds_error(data: bytes) -> None:
    with contextlib.suppress(BoundsError):
        apt_keyring.keys(data)
