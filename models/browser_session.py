"""Sessions of browsers: each stands for one API key, and ends with it at the latest."""

from __future__ import annotations

import secrets
from datetime import datetime, timedelta
from hashlib import sha256
from typing import TYPE_CHECKING, Final

from msgspec import Struct
from sqlalchemy import Column, Index, SmallInteger, delete, insert, or_, select, update
from sqlmodel import Field, SQLModel, col

from models import ids
from models.access import SCOPES_OF_ROLES, ApiCaller, ApiKey, User, UserRole
from models.column_types import TimestampColumn, build_row

if TYPE_CHECKING:
    from collections.abc import Collection

    from sqlalchemy import ColumnElement
    from sqlalchemy.ext.asyncio import AsyncConnection

    from models.database import Database

IDLE_LIFETIME: Final = timedelta(hours=12)
"""Time without a request after which a session ends."""
LIFETIME: Final = timedelta(days=7)
"""Time after which a session ends in any case."""
SECRET_BYTES: Final = 32
USER_AGENT_LENGTH: Final = 200
USE_RECORDED_EVERY: Final = timedelta(minutes=1)


class BrowserSession(SQLModel, table=True):
    """Session of one browser, found by the hash of the secret in its cookie."""

    __tablename__ = "browser_session"
    __table_args__ = (
        Index("ix_browser_session_hash", "hash", unique=True),
        Index("ix_browser_session_organization", "organization_id", "created_at"),
        Index("ix_browser_session_last_seen", "last_seen_at"),
    )

    id: str = Field(primary_key=True)
    hash: str
    """SHA-256 of the secret, in hexadecimal: the secret is random, so that the hash needs no key."""
    organization_id: str
    shard: int = Field(sa_column=Column(SmallInteger, nullable=False))
    user_id: str
    key_id: str
    user_agent: str
    """Header `User-Agent` of the sign-in, cut, by which a user recognizes the browser."""
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    last_seen_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))

    def ends_at(self, key_expires_at: datetime | None) -> datetime:
        """Return the time at which the session ends if no request follows: 12 hours after its last use, 7 days after
        its creation, or with its key, whichever is first.

        `key_expires_at` is the expiry of the key; None for a key that never expires.
        """
        ends = min(self.last_seen_at + IDLE_LIFETIME, self.created_at + LIFETIME)
        return ends if key_expires_at is None else min(ends, key_expires_at)


class FoundSession(Struct, frozen=True):
    """Stored session with the state of its key."""

    row: BrowserSession
    caller: ApiCaller
    key_expires_at: datetime | None
    key_revoked_at: datetime | None

    def is_valid(self, now: datetime) -> bool:
        """Return whether the session can be used at `now`: not ended, and its key is not revoked."""
        return self.key_revoked_at is None and now < self.row.ends_at(self.key_expires_at)


def new_secret() -> str:
    """Return the secret of a new session: 256 random bits."""
    return secrets.token_urlsafe(SECRET_BYTES)


def hash_secret(secret: str) -> str:
    """Return the SHA-256 of a secret, in hexadecimal, under which it is stored."""
    return sha256(secret.encode()).hexdigest()


async def find_sessions(database: Database, hashes: Collection[str]) -> dict[str, FoundSession]:
    """Return the sessions with these hashes by hash, valid or not; unknown ones are omitted.

    Raises `DatabaseUnavailable`.
    """
    async with database.read() as connection:
        found = await _select_sessions(connection, col(BrowserSession.hash).in_(hashes))
    return {one.row.hash: one for one in found}


async def list_sessions(
    connection: AsyncConnection,
    organization_id: str,
    *,
    user_id: str | None,
    now: datetime,
    session_id: str | None = None,
) -> list[FoundSession]:
    """Return the valid sessions of an organization at `now`, newest first.

    With `user_id` or `session_id`, only matching ones; None means all.
    """
    conditions = [col(BrowserSession.organization_id) == organization_id]
    if user_id is not None:
        conditions.append(col(BrowserSession.user_id) == user_id)
    if session_id is not None:
        conditions.append(col(BrowserSession.id) == session_id)
    found = await _select_sessions(connection, *conditions)
    return [one for one in found if one.is_valid(now)]


async def create_session(
    connection: AsyncConnection, caller: ApiCaller, *, user_agent: str, now: datetime, replaces: str | None
) -> tuple[BrowserSession, str]:
    """Insert a session for the key of a caller; return its row and its secret, of which only the hash is stored.

    Deletes the session with the hash `replaces`, so that a sign-in changes the secret, and all sessions, of any user,
    that have been idle for over 12 hours. The user agent is cut to 200 characters.
    """
    is_over = or_(
        col(BrowserSession.last_seen_at) < now - IDLE_LIFETIME, col(BrowserSession.hash) == (replaces or "")
    )
    await connection.execute(delete(BrowserSession).where(is_over))
    secret = new_secret()
    row = BrowserSession(
        id=ids.new_id("session"),
        hash=hash_secret(secret),
        organization_id=caller.organization_id,
        shard=caller.shard,
        user_id=caller.user_id,
        key_id=caller.key_id,
        user_agent=user_agent[:USER_AGENT_LENGTH],
        created_at=now,
        last_seen_at=now,
    )
    await connection.execute(insert(BrowserSession).values(row.model_dump()))
    return row, secret


async def delete_session(connection: AsyncConnection, session_id: str) -> None:
    """Delete a session by its id; changes nothing if it is missing."""
    await connection.execute(delete(BrowserSession).where(col(BrowserSession.id) == session_id))


async def record_use(database: Database, session_id: str, now: datetime) -> None:
    """Store `now` as the time of the last use of a session; a missing session is ignored.

    Raises `DatabaseUnavailable`.
    """
    statement = update(BrowserSession).where(col(BrowserSession.id) == session_id).values(last_seen_at=now)

    async def record(connection: AsyncConnection) -> None:
        await connection.execute(statement)

    await database.transaction(record)


async def _select_sessions(
    connection: AsyncConnection, *conditions: ColumnElement[bool]
) -> list[FoundSession]:
    """Return the sessions that meet all conditions, valid or not, newest first, with their callers and the validity of
    their keys.
    """
    statement = (
        select(
            BrowserSession,
            col(ApiKey.scopes),
            col(ApiKey.node_types),
            col(ApiKey.expires_at),
            col(ApiKey.revoked_at),
            col(User.role),
        )
        .join(ApiKey, col(ApiKey.id) == col(BrowserSession.key_id))
        .join(User, col(User.id) == col(ApiKey.user_id))
        .where(*conditions)
        .order_by(col(BrowserSession.id).desc())
    )
    found = []
    for one in (await connection.execute(statement)).mappings():
        values = dict(one)
        scopes, expires_at, revoked_at = (values.pop(name) for name in ("scopes", "expires_at", "revoked_at"))
        node_types = values.pop("node_types")
        role = UserRole(values.pop("role"))
        row = build_row(BrowserSession, values)
        caller = ApiCaller(
            key_id=row.key_id,
            user_id=row.user_id,
            organization_id=row.organization_id,
            shard=row.shard,
            role=role,
            scopes=SCOPES_OF_ROLES[role].intersection(scopes),
            session_id=row.id,
            node_types=None if node_types is None else tuple(node_types),
        )
        found.append(FoundSession(row, caller, expires_at, revoked_at))
    return found
