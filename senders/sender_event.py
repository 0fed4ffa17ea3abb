"""Events and URL challenges, parsed from webhooks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

from msgspec import Struct, field

from engine.values import Json
from senders.request_refusal import RequestRefused

MAX_TYPE_LENGTH: Final = 200
"""Maximum length of an event type, as in subscriptions of triggers."""

_TYPE: Final = re.compile(r"[^\s*\x00-\x1f\x7f]+")


class SenderEvent(Struct, frozen=True):
    """Event with type, source and data."""

    event_type: str
    source: str
    data: Json
    id: str | None = None
    """Id that the sender gives the event, if any."""
    key: str | None = None
    """Deduplication key; None disables deduplication."""
    attributes: Mapping[str, Json] = field(default_factory=dict)
    """Other attributes of a CloudEvent, such as `subject` and `time`, and extensions."""

    def __post_init__(self) -> None:
        require_type(self.event_type)


class EventBatch(Struct, frozen=True):
    """Events of one request."""

    events: Sequence[SenderEvent]


class UrlChallenge(Struct, frozen=True):
    """Ownership check of a URL: the sender expects this text in the answer. It is no event."""

    text: str
    """Empty if any answer with status 200 suffices."""


def require_type(event_type: str) -> None:
    """Require an event type of 1 to 200 characters without white space, asterisks and control characters.

    Only such types can be subscribed to by a trigger. Raises `RequestRefused`.
    """
    if len(event_type) > MAX_TYPE_LENGTH or not _TYPE.fullmatch(event_type):
        raise RequestRefused(
            "invalid-event",
            f"The type of an event has 1 to {MAX_TYPE_LENGTH} characters, and neither spaces nor asterisks",
        )


def require_object(value: Json, what: str) -> dict[str, Json]:
    """Return a value that is a JSON object, unchanged; raises `RequestRefused` for any other value.

    `what` names the value in the message, such as "The payload".
    """
    if not isinstance(value, dict):
        raise RequestRefused("invalid-event", f"{what} is not a JSON object")
    return value


def require_text_member(members: Mapping[str, Json], name: str, what: str) -> str:
    """Return the non-empty text under a name of a JSON object; raises `RequestRefused` if it is missing,
    empty or no text.

    `what` names the object in the message, such as "The payload".
    """
    value = members.get(name)
    if not isinstance(value, str) or not value:
        raise RequestRefused("invalid-event", f"{what} has no text {name!r}")
    return value


def require_storable(text: str) -> str:
    """Return the text unchanged; raises `RequestRefused` with `nul-character` (400) if it contains the character NUL,
    which JSON columns can't store.
    """
    if "\0" in text:
        raise RequestRefused(
            "nul-character", "A text holds the character NUL (U+0000), which can't be stored"
        )
    return text
