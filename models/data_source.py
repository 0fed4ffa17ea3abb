"""Data sources: tables, encryption of their secrets, and access conditions."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import (
    Column,
    ColumnElement,
    Index,
    LargeBinary,
    SmallInteger,
    UniqueConstraint,
    and_,
    or_,
    select,
    true,
)
from sqlmodel import Field, SQLModel, col

from json_text import decoding
from models.access import ApiCaller, User, UserRole
from models.column_types import JsonTextColumn, TimestampColumn
from models.encryption import EncryptedText, SecretVault, VaultError
from models.timestamps import to_microseconds


class DataSource(SQLModel, table=True):
    """Address of an external service with encrypted secrets."""

    __tablename__ = "data_source"
    __table_args__ = (
        UniqueConstraint("owner_id", "name", name="uq_data_source_name"),
        Index("ix_data_source_organization", "organization_id", "created_at", "id"),
        Index("ix_data_source_secret", "secret_id"),
    )

    id: str = Field(primary_key=True)
    organization_id: str = Field(foreign_key="organization.id")
    shard: int = Field(sa_type=SmallInteger)
    owner_id: str = Field(foreign_key="user_account.id")
    name: str
    type: str
    settings: dict[str, Any] = Field(sa_column=Column(JsonTextColumn, nullable=False))
    secret_names: list[str] = Field(sa_column=Column(JsonTextColumn, nullable=False))
    """Names of its secrets."""
    encrypted: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    """Encrypted JSON object of secrets by name."""
    secret_id: str
    """Id of the server secret that decrypts them."""
    secrets_set_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    tools: dict[str, Any] | None = Field(default=None, sa_column=Column(JsonTextColumn))
    """Tools of a tool server, as `models.tool_server` has them; None for other types, and before they are listed."""
    revision: int = 1
    """Number that increases with every change of the data source or of its visibility."""
    is_public: bool = False
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    updated_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))


class DataSourceShare(SQLModel, table=True):
    """Permission of another user to see and use a data source."""

    __tablename__ = "data_source_share"
    __table_args__ = (Index("ix_data_source_share_user", "user_id"),)

    data_source_id: str = Field(primary_key=True, foreign_key="data_source.id")
    user_id: str = Field(primary_key=True, foreign_key="user_account.id")
    shared_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))


# ── secrets ─────────────────────────────────────────────────────────────────────────────────────────────────


def encrypt_secrets(
    vault: SecretVault, secrets: dict[str, object], *, organization_id: str, source_id: str
) -> EncryptedText:
    """Return the secrets of a data source, by name, encrypted so that only its row in its organization can
    decrypt them.
    """
    text = msgspec.json.encode(secrets)
    return vault.encrypt(text, organization_id=organization_id, object_id=source_id)


def decrypt_secrets(vault: SecretVault, source: DataSource) -> dict[str, str]:
    """Return the decrypted secrets of a data source, by name; raises `VaultError` if they need another server secret or
    are corrupt.
    """
    text = vault.decrypt(
        EncryptedText(source.secret_id, source.encrypted),
        organization_id=source.organization_id,
        object_id=source.id,
    )
    return decoding.decode(text, dict[str, str])


def fingerprint_secrets(vault: SecretVault, source: DataSource) -> str | None:
    """Return a fingerprint of a data source's secrets, which changes whenever they are set; None without secrets,
    and for those that can't be decrypted.

    The hash includes the time at which they were set, so that setting the same secrets again changes it: otherwise a
    user who may set them could set guesses, compare the fingerprints, and so read a secret that nobody is shown.
    """
    if not source.secret_names:
        return None
    try:
        secrets = decrypt_secrets(vault, source)
    except VaultError:
        return None
    text = msgspec.json.encode([to_microseconds(source.secrets_set_at), sorted(secrets.items())])
    return vault.fingerprint(text, organization_id=source.organization_id, object_id=source.id)


# ── access conditions ───────────────────────────────────────────────────────────────────────────────────────


def is_readable_by(caller: ApiCaller) -> ColumnElement[bool]:
    """Return the SQL condition for data sources that a caller may see, test and use: own, shared or public; for an
    admin, all of the organization.
    """
    everybody = col(DataSource.organization_id) == caller.organization_id
    return and_(everybody, true() if caller.is_admin else _is_open_to(caller.user_id))


def is_usable_by(organization_id: str, user_id: str) -> ColumnElement[bool]:
    """Return the SQL condition for data sources that the user of a run may use: own, shared or public; for a user who
    is an admin when the statement is executed, all of the organization.
    """
    is_admin = (
        select(col(User.id))
        .where(
            col(User.id) == user_id,
            col(User.organization_id) == organization_id,
            col(User.role) == UserRole.ADMIN,
        )
        .exists()
    )
    return and_(col(DataSource.organization_id) == organization_id, or_(is_admin, _is_open_to(user_id)))


def _is_open_to(user_id: str) -> ColumnElement[bool]:
    shared = select(col(DataSourceShare.data_source_id)).where(col(DataSourceShare.user_id) == user_id)
    return or_(col(DataSource.owner_id) == user_id, col(DataSource.is_public), col(DataSource.id).in_(shared))


def is_writable_by(caller: ApiCaller) -> ColumnElement[bool]:
    """Return the SQL condition for data sources that a caller may change, share and delete: the caller's own; for an
    admin, all of the organization.
    """
    own = true() if caller.is_admin else col(DataSource.owner_id) == caller.user_id
    return and_(col(DataSource.organization_id) == caller.organization_id, own)
