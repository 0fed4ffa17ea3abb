"""SendGrid Inbound Parse: an ECDSA signature over time and body; the dashboard shows the public key."""

from __future__ import annotations

import binascii
from base64 import b64decode
from collections.abc import Sequence
from datetime import timedelta
from hashlib import sha256
from typing import TYPE_CHECKING, Final

from senders import signatures
from senders.sender_request import SenderRequest
from senders.signatures import SignatureResult

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

SIGNATURE_HEADER: Final = "X-Twilio-Email-Event-Webhook-Signature"
TIME_HEADER: Final = "X-Twilio-Email-Event-Webhook-Timestamp"
TOLERANCE: Final = timedelta(days=3, hours=6)
"""SendGrid repeats a mail for three days, and doesn't document whether it signs each attempt anew. A replay
within that time is the same mail, deduplicated by its Message-ID.
"""


def verify(request: SenderRequest, keys_in_base64: Sequence[str]) -> SignatureResult:
    """Verify SendGrid's ECDSA signature, at most 3 days and 6 hours old, with any of the public keys.

    Keys are DER in base64; unusable ones are ignored. The result has no deduplication key. Raises
    `RequestRefused` for a missing, wrong or stale signature, and without a usable key, and `BudgetExceeded` as
    `SenderRequest.require_offloaded` does.
    """
    from senders import public_keys  # noqa: PLC0415 - loads cryptography

    keys = _usable_keys(keys_in_base64)
    time = request.headers.single(TIME_HEADER)
    header = request.headers.single(SIGNATURE_HEADER)
    if time is None or header is None:
        raise signatures.missing_signature(f"{SIGNATURE_HEADER} or {TIME_HEADER}")
    signatures.require_fresh(time, request.received_at, past=TOLERANCE)
    try:
        signature = b64decode(signatures.header_bytes(header), validate=True)
    except binascii.Error as error:
        raise signatures.invalid_signature() from error
    request.require_offloaded()
    signed = sha256(time.encode())
    signed.update(request.body)
    digest = signed.digest()
    if not any(public_keys.is_ecdsa_signed(key, signature, digest) for key in keys):
        raise signatures.invalid_signature()
    return SignatureResult()


def _usable_keys(keys_in_base64: Sequence[str]) -> Sequence[EllipticCurvePublicKey]:
    """Return the keys that are elliptic-curve public keys in base64 DER; others are ignored.

    Raises `RequestRefused` if none is usable.
    """
    from senders import public_keys  # noqa: PLC0415 - loads cryptography

    keys = []
    for text in keys_in_base64:
        try:
            der = b64decode("".join(text.split()), validate=True)
        except ValueError:
            continue
        if (key := public_keys.read_ecdsa_key(der)) is not None:
            keys.append(key)
    if not keys:
        raise signatures.missing_secret()
    return keys
