"""Keys by which what is sent twice is known, where the sender gives none in the header that is for that."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from typing import Final

from gateway.http import idempotency, limits
from journal.store import IdempotencyKey

YEAR_SECONDS: Final = 366 * 86_400
"""Longer than most keep what is settled."""
WEEK_SECONDS: Final = 7 * 86_400
"""For keys that are taken from what providers send: longer than they try again for."""


def sender_key(workflow_id: str, deduplication_id: str) -> IdempotencyKey:
    """Return the key of a message that its producer has named; two of that name are one, whatever stands in them."""
    return _build_key("deduplication", workflow_id, deduplication_id, limits.IDEMPOTENCY_SECONDS)


def derive_key(kind: str, place: str, key: str, *, content: str = "") -> IdempotencyKey:
    """Return the key of what a provider has sent to a `place`, a workflow or an organisation, by the name it gave it.

    Bodies are not compared, since providers sign anew what they send again; what is given as `content` is.
    """
    return replace(_build_key(kind, place, key, WEEK_SECONDS), fingerprint=content)


def redrive_key(workflow_id: str, resource_id: str) -> IdempotencyKey:
    """Return the key that something of a workflow takes when it is run once more by a list, or put aside for good."""
    return _build_key("settled", workflow_id, resource_id, YEAR_SECONDS)


def _build_key(kind: str, place: str, key: str, lifetime_seconds: int) -> IdempotencyKey:
    scope = sha256(f"{kind}\n{place}".encode()).hexdigest()
    text = key if idempotency.is_key(key) else sha256(key.encode()).hexdigest()
    return IdempotencyKey(scope, text, "", lifetime_seconds)
