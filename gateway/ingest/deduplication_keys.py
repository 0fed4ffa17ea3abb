"""Deduplication keys, for requests without the header `Idempotency-Key`."""

from __future__ import annotations

from dataclasses import astuple, replace
from hashlib import sha256
from typing import Final

import msgspec

from gateway.http import idempotency, limits
from journal.store import IdempotencyKey
from json_text import decoding

YEAR_SECONDS: Final = 366 * 86_400
"""Longer than the usual retention of redriven and purged runs."""
WEEK_SECONDS: Final = 7 * 86_400
"""For keys derived from the ids of providers; longer than the providers retry."""


def sender_key(workflow_id: str, deduplication_id: str) -> IdempotencyKey:
    """Return the key of a message with a `deduplicationId`; its content doesn't count."""
    return _build_key("deduplication", workflow_id, deduplication_id, limits.IDEMPOTENCY_SECONDS)


def derive_key(kind: str, place: str, key: str, *, content: str = "") -> IdempotencyKey:
    """Return the key of a provider's request to a `place`, from the provider's own id.

    A place is a workflow or an organization. Bodies are not compared, since providers sign again when they
    retry; `content` is compared.
    """
    return replace(_build_key(kind, place, key, WEEK_SECONDS), fingerprint=content)


def redrive_key(workflow_id: str, resource_id: str) -> IdempotencyKey:
    """Return the key that a dead letter or delivery uses up when it is redriven by a list or purged."""
    return _build_key("settled", workflow_id, resource_id, YEAR_SECONDS)


def encode_key(key: IdempotencyKey) -> str:
    """Return a key as a delivery stores it, so that a redrive and a sender's repetition share the key."""
    return msgspec.json.encode(astuple(key)).decode()


def decode_key(text: str) -> IdempotencyKey:
    """Return the key that a delivery stores."""
    return IdempotencyKey(*decoding.decode(text, tuple[str, str, str, int]))


def _build_key(kind: str, place: str, key: str, lifetime_seconds: int) -> IdempotencyKey:
    scope = sha256(f"{kind}\n{place}".encode()).hexdigest()
    text = key if idempotency.is_key(key) else sha256(key.encode()).hexdigest()
    return IdempotencyKey(scope, text, "", lifetime_seconds)
