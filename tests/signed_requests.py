"""Requests as senders make them, signed now with keys of their own, for servers with a real clock.

Each maker takes a number. Requests of the same number are the same delivery; other numbers are other
deliveries.
"""

from __future__ import annotations

import hmac
import json
import time
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Final
from urllib.parse import urlencode
from uuid import NAMESPACE_URL, uuid5

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

if TYPE_CHECKING:
    from engine.values import Json

SECRET: Final = "a-secret-of-the-tests-that-senders-sign-with"
EVENT_TYPE: Final = "benchmark.happened"
BOUNDARY: Final = "xYzZY"
FORM: Final = f"multipart/form-data; boundary={BOUNDARY}"
_SIGNATURE: Final = "X-Twilio-Email-Event-Webhook-Signature"
_TIME: Final = "X-Twilio-Email-Event-Webhook-Timestamp"
_ECDSA: Final = ec.ECDSA(Prehashed(SHA256()))


@dataclass(frozen=True, slots=True)
class SignedRequest:
    """Request without its address."""

    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class SendGrid:
    """SendGrid Inbound Parse with a private key of its own."""

    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    @property
    def public_key(self) -> str:
        """Public key as shown by SendGrid's dashboard."""
        public = self.key.public_key()
        return b64encode(public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).decode()

    def mail(self, number: int, content_bytes: int = 0) -> SignedRequest:
        """Return the request of SendGrid with a mail, signed now; its content has about so many bytes."""
        envelope = json.dumps({"from": "ada@example.org", "to": ["desk@in.example.test"]})
        form = {"envelope": envelope, "email": build_raw_mail(number, content_bytes), "spam_score": "0.1"}
        body = encode_multipart(form)
        moment = str(int(time.time()))
        digest = sha256(moment.encode())
        digest.update(body)
        signature = b64encode(self.key.sign(digest.digest(), _ECDSA)).decode()
        return SignedRequest({"Content-Type": FORM, _SIGNATURE: signature, _TIME: moment}, body)


def sign_mailgun(number: int) -> SignedRequest:
    """Return the request of Mailgun with a mail, signed now with `SECRET` and a token that it has never used."""
    moment, token = str(int(time.time())), sha256(f"{number} {time.time_ns()}".encode()).hexdigest()[:50]
    fields = {
        "recipient": "desk@in.example.test",
        "sender": "ada@example.org",
        "from": "Ada <ada@example.org>",
        "subject": f"Number {number}",
        "Message-Id": f"<mailgun-{number}@mail.example.org>",
        "message-headers": json.dumps([["From", "Ada <ada@example.org>"], ["Subject", f"Number {number}"]]),
        "body-plain": "Hello.\r\n",
        "timestamp": moment,
        "token": token,
        "signature": sign_parts(f"{moment}{token}".encode()),
    }
    return SignedRequest({"Content-Type": "application/x-www-form-urlencoded"}, urlencode(fields).encode())


def sign_ses(number: int) -> SignedRequest:
    """Return the notification of SNS about a mail of SES, with an invalid signature:
    the address needs a trigger token.
    """
    source, recipient = "ada@example.org", "desk@in.example.test"
    told = {
        "notificationType": "Received",
        "mail": {
            "messageId": f"ses{number:032x}",
            "source": source,
            "destination": [recipient],
            "headersTruncated": False,
            "headers": [{"name": "From", "value": source}],
            "commonHeaders": {"from": [source], "subject": f"Number {number}"},
        },
        "receipt": {"recipients": [recipient], "action": {"type": "SNS", "encoding": "UTF8"}},
        "content": build_raw_mail(number),
    }
    moment = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
    message = {
        "Type": "Notification",
        "MessageId": str(uuid5(NAMESPACE_URL, f"sns {number}")),
        "TopicArn": "arn:aws:sns:us-east-1:111122223333:inbound-mail",
        "Message": json.dumps(told),
        "Timestamp": moment,
        "SignatureVersion": "1",
        "Signature": b64encode(b"nobody looks").decode(),
        "SigningCertURL": f"https://sns.us-east-1.amazonaws.com/SimpleNotificationService-{0:032x}.pem",
    }
    headers = {"Content-Type": "text/plain; charset=UTF-8", "x-amz-sns-message-type": "Notification"}
    return SignedRequest(headers, json.dumps(message).encode())


def sign_github(number: int, payload: Mapping[str, Json] | None = None) -> SignedRequest:
    """Return a push notification of GitHub, signed with `SECRET`; `payload` adds fields."""
    body = json.dumps({"ref": "refs/heads/main", "number": number, **(payload or {})}).encode()
    headers = {
        "Content-Type": "application/json",
        "X-GitHub-Event": "push",
        "X-GitHub-Delivery": str(uuid5(NAMESPACE_URL, f"github {number}")),
        "X-Hub-Signature-256": f"sha256={sign_parts(body)}",
    }
    return SignedRequest(headers, body)


def sign_stripe(number: int) -> SignedRequest:
    """Return an event of Stripe, signed with `SECRET`."""
    told = {"id": f"evt_{number}", "object": "event", "type": "invoice.paid", "data": {"object": {}}}
    body, moment = json.dumps(told).encode(), str(int(time.time()))
    signature = sign_parts(f"{moment}.".encode() + body)
    return SignedRequest(
        {"Content-Type": "application/json", "Stripe-Signature": f"t={moment},v1={signature}"}, body
    )


def build_cloud_event(number: int) -> SignedRequest:
    """Return a structured CloudEvent. It has no signature, so the request needs an API key."""
    event = {"specversion": "1.0", "id": f"A{number}", "source": "/tests", "type": EVENT_TYPE, "data": {}}
    return SignedRequest({"Content-Type": "application/cloudevents+json"}, json.dumps(event).encode())


def build_native_event(number: int) -> SignedRequest:
    """Return an event in the form of the API, which needs an API key."""
    told = {"event_type": EVENT_TYPE, "event_data": {"number": number}}
    return SignedRequest({"Content-Type": "application/json"}, json.dumps(told).encode())


def build_message(number: int) -> SignedRequest:
    """Return a message for a queue trigger, with a deduplication id by its number."""
    body = {"message": {"number": number}, "deduplicationId": f"message-{number}"}
    return SignedRequest({"Content-Type": "application/json"}, json.dumps(body).encode())


# ── parts ───────────────────────────────────────────────────────────────────────────────────────────────────


def sign_parts(*parts: bytes) -> str:
    """Return the HMAC of parts under `SECRET`, in hexadecimal."""
    return hmac.new(SECRET.encode(), b"".join(parts), "sha256").hexdigest()


def build_raw_mail(number: int, content_bytes: int = 0) -> str:
    """Return a mail in plain text (RFC 5322) with a content of at least so many bytes."""
    line = "The quick brown fox jumps over the lazy dog, and over it again.\r\n"
    return (
        f"From: Ada <ada@example.org>\r\nTo: desk@in.example.test\r\nSubject: Number {number}\r\n"
        f"Message-ID: <raw-{number}@mail.example.org>\r\nMIME-Version: 1.0\r\nContent-Type: text/plain\r\n\r\n"
        f"{line * (1 + content_bytes // len(line))}"
    )


def encode_multipart(fields: Mapping[str, str]) -> bytes:
    """Return fields as the body of a multipart form with `BOUNDARY`."""
    parts = "".join(
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in fields.items()
    )
    return f"{parts}--{BOUNDARY}--\r\n".encode()
