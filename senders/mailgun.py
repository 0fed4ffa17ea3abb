"""Mailgun: signs a time and a token, and of the mail nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import timedelta
from typing import Final

from engine.values import Json
from senders import delivery_keys, forms, signatures
from senders.arrival import Arrival
from senders.signatures import Verified

TOLERANCE: Final = timedelta(hours=12)
"""Mailgun repeats a mail for eight hours, warns of delays, and doesn't say whether it signs it anew."""

_NAMES: Final = ("timestamp", "token", "signature")
_TIME: Final = re.compile(r"[0-9]{10}")
_TOKEN: Final = re.compile(r"[0-9a-f]{50}")


def verify(arrival: Arrival, signing_keys: Sequence[str]) -> Verified:
    """Return the token as the name of the delivery; raises `Refused`.

    Whoever has seen a signature can put it on another mail. So a token is good for one delivery: it has to be
    remembered for longer than the tolerance, from the moment at which its mail is accepted.
    """
    keys = signatures.usable(signing_keys)
    time, token, signature = _signature(arrival)
    # Where one ends and the other begins is not signed: their lengths say it.
    if not _TIME.fullmatch(time) or not _TOKEN.fullmatch(token):
        raise signatures.invalid()
    signatures.require_fresh(time, arrival.at, past=TOLERANCE)
    expected = [signatures.digest(key, time.encode(), token.encode()).hex().encode() for key in keys]
    signatures.require_match([signature.encode()], expected)
    return Verified(delivery_keys.of("mailgun", token))


def _signature(arrival: Arrival) -> tuple[str, str, str]:
    """Return time, token and signature: fields of a form, or members of an object of a JSON body.

    Header lines of the mail are fields too. They come before the signature, so of equal names the last one counts.
    """
    given: Sequence[Json]
    if arrival.media_type.is_json:
        members = arrival.json.get("signature") if isinstance(arrival.json, dict) else None
        given = [members.get(name) if isinstance(members, dict) else None for name in _NAMES]
    else:
        found = [arrival.form.last(name) for name in _NAMES]
        given = [None if value is None else forms.decoded(value) for value in found]
    texts = [value for value in given if isinstance(value, str)]
    if len(texts) != len(_NAMES):
        raise signatures.missing("timestamp, token or signature")
    time, token, signature = texts
    return time, token, signature
