"""Reads and writes of organizations, users and keys, for the gateway and for the operator's command.

Functions that write take a connection, so that several steps can share one transaction.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct
from sqlalchemy import bindparam, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col

from models import ids
from models.access import (
    SCOPES_OF_ROLES,
    ApiCaller,
    ApiKey,
    Organization,
    User,
    UserRole,
    hash_key,
    new_key,
    visible_prefix,
)
from models.column_types import build_row
from models.database import Database
from models.encryption import identify_secret

if TYPE_CHECKING:
    from sqlalchemy import Row, Select, Update


class EmailTaken(ValueError):
    """The organization already has a user with this email address."""


class FoundKey(Struct, frozen=True):
    """Stored API key, valid or not."""

    caller: ApiCaller
    hash: str
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None

    def is_valid(self, now: datetime) -> bool:
        """Return whether the key can be used at `now`: not revoked and not expired."""
        return self.revoked_at is None and (self.expires_at is None or self.expires_at > now)


class CreatedKey(Struct, frozen=True):
    """New API key, with the only readable copy of its text."""

    key: str
    row: ApiKey


class RevokedKey(Struct, frozen=True):
    """API key before and after its revocation; both are equal if it had been revoked already."""

    before: ApiKey
    after: ApiKey


async def find_keys(database: Database, hashes: Collection[str]) -> dict[str, FoundKey]:
    """Return the keys with these hashes and their callers, by hash, valid or not; unknown ones are omitted.

    Raises `DatabaseUnavailable`.
    """
    found = await _read_keys(database, "hash", hashes)
    return {one.hash: one for one in found}


async def find_keys_by_id(database: Database, key_ids: Collection[str]) -> dict[str, FoundKey]:
    """Return the keys with these ids and their callers, by id, valid or not; unknown ones are omitted.

    Raises `DatabaseUnavailable`.
    """
    found = await _read_keys(database, "id", key_ids)
    return {one.caller.key_id: one for one in found}


async def _read_keys(database: Database, column: str, values: Collection[str]) -> list[FoundKey]:
    async with database.read() as connection:
        rows = await connection.execute(_select_keys(column), {"values": [*values]})
        return [_key_of_row(row) for row in rows]


@cache
def _select_keys(column: str) -> Select[*tuple[Any, ...]]:
    """Return the statement that reads the keys with `values` of a column, for all calls: most requests read a key."""
    return (
        select(ApiKey, col(User.role))
        .join(User, col(User.id) == col(ApiKey.user_id))
        .where(col(getattr(ApiKey, column)).in_(bindparam("values", expanding=True)))
    )


def _key_of_row(row: Row[*tuple[Any, ...]]) -> FoundKey:
    """Return a key from its row; its caller has the stored scopes that the user's role still allows."""
    role = UserRole(row.role)
    caller = ApiCaller(
        key_id=row.id,
        user_id=row.user_id,
        organization_id=row.organization_id,
        shard=row.shard,
        role=role,
        scopes=SCOPES_OF_ROLES[role].intersection(row.scopes),
        node_types=None if row.node_types is None else tuple(row.node_types),
    )
    return FoundKey(caller, row.hash, row.expires_at, row.revoked_at, row.last_used_at)


class KeyUse(Struct, frozen=True):
    """Use of an API key."""

    at: datetime
    route: str
    """Method and path template."""
    address_hash: str


async def record_use(database: Database, key_id: str, use: KeyUse, *, every: timedelta) -> None:
    """Store a use of an API key, unless its stored last use is less than `every` older; a missing key is ignored.

    Raises `DatabaseUnavailable`.
    """
    values = {
        "key": key_id,
        "due": use.at - every,
        "at": use.at,
        "route": use.route,
        "address": use.address_hash,
    }

    async def record(connection: AsyncConnection) -> None:
        await connection.execute(_update_use(), values)

    await database.transaction(record)


@cache
def _update_use() -> Update:
    """Return the statement that stores the use of a key whose last one is older than `due`, for all calls."""
    last_used_at = col(ApiKey.last_used_at)
    return (
        update(ApiKey)
        .where(
            col(ApiKey.id) == bindparam("key"),
            or_(last_used_at.is_(None), last_used_at < bindparam("due")),
        )
        .values(
            last_used_at=bindparam("at"),
            last_route=bindparam("route"),
            last_address_hash=bindparam("address"),
        )
    )


