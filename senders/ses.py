"""Amazon SES: notifications on an SNS topic about received mails."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from msgspec import Struct

from engine.values import Json
from senders.request_refusal import RequestRefused
from senders.sender_request import parse_json
from senders.sns import SnsMessage, SnsMessageType

_NAMING_HEADERS: Final = ("message-id", "from", "subject", "date")
_VERDICTS: Final = ("spam", "virus", "spf", "dkim", "dmarc")


class SesStoredMail(Struct, frozen=True):
    """S3 object of a mail as SES reports it; compare bucket and prefix with the configured ones before a
    fetch.
    """

    bucket: str
    key: str
    prefix: str


class SesMail(Struct, frozen=True):
    """Mail that SES has received."""

    mail_id: str
    """Id that SES assigns to one reception of the mail; the same in each notification of it."""
    sender: str
    """Sender of the envelope; empty for automatic mails such as bounces."""
    recipients: Sequence[str]
    """Recipients of the envelope."""
    headers: Sequence[tuple[str, str]]
    """Headers in the order of the mail."""
    are_headers_truncated: bool
    common_headers: Mapping[str, Json]
    """`from`, `to`, `cc`, `subject`, `date`, `messageId` and others, decoded."""
    verdicts: Mapping[str, str]
    """`PASS`, `FAIL`, `GRAY` and others, of `spam`, `virus`, `spf`, `dkim` and `dmarc`."""
    content: bytes | None
    """The raw mail; None if it is stored in S3, or not available."""
    stored: SesStoredMail | None

    @property
    def proven_headers(self) -> Sequence[str] | None:
        """Headers that distinguish this mail from every other, in a fixed order; None if another could have the same.

        The DKIM body hashes (RFC 6376, `bh`) represent the content. They count only if SES has found a
        signature valid, and if each covers the whole body (no `l`). None also without a Message-ID, and if SES
        has truncated the headers.
        """
        if self.verdicts.get("dkim") != "PASS" or self.are_headers_truncated:
            return None
        found: dict[str, list[str]] = {}
        for name, value in self.headers:
            found.setdefault(name.lower(), []).append(" ".join(value.split()))
        tags = [dict(_parse_tags(signature)) for signature in found.get("dkim-signature", ())]
        if not found.get("message-id") or not tags or any("l" in each or "bh" not in each for each in tags):
            return None
        named = [value for name in _NAMING_HEADERS for value in [name, *found.get(name, ())]]
        return [*named, *sorted(each["bh"] for each in tags)]


def parse_ses_mail(message: SnsMessage) -> SesMail | None:
    """Return the mail of a verified SNS message; None for a message without a received mail.

    None for a subscription message, a plain text, a bounce or a complaint, which SES also publishes on a
    topic. Raises `RequestRefused` for a malformed mail.
    """
    if message.type is not SnsMessageType.NOTIFICATION:
        return None
    try:
        notification = parse_json(message.message.encode())
    except RequestRefused:
        return None
    if not isinstance(notification, dict) or notification.get("notificationType") != "Received":
        return None
    mail = _object_member(notification, "mail")
    receipt = _object_member(notification, "receipt")
    action = _object_member(receipt, "action")
    content = notification.get("content")
    return SesMail(
        mail_id=_text_member(mail, "messageId"),
        sender=_text_member(mail, "source", may_be_empty=True),
        recipients=_text_members(receipt, "recipients"),
        headers=_parse_headers(mail),
        are_headers_truncated=mail.get("headersTruncated") is True,
        common_headers=_object_member(mail, "commonHeaders"),
        verdicts=_parse_verdicts(receipt),
        content=None if content is None else _decode_content(_text_member(notification, "content"), action),
        stored=_parse_stored(action) if action.get("type") == "S3" else None,
    )


def _decode_content(text: str, action: Mapping[str, Json]) -> bytes:
    """Return the raw mail in `text`, decoded if the action's `encoding` is base64.

    Raises `RequestRefused` for invalid base64.
    """
    encoding = action.get("encoding")
    if not isinstance(encoding, str) or encoding.upper() != "BASE64":
        return text.encode()
    try:
        return b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        raise _refuse_notification("content is not in base64") from error


def _parse_stored(action: Mapping[str, Json]) -> SesStoredMail:
    """Return the S3 object in which SES has stored the mail; raises `RequestRefused` without bucket or key."""
    prefix = action.get("objectKeyPrefix")
    return SesStoredMail(
        _text_member(action, "bucketName"),
        _text_member(action, "objectKey"),
        prefix if isinstance(prefix, str) else "",
    )


def _parse_headers(mail: Mapping[str, Json]) -> Sequence[tuple[str, str]]:
    """Return names and values of the mail's headers in order; raises `RequestRefused` for a malformed list."""
    headers = mail.get("headers")
    if not isinstance(headers, list):
        raise _refuse_notification("headers is not a list")
    lines = [header for header in headers if isinstance(header, dict)]
    return [(_text_member(line, "name"), _text_member(line, "value", may_be_empty=True)) for line in lines]


def _parse_verdicts(receipt: Mapping[str, Json]) -> Mapping[str, str]:
    """Return SES's verdicts by name (spam, virus, spf, dkim, dmarc), such as "PASS"; missing ones are left out."""
    found = {}
    for name in _VERDICTS:
        verdict = receipt.get(f"{name}Verdict")
        status = verdict.get("status") if isinstance(verdict, dict) else None
        if isinstance(status, str):
            found[name] = status
    return found


def _parse_tags(signature: str) -> Iterator[tuple[str, str]]:
    """Yield name and value of the tags of a DKIM signature, without white space; tags without a value are skipped."""
    for tag in "".join(signature.split()).split(";"):
        name, _, value = tag.partition("=")
        if value:
            yield name, value


def _object_member(members: Mapping[str, Json], name: str) -> Mapping[str, Json]:
    """Return a member that is a JSON object; raises `RequestRefused` for a missing or other one."""
    value = members.get(name)
    if not isinstance(value, dict):
        raise _refuse_notification(f"{name} is not an object")
    return value


def _text_member(members: Mapping[str, Json], name: str, *, may_be_empty: bool = False) -> str:
    """Return a text member; raises `RequestRefused` if it is missing, no text, or empty without `may_be_empty`."""
    value = members.get(name)
    if not isinstance(value, str) or not (value or may_be_empty):
        raise _refuse_notification(f"{name} is not a text")
    return value


def _text_members(members: Mapping[str, Json], name: str) -> Sequence[str]:
    """Return a member that is a list of texts; raises `RequestRefused` for anything else."""
    values = members.get(name)
    if not isinstance(values, list):
        raise _refuse_notification(f"{name} is not a list")
    texts = [value for value in values if isinstance(value, str)]
    if len(texts) != len(values):
        raise _refuse_notification(f"{name} contains values other than texts")
    return texts


def _refuse_notification(reason: str) -> RequestRefused:
    return RequestRefused("malformed-mail", f"The notification of SES can't be read: {reason}")
