"""An inventory's files as written by hand: new, or with a host added and every other byte unchanged."""

from __future__ import annotations

import dataclasses
import difflib
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from sparkfleet_host import releases

from sparkfleet import SparkfleetError

GROUP = "sparks"
STEP = 2


@dataclasses.dataclass(frozen=True)
class Entry:
    """A host: its name, and its variables in the order in which they are written."""

    name: str
    variables: Mapping[str, Any]


def _dump(data: Mapping[str, Any], column: int = 0, step: int = STEP, flow: bool = False) -> list[str]:
    """Lines of YAML that begin at a column, in quotes only what needs them."""
    text = yaml.safe_dump(
        dict(data), default_flow_style=flow, sort_keys=False, indent=step, width=float("inf"), allow_unicode=True
    )
    return textwrap.indent(text, " " * column).splitlines() if data else []


def _block(entries: Iterable[Entry], column: int, step: int = STEP) -> list[str]:
    """Hosts below one another."""
    return _dump({entry.name: dict(entry.variables) for entry in entries}, column, step)


def _flow(entry: Entry) -> str:
    """A host as it stands between braces."""
    return _dump({entry.name: dict(entry.variables)}, flow=True)[0][1:-1]


def hosts(entries: Sequence[Entry], shared: Mapping[str, Any], gateway: str = "") -> str:
    """A new hosts.yml: Sparks, what they share, and the name of the one that is the gateway too."""
    lines = [
        "---",
        "# Made by `sparkfleet init`, yours to edit (docs/inventory.md); `sparkfleet init` adds Sparks to it.",
        f"{GROUP}:",
        "  hosts:",
        *_block(entries, 4),
    ]
    if shared:
        lines += _dump({"vars": dict(shared)}, 2)
    if gateway:
        lines += ["# One address for all Sparks (docs/gateway.md).", "gateways:", "  hosts:", f"    {gateway}: {{}}"]
    elif len(entries) > 1:
        first = entries[0].name
        lines += [
            "# One address for all Sparks (docs/gateway.md):",
            "# gateways:",
            "#   hosts:",
            f"#     {first}: {{}}",
        ]
    return "\n".join(lines) + "\n"


def settings(values: Mapping[str, Any], gated: bool) -> str:
    """A new group_vars/sparks.yml: what differs from the defaults, and where a token goes."""
    lines = ["---", "# Every variable has a default; docs/inventory.md lists them all."]
    lines += _dump(values)
    if gated:
        lines += [
            "# A token is read from HF_TOKEN in your environment, or better from a vault:",
            '# sparkfleet_hf_token: "{{ vault_hf_token }}"',
        ]
    return "\n".join(lines) + "\n"


def group_file(folder: Path) -> Path:
    """The file of an inventory's folder that lists the Sparks. Raises SparkfleetError when none does, in YAML."""
    for path in sorted(folder.glob("*.y*ml")):
        if _group(_compose(path, read(path))) is not None:
            return path
    raise SparkfleetError(
        f"{folder}: no YAML file there has the group {GROUP}; add the host by hand, or use another folder"
    )


def add(path: Path, text: str, entries: Sequence[Entry]) -> str:
    """`text` of the file `path` with these hosts at the end of the group's, in the manner of the last one; all other
    bytes stay. Raises SparkfleetError where that cannot be done."""
    node = _group(_compose(path, text))
    if node is None:
        raise SparkfleetError(f"{path}: it has no group {GROUP}")
    made = _added(text, node[0], node[1], entries)
    _check(path, text, made, entries)
    return made


def _added(text: str, key: yaml.Node, group: yaml.Node, entries: Sequence[Entry]) -> str:
    """The text with the hosts; `key` and `group` are the group's name and content."""
    lines = text.splitlines(keepends=True)
    end = "\r\n" if lines and lines[0].endswith("\r\n") else "\n"
    found = _entry(group, "hosts")
    if found is None:  # a group with no hosts of its own, or none at all
        column = key.start_mark.column + STEP
        below = [f"{' ' * column}hosts:", *_block(entries, column + STEP)]
        return _after(lines, key.start_mark.line, below, end) if not _is_flow(group) else text
    name, known = found
    if not isinstance(known, yaml.MappingNode) or not known.value:
        inner = _block(entries, name.start_mark.column + STEP)
        return (
            _after(lines, name.start_mark.line, inner, end) if known.end_mark.index == known.start_mark.index else text
        )
    if _is_flow(known):
        body = text[: known.end_mark.index - 1].rstrip()
        comma = " " if body.endswith(",") else ", "
        return body + comma + ", ".join(map(_flow, entries)) + text[len(body) :]
    first, last = known.value[0][0], known.value[-1]
    column = first.start_mark.column
    if _is_flow(last[1]) and last[1].value:
        inner = [" " * column + _flow(entry) for entry in entries]
    else:
        block = isinstance(last[1], yaml.MappingNode) and last[1].value and not _is_flow(last[1])
        step = last[1].value[0][0].start_mark.column - column if block else STEP
        inner = _block(entries, column, step)
    return _after(lines, _last_line(last), inner, end)


