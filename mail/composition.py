"""Composition of outgoing mails as bytes for a mail server: ASCII with CRLF line ends."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from email import policy
from email.headerregistry import Address
from email.message import EmailMessage
from email.utils import format_datetime
from hashlib import sha256
from typing import TYPE_CHECKING, Final

from msgspec import Struct, field

from mail import mail_content
from mail.mail_content import AttachmentLabel

if TYPE_CHECKING:
    from mail.headers import Mailbox

MESSAGE_ID_PREFIX: Final = "pilotflame."
"""Prefix of the Message-IDs of mails that workflows send."""
_POLICY: Final = policy.SMTP.clone(cte_type="7bit")
_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,76}")
_LEAF_TYPES: Final = ("application/", "audio/", "font/", "image/", "model/", "text/", "video/")
_MANAGED_HEADERS: Final = frozenset({
    "auto-submitted", "bcc", "cc", "date", "from", "message-id", "mime-version", "received", "reply-to",
    "return-path", "sender", "subject", "to",
})  # fmt: skip
_MANAGED_HEADER_PREFIXES: Final = ("arc-", "content-", "dkim-", "resent-")


class EnclosedFile(Struct, frozen=True):
    """Attachment or inline image of an outgoing mail."""

    label: AttachmentLabel
    """With a content id, the file is an inline part of the HTML; otherwise it is an attachment."""
    content: bytes


class OutgoingMail(Struct, frozen=True):
    sender: Mailbox
    message_id: str
    date: datetime
    to: Sequence[Mailbox] = ()
    cc: Sequence[Mailbox] = ()
    reply_to: Sequence[Mailbox] = ()
    subject: str = ""
    text: str = ""
    html: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Additional headers; those that other fields set are refused."""
    enclosed: Sequence[EnclosedFile] = ()


def make_message_id(key: str, domain: str) -> str:
    """Return a Message-ID derived from a key, so that the same mail, sent again, has the same id.

    The result is `<pilotflame.` followed by 32 hexadecimal digits and `@domain>`.
    """
    return f"<{MESSAGE_ID_PREFIX}{sha256(key.encode()).hexdigest()[:32]}@{domain}>"


def is_workflow_mail(message_id: str) -> bool:
    """Return whether a Message-ID says that a workflow sent the mail, of this server or of another Pilotflame."""
    return message_id.strip().removeprefix("<").startswith(MESSAGE_ID_PREFIX)


def check_header(name: str, value: str) -> None:
    """Raise `ValueError` for a header that a workflow may not set on an outgoing mail.

    Refused are malformed names, headers that the server sets itself, such as From and Content-Type, and
    values with line ends, which would inject another header, or other control characters.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name[:100]!r} is not a valid header name")
    if name.lower() in _MANAGED_HEADERS or name.lower().startswith(_MANAGED_HEADER_PREFIXES):
        raise ValueError(f"the header {name} can't be set here")
    check_line(value, f"the header {name}")


def check_line(text: str, what: str) -> None:
    """Raise `ValueError` for a text with line ends, which would add a header, or other control characters.

    `what` names the text in the message of the error.
    """
    if mail_content.CONTROL_CHARACTERS.search(text):
        raise ValueError(f"{what} holds a line end or another control character")


def compose_mail(mail: OutgoingMail) -> bytes:
    """Return an outgoing mail as the bytes of RFC 5322, with text, HTML and attachments.

    Sets Date, Message-ID and `Auto-Submitted: auto-generated`. Raises `ValueError` for headers that may not
    be set, and for control characters, such as line ends, in the subject or a header.
    """
    composed = EmailMessage(policy=_POLICY)
    composed["From"] = _to_address(mail.sender)
    for name, mailboxes in (("To", mail.to), ("Cc", mail.cc), ("Reply-To", mail.reply_to)):
        if mailboxes:
            composed[name] = [_to_address(each) for each in mailboxes]
    check_line(mail.subject, "the subject")
    composed["Subject"] = mail.subject
    composed["Date"] = format_datetime(mail.date)
    composed["Message-ID"] = mail.message_id
    composed["Auto-Submitted"] = "auto-generated"
    for name, value in mail.headers.items():
        check_header(name, value)
        composed[name] = value
    _set_body(composed, mail)
    return composed.as_bytes()


def _set_body(composed: EmailMessage, mail: OutgoingMail) -> None:
    """Add text, HTML and files of a mail to `composed`.

    Files with a Content-ID become inline parts of the HTML; others, and all without HTML, become attachments.
    """
    if mail.text or not mail.html:
        composed.set_content(mail.text)
    if mail.html and mail.text:
        composed.add_alternative(mail.html, subtype="html")
    elif mail.html:
        composed.set_content(mail.html, subtype="html")
    page = composed.get_body(("html",))
    for each in mail.enclosed:
        main, sub = _split_media_type(each.label)
        parameters = {"charset": each.label.charset} if each.label.charset and main == "text" else None
        if isinstance(page, EmailMessage) and each.label.content_id:
            page.add_related(
                each.content,
                main,
                sub,
                disposition="inline",
                filename=each.label.filename or None,
                cid=f"<{each.label.content_id}>",
                params=parameters,
            )
        else:
            composed.add_attachment(
                each.content, main, sub, filename=each.label.filename or None, params=parameters
            )


def _split_media_type(label: AttachmentLabel) -> tuple[str, str]:
    """Return main type and subtype for an attachment of an outgoing mail.

    Types such as `multipart/*` and `message/*` can't be in base64: they become `application/octet-stream`.
    """
    content_type = (
        label.content_type if label.content_type.startswith(_LEAF_TYPES) else mail_content.DEFAULT_TYPE
    )
    main, _, sub = content_type.partition("/")
    return main, sub


def _to_address(mailbox: Mailbox) -> Address:
    return Address(mailbox.name, mailbox.local, mailbox.domain)
