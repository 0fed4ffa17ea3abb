"""A signature by HMAC in a header, of the many kinds that senders make up for themselves."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import Final

from senders import delivery_keys, signatures
from senders.arrival import Arrival
from senders.signatures import Verified

TOLERANCE: Final = timedelta(minutes=5)


class Algorithm(StrEnum):
    """What the signature is made with. SHA-1 is not among them."""

    SHA256 = "sha256"
    SHA384 = "sha384"
    SHA512 = "sha512"


class Encoding(StrEnum):
    """How the signature is written."""

    HEX = "hex"
    BASE64 = "base64"


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a sender signs: the body, or `time.body` where it gives the time in a header."""

    header: str
    algorithm: Algorithm = Algorithm.SHA256
    encoding: Encoding = Encoding.HEX
    prefix: str = ""
    """Before the signature, such as `sha256=`."""
    timestamp_header: str | None = None
    """In seconds of the epoch."""
    tolerance: timedelta = TOLERANCE
    delivery_header: str | None = None
    """What the sender names a delivery in; it is not signed."""


def verify(arrival: Arrival, secrets: Sequence[str], scheme: Scheme) -> Verified:
    """Return what the sender names the delivery by; raises `Refused`."""
    keys = signatures.usable(secrets)
    header = arrival.headers.one(scheme.header)
    if header is None:
        raise signatures.missing(scheme.header)
    signature = header.removeprefix(scheme.prefix)
    if len(signature) + len(scheme.prefix) != len(header):
        raise signatures.invalid()
    if scheme.encoding is Encoding.HEX:
        signature = signature.lower()
    before = _signed_before(arrival, scheme)
    arrival.require_patience()
    expected = [
        _written(signatures.digest(key, before, arrival.body, algorithm=scheme.algorithm), scheme.encoding)
        for key in keys
    ]
    signatures.require_match([signatures.text_of(signature)], expected)
    name = arrival.headers.one(scheme.delivery_header) if scheme.delivery_header else None
    return Verified(delivery_keys.of("hmac", name) if name else None)


def _signed_before(arrival: Arrival, scheme: Scheme) -> bytes:
    """Return what is signed in front of the body."""
    if scheme.timestamp_header is None:
        return b""
    time = arrival.headers.one(scheme.timestamp_header)
    if time is None:
        raise signatures.missing(scheme.timestamp_header)
    signatures.require_fresh(time, arrival.at, past=scheme.tolerance)
    return time.encode() + b"."


def _written(digest: bytes, encoding: Encoding) -> bytes:
    return b64encode(digest) if encoding is Encoding.BASE64 else digest.hex().encode()
