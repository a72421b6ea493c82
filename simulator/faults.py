"""What can be wrong with a simulated Spark, and how it is put right again.

A fault is a pair of scripts that run inside the host as root, and may run again. What they leave lies in /run, is a
mount or stands in /etc/hosts, which Docker rewrites: a reboot fixes it too. To add a fault, add an entry to FAULTS.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterable, Sequence

from simulator.shell import SimulatorError
from simulator.world import World, run_in

#: The stand-ins of nvidia-smi (gpu.d/*.json) and nvidia-ctk (toolkit-version) read it, and sudo (clock.env).
FOLDER = "/run/simulator"
MACHINE = "/run/systemd/system/ssh.service.d/machine.conf"
PLUGIN = "/usr/libexec/docker/cli-plugins/docker-compose"
OTHER_OS = """PRETTY_NAME="Fedora Linux 42 (Server Edition)"
NAME="Fedora Linux"
ID=fedora
VERSION="42 (Server Edition)"
VERSION_ID=42
VERSION_CODENAME=""
"""
OLD_COMPOSE = """#!/bin/sh
# Stand-in for an old Compose: prints its version and can do nothing else.
case $* in
docker-cli-plugin-metadata)
    echo '{"SchemaVersion":"0.1.0","Vendor":"Docker Inc.","Version":"v2.10.2","ShortDescription":"Docker Compose"}' ;;
*version*--short*) echo 2.10.2 ;;
*version*) echo 'Docker Compose version v2.10.2' ;;
*) echo 'this Compose is a stand-in: python -m simulator fix HOST compose' >&2; exit 1 ;;
esac
"""
XID = f"""#!/bin/sh
case $* in
*short-unix*) echo "$(stat -c %Y "$0").000000 host kernel: NVRM: Xid (PCI:000f:01:00): 31, pid=4242, name=VLLM" ;;
*--dmesg*) echo 'Nov 24 12:00:00 host kernel: NVRM: Xid (PCI:000f:01:00): 31, pid=4242, name=VLLM, Ch 00000002' ;;
*) exec {FOLDER}/journalctl.real "$@" ;;
esac
"""


@dataclasses.dataclass(frozen=True)
class Fault:
    """What is wrong once the first script has run, and no longer is once the second has."""

    what: str
    break_: str
    fix: str


# -- kinds of faults: each makes the two scripts -------------------------------------------------------------------


def _file(name: str, content: str) -> tuple[str, str]:
    """A file of FOLDER is there."""
    return f"printf %s {shlex.quote(content)} >{FOLDER}/{name}", f"rm -f {FOLDER}/{name}"


def _cover(path: str, make: str) -> tuple[str, str]:
    """What the command ``make`` prints lies over a file, which stays as it is underneath."""
    cover = f"{FOLDER}/{path.rpartition('/')[2]}"
    return (
        f"""
if cmp -s {cover} {path}; then exit; fi
{make} >{cover}
chmod --reference={path} {cover}
mount --bind {cover} {path}""",
        f"""
if cmp -s {cover} {path}; then umount --lazy {path}; fi
rm -f {cover}""",
    )


def _text(text: str) -> str:
    return f"printf %s {shlex.quote(text)}"


def _nowhere(mark: str, *names: str) -> tuple[str, str]:
    """Names resolve to the host itself. Docker holds /etc/hosts: it can be written, not replaced."""
    lines = "".join(f"127.0.0.1 {name} # simulator: {mark}\n" for name in names)
    found = f"grep -q '# simulator: {mark}$' /etc/hosts"
    return (
        f"{found} || {_text(lines)} >>/etc/hosts",
        f"""
if {found}; then
    kept=$(grep -v '# simulator: {mark}$' /etc/hosts)
    printf '%s\\n' "$kept" >/etc/hosts
fi""",
    )


# -- the faults ----------------------------------------------------------------------------------------------------

FAULTS = {
    "gpu": Fault(
        "nvidia-smi reports an A100, compute capability 8.0",
        *_file("gpu.d/gpu.json", json.dumps({"name": "NVIDIA A100-PCIE-40GB", "compute_cap": "8.0"})),
    ),
    "gpu-lost": Fault("nvidia-smi finds no device, and ends with 6", *_file("gpu.d/lost", "")),
    "xid": Fault(
        "the kernel's log has an Xid of the driver",
        # All containers share the kernel and its log: what reads it is covered instead.
        f"[ -e {FOLDER}/journalctl.real ] || cp /usr/bin/journalctl {FOLDER}/journalctl.real\n"
        + _cover("/usr/bin/journalctl", _text(XID))[0],
        _cover("/usr/bin/journalctl", _text(XID))[1],
    ),
    "hot": Fault(
        "nvidia-smi reports 93 °C and a GPU that is slowed down by it",
        *_file(
            "gpu.d/hot.json",
            json.dumps({"temperature.gpu": "93", "clocks_event_reasons.active": "0x0000000000000060"}),
        ),
    ),
    "driver": Fault(
        "nvidia-smi reports driver 535.183.01",
        *_file("gpu.d/driver.json", json.dumps({"driver_version": "535.183.01"})),
    ),
    "os": Fault(
        "/etc/os-release says Fedora Linux 42",
        *_cover("/usr/lib/os-release", _text(OTHER_OS)),
    ),
    "machine": Fault(
        "what ssh starts runs on a 32-bit processor, according to uname",
        # setarch fails where the processor has no 32-bit mode; sshd would then not start. KillMode ends the sessions
        # as well: Ansible keeps them open for long.
        f"""
