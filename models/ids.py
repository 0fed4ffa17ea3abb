"""Identifiers: a prefix, an underscore, and a UUIDv7 as 26 characters of lower-case base 32.

Time-ordered (RFC 9562, 5.7), so that new rows are adjacent in an index. Made by the client of the database,
so that a commit with an unknown outcome can be checked by id. The alphabet is Crockford's, which sorts like
the values.
"""

from __future__ import annotations

import os
import re
import threading
from datetime import datetime
from hashlib import blake2b
from typing import Protocol

from models.timestamps import HOST_TIME, from_microseconds, to_microseconds

ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
SHARDS = 4096
"""Number of virtual shards. A row's shard is stored and never computed again, so this number can't change."""
TURNS = 1024
"""Number of turns in which workflows of an organization are served; workflows with the same turn share it."""
_PAIRS = [a + b for a in ALPHABET for b in ALPHABET]
ID_CHARACTERS = 26
_ENCODED = re.compile(rf"[{ALPHABET}]{{{ID_CHARACTERS}}}\Z")
_DIGITS = str.maketrans(ALPHABET, "0123456789abcdefghijklmnopqrstuv")
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")
_lock = threading.Lock()
_clock: IdClock | None = None
_last_millisecond = 0
_counter = 0


class IdClock(Protocol):
    """Source of the time in ids."""

    def now(self) -> datetime:
        """Return the current time, an aware datetime."""


def use_clock(clock: IdClock) -> None:
    """Set the clock for new ids of this process, so that they sort together with ids of other hosts that use the same
    clock. If it is behind the clock before, new ids may sort before earlier ones.
    """
    global _clock, _last_millisecond
    with _lock:
        _clock, _last_millisecond = clock, 0


def new_id(prefix: str) -> str:
    """Return a new id `prefix_` and 26 characters (a UUIDv7), greater than every id that this process made before."""
    return f"{prefix}_{encode_base32(_generate_uuid7())}"


def earliest_id(prefix: str, moment: datetime) -> str:
    """Return a lower bound of all ids with a prefix that are made at or after a time, by the same clock."""
    return f"{prefix}_{encode_base32(int(moment.timestamp() * 1_000) << 80)}"


def time_of(text: str) -> datetime | None:
    """Return the time at which an id was made, to the millisecond; None for a text of another form.

    An id of `derive_id` has the time of the id that it was derived from.
    """
    encoded = text.rpartition("_")[2]
    if not _ENCODED.match(encoded):
        return None
    # The milliseconds are the first ten characters, in the digits of Python.
    return from_microseconds(int(encoded[:10].translate(_DIGITS), 32) * 1_000)


def new_ids(prefix: str, count: int) -> list[str]:
    """Return `count` new ids in ascending order, up to 1,024 from one UUID, which differ in their last characters;
    cheaper than `new_id` for each.
    """
    made: list[str] = []
    while len(made) < count:
        head = f"{prefix}_{encode_base32(_generate_uuid7())[:-2]}"
        made.extend([head + pair for pair in _PAIRS[: count - len(made)]])
    return made


def _generate_uuid7() -> int:
    """Return a UUIDv7 as a number: milliseconds, a counter within them, and random bits; greater than the one
    before.
    """
    global _last_millisecond, _counter  # noqa: PLW0603 - the clock and counter of this process's ids
    random = int.from_bytes(os.urandom(9), "big")
    with _lock:
        millisecond = _next_millisecond()
        if millisecond > _last_millisecond:
            _last_millisecond = millisecond
            _counter = random >> 64 & 0x3F
        else:
            _counter += 1
            if _counter > 0xFFF:  # noqa: PLR2004 - twelve bits; borrow the next millisecond
                _last_millisecond += 1
                _counter = 0
        head = _last_millisecond << 16 | 0x7000 | _counter
    return head << 64 | 0x2 << 62 | random & (1 << 62) - 1


def _next_millisecond() -> int:
    if _clock is None:
        return HOST_TIME.microseconds() // 1_000
    return to_microseconds(_clock.now()) // 1_000


def encode_base32(number: int) -> str:
    """Return a number of 128 bits as 26 characters, without i, l, o and u, that sort like the numbers."""
    parts = []
    for _ in range(13):
        parts.append(_PAIRS[number & 1023])
        number >>= 10
    return "".join(reversed(parts))


def derive_id(prefix: str, origin: str, *parts: str) -> str:
    """Return an id that depends on `origin`, an id, and `parts` alone: equal arguments give the same id, others a
    different id.

    It has the time of `origin`, so that their rows are adjacent.
    """
    head = sum(
        ALPHABET.find(character) << 5 * place for place, character in enumerate(reversed(origin[-26:]))
    )
    hashed = blake2b(digest_size=10)
    for part in (origin, *parts):
        hashed.update(len(part).to_bytes(4, "big") + part.encode())
    number = (head >> 80 & (1 << 48) - 1) << 80 | int.from_bytes(hashed.digest(), "big")
    return f"{prefix}_{encode_base32(_set_version(number))}"


def _set_version(number: int) -> int:
    """Return `number`, of 128 bits, with the version and variant bits of a UUIDv7 set (RFC 9562, 5.7)."""
    version, variant = 0xF << 76, 0x3 << 62
    return number & ~version & ~variant | 0x7 << 76 | 0x2 << 62


def is_id(text: str) -> bool:
    """Return whether a text has the form of an id: `[A-Za-z0-9_-]{1,64}`."""
    return _ID.match(text) is not None


def shard_of(organization_id: str) -> int:
    """Return the shard for new rows of an organization, 0 to 4,095: a hash of its id."""
    return _hash(organization_id) % SHARDS


def turn_of_workflow(workflow_id: str) -> int:
    """Return the queue turn for new runs of a workflow, 0 to 1,023: a hash of its id, which orders the workflows of an
    organization in its queue.
    """
    return _hash(workflow_id) % TURNS


def _hash(text: str) -> int:
    """Return a number of 16 bits that depends on the text alone."""
    return int.from_bytes(blake2b(text.encode(), digest_size=2).digest(), "big")
