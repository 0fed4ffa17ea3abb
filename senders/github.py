"""GitHub: signs the body with an HMAC, and names delivery and event in headers that it doesn't sign."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from engine.values import Json
from senders import delivery_keys, event, forms, signatures
from senders.arrival import Arrival, json_of
from senders.event import Event
from senders.refusals import Refused
from senders.signatures import Verified

SOURCE: Final = "github"


def verify(arrival: Arrival, secrets: Sequence[str]) -> Verified:
    """Return what GitHub names the delivery by; raises `Refused`.

    Its signature holds no time, so one doesn't become stale. The other one, of SHA-1, is for receivers of long ago.
    """
    keys = signatures.usable(secrets)
    signature = arrival.headers.one("X-Hub-Signature-256")
    if signature is None:
        raise signatures.missing("X-Hub-Signature-256")
    arrival.require_patience()
    expected = [b"sha256=" + signatures.digest(key, arrival.body).hex().encode() for key in keys]
    signatures.require_match([signatures.text_of(signature)], expected)
    delivery = _delivery(arrival)
    return Verified(None if delivery is None else delivery_keys.of(SOURCE, delivery))


def event_of(arrival: Arrival) -> Event:
    """Return the event: its JSON is the body, or the field `payload` of a form; raises `Refused`."""
    name = arrival.headers.one("X-GitHub-Event")
    if not name:
        raise Refused("invalid-event", "The header X-GitHub-Event is missing")
    delivery = _delivery(arrival)
    key = None if delivery is None else delivery_keys.of(SOURCE, delivery)
    return Event(f"github.{name}", SOURCE, event.object_of(_payload(arrival), "The payload"), delivery, key)


def _payload(arrival: Arrival) -> Json:
    if arrival.media_type.name != forms.URLENCODED:
        return arrival.json
    payload = arrival.form.first("payload")
    if payload is None:
        raise Refused("invalid-event", "The form has no field payload")
    return json_of(payload)


def _delivery(arrival: Arrival) -> str | None:
    return arrival.headers.one("X-GitHub-Delivery") or None
