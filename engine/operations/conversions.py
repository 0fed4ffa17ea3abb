"""Operations that convert values, or provide defaults for missing ones."""

from __future__ import annotations

from base64 import b64decode, b64encode
from typing import Final

from engine.operations.operation import (
    MAX_TEXT_LENGTH,
    Number,
    OperationError,
    check_text_length,
    define_operation,
    require_number,
)
from engine.values import InvalidJson, Json, decode_json, encode_json, type_name, value_as_text

_BOOLEANS = {"true": True, "false": False}
_URL_SAFE: Final = str.maketrans("-_", "+/")


@define_operation("default", takes_first_found=True)
def default_value(value: Json, fallback: Json) -> Json:
    """Return a value, or the fallback where the value is null or missing."""
    return fallback if value is None else value


@define_operation("coalesce", takes_first_found=True)
def coalesce(first: Json, *more: Json) -> Json:
    """Return the first value that is neither null nor missing.

    Null if there is none.
    """
    return next((value for value in (first, *more) if value is not None), None)


@define_operation("to-number")
def to_number(value: Json) -> Number:
    """Parse a number from a text, as JSON writes it; a number stays unchanged.

    Raises `OperationError` for other texts and values.
    """
    if type(value) is not str:
        return require_number(value)
    try:
        return require_number(decode_json(value.encode()))
    except (InvalidJson, OperationError) as error:
        raise OperationError(f"finds no number in the text {value[:40]!r}") from error


@define_operation("to-text")
def to_text(value: Json) -> str:
    """Convert a value to text: null to the empty text, objects and lists to JSON.

    Raises `InvalidJson` if the JSON is longer than ten million bytes.
    """
    return value_as_text(value, max_bytes=MAX_TEXT_LENGTH)


@define_operation("to-boolean")
def to_boolean(value: Json) -> bool:
    """Convert the texts true and false, or the numbers 1 and 0, to a boolean.

    Case and white space don't matter; booleans stay unchanged. Raises `OperationError` for other values.
    """
    if type(value) is bool:
        return value
    if type(value) is str and value.strip().lower() in _BOOLEANS:
        return _BOOLEANS[value.strip().lower()]
    if value in (0, 1):
        return value == 1
    raise OperationError(f"finds neither true nor false in a value of the type {type_name(value)}")


@define_operation("from-json", reads_all=True)
def from_json(value: str) -> Json:
    """Parse a JSON text.

    Raises `InvalidJson`.
    """
    return decode_json(value.encode())


@define_operation("to-json")
def to_json(value: Json) -> str:
    """Serialize a value as compact JSON.

    Raises `InvalidJson` for a text that is too long.
    """
    return encode_json(value, max_bytes=MAX_TEXT_LENGTH).decode()


@define_operation("base64-encode")
def base64_encode(value: str) -> str:
    """Encode a text, in UTF-8, as base64.

    Raises `OperationError` for a text that is too long.
    """
    check_text_length(4 * len(value) // 3)
    return b64encode(value.encode()).decode()


@define_operation("base64-decode")
def base64_decode(value: str) -> str:
    """Decode base64 (standard or URL-safe alphabet, padded or not) to a text in UTF-8.

    White space is ignored. Raises `OperationError` for other content, long texts and NUL characters.
    """
    check_text_length(len(value))
    digits = "".join(value.split()).translate(_URL_SAFE).rstrip("=")
    try:
        decoded = b64decode(digits + "=" * (-len(digits) % 4), validate=True).decode()
    except ValueError as error:  # also `UnicodeDecodeError` and `binascii.Error`
        raise OperationError("needs the base64 of a text in UTF-8") from error
    if "\0" in decoded:
        raise OperationError("needs the base64 of a text without the character NUL")
    return decoded
