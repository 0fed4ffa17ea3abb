"""The shape of bodies: camelCase outside, snake_case inside, and one entry in the answer for every wrong field."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from enum import Enum
from functools import cache
from itertools import chain, islice
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Final,
    TypeAlias,
    TypeGuard,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

import msgspec

from engine import names, patience, values
from engine.values import InvalidJson, Json
from gateway import errors, limits
from gateway.errors import ApiError
from models import moments

if TYPE_CHECKING:
    from gateway.http.request import Request


class Wire(msgspec.Struct, rename="camel", kw_only=True):
    """Base of every body: what isn't a field here can't be set, and is passed over unless a subclass refuses it."""

    near_misses_are_refused: ClassVar[bool] = False
    """Refuse unknown fields whose names are close to known ones; others are passed over."""


class StrictWire(Wire, forbid_unknown_fields=True):
    """Base of bodies in which every unknown field is refused, with the name that is closest to it."""


class GuardedWire(Wire):
    """Base of bodies that others define, with fields of their own: misspelt ones are refused, unknown ones are not."""

    near_misses_are_refused: ClassVar[bool] = True


Body = TypeVar("Body", bound=Wire)
Shape = TypeVar("Shape", bound=msgspec.Struct)

Instant: TypeAlias = Annotated[str, msgspec.Meta(extra_json_schema={"format": "date-time"})]
"""A time in an answer, as `instant` writes it."""

MAX_ITEMS: Final = max(limits.NODES, limits.CONNECTIONS)
"""Items of the longest list that is taken: a longer one is refused for its length, and nobody looks at its items."""
MAX_WHOLE = 2**53
"""Up to here, a number with a fraction that is zero is what somebody wrote, and not what it was rounded to."""
MAX_SHOWN_NAME: Final = 64
"""Characters of an unknown field's name that a refusal shows."""
_UNKNOWN_FIELD: Final = "Object contains unknown field"
_QUOTED = re.compile(r"`([^`]*)`")
_JSON_WORDS = {
    "array": "a list",
    "bool": "true or false",
    "datetime": "a time such as 2025-01-15T10:30:00Z",
    "float": "a number",
    "int": "a whole number",
    "object": "an object",
    "str": "a text",
}


async def decode_body(request: Request, kind: type[Body]) -> Body:
    """Return the body as `kind`; raises 400 for what is no JSON, 415 for other types, 422 for wrong fields."""
    return convert(await read_json(request), kind)


async def read_json(request: Request) -> Json:
    """Return the body as JSON; an absent one is an empty object."""
    return await json_of(request, await request.body())


async def json_of(request: Request, raw: bytes) -> Json:
    """Return a body that was read before as JSON; an absent one is an empty object."""
    if not raw:
        return {}
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise ApiError(415, "unsupported-media-type", "Send the body as Content-Type: application/json")
    try:
        return await patience.patiently(values.decode, raw)
    except InvalidJson as error:
        raise ApiError(400, error.code, error.message) from error


def convert(value: Json, kind: type[Shape], path: str = "") -> Shape:
    """Return a JSON value, found at `path`, as `kind`; raises 422 with one entry for every wrong field."""
    try:
        shape = msgspec.convert(value, kind)
    except msgspec.ValidationError:
        value = with_whole_numbers(value, kind)
        try:
            shape = msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            found = chain(_unknown_fields(value, kind, path), _problems(value, kind, path))
            raise errors.invalid(islice(found, limits.FINDINGS)) from error
    unknown = [*islice(_unknown_fields(value, kind, path), limits.FINDINGS)]
    if unknown:
        raise errors.invalid(unknown)
    return shape


def with_whole_numbers(value: Json, kind: Any) -> Json:  # noqa: ANN401 - any type annotation
    """Return a JSON value with 2 for 2.0 wherever `kind` wants a whole number: to JSON they are one number."""
    parts = tuple(_parts(kind))
    if isinstance(value, dict | list) and len(value) > MAX_ITEMS:
        return value
    if isinstance(value, float):
        is_whole = int in parts and float not in parts and value.is_integer() and abs(value) <= MAX_WHOLE
        return int(value) if is_whole else value
    for part in parts:
        if isinstance(value, dict) and _is_body(part):
            fields = _fields(part)
            return {
                name: with_whole_numbers(item, fields[name].type) if name in fields else item
                for name, item in value.items()
            }
        if isinstance(value, dict) and get_origin(part) is dict:
            return {name: with_whole_numbers(item, get_args(part)[1]) for name, item in value.items()}
        if isinstance(value, list) and get_origin(part) is list:
            return [with_whole_numbers(item, get_args(part)[0]) for item in value]
    return value


def instant(moment: datetime) -> str:
    """Return a time as clients see it."""
    return moments.written(moment)


def optional_instant(moment: datetime | None) -> str | None:
    """Return a time as clients see it, or null."""
    return moments.optional(moment)


# ── what is wrong with a body ───────────────────────────────────────────────────────────────────────────────


def _problems(value: Json, kind: Any, path: str) -> Iterator[dict[str, Json]]:  # noqa: ANN401 - any type annotation
    """Return what keeps `value` from being a `kind`, down to the fields of nested bodies."""
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        inside = _problems_inside(value, kind, path)
        first = next(inside, None)
        if first is not None:
            yield first
        elif _UNKNOWN_FIELD not in str(error):  # of those, `_unknown_fields` tells
            yield _problem(path, kind, str(error))
        yield from inside


def _problems_inside(value: Json, kind: Any, path: str) -> Iterator[dict[str, Json]]:  # noqa: ANN401 - any type annotation
    for part in _parts(kind):
        if isinstance(value, dict) and _is_body(part):
            yield from _field_problems(value, part, path)
            continue
        for item, item_kind, below in _inside(value, part, path):
            yield from _problems(item, item_kind, below)


