"""Forms of SendGrid and Mailgun: the mail in them, raw or parsed by the service, and its reception report.

Each service has its own words for the results of SPF, DKIM, DMARC, spam and virus checks. Here they are `pass`, `fail`,
`softfail`, `neutral`, `none`, `gray` and the like, in lower case; None where the service reports nothing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct, field
from msgspec.structs import replace

from json_text import decoding, pieces
from mail import content_decoding, headers, mail_content, mail_parsing
from mail.mail_content import AttachmentLabel, KeepAttachment, MailAttachment, ParsedMailContent
from mail.mail_limits import DEFAULT_LIMITS, MailLimits
from mail.mail_parsing import AttachmentCollector

if TYPE_CHECKING:
    from mail.content_decoding import Raw
    from mail.mail_content import ParsedMailContent


_NUMBER: Final = re.compile(r"attachment-?([0-9]{1,6})")
_UNNUMBERED: Final = 1_000_000
_HALF: Final = re.compile(r"[\x00\ud800-\udfff]")
_MAX_URL_CHARACTERS: Final = 2_000


def parse_sendgrid_form(
    form: MailForm, keep_attachment: KeepAttachment, limits: MailLimits = DEFAULT_LIMITS
) -> ParsedMailContent:
    """Return the mail in a form of SendGrid's Inbound Parse, in its raw or its parsed format.

    `keep_attachment` is called with each attachment. Raises `InvalidMail` for headers or attachments with too many
    bytes; those beyond the maximum numbers are left out, and counted in `truncated`. Malformed fields count as empty.
    """
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
        truncated=mail_parsing.count_omissions(attachments=kept.omitted),
    )


def parse_mailgun_form(
    form: MailForm, keep_attachment: KeepAttachment, limits: MailLimits = DEFAULT_LIMITS
) -> ParsedMailContent:
    """Return the mail in a form of a Mailgun route: `forward()`, raw or parsed, or `store()`.

    `keep_attachment` is called with each attachment in the form; those that Mailgun stores get a URL instead
    of a content. Raises `InvalidMail` for attachments or raw headers with too many bytes; what exceeds the maximum
    numbers is left out, and counted in `truncated`.
    """
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
        attachments=[*kept.found, *_iterate_stored_attachments(form)],
        truncated=mail_parsing.count_omissions(attachments=kept.omitted),
    )


# ── attachments ─────────────────────────────────────────────────────────────────────────────────────────────


def _keep_attachments(
    form: MailForm, label: Callable[[FormFile], AttachmentLabel], keep: KeepAttachment, limits: MailLimits
) -> AttachmentCollector:
    """Pass the files of a form to `keep` in the order of their numbers; return the collector that measured them.

    They are posted in any order, before and between the fields. `label` gives the attributes of each file.
    Raises `InvalidMail` for too many bytes; files beyond the maximum number are only counted in `omitted`.
    """
    kept = mail_parsing.AttachmentCollector(keep, limits)
    for file in sorted(form.files, key=_attachment_number):
        kept.add(label(file), content_decoding.iterate_pieces(file.content, 0, len(file.content)))
    return kept


def _attachment_number(file: FormFile) -> int:
    """Return the number in the field name of a file, such as 2 for `attachment-2`; a million without one."""
    found = _NUMBER.fullmatch(file.field)
    return int(found[1]) if found else _UNNUMBERED


def _attachment_label(file: FormFile, described: dict[str, Any], content_id: str) -> AttachmentLabel:
    """Return the attributes of a file: those in `described`, which the service gives, and else those of the form.

    `content_id` is used if `described` has none.
    """
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


def _iterate_stored_attachments(form: MailForm) -> Iterator[MailAttachment]:
    """Yield the attachments that Mailgun stores, with URLs for which the key of the account is needed.

    Malformed entries are left out; a URL that is not HTTPS or has over 2,000 characters becomes empty.
    """
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
    """Return the headers of a mail from Mailgun's field `message-headers`, a JSON list of pairs; malformed
    pairs are left out.
    """
    pairs = [each for each in _list_field(form, "message-headers") if isinstance(each, list)]
    named = [(_to_text(each[0]), _to_text(each[1])) for each in pairs if len(each) > 1 and each[0]]
    return headers.headers_of_pairs(named, limits)


def _decode_field(form: MailForm, name: str, charset: str) -> str:
    r"""Return the decoded text of a field with line ends as `\n`, empty without the field."""
    raw = form.first(name)
    return mail_parsing.decode_body(content_decoding.iterate_pieces(raw, 0, len(raw)), charset)


def _object_field(form: MailForm, name: str) -> dict[str, Any]:
    """Return the JSON object of a field; empty if it is missing or anything else."""
    found = _json_field(form, name)
    return found if isinstance(found, dict) else {}


def _list_field(form: MailForm, name: str) -> list[Any]:
    """Return the JSON list of a field; empty if it is missing or anything else."""
    found = _json_field(form, name)
    return found if isinstance(found, list) else []


def _json_field(form: MailForm, name: str) -> object:
    """Return the JSON value of a field; None if it is missing or invalid, since the mail is usable without it."""
    text = content_decoding.decode_text(bytes(form.first(name)), "utf-8")
    try:
        if len(text) > pieces.LONG_BYTES:
            return pieces.decode_in_pieces(text.encode(), decoding.decode)
        # `json.loads` accepts half a surrogate pair, unlike the project's decoder; one is no reason to lose the field.
        return json.loads(text)  # noqa: TID251 - takes half a surrogate pair
    except (ValueError, RecursionError):
        return None


def _invert_mapping(names: dict[str, Any]) -> dict[str, str]:
    """Return the mapping with keys and values exchanged; values that are no texts are left out."""
    return {value: name for name, value in names.items() if isinstance(value, str)}


def _to_text(value: object) -> str:
    """Return a text, with NUL and half surrogate pairs as U+FFFD; an empty text for any other value."""
    return _HALF.sub("\ufffd", value) if isinstance(value, str) else ""


# ── posted forms ────────────────────────────────────────────────────────────────────────────────────────────


class FormFile(Struct, frozen=True):
    """Part of a form with a file name."""

    field: str
    filename: str
    content_type: str
    content: Raw


class MailForm(Struct, frozen=True):
    fields: Mapping[str, Sequence[Raw]] = field(default_factory=dict)
    """Values in their order, by case-sensitive names: `from` and `From` are two fields."""
    files: Sequence[FormFile] = ()

    def first(self, name: str) -> Raw:
        """Return the first value of a field as bytes; empty without the field."""
        values = self.fields.get(name)
        return values[0] if values else b""


# ── reception reports ───────────────────────────────────────────────────────────────────────────────────────


PASS_RESULT: Final = "pass"  # noqa: S105 - a result, no password
FAIL_RESULT: Final = "fail"
_WORD: Final = re.compile(r"[a-z_]{1,30}")
_DKIM_RESULT: Final = re.compile(r":\s*([A-Za-z_]{1,30})")
_REQUIRED_SCORE: Final = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,6})?) required")
_MAX_FIELD_CHARACTERS: Final = 10_000


class MailReception(Struct, frozen=True):
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
        """Return the JSON that an e-mail trigger adds to the mail: results of SPF, DKIM and DMARC, spam, virus,
        envelope, and IP address of the sender; null for those without a report.
        """
        return {
            "authentication": {"spf": self.spf, "dkim": self.dkim, "dmarc": self.dmarc},
            "spam": {"score": self.spam_score, "verdict": self.spam},
            "virus": self.virus,
            "envelope": {"from": self.envelope_from, "to": list(self.envelope_to)},
            "senderIp": self.sender_ip,
        }

    def failed_check(self, checks: Collection[str]) -> str | None:
        """Return the first of these checks whose result is `fail`, in the order `spf`, `dkim`, `dmarc`, `spam`,
        `virus`.

        None if none failed; a check without a result counts as not failed.
        """
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
    """Return the service's report in a form of SendGrid's Inbound Parse, raw or parsed.

    The spam verdict compares the score with the one that SendGrid's report requires; None without both.
    """
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
    """Return the service's report in the headers that Mailgun adds to a mail, raw or parsed.

    The sender may have written a header of the same name: then `fail` counts if it is among the results, else different
    results give None; of spam scores the highest counts.
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
    """Return the report of Amazon SES from its verdicts by check, such as `{"spf": "PASS"}`.

    Missing verdicts and results other than a word count as None.
    """
    results = {name: _parse_result(verdict) for name, verdict in verdicts.items()}
    return MailReception(
        spf=results.get("spf"),
        dkim=results.get("dkim"),
        dmarc=results.get("dmarc"),
        spam=results.get("spam"),
        virus=results.get("virus"),
    )


