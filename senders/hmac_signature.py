"""Configurable HMAC signature in a header, for senders without a parser of their own."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from datetime import timedelta
from enum import StrEnum
from typing import Final

from msgspec import Struct

from senders import signatures
from senders.sender_request import SenderRequest
from senders.signatures import SignatureResult

TOLERANCE: Final = timedelta(minutes=5)


class SignatureAlgorithm(StrEnum):
    """Hash algorithm of a signature; SHA-1 is not accepted."""

    SHA256 = "sha256"
    SHA384 = "sha384"
    SHA512 = "sha512"


class SignatureEncoding(StrEnum):
    """Text encoding of a signature."""

    HEX = "hex"
    BASE64 = "base64"


class HmacScheme(Struct, frozen=True):
    """Signature scheme of a sender: signs the body, or `time.body` if the time is in a header."""

    header: str
    algorithm: SignatureAlgorithm = SignatureAlgorithm.SHA256
    encoding: SignatureEncoding = SignatureEncoding.HEX
    prefix: str = ""
    """Text in front of the signature, such as `sha256=`."""
    timestamp_header: str | None = None
    """Header with the time in seconds since the epoch."""
    tolerance: timedelta = TOLERANCE
    delivery_header: str | None = None
    """Header with the id of the delivery; it is not signed."""


def verify(request: SenderRequest, secrets: Sequence[str], scheme: HmacScheme) -> SignatureResult:
    """Verify the signature of a request by a configured HMAC scheme, with any of the secrets.

    Returns the deduplication key made from the scheme's delivery header, None if the scheme or the request
    has none. A prefix of the header value, such as `sha256=`, is required if the scheme names one. Raises
    `RequestRefused` for a missing, wrong or stale signature, and without a non-blank secret, and `BudgetExceeded` as
    `SenderRequest.require_offloaded` does.
    """
    keys = signatures.usable_secrets(secrets)
    header = request.headers.single(scheme.header)
    if header is None:
        raise signatures.missing_signature(scheme.header)
    signature = header.removeprefix(scheme.prefix)
    if len(signature) + len(scheme.prefix) != len(header):
        raise signatures.invalid_signature()
    if scheme.encoding is SignatureEncoding.HEX:
        signature = signature.lower()
    before = _build_signed_prefix(request, scheme)
    request.require_offloaded()
    expected = [
        _encode_digest(
            signatures.compute_hmac(key, before, request.body, algorithm=scheme.algorithm), scheme.encoding
        )
        for key in keys
    ]
    signatures.require_match([signatures.header_bytes(signature)], expected)
    name = request.headers.single(scheme.delivery_header) if scheme.delivery_header else None
    return SignatureResult(signatures.delivery_key("hmac", name) if name else None)


def _build_signed_prefix(request: SenderRequest, scheme: HmacScheme) -> bytes:
    """Return the signed bytes in front of the body: the timestamp and a dot, if the scheme has one.

    Raises `RequestRefused` for a missing or stale timestamp.
    """
    if scheme.timestamp_header is None:
        return b""
    time = request.headers.single(scheme.timestamp_header)
    if time is None:
        raise signatures.missing_signature(scheme.timestamp_header)
    signatures.require_fresh(time, request.received_at, past=scheme.tolerance)
    return time.encode() + b"."


def _encode_digest(digest: bytes, encoding: SignatureEncoding) -> bytes:
    return b64encode(digest) if encoding is SignatureEncoding.BASE64 else digest.hex().encode()
