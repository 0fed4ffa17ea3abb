"""Formats of inbound mails: recognition, envelope, deduplication key, and the mail in a posted form."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from enum import StrEnum
from hashlib import sha256
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from engine.values import Json, fingerprint
from mail import mail_parsing, service_forms
from mail.mail_content import AttachmentLabel
from mail.mail_limits import InvalidMail
from senders import sender_request, ses, signatures, sns
from senders.request_refusal import RequestRefused
from senders.sender_request import PostedForm, SenderRequest, parse_json
from senders.ses import SesMail

if TYPE_CHECKING:
    from mail.mail_content import KeepAttachment, ParsedMailContent
    from mail.service_forms import MailReception
    from senders.sender_request import PostedForm


RAW_TYPE: Final = "message/rfc822"
SENDER_HEADER: Final = "X-Envelope-From"
RECIPIENT_HEADER: Final = "X-Envelope-To"
MAX_HEADER_BYTES: Final = 262_144
"""Bytes of a mail that are searched for its Message-ID."""

_MAILGUN_SIGNATURE: Final = frozenset({"timestamp", "token", "signature"})
_NATIVE_CONTENT: Final = frozenset(
    {"from", "subject", "body_text", "body_html", "text", "html", "attachments"}
)
_HEADER_END: Final = re.compile(rb"\r?\n\r?\n")
_MESSAGE_ID: Final = re.compile(
    rb"^message-id[ \t]*:([^\r\n]*(?:\r?\n[ \t][^\r\n]*)*)", re.IGNORECASE | re.MULTILINE
)


class MailKind(StrEnum):
    """Format in which a mail is posted."""

    NATIVE = "native"
    """JSON with the output fields of an e-mail trigger, from an API client."""
    SENDGRID_PARSED = "sendgrid-parsed"
    SENDGRID_RAW = "sendgrid-raw"
    """The raw mail is in the field `email`."""
    MAILGUN_PARSED = "mailgun-parsed"
    MAILGUN_RAW = "mailgun-raw"
    """The raw mail is in the field `body-mime`."""
    MAILGUN_STORED = "mailgun-stored"
    """Parsed, with links to attachments that Mailgun stores."""
    MAILGUN_EVENT = "mailgun-event"
    """Delivery event of a sent mail, posted to the wrong URL; contains no mail."""
    RAW = "raw"
    """Raw mail (RFC 5322) from a mail server, with its envelope in request headers."""
    SNS = "sns"
    """Message of Amazon SNS, which may contain a mail."""


SENDGRID_KINDS: Final = frozenset({MailKind.SENDGRID_PARSED, MailKind.SENDGRID_RAW})


class MailEnvelope(Struct, frozen=True):
    """SMTP envelope of a mail; its addresses may differ from those of the mail's headers."""

    sender: str
    recipients: Sequence[str]


def recognize_mail(request: SenderRequest) -> MailKind:
    """Return the format of a mail in a request, by its media type, headers and field names; nothing is verified.

    An empty request without a media type counts as `NATIVE`. Raises `RequestRefused` for a request that is no
    mail, and `BudgetExceeded` as the accessors of `SenderRequest` do.
    """
    headers = request.headers
    if sns.TYPE_HEADER in headers or sns.RAW_HEADER in headers:
        return MailKind.SNS
    if request.media_type.name in {sender_request.MULTIPART_TYPE, sender_request.URLENCODED_TYPE}:
        return _recognize_form(parse_mail_fields(request))
    if request.media_type.is_json:
        return _recognize_json(request.json)
    if request.media_type.name == RAW_TYPE:
        return MailKind.RAW
    if not request.media_type.name and not request.body:
        return MailKind.NATIVE
    message = f"Send a mail as JSON, as {RAW_TYPE}, or as a form of SendGrid or Mailgun"
    raise RequestRefused("unsupported-media-type", message)


def parse_mail_fields(request: SenderRequest) -> PostedForm:
    """Parse the form that a mail service has posted; raises `RequestRefused` for a malformed form.

    Inside `try_inline`, a body of a megabyte or more raises `BudgetExceeded`.
    """
    return request.form


