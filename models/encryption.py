"""Secrets of users as they are kept: sealed with keys that are derived from the server's own secret.

AES-256-GCM (NIST SP 800-38D) under keys from HKDF-SHA256 (RFC 5869). What is sealed for one object of one organisation
can't be opened as another's, and says by which of the server's secrets it was sealed, so that they can be changed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_BYTES: Final = 32
NONCE_BYTES: Final = 12
_PURPOSE: Final = b"pilotflame vault 1"


class VaultError(Exception):
    """What is sealed can't be opened here."""


class UnknownSecret(VaultError):
    """It was sealed by a secret that the server isn't told of."""


class SecretCorrupted(VaultError):
    """It is not what was sealed for this object."""


@dataclass(frozen=True, slots=True)
class EncryptedText:
    """A sealed text, and the id of the secret that opens it."""

    secret_id: str
    content: bytes
    """A nonce, then the ciphertext with its tag."""


def identify_secret(secret: bytes) -> str:
    """Return what tells one of the server's secrets from another without telling anything of it."""
    return blake2b(secret, digest_size=8, person=b"secret id").hexdigest()


class SecretVault:
    """Seals by the server's secret of now, and opens what that one or an earlier one has sealed."""

    def __init__(self, secret: bytes, previous: Sequence[bytes] = ()) -> None:
        self.secret_id = identify_secret(secret)
        self._keys = {identify_secret(one): _DerivedKey(one) for one in (secret, *previous)}

    def seal(self, text: bytes, *, organization_id: str, object_id: str) -> EncryptedText:
        """Return a text sealed for one object."""
        nonce = os.urandom(NONCE_BYTES)
        key = self._keys[self.secret_id].cipher
        return EncryptedText(
            self.secret_id, nonce + key.encrypt(nonce, text, _associated_data(organization_id, object_id))
        )

    def open(self, encrypted: EncryptedText, *, organization_id: str, object_id: str) -> bytes:
        """Return what was sealed for one object; raises `UnknownSecret` and `Damaged`."""
        from cryptography.exceptions import InvalidTag  # noqa: PLC0415 - see _Key

        key = self._keys.get(encrypted.secret_id)
        if key is None:
            raise UnknownSecret(
                "It was encrypted with another PILOTFLAME_SECRET_KEY than those of this server"
            )
        nonce, ciphertext = encrypted.content[:NONCE_BYTES], encrypted.content[NONCE_BYTES:]
        try:
            return key.cipher.decrypt(nonce, ciphertext, _associated_data(organization_id, object_id))
        except (InvalidTag, ValueError) as error:
            raise SecretCorrupted("What is stored is not what was encrypted for it") from error


class _DerivedKey:
    """A key that is derived when it is first needed, with a library that many processes never load: 7 MB."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    @cached_property
    def cipher(self) -> AESGCM:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415 - see above
        from cryptography.hazmat.primitives.hashes import SHA256  # noqa: PLC0415 - see above
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF  # noqa: PLC0415 - see above

        derivation = HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=_PURPOSE)
        return AESGCM(derivation.derive(self._secret))


def _associated_data(organization_id: str, object_id: str) -> bytes:
    """Return what is bound to a sealed text: ids hold no line feed, so no two objects have the same."""
    return f"{organization_id}\n{object_id}".encode()
