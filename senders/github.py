"""GitHub webhooks: an HMAC signs the body; the headers with the ids of delivery and event are not signed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from engine.values import Json
from senders import sender_event, sender_request, signatures
from senders.request_refusal import RequestRefused
from senders.sender_event import SenderEvent
from senders.sender_request import SenderRequest, parse_json
from senders.signatures import SignatureResult

SOURCE: Final = "github"


def verify(request: SenderRequest, secrets: Sequence[str]) -> SignatureResult:
    """Verify GitHub's HMAC-SHA-256 signature of the body with any of the secrets.

    Returns the deduplication key of the delivery, made from `X-GitHub-Delivery`, None without that header.
    The signature covers no time, so it never becomes stale; the legacy SHA-1 signature is ignored. Raises
    `RequestRefused` for a missing or wrong signature and without a non-blank secret, and `BudgetExceeded` as
    `SenderRequest.require_offloaded` does.
    """
    keys = signatures.usable_secrets(secrets)
    signature = request.headers.single("X-Hub-Signature-256")
    if signature is None:
        raise signatures.missing_signature("X-Hub-Signature-256")
    request.require_offloaded()
    expected = [b"sha256=" + signatures.compute_hmac(key, request.body).hex().encode() for key in keys]
    signatures.require_match([signatures.header_bytes(signature)], expected)
    delivery = _delivery_id(request)
    return SignatureResult(None if delivery is None else signatures.delivery_key(SOURCE, delivery))


def parse_event(request: SenderRequest) -> SenderEvent:
    """Return GitHub's event: its type is `github.` and the header `X-GitHub-Event`, its data the JSON object.

    The JSON is the body, or the form field `payload`. Raises `RequestRefused` without the header, and for
    anything but an object.
    """
    name = request.headers.single("X-GitHub-Event")
    if not name:
        raise RequestRefused("invalid-event", "The header X-GitHub-Event is missing")
    delivery = _delivery_id(request)
    key = None if delivery is None else signatures.delivery_key(SOURCE, delivery)
    return SenderEvent(
        f"github.{name}",
        SOURCE,
        sender_event.require_object(_parse_payload(request), "The payload"),
        delivery,
        key,
    )


def _parse_payload(request: SenderRequest) -> Json:
    """Return the JSON of the body, or of the form field `payload` of a urlencoded body.

    Raises `RequestRefused` for malformed JSON and a form without that field.
    """
    if request.media_type.name != sender_request.URLENCODED_TYPE:
        return request.json
    payload = request.form.first("payload")
    if payload is None:
        raise RequestRefused("invalid-event", "The form has no field payload")
    return parse_json(payload)


def _delivery_id(request: SenderRequest) -> str | None:
    """Return the value of `X-GitHub-Delivery`; None if it is missing or empty.

    Raises `RequestRefused` for a repeated header.
    """
    return request.headers.single("X-GitHub-Delivery") or None
