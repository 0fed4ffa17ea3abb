"""Deduplication keys of deliveries, derived from the ids that senders give them."""

from __future__ import annotations

from hashlib import sha256

import msgspec


def delivery_key(scheme: str, *names: str) -> str:
    """Return the deduplication key for these ids: printable ASCII, under 100 characters, for any input."""
    return f"{scheme}:{sha256(msgspec.json.encode(names)).hexdigest()}"


def member_delivery_key(scheme: str, value: object, member: str) -> str | None:
    """Return the deduplication key for a text member of a JSON object; None without such a member."""
    name = value.get(member) if isinstance(value, dict) else None
    return delivery_key(scheme, name) if isinstance(name, str) and name else None
