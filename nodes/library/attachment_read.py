"""An attachment becomes a value: its text, its rows, its JSON, or its bytes in base64."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Final, cast

from msgspec import structs

from concurrency import offload
from engine.run_errors import NodeError
from mail import charsets, mail_content
from nodes import fields
from nodes.library import csv_parse, file_parse, json_parse
from nodes.library.file_parse import Format

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json

MAXIMUM_BYTES = 7_000_000
"""In base64 it takes a third more, and must fit into an output."""
REFERENCE: Final = "$blob"
_CHARSET: Final = re.compile(r"charset=\"?([A-Za-z0-9_.:+-]+)", re.IGNORECASE)


class As(StrEnum):
    AUTO = "auto"
    TEXT = "text"
    BASE64 = "base64"
    JSON = "json"
    CSV = "csv"


async def run(call: NodeCall) -> Json:
    reference = _reference(call.config)
    maximum = int(fields.number(call.config, "maxBytes", minimum=1, maximum=MAXIMUM_BYTES))
    content = await call.services.blobs.get(call.caller, reference, max_bytes=maximum)
    label = cast("dict[str, str]", reference[REFERENCE])
    name, media_type = label.get("name", ""), label.get("type", "")
    wanted = fields.choice(call.config, "as", As)
    if wanted is As.AUTO:
        wanted = _fitting(content, name, media_type)
    return {
        "format": wanted.value,
        "filename": name,
        "content_type": mail_content.clean_media_type(media_type),
        "size": len(content),
        **await _read(call, content, wanted, media_type),
    }


def _reference(config: Mapping[str, Json]) -> dict[str, Json]:
    """Return the reference that the config gives, alone or as a part of what is told of an attachment."""
    given = fields.mapping(config, "attachment")
    inner = given if REFERENCE in given else given.get("blob")
    if isinstance(inner, dict) and isinstance(inner.get(REFERENCE), dict):
        return inner
    if given.get("url"):
        text = "The attachment is still with the mail service, at its `url`: fetch it with http-request"
        raise NodeError(text, code="invalid-blob")
    raise fields.unfit("attachment", "an attachment, or its `blob`", given)


def _fitting(content: bytes, name: str, media_type: str) -> As:
    """Return what becomes of a file without being told."""
    match file_parse.guessed(content, name=name, media_type=media_type):
        case Format.CSV:
            return As.CSV
        case Format.JSON:
            return As.JSON
        case Format.XML | Format.JSON_LINES:
            return As.TEXT
        case Format.TEXT if media_type.startswith("text/") or name.lower().endswith(".txt"):
            return As.TEXT
        case _:
            return As.BASE64


async def _read(call: NodeCall, content: bytes, wanted: As, media_type: str) -> Mapping[str, Json]:
    if wanted is As.BASE64:
        return {"base64": (await offload.run_in_thread(b64encode, content)).decode()}
    charset = fields.text(call.config, "encoding")
    if charset == As.AUTO:
        said = _CHARSET.search(media_type)
        charset = said[1] if said else ""
    text = (await offload.run_in_thread(charsets.decode_text, content, charset)).removeprefix("\ufeff")
    match wanted:
        case As.CSV:
            options = fields.mapping(call.config, "csv")
            output = await csv_parse.run(structs.replace(call, config={**options, "text": text}))
        case As.JSON:
            output = await json_parse.run(structs.replace(call, config={"text": text, "format": "json"}))
        case _:
            output = {"text": text}
    return cast("Mapping[str, Json]", output)
