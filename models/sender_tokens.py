"""Creation and look-up of sender tokens: random, so that an unkeyed hash of a token is worthless."""

from __future__ import annotations

import secrets
from datetime import datetime, timedelta
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from sqlalchemy import or_, select, update
from sqlmodel import col

from models.access import User, UserRole
from models.encryption import EncryptedText
from models.ids import ALPHABET
from models.ingest import TOKEN_PREFIXES, SenderToken, SenderTokenKind
from models.workflow import Workflow

if TYPE_CHECKING:
    from collections.abc import Collection

    from sqlalchemy import Row
    from sqlalchemy.ext.asyncio import AsyncConnection

    from models.database import Database

_ROUTING_CODE = "00"
"""Reserved for routing between regions, part of tokens from the start."""
_BITS = 260
HINT_CHARACTERS = 4


class FoundSenderToken(Struct, frozen=True):
    """Valid sender token with the identity that it authenticates."""

    id: str
    kind: SenderTokenKind
    organization_id: str
    shard: int
    workflow_id: str | None
    user_id: str
    """Owner of the workflow; for an event token, its author."""
    role: UserRole
    encrypted: EncryptedText | None
    """Encrypted signing keys of providers."""
    last_used_at: datetime | None


def new_token(kind: SenderTokenKind) -> str:
    """Return a new random token: the prefix of its kind, a constant routing code of two characters, 260 random bits."""
    number = secrets.randbits(_BITS)
    return (
        TOKEN_PREFIXES[kind]
        + _ROUTING_CODE
        + "".join(ALPHABET[number >> shift & 31] for shift in range(0, _BITS, 5))
    )


def hash_token(token: str) -> str:
    """Return the hash (64 hexadecimal digits) by which the row of a token is found; the token itself is not stored."""
    return blake2b(token.encode(), digest_size=32, person=b"intake token").hexdigest()


def visible_suffix(token: str) -> str:
    """Return the last 4 characters of a token, by which its owner may recognize it."""
    return token[-HINT_CHARACTERS:]


async def find_tokens(
    database: Database, hashes: Collection[str], now: datetime
) -> dict[str, FoundSenderToken]:
    """Return the valid tokens with these hashes, by hash; unknown, revoked and expired tokens, and tokens of deleted
    workflows, are omitted.

    Raises `DatabaseUnavailable`.
    """
    statement = (
        select(SenderToken, col(User.role), col(Workflow.owner_id))
        .join(User, col(User.id) == col(SenderToken.user_id))
        .outerjoin(
            Workflow, (col(Workflow.id) == col(SenderToken.workflow_id)) & col(Workflow.deleted_at).is_(None)
        )
        .where(
            col(SenderToken.hash).in_(hashes),
            col(SenderToken.revoked_at).is_(None),
            or_(col(SenderToken.expires_at).is_(None), col(SenderToken.expires_at) > now),
            or_(col(SenderToken.workflow_id).is_(None), col(Workflow.id).is_not(None)),
        )
    )
    async with database.read() as connection:
        return {row.hash: _token_of_row(row) for row in await connection.execute(statement)}


def _token_of_row(row: Row[*tuple[Any, ...]]) -> FoundSenderToken:
    """Build a token from its row.

    A token of a workflow acts as the workflow's owner with the role of a member; any other as its user.
    """
    return FoundSenderToken(
        id=row.id,
        kind=SenderTokenKind(row.kind),
        organization_id=row.organization_id,
        shard=row.shard,
        workflow_id=row.workflow_id,
        user_id=row.owner_id or row.user_id,
        role=UserRole.MEMBER if row.workflow_id else UserRole(row.role),
        encrypted=EncryptedText(row.secret_id, row.encrypted) if row.encrypted is not None else None,
        last_used_at=row.last_used_at,
    )


async def record_use(database: Database, token_id: str, *, now: datetime, every: timedelta) -> None:
    """Store `now` as the time of a token's last use, unless the stored time is less than `every` older; a missing token
    is ignored.

    Raises `DatabaseUnavailable`.
    """
    is_due = or_(col(SenderToken.last_used_at).is_(None), col(SenderToken.last_used_at) < now - every)
    statement = update(SenderToken).where(col(SenderToken.id) == token_id, is_due).values(last_used_at=now)

    async def record(connection: AsyncConnection) -> None:
        await connection.execute(statement)

    await database.transaction(record)
