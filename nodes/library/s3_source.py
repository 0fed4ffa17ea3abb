"""An object of a bucket is read, or what there is below a prefix is listed."""

from __future__ import annotations

import mimetypes
from collections.abc import Mapping
from typing import TYPE_CHECKING

from engine.run_errors import NodeError
from nodes import fields
from nodes.library import file_parse
from nodes.library.file_parse import Format

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.services import ObjectBucket
    from engine.values import Json

MAXIMUM_BYTES = 50_000_000
MAXIMUM_OBJECTS = 10_000
BLOB = "blob"


async def run(call: NodeCall) -> Json:
    data_source = fields.text(call.config, "dataSource")
    return await read(call, await call.services.data_sources.bucket(call.caller, data_source))


async def read(call: NodeCall, bucket: ObjectBucket) -> Json:
    """Return an object, or a listing, of a bucket or of what is like one, as the config says."""
    config = call.config
    timeout_seconds = fields.timeout_seconds(config)
    if config.get("key") is None:
        return await _listed(config, bucket, timeout_seconds)
    key = fields.text(config, "key")
    maximum = fields.number(config, "maxBytes", minimum=1, maximum=MAXIMUM_BYTES)
    content = await bucket.get(key, max_bytes=int(maximum), timeout_seconds=timeout_seconds)
    return {"key": key, "size": len(content), **await _made_of(call, key, content)}


async def _listed(config: Mapping[str, Json], bucket: ObjectBucket, timeout_seconds: float) -> Json:
    maximum = fields.number(config, "maxObjects", minimum=1, maximum=MAXIMUM_OBJECTS)
    prefix = fields.text(config, "prefix")
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


async def _made_of(call: NodeCall, key: str, content: bytes) -> dict[str, Json]:
    wanted = fields.text(call.config, "as")
    if wanted == BLOB or (wanted == Format.AUTO and b"\0" in content[: file_parse.HEAD_BYTES]):
        return {"format": BLOB, "blob": await _kept(call, key, content)}
    known = fields.choice(call.config, "as", Format)
    if known is Format.AUTO:
        known = file_parse.guessed(content, name=key)
    if len(content) > file_parse.MAXIMUM_BYTES:
        maximum = f"{file_parse.MAXIMUM_BYTES:,}"
        message = f"The object has {len(content):,} bytes; only as a blob may it have more than {maximum}"
        raise NodeError(message, code="object-too-large")
    return {"format": known.value, **await file_parse.parsed(call, content, known)}


async def _kept(call: NodeCall, key: str, content: bytes) -> Json:
    media_type = mimetypes.guess_type(key)[0] or "application/octet-stream"
    return await call.services.blobs.put(call.caller, content, media_type=media_type, name=key)