def add_envelope(reception: MailReception, sender: str, recipients: Sequence[str]) -> MailReception:
    """Return a copy of a report with the sender and recipients of the SMTP envelope."""
    return replace(reception, envelope_from=sender, envelope_to=tuple(recipients))


def _worst_result(results: Iterable[str | None]) -> str | None:
    """Return `fail` if it is among the results, else the result that all have in common, else None."""
    found = set(results)
    if FAIL_RESULT in found:
        return FAIL_RESULT
    return found.pop() if len(found) == 1 else None


def _parse_sendgrid_dkim(text: str) -> str | None:
    """Return `pass` if a signature in `{@example.org : pass, @example.net : fail}` is valid (RFC 6376), else
    the first result.

    None without a result.
    """
    results = [each.lower() for each in _DKIM_RESULT.findall(text)]
    return PASS_RESULT if PASS_RESULT in results else next(iter(results), _parse_result(text))


def _form_field(form: MailForm, name: str) -> str:
    """Return the text of a field, at most 10,000 characters, stripped; empty without the field."""
    return content_decoding.decode_text(bytes(form.first(name)[:_MAX_FIELD_CHARACTERS])).strip()


def _parse_result(text: str) -> str | None:
    """Return the first word of a check's result in lower case, such as `pass`; None without one."""
    found = _WORD.match(text.strip().lower())
    return found[0] if found else None


def _parse_number(text: str) -> float | None:
    """Return a finite number; None for any other text."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _parse_address(text: str) -> str | None:
    """Return an IP address in its usual form; None for any other text."""
    try:
        return str(ip_address(text))
    except ValueError:
        return None


def build_trigger_output(
    mail: ParsedMailContent, received: MailReception, references: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the output of an e-mail trigger: the mail, its reception report, and a `blob` for each stored attachment.

    `references` are the references to the blobs, one for each attachment with a content, in order. An attachment that
    is still at the mail service has a URL instead.
    """
    left = iter(references)
    attachments = []
    for attachment in mail.attachments:
        # An attachment that is still at the mail service was not stored, and has a URL instead of a content.
        blob = {"blob": next(left)} if attachment.sha256 else {}
        attachments.append({**attachment.as_json(), **blob})
    return {**mail.as_json(attachments), **received.as_json()}
