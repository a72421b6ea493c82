"""Known vulnerabilities of what is on a bill of materials, from a file: nothing is asked over the network.

The file has advisories in the OSV format (https://ossf.github.io/osv-schema/): one, a JSON array of them, a zip archive
with a file for each, as https://osv-vulnerabilities.storage.googleapis.com has them by ecosystem, or a folder of such.
"""

from __future__ import annotations

import dataclasses
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version
from sparkfleet_host import bounded
from sparkfleet_host.bounded import BoundsError, printable

from sparkfleet import SparkfleetError
from sparkfleet.user_paths import expanded

LARGEST = 16 << 20  # of a file, bytes
MOST = 200_000  # advisories
_ENTRIES = 10_000  # of a list in an advisory
_VERSION = 1000  # characters of a version; Python refuses an integer of more than 4300 digits

#: Ecosystem and name -> versions that are there, each with the release of its distribution.
Known = dict[tuple[str, str], set[tuple[str, str]]]


@dataclasses.dataclass(frozen=True)
class Finding:
    """A component that an advisory is about; `fixed`: the first version without it, "" where none is named."""

    component: str
    version: str
    advisory: str
    summary: str
    fixed: str

    def __str__(self) -> str:
        remedy = f"fixed in {self.fixed}" if self.fixed else "no fixed version is named"
        return f"{self.component} {self.version}: {self.advisory} ({remedy}) {self.summary}".rstrip()


def check(documents: Sequence[Mapping[str, Any]], place: str) -> tuple[list[Finding], int]:
    """Findings for the components of bills of materials (of `sbom`), and the number of advisories that were read.
    Raises SparkfleetError for a file that has none or is of another form, whatever the bills have."""
    known: Known = {}
    for document in documents:
        release = next((part["version"] for part in document["components"] if part["type"] == "operating-system"), "")
        for part in document["components"]:
            for name in _names(part):
                known.setdefault(name, set()).add((part["version"], release))
    found, number = dict[Finding, None](), 0
    for where, content in _files(expanded("--advisories", place)):
        try:
            data = bounded.parse_json(content, where, LARGEST)
            for entry in data if isinstance(data, list) else [data]:
                number += 1
                if number > MOST:
                    raise BoundsError(f"{where}: more than {MOST} advisories")
                advisory = bounded.as_dict(entry, where)
                identity = printable(bounded.as_str(advisory.get("id"), f"{where}: id", 200), 200)
                affected = [*_affected(advisory, f"{where}: {identity}")]
                found.update(dict.fromkeys(_affecting(advisory, identity, affected, known)))
        except BoundsError as error:
            raise SparkfleetError(f"--advisories: {error}: it must be advisories in the OSV format") from None
    if not number:
        raise SparkfleetError(f"--advisories {place}: no advisory is in it: *.json in the OSV format, or a zip of them")
    return list(found), number


