"""JSON Schemas of answers, in the subset of JSON Schema that providers enforce.

OpenAI and Anthropic refuse a request whose schema they don't enforce as a whole. Answers are validated here by the
schema of the node in any case, so a narrower one does no harm.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

_COMMON: Final = frozenset(
    {
        *("type", "properties", "required", "additionalProperties", "items", "anyOf", "enum", "const"),
        *("description", "title", "$ref", "$defs"),
    }
)
"""Keywords that all providers know."""
_BOUNDS: Final = frozenset(
    {
        *("minLength", "maxLength", "pattern", "format", "minimum", "maximum", "exclusiveMinimum"),
        *("exclusiveMaximum", "multipleOf", "minItems", "maxItems", "uniqueItems", "minProperties"),
        *("maxProperties", "default", "examples", "$schema", "$id", "$comment", "deprecated"),
    }
)
"""Keywords that narrow values or only explain them, so that a schema without them allows no fewer values."""
_LOCAL_REFERENCE: Final = "#/$defs/"
_MAX_DEPTH: Final = 32


def close_objects(schema: Mapping[str, Any], *, keeps_bounds: bool = True) -> dict[str, Any] | None:
    """Return a copy of a schema in which objects with named fields allow no others unless they have
    `additionalProperties`; None for a schema of over 32 levels.

    Without `keeps_bounds`, limits of texts, numbers and lists are left out, and so are defaults and examples.
    """
    try:
        return _close(schema, 0, keeps_bounds=keeps_bounds)
    except RecursionError:
        return None


def is_enforced(schema: Mapping[str, Any], *, needs_all_fields: bool) -> bool:
    """Return whether providers enforce a schema as a whole: it describes an object, all objects allow only named
    fields, and all keywords are common.

    With `needs_all_fields`, every field of an object has to be required.
    """
    return schema.get("type") == "object" and all(
        _is_part_enforced(part, needs_all_fields=needs_all_fields) for part in _iterate_parts(schema)
    )


def _close(schema: Mapping[str, Any], depth: int, *, keeps_bounds: bool) -> dict[str, Any]:
    """Return the closed copy of the part of a schema at this depth; raises `RecursionError` beyond 32 levels."""
    if depth > _MAX_DEPTH:
        raise RecursionError("The schema is nested too deeply")
    closed: dict[str, Any] = {}
    for keyword, value in schema.items():
        if keyword in _BOUNDS and not keeps_bounds:
            continue
        if keyword in {"properties", "$defs"} and isinstance(value, Mapping):
            closed[keyword] = {
                name: _close_part(part, depth + 1, keeps_bounds=keeps_bounds) for name, part in value.items()
            }
        elif keyword == "items":
            closed[keyword] = _close_part(value, depth + 1, keeps_bounds=keeps_bounds)
        elif keyword == "anyOf" and isinstance(value, list):
            closed[keyword] = [_close_part(part, depth + 1, keeps_bounds=keeps_bounds) for part in value]
        else:
            closed[keyword] = value
    if "properties" in closed:
        closed.setdefault("additionalProperties", False)
    return closed


def _close_part(part: object, depth: int, *, keeps_bounds: bool) -> object:
    return _close(part, depth, keeps_bounds=keeps_bounds) if isinstance(part, Mapping) else part


def _iterate_parts(schema: Mapping[str, Any]) -> Iterator[object]:
    """Yield a schema and all schemas in it, also values in place of a schema that are none."""
    waiting: list[object] = [schema]
    while waiting:
        part = waiting.pop()
        yield part
        if not isinstance(part, Mapping):
            continue
        for keyword in ("properties", "$defs"):
            named = part.get(keyword)
            waiting.extend(named.values() if isinstance(named, Mapping) else ())
        alternatives = part.get("anyOf")
        waiting.extend(alternatives if isinstance(alternatives, list) else ())
        if "items" in part:
            waiting.append(part["items"])


def _is_part_enforced(part: object, *, needs_all_fields: bool) -> bool:
    """Return whether providers enforce a part of a schema by itself: common keywords, and objects closed to other
    fields.

    False for a part that is no schema, allows any value, or refers to anything but `$defs`. With `needs_all_fields`,
    every field of an object has to be required.
    """
    if not isinstance(part, Mapping) or not part.keys() <= _COMMON:
        return False
    reference = part.get("$ref")
    if reference is not None:
        return isinstance(reference, str) and reference.startswith(_LOCAL_REFERENCE)
    if not part.keys() & {"type", "anyOf", "enum", "const"}:
        return False  # any value
    types = part.get("type")
    if "object" not in (types if isinstance(types, list) else [types]):
        return True
    fields, required = part.get("properties"), part.get("required", [])
    return (
        isinstance(fields, Mapping)
        and part.get("additionalProperties") is False
        and isinstance(required, Collection)
        and (not needs_all_fields or set(required) == fields.keys())
    )
