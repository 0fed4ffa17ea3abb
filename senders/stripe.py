"""Stripe: signs time and body; the header holds a signature for each secret during a rotation."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Final

from senders import sender_event, signatures
from senders.sender_event import SenderEvent
from senders.sender_request import SenderRequest
from senders.signatures import SignatureResult

SOURCE: Final = "stripe"
TOLERANCE: Final = timedelta(minutes=5)
"""Stripe signs each attempt anew, so an older signature is a replay."""


def verify(
    request: SenderRequest, secrets: Sequence[str], *, tolerance: timedelta = TOLERANCE
) -> SignatureResult:
    """Verify Stripe's HMAC-SHA-256 signature, at most `tolerance` old, with any of the secrets.

    Returns the deduplication key made from the event's id, None if the body has none. Raises `RequestRefused`
    for a missing, wrong or stale signature, for a header without exactly one time, for malformed JSON, and
    without a non-blank secret, and `BudgetExceeded` as `SenderRequest.require_offloaded` does.
    """
    keys = signatures.usable_secrets(secrets)
    header = request.headers.single("Stripe-Signature")
    if header is None:
        raise signatures.missing_signature("Stripe-Signature")
    items = [item.strip().partition("=")[::2] for item in header.split(",")]
    times = [value for name, value in items if name == "t"]
    given = [signatures.header_bytes(value) for name, value in items if name == "v1"]
    if len(times) != 1 or not given:
        raise signatures.invalid_signature()
    signatures.require_fresh(times[0], request.received_at, past=tolerance)
    request.require_offloaded()
    signed = (times[0].encode(), b".", request.body)
    signatures.require_match(given, [signatures.compute_hmac(key, *signed).hex().encode() for key in keys])
    return SignatureResult(signatures.member_delivery_key(SOURCE, request.json, "id"))


def parse_event(request: SenderRequest) -> SenderEvent:
    """Return Stripe's event, with the whole payload as its data; the type is Stripe's own, such as
    `charge.refunded`.

    Raises `RequestRefused` for a payload without a text `id` or `type`.
    """
    data = sender_event.require_object(request.json, "The event")
    name = sender_event.require_text_member(data, "id", "The event")
    return SenderEvent(
        sender_event.require_text_member(data, "type", "The event"),
        SOURCE,
        data,
        name,
        signatures.delivery_key(SOURCE, name),
    )
