"""Encryption of users' secrets with keys that are derived from the server's own secret.

AES-256-GCM (NIST SP 800-38D) under keys from HKDF-SHA256 (RFC 5869). A ciphertext is bound to one object of
one organization. It names the server secret of its key, so that server secrets can be rotated.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from hashlib import blake2b
from typing import TYPE_CHECKING, Final

from msgspec import Struct

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_BYTES: Final = 32
NONCE_BYTES: Final = 12
_PURPOSE: Final = b"pilotflame vault 1"


class VaultError(Exception):
    """The ciphertext can't be decrypted here."""


class UnknownSecret(VaultError):
    """The ciphertext needs a server secret that this server doesn't have."""


class SecretCorrupted(VaultError):
    """The ciphertext is corrupt, or belongs to another object."""


class EncryptedText(Struct, frozen=True):
    """Ciphertext with the id of the server secret that decrypts it."""

    secret_id: str
    content: bytes
    """Nonce, then ciphertext with its tag."""


def identify_secret(secret: bytes) -> str:
    """Return an id of a server secret, in hexadecimal, that reveals nothing of it."""
    return blake2b(secret, digest_size=8, person=b"secret id").hexdigest()


class SecretVault:
    """Encryption with the current server secret, and decryption with this one and earlier ones."""

    def __init__(self, secret: bytes, previous: Sequence[bytes] = (), *, purpose: bytes = _PURPOSE) -> None:
        """Derive keys for one purpose; texts that were encrypted for another purpose can't be decrypted.

        `previous` are earlier server secrets, with which texts can still be decrypted.
        """
        self.secret_id = identify_secret(secret)
        self._keys = {identify_secret(one): _DerivedKey(one, purpose) for one in (secret, *previous)}

    def encrypt(self, text: bytes, *, organization_id: str, object_id: str) -> EncryptedText:
        """Encrypt a text with the current secret (AES-256-GCM), so that only the same organization and object can
        decrypt it.
        """
        nonce = os.urandom(NONCE_BYTES)
        key = self._keys[self.secret_id].cipher
        return EncryptedText(
            self.secret_id,
            nonce + key.encrypt(nonce, text, _build_associated_data(organization_id, object_id)),
        )

    def decrypt(self, encrypted: EncryptedText, *, organization_id: str, object_id: str) -> bytes:
        """Decrypt a text of an object, with the current or an earlier server secret.

        Raises `UnknownSecret` if it needs another secret, and `SecretCorrupted` if it was changed or belongs to another
        object.
        """
        from cryptography.exceptions import InvalidTag  # noqa: PLC0415 - see _DerivedKey

        key = self._keys.get(encrypted.secret_id)
        if key is None:
            raise UnknownSecret(
                "The secret was encrypted with a PILOTFLAME_SECRET_KEY that this server does not have"
            )
        nonce, ciphertext = encrypted.content[:NONCE_BYTES], encrypted.content[NONCE_BYTES:]
        try:
            return key.cipher.decrypt(nonce, ciphertext, _build_associated_data(organization_id, object_id))
        except (InvalidTag, ValueError) as error:
            raise SecretCorrupted("The stored secret is corrupt, or belongs to another object") from error

    def fingerprint(self, text: bytes, *, organization_id: str, object_id: str) -> str:
        """Return a keyed hash of a secret text of one object, 12 hexadecimal digits that reveal nothing of it.

        The same text has another fingerprint for another object, and after a change of the server secret.
        """
        key = self._keys[self.secret_id].fingerprint_key
        bound = _build_associated_data(organization_id, object_id) + b"\n" + text
        return blake2b(bound, key=key, digest_size=6).hexdigest()


class _DerivedKey:
    """Key that is derived at its first use, with a library of 7 MB that many processes never load."""

    def __init__(self, secret: bytes, purpose: bytes) -> None:
        self._secret = secret
        self._purpose = purpose

    @cached_property
    def fingerprint_key(self) -> bytes:
        """Key of fingerprints; computed once."""
        return blake2b(self._secret, digest_size=64, person=b"fingerprints").digest()

    @cached_property
    def cipher(self) -> AESGCM:
        """AES-GCM cipher with the key that HKDF derives from the secret; computed once."""
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415 - see above
        from cryptography.hazmat.primitives.hashes import SHA256  # noqa: PLC0415 - see above
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF  # noqa: PLC0415 - see above

        derivation = HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=self._purpose)
        return AESGCM(derivation.derive(self._secret))


def _build_associated_data(organization_id: str, object_id: str) -> bytes:
    """Return the associated data of a ciphertext, unique for an object, since ids contain no line feed."""
    return f"{organization_id}\n{object_id}".encode()
