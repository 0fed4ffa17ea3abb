"""Invitations: links that make a user of an organization, once and until they expire."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final

from msgspec import Struct
from sqlalchemy import Column, Index, SmallInteger, func, insert, select, update
from sqlmodel import Field, SQLModel, col

from models import browser_session, ids
from models.column_types import TimestampColumn, build_row

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement
    from sqlalchemy.ext.asyncio import AsyncConnection

    from models.access import ApiCaller, UserRole

DEFAULT_LIFETIME: Final = timedelta(days=7)


class Invitation(SQLModel, table=True):
    """Invitation of one person, found by the hash of the code in its link."""

    __table_args__ = (
        Index("ix_invitation_hash", "hash", unique=True),
        Index("ix_invitation_organization", "organization_id", "created_at"),
    )

    id: str = Field(primary_key=True)
    hash: str
    """SHA-256 of the code, in hexadecimal: the code is random, so that the hash needs no key."""
    organization_id: str = Field(foreign_key="organization.id")
    shard: int = Field(sa_column=Column(SmallInteger, nullable=False))
    email: str
    role: str
    invited_by: str
    """Id of the admin."""
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    expires_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    accepted_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    user_id: str | None = None
    """Id of the user that it has made."""
    revoked_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))

    def is_open(self, now: datetime) -> bool:
        """Return whether the invitation can be accepted at `now`: it is not accepted, revoked or expired."""
        return self.accepted_at is None and self.revoked_at is None and now < self.expires_at


class CreatedInvitation(Struct, frozen=True):
    """New invitation, with the only readable copy of its code."""

    row: Invitation
    code: str


async def create_invitation(
    connection: AsyncConnection,
    caller: ApiCaller,
    *,
    email: str,
    role: UserRole,
    now: datetime,
    lifetime: timedelta,
) -> CreatedInvitation:
    """Insert an invitation to the caller's organization, valid for `lifetime`; return it with its secret code.

    The mail address is stored in lower case, the code as a hash.
    """
    code = browser_session.new_secret()
    row = Invitation(
        id=ids.new_id("invitation"),
        hash=browser_session.hash_secret(code),
        organization_id=caller.organization_id,
        shard=caller.shard,
        email=email.lower(),
        role=role,
        invited_by=caller.user_id,
        created_at=now,
        expires_at=now + lifetime,
    )
    await connection.execute(insert(Invitation).values(row.model_dump()))
    return CreatedInvitation(row, code)


async def list_invitations(
    connection: AsyncConnection, organization_id: str, *, limit: int, offset: int
) -> tuple[int, list[Invitation]]:
    """Return the number of an organization's invitations, and at most `limit` of them after `offset`, newest first.

    Accepted, revoked and expired invitations are included.
    """
    condition = col(Invitation.organization_id) == organization_id
    count = await connection.scalar(select(func.count()).select_from(Invitation).where(condition))
    page = select(Invitation).where(condition).order_by(col(Invitation.id).desc()).limit(limit).offset(offset)
    return count or 0, [build_row(Invitation, row) for row in (await connection.execute(page)).mappings()]


async def find_by_code(connection: AsyncConnection, code: str) -> Invitation | None:
    """Return the invitation with a code, even if it can't be accepted any more; None for an unknown code."""
    return await _find(connection, col(Invitation.hash) == browser_session.hash_secret(code))


async def accept_invitation(connection: AsyncConnection, invitation: Invitation, now: datetime) -> bool:
    """Mark an invitation as accepted at `now`; return False, without a change, if it is accepted, revoked or expired
    already.
    """
    statement = (
        update(Invitation)
        .where(
            col(Invitation.id) == invitation.id,
            col(Invitation.accepted_at).is_(None),
            col(Invitation.revoked_at).is_(None),
            col(Invitation.expires_at) > now,
        )
        .values(accepted_at=now)
    )
    return (await connection.execute(statement)).rowcount == 1


async def record_user(connection: AsyncConnection, invitation: Invitation, user_id: str) -> None:
    """Store in an invitation the id of the user who was created by accepting it."""
    await connection.execute(
        update(Invitation).where(col(Invitation.id) == invitation.id).values(user_id=user_id)
    )


async def revoke_invitation(
    connection: AsyncConnection, organization_id: str, invitation_id: str, now: datetime
) -> Invitation | None:
    """Revoke an invitation of an organization, and return its row as it was before; None if the organization has none
    with the id.

    An accepted or revoked invitation is returned without a change; an expired one is revoked. The row is locked until
    the end of the transaction.
    """
    conditions = (col(Invitation.organization_id) == organization_id, col(Invitation.id) == invitation_id)
    # Otherwise an acceptance could come between, and the caller would take the invitation for revoked.
    found = await _find(connection, *conditions, is_locking=True)
    if found is not None and found.accepted_at is None and found.revoked_at is None:
        await connection.execute(update(Invitation).where(*conditions).values(revoked_at=now))
    return found


async def _find(
    connection: AsyncConnection, *conditions: ColumnElement[bool], is_locking: bool = False
) -> Invitation | None:
    """Return an invitation that meets all conditions, its row locked if `is_locking`; None if there is none."""
    statement = select(Invitation).where(*conditions)
    found = await connection.execute(statement.with_for_update() if is_locking else statement)
    row = found.mappings().first()
    return None if row is None else build_row(Invitation, row)