def _field_problems(
    value: Mapping[str, Json], kind: type[msgspec.Struct], path: str
) -> Iterator[dict[str, Json]]:
    """Return what is missing or wrong in a body, in the order of its type's fields."""
    for name, field in _fields(kind).items():
        below = _below(path, name)
        if name in value:
            if len(value) <= MAX_ITEMS:
                yield from _problems(value[name], field.type, below)
        elif field.required:
            yield errors.problem(below, "required", f"{below} is required")


def _inside(value: Json, part: Any, path: str) -> Iterator[tuple[Json, Any, str]]:  # noqa: ANN401 - any type annotation
    """Return what a type has other types for, each with its type and its path."""
    if isinstance(value, dict | list) and len(value) > MAX_ITEMS:
        return
    if isinstance(value, dict) and _is_body(part):
        for name, field in _fields(part).items():
            if name in value:
                yield value[name], field.type, _below(path, name)
    elif isinstance(value, dict) and get_origin(part) is dict:
        for key, item in value.items():
            yield item, get_args(part)[1], _below(path, key)
    elif isinstance(value, list) and get_origin(part) is list:
        for index, item in enumerate(value):
            yield item, get_args(part)[0], _below(path, str(index))


def _unknown_fields(value: Json, kind: Any, path: str) -> Iterator[dict[str, Json]]:  # noqa: ANN401 - any type annotation
    """Return the fields that a body refuses, down to those of nested bodies."""
    if not _refuses_fields(kind):
        return
    for part in _parts(kind):
        if isinstance(value, dict) and _is_body(part):
            unknown = (name for name in value if name not in _fields(part))
            # Comparing names takes time, and a body may hold a million of them.
            for name in islice(unknown, limits.FINDINGS):
                if (problem := _unknown_field(part, name, path)) is not None:
                    yield problem
        for item, item_kind, below in _inside(value, part, path):
            yield from _unknown_fields(item, item_kind, below)


def _unknown_field(kind: type[msgspec.Struct], name: str, path: str) -> dict[str, Json] | None:
    """Return the refusal of a field that a body doesn't have; None where it is passed over."""
    is_strict = _is_strict(kind)
    if not is_strict and not _is_guarded(kind):
        return None
    known = _fields(kind)
    near = names.meant(name, known)
    if not near and not is_strict:
        return None
    below = _below(path, name[:MAX_SHOWN_NAME])
    hint = f"did you mean {' or '.join(near)}?" if near else f"there is {', '.join(known) or 'none'}"
    return errors.problem(below, "unknown-field", f"{below} is no field here: {hint}")


@cache
def _refuses_fields(kind: Any) -> bool:  # noqa: ANN401 - any type annotation
    """Tell whether a type, or one that it is made of, refuses fields: most bodies needn't be looked through."""
    return any(
        _is_strict(part) or _is_guarded(part) or any(map(_refuses_fields, _types_in(part)))
        if _is_body(part)
        else any(map(_refuses_fields, get_args(part)))
        for part in _parts(kind)
    )


def _types_in(kind: type[msgspec.Struct]) -> Iterator[Any]:
    return (field.type for field in _fields(kind).values())


def _is_strict(kind: type[msgspec.Struct]) -> bool:
    return bool(kind.__struct_config__.forbid_unknown_fields)


def _is_guarded(kind: type[msgspec.Struct]) -> bool:
    return issubclass(kind, Wire) and kind.near_misses_are_refused


def _parts(kind: Any) -> Iterator[Any]:  # noqa: ANN401 - any type annotation
    """Return the types that an annotation allows, without their constraints."""
    if get_origin(kind) is Annotated:
        yield from _parts(get_args(kind)[0])
    elif get_origin(kind) in {Union, UnionType}:
        for part in get_args(kind):
            yield from _parts(part)
    else:
        yield kind


@cache
def _fields(kind: type[msgspec.Struct]) -> Mapping[str, msgspec.structs.FieldInfo]:
    # Finding them out takes 75 µs, and a body may hold a hundred thousand small objects.
    return {field.encode_name: field for field in msgspec.structs.fields(kind)}


def _is_body(kind: Any) -> TypeGuard[type[msgspec.Struct]]:  # noqa: ANN401 - any type annotation
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _problem(path: str, kind: Any, reason: str) -> dict[str, Json]:  # noqa: ANN401 - any type annotation
    text, _, _ = reason.partition(" - at `$")
    code = "invalid-type" if ", got `" in text else "invalid-value"
    enums = [part for part in _parts(kind) if isinstance(part, type) and issubclass(part, Enum)]
    if enums and code == "invalid-value":
        text = f"Expected one of {', '.join(choice.value for choice in enums[0])}"
    if wanted := next(_wanted(kind), None) if " matching regex " in text else None:
        text = f"Expected {wanted}"
    return errors.problem(path, code, f"{path or 'the body'}: {_QUOTED.sub(_in_json_words, text)}")


def _wanted(kind: Any) -> Iterator[str]:  # noqa: ANN401 - any type annotation
    """Return what an annotation says of its texts in words, where it has a pattern for them."""
    if get_origin(kind) is Annotated:
        yield from (one.description for one in get_args(kind)[1:] if one.description and one.pattern)
    elif get_origin(kind) in {Union, UnionType}:
        for part in get_args(kind):
            yield from _wanted(part)


def _in_json_words(quoted: re.Match[str]) -> str:
    """Say a type in the words that JSON has for it, where msgspec says it in Python's."""
    return " or ".join(_JSON_WORDS.get(word, word) for word in quoted[1].split(" | "))


def _below(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
