"""Organizations, users and keys, managed directly in the database by the operator of the server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from sqlalchemy import or_, select
from sqlmodel import col

from gateway.access import audit_log
from gateway.access.audit_log import ServerOperator
from models import access_store, database_time, schema_migration
from models.access import ApiKey, KeyScope, Organization, User, UserRole
from models.access_store import EmailTaken
from models.audit import AuditAction
from models.column_types import build_row
from models.database import Database, parse_url
from pilotflame.command_error import CommandError

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from models.settings import ServerSettings

MAX_LISTED: Final = 10_000


async def create_organization(settings: ServerSettings, name: str) -> str:
    """Create an organization in the database and return its id.

    Names need not be unique. Raises the errors of `open_database`.
    """

    async def create(connection: AsyncConnection) -> str:
        made = await access_store.create_organization(
            connection, name=name, now=await database_time.read_database_time(connection)
        )
        return made.id

    async with open_database(settings) as database:
        return await database.transaction(create)


async def create_user(
    settings: ServerSettings, organization: str, email: str, name: str, role: UserRole
) -> str:
    """Create a user in the database with an entry in the audit trail, and return its id.

    `organization` is an id or a name. Raises `CommandError` if it is missing or ambiguous, or the e-mail address is
    taken, and the errors of `open_database`.
    """

    async def create(connection: AsyncConnection) -> str:
        found = await _find_organization(connection, organization)
        made = await access_store.create_user(
            connection,
            organization=found,
            email=email,
            name=name,
            role=role,
            now=await database_time.read_database_time(connection),
        )
        author = ServerOperator(found.id, found.shard)
        after = audit_log.hash_content(made)
        await audit_log.record_change(
            connection, author, AuditAction.USER_CREATED, made.id, before=None, after=after
        )
        return made.id

    async with open_database(settings) as database:
        try:
            return await database.transaction(create)
        except EmailTaken as error:
            raise CommandError(str(error)) from error


async def create_key(
    settings: ServerSettings,
    organization: str | None,
    user: str,
    name: str,
    scopes: Collection[KeyScope],
    lifetime: timedelta | None,
) -> str:
    """Create an API key for a user, with an audit entry, and return the key itself, which is stored nowhere.

    `user` is an id or e-mail address; a key with empty `scopes` permits nothing that needs a scope. Without
    `organization` the only one is meant; without `lifetime` the key doesn't expire. Raises `CommandError` for a
    missing user, and a missing or ambiguous organization, `InvalidSettings` without a usable server secret, and the
    errors of `open_database`.
    """
    secret = settings.secret

    async def create(connection: AsyncConnection) -> str:
        now = await database_time.read_database_time(connection)
        owner = await _find_user(connection, await _find_organization(connection, organization), user)
        made = await access_store.create_key(
            connection,
            user=owner,
            name=name,
            scopes=scopes,
            secret=secret,
            now=now,
            expires_at=now + lifetime if lifetime else None,
        )
        author = ServerOperator(owner.organization_id, owner.shard)
        after = audit_log.hash_content(made.row)
        await audit_log.record_change(
            connection, author, AuditAction.KEY_CREATED, made.row.id, before=None, after=after
        )
        return made.key

    async with open_database(settings) as database:
        return await database.transaction(create)


async def list_keys(settings: ServerSettings, organization: str | None) -> Sequence[ApiKey]:
    """Return the keys of an organization, the newest first, at most 10,000, without their secrets.

    Without `organization` the only one is meant. Raises `CommandError` for a missing or ambiguous organization, and the
    errors of `open_database`.
    """
    async with open_database(settings) as database, database.read() as connection:
        found = await _find_organization(connection, organization)
        _, keys = await access_store.list_keys(connection, found.id, user_id=None, limit=MAX_LISTED, offset=0)
        return keys


async def revoke_key(settings: ServerSettings, organization: str | None, key_id: str) -> None:
    """Revoke a key by its id, with an audit entry; do nothing if it is revoked already.

    Without `organization` the only one is meant. Raises `CommandError` for a missing key, and a missing or ambiguous
    organization, and the errors of `open_database`.
    """

    async def revoke(connection: AsyncConnection) -> None:
        found = await _find_organization(connection, organization)
        now = await database_time.read_database_time(connection)
        revoked = await access_store.revoke_key(connection, found.id, key_id, user_id=None, now=now)
        if revoked is None:
            raise CommandError(f"There is no key {key_id!r}: `pilotflame keys list` shows the ids")
        await audit_log.record_change(
            connection,
            ServerOperator(found.id, found.shard),
            AuditAction.KEY_REVOKED,
            key_id,
            before=audit_log.hash_content(revoked.before),
            after=audit_log.hash_content(revoked.after),
        )

    async with open_database(settings) as database:
        await database.transaction(revoke)


@asynccontextmanager
async def open_database(settings: ServerSettings) -> AsyncIterator[Database]:
    """Yield the database of the settings, and close it after the block.

    Raises `OutdatedDatabase` if it is not migrated, `NewerDatabase`, `InvalidDatabaseUrl` and `DatabaseUnavailable`.
    """
    database = Database(parse_url(settings.database_url))
    try:
        await schema_migration.require_current(database)
        yield database
    finally:
        await database.close()


async def _find_organization(connection: AsyncConnection, id_or_name: str | None) -> Organization:
    """Return the organization with this id or name; the only one if None is given.

    Raises `CommandError` if there is none or more than one.
    """
    found = await access_store.list_organizations(connection)
    if id_or_name is not None:
        found = [one for one in found if id_or_name in (one.id, one.name)]
    if len(found) == 1:
        return found[0]
    if found:
        choice = ", ".join(f"{one.id} ({one.name})" for one in found)
        raise CommandError(f"There are several organizations: choose one with --org and its id: {choice}")
    raise CommandError("There is no such organization: `pilotflame orgs create` creates one")


async def _find_user(connection: AsyncConnection, organization: Organization, id_or_email: str) -> User:
    """Return the user of an organization with this id or e-mail address (upper and lower case are the same);
    raises `CommandError` without one.
    """
    is_named = or_(col(User.id) == id_or_email, col(User.email) == id_or_email.lower())
    statement = select(User).where(col(User.organization_id) == organization.id, is_named)
    row = (await connection.execute(statement)).mappings().first()
    if row is None:
        raise CommandError(
            f"{organization.name} has no user {id_or_email!r}: `pilotflame users create` creates one"
        )
    return build_row(User, row)
