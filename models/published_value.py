"""State of runs: values that their nodes publish while they run, for clients to read."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import BigInteger, Column, SmallInteger, Text
from sqlmodel import Field, SQLModel

from models.column_types import TimestampColumn


class PublishedValue(SQLModel, table=True):
    """Newest value that the nodes of a run have published under a key."""

    __tablename__ = "published_value"

    execution_id: str = Field(primary_key=True)
    key: str = Field(primary_key=True)
    shard: int = Field(sa_column=Column(SmallInteger, nullable=False))
    value: str = Field(sa_column=Column(Text, nullable=False))
    """JSON text."""
    revision: int = Field(sa_column=Column(BigInteger, nullable=False))
    """Number of the change among those of the run's state, from 1."""
    updated_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
