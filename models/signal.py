"""Signals: values that clients send to runs, in their order, and the nodes that wait for them."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Column, Index, SmallInteger, Text, text
from sqlmodel import Field, SQLModel

from models.column_types import TimestampColumn

UNREAD_CONDITION = "delivered_at IS NULL"
"""Condition of signals that no node has received, by which their index is partial."""


class Signal(SQLModel, table=True):
    """Value that a client has sent to a run under a name; one waiting node receives it."""

    __tablename__ = "signal"
    __table_args__ = (
        Index(
            "ix_signal_unread",
            *("execution_id", "number"),
            postgresql_where=text(UNREAD_CONDITION),
            sqlite_where=text(UNREAD_CONDITION),
        ),
    )

    execution_id: str = Field(primary_key=True)
    number: int = Field(primary_key=True)
    """Place among the signals of the run, from 1."""
    shard: int = Field(sa_column=Column(SmallInteger, nullable=False))
    id: str
    name: str
    payload: str = Field(sa_column=Column(Text, nullable=False))
    """JSON text."""
    user_id: str
    """User who has sent it."""
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    node_id: str | None = None
    """Node that has received it; None while it is unread."""
    iteration: str | None = None
    delivered_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    reply: str | None = Field(default=None, sa_column=Column(Text))
    """JSON text with which a node of the run has replied."""
    replied_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))


class SignalWait(SQLModel, table=True):
    """Node that waits for a signal, until a signal answers it or its run is deleted."""

    __tablename__ = "signal_wait"

    execution_id: str = Field(primary_key=True)
    node_id: str = Field(primary_key=True)
    iteration: str = Field(primary_key=True, default="")
    shard: int = Field(sa_column=Column(SmallInteger, nullable=False))
    name: str
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    expires_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """Time after which the node no longer receives a signal; None: no end."""
