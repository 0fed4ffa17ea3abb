"""Typed access to rendered configs: each function returns a field as the type that its schema names.

The stored config was validated by the schema, but a template may render to anything: hence `NodeError`.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

from engine.run_errors import NodeError

if TYPE_CHECKING:
    from engine.values import Json

Choice = TypeVar("Choice", bound=StrEnum)

SHORTEST_TIMEOUT_SECONDS = 0.1
LONGEST_TIMEOUT_SECONDS = 300
SHOWN_KEYS = 8
SHOWN_CHARACTERS = 40


def read_text(config: Mapping[str, Json], name: str) -> str:
    """Return the text in a field of a config; raises `NodeError` for other types and a missing field."""
    value = config.get(name)
    if isinstance(value, str):
        return value
    raise invalid_field(name, "a text", value)


def read_number(config: Mapping[str, Json], name: str, *, minimum: float, maximum: float) -> int | float:
    """Return the number in a field of a config.

    Raises `NodeError` for other types, also booleans, a missing field, and a number outside of `minimum` to
    `maximum`.
    """
    value = config.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise invalid_field(name, "a number", value)
    if not minimum <= value <= maximum:
        message = f"`{name}` must be from {minimum:,} to {maximum:,}, not {value}"
        raise NodeError(message, code="invalid-config")
    return value


def read_timeout_seconds(config: Mapping[str, Json]) -> float:
    """Return `timeoutSeconds` of a config, the seconds that a node waits for another system.

    Raises `NodeError` unless it is a number from 0.1 to 300.
    """
    return read_number(
        config, "timeoutSeconds", minimum=SHORTEST_TIMEOUT_SECONDS, maximum=LONGEST_TIMEOUT_SECONDS
    )


def read_flag(config: Mapping[str, Json], name: str) -> bool:
    """Return the boolean in a field of a config; raises `NodeError` for other types and a missing field."""
    value = config.get(name)
    if isinstance(value, bool):
        return value
    raise invalid_field(name, "true or false", value)


def read_choice(config: Mapping[str, Json], name: str, kind: type[Choice]) -> Choice:
    """Return the member of `kind` whose value is in a field of a config; raises `NodeError` for other values."""
    value = config.get(name)
    try:
        return kind(str(value))
    except ValueError:
        raise invalid_field(name, f"one of {', '.join(kind)}", value) from None


def read_mapping(config: Mapping[str, Json], name: str) -> dict[str, Json]:
    """Return the object in a field of a config; raises `NodeError` for other types and a missing field."""
    value = config.get(name)
    if isinstance(value, dict):
        return value
    raise invalid_field(name, "an object", value)


def read_sequence(config: Mapping[str, Json], name: str) -> list[Json]:
    """Return the list in a field of a config; raises `NodeError` for other types and a missing field."""
    value = config.get(name)
    if isinstance(value, list):
        return value
    raise invalid_field(name, "a list", value)


def invalid_field(name: str, wanted: str, value: Json) -> NodeError:
    """Return the error `invalid-config` for a field of the wrong type: it names field, wanted and given type,
    not the value.
    """
    return NodeError(f"`{name}` must be {wanted}, but {describe_type(value)} arrived", code="invalid-config")


def describe_type(value: Json) -> str:
    """Describe the type of a value in words, without its content; only booleans, and up to eight names of
    fields are shown.
    """
    match value:
        case None:
            return "nothing (null)"
        case bool():
            return str(value).lower()
        case int() | float():
            return "a number"
        case str():
            return "a text"
        case list():
            return f"a list of {len(value)}"
        case dict():
            keys = ", ".join(key[:SHOWN_CHARACTERS] for key in islice(value, SHOWN_KEYS))
            return f"an object with {len(value):,} fields: {keys}" if keys else "an empty object"
