"""Bills of materials: of this environment, and of a Spark's files; each is consistent in itself."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import sys
import urllib.parse
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from sparkfleet_host.cache import manifest_path
from sparkfleet_host.releases import Store

from sparkfleet import SparkfleetError, __version__
from sparkfleet.cli import main
from sparkfleet.packaging import sbom
from tests.unit.fakes import fake_release

COMMIT, IMAGE = "c" * 40, f"nvcr.io/nvidia/vllm:25.09-py3@sha256:{'d' * 64}"
FILES = {"model.safetensors": {"size": 9, "sha256": "5" * 64}, "config.json": {"size": 2, "sha1": "1" * 40}}


def deployed(folder: Path) -> dict[str, str]:
    """A Spark's folders with a release, as variables."""
    engine = fake_release.an_engine("vllm-m", image=IMAGE, repo="acme/tiny", revision=COMMIT)
    store = Store(folder / "project", folder / "state", str(folder / "lock"))
    (folder / "project" / "releases").mkdir(parents=True)
    store.point(store.stage("services: {}\n", fake_release.plan(engine), fake_release.lock(engine)))
    manifest = manifest_path(folder / "hf", "acme/tiny", COMMIT)
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"repo": "acme/tiny", "commit": COMMIT, "files": FILES}))
    program = folder / "project" / "lib" / "sparkfleet_host.pyz"
    program.parent.mkdir()
    program.write_bytes(b"program")
    return {"sparkfleet_project_dir": str(folder / "project"), "sparkfleet_cache_dir": str(folder / "hf")}


def test_what_a_spark_runs_is_on_its_bill(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable, "ansible_become": False}
    inventory = {"sparks": {"hosts": {"spark-1": {**own, **deployed(tmp_path)}}}}
    (tmp_path / "hosts.yml").write_text(json.dumps(inventory))
    folder = tmp_path / "bills"
    assert main.main(["sbom", str(folder), "-i", str(tmp_path / "hosts.yml")]) == 0, capsys.readouterr()
    assert sorted(path.name for path in folder.iterdir()) == ["controller.cdx.json", "spark-1.cdx.json"]
    made = json.loads((folder / "spark-1.cdx.json").read_text())
    about = made["metadata"]["component"]
    assert (about["type"], about["name"], about["version"]) == ("device", "spark-1", "release 1")
    parts = {part["type"]: part for part in reversed(made["components"])}
    assert parts["operating-system"]["name"] == platform.freedesktop_os_release()["ID"]
    digest = "d" * 64
    assert parts["container"]["hashes"] == [{"alg": "SHA-256", "content": digest}]
    assert parts["container"]["purl"] == (
        f"pkg:oci/vllm@sha256:{digest}?repository_url=nvcr.io/nvidia/vllm&tag=25.09-py3"
    )
    model = parts["machine-learning-model"]
    assert model["purl"] == f"pkg:huggingface/acme/tiny@{COMMIT}"
    files = {file["name"]: file for file in model["components"]}
    assert files["model.safetensors"]["hashes"] == [{"alg": "SHA-256", "content": "5" * 64}]
    assert files["config.json"]["properties"] == [{"name": "sparkfleet:git-blob", "value": "1" * 40}]
    program = hashlib.sha256(b"program").hexdigest()
    assert parts["application"]["hashes"] == [{"alg": "SHA-256", "content": program}]
    python = next(part for part in made["components"] if part["name"] == "python3")  # of this machine
    version = re.escape(urllib.parse.quote(python["version"], safe=":"))
    assert re.fullmatch(rf"pkg:deb/\w+/python3@{version}\?arch=\w+&distro=\w+", python["purl"])
    refs = [part["bom-ref"] for part in made["components"]]
    assert len({*refs}) == len(refs)
    assert {item["ref"]: item["dependsOn"] for item in made["dependencies"]}[about["bom-ref"]] == refs


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ([], "facts"),
        ({"os": {"id": 7}}, "os: id"),
        ({"os": {}, "engines": [{}] * 17}, "engines"),
        ({"os": {}, "engines": [{"image": "latest", "models": []}]}, "an image"),
        ({"os": {}, "engines": [{"image": IMAGE, "models": [{"repo": "../x"}]}]}, "a model"),
        (
            {
                "os": {},
                "engines": [{"image": IMAGE, "models": [{"repo": "a/b", "revision": "m", "files": {"../x": {}}}]}],
            },
            "not a valid file name",
        ),
        ({"os": {}, "engines": [], "program": "x"}, "the program"),
        ({"os": {}, "engines": [], "packages": {"A B": {}}}, "a package"),
        ({"os": {}, "engines": [], "packages": {"a-b": {"version": "1\n"}}}, "version of a-b"),
    ],
)
def test_a_spark_that_answers_oddly_is_named(facts: Any, words: str) -> None:
    with pytest.raises(SparkfleetError, match="spark-1 answers oddly: ") as error:
        sbom.spark("spark-1", facts)
    assert words in str(error.value)


def test_of_hosts_it_needs_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["sbom", "-l", "spark-1"]) == 2
    assert "sbom -l HOSTS needs a FOLDER" in capsys.readouterr().err


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


@pytest.mark.parametrize("value", ["abc", "-1", "1.5", "²", "9" * 12, "9" * 5000])
def test_a_time_that_is_none_is_named(
    value: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", value)
    assert main.main(["sbom"]) == 2
    assert "sparkfleet: SOURCE_DATE_EPOCH: " in (said := capsys.readouterr().err) and "unset it" in said
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "253402300799")
    assert sbom.document()["metadata"]["timestamp"] == "9999-12-31T23:59:59Z"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", sbom.document()["metadata"]["timestamp"])
