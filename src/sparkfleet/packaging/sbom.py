"""Software bills of materials in CycloneDX: of the controller's Python environment, and of a Spark.

For a scanner of vulnerabilities or an inventory of licences. Equal contents give equal documents but for the time,
which `SOURCE_DATE_EPOCH` sets.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import urllib.parse
import uuid
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from sparkfleet_host import bounded, cache
from sparkfleet_host.bounded import BoundsError, printable
from sparkfleet_host.registry import reference

from sparkfleet import SparkfleetError, __version__
from sparkfleet.packaging import debian

SPECIFICATION = "1.6"
NAME = "sparkfleet"
#: And those that the gateway and monitoring install, and what runs it all.
PACKAGES = (
    *(*debian.PREPARED, "haproxy", "keepalived", "prometheus", "prometheus-alertmanager", "prometheus-node-exporter"),
    *("python3", "python3-apt"),
)
#: As dpkg has them.
_WORD = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
LARGEST = 64 << 20  # of a document, bytes
#: Of the environment: the time that documents have (https://reproducible-builds.org/docs/source-date-epoch/).
EPOCH = "SOURCE_DATE_EPOCH"
_LATEST = 253402300799  # the end of the year 9999
_MOST_ENGINES, _MOST_MODELS, _MOST_PACKAGES = 16, 2, 1000


def document() -> dict[str, Any]:
    """The bill of this controller."""
    found = {str(canonicalize_name(part.name)): part for part in metadata.distributions() if part.name}
    own = found.pop(NAME, None)
    components = [_component(name, found[name]) for name in sorted(found)]
    root = _purl("pypi", NAME, __version__)
    needs = {item["bom-ref"]: _needs(found[item["name"]], found) for item in components}
    needs[root] = _needs(own, found) if own else [*needs]
    about = {"type": "application", "bom-ref": root, "name": NAME, "version": __version__, "purl": root}
    return _bill(about, components, needs)


def spark(host: str, facts: object) -> dict[str, Any]:
    """The bill of a Spark, of what the module spark_bill found there. Raises SparkfleetError where that is of another
    form: a Spark is not trusted."""
    try:
        return _spark(host, bounded.as_dict(facts, "facts"))
    except BoundsError as error:
        raise SparkfleetError(f"{host} answers oddly: {error}") from None


def packages(document: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """Of a Spark's bill: its system as `debian.system_name` has it, and the versions of packages."""
    about = next(part for part in document["components"] if part["type"] == "operating-system")
    known = {item["name"].removeprefix("sparkfleet:"): item["value"] for item in about["properties"]}
    versions = {part["name"]: part["version"] for part in document["components"] if part["type"] == "library"}
    return debian.system_name({"id": about["name"], **known}), versions


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Put a bill into a file. Raises SparkfleetError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise SparkfleetError(f"{path} cannot be written: {error.strerror}") from None


def read(path: Path) -> dict[str, Any]:
    """A bill that `write` has written. Raises SparkfleetError."""
    try:
        return bounded.read_json(path, LARGEST)
    except (OSError, BoundsError) as error:
        raise SparkfleetError(f"{path} cannot be read: {error}") from None


