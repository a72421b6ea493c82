"""What an audit reads on a host, and the search for copies of secrets, on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sparkfleet_host import audit, copies

SECRET = "a-secret-that-is-nowhere-else-" + "7" * 8


def searched(*paths: Path, allowed: tuple[Path, ...] = ()) -> list[str]:
    result = copies.search([SECRET], list(map(str, paths)), list(map(str, allowed)), 30)
    assert not result["unfinished"]
    found: list[str] = result["found"]
    return found


def test_copies_are_found_wherever_they_are_in_a_file(tmp_path: Path) -> None:
    places = [tmp_path / name for name in ("whole", "sub/deep/edge", "binary", "allowed", "none")]
    for path in places:
        path.parent.mkdir(parents=True, exist_ok=True)
    places[0].write_text(SECRET)
    places[1].write_bytes(
        b"x" * (copies.CHUNK - 10) + SECRET.encode() + b"x" * copies.CHUNK
    )  # over the edge of two reads
    places[2].write_bytes(os.urandom(100) + SECRET.encode() + b"\0")
    places[3].write_text(SECRET)
    places[4].write_text(SECRET[:-1])
    (tmp_path / "link").symlink_to(places[0])
    os.mkfifo(tmp_path / "pipe")
    assert sorted(searched(tmp_path, allowed=(places[3],))) == sorted(map(str, places[:3]))


def test_the_end_of_a_huge_file_is_searched(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("wb") as file:
        file.truncate(copies.LARGEST + (8 << 20))
        file.seek(0, os.SEEK_END)
        file.write(SECRET.encode())
    assert searched(path) == [str(path)]


def test_processes_are_searched_but_not_those_that_ask(tmp_path: Path) -> None:
    sleep = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]
    for argv, environment in (([*sleep, SECRET], None), (sleep, {"KEY": SECRET})):
        with subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None and child.stdout.readline() == b"up\n"
            try:
                (found,) = searched(tmp_path)
                assert found.startswith(f"/proc/{child.pid}/")
            finally:
                child.kill()
    script = f"from sparkfleet_host import copies; print(copies.search([{SECRET!r}], [], [], 30)['found'])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_search_has_its_time(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100)
    began = time.monotonic()
    result = copies.search([SECRET], [str(tmp_path)], [], 0.0)
    assert result["unfinished"] and time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("words", "address"),
    [
        ("0100007F", "127.0.0.1"),
        ("00000000", "0.0.0.0"),  # noqa: S104 - what a host says
        ("0" * 32, "::"),
        ("0" * 24 + "01000000", "::1"),
        ("0000000000000000FFFF00000100007F", "127.0.0.1"),
        ("B80D0120000000000000000001000000", "2001:0db8:0000:0000:0000:0000:0000:0001"),
    ],
)
def test_addresses_of_sockets(words: str, address: str) -> None:
    assert audit.plain_address(words) == address


def test_who_listens() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        (entry,) = [item for item in audit.listeners() if item["port"] == port]
    assert entry["address"] == "127.0.0.1" and entry["process"] == Path("/proc/self/comm").read_text().strip()


@pytest.mark.parametrize(
    ("path", "text", "values"),
    [
        ("/etc/sparkfleet/hf_token", "hf_abcdefgh\n", ["hf_abcdefgh"]),
        ("/opt/sparkfleet/.env", "HF_TOKEN=hf_abcdefgh\n", ["hf_abcdefgh"]),
        (
            "/etc/haproxy/sparkfleet/keys",
            "client-key-1 web/0/0\nclient-key-2 x/1/2\n",
            ["client-key-1", "client-key-2"],
        ),
        ("/etc/haproxy/sparkfleet/engine_keys", "m Bearer engine-key-1\n", ["engine-key-1"]),
        (
            "/etc/sparkfleet/registry_logins.json",
            '{"auths": {"r": {"auth": "dTpwYXNzd29yZA=="}}}',
            ["dTpwYXNzd29yZA==", "password"],
        ),
        ("/etc/sparkfleet/registry_logins.json", "[]", []),
        (str(audit.PROXY_FILE), 'HTTP_PROXY="http://u:pass-word@p:1"\nNO_PROXY="a"\n', ["pass-word"]),
        ("/etc/haproxy/sparkfleet/gateway.pem", "-----BEGIN", []),
    ],
)
def test_the_secrets_in_sparkfleets_own_files(path: str, text: str, values: list[str]) -> None:
    assert list(audit.values_of(Path(path), text)) == values


def test_a_part_that_cannot_be_read_says_why() -> None:
    def broken() -> None:
        raise OSError(2, "No such file", "/x\x1b")

    assert set(audit.part(broken)) == {"error"} and "\x1b" not in audit.part(broken)["error"]


def test_files_that_others_may_change(tmp_path: Path) -> None:
    good, loose = tmp_path / "good", tmp_path / "loose"
    for path, mode in ((good, 0o644), (loose, 0o666)):
        path.write_text("")
        path.chmod(mode)
    if os.geteuid() == 0:
        assert audit._writable(good) is None
    known = audit._writable(loose)
    assert known and known["mode"] == "0666" and known["path"] == str(loose)
