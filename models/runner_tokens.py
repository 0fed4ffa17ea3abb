"""Tokens with which pods and the gateway authenticate each other.

A token is derived from the server's secret and a row's id. So the deployer can derive it again, and nobody
stores it. Rows store its hash. The gateway authenticates to pods with a key that is derived from this
hash, so that it never sends the token itself.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Final

from models.ids import ALPHABET

PREFIX: Final = "rt-"
_ROUTING_CODE: Final = "00"
"""Reserved for routing between regions, part of tokens from the start."""
_CHARACTERS: Final = 52


def derive_token(token_id: str, secret: bytes) -> str:
    """Derive a pod's token from its id and the server's secret: `rt-`, a routing code of two characters, 260 bits."""
    key = blake2b(secret, digest_size=64, person=b"runner tokens").digest()
    number = int.from_bytes(blake2b(token_id.encode(), key=key, digest_size=33).digest(), "big")
    return (
        PREFIX + _ROUTING_CODE + "".join(ALPHABET[number >> 5 * place & 31] for place in range(_CHARACTERS))
    )


def hash_token(token: str) -> str:
    """Return the stored hash of a token, unkeyed, since a token has too many random bits to be guessed."""
    return blake2b(token.encode(), digest_size=32, person=b"runner token").hexdigest()


def wakeup_key(hashed: str) -> str:
    """Derive the key that authenticates wakeups of a pod, from the hash of its token."""
    return blake2b(hashed.encode(), digest_size=32, person=b"runner wakeups").hexdigest()
