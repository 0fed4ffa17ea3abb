"""JSON Schemas of the wire types, described by the docstrings of their fields."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import pairwise
from types import UnionType
from typing import TYPE_CHECKING, Any, Final, get_args

import msgspec

from gateway.http.refusals import ErrorDetail
from gateway.http.wire import WireStruct

if TYPE_CHECKING:
    from engine.values import Json

REF: Final = "#/components/schemas/"
_SUFFIX: Final = "Shape"
"""Suffix of wire types that share their name with another type of the code; clients see it only to tell two
apart.
"""
_KINDS: Final = {str: "string", bool: "boolean", int: "integer"}
"""JSON types of enum members."""
_WARNINGS: Final = {
    "type": "array",
    "items": {"$ref": REF + ErrorDetail.__name__},
    "description": "Ignored fields of the request; absent if there are none.",
}
_NO_DEFAULT: Final = ("default", None)
"""Not shown: an optional field is one that isn't `required`."""


def build_schemas(
    types: Iterable[object], *, warning: Iterable[object] = ()
) -> tuple[list[dict[str, Json]], dict[str, dict[str, Json]]]:
    """Return the JSON Schema of each type in their order, and the named schemas that they refer to, by name.

    At least one of `types` must refer to `ErrorDetail`. `warning` are those of responses that may carry warnings
    about the request body: their schemas get the field `warnings`. A type `NameShape` is published as `Name`.
    """
    types = list(types)
    schemas, named = msgspec.json.schema_components(types, ref_template=REF + "{name}")
    for struct in _iterate_structs(types):
        _describe(struct, named[struct.__name__])
    for struct in {kind for kind in _parts_of(warning) if isinstance(kind, type)}:
        if struct.__name__ in named:
            named[struct.__name__]["properties"].setdefault("warnings", _WARNINGS)
    known_as = {name: name.removesuffix(_SUFFIX) for name in named}
    known_as |= {name: name for name, known in known_as.items() if known != name and known in named}
    tidied = {known_as[name]: _tidy_schema(schema, known_as) for name, schema in named.items()}
    return _tidy_schema(list(schemas), known_as), dict(sorted(tidied.items()))


def _tidy_schema(value: Any, known_as: Mapping[str, str]) -> Any:  # noqa: ANN401 - any JSON value
    """Return a schema, at any depth, with public type names and without redundant keywords.

    `known_as` maps each name of a referenced schema to its public name.
    """
    if isinstance(value, list):
        return [_tidy_schema(item, known_as) for item in value]
    if not isinstance(value, dict):
        return value
    tidied = {
        key: _tidy_schema(item, known_as)
        for key, item in value.items()
        # The keyword `title` is a text; a field named `title` has a schema.
        if not (key == "title" and isinstance(item, str)) and (key, item) != _NO_DEFAULT
    }
    match tidied:
        case {"$ref": str(ref)}:
            tidied["$ref"] = REF + known_as[ref.removeprefix(REF)]
        case {"anyOf": [{"type": str(kind), **rest}, {"type": "null"}], **others} if "$ref" not in rest:
            return {
                "type": [kind, "null"],
                **rest,
                **{key: one for key, one in others.items() if key != "anyOf"},
            }
        case {"required": []}:
            del tidied["required"]
    return tidied | _find_implied_keywords(tidied)


def _find_implied_keywords(schema: Mapping[str, Any]) -> dict[str, Json]:
    """Return the keywords that a schema implies and lacks, since client generators misread it without them; {} for
    none.

    They are `additionalProperties`, `items`, and the type of choices.
    """
    kind = schema.get("type", [])
    kinds = kind if isinstance(kind, list) else [kind]
    if "object" in kinds and "properties" not in schema and "additionalProperties" not in schema:
        return {"additionalProperties": True}
    if "array" in kinds and "items" not in schema and "prefixItems" not in schema:
        return {"items": {}}
    match schema:
        case {"enum": [first, *others]} if not kinds and all(type(one) is type(first) for one in others):
            return {"type": _KINDS[type(first)]}
    return {}


def _parts_of(types: Iterable[object]) -> Iterator[object]:
    """Yield each type; for a union, yield its members too."""
    for kind in types:
        yield kind
        if isinstance(kind, UnionType):
            yield from get_args(kind)


def _iterate_structs(types: Iterable[object]) -> Iterator[type[msgspec.Struct]]:
    """Yield each struct that the types contain, at any depth, once."""
    seen: set[object] = set()
    waiting = list(types)
    while waiting:
        kind = waiting.pop()
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            if kind in seen:
                continue
            seen.add(kind)
            yield kind
            waiting.extend(field.type for field in msgspec.structs.fields(kind))
        waiting.extend(get_args(kind))


def _describe(struct: type[msgspec.Struct], schema: dict[str, Any]) -> None:
    """Add to a type's schema, in place, the docstring below each of its fields, and its read-only fields."""
    descriptions: dict[str, str] = {}
    for kind in reversed(struct.__mro__):
        if issubclass(kind, WireStruct):
            descriptions |= _module_descriptions(kind.__module__).get(kind.__name__, {})
    for field in msgspec.structs.fields(struct):
        if field.name in descriptions:
            schema["properties"][field.encode_name].setdefault("description", descriptions[field.name])
    if issubclass(struct, WireStruct):
        for name, route in struct.read_only.items():
            changed_by = f" `{route}` changes it." if route else ""
            description = f"Read-only: unchanged or absent in requests.{changed_by}"
            schema.setdefault("properties", {})[name] = {"readOnly": True, "description": description}


@cache
def _module_descriptions(module_name: str) -> Mapping[str, Mapping[str, str]]:
    """Return the docstrings below the fields of a module's classes, by class and field, read from its source."""
    source = inspect.getsource(sys.modules[module_name])
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    return {one.name: dict(_field_descriptions(one.body)) for one in classes}


def _field_descriptions(body: Iterable[ast.stmt]) -> Iterator[tuple[str, str]]:
    for field, below in pairwise(body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        ):
            yield field.target.id, " ".join(str(below.value.value).split())
