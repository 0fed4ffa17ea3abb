"""Encoding of idempotency keys in deliveries, so that a redrive and a sender's repetition share a key."""

from __future__ import annotations

from dataclasses import astuple

import msgspec

from journal.store import IdempotencyKey
from json_text import decoding


def encode_key(key: IdempotencyKey) -> str:
    """Return the encoded key for a column."""
    return msgspec.json.encode(astuple(key)).decode()


def decode_key(text: str) -> IdempotencyKey:
    """Return the key that a column contains."""
    return IdempotencyKey(*decoding.decode(text, tuple[str, str, str, int]))
