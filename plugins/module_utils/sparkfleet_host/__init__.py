# SPDX-License-Identifier: Apache-2.0
"""What runs on a Spark: standard library only, Python 3.10 or newer.

Ansible's modules import it from here; `sparkfleet.packaging.host_program` packs it into one file for the services on
the host.
"""

import os

#: Where a host's programs are. A login without a shell's files, or a sudo without secure_path, may leave out the sbin
#: folders, where dockerd, swapon and others are.
PROGRAMS = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")


def complete_path(path: str) -> str:
    """A search path with all folders of PROGRAMS, missing ones appended."""
    parts = [part for part in path.split(os.pathsep) if part]
    return os.pathsep.join([*parts, *(part for part in PROGRAMS if part not in parts)])


os.environ["PATH"] = complete_path(os.environ.get("PATH", ""))
