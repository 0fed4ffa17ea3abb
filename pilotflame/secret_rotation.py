"""Rotation of the server's secret: encrypted values move from earlier secrets to the current one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

from sqlalchemy import func, or_, select, update
from sqlmodel import col

from models.access import ApiKey
from models.data_source import DataSource
from models.database_time import DatabaseTime
from models.encryption import EncryptedText, SecretVault, VaultError
from models.ingest import SenderToken
from models.signing_secrets import SigningSecret
from pilotflame.accounts import open_database

if TYPE_CHECKING:
    from sqlalchemy import Row
    from sqlalchemy.ext.asyncio import AsyncConnection

    from models.database import Database
    from models.settings import ServerSettings

BATCH: Final = 100
"""Rows per transaction; an interruption loses one batch at most, and the next run continues."""

_Table: TypeAlias = "type[DataSource | SigningSecret | SenderToken]"
_Found: TypeAlias = "Row[str, str, str | None, bytes | None]"
TABLES: Final[Sequence[_Table]] = (DataSource, SigningSecret, SenderToken)
"""All tables with encrypted values."""


@dataclass
class RotationResult:
    """Result of a rotation of the server secret."""

    encrypted: int = 0
    """Number of values that were encrypted anew."""
    unreadable: list[str] = field(default_factory=list)
    """Ids of objects that none of the server's secrets can decrypt."""
    waiting_keys: int = 0
    """Number of API keys that are hashed with an earlier secret; the next use of a key moves it to the current one."""


async def rotate_secret(settings: ServerSettings) -> RotationResult:
    """Encrypt all stored secrets with the current key; return counts, and the ids of those that no key can decrypt.

    API keys move to the current key only at their next use; those that still depend on an earlier one are counted. Safe
    to repeat and to run beside the server. Raises the errors of `open_database`, and `InvalidSettings` without usable
    secrets.
    """
    vault = SecretVault(settings.secret, settings.previous_secrets)
    rotation = RotationResult()
    async with open_database(settings) as database:
        for table in TABLES:
            await _rotate_table(database, vault, table, rotation)
        is_valid = or_(col(ApiKey.expires_at).is_(None), col(ApiKey.expires_at) > DatabaseTime())
        waiting = select(func.count()).where(
            col(ApiKey.secret_id) != vault.secret_id, col(ApiKey.revoked_at).is_(None), is_valid
        )
        async with database.read() as connection:
            rotation.waiting_keys = await connection.scalar(waiting) or 0
    return rotation


async def _rotate_table(
    database: Database, vault: SecretVault, table: _Table, rotation: RotationResult
) -> None:
    """Encrypt the secrets of one table with the current key, 100 rows at a time, and add to the counts."""
    last = ""
    while True:
        statement = (
            select(col(table.id), col(table.organization_id), col(table.secret_id), col(table.encrypted))
            .where(col(table.secret_id) != vault.secret_id, col(table.id) > last)
            .order_by(col(table.id))
            .limit(BATCH)
        )
        async with database.read() as connection:
            rows = (await connection.execute(statement)).all()
        if not rows:
            return
        last = rows[-1].id
        anew = {row: encrypted for row in rows if (encrypted := _encrypt_again(vault, row)) is not None}
        rotation.unreadable += [row.id for row in rows if row not in anew]
        rotation.encrypted += await write_encrypted(database, table, anew)


def _encrypt_again(vault: SecretVault, row: _Found) -> EncryptedText | None:
    """Return the secret of a row encrypted with the current key; None if no key can decrypt it."""
    owner = {"organization_id": row.organization_id, "object_id": row.id}
    try:
        # Rows without a secret have None, and are not selected.
        encrypted = EncryptedText(row.secret_id or "", row.encrypted or b"")
        return vault.encrypt(vault.decrypt(encrypted, **owner), **owner)
    except VaultError:
        return None


async def write_encrypted(database: Database, table: _Table, anew: dict[_Found, EncryptedText]) -> int:
    """Write newly encrypted values in one transaction, except to rows that have changed meanwhile;
    return the number written.

    Raises `DatabaseUnavailable`.
    """

    async def replace(connection: AsyncConnection) -> int:
        count = 0
        for row, encrypted in anew.items():
            result = await connection.execute(
                update(table)
                .where(col(table.id) == row.id, col(table.encrypted) == row.encrypted)
                .values(encrypted=encrypted.content, secret_id=encrypted.secret_id)
            )
            count += result.rowcount
        return count

    return await database.transaction(replace)
