"""Convert an attachment to a value: its text, rows, JSON, or bytes in base64."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Final, cast

from msgspec import structs

from concurrency import offload
from engine.run_errors import NodeError
from mail import content_decoding, mail_content
from nodes import config_fields
from nodes.formats import csv_reader, file_reader, json_reader
from nodes.formats.file_reader import FileFormat

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json

MAXIMUM_BYTES = 7_000_000
"""Base64 takes a third more, and must fit into an output."""
REFERENCE_KEY: Final = "$blob"
_CHARSET: Final = re.compile(r"charset=\"?([A-Za-z0-9_.:+-]+)", re.IGNORECASE)


class AttachmentForm(StrEnum):
    AUTO = "auto"
    TEXT = "text"
    BASE64 = "base64"
    JSON = "json"
    CSV = "csv"


async def run(call: NodeCall) -> Json:
    reference = _find_reference(call.config)
    maximum = int(config_fields.read_number(call.config, "maxBytes", minimum=1, maximum=MAXIMUM_BYTES))
    content = await call.services.blobs.get(call.caller, reference, max_bytes=maximum)
    label = cast("dict[str, str]", reference[REFERENCE_KEY])
    name, media_type = label.get("name", ""), label.get("type", "")
    wanted = config_fields.read_choice(call.config, "as", AttachmentForm)
    if wanted is AttachmentForm.AUTO:
        wanted = _choose_form(content, name, media_type)
    return {
        "format": wanted.value,
        "filename": name,
        "content_type": mail_content.clean_media_type(media_type),
        "size": len(content),
        **await _convert_content(call, content, wanted, media_type),
    }


def _find_reference(config: Mapping[str, Json]) -> dict[str, Json]:
    """Return the blob reference in the config: `attachment` itself, or its `blob` if it is the description of an
    attachment.

    Raises `NodeError` for other values, such as an attachment that is still at the URL of a mail service.
    """
    given = config_fields.read_mapping(config, "attachment")
    inner = given if REFERENCE_KEY in given else given.get("blob")
    if isinstance(inner, dict) and isinstance(inner.get(REFERENCE_KEY), dict):
        return inner
    if given.get("url"):
        text = "The attachment is still with the mail service, at its `url`: fetch it with http-request"
        raise NodeError(text, code="invalid-blob")
    raise config_fields.invalid_field("attachment", "an attachment, or its `blob`", given)


def _choose_form(content: bytes, name: str, media_type: str) -> AttachmentForm:
    """Return the default form for the content of a file: CSV, JSON, text (also for XML and JSON Lines), or Base64 for
    Excel and unknown files.
    """
    match file_reader.guess_format(content, name=name, media_type=media_type):
        case FileFormat.CSV:
            return AttachmentForm.CSV
        case FileFormat.JSON:
            return AttachmentForm.JSON
        case FileFormat.XML | FileFormat.JSON_LINES:
            return AttachmentForm.TEXT
        case FileFormat.TEXT if media_type.startswith("text/") or name.lower().endswith(".txt"):
            return AttachmentForm.TEXT
        case _:
            return AttachmentForm.BASE64


async def _convert_content(
    call: NodeCall, content: bytes, wanted: AttachmentForm, media_type: str
) -> Mapping[str, Json]:
    """Return the content as fields of the output: `base64`, `text`, or the output of the parser for CSV or JSON.

    Raises `NodeError` for content that can't be parsed.
    """
    if wanted is AttachmentForm.BASE64:
        return {"base64": (await offload.run_in_thread(b64encode, content)).decode()}
    charset = config_fields.read_text(call.config, "encoding")
    if charset == AttachmentForm.AUTO:
        said = _CHARSET.search(media_type)
        charset = said[1] if said else ""
    text = (await offload.run_in_thread(content_decoding.decode_text, content, charset)).removeprefix(
        "\ufeff"
    )
    match wanted:
        case AttachmentForm.CSV:
            options = config_fields.read_mapping(call.config, "csv")
            output = await csv_reader.parse_csv(structs.replace(call, config={**options, "text": text}))
        case AttachmentForm.JSON:
            output = await json_reader.parse_json(
                structs.replace(call, config={"text": text, "format": "json"})
            )
        case _:
            output = {"text": text}
    return cast("Mapping[str, Json]", output)
