"""A change of the server's secret: what an earlier one has encrypted is encrypted anew."""

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
from pilotflame.accounts import opened

if TYPE_CHECKING:
    from sqlalchemy import Row
    from sqlalchemy.ext.asyncio import AsyncConnection

    from models.database import Database
    from models.settings import ServerSettings

BATCH: Final = 100
"""Rows of one transaction: whoever is interrupted loses no more, and goes on where it was when it is run again."""

_Table: TypeAlias = "type[DataSource | SigningSecret | SenderToken]"
_Found: TypeAlias = "Row[str, str, str | None, bytes | None]"
TABLES: Final[Sequence[_Table]] = (DataSource, SigningSecret, SenderToken)
"""All that hold something encrypted."""


@dataclass
class RotationResult:
    """What has come of it."""

    encrypted: int = 0
    """How many secrets were encrypted anew."""
    unreadable: list[str] = field(default_factory=list)
    """Ids of objects that none of the server's secrets opens."""
    waiting_keys: int = 0
    """API keys that still go by an earlier secret: each moves to that of now when it is used."""


async def rotate_secret(settings: ServerSettings) -> RotationResult:
    """Encrypt everything anew by the secret of now; safe to repeat, and while the server runs."""
    vault = SecretVault(settings.secret, settings.previous_secrets)
    rotation = RotationResult()
    async with opened(settings) as database:
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
        anew = {row: resealed for row in rows if (resealed := _resealed(vault, row)) is not None}
        rotation.unreadable += [row.id for row in rows if row not in anew]
        rotation.encrypted += await _replace(database, table, anew)


def _resealed(vault: SecretVault, row: _Found) -> EncryptedText | None:
    owner = {"organization_id": row.organization_id, "object_id": row.id}
    try:
        # None is for rows without a secret, which aren't among these.
        encrypted = EncryptedText(row.secret_id or "", row.encrypted or b"")
        return vault.seal(vault.open(encrypted, **owner), **owner)
    except VaultError:
        return None


async def _replace(database: Database, table: _Table, anew: dict[_Found, EncryptedText]) -> int:
    """Write what was encrypted anew, but for what somebody has changed meanwhile; returns how many there were."""

    async def replace(connection: AsyncConnection) -> int:
        count = 0
        for row, resealed in anew.items():
            result = await connection.execute(
                update(table)
                .where(col(table.id) == row.id, col(table.encrypted) == row.encrypted)
                .values(encrypted=resealed.content, secret_id=resealed.secret_id)
            )
            count += result.rowcount
        return count

    return await database.transaction(replace)
