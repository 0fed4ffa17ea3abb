"""What is known of a value before there is one: from a JSON Schema, from past values, or from how it is put together.

A shape never claims too much: a path that it says is lost finds nothing, as far as the schema, or the past, is right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import islice
from typing import TYPE_CHECKING, Final, TypeAlias, cast

from engine import names

if TYPE_CHECKING:
    from engine.expressions import Step
    from engine.values import Json

Steps: TypeAlias = "Sequence[Step]"

MAX_FIELDS: Final = 250
"""An object with more fields than these is taken for anything, so that shapes stay cheap to put together."""
MAX_LEVELS: Final = 8
MAX_ITEMS: Final = 50
"""Items of a past list that are looked at."""


class Rest(IntEnum):
    """What there may be beside the fields that a shape names; of two, the larger allows more."""

    NOTHING = 0
    NOTHING_SEEN = 1
    """Past values had nothing else."""
    UNKNOWN = 2
    ANYTHING = 3
    """Whatever there is, is meant to be."""


@dataclass(frozen=True, slots=True, eq=False)
class Shape:
    """An object with these fields, a list of these items, or, with neither, whatever `rest` says."""

    fields: Mapping[str, Shape] = field(default_factory=dict)
    items: Shape | None = None
    rest: Rest = Rest.NOTHING


@dataclass(frozen=True, slots=True)
class Lost:
    """A path leads nowhere from its step number `at`, which isn't in `shape`."""

    at: int
    shape: Shape


UNKNOWN: Final = Shape(rest=Rest.UNKNOWN)
SCALAR: Final = Shape()


def follow(shape: Shape, steps: Steps) -> Shape | Lost:
    """Return the shape at the end of a path, or where the path is lost."""
    for at, step in enumerate(steps):
        below = _below(shape, step)
        if below is None and shape.rest >= Rest.UNKNOWN:
            return UNKNOWN
        if below is None:
            return Lost(at, shape)
        shape = below
    return shape


def _below(shape: Shape, step: Step) -> Shape | None:
    key, position = step
    if key is not None and key in shape.fields:
        return shape.fields[key]
    return shape.items if position is not None else None


# ── made of schemas ─────────────────────────────────────────────────────────────────────────────────────────


def of_schema(schema: Json) -> Shape:
    """Return what a JSON Schema says of a value, by its types, properties and items; other keywords say nothing."""
    if not isinstance(schema, dict):
        return UNKNOWN
    match schema.get("type"):
        case "object":
            properties = cast("Mapping[str, Json]", schema.get("properties", {}))
            fields = {name: of_schema(each) for name, each in properties.items()}
            return Shape(fields, rest=_rest(schema.get("additionalProperties")))
        case "array":
            return Shape(items=of_schema(schema.get("items")))
        case "string" | "number" | "integer" | "boolean" | "null":
            return SCALAR
        case _:
            return UNKNOWN


def _rest(additional: Json) -> Rest:
    if additional is None:
        return Rest.UNKNOWN
    return Rest.NOTHING if additional is False else Rest.ANYTHING


# ── made of values ──────────────────────────────────────────────────────────────────────────────────────────


def of_config(value: Json, levels: int = MAX_LEVELS) -> Shape:
    """Return what is known of a value in a config, before the templates in it are rendered."""
    match value:
        case dict() if levels == 0 or "$op" in value or len(value) > MAX_FIELDS:
            return UNKNOWN
        case dict():
            return Shape({name: of_config(each, levels - 1) for name, each in value.items()})
        case list():
            return Shape(items=UNKNOWN)
        case str() if "{{" in value:
            return UNKNOWN
        case _:
            return SCALAR


def of_past(past: Sequence[Json], levels: int = MAX_LEVELS) -> Shape:
    """Return what any of the past values had; those that are empty or null tell nothing."""
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
    return Shape(
        {name: of_past(each, levels - 1) for name, each in found.items()},
        of_past(items, levels - 1) if lists else None,
        Rest.NOTHING_SEEN,
    )


# ── put together ────────────────────────────────────────────────────────────────────────────────────────────


def with_past(shape: Shape, past: Shape) -> Shape:
    """Return a shape in which past values tell of what nobody knew, and add what nobody expected."""
    if past.rest is Rest.UNKNOWN:
        return shape
    known = {
        name: with_past(each, past.fields[name]) if name in past.fields else each
        for name, each in shape.fields.items()
    }
    items = with_past(shape.items, past.items) if shape.items and past.items else shape.items or past.items
    rest = past.rest if shape.rest is Rest.UNKNOWN else shape.rest
    return Shape({**past.fields, **known}, items, rest)


def with_fields(shape: Shape, fields: Mapping[str, Shape]) -> Shape:
    """Return an object with other fields laid over it."""
    if len(shape.fields) + len(fields) > MAX_FIELDS:
        return UNKNOWN
    return Shape({**shape.fields, **fields}, rest=shape.rest)


def either(shapes: Sequence[Shape]) -> Shape:
    """Return a shape that is any of these: it has whatever one of them has."""
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
    if rest >= Rest.UNKNOWN:
        # What one of them may have, nobody knows how, can't be told by how another has it.
        fields = {
            name: each for name, each in fields.items() if all(_agrees(shape, name, each) for shape in shapes)
        }
        items = UNKNOWN if items else None
    return Shape(fields, items, rest)


def _agrees(shape: Shape, name: str, expected: Shape) -> bool:
    return shape.rest < Rest.UNKNOWN or shape.fields.get(name) is expected


# ── paths that were meant ───────────────────────────────────────────────────────────────────────────────────


def near(steps: Steps, lost: Lost) -> list[Steps]:
    """Return paths that lead somewhere and may have been meant, by a name like it, or a step more or less."""
    head, (key, _), tail = steps[: lost.at], steps[lost.at], steps[lost.at + 1 :]
    fields = lost.shape.fields
    meant = names.meant(key, fields) if key is not None else []
    alike: list[Steps] = [(*head, (name, None), *tail) for name in meant if _leads_on(fields[name], tail)]
    if alike:
        return alike
    if tail and _is_known(lost.shape, tail):
        return [(*head, *tail)]
    below = (way for way, shape in _ways(lost.shape) if _is_known(shape, steps[lost.at :]))
    return [(*head, *way, *steps[lost.at :]) for way in islice(below, 2)]


def open_field(shape: Shape) -> str | None:
    """Return the one field that may hold anything, if there is just one: what isn't beside it may be in it."""
    found = [name for name, each in shape.fields.items() if each.rest is Rest.UNKNOWN and not each.fields]
    return found[0] if len(found) == 1 else None


def _leads_on(shape: Shape, steps: Steps) -> bool:
    return not isinstance(follow(shape, steps), Lost)


def _is_known(shape: Shape, steps: Steps) -> bool:
    """Tell whether every step of a path is one that the shape names."""
    for step in steps:
        below = _below(shape, step)
        if below is None:
            return False
        shape = below
    return True


def _ways(shape: Shape) -> Iterator[tuple[Steps, Shape]]:
    """Return the fields of a shape, and theirs, with the way to each; the nearest first."""
    inner = [(((name, None),), each) for name, each in islice(shape.fields.items(), MAX_FIELDS)]
    yield from inner
    for way, each in inner:
        for name, innermost in islice(each.fields.items(), MAX_ITEMS):
            yield (*way, (name, None)), innermost
