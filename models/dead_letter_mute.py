"""Mutes: groups of dead letters that lists leave out until a time, with a reason."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import Column, SmallInteger, Text, delete, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import Field, SQLModel, col

from models.column_types import TimestampColumn, build_row

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection


class DeadLetterMute(SQLModel, table=True):
    """Mute of one group of dead letters."""

    __tablename__ = "dead_letter_mute"

    organization_id: str = Field(primary_key=True, foreign_key="organization.id")
    group_id: str = Field(primary_key=True)
    """Fingerprint of the workflow and the error."""
    shard: int = Field(sa_column=Column(SmallInteger, nullable=False))
    workflow_id: str
    reason: str = Field(sa_column=Column(Text, nullable=False))
    muted_by: str
    """Id of the user."""
    muted_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    ends_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))


async def put_mute(connection: AsyncConnection, mute: DeadLetterMute) -> None:
    """Insert a mute, or replace the stored mute of its group.

    Deletes the mutes of other groups of the organization that have ended at `mute.muted_at`.
    """
    of_organization = col(DeadLetterMute.organization_id) == mute.organization_id
    is_over = (col(DeadLetterMute.ends_at) <= mute.muted_at) & (col(DeadLetterMute.group_id) != mute.group_id)
    await connection.execute(delete(DeadLetterMute).where(of_organization, is_over))
    dialect: Any = postgresql if connection.dialect.name == "postgresql" else sqlite
    # One statement: of two requests at once, each would delete nothing, and the second insert would fail.
    statement = dialect.insert(DeadLetterMute).values(mute.model_dump())
    key = {"organization_id", "group_id"}
    changes = {name: statement.excluded[name] for name in DeadLetterMute.model_fields if name not in key}
    await connection.execute(statement.on_conflict_do_update(index_elements=sorted(key), set_=changes))


async def end_mute(connection: AsyncConnection, organization_id: str, group_id: str) -> bool:
    """Delete the mute of a group of dead letters; return whether it existed, ended or not."""
    statement = delete(DeadLetterMute).where(
        col(DeadLetterMute.organization_id) == organization_id, col(DeadLetterMute.group_id) == group_id
    )
    return (await connection.execute(statement)).rowcount > 0


async def read_mutes(
    connection: AsyncConnection, organization_id: str, now: datetime
) -> Mapping[str, DeadLetterMute]:
    """Return the mutes of an organization that have not ended, by the ids of their groups."""
    statement = select(DeadLetterMute).where(
        col(DeadLetterMute.organization_id) == organization_id, col(DeadLetterMute.ends_at) > now
    )
    return {
        row["group_id"]: build_row(DeadLetterMute, row)
        for row in (await connection.execute(statement)).mappings()
    }
