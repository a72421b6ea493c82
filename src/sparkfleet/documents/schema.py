"""Checking of YAML files against a JSON schema, with errors that name file and line.

The schema's own keyword ``expected`` says in words what a value must be.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from sparkfleet import SparkfleetError
from sparkfleet.documents import yaml_text

Place = tuple[str | int, ...]
#: Problems that one error lists.
MOST = 20


def _pattern(_: Any, pattern: str, instance: Any, __: Any) -> Iterator[jsonschema.ValidationError]:
    # `search`, as the standard has it, lets `$` match before a line's end.
    if isinstance(instance, str) and not re.fullmatch(pattern, instance):
        yield jsonschema.ValidationError(f"{instance!r} does not match {pattern!r}")


#: 1.0 is not an integer: vLLM would be given "1.0".
_Validator = jsonschema.validators.extend(  # type: ignore[no-untyped-call]
    jsonschema.Draft202012Validator,
    {"pattern": _pattern},
    type_checker=jsonschema.Draft202012Validator.TYPE_CHECKER.redefine(
        "integer", lambda _, value: isinstance(value, int) and not isinstance(value, bool)
    ),
)


class Document:
    """A YAML file (or text) with the line of each of its keys and items."""

    def __init__(self, path: Path, text: str, limit: int = yaml_text.CHARACTERS) -> None:
        self.path = path
        self.lines: dict[Place, int] = {(): 1}
        self.data: Any
        try:
            node, self.data = yaml_text.parse(text, limit)
        except yaml_text.YamlError as error:
            raise SparkfleetError(f"{path}:{error.line}: {error}" if error.line else f"{path}: {error}") from None
        self._read(node, ())

    def _read(self, node: yaml.Node | None, place: Place) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                inner = (*place, key.value)
                line = key.start_mark.line + 1
                if inner in self.lines:
                    text = f"{name(inner)} stands twice, in lines {self.lines[inner]} and {line}"
                    raise SparkfleetError(f"{self.path}:{line}: {text}")
                self.lines[inner] = line
                self._read(value, inner)
        elif isinstance(node, yaml.SequenceNode):
            for number, value in enumerate(node.value):
                self.lines[(*place, number)] = value.start_mark.line + 1
                self._read(value, (*place, number))

    def line(self, place: Place) -> int:
        """Line of a key, or of the nearest one around it."""
        while place not in self.lines:
            place = place[:-1]
        return self.lines[place]

    def error(self, place: Place, problem: str) -> SparkfleetError:
        """An error at a place of the file."""
        return SparkfleetError(f"{self.path}:{self.line(place)}: {problem}")

    def check(self, schema: dict[str, Any]) -> None:
        """Raise one error with every problem, in the order of the lines."""
        found = sorted({(self.line(place), text) for place, text in problems(self.data, schema)})
        if found:
            raise SparkfleetError(joined([f"{self.path}:{line}: {text}" for line, text in found]))


def joined(found: Sequence[str]) -> str:
    """Problems, a line each; of very many the first ones."""
    more = [f"... and {len(found) - MOST} more"] if len(found) > MOST else []
    return "\n".join([*found[:MOST], *more])


def name(place: Place) -> str:
    """A place as people write it: ``profiles.throughput``, ``shape.attention[0]``."""
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def problems(data: Any, schema: dict[str, Any], prefix: str = "") -> Iterator[tuple[Place, str]]:
    """Each place where ``data`` is not what ``schema`` says, with the problem in words."""
    errors = list(itertools.islice(_Validator(schema).iter_errors(data), 10 * MOST))
    misspelt: set[Place] = set()
    for error in errors:
        place: Place = tuple(error.absolute_path)
        if error.validator == "additionalProperties" and error.schema.get("additionalProperties") is False:
            known = list(error.schema.get("properties", {}))
            for key in itertools.islice((key for key in error.instance if key not in known), MOST):
                near = difflib.get_close_matches(str(key), [k for k in known if k not in error.instance], n=1)
                misspelt |= {(*place, match) for match in near}
                hint = f"did you mean {near[0]}? " if near else ""
                yield (*place, key), f"{prefix}{name((*place, key))}: unknown key; {hint}Known are {', '.join(known)}"
    for error in errors:
        place = tuple(error.absolute_path)
        where = prefix + name(place)
        if error.validator == "additionalProperties" and error.schema.get("additionalProperties") is False:
            continue
        if error.validator == "required":
            missing = next(key for key in error.validator_value if error.message.startswith(f"'{key}' "))
            if (*place, missing) not in misspelt:
                yield place, f"{where + ': ' if where else ''}the key {missing} is missing"
        elif "propertyNames" in error.absolute_schema_path:
            yield (
                (*place, error.instance),
                f"{prefix}{name((*place, error.instance))}: must be {error.schema['expected']}",
            )
        else:
            expected = error.schema.get("expected") or error.message
            yield place, f"{where or 'the file'}: must be {expected}, not {shown(error.instance)}"


def digest(data: Any) -> str:
    """sha256:... of plain data, however it was written."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def shown(value: Any) -> str:
    """A value of a file, shortened."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
