"""Protocol of external queues, and conversion of their messages to JSON."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Final, Protocol

import msgspec
from msgspec import Struct

from json_text import decoding

_DEDUPLICATION_ID: Final = re.compile(r"[\x21-\x7e]{1,255}")


class UnreadableMessage(ValueError):
    """A message that can't be converted to JSON; the text gives the reason."""


class SourceMessage(Struct, frozen=True):
    """Message that is taken from its source and not acknowledged yet."""

    id: str
    """Id of this delivery at the source."""
    deduplication_id: str
    """Id that is the same for each delivery of the message, as far as the source allows."""
    body: bytes = b"null"
    """JSON document."""
    priority: int | None = None
    problem: str | None = None
    """Reason for which the message can't be sent at all; None if there is none."""


class MessageSource(Protocol):
    """External queue. Every call is idempotent and raises `BridgeUnavailable` and `BridgeRefused`."""

    @property
    def label(self) -> str:
        """Name of the source, such as `redis:orders`, which runs get as the origin of their message."""

    async def take(self, limit: int, wait_seconds: float) -> Sequence[SourceMessage]:
        """Take up to `limit` messages as soon as there are any; an empty list after `wait_seconds` without one.

        A message that is taken is given to no other consumer until its hold ends.
        """

    async def hold(self, ids: Sequence[str]) -> None:
        """Renew the hold on messages that were taken, so that no other consumer gets them for another hold period."""

    async def acknowledge(self, ids: Sequence[str]) -> None:
        """Acknowledge messages that were taken, so that they are never delivered again."""

    async def release(self, ids: Sequence[str]) -> None:
        """Return messages that were taken to their queue, so that other consumers get them at once."""

    async def dead_letter(self, reasons: Mapping[str, str]) -> None:
        """Move messages that were taken to the source's place for dead letters (messages that can't be processed).

        `reasons` maps their ids to the reason of each.
        """

    async def close(self) -> None:
        """Close the connections; unacknowledged messages are delivered again, at the latest when their hold ends."""


def to_json(content: bytes) -> bytes:
    """Return valid JSON unchanged, and other UTF-8 text as a JSON string.

    Raises `UnreadableMessage` for content that is nested too deeply or not UTF-8.
    """
    try:
        decoding.decode(content)
        return content
    except RecursionError as error:
        raise UnreadableMessage("It is nested too deeply") from error
    except ValueError:
        return msgspec.json.encode(decode_text(content))


def decode_text(content: bytes) -> str:
    """Decode the content of a message as UTF-8; raises `UnreadableMessage` for invalid UTF-8."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UnreadableMessage("It is neither JSON nor text in UTF-8") from error


def parse_priority(text: str | None) -> int | None:
    """Return a priority as an integer, None without a text.

    Raises `UnreadableMessage` for a text that is no whole number.
    """
    if text is None:
        return None
    try:
        return int(text)
    except ValueError as error:
        raise UnreadableMessage("Its priority is not a whole number") from error


def make_deduplication_id(label: str, message_id: str) -> str:
    """Return the deduplication id by which the gateway recognizes a repeated message: label, slash, message id.

    If that has over 255 characters, or others than visible ASCII, the message id is replaced by its SHA-256.
    """
    plain = f"{label}/{message_id}"
    if _DEDUPLICATION_ID.fullmatch(plain):
        return plain
    return f"{label}/sha256:{sha256(message_id.encode()).hexdigest()}"
