"""This machine's NVIDIA GPU: whether there is one, and what a container needs of it.

What the NVIDIA Container Toolkit wrote down (CDI) is taken where it is; else the device files and the libraries of the
driver are looked for. A simulated Spark gets both as they are here, under the names that NVIDIA's images expect.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

#: Where a simulated Spark, and the engine's container in it, has the driver's files.
FOLDER = "/usr/local/nvidia"
#: What a Spark with a GPU has on top of its image.
ROOTFS = Path(__file__).parent / "gpu_rootfs"
#: The toolkit's description of the GPUs (`nvidia-ctk cdi generate`), in the order in which they count.
CDI_FOLDERS = ("/etc/cdi", "/var/run/cdi")
#: A driver that is not in the linker's cache.
DRIVER_FOLDERS = ("/usr/local/nvidia/lib64", "/usr/local/nvidia/lib")
#: The driver's libraries for computing (as in libnvidia-container), not those for graphics and video.
LIBRARIES = re.compile(
    r"lib(cuda|cudadebugger|nvidia-(ml|cfg|allocator|fatbinaryloader|gpucomp|nvvm|ptxjitcompiler|pkcs11.*|tileiras))"
    r"\.so(\.[0-9.]+)?"
)
NEEDED = ("libcuda.so", "libnvidia-ml.so")
DEVICES = re.compile(r"nvidia([0-9]+|ctl|-uvm|-uvm-tools|-modeset)")
SMI_SECONDS = 30
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One or more GPUs of this machine. Memory is that of the first, in MiB, as CUDA counts it."""

    name: str
    driver: str
    total_mib: int
    free_mib: int
    devices: tuple[str, ...]
    #: Files of the driver on this machine -> where a Spark has them.
    files: Mapping[str, str]
    source: str

    def state(self) -> dict[str, Any]:
        """For the world's file."""
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Gpu:
        """What `state` has written."""
        return cls(**{**state, "devices": tuple(state["devices"])})

    def spark_file(self) -> str:
        """What the runc of a simulated Spark hands on."""
        return json.dumps({"devices": self.devices, "folder": FOLDER}, indent=2) + "\n"


def find(root: Path = Path("/")) -> tuple[Gpu | None, str]:
    """The GPU of this machine, or None, and one line about it ("" where there is no trace of one)."""
    if os.environ.get("DOCKER_HOST", "").startswith(("tcp:", "ssh:", "http")):
        return None, ""  # Docker runs elsewhere
    spec = _cdi(root)
    devices, files, source = _of_cdi(spec) if spec else _of_driver(root)
    if not any(re.fullmatch(r"nvidia[0-9]+", Path(path).name) for path in devices):
        return None, ""
    names = {Path(path).name.partition(".so")[0] + ".so" for path in files}
    missing = [name for name in NEEDED if name not in names]
    without = f"GPU: {devices[0]} is there, but its driver"
    if missing:
        return None, f"{without} has no {' and no '.join(missing)}; the engine runs on the CPU"
    smi = shutil.which("nvidia-smi") or next((path for path in files if Path(path).name == "nvidia-smi"), None)
    asked = _ask(smi) if smi else "nvidia-smi is missing"
    if isinstance(asked, str):
        return None, f"{without} does not answer ({asked}); the engine runs on the CPU"
    name, driver, total, free = asked
    found = Gpu(name, driver, total, free, tuple(devices), files, source)
    return found, f"GPU: {name}, driver {driver}, {total / 1024:.1f} GiB ({source})"


def _cdi(root: Path) -> dict[str, Any]:
    """The toolkit's description of NVIDIA's GPUs; {} where it has written none."""
    for folder in CDI_FOLDERS:
        for file in sorted((root / folder.lstrip("/")).glob("*")):
            if file.suffix in (".yaml", ".yml", ".json") and file.stat().st_size < MIB:
                try:
                    data = yaml.safe_load(file.read_text(encoding="utf-8"))
                except (OSError, ValueError, yaml.YAMLError):
                    continue
                if isinstance(data, dict) and data.get("kind") == "nvidia.com/gpu":
                    return {**data, "file": str(file)}
    return {}


