"""Known vulnerabilities: advisories as the OSV database has them, versions as dpkg and PyPI compare them."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkfleet import SparkfleetError
from sparkfleet.cli import main
from sparkfleet.packaging import advisories, sbom

#: In the order of dpkg.
DEB = ["0~", "1.0~~", "1.0~rc1-1", "1.0", "1.0-1", "1.0-1+b1", "1.0-10", "1.0a", "1.0+git", "1.0.1", "1:0.1", "2:0"]


def advisory(ecosystem: str, name: str, *events: dict[str, str], **more: Any) -> dict[str, Any]:
    ranges = [{"type": "ECOSYSTEM", "events": list(events)}]
    return {
        "id": "X-1",
        "summary": "It breaks.",
        "affected": [{"package": {"ecosystem": ecosystem, "name": name}, "ranges": ranges}],
        **more,
    }


def bill(**packages: str) -> dict[str, Any]:
    entries = {name: {"version": version, "architecture": "arm64", "source": ""} for name, version in packages.items()}
    facts = {"os": {"id": "ubuntu", "version": "24.04", "codename": "noble"}, "engines": [], "packages": entries}
    return sbom.spark("s1", facts)


def found(folder: Path, document: dict[str, Any], *items: dict[str, Any]) -> list[str]:
    file = folder / "osv.json"
    file.write_text(json.dumps(list(items)))
    return [str(item) for item in advisories.check([document], str(file))[0]]


def test_versions_of_packages_are_in_the_order_of_dpkg() -> None:
    if shutil.which("dpkg"):
        for one, other in itertools.pairwise(DEB):
            subprocess.run(["dpkg", "--compare-versions", one, "lt", other], check=True)
    backwards = DEB[::-1]
    assert sorted(backwards, key=advisories._deb) == DEB


def test_ranges_begin_and_end(tmp_path: Path) -> None:
    fixed = advisory("Ubuntu:24.04:LTS", "runc", {"introduced": "0"}, {"fixed": "1.1.12-0ubuntu3.1"})
    assert found(tmp_path, bill(runc="1.1.12-0ubuntu3"), fixed) == [
        "runc 1.1.12-0ubuntu3: X-1 (fixed in 1.1.12-0ubuntu3.1) It breaks."
    ]
    assert found(tmp_path, bill(runc="1.1.12-0ubuntu3.1"), fixed) == []
    assert found(tmp_path, bill(runc="1.1.12-0ubuntu3"), {**fixed, "withdrawn": "2026-01-01T00:00:00Z"}) == []
    other = advisory("Ubuntu:22.04:LTS", "runc", {"introduced": "0"}, {"fixed": "9"})
    assert found(tmp_path, bill(runc="1"), other, advisory("Debian", "runc", {"introduced": "0"})) == []
    last = advisory("Ubuntu", "runc", {"introduced": "1.1"}, {"last_affected": "1.2"}, {"introduced": "3"})
    affected = [version for version in ("1.0", "1.1", "1.2", "1.3", "3") if found(tmp_path, bill(runc=version), last)]
    assert affected == ["1.1", "1.2", "3"]


def test_a_package_is_known_by_its_source_too(tmp_path: Path) -> None:
    document = bill(runc="1")
    document["components"][-1]["properties"] = [{"name": "sparkfleet:source-package", "value": "runc-app"}]
    listed = advisory("Ubuntu", "runc-app")
    listed["affected"][0]["versions"] = ["1"]
    assert found(tmp_path, document, listed) == ["runc-app 1: X-1 (no fixed version is named) It breaks."]


def test_the_command_reads_a_zip_and_ends_with_5(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pypi = advisory("PyPI", "PyYAML", {"introduced": "0"}, {"fixed": "999"}, id="PYSEC-1")
    file = tmp_path / "all.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("PYSEC-1.json", json.dumps(pypi))
    assert main.main(["sbom", "--advisories", str(file)]) == 5
    said = capsys.readouterr().err
    assert ": PYSEC-1 (fixed in 999) It breaks." in said and "1 finding; 1 advisories were compared" in said
    (tmp_path / "none.json").write_text(json.dumps(advisory("PyPI", "pyyaml", {"introduced": "999"})))
    assert main.main(["sbom", "--advisories", str(tmp_path / "none.json")]) == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[", "osv.json"),
        ("[]", "no advisory is in it"),
        ("7", "must be"),
        ('{"id": 7}', "id"),
        ('{"id": "X", "affected": {}}', "affected"),
        ('{"id": "X", "affected": [{"package": []}]}', "package"),
        ("[" * 5000, "nested"),
    ],
)
def test_what_is_no_advisory_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "osv.json").write_text(text)
    with pytest.raises(SparkfleetError, match="--advisories") as error:
        advisories.check([bill(runc="1")], str(tmp_path / "osv.json"))
    assert words in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SparkfleetError, match=r"--advisories .*nowhere"):
        advisories.check([], str(tmp_path / "nowhere"))
    (tmp_path / "bad.zip").write_text("no zip")
    with pytest.raises(SparkfleetError, match=r"--advisories .*bad\.zip"):
        advisories.check([], str(tmp_path / "bad.zip"))


@pytest.mark.parametrize(
    ("ecosystem", "version"),
    [("PyPI", "1" * 5000), ("PyPI", f"1!{'9' * 5000}"), ("Ubuntu", "9" * 5000), ("Ubuntu", f"{'9' * 5000}:1")],
)
def test_a_version_without_end_is_refused_whoever_it_is_of(tmp_path: Path, ecosystem: str, version: str) -> None:
    with pytest.raises(SparkfleetError, match=r"--advisories: .*osv\.json: X-1: fixed: .* OSV format"):
        found(tmp_path, bill(runc="1"), advisory(ecosystem, "other", {"introduced": "0"}, {"fixed": version}))


def test_digits_of_versions_are_those_of_dpkg(tmp_path: Path) -> None:
    """`²` is a digit for Python, and no number."""
    for version in ("²:1", "٣:1", "1.²", "1.٣-²"):
        fixed = advisory("Ubuntu", "runc", {"introduced": "0"}, {"fixed": version})
        assert found(tmp_path, bill(runc="1"), fixed) == [f"runc 1: X-1 (fixed in {version}) It breaks."]


def archive(compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as made:
        made.writestr("ü.json", json.dumps([advisory("PyPI", "a", {"introduced": "0"})] * 20))
    return buffer.getvalue()


def test_a_damaged_archive_is_named_with_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "all.zip"
    whole = archive()
    at = whole.index(b".json") + 5
    for data in (whole[:at] + b"\xff" * 20 + whole[at + 20 :], whole.replace("ü".encode(), b"\xff\xff")):
        file.write_bytes(data)
        with pytest.raises(SparkfleetError, match=r"--advisories .*all\.zip: not a zip archive .*: download it again"):
            advisories.check([], str(file))


@given(
    st.sampled_from((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA)),
    st.lists(st.tuples(st.integers(0, 1 << 12), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_whatever_an_archive_has_is_read_or_one_error(
    tmp_path_factory: pytest.TempPathFactory, compression: int, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(archive(compression))
    for place, value in changes:
        data[place % len(data)] = value
    file = tmp_path_factory.getbasetemp() / "changed.zip"
    file.write_bytes(data)
    with contextlib.suppress(SparkfleetError):
        advisories.check([], str(file))


def test_nothing_is_asked_or_written_for_a_file_of_no_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = advisory("Ubuntu", "never-installed", {"introduced": "0"}, {"fixed": "9" * 5000})
    (tmp_path / "bad.json").write_text(json.dumps(bad))
    monkeypatch.setattr(main, "run", lambda *given: pytest.fail("hosts were asked"))
    words = ["sbom", str(tmp_path / "bills"), "--advisories", str(tmp_path / "bad.json"), "-i", str(tmp_path)]
    assert main.main(words) == 2 and not (tmp_path / "bills").exists()
    assert "bad.json: X-1: fixed: more than" in capsys.readouterr().err
