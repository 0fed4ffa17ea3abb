"""Idempotency keys as deliveries keep them, so that a redrive and a repetition by the sender use up the same one."""

from __future__ import annotations

from dataclasses import astuple

import msgspec

from journal.store import IdempotencyKey
from json_text import decoding


def encode_key(key: IdempotencyKey) -> str:
    """Return a key as a column holds it."""
    return msgspec.json.encode(astuple(key)).decode()


def decode_key(text: str) -> IdempotencyKey:
    """Return the key that a column holds."""
    return IdempotencyKey(*decoding.decode(text, tuple[str, str, str, int]))
