"""What all signatures have in common: secrets that are there, digests over bytes, comparison in constant time, age."""

from __future__ import annotations

import hmac
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from senders.request_refusal import RequestRefused

MAX_SIGNATURES: Final = 20
"""In one request: a sender that changes its secret gives two."""
CLOCK_SKEW: Final = timedelta(minutes=5)
"""So far the clock of a sender may be ahead of ours."""

_SECONDS: Final = re.compile(r"[0-9]{1,12}")


@dataclass(frozen=True, slots=True)
class SignatureResult:
    """The request is truly of its sender."""

    delivery_key: str | None = None
    """What the sender names this delivery by, and again when it repeats it; None: it gives it no name."""


def usable_secrets(secrets: Iterable[str]) -> Sequence[bytes]:
    """Return the secrets that are any as bytes; raises `Refused` where there is none, since that would let all in."""
    keys = [secret.encode() for secret in secrets if secret.strip()]
    if not keys:
        raise missing_secret()
    return keys


def compute_hmac(key: bytes, *parts: bytes, algorithm: str = "sha256") -> bytes:
    """Return the HMAC of parts one after the other; a large one isn't copied to be put behind the others."""
    running = hmac.new(key, digestmod=algorithm)
    for part in parts:
        running.update(part)
    return running.digest()


def require_match(given: Collection[bytes], expected: Collection[bytes]) -> None:
    """Raise `Refused` unless one of the given signatures is one of those expected, after comparing all of them."""
    if len(given) > MAX_SIGNATURES:
        raise invalid_signature()
    matches = [hmac.compare_digest(one, other) for one in given for other in expected]
    if not any(matches):
        raise invalid_signature()


def require_fresh(timestamp: str, at: datetime, *, past: timedelta, ahead: timedelta = CLOCK_SKEW) -> None:
    """Raise `Refused` unless a time, in seconds of the epoch as a sender writes it, is near to `at`."""
    if not _SECONDS.fullmatch(timestamp):
        raise RequestRefused("invalid-signature", "The time of the signature is no number of seconds")
    require_recent(int(timestamp), at, past=past, ahead=ahead)


def require_recent(seconds: float, at: datetime, *, past: timedelta, ahead: timedelta = CLOCK_SKEW) -> None:
    """Raise `Refused` unless a time in seconds of the epoch is near to `at`."""
    age = at.timestamp() - seconds
    if not -ahead.total_seconds() <= age <= past.total_seconds():
        raise RequestRefused("stale-signature", "The request was signed too long ago, or in the future")


def header_bytes(header: str) -> bytes:
    """Return the bytes of a header, whatever they are: to compare texts would fail on some of them."""
    return header.encode("latin-1")


def missing_signature(what: str) -> RequestRefused:
    """Return the refusal of a request that isn't signed."""
    return RequestRefused("missing-signature", f"The request is not signed: {what} is missing")


def invalid_signature() -> RequestRefused:
    """Return the refusal of a request that is signed, but not so; it doesn't say what is wrong with it."""
    return RequestRefused("invalid-signature", "The signature is not that of the request")


def missing_secret() -> RequestRefused:
    """Return the refusal of a request that can't be verified."""
    return RequestRefused(
        "no-secret", "No secret, or none that can be used, is configured to verify the request with"
    )