async def rehash_key(database: Database, key: str, *, earlier: str, secret: bytes) -> None:
    """Replace the stored hash `earlier` of an API key, whose text is `key`, by its hash under the current server
    secret.

    Changes nothing if `earlier` is not stored any more. Raises `DatabaseUnavailable`.
    """
    statement = (
        update(ApiKey)
        .where(col(ApiKey.hash) == earlier)
        .values(hash=hash_key(key, secret), secret_id=identify_secret(secret))
    )

    async def rehash(connection: AsyncConnection) -> None:
        await connection.execute(statement)

    await database.transaction(rehash)


# ── organizations and users ───────────────────────────────────────────────────────────────────────


async def has_organization(connection: AsyncConnection) -> bool:
    """Return whether the database has any organization; a new database has none."""
    return (await connection.execute(select(col(Organization.id)).limit(1))).first() is not None


async def create_organization(connection: AsyncConnection, *, name: str, now: datetime) -> Organization:
    """Insert an organization in the transaction and return it; names need not be unique."""
    organization_id = ids.new_id("org")
    shard = ids.shard_of(organization_id)
    organization = Organization(id=organization_id, shard=shard, name=name, created_at=now)
    await connection.execute(insert(Organization), organization.model_dump())
    return organization


async def find_organization(connection: AsyncConnection, organization_id: str) -> Organization | None:
    """Return an organization by its id; None if it is missing."""
    statement = select(Organization).where(col(Organization.id) == organization_id)
    row = (await connection.execute(statement)).mappings().first()
    return build_row(Organization, row) if row else None


async def list_organizations(connection: AsyncConnection) -> list[Organization]:
    """Return all organizations, oldest first."""
    rows = await connection.execute(select(Organization).order_by(col(Organization.created_at)))
    return [build_row(Organization, row) for row in rows.mappings()]


async def create_user(
    connection: AsyncConnection,
    *,
    organization: Organization,
    email: str,
    name: str,
    role: UserRole,
    now: datetime,
) -> User:
    """Insert a user of an organization, with the mail address in lower case, and return the row.

    Raises `EmailTaken` if the organization has a user with the address; the transaction must then be rolled back.
    """
    user = User(
        id=ids.new_id("user"),
        organization_id=organization.id,
        shard=organization.shard,
        email=email.lower(),
        name=name,
        role=role,
        created_at=now,
    )
    try:
        await connection.execute(insert(User), user.model_dump())
    except IntegrityError as error:
        raise EmailTaken(f"The organization already has a user {user.email}") from error
    return user


async def find_user(connection: AsyncConnection, organization_id: str, user_id: str) -> User | None:
    """Return a user of an organization by id; None if it is missing or of another organization."""
    statement = select(User).where(col(User.organization_id) == organization_id, col(User.id) == user_id)
    row = (await connection.execute(statement)).mappings().first()
    return build_row(User, row) if row else None


async def read_user_names(
    connection: AsyncConnection, organization_id: str, user_ids: Collection[str]
) -> dict[str, str]:
    """Return the names of users of an organization by user id, a mail address in place of an empty name; missing users
    are omitted.
    """
    if not user_ids:
        return {}
    statement = select(col(User.id), col(User.name), col(User.email)).where(
        col(User.organization_id) == organization_id, col(User.id).in_(sorted(set(user_ids)))
    )
    return {row.id: row.name or row.email for row in await connection.execute(statement)}


async def list_users(
    connection: AsyncConnection, organization_id: str, *, limit: int, offset: int
) -> tuple[int, list[User]]:
    """Return the number of an organization's users, and at most `limit` of them after `offset`, oldest first."""
    condition = col(User.organization_id) == organization_id
    count = await connection.scalar(select(func.count()).select_from(User).where(condition))
    page = select(User).where(condition).order_by(col(User.id)).limit(limit).offset(offset)
    rows = await connection.execute(page)
    return count or 0, [build_row(User, row) for row in rows.mappings()]


# ── keys ──────────────────────────────────────────────────────────────────────────────────────────


_OLDEST_ORGANIZATION: Final = (
    select(col(Organization.id)).order_by(col(Organization.created_at), col(Organization.id)).limit(1)
)


async def is_operator_organization(connection: AsyncConnection, organization_id: str) -> bool:
    """Return whether an organization is the operator's: the oldest of the database, which the first start creates."""
    return await connection.scalar(_OLDEST_ORGANIZATION) == organization_id


