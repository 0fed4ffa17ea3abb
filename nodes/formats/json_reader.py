"""JSON parser that refuses values that can't be stored exactly."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from concurrency.loop_share import LoopShare
from engine.run_errors import NodeError
from engine.values import InvalidJson, decode_json
from nodes import config_fields, item_lists

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json

BYTE_ORDER_MARK = "\ufeff"
MAXIMUM_BYTES = 10_000_000
MAXIMUM_CONTAINERS = 1_000_000
"""Maximum number of objects and lists: empty ones take three bytes of a text, but much more memory and time."""


class JsonFormat(StrEnum):
    JSON = "json"
    LINES = "lines"


async def parse_json(call: NodeCall) -> Json:
    """Return the JSON text of the config as `value`, or a list of the values of its lines.

    Raises `NodeError` for invalid JSON, over ten million bytes, and over a million objects and lists.
    """
    text = config_fields.read_text(call.config, "text").removeprefix(BYTE_ORDER_MARK)
    # Invalid characters are passed on to the decoder, which explains them.
    raw = text.encode(errors="surrogatepass")
    if len(raw) > MAXIMUM_BYTES:
        message = f"The JSON has {len(raw):,} bytes; at most {MAXIMUM_BYTES:,} are read"
        raise NodeError(message, code="text-too-long")
    if raw.count(b"[") + raw.count(b"{") > MAXIMUM_CONTAINERS:
        message = f"The JSON has more than {MAXIMUM_CONTAINERS:,} opening brackets: split it"
        raise NodeError(message, code="too-many-values")
    if config_fields.read_choice(call.config, "format", JsonFormat) is JsonFormat.LINES:
        return {"value": await _parse_lines(raw)}
    return {"value": _parse_text(raw, "`text`")}


async def _parse_lines(raw: bytes) -> list[Json]:
    """Return the JSON value of each line that isn't blank.

    Raises `NodeError` for invalid JSON, with the line's number, and for more than 100,000 values.
    """
    values: list[Json] = []
    turn = LoopShare()
    for number, line in enumerate(raw.split(b"\n"), start=1):
        await turn.yield_if_due()
        if not line.strip():
            continue
        if len(values) == item_lists.MAXIMUM_ITEMS:
            message = f"The text has more than {item_lists.MAXIMUM_ITEMS:,} lines with values"
            raise NodeError(message, code="too-many-items")
        values.append(_parse_text(line, f"Line {number}"))
    return values


def _parse_text(raw: bytes, place: str) -> Json:
    try:
        return decode_json(raw)
    except InvalidJson as error:
        raise NodeError(f"{place} can't be read as JSON: {error.message}", code="invalid-json") from error
