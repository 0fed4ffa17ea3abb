"""HTTP Basic authentication (RFC 7617) with the user and password of a URL that was configured at a sender."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field

from senders import signatures
from senders.sender_request import SenderRequest
from senders.signatures import SignatureResult


@dataclass(frozen=True, slots=True)
class BasicCredentials:
    """User and password of a URL."""

    username: str
    password: str = field(repr=False)


def verify(request: SenderRequest, accepted: Sequence[BasicCredentials]) -> SignatureResult:
    """Verify the Basic credentials of a request against the accepted ones, in constant time.

    Accepted credentials with a blank password are ignored. Returns a result without a deduplication key.
    Raises `RequestRefused`: without a usable credential, without a Basic `Authorization` header, and for a
    wrong user or password.
    """
    expected = [
        b64encode(f"{one.username}:{one.password}".encode()) for one in accepted if one.password.strip()
    ]
    if not expected:
        raise signatures.missing_secret()
    header = request.headers.single("Authorization") or ""
    scheme, _, credentials = header.partition(" ")
    if scheme.lower() != "basic":
        raise signatures.missing_signature("Authorization: Basic")
    signatures.require_match([signatures.header_bytes(credentials.strip())], expected)
    return SignatureResult()
