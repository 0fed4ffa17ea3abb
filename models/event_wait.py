"""Waits of nodes for events: stored before the look-up of earlier events, so that no event is missed."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Column, Index, SmallInteger, Text
from sqlmodel import Field, SQLModel

from models.column_types import TimestampColumn


class EventWait(SQLModel, table=True):
    """Node that waits for an event."""

    __tablename__ = "event_wait"
    __table_args__ = (Index("ix_event_wait_pattern", "organization_id", "pattern"),)

    execution_id: str = Field(primary_key=True)
    node_id: str = Field(primary_key=True)
    iteration: str = Field(primary_key=True, default="")
    shard: int = Field(sa_column=Column(SmallInteger, nullable=False))
    organization_id: str
    pattern: str
    """Event type, or a prefix that ends in `.*`."""
    condition: str | None = Field(default=None, sa_column=Column(Text))
    """Condition on the event as JSON, which reads the event as `item` and `given` as `data`."""
    given: str = Field(default="[]", sa_column=Column(Text, nullable=False))
    """JSON text."""
    since: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    """Earliest time of a matching event."""
    expires_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """Time before which a matching event must arrive; None: no end."""
