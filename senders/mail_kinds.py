"""The forms in which a mail is handed in: which one a request has, for whom it is, and by what it is known again."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from typing import Final

from engine.values import Json, fingerprint
from mail import mail_parsing
from mail.mail_content import AttachmentLabel
from mail.mail_limits import InvalidMail
from senders import delivery_keys, forms, mail_forms, ses, sns
from senders.arrival import Arrival, json_of
from senders.forms import Form
from senders.refusals import Refused
from senders.ses import ReceivedMail

RAW_TYPE: Final = "message/rfc822"
SENDER_HEADER: Final = "X-Envelope-From"
RECIPIENT_HEADER: Final = "X-Envelope-To"
MAX_HEADER_BYTES: Final = 262_144
"""Of a mail, in which its Message-ID is looked for."""

_MAILGUN_SIGNATURE: Final = frozenset({"timestamp", "token", "signature"})
_NATIVE_CONTENT: Final = frozenset(
    {"from", "subject", "body_text", "body_html", "text", "html", "attachments"}
)
_HEADER_END: Final = re.compile(rb"\r?\n\r?\n")
_MESSAGE_ID: Final = re.compile(
    rb"^message-id[ \t]*:([^\r\n]*(?:\r?\n[ \t][^\r\n]*)*)", re.IGNORECASE | re.MULTILINE
)


class MailKind(StrEnum):
    """Who hands a mail in, and how."""

    NATIVE = "native"
    """A caller of ours, as JSON with the fields that an e-mail trigger gives out."""
    SENDGRID_PARSED = "sendgrid-parsed"
    SENDGRID_RAW = "sendgrid-raw"
    """The whole mail in the field `email`."""
    MAILGUN_PARSED = "mailgun-parsed"
    MAILGUN_RAW = "mailgun-raw"
    """The whole mail in the field `body-mime`."""
    MAILGUN_STORED = "mailgun-stored"
    """Parsed, with links to attachments that Mailgun keeps."""
    MAILGUN_EVENT = "mailgun-event"
    """No mail: what has become of one that was sent, posted to the wrong address."""
    RAW = "raw"
    """A mail as it goes over the wire, from a mail server; its envelope stands in headers of the request."""
    SNS = "sns"
    """A message of SNS, which may tell of a mail."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """Between whom a mail was handed over, whatever its header says."""

    sender: str
    recipients: Sequence[str]


def recognise(arrival: Arrival) -> MailKind:
    """Return what a request is by its media type and its fields, which says nothing yet of whether it is true.

    Raises `Refused` for what is no mail of any kind.
    """
    headers = arrival.headers
    if sns.TYPE_HEADER in headers or sns.RAW_HEADER in headers:
        return MailKind.SNS
    if arrival.media_type.name in {forms.MULTIPART, forms.URLENCODED}:
        return _kind_of_form(fields(arrival))
    if arrival.media_type.is_json:
        return _kind_of_json(arrival.json)
    if arrival.media_type.name == RAW_TYPE:
        return MailKind.RAW
    if not arrival.media_type.name and not arrival.body:
        return MailKind.NATIVE
    message = f"Send a mail as JSON, as {RAW_TYPE}, or as a form of SendGrid or Mailgun"
    raise Refused("unsupported-media-type", message)


def fields(arrival: Arrival) -> Form:
    """Return the form that a mail service has posted; raises `Refused`."""
    return arrival.form


def envelope(form: Form, kind: MailKind) -> Envelope:
    """Return the envelope of a mail of SendGrid or Mailgun; raises `Refused` for a value that can't be unescaped.

    An envelope that isn't the JSON object that SendGrid documents counts as empty: the mail is there without it.
    """
    if kind not in {MailKind.SENDGRID_PARSED, MailKind.SENDGRID_RAW}:
        # Header lines of these names are fields too, and come after them.
        recipient = forms.decoded(form.first("recipient") or b"")
        return Envelope(forms.decoded(form.first("sender") or b""), [recipient] if recipient else [])
    try:
        told = json_of(form.first("envelope") or b"{}")
    except Refused:
        told = {}
    members = told if isinstance(told, dict) else {}
    sender, recipients = members.get("from"), members.get("to")
    return Envelope(
        sender if isinstance(sender, str) else "",
        [one for one in recipients if isinstance(one, str)] if isinstance(recipients, list) else [],
    )


def raw_envelope(arrival: Arrival) -> Envelope:
    """Return the envelope in the headers of a request whose body is a mail; raises `Refused` for one given twice."""
    recipients = (arrival.headers.one(RECIPIENT_HEADER) or "").split(",")
    sender = (arrival.headers.one(SENDER_HEADER) or "").strip().removeprefix("<").removesuffix(">")
    return Envelope(sender, [one.strip() for one in recipients if one.strip()])


def mail_key(arrival: Arrival, kind: MailKind) -> str | None:
    """Return the key that deduplicates a mail, None where it has none; raises `Refused`.

    Digests the Message-ID, the recipients of the envelope and the decoded content. So a mail that is repeated is the
    same one, newly signed or encoded or not, and another content under the same Message-ID is another mail.
    """
    match kind:
        case MailKind.MAILGUN_EVENT:
            return None
        case MailKind.SNS:
            mail = ses.received(sns.parse(arrival))
            return None if mail is None else _ses_key(mail)
        case MailKind.NATIVE:
            return _native_key(arrival.json if arrival.body else {})
        case MailKind.RAW:
            arrival.require_patience()
            return _raw_key(arrival.body, raw_envelope(arrival).recipients)
    form = fields(arrival)
    arrival.require_patience()
    content = _content_digest(form, kind)
    return delivery_keys.of("mail", _message_id(form, kind) or "", content, *envelope(form, kind).recipients)


def _kind_of_form(form: Form) -> MailKind:
    if all(name in form for name in _MAILGUN_SIGNATURE):
        if "body-mime" in form:
            return MailKind.MAILGUN_RAW
        return MailKind.MAILGUN_STORED if "message-url" in form else MailKind.MAILGUN_PARSED
    if "envelope" in form:
        if "email" in form:
            return MailKind.SENDGRID_RAW
        if "headers" in form:
            return MailKind.SENDGRID_PARSED
    raise Refused("unknown-mail", "The form has the fields of neither SendGrid nor Mailgun")


def _kind_of_json(body: Json) -> MailKind:
    if isinstance(body, dict):
        if "event-data" in body and "signature" in body:
            return MailKind.MAILGUN_EVENT
        if {"Type", "MessageId", "TopicArn", "Signature"} <= body.keys():
            return MailKind.SNS
    return MailKind.NATIVE


def _raw_key(raw: bytes, recipients: Sequence[str]) -> str:
    try:
        content = mail_parsing.parse_mail(raw, _drop_attachment).content_digest
    except InvalidMail:
        content = sha256(raw).hexdigest()
    return delivery_keys.of("mail", message_id_in(memoryview(raw)) or "", content, *recipients)


def _ses_key(mail: ReceivedMail) -> str:
    """Return the key of a mail of Amazon SES, which gives the same mail another id each time that it arrives.

    The content of a stored mail is not at hand: its headers take the place, where they prove what it is.
    """
    if mail.content is not None:
        return _raw_key(mail.content, mail.recipients)
    proven = mail.proven_headers
    if proven is None:
        return delivery_keys.of("ses", mail.mail_id)
    return delivery_keys.of("stored-mail", *proven, *mail.recipients)


def _native_key(body: Json) -> str | None:
    """Return the key of a mail whose caller gives its Message-ID; two without one are two."""
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
    return delivery_keys.of(
        "mail", message_id.strip(), content, recipient if isinstance(recipient, str) else ""
    )


def _message_id(form: Form, kind: MailKind) -> str | None:
    match kind:
        case MailKind.SENDGRID_PARSED:
            return message_id_in(form.first("headers") or memoryview(b""))
        case MailKind.SENDGRID_RAW:
            return message_id_in(form.first("email") or memoryview(b""))
        case _:
            return (form.text_of_header("Message-Id") or "").strip() or None


def message_id_in(mail: memoryview) -> str | None:
    """Return the Message-ID in the header of a raw mail, or None."""
    head = bytes(mail[:MAX_HEADER_BYTES])
    end = _HEADER_END.search(head)
    found = _MESSAGE_ID.search(head, 0, end.start() if end else len(head))
    return None if found is None else "".join(forms.decoded(found[1]).split()) or None


def _content_digest(form: Form, kind: MailKind) -> str:
    """Return a digest of the decoded mail; of the whole form where the mail can't be decoded."""
    try:
        mail, _ = mail_forms.read_form(form, kind, _drop_attachment)
    except InvalidMail:
        return _form_digest(form)
    return mail.content_digest


def _drop_attachment(_label: AttachmentLabel, pieces: Iterator[bytes]) -> None:
    """Keep nothing: the mail counts and digests the content on its way."""


def _form_digest(form: Form) -> str:
    """Return a digest of all parts but those that are new each time that a mail is sent."""
    digest = sha256()
    for piece in _pieces(form):
        digest.update(b"%d:" % len(piece))
        digest.update(piece)
    return digest.hexdigest()


def _pieces(form: Form) -> Iterator[bytes | memoryview]:
    for part in form.parts:
        if part.name not in _MAILGUN_SIGNATURE:
            yield part.name.encode()
            yield part.value
