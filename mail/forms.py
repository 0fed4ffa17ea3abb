"""The forms of mail services become mails: those in which a mail is raw, and those in which it is taken apart."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from json_text import decoding, pieces
from mail import charsets, headers, message, reading, transfer
from mail.limits import DEFAULT, Limits
from mail.message import Attachment, Keep, Label, Mail
from mail.reading import Attachments

if TYPE_CHECKING:
    from mail.form import File, Form

_NUMBER: Final = re.compile(r"attachment-?([0-9]{1,6})")
_UNNUMBERED: Final = 1_000_000
_HALF: Final = re.compile(r"[\x00\ud800-\udfff]")
_MAX_URL_CHARACTERS: Final = 2_000


def sendgrid(form: Form, keep_attachment: Keep, limits: Limits = DEFAULT) -> Mail:
    """Return the mail in a form of SendGrid's Inbound Parse; raises `InvalidMail`."""
    if "email" in form.fields:
        return reading.read(form.first("email"), keep_attachment, limits)
    encodings = _object(form, "charsets")
    described = _object(form, "attachment-info")
    content_ids = _turned(_object(form, "content-ids"))

    def label(file: File) -> Label:
        told = described.get(file.field)
        return _label(file, told if isinstance(told, dict) else {}, content_ids.get(file.field, ""))

    def text(name: str) -> str:
        return _written(form, name, _text(encodings.get(name)))

    mail = reading.of_headers(headers.of_block(bytes(form.first("headers")), limits))
    kept = _kept(form, label, keep_attachment, limits)
    return replace(
        mail,
        from_=message.join_lines(text("from")),
        to=message.join_lines(text("to")),
        subject=message.join_lines(text("subject")),
        body_text=text("text"),
        body_html=text("html"),
        attachments=kept.found,
        truncated={**mail.truncated, **reading.count_omissions(attachments=kept.omitted)},
    )


def mailgun(form: Form, keep_attachment: Keep, limits: Limits = DEFAULT) -> Mail:
    """Return the mail in a form of a Mailgun route, of `forward()` or of `store()`; raises `InvalidMail`."""
    if "body-mime" in form.fields:
        return reading.read(form.first("body-mime"), keep_attachment, limits)
    content_ids = _turned(_object(form, "content-id-map"))

    def label(file: File) -> Label:
        return _label(file, {}, content_ids.get(file.field, ""))

    def text(name: str) -> str:
        return _written(form, name, "utf-8")

    mail = reading.of_headers(_message_headers(form, limits))
    kept = _kept(form, label, keep_attachment, limits)
    return replace(
        mail,
        from_=message.join_lines(text("from")) or mail.from_,
        to=mail.to or message.join_lines(text("recipient")),
        subject=message.join_lines(text("subject")) or mail.subject,
        body_text=text("body-plain"),
        body_html=text("body-html"),
        attachments=[*kept.found, *_stored(form)],
        truncated={**mail.truncated, **reading.count_omissions(attachments=kept.omitted)},
    )


# ── attachments ─────────────────────────────────────────────────────────────────────────────────────────────


def _kept(form: Form, label: Callable[[File], Label], keep: Keep, limits: Limits) -> Attachments:
    """Hand out the files by their numbers: they come in any order, between the fields and before them."""
    kept = reading.Attachments(keep, limits)
    for file in sorted(form.files, key=_number):
        kept.add(label(file), transfer.pieces(file.content, 0, len(file.content)))
    return kept


def _number(file: File) -> int:
    found = _NUMBER.fullmatch(file.field)
    return int(found[1]) if found else _UNNUMBERED


def _label(file: File, described: dict[str, Any], content_id: str) -> Label:
    written = _text(described.get("type")) or file.content_type
    value, parameters = headers.parameters(written)
    content_type = message.cleaned_type(value)
    charset = _text(described.get("charset")) or parameters.get("charset", "")
    return Label(
        filename=message.cleaned_name(_text(described.get("filename")) or file.filename),
        content_type=content_type,
        content_id=message.cleaned_content_id(_text(described.get("content-id")) or content_id),
        charset=message.cleaned_charset(charset) if content_type.startswith("text/") else "",
    )


def _stored(form: Form) -> Iterator[Attachment]:
    """Yield the attachments that Mailgun keeps and gives out at an address, to whoever has the account's key."""
    for each in _list(form, "attachments"):
        if not isinstance(each, dict):
            continue
        label = Label(
            filename=message.cleaned_name(_text(each.get("name"))),
            content_type=message.cleaned_type(_text(each.get("content-type"))),
        )
        size = each.get("size")
        url = _text(each.get("url"))
        yield Attachment(
            label,
            size=size if type(size) is int and size >= 0 else 0,
            url=url if url.startswith("https://") and len(url) <= _MAX_URL_CHARACTERS else "",
        )


# ── fields ──────────────────────────────────────────────────────────────────────────────────────────────────


def _message_headers(form: Form, limits: Limits) -> headers.Headers:
    pairs = [each for each in _list(form, "message-headers") if isinstance(each, list)]
    named = [(_text(each[0]), _text(each[1])) for each in pairs if len(each) > 1 and each[0]]
    return headers.of_pairs(named, limits)


def _written(form: Form, name: str, charset: str) -> str:
    raw = form.first(name)
    return reading.text_of(transfer.pieces(raw, 0, len(raw)), charset)


def _object(form: Form, name: str) -> dict[str, Any]:
    found = _json(form, name)
    return found if isinstance(found, dict) else {}


def _list(form: Form, name: str) -> list[Any]:
    found = _json(form, name)
    return found if isinstance(found, list) else []


def _json(form: Form, name: str) -> object:
    """Return what a field holds as JSON; None for what is none: the mail is there without it."""
    text = charsets.decoded(bytes(form.first(name)), "utf-8")
    try:
        if len(text) > pieces.LONG_BYTES:
            return pieces.decode_in_pieces(text.encode(), decoding.decode)
        # Unlike our decoder, it takes half a surrogate pair: no reason to do without the rest of a field.
        return json.loads(text)  # noqa: TID251 - takes half a surrogate pair
    except (ValueError, RecursionError):
        return None


def _turned(names: dict[str, Any]) -> dict[str, str]:
    """Return names by what they stand for."""
    return {value: name for name, value in names.items() if isinstance(value, str)}


def _text(value: object) -> str:
    return _HALF.sub("\ufffd", value) if isinstance(value, str) else ""
