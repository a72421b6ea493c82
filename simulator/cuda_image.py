"""The engine for a machine with an NVIDIA GPU: real vLLM, CUDA build, as an image for the simulated nvcr.io.

Upstream's image, or one that this machine's Docker has, named by SPARKFLEET_SIM_ENGINE_IMAGE.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable

import docker
from docker.models.images import Image

from simulator.shell import SimulatorError

VARIABLE = "SPARKFLEET_SIM_ENGINE_IMAGE"
#: The version that was tried on a GPU (docs/gpu-spark.md).
UPSTREAM = "vllm/vllm-openai:v0.25.1"
#: What the image is given: NVIDIA's images start what they are told to as well, upstream's adds `vllm serve` itself.
CONFIGURATION = {
    "Entrypoint": ["/usr/bin/env"],
    "Cmd": ["vllm", "--help"],
    "Env": [
        # The card's 32768 is more than the small model was trained for; the questions are short.
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN=1",
        "VLLM_NO_USAGE_STATS=1",
        "HF_HUB_DISABLE_XET=1",
    ],
}
Say = Callable[[str], None]


def ensure(client: docker.DockerClient, say: Say) -> str:
    """Local tag of the image. Raises SimulatorError where it cannot be had."""
    name = os.environ.get(VARIABLE) or UPSTREAM
    image = _get(client, name)
    if image is None and VARIABLE not in os.environ:
        repository, _, version = name.partition(":")
        say(f"pulling {name} (more than 10 GB)")
        try:
            image = client.images.pull(repository, version)
        except docker.errors.APIError as error:
            raise SimulatorError(f"{name} cannot be pulled ({error.explanation or error})") from None
    if image is None:
        raise SimulatorError(f"Docker has no image {name} ({VARIABLE})")
    digest = hashlib.sha256(f"{image.id}{json.dumps(CONFIGURATION)}".encode()).hexdigest()[:16]
    made = f"sparkfleet-sim/vllm-cuda:{digest}"
    if _get(client, made) is None:
        container = client.containers.create(image, ["vllm", "--help"])
        try:
            container.commit(*made.split(":"), conf=CONFIGURATION)
        finally:
            container.remove(v=True)
    return made


def _get(client: docker.DockerClient, name: str) -> Image | None:
    try:
        return client.images.get(name)
    except docker.errors.ImageNotFound:
        return None
