"""Shapes of values that don't exist yet: from a JSON Schema, from past values, or from construction.

A shape is conservative: a path that it reports as a dead end finds nothing, provided the schema or the past
values are right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import IntEnum
from itertools import islice
from typing import TYPE_CHECKING, Final, TypeAlias, cast

from msgspec import Struct, field

from engine import name_suggestions

if TYPE_CHECKING:
    from engine.expressions import PathStep
    from engine.values import Json

ShapeSteps: TypeAlias = "Sequence[PathStep]"

MAX_FIELDS: Final = 250
"""Maximum number of fields of a shape. A larger object has an unknown shape, so that merging shapes stays
cheap.
"""
MAX_LEVELS: Final = 8
MAX_ITEMS: Final = 50
"""Maximum number of items of a past list that are inspected."""


class OtherFields(IntEnum):
    """Fields beyond those that a shape names; of two values, the larger permits more."""

    NOTHING = 0
    NOTHING_SEEN = 1
    """Past values had no other fields."""
    UNKNOWN = 2
    ANYTHING = 3
    """Any other field is allowed by intent."""


class ValueShape(Struct, frozen=True, eq=False):
    """Shape of an object with these fields, a list of these items, or, with neither, as `rest` says."""

    fields: Mapping[str, ValueShape] = field(default_factory=dict)
    items: ValueShape | None = None
    rest: OtherFields = OtherFields.NOTHING


class PathDeadEnd(Struct, frozen=True):
    """Path that finds nothing from its step number `at` on, which isn't in `shape`."""

    at: int
    shape: ValueShape


UNKNOWN: Final = ValueShape(rest=OtherFields.UNKNOWN)
SCALAR: Final = ValueShape()


def follow_path(shape: ValueShape, steps: ShapeSteps) -> ValueShape | PathDeadEnd:
    """Return the shape at the end of a path, or its dead end: the step and the shape that surely lacks it.

    The shape is `UNKNOWN` if a step may or may not exist.
    """
    for at, step in enumerate(steps):
        below = _child_shape(shape, step)
        if below is None and shape.rest >= OtherFields.UNKNOWN:
            return UNKNOWN
        if below is None:
            return PathDeadEnd(at, shape)
        shape = below
    return shape


def _child_shape(shape: ValueShape, step: PathStep) -> ValueShape | None:
    key, position = step
    if key is not None and key in shape.fields:
        return shape.fields[key]
    return shape.items if position is not None else None


# ── from schemas ────────────────────────────────────────────────────────────────────────────────────────────


def shape_of_schema(schema: Json) -> ValueShape:
    """Return the shape of a JSON Schema, by types, properties and items; other keywords, such as `anyOf`, are ignored.

    A part without a single `type` is `UNKNOWN`.
    """
    if not isinstance(schema, dict):
        return UNKNOWN
    match schema.get("type"):
        case "object":
            properties = cast("Mapping[str, Json]", schema.get("properties", {}))
            fields = {name: shape_of_schema(each) for name, each in properties.items()}
            return ValueShape(fields, rest=_other_fields(schema.get("additionalProperties")))
        case "array":
            return ValueShape(items=shape_of_schema(schema.get("items")))
        case "string" | "number" | "integer" | "boolean" | "null":
            return SCALAR
        case _:
            return UNKNOWN


def _other_fields(additional: Json) -> OtherFields:
    if additional is None:
        return OtherFields.UNKNOWN
    return OtherFields.NOTHING if additional is False else OtherFields.ANYTHING


# ── from values ─────────────────────────────────────────────────────────────────────────────────────────────


def shape_of_config(value: Json, levels: int = MAX_LEVELS) -> ValueShape:
    """Return the shape of a config value before its templates are rendered.

    Templates, items of lists, operations, very deep parts and objects with over 250 fields are unknown.
    """
    match value:
        case dict() if levels == 0 or "$op" in value or len(value) > MAX_FIELDS:
            return UNKNOWN
        case dict():
            return ValueShape({name: shape_of_config(each, levels - 1) for name, each in value.items()})
        case list():
            return ValueShape(items=UNKNOWN)
        case str() if "{{" in value:
            return UNKNOWN
        case _:
            return SCALAR


def shape_of_samples(past: Sequence[Json], levels: int = MAX_LEVELS) -> ValueShape:
    """Return the union of the shapes of past values; empty and null values are ignored.

    `UNKNOWN` without others, below `levels` and for over 250 fields. Of each list, 50 items count.
    """
    telling = [value for value in past if value not in (None, [], {})]
    if levels == 0 or not telling:
        return UNKNOWN
    objects = [value for value in telling if isinstance(value, dict)]
    lists = [value for value in telling if isinstance(value, list)]
    found: dict[str, list[Json]] = {}
    for value in objects:
        for name, each in value.items():
            found.setdefault(name, []).append(each)
    if len(found) > MAX_FIELDS:
        return UNKNOWN
    items = [item for value in lists for item in islice(value, MAX_ITEMS)]
    return ValueShape(
        {name: shape_of_samples(each, levels - 1) for name, each in found.items()},
        shape_of_samples(items, levels - 1) if lists else None,
        OtherFields.NOTHING_SEEN,
    )