def parse_envelope(form: PostedForm, kind: MailKind) -> MailEnvelope:
    """Return the SMTP sender and recipients that SendGrid or Mailgun report in a form.

    The sender is empty and the recipients are none where the form lacks them or SendGrid's field is no JSON
    object: the mail is usable without an envelope. Raises `RequestRefused` for an invalid percent escape.
    """
    if kind not in SENDGRID_KINDS:
        # Mailgun posts the mail's headers as fields too, after its own fields: the first one counts.
        recipient = sender_request.decode_value(form.first("recipient") or b"")
        return MailEnvelope(
            sender_request.decode_value(form.first("sender") or b""), [recipient] if recipient else []
        )
    try:
        decoded = parse_json(form.first("envelope") or b"{}")
    except RequestRefused:
        decoded = {}
    members = decoded if isinstance(decoded, dict) else {}
    sender, recipients = members.get("from"), members.get("to")
    return MailEnvelope(
        sender if isinstance(sender, str) else "",
        [one for one in recipients if isinstance(one, str)] if isinstance(recipients, list) else [],
    )


def parse_raw_envelope(request: SenderRequest) -> MailEnvelope:
    """Return the envelope in the headers `X-Envelope-From` and `X-Envelope-To` (comma-separated) of a raw mail.

    A missing header gives an empty sender or no recipients. Raises `RequestRefused` for a repeated header.
    """
    recipients = (request.headers.single(RECIPIENT_HEADER) or "").split(",")
    sender = (request.headers.single(SENDER_HEADER) or "").strip().removeprefix("<").removesuffix(">")
    return MailEnvelope(sender, [one.strip() for one in recipients if one.strip()])


def deduplication_key(request: SenderRequest, kind: MailKind) -> str | None:
    """Return the key by which a repeated delivery of a mail is recognized; None where it has none.

    Digests the Message-ID, the recipients of the envelope and the decoded content; for a mail that SES has stored in
    S3, its DKIM-verified headers take the place of the content, or without these, the id that SES assigned is the key.
    So a repeated mail has the same key even if it was signed or encoded anew, and another content under the same
    Message-ID has another key. None for Mailgun's event reports, for SNS messages without a mail, and for mails in JSON
    without a Message-ID. Raises `RequestRefused` for a malformed mail, and `BudgetExceeded` as the accessors of
    `SenderRequest` do.
    """
    match kind:
        case MailKind.MAILGUN_EVENT:
            return None
        case MailKind.SNS:
            mail = ses.parse_ses_mail(sns.parse_sns_message(request))
            return None if mail is None else _ses_key(mail)
        case MailKind.NATIVE:
            return _native_deduplication_key(request.json if request.body else {})
        case MailKind.RAW:
            request.require_offloaded()
            return _raw_deduplication_key(request.body, parse_raw_envelope(request).recipients)
    form = parse_mail_fields(request)
    request.require_offloaded()
    content = _content_digest(form, kind)
    return signatures.delivery_key(
        "mail", _form_message_id(form, kind) or "", content, *parse_envelope(form, kind).recipients
    )


def _recognize_form(form: PostedForm) -> MailKind:
    """Return the format of a posted form by its field names: one of Mailgun's three, or of SendGrid's two.

    Raises `RequestRefused` for any other form.
    """
    if all(name in form for name in _MAILGUN_SIGNATURE):
        if "body-mime" in form:
            return MailKind.MAILGUN_RAW
        return MailKind.MAILGUN_STORED if "message-url" in form else MailKind.MAILGUN_PARSED
    if "envelope" in form:
        if "email" in form:
            return MailKind.SENDGRID_RAW
        if "headers" in form:
            return MailKind.SENDGRID_PARSED
    raise RequestRefused("unknown-mail", "The form has the fields of neither SendGrid nor Mailgun")


def _recognize_json(body: Json) -> MailKind:
    """Return the format of a JSON body: SNS, a Mailgun event, or else a mail in Pilotflame's own JSON."""
    if isinstance(body, dict):
        if "event-data" in body and "signature" in body:
            return MailKind.MAILGUN_EVENT
        if {"Type", "MessageId", "TopicArn", "Signature"} <= body.keys():
            return MailKind.SNS
    return MailKind.NATIVE


def _raw_deduplication_key(raw: bytes, recipients: Sequence[str]) -> str:
    """Return the key of a raw mail, from its Message-ID, its envelope recipients and its content."""
    try:
        content = mail_parsing.parse_mail(raw, _drop_attachment).content_digest
    except InvalidMail:
        content = sha256(raw).hexdigest()
    return signatures.delivery_key("mail", find_message_id(memoryview(raw)) or "", content, *recipients)


def _ses_key(mail: SesMail) -> str:
    """Return the key of a mail of Amazon SES, which assigns a new id each time that it receives the mail.

    A mail that SES stored in S3 has no content here: its DKIM-verified headers take the place of the content;
    without them, the id that SES assigned is the key.
    """
    if mail.content is not None:
        return _raw_deduplication_key(mail.content, mail.recipients)
    proven = mail.proven_headers
    if proven is None:
        return signatures.delivery_key("ses", mail.mail_id)
    return signatures.delivery_key("stored-mail", *proven, *mail.recipients)


