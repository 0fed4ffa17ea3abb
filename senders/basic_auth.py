"""HTTP Basic: the user and the password that stand in an address which a sender was given."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field

from senders import signatures
from senders.sender_request import SenderRequest
from senders.signatures import SignatureResult


@dataclass(frozen=True, slots=True)
class BasicCredentials:
    """A user and the password."""

    username: str
    password: str = field(repr=False)


def verify(arrival: SenderRequest, accepted: Sequence[BasicCredentials]) -> SignatureResult:
    """Return that the request carries the credentials of one of those; raises `Refused`."""
    expected = [
        b64encode(f"{one.username}:{one.password}".encode()) for one in accepted if one.password.strip()
    ]
    if not expected:
        raise signatures.missing_secret()
    header = arrival.headers.single("Authorization") or ""
    scheme, _, credentials = header.partition(" ")
    if scheme.lower() != "basic":
        raise signatures.missing_signature("Authorization: Basic")
    signatures.require_match([signatures.header_bytes(credentials.strip())], expected)
    return SignatureResult()
