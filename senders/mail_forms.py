"""Mails in the forms that SendGrid and Mailgun post: from the fields of a form to a mail."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mail import form as mail_form
from mail import forms, reception

if TYPE_CHECKING:
    from mail.message import Keep, Mail
    from mail.reception import Reception
    from senders.forms import Form

SENDGRID: Final = frozenset({"sendgrid-parsed", "sendgrid-raw"})
"""Values of `MailKind`; the other forms are Mailgun's."""


def read_form(form: Form, kind: str, keep: Keep) -> tuple[Mail, Reception]:
    """Return the mail in a form and what the service reports about it; attachments are handed out on the way.

    Raises `InvalidMail`, and `Refused` for a value that can't be unescaped.
    """
    given = _to_mail_form(form)
    if kind in SENDGRID:
        return forms.sendgrid(given, keep), reception.of_sendgrid(given)
    mail = forms.mailgun(given, keep)
    return mail, reception.of_mailgun(mail)


def _to_mail_form(form: Form) -> mail_form.Form:
    fields = {name: [part.value for part in parts] for name, parts in form.fields.items()}
    files = [
        mail_form.File(part.name, part.filename or "", part.content_type or "", part.value)
        for part in form.files
    ]
    return mail_form.Form(fields, files)