def _names(part: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Ecosystem and name of a component as advisories have them; a package of a distribution by its source too."""
    kind, _, rest = str(part.get("purl", "")).removeprefix("pkg:").partition("/")
    if kind == "pypi":
        yield "PyPI", str(canonicalize_name(part["name"]))
    elif kind == "deb":
        ecosystem = rest.partition("/")[0].capitalize()
        yield ecosystem, part["name"]
        for item in part.get("properties", ()):
            if item["name"] == "sparkfleet:source-package":
                yield ecosystem, item["value"]


@dataclasses.dataclass(frozen=True)
class _Affected:
    """What an advisory says of one package; `release` of the distribution, "" for all; `ranges`: events of each."""

    ecosystem: str
    release: str
    name: str
    versions: Sequence[Any]
    ranges: Sequence[Sequence[tuple[str, str]]]


def _affected(advisory: Mapping[str, Any], at: str) -> Iterator[_Affected]:
    """Raises BoundsError, which begins with `at`."""
    for item in _list(advisory.get("affected"), f"{at}: affected", _ENTRIES):
        affected = bounded.as_dict(item, f"{at}: affected")
        package = bounded.as_dict(affected.get("package", {}), f"{at}: package")
        # PyPI, Debian:12, Ubuntu:24.04:LTS
        ecosystem, _, of = str(package.get("ecosystem", "")).partition(":")
        name = str(package.get("name", ""))
        yield _Affected(
            ecosystem,
            of.partition(":")[0],
            str(canonicalize_name(name)) if ecosystem == "PyPI" else name,
            _list(affected.get("versions"), f"{at}: versions", MOST),
            [*_ranges(affected, at)],
        )


def _ranges(affected: Mapping[str, Any], at: str) -> Iterator[list[tuple[str, str]]]:
    for item in _list(affected.get("ranges"), f"{at}: ranges", _ENTRIES):
        known = bounded.as_dict(item, f"{at}: range")
        if known.get("type") in ("ECOSYSTEM", "SEMVER"):  # not of Git
            yield [
                (kind, bounded.as_str(value, f"{at}: {printable(kind, 40)}", _VERSION))
                for event in _list(known.get("events"), f"{at}: events", _ENTRIES)
                for kind, value in bounded.as_dict(event, f"{at}: event").items()
            ]


def _list(value: Any, what: str, most: int) -> list[Any]:
    return [] if value is None else bounded.as_list(value, what, most)


def _affecting(
    advisory: Mapping[str, Any], identity: str, affected: Sequence[_Affected], known: Known
) -> Iterator[Finding]:
    if advisory.get("withdrawn"):
        return
    summary = printable(str(advisory.get("summary") or ""), 200)
    for item in affected:
        for version, release in sorted(known.get((item.ecosystem, item.name), ())):
            if item.release and item.release != release:
                continue
            hit, fixed = _is_affected(item, version)
            if hit:
                yield Finding(item.name, version, identity, summary, fixed)


def _is_affected(affected: _Affected, version: str) -> tuple[bool, str]:
    """Whether a version is affected, as the schema says how to evaluate it, and the version that fixes it."""
    order = _pypi if affected.ecosystem == "PyPI" else _deb
    hit, fixed = version in affected.versions, ""
    for events in affected.ranges:
        inside = False
        for kind, value in sorted(events, key=lambda event: order(event[1])):
            beyond = order(version) >= order(value)
            if kind == "introduced" and beyond:
                inside = True
            elif kind == "fixed":
                inside = inside and not beyond
                fixed = value if inside and not fixed else fixed
            elif kind == "last_affected":
                inside = inside and order(version) <= order(value)
        hit = hit or inside
    return hit, fixed


# -- versions --------------------------------------------------------------------------------------------------------


def _pypi(text: str) -> tuple[Any, ...]:
    try:
        return (1, Version(text))
    except InvalidVersion:
        return (0,)


def _deb(text: str) -> tuple[Any, ...]:
    """Sorts as dpkg compares (deb-version(7)); "0" of an advisory is the first of all."""
    if text == "0":
        return ()
    epoch, colon, rest = text.partition(":")
    if not colon or not re.fullmatch("[0-9]+", epoch):
        epoch, rest = "0", text
    upstream, dash, revision = rest.rpartition("-")
    if not dash:
        upstream, revision = rest, ""
    return (int(epoch), _pieces(upstream), _pieces(revision))


def _pieces(text: str) -> list[tuple[list[int], int]]:
    """Turns of other characters and digits. `~` sorts before the end, the end before letters, letters before others."""
    turns = re.findall(r"([^0-9]*)([0-9]*)", text)
    return [([*(_rank(mark) for mark in marks), 0], int(digits or 0)) for marks, digits in turns]


def _rank(mark: str) -> int:
    return -1 if mark == "~" else ord(mark) if mark.isalpha() else ord(mark) + 256


# -- files -----------------------------------------------------------------------------------------------------------


def _files(place: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents. Raises SparkfleetError."""
    try:
        paths = sorted(place.rglob("*")) if place.is_dir() else [place]
        for path in paths:
            if path.suffix == ".zip":
                yield from _members(path)
            elif path.suffix == ".json" or path == place:
                yield str(path), bounded.read_file(path, LARGEST)
    except (OSError, BoundsError) as error:
        raise SparkfleetError(f"--advisories {place}: {error}") from None


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Raises OSError, BoundsError."""
    if path.exists() and not path.is_file():
        raise BoundsError(f"{path}: not a regular file")
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist()[: MOST + 1]:
                if member.filename.endswith(".json"):
                    with archive.open(member) as file:
                        reader: Callable[[int], bytes] = file.read
                        yield f"{path}:{printable(member.filename, 200)}", bounded.read_all(reader, str(path), LARGEST)
    except (OSError, BoundsError):
        raise
    except Exception as error:  # of zipfile, zlib, lzma, struct, codecs: whatever an archive makes them raise
        reason = printable(f"{type(error).__name__}: {error}", 200)
        raise BoundsError(f"{path}: not a zip archive that can be read ({reason}): download it again") from None
