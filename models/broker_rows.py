"""Messages and rates of a broker over PostgreSQL. Nothing in these tables must outlive a crash; they are not logged."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Index, Text
from sqlmodel import Field, SQLModel


class BrokerMessage(SQLModel, table=True):
    """Message that a process has not taken yet."""

    __tablename__ = "broker_message"
    __table_args__ = (Index("ix_broker_message_created", "queue", "created_at"),)

    queue: str = Field(primary_key=True)
    key: str = Field(primary_key=True)
    """A queue has one message for each key."""
    body: str = Field(sa_column=Column(Text, nullable=False))
    """JSON."""
    created_at: int = Field(sa_column=Column(BigInteger, nullable=False))
    """Microseconds since 1970, by the clock of the database."""


class RateBucket(SQLModel, table=True):
    """Token bucket that several gateways share."""

    __tablename__ = "rate_bucket"

    bucket: str = Field(primary_key=True)
    full_at: int = Field(sa_column=Column(BigInteger, nullable=False))
    """Time at which the bucket is full, in microseconds since 1970."""
