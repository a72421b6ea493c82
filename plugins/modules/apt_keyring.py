#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""The key of a package repository, by its fingerprint."""

from __future__ import annotations

DOCUMENTATION = r"""
module: apt_keyring
short_description: Fetches the key of a package repository and keeps it only if its fingerprint matches
description:
  - Downloads OpenPGP public keys, armored or not, and writes those whose fingerprints are named into a keyring for
    C(Signed-By). Other keys are left out; if none matches, nothing is written.
  - A keyring that already has them is left unchanged, without a download. Does not need GnuPG.
options:
  url: {description: URL of the keys., type: str, required: true}
  dest: {description: The keyring; its folder is created., type: path, required: true}
  fingerprints:
    description: Fingerprints of 40 hexadecimal digits; spaces are ignored.
    type: list
    elements: str
    required: true
  proxy: {description: "Proxy between the host and the address, http://...", type: str, default: ""}
  no_proxy: {description: Names to reach without it separated by commas., type: str, default: ""}
author: ["The Sparkfleet developers"]
attributes:
  check_mode: {support: full, description: Reports whether the file would change; downloads nothing.}
  diff_mode: {support: none, description: Its content is binary.}
"""

EXAMPLES = r"""
- name: Fetch the key of Docker's repository
  sparkfleet.dgx.apt_keyring:
    url: https://download.docker.com/linux/ubuntu/gpg
    dest: /etc/apt/keyrings/docker.gpg
    fingerprints: ["9DC8 5822 9FC7 DD38 854A E2D8 8D81 803C 0EBF CD88"]
"""

RETURN = r"""
dest: {description: The keyring., returned: always, type: str}
"""

import base64
import hashlib
import http.client
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.bounded import (
    KIB,
    BoundsError,
    printable,
    read_all,
    read_file,
)
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.redaction import passwords
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.registry import bypasses
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.releases import write_bytes

SECONDS = 30
LIMIT = 256 * KIB
PUBLIC_KEY = 6  # tag of a packet (RFC 4880, 4.3)
FINGERPRINT = re.compile(r"[0-9A-F]{40}")


def packets(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Packets of OpenPGP: tag, body, and the whole as it stands. Raises BoundsError."""
    place = 0
    while place < len(data):
        start, head = place, data[place]
        try:
            if not head & 0x80:
                raise BoundsError("keys: not OpenPGP")
            if head & 0x40:  # RFC 4880, 4.2.2
                tag, first, place = head & 0x3F, data[place + 1], place + 2
                if first < 192:
                    size = first
                elif first < 224:
                    size, place = ((first - 192) << 8) + data[place] + 192, place + 1
                elif first == 255:
                    size, place = int.from_bytes(data[place : place + 4], "big"), place + 4
                else:
                    raise BoundsError("keys: a packet of unknown length")
            else:
                tag, kind = head >> 2 & 0xF, head & 3
                if kind == 3:
                    raise BoundsError("keys: a packet of unknown length")
                width = 1 << kind
                size, place = int.from_bytes(data[place + 1 : place + 1 + width], "big"), place + 1 + width
        except IndexError:
            raise BoundsError("keys: cut short") from None
        if place + size > len(data):
            raise BoundsError("keys: cut short")
        yield tag, data[place : place + size], data[start : place + size]
        place += size


def binary(data: bytes) -> bytes:
    """Keys without their armor. Raises BoundsError."""
    blocks = re.findall(
        rb"-----BEGIN PGP PUBLIC KEY BLOCK-----(.*?)-----END PGP PUBLIC KEY BLOCK-----", data, re.DOTALL
    )
    if not blocks:
        return data
    try:
        # Headers end with an empty line; a line that begins with = is a checksum.
        bodies = [re.split(rb"\r?\n[ \t]*\r?\n", block, maxsplit=1)[-1] for block in blocks]
        lines = [b"".join(line for line in body.split() if not line.startswith(b"=")) for body in bodies]
        return b"".join(base64.b64decode(line, validate=True) for line in lines)
    except ValueError as error:
        raise BoundsError(f"keys: not armored OpenPGP: {error}") from None


def keys(data: bytes) -> dict[str, bytes]:
    """Fingerprint -> the key with all that belongs to it. Raises BoundsError."""
    found: dict[str, bytes] = {}
    current = ""
    for tag, body, whole in packets(binary(data)):
        if tag == PUBLIC_KEY:
            if body[:1] != b"\x04":
                raise BoundsError("keys: not of version 4")
            current = (
                hashlib.sha1(b"\x99" + len(body).to_bytes(2, "big") + body, usedforsecurity=False).hexdigest().upper()
            )
            found[current] = b""
        if not current:
            raise BoundsError("keys: they do not start with a public key")
        found[current] += whole
    return found


def chosen(data: bytes, wanted: list[str], where: str) -> bytes:
    """The keyring with what is wanted. Raises BoundsError."""
    found = keys(data)
    kept = b"".join(found[name] for name in wanted if name in found)
    if not kept:
        there = printable(", ".join(found) or "none", 400)
        raise BoundsError(f"{where} has none of the wanted keys ({', '.join(wanted)}), but {there}")
    return kept


def download(url: str, proxy: str = "", no_proxy: str = "") -> bytes:
    """What is at an address. Raises OSError, http.client.HTTPException, BoundsError."""
    parts = urllib.parse.urlsplit(url)
    proxies = urllib.request.getproxies()
    if proxy:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        proxies = {} if bypasses(parts.hostname or "", port, no_proxy) else {"http": proxy, "https": proxy}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies))
    with opener.open(url, timeout=SECONDS) as answer:
        content: bytes = read_all(answer.read, url, LIMIT, time.monotonic() + SECONDS)
        return content


def is_current(path: Path, wanted: list[str]) -> bool:
    """Whether the keyring has a wanted key and no other."""
    try:
        found = keys(read_file(path, LIMIT))
    except (OSError, BoundsError):
        return False
    return bool(found) and set(found) <= set(wanted)


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "required": True},
            "dest": {"type": "path", "required": True},
            "fingerprints": {"type": "list", "elements": "str", "required": True, "no_log": False},
            "proxy": {"type": "str", "default": ""},
            "no_proxy": {"type": "str", "default": ""},
        },
        supports_check_mode=True,
    )
    module.no_log_values.update(passwords(module.params["proxy"]))
    url, path = module.params["url"], Path(module.params["dest"])
    wanted = [re.sub(r"\s", "", text).upper() for text in module.params["fingerprints"]]
    if not wanted or not all(FINGERPRINT.fullmatch(text) for text in wanted):
        module.fail_json(msg="fingerprints: 40 hexadecimal digits each")
    if not re.match(r"https?://", url):
        module.fail_json(msg=f"url: {url} is not an http(s) URL")
    changed = not is_current(path, wanted)
    if changed and not module.check_mode:
        try:
            write_bytes(path, chosen(download(url, module.params["proxy"], module.params["no_proxy"]), wanted, url))
        except BoundsError as error:
            module.fail_json(msg=f"{error}. Nothing was written")
        except (OSError, http.client.HTTPException) as error:
            module.fail_json(msg=f"{url}: {getattr(error, 'reason', error)}")
    module.exit_json(changed=changed, dest=str(path))


if __name__ == "__main__":
    main()