async def find_operator_key(connection: AsyncConnection, now: datetime) -> ApiKey | None:
    """Return the oldest valid key of an admin of the oldest organization; None if there is none."""
    oldest = _OLDEST_ORGANIZATION.scalar_subquery()
    statement = (
        select(ApiKey)
        .join(User, col(User.id) == col(ApiKey.user_id))
        .where(col(ApiKey.organization_id) == oldest, col(User.role) == UserRole.ADMIN)
        .where(col(ApiKey.revoked_at).is_(None))
        .where(or_(col(ApiKey.expires_at).is_(None), col(ApiKey.expires_at) > now))
        .order_by(col(ApiKey.id))
        .limit(1)
    )
    row = (await connection.execute(statement)).mappings().first()
    return build_row(ApiKey, row) if row else None


async def find_key(connection: AsyncConnection, key_id: str) -> FoundKey | None:
    """Return the key with an id and its caller, valid or not; None for an unknown id. The organization is not
    checked.
    """
    statement = (
        select(ApiKey, col(User.role))
        .join(User, col(User.id) == col(ApiKey.user_id))
        .where(col(ApiKey.id) == key_id)
    )
    row = (await connection.execute(statement)).first()
    return None if row is None else _key_of_row(row)


async def find_organization_by_prefix(connection: AsyncConnection, prefix: str) -> Organization | None:
    """Return the organization whose keys, valid or not, have the visible prefix `prefix`; if no key has it, the only
    organization of the server.

    None if several organizations have keys with it, or if no key has it and the server has several organizations or
    none.
    """
    with_prefix = select(col(ApiKey.organization_id)).where(col(ApiKey.prefix) == prefix)
    statement = select(Organization).where(col(Organization.id).in_(with_prefix)).limit(2)
    found = (await connection.execute(statement)).mappings().all()
    found = found or (await connection.execute(select(Organization).limit(2))).mappings().all()
    return build_row(Organization, found[0]) if len(found) == 1 else None


async def create_key(  # noqa: PLR0913 - one for each column that its caller decides
    connection: AsyncConnection,
    *,
    user: User,
    name: str,
    scopes: Collection[str],
    secret: bytes,
    now: datetime,
    expires_at: datetime | None = None,
    key: str | None = None,
    node_types: Collection[str] | None = None,
) -> CreatedKey:
    """Insert an API key of a user, with a new text unless `key` is given, and return text and row; only the hash is
    stored.

    Without `expires_at` it never expires; without `node_types` it may perform tasks of all types. `secret` is the
    server's, on which the hash depends.
    """
    text = key or new_key()
    row = ApiKey(
        id=ids.new_id("key"),
        organization_id=user.organization_id,
        user_id=user.id,
        shard=user.shard,
        name=name,
        prefix=visible_prefix(text),
        hash=hash_key(text, secret),
        secret_id=identify_secret(secret),
        scopes=sorted(scopes),
        node_types=None if node_types is None else sorted(node_types),
        created_at=now,
        expires_at=expires_at,
    )
    await connection.execute(insert(ApiKey), row.model_dump())
    return CreatedKey(text, row)


async def list_keys(
    connection: AsyncConnection, organization_id: str, *, user_id: str | None, limit: int, offset: int
) -> tuple[int, list[ApiKey]]:
    """Return the number of keys of an organization, and at most `limit` after `offset`, newest first.

    With `user_id`, only keys of that user. Revoked and expired keys are included.
    """
    conditions = [col(ApiKey.organization_id) == organization_id]
    if user_id is not None:
        conditions.append(col(ApiKey.user_id) == user_id)
    count = await connection.scalar(select(func.count()).select_from(ApiKey).where(*conditions))
    page = select(ApiKey).where(*conditions).order_by(col(ApiKey.id).desc()).limit(limit).offset(offset)
    rows = await connection.execute(page)
    return count or 0, [build_row(ApiKey, row) for row in rows.mappings()]


async def revoke_key(
    connection: AsyncConnection, organization_id: str, key_id: str, *, user_id: str | None, now: datetime
) -> RevokedKey | None:
    """Revoke a key of an organization, with `user_id` only one of that user; return its row before and after.

    Both are equal if it was revoked already. None if there is no such key.
    """
    conditions = [col(ApiKey.organization_id) == organization_id, col(ApiKey.id) == key_id]
    if user_id is not None:
        conditions.append(col(ApiKey.user_id) == user_id)
    is_live = col(ApiKey.revoked_at).is_(None)
    result = await connection.execute(update(ApiKey).where(*conditions, is_live).values(revoked_at=now))
    row = (await connection.execute(select(ApiKey).where(*conditions))).mappings().first()
    if row is None:
        return None
    after = build_row(ApiKey, row)
    if result.rowcount == 0:
        return RevokedKey(after, after)
    return RevokedKey(build_row(ApiKey, {**row, "revoked_at": None}), after)
