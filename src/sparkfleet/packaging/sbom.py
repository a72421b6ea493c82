"""A software bill of materials of the controller, in CycloneDX: what is installed beside Sparkfleet.

It lists the distributions of the environment that runs it, with package URLs, licences and what needs what, for a
scanner of vulnerabilities or an inventory of licences. Equal environments give equal documents but for the time.
"""

from __future__ import annotations

import datetime
import os
import uuid
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from sparkfleet import __version__

SPECIFICATION = "1.6"
NAME = "sparkfleet"
#: The package URL of a distribution.
PURL = "pkg:pypi/{}@{}"


def document() -> dict[str, Any]:
    """The bill as CycloneDX has it in JSON. `SOURCE_DATE_EPOCH` sets its time."""
    found = {str(canonicalize_name(part.name)): part for part in metadata.distributions() if part.name}
    own = found.pop(NAME, None)
    components = [_component(name, found[name]) for name in sorted(found)]
    root = PURL.format(NAME, __version__)
    needs = [{"ref": root, "dependsOn": _needs(own, found) if own else [item["bom-ref"] for item in components]}]
    needs += [{"ref": item["bom-ref"], "dependsOn": _needs(found[item["name"]], found)} for item in components]
    moment = int(os.environ.get("SOURCE_DATE_EPOCH") or datetime.datetime.now(datetime.UTC).timestamp())
    identity = "\n".join([root, *(item["bom-ref"] for item in components)])
    return {
        "$schema": f"http://cyclonedx.org/schema/bom-{SPECIFICATION}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": SPECIFICATION,
        "serialNumber": uuid.uuid5(uuid.NAMESPACE_URL, identity).urn,
        "version": 1,
        "metadata": {
            "timestamp": datetime.datetime.fromtimestamp(moment, datetime.UTC).isoformat().replace("+00:00", "Z"),
            "component": {"type": "application", "bom-ref": root, "name": NAME, "version": __version__, "purl": root},
        },
        "components": components,
        "dependencies": needs,
    }


def _component(name: str, part: metadata.Distribution) -> dict[str, Any]:
    purl = PURL.format(name, part.version)
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
    return [PURL.format(name, found[name].version) for name in names]


def _required(part: metadata.Distribution) -> Iterator[str]:
    for line in part.requires or []:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:  # of an old distribution
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield str(canonicalize_name(requirement.name))
