"""Packs the real Hugging Face client and `fetch_model` into one file that any Spark's own Python runs.

The container that downloads a model has no packages of its own (its image may still be on the way), so the client
comes along: pure Python, from the distributions of this environment, as `hf_client.pyz`.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path, PurePosixPath

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sparkfleet import SparkfleetError
from sparkfleet.packaging import archive
from sparkfleet.packaging.host_program import PACKAGE, SOURCE

NAME = "hf_client.pyz"
ROOT = "huggingface_hub"
# What a download never imports: the command line, other file systems, compiled transfer.
LEFT_OUT = frozenset({"hf-xet", "click", "fsspec", "packaging"})
LEFT_OUT_FOLDERS = (
    "huggingface_hub/cli",
    "huggingface_hub/inference",
    "huggingface_hub/serialization",
    "huggingface_hub/templates",
    "tqdm/contrib",
    "_yaml",
)
MAIN = "from sparkfleet_host.fetch_model import run\n\nrun()\n"


def distributions(root: str = ROOT) -> list[metadata.Distribution]:
    """The distribution `root` and what it needs here, without LEFT_OUT, by name. Raises SparkfleetError if one
    is not installed."""
    found: dict[str, metadata.Distribution] = {}
    waiting = [root]
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found or name in LEFT_OUT:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            raise SparkfleetError(f"Python package {name} is not installed here; run scripts/setup") from None
        for line in found[name].requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return [found[name] for name in sorted(found)]


def build(folder: Path) -> Path:
    """`folder`/hf_client.pyz, rebuilt only when an input changed; equal inputs give equal bytes."""
    target = folder / NAME
    parts = distributions()
    key = _key(parts)
    if archive.key_of(target) == key:
        return target
    content = {name: path.read_bytes() for part in parts for name, path in _files(part)}
    content["__main__.py"] = MAIN.encode()
    content.update(_ours())
    return archive.write(target, content, key)


def _files(part: metadata.Distribution) -> Iterator[tuple[str, Path]]:
    """Name in the archive and place of each file worth shipping: Python, its metadata and its licence."""
    for file in part.files or []:
        path = PurePosixPath(file.as_posix())
        if path.is_absolute() or ".." in path.parts or "__pycache__" in path.parts:
            continue
        if str(path).startswith(tuple(f"{folder}/" for folder in LEFT_OUT_FOLDERS)):
            continue
        info = path.parts[0].endswith(".dist-info")
        if path.suffix == ".py" or (info and ("licenses" in path.parts or path.name in ("METADATA", "LICENSE"))):
            yield str(path), Path(str(file.locate()))


def _ours() -> dict[str, bytes]:
    """What the download needs of this project, by its name in the archive."""
    names = ("__init__.py", "bounded.py", "cache.py", "fetch_model.py")
    return {f"{PACKAGE}/{name}": (SOURCE / name).read_bytes() for name in names}


def _key(parts: list[metadata.Distribution]) -> str:
    key = hashlib.sha256(Path(__file__).read_bytes())
    for name, data in sorted(_ours().items()):
        key.update(f"{name}\0{len(data)}\0".encode() + data)
    for part in parts:
        key.update(f"{canonicalize_name(part.metadata['Name'])}=={part.version}\n".encode())
    return key.hexdigest()


if __name__ == "__main__":
    print(build(Path(sys.argv[1] if len(sys.argv) > 1 else ".")))