def _spark(host: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    known = {key: _text(value, f"os: {key}") for key, value in bounded.as_dict(facts.get("os"), "os").items()}
    system = {
        "type": "operating-system",
        "bom-ref": "os",
        "name": known.get("id") or "unknown",
        "version": known.get("version", ""),
        "description": known.get("name", ""),
        "properties": [{"name": f"sparkfleet:{key}", "value": known.get(key, "")} for key in ("codename", "machine")],
    }
    distribution = (known.get("id", ""), known.get("codename") or known.get("version", ""))
    parts: dict[str, dict[str, Any]] = {"os": system}
    for engine in bounded.as_list(facts.get("engines"), "engines", _MOST_ENGINES):
        entry = bounded.as_dict(engine, "an engine")
        image = _image(_text(entry.get("image"), "an image", 512))
        parts[image["bom-ref"]] = image
        for model in bounded.as_list(entry.get("models"), "models", _MOST_MODELS):
            made = _model(bounded.as_dict(model, "a model"))
            parts[made["bom-ref"]] = made
    if facts.get("program"):
        digest = bounded.matched(bounded.SHA256, facts["program"], "the program's hash")
        parts["program"] = {
            "type": "application",
            "bom-ref": "program",
            "name": "sparkfleet-host",
            # Of the same files everywhere; what the controller would copy has the same hash or is another version.
            "version": digest[:12],
            "hashes": [{"alg": "SHA-256", "content": digest}],
        }
    packages = bounded.as_dict(facts.get("packages"), "packages")
    if len(packages) > _MOST_PACKAGES:
        raise BoundsError(f"packages: more than {_MOST_PACKAGES}")
    for name, entry in sorted(packages.items()):
        made = _package(bounded.matched(debian.PACKAGE, name, "a package"), bounded.as_dict(entry, name), distribution)
        parts[made["bom-ref"]] = made
    root = f"spark:{host}"
    about = {"type": "device", "bom-ref": root, "name": host, "description": "NVIDIA DGX Spark"}
    if facts.get("release") is not None:
        about["version"] = f"release {bounded.as_int(facts['release'], 'release')}"
    return _bill(about, list(parts.values()), {root: [*parts], **{ref: [] for ref in parts}})


def _bill(about: dict[str, Any], parts: Sequence[dict[str, Any]], needs: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    identity = "\n".join([about["bom-ref"], *(f"{part['bom-ref']} {part.get('hashes', '')}" for part in parts)])
    return {
        "$schema": f"http://cyclonedx.org/schema/bom-{SPECIFICATION}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": SPECIFICATION,
        "serialNumber": uuid.uuid5(uuid.NAMESPACE_URL, identity).urn,
        "version": 1,
        "metadata": {
            "timestamp": _moment().isoformat().replace("+00:00", "Z"),
            "component": about,
        },
        "components": list(parts),
        "dependencies": [{"ref": ref, "dependsOn": list(of)} for ref, of in needs.items()],
    }


def _moment() -> datetime.datetime:
    """Now, to the second, or what the environment has in its place. Raises SparkfleetError."""
    given = os.environ.get(EPOCH)
    if not given:
        return datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    if not re.fullmatch("[0-9]{1,12}", given) or int(given) > _LATEST:
        raise SparkfleetError(
            f"{EPOCH}: {printable(given, 60)!r} is not a time in seconds since 1970: unset it, or set it to one"
        )
    return datetime.datetime.fromtimestamp(int(given), datetime.UTC)


# -- parts of a Spark ------------------------------------------------------------------------------------------------


def _image(name: str) -> dict[str, Any]:
    try:
        ref = reference(name)
    except Exception as error:
        raise BoundsError(f"an image: {printable(str(error), 200)}") from None
    last = ref.path.rpartition("/")[2]
    where = {"repository_url": f"{ref.registry}/{ref.path}", **({"tag": ref.tag} if ref.tag else {})}
    purl = _purl("oci", last, ref.digest, where) if ref.digest else ""
    made: dict[str, Any] = {
        "type": "container",
        "bom-ref": purl or name,
        "name": ref.name,
        "version": ref.tag or ref.digest,
    }
    if ref.digest:
        made |= {"purl": purl, "hashes": [{"alg": "SHA-256", "content": ref.digest.removeprefix("sha256:")}]}
    return made


def _model(model: Mapping[str, Any]) -> dict[str, Any]:
    repo = bounded.matched(bounded.REPO, model.get("repo"), "a model")
    revision = bounded.matched(bounded.REVISION, model.get("revision"), f"revision of {repo}")
    files = cache.check_listing({"files": model.get("files")}, repo)["files"]
    purl = _purl("huggingface", repo, revision)
    made: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": purl,
        "name": repo,
        "version": revision,
        "purl": purl,
    }
    if files:
        made["components"] = [_file(purl, name, files[name]) for name in sorted(files)]
    return made


def _file(model: str, name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "file", "bom-ref": f"{model}#{urllib.parse.quote(name)}", "name": name}
    if "sha256" in entry:
        made["hashes"] = [{"alg": "SHA-256", "content": entry["sha256"]}]
    elif "sha1" in entry:  # of the content with Git's head, so it is no hash of the file
        made["properties"] = [{"name": "sparkfleet:git-blob", "value": entry["sha1"]}]
    return made


def _package(name: str, entry: Mapping[str, Any], distribution: tuple[str, str]) -> dict[str, Any]:
    version = bounded.matched(debian.VERSION, entry.get("version"), f"version of {name}")
    arch = bounded.matched(_WORD, entry.get("architecture"), f"architecture of {name}")
    system, codename = (bounded.matched(_WORD, word or "unknown", "the distribution") for word in distribution)
    purl = _purl("deb", f"{system}/{name}", version, {"arch": arch, "distro": codename})
    made: dict[str, Any] = {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}
    if source := _text(entry.get("source", ""), f"source of {name}"):
        # Advisories of a distribution name the source package.
        made["properties"] = [{"name": "sparkfleet:source-package", "value": source}]
    return made


def _purl(kind: str, name: str, version: str, more: Mapping[str, str] | None = None) -> str:
    """A package URL (https://github.com/package-url/purl-spec)."""
    qualifiers = urllib.parse.urlencode(sorted((more or {}).items()), safe="/:", quote_via=urllib.parse.quote)
    made = f"pkg:{kind}/{urllib.parse.quote(name, safe='/')}@{urllib.parse.quote(version, safe=':')}"
    return made + (f"?{qualifiers}" if qualifiers else "")


def _text(value: Any, what: str, limit: int = 200) -> str:
    return printable(bounded.as_str(value, what, limit), limit)


# -- parts of the controller -----------------------------------------------------------------------------------------


def _component(name: str, part: metadata.Distribution) -> dict[str, Any]:
    purl = _purl("pypi", name, part.version)
    made: dict[str, Any] = {"type": "library", "bom-ref": purl, "name": name, "version": part.version, "purl": purl}
    if licence := _licence(part):
        made["licenses"] = [licence]
    return made


def _licence(part: metadata.Distribution) -> dict[str, Any] | None:
    """Its licence as an SPDX expression where its metadata has one, otherwise by name."""
    known = part.metadata
    if "License-Expression" in known:
        return {"expression": known["License-Expression"]}
    classified = [
        item.rpartition(" :: ")[2] for item in known.get_all("Classifier") or [] if item.startswith("License")
    ]
    text = (classified or known.get_all("License") or [""])[0].strip()
    first = text.splitlines()[0][:200] if text else ""
    return {"license": {"name": first}} if first else None


def _needs(part: metadata.Distribution, found: dict[str, metadata.Distribution]) -> list[str]:
    names = sorted(set(_required(part)) & set(found))
    return [_purl("pypi", name, found[name].version) for name in names]


def _required(part: metadata.Distribution) -> Iterator[str]:
    for line in part.requires or []:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:  # of an old distribution
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield str(canonicalize_name(requirement.name))
