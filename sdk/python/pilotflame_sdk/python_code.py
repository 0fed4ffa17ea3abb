"""Names and classes in generated Python code."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

PLAIN_TYPES: Final[Mapping[str, str]] = {
    "string": "str",
    "integer": "int",
    "number": "float",
    "boolean": "bool",
    "null": "None",
}
"""Annotations of the plain types of JSON."""
ANNOTATION_NAMES: Final = frozenset(
    {"str", "int", "float", "bool", "Any", "Literal", "Mapping", "Sequence", "Dict", "List"}
)
"""Names that annotations use: a field of a class with such a name would hide it."""


def snake_case(name: str) -> str:
    """Return a name of the API in snake case: `dryRun` as `dry_run`."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    return re.sub(r"\W+", "_", words).strip("_")


def argument_name(wire_name: str) -> str:
    """Return the name of the Python parameter for a field of the API: `from` as `from_`."""
    name = snake_case(wire_name)
    if not name.isidentifier():
        # Digits at the beginning, and characters such as ² that are no part of identifiers.
        name = re.sub(r"[^A-Za-z0-9_]", "", f"field_{name}")
    return f"{name}_" if keyword.iskeyword(name) else name


def argument_names(wire_names: Iterable[str]) -> Mapping[str, str]:
    """Return the names of Python parameters by the fields of the API; equal names are numbered from 2 on."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for one in sorted(wire_names):
        stem = argument_name(one)
        name, number = stem, 1
        while name in taken:
            number += 1
            name = f"{stem}_{number}"
        taken.add(name)
        names[one] = name
    return names


def class_name(name: str) -> str:
    """Return the name of a class: `http-request` as `HttpRequest`."""
    whole = "".join(part[:1].upper() + part[1:] for part in re.split(r"\W|_", name))
    return "".join(one for one in whole if f"x{one}".isidentifier())


def join_union(parts: Sequence[str]) -> str:
    """Return the annotation of a value that has one of several types."""
    distinct = list(dict.fromkeys(parts))
    return "Any" if "Any" in distinct else " | ".join(distinct)


def write_typed_dict(
    name: str, always: Mapping[str, str], optional: Mapping[str, str], docstring: str = ""
) -> str:
    """Return a `TypedDict` with required and optional fields, as Python 3.10 writes it."""
    if not optional:
        return _write_class(name, "TypedDict", always, docstring)
    if not always:
        return _write_class(name, "TypedDict, total=False", optional, docstring)
    base = f"_{name}Always"
    return _write_class(base, "TypedDict", always, "") + _write_class(
        name, f"{base}, total=False", optional, docstring
    )


def _write_class(name: str, bases: str, fields: Mapping[str, str], docstring: str) -> str:
    """Return the code of a `TypedDict` class, in the form of a call if a field can't be an attribute."""
    if not all(map(_is_class_field, fields)):
        items = "".join(f"    {key!r}: {one!r},\n" for key, one in fields.items())
        totality = ", total=False" if "total=False" in bases else ""
        return f"\n\n{name} = TypedDict({name!r}, {{\n{items}}}{totality})\n"
    shown = f'    """{docstring}"""\n\n' if docstring else ""
    lines = "".join(f"    {key}: {one}\n" for key, one in fields.items())
    return f"\n\nclass {name}({bases}):\n{shown}{lines}"


def _is_class_field(name: str) -> bool:
    is_name = name.isidentifier() and not keyword.iskeyword(name)
    return is_name and not name.startswith("__") and name not in ANNOTATION_NAMES