def _after(lines: list[str], line: int, new: Sequence[str], end: str) -> str:
    if lines[line].rstrip("\r\n") == lines[line]:
        lines[line] += end
    return "".join([*lines[: line + 1], *(f"{text}{end}" for text in new), *lines[line + 1 :]])


def _last_line(pair: tuple[yaml.Node, yaml.Node]) -> int:
    """The last line that a key and its value take, comments after it left aside."""
    key, value = pair
    if isinstance(value, yaml.MappingNode) and not _is_flow(value) and value.value:
        return _last_line(value.value[-1])
    if isinstance(value, yaml.SequenceNode) and not _is_flow(value) and value.value:
        return _last_line((value.value[-1], value.value[-1]))
    if value.end_mark.index == value.start_mark.index:  # no value at all
        return int(key.end_mark.line)
    if isinstance(value, yaml.ScalarNode) and value.style in ("|", ">"):
        return int(value.end_mark.line) - 1
    return int(value.end_mark.line)


def _is_flow(node: yaml.Node) -> bool:
    return isinstance(node, yaml.CollectionNode) and bool(node.flow_style)


def _compose(path: Path, text: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise SparkfleetError(f"{path} cannot be read: {error}") from None


def _entry(node: yaml.Node | None, name: str) -> tuple[yaml.Node, yaml.Node] | None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value == name:
                return key, value
    return None


def _group(node: yaml.Node | None) -> tuple[yaml.Node, yaml.Node] | None:
    """Name and content of the group: the first that has hosts, else the first that is there. Groups nest."""
    named: tuple[yaml.Node, yaml.Node] | None = None
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        if key.value == GROUP:
            if _entry(value, "hosts"):
                return key, value
            named = named or (key, value)
        below = _entry(value, "children")
        deeper = _group(below[1]) if below else None
        if deeper and (_entry(deeper[1], "hosts") or named is None):
            named = deeper
            if _entry(deeper[1], "hosts"):
                return deeper
    return named


def _check(path: Path, before: str, after: str, entries: Sequence[Entry]) -> None:
    """The new text must mean the same as the old one plus the hosts, or nothing is written."""
    wanted = {entry.name: dict(entry.variables) for entry in entries}
    try:
        old, new = (yaml.load(text, Loader=_Tolerant) for text in (before, after))  # noqa: S506 - builds plain data
        found = _remove(new, wanted)
    except (yaml.YAMLError, AttributeError, TypeError):
        old, new, found = None, "", {}
    if found != wanted or _plain(old) != _plain(new):
        lines = "\n".join(_block(entries, 4))
        raise SparkfleetError(f"{path} cannot be edited automatically; add by hand:\n{lines}")


class _Tolerant(yaml.SafeLoader):
    """Reads tags such as !vault too, as plain values."""


def _tagged(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> str:
    return f"{suffix} {node.value}"


_Tolerant.add_multi_constructor("!", _tagged)


def _remove(document: Any, names: Iterable[str]) -> dict[str, Any]:
    """Take hosts out of the group of a document; what they had."""
    taken: dict[str, Any] = {}

    def walk(groups: Any) -> None:
        for name, group in (groups or {}).items() if isinstance(groups, dict) else ():
            if not isinstance(group, dict):
                continue
            if name == GROUP and isinstance(group.get("hosts"), dict):
                for host in names:
                    if host in group["hosts"]:
                        taken[host] = group["hosts"].pop(host) or {}
            walk(group.get("children"))

    walk(document)
    return taken


def _plain(value: Any) -> Any:
    """Without what is empty: a group with no hosts is one that has none."""
    if isinstance(value, dict):
        kept = {key: _plain(item) for key, item in value.items()}
        return {key: item for key, item in kept.items() if item not in (None, {})}
    return value


def diff(before: str, after: str, name: str) -> str:
    """What changes in a file, as `diff -u` shows it."""
    lines = difflib.unified_diff(
        before.splitlines(keepends=True), after.splitlines(keepends=True), f"{name} (as it is)", name, n=2
    )
    return "".join(lines)


def read(path: Path) -> str:
    """A file's text with its line ends as they are. Raises SparkfleetError."""
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            return stream.read()
    except (OSError, UnicodeDecodeError) as error:
        raise SparkfleetError(f"{path} cannot be read: {error}") from None


def write(path: Path, text: str) -> None:
    """Write a file atomically. Raises SparkfleetError."""
    try:
        releases.write_bytes(path, text.encode(), path.stat().st_mode & 0o777 if path.exists() else 0o644)
    except OSError as error:
        raise SparkfleetError(f"{path} cannot be written: {error.strerror or error}") from None
