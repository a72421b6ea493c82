# SPDX-License-Identifier: Apache-2.0
"""What monitoring consists of on a host, for the inspection and for removal."""

from __future__ import annotations

from pathlib import Path

UNIT_FOLDER = Path("/etc/systemd/system")
#: The distribution's packages, and the program of each.
PACKAGES = {
    "prometheus": "/usr/bin/prometheus",
    "prometheus-alertmanager": "/usr/bin/prometheus-alertmanager",
    "prometheus-node-exporter": "/usr/bin/prometheus-node-exporter",
}
#: Our instances of them. The distribution's own are left as they are.
UNITS = tuple(f"sparkfleet-{name}.service" for name in ("prometheus", "alertmanager", "node-exporter", "sensors"))
#: What they leave.
FOLDERS = (
    "/etc/sparkfleet/monitoring",
    *("/var/lib/sparkfleet-prometheus", "/var/lib/sparkfleet-alertmanager", "/var/lib/sparkfleet-page"),
)


def units(folder: Path = UNIT_FOLDER) -> list[str]:
    """Those of our units that are on the host."""
    return [name for name in UNITS if (folder / name).exists()]
