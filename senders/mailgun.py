"""Mailgun webhooks: the signature covers a time and a token, and nothing of the mail."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import timedelta
from typing import Final

from engine.values import Json
from senders import sender_request, signatures
from senders.sender_request import SenderRequest
from senders.signatures import SignatureResult

TOLERANCE: Final = timedelta(hours=12)
"""Mailgun repeats a mail for eight hours, warns of delays, and doesn't document whether it signs each attempt
anew.
"""

_SIGNATURE_FIELDS: Final = ("timestamp", "token", "signature")
_TIME: Final = re.compile(r"[0-9]{10}")
_TOKEN: Final = re.compile(r"[0-9a-f]{50}")


def verify(request: SenderRequest, signing_keys: Sequence[str]) -> SignatureResult:
    """Verify Mailgun's HMAC-SHA-256 signature, at most 12 hours old, with any of the signing keys.

    The signature covers only time and token, so an observed one could be put on another mail. So a token is
    valid for one delivery: the returned deduplication key has to be remembered for longer than 12 hours, from
    the moment at which its mail is accepted. Raises `RequestRefused` for a missing, wrong or stale signature
    and without a non-blank key, and `BudgetExceeded` as the accessors of `SenderRequest` do.
    """
    keys = signatures.usable_secrets(signing_keys)
    time, token, signature = _signature_fields(request)
    # The boundary between time and token is not signed: their fixed lengths define it.
    if not _TIME.fullmatch(time) or not _TOKEN.fullmatch(token):
        raise signatures.invalid_signature()
    signatures.require_fresh(time, request.received_at, past=TOLERANCE)
    expected = [signatures.compute_hmac(key, time.encode(), token.encode()).hex().encode() for key in keys]
    signatures.require_match([signature.encode()], expected)
    return SignatureResult(signatures.delivery_key("mailgun", token))


def _signature_fields(request: SenderRequest) -> tuple[str, str, str]:
    """Return time, token and signature: fields of a form, or members of an object of a JSON body.

    Headers of the mail are fields too, in front of the signature: of equal names the last one counts. Raises
    `RequestRefused` if one is missing.
    """
    given: Sequence[Json]
    if request.media_type.is_json:
        members = request.json.get("signature") if isinstance(request.json, dict) else None
        given = [members.get(name) if isinstance(members, dict) else None for name in _SIGNATURE_FIELDS]
    else:
        found = [request.form.last(name) for name in _SIGNATURE_FIELDS]
        given = [None if value is None else sender_request.decode_value(value) for value in found]
    texts = [value for value in given if isinstance(value, str)]
    if len(texts) != len(_SIGNATURE_FIELDS):
        raise signatures.missing_signature("timestamp, token or signature")
    time, token, signature = texts
    return time, token, signature
