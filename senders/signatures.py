"""Common parts of signature checks: usable secrets, HMAC, comparison in constant time, age, and delivery keys."""

from __future__ import annotations

import hmac
import re
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Final

import msgspec
from msgspec import Struct

from senders.request_refusal import RequestRefused

MAX_SIGNATURES: Final = 20
"""Maximum number of signatures in a request; a sender that rotates its secret sends two."""
CLOCK_SKEW: Final = timedelta(minutes=5)
"""Maximum time by which the clock of a sender may be ahead of the server's."""

_SECONDS: Final = re.compile(r"[0-9]{1,12}")


class SignatureResult(Struct, frozen=True):
    """Result of a successful verification."""

    delivery_key: str | None = None
    """Deduplication key from the sender's id of the delivery; None without an id."""


def usable_secrets(secrets: Iterable[str]) -> Sequence[bytes]:
    """Return the non-blank secrets as UTF-8 bytes; raises `RequestRefused` if there is none.

    With no secret at all, anybody could sign.
    """
    keys = [secret.encode() for secret in secrets if secret.strip()]
    if not keys:
        raise missing_secret()
    return keys


def compute_hmac(key: bytes, *parts: bytes, algorithm: str = "sha256") -> bytes:
    """Return the HMAC digest over consecutive parts, as if joined, without a copy of a large body.

    `algorithm` is a name of `hashlib`.
    """
    running = hmac.new(key, digestmod=algorithm)
    for part in parts:
        running.update(part)
    return running.digest()


def require_match(given: Collection[bytes], expected: Collection[bytes]) -> None:
    """Require one given signature to equal an expected one; all pairs are compared, in constant time.

    Raises `RequestRefused` if none matches, and for more than 20 given signatures.
    """
    if len(given) > MAX_SIGNATURES:
        raise invalid_signature()
    matches = [hmac.compare_digest(one, other) for one in given for other in expected]
    if not any(matches):
        raise invalid_signature()


def require_fresh(timestamp: str, at: datetime, *, past: timedelta, ahead: timedelta = CLOCK_SKEW) -> None:
    """Require a decimal text of seconds since the epoch to be at most `past` before and `ahead` after `at`.

    `ahead` is 5 minutes by default, for clocks that differ. Raises `RequestRefused` for an older or later
    time, and for a text that is not 1 to 12 digits.
    """
    if not _SECONDS.fullmatch(timestamp):
        raise RequestRefused("invalid-signature", "The time of the signature is not a number of seconds")
    require_recent(int(timestamp), at, past=past, ahead=ahead)


def require_recent(seconds: float, at: datetime, *, past: timedelta, ahead: timedelta = CLOCK_SKEW) -> None:
    """Require a time in seconds since the epoch to be at most `past` before and `ahead` after `at`.

    `ahead` is 5 minutes by default, for clocks that differ. Raises `RequestRefused` with the code
    `stale-signature`.
    """
    age = at.timestamp() - seconds
    if not -ahead.total_seconds() <= age <= past.total_seconds():
        raise RequestRefused("stale-signature", "The request was signed too long ago, or in the future")


def header_bytes(header: str) -> bytes:
    """Return a header value as Latin-1 bytes for a comparison.

    `hmac.compare_digest` raises for texts that aren't ASCII.
    """
    return header.encode("latin-1")


def missing_signature(what: str) -> RequestRefused:
    """Return (not raise) the refusal of a request without signature; `what` names the missing header or field."""
    return RequestRefused("missing-signature", f"The request is not signed: {what} is missing")


def invalid_signature() -> RequestRefused:
    """Return (not raise) the refusal of a request with a wrong signature; it gives no details."""
    return RequestRefused("invalid-signature", "The signature does not match the request")


def missing_secret() -> RequestRefused:
    """Return (not raise) the refusal of a request for which no usable secret is configured."""
    return RequestRefused("no-secret", "No usable secret is configured to verify the request with")


# ── delivery keys ───────────────────────────────────────────────────────────────────────────────────────────


def delivery_key(scheme: str, *names: str) -> str:
    """Return the deduplication key for these ids: the scheme, and a SHA-256 of all names.

    Printable ASCII under 100 characters for any input; equal ids in the same order give the same key.
    """
    return f"{scheme}:{sha256(msgspec.json.encode(names)).hexdigest()}"


def member_delivery_key(scheme: str, value: object, member: str) -> str | None:
    """Return the deduplication key, which begins with `scheme`, for a non-empty text member of a JSON object.

    None without such a member, and for a value that is no object.
    """
    name = value.get(member) if isinstance(value, dict) else None
    return delivery_key(scheme, name) if isinstance(name, str) and name else None