# ── combinations ────────────────────────────────────────────────────────────────────────────────────────────


def merge_samples(shape: ValueShape, past: ValueShape) -> ValueShape:
    """Return a shape completed by the shape of past values: unknown parts are filled in, and unexpected
    fields added.

    Where both know a part, `shape` counts.
    """
    if past.rest is OtherFields.UNKNOWN:
        return shape
    known = {
        name: merge_samples(each, past.fields[name]) if name in past.fields else each
        for name, each in shape.fields.items()
    }
    items = (
        merge_samples(shape.items, past.items) if shape.items and past.items else shape.items or past.items
    )
    rest = past.rest if shape.rest is OtherFields.UNKNOWN else shape.rest
    return ValueShape({**past.fields, **known}, items, rest)


def add_fields(shape: ValueShape, fields: Mapping[str, ValueShape]) -> ValueShape:
    """Return an object shape with the fields of `shape` and `fields`, which replace fields of the same name.

    Returns `UNKNOWN` if there are too many fields.
    """
    if len(shape.fields) + len(fields) > MAX_FIELDS:
        return UNKNOWN
    return ValueShape({**shape.fields, **fields}, rest=shape.rest)


def union_shapes(shapes: Sequence[ValueShape]) -> ValueShape:
    """Return the union of one or more shapes: it has each field that one of them has.

    Fields and items in which they differ are unknown, and so is everything with over 250 fields. Beside a
    shape with unknown fields, only those fields are kept that it may have in this form.
    """
    first, *others = shapes
    if not others:
        return first
    fields, items, rest = dict(first.fields), first.items, first.rest
    for shape in others:
        for name, each in shape.fields.items():
            if fields.setdefault(name, each) is not each:
                fields[name] = UNKNOWN
        if len(fields) > MAX_FIELDS:
            return UNKNOWN
        if shape.items is not items:
            items = UNKNOWN if items and shape.items else items or shape.items
        rest = max(rest, shape.rest)
    if rest >= OtherFields.UNKNOWN:
        # A shape with unknown fields may have them in another form than the other shapes.
        fields = {
            name: each
            for name, each in fields.items()
            if all(_accepts_field(shape, name, each) for shape in shapes)
        }
        items = UNKNOWN if items else None
    return ValueShape(fields, items, rest)


def _accepts_field(shape: ValueShape, name: str, expected: ValueShape) -> bool:
    return shape.rest < OtherFields.UNKNOWN or shape.fields.get(name) is expected


# ── suggestions ─────────────────────────────────────────────────────────────────────────────────────────────


def suggest_paths(steps: ShapeSteps, lost: PathDeadEnd) -> list[ShapeSteps]:
    """Return up to two existing paths that a path with a dead end may mean; empty if none is near.

    All are of one kind, the first that exists: a similar name in place of the missing step, the path without that step,
    the path with one or two steps inserted before it.
    """
    head, (key, _), tail = steps[: lost.at], steps[lost.at], steps[lost.at + 1 :]
    fields = lost.shape.fields
    meant = name_suggestions.suggest_names(key, fields) if key is not None else []
    alike: list[ShapeSteps] = [
        (*head, (name, None), *tail) for name in meant if _has_path(fields[name], tail)
    ]
    if alike:
        return alike
    if tail and _is_known(lost.shape, tail):
        return [(*head, *tail)]
    below = (way for way, shape in _list_paths(lost.shape) if _is_known(shape, steps[lost.at :]))
    return [(*head, *way, *steps[lost.at :]) for way in islice(below, 2)]


def find_open_field(shape: ValueShape) -> str | None:
    """Return the name of the field with unknown content if it is the only one, else None.

    A field that is missing from a shape may be inside it.
    """
    found = [
        name for name, each in shape.fields.items() if each.rest is OtherFields.UNKNOWN and not each.fields
    ]
    return found[0] if len(found) == 1 else None


def _has_path(shape: ValueShape, steps: ShapeSteps) -> bool:
    return not isinstance(follow_path(shape, steps), PathDeadEnd)


def _is_known(shape: ValueShape, steps: ShapeSteps) -> bool:
    """Return whether the shape has every step of a path as a known field or item."""
    for step in steps:
        below = _child_shape(shape, step)
        if below is None:
            return False
        shape = below
    return True


def _list_paths(shape: ValueShape) -> Iterator[tuple[ShapeSteps, ValueShape]]:
    """Yield the fields of a shape and then their fields, with paths and shapes; a limited number of each."""
    inner = [(((name, None),), each) for name, each in islice(shape.fields.items(), MAX_FIELDS)]
    yield from inner
    for way, each in inner:
        for name, innermost in islice(each.fields.items(), MAX_ITEMS):
            yield (*way, (name, None)), innermost
