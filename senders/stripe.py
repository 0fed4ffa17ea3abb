"""Stripe: signs time and body, in a header that holds a signature for each secret while one replaces the other."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Final

from senders import delivery_keys, event, signatures
from senders.arrival import Arrival
from senders.event import Event
from senders.signatures import Verified

SOURCE: Final = "stripe"
TOLERANCE: Final = timedelta(minutes=5)
"""Stripe signs anew what it repeats, so that an older signature is a replay."""


def verify(arrival: Arrival, secrets: Sequence[str], *, tolerance: timedelta = TOLERANCE) -> Verified:
    """Return what Stripe names the event by; raises `Refused`."""
    keys = signatures.usable(secrets)
    header = arrival.headers.one("Stripe-Signature")
    if header is None:
        raise signatures.missing("Stripe-Signature")
    items = [item.strip().partition("=")[::2] for item in header.split(",")]
    times = [value for name, value in items if name == "t"]
    given = [signatures.text_of(value) for name, value in items if name == "v1"]
    if len(times) != 1 or not given:
        raise signatures.invalid()
    signatures.require_fresh(times[0], arrival.at, past=tolerance)
    arrival.require_patience()
    signed = (times[0].encode(), b".", arrival.body)
    signatures.require_match(given, [signatures.digest(key, *signed).hex().encode() for key in keys])
    return Verified(delivery_keys.of_member(SOURCE, arrival.json, "id"))


def event_of(arrival: Arrival) -> Event:
    """Return the event, whose data is all of what Stripe says; raises `Refused`."""
    data = event.object_of(arrival.json, "The event")
    name = event.text_of(data, "id", "The event")
    return Event(event.text_of(data, "type", "The event"), SOURCE, data, name, delivery_keys.of(SOURCE, name))
