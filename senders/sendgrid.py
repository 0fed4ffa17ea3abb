"""SendGrid Inbound Parse: an ECDSA signature over time and body; the dashboard shows the public key."""

from __future__ import annotations

import binascii
from base64 import b64decode
from collections.abc import Sequence
from datetime import timedelta
from hashlib import sha256
from typing import Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_der_public_key

from senders import signatures
from senders.sender_request import SenderRequest
from senders.signatures import SignatureResult

SIGNATURE_HEADER: Final = "X-Twilio-Email-Event-Webhook-Signature"
TIME_HEADER: Final = "X-Twilio-Email-Event-Webhook-Timestamp"
TOLERANCE: Final = timedelta(days=3, hours=6)
"""SendGrid repeats a mail for three days, and doesn't document whether it signs each attempt anew. A replay
within that time is the same mail, deduplicated by its Message-ID.
"""


def verify(request: SenderRequest, public_keys: Sequence[str]) -> SignatureResult:
    """Verify the signature with one of these public keys (DER in base64); raises `RequestRefused`."""
    keys = _usable_keys(public_keys)
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
    if not any(_is_signed_with(key, signature, digest) for key in keys):
        raise signatures.invalid_signature()
    return SignatureResult()


def _usable_keys(public_keys: Sequence[str]) -> Sequence[ec.EllipticCurvePublicKey]:
    keys = []
    for text in public_keys:
        try:
            key = load_der_public_key(b64decode("".join(text.split()), validate=True))
        except (ValueError, UnsupportedAlgorithm):
            continue
        if isinstance(key, ec.EllipticCurvePublicKey):
            keys.append(key)
    if not keys:
        raise signatures.missing_secret()
    return keys


def _is_signed_with(key: ec.EllipticCurvePublicKey, signature: bytes, digest: bytes) -> bool:
    try:
        key.verify(signature, digest, ec.ECDSA(Prehashed(SHA256())))
    except InvalidSignature:
        return False
    return True
