"""What messages come from: one protocol for all of them, and how their contents become what a workflow gets."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Final, Protocol

import msgspec

from json_text import decoding

_DEDUPLICATION_ID: Final = re.compile(r"[\x21-\x7e]{1,255}")


class UnreadableMessage(ValueError):
    """A message can't be said as JSON; the text says why."""


@dataclass(frozen=True, slots=True)
class SourceMessage:
    """A message in hand: taken, and not acknowledged yet."""

    id: str
    """What the source knows this delivery by."""
    deduplication_id: str
    """The same whenever the message is delivered again, as far as the source tells."""
    body: bytes = b"null"
    """JSON."""
    priority: int | None = None
    problem: str | None = None
    """Why it can't be handed over at all; None where nothing is known against it."""


class MessageSource(Protocol):
    """A queue elsewhere. Every call raises `Unavailable` and `Refused`, and is harmless when it is made twice."""

    @property
    def label(self) -> str:
        """What runs are told of where their message comes from."""

    async def take(self, limit: int, wait_seconds: float) -> Sequence[SourceMessage]:
        """Return messages, as soon as there are some; none after `wait_seconds`."""

    async def hold(self, ids: Sequence[str]) -> None:
        """Keep messages in hand for as long again as they are kept at first: nobody else gets them meanwhile."""

    async def acknowledge(self, ids: Sequence[str]) -> None:
        """Have messages delivered never again."""

    async def release(self, ids: Sequence[str]) -> None:
        """Let others have messages at once."""

    async def dead_letter(self, reasons: Mapping[str, str]) -> None:
        """Put messages, by id and with the reason, where this kind of queue has those that nobody can process."""

    async def close(self) -> None:
        """Let go of connections; what is still in hand is delivered again."""


def to_json(content: bytes) -> bytes:
    """Return a content that is JSON as it is, and any other text as a string; raises `Unreadable`."""
    try:
        decoding.decode(content)
        return content
    except RecursionError as error:
        raise UnreadableMessage("It is nested too deeply") from error
    except ValueError:
        return msgspec.json.encode(decode_text(content))


def decode_text(content: bytes) -> str:
    """Return a text; raises `Unreadable`."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UnreadableMessage("It is neither JSON nor text in UTF-8") from error


def parse_priority(text: str | None) -> int | None:
    """Return a priority that is given as text; raises `Unreadable`."""
    if text is None:
        return None
    try:
        return int(text)
    except ValueError as error:
        raise UnreadableMessage("Its priority is not a whole number") from error


def make_deduplication_id(label: str, message_id: str) -> str:
    """Return what the gateway knows a message by, in the characters that it takes."""
    plain = f"{label}/{message_id}"
    if _DEDUPLICATION_ID.fullmatch(plain):
        return plain
    return f"{label}/sha256:{sha256(message_id.encode()).hexdigest()}"
