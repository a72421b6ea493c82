"""A folder to carry in: images, models and packages for Sparks without internet.

bundle.json                      what is in it (see `Bundle`)
image/                           an OCI image layout: index.json, oci-layout, blobs/sha256/HEX
hub/models--ORG--NAME/blobs/HASH files of a model, by the Hub's hash
hub/.sparkfleet/models--ORG--NAME/fetching.json   their list
packages/                        a repository for apt: *.deb, Packages
python/                          wheels for scripts/setup of another controller
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparkfleet import SparkfleetError

NAME = "bundle.json"


@dataclasses.dataclass
class Bundle:
    """What is in a bundle. `images`: name -> {digest, media_type, size, blobs}; `models`: "ORG/NAME@REVISION" ->
    {commit, bytes, files: [HASH]}; `files`: path within the folder -> size in bytes."""

    folder: Path
    system: dict[str, str] = dataclasses.field(default_factory=dict)
    images: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    models: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    packages: list[str] = dataclasses.field(default_factory=list)
    files: dict[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, folder: str | Path) -> Bundle:
        """Raises SparkfleetError for a folder that is no bundle."""
        place = Path(folder).expanduser()
        try:
            known = json.loads((place / NAME).read_text(encoding="utf-8"))
            return cls(place, **{field.name: known[field.name] for field in dataclasses.fields(cls)[1:]})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SparkfleetError(
                f"sparkfleet_bundle {place}: no bundle is there ({type(error).__name__}: {error}); "
                "`sparkfleet bundle FOLDER` makes one where there is internet"
            ) from None

    @classmethod
    def open(cls, folder: str | Path) -> Bundle:
        """The bundle of a folder, or a new one where there is none."""
        place = Path(folder).expanduser()
        return cls.read(place) if (place / NAME).exists() else cls(place)

    def write(self) -> None:
        """`bundle.json` and the lists that readers of the parts expect."""
        _write(self.folder / "image" / "index.json", self.index(sorted(self.images)))
        _write(self.folder / "image" / "oci-layout", _json({"imageLayoutVersion": "1.0.0"}))
        known = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)[1:]}
        _write(self.folder / NAME, _json(known))

    def index(self, images: Sequence[str]) -> str:
        """`index.json` of an OCI image layout with these images."""
        entries = [
            {
                "mediaType": self.images[name]["media_type"],
                "digest": self.images[name]["digest"],
                "size": self.images[name]["size"],
                "annotations": {"org.opencontainers.image.ref.name": name},
            }
            for name in images
        ]
        return _json({"schemaVersion": 2, "manifests": entries})

    def check_system(self, system: Mapping[str, str]) -> None:
        """Whether what is for this system (id, codename, machine) may come in. Raises SparkfleetError."""
        if self.system and self.system != system:
            has, here = (" ".join(item.values()) for item in (self.system, system))
            raise SparkfleetError(
                f"the bundle {self.folder} is for {has}, this host is {here}: make one in another folder, or leave the "
                "host out with --limit"
            )

    def add(self, collected: Mapping[str, Any], system: Mapping[str, str]) -> None:
        """Note what `bundle_collect` returned on a host of this system, once its files are here."""
        image, model, listing = collected["image"], collected["model"], collected["listing"]
        self.system = dict(system)
        self.images[image["name"]] = {key: image[key] for key in ("digest", "media_type", "size", "blobs")}
        if listing:
            hashes = sorted({entry.get("sha256") or entry["sha1"] for entry in listing["files"].values()})
            folder = "models--" + listing["repo"].replace("/", "--")
            name = f"hub/.sparkfleet/{folder}/fetching.json"
            _write(self.folder / name, _json(listing))
            self.files[name] = (self.folder / name).stat().st_size
            self.models[model] = {"commit": listing["commit"], "bytes": listing["total_bytes"], "files": hashes}
        if collected["packages"]:
            self.packages = list(collected["packages"])
            self.files = {name: size for name, size in self.files.items() if not name.startswith("packages/")}
        self.files.update({item["name"]: item["size"] for item in collected["files"]})

    def complete(self) -> list[str]:
        """Files that are as they should be."""
        return sorted(set(self.files) - set(self.lacking()))

    def lacking(self) -> list[str]:
        """Files that are not as they should be."""
        return [name for name, size in sorted(self.files.items()) if not self.has(name, size)]

    def has(self, name: str, size: int) -> bool:
        """Whether a file is there; it gets its name only when it is whole and was checked."""
        return _size(self.folder / name) == size

    def of_packages(self) -> Iterator[str]:
        """Files of the repository for apt."""
        return (name for name in self.files if name.startswith("packages/"))

    def of_fetch(self, images: Sequence[str], models: Sequence[str]) -> list[str]:
        """Files of images and models, without the image's index. Raises SparkfleetError for what is not in it."""
        missing = [name for name in (*images, *models) if name not in {*self.images, *self.models}]
        if missing:
            raise SparkfleetError(
                f"{', '.join(missing)} not in the bundle {self.folder}: `sparkfleet bundle` adds to it"
            )
        blobs = [
            f"image/blobs/sha256/{blob.partition(':')[2]}" for name in images for blob in self.images[name]["blobs"]
        ]
        found = dict.fromkeys(blobs)
        for model in models:
            folder = "models--" + model.partition("@")[0].replace("/", "--")
            found[f"hub/.sparkfleet/{folder}/fetching.json"] = None
            found.update(dict.fromkeys(f"hub/{folder}/blobs/{name}" for name in self.models[model]["files"]))
        return list(found)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _json(data: Any) -> str:
    return json.dumps(data, indent=1) + "\n"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
