"""The names by which a delivery is known again when its sender repeats it."""

from __future__ import annotations

from hashlib import sha256

import msgspec


def delivery_key(scheme: str, *names: str) -> str:
    """Return the key of what a sender names so: printable and under 100 characters, whatever the names hold."""
    return f"{scheme}:{sha256(msgspec.json.encode(names)).hexdigest()}"


def member_delivery_key(scheme: str, value: object, member: str) -> str | None:
    """Return the key of what names itself in a member of its JSON, or None where it doesn't."""
    name = value.get(member) if isinstance(value, dict) else None
    return delivery_key(scheme, name) if isinstance(name, str) and name else None
