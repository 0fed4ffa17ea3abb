"""A JSON text becomes the value that it writes, refused wherever that couldn't be kept exactly as it came."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from concurrency.loop_share import Turn
from engine.run_errors import NodeError
from engine.values import InvalidJson, decode_json
from nodes import fields, lists

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json

BYTE_ORDER_MARK = "\ufeff"
MAXIMUM_BYTES = 10_000_000
MAXIMUM_CONTAINERS = 1_000_000
"""Objects and lists: empty ones take three bytes of a text, but many more of the memory, and their time."""


class Format(StrEnum):
    JSON = "json"
    LINES = "lines"


async def run(call: NodeCall) -> Json:
    text = fields.text(call.config, "text").removeprefix(BYTE_ORDER_MARK)
    # What is no character at all is left for the decoder, which says what is wrong with it.
    raw = text.encode(errors="surrogatepass")
    if len(raw) > MAXIMUM_BYTES:
        message = f"The JSON has {len(raw):,} bytes; at most {MAXIMUM_BYTES:,} are read"
        raise NodeError(message, code="text-too-long")
    if raw.count(b"[") + raw.count(b"{") > MAXIMUM_CONTAINERS:
        message = f"The JSON has more than {MAXIMUM_CONTAINERS:,} opening brackets: cut it up"
        raise NodeError(message, code="too-many-values")
    if fields.choice(call.config, "format", Format) is Format.LINES:
        return {"value": await _lines(raw)}
    return {"value": _parsed(raw, "`text`")}


async def _lines(raw: bytes) -> list[Json]:
    """Return the value of each line that isn't blank."""
    values: list[Json] = []
    turn = Turn()
    for number, line in enumerate(raw.split(b"\n"), start=1):
        await turn.share()
        if not line.strip():
            continue
        if len(values) == lists.MAXIMUM_ITEMS:
            message = f"The text has more than {lists.MAXIMUM_ITEMS:,} lines with values"
            raise NodeError(message, code="too-many-items")
        values.append(_parsed(line, f"Line {number}"))
    return values


def _parsed(raw: bytes, place: str) -> Json:
    try:
        return decode_json(raw)
    except InvalidJson as error:
        raise NodeError(f"{place} can't be read as JSON: {error.message}", code="invalid-json") from error
