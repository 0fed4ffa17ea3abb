"""Send an e-mail to all recipients or to none; a second attempt sends the same mail, with the same Message-ID."""

from __future__ import annotations

import binascii
from base64 import b64decode
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from concurrency import offload
from engine.run_errors import NodeError
from engine.values import value_as_text
from mail import composition, headers, mail_content
from mail.composition import EnclosedFile, OutgoingMail
from mail.mail_content import AttachmentLabel
from nodes import config_fields

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json
    from mail.headers import Mailbox

MAXIMUM_RECIPIENTS: Final = 100
MAXIMUM_ATTACHMENTS: Final = 50
MAXIMUM_ATTACHED_BYTES: Final = 15_000_000
"""Maximum size of all attachments; encoding adds a third, and many servers refuse mails beyond 20 MB."""
MAXIMUM_TEXT_CHARACTERS: Final = 2_000_000
REFERENCE_KEY: Final = "$blob"
TEXT_KEY: Final = "text"
TEXT_TYPES: Final[Mapping[str, str]] = {
    "csv": "text/csv",
    "htm": "text/html",
    "html": "text/html",
    "ics": "text/calendar",
    "json": "application/json",
    "md": "text/markdown",
    "svg": "image/svg+xml",
    "tsv": "text/tab-separated-values",
    "vcf": "text/vcard",
    "xml": "application/xml",
}
"""Media types of files that are given as text, by the extension of their name."""


async def run(call: NodeCall) -> Json:
    config = call.config
    server = await call.services.data_sources.mail_server(
        call.caller, config_fields.read_text(config, "dataSource")
    )
    outgoing = await _build_mail(call)
    recipients = _list_recipients(outgoing, _read_mailboxes(config, "bcc"))
    await server.send(
        outgoing.sender.address,
        recipients,
        await offload.run_in_thread(_compose_mail, outgoing),
        timeout_seconds=config_fields.read_timeout_seconds(config),
    )
    return {"messageId": outgoing.message_id, "recipients": [*recipients], "count": len(recipients)}


async def _build_mail(call: NodeCall) -> OutgoingMail:
    config = call.config
    senders = _read_mailboxes(config, "from")
    if len(senders) != 1:
        raise NodeError("`from` must be one address", code="invalid-address")
    return OutgoingMail(
        sender=senders[0],
        message_id=composition.make_message_id(call.idempotency_key, senders[0].domain),
        date=call.now,
        to=_read_mailboxes(config, "to"),
        cc=_read_mailboxes(config, "cc"),
        reply_to=_read_mailboxes(config, "replyTo"),
        subject=config_fields.read_text(config, "subject"),
        text=_read_body(config, "text"),
        html=_read_body(config, "html"),
        headers=_read_headers(config),
        enclosed=await _read_attachments(call),
    )


def _compose_mail(outgoing: OutgoingMail) -> bytes:
    try:
        return composition.compose_mail(outgoing)
    except ValueError as error:
        raise NodeError(f"The mail can't be written: {error}", code="invalid-header") from error


# ── recipients ──────────────────────────────────────────────────────────────────────────────────────────────


def _read_mailboxes(config: Mapping[str, Json], name: str) -> list[Mailbox]:
    """Return the addresses in the field `name`, a text or a list of texts; empty texts are skipped.

    A text may have several addresses. Raises `NodeError` for other types and invalid addresses.
    """
    given = config.get(name)
    texts = given if isinstance(given, list) else [given]
    found: list[Mailbox] = []
    for text in texts:
        if not isinstance(text, str):
            raise config_fields.invalid_field(name, "an address, or a list of them", given)
        if not text.strip():
            continue
        try:
            found += headers.parse_mailboxes(text)
        except ValueError as error:
            raise NodeError(f"`{name}` can't be used: {error}", code="invalid-address") from error
    return found


def _list_recipients(outgoing: OutgoingMail, bcc: Sequence[Mailbox]) -> Sequence[str]:
    """Return the distinct addresses of all recipients; raises `NodeError` for none, and for over 100."""
    found = dict.fromkeys(each.address for each in (*outgoing.to, *outgoing.cc, *bcc))
    if not found:
        raise NodeError("The mail has no recipient in `to`, `cc` or `bcc`", code="invalid-address")
    if len(found) > MAXIMUM_RECIPIENTS:
        message_ = f"The mail has {len(found):,} recipients; at most {MAXIMUM_RECIPIENTS} are allowed"
        raise NodeError(message_, code="too-many-recipients")
    return list(found)