def _native_deduplication_key(body: Json) -> str | None:
    """Return the key of a mail in JSON, from its Message-ID, recipient and content; None without a Message-ID, so that
    such mails are never duplicates.
    """
    headers = body.get("email_headers") if isinstance(body, dict) else None
    if not isinstance(body, dict) or not isinstance(headers, dict):
        return None
    found = (value for name, value in headers.items() if name.lower() == "message-id")
    message_id = next(found, None)
    if not isinstance(message_id, str) or not message_id.strip():
        return None
    recipient = body.get("to")
    said = {name: value for name, value in body.items() if name in _NATIVE_CONTENT}
    content = fingerprint(said)
    return signatures.delivery_key(
        "mail", message_id.strip(), content, recipient if isinstance(recipient, str) else ""
    )


def _form_message_id(form: PostedForm, kind: MailKind) -> str | None:
    """Return the Message-ID of a mail in a form, where its format keeps it; None without one.

    Raises `RequestRefused` for an invalid escape.
    """
    match kind:
        case MailKind.SENDGRID_PARSED:
            return find_message_id(form.first("headers") or memoryview(b""))
        case MailKind.SENDGRID_RAW:
            return find_message_id(form.first("email") or memoryview(b""))
        case _:
            return (form.text_of_header("Message-Id") or "").strip() or None


def find_message_id(mail: memoryview) -> str | None:
    """Return the Message-ID in the header of a raw mail without white space; None without one.

    Only the first 262,144 bytes of the mail are searched.
    """
    head = bytes(mail[:MAX_HEADER_BYTES])
    end = _HEADER_END.search(head)
    found = _MESSAGE_ID.search(head, 0, end.start() if end else len(head))
    return None if found is None else "".join(sender_request.decode_value(found[1]).split()) or None


def _content_digest(form: PostedForm, kind: MailKind) -> str:
    """Return a hexadecimal digest of the decoded mail in a form, or of the form's parts if the mail can't be
    decoded.

    Raises `RequestRefused` for a value with an invalid escape.
    """
    try:
        mail, _ = parse_mail_form(form, kind, _drop_attachment)
    except InvalidMail:
        return _form_digest(form)
    return mail.content_digest


def _drop_attachment(_label: AttachmentLabel, pieces: Iterator[bytes]) -> None:
    """Discard an attachment without reading it: `AttachmentCollector` measures and digests it; nothing is stored."""


def _form_digest(form: PostedForm) -> str:
    """Return a SHA-256 in hexadecimal over names and values of all parts, except the fields of Mailgun's signature.

    Raises `RequestRefused` for an invalid escape.
    """
    digest = sha256()
    for piece in _iterate_pieces(form):
        digest.update(b"%d:" % len(piece))
        digest.update(piece)
    return digest.hexdigest()


def _iterate_pieces(form: PostedForm) -> Iterator[bytes | memoryview]:
    """Yield the name and then the value of each part, except the fields of Mailgun's signature.

    These change with each delivery. Raises `RequestRefused` for an invalid escape.
    """
    for part in form.parts:
        if part.name not in _MAILGUN_SIGNATURE:
            yield part.name.encode()
            yield part.value


# ── mail forms ──────────────────────────────────────────────────────────────────────────────────────────────


def parse_mail_form(
    form: PostedForm, kind: MailKind, keep: KeepAttachment
) -> tuple[ParsedMailContent, MailReception]:
    """Return the mail in a form, and the service's report about it, such as its spam score.

    `keep` is called with each attachment. Raises `InvalidMail` for headers or attachments with too many bytes, and
    `RequestRefused` for a value with an invalid percent escape.
    """
    given = _to_mail_form(form)
    if kind in SENDGRID_KINDS:
        return service_forms.parse_sendgrid_form(given, keep), service_forms.parse_sendgrid_reception(given)
    mail = service_forms.parse_mailgun_form(given, keep)
    return mail, service_forms.parse_mailgun_reception(mail)


def _to_mail_form(form: PostedForm) -> service_forms.MailForm:
    fields = {name: [part.value for part in parts] for name, parts in form.fields.items()}
    files = [
        service_forms.FormFile(part.name, part.filename or "", part.content_type or "", part.value)
        for part in form.files
    ]
    return service_forms.MailForm(fields, files)
