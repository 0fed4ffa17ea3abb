"""A mail as it was handed in becomes what an e-mail trigger gives; all of it computes, and belongs into a thread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from mail import forms, headers, reading, writing
from mail.form import File, Form
from mail.limits import InvalidMail
from senders import forms as sent_forms
from senders import media_types
from senders.mail_kinds import MailKind
from senders.refusals import Refused

if TYPE_CHECKING:
    from journal.unread import Unread
    from mail.message import Keep, Mail

_SENDGRID: Final = frozenset({MailKind.SENDGRID_PARSED, MailKind.SENDGRID_RAW})
_ANSWERED: Final = ("in-reply-to", "references")


def read(unread: Unread, contents: list[bytes], keep: Keep) -> Mail:
    """Return the mail that a content is, and hand out its attachments on the way; raises `InvalidMail`.

    The content is taken out of `contents`: what a urlencoded form holds is as large again, and takes its place.
    """
    if not unread.content_type:
        return reading.read(contents.pop(), keep)
    form = _form(unread.content_type, contents.pop())
    if unread.kind in _SENDGRID:
        return forms.sendgrid(form, keep)
    return forms.mailgun(form, keep)


def trigger_of(mail: Mail, references: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the trigger node gives, with the references to the attachments that were handed out, in order."""
    left = iter(references)
    attachments = []
    for attachment in mail.attachments:
        # One that is still with the mail service was not handed out, and has its address in the place of a content.
        blob = {"blob": next(left)} if attachment.sha256 else {}
        attachments.append({**attachment.as_json(), **blob})
    return mail.as_json(attachments)


def is_automatic_reply(mail: Mail) -> bool:
    """Tell whether a mail answers another without anybody having written it."""
    told = headers.parameters(_header(mail, "auto-submitted"))[0]
    return told == "auto-replied"


def answers_ours(mail: Mail) -> bool:
    """Tell whether a mail answers one that a workflow has sent."""
    named = " ".join(_header(mail, name) for name in _ANSWERED)
    return any(writing.is_ours(one) for one in named.split())


def _header(mail: Mail, name: str) -> str:
    values = next((value for each, value in mail.email_headers.items() if each.lower() == name), "")
    return values if isinstance(values, str) else " ".join(values)


def _form(content_type: str, content: bytes) -> Form:
    try:
        found = sent_forms.parse(media_types.parse(content_type), content)
        fields = {name: [part.value for part in parts] for name, parts in found.fields.items()}
        files = [
            File(part.name, part.filename or "", part.content_type or "", part.value) for part in found.files
        ]
    except Refused as error:
        raise InvalidMail(error.message) from error
    return Form(fields, files)
