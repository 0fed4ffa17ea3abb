"""Conversion of bodies: camelCase in JSON, snake_case in Python, one entry per invalid field in the answer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
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
    Protocol,
    TypeAlias,
    TypeGuard,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

import msgspec
from msgspec import Struct

from concurrency import offload
from engine import name_suggestions, values
from engine.values import InvalidJson, Json
from gateway.http import errors, limits
from gateway.http.errors import ApiError
from models import timestamps

if TYPE_CHECKING:
    from starlette.datastructures import Headers


class WireStruct(msgspec.Struct, rename="camel", kw_only=True):
    """Base of all bodies. Answers derive from it directly; bodies of requests derive from its subclasses."""

    near_misses_are_refused: ClassVar[bool] = False
    """Refuse unknown fields with names close to known ones; others cause warnings."""
    read_only: ClassVar[Mapping[str, str]] = {}
    """Fields of answers that a request may repeat, each with the route that changes it, empty when none does.
    """
    likely_others: ClassVar[frozenset[str]] = frozenset()
    """Unknown fields that senders do send, and that only resemble misspelled ones; they cause warnings."""


class StrictWire(WireStruct, forbid_unknown_fields=True):
    """Base of bodies that refuse every unknown field, nested bodies included."""


class GuardedWire(WireStruct):
    """Base of bodies of the contract: probable misspellings are refused, other unknown fields cause warnings."""

    near_misses_are_refused: ClassVar[bool] = True


Body = TypeVar("Body", bound=WireStruct)
Shape = TypeVar("Shape", bound=msgspec.Struct)

Instant: TypeAlias = Annotated[str, msgspec.Meta(extra_json_schema={"format": "date-time"})]
"""Time in an answer, formatted by `instant`."""

MAX_ITEMS: Final = max(limits.NODES, limits.CONNECTIONS)
"""Length of the longest accepted list; a longer one is refused without a look at its items."""
MAX_WHOLE = 2**53
"""Largest magnitude at which a float with a zero fraction is exact, not a rounded number."""
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


class JsonRequest(Protocol):
    """Part of a request that decoding needs: headers, a bounded body, and warnings for the answer."""

    @property
    def headers(self) -> Headers: ...

    @property
    def warnings(self) -> list[dict[str, Json]]: ...

    async def body(self) -> bytes: ...


async def decode_body(request: JsonRequest, kind: type[Body]) -> Body:
    """Return the JSON body as `kind`; an absent body is an empty object.

    Unknown fields are refused or warned of, as in `convert`. Raises a 400 error for invalid JSON, 413 for too many
    bytes, 415 for other types, 422 for invalid fields, and the other errors of `request.body`.
    """
    return body_of(request, await read_json(request), kind)


def body_of(request: JsonRequest, value: Json, kind: type[Body]) -> Body:
    """Return the request's JSON as `kind`; unknown fields are refused or warned of in the answer, as in `convert`.

    Raises a 422 error with all invalid fields.
    """
    return convert(value, kind, warnings=request.warnings)


async def read_json(request: JsonRequest) -> Json:
    """Return the body as JSON; an absent one is an empty object.

    Raises a 400 error for invalid JSON, 415 for other types, and the errors of `request.body`, such as 413 for a body
    that is too large.
    """
    return await json_of(request, await request.body())


async def json_of(request: JsonRequest, raw: bytes) -> Json:
    """Return raw bytes of a body as JSON; an absent one is an empty object.

    Large ones are decoded in a thread. Raises a 400 error for invalid JSON, 415 unless the content type is
    JSON.
    """
    if not raw:
        return {}
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise ApiError(415, "unsupported-media-type", "Send the body as Content-Type: application/json")
    try:
        return await offload.run(values.decode_json, raw)
    except InvalidJson as error:
        raise ApiError(400, error.code, error.message) from error


def convert(
    value: Json, kind: type[Shape], path: str = "", warnings: list[dict[str, Json]] | None = None
) -> Shape:
    """Return a JSON value, found at `path`, as `kind`; raises a 422 error with one entry per invalid field, at most
    100.

    Read-only fields are left out, 2.0 counts as an integer. A `StrictWire` refuses every unknown field, a `GuardedWire`
    those that resemble a known field; its others are added to `warnings`, if given. Other types ignore unknown fields.
    """
    if isinstance(value, dict) and (read_only := _read_only(kind)):
        value = {name: item for name, item in value.items() if name not in read_only}
    try:
        shape = msgspec.convert(value, kind)
    except msgspec.ValidationError:
        value = with_whole_numbers(value, kind)
        try:
            shape = msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            unknown = _unknown_fields(value, kind, path)
            found = chain(unknown.refused, _find_problems(value, kind, path))
            raise errors.invalid(islice(found, limits.FINDINGS)) from error
    unknown = _unknown_fields(value, kind, path)
    if unknown.refused:
        raise errors.invalid(unknown.refused)
    if warnings is not None:
        warnings.extend(unknown.warned_of.values())
    return shape


def with_whole_numbers(value: Json, kind: Any) -> Json:  # noqa: ANN401 - any type annotation
    """Return a JSON value with 2 for 2.0 wherever `kind` expects an integer: JSON has one type of number.

    Nested values too; those with over 20,000 items are unchanged.
    """
    parts = tuple(_iterate_parts(kind))
    if isinstance(value, dict | list) and len(value) > MAX_ITEMS:
        return value
    if isinstance(value, float):
        is_whole = int in parts and float not in parts and value.is_integer() and abs(value) <= MAX_WHOLE
        return int(value) if is_whole else value
    for part in parts:
        if isinstance(value, dict) and _is_body(part):
            fields = _list_fields(part)
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
    """Return a time as text in the format of answers: ISO 8601 in UTC."""
    return timestamps.format_timestamp(moment)


def optional_instant(moment: datetime | None) -> str | None:
    """Return a time as text in the format of answers; None for None."""
    return timestamps.format_optional(moment)


# ── problems of a body ──────────────────────────────────────────────────────────────────────────────────────


def _find_problems(value: Json, kind: Any, path: str) -> Iterator[dict[str, Json]]:  # noqa: ANN401 - any type annotation
    """Yield the problems that prevent a conversion of `value` to `kind`, with their paths, nested fields included, but
    no unknown fields.
    """
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        inside = _problems_inside(value, kind, path)
        first = next(inside, None)
        if first is not None:
            yield first
        elif _UNKNOWN_FIELD not in str(error):  # `_unknown_fields` reports unknown fields
            yield _describe_problem(path, kind, str(error))
        yield from inside


def _problems_inside(value: Json, kind: Any, path: str) -> Iterator[dict[str, Json]]:  # noqa: ANN401 - any type annotation
    for part in _iterate_parts(kind):
        if isinstance(value, dict) and _is_body(part):
            yield from _field_problems(value, part, path)
            continue
        for item, item_kind, below in _iterate_nested(value, part, path):
            yield from _find_problems(item, item_kind, below)


def _field_problems(
    value: Mapping[str, Json], kind: type[msgspec.Struct], path: str
) -> Iterator[dict[str, Json]]:
    """Yield the missing and invalid fields of a body, in the order of its type's fields."""
    for name, field in _list_fields(kind).items():
        below = _join_path(path, name)
        if name in value:
            if len(value) <= MAX_ITEMS:
                yield from _find_problems(value[name], field.type, below)
        elif field.required:
            yield errors.problem(below, "required", f"{below} is required")


