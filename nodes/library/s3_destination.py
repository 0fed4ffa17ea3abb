"""A value is written to a bucket as one object, which replaces the one before it: a second time changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, cast

from msgspec import structs

from engine.values import encode_json
from nodes import fields
from nodes.library import csv_format

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.services import ObjectBucket
    from engine.values import Json

MAXIMUM_BYTES = 50_000_000
REFERENCE = "$blob"


class Format(StrEnum):
    AUTO = "auto"
    JSON = "json"
    JSON_LINES = "json-lines"
    CSV = "csv"
    TEXT = "text"
    BLOB = "blob"


MEDIA_TYPES: Mapping[Format, str] = {
    Format.JSON: "application/json",
    Format.JSON_LINES: "application/x-ndjson",
    Format.CSV: "text/csv; charset=utf-8",
    Format.TEXT: "text/plain; charset=utf-8",
    Format.BLOB: "application/octet-stream",
}


async def run(call: NodeCall) -> Json:
    data_source = fields.text(call.config, "dataSource")
    return await write(call, await call.services.data_sources.bucket(call.caller, data_source))


async def write(call: NodeCall, bucket: ObjectBucket) -> dict[str, Json]:
    """Write an object to a bucket, or to what is like one, as the config says."""
    config = call.config
    key = fields.text(config, "key")
    timeout_seconds = fields.timeout_seconds(config)
    content, media_type = await _written(call)
    etag = await bucket.put(key, content, media_type=media_type, timeout_seconds=timeout_seconds)
    return {"key": key, "size": len(content), "etag": etag, "contentType": media_type}


async def _written(call: NodeCall) -> tuple[bytes, str]:
    """Return the `content` of the config as bytes, by its `format`, and its type."""
    value = call.config.get("content")
    wanted = fields.choice(call.config, "format", Format)
    if wanted is Format.AUTO:
        wanted = _fitting(value)
    content = await _bytes(call, value, wanted)
    given = fields.text(call.config, "contentType")
    if given or wanted is not Format.BLOB:
        return content, given or MEDIA_TYPES[wanted]
    label = cast("dict[str, dict[str, str]]", value)[REFERENCE]
    return content, label.get("type", MEDIA_TYPES[wanted])


def _fitting(value: Json) -> Format:
    if isinstance(value, dict) and set(value) == {REFERENCE}:
        return Format.BLOB
    return Format.TEXT if isinstance(value, str) else Format.JSON


async def _bytes(call: NodeCall, value: Json, wanted: Format) -> bytes:
    match wanted:
        case Format.BLOB:
            return await call.services.blobs.get(call.caller, value, max_bytes=MAXIMUM_BYTES)
        case Format.TEXT:
            return fields.text(call.config, "content").encode()
        case Format.CSV:
            options = fields.mapping(call.config, "csv")
            called = structs.replace(
                call, config={**options, "items": fields.sequence(call.config, "content")}
            )
            return fields.text(cast("dict[str, Json]", await csv_format.run(called)), "text").encode()
        case Format.JSON_LINES:
            lines = fields.sequence(call.config, "content")
            _ = encode_json(lines, max_bytes=MAXIMUM_BYTES)
            return b"".join(encode_json(line) + b"\n" for line in lines)
        case _:
            return encode_json(value, max_bytes=MAXIMUM_BYTES)
