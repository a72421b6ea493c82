"""The bill of materials is of this environment, and in itself consistent."""

from __future__ import annotations

import json
import re
from importlib import metadata

import pytest

from sparkfleet import __version__
from sparkfleet.cli import main
from sparkfleet.packaging import sbom


def test_what_is_installed_is_on_the_bill(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert main.main(["sbom"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["bomFormat"], made["specVersion"], made["version"]) == ("CycloneDX", "1.6", 1)
    assert re.fullmatch(r"urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", made["serialNumber"])
    assert made["metadata"]["timestamp"] == "2023-11-14T22:13:20Z"
    assert made["metadata"]["component"]["version"] == __version__
    parts = {part["name"]: part for part in made["components"]}
    for name in ("ansible-core", "huggingface-hub", "pyyaml", "cryptography"):
        assert parts[name]["version"] == metadata.version(name)
        assert parts[name]["purl"] == f"pkg:pypi/{name}@{metadata.version(name)}"
    assert parts["pyyaml"]["licenses"] == [{"license": {"name": "MIT License"}}]
    assert "sparkfleet" not in parts and len(parts) == len(made["components"])
    refs = {part["bom-ref"] for part in (*made["components"], made["metadata"]["component"])}
    needs = {item["ref"]: item["dependsOn"] for item in made["dependencies"]}
    assert needs.keys() == refs and {ref for named in needs.values() for ref in named} <= refs
    assert parts["pyyaml"]["bom-ref"] in needs[parts["ansible-core"]["bom-ref"]]
    assert parts["ansible-core"]["bom-ref"] in needs[made["metadata"]["component"]["bom-ref"]]
    assert sbom.document() == made
