"""Public keys and certificates of senders, and the verification of their signatures.

Other modules import this one at its first use: it alone loads `cryptography`, a tenth of a start, and few processes
ever receive such a signature.
"""

from __future__ import annotations

from datetime import datetime
from enum import Enum

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.hashes import SHA1, SHA256
from cryptography.hazmat.primitives.serialization import load_der_public_key
from msgspec import Struct


class RsaDigest(Enum):
    """Digest of a signature by RSASSA-PKCS1-v1_5."""

    SHA1 = SHA1()  # noqa: S303 - see `senders.sns`
    SHA256 = SHA256()


class SigningCertificate(Struct, frozen=True):
    """X.509 certificate, with its time of validity."""

    starts_at: datetime
    ends_at: datetime
    rsa_key: RSAPublicKey | None
    """None for a key of another kind."""


def read_certificate(pem: bytes) -> SigningCertificate:
    """Return the validity and RSA key of a PEM certificate; the key is None for a key of another kind.

    The signature on the certificate itself is not checked. Raises `ValueError` for a text that is no certificate.
    """
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        key = certificate.public_key()
    except UnsupportedAlgorithm as error:
        raise ValueError(str(error)) from error
    return SigningCertificate(
        certificate.not_valid_before_utc,
        certificate.not_valid_after_utc,
        key if isinstance(key, RSAPublicKey) else None,
    )


def is_rsa_signed(key: RSAPublicKey, signature: bytes, message: bytes, digest: RsaDigest) -> bool:
    """Return whether a signature of a message was made with the private key of this RSA key (PKCS #1 v1.5).

    False also for a malformed signature; never raises for one.
    """
    try:
        key.verify(signature, message, PKCS1v15(), digest.value)
    except (InvalidSignature, ValueError):
        return False
    return True


def read_ecdsa_key(der: bytes) -> EllipticCurvePublicKey | None:
    """Return the public key of an elliptic curve in DER; None for anything else."""
    try:
        key = load_der_public_key(der)
    except (ValueError, UnsupportedAlgorithm):
        return None
    return key if isinstance(key, EllipticCurvePublicKey) else None


def is_ecdsa_signed(key: EllipticCurvePublicKey, signature: bytes, sha256_digest: bytes) -> bool:
    """Return whether a signature was made with the private key of this key, for a message with this SHA-256.

    `sha256_digest` has 32 bytes. False also for a malformed signature.
    """
    try:
        key.verify(signature, sha256_digest, ECDSA(Prehashed(SHA256())))
    except InvalidSignature:
        return False
    return True


def read_ed25519_key(raw: bytes) -> Ed25519PublicKey:
    """Return the Ed25519 public key of these 32 raw bytes; raises `ValueError` for another length."""
    return Ed25519PublicKey.from_public_bytes(raw)


def is_ed25519_signed(key: Ed25519PublicKey, signature: bytes, message: bytes) -> bool:
    """Return whether a signature of a message was made with the private key of this key.

    False also for a malformed signature.
    """
    try:
        key.verify(signature, message)
    except InvalidSignature:
        return False
    return True
