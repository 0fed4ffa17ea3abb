"""Spending on language models: one row for each call of a run, and sums by month."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import BigInteger, Column, Index, SmallInteger
from sqlmodel import Field, SQLModel

from models.column_types import TimestampColumn


class ModelCharge(SQLModel, table=True):
    """Call of a language model: reserved before it, settled after it.

    A charge that stays reserved belongs to a call whose answer was lost, and that its provider may have billed.
    """

    __tablename__ = "model_charge"
    __table_args__ = (Index("ix_model_charge_root", "root_id"),)

    execution_id: str = Field(primary_key=True)
    key: str = Field(primary_key=True)
    """Idempotency key of the call."""
    shard: int = Field(sa_type=SmallInteger)
    root_id: str
    """Execution at the root of the sub-workflows, whose budget counts the call."""
    node: str
    """Node and iteration, whose budget counts the call."""
    tokens: int = Field(sa_column=Column(BigInteger, nullable=False))
    """Input and output together."""
    cost: int | None = Field(default=None, sa_column=Column(BigInteger))
    """Nano-dollars; None if the price is unknown."""
    is_settled: bool
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))


class ModelCost(SQLModel, table=True):
    """Answered calls of one model by one workflow in one calendar month (UTC)."""

    __tablename__ = "model_cost"

    organization_id: str = Field(primary_key=True)
    month: int = Field(primary_key=True)
    """Year and month as one number, such as 202611."""
    workflow_id: str = Field(primary_key=True)
    model_id: str = Field(primary_key=True)
    shard: int = Field(sa_type=SmallInteger)
    calls: int = Field(sa_column=Column(BigInteger, nullable=False))
    unpriced_calls: int = Field(sa_column=Column(BigInteger, nullable=False))
    """Calls whose cost is unknown."""
    input_tokens: int = Field(sa_column=Column(BigInteger, nullable=False))
    output_tokens: int = Field(sa_column=Column(BigInteger, nullable=False))
    cost: int = Field(sa_column=Column(BigInteger, nullable=False))
    """Nano-dollars of the calls with a known cost."""
