"""The engine for a machine with an NVIDIA GPU: real vLLM, CUDA build, as an image for the simulated nvcr.io.

Of its own wheels on the base of the CPU engine's image; or an image of this machine's Docker that has vLLM already,
named by SPARKFLEET_SIM_ENGINE_IMAGE.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import docker

from simulator import engine_image
from simulator.shell import SimulatorError, run

VARIABLE = "SPARKFLEET_SIM_ENGINE_IMAGE"
REQUIREMENTS = engine_image.FOLDER / "requirements-cuda.txt"
#: Layers, each packed by one thread: by the first letters of their distributions; the last takes all that is left.
LAYERS = (
    ("torch",),
    ("nvidia-cublas", "nvidia-cuda", "nvidia-curand", "nvidia-nvjitlink", "nvidia-cufile", "nvidia-nvtx"),
    ("nvidia-cudnn", "nvidia-cufft", "nvidia-cusolver"),
    ("nvidia-cusparse", "nvidia-nccl", "nvidia-nvshmem", "triton"),
    ("vllm",),
    (),
)
#: For the image of wheels, and on top of those that an image of this machine has.
COMMON = {
    # The card's 32768 is more than the small model was trained for; the questions are short.
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_DISABLE_XET": "1",
}
ENVIRONMENT = {
    # As NVIDIA's images have them: that is where the driver is handed in.
    "PATH": "/opt/vllm/bin:/usr/local/nvidia/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LD_LIBRARY_PATH": "/usr/local/nvidia/lib64",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # FlashInfer compiles with nvcc, which is left out
    **COMMON,
}
Say = Callable[[str], None]


def given() -> str:
    """The image of this machine that is to be used; "" for one of wheels."""
    return os.environ.get(VARIABLE, "")


def tag() -> str:
    """Tag of the image of wheels, by a hash of all that goes into it."""
    digest = hashlib.sha256(Path(__file__).read_bytes() + REQUIREMENTS.read_bytes())
    digest.update(engine_image.tag().encode())
    return f"sparkfleet-sim/vllm-cuda:{digest.hexdigest()[:16]}"


def requirements() -> list[str]:
    """Pinned requirements, one `name==version` each."""
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def layers(wanted: list[str]) -> list[list[str]]:
    """The requirements of each layer."""
    made: list[list[str]] = []
    left = list(wanted)
    for beginnings in LAYERS:
        layer = [item for item in left if item.startswith(beginnings)] if beginnings else left
        left = [item for item in left if item not in layer]
        made.append(layer)
    return made


def of_image(client: docker.DockerClient, name: str) -> str:
    """An image of this machine, with the settings that the small model needs; its local tag.

    Raises SimulatorError where there is no such image.
    """
    try:
        image = client.images.get(name)
    except docker.errors.ImageNotFound:
        raise SimulatorError(f"{VARIABLE}: Docker has no image {name}: docker pull {name}") from None
    digest = hashlib.sha256(f"{image.id}{sorted(COMMON.items())}".encode()).hexdigest()[:16]
    made = f"sparkfleet-sim/vllm-cuda:{digest}"
    try:
        client.images.get(made)
    except docker.errors.ImageNotFound:
        _with(client, name, COMMON, made)
    return made


def _with(client: docker.DockerClient, image: str, environment: dict[str, str], name: str) -> None:
    """Give an image with more environment another name."""
    container = client.containers.create(image, ["vllm", "--help"])
    try:
        repository, _, version = name.partition(":")
        container.commit(repository, version, conf={"Env": [f"{key}={value}" for key, value in environment.items()]})
    finally:
        container.remove(v=True)


def of_wheels(client: docker.DockerClient, base: str, cache: Path, say: Say) -> str:
    """Build the image from ``base``; its local tag. Raises SimulatorError on other processors than x86_64."""
    name = tag()
    try:
        client.images.get(name)
        return name
    except docker.errors.ImageNotFound:
        pass
    if platform.machine() != "x86_64":
        raise SimulatorError(
            f"the pinned CUDA wheels are for x86_64: name an image that has vLLM in {VARIABLE}, or use --gpu off"
        )
    wheels = cache / "wheels-cuda"
    wheels.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    command += ["--python-version=3.11", "--implementation=cp", "--only-binary=:all:"]
    command += [f"--platform=manylinux_2_{minor}_x86_64" for minor in (35, 34, 31, 28, 27, 24, 17)]
    command += ["--platform=manylinux2014_x86_64", "--platform=manylinux1_x86_64", "--platform=linux_x86_64"]
    run([*command, f"--dest={wheels}", f"--requirement={REQUIREMENTS}"], "downloading vLLM for CUDA (4 GB)", say)
    image, parts = base, layers(requirements())
    for number, layer in enumerate(parts, 1):
        say(f"building the engine's image for CUDA, layer {number} of {len(parts)}")
        script = "set -e; test -x /opt/vllm/bin/python || python3 -m venv /opt/vllm; "
        install = "/opt/vllm/bin/pip install -q --no-cache-dir --no-compile --no-deps --no-index --find-links /wheels"
        script += f"{install} {' '.join(layer)}; {engine_image.STRIP}"
        image = engine_image._layer(client, image, script, wheels, f"{name}-{number}")
    _with(client, image, ENVIRONMENT, name)
    for number in range(1, len(parts) + 1):
        client.images.remove(f"{name}-{number}", noprune=True)
    return name
