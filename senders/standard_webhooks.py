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
    """Verify a Standard Webhooks signature, at most `tolerance` old, with any of the secrets or public keys.

    Secrets are in base64, optionally after `whsec_`; texts after `whpk_` are Ed25519 public keys. Headers
    begin with `webhook-` or `svix-`. Returns the deduplication key made from the message id. Raises
    `RequestRefused` for a missing, wrong or stale signature, for over 20 signatures, and without a usable
    secret, and `BudgetExceeded` as `SenderRequest.require_offloaded` does.
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
    """Return the event of a JSON payload with `type` and `data`, as the standard recommends.

    Data is an empty object if it is missing; the id is None without its header. Raises `RequestRefused` for a
    payload that is no object, or without a type.
    """
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
    """Return the header names that can contain the signature: `webhook-signature` and `svix-signature`."""
    return [f"{prefix}-signature" for prefix in HEADER_PREFIXES]


def _read_signed_header(request: SenderRequest, suffix: str) -> str | None:
    """Return the header `<prefix>-<suffix>`, with the prefix that the request's signature header has; None
    without it.

    Id and time under the other prefix are not signed. Raises `RequestRefused` for a repeated header.
    """
    prefix = next(
        (each for each in HEADER_PREFIXES if f"{each}-signature" in request.headers), HEADER_PREFIXES[0]
    )
    return request.headers.single(f"{prefix}-{suffix}")


def _split_secrets(secrets: Sequence[str]) -> tuple[Sequence[bytes], Sequence[Ed25519PublicKey]]:
    """Return symmetric secrets and Ed25519 public keys (those after `whpk_`), decoded; invalid ones are ignored.

    Raises `RequestRefused` if none is usable.
    """
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
    """Return whether a `v1a` signature (Ed25519) was made with the private key of one of these public keys.

    The signed message is `prefix` followed by `body`. Malformed signatures are skipped; False without a `v1a`
    signature or without keys.
    """
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
