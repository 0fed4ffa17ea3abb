"""Conversion of the forms of SendGrid and Mailgun into mails, raw or parsed by the service."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from json_text import decoding, pieces
from mail import charsets, headers, mail_content, mail_parsing, transfer_encoding
from mail.mail_content import AttachmentLabel, KeepAttachment, MailAttachment, ParsedMailContent
from mail.mail_limits import DEFAULT_LIMITS, MailLimits
from mail.mail_parsing import AttachmentCollector

if TYPE_CHECKING:
    from mail.mail_form import FormFile, MailForm

_NUMBER: Final = re.compile(r"attachment-?([0-9]{1,6})")
_UNNUMBERED: Final = 1_000_000
_HALF: Final = re.compile(r"[\x00\ud800-\udfff]")
_MAX_URL_CHARACTERS: Final = 2_000


def parse_sendgrid_form(
    form: MailForm, keep_attachment: KeepAttachment, limits: MailLimits = DEFAULT_LIMITS
) -> ParsedMailContent:
    """Return the mail in a form of SendGrid's Inbound Parse; raises `InvalidMail`."""
    if "email" in form.fields:
        return mail_parsing.parse_mail(form.first("email"), keep_attachment, limits)
    encodings = _object_field(form, "charsets")
    described = _object_field(form, "attachment-info")
    content_ids = _invert_mapping(_object_field(form, "content-ids"))

    def label(file: FormFile) -> AttachmentLabel:
        info = described.get(file.field)
        return _attachment_label(
            file, info if isinstance(info, dict) else {}, content_ids.get(file.field, "")
        )

    def text(name: str) -> str:
        return _decode_field(form, name, _to_text(encodings.get(name)))

    mail = mail_parsing.mail_of_headers(headers.parse_header_block(bytes(form.first("headers")), limits))
    kept = _keep_attachments(form, label, keep_attachment, limits)
    return replace(
        mail,
        from_=mail_content.join_lines(text("from")),
        to=mail_content.join_lines(text("to")),
        subject=mail_content.join_lines(text("subject")),
        body_text=text("text"),
        body_html=text("html"),
        attachments=kept.found,
        truncated={**mail.truncated, **mail_parsing.count_omissions(attachments=kept.omitted)},
    )


def parse_mailgun_form(
    form: MailForm, keep_attachment: KeepAttachment, limits: MailLimits = DEFAULT_LIMITS
) -> ParsedMailContent:
    """Return the mail in a form of a Mailgun route, of `forward()` or of `store()`; raises `InvalidMail`."""
    if "body-mime" in form.fields:
        return mail_parsing.parse_mail(form.first("body-mime"), keep_attachment, limits)
    content_ids = _invert_mapping(_object_field(form, "content-id-map"))

    def label(file: FormFile) -> AttachmentLabel:
        return _attachment_label(file, {}, content_ids.get(file.field, ""))

    def text(name: str) -> str:
        return _decode_field(form, name, "utf-8")

    mail = mail_parsing.mail_of_headers(_parse_message_headers(form, limits))
    kept = _keep_attachments(form, label, keep_attachment, limits)
    return replace(
        mail,
        from_=mail_content.join_lines(text("from")) or mail.from_,
        to=mail.to or mail_content.join_lines(text("recipient")),
        subject=mail_content.join_lines(text("subject")) or mail.subject,
        body_text=text("body-plain"),
        body_html=text("body-html"),
        attachments=[*kept.found, *_stored_attachments(form)],
        truncated={**mail.truncated, **mail_parsing.count_omissions(attachments=kept.omitted)},
    )


# ── attachments ─────────────────────────────────────────────────────────────────────────────────────────────


def _keep_attachments(
    form: MailForm, label: Callable[[FormFile], AttachmentLabel], keep: KeepAttachment, limits: MailLimits
) -> AttachmentCollector:
    """Pass the files to `keep` by their numbers: they are posted in any order, before and between the fields."""
    kept = mail_parsing.AttachmentCollector(keep, limits)
    for file in sorted(form.files, key=_attachment_number):
        kept.add(label(file), transfer_encoding.iterate_pieces(file.content, 0, len(file.content)))
    return kept


def _attachment_number(file: FormFile) -> int:
    found = _NUMBER.fullmatch(file.field)
    return int(found[1]) if found else _UNNUMBERED


def _attachment_label(file: FormFile, described: dict[str, Any], content_id: str) -> AttachmentLabel:
    written = _to_text(described.get("type")) or file.content_type
    value, parameters = headers.parse_parameters(written)
    content_type = mail_content.clean_media_type(value)
    charset = _to_text(described.get("charset")) or parameters.get("charset", "")
    return AttachmentLabel(
        filename=mail_content.clean_file_name(_to_text(described.get("filename")) or file.filename),
        content_type=content_type,
        content_id=mail_content.clean_content_id(_to_text(described.get("content-id")) or content_id),
        charset=mail_content.clean_charset(charset) if content_type.startswith("text/") else "",
    )


def _stored_attachments(form: MailForm) -> Iterator[MailAttachment]:
    """Yield the attachments that Mailgun stores; their URLs need the key of the account."""
    for each in _list_field(form, "attachments"):
        if not isinstance(each, dict):
            continue
        label = AttachmentLabel(
            filename=mail_content.clean_file_name(_to_text(each.get("name"))),
            content_type=mail_content.clean_media_type(_to_text(each.get("content-type"))),
        )
        size = each.get("size")
        url = _to_text(each.get("url"))
        yield MailAttachment(
            label,
            size=size if type(size) is int and size >= 0 else 0,
            url=url if url.startswith("https://") and len(url) <= _MAX_URL_CHARACTERS else "",
        )


# ── fields ──────────────────────────────────────────────────────────────────────────────────────────────────


def _parse_message_headers(form: MailForm, limits: MailLimits) -> headers.MailHeaders:
    pairs = [each for each in _list_field(form, "message-headers") if isinstance(each, list)]
    named = [(_to_text(each[0]), _to_text(each[1])) for each in pairs if len(each) > 1 and each[0]]
    return headers.headers_of_pairs(named, limits)


def _decode_field(form: MailForm, name: str, charset: str) -> str:
    raw = form.first(name)
    return mail_parsing.decode_body(transfer_encoding.iterate_pieces(raw, 0, len(raw)), charset)


def _object_field(form: MailForm, name: str) -> dict[str, Any]:
    found = _json_field(form, name)
    return found if isinstance(found, dict) else {}


def _list_field(form: MailForm, name: str) -> list[Any]:
    found = _json_field(form, name)
    return found if isinstance(found, list) else []


def _json_field(form: MailForm, name: str) -> object:
    """Return the JSON value of a field; None if it is invalid, since the mail is usable without it."""
    text = charsets.decode_text(bytes(form.first(name)), "utf-8")
    try:
        if len(text) > pieces.LONG_BYTES:
            return pieces.decode_in_pieces(text.encode(), decoding.decode)
        # `json.loads` accepts half a surrogate pair, unlike the project's decoder; one is no reason to lose the field.
        return json.loads(text)  # noqa: TID251 - takes half a surrogate pair
    except (ValueError, RecursionError):
        return None


def _invert_mapping(names: dict[str, Any]) -> dict[str, str]:
    """Return the mapping with keys and values exchanged."""
    return {value: name for name, value in names.items() if isinstance(value, str)}


def _to_text(value: object) -> str:
    return _HALF.sub("\ufffd", value) if isinstance(value, str) else ""
