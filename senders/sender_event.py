"""What webhooks come down to: events with a type, a source and data, or a question that wants an answer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from engine.values import Json
from senders.request_refusal import RequestRefused

MAX_TYPE_LENGTH: Final = 200
"""As long as the longest type that a trigger can be told to wait for."""

_TYPE: Final = re.compile(r"[^\s*\x00-\x1f\x7f]+")


@dataclass(frozen=True, slots=True)
class SenderEvent:
    """Something that has happened elsewhere."""

    event_type: str
    source: str
    data: Json
    id: str | None = None
    """As the sender names the event; None: it gives it no name."""
    key: str | None = None
    """By which the event is known again; None: it isn't."""
    attributes: Mapping[str, Json] = field(default_factory=dict)
    """What a CloudEvent says besides: `subject`, `time`, and whatever else it carries."""

    def __post_init__(self) -> None:
        require_type(self.event_type)


@dataclass(frozen=True, slots=True)
class EventBatch:
    """Events that came in one request."""

    events: Sequence[SenderEvent]


@dataclass(frozen=True, slots=True)
class UrlChallenge:
    """No event: the sender wants this text back, to see that its address is ours."""

    text: str
    """Empty where any answer of 200 will do."""


def require_type(event_type: str) -> None:
    """Raise `Refused` for a type that no trigger could wait for."""
    if len(event_type) > MAX_TYPE_LENGTH or not _TYPE.fullmatch(event_type):
        raise RequestRefused(
            "invalid-event",
            f"The type of an event has 1 to {MAX_TYPE_LENGTH} characters, and neither spaces nor asterisks",
        )


def require_object(value: Json, what: str) -> dict[str, Json]:
    """Return JSON that has to be an object; raises `Refused`."""
    if not isinstance(value, dict):
        raise RequestRefused("invalid-event", f"{what} is no JSON object")
    return value


def require_text_member(members: Mapping[str, Json], name: str, what: str) -> str:
    """Return a member that has to be a text of some length; raises `Refused`."""
    value = members.get(name)
    if not isinstance(value, str) or not value:
        raise RequestRefused("invalid-event", f"{what} has no text {name!r}")
    return value


def storable_text(text: str) -> str:
    """Return a text that isn't of JSON, where it could be kept as if it were; raises `Refused`."""
    if "\0" in text:
        raise RequestRefused(
            "nul-character", "A text holds the character NUL (U+0000), which can't be stored"
        )
    return text