def _iterate_nested(value: Json, part: Any, path: str) -> Iterator[tuple[Json, Any, str]]:  # noqa: ANN401 - any type annotation
    """Yield the values inside of `value` for which the type `part` has types, each with its type and path.

    Nothing for containers of over 20,000 items.
    """
    if isinstance(value, dict | list) and len(value) > MAX_ITEMS:
        return
    if isinstance(value, dict) and _is_body(part):
        for name, field in _list_fields(part).items():
            if name in value:
                yield value[name], field.type, _join_path(path, name)
    elif isinstance(value, dict) and get_origin(part) is dict:
        for key, item in value.items():
            yield item, get_args(part)[1], _join_path(path, key)
    elif isinstance(value, list) and get_origin(part) is list:
        for index, item in enumerate(value):
            yield item, get_args(part)[0], _join_path(path, str(index))


class _UnknownFields(Struct):
    """Unknown fields of a body, in a limited number.

    A body may contain a million fields, and comparisons of names take time.
    """

    refused: list[dict[str, Json]] = msgspec.field(default_factory=list)
    warned_of: dict[tuple[type, str], dict[str, Json]] = msgspec.field(default_factory=dict)
    """First unknown field of each name, by the type of its body."""

    @property
    def is_full(self) -> bool:
        """Whether there are as many refused fields as an answer lists."""
        return len(self.refused) >= limits.FINDINGS

    def add(self, kind: type[msgspec.Struct], name: str, path: str, *, is_strict: bool) -> None:
        """Record an unknown field of the body at `path`, to warn of, or to refuse if it resembles a known one, or if
        100 are warned of.

        Strict bodies refuse all. Not recorded are known read-only fields, and a field of a type that is warned of
        already.
        """
        if (kind, name) in self.warned_of or name in _read_only(kind):
            return
        known = _list_fields(kind)
        near = (
            []
            if name in _likely_others(kind)
            else name_suggestions.suggest_names(name, [*known, *_read_only(kind)])
        )
        below = _join_path(path, name[:MAX_SHOWN_NAME])
        hint = f"did you mean {' or '.join(near)}?" if near else f"there is {', '.join(known) or 'none'}"
        problem = errors.problem(below, "unknown-field", f"{below} is not a field here: {hint}")
        if near or is_strict or len(self.warned_of) >= limits.FINDINGS:
            self.refused.append(problem)
        else:
            self.warned_of[kind, name] = problem


