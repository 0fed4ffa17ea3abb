"""GitHub: signs the body with an HMAC, and names delivery and event in headers that it doesn't sign."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from engine.values import Json
from senders import delivery_keys, posted_forms, sender_event, signatures
from senders.request_refusal import RequestRefused
from senders.sender_event import SenderEvent
from senders.sender_request import SenderRequest, parse_json
from senders.signatures import SignatureResult

SOURCE: Final = "github"


def verify(arrival: SenderRequest, secrets: Sequence[str]) -> SignatureResult:
    """Return what GitHub names the delivery by; raises `Refused`.

    Its signature holds no time, so one doesn't become stale. The other one, of SHA-1, is for receivers of long ago.
    """
    keys = signatures.usable_secrets(secrets)
    signature = arrival.headers.single("X-Hub-Signature-256")
    if signature is None:
        raise signatures.missing_signature("X-Hub-Signature-256")
    arrival.require_offloaded()
    expected = [b"sha256=" + signatures.compute_hmac(key, arrival.body).hex().encode() for key in keys]
    signatures.require_match([signatures.header_bytes(signature)], expected)
    delivery = _delivery_id(arrival)
    return SignatureResult(None if delivery is None else delivery_keys.delivery_key(SOURCE, delivery))


def parse_event(arrival: SenderRequest) -> SenderEvent:
    """Return the event: its JSON is the body, or the field `payload` of a form; raises `Refused`."""
    name = arrival.headers.single("X-GitHub-Event")
    if not name:
        raise RequestRefused("invalid-event", "The header X-GitHub-Event is missing")
    delivery = _delivery_id(arrival)
    key = None if delivery is None else delivery_keys.delivery_key(SOURCE, delivery)
    return SenderEvent(
        f"github.{name}",
        SOURCE,
        sender_event.require_object(_parse_payload(arrival), "The payload"),
        delivery,
        key,
    )


def _parse_payload(arrival: SenderRequest) -> Json:
    if arrival.media_type.name != posted_forms.URLENCODED_TYPE:
        return arrival.json
    payload = arrival.form.first("payload")
    if payload is None:
        raise RequestRefused("invalid-event", "The form has no field payload")
    return parse_json(payload)


def _delivery_id(arrival: SenderRequest) -> str | None:
    return arrival.headers.single("X-GitHub-Delivery") or None
