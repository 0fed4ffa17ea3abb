"""What a deployment's pods and the gateway know one another by.

A token is made of the server's secret and a row's id, so that the deployer can hand it out again and nobody stores it;
what is stored is its hash, and what the gateway shows a pod is made of that: the token itself goes one way only.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Final

from models.ids import ALPHABET

PREFIX: Final = "rt-"
_ROUTING_CODE: Final = "00"
"""There before there is more than one place to route to."""
_CHARACTERS: Final = 52


def derive_token(token_id: str, secret: bytes) -> str:
    """Return the token of a row: `rt-`, a routing code of two characters, 260 bits."""
    key = blake2b(secret, digest_size=64, person=b"runner tokens").digest()
    number = int.from_bytes(blake2b(token_id.encode(), key=key, digest_size=33).digest(), "big")
    return (
        PREFIX + _ROUTING_CODE + "".join(ALPHABET[number >> 5 * place & 31] for place in range(_CHARACTERS))
    )


def hash_token(token: str) -> str:
    """Return what is stored of a token: it has too many random bits for anybody to find it by trying."""
    return blake2b(token.encode(), digest_size=32, person=b"runner token").hexdigest()


def wakeup_key(hashed: str) -> str:
    """Return what a pod takes wakeups by, made of the hash of its token."""
    return blake2b(hashed.encode(), digest_size=32, person=b"runner wakeups").hexdigest()
