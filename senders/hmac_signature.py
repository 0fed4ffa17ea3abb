"""A signature by HMAC in a header, of the many kinds that senders make up for themselves."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import Final

from senders import delivery_keys, signatures
from senders.sender_request import SenderRequest
from senders.signatures import SignatureResult

TOLERANCE: Final = timedelta(minutes=5)


class SignatureAlgorithm(StrEnum):
    """What the signature is made with. SHA-1 is not among them."""

    SHA256 = "sha256"
    SHA384 = "sha384"
    SHA512 = "sha512"


class SignatureEncoding(StrEnum):
    """How the signature is written."""

    HEX = "hex"
    BASE64 = "base64"


@dataclass(frozen=True, slots=True)
class HmacScheme:
    """How a sender signs: the body, or `time.body` where it gives the time in a header."""

    header: str
    algorithm: SignatureAlgorithm = SignatureAlgorithm.SHA256
    encoding: SignatureEncoding = SignatureEncoding.HEX
    prefix: str = ""
    """Before the signature, such as `sha256=`."""
    timestamp_header: str | None = None
    """In seconds of the epoch."""
    tolerance: timedelta = TOLERANCE
    delivery_header: str | None = None
    """What the sender names a delivery in; it is not signed."""


def verify(arrival: SenderRequest, secrets: Sequence[str], scheme: HmacScheme) -> SignatureResult:
    """Return what the sender names the delivery by; raises `Refused`."""
    keys = signatures.usable_secrets(secrets)
    header = arrival.headers.single(scheme.header)
    if header is None:
        raise signatures.missing_signature(scheme.header)
    signature = header.removeprefix(scheme.prefix)
    if len(signature) + len(scheme.prefix) != len(header):
        raise signatures.invalid_signature()
    if scheme.encoding is SignatureEncoding.HEX:
        signature = signature.lower()
    before = _signed_prefix(arrival, scheme)
    arrival.require_offloaded()
    expected = [
        _encode_digest(
            signatures.compute_hmac(key, before, arrival.body, algorithm=scheme.algorithm), scheme.encoding
        )
        for key in keys
    ]
    signatures.require_match([signatures.header_bytes(signature)], expected)
    name = arrival.headers.single(scheme.delivery_header) if scheme.delivery_header else None
    return SignatureResult(delivery_keys.delivery_key("hmac", name) if name else None)


def _signed_prefix(arrival: SenderRequest, scheme: HmacScheme) -> bytes:
    """Return what is signed in front of the body."""
    if scheme.timestamp_header is None:
        return b""
    time = arrival.headers.single(scheme.timestamp_header)
    if time is None:
        raise signatures.missing_signature(scheme.timestamp_header)
    signatures.require_fresh(time, arrival.received_at, past=scheme.tolerance)
    return time.encode() + b"."


def _encode_digest(digest: bytes, encoding: SignatureEncoding) -> bytes:
    return b64encode(digest) if encoding is SignatureEncoding.BASE64 else digest.hex().encode()
