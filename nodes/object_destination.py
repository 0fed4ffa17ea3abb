"""Writing of a value to a bucket as one object; a repeated write replaces it with the same content."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, cast

from msgspec import structs

from engine.values import encode_json
from nodes import config_fields
from nodes.formats import csv_writer

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.services import ObjectBucket
    from engine.values import Json

MAXIMUM_BYTES = 50_000_000
REFERENCE_KEY = "$blob"


class ObjectFormat(StrEnum):
    AUTO = "auto"
    JSON = "json"
    JSON_LINES = "json-lines"
    CSV = "csv"
    TEXT = "text"
    BLOB = "blob"


MEDIA_TYPES: Mapping[ObjectFormat, str] = {
    ObjectFormat.JSON: "application/json",
    ObjectFormat.JSON_LINES: "application/x-ndjson",
    ObjectFormat.CSV: "text/csv; charset=utf-8",
    ObjectFormat.TEXT: "text/plain; charset=utf-8",
    ObjectFormat.BLOB: "application/octet-stream",
}


async def write_to_bucket(call: NodeCall) -> Json:
    data_source = config_fields.read_text(call.config, "dataSource")
    return await write_object(call, await call.services.data_sources.bucket(call.caller, data_source))


async def write_object(call: NodeCall, bucket: ObjectBucket) -> dict[str, Json]:
    """Write the configured object to a bucket or folder, and return its key, size in bytes, tag and media type.

    Raises `NodeError` for invalid content, and the errors of the storage.
    """
    config = call.config
    key = config_fields.read_text(config, "key")
    timeout_seconds = config_fields.read_timeout_seconds(config)
    content, media_type = await _encode_content(call)
    etag = await bucket.put(key, content, media_type=media_type, timeout_seconds=timeout_seconds)
    return {"key": key, "size": len(content), "etag": etag, "contentType": media_type}


async def _encode_content(call: NodeCall) -> tuple[bytes, str]:
    """Return the `content` of the config as bytes in its `format`, and its media type.

    `auto` takes the format from the content. A blob keeps its own media type unless the config has one. Raises
    `NodeError` and `InvalidJson`.
    """
    value = call.config.get("content")
    wanted = config_fields.read_choice(call.config, "format", ObjectFormat)
    if wanted is ObjectFormat.AUTO:
        wanted = _detect_format(value)
    content = await _encode_as(call, value, wanted)
    given = config_fields.read_text(call.config, "contentType")
    if given or wanted is not ObjectFormat.BLOB:
        return content, given or MEDIA_TYPES[wanted]
    label = cast("dict[str, dict[str, str]]", value)[REFERENCE_KEY]
    return content, label.get("type", MEDIA_TYPES[wanted])


def _detect_format(value: Json) -> ObjectFormat:
    if isinstance(value, dict) and set(value) == {REFERENCE_KEY}:
        return ObjectFormat.BLOB
    return ObjectFormat.TEXT if isinstance(value, str) else ObjectFormat.JSON


async def _encode_as(call: NodeCall, value: Json, wanted: ObjectFormat) -> bytes:
    """Return a value as bytes in the format `wanted`, which is never `auto`; raises `NodeError` and `InvalidJson`."""
    match wanted:
        case ObjectFormat.BLOB:
            return await call.services.blobs.get(call.caller, value, max_bytes=MAXIMUM_BYTES)
        case ObjectFormat.TEXT:
            return config_fields.read_text(call.config, "content").encode()
        case ObjectFormat.CSV:
            options = config_fields.read_mapping(call.config, "csv")
            called = structs.replace(
                call, config={**options, "items": config_fields.read_sequence(call.config, "content")}
            )
            return config_fields.read_text(
                cast("dict[str, Json]", await csv_writer.format_csv(called)), "text"
            ).encode()
        case ObjectFormat.JSON_LINES:
            lines = config_fields.read_sequence(call.config, "content")
            _ = encode_json(lines, max_bytes=MAXIMUM_BYTES)
            return b"".join(encode_json(line) + b"\n" for line in lines)
        case _:
            return encode_json(value, max_bytes=MAXIMUM_BYTES)
