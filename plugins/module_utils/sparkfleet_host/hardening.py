# SPDX-License-Identifier: Apache-2.0
"""What the services on a host may do, as properties of systemd: for transient units (`systemd-run --property=…`) and
for the units that the role `guard` writes.

Left out on purpose, for all that start an engine (SWITCH, and the guard's own unit): ProcSubset=pid and a read-only
/proc/sys/vm/drop_caches, because the page cache is dropped before each start; User=, because Docker's socket is root.
"""

from __future__ import annotations

from collections.abc import Iterable

#: For every service: sees the host's files read-only, no devices, no kernel, none but usual system calls, and no
#: network but sockets. It writes where `writable` says.
COMMON = (
    "NoNewPrivileges=yes",
    "ProtectSystem=strict",
    "ProtectHome=read-only",  # the model cache may be there
    "PrivateTmp=yes",
    "PrivateDevices=yes",
    "DevicePolicy=closed",
    "ProtectClock=yes",
    "ProtectHostname=yes",
    "ProtectKernelLogs=yes",
    "ProtectKernelModules=yes",
    "ProtectKernelTunables=yes",
    "ProtectControlGroups=yes",
    "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6",
    "RestrictNamespaces=yes",
    "RestrictRealtime=yes",
    "RestrictSUIDSGID=yes",
    "LockPersonality=yes",
    "MemoryDenyWriteExecute=yes",
    "KeyringMode=private",
    "SystemCallArchitectures=native",
    "SystemCallFilter=@system-service",
    "SystemCallFilter=~@privileged @resources @obsolete",
    "SystemCallErrorNumber=EPERM",
)
#: Root without rights over the kernel or other processes: what belongs to others it may read and write.
FILES = ("CapabilityBoundingSet=CAP_DAC_OVERRIDE",)
#: May read every file and nothing else: share, integrity.
READS = ("CapabilityBoundingSet=CAP_DAC_READ_SEARCH",)
#: Drops the page cache, the one setting of the kernel that it may write.
DROPS_CACHES = ("ReadWritePaths=/proc/sys/vm/drop_caches",)


def writable(paths: Iterable[str]) -> list[str]:
    """Folders that a service may write to; one that is not there is passed over."""
    return [f"ReadWritePaths=-{path}" for path in paths]


def switch(project_dir: str, state_dir: str, cache_dir: str = "/opt/hf", more: Iterable[str] = ()) -> list[str]:
    """Properties of the transient unit of the switch: writes releases and journal, marks a model of the cache whose
    files are to be checked, removes what no release needs (below `more` as well), drops the page cache, talks to Docker
    and to the engine."""
    return [
        *COMMON,
        # It names the process that holds the engine's port.
        f"{FILES[0]} CAP_SYS_PTRACE",
        *DROPS_CACHES,
        "UMask=0022",
        "RuntimeDirectory=sparkfleet",
        "RuntimeDirectoryMode=0700",
        "RuntimeDirectoryPreserve=yes",
        *writable((project_dir, state_dir, cache_dir, "/etc/sparkfleet", *more)),
    ]


def share(paths: Iterable[str] = ()) -> list[str]:
    """Properties of the transient units of share and tunnel: read files that fetches of others need, listen. Other
    processes stay visible: whether the download that a file waits for still runs is seen in /proc."""
    return [
        *COMMON,
        *READS,
        "ProtectHome=read-only",  # Docker's logins of root, and a bundle or cache that lies in a home
        "MemoryMax=2G",
        "TasksMax=1024",
        *writable(paths),
    ]


def arguments(properties: Iterable[str]) -> list[str]:
    """The same as options of systemd-run."""
    return [f"--property={item}" for item in properties]
