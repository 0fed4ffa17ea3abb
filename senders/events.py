"""Webhooks of known senders: which one a request is of, whether it is truly theirs, and the events that it tells of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Final, TypeAlias

from senders import cloudevents, github, slack, standard_webhooks, stripe
from senders.arrival import Arrival
from senders.event import Batch, Challenge, Event

__all__ = ["Batch", "Challenge", "Event", "Meaning", "Sender", "event_of", "recognise"]

Meaning: TypeAlias = Event | Batch | Challenge


class Sender(StrEnum):
    """Who sends events in a form of their own."""

    GITHUB = "github"
    STRIPE = "stripe"
    SLACK = "slack"
    STANDARD_WEBHOOKS = "standard-webhooks"
    CLOUDEVENTS = "cloudevents"
    """Anybody: CloudEvents are a form, and signed by nobody."""


_HEADERS: Final[Mapping[str, Sender]] = {
    "X-Hub-Signature-256": Sender.GITHUB,
    "X-GitHub-Event": Sender.GITHUB,
    "Stripe-Signature": Sender.STRIPE,
    "X-Slack-Signature": Sender.SLACK,
    **dict.fromkeys(standard_webhooks.signature_headers(), Sender.STANDARD_WEBHOOKS),
}
_MEANINGS: Final[Mapping[Sender, Callable[[Arrival], Meaning]]] = {
    Sender.GITHUB: github.event_of,
    Sender.STRIPE: stripe.event_of,
    Sender.SLACK: slack.event_of,
    Sender.STANDARD_WEBHOOKS: standard_webhooks.event_of,
    Sender.CLOUDEVENTS: cloudevents.event_of,
}


def recognise(arrival: Arrival) -> Sender | None:
    """Return of whom a request claims to be, by its headers alone; None: of nobody known here."""
    claimed = next((sender for header, sender in _HEADERS.items() if header in arrival.headers), None)
    if claimed is None and cloudevents.is_one(arrival):
        return Sender.CLOUDEVENTS
    return claimed


def event_of(arrival: Arrival, sender: Sender) -> Meaning:
    """Return what a request of a sender means, which is for its `verify` to have found true; raises `Refused`."""
    return _MEANINGS[sender](arrival)
