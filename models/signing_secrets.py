"""Signing secrets of organizations for outbound messages, as Standard Webhooks 1.0.0 defines them."""

from __future__ import annotations

import hmac
import secrets
from base64 import b64decode, b64encode
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Column, Index, LargeBinary, SmallInteger, or_, select
from sqlmodel import Field, SQLModel, col

from models.column_types import TimestampColumn
from models.database_time import DatabaseTime
from models.encryption import EncryptedText, SecretVault

if TYPE_CHECKING:
    from sqlalchemy import Select

PREFIX: Final = "whsec_"
SECRET_BYTES: Final = 32
"""The standard allows 24 to 64."""
HINT_CHARACTERS: Final = 4
OVERLAP_TIME: Final = timedelta(hours=24)
"""Time for which a replaced secret still signs beside its successor."""
MAX_SECRETS: Final = 4
"""Maximum number of secrets that sign, however often they are replaced within that time."""


class SigningSecret(SQLModel, table=True):
    """Signing secret of an organization; the current one doesn't expire."""

    __tablename__ = "signing_secret"
    __table_args__ = (
        Index("ix_signing_secret_organization", "organization_id"),
        Index("ix_signing_secret_secret", "secret_id"),
    )

    id: str = Field(primary_key=True)
    organization_id: str = Field(foreign_key="organization.id")
    shard: int = Field(sa_type=SmallInteger)
    encrypted: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    secret_id: str
    """Id of the server secret that decrypts it."""
    hint: str
    """Last characters of the secret, by which its holder may recognize it."""
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    expires_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """Time from which it no longer signs; set when another secret replaces it."""


def valid_secrets_statement(organization_id: str) -> Select[Any]:
    """Return the statement for the valid signing secrets of an organization, at most 4, the newest first.

    The newest is the current secret; earlier secrets are valid for 24 hours after their replacement.
    """
    is_valid = or_(col(SigningSecret.expires_at).is_(None), col(SigningSecret.expires_at) > DatabaseTime())
    return (
        select(SigningSecret)
        .where(col(SigningSecret.organization_id) == organization_id, is_valid)
        .order_by(col(SigningSecret.created_at).desc(), col(SigningSecret.id).desc())
        .limit(MAX_SECRETS)
    )


def new_secret() -> str:
    """Return a new random signing secret: `whsec_` and 32 random bytes in base64."""
    return PREFIX + b64encode(secrets.token_bytes(SECRET_BYTES)).decode()


def visible_suffix(secret: str) -> str:
    """Return the last 4 characters of a secret (without base64 padding), by which it is recognized later."""
    return secret.rstrip("=")[-HINT_CHARACTERS:]


def encrypt_secret(vault: SecretVault, secret: str, *, organization_id: str, object_id: str) -> EncryptedText:
    """Return a signing secret encrypted for the row with the id `object_id` of this organization, which alone can
    decrypt it.
    """
    return vault.encrypt(secret.encode(), organization_id=organization_id, object_id=object_id)


def decrypt_secret(vault: SecretVault, row: SigningSecret) -> str:
    """Return the decrypted signing secret of a row; raises `VaultError` if no server secret fits or the row was
    tampered with.
    """
    stored = EncryptedText(row.secret_id, row.encrypted)
    return vault.decrypt(stored, organization_id=row.organization_id, object_id=row.id).decode()


def sign_message(keys: Iterable[str], message_id: str, timestamp: int, body: bytes) -> str:
    """Return the header `webhook-signature` of a message: for each signing secret in `keys`, `v1,` and an HMAC-SHA-256
    in Base64.

    Signatures are in the order of the secrets, separated by spaces. `timestamp` is in seconds since the epoch.
    """
    signed = b"%s.%d.%s" % (message_id.encode(), timestamp, body)
    return " ".join(f"v1,{_sign(key, signed)}" for key in keys)


def _sign(secret: str, signed: bytes) -> str:
    key = b64decode(secret.removeprefix(PREFIX))
    return b64encode(hmac.digest(key, signed, "sha256")).decode()
