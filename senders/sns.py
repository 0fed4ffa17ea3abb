"""Amazon SNS: messages in JSON with a signature and the URL of the certificate that verifies it.

The signature proves that SNS has sent a message, for any of its customers; the topic identifies the customer.
"""

from __future__ import annotations

import re
from base64 import b64decode
from collections.abc import Collection
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

from msgspec import Struct

from engine.values import Json
from senders import signatures
from senders.request_refusal import RequestRefused
from senders.sender_request import SenderRequest
from senders.signatures import SignatureResult

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

TYPE_HEADER: Final = "x-amz-sns-message-type"
RAW_HEADER: Final = "x-amz-sns-rawdelivery"

TOLERANCE: Final = timedelta(minutes=75)
"""SNS repeats a message for an hour at most, with its first time and signature."""
MAX_BYTES: Final = 2_000_000
"""A message has up to 256 KiB; escapes of JSON can multiply that."""
MIN_KEY_BITS: Final = 2_048

_DOMAINS: Final = {"aws": "amazonaws.com", "aws-us-gov": "amazonaws.com", "aws-cn": "amazonaws.com.cn"}
# A region has digits only at its end: otherwise `s3-us-west-2` would match, and its host is anybody's bucket.
_TOPIC_ARN: Final = re.compile(
    r"arn:(aws|aws-us-gov|aws-cn):sns:([a-z]{2}(?:-[a-z]+)+-[0-9]{1,2}):[0-9]{12}:[A-Za-z0-9_-]{1,256}"
)
_MESSAGE_ID: Final = re.compile(r"[A-Za-z0-9-]{1,100}")
_TOKEN: Final = re.compile(r"[A-Za-z0-9]{1,2000}")
_TIMESTAMP: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,6})?Z")
_LINE: Final = re.compile(r"[^\r\n]{1,4000}")


class SnsMessageType(StrEnum):
    """Purpose of a message."""

    NOTIFICATION = "Notification"
    SUBSCRIPTION = "SubscriptionConfirmation"
    UNSUBSCRIPTION = "UnsubscribeConfirmation"


class SnsMessage(Struct, frozen=True):
    """Well-formed message of SNS; its signature is not verified yet."""

    type: SnsMessageType
    message_id: str
    topic_arn: str
    host: str
    """Host of SNS in the region of the topic."""
    message: str
    timestamp: str
    sent_at: datetime
    signature_version: str
    signature: str
    signing_cert_url: str
    subject: str | None = None
    token: str | None = None
    subscribe_url: str | None = None


def parse_sns_message(request: SenderRequest) -> SnsMessage:
    """Parse the message of Amazon SNS in a request of any media type; nothing is verified yet.

    At most 2,000,000 bytes. Raises `RequestRefused` for a larger or malformed message, and for a raw
    delivery, which has no signature.
    """
    if request.headers.values(RAW_HEADER):
        raise RequestRefused("raw-delivery", "The subscription uses raw delivery, which has no signature")
    if len(request.body) > MAX_BYTES:
        raise RequestRefused("too-large", f"A message of SNS has at most {MAX_BYTES:,} bytes")
    members = request.json
    if not isinstance(members, dict):
        raise _refuse_message("it is not a JSON object")
    topic_arn, host = _parse_topic(members)
    timestamp, sent_at = _parse_time(members)
    kind = _parse_type(members, request.headers.single(TYPE_HEADER))
    is_notification = kind is SnsMessageType.NOTIFICATION
    return SnsMessage(
        type=kind,
        message_id=_text_member(members, "MessageId", _MESSAGE_ID),
        topic_arn=topic_arn,
        host=host,
        message=_text_member(members, "Message"),
        timestamp=timestamp,
        sent_at=sent_at,
        signature_version=_text_member(members, "SignatureVersion", _LINE),
        signature=_text_member(members, "Signature", _LINE),
        signing_cert_url=_text_member(members, "SigningCertURL", _LINE),
        subject=_text_member(members, "Subject", _LINE)
        if is_notification and _has_member(members, "Subject")
        else None,
        token=None if is_notification else _text_member(members, "Token", _TOKEN),
        subscribe_url=None if is_notification else _text_member(members, "SubscribeURL", _LINE),
    )


def require_topic(message: SnsMessage, topics: Collection[str]) -> None:
    """Require the message's topic to be one of these ARNs, before its certificate is fetched.

    Raises `RequestRefused`; no topics means that every message is refused.
    """
    if message.topic_arn not in topics:
        raise RequestRefused("unknown-topic", "The message is of a topic that is not configured")


def signing_certificate_url(message: SnsMessage) -> str:
    """Return the URL of the message's signing certificate, to be fetched without redirects.

    Raises `RequestRefused` unless it is at SNS's host in the region of the topic, with the usual file name.
    """
    allowed = rf"https://{re.escape(message.host)}/SimpleNotificationService-[0-9a-f]{{32}}\.pem"
    if not re.fullmatch(allowed, message.signing_cert_url):
        raise RequestRefused(
            "untrusted-certificate", "The certificate of the message is not at the address of SNS"
        )
    return message.signing_cert_url


