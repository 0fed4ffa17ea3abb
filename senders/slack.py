"""Slack: signs a version, the time and the body; sends events as JSON, commands and clicks as forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Final

from engine.values import Json
from senders import delivery_keys, posted_forms, sender_event, signatures
from senders.sender_event import SenderEvent, UrlChallenge
from senders.sender_request import SenderRequest, parse_json
from senders.signatures import SignatureResult

SOURCE: Final = "slack"
TOLERANCE: Final = timedelta(minutes=5)
"""Slack asks its receivers to refuse what is older."""


def verify(
    arrival: SenderRequest, secrets: Sequence[str], *, tolerance: timedelta = TOLERANCE
) -> SignatureResult:
    """Return what Slack names the event, or the command, by; raises `Refused`."""
    keys = signatures.usable_secrets(secrets)
    time = arrival.headers.single("X-Slack-Request-Timestamp")
    signature = arrival.headers.single("X-Slack-Signature")
    if time is None or signature is None:
        raise signatures.missing_signature("X-Slack-Signature or X-Slack-Request-Timestamp")
    signatures.require_fresh(time, arrival.received_at, past=tolerance)
    arrival.require_offloaded()
    signed = (b"v0:", time.encode(), b":", arrival.body)
    expected = [b"v0=" + signatures.compute_hmac(key, *signed).hex().encode() for key in keys]
    signatures.require_match([signatures.header_bytes(signature)], expected)
    return SignatureResult(_deduplication_key(_parse_payload(arrival)))


def parse_event(arrival: SenderRequest) -> SenderEvent | UrlChallenge:
    """Return the event, or what Slack asks for when an address is entered; raises `Refused`."""
    data = sender_event.require_object(_parse_payload(arrival), "The payload")
    if data.get("type") == "url_verification":
        return UrlChallenge(sender_event.require_text_member(data, "challenge", "The payload"))
    if data.get("ssl_check") == "1":
        # Slack now and then looks at the certificate of the address of a command.
        return UrlChallenge("")
    return SenderEvent(
        f"slack.{_event_type(data)}", SOURCE, data, _delivery_name(data), _deduplication_key(data)
    )


def _event_type(data: Mapping[str, Json]) -> str:
    """Return what has happened: inside of a callback stands the event itself, and a command has no type."""
    if "command" in data and "type" not in data:
        return "slash_command"
    if data.get("type") == "event_callback":
        data = sender_event.require_object(data.get("event"), "The event")
    return sender_event.require_text_member(data, "type", "The payload")


def _parse_payload(arrival: SenderRequest) -> Json:
    """Return what Slack says: a body of JSON, JSON in a form (a click), or the fields of a form (a command)."""
    if arrival.media_type.name != posted_forms.URLENCODED_TYPE:
        return arrival.json
    form = arrival.form
    payload = form.first("payload")
    if payload is not None:
        return parse_json(payload)
    return {
        sender_event.storable_text(part.name): sender_event.storable_text(
            posted_forms.decode_value(part.value)
        )
        for part in form.parts
    }


def _delivery_name(data: Json) -> str | None:
    """Return what is named: an event, or what somebody did, by the id with which a dialog can be opened for it."""
    named = [data.get("event_id"), data.get("trigger_id")] if isinstance(data, dict) else []
    return next((name for name in named if isinstance(name, str) and name), None)


def _deduplication_key(data: Json) -> str | None:
    name = _delivery_name(data)
    return None if name is None else delivery_keys.delivery_key(SOURCE, name)
