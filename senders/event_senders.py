"""Webhooks of supported senders: recognition by headers, and dispatch to their parsers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Final, TypeAlias

from senders import cloudevents, github, slack, standard_webhooks, stripe
from senders.sender_event import EventBatch, SenderEvent, UrlChallenge
from senders.sender_request import SenderRequest

__all__ = [
    "EventBatch",
    "EventSender",
    "SenderEvent",
    "SenderMessage",
    "UrlChallenge",
    "parse_event",
    "recognize_sender",
]

SenderMessage: TypeAlias = SenderEvent | EventBatch | UrlChallenge


class EventSender(StrEnum):
    """Sender or format that has a parser of its own."""

    GITHUB = "github"
    STRIPE = "stripe"
    SLACK = "slack"
    STANDARD_WEBHOOKS = "standard-webhooks"
    CLOUDEVENTS = "cloudevents"
    """A format for any sender; CloudEvents are not signed."""


_SENDER_HEADERS: Final[Mapping[str, EventSender]] = {
    "X-Hub-Signature-256": EventSender.GITHUB,
    "X-GitHub-Event": EventSender.GITHUB,
    "Stripe-Signature": EventSender.STRIPE,
    "X-Slack-Signature": EventSender.SLACK,
    **dict.fromkeys(standard_webhooks.signature_headers(), EventSender.STANDARD_WEBHOOKS),
}
_EVENT_PARSERS: Final[Mapping[EventSender, Callable[[SenderRequest], SenderMessage]]] = {
    EventSender.GITHUB: github.parse_event,
    EventSender.STRIPE: stripe.parse_event,
    EventSender.SLACK: slack.parse_event,
    EventSender.STANDARD_WEBHOOKS: standard_webhooks.parse_event,
    EventSender.CLOUDEVENTS: cloudevents.parse_event,
}


def recognize_sender(request: SenderRequest) -> EventSender | None:
    """Return the sender named by the headers of a request; None for an unknown sender.

    Only the header names and the media type count; nothing is verified. A header of a sender takes precedence over
    the signs of a CloudEvent.
    """
    claimed = next((sender for header, sender in _SENDER_HEADERS.items() if header in request.headers), None)
    if claimed is None and cloudevents.is_cloudevent(request):
        return EventSender.CLOUDEVENTS
    return claimed


def parse_event(request: SenderRequest, sender: EventSender) -> SenderMessage:
    """Parse a request with the parser of this sender; its signature must have been verified before.

    Returns one event, a batch, or a URL challenge. Raises `RequestRefused` for a malformed request, and
    `BudgetExceeded` as the accessors of `SenderRequest` do.
    """
    return _EVENT_PARSERS[sender](request)