def verify(
    message: SnsMessage, certificate_pem: bytes, topics: Collection[str], now: datetime
) -> SignatureResult:
    """Verify the topic, the age (at most 75 minutes), the certificate and the RSA signature of a message.

    `certificate_pem` is the content of `signing_certificate_url`. Returns the deduplication key made from the
    message id. Raises `RequestRefused` for the first check that fails; the certificate must be valid at `now`
    and its key have 2,048 bits or more.
    """
    from senders import public_keys  # noqa: PLC0415 - loads cryptography

    require_topic(message, topics)
    signing_certificate_url(message)
    # Version 1 is the default of a topic. Two messages with the same SHA-1 digest can only be made by a publisher of
    # the topic, who could have sent either.
    digests = {"1": public_keys.RsaDigest.SHA1, "2": public_keys.RsaDigest.SHA256}
    digest = digests.get(message.signature_version)
    if digest is None:
        raise RequestRefused("invalid-signature", "The version of the signature is neither 1 nor 2")
    signatures.require_recent(message.sent_at.timestamp(), now, past=TOLERANCE)
    key = _certificate_key(certificate_pem, now)
    try:
        signature = b64decode(message.signature, validate=True)
    except ValueError as error:
        raise signatures.invalid_signature() from error
    if not public_keys.is_rsa_signed(key, signature, _build_signed_text(message), digest):
        raise signatures.invalid_signature()
    return SignatureResult(signatures.delivery_key("sns", message.message_id))


def confirmation_url(message: SnsMessage) -> str:
    """Return the URL that confirms the subscription of a verified message when it is fetched; nothing is
    fetched here.

    The URL is built from topic and token; the `SubscribeURL` of the message is never visited. Raises
    `RequestRefused` for a message of another type.
    """
    if message.type is not SnsMessageType.SUBSCRIPTION or message.token is None:
        raise _refuse_message("it is not a subscription confirmation")
    topic = quote(message.topic_arn, safe=":")
    return f"https://{message.host}/?Action=ConfirmSubscription&TopicArn={topic}&Token={message.token}"


# ── format ──────────────────────────────────────────────────────────────────────────────────────────────────


def _parse_type(members: dict[str, Json], header: str | None) -> SnsMessageType:
    """Return the type of a message; raises `RequestRefused` for an unknown one, and if a type header differs
    from it.

    `header` is None if the request has none.
    """
    text = _text_member(members, "Type")
    if header is not None and header != text:
        raise _refuse_message("its header and its body have different types")
    try:
        return SnsMessageType(text)
    except ValueError as error:
        raise _refuse_message("its Type is unknown") from error


def _parse_topic(members: dict[str, Json]) -> tuple[str, str]:
    """Return the topic's ARN and the host name of SNS in the topic's region; raises `RequestRefused` for an
    invalid ARN.
    """
    arn = _text_member(members, "TopicArn")
    parts = _TOPIC_ARN.fullmatch(arn)
    if parts is None:
        raise _refuse_message("its TopicArn is invalid")
    partition, region = parts.groups()
    return arn, f"sns.{region}.{_DOMAINS[partition]}"


def _parse_time(members: dict[str, Json]) -> tuple[str, datetime]:
    """Return the timestamp as it is written, and parsed; raises `RequestRefused` for an invalid one."""
    text = _text_member(members, "Timestamp", _TIMESTAMP)
    try:
        return text, datetime.fromisoformat(text)
    except ValueError as error:
        raise _refuse_message("its Timestamp is invalid") from error


def _has_member(members: dict[str, Json], name: str) -> bool:
    """Return whether a message has this member with a value other than null."""
    return members.get(name) is not None


def _text_member(members: dict[str, Json], name: str, pattern: re.Pattern[str] | None = None) -> str:
    """Return a required text member, which must match the whole `pattern`; None allows any text.

    Raises `RequestRefused` otherwise. Patterns exclude line ends, which would forge lines of the signed text.
    """
    value = members.get(name)
    if not isinstance(value, str):
        raise _refuse_message(f"it has no text {name}")
    if pattern is not None and not pattern.fullmatch(value):
        raise _refuse_message(f"its {name} is invalid")
    return value


def _refuse_message(reason: str) -> RequestRefused:
    return RequestRefused("malformed-message", f"The message is not a valid SNS message: {reason}")


# ── signature ───────────────────────────────────────────────────────────────────────────────────────────────


def _build_signed_text(message: SnsMessage) -> bytes:
    """Return the bytes that SNS has signed: a line for each name and value, in alphabetical order; None
    values are left out.
    """
    members = {
        "Message": message.message,
        "MessageId": message.message_id,
        "Subject": message.subject,
        "SubscribeURL": message.subscribe_url,
        "Timestamp": message.timestamp,
        "Token": message.token,
        "TopicArn": message.topic_arn,
        "Type": message.type.value,
    }
    return "".join(f"{name}\n{value}\n" for name, value in members.items() if value is not None).encode()


def _certificate_key(certificate_pem: bytes, now: datetime) -> RSAPublicKey:
    """Return the RSA key of a PEM certificate that is valid at `now`.

    Raises `RequestRefused` for an unreadable, expired or future certificate, and for a key that is not RSA or
    has fewer than 2,048 bits.
    """
    from senders import public_keys  # noqa: PLC0415 - loads cryptography

    try:
        certificate = public_keys.read_certificate(certificate_pem)
    except ValueError as error:
        raise _invalid_certificate_error("it can't be read") from error
    if not certificate.starts_at <= now <= certificate.ends_at:
        raise _invalid_certificate_error("it is not valid at this time")
    key = certificate.rsa_key
    if key is None or key.key_size < MIN_KEY_BITS:
        raise _invalid_certificate_error(f"its key is not an RSA key of {MIN_KEY_BITS:,} bits or more")
    return key


def _invalid_certificate_error(reason: str) -> RequestRefused:
    return RequestRefused("invalid-certificate", f"The certificate of the message can't be used: {reason}")
