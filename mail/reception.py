"""Facts that a mail service reports about a mail that it received, in one shape for all services.

Each service has its own words for the results of SPF, DKIM, DMARC, spam and virus checks. Here they are `pass`, `fail`,
`softfail`, `neutral`, `none`, `gray` and the like, in lower case; None where the service reports nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, Final

from mail import charsets

if TYPE_CHECKING:
    from mail.mail_content import ParsedMailContent
    from mail.mail_form import MailForm

PASS_RESULT: Final = "pass"  # noqa: S105 - a result, no password
FAIL_RESULT: Final = "fail"
_WORD: Final = re.compile(r"[a-z_]{1,30}")
_DKIM_RESULT: Final = re.compile(r":\s*([A-Za-z_]{1,30})")
_REQUIRED_SCORE: Final = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,6})?) required")
_MAX_FIELD_CHARACTERS: Final = 10_000


@dataclass(frozen=True, slots=True)
class MailReception:
    """Reception report of a mail: the results of checks and the envelope, as its service reports them."""

    spf: str | None = None
    dkim: str | None = None
    dmarc: str | None = None
    spam: str | None = None
    spam_score: float | None = None
    virus: str | None = None
    envelope_from: str = ""
    envelope_to: Sequence[str] = ()
    sender_ip: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the fields that an e-mail trigger adds to those of the mail."""
        return {
            "authentication": {"spf": self.spf, "dkim": self.dkim, "dmarc": self.dmarc},
            "spam": {"score": self.spam_score, "verdict": self.spam},
            "virus": self.virus,
            "envelope": {"from": self.envelope_from, "to": list(self.envelope_to)},
            "senderIp": self.sender_ip,
        }

    def failed_check(self, checks: Collection[str]) -> str | None:
        """Return the first of these checks (`spf`, `dkim`, `dmarc`, `spam`, `virus`) that the mail has failed."""
        results = {
            "spf": self.spf,
            "dkim": self.dkim,
            "dmarc": self.dmarc,
            "spam": self.spam,
            "virus": self.virus,
        }
        return next(
            (check for check, result in results.items() if check in checks and result == FAIL_RESULT), None
        )


def parse_sendgrid_reception(form: MailForm) -> MailReception:
    """Return the report in a form of SendGrid's Inbound Parse; raw mails have the same fields."""
    score = _parse_number(_form_field(form, "spam_score"))
    required = _REQUIRED_SCORE.search(_form_field(form, "spam_report"))
    spam = None
    if score is not None and required is not None:
        spam = FAIL_RESULT if score >= float(required[1]) else PASS_RESULT
    return MailReception(
        spf=_parse_result(_form_field(form, "SPF")),
        dkim=_parse_sendgrid_dkim(_form_field(form, "dkim")),
        spam=spam,
        spam_score=score,
        sender_ip=_parse_address(_form_field(form, "sender_ip")),
    )


def parse_mailgun_reception(mail: ParsedMailContent) -> MailReception:
    """Return the report in the headers that Mailgun adds to a mail, raw or parsed.

    The sender may have written a header of the same name: then the worst result counts.
    """
    headers = {name.lower(): value for name, value in mail.email_headers.items()}

    def values(name: str) -> Sequence[str]:
        value = headers.get(name, [])
        return [value] if isinstance(value, str) else value

    flags = {"yes": FAIL_RESULT, "no": PASS_RESULT}
    scores = [score for each in values("x-mailgun-sscore") if (score := _parse_number(each)) is not None]
    return MailReception(
        spf=_worst_result(map(_parse_result, values("x-mailgun-spf"))),
        dkim=_worst_result(map(_parse_result, values("x-mailgun-dkim-check-result"))),
        spam=_worst_result(flags.get(each.strip().lower()) for each in values("x-mailgun-sflag")),
        spam_score=max(scores, default=None),
    )


def parse_ses_reception(verdicts: Mapping[str, str]) -> MailReception:
    """Return the report in a notification of Amazon SES: `PASS`, `FAIL`, `GRAY`, `PROCESSING_FAILED` or `DISABLED`."""
    results = {name: _parse_result(verdict) for name, verdict in verdicts.items()}
    return MailReception(
        spf=results.get("spf"),
        dkim=results.get("dkim"),
        dmarc=results.get("dmarc"),
        spam=results.get("spam"),
        virus=results.get("virus"),
    )


def add_envelope(reception: MailReception, sender: str, recipients: Sequence[str]) -> MailReception:
    """Return a copy with the addresses of the SMTP envelope."""
    return replace(reception, envelope_from=sender, envelope_to=tuple(recipients))


def _worst_result(results: Iterable[str | None]) -> str | None:
    """Return `fail` if it is among the results, else the result that all have in common, else None."""
    found = set(results)
    if FAIL_RESULT in found:
        return FAIL_RESULT
    return found.pop() if len(found) == 1 else None


def _parse_sendgrid_dkim(text: str) -> str | None:
    """Return the result for `{@example.org : pass, @example.net : fail}`: one valid signature suffices (RFC 6376)."""
    results = [each.lower() for each in _DKIM_RESULT.findall(text)]
    return PASS_RESULT if PASS_RESULT in results else next(iter(results), _parse_result(text))


def _form_field(form: MailForm, name: str) -> str:
    return charsets.decode_text(bytes(form.first(name)[:_MAX_FIELD_CHARACTERS])).strip()


def _parse_result(text: str) -> str | None:
    found = _WORD.match(text.strip().lower())
    return found[0] if found else None


def _parse_number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _parse_address(text: str) -> str | None:
    try:
        return str(ip_address(text))
    except ValueError:
        return None
