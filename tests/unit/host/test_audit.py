"""What an audit reads on a host, and the search for copies of secrets, on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from sparkfleet_host import audit, copies, http

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


class OneContainer:
    """A Docker that has one."""

    def __init__(self, **detail: Any) -> None:
        self.detail = {"Name": "/c", "Config": {}, "HostConfig": {}, **detail}

    def containers(self, **_: Any) -> list[dict[str, Any]]:
        return [{"Id": "1"}]

    def container(self, _: str) -> dict[str, Any]:
        return self.detail


def test_mounts_of_a_container_are_what_links_name(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    here = [("/run/", True), (f"{tmp_path}/link", False), ("/etc/../etc", True)]
    given = [{"Type": "bind", "Source": source, "RW": writable} for source, writable in here]
    given += [{"Type": "tmpfs", "Source": "", "RW": True}, {"Type": "bind", "Source": http.KEY_FILE, "RW": False}]
    (found,) = audit.containers(OneContainer(Mounts=given))  # type: ignore[arg-type]
    assert [(item["source"], item["writable"]) for item in found["mounts"]] == [
        *(("/run", True), (f"{tmp_path}/run", False), ("/etc", True)),
        (http.KEY_FILE, False),
    ]
    assert found["key"] and not found["ours"]


def test_ports_of_a_container_are_those_that_docker_chose() -> None:
    everywhere = "0.0.0.0"  # noqa: S104 - what Docker says
    chosen = {"80/tcp": [{"HostIp": everywhere, "HostPort": "32768"}, {"HostIp": "::", "HostPort": "32768"}]}
    ports = chosen | {"53/udp": [{"HostIp": "", "HostPort": "53"}], "90/tcp": None}
    wish = {"PortBindings": {"80/tcp": [{"HostIp": "", "HostPort": ""}], "81/tcp": [{"HostPort": "81"}]}}
    (found,) = audit.containers(OneContainer(NetworkSettings={"Ports": ports}, HostConfig=wish))  # type: ignore[arg-type]
    assert [tuple(item.values()) for item in found["published"]] == [
        *((everywhere, 32768, "tcp"), ("::", 32768, "tcp"), (everywhere, 53, "udp")),
    ]
    (found,) = audit.containers(OneContainer(HostConfig=wish))  # type: ignore[arg-type]
    assert [tuple(item.values()) for item in found["published"]] == [(everywhere, 81, "tcp")]


def test_files_that_others_may_change(tmp_path: Path) -> None:
    good, loose = tmp_path / "good", tmp_path / "loose"
    for path, mode in ((good, 0o644), (loose, 0o666)):
        path.write_text("")
        path.chmod(mode)
    if os.geteuid() == 0:
        assert audit._writable(good) is None
    known = audit._writable(loose)
    assert known and known["mode"] == "0666" and known["path"] == str(loose)
