"""Conversion of an inbound mail into the output of an email trigger. It is CPU work and belongs into a thread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from mail import composition, headers, mail_parsing, service_forms
from mail.mail_limits import InvalidMail
from senders import mail_kinds, posted_forms
from senders import posted_forms as sent_forms
from senders.request_refusal import RequestRefused

if TYPE_CHECKING:
    from journal.unparsed_mail import ScreeningRules, UnparsedMail
    from mail.mail_content import KeepAttachment, ParsedMailContent
    from mail.service_forms import MailReception

_AUTOMATIC_REPORTS: Final = frozenset({"delivery-status", "disposition-notification"})
_REPLY_HEADERS: Final = ("in-reply-to", "references")


def parse_mail(
    unread: UnparsedMail, contents: list[bytes], keep: KeepAttachment
) -> tuple[ParsedMailContent, MailReception]:
    """Return the parsed mail and its reception; pass attachments to `keep`. Raises `InvalidMail`.

    The content is removed from `contents`, since the decoded fields of a urlencoded form are as large again.
    """
    if not unread.content_type:
        mail, received = (
            mail_parsing.parse_mail(contents.pop(), keep),
            service_forms.parse_ses_reception(unread.verdicts),
        )
    else:
        try:
            form = sent_forms.parse_form(posted_forms.parse_media_type(unread.content_type), contents.pop())
            mail, received = mail_kinds.parse_mail_form(form, unread.kind, keep)
        except RequestRefused as error:
            raise InvalidMail(error.message) from error
    return mail, service_forms.add_envelope(received, unread.sender, unread.recipients)


def build_trigger(
    mail: ParsedMailContent, received: MailReception, references: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the output of the trigger node, with the references to the stored attachments in their order."""
    left = iter(references)
    attachments = []
    for attachment in mail.attachments:
        # An attachment that is still at the mail service was not stored, and has a URL instead of a content.
        blob = {"blob": next(left)} if attachment.sha256 else {}
        attachments.append({**attachment.as_json(), **blob})
    return {**mail.as_json(attachments), **received.as_json()}


def rejection_reason(received: MailReception, screening: ScreeningRules | None) -> str | None:
    """Return why the trigger's rules reject a mail; None if they accept it."""
    if screening is None:
        return None
    if (check := received.failed_check(screening.reject_on)) is not None:
        return f"The mail service reports that the mail failed its {check} check, which `rejectOn` names"
    score, most = received.spam_score, screening.max_spam_score
    if score is not None and most is not None and score > most:
        return f"The mail service gives the mail a spam score of {score:g}, above `maxSpamScore` {most:g}"
    return None


def is_automatic(mail: ParsedMailContent) -> bool:
    """Return whether a mail is an automatic reply (RFC 3834), a bounce or a receipt (RFC 6522)."""
    submitted = headers.parse_parameters(_first_header(mail, "auto-submitted"))[0]
    content_type, parameters = headers.parse_parameters(_first_header(mail, "content-type"))
    reports = parameters.get("report-type", "").lower()
    return submitted == "auto-replied" or (
        content_type == "multipart/report" and reports in _AUTOMATIC_REPORTS
    )


def is_reply_to_workflow(mail: ParsedMailContent) -> bool:
    """Return whether a mail answers a mail of a workflow."""
    named = " ".join(_first_header(mail, name) for name in _REPLY_HEADERS)
    return any(composition.is_workflow_mail(one) for one in named.split())


def _first_header(mail: ParsedMailContent, name: str) -> str:
    values = next((value for each, value in mail.email_headers.items() if each.lower() == name), "")
    return values if isinstance(values, str) else " ".join(values)
