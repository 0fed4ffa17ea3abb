"""Conversion of the forms that SendGrid and Mailgun post into mails."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mail import mail_form, reception, service_forms

if TYPE_CHECKING:
    from mail.mail_content import KeepAttachment, ParsedMailContent
    from mail.reception import MailReception
    from senders.posted_forms import PostedForm

SENDGRID_KINDS: Final = frozenset({"sendgrid-parsed", "sendgrid-raw"})
"""Values of `MailKind`; all other forms are Mailgun's."""


def parse_mail_form(
    form: PostedForm, kind: str, keep: KeepAttachment
) -> tuple[ParsedMailContent, MailReception]:
    """Return the mail in a form and the facts that the service reports about it.

    Calls `keep` for each attachment. Raises `InvalidMail`, and `RequestRefused` for a value with an invalid
    escape.
    """
    given = _to_mail_form(form)
    if kind in SENDGRID_KINDS:
        return service_forms.parse_sendgrid_form(given, keep), reception.parse_sendgrid_reception(given)
    mail = service_forms.parse_mailgun_form(given, keep)
    return mail, reception.parse_mailgun_reception(mail)


def _to_mail_form(form: PostedForm) -> mail_form.MailForm:
    fields = {name: [part.value for part in parts] for name, parts in form.fields.items()}
    files = [
        mail_form.FormFile(part.name, part.filename or "", part.content_type or "", part.value)
        for part in form.files
    ]
    return mail_form.MailForm(fields, files)
