# SPDX-License-Identifier: Apache-2.0
"""The proxies of this host's Docker engine with their user and password, which `docker info` hides.

Moby shows http://ops:secret@proxy:3128 as http://xxxxx:xxxxx@proxy:3128 (daemon/info.go, maskCredentials). Docker has
them from daemon.json or its own environment, which root can read.
"""

from __future__ import annotations

import contextlib
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .bounded import KIB, BoundsError, as_dict, parse_json, read_file
from .systemd import service_environment

HIDDEN = "xxxxx:xxxxx"
CONFIGURATION = Path("/etc/docker/daemon.json")
#: Key of `docker info`, in daemon.json and in the environment.
NAMES = {
    "HttpProxy": ("http-proxy", ("HTTP_PROXY", "http_proxy")),
    "HttpsProxy": ("https-proxy", ("HTTPS_PROXY", "https_proxy")),
}


def proxies(info: Mapping[str, Any]) -> dict[str, str]:
    """By scheme ("http", "https") the proxy of `docker info`; one whose password cannot be found stays as it is."""
    found = {}
    for key, (configured, variables) in NAMES.items():
        shown = str(info.get(key) or "")
        scheme = configured.partition("-")[0]
        own = _own(configured, variables) if f"//{HIDDEN}@" in shown else iter(())
        found[scheme] = next((url for url in own if "@" in url and _place(url) == _place(shown)), shown)
    return found


def _place(url: str) -> tuple[str, str]:
    """Scheme, host and port of a URL."""
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.netloc.rpartition("@")[2].lower()


def _own(configured: str, variables: tuple[str, ...]) -> Iterator[str]:
    """What Docker may have it from, in the order that it looks."""
    with contextlib.suppress(OSError, BoundsError):
        known = as_dict(parse_json(read_file(CONFIGURATION, 64 * KIB), CONFIGURATION.name, 64 * KIB), "proxies")
        yield str(as_dict(known.get("proxies"), "proxies").get(configured) or "")
    environment = service_environment("docker.service")
    yield from (environment.get(name, "") for name in variables)