class _UnknownFieldGuard(Struct, frozen=True):
    """Rules of a type about unknown fields, cached, since a body may contain ten thousand small objects."""

    container: type
    """`dict` for bodies too."""
    inside: Mapping[str, tuple[_UnknownFieldGuard, ...]]
    """Guards of each field of a body; for a container, the guards of its items under an empty name."""
    body: type[msgspec.Struct] | None = None
    names: frozenset[str] = frozenset()
    """Known fields of a body."""


@cache
def _build_guards(kind: Any) -> tuple[_UnknownFieldGuard, ...]:  # noqa: ANN401 - any type annotation
    """Return the rules by which unknown fields of a type are found; empty if it accepts any fields."""
    found: list[_UnknownFieldGuard] = []
    for part in _iterate_parts(kind):
        if _is_body(part):
            fields = _list_fields(part)
            below = {name: inside for name, field in fields.items() if (inside := _build_guards(field.type))}
            if below or is_strict_body(part) or _is_guarded(part):
                found.append(_UnknownFieldGuard(dict, below, part, frozenset(fields)))
        elif get_origin(part) in {dict, list} and (inside := _build_guards(get_args(part)[-1])):
            found.append(_UnknownFieldGuard(get_origin(part), {"": inside}))
    return tuple(found)


def _unknown_fields(value: Json, kind: Any, path: str) -> _UnknownFields:  # noqa: ANN401 - any type annotation
    """Return the unknown fields of a body, nested bodies included: those to refuse and those to warn of."""
    found = _UnknownFields()
    _look_for_unknown_fields(value, _build_guards(kind), path, found, is_strict=False)
    return found


