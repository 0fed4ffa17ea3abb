"""Stripe: signs time and body, in a header that holds a signature for each secret while one replaces the other."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Final

from senders import delivery_keys, sender_event, signatures
from senders.sender_event import SenderEvent
from senders.sender_request import SenderRequest
from senders.signatures import SignatureResult

SOURCE: Final = "stripe"
TOLERANCE: Final = timedelta(minutes=5)
"""Stripe signs anew what it repeats, so that an older signature is a replay."""


def verify(
    arrival: SenderRequest, secrets: Sequence[str], *, tolerance: timedelta = TOLERANCE
) -> SignatureResult:
    """Return what Stripe names the event by; raises `Refused`."""
    keys = signatures.usable_secrets(secrets)
    header = arrival.headers.single("Stripe-Signature")
    if header is None:
        raise signatures.missing_signature("Stripe-Signature")
    items = [item.strip().partition("=")[::2] for item in header.split(",")]
    times = [value for name, value in items if name == "t"]
    given = [signatures.header_bytes(value) for name, value in items if name == "v1"]
    if len(times) != 1 or not given:
        raise signatures.invalid_signature()
    signatures.require_fresh(times[0], arrival.received_at, past=tolerance)
    arrival.require_offloaded()
    signed = (times[0].encode(), b".", arrival.body)
    signatures.require_match(given, [signatures.compute_hmac(key, *signed).hex().encode() for key in keys])
    return SignatureResult(delivery_keys.member_delivery_key(SOURCE, arrival.json, "id"))


def parse_event(arrival: SenderRequest) -> SenderEvent:
    """Return the event, whose data is all of what Stripe says; raises `Refused`."""
    data = sender_event.require_object(arrival.json, "The event")
    name = sender_event.require_text_member(data, "id", "The event")
    return SenderEvent(
        sender_event.require_text_member(data, "type", "The event"),
        SOURCE,
        data,
        name,
        delivery_keys.delivery_key(SOURCE, name),
    )
