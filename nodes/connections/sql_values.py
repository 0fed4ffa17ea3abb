"""Conversion of database values to JSON and back.

A decimal becomes a number if a double or an integer represents it exactly, else a text. Dates and times become ISO
8601, bytes become Base64, NaN and the infinities become null. Types without a form in JSON become their text.
"""

from __future__ import annotations

import math
from base64 import b64decode, b64encode
from binascii import Error as InvalidBase64
from decimal import Decimal
from typing import TYPE_CHECKING

import msgspec

from engine.run_errors import NodeError
from engine.values import MAX_DEPTH, InvalidJson, decode_json

if TYPE_CHECKING:
    from engine.values import Json

ROWS_DEPTH = 4
"""Levels around a value: an output, its rows, a row."""
MAX_DIGITS = 308

_encode = msgspec.json.Encoder().encode


def decimal_to_json(value: Decimal) -> Json:
    if not value.is_finite():
        return None
    if value.adjusted() > MAX_DIGITS:
        return str(value)
    if value == value.to_integral_value():
        return int(value)
    as_float = float(value)
    return as_float if Decimal(repr(as_float)) == value else str(value)


def float_to_json(value: float) -> Json:
    return value if math.isfinite(value) else None


def bytes_to_json(value: bytes) -> Json:
    return b64encode(value).decode()


def json_column_to_json(text: str | bytes) -> Json:
    """Return the parsed value of a JSON column; its text if it exceeds this server's limits for JSON."""
    raw = text.encode() if isinstance(text, str) else text
    try:
        return decode_json(raw, max_depth=MAX_DEPTH - ROWS_DEPTH)
    except InvalidJson:
        return raw.decode(errors="replace")


def to_bytes(value: Json) -> bytes | None:
    """Return the bytes of a Base64 text for a binary column, None for null; raises `NodeError` for anything else."""
    if value is None:
        return None
    try:
        return b64decode(value if isinstance(value, str) else "?", validate=True)
    except InvalidBase64 as error:
        raise NodeError("A value for a binary column must be Base64", code="invalid-rows") from error


def to_json_text(value: Json) -> str:
    return _encode(value).decode()


def to_plain(value: Json) -> str | int | float | None:
    """Return a value for a database without JSON: objects and lists as JSON texts, booleans as 0 and 1,
    others unchanged.
    """
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, dict | list):
        return to_json_text(value)
    return value
