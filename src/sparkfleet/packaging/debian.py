"""Names and versions of a distribution's packages, as dpkg has them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

PACKAGE = re.compile(r"[a-z0-9][a-z0-9.+-]{1,99}")
VERSION = re.compile(r"[0-9][A-Za-z0-9.+:~-]{0,199}")
#: What `system_name` gives.
SYSTEM = re.compile(r"[a-z0-9._-]{1,40} [a-z0-9._-]{0,40} [a-z0-9_]{1,40}")
#: Packages that the stage prepare installs, with those that Docker's bring with them.
PREPARED = (
    *("docker.io", "docker-cli", "docker-compose", "docker-compose-v2"),
    *("docker-ce", "docker-ce-cli", "containerd.io", "docker-compose-plugin"),
    *("containerd", "runc", "nvidia-container-toolkit", "earlyoom", "nftables"),
)


def system_name(system: Mapping[str, Any]) -> str:
    """What versions of packages are of: distribution, its release, the processor ("ubuntu noble aarch64")."""
    return " ".join(str(system.get(key) or "") for key in ("id", "codename", "machine"))
