"""Creation of the first organization, its admin and an API key in an empty database."""

from __future__ import annotations

import structlog
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.access import audit_log
from gateway.access.audit_log import ServerOperator
from models import access_store
from models.access import ALL_KEY_SCOPES, UserRole
from models.audit import AuditAction
from models.database import Database
from models.settings import InvalidSettings

log = structlog.get_logger()

MIN_KEY_LENGTH = 16


async def bootstrap(database: Database, key: str, secret: bytes) -> bool:
    """Create the first organization, an admin and a key with all scopes; return False if an organization exists.

    `key` is the text of the new key, `secret` hashes it. Concurrent gateways create one organization. Raises
    `InvalidSettings` for a key of fewer than 16 characters, or with others than visible ASCII.
    """
    if len(key) < MIN_KEY_LENGTH:
        raise InvalidSettings(f"PILOTFLAME_BOOTSTRAP_API_KEY must have at least {MIN_KEY_LENGTH} characters")
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise InvalidSettings("PILOTFLAME_BOOTSTRAP_API_KEY may hold visible ASCII characters only")
    now = database.clock.now()

    async def make(connection: AsyncConnection) -> bool:
        if connection.dialect.name == "postgresql":
            # When several gateways start at once, one creates the rows; the others wait, then find them.
            await connection.execute(text("LOCK TABLE organization IN EXCLUSIVE MODE"))
        if await access_store.has_organization(connection):
            return False
        organization = await access_store.create_organization(connection, name="Default", now=now)
        admin = await access_store.create_user(
            connection,
            organization=organization,
            email="admin@localhost",
            name="Admin",
            role=UserRole.ADMIN,
            now=now,
        )
        made = await access_store.create_key(
            connection, user=admin, name="bootstrap", scopes=ALL_KEY_SCOPES, secret=secret, now=now, key=key
        )
        author = ServerOperator(organization.id, organization.shard)
        for action, row in ((AuditAction.USER_CREATED, admin), (AuditAction.KEY_CREATED, made.row)):
            after = audit_log.hash_content(row)
            await audit_log.record_change(connection, author, action, row.id, before=None, after=after)
        log.info("first organization created", organization_id=organization.id, user_id=admin.id)
        return True

    return await database.transaction(make)
