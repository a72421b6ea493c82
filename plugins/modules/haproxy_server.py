#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Module: takes a server out of HAProxy's rotation, its streams running to their end, or puts it back."""

from __future__ import annotations

DOCUMENTATION = r"""
module: haproxy_server
short_description: Drain a server of HAProxy, or put it back
description:
  - Uses HAProxy's runtime socket. A drained server (in maintenance, in HAProxy's terms) gets no new requests, not even
    from its sticky sessions; with O(timeout) the module waits for running requests to finish.
  - C(ready) waits until a check has found the server up in one of its backends, 30 seconds at most. Until then it gets
    no requests.
  - Several servers are changed in one call. Servers already in the wanted state are left unchanged.
  - A server that is in no backend is not an error, so that a Spark which is not in the gateway yet can be rolled out.
options:
  servers: {description: Names of the servers in their backends., type: list, elements: str, required: true}
  state: {description: C(drain) or C(ready)., type: str, choices: [drain, ready], required: true}
  timeout: {description: Seconds to wait for its sessions to end., type: float, default: 600}
  socket: {description: The runtime socket., type: path, default: /run/haproxy/admin.sock}
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Reports what would change.}
  diff_mode: {support: none, description: The state is in the result.}
"""

EXAMPLES = r"""
- name: Drain running requests
  sparkfleet.dgx.haproxy_server:
    servers: ["{{ inventory_hostname }}"]
    state: drain
  delegate_to: gateway-1
"""

RETURN = r"""
backends: {description: Backends that have one of the servers., returned: always, type: list, elements: str}
before: {description: C(drain) if all of them were drained in all their backends., returned: always, type: str}
sessions: {description: Sessions left when the wait ended., returned: always, type: int}
seconds: {description: Duration of the wait., returned: always, type: float}
"""

import csv
import io
import socket
import time
from collections.abc import Collection, Sequence
from typing import Any

from ansible.module_utils.basic import AnsibleModule

SOCKET_SECONDS = 10.0
POLL = 0.25
FORCED = 0x01 | 0x08  # of srv_admin_state: maintenance and drain by a command
#: HAProxy's own drain keeps sending requests of sticky sessions; maintenance also lets streams finish.
#: That a server has until a check finds it up; one that serves none of the models stays down.
READY_SECONDS = 30.0
WORDS = {"drain": "maint", "ready": "ready"}


class Haproxy:
    """HAProxy's runtime socket. All methods raise OSError."""

    def __init__(self, path: str) -> None:
        self.path = path

    def ask(self, command: str) -> str:
        """One command; its answer."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(SOCKET_SECONDS)
            connection.connect(self.path)
            connection.sendall(command.encode() + b"\n")
            parts = []
            while part := connection.recv(65536):
                parts.append(part)
        return b"".join(parts).decode("utf-8", "replace")

    def rows(self, servers: Collection[str]) -> list[dict[str, str]]:
        """The statistics of servers, a row for each of their backends."""
        text = self.ask("show stat -1 4 -1").lstrip("# ")
        return [row for row in csv.DictReader(io.StringIO(text)) if row["svname"] in servers]

    def forced(self) -> set[tuple[str, str]]:
        """Backend and server of those that are drained or in maintenance by a command. Of one that is down as well,
        the statistics say no more than that it is down."""
        lines = self.ask("show servers state").splitlines()
        head = next((line.lstrip("# ").split() for line in lines if line.startswith("#")), [])
        found = [dict(zip(head, line.split(), strict=False)) for line in lines if line[:1].isdigit()]
        return {
            (row["be_name"], row.get("srv_name", "")) for row in found if int(row.get("srv_admin_state") or 0) & FORCED
        }

    def set(self, backend: str, server: str, state: str) -> None:
        """Change the administrative state. Raises ValueError with what HAProxy says."""
        steps = [f"state {state}"]
        if state == WORDS["ready"]:
            # HAProxy would send it requests until the first check fails; without a weight it gets none meanwhile.
            steps = ["weight 0", *steps, "health down", "weight 100%"]
        error = self.ask("; ".join(f"set server {backend}/{server} {step}" for step in steps)).strip()
        if error:
            raise ValueError(error)


def drained(row: dict[str, str]) -> bool:
    """Whether a row of the statistics is of a drained server."""
    return row["status"].startswith(("DRAIN", "MAINT"))


def change(haproxy: Haproxy, servers: Sequence[str], state: str, timeout: float, check: bool) -> dict[str, Any]:
    """Do it; what the module returns."""
    rows = haproxy.rows(servers)
    forced = haproxy.forced()
    out = {key for row in rows if (key := (row["pxname"], row["svname"])) in forced or drained(row)}
    wrong = [key for row in rows if ((key := (row["pxname"], row["svname"])) in out) != (state == "drain")]
    result: dict[str, Any] = {
        "changed": bool(wrong),
        "backends": sorted({row["pxname"] for row in rows}),
        "before": "drain" if rows and len(out) == len(rows) else "ready",
        "sessions": sum(int(row["scur"] or 0) for row in rows),
        "seconds": 0.0,
    }
    if check:
        return result
    began = time.monotonic()
    for backend, server in wrong:
        haproxy.set(backend, server, WORDS[state])
    while state == "drain" and rows:
        result["sessions"] = sum(int(row["scur"] or 0) for row in haproxy.rows(servers))
        if result["sessions"] == 0 or time.monotonic() - began >= timeout:
            break
        time.sleep(POLL)
    # Until a check has found it up, the others alone serve: the next one must not be drained meanwhile.
    waiting = {server for _, server in wrong} if state == "ready" else set()
    while waiting and time.monotonic() - began < READY_SECONDS:
        waiting -= {row["svname"] for row in haproxy.rows(servers) if row["status"].startswith(("UP", "no check"))}
        if waiting:
            time.sleep(POLL)
    result["seconds"] = round(time.monotonic() - began, 1)
    return result


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "servers": {"type": "list", "elements": "str", "required": True},
            "state": {"type": "str", "choices": ["drain", "ready"], "required": True},
            "timeout": {"type": "float", "default": 600.0},
            "socket": {"type": "path", "default": "/run/haproxy/admin.sock"},
        },
        supports_check_mode=True,
    )
    params = module.params
    try:
        options = {key: params[key] for key in ("servers", "state", "timeout")}
        result = change(Haproxy(params["socket"]), check=module.check_mode, **options)
    except (OSError, ValueError) as error:
        module.fail_json(
            msg=f"HAProxy at {params['socket']}: {error}; is the gateway deployed (playbooks/gateway.yml)?"
        )
        raise SystemExit(1) from None
    module.exit_json(**result)


if __name__ == "__main__":
    main()
