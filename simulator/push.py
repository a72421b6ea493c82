"""An image into the simulated registry, compressed for speed.

`docker push` compresses one layer of the engine's image with one processor, and well: 80 s of 100 for the whole world.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import docker
from isal import isal_zlib

from simulator import images
from simulator.shell import SimulatorError

CHUNK = 1 << 20
#: Of docker/distribution: what Docker itself pushes.
MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
CONFIG = "application/vnd.docker.container.image.v1+json"
LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"


def push(
    client: docker.DockerClient, image: str, port: int, names: Sequence[str], cache: Path, say: Callable[[str], None]
) -> None:
    """Push a local image as each of `names` (REPOSITORY:TAG, one repository) to the registry at a loopback port.

    `cache` has room for the image twice. Raises SimulatorError.
    """
    repository = names[0].partition(":")[0]
    began = reported = time.monotonic()
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        saved = Path(folder, "image.tar")
        with saved.open("wb") as file:
            for chunk in client.images.get(image).save(chunk_size=CHUNK):
                file.write(chunk)
                if time.monotonic() - reported > 10:
                    reported = time.monotonic()
                    say(f"pushing: {reported - began:.0f} s")
        with tarfile.open(saved) as archive:
            (content,) = json.load(images.member(archive, "manifest.json"))
            config = images.member(archive, content["Config"]).read()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = [pool.submit(_layer, saved, name, Path(folder), port, repository) for name in content["Layers"]]
            layers = [job.result() for job in jobs]
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": {"mediaType": CONFIG, **_blob(port, repository, config)},
        "layers": [{"mediaType": LAYER, **layer} for layer in layers],
    }
    for name in names:
        address = f"http://127.0.0.1:{port}/v2/{repository}/manifests/{name.partition(':')[2]}"
        _send("PUT", address, json.dumps(document).encode(), MANIFEST)


def _layer(saved: Path, name: str, folder: Path, port: int, repository: str) -> dict[str, Any]:
    """Compress and upload one layer; its digest and size."""
    compressed, digest = folder / f"{hashlib.sha256(name.encode()).hexdigest()}.gz", hashlib.sha256()
    with tarfile.open(saved) as archive, compressed.open("wb") as file:
        source, packer = images.member(archive, name), isal_zlib.compressobj(level=1, wbits=31)
        while chunk := source.read(CHUNK):
            part = packer.compress(chunk)
            digest.update(part)
            file.write(part)
        part = packer.flush()
        digest.update(part)
        file.write(part)
    found = {"digest": f"sha256:{digest.hexdigest()}", "size": compressed.stat().st_size}
    with compressed.open("rb") as file:
        _upload(port, repository, file, found)
    compressed.unlink()
    return found


def _blob(port: int, repository: str, content: bytes) -> dict[str, Any]:
    found = {"digest": f"sha256:{hashlib.sha256(content).hexdigest()}", "size": len(content)}
    _upload(port, repository, content, found)
    return found


def _upload(port: int, repository: str, content: Any, found: dict[str, Any]) -> None:
    began = _send("POST", f"http://127.0.0.1:{port}/v2/{repository}/blobs/uploads/", b"")
    # The registry names itself as its clients know it; here it is a loopback port.
    place = began["Location"].partition("/v2/")[2]
    address = f"http://127.0.0.1:{port}/v2/{place}{'&' if '?' in place else '?'}digest={found['digest']}"
    _send("PUT", address, content, "application/octet-stream", found["size"])


def _send(method: str, address: str, content: Any, kind: str | None = None, size: int | None = None) -> Any:
    """Headers of the answer."""
    request = urllib.request.Request(address, data=content, method=method)  # noqa: S310 - http, loopback
    request.add_header("Content-Length", str(len(content) if size is None else size))
    if kind:
        request.add_header("Content-Type", kind)
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:  # noqa: S310
            return answer.headers
    except urllib.error.HTTPError as error:
        raise SimulatorError(f"the simulated registry: {method}: {error.code} {error.read(500)!r}") from None
    except OSError as error:
        raise SimulatorError(f"the simulated registry: {method}: {error}") from None
