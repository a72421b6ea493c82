#!/usr/bin/env python3
"""ssh, ssh-keyscan and ssh-copy-id of a network that is a file: $FAKE_SSH/world.json, address:port -> a host.

What they print is OpenSSH's, word for word (9.2). Each call is a line of $FAKE_SSH/calls.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

HOME = Path(os.environ.get("FAKE_SSH", "."))
KNOWN = HOME / "known_hosts"
WORLD = HOME / "world.json"


def main() -> int:
    program, words = Path(sys.argv[0]).name, sys.argv[1:]
    with (HOME / "calls").open("a", encoding="utf-8") as calls:
        calls.write(" ".join([program, *words]) + "\n")
    options, rest = take(words)
    return {"ssh": ssh, "ssh-keyscan": keyscan, "ssh-copy-id": copy_id}[program](options, rest)


def take(words: list[str]) -> tuple[dict[str, str], list[str]]:
    options: dict[str, str] = {}
    while words and words[0].startswith("-"):
        word = words.pop(0)
        if word == "--":
            break
        if word in ("-G", "-T") and (word == "-G" or not words[0].isdecimal()):
            options[word] = ""
        elif word == "-o":
            name, _, value = words.pop(0).partition("=")
            options[name] = value
        else:
            options[word] = words.pop(0)
    return options, words


def at(options: dict[str, str], address: str) -> tuple[str, dict[str, object] | None]:
    world = json.loads(WORLD.read_text(encoding="utf-8"))
    port = options.get("-p", "22")
    return (address if port == "22" else f"[{address}]:{port}"), world.get(f"{address}:{port}")


def ssh(options: dict[str, str], rest: list[str]) -> int:
    address, user, port = rest[0], options.get("-l", "me"), options.get("-p", "22")
    if "-G" in options:
        if "Foo" in options:
            print("command-line: line 0: Bad configuration option: foo", file=sys.stderr)
            return 255
        print(f"user {user}\nhostname {address}\nport {port}\nhashknownhosts no\nuserknownhostsfile {KNOWN} {KNOWN}2")
        print(f"identityfile {options.get('-i', HOME / 'id_ed25519')}\nidentityfile {HOME / 'id_other'}")
        return 0
    script = sys.stdin.read()
    name, host = at(options, address)
    if host is None:
        print(f"ssh: connect to host {address} port {port}: No route to host", file=sys.stderr)
        return 255
    lines = KNOWN.read_text(encoding="utf-8").splitlines() if KNOWN.exists() else []
    keys = [line.split()[2] for line in lines if line.split()[0] == name]
    if options.get("StrictHostKeyChecking") != "yes" or options.get("BatchMode") != "yes":
        print("it would have asked, or accepted any key", file=sys.stderr)
        return 255
    if not keys:
        print(f"No ED25519 host key is known for {name} and you have requested strict checking.", file=sys.stderr)
        print("Host key verification failed.", file=sys.stderr)
        return 255
    if host["key"] not in keys:
        print("@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @", file=sys.stderr)
        print(f"Host key for {name} has changed and you have requested strict checking.", file=sys.stderr)
        print("Host key verification failed.", file=sys.stderr)
        return 255
    if not host["login"]:
        ways = "publickey,password" if host["passwords"] else "publickey"
        print(f"{user}@{address}: Permission denied ({ways}).", file=sys.stderr)
        return 255
    if rest[1:] != ["sh", "-s"] or "MemTotal" not in script:
        return 127
    mark = script.partition("mark=")[2].partition("\n")[0]
    print(host.get("banner", "Welcome to DGX OS"))
    for key in ("hostname", "machine", "gpu", "total", "available", "python", "sudo"):
        print(f"{mark}:{key}={host[key]}")
    print(f"{mark}:user={user}\n{mark}:end=yes")
    return 0


def keyscan(options: dict[str, str], rest: list[str]) -> int:
    name, host = at(options, rest[0])
    if host:
        print(
            f"# {name} SSH-2.0-OpenSSH_9.6\n{name} ssh-rsa AAAAB3NzaC1yc2EAAAADAQAB\n{name} ssh-ed25519 {host['key']}"
        )
    return 0


def copy_id(options: dict[str, str], rest: list[str]) -> int:
    world = json.loads(WORLD.read_text(encoding="utf-8"))
    address = rest[0].partition("@")[2]
    world[f"{address}:{options.get('-p', '22')}"]["login"] = Path(options["-i"]).is_file()
    WORLD.write_text(json.dumps(world), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