# ── content ─────────────────────────────────────────────────────────────────────────────────────────────────


def _read_headers(config: Mapping[str, Json]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in config_fields.read_mapping(config, "headers").items():
        if value is None:
            continue
        text = value_as_text(value)
        try:
            composition.check_header(name, text)
        except ValueError as error:
            raise NodeError(f"`headers` can't be used: {error}", code="invalid-header") from error
        found[name] = text
    return found


def _read_body(config: Mapping[str, Json], name: str) -> str:
    text = config_fields.read_text(config, name)
    if len(text) > MAXIMUM_TEXT_CHARACTERS:
        message_ = f"`{name}` has more than {MAXIMUM_TEXT_CHARACTERS:,} characters: attach it as a file"
        raise NodeError(message_, code="mail-too-large")
    return text


async def _read_attachments(call: NodeCall) -> Sequence[EnclosedFile]:
    """Return the attachments in the config with their contents.

    Raises `NodeError` for over 50, over 15 million bytes in total, and values that are no attachments.
    """
    given = config_fields.read_sequence(call.config, "attachments")
    if len(given) > MAXIMUM_ATTACHMENTS:
        message_ = f"The mail has {len(given):,} attachments; at most {MAXIMUM_ATTACHMENTS} are allowed"
        raise NodeError(message_, code="too-many-attachments")
    enclosed: list[EnclosedFile] = []
    remaining = MAXIMUM_ATTACHED_BYTES
    for each in given:
        if not isinstance(each, dict):
            raise config_fields.invalid_field("attachments", "a list of attachments", given)
        content = await _read_content(call, each)
        remaining -= len(content)
        if remaining < 0:
            message_ = f"The attachments have more than {MAXIMUM_ATTACHED_BYTES:,} bytes together"
            raise NodeError(message_, code="mail-too-large")
        enclosed.append(EnclosedFile(_attachment_label(each), content))
    return enclosed


async def _read_content(call: NodeCall, given: dict[str, Json]) -> bytes:
    """Return the content of an attachment: of its blob, its `text` in UTF-8, or its decoded `base64`, which a blob
    beside it replaces.

    Raises `NodeError` for none of them, invalid Base64, and `text` beside another.
    """
    reference, written, text = _find_reference(given), given.get("base64"), given.get(TEXT_KEY)
    if text is not None and (reference is not None or written is not None):
        message_ = "An attachment takes one of `text`, `base64` and `blob`, not two"
        raise NodeError(message_, code="invalid-config")
    if reference is not None:
        return await call.services.blobs.get(call.caller, reference, max_bytes=MAXIMUM_ATTACHED_BYTES)
    if isinstance(text, str):
        return text.encode()
    if not isinstance(written, str):
        wanted = "a list of references, or of objects with `text` or `base64`"
        raise config_fields.invalid_field("attachments", wanted, given)
    try:
        return b64decode("".join(written.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise NodeError("`base64` of an attachment is not base64", code="invalid-encoding") from error


def _find_reference(given: dict[str, Json]) -> dict[str, Json] | None:
    """Return the blob reference that an attachment is, or has in `blob`; None if it has neither."""
    inner = given if REFERENCE_KEY in given else given.get("blob")
    return inner if isinstance(inner, dict) else None


def _attachment_label(given: dict[str, Json]) -> AttachmentLabel:
    """Return file name, type and content id of an attachment, cleaned, with the values of its blob reference as
    defaults.

    An attachment given as `text` has a text type by the suffix of its name.
    """
    reference = _find_reference(given) or {}
    known = reference.get(REFERENCE_KEY)
    known = known if isinstance(known, dict) else {}
    content_id = mail_content.clean_content_id(_text_field(given, "content_id"))
    filename = mail_content.clean_file_name(
        _text_field(given, "filename") or _text_field(given, "name") or _text_field(known, "name")
    )
    content_type = _text_field(given, "content_type") or _text_field(known, "type")
    is_text = isinstance(given.get(TEXT_KEY), str)
    if is_text and not content_type:
        content_type = TEXT_TYPES.get(filename.lower().rpartition(".")[2], "text/plain")
    return AttachmentLabel(
        filename=filename,
        content_type=mail_content.clean_media_type(content_type),
        content_id=content_id if content_id.isascii() and " " not in content_id else "",
        charset="utf-8" if is_text else "",
    )


def _text_field(given: Mapping[str, Json], name: str) -> str:
    value = given.get(name)
    return value if isinstance(value, str) else ""
