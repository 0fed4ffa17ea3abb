"""Slack: signs a version, the time and the body; sends events as JSON, commands and clicks as forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Final

from engine.values import Json
from senders import delivery_keys, event, forms, signatures
from senders.arrival import Arrival, json_of
from senders.event import Challenge, Event
from senders.signatures import Verified

SOURCE: Final = "slack"
TOLERANCE: Final = timedelta(minutes=5)
"""Slack asks its receivers to refuse what is older."""


def verify(arrival: Arrival, secrets: Sequence[str], *, tolerance: timedelta = TOLERANCE) -> Verified:
    """Return what Slack names the event, or the command, by; raises `Refused`."""
    keys = signatures.usable(secrets)
    time = arrival.headers.one("X-Slack-Request-Timestamp")
    signature = arrival.headers.one("X-Slack-Signature")
    if time is None or signature is None:
        raise signatures.missing("X-Slack-Signature or X-Slack-Request-Timestamp")
    signatures.require_fresh(time, arrival.at, past=tolerance)
    arrival.require_patience()
    signed = (b"v0:", time.encode(), b":", arrival.body)
    expected = [b"v0=" + signatures.digest(key, *signed).hex().encode() for key in keys]
    signatures.require_match([signatures.text_of(signature)], expected)
    return Verified(_key(_payload(arrival)))


def event_of(arrival: Arrival) -> Event | Challenge:
    """Return the event, or what Slack asks for when an address is entered; raises `Refused`."""
    data = event.object_of(_payload(arrival), "The payload")
    if data.get("type") == "url_verification":
        return Challenge(event.text_of(data, "challenge", "The payload"))
    if data.get("ssl_check") == "1":
        # Slack now and then looks at the certificate of the address of a command.
        return Challenge("")
    return Event(f"slack.{_kind(data)}", SOURCE, data, _name(data), _key(data))


def _kind(data: Mapping[str, Json]) -> str:
    """Return what has happened: inside of a callback stands the event itself, and a command has no type."""
    if "command" in data and "type" not in data:
        return "slash_command"
    if data.get("type") == "event_callback":
        data = event.object_of(data.get("event"), "The event")
    return event.text_of(data, "type", "The payload")


def _payload(arrival: Arrival) -> Json:
    """Return what Slack says: a body of JSON, JSON in a form (a click), or the fields of a form (a command)."""
    if arrival.media_type.name != forms.URLENCODED:
        return arrival.json
    form = arrival.form
    payload = form.first("payload")
    if payload is not None:
        return json_of(payload)
    return {event.kept(part.name): event.kept(forms.decoded(part.value)) for part in form.parts}


def _name(data: Json) -> str | None:
    """Return what is named: an event, or what somebody did, by the id with which a dialog can be opened for it."""
    named = [data.get("event_id"), data.get("trigger_id")] if isinstance(data, dict) else []
    return next((name for name in named if isinstance(name, str) and name), None)


def _key(data: Json) -> str | None:
    name = _name(data)
    return None if name is None else delivery_keys.of(SOURCE, name)
