"""Certificate authorities of a host, with the distribution's own update-ca-certificates in a root of its own, and a
server whose certificate a private CA issued."""

from __future__ import annotations

import json
import os
import shutil
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import ca_trust
import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host import trust

from tests.unit.fakes.authority import Authority

PROGRAM = shutil.which("update-ca-certificates", path=f"{os.defpath}:/usr/sbin:/sbin") or ""
pytestmark = pytest.mark.skipif(not PROGRAM, reason="no update-ca-certificates here")
REGISTRY = "registry.example:5000"


class Hello(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def store(tmp_path: Path, authority: Authority) -> trust.Store:
    """A host that trusts one CA of its distribution, and one that its owner added."""
    distribution, local, etc = (tmp_path / name for name in ("distribution", "local", "etc"))
    for folder in (distribution, local, etc, tmp_path / "hooks"):
        folder.mkdir()
    (distribution / "public.crt").write_text(Authority(tmp_path / "a", "Public CA").pem)
    (local / "owner.crt").write_text(Authority(tmp_path / "b", "CA of the owner").pem)
    (tmp_path / "conf").write_text("public.crt\n")
    words = {"certsdir": distribution, "localcertsdir": local, "etccertsdir": etc, "hooksdir": tmp_path / "hooks"}
    options = [word for name, path in words.items() for word in (f"--{name}", str(path))]
    options += ["--certsconf", str(tmp_path / "conf")]
    made = trust.Store(local, etc, tmp_path / "docker", PROGRAM, tuple(options))
    made._update()
    return made


@pytest.fixture
def module(
    store: trust.Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Any]:
    monkeypatch.setattr(ca_trust, "Store", lambda: store)

    def run(pem: str, registries: tuple[str, ...] = (REGISTRY,), check: bool = False) -> dict[str, Any]:
        arguments = {"certificates": pem, "registries": list(registries), "_ansible_check_mode": check}
        with patch_module_args(arguments), pytest.raises(SystemExit):
            ca_trust.main()
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return run


def listing(store: trust.Store) -> dict[str, str]:
    folders = [folder for folder in (store.local, store.etc, store.docker) if folder.exists()]
    paths = [path for folder in folders for path in folder.rglob("*")]
    return {
        str(path): str(path.readlink()) if path.is_symlink() else path.read_text()
        for path in paths
        if not path.is_dir()
    }


def reaches(store: trust.Store, address: str) -> bool:
    """Whether a program of the host that reads the bundle, and one that reads the folder, verify a server."""
    answers = set()
    for place in ({"cafile": str(store.bundle)}, {"capath": str(store.etc)}):
        context = ssl.create_default_context(**place)
        try:
            with urllib.request.urlopen(f"https://{address}/", timeout=10, context=context) as answer:
                answers.add(answer.status == 200)
        except urllib.error.URLError as error:
            assert isinstance(error.reason, ssl.SSLCertVerificationError)
            answers.add(False)
    (found,) = answers
    return found


def test_a_ca_comes_and_goes(store: trust.Store, authority: Authority, module: Callable[..., Any]) -> None:
    before = listing(store)
    with authority.serving(Hello) as address:
        assert not reaches(store, address)
        shown = module(authority.pem, check=True)
        assert shown["changed"] and listing(store) == before
        done = module(authority.pem)
        assert done == shown | {"invocation": done["invocation"]} and reaches(store, address)
        assert (store.docker / REGISTRY / "sparkfleet-ca.crt").read_text() == authority.pem
        assert [change["after"] for change in done["diff"]] == [authority.pem] * 2
        assert not any(change["before"] for change in done["diff"])

        same = listing(store)
        again = module(authority.pem)
        assert (again["changed"], again["written"], again["diff"]) == (False, [], []) and listing(store) == same

        shown = module("", (), check=True)
        assert shown["changed"] and listing(store) == same
        gone = module("", ())
        assert gone["removed"] == shown["removed"] == done["written"] and not reaches(store, address)
        assert listing(store) == before and not (store.docker / REGISTRY).exists()
        assert not module("", ())["changed"]


def test_another_ca_takes_its_place(
    store: trust.Store, authority: Authority, module: Callable[..., Any], tmp_path: Path
) -> None:
    module(authority.pem)
    (store.docker / REGISTRY / "theirs.crt").write_text("theirs")
    new = Authority(tmp_path / "new", "New CA")
    done = module(authority.pem + new.pem)
    assert len(done["written"]) == 2 and not done["removed"]
    with authority.serving(Hello) as old, new.serving(Hello) as newer:
        assert reaches(store, old) and reaches(store, newer)
        assert len(module(new.pem)["removed"]) == 1
        assert not reaches(store, old) and reaches(store, newer)
    assert len(module("", ())["removed"]) == 2
    assert (store.docker / REGISTRY / "theirs.crt").read_text() == "theirs"


def test_a_registry_that_no_engine_uses_now_keeps_its_file(
    store: trust.Store, authority: Authority, module: Callable[..., Any], tmp_path: Path
) -> None:
    """A rollback may pull from it; with another CA, or none, it goes."""
    module(authority.pem)
    assert module(authority.pem, ("nvcr.io",))["removed"] == []
    assert sorted(path.name for path in store.docker.iterdir()) == ["nvcr.io", REGISTRY]
    assert not module(authority.pem, ("nvcr.io",))["changed"]
    other = Authority(tmp_path / "other", "Another CA")
    assert str(store.docker / REGISTRY / "sparkfleet-ca.crt") in module(other.pem, ("nvcr.io",))["removed"]


def test_a_run_that_was_interrupted_is_completed(
    store: trust.Store, authority: Authority, module: Callable[..., Any]
) -> None:
    """The files are there, or gone, and the bundle was not written again."""
    before = listing(store)
    (name,) = trust.split(authority.pem)
    (store.local / name).write_text(authority.pem)
    with authority.serving(Hello) as address:
        assert module(authority.pem, ())["changed"] and reaches(store, address)
        (store.local / name).unlink()
        assert module("", ())["changed"] and not reaches(store, address)
    assert listing(store) == before


def test_without_the_program_nothing_is_written(authority: Authority, tmp_path: Path) -> None:
    store = trust.Store(tmp_path / "local", tmp_path / "etc", tmp_path / "docker", str(tmp_path / "missing"))
    with pytest.raises(trust.TrustError, match="missing is missing: install the package ca-certificates"):
        store.apply(authority.pem, [REGISTRY])
    assert not list(tmp_path.iterdir())
    store.apply("", [])  # nothing was ever there


def test_a_program_that_fails_is_quoted(store: trust.Store, authority: Authority, module: Callable[..., Any]) -> None:
    (store.etc / "ca-certificates.crt").unlink()
    shutil.rmtree(store.etc)
    assert "update-ca-certificates failed (" in module(authority.pem)["msg"]


def test_the_name_of_a_registry_is_no_path(
    authority: Authority, module: Callable[..., Any], store: trust.Store
) -> None:
    before = listing(store)
    assert "is not HOST or HOST:PORT" in module(authority.pem, ("../../etc",))["msg"]
    assert listing(store) == before


def test_what_asks_before_the_host_trusts_it(authority: Authority) -> None:
    with authority.serving(Hello) as address:
        urllib.request.urlopen(f"https://{address}/", timeout=10, context=trust.context(authority.pem)).close()
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            urllib.request.urlopen(f"https://{address}/", timeout=10, context=trust.context(""))