if [ -e {MACHINE} ]; then exit; fi
setarch linux32 true
case $(dpkg --print-architecture) in arm64) personality=arm ;; *) personality=x86 ;; esac
mkdir -p {MACHINE.rpartition("/")[0]}
printf '%s\\n' [Service] KillMode=control-group "Personality=$personality" >{MACHINE}
systemctl daemon-reload
systemctl reset-failed ssh.service
systemctl restart ssh.service""",
        f"""
if [ ! -e {MACHINE} ]; then exit; fi
systemctl stop ssh.service
rm {MACHINE}
systemctl daemon-reload
systemctl reset-failed ssh.service
systemctl start ssh.service""",
    ),
    "memory": Fault(
        "another process holds memory: /proc/meminfo says that 30 GiB are available",
        *_cover(
            "/proc/meminfo",
            "sed -E '/^Mem(Free|Available)/s/[0-9]+/31457280/' /etc/simulator/meminfo",
        ),
    ),
    "disk": Fault(
        "/opt/hf is a file system of 1 GiB",
        f"""
if mountpoint -q /opt/hf; then exit; fi
if [ ! -d /opt/hf ]; then mkdir /opt/hf; touch {FOLDER}/disk; fi
mount -t tmpfs -o size=1g,mode=755 simulator /opt/hf""",
        f"""
if mountpoint -q /opt/hf; then umount --lazy /opt/hf; fi
if [ -e {FOLDER}/disk ]; then rmdir /opt/hf; rm {FOLDER}/disk; fi""",
    ),
    "port": Fault(
        "a foreign web server, simulator-port.service, listens on TCP 8000",
        """
if systemctl -q is-active simulator-port.service; then exit; fi
if ss -Hltn sport = :8000 | grep -q .; then echo 'port 8000 is held already'; exit 1; fi
systemd-run -q --collect --uid=nobody --unit=simulator-port.service python3 -m http.server 8000 --directory /mnt
timeout 20 sh -c 'until ss -Hltn sport = :8000 | grep -q .; do sleep 0.1; done'""",
        "if systemctl -q is-active simulator-port.service; then systemctl stop simulator-port.service; fi",
    ),
    "compose": Fault(
        "the Compose plugin is 2.10.2",
        *_cover(PLUGIN, _text(OLD_COMPOSE)),
    ),
    "toolkit": Fault(
        "nvidia-ctk is 1.10.0",
        *_file("toolkit-version", "1.10.0"),
    ),
    "clock": Fault(
        "the clock of what sudo starts is 3 days behind",
        # Containers share the kernel's clock. File times and the monotonic clock stay: Python and timeouts need them.
        f"""
set -- /usr/lib/*/faketime/libfaketimeMT.so.1
printf '%s\\n' "LD_PRELOAD=$1" FAKETIME=-3d FAKETIME_DONT_FAKE_MONOTONIC=1 FAKETIME_DISABLE_SHM=1 NO_FAKE_STAT=1 \\
    >{FOLDER}/clock.env""",
        f"rm -f {FOLDER}/clock.env",
    ),
    "registry": Fault(
        "nvcr.io and registry-1.docker.io resolve to 127.0.0.1, where nothing listens",
        *_nowhere("registry", "nvcr.io", "registry-1.docker.io"),
    ),
    "hub": Fault(
        "huggingface.co resolves to 127.0.0.1, where nothing listens",
        *_nowhere("hub", "huggingface.co"),
    ),
    "dns": Fault(
        "the name server does not answer",
        *_cover("/etc/resolv.conf", "echo nameserver 192.0.2.1"),
    ),
}


def check(names: Iterable[str]) -> None:
    """Raise unless all faults are known."""
    unknown = [name for name in names if name not in FAULTS]
    if unknown:
        raise SimulatorError(f"unknown fault {', '.join(unknown)}: there are {', '.join(FAULTS)}")


def break_(world: World, host: str, names: Sequence[str]) -> None:
    """Bring faults about, in the order given."""
    check(names)
    for name in names:
        _run(world, host, name, FAULTS[name].break_)
        world.say(f"{host}: {FAULTS[name].what}")


def fix(world: World, host: str, names: Sequence[str]) -> None:
    """Undo faults, those that are there; all unless some are named."""
    check(names)
    for name in names or FAULTS:
        _run(world, host, name, FAULTS[name].fix)
    world.say(f"{host}: fixed {', '.join(names) or 'everything'}")


def _run(world: World, host: str, name: str, script: str) -> None:
    container = world.container(host)
    sparks = world.state()["sparks"]
    if host not in sparks:
        raise SimulatorError(f"{host} is not a Spark and has no faults: there are {', '.join(sparks)}")
    code, output = run_in(container, ["sh", "-euc", f"mkdir -p {FOLDER}/gpu.d\n{script}"])
    if code != 0:
        raise SimulatorError(f"{host}: fault {name}: {output.strip() or f'exit code {code}'}")
