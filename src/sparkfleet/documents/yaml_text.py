"""YAML from people and from hosts, read within limits: cards, `--set`, compose files.

A subset of YAML 1.1 that is JSON's data: texts, whole and finite numbers, true, false, null, lists, and mappings with
texts as keys. What looks like a date is a text. Whatever else there is, and whatever is too large, too deep or refers
to itself, ends as a YamlError; nothing else is raised.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from typing import Any

import yaml
from sparkfleet_host.bounded import printable

from sparkfleet import SparkfleetError

CHARACTERS = 256 << 10
#: Of a compose file that a host sends back.
COMPOSE_FILE = 4 << 20
DEPTH = 24
#: Values in all, those of an anchor counted each time it is referred to.
VALUES = 20_000
NUMBER = 40  # characters of a number
#: What JSON readers elsewhere take as a whole number.
LARGEST = 2**63 - 1
_PLANE_ENDS = "".join(chr(plane << 16 | last) for plane in range(17) for last in (0xFFFE, 0xFFFF))
#: What Compose, argv and YAML cannot carry: control characters, surrogates, noncharacters.
_CONTROL = re.compile(rf"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef{_PLANE_ENDS}]")
_TAGS = {
    f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map", "merge", "value")
}


class YamlError(SparkfleetError):
    """The text is not YAML of this kind: why, and the line (from 1; 0 for none)."""

    def __init__(self, problem: str, line: int = 0) -> None:
        super().__init__(problem)
        self.line = line


class _Loader(yaml.SafeLoader):
    def __init__(self, text: str, limit: int) -> None:
        super().__init__(text)
        self._limit = limit
        self._depth = self._values = self._characters = 0
        self._sizes: dict[int, tuple[int, int]] = {}  # of a node: its values and their characters

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Build one node, its children first; counts them."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        anchored = self.anchors.get(event.anchor) if isinstance(event, yaml.AliasEvent) else None
        if anchored is not None and id(anchored) not in self._sizes:
            raise _problem(f"the alias *{event.anchor} refers to its own parent", event.start_mark)
        self._depth += 1
        values, characters = self._values, self._characters
        if self._depth > DEPTH:
            raise _problem(f"nested more than {DEPTH} deep", event.start_mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        if node is None:
            return node
        length = len(node.value) if isinstance(node, yaml.ScalarNode) else 0
        size = (self._values - values + 1, self._characters - characters + length)
        more, longer = self._sizes.setdefault(id(node), size)
        self._values, self._characters = values + more, characters + longer
        for found, most, what in ((self._values, VALUES, "values"), (self._characters, self._limit, "characters")):
            if found > most:
                raise _problem(f"more than {most} {what}, those of anchors counted each time", node.start_mark)
        if node.tag not in _TAGS:
            raise _problem(f"the tag {_short(node.tag)} is not known here: write plain text, quoted", node.start_mark)
        return node


# A date is a text here, as in every file of JSON.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if not tag.endswith(":timestamp")]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _scalar(kind: str) -> Any:
    plain = getattr(yaml.SafeLoader, f"construct_yaml_{kind}")

    def construct(loader: _Loader, node: yaml.Node) -> Any:
        text = str(node.value)
        if len(text) > NUMBER:
            raise _problem(f"{_short(text)} is not a number within its limits", node.start_mark)
        try:
            value = plain(loader, node)
        except (ValueError, KeyError, IndexError):
            words = {"int": "a whole number", "float": "a number", "bool": "true or false"}
            raise _problem(f"{_short(text)} is not {words[kind]}", node.start_mark) from None
        if kind != "bool" and not abs(value) <= LARGEST:  # false for NaN as well
            raise _problem(f"{_short(text)} is not a number within its limits", node.start_mark)
        return value

    return construct


def _text(loader: _Loader, node: Any) -> str:
    text = str(loader.construct_scalar(node))
    if found := _CONTROL.search(text):
        raise _problem(f"a text has the control character {found[0]!a}", node.start_mark)
    return text


def _mapping(loader: _Loader, node: yaml.Node) -> dict[str, Any]:
    if not isinstance(node, yaml.MappingNode):
        raise _problem("a mapping is expected here", node.start_mark)
    loader.flatten_mapping(node)
    made: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            shown = _short(str(key) if isinstance(key, Hashable) else "a list or a mapping")
            raise _problem(f"the key {shown} is not a text: write it in quotes", key_node.start_mark)
        made[key] = loader.construct_object(value_node, deep=True)
    return made


def _list(loader: _Loader, node: Any) -> list[Any]:
    made: list[Any] = loader.construct_sequence(node, deep=True)
    return made


_Loader.yaml_constructors = {
    "tag:yaml.org,2002:str": _text,
    "tag:yaml.org,2002:value": _text,
    "tag:yaml.org,2002:null": lambda loader, node: None,
    "tag:yaml.org,2002:seq": _list,
    "tag:yaml.org,2002:map": _mapping,
    **{f"tag:yaml.org,2002:{kind}": _scalar(kind) for kind in ("int", "float", "bool")},
}


def load(text: str, limit: int = CHARACTERS) -> Any:
    """The data of one YAML document; None for an empty one. Raises YamlError."""
    return parse(text, limit)[1]


def compose_file(text: Any) -> Any:
    """The data of a compose file that a host sends back; None where there is none, or it cannot be read."""
    try:
        return load(text, COMPOSE_FILE) if isinstance(text, str) else None
    except YamlError:
        return None


def parse(text: str, limit: int = CHARACTERS) -> tuple[yaml.Node | None, Any]:
    """The nodes of one YAML document, as it is written, and its data. Raises YamlError."""
    if len(text) > limit:
        raise YamlError(f"more than {limit} characters")
    try:
        loader = _Loader(text, limit)
        node = loader.get_single_node()
        # Merging (`<<`) changes nodes.
        return node, None if node is None else loader.construct_document(_Loader(text, limit).get_single_node())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        if problem == "but found another document":  # the end of PyYAML's sentence
            problem = "a second document begins here, one is expected"
        raise YamlError(f"not valid YAML: {printable(str(problem), 200)}", mark.line + 1 if mark else 0) from None
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError) as error:
        # Of PyYAML's own parts: escapes out of range (`"\\UFFFFFFFF"`), tags without a handle.
        raise YamlError(f"not valid YAML: {printable(str(error), 200)}") from None


def measure(text: str, what: str, values: int = 1_000_000, depth: int = 100) -> None:
    """Refuse YAML that another reader (Ansible) will parse and that would exhaust its memory or stack: nested
    too deep, or large once its anchors are followed. Any tags may be in it, and invalid YAML is left to the reader.
    Raises SparkfleetError."""
    sizes: dict[str | None, int] = {}
    opened: list[tuple[str | None, int]] = []
    count = 0
    try:
        for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            if isinstance(event, yaml.CollectionStartEvent):
                opened.append((event.anchor, count))
                count += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                anchor, before = opened.pop()
                if anchor:
                    sizes[anchor] = count - before
            elif isinstance(event, yaml.AliasEvent):
                if event.anchor in (anchor for anchor, _ in opened):
                    raise SparkfleetError(f"{what}: the alias *{event.anchor} refers to its own parent")
                count += sizes.get(event.anchor, 1)
            elif isinstance(event, yaml.ScalarEvent):
                count += 1
            if len(opened) > depth:
                raise SparkfleetError(f"{what}: nested more than {depth} deep")
            if count > values:
                raise SparkfleetError(f"{what}: more than {values} values, those of anchors counted each time")
    except (yaml.YAMLError, ValueError, UnicodeError):
        return


def control(text: str) -> tuple[str, int] | None:
    """The first character of a text that YAML and argv cannot carry, such as `U+FFFE`, and its line (from 1); tabs and
    ends of lines are none."""
    found = next((found for found in _CONTROL.finditer(text) if found[0] != "\r"), None)
    return (f"U+{ord(found[0]):04X}", text.count("\n", 0, found.start()) + 1) if found else None


def check(value: Any, what: str, depth: int = DEPTH) -> None:
    """Check that data read by another reader (Ansible) is within this module's limits. Raises
    SparkfleetError naming the place below `what`."""
    _check(value, what, depth, [VALUES])


def _check(value: Any, what: str, depth: int, left: list[int]) -> None:
    left[0] -= 1
    if depth < 0 or left[0] < 0:
        limit = f"{DEPTH} deep" if depth < 0 else f"{VALUES} values"
        raise SparkfleetError(f"{what}: nested or large beyond the limit ({limit})")
    if isinstance(value, str):
        if found := _CONTROL.search(value):
            raise SparkfleetError(f"{what}: has the control character {found[0]!a}")
    elif isinstance(value, int | float):
        if not abs(value) <= LARGEST:  # false for NaN as well
            raise SparkfleetError(f"{what}: {_short(_digits(value))} is not a number within its limits")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise SparkfleetError(f"{what}: the key {_short(str(key))} is not a text: write it in quotes")
            _check(key, what, depth - 1, left)
            _check(item, f"{what}.{printable(key, 60)}", depth - 1, left)
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            _check(item, f"{what}[{place}]", depth - 1, left)
    elif value is not None:
        raise SparkfleetError(
            f"{what}: {_short(str(value))} ({type(value).__name__}) is neither a text nor a number: write it in quotes"
        )


def _digits(value: float) -> str:
    """A number in words: `str` refuses one of thousands of digits."""
    return f"a number of {value.bit_length()} bits" if isinstance(value, int) else str(value)


def _problem(text: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=mark)


def _short(text: str) -> str:
    return repr(printable(text, 60))
