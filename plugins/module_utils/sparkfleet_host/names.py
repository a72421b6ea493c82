# SPDX-License-Identifier: Apache-2.0
"""Names of servers of HAProxy, resolved again and again as this host does it: hosts file, mDNS (NAME.local) and DNS.

HAProxy's own `resolvers` ask DNS servers alone: a name of the hosts file or of mDNS would be declared dead by them.
HAProxy starts with the address that the name resolves to at that moment, or with an unreachable one; `step` gives it
the address when the name comes back or stands for another one.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

SOCKET = "/run/haproxy/admin.sock"
SECONDS = 2.0  # between two checks
SOCKET_SECONDS = 5.0
LIMIT = 4 << 20  # bytes of an answer
STUCK_SECONDS = 60.0  # after which a name that is still being resolved is no longer waited for


def ask(path: str, command: str) -> str:
    """A command for HAProxy's runtime socket; its answer. Raises OSError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(SOCKET_SECONDS)
        connection.connect(path)
        connection.sendall(command.encode() + b"\n")
        parts, size = [], 0
        while part := connection.recv(65536):
            size += len(part)
            if size > LIMIT:
                raise OSError(f"{path}: more than {LIMIT} bytes")
            parts.append(part)
    return b"".join(parts).decode("utf-8", "replace")


def servers(text: str) -> list[dict[str, str]]:
    """The rows of `show servers state` that have a name, by their columns."""
    lines = text.splitlines()
    head = next((line.lstrip("# ").split() for line in lines if line.startswith("#")), [])
    rows = [dict(zip(head, line.split(), strict=False)) for line in lines if line[:1].isdigit()]
    return [row for row in rows if row.get("srv_fqdn", "-") != "-"]


def resolve(name: str) -> list[str]:
    """Addresses that a name stands for here, IPv4 first; none where there is none."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    addresses = [str(item[4][0]) for item in sorted(found, key=lambda item: item[0] != socket.AF_INET)]
    return [address for address in dict.fromkeys(addresses) if "%" not in address]


class Names:
    """Keeps HAProxy's addresses right. `find` resolves a name and may take its time; `say` writes to the journal."""

    def __init__(
        self, path: str = SOCKET, find: Callable[[str], list[str]] = resolve, say: Callable[[str], Any] = print
    ) -> None:
        self.path, self.find, self.say = path, find, say
        self.known: dict[str, list[str]] = {}  # what each name stood for last; one that is lost keeps its address
        self._began: dict[str, float] = {}  # monotonic start times of running lookups

    def step(self) -> None:
        """One step: start resolving every name, set known addresses that differ. Raises OSError of the socket."""
        rows = servers(ask(self.path, "show servers state"))
        for name in {row["srv_fqdn"] for row in rows}:
            self._begin(name)
        for row in rows:
            addresses = self.known.get(row["srv_fqdn"])
            if addresses and row["srv_addr"] not in addresses:
                server = f"{row['be_name']}/{row['srv_name']}"
                answer = ask(self.path, f"set server {server} addr {addresses[0]} port {row['srv_port']}").strip()
                self.say(f"{server}: {row['srv_fqdn']} is {addresses[0]}, was {row['srv_addr']}: {answer}")

    def _begin(self, name: str) -> None:
        """Resolve in a thread of its own, one at a time for each name: mDNS takes seconds for what is away."""
        now = time.monotonic()
        if now - self._began.get(name, now - STUCK_SECONDS) < STUCK_SECONDS:
            return
        self._began[name] = now

        def work() -> None:
            try:
                if found := self.find(name):
                    self.known[name] = found
            finally:
                self._began.pop(name, None)

        threading.Thread(target=work, daemon=True).start()


def main(argv: Sequence[str] | None = None) -> int:
    """`names [--socket PATH]`: runs forever."""
    parser = argparse.ArgumentParser(prog="sparkfleet_host names", description="Resolve the names of HAProxy servers.")
    parser.add_argument("--socket", default=SOCKET)
    options = parser.parse_args(argv)
    names = Names(options.socket, say=lambda text: print(text, flush=True))
    while True:
        # HAProxy is being restarted.
        with contextlib.suppress(OSError):
            names.step()
        time.sleep(SECONDS)
