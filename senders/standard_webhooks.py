"""Standard Webhooks 1.0.0: signs id, time and body with a shared secret or a private key of the sender."""

from __future__ import annotations

import binascii
from base64 import b64decode, b64encode
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from senders import sender_event, signatures
from senders.sender_event import SenderEvent
from senders.sender_request import SenderRequest
from senders.signatures import SignatureResult

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

SOURCE: Final = "standard-webhooks"
TOLERANCE: Final = timedelta(minutes=5)
"""As in the standard: each attempt is signed anew, under the same id."""
SECRET_PREFIX: Final = "whsec_"  # noqa: S105 - prefix of secrets
PUBLIC_KEY_PREFIX: Final = "whpk_"
HEADER_PREFIXES: Final = ("webhook", "svix")
"""Prefixes of the standard and of Svix, its origin: the same headers under other names."""


def verify(
    request: SenderRequest, secrets: Sequence[str], *, tolerance: timedelta = TOLERANCE
) -> SignatureResult:
    """Verify the signature and return the deduplication key of the message; raises `RequestRefused`.

    Secrets are in base64, optionally after `whsec_`; keys after `whpk_` are public keys. A message older than
    `tolerance` is refused.
    """
    keys, verifying_keys = _split_secrets(secrets)
    name, time, header = (_read_signed_header(request, suffix) for suffix in ("id", "timestamp", "signature"))
    if not name or time is None or header is None:
        raise signatures.missing_signature("webhook-id, webhook-timestamp or webhook-signature")
    signatures.require_fresh(time, request.received_at, past=tolerance)
    given = [signatures.header_bytes(signature) for signature in header.split(" ")]
    if len(given) > signatures.MAX_SIGNATURES:
        raise signatures.invalid_signature()
    request.require_offloaded()
    prefix = b"%s.%s." % (signatures.header_bytes(name), time.encode())
    expected = [b"v1," + b64encode(signatures.compute_hmac(key, prefix, request.body)) for key in keys]
    if not _is_signed_with(verifying_keys, given, prefix, request.body):
        signatures.require_match(given, expected)
    return SignatureResult(signatures.delivery_key(SOURCE, name))


def parse_event(request: SenderRequest) -> SenderEvent:
    """Return the event of a payload in the format that the standard recommends; raises `RequestRefused`."""
    payload = sender_event.require_object(request.json, "The payload")
    name = _read_signed_header(request, "id") or None
    return SenderEvent(
        sender_event.require_text_member(payload, "type", "The payload"),
        SOURCE,
        payload.get("data", {}),
        name,
        None if name is None else signatures.delivery_key(SOURCE, name),
    )


def signature_headers() -> Sequence[str]:
    """Return the names of the headers that can contain the signature, one per prefix."""
    return [f"{prefix}-signature" for prefix in HEADER_PREFIXES]


def _read_signed_header(request: SenderRequest, suffix: str) -> str | None:
    """Return the header with this suffix and the prefix of the signature header, or None.

    Id and time under other prefixes are not signed. Raises `RequestRefused` for a repeated header.
    """
    prefix = next(
        (each for each in HEADER_PREFIXES if f"{each}-signature" in request.headers), HEADER_PREFIXES[0]
    )
    return request.headers.single(f"{prefix}-{suffix}")


def _split_secrets(secrets: Sequence[str]) -> tuple[Sequence[bytes], Sequence[Ed25519PublicKey]]:
    """Return secrets and public keys separately; raises `RequestRefused` if none is usable."""
    keys: list[bytes] = []
    verifying_keys: list[Ed25519PublicKey] = []
    for secret in secrets:
        is_public = secret.startswith(PUBLIC_KEY_PREFIX)
        try:
            key = b64decode(
                secret.removeprefix(PUBLIC_KEY_PREFIX if is_public else SECRET_PREFIX), validate=True
            )
            if is_public:
                from senders import public_keys  # noqa: PLC0415 - loads cryptography

                verifying_keys.append(public_keys.read_ed25519_key(key))
            elif key:
                keys.append(key)
        except ValueError:
            continue
    if not keys and not verifying_keys:
        raise signatures.missing_secret()
    return keys, verifying_keys


def _is_signed_with(
    verifying_keys: Sequence[Ed25519PublicKey], given: Sequence[bytes], prefix: bytes, body: bytes
) -> bool:
    """Return whether a `v1a` signature was made with the private key of one of these public keys."""
    signed = [signature.removeprefix(b"v1a,") for signature in given if signature.startswith(b"v1a,")]
    if not signed or not verifying_keys:
        return False
    from senders import public_keys  # noqa: PLC0415 - loads cryptography

    message = prefix + body
    for signature in signed:
        try:
            decoded = b64decode(signature, validate=True)
        except binascii.Error:
            continue
        if any(public_keys.is_ed25519_signed(key, decoded, message) for key in verifying_keys):
            return True
    return False
