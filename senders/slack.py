"""Slack: signs a version, the time and the body; sends events as JSON, commands and clicks as forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Final

from engine.values import Json
from senders import sender_event, sender_request, signatures
from senders.sender_event import SenderEvent, UrlChallenge
from senders.sender_request import SenderRequest, parse_json
from senders.signatures import SignatureResult

SOURCE: Final = "slack"
TOLERANCE: Final = timedelta(minutes=5)
"""Slack asks receivers to refuse older requests."""


def verify(
    request: SenderRequest, secrets: Sequence[str], *, tolerance: timedelta = TOLERANCE
) -> SignatureResult:
    """Verify Slack's HMAC-SHA-256 signature, at most `tolerance` old, with any of the signing secrets.

    The result has the deduplication key of the event or command, None without an id. Raises `RequestRefused` for a
    missing, wrong or stale signature, without a non-blank secret, and for a malformed payload, and `BudgetExceeded` as
    `SenderRequest.require_offloaded` does.
    """
    keys = signatures.usable_secrets(secrets)
    time = request.headers.single("X-Slack-Request-Timestamp")
    signature = request.headers.single("X-Slack-Signature")
    if time is None or signature is None:
        raise signatures.missing_signature("X-Slack-Signature or X-Slack-Request-Timestamp")
    signatures.require_fresh(time, request.received_at, past=tolerance)
    request.require_offloaded()
    signed = (b"v0:", time.encode(), b":", request.body)
    expected = [b"v0=" + signatures.compute_hmac(key, *signed).hex().encode() for key in keys]
    signatures.require_match([signatures.header_bytes(signature)], expected)
    return SignatureResult(_deduplication_key(_parse_payload(request)))


def parse_event(request: SenderRequest) -> SenderEvent | UrlChallenge:
    """Return Slack's event, named `slack.` and its type, or a challenge that must be answered.

    Slack sends a challenge when a URL is configured; its periodic check of the certificate counts as a
    challenge with an empty text. Raises `RequestRefused` for a malformed payload.
    """
    data = sender_event.require_object(_parse_payload(request), "The payload")
    if data.get("type") == "url_verification":
        return UrlChallenge(sender_event.require_text_member(data, "challenge", "The payload"))
    if data.get("ssl_check") == "1":
        # Slack checks the certificate of a command's URL from time to time.
        return UrlChallenge("")
    return SenderEvent(
        f"slack.{_event_type(data)}", SOURCE, data, _delivery_name(data), _deduplication_key(data)
    )


def _event_type(data: Mapping[str, Json]) -> str:
    """Return the event type: of the inner event for a callback, `slash_command` for a command.

    Raises `RequestRefused` without one.
    """
    if "command" in data and "type" not in data:
        return "slash_command"
    if data.get("type") == "event_callback":
        data = sender_event.require_object(data.get("event"), "The event")
    return sender_event.require_text_member(data, "type", "The payload")


def _parse_payload(request: SenderRequest) -> Json:
    """Return the payload: a body of JSON, JSON in the form field `payload` (a click), or the fields of a form (a
    command).

    Of fields with the same name the last counts. Raises `RequestRefused` for malformed JSON or forms, and for NUL.
    """
    if request.media_type.name != sender_request.URLENCODED_TYPE:
        return request.json
    form = request.form
    payload = form.first("payload")
    if payload is not None:
        return parse_json(payload)
    return {
        sender_event.require_storable(part.name): sender_event.require_storable(
            sender_request.decode_value(part.value)
        )
        for part in form.parts
    }


def _delivery_name(data: Json) -> str | None:
    """Return the event id, or else the trigger id of an interaction (a command or click).

    None where both are missing, empty or no texts.
    """
    named = [data.get("event_id"), data.get("trigger_id")] if isinstance(data, dict) else []
    return next((name for name in named if isinstance(name, str) and name), None)


def _deduplication_key(data: Json) -> str | None:
    """Return the deduplication key of the event or interaction, from its id; None without one."""
    name = _delivery_name(data)
    return None if name is None else signatures.delivery_key(SOURCE, name)
