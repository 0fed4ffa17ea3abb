"""HTTP Basic: the user and the password that stand in an address which a sender was given."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field

from senders import signatures
from senders.arrival import Arrival
from senders.signatures import Verified


@dataclass(frozen=True, slots=True)
class Credentials:
    """A user and the password."""

    username: str
    password: str = field(repr=False)


def verify(arrival: Arrival, accepted: Sequence[Credentials]) -> Verified:
    """Return that the request carries the credentials of one of those; raises `Refused`."""
    expected = [
        b64encode(f"{one.username}:{one.password}".encode()) for one in accepted if one.password.strip()
    ]
    if not expected:
        raise signatures.no_secret()
    header = arrival.headers.one("Authorization") or ""
    scheme, _, credentials = header.partition(" ")
    if scheme.lower() != "basic":
        raise signatures.missing("Authorization: Basic")
    signatures.require_match([signatures.text_of(credentials.strip())], expected)
    return Verified()
