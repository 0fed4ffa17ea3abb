"""Nodes of runs that wait for an event: written before they look back, so that no event falls between."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Column, Index, SmallInteger, Text
from sqlmodel import Field, SQLModel

from models.column_types import TimestampColumn


class EventWait(SQLModel, table=True):
    """A node that no event has answered yet."""

    __tablename__ = "event_wait"
    __table_args__ = (Index("ix_event_wait_pattern", "organization_id", "pattern"),)

    execution_id: str = Field(primary_key=True)
    node_id: str = Field(primary_key=True)
    iteration: str = Field(primary_key=True, default="")
    shard: int = Field(sa_column=Column(SmallInteger, nullable=False))
    organization_id: str
    pattern: str
    """A type of events, or with `.*` at its end all that begin so."""
    condition: str | None = Field(default=None, sa_column=Column(Text))
    """JSON: what must hold of the event, which it sees as `item`, with `given` as `data`."""
    given: str = Field(default="[]", sa_column=Column(Text, nullable=False))
    """JSON."""
    since: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    """Events count that have come from then on."""
    expires_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """Events count that have come before then; None: for ever."""
