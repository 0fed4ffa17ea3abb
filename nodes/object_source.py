"""Reading of an object of a bucket, and listing of the objects below a prefix."""

from __future__ import annotations

import mimetypes
from collections.abc import Mapping
from typing import TYPE_CHECKING

from engine.run_errors import NodeError
from nodes import config_fields
from nodes.formats import file_reader
from nodes.formats.file_reader import FileFormat

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.services import ObjectBucket
    from engine.values import Json

MAXIMUM_BYTES = 50_000_000
MAXIMUM_OBJECTS = 10_000
BLOB_OUTPUT = "blob"


async def read_from_bucket(call: NodeCall) -> Json:
    data_source = config_fields.read_text(call.config, "dataSource")
    return await read_objects(call, await call.services.data_sources.bucket(call.caller, data_source))


async def read_objects(call: NodeCall, bucket: ObjectBucket) -> Json:
    """Return the object with the configured `key`, parsed or as a blob, with its size; without `key`, a listing of
    objects.

    Raises `NodeError` for a missing or too large object, invalid content, and if the storage fails.
    """
    config = call.config
    timeout_seconds = config_fields.read_timeout_seconds(config)
    if config.get("key") is None:
        return await _list_objects(config, bucket, timeout_seconds)
    key = config_fields.read_text(config, "key")
    maximum = config_fields.read_number(config, "maxBytes", minimum=1, maximum=MAXIMUM_BYTES)
    content = await bucket.get(key, max_bytes=int(maximum), timeout_seconds=timeout_seconds)
    return {"key": key, "size": len(content), **await _convert_object(call, key, content)}


async def _list_objects(config: Mapping[str, Json], bucket: ObjectBucket, timeout_seconds: float) -> Json:
    """Return `objects` below the prefix in the config, with their size, tag and time of change, and their `count`."""
    maximum = config_fields.read_number(config, "maxObjects", minimum=1, maximum=MAXIMUM_OBJECTS)
    prefix = config_fields.read_text(config, "prefix")
    found = await bucket.list(prefix, max_objects=int(maximum), timeout_seconds=timeout_seconds)
    objects: list[Json] = [
        {
            "key": one.key,
            "size": one.size,
            "etag": one.etag,
            "modifiedAt": one.modified_at.isoformat().replace("+00:00", "Z"),
        }
        for one in found
    ]
    return {"objects": objects, "count": len(objects)}


async def _convert_object(call: NodeCall, key: str, content: bytes) -> dict[str, Json]:
    """Return the content of an object in the form that the config's `as` asks for, with the name of the form.

    It is parsed by its format, or stored as a blob if `as` asks for that, or is `auto` and the content is binary.
    Raises `NodeError` if it is too large to be parsed.
    """
    wanted = config_fields.read_text(call.config, "as")
    if wanted == BLOB_OUTPUT or (wanted == FileFormat.AUTO and b"\0" in content[: file_reader.HEAD_BYTES]):
        return {"format": BLOB_OUTPUT, "blob": await _store_blob(call, key, content)}
    known = config_fields.read_choice(call.config, "as", FileFormat)
    if known is FileFormat.AUTO:
        known = file_reader.guess_format(content, name=key)
    if len(content) > file_reader.MAXIMUM_BYTES:
        maximum = f"{file_reader.MAXIMUM_BYTES:,}"
        message = f"The object has {len(content):,} bytes; at most {maximum} are read unless `as` is `blob`"
        raise NodeError(message, code="object-too-large")
    return {"format": known.value, **await file_reader.parse_content(call, content, known)}


async def _store_blob(call: NodeCall, key: str, content: bytes) -> Json:
    media_type = mimetypes.guess_type(key)[0] or "application/octet-stream"
    return await call.services.blobs.put(call.caller, content, media_type=media_type, name=key)
