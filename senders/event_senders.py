"""Webhooks of known senders: which one a request is of, whether it is truly theirs, and the events that it tells of."""

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
    """Who sends events in a form of their own."""

    GITHUB = "github"
    STRIPE = "stripe"
    SLACK = "slack"
    STANDARD_WEBHOOKS = "standard-webhooks"
    CLOUDEVENTS = "cloudevents"
    """Anybody: CloudEvents are a form, and signed by nobody."""


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


def recognize_sender(arrival: SenderRequest) -> EventSender | None:
    """Return of whom a request claims to be, by its headers alone; None: of nobody known here."""
    claimed = next((sender for header, sender in _SENDER_HEADERS.items() if header in arrival.headers), None)
    if claimed is None and cloudevents.is_cloudevent(arrival):
        return EventSender.CLOUDEVENTS
    return claimed


def parse_event(arrival: SenderRequest, sender: EventSender) -> SenderMessage:
    """Return what a request of a sender means, which is for its `verify` to have found true; raises `Refused`."""
    return _EVENT_PARSERS[sender](arrival)