def _look_for_unknown_fields(
    value: Json, guards: Sequence[_UnknownFieldGuard], path: str, found: _UnknownFields, *, is_strict: bool
) -> None:
    """Add the unknown fields of a value, nested bodies included, to `found` until it is full.

    Bodies inside of a strict one are strict too.
    """
    for guard in guards:
        if not isinstance(value, guard.container) or found.is_full:
            continue
        if guard.body is not None and isinstance(value, dict):
            is_strict_here = is_strict or is_strict_body(guard.body)
            if not value.keys() <= guard.names and (is_strict_here or _is_guarded(guard.body)):
                _note_unknown_fields(value, guard, path, found, is_strict=is_strict_here)
            for name, inside in guard.inside.items():
                if name in value:
                    below = _join_path(path, name)
                    _look_for_unknown_fields(value[name], inside, below, found, is_strict=is_strict_here)
        elif isinstance(value, dict | list) and len(value) <= MAX_ITEMS:
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                below = _join_path(path, str(key))
                _look_for_unknown_fields(item, guard.inside[""], below, found, is_strict=is_strict)


def _note_unknown_fields(
    value: Mapping[str, Json], guard: _UnknownFieldGuard, path: str, found: _UnknownFields, *, is_strict: bool
) -> None:
    for name in value:
        if found.is_full:
            return
        if name not in guard.names and guard.body is not None:
            found.add(guard.body, name, path, is_strict=is_strict)


def _read_only(kind: type) -> Mapping[str, str]:
    return kind.read_only if issubclass(kind, WireStruct) else {}


def _likely_others(kind: type) -> frozenset[str]:
    return kind.likely_others if issubclass(kind, WireStruct) else frozenset()


def is_strict_body(kind: type[msgspec.Struct]) -> bool:
    """Return whether a body refuses every unknown field."""
    return bool(kind.__struct_config__.forbid_unknown_fields)


def _is_guarded(kind: type[msgspec.Struct]) -> bool:
    return issubclass(kind, WireStruct) and kind.near_misses_are_refused


def _iterate_parts(kind: Any) -> Iterator[Any]:  # noqa: ANN401 - any type annotation
    """Yield the types that an annotation allows, without their constraints."""
    if get_origin(kind) is Annotated:
        yield from _iterate_parts(get_args(kind)[0])
    elif get_origin(kind) in {Union, UnionType}:
        for part in get_args(kind):
            yield from _iterate_parts(part)
    else:
        yield kind


@cache
def _list_fields(kind: type[msgspec.Struct]) -> Mapping[str, msgspec.structs.FieldInfo]:
    # The lookup takes 75 µs, and a body may contain a hundred thousand small objects.
    return {field.encode_name: field for field in msgspec.structs.fields(kind)}


def _is_body(kind: Any) -> TypeGuard[type[msgspec.Struct]]:  # noqa: ANN401 - any type annotation
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _describe_problem(path: str, kind: Any, reason: str) -> dict[str, Json]:  # noqa: ANN401 - any type annotation
    """Return a problem of `path` by a message of msgspec, in words of JSON, with the choices of an enumeration."""
    text, _, _ = reason.partition(" - at `$")
    code = "invalid-type" if ", got `" in text else "invalid-value"
    enums = [part for part in _iterate_parts(kind) if isinstance(part, type) and issubclass(part, Enum)]
    if enums and code == "invalid-value":
        text = f"Expected one of {', '.join(choice.value for choice in enums[0])}"
    if wanted := next(_pattern_descriptions(kind), None) if " matching regex " in text else None:
        text = f"Expected {wanted}"
    return errors.problem(path, code, f"{path or 'the body'}: {_QUOTED.sub(_json_type_name, text)}")


def _pattern_descriptions(kind: Any) -> Iterator[str]:  # noqa: ANN401 - any type annotation
    """Yield the descriptions of an annotation's string patterns, such as "a time"."""
    if get_origin(kind) is Annotated:
        yield from (one.description for one in get_args(kind)[1:] if one.description and one.pattern)
    elif get_origin(kind) in {Union, UnionType}:
        for part in get_args(kind):
            yield from _pattern_descriptions(part)


def _json_type_name(quoted: re.Match[str]) -> str:
    """Return a JSON name for a Python type in a message of msgspec."""
    return " or ".join(_JSON_WORDS.get(word, word) for word in quoted[1].split(" | "))


def _join_path(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
