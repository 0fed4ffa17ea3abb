"""Tags and metadata of runs, by which lists find them; runs without any have no rows here."""

from __future__ import annotations

from datetime import datetime
from typing import Final

from sqlalchemy import Column, Index, SmallInteger
from sqlmodel import Field, SQLModel

from models.column_types import TimestampColumn

TAG_KEY: Final = ""
"""Key of tags; keys of metadata are never empty."""


class ExecutionLabel(SQLModel, table=True):
    """One tag, or one metadata entry, of a run."""

    __tablename__ = "execution_label"
    __table_args__ = (
        # Everything by which a list is filtered, sorted and continued, so that it reads no other row.
        Index(
            "ix_execution_label_value",
            *("organization_id", "key", "value", "created_at", "execution_id"),
        ),
    )

    execution_id: str = Field(primary_key=True)
    key: str = Field(primary_key=True)
    """Key of the metadata entry, or `TAG_KEY`."""
    value: str = Field(primary_key=True)
    shard: int = Field(sa_column=Column(SmallInteger, nullable=False))
    organization_id: str
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    """Time of acceptance of the run, equal to that of its data."""