def _of_cdi(spec: Mapping[str, Any]) -> tuple[list[str], dict[str, str], str]:
    """Devices and files of a CDI description; those of all GPUs."""
    edits = [spec.get("containerEdits") or {}]
    edits += [device.get("containerEdits") or {} for device in spec.get("devices") or []]
    nodes = [str(node.get("hostPath") or node["path"]) for edit in edits for node in edit.get("deviceNodes") or []]
    mounts = [str(mount["hostPath"]) for edit in edits for mount in edit.get("mounts") or []]
    devices = [path for path in dict.fromkeys(nodes) if DEVICES.fullmatch(Path(path).name)]
    wanted = [path for path in mounts if Path(path).name == "nvidia-smi" or LIBRARIES.fullmatch(Path(path).name)]
    return devices, _places(wanted), f"as in {spec['file']}"


def _of_driver(root: Path) -> tuple[list[str], dict[str, str], str]:
    """The same from /dev, the linker's cache and the folders that drivers are put into."""
    listed = sorted((root / "dev").glob("nvidia*"), key=lambda path: (len(path.name), path.name))
    devices = [f"/{path.relative_to(root)}" for path in listed if DEVICES.fullmatch(path.name)]
    found = _linked()
    for folder in DRIVER_FOLDERS:
        found += sorted(str(path) for path in (root / folder.lstrip("/")).glob("lib*.so*"))
    wanted = [path for path in found if LIBRARIES.fullmatch(Path(path).name) and Path(path).exists()]
    beside = [root / FOLDER.lstrip("/") / "bin" / "nvidia-smi"]
    smi = [shutil.which("nvidia-smi"), *(str(path) for path in beside if path.exists())]
    return devices, _places([*wanted, *(path for path in smi[:2] if path)]), "found in /dev"


def _linked() -> list[str]:
    """What the linker's cache names, for this machine's own word size."""
    tool = shutil.which("ldconfig") or "/sbin/ldconfig"
    try:
        text = subprocess.run([tool, "-p"], capture_output=True, text=True, check=False, timeout=SMI_SECONDS).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = [line for line in text.splitlines() if "=>" in line and ("x86-64" in line or "AArch64" in line)]
    return [line.partition("=>")[2].strip() for line in lines]


def _places(paths: Iterable[str]) -> dict[str, str]:
    """Real files -> their place in a Spark; the first of a name counts. `ldconfig` makes the links there."""
    places: dict[str, str] = {}
    for path in paths:
        real = os.path.realpath(path)
        place = f"{FOLDER}/{'bin' if Path(real).name == 'nvidia-smi' else 'lib64'}/{Path(real).name}"
        if place not in places.values():
            places[real] = place
    return places


def _ask(smi: str) -> tuple[str, str, int, int] | str:
    """Name, driver, total and free memory (MiB) of the first GPU; a reason where nvidia-smi gives none."""
    fields = "name,driver_version,memory.total,memory.reserved,memory.free"
    command = [smi, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SMI_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    values = [value.strip() for value in (done.stdout.splitlines() or [""])[0].split(",")]
    if done.returncode != 0 or len(values) != len(fields.split(",")):
        return (done.stdout or done.stderr).strip().splitlines()[0][:200] if done.stdout or done.stderr else "no answer"
    name, driver, total, reserved, free = values
    if not (total.isdigit() and free.isdigit()):
        return f"it reports {total} as memory"
    usable = int(total) - (int(reserved) if reserved.isdigit() else 0)
    return name, driver, usable, min(int(free), usable)  # idle, nvidia-smi rounds to a MiB more than that


def meminfo(text: str, gpu: Gpu) -> str:
    """A `/proc/meminfo` with the GPU's memory: on a Spark that is the memory of both."""
    sizes = {"MemTotal": gpu.total_mib, "MemFree": gpu.free_mib, "MemAvailable": gpu.free_mib}
    for name, mib in sizes.items():
        text = re.sub(rf"^{name}:.*$", f"{name}:{mib * 1024:>{24 - len(name)}} kB", text, flags=re.MULTILINE)
    return text
