"""Parse a raw mail into the output of an e-mail trigger; attachments are stored as blobs of the execution."""

from __future__ import annotations

import binascii
from base64 import b64decode
from collections.abc import Iterator
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from concurrency import offload
from engine.run_errors import NodeError
from mail import mail_content, mail_parsing
from mail.mail_content import AttachmentLabel, ParsedMailContent
from mail.mail_limits import InvalidMail
from nodes import config_fields

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json

MAXIMUM_BYTES = 50_000_000


class MailEncoding(StrEnum):
    TEXT = "text"
    BASE64 = "base64"


async def run(call: NodeCall) -> Json:
    raw = await _read_raw(call)
    contents: list[tuple[AttachmentLabel, bytes]] = []

    def keep(label: AttachmentLabel, pieces: Iterator[bytes]) -> None:
        contents.append((label, mail_content.join_pieces(pieces)))

    mail = await offload.run_in_thread(_parse_mail, raw, keep)
    attachments: list[dict[str, Any]] = []
    for found, (label, content) in zip(mail.attachments, contents, strict=True):
        reference = await call.services.blobs.put(
            call.caller, content, media_type=label.media_type, name=label.filename
        )
        attachments.append({**found.as_json(), "blob": reference})
    return {**mail.as_json(attachments), "message_id": mail.message_id}


async def _read_raw(call: NodeCall) -> bytes:
    given = call.config.get("mail")
    if isinstance(given, dict):
        return await call.services.blobs.get(call.caller, given, max_bytes=MAXIMUM_BYTES)
    written = config_fields.read_text(call.config, "mail")
    if config_fields.read_choice(call.config, "encoding", MailEncoding) is MailEncoding.TEXT:
        return written.encode(errors="replace")
    try:
        return b64decode("".join(written.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise NodeError("`mail` is not base64", code="invalid-encoding") from error


def _parse_mail(raw: bytes, keep: mail_content.KeepAttachment) -> ParsedMailContent:
    try:
        return mail_parsing.parse_mail(raw, keep)
    except InvalidMail as error:
        raise NodeError(error.message, code="invalid-mail") from error
