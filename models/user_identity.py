"""Identities of users at OpenID Connect providers: issuer and subject, never a mail address."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from sqlalchemy import Column, Index, SmallInteger, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlmodel import Field, SQLModel, col

from models.access import User
from models.column_types import TimestampColumn, build_row

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection


class IdentityTaken(ValueError):
    """The identity belongs to another user."""


class UserIdentity(SQLModel, table=True):
    """Identity of a user at one provider."""

    __tablename__ = "user_identity"
    __table_args__ = (Index("ix_user_identity_user", "user_id"),)

    issuer: str = Field(primary_key=True)
    subject: str = Field(primary_key=True)
    user_id: str = Field(foreign_key="user_account.id")
    organization_id: str
    shard: int = Field(sa_column=Column(SmallInteger, nullable=False))
    key_id: str
    """Key that sessions of this identity stand for; a new one is made when it has ended."""
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))


async def find_identity(connection: AsyncConnection, issuer: str, subject: str) -> UserIdentity | None:
    """Return the identity with this issuer and subject, compared exactly; None if there is none."""
    statement = select(UserIdentity).where(
        col(UserIdentity.issuer) == issuer, col(UserIdentity.subject) == subject
    )
    row = (await connection.execute(statement)).mappings().first()
    return None if row is None else build_row(UserIdentity, row)


async def add_identity(
    connection: AsyncConnection, user: User, *, issuer: str, subject: str, key_id: str, now: datetime
) -> UserIdentity:
    """Store an identity of a user at a provider and return it; new sessions of it act under the API key `key_id`.

    Raises `IdentityTaken` if any user, also this one, has the identity; the transaction must then be rolled back.
    """
    row = UserIdentity(
        issuer=issuer,
        subject=subject,
        user_id=user.id,
        organization_id=user.organization_id,
        shard=user.shard,
        key_id=key_id,
        created_at=now,
    )
    try:
        await connection.execute(insert(UserIdentity).values(row.model_dump()))
    except IntegrityError as error:
        raise IdentityTaken(f"The identity belongs to another user than {user.id}") from error
    return row


async def set_key(connection: AsyncConnection, identity: UserIdentity, key_id: str) -> None:
    """Store the API key under which new sessions of an identity act; ignored if the identity is missing."""
    await connection.execute(
        update(UserIdentity)
        .where(col(UserIdentity.issuer) == identity.issuer, col(UserIdentity.subject) == identity.subject)
        .values(key_id=key_id)
    )
